//! Scratch memory of a call, carved from one block. Sizes come from the same functions that carve, so they cannot
//! disagree.

use super::dense::Decoded;
use super::fold::Folded;
use crate::alignment::Sums;
use crate::format::{MAX_DIM, Shape, TILE};

/// Tiles of a split: what one piece of work covers. Splits start at multiples of this, so results do not depend on who
/// computes them.
pub const SPLIT: usize = 8;

/// Hands out aligned slices of a block, one after another. With a null start it only counts.
pub struct Arena {
    next: *mut u8,
    used: usize,
}

impl Arena {
    /// Counts only.
    pub fn counting() -> Arena {
        Arena { next: std::ptr::null_mut(), used: 0 }
    }

    /// # Safety
    /// `start` is aligned to 64 and followed by as many bytes as the same calls would count, writable, for `'a` of the
    /// slices taken, and used by nobody else but through slices of this arena.
    pub unsafe fn new(start: *mut u8) -> Arena {
        Arena { next: start, used: 0 }
    }

    /// Bytes handed out.
    pub fn used(&self) -> usize {
        self.used
    }

    /// `n` values of `T`, as they lie. `T` must be plain numbers: any bytes are valid.
    pub fn take<T: Plain>(&mut self, n: usize) -> *mut T {
        let p = self.next.cast::<T>();
        let bytes = (n * size_of::<T>()).next_multiple_of(64);
        if !self.next.is_null() {
            self.next = self.next.wrapping_add(bytes);
        }
        self.used += bytes;
        p
    }
}

/// Types for which any bytes are a value.
///
/// # Safety
/// Only plain numbers, arrays and structs of them, aligned to at most 64.
pub unsafe trait Plain: Copy {}
// SAFETY: plain numbers.
unsafe impl Plain for i8 {}
// SAFETY: plain numbers.
unsafe impl Plain for f32 {}
// SAFETY: plain numbers.
unsafe impl Plain for f64 {}
// SAFETY: plain numbers.
unsafe impl Plain for [f32; TILE] {}
// SAFETY: plain numbers.
unsafe impl Plain for [[f32; TILE]; 2] {}
// SAFETY: plain numbers.
unsafe impl Plain for [i32; TILE] {}
// SAFETY: plain numbers.
unsafe impl Plain for Sums {}
// SAFETY: plain numbers.
unsafe impl Plain for Partial {}
// SAFETY: plain numbers.
unsafe impl Plain for Scanned {}
// SAFETY: plain numbers.
unsafe impl Plain for Decoded {}

/// What the scan of a tile says of one query head.
#[derive(Debug, Clone, Copy)]
pub struct Scanned {
    /// Its q, with the tile's scales.
    pub folded: Folded,
    /// Largest score.
    pub max: f32,
    /// Largest V scale of the tokens seen.
    pub unit: f32,
    /// Sums over them of e, e * V scale, and the square of that, e relative to `max`.
    pub sums: [f64; 3],
}

impl Scanned {
    /// Of no tokens.
    pub const NONE: Scanned = Scanned { folded: Folded::NONE, max: f32::NEG_INFINITY, unit: 0.0, sums: [0.0; 3] };
}

/// What the scan of a split says of one query head.
#[derive(Debug, Clone, Copy)]
pub struct Partial {
    /// Largest score.
    pub max: f32,
    /// Sum of e.
    pub sum: f64,
    /// Sum of e * peak.
    pub weighted: f64,
}

/// Most query rows of a dense unit: a tile is decoded once for all of them.
pub fn dense_rows(group: usize) -> usize {
    (64 / group).clamp(1, 32)
}

/// Scratch of a thread.
pub struct ThreadScratch<'a> {
    /// `[rows * group][dim_k]`: q times the softmax scale.
    pub q: &'a mut [f32],
    /// `[group]` integer sums.
    pub integers: &'a mut [[i32; TILE]],
    /// `[group]` weights.
    pub e: &'a mut [[f32; TILE]],
    /// Per tile of a split: planes of K and of V that each token reads.
    pub planes: &'a mut [[[f32; TILE]; 2]],
    /// `[dim_v]`: a tile's mean of V.
    pub mean: &'a mut [f32],
    /// One decoded tile.
    pub tile: &'a mut Decoded,
    /// `[group][dim_v]`: output of one tile.
    pub tile_out: &'a mut [f32],
    /// `[rows * group]`: a unit's totals.
    pub total: &'a mut [Sums],
    /// `[rows * group][dim_v]`.
    pub total_out: &'a mut [f64],
}

/// Scratch of a unit; shared by the threads that work on its splits. Every split touches its own part.
#[derive(Clone, Copy)]
pub struct UnitScratch {
    /// `[tile][group]` scores.
    pub scores: *mut [f32; TILE],
    /// `[tile][group]`.
    pub scanned: *mut Scanned,
    /// `[tile][group][2][dim_k]`: digits of rounded q.
    pub digits: *mut i8,
    /// `[split][group]`.
    pub partials: *mut Partial,
    /// `[split][rows * group]`.
    pub sums: *mut Sums,
    /// `[split][rows * group][dim_v]`.
    pub outs: *mut f32,
}

/// Splits of a unit that sees tokens up to `max_kv`.
pub fn max_splits(max_kv: usize) -> usize {
    max_kv.div_ceil(SPLIT * TILE).max(1)
}

impl UnitScratch {
    /// Carves it. One more tile than there are: the exact rows'.
    pub fn carve(arena: &mut Arena, shape: &Shape, max_kv: usize) -> UnitScratch {
        let (g, splits) = (shape.group(), max_splits(max_kv));
        // What the scan leaves for the second phase: the dense path, which such shapes always take, has one only.
        let tiles = if shape.v_is_prefix { 0 } else { splits * SPLIT + 1 };
        let rows = dense_rows(g) * g;
        UnitScratch {
            scores: arena.take(tiles * g),
            scanned: arena.take(tiles * g),
            digits: arena.take(tiles * g * 2 * shape.dim_k),
            partials: arena.take(splits * g),
            sums: arena.take(splits * rows),
            outs: arena.take(splits * rows * shape.dim_v),
        }
    }
}

impl<'a> ThreadScratch<'a> {
    /// Carves it.
    ///
    /// # Safety
    /// The arena's contract, and a real arena (not a counting one) of which this is the only user.
    pub unsafe fn carve(arena: &mut Arena, shape: &Shape) -> ThreadScratch<'a> {
        let n = ThreadSizes::new(shape);
        // SAFETY: the arena hands out disjoint memory of these sizes, in which any bytes are values.
        unsafe {
            ThreadScratch {
                q: slice(arena, n.q),
                integers: slice(arena, n.group),
                e: slice(arena, n.group),
                planes: slice(arena, SPLIT),
                mean: slice(arena, MAX_DIM),
                tile: &mut *arena.take::<Decoded>(1),
                tile_out: slice(arena, n.tile_out),
                total: slice(arena, n.rows),
                total_out: slice(arena, n.total_out),
            }
        }
    }

    /// Bytes that [`ThreadScratch::carve`] takes.
    pub fn bytes(shape: &Shape) -> usize {
        let (n, mut a) = (ThreadSizes::new(shape), Arena::counting());
        a.take::<f32>(n.q);
        a.take::<[i32; TILE]>(n.group);
        a.take::<[f32; TILE]>(n.group);
        a.take::<[[f32; TILE]; 2]>(SPLIT);
        a.take::<f32>(MAX_DIM);
        a.take::<Decoded>(1);
        a.take::<f32>(n.tile_out);
        a.take::<Sums>(n.rows);
        a.take::<f64>(n.total_out);
        a.used()
    }
}

struct ThreadSizes {
    group: usize,
    rows: usize,
    q: usize,
    tile_out: usize,
    total_out: usize,
}

impl ThreadSizes {
    fn new(s: &Shape) -> ThreadSizes {
        let group = s.group();
        let rows = dense_rows(group) * group;
        ThreadSizes { group, rows, q: rows * s.dim_k, tile_out: group * s.dim_v, total_out: rows * s.dim_v }
    }
}

/// # Safety
/// As [`ThreadScratch::carve`].
unsafe fn slice<'a, T: Plain>(arena: &mut Arena, n: usize) -> &'a mut [T] {
    // SAFETY: the arena's contract.
    unsafe { std::slice::from_raw_parts_mut(arena.take::<T>(n), n) }
}
