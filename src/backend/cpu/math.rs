//! Vector arithmetic over tiles and rows. Sums run in 16 lanes and are folded as a tree.

use super::simd::{LANES, Simd};
use crate::format::{PLANES, TILE};

/// A tile's worth of floats: one per token.
pub type Lane128 = [f32; TILE];

/// e^x for x <= 0, relative error below 3e-7; 0 below -87. Cody-Waite reduction, Taylor polynomial of degree 7 on
/// |r| <= ln 2 / 2.
#[inline(always)]
pub fn exp<S: Simd>(x: S) -> S {
    const MAGIC: f32 = 12_582_912.0;
    let (least, magic) = (S::splat(-87.0), S::splat(MAGIC));
    let clamped = x.max(least);
    let n = clamped.fma(S::splat(std::f32::consts::LOG2_E), magic).sub(magic);
    let r = n.fma(S::splat(2.121_944_4e-4), n.fma(S::splat(-355.0 / 512.0), clamped));
    let mut y = S::splat(1.0 / 5040.0);
    for c in [1.0 / 720.0, 1.0 / 120.0, 1.0 / 24.0, 1.0 / 6.0, 0.5, 1.0, 1.0] {
        y = y.fma(r, S::splat(c));
    }
    // n is an integer in [-126, 0]: n + 127 goes straight into the exponent field.
    let two_n = n.add(S::splat(MAGIC + 127.0)).shift_to_exponent();
    y.mul(two_n).where_above(x, least)
}

#[inline(always)]
fn lanes<S: Simd>(x: S) -> [f32; LANES] {
    let mut lanes = [0.0; LANES];
    x.store(&mut lanes);
    lanes
}

/// The vectors of a tile.
#[inline(always)]
pub fn blocks(x: &Lane128) -> &[[f32; LANES]] {
    x.as_chunks().0
}

/// The same, to write.
#[inline(always)]
pub fn blocks_mut(x: &mut Lane128) -> &mut [[f32; LANES]] {
    x.as_chunks_mut().0
}

/// Makes all but the tokens `seen` -inf.
#[inline(always)]
pub fn hide<S: Simd>(s: &mut Lane128, seen: u128) {
    if seen == u128::MAX {
        return;
    }
    for (b, s) in blocks_mut(s).iter_mut().enumerate() {
        let bits = (seen >> (LANES * b)) as u16;
        if bits != u16::MAX {
            S::load(s).keep(bits, S::splat(f32::NEG_INFINITY)).store(s);
        }
    }
}

/// Error of [`bend`] through a cap, in units of the cap: that of `exp` twice, and a few roundings.
pub const CAP_ROUNDING: f32 = 1e-6;

/// `cap * tanh(s / cap)` (`s` itself if `cap` is 0), plus `added`; -inf stays what it is.
#[inline(always)]
pub fn bend<S: Simd>(s: &Lane128, cap: f32, added: &Lane128, out: &mut Lane128) {
    let hidden = S::splat(f32::NEG_INFINITY);
    for ((s, added), out) in blocks(s).iter().zip(blocks(added)).zip(blocks_mut(out)) {
        let s = S::load(s);
        let seen = s.above(f32::MIN);
        let mut y = s;
        if cap > 0.0 {
            let x = s.div(S::splat(cap));
            // tanh of a magnitude: (1 - t) / (1 + t), t = e^-2x; the sign is that of x.
            let t = exp(x.abs().mul(S::splat(-2.0)));
            let one = S::splat(1.0);
            let tanh = one.sub(t).div(one.add(t)).mul(S::splat(cap));
            y = tanh.keep(x.above(0.0), S::splat(0.0).sub(tanh));
        }
        y.add(S::load(added)).keep(seen, hidden).store(out);
    }
}

/// Largest of a tile.
#[inline(always)]
pub fn max<S: Simd>(x: &Lane128) -> f32 {
    let mut most = S::splat(f32::NEG_INFINITY);
    for x in blocks(x) {
        most = S::load(x).max(most);
    }
    most.most()
}

/// Largest of some tokens' numbers, all 0 or more.
#[inline(always)]
pub fn max_of<S: Simd>(x: &Lane128, tokens: u128) -> f32 {
    let mut most = S::splat(0.0);
    for (b, x) in blocks(x).iter().enumerate() {
        let bits = (tokens >> (LANES * b)) as u16;
        most = S::load(x).keep(bits, most).max(most);
    }
    most.most()
}

/// `e = exp(s - max)`.
#[inline(always)]
pub fn weights<S: Simd>(s: &Lane128, max: f32, e: &mut Lane128) {
    for (e, s) in blocks_mut(e).iter_mut().zip(blocks(s)) {
        exp(S::load(s).sub(S::splat(max))).store(e);
    }
}

/// `exp(s - max)` of other things than tokens.
#[inline(always)]
pub fn factors<S: Simd>(s: &[f32; LANES], max: f32) -> [f32; LANES] {
    lanes(exp(S::load(s).sub(S::splat(max))))
}

/// Sums over a tile of e, e * unit, and (e * unit)^2.
#[inline(always)]
pub fn sums<S: Simd>(e: &Lane128, units: &Lane128) -> [f64; 3] {
    let mut sums = [S::splat(0.0); 3];
    for (e, u) in blocks(e).iter().zip(blocks(units)) {
        let e = S::load(e);
        let x = e.mul(S::load(u));
        sums = [sums[0].add(e), sums[1].add(x), x.fma(x, sums[2])];
    }
    [f64::from(sums[0].sum()), f64::from(sums[1].sum()), f64::from(sums[2].sum())]
}

/// Sums over a tile for tokens of different precision: `planes` = planes of K and of V that each has read.
#[inline(always)]
pub fn mixed_sums<S: Simd>(e: &Lane128, units: &Lane128, planes: &[Lane128; 2], t: &Tables) -> [f64; 8] {
    let mut sums = [S::splat(0.0); 8];
    for (b, (e, u)) in blocks(e).iter().zip(blocks(units)).enumerate() {
        let (k, v) = (S::load(&blocks(&planes[0])[b]), S::load(&blocks(&planes[1])[b]));
        let (e, spread) = (S::load(e), k.pick(&t.spread));
        let x = e.mul(S::load(u));
        let square = k.pick(&t.square_k).add(v.pick(&t.square_v));
        sums = [
            sums[0].add(e),
            sums[1].add(x),
            e.fma(spread, sums[2]),
            x.fma(spread, sums[3]),
            x.fma(v.pick(&t.left), sums[4]),
            x.mul(x).fma(square, sums[5]),
            e.fma(v.pick(&UNREAD), sums[6]),
            x.fma(v.pick(&t.centre), sums[7]),
        ];
    }
    // Not `map`: its closure would be compiled without the instruction set.
    let mut folded = [0.0; 8];
    for (folded, sum) in folded.iter_mut().zip(sums) {
        *folded = f64::from(sum.sum());
    }
    folded
}

/// What the weights of a token are multiplied with in [`mixed_sums`], by the planes it has read.
#[derive(Clone, Copy)]
pub struct Tables {
    pub spread: [f32; 8],
    pub square_k: [f32; 8],
    pub square_v: [f32; 8],
    pub left: [f32; 8],
    pub centre: [f32; 8],
}

/// Tokens of whose V nothing is read.
const UNREAD: [f32; 8] = [1.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0];

/// `e *= units`.
#[inline(always)]
pub fn scale_by<S: Simd>(e: &mut Lane128, units: &Lane128) {
    for (e, u) in blocks_mut(e).iter_mut().zip(blocks(units)) {
        S::load(e).mul(S::load(u)).store(e);
    }
}

/// Adds rows of V to the outputs of all heads: `out[head] += sum of weights[head][token] * digits`, digits signed, in
/// units of the first one's. `v` = planes of V of a tile, `lists[n - 1]` = tokens that are read to n planes.
#[inline(always)]
pub fn add_rows<S: Simd>(v: &[u8], half: usize, lists: &[&[u8]; PLANES], weights: &[Lane128], out: &mut [f32]) {
    // As many heads as their sums fit in registers.
    let mut h = 0;
    while h < weights.len() {
        let (weights, out) = (&weights[h..], &mut out[h * 2 * half..]);
        h += match weights.len() {
            1 => add_heads::<S, 1>(v, half, lists, weights, out),
            2 | 3 => add_heads::<S, 2>(v, half, lists, weights, out),
            _ => add_heads::<S, 4>(v, half, lists, weights, out),
        };
    }
}

#[inline(always)]
fn add_heads<S: Simd, const H: usize>(
    v: &[u8],
    half: usize,
    lists: &[&[u8]; PLANES],
    weights: &[Lane128],
    out: &mut [f32],
) -> usize {
    assert!(weights.len() >= H && out.len() >= H * 2 * half);
    let mut at = 0;
    while at < half {
        let count = LANES.min(half - at);
        let mut sums = [[S::splat(0.0); 2]; H];
        add_planes::<S, 1, H>(v, half, at, lists[0], weights, &mut sums);
        add_planes::<S, 2, H>(v, half, at, lists[1], weights, &mut sums);
        add_planes::<S, 3, H>(v, half, at, lists[2], weights, &mut sums);
        add_planes::<S, 4, H>(v, half, at, lists[3], weights, &mut sums);
        for (h, sums) in sums.iter().enumerate() {
            for (part, &sum) in sums.iter().enumerate() {
                let start = h * 2 * half + part * half + at;
                let out = &mut out[start..start + count];
                match <&mut [f32; LANES]>::try_from(&mut *out) {
                    Ok(out) => S::load(out).add(sum).store(out),
                    Err(_) => out.iter_mut().zip(lanes(sum)).for_each(|(x, sum)| *x += sum),
                }
            }
        }
        at += LANES;
    }
    H
}

/// A block of channels of tokens that are read to N planes.
#[inline(always)]
fn add_planes<S: Simd, const N: usize, const H: usize>(
    v: &[u8],
    half: usize,
    at: usize,
    tokens: &[u8],
    weights: &[Lane128],
    sums: &mut [[S; 2]; H],
) {
    let (stride, count) = (v.len() / TILE, LANES.min(half - at));
    assert!(tokens.is_empty() || stride >= N * half);
    for &token in tokens {
        let token = usize::from(token);
        assert!(token < TILE);
        let start = token * stride + at;
        let (low, high) = if count == LANES {
            // SAFETY: a block of each of N planes of a token's row, which lies in `v`.
            unsafe { S::digits::<N>(v.as_ptr().add(start), half) }
        } else {
            let mut rest = [[0u8; LANES]; N];
            for (p, rest) in rest.iter_mut().enumerate() {
                rest[..count].copy_from_slice(&v[start + p * half..][..count]);
            }
            // SAFETY: `rest` holds LANES bytes per plane.
            unsafe { S::digits::<N>(rest.as_ptr().cast(), LANES) }
        };
        for (sums, weights) in sums.iter_mut().zip(weights) {
            let weight = S::splat(weights[token]);
            sums[0] = low.fma(weight, sums[0]);
            sums[1] = high.fma(weight, sums[1]);
        }
    }
}

/// `N` elements from `at` on; those that are not there are 0.
#[inline(always)]
fn tail<T: Copy + Default>(x: &[T]) -> [T; LANES] {
    let mut block = [T::default(); LANES];
    block[..x.len()].copy_from_slice(x);
    block
}

/// Sum of products; any length.
#[inline(always)]
pub fn dot<S: Simd>(a: &[f32], b: &[f32]) -> f32 {
    let ((a, a_rest), (b, b_rest)) = (a.as_chunks::<LANES>(), b.as_chunks::<LANES>());
    let mut sum = S::splat(0.0);
    for (x, y) in a.iter().zip(b) {
        sum = S::load(x).fma(S::load(y), sum);
    }
    if !a_rest.is_empty() {
        sum = S::load(&tail(a_rest)).fma(S::load(&tail(b_rest)), sum);
    }
    sum.sum()
}

/// `y += a * x`.
#[inline(always)]
pub fn axpy<S: Simd>(a: f32, x: &[f32], y: &mut [f32]) {
    let ((x, x_rest), (y, y_rest)) = (x.as_chunks::<LANES>(), y.as_chunks_mut::<LANES>());
    for (y, x) in y.iter_mut().zip(x) {
        S::load(x).fma(S::splat(a), S::load(y)).store(y);
    }
    if !y_rest.is_empty() {
        let sum = lanes(S::load(&tail(x_rest)).fma(S::splat(a), S::load(&tail(y_rest))));
        y_rest.copy_from_slice(&sum[..y_rest.len()]);
    }
}

/// Values of `n` planes that lie one after another (each `half` bytes), most significant first: the digits as one
/// number, times `weight` (that of the first digit), plus `constant`. Exact.
#[inline(always)]
pub fn unpack<S: Simd>(planes: &[u8], half: usize, n: usize, weight: f32, constant: f32, out: &mut [f32]) {
    match n {
        1 => unpack_planes::<S, 1>(planes, half, weight, constant, out),
        2 => unpack_planes::<S, 2>(planes, half, weight, constant, out),
        3 => unpack_planes::<S, 3>(planes, half, weight, constant, out),
        _ => unpack_planes::<S, 4>(planes, half, weight, constant, out),
    }
}

#[inline(always)]
fn unpack_planes<S: Simd, const N: usize>(planes: &[u8], half: usize, weight: f32, constant: f32, out: &mut [f32]) {
    assert!(planes.len() >= N * half);
    let (low, high) = out[..2 * half].split_at_mut(half);
    let (weight, constant) = (S::splat(weight), S::splat(constant));
    let ((low, low_rest), (high, high_rest)) = (low.as_chunks_mut::<LANES>(), high.as_chunks_mut::<LANES>());
    for (b, (low, high)) in low.iter_mut().zip(high).enumerate() {
        // SAFETY: block b of every plane ends within its `half` bytes.
        let (l, h) = unsafe { S::digits::<N>(planes.as_ptr().add(b * LANES), half) };
        l.fma(weight, constant).store(low);
        h.fma(weight, constant).store(high);
    }
    if !low_rest.is_empty() {
        let mut rest = [[0u8; LANES]; N];
        for (p, rest) in rest.iter_mut().enumerate() {
            let end = (p + 1) * half;
            rest[..low_rest.len()].copy_from_slice(&planes[end - low_rest.len()..end]);
        }
        // SAFETY: `rest` holds LANES bytes per plane.
        let (l, h) = unsafe { S::digits::<N>(rest.as_ptr().cast(), LANES) };
        low_rest.copy_from_slice(&lanes(l.fma(weight, constant))[..low_rest.len()]);
        high_rest.copy_from_slice(&lanes(h.fma(weight, constant))[..high_rest.len()]);
    }
}

#[cfg(test)]
mod tests {
    use super::super::simd::Scalar;
    use super::*;

    fn exp1(x: f32) -> f32 {
        lanes(exp(Scalar::splat(x)))[3]
    }

    #[test]
    fn exp_is_accurate_and_flushes() {
        let mut worst = 0.0f64;
        for i in 0..2_000_000 {
            let x = -(i as f32) * 4.35e-5;
            let want = f64::from(x).exp();
            worst = worst.max((f64::from(exp1(x)) - want).abs() / want);
        }
        assert!(worst < 3e-7, "{worst:e}");
        assert_eq!(exp1(0.0), 1.0);
        assert_eq!(exp1(-88.0), 0.0);
        assert_eq!(exp1(f32::NEG_INFINITY), 0.0);
    }

    #[test]
    fn dot_of_any_length() {
        for n in [0, 1, 8, 15, 16, 17, 24, 80, 256] {
            let a: Vec<f32> = (0..n).map(|i| (i as f32 * 0.7).sin()).collect();
            let b: Vec<f32> = (0..n).map(|i| (i as f32 * 0.3).cos()).collect();
            let want: f64 = a.iter().zip(&b).map(|(&x, &y)| f64::from(x) * f64::from(y)).sum();
            assert!((f64::from(dot::<Scalar>(&a, &b)) - want).abs() < 1e-5);
        }
    }

    #[test]
    fn unpacked_digits_are_their_sum() {
        for half in [8, 12, 16, 20, 40, 64, 128] {
            let planes: Vec<u8> = (0..4 * half).map(|i| (i * 37 % 251) as u8).collect();
            for n in 1..=4 {
                let mut out = vec![0.0; 2 * half];
                unpack::<Scalar>(&planes, half, n, 1.0, 0.25, &mut out);
                for (c, &x) in out.iter().enumerate() {
                    let nibble = |p: usize| planes[p * half + c % half] >> (4 * (c / half)) & 15;
                    let want: f32 = (0..n).map(|p| (f32::from(nibble(p)) - 8.0) * 16f32.powi(-(p as i32))).sum();
                    assert_eq!(x, want + 0.25);
                }
            }
        }
    }
}
