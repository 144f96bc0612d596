//! What a cache must hold: tokens, whose rows are functions of a seed.

use crate::api::*;
use crate::dice::{Dice, mix};
use half::{bf16, f16};

/// A token.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Token {
    pub seed: u64,
    pub position: i64,
    /// Positions that it has been moved by: as far its K has turned.
    pub turned: i64,
    pub removed: bool,
    /// Times that it has been decoded and written anew.
    pub copies: u32,
}

impl Token {
    /// What a cell without a row holds.
    pub const NONE: Token = Token { seed: 0, position: 0, turned: 0, removed: true, copies: 0 };
}

/// Tokens without those at the end that have been removed.
pub fn trim(tokens: &mut Vec<Token>) {
    while tokens.last().is_some_and(|t| t.removed) {
        tokens.pop();
    }
}

/// K or V.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Part {
    K,
    V,
}

/// Element type and channels.
pub fn dtype_dim(layer: &akv_layer_desc, part: Part) -> (i32, usize) {
    match part {
        Part::K => (layer.dtype_k, layer.dim_k as usize),
        Part::V => (layer.dtype_v, if layer.dim_v == 0 { layer.dim_k } else { layer.dim_v } as usize),
    }
}

/// `x` as a dtype holds it.
pub fn rounded(x: f32, dtype: i32) -> f32 {
    match dtype {
        AKV_F16 => f16::from_f32(x).to_f32(),
        AKV_BF16 => bf16::from_f32(x).to_f32(),
        _ => x,
    }
}

/// Largest magnitude of any element.
pub const PEAK: f32 = 32.0;

/// A token's row of a head. Magnitudes differ between tokens, so that scales grow.
pub fn row(token: &Token, layer: usize, part: Part, head: usize, dtype: i32, out: &mut [f32]) {
    let row = mix(token.seed ^ (layer as u64) << 40 ^ (part as u64) << 48 ^ (head as u64) << 52);
    let magnitude = (1 << (token.seed % 6)) as f32 / (1u64 << 23) as f32;
    for (c, x) in out.iter_mut().enumerate() {
        let h = (row ^ c as u64).wrapping_mul(0xd6e8_feb8_6659_fd93);
        let signed = ((h ^ h >> 32).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 40) as i64 - (1 << 23);
        *x = rounded(signed as f32 * magnitude, dtype);
    }
    if part == Part::K && token.turned != 0 {
        turn(out, token.turned as f64, layer);
    }
}

/// Channels that do not turn: the first ones.
const STILL: usize = 8;

/// Radians per position of a pair of channels.
pub fn frequencies(dim_k: i32) -> Vec<f32> {
    let n = (dim_k as usize - STILL) / 2;
    (0..n).map(|i| 10000f32.powf(-(i as f32) / n as f32)).collect()
}

/// What a layer's K turns by: one layer's channels in pairs of neighbours, the next one's in halves.
pub fn rope(layer: usize, frequencies: &[f32]) -> akv_rope {
    let pairing = if layer.is_multiple_of(2) { AKV_ROPE_INTERLEAVED } else { AKV_ROPE_HALVES };
    let (n_dims, first_dim) = (2 * frequencies.len() as i32, STILL as i32);
    akv_rope { pairing, n_dims, first_dim, reserved: 0, inv_freq: frequencies.as_ptr() }
}

fn turn(k: &mut [f32], by: f64, layer: usize) {
    let (dim, n) = (k.len(), (k.len() - STILL) / 2);
    for (i, frequency) in frequencies(dim as i32).into_iter().enumerate() {
        let (a, b) = if layer.is_multiple_of(2) { (2 * i, 2 * i + 1) } else { (i, i + n) };
        let (sin, cos) = (by * f64::from(frequency)).sin_cos();
        let (x, y) = (f64::from(k[STILL + a]), f64::from(k[STILL + b]));
        (k[STILL + a], k[STILL + b]) = ((x * cos - y * sin) as f32, (x * sin + y * cos) as f32);
    }
}

/// Memory of elements of any dtype.
#[derive(Default)]
pub struct Packed {
    words: Vec<u64>,
    dtype: i32,
}

impl Packed {
    /// Room for `n` elements.
    pub fn resize(&mut self, n: usize, dtype: i32) {
        self.dtype = dtype;
        self.words.clear();
        self.words.resize((n * if dtype == AKV_F32 { 4 } else { 2 }).div_ceil(8), 0);
    }

    pub fn address(&self) -> *const u64 {
        self.words.as_ptr()
    }

    pub fn words(&mut self) -> &mut Vec<u64> {
        &mut self.words
    }

    pub fn rows(&self) -> akv_rows {
        rows(self.address(), self.dtype)
    }

    fn halves(&mut self) -> &mut [u16] {
        // SAFETY: plain memory, of at least as strict an alignment.
        unsafe { std::slice::from_raw_parts_mut(self.words.as_mut_ptr().cast(), self.words.len() * 4) }
    }

    pub fn set(&mut self, i: usize, x: f32) {
        match self.dtype {
            AKV_F16 => self.halves()[i] = f16::from_f32(x).to_bits(),
            AKV_BF16 => self.halves()[i] = bf16::from_f32(x).to_bits(),
            _ => {
                let halves = self.halves();
                (halves[2 * i], halves[2 * i + 1]) = (x.to_bits() as u16, (x.to_bits() >> 16) as u16);
            }
        }
    }

    pub fn get(&mut self, i: usize) -> f32 {
        let dtype = self.dtype;
        let halves = self.halves();
        match dtype {
            AKV_F16 => f16::from_bits(halves[i]).to_f32(),
            AKV_BF16 => bf16::from_bits(halves[i]).to_f32(),
            _ => f32::from_bits(u32::from(halves[2 * i]) | u32::from(halves[2 * i + 1]) << 16),
        }
    }

    /// Rows `[token][head][dim]` of tokens, at `at` tokens from the start.
    pub fn put(&mut self, at: usize, tokens: &[Token], layer: usize, shape: &akv_layer_desc, part: Part) {
        let ((dtype, dim), heads) = (dtype_dim(shape, part), shape.n_kv_heads as usize);
        let mut x = [0.0; 256];
        for (i, token) in tokens.iter().enumerate() {
            for head in 0..heads {
                row(token, layer, part, head, dtype, &mut x[..dim]);
                for (c, &x) in x[..dim].iter().enumerate() {
                    self.set(((at + i) * heads + head) * dim + c, x);
                }
            }
        }
    }
}

/// What a cache is made of, and how it is used.
#[derive(Clone, Debug)]
pub struct Setup {
    pub name: &'static str,
    pub format: i32,
    pub layers: Vec<akv_layer_desc>,
    pub exact_head: u32,
    pub exact_tail: u32,
    pub max_bytes: u64,
    /// Of the context.
    pub n_threads: i32,
    /// Sequences that may live at once.
    pub n_sequences: usize,
    /// Tokens of the longest.
    pub max_len: usize,
    /// Tokens are moved to other positions: K is stored as f32, whose rounding is far below every bound.
    pub moves: bool,
}

/// Streams of a cache of cells.
pub const STREAMS: usize = 2;

/// Kinds of caches, see [`Setup::kind`].
pub const KINDS: usize = 7;

fn layer(heads: [i32; 2], dims: [i32; 2], dtypes: [i32; 2], planes: [i32; 2], window: i32) -> akv_layer_desc {
    akv_layer_desc {
        n_q_heads: heads[0],
        n_kv_heads: heads[1],
        dim_k: dims[0],
        dim_v: dims[1],
        dtype_k: dtypes[0],
        dtype_v: dtypes[1],
        planes_k: planes[0],
        planes_v: planes[1],
        window,
        ..zeroed()
    }
}

impl Setup {
    /// The kinds of caches that traffic goes over, in turn.
    pub fn kind(i: usize, n_sequences: usize, max_len: usize) -> Setup {
        let aligned = vec![
            layer([4, 2], [16, 24], [AKV_F32, AKV_BF16], [0, 3], 0),
            layer([3, 1], [24, 16], [AKV_F16, AKV_F32], [2, 0], 150),
        ];
        let whole = vec![
            layer([4, 2], [32, 32], [AKV_F16, AKV_F16], [0, 0], 0),
            layer([2, 2], [16, 40], [AKV_F16, AKV_F16], [0, 0], 90),
        ];
        let wide = vec![layer([8, 1], [128, 64], [AKV_BF16, AKV_F16], [3, 2], 0)];
        let moving = vec![
            layer([4, 2], [16, 24], [AKV_F32, AKV_BF16], [0, 3], 0),
            layer([3, 1], [24, 16], [AKV_F32, AKV_F32], [3, 0], 150),
        ];
        let (name, format, layers, exact_head, exact_tail) = match i % KINDS {
            0 => ("aligned", AKV_FORMAT_ALIGNED, aligned, 0, 0),
            1 => ("raw", AKV_FORMAT_RAW, whole, 0, 0),
            2 => ("aligned, nothing exact", AKV_FORMAT_ALIGNED, aligned, AKV_NONE, AKV_NONE),
            3 => ("aligned, one wide head", AKV_FORMAT_ALIGNED, wide, 0, 0),
            4 => ("published", AKV_FORMAT_PUBLISHED, whole, 0, 0),
            5 => ("aligned, all exact", AKV_FORMAT_ALIGNED, whole, 128, 128),
            _ => ("aligned, moving", AKV_FORMAT_ALIGNED, moving, 0, 0),
        };
        let moves = i % KINDS == 6;
        Setup { moves, name, format, layers, exact_head, exact_tail, max_bytes: 0, n_threads: 0, n_sequences, max_len }
    }

    /// Makes the cache.
    pub fn cache(&self, context: Handle<akv_context>) -> (akv_status, Handle<akv_cache>) {
        self.create(context, akv_cache_desc { max_sequences: self.n_sequences as u32, ..zeroed() })
    }

    /// Makes one of cells, as many in each stream as the longest sequence has tokens.
    pub fn cells(&self, context: Handle<akv_context>) -> (akv_status, Handle<akv_cache>) {
        let n_slots = self.max_len as u64;
        // Masks say who sees what, not windows.
        let layers = self.layers.iter().map(|l| akv_layer_desc { window: 0, ..*l }).collect();
        let of_cells = akv_cache_desc { placement: AKV_SLOTS, n_streams: STREAMS as u32, n_slots, ..zeroed() };
        Setup { layers, ..self.clone() }.create(context, of_cells)
    }

    fn create(&self, context: Handle<akv_context>, desc: akv_cache_desc) -> (akv_status, Handle<akv_cache>) {
        let desc = akv_cache_desc {
            struct_size: size::<akv_cache_desc>(),
            format: self.format,
            n_layers: self.layers.len() as i32,
            layers: self.layers.as_ptr(),
            exact_head: self.exact_head,
            exact_tail: self.exact_tail,
            max_bytes: self.max_bytes,
            ..desc
        };
        let mut out = std::ptr::null_mut();
        // SAFETY: a valid descriptor and output.
        let status = unsafe { akv_cache_create(context.0, &desc, &mut out) };
        (status, Handle(out))
    }

    /// How far off a stored element may be: the documented precision of the planes, of the largest magnitude that may share
    /// its scale, and what re-encoding adds.
    pub fn row_error(&self, layer: usize, part: Part, of: f32) -> f32 {
        if self.format != AKV_FORMAT_ALIGNED {
            return 0.0;
        }
        let l = &self.layers[layer];
        match part {
            Part::K => 8.0 * PEAK * PRECISION[l.planes_k as usize],
            // A token's V has a scale of its own.
            Part::V => 1.1 * of * PRECISION[l.planes_v as usize],
        }
    }
}

impl Setup {
    /// Root mean square error of an output, relative to A, that the stored digits of K and V make likely at most.
    pub fn stored_error(&self, layer: usize, q: &[f32], scale: f32) -> f64 {
        if self.format != AKV_FORMAT_ALIGNED {
            return 0.0;
        }
        let l = &self.layers[layer];
        let norm = q.iter().map(|&x| f64::from(x * x)).sum::<f64>().sqrt();
        let scale = if scale == 0.0 { 1.0 / f64::from(l.dim_k).sqrt() } else { f64::from(scale) };
        let score = scale * norm * f64::from(PEAK * PRECISION[l.planes_k as usize]);
        score + f64::from(PRECISION[l.planes_v as usize])
    }
}

/// By planes (0 stands for 4), as the header has it.
const PRECISION: [f32; 5] = [3e-5, 9e-2, 6e-3, 4e-4, 3e-5];

/// New tokens after `last`, most often at consecutive positions. True if they are.
pub fn new_tokens(dice: &mut Dice, n: usize, last: Option<i64>) -> (Vec<Token>, bool) {
    let dice = &mut Dice::Seeded(dice.bits());
    let gaps = dice.one_in(4);
    let mut position = last.map_or(0, |p| p + 1);
    let mut tokens = Vec::with_capacity(n);
    for i in 0..n {
        if gaps {
            // The same one again, the next, or one further on.
            let step = dice.pick(&[0, 1, 1, 1, 4]);
            position = if i == 0 { position - 1 + step.max(i64::from(last.is_none())) } else { position - 1 + step };
        }
        tokens.push(Token { seed: dice.bits() >> 24, position, removed: false, ..Token::NONE });
        position += 1;
    }
    let first = last.map_or(0, |p| p + 1);
    let consecutive = tokens.iter().enumerate().all(|(i, t)| t.position == first + i as i64);
    (tokens, consecutive)
}
