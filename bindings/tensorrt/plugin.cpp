// AlignedKVAttention: attention of one layer whose KV cache is libalignedkv's, as a TensorRT plugin (IPluginV3).
// README.md beside this file says how it is used. MIT OR Apache-2.0.
#include "alignedkv_tensorrt.hpp"

#include <dlfcn.h>

#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#pragma weak getLogger // lean runtimes may lack it

namespace alignedkv {
namespace {

using namespace nvinfer1;

constexpr char const *NAME = "AlignedKVAttention", *VERSION = "1", *KEY = "alignedkv";

// Tensors. q [rows][q heads][dim_k]; key [rows][kv heads][dim_k] and value [..][dim_v], after RoPE; the step's
// sequences [n] and how many rows are new in each [n]; the token, whose value means nothing. Outputs: out [rows]
// [q heads][dim_v] and the token.
enum Input { Q, KEY_ROWS, VALUE_ROWS, SEQUENCES, LENGTHS, TOKEN, INPUTS };
enum Output { OUT, TOKEN_OUT, OUTPUTS };

// ---- logging ----

std::mutex finder_mutex;
ILoggerFinder *finder;

__attribute__((format(printf, 2, 3))) void log(ILogger::Severity severity, char const *format, ...) {
    char text[1024];
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(text, sizeof text, format, arguments);
    va_end(arguments);
    ILogger *logger = nullptr;
    {
        std::lock_guard<std::mutex> lock(finder_mutex);
        if (finder) logger = finder->findLogger();
    }
    if (!logger && &getLogger != nullptr) logger = getLogger();
    if (logger) logger->log(severity, text);
    else fprintf(stderr, "%s\n", text);
}

#define FAIL(value, ...)                             \
    do {                                             \
        log(ILogger::Severity::kERROR, __VA_ARGS__); \
        return value;                                \
    } while (0)

// What TensorRT calls must not throw.
template <class Value, class Work>
Value guarded(Value failure, Work work) noexcept {
    try {
        return work();
    } catch (std::exception const &e) { FAIL(failure, "%s: %s", NAME, e.what()); }
}

std::string last_error() {
    char text[512];
    akv_last_error(text, sizeof text, nullptr);
    return text;
}

// ---- the driver, which TensorRT has loaded already ----

struct Driver {
    int (*memset)(unsigned long long, unsigned char, size_t, cudaStream_t);
    int (*copy)(unsigned long long, unsigned long long, size_t, cudaStream_t);
    int (*download)(void *, unsigned long long, size_t, cudaStream_t);
    int (*call)(cudaStream_t, void (*)(void *), void *);
    int (*capturing)(cudaStream_t, int *);
    int (*pin)(void **, size_t, unsigned);
    int (*unpin)(void *);
    bool complete;

    static Driver const &get() {
        static Driver const driver;
        return driver;
    }

private:
    Driver() {
        void *library = dlopen("libcuda.so.1", RTLD_NOW);
        complete = library != nullptr;
        find(library, "cuMemsetD8Async", memset);
        find(library, "cuMemcpyDtoDAsync_v2", copy);
        find(library, "cuMemcpyDtoHAsync_v2", download);
        find(library, "cuLaunchHostFunc", call);
        find(library, "cuStreamIsCapturing", capturing);
        find(library, "cuMemHostAlloc", pin);
        find(library, "cuMemFreeHost", unpin);
    }
    template <class Function>
    void find(void *library, char const *name, Function &to) {
        void *symbol = library ? dlsym(library, name) : nullptr;
        memcpy_(&to, &symbol);
        complete = complete && symbol;
    }
    static void memcpy_(void *to, void const *from) { ::memcpy(to, from, sizeof(void *)); }
};

unsigned long long address(void const *p) { return reinterpret_cast<unsigned long long>(p); }

// ---- types and shapes ----

bool dtype_of(DataType type, int32_t &dtype, size_t &bytes) {
    switch (type) {
    case DataType::kFLOAT: return dtype = AKV_F32, bytes = 4, true;
    case DataType::kHALF: return dtype = AKV_F16, bytes = 2, true;
    case DataType::kBF16: return dtype = AKV_BF16, bytes = 2, true;
    default: return false;
    }
}

struct Dimensions {
    int64_t q_heads, kv_heads, dim_k, dim_v;
    int64_t q_rows, rows, sequences, tokens;
};

// -1 stands for what is not known yet. `dims(i)` are those of input i.
template <class Dims_>
bool dimensions(Dims_ dims, Dimensions &d) {
    static constexpr struct {
        char const *name;
        int32_t rank;
    } shapes[INPUTS] = {{"q", 3}, {"key", 3}, {"value", 3}, {"sequences", 1}, {"lengths", 1}, {"token", 1}};
    for (int i = 0; i < INPUTS; i++) {
        if (dims(i).nbDims != shapes[i].rank)
            FAIL(false, "%s: %s has %d dimensions, expected %d", NAME, shapes[i].name, dims(i).nbDims, shapes[i].rank);
    }
    auto const &q = dims(Q), &k = dims(KEY_ROWS), &v = dims(VALUE_ROWS);
    d = {q.d[1], k.d[1], k.d[2], v.d[2], q.d[0], k.d[0], dims(SEQUENCES).d[0], dims(TOKEN).d[0]};
    if (q.d[2] != k.d[2]) FAIL(false, "%s: q has %d channels, key %d", NAME, int(q.d[2]), int(k.d[2]));
    if (v.d[1] != k.d[1]) FAIL(false, "%s: key has %d heads, value %d", NAME, int(k.d[1]), int(v.d[1]));
    if (v.d[0] != k.d[0]) FAIL(false, "%s: key has %d rows, value %d", NAME, int(k.d[0]), int(v.d[0]));
    if (dims(LENGTHS).d[0] != d.sequences)
        FAIL(false, "%s: %d sequences, but %d lengths", NAME, int(d.sequences), int(dims(LENGTHS).d[0]));
    if (d.q_heads < 1 || d.kv_heads < 1 || d.dim_k < 1 || d.dim_v < 1)
        FAIL(false, "%s: heads and channels of q, key and value must be known when the engine is built", NAME);
    return true;
}

// ---- configuration: fields of the creator, and what the plan keeps ----

struct Config {
    std::string cache = KEY; // key of the shared cache
    int32_t layer = -1;      // of it
    int64_t max_kv = 0;      // longest sequence, for the workspace
    float scale = 0, softcap = 0, tolerance = 0;
    int32_t mode = AKV_EXPECTED, window = 0;
    int32_t verify = -1;   // 1: this layer compares the step with its tensors; -1: layer 0 does
    int64_t workspace = 0; // bytes, of all profiles' maxima; the plan's alone
};

struct Field {
    char const *name;
    PluginFieldType type;
    void *data;
};

// All but `cache`, which is a string.
std::vector<Field> fields_of(Config &c) {
    return {{"layer", PluginFieldType::kINT32, &c.layer},
            {"max_kv", PluginFieldType::kINT64, &c.max_kv},
            {"scale", PluginFieldType::kFLOAT32, &c.scale},
            {"logit_softcap", PluginFieldType::kFLOAT32, &c.softcap},
            {"tolerance", PluginFieldType::kFLOAT32, &c.tolerance},
            {"mode", PluginFieldType::kINT32, &c.mode},
            {"window", PluginFieldType::kINT32, &c.window},
            {"verify", PluginFieldType::kINT32, &c.verify},
            {"workspace", PluginFieldType::kINT64, &c.workspace}};
}

size_t size_of(PluginFieldType type) { return type == PluginFieldType::kINT64 ? 8 : 4; }

bool read(PluginFieldCollection const *given, TensorRTPhase phase, Config &c) {
    if (!given) FAIL(false, "%s: no fields", NAME);
    std::vector<Field> const known = fields_of(c);
    for (int i = 0; i < given->nbFields; i++) {
        PluginField const &f = given->fields[i];
        if (!f.name || !f.data) FAIL(false, "%s: field %d has no %s", NAME, i, f.name ? "data" : "name");
        if (strcmp(f.name, "cache") == 0) {
            if (f.type != PluginFieldType::kCHAR) FAIL(false, "%s: cache: expected characters", NAME);
            c.cache.assign(static_cast<char const *>(f.data), size_t(f.length));
            while (!c.cache.empty() && c.cache.back() == 0) c.cache.pop_back();
            continue;
        }
        auto it = std::find_if(known.begin(), known.end(), [&](Field const &k) { return strcmp(k.name, f.name) == 0; });
        if (it == known.end() || (it->data == &c.workspace && phase == TensorRTPhase::kBUILD))
            FAIL(false, "%s: there is no field %s", NAME, f.name);
        if (f.type != it->type || f.length != 1)
            FAIL(false, "%s: %s: type %d and length %d, expected type %d and length 1", NAME, f.name, int(f.type),
                 f.length, int(it->type));
        memcpy(it->data, f.data, size_of(f.type));
    }
    if (c.cache.empty()) FAIL(false, "%s: cache is empty: expected the key of a shared cache", NAME);
    if (c.layer < 0) FAIL(false, "%s: layer is %d: expected the layer's index in the cache", NAME, c.layer);
    if (c.max_kv < 1 || c.max_kv > INT32_MAX)
        FAIL(false, "%s: max_kv is %lld: expected the tokens of the longest sequence", NAME,
             static_cast<long long>(c.max_kv));
    return true;
}

// Workspace that the library needs; 0, logged, if it cannot tell. Asks it with a cache of its own, which has no rows:
// the shared one is none of the builder's business.
size_t workspace_of(Config const &c, Dimensions const &d) {
    akv_context_desc context_desc{};
    context_desc.struct_size = sizeof context_desc;
    context_desc.abi_version = AKV_ABI_VERSION;
    context_desc.backend = AKV_CUDA;
    akv_layer_desc layer{};
    layer.n_q_heads = int32_t(d.q_heads), layer.n_kv_heads = int32_t(d.kv_heads);
    layer.dim_k = int32_t(d.dim_k), layer.dim_v = int32_t(d.dim_v);
    layer.dtype_k = layer.dtype_v = AKV_F16;
    akv_cache_desc cache_desc{};
    cache_desc.struct_size = sizeof cache_desc;
    cache_desc.n_layers = 1;
    cache_desc.layers = &layer;
    akv_batch_desc bounds{};
    bounds.struct_size = sizeof bounds;
    bounds.max_sequences = int32_t(d.sequences), bounds.max_q = int32_t(std::max(d.q_rows, d.rows)),
    bounds.max_kv = c.max_kv;
    akv_context *context = nullptr;
    akv_cache *cache = nullptr;
    akv_batch *batch = nullptr;
    size_t bytes = 0, align = 0;
    if (akv_context_create(&context_desc, &context) || akv_cache_create(context, &cache_desc, &cache) ||
        akv_batch_create(cache, &bounds, &batch) || akv_batch_workspace(batch, &bytes, &align)) {
        log(ILogger::Severity::kERROR, "%s: layer %d: %s", NAME, c.layer, last_error().c_str());
        bytes = 0;
    }
    if (batch) akv_batch_destroy(batch);
    if (cache) akv_cache_destroy(cache);
    if (context) akv_context_destroy(context);
    return bytes;
}

// ---- a step against its tensors, in the stream's order ----

// Pinned copies of the step's tensors, and who compares them.
struct Check {
    std::shared_ptr<Shared> shared;
    cudaStream_t stream;
    int64_t room;
    akv_sequence *sequences;
    int32_t *lengths;

    static Check *create(std::shared_ptr<Shared> shared, cudaStream_t stream, int64_t room) {
        void *memory = nullptr;
        if (Driver::get().pin(&memory, size_t(room) * 12, 0)) return nullptr;
        auto *sequences = static_cast<akv_sequence *>(memory);
        return new Check{std::move(shared), stream, room, sequences, reinterpret_cast<int32_t *>(sequences + room)};
    }
    ~Check() { Driver::get().unpin(sequences); }

    bool is(Step const &step) const {
        return std::equal(step.sequences.begin(), step.sequences.end(), sequences) &&
               std::equal(step.lengths.begin(), step.lengths.end(), lengths);
    }

    // Runs when the stream comes to it; calls nothing of CUDA. Steps before the one that matches were never launched.
    static void run(void *user) {
        auto *check = static_cast<Check *>(user);
        std::lock_guard<std::mutex> lock(check->shared->mutex);
        auto lane = check->shared->lanes.find(check->stream);
        if (lane == check->shared->lanes.end() || lane->second.expected.empty()) return;
        auto &expected = lane->second.expected;
        auto it = std::find_if(expected.begin(), expected.end(), [&](Step const &step) { return check->is(step); });
        if (it != expected.end()) {
            expected.erase(expected.begin(), it + 1);
            return;
        }
        Step const &step = expected.front();
        for (size_t i = 0; i < step.sequences.size() && check->shared->fault.empty(); i++) {
            if (check->sequences[i] == step.sequences[i] && check->lengths[i] == step.lengths[i]) continue;
            char text[200];
            snprintf(text, sizeof text,
                     "sequences[%zu] is %llu with %d new tokens, but the step was begun with %llu and %d", i,
                     static_cast<unsigned long long>(check->sequences[i]), check->lengths[i],
                     static_cast<unsigned long long>(step.sequences[i]), step.lengths[i]);
            check->shared->fault = text;
        }
        expected.pop_front();
    }
};

// ---- the plugin ----

class Plugin final : public IPluginV3, public IPluginV3OneCore, public IPluginV3OneBuild, public IPluginV3OneRuntime {
public:
    Plugin(Config config, TensorRTPhase phase) : config_(std::move(config)), phase_(phase) {}
    ~Plugin() override {
        checks_.clear();
        if (shared_) getPluginRegistry()->releasePluginResource(config_.cache.c_str());
    }
    Plugin(Plugin const &) = delete;
    Plugin &operator=(Plugin const &) = delete;

    IPluginCapability *getCapabilityInterface(PluginCapabilityType type) noexcept override {
        switch (type) {
        case PluginCapabilityType::kCORE: return static_cast<IPluginV3OneCore *>(this);
        case PluginCapabilityType::kBUILD: return static_cast<IPluginV3OneBuild *>(this);
        case PluginCapabilityType::kRUNTIME: return static_cast<IPluginV3OneRuntime *>(this);
        }
        return nullptr;
    }
    // A copy of the configuration: attached to nothing.
    IPluginV3 *clone() noexcept override { return copy(); }

    char const *getPluginName() const noexcept override { return NAME; }
    char const *getPluginVersion() const noexcept override { return VERSION; }
    char const *getPluginNamespace() const noexcept override { return ""; }

    // -- build

    int32_t getNbOutputs() const noexcept override { return OUTPUTS; }

    int32_t getOutputDataTypes(DataType *types, int32_t n_out, DataType const *inputs,
                               int32_t n_in) const noexcept override {
        if (!counts(n_in, n_out)) return -1;
        types[OUT] = inputs[Q];
        types[TOKEN_OUT] = DataType::kINT32;
        return 0;
    }

    int32_t getOutputShapes(DimsExprs const *inputs, int32_t n_in, DimsExprs const *, int32_t, DimsExprs *outputs,
                            int32_t n_out, IExprBuilder &) noexcept override {
        if (!counts(n_in, n_out)) return -1;
        if (inputs[Q].nbDims != 3 || inputs[VALUE_ROWS].nbDims != 3)
            FAIL(-1, "%s: q and value need three dimensions", NAME);
        outputs[OUT] = inputs[Q];
        outputs[OUT].d[2] = inputs[VALUE_ROWS].d[2];
        outputs[TOKEN_OUT] = inputs[TOKEN];
        return 0;
    }

    bool supportsFormatCombination(int32_t at, DynamicPluginTensorDesc const *all, int32_t n_in,
                                   int32_t n_out) noexcept override {
        if (!counts(n_in, n_out) || all[at].desc.format != TensorFormat::kLINEAR) return false;
        const DataType type = all[at].desc.type;
        int32_t dtype;
        size_t bytes;
        switch (at) {
        case SEQUENCES: return type == DataType::kINT64;
        case LENGTHS:
        case TOKEN:
        case INPUTS + TOKEN_OUT: return type == DataType::kINT32;
        case INPUTS + OUT: return type == all[Q].desc.type;
        default: return dtype_of(type, dtype, bytes);
        }
    }

    int32_t configurePlugin(DynamicPluginTensorDesc const *in, int32_t n_in, DynamicPluginTensorDesc const *,
                            int32_t n_out) noexcept override {
        if (!counts(n_in, n_out)) return -1;
        const size_t bytes = getWorkspaceSize(in, n_in, nullptr, n_out);
        config_.workspace = std::max(config_.workspace, int64_t(bytes));
        return bytes > 0 ? 0 : -1;
    }

    size_t getWorkspaceSize(DynamicPluginTensorDesc const *in, int32_t n_in, DynamicPluginTensorDesc const *,
                            int32_t n_out) const noexcept override {
        Dimensions d;
        if (!counts(n_in, n_out) || !dimensions([&](int i) -> Dims const & { return in[i].max; }, d)) return 0;
        return workspace_of(config_, d);
    }

    // The result depends on the cache: no timing of another layer is this one's.
    char const *getTimingCacheID() noexcept override { return nullptr; }

    // -- runtime

    int32_t onShapeChange(PluginTensorDesc const *in, int32_t n_in, PluginTensorDesc const *,
                          int32_t n_out) noexcept override {
        Dimensions d;
        if (!counts(n_in, n_out) || !dimensions([&](int i) -> Dims const & { return in[i].dims; }, d)) return -1;
        return !shared_ || fits(in, d) ? 0 : -1;
    }

    // Whoever is attached may use the shared cache. While an engine is built there may be none, and nothing is touched.
    IPluginV3 *attachToContext(IPluginResourceContext *) noexcept override {
        return guarded<IPluginV3 *>(nullptr, [&] { return attach(); });
    }

    int32_t enqueue(PluginTensorDesc const *in, PluginTensorDesc const *out, void const *const *inputs,
                    void *const *outputs, void *workspace, cudaStream_t stream) noexcept override {
        return guarded(-1, [&] { return run(in, out, inputs, outputs, workspace, stream); });
    }

    PluginFieldCollection const *getFieldsToSerialize() noexcept override {
        return guarded<PluginFieldCollection const *>(nullptr, [&] {
            kept_.clear();
            kept_.emplace_back("cache", config_.cache.data(), PluginFieldType::kCHAR, int32_t(config_.cache.size()));
            for (Field const &f : fields_of(config_)) kept_.emplace_back(f.name, f.data, f.type, 1);
            collection_.nbFields = int32_t(kept_.size());
            collection_.fields = kept_.data();
            return &collection_;
        });
    }

private:
    IPluginV3 *attach() {
        std::unique_ptr<Plugin> plugin(copy());
        if (!plugin) return nullptr;
        if (!Driver::get().complete) FAIL(nullptr, "%s: no CUDA driver, or one that is too old", NAME);
        Nobody nobody;
        IPluginResource *found = getPluginRegistry()->acquirePluginResource(config_.cache.c_str(), &nobody);
        if (auto *cache = dynamic_cast<SharedCache *>(found)) {
            plugin->shared_ = cache->shared();
            if (size_t(config_.layer) >= plugin->shared_->layers.size())
                FAIL(nullptr, "%s: layer %d of a cache of %zu", NAME, config_.layer, plugin->shared_->layers.size());
        } else if (found) {
            getPluginRegistry()->releasePluginResource(config_.cache.c_str());
            FAIL(nullptr, "%s: resource %s is not a cache of this version", NAME, config_.cache.c_str());
        } else if (phase_ == TensorRTPhase::kRUNTIME) {
            FAIL(nullptr, "%s: there is no cache %s: acquire an alignedkv::SharedCache under this key first", NAME,
                 config_.cache.c_str());
        }
        return plugin.release();
    }

    int32_t run(PluginTensorDesc const *in, PluginTensorDesc const *out, void const *const *inputs,
                void *const *outputs, void *workspace, cudaStream_t stream) {
        Dimensions d;
        if (!dimensions([&](int i) -> Dims const & { return in[i].dims; }, d)) return -1;
        Lane *lane = shared_ ? shared_->lane(stream) : nullptr;
        const bool begun = lane && lane->begun;
        if (!shared_ || (!begun && phase_ == TensorRTPhase::kBUILD)) return nothing(out, outputs, stream);
        if (!begun)
            FAIL(-1,
                 "%s: layer %d: no step is begun on this stream (SharedCache::begin; builds with auxiliary streams are "
                 "not for this plugin)",
                 NAME, config_.layer);
        int capturing = 0;
        if (Driver::get().capturing(stream, &capturing)) FAIL(-1, "%s: this stream cannot be used", NAME);
        if (!fits(in, d) || !holds(*lane, d, capturing != 0)) return -1;
        if ((config_.verify < 0 ? config_.layer == 0 : config_.verify != 0) && !check(*lane, d, inputs, stream))
            return -1;

        akv_rows key{}, value{};
        key.data = const_cast<void *>(inputs[KEY_ROWS]), value.data = const_cast<void *>(inputs[VALUE_ROWS]);
        akv_attention_desc attention{};
        attention.struct_size = sizeof attention;
        attention.q.data = const_cast<void *>(inputs[Q]), attention.out.data = outputs[OUT];
        size_t bytes;
        dtype_of(in[KEY_ROWS].type, key.dtype, bytes);
        dtype_of(in[VALUE_ROWS].type, value.dtype, bytes);
        dtype_of(in[Q].type, attention.q.dtype, bytes);
        attention.out.dtype = attention.q.dtype;
        attention.scale = config_.scale, attention.logit_softcap = config_.softcap;
        attention.tolerance = config_.tolerance, attention.mode = config_.mode, attention.window = config_.window;
        attention.workspace = workspace, attention.workspace_bytes = size_t(config_.workspace);
        attention.stream = stream;
        if (akv_quantize_kv(lane->batch, config_.layer, &key, &value, stream) ||
            akv_aligned_attention(lane->batch, config_.layer, &attention))
            FAIL(-1, "%s: layer %d: %s", NAME, config_.layer, last_error().c_str());
        if (Driver::get().copy(address(outputs[TOKEN_OUT]), address(inputs[TOKEN]), size_t(d.tokens) * 4, stream))
            FAIL(-1, "%s: layer %d: the token could not be copied", NAME, config_.layer);
        return 0;
    }

    // Asks whether a key is taken: it cannot be registered.
    struct Nobody final : IPluginResource {
        int32_t release() noexcept override { return 0; }
        IPluginResource *clone() noexcept override { return nullptr; }
    };

    Plugin *copy() noexcept {
        return guarded<Plugin *>(nullptr, [&] { return new Plugin(config_, phase_); });
    }

    static bool counts(int32_t n_in, int32_t n_out) {
        if (n_in == INPUTS && n_out == OUTPUTS) return true;
        FAIL(false, "%s: %d inputs and %d outputs, expected %d (q, key, value, sequences, lengths, token) and %d", NAME,
             n_in, n_out, INPUTS, OUTPUTS);
    }

    // The builder times a layer that is attached to nothing, or for which nothing is begun: outputs are zeros.
    static int32_t nothing(PluginTensorDesc const *out, void *const *outputs, cudaStream_t stream) {
        for (int i = 0; i < OUTPUTS; i++) {
            int32_t dtype;
            size_t bytes = 4;
            if (i == OUT) dtype_of(out[i].type, dtype, bytes);
            for (int c = 0; c < out[i].dims.nbDims; c++) bytes *= size_t(out[i].dims.d[c]);
            if (bytes && Driver::get().complete && Driver::get().memset(address(outputs[i]), 0, bytes, stream))
                return -1;
        }
        return 0;
    }

    // The tensors' shapes and types against those of the cache's layer.
    bool fits(PluginTensorDesc const *in, Dimensions const &d) const {
        akv_layer_desc const &l = shared_->layers[size_t(config_.layer)];
        const int32_t dim_v = l.dim_v ? l.dim_v : l.dim_k;
        if (d.q_heads != l.n_q_heads || d.kv_heads != l.n_kv_heads || d.dim_k != l.dim_k || d.dim_v != dim_v)
            FAIL(false,
                 "%s: layer %d has %d query and %d KV heads of %d and %d channels, the tensors %d and %d of %d and %d",
                 NAME, config_.layer, l.n_q_heads, l.n_kv_heads, l.dim_k, dim_v, int(d.q_heads), int(d.kv_heads),
                 int(d.dim_k), int(d.dim_v));
        int32_t k, v;
        size_t bytes;
        if (!dtype_of(in[KEY_ROWS].type, k, bytes) || !dtype_of(in[VALUE_ROWS].type, v, bytes) || k != l.dtype_k ||
            v != l.dtype_v)
            FAIL(false, "%s: key and value of layer %d have other types than the cache's", NAME, config_.layer);
        return true;
    }

    // The step's rows lie within the tensors; so do those of all later steps, if this one is captured.
    bool holds(Lane const &lane, Dimensions const &d, bool capturing) const {
        const int64_t n_q = capturing ? lane.bounds.max_q : lane.step.n_q,
                      n_new = capturing ? lane.bounds.max_q : lane.step.n_new;
        const int64_t n = capturing ? lane.bounds.max_sequences : int64_t(lane.step.sequences.size());
        if (capturing && (!lane.bounds.max_q || !lane.bounds.max_sequences || !lane.bounds.max_kv))
            FAIL(false, "%s: only steps within max_sequences, max_q and max_kv can be captured (SharedCache::open)",
                 NAME);
        if (d.q_rows < n_q || d.rows < n_new || d.sequences < n)
            FAIL(false,
                 "%s: layer %d: tensors of %d query rows, %d new rows and %d sequences, but the %s have %d, %d and %d",
                 NAME, config_.layer, int(d.q_rows), int(d.rows), int(d.sequences),
                 capturing ? "batch's bounds" : "step's", int(n_q), int(n_new), int(n));
        return true;
    }

    // Has the stream compare the step with its tensors.
    bool check(Lane &lane, Dimensions const &d, void const *const *inputs, cudaStream_t stream) {
        {
            std::lock_guard<std::mutex> lock(shared_->mutex);
            if (!shared_->fault.empty() && !reported_)
                log(ILogger::Severity::kERROR, "%s: %s", NAME, shared_->fault.c_str());
            reported_ = !shared_->fault.empty();
        }
        auto it = std::find_if(checks_.begin(), checks_.end(),
                               [&](auto const &c) { return c->stream == stream && c->room >= d.sequences; });
        if (it == checks_.end()) {
            int capturing = 0;
            Driver::get().capturing(stream, &capturing);
            Check *made =
                capturing ? nullptr
                          : Check::create(shared_, stream, std::max<int64_t>(d.sequences, lane.bounds.max_sequences));
            if (!made)
                FAIL(false, "%s: no pinned memory for the check of sequences: run a step before one is captured", NAME);
            checks_.emplace_back(made);
            it = checks_.end() - 1;
        }
        Check &c = **it;
        if (Driver::get().download(c.sequences, address(inputs[SEQUENCES]), size_t(d.sequences) * 8, stream) ||
            Driver::get().download(c.lengths, address(inputs[LENGTHS]), size_t(d.sequences) * 4, stream) ||
            Driver::get().call(stream, Check::run, &c))
            FAIL(false, "%s: the check of sequences could not be launched", NAME);
        lane.checked = true;
        return true;
    }

    Config config_;
    TensorRTPhase phase_;
    std::shared_ptr<Shared> shared_; // once attached
    std::vector<std::unique_ptr<Check>> checks_;
    bool reported_ = false;
    std::vector<PluginField> kept_;
    PluginFieldCollection collection_;
};

class Creator final : public IPluginCreatorV3One {
public:
    Creator() {
        names_.emplace_back("cache", nullptr, PluginFieldType::kCHAR, 0);
        Config c;
        for (Field const &f : fields_of(c)) {
            if (f.data != &c.workspace) names_.emplace_back(f.name, nullptr, f.type, 1);
        }
        collection_.nbFields = int32_t(names_.size());
        collection_.fields = names_.data();
    }
    IPluginV3 *createPlugin(AsciiChar const *, PluginFieldCollection const *fields,
                            TensorRTPhase phase) noexcept override {
        return guarded<IPluginV3 *>(nullptr, [&] {
            Config config;
            return read(fields, phase, config) ? new Plugin(std::move(config), phase) : nullptr;
        });
    }
    PluginFieldCollection const *getFieldNames() noexcept override { return &collection_; }
    AsciiChar const *getPluginName() const noexcept override { return NAME; }
    AsciiChar const *getPluginVersion() const noexcept override { return VERSION; }
    AsciiChar const *getPluginNamespace() const noexcept override { return ""; }

private:
    std::vector<PluginField> names_;
    PluginFieldCollection collection_;
};

} // namespace
} // namespace alignedkv

#define EXPORT extern "C" __attribute__((visibility("default")))

EXPORT nvinfer1::IPluginCreatorInterface *const *getCreators(int32_t &n) {
    static alignedkv::Creator creator;
    static nvinfer1::IPluginCreatorInterface *const creators[] = {&creator};
    n = 1;
    return creators;
}

EXPORT void setLoggerFinder(nvinfer1::ILoggerFinder *finder) {
    std::lock_guard<std::mutex> lock(alignedkv::finder_mutex);
    alignedkv::finder = finder;
}
