//! Placements where the engine's cells are the truth (AKV_SLOTS, AKV_ATTACHED), and their masks.

use super::types::*;
use super::{guard, unbuilt};
use std::ffi::c_void;

/// Writes `n` rows of K and V to the cells `slots`; NULL rows = the attached rows already hold the new values. Not
/// built yet: AKV_E_UNSUPPORTED.
///
/// # Safety
/// Pointers must be NULL or valid as described.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn akv_slots_write(
    cache: *mut akv_cache,
    layer: i32,
    slots: *const i64,
    n: i64,
    key: *const akv_rows,
    value: *const akv_rows,
    stream: *mut c_void,
) -> akv_status {
    let _ = (cache, layer, slots, n, key, value, stream);
    guard(|| unbuilt("akv_slots_write"))
}

/// Reads cells `first..first + n` back. Not built yet: AKV_E_UNSUPPORTED.
///
/// # Safety
/// Pointers must be NULL or valid as described.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn akv_slots_read(
    cache: *mut akv_cache,
    layer: i32,
    first: i64,
    n: i64,
    key: *const akv_rows,
    value: *const akv_rows,
    stream: *mut c_void,
) -> akv_status {
    let _ = (cache, layer, first, n, key, value, stream);
    guard(|| unbuilt("akv_slots_read"))
}

/// Forgets cells `first..first + n`. Not built yet: AKV_E_UNSUPPORTED.
///
/// # Safety
/// Pointers must be NULL or valid as described.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn akv_slots_invalidate(cache: *mut akv_cache, layer: i32, first: i64, n: i64) -> akv_status {
    let _ = (cache, layer, first, n);
    guard(|| unbuilt("akv_slots_invalidate"))
}

/// Names the engine's own rows of a layer (AKV_ATTACHED); they must outlive the cache. Not built yet:
/// AKV_E_UNSUPPORTED.
///
/// # Safety
/// Pointers must be NULL or valid as described.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn akv_attach_rows(
    cache: *mut akv_cache,
    layer: i32,
    key: *const akv_rows,
    value: *const akv_rows,
) -> akv_status {
    let _ = (cache, layer, key, value);
    guard(|| unbuilt("akv_attach_rows"))
}

/// Attention of `n_q` query rows over the first `n_kv` cells, as `desc->mask` says. Not built yet: AKV_E_UNSUPPORTED.
///
/// # Safety
/// Pointers must be NULL or valid as described.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn akv_slots_attention(
    cache: *mut akv_cache,
    layer: i32,
    n_kv: i64,
    n_q: i64,
    desc: *const akv_attention_desc,
) -> akv_status {
    let _ = (cache, layer, n_kv, n_q, desc);
    guard(|| unbuilt("akv_slots_attention"))
}

/// Makes a mask of up to `max_rows` query rows and `max_kv` cells. Not built yet: AKV_E_UNSUPPORTED.
///
/// # Safety
/// Pointers must be NULL or valid as described.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn akv_mask_create(
    cache: *mut akv_cache,
    max_rows: i64,
    max_kv: i64,
    out: *mut *mut akv_mask,
) -> akv_status {
    let _ = (cache, max_rows, max_kv, out);
    guard(|| unbuilt("akv_mask_create"))
}

/// Sets a mask from `[rows][n_kv]` f16, 0 or -inf, or additive; `stride` in bytes. Not built yet: AKV_E_UNSUPPORTED.
///
/// # Safety
/// Pointers must be NULL or valid as described.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn akv_mask_set(
    mask: *mut akv_mask,
    f16: *const c_void,
    rows: i64,
    n_kv: i64,
    stride: i64,
    stream: *mut c_void,
) -> akv_status {
    let _ = (mask, f16, rows, n_kv, stride, stream);
    guard(|| unbuilt("akv_mask_set"))
}

/// Destroys a mask. Not built yet: AKV_E_UNSUPPORTED.
///
/// # Safety
/// Pointers must be NULL or valid as described.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn akv_mask_destroy(mask: *mut akv_mask) -> akv_status {
    let _ = mask;
    guard(|| unbuilt("akv_mask_destroy"))
}
