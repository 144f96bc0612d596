//! The CPU backend. STUB: the contract with `capi`; bodies follow.

use super::{Attention, Stats, Threads};
use crate::Result;
use crate::format::Layout;

/// Instruction sets, worst to best.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Isa {
    /// Portable code.
    Scalar,
    /// AVX2.
    Avx2,
    /// AVX-512 F, BW, VL, VNNI.
    Avx512,
}

#[allow(missing_docs)]
impl Isa {
    pub const ALL: [Isa; 3] = [Isa::Scalar, Isa::Avx2, Isa::Avx512];
    pub fn name(self) -> &'static str {
        todo!()
    }
    pub fn available(self) -> bool {
        todo!()
    }
    pub fn best() -> Isa {
        todo!()
    }
}

/// The backend of a context: an instruction set, and threads if asked for.
#[derive(Debug)]
pub struct Cpu {}

#[allow(unused_variables)]
impl Cpu {
    /// `isa` must be available. Starts n_threads - 1 workers.
    pub fn new(isa: Isa, n_threads: usize) -> Result<Cpu> {
        todo!()
    }
    /// Instruction set.
    pub fn isa(&self) -> Isa {
        todo!()
    }
    /// Threads, the caller's included; at least 1.
    pub fn n_threads(&self) -> usize {
        todo!()
    }
    /// Bytes of workspace (aligned to 64) of any call on this layout within these bounds.
    pub fn workspace_bytes(layout: &Layout, max_q: usize, max_kv: usize, nth: usize) -> usize {
        todo!()
    }
    /// Runs a call on this thread alone or, without `threads`, on the context's own. With `threads`, every one of them
    /// calls this with the same workspace; one that could not make its call passes the error, and all return it
    /// (or an equal status), having entered the barrier equally often.
    ///
    /// # Safety
    /// `workspace` is aligned to 64, has at least [`Cpu::workspace_bytes`], and belongs to this call alone.
    pub unsafe fn attention(
        &self,
        call: Result<&Attention, crate::Error>,
        threads: Option<Threads>,
        workspace: *mut u8,
        workspace_bytes: usize,
    ) -> Result<Stats> {
        todo!()
    }
}

/// Merges states, as `akv_merge_states`: see there. Inputs and outputs are `[rows * heads]` (times dim for `out`).
#[derive(Debug, Clone, Copy)]
#[allow(missing_docs)]
pub struct State<'a> {
    pub out: &'a [f32],
    pub lse: &'a [f32],
    pub bound: Option<&'a [f32]>,
    pub lse_bound: Option<&'a [f32]>,
    pub estimate: Option<&'a [f32]>,
    pub amplitude: Option<&'a [f32]>,
}

/// One merged row of one head: everything but `out`, which is written in place.
#[derive(Debug, Clone, Copy)]
#[allow(missing_docs)]
pub struct Merged {
    pub lse: f32,
    pub bound: f32,
    pub lse_bound: f32,
    pub estimate: f32,
    pub amplitude: f32,
}

/// Merges element `index` (row * heads + head) of all `states` into `out` (dim values), which aliases none of them.
#[allow(unused_variables)]
pub fn merge(states: &[State], index: usize, dim: usize, out: &mut [f32]) -> Merged {
    todo!()
}
