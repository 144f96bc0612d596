//! q folded with a tile's K scales, and rounded to two int8 digits for the integer scan.

use super::simd::{LANES, Simd};
use crate::alignment::TileError;
use crate::format::aligned::Meta;
use crate::format::{CENTRE, MAX_DIM, PEAK, TILE};

/// Largest rounded q: 127 * 256 + 127, so that both digits are int8.
const Q_LEVELS: f32 = 127.0 * 257.0;

/// One query head's q, folded with the scales of one tile: score = sum over channels of `folded * value / scale`.
#[derive(Debug, Clone, Copy)]
pub struct Folded {
    /// Unit of the integer scores.
    pub step: f32,
    /// Sum of the rounded q, in steps.
    pub q_sum: i32,
    /// What scores of this tile are uncertain by.
    pub error: TileError,
}

impl Folded {
    /// Of no tile.
    pub const NONE: Folded = Folded { step: 0.0, q_sum: 0, error: TileError::NONE };

    /// Scores from the integer sums of `nibble * q`: digits are nibbles - 8, centred on what they leave out.
    #[inline(always)]
    pub fn scores<S: Simd>(&self, integers: &[i32; TILE], scores: &mut [f32; TILE]) {
        let (step, centre) = (S::splat(self.step), S::splat(CENTRE[1] * self.q_sum as f32));
        let blocks = integers.as_chunks::<LANES>().0;
        for (s, i) in scores.as_chunks_mut::<LANES>().0.iter_mut().zip(blocks) {
            let digits = i.map(|i| i.wrapping_sub(self.q_sum.wrapping_mul(8)));
            S::from_i32(&digits).add(centre).mul(step).store(s);
        }
    }
}

impl Folded {
    /// Adds to the scores of `tokens` a plane's digits, from the integer sums as above, of that weight, plus `centre`
    /// steps.
    #[inline(always)]
    pub fn refine<S: Simd>(
        &self,
        integers: &[i32; TILE],
        tokens: u128,
        weight: f32,
        centre: f32,
        scores: &mut [f32; TILE],
    ) {
        let (step, weight, centre) = (S::splat(self.step), S::splat(weight), S::splat(centre));
        let blocks = integers.as_chunks::<LANES>().0;
        for (b, (s, i)) in scores.as_chunks_mut::<LANES>().0.iter_mut().zip(blocks).enumerate() {
            let bits = (tokens >> (LANES * b)) as u16;
            if bits != 0 {
                let digits = i.map(|i| i.wrapping_sub(self.q_sum.wrapping_mul(8)));
                let more = S::from_i32(&digits).mul(weight).add(centre).mul(step);
                S::load(s).add(more.keep(bits, S::splat(0.0))).store(s);
            }
        }
    }
}

/// Float rounding of a score, in units of `worst`: chains of at most d / 8 + 16 binary32 operations on addends that sum
/// up to `PEAK * worst`.
pub fn score_rounding(dim: usize) -> f32 {
    (dim / 8 + 16) as f32 * (f32::EPSILON / 2.0) * PEAK
}

/// Folds `q` (times the softmax scale already) with a tile's scale bytes. `digits` gets the two digits of the rounded
/// values: all high ones, then all low ones.
#[inline(always)]
pub fn fold<S: Simd>(q: &[f32], k_scales: &[u8], meta: &Meta, digits: &mut [i8]) -> Folded {
    let d = q.len();
    let (mut peak, mut worst, mut rough) = (S::splat(0.0), S::splat(0.0), S::splat(0.0));
    let mut folded = [0.0f32; MAX_DIM];
    let blocks = folded.as_chunks_mut::<LANES>().0;
    for (block, (q, u)) in blocks.iter_mut().zip(q.chunks(LANES).zip(k_scales.chunks(LANES))) {
        let f = S::load(&padded(q)).mul(S::scales(&padded(u)));
        f.store(block);
        peak = f.abs().max(peak);
        worst = worst.add(f.abs());
        rough = rough.add(f.mul(f));
    }
    let (peak, worst, rough) = (peak.most(), worst.sum(), rough.sum().sqrt());
    // Too small to be rounded to anything: all digits 0, and the whole of q is error.
    let vanishing = peak < 1e-30;
    let (step, inverse) = if vanishing { (0.0, 0.0) } else { (peak / Q_LEVELS, Q_LEVELS / peak) };
    const MAGIC: f32 = 12_582_912.0;
    let mut q_sum = 0i32;
    let (high, low) = digits.split_at_mut(d);
    for ((h, l), &f) in high.iter_mut().zip(low.iter_mut()).zip(&folded[..d]) {
        // |f * inverse| < 2^15: the low bits of the sum are the integer.
        let r = (f * inverse + MAGIC).to_bits() as i32 - MAGIC.to_bits() as i32;
        // Wraps if q is beyond binary32, which `worst` tells.
        q_sum = q_sum.wrapping_add(r);
        *h = ((r + 128) >> 8) as i8;
        *l = r as i8;
    }
    let (sum, squares) = (f32::from(meta.digit_sum), f32::from(meta.digit_square_sum));
    let error = TileError {
        worst: worst * (1.0 + 1e-5),
        rough,
        // Half a step (0.51: the product is rounded too) for every channel, whose value is within its digit's +- 1.
        q_worst: if vanishing { peak * d as f32 * PEAK } else { 0.51 * step * (sum + d as f32) },
        q_rms: step * 0.288_675_13 * squares.sqrt(),
        slack: meta.slack + score_rounding(d),
        bend: 0.0,
    };
    Folded { step, q_sum, error }
}

/// A whole vector of what may be the end of a row.
#[inline(always)]
fn padded<T: Copy + Default>(x: &[T]) -> [T; LANES] {
    match x.try_into() {
        Ok(whole) => whole,
        Err(_) => {
            let mut block = [T::default(); LANES];
            block[..x.len()].copy_from_slice(x);
            block
        }
    }
}
