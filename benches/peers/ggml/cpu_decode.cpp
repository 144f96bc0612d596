// One decode step, timed side by side: ggml's FLASH_ATTN_EXT in two builds, this library in several modes, and the
// machine's read bandwidth, all in one process, in turns, on the same K, V and q, none of it in a cache.
//
//   cpu_decode --input FILE --heads 32 --kv-heads 8 --dim 128 --lengths 32768 --threads 1 --peers LIST
//              [--rounds 9] [--seconds 8] [--data NAME] [--entropy X] [--peer-lib A.so,B.so]
//
// FILE: per sequence q f32 [heads][dim], K f16 [n][kv_heads][dim], V the same (see inputs.py). LIST:
//   ggml:TYPE:LAYOUT:BUILD     f16, bf16, q8_0, q4_0; llama (a token's heads together) or contiguous (a head's tokens
//                              together); native or portable
//   aligned:TOLERANCE[:ISA]    this library; exact[:ISA] and raw[:ISA] (rows as given) too; scan[:ISA]: plane 0 of K
//                              alone, at a tolerance that asks for no more
//   roof                       sums over memory
// Prints a JSON line for every peer.
#include "peer.h"
#include <alignedkv.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <dlfcn.h>
#include <fcntl.h>
#include <functional>
#include <immintrin.h>
#include <map>
#include <memory>
#include <string>
#include <sys/mman.h>
#include <sys/stat.h>
#include <thread>
#include <unistd.h>
#include <vector>

using std::string;
using std::vector;

[[noreturn]] static void fail(const string &what) {
    fprintf(stderr, "cpu_decode: %s\n", what.c_str());
    exit(1);
}

static void ok(akv_status status) {
    if (status == AKV_OK) return;
    char text[512];
    akv_last_error(text, sizeof text, nullptr);
    fail(string(akv_status_string(status)) + ": " + text);
}

static vector<string> split(const string &s, char by) {
    vector<string> parts;
    for (size_t at = 0; at <= s.size();) {
        size_t end = std::min(s.find(by, at), s.size());
        parts.push_back(s.substr(at, end - at));
        at = end + 1;
    }
    return parts;
}

// Bytes of the last cache of a core (sysconf adds up those of all).
static size_t last_cache() {
    size_t bytes = 32 << 20;
    if (FILE *f = fopen("/sys/devices/system/cpu/cpu0/cache/index3/size", "r")) {
        size_t k;
        if (fscanf(f, "%zuK", &k) == 1) bytes = std::max(bytes, k << 10);
        fclose(f);
    }
    return bytes;
}

static double now() {
    return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

static double quantile(vector<double> x, double q) {
    std::sort(x.begin(), x.end());
    double at = q * (x.size() - 1);
    size_t i = size_t(at);
    return i + 1 < x.size() ? x[i] + (at - i) * (x[i + 1] - x[i]) : x[i];
}

// ---- the step ----

struct Case {
    int heads, kv_heads, dim, threads;
    vector<int> lengths;
    vector<const float *> q;
    vector<const uint16_t *> k, v;
    vector<float> all_q; // of all sequences

    size_t n_kv() const {
        size_t n = 0;
        for (int x : lengths) n += x;
        return n;
    }
    size_t outputs() const { return lengths.size() * heads * dim; }
    double elements() const { return 2.0 * n_kv() * kv_heads * dim; }
    double f16_bytes() const { return 2 * elements(); }
};

static void read_rows(const uint16_t *from, float *to, int n) {
    for (int i = 0; i < n; i += 8)
        _mm256_storeu_ps(to + i, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i *>(from + i))));
}

// Attention in float64, and the mean entropy of its softmax.
static vector<double> truth(const Case &c, double &entropy) {
    vector<double> out(c.outputs());
    vector<double> entropies(c.lengths.size() * c.heads);
    std::atomic<size_t> next{0};
    auto work = [&] {
        vector<float> row(c.dim);
        for (size_t job; (job = next++) < c.lengths.size() * c.heads;) {
            size_t i = job / c.heads, h = job % c.heads, kv = h * c.kv_heads / c.heads, n = c.lengths[i];
            const float *q = c.q[i] + h * c.dim;
            vector<double> p(n);
            double most = -INFINITY, sum = 0, mean = 0;
            for (size_t t = 0; t < n; t++) {
                read_rows(c.k[i] + (t * c.kv_heads + kv) * c.dim, row.data(), c.dim);
                double s = 0;
                for (int d = 0; d < c.dim; d++) s += double(q[d]) * row[d];
                p[t] = s / std::sqrt(double(c.dim));
                most = std::max(most, p[t]);
            }
            for (double &x : p) mean += (x - most) * std::exp(x - most), x = std::exp(x - most), sum += x;
            entropies[job] = std::log(sum) - mean / sum;
            double *o = out.data() + job * c.dim;
            for (size_t t = 0; t < n; t++) {
                read_rows(c.v[i] + (t * c.kv_heads + kv) * c.dim, row.data(), c.dim);
                for (int d = 0; d < c.dim; d++) o[d] += p[t] / sum * row[d];
            }
        }
    };
    vector<std::thread> threads;
    for (unsigned i = 1; i < std::max(1u, std::thread::hardware_concurrency()); i++) threads.emplace_back(work);
    work();
    for (auto &t : threads) t.join();
    entropy = 0;
    for (double e : entropies) entropy += e / entropies.size();
    return out;
}

// ---- peers ----

struct Peer {
    string name, kv_type, layout, build, isa, path;
    double bits = 0, bytes = 0;    // per element; per call
    double bound = NAN, estimate = NAN; // the largest of all rows
    virtual ~Peer() = default;
    virtual void begin() {} // of a turn
    virtual void end() {}
    virtual void run(size_t copy) = 0;
    virtual bool result(vector<float> &) { return false; } // of the last call
};

struct Memory {
    char *data = nullptr;
    size_t bytes = 0;
    explicit Memory(size_t n) : bytes((n + 4095) & ~size_t(4095)) {
        void *p = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (p == MAP_FAILED) fail("no memory: " + std::to_string(n) + " bytes");
        data = static_cast<char *>(p);
    }
    Memory(const Memory &) = delete;
    ~Memory() { munmap(data, bytes); }
};

// K and V of all copies in one of ggml's types and layouts; both builds read the same.
struct GgmlRows {
    std::unique_ptr<Memory> memory;
    vector<vector<void *>> k, v; // [copy][sequence]
    vector<size_t> head;         // [sequence]: bytes from head to head
    size_t row;
    double bytes;
    GgmlRows(const Case &c, const peer_api *api, int type, bool contiguous, size_t copies) {
        size_t one = api->row_bytes(type, c.dim), per_copy = 2 * c.n_kv() * c.kv_heads * one;
        memory = std::make_unique<Memory>(copies * per_copy + 64);
        bytes = per_copy;
        row = contiguous ? one : one * c.kv_heads;
        for (int n : c.lengths) head.push_back(contiguous ? one * n : one);
        vector<float> x(c.dim);
        char *at = memory->data;
        for (size_t copy = 0; copy < copies; copy++) {
            k.emplace_back(), v.emplace_back();
            for (size_t i = 0; i < c.lengths.size(); i++)
                for (auto [from, to] : {std::pair{c.k[i], &k}, std::pair{c.v[i], &v}}) {
                    size_t size = size_t(c.lengths[i]) * c.kv_heads * one;
                    to->back().push_back(at);
                    if (copy > 0) {
                        memcpy(at, (from == c.k[i] ? k : v)[0][i], size);
                    } else {
                        for (int t = 0; t < c.lengths[i]; t++)
                            for (int h = 0; h < c.kv_heads; h++) {
                                read_rows(from + (size_t(t) * c.kv_heads + h) * c.dim, x.data(), c.dim);
                                api->convert(type, x.data(), at + t * row + h * head[i], c.dim);
                            }
                    }
                    at += size;
                }
        }
    }
};

struct Ggml : Peer {
    const Case &c;
    const peer_api *api;
    peer_pool *pool;
    std::shared_ptr<GgmlRows> rows;
    vector<peer_graph *> graphs;
    size_t last = 0;
    Ggml(const Case &c, const peer_api *api, peer_pool *pool, int type, std::shared_ptr<GgmlRows> rows) : c(c), api(api), pool(pool), rows(rows) {
        peer_case shape{c.heads, c.kv_heads, c.dim, int(c.lengths.size()), c.lengths.data()};
        for (size_t i = 0; i < rows->k.size(); i++)
            graphs.push_back(api->graph_create(&shape, pool, type, rows->k[i].data(), rows->v[i].data(), rows->row, rows->head.data()));
        bits = api->bits(type);
        bytes = rows->bytes;
    }
    ~Ggml() override {
        for (auto *g : graphs) api->graph_destroy(g);
    }
    void begin() override { api->pool_resume(pool); }
    void end() override { api->pool_pause(pool); }
    void run(size_t copy) override {
        last = copy;
        if (!api->run(graphs[copy], c.all_q.data())) fail(name + ": ggml failed");
    }
    bool result(vector<float> &out) override {
        api->result(graphs[last], out.data());
        return true;
    }
};

// A context and a cache of this library with all copies in it; peers that differ in how they read share it.
struct Ours {
    const Case &c;
    akv_context *context = nullptr;
    akv_cache *cache = nullptr;
    akv_batch *batch = nullptr;
    vector<vector<akv_sequence>> sequences; // [copy]
    Ours(const Case &c, int isa, int format, size_t copies) : c(c) {
        akv_context_desc machine{};
        machine.struct_size = sizeof machine, machine.abi_version = AKV_ABI_VERSION;
        machine.isa = isa, machine.n_threads = c.threads;
        ok(akv_context_create(&machine, &context));
        akv_layer_desc layer{};
        layer.n_q_heads = c.heads, layer.n_kv_heads = c.kv_heads, layer.dim_k = c.dim;
        layer.dtype_k = layer.dtype_v = AKV_F16;
        akv_cache_desc desc{};
        desc.struct_size = sizeof desc, desc.n_layers = 1, desc.layers = &layer, desc.format = format;
        ok(akv_cache_create(context, &desc, &cache));
        akv_batch_desc bounds{};
        bounds.struct_size = sizeof bounds, bounds.max_sequences = c.lengths.size();
        ok(akv_batch_create(cache, &bounds, &batch));
        for (size_t copy = 0; copy < copies; copy++) {
            sequences.emplace_back();
            for (size_t i = 0; i < c.lengths.size(); i++) {
                akv_sequence s;
                ok(akv_sequence_create(cache, &s));
                sequences.back().push_back(s);
                for (int first = 0; first < c.lengths[i]; first += 4096) {
                    int32_t n_new = std::min(4096, c.lengths[i] - first), n_q = 0;
                    size_t at = size_t(first) * c.kv_heads * c.dim;
                    akv_rows k{}, v{};
                    k.data = const_cast<uint16_t *>(c.k[i] + at), v.data = const_cast<uint16_t *>(c.v[i] + at);
                    k.dtype = v.dtype = AKV_F16;
                    akv_batch_desc step{};
                    step.struct_size = sizeof step, step.n_sequences = 1;
                    step.sequences = &s, step.n_new = &n_new, step.n_q = &n_q;
                    ok(akv_batch_begin(batch, &step, nullptr));
                    ok(akv_quantize_kv(batch, 0, &k, &v, nullptr));
                    ok(akv_batch_commit(batch));
                }
            }
        }
    }
    ~Ours() {
        akv_batch_destroy(batch);
        akv_cache_destroy(cache);
        akv_context_destroy(context);
    }
};

struct Aligned : Peer {
    const Case &c;
    std::shared_ptr<Ours> ours;
    akv_attention_desc attention{};
    akv_stats stats{};
    vector<float> out, bounds, estimates;
    vector<int32_t> none, one;
    Aligned(const Case &c, std::shared_ptr<Ours> ours, float tolerance, int mode)
        : c(c), ours(ours), out(c.outputs()), bounds(c.lengths.size() * c.heads), estimates(bounds), none(c.lengths.size(), 0),
          one(c.lengths.size(), 1) {
        attention.struct_size = sizeof attention;
        attention.q.data = const_cast<float *>(c.all_q.data()), attention.q.dtype = AKV_F32;
        attention.out.data = out.data(), attention.out.dtype = AKV_F32;
        attention.tolerance = tolerance, attention.mode = mode;
        attention.bound = bounds.data(), attention.estimate = estimates.data(), attention.stats = &stats;
    }
    void run(size_t copy) override {
        akv_batch_desc step{};
        step.struct_size = sizeof step, step.n_sequences = c.lengths.size();
        step.sequences = ours->sequences[copy].data(), step.n_new = none.data(), step.n_q = one.data();
        ok(akv_batch_begin(ours->batch, &step, nullptr));
        ok(akv_aligned_attention(ours->batch, 0, &attention));
        ok(akv_batch_abort(ours->batch));
    }
    bool result(vector<float> &to) override {
        to = out;
        bytes = double(stats.bytes_k) + double(stats.bytes_v);
        bits = 8 * bytes / (2.0 * stats.tokens * c.dim);
        path = stats.path & AKV_PATH_PROGRESSIVE ? "progressive" : "dense";
        isa = stats.isa == AKV_ISA_AVX512 ? "avx512" : stats.isa == AKV_ISA_AVX2 ? "avx2" : "scalar";
        bound = *std::max_element(bounds.begin(), bounds.end());
        estimate = *std::max_element(estimates.begin(), estimates.end());
        return true;
    }
};

// Every thread sums its part of a buffer that no cache holds.
struct Roof : Peer {
    int threads;
    Memory memory;
    std::atomic<int> go{0}, done{0};
    std::atomic<bool> stop{false}, busy{false};
    vector<std::thread> workers;
    volatile int sink = 0;
    Roof(int threads, size_t bytes) : threads(threads), memory(bytes) {
        memset(memory.data, 1, memory.bytes);
        this->bytes = memory.bytes / threads / 4096 * 4096 * threads;
        for (int i = 1; i < threads; i++)
            workers.emplace_back([this, i] {
                for (int seen = 0; !stop;) {
                    if (go == seen) {
                        if (!busy) std::this_thread::sleep_for(std::chrono::microseconds(200));
                        continue;
                    }
                    seen = go;
                    sum(i);
                    done++;
                }
            });
    }
    ~Roof() override {
        stop = true;
        for (auto &w : workers) w.join();
    }
    void sum(int i) {
        size_t n = memory.bytes / threads / 4096 * 4096;
        const char *p = memory.data + i * n;
        __m256i s[8] = {};
        for (size_t at = 0; at < n; at += sizeof s)
            for (int j = 0; j < 8; j++) s[j] = _mm256_add_epi32(s[j], _mm256_load_si256(reinterpret_cast<const __m256i *>(p + at + 32 * j)));
        for (int j = 1; j < 8; j++) s[0] = _mm256_add_epi32(s[0], s[j]);
        sink = sink + _mm256_extract_epi32(s[0], 0);
    }
    void begin() override { busy = true; }
    void end() override { busy = false; }
    void run(size_t) override {
        done = 0;
        go++;
        sum(0);
        while (done < threads - 1) _mm_pause();
    }
};

// ---- the program ----

static string number(double x) {
    if (!std::isfinite(x)) return "null";
    char text[32];
    snprintf(text, sizeof text, "%.6g", x);
    return text;
}

int main(int argc, char **argv) {
    std::map<string, string> args{{"rounds", "9"}, {"seconds", "8"}, {"data", ""}, {"entropy", ""}, {"threads", "1"}, {"peer-lib", ""}};
    for (int i = 1; i + 1 < argc; i += 2) args[argv[i] + 2] = argv[i + 1];
    for (auto *needed : {"input", "heads", "kv-heads", "dim", "lengths", "peers"})
        if (!args.count(needed)) fail(string("--") + needed + " is missing");

    Case c{};
    c.heads = stoi(args["heads"]), c.kv_heads = stoi(args["kv-heads"]), c.dim = stoi(args["dim"]), c.threads = stoi(args["threads"]);
    for (auto &n : split(args["lengths"], ',')) c.lengths.push_back(stoi(n));
    int file = open(args["input"].c_str(), O_RDONLY);
    struct stat st {};
    if (file < 0 || fstat(file, &st) != 0) fail("cannot open " + args["input"]);
    size_t want = c.lengths.size() * c.heads * c.dim * 4 + 4 * c.n_kv() * c.kv_heads * c.dim;
    if (size_t(st.st_size) != want) fail(args["input"] + " has " + std::to_string(st.st_size) + " bytes: expected " + std::to_string(want));
    auto *at = static_cast<const char *>(mmap(nullptr, want, PROT_READ, MAP_PRIVATE, file, 0));
    if (at == MAP_FAILED) fail("cannot map " + args["input"]);
    for (int n : c.lengths) {
        size_t size = size_t(n) * c.kv_heads * c.dim * 2;
        c.q.push_back(reinterpret_cast<const float *>(at)), at += size_t(c.heads) * c.dim * 4;
        c.k.push_back(reinterpret_cast<const uint16_t *>(at)), at += size;
        c.v.push_back(reinterpret_cast<const uint16_t *>(at)), at += size;
        c.all_q.insert(c.all_q.end(), c.q.back(), c.q.back() + c.heads * c.dim);
    }

    // As many copies as no cache holds, in any of the types.
    size_t cache = last_cache();
    size_t copies = std::max<size_t>(2, std::ceil(std::max<double>(512 << 20, 16.0 * cache) / c.f16_bytes()));

    std::map<string, const peer_api *> builds;
    std::map<string, peer_pool *> pools;
    for (auto &path : split(args["peer-lib"], ',')) {
        if (path.empty()) continue;
        void *lib = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
        auto get = lib ? reinterpret_cast<const peer_api *(*)()>(dlsym(lib, "peer_get")) : nullptr;
        if (!get) fail(dlerror());
        string name = get()->name;
        string key = name.substr(0, name.find_first_of(": "));
        builds[key] = get();
        pools[key] = get()->pool_create(c.threads);
        get()->pool_pause(pools[key]);
    }

    fprintf(stderr, "%d/%d heads, d %d, %s tokens: %zu copies\n", c.heads, c.kv_heads, c.dim, args["lengths"].c_str(), copies);
    std::map<string, std::shared_ptr<GgmlRows>> rows;
    std::map<string, std::shared_ptr<Ours>> caches;
    vector<std::unique_ptr<Peer>> peers;
    for (auto &spec : split(args["peers"], ',')) {
        auto part = split(spec, ':');
        string kind = part[0];
        std::unique_ptr<Peer> peer;
        if (kind == "ggml") {
            if (part.size() != 4) fail(spec + ": expected ggml:TYPE:LAYOUT:BUILD");
            if (!builds.count(part[3])) fail(spec + ": no such build in --peer-lib");
            auto *api = builds[part[3]];
            int type = api->type(part[1].c_str());
            if (type < 0) fail(spec + ": unknown type");
            auto &shared = rows[part[1] + part[2]];
            if (!shared) shared = std::make_shared<GgmlRows>(c, api, type, part[2] == "contiguous", copies);
            peer = std::make_unique<Ggml>(c, api, pools[part[3]], type, shared);
            peer->kv_type = part[1], peer->layout = part[2], peer->build = api->name;
        } else if (kind == "roof") {
            peer = std::make_unique<Roof>(c.threads, std::max<size_t>(256 << 20, 8 * cache));
            peer->build = "this program";
        } else {
            if (kind != "aligned" && kind != "exact" && kind != "raw" && kind != "scan") fail(spec + ": unknown peer");
            size_t isa_at = kind == "aligned" ? 2 : 1;
            string name = part.size() > isa_at ? part[isa_at] : "";
            int isa = name == "avx512" ? AKV_ISA_AVX512 : name == "avx2" ? AKV_ISA_AVX2 : name == "scalar" ? AKV_ISA_SCALAR : 0;
            int format = kind == "raw" ? AKV_FORMAT_RAW : AKV_FORMAT_ALIGNED;
            auto &shared = caches[(format == AKV_FORMAT_RAW ? "raw" : "aligned") + name];
            if (!shared) shared = std::make_shared<Ours>(c, isa, format, copies);
            float tolerance = kind == "aligned" ? stof(part.at(1)) : kind == "scan" ? 1e3f : 0;
            peer = std::make_unique<Aligned>(c, shared, tolerance, kind == "exact" ? AKV_EXACT : AKV_EXPECTED);
            peer->kv_type = format == AKV_FORMAT_RAW ? "f16" : "aligned", peer->layout = "library", peer->build = "alignedkv";
        }
        peer->name = spec;
        peers.push_back(std::move(peer));
    }

    double entropy;
    vector<double> want_out = truth(c, entropy);
    size_t n = peers.size(), head = c.dim;
    vector<double> error(n, NAN), error_max(n, NAN);
    for (size_t i = 0; i < n; i++) {
        vector<float> out(c.outputs());
        peers[i]->begin();
        peers[i]->run(0);
        peers[i]->end();
        if (!peers[i]->result(out)) continue;
        double off = 0, all = 0, worst = 0;
        for (size_t h = 0; h < out.size(); h += head) {
            double o = 0, a = 0;
            for (size_t d = h; d < h + head; d++) o += (out[d] - want_out[d]) * (out[d] - want_out[d]), a += want_out[d] * want_out[d];
            off += o, all += a, worst = std::max(worst, std::sqrt(o / a));
        }
        error[i] = std::sqrt(off / all), error_max[i] = worst;
    }

    // Turns: a call that is not timed, on data that the timed ones do not touch, so that threads are awake.
    vector<vector<double>> times(n);
    vector<size_t> calls(n, 1), next(n, 1);
    double start = now(), seconds = stod(args["seconds"]);
    int rounds = stoi(args["rounds"]);
    for (int round = 0; round < rounds && (round < 3 || now() - start < seconds); round++)
        for (size_t j = 0; j < n; j++) {
            size_t i = (j + round) % n;
            auto &peer = *peers[i];
            peer.begin();
            peer.run(next[i]++ % copies);
            double t = now();
            for (size_t k = 0; k < calls[i]; k++) peer.run(next[i]++ % copies);
            t = (now() - t) / calls[i];
            peer.end();
            times[i].push_back(t);
            calls[i] = std::clamp<size_t>(std::ceil(0.02 / t), 1, copies > 1 ? 4 * copies : 1);
        }

    // The build of ggml that is faster here.
    vector<double> *base = nullptr;
    for (size_t i = 0; i < n; i++)
        if (peers[i]->kv_type == "f16" && peers[i]->layout == "llama" && (!base || quantile(times[i], 0.5) < quantile(*base, 0.5))) base = &times[i];
    string lengths;
    for (int x : c.lengths) lengths += (lengths.empty() ? "" : ", ") + std::to_string(x);
    for (size_t i = 0; i < n; i++) {
        auto &p = *peers[i];
        vector<double> ratio;
        for (size_t r = 0; base && r < times[i].size(); r++) ratio.push_back((*base)[r] / times[i][r]);
        double t = quantile(times[i], 0.5);
        printf("{\"peer\": \"%s\", \"kv_type\": \"%s\", \"layout\": \"%s\", \"build\": \"%s\", \"data\": \"%s\", \"entropy\": %s, \"n_heads\": %d, "
               "\"n_kv_heads\": %d, \"head_dim\": %d, \"n_kv\": %zu, \"lengths\": [%s], \"batch\": %zu, \"threads\": %d, \"isa\": \"%s\", "
               "\"path\": \"%s\", \"us\": %s, \"us_q1\": %s, \"us_q3\": %s, \"rounds\": %zu, \"copies\": %zu, \"speedup_vs_ggml_f16\": %s, "
               "\"rel_l2\": %s, \"rel_l2_max\": %s, \"bound\": %s, \"estimate\": %s, \"bits_per_element\": %s, \"gb_per_s\": %s}\n",
               p.name.c_str(), p.kv_type.c_str(), p.layout.c_str(), p.build.c_str(), args["data"].c_str(), number(entropy).c_str(), c.heads,
               c.kv_heads, c.dim, c.n_kv(), lengths.c_str(), c.lengths.size(), c.threads, p.isa.c_str(), p.path.c_str(), number(t * 1e6).c_str(),
               number(quantile(times[i], 0.25) * 1e6).c_str(), number(quantile(times[i], 0.75) * 1e6).c_str(), times[i].size(), copies,
               number(base && p.name != "roof" ? quantile(ratio, 0.5) : NAN).c_str(), number(error[i]).c_str(), number(error_max[i]).c_str(),
               number(p.bound).c_str(), number(p.estimate).c_str(), number(p.bits > 0 ? p.bits : NAN).c_str(), number(p.bytes / t / 1e9).c_str());
    }
    peers.clear();
    for (auto &[name, pool] : pools) builds[name]->pool_destroy(pool);
}
