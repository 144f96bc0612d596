//! The CUDA driver: functions of a libcuda that is looked for at run time, found by cudarc. They are called through
//! types of our own that return numbers: a driver may be newer than any list of its error codes.

use crate::{Error, Result};
use cudarc::driver::sys::{CUcontext, CUdevice, CUdeviceptr, CUevent, CUfunction, CUmodule, CUstream};
use std::ffi::{CStr, c_char, c_int, c_uint, c_void};
use std::sync::OnceLock;

macro_rules! functions {
    ($($name:ident = $symbol:literal ($($arg:ty),*);)*) => {
        /// The functions that the backend calls, by their names without `cu`.
        #[allow(missing_docs)]
        pub struct Driver {
            $(pub $name: unsafe extern "C" fn($($arg),*) -> c_uint,)*
        }

        impl Driver {
            fn find() -> Result<Driver> {
                // SAFETY: loading libcuda runs its initialisers, as every CUDA program does.
                if !unsafe { cudarc::driver::sys::is_culib_present() } {
                    return Err(Error::Unsupported("backend AKV_CUDA: there is no libcuda on this machine".to_owned()));
                }
                // SAFETY: it is there.
                let library = unsafe { cudarc::driver::sys::culib() };
                $(
                    // SAFETY: the function has this type in cuda.h, whose enums are ints.
                    let symbol = unsafe { library.get::<unsafe extern "C" fn($($arg),*) -> c_uint>($symbol) };
                    let Ok($name) = symbol.map(|symbol| *symbol) else {
                        let name = String::from_utf8_lossy($symbol);
                        return Err(Error::Unsupported(format!("backend AKV_CUDA: the driver is too old: it has no {name}")));
                    };
                )*
                Ok(Driver { $($name),* })
            }
        }
    };
}

functions! {
    init = b"cuInit" (c_uint);
    driver_version = b"cuDriverGetVersion" (*mut c_int);
    device_count = b"cuDeviceGetCount" (*mut c_int);
    device_get = b"cuDeviceGet" (*mut CUdevice, c_int);
    device_name = b"cuDeviceGetName" (*mut c_char, c_int, CUdevice);
    device_attribute = b"cuDeviceGetAttribute" (*mut c_int, c_int, CUdevice);
    primary_retain = b"cuDevicePrimaryCtxRetain" (*mut CUcontext, CUdevice);
    primary_release = b"cuDevicePrimaryCtxRelease_v2" (CUdevice);
    context_push = b"cuCtxPushCurrent_v2" (CUcontext);
    context_pop = b"cuCtxPopCurrent_v2" (*mut CUcontext);
    context_device = b"cuCtxGetDevice" (*mut CUdevice);
    context_synchronize = b"cuCtxSynchronize" ();
    stream_context = b"cuStreamGetCtx" (CUstream, *mut CUcontext);
    stream_is_capturing = b"cuStreamIsCapturing" (CUstream, *mut c_int);
    event_create = b"cuEventCreate" (*mut CUevent, c_uint);
    event_destroy = b"cuEventDestroy_v2" (CUevent);
    event_record = b"cuEventRecord" (CUevent, CUstream);
    event_synchronize = b"cuEventSynchronize" (CUevent);
    module_load = b"cuModuleLoadData" (*mut CUmodule, *const c_void);
    module_unload = b"cuModuleUnload" (CUmodule);
    module_function = b"cuModuleGetFunction" (*mut CUfunction, CUmodule, *const c_char);
    function_attribute = b"cuFuncSetAttribute" (CUfunction, c_int, c_int);
    launch = b"cuLaunchKernel" (
        CUfunction, c_uint, c_uint, c_uint, c_uint, c_uint, c_uint, c_uint, CUstream, *mut *mut c_void, *mut *mut c_void
    );
    alloc = b"cuMemAlloc_v2" (*mut CUdeviceptr, usize);
    free = b"cuMemFree_v2" (CUdeviceptr);
    host_alloc = b"cuMemHostAlloc" (*mut *mut c_void, usize, c_uint);
    host_free = b"cuMemFreeHost" (*mut c_void);
    host_address = b"cuMemHostGetDevicePointer_v2" (*mut CUdeviceptr, *mut c_void, c_uint);
    copy_to_device = b"cuMemcpyHtoDAsync_v2" (CUdeviceptr, *const c_void, usize, CUstream);
    copy_to_host = b"cuMemcpyDtoHAsync_v2" (*mut c_void, CUdeviceptr, usize, CUstream);
    copy = b"cuMemcpyDtoDAsync_v2" (CUdeviceptr, CUdeviceptr, usize, CUstream);
    fill = b"cuMemsetD8Async" (CUdeviceptr, u8, usize, CUstream);
    error_name = b"cuGetErrorName" (c_uint, *mut *const c_char);
    error_text = b"cuGetErrorString" (c_uint, *mut *const c_char);
}

/// CUDA_ERROR_OUT_OF_MEMORY.
const OUT_OF_MEMORY: c_uint = 2;

impl Driver {
    /// The driver of this process, initialised; the same answer every time.
    pub fn get() -> Result<&'static Driver> {
        static DRIVER: OnceLock<Result<Driver>> = OnceLock::new();
        let driver = DRIVER.get_or_init(|| {
            let driver = Driver::find()?;
            // SAFETY: flags must be 0.
            let code = unsafe { (driver.init)(0) };
            match code {
                0 => Ok(driver),
                _ => Err(Error::Unsupported(format!("backend AKV_CUDA: cuInit failed: {}", driver.describe(code)))),
            }
        });
        driver.as_ref().map_err(Clone::clone)
    }

    /// An error code in words.
    fn describe(&self, code: c_uint) -> String {
        let text = |function: unsafe extern "C" fn(c_uint, *mut *const c_char) -> c_uint| {
            let mut text = std::ptr::null();
            // SAFETY: writes NULL or a string that lives as long as the library.
            unsafe {
                if function(code, &mut text) != 0 || text.is_null() {
                    return None;
                }
                Some(CStr::from_ptr(text).to_string_lossy().into_owned())
            }
        };
        let name = text(self.error_name).unwrap_or_else(|| "unknown to the driver".to_owned());
        let text = text(self.error_text).map_or(String::new(), |text| format!(", {text}"));
        format!("error {code} ({name}{text})")
    }

    /// An error unless `code` is 0.
    pub fn check(&self, code: c_uint, what: &str) -> Result<()> {
        match code {
            0 => Ok(()),
            OUT_OF_MEMORY => Err(Error::Memory(format!("{what}: {}", self.describe(code)))),
            _ => Err(Error::Device(format!("{what}: {}", self.describe(code)))),
        }
    }
}
