// Settings from the environment, counters and log: what all parts of the backend share.
#pragma once

#include "alignedkv.h"
#include "ggml-impl.h"

#include <atomic>
#include <cstdint>
#include <string>

namespace akv_ggml {

enum class placement { off, attached, slots };

// Read when the rows of a layer are laid out, so that a process may change them between contexts.
struct settings {
    placement where     = placement::slots;
    float     tolerance = 0; // 0 = the library's default
    int32_t   mode      = AKV_EXPECTED;

    static settings from_environment();
};

// ALIGNEDKV_LOG: 0 = warnings, 1 = also what runs, 2 = also every layer and every kind of delegated op
int log_level();

#define AKV_LOG_INFO_(...)  do { if (akv_ggml::log_level() >= 1) { GGML_LOG_INFO("AlignedKV: " __VA_ARGS__); } } while (0)
#define AKV_LOG_TRACE_(...) do { if (akv_ggml::log_level() >= 2) { GGML_LOG_INFO("AlignedKV: " __VA_ARGS__); } } while (0)
#define AKV_LOG_WARN_(...)  GGML_LOG_WARN("AlignedKV: " __VA_ARGS__)
#define AKV_LOG_ERROR_(...) GGML_LOG_ERROR("AlignedKV: " __VA_ARGS__)

// The text of this thread's last failed call of libalignedkv.
std::string last_error();

struct counters {
    std::atomic<uint64_t> bytes_k{0}, bytes_v{0}, elements_k{0}, elements_v{0};
    std::atomic<uint64_t> attention_progressive{0}, attention_dense{0}, attention_delegated{0};
    std::atomic<uint64_t> ops_delegated{0}, rows_written{0}, layers_active{0}, layers_refused{0};
    std::atomic<uint64_t> us_attention{0}, us_write{0};
    std::atomic<uint64_t> bytes_progressive{0}, elements_progressive{0};
};
extern counters count;

// One libalignedkv context for the process, made at the first call; NULL if that failed (which has been logged).
akv_context * context();

} // namespace akv_ggml
