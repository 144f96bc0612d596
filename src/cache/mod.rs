//! Pages, sequences, steps: which rows exist and where they lie.
//!
//! A sequence is, per layer, a table of pages. Pages of whole tiles never change and are shared by forks; the last,
//! open one belongs to its sequence alone. Whoever would have to wait for somebody gets [`Error::Busy`] instead. What
//! can fail, memory above all, is taken before anything is changed.

mod batch;
mod device;
mod layer;
mod memory;
mod positions;
mod reader;
#[cfg(unix)]
mod region;
mod sequence;
mod shared;
mod shift;
mod slots;
mod snapshot;

/// What `shared` counts with: `tests/loom.rs` has loom's.
mod sync {
    pub use std::sync::Arc;
    pub use std::sync::atomic::{AtomicUsize, Ordering};
}

pub use batch::{Batch, Bounds, StepSequence};
pub use device::Plan;
pub use memory::{AllocFn, Allocator, Block, DeallocFn, Hooks, Memory};
pub use positions::Positions;
pub use reader::{Reader, SequenceView};
pub use shift::Rope;
pub(crate) use shift::Turn;
pub use slots::{Hands, Job, SlotLayer, launcher};
pub use snapshot::Excerpt;

use crate::backend::cuda::params::View;
use crate::backend::cuda::{Device, Stream};
use crate::format::{Format, Layout, Shape, TILE};
use crate::{Error, Result};
use parking_lot::{RwLock, RwLockReadGuard, RwLockWriteGuard};
use sequence::{Directory, MAX_SEQUENCES, Sequence};
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;

/// Who places rows, and who keeps them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Placement {
    /// Rows are appended to sequences.
    Append,
    /// The engine writes rows to cells.
    Slots {
        /// Streams.
        n_streams: usize,
        /// Cells of each.
        n_slots: usize,
        /// The engine keeps the rows themselves.
        attached: bool,
    },
}

/// What becomes of NaN and infinity in K, V or q.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum NanPolicy {
    /// They are an error.
    #[default]
    Error,
    /// Outputs that would see them are NaN.
    Propagate,
    /// They are 0.
    Zero,
}

/// What a cache is made of.
#[derive(Debug, Clone)]
pub struct Config {
    /// Placement.
    pub placement: Placement,
    /// Storage format.
    pub format: Format,
    /// What is done about NaN.
    pub nan: NanPolicy,
    /// Layers.
    pub layers: Vec<Shape>,
    /// Layers that read the rows of an earlier one, which has some of its own and is of the same kind: (layer, that one).
    pub shares: Vec<(usize, usize)>,
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
    /// Layers that have rows, in order: what sequences are made of, by index.
    stored: Vec<(usize, Layout)>,
    /// Of each layer: the index of whose rows it reads.
    homes: Vec<usize>,
    memory: Arc<Memory>,
    /// Locked for a look or an entry only, never while something else is waited for.
    sequences: RwLock<Directory>,
    /// By layer; only tried, never waited for. Empty if rows are appended.
    slots: Vec<RwLock<SlotLayer>>,
}

impl Cache {
    /// An empty cache on the host. Shapes must be valid.
    pub fn new(config: Config, allocator: Allocator) -> Result<Cache> {
        Cache::with_device(config, allocator, None)
    }

    /// One whose rows lie on a device, if there is one.
    pub fn with_device(config: Config, allocator: Allocator, device: Option<Arc<Device>>) -> Result<Cache> {
        for (name, value) in [("exact_head", config.exact_head), ("exact_tail", config.exact_tail)] {
            if value > TILE {
                return Err(Error::Argument(format!("{name} {value}: expected at most {TILE}")));
            }
        }
        if config.max_sequences > MAX_SEQUENCES {
            let n = config.max_sequences;
            return Err(Error::Argument(format!("max_sequences {n}: expected at most {MAX_SEQUENCES}")));
        }
        let is_index = matches!(config.placement, Placement::Slots { attached: true, .. });
        let layout = |&shape: &Shape| if is_index { Layout::index(shape) } else { Layout::new(config.format, shape) };
        let marks = |layout: Layout| if config.nan == NanPolicy::Propagate { layout.with_marks() } else { layout };
        let layouts = crate::error::collect(config.layers.iter().map(|shape| Ok(marks(layout(shape)))))?;
        let (mut stored, mut homes): (Vec<(usize, Layout)>, Vec<usize>) = (Vec::new(), Vec::new());
        memory::reserve(&mut stored, layouts.len())?;
        memory::reserve(&mut homes, layouts.len())?;
        for (layer, &layout) in layouts.iter().enumerate() {
            match config.shares.iter().find(|share| share.0 == layer) {
                Some(&(_, other)) => homes.push(homes[other]),
                None => {
                    homes.push(stored.len());
                    stored.push((layer, layout));
                }
            }
        }
        let memory = Memory::with_device(allocator, device, config.max_bytes);
        let sequences = RwLock::new(Directory::new(&memory)?);
        let mut cache = Cache { config, layouts, stored, homes, memory, sequences, slots: Vec::new() };
        if cache.lossless() {
            (cache.config.exact_head, cache.config.exact_tail) = (0, 0);
        }
        if let Placement::Slots { n_streams, n_slots, .. } = cache.config.placement {
            memory::reserve(&mut cache.slots, cache.layouts.len())?;
            for (index, &layout) in cache.layouts.iter().enumerate() {
                let head = cache.config.exact_head.min(n_slots);
                let layer = SlotLayer::new(&cache.memory, index, layout, n_streams, n_slots, head, is_index)?;
                cache.slots.push(RwLock::new(layer));
            }
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

    /// The layer whose rows a layer reads: itself, as a rule.
    pub fn home(&self, layer: usize) -> usize {
        self.stored[self.homes[layer]].0
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
            tokens: directory
                .sequences()
                .map(|s| s.len.load(Relaxed).saturating_sub(s.n_removed.load(Relaxed)) as u64)
                .sum::<u64>()
                + self.slots.iter().find_map(|layer| Some(layer.try_read()?.n_written())).unwrap_or(0),
        }
    }

    /// Fails if rows are not placed as a call expects it.
    pub fn check_placement(&self, slots: bool) -> Result<()> {
        match self.config.placement {
            Placement::Append if slots => {
                Err(Error::Argument("cache is AKV_APPEND: expected AKV_SLOTS or AKV_ATTACHED".to_owned()))
            }
            Placement::Slots { .. } if !slots => {
                Err(Error::Argument("cache is AKV_SLOTS or AKV_ATTACHED: expected AKV_APPEND".to_owned()))
            }
            _ => Ok(()),
        }
    }

    /// Streams, and cells of each.
    pub fn streams(&self) -> (usize, usize) {
        match self.config.placement {
            Placement::Append => (0, 0),
            Placement::Slots { n_streams, n_slots, .. } => (n_streams, n_slots),
        }
    }

    /// Shared access to the cells of a layer.
    pub fn read_slots(&self, layer: usize) -> Result<RwLockReadGuard<'_, SlotLayer>> {
        self.check_placement(true)?;
        self.check_layer(layer)?;
        let busy = || Error::Busy(format!("layer {layer}: is being written by another call"));
        self.slots[layer].try_read().ok_or_else(busy)
    }

    /// Exclusive access to them.
    pub fn write_slots(&self, layer: usize) -> Result<RwLockWriteGuard<'_, SlotLayer>> {
        self.check_placement(true)?;
        self.check_layer(layer)?;
        let busy = || Error::Busy(format!("layer {layer}: is in use by another call"));
        self.slots[layer].try_write().ok_or_else(busy)
    }

    /// Makes an empty sequence.
    pub fn create(&self) -> Result<u64> {
        self.check_placement(false)?;
        let sequence = Sequence::new(&self.memory, &self.config, &self.stored)?;
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
        self.find(sequence)?.truncate(&self.memory, n_tokens)
    }

    /// Takes the room that steps of `n_tokens` more tokens need.
    pub fn reserve(&self, sequence: u64, n_tokens: usize) -> Result<()> {
        let sequence = self.find(sequence)?;
        if self.memory.device().is_some() {
            return Err(Error::Unsupported("reserving tokens is not built yet on the CUDA backend".to_owned()));
        }
        sequence.reserve(&self.memory, n_tokens)
    }

    /// Removes the tokens whose positions are `from..to`.
    pub fn remove(&self, sequence: u64, from: i64, to: i64) -> Result<()> {
        let sequence = self.find(sequence)?;
        if self.config.format == Format::Published || self.memory.device().is_some() {
            let what = "removing tokens is not built yet with AKV_FORMAT_PUBLISHED, and on the CUDA backend";
            return Err(Error::Unsupported(what.to_owned()));
        }
        sequence.remove(&self.memory, from, to)
    }

    /// Moves the tokens whose positions are `from..to` by `delta`; `ropes` are those of layers that have rows of their own.
    pub fn shift(&self, sequence: u64, from: i64, to: i64, delta: i64, ropes: &[Rope]) -> Result<()> {
        let sequence = self.find(sequence)?;
        if self.config.format == Format::Published || self.memory.device().is_some() {
            let what = "shifting tokens is not built yet with AKV_FORMAT_PUBLISHED, and on the CUDA backend";
            return Err(Error::Unsupported(what.to_owned()));
        }
        sequence.shift(&self.memory, from, to, delta, ropes)
    }

    /// Tokens in `layer`, those of a begun step included; None: committed tokens.
    pub fn length(&self, sequence: u64, layer: Option<usize>) -> Result<usize> {
        match layer {
            Some(layer) => Ok(self.read(sequence, layer)?.n_tokens()),
            None => Ok(self.find(sequence)?.len.load(Relaxed)),
        }
    }

    /// Shared access to one layer of one sequence.
    pub fn read(&self, sequence: u64, layer: usize) -> Result<Reader> {
        self.check_layer(layer)?;
        self.find(sequence)?.read(self.homes[layer], self.layouts[layer])
    }

    /// The same on a device: what its kernels are told, once what was launched on `stream` has run.
    pub fn device_view(&self, sequence: u64, layer: usize, stream: Stream) -> Result<View> {
        self.check_layer(layer)?;
        self.find(sequence)?.device_view(&self.memory, self.homes[layer], stream)
    }

    /// Writes a sequence, or the part of it that is asked for, as bytes. `write` takes them in pieces; what it returns
    /// but 0 ends the export.
    pub fn export(&self, sequence: u64, part: &Excerpt, write: &mut dyn FnMut(&[u8]) -> i32) -> Result<()> {
        self.check_placement(false)?;
        snapshot::export(self, &*self.find(sequence)?, part, write)
    }

    /// Makes a sequence of another cache (or this one) that has what an import of an export would have.
    pub fn copy(&self, sequence: u64, to: &Cache) -> Result<u64> {
        self.check_placement(false)?;
        to.check_placement(false)?;
        if self.memory.device().is_some() || to.memory.device().is_some() {
            let what = "copying sequences is not built yet on the CUDA backend: akv_sequence_export and _import do it";
            return Err(Error::Unsupported(what.to_owned()));
        }
        let copy = snapshot::copy(self, &*self.find(sequence)?, to)?;
        to.sequences.write().insert(copy, to.config.max_sequences)
    }

    /// Makes a sequence from such bytes, or adds what they hold to one that lacks it. `read` fills pieces; what it
    /// returns but 0 ends the import.
    pub fn import(&self, into: Option<u64>, read: &mut dyn FnMut(&mut [u8]) -> i32) -> Result<u64> {
        self.check_placement(false)?;
        match into {
            None => {
                let sequence = snapshot::import(self, read)?;
                self.sequences.write().insert(sequence, self.config.max_sequences)
            }
            Some(id) => {
                snapshot::import_into(self, &*self.find(id)?, read)?;
                Ok(id)
            }
        }
    }

    /// Fails for a layer that reads another's rows.
    pub fn check_stored(&self, layer: usize) -> Result<()> {
        match self.home(layer) {
            home if home == layer => Ok(()),
            home => Err(Error::Argument(format!("layer {layer}: reads the rows of layer {home}, and takes none"))),
        }
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
