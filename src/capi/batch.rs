//! Steps: batches, and appending.

use super::types::*;
use super::{guard, unbuilt};
use std::ffi::c_void;

/// Makes a batch: it carries one model step at a time through all layers. `bounds` holds max_sequences, max_q, max_kv,
/// max_threads; the rest is 0 or NULL. `*out` is written on success only.
///
/// Threads: begin, commit, abort and destroy by one thread at a time; akv_aligned_attention on a begun batch from any
/// number at once, also for different layers; akv_quantize_kv for different layers at once.
///
/// # Safety
/// Pointers must be NULL or valid as described.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn akv_batch_create(
    cache: *mut akv_cache,
    bounds: *const akv_batch_desc,
    out: *mut *mut akv_batch,
) -> akv_status {
    guard(|| unbuilt("akv_batch_create"))
}

/// Begins a step: reserves the pages that its new tokens need in all layers, all or nothing, and makes the sequences
/// its own. Until commit or abort nothing fails for capacity. A sequence that is in another begun batch is AKV_E_BUSY;
/// one beyond the bounds or max_bytes AKV_E_CAPACITY; a batch that is begun already AKV_E_BUSY. Then, per layer:
/// akv_quantize_kv (if tokens are new), akv_aligned_attention. `stream` is NULL on the CPU; on CUDA call it outside
/// capture.
///
/// # Safety
/// Pointers must be NULL or valid as described.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn akv_batch_begin(
    batch: *mut akv_batch,
    desc: *const akv_batch_desc,
    stream: *mut c_void,
) -> akv_status {
    guard(|| unbuilt("akv_batch_begin"))
}

/// Ends a step: its tokens are part of their sequences. AKV_E_ARGUMENT, naming the layer, if akv_quantize_kv is missing
/// for one (the step stays begun).
///
/// # Safety
/// Pointers must be NULL or valid as described.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn akv_batch_commit(batch: *mut akv_batch) -> akv_status {
    guard(|| unbuilt("akv_batch_commit"))
}

/// Ends a step as if it had not begun: every sequence is as before, bit for bit. AKV_OK if none is begun.
///
/// # Safety
/// Pointers must be NULL or valid as described.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn akv_batch_abort(batch: *mut akv_batch) -> akv_status {
    guard(|| unbuilt("akv_batch_abort"))
}

/// Size and alignment of the workspace of one attention call, from the bounds alone. AKV_E_ARGUMENT if max_q or max_kv
/// is unbounded.
///
/// # Safety
/// Pointers must be NULL or valid as described.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn akv_batch_workspace(
    batch: *const akv_batch,
    bytes: *mut usize,
    align: *mut usize,
) -> akv_status {
    guard(|| unbuilt("akv_batch_workspace"))
}

/// Destroys a batch; a begun step is aborted.
///
/// # Safety
/// Pointers must be NULL or valid as described.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn akv_batch_destroy(batch: *mut akv_batch) -> akv_status {
    guard(|| unbuilt("akv_batch_destroy"))
}

/// Appends the step's new tokens in one layer: quantizes `key` `[sum of n_new][n_kv_heads][dim_k]` and `value` `[sum of
/// n_new][n_kv_heads][dim_v]`, rows sequence by sequence, in the layer's dtypes, K after RoPE. Once per layer and step
/// (a second time is AKV_E_ARGUMENT). All rows are checked first: on error nothing is appended.
///
/// Errors: AKV_E_ARGUMENT, AKV_E_NONFINITE, AKV_E_RANGE, AKV_E_BUSY (attention on the same layer is running).
///
/// # Safety
/// Pointers must be NULL or valid as described.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn akv_quantize_kv(
    batch: *mut akv_batch,
    layer: i32,
    key: *const akv_rows,
    value: *const akv_rows,
    stream: *mut c_void,
) -> akv_status {
    guard(|| unbuilt("akv_quantize_kv"))
}
