//! Pieces of work: a unit is some query rows of one sequence on one KV head, a split a stretch of its context.

use super::math::{self, Lane128};
use super::refine::Refine;
use super::scan::Scan;
use super::simd::Simd;
use super::workspace::{Partial, SPLIT, Scanned, ThreadScratch, UnitScratch, dense_rows};
use crate::alignment::{Share, Sums};
use crate::backend::{Attention, Mode, QueryRow, Stats, TREE};
use crate::cache::SequenceView;
use crate::capi::types::{AKV_PATH_DENSE, AKV_PATH_PROGRESSIVE, AKV_PATH_PUBLISHED};
use crate::format::aligned::Meta;
use crate::format::{Format, MAX_GROUP, TILE, range_bits};
use crate::{Error, Result};
use half::slice::HalfFloatSliceExt;

/// How a unit is computed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Path {
    Progressive,
    Dense,
    Published,
}

/// Query rows `row..row + n_rows` (1 unless dense) on one KV head.
#[derive(Debug, Clone, Copy)]
pub struct Unit {
    pub path: Path,
    pub row: usize,
    pub n_rows: usize,
    pub kv_head: usize,
    /// Tokens that any of its rows sees: `from..to`, and some below `head`.
    pub from: usize,
    pub to: usize,
    pub head: usize,
}

impl Unit {
    /// All units of a call, in a fixed order.
    pub fn list(call: &Attention) -> Result<Vec<Unit>> {
        let shape = call.shape;
        let mut units = Vec::new();
        let most = call.rows.len() * shape.n_kv_heads;
        units.try_reserve_exact(most).map_err(|_| Error::Memory(format!("a list of {most} units")))?;
        let mut row = 0;
        while row < call.rows.len() {
            let first = call.rows[row];
            let format = call.sequences[first.sequence].layout.format;
            let path = match format {
                _ if first.dense || call.mode == Mode::Exact || shape.v_is_prefix => Path::Dense,
                Format::Aligned => Path::Progressive,
                Format::Published => Path::Published,
                Format::Raw => Path::Dense,
            };
            let mut n_rows = 1;
            if path == Path::Dense {
                let alike = |r: &&QueryRow| r.sequence == first.sequence && r.dense == first.dense;
                n_rows = call.rows[row..].iter().take(dense_rows(shape.group())).take_while(alike).count();
            }
            let (mut from, mut to, mut head) = (usize::MAX, 0, 0);
            for r in &call.rows[row..row + n_rows] {
                if r.from < r.to {
                    (from, to) = (from.min(r.from), to.max(r.to));
                }
                if r.head.0 < r.head.1 {
                    head = head.max(r.head.1);
                }
            }
            let to = to.max(head);
            for kv_head in 0..shape.n_kv_heads {
                units.push(Unit { path, row, n_rows, kv_head, from: from.min(to), to, head });
            }
            row += n_rows;
        }
        Ok(units)
    }

    /// Splits: absolute stretches of tiles, but for those that it does not see. The first is always among them (it has the
    /// exact rows). The published scheme decides over the whole context at once: it has one.
    pub fn n_splits(&self) -> usize {
        match self.path {
            Path::Published => 1,
            _ => self.to.div_ceil(SPLIT * TILE).max(1) - self.unseen().1,
        }
    }

    /// Splits of its head, and how many are not seen between them and the rest.
    fn unseen(&self) -> (usize, usize) {
        let head = self.head.div_ceil(SPLIT * TILE).max(1);
        (head, (self.from / (SPLIT * TILE)).saturating_sub(head))
    }

    /// Tiles `first..last` of a split that the unit sees.
    pub fn tiles(&self, split: usize) -> (usize, usize) {
        let (head, unseen) = self.unseen();
        let start = (if split < head { split } else { split + unseen }) * SPLIT;
        let first = if start * TILE < self.head { start } else { start.max(self.from / TILE) };
        let last = (start + SPLIT).min(self.to.div_ceil(TILE));
        (first, last.max(first))
    }

    /// Its rows that see a token which was no number, as bits.
    pub fn lost(&self, call: &Attention) -> u64 {
        let view = &call.sequences[call.rows[self.row].sequence];
        if !view.layout.marked() {
            return 0;
        }
        let mut lost = 0;
        for tile in self.first() / TILE..self.to.div_ceil(TILE) {
            let marks = view.marks(tile, self.kv_head);
            if marks != 0 {
                for i in 0..self.n_rows {
                    lost |= u64::from(marks & seen(call, self.row + i, view, tile) != 0) << i;
                }
            }
        }
        lost
    }

    /// The first token that any of its rows may see.
    pub fn first(&self) -> usize {
        if self.head > 0 { 0 } else { self.from }
    }
}

/// Tokens of a tile that a query row sees.
#[inline(always)]
pub fn seen(call: &Attention, row: usize, view: &SequenceView, tile: usize) -> u128 {
    let (start, r) = (tile * TILE, &call.rows[row]);
    let part = |from: usize, to: usize| {
        let from = from.clamp(start, start + TILE) - start;
        range_bits(from, to.clamp(start + from, start + TILE) - start)
    };
    let mut bits = part(r.from, r.to) & view.written(tile);
    if r.head.1 > start {
        bits |= part(r.head.0, r.head.1) & view.written(tile);
    }
    if r.hidden != 0 {
        bits &= !hidden(r, view.len, tile);
    }
    call.mask.map_or(bits, |mask| bits & mask.seen(row, tile))
}

/// Tokens of a tile that a row of a tree does not see.
#[inline(always)]
fn hidden(row: &QueryRow, len: usize, tile: usize) -> u128 {
    // From the tile's first token to that of the lowest bit.
    let at = len as isize - TREE as isize - (tile * TILE) as isize;
    let bits = u128::from(row.hidden);
    match at {
        0.. => u32::try_from(at).ok().and_then(|at| bits.checked_shl(at)).unwrap_or(0),
        _ => u32::try_from(-at).ok().and_then(|at| bits.checked_shr(at)).unwrap_or(0),
    }
}

/// Those of them that attend through the exact rows. (At most a tile's worth.)
#[inline(always)]
pub fn seen_exact(call: &Attention, row: usize, view: &SequenceView) -> u128 {
    if view.n_exact == 0 { 0 } else { seen(call, row, view, 0) & range_bits(0, view.n_exact) }
}

/// Those that attend through a page.
#[inline(always)]
pub fn seen_paged(call: &Attention, row: usize, view: &SequenceView, tile: usize) -> u128 {
    let seen = seen(call, row, view, tile);
    if tile == 0 { seen & !range_bits(0, view.n_exact) } else { seen }
}

/// What the softmax of a query row and head sees of a tile: scores, capped and with what the mask or the distance adds.
/// `bent` is where they go if that changes anything.
#[inline(always)]
pub fn logits<'s, S: Simd>(
    call: &Attention,
    row: usize,
    head: usize,
    tile: usize,
    scores: &'s Lane128,
    bent: &'s mut Lane128,
) -> &'s Lane128 {
    let added = call.mask.and_then(|mask| mask.added(row, tile));
    if call.softcap == 0.0 && added.is_none() && call.positions.is_none() {
        return scores;
    }
    let mut bias = [0.0; TILE];
    if let Some((added, _)) = added {
        added.convert_to_f32_slice(&mut bias);
    } else if let Some(positions) = call.positions {
        let r = &call.rows[row];
        positions[r.sequence].distances(tile * TILE, r.position, &mut bias);
    }
    if let Some(slopes) = call.slopes {
        for x in &mut bias {
            *x *= slopes[head];
        }
    }
    math::bend::<S>(scores, call.softcap, &bias, bent);
    bent
}

/// Largest magnitude that the mask or the distance adds to scores of a tile, before slopes.
#[inline(always)]
fn added_peak(call: &Attention, row: usize, tile: usize) -> f32 {
    if let Some(positions) = call.positions {
        // Positions never descend.
        let (r, mut ends) = (&call.rows[row], [0.0; 2]);
        positions[r.sequence].distances(tile * TILE, r.position, &mut ends[..1]);
        positions[r.sequence].distances((tile + 1) * TILE - 1, r.position, &mut ends[1..]);
        return ends[0].abs().max(ends[1].abs());
    }
    call.mask.and_then(|mask| mask.added(row, tile)).map_or(0.0, |(_, peak)| peak)
}

/// What [`logits`] adds to the error of a score that is at most `reach`.
#[inline(always)]
pub fn bend_error(call: &Attention, row: usize, head: usize, tile: usize, reach: f32) -> f32 {
    let mut error = call.softcap * math::CAP_ROUNDING;
    let peak = added_peak(call, row, tile);
    if peak > 0.0 {
        let slope = call.slopes.map_or(1.0, |slopes| slopes[head]);
        // Half a unit in the last place of the distance, of the product, and of the sum. Infinite, if the product is.
        error += f32::EPSILON * (2.0 * (peak * slope).abs() + reach);
    }
    error
}

/// True of scores that have left binary32.
#[inline(always)]
pub fn overflows(bound: f32, max: f32) -> bool {
    !bound.is_finite() || max == f32::INFINITY
}

/// What the heads of a unit may leave out, from the scans of all its splits.
#[derive(Debug, Clone, Copy)]
pub struct Shares {
    /// Row and KV head of the unit.
    pub of: Option<(usize, usize)>,
    /// Per head, the scan's maximum and the share.
    pub heads: [Option<(f32, Share)>; MAX_GROUP],
}

impl Shares {
    pub const NONE: Shares = Shares { of: None, heads: [None; MAX_GROUP] };
}

/// A thread at work on a unit.
pub struct Worker<'a> {
    pub call: &'a Attention<'a>,
    pub scan: Scan,
    pub refine: Refine,
    pub scratch: ThreadScratch<'a>,
    pub unit: UnitScratch,
    pub stats: Stats,
    pub shares: Shares,
    /// Set if scores left binary32.
    pub overflow: bool,
}

impl<'a> Worker<'a> {
    /// Fetches the unit's q, times the softmax scale.
    #[inline(always)]
    pub fn load_q(&mut self, unit: &Unit) {
        let (g, d) = (self.call.shape.group(), self.call.shape.dim_k);
        for at in 0..unit.n_rows * g {
            let q = &mut self.scratch.q[at * d..(at + 1) * d];
            self.call.q.read(unit.row + at / g, unit.kv_head * g + at % g, q);
            for x in q {
                *x *= self.call.scale;
            }
        }
    }

    /// Notes scores that have left binary32.
    #[inline(always)]
    pub fn check(&mut self, bound: f32, max: f32) {
        self.overflow |= overflows(bound, max);
    }

    /// Sums and outputs of a split.
    #[inline(always)]
    pub fn state(&self, unit: &Unit, split: usize) -> (&'a mut [Sums], &'a mut [f32]) {
        let n = unit.n_rows * self.call.shape.group();
        let dv = self.call.shape.dim_v;
        // SAFETY: the unit's scratch has room for every split, and a split is at work in one thread at a time: whoever
        // merges comes after a barrier.
        unsafe {
            (
                std::slice::from_raw_parts_mut(self.unit.sums.add(split * n), n),
                std::slice::from_raw_parts_mut(self.unit.outs.add(split * n * dv), n * dv),
            )
        }
    }

    /// What the scan says of a split, to be written by the scan alone.
    #[inline(always)]
    pub fn partials_mut(&self, split: usize) -> &'a mut [Partial] {
        let g = self.call.shape.group();
        // SAFETY: as in `state`.
        unsafe { std::slice::from_raw_parts_mut(self.unit.partials.add(split * g), g) }
    }

    /// The same, of any split, once the whole unit is scanned.
    #[inline(always)]
    pub fn partials(&self, split: usize) -> &'a [Partial] {
        let g = self.call.shape.group();
        // SAFETY: nobody writes after the barrier that ends the scan.
        unsafe { std::slice::from_raw_parts(self.unit.partials.add(split * g), g) }
    }

    /// Scores of a tile; index 0 is that of the exact rows, page t has index t + 1.
    #[inline(always)]
    pub fn scores(&self, index: usize) -> &'a mut [Lane128] {
        let g = self.call.shape.group();
        // SAFETY: as in `state`: a tile belongs to one split.
        unsafe { std::slice::from_raw_parts_mut(self.unit.scores.add(index * g), g) }
    }

    /// Digits of rounded q, by the same indices.
    #[inline(always)]
    pub fn digits(&self, index: usize) -> &'a mut [i8] {
        let n = self.call.shape.group() * 2 * self.call.shape.dim_k;
        // SAFETY: as in `state`: a tile belongs to one split.
        unsafe { std::slice::from_raw_parts_mut(self.unit.digits.add(index * n), n) }
    }

    /// What the scan says of a tile, by the same indices.
    #[inline(always)]
    pub fn scanned(&self, index: usize) -> &'a mut [Scanned] {
        let g = self.call.shape.group();
        // SAFETY: as in `state`: a tile belongs to one split.
        unsafe { std::slice::from_raw_parts_mut(self.unit.scanned.add(index * g), g) }
    }
}

impl Stats {
    /// `n` tokens of a tile, all of whose stored digits were read.
    pub fn count_dense(&mut self, view: &SequenceView, exact: bool, n: usize) {
        let (s, n64) = (&view.layout.shape, n as u64);
        self.tokens += n64;
        let (dk, dv) = (s.dim_k as u64, s.stored_v() as u64);
        if exact || view.layout.format != Format::Aligned || view.attached.is_some() {
            let (k, v) = (n64 * dk * s.dtype_k.size() as u64, n64 * dv * s.dtype_v.size() as u64);
            self.bytes_k += k;
            self.bytes_v += v;
            if exact {
                self.bytes_exact += k + v;
            }
        } else {
            self.count_scales(view, n);
            self.bytes_k += n64 * s.planes_k as u64 * dk / 2;
            self.bytes_v += n64 * s.planes_v as u64 * dv / 2;
            self.planes_k[s.planes_k] += n64;
            self.planes_v[s.planes_v] += n64;
        }
    }

    /// Scale bytes of a tile of which `n` tokens are seen.
    pub fn count_scales(&mut self, view: &SequenceView, n: usize) {
        // The tile's meta data go with K's scales.
        let shape = &view.layout.shape;
        let (k, v) = ((shape.dim_k + Meta::BYTES) as u64, if shape.v_is_prefix { 0 } else { n as u64 });
        self.bytes_k += k;
        self.bytes_v += v;
        self.bytes_scales += k + v;
    }

    /// A unit that was merged.
    pub fn count_unit(&mut self, unit: &Unit) {
        self.path |= match unit.path {
            Path::Progressive => AKV_PATH_PROGRESSIVE,
            Path::Dense => AKV_PATH_DENSE,
            Path::Published => AKV_PATH_PUBLISHED,
        };
        if unit.path == Path::Dense && unit.kv_head == 0 {
            self.dense_rows += unit.n_rows as u64;
        }
    }

    /// Adds another thread's.
    pub fn add(&mut self, other: &Stats) {
        self.bytes_k += other.bytes_k;
        self.bytes_v += other.bytes_v;
        self.bytes_scales += other.bytes_scales;
        self.bytes_exact += other.bytes_exact;
        for (a, b) in self.planes_k.iter_mut().zip(other.planes_k) {
            *a += b;
        }
        for (a, b) in self.planes_v.iter_mut().zip(other.planes_v) {
            *a += b;
        }
        self.tokens += other.tokens;
        self.dense_rows += other.dense_rows;
        self.path |= other.path;
    }
}
