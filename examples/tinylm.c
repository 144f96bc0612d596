/* A small language model whose attention runs through libalignedkv, token by token.
 *
 *   tinylm [--data DIR] [--json FILE] [--threads N] [--positions N] [--prompt TEXT]
 *
 * First it continues a prompt. Then it runs 16 texts of 2048 bytes as one batch under each of nine KV schemes and
 * reports loss, bits read, certificates and measured errors; with --json also to FILE, and a plot beside it. It fails
 * if the exact scheme misses the reference loss, or a measured error exceeds its certificate.
 *
 * Every call of the library is in this file, in the order in which an engine makes them: open_kv, attend, decode,
 * close_kv. Model and output are in the other two.
 *
 * MIT OR Apache-2.0.
 */
#define _POSIX_C_SOURCE 200809L
#include <alignedkv.h>

#include <math.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "tinylm_model.h"
#include "tinylm_report.h"

#ifndef TINYLM_DATA
#define TINYLM_DATA "examples/data"
#endif

enum {
    LATE = 1024,  /* "from 1024": where the context is long */
    SAMPLE = 97,  /* attention is measured in every 97th step */
    SAMPLES = (CONTEXT / SAMPLE + 1) * LANES * HEADS
};

/* A way to keep K and V. */
typedef struct {
    const char *name, *mode_name;
    int32_t format, dtype, mode, planes;
    float tolerance;
} scheme;

static const scheme SCHEMES[] = {
    {"exact-f32", NULL, AKV_FORMAT_RAW, AKV_F32, AKV_EXACT, 0, 0},
    {"published-8-4-4", NULL, AKV_FORMAT_PUBLISHED, AKV_F16, AKV_EXPECTED, 0, 0},
    {"aligned", "expected", AKV_FORMAT_ALIGNED, AKV_F16, AKV_EXPECTED, 4, 1e-4f},
    {"aligned", "expected", AKV_FORMAT_ALIGNED, AKV_F16, AKV_EXPECTED, 4, 1e-3f},
    {"aligned", "expected", AKV_FORMAT_ALIGNED, AKV_F16, AKV_EXPECTED, 4, 3e-3f},
    {"aligned", "expected", AKV_FORMAT_ALIGNED, AKV_F16, AKV_EXPECTED, 4, 1e-2f},
    {"aligned", "guaranteed", AKV_FORMAT_ALIGNED, AKV_F16, AKV_GUARANTEED, 4, 1e-1f},
    {"aligned", "exact", AKV_FORMAT_ALIGNED, AKV_F16, AKV_EXACT, 4, 0},
    {"aligned", "expected", AKV_FORMAT_ALIGNED, AKV_F16, AKV_EXPECTED, 2, 1e-3f},
};
enum { N_SCHEMES = sizeof SCHEMES / sizeof SCHEMES[0] };

/* What was read. */
typedef struct {
    uint64_t bytes_k, bytes_v, tokens;
} reads;

/* Attention measured against float64 over the rows that the cache was given. */
typedef struct {
    float *k, *v; /* [LAYERS][LANES][KV_HEADS][CONTEXT][DIM], as rounded for the cache */
    double over_estimate[SAMPLES], over_tolerance[SAMPLES]; /* rms errors of rows, over estimate and tolerance * A */
    int n_over_estimate, n_over_tolerance;
    uint64_t certificates;
    double worst; /* largest error over certificate */
} audit;

/* The KV cache of a model under one scheme, and the sequences of a batch in it. */
typedef struct {
    const scheme *scheme;
    akv_cache *cache;
    akv_batch *batch;
    akv_sequence sequences[LANES];
    int n;
    int position; /* tokens that every sequence has */

    reads all, late;
    double max_bound, max_relative_bound;
    int32_t isa;
    audit *audit; /* NULL: none */
} kv_cache;

static double now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

/* ---- the library ---- */

/* A demo ends at the first error. An engine would return it, after akv_batch_abort if a step is begun. */
static void check(akv_status status, const char *call) {
    if (status == AKV_OK) return;
    char text[512];
    akv_last_error(text, sizeof text, NULL);
    fprintf(stderr, "\n%s: %s: %s\n", call, akv_status_string(status), text);
    exit(1);
}

static akv_context *open_context(int threads) {
    const akv_context_desc desc = {
        .struct_size = sizeof desc,
        .abi_version = AKV_ABI_VERSION,
        .n_threads = threads,
    };
    akv_context *context;
    check(akv_context_create(&desc, &context), "akv_context_create");
    return context;
}

/* A cache with n empty sequences, and the batch that will carry their steps. */
static void open_kv(kv_cache *kv, akv_context *context, const scheme *scheme, int n, audit *audit) {
    memset(kv, 0, sizeof *kv);
    kv->scheme = scheme;
    kv->n = n;
    kv->audit = audit;

    akv_layer_desc layers[LAYERS];
    for (int i = 0; i < LAYERS; i++) {
        layers[i] = (akv_layer_desc){
            .n_q_heads = HEADS,
            .n_kv_heads = KV_HEADS,
            .dim_k = DIM,
            .dtype_k = scheme->dtype,
            .dtype_v = scheme->dtype,
            .planes_k = scheme->planes,
            .planes_v = scheme->planes,
        };
    }
    const akv_cache_desc desc = {
        .struct_size = sizeof desc,
        .format = scheme->format,
        .n_layers = LAYERS,
        .layers = layers,
    };
    check(akv_cache_create(context, &desc, &kv->cache), "akv_cache_create");
    for (int i = 0; i < n; i++) {
        check(akv_sequence_create(kv->cache, &kv->sequences[i]), "akv_sequence_create");
    }
    const akv_batch_desc bounds = {
        .struct_size = sizeof bounds,
        .max_sequences = n,
        .max_q = n,
        .max_kv = CONTEXT,
    };
    check(akv_batch_create(kv->cache, &bounds, &kv->batch), "akv_batch_create");
}

static void measure(kv_cache *kv, int layer, const float *q, const float *out, const float *bound,
                    const float *estimate, const float *amplitude);
static void remember(kv_cache *kv, int layer, const float *k, const float *v);

/* Attention of one layer (attend_fn): hands the new rows to the cache, then attends. */
static void attend(void *user, int layer, const float *q, const float *k, const float *v, float *out) {
    kv_cache *kv = user;
    uint16_t k_half[LANES * KV_HEADS * DIM], v_half[LANES * KV_HEADS * DIM];
    akv_rows key = {.data = (void *)k, .dtype = AKV_F32};
    akv_rows value = {.data = (void *)v, .dtype = AKV_F32};
    if (kv->scheme->dtype == AKV_F16) {
        for (int i = 0; i < kv->n * KV_HEADS * DIM; i++) {
            k_half[i] = half_from_float(k[i]);
            v_half[i] = half_from_float(v[i]);
        }
        key = (akv_rows){.data = k_half, .dtype = AKV_F16};
        value = (akv_rows){.data = v_half, .dtype = AKV_F16};
    }
    check(akv_quantize_kv(kv->batch, layer, &key, &value, NULL), "akv_quantize_kv");

    float bound[LANES * HEADS], estimate[LANES * HEADS], amplitude[LANES * HEADS];
    akv_stats stats;
    const akv_attention_desc desc = {
        .struct_size = sizeof desc,
        .q = {.data = (void *)q, .dtype = AKV_F32},
        .out = {.data = out, .dtype = AKV_F32},
        .tolerance = kv->scheme->tolerance,
        .mode = kv->scheme->mode,
        .bound = bound,
        .estimate = estimate,
        .amplitude = amplitude,
        .stats = &stats,
    };
    check(akv_aligned_attention(kv->batch, layer, &desc), "akv_aligned_attention");

    reads *sums[2] = {&kv->all, kv->position >= LATE ? &kv->late : NULL};
    for (int i = 0; i < 2 && sums[i]; i++) {
        sums[i]->bytes_k += stats.bytes_k;
        sums[i]->bytes_v += stats.bytes_v;
        sums[i]->tokens += stats.tokens;
    }
    kv->isa = stats.isa;
    for (int i = 0; i < kv->n * HEADS; i++) {
        if (!isfinite(bound[i])) continue;
        kv->max_bound = fmax(kv->max_bound, bound[i]);
        if (amplitude[i] > 0) kv->max_relative_bound = fmax(kv->max_relative_bound, bound[i] / amplitude[i]);
    }
    if (kv->audit) {
        remember(kv, layer, k, v);
        measure(kv, layer, q, out, bound, estimate, amplitude);
    }
}

/* One token of each sequence: a step of the batch through all layers. */
static void decode(kv_cache *kv, model *m, const uint8_t *tokens, float *logits) {
    int32_t one_each[LANES];
    for (int i = 0; i < kv->n; i++) one_each[i] = 1;
    const akv_batch_desc step = {
        .struct_size = sizeof step,
        .n_sequences = (uint32_t)kv->n,
        .sequences = kv->sequences,
        .n_new = one_each,
        .n_q = one_each,
    };
    check(akv_batch_begin(kv->batch, &step, NULL), "akv_batch_begin");
    model_step(m, tokens, kv->n, kv->position, attend, kv, logits);
    check(akv_batch_commit(kv->batch), "akv_batch_commit");
    kv->position++;
}

static void close_kv(kv_cache *kv) {
    check(akv_batch_destroy(kv->batch), "akv_batch_destroy");
    check(akv_cache_destroy(kv->cache), "akv_cache_destroy"); /* with its sequences */
}

/* ---- a continuation ---- */

static double bits(uint64_t bytes, uint64_t elements) {
    return elements ? 8.0 * (double)bytes / (double)elements : NAN;
}

/* A byte drawn from softmax(logits / temperature); the generator is its own, so that the text is the same each time. */
static uint8_t draw(const float *logits, double temperature, uint64_t *state) {
    double peak = -INFINITY, total = 0, p[VOCAB];
    for (int i = 0; i < VOCAB; i++) peak = fmax(peak, logits[i]);
    for (int i = 0; i < VOCAB; i++) total += p[i] = exp((logits[i] - peak) / temperature);
    *state = *state * 6364136223846793005u + 1442695040888963407u;
    double x = (double)(*state >> 11) * 0x1p-53 * total;
    int token = 0;
    while (token < VOCAB - 1 && (x -= p[token]) >= 0) token++;
    return (uint8_t)token;
}

static void continue_prompt(akv_context *context, model *m, const char *prompt) {
    enum { LENGTH = 300 };
    const double temperature = 0.5;
    const int n_prompt = (int)strlen(prompt);
    const scheme standard = {"aligned", "expected", AKV_FORMAT_ALIGNED, AKV_F16, AKV_EXPECTED, 0, 0}; /* 0: default */
    kv_cache kv;
    open_kv(&kv, context, &standard, 1, NULL);
    float logits[VOCAB];
    uint64_t state = 1;
    printf("%s", prompt);
    const double start = now();
    for (int i = 0; i < n_prompt + LENGTH - 1; i++) {
        const uint8_t token = i < n_prompt ? (uint8_t)prompt[i] : draw(logits, temperature, &state);
        if (i >= n_prompt) putchar(token);
        fflush(stdout);
        decode(&kv, m, &token, logits);
    }
    putchar(draw(logits, temperature, &state));
    const double seconds = now() - start;
    printf("\n\n[%d bytes of prompt, %d of continuation: %.2f bits read per element of K and V, certificate at most "
           "%.1e of the amplitude, %.0f tokens/s]\n\n",
           n_prompt, LENGTH, bits(kv.all.bytes_k + kv.all.bytes_v, 2 * kv.all.tokens * DIM), kv.max_relative_bound,
           (n_prompt + LENGTH - 1) / seconds);
    close_kv(&kv);
}

/* ---- measured errors ---- */

static size_t row_of(int layer, int sequence, int head, int position) {
    return ((((size_t)layer * LANES + (size_t)sequence) * KV_HEADS + (size_t)head) * CONTEXT + (size_t)position) * DIM;
}

static void remember(kv_cache *kv, int layer, const float *k, const float *v) {
    const bool half = kv->scheme->dtype == AKV_F16;
    for (int s = 0; s < kv->n; s++) {
        for (int h = 0; h < KV_HEADS; h++) {
            const size_t to = row_of(layer, s, h, kv->position), from = (size_t)(s * KV_HEADS + h) * DIM;
            for (int i = 0; i < DIM; i++) {
                kv->audit->k[to + i] = half ? float_from_half(half_from_float(k[from + i])) : k[from + i];
                kv->audit->v[to + i] = half ? float_from_half(half_from_float(v[from + i])) : v[from + i];
            }
        }
    }
}

/* out = softmax(q K / sqrt(DIM)) V over n rows, in double precision. */
static void attention_f64(const float *q, const float *k, const float *v, int n, double *out) {
    double p[CONTEXT], peak = -INFINITY, total = 0;
    for (int t = 0; t < n; t++) {
        double dot = 0;
        for (int i = 0; i < DIM; i++) dot += (double)q[i] * k[t * DIM + i];
        p[t] = dot / sqrt(DIM);
        peak = fmax(peak, p[t]);
    }
    for (int t = 0; t < n; t++) total += p[t] = exp(p[t] - peak);
    for (int i = 0; i < DIM; i++) out[i] = 0;
    for (int t = 0; t < n; t++) {
        for (int i = 0; i < DIM; i++) out[i] += p[t] / total * v[t * DIM + i];
    }
}

/* Every 97th step: all sequences and heads of one layer, each time the next. */
static void measure(kv_cache *kv, int layer, const float *q, const float *out, const float *bound,
                    const float *estimate, const float *amplitude) {
    audit *a = kv->audit;
    const int step = kv->position + 1;
    if (step % SAMPLE != 0 || step / SAMPLE % LAYERS != layer) return;
    for (int row = 0; row < kv->n * HEADS; row++) {
        const size_t rows = row_of(layer, row / HEADS, row % HEADS / (HEADS / KV_HEADS), 0);
        double truth[DIM], square = 0, largest = 0;
        attention_f64(q + row * DIM, a->k + rows, a->v + rows, step, truth);
        for (int i = 0; i < DIM; i++) {
            const double error = fabs(out[row * DIM + i] - truth[i]);
            square += error * error;
            largest = fmax(largest, error);
        }
        const double rms = sqrt(square / DIM), allowed = kv->scheme->tolerance * amplitude[row];
        if (isfinite(estimate[row]) && estimate[row] > 0) a->over_estimate[a->n_over_estimate++] = rms / estimate[row];
        if (isfinite(allowed) && allowed > 0) a->over_tolerance[a->n_over_tolerance++] = rms / allowed;
        if (isfinite(bound[row])) {
            a->certificates++;
            /* A bound of 0 that is missed is an infinite ratio. */
            if (largest > 0) a->worst = fmax(a->worst, largest / bound[row]);
        }
    }
}

static int ascending(const void *a, const void *b) {
    const double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

/* Sorts the values. */
static double quantile(double *values, int n, double share) {
    qsort(values, (size_t)n, sizeof values[0], ascending);
    return n ? values[(int)(share * (n - 1) + 0.5)] : NAN;
}

/* ---- the schemes ---- */

/* Losses of a scheme: means over each window, and over its positions from 1024 on. */
typedef struct {
    double window[LANES], late[LANES];
} losses;

static double mean(const double *x, int n) {
    double sum = 0;
    for (int i = 0; i < n; i++) sum += x[i];
    return sum / n;
}

/* Mean of the windows' paired differences, and its standard error. */
static double paired_difference(const double *x, const double *base, double *se) {
    double d[LANES], squares = 0;
    for (int i = 0; i < LANES; i++) d[i] = x[i] - base[i];
    const double m = mean(d, LANES);
    for (int i = 0; i < LANES; i++) squares += (d[i] - m) * (d[i] - m);
    *se = sqrt(squares / (LANES - 1) / LANES);
    return m;
}

static void progress(const char *name, int done, int total) {
    static int shown = -1;
    const int percent = (int)(100L * done / total);
    if (percent == shown || !isatty(STDERR_FILENO)) return;
    shown = percent;
    fprintf(stderr, "\r%3d%% %-20s%s", percent, name, done == total ? "\r                         \r" : "");
}

/* Runs the windows under scheme `index`; `exact` are the losses of scheme 0, written if this is it. */
static result run_scheme(akv_context *context, model *m, int index, const char *windows, int positions, int threads,
                         audit *a, losses *exact) {
    const scheme *scheme = &SCHEMES[index];
    const int steps = positions - 1; /* the last byte of a window is only predicted */
    losses sums = {0};
    kv_cache kv;
    a->n_over_estimate = a->n_over_tolerance = 0;
    a->certificates = 0;
    a->worst = 0;
    open_kv(&kv, context, scheme, LANES, a);
    float *logits = allocate(LANES * VOCAB * sizeof(float));
    const double start = now();
    for (int t = 0; t < steps; t++) {
        uint8_t tokens[LANES];
        for (int i = 0; i < LANES; i++) tokens[i] = (uint8_t)windows[i * CONTEXT + t];
        decode(&kv, m, tokens, logits);
        for (int i = 0; i < LANES; i++) {
            const double loss = negative_log_likelihood(logits + i * VOCAB, (uint8_t)windows[i * CONTEXT + t + 1]);
            sums.window[i] += loss / steps;
            if (t >= LATE) sums.late[i] += loss / (steps - LATE);
        }
        progress(scheme->name, index * steps + t + 1, N_SCHEMES * steps);
    }
    const double seconds = now() - start;
    free(logits);
    close_kv(&kv);

    if (index == 0) *exact = sums;
    const uint64_t elements = kv.all.tokens * DIM, late = kv.late.tokens * DIM;
    static const char *const isa_names[] = {"none", "scalar", "avx2", "avx512"};
    result r = {
        .scheme = scheme->name,
        .mode = scheme->mode_name,
        .tolerance = scheme->tolerance > 0 ? (double)scheme->tolerance : NAN,
        .planes = scheme->planes,
        .loss = mean(sums.window, LANES),
        .bits_k = bits(kv.all.bytes_k, elements),
        .bits_v = bits(kv.all.bytes_v, elements),
        .bits = bits(kv.all.bytes_k + kv.all.bytes_v, 2 * elements),
        .bits_k_from_1024 = bits(kv.late.bytes_k, late),
        .bits_v_from_1024 = bits(kv.late.bytes_v, late),
        .bits_from_1024 = bits(kv.late.bytes_k + kv.late.bytes_v, 2 * late),
        .byte_share = (double)(kv.all.bytes_k + kv.all.bytes_v) / (4.0 * (double)elements),
        .max_certificate = kv.max_bound > 0 ? kv.max_bound : NAN,
        .max_certificate_over_amplitude = kv.max_relative_bound > 0 ? kv.max_relative_bound : NAN,
        .rms_over_estimate_median = quantile(a->over_estimate, a->n_over_estimate, 0.5),
        .rms_over_estimate_p99 = quantile(a->over_estimate, a->n_over_estimate, 0.99),
        .rms_over_tolerance_median = quantile(a->over_tolerance, a->n_over_tolerance, 0.5),
        .rms_over_tolerance_p99 = quantile(a->over_tolerance, a->n_over_tolerance, 0.99),
        .certificates_checked = a->certificates,
        .worst_error_over_certificate = a->certificates ? a->worst : NAN,
        .tokens_per_s = LANES * steps / seconds,
        .threads = threads,
        .isa = kv.isa >= 0 && kv.isa <= 3 ? isa_names[kv.isa] : "other",
    };
    r.loss_delta = paired_difference(sums.window, exact->window, &r.se);
    r.loss_delta_from_1024 = r.se_from_1024 = NAN;
    if (steps > LATE) r.loss_delta_from_1024 = paired_difference(sums.late, exact->late, &r.se_from_1024);
    return r;
}

/* "mean" of the reference losses. */
static double reference_loss(const char *path) {
    size_t size;
    char *text = read_file(path, &size);
    const char *mean = strstr(text, "\"mean\":");
    const double loss = mean ? strtod(mean + 7, NULL) : NAN;
    free(text);
    return loss;
}

static bool evaluate(akv_context *context, model *m, const char *data, int positions, int threads, result *rows) {
    char path[1024];
    size_t size;
    snprintf(path, sizeof path, "%s/eval.txt", data);
    char *windows = read_file(path, &size);
    if (size < LANES * CONTEXT) {
        fprintf(stderr, "%s: %zu bytes, expected %d\n", path, size, LANES * CONTEXT);
        exit(1);
    }
    audit *a = allocate(sizeof *a);
    const size_t floats = (size_t)LAYERS * LANES * KV_HEADS * CONTEXT * DIM;
    a->k = allocate(floats * sizeof(float));
    a->v = allocate(floats * sizeof(float));
    losses exact = {0};
    bool good = true;

    printf("%d windows of %d bytes, decoded token by token as one batch, %d threads:\n\n", LANES, positions, threads);
    print_header();
    for (int i = 0; i < N_SCHEMES; i++) {
        rows[i] = run_scheme(context, m, i, windows, positions, threads, a, &exact);
        print_row(&rows[i]);
    }

    printf("\nErrors are measured against float64 attention over the same rows, in every %dth step for all heads of\n"
           "all windows in one layer, each time the next. Bits include scales and exact rows.\n\n", SAMPLE);
    for (int i = 0; i < N_SCHEMES; i++) {
        /* Written so that NaN fails. */
        if (rows[i].certificates_checked > 0 && !(rows[i].worst_error_over_certificate <= 1)) {
            printf("FAILED: scheme %d (%s): an error is %g times its certificate\n", i, rows[i].scheme,
                   rows[i].worst_error_over_certificate);
            good = false;
        }
    }
    uint64_t certificates = 0;
    double worst = 0;
    for (int i = 0; i < N_SCHEMES; i++) {
        certificates += rows[i].certificates_checked;
        worst = fmax(worst, rows[i].worst_error_over_certificate);
    }
    printf("certificates: %llu checked, largest error / certificate %.3g\n", (unsigned long long)certificates, worst);
    if (positions == CONTEXT) {
        snprintf(path, sizeof path, "%s/eval_oracle.json", data);
        const double reference = reference_loss(path), off = rows[0].loss - reference;
        const bool same = fabs(off) <= 1e-4;
        printf("%sexact-f32: loss %.6f, of the reference implementation %.6f (difference %.1e)\n",
               same ? "" : "FAILED: ", rows[0].loss, reference, off);
        good = good && same;
    }
    free(a->k);
    free(a->v);
    free(a);
    free(windows);
    return good;
}

/* The number behind an option. */
static int number(const char *option, const char *text, int low, int high) {
    char *end;
    const long x = strtol(text, &end, 10);
    if (*text == 0 || *end != 0 || x < low || x > high) {
        fprintf(stderr, "%s %s: expected a number from %d to %d\n", option, text, low, high);
        exit(2);
    }
    return (int)x;
}

int main(int argc, char **argv) {
    const char *data = TINYLM_DATA, *json = NULL;
    const char *prompt = "/// Returns `true` if the map contains a value for the specified key.\n"
                         "///\n/// # Examples\n///\n/// ```\n/// use std::collections::HashMap;\n";
    int threads = 2, positions = CONTEXT;
    for (int i = 1; i < argc; i += 2) {
        const char *option = argv[i], *value = i + 1 < argc ? argv[i + 1] : NULL;
        if (value && strcmp(option, "--data") == 0) {
            data = value;
        } else if (value && strcmp(option, "--json") == 0) {
            json = value;
        } else if (value && strcmp(option, "--threads") == 0) {
            threads = number(option, value, 1, 64);
        } else if (value && strcmp(option, "--positions") == 0) {
            positions = number(option, value, 2, CONTEXT);
        } else if (value && strcmp(option, "--prompt") == 0 && *value && strlen(value) <= CONTEXT / 2) {
            prompt = value;
        } else {
            fprintf(stderr, "usage: %s [--data DIR] [--json FILE] [--threads N] [--positions N] [--prompt TEXT]\n",
                    argv[0]);
            return 2;
        }
    }
    char path[1024];
    snprintf(path, sizeof path, "%s/tinylm.safetensors", data);
    model *m = model_load(path, threads);
    akv_context *context = open_context(threads);
    printf("%s\n\n", akv_version_string());

    continue_prompt(context, m, prompt);
    result rows[N_SCHEMES];
    const bool good = evaluate(context, m, data, positions, threads, rows);

    check(akv_context_destroy(context), "akv_context_destroy");
    model_free(m);
    if (!good) return 1;
    if (json) {
        write_json(json, rows, N_SCHEMES);
        const size_t stem = strlen(json) - (strlen(json) > 5 && strcmp(json + strlen(json) - 5, ".json") == 0 ? 5 : 0);
        snprintf(path, sizeof path, "%.*s.svg", (int)stem, json);
        write_svg(path, rows, N_SCHEMES);
    }
    return 0;
}
