//! Shared access to rows.

use super::Positions;
use super::layer::{Layer, Page};
use super::slots::SlotTile;
use crate::format::{Layout, Rows, TILE};
use parking_lot::RawRwLock;
use parking_lot::lock_api::ArcRwLockReadGuard;

pub(super) type ReadGuard<T> = ArcRwLockReadGuard<RawRwLock, T>;

/// Shared access to one layer of one sequence; rows cannot change while it lives.
#[derive(Debug)]
pub struct Reader {
    pub(super) layer: ReadGuard<Layer>,
    pub(super) positions: ReadGuard<Positions>,
    /// Of the layer that reads them.
    pub(super) layout: Layout,
}

impl Reader {
    /// Positions of its tokens.
    pub fn positions(&self) -> &Positions {
        &self.positions
    }

    /// Its tokens.
    pub fn n_tokens(&self) -> usize {
        self.layer.len
    }

    /// What attention reads, on the host.
    pub fn view(&self) -> SequenceView<'_> {
        let layer = &*self.layer;
        let n_exact = layer.exact_head.min(layer.len);
        let exact = layer.head.as_ref().filter(|_| n_exact > 0);
        SequenceView {
            layout: &self.layout,
            len: layer.len,
            n_exact,
            exact: exact.map(|head| layer.layout.kept(head, layer.exact_head)),
            pages: Pages::Sequence(&layer.pages[..layer.len.div_ceil(TILE)], &self.positions),
            attached: None,
        }
    }
}

/// One layer of one sequence or stream, as attention reads it. Tokens go by index, 0 to len - 1.
#[derive(Clone, Copy)]
#[allow(missing_docs)]
pub struct SequenceView<'a> {
    pub layout: &'a Layout,
    pub len: usize,
    /// The first `n_exact` (at most `len`) tokens attend through these rows instead of through page 0.
    pub n_exact: usize,
    pub exact: Option<(Rows<'a>, Rows<'a>)>,
    /// Rows that the engine keeps: the pages are an index beside them.
    pub attached: Option<(Rows<'a>, Rows<'a>)>,
    pub(super) pages: Pages<'a>,
}

/// Where the pages are.
#[derive(Clone, Copy)]
pub(super) enum Pages<'a> {
    Sequence(&'a [Page], &'a Positions),
    Slots(&'a [SlotTile]),
}

impl<'a> SequenceView<'a> {
    /// The page of tokens `tile * TILE ..`.
    #[inline(always)]
    pub fn page(&self, tile: usize) -> &'a [u8] {
        match self.pages {
            Pages::Sequence(pages, _) => &pages[tile].block,
            Pages::Slots(tiles) => &tiles[tile].page,
        }
    }

    /// Tokens of a tile whose K or V was no number on a KV head; among those that have rows.
    #[inline(always)]
    pub fn marks(&self, tile: usize, kv_head: usize) -> u128 {
        let marks = |side: usize| self.layout.marks(self.page(tile), kv_head, side);
        if self.layout.marked() { marks(0) | marks(1) } else { 0 }
    }

    /// Tokens of a tile that have rows: those of a sequence that have not been removed.
    #[inline(always)]
    pub fn written(&self, tile: usize) -> u128 {
        match self.pages {
            Pages::Sequence(_, positions) => positions.live(tile),
            Pages::Slots(tiles) => tiles[tile].written(),
        }
    }
}
