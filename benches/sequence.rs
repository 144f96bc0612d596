//! What moving sequences about costs: forks, truncations, bytes out and in, and what a shared prefix takes.

use alignedkv::cache::{Allocator, Batch, Bounds, Cache, Config, Excerpt, NanPolicy, Placement, StepSequence};
use alignedkv::format::{Dtype, Format, Rows, Shape};
use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use std::hint::black_box;
use std::sync::Arc;

const SHAPE: Shape = Shape {
    n_q_heads: 32,
    n_kv_heads: 8,
    dim_k: 128,
    dim_v: 128,
    dtype_k: Dtype::F16,
    dtype_v: Dtype::F16,
    planes_k: 4,
    planes_v: 4,
    window: 0,
    v_is_prefix: false,
};

/// A cache of one layer, and a sequence of `n` tokens.
fn cache(n: usize) -> (Arc<Cache>, u64) {
    let config = Config {
        placement: Placement::Append,
        format: Format::Aligned,
        layers: vec![SHAPE],
        shares: Vec::new(),
        max_sequences: 1000,
        exact_head: 4,
        exact_tail: 64,
        max_bytes: 0,
        nan: NanPolicy::Error,
    };
    let cache = Arc::new(Cache::new(config, Allocator::System).unwrap());
    let sequence = cache.create().unwrap();
    append(&cache, sequence, n);
    (cache, sequence)
}

/// Finite f16 bits of any kind.
fn append(cache: &Arc<Cache>, sequence: u64, n: usize) {
    let row = SHAPE.n_kv_heads * SHAPE.dim_k;
    let words: Vec<u64> =
        (0..n * row / 4).map(|i| (i as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15) & 0xbbff_bbff_bbff_bbff).collect();
    // SAFETY: plain memory.
    let bytes = unsafe { std::slice::from_raw_parts(words.as_ptr().cast(), 8 * words.len()) };
    let rows = Rows::contiguous(bytes, SHAPE.n_kv_heads, Dtype::F16, SHAPE.dim_k);
    let batch = Batch::new(cache.clone(), Bounds::default());
    batch.begin(&[StepSequence { sequence, n_new: n, n_q: 0 }], None).unwrap();
    batch.append(0, rows, rows).unwrap();
    batch.commit().unwrap();
}

fn benches(c: &mut Criterion) {
    let (all, sequence) = cache(32_768 + 50);
    c.bench_function("fork 32k tokens, and drop it", |b| {
        b.iter(|| all.destroy(all.fork(sequence, None).unwrap()).unwrap());
    });
    c.bench_function("fork, cut by 30 tokens and drop", |b| {
        b.iter(|| {
            let fork = all.fork(sequence, None).unwrap();
            all.truncate(fork, 32_768 + 20).unwrap();
            all.destroy(fork).unwrap();
        });
    });
    c.bench_function("fork at 16k, in a closed tile, and drop", |b| {
        b.iter(|| all.destroy(all.fork(sequence, Some(16_384 + 70)).unwrap()).unwrap());
    });

    let mut bytes = Vec::new();
    let export = |bytes: &mut Vec<u8>| {
        bytes.clear();
        let write = &mut |piece: &[u8]| {
            bytes.extend_from_slice(piece);
            0
        };
        all.export(sequence, &Excerpt::default(), write).unwrap();
    };
    export(&mut bytes);
    let mut group = c.benchmark_group("bytes of 32k tokens");
    group.throughput(Throughput::Bytes(bytes.len() as u64)).sample_size(10);
    let mut copy = bytes.clone();
    group.bench_function("memcpy", |b| b.iter(|| black_box(&mut copy).copy_from_slice(black_box(&bytes))));
    group.bench_function("export", |b| b.iter(|| export(&mut copy)));
    group.bench_function("import", |b| {
        b.iter(|| {
            let mut left = &bytes[..];
            let read = &mut |piece: &mut [u8]| {
                let (now, later) = left.split_at(piece.len());
                piece.copy_from_slice(now);
                left = later;
                0
            };
            let sequence = all.import(None, read).unwrap();
            all.destroy(sequence).unwrap();
        });
    });
    group.finish();

    // A prefix of 16k tokens, and 64 sequences that go on from it.
    let (shared, prefix) = cache(16_384);
    let one = shared.usage();
    for _ in 0..64 {
        append(&shared, shared.fork(prefix, None).unwrap(), 10);
    }
    let (many, tail) = (shared.usage(), (SHAPE.n_kv_heads * 10 * 2 * 256) as u64);
    println!(
        "64 sequences of a shared prefix of 16384 tokens: {} pages for {}; {:.2} times its bytes, {} KiB more each (10 rows as given: {} KiB)",
        many.pages_used,
        one.pages_used,
        many.bytes_used as f64 / one.bytes_used as f64,
        (many.bytes_used - one.bytes_used) / 64 / 1024,
        tail / 1024,
    );
}

criterion_group!(sequence, benches);
criterion_main!(sequence);
