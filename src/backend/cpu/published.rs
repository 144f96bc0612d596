//! Attention by the criterion of the published AlignedKV scheme: one query row on one KV head, every query head by
//! itself. Nothing is claimed about its error.

use super::math;
use super::simd::Simd;
use super::unit::{Unit, Worker};
use crate::alignment::published::{self as criterion, GROUPS};
use crate::alignment::{ScoreError, Sums};
use crate::format::published::{Cut, Tile};
use crate::format::{MAX_DIM, MAX_GROUP, PEAK, TILE, finite_f16};
use half::f16;

/// What is kept of an element that is read to `bits`, and the midpoint of what is not.
#[inline(always)]
const fn cut(bits: u8) -> (u16, u16) {
    match bits {
        8 => (0xff00, 0x80),
        12 => (0xfff0, 0x8),
        _ => (0xffff, 0),
    }
}

/// A row that is read to the same bits everywhere.
fn cut_row(bits: u8) -> &'static [(u16, u16); MAX_DIM] {
    const ROWS: [[(u16, u16); MAX_DIM]; 3] = [[cut(8); MAX_DIM], [cut(12); MAX_DIM], [cut(16); MAX_DIM]];
    &ROWS[usize::from(bits / 4 - 2)]
}

#[inline(always)]
fn read(row: &[u16], cuts: &[(u16, u16)], out: &mut [f32]) {
    for ((x, &bits), &(keep, middle)) in out.iter_mut().zip(row).zip(cuts) {
        *x = finite_f16(bits & keep | middle);
    }
}

/// The whole context at once.
#[inline(always)]
pub fn attend<S: Simd>(w: &mut Worker, unit: &Unit) {
    let (call, shape) = (w.call, w.call.shape);
    let (g, d, dv, n) = (shape.group(), shape.dim_k, shape.dim_v, unit.to - unit.from);
    let view = &call.sequences[call.rows[unit.row].sequence];
    let tile = |i: usize| Tile::new(shape, view.layout.part(view.page(i / TILE), unit.kv_head));
    let (sums, outs) = w.state(unit, 0);
    sums.fill(Sums::EMPTY);
    outs.fill(0.0);
    if n == 0 {
        return;
    }
    let mut bits = [0u16; MAX_DIM];
    let mut peaks = [[0u16; MAX_DIM]; 2];
    let [peak_k, peak_v] = &mut peaks;
    let mut note = |cut: Cut, i: usize, d: usize, peak: &mut [u16]| {
        cut.row(i % TILE, &mut bits[..d]);
        for (p, &b) in peak.iter_mut().zip(&bits[..d]) {
            *p = (*p).max(b & 0x7fff);
        }
    };
    for i in unit.from..unit.to {
        let t = tile(i);
        note(t.k, i, d, peak_k);
        note(t.v, i, dv, peak_v);
    }

    // K: bits per channel, from q as it is; scores of every head at its own precision.
    w.load_q(unit);
    let mut cuts = [[(0u16, 0u16); MAX_DIM]; MAX_GROUP];
    let mut union = [0u8; MAX_DIM];
    for (h, cuts) in cuts[..g].iter_mut().enumerate() {
        let mut q = [0.0f32; MAX_DIM];
        call.q.read(unit.row, unit.kv_head * g + h, &mut q[..d]);
        let mut want = [0u8; MAX_DIM];
        criterion::key_bits(&q[..d], &peak_k[..d], &mut want[..d]);
        for c in 0..d {
            cuts[c] = cut(want[c]);
            union[c] = union[c].max(want[c]);
        }
    }
    let mut row = [0u16; MAX_DIM];
    let mut values = [0.0f32; MAX_DIM];
    // Scores live where the progressive path keeps its own: a tile of every head.
    let first = unit.from / TILE;
    let tiles = first..unit.to.div_ceil(TILE);
    for t in tiles.clone() {
        for scores in w.scores(t - first) {
            scores.fill(f32::NEG_INFINITY);
        }
    }
    for i in unit.from..unit.to {
        tile(i).k.row(i % TILE, &mut row[..d]);
        let scores = w.scores(i / TILE - first);
        for h in 0..g {
            read(&row[..d], &cuts[h][..d], &mut values[..d]);
            scores[h][i % TILE] = math::dot::<S>(&values[..d], &w.scratch.q[h * d..(h + 1) * d]);
        }
    }

    // V: bits per token, from its weight against the exponent that the output is expected to have.
    let mut alignments = [0i32; MAX_GROUP];
    for h in 0..g {
        let max = tiles.clone().fold(f32::NEG_INFINITY, |m, t| m.max(math::max::<S>(&w.scores(t - first)[h])));
        let mut sum = 0.0;
        for t in tiles.clone() {
            let scores = &mut w.scores(t - first)[h];
            math::weights::<S>(&*scores, max, &mut w.scratch.e[h]);
            *scores = w.scratch.e[h];
            sum += math::sums::<S>(scores, scores)[0];
        }
        sums[h] = Sums::at(max);
        sums[h].sum = sum;
        let mut best = [(f16::ZERO, 0); GROUPS];
        for i in 0..n {
            let token = unit.from + i;
            let weight = &mut w.scores(token / TILE - first)[h][token % TILE];
            let p = f16::from_f64(f64::from(*weight) / sum);
            *weight = p.to_f32();
            if p > best[i % GROUPS].0 {
                best[i % GROUPS] = (p, i);
            }
        }
        let mut probe = [0.0f32; MAX_DIM];
        for (p, i) in best {
            let token = unit.from + i;
            tile(token).v.row(token % TILE, &mut row[..dv]);
            read(&row[..dv], &cut_row(8)[..dv], &mut values[..dv]);
            for (x, v) in probe.iter_mut().zip(&values[..dv]) {
                *x += v.abs() * p.to_f32();
            }
        }
        alignments[h] = criterion::alignment(&probe[..dv], &peak_v[..dv]);
    }
    let mut bits_v = 0u64;
    for i in unit.from..unit.to {
        tile(i).v.row(i % TILE, &mut row[..dv]);
        let peak = row[..dv].iter().fold(0, |m, b| m.max(b & 0x7fff));
        let weights = w.scores(i / TILE - first);
        let mut most = 0;
        for h in 0..g {
            let p = weights[h][i % TILE];
            let want = criterion::value_bits(alignments[h], f16::from_f32(p));
            most = most.max(want);
            read(&row[..dv], &cut_row(want)[..dv], &mut values[..dv]);
            // Undone when the unit is merged: outputs are divided by the sum there.
            math::axpy::<S>(p * sums[h].sum as f32, &values[..dv], &mut outs[h * dv..(h + 1) * dv]);
            sums[h].weighted += f64::from(p) * sums[h].sum * f64::from(finite_f16(peak));
        }
        bits_v += u64::from(most);
    }
    let none = ScoreError { bound: f32::INFINITY, rms: f32::INFINITY };
    for sums in sums {
        sums.add_scores(none, [0.0; 3]);
        sums.note(n, PEAK);
    }
    let bits_k: u64 = union[..d].iter().map(|&b| u64::from(b)).sum();
    w.stats.tokens += n as u64;
    w.stats.bytes_k += bits_k * n as u64 / 8;
    w.stats.bytes_v += bits_v * dv as u64 / 8;
}
