// What the programs beside this share: the driver, checks, rows and tensors of two attention layers, and the library
// without the plugin. MIT OR Apache-2.0.
#include "../alignedkv_tensorrt.hpp"

#include <cstdio>
#include <cstdlib>
#include <cstring>

using namespace nvinfer1;

// ---- the driver ----

using Address = unsigned long long;
extern "C" {
int cuInit(unsigned);
int cuDevicePrimaryCtxRetain(void **, int);
int cuDevicePrimaryCtxRelease_v2(int);
int cuCtxPushCurrent_v2(void *);
int cuCtxPopCurrent_v2(void **);
int cuStreamCreate(cudaStream_t *, unsigned);
int cuStreamDestroy_v2(cudaStream_t);
int cuStreamSynchronize(cudaStream_t);
int cuStreamBeginCapture_v2(cudaStream_t, int);
int cuStreamEndCapture(cudaStream_t, void **);
int cuGraphInstantiateWithFlags(void **, void *, unsigned long long);
int cuGraphLaunch(void *, cudaStream_t);
int cuGraphDestroy(void *);
int cuGraphExecDestroy(void *);
int cuMemAlloc_v2(Address *, size_t);
int cuMemFree_v2(Address);
int cuMemcpyHtoDAsync_v2(Address, void const *, size_t, cudaStream_t);
int cuMemcpyDtoHAsync_v2(void *, Address, size_t, cudaStream_t);
}

// ---- checks ----

static long checks, failures;

#define CHECK(condition, ...)                                                           \
    do {                                                                                \
        checks++;                                                                       \
        if (!(condition) && failures++ < 20) {                                          \
            printf("%s:%d: %s: ", __FILE__, __LINE__, #condition), printf(__VA_ARGS__); \
            printf("\n");                                                               \
        }                                                                               \
    } while (0)
#define REQUIRE(call)                                                                 \
    do {                                                                              \
        if (int code_ = (call)) {                                                     \
            char text_[512];                                                          \
            akv_last_error(text_, sizeof text_, nullptr);                             \
            printf("%s:%d: %s is %d: %s\n", __FILE__, __LINE__, #call, code_, text_); \
            exit(1);                                                                  \
        }                                                                             \
    } while (0)

// ---- tensors ----

struct Logger final : ILogger {
    std::string last;
    void log(Severity, AsciiChar const *text) noexcept override { last = text; }
};
static Logger logger;

enum { LAYERS = 2, HEADS = 4, KV_HEADS = 2, DIM = 64, PROMPT = 260, SEQUENCES = 2, MAX_KV = 1024 };
static inline Dims dims(std::initializer_list<int64_t> list) {
    Dims d{};
    for (int64_t x : list) d.d[d.nbDims++] = x;
    return d;
}

// Device memory of one execution context's tensors.
struct Tensors {
    Address in[LAYERS][3], out[LAYERS], sequences, lengths, token[LAYERS + 1], workspace;
    std::vector<Address> all;

    Address take(size_t bytes) {
        Address p = 0;
        REQUIRE(cuMemAlloc_v2(&p, bytes));
        all.push_back(p);
        return p;
    }
    Tensors(int rows, int n, size_t workspace_bytes) {
        for (int l = 0; l < LAYERS; l++) {
            in[l][0] = take(size_t(rows) * HEADS * DIM * 4), out[l] = take(size_t(rows) * HEADS * DIM * 4);
            in[l][1] = take(size_t(rows) * KV_HEADS * DIM * 2), in[l][2] = take(size_t(rows) * KV_HEADS * DIM * 2);
        }
        sequences = take(size_t(n) * 8), lengths = take(size_t(n) * 4), workspace = take(workspace_bytes);
        for (Address &t : token) t = take(4);
    }
    ~Tensors() {
        for (Address p : all) REQUIRE(cuMemFree_v2(p));
    }
};

static uint64_t state = 1;
static double uniform() {
    state = state * 6364136223846793005u + 1442695040888963407u;
    return double(state >> 11) * 0x1p-53 - 0.5;
}

// Rows of a step, on the host.
struct Rows {
    std::vector<float> q[LAYERS];
    std::vector<uint16_t> k[LAYERS], v[LAYERS];

    explicit Rows(int n) {
        for (int l = 0; l < LAYERS; l++) {
            q[l].resize(size_t(n) * HEADS * DIM), k[l].resize(size_t(n) * KV_HEADS * DIM), v[l].resize(k[l].size());
            for (float &x : q[l]) x = float(6 * uniform());
            for (auto *rows : {&k[l], &v[l]}) // magnitudes from 1/8 to 2
                for (uint16_t &x : *rows)
                    x = uint16_t((uniform() < 0 ? 0x8000 : 0) | (0x3000 + int((uniform() + 0.5) * 0xfff)));
        }
    }
    // Row i alone.
    Rows of(int i) const {
        Rows one(1);
        for (int l = 0; l < LAYERS; l++) {
            std::copy_n(q[l].begin() + i * HEADS * DIM, HEADS * DIM, one.q[l].begin());
            std::copy_n(k[l].begin() + i * KV_HEADS * DIM, KV_HEADS * DIM, one.k[l].begin());
            std::copy_n(v[l].begin() + i * KV_HEADS * DIM, KV_HEADS * DIM, one.v[l].begin());
        }
        return one;
    }
    void upload(Tensors &t, cudaStream_t stream) const {
        for (int l = 0; l < LAYERS; l++) {
            REQUIRE(cuMemcpyHtoDAsync_v2(t.in[l][0], q[l].data(), q[l].size() * 4, stream));
            REQUIRE(cuMemcpyHtoDAsync_v2(t.in[l][1], k[l].data(), k[l].size() * 2, stream));
            REQUIRE(cuMemcpyHtoDAsync_v2(t.in[l][2], v[l].data(), v[l].size() * 2, stream));
        }
    }
};

static inline std::vector<float> outputs(Tensors const &t, int layer, int rows, cudaStream_t stream) {
    std::vector<float> out(size_t(rows) * HEADS * DIM);
    REQUIRE(cuMemcpyDtoHAsync_v2(out.data(), t.out[layer], out.size() * 4, stream));
    REQUIRE(cuStreamSynchronize(stream));
    return out;
}

static inline int64_t length(akv_cache *cache, akv_sequence s) {
    int64_t n = -1;
    REQUIRE(akv_sequence_length(cache, s, -1, &n));
    return n;
}

static inline bool same(std::vector<float> const &a, std::vector<float> const &b) {
    return a.size() == b.size() && memcmp(a.data(), b.data(), a.size() * 4) == 0;
}

// The library without the plugin.
struct Direct {
    akv_cache *cache;
    akv_batch *batch;
    akv_sequence sequences[SEQUENCES];
    Tensors tensors{PROMPT, SEQUENCES, 256};
    cudaStream_t stream = nullptr;

    Direct(akv_context *context, akv_cache_desc const &desc) {
        akv_batch_desc bounds{};
        bounds.struct_size = sizeof bounds;
        REQUIRE(akv_cache_create(context, &desc, &cache));
        REQUIRE(akv_batch_create(cache, &bounds, &batch));
        for (akv_sequence &s : sequences) REQUIRE(akv_sequence_create(cache, &s));
        REQUIRE(cuStreamCreate(&stream, 0));
    }
    ~Direct() {
        REQUIRE(akv_batch_destroy(batch));
        REQUIRE(akv_cache_destroy(cache));
        REQUIRE(cuStreamDestroy_v2(stream));
    }
    void step(Rows const &rows, int32_t const *n_new) {
        akv_batch_desc desc{};
        desc.struct_size = sizeof desc, desc.n_sequences = SEQUENCES, desc.sequences = sequences, desc.n_new = n_new;
        rows.upload(tensors, stream);
        REQUIRE(akv_batch_begin(batch, &desc, stream));
        for (int l = 0; l < LAYERS; l++) {
            auto p = [](Address a) { return reinterpret_cast<void *>(a); };
            akv_rows key{}, value{};
            key.data = p(tensors.in[l][1]), value.data = p(tensors.in[l][2]);
            key.dtype = value.dtype = AKV_F16;
            akv_attention_desc a{};
            a.struct_size = sizeof a, a.q.data = p(tensors.in[l][0]), a.out.data = p(tensors.out[l]),
            a.tolerance = 2e-3f, a.stream = stream;
            REQUIRE(akv_quantize_kv(batch, l, &key, &value, stream));
            REQUIRE(akv_aligned_attention(batch, l, &a));
        }
        REQUIRE(akv_batch_commit(batch));
    }
};
