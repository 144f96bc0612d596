#include "peer.h"
#include "ggml-cpu.h"
#include "ggml.h"
#include <cmath>
#include <cstring>
#include <string>
#include <vector>

struct peer_pool {
    ggml_threadpool *pool;
    int n_threads;
};

struct peer_graph {
    ggml_context *ctx;
    ggml_cgraph *graph;
    ggml_cplan plan;
    std::vector<uint8_t> work;
    std::vector<uint16_t> mask;
    std::vector<ggml_tensor *> q, out;
};

namespace {

int type_of(const char *name) {
    const struct {
        const char *name;
        ggml_type type;
    } types[] = {{"f16", GGML_TYPE_F16}, {"bf16", GGML_TYPE_BF16}, {"q8_0", GGML_TYPE_Q8_0}, {"q4_0", GGML_TYPE_Q4_0}};
    for (auto &t : types)
        if (!strcmp(t.name, name)) return t.type;
    return -1;
}

size_t row_bytes(int type, int n) { return ggml_row_size(ggml_type(type), n); }

double bits(int type) { return 8.0 * ggml_type_size(ggml_type(type)) / ggml_blck_size(ggml_type(type)); }

void convert(int type, const float *from, void *to, int n) {
    ggml_get_type_traits_cpu(ggml_type(type))->from_float(from, to, n);
}

peer_pool *pool_create(int n_threads) {
    ggml_cpu_init();
    ggml_threadpool_params params = ggml_threadpool_params_default(n_threads);
    return new peer_pool{ggml_threadpool_new(&params), n_threads};
}

void pool_pause(peer_pool *pool) { ggml_threadpool_pause(pool->pool); }
void pool_resume(peer_pool *pool) { ggml_threadpool_resume(pool->pool); }

void pool_destroy(peer_pool *pool) {
    ggml_threadpool_free(pool->pool);
    delete pool;
}

ggml_tensor *rows(ggml_context *ctx, const peer_case *c, int type, int n, void *data, size_t row, size_t head) {
    ggml_tensor *t = ggml_new_tensor_3d(ctx, ggml_type(type), c->head_dim, n, c->n_kv_heads);
    t->data = data;
    t->nb[1] = row;
    t->nb[2] = head;
    t->nb[3] = head * c->n_kv_heads;
    return t;
}

// A node for every sequence, with its own length: kind to ggml, as llama.cpp pads all to the longest.
peer_graph *graph_create(const peer_case *c, peer_pool *pool, int type, void *const *k, void *const *v, size_t row, const size_t *head) {
    auto *g = new peer_graph{};
    ggml_init_params params{size_t(c->n_sequences + 1) * 8 * ggml_tensor_overhead() + ggml_graph_overhead_custom(64, false) +
                                size_t(c->n_sequences) * c->n_heads * c->head_dim * 2 * sizeof(float) + 65536,
                            nullptr, false};
    g->ctx = ggml_init(params);
    g->graph = ggml_new_graph_custom(g->ctx, 64, false);
    int longest = 0;
    for (int i = 0; i < c->n_sequences; i++) longest = c->lengths[i] > longest ? c->lengths[i] : longest;
    g->mask.assign(longest, 0); // llama.cpp always has one
    for (int i = 0; i < c->n_sequences; i++) {
        ggml_tensor *q = ggml_new_tensor_3d(g->ctx, GGML_TYPE_F32, c->head_dim, 1, c->n_heads);
        ggml_set_no_alloc(g->ctx, true);
        ggml_tensor *mask = ggml_new_tensor_2d(g->ctx, GGML_TYPE_F16, c->lengths[i], 1);
        mask->data = g->mask.data();
        ggml_tensor *tk = rows(g->ctx, c, type, c->lengths[i], k[i], row, head[i]);
        ggml_tensor *tv = rows(g->ctx, c, type, c->lengths[i], v[i], row, head[i]);
        ggml_set_no_alloc(g->ctx, false);
        ggml_tensor *out = ggml_flash_attn_ext(g->ctx, q, tk, tv, mask, 1.0f / std::sqrt(float(c->head_dim)), 0, 0);
        ggml_prec_set_acc(out, GGML_PREC_F32);
        ggml_build_forward_expand(g->graph, out);
        g->q.push_back(q);
        g->out.push_back(out);
    }
    g->plan = ggml_graph_plan(g->graph, pool->n_threads, pool->pool);
    g->work.resize(g->plan.work_size + 64);
    g->plan.work_data = g->work.data();
    return g;
}

int run(peer_graph *g, const float *q) {
    for (auto *t : g->q) {
        memcpy(t->data, q, ggml_nbytes(t));
        q += ggml_nelements(t);
    }
    return ggml_graph_compute(g->graph, &g->plan) == GGML_STATUS_SUCCESS;
}

void result(const peer_graph *g, float *out) {
    for (auto *t : g->out) {
        memcpy(out, t->data, ggml_nbytes(t));
        out += ggml_nelements(t);
    }
}

void graph_destroy(peer_graph *g) {
    ggml_free(g->ctx);
    delete g;
}

std::string describe() {
    std::string name = PEER_NAME " (";
    const struct {
        const char *name;
        int (*has)();
    } features[] = {{"AVX2", ggml_cpu_has_avx2},       {"FMA", ggml_cpu_has_fma},
                    {"F16C", ggml_cpu_has_f16c},       {"AVX512", ggml_cpu_has_avx512},
                    {"VNNI", ggml_cpu_has_avx512_vnni}, {"BF16", ggml_cpu_has_avx512_bf16},
                    {"AMX", ggml_cpu_has_amx_int8}};
    for (auto &f : features)
        if (f.has()) name += std::string(name.back() == '(' ? "" : " ") + f.name;
    return name + ")";
}

} // namespace

extern "C" __attribute__((visibility("default"))) const peer_api *peer_get(void) {
    static const std::string name = describe();
    static const peer_api api = {name.c_str(), type_of,      row_bytes,    bits, convert, pool_create,  pool_pause,
                                 pool_resume,  pool_destroy, graph_create, run,  result,  graph_destroy};
    return &api;
}
