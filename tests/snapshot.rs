//! Sequences as bytes: what comes back attends bit for bit as what was exported, and nothing else comes back.

mod common;

use alignedkv::Error;
use alignedkv::backend::Mode;
use alignedkv::backend::cpu::Isa;
use alignedkv::cache::{Allocator, Batch, Bounds, Cache, Config, Excerpt, NanPolicy, Rope, StepSequence};
use alignedkv::format::{Dtype, Format, Shape};
use common::{How, Output, Rng, Single, cpu, shape};
use std::ffi::c_void;
use std::sync::Arc;
use std::sync::atomic::{AtomicI64, Ordering::Relaxed};

fn export(cache: &Cache, id: u64, part: Excerpt) -> Result<Vec<u8>, Error> {
    let mut bytes = Vec::new();
    cache.export(id, &part, &mut |piece| {
        assert!(!piece.is_empty() && piece.len() <= 65536);
        bytes.extend_from_slice(piece);
        0
    })?;
    Ok(bytes)
}

fn import(cache: &Cache, into: Option<u64>, mut bytes: &[u8]) -> Result<u64, Error> {
    cache.import(into, &mut |piece| {
        assert!(!piece.is_empty() && piece.len() <= 65536);
        let Some((now, later)) = bytes.split_at_checked(piece.len()) else { return 7 };
        piece.copy_from_slice(now);
        bytes = later;
        0
    })
}

const HOWS: [How; 3] = [
    How { mode: Mode::Expected, tolerance: 1e-3, scale: 0.3, dense: false },
    How { mode: Mode::Guaranteed, tolerance: 0.1, scale: 0.3, dense: false },
    How { mode: Mode::Exact, tolerance: 0.0, scale: 0.3, dense: true },
];

/// Sequences of some histories: appended in steps, cut into closed tiles, into open ones, into the exact head, and gone on.
fn histories(rng: &mut Rng, s: &Single) -> Vec<u64> {
    let row = |rng: &mut Rng, n: usize| {
        let mut k = rng.normals(n * s.shape.n_kv_heads * s.shape.dim_k);
        let mut v = rng.normals(n * s.shape.n_kv_heads * s.shape.dim_v);
        let grow = 1.0 + rng.below(5) as f32;
        k.iter_mut().chain(&mut v).for_each(|x| *x *= grow);
        (k, v)
    };
    let cases: [&[isize]; 8] = [
        &[1],
        &[3, 1],
        &[127, 1, 1],
        &[400, -250, 20],
        &[300, -100, 30, -40, 1],
        &[700, -697, 2],
        &[256],
        &[500, -130],
    ];
    cases
        .iter()
        .map(|steps| {
            let id = s.cache.create().unwrap();
            for &n in *steps {
                if n < 0 {
                    s.cache.truncate(id, (s.cache.length(id, None).unwrap() as isize + n) as usize).unwrap();
                } else {
                    let (k, v) = row(rng, n as usize);
                    s.append_to(id, &k, &v);
                }
            }
            id
        })
        .collect()
}

fn same_attention(rng: &mut Rng, a: (&Single, u64), b: (&Single, u64)) {
    let len = a.0.cache.length(a.1, None).unwrap();
    assert_eq!(len, b.0.cache.length(b.1, None).unwrap());
    let q = rng.normals(2 * a.0.shape.n_q_heads * a.0.shape.dim_k);
    for how in HOWS {
        let run = |(s, id): (&Single, u64)| {
            let isa = if how.mode == Mode::Expected { Isa::Scalar } else { Isa::best() };
            s.attend_sequence(id, &cpu(isa, 1), &q, &[(0, len), (len / 3, len)], how).unwrap()
        };
        assert!(same(&run(a), &run(b)), "{how:?}");
    }
}

/// Bit for bit, NaN included.
fn same(a: &Output, b: &Output) -> bool {
    let bits = |o: &Output| {
        let all = [&o.out, &o.lse, &o.bound, &o.lse_bound, &o.estimate, &o.amplitude];
        all.map(|x| x.iter().map(|x| x.to_bits()).collect::<Vec<_>>())
    };
    bits(a) == bits(b) && a.stats == b.stats
}

/// Rows of `n` tokens. V is the first channels of K where it has to be.
fn rows(rng: &mut Rng, shape: &Shape, n: usize) -> (Vec<f32>, Vec<f32>) {
    let k = rng.normals(n * shape.n_kv_heads * shape.dim_k);
    let v = match shape.v_is_prefix {
        true => k.chunks_exact(shape.dim_k).flat_map(|row| row[..shape.dim_v].to_vec()).collect(),
        false => rng.normals(n * shape.n_kv_heads * shape.dim_v),
    };
    (k, v)
}

/// V is a part of K.
fn latent(shape: Shape) -> Shape {
    Shape { v_is_prefix: true, ..shape }
}

#[test]
fn what_comes_back_is_what_went() {
    let mut rng = Rng::new(1);
    let shapes = [
        (Format::Aligned, shape(4, 2, 64, 64, Dtype::F16, 4)),
        (Format::Aligned, Shape { planes_k: 3, planes_v: 2, ..shape(3, 1, 40, 16, Dtype::F32, 4) }),
        (Format::Aligned, shape(1, 3, 128, 256, Dtype::Bf16, 4)),
        (Format::Published, shape(2, 2, 32, 48, Dtype::F16, 4)),
        (Format::Raw, shape(2, 2, 24, 16, Dtype::Bf16, 4)),
        (Format::Aligned, latent(shape(8, 1, 96, 64, Dtype::F16, 4))),
        (Format::Aligned, latent(shape(2, 2, 40, 16, Dtype::F32, 3))),
        (Format::Raw, latent(shape(4, 1, 72, 64, Dtype::Bf16, 4))),
    ];
    for (format, shape) in shapes {
        let a = Single::new(format, shape, 4);
        // Another exact head, another group.
        let b = Single::new(format, Shape { n_q_heads: shape.n_q_heads, ..shape }, 9);
        for id in histories(&mut rng, &a) {
            let bytes = export(&a.cache, id, Excerpt::default()).unwrap();
            let copy = import(&b.cache, None, &bytes).unwrap();
            assert!(export(&b.cache, copy, Excerpt::default()).unwrap() == bytes);
            same_attention(&mut rng, (&a, id), (&b, copy));
            // Page by page, the same.
            let direct = a.cache.copy(id, &b.cache).unwrap();
            assert!(export(&b.cache, direct, Excerpt::default()).unwrap() == bytes);
            same_attention(&mut rng, (&a, id), (&b, direct));
            b.cache.destroy(copy).unwrap();
            let copy = direct;
            // They go on alike: within the exact tail and beyond, through the next tiles.
            for n in [1, 60, 200] {
                let len = a.cache.length(id, None).unwrap();
                for cut in [len - len.min(3), len.min(50) / 2] {
                    let forks =
                        [(&a, a.cache.fork(id, Some(cut)).unwrap()), (&b, b.cache.fork(copy, Some(cut)).unwrap())];
                    let k = rng.normals(2 * shape.n_kv_heads * shape.dim_k);
                    let v = rng.normals(2 * shape.n_kv_heads * shape.dim_v);
                    forks.iter().for_each(|(s, id)| s.append_to(*id, &k, &v));
                    same_attention(&mut rng, forks[0], forks[1]);
                    forks.iter().for_each(|(s, id)| s.cache.destroy(*id).unwrap());
                }
                let (k, v) =
                    (rng.normals(n * shape.n_kv_heads * shape.dim_k), rng.normals(n * shape.n_kv_heads * shape.dim_v));
                a.append_to(id, &k, &v);
                b.append_to(copy, &k, &v);
                same_attention(&mut rng, (&a, id), (&b, copy));
            }
        }
    }
}

// ---- what is wrong ----

#[derive(Default)]
struct Counts {
    now: AtomicI64,
    most: AtomicI64,
    /// Allocations until one fails; 0 = none does.
    left: AtomicI64,
}

unsafe extern "C" fn alloc(user: *mut c_void, bytes: usize, align: usize, _: i32, _: *mut c_void) -> *mut c_void {
    // SAFETY: `user` is the leaked Counts of the test; the size is not 0.
    unsafe {
        let counts = &*user.cast::<Counts>();
        if counts.left.load(Relaxed) > 0 && counts.left.fetch_sub(1, Relaxed) == 1 {
            return std::ptr::null_mut();
        }
        let now = counts.now.fetch_add(bytes as i64, Relaxed) + bytes as i64;
        counts.most.fetch_max(now, Relaxed);
        std::alloc::alloc(std::alloc::Layout::from_size_align(bytes, align).unwrap()).cast()
    }
}

unsafe extern "C" fn dealloc(user: *mut c_void, p: *mut c_void, bytes: usize, _: i32, _: *mut c_void) {
    // SAFETY: as above, and `p` came from `alloc`.
    unsafe {
        (*user.cast::<Counts>()).now.fetch_sub(bytes as i64, Relaxed);
        std::alloc::dealloc(p.cast(), std::alloc::Layout::from_size_align(bytes, 64).unwrap());
    }
}

/// A cache of two layers, with a sequence of 140 tokens (and positions in three runs).
fn small(change: impl Fn(&mut Config)) -> (Arc<Cache>, u64, &'static Counts) {
    let counts: &'static Counts = Box::leak(Box::default());
    let s = Shape { dtype_v: Dtype::F32, ..shape(1, 1, 16, 16, Dtype::F16, 4) };
    let mut config = Single::new(Format::Aligned, s, 4).cache.config().clone();
    config.layers = vec![s, Shape { planes_v: 2, ..s }];
    config.exact_tail = 8;
    change(&mut config);
    // SAFETY: the functions above keep the contract.
    let allocator = unsafe { Allocator::hooks(alloc, dealloc, std::ptr::from_ref(counts).cast_mut().cast()) };
    let cache = Arc::new(Cache::new(config, allocator).unwrap());
    let (id, batch) = (cache.create().unwrap(), Batch::new(cache.clone(), Bounds::default()));
    let positions: Vec<i64> = (0..140).map(|i| i + i / 50 * 3).collect();
    batch.begin(&[StepSequence { sequence: id, n_new: 140, n_q: 0 }], Some(&positions)).unwrap();
    let mut rng = Rng::new(9);
    for (layer, layout) in cache.layouts().iter().enumerate() {
        let s = &layout.shape;
        let k = common::Packed::new(&rng.normals(140 * s.n_kv_heads * s.dim_k), s.n_kv_heads, s.dim_k, s.dtype_k);
        let v = common::Packed::new(&rng.normals(140 * s.n_kv_heads * s.dim_v), s.n_kv_heads, s.dim_v, s.dtype_v);
        batch.append(layer, k.rows(), v.rows()).unwrap();
    }
    batch.commit().unwrap();
    (cache, id, counts)
}

/// Bytes of the header, of the runs with their sum, and of a layer's words.
const HEADER: usize = 64;
const RUNS: usize = 3 * 16 + 4;

/// Bytes of which some were changed, with the sum of `range` as if they had always been so.
fn forged(bytes: &[u8], range: std::ops::Range<usize>, change: impl Fn(&mut [u8])) -> Vec<u8> {
    let mut bytes = bytes.to_vec();
    change(&mut bytes[range.clone()]);
    let sum = crc32fast::hash(&bytes[range.clone()]);
    bytes[range.end..range.end + 4].copy_from_slice(&sum.to_le_bytes());
    bytes
}

#[test]
fn damage_is_found_and_leaves_no_trace() {
    let (cache, id, counts) = small(|_| ());
    let bytes = export(&cache, id, Excerpt::default()).unwrap();
    let before = cache.usage();
    let refused = |bytes: &[u8], what: &str| {
        let error = import(&cache, None, bytes).unwrap_err();
        let usage = cache.usage();
        assert_eq!((usage.n_sequences, usage.bytes_used), (before.n_sequences, before.bytes_used), "{what}: {error}");
        assert!(matches!(error, Error::Corrupt(_) | Error::Version(_)), "{what}: {error}");
    };
    for n in (0..200).chain((200..bytes.len()).step_by(97)).chain([bytes.len() - 1]) {
        refused(&bytes[..n], "cut short");
    }
    let mut rng = Rng::new(3);
    for at in (0..300).chain((300..bytes.len()).step_by(53)) {
        let mut bad = bytes.clone();
        bad[at] ^= 1 << rng.below(8);
        refused(&bad, &format!("byte {at}"));
    }
    // A sequence takes its memory as bytes come: the whole of it never more than once, and room for a growing table.
    assert!((counts.most.load(Relaxed) as u64) < 3 * before.bytes_reserved);

    // Sums that are right are no proof.
    let word = |at: usize, x: u64| {
        let n = if matches!(at, 32 | 40) { 8 } else { 4 };
        move |b: &mut [u8]| b[at..at + n].copy_from_slice(&x.to_le_bytes()[..n])
    };
    let header = |at: usize, x: u64| forged(&bytes, 0..HEADER - 4, word(at, x));
    let lies = [
        (12, 9, "format"),
        (20, 2, "first layer"),
        (24, 0, "no layers"),
        (24, u64::from(u32::MAX), "layers"),
        (28, 129, "exact head"),
        (32, 0, "tokens"),
        (32, 1 << 40, "tokens"),
        (32, u64::MAX, "tokens"),
        (40, 0, "runs"),
        (40, 1 << 39, "runs"),
        (40, u64::MAX, "runs"),
        (48, 2, "flags"),
        (48, 1, "runs in a stream of further digits"),
        (56, 1, "zeros"),
    ];
    counts.most.store(counts.now.load(Relaxed), Relaxed);
    for (at, x, what) in lies {
        refused(&header(at, x), what);
    }
    // Both are large, and fit each other.
    let huge = forged(&bytes, 0..HEADER - 4, |b| {
        b[32..40].copy_from_slice(&(1u64 << 60).to_le_bytes());
        b[40..48].copy_from_slice(&(1u64 << 59).to_le_bytes());
    });
    refused(&huge, "huge");
    assert!((counts.most.load(Relaxed) - counts.now.load(Relaxed)) < 3 * before.bytes_reserved as i64);
    let runs = HEADER..HEADER + RUNS - 4;
    for (run, field, x, what) in
        [(1, 0, 0u64, "order"), (2, 0, 140, "beyond"), (2, 8, 3, "descends"), (2, 8, i64::MAX as u64, "overflows")]
    {
        let at = 16 * run + field;
        refused(&forged(&bytes, runs.clone(), |b| b[at..at + 8].copy_from_slice(&x.to_le_bytes())), what);
    }
    // The exact head: NaN, where it was a number.
    let head = HEADER + RUNS + 52;
    let head = head..head + 4 * 16 * (2 + 4);
    refused(&forged(&bytes, head.clone(), |b| b[..2].fill(0xff)), "NaN in K");
    refused(&forged(&bytes, head.clone(), |b| b[4 * 32..4 * 32 + 4].copy_from_slice(&1e30f32.to_le_bytes())), "range");
    // The first tile, which is stored: its slack, at the end.
    let page = 32 + 128 * 4 * 8 * 2 + 16 + 128 + 16 + 9;
    let tile = head.end + 4..head.end + 4 + page;
    let slack = |x: f32| forged(&bytes, tile.clone(), |b| b[page - 5..page - 1].copy_from_slice(&x.to_le_bytes()));
    cache.destroy(import(&cache, None, &slack(1.5)).unwrap()).unwrap();
    for x in [f32::NAN, -1.0, f32::INFINITY] {
        refused(&slack(x), "slack");
    }
    for (at, x) in [(0, 1u8), (0, 2), (4, 1), (8, 1), (8, 5), (9, 0), (10, 1), (12, 1), (16, 0xfe)] {
        refused(&forged(&bytes, tile.clone(), |b| b[at] = x), "kind");
    }
    // Marks of a token that has been removed: 58, which is at position 61.
    let (marked, id, _) = small(|c| c.nan = NanPolicy::Propagate);
    marked.remove(id, 61, 62).unwrap();
    let marked_bytes = export(&marked, id, Excerpt::default()).unwrap();
    let mark = |at: usize| forged(&marked_bytes, tile.start..tile.end + 32, |b| b[32 + at / 8] |= 1 << (at % 8));
    marked.destroy(import(&marked, None, &mark(57)).unwrap()).unwrap();
    assert!(matches!(import(&marked, None, &mark(58)), Err(Error::Corrupt(text)) if text.contains("marks")));
    // The digit sums of a tile.
    refused(&forged(&bytes, tile.clone(), |b| b[page - 9..page - 7].fill(0xff)), "digit sum");
}

#[test]
fn what_differs_is_named() {
    let (cache, id, _) = small(|_| ());
    let bytes = export(&cache, id, Excerpt::default()).unwrap();
    let named = |change: &dyn Fn(&mut Config), words: &str| {
        let (other, ..) = small(change);
        match import(&other, None, &bytes) {
            Err(Error::Argument(text)) if text.contains(words) => assert_eq!(other.usage().n_sequences, 1),
            other => panic!("{other:?} instead of {words:?}"),
        }
        let words = words.replace("the stream", "from_cache").replace("the cache", "to_cache");
        assert!(matches!(cache.copy(id, &other), Err(Error::Argument(text)) if text.contains(&words)));
    };
    named(&|c| c.format = Format::Raw, "format is Aligned in the stream: expected the cache's, Raw");
    named(&|c| c.layers.truncate(1), "n_layers is 2 in the stream: expected the cache's, 1");
    named(&|c| c.layers[1].n_kv_heads = 1 << 1, "layer 1: n_kv_heads is 1 in the stream: expected the cache's, 2");
    named(&|c| c.layers[0].dim_k = 24, "layer 0: dim_k is 16");
    named(&|c| c.layers[1].dim_v = 24, "layer 1: dim_v is 16");
    named(&|c| c.layers[1].dtype_k = Dtype::F32, "layer 1: dtype_k is");
    named(&|c| c.layers[1].planes_v = 4, "layer 1: planes_v is 2");
    let later = |b: &mut [u8]| b[8] = 2;
    match import(&cache, None, &forged(&bytes, 0..HEADER - 4, later)) {
        Err(Error::Version(text)) => assert!(text.contains("version 2"), "{text}"),
        other => panic!("{other:?}"),
    }
    // Callbacks that end it.
    for stop in 0..2 {
        let mut n = 0;
        let result = cache.export(id, &Excerpt::default(), &mut |_| {
            n += 1;
            if n > stop { 42 } else { 0 }
        });
        assert!(
            stop == 1 || matches!(&result, Err(Error::Argument(text)) if text.contains("write returned 42 after 0"))
        );
    }
    let error = import(&cache, None, &bytes[..100]).unwrap_err().to_string();
    assert!(error.contains("read returned 7"), "{error}");
    // Parts.
    for part in [
        Excerpt { first_layer: 2, ..Excerpt::default() },
        Excerpt { first_layer: 1, n_layers: Some(2), ..Excerpt::default() },
    ] {
        assert!(matches!(export(&cache, id, part), Err(Error::Argument(_))));
    }
    let half =
        |layer| export(&cache, id, Excerpt { first_layer: layer, n_layers: Some(1), ..Excerpt::default() }).unwrap();
    let copy = import(&cache, None, &half(1)).unwrap();
    assert_eq!([0, 1].map(|layer| cache.length(copy, Some(layer)).unwrap()), [0, 140]);
    assert!(
        matches!(export(&cache, copy, Excerpt::default()), Err(Error::Argument(text)) if text.contains("layer 0: has 0 of the 140"))
    );
    let batch = Batch::new(cache.clone(), Bounds::default());
    let step = [StepSequence { sequence: copy, n_new: 1, n_q: 1 }];
    assert!(matches!(batch.begin(&step, None), Err(Error::Argument(text)) if text.contains("1 of its 2 layers")));
    let shorter = cache.fork(id, Some(139)).unwrap();
    let other = export(&cache, shorter, Excerpt { n_layers: Some(1), ..Excerpt::default() }).unwrap();
    assert!(
        matches!(import(&cache, Some(copy), &other), Err(Error::Argument(text)) if text.contains("the stream 139"))
    );
    let runs = HEADER..HEADER + RUNS - 4;
    let moved = forged(&half(0), runs, |b| b[8] = 1 << 7);
    assert!(import(&cache, Some(copy), &moved).is_err(), "other positions");
    let before = cache.usage();
    assert!(import(&cache, Some(copy), &half(0)[..1000]).is_err());
    assert_eq!(before.bytes_used, cache.usage().bytes_used);
    import(&cache, Some(copy), &half(0)).unwrap();
    assert!(export(&cache, copy, Excerpt::default()).unwrap() == bytes);
    batch.begin(&step, None).unwrap();
    assert!(matches!(import(&cache, Some(copy), &half(0)), Err(Error::Busy(_))));
}

/// Layers leave while the next are still computed.
#[test]
fn layers_of_a_step_that_has_begun() {
    let (cache, id, _) = small(|_| ());
    let (target, ..) = small(|_| ());
    let batch = Batch::new(cache.clone(), Bounds::default());
    batch.begin(&[StepSequence { sequence: id, n_new: 200, n_q: 0 }], None).unwrap();
    let mut rng = Rng::new(4);
    let mut copy = None;
    for (layer, layout) in cache.layouts().iter().enumerate() {
        let s = &layout.shape;
        let part = Excerpt { first_layer: layer, n_layers: Some(1), ..Excerpt::default() };
        let k = common::Packed::new(&rng.normals(200 * s.dim_k), 1, s.dim_k, s.dtype_k);
        let v = common::Packed::new(&rng.normals(200 * s.dim_v), 1, s.dim_v, s.dtype_v);
        batch.append(layer, k.rows(), v.rows()).unwrap();
        if layer == 0 {
            assert!(
                matches!(export(&cache, id, Excerpt::default()), Err(Error::Argument(text)) if text.contains("layer 1: has 140 of the 340"))
            );
        }
        copy = Some(import(&target, copy, &export(&cache, id, part).unwrap()).unwrap());
    }
    batch.commit().unwrap();
    let whole = export(&cache, id, Excerpt::default()).unwrap();
    assert!(export(&target, copy.unwrap(), Excerpt::default()).unwrap() == whole);
}

/// Attention over the last token within its certificate of the truth, in every mode.
fn certified(rng: &mut Rng, s: &Single, id: u64, k: &[f32], v: &[f32]) {
    let (shape, len) = (s.shape, s.cache.length(id, None).unwrap());
    let (heads, g) = (shape.n_q_heads, shape.group());
    let q = rng.normals(heads * shape.dim_k);
    for how in HOWS {
        let got = s.attend_sequence(id, &cpu(Isa::best(), 1), &q, &[(0, len)], how).unwrap();
        for h in 0..heads {
            let of = |x: &[f32], dim: usize| common::of_head(x, shape.n_kv_heads, dim, h / g);
            let q = &q[h * shape.dim_k..(h + 1) * shape.dim_k];
            let scale = f64::from(how.scale);
            let (want, lse) = common::attention64(q, &of(k, shape.dim_k), &of(v, shape.dim_v), shape.dim_v, scale);
            assert!((f64::from(got.lse[h]) - lse).abs() <= f64::from(got.lse_bound[h]), "lse, {how:?}");
            for (c, want) in want.iter().enumerate() {
                let error = (f64::from(got.out[h * shape.dim_v + c]) - want).abs();
                assert!(error <= f64::from(got.bound[h]), "{error} beyond {}, {how:?}", got.bound[h]);
            }
        }
    }
}

#[test]
fn the_first_digits_alone_and_the_others_later() {
    let mut rng = Rng::new(5);
    for (shape, first) in [
        (shape(2, 2, 64, 64, Dtype::F32, 4), (2, 2)),
        (shape(3, 1, 40, 24, Dtype::F32, 4), (3, 2)),
        (shape(1, 1, 128, 128, Dtype::F32, 3), (2, 3)),
        (latent(shape(4, 1, 96, 64, Dtype::F32, 4)), (2, 2)),
    ] {
        let row = |n: usize, dim: usize| n * shape.n_kv_heads * dim;
        let (mut k, mut v) = rows(&mut rng, &shape, 600);
        let (a, b) = (Single::new(Format::Aligned, shape, 4), Single::new(Format::Aligned, shape, 4));
        let id = a.cache.create().unwrap();
        a.append_to(id, &k, &v);
        let whole = export(&a.cache, id, Excerpt::default()).unwrap();
        let coarse = Excerpt { planes: Some(first), ..Excerpt::default() };
        let bytes = export(&a.cache, id, coarse).unwrap();
        assert!(bytes.len() < whole.len() * 4 / 5 || shape.planes_k < 4);
        let copy = import(&b.cache, None, &bytes).unwrap();
        // What has only some digits goes on with these.
        assert!(export(&b.cache, copy, Excerpt::default()).unwrap() == bytes);
        certified(&mut rng, &b, copy, &k, &v);
        let further = export(&a.cache, id, Excerpt { known: Some(first), ..Excerpt::default() }).unwrap();
        // Damage, and the end: it attends as before.
        let before = b.attend_sequence(
            copy,
            &cpu(Isa::best(), 1),
            &rng.normals(shape.n_q_heads * shape.dim_k),
            &[(0, 600)],
            HOWS[0],
        );
        let mut bad = further.clone();
        let at = bad.len() - 200;
        bad[at] ^= 1;
        for bytes in [&bad[..], &further[..further.len() - 1], &further[..at]] {
            assert!(matches!(import(&b.cache, Some(copy), bytes), Err(Error::Corrupt(_))));
        }
        assert!(before.is_ok() && export(&b.cache, copy, Excerpt::default()).unwrap() == bytes);
        assert!(
            matches!(import(&b.cache, None, &further), Err(Error::Argument(text)) if text.contains("further digits"))
        );

        // Cut into a tile of some digits, and gone on with larger rows: the certificate holds.
        let cut = b.cache.fork(copy, Some(300)).unwrap();
        k.truncate(row(300, shape.dim_k));
        v.truncate(row(300, shape.dim_v));
        for n in [1, 40, 150] {
            let (more_k, more_v) = rows(&mut rng, &shape, n);
            let grow = |x: Vec<f32>| x.into_iter().map(|x| 3.0 * x).collect::<Vec<_>>();
            let (more_k, more_v) = (grow(more_k), grow(more_v));
            b.append_to(cut, &more_k, &more_v);
            k.extend(more_k);
            v.extend(more_v);
            certified(&mut rng, &b, cut, &k, &v);
        }
        // A fork is not touched by what comes; the rest comes into a sequence that has gone on.
        let fork = b.cache.fork(copy, None).unwrap();
        let (more_k, more_v) = rows(&mut rng, &shape, 200);
        for (s, id) in [(&a, id), (&b, copy)] {
            s.append_to(id, &more_k, &more_v);
        }
        let other = Excerpt { known: Some((2, 2)), ..Excerpt::default() };
        if first != (2, 2) {
            // Of other first digits: none of them fits.
            import(&b.cache, Some(copy), &export(&a.cache, id, other).unwrap()).unwrap();
            assert!(
                export(&b.cache, copy, Excerpt::default()).unwrap()
                    != export(&a.cache, id, Excerpt::default()).unwrap()
            );
        }
        let stranger = a.cache.create().unwrap();
        a.append_to(stranger, &more_k, &more_v);
        let strange = export(&a.cache, stranger, Excerpt { known: Some(first), ..Excerpt::default() }).unwrap();
        if strange.len() > 500 {
            assert!(
                matches!(import(&b.cache, Some(copy), &strange), Err(Error::Argument(text)) if text.contains("tile 0"))
            );
        }
        import(&b.cache, Some(copy), &further).unwrap();
        assert!(export(&b.cache, fork, Excerpt::default()).unwrap() == bytes);
        let grown = export(&a.cache, id, Excerpt::default()).unwrap();
        assert!(export(&b.cache, copy, Excerpt::default()).unwrap() == grown, "as if all had come at once");
        same_attention(&mut rng, (&a, id), (&b, copy));
    }
}

/// Rows `[row][head][dim]` of those that live.
fn of_live(x: &[f32], row: usize, live: &[bool]) -> Vec<f32> {
    x.chunks_exact(row).zip(live).filter(|(_, live)| **live).flat_map(|(x, _)| x.iter().copied()).collect()
}

#[test]
fn removed_tokens_are_as_if_never_there() {
    let mut rng = Rng::new(6);
    for (format, shape) in [
        (Format::Aligned, shape(2, 2, 64, 64, Dtype::F32, 4)),
        (Format::Aligned, shape(5, 1, 24, 40, Dtype::F32, 3)),
        (Format::Raw, shape(2, 1, 32, 16, Dtype::F32, 4)),
    ] {
        let s = Single::new(format, shape, 4);
        let (row_k, row_v) = (shape.n_kv_heads * shape.dim_k, shape.n_kv_heads * shape.dim_v);
        let (mut k, mut v) = (rng.normals(700 * row_k), rng.normals(700 * row_v));
        // The removed ones shout: a trace of them would be seen.
        let removals = [(0, 2), (3, 5), (60, 90), (89, 300), (400, 401), (600, 699), (500, 512)];
        for &(from, to) in &removals {
            k[from * row_k..to * row_k].iter_mut().for_each(|x| *x *= 20.0);
            v[from * row_v..to * row_v].iter_mut().for_each(|x| *x *= 20.0);
        }
        s.append_to(s.sequence, &k, &v);
        let pages = s.cache.usage().pages_used;
        let mut live = vec![true; 700];
        for (i, &(from, to)) in removals.iter().enumerate() {
            s.cache.remove(s.sequence, from as i64, to as i64).unwrap();
            live[from..to].fill(false);
            assert_eq!(s.cache.usage().tokens as usize, live.iter().filter(|x| **x).count());
            certified(&mut rng, &s, s.sequence, &of_live(&k, row_k, &live), &of_live(&v, row_v, &live));
            if i % 2 == 0 {
                let (more_k, more_v) = (rng.normals(9 * row_k), rng.normals(9 * row_v));
                s.append_to(s.sequence, &more_k, &more_v);
                k.extend(more_k);
                v.extend(more_v);
                live.resize(live.len() + 9, true);
            }
        }
        assert_eq!(s.cache.usage().pages_used, pages - 1, "tile 1 is gone");
        // Bytes, and what comes of them.
        let bytes = export(&s.cache, s.sequence, Excerpt::default()).unwrap();
        let copy = import(&s.cache, None, &bytes).unwrap();
        assert!(export(&s.cache, copy, Excerpt::default()).unwrap() == bytes);
        same_attention(&mut rng, (&s, s.sequence), (&s, copy));
        // The end goes as a truncation, with what had been removed before it.
        let len = live.len();
        s.cache.remove(copy, 699, i64::MAX).unwrap();
        assert_eq!(s.cache.length(copy, None).unwrap(), 600, "600 to 698 had been removed");
        let fork = s.cache.fork(s.sequence, Some(250)).unwrap();
        assert_eq!(s.cache.length(fork, None).unwrap(), 60);
        for (id, n) in [(copy, 600), (fork, 60), (s.sequence, len)] {
            certified(&mut rng, &s, id, &of_live(&k, row_k, &live[..n]), &of_live(&v, row_v, &live[..n]));
        }
        s.cache.remove(copy, i64::MIN, i64::MAX).unwrap();
        assert_eq!(s.cache.length(copy, None).unwrap(), 0);
    }
}

/// K rows of tokens `some`, turned in float64.
fn turned(k: &mut [f32], shape: &Shape, some: std::ops::Range<usize>, rope: &Rope, delta: i64) {
    let (d, n) = (shape.dim_k, rope.inv_freq.len());
    for x in
        k.chunks_exact_mut(shape.n_kv_heads * d).take(some.end).skip(some.start).flat_map(|r| r.chunks_exact_mut(d))
    {
        for (i, &frequency) in rope.inv_freq.iter().enumerate() {
            let [a, b] = if rope.interleaved { [2 * i, 2 * i + 1] } else { [i, i + n] }.map(|c| rope.first_dim + c);
            let (sin, cos) = (delta as f64 * f64::from(frequency)).sin_cos();
            let (p, q) = (f64::from(x[a]), f64::from(x[b]));
            (x[a], x[b]) = ((p * cos - q * sin) as f32, (p * sin + q * cos) as f32);
        }
    }
}

#[test]
fn shifted_tokens_turn() {
    let mut rng = Rng::new(8);
    let frequencies = |n: usize| (0..n).map(|i| 1e4f32.powf(-(i as f32) / n as f32)).collect::<Vec<_>>();
    for (format, shape, interleaved, first_dim, n) in [
        (Format::Aligned, shape(2, 2, 64, 32, Dtype::F32, 4), true, 0, 32),
        (Format::Aligned, shape(3, 1, 40, 16, Dtype::F32, 3), false, 8, 10),
        (Format::Aligned, Shape { planes_k: 2, ..shape(1, 1, 128, 64, Dtype::F32, 4) }, false, 0, 64),
        (Format::Raw, shape(2, 2, 24, 16, Dtype::F32, 4), true, 4, 6),
    ] {
        let inv_freq = frequencies(n);
        let rope = Rope { interleaved, first_dim, inv_freq: &inv_freq };
        let s = Single::new(format, shape, 4);
        let (row_k, row_v) = (shape.n_kv_heads * shape.dim_k, shape.n_kv_heads * shape.dim_v);
        let (mut k, mut v) = (rng.normals(700 * row_k), rng.normals(700 * row_v));
        s.append_to(s.sequence, &k, &v);
        // A tile that was cut: most of its rows are known as stored only.
        s.cache.truncate(s.sequence, 440).unwrap();
        k.truncate(440 * row_k);
        v.truncate(440 * row_v);
        let append = |rng: &mut Rng, k: &mut Vec<f32>, v: &mut Vec<f32>, n: usize| {
            let (more_k, more_v) = (rng.normals(n * row_k), rng.normals(n * row_v));
            s.append_to(s.sequence, &more_k, &more_v);
            k.extend(more_k);
            v.extend(more_v);
        };
        append(&mut rng, &mut k, &mut v, 20);
        let bytes = || export(&s.cache, s.sequence, Excerpt::default()).unwrap();
        let before = bytes();
        s.cache.shift(s.sequence, 0, 1000, 0, &[rope]).unwrap();
        s.cache.shift(s.sequence, 1000, 2000, 7, &[rope]).unwrap();
        assert!(bytes() == before);
        for (from, to, delta) in [(0, 100, 401), (100, 200, -2), (300, 460, i64::MAX)] {
            assert!(matches!(s.cache.shift(s.sequence, from, to, delta, &[rope]), Err(Error::Argument(_))), "{delta}");
            assert!(bytes() == before);
        }
        // What others hold stays theirs.
        let fork = s.cache.fork(s.sequence, None).unwrap();
        s.cache.shift(s.sequence, 300, 460, 50, &[rope]).unwrap();
        assert!(export(&s.cache, fork, Excerpt::default()).unwrap() == before);
        turned(&mut k, &shape, 300..460, &rope, 50);
        certified(&mut rng, &s, s.sequence, &k, &v);
        // Tiles 0 and 1 have no token that turned: bit for bit.
        let rows = |id: u64, tile: usize| {
            let reader = s.cache.read(id, 0).unwrap();
            reader.view().page(tile).to_vec()
        };
        assert!((0..2).all(|tile| rows(s.sequence, tile) == rows(fork, tile)));
        assert_eq!(s.cache.read(s.sequence, 0).unwrap().positions().at(300), 350);
        s.cache.destroy(fork).unwrap();

        // A context shift: some tokens go, those behind move up; the exact head's last one, too.
        let mut live = vec![true; 460];
        s.cache.remove(s.sequence, 10, 200).unwrap();
        live[10..200].fill(false);
        for (from, to, by) in [(200, 299, -190), (350, 509, -240)] {
            s.cache.shift(s.sequence, from, to + 1, by, &[rope]).unwrap();
        }
        turned(&mut k, &shape, 200..300, &rope, -190);
        turned(&mut k, &shape, 300..460, &rope, -240);
        let positions: Vec<i64> = {
            let reader = s.cache.read(s.sequence, 0).unwrap();
            (0..460).filter(|&i| live[i]).map(|i| reader.positions().at(i)).collect()
        };
        assert!(positions == (0..270).collect::<Vec<i64>>());
        let check = |rng: &mut Rng, k: &[f32], v: &[f32], live: &[bool]| {
            certified(rng, &s, s.sequence, &of_live(k, row_k, live), &of_live(v, row_v, live));
        };
        check(&mut rng, &k, &v, &live);
        let copy = import(&s.cache, None, &bytes()).unwrap();
        assert!(export(&s.cache, copy, Excerpt::default()).unwrap() == bytes());
        for (from, delta) in [(3, 5), (8, 100), (2, 1)] {
            let from_index =
                (0..live.len()).find(|&i| live[i] && s.cache.read(s.sequence, 0).unwrap().positions().at(i) >= from);
            s.cache.shift(s.sequence, from, i64::MAX, delta, &[rope]).unwrap();
            turned(&mut k, &shape, from_index.unwrap()..live.len(), &rope, delta);
            append(&mut rng, &mut k, &mut v, 30);
            live.resize(k.len() / row_k, true);
            check(&mut rng, &k, &v, &live);
        }
        assert_eq!(s.cache.read(s.sequence, 0).unwrap().positions().at(live.len() - 1), 269 + 106 + 90);
    }
}

/// Which tokens were no numbers goes along with everything that is done to them.
#[test]
fn marks_go_along() {
    let mut rng = Rng::new(11);
    for (format, shape) in [
        (Format::Aligned, shape(2, 2, 64, 32, Dtype::F32, 4)),
        (Format::Aligned, latent(shape(3, 2, 40, 16, Dtype::F16, 4))),
        (Format::Raw, shape(2, 2, 24, 16, Dtype::Bf16, 4)),
    ] {
        let make = |nan| Single::with_nan(format, shape, 4, nan);
        let (a, b) = (make(NanPolicy::Propagate), make(NanPolicy::Propagate));
        let (mut k, mut v) = rows(&mut rng, &shape, 420);
        // Token, head and side: the exact head, stored tiles, one that is kept as given, the open one.
        let bad = [(1, 0, 0), (3, 1, 1), (50, 0, 0), (200, 1, 1), (201, 1, 0), (300, 0, 1), (383, 1, 0), (400, 0, 0)];
        let bad: Vec<(usize, usize)> = bad
            .into_iter()
            .map(|(token, head, side)| {
                let row = token * shape.n_kv_heads + head;
                // V that is a part of K is no number where K is none.
                let v = if side == 1 && !shape.v_is_prefix { Some(&mut v[row * shape.dim_v]) } else { None };
                *v.unwrap_or(&mut k[row * shape.dim_k + 5]) = if token % 2 == 0 { f32::NAN } else { f32::INFINITY };
                (token, head)
            })
            .collect();
        a.append_to(a.sequence, &k, &v);
        // Rows before, between and behind them; NaN where they see one that lives, and only there.
        let check = |s: &Single, id: u64, live: &dyn Fn(usize) -> bool, q: &[f32]| {
            let len = s.cache.length(id, None).unwrap();
            let ranges = [(0, len), (0, 1), (4, 50), (51, 200), (202, 300), (301, len), (len.saturating_sub(3), len)];
            let ranges = ranges.map(|(from, to)| (from.min(len - 1), to.clamp(from.min(len - 1) + 1, len)));
            HOWS.map(|how| {
                let isa = if how.mode == Mode::Expected { Isa::Scalar } else { Isa::best() };
                let got = s.attend_sequence(id, &cpu(isa, 1), q, &ranges, how).unwrap();
                for (row, (from, to)) in ranges.into_iter().enumerate() {
                    for h in 0..shape.n_q_heads {
                        let kv = h / shape.group();
                        let lost = bad.iter().any(|&(token, b)| b == kv && (from..to).contains(&token) && live(token));
                        let at = row * shape.n_q_heads + h;
                        let out = &got.out[at * shape.dim_v..(at + 1) * shape.dim_v];
                        assert!(out.iter().all(|x| x.is_nan() == lost), "row {row}, head {h}, {how:?}");
                    }
                }
                got
            })
        };
        let q = rng.normals(7 * shape.n_q_heads * shape.dim_k);
        let travels = |id: u64, live: &dyn Fn(usize) -> bool| {
            let bytes = export(&a.cache, id, Excerpt::default()).unwrap();
            let copy = import(&b.cache, None, &bytes).unwrap();
            assert!(export(&b.cache, copy, Excerpt::default()).unwrap() == bytes);
            let (ours, theirs) = (check(&a, id, live, &q), check(&b, copy, live, &q));
            assert!(ours.iter().zip(&theirs).all(|(a, b)| same(a, b)));
            let direct = a.cache.copy(id, &b.cache).unwrap();
            assert!(export(&b.cache, direct, Excerpt::default()).unwrap() == bytes);
            b.cache.destroy(direct).unwrap();
            copy
        };
        b.cache.destroy(travels(a.sequence, &|_| true)).unwrap();
        // Cut into the exact head, stored tiles, and those that are kept.
        for n in [2, 60, 250, 390] {
            let fork = a.cache.fork(a.sequence, Some(n)).unwrap();
            let copy = travels(fork, &|_| true);
            let (k, v) = rows(&mut rng, &shape, 150);
            a.append_to(fork, &k, &v);
            b.append_to(copy, &k, &v);
            let theirs = check(&b, copy, &|token| token < n, &q);
            assert!(check(&a, fork, &|token| token < n, &q).iter().zip(&theirs).all(|(a, b)| same(a, b)));
            a.cache.destroy(fork).unwrap();
        }
        if format == Format::Aligned {
            let first = Excerpt { planes: Some((2, 2)), ..Excerpt::default() };
            let copy = import(&b.cache, None, &export(&a.cache, a.sequence, first).unwrap()).unwrap();
            check(&b, copy, &|_| true, &q);
            let further = Excerpt { known: Some((2, 2)), ..Excerpt::default() };
            import(&b.cache, Some(copy), &export(&a.cache, a.sequence, further).unwrap()).unwrap();
            let whole = export(&a.cache, a.sequence, Excerpt::default()).unwrap();
            assert!(export(&b.cache, copy, Excerpt::default()).unwrap() == whole);
        }
        // Another policy knows nothing of marks, or must have some.
        let bytes = export(&a.cache, a.sequence, Excerpt::default()).unwrap();
        let plain = make(NanPolicy::Zero);
        let (clean_k, clean_v) = rows(&mut rng, &shape, 9);
        plain.append_to(plain.sequence, &clean_k, &clean_v);
        let clean = export(&plain.cache, plain.sequence, Excerpt::default()).unwrap();
        for result in [import(&plain.cache, None, &bytes), import(&a.cache, None, &clean)] {
            assert!(matches!(result, Err(Error::Argument(text)) if text.contains("nan_policy")));
        }
        import(&make(NanPolicy::Error).cache, None, &clean).unwrap();

        // Others turn, and go.
        let n = shape.dim_k - shape.dim_v;
        let inv_freq = vec![0.3; n / 2];
        let rope = Rope { interleaved: true, first_dim: shape.dim_v, inv_freq: &inv_freq };
        let s = a.cache.fork(a.sequence, None).unwrap();
        a.cache.shift(s, 40, i64::MAX, 30, &[rope]).unwrap();
        travels(s, &|_| true);
        let gone = |token: usize| token == 50 || (150..290).contains(&token) || token == 400;
        for (from, to) in [(80, 81), (180, 320), (430, 431)] {
            a.cache.remove(s, from, to).unwrap();
        }
        travels(s, &|token| !gone(token));
        a.cache.shift(s, 320, i64::MAX, -100, &[rope]).unwrap();
        travels(s, &|token| !gone(token));
    }
}

/// Without memory for copies nothing turns.
#[test]
fn a_shift_is_all_or_nothing() {
    let (cache, id, _) = small(|c| c.max_bytes = 260_000);
    let inv_freq = [1.0; 8];
    let ropes = [Rope { interleaved: true, first_dim: 0, inv_freq: &inv_freq }; 2];
    let mut forks = Vec::new();
    while let Ok(fork) = cache.fork(id, None) {
        forks.push(fork);
    }
    let before = export(&cache, id, Excerpt::default()).unwrap();
    let used = cache.usage();
    assert!(matches!(cache.shift(id, 0, 1000, 3, &ropes), Err(Error::Capacity(_))));
    assert!(export(&cache, id, Excerpt::default()).unwrap() == before);
    assert_eq!((used.bytes_used, used.pages_shared), (cache.usage().bytes_used, cache.usage().pages_shared));
    for fork in forks {
        cache.destroy(fork).unwrap();
    }
    cache.shift(id, 0, 1000, 3, &ropes).unwrap();
    assert!(export(&cache, id, Excerpt::default()).unwrap() != before);
}

/// Whichever allocation fails, all is as it was; and what failed can be done again.
#[test]
fn no_memory_on_the_way_leaves_no_trace() {
    let inv_freq = [0.7; 8];
    let ropes = [Rope { interleaved: false, first_dim: 0, inv_freq: &inv_freq }; 2];
    let remove = |cache: &Cache, id: u64| cache.remove(id, -1, 140);
    let shift = |cache: &Cache, id: u64| cache.shift(id, 1, 1000, 3, &ropes);
    let cut = |cache: &Cache, id: u64| cache.remove(id, 60, 1000);
    type Call<'a> = &'a dyn Fn(&Cache, u64) -> Result<(), Error>;
    let calls: [Call; 3] = [&remove, &shift, &cut];
    for (i, call) in calls.iter().enumerate() {
        // Some that others hold, and some that they do not.
        for forks in 0..2 {
            let (cache, id, counts) = small(|c| c.exact_tail = 0);
            let held: Vec<u64> = (0..forks).map(|_| cache.fork(id, None).unwrap()).collect();
            let before = export(&cache, id, Excerpt::default()).unwrap();
            let used = cache.usage();
            let mut failed = 0;
            loop {
                counts.left.store(failed + 1, Relaxed);
                let result = call(&cache, id);
                counts.left.store(0, Relaxed);
                let Err(error) = result else { break };
                failed += 1;
                assert!(matches!(error, Error::Memory(_)), "{error}");
                assert!(export(&cache, id, Excerpt::default()).unwrap() == before);
                let now = cache.usage();
                assert_eq!((now.pages_used, now.pages_shared), (used.pages_used, used.pages_shared));
                assert_eq!((now.bytes_kept, now.tokens), (used.bytes_kept, used.tokens));
                // A longer list of what has been removed may stay.
                assert!(now.bytes_used <= used.bytes_used + 256, "call {i}");
            }
            assert!(failed > 0 || i == 1 && forks == 0, "call {i}, {forks} forks");
            assert!(export(&cache, id, Excerpt::default()).unwrap() != before);
            for fork in held {
                assert!(export(&cache, fork, Excerpt::default()).unwrap() == before);
            }
        }
    }
}

/// The same of a copy into another cache.
#[test]
fn a_copy_is_all_or_nothing() {
    let (from, id, _) = small(|_| ());
    let (to, _, counts) = small(|_| ());
    let used = to.usage();
    from.remove(id, -1, 140).unwrap();
    for failed in 1.. {
        counts.left.store(failed, Relaxed);
        let result = from.copy(id, &to);
        counts.left.store(0, Relaxed);
        if let Ok(copy) = result {
            assert!(failed > 1);
            let bytes = [(&from, id), (&to, copy)].map(|(cache, id)| export(cache, id, Excerpt::default()).unwrap());
            assert!(bytes[0] == bytes[1]);
            break;
        }
        assert!(matches!(result, Err(Error::Memory(_))));
        let now = to.usage();
        assert_eq!((now.n_sequences, now.bytes_used), (used.n_sequences, used.bytes_used));
    }
}

/// Rows that are kept as given are turned as given, and rounded as their dtype can hold them.
#[test]
fn rows_of_two_bytes_turn() {
    let mut rng = Rng::new(13);
    let inv_freq: Vec<f32> = (0..32).map(|i| 1e4f32.powf(-(i as f32) / 32.0)).collect();
    for format in [Format::Aligned, Format::Raw] {
        for dtype in [Dtype::F16, Dtype::Bf16] {
            let shape = shape(2, 2, 64, 32, dtype, 4);
            let rope = Rope { interleaved: dtype == Dtype::F16, first_dim: 0, inv_freq: &inv_freq };
            let s = Single::new(format, shape, 4);
            let (mut k, mut v) = rows(&mut rng, &shape, 400);
            common::round(&mut k, dtype);
            common::round(&mut v, dtype);
            s.append(&k, &v);
            for (from, delta) in [(2, 11), (300, 1000)] {
                s.cache.shift(s.sequence, from, i64::MAX, delta, &[rope]).unwrap();
                let first = if from == 2 { 2 } else { 289 };
                turned(&mut k, &shape, first..400, &rope, delta);
                // The exact head, and tiles that the exact tail of 64 tokens reaches; with AKV_FORMAT_RAW all.
                let row = shape.n_kv_heads * shape.dim_k;
                for token in (first..400).filter(|&t| format == Format::Raw || !(4..256).contains(&t)) {
                    common::round(&mut k[token * row..(token + 1) * row], dtype);
                }
                certified(&mut rng, &s, s.sequence, &k, &v);
            }
        }
    }
}
