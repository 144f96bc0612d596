//! Slots: cells that the engine places, written in any order, and the index beside rows that it keeps itself.
//!
//! A stream is a table of tiles that all exist from the start, so that writing needs no memory. K scales of a tile are
//! shared by its cells: they grow as rows demand it, and shrink when all of its rows can be encoded anew, because they
//! have all been written while the tile was kept as given (or because the engine has them).

mod device;

pub use device::{Hands, Job, launcher};

use super::memory::{Block, Kind, Memory, reserve};
use super::reader::{Pages, SequenceView};
use crate::backend::cuda::params::AdoptParams;
use crate::format::{Format, Layout, MAX_DIM, Rows, TILE, range_bits};
use crate::{Error, Result};
use std::sync::Arc;

/// The cells of one layer.
#[derive(Debug)]
pub struct SlotLayer {
    layout: Layout,
    n_slots: usize,
    /// First cells of every stream that are kept as given, at most.
    exact_head: usize,
    /// `[stream]`: how many are at the moment. Fewer once one of them holds a copy of what is known as stored only.
    head_cells: Vec<usize>,
    /// `[stream][tile]`.
    tiles: Vec<SlotTile>,
    /// `[stream]`: the first cells' rows; none if the engine has them.
    heads: Vec<Block>,
    kept: Vec<Kept>,
    /// Tiles written so far: what is oldest has the lowest.
    clock: u64,
    /// The engine's rows, once they are named; on a device, they are its, and not read here.
    attached: Option<(Rows<'static>, Rows<'static>)>,
    is_index: bool,
    /// What a device is told of the cells.
    table: Option<device::Table>,
}

/// A tile of cells.
#[derive(Debug)]
pub(super) struct SlotTile {
    pub page: Block,
    pub k: Cells,
    pub v: Cells,
    /// Index of its kept rows.
    kept: Option<usize>,
}

/// What is known of the K or the V rows of a tile.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Cells {
    /// Cells with rows.
    pub written: u128,
    /// Of these: kept as given.
    fresh: u128,
    /// Rows written over others since the whole tile was last encoded.
    stale: u32,
}

/// Rows of a tile as given, K and V.
#[derive(Debug)]
struct Kept {
    block: Block,
    tile: Option<usize>,
    used: u64,
}

/// What writing some cells of a tile comes to.
#[derive(Debug)]
struct Plan {
    tile: usize,
    /// Rows that attend as given.
    skip: usize,
    /// Nothing is in the page yet.
    blank: bool,
    /// Where its rows are kept, and whose they were.
    kept: Option<usize>,
    closed: Option<Closed>,
    /// The cells.
    new: u128,
    k: Option<Encode>,
    v: Option<Encode>,
}

/// What is encoded.
#[derive(Debug, Clone, Copy)]
enum Encode {
    /// The whole tile, as if appended.
    All,
    /// The cells alone, beside `others` with rows, of which those in `known` are at hand.
    Some { others: u128, known: u128 },
}

/// A tile whose rows are no longer kept. It is encoded from them as a whole, K or V, if that helps.
#[derive(Debug, Clone, Copy)]
struct Closed {
    tile: usize,
    skip: usize,
    k: bool,
    v: bool,
}

/// Tiles whose rows are kept as given while others are written: a sixteenth, and two per stream at least.
fn n_kept(n_streams: usize, n_tiles: usize) -> usize {
    (n_tiles / 16).max(2 * n_streams).min(n_tiles)
}

impl Cells {
    /// True if all of `whole` should be encoded together now, since all can, and it has not been done, or too many rows
    /// have been written over others since. `known` = cells whose rows are at hand after writing `new`.
    fn note(&mut self, new: u128, known: u128, whole: u128) -> bool {
        let complete = |cells: u128| cells & whole == whole;
        let was = complete(self.written) && complete(self.fresh);
        self.stale += (new & self.written).count_ones();
        self.written |= new;
        self.fresh = known & self.written;
        let all = new & whole == whole || complete(self.fresh) && (!was || self.stale >= TILE as u32);
        if all {
            self.stale = 0;
        }
        all
    }

    fn forget(&mut self, cells: u128) {
        self.written &= !cells;
        self.fresh &= !cells;
    }
}

impl SlotTile {
    /// Cells with both rows: the others are not seen.
    pub fn written(&self) -> u128 {
        self.k.written & self.v.written
    }
}

impl SlotLayer {
    /// Takes all the memory that the cells of layer `index` will ever need. `is_index`: the engine keeps the rows.
    pub fn new(
        memory: &Arc<Memory>,
        index: usize,
        layout: Layout,
        n_streams: usize,
        n_slots: usize,
        exact_head: usize,
        is_index: bool,
    ) -> Result<SlotLayer> {
        let n_tiles = n_streams * n_slots.div_ceil(TILE);
        let lossy = layout.format == Format::Aligned && !is_index;
        let n_kept = if lossy { n_kept(n_streams, n_tiles) } else { 0 };
        let head_bytes = layout.kept_bytes(exact_head);
        let n_heads = if lossy && exact_head > 0 { n_streams } else { 0 };
        let bytes = |n: usize, bytes: usize| n.saturating_mul(bytes);
        let total = bytes(n_tiles, layout.page_bytes()).saturating_add(bytes(n_kept, layout.kept_bytes(TILE)));
        memory.check(total.saturating_add(bytes(n_heads, head_bytes)))?;
        let (mut tiles, mut heads, mut kept, mut head_cells) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
        reserve(&mut tiles, n_tiles)?;
        reserve(&mut heads, n_heads)?;
        reserve(&mut kept, n_kept)?;
        reserve(&mut head_cells, n_streams)?;
        head_cells.resize(n_streams, exact_head);
        for _ in 0..n_tiles {
            let page = Block::of(memory, Kind::Page, layout.page_bytes())?;
            tiles.push(SlotTile { page, k: Cells::default(), v: Cells::default(), kept: None });
        }
        for _ in 0..n_heads {
            let mut head = Block::of(memory, Kind::Kept, head_bytes)?;
            if memory.device().is_none() {
                head.fill(0);
            }
            heads.push(head);
        }
        for _ in 0..n_kept {
            kept.push(Kept { block: Block::of(memory, Kind::Kept, layout.kept_bytes(TILE))?, tile: None, used: 0 });
        }
        let mut layer = SlotLayer {
            layout,
            n_slots,
            exact_head,
            head_cells,
            tiles,
            heads,
            kept,
            clock: 0,
            attached: None,
            is_index,
            table: None,
        };
        layer.tell_all(memory, index)?;
        Ok(layer)
    }

    /// Layout of its pages.
    pub fn layout(&self) -> &Layout {
        &self.layout
    }

    /// True if the engine keeps the rows.
    pub fn is_index(&self) -> bool {
        self.is_index
    }

    /// All slots.
    pub fn n_slots(&self) -> usize {
        self.n_slots * self.n_streams()
    }

    fn tiles_per_stream(&self) -> usize {
        self.n_slots.div_ceil(TILE)
    }

    fn n_streams(&self) -> usize {
        self.tiles.len() / self.tiles_per_stream()
    }

    /// Cells that are seen.
    pub(super) fn n_written(&self) -> u64 {
        self.tiles.iter().map(|t| u64::from(t.written().count_ones())).sum()
    }

    /// Tile and row in the tile of a slot.
    fn place(&self, slot: usize) -> (usize, usize) {
        let (stream, cell) = (slot / self.n_slots, slot % self.n_slots);
        (stream * self.tiles_per_stream() + cell / TILE, cell % TILE)
    }

    /// Rows of a tile that its page does not hold.
    fn skip(&self, tile: usize) -> usize {
        let per_stream = self.tiles_per_stream();
        if tile.is_multiple_of(per_stream) { self.head_cells[tile / per_stream] } else { 0 }
    }

    /// First slot of a tile.
    fn first_slot(&self, tile: usize) -> usize {
        tile / self.tiles_per_stream() * self.n_slots + tile % self.tiles_per_stream() * TILE
    }

    /// Names the engine's rows and forgets all cells.
    pub fn attach(&mut self, k: Rows<'static>, v: Rows<'static>) {
        self.attached = Some((k, v));
        self.invalidate(0, self.n_slots());
    }

    /// The engine's rows, if they are its own; an error if they have not been named yet.
    pub fn attached(&self) -> Result<Option<(Rows<'static>, Rows<'static>)>> {
        match self.attached {
            None if self.is_index => {
                Err(Error::Argument("layer has no rows yet: expected akv_attach_rows before".to_owned()))
            }
            rows => Ok(rows),
        }
    }

    /// Writes rows to slots, as the caller lists them, all within bounds; rows that are the engine's own are read from
    /// there. They have passed [`Layout::check_rows`], or a device checks them.
    pub fn write(&mut self, slots: &[i64], k: Option<Rows>, v: Option<Rows>, hands: &mut Hands) -> Result<()> {
        let mut wave = self.wave(k, v);
        let mut done = 0;
        while done < slots.len() {
            let (tile, _) = self.place(slots[done] as usize);
            let of_tile = slots[done..].iter().take(TILE).take_while(|&&slot| self.place(slot as usize).0 == tile);
            let run = &slots[done..done + of_tile.count()];
            let plan = self.plan(tile, run, k.is_some(), v.is_some());
            match hands {
                Hands::Host => self.carry_out(&plan, run, k.map(|k| k.skip(done)), v.map(|v| v.skip(done))),
                Hands::Device(launch) => wave.add(self.cell_write(&plan, run, done), launch)?,
            }
            done += run.len();
        }
        match hands {
            Hands::Host => Ok(()),
            Hands::Device(launch) => wave.launch(launch),
        }
    }

    /// Marks which of the slots that have been written were no numbers: (index, head) of K and of V; None if it was not
    /// written.
    pub fn mark(&mut self, slots: &[i64], bad: [Option<&[(usize, usize)]>; 2]) {
        for (side, bad) in bad.into_iter().enumerate() {
            let Some(bad) = bad else { continue };
            let layout = self.layout;
            for &slot in slots {
                let (tile, row) = self.place(slot as usize);
                for head in 0..layout.shape.n_kv_heads {
                    layout.mark(&mut self.tiles[tile].page, head, side, 1 << row, 0);
                }
            }
            for &(i, head) in bad {
                // Not if the slot is there again: it holds the later row.
                if !slots[i + 1..].contains(&slots[i]) {
                    let (tile, row) = self.place(slots[i] as usize);
                    layout.mark(&mut self.tiles[tile].page, head, side, 1 << row, 1 << row);
                }
            }
        }
    }

    /// Makes NaN of what was no number.
    pub fn spread(&self, slot: usize, head: usize, k: &mut [f32], v: &mut [f32]) {
        let (tile, row) = self.place(slot);
        let tile = &self.tiles[tile];
        for (side, (cells, x)) in [(tile.k, k), (tile.v, v)].into_iter().enumerate() {
            if (self.layout.marks(&tile.page, head, side) & cells.written) >> row & 1 == 1 {
                x.fill(f32::NAN);
            }
        }
    }

    /// Notes that cells of a tile are written, K, V or both, and says what is to be done.
    fn plan(&mut self, index: usize, slots: &[i64], has_k: bool, has_v: bool) -> Plan {
        let skip = self.skip(index);
        let new = slots.iter().fold(0, |new, &slot| new | 1 << self.place(slot as usize).1);
        let tile = &mut self.tiles[index];
        let blank = tile.k.written | tile.v.written == 0;
        if blank {
            (tile.k, tile.v) = (Cells::default(), Cells::default());
        }
        let format = self.layout.format;
        let (kept, closed) = match format == Format::Raw || self.is_index {
            true => (None, None),
            false => {
                let (kept, closed) = self.keep(index);
                (Some(kept), closed)
            }
        };
        let encode = |cells: &mut Cells, wanted: bool| {
            if !wanted {
                return None;
            }
            let others = cells.written;
            if format == Format::Raw {
                cells.written |= new;
                return Some(Encode::Some { others, known: 0 });
            }
            let known = if kept.is_some() { cells.fresh | new } else { u128::MAX };
            let all = cells.note(new, known, !range_bits(0, skip));
            Some(if all { Encode::All } else { Encode::Some { others, known } })
        };
        let tile = &mut self.tiles[index];
        let (k, v) = (encode(&mut tile.k, has_k || self.is_index), encode(&mut tile.v, has_v || self.is_index));
        Plan { tile: index, skip, blank, kept, closed, new, k, v }
    }

    /// Does it, on the host.
    fn carry_out(&mut self, plan: &Plan, slots: &[i64], k: Option<Rows>, v: Option<Rows>) {
        if plan.blank {
            self.layout.blank(&mut self.tiles[plan.tile].page);
        }
        let n_slots = self.n_slots;
        let rows = slots.iter().map(|&slot| slot as usize % n_slots % TILE).enumerate();
        if self.layout.format == Format::Raw {
            let page = &mut self.tiles[plan.tile].page;
            for (i, row) in rows {
                // As if the row lay at its place in a tile.
                if let Some(k) = k {
                    self.layout.rewrite_keys(page, &k.skip(i.wrapping_sub(row)), 1 << row, 0, 0);
                }
                if let Some(v) = v {
                    self.layout.rewrite_values(page, &v.skip(i.wrapping_sub(row)), 1 << row);
                }
            }
        } else if let Some((k, v)) = self.attached {
            let first = self.first_slot(plan.tile);
            let page = &mut self.tiles[plan.tile].page;
            encode(&self.layout, page, plan, &k.skip(first), &v.skip(first));
        } else if let Some(kept) = plan.kept {
            if let Some(closed) = plan.closed {
                self.encode_closed(kept, closed);
            }
            let (stream, n_head) = (plan.tile / self.tiles_per_stream(), self.exact_head);
            for (i, row) in rows {
                let (block, n) = match row < plan.skip {
                    true => (&mut self.heads[stream], n_head),
                    false => (&mut self.kept[kept].block, TILE),
                };
                if let Some(k) = k {
                    self.layout.keep_key(block, n, row, k.skip(i));
                }
                if let Some(v) = v {
                    self.layout.keep_value(block, n, row, v.skip(i));
                }
            }
            let (k, v) = self.layout.kept(&self.kept[kept].block, TILE);
            encode(&self.layout, &mut self.tiles[plan.tile].page, plan, &k, &v);
        }
    }

    /// The tile's kept rows: its own, or those of the tile that has not been written for longest.
    fn keep(&mut self, index: usize) -> (usize, Option<Closed>) {
        self.clock += 1;
        let (kept, closed) = match self.tiles[index].kept {
            Some(kept) => (kept, None),
            None => {
                let oldest = (0..self.kept.len()).min_by_key(|&i| self.kept[i].used).unwrap_or(0);
                (oldest, self.close(oldest))
            }
        };
        (self.kept[kept].tile, self.kept[kept].used) = (Some(index), self.clock);
        self.tiles[index].kept = Some(kept);
        (kept, closed)
    }

    /// Takes kept rows from their tile, and says what is to be encoded from them before they go.
    fn close(&mut self, kept: usize) -> Option<Closed> {
        let index = self.kept[kept].tile.take()?;
        let skip = self.skip(index);
        let whole = !range_bits(0, skip);
        let tile = &mut self.tiles[index];
        let [k, v] = [&tile.k, &tile.v].map(|cells| cells.stale > 0 && cells.fresh & whole == whole);
        // Free: whoever needs rows next takes these.
        (tile.kept, self.kept[kept].used) = (None, 0);
        for cells in [&mut tile.k, &mut tile.v] {
            (cells.fresh, cells.stale) = (0, 0);
        }
        Some(Closed { tile: index, skip, k, v })
    }

    /// Encodes it, on the host.
    fn encode_closed(&mut self, kept: usize, closed: Closed) {
        let (k, v) = self.layout.kept(&self.kept[kept].block, TILE);
        let page = &mut self.tiles[closed.tile].page;
        if closed.k {
            self.layout.encode_keys(page, &k, closed.skip);
        }
        if closed.v {
            self.layout.encode_values(page, &v, closed.skip);
        }
    }

    /// Forgets `n` slots.
    pub fn invalidate(&mut self, first: usize, n: usize) {
        let per_stream = self.tiles_per_stream();
        for (index, cells) in self.stretch(first, n) {
            let tile = &mut self.tiles[index];
            tile.k.forget(cells);
            tile.v.forget(cells);
            if tile.k.written | tile.v.written == 0 && index.is_multiple_of(per_stream) {
                self.head_cells[index / per_stream] = self.exact_head;
            }
            self.note_change(index);
        }
    }

    /// Tiles of a stretch of slots, and their cells in it.
    fn stretch(&self, first: usize, n: usize) -> impl Iterator<Item = (usize, u128)> + use<> {
        let (per_stream, n_slots) = (self.tiles_per_stream(), self.n_slots);
        let (mut at, end) = (first, first + n);
        std::iter::from_fn(move || {
            let (stream, cell) = (at / n_slots, at % n_slots);
            let from = cell % TILE;
            let to = TILE.min(from + end - at).min(from + n_slots - cell);
            at += to - from;
            (to > from).then(|| (stream * per_stream + cell / TILE, range_bits(from, to)))
        })
    }

    /// A row as it was given, if it is kept, or as attention sees it with all stored planes; zeros if there is none.
    pub fn read(&self, slot: usize, head: usize, k: &mut [f32], v: &mut [f32]) {
        let (index, row) = self.place(slot);
        let tile = &self.tiles[index];
        self.layout.decode(&tile.page, head, row, k, v);
        if row < self.skip(index) && !self.heads.is_empty() {
            let (rows_k, rows_v) = self.layout.kept(&self.heads[index / self.tiles_per_stream()], self.exact_head);
            rows_k.read(row, head, k);
            rows_v.read(row, head, v);
        } else if let Some(kept) = tile.kept {
            let (rows_k, rows_v) = self.layout.kept(&self.kept[kept].block, TILE);
            if tile.k.fresh >> row & 1 == 1 {
                rows_k.read(row, head, k);
            }
            if tile.v.fresh >> row & 1 == 1 {
                rows_v.read(row, head, v);
            }
        }
        for (cells, x) in [(tile.k, k), (tile.v, v)] {
            if cells.written >> row & 1 == 0 {
                x.fill(0.0);
            }
        }
    }

    /// Memory for a row, which [`SlotLayer::copy`] needs.
    pub fn spare_row(&self) -> Result<Block> {
        let (memory, bytes) = (self.tiles[0].page.memory(), self.layout.kept_bytes(1));
        if memory.device().is_some() { Block::on_device(memory, bytes) } else { Block::new(memory, bytes) }
    }

    /// Copies slots; the two stretches do not overlap.
    pub fn copy(&mut self, from: usize, to: usize, n: usize, spare: &mut Block, hands: &mut Hands) -> Result<()> {
        let mut done = 0;
        while done < n {
            let ((a, row_a), (b, row_b)) = (self.place(from + done), self.place(to + done));
            let left = |slot: usize| TILE.min(self.n_slots - slot % self.n_slots);
            let (left_a, left_b) = (left(from + done), left(to + done));
            if row_a + row_b == 0 && left_a == left_b && n - done >= left_a && self.skip(a) == self.skip(b) {
                self.copy_tile(a, b, hands)?;
                done += left_a;
            } else {
                self.copy_row(from + done, to + done, spare, hands)?;
                done += 1;
            }
        }
        Ok(())
    }

    /// As it is stored, with its rows as given if they are kept.
    fn copy_tile(&mut self, from: usize, to: usize, hands: &mut Hands) -> Result<()> {
        if let Some(kept) = self.tiles[to].kept {
            // What it holds goes.
            self.close(kept);
        }
        if self.tiles[from].kept.is_some() {
            let (b, closed) = self.keep(to);
            if let Some(closed) = closed {
                match hands {
                    Hands::Host => self.encode_closed(b, closed),
                    Hands::Device(launch) => {
                        let mut wave = self.wave(None, None);
                        wave.add(self.cell_close(b, closed), launch)?;
                        wave.launch(launch)?;
                    }
                }
            }
            // Unless they just had to make room.
            if let Some(a) = self.tiles[from].kept {
                let [a, b] = self.kept.get_disjoint_mut([a, b]).unwrap_or_else(|_| unreachable!("two tiles"));
                hands.copy(&mut b.block, &a.block)?;
            } else {
                self.close(b);
            }
        }
        if self.skip(from) > 0 && !self.heads.is_empty() {
            let heads = [from, to].map(|tile| tile / self.tiles_per_stream());
            let [a, b] = self.heads.get_disjoint_mut(heads).unwrap_or_else(|_| unreachable!("two streams"));
            hands.copy(b, a)?;
        }
        let [a, b] = self.tiles.get_disjoint_mut([from, to]).unwrap_or_else(|_| unreachable!("two tiles"));
        hands.copy(&mut b.page, &a.page)?;
        (b.k, b.v) = (a.k, a.v);
        if b.kept.is_none() {
            for cells in [&mut b.k, &mut b.v] {
                (cells.fresh, cells.stale) = (0, 0);
            }
        }
        self.note_change(to);
        Ok(())
    }

    /// As it would be read in the layer's dtypes. What is known as stored only is known no better afterwards.
    fn copy_row(&mut self, from: usize, to: usize, spare: &mut Block, hands: &mut Hands) -> Result<()> {
        let ((a, row_a), (b, row_b)) = (self.place(from), self.place(to));
        let (tile, kept) = (&self.tiles[a], row_a < self.skip(a) || self.layout.format == Format::Raw);
        let has = |cells: &Cells| cells.written >> row_a & 1 == 1;
        let stored = |cells: &Cells| has(cells) && !kept && cells.fresh >> row_a & 1 == 0;
        let (has_k, has_v, stored_k, stored_v) = (has(&tile.k), has(&tile.v), stored(&tile.k), stored(&tile.v));
        self.invalidate(to, 1);
        if (stored_k || stored_v) && row_b < self.skip(b) {
            self.shrink_head(b, row_b, spare, hands)?;
        }
        self.take_row(from, spare, hands)?;
        let (rows_k, rows_v) = self.spare_rows(spare);
        self.write(&[to as i64], has_k.then_some(rows_k), has_v.then_some(rows_v), hands)?;
        let tile = &mut self.tiles[b];
        for (cells, stored) in [(&mut tile.k, stored_k), (&mut tile.v, stored_v)] {
            if stored {
                cells.fresh &= !(1 << row_b);
            }
        }
        if let Hands::Device(launch) = hands {
            if !stored_k && !stored_v {
                return Ok(());
            }
            return launch(&Job::Adopt(&AdoptParams {
                shape: (&self.layout).into(),
                from: self.tiles[a].page.address(),
                to: self.tiles[b].page.address(),
                from_row: row_a as i32,
                to_row: row_b as i32,
                key: stored_k.into(),
                value: stored_v.into(),
            }));
        }
        for head in 0..self.layout.shape.n_kv_heads {
            for side in [0, 1] {
                let bad = self.layout.marks(&self.tiles[a].page, head, side) >> row_a & 1;
                self.layout.mark(&mut self.tiles[b].page, head, side, 1 << row_b, bad << row_b);
            }
            if stored_k {
                let slack = self.layout.lost_keys(&self.tiles[a].page, &self.tiles[b].page, head);
                self.layout.add_slack(&mut self.tiles[b].page, head, slack);
            }
            if stored_v {
                let value = self.layout.stored_value(&self.tiles[a].page, head, row_a);
                self.layout.store_value(&mut self.tiles[b].page, head, row_b, &value);
            }
        }
        Ok(())
    }

    /// A row as it would be read, in the layer's dtypes.
    fn take_row(&self, slot: usize, into: &mut Block, hands: &mut Hands) -> Result<()> {
        let shape = self.layout.shape;
        if let Hands::Device(launch) = hands {
            let (k, v) = self.spare_rows(into);
            return launch(&Job::Read(&self.cell_read(slot, 1, Some((&k).into()), Some((&v).into()), true)));
        }
        let (mut k, mut v) = ([0.0; MAX_DIM], [0.0; MAX_DIM]);
        let (k, v) = (&mut k[..shape.dim_k], &mut v[..shape.dim_v]);
        for head in 0..shape.n_kv_heads {
            self.read(slot, head, k, v);
            self.layout.keep_values(into, head, k, v);
        }
        Ok(())
    }

    /// The rows of such memory.
    fn spare_rows<'a>(&self, spare: &'a Block) -> (Rows<'a>, Rows<'a>) {
        // SAFETY: a block of `kept_bytes(1)`; rows of a device's are addresses alone, which only it reads.
        unsafe { self.layout.kept_at(spare.address(), 1) }
    }

    /// Keeps only the first `n` cells of a stream apart from its first tile: the others go where all the others are.
    fn shrink_head(&mut self, tile: usize, n: usize, spare: &mut Block, hands: &mut Hands) -> Result<()> {
        let stream = tile / self.tiles_per_stream();
        for row in (n..self.head_cells[stream]).rev() {
            let slot = self.first_slot(tile) + row;
            let cells = [self.tiles[tile].k, self.tiles[tile].v].map(|cells| cells.written >> row & 1 == 1);
            self.take_row(slot, spare, hands)?;
            self.invalidate(slot, 1);
            self.head_cells[stream] = row;
            let (k, v) = self.spare_rows(spare);
            if cells != [false; 2] {
                self.write(&[slot as i64], cells[0].then_some(k), cells[1].then_some(v), hands)?;
            }
        }
        self.head_cells[stream] = n;
        self.note_change(tile);
        Ok(())
    }

    /// What one layer's stream shows of its first `n_kv` cells.
    pub fn view(&self, stream: usize, n_kv: usize) -> SequenceView<'_> {
        let first = stream * self.tiles_per_stream();
        let tiles = &self.tiles[first..first + n_kv.div_ceil(TILE)];
        let attached = self.attached.map(|(k, v)| (k.skip(stream * self.n_slots), v.skip(stream * self.n_slots)));
        let head = self.heads.get(stream).map(|head| self.layout.kept(head, self.exact_head));
        let n_exact = self.head_cells[stream].min(n_kv);
        let exact = head.or(attached).filter(|_| n_exact > 0);
        SequenceView {
            layout: &self.layout,
            len: n_kv,
            n_exact: if exact.is_some() { n_exact } else { 0 },
            exact,
            pages: Pages::Slots(tiles),
            attached,
        }
    }
}

/// Encodes what a plan says into its page; `k` and `v` are rows of the tile.
fn encode(layout: &Layout, page: &mut Block, plan: &Plan, k: &Rows, v: &Rows) {
    let paged = !range_bits(0, plan.skip);
    match plan.k {
        Some(Encode::All) => layout.encode_keys(page, k, plan.skip),
        Some(Encode::Some { others, known }) => {
            layout.rewrite_keys(page, k, plan.new & paged, others & paged, known);
        }
        None => {}
    }
    match plan.v {
        Some(Encode::All) => layout.encode_values(page, v, plan.skip),
        Some(Encode::Some { .. }) => layout.rewrite_values(page, v, plan.new & paged),
        None => {}
    }
}
