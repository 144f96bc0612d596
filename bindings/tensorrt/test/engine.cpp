// Builds an engine of two attention layers with the plugin, serialises, loads and runs it, in calls and in a CUDA
// graph, and compares with calls of the library. Needs TensorRT and a GPU: ../run-engine compiles and runs it.
// MIT OR Apache-2.0.
#include "common.hpp"

#include <NvInfer.h>

template <class T>
using Owned = std::unique_ptr<T>;

static void build(IBuilder &builder, INetworkDefinition &network, IBuilderConfig &config) {
    IPluginCreatorInterface *found = getPluginRegistry()->getCreator("AlignedKVAttention", "1", "");
    if (!found) {
        printf("the plugin's creator is not registered: %s\n", logger.last.c_str());
        exit(1);
    }
    auto *creator = static_cast<IPluginCreatorV3One *>(found);
    IOptimizationProfile *profile = builder.createOptimizationProfile();
    auto input = [&](std::string const &name, DataType type, Dims shape, Dims least, Dims most) {
        ITensor *t = network.addInput(name.c_str(), type, shape);
        profile->setDimensions(name.c_str(), OptProfileSelector::kMIN, least);
        profile->setDimensions(name.c_str(), OptProfileSelector::kOPT, least);
        profile->setDimensions(name.c_str(), OptProfileSelector::kMAX, most);
        return t;
    };
    auto rows = [&](std::string const &name, DataType type, int heads) {
        return input(name, type, dims({-1, heads, DIM}), dims({1, heads, DIM}), dims({PROMPT, heads, DIM}));
    };
    ITensor *sequences = input("sequences", DataType::kINT64, dims({-1}), dims({1}), dims({SEQUENCES}));
    ITensor *lengths = input("lengths", DataType::kINT32, dims({-1}), dims({1}), dims({SEQUENCES}));
    ITensor *token = network.addInput("token", DataType::kINT32, dims({1}));
    for (int32_t l = 0; l < LAYERS; l++) {
        const std::string n = std::to_string(l);
        int64_t max_kv = MAX_KV;
        float tolerance = 2e-3f;
        const PluginField fields[] = {{"layer", &l, PluginFieldType::kINT32, 1},
                                      {"cache", "test", PluginFieldType::kCHAR, 4},
                                      {"max_kv", &max_kv, PluginFieldType::kINT64, 1},
                                      {"tolerance", &tolerance, PluginFieldType::kFLOAT32, 1}};
        const PluginFieldCollection collection{4, fields};
        Owned<IPluginV3> plugin(creator->createPlugin(("attention" + n).c_str(), &collection, TensorRTPhase::kBUILD));
        if (!plugin) {
            printf("no plugin: %s\n", logger.last.c_str());
            exit(1);
        }
        ITensor *inputs[] = {rows("q" + n, DataType::kFLOAT, HEADS),
                             rows("k" + n, DataType::kHALF, KV_HEADS),
                             rows("v" + n, DataType::kHALF, KV_HEADS),
                             sequences,
                             lengths,
                             token};
        ILayer *layer = network.addPluginV3(inputs, 6, nullptr, 0, *plugin);
        layer->getOutput(0)->setName(("out" + n).c_str());
        network.markOutput(*layer->getOutput(0));
        token = layer->getOutput(1);
    }
    token->setName("token_out");
    network.markOutput(*token);
    config.setMaxAuxStreams(0); // the plugin finds its step by the stream
    config.addOptimizationProfile(profile);
}

// Sets shapes and addresses, and runs.
static bool enqueue(IExecutionContext &context, Tensors const &t, int rows, cudaStream_t stream) {
    auto p = [](Address a) { return reinterpret_cast<void *>(a); };
    bool good =
        context.setInputShape("sequences", dims({SEQUENCES})) && context.setInputShape("lengths", dims({SEQUENCES})) &&
        context.setTensorAddress("sequences", p(t.sequences)) && context.setTensorAddress("lengths", p(t.lengths)) &&
        context.setTensorAddress("token", p(t.token[0])) && context.setTensorAddress("token_out", p(t.token[LAYERS]));
    for (int l = 0; l < LAYERS; l++) {
        const std::string n = std::to_string(l);
        char const *names[] = {"q", "k", "v"};
        for (int i = 0; i < 3; i++) {
            const std::string name = names[i] + n;
            good = good && context.setInputShape(name.c_str(), dims({rows, i ? KV_HEADS : HEADS, DIM})) &&
                   context.setTensorAddress(name.c_str(), p(t.in[l][i]));
        }
        good = good && context.setTensorAddress(("out" + n).c_str(), p(t.out[l]));
    }
    return good && context.enqueueV3(stream);
}

int main(int, char **argv) {
    void *device = nullptr;
    REQUIRE(cuInit(0));
    REQUIRE(cuDevicePrimaryCtxRetain(&device, 0));
    REQUIRE(cuCtxPushCurrent_v2(device));
    if (!getPluginRegistry()->loadLibrary(argv[1])) {
        printf("TensorRT cannot load %s\n", argv[1]);
        return 1;
    }
    // The shared cache does not exist yet.
    Owned<IHostMemory> plan;
    {
        Owned<IBuilder> builder(createInferBuilder(logger));
#if NV_TENSORRT_MAJOR < 11
        Owned<INetworkDefinition> network(
            builder->createNetworkV2(1u << uint32_t(NetworkDefinitionCreationFlag::kSTRONGLY_TYPED)));
#else
        Owned<INetworkDefinition> network(builder->createNetworkV2(0));
#endif
        Owned<IBuilderConfig> config(builder->createBuilderConfig());
        build(*builder, *network, *config);
        plan.reset(builder->buildSerializedNetwork(*network, *config));
    }
    if (!plan) {
        printf("no engine: %s\n", logger.last.c_str());
        return 1;
    }
    akv_context_desc context_desc{};
    context_desc.struct_size = sizeof context_desc, context_desc.abi_version = AKV_ABI_VERSION,
    context_desc.backend = AKV_CUDA;
    akv_layer_desc layer{};
    layer.n_q_heads = HEADS, layer.n_kv_heads = KV_HEADS, layer.dim_k = DIM, layer.dtype_k = layer.dtype_v = AKV_F16;
    std::vector<akv_layer_desc> layers(LAYERS, layer);
    akv_cache_desc cache_desc{};
    cache_desc.struct_size = sizeof cache_desc, cache_desc.n_layers = LAYERS, cache_desc.layers = layers.data();
    akv_context *library;
    akv_cache *cache;
    akv_sequence sequences[SEQUENCES];
    REQUIRE(akv_context_create(&context_desc, &library));
    REQUIRE(akv_cache_create(library, &cache_desc, &cache));
    for (akv_sequence &s : sequences) REQUIRE(akv_sequence_create(cache, &s));
    alignedkv::SharedCache shared(cache, layers);
    CHECK(getPluginRegistry()->acquirePluginResource("test", &shared) != nullptr, "not registered");
    {
        Owned<IRuntime> runtime(createInferRuntime(logger));
        Owned<ICudaEngine> engine(runtime->deserializeCudaEngine(plan->data(), plan->size()));
        Owned<IExecutionContext> prefill(engine->createExecutionContext()), decode(engine->createExecutionContext());
        if (!prefill || !decode) {
            printf("no execution context: %s\n", logger.last.c_str());
            return 1;
        }
        cudaStream_t streams[2] = {};
        akv_batch_desc bounds{};
        bounds.struct_size = sizeof bounds, bounds.max_sequences = SEQUENCES, bounds.max_q = PROMPT,
        bounds.max_kv = MAX_KV;
        for (cudaStream_t &stream : streams) {
            REQUIRE(cuStreamCreate(&stream, 0));
            REQUIRE(shared.open(stream, bounds));
            bounds.max_q = SEQUENCES;
        }
        Direct direct(library, cache_desc);
        Tensors tensors(PROMPT, SEQUENCES, 256);
        akv_batch_desc step{};
        step.struct_size = sizeof step, step.n_sequences = SEQUENCES, step.sequences = sequences;
        void *exec = nullptr;
        for (int t = 0; t < 12; t++) {
            int32_t const lengths[SEQUENCES] = {t ? 1 : PROMPT - 7, t ? 1 : 7};
            const int n = t ? SEQUENCES : PROMPT;
            cudaStream_t stream = streams[t ? 1 : 0];
            IExecutionContext &context = t ? *decode : *prefill;
            Rows rows(n);
            direct.step(rows, lengths);
            step.n_new = lengths;
            rows.upload(tensors, stream);
            REQUIRE(cuMemcpyHtoDAsync_v2(tensors.sequences, sequences, sizeof sequences, stream));
            REQUIRE(cuMemcpyHtoDAsync_v2(tensors.lengths, lengths, sizeof lengths, stream));
            REQUIRE(shared.begin(stream, step));
            if (exec) {
                REQUIRE(cuGraphLaunch(exec, stream));
                REQUIRE(shared.replayed(stream));
            } else if (t == 4) {
                void *graph = nullptr;
                REQUIRE(cuStreamBeginCapture_v2(stream, 0));
                CHECK(enqueue(context, tensors, n, stream), "step %d: %s", t, logger.last.c_str());
                REQUIRE(cuStreamEndCapture(stream, &graph));
                REQUIRE(cuGraphInstantiateWithFlags(&exec, graph, 0));
                REQUIRE(cuGraphDestroy(graph));
                REQUIRE(cuGraphLaunch(exec, stream));
            } else {
                CHECK(enqueue(context, tensors, n, stream), "step %d: %s", t, logger.last.c_str());
            }
            REQUIRE(shared.commit(stream));
            for (int l = 0; l < LAYERS; l++)
                CHECK(same(outputs(tensors, l, n, stream), outputs(direct.tensors, l, n, direct.stream)),
                      "layer %d of step %d", l, t);
        }
        std::string text;
        CHECK(shared.poll(&text) == AKV_OK, "%s", text.c_str());
        CHECK(akv_poll(library, nullptr, nullptr, nullptr) == AKV_OK, "a fault");
        CHECK(length(cache, sequences[0]) == PROMPT - 7 + 11, "%d tokens", int(length(cache, sequences[0])));
        REQUIRE(cuGraphExecDestroy(exec));
        prefill.reset(), decode.reset();
        for (cudaStream_t stream : streams) {
            REQUIRE(shared.close(stream));
            REQUIRE(cuStreamDestroy_v2(stream));
        }
    }
    REQUIRE(getPluginRegistry()->releasePluginResource("test"));
    REQUIRE(akv_cache_destroy(cache));
    REQUIRE(akv_context_destroy(library));
    REQUIRE(cuCtxPopCurrent_v2(&device));
    REQUIRE(cuDevicePrimaryCtxRelease_v2(0));
    printf("tensorrt: an engine of TensorRT %d.%d: %ld checks, %ld failed\n", NV_TENSORRT_MAJOR, NV_TENSORRT_MINOR,
           checks, failures);
    return failures != 0;
}
