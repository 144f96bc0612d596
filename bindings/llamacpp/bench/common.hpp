// What the programs here share: models on the CPU alone and on the AlignedKV device, contexts by KV scheme, arguments.
// MIT OR Apache-2.0.
#pragma once

#include "ggml-alignedkv.h"
#include "ggml-backend.h"
#include "ggml-cpu.h"
#include "llama.h"

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <string>
#include <vector>

[[noreturn]] inline void fail(const std::string & text) {
    fprintf(stderr, "error: %s\n", text.c_str());
    exit(1);
}

// The value of --name, or `otherwise`.
inline std::string argument(int argc, char ** argv, const std::string & name, const std::string & otherwise = "") {
    for (int i = 1; i + 1 < argc; i++)
        if (name == argv[i]) return argv[i + 1];
    return otherwise;
}

inline int argument(int argc, char ** argv, const std::string & name, int otherwise) {
    const std::string text = argument(argc, argv, name);
    return text.empty() ? otherwise : atoi(text.c_str());
}

// A KV cache's scheme: llama.cpp's own on the CPU (placement = "") or ours on the AlignedKV device.
struct scheme {
    std::string name;
    ggml_type   type      = GGML_TYPE_F16;
    bool        flash     = true;
    std::string placement = "";
    double      tolerance = 0;  // 0 = none
    std::string mode      = "";

    bool ours() const { return !placement.empty(); }

    // The device reads these when the rows of a context are laid out: call it before the context's first tokens.
    void set_environment() const {
        const auto set = [](const char * name, const std::string & value) {
            value.empty() ? unsetenv(name) : setenv(name, value.c_str(), 1);
        };
        set("ALIGNEDKV_PLACEMENT", placement);
        set("ALIGNEDKV_MODE", mode);
        set("ALIGNEDKV_TOLERANCE", tolerance > 0 ? std::to_string(tolerance) : "");
    }
};

// Bits per element that attention reads where it reads all that is stored.
inline double stored_bits(ggml_type type) {
    return 8.0 * ggml_type_size(type) / ggml_blck_size(type);
}

struct device {
    ggml_backend_dev_t dev = nullptr;
    ggml_alignedkv_get_counters_t   get   = nullptr;
    ggml_alignedkv_reset_counters_t reset = nullptr;

    // Loads libggml-alignedkv.so; without a path there is no device.
    explicit device(const std::string & path) {
        if (path.empty()) return;
        ggml_backend_reg_t reg = ggml_backend_load(path.c_str());
        if (!reg || ggml_backend_reg_dev_count(reg) == 0) fail(path + " was not loaded");
        dev   = ggml_backend_reg_dev_get(reg, 0);
        get   = (decltype(get)) ggml_backend_reg_get_proc_address(reg, "ggml_alignedkv_get_counters");
        reset = (decltype(reset)) ggml_backend_reg_get_proc_address(reg, "ggml_alignedkv_reset_counters");
        if (!get || !reset) fail(path + " has no counters");
    }

    ggml_alignedkv_counters counters() const {
        ggml_alignedkv_counters c = {};
        c.struct_size             = sizeof c;
        get(&c);
        return c;
    }
};

using model_ptr   = std::unique_ptr<llama_model, decltype(&llama_model_free)>;
using context_ptr = std::unique_ptr<llama_context, decltype(&llama_free)>;

// `dev` = NULL: the CPU alone, whatever other devices there are.
inline model_ptr load_model(const std::string & path, ggml_backend_dev_t dev) {
    ggml_backend_dev_t devices[] = {dev, nullptr};
    llama_model_params params    = llama_model_default_params();
    params.devices               = devices;
    params.n_gpu_layers          = dev ? 999 : 0;
    model_ptr model(llama_model_load_from_file(path.c_str(), params), llama_model_free);
    if (!model) fail("cannot load " + path);
    return model;
}

inline context_ptr make_context(llama_model * model, const scheme & s, llama_context_params params) {
    s.set_environment();
    params.type_k = params.type_v = s.type;
    params.flash_attn_type        = s.flash ? LLAMA_FLASH_ATTN_TYPE_ENABLED : LLAMA_FLASH_ATTN_TYPE_DISABLED;
    context_ptr context(llama_init_from_model(model, params), llama_free);
    if (!context) fail("no context for " + s.name);
    return context;
}

inline std::string cpu_name() {
    ggml_backend_dev_t cpu = ggml_backend_dev_by_type(GGML_BACKEND_DEVICE_TYPE_CPU);
    return cpu ? ggml_backend_dev_description(cpu) : "unknown";
}

// The instruction sets that ggml's CPU code uses here.
inline std::string ggml_isa() {
    std::string text;
    const auto  add = [&](int has, const char * name) {
        if (has) text += (text.empty() ? "" : " ") + std::string(name);
    };
    add(ggml_cpu_has_avx2(), "AVX2");
    add(ggml_cpu_has_fma(), "FMA");
    add(ggml_cpu_has_f16c(), "F16C");
    add(ggml_cpu_has_avx_vnni(), "AVX_VNNI");
    add(ggml_cpu_has_avx512(), "AVX512");
    add(ggml_cpu_has_avx512_vnni(), "AVX512_VNNI");
    add(ggml_cpu_has_avx512_bf16(), "AVX512_BF16");
    add(ggml_cpu_has_neon(), "NEON");
    add(ggml_cpu_has_dotprod(), "DOTPROD");
    return text;
}

// llama.cpp's own log, errors apart, hides ours.
inline void quiet() {
    const auto log = [](ggml_log_level level, const char * text, void *) {
        if (level == GGML_LOG_LEVEL_ERROR) fputs(text, stderr);
    };
    llama_log_set(log, nullptr);
}

inline FILE * create(const std::string & path) {
    FILE * f = fopen(path.c_str(), "w");
    if (!f) fail("cannot write " + path);
    return f;
}
