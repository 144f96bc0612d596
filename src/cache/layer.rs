//! The rows of one sequence in one layer.
//!
//! Whatever can still be written is held by this sequence alone: the open tile with its kept rows, and the exact head
//! while it is not full. Forks and truncations copy what would break that; appending never has to.

use super::Positions;
use super::device::{Edits, Listing};
use super::memory::{Block, Kind, Memory, Shared, Table};
use crate::Result;
use crate::format::{Layout, Rows, Source, TILE, range_bits};
use std::ops::Range;
use std::sync::Arc;

/// A tile.
#[derive(Debug, Clone)]
pub(super) struct Page {
    pub block: Shared,
    /// Its rows as given, from `base` on: while the tile is open, and while the exact tail can reach into it.
    pub kept: Option<Shared>,
    /// Of a tile that was reopened without them: the page that it was, and how many of its tokens only that knows.
    pub base: Option<(Shared, usize)>,
}

#[derive(Debug)]
pub(super) struct Layer {
    /// Its index in the cache.
    pub number: usize,
    pub layout: Layout,
    pub exact_head: usize,
    exact_tail: usize,
    /// Tokens.
    pub len: usize,
    /// Tiles. In a begun step also those that its tokens will need, and those that are reserved.
    pub pages: Table<Page>,
    /// Tiles that are not given back when a step is aborted.
    reserved: usize,
    /// Room for the kept rows of reserved tiles.
    spares: Table<Shared>,
    /// The first `exact_head` rows as given.
    pub head: Option<Shared>,
    /// Where the device finds the pages, if they are on one.
    pub listing: Listing,
    /// What stands for pages whose tokens have all been removed: nobody reads it.
    nothing: Option<Shared>,
}

/// What a step needs.
#[derive(Debug)]
pub(super) struct Room {
    pages: Table<Page>,
    table: Option<Table<Page>>,
    spares: Table<Shared>,
    spares_table: Option<Table<Shared>>,
    head: Option<Shared>,
    listing: Option<Block>,
}

/// Tiles whose rows are kept at once, at most: two until a step is committed, and the two before it.
const KEPT: usize = 4;

/// What a truncation needs.
#[derive(Debug, Default)]
pub(super) struct Spare {
    block: Option<Shared>,
    kept: Option<Shared>,
    head: Option<Shared>,
}

/// Tiles whose kept rows a sequence of `len` tokens has no more use for.
pub(super) fn released(len: usize, exact_tail: usize) -> usize {
    len.saturating_sub(exact_tail) / TILE
}

impl Layer {
    pub fn new(
        memory: &Arc<Memory>,
        (number, layout): (usize, Layout),
        exact_head: usize,
        exact_tail: usize,
    ) -> Result<Layer> {
        let (pages, listing) = (Table::with_capacity(memory, 0)?, Listing::default());
        let spares = Table::with_capacity(memory, 0)?;
        let (len, reserved, head, nothing) = (0, 0, None, None);
        Ok(Layer { number, layout, exact_head, exact_tail, len, pages, reserved, spares, head, listing, nothing })
    }

    /// Memory for a page.
    pub fn page(&self) -> Result<Shared> {
        Shared::new(self.pages.memory(), Kind::Page, self.layout.page_bytes())
    }

    /// Memory for the rows of a tile as given.
    pub fn kept(&self) -> Result<Shared> {
        Shared::new(self.pages.memory(), Kind::Kept, self.layout.kept_bytes(TILE))
    }

    /// Memory for the exact head.
    pub fn head_block(&self) -> Result<Shared> {
        Shared::new(self.pages.memory(), Kind::Kept, self.layout.kept_bytes(self.exact_head))
    }

    /// Takes what a step of `n` more tokens needs.
    pub fn room(&self, n: usize) -> Result<Room> {
        let kept = self.to_keep(n).filter(|&tile| tile < self.pages.len()).count();
        self.take(n, kept, |tile| self.to_keep(n).contains(&tile))
    }

    /// Takes what steps of `n` more tokens in all need.
    pub fn room_ahead(&self, n: usize) -> Result<Room> {
        let new = (self.len + n).div_ceil(TILE) - self.len.div_ceil(TILE);
        self.take(n, if self.layout.lossless() { 0 } else { new.min(KEPT) }, |_| false)
    }

    /// Tiles that are begun by `n` more tokens, and whose rows are kept when they have come.
    fn to_keep(&self, n: usize) -> Range<usize> {
        let (first, len) = (self.len.div_ceil(TILE), self.len + n);
        let end = if self.layout.lossless() { first } else { len.div_ceil(TILE) };
        released(len, self.exact_tail).clamp(first, end)..end
    }

    /// Pages for `n` more tokens, some with their rows kept, and spare room for `kept` others.
    fn take(&self, n: usize, kept: usize, keep: impl Fn(usize) -> bool) -> Result<Room> {
        let (first, tiles) = (self.pages.len(), (self.len + n).div_ceil(TILE));
        let n_pages = tiles.saturating_sub(first);
        let table = self.pages.room(n_pages)?;
        let mut pages = Table::with_capacity(self.pages.memory(), n_pages)?;
        for tile in first..first + n_pages {
            let kept = if keep(tile) { Some(self.kept()?) } else { None };
            pages.push(Page { block: self.page()?, kept, base: None });
        }
        let spares_table = if kept > 0 { self.spares.room(KEPT - self.spares.len())? } else { None };
        let kept = kept.saturating_sub(self.spares.len());
        let mut spares = Table::with_capacity(self.pages.memory(), kept)?;
        for _ in 0..kept {
            spares.push(self.kept()?);
        }
        let head = if self.exact_head > 0 && self.head.is_none() && n > 0 { Some(self.head_block()?) } else { None };
        let listing = self.listing.room(self.pages.memory(), first + n_pages)?;
        Ok(Room { pages, table, spares, spares_table, head, listing })
    }

    fn put(&mut self, mut room: Room) {
        self.pages.adopt(room.table);
        self.pages.append(&mut room.pages);
        self.spares.adopt(room.spares_table);
        self.spares.append(&mut room.spares);
        if room.head.is_some() {
            self.head = room.head;
        }
        self.listing.adopt(room.listing);
    }

    /// Makes the room for a step of `n` tokens the layer's.
    pub fn adopt(&mut self, n: usize, room: Room) {
        self.put(room);
        let tiles = self.to_keep(n);
        for page in &mut self.pages[tiles] {
            page.kept = page.kept.take().or_else(|| self.spares.pop());
        }
    }

    /// Keeps room for `n` tokens until they have come, or are given up.
    pub fn reserve(&mut self, room: Room) {
        self.put(room);
        self.reserved = self.pages.len();
    }

    /// Gives up what is reserved.
    pub fn unreserve(&mut self) {
        self.reserved = 0;
        self.spares.truncate(0);
    }

    /// A page that holds nothing.
    pub fn empty_page(&self) -> Result<Page> {
        let nothing = match &self.nothing {
            Some(nothing) => nothing.clone(),
            None => Shared::new(self.pages.memory(), Kind::Other, self.layout.page_bytes())?,
        };
        Ok(Page { block: nothing, kept: None, base: None })
    }

    /// Puts such a page in the place of tiles, and keeps it for others.
    pub fn empty(&mut self, tiles: Range<usize>, empty: &Page) {
        self.nothing = Some(empty.block.clone());
        for page in &mut self.pages[tiles] {
            *page = empty.clone();
        }
    }

    /// Adds a tile.
    pub fn add_page(&mut self, page: Page) -> Result<()> {
        let room = self.pages.room(1)?;
        self.pages.adopt(room);
        self.pages.push(page);
        Ok(())
    }

    /// Appends the first `n` rows, for which there is room.
    pub fn append(&mut self, k: Rows, v: Rows, n: usize) {
        let mut done = 0;
        while done < n {
            let (tile, from) = (self.len / TILE, self.len % TILE);
            let to = TILE.min(from + n - done);
            let Page { block, kept, base } = &mut self.pages[tile];
            // The tile's rows as if they all lay in the caller's memory; those below `from` are not touched.
            let shift = done.wrapping_sub(from);
            let (k, v) = (k.skip(shift), v.skip(shift));
            if let Some(kept) = kept {
                let kept = kept.own();
                for row in from..to {
                    self.layout.keep(kept, TILE, row, k.skip(row), v.skip(row));
                }
            }
            let mut skip = 0;
            if let (0, Some(head)) = (tile, &mut self.head) {
                skip = self.exact_head;
                for row in from..to.min(skip) {
                    self.layout.keep(head.own(), skip, row, k.skip(row), v.skip(row));
                }
            }
            let (k, v) = kept.as_ref().map_or((k, v), |kept| self.layout.kept(kept, TILE));
            let (base, base_rows) = base.as_ref().map_or((None, 0), |(base, rows)| (Some(&base[..]), *rows));
            self.layout.encode(block.own(), &Source { k, v, base, base_rows }, skip, from, to);
            done += to - from;
            self.len += to - from;
        }
    }

    /// Marks which of the last `n` tokens were no numbers: (row, head) of K and of V, in order, as the rows of the caller's
    /// memory from `row` on.
    pub fn mark(&mut self, n: usize, row: usize, bad: [&[(usize, usize)]; 2]) {
        let (mut token, end) = (self.len - n, self.len);
        while token < end {
            let (tile, from) = (token / TILE, token % TILE);
            let to = TILE.min(from + end - token);
            let page = self.pages[tile].block.own();
            let rows = row + token - (end - n);
            for (side, bad) in bad.iter().enumerate() {
                for head in 0..self.layout.shape.n_kv_heads {
                    self.layout.mark(page, head, side, range_bits(from, to), 0);
                }
                let first = bad.partition_point(|b| b.0 < rows);
                for &(row, head) in bad[first..].iter().take_while(|b| b.0 < rows + to - from) {
                    let token = 1 << (from + row - rows);
                    self.layout.mark(page, head, side, token, token);
                }
            }
            token += to - from;
        }
    }

    /// Drops rows of tiles that are kept for nothing: into the reserve, if there is one.
    pub fn release(&mut self) {
        let n = released(self.len, self.exact_tail);
        if self.reserved <= self.len.div_ceil(TILE) {
            self.unreserve();
        }
        for page in &mut self.pages[..n] {
            page.base = None;
            save(&mut self.spares, self.reserved, page.kept.take());
        }
    }

    /// The tile that is cut by a truncation to `len`, if one is.
    fn cut(&self, len: usize) -> Option<(usize, usize)> {
        (!len.is_multiple_of(TILE)).then_some((len / TILE, len % TILE))
    }

    pub fn skip(&self, tile: usize) -> usize {
        if tile == 0 { self.exact_head } else { 0 }
    }

    /// True if the cut tile's first rows are known only as they were encoded.
    fn known_by_page(&self, page: &Page, tile: usize, rows: usize) -> bool {
        !self.layout.lossless() && page.kept.is_none() && rows > self.skip(tile)
    }

    /// Takes what a truncation to `len` needs: nothing, if nothing has been shared or released since it had that many.
    pub fn spare(&self, len: usize) -> Result<Spare> {
        let mut spare = Spare::default();
        let Some((tile, rows)) = self.cut(len) else { return Ok(spare) };
        let page = &self.pages[tile];
        if !page.block.is_own() || self.known_by_page(page, tile, rows) {
            spare.block = Some(self.page()?);
        }
        if !self.layout.lossless() && !page.kept.as_ref().is_some_and(Shared::is_own) {
            spare.kept = Some(self.kept()?);
        }
        if len < self.exact_head && !self.head.as_ref().is_some_and(Shared::is_own) {
            spare.head = Some(self.head_block()?);
        }
        Ok(spare)
    }

    /// Forgets all but the first `len` tokens, and the room for more that is not reserved. What that does to rows on a device goes to `edits`.
    pub fn truncate(&mut self, len: usize, spare: Spare, edits: &mut Edits) {
        let is_cut = len < self.len;
        self.len = len;
        let tiles = len.div_ceil(TILE);
        self.pages.truncate(tiles.max(self.reserved));
        for page in &mut self.pages[tiles..] {
            save(&mut self.spares, self.reserved, page.kept.take());
        }
        self.listing.keep(len / TILE);
        if len == 0 && self.reserved == 0 {
            self.head = None;
        }
        replace(&mut self.head, spare.head, edits);
        let Some((tile, rows)) = self.cut(len) else { return };
        let skip = self.skip(tile);
        let known_by_page = self.known_by_page(&self.pages[tile], tile, rows);
        let page = &mut self.pages[tile];
        page.base = match page.base.take() {
            _ if rows <= skip => None,
            None if known_by_page => Some((page.block.clone(), rows)),
            base => base.map(|(base, base_rows)| (base, base_rows.min(rows))),
        };
        if let Some(mut block) = spare.block {
            edits.copy(&mut block, &page.block);
            page.block = block;
        }
        let is_new = page.kept.is_none();
        replace(&mut page.kept, spare.kept, edits);
        if let (true, 0, Some(kept), Some(head)) = (is_new, tile, &mut page.kept, &self.head) {
            // The exact head's rows are always among those that are kept of the first tile.
            let n = rows.min(skip);
            let from = self.layout.kept_stretches(self.exact_head, 0..n);
            for (from, to) in from.into_iter().zip(self.layout.kept_stretches(TILE, 0..n)) {
                edits.copy_part(kept, to.start, head, from);
            }
        }
        // A fork of all tokens has the page as it is.
        if is_cut {
            self.encode_kept(tile, rows, edits);
        }
    }

    /// Makes a tile's page that of its first `rows` rows: what its base knows, then those that are kept.
    pub fn encode_kept(&mut self, tile: usize, rows: usize, edits: &mut Edits) {
        let skip = self.skip(tile);
        let page = &mut self.pages[tile];
        let Some(kept) = &page.kept else { return };
        if edits.device().is_some() {
            if let Some((base, _)) = &page.base {
                let base = base.clone();
                edits.copy(&mut page.block, &base);
            }
            edits.encode(self, tile, rows);
            return;
        }

        let (block, (k, v)) = (page.block.own(), self.layout.kept(kept, TILE));
        let (base, base_rows) = page.base.as_ref().map_or((None, 0), |(base, rows)| (Some(&base[..]), *rows));
        if let Some(base) = base {
            // Marks are of all rows, as they are.
            let n = self.layout.rows_bytes();
            block[..n].copy_from_slice(&base[..n]);
            self.layout.reopen(block);
        }
        if base_rows < rows {
            self.layout.encode(block, &Source { k, v, base, base_rows }, skip, base_rows, rows);
        }
    }

    /// The same tokens in the memory of another cache. On the host.
    pub fn copy(
        &self,
        memory: &Arc<Memory>,
        stored: (usize, Layout),
        exact_tail: usize,
        positions: &Positions,
    ) -> Result<Layer> {
        let block = |block: &Shared, kind: Kind| {
            let mut copy = Shared::new(memory, kind, block.size())?;
            copy.own().copy_from_slice(block);
            Ok(copy)
        };
        let mut copy = Layer::new(memory, stored, self.exact_head, exact_tail)?;
        if let Some(head) = self.head.as_ref().filter(|_| self.len > 0) {
            copy.head = Some(block(head, Kind::Kept)?);
        }
        for (tile, page) in self.pages[..self.len.div_ceil(TILE)].iter().enumerate() {
            if positions.live(tile) == 0 {
                let empty = copy.empty_page()?;
                copy.empty(0..0, &empty);
                copy.add_page(empty)?;
                continue;
            }
            let kept = page.kept.as_ref().map(|kept| block(kept, Kind::Kept)).transpose()?;
            let base = page.base.as_ref().map(|(base, rows)| Ok((block(base, Kind::Page)?, *rows))).transpose()?;
            copy.add_page(Page { block: block(&page.block, Kind::Page)?, kept, base })?;
        }
        copy.len = self.len;
        copy.release();
        Ok(copy)
    }

    /// The first `len` tokens as another sequence's.
    pub fn fork(&self, len: usize, edits: &mut Edits) -> Result<Layer> {
        let mut pages = Table::with_capacity(self.pages.memory(), len.div_ceil(TILE))?;
        self.pages[..len.div_ceil(TILE)].iter().for_each(|page| pages.push(page.clone()));
        let (head, nothing) = (self.head.clone(), self.nothing.clone());
        let spares = Table::with_capacity(self.pages.memory(), 0)?;
        let mut fork = Layer { pages, reserved: 0, spares, head, listing: Listing::default(), nothing, ..*self };
        let spare = fork.spare(len)?;
        fork.truncate(len, spare, edits);
        Ok(fork)
    }
}

/// Puts rows that nobody else holds by for a later tile, if some are reserved.
fn save(spares: &mut Table<Shared>, reserved: usize, kept: Option<Shared>) {
    if let Some(kept) = kept.filter(Shared::is_own)
        && reserved > 0
        && spares.len() < KEPT
    {
        spares.push(kept);
    }
}

/// Puts a copy of what is there, if anything is, in its place.
fn replace(block: &mut Option<Shared>, spare: Option<Shared>, edits: &mut Edits) {
    if let Some(mut spare) = spare {
        if let Some(old) = block {
            edits.copy(&mut spare, old);
        }
        *block = Some(spare);
    }
}
