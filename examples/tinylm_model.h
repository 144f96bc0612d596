/* The demo's language model: everything but attention. See data/README.md for the weights.
 * MIT OR Apache-2.0.
 */
#ifndef TINYLM_MODEL_H
#define TINYLM_MODEL_H

#include <stddef.h>
#include <stdint.h>

enum {
    LAYERS = 4,
    HIDDEN = 256,
    HEADS = 4,
    KV_HEADS = 2,
    DIM = 64,
    FFN = 704,
    VOCAB = 256,    /* bytes */
    CONTEXT = 2048, /* longest sequence */
    LANES = 16      /* most sequences in a step */
};

typedef struct model model;

/* Attention of one layer: takes the new rows q [n][HEADS][DIM] and k, v [n][KV_HEADS][DIM], after RoPE, of the step's n
 * sequences, and writes out [n][HEADS][DIM]. */
typedef void attend_fn(void *user, int layer, const float *q, const float *k, const float *v, float *out);

/* Loads the weights of a safetensors file; prints what is wrong and exits if it cannot. `threads` share the linear
 * layers, the calling one included. */
model *model_load(const char *path, int threads);
void model_free(model *m);

/* Runs one token of each of n <= LANES sequences that all stand at `position`; logits is [n][VOCAB]. */
void model_step(model *m, const uint8_t *tokens, int n, int position, attend_fn *attend, void *user, float *logits);

/* Attention of one layer over a prompt: the rows of n tokens of one sequence, q [n][HEADS][DIM] and so on. */
typedef void attend_prompt_fn(void *user, int layer, int n, const float *q, const float *k, const float *v, float *out);

/* Runs the first n <= CONTEXT tokens of a sequence, layer by layer; logits is [VOCAB], of the last token. */
void model_prefill(model *m, const uint8_t *tokens, int n, attend_prompt_fn *attend, void *user, float *logits);

/* -log softmax(logits)[token], in double precision. */
double negative_log_likelihood(const float *logits, uint8_t token);

/* IEEE binary16, rounded to nearest, ties to even. */
uint16_t half_from_float(float x);
float float_from_half(uint16_t h);

/* A whole file, with a NUL behind it; prints what is wrong and exits if it cannot be read. */
char *read_file(const char *path, size_t *size);

/* Tensor `name`, n values of f16 in `shape` ("2048,2,64"), of a safetensors file; prints what is wrong and exits. */
float *tensor_read(const char *path, const char *name, const char *shape, size_t n);

/* malloc and calloc (zeroed) that exit when memory is out. */
void *allocate(size_t bytes);

#endif
