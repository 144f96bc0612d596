/* The CUDA backend on device memory, streams and graphs, through the driver alone: on a GPU, or under the stand-in of
 * kernels/host. What the CPU backend computes from the same rows is what it must compute. */
#include <dlfcn.h>

#include "check.h"

typedef unsigned long long address;

/* The driver's functions that the tests need. */
static struct {
    int (*init)(unsigned), (*alloc)(address *, size_t), (*release)(address), (*synchronize)(void);
    int (*upload)(address, const void *, size_t, void *), (*download)(void *, address, size_t, void *);
    int (*retain)(void **, int), (*drop)(int), (*push)(void *), (*pop)(void **), (*current)(void **);
    int (*stream)(void **, unsigned), (*stream_destroy)(void *), (*stream_synchronize)(void *);
    int (*begin)(void *, int), (*end)(void *, void **), (*instantiate)(void **, void *, unsigned long long), (*launch)(void *, void *);
    int (*graph_destroy)(void *), (*exec_destroy)(void *);
    long (*allocations)(void), (*waits)(void); /* the stand-in's alone */
} cu;

#define CU(call)                                           \
    do {                                                   \
        int code_ = (call);                                \
        CHECK(code_ == 0, "%s: error %d", #call, code_);   \
    } while (0)

static void load_driver(void) {
    static const struct {
        const char *name;
        void *to;
    } all[] = {
        {"cuInit", &cu.init}, {"cuMemAlloc_v2", &cu.alloc}, {"cuMemFree_v2", &cu.release}, {"cuCtxSynchronize", &cu.synchronize},
        {"cuMemcpyHtoDAsync_v2", &cu.upload}, {"cuMemcpyDtoHAsync_v2", &cu.download}, {"cuDevicePrimaryCtxRetain", &cu.retain},
        {"cuDevicePrimaryCtxRelease_v2", &cu.drop}, {"cuCtxPushCurrent_v2", &cu.push}, {"cuCtxPopCurrent_v2", &cu.pop},
        {"cuCtxGetCurrent", &cu.current}, {"cuStreamCreate", &cu.stream}, {"cuStreamDestroy_v2", &cu.stream_destroy},
        {"cuStreamSynchronize", &cu.stream_synchronize}, {"cuStreamBeginCapture_v2", &cu.begin}, {"cuStreamEndCapture", &cu.end},
        {"cuGraphInstantiateWithFlags", &cu.instantiate}, {"cuGraphLaunch", &cu.launch}, {"cuGraphDestroy", &cu.graph_destroy},
        {"cuGraphExecDestroy", &cu.exec_destroy},
    };
    void *library = dlopen("libcuda.so.1", RTLD_NOW);
    if (!library) {
        fprintf(stderr, "cuda: there is no libcuda.so.1; make test-cuda runs this under a stand-in\n");
        exit(2);
    }
    for (size_t i = 0; i < sizeof all / sizeof *all; i++) {
        void *symbol = dlsym(library, all[i].name);
        if (!symbol) {
            fprintf(stderr, "cuda: the driver has no %s\n", all[i].name);
            exit(2);
        }
        memcpy(all[i].to, &symbol, sizeof symbol);
    }
    void *symbol = dlsym(library, "standin_allocations");
    memcpy(&cu.allocations, &symbol, sizeof symbol);
    symbol = dlsym(library, "standin_waits");
    memcpy(&cu.waits, &symbol, sizeof symbol);
}

enum { LAYERS = 2, SEQUENCES = 3, HEADS = 2, GROUP = 3, DIM = 64, MAX_KV = 2048 };
enum { KV = HEADS * DIM, Q = GROUP * KV, QH = GROUP * HEADS };

static void *stream;
static int format; /* of the caches */

static address device(size_t bytes) {
    address p = 0;
    CU(cu.alloc(&p, bytes));
    return p;
}
static void upload(address to, const void *from, size_t bytes) { CU(cu.upload(to, from, bytes, stream)); }
static void download(void *to, address from, size_t bytes) {
    CU(cu.download(to, from, bytes, stream));
    CU(cu.stream_synchronize(stream));
}

/* One model, on the device or on the CPU. */
typedef struct {
    akv_context *context;
    akv_cache *cache;
    akv_batch *batch, *prefill; /* the latter without bounds */
    akv_sequence sequence[SEQUENCES];
    int on_device;
    address k, v, q, out, bound, stats; /* on the device: [layer][row].. */
    void *exec;                         /* the captured step, once there is one */
} engine;

static int n_attended; /* rows of the last step */
static int steady;     /* steps must neither allocate nor wait */

static akv_alloc_fn alloc_hook;
static akv_dealloc_fn dealloc_hook;

static void engine_new(engine *e, int on_device, int with_bounds) {
    akv_context_desc context = {.struct_size = sizeof context, .abi_version = AKV_ABI_VERSION, .backend = on_device ? AKV_CUDA : AKV_CPU};
    akv_layer_desc layers[LAYERS];
    akv_cache_desc cache = {.struct_size = sizeof cache, .format = format, .n_layers = LAYERS, .layers = layers};
    akv_batch_desc bounds = {.struct_size = sizeof bounds};
    if (on_device) context.alloc = alloc_hook, context.dealloc = dealloc_hook;
    memset(e, 0, sizeof *e);
    e->on_device = on_device;
    if (with_bounds) bounds.max_sequences = SEQUENCES, bounds.max_q = 16, bounds.max_kv = MAX_KV;
    for (int l = 0; l < LAYERS; l++)
        layers[l] = (akv_layer_desc){.n_q_heads = QH, .n_kv_heads = HEADS, .dim_k = DIM, .dtype_k = AKV_F16, .dtype_v = AKV_F16, .window = l ? 200 : 0};
    OK(akv_context_create(&context, &e->context));
    OK(akv_cache_create(e->context, &cache, &e->cache));
    OK(akv_batch_create(e->cache, &bounds, &e->batch));
    bounds.max_sequences = 0, bounds.max_q = 0, bounds.max_kv = 0;
    OK(akv_batch_create(e->cache, &bounds, &e->prefill));
    for (int s = 0; s < SEQUENCES; s++) OK(akv_sequence_create(e->cache, &e->sequence[s]));
    if (!on_device) return;
    e->k = device((size_t)LAYERS * 1024 * KV * 2), e->v = device((size_t)LAYERS * 1024 * KV * 2);
    e->q = device((size_t)LAYERS * 1024 * Q * 4), e->out = device((size_t)LAYERS * 1024 * Q * 4);
    e->bound = device((size_t)LAYERS * 1024 * QH * 4), e->stats = device(LAYERS * sizeof(akv_stats));
}

static void engine_free(engine *e) {
    CU(cu.synchronize());
    if (e->exec) CU(cu.exec_destroy(e->exec));
    OK(akv_batch_destroy(e->batch));
    OK(akv_batch_destroy(e->prefill));
    OK(akv_cache_destroy(e->cache));
    OK(akv_context_destroy(e->context));
    if (!e->on_device) return;
    CU(cu.release(e->k));
    CU(cu.release(e->v));
    CU(cu.release(e->q));
    CU(cu.release(e->out));
    CU(cu.release(e->bound));
    CU(cu.release(e->stats));
}

/* Rows of a step, the same for every engine. */
static uint16_t k[LAYERS][1024 * KV], v[LAYERS][1024 * KV];
static float q[LAYERS][1024 * Q];

static void rows_of_step(int n) {
    for (int l = 0; l < LAYERS; l++) {
        for (int i = 0; i < n * KV; i++) store((uint8_t *)&k[l][i], AKV_F16, (float)normal()), store((uint8_t *)&v[l][i], AKV_F16, (float)normal());
        for (int i = 0; i < n * Q; i++) q[l][i] = (float)normal();
    }
}

static float out_of[3][LAYERS][1024 * Q], bound_of[3][LAYERS][1024 * QH];
static akv_stats stats_of[3][LAYERS];

/* The calls of a step. On the device addresses depend on the layer alone. */
static void layers_of(engine *e, akv_batch *batch, int which) {
    for (int l = 0; l < LAYERS; l++) {
        size_t kv = (size_t)l * 1024 * KV * 2, qs = (size_t)l * 1024 * Q * 4;
        akv_rows key = {.dtype = AKV_F16}, value = {.dtype = AKV_F16};
        akv_attention_desc a = {.struct_size = sizeof a, .stream = e->on_device ? stream : NULL};
        if (e->on_device) {
            key.data = (void *)(uintptr_t)(e->k + kv), value.data = (void *)(uintptr_t)(e->v + kv);
            a.q.data = (void *)(uintptr_t)(e->q + qs), a.out.data = (void *)(uintptr_t)(e->out + qs);
            a.bound = (float *)(uintptr_t)(e->bound + (size_t)l * 1024 * QH * 4);
            a.stats = (akv_stats *)(uintptr_t)(e->stats + (size_t)l * sizeof(akv_stats));
        } else {
            key.data = k[l], value.data = v[l], a.q.data = q[l], a.out.data = out_of[which][l];
            a.bound = bound_of[which][l], a.stats = &stats_of[which][l];
        }
        OK(akv_quantize_kv(batch, l, &key, &value, a.stream));
        OK(akv_aligned_attention(batch, l, &a));
    }
}

/* A step of n_new[s] tokens and as many query rows: call by call, or (capture) in a graph, which is captured in the first
 * such step. Steps with `replay` have a graph and do without calls. */
static void step(engine *e, int which, const int32_t *n_new, int capture) {
    akv_batch_desc desc = {.struct_size = sizeof desc, .n_sequences = SEQUENCES, .sequences = e->sequence, .n_new = n_new};
    int n = 0;
    for (int s = 0; s < SEQUENCES; s++) n += n_new[s];
    akv_batch *batch = n > 16 ? e->prefill : e->batch;
    n_attended = n;
    if (e->on_device)
        for (int l = 0; l < LAYERS; l++) {
            upload(e->k + (size_t)l * 1024 * KV * 2, k[l], (size_t)n * KV * 2), upload(e->v + (size_t)l * 1024 * KV * 2, v[l], (size_t)n * KV * 2);
            upload(e->q + (size_t)l * 1024 * Q * 4, q[l], (size_t)n * Q * 4);
        }
    long allocations = cu.allocations ? cu.allocations() : 0, waits = cu.waits ? cu.waits() : 0;
    OK(akv_batch_begin(batch, &desc, e->on_device ? stream : NULL));
    if (capture && e->exec) {
        CU(cu.launch(e->exec, stream));
        OK(akv_batch_replayed(batch));
    } else if (capture) {
        void *graph = NULL;
        CU(cu.begin(stream, 0));
        layers_of(e, batch, which);
        CU(cu.end(stream, &graph));
        CU(cu.instantiate(&e->exec, graph, 0));
        CU(cu.graph_destroy(graph));
        CU(cu.launch(e->exec, stream));
    } else {
        layers_of(e, batch, which);
    }
    OK(akv_batch_commit(batch));
    if (!e->on_device) return;
    if (steady && cu.waits)
        CHECK(cu.allocations() == allocations && cu.waits() == waits, "a step allocates %ld times and waits %ld times",
              cu.allocations() - allocations, cu.waits() - waits);
    for (int l = 0; l < LAYERS; l++) {
        download(out_of[which][l], e->out + (size_t)l * 1024 * Q * 4, (size_t)n * Q * 4);
        download(bound_of[which][l], e->bound + (size_t)l * 1024 * QH * 4, (size_t)n * QH * 4);
        download(&stats_of[which][l], e->stats + (size_t)l * sizeof(akv_stats), sizeof(akv_stats));
    }
}

static int differ(const void *a, const void *b, size_t bytes) { return memcmp(a, b, bytes) != 0; }

/* A graph's replays, calls, and the CPU: the same. */
static void compare(int t) {
    for (int l = 0; l < LAYERS; l++) {
        size_t n = (size_t)n_attended;
        CHECK(!differ(out_of[0][l], out_of[1][l], n * Q * 4), "step %d, layer %d: a graph gives other outputs than calls", t, l);
        CHECK(!differ(bound_of[0][l], bound_of[1][l], n * QH * 4), "step %d, layer %d: a graph gives other bounds than calls", t, l);
        CHECK(stats_of[0][l].bytes_k == stats_of[1][l].bytes_k && stats_of[0][l].tokens == stats_of[1][l].tokens, "step %d: statistics", t);
        /* Results near a threshold may go either way: by rounding, tokens read a plane more or less. */
        double read = (double)stats_of[2][l].bytes_k + (double)stats_of[2][l].bytes_v, difference = (double)stats_of[0][l].bytes_k + (double)stats_of[0][l].bytes_v - read;
        CHECK(fabs(difference) <= 0.01 * read, "step %d, layer %d: reads %g bytes, the CPU %g", t, l, read + difference, read);
        CHECK(stats_of[0][l].tokens == stats_of[2][l].tokens && stats_of[0][l].backend == AKV_CUDA, "step %d: tokens", t);
        CHECK(stats_of[0][l].dense_rows == stats_of[2][l].dense_rows && stats_of[0][l].path == stats_of[2][l].path,
              "step %d, layer %d: %d dense rows, path %d", t, l, (int)stats_of[0][l].dense_rows, stats_of[0][l].path);
        for (size_t i = 0; i < n * Q; i++) {
            double apart = fabs((double)out_of[0][l][i] - (double)out_of[2][l][i]), allowed = (double)bound_of[0][l][i / DIM] + (double)bound_of[2][l][i / DIM];
            if (format != AKV_FORMAT_ALIGNED && !(allowed < 0.01)) allowed = 0.01; /* nothing is left out, or nothing claimed */
            CHECK(apart <= allowed, "step %d, layer %d: apart by %g, bounds add up to %g", t, l, apart, allowed);
        }
    }
}

static void each(engine e[3], const char *what, int sequence, int64_t n, int in) {
    for (int i = 0; i < 3; i++) {
        akv_sequence fork;
        if (strcmp(what, "truncate") == 0) {
            OK(akv_sequence_truncate(e[i].cache, e[i].sequence[sequence], n));
        } else {
            OK(akv_sequence_fork(e[i].cache, e[i].sequence[sequence], n, &fork));
            OK(akv_sequence_destroy(e[i].cache, e[i].sequence[in]));
            e[i].sequence[in] = fork;
        }
    }
}

/* Prompts, then decoding across the ends of tiles, with sequences cut and forked in between. */
static void decode(int of, int steps) {
    engine e[3];
    static const int32_t prompt[SEQUENCES] = {130, 5, 530}, decode[SEQUENCES] = {1, 1, 1}, mixed[2][SEQUENCES] = {{1, 9, 3}, {12, 1, 1}};
    format = of;
    engine_new(&e[0], 1, 1), engine_new(&e[1], 1, 0), engine_new(&e[2], 0, 0);
    rows_of_step(prompt[0] + prompt[1] + prompt[2]);
    for (int i = 0; i < 3; i++) step(&e[i], i, prompt, 0);
    compare(0);
    for (int t = 1; t <= steps; t++) {
        if (t == 22) each(e, "truncate", 0, 150, 0);  /* within the open tile */
        if (t == 26) each(e, "truncate", 2, 501, 0);  /* a tile that was closed long ago */
        if (t == 44) each(e, "fork", 2, 515, 1);      /* in the open tile */
        if (t == 46) each(e, "fork", 0, 60, 2);      /* in the first */
        /* The same graph takes parts of a prompt, whose rows are dense, among others. */
        const int32_t *n_new = t % 10 == 5 ? mixed[t / 10 % 2] : decode;
        rows_of_step(n_new[0] + n_new[1] + n_new[2]);
        steady = t % 20 > 8; /* some steps after the last change */
        for (int i = 0; i < 3; i++) step(&e[i], i, n_new, i == 0 && t > 2);
        compare(t);
    }
    steady = 0;
    /* Read back: the same codes. */
    for (int i = 0; i < 3; i++) {
        int64_t n;
        OK(akv_sequence_length(e[i].cache, e[i].sequence[1], -1, &n));
        akv_rows rows = {.data = i < 2 ? (void *)(uintptr_t)e[i].out : (void *)out_of[2][0], .dtype = AKV_F32};
        OK(akv_dequantize_kv(e[i].cache, e[i].sequence[1], 1, n - 300, 300, NULL, &rows, i < 2 ? stream : NULL));
        if (i < 2) download(out_of[i][0], e[i].out, 300 * KV * 4);
    }
    CHECK(!differ(out_of[0][0], out_of[2][0], 300 * KV * 4) && !differ(out_of[1][0], out_of[2][0], 300 * KV * 4), "values read back differ");
    for (int i = 0; i < 3; i++) {
        OK(akv_poll(e[i].context, NULL, NULL, NULL));
        engine_free(&e[i]);
    }
    format = AKV_FORMAT_ALIGNED;
}

#define FAILS(call, want, word)                                                                        \
    do {                                                                                               \
        akv_status status_ = (call);                                                                   \
        CHECK(status_ == want, "%s is %d", #call, status_);                                            \
        CHECK(strstr(last_error(), word) != NULL, "\"%s\" does not name %s", last_error(), word);      \
    } while (0)

/* What the device finds out, and what must be refused. */
static void errors(void) {
    engine e, unbounded;
    static const int32_t one[SEQUENCES] = {1, 1, 1};
    akv_sequence sequence = 0;
    int32_t layer = -1;
    uint64_t row = 0;
    engine_new(&e, 1, 1), engine_new(&unbounded, 1, 0);
    for (int t = 0; t < 5; t++) rows_of_step(SEQUENCES), step(&e, 0, one, 0);
    OK(akv_poll(e.context, NULL, NULL, NULL));
    rows_of_step(SEQUENCES);
    store((uint8_t *)&v[1][2 * KV + DIM + 7], AKV_F16, NAN);
    step(&e, 0, one, 0);
    FAILS(akv_poll(e.context, &sequence, &layer, &row), AKV_E_NONFINITE, "value: token 5");
    CHECK(sequence == e.sequence[2] && layer == 1 && row == 5, "found in layer %d, row %d", layer, (int)row);
    OK(akv_poll(e.context, NULL, NULL, NULL));
    for (int i = 0; i < 3 * Q; i++) CHECK(isfinite(out_of[0][1][i]), "NaN has spread");
    rows_of_step(SEQUENCES);
    q[0][Q + DIM] = INFINITY;
    step(&e, 0, one, 0);
    FAILS(akv_poll(e.context, &sequence, &layer, &row), AKV_E_NONFINITE, "q: query row 1");
    OK(akv_poll(e.context, NULL, NULL, NULL));

    /* A step without bounds cannot be captured; it goes on as if nothing had been tried. */
    akv_batch_desc desc = {.struct_size = sizeof desc, .n_sequences = SEQUENCES, .sequences = unbounded.sequence, .n_new = one};
    akv_rows key = {.data = (void *)(uintptr_t)unbounded.k, .dtype = AKV_F16}, value = {.data = (void *)(uintptr_t)unbounded.v, .dtype = AKV_F16};
    void *graph = NULL;
    rows_of_step(SEQUENCES);
    upload(unbounded.k, k[0], 3 * KV * 2), upload(unbounded.v, v[0], 3 * KV * 2);
    OK(akv_batch_begin(unbounded.batch, &desc, stream));
    FAILS(akv_batch_replayed(unbounded.batch), AKV_E_ARGUMENT, "bounds");
    CU(cu.begin(stream, 0));
    FAILS(akv_quantize_kv(unbounded.batch, 0, &key, &value, stream), AKV_E_UNSUPPORTED, "max_kv");
    CU(cu.end(stream, &graph));
    CU(cu.graph_destroy(graph));
    OK(akv_quantize_kv(unbounded.batch, 0, &key, &value, stream));
    OK(akv_batch_abort(unbounded.batch));

    /* Moving rows waits for the device, which a capture forbids: nothing has happened then. */
    int64_t before, after;
    OK(akv_sequence_length(e.cache, e.sequence[0], -1, &before));
    CU(cu.begin(stream, 0));
    FAILS(akv_sequence_truncate(e.cache, e.sequence[0], 3), AKV_E_DEVICE, "cuCtxSynchronize");
    graph = NULL;
    cu.end(stream, &graph); /* a driver may have given the capture up */
    if (graph) CU(cu.graph_destroy(graph));
    OK(akv_sequence_length(e.cache, e.sequence[0], -1, &after));
    CHECK(before == after && before > 3, "%d tokens of %d", (int)after, (int)before);
    OK(akv_sequence_truncate(e.cache, e.sequence[0], 3));

    /* Streams and contexts of another device. */
    void *other = NULL, *foreign = NULL, *top = NULL, *ours = NULL;
    CU(cu.current(&ours));
    if (cu.retain(&other, 1) == 0) {
        CU(cu.push(other));
        CU(cu.stream(&foreign, 0));
        OK(akv_batch_begin(e.batch, &(akv_batch_desc){.struct_size = sizeof desc, .n_sequences = 1, .sequences = e.sequence, .n_new = one}, stream));
        FAILS(akv_quantize_kv(e.batch, 0, &key, &value, foreign), AKV_E_ARGUMENT, "stream of another CUDA context");
        OK(akv_batch_abort(e.batch));
        CU(cu.current(&top));
        CHECK(top == other, "the caller's current context has changed");
        akv_context *context = NULL;
        akv_context_desc d = {.struct_size = sizeof d, .abi_version = AKV_ABI_VERSION, .backend = AKV_CUDA, .device = 0, .cuda_context = other};
        FAILS(akv_context_create(&d, &context), AKV_E_ARGUMENT, "cuda_context");
        CU(cu.stream_destroy(foreign));
        CU(cu.pop(&top));
        CU(cu.drop(1));
    }
    CU(cu.current(&top));
    CHECK(top == ours, "the caller's current context has changed");
    akv_context *context = NULL;
    akv_context_desc d = {.struct_size = sizeof d, .abi_version = AKV_ABI_VERSION, .backend = AKV_CUDA, .device = 99};
    FAILS(akv_context_create(&d, &context), AKV_E_UNSUPPORTED, "desc->device is 99");
    akv_layer_desc l = {.n_q_heads = 1, .n_kv_heads = 1, .dim_k = 64};
    akv_cache_desc c = {.struct_size = sizeof c, .n_layers = 1, .layers = &l, .format = AKV_FORMAT_RAW, .placement = AKV_SLOTS, .n_slots = 128};
    akv_cache *cache = NULL;
    FAILS(akv_cache_create(e.context, &c, &cache), AKV_E_UNSUPPORTED, "desc->format");
    engine_free(&e), engine_free(&unbounded);
}

/* ---- cells: written, overwritten, forgotten and copied; masks with ALiBi; the engine's own rows */

enum { STREAMS = 2, SLOTS = 400, ALL = STREAMS * SLOTS, MAX_ROWS = 10, MAX_WRITTEN = 300 };

typedef struct {
    akv_context *context;
    akv_cache *cache;
    akv_mask *mask;
    int on_device;
    address k, v, q, out, lse, bound, stats, f16, slopes, sinks, read, workspace; /* on the device */
    size_t workspace_bytes;
    void *exec;
} cells;

static uint16_t own_k[ALL * KV], own_v[ALL * KV], mask_of[MAX_ROWS * SLOTS];
static float slopes[QH], sinks[QH], lse_of[3][2 * MAX_ROWS * QH], read_of[2][ALL * KV];

static void cells_new(cells *c, int placement, int on_device) {
    akv_context_desc context = {.struct_size = sizeof context, .abi_version = AKV_ABI_VERSION, .backend = on_device ? AKV_CUDA : AKV_CPU};
    akv_layer_desc layer = {.n_q_heads = QH, .n_kv_heads = HEADS, .dim_k = DIM, .dtype_k = AKV_F16, .dtype_v = AKV_F16};
    akv_cache_desc desc = {.struct_size = sizeof desc, .n_layers = 1, .layers = &layer, .placement = placement, .n_streams = STREAMS, .n_slots = SLOTS};
    memset(c, 0, sizeof *c);
    c->on_device = on_device;
    OK(akv_context_create(&context, &c->context));
    OK(akv_supports(c->context, &desc, NULL, NULL));
    OK(akv_cache_create(c->context, &desc, &c->cache));
    OK(akv_mask_create(c->context, MAX_ROWS, SLOTS, &c->mask));
    if (on_device) {
        size_t align;
        OK(akv_slots_workspace(c->cache, SLOTS, 0, &c->workspace_bytes, &align));
        c->k = device(sizeof own_k), c->v = device(sizeof own_v), c->q = device(MAX_ROWS * Q * 4), c->out = device(MAX_ROWS * Q * 4);
        c->lse = device(sizeof lse_of[0]), c->bound = device(MAX_ROWS * QH * 4), c->stats = device(sizeof(akv_stats)), c->f16 = device(sizeof mask_of);
        c->slopes = device(sizeof slopes), c->sinks = device(sizeof sinks), c->read = device(sizeof read_of[0]), c->workspace = device(c->workspace_bytes);
        upload(c->slopes, slopes, sizeof slopes), upload(c->sinks, sinks, sizeof sinks);
    }
    akv_rows key = {.data = on_device ? (void *)(uintptr_t)c->k : own_k, .dtype = AKV_F16}, value = {.data = on_device ? (void *)(uintptr_t)c->v : own_v, .dtype = AKV_F16};
    if (placement == AKV_ATTACHED) OK(akv_attach_rows(c->cache, 0, &key, &value));
}

static void cells_free(cells *c) {
    if (c->exec) CU(cu.exec_destroy(c->exec));
    OK(akv_mask_destroy(c->mask));
    OK(akv_cache_destroy(c->cache));
    OK(akv_context_destroy(c->context));
    address all[] = {c->k, c->v, c->q, c->out, c->lse, c->bound, c->stats, c->f16, c->slopes, c->sinks, c->read, c->workspace};
    for (size_t i = 0; c->on_device && i < sizeof all / sizeof *all; i++) CU(cu.release(all[i]));
}

/* Rows `k[0]`, `v[0]` to `n` slots, K, V or both; rows of the engine's own are there already. */
static void cells_write(cells *c, int placement, const int64_t *slots, int n, int which) {
    akv_rows key = {.data = k[0], .dtype = AKV_F16}, value = {.data = v[0], .dtype = AKV_F16};
    if (placement == AKV_ATTACHED) {
        for (int i = 0; c->on_device && i < n; i++) {
            size_t at = (size_t)slots[i] * KV;
            upload(c->k + at * 2, own_k + at, KV * 2), upload(c->v + at * 2, own_v + at, KV * 2);
        }
    } else if (c->on_device) {
        upload(c->k, k[0], (size_t)n * KV * 2), upload(c->v, v[0], (size_t)n * KV * 2);
        key.data = (void *)(uintptr_t)c->k, value.data = (void *)(uintptr_t)c->v;
    }
    int own = placement == AKV_ATTACHED;
    long allocations = cu.allocations ? cu.allocations() : 0, waits = cu.waits ? cu.waits() : 0;
    OK(akv_slots_write(c->cache, 0, slots, n, own || which == 2 ? NULL : &key, own || which == 1 ? NULL : &value, c->on_device ? stream : NULL));
    if (cu.waits) CHECK(cu.allocations() == allocations && cu.waits() == waits, "writing allocates or waits");
}

static void cells_mask(cells *c, int rows, int n_kv) {
    if (c->on_device) upload(c->f16, mask_of, (size_t)rows * (size_t)n_kv * 2);
    OK(akv_mask_set(c->mask, 0, rows, n_kv, c->on_device ? (void *)(uintptr_t)c->f16 : mask_of, 0, c->on_device ? stream : NULL));
}

static void cells_attend(cells *c, int which, akv_attention_desc a, const akv_span *spans, int with_workspace) {
    a.struct_size = sizeof a;
    if (a.mask) a.mask = c->mask;
    if (c->on_device) {
        a.stream = stream;
        a.q.data = (void *)(uintptr_t)c->q, a.out.data = (void *)(uintptr_t)c->out, a.lse = (float *)(uintptr_t)c->lse, a.lse_bound = a.lse + MAX_ROWS * QH, a.bound = (float *)(uintptr_t)c->bound;
        a.stats = (akv_stats *)(uintptr_t)c->stats;
        if (a.alibi_slopes) a.alibi_slopes = (float *)(uintptr_t)c->slopes;
        if (a.sink_logits) a.sink_logits = (float *)(uintptr_t)c->sinks;
        if (with_workspace) a.workspace = (void *)(uintptr_t)c->workspace, a.workspace_bytes = c->workspace_bytes;
    } else {
        a.q.data = q[0], a.out.data = out_of[which][0], a.lse = lse_of[which], a.lse_bound = a.lse + MAX_ROWS * QH, a.bound = bound_of[which][0], a.stats = &stats_of[which][0];
    }
    OK(akv_slots_attention(c->cache, 0, spans, STREAMS, &a));
}

static void cells_results(cells *c, int which, int rows) {
    size_t n = (size_t)rows;
    download(out_of[which][0], c->out, n * Q * 4), download(lse_of[which], c->lse, sizeof lse_of[which]), download(bound_of[which][0], c->bound, n * QH * 4);
    download(&stats_of[which][0], c->stats, sizeof(akv_stats));
}

static void cells_compare(int placement, int t, int rows, int dense) {
    akv_stats *a = &stats_of[0][0], *b = &stats_of[2][0];
    double read = (double)b->bytes_k + (double)b->bytes_v, other = (double)a->bytes_k + (double)a->bytes_v;
    if (!dense) CHECK(fabs(other - read) <= 0.02 * read, "cells %d, step %d: reads %g bytes, the CPU %g", placement, t, other, read);
    CHECK(a->tokens == b->tokens && a->path == b->path && a->dense_rows == b->dense_rows, "cells %d, step %d: %d tokens, the CPU %d", placement, t, (int)a->tokens, (int)b->tokens);
    for (int i = 0; i < rows * QH; i++) {
        double allowed = (double)bound_of[0][0][i] + (double)bound_of[2][0][i], x = lse_of[0][i], y = lse_of[2][i], apart_by = (double)lse_of[0][MAX_ROWS * QH + i] + (double)lse_of[2][MAX_ROWS * QH + i];
        CHECK(isfinite(allowed), "cells %d, step %d: bound %g", placement, t, allowed);
        CHECK(x == y || fabs(x - y) <= apart_by, "cells %d, step %d: lse %g, the CPU's %g", placement, t, x, y);
        for (int ch = 0; ch < DIM; ch++) {
            double apart = fabs((double)out_of[0][0][i * DIM + ch] - (double)out_of[2][0][i * DIM + ch]);
            CHECK(apart <= allowed, "cells %d, step %d, row %d: apart by %g, bounds add up to %g", placement, t, i / QH, apart, allowed);
        }
    }
}

static void cells_read(cells *c, int which, int first, int n) {
    akv_rows rows = {.data = c->on_device ? (void *)(uintptr_t)c->read : read_of[0], .dtype = AKV_F32};
    OK(akv_slots_read(c->cache, 0, first, n, which ? NULL : &rows, which ? &rows : NULL, c->on_device ? stream : NULL));
    if (c->on_device) download(read_of[1], c->read, (size_t)n * KV * 4);
}

static void use_cells(int placement) {
    cells c[2];
    for (int h = 0; h < QH; h++) slopes[h] = ldexpf(1, -h), sinks[h] = (float)normal();
    cells_new(&c[0], placement, 1), cells_new(&c[1], placement, 0);
    for (int t = 0; t < 24; t++) {
        int64_t slots[MAX_WRITTEN];
        int n = t == 0 ? MAX_WRITTEN : between(1, t % 5 ? 4 : 150), first = between(0, ALL - n), what = t < 4 ? 9 : between(0, 9);
        for (int i = 0; i < n; i++) slots[i] = t % 3 ? between(0, ALL - 1) : first + i;
        rows_of_step(n);
        for (int i = 0; placement == AKV_ATTACHED && i < n; i++)
            memcpy(own_k + slots[i] * KV, k[0] + i * KV, KV * 2), memcpy(own_v + slots[i] * KV, v[0] + i * KV, KV * 2);
        int part = t < 4 ? 0 : between(0, 2);
        for (int i = 0; i < 2; i++) {
            cells_write(&c[i], placement, slots, n, part);
            if (what == 0) OK(akv_slots_invalidate(c[i].cache, -1, first, n));
            if (what == 1 && placement == AKV_SLOTS) OK(akv_slots_copy(c[i].cache, 0, first % 200, 400 + first % 150, 130));
            if (what == 2 && placement == AKV_SLOTS) OK(akv_slots_copy(c[i].cache, -1, SLOTS, 0, SLOTS));
        }
        /* What the rows see: nothing of some stretches, with something added or not. */
        akv_span spans[STREAMS] = {{.stream = 1, .n_q = between(0, 2), .n_kv = between(0, SLOTS)}, {.stream = 0, .n_q = t % 8 == 7 ? 9 : 1, .n_kv = SLOTS - t}};
        int rows = spans[0].n_q + spans[1].n_q, n_kv = SLOTS - t % 2;
        if (rows > MAX_ROWS) spans[0].n_q = 0, rows = spans[1].n_q;
        for (int r = 0; r < rows; r++)
            for (int i = 0, hidden = between(0, 5); i < n_kv; i++)
                mask_of[r * n_kv + i] = i / 70 == hidden || between(0, 9) == 0 ? 0xfc00 : t % 4 < 2 ? 0 : f16_of((float)-(i % 97) / 16);
        akv_attention_desc a = {.mode = t % 2, .mask = t % 6 == 5 ? NULL : c->mask, .logit_softcap = t % 7 == 3 ? 8.0f : 0};
        if (a.mask && t % 3 == 0) a.alibi_slopes = slopes;
        if (t % 5 == 2) a.sink_logits = sinks;
        upload(c->q, q[0], (size_t)rows * Q * 4);
        for (int i = 0; i < 2; i++) cells_mask(&c[i], rows, n_kv);
        cells_attend(&c[0], 0, a, spans, t % 2), cells_attend(&c[1], 2, a, spans, 0);
        cells_results(&c[0], 0, rows);
        cells_compare(placement, t, rows, spans[1].n_q > 8);
        for (int which = 0; placement == AKV_SLOTS && t % 4 == 3 && which < 2; which++) {
            cells_read(&c[0], which, 0, ALL), cells_read(&c[1], which, 0, ALL);
            CHECK(!differ(read_of[0], read_of[1], sizeof read_of[0]), "step %d: cells read back differ", t);
        }
    }
    OK(akv_poll(c->context, NULL, NULL, NULL));

    /* A captured call sees cells that were written since, and the mask that was set; not what nobody has told the device. */
    akv_span spans[STREAMS] = {{.stream = 0, .n_q = 2, .n_kv = SLOTS}, {.stream = 1, .n_q = 1, .n_kv = SLOTS}};
    akv_attention_desc a = {.mask = c->mask};
    akv_rows key = {.data = (void *)(uintptr_t)c->k, .dtype = AKV_F16};
    void *graph = NULL;
    int64_t slot = 5;
    cells_mask(c, 3, SLOTS);
    cells_write(c, placement, &slot, 1, 0);
    CU(cu.begin(stream, 0));
    cells_attend(c, 0, a, spans, 1);
    a.struct_size = sizeof a, a.stream = stream, a.q.data = (void *)(uintptr_t)c->q, a.out.data = (void *)(uintptr_t)c->out;
    FAILS(akv_slots_attention(c->cache, 0, spans, STREAMS, &a), AKV_E_UNSUPPORTED, "desc->workspace");
    FAILS(akv_slots_write(c->cache, 0, &slot, 1, placement == AKV_SLOTS ? &key : NULL, NULL, stream), AKV_E_UNSUPPORTED, "captured");
    OK(akv_slots_invalidate(c->cache, 0, 6, 1));
    a.workspace = (void *)(uintptr_t)c->workspace, a.workspace_bytes = c->workspace_bytes;
    FAILS(akv_slots_attention(c->cache, 0, spans, STREAMS, &a), AKV_E_UNSUPPORTED, "akv_slots_write of no cells");
    CU(cu.end(stream, &graph));
    CU(cu.instantiate(&c->exec, graph, 0));
    CU(cu.graph_destroy(graph));
    for (int t = 0; t < 3; t++) {
        slot = between(0, SLOTS - 1);
        for (int i = 0; i < 3 * SLOTS; i++) mask_of[i] = between(0, 3) ? f16_of((float)(i % 3)) : 0xfc00;
        cells_mask(c, 3, SLOTS);
        cells_write(c, placement, &slot, 1, 0);
        CU(cu.launch(c->exec, stream));
        cells_results(c, 0, 3);
        memcpy(out_of[1], out_of[0], 3 * Q * 4);
        a.workspace = NULL, a.workspace_bytes = 0, a.stream = NULL;
        cells_attend(c, 0, a, spans, 0);
        cells_results(c, 0, 3);
        CHECK(!differ(out_of[0], out_of[1], 3 * Q * 4), "replay %d: other outputs than the call's", t);
    }

    /* What only the device finds out. */
    uint64_t row = 0;
    OK(akv_poll(c->context, NULL, NULL, NULL));
    slot = 277;
    store(placement == AKV_SLOTS ? (uint8_t *)&v[0][DIM + 3] : (uint8_t *)&own_v[slot * KV + DIM + 3], AKV_F16, INFINITY);
    cells_write(c, placement, &slot, 1, 0);
    CU(cu.stream_synchronize(stream));
    FAILS(akv_poll(c->context, NULL, NULL, &row), AKV_E_NONFINITE, "value: slot 277, layer 0, head 1");
    CHECK(row == 277, "row %d", (int)row);
    store((uint8_t *)&mask_of[SLOTS + 9], AKV_F16, NAN);
    cells_mask(c, 3, SLOTS);
    CU(cu.stream_synchronize(stream));
    FAILS(akv_poll(c->context, NULL, NULL, NULL), AKV_E_ARGUMENT, "mask: row 1, cell 9");
    OK(akv_poll(c->context, NULL, NULL, NULL));
    if (placement == AKV_SLOTS) {
        cells_read(c, 1, 277, 1);
        CHECK(read_of[1][DIM + 3] == 0 && isfinite(read_of[1][DIM + 2]), "what cannot be stored is %g", (double)read_of[1][DIM + 3]);
    }
    CU(cu.synchronize());
    cells_free(&c[0]), cells_free(&c[1]);
}

/* The caller's memory, of which there is none left at the nth call. */
static long live, blocks, fails_at;

static void *give(void *user, size_t bytes, size_t align, int32_t backend, void *on) {
    address p = 0;
    (void)user, (void)on;
    if (++blocks == fails_at) return NULL;
    if (backend == AKV_CPU) {
        p = (address)(uintptr_t)aligned_alloc(align, (bytes + align - 1) / align * align);
    } else if (cu.alloc(&p, bytes)) {
        return NULL;
    }
    live++;
    return (void *)(uintptr_t)p;
}

static void take(void *user, void *p, size_t bytes, int32_t backend, void *on) {
    (void)user, (void)bytes, (void)on;
    if (backend == AKV_CPU) free(p);
    else CU(cu.release((address)(uintptr_t)p));
    live--;
}

static void allocators(void) {
    static const int32_t prompt[SEQUENCES] = {130, 1, 260};
    engine e, reference;
    engine_new(&reference, 1, 0);
    rows_of_step(391);
    step(&reference, 1, prompt, 0);
    alloc_hook = give, dealloc_hook = take;
    engine_new(&e, 1, 0);
    akv_batch_desc desc = {.struct_size = sizeof desc, .n_sequences = SEQUENCES, .sequences = e.sequence, .n_new = prompt};
    long n = 0;
    for (;;) {
        int64_t tokens = -1;
        blocks = 0, fails_at = ++n;
        akv_status status = akv_batch_begin(e.prefill, &desc, stream);
        if (status == AKV_OK) break;
        CHECK(status == AKV_E_MEMORY, "begin without memory at allocation %ld is %d: %s", n, status, last_error());
        OK(akv_sequence_length(e.cache, e.sequence[2], 0, &tokens));
        CHECK(tokens == 0, "%d tokens after a step that has not begun", (int)tokens);
    }
    CHECK(n > 20, "only %ld allocations", n);
    fails_at = 0;
    OK(akv_batch_abort(e.prefill));
    step(&e, 0, prompt, 0);
    CHECK(!differ(out_of[0], out_of[1], sizeof out_of[0]), "outputs after failed steps differ");
    engine_free(&e);
    CHECK(live == 0, "%ld blocks have not been given back", live);
    alloc_hook = NULL, dealloc_hook = NULL;
    engine_free(&reference);
}

int main(void) {
    void *context = NULL;
    load_driver();
    CU(cu.init(0));
    CU(cu.retain(&context, 0));
    CU(cu.push(context));
    CU(cu.stream(&stream, 0));
    decode(AKV_FORMAT_ALIGNED, 150);
    decode(AKV_FORMAT_RAW, 60);
    decode(AKV_FORMAT_PUBLISHED, 60);
    errors();
    use_cells(AKV_SLOTS);
    use_cells(AKV_ATTACHED);
    allocators();
    CU(cu.stream_destroy(stream));
    CU(cu.pop(&context));
    CU(cu.drop(0));
    return finish("cuda");
}
