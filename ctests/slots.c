/* An engine whose cells are the truth: tokens of two sequences go to whatever cells are free, a mask says who sees what,
 * and the same mask serves all layers. With rows in the library (AKV_SLOTS) and rows of the engine's own (AKV_ATTACHED);
 * with threads that share a call, and with threads that get in each other's way. On CUDA (AKV_BACKEND=cuda) memory is what
 * the host and the device share (AKV_TEST_MANAGED), and no threads share a call.
 */
#define _GNU_SOURCE
#include "check.h"
#include <pthread.h>
#include <sched.h>
#include <unistd.h>

enum { LAYERS = 2, HEADS = 2, GROUP = 3, Q_HEADS = HEADS * GROUP, DIM = 64, DIM_V = 48, CELLS = 700, SEQUENCES = 2, PROMPT = 130, MAX_Q = PROMPT };
enum { NOBODY = -1 };

/* ---- the engine */

typedef struct {
    int sequence, position;
} cell;

typedef struct {
    akv_context *context;
    akv_cache *cache;
    akv_mask *mask;
    akv_context_desc desc;
    int placement;
    cell cells[CELLS];
    int length[SEQUENCES]; /* positions that each has used */
    uint16_t mask_values[MAX_Q * CELLS];
    /* Every layer's rows: what an attached cache reads, and what the truth is computed from. */
    uint16_t k[LAYERS][CELLS * HEADS * DIM], v[LAYERS][CELLS * HEADS * DIM_V];
    int spare; /* a cell that no token is in */
    long allocations;
} engine;

/* The tokens of a step. */
typedef struct {
    int n, n_kv;
    int sequence[MAX_Q], position[MAX_Q];
    int64_t slot[MAX_Q];
} step;

enum { OUT_BYTES = MAX_Q * Q_HEADS * DIM_V * sizeof(float) };
static float *q, *out, *lse, *bound, *lse_bound;
static uint16_t *new_k, *new_v; /* rows of a step */

static void *count_allocation(void *user, size_t bytes, size_t align, int32_t backend, void *stream) {
    void *p = NULL;
    COUNT(((engine *)user)->allocations);
    CHECK((backend == AKV_CUDA) == on_cuda() && stream == NULL, "memory of another backend was asked for");
#ifdef AKV_TEST_MANAGED
    (void)align;
    return p = malloc(bytes);
#else
    return posix_memalign(&p, align < sizeof p ? sizeof p : align, bytes) ? NULL : p;
#endif
}

static void free_allocation(void *user, void *p, size_t bytes, int32_t backend, void *stream) {
    (void)user, (void)bytes, (void)backend, (void)stream;
    free(p);
}

static engine *engine_new(int placement, int n_threads) {
    engine *e = allocate(sizeof *e);
    akv_layer_desc layer[LAYERS];
    memset(e, 0, sizeof *e);
    e->placement = placement;
    e->desc = (akv_context_desc){.struct_size = sizeof e->desc, .abi_version = AKV_ABI_VERSION, .n_threads = n_threads,
                                 .alloc = count_allocation, .dealloc = free_allocation, .alloc_user = e};
    for (int i = 0; i < LAYERS; i++)
        layer[i] = (akv_layer_desc){.n_q_heads = Q_HEADS, .n_kv_heads = HEADS, .dim_k = DIM, .dim_v = DIM_V, .dtype_k = AKV_F16, .dtype_v = AKV_F16};
    akv_cache_desc desc = {.struct_size = sizeof desc, .placement = placement, .n_layers = LAYERS, .layers = layer, .n_slots = CELLS};
    OK(akv_context_create(&e->desc, &e->context));
    OK(akv_cache_create(e->context, &desc, &e->cache));
    OK(akv_mask_create(e->context, MAX_Q, CELLS, &e->mask));
    memset(e->k, 0xff, sizeof e->k); /* NaN: rows that were never written are never read */
    memset(e->v, 0xff, sizeof e->v);
    for (int i = 0; i < LAYERS && placement == AKV_ATTACHED; i++) {
        akv_rows k = {.data = e->k[i], .dtype = AKV_F16}, v = {.data = e->v[i], .dtype = AKV_F16};
        OK(akv_attach_rows(e->cache, i, &k, &v));
    }
    for (int c = 0; c < CELLS; c++) e->cells[c].sequence = NOBODY;
    return e;
}

static void engine_free(engine *e) {
    OK(akv_mask_destroy(e->mask));
    OK(akv_cache_destroy(e->cache));
    OK(akv_context_destroy(e->context));
    free(e);
}

static int sees(const engine *e, const step *s, int row, int c) {
    return e->cells[c].sequence == s->sequence[row] && e->cells[c].position <= s->position[row];
}

/* Finds cells for `n` new tokens of every sequence, and sets the mask: once for all layers. */
static step engine_begin(engine *e, int n) {
    step s = {0};
    for (int which = 0; which < SEQUENCES; which++)
        for (int i = 0; i < n; i++, s.n++) {
            int c = between(0, CELLS - 1);
            while (e->cells[c].sequence != NOBODY) c = (c + 1) % CELLS;
            e->cells[c] = (cell){which, e->length[which]++};
            s.slot[s.n] = c, s.sequence[s.n] = which, s.position[s.n] = e->cells[c].position;
        }
    for (int c = 0; c < CELLS; c++)
        if (e->cells[c].sequence != NOBODY) s.n_kv = c + 1;
    for (int r = 0; r < s.n; r++)
        for (int c = 0; c < s.n_kv; c++) e->mask_values[r * s.n_kv + c] = sees(e, &s, r, c) ? 0 : 0xfc00;
    OK(akv_mask_set(e->mask, 0, s.n, s.n_kv, e->mask_values, 0, NULL));
    return s;
}

/* A model's K and V of the step's tokens in a layer go to their cells. */
static void engine_write(engine *e, int layer, const step *s) {
    uint16_t *k = new_k, *v = new_v;
    for (int r = 0; r < s->n; r++) {
        for (int i = 0; i < HEADS * DIM; i++) e->k[layer][s->slot[r] * HEADS * DIM + i] = k[r * HEADS * DIM + i] = f16_of((float)normal());
        for (int i = 0; i < HEADS * DIM_V; i++) e->v[layer][s->slot[r] * HEADS * DIM_V + i] = v[r * HEADS * DIM_V + i] = f16_of((float)normal());
    }
    long before = e->allocations;
    if (e->placement == AKV_ATTACHED) OK(akv_slots_write(e->cache, layer, s->slot, s->n, NULL, NULL, NULL));
    else if (layer == 0) { /* both at once, cell by cell */
        for (int r = 0; r < s->n; r++) {
            akv_rows key = {.data = k + r * HEADS * DIM, .dtype = AKV_F16}, value = {.data = v + r * HEADS * DIM_V, .dtype = AKV_F16};
            OK(akv_slots_write(e->cache, layer, &s->slot[r], 1, &key, &value, NULL));
        }
    } else { /* K and V apart */
        akv_rows key = {.data = k, .dtype = AKV_F16}, value = {.data = v, .dtype = AKV_F16};
        OK(akv_slots_write(e->cache, layer, s->slot, s->n, NULL, &value, NULL));
        OK(akv_slots_write(e->cache, layer, s->slot, s->n, &key, NULL, NULL));
    }
    CHECK(e->allocations == before, "writing took memory");
}

/* Takes half the cells of a sequence from it. */
static void engine_forget(engine *e, int which) {
    for (int c = 0; c < CELLS; c++)
        if (e->cells[c].sequence == which && between(0, 1)) {
            e->cells[c].sequence = NOBODY;
            if (c % 3) continue; /* the mask hides it; nobody need be told */
            OK(akv_slots_invalidate(e->cache, -1, c, 1));
            for (int i = 0; i < LAYERS; i++) memset(&e->k[i][c * HEADS * DIM], 0xff, HEADS * DIM * sizeof(uint16_t));
        }
}

/* ---- the truth */

static void check_step(const engine *e, int layer, const step *s, const char *what) {
    static double p[CELLS];
    for (int r = 0; r < s->n; r++)
        for (int h = 0; h < Q_HEADS; h++) {
            int at = r * Q_HEADS + h, kv = h / GROUP;
            double max = -INFINITY, sum = 0, want[DIM_V] = {0};
            for (int c = 0; c < s->n_kv; c++) {
                p[c] = sees(e, s, r, c) ? 0 : -INFINITY;
                if (p[c] < 0) continue;
                for (int i = 0; i < DIM; i++) p[c] += (double)q[at * DIM + i] * f16_value(e->k[layer][(c * HEADS + kv) * DIM + i]) / 8;
                if (p[c] > max) max = p[c];
            }
            for (int c = 0; c < s->n_kv; c++)
                if (p[c] > -INFINITY) {
                    double w = exp(p[c] - max);
                    sum += w;
                    for (int i = 0; i < DIM_V; i++) want[i] += w * f16_value(e->v[layer][(c * HEADS + kv) * DIM_V + i]);
                }
            for (int i = 0; i < DIM_V; i++) {
                double error = fabs(out[at * DIM_V + i] - want[i] / sum);
                CHECK(error <= bound[at], "%s, layer %d, row %d head %d channel %d: error %g, bound %g", what, layer, r, h, i, error, (double)bound[at]);
            }
            CHECK(fabs(lse[at] - max - log(sum)) <= lse_bound[at], "%s, layer %d, row %d head %d: lse %g of %g", what, layer, r, h, (double)lse[at], max + log(sum));
            CHECK(isfinite(bound[at]), "%s: bound %g", what, (double)bound[at]);
        }
}

static akv_attention_desc call(const engine *e) {
    return (akv_attention_desc){.struct_size = sizeof(akv_attention_desc), .q = {.data = q}, .out = {.data = out}, .mask = e->mask,
                                .lse = lse, .bound = bound, .lse_bound = lse_bound};
}

/* ---- threads that share a call */

typedef struct {
    const engine *e;
    int layer;
    const step *s;
    akv_attention_desc desc;
    akv_threads threads;
    akv_status status;
} member;

static void meet(void *user) { pthread_barrier_wait(user); }

static void *join_in(void *arg) {
    member *m = arg;
    akv_span span = {.n_q = m->s->n, .n_kv = m->s->n_kv};
    m->desc.threads = &m->threads;
    m->status = akv_slots_attention(m->e->cache, m->layer, &span, 1, &m->desc);
    if (m->status != AKV_OK) printf("thread %d: %s\n", m->threads.ith, last_error());
    return NULL;
}

static void engine_attend(engine *e, int layer, const step *s, int nth) {
    akv_span span = {.n_q = s->n, .n_kv = s->n_kv};
    akv_attention_desc desc = call(e);
    for (int i = 0; i < s->n * Q_HEADS * DIM_V; i++) out[i] = NAN;
    if (nth == 0) {
        OK(akv_slots_attention(e->cache, layer, &span, 1, &desc));
        return;
    }
    pthread_t thread[8];
    pthread_barrier_t barrier;
    member m[8];
    size_t bytes, align;
    OK(akv_slots_workspace(e->cache, CELLS, nth, &bytes, &align));
    char *memory = allocate(bytes + align), *workspace = memory + (align - (uintptr_t)memory % align) % align;
    long before = e->allocations;
    desc.workspace = workspace, desc.workspace_bytes = bytes;
    if (on_cuda()) {
        OK(akv_slots_attention(e->cache, layer, &span, 1, &desc));
        CHECK(e->allocations == before, "attention with a workspace took memory");
        free(memory);
        return;
    }
    pthread_barrier_init(&barrier, NULL, (unsigned)nth);
    for (int i = 0; i < nth; i++) {
        m[i] = (member){.e = e, .layer = layer, .s = s, .desc = desc, .threads = {.ith = i, .nth = nth, .barrier = meet, .user = &barrier}};
        pthread_create(&thread[i], NULL, join_in, &m[i]);
    }
    for (int i = 0; i < nth; i++) pthread_join(thread[i], NULL);
    for (int i = 0; i < nth; i++) CHECK(m[i].status == AKV_OK, "thread %d of %d: %s", i, nth, akv_status_string(m[i].status));
    CHECK(e->allocations == before, "attention with a workspace took memory");
    pthread_barrier_destroy(&barrier);
    free(memory);
}

static void generate(int placement, int n_threads) {
    static float alone[MAX_Q * Q_HEADS * DIM_V];
    engine *e = engine_new(placement, n_threads);
    int steps = small_run() ? 12 : 60;
    for (int i = 0; i < steps; i++) {
        if (i % 20 == 9) engine_forget(e, i / 20 % SEQUENCES);
        step s = engine_begin(e, i ? 1 + i % 3 : PROMPT / SEQUENCES);
        for (int layer = 0; layer < LAYERS; layer++) {
            engine_write(e, layer, &s);
            engine_attend(e, layer, &s, 0);
            check_step(e, layer, &s, "alone");
            memcpy(alone, out, OUT_BYTES);
            int nth = 1 + i % 4;
            engine_attend(e, layer, &s, nth);
            CHECK(memcmp(alone, out, (size_t)(s.n * Q_HEADS * DIM_V) * sizeof *out) == 0, "%d threads: other bits", nth);
        }
    }
    engine_free(e);
}

/* ---- a call that is under way: whoever would have to wait for it is told so */

static int entered; /* the first thread of a call has come to its barrier */

static void arrive(void *user) {
    __atomic_store_n(&entered, 1, __ATOMIC_SEQ_CST);
    pthread_barrier_wait(user);
}

static void under_way(int placement) {
    static float again[MAX_Q * Q_HEADS * DIM_V];
    engine *e = engine_new(placement, 0);
    step s = engine_begin(e, 40);
    for (int layer = 0; layer < LAYERS; layer++) engine_write(e, layer, &s);
    engine_attend(e, 0, &s, 0);
    memcpy(again, out, OUT_BYTES);

    pthread_t thread;
    pthread_barrier_t barrier;
    size_t bytes, align;
    void *workspace = NULL;
    akv_attention_desc desc = call(e), other = desc;
    akv_span span = {.n_q = s.n, .n_kv = s.n_kv};
    akv_usage usage = {.struct_size = sizeof usage};
    OK(akv_slots_workspace(e->cache, s.n_kv, 2, &bytes, &align));
    REQUIRE(posix_memalign(&workspace, align, bytes) == 0, "%zu bytes", bytes);
    desc.workspace = workspace, desc.workspace_bytes = bytes;
    pthread_barrier_init(&barrier, NULL, 2);
    member first = {.e = e, .s = &s, .desc = desc, .threads = {.ith = 0, .nth = 2, .barrier = arrive, .user = &barrier}}, second = first;
    second.threads.ith = 1;
    entered = 0;
    pthread_create(&thread, NULL, join_in, &first);
    while (!__atomic_load_n(&entered, __ATOMIC_SEQ_CST)) sched_yield();

    akv_rows key = {.data = e->k[0], .dtype = AKV_F16}, value = {.data = e->v[0], .dtype = AKV_F16};
    const akv_rows *k = placement == AKV_SLOTS ? &key : NULL, *v = placement == AKV_SLOTS ? &value : NULL;
    float *elsewhere = allocate(OUT_BYTES);
#define BUSY(call, word)                                                                                        \
    do {                                                                                                        \
        akv_status status_ = (call);                                                                            \
        CHECK(status_ == AKV_E_BUSY, "%s is %s: %s", #call, akv_status_string(status_), last_error());          \
        CHECK(status_ != AKV_E_BUSY || strstr(last_error(), word), "%s: \"%s\" lacks %s", #call, last_error(), word); \
    } while (0)
    BUSY(akv_slots_write(e->cache, 0, s.slot, 1, k, v, NULL), "layer 0");
    BUSY(akv_slots_invalidate(e->cache, 0, 0, 1), "layer 0");
    BUSY(akv_slots_invalidate(e->cache, -1, 0, CELLS), "layer 0");
    if (placement == AKV_SLOTS) {
        BUSY(akv_slots_copy(e->cache, 0, 0, 400, 100), "layer 0");
        BUSY(akv_slots_copy(e->cache, -1, 0, 400, 100), "layer 0");
        OK(akv_slots_read(e->cache, 0, 0, 0, NULL, NULL, NULL));
    } else BUSY(akv_attach_rows(e->cache, 0, &key, &value), "layer 0");
    BUSY(akv_mask_set(e->mask, 0, s.n, s.n_kv, e->mask_values, 0, NULL), "mask");
    BUSY(akv_mask_destroy(e->mask), "mask");
    BUSY(akv_cache_destroy(e->cache), "cache");
    BUSY(akv_context_destroy(e->context), "context");
    /* Other readers, other layers, and questions do not wait. */
    other.out.data = elsewhere, other.lse = other.bound = other.lse_bound = NULL;
    OK(akv_slots_attention(e->cache, 0, &span, 1, &other));
    CHECK(memcmp(elsewhere, again, (size_t)(s.n * Q_HEADS * DIM_V) * sizeof *out) == 0, "another reader has other bits");
    OK(akv_slots_attention(e->cache, 1, &span, 1, &other));
    engine_write(e, 1, &s);
    OK(akv_cache_usage(e->cache, &usage));

    join_in(&second);
    pthread_join(thread, NULL);
    CHECK(first.status == AKV_OK && second.status == AKV_OK, "%s, %s", akv_status_string(first.status), akv_status_string(second.status));
    CHECK(memcmp(out, again, (size_t)(s.n * Q_HEADS * DIM_V) * sizeof *out) == 0, "a busy call changed something");
    check_step(e, 0, &s, "under way");
    /* And now it is not. */
    OK(akv_slots_write(e->cache, 0, s.slot, 0, k, v, NULL));
    OK(akv_slots_invalidate(e->cache, -1, 0, 1));
    OK(akv_mask_set(e->mask, 0, s.n, s.n_kv, e->mask_values, 0, NULL));
    pthread_barrier_destroy(&barrier);
    free(elsewhere);
    free(workspace);
    engine_free(e);
}

/* ---- threads that get in each other's way: each call is done, or has done nothing */

typedef struct {
    engine *e;
    const step *s;
    int kind, done, busy;
    const int *stop;
} intruder;

/* Where calls take as long as on a GPU, three threads without a rest leave no moment for a fourth. */
static void rest(void) {
    const struct timespec a_moment = {.tv_nsec = 500000};
    if (on_cuda()) nanosleep(&a_moment, NULL);
    else sched_yield();
}

/* Writes the rows that are there already, sets the mask that is set already, or forgets cells that nobody has. */
static void *intrude(void *arg) {
    intruder *i = arg;
    engine *e = i->e;
    for (int at = 0; !__atomic_load_n(i->stop, __ATOMIC_SEQ_CST) || !i->done; at = (at + 1) % i->s->n) {
        int64_t slot = i->s->slot[at];
        akv_rows key = {.data = e->k[0] + slot * HEADS * DIM, .dtype = AKV_F16}, value = {.data = e->v[0] + slot * HEADS * DIM_V, .dtype = AKV_F16};
        int attached = e->placement == AKV_ATTACHED;
        akv_status status = i->kind == 0   ? akv_slots_write(e->cache, 0, &slot, 1, attached ? NULL : &key, attached ? NULL : &value, NULL)
                            : i->kind == 1 ? akv_mask_set(e->mask, 0, i->s->n, i->s->n_kv, e->mask_values, 0, NULL)
                                           : akv_slots_invalidate(e->cache, 0, e->spare, 1);
        CHECK(status == AKV_OK || status == AKV_E_BUSY, "%d: %s", i->kind, akv_status_string(status));
        if (status == AKV_OK) i->done++;
        else i->busy++;
        rest();
    }
    return NULL;
}

static void in_each_others_way(int placement) {
    enum { INTRUDERS = 3 };
    pthread_t thread[INTRUDERS];
    intruder intruders[INTRUDERS];
    engine *e = engine_new(placement, 0);
    int stop = 0, done = 0, busy = 0, times = small_run() ? 5 : 50;
    step prompt = engine_begin(e, PROMPT / SEQUENCES);
    engine_write(e, 0, &prompt);
    step s = engine_begin(e, 2);
    engine_write(e, 0, &s);
    while (e->cells[e->spare].sequence != NOBODY) e->spare++;
    for (int i = 0; i < INTRUDERS; i++) {
        intruders[i] = (intruder){.e = e, .s = i == 1 ? &s : &prompt, .kind = i, .stop = &stop};
        pthread_create(&thread[i], NULL, intrude, &intruders[i]);
    }
    while (done < times) {
        akv_span span = {.n_q = s.n, .n_kv = s.n_kv};
        akv_attention_desc desc = call(e);
        akv_status status = akv_slots_attention(e->cache, 0, &span, 1, &desc);
        CHECK(status == AKV_OK || status == AKV_E_BUSY, "%s: %s", akv_status_string(status), last_error());
        if (status == AKV_OK) check_step(e, 0, &s, "in a crowd"), done++;
        else busy++, rest();
    }
    __atomic_store_n(&stop, 1, __ATOMIC_SEQ_CST);
    for (int i = 0; i < INTRUDERS; i++) pthread_join(thread[i], NULL);
    printf("  attention %d, busy %d; intruders", done, busy);
    for (int i = 0; i < INTRUDERS; i++) printf(" %d, busy %d%s", intruders[i].done, intruders[i].busy, i < INTRUDERS - 1 ? ";" : "\n");
    engine_free(e);
}

int main(void) {
    alarm(540); /* a hang is a failure */
    q = allocate(MAX_Q * Q_HEADS * DIM * sizeof *q), out = allocate(OUT_BYTES);
    lse = allocate(MAX_Q * Q_HEADS * sizeof *lse), bound = allocate(MAX_Q * Q_HEADS * sizeof *bound), lse_bound = allocate(MAX_Q * Q_HEADS * sizeof *lse_bound);
    new_k = allocate(MAX_Q * HEADS * DIM * sizeof *new_k), new_v = allocate(MAX_Q * HEADS * DIM_V * sizeof *new_v);
    for (int i = 0; i < MAX_Q * Q_HEADS * DIM; i++) q[i] = (float)normal() * 2;
    for (int placement = AKV_SLOTS; placement <= AKV_ATTACHED; placement++) {
        generate(placement, 0);
        printf("  random steps %ld checks\n", check_count);
        fflush(stdout);
        if (!on_cuda()) generate(placement, 3);
        if (!on_cuda()) under_way(placement);
        in_each_others_way(placement);
    }
    free(q), free(out), free(lse), free(bound), free(lse_bound), free(new_k), free(new_v);
    return finish("slots");
}
