/* What the C tests share: checks, random numbers, number formats, rows in memory, float64 attention. */
#ifndef CHECK_H
#define CHECK_H

#include "alignedkv.h"
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* With AKV_TEST_MANAGED the programs' heap is memory that a GPU and the host share, so that programs written for the CPU
 * run on a GPU: with CUDA_LAUNCH_BLOCKING=1 every call is over when it returns. */
#ifdef AKV_TEST_MANAGED
#include <dlfcn.h>
#include <stdint.h>
static inline void *driver(const char *name) {
    static void *library;
    if (!library) library = dlopen("libcuda.so.1", RTLD_NOW);
    void *symbol = library ? dlsym(library, name) : NULL;
    if (!symbol) fprintf(stderr, "the driver has no %s\n", name), exit(2);
    return symbol;
}
static inline void *managed_malloc(size_t bytes) {
    static int (*alloc)(unsigned long long *, size_t, unsigned);
    unsigned long long p = 0;
    if (!alloc) {
        int (*init)(unsigned), (*retain)(void **, int), (*push)(void *);
        void *context = NULL, *symbol;
        symbol = driver("cuInit"), memcpy(&init, &symbol, sizeof init);
        symbol = driver("cuDevicePrimaryCtxRetain"), memcpy(&retain, &symbol, sizeof retain);
        symbol = driver("cuCtxPushCurrent_v2"), memcpy(&push, &symbol, sizeof push);
        if (init(0) || retain(&context, 0) || push(context)) fprintf(stderr, "no device\n"), exit(2);
        symbol = driver("cuMemAllocManaged"), memcpy(&alloc, &symbol, sizeof alloc);
    }
    return alloc(&p, bytes ? bytes : 1, 1) ? NULL : (void *)(uintptr_t)p;
}
static inline void managed_free(void *p) {
    static int (*release)(unsigned long long);
    void *symbol;
    if (!release) symbol = driver("cuMemFree_v2"), memcpy(&release, &symbol, sizeof release);
    if (p) release((unsigned long long)(uintptr_t)p);
}
static inline void *managed_calloc(size_t n, size_t size) {
    void *p = managed_malloc(n * size);
    return p ? memset(p, 0, n * size) : NULL;
}
#define malloc managed_malloc
#define calloc managed_calloc
#define free managed_free
#endif

/* ---- checks: each counts; a failure prints where and goes on; REQUIRE and OK stop the program */

static long check_count, check_failures;

#define COUNT(n) __atomic_fetch_add(&n, 1, __ATOMIC_RELAXED) /* threads check, too */

#define CHECK(condition, ...)                                       \
    do {                                                            \
        COUNT(check_count);                                         \
        if (!(condition) && COUNT(check_failures) < 20) {           \
            printf("%s:%d: %s: ", __FILE__, __LINE__, #condition);  \
            printf(__VA_ARGS__);                                    \
            printf("\n");                                           \
        }                                                           \
    } while (0)

#define REQUIRE(condition, ...)                 \
    do {                                        \
        long before = check_failures;           \
        CHECK(condition, __VA_ARGS__);          \
        if (check_failures != before) exit(1);  \
    } while (0)

static inline const char *last_error(void) {
    static char text[512];
    akv_last_error(text, sizeof text, NULL);
    return text;
}

#define OK(call)                                                                        \
    do {                                                                                \
        akv_status status_ = (call);                                                    \
        REQUIRE(status_ == AKV_OK, "%s: %s", akv_status_string(status_), last_error()); \
    } while (0)

static inline int finish(const char *name) {
    printf("%s: %ld checks, %ld failed\n", name, check_count, check_failures);
    return check_failures != 0;
}

/* AKV_TEST_SMALL shrinks what is slow under sanitizers and valgrind. */
static inline int small_run(void) { return getenv("AKV_TEST_SMALL") != NULL; }

/* ---- random numbers */

static uint64_t random_state = 1;

static inline uint64_t random_bits(void) { /* splitmix64 */
    uint64_t z = random_state += 0x9e3779b97f4a7c15u;
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9u;
    z = (z ^ z >> 27) * 0x94d049bb133111ebu;
    return z ^ z >> 31;
}

static inline double uniform(void) { return ((double)(random_bits() >> 11) + 0.5) / 9007199254740992.0; }

static inline double normal(void) { return sqrt(-2 * log(uniform())) * cos(6.283185307179586 * uniform()); }

static inline int between(int low, int high) { return low + (int)(random_bits() % (uint64_t)(high - low + 1)); }

/* ---- number formats */

static inline uint16_t f16_of(float x) {
    uint32_t b, sign;
    memcpy(&b, &x, 4);
    sign = b >> 16 & 0x8000;
    b &= 0x7fffffff;
    if (b >= 0x47800000) return (uint16_t)(sign | (b > 0x7f800000 ? 0x7e00 : 0x7c00));
    if (b < 0x38800000) { /* subnormal: adding 0.5 leaves exactly its digits */
        float f;
        memcpy(&f, &b, 4);
        f += 0.5f;
        memcpy(&b, &f, 4);
        return (uint16_t)(sign | (b - 0x3f000000));
    }
    b += 0xc8000fff + (b >> 13 & 1);
    return (uint16_t)(sign | b >> 13);
}

static inline float f16_value(uint16_t h) {
    int e = h >> 10 & 31, m = h & 1023;
    float x = e == 0 ? ldexpf((float)m, -24) : e == 31 ? (m ? NAN : INFINITY) : ldexpf((float)(1024 + m), e - 25);
    return h & 0x8000 ? -x : x;
}

static inline uint16_t bf16_of(float x) {
    uint32_t b;
    memcpy(&b, &x, 4);
    return (uint16_t)((b + 0x7fff + (b >> 16 & 1)) >> 16);
}

static inline float bf16_value(uint16_t h) {
    uint32_t b = (uint32_t)h << 16;
    float x;
    memcpy(&x, &b, 4);
    return x;
}

static inline size_t dtype_size(int dtype) { return dtype == AKV_F32 ? 4 : 2; }

static inline float load(const void *p, int dtype) {
    uint16_t h;
    float x;
    if (dtype == AKV_F32) return memcpy(&x, p, 4), x;
    memcpy(&h, p, 2);
    return dtype == AKV_F16 ? f16_value(h) : bf16_value(h);
}

static inline void store(void *p, int dtype, float x) {
    uint16_t h = dtype == AKV_F16 ? f16_of(x) : bf16_of(x);
    if (dtype == AKV_F32) memcpy(p, &x, 4);
    else memcpy(p, &h, 2);
}

/* x as it is once stored in dtype. */
static inline float rounded(float x, int dtype) {
    unsigned char bytes[4];
    store(bytes, dtype, x);
    return load(bytes, dtype);
}

static inline void *allocate(size_t bytes) {
    void *p = malloc(bytes ? bytes : 1);
    REQUIRE(p != NULL, "no memory for the test");
    return p;
}

/* ---- rows as an engine may hold them: [n][heads][dim] with gaps, rows or heads outermost */

typedef struct {
    akv_rows rows;
    unsigned char *memory;
    size_t bytes;
    int n, heads, dim;
} buffer;

enum { GAP_BYTE = 0xff }; /* all bits set is a NaN in every dtype: reading a gap is noticed */

static inline unsigned char *buffer_at(const buffer *b, int row, int head) {
    return b->memory + row * b->rows.stride_row + head * b->rows.stride_head;
}

/* `gap` elements after every head's part and every row. */
static inline buffer buffer_new(int n, int heads, int dim, int dtype, int gap, int heads_outermost) {
    buffer b = {0};
    int64_t part = (int64_t)((size_t)(dim + gap) * dtype_size(dtype)), pad = (int64_t)((size_t)gap * dtype_size(dtype));
    b.n = n, b.heads = heads, b.dim = dim;
    b.rows.dtype = dtype;
    b.rows.stride_head = heads_outermost ? n * part + pad : part;
    b.rows.stride_row = heads_outermost ? part : heads * part + pad;
    b.bytes = (size_t)(heads_outermost ? heads * b.rows.stride_head : n * b.rows.stride_row);
    b.rows.data = b.memory = allocate(b.bytes);
    memset(b.memory, GAP_BYTE, b.bytes);
    return b;
}

static inline void buffer_fill(buffer *b, const float *x) {
    for (int r = 0; r < b->n; r++)
        for (int h = 0; h < b->heads; h++)
            for (int c = 0; c < b->dim; c++)
                store(buffer_at(b, r, h) + (size_t)c * dtype_size(b->rows.dtype), b->rows.dtype, *x++);
}

static inline float buffer_get(const buffer *b, int row, int head, int channel) {
    return load(buffer_at(b, row, head) + (size_t)channel * dtype_size(b->rows.dtype), b->rows.dtype);
}

/* Overwrites the rows with GAP_BYTE; true if everything else had been GAP_BYTE. */
static inline int buffer_gaps_untouched(buffer *b) {
    for (int r = 0; r < b->n; r++)
        for (int h = 0; h < b->heads; h++) memset(buffer_at(b, r, h), GAP_BYTE, (size_t)b->dim * dtype_size(b->rows.dtype));
    for (size_t i = 0; i < b->bytes; i++)
        if (b->memory[i] != GAP_BYTE) return 0;
    return 1;
}

static inline void buffer_free(buffer *b) { free(b->memory); }

/* True if AKV_BACKEND says that contexts are on CUDA; host memory stands for the device's then (kernels/host). */
static inline int on_cuda(void) {
    const char *backend = getenv("AKV_BACKEND");
    return backend && strcmp(backend, "cuda") == 0;
}

/* ---- attention in float64: one query head over tokens from..to of one KV head of k [n][heads][dim_k], v [n][heads][dim_v] */

typedef struct {
    double lse, amplitude; /* amplitude = sum of p * max|v| */
    double out[256];
} truth;

static inline truth attend(const float *q, double scale, const float *k, const float *v, int heads, int head, int dim_k,
                           int dim_v, int from, int to) {
    truth t = {-INFINITY, 0, {0}};
    int n = to > from ? to - from : 0;
    double *p = allocate((size_t)n * sizeof *p), max = -INFINITY, sum = 0;
    for (int i = 0; i < n; i++) {
        const float *row = k + ((size_t)(from + i) * (size_t)heads + (size_t)head) * (size_t)dim_k;
        double s = 0;
        for (int c = 0; c < dim_k; c++) s += (double)q[c] * row[c];
        p[i] = s * scale;
        if (p[i] > max) max = p[i];
    }
    for (int i = 0; i < n; i++) sum += p[i] = exp(p[i] - max);
    for (int i = 0; i < n; i++) {
        const float *row = v + ((size_t)(from + i) * (size_t)heads + (size_t)head) * (size_t)dim_v;
        double peak = 0, w = p[i] / sum;
        for (int c = 0; c < dim_v; c++) {
            t.out[c] += w * row[c];
            if (fabs(row[c]) > peak) peak = fabs(row[c]);
        }
        t.amplitude += w * peak;
    }
    if (n) t.lse = max + log(sum);
    free(p);
    return t;
}

#endif
