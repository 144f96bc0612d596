//! Every allocation of every operation fails once: from the caller's allocator, and from the process's heap. A call that
//! fails says AKV_E_MEMORY, has changed nothing and can be made again; nothing is left at the end. Then limits that are
//! reached in the middle of a step, and callbacks that do what they must not.
//!
//!     faults [--json PATH] [--verbose]
//!
//! Rust ends the process when the heap has nothing for an allocation that the language makes by itself (a handle, the
//! text of an error). Such ends are counted per operation; what they were to get must be small, and must not grow with
//! tokens, sequences or rows.

use alignedkv_reliability::api::*;
use alignedkv_reliability::counts::{Counts, add, found};
use alignedkv_reliability::dice::{Dice, mix};
use alignedkv_reliability::memory::{Heap, Hooks};
use alignedkv_reliability::model::*;
use alignedkv_reliability::stream::{Reading, collect, read};
use serde_json::json;
use std::process::ExitCode;
use std::ptr::{null, null_mut};
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

/// Allocations up to here may be ones that the language makes by itself.
const SMALL: u64 = 2048;

const CELLS: i64 = 600;

/// What the operations are tried on.
struct Scene {
    hooks: &'static Hooks,
    setup: Setup,
    context: Handle<akv_context>,
    cache: Handle<akv_cache>,
    /// Where copies go.
    elsewhere: Handle<akv_cache>,
    cells: Handle<akv_cache>,
    mask: Handle<akv_mask>,
    batch: Handle<akv_batch>,
    /// The first is long, the second its fork, the third short; then many small ones.
    sequences: Vec<akv_sequence>,
    many_layers: Vec<akv_layer_desc>,
    many_spans: Vec<akv_span>,
    tokens: Vec<Token>,
    /// What the operation makes.
    made: akv_sequence,
    handle: usize,
    key: Packed,
    value: Packed,
    q: Packed,
    out: Packed,
    lse: Vec<f32>,
    /// Of a step.
    n_new: Vec<i32>,
    n_q: Vec<i32>,
    /// An exported sequence.
    bytes: Vec<u8>,
    frequencies: [Vec<f32>; 2],
}

/// An operation: what comes before it, itself, and what takes it back.
struct Operation {
    name: &'static str,
    prepare: fn(&mut Scene),
    call: fn(&mut Scene) -> akv_status,
    undo: fn(&mut Scene),
    /// It must come through whatever fails.
    always: bool,
    /// A batch or a cache may keep the scratch memory that it took for the call.
    scratch: bool,
}

#[track_caller]
fn ok(status: akv_status) {
    assert_eq!(status, AKV_OK, "{}: {}", name(status), last_error());
}

const MANY: usize = 60;

impl Scene {
    fn new(hooks: &'static Hooks) -> Scene {
        let setup = Setup::kind(0, 200, 1000);
        let context = context(0, hooks);
        let [cache, elsewhere] = [(); 2].map(|()| setup.cache(context)).map(|(status, cache)| {
            ok(status);
            cache
        });
        let (mut cells, mut mask) = (null_mut(), null_mut());
        let desc = akv_cache_desc {
            struct_size: size::<akv_cache_desc>(),
            placement: AKV_SLOTS,
            n_layers: 2,
            layers: setup.layers.as_ptr(),
            n_slots: CELLS as u64,
            ..zeroed()
        };
        // Masks say it, not windows.
        let layers: Vec<_> = setup.layers.iter().map(|l| akv_layer_desc { window: 0, ..*l }).collect();
        let desc = akv_cache_desc { layers: layers.as_ptr(), ..desc };
        // SAFETY: valid descriptors and outputs.
        unsafe {
            ok(akv_cache_create(context.0, &desc, &mut cells));
            ok(akv_mask_create(context.0, 4, CELLS, &mut mask));
        }
        let (status, batch) = batch(cache, 1, 4000);
        ok(status);
        let mut scene = Scene {
            hooks,
            setup,
            context,
            cache,
            elsewhere,
            cells: Handle(cells),
            mask: Handle(mask),
            batch,
            sequences: Vec::new(),
            many_layers: (0..100).map(|i| layers[i % 2]).collect(),
            many_spans: vec![akv_span { stream: 0, n_q: 1, n_kv: 150 }; 300],
            tokens: new_tokens(&mut Dice::Seeded(7), 1200, None).0,
            made: 0,
            handle: 0,
            key: Packed::default(),
            value: Packed::default(),
            q: Packed::default(),
            out: Packed::default(),
            lse: Vec::new(),
            n_new: Vec::new(),
            n_q: Vec::new(),
            bytes: Vec::new(),
            frequencies: [0, 1].map(|i| frequencies(layers[i].dim_k)),
        };
        let long = scene.create();
        scene.sequences.push(long);
        scene.grow(&[330]);
        let fork = scene.fork(long, 200);
        scene.sequences.push(fork);
        for _ in 0..MANY {
            let id = scene.create();
            scene.sequences.push(id);
        }
        let mut n_new = vec![1; 2 + MANY];
        (n_new[0], n_new[1], n_new[2]) = (0, 0, 5);
        scene.grow(&n_new);
        let slots: Vec<i64> = (0..CELLS).filter(|i| i % 3 != 1).collect();
        for layer in 0..2 {
            scene.rows(layer, slots.len());
            ok(scene.write_cells(layer, &slots));
        }
        let hidden = vec![0u16; 4 * CELLS as usize];
        // SAFETY: rows of that size.
        ok(unsafe { akv_mask_set(scene.mask.0, 0, 4, CELLS, hidden.as_ptr().cast(), 0, null_mut()) });
        scene.rows(0, 8);
        scene.outputs(0, 64);
        scene
    }

    fn create(&self) -> akv_sequence {
        let mut id = 0;
        // SAFETY: a handle and an output.
        ok(unsafe { akv_sequence_create(self.cache.0, &mut id) });
        id
    }

    fn fork(&self, of: akv_sequence, n: i64) -> akv_sequence {
        let mut id = 0;
        // SAFETY: a handle and an output.
        ok(unsafe { akv_sequence_fork(self.cache.0, of, n, &mut id) });
        id
    }

    fn destroy(&self, id: akv_sequence) {
        // SAFETY: a handle.
        ok(unsafe { akv_sequence_destroy(self.cache.0, id) });
    }

    /// Rows of `n` tokens.
    fn rows(&mut self, layer: usize, n: usize) {
        let shape = self.setup.layers[layer];
        for (part, to) in [(Part::K, &mut self.key), (Part::V, &mut self.value)] {
            let (dtype, dim) = dtype_dim(&shape, part);
            to.resize(n * shape.n_kv_heads as usize * dim, dtype);
            to.put(0, &self.tokens[..n], layer, &shape, part);
        }
    }

    /// Queries of `n` rows, and memory for their outputs.
    fn outputs(&mut self, layer: usize, n: usize) {
        let shape = self.setup.layers[layer];
        let heads = shape.n_q_heads as usize;
        self.q.resize(n * heads * shape.dim_k as usize, AKV_F32);
        for i in 0..n * heads * shape.dim_k as usize {
            self.q.set(i, (mix(i as u64) % 200) as f32 / 100.0 - 1.0);
        }
        self.out.resize(n * heads * shape.dim_v as usize, AKV_F32);
        self.lse = vec![7.0; n * heads];
    }

    fn begin(&mut self, n_new: &[i32], n_q: &[i32]) -> akv_status {
        (self.n_new, self.n_q) = (n_new.to_vec(), n_q.to_vec());
        self.begin_again()
    }

    fn begin_again(&self) -> akv_status {
        let step = akv_batch_desc {
            struct_size: size::<akv_batch_desc>(),
            n_sequences: self.n_new.len() as u32,
            sequences: self.sequences.as_ptr(),
            n_new: self.n_new.as_ptr(),
            n_q: self.n_q.as_ptr(),
            ..zeroed()
        };
        // SAFETY: a handle, a descriptor with its arrays.
        unsafe { akv_batch_begin(self.batch.0, &step, null_mut()) }
    }

    fn append(&mut self, layer: usize) -> akv_status {
        let (key, value) = (self.key.rows(), self.value.rows());
        // SAFETY: a handle, and rows.
        unsafe { akv_quantize_kv(self.batch.0, layer as i32, &key, &value, null_mut()) }
    }

    fn append_all(&mut self) {
        let n = self.n_new.iter().sum::<i32>() as usize;
        for layer in 0..2 {
            self.rows(layer, n);
            ok(self.append(layer));
        }
    }

    fn grow(&mut self, n_new: &[i32]) {
        ok(self.begin(n_new, &vec![0; n_new.len()]));
        self.append_all();
        // SAFETY: a handle.
        ok(unsafe { akv_batch_commit(self.batch.0) });
    }

    fn abort(&mut self) {
        // SAFETY: a handle.
        ok(unsafe { akv_batch_abort(self.batch.0) });
    }

    fn write_cells(&mut self, layer: usize, slots: &[i64]) -> akv_status {
        let (key, value) = (self.key.rows(), self.value.rows());
        // SAFETY: a handle, and rows of as many cells.
        unsafe {
            akv_slots_write(self.cells.0, layer as i32, slots.as_ptr(), slots.len() as i64, &key, &value, null_mut())
        }
    }

    fn attention(&mut self) -> akv_attention_desc {
        akv_attention_desc {
            struct_size: size::<akv_attention_desc>(),
            q: self.q.rows(),
            out: self.out.rows(),
            lse: self.lse.as_mut_ptr(),
            ..zeroed()
        }
    }

    /// All that a call which fails must leave as it is.
    fn look(&mut self, scratch: bool) -> Vec<u64> {
        let mut seen = Vec::new();
        for cache in [self.cache, self.elsewhere, self.cells] {
            let u = usage(cache);
            let n = u64::from(u.n_sequences);
            let used = if scratch { 0 } else { u.bytes_used };
            seen.extend([n, used, u.bytes_kept, u.pages_used, u.pages_shared, u.tokens]);
        }
        let hash = |words: &[u64]| words.iter().fold(1, |h, &w| mix(h ^ w));
        let (mut key, mut value) = (Packed::default(), Packed::default());
        for layer in 0..2 {
            let shape = self.setup.layers[layer];
            for &id in &self.sequences {
                let mut len = 0;
                // SAFETY: a handle and an output.
                ok(unsafe { akv_sequence_length(self.cache.0, id, layer as i32, &mut len) });
                key.resize(len as usize * (shape.n_kv_heads * shape.dim_k) as usize, AKV_F32);
                value.resize(len as usize * (shape.n_kv_heads * shape.dim_v) as usize, AKV_F32);
                let (k, v) = (key.rows(), value.rows());
                // SAFETY: a handle, and room for the rows.
                ok(unsafe { akv_dequantize_kv(self.cache.0, id, layer as i32, 0, len, &k, &v, null_mut()) });
                seen.extend([len as u64, hash(key.words()), hash(value.words())]);
            }
            key.resize(CELLS as usize * (shape.n_kv_heads * shape.dim_k) as usize, AKV_F32);
            value.resize(CELLS as usize * (shape.n_kv_heads * shape.dim_v) as usize, AKV_F32);
            let (k, v) = (key.rows(), value.rows());
            // SAFETY: a handle, and room for the rows.
            ok(unsafe { akv_slots_read(self.cells.0, layer as i32, 0, CELLS, &k, &v, null_mut()) });
            seen.extend([hash(key.words()), hash(value.words())]);
        }
        seen.extend([hash(self.out.words()), self.made, self.handle as u64]);
        seen.extend(self.lse.iter().map(|x| u64::from(x.to_bits())));
        seen
    }

    /// Ends all; what is left of blocks.
    fn end(self) -> i64 {
        // SAFETY: handles that nobody uses any more, if they still live.
        unsafe {
            ok(akv_batch_destroy(self.batch.0));
            for cache in [self.cache, self.elsewhere, self.cells] {
                ok(akv_cache_destroy(cache.0));
            }
            ok(akv_mask_destroy(self.mask.0));
            ok(akv_context_destroy(self.context.0));
        }
        self.hooks.blocks.load(Relaxed)
    }
}

fn nothing(_: &mut Scene) {}

fn operations() -> Vec<Operation> {
    let op = |name: &'static str, prepare: fn(&mut Scene), call, undo: fn(&mut Scene)| Operation {
        name,
        prepare,
        call,
        undo,
        always: false,
        scratch: name.contains("attention"),
    };
    let all_of = |name, prepare: fn(&mut Scene), call: fn(&mut Scene) -> akv_status, undo: fn(&mut Scene)| Operation {
        always: true,
        ..op(name, prepare, call, undo)
    };
    fn destroy_made(s: &mut Scene) {
        s.destroy(s.made);
        s.made = 0;
    }
    fn new_cache(s: &mut Scene, placement: i32) -> akv_status {
        let (layers, n_slots) = (&s.many_layers, if placement == AKV_APPEND { 0 } else { 300 });
        let desc = akv_cache_desc {
            struct_size: size::<akv_cache_desc>(),
            placement,
            n_slots,
            n_layers: layers.len() as i32,
            layers: layers.as_ptr(),
            ..zeroed()
        };
        let mut out = null_mut();
        // SAFETY: a valid descriptor and output.
        let status = unsafe { akv_cache_create(s.context.0, &desc, &mut out) };
        s.handle = out as usize;
        status
    }
    fn destroy_cache(s: &mut Scene) {
        // SAFETY: a handle.
        ok(unsafe { akv_cache_destroy(s.handle as *mut _) });
        s.handle = 0;
    }
    /// Decode of all sequences but a prefill of the last one.
    fn mixed(s: &mut Scene) {
        s.n_new = vec![1; s.sequences.len()];
        *s.n_new.last_mut().unwrap() = 400;
        s.n_q = vec![1; s.sequences.len()];
    }
    fn begun(s: &mut Scene) {
        mixed(s);
        ok(s.begin_again());
        let n = s.n_new.iter().sum::<i32>() as usize;
        s.rows(0, n);
    }
    fn appended(s: &mut Scene) {
        mixed(s);
        ok(s.begin_again());
        s.append_all();
        s.outputs(1, 64);
    }
    fn forked(s: &mut Scene) {
        let id = s.fork(s.sequences[0], -1);
        s.sequences.push(id);
    }
    fn destroy_last(s: &mut Scene) {
        let id = s.sequences.pop().unwrap();
        s.destroy(id);
    }
    vec![
        op(
            "akv_context_create",
            nothing,
            |s| {
                let desc = akv_context_desc {
                    struct_size: size::<akv_context_desc>(),
                    abi_version: AKV_ABI_VERSION,
                    ..zeroed()
                };
                let mut out = null_mut();
                // SAFETY: a valid descriptor and output.
                let status = unsafe { akv_context_create(&desc, &mut out) };
                s.handle = out as usize;
                status
            },
            |s| {
                // SAFETY: a handle.
                ok(unsafe { akv_context_destroy(s.handle as *mut _) });
                s.handle = 0;
            },
        ),
        op("akv_cache_create", nothing, |s| new_cache(s, AKV_APPEND), destroy_cache),
        op("akv_cache_create of cells", nothing, |s| new_cache(s, AKV_SLOTS), destroy_cache),
        op(
            "akv_supports",
            nothing,
            |s| {
                let layers = &s.many_layers;
                let (struct_size, layers, n_layers) = (size::<akv_cache_desc>(), layers.as_ptr(), layers.len() as i32);
                let desc = akv_cache_desc { struct_size, n_layers, layers, ..zeroed() };
                // SAFETY: a valid descriptor.
                unsafe { akv_supports(s.context.0, &desc, null(), null_mut()) }
            },
            nothing,
        ),
        op(
            "akv_batch_create",
            nothing,
            |s| {
                let (status, batch) = batch(s.cache, 4, 100);
                s.handle = batch.0 as usize;
                status
            },
            |s| {
                // SAFETY: a handle.
                ok(unsafe { akv_batch_destroy(s.handle as *mut _) });
                s.handle = 0;
            },
        ),
        op(
            "akv_sequence_create",
            nothing,
            // SAFETY: a handle and an output.
            |s| unsafe { akv_sequence_create(s.cache.0, &mut s.made) },
            destroy_made,
        ),
        op(
            "akv_sequence_fork",
            nothing,
            // SAFETY: a handle and an output.
            |s| unsafe { akv_sequence_fork(s.cache.0, s.sequences[0], -1, &mut s.made) },
            destroy_made,
        ),
        op(
            "akv_sequence_fork into a tile",
            nothing,
            // SAFETY: a handle and an output.
            |s| unsafe { akv_sequence_fork(s.cache.0, s.sequences[0], 150, &mut s.made) },
            destroy_made,
        ),
        op(
            "akv_sequence_truncate",
            forked,
            // SAFETY: a handle.
            |s| unsafe { akv_sequence_truncate(s.cache.0, *s.sequences.last().unwrap(), 130) },
            destroy_last,
        ),
        op(
            "akv_sequence_truncate into the head",
            forked,
            // SAFETY: a handle.
            |s| unsafe { akv_sequence_truncate(s.cache.0, *s.sequences.last().unwrap(), 2) },
            destroy_last,
        ),
        op(
            "akv_sequence_remove",
            forked,
            // SAFETY: a handle.
            |s| unsafe { akv_sequence_remove(s.cache.0, *s.sequences.last().unwrap(), 20, 300) },
            destroy_last,
        ),
        op(
            "akv_sequence_shift",
            forked,
            |s| {
                let ropes = [rope(0, &s.frequencies[0]), rope(1, &s.frequencies[1])];
                let last = *s.sequences.last().unwrap();
                // SAFETY: a handle, a rope for each layer.
                unsafe { akv_sequence_shift(s.cache.0, last, 100, i64::MAX, 10, ropes.as_ptr()) }
            },
            destroy_last,
        ),
        op(
            "akv_sequence_reserve",
            forked,
            // SAFETY: a handle.
            |s| unsafe { akv_sequence_reserve(s.cache.0, *s.sequences.last().unwrap(), 300) },
            destroy_last,
        ),
        op(
            "akv_sequence_export",
            |s| s.bytes = Vec::with_capacity(1 << 20),
            |s| {
                s.bytes.clear();
                let user = (&raw mut s.bytes).cast();
                // SAFETY: a handle, a function with its pointer: the vector has room.
                unsafe { akv_sequence_export(s.cache.0, s.sequences[0], null(), Some(collect), user) }
            },
            nothing,
        ),
        op(
            "akv_sequence_import",
            |s| {
                let user = (&raw mut s.bytes).cast();
                // SAFETY: a handle, a function with its pointer.
                ok(unsafe { akv_sequence_export(s.cache.0, s.sequences[0], null(), Some(collect), user) });
            },
            |s| {
                let mut reading = Reading { bytes: &s.bytes, ..Reading::default() };
                // SAFETY: a handle, a function with its pointer, an output.
                unsafe { akv_sequence_import(s.cache.0, 0, Some(read), (&raw mut reading).cast(), &mut s.made) }
            },
            destroy_made,
        ),
        op(
            "akv_sequence_copy",
            nothing,
            // SAFETY: handles and an output.
            |s| unsafe { akv_sequence_copy(s.cache.0, s.sequences[0], s.elsewhere.0, &mut s.made) },
            |s| {
                // SAFETY: a handle.
                ok(unsafe { akv_sequence_destroy(s.elsewhere.0, s.made) });
                s.made = 0;
            },
        ),
        op(
            "akv_sequence_copy of what has been removed from, beside it",
            |s| {
                forked(s);
                // SAFETY: a handle.
                ok(unsafe { akv_sequence_remove(s.cache.0, *s.sequences.last().unwrap(), 20, 300) });
            },
            // SAFETY: handles and an output.
            |s| unsafe { akv_sequence_copy(s.cache.0, *s.sequences.last().unwrap(), s.cache.0, &mut s.made) },
            |s| {
                destroy_made(s);
                destroy_last(s);
            },
        ),
        op("akv_batch_begin", mixed, |s| s.begin_again(), Scene::abort),
        op("akv_quantize_kv", begun, |s| s.append(0), Scene::abort),
        op(
            "akv_aligned_attention",
            appended,
            |s| {
                let desc = s.attention();
                // SAFETY: a handle, a descriptor with its arrays.
                unsafe { akv_aligned_attention(s.batch.0, 1, &desc) }
            },
            Scene::abort,
        ),
        op(
            "akv_aligned_attention, exact",
            appended,
            |s| {
                let desc = akv_attention_desc { mode: AKV_EXACT, ..s.attention() };
                // SAFETY: a handle, a descriptor with its arrays.
                unsafe { akv_aligned_attention(s.batch.0, 1, &desc) }
            },
            Scene::abort,
        ),
        op(
            "akv_batch_commit",
            |s| {
                let all = std::mem::take(&mut s.sequences);
                let (a, b) = (s_fork(s, all[0]), s_fork(s, all[1]));
                s.sequences = [vec![a, b], all].concat();
                ok(s.begin(&[300, 64], &[1, 1]));
                s.append_all();
            },
            // SAFETY: a handle.
            |s| unsafe { akv_batch_commit(s.batch.0) },
            |s| {
                for _ in 0..2 {
                    let id = s.sequences.remove(0);
                    s.destroy(id);
                }
            },
        ),
        all_of(
            "akv_batch_abort",
            begun,
            // SAFETY: a handle.
            |s| unsafe { akv_batch_abort(s.batch.0) },
            nothing,
        ),
        all_of(
            "akv_sequence_destroy",
            |s| s.made = s.fork(s.sequences[0], 150),
            |s| {
                // SAFETY: a handle.
                let status = unsafe { akv_sequence_destroy(s.cache.0, s.made) };
                s.made = 0;
                status
            },
            nothing,
        ),
        op(
            "akv_dequantize_kv",
            |s| s.rows(0, 100),
            |s| {
                let (k, v) = (s.key.rows(), s.value.rows());
                // SAFETY: a handle, and room for the rows.
                unsafe { akv_dequantize_kv(s.cache.0, s.sequences[0], 0, 3, 100, &k, &v, null_mut()) }
            },
            nothing,
        ),
        op(
            "akv_cache_usage, akv_sequence_length",
            nothing,
            |s| {
                let (mut len, mut u) = (0, akv_usage { struct_size: size::<akv_usage>(), ..zeroed() });
                // SAFETY: handles and outputs.
                unsafe {
                    match akv_cache_usage(s.cache.0, &mut u) {
                        AKV_OK => akv_sequence_length(s.cache.0, s.sequences[0], 0, &mut len),
                        status => status,
                    }
                }
            },
            nothing,
        ),
        op(
            "akv_merge_states",
            nothing,
            |s| {
                let (mut a, mut b) = ([0.5f32; 4 * 16], [0.25f32; 4 * 16]);
                let (mut x, mut y) = ([0.0f32; 4], [1.0f32; 4]);
                let states: [akv_state; 100] = std::array::from_fn(|i| match i % 2 {
                    0 => akv_state { out: a.as_mut_ptr(), lse: x.as_mut_ptr(), ..zeroed() },
                    _ => akv_state { out: b.as_mut_ptr(), lse: y.as_mut_ptr(), ..zeroed() },
                });
                // Into the first of them, which is ours.
                // SAFETY: a handle, and arrays of that size.
                unsafe { akv_merge_states(s.context.0, states.as_ptr(), 100, 2, 2, 16, &states[0], null_mut()) }
            },
            nothing,
        ),
        op(
            "akv_slots_write",
            |s| {
                s.rows(0, 5);
                let slots: Vec<_> = (0..5).collect();
                // Known rows first, so that writing them again changes nothing.
                ok(s.write_cells(0, &slots));
            },
            |s| s.write_cells(0, &[0, 1, 2, 3, 4]),
            nothing,
        ),
        op(
            "akv_slots_write that closes a tile",
            |s| {
                s.rows(0, 300);
                // The tile of the first cells has its rows kept no more.
                ok(s.write_cells(0, &(300..600).collect::<Vec<_>>()));
            },
            |s| s.write_cells(0, &[0, 300]),
            nothing,
        ),
        op(
            "akv_slots_read",
            |s| s.rows(0, 100),
            |s| {
                let (k, v) = (s.key.rows(), s.value.rows());
                // SAFETY: a handle, and room for the rows.
                unsafe { akv_slots_read(s.cells.0, 0, 3, 100, &k, &v, null_mut()) }
            },
            nothing,
        ),
        op(
            "akv_slots_attention",
            |s| s.outputs(1, 4),
            |s| {
                let spans = [akv_span { stream: 0, n_q: 2, n_kv: CELLS }, akv_span { stream: 0, n_q: 2, n_kv: 100 }];
                let desc = akv_attention_desc { mask: s.mask.0, ..s.attention() };
                // SAFETY: handles, a descriptor with its arrays.
                unsafe { akv_slots_attention(s.cells.0, 1, spans.as_ptr(), 2, &desc) }
            },
            nothing,
        ),
        op(
            "akv_slots_attention of many spans",
            |s| s.outputs(1, 300),
            |s| {
                let desc = s.attention();
                let spans = &s.many_spans;
                // SAFETY: handles, a descriptor with its arrays.
                unsafe { akv_slots_attention(s.cells.0, 1, spans.as_ptr(), spans.len() as i32, &desc) }
            },
            nothing,
        ),
        op(
            "akv_slots_copy",
            nothing,
            // From cells without rows to others.
            // SAFETY: a handle.
            |s| unsafe { akv_slots_copy(s.cells.0, -1, 1, 4, 1) },
            nothing,
        ),
        op(
            "akv_slots_invalidate",
            nothing,
            // SAFETY: a handle.
            |s| unsafe { akv_slots_invalidate(s.cells.0, -1, 1, 1) },
            nothing,
        ),
        op(
            "akv_slots_copy of rows",
            nothing,
            // Some of tiles whose rows are kept as given, some not, into all layers; a stretch that is no whole tile.
            // SAFETY: a handle.
            |s| unsafe { akv_slots_copy(s.cells.0, -1, 1, 301, 200) },
            nothing,
        ),
        op(
            "akv_mask_create",
            nothing,
            |s| {
                let mut out = null_mut();
                // SAFETY: a handle and an output.
                let status = unsafe { akv_mask_create(s.context.0, 64, 10_000, &mut out) };
                s.handle = out as usize;
                status
            },
            |s| {
                // SAFETY: a handle.
                ok(unsafe { akv_mask_destroy(s.handle as *mut _) });
                s.handle = 0;
            },
        ),
        op(
            "akv_mask_set",
            nothing,
            |s| {
                // Something is added to scores: for the first time.
                let values = [0x3c00u16; 4 * CELLS as usize];
                // SAFETY: rows of that size.
                unsafe { akv_mask_set(s.mask.0, 0, 4, CELLS, values.as_ptr().cast(), 0, null_mut()) }
            },
            nothing,
        ),
    ]
}

fn s_fork(s: &Scene, id: akv_sequence) -> akv_sequence {
    s.fork(id, -1)
}

/// What a failed allocation did to an operation, as the exit code of the process that tried it.
const NO_SUCH: u8 = 0;
const REFUSED: u8 = 1;
/// It came through without.
const RECOVERED: u8 = 2;
const WRONG: u8 = 3;

/// Lets the `n`th allocation of an operation fail, looks at everything, and ends the scene.
fn try_one(op: &Operation, n: u64, heap: bool, mut s: Scene) -> u8 {
    let counts = Counts::default();
    (op.prepare)(&mut s);
    let before = s.look(op.scratch);
    let (status, failed) = if heap {
        Heap::failing(n as i64, || (op.call)(&mut s))
    } else {
        let hooks = s.hooks;
        let calls = hooks.calls.load(Relaxed);
        hooks.fail_at.store(calls + n + 1, Relaxed);
        let status = (op.call)(&mut s);
        hooks.fail_at.store(0, Relaxed);
        (status, hooks.calls.load(Relaxed) > calls + n)
    };
    let wrong = |what: &str| {
        found(&counts.wrong_answers, 1, || format!("{}, allocation {n}: {what}: {}", op.name, last_error()));
    };
    let memory = status == AKV_E_MEMORY && failed && !op.always;
    if status != AKV_OK && !memory {
        wrong(&name(status));
        return WRONG;
    }
    if memory {
        if s.look(op.scratch) != before {
            wrong("something has changed");
        }
        let status = (op.call)(&mut s);
        if status != AKV_OK {
            wrong(&format!("{} when called again", name(status)));
            return WRONG;
        }
    }
    (op.undo)(&mut s);
    let left = s.end();
    if left != 0 {
        wrong(&format!("{left} blocks are left"));
    }
    match (failed, memory) {
        _ if counts.findings() > 0 => WRONG,
        (false, _) => NO_SUCH,
        (true, true) => REFUSED,
        (true, false) => RECOVERED,
    }
}

/// A word that a child process and its parent share.
fn shared_word() -> &'static AtomicU64 {
    // SAFETY: a fresh mapping, large enough, zeroed, and never unmapped.
    unsafe {
        let (protection, flags) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_SHARED | libc::MAP_ANONYMOUS);
        let p = libc::mmap(null_mut(), 4096, protection, flags, -1, 0);
        assert!(p != libc::MAP_FAILED);
        &*p.cast::<AtomicU64>()
    }
}

/// Runs `f` in a child; its exit code, or None if it was killed (by a signal, or because it took too long).
fn in_child(quiet: bool, f: impl FnOnce() -> u8) -> Option<u8> {
    // SAFETY: this process has one thread, so that a child of it may do anything.
    unsafe {
        let child = libc::fork();
        assert!(child >= 0, "no child");
        if child == 0 {
            libc::alarm(20);
            if quiet {
                libc::close(2);
            }
            let code = std::panic::catch_unwind(std::panic::AssertUnwindSafe(f)).unwrap_or(99);
            libc::_exit(i32::from(code));
        }
        let mut status = 0;
        libc::waitpid(child, &mut status, 0);
        libc::WIFEXITED(status).then(|| libc::WEXITSTATUS(status) as u8)
    }
}

/// Every allocation of every operation, from the caller's allocator and from the heap. Each is tried in a child process, on
/// the same scene.
fn allocations(hooks: &'static Hooks, counts: &Counts, verbose: bool) -> serde_json::Value {
    let size = shared_word();
    Heap::tell_failures(size);
    let mut scene = Some(Scene::new(hooks));
    let mut table = serde_json::Map::new();
    for op in operations() {
        let (mut refused, mut recovered, mut ended, mut largest) = ([0, 0], 0, 0, 0);
        for heap in [false, true] {
            // All of the first ones; of many, a sample.
            for n in std::iter::successors(Some(0), |n| Some(n + 1 + n / 32)) {
                size.store(0, Relaxed);
                // Only the child takes the scene away: its memory is a copy.
                let code = in_child(heap && !verbose, || scene.take().map_or(WRONG, |s| try_one(&op, n, heap, s)));
                add(&counts.operations, 1);
                if code == Some(NO_SUCH) {
                    break;
                }
                add(&counts.faults_injected, 1);
                add(&counts.leaks_checked, 1);
                match code {
                    Some(REFUSED) => refused[usize::from(heap)] += 1,
                    Some(RECOVERED) => recovered += 1,
                    None if heap => {
                        let bytes = size.load(Relaxed);
                        (ended, largest) = (ended + 1, bytes.max(largest));
                        let text = format!("{}: heap allocation {n} of {bytes} bytes ends the process", op.name);
                        if verbose {
                            println!("  {text}");
                        }
                        if bytes > SMALL || bytes == 0 {
                            found(&counts.crashes, 1, || text);
                        }
                    }
                    code => {
                        let heap = if heap { "heap" } else { "hook" };
                        found(&counts.wrong_answers, 1, || format!("{}, {heap} allocation {n}: {code:?}", op.name));
                    }
                }
            }
        }
        let [hook, heap] = refused;
        table.insert(
            op.name.to_owned(),
            json!({ "refused": hook, "refused_heap": heap, "recovered": recovered, "ended": ended, "ended_largest": largest }),
        );
    }
    scene.map(Scene::end);
    table.into()
}

/// A limit on memory that is reached somewhere in a step: all of it happens or nothing.
fn limits(hooks: &'static Hooks, counts: &Counts) {
    for format in 0..6 {
        let mut begun = 0;
        for max_bytes in (20_000..6_000_000).step_by(200_000) {
            let context = context(0, hooks);
            let setup = Setup { max_bytes, ..Setup::kind(format, 64, 600) };
            let (status, cache) = setup.cache(context);
            ok(status);
            let (status, batch) = batch(cache, 1, 0);
            ok(status);
            let mut ids = Vec::new();
            while ids.len() < 8 {
                let mut id = 0;
                // SAFETY: a handle and an output.
                match unsafe { akv_sequence_create(cache.0, &mut id) } {
                    AKV_OK => ids.push(id),
                    status => {
                        assert_eq!(status, AKV_E_CAPACITY, "{}", last_error());
                        break;
                    }
                }
            }
            let before = usage(cache);
            let n_new: Vec<i32> = (0..ids.len() as i32).map(|i| 1 + i * 40).collect();
            let step = akv_batch_desc {
                struct_size: size::<akv_batch_desc>(),
                n_sequences: ids.len() as u32,
                sequences: ids.as_ptr(),
                n_new: n_new.as_ptr(),
                ..zeroed()
            };
            if !ids.is_empty() {
                // SAFETY: a handle, a descriptor with its arrays.
                let status = unsafe { akv_batch_begin(batch.0, &step, null_mut()) };
                add(&counts.operations, 1);
                let after = usage(cache);
                let fits = after.bytes_reserved <= max_bytes;
                let same = (after.bytes_used, after.pages_used, after.bytes_kept)
                    == (before.bytes_used, before.pages_used, before.bytes_kept);
                match status {
                    AKV_OK if fits => begun += 1,
                    AKV_E_CAPACITY if fits && same => add(&counts.faults_injected, 1),
                    _ => found(&counts.wrong_answers, 1, || {
                        format!("max_bytes {max_bytes}: {}: {before:?}, then {after:?}", name(status))
                    }),
                }
            }
            // SAFETY: handles.
            unsafe {
                ok(akv_batch_destroy(batch.0));
                ok(akv_cache_destroy(cache.0));
                ok(akv_context_destroy(context.0));
            }
            add(&counts.leaks_checked, 1);
            let left = hooks.blocks.load(Relaxed);
            if left != 0 {
                found(&counts.leaks, left.unsigned_abs(), || format!("max_bytes {max_bytes}: {left} blocks are left"));
            }
        }
        assert!(begun > 2, "nothing ever fits");
    }
}

/// Callbacks that do what they must not, as far as that can be survived. Each in a child, since it may hang.
fn callbacks(hooks: &'static Hooks, counts: &Counts) {
    type Act = fn(Handle<akv_cache>, Handle<akv_batch>, akv_sequence);
    // From within an allocation of akv_batch_begin.
    let acts: [(&str, Act); 5] = [
        ("akv_cache_usage", |cache, _, _| _ = usage(cache)),
        // SAFETY: a handle, an output.
        ("akv_sequence_length", |cache, _, id| unsafe { _ = akv_sequence_length(cache.0, id, -1, &mut 0) }),
        // SAFETY: a handle.
        ("akv_sequence_truncate", |cache, _, id| unsafe { _ = akv_sequence_truncate(cache.0, id, 0) }),
        // SAFETY: a handle.
        ("akv_batch_commit", |_, batch, _| unsafe { _ = akv_batch_commit(batch.0) }),
        // SAFETY: a handle.
        ("akv_cache_destroy", |cache, _, _| unsafe { _ = akv_cache_destroy(cache.0) }),
    ];
    for (what, act) in acts {
        let code = in_child(false, || {
            let mut s = Scene::new(hooks);
            let (cache, batch, id) = (s.cache, s.batch, s.sequences[0]);
            let before = s.look(true); // tables may have grown
            *hooks.misbehave.lock() = Some(Box::new(move || act(cache, batch, id)));
            let status = s.begin(&[300, 1], &[1, 1]);
            if status == AKV_OK {
                s.abort();
            }
            u8::from(status != AKV_OK) + 2 * u8::from(s.look(true) != before) + 4 * u8::from(s.end() != 0)
        });
        add(&counts.operations, 1);
        add(&counts.faults_injected, 1);
        if code != Some(0) {
            found(&counts.wrong_answers, 1, || format!("{what} from within an allocation: {code:?}"));
        }
    }
}

fn main() -> ExitCode {
    // SAFETY: this process has one thread. Its children end in hundreds of ways; that is not worth a backtrace each.
    unsafe { std::env::set_var("RUST_BACKTRACE", "0") };
    let (mut json, mut verbose) = (None, false);
    let mut rest = std::env::args().skip(1);
    while let Some(argument) = rest.next() {
        match argument.as_str() {
            "--json" => json = rest.next(),
            "--verbose" => verbose = true,
            other => {
                eprintln!("faults: {other}: no such option");
                return ExitCode::from(2);
            }
        }
    }
    let hooks: &'static Hooks = Box::leak(Box::default());
    let counts = Counts::default();
    let table = allocations(hooks, &counts, verbose);
    limits(hooks, &counts);
    callbacks(hooks, &counts);
    let report = json!({
        "program": "faults", "operations": table, "counts": counts.json(), "findings": counts.findings(),
        "ended_at_most_bytes": SMALL,
    });
    println!("{report:#}");
    if let Some(path) = json
        && let Err(error) = std::fs::write(&path, format!("{report:#}\n"))
    {
        eprintln!("faults: {path}: {error}");
        return ExitCode::from(2);
    }
    ExitCode::from(u8::from(counts.findings() > 0))
}
