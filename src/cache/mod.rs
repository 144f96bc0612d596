//! Pages, sequences, steps: which rows exist and where they lie.
//!
//! A sequence is, per layer, a table of pages. Pages of whole tiles never change and are shared by forks; the last,
//! open one belongs to its sequence alone. Whoever would have to wait for somebody gets [`Error::Busy`] instead. What
//! can fail, memory above all, is taken before anything is changed.

mod batch;
mod layer;
mod memory;
mod positions;
mod reader;
mod sequence;

pub use batch::{Batch, Bounds, StepSequence};
pub use memory::{AllocFn, Allocator, Block, DeallocFn, Hooks, Memory};
pub use positions::Positions;
pub use reader::{Reader, SequenceView};

use crate::format::{Format, Layout, Shape, TILE};
use crate::{Error, Result};
use parking_lot::RwLock;
use sequence::{Directory, MAX_SEQUENCES, Sequence};
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;

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
pub struct Cache {
    config: Config,
    layouts: Vec<Layout>,
    memory: Arc<Memory>,
    /// Locked for a look or an entry only, never while something else is waited for.
    sequences: RwLock<Directory>,
}

impl Cache {
    /// An empty cache. Shapes must be valid.
    pub fn new(config: Config, allocator: Allocator) -> Result<Cache> {
        for (name, value) in [("exact_head", config.exact_head), ("exact_tail", config.exact_tail)] {
            if value > TILE {
                return Err(Error::Argument(format!("{name} {value}: expected at most {TILE}")));
            }
        }
        if config.max_sequences > MAX_SEQUENCES {
            let n = config.max_sequences;
            return Err(Error::Argument(format!("max_sequences {n}: expected at most {MAX_SEQUENCES}")));
        }
        let layouts: Vec<Layout> = config.layers.iter().map(|&shape| Layout::new(config.format, shape)).collect();
        let memory = Memory::new(allocator, config.max_bytes);
        let sequences = RwLock::new(Directory::new(&memory)?);
        let mut cache = Cache { config, layouts, memory, sequences };
        if cache.lossless() {
            (cache.config.exact_head, cache.config.exact_tail) = (0, 0);
        }
        Ok(cache)
    }

    /// What it is made of; a lossless format has neither exact head nor exact tail.
    pub fn config(&self) -> &Config {
        &self.config
    }

    /// Layout of each layer.
    pub fn layouts(&self) -> &[Layout] {
        &self.layouts
    }

    /// Allocator and budget, for whoever else takes memory on the cache's account (workspaces).
    pub fn memory(&self) -> &Arc<Memory> {
        &self.memory
    }

    /// What it holds. Exact while nothing else is going on.
    pub fn usage(&self) -> Usage {
        let directory = self.sequences.read();
        let (pages_used, pages_free, pages_shared) = self.memory.pages();
        Usage {
            n_sequences: directory.sequences().count() as u32,
            bytes_reserved: self.memory.taken(),
            bytes_used: self.memory.used().saturating_sub(directory.bytes() as u64),
            bytes_kept: self.memory.kept(),
            pages_used,
            pages_free,
            pages_shared,
            tokens: directory.sequences().map(|s| s.len.load(Relaxed) as u64).sum(),
        }
    }

    /// Makes an empty sequence.
    pub fn create(&self) -> Result<u64> {
        let sequence = Sequence::new(&self.memory, &self.config, &self.layouts)?;
        self.sequences.write().insert(sequence, self.config.max_sequences)
    }

    /// Destroys a sequence.
    pub fn destroy(&self, sequence: u64) -> Result<()> {
        self.find(sequence)?.destroy()?;
        self.sequences.write().remove(sequence);
        Ok(())
    }

    /// Makes a sequence of the first `n_tokens` tokens of another.
    pub fn fork(&self, sequence: u64, n_tokens: Option<usize>) -> Result<u64> {
        let fork = self.find(sequence)?.fork(&self.memory, n_tokens)?;
        self.sequences.write().insert(fork, self.config.max_sequences)
    }

    /// Keeps the first `n_tokens` tokens.
    pub fn truncate(&self, sequence: u64, n_tokens: usize) -> Result<()> {
        self.find(sequence)?.truncate(n_tokens)
    }

    /// Tokens in `layer`, those of a begun step included; None: committed tokens.
    pub fn length(&self, sequence: u64, layer: Option<usize>) -> Result<usize> {
        match layer {
            Some(layer) => Ok(self.read(sequence, layer)?.view().len),
            None => Ok(self.find(sequence)?.len.load(Relaxed)),
        }
    }

    /// Shared access to one layer of one sequence.
    pub fn read(&self, sequence: u64, layer: usize) -> Result<Reader> {
        self.check_layer(layer)?;
        self.find(sequence)?.read(layer)
    }

    /// True if nothing is kept beside the pages.
    fn lossless(&self) -> bool {
        self.layouts.iter().all(Layout::lossless)
    }

    fn find(&self, sequence: u64) -> Result<Arc<Sequence>> {
        self.sequences.read().find(sequence).cloned()
    }

    fn check_layer(&self, layer: usize) -> Result<()> {
        let n = self.layouts.len();
        if layer < n { Ok(()) } else { Err(Error::Argument(format!("layer {layer}: the cache has {n}"))) }
    }
}
