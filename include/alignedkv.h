/* alignedkv.h: the C interface of libalignedkv, which keeps an LLM's KV cache as precision-aligned digit planes. Decode
 * attention reads only the digits that matter, and says how far off its result can be. MIT OR Apache-2.0.
 *
 * OBJECTS, in the order in which they are made; they are destroyed in the reverse one:
 *
 *   akv_context    a backend, its threads and its allocator    akv_context_create
 *   akv_cache      the KV rows of all sequences and layers     akv_cache_create
 *   akv_sequence   one row of tokens (an id, not a pointer)    akv_sequence_create, _fork, _truncate, _destroy
 *   akv_batch      one model step after another                akv_batch_create
 *   akv_mask       who sees which cell                         akv_mask_create
 *
 * A STEP, with prefill and decode mixed as you like:
 *
 *   akv_batch_begin(batch, &step, NULL);                       takes memory for all layers, or fails as a whole
 *   for (layer = 0; layer < n_layers; layer++) {
 *       akv_quantize_kv(batch, layer, &key, &value, NULL);     appends the new tokens' rows, K after RoPE
 *       akv_aligned_attention(batch, layer, &attention);       sees them and all older ones
 *   }
 *   akv_batch_commit(batch);                                   or akv_batch_abort: as if it had not begun
 *
 * CONVENTIONS
 *   Zero is the default: zero a descriptor, set struct_size to its sizeof, then what you need. Strides are in bytes.
 *   Calls return AKV_OK or a negative code; akv_last_error has the text: argument, value, what was expected. A call
 *   that fails has changed nothing, and outputs are written on success only (akv_aligned_attention says when not).
 *   Ownership: you destroy what you create. What you pass is copied or used during the call, never kept, apart from
 *   the context's functions and the rows of akv_attach_rows. Handles are not addresses: NULL, a destroyed one or
 *   another object's is AKV_E_HANDLE.
 *   Threads: different objects know nothing of each other; each object says what may run at once. Nothing waits for
 *   another call: what would have to is AKV_E_BUSY, has done nothing, and can be tried again when that call is over.
 *   No thread is started unless akv_context_desc.n_threads asks for it; your own can share the work (akv_threads).
 *   A sequence is read by attention, fork, export, akv_dequantize_kv and akv_sequence_length, written by truncate, remove,
 *   shift, destroy and by a begun step. Only akv_batch_abort and akv_batch_destroy wait, until calls that read the
 *   sequences of the step are over. Callbacks must not call back into the library, throw or longjmp.
 *   After fork() a child may go on with all objects on the CPU, if no call was in progress in another thread. The threads of
 *   a context are not there: calls run on the calling thread, to the same bits. Objects on CUDA are not for the child.
 *   Memory that grows with tokens, rows, sequences or layers is asked for: AKV_E_MEMORY. Where malloc lacks even the few
 *   bytes of a handle or a text, the process ends (SECURITY.md).
 *
 * NUMBERS
 *   Rows are stored as 16-bit codes under shared scales (K: per channel of a tile of 128 tokens; V: per token), cut
 *   into 4 hex digits, the planes. With 1, 2, 3, 4 planes a value is known to 9e-2, 6e-3, 4e-4, 3e-5 of the largest
 *   magnitude that its scale must hold. Let p be a token's softmax weight and A = sum of p * max|v| over the n tokens
 *   that a query row sees. Every token reads the fewest planes of K and V that keep its part of the output's error
 *   within tolerance * A / sqrt(2n) (AKV_EXPECTED) or tolerance * A / (2n) (AKV_GUARANTEED); a token of which no plane
 *   of V is read stands for the mean of its tile. The certificate, `bound`, then adds up what was left out: with ds
 *   bounding the error of a score, dv that of a value and u = log(sum of p * exp(ds)), no channel is off by more than
 *   sum of p * (expm1(ds + u) * max|v| + dv). Derivation: src/alignment/certificate.rs.
 *
 * CELLS INSTEAD OF SEQUENCES (AKV_SLOTS; AKV_ATTACHED: the engine keeps its rows, the library an index beside them)
 *
 *   akv_slots_write(cache, layer, cells, n, &key, &value, NULL);   rows to any cells, in any order
 *   akv_mask_set(mask, 0, n_q, n_kv, f16, 0, NULL);                who sees what, once for all layers
 *   akv_slots_attention(cache, layer, &span, 1, &attention);
 *
 * SWAPPING A SEQUENCE OUT, TO HOST MEMORY, A FILE OR ANOTHER MACHINE
 *
 *   int to_file(void *f, const void *bytes, size_t n) { return fwrite(bytes, 1, n, f) == n ? 0 : -1; }
 *   int from_file(void *f, void *bytes, size_t n) { return fread(bytes, 1, n, f) == n ? 0 : -1; }
 *
 *   akv_sequence_export(cache, sequence, NULL, to_file, file);     then akv_sequence_destroy: its pages are free
 *   akv_sequence_import(cache, 0, from_file, file, &sequence);     in any cache of these layers, bit for bit
 *
 * CUDA (backend AKV_CUDA: compute capability 8.0 and above; AKV_APPEND in all formats, cells in AKV_FORMAT_ALIGNED)
 *
 *   Rows (attached ones too), outputs, sink_logits, alibi_slopes, a mask's f16, statistics, states and workspaces are device
 *   memory; kv_from, kv_to, slots, spans and all else is the host's. Calls that have a stream launch work on it and return.
 *   Launched work that uses a cache must be in an order of the caller's, by one stream or by events: memory that a call
 *   gives back is used again by later ones. Calls without a stream that have to move rows (fork, truncate, abort, export,
 *   import, akv_slots_copy) wait for all work of the CUDA context: make them while no stream is captured. What only the
 *   device finds out (NaN in K, V, q or a mask, overflow) is akv_poll's to tell; such K and V are stored as 0 (rows that
 *   are attached stay what they are), such cells of a mask are hidden. Groups of more than 16 heads are read in parts.
 *   Steps within all three bounds of a batch (max_sequences, max_q, max_kv; at most max_q new tokens) can be captured:
 *
 *   akv_batch_begin(batch, &step, stream);                     outside capture
 *   cudaGraphLaunch(graph, stream);                            akv_quantize_kv, akv_aligned_attention of an earlier step
 *   akv_batch_replayed(batch);                                 says so; the other calls of this step are not made
 *   akv_batch_commit(batch);
 *
 *   Of cells, akv_mask_set and akv_slots_attention can be captured, the latter with a workspace. A replay sees the cells as
 *   they are then, and the mask as it was last set, with the spans that were captured. akv_slots_write decides on the host
 *   which tiles open, grow and close: make it outside of capture, in the order of the device's work. akv_slots_invalidate
 *   and akv_attach_rows wait for nothing: the layer's next call with a stream that is not captured tells the device of them.
 *
 * NOT BUILT YET, and AKV_E_UNSUPPORTED (akv_supports asks beforehand): MLA in cells, and layers there that share rows. On
 *   CUDA also cells in other formats, MLA, layers that share rows, trees, ALiBi of sequences, sink_tokens, NaN policies but
 *   AKV_NAN_ERROR, removing, shifting, reserving and copying tokens, and importing what was removed from or a part of the digit
 *   planes.
 *
 * Generated from src/capi by bindings/gen: do not edit.
 */

#ifndef ALIGNEDKV_H
#define ALIGNEDKV_H

#include <stddef.h>
#include <stdint.h>

// Version of the binary interface
#define AKV_ABI_VERSION 1  // Goes into `akv_context_desc.abi_version`; `akv_abi_version()` tells what the loaded
                           // library speaks.

// Result of a call: `AKV_OK` (0) or a negative code. The list only ever grows at its end.
typedef int32_t akv_status;

// Status codes
#define AKV_OK            0      // Done.
#define AKV_E_ARGUMENT    (-1)   // An argument breaks a documented rule; `akv_last_error` names it.
#define AKV_E_UNSUPPORTED (-2)   // Valid, but not built yet, or not on this machine.
#define AKV_E_MEMORY      (-3)   // The allocator returned NULL.
#define AKV_E_CAPACITY    (-4)   // A limit that the caller set is reached: `max_bytes`, `max_sequences`, the bounds of
                                 // a batch.
#define AKV_E_HANDLE      (-5)   // A handle or sequence id that is dead, or belongs to another object, or to another
                                 // copy of the library.
#define AKV_E_NONFINITE   (-6)   // NaN or infinity in K, V or q.
#define AKV_E_RANGE       (-7)   // A finite value that the format cannot hold (magnitude above about 3e10), or that an
                                 // output's dtype cannot.
#define AKV_E_BUSY        (-8)   // In use in a way that excludes this call: nothing waited, nothing changed, try again
                                 // later.
#define AKV_E_CORRUPT     (-9)   // Imported bytes are damaged.
#define AKV_E_VERSION     (-10)  // A struct or file of another version: wrong `abi_version`, or bytes set beyond the
                                 // struct that this version knows.
#define AKV_E_DEVICE      (-11)  // The device or its driver failed.
#define AKV_E_INTERNAL    (-12)  // A bug in the library (a panic was stopped at the boundary); the objects of the call
                                 // should be destroyed.

// Element types of rows
#define AKV_F32  0  // IEEE binary32.
#define AKV_F16  1  // IEEE binary16.
#define AKV_BF16 2  // bfloat16, the upper half of a binary32.

// Backends: akv_context_desc.backend (0 = AKV_CPU), akv_stats.backend
#define AKV_CPU  1  // The CPU.
#define AKV_CUDA 2  // A CUDA device; AKV_E_UNSUPPORTED where there is no driver, or none that knows the device.

// Instruction sets: akv_context_desc.isa (0 = the best of this machine), akv_stats.isa
#define AKV_ISA_SCALAR 1  // Portable code.
#define AKV_ISA_AVX2   2  // x86-64 with AVX2, FMA and F16C.
#define AKV_ISA_AVX512 3  // x86-64 with AVX-512 F, BW, VL and VNNI.

// Ways that attention can take: akv_stats.path and akv_supports (sums)
#define AKV_PATH_PROGRESSIVE 1  // Plane 0 of all keys first, then only the digits that matter.
#define AKV_PATH_DENSE       2  // Every stored digit of every row: exact mode, long prefills, the raw format.
#define AKV_PATH_PUBLISHED   4  // The criterion of the published AlignedKV scheme.

// Storage formats: akv_cache_desc.format
#define AKV_FORMAT_ALIGNED   0  // Precision-aligned digit planes under shared scales.
#define AKV_FORMAT_PUBLISHED 1  // AlignedKV as published (arXiv 2409.16546): f16 cut into 8 | 4 | 4 bits, lossless; for
                                // comparison. K and V must be AKV_F16; its criterion takes no tolerance and gives no
                                // certificate.
#define AKV_FORMAT_RAW       2  // Rows as given, attended in f32: the exact baseline.

// Placements: akv_cache_desc.placement
#define AKV_APPEND   0  // The library appends rows to sequences.
#define AKV_SLOTS    1  // The engine's cells are the truth: rows are written to any cell.
#define AKV_ATTACHED 2  // The engine keeps its own rows; the library has an index beside them: plane 0 of K, scales,
                        // and what tokens of which no V is read stand for. Finer digits are read from the engine's
                        // rows.

// Modes: akv_attention_desc.mode
#define AKV_EXPECTED   0  // Errors of tokens add as if independent: the rms error of a channel stays near tolerance *
                          // A.
#define AKV_GUARANTEED 1  // Error bounds add: `bound` itself stays within tolerance * A, as far as the stored planes
                          // can (below about 3e-2 the rounding of codes and of q to 16 bits shows, and `bound` says
                          // so).
#define AKV_EXACT      2  // All stored digits are read.

// Visibility: akv_attention_desc.visibility
#define AKV_CAUSAL 0  // A query row sees tokens at its own position and before.
#define AKV_FULL   1  // A query row sees all tokens of its sequence.

// NaN or infinity in K, V or q: akv_cache_desc.nan_policy
#define AKV_NAN_ERROR     0  // The call fails with AKV_E_NONFINITE; its text names sequence, layer, argument, row and
                             // head.
#define AKV_NAN_PROPAGATE 1  // It spreads to what it touches: where a query row sees a token whose K or V has one on a
                             // KV head, all query heads of that KV head get NaN as output, lse and amplitude, and
                             // infinity as bounds and estimate; where q has one, that row's head does. The rest is as
                             // if these were 0. Read back, such rows are NaN. It costs 32 bytes per tile and KV head.
                             // On the CPU, not with AKV_ATTACHED.
#define AKV_NAN_ZERO      2  // It counts as 0, and is stored so. On the CPU, not with AKV_ATTACHED.

// RoPE pairings: akv_rope.pairing
#define AKV_ROPE_INTERLEAVED 0  // Channels 2i and 2i + 1 turn together.
#define AKV_ROPE_HALVES      1  // Channels i and i + n_dims / 2 turn together.

// For akv_cache_desc.exact_head and exact_tail
#define AKV_NONE UINT32_MAX  // None at all (0 means the default).

// Log levels: akv_log_fn
#define AKV_LOG_WARN 1  // Something the caller should know of.
#define AKV_LOG_INFO 2  // What runs and where.

// A backend, its threads and its allocator. Everything else is made from one. May be used by any number of threads at
// once.
typedef struct akv_context akv_context;

// The KV rows of all sequences, for all layers of a model (or one, if the engine keeps one cache per layer). Calls on
// different sequences may run at once; a sequence is read by any number of calls at once or written by one.
typedef struct akv_cache akv_cache;

// One model step at a time. Many calls may work on a step at once; it begins and ends while none does.
typedef struct akv_batch akv_batch;

// Who sees which cell, prepared once per graph (AKV_SLOTS and AKV_ATTACHED).
typedef struct akv_mask akv_mask;

// A sequence of a cache: index and generation, so that a stale id is noticed. 0 is never one. An id means nothing to
// another cache.
typedef uint64_t akv_sequence;

// Takes `n` bytes (at most 65536) that are being exported. Returns 0 to go on; anything else ends the export.
typedef int (*akv_write_fn)(void *user, const void *bytes, size_t n);

// Fills `n` bytes (at most 65536) that are being imported; no byte beyond the stream's end is asked for. Returns 0 to go
// on; anything else ends the import.
typedef int (*akv_read_fn)(void *user, void *bytes, size_t n);

// Allocates `bytes` aligned to `align` (a power of two) for `backend` (AKV_CPU: host memory), or returns NULL.
// `stream` is NULL for host memory. Called from any thread that calls the library; must not call back into it.
typedef void *(*akv_alloc_fn)(void *user, size_t bytes, size_t align, int32_t backend, void *stream);

// Takes back what `akv_alloc_fn` gave, with the same `bytes`. On CUDA, work that was launched may still be using device
// memory: give it to others in the streams' order (cudaFree waits for that).
typedef void (*akv_dealloc_fn)(void *user, void *p, size_t bytes, int32_t backend, void *stream);

// Receives a line of text (valid during the call) at AKV_LOG_WARN or AKV_LOG_INFO. Must not call back into the
// library.
typedef void (*akv_log_fn)(void *user, int32_t level, const char *text);

// Returns when all `nth` threads of a call have entered it. No callback may throw or longjmp.
typedef void (*akv_barrier_fn)(void *user);

// What a context is made of. Zeroed apart from `struct_size` and `abi_version`: CPU backend, best instruction set, no
// threads, malloc, no log.
typedef struct akv_context_desc {
    // sizeof(akv_context_desc).
    uint32_t struct_size;
    // AKV_ABI_VERSION.
    uint32_t abi_version;
    // AKV_CPU or AKV_CUDA; 0 = AKV_CPU. The environment variable AKV_BACKEND (cpu, cuda) overrides it, for tests.
    int32_t backend;
    // CUDA device ordinal; not used by AKV_CPU.
    int32_t device;
    // AKV_ISA_*; 0 = the best of this machine. The environment variable AKV_ISA (scalar, avx2, avx512) overrides it,
    // for tests. One that this machine lacks is AKV_E_UNSUPPORTED, never replaced in silence.
    int32_t isa;
    // Threads that attention may use, the calling one included: 0 and 1 start none, n > 1 starts n - 1 workers that
    // live as long as the context. They serve calls without `akv_threads`, one call at a time. At most 1024.
    int32_t n_threads;
    // CUcontext to use; NULL = the device's primary one. Not used by AKV_CPU.
    void *cuda_context;
    // Allocator of everything large (pages, kept rows, workspaces); NULL = the library's own. Both or neither. Must
    // work for as long as the context lives.
    akv_alloc_fn alloc;
    // Its counterpart.
    akv_dealloc_fn dealloc;
    // Passed to both.
    void *alloc_user;
    // Where log lines go; NULL = nowhere.
    akv_log_fn log;
    // Passed to it.
    void *log_user;
} akv_context_desc;

// Shape of one layer's attention. An array element: fixed size.
typedef struct akv_layer_desc {
    // Query heads: a multiple of n_kv_heads; query head h reads KV head h / (n_q_heads / n_kv_heads). Groups of
    // up to 64 (128 where v_is_prefix_of_k).
    int32_t n_q_heads;
    // KV heads, 1 to 4096.
    int32_t n_kv_heads;
    // Channels of q and K (head_dim): a multiple of 8 from 16 to 256 (576 where v_is_prefix_of_k).
    int32_t dim_k;
    // Channels of V and of the output: a multiple of 8 from 16 to 256 (576 where v_is_prefix_of_k); 0 = dim_k.
    int32_t dim_v;
    // AKV_F32, AKV_F16 or AKV_BF16: element type of the K rows that will be appended.
    int32_t dtype_k;
    // The same of V.
    int32_t dtype_v;
    // Digit planes of K that are stored: 2, 3, 4; 0 = 4 (16 bits, relative error 3e-5). 2 halves the memory. Formats
    // other than AKV_FORMAT_ALIGNED keep all: 0 or 4. AKV_ATTACHED keeps plane 0 alone, whatever this says.
    int32_t planes_k;
    // The same of V.
    int32_t planes_v;
    // Sliding window: a row at position p sees positions above p - window; 0 = none. 0 with AKV_SLOTS and AKV_ATTACHED,
    // whose masks say it. On the CPU short windows, up to about 1024 tokens, take less time in AKV_FORMAT_RAW (a cache of
    // their own), though it reads and keeps more bytes: `cargo bench --bench attention -- windows` measures both.
    int32_t window;
    // 0. (Kept for layers that share a page table, which are not built.)
    int32_t group;
    // 1 + index of an earlier layer whose KV rows this one reads; 0 = its own. That layer must have rows of its own
    // and the same n_kv_heads, dims, dtypes, planes and v_is_prefix_of_k; n_q_heads and window may differ. A sharing
    // layer has no pages: akv_quantize_kv is not called for it, and it may attend once the other's rows have been
    // appended. AKV_APPEND on the CPU only.
    int32_t share_with;
    // 1: V is the first dim_v channels of K (MLA: K is the latent row with the RoPE channels behind it, q the absorbed
    // query). K is stored once, akv_quantize_kv takes no value, dtype_v and planes_v are 0 or K's. Attention takes the
    // dense path, which reads all stored planes of K. AKV_APPEND on the CPU only, not AKV_FORMAT_PUBLISHED. 0: V has
    // rows of its own.
    int32_t v_is_prefix_of_k;
} akv_layer_desc;

// What a cache is made of.
typedef struct akv_cache_desc {
    // sizeof(akv_cache_desc).
    uint32_t struct_size;
    // 0.
    uint32_t flags;
    // AKV_FORMAT_*.
    int32_t format;
    // AKV_APPEND, AKV_SLOTS (not AKV_FORMAT_PUBLISHED) or AKV_ATTACHED (AKV_FORMAT_ALIGNED only).
    int32_t placement;
    // AKV_NAN_*.
    int32_t nan_policy;
    // Number of elements of `layers`, 1 to 4096.
    int32_t n_layers;
    // The layers; copied.
    const struct akv_layer_desc *layers;
    // Most sequences alive at once; 0 = 65536.
    uint32_t max_sequences;
    // First tokens of every sequence (AKV_SLOTS and AKV_ATTACHED: first cells of every stream) whose rows are kept as
    // given and attended exactly, since attention sinks would coarsen the scales of their tile: up to 128; 0 = 4,
    // AKV_NONE = none. Only AKV_FORMAT_ALIGNED needs it.
    uint32_t exact_head;
    // Truncating a sequence by at most this many tokens is as if they had never been appended, bit for bit: up to
    // 128; 0 = 64, AKV_NONE = none. Only AKV_FORMAT_ALIGNED needs it.
    uint32_t exact_tail;
    // Streams of AKV_SLOTS and AKV_ATTACHED, 1 to 65536; 0 = 1, and 0 with AKV_APPEND.
    uint32_t n_streams;
    // Cells of a stream of AKV_SLOTS and AKV_ATTACHED, 1 to 2^31 - 1: cell c of stream s is slot s * n_slots + c. The
    // memory of all is taken when the cache is made. 0 with AKV_APPEND.
    uint64_t n_slots;
    // Most bytes the cache may take, page tables, staging and workspaces included; 0 = no limit.
    uint64_t max_bytes;
} akv_cache_desc;

// What a cache holds at the moment.
typedef struct akv_usage {
    // sizeof(akv_usage), set by the caller.
    uint32_t struct_size;
    // Sequences alive.
    uint32_t n_sequences;
    // Bytes taken, from the allocator and for tables; what `max_bytes` limits.
    uint64_t bytes_reserved;
    // Of these: in use by sequences and batches (the rest waits for reuse).
    uint64_t bytes_used;
    // Of these: rows kept as given (exact head, open tiles, exact tail).
    uint64_t bytes_kept;
    // Pages in use; a page is 128 tokens of one layer.
    uint64_t pages_used;
    // Pages waiting for reuse.
    uint64_t pages_free;
    // Pages that more than one sequence holds (counted once).
    uint64_t pages_shared;
    // Committed tokens of all sequences that have not been removed, shared ones counted for each; cells with rows in a
    // layer.
    uint64_t tokens;
} akv_usage;

// A three-dimensional array `[row][head][dim]` in the caller's memory, `dim` contiguous. What it must hold is said by
// the call that takes it. Not kept beyond the call, but by akv_attach_rows.
typedef struct akv_rows {
    // Row 0, head 0; aligned to the element size. Only read where it is an input. May be NULL if there are no rows.
    void *data;
    // Bytes from a row to the next: a multiple of the element size, at least dim elements, never negative. Rows may
    // lie inside heads (stride_row < stride_head) or heads inside rows, but not over each other. 0 = all heads of a
    // row, then the next row.
    int64_t stride_row;
    // Bytes from a head to the next, likewise. 0 = dim elements.
    int64_t stride_head;
    // AKV_F32, AKV_F16 or AKV_BF16.
    int32_t dtype;
    // 0.
    int32_t reserved;
} akv_rows;

// Rotary position embedding of a layer, for `akv_sequence_shift`.
typedef struct akv_rope {
    // AKV_ROPE_INTERLEAVED or AKV_ROPE_HALVES.
    int32_t pairing;
    // Channels that turn: even, at most dim_k.
    int32_t n_dims;
    // First of them.
    int32_t first_dim;
    // 0.
    int32_t reserved;
    // `[n_dims / 2]` radians per position, any scaling folded in.
    const float *inv_freq;
} akv_rope;

// What of a sequence is exported. Zeroed apart from `struct_size`: everything.
typedef struct akv_export_desc {
    // sizeof(akv_export_desc).
    uint32_t struct_size;
    // 0.
    uint32_t flags;
    // First layer.
    int32_t first_layer;
    // Layers; 0 = all from first_layer on.
    int32_t n_layers;
    // Digit planes of K, from the first, that the importing side will have: 2 to 4, with AKV_FORMAT_ALIGNED; 0 = all that
    // are stored. Tiles whose rows are kept as given (the open one, and the exact tail's) are exported whole.
    int32_t planes_k;
    // The same of V.
    int32_t planes_v;
    // Digit planes of K that it has by an earlier export of the same tokens: only further ones are exported. 0 = none,
    // and then known_v is 0, too.
    int32_t known_k;
    // The same of V.
    int32_t known_v;
} akv_export_desc;

// One model step, or (in akv_batch_create) the bounds of all steps that a batch will serve.
typedef struct akv_batch_desc {
    // sizeof(akv_batch_desc).
    uint32_t struct_size;
    // Sequences of this step; 0 in akv_batch_create.
    uint32_t n_sequences;
    // `[n_sequences]`, each at most once.
    const akv_sequence *sequences;
    // `[n_sequences]` tokens that the step appends to each (0 allowed); NULL = 0 for all.
    const int32_t *n_new;
    // `[n_sequences]` query rows of each (0 allowed): its last n_q tokens, new or not; NULL = as n_new. Prefill and
    // decode may mix. More than there are tokens: see akv_aligned_attention.
    const int32_t *n_q;
    // `[sum of n_new]` positions of the new tokens, sequence by sequence, never descending within a sequence (its
    // older tokens included); NULL = consecutive from the last one. Causal visibility and windows go by them.
    const int64_t *positions;
    // Bound of n_sequences; 0 in akv_batch_begin, and 0 in akv_batch_create = no bound.
    int32_t max_sequences;
    // Bound of the sum of n_q; likewise.
    int32_t max_q;
    // Bound of a sequence's tokens after the step; likewise. At most 2^31 - 1.
    int64_t max_kv;
    // Bound of akv_threads.nth, at most 1024; 0 in akv_batch_begin, and 0 in akv_batch_create = the context's
    // n_threads (at least 1).
    int32_t max_threads;
    // 0.
    int32_t reserved;
} akv_batch_desc;

// The caller's own threads: `nth` of them make the same call with the same descriptor, each with its own `ith`, and
// together do its work, in memory (`workspace`) that the caller gives. Every one returns the same status; when one
// returns, others may still be at work: outputs are complete when all have. The bits of the result do not depend on
// nth.
typedef struct akv_threads {
    // Index of this thread, 0 to nth - 1.
    int32_t ith;
    // Number of threads.
    int32_t nth;
    // Barrier over all nth threads; may be NULL if nth is 1. If the arguments pass validation, which is the same in
    // all threads, each of them enters it the same number of times, also when the call then fails.
    akv_barrier_fn barrier;
    // Passed to it.
    void *user;
} akv_threads;

// The cells that some query rows look at, in akv_slots_attention. An array element: fixed size.
typedef struct akv_span {
    // Stream, 0 to n_streams - 1.
    int32_t stream;
    // Query rows.
    int32_t n_q;
    // They look at cells 0 to n_kv - 1 of the stream.
    int64_t n_kv;
} akv_span;

// What an attention call read and how: numbers of this call, not sums over calls. Written on success only (with
// `akv_threads` by the thread with ith 0).
typedef struct akv_stats {
    // Bytes of K read: digits, scale bytes and exact rows. A query row reads a KV head once for its whole GQA group;
    // further query rows read it again.
    uint64_t bytes_k;
    // The same of V.
    uint64_t bytes_v;
    // Of both: scale bytes, and what else is stored once for a tile (its mean of V).
    uint64_t bytes_scales;
    // Of both: rows kept as given (exact head).
    uint64_t bytes_exact;
    // Tokens, per KV head and query row, of which 0 to 4 planes of K were read (none has 0). Exact rows are not here.
    uint64_t planes_k[5];
    // The same of V.
    uint64_t planes_v[5];
    // Tokens attended, summed over KV heads and query rows: elements of K are tokens * dim_k, of V tokens * dim_v.
    uint64_t tokens;
    // Query rows that took the dense path.
    uint64_t dense_rows;
    // AKV_CPU or AKV_CUDA.
    int32_t backend;
    // AKV_ISA_*.
    int32_t isa;
    // Sum of AKV_PATH_*.
    int32_t path;
    // 0.
    int32_t reserved;
} akv_stats;

// An attention call. Zeroed apart from `struct_size`, `q` and `out`: softmax of scaled dot products, causal, default
// tolerance.
typedef struct akv_attention_desc {
    // sizeof(akv_attention_desc).
    uint32_t struct_size;
    // 0.
    uint32_t flags;
    // Queries `[sum of n_q][n_q_heads][dim_k]`, sequence by sequence, after RoPE.
    struct akv_rows q;
    // Where the outputs `[sum of n_q][n_q_heads][dim_v]` go, in any dtype. A row that sees nothing gets zeros (and an
    // lse of -inf). Outputs overlap neither each other nor q.
    struct akv_rows out;
    // Factor of the dot products, score = scale * (q . k); 0 = 1 / sqrt(dim_k).
    float scale;
    // Cap c of the scores, c * tanh(score / c), before a mask is added; 0 = none. Not for AKV_FORMAT_PUBLISHED.
    float logit_softcap;
    // Allowed error relative to A = sum over tokens of p * max|v|; 0 = 1e-3. Not used by AKV_EXACT, on the dense path
    // and by AKV_FORMAT_PUBLISHED.
    float tolerance;
    // AKV_EXPECTED, AKV_GUARANTEED or AKV_EXACT.
    int32_t mode;
    // AKV_CAUSAL or AKV_FULL.
    int32_t visibility;
    // Sliding window of this call; 0 = the layer's.
    int32_t window;
    // First tokens of a sequence that its rows see in spite of a window (attention sinks), on the CPU; 0 = none. Not
    // for AKV_FORMAT_PUBLISHED.
    int32_t sink_tokens;
    // 0.
    int32_t reserved;
    // `[n_q_heads]`: factors of what `mask` adds; NULL = 1. Without a mask (ALiBi of sequences, on the CPU): to a score of
    // head h, after the cap, is added alibi_slopes[h] times the distance, the token's position less the query row's;
    // NULL = nothing. Not for AKV_FORMAT_PUBLISHED.
    const float *alibi_slopes;
    // `[n_q_heads]`: score of a token more, whose value is 0; NULL = none. Device memory on CUDA. It counts in lse: of
    // parts that are to be merged, give it to one. Not for AKV_FORMAT_PUBLISHED.
    const float *sink_logits;
    // For akv_slots_attention: who sees what; NULL = every row sees all cells of its span.
    const struct akv_mask *mask;
    // `[sum of n_q]`: of what it would see, row r sees only tokens (by index, not position) from kv_from[r] on; NULL =
    // 0 for all. What several calls see of parts of a context, akv_merge_states puts together.
    const int64_t *kv_from;
    // `[sum of n_q]`: and only those below kv_to[r]; NULL = no limit.
    const int64_t *kv_to;
    // `[sum of n_q]`, for speculative trees (on the CPU): of the last 64 tokens of its sequence, the step's new ones
    // included, row r sees only those whose bit is set in tree[r], of what it would see. Bit 63 is the sequence's last
    // token, bit 63 - i the token i before it; the row's own token has a bit like any other, bits of tokens that are not
    // there do not count, and tokens before the last 64 are seen as ever. If the step's n new tokens (below 64) are a
    // tree, each after its parent, then the row of node r sees what came before and the nodes j with bit j set in `path`
    // by tree[r] = path << (64 - n) | UINT64_MAX >> n. NULL = none. Not for AKV_FORMAT_PUBLISHED.
    const uint64_t *tree;
    // Each of the next five is NULL or `[sum of n_q][n_q_heads]` f32, contiguous, and feeds akv_merge_states.
    // Log of the softmax's normaliser: log sum exp(score).
    float *lse;
    // Certificate: no channel of the output is further than this from attention over the caller's own K, V and q in
    // exact arithmetic. Float rounding inside the library is included, rounding to out's dtype is not. Infinite where
    // no bound is claimed (AKV_FORMAT_PUBLISHED).
    float *bound;
    // The same for lse.
    float *lse_bound;
    // Root mean square error of a channel that is to be expected, if scores are known to a fraction of a nat. Where
    // they are not (`lse_bound` of nats: huge scores, close to each other) it can be far too small; `bound` holds.
    float *estimate;
    // A = sum over tokens of p * max|v|: what tolerance is relative to.
    float *amplitude;
    // NULL, or where this call's statistics go: host memory, or device memory under CUDA.
    struct akv_stats *stats;
    // NULL = this thread alone, or the context's threads.
    const struct akv_threads *threads;
    // NULL, or scratch memory of akv_batch_workspace's size and alignment (64), for this call alone; with nth > 1 it
    // is required, and the same for all threads of the call. Without one the batch keeps its own, as many as calls run
    // at once.
    void *workspace;
    // Its size in bytes.
    size_t workspace_bytes;
    // CUstream; NULL on the CPU.
    void *stream;
} akv_attention_desc;

// Partial attention over a part of the context, as attention writes it: `out` is `[rows][heads][dim]`, the others
// `[rows][heads]`, all f32 and contiguous. `out` and `lse` are needed.
typedef struct akv_state {
    // As akv_attention_desc.out, and so are the others.
    float *out;
    // -inf where nothing was seen.
    float *lse;
    // The next four may be NULL: an output that is NULL is not written, one that is NULL in any input is infinity (and
    // `bound` is coarse without the inputs' `lse_bound`).
    float *bound;
    float *lse_bound;
    float *estimate;
    float *amplitude;
} akv_state;

#ifdef __cplusplus
extern "C" {
#endif

// ---- Versions, status codes and the text of the last error ----------------------------------------------------------

// The AKV_ABI_VERSION that this library speaks.
uint32_t akv_abi_version(void);

// Name, version, commit and what is built in, for logs: static, never NULL.
const char *akv_version_string(void);

// Name of a status ("AKV_E_ARGUMENT"), or "unknown status": static, never NULL.
const char *akv_status_string(akv_status status);

// Copies the text of this thread's last failed call, cut to `cap` bytes with its NUL, into `buf`; `needed` (NULL
// allowed) gets the bytes that the whole text needs. The text stays until the thread's next failing call; without one
// it is empty. `buf` may be NULL if `cap` is 0. It never fails for a small `cap`.
akv_status akv_last_error(char *buf, size_t cap, size_t *needed);

// ---- Contexts -------------------------------------------------------------------------------------------------------

// Makes a context. `*out` is written on success only.
//
// Errors: AKV_E_VERSION (abi_version, unknown tail), AKV_E_ARGUMENT, AKV_E_UNSUPPORTED (backend or ISA that this
// machine or build lacks), AKV_E_MEMORY.
//
// Threads: a context may be used from any number of threads at once.
akv_status akv_context_create(const struct akv_context_desc *desc, struct akv_context **out);

// Destroys a context and joins its threads. AKV_E_BUSY while caches made from it live (nothing happens then). NULL is
// AKV_E_HANDLE.
akv_status akv_context_destroy(struct akv_context *context);

// Returns and clears the first fault of work that was launched on a device (NaN in K, say): AKV_OK if there is none so
// far, otherwise the fault's status and text, with the place in `*sequence`, `*layer`, `*row` (each NULL allowed; `*row`
// is a token of the sequence, or the call's query row if q or the outputs are at fault). It waits for nothing: whoever
// wants to know of all work synchronises the stream before. On the CPU every fault is returned by the call itself, so
// this is always AKV_OK.
akv_status akv_poll(struct akv_context *context,
                    akv_sequence *sequence,
                    int32_t *layer,
                    uint64_t *row);

// Asks whether caches of `cache` can be created here and attended as `attention` says (NULL: with defaults), without
// making one: AKV_OK, or what the real call would return, with its text. `*path` (NULL allowed) gets the sum of
// AKV_PATH_* that such calls can take. Pointers inside `attention` are only tested for NULL.
akv_status akv_supports(const struct akv_context *context,
                        const struct akv_cache_desc *cache,
                        const struct akv_attention_desc *attention,
                        int32_t *path);

// ---- Caches ---------------------------------------------------------------------------------------------------------

// Makes a cache. Memory for rows is taken as sequences grow. `*out` is written on success only.
//
// Errors: AKV_E_ARGUMENT, AKV_E_UNSUPPORTED, AKV_E_VERSION, AKV_E_HANDLE, AKV_E_MEMORY.
//
// Threads: calls on different sequences may run at once. A sequence is read by any number of calls at once or written
// by one; a call that finds it otherwise returns AKV_E_BUSY and changes nothing.
akv_status akv_cache_create(struct akv_context *context, const struct akv_cache_desc *desc, struct akv_cache **out);

// Destroys a cache with all its sequences. AKV_E_BUSY while batches made from it live, or calls are in it (nothing
// happens then).
akv_status akv_cache_destroy(struct akv_cache *cache);

// Reports what the cache holds. `out->struct_size` must be set, and the rest zeroed if it is a later version's.
akv_status akv_cache_usage(const struct akv_cache *cache, struct akv_usage *out);

// ---- Sequences: creation, forks, lengths, reading back --------------------------------------------------------------

// Makes an empty sequence. AKV_E_CAPACITY beyond max_sequences.
akv_status akv_sequence_create(struct akv_cache *cache, akv_sequence *out);

// Destroys a sequence. Pages that forks share stay with them. AKV_E_BUSY while it is in a begun batch.
akv_status akv_sequence_destroy(struct akv_cache *cache, akv_sequence sequence);

// Makes a new sequence of the first `n_tokens` tokens of another (-1 = all): whole tiles of 128 tokens are shared by
// reference, the rest is copied. AKV_E_BUSY while it is in a begun batch.
akv_status akv_sequence_fork(struct akv_cache *cache, akv_sequence sequence, int64_t n_tokens, akv_sequence *out);

// Keeps the first `n_tokens` tokens. Taking away at most exact_tail tokens is as if they had never been appended, bit
// for bit; taking away more reopens the tile that is cut, whose rows are then known as they were stored: no error is
// added unless later rows outgrow the tile's scales, and what that adds is in every later certificate. AKV_E_BUSY
// while it is in a begun batch.
akv_status akv_sequence_truncate(struct akv_cache *cache, akv_sequence sequence, int64_t n_tokens);

// Takes the memory that `n_tokens` more tokens need, in all layers or in none: until they have been committed, steps
// of them, of any size, do not fail with AKV_E_CAPACITY (but for the batch's bounds) or for want of pages.
// akv_cache_usage counts it. Aborted steps leave it in place; akv_sequence_truncate, to any length, and
// akv_sequence_destroy give back what is left of it. Less than there is already changes nothing. What else takes
// memory (positions that do not follow each other, attention, forks, akv_sequence_shift) is not provided for, and
// forks may hold on to rows that would have gone back to it: reserve again after a fork.
//
// Errors: AKV_E_ARGUMENT, AKV_E_BUSY (in a begun batch, or read), AKV_E_CAPACITY, AKV_E_MEMORY, AKV_E_UNSUPPORTED on CUDA.
akv_status akv_sequence_reserve(struct akv_cache *cache,
                                akv_sequence sequence,
                                int64_t n_tokens);

// Removes the tokens at positions `from_position <= p < to_position`: no query row sees them any more, and pages of which
// nothing is left are given back. Indices and positions of the others do not change (what counts tokens by index, as
// n_tokens, kv_from and akv_sequence_length, still counts those removed); tokens removed at the end of the sequence are
// cut off, as by akv_sequence_truncate. Any number of times. AKV_E_BUSY while it is in a begun batch, or read;
// AKV_E_UNSUPPORTED on CUDA and with AKV_FORMAT_PUBLISHED.
akv_status akv_sequence_remove(struct akv_cache *cache,
                               akv_sequence sequence,
                               int64_t from_position,
                               int64_t to_position);

// Adds `delta` to the positions `from_position <= p < to_position` and turns their K accordingly; `rope_per_layer` has
// an element per layer; those of layers that share another's rows are not looked at. Causal visibility and windows go
// by the new positions, which must not descend over the tokens that have not been removed. Rows that are kept as given
// are turned, rounded to the layer's dtype, and count as given again; others are decoded, turned and encoded anew,
// with an error that every later certificate contains. Other tokens stay as they are, but for those that share a tile
// of 128 with some that turn: they may be encoded anew, too. Pages that forks share are copied first, all or nothing.
// Takes a tile of K in binary32 of the process's heap.
//
// Errors: AKV_E_ARGUMENT (rope, positions that would descend or overflow), AKV_E_BUSY, AKV_E_MEMORY, AKV_E_CAPACITY;
// AKV_E_UNSUPPORTED on CUDA and with AKV_FORMAT_PUBLISHED.
akv_status akv_sequence_shift(struct akv_cache *cache,
                              akv_sequence sequence,
                              int64_t from_position,
                              int64_t to_position,
                              int64_t delta,
                              const struct akv_rope *rope_per_layer);

// Number of tokens of a sequence in `layer`; those that the batch in progress has appended count. `layer` = -1:
// committed tokens. Those that have been removed count, since others keep their indices.
akv_status akv_sequence_length(const struct akv_cache *cache, akv_sequence sequence, int32_t layer, int64_t *out);

// Writes a sequence, or the part of it that `desc` names (NULL = all of it), as a byte stream with version and
// checksums: the same bytes from any backend and instruction set. Layers that share another's rows add nothing to it.
// A layer is exported with all its tokens, also those that a begun batch has appended: so layers can be sent, one call
// each, while the next ones are still computed. `write` takes the stream in order, in pieces; only 64 KiB of the
// process's heap are taken meanwhile (and a page with CUDA), nothing of max_bytes: a full cache can be swapped out.
// The sequence is read until the call ends. On CUDA the call waits for all work of the CUDA context.
//
// With planes_k and planes_v only the first digits of closed tiles are exported, and what is made from them reads no
// others: its certificates include what is missing. An export with known_k and known_v has the digits that such a
// sequence lacks, and makes it the same as the whole; it must come from the same tokens, before either side's tiles are
// cut (others are left alone; forks that share tiles do not get them). Where v_is_prefix_of_k is 1 there is K alone, and
// planes_k and known_k hold for both.
//
// Errors: AKV_E_ARGUMENT (a layer that lacks tokens of the others; `write` returned other than 0), AKV_E_HANDLE,
// AKV_E_BUSY (a layer is being written).
akv_status akv_sequence_export(struct akv_cache *cache,
                               akv_sequence sequence,
                               const struct akv_export_desc *desc,
                               akv_write_fn write,
                               void *user);

// Reads such a stream, made by a cache of the same format, number of layers, KV heads, dims, dtypes, planes and
// v_is_prefix_of_k, and with AKV_NAN_PROPAGATE on both sides or on neither (query heads, windows, exact_head, exact_tail,
// backend and placement of pages may differ). `into` = 0: makes a sequence,
// `*out`, which attends and goes on bit for bit like the one that was exported (as long as nothing is cut beyond the
// smaller exact_tail of both). Otherwise the stream brings layers that
// sequence `into` lacks, or further digits: one made from a part of the layers can be destroyed, read and added to, and
// used in batches once it has all. `out` may be NULL then. On error there is no new sequence, and `into` is as before.
//
// Errors: AKV_E_CORRUPT (damaged, no such stream, or `read` returned other than 0, as at the end of a file cut short),
// AKV_E_VERSION (of a later version), AKV_E_ARGUMENT (of another kind of cache: says what differs), AKV_E_CAPACITY,
// AKV_E_MEMORY; AKV_E_UNSUPPORTED for tiles that lack digits on CUDA. No memory is taken for more than the bytes that have
// come.
akv_status akv_sequence_import(struct akv_cache *cache,
                               akv_sequence into,
                               akv_read_fn read,
                               void *user,
                               akv_sequence *out);

// Copies a sequence into `to_cache` (another one, of any context, or the same), as akv_sequence_import would make it of
// all that akv_sequence_export writes, page by page and without the bytes between. Nothing is shared with the original.
// On error there is no new sequence.
//
// Errors: as akv_sequence_export and akv_sequence_import; AKV_E_UNSUPPORTED if one of the caches is on CUDA.
akv_status akv_sequence_copy(struct akv_cache *from_cache,
                             akv_sequence sequence,
                             struct akv_cache *to_cache,
                             akv_sequence *out);

// Reads tokens `first..first + n` of a sequence back, as attention sees them with all stored planes: exact head rows
// as given, others decoded (to at most 3e-5 of the largest magnitude that shares their scale with 4 planes). `key` is
// `[n][n_kv_heads][dim_k]`, `value` `[n][n_kv_heads][dim_v]`, in any dtype; either may be NULL. AKV_E_RANGE, with
// nothing written, if a value is too large for the dtype. Tokens that have been removed are zeros.
akv_status akv_dequantize_kv(struct akv_cache *cache,
                             akv_sequence sequence,
                             int32_t layer,
                             int64_t first,
                             int64_t n,
                             const struct akv_rows *key,
                             const struct akv_rows *value,
                             void *stream);

// ---- Steps: batches, and appending ----------------------------------------------------------------------------------

// Makes a batch: it carries one model step at a time through all layers. `bounds` holds max_sequences, max_q, max_kv,
// max_threads; the rest is 0 or NULL. Steps beyond the bounds are AKV_E_CAPACITY. `*out` is written on success only.
//
// Threads: begin, commit, abort and destroy are AKV_E_BUSY while other calls use the batch. In between,
// akv_aligned_attention may run any number of times at once, also for different layers, and akv_quantize_kv for
// different layers at once.
akv_status akv_batch_create(struct akv_cache *cache, const struct akv_batch_desc *bounds, struct akv_batch **out);

// Begins a step: reserves the pages that its new tokens need in all layers, all or nothing, and makes the sequences
// its own. Until commit or abort nothing fails for capacity. A sequence that is in another begun batch is AKV_E_BUSY;
// one beyond the bounds or max_bytes AKV_E_CAPACITY; a batch that is begun already AKV_E_BUSY. Then, per layer:
// akv_quantize_kv (if tokens are new), akv_aligned_attention. `stream` is NULL on the CPU; on CUDA call it outside
// capture.
//
// Errors: AKV_E_ARGUMENT (a count, a sequence that is there twice, descending positions), AKV_E_HANDLE, AKV_E_BUSY,
// AKV_E_CAPACITY, AKV_E_MEMORY. The batch has no step then, and no sequence is changed.
akv_status akv_batch_begin(struct akv_batch *batch, const struct akv_batch_desc *desc, void *stream);

// Ends a step: its tokens are part of their sequences. AKV_E_ARGUMENT, naming the layer, if akv_quantize_kv is missing
// for one (the step stays begun), or if none is begun. AKV_E_BUSY while calls work on the step.
akv_status akv_batch_commit(struct akv_batch *batch);

// Says that a CUDA graph has been launched, on the step's stream, in which akv_quantize_kv of all layers was captured in
// an earlier step of this batch: the step's new tokens are in all layers, as if the calls had been made. The graph takes
// the step's sequences and rows from what akv_batch_begin told the device, with the addresses of K, V, q and outputs that
// it was captured with; query rows beyond the step's are left alone. Graphs of one batch must not run at the same time.
//
// Errors: AKV_E_ARGUMENT (no step is begun, or it is not within the batch's bounds, so that the graph did nothing),
// AKV_E_UNSUPPORTED on the CPU.
akv_status akv_batch_replayed(struct akv_batch *batch);

// Ends a step as if it had not begun: every sequence is as before, bit for bit. AKV_OK if none is begun; AKV_E_BUSY
// while calls work on the step.
akv_status akv_batch_abort(struct akv_batch *batch);

// Size and alignment of the workspace that any attention call within the batch's bounds can do with, in any layer, on
// up to max_threads of the caller's threads or on the context's. AKV_E_ARGUMENT if max_kv has no bound.
akv_status akv_batch_workspace(const struct akv_batch *batch, size_t *bytes, size_t *align);

// Destroys a batch; a begun step is aborted. AKV_E_BUSY while calls are in it.
akv_status akv_batch_destroy(struct akv_batch *batch);

// Appends the step's new tokens in one layer: quantizes `key` `[sum of n_new][n_kv_heads][dim_k]` and `value` `[sum of
// n_new][n_kv_heads][dim_v]` (NULL if the layer's v_is_prefix_of_k is 1), rows sequence by sequence, in the layer's
// dtypes, K after RoPE. Once per layer and step (a second time is AKV_E_ARGUMENT, and so is a layer that
// shares another's rows); without new tokens it does nothing.
// All rows are checked first: on error nothing is appended, and the call may be made again.
//
// Errors: AKV_E_ARGUMENT, AKV_E_NONFINITE, AKV_E_RANGE, AKV_E_BUSY (attention on the same layer is running).
akv_status akv_quantize_kv(struct akv_batch *batch,
                           int32_t layer,
                           const struct akv_rows *key,
                           const struct akv_rows *value,
                           void *stream);

// ---- Attention, and merging partial attention -----------------------------------------------------------------------

// Attention of the step's query rows over their sequences' rows in one layer. Query row j of a sequence's n_q is its
// token len - n_q + j, where len counts the step's new tokens. Sequences with up to 8 query rows take the progressive
// path: plane 0 of all visible keys is scanned, every token's share of the error decides how many further digits of
// its K and V are read, and the certificate says how far off the result can be. Longer ones (prefill), AKV_EXACT,
// AKV_FORMAT_RAW and layers with v_is_prefix_of_k take the dense path. On the CPU a row's result, bit for bit, depends
// on its sequence and on whether that has more than 8 query rows: not on the other rows, the other sequences of the
// batch, or the number of threads.
//
// Cross-attention: with AKV_FULL, no window and no alibi_slopes nothing depends on where a row is, and n_q may be
// larger than len. Otherwise more query rows than tokens are AKV_E_ARGUMENT.
//
// Errors: AKV_E_ARGUMENT (also if the layer lacks its akv_quantize_kv), AKV_E_NONFINITE (q), AKV_E_UNSUPPORTED,
// AKV_E_BUSY (akv_quantize_kv on the same layer is running), AKV_E_MEMORY and AKV_E_CAPACITY (the batch's own
// workspace): outputs are untouched. AKV_E_RANGE (scores beyond binary32, outputs beyond out's dtype) and
// AKV_E_INTERNAL: they are undefined.
akv_status akv_aligned_attention(struct akv_batch *batch, int32_t layer, const struct akv_attention_desc *desc);

// Merges `n` partial states over disjoint parts of a context (see kv_from) into the state of the whole: outputs by
// their LSE, bounds rigorously. Empty parts have lse = -inf. An array of `out` may be the same one of any of `states`,
// but must not overlap others. `[rows][heads][dim]`, dim up to 576 (256 on CUDA), all f32, host memory on the CPU. On
// the CPU what is NaN in a part (AKV_NAN_PROPAGATE) is NaN in the whole.
akv_status akv_merge_states(struct akv_context *context,
                            const struct akv_state *states,
                            int32_t n,
                            int64_t rows,
                            int32_t heads,
                            int32_t dim,
                            const struct akv_state *out,
                            void *stream);

// ---- Placements where the engine's cells are the truth (AKV_SLOTS, AKV_ATTACHED), and their masks -------------------

// Writes rows to `n` cells: row i of `key` `[n][n_kv_heads][dim_k]` (after RoPE) and `value`
// `[n][n_kv_heads][dim_v]` goes to slot `slots[i]` (see akv_cache_desc.n_slots), in the layer's dtypes. AKV_SLOTS:
// either may be NULL, then only the other is written. AKV_ATTACHED: both are NULL; the attached rows of these slots
// have changed, K or V or both. A slot that is there twice holds the later row. All rows are checked first: on error
// nothing is written. Writing takes no memory and cannot fail for lack of it.
//
// Scales only grow while a tile of 128 cells is written to; one whose cells have all been written since it last was
// closed gets the scales of its rows alone, as if it had been appended, once it is closed again. Rows of the last
// written tiles (a sixteenth of the layer's, two per stream at least) are kept as given; others are closed. A write
// to a closed one reopens it: rows that outgrow its scales re-encode what is there, and what that loses is in every
// later certificate.
//
// Errors: AKV_E_ARGUMENT, AKV_E_NONFINITE, AKV_E_RANGE, AKV_E_BUSY (attention or another write on the layer is
// running). On CUDA rows that cannot be stored are akv_poll's to tell, a stream that is captured is AKV_E_UNSUPPORTED, and
// after AKV_E_DEVICE what the slots hold is undefined.
akv_status akv_slots_write(struct akv_cache *cache,
                           int32_t layer,
                           const int64_t *slots,
                           int64_t n,
                           const struct akv_rows *key,
                           const struct akv_rows *value,
                           void *stream);

// Reads slots `first..first + n` back, in any dtype: rows that are kept as given exactly, others decoded with all
// stored planes, cells without rows as zeros. Either of `key` and `value` may be NULL. AKV_E_RANGE, with nothing
// written, if a value is too large for the dtype (on CUDA infinity is written, and akv_poll tells of it); AKV_E_BUSY while
// the layer is written. AKV_SLOTS only (attached rows are the caller's). On CUDA outside of capture.
akv_status akv_slots_read(struct akv_cache *cache,
                          int32_t layer,
                          int64_t first,
                          int64_t n,
                          const struct akv_rows *key,
                          const struct akv_rows *value,
                          void *stream);

// Forgets slots `first..first + n`, in `layer` or, with -1, in all: they are not seen, and read as zeros. A tile of
// which nothing is left starts afresh. AKV_E_BUSY, with nothing forgotten, while other calls use a layer.
akv_status akv_slots_invalidate(struct akv_cache *cache, int32_t layer, int64_t first, int64_t n);

// Copies `n` slots from `from` on to those from `to` on, in `layer` or, with -1, in all. Whole tiles (cells of both
// streams from the same multiple of 128 on) are copied as they are stored; other rows are decoded and written anew,
// with an error that every later certificate contains. The two stretches must not overlap. AKV_SLOTS only.
// AKV_E_BUSY (other calls use a layer) and AKV_E_MEMORY (room for a row): nothing is copied. On CUDA it waits for all work
// of the CUDA context, before and after.
akv_status akv_slots_copy(struct akv_cache *cache,
                          int32_t layer,
                          int64_t from,
                          int64_t to,
                          int64_t n);

// Names the engine's own rows of a layer (AKV_ATTACHED): `[n_streams * n_slots][n_kv_heads][dim]`, in the layer's
// dtypes. Only read, in akv_slots_write and akv_slots_attention, and only where cells have been written; valid until
// others are named or the cache is destroyed. Naming rows forgets what had been written. AKV_E_BUSY while other calls
// use the layer.
akv_status akv_attach_rows(struct akv_cache *cache,
                           int32_t layer,
                           const struct akv_rows *key,
                           const struct akv_rows *value);

// Attention of query rows over cells, as akv_aligned_attention: the rows of `desc->q` and of the outputs lie span by
// span, and row r of all sees, of its span's cells, what row r of `desc->mask` lets it see (all of them without a
// mask). Cells without both K and V are never seen. Spans of up to 8 rows take the progressive path, longer ones the
// dense one. visibility, window, kv_from, kv_to and tree must be 0 or NULL: the mask says it all.
//
// `desc->threads` with nth > 1 needs `desc->workspace` (akv_slots_workspace); on CUDA so does a stream that is captured.
//
// Flat attention is cheap with AKV_SLOTS; with AKV_ATTACHED a token that needs more than the index reads whole rows,
// so that it can read more than the rows alone would have been.
//
// Errors: as akv_aligned_attention; AKV_E_ARGUMENT (also a mask of too few rows or cells), AKV_E_HANDLE (a mask of
// another context), AKV_E_BUSY (the layer is being written, or the mask set).
akv_status akv_slots_attention(struct akv_cache *cache,
                               int32_t layer,
                               const struct akv_span *spans,
                               int32_t n_spans,
                               const struct akv_attention_desc *desc);

// Size and alignment of the workspace that akv_slots_attention can do with, in any layer, over spans of up to `max_kv`
// cells and on up to `max_threads` threads (0 = the context's; not used on CUDA). It does not depend on the number of
// query rows: on CUDA they take turns, 64 at once, or 1024 where all read every digit.
akv_status akv_slots_workspace(const struct akv_cache *cache,
                               int64_t max_kv,
                               int32_t max_threads,
                               size_t *bytes,
                               size_t *align);

// Makes a mask of up to `max_rows` query rows and `max_kv` cells, for caches of `context`: as many layers and caches
// as share what their rows see. Until they are set, rows see nothing. `*out` is written on success only.
//
// On CUDA all of its memory is taken here: 276 bytes for each row and 128 cells.
//
// Threads: a mask is used by any number of attention calls at once, or set by one call; otherwise AKV_E_BUSY.
akv_status akv_mask_create(struct akv_context *context, int64_t max_rows, int64_t max_kv, struct akv_mask **out);

// Sets rows `first_row..first_row + rows` of a mask from f16 `[rows][n_kv]`, `stride` bytes from a row to the next (0
// = contiguous): -inf hides a cell, any other value is added to its score, times the query head's `alibi_slopes` if
// there are any. Cells from `n_kv` on are hidden. The values are copied. Do it once per graph, not once per layer:
// whole tiles that a row does not see are skipped. AKV_E_ARGUMENT for NaN and +inf, AKV_E_CAPACITY beyond the mask's
// size, AKV_E_MEMORY (the first time that something is added); nothing is set then. On CUDA NaN and +inf hide a cell,
// and akv_poll tells of them.
akv_status akv_mask_set(struct akv_mask *mask,
                        int64_t first_row,
                        int64_t rows,
                        int64_t n_kv,
                        const void *f16,
                        int64_t stride,
                        void *stream);

// Destroys a mask. AKV_E_BUSY while calls use it.
akv_status akv_mask_destroy(struct akv_mask *mask);

#ifdef __cplusplus
}
#endif

#endif
