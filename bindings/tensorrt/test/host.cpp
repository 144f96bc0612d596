// An interface check without a TensorRT runtime: drives the plugin as TensorRT would, by its documentation, with a
// registry and a logger of its own, and compares with calls of the library. Compiled against TensorRT's headers; the
// kernels run on the CPU, under a stand-in for the driver. It cannot tell whether TensorRT itself does what is said of
// it. MIT OR Apache-2.0.
#include "common.hpp"

#include <dlfcn.h>

#include <thread>

// ---- TensorRT's side ----

struct Finder final : ILoggerFinder {
    ILogger *findLogger() override { return &logger; }
} finder;

// Does not know resources that cannot be cloned, as documented.
struct Registry final : IPluginRegistry {
    struct Entry {
        IPluginResource *resource;
        int count;
    };
    std::map<std::string, Entry> entries;

    IPluginResource *acquirePluginResource(AsciiChar const *key, IPluginResource *resource) noexcept override {
        auto it = entries.find(key);
        if (it == entries.end()) {
            IPluginResource *clone = resource->clone();
            if (!clone) return nullptr;
            it = entries.emplace(key, Entry{clone, 0}).first;
        }
        it->second.count++;
        return it->second.resource;
    }
    int32_t releasePluginResource(AsciiChar const *key) noexcept override {
        auto it = entries.find(key);
        if (it == entries.end()) return -1;
        if (--it->second.count == 0) {
            it->second.resource->release();
            delete it->second.resource;
            entries.erase(it);
        }
        return 0;
    }

    // Nobody asks for the rest. Some of it is there in one major version only.
#if NV_TENSORRT_MAJOR < 11
    bool registerCreator(IPluginCreator &, AsciiChar const *) noexcept override { return false; }
    IPluginCreator *const *getPluginCreatorList(int32_t *) const noexcept override { return nullptr; }
    IPluginCreator *getPluginCreator(AsciiChar const *, AsciiChar const *, AsciiChar const *) noexcept override {
        return nullptr;
    }
    bool deregisterCreator(IPluginCreator const &) noexcept override { return false; }
#endif
    void setErrorRecorder(IErrorRecorder *) noexcept override {}
    IErrorRecorder *getErrorRecorder() const noexcept override { return nullptr; }
    bool isParentSearchEnabled() const override { return false; }
    void setParentSearchEnabled(bool) override {}
    PluginLibraryHandle loadLibrary(AsciiChar const *) noexcept override { return nullptr; }
    void deregisterLibrary(PluginLibraryHandle) noexcept override {}
    bool registerCreator(IPluginCreatorInterface &, AsciiChar const *) noexcept override { return false; }
    IPluginCreatorInterface *const *getAllCreators(int32_t *) const noexcept override { return nullptr; }
    IPluginCreatorInterface *getCreator(AsciiChar const *, AsciiChar const *, AsciiChar const *) noexcept override {
        return nullptr;
    }
    bool deregisterCreator(IPluginCreatorInterface const &) noexcept override { return false; }
    virtual IPluginCreatorInterface *const *getAllCreatorsRecursive(int32_t *) noexcept {
        return nullptr;
    } // from 10.9 on
};

static Registry &registry() {
    static Registry *registry = new Registry;
    return *registry;
}

extern "C" __attribute__((visibility("default"))) IPluginRegistry *getPluginRegistry() noexcept { return &registry(); }

// ---- the network: attention layers, the token going from one to the next ----

enum { IN = 6, OUT = 2 };

static IPluginCreatorV3One *creator;

static IPluginV3OneBuild *build_of(IPluginV3 *p) {
    return static_cast<IPluginV3OneBuild *>(p->getCapabilityInterface(PluginCapabilityType::kBUILD));
}
static IPluginV3OneRuntime *runtime_of(IPluginV3 *p) {
    return static_cast<IPluginV3OneRuntime *>(p->getCapabilityInterface(PluginCapabilityType::kRUNTIME));
}

// Of `rows` query rows and new rows, and n sequences.
struct Descriptions {
    PluginTensorDesc in[IN], out[OUT];
    DynamicPluginTensorDesc dynamic[IN + OUT];

    Descriptions(int rows, int n) {
        const DataType types[IN + OUT] = {DataType::kFLOAT, DataType::kHALF,  DataType::kHALF,  DataType::kINT64,
                                          DataType::kINT32, DataType::kINT32, DataType::kFLOAT, DataType::kINT32};
        const Dims shapes[IN + OUT] = {dims({rows, HEADS, DIM}),
                                       dims({rows, KV_HEADS, DIM}),
                                       dims({rows, KV_HEADS, DIM}),
                                       dims({n}),
                                       dims({n}),
                                       dims({1}),
                                       dims({rows, HEADS, DIM}),
                                       dims({1})};
        for (int i = 0; i < IN + OUT; i++) {
            PluginTensorDesc &d = i < IN ? in[i] : out[i - IN];
            d.dims = shapes[i], d.type = types[i], d.format = TensorFormat::kLINEAR, d.scale = -1;
            dynamic[i].desc = d;
            if (i != 5 && i != 7) dynamic[i].desc.dims.d[0] = -1;
            dynamic[i].min = dynamic[i].max = dynamic[i].opt = d.dims;
        }
    }
};

// An execution context: plugins that are attached, on a stream, with tensors of up to `rows` rows.
struct Context {
    std::vector<IPluginV3 *> plugins;
    cudaStream_t stream = nullptr;
    Tensors tensors;
    int rows;

    Context(std::vector<IPluginV3 *> const &engine, int rows, size_t workspace)
        : tensors(rows, SEQUENCES, workspace), rows(rows) {
        REQUIRE(cuStreamCreate(&stream, 0));
        for (IPluginV3 *p : engine) plugins.push_back(runtime_of(p)->attachToContext(nullptr));
    }
    ~Context() {
        for (IPluginV3 *p : plugins) delete p;
        REQUIRE(cuStreamDestroy_v2(stream));
    }
    // enqueueV3; shapes of `n_rows` rows.
    int32_t enqueue(int n_rows, int n = SEQUENCES) {
        Descriptions d(n_rows, n);
        for (int l = 0; l < LAYERS; l++) {
            auto p = [](Address a) { return reinterpret_cast<void *>(a); };
            void const *in[IN] = {p(tensors.in[l][0]),  p(tensors.in[l][1]), p(tensors.in[l][2]),
                                  p(tensors.sequences), p(tensors.lengths),  p(tensors.token[l])};
            void *out[OUT] = {p(tensors.out[l]), p(tensors.token[l + 1])};
            if (int32_t code = runtime_of(plugins[l])->onShapeChange(d.in, IN, d.out, OUT)) return code;
            if (int32_t code = runtime_of(plugins[l])->enqueue(d.in, d.out, in, out, p(tensors.workspace), stream))
                return code;
        }
        return 0;
    }
    void names(akv_sequence const *sequences, int32_t const *lengths, int n) {
        REQUIRE(cuMemcpyHtoDAsync_v2(tensors.sequences, sequences, size_t(n) * 8, stream));
        REQUIRE(cuMemcpyHtoDAsync_v2(tensors.lengths, lengths, size_t(n) * 4, stream));
    }
};

static IPluginV3 *make(std::vector<PluginField> fields, TensorRTPhase phase = TensorRTPhase::kBUILD) {
    PluginFieldCollection collection{int32_t(fields.size()), fields.data()};
    return creator->createPlugin("attention", &collection, phase);
}

// As a plan keeps a plugin: names and bytes.
struct Plan {
    struct Kept {
        std::string name, bytes;
        PluginFieldType type;
        int32_t length;
    };
    std::vector<Kept> fields;

    explicit Plan(IPluginV3 *plugin) {
        PluginFieldCollection const *c = runtime_of(plugin)->getFieldsToSerialize();
        for (int i = 0; i < c->nbFields; i++) {
            PluginField const &f = c->fields[i];
            const size_t size = f.type == PluginFieldType::kCHAR ? 1 : f.type == PluginFieldType::kINT64 ? 8 : 4;
            fields.push_back(
                {f.name, std::string(static_cast<char const *>(f.data), size * size_t(f.length)), f.type, f.length});
        }
    }
    IPluginV3 *load() const {
        std::vector<PluginField> list;
        for (Kept const &f : fields) list.emplace_back(f.name.c_str(), f.bytes.data(), f.type, f.length);
        return make(list, TensorRTPhase::kRUNTIME);
    }
};

// ---- what must be ----

static void fails(int32_t code, char const *word, int line) {
    CHECK(code != 0 && strstr(logger.last.c_str(), word), "line %d: %d, \"%s\" does not say %s", line, code,
          logger.last.c_str(), word);
}
#define FAILS(call, word) (logger.last.clear(), fails((call), word, __LINE__))
#define IS_NULL(call, word) FAILS((call) == nullptr ? -1 : 0, word)

static void creators() {
    int32_t layer = 0, wrong = 3;
    int64_t max_kv = MAX_KV;
    const PluginField good[] = {{"layer", &layer, PluginFieldType::kINT32, 1},
                                {"max_kv", &max_kv, PluginFieldType::kINT64, 1}};
    CHECK(strcmp(creator->getPluginName(), "AlignedKVAttention") == 0 && strcmp(creator->getPluginVersion(), "1") == 0,
          "name");
    bool names = false;
    for (int i = 0; i < creator->getFieldNames()->nbFields; i++)
        names |= strcmp(creator->getFieldNames()->fields[i].name, "tolerance") == 0;
    CHECK(names, "tolerance is not among the fields");
    IS_NULL(make({good[0]}), "max_kv is 0");
    IS_NULL(make({good[1]}), "layer is -1");
    IS_NULL(make({good[0], good[1], {"planes", &wrong, PluginFieldType::kINT32, 1}}), "no field planes");
    IS_NULL(make({good[0], good[1], {"tolerance", &wrong, PluginFieldType::kINT32, 1}}), "tolerance: type");
    IS_NULL(make({good[0], good[1], {"workspace", &max_kv, PluginFieldType::kINT64, 1}}), "no field workspace");
    IS_NULL(make({good[0], good[1], {"cache", "", PluginFieldType::kCHAR, 0}}), "cache is empty");
    IS_NULL(creator->createPlugin("", nullptr, TensorRTPhase::kBUILD), "no fields");
}

// The builder's calls. Returns plugins as a plan has them.
static std::vector<IPluginV3 *> engine(size_t *workspace) {
    std::vector<IPluginV3 *> loaded;
    for (int32_t l = 0; l < LAYERS; l++) {
        int64_t max_kv = MAX_KV;
        float tolerance = 2e-3f;
        IPluginV3 *p = make({{"layer", &l, PluginFieldType::kINT32, 1},
                             {"cache", "test", PluginFieldType::kCHAR, 4},
                             {"max_kv", &max_kv, PluginFieldType::kINT64, 1},
                             {"tolerance", &tolerance, PluginFieldType::kFLOAT32, 1}});
        IPluginV3OneBuild *b = build_of(p);
        Descriptions large(PROMPT, SEQUENCES), small(1, 1);
        CHECK(p && b->getNbOutputs() == OUT && b->getTimingCacheID() == nullptr, "build");

        DataType in[IN], out[OUT];
        for (int i = 0; i < IN; i++) in[i] = large.in[i].type;
        CHECK(b->getOutputDataTypes(out, OUT, in, IN) == 0 && out[0] == DataType::kFLOAT && out[1] == DataType::kINT32,
              "types");
        // Expressions are only handed on: addresses stand for them.
        DimsExprs shapes[IN], of[OUT];
        static char expressions[IN * 3];
        for (int i = 0; i < IN; i++) {
            shapes[i].nbDims = large.in[i].dims.nbDims;
            for (int c = 0; c < 3; c++)
                shapes[i].d[c] = reinterpret_cast<IDimensionExpr const *>(&expressions[3 * i + c]);
        }
        alignas(16) static char none[64];
        CHECK(b->getOutputShapes(shapes, IN, nullptr, 0, of, OUT, reinterpret_cast<IExprBuilder &>(none)) == 0,
              "shapes");
        CHECK(of[0].nbDims == 3 && of[0].d[0] == shapes[0].d[0] && of[0].d[1] == shapes[0].d[1] &&
                  of[0].d[2] == shapes[2].d[2],
              "out's shape");
        CHECK(of[1].nbDims == 1 && of[1].d[0] == shapes[5].d[0], "the token's shape");
        for (int i = 0; i < IN + OUT; i++) {
            CHECK(b->supportsFormatCombination(i, large.dynamic, IN, OUT), "tensor %d", i);
            Descriptions other(1, 1);
            other.dynamic[i].desc.type = DataType::kINT8;
            CHECK(!b->supportsFormatCombination(i, other.dynamic, IN, OUT), "tensor %d in int8", i);
            other = Descriptions(1, 1);
            other.dynamic[i].desc.format = TensorFormat::kCHW32;
            CHECK(!b->supportsFormatCombination(i, other.dynamic, IN, OUT), "tensor %d in another layout", i);
        }
        FAILS(b->configurePlugin(large.dynamic, IN - 1, large.dynamic + IN, OUT), "5 inputs");
        // Two profiles: the plan keeps what the larger needs.
        CHECK(b->configurePlugin(large.dynamic, IN, large.dynamic + IN, OUT) == 0, "%s", logger.last.c_str());
        *workspace = b->getWorkspaceSize(large.dynamic, IN, large.dynamic + IN, OUT);
        const size_t less = b->getWorkspaceSize(small.dynamic, IN, small.dynamic + IN, OUT);
        CHECK(less > 0 && less < *workspace, "workspaces of %zu and %zu bytes", *workspace, less);
        CHECK(b->configurePlugin(small.dynamic, IN, small.dynamic + IN, OUT) == 0, "%s", logger.last.c_str());

        IPluginV3 *clone = p->clone();
        Plan plan(clone);
        delete clone;
        delete p;
        loaded.push_back(plan.load());
        CHECK(loaded.back(), "%s", logger.last.c_str());
    }
    return loaded;
}

int main(int, char **argv) {
    void *library = dlopen(argv[1], RTLD_NOW | RTLD_LOCAL), *device = nullptr;
    if (!library) {
        printf("%s\n", dlerror());
        return 1;
    }
    auto get_creators = reinterpret_cast<IPluginCreatorInterface *const *(*)(int32_t &)>(dlsym(library, "getCreators"));
    auto set_finder = reinterpret_cast<void (*)(ILoggerFinder *)>(dlsym(library, "setLoggerFinder"));
    int32_t n = 0;
    set_finder(&finder);
    creator = static_cast<IPluginCreatorV3One *>(get_creators(n)[0]);
    CHECK(n == 1, "%d creators", n);
    REQUIRE(cuInit(0));
    REQUIRE(cuDevicePrimaryCtxRetain(&device, 0));
    REQUIRE(cuCtxPushCurrent_v2(device));

    creators();
    size_t workspace = 0;
    std::vector<IPluginV3 *> const plugins = engine(&workspace);

    akv_context_desc context_desc{};
    context_desc.struct_size = sizeof context_desc, context_desc.abi_version = AKV_ABI_VERSION,
    context_desc.backend = AKV_CUDA;
    akv_layer_desc layer{};
    layer.n_q_heads = HEADS, layer.n_kv_heads = KV_HEADS, layer.dim_k = DIM, layer.dtype_k = layer.dtype_v = AKV_F16;
    std::vector<akv_layer_desc> layers(LAYERS, layer);
    akv_cache_desc cache_desc{};
    cache_desc.struct_size = sizeof cache_desc, cache_desc.n_layers = LAYERS, cache_desc.layers = layers.data();
    akv_context *context;
    akv_cache *cache;
    akv_sequence sequences[SEQUENCES];
    REQUIRE(akv_context_create(&context_desc, &context));
    REQUIRE(akv_cache_create(context, &cache_desc, &cache));
    for (akv_sequence &s : sequences) REQUIRE(akv_sequence_create(cache, &s));

    // Nobody has named a cache: no execution context, and the builder's timing changes nothing.
    IS_NULL(runtime_of(plugins[0])->attachToContext(nullptr), "there is no cache test");
    CHECK(registry().entries.empty(), "something is registered");
    {
        Context timing({}, 4, workspace);
        for (IPluginV3 *p : plugins) timing.plugins.push_back(p->clone());
        CHECK(timing.enqueue(4) == 0, "%s", logger.last.c_str());
        for (float x : outputs(timing.tensors, 1, 4, timing.stream)) CHECK(x == 0, "out has %g", double(x));
    }
    alignedkv::SharedCache shared(cache, layers);
    CHECK(registry().acquirePluginResource("test", &shared) != nullptr, "not registered");
    {
        // The same where there is a cache: for a plugin of the build phase, attached, without a step of its own.
        int32_t l = 1;
        int64_t max_kv = MAX_KV;
        Context timing({}, 4, workspace);
        for (int i = 0; i < LAYERS; i++) {
            IPluginV3 *p = make({{"layer", &l, PluginFieldType::kINT32, 1},
                                 {"cache", "test", PluginFieldType::kCHAR, 4},
                                 {"max_kv", &max_kv, PluginFieldType::kINT64, 1}});
            timing.plugins.push_back(runtime_of(p)->attachToContext(nullptr));
            delete p;
        }
        CHECK(timing.enqueue(4) == 0, "%s", logger.last.c_str());
        CHECK(length(cache, sequences[0]) == 0, "rows were appended");
    }
    CHECK(registry().entries["test"].count == 1, "the key is held %d times", registry().entries["test"].count);

    {
        // One context for prompts, one for decoding.
        Context prefill(plugins, PROMPT, workspace), decode(plugins, SEQUENCES, workspace);
        CHECK(registry().entries["test"].count == 1 + 2 * LAYERS, "the key is held %d times",
              registry().entries["test"].count);
        akv_batch_desc bounds{};
        bounds.struct_size = sizeof bounds;
        bounds.max_sequences = SEQUENCES, bounds.max_q = PROMPT, bounds.max_kv = MAX_KV;
        REQUIRE(shared.open(prefill.stream, bounds));
        bounds.max_q = SEQUENCES;
        REQUIRE(shared.open(decode.stream, bounds));
        CHECK(shared.open(decode.stream, bounds) == AKV_E_BUSY, "two batches on a stream");

        Direct direct(context, cache_desc);
        akv_batch_desc step{};
        step.struct_size = sizeof step, step.n_sequences = SEQUENCES, step.sequences = sequences;

        // A prompt.
        int32_t const prompt[SEQUENCES] = {PROMPT - 7, 7};
        Rows rows(PROMPT);
        int32_t const sent = 7;
        int32_t arrived = 0;
        REQUIRE(cuMemcpyHtoDAsync_v2(prefill.tensors.token[0], &sent, 4, prefill.stream));
        step.n_new = prompt;
        direct.step(rows, prompt);
        FAILS(prefill.enqueue(PROMPT), "no step is begun");
        prefill.names(sequences, prompt, SEQUENCES);
        rows.upload(prefill.tensors, prefill.stream);
        REQUIRE(shared.begin(prefill.stream, step));
        FAILS(prefill.enqueue(PROMPT - 1), "but the step's have 260");
        FAILS(prefill.enqueue(PROMPT, 1), "1 sequences");
        CHECK(prefill.enqueue(PROMPT) == 0, "%s", logger.last.c_str());
        REQUIRE(shared.commit(prefill.stream));
        REQUIRE(cuMemcpyDtoHAsync_v2(&arrived, prefill.tensors.token[LAYERS], 4, prefill.stream));
        REQUIRE(cuStreamSynchronize(prefill.stream));
        CHECK(arrived == sent, "the token is %d", arrived);
        for (int l = 0; l < LAYERS; l++)
            CHECK(same(outputs(prefill.tensors, l, PROMPT, prefill.stream),
                       outputs(direct.tensors, l, PROMPT, direct.stream)),
                  "layer %d of the prompt", l);
        CHECK(length(cache, sequences[0]) == PROMPT - 7, "%d tokens", int(length(cache, sequences[0])));

        // Decoding across the end of a tile: calls, then a graph that is replayed.
        int32_t const one[SEQUENCES] = {1, 1};
        step.n_new = one;
        void *exec = nullptr;
        for (int t = 0; t < 12; t++) {
            Rows token(SEQUENCES);
            direct.step(token, one);
            token.upload(decode.tensors, decode.stream);
            if (t == 0) decode.names(sequences, one, SEQUENCES);
            REQUIRE(shared.begin(decode.stream, step));
            if (exec) {
                REQUIRE(cuGraphLaunch(exec, decode.stream));
                REQUIRE(shared.replayed(decode.stream));
            } else if (t == 3) {
                void *graph = nullptr;
                REQUIRE(cuStreamBeginCapture_v2(decode.stream, 0));
                CHECK(decode.enqueue(SEQUENCES) == 0, "%s", logger.last.c_str());
                REQUIRE(cuStreamEndCapture(decode.stream, &graph));
                REQUIRE(cuGraphInstantiateWithFlags(&exec, graph, 0));
                REQUIRE(cuGraphDestroy(graph));
                REQUIRE(cuGraphLaunch(exec, decode.stream));
            } else {
                CHECK(decode.enqueue(SEQUENCES) == 0, "%s", logger.last.c_str());
            }
            REQUIRE(shared.commit(decode.stream));
            for (int l = 0; l < LAYERS; l++)
                CHECK(same(outputs(decode.tensors, l, SEQUENCES, decode.stream),
                           outputs(direct.tensors, l, SEQUENCES, direct.stream)),
                      "layer %d of step %d", l, t);
        }
        std::string text;
        CHECK(shared.poll(&text) == AKV_OK && akv_poll(context, nullptr, nullptr, nullptr) == AKV_OK, "%s",
              text.c_str());

        // Both contexts at once, a sequence each.
        Rows token(SEQUENCES);
        direct.step(token, one);
        std::vector<std::thread> threads;
        for (int i = 0; i < 2; i++) {
            threads.emplace_back([&, i] {
                REQUIRE(cuCtxPushCurrent_v2(device));
                Context &c = i ? decode : prefill;
                akv_batch_desc own = step;
                own.n_sequences = 1, own.sequences = &sequences[i];
                c.names(own.sequences, one, 1);
                token.of(i).upload(c.tensors, c.stream);
                REQUIRE(shared.begin(c.stream, own));
                CHECK(c.enqueue(1, 1) == 0, "a thread");
                REQUIRE(shared.commit(c.stream));
            });
        }
        for (std::thread &t : threads) t.join();
        for (int l = 0; l < LAYERS; l++) {
            auto both = outputs(prefill.tensors, l, 1, prefill.stream),
                 other = outputs(decode.tensors, l, 1, decode.stream);
            both.insert(both.end(), other.begin(), other.end());
            CHECK(same(both, outputs(direct.tensors, l, SEQUENCES, direct.stream)), "layer %d of two threads", l);
        }
        CHECK(shared.poll(&text) == AKV_OK, "%s", text.c_str());
        decode.names(sequences, one, SEQUENCES);

        // A dead sequence: refused where the step begins. Other sequences in the tensor than in the step, and NaN:
        // found by the stream, reported when asked for; enqueue goes on.
        akv_sequence dead[SEQUENCES] = {sequences[0], sequences[1] + (1ull << 32)};
        step.sequences = dead;
        CHECK(shared.begin(decode.stream, step) == AKV_E_HANDLE, "a dead sequence");
        step.sequences = sequences;
        decode.names(dead, one, SEQUENCES);
        REQUIRE(shared.begin(decode.stream, step));
        CHECK(decode.enqueue(SEQUENCES) == 0, "%s", logger.last.c_str());
        REQUIRE(shared.commit(decode.stream));
        REQUIRE(cuStreamSynchronize(decode.stream));
        CHECK(shared.poll(&text) == AKV_E_HANDLE && strstr(text.c_str(), "sequences[1] is"), "%s", text.c_str());
        CHECK(shared.poll(&text) == AKV_OK, "%s", text.c_str());
        decode.names(sequences, one, SEQUENCES);
        Rows bad(SEQUENCES);
        bad.k[1][3] = 0x7e00;
        bad.upload(decode.tensors, decode.stream);
        REQUIRE(shared.begin(decode.stream, step));
        CHECK(decode.enqueue(SEQUENCES) == 0, "%s", logger.last.c_str());
        REQUIRE(shared.commit(decode.stream));
        REQUIRE(cuStreamSynchronize(decode.stream));
        int32_t where = -1;
        CHECK(akv_poll(context, nullptr, &where, nullptr) == AKV_E_NONFINITE && where == 1, "NaN in layer %d", where);

        // A step that is given up leaves nothing, in the cache or in what the stream is to check.
        const int64_t before = length(cache, sequences[0]);
        REQUIRE(shared.begin(decode.stream, step));
        REQUIRE(shared.abort(decode.stream));
        CHECK(length(cache, sequences[0]) == before, "an aborted step");
        REQUIRE(shared.begin(decode.stream, step));
        CHECK(decode.enqueue(SEQUENCES) == 0, "%s", logger.last.c_str());
        REQUIRE(shared.commit(decode.stream));
        REQUIRE(cuStreamSynchronize(decode.stream));
        CHECK(shared.poll(&text) == AKV_OK, "%s", text.c_str());
        CHECK(akv_cache_destroy(cache) == AKV_E_BUSY, "the cache goes while batches live");

        REQUIRE(cuGraphExecDestroy(exec));
        REQUIRE(shared.close(prefill.stream));
        REQUIRE(shared.close(decode.stream));
        FAILS(decode.enqueue(SEQUENCES), "no step is begun");
    }
    for (IPluginV3 *p : plugins) delete p;
    CHECK(registry().entries["test"].count == 1, "the key is held %d times", registry().entries["test"].count);
    REQUIRE(registry().releasePluginResource("test"));
    CHECK(registry().entries.empty(), "the key is still there");
    REQUIRE(akv_cache_destroy(cache));
    REQUIRE(akv_context_destroy(context));
    REQUIRE(cuCtxPopCurrent_v2(&device));
    REQUIRE(cuDevicePrimaryCtxRelease_v2(0));
    printf("tensorrt: %ld checks, %ld failed (an interface check without a TensorRT runtime)\n", checks, failures);
    return failures != 0;
}
