/* Any number of threads, the caller's or the context's, and any instruction set give the same bits; threads that work on
 * different sequences and layers at once do not disturb each other; errors return in every thread.
 */
#define _GNU_SOURCE
#include "check.h"
#include <pthread.h>
#include <unistd.h>

enum { LAYERS = 2, HEADS = 2, GROUP = 3, Q_HEADS = HEADS * GROUP, DIM = 64, DIM_V = 48, SEQUENCES = 4, MAX_THREADS = 8 };

static const int32_t lengths[SEQUENCES] = {1500, 300, 129, 7}, queries[SEQUENCES] = {1, 12, 3, 2};
enum { ROWS = 18, TOKENS = 1936 };

/* Everything that a call writes. */
typedef struct {
    float out[ROWS * Q_HEADS * DIM_V];
    float lse[ROWS * Q_HEADS], bound[ROWS * Q_HEADS], lse_bound[ROWS * Q_HEADS], estimate[ROWS * Q_HEADS], amplitude[ROWS * Q_HEADS];
    akv_stats stats;
} outputs;

static float q[ROWS * Q_HEADS * DIM], k[LAYERS][TOKENS * HEADS * DIM], v[LAYERS][TOKENS * HEADS * DIM_V];

/* A context with a cache of all sequences, in a begun step. */
typedef struct {
    akv_context *context;
    akv_cache *cache;
    akv_batch *batch;
    akv_sequence sequence[SEQUENCES];
} engine;

static akv_status engine_context(engine *e, int isa, int n_threads) {
    akv_context_desc desc = {.struct_size = sizeof desc, .abi_version = AKV_ABI_VERSION, .isa = isa, .n_threads = n_threads};
    return akv_context_create(&desc, &e->context);
}

static void engine_fill(engine *e, int32_t max_threads) {
    akv_layer_desc layer[LAYERS];
    for (int i = 0; i < LAYERS; i++) layer[i] = (akv_layer_desc){.n_q_heads = Q_HEADS, .n_kv_heads = HEADS, .dim_k = DIM, .dim_v = DIM_V};
    akv_cache_desc desc = {.struct_size = sizeof desc, .n_layers = LAYERS, .layers = layer};
    akv_batch_desc bounds = {.struct_size = sizeof bounds, .max_sequences = SEQUENCES, .max_q = ROWS, .max_kv = 2000, .max_threads = max_threads};
    akv_batch_desc step = {.struct_size = sizeof step, .n_sequences = SEQUENCES, .sequences = e->sequence, .n_new = lengths, .n_q = queries};
    OK(akv_cache_create(e->context, &desc, &e->cache));
    OK(akv_batch_create(e->cache, &bounds, &e->batch));
    for (int i = 0; i < SEQUENCES; i++) OK(akv_sequence_create(e->cache, &e->sequence[i]));
    OK(akv_batch_begin(e->batch, &step, NULL));
    for (int i = 0; i < LAYERS; i++) {
        akv_rows key = {.data = k[i]}, value = {.data = v[i]};
        OK(akv_quantize_kv(e->batch, i, &key, &value, NULL));
    }
}

static void engine_free(engine *e) {
    OK(akv_batch_destroy(e->batch));
    OK(akv_cache_destroy(e->cache));
    OK(akv_context_destroy(e->context));
}

static akv_attention_desc call(outputs *o, int mode) {
    return (akv_attention_desc){.struct_size = sizeof(akv_attention_desc), .q = {.data = q}, .out = {.data = o->out}, .mode = mode,
                                .tolerance = mode == AKV_GUARANTEED ? 0.1f : 0, .lse = o->lse, .bound = o->bound,
                                .lse_bound = o->lse_bound, .estimate = o->estimate, .amplitude = o->amplitude, .stats = &o->stats};
}

static outputs truth_of[LAYERS][3];

static void same(outputs *o, int layer, int mode, const char *what, int n) {
    o->stats.isa = truth_of[layer][mode].stats.isa;
    CHECK(memcmp(o, &truth_of[layer][mode], sizeof *o) == 0, "%s %d: layer %d, mode %d has other bits", what, n, layer, mode);
}

/* ---- the caller's own threads */

typedef struct {
    engine *e;
    akv_attention_desc desc;
    int layer, ith, nth;
    pthread_barrier_t *barrier;
    int *entered;
    akv_status status;
    char text[256];
} member;

static __thread int *entered_here;

static void wait_for_all(void *user) {
    ++*entered_here;
    pthread_barrier_wait(user);
}

static void *join_in(void *arg) {
    member *m = arg;
    int entered = 0;
    akv_threads threads = {.ith = m->ith, .nth = m->nth, .barrier = wait_for_all, .user = m->barrier};
    entered_here = &entered;
    m->desc.threads = &threads;
    m->status = akv_aligned_attention(m->e->batch, m->layer, &m->desc);
    if (m->status != AKV_OK) akv_last_error(m->text, sizeof m->text, NULL);
    m->entered[m->ith] = entered;
    return NULL;
}

/* All threads make the call; returns their common status. */
static akv_status together(engine *e, int layer, akv_attention_desc desc, int nth) {
    pthread_t thread[MAX_THREADS];
    pthread_barrier_t barrier;
    member m[MAX_THREADS];
    int entered[MAX_THREADS] = {0};
    size_t bytes, align;
    OK(akv_batch_workspace(e->batch, &bytes, &align));
    void *workspace = NULL;
    REQUIRE(posix_memalign(&workspace, align < sizeof(void *) ? sizeof(void *) : align, bytes ? bytes : 1) == 0, "%zu bytes", bytes);
    memset(workspace, 0xff, bytes); /* what is in it does not matter */
    desc.workspace = workspace, desc.workspace_bytes = bytes;
    pthread_barrier_init(&barrier, NULL, (unsigned)nth);
    for (int i = 0; i < nth; i++) {
        m[i] = (member){.e = e, .desc = desc, .layer = layer, .ith = i, .nth = nth, .barrier = &barrier, .entered = entered};
        pthread_create(&thread[i], NULL, join_in, &m[i]);
    }
    for (int i = 0; i < nth; i++) pthread_join(thread[i], NULL);
    for (int i = 1; i < nth; i++) {
        CHECK(m[i].status == m[0].status, "thread %d returns %s, thread 0 %s", i, akv_status_string(m[i].status), akv_status_string(m[0].status));
        CHECK(entered[i] == entered[0], "thread %d entered the barrier %d times, thread 0 %d times", i, entered[i], entered[0]);
        CHECK(m[i].status == AKV_OK || m[i].text[0], "thread %d has no text", i);
    }
    pthread_barrier_destroy(&barrier);
    free(workspace);
    return m[0].status;
}

static void same_bits(void) {
    static const int counts[] = {1, 2, 3, 8};
    static const char *const names[] = {"", "scalar", "avx2", "avx512"};
    static outputs o;
    for (int isa = AKV_ISA_SCALAR; isa <= AKV_ISA_AVX512; isa++) {
        engine e;
        akv_status status = engine_context(&e, isa, 0);
        if (status == AKV_E_UNSUPPORTED) {
            printf("  SKIPPED: this machine lacks %s\n", names[isa]);
            continue;
        }
        OK(status);
        engine_fill(&e, MAX_THREADS);
        for (int layer = 0; layer < LAYERS; layer++)
            for (int mode = AKV_EXPECTED; mode <= AKV_EXACT; mode++) {
                outputs *want = &truth_of[layer][mode];
                akv_attention_desc desc;
                memset(&o, 0, sizeof o);
                desc = call(isa == AKV_ISA_SCALAR ? want : &o, mode);
                OK(akv_aligned_attention(e.batch, layer, &desc));
                CHECK((isa == AKV_ISA_SCALAR ? want : &o)->stats.isa == isa, "ran as isa %d", o.stats.isa);
                if (isa != AKV_ISA_SCALAR) same(&o, layer, mode, names[isa], 1);
                for (int i = 0; i < 4; i++) {
                    memset(&o, 0, sizeof o);
                    OK(together(&e, layer, call(&o, mode), counts[i]));
                    same(&o, layer, mode, "caller's threads", counts[i]);
                }
            }
        engine_free(&e);
        for (int i = 0; i < 4; i++) {
            OK(engine_context(&e, isa, counts[i]));
            engine_fill(&e, 0);
            for (int layer = 0; layer < LAYERS; layer++)
                for (int mode = AKV_EXPECTED; mode <= AKV_EXACT; mode++) {
                    akv_attention_desc desc = call(&o, mode);
                    memset(&o, 0, sizeof o);
                    OK(akv_aligned_attention(e.batch, layer, &desc));
                    same(&o, layer, mode, "context's threads", counts[i]);
                }
            engine_free(&e);
        }
    }
    /* The environment forces one, too. */
    engine e;
    setenv("AKV_ISA", "scalar", 1);
    OK(engine_context(&e, 0, 0));
    engine_fill(&e, 1);
    akv_attention_desc desc = call(&o, AKV_EXPECTED);
    OK(akv_aligned_attention(e.batch, 0, &desc));
    CHECK(o.stats.isa == AKV_ISA_SCALAR, "AKV_ISA=scalar ran as isa %d", o.stats.isa);
    engine_free(&e);
    unsetenv("AKV_ISA");
}

/* ---- errors with several threads: all return, none hangs (main sets an alarm) */

static void errors(void) {
    static outputs o;
    engine e;
    OK(engine_context(&e, 0, 0));
    engine_fill(&e, 4);
    for (int nth = 1; nth <= 4; nth++) {
        akv_attention_desc desc = call(&o, AKV_EXPECTED);
        akv_status status;
        float keep = q[ROWS * Q_HEADS * DIM - 1];
        q[ROWS * Q_HEADS * DIM - 1] = NAN; /* found during the work */
        status = together(&e, 0, desc, nth);
        CHECK(status == AKV_E_NONFINITE, "NaN in q: %s", akv_status_string(status));
        q[ROWS * Q_HEADS * DIM - 1] = keep;
        status = together(&e, LAYERS, desc, nth); /* found before */
        CHECK(status == AKV_E_ARGUMENT, "layer: %s", akv_status_string(status));
        desc.mode = 9;
        status = together(&e, 0, desc, nth);
        CHECK(status == AKV_E_ARGUMENT, "mode: %s", akv_status_string(status));
        memset(&o, 0, sizeof o);
        OK(together(&e, 0, call(&o, AKV_EXPECTED), nth)); /* and afterwards all is well */
        same(&o, 0, AKV_EXPECTED, "after errors, threads", nth);
    }
    /* More than the batch's bound, and no workspace. */
    akv_status status = together(&e, 0, call(&o, AKV_EXPECTED), 5);
    CHECK(status == AKV_E_ARGUMENT || status == AKV_E_CAPACITY, "5 of at most 4 threads: %s", akv_status_string(status));
    akv_threads two = {.nth = 2, .barrier = wait_for_all};
    akv_attention_desc desc = call(&o, AKV_EXPECTED);
    desc.threads = &two;
    status = akv_aligned_attention(e.batch, 0, &desc);
    CHECK(status == AKV_E_ARGUMENT && strstr(last_error(), "workspace"), "no workspace: %s", last_error());
    engine_free(&e);
}

/* ---- threads that share a cache: each appends to and attends its own sequence; others attend one step's layers */

enum { STEPS = 140 };

typedef struct {
    akv_cache *cache;
    int which, steps;
    float out[STEPS][LAYERS][Q_HEADS * DIM_V];
} writer;

static void *generate(void *arg) {
    writer *w = arg;
    akv_sequence s;
    akv_batch *batch;
    akv_batch_desc bounds = {.struct_size = sizeof bounds};
    OK(akv_sequence_create(w->cache, &s));
    OK(akv_batch_create(w->cache, &bounds, &batch));
    for (int i = 0; i < w->steps; i++) {
        int32_t n_new = i ? 1 : 100 + w->which, one = 1;
        int at = w->which * 300 + (i ? 110 + i : 0);
        akv_batch_desc step = {.struct_size = sizeof step, .n_sequences = 1, .sequences = &s, .n_new = &n_new, .n_q = &one};
        OK(akv_batch_begin(batch, &step, NULL));
        for (int layer = 0; layer < LAYERS; layer++) {
            akv_rows key = {.data = k[layer] + at * HEADS * DIM}, value = {.data = v[layer] + at * HEADS * DIM_V};
            akv_attention_desc desc = {.struct_size = sizeof desc, .q = {.data = q}, .out = {.data = w->out[i][layer]}};
            OK(akv_quantize_kv(batch, layer, &key, &value, NULL));
            OK(akv_aligned_attention(batch, layer, &desc));
        }
        OK(akv_batch_commit(batch));
        if (i % 30 == 29) { /* what others share of it outlives it */
            akv_sequence fork;
            OK(akv_sequence_fork(w->cache, s, -1, &fork));
            OK(akv_sequence_destroy(w->cache, s));
            s = fork;
        }
    }
    OK(akv_batch_destroy(batch));
    OK(akv_sequence_destroy(w->cache, s));
    return NULL;
}

typedef struct {
    engine *e;
    int layer, times;
} reader;

static void *attend_layer(void *arg) {
    reader *r = arg;
    outputs *o = allocate(sizeof *o);
    for (int i = 0; i < r->times; i++) {
        akv_attention_desc desc = call(o, i % 3);
        memset(o, 0, sizeof *o);
        OK(akv_aligned_attention(r->e->batch, r->layer, &desc));
        same(o, r->layer, i % 3, "at the same time, round", i);
    }
    free(o);
    return NULL;
}

static void at_once(int n_threads) {
    enum { WRITERS = 3, READERS = 4 };
    static writer alone[WRITERS], crowd[WRITERS];
    pthread_t thread[WRITERS + READERS];
    reader r[READERS];
    engine e;
    int steps = small_run() ? 20 : STEPS, times = small_run() ? 3 : 30;
    OK(engine_context(&e, 0, n_threads));
    engine_fill(&e, 0);
    for (int i = 0; i < WRITERS; i++) {
        alone[i] = (writer){.cache = e.cache, .which = i, .steps = steps};
        crowd[i] = alone[i];
        generate(&alone[i]);
    }
    for (int i = 0; i < WRITERS; i++) pthread_create(&thread[i], NULL, generate, &crowd[i]);
    for (int i = 0; i < READERS; i++) {
        r[i] = (reader){.e = &e, .layer = i % LAYERS, .times = times};
        pthread_create(&thread[WRITERS + i], NULL, attend_layer, &r[i]);
    }
    for (int i = 0; i < WRITERS + READERS; i++) pthread_join(thread[i], NULL);
    for (int i = 0; i < WRITERS; i++) CHECK(memcmp(alone[i].out, crowd[i].out, sizeof alone[i].out) == 0, "writer %d has other bits in a crowd", i);
    engine_free(&e);
}

int main(void) {
    alarm(540); /* a hang is a failure */
    for (int i = 0; i < ROWS * Q_HEADS * DIM; i++) q[i] = (float)normal() * 2;
    for (int l = 0; l < LAYERS; l++) {
        for (int i = 0; i < TOKENS * HEADS * DIM; i++) k[l][i] = (float)normal();
        for (int i = 0; i < TOKENS * HEADS * DIM_V; i++) v[l][i] = (float)normal();
    }
    same_bits();
    errors();
    at_once(0);
    at_once(3);
    return finish("threads");
}
