//! What rows see, and what is added to their scores, through the C ABI: trees, windows, ranges, distances, in every format
//! and mode, in parts, next to other sequences. Against float64, within the bounds, and the same bits everywhere.

mod common;

use alignedkv::capi::{attention::*, batch::*, cache::*, context::*, sequence::*, slots::*, status::*, types::*};
use common::Rng;
use half::f16;
use std::ffi::CStr;
use std::ptr::{null, null_mut};

fn zeroed<T>() -> T {
    // SAFETY: used for the plain data of `types` alone.
    unsafe { std::mem::zeroed() }
}

fn text() -> String {
    let mut buf = [0u8; 1024];
    // SAFETY: a buffer of that size; the text ends with a NUL.
    unsafe { akv_last_error(buf.as_mut_ptr().cast(), buf.len(), null_mut()) };
    CStr::from_bytes_until_nul(&buf).unwrap().to_string_lossy().into_owned()
}

#[track_caller]
fn ok(status: akv_status) {
    assert_eq!(status, AKV_OK, "{}", text());
}

#[track_caller]
fn fails(status: akv_status, expected: akv_status, parts: &[&str]) {
    let text = text();
    assert!(status == expected && parts.iter().all(|part| text.contains(part)), "{status}: {text}");
}

/// Rows of a sequence, `[token][kv head][dim]`, and its positions.
struct Sequence {
    k: Vec<f32>,
    v: Vec<f32>,
    positions: Vec<i64>,
    /// Query rows `[n_q][q head][dim_k]`.
    q: Vec<f32>,
}

/// A cache of one layer, and sequences in it; the rows are f16 or f32.
struct Engine {
    context: *mut akv_context,
    cache: *mut akv_cache,
    batch: *mut akv_batch,
    layer: akv_layer_desc,
    /// The layer that attends, which is like `layer`.
    reads: i32,
}

/// Results of a call, `[row][head]` each (`out`: times dim_v).
#[derive(Clone, Debug, PartialEq)]
struct Output {
    out: Vec<f32>,
    lse: Vec<f32>,
    bound: Vec<f32>,
    lse_bound: Vec<f32>,
    estimate: Vec<f32>,
    amplitude: Vec<f32>,
}

impl Output {
    fn new(n: usize, dim_v: usize) -> Output {
        let floats = || vec![f32::NAN; n];
        Output {
            out: vec![f32::NAN; n * dim_v],
            lse: floats(),
            bound: floats(),
            lse_bound: floats(),
            estimate: floats(),
            amplitude: floats(),
        }
    }

    /// As bits, so that NaN is equal to NaN.
    fn bits(&self, range: std::ops::Range<usize>, dim_v: usize) -> Vec<u32> {
        let out = &self.out[range.start * dim_v..range.end * dim_v];
        let others = [&self.lse, &self.bound, &self.lse_bound, &self.estimate, &self.amplitude];
        let others = others.into_iter().flat_map(|x| &x[range.clone()]);
        out.iter().chain(others).map(|x| x.to_bits()).collect()
    }

    fn state(&mut self) -> akv_state {
        akv_state {
            out: self.out.as_mut_ptr(),
            lse: self.lse.as_mut_ptr(),
            bound: self.bound.as_mut_ptr(),
            lse_bound: self.lse_bound.as_mut_ptr(),
            estimate: self.estimate.as_mut_ptr(),
            amplitude: self.amplitude.as_mut_ptr(),
        }
    }
}

fn as_rows<T>(data: &[T], dtype: i32) -> akv_rows {
    akv_rows { data: data.as_ptr().cast_mut().cast(), dtype, ..zeroed() }
}

/// Rows in the layer's dtype.
fn packed(x: &[f32], dtype: i32) -> Vec<u8> {
    match dtype {
        AKV_F32 => x.iter().flat_map(|x| x.to_ne_bytes()).collect(),
        _ => x.iter().flat_map(|&x| f16::from_f32(x).to_ne_bytes()).collect(),
    }
}

impl Engine {
    fn new(layer: akv_layer_desc, change: impl Fn(&mut akv_cache_desc), isa: i32, n_threads: i32) -> Engine {
        let mut e = Engine { context: null_mut(), cache: null_mut(), batch: null_mut(), layer, reads: 0 };
        let context = akv_context_desc {
            struct_size: size_of::<akv_context_desc>() as u32,
            abi_version: AKV_ABI_VERSION,
            isa,
            n_threads,
            ..zeroed()
        };
        let struct_size = size_of::<akv_cache_desc>() as u32;
        let mut cache = akv_cache_desc { struct_size, n_layers: 1, layers: &e.layer, ..zeroed() };
        change(&mut cache);
        let bounds = akv_batch_desc { struct_size: size_of::<akv_batch_desc>() as u32, ..zeroed() };
        // SAFETY: valid descriptors and outputs.
        unsafe {
            ok(akv_context_create(&context, &mut e.context));
            ok(akv_cache_create(e.context, &cache, &mut e.cache));
            ok(akv_batch_create(e.cache, &bounds, &mut e.batch));
        }
        e
    }

    fn dims(&self) -> (usize, usize) {
        let l = &self.layer;
        (l.dim_k as usize, if l.dim_v == 0 { l.dim_k } else { l.dim_v } as usize)
    }

    fn sequence(&self) -> akv_sequence {
        let mut id = 0;
        // SAFETY: an output.
        unsafe { ok(akv_sequence_create(self.cache, &mut id)) };
        id
    }

    /// Appends to several sequences in one step, which is begun with `n_q` query rows each and not ended.
    fn begin(&self, ids: &[akv_sequence], sequences: &[&Sequence], n_q: &[i32]) -> akv_status {
        let (kv_heads, (dim_k, dim_v)) = (self.layer.n_kv_heads as usize, self.dims());
        let n_new: Vec<i32> = sequences.iter().map(|s| s.positions.len() as i32).collect();
        let all = |of: fn(&Sequence) -> &[f32]| sequences.iter().flat_map(|s| of(s)).copied().collect::<Vec<f32>>();
        let positions: Vec<i64> = sequences.iter().flat_map(|s| &s.positions).copied().collect();
        let step = akv_batch_desc {
            struct_size: size_of::<akv_batch_desc>() as u32,
            n_sequences: ids.len() as u32,
            sequences: ids.as_ptr(),
            n_new: n_new.as_ptr(),
            n_q: n_q.as_ptr(),
            positions: positions.as_ptr(),
            ..zeroed()
        };
        let (k, v) = (packed(&all(|s| &s.k), self.layer.dtype_k), packed(&all(|s| &s.v), self.layer.dtype_v));
        assert_eq!(all(|s| &s.k).len(), positions.len() * kv_heads * dim_k);
        assert!(v.is_empty() || all(|s| &s.v).len() == positions.len() * kv_heads * dim_v);
        let value = as_rows(&v, self.layer.dtype_v);
        let value = if self.layer.v_is_prefix_of_k != 0 { null() } else { &raw const value };
        // SAFETY: as many elements as the step has rows.
        unsafe {
            ok(akv_batch_begin(self.batch, &step, null_mut()));
            akv_quantize_kv(self.batch, 0, &as_rows(&k, self.layer.dtype_k), value, null_mut())
        }
    }

    /// Attends all rows of the step.
    fn attend(&self, q: &[f32], desc: &akv_attention_desc) -> (akv_status, Output) {
        let (dim_k, dim_v) = self.dims();
        let mut o = Output::new(q.len() / dim_k, dim_v);
        let s = o.state();
        let desc = akv_attention_desc {
            struct_size: size_of::<akv_attention_desc>() as u32,
            q: as_rows(q, AKV_F32),
            out: as_rows(&o.out, AKV_F32),
            lse: s.lse,
            bound: s.bound,
            lse_bound: s.lse_bound,
            estimate: s.estimate,
            amplitude: s.amplitude,
            ..*desc
        };
        // SAFETY: outputs as large as said; what else `desc` points to is the tests'.
        let status = unsafe { akv_aligned_attention(self.batch, self.reads, &desc) };
        (status, o)
    }

    fn commit(&self) {
        // SAFETY: a handle.
        unsafe { ok(akv_batch_commit(self.batch)) };
    }

    /// Appends and attends a step over new sequences, which are gone afterwards.
    fn run(&self, sequences: &[&Sequence], desc: &akv_attention_desc) -> Output {
        let ids: Vec<_> = sequences.iter().map(|_| self.sequence()).collect();
        let row = (self.layer.n_q_heads * self.layer.dim_k) as usize;
        let n_q: Vec<i32> = sequences.iter().map(|s| (s.q.len() / row) as i32).collect();
        ok(self.begin(&ids, sequences, &n_q));
        let q: Vec<f32> = sequences.iter().flat_map(|s| &s.q).copied().collect();
        let (status, output) = self.attend(&q, desc);
        ok(status);
        self.commit();
        for id in ids {
            // SAFETY: a handle and an id.
            unsafe { ok(akv_sequence_destroy(self.cache, id)) };
        }
        output
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

/// What a call asks for; arrays by rows of the whole call.
#[derive(Clone, Debug, Default)]
struct Asked {
    mode: i32,
    tolerance: f32,
    full: bool,
    window: i32,
    sink_tokens: i32,
    softcap: f32,
    slopes: Option<Vec<f32>>,
    sinks: Option<Vec<f32>>,
    kv_from: Option<Vec<i64>>,
    kv_to: Option<Vec<i64>>,
    tree: Option<Vec<u64>>,
}

impl Asked {
    fn desc(&self) -> akv_attention_desc {
        fn at<T>(x: &Option<Vec<T>>) -> *const T {
            x.as_ref().map_or(null(), |x| x.as_ptr())
        }
        akv_attention_desc {
            mode: self.mode,
            tolerance: self.tolerance,
            visibility: if self.full { AKV_FULL } else { AKV_CAUSAL },
            window: self.window,
            sink_tokens: self.sink_tokens,
            logit_softcap: self.softcap,
            alibi_slopes: at(&self.slopes),
            sink_logits: at(&self.sinks),
            kv_from: at(&self.kv_from),
            kv_to: at(&self.kv_to),
            tree: at(&self.tree),
            ..zeroed()
        }
    }

    /// The same of rows `range` alone.
    fn rows(&self, range: std::ops::Range<usize>) -> Asked {
        fn some<T: Clone>(x: &Option<Vec<T>>, range: &std::ops::Range<usize>) -> Option<Vec<T>> {
            x.as_ref().map(|x| x[range.clone()].to_vec())
        }
        let (kv_from, kv_to) = (some(&self.kv_from, &range), some(&self.kv_to, &range));
        Asked { kv_from, kv_to, tree: some(&self.tree, &range), ..self.clone() }
    }

    /// Tokens that row `row` of the call, row `i` of its sequence's `n_q`, sees.
    fn sees(&self, s: &Sequence, row: usize, i: usize, n_q: usize) -> Vec<usize> {
        let len = s.positions.len();
        let at = (len + i).checked_sub(n_q).map(|token| s.positions[token]);
        (0..len)
            .filter(|&t| {
                let p = s.positions[t];
                (self.full || at.is_some_and(|at| p <= at))
                    && (self.window == 0
                        || t < self.sink_tokens as usize
                        || at.is_some_and(|at| p > at - i64::from(self.window)))
                    && self.kv_from.as_ref().is_none_or(|from| t as i64 >= from[row])
                    && self.kv_to.as_ref().is_none_or(|to| (t as i64) < to[row])
                    && self.tree.as_ref().is_none_or(|tree| t + 64 < len || tree[row] >> (t + 64 - len) & 1 == 1)
            })
            .collect()
    }
}

/// Checks all rows of a call against float64; `sinks`: whether sink logits count.
fn check(e: &Engine, sequences: &[&Sequence], asked: &Asked, got: &Output, told: &str) {
    let (heads, kv_heads) = (e.layer.n_q_heads as usize, e.layer.n_kv_heads as usize);
    let (dim_k, dim_v) = e.dims();
    let mut row = 0;
    for s in sequences {
        let n_q = s.q.len() / (heads * dim_k);
        for i in 0..n_q {
            let seen = asked.sees(s, row, i, n_q);
            for head in 0..heads {
                let (q, kv_head) = (&s.q[(i * heads + head) * dim_k..][..dim_k], head * kv_heads / heads);
                let score = |t: usize| {
                    let k = &s.k[(t * kv_heads + kv_head) * dim_k..][..dim_k];
                    let dot: f64 = q.iter().zip(k).map(|(&a, &b)| f64::from(a) * f64::from(b)).sum();
                    // The default scale is binary32.
                    let mut score = dot * f64::from(1.0 / (dim_k as f32).sqrt());
                    let cap = f64::from(asked.softcap);
                    if cap > 0.0 {
                        score = cap * (score / cap).tanh();
                    }
                    let far = |slope: f32| {
                        f64::from(slope) * (s.positions[t] - s.positions[s.positions.len() + i - n_q]) as f64
                    };
                    score + asked.slopes.as_ref().map_or(0.0, |slopes| far(slopes[head]))
                };
                let scores: Vec<f64> = seen.iter().map(|&t| score(t)).collect();
                let sink = asked.sinks.as_ref().map(|sinks| f64::from(sinks[head]));
                let max = scores.iter().copied().chain(sink).fold(f64::NEG_INFINITY, f64::max);
                let (mut sum, mut want) = (sink.map_or(0.0, |s| (s - max).exp()), vec![0.0; dim_v]);
                for (&t, score) in seen.iter().zip(&scores) {
                    let e = (score - max).exp();
                    sum += e;
                    let v = match s.v.is_empty() {
                        true => &s.k[(t * kv_heads + kv_head) * dim_k..][..dim_v],
                        false => &s.v[(t * kv_heads + kv_head) * dim_v..][..dim_v],
                    };
                    want.iter_mut().zip(v).for_each(|(x, &v)| *x += e * f64::from(v));
                }
                let at = row * heads + head;
                let told = format!("{told}, row {row} head {head}");
                let out = &got.out[at * dim_v..(at + 1) * dim_v];
                if max == f64::NEG_INFINITY {
                    assert!(got.lse[at] == f32::NEG_INFINITY && got.bound[at] == 0.0, "{told}: {}", got.lse[at]);
                    assert!(out.iter().all(|&x| x == 0.0), "{told}");
                    continue;
                }
                let error = out.iter().zip(&want).fold(0.0f64, |m, (&x, y)| m.max((f64::from(x) - y / sum).abs()));
                assert!(error <= f64::from(got.bound[at]), "{told}: error {error:e}, bound {:e}", got.bound[at]);
                let lse = max + sum.ln();
                let off = (f64::from(got.lse[at]) - lse).abs();
                assert!(
                    off <= f64::from(got.lse_bound[at]),
                    "{told}: lse {lse} off by {off:e} {:e}",
                    got.lse_bound[at]
                );
                // What a bound is worth: less than what the values themselves could be.
                let peak = s.v.iter().chain(&s.k).fold(0.0f32, |m, x| m.max(x.abs()));
                assert!(
                    got.bound[at] <= 3.0 * peak + 1e-30 && got.lse_bound[at] < 4.0,
                    "{told}: bound {:e}",
                    got.bound[at]
                );
            }
            row += 1;
        }
    }
}

/// The call in two parts, cut elsewhere in each row, and merged.
fn check_parts(e: &Engine, rng: &mut Rng, sequences: &[&Sequence], asked: &Asked, told: &str) {
    let (heads, (dim_k, dim_v)) = (e.layer.n_q_heads as usize, e.dims());
    let n_q = |s: &Sequence| s.q.len() / (heads * dim_k);
    let cut: Vec<i64> =
        sequences.iter().flat_map(|s| vec![s.positions.len(); n_q(s)]).map(|len| rng.below(len + 1) as i64).collect();
    let mut parts = [asked.clone(), asked.clone()];
    let bounds = |x: &Option<Vec<i64>>, f: fn(i64, i64) -> i64| {
        let x = x.clone().map(|x| x.iter().zip(&cut).map(|(&x, &c)| f(x, c)).collect());
        Some(x.unwrap_or(cut.clone()))
    };
    parts[0].kv_to = bounds(&asked.kv_to, i64::min);
    parts[1].kv_from = bounds(&asked.kv_from, i64::max);
    // A token more is one part's.
    parts[1].sinks = None;
    let mut outputs = parts.each_ref().map(|part| e.run(sequences, &part.desc()));
    for (part, output) in parts.iter().zip(&outputs) {
        check(e, sequences, part, output, &format!("{told}, part"));
    }
    let mut merged = outputs[0].clone();
    let states = outputs.each_mut().map(Output::state);
    let rows = merged.lse.len() / heads;
    // SAFETY: states of that many rows.
    unsafe {
        let (states, out) = (states.as_ptr(), &merged.state());
        ok(akv_merge_states(e.context, states, 2, rows as i64, heads as i32, dim_v as i32, out, null_mut()));
    }
    check(e, sequences, asked, &merged, &format!("{told}, merged"));
}

/// Instruction sets of this machine.
fn isas() -> Vec<i32> {
    use alignedkv::backend::cpu::Isa;
    let all = [(Isa::Scalar, AKV_ISA_SCALAR), (Isa::Avx2, AKV_ISA_AVX2), (Isa::Avx512, AKV_ISA_AVX512)];
    all.into_iter().filter(|(isa, _)| isa.available()).map(|(_, code)| code).collect()
}

/// Rows that `dtype` can hold, and positions that go on, stand still or skip.
fn sequence(rng: &mut Rng, layer: &akv_layer_desc, len: usize, n_q: usize, skips: bool) -> Sequence {
    let (heads, kv_heads, dim_k) = (layer.n_q_heads as usize, layer.n_kv_heads as usize, layer.dim_k as usize);
    let dim_v = if layer.dim_v == 0 { dim_k } else { layer.dim_v as usize };
    let mut rows = |dim: usize, dtype: i32| -> Vec<f32> {
        let x = rng.normals(len * kv_heads * dim);
        if dtype == AKV_F32 { x } else { x.iter().map(|&x| f16::from_f32(x).to_f32()).collect() }
    };
    let k = rows(dim_k, layer.dtype_k);
    let v = if layer.v_is_prefix_of_k != 0 { Vec::new() } else { rows(dim_v, layer.dtype_v) };
    let q = rng.normals(n_q * heads * dim_k).iter().map(|x| 2.0 * x).collect();
    let mut at = if skips { rng.below(100) as i64 - 50 } else { 0 };
    let mut positions = Vec::new();
    for _ in 0..len {
        positions.push(at);
        at += if skips { [0, 1, 1, 1, 2, 40][rng.below(6)] } else { 1 };
    }
    Sequence { k, v, positions, q }
}

const FORMATS: [i32; 2] = [AKV_FORMAT_ALIGNED, AKV_FORMAT_RAW];

fn some_layer(rng: &mut Rng) -> akv_layer_desc {
    let (g, kv_heads) = ([1, 2, 3, 4, 7, 8, 12][rng.below(7)], 1 + rng.below(2) as i32);
    let dtype = [AKV_F32, AKV_F16][rng.below(2)];
    akv_layer_desc {
        n_q_heads: g * kv_heads,
        n_kv_heads: kv_heads,
        dim_k: [16, 24, 64, 80, 128][rng.below(5)],
        dim_v: [0, 16, 40, 64, 128][rng.below(5)],
        dtype_k: dtype,
        dtype_v: [AKV_F32, AKV_F16][rng.below(2)],
        planes_k: 0,
        planes_v: 0,
        ..zeroed()
    }
}

fn some_call(rng: &mut Rng, layer: &akv_layer_desc) -> Asked {
    let mode = rng.below(3) as i32;
    let tolerance = 10f32.powf(-1.0 - 3.0 * rng.uniform() as f32);
    let sinks = (rng.below(4) == 0).then(|| rng.normals(layer.n_q_heads as usize));
    let softcap = if rng.below(4) == 0 { 8.0 } else { 0.0 };
    Asked { mode, tolerance, full: rng.below(2) == 0, softcap, sinks, ..Asked::default() }
}

/// Everything together, on random cases.
fn cases(seed: u64, n: usize, change: impl Fn(&mut Rng, &mut Asked, &[&Sequence], &akv_layer_desc)) {
    let mut rng = Rng::new(seed);
    let isas = isas();
    for case in 0..n {
        let layer = some_layer(&mut rng);
        let format = FORMATS[usize::from(rng.below(4) == 0)];
        let exact_head = [0, AKV_NONE, 1, 20, 128][rng.below(5)];
        let make = |isa, n_threads| {
            let change = |c: &mut akv_cache_desc| (c.format, c.exact_head) = (format, exact_head);
            Engine::new(layer, change, isa, n_threads)
        };
        let (e, skips) = (make(0, 1), rng.below(2) == 0);
        let mut sequences = Vec::new();
        for _ in 0..1 + rng.below(3) {
            let len =
                [1, 2, 63, 64, 65, 127, 128, 129, 200, 300, 1100, 2100][rng.below(if case % 8 == 0 { 12 } else { 10 })];
            let most = [1, 8, 8, 20][rng.below(4)];
            let n_q = (1 + rng.below(most)).min(len);
            sequences.push(sequence(&mut rng, &layer, len, n_q, skips));
        }
        let sequences: Vec<&Sequence> = sequences.iter().collect();
        let mut asked = some_call(&mut rng, &layer);
        change(&mut rng, &mut asked, &sequences, &layer);
        let lens: Vec<_> = sequences.iter().map(|s| s.positions.len()).collect();
        let told = format!("case {case}: format {format} {lens:?} head {exact_head:?} {layer:?} {asked:?}");
        let got = e.run(&sequences, &asked.desc());
        check(&e, &sequences, &asked, &got, &told);
        check_parts(&e, &mut rng, &sequences, &asked, &told);
        let bits = got.bits(0..got.lse.len(), e.dims().1);
        for &isa in &isas {
            let other = make(isa, 1 + rng.below(3) as i32).run(&sequences, &asked.desc());
            assert_eq!(other.bits(0..got.lse.len(), e.dims().1), bits, "{told}: isa {isa}");
        }
        // Every sequence alone.
        let (mut row, heads) = (0, layer.n_q_heads as usize);
        for &s in &sequences {
            let n_q = s.q.len() / (heads * layer.dim_k as usize);
            let alone = e.run(&[s], &asked.rows(row..row + n_q).desc());
            let range = row * heads..(row + n_q) * heads;
            assert_eq!(alone.bits(0..n_q * heads, e.dims().1), got.bits(range, e.dims().1), "{told}: alone");
            row += n_q;
        }
    }
}

/// Query rows of a call.
fn n_rows(sequences: &[&Sequence], layer: &akv_layer_desc) -> usize {
    sequences.iter().map(|s| s.q.len() / (layer.n_q_heads * layer.dim_k) as usize).sum()
}

fn trees(rng: &mut Rng, n: usize) -> Option<Vec<u64>> {
    let bits = |rng: &mut Rng| match rng.below(4) {
        0 => 0,
        1 => u64::MAX,
        2 => rng.next(),
        _ => u64::MAX << rng.below(64) ^ rng.next() & rng.next() & rng.next(),
    };
    Some((0..n).map(|_| bits(rng)).collect())
}

#[test]
fn trees_hide_tokens() {
    cases(1, 40, |rng, asked, sequences, layer| asked.tree = trees(rng, n_rows(sequences, layer)));
}

/// A tree of drafts, as an engine would verify it: every row is what decoding its path alone would have been.
#[test]
fn a_tree_is_its_paths() {
    let mut rng = Rng::new(5);
    let layer = akv_layer_desc { n_q_heads: 4, n_kv_heads: 2, dim_k: 64, ..zeroed() };
    // Parents of nodes in the order of their depth.
    let parents = [None, Some(0), Some(0), Some(1), Some(1), Some(2), Some(3)];
    let n = parents.len();
    for (len, mode) in [(3, AKV_EXPECTED), (60, AKV_EXACT), (125, AKV_GUARANTEED), (700, AKV_EXPECTED)] {
        let mut whole = sequence(&mut rng, &layer, len + n, n, false);
        let mut paths: Vec<Vec<usize>> = Vec::new();
        for (j, parent) in parents.iter().enumerate() {
            let mut path: Vec<usize> = parent.map_or(Vec::new(), |p: usize| paths[p].clone());
            path.push(j);
            paths.push(path);
            // A position for every depth.
            whole.positions[len + j] = (len + paths[j].len()) as i64;
        }
        let word = |path: &Vec<usize>| path.iter().fold(0u64, |word, j| word | 1 << j);
        let tree = paths.iter().map(|path| word(path) << (64 - n) | u64::MAX >> n).collect();
        let e = Engine::new(layer, |_| (), 0, 1);
        let asked = Asked { mode, tolerance: 0.01, tree: Some(tree), ..Asked::default() };
        let got = e.run(&[&whole], &asked.desc());
        check(&e, &[&whole], &asked, &got, &format!("{len} tokens"));
        for (j, path) in paths.iter().enumerate() {
            let seen = asked.sees(&whole, j, j, n);
            assert_eq!(seen, (0..len).chain(path.iter().map(|j| len + j)).collect::<Vec<_>>());
        }
    }
}

/// What a window leaves at the start, with everything else.
#[test]
fn windows_keep_sinks() {
    cases(3, 50, |rng, asked, sequences, layer| {
        (asked.window, asked.sink_tokens) = (1 + rng.below(260) as i32, [1, 4, 4, 100, 128, 130, 1030][rng.below(7)]);
        let n = n_rows(sequences, layer);
        if rng.below(3) == 0 {
            asked.tree = trees(rng, n);
        }
        if rng.below(3) == 0 {
            asked.slopes = Some(vec![0.02; layer.n_q_heads as usize]);
        }
        if rng.below(2) == 0 {
            asked.kv_from = Some((0..n).map(|_| rng.below(300) as i64).collect());
        }
        if rng.below(2) == 0 {
            asked.kv_to = Some((0..n).map(|_| rng.below(300) as i64).collect());
        }
    });
}

/// Most of a long context is neither in the window nor at the start: whole splits are left out.
#[test]
fn windows_over_long_contexts() {
    let mut rng = Rng::new(6);
    let layer = akv_layer_desc { n_q_heads: 2, n_kv_heads: 1, dim_k: 32, ..zeroed() };
    let s = sequence(&mut rng, &layer, 7000, 3, false);
    for format in FORMATS {
        let engines = [1, 3].map(|n_threads| Engine::new(layer, |c| c.format = format, 0, n_threads));
        for (window, sink_tokens) in [(100, 0), (100, 4), (1500, 1100), (2000, 3000), (5000, 1025), (6999, 1)] {
            for mode in [AKV_EXPECTED, AKV_EXACT] {
                for kv_from in [None, Some(vec![900; 3])] {
                    let asked = Asked { mode, window, sink_tokens, kv_from, ..Asked::default() };
                    let told = format!("format {format} {asked:?}");
                    let outputs = engines.each_ref().map(|e| e.run(&[&s], &asked.desc()));
                    check(&engines[0], &[&s], &asked, &outputs[0], &told);
                    assert_eq!(outputs[0], outputs[1], "{told}");
                }
            }
        }
    }
}

/// Query rows that are no tokens of the sequence.
#[test]
fn cross_attention() {
    let mut rng = Rng::new(7);
    for case in 0..40 {
        let layer = some_layer(&mut rng);
        let format = FORMATS[rng.below(2)];
        let e = Engine::new(layer, |c| c.format = format, 0, 1);
        let mut all = Vec::new();
        for _ in 0..1 + rng.below(3) {
            let (len, n_q) = ([0, 1, 3, 7, 100, 200][rng.below(6)], 1 + rng.below(24));
            all.push(sequence(&mut rng, &layer, len, n_q, false));
        }
        let all: Vec<&Sequence> = all.iter().collect();
        let mut asked = Asked { full: true, ..some_call(&mut rng, &layer) };
        if rng.below(2) == 0 {
            asked.tree = trees(&mut rng, n_rows(&all, &layer));
        }
        let told = format!("case {case}: format {format} {layer:?} {asked:?}");
        let got = e.run(&all, &asked.desc());
        check(&e, &all, &asked, &got, &told);
        check_parts(&e, &mut rng, &all, &asked, &told);
    }
    // Only where nothing asks where they are.
    let layer = akv_layer_desc { n_q_heads: 2, n_kv_heads: 1, dim_k: 16, ..zeroed() };
    let e = Engine::new(layer, |_| (), 0, 1);
    let (one, more) = (sequence(&mut rng, &layer, 3, 1, false), sequence(&mut rng, &layer, 3, 4, false));
    ok(e.begin(&[e.sequence(), e.sequence()], &[&one, &more], &[1, 4]));
    let q: Vec<f32> = [&one.q[..], &more.q[..]].concat();
    let full = Asked { full: true, ..Asked::default() };
    let who = "sequence 1 of the step, which has 4 query rows and 3 tokens";
    fails(e.attend(&q, &Asked::default().desc()).0, AKV_E_ARGUMENT, &["desc->visibility is 0", who]);
    fails(e.attend(&q, &Asked { window: 9, ..full.clone() }.desc()).0, AKV_E_ARGUMENT, &["window", "is 9", who]);
    let slopes = Some(vec![1.0; 2]);
    fails(e.attend(&q, &Asked { slopes, ..full.clone() }.desc()).0, AKV_E_ARGUMENT, &["desc->alibi_slopes", who]);
    let (status, got) = e.attend(&q, &full.desc());
    ok(status);
    check(&e, &[&one, &more], &full, &got, "refused before");
    e.commit();
}

#[test]
fn distances_are_added() {
    cases(2, 40, |rng, asked, sequences, layer| {
        let slope = |rng: &mut Rng| [0.0, -0.5, 1.0, 0.01, 0.1][rng.below(5)];
        asked.slopes = Some((0..layer.n_q_heads).map(|_| slope(rng)).collect());
        asked.window = if rng.below(2) == 0 { 0 } else { 1 + rng.below(150) as i32 };
        if rng.below(3) == 0 {
            asked.tree = trees(rng, n_rows(sequences, layer));
        }
    });
}

/// Rows or tokens, and heads.
type Places = Vec<(usize, usize)>;

/// Puts something that is no number into some rows; returns (token, kv head) of K or V, and (row, head) of q.
fn spoil(rng: &mut Rng, layer: &akv_layer_desc, s: &mut Sequence) -> (Places, Places) {
    let (heads, kv_heads) = (layer.n_q_heads as usize, layer.n_kv_heads as usize);
    let (mut bad, mut bad_q) = (Vec::new(), Vec::new());
    let no_number = |rng: &mut Rng| [f32::NAN, -f32::NAN, f32::INFINITY, f32::NEG_INFINITY][rng.below(4)];
    for _ in 0..1 + rng.below(3) {
        for side in [&mut s.k, &mut s.v] {
            if rng.below(2) == 0 && !side.is_empty() {
                let at = rng.below(side.len());
                side[at] = no_number(rng);
                let row = at / (side.len() / s.positions.len());
                let dim = side.len() / s.positions.len() / kv_heads;
                bad.push((row, at / dim % kv_heads));
            }
        }
    }
    if rng.below(3) == 0 {
        let (at, dim) = (rng.below(s.q.len()), layer.dim_k as usize);
        s.q[at] = no_number(rng);
        bad_q.push((at / (heads * dim), at / dim % heads));
    }
    (bad, bad_q)
}

fn zeros_for_nan(s: &Sequence) -> Sequence {
    let clean = |x: &[f32]| -> Vec<f32> { x.iter().map(|&x| if x.is_finite() { x } else { 0.0 }).collect() };
    Sequence { k: clean(&s.k), v: clean(&s.v), positions: s.positions.clone(), q: clean(&s.q) }
}

/// What is no number counts as 0, or spreads to whatever sees it and to nothing else.
#[test]
fn nan_is_zero_or_spreads() {
    let mut rng = Rng::new(8);
    let mut lost = 0;
    for case in 0..80 {
        let mut layer = some_layer(&mut rng);
        let format = [AKV_FORMAT_ALIGNED, AKV_FORMAT_RAW, AKV_FORMAT_ALIGNED, AKV_FORMAT_PUBLISHED][case % 4];
        let mut asked = some_call(&mut rng, &layer);
        if format == AKV_FORMAT_PUBLISHED {
            (layer.dtype_k, layer.dtype_v) = (AKV_F16, AKV_F16);
            asked = Asked { mode: asked.mode, ..Asked::default() };
        } else if rng.below(3) == 0 {
            asked.tree = Some((0..60).map(|_| rng.next()).collect());
        }
        asked.window = [0, 20, 140][rng.below(3)];
        let make = |policy: i32| {
            Engine::new(layer, |c| (c.format, c.nan_policy, c.exact_head) = (format, policy, [0, 9][case % 2]), 0, 2)
        };
        let [error, spreads, zero] = [AKV_NAN_ERROR, AKV_NAN_PROPAGATE, AKV_NAN_ZERO].map(make);
        let mut all = Vec::new();
        for _ in 0..1 + rng.below(3) {
            let len = [1, 40, 129, 300, 1100][rng.below(if case % 8 == 0 { 5 } else { 4 })];
            let n_q = (1 + rng.below(20)).min(len);
            all.push(sequence(&mut rng, &layer, len, n_q, false));
        }
        let bad: Vec<_> = all.iter_mut().map(|s| spoil(&mut rng, &layer, s)).collect();
        let clean: Vec<Sequence> = all.iter().map(zeros_for_nan).collect();
        let (all, clean): (Vec<&Sequence>, Vec<&Sequence>) = (all.iter().collect(), clean.iter().collect());
        let told = format!("case {case}: format {format} {layer:?} {asked:?}");
        let want = error.run(&clean, &asked.desc());
        assert_eq!(want, zero.run(&all, &asked.desc()), "{told}");
        assert_eq!(want, spreads.run(&clean, &asked.desc()), "{told}");
        let got = spreads.run(&all, &asked.desc());
        let (heads, kv_heads, (_, dim_v)) = (layer.n_q_heads as usize, layer.n_kv_heads as usize, spreads.dims());
        let mut row = 0;
        for (s, (bad, bad_q)) in all.iter().zip(&bad) {
            let n_q = s.q.len() / (heads * layer.dim_k as usize);
            for i in 0..n_q {
                let seen = asked.sees(s, row, i, n_q);
                for head in 0..heads {
                    let kv_head = head * kv_heads / heads;
                    let sees = bad.iter().any(|&(token, head)| head == kv_head && seen.contains(&token));
                    let at = row * heads + head;
                    if sees || bad_q.contains(&(i, head)) {
                        assert!(got.out[at * dim_v..(at + 1) * dim_v].iter().all(|x| x.is_nan()), "{told} row {row}");
                        assert!(got.lse[at].is_nan() && got.amplitude[at].is_nan(), "{told} row {row}");
                        assert_eq!([got.bound[at], got.lse_bound[at], got.estimate[at]], [f32::INFINITY; 3]);
                        lost += 1;
                    } else {
                        let bits = [&got, &want].map(|o| o.bits(at..at + 1, dim_v));
                        assert_eq!(bits[0], bits[1], "{told} row {row} head {head}");
                    }
                }
                row += 1;
            }
        }
    }
    assert!(lost > 100);
}

/// What is no number is found, and its place named; nothing is appended or written.
#[test]
fn nan_is_named() {
    let mut rng = Rng::new(9);
    let layer = akv_layer_desc { n_q_heads: 4, n_kv_heads: 2, dim_k: 16, ..zeroed() };
    let e = Engine::new(layer, |_| (), 0, 1);
    let (one, mut two) = (sequence(&mut rng, &layer, 3, 1, false), sequence(&mut rng, &layer, 4, 2, false));
    let good = two.k[(2 * 2 + 1) * 16 + 5];
    for bad in [f32::NAN, f32::INFINITY] {
        let ids = [e.sequence(), e.sequence()];
        let place = format!("layer 0, sequence {}", ids[1]);
        two.k[(2 * 2 + 1) * 16 + 5] = bad;
        // Row 2 of the second sequence is row 5 of the call.
        let named = |what: &'static str| [what, "row 5, head 1"];
        let status = e.begin(&ids, &[&one, &two], &[1, 2]);
        fails(status, AKV_E_NONFINITE, &[&named("key")[..], &[&place[..]]].concat());
        two.k[(2 * 2 + 1) * 16 + 5] = good;
        let (k, mut v) = ([&one.k[..], &two.k[..]].concat(), [&one.v[..], &two.v[..]].concat());
        let append = |v: &[f32]| {
            // SAFETY: as many rows as the step has.
            unsafe { akv_quantize_kv(e.batch, 0, &as_rows(&k, AKV_F32), &as_rows(v, AKV_F32), null_mut()) }
        };
        let at = (5 * 2 + 1) * 16;
        let good_v = std::mem::replace(&mut v[at], bad);
        fails(append(&v), AKV_E_NONFINITE, &[&named("value")[..], &[&place[..]]].concat());
        v[at] = good_v;
        ok(append(&v));
        let mut q = [&one.q[..], &two.q[..]].concat();
        q[(2 * 4 + 3) * 16] = bad;
        let (status, got) = e.attend(&q, &zeroed());
        fails(status, AKV_E_NONFINITE, &["desc->q", "row 2, head 3", &place]);
        assert!(got.out.iter().all(|x| x.is_nan()), "outputs are untouched");
        e.commit();
    }
}

/// Marks go where their rows go: forks, truncations into tiles that are reopened, further tokens, reading back.
#[test]
fn nan_stays_with_its_rows() {
    let mut rng = Rng::new(10);
    let layer = akv_layer_desc { n_q_heads: 2, n_kv_heads: 2, dim_k: 16, ..zeroed() };
    for case in 0..60 {
        let format = FORMATS[usize::from(case % 3 == 0)];
        let change = |c: &mut akv_cache_desc| {
            (c.format, c.nan_policy) = (format, AKV_NAN_PROPAGATE);
            (c.exact_head, c.exact_tail) = ([0, AKV_NONE][case % 2], [0, AKV_NONE, 128][case % 3]);
        };
        let e = Engine::new(layer, change, 0, 1);
        // By token: whether K or V of each head is bad.
        type Bad = Vec<[[bool; 2]; 2]>;
        let mut sequences: Vec<(akv_sequence, Bad)> = vec![(e.sequence(), Vec::new())];
        for _ in 0..6 {
            let at = rng.below(sequences.len());
            // SAFETY: ids of this cache, and outputs.
            unsafe {
                match rng.below(3) {
                    0 if !sequences[at].1.is_empty() => {
                        let keep = rng.below(sequences[at].1.len() + 1);
                        ok(akv_sequence_truncate(e.cache, sequences[at].0, keep as i64));
                        sequences[at].1.truncate(keep);
                    }
                    1 => {
                        let (mut id, keep) = (0, rng.below(sequences[at].1.len() + 1));
                        ok(akv_sequence_fork(e.cache, sequences[at].0, keep as i64, &mut id));
                        let bad = sequences[at].1[..keep].to_vec();
                        sequences.push((id, bad));
                    }
                    _ => {}
                }
            }
            let (id, bad) = &mut sequences[at];
            let len = 1 + rng.below(200);
            let mut s = sequence(&mut rng, &layer, len, 1, false);
            s.positions.iter_mut().for_each(|p| *p += 1000 * bad.len() as i64);
            for token in 0..s.positions.len() {
                let mut flags = [[false; 2]; 2];
                for head in 0..2 {
                    for (side, x) in [&mut s.k, &mut s.v].into_iter().enumerate() {
                        if rng.below(100) == 0 {
                            x[(token * 2 + head) * 16 + rng.below(16)] = f32::NAN;
                            flags[head][side] = true;
                        }
                    }
                }
                bad.push(flags);
            }
            ok(e.begin(&[*id], &[&s], &[1]));
            // Parts, so that tokens are told apart.
            for from in (0..bad.len()).step_by(bad.len().div_ceil(9)) {
                let to = (from + 1 + rng.below(30)).min(bad.len());
                let asked =
                    Asked { kv_from: Some(vec![from as i64]), kv_to: Some(vec![to as i64]), ..Asked::default() };
                let (status, got) = e.attend(&s.q, &asked.desc());
                ok(status);
                for head in 0..2 {
                    let want = bad[from..to].iter().any(|token| token[head] != [false; 2]);
                    assert_eq!(got.out[head * 16].is_nan(), want, "case {case} {from}..{to} head {head}");
                }
            }
            e.commit();
            let (mut k, mut v) = (vec![0.0f32; bad.len() * 32], vec![0.0f32; bad.len() * 32]);
            let (to_k, to_v) = (as_rows(&k, AKV_F32), as_rows(&v, AKV_F32));
            // SAFETY: as large as said.
            unsafe { ok(akv_dequantize_kv(e.cache, *id, 0, 0, bad.len() as i64, &to_k, &to_v, null_mut())) };
            for (token, flags) in bad.iter().enumerate() {
                for head in 0..2 {
                    let range = (token * 2 + head) * 16..(token * 2 + head + 1) * 16;
                    let nan = |x: &mut [f32]| x[range.clone()].iter().all(|x| x.is_nan());
                    assert_eq!([nan(&mut k), nan(&mut v)], flags[head], "case {case} token {token}");
                }
            }
        }
    }
}

/// V as a part of K, stored once: against float64, in every other respect as rows of their own.
#[test]
fn v_is_a_part_of_k() {
    let mut rng = Rng::new(11);
    for case in 0..40 {
        // As DeepSeek has it, or smaller.
        let (dim_k, dim_v, g) = match case % 10 {
            0 => (576, 512, [16, 128][case / 10 % 2]),
            _ => [(80, 64, 16), (64, 64, 4), (40, 24, 70), (24, 16, 3), (272, 256, 9)][rng.below(5)],
        };
        let layer = akv_layer_desc {
            n_q_heads: g,
            n_kv_heads: 1,
            dim_k,
            dim_v,
            dtype_k: [AKV_F32, AKV_F16][rng.below(2)],
            planes_k: 0,
            v_is_prefix_of_k: 1,
            ..zeroed()
        };
        let format = FORMATS[usize::from(case % 4 == 3)];
        let exact_head = [0, AKV_NONE, 20][rng.below(3)];
        let make = |isa, threads| Engine::new(layer, |c| (c.format, c.exact_head) = (format, exact_head), isa, threads);
        let e = make(0, 1);
        let lens = [1 + rng.below(20), [127, 128, 129, 300][rng.below(4)]];
        let all = lens.map(|len| sequence(&mut rng, &layer, len, (1 + case % 3).min(len), false));
        let mut asked = some_call(&mut rng, &layer);
        asked.tree = if rng.below(3) == 0 { trees(&mut rng, n_rows(&[&all[0], &all[1]], &layer)) } else { None };
        let all = [&all[0], &all[1]];
        let told = format!("case {case}: format {format} {lens:?} head {exact_head} {layer:?} {asked:?}");
        let got = e.run(&all, &asked.desc());
        check(&e, &all, &asked, &got, &told);
        check_parts(&e, &mut rng, &all, &asked, &told);
        for isa in isas() {
            assert_eq!(make(isa, 2).run(&all, &asked.desc()), got, "{told}: isa {isa}");
        }
        // Not much worse than K and V apart, which read the same digits.
        for (bound, amplitude) in got.bound.iter().zip(&got.amplitude) {
            assert!(*bound <= 0.02 * amplitude + 1e-30, "{told}: bound {bound}, A {amplitude}");
        }

        // Nothing of V is stored. (Without workspaces, which only attention takes.)
        let e = make(0, 1);
        let id = e.sequence();
        ok(e.begin(&[id], &[all[1]], &[1]));
        e.commit();
        let mut usage = akv_usage { struct_size: size_of::<akv_usage>() as u32, ..zeroed() };
        // SAFETY: an output.
        unsafe { ok(akv_cache_usage(e.cache, &mut usage)) };
        let bits = if (format, layer.dtype_k) == (AKV_FORMAT_RAW, AKV_F32) { 32 } else { 16 };
        let tile = 128 * bits / 8 * dim_k as u64;
        // Scale bytes, and some tables.
        let most = usage.pages_used * (tile + 1024) + 10_000;
        assert!((1..=most).contains(&(usage.bytes_used - usage.bytes_kept)), "{told}: {usage:?}, at most {most}");

        // Read back, both are the same rows; a fork knows them too.
        let mut fork = 0;
        let (n, dk, dv) = (lens[1] - 1, dim_k as usize, dim_v as usize);
        let (k, v) = (vec![0.0f32; n * dk], vec![0.0f32; n * dv]);
        // SAFETY: ids, and outputs as large as said.
        unsafe {
            ok(akv_sequence_fork(e.cache, id, n as i64, &mut fork));
            let (to_k, to_v) = (as_rows(&k, AKV_F32), as_rows(&v, AKV_F32));
            ok(akv_dequantize_kv(e.cache, fork, 0, 0, n as i64, &to_k, &to_v, null_mut()));
        }
        let peak = all[1].k.iter().fold(0.0f32, |m, x| m.max(x.abs()));
        for token in 0..n {
            for c in 0..dk {
                let (x, y) = (k[token * dk + c], all[1].k[token * dk + c]);
                assert!((x - y).abs() <= 1e-4 * peak, "{told}: {x} {y}");
                assert!(c >= dv || v[token * dv + c] == x, "{told}");
            }
        }
    }
    // What such layers are not.
    let layer =
        akv_layer_desc { n_q_heads: 16, n_kv_heads: 1, dim_k: 576, dim_v: 512, v_is_prefix_of_k: 1, ..zeroed() };
    let e = Engine::new(layer, |_| (), 0, 1);
    let supports = |change: &dyn Fn(&mut akv_layer_desc, &mut akv_cache_desc)| {
        let (mut layer, struct_size) = (layer, size_of::<akv_cache_desc>() as u32);
        let mut cache = akv_cache_desc { struct_size, n_layers: 1, ..zeroed() };
        change(&mut layer, &mut cache);
        cache.layers = &layer;
        let mut path = 0;
        // SAFETY: a valid descriptor and an output.
        (unsafe { akv_supports(e.context, &cache, null(), &mut path) }, path)
    };
    assert_eq!(supports(&|_, _| ()), (AKV_OK, AKV_PATH_DENSE));
    type Change = fn(&mut akv_layer_desc, &mut akv_cache_desc);
    let cases: [(akv_status, &str, Change); 9] = [
        (AKV_E_ARGUMENT, "dim_k is 584", |l, _| l.dim_k = 584),
        (AKV_E_ARGUMENT, "dim_v is 512", |l, _| l.dim_k = 504),
        (AKV_E_ARGUMENT, "n_q_heads is 129", |l, _| l.n_q_heads = 129),
        (AKV_E_ARGUMENT, "dtype_v is 1", |l, _| l.dtype_v = AKV_F16),
        (AKV_E_ARGUMENT, "planes_v is 2", |l, _| l.planes_v = 2),
        (AKV_E_ARGUMENT, "v_is_prefix_of_k is 2", |l, _| l.v_is_prefix_of_k = 2),
        (AKV_E_ARGUMENT, "v_is_prefix_of_k is 1", |l, c| {
            (l.dtype_k, l.dtype_v, c.format) = (AKV_F16, AKV_F16, AKV_FORMAT_PUBLISHED)
        }),
        (AKV_E_UNSUPPORTED, "v_is_prefix_of_k is 1", |_, c| (c.placement, c.n_slots) = (AKV_SLOTS, 128)),
        (AKV_E_ARGUMENT, "dim_k is 576", |l, _| l.v_is_prefix_of_k = 0),
    ];
    for (status, part, change) in cases {
        fails(supports(&change).0, status, &[part]);
    }
    let s = sequence(&mut rng, &layer, 2, 1, false);
    ok(e.begin(&[e.sequence()], &[&s], &[1]));
    // SAFETY: two rows.
    let status = unsafe { akv_quantize_kv(e.batch, 0, &as_rows(&s.k, AKV_F32), &as_rows(&s.k, AKV_F32), null_mut()) };
    fails(status, AKV_E_ARGUMENT, &["value is not NULL"]);
    e.commit();
}

/// A row's result, bit for bit, is that of its sequence and of what it sees: which other rows and sequences are in the call,
/// and where they lie in it, does not show. (Whether there are more than 8 query rows does: they share decoded tiles.)
#[test]
fn rows_do_not_know_each_other() {
    let mut rng = Rng::new(12);
    for case in 0..60 {
        let layer = some_layer(&mut rng);
        let format = [AKV_FORMAT_ALIGNED, AKV_FORMAT_RAW][case % 2];
        let exact_head = [0, AKV_NONE, 20][rng.below(3)];
        let make = |n_threads| Engine::new(layer, |c| (c.format, c.exact_head) = (format, exact_head), 0, n_threads);
        let engines = [make(1), make(3)];
        let (heads, row) = (layer.n_q_heads as usize, (layer.n_q_heads * layer.dim_k) as usize);
        let (most, sequences) = ([8, 8, 40][case % 3], 1 + rng.below(3));
        let all: Vec<Sequence> = (0..sequences)
            .map(|_| {
                let len = [41, 128, 129, 200, 1100][rng.below(if case % 8 == 0 { 5 } else { 4 })];
                let n_q = if most == 8 { 1 + rng.below(8) } else { 9 + rng.below(32) };
                sequence(&mut rng, &layer, len, n_q, false)
            })
            .collect();
        let ids = engines.each_ref().map(|e| {
            let ids: Vec<_> = all.iter().map(|_| e.sequence()).collect();
            ok(e.begin(&ids, &all.iter().collect::<Vec<_>>(), &vec![0; all.len()]));
            e.commit();
            ids
        });
        // Rows by what they see alone, so that any of them can be asked for: tokens kv_from..kv_to, and a tree.
        let of = |s: &Sequence| s.q.len() / row;
        let n: usize = all.iter().map(of).sum();
        let (from, to) =
            ((0..n).map(|_| rng.below(60) as i64).collect(), (0..n).map(|_| 30 + rng.below(1200) as i64).collect());
        let slopes = (rng.below(3) == 0).then(|| vec![0.0; heads]);
        let tree = trees(&mut rng, n);
        let asked =
            Asked { full: true, kv_from: Some(from), kv_to: Some(to), tree, slopes, ..some_call(&mut rng, &layer) };
        let told = format!("case {case}: format {format} head {exact_head} {layer:?} {asked:?}");
        let run = |e: usize, members: &[(usize, Vec<usize>)]| {
            // Rows of each sequence, by their index in it.
            let (mut q, mut rows) = (Vec::new(), Vec::new());
            for (s, picked) in members {
                let first: usize = all[..*s].iter().map(of).sum();
                for &i in picked {
                    q.extend_from_slice(&all[*s].q[i * row..(i + 1) * row]);
                    rows.push(first + i);
                }
            }
            let nothing: Vec<_> =
                members.iter().map(|_| Sequence { k: vec![], v: vec![], positions: vec![], q: vec![] }).collect();
            let some: Vec<_> = members.iter().map(|(s, _)| ids[e][*s]).collect();
            let n_q: Vec<_> = members.iter().map(|(_, picked)| picked.len() as i32).collect();
            ok(engines[e].begin(&some, &nothing.iter().collect::<Vec<_>>(), &n_q));
            let pick = |x: &Option<Vec<i64>>| x.as_ref().map(|x| rows.iter().map(|&r| x[r]).collect());
            let (kv_from, kv_to) = (pick(&asked.kv_from), pick(&asked.kv_to));
            let tree = asked.tree.as_ref().map(|x| rows.iter().map(|&r| x[r]).collect());
            let (status, got) = engines[e].attend(&q, &Asked { kv_from, kv_to, tree, ..asked.clone() }.desc());
            ok(status);
            engines[e].commit();
            let dim_v = engines[e].dims().1;
            let bits = (0..rows.len()).map(|i| got.bits(i * heads..(i + 1) * heads, dim_v));
            rows.iter().copied().zip(bits).collect::<Vec<_>>()
        };
        let everything: Vec<_> = all.iter().enumerate().map(|(i, s)| (i, (0..of(s)).collect())).collect();
        let want = run(0, &everything);
        assert_eq!(run(1, &everything), want, "{told}: threads");
        for round in 0..4 {
            let mut members = Vec::new();
            for (i, s) in all.iter().enumerate() {
                if round > 0 && rng.below(2) == 0 {
                    continue;
                }
                let mut picked: Vec<usize> = (0..of(s)).collect();
                for k in (1..picked.len()).rev() {
                    picked.swap(k, rng.below(k + 1));
                }
                let least = if most == 8 { 1 } else { 9 };
                picked.truncate(least + rng.below(picked.len() + 1 - least));
                members.push((i, picked));
            }
            if round % 2 == 1 {
                members.reverse();
            }
            if members.is_empty() {
                continue;
            }
            for (r, bits) in run(round % 2, &members) {
                assert_eq!(bits, want[r].1, "{told}: row {r} among {members:?}");
            }
        }
    }
}

/// Cells: what is no number goes with its cell, whoever writes, copies and forgets cells, until it is written over.
#[test]
fn nan_in_cells() {
    const N: usize = 300;
    let mut rng = Rng::new(13);
    let layer = akv_layer_desc { n_q_heads: 2, n_kv_heads: 2, dim_k: 16, ..zeroed() };
    for case in 0..40 {
        let (format, policy) = (FORMATS[case % 2], [AKV_NAN_PROPAGATE, AKV_NAN_PROPAGATE, AKV_NAN_ZERO][case % 3]);
        let (mut context, mut cache, mut mask) = (null_mut(), null_mut(), null_mut());
        let struct_size = size_of::<akv_context_desc>() as u32;
        let context_desc = akv_context_desc { struct_size, abi_version: AKV_ABI_VERSION, ..zeroed() };
        let desc = akv_cache_desc {
            struct_size: size_of::<akv_cache_desc>() as u32,
            n_layers: 1,
            layers: &layer,
            format,
            placement: AKV_SLOTS,
            nan_policy: policy,
            n_slots: N as u64,
            ..zeroed()
        };
        // SAFETY: valid descriptors and outputs.
        unsafe {
            ok(akv_context_create(&context_desc, &mut context));
            ok(akv_cache_create(context, &desc, &mut cache));
            ok(akv_mask_create(context, 1, N as i64, &mut mask));
        }
        // By cell: of K and V whether it has a row, and which heads are bad.
        let mut cells = vec![[(false, [false; 2]); 2]; N];
        for _ in 0..25 {
            let (first, n) = (rng.below(N), 1 + rng.below(40));
            let n = n.min(N - first);
            match rng.below(8) {
                0 => {
                    // SAFETY: a handle.
                    unsafe { ok(akv_slots_invalidate(cache, 0, first as i64, n as i64)) };
                    cells[first..first + n].fill([(false, [false; 2]); 2]);
                }
                1 | 2 => {
                    let (n, to) = (n.min(N / 2), rng.below(N));
                    let n = n.min(N - to);
                    if first + n <= to || to + n <= first {
                        // SAFETY: a handle.
                        unsafe { ok(akv_slots_copy(cache, 0, first as i64, to as i64, n as i64)) };
                        cells.copy_within(first..first + n, to);
                    }
                }
                _ => {
                    let slots: Vec<i64> = (0..n).map(|_| (first + rng.below(n)) as i64).collect();
                    let sides = [1, 2, 3, 3][rng.below(4)];
                    let mut rows = [rng.normals(n * 32), rng.normals(n * 32)];
                    for (side, rows) in rows.iter_mut().enumerate().filter(|(side, _)| sides >> side & 1 == 1) {
                        for (i, &slot) in slots.iter().enumerate() {
                            let bad = [rng.below(30) == 0, rng.below(30) == 0];
                            for head in (0..2).filter(|&head| bad[head]) {
                                rows[(i * 2 + head) * 16 + rng.below(16)] = f32::NAN;
                            }
                            cells[slot as usize][side] = (true, bad);
                        }
                    }
                    let [k, v] = rows.each_ref().map(|rows| as_rows(rows, AKV_F32));
                    let [k, v] =
                        [(&k, 1), (&v, 2)].map(|(rows, bit)| if sides & bit != 0 { &raw const *rows } else { null() });
                    // SAFETY: as many rows as slots.
                    unsafe { ok(akv_slots_write(cache, 0, slots.as_ptr(), n as i64, k, v, null_mut())) };
                }
            }
            let few = 1 + rng.below(100);
            let seen: Vec<bool> = (0..N).map(|_| rng.below(few) == 0).collect();
            let bits: Vec<f16> = seen.iter().map(|&seen| if seen { f16::ZERO } else { f16::NEG_INFINITY }).collect();
            let q = rng.normals(32);
            let mut got = Output::new(2, 16);
            let asked = akv_attention_desc {
                struct_size: size_of::<akv_attention_desc>() as u32,
                q: as_rows(&q, AKV_F32),
                out: as_rows(&got.out, AKV_F32),
                lse: got.state().lse,
                mask,
                ..zeroed()
            };
            let span = akv_span { stream: 0, n_q: 1, n_kv: N as i64 };
            let (k, v) = (vec![0.0f32; N * 32], vec![0.0f32; N * 32]);
            // SAFETY: as large as said.
            unsafe {
                ok(akv_mask_set(mask, 0, 1, N as i64, bits.as_ptr().cast(), 0, null_mut()));
                ok(akv_slots_attention(cache, 0, &span, 1, &asked));
                let (k, v) = (as_rows(&k, AKV_F32), as_rows(&v, AKV_F32));
                ok(akv_slots_read(cache, 0, 0, N as i64, &k, &v, null_mut()));
            }
            for head in 0..2 {
                let bad =
                    |cell: &[(bool, [bool; 2]); 2]| cell[0].0 && cell[1].0 && (cell[0].1[head] || cell[1].1[head]);
                let want =
                    policy == AKV_NAN_PROPAGATE && cells.iter().zip(&seen).any(|(cell, &seen)| seen && bad(cell));
                assert_eq!(got.out[head * 16].is_nan(), want, "case {case} head {head}");
                assert_eq!(got.lse[head].is_nan(), want, "case {case} head {head}");
                for (i, cell) in cells.iter().enumerate() {
                    for (side, rows) in [&k, &v].into_iter().enumerate() {
                        let want = policy == AKV_NAN_PROPAGATE && cell[side].0 && cell[side].1[head];
                        let nan = rows[(i * 2 + head) * 16..][..16].iter().filter(|x| x.is_nan()).count();
                        assert_eq!(nan, if want { 16 } else { 0 }, "case {case} cell {i} head {head} side {side}");
                    }
                }
            }
        }
        // SAFETY: handles.
        unsafe {
            ok(akv_mask_destroy(mask));
            ok(akv_cache_destroy(cache));
            ok(akv_context_destroy(context));
        }
    }
}

unsafe extern "C" fn write(user: *mut std::ffi::c_void, bytes: *const std::ffi::c_void, n: usize) -> i32 {
    // SAFETY: `user` is a vector, and the bytes are there.
    unsafe { (*user.cast::<Vec<u8>>()).extend_from_slice(std::slice::from_raw_parts(bytes.cast(), n)) };
    0
}

unsafe extern "C" fn read(user: *mut std::ffi::c_void, bytes: *mut std::ffi::c_void, n: usize) -> i32 {
    // SAFETY: `user` is a slice, and there is room for the bytes.
    unsafe {
        let left = &mut *user.cast::<&[u8]>();
        let Some((now, later)) = left.split_at_checked(n) else { return 1 };
        std::ptr::copy_nonoverlapping(now.as_ptr(), bytes.cast(), n);
        *left = later;
    }
    0
}

/// A layer that shares another's rows attends as one that has the same rows of its own.
#[test]
fn layers_that_share_rows() {
    let mut rng = Rng::new(91);
    for case in 0..12 {
        let own = akv_layer_desc {
            n_q_heads: 2,
            n_kv_heads: 2,
            dim_k: 64,
            dim_v: 40,
            dtype_k: AKV_F16,
            dtype_v: AKV_F32,
            ..zeroed()
        };
        let latent = case % 4 == 3;
        let own = if latent { akv_layer_desc { v_is_prefix_of_k: 1, dtype_v: 0, ..own } } else { own };
        let other = akv_layer_desc { n_q_heads: 3, n_kv_heads: 1, dim_k: 16, dim_v: 0, v_is_prefix_of_k: 0, ..own };
        let alone = akv_layer_desc { n_q_heads: 8, window: [0, 50][case % 2], ..own };
        let layers = [own, akv_layer_desc { share_with: 1, ..alone }, other];
        let format = FORMATS[usize::from(case % 3 == 2)];
        let mut e = Engine::new(alone, |c| (c.format, c.n_layers, c.layers) = (format, 3, layers.as_ptr()), 0, 2);
        e.reads = 1;
        let plain = Engine::new(alone, |c| c.format = format, 0, 2);
        let usage = |e: &Engine| {
            let mut usage = akv_usage { struct_size: size_of::<akv_usage>() as u32, ..zeroed() };
            // SAFETY: an output.
            unsafe { ok(akv_cache_usage(e.cache, &mut usage)) };
            usage
        };
        let (id, twin) = (e.sequence(), plain.sequence());
        let asked = some_call(&mut rng, &akv_layer_desc { v_is_prefix_of_k: 0, ..alone });
        let asked = Asked { tree: None, kv_from: None, kv_to: None, ..asked };
        let told = format!("case {case}: {layers:?} {asked:?}");
        let at = std::cell::Cell::new(0);
        let mut step = |n: usize, id: akv_sequence, twin: akv_sequence| {
            let mut rows = sequence(&mut rng, &alone, n, n.min(3), false);
            rows.positions.iter_mut().for_each(|p| *p += at.get());
            at.set(at.get() + n as i64);
            let (k, v) = (packed(&vec![1.0; n * 16], AKV_F16), packed(&vec![1.0; n * 16], other.dtype_v));
            ok(e.begin(&[id], &[&rows], &[n.min(3) as i32]));
            ok(plain.begin(&[twin], &[&rows], &[n.min(3) as i32]));
            let (status, ours) = e.attend(&rows.q, &asked.desc());
            ok(status);
            assert_eq!(ours, plain.attend(&rows.q, &asked.desc()).1, "{told}");
            let (k, v) = (as_rows(&k, AKV_F16), as_rows(&v, other.dtype_v));
            // SAFETY: rows as many as the step has, of layer 2; of layer 1 none are read.
            unsafe {
                fails(akv_quantize_kv(e.batch, 1, &k, &v, null_mut()), AKV_E_ARGUMENT, &["layer 1", "layer 0"]);
                fails(akv_batch_commit(e.batch), AKV_E_ARGUMENT, &["layer 2 has not been appended"]);
                ok(akv_quantize_kv(e.batch, 2, &k, &v, null_mut()));
            }
            e.commit();
            plain.commit();
        };
        for n in [1, 130, 40, 200] {
            step(n, id, twin);
        }
        assert_eq!(usage(&e).pages_used, 2 * usage(&plain).pages_used, "{told}");
        // SAFETY: ids, outputs, callbacks and descriptors as described.
        unsafe {
            let mut lengths = [0; 3];
            for (layer, n) in lengths.iter_mut().enumerate() {
                ok(akv_sequence_length(e.cache, id, layer as i32, n));
            }
            assert_eq!(lengths, [371; 3]);
            let read_back = |cache, id, layer| {
                let x = vec![0.0f32; 371 * 2 * 64];
                ok(akv_dequantize_kv(cache, id, layer, 0, 371, &as_rows(&x, AKV_F32), null(), null_mut()));
                x
            };
            assert_eq!(read_back(e.cache, id, 1), read_back(plain.cache, twin, 0));

            // What is done to the rows is done once.
            let inv_freq = [0.5f32; 12];
            let turned = akv_rope {
                pairing: AKV_ROPE_INTERLEAVED,
                n_dims: 24,
                first_dim: 40,
                inv_freq: inv_freq.as_ptr(),
                ..zeroed()
            };
            let not_read = akv_rope { pairing: 99, ..turned };
            let still = akv_rope { n_dims: 0, first_dim: 0, inv_freq: null(), ..turned };
            ok(akv_sequence_remove(e.cache, id, 20, 150));
            ok(akv_sequence_remove(plain.cache, twin, 20, 150));
            ok(akv_sequence_shift(e.cache, id, 150, i64::MAX, -20, [turned, not_read, still].as_ptr()));
            ok(akv_sequence_shift(plain.cache, twin, 150, i64::MAX, -20, &turned));

            // Bytes, of a cache that does not share, too.
            let (mut bytes, mut half) = (Vec::<u8>::new(), Vec::<u8>::new());
            ok(akv_sequence_export(e.cache, id, null(), Some(write), (&raw mut bytes).cast()));
            let part = akv_export_desc {
                struct_size: size_of::<akv_export_desc>() as u32,
                first_layer: 1,
                n_layers: 1,
                ..zeroed()
            };
            let status = akv_sequence_export(e.cache, id, &part, Some(write), (&raw mut half).cast());
            fails(status, AKV_E_ARGUMENT, &["n_layers", "rows of its own"]);
            let two = [own, other];
            let apart = Engine::new(alone, |c| (c.format, c.n_layers, c.layers) = (format, 2, two.as_ptr()), 0, 1);
            let (mut there, mut back) = (0, 0);
            let mut left = &bytes[..];
            ok(akv_sequence_import(apart.cache, 0, Some(read), (&raw mut left).cast(), &mut there));
            let mut again = Vec::<u8>::new();
            ok(akv_sequence_export(apart.cache, there, null(), Some(write), (&raw mut again).cast()));
            assert!(again == bytes, "{told}");
            let mut left = &again[..];
            ok(akv_sequence_import(e.cache, 0, Some(read), (&raw mut left).cast(), &mut back));
            at.set(at.get() - 20);
            step(60, back, twin);
            ok(akv_sequence_truncate(e.cache, back, 400));
            ok(akv_sequence_truncate(plain.cache, twin, 400));
            at.set(at.get() - 31);
            step(9, back, twin);
        }
    }
}

/// Windows and causality go by the positions after a shift, and K has turned by it.
#[test]
fn windows_after_a_shift() {
    let mut rng = Rng::new(92);
    for case in 0..12 {
        let layer = akv_layer_desc {
            n_q_heads: 4,
            n_kv_heads: 2,
            dim_k: 64,
            dim_v: 40,
            dtype_k: AKV_F16,
            dtype_v: AKV_F16,
            window: [0, 90][case % 2],
            ..zeroed()
        };
        let format = FORMATS[usize::from(case % 4 == 3)];
        let e = Engine::new(layer, |c| c.format = format, 0, 1);
        let (id, mut rows) = (e.sequence(), sequence(&mut rng, &layer, 400, 3, false));
        ok(e.begin(&[id], &[&rows], &[0]));
        e.commit();
        let inv_freq: Vec<f32> = (0..32).map(|i| 1e4f32.powf(-(i as f32) / 32.0)).collect();
        let rope = akv_rope { pairing: AKV_ROPE_INTERLEAVED, n_dims: 64, inv_freq: inv_freq.as_ptr(), ..zeroed() };
        for (token, delta) in [(100, 7), (330, 40), (398, 1)] {
            // SAFETY: an id, and a rope of the one layer.
            unsafe { ok(akv_sequence_shift(e.cache, id, rows.positions[token], i64::MAX, delta, &rope)) };
            rows.positions[token..].iter_mut().for_each(|p| *p += delta);
            for (i, x) in rows.k.chunks_exact_mut(64).enumerate().skip(2 * token) {
                for (pair, &frequency) in x.as_chunks_mut::<2>().0.iter_mut().zip(&inv_freq) {
                    let (sin, cos) = (delta as f64 * f64::from(frequency)).sin_cos();
                    let [p, q] = pair.map(f64::from);
                    *pair = [(p * cos - q * sin) as f32, (p * sin + q * cos) as f32];
                }
                // Rows that are kept as given: of tiles that the exact tail reaches, or all.
                if i >= 2 * 256 || format == AKV_FORMAT_RAW {
                    x.iter_mut().for_each(|x| *x = f16::from_f32(*x).to_f32());
                }
            }
        }
        let window = [0, 30, 41, 150, 330][case % 5];
        let asked = Asked { window, sink_tokens: if window > 0 { 4 } else { 0 }, tolerance: 1e-2, ..Asked::default() };
        let told = format!("case {case}: {asked:?} {layer:?}");
        let nothing = Sequence { k: Vec::new(), v: Vec::new(), positions: Vec::new(), q: Vec::new() };
        ok(e.begin(&[id], &[&nothing], &[3]));
        let (status, got) = e.attend(&rows.q, &asked.desc());
        ok(status);
        let asked = Asked { window: if window == 0 { layer.window } else { window }, ..asked };
        check(&e, &[&rows], &asked, &got, &told);
        e.commit();
    }
}
