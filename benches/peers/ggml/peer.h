// One build of ggml's CPU code, behind functions that do not clash with another one's.
#pragma once
#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

// One decode step: a query row on each of several sequences.
typedef struct peer_case {
    int n_heads, n_kv_heads, head_dim, n_sequences;
    const int *lengths; // [n_sequences]
} peer_case;

typedef struct peer_pool peer_pool; // ggml's threads
typedef struct peer_graph peer_graph; // the step on one copy of the data

typedef struct peer_api {
    const char *name; // of the build
    int (*type)(const char *name); // ggml's number of "f16", "bf16", "q8_0", "q4_0"
    size_t (*row_bytes)(int type, int n); // of n values
    double (*bits)(int type); // per value
    void (*convert)(int type, const float *from, void *to, int n);
    peer_pool *(*pool_create)(int n_threads);
    // Threads of a pool that is paused sleep.
    void (*pool_pause)(peer_pool *);
    void (*pool_resume)(peer_pool *);
    void (*pool_destroy)(peer_pool *);
    // k[i], v[i]: rows of sequence i; those of a head lie `row` bytes apart, heads `head` bytes.
    peer_graph *(*graph_create)(const peer_case *, peer_pool *, int type, void *const *k, void *const *v, size_t row, const size_t *head);
    // q [n_sequences][n_heads][head_dim]; false if ggml fails.
    int (*run)(peer_graph *, const float *q);
    void (*result)(const peer_graph *, float *out); // [n_sequences][n_heads][head_dim]
    void (*graph_destroy)(peer_graph *);
} peer_api;

const peer_api *peer_get(void);

#ifdef __cplusplus
}
#endif
