//! Plain data of the C ABI: codes, handles, descriptors. Their documentation is the header's.
//!
//! Rules: descriptors start with `struct_size`; no padding anywhere; elements of arrays carry no `struct_size`; codes
//! from the caller are plain integers, never Rust enums. Sizes and offsets are asserted at the end, and in `ctests/`.

#![allow(non_camel_case_types, missing_docs)]

use std::ffi::{c_char, c_int, c_void};

/// # Version of the binary interface
/// Goes into `akv_context_desc.abi_version`; `akv_abi_version()` tells what the loaded library speaks.
pub const AKV_ABI_VERSION: u32 = 1;

/// Result of a call: `AKV_OK` (0) or a negative code. The list only ever grows at its end.
pub type akv_status = i32;
/// # Status codes
/// Done.
pub const AKV_OK: akv_status = 0;
/// An argument breaks a documented rule; `akv_last_error` names it.
pub const AKV_E_ARGUMENT: akv_status = -1;
/// Valid, but not built yet, or not on this machine.
pub const AKV_E_UNSUPPORTED: akv_status = -2;
/// The allocator returned NULL.
pub const AKV_E_MEMORY: akv_status = -3;
/// A limit that the caller set is reached: `max_bytes`, `max_sequences`, the bounds of a batch.
pub const AKV_E_CAPACITY: akv_status = -4;
/// A handle or sequence id that is dead, or belongs to another object, or to another copy of the library.
pub const AKV_E_HANDLE: akv_status = -5;
/// NaN or infinity in K, V or q.
pub const AKV_E_NONFINITE: akv_status = -6;
/// A finite value that the format cannot hold (magnitude above about 3e10), or that an output's dtype cannot.
pub const AKV_E_RANGE: akv_status = -7;
/// In use in a way that excludes this call: nothing waited, nothing changed, try again later.
pub const AKV_E_BUSY: akv_status = -8;
/// Imported bytes are damaged.
pub const AKV_E_CORRUPT: akv_status = -9;
/// A struct or file of another version: wrong `abi_version`, or bytes set beyond the struct that this version knows.
pub const AKV_E_VERSION: akv_status = -10;
/// The device or its driver failed.
pub const AKV_E_DEVICE: akv_status = -11;
/// A bug in the library (a panic was stopped at the boundary); the objects of the call should be destroyed.
pub const AKV_E_INTERNAL: akv_status = -12;

/// # Element types of rows
/// IEEE binary32.
pub const AKV_F32: i32 = 0;
/// IEEE binary16.
pub const AKV_F16: i32 = 1;
/// bfloat16, the upper half of a binary32.
pub const AKV_BF16: i32 = 2;

/// # Backends: akv_context_desc.backend (0 = AKV_CPU), akv_stats.backend
/// The CPU.
pub const AKV_CPU: i32 = 1;
/// A CUDA device; AKV_E_UNSUPPORTED where there is no driver, or none that knows the device.
pub const AKV_CUDA: i32 = 2;

/// # Instruction sets: akv_context_desc.isa (0 = the best of this machine), akv_stats.isa
/// Portable code.
pub const AKV_ISA_SCALAR: i32 = 1;
/// x86-64 with AVX2, FMA and F16C.
pub const AKV_ISA_AVX2: i32 = 2;
/// x86-64 with AVX-512 F, BW, VL and VNNI.
pub const AKV_ISA_AVX512: i32 = 3;

/// # Ways that attention can take: akv_stats.path and akv_supports (sums)
/// Plane 0 of all keys first, then only the digits that matter.
pub const AKV_PATH_PROGRESSIVE: i32 = 1;
/// Every stored digit of every row: exact mode, long prefills, the raw format.
pub const AKV_PATH_DENSE: i32 = 2;
/// The criterion of the published AlignedKV scheme.
pub const AKV_PATH_PUBLISHED: i32 = 4;

/// # Storage formats: akv_cache_desc.format
/// Precision-aligned digit planes under shared scales.
pub const AKV_FORMAT_ALIGNED: i32 = 0;
/// AlignedKV as published (arXiv 2409.16546): f16 cut into 8 | 4 | 4 bits, lossless; for comparison.
/// K and V must be AKV_F16; its criterion takes no tolerance and gives no certificate.
pub const AKV_FORMAT_PUBLISHED: i32 = 1;
/// Rows as given, attended in f32: the exact baseline.
pub const AKV_FORMAT_RAW: i32 = 2;

/// # Placements: akv_cache_desc.placement
/// The library appends rows to sequences.
pub const AKV_APPEND: i32 = 0;
/// The engine's cells are the truth: rows are written to any cell.
pub const AKV_SLOTS: i32 = 1;
/// The engine keeps its own rows; the library has an index beside them: plane 0 of K, scales, and what tokens of which no
/// V is read stand for. Finer digits are read from the engine's rows.
pub const AKV_ATTACHED: i32 = 2;

/// # Modes: akv_attention_desc.mode
/// Errors of tokens add as if independent: the rms error of a channel stays near tolerance * A.
pub const AKV_EXPECTED: i32 = 0;
/// Error bounds add: `bound` itself stays within tolerance * A, as far as the stored planes can (below about
/// 3e-2 the rounding of codes and of q to 16 bits shows, and `bound` says so).
pub const AKV_GUARANTEED: i32 = 1;
/// All stored digits are read.
pub const AKV_EXACT: i32 = 2;

/// # Visibility: akv_attention_desc.visibility
/// A query row sees tokens at its own position and before.
pub const AKV_CAUSAL: i32 = 0;
/// A query row sees all tokens of its sequence.
pub const AKV_FULL: i32 = 1;

/// # NaN or infinity in K, V or q: akv_cache_desc.nan_policy
/// The call fails with AKV_E_NONFINITE; its text names sequence, layer, argument, row and head.
pub const AKV_NAN_ERROR: i32 = 0;
/// It spreads to what it touches: where a query row sees a token whose K or V has one on a KV head, all query heads of
/// that KV head get NaN as output, lse and amplitude, and infinity as bounds and estimate; where q has one, that row's
/// head does. The rest is as if these were 0. Read back, such rows are NaN. It costs 32 bytes per tile and KV head.
/// On the CPU, not with AKV_ATTACHED.
pub const AKV_NAN_PROPAGATE: i32 = 1;
/// It counts as 0, and is stored so. On the CPU, not with AKV_ATTACHED.
pub const AKV_NAN_ZERO: i32 = 2;

/// # RoPE pairings: akv_rope.pairing
/// Channels 2i and 2i + 1 turn together.
pub const AKV_ROPE_INTERLEAVED: i32 = 0;
/// Channels i and i + n_dims / 2 turn together.
pub const AKV_ROPE_HALVES: i32 = 1;

/// # For akv_cache_desc.exact_head and exact_tail
/// None at all (0 means the default).
pub const AKV_NONE: u32 = u32::MAX;

/// # Log levels: akv_log_fn
/// Something the caller should know of.
pub const AKV_LOG_WARN: i32 = 1;
/// What runs and where.
pub const AKV_LOG_INFO: i32 = 2;

/// A backend, its threads and its allocator. Everything else is made from one. May be used by any number of threads at
/// once.
pub struct akv_context {
    _opaque: (),
}
/// The KV rows of all sequences, for all layers of a model (or one, if the engine keeps one cache per layer). Calls on
/// different sequences may run at once; a sequence is read by any number of calls at once or written by one.
pub struct akv_cache {
    _opaque: (),
}
/// One model step at a time. Many calls may work on a step at once; it begins and ends while none does.
pub struct akv_batch {
    _opaque: (),
}
/// Who sees which cell, prepared once per graph (AKV_SLOTS and AKV_ATTACHED).
pub struct akv_mask {
    _opaque: (),
}

/// A sequence of a cache: index and generation, so that a stale id is noticed. 0 is never one. An id means nothing to
/// another cache.
pub type akv_sequence = u64;

/// Takes `n` bytes (at most 65536) that are being exported. Returns 0 to go on; anything else ends the export.
pub type akv_write_fn = Option<unsafe extern "C" fn(user: *mut c_void, bytes: *const c_void, n: usize) -> c_int>;
/// Fills `n` bytes (at most 65536) that are being imported; no byte beyond the stream's end is asked for. Returns 0 to go
/// on; anything else ends the import.
pub type akv_read_fn = Option<unsafe extern "C" fn(user: *mut c_void, bytes: *mut c_void, n: usize) -> c_int>;
/// Allocates `bytes` aligned to `align` (a power of two) for `backend` (AKV_CPU: host memory), or returns NULL.
/// `stream` is NULL for host memory. Called from any thread that calls the library; must not call back into it.
pub type akv_alloc_fn = Option<
    unsafe extern "C" fn(
        user: *mut c_void,
        bytes: usize,
        align: usize,
        backend: i32,
        stream: *mut c_void,
    ) -> *mut c_void,
>;
/// Takes back what `akv_alloc_fn` gave, with the same `bytes`. On CUDA, work that was launched may still be using device
/// memory: give it to others in the streams' order (cudaFree waits for that).
pub type akv_dealloc_fn =
    Option<unsafe extern "C" fn(user: *mut c_void, p: *mut c_void, bytes: usize, backend: i32, stream: *mut c_void)>;
/// Receives a line of text (valid during the call) at AKV_LOG_WARN or AKV_LOG_INFO. Must not call back into the
/// library.
pub type akv_log_fn = Option<unsafe extern "C" fn(user: *mut c_void, level: i32, text: *const c_char)>;
/// Returns when all `nth` threads of a call have entered it. No callback may throw or longjmp.
pub type akv_barrier_fn = Option<unsafe extern "C" fn(user: *mut c_void)>;

/// What a context is made of. Zeroed apart from `struct_size` and `abi_version`: CPU backend, best instruction set, no
/// threads, malloc, no log.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct akv_context_desc {
    /// sizeof(akv_context_desc).
    pub struct_size: u32,
    /// AKV_ABI_VERSION.
    pub abi_version: u32,
    /// AKV_CPU or AKV_CUDA; 0 = AKV_CPU. The environment variable AKV_BACKEND (cpu, cuda) overrides it, for tests.
    pub backend: i32,
    /// CUDA device ordinal; not used by AKV_CPU.
    pub device: i32,
    /// AKV_ISA_*; 0 = the best of this machine. The environment variable AKV_ISA (scalar, avx2, avx512) overrides it,
    /// for tests. One that this machine lacks is AKV_E_UNSUPPORTED, never replaced in silence.
    pub isa: i32,
    /// Threads that attention may use, the calling one included: 0 and 1 start none, n > 1 starts n - 1 workers that
    /// live as long as the context. They serve calls without `akv_threads`, one call at a time. At most 1024.
    pub n_threads: i32,
    /// CUcontext to use; NULL = the device's primary one. Not used by AKV_CPU.
    pub cuda_context: *mut c_void,
    /// Allocator of everything large (pages, kept rows, workspaces); NULL = the library's own. Both or neither. Must
    /// work for as long as the context lives.
    pub alloc: akv_alloc_fn,
    /// Its counterpart.
    pub dealloc: akv_dealloc_fn,
    /// Passed to both.
    pub alloc_user: *mut c_void,
    /// Where log lines go; NULL = nowhere.
    pub log: akv_log_fn,
    /// Passed to it.
    pub log_user: *mut c_void,
}

/// Shape of one layer's attention. An array element: fixed size.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct akv_layer_desc {
    /// Query heads: a multiple of n_kv_heads; query head h reads KV head h / (n_q_heads / n_kv_heads). Groups of
    /// up to 64 (128 where v_is_prefix_of_k).
    pub n_q_heads: i32,
    /// KV heads, 1 to 4096.
    pub n_kv_heads: i32,
    /// Channels of q and K (head_dim): a multiple of 8 from 16 to 256 (576 where v_is_prefix_of_k).
    pub dim_k: i32,
    /// Channels of V and of the output: a multiple of 8 from 16 to 256 (576 where v_is_prefix_of_k); 0 = dim_k.
    pub dim_v: i32,
    /// AKV_F32, AKV_F16 or AKV_BF16: element type of the K rows that will be appended.
    pub dtype_k: i32,
    /// The same of V.
    pub dtype_v: i32,
    /// Digit planes of K that are stored: 2, 3, 4; 0 = 4 (16 bits, relative error 3e-5). 2 halves the memory. Formats
    /// other than AKV_FORMAT_ALIGNED keep all: 0 or 4. AKV_ATTACHED keeps plane 0 alone, whatever this says.
    pub planes_k: i32,
    /// The same of V.
    pub planes_v: i32,
    /// Sliding window: a row at position p sees positions above p - window; 0 = none. 0 with AKV_SLOTS and AKV_ATTACHED,
    /// whose masks say it. On the CPU short windows, up to about 1024 tokens, take less time in AKV_FORMAT_RAW (a cache of
    /// their own), though it reads and keeps more bytes: `cargo bench --bench attention -- windows` measures both.
    pub window: i32,
    /// 0. (Kept for layers that share a page table, which are not built.)
    pub group: i32,
    /// 1 + index of an earlier layer whose KV rows this one reads; 0 = its own. That layer must have rows of its own
    /// and the same n_kv_heads, dims, dtypes, planes and v_is_prefix_of_k; n_q_heads and window may differ. A sharing
    /// layer has no pages: akv_quantize_kv is not called for it, and it may attend once the other's rows have been
    /// appended. AKV_APPEND on the CPU only.
    pub share_with: i32,
    /// 1: V is the first dim_v channels of K (MLA: K is the latent row with the RoPE channels behind it, q the absorbed
    /// query). K is stored once, akv_quantize_kv takes no value, dtype_v and planes_v are 0 or K's. Attention takes the
    /// dense path, which reads all stored planes of K. AKV_APPEND on the CPU only, not AKV_FORMAT_PUBLISHED. 0: V has
    /// rows of its own.
    pub v_is_prefix_of_k: i32,
}

/// What a cache is made of.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct akv_cache_desc {
    /// sizeof(akv_cache_desc).
    pub struct_size: u32,
    /// 0.
    pub flags: u32,
    /// AKV_FORMAT_*.
    pub format: i32,
    /// AKV_APPEND, AKV_SLOTS (not AKV_FORMAT_PUBLISHED) or AKV_ATTACHED (AKV_FORMAT_ALIGNED only).
    pub placement: i32,
    /// AKV_NAN_*.
    pub nan_policy: i32,
    /// Number of elements of `layers`, 1 to 4096.
    pub n_layers: i32,
    /// The layers; copied.
    pub layers: *const akv_layer_desc,
    /// Most sequences alive at once; 0 = 65536.
    pub max_sequences: u32,
    /// First tokens of every sequence (AKV_SLOTS and AKV_ATTACHED: first cells of every stream) whose rows are kept as
    /// given and attended exactly, since attention sinks would coarsen the scales of their tile: up to 128; 0 = 4,
    /// AKV_NONE = none. Only AKV_FORMAT_ALIGNED needs it.
    pub exact_head: u32,
    /// Truncating a sequence by at most this many tokens is as if they had never been appended, bit for bit: up to
    /// 128; 0 = 64, AKV_NONE = none. Only AKV_FORMAT_ALIGNED needs it.
    pub exact_tail: u32,
    /// Streams of AKV_SLOTS and AKV_ATTACHED, 1 to 65536; 0 = 1, and 0 with AKV_APPEND.
    pub n_streams: u32,
    /// Cells of a stream of AKV_SLOTS and AKV_ATTACHED, 1 to 2^31 - 1: cell c of stream s is slot s * n_slots + c. The
    /// memory of all is taken when the cache is made. 0 with AKV_APPEND.
    pub n_slots: u64,
    /// Most bytes the cache may take, page tables, staging and workspaces included; 0 = no limit.
    pub max_bytes: u64,
}

/// What a cache holds at the moment.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct akv_usage {
    /// sizeof(akv_usage), set by the caller.
    pub struct_size: u32,
    /// Sequences alive.
    pub n_sequences: u32,
    /// Bytes taken, from the allocator and for tables; what `max_bytes` limits.
    pub bytes_reserved: u64,
    /// Of these: in use by sequences and batches (the rest waits for reuse).
    pub bytes_used: u64,
    /// Of these: rows kept as given (exact head, open tiles, exact tail).
    pub bytes_kept: u64,
    /// Pages in use; a page is 128 tokens of one layer.
    pub pages_used: u64,
    /// Pages waiting for reuse.
    pub pages_free: u64,
    /// Pages that more than one sequence holds (counted once).
    pub pages_shared: u64,
    /// Committed tokens of all sequences that have not been removed, shared ones counted for each; cells with rows in a
    /// layer.
    pub tokens: u64,
}

/// A three-dimensional array `[row][head][dim]` in the caller's memory, `dim` contiguous. What it must hold is said by
/// the call that takes it. Not kept beyond the call, but by akv_attach_rows.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct akv_rows {
    /// Row 0, head 0; aligned to the element size. Only read where it is an input. May be NULL if there are no rows.
    pub data: *mut c_void,
    /// Bytes from a row to the next: a multiple of the element size, at least dim elements, never negative. Rows may
    /// lie inside heads (stride_row < stride_head) or heads inside rows, but not over each other. 0 = all heads of a
    /// row, then the next row.
    pub stride_row: i64,
    /// Bytes from a head to the next, likewise. 0 = dim elements.
    pub stride_head: i64,
    /// AKV_F32, AKV_F16 or AKV_BF16.
    pub dtype: i32,
    /// 0.
    pub reserved: i32,
}

/// Rotary position embedding of a layer, for `akv_sequence_shift`.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct akv_rope {
    /// AKV_ROPE_INTERLEAVED or AKV_ROPE_HALVES.
    pub pairing: i32,
    /// Channels that turn: even, at most dim_k.
    pub n_dims: i32,
    /// First of them.
    pub first_dim: i32,
    /// 0.
    pub reserved: i32,
    /// `[n_dims / 2]` radians per position, any scaling folded in.
    pub inv_freq: *const f32,
}

/// What of a sequence is exported. Zeroed apart from `struct_size`: everything.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct akv_export_desc {
    /// sizeof(akv_export_desc).
    pub struct_size: u32,
    /// 0.
    pub flags: u32,
    /// First layer.
    pub first_layer: i32,
    /// Layers; 0 = all from first_layer on.
    pub n_layers: i32,
    /// Digit planes of K, from the first, that the importing side will have: 2 to 4, with AKV_FORMAT_ALIGNED; 0 = all that
    /// are stored. Tiles whose rows are kept as given (the open one, and the exact tail's) are exported whole.
    pub planes_k: i32,
    /// The same of V.
    pub planes_v: i32,
    /// Digit planes of K that it has by an earlier export of the same tokens: only further ones are exported. 0 = none,
    /// and then known_v is 0, too.
    pub known_k: i32,
    /// The same of V.
    pub known_v: i32,
}

/// One model step, or (in akv_batch_create) the bounds of all steps that a batch will serve.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct akv_batch_desc {
    /// sizeof(akv_batch_desc).
    pub struct_size: u32,
    /// Sequences of this step; 0 in akv_batch_create.
    pub n_sequences: u32,
    /// `[n_sequences]`, each at most once.
    pub sequences: *const akv_sequence,
    /// `[n_sequences]` tokens that the step appends to each (0 allowed); NULL = 0 for all.
    pub n_new: *const i32,
    /// `[n_sequences]` query rows of each (0 allowed): its last n_q tokens, new or not; NULL = as n_new. Prefill and
    /// decode may mix. More than there are tokens: see akv_aligned_attention.
    pub n_q: *const i32,
    /// `[sum of n_new]` positions of the new tokens, sequence by sequence, never descending within a sequence (its
    /// older tokens included); NULL = consecutive from the last one. Causal visibility and windows go by them.
    pub positions: *const i64,
    /// Bound of n_sequences; 0 in akv_batch_begin, and 0 in akv_batch_create = no bound.
    pub max_sequences: i32,
    /// Bound of the sum of n_q; likewise.
    pub max_q: i32,
    /// Bound of a sequence's tokens after the step; likewise. At most 2^31 - 1.
    pub max_kv: i64,
    /// Bound of akv_threads.nth, at most 1024; 0 in akv_batch_begin, and 0 in akv_batch_create = the context's
    /// n_threads (at least 1).
    pub max_threads: i32,
    /// 0.
    pub reserved: i32,
}

/// The caller's own threads: `nth` of them make the same call with the same descriptor, each with its own `ith`, and
/// together do its work, in memory (`workspace`) that the caller gives. Every one returns the same status; when one
/// returns, others may still be at work: outputs are complete when all have. The bits of the result do not depend on
/// nth.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct akv_threads {
    /// Index of this thread, 0 to nth - 1.
    pub ith: i32,
    /// Number of threads.
    pub nth: i32,
    /// Barrier over all nth threads; may be NULL if nth is 1. If the arguments pass validation, which is the same in
    /// all threads, each of them enters it the same number of times, also when the call then fails.
    pub barrier: akv_barrier_fn,
    /// Passed to it.
    pub user: *mut c_void,
}

/// The cells that some query rows look at, in akv_slots_attention. An array element: fixed size.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct akv_span {
    /// Stream, 0 to n_streams - 1.
    pub stream: i32,
    /// Query rows.
    pub n_q: i32,
    /// They look at cells 0 to n_kv - 1 of the stream.
    pub n_kv: i64,
}

/// What an attention call read and how: numbers of this call, not sums over calls. Written on success only (with
/// `akv_threads` by the thread with ith 0).
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct akv_stats {
    /// Bytes of K read: digits, scale bytes and exact rows. A query row reads a KV head once for its whole GQA group;
    /// further query rows read it again.
    pub bytes_k: u64,
    /// The same of V.
    pub bytes_v: u64,
    /// Of both: scale bytes, and what else is stored once for a tile (its mean of V).
    pub bytes_scales: u64,
    /// Of both: rows kept as given (exact head).
    pub bytes_exact: u64,
    /// Tokens, per KV head and query row, of which 0 to 4 planes of K were read (none has 0). Exact rows are not here.
    pub planes_k: [u64; 5],
    /// The same of V.
    pub planes_v: [u64; 5],
    /// Tokens attended, summed over KV heads and query rows: elements of K are tokens * dim_k, of V tokens * dim_v.
    pub tokens: u64,
    /// Query rows that took the dense path.
    pub dense_rows: u64,
    /// AKV_CPU or AKV_CUDA.
    pub backend: i32,
    /// AKV_ISA_*.
    pub isa: i32,
    /// Sum of AKV_PATH_*.
    pub path: i32,
    /// 0.
    pub reserved: i32,
}

/// An attention call. Zeroed apart from `struct_size`, `q` and `out`: softmax of scaled dot products, causal, default
/// tolerance.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct akv_attention_desc {
    /// sizeof(akv_attention_desc).
    pub struct_size: u32,
    /// 0.
    pub flags: u32,
    /// Queries `[sum of n_q][n_q_heads][dim_k]`, sequence by sequence, after RoPE.
    pub q: akv_rows,
    /// Where the outputs `[sum of n_q][n_q_heads][dim_v]` go, in any dtype. A row that sees nothing gets zeros (and an
    /// lse of -inf). Outputs overlap neither each other nor q.
    pub out: akv_rows,
    /// Factor of the dot products, score = scale * (q . k); 0 = 1 / sqrt(dim_k).
    pub scale: f32,
    /// Cap c of the scores, c * tanh(score / c), before a mask is added; 0 = none. Not for AKV_FORMAT_PUBLISHED.
    pub logit_softcap: f32,
    /// Allowed error relative to A = sum over tokens of p * max|v|; 0 = 1e-3. Not used by AKV_EXACT, on the dense path
    /// and by AKV_FORMAT_PUBLISHED.
    pub tolerance: f32,
    /// AKV_EXPECTED, AKV_GUARANTEED or AKV_EXACT.
    pub mode: i32,
    /// AKV_CAUSAL or AKV_FULL.
    pub visibility: i32,
    /// Sliding window of this call; 0 = the layer's.
    pub window: i32,
    /// First tokens of a sequence that its rows see in spite of a window (attention sinks), on the CPU; 0 = none. Not
    /// for AKV_FORMAT_PUBLISHED.
    pub sink_tokens: i32,
    /// 0.
    pub reserved: i32,
    /// `[n_q_heads]`: factors of what `mask` adds; NULL = 1. Without a mask (ALiBi of sequences, on the CPU): to a score of
    /// head h, after the cap, is added alibi_slopes[h] times the distance, the token's position less the query row's;
    /// NULL = nothing. Not for AKV_FORMAT_PUBLISHED.
    pub alibi_slopes: *const f32,
    /// `[n_q_heads]`: score of a token more, whose value is 0; NULL = none. Device memory on CUDA. It counts in lse: of
    /// parts that are to be merged, give it to one. Not for AKV_FORMAT_PUBLISHED.
    pub sink_logits: *const f32,
    /// For akv_slots_attention: who sees what; NULL = every row sees all cells of its span.
    pub mask: *const akv_mask,
    /// `[sum of n_q]`: of what it would see, row r sees only tokens (by index, not position) from kv_from[r] on; NULL =
    /// 0 for all. What several calls see of parts of a context, akv_merge_states puts together.
    pub kv_from: *const i64,
    /// `[sum of n_q]`: and only those below kv_to[r]; NULL = no limit.
    pub kv_to: *const i64,
    /// `[sum of n_q]`, for speculative trees (on the CPU): of the last 64 tokens of its sequence, the step's new ones
    /// included, row r sees only those whose bit is set in tree[r], of what it would see. Bit 63 is the sequence's last
    /// token, bit 63 - i the token i before it; the row's own token has a bit like any other, bits of tokens that are not
    /// there do not count, and tokens before the last 64 are seen as ever. If the step's n new tokens (below 64) are a
    /// tree, each after its parent, then the row of node r sees what came before and the nodes j with bit j set in `path`
    /// by tree[r] = path << (64 - n) | UINT64_MAX >> n. NULL = none. Not for AKV_FORMAT_PUBLISHED.
    pub tree: *const u64,
    /// Each of the next five is NULL or `[sum of n_q][n_q_heads]` f32, contiguous, and feeds akv_merge_states.
    /// Log of the softmax's normaliser: log sum exp(score).
    pub lse: *mut f32,
    /// Certificate: no channel of the output is further than this from attention over the caller's own K, V and q in
    /// exact arithmetic. Float rounding inside the library is included, rounding to out's dtype is not. Infinite where
    /// no bound is claimed (AKV_FORMAT_PUBLISHED).
    pub bound: *mut f32,
    /// The same for lse.
    pub lse_bound: *mut f32,
    /// Root mean square error of a channel that is to be expected, if scores are known to a fraction of a nat. Where
    /// they are not (`lse_bound` of nats: huge scores, close to each other) it can be far too small; `bound` holds.
    pub estimate: *mut f32,
    /// A = sum over tokens of p * max|v|: what tolerance is relative to.
    pub amplitude: *mut f32,
    /// NULL, or where this call's statistics go: host memory, or device memory under CUDA.
    pub stats: *mut akv_stats,
    /// NULL = this thread alone, or the context's threads.
    pub threads: *const akv_threads,
    /// NULL, or scratch memory of akv_batch_workspace's size and alignment (64), for this call alone; with nth > 1 it
    /// is required, and the same for all threads of the call. Without one the batch keeps its own, as many as calls run
    /// at once.
    pub workspace: *mut c_void,
    /// Its size in bytes.
    pub workspace_bytes: usize,
    /// CUstream; NULL on the CPU.
    pub stream: *mut c_void,
}

/// Partial attention over a part of the context, as attention writes it: `out` is `[rows][heads][dim]`, the others
/// `[rows][heads]`, all f32 and contiguous. `out` and `lse` are needed.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct akv_state {
    /// As akv_attention_desc.out, and so are the others.
    pub out: *mut f32,
    /// -inf where nothing was seen.
    pub lse: *mut f32,
    /// The next four may be NULL: an output that is NULL is not written, one that is NULL in any input is infinity (and
    /// `bound` is coarse without the inputs' `lse_bound`).
    pub bound: *mut f32,
    pub lse_bound: *mut f32,
    pub estimate: *mut f32,
    pub amplitude: *mut f32,
}

/// Sizes that the C compiler must agree with (64-bit pointers): `ctests/` asserts the same.
#[cfg(target_pointer_width = "64")]
const _: () = {
    use std::mem::{offset_of, size_of};
    assert!(size_of::<akv_context_desc>() == 72 && offset_of!(akv_context_desc, cuda_context) == 24);
    assert!(size_of::<akv_layer_desc>() == 48);
    assert!(size_of::<akv_cache_desc>() == 64 && offset_of!(akv_cache_desc, n_slots) == 48);
    assert!(size_of::<akv_usage>() == 64);
    assert!(size_of::<akv_rows>() == 32);
    assert!(size_of::<akv_rope>() == 24);
    assert!(size_of::<akv_export_desc>() == 32 && offset_of!(akv_export_desc, planes_k) == 16);
    assert!(size_of::<akv_batch_desc>() == 64 && offset_of!(akv_batch_desc, max_kv) == 48);
    assert!(size_of::<akv_threads>() == 24);
    assert!(size_of::<akv_stats>() == 144 && offset_of!(akv_stats, backend) == 128);
    assert!(size_of::<akv_attention_desc>() == 232 && offset_of!(akv_attention_desc, alibi_slopes) == 104);
    assert!(size_of::<akv_state>() == 48);
};
