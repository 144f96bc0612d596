//! What the integration tests share: random numbers, float64 attention, and one sequence run through the library.
#![allow(dead_code)]

use alignedkv::backend::cpu::{Cpu, Isa};
use alignedkv::backend::{Attention, Floats, Mask, Mode, QueryRow, Stats};
use alignedkv::cache::{Allocator, Batch, Block, Bounds, Cache, Config, NanPolicy, Placement, StepSequence};
use alignedkv::cache::{Memory, SequenceView};
use alignedkv::format::{Dtype, Format, Rows, RowsMut, Shape, scale};
use half::{bf16, f16};
use std::sync::Arc;

/// xoshiro-like small generator: the tests' cases are the same on every machine.
pub struct Rng(u64);

impl Rng {
    pub fn new(seed: u64) -> Rng {
        Rng(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    pub fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    /// Below `n`.
    pub fn below(&mut self, n: usize) -> usize {
        (self.next() >> 11) as usize % n
    }

    /// In [0, 1).
    pub fn uniform(&mut self) -> f64 {
        (self.next() >> 11) as f64 / (1u64 << 53) as f64
    }

    pub fn normal(&mut self) -> f32 {
        let (u, v) = (1.0 - self.uniform(), self.uniform());
        ((-2.0 * u.ln()).sqrt() * (std::f64::consts::TAU * v).cos()) as f32
    }

    pub fn normals(&mut self, n: usize) -> Vec<f32> {
        (0..n).map(|_| self.normal()).collect()
    }
}

/// Rounds to what a dtype can hold.
pub fn round(x: &mut [f32], dtype: Dtype) {
    for x in x {
        *x = match dtype {
            Dtype::F32 => *x,
            Dtype::F16 => f16::from_f32(x.clamp(-65504.0, 65504.0)).to_f32(),
            Dtype::Bf16 => bf16::from_f32(*x).to_f32(),
        };
    }
}

/// 64-byte aligned enough for any dtype: rows as bytes.
pub struct Packed {
    words: Vec<u64>,
    n_heads: usize,
    dim: usize,
    dtype: Dtype,
}

impl Packed {
    /// `x` is `[row][head][dim]`.
    pub fn new(x: &[f32], n_heads: usize, dim: usize, dtype: Dtype) -> Packed {
        let bytes: Vec<u8> = match dtype {
            Dtype::F32 => x.iter().flat_map(|v| v.to_ne_bytes()).collect(),
            Dtype::F16 => x.iter().flat_map(|&v| f16::from_f32(v).to_ne_bytes()).collect(),
            Dtype::Bf16 => x.iter().flat_map(|&v| bf16::from_f32(v).to_ne_bytes()).collect(),
        };
        let mut words = vec![0u64; bytes.len().div_ceil(8)];
        for (word, chunk) in words.iter_mut().zip(bytes.chunks(8)) {
            let mut b = [0; 8];
            b[..chunk.len()].copy_from_slice(chunk);
            *word = u64::from_ne_bytes(b);
        }
        Packed { words, n_heads, dim, dtype }
    }

    pub fn rows(&self) -> Rows<'_> {
        let head = (self.dim * self.dtype.size()) as isize;
        // SAFETY: the words hold [row][head][dim] of the dtype.
        unsafe { Rows::new(self.words.as_ptr().cast(), head * self.n_heads as isize, head, self.dtype, self.dim) }
    }
}

/// The result of an attention call, all `[row][head]` (out: times dim_v).
#[derive(Clone, PartialEq, Debug)]
pub struct Output {
    pub out: Vec<f32>,
    pub lse: Vec<f32>,
    pub bound: Vec<f32>,
    pub lse_bound: Vec<f32>,
    pub estimate: Vec<f32>,
    pub amplitude: Vec<f32>,
    pub stats: Stats,
}

/// How to attend.
#[derive(Clone, Copy, Debug)]
pub struct How {
    pub mode: Mode,
    pub tolerance: f32,
    pub scale: f32,
    pub dense: bool,
}

/// What bends scores.
#[derive(Clone, Copy, Default)]
pub struct Bent<'a> {
    pub softcap: f32,
    pub mask: Option<&'a Mask>,
    pub sinks: Option<&'a [f32]>,
    pub slopes: Option<&'a [f32]>,
}

/// One sequence in a cache of one layer.
pub struct Single {
    pub cache: Arc<Cache>,
    pub batch: Batch,
    pub sequence: u64,
    pub shape: Shape,
}

pub fn shape(group: usize, n_kv_heads: usize, dim_k: usize, dim_v: usize, dtype: Dtype, planes: usize) -> Shape {
    let n_q_heads = group * n_kv_heads;
    Shape {
        n_q_heads,
        n_kv_heads,
        dim_k,
        dim_v,
        dtype_k: dtype,
        dtype_v: dtype,
        planes_k: planes,
        planes_v: planes,
        window: 0,
        v_is_prefix: false,
    }
}

impl Single {
    pub fn new(format: Format, shape: Shape, exact_head: usize) -> Single {
        Single::with_nan(format, shape, exact_head, NanPolicy::Error)
    }

    pub fn with_nan(format: Format, shape: Shape, exact_head: usize, nan: NanPolicy) -> Single {
        let lossless = format != Format::Aligned;
        let config = Config {
            placement: Placement::Append,
            format,
            nan,
            layers: vec![shape],
            shares: Vec::new(),
            max_sequences: 64,
            exact_head: if lossless { 0 } else { exact_head },
            exact_tail: if lossless { 0 } else { 64 },
            max_bytes: 0,
        };
        let cache = Arc::new(Cache::new(config, Allocator::default()).unwrap());
        let sequence = cache.create().unwrap();
        let batch = Batch::new(Arc::clone(&cache), Bounds::default());
        Single { cache, batch, sequence, shape }
    }

    /// Appends rows `[row][kv head][dim]` as one step.
    pub fn append(&self, k: &[f32], v: &[f32]) {
        self.append_to(self.sequence, k, v);
    }

    /// The same to another sequence. Where V is a part of K, `v` is not looked at.
    pub fn append_to(&self, sequence: u64, k: &[f32], v: &[f32]) {
        let s = &self.shape;
        let n_new = k.len() / (s.n_kv_heads * s.dim_k);
        let (k, v) =
            (Packed::new(k, s.n_kv_heads, s.dim_k, s.dtype_k), Packed::new(v, s.n_kv_heads, s.dim_v, s.dtype_v));
        let v = if s.v_is_prefix { k.rows().prefix(s.dim_v) } else { v.rows() };
        self.batch.begin(&[StepSequence { sequence, n_new, n_q: 0 }], None).unwrap();
        self.batch.append(0, k.rows(), v).unwrap();
        self.batch.commit().unwrap();
    }

    /// Attends `[row][q head][dim_k]` f32 queries, each row over tokens `ranges[row]`.
    pub fn attend(&self, cpu: &Cpu, q: &[f32], ranges: &[(usize, usize)], how: How) -> alignedkv::Result<Output> {
        self.attend_bent(cpu, q, ranges, how, Bent::default())
    }

    /// The same over another sequence.
    pub fn attend_sequence(
        &self,
        sequence: u64,
        cpu: &Cpu,
        q: &[f32],
        ranges: &[(usize, usize)],
        how: How,
    ) -> alignedkv::Result<Output> {
        self.attend_any(sequence, cpu, q, ranges, how, Bent::default())
    }

    /// The same, of scores that are not the products alone.
    pub fn attend_bent(
        &self,
        cpu: &Cpu,
        q: &[f32],
        ranges: &[(usize, usize)],
        how: How,
        bent: Bent,
    ) -> alignedkv::Result<Output> {
        self.attend_any(self.sequence, cpu, q, ranges, how, bent)
    }

    fn attend_any(
        &self,
        sequence: u64,
        cpu: &Cpu,
        q: &[f32],
        ranges: &[(usize, usize)],
        how: How,
        bent: Bent,
    ) -> alignedkv::Result<Output> {
        let reader = self.cache.read(sequence, 0)?;
        let rows: Vec<QueryRow> = ranges
            .iter()
            .map(|&(from, to)| {
                let mut row = QueryRow::new(0, from, to, how.dense);
                row.n -= reader.positions().removed_within(from, to);
                row
            })
            .collect();
        attend_views(cpu, &[reader.view()], &rows, q, how, bent)
    }
}

/// The same of any rows over any sequences of a layer.
pub fn attend_views(
    cpu: &Cpu,
    views: &[SequenceView],
    rows: &[QueryRow],
    q: &[f32],
    how: How,
    bent: Bent,
) -> alignedkv::Result<Output> {
    let layout = views[0].layout;
    let s = &layout.shape;
    let (n_q, heads) = (rows.len(), s.n_q_heads);
    let q = Packed::new(q, heads, s.dim_k, Dtype::F32);
    let mut o = Output {
        out: vec![0.0; n_q * heads * s.dim_v],
        lse: vec![0.0; n_q * heads],
        bound: vec![0.0; n_q * heads],
        lse_bound: vec![0.0; n_q * heads],
        estimate: vec![0.0; n_q * heads],
        amplitude: vec![0.0; n_q * heads],
        stats: Stats::default(),
    };
    let stride = (s.dim_v * 4) as isize;
    // SAFETY: the vectors have a place for every row and head, and live through the call.
    let call = unsafe {
        Attention {
            shape: s,
            sequences: views,
            rows,
            q: q.rows(),
            lost: &[],
            out: RowsMut::new(o.out.as_mut_ptr().cast(), stride * heads as isize, stride, Dtype::F32, s.dim_v),
            scale: how.scale,
            softcap: bent.softcap,
            mask: bent.mask,
            positions: None,
            slopes: bent.slopes,
            sinks: bent.sinks,
            tolerance: how.tolerance,
            mode: how.mode,
            lse: Some(Floats::new(o.lse.as_mut_ptr())),
            bound: Some(Floats::new(o.bound.as_mut_ptr())),
            lse_bound: Some(Floats::new(o.lse_bound.as_mut_ptr())),
            estimate: Some(Floats::new(o.estimate.as_mut_ptr())),
            amplitude: Some(Floats::new(o.amplitude.as_mut_ptr())),
        }
    };
    let longest = views.iter().map(|view| view.len).max().unwrap();
    let bytes = Cpu::workspace_bytes(layout, longest, cpu.n_threads());
    let mut workspace = Block::new(&Memory::new(Allocator::default(), 0), bytes).unwrap();
    // SAFETY: a fresh block of the right size, used by this call alone.
    o.stats = unsafe { cpu.attention(Ok(&call), None, workspace.as_mut_ptr()) }?;
    Ok(o)
}

pub fn cpu(isa: Isa, n_threads: usize) -> Cpu {
    Cpu::new(isa, n_threads).unwrap()
}

/// Softmax attention in float64 of one query over rows `[n][stride]`, starting at `offset`: output and LSE.
pub fn attention64(q: &[f32], k: &[f32], v: &[f32], dim_v: usize, scale: f64) -> (Vec<f64>, f64) {
    let d = q.len();
    let s: Vec<f64> = k
        .chunks_exact(d)
        .map(|k| scale * k.iter().zip(q).map(|(&a, &b)| f64::from(a) * f64::from(b)).sum::<f64>())
        .collect();
    let max = s.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let e: Vec<f64> = s.iter().map(|s| (s - max).exp()).collect();
    let sum: f64 = e.iter().sum();
    let mut out = vec![0.0; dim_v];
    for (e, v) in e.iter().zip(v.chunks_exact(dim_v)) {
        for (o, &v) in out.iter_mut().zip(v) {
            *o += e / sum * f64::from(v);
        }
    }
    (out, max + sum.ln())
}

/// Rows of one head out of `[row][head][dim]`.
pub fn of_head(x: &[f32], n_heads: usize, dim: usize, head: usize) -> Vec<f32> {
    x.chunks_exact(n_heads * dim).flat_map(|row| row[head * dim..(head + 1) * dim].iter().copied()).collect()
}

/// Kinds of [`case`].
pub const KINDS: usize = 14;

/// Rows of one KV head, and queries.
pub struct Case {
    pub k: Vec<f32>,
    pub v: Vec<f32>,
    pub q: Vec<f32>,
}

/// Values whose further digits are all `low`, under a scale that the first row sets.
fn digits(rng: &mut Rng, n: usize, d: usize, low: f32) -> Vec<f32> {
    let unit = scale(120 + rng.below(16) as u8);
    let tail = low * (1.0 / 16.0 + 1.0 / 256.0 + 1.0 / 4096.0);
    (0..n * d)
        .map(|i| {
            let first = if i < d { 7.0 } else { rng.below(14) as f32 - 7.0 };
            (first + if i < d { 0.4 } else { tail }) * unit
        })
        .collect()
}

/// Random (kind 0) and adversarial rows.
pub fn case(rng: &mut Rng, kind: usize, n: usize, d: usize, dv: usize, g: usize) -> Case {
    let (mut k, mut v, mut q) = (rng.normals(n * d), rng.normals(n * dv), rng.normals(g * d));
    match kind {
        1 => {
            for _ in 0..1 + n / 8 {
                k[rng.below(n * d)] *= 1e3;
                v[rng.below(n * dv)] *= 1e3;
            }
        }
        2 => {
            for i in 1..n {
                k.copy_within(0..d, i * d);
            }
        }
        3 => q.fill(0.0),
        4 => {
            let huge = 10f32.powi(1 + rng.below(6) as i32);
            q.iter_mut().for_each(|x| *x *= huge);
        }
        5 => v.iter_mut().enumerate().for_each(|(i, x)| *x *= 10f32.powi(-((i / dv) as i32 % 12))),
        6 => k = digits(rng, n, d, -8.0),
        7 => k = digits(rng, n, d, 7.0),
        8 => {
            // Errors of all channels push the same way.
            let low = if rng.below(2) == 0 { -8.0 } else { 7.0 };
            k = digits(rng, n, d, low);
            q.iter_mut().for_each(|x| *x = x.abs());
            v = digits(rng, n, dv, -8.0);
        }
        9 => {
            let at = rng.below(n);
            for c in 0..d {
                k[at * d + c] = 3.0 * q[c];
            }
        }
        10 => k.iter_mut().enumerate().for_each(|(i, x)| *x *= (i / d + 1) as f32),
        11 => {
            q.iter_mut().for_each(|x| *x *= 1e-20);
            k.iter_mut().for_each(|x| *x *= 1e-6);
        }
        12 => {
            // A sink of no value; weights that binary32 flushes to 0, under scores that are hardly known, have it all.
            let coarse = 10f32.powf(1.5 * rng.uniform() as f32);
            let far = 60.0 + 200.0 * rng.uniform() as f32;
            k.iter_mut().for_each(|x| *x *= coarse);
            let square: f32 = q[..d].iter().map(|x| x * x).sum();
            for c in 0..d {
                k[c] = far * q[c] / square;
            }
            v.iter_mut().enumerate().for_each(|(i, x)| *x *= if i < dv { 0.0 } else { 1e4 });
        }
        13 => v.iter_mut().for_each(|x| *x = if rng.below(2) == 0 { 0.0 } else { *x * 1e-30 }),
        _ => {}
    }
    Case { k, v, q }
}
