/* ggml-alignedkv.h: what the AlignedKV backend for ggml counts. The backend needs no header to be used: these functions
 * are for tools, which reach them by name:
 *
 *   ggml_backend_reg_t reg = ggml_backend_reg_by_name("AlignedKV");
 *   ggml_alignedkv_get_counters_t get = (ggml_alignedkv_get_counters_t)
 *       ggml_backend_reg_get_proc_address(reg, "ggml_alignedkv_get_counters");
 *
 * MIT OR Apache-2.0. */
#ifndef GGML_ALIGNEDKV_H
#define GGML_ALIGNEDKV_H

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

/* Sums over all contexts of the process since the last reset. The list only ever grows at its end; `struct_size` is set
 * by the caller, and what lies beyond it is not written. */
struct ggml_alignedkv_counters {
    uint64_t struct_size;

    /* What attention read of K and V. 8 * bytes_k / elements_k is the bits per element (16 with f16). */
    uint64_t bytes_k;
    uint64_t bytes_v;
    uint64_t elements_k;
    uint64_t elements_v;

    /* FLASH_ATTN_EXT nodes: by digits, densely (prefill, exact mode), and by ggml's own kernel. */
    uint64_t attention_progressive;
    uint64_t attention_dense;
    uint64_t attention_delegated;

    uint64_t ops_delegated;  /* nodes that ran on ggml's CPU backend, attention_delegated among them */
    uint64_t rows_written;   /* rows of K and rows of V that went into digit planes or their index */
    uint64_t layers_active;  /* layers whose attention reads digit planes, now */
    uint64_t layers_refused; /* layers that fell back to plain f16 rows */

    uint64_t us_attention;   /* microseconds in the attention of these layers */
    uint64_t us_write;       /* and in writing their rows */

    uint64_t bytes_progressive;    /* of bytes_k + bytes_v and of the elements: calls by digits (decode), without prefill */
    uint64_t elements_progressive;
};

typedef void (*ggml_alignedkv_get_counters_t)(struct ggml_alignedkv_counters *out);
typedef void (*ggml_alignedkv_reset_counters_t)(void); /* layers_active and layers_refused stay */

#ifdef __cplusplus
}
#endif

#endif
