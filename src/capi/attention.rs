//! Attention, and merging partial attention.

use super::types::*;
use super::{guard, unbuilt};
use std::ffi::c_void;

/// Attention of the step's query rows over their sequences' rows in one layer. Queries of up to 8 rows of a sequence
/// take the progressive path: plane 0 of all visible keys is scanned, every token's share of the error decides how many
/// further digits of its K and V are read, and the certificate says how far off the result can be. Longer ones
/// (prefill), AKV_EXACT and AKV_FORMAT_RAW take the dense path. A row's result does not depend on the other rows of the
/// batch, nor on the number of threads.
///
/// Errors: AKV_E_ARGUMENT, AKV_E_NONFINITE (q), AKV_E_UNSUPPORTED, AKV_E_BUSY, AKV_E_MEMORY (own workspace). Outputs
/// are undefined after an error that is found during the work, untouched after one found before.
///
/// # Safety
/// Pointers must be NULL or valid as described.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn akv_aligned_attention(
    batch: *mut akv_batch,
    layer: i32,
    desc: *const akv_attention_desc,
) -> akv_status {
    guard(|| unbuilt("akv_aligned_attention"))
}

/// Merges `n` partial states over disjoint parts of a context into the state of the whole: outputs by their LSE, bounds
/// rigorously. Empty parts have lse = -inf. `out` may be the same memory as one of `states`. `[rows][heads][dim]`, all
/// f32, host memory on the CPU.
///
/// # Safety
/// Pointers must be NULL or valid as described.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn akv_merge_states(
    context: *mut akv_context,
    states: *const akv_state,
    n: i32,
    rows: i64,
    heads: i32,
    dim: i32,
    out: *const akv_state,
    stream: *mut c_void,
) -> akv_status {
    guard(|| unbuilt("akv_merge_states"))
}
