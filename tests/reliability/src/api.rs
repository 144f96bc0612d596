//! The C ABI, as an engine in Rust would call it.

pub use alignedkv::capi::attention::*;
pub use alignedkv::capi::batch::*;
pub use alignedkv::capi::cache::*;
pub use alignedkv::capi::context::*;
pub use alignedkv::capi::sequence::*;
pub use alignedkv::capi::slots::*;
pub use alignedkv::capi::status::*;
pub use alignedkv::capi::types::*;

use crate::memory::{Hooks, hook_alloc, hook_dealloc};
use std::ffi::{CStr, c_char, c_void};
use std::ptr::null_mut;

/// A descriptor of zeros.
pub fn zeroed<T: Copy>() -> T {
    // SAFETY: used for the plain data of the C ABI alone, where all zeros is a value.
    unsafe { std::mem::zeroed() }
}

/// This thread's last error.
pub fn last_error() -> String {
    let mut text = [0 as c_char; 1024];
    // SAFETY: 1024 bytes, which come back terminated.
    unsafe {
        akv_last_error(text.as_mut_ptr(), text.len(), null_mut());
        CStr::from_ptr(text.as_ptr()).to_string_lossy().into_owned()
    }
}

/// A handle: a number, which the library never dereferences, so that threads may share it.
#[derive(Debug)]
pub struct Handle<T>(pub *mut T);

impl<T> Clone for Handle<T> {
    fn clone(&self) -> Self {
        *self
    }
}
impl<T> Copy for Handle<T> {}
// SAFETY: see above.
unsafe impl<T> Send for Handle<T> {}
// SAFETY: see above.
unsafe impl<T> Sync for Handle<T> {}

/// `struct_size` of a descriptor.
pub fn size<T>() -> u32 {
    size_of::<T>() as u32
}

/// Makes a context whose memory comes from `hooks`.
pub fn context(n_threads: i32, hooks: &'static Hooks) -> Handle<akv_context> {
    let desc = akv_context_desc {
        struct_size: size::<akv_context_desc>(),
        abi_version: AKV_ABI_VERSION,
        n_threads,
        alloc: Some(hook_alloc),
        dealloc: Some(hook_dealloc),
        alloc_user: (&raw const *hooks).cast_mut().cast::<c_void>(),
        ..zeroed()
    };
    let mut out = null_mut();
    // SAFETY: a valid descriptor and output.
    let status = unsafe { akv_context_create(&desc, &mut out) };
    assert_eq!(status, AKV_OK, "{}", last_error());
    Handle(out)
}

/// A batch without bounds.
pub fn batch(cache: Handle<akv_cache>, max_threads: i32, max_kv: i64) -> (akv_status, Handle<akv_batch>) {
    let bounds = akv_batch_desc { struct_size: size::<akv_batch_desc>(), max_threads, max_kv, ..zeroed() };
    let mut out = null_mut();
    // SAFETY: a valid descriptor and output.
    let status = unsafe { akv_batch_create(cache.0, &bounds, &mut out) };
    (status, Handle(out))
}

/// What a cache holds.
pub fn usage(cache: Handle<akv_cache>) -> akv_usage {
    let mut usage = akv_usage { struct_size: size::<akv_usage>(), ..zeroed() };
    // SAFETY: a valid output.
    let status = unsafe { akv_cache_usage(cache.0, &mut usage) };
    assert_eq!(status, AKV_OK, "{}", last_error());
    usage
}

/// Rows `[n][heads][dim]` without gaps.
pub fn rows(data: *const u64, dtype: i32) -> akv_rows {
    akv_rows { data: data.cast_mut().cast(), dtype, ..zeroed() }
}

/// Name of a status.
pub fn name(status: akv_status) -> String {
    // SAFETY: a static string.
    unsafe { CStr::from_ptr(akv_status_string(status)) }.to_string_lossy().into_owned()
}
