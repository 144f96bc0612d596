/* Context parallelism: the cache of one sequence split over processes, which attend each its part and merge.
 *
 *   mpirun -n 4 context_parallel [--data DIR] [--results STEM]    (make test-mpi builds and runs it)
 *
 * A rank keeps some of the sequence's tokens in a cache of its own and never sends them. In a step the owner of the new
 * token appends it, every rank attends its own part with `lse`, `bound`, `lse_bound`, `estimate` and `amplitude`, and
 * one MPI_Allreduce over these states, whose operation is akv_merge_states, leaves the attention of the whole sequence,
 * with its certificate, on all ranks. What travels is [heads][dim + 5] floats per layer, whatever the context's length.
 *
 * WHAT IS EQUAL TO WHAT. Rows as given (AKV_FORMAT_RAW) give what one process gives, to 1e-6, however they are split.
 * So does AKV_EXACT, if the sequence is cut between tiles of 128 tokens: the codes are the same then (the exact head
 * belongs to the first token's rank alone). A cut inside a tile makes two tiles with other scales, and a progressive
 * read depends on thresholds, which a rank draws from what it knows: such results differ, and each is within its own
 * certificate of attention over the caller's rows. This program checks all of that in every step, against float64.
 *
 * THRESHOLDS. Let w be a rank's share of the softmax weight. One that decides alone keeps its part's error within
 * tolerance * A of its part, though that error counts w times only: it reads finer than it must. With the others' LSE
 * and amplitude its tolerance can be tolerance * A / (w * A of its part) * sqrt(tokens of its part / tokens), and all
 * ranks together read what one process reads. `prior` below measures three sources: none, an exchange before the step
 * is read, and what the last step left (no message more; where the merged `estimate` says that attention has moved and
 * the tolerance is missed, all ranks decide alone and read again). A call has one tolerance for all its heads, so that
 * here every KV head is a layer of its own, whose query heads take the finest of what each could do with.
 *
 * ORDER. The operation is declared not commutative: MPI merges in the order of ranks, and all ranks get the same bits.
 * How it brackets them is the MPI library's choice; bits that do not depend on it come from gathering the states and
 * one akv_merge_states over all of them in the order of ranks, which this program also does and measures.
 *
 * WITH NCCL, inside an engine: there are no operations of one's own, so gather. Attention writes its state (out, lse,
 * bound, lse_bound, estimate, amplitude) into one device buffer of [heads][dim + 5] floats, ncclAllGather brings those
 * of all ranks, and akv_merge_states with n = ranks, on the same stream, makes the whole: three launches, which a
 * CUDA graph can capture. Where the next layer's weights are split by heads as well, ncclSend / ncclRecv only the heads
 * that each rank goes on with: an all-to-all of 1 / ranks of the bytes. Without the certificate, ncclAllReduce(max) of
 * lse and ncclAllReduce(sum) of exp(lse - max) * (out, 1) do it in two rounds; bounds cannot be merged that way, since
 * they need the distance of each part's output from the merged one.
 *
 * MIT OR Apache-2.0.
 */
#include <alignedkv.h>

#include <float.h>
#include <math.h>
#include <mpi.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "tinylm_model.h" /* files, f16, allocate */

enum { TILE = 128, MOST_LAYERS = 4, MOST_HEADS = 8, MOST_DIM = 128, MOST_RANKS = 64 };

/* ---- what is attended: K, V and queries of a model's last steps ---- */

typedef struct {
    const char *name;
    int layers, heads, kv_heads, dim;
    int tokens, steps; /* the last `steps` tokens are decoded, those before are the prompt */
    float *k, *v;      /* [layers][tokens][kv_heads][dim], values of f16 */
    float *q;          /* [layers][steps][heads][dim] */
    double *truth;     /* [steps][layers][heads][dim + 1]: attention in float64, and lse */
} workload;

static int rank_of_world;

static const float *k_row(const workload *w, int layer, int token) {
    return w->k + ((size_t)layer * (size_t)w->tokens + (size_t)token) * (size_t)(w->kv_heads * w->dim);
}

static const float *v_row(const workload *w, int layer, int token) { return w->v + (k_row(w, layer, token) - w->k); }

static const float *q_row(const workload *w, int layer, int step) {
    return w->q + ((size_t)layer * (size_t)w->steps + (size_t)step) * (size_t)(w->heads * w->dim);
}

static double *truth_of(const workload *w, int step, int layer, int head) {
    return w->truth + (((size_t)step * (size_t)w->layers + (size_t)layer) * (size_t)w->heads + (size_t)head) *
                          (size_t)(w->dim + 1);
}

static void attend_f64(const workload *w, int step, int layer, int head, double *out) {
    const int n = w->tokens - w->steps + step + 1, at = head / (w->heads / w->kv_heads) * w->dim;
    const float *q = q_row(w, layer, step) + head * w->dim;
    double *p = allocate((size_t)n * sizeof *p), peak = -INFINITY, total = 0;
    for (int t = 0; t < n; t++) {
        const float *k = k_row(w, layer, t) + at;
        for (int i = 0; i < w->dim; i++) p[t] += (double)q[i] * k[i];
        p[t] /= sqrt(w->dim);
        peak = fmax(peak, p[t]);
    }
    for (int t = 0; t < n; t++) total += p[t] = exp(p[t] - peak);
    for (int i = 0; i <= w->dim; i++) out[i] = 0;
    for (int t = 0; t < n; t++) {
        const float *v = v_row(w, layer, t) + at;
        for (int i = 0; i < w->dim; i++) out[i] += p[t] / total * v[i];
    }
    out[w->dim] = peak + log(total);
    free(p);
}

static void add_truth(workload *w) {
    if (rank_of_world != 0) return;
    w->truth = allocate((size_t)(w->steps * w->layers * w->heads * (w->dim + 1)) * sizeof *w->truth);
    for (int s = 0; s < w->steps; s++) {
        for (int l = 0; l < w->layers; l++) {
            for (int h = 0; h < w->heads; h++) attend_f64(w, s, l, h, truth_of(w, s, l, h));
        }
    }
}

/* Rows of the demo model over a held-out passage. */
static workload demo_model(const char *data) {
    workload w = {.name = "demo model", .layers = 4, .heads = 4, .kv_heads = 2, .dim = 64, .tokens = 2048, .steps = 32};
    const size_t rows = (size_t)(w.tokens * w.kv_heads * w.dim), queries = (size_t)(w.steps * w.heads * w.dim);
    char path[1024], name[32];
    snprintf(path, sizeof path, "%s/traces.safetensors", data);
    w.k = allocate(4 * rows * sizeof(float)), w.v = allocate(4 * rows * sizeof(float));
    w.q = allocate(4 * queries * sizeof(float));
    for (int l = 0; l < w.layers; l++) {
        const struct {
            char letter;
            const char *shape;
            size_t n;
            float *to;
        } parts[3] = {{'k', "2048,2,64", rows, w.k}, {'v', "2048,2,64", rows, w.v}, {'q', "64,4,64", 64 * 4 * 64, w.q}};
        for (int i = 0; i < 3; i++) {
            snprintf(name, sizeof name, "p0.l%d.%c", l, parts[i].letter);
            float *x = tensor_read(path, name, parts[i].shape, parts[i].n);
            /* Of the queries, those of the last steps. */
            const size_t n = parts[i].to == w.q ? queries : rows;
            memcpy(parts[i].to + (size_t)l * n, x + parts[i].n - n, n * sizeof(float));
            free(x);
        }
    }
    add_truth(&w);
    return w;
}

static float normal(uint64_t *state) {
    double u[2];
    for (int i = 0; i < 2; i++) {
        *state = *state * 6364136223846793005u + 1442695040888963407u;
        u[i] = ((double)(*state >> 11) + 0.5) * 0x1p-53;
    }
    return (float)(sqrt(-2 * log(u[0])) * cos(6.283185307179586 * u[1]));
}

/* Normal K and V; scores with a standard deviation of 2 for the first KV head's queries and 3 for the second's:
 * attention over some hundred tokens, and over a few, that lie anywhere. */
static workload drawn(void) {
    workload w = {.name = "drawn", .layers = 1, .heads = 8, .kv_heads = 2, .dim = 128, .tokens = 8192, .steps = 8};
    const size_t rows = (size_t)(w.tokens * w.kv_heads * w.dim);
    uint64_t state = 1;
    w.k = allocate(rows * sizeof(float)), w.v = allocate(rows * sizeof(float));
    w.q = allocate((size_t)(w.steps * w.heads * w.dim) * sizeof(float));
    for (size_t i = 0; i < rows; i++) {
        w.k[i] = float_from_half(half_from_float(normal(&state)));
        w.v[i] = float_from_half(half_from_float(normal(&state)));
    }
    for (int i = 0; i < w.steps * w.heads * w.dim; i++) w.q[i] = normal(&state) * (i / w.dim % w.heads < 4 ? 2 : 3);
    add_truth(&w);
    return w;
}

static void workload_free(workload *w) { free(w->k), free(w->v), free(w->q), free(w->truth); }

/* ---- the library: the part of a sequence that one process has ---- */

static akv_context *context;

/* An engine would return the error, after akv_batch_abort if a step is begun. */
static void check(akv_status status, const char *call) {
    if (status == AKV_OK) return;
    char text[512];
    akv_last_error(text, sizeof text, NULL);
    fprintf(stderr, "rank %d: %s: %s: %s\n", rank_of_world, call, akv_status_string(status), text);
    MPI_Abort(MPI_COMM_WORLD, 1);
}

typedef struct {
    const char *name;
    int32_t format, mode;
    float tolerance;
    enum { ALONE, EXCHANGED, LAST_STEP } prior;
} scheme;

typedef struct {
    const workload *w;
    akv_cache *cache;
    akv_batch *batch;
    akv_sequence sequence;
    int n; /* tokens, those of the begun step included */
} part;

/* `has_first`: the sequence's first token, and with it the exact head, will be here. */
static part part_open(const workload *w, const scheme *s, bool has_first) {
    part p = {.w = w};
    const int32_t dtype = s->format == AKV_FORMAT_RAW ? AKV_F32 : AKV_F16;
    akv_layer_desc layers[MOST_LAYERS * MOST_HEADS];
    for (int i = 0; i < w->layers * w->kv_heads; i++) {
        layers[i] = (akv_layer_desc){
            .n_q_heads = w->heads / w->kv_heads, .n_kv_heads = 1, .dim_k = w->dim, .dtype_k = dtype, .dtype_v = dtype};
    }
    const akv_cache_desc cache = {.struct_size = sizeof cache,
                                  .format = s->format,
                                  .n_layers = w->layers * w->kv_heads,
                                  .layers = layers,
                                  .exact_head = has_first ? 0 : AKV_NONE};
    const akv_batch_desc bounds = {.struct_size = sizeof bounds, .max_sequences = 1, .max_q = 1, .max_kv = w->tokens};
    check(akv_cache_create(context, &cache, &p.cache), "akv_cache_create");
    check(akv_sequence_create(p.cache, &p.sequence), "akv_sequence_create");
    check(akv_batch_create(p.cache, &bounds, &p.batch), "akv_batch_create");
    return p;
}

static void part_close(part *p) {
    check(akv_batch_destroy(p->batch), "akv_batch_destroy");
    check(akv_cache_destroy(p->cache), "akv_cache_destroy");
}

/* Begins a step that appends `n` tokens and attends one query row (with_q), and appends them. Tokens that are not
 * appended here are none of this part's business: its query row is its last token, which sees all others. */
static void part_begin(part *p, const scheme *s, const int *tokens, int n, bool with_q) {
    const workload *w = p->w;
    p->n += n;
    const int32_t n_new = n, n_q = with_q && p->n > 0;
    const akv_batch_desc step = {
        .struct_size = sizeof step, .n_sequences = 1, .sequences = &p->sequence, .n_new = &n_new, .n_q = &n_q};
    check(akv_batch_begin(p->batch, &step, NULL), "akv_batch_begin");
    if (n == 0) return;
    const size_t row = (size_t)(w->kv_heads * w->dim), bytes = s->format == AKV_FORMAT_RAW ? 4 : 2;
    unsigned char *rows[2] = {allocate((size_t)n * row * bytes), allocate((size_t)n * row * bytes)};
    for (int l = 0; l < w->layers; l++) {
        for (int i = 0; i < n; i++) {
            const float *from[2] = {k_row(w, l, tokens[i]), v_row(w, l, tokens[i])};
            for (int which = 0; which < 2; which++) {
                unsigned char *to = rows[which] + (size_t)i * row * bytes;
                for (size_t c = 0; c < row; c++) {
                    const uint16_t half = half_from_float(from[which][c]);
                    memcpy(to + c * bytes, bytes == 4 ? (const void *)&from[which][c] : &half, bytes);
                }
            }
        }
        for (int h = 0; h < w->kv_heads; h++) {
            akv_rows key = {.stride_row = (int64_t)(row * bytes), .dtype = bytes == 4 ? AKV_F32 : AKV_F16}, value = key;
            key.data = rows[0] + (size_t)(h * w->dim) * bytes;
            value.data = rows[1] + (size_t)(h * w->dim) * bytes;
            check(akv_quantize_kv(p->batch, l * w->kv_heads + h, &key, &value, NULL), "akv_quantize_kv");
        }
    }
    free(rows[0]), free(rows[1]);
}

static void part_commit(part *p) { check(akv_batch_commit(p->batch), "akv_batch_commit"); }

/* ---- states: what travels ---- */

/* The state of all heads of one layer as one block of floats: out, then lse, bound, lse_bound, estimate, amplitude. */
static struct { int heads, dim; } shape;
enum { FIELDS = 5, MOST_FLOATS = MOST_HEADS * (MOST_DIM + FIELDS) };

static int state_floats(void) { return shape.heads * (shape.dim + FIELDS); }

/* From query head `first` on. */
static akv_state state_at(float *block, int first) {
    float *fields = block + shape.heads * shape.dim + first;
    return (akv_state){.out = block + first * shape.dim,
                       .lse = fields,
                       .bound = fields + shape.heads,
                       .lse_bound = fields + 2 * shape.heads,
                       .estimate = fields + 3 * shape.heads,
                       .amplitude = fields + 4 * shape.heads};
}

/* The reduction: `in` is of lower ranks than `inout`, which takes the result. */
static void merge(void *in, void *inout, int *n, MPI_Datatype *type) {
    (void)type;
    for (int i = 0; i < *n; i++) {
        const akv_state states[2] = {state_at((float *)in + i * state_floats(), 0),
                                     state_at((float *)inout + i * state_floats(), 0)};
        check(akv_merge_states(context, states, 2, 1, shape.heads, shape.dim, &states[1], NULL), "akv_merge_states");
    }
}

typedef struct {
    uint64_t bytes, elements;
} reads;

/* Attention of one layer over this part, with a tolerance for every KV head. */
static void part_attend(part *p, const scheme *s, int layer, int step, const float *tolerance, float *block,
                        reads *sum) {
    const workload *w = p->w;
    const int group = w->heads / w->kv_heads;
    if (p->n == 0) { /* nothing is seen: the state that changes none */
        memset(block, 0, (size_t)state_floats() * sizeof(float));
        for (int h = 0; h < w->heads; h++) state_at(block, h).lse[0] = -INFINITY;
        return;
    }
    for (int h = 0; h < w->kv_heads; h++) {
        const akv_state state = state_at(block, h * group);
        akv_stats stats;
        const akv_attention_desc desc = {
            .struct_size = sizeof desc,
            .q = {.data = (void *)(q_row(w, layer, step) + h * group * w->dim), .dtype = AKV_F32},
            .out = {.data = state.out, .dtype = AKV_F32},
            .mode = s->mode,
            .tolerance = tolerance[h],
            .lse = state.lse,
            .bound = state.bound,
            .lse_bound = state.lse_bound,
            .estimate = state.estimate,
            .amplitude = state.amplitude,
            .stats = &stats,
        };
        check(akv_aligned_attention(p->batch, layer * w->kv_heads + h, &desc), "akv_aligned_attention");
        sum->bytes += stats.bytes_k + stats.bytes_v;
        sum->elements += stats.tokens * 2 * (uint64_t)w->dim;
    }
}

/* ---- thresholds from what others know ---- */

/* What a rank knows of its own part and of the whole, of one layer's heads. */
typedef struct {
    float lse[MOST_HEADS], amplitude[MOST_HEADS], whole_lse[MOST_HEADS], whole_amplitude[MOST_HEADS];
} knowledge;

/* The tolerance of each KV head with which this part's tokens are read as finely as one process would read them. */
static void share_out(const workload *w, const knowledge *known, int n_part, int n, float whole, float *tolerance) {
    const int group = w->heads / w->kv_heads;
    for (int h = 0; h < w->kv_heads; h++) {
        double least = 1e6; /* a part without weight: nothing but the scan is read */
        for (int i = h * group; i < (h + 1) * group; i++) {
            const double weighted = exp((double)known->lse[i] - known->whole_lse[i]) * known->amplitude[i];
            const double ratio = known->whole_amplitude[i] / weighted * sqrt((double)n_part / n);
            if (weighted > 0 && ratio * whole < least) least = ratio * whole;
        }
        tolerance[h] = (float)least;
    }
}

/* The small all-reduce: every rank's lse and amplitude become those of the whole. */
static void exchange(MPI_Comm comm, int ranks, knowledge *known) {
    const int n = 2 * shape.heads;
    float own[2 * MOST_HEADS], all[MOST_RANKS * 2 * MOST_HEADS];
    memcpy(own, known->lse, (size_t)shape.heads * sizeof(float));
    memcpy(own + shape.heads, known->amplitude, (size_t)shape.heads * sizeof(float));
    MPI_Allgather(own, n, MPI_FLOAT, all, n, MPI_FLOAT, comm);
    for (int h = 0; h < shape.heads; h++) {
        double peak = -INFINITY, sum = 0, amplitude = 0;
        for (int r = 0; r < ranks; r++) peak = fmax(peak, all[r * n + h]);
        for (int r = 0; r < ranks; r++) {
            const double e = exp(all[r * n + h] - peak);
            sum += e;
            amplitude += e * all[r * n + shape.heads + h];
        }
        known->whole_lse[h] = (float)(peak + log(sum));
        known->whole_amplitude[h] = (float)(amplitude / sum);
    }
}

/* ---- bytes that this process writes: over TCP (mpirun --mca btl self,tcp), those of MPI, with its headers ---- */

/* 0 where nobody counts. */
static double wire_sent(void) {
    FILE *f = fopen("/proc/self/io", "r");
    unsigned long long bytes = 0;
    if (!f) return 0;
    if (fscanf(f, "rchar: %*u wchar: %llu", &bytes) != 1) bytes = 0;
    fclose(f);
    return (double)bytes;
}

/* ---- runs ---- */

typedef enum { TILES, ANYWHERE, ROUND_TILES, ROUND_TOKENS, SKEWED, SPLITS } split;

static const struct {
    const char *name;
    bool keeps_tiles;
} SPLIT[SPLITS] = {
    [TILES] = {"even, between tiles", true},
    [ANYWHERE] = {"even, inside tiles", false},
    [ROUND_TILES] = {"tiles in turn", true},
    [ROUND_TOKENS] = {"tokens in turn", false},
    [SKEWED] = {"one rank empty, one with 3 tokens", false},
};

static int owner(split how, int token, int tokens, int ranks) {
    switch (how) {
    case TILES: return (int)((long)(token / TILE) * ranks / ((tokens + TILE - 1) / TILE));
    case ANYWHERE: return token < 37 ? 0 : (int)((long)(token - 37) * ranks / tokens);
    case ROUND_TILES: return token / TILE % ranks;
    case ROUND_TOKENS: return token % ranks;
    default: return ranks == 1 ? 0 : ranks == 2 ? 1 : token < 3 ? ranks - 2 : ranks - 1; /* the first has nothing */
    }
}

static const scheme SCHEMES[] = {
    {"rows as given", AKV_FORMAT_RAW, AKV_EXACT, 0, ALONE},
    {"exact", AKV_FORMAT_ALIGNED, AKV_EXACT, 0, ALONE},
    {"expected 1e-3", AKV_FORMAT_ALIGNED, AKV_EXPECTED, 1e-3f, ALONE},
    {"expected 1e-3", AKV_FORMAT_ALIGNED, AKV_EXPECTED, 1e-3f, EXCHANGED},
    {"expected 1e-3", AKV_FORMAT_ALIGNED, AKV_EXPECTED, 1e-3f, LAST_STEP},
    {"guaranteed 1e-1", AKV_FORMAT_ALIGNED, AKV_GUARANTEED, 1e-1f, ALONE},
};
static const char *const PRIOR[] = {"alone", "exchanged", "last step"};
enum { N_SCHEMES = sizeof SCHEMES / sizeof SCHEMES[0] };

typedef struct {
    const char *workload, *scheme, *prior, *split;
    int ranks;
    bool inside_tiles;
    double difference;           /* largest relative L2 difference of a head's output from one process's */
    double over_certificates;    /* largest distance of a channel from it, over both certificates */
    double error_over_bound;     /* largest error of a channel, against float64, over its certificate */
    double lse_error_over_bound; /* the same of lse */
    double rms_over_tolerance;   /* root mean square error of all channels, over tolerance * A; 0: no tolerance */
    double gathered;             /* as difference, between the reduction and gathering */
    double bits, single_bits;    /* read per element of K and V, by all ranks and by one process */
    double scanned_again;        /* of bits: plane 0 of K, read a second time to know LSE and amplitude */
    int again, calls;            /* steps of a layer that had to be read again, of how many */
    /* Sent per token, all layers and ranks; NAN: none, or not counted. */
    double reduce_bytes, gather_bytes, exchange_bytes;
    double f16_bytes; /* K and V in f16 on other ranks than the new token's: what would move instead */
} result;

static bool failed;

#define EXPECT(condition, ...)                                      \
    do {                                                            \
        if (!(condition)) {                                         \
            failed = true;                                          \
            printf("FAILED: %s (line %d): ", #condition, __LINE__); \
            printf(__VA_ARGS__);                                    \
            printf("\n");                                           \
        }                                                           \
    } while (0)

static double relative_difference(const float *a, const float *b, int n) {
    double apart = 0, norm = 0;
    for (int i = 0; i < n; i++) apart += pow((double)a[i] - b[i], 2), norm += pow(b[i], 2);
    return sqrt(apart / norm);
}

/* Rank 0: a merged layer against one process's and against float64. */
static void compare(const workload *w, const scheme *s, int step, int layer, float *merged, float *single, result *r,
                    double *squares) {
    for (int h = 0; h < w->heads; h++) {
        const akv_state m = state_at(merged, h), one = state_at(single, h);
        const double *truth = truth_of(w, step, layer, h);
        double square = 0;
        r->difference = fmax(r->difference, relative_difference(m.out, one.out, w->dim));
        for (int i = 0; i < w->dim; i++) {
            const double error = fabs(m.out[i] - truth[i]);
            square += error * error;
            r->error_over_bound = fmax(r->error_over_bound, error / *m.bound);
            r->over_certificates =
                fmax(r->over_certificates, fabs((double)m.out[i] - one.out[i]) / ((double)*m.bound + *one.bound));
        }
        r->lse_error_over_bound = fmax(r->lse_error_over_bound, fabs(*m.lse - truth[w->dim]) / *m.lse_bound);
        if (s->tolerance > 0) *squares += square / w->dim / pow((double)s->tolerance * *m.amplitude, 2);
    }
}

static result run(MPI_Comm comm, const workload *w, split how, const scheme *s) {
    int rank, ranks;
    MPI_Comm_rank(comm, &rank);
    MPI_Comm_size(comm, &ranks);
    result r = {w->name,
                s->name,
                PRIOR[s->prior],
                SPLIT[how].name,
                .ranks = ranks,
                .inside_tiles = !SPLIT[how].keeps_tiles,
                .calls = w->steps * w->layers};
    shape.heads = w->heads, shape.dim = w->dim;
    MPI_Datatype state_type;
    MPI_Op merge_op;
    MPI_Type_contiguous(state_floats(), MPI_FLOAT, &state_type);
    MPI_Type_commit(&state_type);
    MPI_Op_create(merge, 0, &merge_op); /* 0: in the order of ranks */

    const int prompt = w->tokens - w->steps;
    int *tokens = allocate((size_t)w->tokens * sizeof *tokens), n_prompt = 0;
    for (int t = 0; t < prompt; t++) {
        if (owner(how, t, w->tokens, ranks) == rank) tokens[n_prompt++] = t;
    }
    part mine = part_open(w, s, owner(how, 0, w->tokens, ranks) == rank);
    part_begin(&mine, s, tokens, n_prompt, false);
    part_commit(&mine);
    part whole = {0}; /* what one process does, on rank 0 */
    if (rank == 0) {
        for (int t = 0; t < prompt; t++) tokens[t] = t;
        whole = part_open(w, s, true);
        part_begin(&whole, s, tokens, prompt, false);
        part_commit(&whole);
    }
    free(tokens);

    reads all = {0}, scans = {0}, single = {0};
    double sent[3] = {0}, squares = 0, remote = 0;
    knowledge *last = allocate((size_t)w->layers * sizeof *last);
    float *gathered = allocate((size_t)ranks * MOST_FLOATS * sizeof(float));
    float same[MOST_HEADS], coarse[MOST_HEADS], tolerance[MOST_HEADS];
    float block[MOST_FLOATS], merged[MOST_FLOATS], other[MOST_FLOATS];
    for (int h = 0; h < w->kv_heads; h++) same[h] = s->tolerance, coarse[h] = 1e6f;
    for (int step = 0; step < w->steps; step++) {
        const int token = prompt + step, home = owner(how, token, w->tokens, ranks);
        part_begin(&mine, s, &token, home == rank, true);
        if (rank == 0) part_begin(&whole, s, &token, 1, true);
        if (rank != home) remote += mine.n;
        for (int l = 0; l < w->layers; l++) {
            knowledge *known = &last[l];
            memcpy(tolerance, same, sizeof same);
            if (s->prior == EXCHANGED) {
                part_attend(&mine, s, l, step, coarse, block, &scans);
                memcpy(known->lse, state_at(block, 0).lse, sizeof(float) * (size_t)w->heads);
                memcpy(known->amplitude, state_at(block, 0).amplitude, sizeof(float) * (size_t)w->heads);
                sent[2] -= wire_sent();
                exchange(comm, ranks, known);
                sent[2] += wire_sent();
            }
            if (s->prior == EXCHANGED || (s->prior == LAST_STEP && step > 0))
                share_out(w, known, mine.n, token + 1, s->tolerance, tolerance);

            for (bool again = false;; again = true) {
                part_attend(&mine, s, l, step, tolerance, block, &all);
                sent[0] -= wire_sent();
                MPI_Allreduce(block, merged, 1, state_type, merge_op, comm);
                sent[0] += wire_sent();
                if (s->prior != LAST_STEP || step == 0 || again) break;
                /* All ranks see the same numbers, and do the same. */
                bool missed = false;
                for (int h = 0; h < w->heads; h++)
                    missed |= !(*state_at(merged, h).estimate <= s->tolerance * *state_at(merged, h).amplitude);
                if (!missed) break;
                r.again++;
                memcpy(tolerance, same, sizeof same);
            }
            for (int h = 0; h < w->heads; h++) {
                const akv_state part = state_at(block, h), sum = state_at(merged, h);
                known->lse[h] = *part.lse, known->amplitude[h] = *part.amplitude;
                known->whole_lse[h] = *sum.lse, known->whole_amplitude[h] = *sum.amplitude;
            }

            /* The same bits on all ranks, and again. */
            memcpy(other, merged, sizeof merged);
            MPI_Bcast(other, state_floats(), MPI_FLOAT, 0, comm);
            EXPECT(memcmp(other, merged, (size_t)state_floats() * sizeof(float)) == 0,
                   "rank %d has other bits than rank 0", rank);
            if (step % 16 == 0) {
                MPI_Allreduce(block, other, 1, state_type, merge_op, comm);
                EXPECT(memcmp(other, merged, (size_t)state_floats() * sizeof(float)) == 0,
                       "a second reduction gives other bits");
            }
            sent[1] -= wire_sent();
            MPI_Allgather(block, 1, state_type, gathered, 1, state_type, comm);
            sent[1] += wire_sent();
            akv_state states[MOST_RANKS];
            for (int i = 0; i < ranks; i++) states[i] = state_at(gathered + i * state_floats(), 0);
            const akv_state to = state_at(other, 0);
            check(akv_merge_states(context, states, ranks, 1, w->heads, w->dim, &to, NULL), "akv_merge_states");
            for (int h = 0; h < w->heads; h++) {
                r.gathered =
                    fmax(r.gathered, relative_difference(state_at(merged, h).out, state_at(other, h).out, w->dim));
            }
            if (rank == 0) {
                part_attend(&whole, s, l, step, same, block, &single);
                compare(w, s, step, l, merged, block, &r, &squares);
            }
        }
        part_commit(&mine);
        if (rank == 0) part_commit(&whole);
    }
    part_close(&mine);
    if (rank == 0) part_close(&whole);
    free(last), free(gathered);
    MPI_Op_free(&merge_op);
    MPI_Type_free(&state_type);

    const double sums[8] = {(double)all.bytes, (double)scans.bytes, sent[0], sent[1], sent[2], remote, failed};
    double total[8];
    MPI_Allreduce(sums, total, 7, MPI_DOUBLE, MPI_SUM, comm);
    failed = total[6] > 0;
    /* Elements of the sequence: parts that were read again count once. */
    const double elements = (double)single.elements;
    r.bits = 8 * (total[0] + total[1]) / elements;
    r.scanned_again = 8 * total[1] / elements;
    r.single_bits = 8 * (double)single.bytes / elements;
    r.rms_over_tolerance = sqrt(squares / (r.calls * w->heads));
    r.reduce_bytes = total[2] > 0 ? total[2] / w->steps : NAN;
    r.gather_bytes = total[3] > 0 ? total[3] / w->steps : NAN;
    r.exchange_bytes = total[4] > 0 ? total[4] / w->steps : NAN;
    r.f16_bytes = total[5] / w->steps * w->layers * w->kv_heads * w->dim * 2 * 2;
    return r;
}

static void judge(const result *r, const scheme *s, split how) {
    char name[160];
    snprintf(name, sizeof name, "%s, %s (%s), %d ranks, %s", r->workload, r->scheme, r->prior, r->ranks, r->split);
    /* Written so that NaN fails. */
    if (s->format == AKV_FORMAT_RAW || (s->mode == AKV_EXACT && SPLIT[how].keeps_tiles)) {
        EXPECT(r->difference <= 1e-6, "%s: %g from one process", name, r->difference);
    }
    EXPECT(r->gathered <= 1e-6, "%s: gathering gives %g other results", name, r->gathered);
    EXPECT(r->over_certificates <= 1, "%s: apart from one process by %g times both certificates", name,
           r->over_certificates);
    EXPECT(r->error_over_bound <= 1, "%s: an error is %g times its certificate", name, r->error_over_bound);
    EXPECT(r->lse_error_over_bound <= 1, "%s: an error of lse is %g times its bound", name, r->lse_error_over_bound);
    EXPECT(s->mode != AKV_EXPECTED || r->rms_over_tolerance <= 1, "%s: rms error %g times the tolerance", name,
           r->rms_over_tolerance);
}

/* ---- output ---- */

static FILE *create(const char *stem, const char *ending) {
    char path[1024];
    snprintf(path, sizeof path, "%s.%s", stem, ending);
    FILE *f = fopen(path, "w");
    if (!f) {
        fprintf(stderr, "cannot write %s\n", path);
        MPI_Abort(MPI_COMM_WORLD, 1);
    }
    printf("writing %s\n", path);
    return f;
}

static void json_number(FILE *f, const char *key, double x) {
    if (isfinite(x)) fprintf(f, ", \"%s\": %.6g", key, x);
    else fprintf(f, ", \"%s\": null", key);
}

static void write_json(FILE *f, const result *rows, int n) {
    fprintf(f, "[\n");
    for (int i = 0; i < n; i++) {
        const result *r = &rows[i];
        fprintf(f, " {\"rows\": \"%s\", \"ranks\": %d, \"split\": \"%s\", \"scheme\": \"%s\", \"thresholds\": \"%s\"",
                r->workload, r->ranks, r->split, r->scheme, r->prior);
        json_number(f, "difference_from_one_process", r->difference);
        json_number(f, "difference_over_certificates", r->over_certificates);
        json_number(f, "error_over_certificate", r->error_over_bound);
        json_number(f, "lse_error_over_bound", r->lse_error_over_bound);
        json_number(f, "rms_over_tolerance", r->rms_over_tolerance > 0 ? r->rms_over_tolerance : NAN);
        json_number(f, "reduced_against_gathered", r->gathered);
        json_number(f, "bits", r->bits);
        json_number(f, "bits_of_the_second_scan", r->scanned_again);
        json_number(f, "bits_one_process", r->single_bits);
        fprintf(f, ", \"read_again\": %d, \"calls\": %d", r->again, r->calls);
        json_number(f, "reduce_bytes_per_token", r->reduce_bytes);
        json_number(f, "gather_bytes_per_token", r->gather_bytes);
        json_number(f, "exchange_bytes_per_token", r->exchange_bytes);
        json_number(f, "f16_kv_on_other_ranks", r->f16_bytes);
        fprintf(f, "}%s\n", i + 1 < n ? "," : "");
    }
    fprintf(f, "]\n");
    fclose(f);
}

/* NAN: "-". */
static const char *text(double x, const char *format) {
    static char buffers[8][32];
    static int next;
    char *buffer = buffers[next++ % 8];
    if (isfinite(x)) snprintf(buffer, sizeof buffers[0], format, x);
    else strcpy(buffer, "-");
    return buffer;
}

static void write_md(FILE *f, const result *rows, int n) {
    fprintf(f,
            "Written by `make results` (examples/context_parallel.c): the cache of one sequence split over MPI ranks, "
            "and partial\n"
            "attention merged. Rows: \"demo model\", 4 layers of 4 query and 2 KV heads of 64, 2048 tokens, of which "
            "the last 32 are\n"
            "decoded; \"drawn\", one layer of 8 and 2 heads of 128, 8192 tokens, the last 8 decoded.\n\n"
            "Bytes over the wire per token, all layers and ranks together: what MPI writes to its sockets. K and V of "
            "the other\n"
            "ranks in f16 are what would have to move if the new token's rank attended alone:\n\n"
            "| rows | ranks | merged by MPI_Allreduce | gathered, then merged | K and V in f16 | KV / merged "
            "|\n|---|---|---|---|---|---|\n");
    for (int i = 0; i < n; i++) {
        const result *r = &rows[i];
        if (strcmp(r->split, SPLIT[TILES].name) != 0 || strcmp(r->scheme, "expected 1e-3") != 0 ||
            strcmp(r->prior, "alone") != 0)
            continue;
        fprintf(f, "| %s | %d | %s | %s | %.0f | %s |\n", r->workload, r->ranks, text(r->reduce_bytes, "%.0f"),
                text(r->gather_bytes, "%.0f"), r->f16_bytes, text(r->f16_bytes / r->reduce_bytes, "%.0fx"));
    }
    fprintf(f,
            "\nThe worst row of all splits and ranks. Distance from what one process computes, relative L2 of a head's "
            "output, where the\n"
            "sequence is cut between tiles and where it is cut inside of them; errors against float64, over their "
            "certificates (1 would be\n"
            "the limit); root mean square error over tolerance * A:\n\n"
            "| rows | scheme | thresholds | from one process | cut inside tiles | error / certificate | of lse | rms / "
            "(tolerance * A) |\n"
            "|---|---|---|---|---|---|---|---|\n");
    for (int i = 0; i < n; i++) {
        bool first = true;
        result worst = rows[i];
        double apart[2] = {0};
        for (int j = 0; j < n; j++) {
            const result *r = &rows[j];
            if (strcmp(r->workload, worst.workload) != 0 || strcmp(r->scheme, worst.scheme) != 0 ||
                strcmp(r->prior, worst.prior) != 0)
                continue;
            first &= j >= i;
            apart[r->inside_tiles] = fmax(apart[r->inside_tiles], r->difference);
            worst.error_over_bound = fmax(worst.error_over_bound, r->error_over_bound);
            worst.lse_error_over_bound = fmax(worst.lse_error_over_bound, r->lse_error_over_bound);
            worst.rms_over_tolerance = fmax(worst.rms_over_tolerance, r->rms_over_tolerance);
        }
        if (!first) continue;
        fprintf(f, "| %s | %s | %s | %.1e | %.1e | %.2g | %.2g | %s |\n", worst.workload, worst.scheme, worst.prior,
                apart[0], apart[1], worst.error_over_bound, worst.lse_error_over_bound,
                text(worst.rms_over_tolerance > 0 ? worst.rms_over_tolerance : NAN, "%.2f"));
    }
    fprintf(f,
            "\nBits read per element of K and V by all ranks, at tolerance 1e-3 (expected). \"Exchanged\": thresholds "
            "from all ranks' LSE and\n"
            "amplitude, which one small message more brings after the scan; the ABI has no call between scan and "
            "reads, so that plane 0\n"
            "of K is read twice to get them, and the column in brackets leaves that out. \"Last step\": from what the "
            "last step's merge\n"
            "left, without a message; where the merged estimate missed the tolerance, the layer was read again, which "
            "is included:\n\n"
            "| rows | ranks | split | one process | alone | exchanged | (one scan) | last step | read again "
            "|\n|---|---|---|---|---|---|---|---|---|\n");
    for (int i = 0; i + 2 < n; i++) {
        const result *alone = &rows[i], *exchanged = &rows[i + 1], *step = &rows[i + 2];
        if (strcmp(step->prior, "last step") != 0) continue;
        fprintf(f, "| %s | %d | %s | %.2f | %.2f | %.2f | (%.2f) | %.2f | %d of %d |\n", alone->workload, alone->ranks,
                alone->split, alone->single_bits, alone->bits, exchanged->bits,
                exchanged->bits - exchanged->scanned_again, step->bits, step->again, step->calls);
    }
    fclose(f);
}

int main(int argc, char **argv) {
    const char *data = "examples/data", *stem = NULL;
    int ranks;
    MPI_Init(&argc, &argv);
    MPI_Comm_rank(MPI_COMM_WORLD, &rank_of_world);
    MPI_Comm_size(MPI_COMM_WORLD, &ranks);
    for (int i = 1; i < argc; i += 2) {
        if (i + 1 < argc && strcmp(argv[i], "--data") == 0) {
            data = argv[i + 1];
        } else if (i + 1 < argc && strcmp(argv[i], "--results") == 0) {
            stem = argv[i + 1];
        } else {
            if (rank_of_world == 0)
                fprintf(stderr, "usage: mpirun -n RANKS %s [--data DIR] [--results STEM]\n", argv[0]);
            MPI_Finalize();
            return 2;
        }
    }
    if (ranks > MOST_RANKS) {
        if (rank_of_world == 0) fprintf(stderr, "%d ranks: expected at most %d\n", ranks, MOST_RANKS);
        MPI_Finalize();
        return 2;
    }
    const akv_context_desc desc = {.struct_size = sizeof desc, .abi_version = AKV_ABI_VERSION};
    check(akv_context_create(&desc, &context), "akv_context_create");

    workload workloads[] = {demo_model(data), drawn()};
    enum { WORKLOADS = sizeof workloads / sizeof workloads[0] };
    static result rows[WORKLOADS * 8 * SPLITS * N_SCHEMES];
    int n = 0;
    for (int i = 0; i < WORKLOADS; i++) {
        /* On 2, 4, 8, ... of the ranks, and on all. */
        for (int some = ranks < 2 ? ranks : 2;; some = some * 2 < ranks ? some * 2 : ranks) {
            MPI_Comm comm;
            MPI_Comm_split(MPI_COMM_WORLD, rank_of_world < some ? 0 : MPI_UNDEFINED, rank_of_world, &comm);
            for (int how = 0; how < SPLITS && comm != MPI_COMM_NULL; how++) {
                for (int s = 0; s < N_SCHEMES; s++) {
                    rows[n] = run(comm, &workloads[i], (split)how, &SCHEMES[s]);
                    if (rank_of_world == 0) judge(&rows[n], &SCHEMES[s], (split)how);
                    n++;
                }
            }
            if (comm != MPI_COMM_NULL) MPI_Comm_free(&comm);
            if (some == ranks) break;
        }
        workload_free(&workloads[i]);
    }
    check(akv_context_destroy(context), "akv_context_destroy");
    MPI_Bcast(&failed, 1, MPI_C_BOOL, 0, MPI_COMM_WORLD);
    if (rank_of_world == 0) {
        double worst[2] = {0};
        for (int i = 0; i < n; i++)
            worst[0] = fmax(worst[0], rows[i].error_over_bound),
            worst[1] = fmax(worst[1], rows[i].lse_error_over_bound);
        printf("context_parallel: %d runs on up to %d ranks, largest error / certificate %.2g, of lse %.2g: %s\n", n,
               ranks, worst[0], worst[1], failed ? "FAILED" : "good");
        if (stem && !failed) {
            write_json(create(stem, "json"), rows, n);
            write_md(create(stem, "md"), rows, n);
        }
    }
    MPI_Finalize();
    return failed;
}
