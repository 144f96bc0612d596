//! Dense attention of a few query heads over rows that lie as they were given: straight from their bytes, each read once
//! for up to four heads. More heads than [`HEADS`] are better served by a decoded tile.

use super::dense::Uncertain;
use super::fold::score_rounding;
use super::math::{self, Lane128};
use super::simd::{LANES, Simd, prefetch};
use crate::cache::SequenceView;
use crate::format::{Dtype, Format, MAX_DIM, PEAK, Rows, TILE, raw};
use half::{bf16, f16};

/// Most query heads of a unit.
pub const HEADS: usize = 8;

/// Bytes of a cache line.
const LINE: usize = 64;

/// Largest |k| of the tokens seen, by the vectors of a row.
pub type Peaks = [[f32; LANES]; MAX_DIM / LANES];

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

/// What stands for rows that nobody sees: they may never have been written.
static NOTHING: [f32; MAX_DIM] = [0.0; MAX_DIM];

/// Where vector `b` of a row starts. The last one ends with the row: it may begin within the one before.
#[inline(always)]
fn start(b: usize, dim: usize) -> usize {
    (b * LANES).min(dim - LANES)
}

/// Rows of one KV head in a tile.
#[derive(Clone, Copy)]
struct Side<'a> {
    rows: Rows<'a>,
    head: usize,
}

impl<'a> Side<'a> {
    /// The rows that are `some`, zeros for others.
    #[inline(always)]
    fn all<E: Element>(&self, some: u128) -> Tile<'a, E> {
        let mut start = [NOTHING.as_ptr().cast::<E>(); TILE];
        for (b, start) in start.as_chunks_mut::<LANES>().0.iter_mut().enumerate() {
            let bits = (some >> (b * LANES)) as u16;
            for (i, start) in start.iter_mut().enumerate() {
                if bits >> i & 1 == 1 {
                    *start = self.rows.address(b * LANES + i, self.head).cast();
                }
            }
        }
        Tile { start, dim: self.rows.dim(), _memory: std::marker::PhantomData }
    }

    /// Asks for one in `of` lines of row `i`, from line `first` on.
    #[inline(always)]
    fn prefetch(&self, i: usize, first: usize, of: usize) {
        let p = self.rows.address(i, self.head);
        for at in (first * LINE..self.rows.dim() * self.rows.dtype().size()).step_by(of * LINE) {
            prefetch(p.wrapping_add(at));
        }
    }
}

/// Where the rows of a tile start.
struct Tile<'a, E> {
    start: [*const E; TILE],
    dim: usize,
    _memory: std::marker::PhantomData<&'a E>,
}

impl<E: Element> Tile<'_, E> {
    /// Vector `b` of row `i`.
    #[inline(always)]
    fn load<S: Simd>(&self, i: usize, b: usize) -> S {
        // SAFETY: a vector within the row: `start` lets none go beyond `dim`, which is at least LANES (`Given`'s rule).
        // The row is borrowed, of this type, and written (only rows that are seen are asked for) or zeros.
        E::load(unsafe { &*self.start[i].add(start(b, self.dim)).cast::<[E; LANES]>() })
    }
}

/// A tile of one KV head as given; rows have at least LANES elements.
#[derive(Clone, Copy)]
pub struct Given<'a> {
    k: Side<'a>,
    v: Side<'a>,
}

impl<'a> Given<'a> {
    fn new(k: Rows<'a>, v: Rows<'a>, head: usize) -> Option<Given<'a>> {
        let vectors = k.dim() >= LANES && v.dim() >= LANES;
        vectors.then_some(Given { k: Side { rows: k, head }, v: Side { rows: v, head } })
    }

    /// The rows that are kept exactly.
    pub fn exact(view: &SequenceView<'a>, kv_head: usize) -> Option<Given<'a>> {
        view.exact.and_then(|(k, v)| Given::new(k, v, kv_head))
    }

    /// A tile's, unless it has digits.
    #[inline(always)]
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

    /// Products of R query heads with the tokens `some`, which are all below `n`, and the peaks of K. V is asked for.
    #[inline(always)]
    pub fn products<S: Simd, const R: usize>(
        &self,
        q: [&[f32]; R],
        some: u128,
        n: usize,
        s: &mut [Lane128],
        peaks: &mut Peaks,
    ) {
        // As the vectors of a row lie: what is in two of them counts once.
        let d = q[0].len();
        let mut turned = [[[0.0; LANES]; MAX_DIM / LANES]; R];
        for r in 0..R {
            for b in 0..d.div_ceil(LANES) {
                let twice = b * LANES - start(b, d);
                turned[r][b][twice..].copy_from_slice(&q[r][b * LANES..][..LANES - twice]);
            }
        }
        match self.k.rows.dtype() {
            Dtype::F32 => self.products_of::<S, f32, R>(&turned, some, n, s, peaks),
            Dtype::F16 => self.products_of::<S, f16, R>(&turned, some, n, s, peaks),
            Dtype::Bf16 => self.products_of::<S, bf16, R>(&turned, some, n, s, peaks),
        }
    }

    #[inline(always)]
    fn products_of<S: Simd, E: Element, const R: usize>(
        &self,
        q: &[Peaks; R],
        some: u128,
        n: usize,
        s: &mut [Lane128],
        peaks: &mut Peaks,
    ) {
        let rows = self.k.all::<E>(some);
        for first in (0..n).step_by(LANES) {
            let mut sums = [[S::splat(0.0); LANES]; R];
            for i in 0..LANES {
                self.v.prefetch(first + i, 0, 1);
            }
            if S::WIDE {
                for i in (0..LANES).step_by(4) {
                    products_of_rows::<S, E, R, 4>(q, &rows, first, i, &mut sums, peaks);
                }
            } else {
                for i in 0..LANES {
                    products_of_rows::<S, E, R, 1>(q, &rows, first, i, &mut sums, peaks);
                }
            }
            for r in 0..R {
                S::fold_rows(&sums[r], S::add).store(&mut math::blocks_mut(&mut s[r])[first / LANES]);
            }
        }
    }

    /// max|v| of the tokens `some`, all below `n`, in units of PEAK; 0 of others.
    #[inline(always)]
    pub fn v_unit<S: Simd>(&self, some: u128, n: usize, unit: &mut Lane128) {
        match self.v.rows.dtype() {
            Dtype::F32 => self.v_unit_of::<S, f32>(some, n, unit),
            Dtype::F16 => self.v_unit_of::<S, f16>(some, n, unit),
            Dtype::Bf16 => self.v_unit_of::<S, bf16>(some, n, unit),
        }
    }

    #[inline(always)]
    fn v_unit_of<S: Simd, E: Element>(&self, some: u128, n: usize, unit: &mut Lane128) {
        let rows = self.v.all::<E>(some);
        for first in (0..n).step_by(LANES) {
            let mut most = [S::splat(0.0); LANES];
            for i in 0..LANES {
                let mut peak = S::splat(0.0);
                for b in 0..rows.dim.div_ceil(LANES) {
                    peak = rows.load::<S>(first + i, b).abs().max(peak);
                }
                most[i] = peak;
            }
            let most = S::fold_rows(&most, S::max).mul(S::splat(1.0 / PEAK));
            most.store(&mut math::blocks_mut(unit)[first / LANES]);
        }
    }

    /// Adds V of the tokens `some`, all below `n`, to R outputs, `[R][dim_v]`. K of the tile `next` is asked for.
    #[inline(always)]
    pub fn add_values<S: Simd, const R: usize>(
        &self,
        e: &[Lane128; R],
        some: u128,
        n: usize,
        next: Option<&Given>,
        outs: &mut [f32],
    ) {
        match self.v.rows.dtype() {
            Dtype::F32 => self.add_values_of::<S, f32, R>(e, some, n, next, outs),
            Dtype::F16 => self.add_values_of::<S, f16, R>(e, some, n, next, outs),
            Dtype::Bf16 => self.add_values_of::<S, bf16, R>(e, some, n, next, outs),
        }
    }

    #[inline(always)]
    fn add_values_of<S: Simd, E: Element, const R: usize>(
        &self,
        e: &[Lane128; R],
        some: u128,
        n: usize,
        next: Option<&Given>,
        outs: &mut [f32],
    ) {
        let rows = self.v.all::<E>(some);
        let (mut b, last) = (0, self.v.rows.dim().div_ceil(LANES));
        while b < last {
            b += match last - b {
                4.. if S::WIDE => add_vectors::<S, E, R, 4>(e, &rows, n, b, next, outs),
                2.. if S::WIDE => add_vectors::<S, E, R, 2>(e, &rows, n, b, next, outs),
                _ => add_vectors::<S, E, R, 1>(e, &rows, n, b, next, outs),
            };
        }
    }
}

/// Products with T rows, from `i` of the 16 from `first` on: q is loaded once for them.
#[inline(always)]
fn products_of_rows<S: Simd, E: Element, const R: usize, const T: usize>(
    q: &[Peaks; R],
    rows: &Tile<E>,
    first: usize,
    i: usize,
    sums: &mut [[S; LANES]; R],
    peaks: &mut Peaks,
) {
    let mut chains = [[S::splat(0.0); T]; R];
    for b in 0..rows.dim.div_ceil(LANES) {
        let (mut k, mut peak) = ([S::splat(0.0); T], S::load(&peaks[b]));
        for t in 0..T {
            k[t] = rows.load(first + i + t, b);
            peak = k[t].abs().max(peak);
        }
        peak.store(&mut peaks[b]);
        for r in 0..R {
            let q = S::load(&q[r][b]);
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

/// B vectors of every row, from `first` on.
#[inline(always)]
fn add_vectors<S: Simd, E: Element, const R: usize, const B: usize>(
    e: &[Lane128; R],
    rows: &Tile<E>,
    n: usize,
    first: usize,
    next: Option<&Given>,
    outs: &mut [f32],
) -> usize {
    let d = rows.dim;
    let mut sums = [[S::splat(0.0); B]; R];
    for i in 0..n {
        if let Some(next) = next {
            next.k.prefetch(i, first / B, d.div_ceil(LANES * B));
        }
        let mut v = [S::splat(0.0); B];
        for b in 0..B {
            v[b] = rows.load(i, first + b);
        }
        for r in 0..R {
            let e = S::splat(e[r][i]);
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
    for (out, lanes) in outs.chunks_exact_mut(d).zip(&lanes) {
        for (b, lanes) in (first..).zip(lanes) {
            let twice = b * LANES - start(b, d);
            for (x, sum) in out[b * LANES..].iter_mut().zip(&lanes[twice..]) {
                *x += sum;
            }
        }
    }
    B
}

/// What scores of a query head are uncertain by: K is known exactly.
#[inline(always)]
pub fn uncertain<S: Simd>(q: &[f32], peaks: &Peaks) -> Uncertain {
    let mut reach = S::splat(0.0);
    for b in 0..q.len().div_ceil(LANES) {
        let at = start(b, q.len());
        let mut block = [0.0; LANES];
        block[b * LANES - at..].copy_from_slice(&q[b * LANES..(at + LANES)]);
        reach = S::load(&block).abs().fma(S::load(&peaks[b]), reach);
    }
    Uncertain::rounding(reach.sum(), score_rounding(q.len()))
}
