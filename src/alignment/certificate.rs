//! The certificate: a rigorous bound of the error, and an estimate of it, from sums over the tokens.
//!
//! Let `ds` bound the error of a token's score, `u = sum p * expm1(ds)` and `up = log(1 + u) = log sum p e^ds`. The true
//! weight is `p e^x / E[e^x']` with `|x| <= ds`, and by Cauchy-Schwarz `1 / E[e^-ds] <= E[e^ds]`, so every weight is off by
//! at most `p * expm1(ds + up)`, both ways. The output is off by at most
//! `sum p * expm1(ds + up) * max|v| + sum p * dv`, and since `expm1(ds + up) = expm1(ds) (1 + u) + u`, that is
//! `(1 + u) * sum p expm1(ds) peak + u * A + sum p dv`: linear sums, which add over parts of a context.
//!
//! Whatever the scores are, the true output lies in the convex hull of the values: `max peak + max|out|` bounds the
//! error too, and is the answer where scores are so uncertain that the sums say nothing.

use crate::format::PEAK;

/// Score errors beyond this are not summed: the hull says more.
const LOOSE: f32 = 60.0;

/// Float rounding, relative to the amplitude, in units of 2^-24. The weighted sum of values: 2 products, 128 additions in
/// a tile, 9 in a split and as many rescalings. Weights: e^(s - max) is off by at most 98 (87 of the difference, 5 of
/// `exp`, twice where the reference is a tile's maximum, and their product) through the token itself, and by 33 on
/// average (what is further than log n away weighs nothing) and 12 of its own sum through the normaliser. The rest is
/// binary64.
const ROUNDING: f64 = 301.0 / (1 << 24) as f64;

/// Weights below e^-87 are 0 in binary32.
const FLUSHED: f64 = 2e-38;

/// What is known of the scores of some tokens.
#[derive(Debug, Clone, Copy)]
pub struct ScoreError {
    /// Bound.
    pub bound: f32,
    /// Root mean square.
    pub rms: f32,
}

/// Sums over tokens for one query head, relative to `exp(max)`.
#[derive(Debug, Clone, Copy)]
pub struct Sums {
    /// Largest score.
    pub max: f32,
    /// Sum of e.
    pub sum: f64,
    /// Sum of e * peak.
    pub weighted: f64,
    /// Sum of e * expm1(ds).
    spread: f64,
    /// Sum of e * expm1(ds) * peak.
    spread_weighted: f64,
    /// Sum of e * dv.
    value: f64,
    /// Sum of (e * es * peak / 2)^2 + (e * rms of dv)^2.
    square: f64,
    /// Number.
    n: f64,
    /// Largest peak.
    peak: f32,
    /// Largest ds.
    bound: f32,
}

/// Sums over tokens whose scores and values are known each in its own way.
#[derive(Debug, Clone, Copy)]
pub struct Mixed {
    /// Sum of e.
    pub e: f64,
    /// Sum of e * V scale.
    pub e_vs: f64,
    /// Sum of e * spread.
    pub spread: f64,
    /// Sum of e * V scale * spread.
    pub spread_vs: f64,
    /// Sum of e * V scale * left, and of e * offset.
    pub value: f64,
    /// Sum of (e * V scale)^2 * square, of K and of V.
    pub square: f64,
    /// Largest bound of a score.
    pub bound: f32,
}

impl ScoreError {
    /// What a token's sums are multiplied with: for [`Mixed::spread`] and [`Mixed::square`].
    #[inline(always)]
    pub fn factors(&self) -> (f32, f32) {
        let rms = self.rms * (PEAK / 2.0);
        // An infinity would make something of weights that have vanished.
        (exp_m1(f64::from(self.bound.min(LOOSE))) as f32, (rms * rms).min(1e30))
    }
}

/// The same for [`Mixed::square`] of values that are off by at most `left * V scale`.
#[inline(always)]
pub fn value_square(left: f32) -> f32 {
    left * left * (1.0 / 3.0)
}

impl Sums {
    /// Of no tokens.
    pub const EMPTY: Sums = Sums {
        max: f32::NEG_INFINITY,
        sum: 0.0,
        weighted: 0.0,
        spread: 0.0,
        spread_weighted: 0.0,
        value: 0.0,
        square: 0.0,
        n: 0.0,
        peak: 0.0,
        bound: 0.0,
    };

    /// Of no tokens, relative to exp(max).
    pub fn at(max: f32) -> Sums {
        Sums { max, ..Sums::EMPTY }
    }

    /// Of a token whose score is known and whose value is 0.
    pub fn sink(score: f32) -> Sums {
        Sums { max: score, sum: 1.0, n: 1.0, ..Sums::EMPTY }
    }

    /// Adds tokens whose scores are known as well as `error` says: sums of e, of e times V scale, and of the squares of
    /// that.
    #[inline(always)]
    pub fn add_scores(&mut self, error: ScoreError, [e, e_vs, e_vs_2]: [f64; 3]) {
        let peak = f64::from(PEAK);
        self.sum += e;
        self.weighted += e_vs * peak;
        let grow = exp_m1(f64::from(error.bound.min(LOOSE)));
        self.spread += grow * e;
        self.spread_weighted += grow * e_vs * peak;
        let rms = f64::from(error.rms) * peak / 2.0;
        self.square += e_vs_2 * rms * rms;
        self.bound = self.bound.max(error.bound);
    }

    /// Adds tokens that are not all known alike.
    #[inline(always)]
    pub fn add_mixed(&mut self, tokens: &Mixed) {
        let peak = f64::from(PEAK);
        self.sum += tokens.e;
        self.weighted += tokens.e_vs * peak;
        self.spread += tokens.spread;
        self.spread_weighted += tokens.spread_vs * peak;
        self.value += tokens.value;
        self.square += tokens.square;
        self.bound = self.bound.max(tokens.bound);
    }

    /// Adds to the same tokens that their values are off by at most `left * V scale + offset`.
    #[inline(always)]
    pub fn add_values(&mut self, left: f32, offset: f32, [e, e_vs, e_vs_2]: [f64; 3]) {
        self.value += f64::from(left) * e_vs + f64::from(offset) * e;
        let rms = f64::from(left) * 0.577_350_3;
        self.square += e_vs_2 * rms * rms;
    }

    /// Notes the number of tokens and the largest peak among them, whatever their weights.
    #[inline(always)]
    pub fn note(&mut self, n: usize, peak: f32) {
        self.n += n as f64;
        self.peak = self.peak.max(peak);
    }

    /// Takes in the sums of other tokens. Returns what the two weighted sums of values must be multiplied with before
    /// they are added.
    pub fn merge(&mut self, other: &Sums) -> (f64, f64) {
        let max = self.max.max(other.max);
        let factor = |m: f32| if m == f32::NEG_INFINITY { 0.0 } else { (f64::from(m) - f64::from(max)).exp() };
        let (a, b) = (factor(self.max), factor(other.max));
        let add = |x: f64, y: f64| a * x + b * y;
        *self = Sums {
            max,
            sum: add(self.sum, other.sum),
            weighted: add(self.weighted, other.weighted),
            spread: add(self.spread, other.spread),
            spread_weighted: add(self.spread_weighted, other.spread_weighted),
            value: add(self.value, other.value),
            square: a * a * self.square + b * b * other.square,
            n: self.n + other.n,
            peak: self.peak.max(other.peak),
            bound: self.bound.max(other.bound),
        };
        (a, b)
    }

    /// The result for one query head; `out_peak` = largest |channel| of the output.
    pub fn certificate(&self, out_peak: f32) -> Certificate {
        if self.sum == 0.0 {
            return Certificate { lse: f32::NEG_INFINITY, bound: 0.0, lse_bound: 0.0, estimate: 0.0, amplitude: 0.0 };
        }
        let lse = f64::from(self.max) + self.sum.ln();
        let peak = f64::from(self.peak) * (1.0 + ROUNDING) + f64::from(f32::MIN_POSITIVE);
        let hull = peak + f64::from(out_peak);
        let (bound, lse_bound) = if self.bound > LOOSE {
            (hull, f64::from(self.bound))
        } else {
            // What binary32 has flushed, weights or products, is at most another token of which nothing is known.
            let (mut all, lost) = (*self, self.n * FLUSHED);
            let lost = [lost, lost * (1.0 + peak) / f64::from(PEAK), 0.0];
            all.add_scores(ScoreError { bound: self.bound, rms: 0.0 }, lost);
            all.add_values(PEAK, self.peak, lost);
            let (u, amplitude) = (all.spread / all.sum, all.weighted / all.sum);
            let scores = (1.0 + u) * all.spread_weighted / all.sum + u * amplitude;
            // Infinity times 0, where `raw` values leave binary32: the hull it is.
            ((scores + all.value / all.sum + ROUNDING * amplitude).min(hull), u.ln_1p().min(f64::from(self.bound)))
        };
        Certificate {
            lse: lse as f32,
            bound: up(bound),
            lse_bound: up(lse_bound + ROUNDING + lse.abs() * f64::from(f32::EPSILON)),
            estimate: (self.square.sqrt() / self.sum).min(bound) as f32,
            amplitude: (self.weighted / self.sum) as f32,
        }
    }
}

/// e^x - 1, not below it (to 1e-15): most errors of scores are small, and most of the time is not spent here.
#[inline(always)]
fn exp_m1(x: f64) -> f64 {
    if x > 0.25 {
        return x.exp_m1();
    }
    // Taylor; the last coefficient takes in the rest of the series.
    let mut y = 1.03 / 3_628_800.0;
    for c in [1.0 / 362_880.0, 1.0 / 40_320.0, 1.0 / 5_040.0, 1.0 / 720.0, 1.0 / 120.0, 1.0 / 24.0, 1.0 / 6.0, 0.5, 1.0]
    {
        y = y * x + c;
    }
    y * x
}

/// Rounds a bound upwards: by more than its sums and its own products, of weights that are rounded, can be too small.
fn up(x: f64) -> f32 {
    ((x * (1.0 + 1e-4)) as f32).next_up()
}

/// What attention returns beside the output.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Certificate {
    /// Log of the normaliser.
    pub lse: f32,
    /// Bound of the error of every channel.
    pub bound: f32,
    /// Bound of the error of `lse`.
    pub lse_bound: f32,
    /// Expected rms error of a channel.
    pub estimate: f32,
    /// A.
    pub amplitude: f32,
}
