//! Placements where the engine's cells are the truth (AKV_SLOTS, AKV_ATTACHED), and their masks.

use super::types::*;
use super::{guard, unbuilt};
use std::ffi::c_void;

/// Writes rows to `n` cells: row i of `key` `[n][n_kv_heads][dim_k]` (after RoPE) and `value` `[n][n_kv_heads][dim_v]`
/// goes to slot `slots[i]` (see akv_cache_desc.n_slots), in the layer's dtypes. AKV_SLOTS: either may be NULL, then only
/// the other is written. AKV_ATTACHED: both are NULL; the attached rows of these slots have changed, K or V or both. A
/// slot that is there twice holds the later row. All rows are checked first: on error nothing is written. Writing takes
/// no memory and cannot fail for lack of it.
///
/// Scales only grow while a tile of 128 cells is written to; a tile whose cells have all been written since it last was
/// closed gets the scales of its rows alone, as if it had been appended. Rows of the last written tiles (64, or a
/// sixteenth of the cache if that is more) are kept as given meanwhile; a write to another one reopens it: rows that
/// outgrow its scales re-encode what is there, and what that loses is in every later certificate.
///
/// Errors: AKV_E_ARGUMENT, AKV_E_NONFINITE, AKV_E_RANGE, AKV_E_BUSY (attention or another write on the layer is running).
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

/// Reads slots `first..first + n` back, in any dtype: rows that are kept as given exactly, others decoded with all
/// stored planes, cells without rows as zeros. Either of `key` and `value` may be NULL. AKV_E_RANGE, with nothing
/// written, if a value is too large for the dtype. AKV_SLOTS only (attached rows are the caller's).
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

/// Forgets slots `first..first + n`, in `layer` or, with -1, in all: they hold zeros. A tile of which nothing is left
/// starts afresh.
///
/// # Safety
/// Pointers must be NULL or valid as described.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn akv_slots_invalidate(cache: *mut akv_cache, layer: i32, first: i64, n: i64) -> akv_status {
    let _ = (cache, layer, first, n);
    guard(|| unbuilt("akv_slots_invalidate"))
}

/// Copies `n` slots from `from` on to those from `to` on, in `layer` or, with -1, in all. Whole tiles (cells of both
/// streams from the same multiple of 128 on) are copied as they are stored; other rows are decoded and written anew,
/// with an error that every later certificate contains. The two stretches must not overlap. AKV_SLOTS only.
///
/// # Safety
/// Pointers must be NULL or valid as described.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn akv_slots_copy(cache: *mut akv_cache, layer: i32, from: i64, to: i64, n: i64) -> akv_status {
    let _ = (cache, layer, from, to, n);
    guard(|| unbuilt("akv_slots_copy"))
}

/// Names the engine's own rows of a layer (AKV_ATTACHED): `[n_streams * n_slots][n_kv_heads][dim]`, in the layer's
/// dtypes. Only read, in akv_slots_write and akv_slots_attention, and only where cells have been written; valid until
/// others are named or the cache is destroyed. Naming rows forgets what had been written.
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

/// Attention of query rows over cells, as akv_aligned_attention: the rows of `desc->q` and of the outputs lie span by
/// span, and row r of all sees, of its span's cells, what row r of `desc->mask` lets it see (all of them without a
/// mask). Cells that were never written count as zeros. Spans of up to 8 rows take the progressive path, longer ones the
/// dense one. visibility, window, kv_from, kv_to and tree must be 0 or NULL: the mask says it all.
///
/// `desc->threads` with nth > 1 needs `desc->workspace` (akv_slots_workspace).
///
/// # Safety
/// Pointers must be NULL or valid as described.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn akv_slots_attention(
    cache: *mut akv_cache,
    layer: i32,
    spans: *const akv_span,
    n_spans: i32,
    desc: *const akv_attention_desc,
) -> akv_status {
    let _ = (cache, layer, spans, n_spans, desc);
    guard(|| unbuilt("akv_slots_attention"))
}

/// Size and alignment of the workspace that akv_slots_attention can do with, in any layer, over spans of up to `max_kv`
/// cells and on up to `max_threads` threads (0 = the context's).
///
/// # Safety
/// Pointers must be NULL or valid as described.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn akv_slots_workspace(
    cache: *const akv_cache,
    max_kv: i64,
    max_threads: i32,
    bytes: *mut usize,
    align: *mut usize,
) -> akv_status {
    let _ = (cache, max_kv, max_threads, bytes, align);
    guard(|| unbuilt("akv_slots_workspace"))
}

/// Makes a mask of up to `max_rows` query rows and `max_kv` cells, for caches of `context`: as many layers and caches as
/// share what their rows see. Until they are set, rows see nothing. `*out` is written on success only.
///
/// Threads: a mask is used by any number of attention calls at once, or set by one call; otherwise AKV_E_BUSY.
///
/// # Safety
/// Pointers must be NULL or valid as described.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn akv_mask_create(
    context: *mut akv_context,
    max_rows: i64,
    max_kv: i64,
    out: *mut *mut akv_mask,
) -> akv_status {
    let _ = (context, max_rows, max_kv, out);
    guard(|| unbuilt("akv_mask_create"))
}

/// Sets rows `first_row..first_row + rows` of a mask from f16 `[rows][n_kv]`, `stride` bytes from a row to the next (0 =
/// contiguous): -inf hides a cell, any other value is added to its score, times the query head's `alibi_slopes` if
/// there are any. Cells from `n_kv` on are hidden. The values are copied. Do it once per graph, not once per layer:
/// whole tiles that a row does not see are skipped. AKV_E_ARGUMENT for NaN and +inf, AKV_E_CAPACITY beyond the mask's
/// size; nothing is set then.
///
/// # Safety
/// Pointers must be NULL or valid as described.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn akv_mask_set(
    mask: *mut akv_mask,
    first_row: i64,
    rows: i64,
    n_kv: i64,
    f16: *const c_void,
    stride: i64,
    stream: *mut c_void,
) -> akv_status {
    let _ = (mask, first_row, rows, n_kv, f16, stride, stream);
    guard(|| unbuilt("akv_mask_set"))
}

/// Destroys a mask. AKV_E_BUSY while calls use it.
///
/// # Safety
/// Pointers must be NULL or valid as described.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn akv_mask_destroy(mask: *mut akv_mask) -> akv_status {
    let _ = mask;
    guard(|| unbuilt("akv_mask_destroy"))
}
