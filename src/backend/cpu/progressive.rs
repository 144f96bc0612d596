//! Progressive attention of one query row on one KV head: scan plane 0 of K, align, refine, sum.

use super::dense::raise;
use super::fold::fold;
use super::math::{self, Lane128};
use super::scan::WORD;
use super::unit::{Unit, Worker};
use super::workspace::Partial;
use crate::alignment::{ScoreError, Share, Sums};
use crate::cache::SequenceView;
use crate::format::aligned::{LANES, Tile};
use crate::format::{CENTRE, LEFT, MAX_GROUP, PEAK, PLANES, TILE, scale};

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

/// A token that reads more than plane 0 of K.
#[derive(Clone, Copy, Default)]
struct Listed {
    token: u8,
    k: u8,
    v: u8,
}

/// Second phase of a split: who is read how finely, and what comes of it.
#[inline(always)]
pub fn refine(w: &mut Worker, unit: &Unit, split: usize) {
    let (call, shape) = (w.call, w.call.shape);
    let (g, d, dv) = (shape.group(), shape.dim_k, shape.dim_v);
    let (half_k, half_v) = (d / 2, dv / 2);
    let view = &call.sequences[call.rows[unit.row].sequence];
    let (first, last) = unit.tiles(split);
    let (sums, outs) = w.state(unit, split);
    outs.fill(0.0);
    w.load_q(unit);

    // Weights are relative to the scan's maximum; refined scores may exceed it, then the reference is raised.
    let mut shares = [None; MAX_GROUP];
    for h in 0..g {
        let (max, share) = share(w, unit, h);
        sums[h] = Sums::at(max);
        shares[h] = Some((max, share));
    }
    if has_exact(unit, view, split) {
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

    let weight = |digits: usize| 1.0 / (1u32 << (4 * digits)) as f32;
    for tile in first..last {
        let (from, to) = seen(unit, view, tile);
        if from >= to {
            continue;
        }
        let t = Tile::new(shape, view.layout.part(view.page(tile), unit.kv_head));
        let units = v_units(&t);
        let (scores, errors) = w.scores(tile + 1);

        // Align: over the group, the maximum of what its heads need.
        let mut planes_k = [1u8; TILE];
        let mut planes_v = [0u8; TILE];
        let mut listed_any = false;
        for h in 0..g {
            let e = &mut w.scratch.e[h];
            for (e, &s) in e.iter_mut().zip(&scores[h]) {
                *e = math::exp(s - sums[h].max);
            }
            let Some((max, share)) = &shares[h] else { continue };
            let mut limits = share.thresholds(&errors[h]);
            if sums[h].max > *max {
                let factor = (*max - sums[h].max).exp();
                limits.k.iter_mut().chain(&mut limits.v).for_each(|x| *x *= factor);
            }
            let mut x = [0.0; TILE];
            for i in 0..TILE {
                x[i] = e[i] * (units[i] + limits.offset);
            }
            if math::max(&x) <= limits.least() {
                continue;
            }
            listed_any = true;
            for i in 0..TILE {
                let (k, v) = (x[i], e[i] * units[i]);
                let over = |limit: f32, x: f32| u8::from(x > limit);
                let want_k = 1 + over(limits.k[0], k) + over(limits.k[1], k) + over(limits.k[2], k);
                let want_v = over(limits.v[0], v) + over(limits.v[1], v) + over(limits.v[2], v) + over(limits.v[3], v);
                planes_k[i] = planes_k[i].max(want_k);
                planes_v[i] = planes_v[i].max(want_v);
            }
        }
        let mut list = [Listed::default(); TILE];
        let mut n_listed = 0;
        let mut refine_k = false;
        if listed_any {
            for i in from..to {
                let (k, v) = (planes_k[i].min(shape.planes_k as u8), planes_v[i].min(shape.planes_v as u8));
                if k > 1 || v > 0 {
                    list[n_listed] = Listed { token: i as u8, k, v };
                    n_listed += 1;
                    refine_k |= k > 1;
                }
            }
        }
        let list = &list[..n_listed];

        // Refine: further digits of K, added to the scores.
        if refine_k {
            let mut values = [0.0f32; crate::format::MAX_DIM];
            let values = &mut values[..d];
            for h in 0..g {
                let q = &w.scratch.q[h * d..(h + 1) * d];
                fold(q, t.k_scales, &t.meta, &mut w.scratch.words[h * WORD..], g * WORD, &mut w.scratch.folded[h]);
            }
            for l in list.iter().filter(|l| l.k > 1) {
                let (i, n) = (usize::from(l.token), usize::from(l.k));
                math::unpack(t.k_row(i), half_k, n - 1, weight(n - 1), CENTRE[n] - CENTRE[1], values);
                for h in 0..g {
                    scores[h][i] += math::dot(&w.scratch.folded[h].q[..d], values);
                }
            }
            for h in 0..g {
                let before = sums[h].max;
                raise(&mut sums[h], math::max(&scores[h]), &mut outs[h * dv..(h + 1) * dv]);
                if sums[h].max > before {
                    for (e, &s) in w.scratch.e[h].iter_mut().zip(&scores[h]) {
                        *e = math::exp(s - sums[h].max);
                    }
                } else {
                    for l in list.iter().filter(|l| l.k > 1) {
                        let i = usize::from(l.token);
                        w.scratch.e[h][i] = math::exp(scores[h][i] - before);
                    }
                }
            }
        }

        // Sum: V of listed tokens; the others, read to one plane of K and none of V, only count.
        if list.iter().any(|l| l.v > 0) {
            let tile_out = &mut w.scratch.tile_out[..g * dv];
            tile_out.fill(0.0);
            let mut values = [0.0f32; crate::format::MAX_DIM];
            let values = &mut values[..dv];
            for l in list.iter().filter(|l| l.v > 0) {
                let (i, n) = (usize::from(l.token), usize::from(l.v));
                math::unpack(t.v_row(i), half_v, n, weight(n - 1), CENTRE[n], values);
                for (h, out) in tile_out.chunks_exact_mut(dv).enumerate() {
                    math::axpy(w.scratch.e[h][i] * units[i], values, out);
                }
            }
            math::axpy(1.0, tile_out, outs);
        }
        let peak = units[from..to].iter().fold(0.0f32, |m, &u| m.max(u)) * PEAK;
        for h in 0..g {
            let (e, error) = (&mut w.scratch.e[h], &errors[h]);
            let score_error = |planes: usize| ScoreError { bound: error.bound(planes), rms: error.rms(planes) };
            // [planes of K][planes of V] of listed tokens: sums of e, e * vs, (e * vs)^2.
            let mut classes = [[[0.0f64; 3]; PLANES + 1]; PLANES + 1];
            for l in list {
                let i = usize::from(l.token);
                let (x, y) = (f64::from(e[i]), f64::from(e[i] * units[i]));
                let class = &mut classes[usize::from(l.k)][usize::from(l.v)];
                *class = [class[0] + x, class[1] + y, class[2] + y * y];
                e[i] = 0.0;
            }
            let e = &*e;
            let total = f64::from(math::sum(|i| e[i]));
            let weighted = f64::from(math::sum(|i| e[i] * units[i]));
            let squared = f64::from(math::sum(|i| (e[i] * units[i]) * (e[i] * units[i])));
            sums[h].add(score_error(1), LEFT[0], total, weighted, squared);
            if n_listed > 0 {
                for (k, classes) in classes.iter().enumerate() {
                    for (v, class) in classes.iter().enumerate().filter(|(_, c)| c[0] > 0.0) {
                        sums[h].add(score_error(k), LEFT[v], class[0], class[1], class[2]);
                    }
                }
            }
            sums[h].note_peak(peak);
        }

        let seen = (to - from) as u64;
        w.stats.tokens += seen;
        w.stats.count_scales(view, to - from);
        w.stats.planes_k[1] += seen;
        w.stats.planes_v[0] += seen;
        w.stats.bytes_k += seen * half_k as u64;
        for l in list {
            w.stats.planes_k[1] -= 1;
            w.stats.planes_v[0] -= 1;
            w.stats.planes_k[usize::from(l.k)] += 1;
            w.stats.planes_v[usize::from(l.v)] += 1;
            w.stats.bytes_k += u64::from(l.k - 1) * half_k as u64;
            w.stats.bytes_v += u64::from(l.v) * half_v as u64;
        }
    }
}
