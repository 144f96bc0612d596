/* A KV cache of one layer, a prefill of 4096 tokens, a decode step.
 * cc quickstart.c $(pkg-config --cflags --libs alignedkv) && ./a.out
 * MIT OR Apache-2.0.
 */
#include <alignedkv.h>
#include <stdio.h>
#include <stdlib.h>

enum { HEADS = 32, KV_HEADS = 8, DIM = 128, PROMPT = 4096 };

#define CHECK(call) check(call, #call)
static void check(akv_status status, const char *call) {
    if (status == AKV_OK) return;
    char text[512];
    akv_last_error(text, sizeof text, NULL);
    fprintf(stderr, "%s\n  %s: %s\n", call, akv_status_string(status), text);
    exit(1);
}

/* Random f16 rows, magnitudes from 1/8 to 2. Attention over them is flat, the hard case: models read fewer bits. */
static akv_rows random_rows(size_t n) {
    uint16_t *x = malloc(n * sizeof *x);
    if (!x) exit(1);
    for (size_t i = 0; i < n; i++) x[i] = (uint16_t)((rand() >> 7 & 0x8000) | (0x3000 + (rand() >> 7 & 0xfff)));
    return (akv_rows){.data = x, .dtype = AKV_F16};
}

int main(void) {
    /* What is left out of a descriptor is 0: the default. */
    akv_context_desc machine = {.struct_size = sizeof machine, .abi_version = AKV_ABI_VERSION};
    akv_layer_desc layer = {.n_q_heads = HEADS, .n_kv_heads = KV_HEADS, .dim_k = DIM,
                            .dtype_k = AKV_F16, .dtype_v = AKV_F16};
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

    /* Two steps: the prompt, whose attention is not asked for (n_q = 0), then a token with its attention. */
    float out[HEADS * DIM], lse[HEADS], bound[HEADS], estimate[HEADS];
    akv_stats stats;
    for (int step = 0; step < 2; step++) {
        int32_t n_new = step == 0 ? PROMPT : 1, n_q = step;
        akv_rows q = random_rows(HEADS * DIM);
        akv_rows key = random_rows((size_t)n_new * KV_HEADS * DIM), value = random_rows((size_t)n_new * KV_HEADS * DIM);
        akv_batch_desc tokens = {.struct_size = sizeof tokens, .n_sequences = 1, .sequences = &sequence,
                                 .n_new = &n_new, .n_q = &n_q};
        akv_attention_desc attention = {.struct_size = sizeof attention, .q = q, .out = {.data = out, .dtype = AKV_F32},
                                        .lse = lse, .bound = bound, .estimate = estimate, .stats = &stats};
        CHECK(akv_batch_begin(batch, &tokens, NULL));
        CHECK(akv_quantize_kv(batch, 0, &key, &value, NULL)); /* a real model: for every layer */
        if (n_q > 0) CHECK(akv_aligned_attention(batch, 0, &attention));
        CHECK(akv_batch_commit(batch));
        free(q.data), free(key.data), free(value.data);
    }

    printf("head 0: lse %.4f, rms error about %.1e, no channel off by more than %.1e\n", lse[0], estimate[0], bound[0]);
    printf("bits read per element: K %.2f, V %.2f\n", 8.0 * (double)stats.bytes_k / (double)(stats.tokens * DIM),
           8.0 * (double)stats.bytes_v / (double)(stats.tokens * DIM));

    CHECK(akv_batch_destroy(batch));
    CHECK(akv_cache_destroy(cache)); /* with its sequences */
    CHECK(akv_context_destroy(context));
    return 0;
}
