//! Dense attention: every stored digit of every visible row. A tile is decoded once for a block of query rows; a few heads
//! of a few query rows read rows that lie as given where they are (`super::rows`). Which of the two it is, and every bit of
//! a row's result, depends on neither the other rows of the block nor on where it begins.

use super::fold::score_rounding;
use super::math::{self, Lane128};
use super::rows::{self, Given};
use super::simd::{LANES, Simd};
use super::unit::{Unit, Worker, bend_error, logits, overflows, seen_exact, seen_paged};
use crate::alignment::{ScoreError, Sums};
use crate::backend::Attention;
use crate::cache::SequenceView;
use crate::format::{CENTRE, Format, LEFT, MAX_LATENT, PEAK, Rows, Shape, TILE, aligned, published, raw, scale};

/// What scores of a tile are uncertain by, and at most.
#[derive(Debug, Clone, Copy)]
pub struct Uncertain {
    pub bound: f32,
    pub rms: f32,
    pub reach: f32,
}

impl Uncertain {
    /// Of scores that float rounding alone makes uncertain; `worst` = sum of |q| * max|k|.
    #[inline(always)]
    pub fn rounding(worst: f32, rounding: f32) -> Uncertain {
        let reach = worst * (1.0 + 1e-5);
        Uncertain { bound: reach * (rounding / PEAK), rms: 0.0, reach }
    }

    pub fn score(&self) -> ScoreError {
        ScoreError { bound: self.bound, rms: self.rms }
    }
}

/// A tile in f32, K by channels (so that lanes are tokens), and what its values are uncertain by.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
pub struct Decoded {
    k: [Lane128; MAX_LATENT],
    v: [[f32; MAX_LATENT]; TILE],
    /// Per channel: K is known to `left_k` times this, and |k| is at most PEAK times this.
    k_unit: [f32; MAX_LATENT],
    /// Per token: the same of V.
    pub v_unit: Lane128,
    left_k: f32,
    left_v: f32,
    /// Of 16 tokens, on their way into `k`.
    rows: [[f32; MAX_LATENT]; LANES],
}

impl Decoded {
    /// The rows that are kept as given, as a tile of their own.
    #[inline(always)]
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

    /// The 16 rows of K, turned so that lanes are tokens. (The last vector's channels may go beyond `d`, and there may be fewer
    /// rows: nobody asks for what was in the memory before.)
    #[inline(always)]
    fn put_k<S: Simd>(&mut self, first: usize, d: usize) {
        for b in 0..d.div_ceil(LANES) {
            let mut block = [S::splat(0.0); LANES];
            for i in 0..LANES {
                block[i] = S::load(&self.rows[i].as_chunks().0[b]);
            }
            let turned = S::transpose(&block);
            for i in 0..LANES {
                turned[i].store(&mut math::blocks_mut(&mut self.k[b * LANES + i])[first / LANES]);
            }
        }
    }

    /// Rows that are known exactly.
    #[inline(always)]
    fn rows<S: Simd>(&mut self, s: &Shape, n: usize, k: impl Fn(usize, &mut [f32]), v: impl Fn(usize, &mut [f32])) {
        (self.left_k, self.left_v) = (0.0, 0.0);
        self.k_unit = [0.0; MAX_LATENT];
        for first in (0..n).step_by(16) {
            let count = (n - first).min(16);
            for (i, row) in self.rows[..count].iter_mut().enumerate() {
                k(first + i, &mut row[..s.dim_k]);
                for (unit, x) in self.k_unit.iter_mut().zip(&row[..s.dim_k]) {
                    *unit = if x.abs() > *unit { x.abs() } else { *unit };
                }
            }
            self.put_k::<S>(first, s.dim_k);
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
        let (half_k, half_v, pk, pv) = (s.dim_k / 2, s.dim_v / 2, tile.known_k(), tile.known_v());
        self.left_k = LEFT[pk] + tile.meta.slack;
        self.left_v = LEFT[pv];
        // Scores go over whole lanes of channels: none of them may be what was in the memory before.
        self.k_unit = [0.0; MAX_LATENT];
        for (unit, &u) in self.k_unit.iter_mut().zip(tile.k_scales) {
            *unit = scale(u);
        }
        for first in (0..n).step_by(16) {
            let count = (n - first).min(16);
            for (i, row) in self.rows[..count].iter_mut().enumerate() {
                math::unpack::<S>(tile.k_row(first + i), half_k, pk - 1, 1.0 / 16.0, CENTRE[pk], &mut row[..s.dim_k]);
            }
            self.put_k::<S>(first, s.dim_k);
            // Plane 0 lies by words of 16 tokens: lanes are tokens already.
            let block = &tile.k0[first * half_k..(first + 16) * half_k];
            for (b, line) in (0..half_k).step_by(4).zip(block.chunks_exact(64)) {
                for j in 0..4 {
                    for (c, shift) in [(b + j, 8 * j), (b + j + half_k, 8 * j + 4)] {
                        let mut digits = [0; LANES];
                        for t in 0..LANES {
                            let word = [line[4 * t], line[4 * t + 1], line[4 * t + 2], line[4 * t + 3]];
                            digits[t] = (u32::from_le_bytes(word) >> shift & 15) as i32 - 8;
                        }
                        let k = &mut math::blocks_mut(&mut self.k[c])[first / LANES];
                        S::from_i32(&digits).add(S::load(k)).mul(S::splat(self.k_unit[c])).store(k);
                    }
                }
            }
        }
        if s.v_is_prefix {
            return self.v_of_k::<S>(s.dim_v, n);
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

    /// V of the first `n` tokens, which is a part of K. Every token's is known as well as the least known channel.
    #[inline(always)]
    fn v_of_k<S: Simd>(&mut self, dim: usize, n: usize) {
        for first in (0..n).step_by(LANES) {
            for at in (0..dim).step_by(LANES) {
                let mut block = [S::splat(0.0); LANES];
                for i in 0..LANES {
                    block[i] = S::load(&math::blocks(&self.k[at + i])[first / LANES]);
                }
                let turned = S::transpose(&block);
                for i in 0..LANES {
                    turned[i].store(&mut self.v[first + i].as_chunks_mut().0[at / LANES]);
                }
            }
        }
        let unit = self.k_unit[..dim].iter().fold(0.0f32, |m, &unit| m.max(unit));
        self.v_unit[..n].fill(unit);
        self.left_v = self.left_k;
    }

    /// Products of R query heads with the first `blocks` * 16 tokens of the tile: K is read once for all of them.
    #[inline(always)]
    fn products<S: Simd, const R: usize>(&self, q: [&[f32]; R], blocks: usize, s: &mut [Lane128]) {
        let mut b = 0;
        while b < blocks {
            b += match blocks - b {
                4.. if S::WIDE && R <= 4 => self.products_of::<S, R, 4>(q, b, s),
                2.. if S::WIDE => self.products_of::<S, R, 2>(q, b, s),
                _ => self.products_of::<S, R, 1>(q, b, s),
            };
        }
    }

    /// B blocks of 16 tokens at a time, from `first_block` on.
    #[inline(always)]
    fn products_of<S: Simd, const R: usize, const B: usize>(
        &self,
        q: [&[f32]; R],
        first_block: usize,
        s: &mut [Lane128],
    ) -> usize {
        let d = q[0].len();
        // Chains of an eighth of the channels: rounding errors do not pile up over all of them.
        let part = d.div_ceil(8);
        let mut sums = [[S::splat(0.0); B]; R];
        let mut first = 0;
        while first < d {
            let last = (first + part).min(d);
            let mut part = [&q[0][first..last]; R];
            for r in 1..R {
                part[r] = &q[r][first..last];
            }
            let mut chains = [[S::splat(0.0); B]; R];
            for c in 0..last - first {
                let mut k = [S::splat(0.0); B];
                for b in 0..B {
                    k[b] = S::load(&math::blocks(&self.k[first + c])[first_block + b]);
                }
                for r in 0..R {
                    let q = S::splat(part[r][c]);
                    for b in 0..B {
                        chains[r][b] = k[b].fma(q, chains[r][b]);
                    }
                }
            }
            for r in 0..R {
                for b in 0..B {
                    sums[r][b] = sums[r][b].add(chains[r][b]);
                }
            }
            first = last;
        }
        for r in 0..R {
            for b in 0..B {
                sums[r][b].store(&mut math::blocks_mut(&mut s[r])[first_block + b]);
            }
        }
        B
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
            square = f.fma(f, square);
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

    /// Adds V of the first `n` tokens to R outputs, `[R][dim_v]`: it is read once for all of them.
    #[inline(always)]
    fn add_values<S: Simd, const R: usize>(&self, e: &[Lane128; R], n: usize, outs: &mut [f32]) {
        let (mut b, last) = (0, (outs.len() / R).div_ceil(LANES));
        while b < last {
            b += match last - b {
                4.. if S::WIDE && R <= 4 => self.add_vectors::<S, R, 4>(e, n, b, outs),
                2.. if S::WIDE => self.add_vectors::<S, R, 2>(e, n, b, outs),
                _ => self.add_vectors::<S, R, 1>(e, n, b, outs),
            };
        }
    }

    /// B vectors of every row at a time, from `first` on.
    #[inline(always)]
    fn add_vectors<S: Simd, const R: usize, const B: usize>(
        &self,
        e: &[Lane128; R],
        n: usize,
        first: usize,
        outs: &mut [f32],
    ) -> usize {
        let mut sums = [[S::splat(0.0); B]; R];
        for i in 0..n {
            // Channels beyond dim_v may hold anything: their sums are not stored.
            let mut v = [S::splat(0.0); B];
            for b in 0..B {
                v[b] = S::load(&self.v[i].as_chunks().0[first + b]);
            }
            for r in 0..R {
                let e = S::splat(e[r][i]);
                for b in 0..B {
                    sums[r][b] = v[b].fma(e, sums[r][b]);
                }
            }
        }
        let d = outs.len() / R;
        // By themselves: the sums stay in registers only if every index is a constant.
        let mut lanes = [[[0.0; LANES]; B]; R];
        for r in 0..R {
            for b in 0..B {
                sums[r][b].store(&mut lanes[r][b]);
            }
        }
        for (out, lanes) in outs.chunks_exact_mut(d).zip(&lanes) {
            for (x, sum) in out[first * LANES..].iter_mut().zip(lanes.as_flattened()) {
                *x += sum;
            }
        }
        B
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

/// Adds the tokens `seen` with logits `s` to a row's sums; `e` gets their weights. V is known to `left_v` times `v_unit`.
#[inline(always)]
#[allow(clippy::too_many_arguments)]
fn weigh<S: Simd>(
    v_unit: &Lane128,
    left_v: f32,
    s: &Lane128,
    error: ScoreError,
    seen: u128,
    sums: &mut Sums,
    out: &mut [f32],
    e: &mut Lane128,
) {
    raise(sums, math::max::<S>(s), out);
    math::weights::<S>(s, sums.max, e);
    let tokens = math::sums::<S>(e, v_unit);
    sums.add_scores(error, tokens);
    sums.add_values(left_v, 0.0, tokens);
    sums.note(seen.count_ones() as usize, math::max_of::<S>(v_unit, seen) * PEAK);
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
    let (rows, n_heads) = (unit.row..unit.row + unit.n_rows, unit.n_rows * g);
    let few = g <= rows::HEADS && !call.rows[unit.row].many;
    // The exact rows come first, as a tile of their own.
    let exact = split == 0 && unit.first() < view.n_exact;
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
        let page = |tile: usize| if few && !is_exact { Given::page(view, tile, unit.kv_head) } else { None };
        let next = |tile: usize| if tile < last { page(tile) } else { None };
        let given = page(tile).map(|given| Asked { given, next: next(tile + 1) });
        if is_exact {
            w.scratch.tile.exact::<S>(view, unit.kv_head);
        } else if given.is_none() {
            // Peaks of rows as given are of the tile, whoever sees them.
            let whole = TILE.min(view.len - tile * TILE);
            let lossy = view.layout.format == Format::Aligned && view.attached.is_none();
            w.scratch.tile.page::<S>(view, tile, unit.kv_head, if lossy { n } else { whole });
        }
        let mut at = 0;
        while at < n_heads {
            if let Some(asked) = &given {
                // A row at a time, so that what it sees is all that counts.
                let (seen, left) = (seen(unit.row + at / g), g - at % g);
                let n = TILE - seen.leading_zeros() as usize;
                let block = Block { at, tile, seen: &[seen; HEADS], any: seen, n };
                at += match left {
                    _ if seen == 0 => left,
                    4.. => given_heads::<S, 4>(w, unit, block, asked, sums, outs),
                    3 => given_heads::<S, 3>(w, unit, block, asked, sums, outs),
                    2 => given_heads::<S, 2>(w, unit, block, asked, sums, outs),
                    _ => given_heads::<S, 1>(w, unit, block, asked, sums, outs),
                };
                continue;
            }
            let left = n_heads - at;
            let seen: [u128; HEADS] = std::array::from_fn(|i| match i < left {
                true => seen(unit.row + (at + i) / g),
                false => 0,
            });
            let block = Block { at, tile, seen: &seen, any, n };
            at += match left {
                _ if seen == [0; HEADS] => HEADS,
                8.. if S::WIDE => heads::<S, 8>(w, unit, block, sums, outs),
                4.. => heads::<S, 4>(w, unit, block, sums, outs),
                _ => heads::<S, 1>(w, unit, block, sums, outs),
            };
        }
    }
}

/// Most query heads that share what is read of a tile.
const HEADS: usize = 8;

/// Query heads of a unit's rows from number `at` on; `seen`: what each of them sees of the tile, and `any` of the unit,
/// which is below `n`.
#[derive(Clone, Copy)]
struct Block<'a> {
    at: usize,
    tile: usize,
    seen: &'a [u128; HEADS],
    any: u128,
    n: usize,
}

/// Rows as given, and those that come next.
struct Asked<'a> {
    given: Given<'a>,
    next: Option<Given<'a>>,
}

/// R query heads over the tile that is decoded.
#[inline(always)]
fn heads<S: Simd, const R: usize>(
    w: &mut Worker,
    unit: &Unit,
    block: Block,
    sums: &mut [Sums],
    outs: &mut [f32],
) -> usize {
    let (at, d, dv) = (block.at, w.call.shape.dim_k, w.call.shape.dim_v);
    let (mut s, mut e) = ([[0.0; TILE]; R], [[0.0; TILE]; R]);
    let q: [&[f32]; R] = std::array::from_fn(|i| &w.scratch.q[(at + i) * d..(at + i + 1) * d]);
    let tile = &*w.scratch.tile;
    tile.products::<S, R>(q, block.n.div_ceil(LANES), &mut s);
    let mut error = [Uncertain { bound: 0.0, rms: 0.0, reach: 0.0 }; R];
    for i in 0..R {
        error[i] = tile.uncertain::<S>(q[i]);
    }
    let (v_unit, left_v) = (&tile.v_unit, tile.left_v);
    w.overflow |= weights::<S, R>(w.call, unit, block, v_unit, left_v, error, &mut s, sums, outs, &mut e);
    tile.add_values::<S, R>(&e, block.n, &mut outs[at * dv..(at + R) * dv]);
    R
}

/// R query heads over rows as given.
#[inline(always)]
fn given_heads<S: Simd, const R: usize>(
    w: &mut Worker,
    unit: &Unit,
    block: Block,
    asked: &Asked,
    sums: &mut [Sums],
    outs: &mut [f32],
) -> usize {
    let Block { at, any, n, .. } = block;
    let (d, dv) = (w.call.shape.dim_k, w.call.shape.dim_v);
    let (mut s, mut e, mut v_unit) = ([[0.0; TILE]; R], [[0.0; TILE]; R], [0.0; TILE]);
    let q: [&[f32]; R] = std::array::from_fn(|i| &w.scratch.q[(at + i) * d..(at + i + 1) * d]);
    let peaks = asked.given.products::<S, R>(q, any, n, &mut s);
    asked.given.v_unit::<S>(any, n, &mut v_unit);
    let mut error = [Uncertain { bound: 0.0, rms: 0.0, reach: 0.0 }; R];
    for i in 0..R {
        error[i] = rows::uncertain::<S>(q[i], &peaks);
    }
    w.overflow |= weights::<S, R>(w.call, unit, block, &v_unit, 0.0, error, &mut s, sums, outs, &mut e);
    asked.given.add_values::<S, R>(&e, any, n, asked.next.as_ref(), &mut outs[at * dv..(at + R) * dv]);
    R
}

/// Adds R query heads, whose scores are `s`, to their sums; `e` gets their weights. True if scores have left binary32.
#[inline(always)]
#[allow(clippy::too_many_arguments)]
fn weights<S: Simd, const R: usize>(
    call: &Attention,
    unit: &Unit,
    block: Block,
    v_unit: &Lane128,
    left_v: f32,
    error: [Uncertain; R],
    s: &mut [Lane128; R],
    sums: &mut [Sums],
    outs: &mut [f32],
    e: &mut [Lane128; R],
) -> bool {
    let (g, dv, tile) = (call.shape.group(), call.shape.dim_v, block.tile);
    let (mut bent, mut overflow) = ([0.0; TILE], false);
    for i in 0..R {
        let (seen, at, mut error) = (block.seen[i], block.at + i, error[i]);
        if seen == 0 {
            continue;
        }
        let (row, head) = (unit.row + at / g, unit.kv_head * g + at % g);
        math::hide::<S>(&mut s[i], seen);
        let max = math::max::<S>(&s[i]);
        error.bound += bend_error(call, row, head, tile, error.reach);
        overflow |= overflows(error.bound, max);
        let logits = logits::<S>(call, row, head, tile, &s[i], &mut bent);
        let out = &mut outs[at * dv..(at + 1) * dv];
        weigh::<S>(v_unit, left_v, logits, error.score(), seen, &mut sums[at], out, &mut e[i]);
    }
    overflow
}
