//! Contexts.

use super::types::*;
use super::{guard, unbuilt};
use std::ffi::c_void;

/// Makes a context. `*out` is written on success only.
///
/// Errors: AKV_E_VERSION (abi_version, unknown tail), AKV_E_ARGUMENT, AKV_E_UNSUPPORTED (backend or ISA that this
/// machine or build lacks), AKV_E_MEMORY.
///
/// Threads: a context may be used from any number of threads at once.
///
/// # Safety
/// Pointers must be NULL or valid as described.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn akv_context_create(desc: *const akv_context_desc, out: *mut *mut akv_context) -> akv_status {
    guard(|| unbuilt("akv_context_create"))
}

/// Destroys a context and joins its threads. AKV_E_BUSY while caches made from it live (nothing happens then). NULL is
/// AKV_E_HANDLE.
///
/// # Safety
/// Pointers must be NULL or valid as described.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn akv_context_destroy(context: *mut akv_context) -> akv_status {
    guard(|| unbuilt("akv_context_destroy"))
}

/// Returns and clears the sticky fault of work that was launched on a device (NaN in K, say): AKV_OK if there is none,
/// otherwise the fault's status, with the place in `*sequence`, `*layer`, `*row` (each NULL allowed). On the CPU every
/// fault is returned by the call itself, so this is always AKV_OK.
///
/// # Safety
/// Pointers must be NULL or valid as described.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn akv_poll(
    context: *mut akv_context,
    sequence: *mut akv_sequence,
    layer: *mut i32,
    row: *mut u64,
) -> akv_status {
    guard(|| unbuilt("akv_poll"))
}

/// Asks whether caches of `cache` can be created here and attended as `attention` says (NULL: with defaults), without
/// making one: AKV_OK, or what the real call would return, with its text. `*path` (NULL allowed) gets the sum of
/// AKV_PATH_* that such calls can take. Pointers inside `attention` are only tested for NULL.
///
/// # Safety
/// Pointers must be NULL or valid as described.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn akv_supports(
    context: *const akv_context,
    cache: *const akv_cache_desc,
    attention: *const akv_attention_desc,
    path: *mut i32,
) -> akv_status {
    guard(|| unbuilt("akv_supports"))
}
