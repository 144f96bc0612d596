//! Progressive attention of one query row on one KV head: scan plane 0 of K, align, refine, sum.

use super::fold::{Folded, fold, score_rounding};
use super::math::{self, Lane128};
use super::simd::Simd;
use super::unit::{Unit, Worker, bend_error, logits, seen_exact, seen_paged};
use super::workspace::{Partial, SPLIT, Scanned};
use crate::alignment::{Mixed, ScoreError, Share, Sums, TileError, value_square};
use crate::backend::Attention;
use crate::cache::SequenceView;
use crate::format::aligned::{LANES, Tile};
use crate::format::{Bits, CENTRE, LEFT, MAX_DIM, PEAK, PLANES, Rows, TILE};

/// Tokens that the row sees through the exact rows in this split.
fn exact_tokens(call: &Attention, unit: &Unit, view: &SequenceView, split: usize) -> u128 {
    if split == 0 { seen_exact(call, unit.row, view) } else { 0 }
}

#[inline(always)]
fn v_units<S: Simd>(tile: &Tile) -> Lane128 {
    let mut units = [0.0; TILE];
    for (unit, u) in math::blocks_mut(&mut units).iter_mut().zip(tile.v_scales.as_chunks().0) {
        S::scales(u).store(unit);
    }
    units
}

/// First phase of a split: scores of all its tokens, and the sums that everything is decided from.
#[inline(always)]
pub fn scan<S: Simd>(w: &mut Worker, unit: &Unit, split: usize) {
    let (call, shape) = (w.call, w.call.shape);
    let (g, d) = (shape.group(), shape.dim_k);
    let view = &call.sequences[call.rows[unit.row].sequence];
    let (first, last) = unit.tiles(split);
    w.load_q(unit);

    let exact = exact_tokens(call, unit, view, split);
    if exact != 0 {
        scan_exact::<S>(w, unit, view, exact);
    }
    let part = |tile: usize| view.layout.part(view.page(tile), unit.kv_head);
    for tile in first..last {
        let seen = seen_paged(call, unit.row, view, tile);
        if seen == 0 {
            w.scanned(tile + 1).fill(Scanned::NONE);
            continue;
        }
        let t = Tile::new(shape, part(tile));
        let next = Tile::new(shape, part(if tile + 1 < last { tile + 1 } else { tile }));
        ask(next.k_scales);
        ask(next.v_scales);
        let (scanned, digits) = (w.scanned(tile + 1), w.digits(tile + 1));
        for (h, digits) in digits.chunks_exact_mut(2 * d).enumerate() {
            let q = &w.scratch.q[h * d..(h + 1) * d];
            scanned[h].folded = fold::<S>(q, t.k_scales, &t.meta, digits);
        }
        let n_blocks = (TILE - seen.leading_zeros() as usize).div_ceil(LANES);
        // SAFETY: the worker's scan is that of an instruction set that this machine has.
        unsafe { (w.scan)(t.k0, next.k0, digits, d / 2, n_blocks, &mut w.scratch.integers[..g]) };
        let units = v_units::<S>(&t);
        let unit_max = if seen == u128::MAX { math::max::<S>(&units) } else { math::max_of::<S>(&units, seen) };
        let scores = w.scores(tile + 1);
        for (h, scanned) in scanned.iter().enumerate() {
            scanned.folded.scores::<S>(&w.scratch.integers[h], &mut scores[h]);
            math::hide::<S>(&mut scores[h], seen);
        }
        // Another loop, so that several heads are under way at once.
        for (h, scanned) in scanned.iter_mut().enumerate() {
            let mut folded = scanned.folded;
            let reach = folded.error.worst * PEAK;
            folded.error.bend = bend_error(call, unit.row, unit.kv_head * g + h, tile, reach);
            *scanned = Scanned { folded, ..weigh::<S>(call, unit, h, tile, &scores[h], &units, unit_max) };
            w.check(reach + folded.error.bend, scanned.max);
        }
    }

    let partials = w.partials_mut(split);
    for (h, partial) in partials.iter_mut().enumerate() {
        let tiles = (if exact != 0 { 0..1 } else { 0..0 }).chain(first + 1..last + 1);
        let mut max = [f32::NEG_INFINITY; LANES];
        for (max, tile) in max.iter_mut().zip(tiles.clone()) {
            *max = w.scanned(tile)[h].max;
        }
        let most = S::load(&max).most();
        let factors = math::factors::<S>(&max, most);
        *partial = Partial { max: most, sum: 0.0, weighted: 0.0 };
        for (factor, tile) in factors.into_iter().zip(tiles) {
            let [sum, weighted, _] = w.scanned(tile)[h].sums;
            partial.sum += f64::from(factor) * sum;
            partial.weighted += f64::from(factor) * weighted * f64::from(PEAK);
        }
    }
}

/// The scan of the rows that are kept as given: their scores are final.
#[inline(always)]
fn scan_exact<S: Simd>(w: &mut Worker, unit: &Unit, view: &SequenceView, seen: u128) {
    let Some((k, v)) = view.exact else { return };
    let (call, g, d) = (w.call, w.call.shape.group(), w.call.shape.dim_k);
    let (scores, scanned) = (w.scores(0), w.scanned(0));
    let (mut row, mut peak) = ([0.0f32; MAX_DIM], [0.0f32; MAX_DIM]);
    let (row, peak) = (&mut row[..d], &mut peak[..d]);
    for i in Bits(seen) {
        k.read(i, unit.kv_head, row);
        for (peak, x) in peak.iter_mut().zip(row.iter()) {
            *peak = if x.abs() > *peak { x.abs() } else { *peak };
        }
        for h in 0..g {
            scores[h][i] = math::dot::<S>(&w.scratch.q[h * d..(h + 1) * d], row);
        }
    }
    let units = exact_units(&v, unit, seen, &mut [0.0; MAX_DIM][..call.shape.dim_v]);
    for (h, scanned) in scanned.iter_mut().enumerate() {
        math::hide::<S>(&mut scores[h], seen);
        let q = &mut row[..];
        q.copy_from_slice(&w.scratch.q[h * d..(h + 1) * d]);
        for x in q.iter_mut() {
            *x = x.abs();
        }
        // If scores overflow, so does this.
        let reach = math::dot::<S>(q, peak) * (1.0 + 1e-5);
        let bend = bend_error(call, unit.row, unit.kv_head * g + h, 0, reach);
        let error = TileError { worst: reach * (1.0 / PEAK), slack: score_rounding(d), bend, ..TileError::NONE };
        let folded = Folded { error, ..Folded::NONE };
        *scanned = Scanned { folded, ..weigh::<S>(call, unit, h, 0, &scores[h], &units, 0.0) };
        w.check(reach + bend, scanned.max);
    }
}

/// Largest magnitude of V of rows as given, as if in units of a scale.
#[inline(always)]
fn exact_units(v: &Rows, unit: &Unit, seen: u128, row: &mut [f32]) -> Lane128 {
    let mut units = [0.0; TILE];
    for i in Bits(seen) {
        v.read(i, unit.kv_head, row);
        units[i] = row.iter().fold(0.0f32, |m, x| if x.abs() > m { x.abs() } else { m }) * (1.0 / PEAK);
    }
    units
}

/// Adds the rows that are kept as given to sums and outputs.
#[inline(always)]
fn sum_exact<S: Simd>(
    w: &mut Worker,
    unit: &Unit,
    view: &SequenceView,
    seen: u128,
    sums: &mut [Sums],
    outs: &mut [f32],
) {
    let Some((_, v)) = view.exact else { return };
    let (call, g, dv) = (w.call, w.call.shape.group(), w.call.shape.dim_v);
    let mut row = [0.0f32; MAX_DIM];
    let row = &mut row[..dv];
    let units = exact_units(&v, unit, seen, row);
    let (scores, scanned, mut bent) = (w.scores(0), w.scanned(0), [0.0; TILE]);
    for (h, sums) in sums.iter_mut().enumerate() {
        let (e, head) = (&mut w.scratch.e[h], unit.kv_head * g + h);
        math::weights::<S>(logits::<S>(call, unit.row, head, 0, &scores[h], &mut bent), sums.max, e);
        sums.add_scores(scanned[h].folded.error.of_rows(), math::sums::<S>(e, &units));
        sums.note(seen.count_ones() as usize, math::max_of::<S>(&units, seen) * PEAK);
    }
    for i in Bits(seen) {
        v.read(i, unit.kv_head, row);
        for (e, out) in w.scratch.e.iter().zip(outs.chunks_exact_mut(dv)) {
            math::axpy::<S>(e[i], row, out);
        }
    }
}

/// A tile's weights, as the scan has its scores.
#[inline(always)]
fn weigh<S: Simd>(
    call: &Attention,
    unit: &Unit,
    h: usize,
    tile: usize,
    scores: &Lane128,
    units: &Lane128,
    unit_max: f32,
) -> Scanned {
    let (mut bent, mut e) = ([0.0; TILE], [0.0; TILE]);
    let head = unit.kv_head * call.shape.group() + h;
    let logits = logits::<S>(call, unit.row, head, tile, scores, &mut bent);
    let max = math::max::<S>(logits);
    math::weights::<S>(logits, max, &mut e);
    Scanned { max, unit: unit_max, sums: math::sums::<S>(&e, units), ..Scanned::NONE }
}

/// How many of the limits each lane exceeds.
#[inline(always)]
fn exceeded<S: Simd>(x: S, limits: &[f32]) -> S {
    let mut n = S::splat(0.0);
    for &limit in limits {
        n = n.add(S::splat(1.0).where_above(x, S::splat(limit)));
    }
    n
}

/// One query head's view of the whole context, from all splits' scans, and what its share of the error is.
#[inline(always)]
fn share(w: &Worker, unit: &Unit, h: usize) -> (f32, Share) {
    let partials = || (0..unit.n_splits()).map(|split| &w.partials(split)[h]);
    let sink = w.call.sinks.map(|sinks| sinks[unit.kv_head * w.call.shape.group() + h]);
    let max = partials().fold(sink.unwrap_or(f32::NEG_INFINITY), |m, p| m.max(p.max));
    let (mut sum, mut weighted) = (sink.map_or(0.0, |s| (f64::from(s) - f64::from(max)).exp()), 0.0);
    for p in partials().filter(|p| p.max > f32::NEG_INFINITY) {
        let factor = (f64::from(p.max) - f64::from(max)).exp();
        sum += factor * p.sum;
        weighted += factor * p.weighted;
    }
    (max, Share::new(w.call.mode, w.call.tolerance, w.call.rows[unit.row].n, sum, weighted))
}

/// Which tokens of a tile read how many planes.
#[derive(Clone, Copy)]
struct Reads {
    /// `k[p]`: those that read p planes of K.
    k: [u128; PLANES + 1],
    /// The same of V.
    v: [u128; PLANES + 1],
}

impl Reads {
    /// Plane 0 of K, as the scan has it.
    const SCANNED: Reads = Reads { k: [0, u128::MAX, 0, 0, 0], v: [u128::MAX, 0, 0, 0, 0] };

    /// True if no token reads more than the scan.
    fn is_scanned(&self) -> bool {
        self.k[1] == u128::MAX && self.v[0] == u128::MAX
    }

    /// Tokens that read more of K than the scan.
    fn more_k(&self) -> u128 {
        !self.k[1]
    }

    /// Tokens that read any of V.
    fn some_v(&self) -> u128 {
        !self.v[0]
    }
}

/// Weight of the last of `1 + digits` digits.
const WEIGHT: [f32; PLANES] = [1.0, 1.0 / 16.0, 1.0 / 256.0, 1.0 / 4096.0];

/// Second phase of a split: who is read how finely, and what comes of it.
#[inline(always)]
pub fn refine<S: Simd>(w: &mut Worker, unit: &Unit, split: usize) {
    let g = w.call.shape.group();
    let view = &w.call.sequences[w.call.rows[unit.row].sequence];
    let (first, last) = unit.tiles(split);
    w.load_q(unit);

    let of = Some((unit.row, unit.kv_head));
    if w.shares.of != of {
        w.shares.of = of;
        for h in 0..g {
            w.shares.heads[h] = Some(share(w, unit, h));
        }
    }
    let call = w.call;
    let tile_of = |tile: usize| Tile::new(call.shape, view.layout.part(view.page(tile), unit.kv_head));
    let mut seen = [0; SPLIT];
    let mut reads = [Reads::SCANNED; SPLIT];
    // Rows that will be read lie anywhere, and memory answers late: they are asked for one tile ahead.
    for next in first..last + 1 {
        if next < last {
            seen[next - first] = seen_paged(call, unit.row, view, next);
        }
        if next < last && seen[next - first] != 0 {
            let t = tile_of(next);
            reads[next - first] = align::<S>(w, unit, view, &t, next, next - first);
            match view.attached {
                None => prefetch_k(&t, &reads[next - first]),
                Some((k, _)) => prefetch_rows(&k.skip(next * TILE), unit.kv_head, reads[next - first].more_k()),
            }
        }
        if next > first {
            let (tile, reads) = (next - 1, &reads[next - 1 - first]);
            match view.attached {
                None => refine_keys::<S>(w, &tile_of(tile), tile, reads),
                Some((k, _)) => read_keys::<S>(w, &k.skip(tile * TILE), unit.kv_head, tile, reads),
            }
            if reads.more_k() != 0 {
                let mut bent = [0.0; TILE];
                for (h, scanned) in w.scanned(tile + 1).iter_mut().enumerate() {
                    let (head, scores) = (unit.kv_head * g + h, &w.scores(tile + 1)[h]);
                    scanned.max = math::max::<S>(logits::<S>(call, unit.row, head, tile, scores, &mut bent));
                }
            }
        }
    }

    // Refined scores may be far from the scan's: weights are relative to what the largest is now.
    let exact = exact_tokens(call, unit, view, split);
    let (sums, outs) = w.state(unit, split);
    outs.fill(0.0);
    for (h, sums) in sums.iter_mut().enumerate() {
        let max = if exact != 0 { w.scanned(0)[h].max } else { f32::NEG_INFINITY };
        *sums = Sums::at((first..last).fold(max, |max, tile| max.max(w.scanned(tile + 1)[h].max)));
    }
    if exact != 0 {
        sum_exact::<S>(w, unit, view, exact, sums, outs);
        w.stats.count_dense(view, true, exact.count_ones() as usize);
    }
    for next in first..last + 1 {
        if next < last {
            match view.attached {
                None => prefetch_v(&tile_of(next), &reads[next - first]),
                Some((_, v)) => prefetch_rows(&v.skip(next * TILE), unit.kv_head, reads[next - first].some_v()),
            }
        }
        if next > first && seen[next - 1 - first] != 0 {
            let (tile, seen, reads) = (next - 1, seen[next - 1 - first], &reads[next - 1 - first]);
            if reads.is_scanned() {
                sum_scanned::<S>(w, &tile_of(tile), tile, seen, sums, outs);
            } else {
                sum::<S>(w, unit, view, &tile_of(tile), tile, seen, reads, first, sums, outs);
            }
            count(w, view, seen, reads);
        }
    }
}

/// Who is read how finely: over the group, the maximum of what its heads need.
#[inline(always)]
fn align<S: Simd>(w: &mut Worker, unit: &Unit, view: &SequenceView, t: &Tile, tile: usize, at: usize) -> Reads {
    let g = w.call.shape.group();
    let (scores, scanned) = (w.scores(tile + 1), w.scanned(tile + 1));
    let mean = t.mean_peak();
    let mut needs = 0u64;
    for (h, share) in w.shares.heads[..g].iter().enumerate() {
        if let Some((max, share)) = share {
            needs |= u64::from(share.any(&scanned[h].folded.error, mean, scanned[h].max - max, scanned[h].unit)) << h;
        }
    }
    if needs == 0 {
        return Reads::SCANNED;
    }
    let mut bent = [0.0; TILE];
    let units = v_units::<S>(t);
    // Plane counts as floats, so that counting limits is adding lanes.
    let [planes_k, planes_v] = &mut w.scratch.planes[at];
    (*planes_k, *planes_v) = ([1.0; TILE], [0.0; TILE]);
    let mut any = false;
    for (h, share) in w.shares.heads[..g].iter().enumerate().filter(|(h, _)| needs >> h & 1 == 1) {
        let Some((max, share)) = share else { continue };
        let limits = share.thresholds(&scanned[h].folded.error, mean);
        let mut e = [0.0; TILE];
        let logits = logits::<S>(w.call, unit.row, unit.kv_head * g + h, tile, &scores[h], &mut bent);
        math::weights::<S>(logits, *max, &mut e);
        let (offset_k, offset_v) = (S::splat(limits.offset_k), S::splat(limits.offset_v));
        let (offset, least) = (offset_k.max(offset_v), limits.least());
        for (b, (e, u)) in math::blocks(&e).iter().zip(math::blocks(&units)).enumerate() {
            let (e, u) = (S::load(e), S::load(u));
            if e.mul(u.add(offset)).above(least) == 0 {
                continue;
            }
            any = true;
            let (x_k, x_0, x_v) = (e.mul(u.add(offset_k)), e.mul(u.add(offset_v)), e.mul(u));
            let (k, v) = (&mut math::blocks_mut(planes_k)[b], &mut math::blocks_mut(planes_v)[b]);
            exceeded(x_k, &limits.k).add(S::splat(1.0)).max(S::load(k)).store(k);
            exceeded(x_v, &limits.v[1..]).add(exceeded(x_0, &limits.v[..1])).max(S::load(v)).store(v);
        }
    }
    if !any {
        return Reads::SCANNED;
    }
    let (most_k, most_v) = match view.attached {
        None => (t.known_k(), t.known_v()),
        Some(_) => (PLANES, PLANES),
    };
    let whole = view.attached.is_some();
    Reads { k: classes::<S>(planes_k, 1, most_k, whole), v: classes::<S>(planes_v, 0, most_v, whole) }
}

/// Tokens by their number of planes, from `least` to `most`: more are not stored. `whole`: those above `least` have all,
/// as one row.
#[inline(always)]
fn classes<S: Simd>(planes: &mut Lane128, least: usize, most: usize, whole: bool) -> [u128; PLANES + 1] {
    let limit = if whole { least } else { most };
    for x in math::blocks_mut(planes) {
        let bits = S::load(x).above(limit as f32);
        S::splat(most as f32).keep(bits, S::load(x)).store(x);
    }
    let mut at_least = [0; PLANES + 2];
    at_least[least] = u128::MAX;
    for p in least + 1..=most {
        at_least[p] = more_than::<S>(planes, p - 1);
    }
    let mut exactly = [0; PLANES + 1];
    for p in least..=most {
        exactly[p] = at_least[p] & !at_least[p + 1];
    }
    exactly
}

/// Tokens whose number is above `n`.
#[inline(always)]
fn more_than<S: Simd>(x: &Lane128, n: usize) -> u128 {
    let mut tokens = 0;
    for (b, x) in math::blocks(x).iter().enumerate() {
        tokens |= u128::from(S::load(x).above(n as f32)) << (16 * b);
    }
    tokens
}

/// Asks for a row.
#[inline(always)]
fn ask(row: &[u8]) {
    #[cfg(target_arch = "x86_64")]
    for line in row.chunks(64) {
        use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
        // SAFETY: a prefetch is a hint: it reads nothing.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(line.as_ptr().cast()) };
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = row;
}

/// Asks for the rows of K that will be read.
#[inline(always)]
fn prefetch_k(t: &Tile, reads: &Reads) {
    for p in 2..=PLANES {
        for i in Bits(reads.k[p]) {
            let row = t.k_row(i);
            ask(&row[..row.len() / (t.planes_k() - 1) * (p - 1)]);
        }
    }
}

/// The same of V.
#[inline(always)]
fn prefetch_v(t: &Tile, reads: &Reads) {
    for p in 1..=PLANES {
        for i in Bits(reads.v[p]) {
            let row = t.v_row(i);
            ask(&row[..row.len() / t.planes_v() * p]);
        }
    }
}

/// The same of the engine's rows.
#[inline(always)]
fn prefetch_rows(rows: &Rows, kv_head: usize, tokens: u128) {
    for i in Bits(tokens) {
        ask(rows.bytes(i, kv_head));
    }
}

/// Scores from the engine's own rows.
#[inline(always)]
fn read_keys<S: Simd>(w: &mut Worker, k: &Rows, kv_head: usize, tile: usize, reads: &Reads) {
    let (g, d) = (w.call.shape.group(), w.call.shape.dim_k);
    let scores = w.scores(tile + 1);
    let mut values = [0.0f32; MAX_DIM];
    let values = &mut values[..d];
    for i in Bits(reads.more_k()) {
        k.read(i, kv_head, values);
        for h in 0..g {
            scores[h][i] = math::dot::<S>(&w.scratch.q[h * d..(h + 1) * d], values);
        }
    }
}

/// Adds further digits of K to the scores, in integers as the scan. (Tokens that are not seen are never listed: their
/// weight is 0.)
#[inline(always)]
fn refine_keys<S: Simd>(w: &mut Worker, t: &Tile, tile: usize, reads: &Reads) {
    let (g, d) = (w.call.shape.group(), w.call.shape.dim_k);
    if reads.more_k() == 0 {
        return;
    }
    let (scores, scanned, digits) = (w.scores(tile + 1), w.scanned(tile + 1), w.digits(tile + 1));
    let row_bytes = t.k_rest.len() / TILE;
    for n in 2..=PLANES {
        let mut list = [0u8; TILE];
        let list = list_of(reads.k[n], &mut list);
        if list.is_empty() {
            continue;
        }
        for p in 1..n {
            let (rows, integers) = (&t.k_rest[(p - 1) * (d / 2)..], &mut w.scratch.integers[..g]);
            // SAFETY: the worker's kernel is that of an instruction set that this machine has.
            unsafe { (w.refine)(rows, row_bytes, d / 2, list, digits, integers) };
            for ((Scanned { folded, .. }, scores), integers) in scanned.iter().zip(scores.iter_mut()).zip(integers) {
                // What is left out is centred once.
                let centre = if p == 1 { (CENTRE[n] - CENTRE[1]) * folded.q_sum as f32 } else { 0.0 };
                folded.refine::<S>(integers, reads.k[n], WEIGHT[p], centre, scores);
            }
        }
    }
}

/// Tokens as a list.
#[inline(always)]
fn list_of(tokens: u128, list: &mut [u8; TILE]) -> &[u8] {
    let mut n = 0;
    for i in Bits(tokens) {
        list[n] = i as u8;
        n += 1;
    }
    &list[..n]
}

/// Adds a tile of which nothing was read beyond the scan: all its tokens stand for its mean of V.
#[inline(always)]
fn sum_scanned<S: Simd>(w: &mut Worker, t: &Tile, tile: usize, seen: u128, sums: &mut [Sums], outs: &mut [f32]) {
    let (dv, scanned) = (w.call.shape.dim_v, w.scanned(tile + 1));
    let mean = &mut w.scratch.mean[..dv];
    let mean_peak = t.mean(mean);
    let outs = outs.chunks_exact_mut(dv);
    for ((scanned, sums), out) in scanned.iter().zip(sums).zip(outs) {
        let error = &scanned.folded.error;
        let factor = math::factors::<S>(&[scanned.max; LANES], sums.max)[0];
        let f = f64::from(factor);
        let [e, e_vs, e_vs_2] = scanned.sums;
        let class = [f * e, f * e_vs, f * f * e_vs_2];
        sums.add_scores(ScoreError { bound: error.bound(1), rms: error.rms(1) }, class);
        if class[0] > 0.0 {
            sums.add_values(LEFT[0], mean_peak, class);
        }
        sums.note(seen.count_ones() as usize, scanned.unit * PEAK);
        if mean_peak > 0.0 {
            math::axpy::<S>(class[0] as f32, mean, out);
        }
    }
}

/// Adds a tile to sums and outputs: V of tokens that read any, the tile's mean for the others.
#[inline(always)]
#[allow(clippy::too_many_arguments)]
fn sum<S: Simd>(
    w: &mut Worker,
    unit: &Unit,
    view: &SequenceView,
    t: &Tile,
    tile: usize,
    seen: u128,
    reads: &Reads,
    first: usize,
    sums: &mut [Sums],
    outs: &mut [f32],
) {
    let (g, dv) = (w.call.shape.group(), w.call.shape.dim_v);
    let scores = w.scores(tile + 1);
    let units = v_units::<S>(t);
    let mut mean = [0.0f32; MAX_DIM];
    let mean_peak = t.mean(&mut mean[..dv]);
    let (whole, scanned) = (view.attached.is_some(), w.scanned(tile + 1));
    let mut tables =
        math::Tables { spread: [0.0; 8], square_k: [0.0; 8], square_v: [0.0; 8], left: [0.0; 8], centre: [0.0; 8] };
    for p in 0..=PLANES {
        // Rows as the caller has them are known.
        tables.left[p] = if p > 0 && whole { 0.0 } else { LEFT[p] };
        tables.square_v[p] = value_square(tables.left[p]);
        tables.centre[p] = if whole { 0.0 } else { CENTRE[p] };
    }
    let mut bent = [0.0; TILE];
    let tile_out = &mut w.scratch.tile_out[..g * dv];
    for h in 0..g {
        let (e, error, sums) = (&mut w.scratch.e[h], &scanned[h].folded.error, &mut sums[h]);
        let mut bound = 0.0f32;
        for p in 1..=PLANES {
            let score = match whole && p > 1 {
                true => error.of_rows(),
                false => ScoreError { bound: error.bound(p), rms: error.rms(p) },
            };
            // Tokens count even if their weight vanishes: their scores may be as uncertain as any.
            if reads.k[p] & seen != 0 {
                bound = bound.max(score.bound);
                (tables.spread[p], tables.square_k[p]) = score.factors();
            }
        }
        let logits = logits::<S>(w.call, unit.row, unit.kv_head * g + h, tile, &scores[h], &mut bent);
        math::weights::<S>(logits, sums.max, e);
        let [e_sum, e_vs, spread, spread_vs, value, square, e_unread, centre] =
            math::mixed_sums::<S>(e, &units, &w.scratch.planes[tile - first], &tables);
        let value = value + f64::from(mean_peak) * e_unread;
        sums.add_mixed(&Mixed { e: e_sum, e_vs, spread, spread_vs, value, square, bound });
        sums.note(seen.count_ones() as usize, scanned[h].unit * PEAK);
        // What is left out is centred.
        let out = &mut tile_out[h * dv..(h + 1) * dv];
        out.fill(centre as f32);
        if mean_peak > 0.0 {
            math::axpy::<S>(e_unread as f32, &mean[..dv], out);
        }
        if !whole {
            // Weights are those of the digits from here on.
            math::scale_by::<S>(e, &units);
        }
    }
    match view.attached {
        Some((_, v)) => {
            let (rows, mut values) = (v.skip(tile * TILE), [0.0f32; MAX_DIM]);
            let values = &mut values[..dv];
            for i in Bits(reads.some_v()) {
                rows.read(i, unit.kv_head, values);
                for (h, out) in tile_out.chunks_exact_mut(dv).enumerate() {
                    math::axpy::<S>(w.scratch.e[h][i], values, out);
                }
            }
        }
        None => {
            let mut lists = [[0u8; TILE]; PLANES];
            let mut n = 0;
            let lists = lists.each_mut().map(|list| {
                n += 1;
                list_of(reads.v[n], list)
            });
            math::add_rows::<S>(t.v, dv / 2, &lists, &w.scratch.e[..g], tile_out);
        }
    }
    if mean_peak > 0.0 || reads.some_v() != 0 {
        math::axpy::<S>(1.0, tile_out, outs);
    }
}

/// What reading a tile cost, its mean of V included.
fn count(w: &mut Worker, view: &SequenceView, seen: u128, reads: &Reads) {
    let shape = w.call.shape;
    let (half_k, half_v) = (shape.dim_k as u64 / 2, shape.dim_v as u64 / 2);
    let (row_k, row_v) = ((shape.dim_k * shape.dtype_k.size()) as u64, (shape.dim_v * shape.dtype_v.size()) as u64);
    let stats = &mut w.stats;
    let n = seen.count_ones() as usize;
    stats.tokens += n as u64;
    stats.count_scales(view, n);
    stats.bytes_v += 2 * half_v;
    stats.bytes_scales += 2 * half_v;
    for p in 0..=PLANES {
        let tokens = |set: u128| u64::from((set & seen).count_ones());
        let (k, v, planes) = (tokens(reads.k[p]), tokens(reads.v[p]), p as u64);
        stats.planes_k[p] += k;
        stats.planes_v[p] += v;
        stats.bytes_k += k * if view.attached.is_none() || p == 1 { planes * half_k } else { half_k + row_k };
        stats.bytes_v += v * if view.attached.is_none() || p == 0 { planes * half_v } else { row_v };
    }
}
