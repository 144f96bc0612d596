//! Attention in float64, of rows as the engine gave them.

use crate::api::*;
use crate::model::{Part, Token, dtype_dim, row};

/// What an attention call asks for.
#[derive(Clone, Debug)]
pub struct Ask {
    pub mode: i32,
    /// As passed: 0 is 1e-3.
    pub tolerance: f32,
    pub full: bool,
    pub window: i32,
    pub softcap: f32,
    pub scale: f32,
    pub sinks: Option<Vec<f32>>,
    pub ranges: Option<(Vec<i64>, Vec<i64>)>,
}

/// Tokens that a query row sees, the row of token `at`.
pub fn seen<'a>(
    tokens: &'a [Token],
    at: usize,
    ask: &'a Ask,
    layer_window: i32,
    row: usize,
) -> impl Iterator<Item = usize> + Clone + 'a {
    let position = tokens[at].position;
    let window = if ask.window == 0 { layer_window } else { ask.window };
    let first = if window == 0 { i64::MIN } else { position - i64::from(window) + 1 };
    let last = if ask.full { i64::MAX } else { position };
    let all = (0, tokens.len());
    let (from, to) = ask.ranges.as_ref().map_or(all, |(a, b)| (a[row] as usize, tokens.len().min(b[row] as usize)));
    (from..to).filter(move |&t| !tokens[t].removed && (first..=last).contains(&tokens[t].position))
}

/// K and V of one head of a sequence, in float64.
#[derive(Default)]
pub struct HeadRows {
    k: Vec<f64>,
    v: Vec<f64>,
    /// Largest |v| of each token.
    peaks: Vec<f64>,
    dims: (usize, usize),
}

impl HeadRows {
    pub fn load(&mut self, tokens: &[Token], layer: usize, shape: &akv_layer_desc, head: usize) {
        let ((tk, dk), (tv, dv)) = (dtype_dim(shape, Part::K), dtype_dim(shape, Part::V));
        let mut x = [0.0f32; 256];
        self.dims = (dk, dv);
        self.k.clear();
        self.v.clear();
        self.peaks.clear();
        for token in tokens {
            row(token, layer, Part::K, head, tk, &mut x[..dk]);
            self.k.extend(x[..dk].iter().map(|&x| f64::from(x)));
            row(token, layer, Part::V, head, tv, &mut x[..dv]);
            self.v.extend(x[..dv].iter().map(|&x| f64::from(x)));
            self.peaks.push(x[..dv].iter().fold(0.0, |m, x| f64::from(x.abs()).max(m)));
        }
    }
}

/// Attention of one query head.
#[derive(Default)]
pub struct Truth {
    pub out: Vec<f64>,
    pub lse: f64,
    pub amplitude: f64,
    weights: Vec<f64>,
}

impl Truth {
    pub fn attend(
        &mut self,
        q: &[f32],
        rows: &HeadRows,
        seen: impl Iterator<Item = usize> + Clone,
        ask: &Ask,
        sink: Option<f32>,
    ) {
        let (dk, dv) = rows.dims;
        let scale = if ask.scale == 0.0 { 1.0 / (dk as f64).sqrt() } else { f64::from(ask.scale) };
        let cap = f64::from(ask.softcap);
        self.weights.clear();
        let mut max = sink.map_or(f64::NEG_INFINITY, f64::from);
        for k in seen.clone().map(|t| &rows.k[t * dk..(t + 1) * dk]) {
            let dot: f64 = k.iter().zip(q).map(|(k, &q)| k * f64::from(q)).sum();
            let score = if cap > 0.0 { cap * (scale * dot / cap).tanh() } else { scale * dot };
            max = max.max(score);
            self.weights.push(score);
        }
        self.out.clear();
        self.out.resize(dv, 0.0);
        (self.lse, self.amplitude) = (f64::NEG_INFINITY, 0.0);
        if self.weights.is_empty() && sink.is_none() {
            return;
        }
        let mut sum = sink.map_or(0.0, |s| (f64::from(s) - max).exp());
        for w in &mut self.weights {
            *w = (*w - max).exp();
            sum += *w;
        }
        for (w, t) in self.weights.iter().zip(seen) {
            let p = w / sum;
            self.amplitude += p * rows.peaks[t];
            for (out, v) in self.out.iter_mut().zip(&rows.v[t * dv..(t + 1) * dv]) {
                *out += p * v;
            }
        }
        self.lse = max + sum.ln();
    }
}
