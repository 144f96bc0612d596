//! What a device is told of rows: where pages lie, what a step appends, what a truncation does to the tile that it cuts.

use super::layer::Layer;
use super::memory::{Block, Memory, Shared};
use crate::Result;
use crate::backend::cuda::params::{Append, EncodeParams, Poke, Rows, View};
use crate::backend::cuda::{Device, Pinned, Stream, bytes_of};
use crate::format::{Layout, TILE};
use std::ops::Range;
use std::sync::Arc;

/// The addresses of a layer's pages, on the device.
#[derive(Debug, Default)]
pub(super) struct Listing {
    block: Option<Block>,
    /// Entries that are right, or will be once the step's pokes have run.
    n: usize,
}

impl Listing {
    /// A larger one, if `n_pages` do not fit.
    pub fn room(&self, memory: &Arc<Memory>, n_pages: usize) -> Result<Option<Block>> {
        let capacity = self.block.as_ref().map_or(0, |block| block.size() / size_of::<u64>());
        if memory.device().is_none() || n_pages <= capacity {
            return Ok(None);
        }
        Block::on_device(memory, n_pages.next_power_of_two() * size_of::<u64>()).map(Some)
    }

    pub fn adopt(&mut self, room: Option<Block>) {
        if room.is_some() {
            *self = Listing { block: room, n: 0 };
        }
    }

    /// The first `n` pages have not changed.
    pub fn keep(&mut self, n: usize) {
        self.n = self.n.min(n);
    }

    fn address(&self) -> u64 {
        self.block.as_ref().map_or(0, Block::address)
    }
}

/// What a step's kernels are told.
#[derive(Debug, Default)]
pub struct Plan {
    /// `[layer][member]`: what attention reads, the step's new tokens included.
    pub views: Vec<View>,
    /// `[layer][n_appends]`.
    pub appends: Vec<Append>,
    /// Tiles that the step writes to, of each layer.
    pub n_appends: usize,
    /// What changes in the listings of pages.
    pub pokes: Vec<Poke>,
}

impl Layer {
    /// True if the device does not know where all pages are.
    pub fn is_unlisted(&self) -> bool {
        self.pages.memory().device().is_some() && self.listing.n < self.pages.len()
    }

    /// Tells it, by pokes.
    pub fn list(&mut self, pokes: &mut Vec<Poke>) {
        let address = self.listing.address();
        for i in self.listing.n..self.pages.len() {
            let value = self.pages[i].block.address();
            pokes.push(Poke { address: address + (i * size_of::<u64>()) as u64, value });
        }
        self.listing.n = self.pages.len();
    }

    /// Tells it at once, in a stream's order.
    pub fn list_now(&mut self, memory: &Arc<Memory>, stream: Stream) -> Result<()> {
        let Some(device) = memory.device() else { return Ok(()) };
        let room = self.listing.room(memory, self.pages.len())?;
        self.listing.adopt(room);
        let from = self.listing.n;
        let entries: Vec<u64> = self.pages[from..].iter().map(|page| page.block.address()).collect();
        let to = self.listing.address() + (from * size_of::<u64>()) as u64;
        // SAFETY: the listing has room for all pages.
        unsafe { device.upload(to, bytes_of(&entries), stream) }?;
        self.listing.n = self.pages.len();
        Ok(())
    }

    /// The first `len` tokens, as attention reads them.
    pub fn device_view(&self, id: u64, len: usize) -> View {
        let n_exact = self.exact_head.min(len);
        let head = self.head.as_ref().filter(|_| n_exact > 0);
        let (head_k, head_v) = head
            .map_or((0, 0), |head| (head.address(), head.address() + self.layout.kept_offset(self.exact_head) as u64));
        View {
            pages: self.listing.address(),
            head_k,
            head_v,
            written: 0,
            id,
            first: 0,
            len: len as i32,
            n_exact: if head.is_some() { n_exact as i32 } else { 0 },
        }
    }

    /// What appends `n` rows, the first of which is row `source` of the caller's, by tiles.
    pub fn plan(&self, id: u64, source: usize, n: usize, appends: &mut Vec<Append>) {
        let (mut done, mut len) = (0, self.len);
        while done < n {
            let (tile, from) = (len / TILE, len % TILE);
            let to = TILE.min(from + n - done);
            let page = &self.pages[tile];
            appends.push(Append {
                kept: page.kept.as_ref().map_or(0, Shared::address),
                head: if tile == 0 { self.head.as_ref().map_or(0, Shared::address) } else { 0 },
                source: (source + done) as i64,
                ..self.encode(id, tile, from, to)
            });
            (done, len) = (done + to - from, len + to - from);
        }
    }

    /// What encodes rows `from..to` of a tile.
    fn encode(&self, id: u64, tile: usize, from: usize, to: usize) -> Append {
        let page = &self.pages[tile];
        let (base, base_rows) = page.base.as_ref().map_or((0, 0), |(base, rows)| (base.address(), *rows));
        Append {
            page: page.block.address(),
            base,
            id,
            tile: tile as i32,
            from: from as i32,
            to: to as i32,
            base_rows: base_rows as i32,
            exact_head: if self.head.is_some() { self.skip(tile) as i32 } else { 0 },
            ..Append::default()
        }
    }

    /// Counts rows that a device has been told to append.
    pub fn advance(&mut self, n: usize) {
        self.len += n;
    }
}

/// Work on cut tiles. On the host it is done as it comes; on a device at the end, between two waits for all that has
/// been launched.
pub(super) struct Edits {
    device: Option<Arc<Device>>,
    /// Destination, source, bytes.
    copies: Vec<(u64, u64, usize)>,
    encodes: Vec<(Layout, Append, u64)>,
}

impl Edits {
    pub fn new(memory: &Memory) -> Edits {
        Edits { device: memory.device().cloned(), copies: Vec::new(), encodes: Vec::new() }
    }

    pub fn device(&self) -> Option<&Arc<Device>> {
        self.device.as_ref()
    }

    /// Waits for what has been launched: where that cannot be, nothing is changed yet.
    pub fn wait(&self) -> Result<()> {
        self.device.as_ref().map_or(Ok(()), |device| device.synchronize())
    }

    /// Copies a block to one that nobody else holds.
    pub fn copy(&mut self, to: &mut Shared, from: &Shared) {
        match &self.device {
            Some(_) => self.copies.push((to.address(), from.address(), to.size())),
            None => to.own().copy_from_slice(from),
        }
    }

    /// Copies a part of a block into one that nobody else holds.
    pub fn copy_part(&mut self, to: &mut Shared, at: usize, from: &Shared, range: Range<usize>) {
        match &self.device {
            Some(_) => self.copies.push((to.address() + at as u64, from.address() + range.start as u64, range.len())),
            None => to.own()[at..at + range.len()].copy_from_slice(&from[range]),
        }
    }

    /// Encodes the first `rows` rows of a tile from those that are kept, as far as no base knows them.
    pub fn encode(&mut self, layer: &Layer, tile: usize, rows: usize) {
        let page = &layer.pages[tile];
        let from = page.base.as_ref().map_or(0, |(_, base_rows)| *base_rows);
        // Rows of the exact head are written once more, as they are.
        let head = layer.head.as_ref().filter(|_| tile == 0).map_or(0, Shared::address);
        let append = Append { source: from as i64, head, ..layer.encode(0, tile, from, rows) };
        self.encodes.push((layer.layout, append, page.kept.as_ref().map_or(0, Shared::address)));
    }

    /// Does what is left to do.
    pub fn run(self) -> Result<()> {
        let Some(device) = self.device else { return Ok(()) };
        if self.copies.is_empty() && self.encodes.is_empty() {
            return Ok(());
        }
        device.synchronize()?;
        for (to, from, bytes) in self.copies {
            // SAFETY: blocks of the same kind, that live.
            unsafe { device.copy(to, from, bytes, Stream::DEFAULT) }?;
        }
        let mut appends = Pinned::new(&device, (self.encodes.len() * size_of::<Append>()).max(1))?;
        let launched = self.encodes.iter().enumerate().try_for_each(|(i, (layout, append, kept))| {
            let (at, shape) = (i * size_of::<Append>(), &layout.shape);
            appends.bytes()[at..at + size_of::<Append>()].copy_from_slice(bytes_of(&[*append]));
            let rows = |data: u64, dtype: crate::format::Dtype, dim: usize| {
                let stride_head = (dim * dtype.size()) as i64;
                let stride_row = stride_head * shape.n_kv_heads as i64;
                Rows { data, stride_row, stride_head, dtype: dtype as i32, reserved: 0 }
            };
            let call = EncodeParams {
                shape: layout.into(),
                k: rows(*kept, shape.dtype_k, shape.dim_k),
                v: rows(*kept + layout.kept_offset(TILE) as u64, shape.dtype_v, shape.dim_v),
                appends: appends.address + at as u64,
                fault: device.fault_address(),
                ..EncodeParams::default()
            };
            let grid = [1, shape.n_kv_heads, 1];
            let (kernel, shared) = device.kernels()?.append(layout);
            // SAFETY: a tile of the cache that nobody else uses, and rows that are kept.
            unsafe { device.launch(kernel, grid, shared, &call, Stream::DEFAULT) }
        });
        let done = device.synchronize();
        appends.free(&device);
        launched.and(done)
    }
}
