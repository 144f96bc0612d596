//! Bytes become operations, descriptors, streams. A target panics if the library does what it must not; that it neither
//! crashes nor hangs is for whoever runs it to see.

use crate::api::*;
use crate::counts::Counts;
use crate::dice::Dice;
use crate::memory::Hooks;
use crate::model::*;
use crate::stream::{Reading, collect, read};
use crate::traffic::{Plan, Plant, run, within};
use std::ffi::c_void;
use std::ptr::{null, null_mut};
use std::sync::OnceLock;

/// A target, by name.
pub type Target = (&'static str, fn(&[u8]));

/// All of them.
pub const TARGETS: [Target; 3] = [("operations", operations), ("descriptors", descriptors), ("import", import)];

fn hooks() -> &'static Hooks {
    thread_local!(static HOOKS: &'static Hooks = Box::leak(Box::default()));
    HOOKS.with(|hooks| *hooks)
}

/// Traffic over a small cache, all of it checked.
pub fn operations(data: &[u8]) {
    let mut dice = Dice::Bytes(data);
    let setup = Setup { n_threads: [0, 0, 0, 2][dice.below(4)], ..Setup::kind(dice.below(KINDS), 6, 300) };
    let plan = Plan {
        threads: 1,
        seed: dice.below(256) as u64,
        until: within(20.0),
        operations: 2000,
        fail_one_in: [0, 0, 20, 3][dice.below(4)],
        check_one_in: 1,
        plant: Plant::Nothing,
    };
    let counts = Counts::default();
    run(&setup, &plan, dice, hooks(), &counts);
    assert_eq!(counts.findings(), 0, "{}", counts.json());
}

// ---- descriptors ----------------------------------------------------------------------------------------------------

/// Values at which things happen.
fn odd(dice: &mut Dice) -> i64 {
    let few = dice.below(7) as i64;
    match dice.below(16) {
        0..8 => few,
        8 => -1,
        9 => dice.pick(&[16, 24, 64, 128, 256, 264, 127, 129]),
        10 => i64::from(i32::MAX) - few,
        11 => i64::from(i32::MIN) + few,
        12 => i64::MAX - few,
        13 => i64::MIN + few,
        14 => i64::from(u32::MAX) + 1 - few,
        _ => dice.bits() as i64,
    }
}

/// A small number most often, seldom a large one: of things that the call reads as many of as it says.
fn few(dice: &mut Dice) -> i64 {
    if dice.one_in(8) { -odd(dice).abs().max(1) } else { dice.below(9) as i64 }
}

fn float(dice: &mut Dice) -> f32 {
    match dice.below(8) {
        0..4 => 0.0,
        4 => 1.0,
        5 => dice.pick(&[-1.0, f32::NAN, f32::INFINITY, -f32::INFINITY, f32::MAX, f32::MIN_POSITIVE, 1e-30]),
        6 => dice.below(100) as f32 / 10.0,
        _ => f32::from_bits(dice.bits() as u32),
    }
}

/// Memory that any call below may read or write: no descriptor that is accepted asks for more.
struct Arena(Vec<Line>);

#[derive(Clone, Copy)]
#[repr(align(64))]
struct Line {
    _words: [u64; 8],
}

impl Arena {
    /// An address in its `part`, NULL, or a crooked one.
    fn pointer<T>(&mut self, dice: &mut Dice, part: usize) -> *mut T {
        let start = self.0[part * PART..].as_mut_ptr().cast::<u8>();
        match dice.below(16) {
            0 => null_mut(),
            1 => start.wrapping_add(1).cast(),
            2 => self.0.as_mut_ptr().cast(), // where others are, too
            _ => start.cast(),
        }
    }
}

const PARTS: usize = 24;
/// Lines of a part.
const PART: usize = 1 << 12;

fn struct_size<T>(dice: &mut Dice) -> u32 {
    if dice.one_in(10) { odd(dice) as u32 } else { size_of::<T>() as u32 }
}

/// A descriptor in memory as long as any size that is taken for one.
#[repr(C, align(8))]
struct Padded<T> {
    desc: T,
    tail: [u8; 4096],
}

fn padded<T>(dice: &mut Dice, desc: T) -> Padded<T> {
    let mut tail = [0; 4096];
    if dice.one_in(20) {
        tail[dice.below(64)] = 1;
    }
    Padded { desc, tail }
}

fn any_rows(dice: &mut Dice, arena: &mut Arena, part: usize) -> akv_rows {
    let stride = |dice: &mut Dice| match dice.below(8) {
        0..4 => 0,
        4 => -odd(dice).abs(),
        5 => dice.below(4096) as i64,
        6 => 512,
        // With a row behind it, more than there are addresses: what is less is taken at the caller's word.
        _ => i64::MAX - dice.below(16) as i64,
    };
    akv_rows {
        data: arena.pointer(dice, part),
        stride_row: stride(dice),
        stride_head: stride(dice),
        dtype: if dice.one_in(8) { odd(dice) as i32 } else { dice.below(3) as i32 },
        reserved: i32::from(dice.one_in(20)),
    }
}

/// What the library may never say.
fn sane(call: &str, status: akv_status) -> bool {
    assert!((AKV_E_INTERNAL..=AKV_OK).contains(&status), "{call}: status {status}");
    assert!(status != AKV_E_INTERNAL, "{call}: {}", last_error());
    assert!(status == AKV_OK || !last_error().is_empty(), "{call}: {} without a text", name(status));
    status == AKV_OK
}

fn any_layer(dice: &mut Dice) -> akv_layer_desc {
    let heads = [1, 2, 4][dice.below(3)];
    let mut layer = akv_layer_desc { n_q_heads: 4, n_kv_heads: heads, dim_k: 32, ..zeroed() };
    for _ in 0..dice.below(4) {
        let value = odd(dice) as i32;
        let field = match dice.below(11) {
            0 => &mut layer.n_q_heads,
            1 => &mut layer.n_kv_heads,
            2 => &mut layer.dim_k,
            3 => &mut layer.dim_v,
            4 => &mut layer.dtype_k,
            5 => &mut layer.dtype_v,
            6 => &mut layer.planes_k,
            7 => &mut layer.planes_v,
            8 => &mut layer.window,
            9 => &mut layer.group,
            _ => &mut layer.share_with,
        };
        *field = value;
    }
    // More heads than the arena has room for; far more are refused.
    for heads in [&mut layer.n_q_heads, &mut layer.n_kv_heads] {
        *heads = if (33..1 << 19).contains(heads) { 32 } else { *heads };
    }
    layer
}

/// Every descriptor with fields of any value, pointers that are NULL, crooked or real, sizes that no struct has.
pub fn descriptors(data: &[u8]) {
    thread_local!(static ARENA: std::cell::RefCell<Arena> = std::cell::RefCell::new(Arena(vec![Line { _words: [0; 8] }; PARTS * PART])));
    ARENA.with_borrow_mut(|arena| with_descriptors(&mut Dice::Bytes(data), arena));
}

fn with_descriptors(dice: &mut Dice, arena: &mut Arena) {
    let hooks = hooks();
    // What is asked for by mistake is not to be had.
    hooks.largest.store(1 << 24, std::sync::atomic::Ordering::Relaxed);
    let mut desc = akv_context_desc {
        struct_size: struct_size::<akv_context_desc>(dice),
        abi_version: AKV_ABI_VERSION,
        alloc: Some(crate::memory::hook_alloc),
        dealloc: Some(crate::memory::hook_dealloc),
        alloc_user: (&raw const *hooks).cast_mut().cast(),
        ..zeroed()
    };
    for _ in 0..dice.below(3) {
        let value = odd(dice) as i32;
        match dice.below(5) {
            0 => desc.abi_version = value as u32,
            1 => desc.backend = if value == AKV_CUDA { 0 } else { value },
            2 => desc.isa = value,
            3 => desc.n_threads = if (3..=1024).contains(&value) { 2 } else { value },
            _ => desc.dealloc = None,
        }
    }
    let desc = padded(dice, desc);
    let mut out = null_mut();
    // SAFETY: memory of any size that a descriptor may claim.
    let made = sane("context_create", unsafe { akv_context_create(&desc.desc, &mut out) });
    let context = if made { Handle(out) } else { context(0, hooks) };

    let n_layers = 1 + dice.below(3);
    let layers: Vec<_> = (0..n_layers).map(|_| any_layer(dice)).collect();
    let mut desc = akv_cache_desc {
        struct_size: struct_size::<akv_cache_desc>(dice),
        n_layers: n_layers as i32,
        layers: layers.as_ptr(),
        max_bytes: 1 << 26,
        ..zeroed()
    };
    if dice.one_in(2) {
        (desc.placement, desc.n_slots) = (1 + dice.below(2) as i32, 300);
    }
    for _ in 0..dice.below(4) {
        let value = odd(dice);
        match dice.below(12) {
            0 => desc.flags = value as u32,
            1 => desc.format = value as i32,
            2 => desc.placement = value as i32,
            3 => desc.nan_policy = value as i32,
            // Never more than there are, unless that is refused before they are looked at.
            4 => desc.n_layers = if value > n_layers as i64 { 5000 } else { value.max(-9) as i32 },
            5 => desc.layers = null(),
            6 => desc.max_sequences = value as u32,
            7 => desc.exact_head = value as u32,
            8 => desc.exact_tail = value as u32,
            9 => desc.n_streams = value as u32,
            10 => desc.n_slots = value as u64,
            _ => desc.max_bytes = dice.below(1 << 20) as u64 + 1,
        }
    }
    let desc = padded(dice, desc);
    let attention = any_attention(dice, arena, null());
    let attention = padded(dice, attention);
    let (mut out, mut path) = (null_mut(), 0);
    // SAFETY: descriptors as above; of `attention` only whether pointers are NULL is looked at.
    let (supported, made) = unsafe {
        let defaults = akv_supports(context.0, &desc.desc, null(), null_mut());
        sane("supports", akv_supports(context.0, &desc.desc, &attention.desc, &mut path));
        (sane("supports", defaults), sane("cache_create", akv_cache_create(context.0, &desc.desc, &mut out)))
    };
    assert!(supported || !made, "a cache that is not supported");
    if made {
        let cache = Handle(out);
        match desc.desc.placement {
            AKV_APPEND => sequences(dice, arena, context, cache),
            _ => cells(dice, arena, context, cache, desc.desc.placement),
        }
        // SAFETY: a handle.
        assert!(sane("cache_destroy", unsafe { akv_cache_destroy(cache.0) }));
    }
    states(dice, arena, context);
    // SAFETY: a handle.
    assert!(sane("context_destroy", unsafe { akv_context_destroy(context.0) }));
    assert_eq!(hooks.blocks.load(std::sync::atomic::Ordering::Relaxed), 0, "blocks are left");
    hooks.largest.store(0, std::sync::atomic::Ordering::Relaxed);
}

fn any_attention(dice: &mut Dice, arena: &mut Arena, threads: *const akv_threads) -> akv_attention_desc {
    let mut desc = akv_attention_desc {
        struct_size: struct_size::<akv_attention_desc>(dice),
        q: any_rows(dice, arena, 2),
        out: any_rows(dice, arena, 3),
        ..zeroed()
    };
    for _ in 0..dice.below(6) {
        match dice.below(20) {
            0 => desc.flags = odd(dice) as u32,
            1 => desc.scale = float(dice),
            2 => desc.logit_softcap = float(dice),
            3 => desc.tolerance = float(dice),
            4 => desc.mode = odd(dice) as i32,
            5 => desc.visibility = odd(dice) as i32,
            6 => desc.window = odd(dice) as i32,
            7 => desc.alibi_slopes = arena.pointer(dice, 4),
            8 => desc.sink_logits = arena.pointer(dice, 5),
            9 => desc.kv_from = arena.pointer(dice, 6),
            10 => desc.kv_to = arena.pointer(dice, 7),
            11 => desc.tree = arena.pointer(dice, 8),
            12 => desc.lse = arena.pointer(dice, 9),
            13 => desc.bound = arena.pointer(dice, 10),
            14 => desc.lse_bound = arena.pointer(dice, 11),
            15 => desc.estimate = arena.pointer(dice, 12),
            16 => desc.amplitude = arena.pointer(dice, 13),
            17 => desc.stats = arena.pointer(dice, 14),
            18 => desc.sink_tokens = odd(dice) as i32,
            _ => {
                desc.workspace = arena.pointer(dice, 15);
                // It ends where the arena does, at the latest.
                desc.workspace_bytes = dice.pick(&[0, 1, PART * 64, 4 * PART * 64]);
            }
        }
    }
    if dice.one_in(8) {
        desc.threads = threads;
    }
    if dice.one_in(30) {
        desc.stream = arena.pointer(dice, 16);
    }
    desc
}

fn any_threads(dice: &mut Dice) -> akv_threads {
    // Never more than this one: the others would be waited for.
    let mut threads = akv_threads { ith: 0, nth: 1, barrier: None, user: null_mut() };
    match dice.below(4) {
        0 => threads.ith = 1 + odd(dice).unsigned_abs() as i32 % 100,
        1 => threads.nth = -(odd(dice).unsigned_abs() as i32 % 100),
        2 => threads.nth = 2000,
        _ => {}
    }
    threads
}

fn sequences(dice: &mut Dice, arena: &mut Arena, context: Handle<akv_context>, cache: Handle<akv_cache>) {
    let mut bounds = akv_batch_desc { struct_size: struct_size::<akv_batch_desc>(dice), ..zeroed() };
    for _ in 0..dice.below(3) {
        let value = odd(dice);
        match dice.below(6) {
            0 => bounds.max_sequences = value as i32,
            1 => bounds.max_q = value as i32,
            2 => bounds.max_kv = value,
            3 => bounds.max_threads = value as i32,
            4 => bounds.n_sequences = value as u32,
            _ => bounds.reserved = value as i32,
        }
    }
    let bounds = padded(dice, bounds);
    let mut out = null_mut();
    // SAFETY: a handle, a descriptor as above, an output.
    let made = sane("batch_create", unsafe { akv_batch_create(cache.0, &bounds.desc, &mut out) });
    let batch = if made { Handle(out) } else { crate::api::batch(cache, 1, 1000).1 };
    let mut ids = [0u64; 4];
    for id in &mut ids {
        // SAFETY: a handle and an output.
        sane("sequence_create", unsafe { akv_sequence_create(cache.0, id) });
    }
    let (mut bytes, mut align) = (0, 0);
    // SAFETY: a handle and outputs.
    sane("batch_workspace", unsafe { akv_batch_workspace(batch.0, &mut bytes, &mut align) });
    for _ in 0..1 + dice.below(3) {
        let n = 1 + dice.below(3);
        let all: Vec<u64> = (0..n).map(|i| if dice.one_in(10) { dice.bits() } else { ids[i] }).collect();
        let n_new: Vec<i32> = (0..n).map(|_| few(dice).max(i32::MIN.into()) as i32).collect();
        let n_q: Vec<i32> = (0..n).map(|_| few(dice).max(i32::MIN.into()) as i32).collect();
        let positions: Vec<i64> = (0..64).map(|i| if dice.one_in(12) { odd(dice) } else { i }).collect();
        let mut desc = akv_batch_desc {
            struct_size: struct_size::<akv_batch_desc>(dice),
            n_sequences: n as u32,
            sequences: all.as_ptr(),
            n_new: n_new.as_ptr(),
            ..zeroed()
        };
        match dice.below(8) {
            0 => desc.n_q = n_q.as_ptr(),
            1 => desc.positions = positions.as_ptr(),
            2 => desc.sequences = null(),
            3 => desc.max_kv = odd(dice),
            4 => desc.reserved = odd(dice) as i32,
            5 => desc.n_sequences = 0,
            _ => {}
        }
        let desc = padded(dice, desc);
        // SAFETY: a handle, a descriptor whose arrays are as long as it says.
        let begun = sane("batch_begin", unsafe { akv_batch_begin(batch.0, &desc.desc, null_mut()) });
        let (key, value) = (any_rows(dice, arena, 0), any_rows(dice, arena, 1));
        let threads = any_threads(dice);
        let attention = any_attention(dice, arena, &threads);
        let attention = padded(dice, attention);
        let layer = few(dice) as i32;
        // SAFETY: handles, and memory that suffices for whatever is accepted.
        unsafe {
            sane("quantize_kv", akv_quantize_kv(batch.0, layer, &key, &value, null_mut()));
            sane("attention", akv_aligned_attention(batch.0, layer, &attention.desc));
            let end = if dice.one_in(2) { akv_batch_commit(batch.0) } else { akv_batch_abort(batch.0) };
            sane("end of a step", end);
            let status = akv_batch_abort(batch.0);
            assert!(sane("abort", status) || !begun);
        }
        let (first, n) = (odd(dice), few(dice));
        let mut id = 0;
        // SAFETY: handles, and memory that suffices for whatever is accepted.
        unsafe {
            sane("dequantize", akv_dequantize_kv(cache.0, ids[0], layer, first, n, &key, &value, null_mut()));
            sane("truncate", akv_sequence_truncate(cache.0, ids[1], odd(dice)));
            if sane("fork", akv_sequence_fork(cache.0, ids[0], odd(dice), &mut id)) {
                assert!(sane("destroy", akv_sequence_destroy(cache.0, id)));
            }
            let mut length = 0;
            sane("length", akv_sequence_length(cache.0, ids[2], odd(dice) as i32, &mut length));
            sane("remove", akv_sequence_remove(cache.0, ids[0], odd(dice), odd(dice)));
            sane("shift", akv_sequence_shift(cache.0, ids[0], odd(dice), odd(dice), odd(dice), null()));
        }
    }
    // Into this cache, one of other layers most often, or none.
    let (status, other) = Setup::kind(dice.below(KINDS), 4, 300).cache(context);
    assert_eq!(status, AKV_OK, "{}", last_error());
    for from in ids {
        let (to, mut id) = (dice.pick(&[cache, cache, other, Handle(batch.0.cast())]), 0);
        // SAFETY: handles or none, and an output.
        unsafe {
            if sane("copy", akv_sequence_copy(cache.0, from, to.0, &mut id)) {
                assert!(sane("destroy", akv_sequence_destroy(to.0, id)));
            }
        }
    }
    // SAFETY: handles.
    unsafe {
        assert!(sane("cache_destroy", akv_cache_destroy(other.0)));
        assert!(sane("batch_destroy", akv_batch_destroy(batch.0)));
    }
}

fn cells(dice: &mut Dice, arena: &mut Arena, context: Handle<akv_context>, cache: Handle<akv_cache>, placement: i32) {
    let mut mask = null_mut();
    let (rows, kv) = (odd(dice), odd(dice));
    // SAFETY: a handle and an output.
    if rows > 64 || kv > 5000 || !sane("mask_create", unsafe { akv_mask_create(context.0, rows, kv, &mut mask) }) {
        // SAFETY: a handle and an output.
        assert!(sane("mask_create", unsafe { akv_mask_create(context.0, 8, 300, &mut mask) }));
    }
    for _ in 0..1 + dice.below(3) {
        let slots: Vec<i64> = (0..16).map(|i| if dice.one_in(10) { odd(dice) } else { i * 7 }).collect();
        let (key, value) = (any_rows(dice, arena, 0), any_rows(dice, arena, 1));
        let layer = few(dice) as i32;
        let n = few(dice);
        let threads = any_threads(dice);
        let mut desc = any_attention(dice, arena, &threads);
        if dice.one_in(2) {
            desc.mask = mask;
        }
        let attention = padded(dice, desc);
        let spans: Vec<akv_span> =
            (0..3).map(|_| akv_span { stream: few(dice) as i32, n_q: few(dice) as i32, n_kv: odd(dice) }).collect();
        let n_kv = dice.pick(&[0, 1, 127, 128, 129, 300, -1, i64::MAX]);
        let stride = dice.pick(&[0, 0, 600, 601, -2, i64::MAX]);
        // SAFETY: handles, and memory that suffices for whatever is accepted. Attached rows are only named where the arena
        // is large enough for all cells, which contiguous rows of the layers above are not always: not at all.
        unsafe {
            if placement == AKV_SLOTS {
                let keys = if dice.one_in(4) { null() } else { &raw const key };
                sane("slots_write", akv_slots_write(cache.0, layer, slots.as_ptr(), n, keys, &value, null_mut()));
                sane("slots_read", akv_slots_read(cache.0, layer, odd(dice), few(dice), &key, &value, null_mut()));
                sane("slots_copy", akv_slots_copy(cache.0, layer - 1, odd(dice), odd(dice), odd(dice)));
            } else {
                sane("slots_write", akv_slots_write(cache.0, layer, slots.as_ptr(), n, null(), null(), null_mut()));
                sane("attach_rows", akv_attach_rows(cache.0, layer, &akv_rows { data: null_mut(), ..key }, &value));
            }
            let mask_rows = arena.0[20 * PART..].as_ptr().cast::<c_void>();
            sane("mask_set", akv_mask_set(mask, odd(dice), few(dice), n_kv, mask_rows, stride, null_mut()));
            sane("slots_attention", akv_slots_attention(cache.0, layer, spans.as_ptr(), 3, &attention.desc));
            sane("slots_invalidate", akv_slots_invalidate(cache.0, layer - 1, odd(dice), odd(dice)));
            let (mut bytes, mut align) = (0, 0);
            sane("workspace", akv_slots_workspace(cache.0, odd(dice), odd(dice) as i32, &mut bytes, &mut align));
        }
    }
    // SAFETY: a handle.
    assert!(sane("mask_destroy", unsafe { akv_mask_destroy(mask) }));
}

fn states(dice: &mut Dice, arena: &mut Arena, context: Handle<akv_context>) {
    let mut state = |dice: &mut Dice, part: usize| akv_state {
        out: arena.pointer(dice, part),
        lse: arena.pointer(dice, part + 1),
        bound: if dice.one_in(2) { null_mut() } else { arena.pointer(dice, part + 2) },
        lse_bound: null_mut(),
        estimate: null_mut(),
        amplitude: null_mut(),
    };
    let all = [state(dice, 0), state(dice, 3), state(dice, 6)];
    let out = state(dice, 9);
    let (n, rows, heads, dim) = (dice.below(4) as i32 - i32::from(dice.one_in(9)), few(dice), few(dice), odd(dice));
    // SAFETY: a handle, and arrays that suffice for whatever is accepted: at most 8 * 8 * 256 floats each.
    unsafe {
        let (heads, dim) = (heads as i32, dim as i32);
        sane("merge_states", akv_merge_states(context.0, all.as_ptr(), n, rows, heads, dim, &out, null_mut()));
    }
}

// ---- streams --------------------------------------------------------------------------------------------------------

/// A stream of a sequence of each kind of cache.
fn streams() -> &'static [Vec<u8>] {
    static STREAMS: OnceLock<Vec<Vec<u8>>> = OnceLock::new();
    STREAMS.get_or_init(|| {
        let export = |kind: usize| {
            let setup = Setup::kind(kind, 4, 400);
            let context = context(0, hooks());
            let (status, cache) = setup.cache(context);
            assert_eq!(status, AKV_OK, "{}", last_error());
            let id = filled(&setup, cache, 140);
            let mut bytes = Vec::new();
            // SAFETY: handles, a function with its pointer.
            unsafe {
                let user = (&raw mut bytes).cast();
                let status = akv_sequence_export(cache.0, id, null(), Some(collect), user);
                assert_eq!(status, AKV_OK, "{}", last_error());
                akv_cache_destroy(cache.0);
                akv_context_destroy(context.0);
            }
            bytes
        };
        (0..KINDS).map(export).collect()
    })
}

fn filled(setup: &Setup, cache: Handle<akv_cache>, n: usize) -> akv_sequence {
    let (tokens, _) = new_tokens(&mut Dice::Seeded(3), n, None);
    let positions: Vec<i64> = tokens.iter().map(|t| t.position).collect();
    let (status, batch) = batch(cache, 1, 0);
    assert_eq!(status, AKV_OK, "{}", last_error());
    let (mut id, n_new, n_q) = (0, n as i32, 0);
    let mut steps = Vec::new();
    // SAFETY: handles, descriptors with their arrays, rows of n tokens.
    unsafe {
        steps.push(akv_sequence_create(cache.0, &mut id));
        let step = akv_batch_desc {
            struct_size: size::<akv_batch_desc>(),
            n_sequences: 1,
            sequences: &id,
            n_new: &n_new,
            n_q: &n_q,
            positions: positions.as_ptr(),
            ..zeroed()
        };
        steps.push(akv_batch_begin(batch.0, &step, null_mut()));
        for (i, shape) in setup.layers.iter().enumerate() {
            let (mut key, mut value) = (Packed::default(), Packed::default());
            for (part, to) in [(Part::K, &mut key), (Part::V, &mut value)] {
                let (dtype, dim) = dtype_dim(shape, part);
                to.resize(n * shape.n_kv_heads as usize * dim, dtype);
                to.put(0, &tokens, i, shape, part);
            }
            steps.push(akv_quantize_kv(batch.0, i as i32, &key.rows(), &value.rows(), null_mut()));
        }
        steps.push(akv_batch_commit(batch.0));
        steps.push(akv_batch_destroy(batch.0));
    }
    assert!(steps.iter().all(|&s| s == AKV_OK), "{}", last_error());
    id
}

/// Streams that are damaged, cut short, of another cache, or no streams at all. One that is taken is a sequence like any.
pub fn import(data: &[u8]) {
    let mut dice = Dice::Bytes(data);
    let (of, into) = (dice.below(KINDS), dice.below(KINDS));
    let into = if dice.one_in(4) { into } else { of };
    let mode = dice.below(8);
    let stream = &streams()[of];
    let mut changes = Vec::new();
    let (mut bytes, sealed) = (&stream[..], mode >= 4);
    match mode {
        0 => {
            // The bytes themselves.
            let Dice::Bytes(rest) = dice else { return };
            bytes = rest;
        }
        1 => bytes = &stream[..dice.below(1 << 16).min(stream.len())],
        _ => {
            while !dice.is_empty() && changes.len() < 64 {
                // Most of what matters is at the start.
                let at = if dice.one_in(2) { dice.below(256) } else { dice.bits() as usize % stream.len() };
                changes.push((at, dice.below(256) as u8));
            }
        }
    }
    let setup = Setup { max_bytes: 8 << 20, ..Setup::kind(into, 4, 400) };
    let context = context(0, hooks());
    let (status, cache) = setup.cache(context);
    assert_eq!(status, AKV_OK, "{}", last_error());
    // What is changed twice may be what it was.
    let change = |at: usize| changes.iter().filter(|c| c.0 == at).fold(0, |x, c| x ^ c.1);
    let intact = bytes.len() == stream.len() && mode != 0 && changes.iter().all(|c| change(c.0) == 0);
    let mut reading = Reading { bytes, changes, sealed, ..Reading::default() };
    let before = usage(cache);
    let mut id = 0;
    // SAFETY: handles, a function with its pointer.
    let taken = unsafe {
        let user = (&raw mut reading).cast();
        sane("import", akv_sequence_import(cache.0, 0, Some(read), user, &mut id))
    };
    if !taken {
        let after = usage(cache);
        assert_eq!((after.bytes_used, after.n_sequences), (before.bytes_used, 0), "a refused stream left something");
        assert!(!intact || of != into, "a stream that is right is refused: {}", last_error());
    } else {
        assert!(sealed || intact, "a damaged stream is taken");
        use_it(&setup, cache, id);
    }
    // SAFETY: handles.
    unsafe {
        assert!(sane("cache_destroy", akv_cache_destroy(cache.0)));
        assert!(sane("context_destroy", akv_context_destroy(context.0)));
    }
}

/// Whatever is in it: it attends, forks, is copied, is cut and goes on.
fn use_it(setup: &Setup, cache: Handle<akv_cache>, id: akv_sequence) {
    let mut length = 0;
    // SAFETY: a handle and an output.
    assert!(sane("length", unsafe { akv_sequence_length(cache.0, id, -1, &mut length) }));
    let shape = &setup.layers[0];
    let (mut q, mut out) = (Packed::default(), Packed::default());
    q.resize(shape.n_q_heads as usize * 256, AKV_F32);
    (0..shape.n_q_heads as usize * shape.dim_k as usize).for_each(|i| q.set(i, (i % 5) as f32 - 2.0));
    out.resize(shape.n_q_heads as usize * 256, AKV_F32);
    let (status, batch) = batch(cache, 1, 0);
    assert_eq!(status, AKV_OK, "{}", last_error());
    let (zero, one) = (0, i32::from(length > 0));
    let step = akv_batch_desc {
        struct_size: size::<akv_batch_desc>(),
        n_sequences: 1,
        sequences: &id,
        n_new: &zero,
        n_q: &one,
        ..zeroed()
    };
    let (mut fork, mut copy, mut bytes) = (0, 0, [Vec::<u8>::new(), Vec::new()]);
    // SAFETY: handles, descriptors with their arrays, outputs.
    unsafe {
        if sane("begin", akv_batch_begin(batch.0, &step, null_mut())) {
            for mode in [AKV_EXPECTED, AKV_GUARANTEED, AKV_EXACT] {
                let struct_size = size::<akv_attention_desc>();
                let desc = akv_attention_desc { struct_size, q: q.rows(), out: out.rows(), mode, ..zeroed() };
                sane("attention", akv_aligned_attention(batch.0, 0, &desc));
            }
            sane("commit", akv_batch_commit(batch.0));
        }
        sane("dequantize", akv_dequantize_kv(cache.0, id, 0, 0, 0, null(), null(), null_mut()));
        if sane("copy", akv_sequence_copy(cache.0, id, cache.0, &mut copy)) {
            for (id, to) in [id, copy].into_iter().zip(&mut bytes) {
                sane("export", akv_sequence_export(cache.0, id, null(), Some(collect), (&raw mut *to).cast()));
            }
            assert!(bytes[0] == bytes[1], "a copy is another sequence");
        }
        sane("fork", akv_sequence_fork(cache.0, id, -1, &mut fork));
        sane("truncate", akv_sequence_truncate(cache.0, id, length / 2));
        sane("truncate", akv_sequence_truncate(cache.0, id, 0));
        assert!(sane("batch_destroy", akv_batch_destroy(batch.0)));
        assert!(sane("destroy", akv_sequence_destroy(cache.0, id)));
    }
}
