//! Who is read how finely, and what that leaves uncertain. Pure arithmetic: no memory is read here.
//!
//! The idea (AlignedKV, arXiv 2409.16546): addends of one sum should have the same absolute precision. Every token of a
//! context gets the same share of the allowed error, and reads the fewest digits that keep it within that share.
//!
//! Notation, per query head: `s` scores, `e = exp(s - max)`, `p = e / sum e`, `peak` = largest value a token's V scale
//! can stand for, `A = sum p * peak` (the *amplitude*), `n` visible tokens. `ds` bounds the error of a score.

mod certificate;
pub mod published;

pub use certificate::{Certificate, Mixed, ScoreError, Sums, value_square};

use crate::backend::Mode;
use crate::format::{LEFT, PEAK, PLANES};

/// Root mean square of what is left out, in units of the scale: errors are as uniform.
fn rms_left(planes: usize) -> f32 {
    LEFT[planes] * 0.577_350_3
}

/// What one score of a tile is uncertain by, for one query head: the same for all tokens of a tile that are read to the
/// same number of planes.
#[derive(Debug, Clone, Copy, Default)]
pub struct TileError {
    /// Sum over channels of |q * scale|: `worst * LEFT[p]` bounds what is left out.
    pub worst: f32,
    /// Square root of the sum of squares of the same.
    pub rough: f32,
    /// Bound of what rounding q costs.
    pub q_worst: f32,
    /// Root mean square of the same.
    pub q_rms: f32,
    /// Error of the stored codes beyond [`LEFT`], and float rounding, in units of `worst`.
    pub slack: f32,
    /// Error of what a score goes through before the softmax.
    pub bend: f32,
}

impl TileError {
    /// Of nothing.
    pub const NONE: TileError = TileError { worst: 0.0, rough: 0.0, q_worst: 0.0, q_rms: 0.0, slack: 0.0, bend: 0.0 };

    /// Bound of a score's error after `planes` planes.
    #[inline(always)]
    pub fn bound(&self, planes: usize) -> f32 {
        self.worst * (LEFT[planes] + self.slack) + self.q_worst + self.bend
    }

    /// Bound of the error of a score from K as the caller has it: float rounding, and what the score goes through.
    #[inline(always)]
    pub fn of_rows(&self) -> ScoreError {
        ScoreError { bound: self.worst * self.slack + self.bend, rms: 0.0 }
    }

    /// Root mean square of the same.
    #[inline(always)]
    pub fn rms(&self, planes: usize) -> f32 {
        let left = self.rough * rms_left(planes);
        (left * left + self.q_rms * self.q_rms).sqrt()
    }
}

/// Every token's share of the allowed error, for one query head, and the sums it comes from.
#[derive(Debug, Clone, Copy)]
pub struct Share {
    mode: Mode,
    /// Share times the sum of e: thresholds are on e, not on p.
    scaled: f32,
    amplitude: f32,
}

/// Largest slack of a weight in the exponent: e^40 leaves room in binary32.
const SLACK_MAX: f32 = 40.0;

impl Share {
    /// `sum` = sum of e, `weighted` = sum of e * peak, over all `n` visible tokens. K and V get half of the tolerance
    /// each; every token's share of that is 1 / sqrt(n) (errors add as independent) or 1 / n (bounds add).
    pub fn new(mode: Mode, tolerance: f32, n: usize, sum: f64, weighted: f64) -> Share {
        let amplitude = weighted / sum;
        let parts = if mode == Mode::Guaranteed { 2.0 * n as f64 } else { (2.0 * n as f64).sqrt() };
        Share { mode, scaled: (f64::from(tolerance) * weighted / parts) as f32, amplitude: amplitude as f32 }
    }

    /// The scan's own weights may be too small by as much as its scores are uncertain: by this, in the exponent.
    #[inline(always)]
    fn slack(&self, error: &TileError) -> f32 {
        match self.mode {
            Mode::Guaranteed => error.bound(1).min(SLACK_MAX),
            _ => (2.0 * error.rms(1)).min(5.0),
        }
    }

    /// Error of the output, per weight and V scale, of a token whose score is known to `planes` planes. Score errors move
    /// the output by at most p * ds * (peak + A): once through the token's own weight, once through the normaliser. As
    /// independent errors: by p * es * |v| / 2.
    #[inline(always)]
    fn error_k(&self, error: &TileError, planes: usize) -> f32 {
        match self.mode {
            Mode::Guaranteed => error.worst * (LEFT[planes] * PEAK),
            _ => error.rough * (PEAK / 2.0) * rms_left(planes),
        }
    }

    /// The same of a token whose V is known to `planes` planes.
    #[inline(always)]
    fn error_v(&self, planes: usize) -> f32 {
        if self.mode == Mode::Guaranteed { LEFT[planes] } else { rms_left(planes) }
    }

    /// What is added to a V scale in guaranteed mode, for K and for V: the normaliser's error, and that a token that
    /// stands for the mean may lie on the other side of 0. `mean` = largest magnitude of the tile's V mean.
    #[inline(always)]
    fn offsets(&self, mean: f32) -> (f32, f32) {
        if self.mode == Mode::Guaranteed { (self.amplitude / PEAK, mean / PEAK) } else { (0.0, 0.0) }
    }

    /// False if no token of a tile reads more than the scan has: none has a score above `score` (less the maximum that the
    /// share is relative to), none a V scale above `unit`.
    #[inline(always)]
    pub fn any(&self, error: &TileError, mean: f32, score: f32, unit: f32) -> bool {
        let (offset_k, offset_v) = self.offsets(mean);
        let most = (score + self.slack(error)).exp() * (unit + offset_k.max(offset_v));
        let error = most * self.error_k(error, 1).max(self.error_v(0));
        error > self.scaled || error.is_nan()
    }

    /// Thresholds of a tile.
    #[inline(always)]
    pub fn thresholds(&self, error: &TileError, mean: f32) -> Thresholds {
        let share = self.scaled * (-self.slack(error)).exp();
        let (offset_k, offset_v) = self.offsets(mean);
        Thresholds {
            k: std::array::from_fn(|p| share / self.error_k(error, p + 1)),
            v: std::array::from_fn(|p| share / self.error_v(p)),
            offset_k,
            offset_v,
        }
    }
}

/// A token with weight `e` and V scale `vs` reads `1 + #(e * (vs + offset_k) > k)` planes of K, and of V 0 if
/// `e * (vs + offset_v) <= v[0]`, else `#(e * vs > v)` and at least 1.
#[derive(Debug, Clone, Copy)]
pub struct Thresholds {
    /// Ascending, for K.
    pub k: [f32; PLANES - 1],
    /// Ascending, for V.
    pub v: [f32; PLANES],
    /// See above.
    pub offset_k: f32,
    /// See above.
    pub offset_v: f32,
}

impl Thresholds {
    /// No token with `e * (vs + offset)`, of the larger offset, up to this reads more than one plane of K and none of V.
    #[inline(always)]
    pub fn least(&self) -> f32 {
        self.k[0].min(self.v[0])
    }
}
