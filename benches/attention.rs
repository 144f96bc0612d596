//! One layer through the C ABI, a piece at a time: 32 query heads, 8 KV heads of 128, f16 rows, random normal (every token
//! weighs about the same: the hard case). Sequences take turns, so that none is still in a cache. Throughput is in bytes
//! of f16 K and V that a call covers, whatever it reads of them. Side by side with others: `benches/peers`.

use alignedkv::capi::{attention::*, batch::*, cache::*, context::*, sequence::*, status::*, types::*};
use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use half::f16;
use std::ffi::{CStr, c_void};
use std::mem::{size_of, zeroed};
use std::ptr::{null, null_mut};
use std::time::Duration;

const HEADS: usize = 8;
const Q_HEADS: usize = 32;
const DIM: usize = 128;
/// Query rows of a prefill.
const MAX_Q: usize = 512;
/// Tokens in all sequences together: 256 MiB of f16.
const TOKENS: usize = 65536;

fn ok(status: akv_status) {
    if status != AKV_OK {
        let mut text = [0u8; 512];
        // SAFETY: a buffer of that size; the text ends with a NUL.
        unsafe { akv_last_error(text.as_mut_ptr().cast(), text.len(), null_mut()) };
        panic!("{}", CStr::from_bytes_until_nul(&text).expect("a NUL").to_string_lossy());
    }
}

/// Normal values; rows begin anywhere in them.
struct Random {
    values: Vec<f16>,
    state: u64,
}

impl Random {
    fn new() -> Random {
        let mut random = Random { values: Vec::new(), state: 1 };
        // Twelve uniforms make a normal.
        random.values = (0..1 << 18)
            .map(|_| f16::from_f64((0..12).map(|_| random.bits() as f64 / u64::MAX as f64).sum::<f64>() - 6.0))
            .collect();
        random
    }

    fn bits(&mut self) -> u64 {
        self.state ^= self.state << 13;
        self.state ^= self.state >> 7;
        self.state ^= self.state << 17;
        self.state
    }

    fn rows(&mut self, n: usize) -> Vec<f16> {
        let mut rows = Vec::with_capacity(n * DIM);
        for _ in 0..n {
            let at = self.bits() as usize % (self.values.len() - DIM);
            rows.extend_from_slice(&self.values[at..at + DIM]);
        }
        rows
    }
}

fn rows<T>(data: &mut [T], dtype: i32) -> akv_rows {
    akv_rows { data: data.as_mut_ptr().cast(), stride_row: 0, stride_head: 0, dtype, reserved: 0 }
}

/// `TOKENS / n` sequences of `n` tokens in a cache of their own.
struct Engine {
    context: *mut akv_context,
    cache: *mut akv_cache,
    batch: *mut akv_batch,
    sequences: Vec<akv_sequence>,
    next: usize,
    q: Vec<f16>,
    out: Vec<f32>,
}

impl Engine {
    fn new(format: i32, n: usize, threads: i32) -> Engine {
        let mut random = Random::new();
        // SAFETY: descriptors of integers and pointers, for which zero is the default; all pointers outlive their calls.
        unsafe {
            let (mut context, mut cache, mut batch) = (null_mut(), null_mut(), null_mut());
            let mut desc: akv_context_desc = zeroed();
            (desc.struct_size, desc.abi_version) = (size_of::<akv_context_desc>() as u32, AKV_ABI_VERSION);
            desc.n_threads = threads;
            ok(akv_context_create(&desc, &mut context));
            let mut layer: akv_layer_desc = zeroed();
            (layer.n_q_heads, layer.n_kv_heads, layer.dim_k) = (Q_HEADS as i32, HEADS as i32, DIM as i32);
            (layer.dtype_k, layer.dtype_v) = (AKV_F16, AKV_F16);
            let mut desc: akv_cache_desc = zeroed();
            (desc.struct_size, desc.n_layers, desc.layers) = (size_of::<akv_cache_desc>() as u32, 1, &layer);
            desc.format = format;
            ok(akv_cache_create(context, &desc, &mut cache));
            let mut bounds: akv_batch_desc = zeroed();
            bounds.struct_size = size_of::<akv_batch_desc>() as u32;
            ok(akv_batch_create(cache, &bounds, &mut batch));
            let mut engine = Engine {
                context,
                cache,
                batch,
                sequences: vec![0; TOKENS / n],
                next: 0,
                q: random.rows(MAX_Q * Q_HEADS),
                out: vec![0.0; MAX_Q * Q_HEADS * DIM],
            };
            for i in 0..engine.sequences.len() {
                ok(akv_sequence_create(cache, &mut engine.sequences[i]));
                for _ in 0..n / 1024 {
                    let (mut k, mut v) = (random.rows(1024 * HEADS), random.rows(1024 * HEADS));
                    engine.begin(i, 1024, 0);
                    ok(akv_quantize_kv(batch, 0, &rows(&mut k, AKV_F16), &rows(&mut v, AKV_F16), null_mut()));
                    ok(akv_batch_commit(batch));
                }
            }
            engine
        }
    }

    fn begin(&mut self, sequence: usize, n_new: i32, n_q: i32) {
        // SAFETY: as in `new`.
        unsafe {
            let mut step: akv_batch_desc = zeroed();
            (step.struct_size, step.n_sequences) = (size_of::<akv_batch_desc>() as u32, 1);
            (step.sequences, step.n_new, step.n_q) = (&self.sequences[sequence], &n_new, &n_q);
            step.positions = null();
            ok(akv_batch_begin(self.batch, &step, null_mut::<c_void>()));
        }
    }

    /// The last `n_q` query rows of the next sequence; `window` = 0: over all of it.
    fn attend(&mut self, n_q: usize, tolerance: f32, window: usize) {
        self.next = (self.next + 1) % self.sequences.len();
        self.begin(self.next, 0, n_q as i32);
        // SAFETY: as in `new`.
        unsafe {
            let mut desc: akv_attention_desc = zeroed();
            desc.struct_size = size_of::<akv_attention_desc>() as u32;
            (desc.q, desc.out) = (rows(&mut self.q, AKV_F16), rows(&mut self.out, AKV_F32));
            (desc.tolerance, desc.window) = (tolerance, window as i32);
            ok(akv_aligned_attention(self.batch, 0, &desc));
            ok(akv_batch_abort(self.batch));
        }
    }
}

impl Drop for Engine {
    fn drop(&mut self) {
        // SAFETY: live handles, made here.
        unsafe {
            ok(akv_batch_destroy(self.batch));
            ok(akv_cache_destroy(self.cache));
            ok(akv_context_destroy(self.context));
        }
    }
}

fn decode(c: &mut Criterion) {
    let mut group = c.benchmark_group("decode");
    group.sample_size(10).warm_up_time(Duration::from_millis(500)).measurement_time(Duration::from_secs(2));
    for n in [4096, 32768] {
        group.throughput(Throughput::Bytes((2 * 2 * n * HEADS * DIM) as u64));
        for (name, format, tolerance) in [
            // Nothing is within reach of so much: plane 0 of K alone is read.
            ("scan alone", AKV_FORMAT_ALIGNED, 1e3),
            ("aligned 1e-3", AKV_FORMAT_ALIGNED, 1e-3),
            ("aligned 1e-2", AKV_FORMAT_ALIGNED, 1e-2),
            ("refined to all planes", AKV_FORMAT_ALIGNED, 1e-9),
            ("raw f16", AKV_FORMAT_RAW, 0.0),
        ] {
            for threads in [1, 2] {
                let mut engine = None;
                group.bench_function(BenchmarkId::new(format!("{name}, {threads} threads"), n), |b| {
                    let engine = engine.get_or_insert_with(|| Engine::new(format, n, threads));
                    b.iter(|| engine.attend(1, tolerance, 0));
                });
            }
        }
    }
    group.finish();
}

/// Sliding windows at decode: how long one must be for the aligned format to be faster than the rows themselves.
fn windows(c: &mut Criterion) {
    let mut group = c.benchmark_group("windows");
    group.sample_size(10).warm_up_time(Duration::from_millis(300)).measurement_time(Duration::from_secs(1));
    for (name, format) in [("aligned 1e-3", AKV_FORMAT_ALIGNED), ("raw f16", AKV_FORMAT_RAW)] {
        let mut engine = None;
        for window in [128, 256, 512, 1024] {
            group.throughput(Throughput::Bytes((2 * 2 * window * HEADS * DIM) as u64));
            group.bench_function(BenchmarkId::new(name, window), |b| {
                let engine = engine.get_or_insert_with(|| Engine::new(format, 2048, 1));
                b.iter(|| engine.attend(1, 1e-3, window));
            });
        }
    }
    group.finish();
}

/// Rows appended and rolled back: encoding, and what a step costs beside it.
fn encode(c: &mut Criterion) {
    let mut group = c.benchmark_group("encode");
    group.sample_size(20).warm_up_time(Duration::from_millis(500)).measurement_time(Duration::from_secs(2));
    for (name, format) in [("aligned", AKV_FORMAT_ALIGNED), ("raw f16", AKV_FORMAT_RAW)] {
        for n in [1, 4096] {
            let mut engine = None;
            group.throughput(Throughput::Bytes((2 * 2 * n * HEADS * DIM) as u64));
            group.bench_function(BenchmarkId::new(name, n), |b| {
                let engine = engine.get_or_insert_with(|| Engine::new(format, 4096, 1));
                let mut random = Random::new();
                // Enough rows that they come from memory.
                let mut rows_k: Vec<_> = (0..8).map(|_| random.rows(n * HEADS)).collect();
                let mut rows_v: Vec<_> = (0..8).map(|_| random.rows(n * HEADS)).collect();
                let mut i = 0;
                b.iter(|| {
                    i += 1;
                    engine.begin(i % engine.sequences.len(), n as i32, 0);
                    let (k, v) = (&mut rows_k[i % 8], &mut rows_v[i % 8]);
                    // SAFETY: as in `new`.
                    unsafe {
                        let (k, v) = (rows(k, AKV_F16), rows(v, AKV_F16));
                        ok(akv_quantize_kv(engine.batch, 0, &k, &v, null_mut()));
                        ok(akv_batch_abort(engine.batch));
                    }
                });
            });
        }
    }
    let mut random = Random::new();
    let from: Vec<_> = (0..16).map(|_| random.rows(4096 * HEADS)).collect();
    let mut to = from.clone();
    let mut i = 0;
    group.bench_function(BenchmarkId::new("a plain copy", 4096), |b| {
        b.iter(|| {
            i = (i + 2) % 16;
            for j in [i, i + 1] {
                to[j].copy_from_slice(&from[j]);
            }
        });
    });
    group.finish();
}

/// The same attention as products of f32 matrices: scores of all tokens, softmax, weighted sums, a head at a time. `k` and
/// `v` are `[KV head][tokens][DIM]`; row i of `q` sees all but the last `MAX_Q - 1 - i` tokens.
fn by_products(q: &[f32], k: &[f32], v: &[f32], n: usize, scores: &mut [f32], out: &mut [f32]) {
    for head in 0..Q_HEADS {
        let kv = head / (Q_HEADS / HEADS) * n * DIM;
        let (row, d) = (Q_HEADS * DIM, DIM as isize);
        // SAFETY: matrices of these sizes and strides, asserted by the slices.
        unsafe {
            let (q, k) = (&q[head * DIM..], &k[kv..kv + n * DIM]);
            assert!(q.len() >= (MAX_Q - 1) * row + DIM && scores.len() >= MAX_Q * n);
            matrixmultiply::sgemm(
                MAX_Q,
                DIM,
                n,
                0.088,
                q.as_ptr(),
                row as isize,
                1,
                k.as_ptr(),
                1,
                d,
                0.0,
                scores.as_mut_ptr(),
                n as isize,
                1,
            );
        }
        for (i, scores) in scores.chunks_exact_mut(n).enumerate() {
            let (seen, hidden) = scores.split_at_mut(n - MAX_Q + 1 + i);
            hidden.fill(0.0);
            let max = seen.iter().fold(f32::MIN, |max, &s| max.max(s));
            let mut sum = 0.0;
            for s in seen.iter_mut() {
                *s = (*s - max).exp();
                sum += *s;
            }
            seen.iter_mut().for_each(|s| *s /= sum);
        }
        // SAFETY: as above.
        unsafe {
            let (v, out) = (&v[kv..kv + n * DIM], &mut out[head * DIM..]);
            assert!(out.len() >= (MAX_Q - 1) * row + DIM);
            matrixmultiply::sgemm(
                MAX_Q,
                n,
                DIM,
                1.0,
                scores.as_ptr(),
                n as isize,
                1,
                v.as_ptr(),
                d,
                1,
                0.0,
                out.as_mut_ptr(),
                row as isize,
                1,
            );
        }
    }
}

/// 512 query rows over 4096 tokens: every digit is read, on the dense path.
fn prefill(c: &mut Criterion) {
    let mut group = c.benchmark_group("prefill");
    group.sample_size(10).warm_up_time(Duration::from_millis(500)).measurement_time(Duration::from_secs(2));
    for (name, format) in [("aligned", AKV_FORMAT_ALIGNED), ("raw f16", AKV_FORMAT_RAW)] {
        let mut engine = None;
        // Multiplications and additions.
        group.throughput(Throughput::Elements((4 * MAX_Q * 4096 * Q_HEADS * DIM) as u64));
        group.bench_function(BenchmarkId::new(name, 4096), |b| {
            let engine = engine.get_or_insert_with(|| Engine::new(format, 4096, 1));
            b.iter(|| engine.attend(MAX_Q, 1e-3, 0));
        });
    }
    let mut random = Random::new();
    let mut floats = |n: usize| random.rows(n).iter().map(|x| x.to_f32()).collect::<Vec<_>>();
    let (q, k, v) = (floats(MAX_Q * Q_HEADS), floats(4096 * HEADS), floats(4096 * HEADS));
    let (mut scores, mut out) = (vec![0.0; MAX_Q * 4096], vec![0.0; MAX_Q * Q_HEADS * DIM]);
    group.bench_function(BenchmarkId::new("products of f32 matrices", 4096), |b| {
        b.iter(|| by_products(&q, &k, &v, 4096, &mut scores, &mut out));
    });
    group.finish();
}

/// Eight partial states of 32 heads.
fn merge(c: &mut Criterion) {
    let engine = Engine::new(AKV_FORMAT_RAW, 4096, 1);
    let mut outs = vec![vec![0.5f32; Q_HEADS * DIM]; 9];
    let mut lses = vec![vec![1.0f32; Q_HEADS]; 9];
    // SAFETY: zero is the default of every field.
    let mut states: Vec<akv_state> = (0..9).map(|_| unsafe { zeroed() }).collect();
    for ((state, out), lse) in states.iter_mut().zip(&mut outs).zip(&mut lses) {
        (state.out, state.lse) = (out.as_mut_ptr(), lse.as_mut_ptr());
    }
    let (out, parts) = (states[8], &states[..8]);
    c.bench_function("merge/8 parts", |b| {
        // SAFETY: live arrays of these sizes.
        b.iter(|| unsafe {
            ok(akv_merge_states(engine.context, parts.as_ptr(), 8, 1, Q_HEADS as i32, DIM as i32, &out, null_mut()));
        });
    });
}

criterion_group!(benches, decode, windows, encode, prefill, merge);
criterion_main!(benches);
