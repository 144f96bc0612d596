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
    /// Factors of what a mask adds.
    pub slopes: Option<Vec<f32>>,
}

/// What a mask says, as it was last set.
#[derive(Debug)]
pub struct Shown {
    n_kv: usize,
    /// `[row][n_kv]`: what is added to a score, or -inf.
    added: Vec<f32>,
}

impl Shown {
    /// Nothing.
    pub fn new(rows: usize, n_kv: usize) -> Shown {
        Shown { n_kv, added: vec![f32::NEG_INFINITY; rows * n_kv] }
    }

    pub fn row(&mut self, row: usize) -> &mut [f32] {
        &mut self.added[row * self.n_kv..][..self.n_kv]
    }
}

/// What some query rows look at: the tokens of a sequence, of which they are the last, or cells.
#[derive(Clone, Copy)]
pub struct View<'a> {
    pub k: &'a [Token],
    /// The same, but in cells, whose K and V may come from different tokens.
    pub v: &'a [Token],
    pub n_q: usize,
    /// First of the rows among those of the call.
    pub first_row: usize,
    pub sight: Sight<'a>,
}

/// What decides on what is seen.
#[derive(Clone, Copy)]
pub enum Sight<'a> {
    Positions,
    AllCells,
    Mask(&'a Shown),
}

impl<'a> View<'a> {
    /// Of sequences, with their numbers of query rows.
    pub fn sequences(all: impl IntoIterator<Item = (&'a [Token], usize)>) -> Vec<View<'a>> {
        let mut first_row = 0;
        let view = |(k, n_q)| {
            let view = View { k, v: k, n_q, first_row, sight: Sight::Positions };
            first_row += n_q;
            view
        };
        all.into_iter().map(view).collect()
    }

    pub fn of_cells(&self) -> bool {
        !matches!(self.sight, Sight::Positions)
    }

    /// True if row `r` is that of a token that has been removed: what it sees is nobody's business.
    pub fn is_removed(&self, r: usize) -> bool {
        !self.of_cells() && self.k[self.k.len() - self.n_q + r].removed
    }

    /// Tokens or cells that row `r` sees.
    pub fn seen(&self, r: usize, ask: &Ask, layer_window: i32) -> impl Iterator<Item = usize> + Clone + use<'a> {
        let (k, v, row) = (self.k, self.v, self.first_row + r);
        let (mut positions, mut range) = (i64::MIN..=i64::MAX, 0..k.len());
        let mut shown = None;
        match self.sight {
            Sight::Positions => {
                let position = k[k.len() - self.n_q + r].position;
                let window = if ask.window == 0 { layer_window } else { ask.window };
                let first = if window == 0 { i64::MIN } else { position - i64::from(window) + 1 };
                positions = first..=if ask.full { i64::MAX } else { position };
                if let Some((from, to)) = &ask.ranges {
                    range = from[row] as usize..k.len().min(to[row] as usize);
                }
            }
            Sight::AllCells => {}
            Sight::Mask(mask) => shown = Some(&mask.added[row * mask.n_kv..]),
        }
        range.filter(move |&t| {
            let there = !k[t].removed && !v[t].removed;
            there && positions.contains(&k[t].position) && shown.is_none_or(|added| added[t] > f32::NEG_INFINITY)
        })
    }

    /// What a mask adds to the score of a cell.
    pub fn added(&self, r: usize, t: usize) -> f64 {
        match self.sight {
            Sight::Mask(mask) => f64::from(mask.added[(self.first_row + r) * mask.n_kv + t]),
            _ => 0.0,
        }
    }
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
    pub fn load(&mut self, view: &View, layer: usize, shape: &akv_layer_desc, head: usize) {
        let ((tk, dk), (tv, dv)) = (dtype_dim(shape, Part::K), dtype_dim(shape, Part::V));
        let mut x = [0.0f32; 256];
        self.dims = (dk, dv);
        self.k.clear();
        self.v.clear();
        self.peaks.clear();
        for (k, v) in view.k.iter().zip(view.v) {
            row(k, layer, Part::K, head, tk, &mut x[..dk]);
            self.k.extend(x[..dk].iter().map(|&x| f64::from(x)));
            row(v, layer, Part::V, head, tv, &mut x[..dv]);
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
    /// Over the tokens that are seen, to whose scores something is added.
    pub fn attend(
        &mut self,
        q: &[f32],
        rows: &HeadRows,
        seen: impl Iterator<Item = usize> + Clone,
        added: impl Fn(usize) -> f64,
        ask: &Ask,
        sink: Option<f32>,
    ) {
        let (dk, dv) = rows.dims;
        let scale = if ask.scale == 0.0 { 1.0 / (dk as f64).sqrt() } else { f64::from(ask.scale) };
        let cap = f64::from(ask.softcap);
        self.weights.clear();
        let mut max = sink.map_or(f64::NEG_INFINITY, f64::from);
        for t in seen.clone() {
            let k = &rows.k[t * dk..(t + 1) * dk];
            let dot: f64 = k.iter().zip(q).map(|(k, &q)| k * f64::from(q)).sum();
            let score = if cap > 0.0 { cap * (scale * dot / cap).tanh() } else { scale * dot };
            let score = score + added(t);
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
