/* What happens when something goes wrong: every refused call returns its status, names the argument in akv_last_error,
 * and changes nothing: neither outputs nor lengths nor memory in use.
 */
#define _GNU_SOURCE
#include "check.h"
#include <dlfcn.h>
#include <pthread.h>
#include <unistd.h>

enum { Q_HEADS = 4, HEADS = 2, DIM = 32, DIM_V = 16, ROWS = 2, COMMITTED = 130, MAX_KV = 400 };

/* The world that refused calls must leave as it is. */
static akv_context *context;
static akv_cache *cache;
static akv_batch *batch, *idle; /* begun; not begun */
static akv_sequence sequence, other;

static float q[ROWS * Q_HEADS * DIM], key[ROWS * HEADS * DIM], value[ROWS * HEADS * DIM_V];
static struct {
    float out[ROWS * Q_HEADS * DIM_V], lse[ROWS * Q_HEADS], bound[ROWS * Q_HEADS];
    float key[ROWS * HEADS * DIM], value[ROWS * HEADS * DIM_V];
    akv_stats stats;
    void *handle;
    akv_sequence sequence;
    int64_t length;
    size_t bytes, align;
    akv_usage usage;
} written, untouched; /* outputs, and what they hold before the call */

static akv_layer_desc good_layer = {.n_q_heads = Q_HEADS, .n_kv_heads = HEADS, .dim_k = DIM, .dim_v = DIM_V};
static akv_context_desc good_context = {.struct_size = sizeof good_context, .abi_version = AKV_ABI_VERSION};
static akv_cache_desc good_cache = {.struct_size = sizeof good_cache, .n_layers = 1, .layers = &good_layer, .max_sequences = 3};
static akv_batch_desc good_bounds = {.struct_size = sizeof good_bounds, .max_sequences = 2, .max_q = 4, .max_kv = MAX_KV, .max_threads = 2};
static const int32_t n_new[2] = {1, 1}, n_q[2] = {1, 1};
static akv_sequence both[2];
static akv_batch_desc good_step = {.struct_size = sizeof good_step, .n_sequences = 2, .sequences = both, .n_new = n_new, .n_q = n_q};
static akv_attention_desc good_attention = {.struct_size = sizeof good_attention, .q = {.data = q}, .out = {.data = written.out}};
static akv_rows good_key = {.data = key}, good_value = {.data = value};
static akv_rows key_out = {.data = written.key}, value_out = {.data = written.value};

typedef struct {
    akv_usage usage;
    int64_t length[2], begun[2];
} world;

static world look(void) {
    world w;
    akv_sequence s[2] = {sequence, other};
    memset(&w, 0, sizeof w);
    w.usage.struct_size = sizeof w.usage;
    OK(akv_cache_usage(cache, &w.usage));
    for (int i = 0; i < 2; i++) {
        OK(akv_sequence_length(cache, s[i], -1, &w.length[i]));
        OK(akv_sequence_length(cache, s[i], 0, &w.begun[i]));
    }
    return w;
}

static world before;

static void refused(akv_status status, akv_status want, const char *word, const char *call, int line) {
    world now = look();
    CHECK(status == want, "line %d: %s is %s, not %s: %s", line, call, akv_status_string(status), akv_status_string(want), last_error());
    if (status != AKV_OK) CHECK(strstr(last_error(), word), "line %d: %s: %s: \"%s\" does not name %s", line, call, akv_status_string(status), last_error(), word);
    CHECK(memcmp(&now, &before, sizeof now) == 0, "line %d: %s changed the cache", line, call);
    CHECK(memcmp(&written, &untouched, sizeof written) == 0, "line %d: %s wrote an output", line, call);
    memcpy(&written, &untouched, sizeof written);
}

/* REFUSED(call, status, word of the text); below it, one macro per descriptor: status, word, what to spoil in a good one. */
#define REFUSED(call, want, word) refused(call, want, word, #call, __LINE__)
#define SPOILT(type, good, call, want, word, ...)                                \
    do {                                                                         \
        type d = good;                                                           \
        __VA_ARGS__;                                                             \
        refused(call, want, word, #__VA_ARGS__, __LINE__);                       \
    } while (0)
#define CONTEXT(...) SPOILT(akv_context_desc, good_context, akv_context_create(&d, (akv_context **)&written.handle), __VA_ARGS__)
#define BOUNDS(...) SPOILT(akv_batch_desc, good_bounds, akv_batch_create(cache, &d, (akv_batch **)&written.handle), __VA_ARGS__)
#define BEGIN(...) SPOILT(akv_batch_desc, good_step, akv_batch_begin(idle, &d, NULL), __VA_ARGS__)
#define ATTENTION(...) SPOILT(akv_attention_desc, good_attention, akv_aligned_attention(batch, 0, &d), __VA_ARGS__)
/* K, then V, of the same call. */
#define KEY(...) SPOILT(akv_rows, good_key, akv_quantize_kv(batch, 0, &d, &good_value, NULL), __VA_ARGS__)
#define VALUE(...) SPOILT(akv_rows, good_value, akv_quantize_kv(batch, 0, &good_key, &d, NULL), __VA_ARGS__)
#define KEY_OUT(...) SPOILT(akv_rows, key_out, akv_dequantize_kv(cache, sequence, 0, 0, 2, &d, &value_out, NULL), __VA_ARGS__)
/* A cache that cannot be: akv_supports says the same, word for word but for the name of its argument. */
#define CACHE_AND(type, good, attention, ...)                                                                                  \
    do {                                                                                                                       \
        SPOILT(type, good, akv_cache_create(context, CACHE_DESC, (akv_cache **)&written.handle), __VA_ARGS__);                 \
        SPOILT(type, good, akv_supports(context, CACHE_DESC, attention, NULL), __VA_ARGS__);                                   \
    } while (0)
#define CACHE_DESC &d
#define CACHE(...) CACHE_AND(akv_cache_desc, good_cache, NULL, __VA_ARGS__)
#define LAYER(want, word, ...) CACHE_AND(akv_cache_desc, good_cache, NULL, want, word, akv_layer_desc l = good_layer; d.layers = &l; __VA_ARGS__)

static void versions(void) {
    struct {
        akv_cache_desc desc;
        uint64_t tail[2];
    } later = {good_cache, {0, 0}};
    later.desc.struct_size = sizeof later;
    OK(akv_cache_create(context, &later.desc, (akv_cache **)&written.handle)); /* a zero tail is fine */
    OK(akv_cache_destroy(written.handle));
    written.handle = untouched.handle;
    later.tail[1] = 1;
    REFUSED(akv_cache_create(context, &later.desc, (akv_cache **)&written.handle), AKV_E_VERSION, "desc");
    REFUSED(akv_supports(context, &later.desc, NULL, NULL), AKV_E_VERSION, "cache");
    CONTEXT(AKV_E_VERSION, "abi_version", d.abi_version = AKV_ABI_VERSION + 1);
    CONTEXT(AKV_E_VERSION, "abi_version", d.abi_version = 0);
    CONTEXT(AKV_E_ARGUMENT, "struct_size", d.struct_size = 0);
    CONTEXT(AKV_E_ARGUMENT, "struct_size", d.struct_size -= 1);
    CACHE(AKV_E_ARGUMENT, "struct_size", d.struct_size = 0);
    CACHE(AKV_E_ARGUMENT, "struct_size", d.struct_size -= 8);
    BOUNDS(AKV_E_ARGUMENT, "struct_size", d.struct_size = 8);
    BEGIN(AKV_E_ARGUMENT, "struct_size", d.struct_size = 0xcccccccc);
    ATTENTION(AKV_E_ARGUMENT, "struct_size", d.struct_size = 0);
    written.usage.struct_size = untouched.usage.struct_size = 3;
    REFUSED(akv_cache_usage(cache, &written.usage), AKV_E_ARGUMENT, "struct_size");
}

static void *allocate_nothing(void *user, size_t bytes, size_t align, int32_t backend, void *stream) {
    return (void)user, (void)bytes, (void)align, (void)backend, (void)stream, NULL;
}

static void deallocate_nothing(void *user, void *p, size_t bytes, int32_t backend, void *stream) {
    (void)user, (void)bytes, (void)backend, (void)stream;
    CHECK(p == NULL, "asked to free what was never allocated");
}

static void contexts(void) {
    int32_t path = 0;
    REFUSED(akv_context_create(NULL, (akv_context **)&written.handle), AKV_E_ARGUMENT, "desc");
    REFUSED(akv_context_create(&good_context, NULL), AKV_E_ARGUMENT, "out");
    REFUSED(akv_context_create((void *)((char *)&good_context + 2), (akv_context **)&written.handle), AKV_E_ARGUMENT, "desc");
    CONTEXT(AKV_E_UNSUPPORTED, "backend", d.backend = AKV_CUDA);
    CONTEXT(AKV_E_ARGUMENT, "backend", d.backend = 3);
    CONTEXT(AKV_E_ARGUMENT, "isa", d.isa = 4);
    CONTEXT(AKV_E_ARGUMENT, "isa", d.isa = -1);
    CONTEXT(AKV_E_ARGUMENT, "n_threads", d.n_threads = -1);
    CONTEXT(AKV_E_ARGUMENT, "n_threads", d.n_threads = INT32_MAX);
    CONTEXT(AKV_E_ARGUMENT, "device", d.device = -1);
    CONTEXT(AKV_E_ARGUMENT, "dealloc", d.alloc = allocate_nothing);
    CONTEXT(AKV_E_ARGUMENT, "alloc", d.dealloc = deallocate_nothing);
    setenv("AKV_ISA", "neon9", 1);
    CONTEXT(AKV_E_ARGUMENT, "AKV_ISA", (void)d);
    unsetenv("AKV_ISA");
    setenv("AKV_BACKEND", "cuda", 1);
    CONTEXT(AKV_E_UNSUPPORTED, "backend", (void)d);
    unsetenv("AKV_BACKEND");
    REFUSED(akv_context_destroy(NULL), AKV_E_HANDLE, "context");
    REFUSED(akv_context_destroy(context), AKV_E_BUSY, "context");
    REFUSED(akv_poll(NULL, NULL, NULL, NULL), AKV_E_HANDLE, "context");
    OK(akv_poll(context, NULL, NULL, NULL));
    OK(akv_supports(context, &good_cache, NULL, &path));
    CHECK(path == (AKV_PATH_PROGRESSIVE | AKV_PATH_DENSE), "path %d", path);
    OK(akv_supports(context, &good_cache, &good_attention, NULL));
    REFUSED(akv_supports(NULL, &good_cache, NULL, NULL), AKV_E_HANDLE, "context");
    REFUSED(akv_supports(context, NULL, NULL, NULL), AKV_E_ARGUMENT, "cache");
}

static void caches(void) {
    float slopes[Q_HEADS] = {0};
    const uint64_t tree[2] = {0};
    REFUSED(akv_cache_create(NULL, &good_cache, (akv_cache **)&written.handle), AKV_E_HANDLE, "context");
    REFUSED(akv_cache_create((akv_context *)cache, &good_cache, (akv_cache **)&written.handle), AKV_E_HANDLE, "context");
    REFUSED(akv_cache_create(context, NULL, (akv_cache **)&written.handle), AKV_E_ARGUMENT, "desc");
    REFUSED(akv_cache_create(context, &good_cache, NULL), AKV_E_ARGUMENT, "out");
    CACHE(AKV_E_ARGUMENT, "flags", d.flags = 1);
    CACHE(AKV_E_ARGUMENT, "n_streams", d.n_streams = 1);
    CACHE(AKV_E_ARGUMENT, "format", d.format = 3);
    CACHE(AKV_E_ARGUMENT, "placement", d.placement = -1);
    CACHE(AKV_E_ARGUMENT, "n_slots", d.placement = AKV_SLOTS);
    CACHE(AKV_E_ARGUMENT, "n_slots", d.placement = AKV_ATTACHED);
    CACHE(AKV_E_ARGUMENT, "format", d.placement = AKV_ATTACHED, d.n_slots = 1, d.format = AKV_FORMAT_RAW);
    CACHE(AKV_E_ARGUMENT, "nan_policy", d.nan_policy = 3);
    CACHE(AKV_E_ARGUMENT, "nan_policy", d.nan_policy = AKV_NAN_ZERO; d.placement = AKV_ATTACHED; d.n_slots = 256);
    CACHE(AKV_E_ARGUMENT, "n_layers", d.n_layers = 0);
    CACHE(AKV_E_ARGUMENT, "n_layers", d.n_layers = -1);
    CACHE(AKV_E_ARGUMENT, "n_layers", d.n_layers = 4097);
    CACHE(AKV_E_ARGUMENT, "layers", d.layers = NULL);
    CACHE(AKV_E_ARGUMENT, "layers", d.layers = (void *)((char *)&good_layer + 1));
    CACHE(AKV_E_ARGUMENT, "exact_head", d.exact_head = 129);
    CACHE(AKV_E_ARGUMENT, "exact_tail", d.exact_tail = 129);
    CACHE(AKV_E_ARGUMENT, "dtype_k", d.format = AKV_FORMAT_PUBLISHED); /* of f32 rows */
    LAYER(AKV_E_ARGUMENT, "n_q_heads", l.n_q_heads = 0);
    LAYER(AKV_E_ARGUMENT, "n_q_heads", l.n_q_heads = 5);
    LAYER(AKV_E_ARGUMENT, "n_q_heads", l.n_q_heads = 65 * HEADS);
    LAYER(AKV_E_ARGUMENT, "n_kv_heads", l.n_kv_heads = 0);
    LAYER(AKV_E_ARGUMENT, "n_kv_heads", l.n_kv_heads = -2);
    LAYER(AKV_E_ARGUMENT, "dim_k", l.dim_k = 8);
    LAYER(AKV_E_ARGUMENT, "dim_k", l.dim_k = 60);
    LAYER(AKV_E_ARGUMENT, "dim_k", l.dim_k = 264);
    LAYER(AKV_E_ARGUMENT, "dim_k", l.dim_k = 0);
    LAYER(AKV_E_ARGUMENT, "dim_v", l.dim_v = 20);
    LAYER(AKV_E_ARGUMENT, "dim_v", l.dim_v = -16);
    LAYER(AKV_E_ARGUMENT, "dtype_k", l.dtype_k = 3);
    LAYER(AKV_E_ARGUMENT, "dtype_v", l.dtype_v = -1);
    LAYER(AKV_E_ARGUMENT, "planes_k", l.planes_k = 1);
    LAYER(AKV_E_ARGUMENT, "planes_v", l.planes_v = 5);
    LAYER(AKV_E_ARGUMENT, "window", l.window = -1);
    LAYER(AKV_E_UNSUPPORTED, "group", l.group = 1);
    LAYER(AKV_E_ARGUMENT, "share_with", l.share_with = 1); /* of itself */
    LAYER(AKV_E_ARGUMENT, "v_is_prefix_of_k", l.v_is_prefix_of_k = 2);
    /* Attention that akv_supports and the call refuse alike. */
#define BOTH(...)                                                                                        \
    do {                                                                                                 \
        ATTENTION(__VA_ARGS__);                                                                          \
        SPOILT(akv_attention_desc, good_attention, akv_supports(context, &good_cache, &d, NULL), __VA_ARGS__); \
    } while (0)
    BOTH(AKV_E_ARGUMENT, "flags", d.flags = 2);
    BOTH(AKV_E_ARGUMENT, "mode", d.mode = 3);
    BOTH(AKV_E_ARGUMENT, "visibility", d.visibility = 2);
    BOTH(AKV_E_ARGUMENT, "window", d.window = -1);
    BOTH(AKV_E_ARGUMENT, "tolerance", d.tolerance = -1);
    BOTH(AKV_E_ARGUMENT, "tolerance", d.tolerance = NAN);
    BOTH(AKV_E_ARGUMENT, "scale", d.scale = INFINITY);
    BOTH(AKV_E_ARGUMENT, "logit_softcap", d.logit_softcap = -30);
    ATTENTION(AKV_E_ARGUMENT, "alibi_slopes", d.alibi_slopes = (const float *)((const char *)slopes + 1));
    ATTENTION(AKV_E_ARGUMENT, "tree", d.tree = (const uint64_t *)((const char *)tree + 1));
    REFUSED(akv_cache_destroy(NULL), AKV_E_HANDLE, "cache");
    REFUSED(akv_cache_destroy(cache), AKV_E_BUSY, "cache");
    REFUSED(akv_cache_usage(cache, NULL), AKV_E_ARGUMENT, "out");
    REFUSED(akv_cache_usage(NULL, &written.usage), AKV_E_HANDLE, "cache");
}

static void sequences(void) {
    akv_sequence dead;
    OK(akv_sequence_create(cache, &dead));
    OK(akv_sequence_destroy(cache, dead));
    REFUSED(akv_sequence_destroy(cache, dead), AKV_E_HANDLE, "sequence");
    REFUSED(akv_sequence_length(cache, dead, -1, &written.length), AKV_E_HANDLE, "sequence");
    REFUSED(akv_sequence_truncate(cache, dead, 0), AKV_E_HANDLE, "sequence");
    REFUSED(akv_sequence_fork(cache, dead, -1, &written.sequence), AKV_E_HANDLE, "sequence");
    REFUSED(akv_dequantize_kv(cache, dead, 0, 0, 0, &key_out, &value_out, NULL), AKV_E_HANDLE, "sequence");
    REFUSED(akv_sequence_length(cache, 0, -1, &written.length), AKV_E_HANDLE, "sequence");
    REFUSED(akv_sequence_length(cache, UINT64_MAX, -1, &written.length), AKV_E_HANDLE, "sequence");
    REFUSED(akv_sequence_length(cache, sequence, 1, &written.length), AKV_E_ARGUMENT, "layer");
    REFUSED(akv_sequence_length(cache, sequence, -2, &written.length), AKV_E_ARGUMENT, "layer");
    REFUSED(akv_sequence_length(cache, sequence, 0, NULL), AKV_E_ARGUMENT, "out");
    REFUSED(akv_sequence_length(NULL, sequence, 0, &written.length), AKV_E_HANDLE, "cache");
    REFUSED(akv_sequence_create(cache, NULL), AKV_E_ARGUMENT, "out");
    REFUSED(akv_sequence_create(NULL, &written.sequence), AKV_E_HANDLE, "cache");
    REFUSED(akv_sequence_destroy(cache, sequence), AKV_E_BUSY, "sequence");
    REFUSED(akv_sequence_truncate(cache, sequence, 1), AKV_E_BUSY, "sequence");
    REFUSED(akv_sequence_fork(cache, sequence, 1, &written.sequence), AKV_E_BUSY, "sequence");
    REFUSED(akv_sequence_truncate(cache, other, COMMITTED + 1), AKV_E_ARGUMENT, "n_tokens");
    REFUSED(akv_sequence_truncate(cache, other, -1), AKV_E_ARGUMENT, "n_tokens");
    REFUSED(akv_sequence_fork(cache, other, COMMITTED + 1, &written.sequence), AKV_E_ARGUMENT, "n_tokens");
    REFUSED(akv_sequence_fork(cache, other, -2, &written.sequence), AKV_E_ARGUMENT, "n_tokens");
    REFUSED(akv_sequence_fork(cache, other, 1, NULL), AKV_E_ARGUMENT, "out");
    REFUSED(akv_sequence_copy(cache, dead, cache, &written.sequence), AKV_E_HANDLE, "sequence");
    REFUSED(akv_sequence_copy(cache, other, NULL, &written.sequence), AKV_E_HANDLE, "to_cache");
    REFUSED(akv_sequence_copy(NULL, other, cache, &written.sequence), AKV_E_HANDLE, "from_cache");
    REFUSED(akv_sequence_copy(cache, other, cache, NULL), AKV_E_ARGUMENT, "out");
    REFUSED(akv_sequence_reserve(cache, other, -1), AKV_E_ARGUMENT, "n_tokens");
    REFUSED(akv_sequence_reserve(cache, other, INT64_MAX), AKV_E_ARGUMENT, "n_tokens");
    REFUSED(akv_sequence_reserve(cache, dead, 1), AKV_E_HANDLE, "sequence");
    REFUSED(akv_sequence_reserve(cache, sequence, 1), AKV_E_BUSY, "sequence");
    REFUSED(akv_sequence_remove(cache, other, 5, 1), AKV_E_ARGUMENT, "to_position");
    REFUSED(akv_sequence_remove(cache, dead, 0, 1), AKV_E_HANDLE, "sequence");
    REFUSED(akv_sequence_shift(cache, other, 0, 1, 1, NULL), AKV_E_ARGUMENT, "rope_per_layer");
    REFUSED(akv_sequence_export(cache, other, NULL, NULL, NULL), AKV_E_ARGUMENT, "write");
    REFUSED(akv_sequence_import(cache, 0, NULL, NULL, &written.sequence), AKV_E_ARGUMENT, "read");
    /* Reading back. */
    REFUSED(akv_dequantize_kv(cache, sequence, 1, 0, 1, &key_out, NULL, NULL), AKV_E_ARGUMENT, "layer");
    REFUSED(akv_dequantize_kv(cache, sequence, 0, -1, 1, &key_out, NULL, NULL), AKV_E_ARGUMENT, "first");
    REFUSED(akv_dequantize_kv(cache, sequence, 0, 0, -1, &key_out, NULL, NULL), AKV_E_ARGUMENT, "n is");
    REFUSED(akv_dequantize_kv(cache, other, 0, COMMITTED, 1, &key_out, NULL, NULL), AKV_E_ARGUMENT, "n");
    REFUSED(akv_dequantize_kv(cache, other, 0, 1, INT64_MAX, &key_out, NULL, NULL), AKV_E_ARGUMENT, "n");
    KEY_OUT(AKV_E_ARGUMENT, "key->data", d.data = NULL);
    KEY_OUT(AKV_E_ARGUMENT, "key->data", d.data = (char *)d.data + 1);
    KEY_OUT(AKV_E_ARGUMENT, "key->dtype", d.dtype = 7);
    KEY_OUT(AKV_E_ARGUMENT, "key->reserved", d.reserved = 7);
    KEY_OUT(AKV_E_ARGUMENT, "key->stride_row", d.stride_row = 30);
    KEY_OUT(AKV_E_ARGUMENT, "key->stride_head", d.stride_head = -4);
    KEY_OUT(AKV_E_ARGUMENT, "key", d.stride_row = INT64_MAX & ~3);
    KEY_OUT(AKV_E_ARGUMENT, "overlap", d.data = written.value);
}

static void batches(void) {
    static const int32_t many[2] = {MAX_KV, 1}, negative[2] = {1, -1}, none[2] = {0, 0}, huge[2] = {INT32_MAX, INT32_MAX}, more_q[2] = {1, COMMITTED + 2};
    static const int64_t back[2] = {5, 5}, below[2] = {-1, -1};
    akv_sequence twice[2] = {other, other}, unknown[2] = {other, 12345}, three[3] = {other, other, other};
    both[0] = other, both[1] = other; /* `sequence` is in a begun batch */
    good_step.n_sequences = 1;
    REFUSED(akv_batch_create(NULL, &good_bounds, (akv_batch **)&written.handle), AKV_E_HANDLE, "cache");
    REFUSED(akv_batch_create((akv_cache *)context, &good_bounds, (akv_batch **)&written.handle), AKV_E_HANDLE, "cache");
    REFUSED(akv_batch_create(cache, NULL, (akv_batch **)&written.handle), AKV_E_ARGUMENT, "bounds");
    REFUSED(akv_batch_create(cache, &good_bounds, NULL), AKV_E_ARGUMENT, "out");
    BOUNDS(AKV_E_ARGUMENT, "n_sequences", d.n_sequences = 1);
    BOUNDS(AKV_E_ARGUMENT, "sequences", d.sequences = both);
    BOUNDS(AKV_E_ARGUMENT, "n_new", d.n_new = n_new);
    BOUNDS(AKV_E_ARGUMENT, "n_q", d.n_q = n_q);
    BOUNDS(AKV_E_ARGUMENT, "positions", d.positions = back);
    BOUNDS(AKV_E_ARGUMENT, "max_sequences", d.max_sequences = -1);
    BOUNDS(AKV_E_ARGUMENT, "max_q", d.max_q = -1);
    BOUNDS(AKV_E_ARGUMENT, "max_kv", d.max_kv = -1);
    BOUNDS(AKV_E_ARGUMENT, "max_threads", d.max_threads = -1);
    BOUNDS(AKV_E_ARGUMENT, "reserved", d.reserved = 1);
    REFUSED(akv_batch_begin(NULL, &good_step, NULL), AKV_E_HANDLE, "batch");
    REFUSED(akv_batch_begin(idle, NULL, NULL), AKV_E_ARGUMENT, "desc");
    REFUSED(akv_batch_begin(idle, &good_step, &q), AKV_E_ARGUMENT, "stream");
    REFUSED(akv_batch_begin(batch, &good_step, NULL), AKV_E_BUSY, "step in progress");
    BEGIN(AKV_E_ARGUMENT, "sequences", d.sequences = NULL);
    BEGIN(AKV_E_ARGUMENT, "sequences", d.sequences = (void *)((char *)both + 4));
    BEGIN(AKV_E_ARGUMENT, "n_sequences", d.n_sequences = 0);
    BEGIN(AKV_E_ARGUMENT, "sequences", d.n_sequences = 2; d.sequences = twice);
    BEGIN(AKV_E_HANDLE, "sequence", d.n_sequences = 2; d.sequences = unknown);
    BEGIN(AKV_E_BUSY, "sequence", d.sequences = &sequence);
    BEGIN(AKV_E_CAPACITY, "max_sequences", d.n_sequences = 3; d.sequences = three; d.n_new = d.n_q = NULL);
    BEGIN(AKV_E_CAPACITY, "max_kv", d.n_new = many);
    BEGIN(AKV_E_CAPACITY, "max_q", d.n_q = more_q; d.n_q++);
    BEGIN(AKV_E_ARGUMENT, "n_new", d.n_new = negative + 1);
    BEGIN(AKV_E_ARGUMENT, "n_q", d.n_q = negative + 1);
    BEGIN(AKV_E_CAPACITY, "max_kv", d.n_new = huge; d.n_q = none);
    BEGIN(AKV_E_ARGUMENT, "positions", d.positions = back); /* the last token stands at COMMITTED - 1 */
    BEGIN(AKV_E_ARGUMENT, "positions", d.positions = below);
    BEGIN(AKV_E_ARGUMENT, "max_kv", d.max_kv = 1);
    BEGIN(AKV_E_ARGUMENT, "max_q", d.max_q = 1);
    BEGIN(AKV_E_ARGUMENT, "max_threads", d.max_threads = 1);
    BEGIN(AKV_E_ARGUMENT, "max_sequences", d.max_sequences = 1);
    BEGIN(AKV_E_ARGUMENT, "reserved", d.reserved = 1);
    REFUSED(akv_batch_commit(NULL), AKV_E_HANDLE, "batch");
    REFUSED(akv_batch_commit(idle), AKV_E_ARGUMENT, "no step");
    REFUSED(akv_batch_commit(batch), AKV_E_ARGUMENT, "layer 0"); /* akv_quantize_kv is missing */
    REFUSED(akv_batch_abort(NULL), AKV_E_HANDLE, "batch");
    OK(akv_batch_abort(idle));
    REFUSED(akv_batch_workspace(batch, NULL, &written.align), AKV_E_ARGUMENT, "bytes");
    REFUSED(akv_batch_workspace(batch, &written.bytes, NULL), AKV_E_ARGUMENT, "align");
    REFUSED(akv_batch_workspace(NULL, &written.bytes, &written.align), AKV_E_HANDLE, "batch");
    akv_batch_desc unbounded = {.struct_size = sizeof unbounded};
    akv_batch *free_batch;
    OK(akv_batch_create(cache, &unbounded, &free_batch));
    before = look();
    REFUSED(akv_batch_workspace(free_batch, &written.bytes, &written.align), AKV_E_ARGUMENT, "max_");
    /* All or nothing: a step that fits one sequence and not the other. And no room at all: sizes overflow nowhere. */
    OK(akv_batch_destroy(free_batch));
    before = look();
    REFUSED(akv_batch_destroy(free_batch), AKV_E_HANDLE, "batch");
    REFUSED(akv_batch_destroy(NULL), AKV_E_HANDLE, "batch");
}

static void appending(void) {
    REFUSED(akv_quantize_kv(NULL, 0, &good_key, &good_value, NULL), AKV_E_HANDLE, "batch");
    REFUSED(akv_quantize_kv(idle, 0, &good_key, &good_value, NULL), AKV_E_ARGUMENT, "no step");
    REFUSED(akv_quantize_kv(batch, 1, &good_key, &good_value, NULL), AKV_E_ARGUMENT, "layer");
    REFUSED(akv_quantize_kv(batch, -1, &good_key, &good_value, NULL), AKV_E_ARGUMENT, "layer");
    REFUSED(akv_quantize_kv(batch, 0, NULL, &good_value, NULL), AKV_E_ARGUMENT, "key");
    REFUSED(akv_quantize_kv(batch, 0, &good_key, NULL, NULL), AKV_E_ARGUMENT, "value");
    REFUSED(akv_quantize_kv(batch, 0, &good_key, &good_value, q), AKV_E_ARGUMENT, "stream");
    KEY(AKV_E_ARGUMENT, "key->data", d.data = NULL);
    KEY(AKV_E_ARGUMENT, "key->data", d.data = (char *)key + 2);
    KEY(AKV_E_ARGUMENT, "key->dtype", d.dtype = AKV_F16);
    KEY(AKV_E_ARGUMENT, "key->dtype", d.dtype = 3);
    KEY(AKV_E_ARGUMENT, "key->reserved", d.reserved = -1);
    KEY(AKV_E_ARGUMENT, "key->stride_row", d.stride_row = 3);
    KEY(AKV_E_ARGUMENT, "key->stride_head", d.stride_head = 126);
    KEY(AKV_E_ARGUMENT, "key->stride_head", d.stride_head = -128);
    KEY(AKV_E_ARGUMENT, "key", d.stride_head = INT64_MAX & ~3);
    VALUE(AKV_E_ARGUMENT, "value->dtype", d.dtype = AKV_BF16);
    VALUE(AKV_E_ARGUMENT, "value->data", d.data = NULL);
    static const float bad[] = {NAN, INFINITY, -INFINITY, 3.2e10f, -3.4e38f};
    for (int i = 0; i < 5; i++) { /* in the last channel of the last head: all rows are checked first */
        float keep = key[HEADS * DIM - 1];
        key[HEADS * DIM - 1] = bad[i];
        KEY(i < 3 ? AKV_E_NONFINITE : AKV_E_RANGE, "key", (void)d);
        key[HEADS * DIM - 1] = keep;
        keep = value[HEADS * DIM_V - 1];
        value[HEADS * DIM_V - 1] = bad[i];
        VALUE(i < 3 ? AKV_E_NONFINITE : AKV_E_RANGE, "value", (void)d);
        value[HEADS * DIM_V - 1] = keep;
    }
}

static void attention(void) {
    akv_threads two = {.ith = 0, .nth = 2}, odd = {.ith = 1, .nth = 1}, zero = {0};
    const int64_t negative = -1;
    size_t bytes, align;
    void *memory = NULL;
    OK(akv_batch_workspace(batch, &bytes, &align));
    REQUIRE(posix_memalign(&memory, align, bytes) == 0, "%zu bytes", bytes);
    memset(memory, 0, bytes);
    ATTENTION(AKV_E_ARGUMENT, "layer 0", (void)d); /* the step's tokens are missing */
    OK(akv_quantize_kv(batch, 0, &good_key, &good_value, NULL));
    before = look();
    CHECK(before.begun[0] == COMMITTED + 1 && before.length[0] == COMMITTED, "lengths %d, %d", (int)before.begun[0], (int)before.length[0]);
    REFUSED(akv_quantize_kv(batch, 0, &good_key, &good_value, NULL), AKV_E_ARGUMENT, "layer");
    REFUSED(akv_aligned_attention(NULL, 0, &good_attention), AKV_E_HANDLE, "batch");
    REFUSED(akv_aligned_attention((akv_batch *)cache, 0, &good_attention), AKV_E_HANDLE, "batch");
    REFUSED(akv_aligned_attention(idle, 0, &good_attention), AKV_E_ARGUMENT, "no step");
    REFUSED(akv_aligned_attention(batch, 1, &good_attention), AKV_E_ARGUMENT, "layer");
    REFUSED(akv_aligned_attention(batch, 0, NULL), AKV_E_ARGUMENT, "desc");
    ATTENTION(AKV_E_ARGUMENT, "q->data", d.q.data = NULL);
    ATTENTION(AKV_E_ARGUMENT, "q->data", d.q.data = (char *)q + 3);
    ATTENTION(AKV_E_ARGUMENT, "q->dtype", d.q.dtype = 9);
    ATTENTION(AKV_E_ARGUMENT, "q->reserved", d.q.reserved = 9);
    ATTENTION(AKV_E_ARGUMENT, "q->stride_row", d.q.stride_row = 2);
    ATTENTION(AKV_E_ARGUMENT, "q", d.q.stride_head = INT64_MAX & ~3);
    ATTENTION(AKV_E_ARGUMENT, "out->data", d.out.data = NULL);
    ATTENTION(AKV_E_ARGUMENT, "out->data", d.out.data = (char *)written.out + 1);
    ATTENTION(AKV_E_ARGUMENT, "out->dtype", d.out.dtype = -1);
    ATTENTION(AKV_E_ARGUMENT, "out->stride_head", d.out.stride_head = 4);
    ATTENTION(AKV_E_ARGUMENT, "overlap", d.out.data = q);
    ATTENTION(AKV_E_ARGUMENT, "overlap", d.out.data = q + Q_HEADS * DIM - 1);
    ATTENTION(AKV_E_ARGUMENT, "overlap", d.lse = written.out);
    ATTENTION(AKV_E_ARGUMENT, "overlap", d.lse = written.lse; d.bound = written.lse);
    ATTENTION(AKV_E_ARGUMENT, "overlap", d.stats = (akv_stats *)written.out);
    ATTENTION(AKV_E_ARGUMENT, "overlap", d.workspace = memory; d.workspace_bytes = bytes; d.out.data = (char *)memory + bytes - sizeof written.out);
    ATTENTION(AKV_E_ARGUMENT, "overlap", d.workspace = memory; d.workspace_bytes = bytes; d.q.data = memory);
    free(memory);
    ATTENTION(AKV_E_ARGUMENT, "bound", d.bound = (float *)((char *)written.bound + 2));
    ATTENTION(AKV_E_ARGUMENT, "stats", d.stats = (akv_stats *)((char *)&written.stats + 4));
    ATTENTION(AKV_E_ARGUMENT, "mask", d.mask = (akv_mask *)q);
    ATTENTION(AKV_E_ARGUMENT, "stream", d.stream = q);
    ATTENTION(AKV_E_ARGUMENT, "kv_from", d.kv_from = &negative);
    ATTENTION(AKV_E_ARGUMENT, "kv_to", d.kv_to = &negative);
    ATTENTION(AKV_E_ARGUMENT, "kv_from", d.kv_from = (const int64_t *)((char *)&negative + 1));
    ATTENTION(AKV_E_ARGUMENT, "nth", d.threads = &zero);
    ATTENTION(AKV_E_ARGUMENT, "ith", d.threads = &odd);
    ATTENTION(AKV_E_ARGUMENT, "barrier", d.threads = &two);
    ATTENTION(AKV_E_ARGUMENT, "workspace", d.workspace = q; d.workspace_bytes = 1);
    static const float bad[] = {NAN, INFINITY, -INFINITY};
    for (int i = 0; i < 3; i++) {
        float keep = q[Q_HEADS * DIM - 1];
        q[Q_HEADS * DIM - 1] = bad[i];
        ATTENTION(AKV_E_NONFINITE, "q", d.lse = written.lse);
        q[Q_HEADS * DIM - 1] = keep;
    }
    /* Merging. */
    akv_state part = {.out = q, .lse = q + 64}, sum = {.out = written.out, .lse = written.lse}, no_lse = {.out = q};
    REFUSED(akv_merge_states(NULL, &part, 1, 1, 2, 8, &sum, NULL), AKV_E_HANDLE, "context");
    REFUSED(akv_merge_states(context, NULL, 1, 1, 2, 8, &sum, NULL), AKV_E_ARGUMENT, "states");
    REFUSED(akv_merge_states(context, &part, 1, 1, 2, 8, NULL, NULL), AKV_E_ARGUMENT, "out");
    REFUSED(akv_merge_states(context, &part, 0, 1, 2, 8, &sum, NULL), AKV_E_ARGUMENT, "n is");
    REFUSED(akv_merge_states(context, &part, 1, -1, 2, 8, &sum, NULL), AKV_E_ARGUMENT, "rows");
    REFUSED(akv_merge_states(context, &part, 1, 1, -1, 8, &sum, NULL), AKV_E_ARGUMENT, "heads");
    REFUSED(akv_merge_states(context, &part, 1, 1, 2, -8, &sum, NULL), AKV_E_ARGUMENT, "dim");
    REFUSED(akv_merge_states(context, &part, 1, INT64_MAX, 2, 8, &sum, NULL), AKV_E_ARGUMENT, "rows");
    REFUSED(akv_merge_states(context, &no_lse, 1, 1, 2, 8, &sum, NULL), AKV_E_ARGUMENT, "lse");
    REFUSED(akv_merge_states(context, &part, 1, 1, 2, 8, &no_lse, NULL), AKV_E_ARGUMENT, "lse");
    REFUSED(akv_merge_states(context, &part, 1, 1, 2, 8, &sum, q), AKV_E_ARGUMENT, "stream");
}

/* ---- cells and masks */

enum { N_STREAMS = 2, N_SLOTS = 200, SLOTS = N_STREAMS * N_SLOTS, MASK_KV = 200 };

static akv_cache *cells, *attached; /* AKV_SLOTS; AKV_ATTACHED, whose layer 0 has rows and layer 1 none */
static akv_mask *mask;
static const int64_t slots[ROWS] = {5, 399};
static const akv_span spans[2] = {{.stream = 0, .n_q = 1, .n_kv = 130}, {.stream = 1, .n_q = 1, .n_kv = MASK_KV}};
static uint16_t hidden[ROWS * MASK_KV];
static float engine_k[SLOTS * HEADS * DIM], engine_v[SLOTS * HEADS * DIM_V];

/* Everything that the caches hold, as calls show it. */
typedef struct {
    akv_usage usage[2];
    float key[SLOTS * HEADS * DIM], value[SLOTS * HEADS * DIM_V], out[2][ROWS * Q_HEADS * DIM_V];
} contents;

static void look_inside(contents *c) {
    akv_rows k = {.data = c->key}, v = {.data = c->value};
    memset(c, 0, sizeof *c);
    OK(akv_slots_read(cells, 0, 0, SLOTS, &k, &v, NULL));
    for (int i = 0; i < 2; i++) {
        akv_attention_desc d = {.struct_size = sizeof d, .q = {.data = q}, .out = {.data = c->out[i]}, .mask = mask, .mode = AKV_EXACT};
        c->usage[i].struct_size = sizeof c->usage[i];
        OK(akv_slots_attention(i ? attached : cells, 0, spans, 2, &d));
        OK(akv_cache_usage(i ? attached : cells, &c->usage[i]));
    }
}

static akv_cache_desc good_cells = {.struct_size = sizeof good_cells, .placement = AKV_SLOTS, .n_layers = 1, .layers = &good_layer,
                                    .n_streams = N_STREAMS, .n_slots = N_SLOTS};
#define CELLS(...) CACHE_AND(akv_cache_desc, good_cells, NULL, __VA_ARGS__)
#define WRITE_KEY(...) SPOILT(akv_rows, good_key, akv_slots_write(cells, 0, slots, ROWS, &d, &good_value, NULL), __VA_ARGS__)
#define WRITE_VALUE(...) SPOILT(akv_rows, good_value, akv_slots_write(cells, 0, slots, ROWS, NULL, &d, NULL), __VA_ARGS__)
#define READ_KEY(...) SPOILT(akv_rows, key_out, akv_slots_read(cells, 0, 4, ROWS, &d, &value_out, NULL), __VA_ARGS__)
#define ATTACH_KEY(...) SPOILT(akv_rows, engine_key, akv_attach_rows(attached, 0, &d, &engine_value), __VA_ARGS__)
#define ATTACH_VALUE(...) SPOILT(akv_rows, engine_value, akv_attach_rows(attached, 0, &engine_key, &d), __VA_ARGS__)
#define SLOTS_ATTENTION(...) SPOILT(akv_attention_desc, good_attention, akv_slots_attention(cells, 0, spans, 2, &d), __VA_ARGS__)
#define SPAN(...)                                                                                                              \
    do {                                                                                                                       \
        akv_span s[2] = {spans[0], spans[1]};                                                                                  \
        SPOILT(akv_attention_desc, good_attention, akv_slots_attention(cells, 0, s, 2, &d), __VA_ARGS__);                      \
    } while (0)

static void slots_writing(void) {
    static const int64_t negative[ROWS] = {5, -1}, beyond[ROWS] = {5, SLOTS}, far[ROWS] = {INT64_MAX, 0};
    REFUSED(akv_slots_write(NULL, 0, slots, ROWS, &good_key, &good_value, NULL), AKV_E_HANDLE, "cache");
    REFUSED(akv_slots_write((akv_cache *)context, 0, slots, ROWS, &good_key, &good_value, NULL), AKV_E_HANDLE, "cache");
    REFUSED(akv_slots_write(cache, 0, slots, ROWS, &good_key, &good_value, NULL), AKV_E_ARGUMENT, "AKV_APPEND");
    REFUSED(akv_slots_write(cells, 1, slots, ROWS, &good_key, &good_value, NULL), AKV_E_ARGUMENT, "layer");
    REFUSED(akv_slots_write(cells, -1, slots, ROWS, &good_key, &good_value, NULL), AKV_E_ARGUMENT, "layer");
    REFUSED(akv_slots_write(cells, 0, NULL, ROWS, &good_key, &good_value, NULL), AKV_E_ARGUMENT, "slots");
    REFUSED(akv_slots_write(cells, 0, (const int64_t *)((const char *)slots + 4), 1, &good_key, &good_value, NULL), AKV_E_ARGUMENT, "slots");
    REFUSED(akv_slots_write(cells, 0, slots, INT64_MAX, &good_key, &good_value, NULL), AKV_E_ARGUMENT, "");
    REFUSED(akv_slots_write(cells, 0, slots, -1, &good_key, &good_value, NULL), AKV_E_ARGUMENT, "n is");
    REFUSED(akv_slots_write(cells, 0, negative, ROWS, &good_key, &good_value, NULL), AKV_E_ARGUMENT, "slots[1] is -1");
    REFUSED(akv_slots_write(cells, 0, beyond, ROWS, &good_key, &good_value, NULL), AKV_E_ARGUMENT, "slots[1] is 400");
    REFUSED(akv_slots_write(cells, 0, far, ROWS, &good_key, &good_value, NULL), AKV_E_ARGUMENT, "slots[0]");
    REFUSED(akv_slots_write(cells, 0, slots, ROWS, &good_key, &good_value, &q), AKV_E_ARGUMENT, "stream");
    WRITE_KEY(AKV_E_ARGUMENT, "key->data", d.data = NULL);
    WRITE_KEY(AKV_E_ARGUMENT, "key->data", d.data = (char *)key + 2);
    WRITE_KEY(AKV_E_ARGUMENT, "key->dtype", d.dtype = AKV_F16);
    WRITE_KEY(AKV_E_ARGUMENT, "key->dtype", d.dtype = 3);
    WRITE_KEY(AKV_E_ARGUMENT, "key->reserved", d.reserved = -1);
    WRITE_KEY(AKV_E_ARGUMENT, "key->stride_row", d.stride_row = 3);
    WRITE_KEY(AKV_E_ARGUMENT, "key->stride_head", d.stride_head = -128);
    WRITE_KEY(AKV_E_ARGUMENT, "key", d.stride_head = INT64_MAX & ~3);
    WRITE_VALUE(AKV_E_ARGUMENT, "value->data", d.data = NULL);
    WRITE_VALUE(AKV_E_ARGUMENT, "value->dtype", d.dtype = AKV_BF16);
    WRITE_VALUE(AKV_E_ARGUMENT, "value->stride_row", d.stride_row = DIM_V * 4 - 4);
    static const float bad[] = {NAN, INFINITY, -INFINITY, 3.2e10f, -3.4e38f};
    for (int i = 0; i < 5; i++) {
        float keep = key[ROWS * HEADS * DIM - 1];
        key[ROWS * HEADS * DIM - 1] = bad[i];
        WRITE_KEY(i < 3 ? AKV_E_NONFINITE : AKV_E_RANGE, "key", (void)d);
        key[ROWS * HEADS * DIM - 1] = keep;
        keep = value[ROWS * HEADS * DIM_V - 1];
        value[ROWS * HEADS * DIM_V - 1] = bad[i];
        WRITE_VALUE(i < 3 ? AKV_E_NONFINITE : AKV_E_RANGE, "value", (void)d);
        value[ROWS * HEADS * DIM_V - 1] = keep;
    }
    REFUSED(akv_slots_write(attached, 0, slots, ROWS, &good_key, NULL, NULL), AKV_E_ARGUMENT, "key");
    REFUSED(akv_slots_write(attached, 0, slots, ROWS, NULL, &good_value, NULL), AKV_E_ARGUMENT, "value");
    REFUSED(akv_slots_write(attached, 0, beyond, ROWS, NULL, NULL, NULL), AKV_E_ARGUMENT, "slots[1]");
    REFUSED(akv_slots_write(attached, 1, slots, ROWS, NULL, NULL, NULL), AKV_E_ARGUMENT, "akv_attach_rows");
    float keep = engine_k[SLOTS * HEADS * DIM - 1];
    for (int i = 0; i < 3; i++) { /* in slot 399 */
        engine_k[SLOTS * HEADS * DIM - 1] = bad[i];
        REFUSED(akv_slots_write(attached, 0, slots, ROWS, NULL, NULL, NULL), AKV_E_NONFINITE, "");
    }
    engine_k[SLOTS * HEADS * DIM - 1] = keep;

    REFUSED(akv_slots_read(NULL, 0, 0, 1, &key_out, &value_out, NULL), AKV_E_HANDLE, "cache");
    REFUSED(akv_slots_read(cache, 0, 0, 1, &key_out, &value_out, NULL), AKV_E_ARGUMENT, "AKV_APPEND");
    REFUSED(akv_slots_read(attached, 0, 0, 1, &key_out, &value_out, NULL), AKV_E_ARGUMENT, "AKV_ATTACHED");
    REFUSED(akv_slots_read(cells, 1, 0, 1, &key_out, &value_out, NULL), AKV_E_ARGUMENT, "layer");
    REFUSED(akv_slots_read(cells, 0, -1, 1, &key_out, &value_out, NULL), AKV_E_ARGUMENT, "first");
    REFUSED(akv_slots_read(cells, 0, 0, -1, &key_out, &value_out, NULL), AKV_E_ARGUMENT, "n is");
    REFUSED(akv_slots_read(cells, 0, SLOTS, 1, &key_out, &value_out, NULL), AKV_E_ARGUMENT, "");
    REFUSED(akv_slots_read(cells, 0, SLOTS - 1, ROWS, &key_out, &value_out, NULL), AKV_E_ARGUMENT, "n");
    REFUSED(akv_slots_read(cells, 0, 1, INT64_MAX, &key_out, &value_out, NULL), AKV_E_ARGUMENT, "n");
    REFUSED(akv_slots_read(cells, 0, 0, 1, &key_out, &value_out, &q), AKV_E_ARGUMENT, "stream");
    READ_KEY(AKV_E_ARGUMENT, "key->data", d.data = NULL);
    READ_KEY(AKV_E_ARGUMENT, "key->data", d.data = (char *)d.data + 1);
    READ_KEY(AKV_E_ARGUMENT, "key->dtype", d.dtype = 7);
    READ_KEY(AKV_E_ARGUMENT, "key->reserved", d.reserved = 7);
    READ_KEY(AKV_E_ARGUMENT, "key->stride_row", d.stride_row = 30);
    READ_KEY(AKV_E_ARGUMENT, "key->stride_head", d.stride_head = -4);
    READ_KEY(AKV_E_ARGUMENT, "key", d.stride_row = INT64_MAX & ~3);
    READ_KEY(AKV_E_ARGUMENT, "overlap", d.data = written.value);
    READ_KEY(AKV_E_RANGE, "", d.dtype = AKV_F16); /* row 4 holds 1e6 */

    static const int64_t wrong[][2] = {{-1, 1}, {0, -1}, {SLOTS, 1}, {0, SLOTS + 1}, {1, INT64_MAX}, {INT64_MAX, INT64_MAX}, {INT64_MIN, 1}};
    for (int i = 0; i < 7; i++) REFUSED(akv_slots_invalidate(cells, -1, wrong[i][0], wrong[i][1]), AKV_E_ARGUMENT, "");
    REFUSED(akv_slots_invalidate(NULL, 0, 0, 1), AKV_E_HANDLE, "cache");
    REFUSED(akv_slots_invalidate(cache, 0, 0, 1), AKV_E_ARGUMENT, "AKV_APPEND");
    REFUSED(akv_slots_invalidate(cells, -2, 0, 1), AKV_E_ARGUMENT, "layer");
    REFUSED(akv_slots_invalidate(cells, 1, 0, 1), AKV_E_ARGUMENT, "layer");

    static const int64_t copies[][3] = {{-1, 20, 1}, {20, -1, 1}, {0, 20, -1}, {0, 390, 11}, {390, 0, 11}, {0, INT64_MAX, 1}, {INT64_MAX, 0, INT64_MAX}};
    for (int i = 0; i < 7; i++) REFUSED(akv_slots_copy(cells, 0, copies[i][0], copies[i][1], copies[i][2]), AKV_E_ARGUMENT, "");
    REFUSED(akv_slots_copy(cells, 0, 0, 10, 11), AKV_E_ARGUMENT, "overlap");
    REFUSED(akv_slots_copy(cells, 0, 10, 0, 11), AKV_E_ARGUMENT, "overlap");
    REFUSED(akv_slots_copy(cells, 0, 4, 4, 1), AKV_E_ARGUMENT, "overlap");
    REFUSED(akv_slots_copy(NULL, 0, 0, 20, 1), AKV_E_HANDLE, "cache");
    REFUSED(akv_slots_copy(cache, 0, 0, 20, 1), AKV_E_ARGUMENT, "AKV_APPEND");
    REFUSED(akv_slots_copy(attached, 0, 0, 20, 1), AKV_E_ARGUMENT, "AKV_ATTACHED");
    REFUSED(akv_slots_copy(cells, -2, 0, 20, 1), AKV_E_ARGUMENT, "layer");
    REFUSED(akv_slots_copy(cells, 1, 0, 20, 1), AKV_E_ARGUMENT, "layer");
    /* Nothing to do is done. */
    OK(akv_slots_write(cells, 0, NULL, 0, &good_key, &good_value, NULL));
    OK(akv_slots_read(cells, 0, SLOTS, 0, &key_out, &value_out, NULL));
    OK(akv_slots_read(cells, 0, 0, 1, NULL, NULL, NULL));
    OK(akv_slots_invalidate(cells, 0, SLOTS, 0));
    OK(akv_slots_copy(cells, 0, 7, 7, 0));
}

static void attaching(void) {
    akv_rows engine_key = {.data = engine_k}, engine_value = {.data = engine_v};
    REFUSED(akv_attach_rows(NULL, 0, &engine_key, &engine_value), AKV_E_HANDLE, "cache");
    REFUSED(akv_attach_rows(cache, 0, &engine_key, &engine_value), AKV_E_ARGUMENT, "AKV_APPEND");
    REFUSED(akv_attach_rows(cells, 0, &engine_key, &engine_value), AKV_E_ARGUMENT, "AKV_SLOTS");
    REFUSED(akv_attach_rows(attached, 2, &engine_key, &engine_value), AKV_E_ARGUMENT, "layer");
    REFUSED(akv_attach_rows(attached, -1, &engine_key, &engine_value), AKV_E_ARGUMENT, "layer");
    REFUSED(akv_attach_rows(attached, 0, NULL, &engine_value), AKV_E_ARGUMENT, "key");
    REFUSED(akv_attach_rows(attached, 0, &engine_key, NULL), AKV_E_ARGUMENT, "value");
    ATTACH_KEY(AKV_E_ARGUMENT, "key->data", d.data = NULL);
    ATTACH_KEY(AKV_E_ARGUMENT, "key->data", d.data = (char *)engine_k + 1);
    ATTACH_KEY(AKV_E_ARGUMENT, "key->dtype", d.dtype = AKV_F16);
    ATTACH_KEY(AKV_E_ARGUMENT, "key->reserved", d.reserved = 1);
    ATTACH_KEY(AKV_E_ARGUMENT, "key->stride_row", d.stride_row = 7);
    ATTACH_KEY(AKV_E_ARGUMENT, "key->stride_head", d.stride_head = -DIM * 4);
    ATTACH_KEY(AKV_E_ARGUMENT, "key", d.stride_row = INT64_MAX & ~3);
    ATTACH_VALUE(AKV_E_ARGUMENT, "value->data", d.data = NULL);
    ATTACH_VALUE(AKV_E_ARGUMENT, "value->dtype", d.dtype = 12);
    ATTACH_VALUE(AKV_E_ARGUMENT, "value->stride_row", d.stride_row = DIM_V);
}

static void masks(void) {
    akv_mask *gone;
    OK(akv_mask_create(context, 1, 1, &gone));
    OK(akv_mask_destroy(gone));
    REFUSED(akv_mask_destroy(gone), AKV_E_HANDLE, "mask");
    REFUSED(akv_mask_destroy(NULL), AKV_E_HANDLE, "mask");
    REFUSED(akv_mask_destroy((akv_mask *)cells), AKV_E_HANDLE, "mask");
    REFUSED(akv_mask_create(NULL, 1, 1, (akv_mask **)&written.handle), AKV_E_HANDLE, "context");
    REFUSED(akv_mask_create((akv_context *)cells, 1, 1, (akv_mask **)&written.handle), AKV_E_HANDLE, "context");
    REFUSED(akv_mask_create(context, -1, 1, (akv_mask **)&written.handle), AKV_E_ARGUMENT, "max_rows");
    REFUSED(akv_mask_create(context, 1, -1, (akv_mask **)&written.handle), AKV_E_ARGUMENT, "max_kv");
    REFUSED(akv_mask_create(context, INT64_MAX, INT64_MAX, (akv_mask **)&written.handle), AKV_E_ARGUMENT, "max_");
    REFUSED(akv_mask_create(context, 1, 1, NULL), AKV_E_ARGUMENT, "out");
    REFUSED(akv_mask_create(context, 1, 1, (akv_mask **)((char *)&written.handle + 1)), AKV_E_ARGUMENT, "out");

    REFUSED(akv_mask_set(NULL, 0, 1, 1, hidden, 0, NULL), AKV_E_HANDLE, "mask");
    REFUSED(akv_mask_set(gone, 0, 1, 1, hidden, 0, NULL), AKV_E_HANDLE, "mask");
    REFUSED(akv_mask_set(mask, -1, 1, 1, hidden, 0, NULL), AKV_E_ARGUMENT, "first_row");
    REFUSED(akv_mask_set(mask, 0, -1, 1, hidden, 0, NULL), AKV_E_ARGUMENT, "rows");
    REFUSED(akv_mask_set(mask, 0, 1, -1, hidden, 0, NULL), AKV_E_ARGUMENT, "n_kv");
    REFUSED(akv_mask_set(mask, 0, ROWS + 1, 1, hidden, 0, NULL), AKV_E_CAPACITY, "rows");
    REFUSED(akv_mask_set(mask, 1, ROWS, 1, hidden, 0, NULL), AKV_E_CAPACITY, "rows");
    REFUSED(akv_mask_set(mask, INT64_MAX, INT64_MAX, 1, hidden, 0, NULL), AKV_E_CAPACITY, "row");
    REFUSED(akv_mask_set(mask, 0, 1, MASK_KV + 1, hidden, 0, NULL), AKV_E_CAPACITY, "n_kv");
    REFUSED(akv_mask_set(mask, 0, 1, 1, NULL, 0, NULL), AKV_E_ARGUMENT, "f16");
    REFUSED(akv_mask_set(mask, 0, 1, 1, (char *)hidden + 1, 0, NULL), AKV_E_ARGUMENT, "f16");
    REFUSED(akv_mask_set(mask, 0, 2, 10, hidden, 18, NULL), AKV_E_ARGUMENT, "stride");
    REFUSED(akv_mask_set(mask, 0, 2, 10, hidden, 21, NULL), AKV_E_ARGUMENT, "stride");
    REFUSED(akv_mask_set(mask, 0, 2, 10, hidden, -20, NULL), AKV_E_ARGUMENT, "stride");
    REFUSED(akv_mask_set(mask, 0, 2, 10, hidden, INT64_MAX - 1, NULL), AKV_E_ARGUMENT, "");
    REFUSED(akv_mask_set(mask, 0, 1, 1, hidden, 0, &q), AKV_E_ARGUMENT, "stream");
    static const uint16_t bad[] = {0x7c00, 0x7e00, 0xfe00, 0x7c01}; /* +inf and NaNs */
    static uint16_t other_values[ROWS * MASK_KV];
    for (int i = 0; i < 4; i++) {
        other_values[ROWS * MASK_KV - 1] = bad[i]; /* rows before it are not set either: look_inside would show it */
        REFUSED(akv_mask_set(mask, 0, ROWS, MASK_KV, other_values, 0, NULL), AKV_E_ARGUMENT, "f16");
    }
}

static void never(void *user) {
    (void)user;
    CHECK(0, "a refused call entered the barrier");
}

static void slots_attention(void) {
    akv_context *elsewhere;
    akv_mask *foreign_mask, *few_rows, *few_cells, *gone;
    akv_threads two = {.ith = 0, .nth = 2}, odd = {.ith = 1, .nth = 1};
    const int64_t zeros[ROWS] = {0};
    const uint64_t tree[ROWS] = {0};
    float slopes[Q_HEADS] = {0}, bad_slopes[Q_HEADS] = {0, 0, 0, NAN};
    OK(akv_context_create(&good_context, &elsewhere));
    OK(akv_mask_create(elsewhere, ROWS, MASK_KV, &foreign_mask));
    OK(akv_mask_create(context, ROWS - 1, MASK_KV, &few_rows));
    OK(akv_mask_create(context, ROWS, MASK_KV - 1, &few_cells));
    OK(akv_mask_create(context, ROWS, MASK_KV, &gone));
    OK(akv_mask_destroy(gone));
    CHECK(akv_context_destroy(elsewhere) == AKV_E_BUSY, "destroyed under its mask");
    REFUSED(akv_slots_attention(NULL, 0, spans, 2, &good_attention), AKV_E_HANDLE, "cache");
    REFUSED(akv_slots_attention(cache, 0, spans, 2, &good_attention), AKV_E_ARGUMENT, "AKV_APPEND");
    REFUSED(akv_slots_attention(cells, 1, spans, 2, &good_attention), AKV_E_ARGUMENT, "layer");
    REFUSED(akv_slots_attention(cells, -1, spans, 2, &good_attention), AKV_E_ARGUMENT, "layer");
    REFUSED(akv_slots_attention(attached, 1, spans, 2, &good_attention), AKV_E_ARGUMENT, "akv_attach_rows");
    REFUSED(akv_slots_attention(cells, 0, NULL, 2, &good_attention), AKV_E_ARGUMENT, "spans");
    REFUSED(akv_slots_attention(cells, 0, (const akv_span *)((const char *)spans + 4), 1, &good_attention), AKV_E_ARGUMENT, "spans");
    REFUSED(akv_slots_attention(cells, 0, spans, -1, &good_attention), AKV_E_ARGUMENT, "n_spans");
    REFUSED(akv_slots_attention(cells, 0, spans, 2, NULL), AKV_E_ARGUMENT, "desc");
    SPAN(AKV_E_ARGUMENT, "spans[1].stream", s[1].stream = N_STREAMS);
    SPAN(AKV_E_ARGUMENT, "spans[0].stream", s[0].stream = -1);
    SPAN(AKV_E_ARGUMENT, "spans[0].n_q", s[0].n_q = -1);
    SPAN(AKV_E_ARGUMENT, "spans[1].n_kv", s[1].n_kv = -1);
    SPAN(AKV_E_ARGUMENT, "spans[1].n_kv", s[1].n_kv = N_SLOTS + 1);
    SPAN(AKV_E_ARGUMENT, "", s[0].n_q = s[1].n_q = INT32_MAX);
    SLOTS_ATTENTION(AKV_E_ARGUMENT, "struct_size", d.struct_size = 0);
    SLOTS_ATTENTION(AKV_E_ARGUMENT, "flags", d.flags = 1);
    SLOTS_ATTENTION(AKV_E_ARGUMENT, "visibility", d.visibility = AKV_FULL);
    SLOTS_ATTENTION(AKV_E_ARGUMENT, "window", d.window = 10);
    SLOTS_ATTENTION(AKV_E_ARGUMENT, "kv_from", d.kv_from = zeros);
    SLOTS_ATTENTION(AKV_E_ARGUMENT, "kv_to", d.kv_to = zeros);
    SLOTS_ATTENTION(AKV_E_ARGUMENT, "tree", d.tree = tree);
    SLOTS_ATTENTION(AKV_E_ARGUMENT, "mode", d.mode = -1);
    SLOTS_ATTENTION(AKV_E_ARGUMENT, "tolerance", d.tolerance = INFINITY);
    SLOTS_ATTENTION(AKV_E_ARGUMENT, "scale", d.scale = NAN);
    SLOTS_ATTENTION(AKV_E_ARGUMENT, "logit_softcap", d.logit_softcap = -1);
    SLOTS_ATTENTION(AKV_E_ARGUMENT, "logit_softcap", d.logit_softcap = NAN);
    SLOTS_ATTENTION(AKV_E_ARGUMENT, "alibi_slopes", d.mask = mask; d.alibi_slopes = (float *)((char *)slopes + 1));
    SLOTS_ATTENTION(AKV_E_ARGUMENT, "alibi_slopes[3]", d.mask = mask; d.alibi_slopes = bad_slopes);
    SLOTS_ATTENTION(AKV_E_ARGUMENT, "sink_logits", d.sink_logits = (float *)((char *)slopes + 2));
    SLOTS_ATTENTION(AKV_E_ARGUMENT, "sink_logits[3]", d.sink_logits = bad_slopes);
    SLOTS_ATTENTION(AKV_E_HANDLE, "mask", d.mask = gone);
    SLOTS_ATTENTION(AKV_E_HANDLE, "mask", d.mask = (akv_mask *)cells);
    SLOTS_ATTENTION(AKV_E_HANDLE, "mask", d.mask = foreign_mask);
    SLOTS_ATTENTION(AKV_E_ARGUMENT, "alibi_slopes", d.alibi_slopes = slopes); /* of nothing */
    SLOTS_ATTENTION(AKV_E_ARGUMENT, "mask", d.mask = few_rows);
    SLOTS_ATTENTION(AKV_E_ARGUMENT, "mask", d.mask = few_cells);
    SLOTS_ATTENTION(AKV_E_ARGUMENT, "stream", d.stream = q);
    SLOTS_ATTENTION(AKV_E_ARGUMENT, "q->data", d.q.data = NULL);
    SLOTS_ATTENTION(AKV_E_ARGUMENT, "q->stride_row", d.q.stride_row = 2);
    SLOTS_ATTENTION(AKV_E_ARGUMENT, "out->data", d.out.data = (char *)written.out + 1);
    SLOTS_ATTENTION(AKV_E_ARGUMENT, "out->dtype", d.out.dtype = -1);
    SLOTS_ATTENTION(AKV_E_ARGUMENT, "overlap", d.out.data = q);
    SLOTS_ATTENTION(AKV_E_ARGUMENT, "overlap", d.lse = written.out);
    SLOTS_ATTENTION(AKV_E_ARGUMENT, "overlap", d.lse = written.lse; d.bound = written.lse);
    SLOTS_ATTENTION(AKV_E_ARGUMENT, "bound", d.bound = (float *)((char *)written.bound + 2));
    SLOTS_ATTENTION(AKV_E_ARGUMENT, "stats", d.stats = (akv_stats *)((char *)&written.stats + 4));
    SLOTS_ATTENTION(AKV_E_ARGUMENT, "ith", d.threads = &odd);
    SLOTS_ATTENTION(AKV_E_ARGUMENT, "barrier", d.threads = &two);
    two.barrier = never;
    SLOTS_ATTENTION(AKV_E_ARGUMENT, "workspace", d.threads = &two);
    SLOTS_ATTENTION(AKV_E_ARGUMENT, "workspace", d.workspace = key; d.workspace_bytes = 1);
    float keep = q[Q_HEADS * DIM + 3];
    q[Q_HEADS * DIM + 3] = -INFINITY;
    SLOTS_ATTENTION(AKV_E_NONFINITE, "q", d.lse = written.lse);
    q[Q_HEADS * DIM + 3] = keep;

    REFUSED(akv_slots_workspace(NULL, 1, 1, &written.bytes, &written.align), AKV_E_HANDLE, "cache");
    REFUSED(akv_slots_workspace(cache, 1, 1, &written.bytes, &written.align), AKV_E_ARGUMENT, "AKV_APPEND");
    REFUSED(akv_slots_workspace(cells, -1, 1, &written.bytes, &written.align), AKV_E_ARGUMENT, "max_kv");
    REFUSED(akv_slots_workspace(cells, 1, -1, &written.bytes, &written.align), AKV_E_ARGUMENT, "max_threads");
    REFUSED(akv_slots_workspace(cells, 1, 1025, &written.bytes, &written.align), AKV_E_ARGUMENT, "max_threads");
    REFUSED(akv_slots_workspace(cells, 1, 1, NULL, &written.align), AKV_E_ARGUMENT, "bytes");
    REFUSED(akv_slots_workspace(cells, 1, 1, &written.bytes, NULL), AKV_E_ARGUMENT, "align");
    OK(akv_mask_destroy(few_rows));
    OK(akv_mask_destroy(few_cells));
    OK(akv_mask_destroy(foreign_mask));
    OK(akv_context_destroy(elsewhere));
}

static void placements(void) {
    static contents first, last;
    akv_cache_desc d = good_cells;
    akv_layer_desc two[2] = {good_layer, good_layer};
    akv_rows engine_key = {.data = engine_k}, engine_value = {.data = engine_v};
    akv_batch_desc bounds = {.struct_size = sizeof bounds};
    int64_t all[SLOTS];
    int32_t path = 0;
    CELLS(AKV_E_ARGUMENT, "n_slots", d.n_slots = 0);
    CELLS(AKV_E_ARGUMENT, "n_slots", d.n_slots = (uint64_t)1 << 31);
    CELLS(AKV_E_ARGUMENT, "n_slots", d.n_slots = UINT64_MAX);
    CELLS(AKV_E_ARGUMENT, "n_streams", d.n_streams = 65537);
    CELLS(AKV_E_ARGUMENT, "placement", d.placement = 3);
    CACHE(AKV_E_ARGUMENT, "n_slots", d.n_slots = 1);
    SPOILT(akv_cache_desc, good_cells, akv_cache_create(context, &d, (akv_cache **)&written.handle), AKV_E_CAPACITY, "max_bytes", d.max_bytes = 10000);

    for (int i = 0; i < SLOTS; i++) all[i] = i;
    for (int i = 0; i < SLOTS * HEADS * DIM; i++) engine_k[i] = (float)normal();
    for (int i = 0; i < SLOTS * HEADS * DIM_V; i++) engine_v[i] = (float)normal();
    engine_k[4 * HEADS * DIM + 1] = 1e6f;
    OK(akv_supports(context, &d, &good_attention, &path));
    CHECK(path == (AKV_PATH_PROGRESSIVE | AKV_PATH_DENSE), "path %d", path);
    OK(akv_cache_create(context, &d, &cells));
    OK(akv_slots_write(cells, 0, all, SLOTS, &engine_key, &engine_value, NULL));
    d.placement = AKV_ATTACHED, d.n_layers = 2, d.layers = two;
    OK(akv_cache_create(context, &d, &attached));
    OK(akv_attach_rows(attached, 0, &engine_key, &engine_value));
    OK(akv_slots_write(attached, 0, all, SLOTS, NULL, NULL, NULL));
    OK(akv_mask_create(context, ROWS, MASK_KV, &mask));
    for (int i = 0; i < ROWS * MASK_KV; i++) hidden[i] = i % 3 ? 0 : 0xfc00;
    OK(akv_mask_set(mask, 0, ROWS, MASK_KV, hidden, 0, NULL));
    look_inside(&first);

    REFUSED(akv_batch_create(cells, &bounds, (akv_batch **)&written.handle), AKV_E_ARGUMENT, "AKV_SLOTS");
    REFUSED(akv_batch_create(attached, &bounds, (akv_batch **)&written.handle), AKV_E_ARGUMENT, "AKV_ATTACHED");
    REFUSED(akv_sequence_create(cells, &written.sequence), AKV_E_ARGUMENT, "AKV_SLOTS");
    REFUSED(akv_sequence_create(attached, &written.sequence), AKV_E_ARGUMENT, "AKV_ATTACHED");
    slots_writing();
    attaching();
    masks();
    slots_attention();
    look_inside(&last);
    CHECK(memcmp(&first, &last, sizeof first) == 0, "a call that failed changed cells or masks");

    OK(akv_mask_destroy(mask));
    OK(akv_cache_destroy(attached));
    OK(akv_cache_destroy(cells));
    CHECK(akv_slots_write(cells, 0, all, 1, NULL, NULL, NULL) == AKV_E_HANDLE, "a cache that is gone");
}

/* The last error is the thread's own, is cut without fuss, and outlives successful calls. */
static void *other_thread(void *arg) {
    (void)arg;
    CHECK(last_error()[0] == 0, "a thread without errors has \"%s\"", last_error());
    return NULL;
}

static void errors(void) {
    char text[512], cut[8];
    size_t needed = 0;
    pthread_t thread;
    REFUSED(akv_poll(NULL, NULL, NULL, NULL), AKV_E_HANDLE, "context");
    OK(akv_last_error(text, sizeof text, &needed));
    CHECK(needed == strlen(text) + 1, "needs %zu, is %zu", needed, strlen(text) + 1);
    memset(cut, 'x', sizeof cut);
    OK(akv_last_error(cut, 7, &needed));
    CHECK(memcmp(cut, text, 6) == 0 && cut[6] == 0 && cut[7] == 'x', "cut to \"%s\"", cut);
    OK(akv_last_error(NULL, 0, &needed));
    CHECK(needed == strlen(text) + 1, "needs %zu", needed);
    CHECK(akv_last_error(NULL, 7, NULL) == AKV_E_ARGUMENT, "NULL with a capacity");
    REFUSED(akv_poll(NULL, NULL, NULL, NULL), AKV_E_HANDLE, "context");
    OK(akv_poll(context, NULL, NULL, NULL));
    CHECK(strcmp(last_error(), text) == 0, "a successful call changed the text to \"%s\"", last_error());
    pthread_create(&thread, NULL, other_thread, NULL);
    pthread_join(thread, NULL);
}

/* A second copy of the library in the process: its handles are not ours. */
static void foreign(void) {
    char path[] = "/tmp/alignedkv-copy-XXXXXX", command[4096];
    int fd = mkstemp(path);
    REQUIRE(fd >= 0, "no temporary file");
    close(fd);
    snprintf(command, sizeof command, "cp '%s' %s", SHARED_LIBRARY, path);
    REQUIRE(system(command) == 0, "%s", command);
    void *copy = dlopen(path, RTLD_NOW | RTLD_LOCAL);
    REQUIRE(copy, "%s", dlerror());
    unlink(path);
    akv_status (*create)(const akv_context_desc *, akv_context **), (*destroy)(akv_context *), (*create_cache)(akv_context *, const akv_cache_desc *, akv_cache **);
    *(void **)&create = dlsym(copy, "akv_context_create");
    *(void **)&create_cache = dlsym(copy, "akv_cache_create");
    *(void **)&destroy = dlsym(copy, "akv_context_destroy");
    REQUIRE(create && destroy && create != akv_context_create, "not a copy");
    akv_context *theirs;
    akv_cache *nothing = NULL;
    REQUIRE(create(&good_context, &theirs) == AKV_OK, "the copy makes no context");
    REFUSED(akv_cache_create(theirs, &good_cache, (akv_cache **)&written.handle), AKV_E_HANDLE, "context");
    REFUSED(akv_context_destroy(theirs), AKV_E_HANDLE, "context");
    CHECK(create_cache(context, &good_cache, &nothing) == AKV_E_HANDLE && !nothing, "the copy takes our context");
    CHECK(destroy(theirs) == AKV_OK, "the copy does not know its own");
    dlclose(copy);
}

/* Memory: a limit of the caller's, an allocator that has run dry. */
static void limits(void) {
    akv_cache *small;
    akv_batch *steps;
    akv_sequence s, extra;
    int32_t n = 128;
    float *rows = allocate((size_t)n * HEADS * DIM * sizeof *rows);
    for (int i = 0; i < n * HEADS * DIM; i++) rows[i] = (float)normal();
    akv_rows k = {.data = rows}, v = {.data = rows};
    akv_cache_desc d = good_cache;
    akv_batch_desc bounds = {.struct_size = sizeof bounds}, step = {.struct_size = sizeof step, .n_sequences = 1, .sequences = &s, .n_new = &n};
    akv_usage usage = {.struct_size = sizeof usage}, after = {.struct_size = sizeof after};
    akv_status status = AKV_OK;
    int64_t length;
    d.max_bytes = 1 << 20;
    OK(akv_cache_create(context, &d, &small));
    OK(akv_batch_create(small, &bounds, &steps));
    OK(akv_sequence_create(small, &s));
    for (int i = 0; i < 1000 && status == AKV_OK; i++) {
        OK(akv_cache_usage(small, &usage));
        CHECK(usage.bytes_reserved <= d.max_bytes, "%llu bytes of %llu", (unsigned long long)usage.bytes_reserved, (unsigned long long)d.max_bytes);
        status = akv_batch_begin(steps, &step, NULL);
        if (status != AKV_OK) break;
        OK(akv_quantize_kv(steps, 0, &k, &v, NULL)); /* what has begun does not fail for capacity */
        OK(akv_batch_commit(steps));
    }
    REFUSED(status, AKV_E_CAPACITY, "max_bytes");
    OK(akv_cache_usage(small, &after));
    CHECK(usage.bytes_used == after.bytes_used && usage.pages_used == after.pages_used && usage.tokens == after.tokens, "a step without room left something");
    OK(akv_sequence_length(small, s, -1, &length));
    CHECK(length > 128 && (uint64_t)length == after.tokens, "%d tokens, %d in use", (int)length, (int)after.tokens);
    /* Truncating makes room again. */
    OK(akv_sequence_truncate(small, s, 0));
    OK(akv_batch_begin(steps, &step, NULL));
    OK(akv_batch_abort(steps));
    for (int i = 1; i < 3; i++) OK(akv_sequence_create(small, &extra));
    CHECK(akv_sequence_create(small, &written.sequence) == AKV_E_CAPACITY && strstr(last_error(), "max_sequences"), "%s", last_error());
    OK(akv_batch_destroy(steps));
    OK(akv_cache_destroy(small));

    akv_context_desc dry = good_context;
    akv_context *poor;
    dry.alloc = allocate_nothing, dry.dealloc = deallocate_nothing;
    d.max_bytes = 0;
    OK(akv_context_create(&dry, &poor));
    status = akv_cache_create(poor, &d, &small);
    if (status == AKV_OK) { /* memory for rows is taken as sequences grow */
        OK(akv_batch_create(small, &bounds, &steps));
        OK(akv_sequence_create(small, &s));
        REFUSED(akv_batch_begin(steps, &step, NULL), AKV_E_MEMORY, "memory");
        OK(akv_sequence_length(small, s, -1, &length));
        CHECK(length == 0, "%d tokens", (int)length);
        OK(akv_batch_destroy(steps));
        OK(akv_cache_destroy(small));
    } else CHECK(status == AKV_E_MEMORY, "%s", last_error());
    /* Cells take theirs when they are made. */
    REFUSED(akv_cache_create(poor, &good_cells, (akv_cache **)&written.handle), AKV_E_MEMORY, "memory");
    OK(akv_context_destroy(poor));
    free(rows);
}

static void append(akv_sequence s, int n) {
    float *rows = allocate((size_t)n * HEADS * DIM * sizeof *rows);
    for (int i = 0; i < n * HEADS * DIM; i++) rows[i] = (float)normal();
    akv_rows k = {.data = rows}, v = {.data = rows};
    akv_batch_desc step = {.struct_size = sizeof step, .n_sequences = 1, .sequences = &s, .n_new = &n};
    OK(akv_batch_begin(idle, &step, NULL));
    OK(akv_quantize_kv(idle, 0, &k, &v, NULL));
    OK(akv_batch_commit(idle));
    free(rows);
}

int main(void) {
    akv_batch_desc unbounded = {.struct_size = sizeof unbounded};
    for (int i = 0; i < ROWS * Q_HEADS * DIM; i++) q[i] = (float)normal();
    for (int i = 0; i < ROWS * HEADS * DIM; i++) key[i] = (float)normal();
    for (int i = 0; i < ROWS * HEADS * DIM_V; i++) value[i] = (float)normal();
    memset(&untouched, 0x5a, sizeof untouched);
    memcpy(&written, &untouched, sizeof written);
    OK(akv_context_create(&good_context, &context));
    OK(akv_cache_create(context, &good_cache, &cache));
    OK(akv_sequence_create(cache, &sequence));
    OK(akv_sequence_create(cache, &other));
    OK(akv_batch_create(cache, &unbounded, &idle));
    append(sequence, COMMITTED);
    append(other, COMMITTED);
    OK(akv_batch_destroy(idle));
    OK(akv_batch_create(cache, &good_bounds, &idle));
    OK(akv_batch_create(cache, &good_bounds, &batch));
    akv_batch_desc step = {.struct_size = sizeof step, .n_sequences = 1, .sequences = &sequence, .n_new = n_new, .n_q = n_q};
    OK(akv_batch_begin(batch, &step, NULL));
    before = look();

    versions();
    contexts();
    caches();
    sequences();
    batches();
    appending();
    attention();
    placements();
    errors();
    foreign();
    limits();

    /* After all that the step still works, and ends. */
    OK(akv_aligned_attention(batch, 0, &good_attention));
    CHECK(memcmp(written.out, untouched.out, Q_HEADS * DIM_V * sizeof(float)) != 0, "no output");
    CHECK(memcmp(written.out + Q_HEADS * DIM_V, untouched.out, Q_HEADS * DIM_V * sizeof(float)) == 0, "more output than rows");
    OK(akv_batch_commit(batch));
    OK(akv_batch_destroy(batch));
    OK(akv_batch_destroy(idle));
    OK(akv_cache_destroy(cache));
    CHECK(akv_cache_destroy(cache) == AKV_E_HANDLE, "destroyed twice");
    OK(akv_context_destroy(context));
    CHECK(akv_context_destroy(context) == AKV_E_HANDLE, "destroyed twice");
    return finish("arguments");
}
