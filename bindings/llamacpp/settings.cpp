#include "settings.hpp"

#include <cstdlib>
#include <cstring>
#include <mutex>

namespace akv_ggml {

counters count;

int log_level() {
    const char * text = getenv("ALIGNEDKV_LOG");
    return text && *text ? atoi(text) : 1;
}

settings settings::from_environment() {
    settings s;
    const auto value = [](const char * name) -> std::string {
        const char * text = getenv(name);
        return text ? text : "";
    };
    const std::string where = value("ALIGNEDKV_PLACEMENT");
    if (where == "attached") {
        s.where = placement::attached;
    } else if (where == "off") {
        s.where = placement::off;
    } else if (!where.empty() && where != "slots") {
        AKV_LOG_WARN_("ALIGNEDKV_PLACEMENT is '%s', expected slots, attached or off; taking slots\n", where.c_str());
    }
    const std::string mode = value("ALIGNEDKV_MODE");
    if (mode == "guaranteed") {
        s.mode = AKV_GUARANTEED;
    } else if (mode == "exact") {
        s.mode = AKV_EXACT;
    } else if (!mode.empty() && mode != "expected") {
        AKV_LOG_WARN_("ALIGNEDKV_MODE is '%s', expected expected, guaranteed or exact; taking expected\n", mode.c_str());
    }
    const std::string tolerance = value("ALIGNEDKV_TOLERANCE");
    if (!tolerance.empty()) {
        char * end = nullptr;
        const float t = strtof(tolerance.c_str(), &end);
        if (*end == '\0' && t > 0 && t < 1e3f) {
            s.tolerance = t;
        } else {
            AKV_LOG_WARN_("ALIGNEDKV_TOLERANCE is '%s', expected a number above 0; taking the default\n", tolerance.c_str());
        }
    }
    return s;
}

std::string last_error() {
    char text[512] = "";
    akv_last_error(text, sizeof(text), nullptr);
    return text;
}

akv_context * context() {
    static std::mutex mutex;
    static akv_context * made = nullptr;
    static bool tried = false;
    const std::lock_guard<std::mutex> lock(mutex);
    if (!tried) {
        tried = true;
        akv_context_desc desc = {};
        desc.struct_size = sizeof(desc);
        desc.abi_version = AKV_ABI_VERSION;
        // No threads of its own: attention runs on those of ggml.
        if (akv_context_create(&desc, &made) != AKV_OK) {
            AKV_LOG_WARN_("no context, attention stays ggml's: %s\n", last_error().c_str());
            made = nullptr;
        }
    }
    return made;
}

} // namespace akv_ggml
