//! Sequences, and the ids that name them.

use super::device::Edits;
use super::layer::Layer;
use super::memory::{Charge, Memory, Table};
use super::{Config, Positions, Reader};
use crate::backend::cuda::Stream;
use crate::backend::cuda::params::View;
use crate::format::{Layout, TILE};
use crate::{Error, Result};
use parking_lot::lock_api::ArcRwLockWriteGuard;
use parking_lot::{RawRwLock, RwLock, RwLockReadGuard, RwLockWriteGuard};
use std::sync::Arc;
use std::sync::atomic::{AtomicU16, AtomicUsize, Ordering::Relaxed};

/// A sequence. Its locks are only ever tried: contention is the caller's to know of. The one exception is an abort,
/// which must not fail.
#[derive(Debug)]
pub(super) struct Sequence {
    pub id: u64,
    /// Held by whoever changes the sequence, by a begun batch from begin to end; false once it is destroyed.
    alive: Arc<RwLock<bool>>,
    /// Committed tokens; changes under `alive` only.
    pub len: AtomicUsize,
    pub positions: Arc<RwLock<Positions>>,
    /// Those that have rows, with their index in the cache.
    pub layers: Vec<(usize, Arc<RwLock<Layer>>)>,
    /// Layers that are still to be imported; changes under `alive` only. Theirs have no tokens.
    pub n_missing: AtomicUsize,
    /// Tokens that have been removed; changes under `alive` only.
    pub n_removed: AtomicUsize,
    _record: Charge,
}

/// The right to change a sequence.
pub(super) type Claim = ArcRwLockWriteGuard<RawRwLock, bool>;

impl Sequence {
    /// Heap bytes of a sequence without its tables.
    fn record_bytes(n_layers: usize) -> usize {
        const COUNTS: usize = 2 * size_of::<usize>();
        size_of::<Sequence>()
            + 3 * COUNTS
            + size_of::<RwLock<bool>>()
            + size_of::<RwLock<Positions>>()
            + n_layers * (size_of::<(usize, Arc<RwLock<Layer>>)>() + COUNTS + size_of::<RwLock<Layer>>())
    }

    /// `layer(i)` makes the layers.
    pub fn with(
        memory: &Arc<Memory>,
        n_layers: usize,
        len: usize,
        positions: Positions,
        mut layer: impl FnMut(usize) -> Result<Layer>,
    ) -> Result<Sequence> {
        let record = Charge::new(memory, Sequence::record_bytes(n_layers))?;
        let mut layers = Vec::new();
        super::memory::reserve(&mut layers, n_layers)?;
        for i in 0..n_layers {
            let layer = layer(i)?;
            layers.push((layer.number, Arc::new(RwLock::new(layer))));
        }
        Ok(Sequence {
            id: 0,
            alive: Arc::new(RwLock::new(true)),
            len: AtomicUsize::new(len),
            n_removed: AtomicUsize::new(positions.removed_within(0, len)),
            positions: Arc::new(RwLock::new(positions)),
            layers,
            n_missing: AtomicUsize::new(0),
            _record: record,
        })
    }

    pub fn new(memory: &Arc<Memory>, config: &Config, stored: &[(usize, Layout)]) -> Result<Sequence> {
        let layer = |i: usize| Layer::new(memory, stored[i], config.exact_head, config.exact_tail);
        Sequence::with(memory, stored.len(), 0, Positions::new(memory)?, layer)
    }

    /// The first `n_tokens` tokens (all without) as another sequence.
    pub fn fork(&self, memory: &Arc<Memory>, n_tokens: Option<usize>) -> Result<Sequence> {
        let alive = self.alive.try_read().ok_or_else(|| self.taken())?;
        self.check_alive(*alive)?;
        self.check_whole()?;
        let len = self.len.load(Relaxed);
        let n = n_tokens.unwrap_or(len);
        if n > len {
            return Err(Error::Argument(format!("n_tokens {n}: sequence {} has {len}", self.id)));
        }
        let positions = self.read_positions()?;
        let n = positions.trimmed(n);
        let positions = positions.fork(n)?;
        let mut edits = Edits::new(memory);
        let fork =
            Sequence::with(memory, self.layers.len(), n, positions, |i| self.read_layer(i)?.fork(n, &mut edits))?;
        edits.run()?;
        Ok(fork)
    }

    /// Forgets all but the first `n` tokens.
    pub fn truncate(&self, memory: &Arc<Memory>, n: usize) -> Result<()> {
        let _claim = self.claim()?;
        self.check_whole()?;
        let len = self.len.load(Relaxed);
        if n > len {
            return Err(Error::Argument(format!("n_tokens {n}: sequence {} has {len}", self.id)));
        }
        self.cut(memory, n)
    }

    /// Takes the room that steps of `n` more tokens in all need, in all layers or in none. It is kept until they have come,
    /// or something is cut off.
    pub fn reserve(&self, memory: &Arc<Memory>, n: usize) -> Result<()> {
        let _claim = self.claim()?;
        self.check_whole()?;
        let len = self.len.load(Relaxed);
        let tiles = len.checked_add(n).filter(|&sum| sum <= i64::MAX as usize).map(|sum| sum.div_ceil(TILE));
        let tiles =
            tiles.ok_or_else(|| Error::Argument(format!("n_tokens {n}: sequence {} has {len} tokens", self.id)))?;
        let (mut layers, mut bytes) = (Vec::new(), 0usize);
        super::memory::reserve(&mut layers, self.layers.len())?;
        for i in 0..self.layers.len() {
            let layer = self.write_layer(i)?;
            let n_pages = tiles.saturating_sub(layer.pages.len());
            bytes = bytes.saturating_add(n_pages.saturating_mul(layer.layout.page_bytes()));
            layers.push(layer);
        }
        memory.check(bytes)?;
        let mut rooms = Vec::new();
        super::memory::reserve(&mut rooms, layers.len())?;
        for layer in &layers {
            rooms.push(layer.room_ahead(n)?);
        }
        for (mut layer, room) in layers.into_iter().zip(rooms) {
            layer.reserve(room);
        }
        Ok(())
    }

    /// Tiles that every layer has pages for.
    pub fn n_pages(&self) -> Result<usize> {
        self.layers.first().map_or(Ok(0), |_| Ok(self.read_layer(0)?.pages.len()))
    }

    /// Removes the tokens whose positions are `from..to`. Pages of which no token is left are given back; tokens removed
    /// at the end are cut off.
    pub fn remove(&self, memory: &Arc<Memory>, from: i64, to: i64) -> Result<()> {
        let _claim = self.claim()?;
        self.check_whole()?;
        let len = self.len.load(Relaxed);
        let positions = self.read_positions()?;
        let (first, last) = (positions.below(from, len), positions.below(to, len));
        if first >= last || positions.removed_within(first, last) == last - first {
            return Ok(());
        }
        if last == len {
            drop(positions);
            return self.cut(memory, first);
        }
        drop(positions);
        let mut positions = self.write_positions()?;
        let room = positions.room_to_remove()?;
        let mut layers = Vec::new();
        super::memory::reserve(&mut layers, self.layers.len())?;
        for i in 0..self.layers.len() {
            let layer = self.write_layer(i)?;
            let empty =
                if last - first >= TILE || !positions.removed().is_empty() { Some(layer.empty_page()?) } else { None };
            layers.push((layer, empty));
        }
        let (first, last) = positions.remove(room, first, last);
        let tiles = first.div_ceil(TILE)..last / TILE;
        for (mut layer, empty) in layers {
            if let Some(empty) = empty.filter(|_| !tiles.is_empty()) {
                layer.empty(tiles.clone(), &empty);
            }
        }
        self.n_removed.store(positions.removed_within(0, len), Relaxed);
        Ok(())
    }

    /// Forgets all but the first `n` tokens, those before that have been removed, and what is reserved. Claimed.
    fn cut(&self, memory: &Arc<Memory>, n: usize) -> Result<()> {
        let n = self.read_positions()?.trimmed(n);
        if n == self.len.load(Relaxed) && self.n_pages()? == n.div_ceil(TILE) {
            return Ok(());
        }
        let (mut layers, mut edits) = (Vec::new(), Edits::new(memory));
        super::memory::reserve(&mut layers, self.layers.len())?;
        for i in 0..self.layers.len() {
            let layer = self.write_layer(i)?;
            let spare = layer.spare(n)?;
            layers.push((layer, spare));
        }
        if !n.is_multiple_of(TILE) {
            edits.wait()?;
        }
        let mut positions = self.write_positions()?;
        positions.truncate(n);
        self.n_removed.store(positions.removed_within(0, n), Relaxed);
        for (mut layer, spare) in layers {
            layer.unreserve();
            layer.truncate(n, spare, &mut edits);
        }
        self.len.store(n, Relaxed);
        edits.run()
    }

    /// Marks a sequence that nobody uses as destroyed.
    pub fn destroy(&self) -> Result<()> {
        let mut claim = self.claim()?;
        for i in 0..self.layers.len() {
            drop(self.write_layer(i)?);
        }
        *claim = false;
        Ok(())
    }

    pub fn claim(&self) -> Result<Claim> {
        let claim = self.alive.try_write_arc().ok_or_else(|| self.taken())?;
        self.check_alive(*claim)?;
        Ok(claim)
    }

    /// Fails for a sequence of which layers are still to be imported.
    pub fn check_whole(&self) -> Result<()> {
        match self.n_missing.load(Relaxed) {
            0 => Ok(()),
            n => Err(Error::Argument(format!(
                "sequence {}: {n} of its {} layers have not been imported yet",
                self.id,
                self.layers.len()
            ))),
        }
    }

    fn check_alive(&self, alive: bool) -> Result<()> {
        if alive { Ok(()) } else { Err(stale(self.id)) }
    }

    fn taken(&self) -> Error {
        Error::Busy(format!("sequence {}: in a begun batch, or being used by another call", self.id))
    }

    fn read_layer(&self, layer: usize) -> Result<RwLockReadGuard<'_, Layer>> {
        self.layers[layer].1.try_read().ok_or_else(|| self.being_written(layer))
    }

    fn being_written(&self, layer: usize) -> Error {
        Error::Busy(format!("sequence {}: layer {} is being written", self.id, self.layers[layer].0))
    }

    /// What a device's kernels are told of a layer.
    pub fn device_view(&self, memory: &Arc<Memory>, layer: usize, stream: Stream) -> Result<View> {
        let rows = self.read_layer(layer)?;
        if !rows.is_unlisted() {
            return Ok(rows.device_view(self.id, rows.len));
        }
        drop(rows);
        let mut rows = self.write_layer(layer)?;
        rows.list_now(memory, stream)?;
        Ok(rows.device_view(self.id, rows.len))
    }

    /// True if a device does not know where all pages of some layer are.
    pub fn is_unlisted(&self) -> Result<bool> {
        for layer in 0..self.layers.len() {
            if self.read_layer(layer)?.is_unlisted() {
                return Ok(true);
            }
        }
        Ok(false)
    }

    pub fn write_layer(&self, layer: usize) -> Result<RwLockWriteGuard<'_, Layer>> {
        let busy =
            || Error::Busy(format!("sequence {}: layer {} is being read or written", self.id, self.layers[layer].0));
        self.layers[layer].1.try_write().ok_or_else(busy)
    }

    pub fn read_positions(&self) -> Result<RwLockReadGuard<'_, Positions>> {
        self.positions.try_read().ok_or_else(|| self.taken())
    }

    pub fn write_positions(&self) -> Result<RwLockWriteGuard<'_, Positions>> {
        let busy = || Error::Busy(format!("sequence {}: being read", self.id));
        self.positions.try_write().ok_or_else(busy)
    }

    /// Shared access to a layer's rows, for one of that layout.
    pub fn read(&self, layer: usize, layout: Layout) -> Result<Reader> {
        let busy = || self.being_written(layer);
        let positions = self.positions.try_read_arc().ok_or_else(busy)?;
        Ok(Reader { layer: self.layers[layer].1.try_read_arc().ok_or_else(busy)?, positions, layout })
    }
}

/// Sequences by id: 16 bits of the cache's tag, 24 of a generation, 24 of 1 + index.
#[derive(Debug)]
pub(super) struct Directory {
    tag: u16,
    slots: Table<Slot>,
    free: Table<u32>,
}

#[derive(Debug)]
struct Slot {
    generation: u32,
    sequence: Option<Arc<Sequence>>,
}

const BITS: u32 = 24;
const MASK: u64 = (1 << BITS) - 1;
/// Most sequences that ids can tell apart.
pub(super) const MAX_SEQUENCES: usize = MASK as usize;

/// Tags differ within a copy of the library, and most likely between copies.
static NEXT_TAG: AtomicU16 = AtomicU16::new(0);

fn stale(id: u64) -> Error {
    Error::Handle(format!("sequence {id}: has been destroyed"))
}

impl Directory {
    pub fn new(memory: &Arc<Memory>) -> Result<Directory> {
        let copy = (&raw const NEXT_TAG as usize >> 12) as u16;
        Ok(Directory {
            tag: NEXT_TAG.fetch_add(1, Relaxed).wrapping_add(copy),
            slots: Table::with_capacity(memory, 0)?,
            free: Table::with_capacity(memory, 0)?,
        })
    }

    /// Bytes of the directory itself.
    pub fn bytes(&self) -> usize {
        self.slots.bytes() + self.free.bytes()
    }

    pub fn sequences(&self) -> impl Iterator<Item = &Arc<Sequence>> {
        self.slots.iter().filter_map(|slot| slot.sequence.as_ref())
    }

    pub fn find(&self, id: u64) -> Result<&Arc<Sequence>> {
        let slot = (id & MASK).checked_sub(1).and_then(|i| self.slots.get(i as usize));
        let (true, Some(slot)) = (id >> (2 * BITS) == u64::from(self.tag), slot) else {
            return Err(Error::Handle(format!("sequence {id}: not a sequence of this cache")));
        };
        let current = u64::from(slot.generation) == id >> BITS & MASK;
        slot.sequence.as_ref().filter(|_| current).ok_or_else(|| stale(id))
    }

    pub fn insert(&mut self, mut sequence: Sequence, max_sequences: usize) -> Result<u64> {
        let n = self.slots.len() - self.free.len();
        if n >= max_sequences {
            return Err(Error::Capacity(format!("max_sequences {max_sequences}: {n} are alive")));
        }
        if self.free.is_empty() {
            // Room in `free` for every slot there is: removing never allocates.
            let (slots, free) = (self.slots.room(1)?, self.free.room(self.slots.len() + 1)?);
            self.slots.adopt(slots);
            self.free.adopt(free);
            self.free.push(self.slots.len() as u32);
            self.slots.push(Slot { generation: 0, sequence: None });
        }
        let Some(index) = self.free.pop() else { return Err(Error::Internal("no free slot".into())) };
        let slot = &mut self.slots[index as usize];
        let id = u64::from(self.tag) << (2 * BITS) | u64::from(slot.generation) << BITS | u64::from(index + 1);
        sequence.id = id;
        slot.sequence = Some(Arc::new(sequence));
        Ok(id)
    }

    /// Takes out a sequence that is in.
    pub fn remove(&mut self, id: u64) -> Option<Arc<Sequence>> {
        self.find(id).ok()?;
        let index = (id & MASK) as u32 - 1;
        let slot = &mut self.slots[index as usize];
        slot.generation = (slot.generation + 1) & MASK as u32;
        let sequence = slot.sequence.take();
        self.free.push(index);
        sequence
    }
}
