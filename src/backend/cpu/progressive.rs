//! Progressive attention of one query row on one KV head: scan plane 0 of K, align, refine, sum.

use super::fold::fold;
use super::math::{self, Lane128};
use super::scan::WORD;
use super::unit::{Unit, Worker};
use super::workspace::{Partial, SPLIT};
use crate::alignment::{ScoreError, Share, Sums};
use crate::cache::SequenceView;
use crate::format::aligned::{LANES, Tile};
use crate::format::{CENTRE, LEFT, MAX_DIM, MAX_GROUP, PEAK, PLANES, TILE, scale};
use std::ops::Range;

/// Tokens of a tile that the row sees through its planes, as indices in the tile.
fn seen(unit: &Unit, view: &SequenceView, tile: usize) -> (usize, usize) {
    let start = tile * TILE;
    let from = start.max(view.n_exact).max(unit.from);
    (from - start, (start + TILE).min(unit.to).max(from) - start)
}

/// True if the split has exact rows to attend.
fn has_exact(unit: &Unit, view: &SequenceView, split: usize) -> bool {
    split == 0 && unit.from < view.n_exact.min(unit.to)
}

#[inline(always)]
fn v_units(tile: &Tile) -> Lane128 {
    let mut units = [0.0; TILE];
    for (unit, &u) in units.iter_mut().zip(tile.v_scales) {
        *unit = scale(u);
    }
    units
}

/// First phase of a split: scores of all its tokens, and the sums that everything is decided from.
#[inline(always)]
pub fn scan(w: &mut Worker, unit: &Unit, split: usize) {
    let (call, shape) = (w.call, w.call.shape);
    let (g, d) = (shape.group(), shape.dim_k);
    let view = &call.sequences[call.rows[unit.row].sequence];
    let (first, last) = unit.tiles(split);
    w.load_q(unit);
    let partials = w.partial(split);
    partials.fill(Partial { max: f32::NEG_INFINITY, sum: 0.0, weighted: 0.0 });

    let exact = has_exact(unit, view, split);
    if exact {
        w.scratch.tile.exact(view, unit.kv_head);
        let (scores, _) = w.scores(0);
        for h in 0..g {
            let q = &w.scratch.q[h * d..(h + 1) * d];
            let to = view.n_exact.min(unit.to);
            let error = w.scratch.tile.scores(q, unit.from, to, &mut scores[h]);
            partials[h].max = math::max(&scores[h]);
            w.check(error.bound, partials[h].max);
        }
    }
    for tile in first..last {
        let (from, to) = seen(unit, view, tile);
        let t = Tile::new(shape, view.layout.part(view.page(tile), unit.kv_head));
        for h in 0..g {
            let q = &w.scratch.q[h * d..(h + 1) * d];
            fold(q, t.k_scales, &t.meta, &mut w.scratch.words[h * WORD..], g * WORD, &mut w.scratch.folded[h]);
        }
        let words = &w.scratch.words[..d / 8 * g * WORD];
        // SAFETY: the worker's scan is that of an instruction set that this machine has.
        unsafe { (w.scan)(t.k0, words, d / 2, to.div_ceil(LANES), &mut w.scratch.integers[..g]) };
        let (scores, errors) = w.scores(tile + 1);
        for h in 0..g {
            let folded = &w.scratch.folded[h];
            for (s, &i) in scores[h].iter_mut().zip(&w.scratch.integers[h]) {
                *s = folded.score(i);
            }
            scores[h][..from].fill(f32::NEG_INFINITY);
            scores[h][to..].fill(f32::NEG_INFINITY);
            errors[h] = folded.error;
            let max = math::max(&scores[h]);
            partials[h].max = partials[h].max.max(max);
            let worst = folded.error.worst;
            w.check(worst * PEAK, max);
        }
    }

    let mut add = |scores: &[Lane128], units: &Lane128| {
        for (partial, s) in partials.iter_mut().zip(scores) {
            let mut e = [0.0; TILE];
            for (e, &s) in e.iter_mut().zip(s) {
                *e = math::exp(s - partial.max);
            }
            partial.sum += f64::from(math::sum(|i| e[i]));
            partial.weighted += f64::from(math::sum(|i| e[i] * units[i])) * f64::from(PEAK);
        }
    };
    if exact {
        add(w.scores(0).0, &w.scratch.tile.v_unit);
    }
    for tile in first..last {
        let t = Tile::new(shape, view.layout.part(view.page(tile), unit.kv_head));
        add(w.scores(tile + 1).0, &v_units(&t));
    }
}

/// One query head's view of the whole context, from all splits' scans, and what its share of the error is.
#[inline(always)]
fn share(w: &Worker, unit: &Unit, h: usize) -> (f32, Share) {
    let partials = || (0..unit.n_splits()).map(|split| &w.partial(split)[h]);
    let max = partials().fold(f32::NEG_INFINITY, |m, p| m.max(p.max));
    let (mut sum, mut weighted) = (0.0, 0.0);
    for p in partials().filter(|p| p.max > f32::NEG_INFINITY) {
        let factor = (f64::from(p.max) - f64::from(max)).exp();
        sum += factor * p.sum;
        weighted += factor * p.weighted;
    }
    (max, Share::new(w.call.mode, w.call.tolerance, unit.to - unit.from, sum, weighted))
}

/// Planes that the tokens of a tile read: at most what is stored.
#[derive(Clone, Copy)]
struct Reads {
    k: [u8; TILE],
    v: [u8; TILE],
    /// Some token reads more than plane 0 of K.
    any: bool,
}

const SCANNED: Reads = Reads { k: [1; TILE], v: [0; TILE], any: false };

/// Weight of the last of `1 + digits` digits.
fn weight(digits: usize) -> f32 {
    1.0 / (1u32 << (4 * digits)) as f32
}

/// Second phase of a split: who is read how finely, and what comes of it.
#[inline(always)]
pub fn refine(w: &mut Worker, unit: &Unit, split: usize) {
    let (g, d, dv) = (w.call.shape.group(), w.call.shape.dim_k, w.call.shape.dim_v);
    let view = &w.call.sequences[w.call.rows[unit.row].sequence];
    let (first, last) = unit.tiles(split);
    w.load_q(unit);

    let mut shares = [None; MAX_GROUP];
    for (h, s) in shares[..g].iter_mut().enumerate() {
        *s = Some(share(w, unit, h));
    }
    let mut reads = [SCANNED; SPLIT];
    for tile in first..last {
        let t = Tile::new(w.call.shape, view.layout.part(view.page(tile), unit.kv_head));
        reads[tile - first] = align(w, &t, tile, &shares[..g]);
        if reads[tile - first].any {
            refine_keys(w, &t, tile, &reads[tile - first]);
        }
    }

    // Refined scores may be far from the scan's: weights are relative to what the largest is now.
    let exact = has_exact(unit, view, split);
    let (sums, outs) = w.state(unit, split);
    outs.fill(0.0);
    for (h, sums) in sums.iter_mut().enumerate() {
        let tiles = if exact { Some(0) } else { None }.into_iter().chain(first + 1..last + 1);
        *sums = Sums::at(tiles.fold(f32::NEG_INFINITY, |m, index| m.max(math::max(&w.scores(index).0[h]))));
    }
    if exact {
        let to = view.n_exact.min(unit.to);
        w.scratch.tile.exact(view, unit.kv_head);
        w.stats.count_dense(view, true, to - unit.from);
        let (scores, _) = w.scores(0);
        for h in 0..g {
            let q = &w.scratch.q[h * d..(h + 1) * d];
            let error = w.scratch.tile.scores(q, unit.from, to, &mut scores[h]);
            let (out, tile_out) = (&mut outs[h * dv..(h + 1) * dv], &mut w.scratch.tile_out[..dv]);
            w.scratch.tile.attend(&scores[h], error, unit.from, to, &mut sums[h], out, tile_out);
        }
    }
    for tile in first..last {
        let (from, to) = seen(unit, view, tile);
        if from < to {
            let t = Tile::new(w.call.shape, view.layout.part(view.page(tile), unit.kv_head));
            sum(w, &t, tile, from..to, &reads[tile - first], sums, outs);
            count(w, view, to - from, from..to, &reads[tile - first]);
        }
    }
}

/// Who is read how finely: over the group, the maximum of what its heads need.
#[inline(always)]
fn align(w: &Worker, t: &Tile, tile: usize, shares: &[Option<(f32, Share)>]) -> Reads {
    let (scores, errors) = w.scores(tile + 1);
    let units = v_units(t);
    let mut reads = SCANNED;
    for (h, share) in shares.iter().enumerate() {
        let Some((max, share)) = share else { continue };
        let limits = share.thresholds(&errors[h]);
        let (mut e, mut x) = ([0.0; TILE], [0.0; TILE]);
        for i in 0..TILE {
            e[i] = math::exp(scores[h][i] - max);
            x[i] = e[i] * (units[i] + limits.offset);
        }
        if math::max(&x) <= limits.least() {
            continue;
        }
        reads.any = true;
        for i in 0..TILE {
            let (k, v) = (x[i], e[i] * units[i]);
            let over = |limit: f32, x: f32| u8::from(x > limit);
            let want_k = 1 + over(limits.k[0], k) + over(limits.k[1], k) + over(limits.k[2], k);
            let want_v = over(limits.v[0], v) + over(limits.v[1], v) + over(limits.v[2], v) + over(limits.v[3], v);
            reads.k[i] = reads.k[i].max(want_k);
            reads.v[i] = reads.v[i].max(want_v);
        }
    }
    let (most_k, most_v) = (w.call.shape.planes_k as u8, w.call.shape.planes_v as u8);
    for i in 0..TILE {
        reads.k[i] = reads.k[i].min(most_k);
        reads.v[i] = reads.v[i].min(most_v);
    }
    reads
}

/// Adds further digits of K to the scores. (Tokens that are not seen are never listed: their weight is 0.)
#[inline(always)]
fn refine_keys(w: &mut Worker, t: &Tile, tile: usize, reads: &Reads) {
    let (g, d) = (w.call.shape.group(), w.call.shape.dim_k);
    if reads.k.iter().all(|&k| k <= 1) {
        return;
    }
    let (scores, _) = w.scores(tile + 1);
    for h in 0..g {
        let q = &w.scratch.q[h * d..(h + 1) * d];
        fold(q, t.k_scales, &t.meta, &mut w.scratch.words[h * WORD..], g * WORD, &mut w.scratch.folded[h]);
    }
    let mut values = [0.0f32; MAX_DIM];
    let values = &mut values[..d];
    for (i, n) in reads.k.iter().map(|&k| usize::from(k)).enumerate().filter(|&(_, k)| k > 1) {
        math::unpack(t.k_row(i), d / 2, n - 1, weight(n - 1), CENTRE[n] - CENTRE[1], values);
        for h in 0..g {
            scores[h][i] += math::dot(&w.scratch.folded[h].q[..d], values);
        }
    }
}

/// Adds a tile to sums and outputs: V of tokens that read any; the others only count.
#[inline(always)]
fn sum(w: &mut Worker, t: &Tile, tile: usize, seen: Range<usize>, reads: &Reads, sums: &mut [Sums], outs: &mut [f32]) {
    let (g, dv) = (w.call.shape.group(), w.call.shape.dim_v);
    let (scores, errors) = w.scores(tile + 1);
    let units = v_units(t);
    for h in 0..g {
        for (e, &s) in w.scratch.e[h].iter_mut().zip(&scores[h]) {
            *e = math::exp(s - sums[h].max);
        }
    }
    if reads.any {
        let tile_out = &mut w.scratch.tile_out[..g * dv];
        tile_out.fill(0.0);
        let mut values = [0.0f32; MAX_DIM];
        let values = &mut values[..dv];
        for (i, n) in reads.v.iter().map(|&v| usize::from(v)).enumerate().filter(|&(_, v)| v > 0) {
            math::unpack(t.v_row(i), dv / 2, n, weight(n - 1), CENTRE[n], values);
            for (h, out) in tile_out.chunks_exact_mut(dv).enumerate() {
                math::axpy(w.scratch.e[h][i] * units[i], values, out);
            }
        }
        math::axpy(1.0, tile_out, outs);
    }
    let peak = units[seen.clone()].iter().fold(0.0f32, |m, &u| m.max(u)) * PEAK;
    for h in 0..g {
        let (e, error) = (&mut w.scratch.e[h], &errors[h]);
        let score_error = |planes: usize| ScoreError { bound: error.bound(planes), rms: error.rms(planes) };
        let mut rest = seen.len();
        if reads.any {
            // [planes of K][planes of V]: number, sums of e, e * vs, (e * vs)^2 of tokens that read more than plane 0.
            let mut classes = [[[0.0f64; 4]; PLANES + 1]; PLANES + 1];
            for i in seen.clone().filter(|&i| reads.k[i] > 1 || reads.v[i] > 0) {
                let (x, y) = (f64::from(e[i]), f64::from(e[i] * units[i]));
                let class = &mut classes[usize::from(reads.k[i])][usize::from(reads.v[i])];
                *class = [class[0] + 1.0, class[1] + x, class[2] + y, class[3] + y * y];
                e[i] = 0.0;
            }
            for (k, classes) in classes.iter().enumerate() {
                for (v, class) in classes.iter().enumerate().filter(|(_, c)| c[0] > 0.0) {
                    sums[h].add(score_error(k), LEFT[v], class[1], class[2], class[3]);
                    rest -= class[0] as usize;
                }
            }
        }
        // Tokens count even if their weight has vanished: their scores may be as uncertain as any.
        if rest > 0 {
            let e = &*e;
            let total = f64::from(math::sum(|i| e[i]));
            let weighted = f64::from(math::sum(|i| e[i] * units[i]));
            let squared = f64::from(math::sum(|i| (e[i] * units[i]) * (e[i] * units[i])));
            sums[h].add(score_error(1), LEFT[0], total, weighted, squared);
        }
        sums[h].note_peak(peak);
    }
}

/// What reading a tile cost: `n` tokens are seen.
fn count(w: &mut Worker, view: &SequenceView, n: usize, seen: Range<usize>, reads: &Reads) {
    let (half_k, half_v) = (w.call.shape.dim_k as u64 / 2, w.call.shape.dim_v as u64 / 2);
    let stats = &mut w.stats;
    stats.tokens += n as u64;
    stats.count_scales(view, n);
    for i in seen {
        stats.planes_k[usize::from(reads.k[i])] += 1;
        stats.planes_v[usize::from(reads.v[i])] += 1;
        stats.bytes_k += u64::from(reads.k[i]) * half_k;
        stats.bytes_v += u64::from(reads.v[i]) * half_v;
    }
}
