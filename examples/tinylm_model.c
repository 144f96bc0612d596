/* The demo's language model: weights, linear layers on a few threads, RoPE. No attention: that is tinylm.c's, through
 * the library. Plain C11 with the vector extension of GCC and Clang.
 * MIT OR Apache-2.0.
 */
#define _POSIX_C_SOURCE 200809L
#include "tinylm_model.h"

#include <math.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* A feature of all sequences of a step, one per lane: activations are arrays of these, so that a weight is read once
 * for all sequences and multiplies a vector. */
typedef struct {
    float lane[LANES];
} lanes;

/* Threads that run one job at a time together. */
typedef struct pool pool;
typedef void job_fn(model *m, int ith, int nth);
typedef struct {
    pool *pool;
    int ith;
    pthread_t thread;
} worker;
struct pool {
    pthread_mutex_t lock;
    pthread_cond_t start, done;
    int nth;
    atomic_int busy;
    atomic_uint round; /* counts jobs: a worker waits for the next */
    job_fn *job;    /* NULL: end */
    model *model;
    worker *workers; /* nth - 1: the caller is thread 0 */
};

enum {
    PARAMETERS_OF_LAYER = 2 * HIDDEN + 2 * HEADS * DIM * HIDDEN + 2 * KV_HEADS * DIM * HIDDEN + 3 * FFN * HIDDEN,
    PARAMETERS = LAYERS * PARAMETERS_OF_LAYER + VOCAB * HIDDEN + HIDDEN
};

typedef struct {
    const float *attn_norm, *wq, *wk, *wv, *wo, *ffn_norm, *w_gate, *w_up, *w_down;
} layer_weights;

struct model {
    _Alignas(sizeof(lanes)) lanes x[HIDDEN], y[HIDDEN]; /* residual stream; normed, or attention's output */
    lanes q[HEADS * DIM], k[KV_HEADS * DIM], v[KV_HEADS * DIM];
    lanes gate[FFN], up[FFN], logits[VOCAB];
    float q_rows[LANES * HEADS * DIM], k_rows[LANES * KV_HEADS * DIM], v_rows[LANES * KV_HEADS * DIM];
    float out_rows[LANES * HEADS * DIM];
    float rope_cos[CONTEXT][DIM / 2], rope_sin[CONTEXT][DIM / 2];
    const layer_weights *layer; /* the one that the current job is for */
    layer_weights layers[LAYERS];
    const float *embed, *norm;
    float *weights; /* all of them */
    pool pool;
};

static void die(const char *format, const char *a, const char *b) {
    fprintf(stderr, format, a, b);
    exit(1);
}

void *allocate(size_t bytes) {
    void *p = calloc(1, bytes);
    if (!p) die("out of memory%s%s\n", "", "");
    return p;
}

/* ---- threads ---- */

/* A step has some twenty short jobs, and sleeping costs more than most of them: look a while before. */
enum { LOOKS = 2000 };

static void pause_cpu(void) {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#endif
}

static void *worker_main(void *argument) {
    worker *w = argument;
    pool *p = w->pool;
    for (unsigned seen = 0;;) {
        for (int i = 0; i < LOOKS && p->round == seen; i++) pause_cpu();
        pthread_mutex_lock(&p->lock);
        while (p->round == seen) pthread_cond_wait(&p->start, &p->lock);
        seen = p->round;
        job_fn *job = p->job;
        pthread_mutex_unlock(&p->lock);
        if (!job) return NULL;
        job(p->model, w->ith, p->nth);
        pthread_mutex_lock(&p->lock);
        if (--p->busy == 0) pthread_cond_signal(&p->done);
        pthread_mutex_unlock(&p->lock);
    }
}

static void pool_post(pool *p, job_fn *job) {
    pthread_mutex_lock(&p->lock);
    p->job = job;
    p->busy = p->nth - 1;
    p->round++;
    pthread_cond_broadcast(&p->start);
    pthread_mutex_unlock(&p->lock);
}

static void run(model *m, job_fn *job) {
    pool *p = &m->pool;
    if (p->nth > 1) pool_post(p, job);
    job(m, 0, p->nth);
    if (p->nth > 1) {
        for (int i = 0; i < LOOKS && p->busy > 0; i++) pause_cpu();
        pthread_mutex_lock(&p->lock);
        while (p->busy > 0) pthread_cond_wait(&p->done, &p->lock);
        pthread_mutex_unlock(&p->lock);
    }
}

static void pool_start(pool *p, model *m, int nth) {
    pthread_mutex_init(&p->lock, NULL);
    pthread_cond_init(&p->start, NULL);
    pthread_cond_init(&p->done, NULL);
    p->nth = nth;
    p->model = m;
    p->workers = allocate((size_t)nth * sizeof(worker));
    for (int i = 1; i < nth; i++) {
        worker *w = &p->workers[i - 1];
        w->pool = p;
        w->ith = i;
        if (pthread_create(&w->thread, NULL, worker_main, w) != 0) die("cannot start a thread%s%s\n", "", "");
    }
}

static void pool_stop(pool *p) {
    pool_post(p, NULL);
    for (int i = 1; i < p->nth; i++) pthread_join(p->workers[i - 1].thread, NULL);
    free(p->workers);
    pthread_cond_destroy(&p->done);
    pthread_cond_destroy(&p->start);
    pthread_mutex_destroy(&p->lock);
}

/* ---- linear layers ---- */

/* y[first..last] = w x, or += w x; w is [out][n_in]. Eight outputs share the loads of x, and their sums stay in
 * registers: hence `vector`, the instruction set's own width. */
#define LINEAR(name, target, vector)                                                                             \
    target static void name(const float *w, int n_in, const lanes *x, lanes *y, int first, int last, bool add) { \
        enum { parts = sizeof(lanes) / sizeof(vector) };                                                         \
        for (int o = first; o < last; o += 8) {                                                                  \
            const float *row = w + (size_t)o * (size_t)n_in;                                                     \
            for (int p = 0; p < parts; p++) {                                                                    \
                const vector *xp = (const vector *)x + p;                                                        \
                vector *yp = (vector *)(y + o) + p, sum[8] = {{0}};                                              \
                for (int i = 0; i < n_in; i++) {                                                                 \
                    for (int j = 0; j < 8; j++) sum[j] += row[j * n_in + i] * xp[i * parts];                     \
                }                                                                                                \
                for (int j = 0; j < 8; j++) {                                                                    \
                    if (add) sum[j] += yp[j * parts];                                                            \
                    yp[j * parts] = sum[j];                                                                      \
                }                                                                                                \
            }                                                                                                    \
        }                                                                                                        \
    }
typedef float float4 __attribute__((vector_size(16), may_alias));
LINEAR(linear_portable, , float4)
#if defined(__x86_64__)
typedef float float8 __attribute__((vector_size(32), may_alias));
typedef float float16 __attribute__((vector_size(64), may_alias));
LINEAR(linear_avx2, __attribute__((target("avx2,fma"))), float8)
LINEAR(linear_avx512, __attribute__((target("avx512f"))), float16)
#endif

/* This thread's part of y = w x (or += w x); n_out is a multiple of 8. */
static void linear(const float *w, int n_out, int n_in, const lanes *x, lanes *y, bool add, int ith, int nth) {
    const int first = n_out / 8 * ith / nth * 8, last = n_out / 8 * (ith + 1) / nth * 8;
#if defined(__x86_64__)
    if (__builtin_cpu_supports("avx512f")) {
        linear_avx512(w, n_in, x, y, first, last, add);
        return;
    }
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
        linear_avx2(w, n_in, x, y, first, last, add);
        return;
    }
#endif
    linear_portable(w, n_in, x, y, first, last, add);
}

static void rms_norm(const lanes *x, const float *gain, lanes *y) {
    float scale[LANES] = {0};
    for (int i = 0; i < HIDDEN; i++) {
        for (int r = 0; r < LANES; r++) scale[r] += x[i].lane[r] * x[i].lane[r];
    }
    for (int r = 0; r < LANES; r++) scale[r] = 1.0f / sqrtf(scale[r] / HIDDEN + 1e-5f);
    for (int i = 0; i < HIDDEN; i++) {
        for (int r = 0; r < LANES; r++) y[i].lane[r] = x[i].lane[r] * scale[r] * gain[i];
    }
}

static void job_qkv(model *m, int ith, int nth) {
    linear(m->layer->wq, HEADS * DIM, HIDDEN, m->y, m->q, false, ith, nth);
    linear(m->layer->wk, KV_HEADS * DIM, HIDDEN, m->y, m->k, false, ith, nth);
    linear(m->layer->wv, KV_HEADS * DIM, HIDDEN, m->y, m->v, false, ith, nth);
}

static void job_out(model *m, int ith, int nth) {
    linear(m->layer->wo, HIDDEN, HEADS * DIM, m->y, m->x, true, ith, nth);
}

static void job_gate(model *m, int ith, int nth) {
    linear(m->layer->w_gate, FFN, HIDDEN, m->y, m->gate, false, ith, nth);
    linear(m->layer->w_up, FFN, HIDDEN, m->y, m->up, false, ith, nth);
    const int first = FFN / 8 * ith / nth * 8, last = FFN / 8 * (ith + 1) / nth * 8;
    for (int i = first; i < last; i++) {
        for (int r = 0; r < LANES; r++) m->gate[i].lane[r] *= m->up[i].lane[r] / (1.0f + expf(-m->gate[i].lane[r]));
    }
}

static void job_down(model *m, int ith, int nth) {
    linear(m->layer->w_down, HIDDEN, FFN, m->gate, m->x, true, ith, nth);
}

static void job_logits(model *m, int ith, int nth) {
    linear(m->embed, VOCAB, HIDDEN, m->y, m->logits, false, ith, nth);
}

/* rows[r][i] = x[i].lane[r] for the n sequences of the step. */
static void rows_from_lanes(const lanes *x, int n, int width, float *rows) {
    for (int r = 0; r < n; r++) {
        for (int i = 0; i < width; i++) rows[r * width + i] = x[i].lane[r];
    }
}

/* lane r of x[i] = rows[r][i] for n rows, 0 in the other lanes. */
static void lanes_from_rows(const float *rows, int n, int width, lanes *x) {
    for (int i = 0; i < width; i++) {
        for (int r = 0; r < LANES; r++) x[i].lane[r] = r < n ? rows[r * width + i] : 0.0f;
    }
}

/* Turns the pairs (i, i + DIM / 2) of every head. */
static void rope(const model *m, int position, float *rows, int n_heads) {
    const float *cosine = m->rope_cos[position], *sine = m->rope_sin[position];
    for (int h = 0; h < n_heads; h++) {
        float *a = rows + h * DIM, *b = a + DIM / 2;
        for (int i = 0; i < DIM / 2; i++) {
            const float ai = a[i], bi = b[i];
            a[i] = ai * cosine[i] - bi * sine[i];
            b[i] = bi * cosine[i] + ai * sine[i];
        }
    }
}

/* What follows a layer's attention, whose output is in y: x is the next layer's. */
static void finish_layer(model *m) {
    run(m, job_out);
    rms_norm(m->x, m->layer->ffn_norm, m->y);
    run(m, job_gate);
    run(m, job_down);
}

/* Logits of the n sequences in x. */
static void finish(model *m, int n, float *logits) {
    rms_norm(m->x, m->norm, m->y);
    run(m, job_logits);
    rows_from_lanes(m->logits, n, VOCAB, logits);
}

void model_step(model *m, const uint8_t *tokens, int n, int position, attend_fn *attend, void *user, float *logits) {
    for (int i = 0; i < HIDDEN; i++) {
        for (int r = 0; r < LANES; r++) m->x[i].lane[r] = r < n ? m->embed[tokens[r] * HIDDEN + i] : 0.0f;
    }
    for (int l = 0; l < LAYERS; l++) {
        m->layer = &m->layers[l];
        rms_norm(m->x, m->layer->attn_norm, m->y);
        run(m, job_qkv);
        rows_from_lanes(m->q, n, HEADS * DIM, m->q_rows);
        rows_from_lanes(m->k, n, KV_HEADS * DIM, m->k_rows);
        rows_from_lanes(m->v, n, KV_HEADS * DIM, m->v_rows);
        rope(m, position, m->q_rows, n * HEADS);
        rope(m, position, m->k_rows, n * KV_HEADS);

        attend(user, l, m->q_rows, m->k_rows, m->v_rows, m->out_rows);

        lanes_from_rows(m->out_rows, n, HEADS * DIM, m->y);
        finish_layer(m);
    }
    finish(m, n, logits);
}

void model_prefill(model *m, const uint8_t *tokens, int n, attend_prompt_fn *attend, void *user, float *logits) {
    enum { Q = HEADS * DIM, KV = KV_HEADS * DIM };
    float *x = allocate((size_t)n * (HIDDEN + 2 * Q + 2 * KV) * sizeof(float)); /* residual stream, then the rows */
    float *q = x + n * HIDDEN, *out = q + n * Q, *k = out + n * Q, *v = k + n * KV;
    for (int t = 0; t < n; t++) memcpy(x + t * HIDDEN, m->embed + tokens[t] * HIDDEN, HIDDEN * sizeof(float));
    for (int l = 0; l < LAYERS; l++) {
        m->layer = &m->layers[l];
        /* As many tokens as there are lanes at a time. */
        for (int t = 0; t < n; t += LANES) {
            const int some = n - t < LANES ? n - t : LANES;
            lanes_from_rows(x + t * HIDDEN, some, HIDDEN, m->x);
            rms_norm(m->x, m->layer->attn_norm, m->y);
            run(m, job_qkv);
            rows_from_lanes(m->q, some, Q, q + t * Q);
            rows_from_lanes(m->k, some, KV, k + t * KV);
            rows_from_lanes(m->v, some, KV, v + t * KV);
            for (int i = t; i < t + some; i++) {
                rope(m, i, q + i * Q, HEADS);
                rope(m, i, k + i * KV, KV_HEADS);
            }
        }
        attend(user, l, n, q, k, v, out);
        for (int t = 0; t < n; t += LANES) {
            const int some = n - t < LANES ? n - t : LANES;
            lanes_from_rows(x + t * HIDDEN, some, HIDDEN, m->x);
            lanes_from_rows(out + t * Q, some, Q, m->y);
            finish_layer(m);
            rows_from_lanes(m->x, some, HIDDEN, x + t * HIDDEN);
        }
    }
    lanes_from_rows(x + (n - 1) * HIDDEN, 1, HIDDEN, m->x);
    finish(m, 1, logits);
    free(x);
}

double negative_log_likelihood(const float *logits, uint8_t token) {
    double peak = logits[0], sum = 0.0;
    for (int i = 1; i < VOCAB; i++) peak = fmax(peak, logits[i]);
    for (int i = 0; i < VOCAB; i++) sum += exp(logits[i] - peak);
    return peak + log(sum) - logits[token];
}

/* ---- numbers ---- */

static uint32_t bits_of(float x) {
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    return bits;
}

static float float_of(uint32_t bits) {
    float x;
    memcpy(&x, &bits, sizeof x);
    return x;
}

uint16_t half_from_float(float x) {
    const uint32_t bits = bits_of(x), magnitude = bits & 0x7fffffff;
    const uint16_t sign = (uint16_t)(bits >> 16 & 0x8000);
    if (magnitude > 0x7f800000) return sign | 0x7e00; /* NaN */
    if (magnitude >= 0x477ff000) return sign | 0x7c00; /* 65520 and above rounds to infinity */
    if (magnitude < 0x38800000) {
        /* Subnormal: adding 0.5 leaves multiples of 2^-24 in the mantissa, rounded by the addition. */
        return sign | (uint16_t)(bits_of(float_of(magnitude) + 0.5f) - bits_of(0.5f));
    }
    const uint32_t odd = magnitude >> 13 & 1;
    return sign | (uint16_t)((magnitude - 0x38000000 + 0xfff + odd) >> 13);
}

float float_from_half(uint16_t h) {
    const uint32_t sign = (uint32_t)(h & 0x8000) << 16, magnitude = h & 0x7fff;
    if (magnitude >= 0x7c00) return float_of(sign | 0x7f800000 | (magnitude & 0x3ff) << 13);
    if (magnitude < 0x400) return float_of(sign | bits_of((float)magnitude * 0x1p-24f));
    return float_of(sign | ((magnitude << 13) + 0x38000000));
}

/* ---- weights ---- */

char *read_file(const char *path, size_t *size) {
    FILE *f = fopen(path, "rb");
    if (!f) die("cannot open %s%s\n", path, "");
    long end = fseek(f, 0, SEEK_END) == 0 ? ftell(f) : -1;
    if (end < 0 || fseek(f, 0, SEEK_SET) != 0) die("cannot read %s%s\n", path, "");
    char *data = allocate((size_t)end + 1);
    if (fread(data, 1, (size_t)end, f) != (size_t)end) die("cannot read %s%s\n", path, "");
    fclose(f);
    *size = (size_t)end;
    return data;
}

/* A safetensors file: 8 bytes of length, a JSON header of that length, data. */
typedef struct {
    const char *path;
    char *bytes, *header;
    const char *data;
    size_t data_bytes;
} safetensors;

static safetensors safetensors_open(const char *path) {
    size_t size;
    safetensors file = {.path = path, .bytes = read_file(path, &size)};
    unsigned long long header = 0;
    for (int i = 7; i >= 0 && size >= 8; i--) header = header << 8 | (unsigned char)file.bytes[i];
    if (size < 8 || header > size - 8) die("%s: not a safetensors file%s\n", path, "");
    file.header = allocate(header + 1); /* a string of its own */
    memcpy(file.header, file.bytes + 8, header);
    file.data = file.bytes + 8 + header;
    file.data_bytes = size - 8 - header;
    return file;
}

static void safetensors_close(safetensors *file) {
    free(file->header);
    free(file->bytes);
}

/* Tensor `name`, n values of f16 in `shape` ("704,256"), to `out`. */
static void safetensors_read(const safetensors *file, const char *name, const char *shape, size_t n, float *out) {
    char key[80], form[120];
    snprintf(key, sizeof key, "\"%s\":{", name);
    snprintf(form, sizeof form, "\"dtype\":\"F16\",\"shape\":[%s],\"data_offsets\":[", shape);
    const char *entry = strstr(file->header, key);
    if (!entry) die("%s: no tensor %s\n", file->path, name);
    entry += strlen(key);
    if (strncmp(entry, form, strlen(form)) != 0) die("%s: tensor %s has another type or shape\n", file->path, name);
    char *comma;
    const unsigned long long begin = strtoull(entry + strlen(form), &comma, 10);
    const unsigned long long end = *comma == ',' ? strtoull(comma + 1, NULL, 10) : 0;
    if (end > file->data_bytes || begin > end || end - begin != 2 * n) {
        die("%s: tensor %s lies outside the file\n", file->path, name);
    }
    for (size_t i = 0; i < n; i++) {
        const unsigned char *p = (const unsigned char *)file->data + begin + 2 * i;
        out[i] = float_from_half((uint16_t)(p[0] | p[1] << 8));
    }
}

float *tensor_read(const char *path, const char *name, const char *shape, size_t n) {
    safetensors file = safetensors_open(path);
    float *out = allocate(n * sizeof(float));
    safetensors_read(&file, name, shape, n, out);
    safetensors_close(&file);
    return out;
}

/* The next tensor of a model: `rows` x `columns` (columns 0: one dimension), where `next` says; that moves on. */
static const float *load(const safetensors *file, float **next, const char *name, int rows, int columns) {
    char shape[40];
    const size_t n = (size_t)rows * (size_t)(columns ? columns : 1);
    if (columns) snprintf(shape, sizeof shape, "%d,%d", rows, columns);
    else snprintf(shape, sizeof shape, "%d", rows);
    float *out = *next;
    safetensors_read(file, name, shape, n, out);
    *next += n;
    return out;
}

static const float *load_in_layer(const safetensors *file, float **next, int layer, const char *name, int rows,
                                  int columns) {
    char full[64];
    snprintf(full, sizeof full, "layers.%d.%s.weight", layer, name);
    return load(file, next, full, rows, columns);
}

model *model_load(const char *path, int threads) {
    safetensors file = safetensors_open(path);
    /* sizeof(model) is a multiple of its alignment, that of lanes. */
    model *m = aligned_alloc(sizeof(lanes), sizeof(model));
    if (!m) die("out of memory%s%s\n", "", "");
    memset(m, 0, sizeof *m);
    m->weights = allocate(PARAMETERS * sizeof(float));
    float *next = m->weights;
    for (int l = 0; l < LAYERS; l++) {
        m->layers[l] = (layer_weights){
            .attn_norm = load_in_layer(&file, &next, l, "attn_norm", HIDDEN, 0),
            .wq = load_in_layer(&file, &next, l, "wq", HEADS * DIM, HIDDEN),
            .wk = load_in_layer(&file, &next, l, "wk", KV_HEADS * DIM, HIDDEN),
            .wv = load_in_layer(&file, &next, l, "wv", KV_HEADS * DIM, HIDDEN),
            .wo = load_in_layer(&file, &next, l, "wo", HIDDEN, HEADS * DIM),
            .ffn_norm = load_in_layer(&file, &next, l, "ffn_norm", HIDDEN, 0),
            .w_gate = load_in_layer(&file, &next, l, "w_gate", FFN, HIDDEN),
            .w_up = load_in_layer(&file, &next, l, "w_up", FFN, HIDDEN),
            .w_down = load_in_layer(&file, &next, l, "w_down", HIDDEN, FFN),
        };
    }
    m->embed = load(&file, &next, "embed.weight", VOCAB, HIDDEN);
    m->norm = load(&file, &next, "norm.weight", HIDDEN, 0);
    safetensors_close(&file);

    for (int p = 0; p < CONTEXT; p++) {
        for (int i = 0; i < DIM / 2; i++) {
            const double angle = p * pow(10000.0, -2.0 * i / DIM);
            m->rope_cos[p][i] = (float)cos(angle);
            m->rope_sin[p][i] = (float)sin(angle);
        }
    }
    pool_start(&m->pool, m, threads);
    return m;
}

void model_free(model *m) {
    pool_stop(&m->pool);
    free(m->weights);
    free(m);
}
