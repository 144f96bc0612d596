//! Dense attention: every stored digit of every visible row. A tile is decoded once for a block of query rows.

use super::fold::score_rounding;
use super::math::{self, Lane128};
use super::simd::{LANES, Simd};
use super::unit::{Unit, Worker, bend_error, logits, seen_exact, seen_paged};
use crate::alignment::{ScoreError, Sums};
use crate::cache::SequenceView;
use crate::format::{CENTRE, Format, LEFT, MAX_DIM, PEAK, Rows, Shape, TILE, aligned, published, raw, scale};

/// What scores of a tile are uncertain by, and at most.
#[derive(Debug, Clone, Copy)]
pub struct Uncertain {
    pub bound: f32,
    pub rms: f32,
    pub reach: f32,
}

impl Uncertain {
    pub fn score(&self) -> ScoreError {
        ScoreError { bound: self.bound, rms: self.rms }
    }
}

/// A tile in f32, K by channels (so that lanes are tokens), and what its values are uncertain by.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
pub struct Decoded {
    k: [Lane128; MAX_DIM],
    v: [[f32; MAX_DIM]; TILE],
    /// Per channel: K is known to `left_k` times this, and |k| is at most PEAK times this.
    k_unit: [f32; MAX_DIM],
    /// Per token: the same of V.
    pub v_unit: Lane128,
    left_k: f32,
    left_v: f32,
}

impl Decoded {
    /// The rows that are kept as given, as a tile of their own.
    pub fn exact<S: Simd>(&mut self, view: &SequenceView, kv_head: usize) {
        let Some((k, v)) = view.exact else { return };
        self.v_unit[view.n_exact..].fill(0.0);
        self.given::<S>(view, &k, &v, 0, kv_head, view.n_exact);
    }

    /// The first `n` of rows as the caller gave them. What was never written is not read.
    #[inline(always)]
    fn given<S: Simd>(&mut self, view: &SequenceView, k: &Rows, v: &Rows, tile: usize, kv_head: usize, n: usize) {
        let written = view.written(tile);
        let read = |rows: &Rows, i: usize, out: &mut [f32]| match written >> i & 1 {
            1 => rows.read(i, kv_head, out),
            _ => out.fill(0.0),
        };
        self.rows::<S>(&view.layout.shape, n, |i, out| read(k, i, out), |i, out| read(v, i, out));
    }

    /// The first `n` tokens of a page.
    #[inline(always)]
    pub fn page<S: Simd>(&mut self, view: &SequenceView, tile: usize, kv_head: usize, n: usize) {
        let shape = &view.layout.shape;
        let part = view.layout.part(view.page(tile), kv_head);
        self.v_unit[n..].fill(0.0);
        if let Some((k, v)) = view.attached {
            return self.given::<S>(view, &k.skip(tile * TILE), &v.skip(tile * TILE), tile, kv_head, n);
        }
        match view.layout.format {
            Format::Aligned => self.aligned::<S>(shape, &aligned::Tile::new(shape, part), n),
            Format::Published => {
                let t = published::Tile::new(shape, part);
                self.rows::<S>(shape, n, |i, out| t.k.decode(i, out), |i, out| t.v.decode(i, out));
            }
            Format::Raw => {
                let t = raw::Tile::new(shape, part);
                self.rows::<S>(shape, n, |i, out| t.k.read(i, 0, out), |i, out| t.v.read(i, 0, out));
            }
        }
    }

    /// 16 rows of K, turned so that lanes are tokens.
    #[inline(always)]
    fn put_k(&mut self, first: usize, d: usize, rows: &[[f32; MAX_DIM]; 16]) {
        for c in 0..d {
            let lane = &mut self.k[c][first..first + 16];
            for (x, row) in lane.iter_mut().zip(rows) {
                *x = row[c];
            }
        }
    }

    /// Rows that are known exactly.
    #[inline(always)]
    fn rows<S: Simd>(&mut self, s: &Shape, n: usize, k: impl Fn(usize, &mut [f32]), v: impl Fn(usize, &mut [f32])) {
        (self.left_k, self.left_v) = (0.0, 0.0);
        self.k_unit = [0.0; MAX_DIM];
        let mut rows = [[0.0f32; MAX_DIM]; 16];
        for first in (0..n).step_by(16) {
            let count = (n - first).min(16);
            for (i, row) in rows[..count].iter_mut().enumerate() {
                k(first + i, &mut row[..s.dim_k]);
                for (unit, x) in self.k_unit.iter_mut().zip(&row[..s.dim_k]) {
                    *unit = if x.abs() > *unit { x.abs() } else { *unit };
                }
            }
            self.put_k(first, s.dim_k, &rows);
        }
        for unit in &mut self.k_unit {
            *unit *= 1.0 / PEAK;
        }
        for i in 0..n {
            let row = &mut self.v[i][..s.dim_v];
            v(i, row);
            self.v_unit[i] = row.iter().fold(0.0f32, |m, x| if x.abs() > m { x.abs() } else { m }) * (1.0 / PEAK);
        }
    }

    #[inline(always)]
    fn aligned<S: Simd>(&mut self, s: &Shape, tile: &aligned::Tile, n: usize) {
        let (half_k, half_v, pk, pv) = (s.dim_k / 2, s.dim_v / 2, s.planes_k, s.planes_v);
        self.left_k = LEFT[pk] + tile.meta.slack;
        self.left_v = LEFT[pv];
        // Scores go over whole lanes of channels: none of them may be what was in the memory before.
        self.k_unit = [0.0; MAX_DIM];
        for (unit, &u) in self.k_unit.iter_mut().zip(tile.k_scales) {
            *unit = scale(u);
        }
        let mut rest = [[0.0f32; MAX_DIM]; 16];
        for first in (0..n).step_by(16) {
            let count = (n - first).min(16);
            for (i, row) in rest[..count].iter_mut().enumerate() {
                math::unpack::<S>(tile.k_row(first + i), half_k, pk - 1, 1.0 / 16.0, CENTRE[pk], &mut row[..s.dim_k]);
            }
            self.put_k(first, s.dim_k, &rest);
            // Plane 0 lies by words of 16 tokens: lanes are tokens already.
            let block = &tile.k0[first * half_k..(first + 16) * half_k];
            for (b, line) in (0..half_k).step_by(4).zip(block.chunks_exact(64)) {
                for j in 0..4 {
                    let (low, high) = (b + j, b + j + half_k);
                    let (low_unit, high_unit) = (self.k_unit[low], self.k_unit[high]);
                    for t in 0..16 {
                        let byte = i32::from(line[4 * t + j]);
                        let x = &mut self.k[low][first + t];
                        *x = (((byte & 15) - 8) as f32 + *x) * low_unit;
                        let x = &mut self.k[high][first + t];
                        *x = (((byte >> 4) - 8) as f32 + *x) * high_unit;
                    }
                }
            }
        }
        for i in 0..n {
            let unit = scale(tile.v_scales[i]);
            let row = &mut self.v[i][..s.dim_v];
            math::unpack::<S>(tile.v_row(i), half_v, pv, 1.0, CENTRE[pv], row);
            for x in row {
                *x *= unit;
            }
            self.v_unit[i] = unit;
        }
    }

    /// Products of R query heads with the first `blocks` * 16 tokens of the tile: K is read once for all of them.
    #[inline(always)]
    fn products<S: Simd, const R: usize>(&self, q: [&[f32]; R], blocks: usize, s: &mut [Lane128]) {
        let d = q[0].len();
        // Chains of an eighth of the channels: rounding errors do not pile up over all of them.
        let part = d.div_ceil(8);
        for b in 0..blocks {
            let mut sums = [S::splat(0.0); R];
            let mut first = 0;
            while first < d {
                let last = (first + part).min(d);
                let mut chains = [S::splat(0.0); R];
                for (c, k) in self.k[first..last].iter().enumerate() {
                    let k = S::load(&math::blocks(k)[b]);
                    for (chain, q) in chains.iter_mut().zip(&q) {
                        *chain = chain.add(k.mul(S::splat(q[first + c])));
                    }
                }
                for (sum, chain) in sums.iter_mut().zip(chains) {
                    *sum = sum.add(chain);
                }
                first = last;
            }
            for (sum, s) in sums.into_iter().zip(s.iter_mut()) {
                sum.store(&mut math::blocks_mut(s)[b]);
            }
        }
    }

    /// What scores of a query head are uncertain by.
    #[inline(always)]
    fn uncertain<S: Simd>(&self, q: &[f32]) -> Uncertain {
        let (mut worst, mut square) = (S::splat(0.0), S::splat(0.0));
        for (q, unit) in q.chunks(LANES).zip(self.k_unit.as_chunks().0) {
            let mut block = [0.0; LANES];
            block[..q.len()].copy_from_slice(q);
            let f = S::load(&block).mul(S::load(unit)).abs();
            worst = worst.add(f);
            square = square.add(f.mul(f));
        }
        let (worst, square) = (worst.sum(), square.sum());
        // Scores are at most this: if it overflows, so must the bound.
        let reach = worst * (1.0 + 1e-5) * PEAK;
        Uncertain {
            bound: reach * ((self.left_k + score_rounding(q.len())) / PEAK),
            rms: square.sqrt() * self.left_k * 0.577_350_3,
            reach,
        }
    }

    /// Adds the tokens `seen` with logits `s` to a row's sums; `e` gets their weights.
    #[inline(always)]
    fn weigh<S: Simd>(
        &self,
        s: &Lane128,
        error: ScoreError,
        seen: u128,
        sums: &mut Sums,
        out: &mut [f32],
        e: &mut Lane128,
    ) {
        raise(sums, math::max::<S>(s), out);
        math::weights::<S>(s, sums.max, e);
        let tokens = math::sums::<S>(e, &self.v_unit);
        sums.add_scores(error, tokens);
        sums.add_values(self.left_v, 0.0, tokens);
        sums.note(seen.count_ones() as usize, math::max_of(&self.v_unit, seen) * PEAK);
    }

    /// Adds V of the first `n` tokens to R outputs, `[R][dim_v]`: it is read once for all of them.
    #[inline(always)]
    fn add_values<S: Simd, const R: usize>(&self, e: &[Lane128], n: usize, outs: &mut [f32]) {
        let d = outs.len() / R;
        let mut at = 0;
        while at < d {
            let count = LANES.min(d - at);
            let mut sums = [S::splat(0.0); R];
            for i in 0..n {
                // Channels beyond dim_v may hold anything: their sums are not stored.
                let v = S::load(&self.v[i].as_chunks().0[at / LANES]);
                for (sum, e) in sums.iter_mut().zip(e) {
                    *sum = sum.add(v.mul(S::splat(e[i])));
                }
            }
            for (r, sum) in sums.into_iter().enumerate() {
                let mut lanes = [0.0; LANES];
                sum.store(&mut lanes);
                for (x, sum) in outs[r * d + at..][..count].iter_mut().zip(lanes) {
                    *x += sum;
                }
            }
            at += LANES;
        }
    }
}

/// Makes `max` the reference of sums and output if it is larger than theirs.
#[inline(always)]
fn raise(sums: &mut Sums, max: f32, out: &mut [f32]) {
    if max > sums.max {
        let (factor, _) = sums.merge(&Sums::at(max));
        for x in out {
            *x *= factor as f32;
        }
    }
}

/// One split of a block of query rows of one KV head.
#[inline(always)]
pub fn split<S: Simd>(w: &mut Worker, unit: &Unit, split: usize) {
    let (call, g) = (w.call, w.call.shape.group());
    let view = &call.sequences[call.rows[unit.row].sequence];
    w.load_q(unit);
    let (sums, outs) = w.state(unit, split);
    sums.fill(Sums::EMPTY);
    outs.fill(0.0);
    let (first, last) = unit.tiles(split);
    let rows = unit.row..unit.row + unit.n_rows;
    // The exact rows come first, as a tile of their own.
    let exact = split == 0 && unit.from < view.n_exact;
    for tile in (if exact { -1 } else { 0 }..(last - first) as isize).map(|t| t.max(-1)) {
        let is_exact = tile < 0;
        let tile = if is_exact { 0 } else { first + tile as usize };
        let seen = |row: usize| match is_exact {
            true => seen_exact(call, row, view),
            false => seen_paged(call, row, view, tile),
        };
        let mut any = 0;
        for row in rows.clone() {
            let seen = seen(row);
            any |= seen;
            if seen != 0 {
                w.stats.count_dense(view, is_exact, seen.count_ones() as usize);
            }
        }
        if any == 0 {
            continue;
        }
        let n = TILE - any.leading_zeros() as usize;
        if is_exact {
            w.scratch.tile.exact::<S>(view, unit.kv_head);
        } else {
            w.scratch.tile.page::<S>(view, tile, unit.kv_head, n);
        }
        let mut at = 0;
        while at < unit.n_rows * g {
            let seen: [u128; HEADS] = std::array::from_fn(|i| match at + i < unit.n_rows * g {
                true => seen(unit.row + (at + i) / g),
                false => 0,
            });
            if seen == [0; HEADS] {
                at += HEADS;
            } else if at + HEADS <= unit.n_rows * g {
                heads::<S, HEADS>(w, unit, at, tile, &seen, n, sums, outs);
                at += HEADS;
            } else {
                heads::<S, 1>(w, unit, at, tile, &seen, n, sums, outs);
                at += 1;
            }
        }
    }
}

/// Query heads that share what is read of a decoded tile.
const HEADS: usize = 4;

/// R query heads of a unit's rows from number `at` on, over the first `n` tokens of the tile that is decoded; `seen`: what
/// each of them sees.
#[inline(always)]
#[allow(clippy::too_many_arguments)]
fn heads<S: Simd, const R: usize>(
    w: &mut Worker,
    unit: &Unit,
    at: usize,
    tile: usize,
    seen: &[u128],
    n: usize,
    sums: &mut [Sums],
    outs: &mut [f32],
) {
    let (call, g) = (w.call, w.call.shape.group());
    let (d, dv) = (call.shape.dim_k, call.shape.dim_v);
    let (mut s, mut e, mut bent) = ([[0.0; TILE]; R], [[0.0; TILE]; R], [0.0; TILE]);
    let q: [&[f32]; R] = std::array::from_fn(|i| &w.scratch.q[(at + i) * d..(at + i + 1) * d]);
    w.scratch.tile.products::<S, R>(q, n.div_ceil(LANES), &mut s);
    for i in 0..R {
        if seen[i] == 0 {
            continue;
        }
        let (row, head) = (unit.row + (at + i) / g, unit.kv_head * g + (at + i) % g);
        math::hide::<S>(&mut s[i], seen[i]);
        let mut error = w.scratch.tile.uncertain::<S>(&w.scratch.q[(at + i) * d..(at + i + 1) * d]);
        w.check(error.bound, math::max::<S>(&s[i]));
        error.bound += bend_error(call, row, head, tile, error.reach);
        let logits = logits::<S>(call, row, head, tile, &s[i], &mut bent);
        let out = &mut outs[(at + i) * dv..(at + i + 1) * dv];
        w.scratch.tile.weigh::<S>(logits, error.score(), seen[i], &mut sums[at + i], out, &mut e[i]);
    }
    w.scratch.tile.add_values::<S, R>(&e, n, &mut outs[at * dv..(at + R) * dv]);
}
