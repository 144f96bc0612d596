//! Sequences: creation, forks, lengths, reading back.

use super::types::*;
use super::{guard, unbuilt};
use std::ffi::c_void;

/// Makes an empty sequence. AKV_E_CAPACITY beyond max_sequences.
///
/// # Safety
/// Pointers must be NULL or valid as described.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn akv_sequence_create(cache: *mut akv_cache, out: *mut akv_sequence) -> akv_status {
    guard(|| unbuilt("akv_sequence_create"))
}

/// Destroys a sequence. Pages that forks share stay with them. AKV_E_BUSY while it is in a begun batch.
///
/// # Safety
/// Pointers must be NULL or valid as described.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn akv_sequence_destroy(cache: *mut akv_cache, sequence: akv_sequence) -> akv_status {
    guard(|| unbuilt("akv_sequence_destroy"))
}

/// Makes a new sequence of the first `n_tokens` tokens of another (-1 = all): whole tiles of 128 tokens are shared by
/// reference, the rest is copied. AKV_E_BUSY while it is in a begun batch.
///
/// # Safety
/// Pointers must be NULL or valid as described.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn akv_sequence_fork(
    cache: *mut akv_cache,
    sequence: akv_sequence,
    n_tokens: i64,
    out: *mut akv_sequence,
) -> akv_status {
    guard(|| unbuilt("akv_sequence_fork"))
}

/// Keeps the first `n_tokens` tokens. Taking away at most exact_tail tokens is as if they had never been appended, bit
/// for bit; taking away more reopens the tile that is cut, whose rows are then known as they were stored: no error is
/// added unless later rows outgrow the tile's scales, and what that adds is in every later certificate. AKV_E_BUSY
/// while it is in a begun batch.
///
/// # Safety
/// Pointers must be NULL or valid as described.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn akv_sequence_truncate(
    cache: *mut akv_cache,
    sequence: akv_sequence,
    n_tokens: i64,
) -> akv_status {
    guard(|| unbuilt("akv_sequence_truncate"))
}

/// Removes the tokens at positions `from_position <= p < to_position`. Not built yet: AKV_E_UNSUPPORTED.
///
/// # Safety
/// Pointers must be NULL or valid as described.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn akv_sequence_remove(
    cache: *mut akv_cache,
    sequence: akv_sequence,
    from_position: i64,
    to_position: i64,
) -> akv_status {
    guard(|| unbuilt("akv_sequence_remove"))
}

/// Adds `delta` to the positions `from_position <= p < to_position` and turns their K accordingly; `rope_per_layer` has
/// an element per layer. Not built yet: AKV_E_UNSUPPORTED.
///
/// # Safety
/// Pointers must be NULL or valid as described.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn akv_sequence_shift(
    cache: *mut akv_cache,
    sequence: akv_sequence,
    from_position: i64,
    to_position: i64,
    delta: i64,
    rope_per_layer: *const akv_rope,
) -> akv_status {
    guard(|| unbuilt("akv_sequence_shift"))
}

/// Number of tokens of a sequence in `layer`; those that the batch in progress has appended count. `layer` = -1:
/// committed tokens.
///
/// # Safety
/// Pointers must be NULL or valid as described.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn akv_sequence_length(
    cache: *const akv_cache,
    sequence: akv_sequence,
    layer: i32,
    out: *mut i64,
) -> akv_status {
    guard(|| unbuilt("akv_sequence_length"))
}

/// Writes a sequence as a versioned, checksummed byte stream. Not built yet: AKV_E_UNSUPPORTED.
///
/// # Safety
/// Pointers must be NULL or valid as described.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn akv_sequence_export(
    cache: *mut akv_cache,
    sequence: akv_sequence,
    flags: u32,
    write: akv_write_fn,
    user: *mut c_void,
) -> akv_status {
    guard(|| unbuilt("akv_sequence_export"))
}

/// Makes a sequence from such a stream; on error there is none. Not built yet: AKV_E_UNSUPPORTED.
///
/// # Safety
/// Pointers must be NULL or valid as described.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn akv_sequence_import(
    cache: *mut akv_cache,
    read: akv_read_fn,
    user: *mut c_void,
    out: *mut akv_sequence,
) -> akv_status {
    guard(|| unbuilt("akv_sequence_import"))
}

/// Reads tokens `first..first + n` of a sequence back, as attention sees them with all stored planes: exact head rows
/// as given, others decoded (to at most 3e-5 of the largest magnitude that shares their scale with 4 planes). `key` is
/// `[n][n_kv_heads][dim_k]`, `value` `[n][n_kv_heads][dim_v]`, in any dtype; either may be NULL.
///
/// # Safety
/// Pointers must be NULL or valid as described.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn akv_dequantize_kv(
    cache: *mut akv_cache,
    sequence: akv_sequence,
    layer: i32,
    first: i64,
    n: i64,
    key: *const akv_rows,
    value: *const akv_rows,
    stream: *mut c_void,
) -> akv_status {
    guard(|| unbuilt("akv_dequantize_kv"))
}
