//! Caches.

use super::types::*;
use super::{guard, unbuilt};
use std::ffi::c_void;

/// Makes a cache. Memory for rows is taken as sequences grow. `*out` is written on success only.
///
/// Errors: AKV_E_ARGUMENT, AKV_E_UNSUPPORTED, AKV_E_VERSION, AKV_E_HANDLE, AKV_E_MEMORY.
///
/// Threads: calls on different sequences may run at once. A sequence is read by any number of calls at once or written
/// by one; a call that finds it otherwise returns AKV_E_BUSY and changes nothing.
///
/// # Safety
/// Pointers must be NULL or valid as described.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn akv_cache_create(
    context: *mut akv_context,
    desc: *const akv_cache_desc,
    out: *mut *mut akv_cache,
) -> akv_status {
    guard(|| unbuilt("akv_cache_create"))
}

/// Destroys a cache with all its sequences. AKV_E_BUSY while batches made from it live, or calls are in it.
///
/// # Safety
/// Pointers must be NULL or valid as described.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn akv_cache_destroy(cache: *mut akv_cache) -> akv_status {
    guard(|| unbuilt("akv_cache_destroy"))
}

/// Reports what the cache holds. `out->struct_size` must be set.
///
/// # Safety
/// Pointers must be NULL or valid as described.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn akv_cache_usage(cache: *const akv_cache, out: *mut akv_usage) -> akv_status {
    guard(|| unbuilt("akv_cache_usage"))
}
