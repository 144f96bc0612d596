//! Progressive attention of one query row on one KV head: scan plane 0 of K, align, refine, sum.

use super::fold::fold;
use super::math::{self, Lane128};
use super::scan::WORD;
use super::simd::Simd;
use super::unit::{Unit, Worker, bend_error, logits, seen_exact, seen_paged};
use super::workspace::{Partial, SPLIT};
use crate::alignment::{ScoreError, Share, Sums, TileError};
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
    let partials = w.partials_mut(split);
    partials.fill(Partial { max: f32::NEG_INFINITY, sum: 0.0, weighted: 0.0 });

    let mut bent = [0.0; TILE];
    let head = |h: usize| unit.kv_head * g + h;
    let exact = exact_tokens(call, unit, view, split);
    if exact != 0 {
        w.scratch.tile.exact::<S>(view, unit.kv_head);
        let (scores, _) = w.scores(0);
        for h in 0..g {
            let q = &w.scratch.q[h * d..(h + 1) * d];
            let error = w.scratch.tile.scores::<S>(q, exact, &mut scores[h]);
            w.check(error.bound, math::max::<S>(&scores[h]));
            let logits = logits::<S>(call, unit.row, head(h), 0, &scores[h], &mut bent);
            partials[h].max = math::max::<S>(logits);
        }
    }
    for tile in first..last {
        let seen = seen_paged(call, unit.row, view, tile);
        if seen == 0 {
            continue;
        }
        let t = Tile::new(shape, view.layout.part(view.page(tile), unit.kv_head));
        for h in 0..g {
            let q = &w.scratch.q[h * d..(h + 1) * d];
            fold::<S>(q, t.k_scales, &t.meta, &mut w.scratch.words[h * WORD..], g * WORD, &mut w.scratch.folded[h]);
        }
        let words = &w.scratch.words[..d / 8 * g * WORD];
        let n_blocks = (TILE - seen.leading_zeros() as usize).div_ceil(LANES);
        // SAFETY: the worker's scan is that of an instruction set that this machine has.
        unsafe { (w.scan)(t.k0, words, d / 2, n_blocks, &mut w.scratch.integers[..g]) };
        let (scores, errors) = w.scores(tile + 1);
        for h in 0..g {
            let folded = &w.scratch.folded[h];
            folded.scores::<S>(&w.scratch.integers[h], &mut scores[h]);
            math::hide::<S>(&mut scores[h], seen);
            let reach = folded.error.worst * PEAK;
            let bend = bend_error(call, unit.row, head(h), tile, reach);
            errors[h] = TileError { bend, ..folded.error };
            let logits = logits::<S>(call, unit.row, head(h), tile, &scores[h], &mut bent);
            let max = math::max::<S>(logits);
            partials[h].max = partials[h].max.max(max);
            w.check(reach, max);
        }
    }

    if exact != 0 {
        for h in 0..g {
            let logits = logits::<S>(call, unit.row, head(h), 0, &w.scores(0).0[h], &mut bent);
            add_partial::<S>(&mut partials[h], logits, &w.scratch.tile.v_unit);
        }
    }
    for tile in first..last {
        if seen_paged(call, unit.row, view, tile) != 0 {
            let t = Tile::new(shape, view.layout.part(view.page(tile), unit.kv_head));
            let units = v_units::<S>(&t);
            for h in 0..g {
                let logits = logits::<S>(call, unit.row, head(h), tile, &w.scores(tile + 1).0[h], &mut bent);
                add_partial::<S>(&mut partials[h], logits, &units);
            }
        }
    }
}

/// Adds a tile's weights to what the scan says of a head.
#[inline(always)]
fn add_partial<S: Simd>(partial: &mut Partial, logits: &Lane128, units: &Lane128) {
    let mut e = [0.0; TILE];
    math::weights::<S>(logits, partial.max, &mut e);
    let [sum, weighted, _] = math::sums::<S>(&e, units);
    partial.sum += sum;
    partial.weighted += weighted * f64::from(PEAK);
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
    let (g, d, dv) = (w.call.shape.group(), w.call.shape.dim_k, w.call.shape.dim_v);
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
            reads[next - first] = align::<S>(w, unit, view, &t, next);
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
        }
    }

    // Refined scores may be far from the scan's: weights are relative to what the largest is now.
    let exact = exact_tokens(call, unit, view, split);
    let mut bent = [0.0; TILE];
    let (sums, outs) = w.state(unit, split);
    outs.fill(0.0);
    for (h, sums) in sums.iter_mut().enumerate() {
        let head = unit.kv_head * g + h;
        let mut max = f32::NEG_INFINITY;
        if exact != 0 {
            max = math::max::<S>(logits::<S>(call, unit.row, head, 0, &w.scores(0).0[h], &mut bent));
        }
        for tile in (first..last).filter(|tile| seen[tile - first] != 0) {
            let scores = &w.scores(tile + 1).0[h];
            max = max.max(math::max::<S>(logits::<S>(call, unit.row, head, tile, scores, &mut bent)));
        }
        *sums = Sums::at(max);
    }
    if exact != 0 {
        w.scratch.tile.exact::<S>(view, unit.kv_head);
        w.stats.count_dense(view, true, exact.count_ones() as usize);
        let (scores, _) = w.scores(0);
        for h in 0..g {
            let head = unit.kv_head * g + h;
            let q = &w.scratch.q[h * d..(h + 1) * d];
            let mut error = w.scratch.tile.scores::<S>(q, exact, &mut scores[h]);
            error.bound += bend_error(call, unit.row, head, 0, error.reach);
            let logits = logits::<S>(call, unit.row, head, 0, &scores[h], &mut bent);
            let out = &mut outs[h * dv..(h + 1) * dv];
            w.scratch.tile.attend::<S>(logits, error.score(), exact, &mut sums[h], out);
        }
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
            sum::<S>(w, unit, view, &tile_of(tile), tile, seen, reads, sums, outs);
            count(w, view, seen, reads);
        }
    }
}

/// Who is read how finely: over the group, the maximum of what its heads need.
#[inline(always)]
fn align<S: Simd>(w: &Worker, unit: &Unit, view: &SequenceView, t: &Tile, tile: usize) -> Reads {
    let g = w.call.shape.group();
    let (scores, errors) = w.scores(tile + 1);
    let mut bent = [0.0; TILE];
    let units = v_units::<S>(t);
    let mean = t.mean(&mut [0.0; MAX_DIM][..w.call.shape.dim_v]);
    // Plane counts as floats, so that counting limits is adding lanes.
    let (mut planes_k, mut planes_v, mut any) = ([1.0; TILE], [0.0; TILE], false);
    for (h, share) in w.shares.heads[..g].iter().enumerate() {
        let Some((max, share)) = share else { continue };
        let limits = share.thresholds(&errors[h], mean);
        let mut e = [0.0; TILE];
        let logits = logits::<S>(w.call, unit.row, unit.kv_head * g + h, tile, &scores[h], &mut bent);
        math::weights::<S>(logits, *max, &mut e);
        let (offset_k, offset_v) = (S::splat(limits.offset_k), S::splat(limits.offset_v));
        let offset = offset_k.max(offset_v);
        let mut most = S::splat(0.0);
        for (e, u) in math::blocks(&e).iter().zip(math::blocks(&units)) {
            most = S::load(e).mul(S::load(u).add(offset)).max(most);
        }
        if math::fold_max(most) <= limits.least() {
            continue;
        }
        any = true;
        for (b, (e, u)) in math::blocks(&e).iter().zip(math::blocks(&units)).enumerate() {
            let (e, u) = (S::load(e), S::load(u));
            let (x_k, x_0, x_v) = (e.mul(u.add(offset_k)), e.mul(u.add(offset_v)), e.mul(u));
            let (k, v) = (&mut math::blocks_mut(&mut planes_k)[b], &mut math::blocks_mut(&mut planes_v)[b]);
            exceeded(x_k, &limits.k).add(S::splat(1.0)).max(S::load(k)).store(k);
            exceeded(x_v, &limits.v[1..]).add(exceeded(x_0, &limits.v[..1])).max(S::load(v)).store(v);
        }
    }
    if !any {
        return Reads::SCANNED;
    }
    let (most_k, most_v) = match view.attached {
        None => (w.call.shape.planes_k, w.call.shape.planes_v),
        Some(_) => (PLANES, PLANES),
    };
    let whole = view.attached.is_some();
    Reads { k: classes::<S>(&planes_k, 1, most_k, whole), v: classes::<S>(&planes_v, 0, most_v, whole) }
}

/// Tokens by their number of planes, from `least` to `most`; `whole`: those above `least` have all, as one row.
#[inline(always)]
fn classes<S: Simd>(planes: &Lane128, least: usize, most: usize, whole: bool) -> [u128; PLANES + 1] {
    let mut at_least = [0; PLANES + 2];
    at_least[least] = u128::MAX;
    for p in least + 1..=most {
        at_least[p] = if whole && p > least + 1 { at_least[least + 1] } else { more_than::<S>(planes, p - 1) };
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
    let (scores, _) = w.scores(tile + 1);
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
    let (scores, _) = w.scores(tile + 1);
    for h in 0..g {
        let q = &w.scratch.q[h * d..(h + 1) * d];
        fold::<S>(q, t.k_scales, &t.meta, &mut w.scratch.words[h * WORD..], g * WORD, &mut w.scratch.folded[h]);
    }
    let folded = &w.scratch.folded[..g];
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
            unsafe { (w.refine)(rows, row_bytes, d / 2, list, folded, integers) };
            for ((folded, scores), integers) in folded.iter().zip(scores.iter_mut()).zip(integers) {
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
    sums: &mut [Sums],
    outs: &mut [f32],
) {
    let (g, dv) = (w.call.shape.group(), w.call.shape.dim_v);
    let (scores, errors) = w.scores(tile + 1);
    let units = v_units::<S>(t);
    let mut mean = [0.0f32; MAX_DIM];
    let mean_peak = t.mean(&mut mean[..dv]);
    let n_seen = seen.count_ones() as usize;
    let peak = math::max_of::<S>(&units, seen) * PEAK;
    let mut bent = [0.0; TILE];
    let tile_out = &mut w.scratch.tile_out[..g * dv];
    tile_out.fill(0.0);
    for h in 0..g {
        let (e, error, sums) = (&mut w.scratch.e[h], &errors[h], &mut sums[h]);
        let logits = logits::<S>(w.call, unit.row, unit.kv_head * g + h, tile, &scores[h], &mut bent);
        math::weights::<S>(logits, sums.max, e);
        // By planes of K and by planes of V: sums of e, e * vs, (e * vs)^2.
        let (mut by_k, mut by_v, mut n) = ([[0.0f64; 3]; PLANES + 1], [[0.0f64; 3]; PLANES + 1], [0; PLANES + 1]);
        for p in 0..=PLANES {
            n[p] = (reads.k[p] & seen).count_ones();
            if n[p] > 0 {
                by_k[p] = math::sums_of::<S>(e, &units, reads.k[p]);
            }
            if reads.v[p] & seen != 0 {
                by_v[p] = math::sums_of::<S>(e, &units, reads.v[p]);
            }
        }
        // Tokens count even if their weight has vanished: their scores may be as uncertain as any.
        for k in (1..=PLANES).filter(|&k| n[k] > 0) {
            let score = match view.attached {
                Some(_) if k > 1 => error.of_rows(),
                _ => ScoreError { bound: error.bound(k), rms: error.rms(k) },
            };
            sums.add_scores(score, by_k[k]);
        }
        for (v, &class) in by_v.iter().enumerate().filter(|(_, class)| class[0] > 0.0) {
            let left = if v > 0 && view.attached.is_some() { 0.0 } else { LEFT[v] };
            sums.add_values(left, if v == 0 { mean_peak } else { 0.0 }, class);
        }
        sums.note(n_seen, peak);
        let out = &mut tile_out[h * dv..(h + 1) * dv];
        if mean_peak > 0.0 {
            math::axpy::<S>(by_v[0][0] as f32, &mean[..dv], out);
        }
        if view.attached.is_none() && reads.some_v() != 0 {
            // What is left out is centred; weights are those of the digits from here on.
            let centre = (1..=PLANES).fold(0.0, |sum, p| sum + by_v[p][1] * f64::from(CENTRE[p])) as f32;
            for x in out {
                *x += centre;
            }
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
            for n in 1..=PLANES {
                let mut list = [0u8; TILE];
                let list = list_of(reads.v[n], &mut list);
                if !list.is_empty() {
                    math::add_rows::<S>(t.v, dv / 2, n, list, &w.scratch.e[..g], tile_out);
                }
            }
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
