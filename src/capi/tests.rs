//! Whole calls, from C's side.

use super::attention::*;
use super::batch::*;
use super::cache::*;
use super::context::*;
use super::sequence::*;
use super::status::*;
use super::types::*;
use std::ffi::{CStr, c_char, c_void};
use std::ptr::{null, null_mut};
use std::sync::Barrier;
use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};

const HEADS: usize = 4;
const KV_HEADS: usize = 2;
const DIM: usize = 32;

fn zeroed<T>() -> T {
    // SAFETY: used for the plain data of `types` alone.
    unsafe { std::mem::zeroed() }
}

fn text() -> String {
    let mut buf = [0 as c_char; 512];
    // SAFETY: `buf` has 512 bytes, and comes back terminated.
    unsafe {
        akv_last_error(buf.as_mut_ptr(), buf.len(), null_mut());
        CStr::from_ptr(buf.as_ptr()).to_string_lossy().into_owned()
    }
}

#[track_caller]
fn ok(status: akv_status) {
    assert_eq!(status, AKV_OK, "{}", text());
}

#[track_caller]
fn fails(status: akv_status, expected: akv_status, part: &str) {
    assert!(status == expected && text().contains(part), "{status}: {}", text());
}

fn context_desc() -> akv_context_desc {
    akv_context_desc { struct_size: size_of::<akv_context_desc>() as u32, abi_version: AKV_ABI_VERSION, ..zeroed() }
}

fn rows(data: *const f32) -> akv_rows {
    akv_rows { data: data.cast_mut().cast(), dtype: AKV_F32, ..zeroed() }
}

/// A context, a cache of one layer, a sequence, a batch.
struct Engine {
    context: *mut akv_context,
    cache: *mut akv_cache,
    sequence: akv_sequence,
    batch: *mut akv_batch,
}

impl Engine {
    fn new(format: i32, context: &akv_context_desc, max_threads: i32) -> Engine {
        let mut e = Engine { context: null_mut(), cache: null_mut(), sequence: 0, batch: null_mut() };
        let (n_q_heads, n_kv_heads, dim_k) = (HEADS as i32, KV_HEADS as i32, DIM as i32);
        let layer = akv_layer_desc { n_q_heads, n_kv_heads, dim_k, ..zeroed() };
        let struct_size = size_of::<akv_cache_desc>() as u32;
        let cache = akv_cache_desc { struct_size, format, n_layers: 1, layers: &layer, ..zeroed() };
        let struct_size = size_of::<akv_batch_desc>() as u32;
        let bounds = akv_batch_desc { struct_size, max_q: 64, max_kv: 1100, max_threads, ..zeroed() };
        // SAFETY: valid descriptors and outputs.
        unsafe {
            ok(akv_context_create(context, &mut e.context));
            ok(akv_cache_create(e.context, &cache, &mut e.cache));
            ok(akv_sequence_create(e.cache, &mut e.sequence));
            ok(akv_batch_create(e.cache, &bounds, &mut e.batch));
        }
        e
    }

    fn begin(&self, n_new: i32, n_q: i32) -> akv_status {
        let struct_size = size_of::<akv_batch_desc>() as u32;
        let step = akv_batch_desc {
            struct_size,
            n_sequences: 1,
            sequences: &self.sequence,
            n_new: &n_new,
            n_q: &n_q,
            ..zeroed()
        };
        // SAFETY: one of each.
        unsafe { akv_batch_begin(self.batch, &step, null_mut()) }
    }

    fn append(&self, k: &[f32], v: &[f32]) -> akv_status {
        // SAFETY: as many rows as the step has.
        unsafe { akv_quantize_kv(self.batch, 0, &rows(k.as_ptr()), &rows(v.as_ptr()), null_mut()) }
    }

    fn attend(&self, desc: &akv_attention_desc) -> akv_status {
        // SAFETY: the tests' descriptors are valid, or refused.
        unsafe { akv_aligned_attention(self.batch, 0, desc) }
    }
}

impl Drop for Engine {
    fn drop(&mut self) {
        // SAFETY: handles.
        unsafe {
            ok(akv_batch_destroy(self.batch));
            ok(akv_cache_destroy(self.cache));
            ok(akv_context_destroy(self.context));
        }
    }
}

fn attention(q: &[f32], out: &mut [f32]) -> akv_attention_desc {
    let struct_size = size_of::<akv_attention_desc>() as u32;
    akv_attention_desc { struct_size, q: rows(q.as_ptr()), out: rows(out.as_mut_ptr()), ..zeroed() }
}

fn noise(n: usize, seed: u32) -> Vec<f32> {
    let mut x = seed;
    let mut next = || {
        x = x.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (x >> 8) as f32 / (1 << 24) as f32 - 0.5
    };
    (0..n).map(|_| next() + next() + next()).collect()
}

/// Causal attention of the last `q.len() / (HEADS * DIM)` of `n` tokens, over tokens `from..to`.
fn truth(q: &[f32], k: &[f32], v: &[f32], n: usize, from: usize, to: usize) -> Vec<f64> {
    let n_q = q.len() / (HEADS * DIM);
    let mut out = vec![0.0; q.len()];
    for row in 0..n_q {
        for head in 0..HEADS {
            let at = |t: usize| (t * KV_HEADS + head * KV_HEADS / HEADS) * DIM;
            let q = &q[(row * HEADS + head) * DIM..][..DIM];
            let seen: Vec<usize> = (from..to.min(n - n_q + row + 1)).collect();
            let dot = |t: usize| (0..DIM).map(|c| f64::from(q[c]) * f64::from(k[at(t) + c])).sum::<f64>();
            let w: Vec<f64> = seen.iter().map(|&t| (dot(t) / (DIM as f64).sqrt()).exp()).collect();
            for (t, w) in seen.iter().zip(&w) {
                for c in 0..DIM {
                    out[(row * HEADS + head) * DIM + c] += w * f64::from(v[at(*t) + c]);
                }
            }
            let sum: f64 = w.iter().sum();
            out[(row * HEADS + head) * DIM..][..DIM].iter_mut().for_each(|x| *x /= sum);
        }
    }
    out
}

const N: usize = 300;

/// An engine with N tokens and a step of `n_q` query rows over them.
fn prefilled(
    format: i32,
    context: &akv_context_desc,
    max_threads: i32,
    n_q: i32,
) -> (Engine, Vec<f32>, Vec<f32>, Vec<f32>) {
    let e = Engine::new(format, context, max_threads);
    let (k, v) = (noise(N * KV_HEADS * DIM, 1), noise(N * KV_HEADS * DIM, 2));
    ok(e.begin(N as i32, n_q));
    ok(e.append(&k, &v));
    let q = noise(n_q as usize * HEADS * DIM, 3);
    (e, k, v, q)
}

#[test]
fn a_step_from_begin_to_commit() {
    for format in [AKV_FORMAT_ALIGNED, AKV_FORMAT_RAW] {
        for n_q in [1, 3, 20] {
            let (e, k, v, q) = prefilled(format, &context_desc(), 0, n_q);
            let mut out = vec![0.0; q.len()];
            let mut bound = vec![0.0; q.len() / DIM];
            let mut stats: akv_stats = zeroed();
            let desc = akv_attention_desc { bound: bound.as_mut_ptr(), stats: &mut stats, ..attention(&q, &mut out) };
            ok(e.attend(&desc));
            let truth = truth(&q, &k, &v, N, 0, N);
            for (i, (x, y)) in out.iter().zip(&truth).enumerate() {
                let error = (f64::from(*x) - y).abs();
                assert!(error <= f64::from(bound[i / DIM]) && error < 0.02, "{i}: {x} {y} +- {}", bound[i / DIM]);
            }
            let dense = format == AKV_FORMAT_RAW || n_q > 8;
            assert_eq!(stats.path, if dense { AKV_PATH_DENSE } else { AKV_PATH_PROGRESSIVE });
            assert_eq!((stats.backend, stats.dense_rows), (AKV_CPU, if dense { n_q as u64 } else { 0 }));
            // SAFETY: handles and an output.
            unsafe {
                let mut len = -1;
                ok(akv_sequence_length(e.cache, e.sequence, -1, &mut len));
                assert_eq!(len, 0);
                ok(akv_batch_commit(e.batch));
                ok(akv_sequence_length(e.cache, e.sequence, -1, &mut len));
                assert_eq!(len, N as i64);
                fails(akv_batch_commit(e.batch), AKV_E_ARGUMENT, "no step in progress");
            }
        }
    }
}

struct Gate(Barrier, AtomicUsize);

unsafe extern "C" fn wait(gate: *mut c_void) {
    // SAFETY: the tests pass a Gate.
    let gate = unsafe { &*gate.cast::<Gate>() };
    gate.0.wait();
    gate.1.fetch_add(1, SeqCst);
}

/// Attention on `nth` threads of the caller's; what each of them returned.
fn together(e: &Engine, desc: akv_attention_desc, nth: usize) -> Vec<akv_status> {
    let gate = Gate(Barrier::new(nth), AtomicUsize::new(0));
    let (mut bytes, mut align) = (0, 0);
    // SAFETY: outputs.
    unsafe { ok(akv_batch_workspace(e.batch, &mut bytes, &mut align)) };
    let mut memory = vec![0u8; bytes + align];
    let workspace = memory.as_mut_ptr().wrapping_add(memory.as_ptr().align_offset(align));
    let (desc, workspace, batch) = (&raw const desc as usize, workspace as usize, e.batch as usize);
    let gate = &gate;
    let statuses = std::thread::scope(|s| {
        let threads: Vec<_> = (0..nth)
            .map(|ith| {
                s.spawn(move || {
                    let threads = akv_threads {
                        ith: ith as i32,
                        nth: nth as i32,
                        barrier: Some(wait),
                        user: (&raw const *gate).cast_mut().cast(),
                    };
                    // SAFETY: the descriptor outlives the scope; the workspace is as asked for.
                    unsafe {
                        let mut desc = (desc as *const akv_attention_desc).read();
                        desc.threads = &threads;
                        (desc.workspace, desc.workspace_bytes) = (workspace as *mut c_void, bytes);
                        akv_aligned_attention(batch as *mut akv_batch, 0, &desc)
                    }
                })
            })
            .collect();
        threads.into_iter().map(|t| t.join().unwrap()).collect()
    });
    assert_eq!(gate.1.load(SeqCst) % nth, 0, "all threads enter the barrier equally often");
    statuses
}

#[test]
fn the_bits_do_not_depend_on_threads() {
    for n_q in [1, 20] {
        let (e, _, _, q) = prefilled(AKV_FORMAT_ALIGNED, &context_desc(), 4, n_q);
        let mut alone = vec![0.0; q.len()];
        ok(e.attend(&attention(&q, &mut alone)));
        for nth in [1, 2, 4] {
            let mut out = vec![0.0; q.len()];
            assert_eq!(together(&e, attention(&q, &mut out), nth), vec![AKV_OK; nth], "{}", text());
            assert_eq!(out, alone);
        }
        let (e, ..) = prefilled(AKV_FORMAT_ALIGNED, &akv_context_desc { n_threads: 3, ..context_desc() }, 0, n_q);
        let mut out = vec![0.0; q.len()];
        ok(e.attend(&attention(&q, &mut out)));
        assert_eq!(out, alone, "the context's threads");
    }
}

#[test]
fn an_error_is_every_threads() {
    let (e, _, _, mut q) = prefilled(AKV_FORMAT_ALIGNED, &context_desc(), 4, 1);
    q[77] = f32::NAN;
    let mut out = vec![7.0; q.len()];
    assert_eq!(together(&e, attention(&q, &mut out), 4), [AKV_E_NONFINITE; 4]);
    assert!(out.iter().all(|&x| x == 7.0));
    // SAFETY: a handle. The layer has no rows in the next step, which only the cache knows.
    unsafe { ok(akv_batch_abort(e.batch)) };
    ok(e.begin(1, 1));
    q[77] = 0.0;
    assert_eq!(together(&e, attention(&q, &mut out), 4), [AKV_E_ARGUMENT; 4]);
    fails(e.attend(&attention(&q, &mut out)), AKV_E_ARGUMENT, "layer 0");
    assert!(out.iter().all(|&x| x == 7.0));
}

#[test]
fn parts_of_a_context_merge_into_the_whole() {
    let (e, k, v, q) = prefilled(AKV_FORMAT_RAW, &context_desc(), 0, 2);
    let n = q.len() / DIM;
    let mut arrays: Vec<Vec<f32>> = [q.len(), n, n, n, q.len(), n, n, n].map(|n| vec![0.0; n]).into();
    let p: Vec<*mut f32> = arrays.iter_mut().map(|a| a.as_mut_ptr()).collect();
    let states =
        [0, 4].map(|i| akv_state { out: p[i], lse: p[i + 1], bound: p[i + 2], lse_bound: p[i + 3], ..zeroed() });
    for (state, (from, to)) in states.iter().zip([(0, 100), (100, 10_000)]) {
        let (from, to) = ([from; 2], [to; 2]);
        let desc = akv_attention_desc {
            out: rows(state.out),
            lse: state.lse,
            bound: state.bound,
            lse_bound: state.lse_bound,
            kv_from: from.as_ptr(),
            kv_to: to.as_ptr(),
            ..attention(&q, &mut [])
        };
        ok(e.attend(&desc));
    }
    // SAFETY: as many elements as said.
    unsafe {
        ok(akv_merge_states(e.context, states.as_ptr(), 2, 2, HEADS as i32, DIM as i32, &states[0], null_mut()));
    }
    let (out, bound) = (arrays[0].clone(), arrays[2].clone());
    for (i, (x, y)) in out.iter().zip(truth(&q, &k, &v, N, 0, N)).enumerate() {
        assert!((f64::from(*x) - y).abs() <= f64::from(bound[i / DIM]) && bound[i / DIM] < 1e-3, "{i}: {x} {y}");
    }
}

#[test]
fn windows_and_ranges_are_what_they_say() {
    let (e, k, v, q) = prefilled(AKV_FORMAT_RAW, &context_desc(), 0, 1);
    let mut out = vec![0.0; q.len()];
    let check = |desc: akv_attention_desc, from, to| {
        ok(e.attend(&desc));
        // SAFETY: `out` below.
        let out = unsafe { std::slice::from_raw_parts(desc.out.data.cast::<f32>(), q.len()) };
        for (x, y) in out.iter().zip(truth(&q, &k, &v, N, from, to)) {
            assert!((f64::from(*x) - y).abs() < 1e-5, "{x} {y}");
        }
    };
    check(akv_attention_desc { window: 7, ..attention(&q, &mut out) }, N - 7, N);
    check(akv_attention_desc { window: 7, kv_to: &(N as i64 - 2), ..attention(&q, &mut out) }, N - 7, N - 2);
    check(akv_attention_desc { kv_from: &5, kv_to: &6, ..attention(&q, &mut out) }, 5, 6);
    // Nothing is seen.
    let mut lse = vec![0.0f32; HEADS];
    let desc = akv_attention_desc { kv_from: &9, kv_to: &9, lse: lse.as_mut_ptr(), ..attention(&q, &mut out) };
    ok(e.attend(&desc));
    assert!(out.iter().all(|&x| x == 0.0) && lse.iter().all(|&x| x == f32::NEG_INFINITY));
    fails(
        e.attend(&akv_attention_desc { kv_to: &-1, ..attention(&q, &mut out) }),
        AKV_E_ARGUMENT,
        "desc->kv_to[0] is -1",
    );
}

#[test]
fn memory_that_cannot_be_used_is_refused() {
    let (e, _, _, q) = prefilled(AKV_FORMAT_ALIGNED, &context_desc(), 4, 2);
    let mut out = vec![7.0; q.len() + 64];
    let p = out.as_mut_ptr();
    let base = attention(&q, &mut out);
    let refused = |desc: akv_attention_desc, part: &str| fails(e.attend(&desc), AKV_E_ARGUMENT, part);
    refused(akv_attention_desc { out: base.q, ..base }, "desc->out overlaps desc->q");
    refused(akv_attention_desc { lse: p.wrapping_add(q.len() - 1), ..base }, "desc->out overlaps desc->lse");
    refused(akv_attention_desc { bound: p.wrapping_byte_add(1), ..base }, "desc->bound is 0x");
    refused(akv_attention_desc { q: rows(null()), ..base }, "desc->q->data is NULL");
    refused(akv_attention_desc { out: rows(null()), ..base }, "desc->out->data is NULL");
    refused(akv_attention_desc { workspace: 64 as _, workspace_bytes: 1, ..base }, "desc->workspace_bytes is 1");
    refused(akv_attention_desc { workspace: 65 as _, workspace_bytes: 1 << 20, ..base }, "aligned to 64");
    let threads = akv_threads { ith: 0, nth: 2, barrier: Some(wait), user: null_mut() };
    refused(akv_attention_desc { threads: &threads, ..base }, "desc->workspace is NULL");
    assert!(out.iter().all(|&x| x == 7.0));
    // SAFETY: a wrong index.
    fails(unsafe { akv_aligned_attention(e.batch, 1, &base) }, AKV_E_ARGUMENT, "layer is 1: expected 0 to 0");
    let half = akv_rows { dtype: AKV_F16, ..rows(q.as_ptr()) };
    // SAFETY: refused before it is read.
    let status = unsafe { akv_quantize_kv(e.batch, 0, &half, &half, null_mut()) };
    fails(status, AKV_E_ARGUMENT, "key->dtype is AKV_F16: expected the layer's, AKV_F32");
}

/// The largest call that a batch's bounds allow needs the workspace that is asked for, all of it, and no more.
#[test]
fn the_workspace_is_as_large_as_needed() {
    const MAX: usize = 1100;
    for n_q in [1, 64] {
        let e = Engine::new(AKV_FORMAT_ALIGNED, &context_desc(), 1);
        ok(e.begin(MAX as i32, n_q));
        ok(e.append(&noise(MAX * KV_HEADS * DIM, 1), &noise(MAX * KV_HEADS * DIM, 2)));
        let q = noise(n_q as usize * HEADS * DIM, 3);
        let mut out = vec![7.0; q.len()];
        let (mut bytes, mut align) = (0, 0);
        // SAFETY: outputs.
        unsafe { ok(akv_batch_workspace(e.batch, &mut bytes, &mut align)) };
        let mut memory = vec![0xa5u8; bytes + align + 256];
        let at = memory.as_ptr().align_offset(align);
        let workspace = memory[at..].as_mut_ptr().cast::<c_void>();
        let desc = akv_attention_desc { workspace, workspace_bytes: bytes, ..attention(&q, &mut out) };
        let short = akv_attention_desc { workspace_bytes: bytes - 1, ..desc };
        fails(e.attend(&short), AKV_E_ARGUMENT, &format!("desc->workspace_bytes is {}", bytes - 1));
        assert!(out.iter().all(|&x| x == 7.0) && memory.iter().all(|&b| b == 0xa5));
        ok(e.attend(&desc));
        assert!(memory[at + bytes..].iter().all(|&b| b == 0xa5), "n_q {n_q}: wrote behind the workspace");
    }
}

/// Calls on a batch while attention over its step is under way: tried by its own barrier, between two phases.
#[test]
fn a_step_at_work_is_busy() {
    struct Tries(Barrier, usize, AtomicUsize);
    unsafe extern "C" fn wait_and_try(tries: *mut c_void) {
        // SAFETY: the test passes Tries.
        let tries = unsafe { &*tries.cast::<Tries>() };
        tries.0.wait();
        let batch = tries.1 as *mut akv_batch;
        // SAFETY: a handle.
        let statuses = unsafe { [akv_batch_commit(batch), akv_batch_abort(batch), akv_batch_destroy(batch)] };
        tries.2.fetch_add(usize::from(statuses == [AKV_E_BUSY; 3]), SeqCst);
        tries.0.wait();
    }
    let (e, _, _, q) = prefilled(AKV_FORMAT_ALIGNED, &context_desc(), 2, 1);
    let mut out = vec![0.0; q.len()];
    let tries = Tries(Barrier::new(2), e.batch as usize, AtomicUsize::new(0));
    let calls = AtomicUsize::new(0);
    let (mut bytes, mut align) = (0, 0);
    // SAFETY: outputs.
    unsafe { ok(akv_batch_workspace(e.batch, &mut bytes, &mut align)) };
    let mut memory = vec![0u8; bytes + align];
    let workspace = memory.as_mut_ptr().wrapping_add(memory.as_ptr().align_offset(align)).cast::<c_void>();
    let desc = akv_attention_desc { workspace, workspace_bytes: bytes, ..attention(&q, &mut out) };
    let (desc, batch) = (&raw const desc as usize, e.batch as usize);
    std::thread::scope(|s| {
        for ith in 0..2 {
            let (tries, calls) = (&tries, &calls);
            s.spawn(move || {
                let user = (&raw const *tries).cast_mut().cast();
                let threads = akv_threads { ith, nth: 2, barrier: Some(wait_and_try), user };
                // SAFETY: the descriptor and what it points to outlive the scope.
                let status = unsafe {
                    let desc = akv_attention_desc { threads: &threads, ..(desc as *const akv_attention_desc).read() };
                    akv_aligned_attention(batch as *mut akv_batch, 0, &desc)
                };
                calls.fetch_add(usize::from(status == AKV_OK), SeqCst);
            });
        }
    });
    let busy = tries.2.load(SeqCst);
    assert!(calls.load(SeqCst) == 2 && busy >= 6 && busy.is_multiple_of(2), "busy {busy} times");
    // SAFETY: a handle.
    unsafe { ok(akv_batch_commit(e.batch)) };
}

#[test]
fn outputs_beyond_their_dtype_are_an_error() {
    for n_q in [1, 20] {
        let e = Engine::new(AKV_FORMAT_ALIGNED, &context_desc(), 0);
        ok(e.begin(200, n_q));
        ok(e.append(&[0.0; 200 * KV_HEADS * DIM], &[1e5; 200 * KV_HEADS * DIM]));
        let q = vec![1.0; n_q as usize * HEADS * DIM];
        let (mut half, mut float) = (vec![0u16; q.len()], vec![0.0; q.len()]);
        let out = akv_rows { data: half.as_mut_ptr().cast(), dtype: AKV_F16, ..zeroed() };
        fails(e.attend(&akv_attention_desc { out, ..attention(&q, &mut []) }), AKV_E_RANGE, "overflow");
        ok(e.attend(&attention(&q, &mut float)));
    }
}

#[test]
fn objects_in_use_are_not_destroyed() {
    let e = Engine::new(AKV_FORMAT_ALIGNED, &context_desc(), 0);
    // SAFETY: handles, and one that is none.
    unsafe {
        fails(akv_context_destroy(e.context), AKV_E_BUSY, "destroy its caches first");
        fails(akv_cache_destroy(e.cache), AKV_E_BUSY, "destroy its batches first");
        ok(e.begin(1, 1));
        fails(e.begin(1, 1), AKV_E_BUSY, "commit or abort it first");
        fails(akv_sequence_destroy(e.cache, e.sequence), AKV_E_BUSY, "");
        fails(akv_batch_commit(e.batch), AKV_E_ARGUMENT, "layer 0");
        ok(akv_batch_abort(e.batch));
        ok(akv_batch_abort(e.batch));
        ok(akv_sequence_destroy(e.cache, e.sequence));
        fails(akv_sequence_destroy(e.cache, e.sequence), AKV_E_HANDLE, "");
        fails(akv_cache_destroy(e.context.cast()), AKV_E_HANDLE, "cache is of type akv_context");
        fails(akv_batch_destroy(null_mut()), AKV_E_HANDLE, "batch is NULL");
    }
}

#[test]
fn reading_back_never_makes_infinity() {
    let e = Engine::new(AKV_FORMAT_RAW, &context_desc(), 0);
    let k = vec![70_000.0f32; KV_HEADS * DIM];
    let v = vec![-1.5f32; KV_HEADS * DIM];
    ok(e.begin(1, 0));
    ok(e.append(&k, &v));
    // SAFETY: a row of each, in halves or floats.
    unsafe {
        ok(akv_batch_commit(e.batch));
        let mut half = vec![7u16; KV_HEADS * DIM];
        let mut float = vec![7f32; KV_HEADS * DIM];
        let h = akv_rows { data: half.as_mut_ptr().cast(), dtype: AKV_F16, ..zeroed() };
        let f = rows(float.as_mut_ptr());
        let read = |n, key, value| akv_dequantize_kv(e.cache, e.sequence, 0, 0, n, key, value, null_mut());
        fails(read(1, &h, &f), AKV_E_RANGE, "key: 7e4 in row 0, head 0");
        assert!(half.iter().all(|&x| x == 7) && float.iter().all(|&x| x == 7.0), "nothing was written");
        ok(read(1, &f, &h));
        assert!(float == k && half.iter().all(|&x| half::f16::from_bits(x).to_f32() == -1.5));
        ok(read(1, null(), null()));
        ok(read(0, null(), null()));
        fails(read(2, null(), null()), AKV_E_ARGUMENT, "first, n is 0, 2");
        fails(read(1, &f, &f), AKV_E_ARGUMENT, "key overlaps value");
    }
}

#[test]
fn the_callers_allocator_gets_everything_back() {
    static BYTES: AtomicUsize = AtomicUsize::new(0);
    unsafe extern "C" fn alloc(
        _: *mut c_void,
        bytes: usize,
        align: usize,
        backend: i32,
        _: *mut c_void,
    ) -> *mut c_void {
        assert_eq!(backend, AKV_CPU);
        BYTES.fetch_add(bytes, SeqCst);
        // SAFETY: a valid layout.
        unsafe { std::alloc::alloc(std::alloc::Layout::from_size_align(bytes, align.max(64)).unwrap()).cast() }
    }
    unsafe extern "C" fn dealloc(_: *mut c_void, p: *mut c_void, bytes: usize, _: i32, _: *mut c_void) {
        BYTES.fetch_sub(bytes, SeqCst);
        // SAFETY: from `alloc`, which is only asked for alignments up to 64.
        unsafe { std::alloc::dealloc(p.cast(), std::alloc::Layout::from_size_align(bytes, 64).unwrap()) }
    }
    let desc = akv_context_desc { alloc: Some(alloc), dealloc: Some(dealloc), ..context_desc() };
    let (e, _, _, q) = prefilled(AKV_FORMAT_ALIGNED, &desc, 0, 1);
    let mut out = vec![0.0; q.len()];
    ok(e.attend(&attention(&q, &mut out)));
    let mut usage = akv_usage { struct_size: size_of::<akv_usage>() as u32, ..zeroed() };
    // SAFETY: an output.
    unsafe { ok(akv_cache_usage(e.cache, &mut usage)) };
    assert!(BYTES.load(SeqCst) > 0 && usage.bytes_reserved >= BYTES.load(SeqCst) as u64);
    assert_eq!(usage.n_sequences, 1);
    drop(e);
    assert_eq!(BYTES.load(SeqCst), 0);
    let mut context = null_mut();
    // SAFETY: refused.
    let status = unsafe { akv_context_create(&akv_context_desc { dealloc: None, ..desc }, &mut context) };
    fails(status, AKV_E_ARGUMENT, "desc->dealloc is NULL");
    assert!(context.is_null());
}

#[test]
fn support_is_told_beforehand() {
    let e = Engine::new(AKV_FORMAT_ALIGNED, &context_desc(), 0);
    let layer = akv_layer_desc { n_q_heads: 8, n_kv_heads: 8, dim_k: 128, dtype_k: 1, dtype_v: 1, ..zeroed() };
    let struct_size = size_of::<akv_cache_desc>() as u32;
    let cache = akv_cache_desc { struct_size, n_layers: 1, layers: &layer, ..zeroed() };
    let call = attention(&[], &mut []);
    let mut path = 0;
    // SAFETY: valid descriptors.
    unsafe {
        let mut supports = |cache: akv_cache_desc, call: *const akv_attention_desc| {
            let status = akv_supports(e.context, &cache, call, &mut path);
            (status, path)
        };
        assert_eq!(supports(cache, null()), (AKV_OK, AKV_PATH_PROGRESSIVE | AKV_PATH_DENSE));
        assert_eq!(supports(cache, &akv_attention_desc { mode: AKV_EXACT, ..call }), (AKV_OK, AKV_PATH_DENSE));
        let published = akv_cache_desc { format: AKV_FORMAT_PUBLISHED, ..cache };
        assert_eq!(supports(published, &call), (AKV_OK, AKV_PATH_PUBLISHED | AKV_PATH_DENSE));
        let slots = akv_cache_desc { placement: AKV_SLOTS, n_slots: 100, ..cache };
        assert_eq!(supports(slots, &call), (AKV_OK, AKV_PATH_PROGRESSIVE | AKV_PATH_DENSE));
        assert_eq!(supports(slots, &akv_attention_desc { window: 1, ..call }).0, AKV_E_ARGUMENT);
        let attached = akv_cache_desc { placement: AKV_ATTACHED, format: AKV_FORMAT_RAW, ..slots };
        assert_eq!(supports(attached, &call).0, AKV_E_ARGUMENT);
        let tree = std::ptr::dangling();
        assert_eq!(supports(cache, &akv_attention_desc { tree, ..call }).0, AKV_OK);
        assert_eq!(supports(published, &akv_attention_desc { tree, ..call }).0, AKV_E_ARGUMENT);
        assert_eq!(supports(slots, &akv_attention_desc { tree, ..call }).0, AKV_E_ARGUMENT);
        assert_eq!(supports(cache, &akv_attention_desc { tolerance: -1.0, ..call }).0, AKV_E_ARGUMENT);
        assert_eq!(supports(akv_cache_desc { flags: 1, ..cache }, null()).0, AKV_E_ARGUMENT);
    }
}

#[test]
fn contexts_say_what_they_are() {
    unsafe extern "C" fn log(user: *mut c_void, level: i32, text: *const c_char) {
        // SAFETY: the test's string, and a string that is valid during the call.
        unsafe { *user.cast::<String>() = format!("{level} {}", CStr::from_ptr(text).to_str().unwrap()) }
    }
    let mut line = String::new();
    let mut context = null_mut();
    let user = (&raw mut line).cast();
    let desc = akv_context_desc { isa: AKV_ISA_SCALAR, n_threads: 2, log: Some(log), log_user: user, ..context_desc() };
    // SAFETY: valid descriptors and outputs.
    unsafe {
        ok(akv_context_create(&desc, &mut context));
        ok(akv_poll(context, null_mut(), null_mut(), null_mut()));
        ok(akv_context_destroy(context));
        let create = |change: fn(&mut akv_context_desc)| {
            let mut desc = context_desc();
            change(&mut desc);
            let mut out = null_mut();
            let status = akv_context_create(&desc, &mut out);
            assert!(out.is_null());
            status
        };
        fails(create(|d| d.abi_version = 2), AKV_E_VERSION, "desc->abi_version is 2");
        if crate::backend::cuda::Device::new(0, null_mut()).is_err() {
            fails(create(|d| d.backend = AKV_CUDA), AKV_E_UNSUPPORTED, "backend AKV_CUDA: ");
        }
        fails(create(|d| d.backend = 7), AKV_E_ARGUMENT, "desc->backend is 7");
        fails(create(|d| d.isa = 9), AKV_E_ARGUMENT, "desc->isa is 9");
        fails(create(|d| d.n_threads = -1), AKV_E_ARGUMENT, "desc->n_threads is -1");
        fails(create(|d| d.device = -1), AKV_E_ARGUMENT, "desc->device is -1");
        fails(akv_context_create(&desc, null_mut()), AKV_E_ARGUMENT, "out is NULL");
    }
    assert!(line.starts_with("2 alignedkv ") && line.ends_with("backend cpu, isa scalar, threads 2"), "{line}");
}
