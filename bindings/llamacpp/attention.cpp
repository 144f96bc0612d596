#include "attention.hpp"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <thread>

#if defined(__x86_64__) || defined(_M_X64)
#include <immintrin.h>
#define AKV_GGML_PAUSE() _mm_pause()
#else
#define AKV_GGML_PAUSE() ((void) 0)
#endif

namespace akv_ggml {

namespace {

constexpr size_t  max_masks   = 4;     // of one graph: all cells, sliding windows
constexpr int64_t mask_step   = 4096;  // masks grow by so many cells
constexpr int64_t serial_work = 16384; // scores below which one thread is faster than waking others

// Threads of one call, which enters it a few times. They are running already: spin, and yield when one is late.
struct barrier {
    std::atomic<int> arrived{0};
    std::atomic<int> round{0};

    void wait(int n) {
        const int now = round.load(std::memory_order_relaxed);
        if (arrived.fetch_add(1, std::memory_order_acq_rel) == n - 1) {
            arrived.store(0, std::memory_order_relaxed);
            round.store(now + 1, std::memory_order_release);
            return;
        }
        for (int spins = 0; round.load(std::memory_order_acquire) == now; spins++) {
            if (spins < 2000) {
                AKV_GGML_PAUSE();
            } else {
                std::this_thread::yield();
            }
        }
    }
};

// As ggml's kernels have it.
std::vector<float> alibi_slopes(int64_t n_heads, float max_bias) {
    const uint32_t log2 = 1u << uint32_t(floor(std::log2(double(n_heads))));
    const float m0 = powf(2.0f, -max_bias / log2);
    const float m1 = powf(2.0f, -(max_bias / 2.0f) / log2);
    std::vector<float> slopes(size_t(n_heads), 1.0f);
    for (uint32_t h = 0; h < n_heads; h++) {
        slopes[h] = h < log2 ? powf(m0, float(h + 1)) : powf(m1, float(2 * (h - log2) + 1));
    }
    return slopes;
}

} // namespace

// ---- The node -------------------------------------------------------------------------------------------------------

attention_node::attention_node(const ggml_tensor * node)
    : out(node), q(node->src[0]), mask(node->src[3]), sinks(node->src[4]) {
    memcpy(&scale, (const float *) node->op_params + 0, sizeof(float));
    memcpy(&max_bias, (const float *) node->op_params + 1, sizeof(float));
    memcpy(&softcap, (const float *) node->op_params + 2, sizeof(float));
    n_q       = q->ne[1];
    n_heads   = q->ne[2];
    n_streams = q->ne[3];
}

std::string attention_node::objection(const row_view & k, const row_view & v) const {
    if (k.rows.begin < v.rows.end && v.rows.begin < k.rows.end) {
        return "K and V share a tensor";
    }
    if (q->type != GGML_TYPE_F32 || q->nb[0] != sizeof(float) || out->type != GGML_TYPE_F32 || !ggml_is_contiguous(out)) {
        return "q or the output is not in rows of f32";
    }
    if (k.n_kv != v.n_kv || k.rows.n_heads != v.rows.n_heads || k.n_streams != v.n_streams || k.stream != v.stream ||
        k.rows.n_cells != v.rows.n_cells || k.rows.n_streams != v.rows.n_streams || k.n_streams != n_streams) {
        return "K, V and q differ in heads, cells or streams";
    }
    if (q->ne[0] != k.rows.dim || n_heads % k.rows.n_heads != 0) {
        return "q does not fit K";
    }
    if (scale == 0) {
        return "scale is 0";
    }
    if (mask && (mask->type != GGML_TYPE_F16 || mask->nb[0] != sizeof(ggml_fp16_t) || mask->ne[0] < k.n_kv || mask->ne[1] < n_q ||
                 mask->ne[2] != 1 || n_streams % mask->ne[3] != 0)) {
        return "the mask is not f16 rows that all heads share";
    }
    if (sinks && (sinks->type != GGML_TYPE_F32 || sinks->ne[0] != n_heads || !ggml_is_contiguous(sinks))) {
        return "the sinks are not an f32 per head";
    }
    return "";
}

akv_attention_desc attention_node::sketch(const settings & set) const {
    static const float present = 0;
    akv_attention_desc desc = {};
    desc.struct_size   = sizeof(desc);
    desc.q.dtype       = AKV_F32;
    desc.out.dtype     = AKV_F32;
    desc.scale         = scale;
    desc.logit_softcap = softcap;
    desc.tolerance     = set.tolerance;
    desc.mode          = set.mode;
    desc.alibi_slopes  = mask && max_bias > 0 ? &present : nullptr;
    desc.mask          = mask ? (const akv_mask *) &present : nullptr;
    desc.sink_logits   = sinks ? &present : nullptr;
    return desc;
}

// ---- Masks ----------------------------------------------------------------------------------------------------------

struct attention::mask_entry {
    akv_mask * made = nullptr;
    int64_t    max_rows = 0, max_kv = 0;
    int64_t    rows = 0, n_kv = 0;       // what it is set to: these rows, in `bytes`
    std::vector<ggml_fp16_t> values;
    uint64_t   used = 0;
};

// All layers of a graph look through the same few masks, but a graph says neither when it begins nor which mask has been
// seen before: their values do. Comparing them costs little beside attention.
const akv_mask * attention::mask(const attention_node & node, int64_t n_kv, std::string & why) {
    const ggml_tensor * m = node.mask;
    const int64_t rows = node.n_q * node.n_streams;
    const auto row = [&](int64_t r) {
        return (const char *) m->data + size_t(r % node.n_q) * m->nb[1] + size_t(r / node.n_q % m->ne[3]) * m->nb[3];
    };
    const size_t row_bytes = size_t(n_kv) * sizeof(ggml_fp16_t);
    mask_entry * oldest = nullptr;
    for (mask_entry & e : masks_) {
        if (e.rows == rows && e.n_kv == n_kv) {
            int64_t r = 0;
            while (r < rows && memcmp(row(r), &e.values[size_t(r * n_kv)], row_bytes) == 0) {
                r++;
            }
            if (r == rows) {
                e.used = ++clock_;
                return e.made;
            }
        }
        if (!oldest || e.used < oldest->used) {
            oldest = &e;
        }
    }
    if (masks_.size() < max_masks) {
        masks_.emplace_back();
        oldest = &masks_.back();
    }
    mask_entry & e = *oldest;
    e.rows = 0; // nothing, should setting fail
    if (!e.made || e.max_rows < rows || e.max_kv < n_kv) {
        if (e.made) {
            akv_mask_destroy(e.made);
            e.made = nullptr;
        }
        e.max_rows = rows;
        e.max_kv   = (n_kv + mask_step - 1) / mask_step * mask_step;
        if (akv_mask_create(context(), e.max_rows, e.max_kv, &e.made) != AKV_OK) {
            why = last_error();
            return nullptr;
        }
    }
    e.values.resize(size_t(rows * n_kv));
    for (int64_t r = 0; r < rows; r++) {
        memcpy(&e.values[size_t(r * n_kv)], row(r), row_bytes);
    }
    if (akv_mask_set(e.made, 0, rows, n_kv, e.values.data(), 0, nullptr) != AKV_OK) {
        why = last_error();
        return nullptr;
    }
    e.rows = rows;
    e.n_kv = n_kv;
    e.used = ++clock_;
    return e.made;
}

// ---- The call -------------------------------------------------------------------------------------------------------

struct attention::call {
    akv_cache *                   cache;
    const std::vector<akv_span> * spans;
    akv_attention_desc            desc;
    barrier                       meet;
    akv_status                    status;
    std::string                   error;
};

attention::attention(ggml_backend_t cpu) : cpu_(cpu) {
    ggml_init_params params = {};
    params.mem_size = ggml_tensor_overhead() + ggml_graph_overhead_custom(2, false) + 256;
    params.no_alloc = true;
    graph_context_  = ggml_init(params);
    graph_          = ggml_new_graph_custom(graph_context_, 2, false);
    node_           = ggml_custom_4d(graph_context_, GGML_TYPE_F32, 1, 1, 1, 1, nullptr, 0, on_thread, GGML_N_TASKS_MAX, nullptr);
    ggml_build_forward_expand(graph_, node_);
}

attention::~attention() {
    for (mask_entry & e : masks_) {
        if (e.made) {
            akv_mask_destroy(e.made);
        }
    }
    ggml_free(graph_context_);
}

void attention::on_thread(ggml_tensor *, int ith, int nth, void * user) {
    call & c = *(call *) user;
    struct seat { barrier * meet; int nth; } mine = {&c.meet, nth};
    akv_threads threads = {};
    threads.ith     = ith;
    threads.nth     = nth;
    threads.user    = &mine;
    threads.barrier = [](void * p) { ((seat *) p)->meet->wait(((seat *) p)->nth); };
    akv_attention_desc desc = c.desc;
    desc.threads = &threads;
    const akv_status status = akv_slots_attention(c.cache, 0, c.spans->data(), int32_t(c.spans->size()), &desc);
    if (ith == 0) {
        c.status = status;
        if (status != AKV_OK) {
            c.error = last_error();
        }
    }
}

bool attention::run(const attention_node & node, layer & l, const row_view & k, akv_stats & stats, std::string & why) {
    const int64_t start = ggml_time_us();
    const int64_t rows  = node.n_q * node.n_streams;
    const int64_t dim_k = k.rows.dim, dim_v = l.rows(value).dim;
    call c = {};
    c.cache = l.cache();
    c.desc  = node.sketch(l.set());
    c.desc.mask = nullptr;
    c.desc.q.data = node.q->data;
    c.desc.q.stride_row  = int64_t(node.q->nb[1]);
    c.desc.q.stride_head = int64_t(node.q->nb[2]);
    if (node.n_streams > 1 && node.q->nb[3] != size_t(node.n_q) * node.q->nb[1]) {
        // One stride cannot say where the rows of all streams lie.
        queries_.resize(size_t(rows * node.n_heads * dim_k));
        float * to = queries_.data();
        for (int64_t r = 0; r < rows; r++) {
            for (int64_t h = 0; h < node.n_heads; h++, to += dim_k) {
                memcpy(to, (const char *) node.q->data + size_t(r % node.n_q) * node.q->nb[1] + size_t(h) * node.q->nb[2] +
                               size_t(r / node.n_q) * node.q->nb[3], size_t(dim_k) * sizeof(float));
            }
        }
        c.desc.q.data = queries_.data();
        c.desc.q.stride_row = c.desc.q.stride_head = 0;
    }
    c.desc.out.data        = node.out->data;
    c.desc.out.stride_head = dim_v * int64_t(sizeof(float));
    c.desc.out.stride_row  = node.n_heads * c.desc.out.stride_head;

    std::vector<float> slopes;
    if (node.mask && node.max_bias > 0) {
        slopes = alibi_slopes(node.n_heads, node.max_bias);
        c.desc.alibi_slopes = slopes.data();
    }
    if (node.sinks) {
        c.desc.sink_logits = (const float *) node.sinks->data;
    }
    if (node.mask && !(c.desc.mask = mask(node, k.n_kv, why))) {
        return false;
    }
    std::vector<akv_span> spans;
    for (int64_t s = 0; s < node.n_streams; s++) {
        spans.push_back({int32_t(k.stream + s), int32_t(node.n_q), k.n_kv});
    }
    c.spans = &spans;
    stats = {};
    c.desc.stats = &stats;

    const bool serial = n_threads_ <= 1 || rows * node.n_heads * k.n_kv < serial_work;
    size_t bytes = 0, align = 0;
    if (akv_slots_workspace(l.cache(), k.n_kv, serial ? 1 : n_threads_, &bytes, &align) != AKV_OK) {
        why = last_error();
        return false;
    }
    if (workspace_.size() < bytes + align) {
        workspace_.assign((bytes + align) * 3 / 2, 0);
    }
    c.desc.workspace       = (void *) ((uintptr_t(workspace_.data()) + align - 1) / align * align);
    c.desc.workspace_bytes = bytes;

    if (serial) {
        on_thread(nullptr, 0, 1, &c);
    } else {
        ggml_custom_op_params params;
        memcpy(&params, node_->op_params, sizeof(params));
        params.userdata = &c;
        memcpy(node_->op_params, &params, sizeof(params));
        if (ggml_backend_graph_compute(cpu_, graph_) != GGML_STATUS_SUCCESS) {
            why = "ggml's CPU backend failed";
            return false;
        }
    }
    if (c.status != AKV_OK) {
        why = c.error;
        return false;
    }
    count.bytes_k += stats.bytes_k;
    count.bytes_v += stats.bytes_v;
    count.elements_k += stats.tokens * uint64_t(dim_k);
    count.elements_v += stats.tokens * uint64_t(dim_v);
    if (stats.dense_rows) {
        count.attention_dense++;
    } else {
        count.attention_progressive++;
        count.bytes_progressive += stats.bytes_k + stats.bytes_v;
        count.elements_progressive += stats.tokens * uint64_t(dim_k + dim_v);
    }
    count.us_attention += uint64_t(ggml_time_us() - start);
    return true;
}

} // namespace akv_ggml
