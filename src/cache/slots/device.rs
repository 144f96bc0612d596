//! Cells on a device. The books are the host's: what a call comes to is decided when it is made, in the order of the
//! device's work. Jobs travel with their kernels' parameters; what attention must know lies in a table on the device, which
//! the kernels that write keep up to date, and the next call with a stream where there was none.

use super::{Closed, Encode, Plan, SlotLayer};
use crate::backend::cuda::params::{self, AdoptParams, CellWrite, DequantizeParams, SpansParams, WriteParams};
use crate::backend::cuda::{CELLS_SHARED_BYTES, Device, ENCODE_SHARED_BYTES, Stream, bytes_of};
use crate::cache::memory::{Block, Memory, reserve};
use crate::format::{Rows, TILE};
use crate::{Error, Result};
use parking_lot::Mutex;
use std::ops::Range;
use std::sync::Arc;

/// What is to be done on a device.
#[derive(Debug)]
pub enum Job<'a> {
    /// As many of the writes.
    Write(&'a WriteParams, usize),
    /// Rows of one tile.
    Read(&'a DequantizeParams),
    /// A row that was copied by value.
    Adopt(&'a AdoptParams),
    /// Bytes, as they are.
    #[allow(missing_docs)]
    Copy { to: u64, from: u64, bytes: usize },
}

type Launch<'a> = dyn FnMut(&Job) -> Result<()> + 'a;

/// Who works on the memory of cells.
pub enum Hands<'a> {
    /// The host, at once.
    Host,
    /// A device, after what it was given before.
    Device(&'a mut Launch<'a>),
}

impl Hands<'_> {
    /// Copies a block to another of the same size.
    pub(super) fn copy(&mut self, to: &mut Block, from: &Block) -> Result<()> {
        match self {
            Hands::Host => to.copy_from_slice(from),
            Hands::Device(launch) => {
                launch(&Job::Copy { to: to.address(), from: from.address(), bytes: to.size() })?;
            }
        }
        Ok(())
    }
}

/// What launches jobs on a stream.
///
/// # Safety
/// Rows that jobs name are the device's memory, as documented, until the stream is done with them.
pub unsafe fn launcher(device: &Device, stream: Stream) -> impl FnMut(&Job) -> Result<()> {
    move |job| {
        let kernels = device.kernels()?;
        let heads = |shape: &params::Shape| shape.n_kv_heads as usize;
        // SAFETY: the contract; all else is memory of the cells.
        unsafe {
            match job {
                Job::Write(call, n) => {
                    device.launch(kernels.write, [*n, heads(&call.shape), 1], ENCODE_SHARED_BYTES, *call, stream)
                }
                Job::Read(call) => {
                    device.launch(kernels.dequantize, [call.n as usize, heads(&call.shape), 1], 0, *call, stream)
                }
                Job::Adopt(call) => {
                    device.launch(kernels.adopt, [1, heads(&call.shape), 1], CELLS_SHARED_BYTES, *call, stream)
                }
                Job::Copy { to, from, bytes } => device.copy(*to, *from, *bytes, stream),
            }
        }
    }
}

/// What a device is told of the cells of a layer.
#[derive(Debug)]
pub(super) struct Table {
    /// Pages, heads, cells with rows, lengths of heads.
    block: Block,
    heads: u64,
    written: u64,
    n_exact: u64,
    layer: usize,
    fault: u64,
    /// Tiles that it is wrong about.
    changed: Mutex<Range<usize>>,
}

/// Writes that are launched together: none of them touches what another does.
pub(super) struct Wave {
    call: WriteParams,
    n: usize,
}

impl Wave {
    pub fn add(&mut self, write: CellWrite, launch: &mut Launch) -> Result<()> {
        let pages = |w: &CellWrite| [w.page, w.closed];
        let meets = |w: &CellWrite| {
            let shares_pages = pages(w).iter().any(|page| *page != 0 && pages(&write).contains(page));
            shares_pages || w.kept != 0 && w.kept == write.kept
        };
        if self.n == self.call.writes.len() || self.call.writes[..self.n].iter().any(meets) {
            self.launch(launch)?;
        }
        self.call.writes[self.n] = write;
        self.n += 1;
        Ok(())
    }

    pub fn launch(&mut self, launch: &mut Launch) -> Result<()> {
        let n = std::mem::take(&mut self.n);
        if n > 0 { launch(&Job::Write(&self.call, n)) } else { Ok(()) }
    }
}

fn words(bits: u128) -> [u32; 4] {
    std::array::from_fn(|i| (bits >> (32 * i)) as u32)
}

impl SlotLayer {
    /// Makes the table, if there is a device, and tells it all.
    pub(super) fn tell_all(&mut self, memory: &Arc<Memory>, layer: usize) -> Result<()> {
        let Some(device) = memory.device() else { return Ok(()) };
        let (n_tiles, n_streams) = (self.tiles.len(), self.n_streams());
        let mut addresses: Vec<u64> = Vec::new();
        reserve(&mut addresses, n_tiles + n_streams)?;
        addresses.extend(self.tiles.iter().map(|tile| tile.page.address()));
        addresses.extend((0..n_streams).map(|stream| self.heads.get(stream).map_or(0, Block::address)));
        let before = size_of_val(&addresses[..]).next_multiple_of(16) as u64;
        let block = Block::on_device(memory, before as usize + 16 * n_tiles + 4 * n_streams)?;
        let start = block.address();
        let heads_bytes = self.layout.kept_bytes(self.exact_head);
        // SAFETY: our own memory, of these sizes.
        unsafe {
            device.upload(start, bytes_of(&addresses), Stream::DEFAULT)?;
            for head in &self.heads {
                device.clear(head.address(), heads_bytes, Stream::DEFAULT)?;
            }
        }
        let heads = start + (n_tiles * size_of::<u64>()) as u64;
        let (written, n_exact) = (start + before, start + before + 16 * n_tiles as u64);
        let (fault, changed) = (device.fault_address(), Mutex::new(0..n_tiles));
        self.table = Some(Table { block, heads, written, n_exact, layer, fault, changed });
        self.tell(device, Stream::DEFAULT, false)?;
        device.synchronize()
    }

    /// A tile's cells with rows have changed, or its stream's head, and the device has not been told.
    pub(super) fn note_change(&mut self, tile: usize) {
        if let Some(table) = &mut self.table {
            let changed = table.changed.get_mut();
            *changed = match changed.start >= changed.end {
                true => tile..tile + 1,
                false => changed.start.min(tile)..changed.end.max(tile + 1),
            };
        }
    }

    /// Tells it, before what is launched next on the stream.
    pub fn tell(&self, device: &Device, stream: Stream, capturing: bool) -> Result<()> {
        let Some(table) = &self.table else { return Ok(()) };
        let mut changed = table.changed.lock();
        if changed.start >= changed.end {
            return Ok(());
        }
        if capturing {
            return Err(Error::Unsupported(
                "cells have been forgotten, copied or attached since the device was last told: make a call with a \
                 stream before the capture, an akv_slots_write of no cells if there is nothing else"
                    .to_owned(),
            ));
        }
        let (mut written, mut n_exact) = (Vec::new(), Vec::new());
        reserve(&mut written, changed.len())?;
        reserve(&mut n_exact, self.head_cells.len())?;
        written.extend(self.tiles[changed.clone()].iter().map(|tile| words(tile.written())));
        n_exact.extend(self.head_cells.iter().map(|&n| n as u32));
        // SAFETY: the table has room for all tiles and streams.
        unsafe {
            device.upload(table.written + 16 * changed.start as u64, bytes_of(&written), stream)?;
            device.upload(table.n_exact, bytes_of(&n_exact), stream)?;
        }
        *changed = 0..0;
        Ok(())
    }

    /// What attention is told of them, but for its spans.
    pub fn spans(&self) -> Result<SpansParams> {
        let table = self.table.as_ref().ok_or_else(|| Error::Internal("cells without a device".to_owned()))?;
        Ok(SpansParams {
            pages: table.block.address(),
            written: table.written,
            heads: table.heads,
            n_exact: table.n_exact,
            seen: 0,
            views: 0,
            rows: 0,
            n_slots: self.n_slots as i64,
            head_v: self.layout.kept_offset(self.exact_head) as i64,
            tiles: self.tiles_per_stream() as i32,
            mask_tiles: 0,
            first_span: 0,
            n_spans: 0,
            spans: [params::Span::default(); params::MAX_SPANS],
        })
    }

    /// No writes yet, of a call's rows.
    pub(super) fn wave(&self, k: Option<Rows>, v: Option<Rows>) -> Wave {
        let (k, v) = self.attached.map_or((k, v), |(k, v)| (Some(k), Some(v)));
        let rows = |rows: Option<Rows>| rows.as_ref().map_or(params::Rows::default(), params::Rows::from);
        let call = WriteParams {
            shape: (&self.layout).into(),
            k: rows(k),
            v: rows(v),
            fault: self.table.as_ref().map_or(0, |table| table.fault),
            layer: self.table.as_ref().map_or(0, |table| table.layer as i32),
            reserved: 0,
            writes: [CellWrite::NONE; params::MAX_WRITES],
        };
        Wave { call, n: 0 }
    }

    /// A plan as a job. `source` = the first of its rows among the call's.
    pub(super) fn cell_write(&self, plan: &Plan, slots: &[i64], source: usize) -> CellWrite {
        let first = self.first_slot(plan.tile);
        let mut from = [0; TILE];
        for (i, &slot) in slots.iter().enumerate() {
            let cell = slot as usize % self.n_slots % TILE;
            from[cell] = if self.is_index { cell } else { i } as u8;
        }
        let (others, known) = match plan.k {
            Some(Encode::Some { others, known }) => (others, known),
            _ => (0, 0),
        };
        let what = |encode: Option<Encode>, some: u32, all: u32| match encode {
            Some(Encode::All) => all,
            Some(Encode::Some { .. }) => some,
            None => 0,
        };
        let write = CellWrite {
            page: self.tiles[plan.tile].page.address(),
            kept: plan.kept.map_or(0, |kept| self.kept[kept].block.address()),
            head: self.heads.get(plan.tile / self.tiles_per_stream()).map_or(0, Block::address),
            written: self.table.as_ref().map_or(0, |table| table.written + 16 * plan.tile as u64),
            source: if self.is_index { first } else { source } as i64,
            slot: first as i64,
            cells: words(plan.new),
            others: words(others),
            known: words(known),
            seen: words(self.tiles[plan.tile].written()),
            skip: plan.skip as i32,
            exact_head: self.exact_head as i32,
            what: if plan.blank { params::WRITE_BLANK } else { 0 }
                | what(plan.k, params::WRITE_K, params::WRITE_K_ALL)
                | what(plan.v, params::WRITE_V, params::WRITE_V_ALL),
            from,
            ..CellWrite::NONE
        };
        plan.closed.map_or(write, |closed| self.closing(write, closed))
    }

    /// Closing a tile, as a job of its own.
    pub(super) fn cell_close(&self, kept: usize, closed: Closed) -> CellWrite {
        let page = self.tiles[closed.tile].page.address();
        self.closing(CellWrite { page, kept: self.kept[kept].block.address(), ..CellWrite::NONE }, closed)
    }

    fn closing(&self, write: CellWrite, closed: Closed) -> CellWrite {
        if !closed.k && !closed.v {
            return write;
        }
        let what = if closed.k { params::CLOSE_K } else { 0 } | if closed.v { params::CLOSE_V } else { 0 };
        CellWrite {
            closed: self.tiles[closed.tile].page.address(),
            closed_skip: closed.skip as i32,
            what: write.what | what,
            ..write
        }
    }

    /// Reading `n` slots of one tile, as a job. `clamps`: numbers that a dtype cannot hold become its largest.
    pub fn cell_read(
        &self,
        slot: usize,
        n: usize,
        k: Option<params::Rows>,
        v: Option<params::Rows>,
        clamps: bool,
    ) -> DequantizeParams {
        let (index, _) = self.place(slot);
        let (tile, stream) = (&self.tiles[index], index / self.tiles_per_stream());
        let head = self.heads.get(stream).map_or(0, Block::address);
        DequantizeParams {
            shape: (&self.layout).into(),
            view: params::View {
                head_k: head,
                head_v: head + self.layout.kept_offset(self.exact_head) as u64,
                first: (stream * self.n_slots) as i64,
                n_exact: if head == 0 { 0 } else { self.skip(index).min(self.head_cells[stream]) as i32 },
                ..params::View::default()
            },
            k: k.unwrap_or_default(),
            v: v.unwrap_or_default(),
            fault: self.table.as_ref().map_or(0, |table| table.fault),
            first: (slot % self.n_slots) as i32,
            n: n as i32,
            layer: self.table.as_ref().map_or(0, |table| table.layer as i32),
            clamps: clamps.into(),
            page: tile.page.address(),
            kept: tile.kept.map_or(0, |kept| self.kept[kept].block.address()),
            fresh_k: words(if tile.kept.is_some() { tile.k.fresh } else { 0 }),
            fresh_v: words(if tile.kept.is_some() { tile.v.fresh } else { 0 }),
            written_k: words(tile.k.written),
            written_v: words(tile.v.written),
        }
    }

    /// Reads slots, by jobs: `key` and `value` are rows from the first of them on.
    pub fn read_on_device(
        &self,
        first: usize,
        n: usize,
        key: Option<params::Rows>,
        value: Option<params::Rows>,
        launch: &mut Launch,
    ) -> Result<()> {
        let mut done = 0;
        for (_, cells) in self.stretch(first, n) {
            let skip = |rows: params::Rows| params::Rows {
                data: rows.data.wrapping_add_signed(done as i64 * rows.stride_row),
                ..rows
            };
            let count = cells.count_ones() as usize;
            launch(&Job::Read(&self.cell_read(first + done, count, key.map(skip), value.map(skip), false)))?;
            done += count;
        }
        Ok(())
    }
}
