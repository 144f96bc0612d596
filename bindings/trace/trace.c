/* Decodes the trace of make.py and prints a hash of all outputs, log-sum-exps and bounds: the same in every language. */
#include <alignedkv.h>
#include <stdio.h>
#include <stdlib.h>

#define CHECK(call) do { if ((call) != AKV_OK) return fprintf(stderr, "%s failed\n", #call), 1; } while (0)

static uint64_t hash = 0xcbf29ce484222325; /* FNV-1a */
static void add(const void *data, size_t n) {
    for (size_t i = 0; i < n; i++) hash = (hash ^ ((const unsigned char *)data)[i]) * 0x100000001b3;
}

int main(int argc, char **argv) {
    int32_t size[5];
    FILE *file = argc > 1 ? fopen(argv[1], "rb") : NULL;
    if (!file || fread(size, sizeof size, 1, file) != 1) return fprintf(stderr, "usage: trace FILE\n"), 1;
    int32_t q_heads = size[0], kv_heads = size[1], dim = size[2], prompt = size[3], steps = size[4];
    size_t kv_row = (size_t)(kv_heads * dim), q_row = (size_t)(q_heads * dim), n_kv = kv_row * (size_t)(prompt + steps);
    uint16_t *k = malloc(2 * n_kv), *v = malloc(2 * n_kv), *q = malloc(2 * q_row * (size_t)steps);
    float *out = malloc(sizeof(float) * q_row), *lse = malloc(sizeof(float) * (size_t)q_heads), *bound = malloc(sizeof(float) * (size_t)q_heads);
    if (!k || !v || !q || !out || !lse || !bound) return 1;
    if (fread(k, 2, n_kv, file) != n_kv || fread(v, 2, n_kv, file) != n_kv || !fread(q, 2 * q_row * (size_t)steps, 1, file)) return 1;
    fclose(file);

    akv_context_desc machine = {.struct_size = sizeof machine, .abi_version = AKV_ABI_VERSION};
    akv_layer_desc layer = {.n_q_heads = q_heads, .n_kv_heads = kv_heads, .dim_k = dim, .dtype_k = AKV_F16, .dtype_v = AKV_F16};
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
    for (int32_t step = -1; step < steps; step++) { /* -1: the prompt, without attention */
        int32_t n_new = step < 0 ? prompt : 1, n_q = step >= 0;
        size_t at = step < 0 ? 0 : kv_row * (size_t)(prompt + step);
        akv_rows key = {.data = k + at, .dtype = AKV_F16}, value = {.data = v + at, .dtype = AKV_F16};
        akv_batch_desc tokens = {.struct_size = sizeof tokens, .n_sequences = 1, .sequences = &sequence, .n_new = &n_new, .n_q = &n_q};
        CHECK(akv_batch_begin(batch, &tokens, NULL));
        CHECK(akv_quantize_kv(batch, 0, &key, &value, NULL));
        if (n_q) {
            akv_attention_desc call = {.struct_size = sizeof call, .q = {.data = q + q_row * (size_t)step, .dtype = AKV_F16},
                                       .out = {.data = out}, .lse = lse, .bound = bound};
            CHECK(akv_aligned_attention(batch, 0, &call));
            add(out, sizeof(float) * q_row);
            add(lse, sizeof(float) * (size_t)q_heads);
            add(bound, sizeof(float) * (size_t)q_heads);
        }
        CHECK(akv_batch_commit(batch));
    }
    CHECK(akv_batch_destroy(batch));
    CHECK(akv_cache_destroy(cache));
    CHECK(akv_context_destroy(context));
    free(k), free(v), free(q), free(out), free(lse), free(bound);
    printf("%016llx\n", (unsigned long long)hash);
    return 0;
}
