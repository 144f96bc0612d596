// Preloaded (LD_PRELOAD) it loads ggml's backends before main: test-llama-archs looks devices up before it has loaded any.
// MIT OR Apache-2.0.
#include "ggml-backend.h"

__attribute__((constructor)) static void load() {
    ggml_backend_load_all();
}
