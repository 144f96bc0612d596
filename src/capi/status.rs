//! Versions, status codes and the text of the last error.

use super::types::*;
use super::{Error, guard, unbuilt};
use std::cell::RefCell;
use std::ffi::{CStr, c_char};

thread_local! {
    static LAST_ERROR: RefCell<String> = const { RefCell::new(String::new()) };
}

/// Records `error` as this thread's last and returns its code.
pub(super) fn fail(error: &Error) -> akv_status {
    LAST_ERROR.with_borrow_mut(|text| *text = error.to_string());
    match error {
        Error::Argument(_) => AKV_E_ARGUMENT,
        Error::Unsupported(_) => AKV_E_UNSUPPORTED,
        Error::Memory(_) => AKV_E_MEMORY,
        Error::Capacity(_) => AKV_E_CAPACITY,
        Error::Handle(_) => AKV_E_HANDLE,
        Error::NonFinite(_) => AKV_E_NONFINITE,
        Error::Range(_) => AKV_E_RANGE,
        Error::Busy(_) => AKV_E_BUSY,
        Error::Corrupt(_) => AKV_E_CORRUPT,
        Error::Version(_) => AKV_E_VERSION,
        Error::Device(_) => AKV_E_DEVICE,
        Error::Internal(_) => AKV_E_INTERNAL,
    }
}

/// The AKV_ABI_VERSION that this library speaks.
#[unsafe(no_mangle)]
pub extern "C" fn akv_abi_version() -> u32 {
    AKV_ABI_VERSION
}

const VERSION: &CStr = {
    const TEXT: &str =
        concat!("alignedkv ", env!("CARGO_PKG_VERSION"), " (", env!("ALIGNEDKV_COMMIT"), ") cpu: scalar avx2 avx512\0");
    match CStr::from_bytes_with_nul(TEXT.as_bytes()) {
        Ok(text) => text,
        Err(_) => panic!("a NUL in the version"),
    }
};

/// Name, version, commit and what is built in, for logs: static, never NULL.
#[unsafe(no_mangle)]
pub extern "C" fn akv_version_string() -> *const c_char {
    VERSION.as_ptr()
}

/// Name of a status ("AKV_E_ARGUMENT"), or "unknown status": static, never NULL.
#[unsafe(no_mangle)]
pub extern "C" fn akv_status_string(status: akv_status) -> *const c_char {
    let name = match status {
        AKV_OK => c"AKV_OK",
        AKV_E_ARGUMENT => c"AKV_E_ARGUMENT",
        AKV_E_UNSUPPORTED => c"AKV_E_UNSUPPORTED",
        AKV_E_MEMORY => c"AKV_E_MEMORY",
        AKV_E_CAPACITY => c"AKV_E_CAPACITY",
        AKV_E_HANDLE => c"AKV_E_HANDLE",
        AKV_E_NONFINITE => c"AKV_E_NONFINITE",
        AKV_E_RANGE => c"AKV_E_RANGE",
        AKV_E_BUSY => c"AKV_E_BUSY",
        AKV_E_CORRUPT => c"AKV_E_CORRUPT",
        AKV_E_VERSION => c"AKV_E_VERSION",
        AKV_E_DEVICE => c"AKV_E_DEVICE",
        AKV_E_INTERNAL => c"AKV_E_INTERNAL",
        _ => c"unknown status",
    };
    name.as_ptr()
}

/// Copies the text of this thread's last failed call, cut to `cap` bytes with its NUL, into `buf`; `needed` (NULL
/// allowed) gets the bytes that the whole text needs. The text stays until the thread's next failing call; without one
/// it is empty. `buf` may be NULL if `cap` is 0. It never fails for a small `cap`.
///
/// # Safety
/// Pointers must be NULL or valid as described.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn akv_last_error(buf: *mut c_char, cap: usize, needed: *mut usize) -> akv_status {
    guard(|| unbuilt("akv_last_error"))
}
