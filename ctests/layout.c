/* The ABI as numbers: size and offset of everything, asserted by the C compiler; src/capi/types.rs asserts the same from
 * the Rust side. These may only ever grow at a struct's end (64-bit pointers).
 */
#include "check.h"

#define SIZE(type, bytes) _Static_assert(sizeof(type) == (bytes), #type " has another size")
#define AT(type, field, bytes) _Static_assert(offsetof(type, field) == (bytes), #type "." #field " is elsewhere")

SIZE(akv_context_desc, 72);
AT(akv_context_desc, struct_size, 0);
AT(akv_context_desc, abi_version, 4);
AT(akv_context_desc, backend, 8);
AT(akv_context_desc, device, 12);
AT(akv_context_desc, isa, 16);
AT(akv_context_desc, n_threads, 20);
AT(akv_context_desc, cuda_context, 24);
AT(akv_context_desc, alloc, 32);
AT(akv_context_desc, dealloc, 40);
AT(akv_context_desc, alloc_user, 48);
AT(akv_context_desc, log, 56);
AT(akv_context_desc, log_user, 64);

SIZE(akv_layer_desc, 48);
AT(akv_layer_desc, n_q_heads, 0);
AT(akv_layer_desc, n_kv_heads, 4);
AT(akv_layer_desc, dim_k, 8);
AT(akv_layer_desc, dim_v, 12);
AT(akv_layer_desc, dtype_k, 16);
AT(akv_layer_desc, dtype_v, 20);
AT(akv_layer_desc, planes_k, 24);
AT(akv_layer_desc, planes_v, 28);
AT(akv_layer_desc, window, 32);
AT(akv_layer_desc, group, 36);
AT(akv_layer_desc, share_with, 40);
AT(akv_layer_desc, v_is_prefix_of_k, 44);

SIZE(akv_cache_desc, 64);
AT(akv_cache_desc, struct_size, 0);
AT(akv_cache_desc, flags, 4);
AT(akv_cache_desc, format, 8);
AT(akv_cache_desc, placement, 12);
AT(akv_cache_desc, nan_policy, 16);
AT(akv_cache_desc, n_layers, 20);
AT(akv_cache_desc, layers, 24);
AT(akv_cache_desc, max_sequences, 32);
AT(akv_cache_desc, exact_head, 36);
AT(akv_cache_desc, exact_tail, 40);
AT(akv_cache_desc, n_streams, 44);
AT(akv_cache_desc, n_slots, 48);
AT(akv_cache_desc, max_bytes, 56);

SIZE(akv_export_desc, 32);
AT(akv_export_desc, struct_size, 0);
AT(akv_export_desc, flags, 4);
AT(akv_export_desc, first_layer, 8);
AT(akv_export_desc, n_layers, 12);
AT(akv_export_desc, planes_k, 16);
AT(akv_export_desc, planes_v, 20);
AT(akv_export_desc, known_k, 24);
AT(akv_export_desc, known_v, 28);

SIZE(akv_rows, 32);
AT(akv_rows, data, 0);
AT(akv_rows, stride_row, 8);
AT(akv_rows, stride_head, 16);
AT(akv_rows, dtype, 24);
AT(akv_rows, reserved, 28);

SIZE(akv_stats, 144);
AT(akv_stats, bytes_k, 0);
AT(akv_stats, bytes_v, 8);
AT(akv_stats, bytes_scales, 16);
AT(akv_stats, bytes_exact, 24);
AT(akv_stats, planes_k, 32);
AT(akv_stats, planes_v, 72);
AT(akv_stats, tokens, 112);
AT(akv_stats, dense_rows, 120);
AT(akv_stats, backend, 128);
AT(akv_stats, isa, 132);
AT(akv_stats, path, 136);
AT(akv_stats, reserved, 140);

SIZE(akv_threads, 24);
AT(akv_threads, ith, 0);
AT(akv_threads, nth, 4);
AT(akv_threads, barrier, 8);
AT(akv_threads, user, 16);

SIZE(akv_attention_desc, 232);
AT(akv_attention_desc, struct_size, 0);
AT(akv_attention_desc, flags, 4);
AT(akv_attention_desc, q, 8);
AT(akv_attention_desc, out, 40);
AT(akv_attention_desc, scale, 72);
AT(akv_attention_desc, logit_softcap, 76);
AT(akv_attention_desc, tolerance, 80);
AT(akv_attention_desc, mode, 84);
AT(akv_attention_desc, visibility, 88);
AT(akv_attention_desc, window, 92);
AT(akv_attention_desc, sink_tokens, 96);
AT(akv_attention_desc, reserved, 100);
AT(akv_attention_desc, alibi_slopes, 104);
AT(akv_attention_desc, sink_logits, 112);
AT(akv_attention_desc, mask, 120);
AT(akv_attention_desc, kv_from, 128);
AT(akv_attention_desc, kv_to, 136);
AT(akv_attention_desc, tree, 144);
AT(akv_attention_desc, lse, 152);
AT(akv_attention_desc, bound, 160);
AT(akv_attention_desc, lse_bound, 168);
AT(akv_attention_desc, estimate, 176);
AT(akv_attention_desc, amplitude, 184);
AT(akv_attention_desc, stats, 192);
AT(akv_attention_desc, threads, 200);
AT(akv_attention_desc, workspace, 208);
AT(akv_attention_desc, workspace_bytes, 216);
AT(akv_attention_desc, stream, 224);

SIZE(akv_usage, 64);
AT(akv_usage, struct_size, 0);
AT(akv_usage, n_sequences, 4);
AT(akv_usage, bytes_reserved, 8);
AT(akv_usage, bytes_used, 16);
AT(akv_usage, bytes_kept, 24);
AT(akv_usage, pages_used, 32);
AT(akv_usage, pages_free, 40);
AT(akv_usage, pages_shared, 48);
AT(akv_usage, tokens, 56);

SIZE(akv_rope, 24);
AT(akv_rope, pairing, 0);
AT(akv_rope, n_dims, 4);
AT(akv_rope, first_dim, 8);
AT(akv_rope, reserved, 12);
AT(akv_rope, inv_freq, 16);

SIZE(akv_batch_desc, 64);
AT(akv_batch_desc, struct_size, 0);
AT(akv_batch_desc, n_sequences, 4);
AT(akv_batch_desc, sequences, 8);
AT(akv_batch_desc, n_new, 16);
AT(akv_batch_desc, n_q, 24);
AT(akv_batch_desc, positions, 32);
AT(akv_batch_desc, max_sequences, 40);
AT(akv_batch_desc, max_q, 44);
AT(akv_batch_desc, max_kv, 48);
AT(akv_batch_desc, max_threads, 56);
AT(akv_batch_desc, reserved, 60);

SIZE(akv_state, 48);
AT(akv_state, out, 0);
AT(akv_state, lse, 8);
AT(akv_state, bound, 16);
AT(akv_state, lse_bound, 24);
AT(akv_state, estimate, 32);
AT(akv_state, amplitude, 40);

_Static_assert(sizeof(akv_status) == 4 && sizeof(akv_sequence) == 8, "scalars");
_Static_assert(AKV_ABI_VERSION == 1, "ABI version");
_Static_assert(AKV_OK == 0 && AKV_E_ARGUMENT == -1 && AKV_E_INTERNAL == -12, "status codes");

int main(void) {
    CHECK(akv_abi_version() == AKV_ABI_VERSION, "library speaks %u", akv_abi_version());
    CHECK(strncmp(akv_version_string(), "alignedkv ", 10) == 0, "%s", akv_version_string());
    for (int status = AKV_OK; status >= AKV_E_INTERNAL; status--)
        CHECK(strncmp(akv_status_string(status), "AKV_", 4) == 0, "%d is %s", status, akv_status_string(status));
    CHECK(strcmp(akv_status_string(AKV_E_HANDLE), "AKV_E_HANDLE") == 0, "%s", akv_status_string(AKV_E_HANDLE));
    CHECK(strcmp(akv_status_string(1), "unknown status") == 0, "%s", akv_status_string(1));
    CHECK(strcmp(akv_status_string(-13), "unknown status") == 0, "%s", akv_status_string(-13));
    return finish("layout");
}
