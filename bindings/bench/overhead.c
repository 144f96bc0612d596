/* What the smallest calls cost in C: nanoseconds, best of many short runs, one line each. bindings/bench/report.py holds the
 * same calls from other languages against them.
 */
#include <alignedkv.h>
#include <stdio.h>
#include <time.h>

#define CHECK(call) do { if ((call) != AKV_OK) return fprintf(stderr, "%s failed\n", #call), 1; } while (0)
#define MEASURE(name, n, call)                                                     \
    do {                                                                           \
        double best = 1e300;                                                       \
        for (int run = 0; run < 400; run++) {                                       \
            double start = now();                                                  \
            for (int i = 0; i < (n); i++) CHECK(call);                             \
            double ns = (now() - start) / (n);                                     \
            if (ns < best) best = ns;                                              \
        }                                                                          \
        printf("%s %.1f\n", name, best);                                           \
    } while (0)

static double now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return 1e9 * (double)t.tv_sec + (double)t.tv_nsec;
}

int main(void) {
    akv_context_desc machine = {.struct_size = sizeof machine, .abi_version = AKV_ABI_VERSION};
    akv_layer_desc layer = {.n_q_heads = 1, .n_kv_heads = 1, .dim_k = 16};
    akv_cache_desc layers = {.struct_size = sizeof layers, .n_layers = 1, .layers = &layer};
    akv_batch_desc bounds = {.struct_size = sizeof bounds};
    akv_context *context;
    akv_cache *cache;
    akv_sequence sequence;
    akv_batch *batch;
    CHECK(akv_context_create(&machine, &context));
    CHECK(akv_cache_create(context, &layers, &cache));
    CHECK(akv_sequence_create(cache, &sequence));
    CHECK(akv_batch_create(cache, &bounds, &batch));

    int64_t length;
    MEASURE("length", 2000, akv_sequence_length(cache, sequence, -1, &length));

    float x[16] = {0}, out[16], lse, bound, estimate;
    akv_stats stats;
    akv_rows rows = {.data = x};
    akv_attention_desc attention = {.struct_size = sizeof attention, .q = rows, .out = {.data = out}, .lse = &lse, .bound = &bound,
                                    .estimate = &estimate, .stats = &stats};
    int32_t one = 1, none = 0;
    akv_batch_desc step = {.struct_size = sizeof step, .n_sequences = 1, .sequences = &sequence, .n_new = &one};
    CHECK(akv_batch_begin(batch, &step, NULL));
    CHECK(akv_quantize_kv(batch, 0, &rows, &rows, NULL));
    CHECK(akv_batch_commit(batch));
    step.n_new = &none, step.n_q = &none; /* No query row: what is left is the call itself. */
    CHECK(akv_batch_begin(batch, &step, NULL));
    MEASURE("attention", 300, akv_aligned_attention(batch, 0, &attention));
    CHECK(akv_batch_abort(batch));
    step.n_q = &one;
    CHECK(akv_batch_begin(batch, &step, NULL));
    MEASURE("attention_row", 100, akv_aligned_attention(batch, 0, &attention));
    CHECK(akv_batch_destroy(batch));
    CHECK(akv_cache_destroy(cache));
    CHECK(akv_context_destroy(context));
    return 0;
}
