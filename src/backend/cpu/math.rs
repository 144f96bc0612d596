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
    for chunk in x.chunks_exact(LANES) {
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
    let (a_chunks, b_chunks) = (a.chunks_exact(LANES), b.chunks_exact(LANES));
    let rest = a_chunks.remainder().iter().zip(b_chunks.remainder());
    for (lane, (x, y)) in lanes.iter_mut().zip(rest) {
        *lane = x * y;
    }
    for (x, y) in a_chunks.zip(b_chunks) {
        for l in 0..LANES {
            lanes[l] += x[l] * y[l];
        }
    }
    tree(lanes)
}

/// `y += a * x`.
#[inline(always)]
pub fn axpy(a: f32, x: &[f32], y: &mut [f32]) {
    for (y, &x) in y.iter_mut().zip(x) {
        *y += a * x;
    }
}

/// Values of `n` planes that lie one after another (each `half` bytes), most significant first: the digits as one
/// number, times `weight` (that of the last digit), plus `constant`. Exact.
#[inline(always)]
pub fn unpack(planes: &[u8], half: usize, n: usize, weight: f32, constant: f32, out: &mut [f32]) {
    let (low, high) = out.split_at_mut(half);
    let offset = ((0x8888 >> (16 - 4 * n)) as f32) * weight;
    macro_rules! planes {
        ($($p:literal),*) => {
            for b in 0..half {
                let (mut l, mut h) = (0u32, 0u32);
                $(
                    let byte = u32::from(planes[$p * half + b]);
                    l = l << 4 | byte & 15;
                    h = h << 4 | byte >> 4;
                )*
                low[b] = (l as i32 as f32 * weight - offset) + constant;
                high[b] = (h as i32 as f32 * weight - offset) + constant;
            }
        };
    }
    // One loop per plane count, so that each is straight-line vector code.
    match n {
        1 => planes!(0),
        2 => planes!(0, 1),
        3 => planes!(0, 1, 2),
        _ => planes!(0, 1, 2, 3),
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
