//! Dense attention of a few query heads over rows that lie as they were given: straight from their bytes, each converted
//! once for up to four heads. More heads in all than [`HEADS`] are better served by a decoded tile.

use super::dense::Uncertain;
use super::fold::score_rounding;
use super::math::{self, Lane128};
use super::simd::{Kernel, LANES, Simd, prefetch};
use crate::cache::SequenceView;
use crate::format::{Dtype, Format, MAX_DIM, PEAK, Rows, TILE, raw};
use half::{bf16, f16};
use std::marker::PhantomData;

/// Most query heads of a KV head.
pub const HEADS: usize = 8;

/// Bytes of a cache line.
const LINE: usize = 64;

/// The vectors of a row.
pub type Vectors = [[f32; LANES]; MAX_DIM / LANES];

/// Elements of rows.
trait Element: Copy {
    fn load<S: Simd>(x: &[Self; LANES]) -> S;
}

impl Element for f32 {
    #[inline(always)]
    fn load<S: Simd>(x: &[f32; LANES]) -> S {
        S::load(x)
    }
}

impl Element for f16 {
    #[inline(always)]
    fn load<S: Simd>(x: &[f16; LANES]) -> S {
        S::from_f16(x)
    }
}

impl Element for bf16 {
    #[inline(always)]
    fn load<S: Simd>(x: &[bf16; LANES]) -> S {
        S::from_bf16(x)
    }
}

/// Where vector `b` of a row starts. The last one ends with the row: it may begin within the one before.
#[inline(always)]
fn start(b: usize, dim: usize) -> usize {
    (b * LANES).min(dim - LANES)
}

/// What stands for rows that nobody sees: they may never have been written.
static NOTHING: [f32; MAX_DIM] = [0.0; MAX_DIM];

/// Rows of one KV head, at least LANES elements each, and which of a tile are seen.
#[derive(Clone, Copy)]
struct Side<'a> {
    rows: Rows<'a>,
    head: usize,
}

impl<'a> Side<'a> {
    /// The rows that are `some`, zeros for others.
    #[inline(always)]
    fn tile<E: Element>(&self, some: u128) -> Tile<'a, E> {
        let mut start = [NOTHING.as_ptr().cast::<E>(); TILE];
        for (b, start) in start.as_chunks_mut::<LANES>().0.iter_mut().enumerate() {
            let bits = (some >> (b * LANES)) as u16;
            for (i, start) in start.iter_mut().enumerate() {
                if bits >> i & 1 == 1 {
                    *start = self.rows.address(b * LANES + i, self.head).cast();
                }
            }
        }
        Tile { start, dim: self.rows.dim(), _memory: PhantomData }
    }

    /// Its lines, from the first row on.
    #[inline(always)]
    fn ahead(&self) -> Ahead {
        let row = self.rows.address(0, self.head);
        let stride = (self.rows.address(1, self.head) as usize).wrapping_sub(row as usize);
        Ahead { row, stride, at: 0, width: self.rows.dim() * self.rows.dtype().size() }
    }
}

/// Lines to ask for, one after another: in the order that prefetchers of hardware follow too.
#[derive(Clone, Copy)]
struct Ahead {
    row: *const u8,
    stride: usize,
    at: usize,
    width: usize,
}

impl Ahead {
    /// Asks for `n`.
    #[inline(always)]
    fn ask(&mut self, n: usize) {
        for _ in 0..n {
            prefetch(self.row.wrapping_add(self.at));
            self.at += LINE;
            if self.at >= self.width {
                (self.row, self.at) = (self.row.wrapping_add(self.stride), 0);
            }
        }
    }
}

/// Where the rows of a tile start.
struct Tile<'a, E> {
    start: [*const E; TILE],
    dim: usize,
    _memory: PhantomData<&'a E>,
}

impl<E: Element> Tile<'_, E> {
    /// Vectors of a row.
    #[inline(always)]
    fn vectors(&self) -> usize {
        self.dim.div_ceil(LANES)
    }

    /// The vector of row `i` from element `at` on.
    ///
    /// # Safety
    /// It ends within `dim`.
    #[inline(always)]
    unsafe fn load<S: Simd>(&self, i: usize, at: usize) -> S {
        // SAFETY: the contract. The row is borrowed, of this type, and written (only rows that are seen are asked for)
        // or zeros, of which there are enough for any.
        E::load(unsafe { &*self.start[i].add(at).cast::<[E; LANES]>() })
    }
}

/// A tile of one KV head as given.
#[derive(Clone, Copy)]
pub struct Given<'a> {
    k: Side<'a>,
    v: Side<'a>,
}

impl<'a> Given<'a> {
    fn new(k: Rows<'a>, v: Rows<'a>, head: usize) -> Option<Given<'a>> {
        let vectors = k.dim() >= LANES && v.dim() >= LANES && k.dim() <= MAX_DIM;
        vectors.then_some(Given { k: Side { rows: k, head }, v: Side { rows: v, head } })
    }

    /// A tile's, unless it has digits.
    pub fn page(view: &SequenceView<'a>, tile: usize, kv_head: usize) -> Option<Given<'a>> {
        if let Some((k, v)) = view.attached {
            return Given::new(k.skip(tile * TILE), v.skip(tile * TILE), kv_head);
        }
        if view.layout.format != Format::Raw {
            return None;
        }
        let t = raw::Tile::new(&view.layout.shape, view.layout.part(view.page(tile), kv_head));
        Given::new(t.k, t.v, 0)
    }

    /// Products of R query heads with the tokens `some`, which are all below `n`, and the largest |k| of every channel.
    /// V is asked for.
    pub fn products<S: Simd, const R: usize>(
        &self,
        q: [&[f32]; R],
        some: u128,
        n: usize,
        s: &mut [Lane128; R],
    ) -> Vectors {
        let (mut vectors, mut peaks) = ([[[0.0; LANES]; MAX_DIM / LANES]; R], [[0.0; LANES]; MAX_DIM / LANES]);
        for r in 0..R {
            turned(q[r], &mut vectors[r]);
        }
        let (q, k, v, peaks_out) = (&vectors, &self.k, &self.v, &mut peaks);
        match self.k.rows.dtype() {
            Dtype::F32 => S::enter(Products { q, k: &k.tile::<f32>(some), v, n, s, peaks: peaks_out }),
            Dtype::F16 => S::enter(Products { q, k: &k.tile::<f16>(some), v, n, s, peaks: peaks_out }),
            Dtype::Bf16 => S::enter(Products { q, k: &k.tile::<bf16>(some), v, n, s, peaks: peaks_out }),
        }
        peaks
    }

    /// max|v| of the tokens `some`, all below `n`, in units of PEAK; 0 of others.
    pub fn v_unit<S: Simd>(&self, some: u128, n: usize, unit: &mut Lane128) {
        match self.v.rows.dtype() {
            Dtype::F32 => S::enter(Peaks { v: &self.v.tile::<f32>(some), n, unit }),
            Dtype::F16 => S::enter(Peaks { v: &self.v.tile::<f16>(some), n, unit }),
            Dtype::Bf16 => S::enter(Peaks { v: &self.v.tile::<bf16>(some), n, unit }),
        }
    }

    /// Adds V of the tokens `some`, all below `n`, to R outputs, `[R][dim_v]`. K of the tile `next` is asked for.
    pub fn add_values<S: Simd, const R: usize>(
        &self,
        e: &[Lane128; R],
        some: u128,
        n: usize,
        next: Option<&Given>,
        outs: &mut [f32],
    ) {
        // Without another the same: it is there.
        let next = &next.unwrap_or(self).k;
        match self.v.rows.dtype() {
            Dtype::F32 => S::enter(Values { v: &self.v.tile::<f32>(some), e, n, next, outs }),
            Dtype::F16 => S::enter(Values { v: &self.v.tile::<f16>(some), e, n, next, outs }),
            Dtype::Bf16 => S::enter(Values { v: &self.v.tile::<bf16>(some), e, n, next, outs }),
        }
    }
}

/// `q` as the vectors of a row lie: what is in two of them counts once.
#[inline(always)]
fn turned(q: &[f32], vectors: &mut Vectors) {
    for b in 0..q.len().div_ceil(LANES) {
        let twice = b * LANES - start(b, q.len());
        vectors[b][twice..].copy_from_slice(&q[b * LANES..][..LANES - twice]);
    }
}

/// What scores of a query head are uncertain by: K is known exactly.
#[inline(always)]
pub fn uncertain<S: Simd>(q: &[f32], peaks: &Vectors) -> Uncertain {
    let (mut vectors, mut worst) = ([[0.0; LANES]; MAX_DIM / LANES], S::splat(0.0));
    turned(q, &mut vectors);
    for b in 0..q.len().div_ceil(LANES) {
        worst = S::load(&vectors[b]).abs().fma(S::load(&peaks[b]), worst);
    }
    Uncertain::rounding(worst.sum(), score_rounding(q.len()))
}

struct Products<'a, 'b, E, const R: usize> {
    q: &'a [Vectors; R],
    k: &'a Tile<'b, E>,
    v: &'a Side<'b>,
    n: usize,
    s: &'a mut [Lane128; R],
    peaks: &'a mut Vectors,
}

impl<E: Element, const R: usize> Kernel for Products<'_, '_, E, R> {
    #[inline(always)]
    fn run<S: Simd>(mut self) {
        let mut ahead = self.v.ahead();
        for first in (0..self.n).step_by(LANES) {
            let mut sums = [[S::splat(0.0); LANES]; R];
            for i in (0..LANES).step_by(if S::WIDE { 4 } else { 1 }) {
                if S::WIDE {
                    self.some::<S, 4>(first, i, &mut ahead, &mut sums);
                } else {
                    self.some::<S, 1>(first, i, &mut ahead, &mut sums);
                }
            }
            for r in 0..R {
                S::fold_rows(&sums[r], S::add).store(&mut math::blocks_mut(&mut self.s[r])[first / LANES]);
            }
        }
    }
}

impl<E: Element, const R: usize> Products<'_, '_, E, R> {
    /// T rows, from `i` of the 16 from `first` on: q is loaded once for them.
    #[inline(always)]
    fn some<S: Simd, const T: usize>(&mut self, first: usize, i: usize, ahead: &mut Ahead, sums: &mut [[S; LANES]; R]) {
        let mut chains = [[S::splat(0.0); T]; R];
        for b in 0..self.k.vectors() {
            let at = start(b, self.k.dim);
            ahead.ask((T * LANES * size_of::<E>()).div_ceil(LINE));
            let (mut k, mut peak) = ([S::splat(0.0); T], S::load(&self.peaks[b]));
            for t in 0..T {
                // SAFETY: `start` lets no vector go beyond the row, which has one at least (`Given::new`).
                k[t] = unsafe { self.k.load(first + i + t, at) };
                peak = k[t].abs().max(peak);
            }
            peak.store(&mut self.peaks[b]);
            for r in 0..R {
                let q = S::load(&self.q[r][b]);
                for t in 0..T {
                    chains[r][t] = k[t].fma(q, chains[r][t]);
                }
            }
        }
        for r in 0..R {
            for t in 0..T {
                sums[r][i + t] = chains[r][t];
            }
        }
    }
}

struct Peaks<'a, 'b, E> {
    v: &'a Tile<'b, E>,
    n: usize,
    unit: &'a mut Lane128,
}

impl<E: Element> Kernel for Peaks<'_, '_, E> {
    #[inline(always)]
    fn run<S: Simd>(self) {
        const ROWS: usize = 8;
        for first in (0..self.n).step_by(LANES) {
            let mut peaks = [S::splat(0.0); LANES];
            for i in (0..LANES).step_by(ROWS) {
                let mut some = [S::splat(0.0); ROWS];
                for b in 0..self.v.vectors() {
                    let at = start(b, self.v.dim);
                    for t in 0..ROWS {
                        // SAFETY: `start` lets no vector go beyond the row, which has one at least (`Given::new`).
                        let v: S = unsafe { self.v.load(first + i + t, at) };
                        some[t] = v.abs().max(some[t]);
                    }
                }
                peaks[i..i + ROWS].copy_from_slice(&some);
            }
            let peaks = S::fold_rows(&peaks, S::max).mul(S::splat(1.0 / PEAK));
            peaks.store(&mut math::blocks_mut(self.unit)[first / LANES]);
        }
    }
}

struct Values<'a, 'b, E, const R: usize> {
    v: &'a Tile<'b, E>,
    e: &'a [Lane128; R],
    n: usize,
    next: &'a Side<'b>,
    outs: &'a mut [f32],
}

impl<E: Element, const R: usize> Kernel for Values<'_, '_, E, R> {
    #[inline(always)]
    fn run<S: Simd>(mut self) {
        let (mut at, d, mut ahead) = (0, self.v.dim, self.next.ahead());
        while at < d {
            at += match (d - at) / LANES {
                4.. if S::WIDE => self.vectors::<S, 4>(at, &mut ahead),
                2.. if S::WIDE => self.vectors::<S, 2>(at, &mut ahead),
                _ => self.vectors::<S, 1>(at, &mut ahead),
            };
        }
    }
}

impl<E: Element, const R: usize> Values<'_, '_, E, R> {
    /// B vectors of every row, from channel `at` on. (One that is the last may begin earlier.)
    #[inline(always)]
    fn vectors<S: Simd, const B: usize>(&mut self, at: usize, ahead: &mut Ahead) -> usize {
        let d = self.v.dim;
        let first = at.min(d - B * LANES);
        let mut sums = [[S::splat(0.0); B]; R];
        for i in 0..self.n {
            ahead.ask((B * LANES * size_of::<E>()).div_ceil(LINE));
            let mut v = [S::splat(0.0); B];
            for b in 0..B {
                // SAFETY: B vectors from `first` on end within the row.
                v[b] = unsafe { self.v.load(i, first + b * LANES) };
            }
            for r in 0..R {
                let e = S::splat(self.e[r][i]);
                for b in 0..B {
                    sums[r][b] = v[b].fma(e, sums[r][b]);
                }
            }
        }
        // By themselves: the sums stay in registers only if every index is a constant.
        let mut lanes = [[[0.0; LANES]; B]; R];
        for r in 0..R {
            for b in 0..B {
                sums[r][b].store(&mut lanes[r][b]);
            }
        }
        for (out, lanes) in self.outs.chunks_exact_mut(d).zip(&lanes) {
            for (x, sum) in out[at..].iter_mut().zip(&lanes.as_flattened()[at - first..]) {
                *x += sum;
            }
        }
        B * LANES - (at - first)
    }
}
