//! A device: its context, memory, and the kernels that it has been given.

use super::driver::Driver;
use super::params::{self, Fault};
use super::{ATTEND_THREADS, ENCODE_SHARED_BYTES, ENCODE_THREADS, STORE_THREADS, WORDS, images};
use crate::format::{Format, Layout, Shape};
use crate::{Error, Result};
use cudarc::driver::sys::{CUcontext, CUevent, CUfunction, CUmodule, CUstream};
use parking_lot::Mutex;
use std::ffi::{CString, c_int, c_void};
use std::marker::PhantomData;
use std::ptr::{NonNull, null_mut};
use std::sync::atomic::{AtomicU32, Ordering};

/// A stream of the caller's; null is its context's default one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Stream(CUstream);

// SAFETY: a number to us; the driver's functions take it from any thread.
unsafe impl Send for Stream {}
// SAFETY: as above.
unsafe impl Sync for Stream {}

impl Stream {
    /// The default stream.
    pub const DEFAULT: Stream = Stream(null_mut());
}

/// CU_DEVICE_ATTRIBUTE_*.
const MAJOR: c_int = 75;
const MINOR: c_int = 76;
const MAX_SHARED_OPTIN: c_int = 97;
const MULTIPROCESSORS: c_int = 16;
/// CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES.
const DYNAMIC_SHARED: c_int = 8;
/// CU_MEMHOSTALLOC_PORTABLE and _DEVICEMAP.
const PORTABLE_MAPPED: u32 = 1 | 2;
/// CU_EVENT_DISABLE_TIMING.
const NO_TIMING: u32 = 2;

/// A kernel, and the threads of its blocks.
#[derive(Debug, Clone, Copy)]
pub struct Kernel {
    function: CUfunction,
    threads: u32,
}

/// The kernels, found once.
#[derive(Debug)]
pub struct Kernels {
    /// `kernels/encode.cu`.
    pub encode: Kernel,
    /// The same, of cells.
    pub write: Kernel,
    /// The same.
    pub adopt: Kernel,
    /// `kernels/cells.cu`.
    pub mask: Kernel,
    /// The same.
    pub spans: Kernel,
    /// `kernels/store.cu`.
    pub store: Kernel,
    /// `kernels/published.cu`, in order.
    pub published: [Kernel; 4],
    /// `kernels/dequantize.cu`.
    pub dequantize: Kernel,
    /// `kernels/merge.cu`.
    pub merge: Kernel,
    /// `kernels/tables.cu`.
    pub poke: Kernel,
    /// The same.
    pub report: Kernel,
    scan: [Kernel; WORDS.len()],
    attend: [Kernel; WORDS.len()],
    dense: [Kernel; WORDS.len()],
}

/// A device and a context on it.
pub struct Device {
    driver: &'static Driver,
    ordinal: i32,
    device: c_int,
    context: CUcontext,
    /// The context is the primary one, retained by us.
    primary: bool,
    module: CUmodule,
    kernels: Option<Kernels>,
    fault: Option<Pinned>,
    /// What failed where no error could be returned.
    failed: Mutex<Option<Error>>,
    name: String,
    image: &'static str,
    /// Its multiprocessors.
    pub multiprocessors: usize,
}

// SAFETY: contexts, modules and functions may be used from any thread; nothing here is changed after creation but the
// fault, which is atomic.
unsafe impl Send for Device {}
// SAFETY: as above.
unsafe impl Sync for Device {}

impl std::fmt::Debug for Device {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Device({}, {}, {})", self.ordinal, self.name, self.image)
    }
}

/// The device's context is the calling thread's current one while this lives; then the former one is again.
pub struct Entered<'a> {
    driver: &'a Driver,
    /// The current context is the thread's.
    _thread: PhantomData<*mut ()>,
}

impl Drop for Entered<'_> {
    fn drop(&mut self) {
        let mut context = null_mut();
        // SAFETY: pops what `Device::enter` pushed.
        unsafe { (self.driver.context_pop)(&mut context) };
    }
}

impl Device {
    /// Device `ordinal`, in `context` or, if that is null, in its primary context.
    ///
    /// # Safety
    /// `context` is null or a context that outlives the device.
    pub unsafe fn new(ordinal: i32, context: *mut c_void) -> Result<Device> {
        let driver = Driver::get()?;
        let mut device = Device {
            driver,
            ordinal,
            device: 0,
            context: context.cast(),
            primary: false,
            module: null_mut(),
            kernels: None,
            fault: None,
            failed: Mutex::new(None),
            name: String::new(),
            image: "",
            multiprocessors: 1,
        };
        // SAFETY: out-pointers to locals, handles that the driver gave.
        unsafe {
            let mut n = 0;
            driver.check((driver.device_count)(&mut n), "cuDeviceGetCount")?;
            if ordinal >= n {
                return Err(Error::Unsupported(format!(
                    "desc->device is {ordinal}: this machine has {n} CUDA devices"
                )));
            }
            driver.check((driver.device_get)(&mut device.device, ordinal), "cuDeviceGet")?;
            if device.context.is_null() {
                driver
                    .check((driver.primary_retain)(&mut device.context, device.device), "cuDevicePrimaryCtxRetain")?;
                device.primary = true;
            }
            let mut name = [0; 256];
            driver.check((driver.device_name)(name.as_mut_ptr(), 255, device.device), "cuDeviceGetName")?;
            device.name = std::ffi::CStr::from_ptr(name.as_ptr()).to_string_lossy().into_owned();
        }
        device.load()?;
        Ok(device)
    }

    fn attribute(&self, attribute: c_int) -> Result<i32> {
        let mut value = 0;
        // SAFETY: writes the local.
        let code = unsafe { (self.driver.device_attribute)(&mut value, attribute, self.device) };
        self.driver.check(code, "cuDeviceGetAttribute")?;
        Ok(value)
    }

    /// Gives it its kernels.
    fn load(&mut self) -> Result<()> {
        let (driver, entered) = (self.driver, self.enter()?);
        let mut on = 0;
        // SAFETY: writes the local.
        driver.check(unsafe { (driver.context_device)(&mut on) }, "cuCtxGetDevice")?;
        if on != self.device {
            return Err(Error::Argument(format!(
                "desc->cuda_context is a context of another device: expected one of desc->device, {}",
                self.ordinal
            )));
        }
        let (major, minor) = (self.attribute(MAJOR)?, self.attribute(MINOR)?);
        let (name, image) = images::of(major, minor).ok_or_else(|| {
            let name = &self.name;
            Error::Unsupported(format!(
                "device {} ({name}) has compute capability {major}.{minor}: expected 8.0 or above",
                self.ordinal
            ))
        })?;
        let image = images::unpack(image)?;
        let mut module = null_mut();
        // SAFETY: a whole image, ended by 0 in case it is text; out-pointers to locals.
        driver.check(unsafe { (driver.module_load)(&mut module, image.as_ptr().cast()) }, "cuModuleLoadData")?;
        let limit = self.attribute(MAX_SHARED_OPTIN)?;
        self.multiprocessors = self.attribute(MULTIPROCESSORS)?.max(1) as usize;
        let find = |name: &str, threads: u32, shared: bool| -> Result<Kernel> {
            let c_name = CString::new(name).map_err(|_| Error::Internal("a kernel's name".to_owned()))?;
            let mut function = null_mut();
            // SAFETY: the module is loaded, and the name a string.
            unsafe {
                driver.check((driver.module_function)(&mut function, module, c_name.as_ptr()), name)?;
                if shared {
                    driver.check((driver.function_attribute)(function, DYNAMIC_SHARED, limit), "cuFuncSetAttribute")?;
                }
            }
            Ok(Kernel { function, threads })
        };
        let instances = |name: &str| -> Result<[Kernel; WORDS.len()]> {
            let mut kernels = [Kernel { function: null_mut(), threads: 0 }; WORDS.len()];
            for (kernel, words) in kernels.iter_mut().zip(WORDS) {
                *kernel = find(&format!("akv_{name}_{words}"), ATTEND_THREADS, true)?;
            }
            Ok(kernels)
        };
        let kernels = (|| {
            Ok(Kernels {
                encode: find("akv_encode", ENCODE_THREADS, false)?,
                write: find("akv_write", ENCODE_THREADS, false)?,
                adopt: find("akv_adopt", ENCODE_THREADS, false)?,
                mask: find("akv_mask", 128, false)?,
                spans: find("akv_spans", 128, false)?,
                store: find("akv_store", STORE_THREADS, false)?,
                published: [
                    find("akv_published_peaks", ATTEND_THREADS, false)?,
                    find("akv_published_scores", ATTEND_THREADS, false)?,
                    find("akv_published_align", ATTEND_THREADS, false)?,
                    find("akv_published_values", ATTEND_THREADS, false)?,
                ],
                dequantize: find("akv_dequantize", 64, false)?,
                merge: find("akv_merge", 64, false)?,
                poke: find("akv_poke", 256, false)?,
                report: find("akv_report", 32, false)?,
                scan: instances("scan")?,
                attend: instances("attend")?,
                dense: instances("dense")?,
            })
        })();
        drop(entered);
        (self.module, self.image) = (module, name);
        self.kernels = Some(kernels?);
        self.fault = Some(Pinned::new(self, size_of::<Fault>())?);
        Ok(())
    }

    /// What runs where, in words.
    pub fn describe(&self) -> String {
        let mut version = 0;
        // SAFETY: writes the local.
        unsafe { (self.driver.driver_version)(&mut version) };
        let (major, minor) = (version / 1000, version % 1000 / 10);
        format!("device {} ({}), kernels {}, driver for CUDA {major}.{minor}", self.ordinal, self.name, self.image)
    }

    /// Makes its context the calling thread's current one.
    pub fn enter(&self) -> Result<Entered<'static>> {
        // SAFETY: a context that lives.
        self.driver.check(unsafe { (self.driver.context_push)(self.context) }, "cuCtxPushCurrent")?;
        Ok(Entered { driver: self.driver, _thread: PhantomData })
    }

    /// A stream of its context.
    ///
    /// # Safety
    /// `stream` is null or a stream that lives while it is used.
    pub unsafe fn stream(&self, stream: *mut c_void, name: &str) -> Result<Stream> {
        let stream: CUstream = stream.cast();
        // Null, and the two special ones, mean the current context's.
        if stream as usize > 2 {
            let mut context = null_mut();
            // SAFETY: the caller's contract.
            self.driver.check(unsafe { (self.driver.stream_context)(stream, &mut context) }, "cuStreamGetCtx")?;
            if context != self.context {
                let text = format!("{name} is a stream of another CUDA context: expected one of the akv_context's");
                return Err(Error::Argument(text));
            }
        }
        Ok(Stream(stream))
    }

    /// True if what is launched on a stream goes into a graph instead of to the device.
    pub fn is_capturing(&self, stream: Stream) -> Result<bool> {
        let (mut status, _entered) = (0, self.enter()?);
        // SAFETY: a stream of the caller's, and a local.
        let code = unsafe { (self.driver.stream_is_capturing)(stream.0, &mut status) };
        self.driver.check(code, "cuStreamIsCapturing")?;
        Ok(status != 0)
    }

    /// Waits for everything that has been launched in its context.
    pub fn synchronize(&self) -> Result<()> {
        let _entered = self.enter()?;
        // SAFETY: no arguments.
        self.driver.check(unsafe { (self.driver.context_synchronize)() }, "cuCtxSynchronize")
    }

    /// Device memory; None if there is none left.
    pub fn alloc(&self, bytes: usize) -> Option<NonNull<u8>> {
        let (mut p, _entered) = (0, self.enter().ok()?);
        // SAFETY: writes the local.
        let code = unsafe { (self.driver.alloc)(&mut p, bytes) };
        if code == 0 { NonNull::new(p as *mut u8) } else { None }
    }

    /// # Safety
    /// `p` came from [`Device::alloc`] and is not used again.
    pub unsafe fn free(&self, p: NonNull<u8>) {
        if let Ok(_entered) = self.enter() {
            // SAFETY: the contract.
            unsafe { (self.driver.free)(p.as_ptr() as u64) };
        }
    }

    /// Copies to device memory, once what was launched before has run. `from` may change when this returns, unless it is
    /// pinned.
    ///
    /// # Safety
    /// `to` is device memory of as many bytes.
    pub unsafe fn upload(&self, to: u64, from: &[u8], stream: Stream) -> Result<()> {
        let _entered = self.enter()?;
        // SAFETY: the contract.
        let code = unsafe { (self.driver.copy_to_device)(to, from.as_ptr().cast(), from.len(), stream.0) };
        self.driver.check(code, "cuMemcpyHtoDAsync")
    }

    /// Copies from device memory, and waits until it has.
    ///
    /// # Safety
    /// `from` is device memory of as many bytes.
    pub unsafe fn download(&self, to: &mut [u8], from: u64) -> Result<()> {
        let _entered = self.enter()?;
        let stream = Stream::DEFAULT.0;
        // SAFETY: the contract, and `to` is not touched until the copy has been waited for.
        let code = unsafe { (self.driver.copy_to_host)(to.as_mut_ptr().cast(), from, to.len(), stream) };
        self.driver.check(code, "cuMemcpyDtoHAsync")?;
        self.synchronize()
    }

    /// Copies within device memory.
    ///
    /// # Safety
    /// Both are device memory of `bytes` bytes.
    pub unsafe fn copy(&self, to: u64, from: u64, bytes: usize, stream: Stream) -> Result<()> {
        let _entered = self.enter()?;
        // SAFETY: the contract.
        self.driver.check(unsafe { (self.driver.copy)(to, from, bytes, stream.0) }, "cuMemcpyDtoDAsync")
    }

    /// Fills device memory with zeros.
    ///
    /// # Safety
    /// `to` is device memory of `bytes` bytes.
    pub unsafe fn clear(&self, to: u64, bytes: usize, stream: Stream) -> Result<()> {
        let _entered = self.enter()?;
        // SAFETY: the contract.
        self.driver.check(unsafe { (self.driver.fill)(to, 0, bytes, stream.0) }, "cuMemsetD8Async")
    }

    /// Keeps an error that no call can return, for [`Device::take_failure`].
    pub fn fail(&self, error: Error) {
        self.failed.lock().get_or_insert(error);
    }

    /// The first such error since the last call, if there is one.
    pub fn take_failure(&self) -> Option<Error> {
        self.failed.lock().take()
    }

    /// Its kernels.
    pub fn kernels(&self) -> Result<&Kernels> {
        self.kernels.as_ref().ok_or_else(|| Error::Internal("a device without kernels".to_owned()))
    }

    /// Launches a kernel, with `shared` bytes of shared memory.
    ///
    /// # Safety
    /// `params` is the kernel's own struct, and its addresses are device memory as `kernels/params.h` says, until the
    /// kernel has run.
    pub unsafe fn launch<P>(
        &self,
        kernel: Kernel,
        grid: [usize; 3],
        shared: usize,
        params: &P,
        stream: Stream,
    ) -> Result<()> {
        if grid.contains(&0) {
            return Ok(());
        }
        let _entered = self.enter()?;
        let [x, y, z] = grid.map(|n| n as u32);
        let mut arguments = [(&raw const *params).cast_mut().cast::<c_void>()];
        // SAFETY: the contract; parameters are copied during the call.
        let code = unsafe {
            let arguments = arguments.as_mut_ptr();
            (self.driver.launch)(
                kernel.function,
                x,
                y,
                z,
                kernel.threads,
                1,
                1,
                shared as u32,
                stream.0,
                arguments,
                null_mut(),
            )
        };
        self.driver.check(code, "cuLaunchKernel")
    }

    /// Where kernels report faults.
    pub fn fault_address(&self) -> u64 {
        self.fault.as_ref().map_or(0, |fault| fault.address)
    }

    /// The first fault since the last call, if there is one.
    pub fn take_fault(&self) -> Option<Fault> {
        let fault = self.fault.as_ref()?.data.as_ptr().cast::<Fault>();
        // SAFETY: our own memory; the device writes `status` after the other fields, and nothing while `claimed` is set.
        unsafe {
            let status = AtomicU32::from_ptr(&raw mut (*fault).status);
            if status.load(Ordering::Acquire) == 0 {
                return None;
            }
            let found = fault.read_volatile();
            status.store(0, Ordering::Release);
            AtomicU32::from_ptr(&raw mut (*fault).claimed).store(0, Ordering::Release);
            Some(found)
        }
    }
}

/// Where an instance is among them.
fn index(words: usize) -> usize {
    WORDS.iter().position(|&w| w == words).unwrap_or(WORDS.len() - 1)
}

impl Kernels {
    /// Of both phases, for a shape.
    pub fn attention(&self, shape: &Shape) -> (Kernel, Kernel) {
        let i = index(super::words(shape));
        (self.scan[i], self.attend[i])
    }

    /// That appends rows, and the shared memory of its blocks.
    pub fn append(&self, layout: &Layout) -> (Kernel, usize) {
        match layout.format {
            Format::Aligned => (self.encode, ENCODE_SHARED_BYTES),
            Format::Published | Format::Raw => (self.store, 0),
        }
    }

    /// Of rows that read all digits.
    pub fn dense(&self, shape: &Shape) -> Kernel {
        self.dense[index(super::dense_words(shape))]
    }
}

impl Drop for Device {
    fn drop(&mut self) {
        if let Some(fault) = self.fault.take() {
            fault.free(self);
        }
        if !self.module.is_null()
            && let Ok(_entered) = self.enter()
        {
            // SAFETY: nothing of it runs: caches waited for their work.
            unsafe { (self.driver.module_unload)(self.module) };
        }
        if self.primary {
            // SAFETY: retained once.
            unsafe { (self.driver.primary_release)(self.device) };
        }
    }
}

/// Host memory that the device reads and writes, zeroed. Its owner frees it.
#[derive(Debug)]
pub struct Pinned {
    data: NonNull<u8>,
    bytes: usize,
    /// Where the device finds it.
    pub address: u64,
}

// SAFETY: it owns its memory.
unsafe impl Send for Pinned {}
// SAFETY: as above.
unsafe impl Sync for Pinned {}

impl Pinned {
    /// `bytes` bytes.
    pub fn new(device: &Device, bytes: usize) -> Result<Pinned> {
        let (driver, _entered) = (device.driver, device.enter()?);
        let (mut p, mut address) = (null_mut(), 0);
        // SAFETY: out-pointers to locals; the memory is `bytes` long.
        unsafe {
            driver.check((driver.host_alloc)(&mut p, bytes, PORTABLE_MAPPED), "cuMemHostAlloc")?;
            let data = NonNull::new(p.cast::<u8>()).ok_or_else(|| Error::Memory("cuMemHostAlloc".to_owned()))?;
            data.write_bytes(0, bytes);
            let code = (driver.host_address)(&mut address, p, 0);
            if code != 0 {
                (driver.host_free)(p);
            }
            driver.check(code, "cuMemHostGetDevicePointer")?;
            Ok(Pinned { data, bytes, address })
        }
    }

    /// Its bytes. The device must not be using them.
    pub fn bytes(&mut self) -> &mut [u8] {
        // SAFETY: our own, initialised.
        unsafe { std::slice::from_raw_parts_mut(self.data.as_ptr(), self.bytes) }
    }

    /// Gives it back.
    pub fn free(self, device: &Device) {
        if let Ok(_entered) = device.enter() {
            // SAFETY: from cuMemHostAlloc, and not used again.
            unsafe { (device.driver.host_free)(self.data.as_ptr().cast()) };
        }
    }
}

/// A point in a stream's work.
#[derive(Debug)]
pub struct Event(CUevent);

// SAFETY: as [`Stream`].
unsafe impl Send for Event {}
// SAFETY: as above.
unsafe impl Sync for Event {}

impl Event {
    /// One that has passed.
    pub fn new(device: &Device) -> Result<Event> {
        let (mut event, _entered) = (null_mut(), device.enter()?);
        // SAFETY: writes the local.
        let code = unsafe { (device.driver.event_create)(&mut event, NO_TIMING) };
        device.driver.check(code, "cuEventCreate")?;
        Ok(Event(event))
    }

    /// Moves it to the end of what has been launched.
    pub fn record(&self, device: &Device, stream: Stream) -> Result<()> {
        let _entered = device.enter()?;
        // SAFETY: both live.
        device.driver.check(unsafe { (device.driver.event_record)(self.0, stream.0) }, "cuEventRecord")
    }

    /// Returns when it has passed.
    pub fn wait(&self, device: &Device) -> Result<()> {
        let _entered = device.enter()?;
        // SAFETY: it lives.
        device.driver.check(unsafe { (device.driver.event_synchronize)(self.0) }, "cuEventSynchronize")
    }

    /// Gives it back.
    pub fn free(self, device: &Device) {
        if let Ok(_entered) = device.enter() {
            // SAFETY: not used again.
            unsafe { (device.driver.event_destroy)(self.0) };
        }
    }
}

/// A plain struct's bytes.
pub fn bytes_of<T: Copy>(items: &[T]) -> &[u8] {
    // SAFETY: the structs of `params` have no padding.
    unsafe { std::slice::from_raw_parts(items.as_ptr().cast(), size_of_val(items)) }
}

const _: () = assert!(size_of::<params::Append>().is_multiple_of(8));
