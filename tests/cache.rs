//! The cache against a plain model: sequences of tokens whose rows are functions of a seed.

#![allow(clippy::needless_range_loop)]

use alignedkv::Error;
use alignedkv::cache::{
    Allocator, Batch, Block, Bounds, Cache, Config, Excerpt, NanPolicy, Placement, Reader, StepSequence, Usage,
};
use alignedkv::format::{Dtype, Format, LEFT, Layout, Rows, Shape, Source, TILE, aligned, range_bits, scale};
use half::{bf16, f16};
use std::ffi::c_void;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicI64, AtomicU64, Ordering::Relaxed};

// ---- rows ----

fn mix(x: u64) -> u64 {
    let x = (x ^ (x >> 32)).wrapping_mul(0xd6e8_feb8_6659_fd93);
    let x = (x ^ (x >> 32)).wrapping_mul(0xd6e8_feb8_6659_fd93);
    x ^ (x >> 32)
}

struct Random(u64);

impl Random {
    fn below(&mut self, n: usize) -> usize {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        (mix(self.0) % n as u64) as usize
    }
    fn one_in(&mut self, n: usize) -> bool {
        self.below(n) == 0
    }
}

#[derive(Clone, Copy, Debug, PartialEq)]
struct Token {
    seed: u64,
    position: i64,
    /// Not removed.
    live: bool,
}

#[derive(Clone, Copy)]
enum Part {
    K,
    V,
}

fn dtype_dim(shape: &Shape, part: Part) -> (Dtype, usize) {
    match part {
        Part::K => (shape.dtype_k, shape.dim_k),
        Part::V => (shape.dtype_v, shape.dim_v),
    }
}

/// One element of a token's row. Magnitudes differ between tokens, so that scales grow.
fn element(seed: u64, layer: usize, part: Part, head: usize, channel: usize, dtype: Dtype) -> f32 {
    let h = mix(seed ^ (layer as u64) << 40 ^ (part as u64) << 48 ^ (head as u64) << 52 ^ (channel as u64) << 56);
    let x = ((h >> 40) as f32 / (1u64 << 23) as f32 - 1.0) * (1 << (mix(seed) % 6)) as f32;
    match dtype {
        Dtype::F32 => x,
        Dtype::F16 => f16::from_f32(x).to_f32(),
        Dtype::Bf16 => bf16::from_f32(x).to_f32(),
    }
}

/// Bytes `[token][head][dim]`, in memory that is aligned for any dtype.
fn rows_of(tokens: &[Token], layer: usize, shape: &Shape, part: Part) -> Vec<u64> {
    let (dtype, dim) = dtype_dim(shape, part);
    let mut words = vec![0u64; (tokens.len() * shape.n_kv_heads * dim * dtype.size()).div_ceil(8)];
    let elements = tokens.iter().flat_map(|t| {
        (0..shape.n_kv_heads).flat_map(move |h| (0..dim).map(move |c| element(t.seed, layer, part, h, c, dtype)))
    });
    let bytes = bytes_mut(&mut words);
    for (to, x) in bytes.chunks_exact_mut(dtype.size()).zip(elements) {
        match dtype {
            Dtype::F32 => to.copy_from_slice(&x.to_ne_bytes()),
            Dtype::F16 => to.copy_from_slice(&f16::from_f32(x).to_bits().to_ne_bytes()),
            Dtype::Bf16 => to.copy_from_slice(&bf16::from_f32(x).to_bits().to_ne_bytes()),
        }
    }
    words
}

fn bytes(words: &[u64]) -> &[u8] {
    // SAFETY: plain memory.
    unsafe { std::slice::from_raw_parts(words.as_ptr().cast(), words.len() * 8) }
}

fn bytes_mut(words: &mut [u64]) -> &mut [u8] {
    // SAFETY: plain memory.
    unsafe { std::slice::from_raw_parts_mut(words.as_mut_ptr().cast(), words.len() * 8) }
}

fn rows<'a>(words: &'a [u64], shape: &Shape, part: Part) -> Rows<'a> {
    let (dtype, dim) = dtype_dim(shape, part);
    Rows::contiguous(bytes(words), shape.n_kv_heads, dtype, dim)
}

fn append(batch: &Batch, layer: usize, tokens: &[Token]) -> Result<(), Error> {
    let shape = batch.cache().layouts()[layer].shape;
    let (k, v) = (rows_of(tokens, layer, &shape, Part::K), rows_of(tokens, layer, &shape, Part::V));
    batch.append(layer, rows(&k, &shape, Part::K), rows(&v, &shape, Part::V))
}

// ---- an allocator that counts, gives dirty memory, and can run dry ----

#[derive(Default)]
struct Counts {
    bytes: AtomicI64,
    blocks: AtomicI64,
    /// Every n-th allocation fails; 0 = none.
    fail_every: AtomicU64,
    calls: AtomicU64,
}

unsafe extern "C" fn counted_alloc(
    user: *mut c_void,
    bytes: usize,
    align: usize,
    backend: i32,
    stream: *mut c_void,
) -> *mut c_void {
    assert!(align == 64 && backend == 1 && stream.is_null());
    // SAFETY: `user` is the leaked Counts of the test.
    let counts = unsafe { &*user.cast::<Counts>() };
    let (call, every) = (counts.calls.fetch_add(1, Relaxed), counts.fail_every.load(Relaxed));
    if every > 0 && call % every == every - 1 {
        return std::ptr::null_mut();
    }
    counts.bytes.fetch_add(bytes as i64, Relaxed);
    counts.blocks.fetch_add(1, Relaxed);
    // SAFETY: the size is not 0.
    unsafe {
        let p = std::alloc::alloc(std::alloc::Layout::from_size_align(bytes, align).unwrap());
        p.write_bytes(0xa5, bytes);
        p.cast()
    }
}

unsafe extern "C" fn counted_dealloc(user: *mut c_void, p: *mut c_void, bytes: usize, backend: i32, _: *mut c_void) {
    assert!(backend == 1);
    // SAFETY: as above, and `p` came from `counted_alloc` with the same size.
    unsafe {
        let counts = &*user.cast::<Counts>();
        counts.bytes.fetch_sub(bytes as i64, Relaxed);
        counts.blocks.fetch_sub(1, Relaxed);
        std::alloc::dealloc(p.cast(), std::alloc::Layout::from_size_align(bytes, 64).unwrap());
    }
}

fn counted() -> (&'static Counts, Allocator) {
    let counts: &'static Counts = Box::leak(Box::default());
    let user = std::ptr::from_ref(counts).cast_mut().cast();
    // SAFETY: the functions above keep the contract.
    (counts, unsafe { Allocator::hooks(counted_alloc, counted_dealloc, user) })
}

fn export(cache: &Cache, id: u64, part: Excerpt) -> Result<Vec<u8>, Error> {
    let mut bytes = Vec::new();
    cache.export(id, &part, &mut |piece| {
        bytes.extend_from_slice(piece);
        0
    })?;
    Ok(bytes)
}

fn import(cache: &Cache, into: Option<u64>, mut bytes: &[u8]) -> Result<u64, Error> {
    let result = cache.import(into, &mut |piece| {
        let Some((now, later)) = bytes.split_at_checked(piece.len()) else { return 1 };
        piece.copy_from_slice(now);
        bytes = later;
        0
    });
    assert!(result.is_err() || bytes.is_empty(), "not all was read");
    result
}

// ---- the model ----

/// What a sequence holds, and what its tiles may have lost.
#[derive(Clone, Default)]
struct Model {
    tokens: Vec<Token>,
    /// Rows from here on are still known as given.
    known_from: usize,
    /// Tiles that were reopened without their rows.
    inexact: Vec<usize>,
}

impl Model {
    fn append(&mut self, tokens: &[Token], exact_tail: usize) {
        self.tokens.extend_from_slice(tokens);
        self.known_from = self.known_from.max(self.tokens.len().saturating_sub(exact_tail) / TILE * TILE);
    }

    /// Tokens with positions `from..to` go; at the end they are cut off.
    fn remove(&mut self, from: i64, to: i64, exact_head: usize) {
        let (first, last) = [from, to].map(|p| self.tokens.partition_point(|t| t.position < p)).into();
        if first < last && last == self.tokens.len() {
            return self.truncate(first, exact_head);
        }
        self.tokens[first..last.max(first)].iter_mut().for_each(|t| t.live = false);
    }

    fn truncate(&mut self, n: usize, exact_head: usize) {
        let n = self.tokens[..n].iter().rposition(|t| t.live).map_or(0, |i| i + 1);
        if n == self.tokens.len() {
            return;
        }
        let (tile, rows) = (n / TILE, n % TILE);
        let all_exact = tile == 0 && n <= exact_head;
        self.inexact.retain(|&t| t * TILE < n && !(t == tile && all_exact));
        if n < self.known_from && rows > 0 && !all_exact && !self.inexact.contains(&tile) {
            self.inexact.push(tile);
        }
        self.known_from = self.known_from.min(n);
        self.tokens.truncate(n);
    }
}

/// All that attention reads of the first `n` rows of a part of a page: scale bytes, meta, and the digits, which under
/// given scales are what they decode to.
fn live(shape: &Shape, part: &[u8], n: usize) -> (Vec<u8>, aligned::Meta, Vec<f32>) {
    let tile = aligned::Tile::new(shape, part);
    let mut values = vec![0.0; n * (shape.dim_k + shape.dim_v)];
    for (row, values) in values.chunks_exact_mut(shape.dim_k + shape.dim_v).enumerate() {
        let (k, v) = values.split_at_mut(shape.dim_k);
        tile.decode_k(row, shape.planes_k, k);
        tile.decode_v(row, shape.planes_v, v);
    }
    ([tile.k_scales, &tile.v_scales[..n]].concat(), tile.meta, values)
}

/// A page of `tokens` as if they had been appended all at once.
fn fresh(layout: &Layout, layer: usize, tokens: &[Token], skip: usize) -> Vec<u64> {
    let shape = &layout.shape;
    let (k, v) = (rows_of(tokens, layer, shape, Part::K), rows_of(tokens, layer, shape, Part::V));
    let source = Source { k: rows(&k, shape, Part::K), v: rows(&v, shape, Part::V), base: None, base_rows: 0 };
    let mut page = vec![0u64; layout.page_bytes() / 8];
    layout.encode(bytes_mut(&mut page), &source, skip, 0, tokens.len());
    page
}

fn check(reader: &Reader, layer: usize, model: &Model, exact_head: usize) {
    let (view, positions) = (&reader.view(), reader.positions());
    let (layout, shape) = (view.layout, &view.layout.shape);
    assert_eq!(view.len, model.tokens.len());
    let n_exact = if layout.lossless() { 0 } else { exact_head.min(view.len) };
    assert_eq!(view.n_exact, n_exact);
    assert_eq!(view.exact.is_some(), n_exact > 0);
    if let Some((k, v)) = view.exact {
        for (part, given) in [(Part::K, k), (Part::V, v)] {
            let words = rows_of(&model.tokens[..n_exact], layer, shape, part);
            for row in 0..n_exact {
                for head in 0..shape.n_kv_heads {
                    assert_eq!(given.bytes(row, head), rows(&words, shape, part).bytes(row, head));
                }
            }
        }
    }
    for (i, t) in model.tokens.iter().enumerate() {
        assert_eq!(positions.at(i), t.position);
    }
    for at in [0, view.len / 3, view.len.saturating_sub(1)].map(|i| model.tokens.get(i).map_or(0, |t| t.position)) {
        for p in [at, at.saturating_add(1)] {
            assert_eq!(positions.below(p, view.len), model.tokens.partition_point(|t| t.position < p));
        }
    }

    for (tile, tokens) in model.tokens.chunks(TILE).enumerate() {
        let there = tokens.iter().enumerate().fold(0u128, |there, (i, t)| there | u128::from(t.live) << i);
        assert_eq!(view.written(tile) & range_bits(0, tokens.len()), there);
        if there == 0 {
            continue;
        }
        let (page, skip) = (view.page(tile), if tile == 0 { n_exact } else { 0 });
        let exact = !model.inexact.contains(&tile);
        if layout.format == Format::Aligned && exact {
            let other = fresh(layout, layer, tokens, if tile == 0 { exact_head } else { 0 });
            for head in 0..shape.n_kv_heads {
                let ours = live(shape, layout.part(page, head), tokens.len());
                assert!(ours == live(shape, layout.part(bytes(&other), head), tokens.len()), "tile {tile}");
            }
        }
        let (mut k, mut v) = (vec![0.0; shape.dim_k], vec![0.0; shape.dim_v]);
        for head in 0..shape.n_kv_heads {
            for (row, token) in tokens.iter().enumerate().skip(skip) {
                let given = |part, c| element(token.seed, layer, part, head, c, dtype_dim(shape, part).0);
                layout.decode(page, head, row, &mut k, &mut v);
                if layout.lossless() {
                    assert!((0..shape.dim_k).all(|c| k[c] == given(Part::K, c)));
                    assert!((0..shape.dim_v).all(|c| v[c] == given(Part::V, c)));
                    continue;
                }
                let t = aligned::Tile::new(shape, layout.part(page, head));
                assert!(tokens.len() == TILE || usize::from(t.meta.digit_sum) == 8 * shape.dim_k, "an open tile");
                assert!(if exact { t.meta.slack == 0.0 } else { t.meta.slack <= 7.0 * LEFT[shape.planes_k] });
                for c in 0..shape.dim_k {
                    let bound = (LEFT[shape.planes_k] + t.meta.slack) * scale(t.k_scales[c]) * 1.0001;
                    assert!((k[c] - given(Part::K, c)).abs() <= bound);
                }
                for c in 0..shape.dim_v {
                    let bound = LEFT[shape.planes_v] * scale(t.v_scales[row]) * 1.0001;
                    assert!((v[c] - given(Part::V, c)).abs() <= bound);
                }
            }
        }
    }
}

fn check_all_layers(cache: &Cache, id: u64, model: &Model) {
    for layer in 0..cache.layouts().len() {
        check(&cache.read(id, layer).unwrap(), layer, model, cache.config().exact_head);
    }
}

// ---- caches ----

const SHAPE: Shape = Shape {
    n_q_heads: 4,
    n_kv_heads: 2,
    dim_k: 16,
    dim_v: 24,
    dtype_k: Dtype::F32,
    dtype_v: Dtype::Bf16,
    planes_k: 4,
    planes_v: 3,
    window: 0,
    v_is_prefix: false,
};

fn config(format: Format, exact_head: usize, exact_tail: usize) -> Config {
    let mut layers = vec![
        SHAPE,
        Shape { n_q_heads: 3, n_kv_heads: 1, dim_k: 24, dim_v: 16, dtype_k: Dtype::F16, planes_k: 2, ..SHAPE },
    ];
    if format == Format::Published {
        layers.iter_mut().for_each(|s| (s.dtype_k, s.dtype_v) = (Dtype::F16, Dtype::F16));
    }
    let (placement, nan) = (Placement::Append, NanPolicy::Error);
    Config {
        placement,
        format,
        nan,
        layers,
        shares: Vec::new(),
        max_sequences: 12,
        exact_head,
        exact_tail,
        max_bytes: 0,
    }
}

fn tokens(random: &mut Random, n: usize, first: i64) -> Vec<Token> {
    (0..n).map(|i| Token { seed: random.below(1 << 40) as u64, position: first + i as i64, live: true }).collect()
}

fn one(sequence: u64, n_new: usize) -> [StepSequence; 1] {
    [StepSequence { sequence, n_new, n_q: n_new }]
}

/// Appends to one sequence, in one step.
fn grow(batch: &Batch, id: u64, model: &mut Model, new: &[Token]) {
    batch.begin(&one(id, new.len()), Some(&new.iter().map(|t| t.position).collect::<Vec<_>>())).unwrap();
    for layer in 0..batch.cache().layouts().len() {
        append(batch, layer, new).unwrap();
    }
    batch.commit().unwrap();
    model.append(new, batch.cache().config().exact_tail);
}

/// What must be as before after a call that failed.
fn in_use(usage: Usage) -> Usage {
    Usage { bytes_reserved: 0, pages_free: 0, ..usage }
}

// ---- tests ----

/// A begun step of the model.
struct Begun {
    /// Sequence (index in `Simulation::live`), its new tokens.
    members: Vec<(u64, Vec<Token>)>,
    appended: Vec<bool>,
}

struct Simulation {
    cache: Arc<Cache>,
    counts: &'static Counts,
    random: Random,
    live: Vec<(u64, Model)>,
    dead: Vec<u64>,
    batches: Vec<(Batch, Option<Begun>)>,
    refused: usize,
}

impl Simulation {
    fn owned(&self, id: u64) -> bool {
        self.batches.iter().any(|(_, b)| b.as_ref().is_some_and(|b| b.members.iter().any(|m| m.0 == id)))
    }

    fn model(&mut self, id: u64) -> &mut Model {
        &mut self.live.iter_mut().find(|s| s.0 == id).unwrap().1
    }

    fn pick(&mut self) -> Option<u64> {
        if self.live.is_empty() { None } else { Some(self.live[self.random.below(self.live.len())].0) }
    }

    /// The result of a call that may only fail as it is allowed to, and then leaves everything as it was.
    fn settle<T>(&mut self, before: Usage, result: Result<T, Error>, owned: bool) -> Option<T> {
        assert!(!owned || matches!(result, Err(Error::Busy(_))), "in a begun batch");
        match result {
            Ok(value) => Some(value),
            Err(error) => {
                let dry = self.counts.fail_every.load(Relaxed) > 0;
                match error {
                    Error::Busy(_) => assert!(owned),
                    Error::Memory(_) => assert!(dry),
                    Error::Capacity(_) => assert!(self.live.len() >= 12 || self.cache.config().max_bytes > 0),
                    other => panic!("{other}"),
                }
                assert_eq!(in_use(before), in_use(self.cache.usage()));
                self.refused += 1;
                None
            }
        }
    }

    fn op(&mut self) {
        let cache = self.cache.clone();
        let before = cache.usage();
        let (head, tail) = (cache.config().exact_head, cache.config().exact_tail);
        match self.random.below(100) {
            0..6 => {
                let result = cache.create();
                if let Some(id) = self.settle(before, result, false) {
                    assert!(id != 0 && !self.dead.contains(&id) && self.live.iter().all(|s| s.0 != id));
                    self.live.push((id, Model::default()));
                }
            }
            6..9 => {
                let Some(id) = self.pick() else { return };
                let owned = self.owned(id);
                if self.settle(before, cache.destroy(id), owned).is_some() {
                    self.live.retain(|s| s.0 != id);
                    self.dead.push(id);
                }
            }
            9..15 => {
                let Some(id) = self.pick() else { return };
                let owned = self.owned(id);
                let len = self.model(id).tokens.len();
                let n = if self.random.one_in(2) { len } else { self.random.below(len + 1) };
                let result = cache.fork(id, if n == len { None } else { Some(n) });
                if let Some(fork) = self.settle(before, result, owned) {
                    let mut model = self.model(id).clone();
                    model.truncate(n, head);
                    self.live.push((fork, model));
                }
            }
            15..27 => {
                let Some(id) = self.pick() else { return };
                let owned = self.owned(id);
                let len = self.model(id).tokens.len();
                let back = if self.random.one_in(4) { len } else { tail.max(1) };
                let n = len - self.random.below(back + 1).min(len);
                if self.settle(before, cache.truncate(id, n), owned).is_some() {
                    self.model(id).truncate(n, head);
                }
            }
            27..30 if self.random.one_in(2) => self.swap(before),
            27..30 if self.random.one_in(2) => {
                let Some(id) = self.pick() else { return };
                let owned = self.owned(id);
                let n = [0, 1, 200, 700][self.random.below(4)];
                self.settle(before, cache.reserve(id, n), owned);
            }
            27..30 => {
                let Some(id) = self.pick() else { return };
                if cache.config().format == Format::Published {
                    assert!(matches!(cache.remove(id, 0, 1), Err(Error::Unsupported(_))));
                    return;
                }
                let owned = self.owned(id);
                let last = self.model(id).tokens.last().map_or(0, |t| t.position);
                let from = self.random.below(last.max(0) as usize + 2) as i64 - 1;
                let to = from + [1, 30, 400][self.random.below(3)];
                if self.settle(before, cache.remove(id, from, to), owned).is_some() {
                    self.model(id).remove(from, to, head);
                }
            }
            30..50 => self.begin(before),
            50..80 => self.append(before),
            80..92 => self.commit(),
            92..95 => {
                let i = self.random.below(self.batches.len());
                match self.random.below(3) {
                    // Destroying a batch aborts its step.
                    0 => self.batches[i].0 = Batch::new(cache.clone(), Bounds::default()),
                    _ => self.batches[i].0.abort(),
                }
                self.batches[i].1 = None;
                self.batches[i].0.abort();
            }
            95..97 => {
                let Some(&id) = self.dead.last() else { return };
                let foreign = id ^ 1 << 50;
                for id in [id, foreign, 0, u64::MAX] {
                    assert!(matches!(cache.length(id, None), Err(Error::Handle(_))));
                    assert!(matches!(cache.truncate(id, 0), Err(Error::Handle(_))));
                    assert!(matches!(cache.destroy(id), Err(Error::Handle(_))));
                    assert!(matches!(cache.fork(id, None), Err(Error::Handle(_))));
                    assert!(matches!(cache.read(id, 0), Err(Error::Handle(_))));
                }
            }
            _ => {
                let Some(id) = self.pick() else { return };
                if !self.owned(id) {
                    check_all_layers(&cache, id, self.model(id));
                }
            }
        }
        if let Some(id) = self.pick() {
            assert_eq!(cache.length(id, None).unwrap(), self.model(id).tokens.len());
        }
    }

    /// A sequence as bytes, and from them again, in one piece or two.
    fn swap(&mut self, before: Usage) {
        let (cache, Some(id)) = (self.cache.clone(), self.pick()) else { return };
        // What a begun step has appended is a part of it, in the layers that have it.
        if self.owned(id) || self.model(id).tokens.len() > 1000 {
            return;
        }
        let all = export(&cache, id, Excerpt::default()).unwrap();
        assert_eq!(before, cache.usage(), "an export takes nothing");
        let parts =
            [Excerpt { n_layers: Some(1), ..Excerpt::default() }, Excerpt { first_layer: 1, ..Excerpt::default() }];
        let split = cache.layouts().len() == 2 && self.random.one_in(2) && !self.model(id).tokens.is_empty();
        let model = self.model(id).clone();
        let first = if split { export(&cache, id, parts[0]).unwrap() } else { all.clone() };
        let result = import(&cache, None, &first);
        let Some(other) = self.settle(before, result, false) else { return };
        if split {
            let between = cache.usage();
            assert!(matches!(cache.fork(other, None), Err(Error::Argument(_))), "a layer is missing");
            assert!(matches!(cache.truncate(other, 0), Err(Error::Argument(_))));
            assert!(matches!(import(&cache, Some(other), &first), Err(Error::Argument(_))), "it is there already");
            let result = import(&cache, Some(other), &export(&cache, id, parts[1]).unwrap());
            self.live.push((other, model));
            if self.settle(between, result, false).is_none() {
                self.live.pop();
                cache.destroy(other).unwrap();
                assert_eq!(in_use(before), in_use(cache.usage()));
                return;
            }
        } else {
            self.live.push((other, model));
        }
        assert!(export(&cache, other, Excerpt::default()).unwrap() == all, "exported anew, the same bytes");
        if self.random.one_in(2) {
            check_all_layers(&cache, other, self.model(other));
        }
        // The original goes, or the copy.
        let gone = if self.random.one_in(2) { id } else { other };
        cache.destroy(gone).unwrap();
        self.live.retain(|s| s.0 != gone);
        self.dead.push(gone);
    }

    fn begin(&mut self, before: Usage) {
        let i = self.random.below(self.batches.len());
        let mut members: Vec<(u64, Vec<Token>)> = Vec::new();
        for _ in 0..1 + self.random.below(3) {
            let Some(id) = self.pick() else { return };
            if members.iter().any(|m| m.0 == id) {
                continue;
            }
            let n = match self.random.below(40) {
                0 => self.random.below(2000),
                1..8 => self.random.below(300),
                8..12 => 0,
                _ => self.random.below(5),
            };
            // A few lengths at which things happen.
            let len = self.model(id).tokens.len();
            let n = if self.random.one_in(6) { len.next_multiple_of(64) + self.random.below(3) - len } else { n };
            // Long sequences end: forks and checks are linear.
            let n = if len > 1500 { n.min(2) } else { n };
            let last = self.model(id).tokens.last().map(|t| t.position);
            let mut new = tokens(&mut self.random, n, last.map_or(0, |p| p + 1));
            if self.random.one_in(3) {
                let mut shift = -(self.random.below(2) as i64);
                for t in &mut new {
                    shift += [0, 0, 0, 0, -1, 5][self.random.below(6)];
                    let least = last.unwrap_or(-3);
                    t.position = (t.position + shift).max(least);
                }
                new.sort_by_key(|t| t.position);
            }
            members.push((id, new));
        }
        let step: Vec<StepSequence> = members
            .iter()
            .map(|(id, new)| StepSequence { sequence: *id, n_new: new.len(), n_q: new.len().min(1) })
            .collect();
        let given: Vec<i64> = members.iter().flat_map(|m| m.1.iter().map(|t| t.position)).collect();
        let consecutive = members.iter().all(|(id, new)| {
            let last = self.model(*id).tokens.last().map_or(-1, |t| t.position);
            new.iter().enumerate().all(|(i, t)| t.position == last + 1 + i as i64)
        });
        let positions = if consecutive && self.random.one_in(2) { None } else { Some(&given[..]) };

        // What is wrong with a step is found before anything is done.
        let batch = &self.batches[i].0;
        if self.batches[i].1.is_none() && !members.iter().any(|m| self.owned(m.0)) {
            let twice = [step[0], step[0]];
            let dead = [step[0], StepSequence { sequence: self.dead.last().copied().unwrap_or(0), n_new: 0, n_q: 0 }];
            assert!(matches!(batch.begin(&twice, None), Err(Error::Argument(_))));
            assert!(matches!(batch.begin(&dead, None), Err(Error::Handle(_))));
            let [a, b] = [given.len() + 1, 2].map(|n| (0..n as i64).rev().collect::<Vec<_>>());
            assert!(matches!(batch.begin(&step, Some(&a)), Err(Error::Argument(_))));
            let two = [StepSequence { n_new: 2, n_q: 0, ..step[0] }];
            assert!(matches!(batch.begin(&two, Some(&b)), Err(Error::Argument(_))));
            assert_eq!(in_use(before), in_use(self.cache.usage()));
        }

        let busy = self.batches[i].1.is_some() || members.iter().any(|m| self.owned(m.0));
        let result = self.batches[i].0.begin(&step, positions);
        if self.settle(before, result, busy).is_some() {
            self.batches[i].1 = Some(Begun { members, appended: vec![false; self.cache.layouts().len()] });
        }
    }

    fn append(&mut self, before: Usage) {
        let i = self.random.below(self.batches.len());
        let layer = self.random.below(self.cache.layouts().len());
        let (batch, begun) = &mut self.batches[i];
        let Some(begun) = begun else {
            assert!(matches!(append(batch, layer, &[]), Err(Error::Argument(_))));
            assert!(matches!(batch.read(layer), Err(Error::Argument(_))));
            return;
        };
        let all: Vec<Token> = begun.members.iter().flat_map(|m| m.1.iter().copied()).collect();
        let done = begun.appended[layer];
        if !done && !all.is_empty() {
            assert!(matches!(batch.read(layer), Err(Error::Argument(_))));
            if self.random.one_in(4) {
                // A row that cannot be stored, somewhere: nothing is appended.
                let shape = self.cache.layouts()[layer].shape;
                let (k, mut v) = (rows_of(&all, layer, &shape, Part::K), rows_of(&all, layer, &shape, Part::V));
                let bad = self.random.below(all.len());
                let at = bad * shape.n_kv_heads * shape.dim_v * shape.dtype_v.size();
                bytes_mut(&mut v)[at..at + 2].fill(0xff);
                let error = batch.append(layer, rows(&k, &shape, Part::K), rows(&v, &shape, Part::V)).unwrap_err();
                let Error::NonFinite(text) = &error else { panic!("{error}") };
                let mut end = 0;
                let owner = begun.members.iter().find(|m| {
                    end += m.1.len();
                    bad < end
                });
                let (row, id) = (format!("row {bad},"), format!("sequence {}", owner.unwrap().0));
                assert!(text.contains(&row) && text.contains(&id) && text.contains("value"), "{text}");
            }
        }
        let result = append(batch, layer, &all);
        assert_eq!(result.is_err(), done);
        assert!(result.is_ok() || matches!(result, Err(Error::Argument(_))));
        begun.appended[layer] = true;
        // Appending takes nothing.
        assert_eq!(before, self.cache.usage());
        if self.random.one_in(8) {
            let tail = self.cache.config().exact_tail;
            let members: Vec<_> = begun.members.clone();
            let readers = self.batches[i].0.read(layer).unwrap();
            for ((step, reader), (id, new)) in readers.iter().zip(members) {
                assert_eq!((step.sequence, step.n_new), (id, new.len()));
                let mut model = self.model(id).clone();
                model.append(&new, tail);
                check(reader, layer, &model, self.cache.config().exact_head);
            }
        }
    }

    fn commit(&mut self) {
        let i = self.random.below(self.batches.len());
        let result = self.batches[i].0.commit();
        let Some(begun) = self.batches[i].1.take() else {
            assert!(matches!(result, Err(Error::Argument(_))));
            return;
        };
        if begun.members.iter().any(|m| !m.1.is_empty()) && begun.appended.contains(&false) {
            assert!(matches!(result, Err(Error::Argument(_))));
            self.batches[i].1 = Some(begun);
            return;
        }
        result.unwrap();
        let tail = self.cache.config().exact_tail;
        for (id, new) in begun.members {
            self.model(id).append(&new, tail);
        }
    }
}

fn simulate(config: Config, seed: u64, n_ops: usize, fail_every: u64) {
    let (counts, allocator) = counted();
    let small = config.max_bytes > 0;
    let cache = Arc::new(Cache::new(config, allocator).unwrap());
    let batches = (0..2).map(|_| (Batch::new(cache.clone(), Bounds::default()), None)).collect();
    counts.fail_every.store(fail_every, Relaxed);
    let (live, dead) = (Vec::new(), Vec::new());
    let mut simulation =
        Simulation { cache: cache.clone(), counts, random: Random(seed), live, dead, batches, refused: 0 };
    for _ in 0..n_ops {
        simulation.op();
        let usage = cache.usage();
        assert!(!small || usage.bytes_reserved <= cache.config().max_bytes);
        assert!(usage.bytes_used <= usage.bytes_reserved && counts.bytes.load(Relaxed) as u64 <= usage.bytes_reserved);
    }
    let Simulation { mut live, batches, refused, cache: other, .. } = simulation;
    drop(other);
    assert!(refused > n_ops / 1000, "nothing was ever refused");
    drop(batches);
    for (id, model) in &live {
        check_all_layers(&cache, *id, model);
    }
    assert_eq!(cache.usage().tokens, live.iter().flat_map(|s| &s.1.tokens).filter(|t| t.live).count() as u64);
    for (id, _) in live.drain(..) {
        cache.destroy(id).unwrap();
    }
    let Usage { bytes_reserved, pages_free, .. } = cache.usage();
    assert_eq!(cache.usage(), Usage { bytes_reserved, pages_free, ..Usage::default() });
    drop(cache);
    assert_eq!((counts.bytes.load(Relaxed), counts.blocks.load(Relaxed)), (0, 0));
}

#[test]
fn random_operations_aligned() {
    for (seed, (head, tail)) in [(4, 64), (0, 0), (4, 128), (0, 64), (128, 100)].into_iter().enumerate() {
        simulate(config(Format::Aligned, head, tail), seed as u64, 24_000, 0);
    }
}

#[test]
fn random_operations_lossless() {
    for (seed, format) in [(10, Format::Raw), (11, Format::Published)] {
        simulate(config(format, 4, 64), seed, 20_000, 0);
    }
}

#[test]
fn random_operations_with_little_memory() {
    for (seed, (format, max_bytes)) in
        [(Format::Aligned, 150_000), (Format::Aligned, 400_000), (Format::Raw, 300_000)].into_iter().enumerate()
    {
        simulate(Config { max_bytes, ..config(format, 4, 64) }, 20 + seed as u64, 10_000, 0);
    }
    for seed in 30..33 {
        let mut config = config(Format::Aligned, 4, 64);
        config.layers.truncate(1);
        config.layers[0].n_kv_heads = 3;
        simulate(config, seed, 10_000, 5);
    }
}

/// Lengths at tile edges and at the reach of the exact tail.
const LENGTHS: [usize; 10] = [1, 5, 127, 128, 129, 191, 192, 193, 256, 300];

#[test]
fn truncation_within_the_exact_tail_is_exact() {
    for exact_tail in [0, 64, 128] {
        let cache = Arc::new(Cache::new(config(Format::Aligned, 4, exact_tail), Allocator::System).unwrap());
        let batch = Batch::new(cache.clone(), Bounds::default());
        let mut random = Random(exact_tail as u64);
        for len in LENGTHS {
            for back in [0, 1, 2, 63, 64, 65, 127, 128].into_iter().filter(|&b| b <= exact_tail.min(len)) {
                let (id, mut model) = (cache.create().unwrap(), Model::default());
                let all = tokens(&mut random, len, 0);
                // In two steps, so that some of it was committed before.
                grow(&batch, id, &mut model, &all[..len / 2]);
                grow(&batch, id, &mut model, &all[len / 2..]);
                cache.truncate(id, len - back).unwrap();
                model.truncate(len - back, 4);
                assert!(model.inexact.is_empty(), "length {len}, back {back}");
                // Compares every live byte with a page encoded at once.
                check_all_layers(&cache, id, &model);
                let more = tokens(&mut random, 150, len as i64);
                grow(&batch, id, &mut model, &more);
                check_all_layers(&cache, id, &model);
                cache.destroy(id).unwrap();
            }
        }
    }
}

#[test]
fn abort_is_exact() {
    for exact_tail in [0, 64] {
        let (counts, allocator) = counted();
        let cache = Arc::new(Cache::new(config(Format::Aligned, 4, exact_tail), allocator).unwrap());
        let mut random = Random(7);
        for len in LENGTHS.into_iter().chain([0, 3]) {
            for n_new in [1, 2, 64, 127, 128, 129, 300] {
                let batch = Batch::new(cache.clone(), Bounds::default());
                let (id, mut model) = (cache.create().unwrap(), Model::default());
                let all = tokens(&mut random, len, 0);
                grow(&batch, id, &mut model, &all);
                let before = cache.usage();
                // Positions that make runs; one layer of two appended.
                let new = tokens(&mut random, n_new, len as i64 + 10);
                batch.begin(&one(id, n_new), Some(&new.iter().map(|t| t.position).collect::<Vec<_>>())).unwrap();
                append(&batch, 1, &new).unwrap();
                let (other, other_model) = (cache.create().unwrap(), Model::default());
                match n_new % 2 {
                    0 => batch.abort(),
                    _ => drop(batch),
                }
                check_all_layers(&cache, id, &model);
                check_all_layers(&cache, other, &other_model);
                cache.destroy(other).unwrap();
                let after = cache.usage();
                assert_eq!(
                    (after.pages_used, after.bytes_kept, after.tokens),
                    (before.pages_used, before.bytes_kept, before.tokens)
                );
                let batch = Batch::new(cache.clone(), Bounds::default());
                grow(&batch, id, &mut model, &new);
                check_all_layers(&cache, id, &model);
                cache.destroy(id).unwrap();
            }
        }
        assert!(counts.bytes.load(Relaxed) > 0);
        drop(cache);
        assert_eq!(counts.bytes.load(Relaxed), 0);
    }
}

/// What is reserved is there when nothing else is, however the tokens come, and gives the same bits.
#[test]
fn reserved_tokens_always_find_room() {
    let mut random = Random(77);
    let kinds = [(Format::Aligned, 4, 64), (Format::Aligned, 128, 128), (Format::Aligned, 0, 0), (Format::Raw, 0, 0)];
    for (i, (format, head, tail)) in kinds.into_iter().cycle().take(24).enumerate() {
        let max_bytes = 600_000;
        let (counts, allocator) = counted();
        let cache = Arc::new(Cache::new(Config { max_bytes, ..config(format, head, tail) }, allocator).unwrap());
        let free = Arc::new(Cache::new(config(format, head, tail), Allocator::default()).unwrap());
        let (batch, other) =
            (Batch::new(cache.clone(), Bounds::default()), Batch::new(free.clone(), Bounds::default()));
        let (id, plain) = (cache.create().unwrap(), free.create().unwrap());
        let (mut model, mut plain_model) = (Model::default(), Model::default());
        let first = tokens(&mut random, [0, 1, 120, 128, 250][i % 5], 0);
        if !first.is_empty() {
            grow(&batch, id, &mut model, &first);
            grow(&other, plain, &mut plain_model, &first);
        }
        let before = cache.usage();
        // All or nothing, whichever allocation fails.
        assert!(matches!(cache.reserve(id, 1 << 20), Err(Error::Capacity(_))));
        assert!(matches!(cache.reserve(id, usize::MAX), Err(Error::Argument(_))));
        for every in 1.. {
            counts.calls.store(0, Relaxed);
            counts.fail_every.store(every, Relaxed);
            let result = cache.reserve(id, 600);
            counts.fail_every.store(0, Relaxed);
            let Err(error) = result else { break };
            assert!(matches!(error, Error::Memory(_)));
            assert_eq!(in_use(cache.usage()), in_use(before));
        }
        let taken = cache.usage();
        assert!(taken.pages_used >= before.pages_used + 8 && taken.tokens == before.tokens);
        cache.reserve(id, 500).unwrap();
        assert_eq!(in_use(cache.usage()), in_use(taken), "there is as much already");
        // It goes back, and comes again.
        cache.truncate(id, first.len()).unwrap();
        let back = cache.usage();
        assert_eq!((back.pages_used, back.bytes_kept), (before.pages_used, before.bytes_kept));
        cache.reserve(id, 600).unwrap();

        // Somebody takes all the rest.
        let mut rest = Vec::new();
        for bytes in [1 << 14, 64] {
            rest.extend(std::iter::from_fn(|| Block::new(cache.memory(), bytes).ok()));
        }
        assert!(cache.usage().bytes_reserved > max_bytes - 64);
        let mut left = 600;
        while left > 0 {
            let most = [3, 150, 600][random.below(3)];
            let n = (1 + random.below(most)).min(left);
            let new = tokens(&mut random, n, model.tokens.len() as i64);
            if random.one_in(3) {
                batch.begin(&one(id, n), None).unwrap();
                append(&batch, 0, &new).unwrap();
                batch.abort();
                check_all_layers(&cache, id, &model);
            }
            grow(&batch, id, &mut model, &new);
            grow(&other, plain, &mut plain_model, &new);
            left -= n;
        }
        check_all_layers(&cache, id, &model);
        let [ours, theirs] =
            [(&cache, id), (&free, plain)].map(|(cache, id)| export(cache, id, Excerpt::default()).unwrap());
        assert!(ours == theirs);
        // And no further.
        assert!(matches!(batch.begin(&one(id, 10 * TILE), None), Err(Error::Capacity(_))));
        cache.destroy(id).unwrap();
        assert_eq!((cache.usage().pages_used, cache.usage().bytes_kept), (0, 0));
    }
}

#[test]
fn forks_share_whole_tiles_and_nothing_else() {
    let cache = Arc::new(Cache::new(config(Format::Aligned, 4, 64), Allocator::System).unwrap());
    let batch = Batch::new(cache.clone(), Bounds::default());
    let mut random = Random(3);
    let (id, mut model) = (cache.create().unwrap(), Model::default());
    grow(&batch, id, &mut model, &tokens(&mut random, 300, 0));
    let before = cache.usage();
    assert_eq!((before.pages_used, before.pages_shared), (6, 0));
    let kept = |n: usize| cache.layouts().iter().map(|l| l.kept_bytes(n) as u64).sum::<u64>();
    assert_eq!(before.bytes_kept, 2 * kept(TILE) + kept(4), "tile 1, the open one, and the head");

    let (fork, mut fork_model) = (cache.fork(id, None).unwrap(), model.clone());
    let after = cache.usage();
    assert_eq!((after.pages_used, after.pages_shared, after.tokens), (8, 4, 600));
    grow(&batch, fork, &mut fork_model, &tokens(&mut random, 50, 300));
    grow(&batch, id, &mut model, &tokens(&mut random, 200, 300));
    check_all_layers(&cache, id, &model);
    check_all_layers(&cache, fork, &fork_model);

    // Into a shared tile, by one of them; into the exact head, by the other.
    cache.truncate(fork, 200).unwrap();
    fork_model.truncate(200, 4);
    grow(&batch, fork, &mut fork_model, &tokens(&mut random, 30, 300));
    assert_eq!(cache.usage().pages_shared, 4, "tile 0 of both layers, and tile 1 as the base of the reopened one");
    cache.truncate(id, 2).unwrap();
    model.truncate(2, 4);
    grow(&batch, id, &mut model, &tokens(&mut random, 30, 300));
    check_all_layers(&cache, id, &model);
    check_all_layers(&cache, fork, &fork_model);
    assert_eq!(cache.usage().pages_shared, 0);
    cache.destroy(fork).unwrap();
    check_all_layers(&cache, id, &model);
    // 32 tokens; then tile 0 closes and stays within reach; then it does not.
    for (n, tiles) in [(0, 1), (96 + 63, 2), (1, 1)] {
        let first = model.tokens[model.tokens.len() - 1].position + 1;
        grow(&batch, id, &mut model, &tokens(&mut random, n, first));
        assert_eq!(cache.usage().bytes_kept, tiles * kept(TILE) + kept(4));
    }
    cache.destroy(id).unwrap();
    assert_eq!(cache.usage().bytes_used, 0);
}

#[test]
fn bounds_and_limits_are_named() {
    let config = Config { max_bytes: 100_000, max_sequences: 2, ..config(Format::Aligned, 4, 64) };
    let cache = Arc::new(Cache::new(config, Allocator::System).unwrap());
    let (a, b) = (cache.create().unwrap(), cache.create().unwrap());
    let text = |error: Error| {
        assert!(matches!(error, Error::Capacity(_)), "{error}");
        error.to_string()
    };
    assert!(text(cache.create().unwrap_err()).contains("max_sequences 2"));
    let bounds = Bounds { max_sequences: Some(1), max_q: Some(3), max_kv: Some(5000) };
    let batch = Batch::new(cache.clone(), bounds);
    let step = |sequence, n_new, n_q| StepSequence { sequence, n_new, n_q };
    assert!(text(batch.begin(&[step(a, 1, 1), step(b, 1, 1)], None).unwrap_err()).contains("max_sequences 1"));
    assert!(text(batch.begin(&[step(a, 4, 4)], None).unwrap_err()).contains("max_q 3"));
    assert!(text(batch.begin(&[step(a, 5001, 1)], None).unwrap_err()).contains("max_kv 5000"));
    assert!(text(batch.begin(&[step(a, 5000, 1)], None).unwrap_err()).contains("max_bytes 100000"));
    let overflow = [step(a, usize::MAX, 0)];
    assert!(Batch::new(cache.clone(), Bounds::default()).begin(&overflow, None).is_err());
    batch.begin(&[step(a, 3, 3)], Some(&[i64::MIN, 0, i64::MAX])).unwrap();
    for layer in 0..2 {
        append(&batch, layer, &tokens(&mut Random(1), 3, 0)).unwrap();
    }
    batch.commit().unwrap();
    assert!(matches!(batch.begin(&[step(a, 1, 1)], None), Err(Error::Argument(_))), "positions overflow");
    assert!(matches!(cache.truncate(a, 4), Err(Error::Argument(_))));
    assert!(matches!(cache.fork(a, Some(4)), Err(Error::Argument(_))));
    assert!(matches!(cache.read(a, 2), Err(Error::Argument(_))));
    let other = Cache::new(cache.config().clone(), Allocator::System).unwrap();
    other.create().unwrap();
    assert!(matches!(other.length(a, None), Err(Error::Handle(_))), "an id of another cache");
}

#[test]
fn busy_where_it_must_be_and_nowhere_else() {
    let cache = Arc::new(Cache::new(config(Format::Aligned, 4, 64), Allocator::System).unwrap());
    let batch = Batch::new(cache.clone(), Bounds::default());
    let mut random = Random(5);
    let (id, mut model) = (cache.create().unwrap(), Model::default());
    grow(&batch, id, &mut model, &tokens(&mut random, 127, 0));
    let new = tokens(&mut random, 2, 127);

    let reader = cache.read(id, 0).unwrap();
    assert!(matches!(cache.truncate(id, 3), Err(Error::Busy(_))));
    assert!(matches!(cache.destroy(id), Err(Error::Busy(_))));
    assert!(matches!(batch.begin(&one(id, 2), None), Err(Error::Busy(_))), "a new tile in a layer that is read");
    cache.destroy(cache.fork(id, None).unwrap()).unwrap();
    drop(reader);

    batch.begin(&one(id, 2), None).unwrap();
    for result in [cache.truncate(id, 3), cache.destroy(id), cache.fork(id, None).map(drop), batch.begin(&[], None)] {
        assert!(matches!(result, Err(Error::Busy(_))));
    }
    let readers = [cache.read(id, 0).unwrap(), cache.read(id, 0).unwrap()];
    assert!(matches!(append(&batch, 0, &new), Err(Error::Busy(_))));
    append(&batch, 1, &new).unwrap();
    assert_eq!((cache.length(id, Some(0)).unwrap(), cache.length(id, Some(1)).unwrap()), (127, 129));
    assert_eq!(cache.length(id, None).unwrap(), 127);
    check(&readers[1], 0, &model, 4);
    drop(readers);
    append(&batch, 0, &new).unwrap();
    batch.commit().unwrap();
    model.append(&new, 64);
    check_all_layers(&cache, id, &model);

    // Releasing rows at a commit is writing too; a step that only reads is not.
    let new = tokens(&mut random, 63, 129);
    batch.begin(&one(id, 63), None).unwrap();
    append(&batch, 0, &new).unwrap();
    append(&batch, 1, &new).unwrap();
    let readers = batch.read(1).unwrap();
    assert!(matches!(batch.commit(), Err(Error::Busy(_))));
    drop(readers);
    batch.commit().unwrap();
    model.append(&new, 64);
    let _reader = cache.read(id, 0).unwrap();
    batch.begin(&[StepSequence { sequence: id, n_new: 0, n_q: 5 }], None).unwrap();
    check(&batch.read(0).unwrap()[0].1, 0, &model, 4);
    batch.commit().unwrap();
}

#[test]
fn readers_and_a_writer_at_once() {
    let cache = Arc::new(Cache::new(config(Format::Aligned, 4, 64), Allocator::System).unwrap());
    let batch = Batch::new(cache.clone(), Bounds::default());
    let mut random = Random(9);
    let (still, mut still_model) = (cache.create().unwrap(), Model::default());
    grow(&batch, still, &mut still_model, &tokens(&mut random, 200, 0));
    let moving = cache.fork(still, None).unwrap();
    let all: Vec<Token> = still_model.tokens.iter().copied().chain(tokens(&mut random, 400, 200)).collect();
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        for thread in 0..3usize {
            let (cache, still_model, all, stop) = (&cache, &still_model, &all, &stop);
            scope.spawn(move || {
                let mut reads = 0;
                while !stop.load(Relaxed) || reads < 10 {
                    reads += 1;
                    check(&cache.read(still, thread % 2).unwrap(), thread % 2, still_model, 4);
                    match cache.read(moving, thread % 2) {
                        Ok(reader) => {
                            let tokens = all[..reader.view().len].to_vec();
                            check(&reader, thread % 2, &Model { tokens, ..Model::default() }, 4);
                        }
                        Err(error) => assert!(matches!(error, Error::Busy(_)), "{error}"),
                    }
                }
            });
        }
        let until = |call: &mut dyn FnMut() -> Result<(), Error>| {
            while let Err(error) = call() {
                assert!(matches!(error, Error::Busy(_)), "{error}");
                std::thread::yield_now();
            }
        };
        let mut len = 200;
        for round in 0.. {
            let n_new = [1, 7, 60][round % 3];
            if len + n_new > all.len() {
                break;
            }
            let new = &all[len..len + n_new];
            until(&mut || batch.begin(&one(moving, n_new), None));
            for layer in 0..2 {
                until(&mut || append(&batch, layer, new));
            }
            if round % 5 == 4 {
                batch.abort();
                continue;
            }
            until(&mut || batch.commit());
            len += n_new;
            if round % 7 == 6 {
                until(&mut || cache.truncate(moving, len - 30));
                len -= 30;
            }
        }
        stop.store(true, Relaxed);
    });
    cache.destroy(moving).unwrap();
    check_all_layers(&cache, still, &still_model);
}
