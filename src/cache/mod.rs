//! Pages, sequences, steps: which rows exist and where they lie.
//!
//! STUB: the contract with `capi` and `backend`; bodies follow.

mod memory;
mod positions;

pub use memory::{Allocator, Block, Memory};
pub use positions::Positions;

use crate::Result;
use crate::format::{Format, Layout, Rows, Shape};
use std::sync::Arc;

/// What a cache is made of.
#[derive(Debug, Clone)]
pub struct Config {
    /// Storage format.
    pub format: Format,
    /// Layers.
    pub layers: Vec<Shape>,
    /// Most sequences at once.
    pub max_sequences: usize,
    /// Tokens at the start of a sequence that are kept as given.
    pub exact_head: usize,
    /// Tokens at its end that can be taken back as if never appended.
    pub exact_tail: usize,
    /// Most bytes; 0 = no limit.
    pub max_bytes: u64,
}

/// What a cache holds.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[allow(missing_docs)]
pub struct Usage {
    pub n_sequences: u32,
    pub bytes_reserved: u64,
    pub bytes_used: u64,
    pub bytes_kept: u64,
    pub pages_used: u64,
    pub pages_free: u64,
    pub pages_shared: u64,
    pub tokens: u64,
}

/// KV rows of all sequences and layers.
#[derive(Debug)]
pub struct Cache {}

#[allow(missing_docs, unused_variables)]
impl Cache {
    pub fn new(config: Config, allocator: Allocator) -> Result<Cache> {
        todo!()
    }
    pub fn config(&self) -> &Config {
        todo!()
    }
    pub fn layouts(&self) -> &[Layout] {
        todo!()
    }
    /// Allocator and budget, for whoever else takes memory on the cache's account (workspaces).
    pub fn memory(&self) -> &Arc<Memory> {
        todo!()
    }
    pub fn usage(&self) -> Usage {
        todo!()
    }
    pub fn create(&self) -> Result<u64> {
        todo!()
    }
    pub fn destroy(&self, sequence: u64) -> Result<()> {
        todo!()
    }
    pub fn fork(&self, sequence: u64, n_tokens: Option<usize>) -> Result<u64> {
        todo!()
    }
    pub fn truncate(&self, sequence: u64, n_tokens: usize) -> Result<()> {
        todo!()
    }
    /// Tokens in `layer`, those of a begun step included; None: committed tokens.
    pub fn length(&self, sequence: u64, layer: Option<usize>) -> Result<usize> {
        todo!()
    }
    /// Shared access to one layer of one sequence.
    pub fn read(&self, sequence: u64, layer: usize) -> Result<Reader> {
        todo!()
    }
}

/// Bounds of the steps of a batch; None = no bound.
#[derive(Debug, Clone, Copy, Default)]
#[allow(missing_docs)]
pub struct Bounds {
    pub max_sequences: Option<usize>,
    pub max_q: Option<usize>,
    pub max_kv: Option<usize>,
}

/// What a step does to one sequence.
#[derive(Debug, Clone, Copy)]
#[allow(missing_docs)]
pub struct StepSequence {
    pub sequence: u64,
    pub n_new: usize,
    pub n_q: usize,
}

/// One step at a time over some sequences of a cache.
#[derive(Debug)]
pub struct Batch {}

#[allow(missing_docs, unused_variables)]
impl Batch {
    pub fn new(cache: Arc<Cache>, bounds: Bounds) -> Batch {
        todo!()
    }
    pub fn cache(&self) -> &Arc<Cache> {
        todo!()
    }
    pub fn bounds(&self) -> &Bounds {
        todo!()
    }
    /// `positions`: of all new tokens, sequence by sequence; None = consecutive.
    pub fn begin(&self, step: &[StepSequence], positions: Option<&[i64]>) -> Result<()> {
        todo!()
    }
    /// Appends the step's new tokens, sequence by sequence, in one layer.
    pub fn append(&self, layer: usize, k: Rows, v: Rows) -> Result<()> {
        todo!()
    }
    pub fn commit(&self) -> Result<()> {
        todo!()
    }
    pub fn abort(&self) {
        todo!()
    }
    /// Shared access to the step's sequences in one layer, in the step's order, with their n_q.
    /// Busy if one is being written; an argument error if no step is begun.
    pub fn read(&self, layer: usize) -> Result<Vec<(StepSequence, Reader)>> {
        todo!()
    }
}

/// Shared access to one layer of one sequence; rows cannot change while it lives.
#[derive(Debug)]
pub struct Reader {}

impl Reader {
    /// What attention reads.
    pub fn view(&self) -> SequenceView<'_> {
        todo!()
    }
}

/// One layer of one sequence, as attention reads it. Tokens go by index, 0 to len - 1.
#[derive(Clone, Copy)]
#[allow(missing_docs)]
pub struct SequenceView<'a> {
    pub layout: &'a Layout,
    pub len: usize,
    pub positions: &'a Positions,
    /// The first `n_exact` (at most `len`) tokens attend through these rows instead of through page 0.
    pub n_exact: usize,
    pub exact: Option<(Rows<'a>, Rows<'a>)>,
    pages: &'a [Arc<Block>],
}

impl<'a> SequenceView<'a> {
    /// The page of tokens `tile * TILE ..`.
    #[inline(always)]
    pub fn page(&self, tile: usize) -> &'a [u8] {
        &self.pages[tile]
    }
}
