/* Sequences as bytes: exported and imported through callbacks, into another cache, another process and another backend;
 * swapped out to a file and in again; and memory that runs out on the way. */
#include "check.h"

enum { LAYERS = 3, HEADS = 2, GROUP = 2, DIM = 64, KV = HEADS * DIM, QH = HEADS * GROUP, Q = QH * DIM, MOST = 1500 };

/* ---- a stream in memory */

typedef struct {
    unsigned char *bytes;
    size_t n, at, room;
    size_t stop; /* callbacks fail from here on; 0 = never */
} stream;

static int put(void *user, const void *bytes, size_t n) {
    stream *s = user;
    if (s->stop && s->n + n > s->stop) return 5;
    CHECK(n > 0 && n <= 65536, "%zu bytes at once", n);
    while (s->n + n > s->room) {
        s->room = s->room ? 2 * s->room : 1 << 16;
        s->bytes = (realloc)(s->bytes, s->room);
        REQUIRE(s->bytes != NULL, "no memory for the test");
    }
    memcpy(s->bytes + s->n, bytes, n), s->n += n;
    return 0;
}

static int get(void *user, void *bytes, size_t n) {
    stream *s = user;
    if (n > s->n - s->at) return 6;
    memcpy(bytes, s->bytes + s->at, n), s->at += n;
    return 0;
}

static void stream_free(stream *s) { (free)(s->bytes); }

/* ---- an allocator that counts, and runs dry at the nth call */

static long live, calls, fails_at;

static void *give(void *user, size_t bytes, size_t align, int32_t backend, void *on) {
    (void)user, (void)backend, (void)on, (void)align;
    if (++calls == fails_at) return NULL;
    live++;
#ifdef AKV_TEST_MANAGED
    return managed_malloc(bytes);
#else
    return aligned_alloc(align, (bytes + align - 1) / align * align);
#endif
}

static void take(void *user, void *p, size_t bytes, int32_t backend, void *on) {
    (void)user, (void)bytes, (void)backend, (void)on;
    live--;
    free(p);
}

/* ---- engines */

typedef struct {
    akv_context *context;
    akv_cache *cache;
    akv_batch *batch;
} engine;

static engine engine_new(int backend, int counted, uint32_t exact_head) {
    engine e = {0};
    akv_context_desc context = {.struct_size = sizeof context, .abi_version = AKV_ABI_VERSION, .backend = backend};
    akv_layer_desc layers[LAYERS];
    akv_cache_desc cache = {.struct_size = sizeof cache, .n_layers = LAYERS, .layers = layers, .exact_head = exact_head};
    akv_batch_desc bounds = {.struct_size = sizeof bounds};
    if (counted) context.alloc = give, context.dealloc = take;
    for (int l = 0; l < LAYERS; l++)
        layers[l] = (akv_layer_desc){.n_q_heads = QH, .n_kv_heads = HEADS, .dim_k = DIM, .dtype_k = AKV_F16, .dtype_v = l ? AKV_BF16 : AKV_F32, .planes_v = l == 2 ? 2 : 0};
    OK(akv_context_create(&context, &e.context));
    OK(akv_cache_create(e.context, &cache, &e.cache));
    OK(akv_batch_create(e.cache, &bounds, &e.batch));
    return e;
}

static void engine_free(engine *e) {
    OK(akv_batch_destroy(e->batch));
    OK(akv_cache_destroy(e->cache));
    OK(akv_context_destroy(e->context));
}

/* Memory that the device reads, if the test runs on one. */
static void *k, *v;
static float *q, *out[2], *bound[2];

static void buffers(void) {
    k = allocate((size_t)MOST * KV * 4), v = allocate((size_t)MOST * KV * 4), q = allocate(Q * sizeof *q);
    for (int i = 0; i < 2; i++) out[i] = allocate(LAYERS * Q * sizeof *out[i]), bound[i] = allocate(LAYERS * QH * sizeof *bound[i]);
}

/* A step of `n` tokens whose rows come from `seed`, and the attention of the last one, if `which` >= 0. */
static void step(engine *e, akv_sequence s, int32_t n, uint64_t seed, int which) {
    int32_t n_q = which >= 0;
    akv_batch_desc desc = {.struct_size = sizeof desc, .n_sequences = 1, .sequences = &s, .n_new = &n, .n_q = &n_q};
    OK(akv_batch_begin(e->batch, &desc, NULL));
    random_state = seed;
    for (int l = 0; l < LAYERS; l++) {
        akv_rows key = {.data = k, .dtype = AKV_F16}, value = {.data = v, .dtype = l ? AKV_BF16 : AKV_F32};
        size_t size = dtype_size(value.dtype);
        for (int i = 0; i < n * KV; i++) {
            store((uint8_t *)k + (size_t)i * 2, AKV_F16, (float)normal());
            store((uint8_t *)v + (size_t)i * size, value.dtype, (float)normal());
        }
        for (int i = 0; i < Q; i++) q[i] = (float)normal();
        OK(akv_quantize_kv(e->batch, l, &key, &value, NULL));
        if (which < 0) continue;
        akv_attention_desc a = {.struct_size = sizeof a, .q = {.data = q}, .out = {.data = out[which] + l * Q}, .bound = bound[which] + l * QH};
        OK(akv_aligned_attention(e->batch, l, &a));
    }
    OK(akv_batch_commit(e->batch));
}

/* A sequence with a history: cut into a tile that had been closed long ago, and gone on. (The stand-in for a GPU takes
 * its time.) */
static akv_sequence sequence_new(engine *e, int n) {
    akv_sequence s;
    OK(akv_sequence_create(e->cache, &s));
    step(e, s, n + 200, 7, -1);
    OK(akv_sequence_truncate(e->cache, s, n));
    step(e, s, 3, 8, -1);
    return s;
}

static stream exported(engine *e, akv_sequence s, const akv_export_desc *desc) {
    stream bytes = {0};
    OK(akv_sequence_export(e->cache, s, desc, put, &bytes));
    return bytes;
}

static akv_sequence imported(engine *e, akv_sequence into, stream *bytes) {
    akv_sequence s = 0;
    bytes->at = 0;
    OK(akv_sequence_import(e->cache, into, get, bytes, &s));
    CHECK(bytes->at == bytes->n, "%zu bytes of %zu were read", bytes->at, bytes->n);
    return s;
}

static int same(const stream *a, const stream *b) { return a->n == b->n && memcmp(a->bytes, b->bytes, a->n) == 0; }

/* Both go on, and attend alike. */
static void go_on(engine *a, akv_sequence s, engine *b, akv_sequence t) {
    int n = on_cuda() ? 2 : 100;
    for (int i = 0; i < 3; i++) {
        step(a, s, n, 100 + (uint64_t)i, 0), step(b, t, n, 100 + (uint64_t)i, 1);
        CHECK(memcmp(out[0], out[1], LAYERS * Q * sizeof(float)) == 0 && memcmp(bound[0], bound[1], LAYERS * QH * sizeof(float)) == 0,
              "attention differs after an import");
        if (i != 1) continue;
        OK(akv_sequence_truncate(a->cache, s, n - 1));
        OK(akv_sequence_truncate(b->cache, t, n - 1));
    }
}

static void round_trips(void) {
    engine a = engine_new(0, 0, 0), b = engine_new(0, 0, 77);
    int lengths[] = {1, 4, 125, 130, small_run() ? 260 : 900};
    for (size_t i = 0; i < sizeof lengths / sizeof *lengths; i++) {
        akv_sequence s = sequence_new(&a, lengths[i]), whole, parts = 0;
        stream bytes = exported(&a, s, NULL);
        whole = imported(&b, 0, &bytes);
        /* Layer by layer, the last one first. */
        for (int l = LAYERS - 1; l >= 0; l--) {
            akv_export_desc one = {.struct_size = sizeof one, .first_layer = l, .n_layers = 1};
            stream layer = exported(&a, s, &one);
            akv_sequence got = imported(&b, parts, &layer);
            CHECK(!parts || got == parts, "another sequence");
            parts = got;
            stream_free(&layer);
        }
        stream again = exported(&b, whole, NULL), once_more = exported(&b, parts, NULL);
        CHECK(same(&bytes, &again) && same(&bytes, &once_more), "other bytes after a round trip");
        stream_free(&again), stream_free(&once_more);
        go_on(&a, s, &b, whole);
        OK(akv_sequence_destroy(b.cache, whole));
        OK(akv_sequence_destroy(b.cache, parts));
        stream_free(&bytes);
    }
    engine_free(&a), engine_free(&b);
}

/* Every sequence of a full cache goes to a file, and comes back from it. */
static int write_file(void *user, const void *bytes, size_t n) { return fwrite(bytes, 1, n, user) == n ? 0 : -1; }
static int read_file(void *user, void *bytes, size_t n) { return fread(bytes, 1, n, user) == n ? 0 : -1; }

static void swapping(void) {
    engine a = engine_new(0, 0, 0);
    enum { N = 4 };
    akv_sequence s[N], kept[N];
    akv_usage before = {.struct_size = sizeof before}, after = {.struct_size = sizeof after};
    FILE *file = tmpfile();
    REQUIRE(file != NULL, "no file");
    for (int i = 0; i < N; i++) {
        s[i] = sequence_new(&a, 50 + 110 * i);
        OK(akv_sequence_fork(a.cache, s[i], -1, &kept[i]));
    }
    OK(akv_cache_usage(a.cache, &before));
    for (int i = 0; i < N; i++) {
        OK(akv_sequence_export(a.cache, s[i], NULL, write_file, file));
        OK(akv_sequence_destroy(a.cache, s[i]));
    }
    rewind(file);
    for (int i = 0; i < N; i++) OK(akv_sequence_import(a.cache, 0, read_file, file, &s[i]));
    OK(akv_cache_usage(a.cache, &after));
    CHECK(before.tokens == after.tokens && before.n_sequences == after.n_sequences, "%d tokens of %d", (int)after.tokens, (int)before.tokens);
    for (int i = 0; i < N; i++) go_on(&a, s[i], &a, kept[i]);
    fclose(file);
    engine_free(&a);
}

/* A context shift: tokens are removed from the middle, those behind move up; forks stay as they are. */
static void context_shift(void) {
    engine a = engine_new(0, 0, 0), b = engine_new(0, 0, 0);
    float inv_freq[DIM / 2];
    akv_rope ropes[LAYERS];
    for (int i = 0; i < DIM / 2; i++) inv_freq[i] = powf(10000, -2 * (float)i / DIM);
    for (int l = 0; l < LAYERS; l++) ropes[l] = (akv_rope){.pairing = l % 2 ? AKV_ROPE_HALVES : AKV_ROPE_INTERLEAVED, .n_dims = DIM, .inv_freq = inv_freq};
    akv_sequence s = sequence_new(&a, 397), fork, t;
    OK(akv_sequence_fork(a.cache, s, -1, &fork));
    stream before = exported(&a, s, NULL);
    akv_usage usage = {.struct_size = sizeof usage};
    OK(akv_sequence_remove(a.cache, s, 4, 280));
    OK(akv_cache_usage(a.cache, &usage));
    CHECK(usage.tokens == 2 * 400 - 276 && usage.n_sequences == 2, "%d tokens", (int)usage.tokens);
    OK(akv_sequence_shift(a.cache, s, 280, 1000, -276, ropes));
    stream shifted = exported(&a, s, NULL), other = exported(&a, fork, NULL);
    CHECK(same(&before, &other), "a fork has changed");
    t = imported(&b, 0, &shifted);
    go_on(&a, s, &b, t);
    /* The last position was 399. */
    OK(akv_sequence_shift(a.cache, fork, 0, 1000, 5, ropes));
    CHECK(akv_sequence_shift(a.cache, fork, 0, 100, 500, ropes) == AKV_E_ARGUMENT && strstr(last_error(), "delta"), "%s", last_error());
    ropes[1].n_dims = 3;
    CHECK(akv_sequence_shift(a.cache, fork, 0, 100, 1, ropes) == AKV_E_ARGUMENT && strstr(last_error(), "rope_per_layer[1].n_dims is 3"), "%s", last_error());
    ropes[1].n_dims = DIM, ropes[2].first_dim = 8;
    CHECK(akv_sequence_shift(a.cache, fork, 0, 100, 1, ropes) == AKV_E_ARGUMENT && strstr(last_error(), "rope_per_layer[2].first_dim is 8"), "%s", last_error());
    ropes[2].first_dim = 0, ropes[0].pairing = 2;
    CHECK(akv_sequence_shift(a.cache, fork, 0, 100, 1, ropes) == AKV_E_ARGUMENT && strstr(last_error(), "rope_per_layer[0].pairing is 2"), "%s", last_error());
    ropes[0].pairing = 0, inv_freq[3] = NAN;
    CHECK(akv_sequence_shift(a.cache, fork, 0, 100, 1, ropes) == AKV_E_ARGUMENT && strstr(last_error(), "inv_freq[3]"), "%s", last_error());
    stream_free(&before), stream_free(&shifted), stream_free(&other);
    engine_free(&a), engine_free(&b);
}

static void errors(void) {
    engine a = engine_new(0, 0, 0), b = engine_new(0, 1, 0);
    akv_sequence s = sequence_new(&a, 200), t = 99;
    stream bytes = exported(&a, s, NULL), cut = {.stop = 70000};
    CHECK(akv_sequence_export(a.cache, s, NULL, put, &cut) == AKV_E_ARGUMENT && strstr(last_error(), "write returned 5"), "%s", last_error());
    stream_free(&cut);
    akv_export_desc d = {.struct_size = sizeof d, .first_layer = LAYERS};
    CHECK(akv_sequence_export(a.cache, s, &d, put, &cut) == AKV_E_ARGUMENT && strstr(last_error(), "first_layer"), "%s", last_error());
    d.first_layer = 0, d.flags = 1;
    CHECK(akv_sequence_export(a.cache, s, &d, put, &cut) == AKV_E_ARGUMENT && strstr(last_error(), "desc->flags"), "%s", last_error());
    CHECK(akv_sequence_export(a.cache, 12345, NULL, put, &cut) == AKV_E_HANDLE, "%s", last_error());
    /* Damage, and ends before the end. */
    for (size_t n = 0; n < bytes.n; n += bytes.n / 37) {
        stream part = bytes;
        part.at = 0, part.n = n;
        CHECK(akv_sequence_import(b.cache, 0, get, &part, &t) == AKV_E_CORRUPT && strstr(last_error(), "read returned 6"), "%s", last_error());
        part.at = 0, part.n = bytes.n, bytes.bytes[n] ^= 16;
        akv_status status = akv_sequence_import(b.cache, 0, get, &part, &t);
        CHECK(status == AKV_E_CORRUPT || status == AKV_E_VERSION, "byte %zu: %s", n, last_error());
        bytes.bytes[n] ^= 16;
    }
    CHECK(t == 99, "written on an error");
    akv_usage usage = {.struct_size = sizeof usage};
    OK(akv_cache_usage(b.cache, &usage));
    CHECK(usage.n_sequences == 0 && usage.bytes_used == 0, "%d bytes are left of imports that failed", (int)usage.bytes_used);
    engine_free(&b);
    CHECK(live == 0, "%ld blocks have not been given back", live);
    /* Memory ends, at every place; then it is there again. (A cache that has had some would use it again.) */
    long n = 0;
    for (;;) {
        b = engine_new(0, 1, 0);
        calls = 0, fails_at = ++n, bytes.at = 0;
        akv_status status = akv_sequence_import(b.cache, 0, get, &bytes, &t);
        if (status == AKV_OK) break;
        CHECK(status == AKV_E_MEMORY && t == 99, "import without memory at allocation %ld is %d: %s", n, status, last_error());
        OK(akv_cache_usage(b.cache, &usage));
        CHECK(usage.n_sequences == 0 && usage.bytes_used == 0, "%d bytes are left", (int)usage.bytes_used);
        engine_free(&b);
    }
    fails_at = 0;
    CHECK(n > 5, "only %ld allocations", n);
    stream again = exported(&b, t, NULL);
    CHECK(same(&bytes, &again), "other bytes");
    go_on(&a, s, &b, t);
    stream_free(&bytes), stream_free(&again);
    engine_free(&a), engine_free(&b);
    CHECK(live == 0, "%ld blocks have not been given back", live);
}

/* The first digits, then the others. */
static void digits(void) {
    engine a = engine_new(0, 0, 0), b = engine_new(0, 0, 0);
    akv_sequence s = sequence_new(&a, 500), t;
    akv_export_desc first = {.struct_size = sizeof first, .planes_k = 2, .planes_v = 2}, further = {.struct_size = sizeof further, .known_k = 2, .known_v = 2};
    stream whole = exported(&a, s, NULL), coarse = exported(&a, s, &first), rest = exported(&a, s, &further);
    CHECK(coarse.n < whole.n && rest.n < coarse.n, "%zu, %zu and %zu bytes", whole.n, coarse.n, rest.n);
    t = imported(&b, 0, &coarse);
    step(&b, t, 1, 5, 1); /* goes on while the others come */
    OK(akv_sequence_truncate(b.cache, t, 503));
    imported(&b, t, &rest);
    stream again = exported(&b, t, NULL);
    CHECK(same(&whole, &again), "other bytes once all digits have come");
    go_on(&a, s, &b, t);
    first.planes_k = 1;
    CHECK(akv_sequence_export(a.cache, s, &first, put, &again) == AKV_E_ARGUMENT && strstr(last_error(), "desc->planes_k is 1"), "%s", last_error());
    further.known_v = 0;
    CHECK(akv_sequence_export(a.cache, s, &further, put, &again) == AKV_E_ARGUMENT && strstr(last_error(), "desc->known_v is 0"), "%s", last_error());
    stream_free(&whole), stream_free(&coarse), stream_free(&rest), stream_free(&again);
    engine_free(&a), engine_free(&b);
}

/* The same bytes from CUDA and from the CPU, and back. */
static void backends(void) {
    engine cuda = engine_new(0, 0, 0);
    unsetenv("AKV_BACKEND");
    engine cpu = engine_new(0, 0, 0);
    setenv("AKV_BACKEND", "cuda", 1);
    int lengths[] = {2, 140};
    for (int i = 0; i < 2; i++) {
        akv_sequence a = sequence_new(&cpu, lengths[i]), b = sequence_new(&cuda, lengths[i]), c;
        stream x = exported(&cpu, a, NULL), y = exported(&cuda, b, NULL);
        CHECK(same(&x, &y), "CUDA exports other bytes than the CPU: %zu and %zu", y.n, x.n);
        c = imported(&cuda, 0, &x);
        stream z = exported(&cuda, c, NULL);
        CHECK(same(&x, &z), "other bytes after an import");
        go_on(&cuda, b, &cuda, c);
        stream_free(&x), stream_free(&y), stream_free(&z);
    }
    engine_free(&cpu), engine_free(&cuda);
}

int main(int argc, char **argv) {
    buffers();
    if (argc == 3) { /* export FILE, import FILE: in two processes */
        engine a = engine_new(0, 0, 0);
        FILE *file = fopen(argv[2], strcmp(argv[1], "export") == 0 ? "wb" : "rb");
        REQUIRE(file != NULL, "cannot open %s", argv[2]);
        akv_sequence s = sequence_new(&a, 333), t;
        if (strcmp(argv[1], "export") == 0) {
            OK(akv_sequence_export(a.cache, s, NULL, write_file, file));
        } else {
            OK(akv_sequence_import(a.cache, 0, read_file, file, &t));
            go_on(&a, s, &a, t);
        }
        fclose(file);
        engine_free(&a);
        return finish(argv[1]);
    }
    if (on_cuda()) {
        backends();
    } else {
        round_trips();
        swapping();
        context_shift();
        digits();
        errors();
    }
    return finish("snapshot");
}
