//! q folded with a tile's K scales, and rounded to two int8 digits for the integer scan.

use crate::alignment::TileError;
use crate::format::aligned::Meta;
use crate::format::{CENTRE, MAX_DIM, PEAK, scale};

/// Largest rounded q: 127 * 256 + 127, so that both digits are int8.
const Q_LEVELS: f32 = 127.0 * 257.0;

/// One query head's q, folded with the scales of one tile: score = sum over channels of `folded * value / scale`.
#[derive(Clone, Copy)]
pub struct Folded {
    /// Channels.
    pub q: [f32; MAX_DIM],
    /// Unit of the integer scores.
    pub step: f32,
    /// Sum of the rounded q, in steps.
    pub q_sum: i32,
    /// What scores of this tile are uncertain by.
    pub error: TileError,
}

impl Folded {
    pub const ZERO: Folded = Folded {
        q: [0.0; MAX_DIM],
        step: 0.0,
        q_sum: 0,
        error: TileError { worst: 0.0, rough: 0.0, q_worst: 0.0, q_rms: 0.0, slack: 0.0 },
    };

    /// Score from the integer sum of `nibble * q`: digits are nibbles - 8, centred on what they leave out.
    #[inline(always)]
    pub fn score(&self, integer: i32) -> f32 {
        self.step * ((integer - 8 * self.q_sum) as f32 + CENTRE[1] * self.q_sum as f32)
    }
}

/// Float rounding of a score, in units of `worst`: chains of at most d / 8 + 16 binary32 operations on addends that sum
/// up to `PEAK * worst`.
pub fn score_rounding(dim: usize) -> f32 {
    (dim / 8 + 16) as f32 * (f32::EPSILON / 2.0) * PEAK
}

/// Folds `q` (times the softmax scale already) with a tile's scale bytes. `words` gets the two digits of the rounded
/// values, as the scan reads them: per 4 channels of the low nibbles and the 4 of the high ones, `[high digit of low
/// nibbles, low digit of them, high digit of high nibbles, low digit of them][4]`, at `stride` bytes from word to word.
#[inline(always)]
pub fn fold(q: &[f32], k_scales: &[u8], meta: &Meta, words: &mut [i8], stride: usize, out: &mut Folded) {
    let (d, half) = (q.len(), q.len() / 2);
    let folded = &mut out.q[..d];
    for ((f, &q), &u) in folded.iter_mut().zip(q).zip(k_scales) {
        *f = q * scale(u);
    }
    let mut lanes = [[0.0f32; 16]; 3];
    let [peaks, sums, squares] = &mut lanes;
    let (chunks, rest) = folded.as_chunks::<16>();
    let mut tail = [0.0; 16];
    tail[..rest.len()].copy_from_slice(rest);
    for chunk in chunks.iter().chain(std::iter::once(&tail)) {
        for l in 0..16 {
            let f = chunk[l];
            peaks[l] = if f.abs() > peaks[l] { f.abs() } else { peaks[l] };
            sums[l] += f.abs();
            squares[l] += f * f;
        }
    }
    let peak = peaks.iter().fold(0.0f32, |m, &v| if v > m { v } else { m });
    let worst: f32 = sums.iter().sum();
    let rough = squares.iter().sum::<f32>().sqrt();
    // Too small to be rounded to anything: all digits 0, and the whole of q is error.
    let vanishing = peak < 1e-30;
    let (step, inverse) = if vanishing { (0.0, 0.0) } else { (peak / Q_LEVELS, Q_LEVELS / peak) };
    const MAGIC: f32 = 12_582_912.0;
    let mut q_sum = 0;
    let (mut high, mut low) = ([0i8; MAX_DIM], [0i8; MAX_DIM]);
    for ((h, l), &f) in high.iter_mut().zip(&mut low).zip(folded.iter()) {
        let r = ((f * inverse + MAGIC) - MAGIC) as i32;
        q_sum += r;
        *h = ((r + 128) >> 8) as i8;
        *l = (r - ((r + 128) >> 8 << 8)) as i8;
    }
    for (word, c) in words.chunks_mut(stride).zip((0..half).step_by(4)) {
        word[0..4].copy_from_slice(&high[c..c + 4]);
        word[4..8].copy_from_slice(&low[c..c + 4]);
        word[8..12].copy_from_slice(&high[c + half..c + half + 4]);
        word[12..16].copy_from_slice(&low[c + half..c + half + 4]);
    }
    out.step = step;
    out.q_sum = q_sum;
    let (sum, squares) = (f32::from(meta.digit_sum), f32::from(meta.digit_square_sum));
    out.error = TileError {
        worst: worst * (1.0 + 1e-5),
        rough,
        // Half a step (0.51: the product is rounded too) for every channel, whose value is within its digit's +- 1.
        q_worst: if vanishing { peak * d as f32 * PEAK } else { 0.51 * step * (sum + d as f32) },
        q_rms: step * 0.288_675_13 * squares.sqrt(),
        slack: meta.slack + score_rounding(d),
    };
}
