//! Versions, status codes and the text of the last error.

use super::check::pointer;
use super::types::*;
use crate::Error;
use std::cell::RefCell;
use std::ffi::{CStr, c_char};

thread_local! {
    static LAST_ERROR: RefCell<String> = const { RefCell::new(String::new()) };
}

/// Records `error` as this thread's last and returns its code.
pub(super) fn fail(error: &Error) -> akv_status {
    // A thread that is being torn down has no text any more.
    let _ = LAST_ERROR.try_with(|text| text.replace(error.to_string()));
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

pub(super) const VERSION: &CStr = {
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
    // Not through `guard`: a failure here would replace the text that is asked for. Nothing below panics.
    if buf.is_null() && cap > 0 || !needed.is_null() && pointer(needed, "needed").is_err() {
        return AKV_E_ARGUMENT;
    }
    let text = LAST_ERROR.try_with(|text| text.borrow().clone()).unwrap_or_default();
    if !needed.is_null() {
        // SAFETY: not NULL, aligned, and the caller's contract.
        unsafe { needed.write(text.len() + 1) };
    }
    if cap > 0 {
        let end = (0..=text.len().min(cap - 1)).rev().find(|&i| text.is_char_boundary(i)).unwrap_or(0);
        // SAFETY: by the caller's contract `buf` has `cap` bytes, and end < cap.
        unsafe {
            std::ptr::copy_nonoverlapping(text.as_ptr(), buf.cast(), end);
            buf.add(end).write(0);
        }
    }
    AKV_OK
}

#[cfg(test)]
mod tests {
    use super::*;

    fn last_error(cap: usize) -> (String, usize) {
        let (mut buf, mut needed) = (vec![b'x' as c_char; cap], 0);
        // SAFETY: `buf` has `cap` bytes.
        assert_eq!(unsafe { akv_last_error(buf.as_mut_ptr(), cap, &mut needed) }, AKV_OK);
        // SAFETY: terminated, as tested by its being found within the vector.
        let text = unsafe { CStr::from_ptr(buf.as_ptr()) };
        assert!(text.to_bytes().len() < cap);
        (text.to_str().unwrap().to_owned(), needed)
    }

    #[test]
    fn the_last_error_is_cut_not_lost() {
        assert_eq!(last_error(9), (String::new(), 1));
        assert_eq!(fail(&Error::Argument("a\u{e9}z".to_owned())), AKV_E_ARGUMENT);
        assert_eq!(last_error(9), ("a\u{e9}z".to_owned(), 5));
        assert_eq!(last_error(4), ("a\u{e9}".to_owned(), 5));
        assert_eq!(last_error(3), ("a".to_owned(), 5), "no half characters");
        assert_eq!(last_error(1), (String::new(), 5));
        // SAFETY: NULL is allowed for `needed`, and for `buf` if cap is 0.
        unsafe {
            assert_eq!(akv_last_error(std::ptr::null_mut(), 0, std::ptr::null_mut()), AKV_OK);
            assert_eq!(akv_last_error(std::ptr::null_mut(), 4, std::ptr::null_mut()), AKV_E_ARGUMENT);
        }
        assert_eq!(last_error(9).0, "a\u{e9}z", "kept until the next failing call");
        assert_eq!(std::thread::spawn(|| last_error(9).0).join().unwrap(), "", "one per thread");
    }

    #[test]
    fn panics_become_codes() {
        assert_eq!(super::super::guard(|| panic!("boom")), AKV_E_INTERNAL);
        assert_eq!(last_error(99).0, "internal error: boom");
    }
}
