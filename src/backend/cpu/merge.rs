//! Merging partial attention over disjoint parts of a context, with rigorous bounds.
//!
//! Part i has the output `o_i` within `b_i` and the normaliser's log `l_i` within `c_i`. With weights
//! `w_i = exp(l_i - l)`, `u = sum w_i expm1(c_i)`, the true weights are off by at most `w_i expm1(c_i + log(1 + u))`
//! (as in `alignment::certificate`), and since both sets sum to 1 the values they weigh may be shifted by any constant,
//! here the merged output: the error is at most
//! `sum w_i (1 + expm1(c_i)) (1 + u) b_i + sum w_i (expm1(c_i) (1 + u) + u) max|o_i - out|`.
//!
//! Whatever the weights are, the true output lies among the true outputs of the parts: `max (b_i + max|o_i - out|)` bounds
//! the error too, and is the answer where little is known of the weights, or where there is one part only.
//!
//! A part whose normaliser is NaN makes the whole NaN.

use crate::format::MAX_LATENT;

/// Inputs of [`merge`]: `[rows * heads]` each (`out` times dim).
#[derive(Debug, Clone, Copy)]
#[allow(missing_docs)]
pub struct State<'a> {
    pub out: &'a [f32],
    pub lse: &'a [f32],
    pub bound: Option<&'a [f32]>,
    pub lse_bound: Option<&'a [f32]>,
    pub estimate: Option<&'a [f32]>,
    pub amplitude: Option<&'a [f32]>,
}

impl State<'_> {
    fn row(&self, index: usize, dim: usize) -> impl Iterator<Item = f64> {
        self.out[index * dim..(index + 1) * dim].iter().map(|&x| f64::from(x))
    }
}

/// One merged row of one head: everything but `out`, which is written in place.
#[derive(Debug, Clone, Copy)]
#[allow(missing_docs)]
pub struct Merged {
    pub lse: f32,
    pub bound: f32,
    pub lse_bound: f32,
    pub estimate: f32,
    pub amplitude: f32,
}

/// Float rounding of the merge itself, relative to what is added.
const ROUNDING: f64 = 1.0 / (1 << 22) as f64;

/// Merges element `index` (row * heads + head) of all `states` into `out` (dim values), which aliases none of them.
pub fn merge(states: &[State], index: usize, dim: usize, out: &mut [f32]) -> Merged {
    let lse = |s: &State| f64::from(s.lse[index]);
    let max = states.iter().map(lse).fold(f64::NEG_INFINITY, f64::max);
    out.fill(0.0);
    if states.iter().any(|s| lse(s).is_nan()) {
        out.fill(f32::NAN);
        let (nan, unknown) = (f32::NAN, f32::INFINITY);
        return Merged { lse: nan, bound: unknown, lse_bound: unknown, estimate: unknown, amplitude: nan };
    }
    if max == f64::NEG_INFINITY {
        return Merged { lse: f32::NEG_INFINITY, bound: 0.0, lse_bound: 0.0, estimate: 0.0, amplitude: 0.0 };
    }
    let sum: f64 = states.iter().map(|s| (lse(s) - max).exp()).sum();
    let seen = || states.iter().filter(|s| lse(s) > f64::NEG_INFINITY).map(|s| (s, (lse(s) - max).exp() / sum));
    let mut total = [0.0f64; MAX_LATENT];
    for (s, w) in seen() {
        for (total, x) in total.iter_mut().zip(s.row(index, dim)) {
            *total += w * x;
        }
    }
    for (x, total) in out.iter_mut().zip(total) {
        *x = total as f32;
    }
    // An input that says nothing of itself makes the result say nothing.
    let said = |field: Option<&[f32]>| field.map_or(f64::INFINITY, |f| f64::from(f[index]));
    let u: f64 = seen().map(|(s, w)| w * said(s.lse_bound).exp_m1()).sum();
    let (mut bound, mut hull, mut square, mut amplitude, mut lse_most) = (0.0, 0.0f64, 0.0, 0.0, 0.0f64);
    for (s, w) in seen() {
        let apart = s.row(index, dim).zip(&*out).fold(0.0f64, |m, (a, &b)| m.max((a - f64::from(b)).abs()));
        let rounding = ROUNDING * s.row(index, dim).fold(0.0f64, |m, a| m.max(a.abs()));
        let grow = said(s.lse_bound).exp_m1();
        bound += w * ((1.0 + grow) * (1.0 + u) * said(s.bound) + (grow * (1.0 + u) + u) * apart + rounding);
        hull = hull.max(said(s.bound) + apart + rounding);
        square += (w * said(s.estimate)).powi(2);
        amplitude += w * said(s.amplitude);
        lse_most = lse_most.max(said(s.lse_bound));
    }
    let lse = max + sum.ln();
    // 0 * infinity: nothing is known.
    let known = |x: f64| if x.is_nan() { f64::INFINITY } else { x };
    let up = |x: f64| ((x * (1.0 + 1e-6)) as f32).next_up();
    Merged {
        lse: lse as f32,
        bound: up(known(bound).min(hull)),
        lse_bound: up(known(u.ln_1p()).min(lse_most) + lse.abs() * f64::from(f32::EPSILON)),
        estimate: known(square.sqrt()) as f32,
        amplitude: known(amplitude) as f32,
    }
}
