//! Vector arithmetic in plain Rust: the same operations in the same order on every instruction set, so that results
//! are the same bits. Sums run in 16 lanes and are folded as a tree; there is no fused multiply-add. Compiled once per
//! instruction set by being inlined into functions that enable it.

use crate::format::TILE;

const LANES: usize = 16;

/// A tile's worth of floats: one per token.
pub type Lane128 = [f32; TILE];

/// e^x for x <= 0, relative error below 3e-7; 0 below -87. Cody-Waite reduction, Taylor polynomial of degree 7 on
/// |r| <= ln 2 / 2.
#[inline(always)]
pub fn exp(x: f32) -> f32 {
    const MAGIC: f32 = 12_582_912.0;
    let clamped = if x > -87.0 { x } else { -87.0 };
    let n = (clamped * std::f32::consts::LOG2_E + MAGIC) - MAGIC;
    let r = (clamped - n * 0.693_359_375) - n * -2.121_944_4e-4;
    let mut y = 1.0 / 5040.0;
    for c in [1.0 / 720.0, 1.0 / 120.0, 1.0 / 24.0, 1.0 / 6.0, 0.5, 1.0, 1.0] {
        y = y * r + c;
    }
    // n is an integer in [-126, 0]: n + 127 goes straight into the exponent field.
    let two_n = f32::from_bits(((n + (MAGIC + 127.0)).to_bits()) << 23);
    let y = y * two_n;
    if x > -87.0 { y } else { 0.0 }
}

#[inline(always)]
fn tree(mut lanes: [f32; LANES]) -> f32 {
    let mut width = LANES / 2;
    while width > 0 {
        for i in 0..width {
            lanes[i] += lanes[i + width];
        }
        width /= 2;
    }
    lanes[0]
}

/// Sum over a tile of `f(i)`.
#[inline(always)]
pub fn sum(f: impl Fn(usize) -> f32) -> f32 {
    let mut lanes = [0.0f32; LANES];
    for i in (0..TILE).step_by(LANES) {
        for (l, lane) in lanes.iter_mut().enumerate() {
            *lane += f(i + l);
        }
    }
    tree(lanes)
}

/// Largest of a tile.
#[inline(always)]
pub fn max(x: &Lane128) -> f32 {
    let mut lanes = [f32::NEG_INFINITY; LANES];
    for chunk in x.as_chunks::<LANES>().0 {
        for (lane, &v) in lanes.iter_mut().zip(chunk) {
            *lane = if v > *lane { v } else { *lane };
        }
    }
    lanes.iter().fold(f32::NEG_INFINITY, |m, &v| if v > m { v } else { m })
}

/// Sum of products; any length.
#[inline(always)]
pub fn dot(a: &[f32], b: &[f32]) -> f32 {
    let mut lanes = [0.0f32; LANES];
    let ((a, a_rest), (b, b_rest)) = (a.as_chunks::<LANES>(), b.as_chunks::<LANES>());
    for (lane, (x, y)) in lanes.iter_mut().zip(a_rest.iter().zip(b_rest)) {
        *lane = x * y;
    }
    for (x, y) in a.iter().zip(b) {
        for l in 0..LANES {
            lanes[l] += x[l] * y[l];
        }
    }
    tree(lanes)
}

/// `y += a * x`.
#[inline(always)]
pub fn axpy(a: f32, x: &[f32], y: &mut [f32]) {
    let ((x, x_rest), (y, y_rest)) = (x.as_chunks::<LANES>(), y.as_chunks_mut::<LANES>());
    for (y, x) in y.iter_mut().zip(x) {
        for l in 0..LANES {
            y[l] += a * x[l];
        }
    }
    for (y, x) in y_rest.iter_mut().zip(x_rest) {
        *y += a * x;
    }
}

/// Values of `n` planes that lie one after another (each `half` bytes), most significant first: the digits as one
/// number, times `weight` (that of the last digit), plus `constant`. Exact.
#[inline(always)]
pub fn unpack(planes: &[u8], half: usize, n: usize, weight: f32, constant: f32, out: &mut [f32]) {
    // One loop per plane count, so that each is straight-line vector code.
    match n {
        1 => unpack_planes::<1>(planes, half, weight, constant, out),
        2 => unpack_planes::<2>(planes, half, weight, constant, out),
        3 => unpack_planes::<3>(planes, half, weight, constant, out),
        _ => unpack_planes::<4>(planes, half, weight, constant, out),
    }
}

#[inline(always)]
fn unpack_planes<const N: usize>(planes: &[u8], half: usize, weight: f32, constant: f32, out: &mut [f32]) {
    let (low, high) = out[..2 * half].split_at_mut(half);
    let ((low, low_rest), (high, high_rest)) = (low.as_chunks_mut::<LANES>(), high.as_chunks_mut::<LANES>());
    let rows: [&[u8]; N] = std::array::from_fn(|p| &planes[p * half..(p + 1) * half]);
    let blocks = rows.map(|row| row.as_chunks::<LANES>());
    for (b, (low, high)) in low.iter_mut().zip(high).enumerate() {
        unpack_block(blocks.map(|(chunks, _)| chunks[b]), weight, constant, low, high);
    }
    // Halves are multiples of 4.
    let (low, high) = (low_rest.as_chunks_mut::<4>().0, high_rest.as_chunks_mut::<4>().0);
    for (b, (low, high)) in low.iter_mut().zip(high).enumerate() {
        unpack_block(blocks.map(|(_, rest)| rest.as_chunks::<4>().0[b]), weight, constant, low, high);
    }
}

#[inline(always)]
fn unpack_block<const N: usize, const W: usize>(
    planes: [[u8; W]; N],
    weight: f32,
    constant: f32,
    low: &mut [f32; W],
    high: &mut [f32; W],
) {
    let offset = (0x8888 >> (16 - 4 * N)) as f32 * weight;
    let (mut l, mut h) = ([0i32; W], [0i32; W]);
    for plane in planes {
        for i in 0..W {
            let byte = i32::from(plane[i]);
            l[i] = l[i] << 4 | byte & 15;
            h[i] = h[i] << 4 | byte >> 4;
        }
    }
    for i in 0..W {
        low[i] = (l[i] as f32 * weight - offset) + constant;
        high[i] = (h[i] as f32 * weight - offset) + constant;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exp_is_accurate_and_flushes() {
        let mut worst = 0.0f64;
        for i in 0..2_000_000 {
            let x = -(i as f32) * 4.35e-5;
            let want = f64::from(x).exp();
            worst = worst.max((f64::from(exp(x)) - want).abs() / want);
        }
        assert!(worst < 3e-7, "{worst:e}");
        assert_eq!(exp(0.0), 1.0);
        assert_eq!(exp(-88.0), 0.0);
        assert_eq!(exp(f32::NEG_INFINITY), 0.0);
    }

    #[test]
    fn dot_of_any_length() {
        for n in [0, 1, 8, 15, 16, 17, 24, 80, 256] {
            let a: Vec<f32> = (0..n).map(|i| (i as f32 * 0.7).sin()).collect();
            let b: Vec<f32> = (0..n).map(|i| (i as f32 * 0.3).cos()).collect();
            let want: f64 = a.iter().zip(&b).map(|(&x, &y)| f64::from(x) * f64::from(y)).sum();
            assert!((f64::from(dot(&a, &b)) - want).abs() < 1e-5);
        }
    }
}
