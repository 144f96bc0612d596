// libalignedkv as a ggml backend: a device that owns the KV cache of an unmodified llama.cpp and computes attention over
// it. Weights and everything else stay on the CPU backend. See README.md.
#include "ggml-alignedkv.h"

#include "attention.hpp"
#include "storage.hpp"

#include "ggml-backend-impl.h"
#include "ggml-version.h"

#include <algorithm>
#include <cstring>
#include <exception>
#include <set>

using namespace akv_ggml;

namespace {

ggml_backend_buffer_type_t buffer_type();
ggml_backend_dev_t device();
ggml_backend_reg_t registry();

ggml_backend_dev_t cpu_device() {
    return ggml_backend_dev_by_type(GGML_BACKEND_DEVICE_TYPE_CPU);
}

// ---- Buffers --------------------------------------------------------------------------------------------------------

storage & memory(ggml_backend_buffer_t buffer) {
    return *(storage *) buffer->context;
}

const ggml_backend_buffer_i buffer_interface = {
    /* .free_buffer   = */ [](ggml_backend_buffer_t b) { delete &memory(b); },
    /* .get_base      = */ [](ggml_backend_buffer_t b) { return (void *) memory(b).base(); },
    /* .init_tensor   = */ nullptr,
    /* .memset_tensor = */ [](ggml_backend_buffer_t b, ggml_tensor * t, uint8_t byte, size_t offset, size_t n) {
        memory(b).fill((char *) t->data + offset, byte, n);
    },
    /* .set_tensor    = */ [](ggml_backend_buffer_t b, ggml_tensor * t, const void * data, size_t offset, size_t n) {
        memory(b).set((char *) t->data + offset, data, n);
    },
    /* .get_tensor    = */ [](ggml_backend_buffer_t b, const ggml_tensor * t, void * data, size_t offset, size_t n) {
        memory(b).get((const char *) t->data + offset, data, n);
    },
    /* .set_tensor_2d = */ nullptr,
    /* .get_tensor_2d = */ nullptr,
    /* .cpy_tensor    = */ [](ggml_backend_buffer_t b, const ggml_tensor * from, ggml_tensor * to) {
        const ggml_tensor * root = from->view_src ? from->view_src : from;
        return root->buffer == b && memory(b).copy(from, to);
    },
    /* .clear         = */ [](ggml_backend_buffer_t b, uint8_t byte) { memory(b).clear(byte); },
    /* .reset         = */ nullptr,
};

ggml_backend_buffer_t alloc_buffer(ggml_backend_buffer_type_t buft, size_t size) {
    std::unique_ptr<storage> made = storage::create(size);
    if (!made) {
        AKV_LOG_ERROR_("no memory for a buffer of %zu bytes\n", size);
        return nullptr;
    }
    return ggml_backend_buffer_init(buft, buffer_interface, made.release(), size);
}

ggml_backend_buffer_type_t buffer_type() {
    static ggml_backend_buffer_type type = {
        /* .iface   = */ {
            /* .get_name       = */ [](ggml_backend_buffer_type_t) { return "AlignedKV"; },
            /* .alloc_buffer   = */ alloc_buffer,
            /* .get_alignment  = */ [](ggml_backend_buffer_type_t) { return size_t(64); },
            /* .get_max_size   = */ nullptr,
            /* .get_alloc_size = */ nullptr,
            /* .is_host        = */ nullptr, // rows may live elsewhere
        },
        /* .device  = */ device(),
        /* .context = */ nullptr,
    };
    return &type;
}

const ggml_tensor * root_of(const ggml_tensor * t) {
    return t->view_src ? t->view_src : t;
}

// The memory behind a tensor, if it lies in one of our buffers that lasts: what the scheduler allocates for a graph is
// reused by other tensors.
storage * lasting(const ggml_tensor * t) {
    const ggml_backend_buffer_t b = root_of(t)->buffer;
    return b && b->buft == buffer_type() && b->size > 0 && b->usage != GGML_BACKEND_BUFFER_USAGE_COMPUTE ? &memory(b) : nullptr;
}

// ---- Graphs ---------------------------------------------------------------------------------------------------------

class executor {
  public:
    explicit executor(ggml_backend_t cpu) : attention_(cpu), cpu_(cpu) {}
    ~executor();

    ggml_status compute(ggml_cgraph * graph);

    ggml_backend_t cpu() const { return cpu_.get(); }
    attention attention_;

  private:
    // Rows that an op of ggml's needs in the tensor's memory.
    struct borrowed {
        storage * home;
        layer *   owner;
        half      h;
        int64_t   first, n;
        bool      written;
        std::vector<char> before;
    };

    enum class outcome { done, delegate };
    outcome attend(const ggml_tensor * node);
    outcome set_rows(const ggml_tensor * node);
    std::vector<borrowed> borrows(ggml_tensor * node);
    ggml_status compute_plain(ggml_cgraph * graph, int first, int end);
    ggml_status compute_borrowing(ggml_cgraph * graph, int i, std::vector<borrowed> & rows);
    void written(const ggml_tensor * node);
    void say_once(const std::string & what);

    struct free_backend { void operator()(ggml_backend_t b) const { ggml_backend_free(b); } };
    std::unique_ptr<ggml_backend, free_backend> cpu_;
    std::set<std::string>    said_;
    std::vector<ggml_fp16_t> rows_;
    std::vector<int64_t>     slots_;
};

executor::~executor() {
    const uint64_t progressive = count.attention_progressive, dense = count.attention_dense;
    if (progressive + dense > 0) {
        const uint64_t elements = count.elements_progressive;
        AKV_LOG_INFO_("so far %llu attention calls by digits, of which an element took %.2f bits, %llu densely, %llu by ggml; "
                      "%.1f ms in attention, %.1f ms in writing rows\n",
                      (unsigned long long) progressive, elements ? 8.0 * double(count.bytes_progressive) / double(elements) : 0.0,
                      (unsigned long long) dense, (unsigned long long) count.attention_delegated,
                      double(count.us_attention) / 1e3, double(count.us_write) / 1e3);
    }
}

void executor::say_once(const std::string & what) {
    if (said_.insert(what).second) {
        AKV_LOG_WARN_("%s\n", what.c_str());
    }
}

bool does_nothing(const ggml_tensor * node) {
    return ggml_op_is_empty(node->op) || ggml_is_empty(node) || !(node->flags & GGML_TENSOR_FLAG_COMPUTE);
}

ggml_status executor::compute(ggml_cgraph * graph) {
    int first = 0; // of the nodes that wait to run on the CPU backend together
    for (int i = 0; i < graph->n_nodes; i++) {
        ggml_tensor * node = graph->nodes[i];
        if (does_nothing(node)) {
            continue;
        }
        const bool is_attention = node->op == GGML_OP_FLASH_ATTN_EXT, is_set_rows = node->op == GGML_OP_SET_ROWS;
        std::vector<borrowed> rows;
        if (!is_attention && !is_set_rows && (rows = borrows(node)).empty()) {
            continue;
        }
        // What waits may be what this node needs.
        ggml_status status = compute_plain(graph, first, i);
        if (status != GGML_STATUS_SUCCESS) {
            return status;
        }
        first = i;
        if ((is_attention && attend(node) == outcome::done) || (is_set_rows && set_rows(node) == outcome::done)) {
            first = i + 1;
            continue;
        }
        if (is_attention || is_set_rows) {
            rows = borrows(node);
        }
        if (!rows.empty()) {
            if ((status = compute_borrowing(graph, i, rows)) != GGML_STATUS_SUCCESS) {
                return status;
            }
            first = i + 1;
        }
    }
    return compute_plain(graph, first, graph->n_nodes);
}

ggml_status executor::compute_plain(ggml_cgraph * graph, int first, int end) {
    while (first < end && does_nothing(graph->nodes[first])) {
        first++;
    }
    if (first >= end) {
        return GGML_STATUS_SUCCESS;
    }
    ggml_cgraph part = ggml_graph_view(graph, first, end);
    const ggml_status status = ggml_backend_graph_compute(cpu_.get(), &part);
    for (int i = first; i < end; i++) {
        const ggml_tensor * node = graph->nodes[i];
        if (does_nothing(node)) {
            continue;
        }
        count.ops_delegated++;
        if (node->op == GGML_OP_FLASH_ATTN_EXT) {
            count.attention_delegated++;
        }
        if (log_level() >= 2 && said_.insert(ggml_op_desc(node)).second) {
            AKV_LOG_TRACE_("%s runs on ggml's CPU backend\n", ggml_op_desc(node));
        }
        written(node);
    }
    return status;
}

// Notes what a node has written to plain memory.
void executor::written(const ggml_tensor * node) {
    storage * s = lasting(node);
    if (!s) {
        return;
    }
    const std::lock_guard<std::mutex> lock(s->mutex);
    const ggml_tensor * index = node->src[1];
    if (node->op != GGML_OP_SET_ROWS || index->ne[1] != 1 || index->ne[2] != 1 || node->ne[2] != 1 || node->ne[3] != 1) {
        s->wrote(node->data, ggml_nbytes(node));
        return;
    }
    for (int64_t i = 0; i < index->ne[0]; i++) {
        const char * at = (const char *) index->data + size_t(i) * index->nb[0];
        const int64_t row = index->type == GGML_TYPE_I64 ? *(const int64_t *) at : *(const int32_t *) at;
        s->wrote((const char *) node->data + size_t(row) * node->nb[1], ggml_row_size(node->type, node->ne[0]));
    }
}

std::vector<executor::borrowed> executor::borrows(ggml_tensor * node) {
    std::vector<borrowed> all;
    for (int i = -1; i < GGML_MAX_SRC; i++) {
        const ggml_tensor * t = i < 0 ? node : node->src[i];
        storage * s = t ? lasting(t) : nullptr;
        if (!s || s->empty()) {
            continue;
        }
        half h;
        layer * l = s->find(t->data, h);
        if (!l || l->plain() || l->memory_is_truth()) {
            continue;
        }
        const row_layout & rows = l->rows(h);
        const size_t begin = size_t((const char *) t->data - rows.begin), row = rows.row_bytes();
        const int64_t first = int64_t(begin / row), end = int64_t((begin + ggml_nbytes(t) + row - 1) / row);
        auto same = std::find_if(all.begin(), all.end(), [&](const borrowed & b) { return b.owner == l && b.h == h; });
        if (same == all.end()) {
            all.push_back({s, l, h, first, end - first, i < 0, {}});
        } else {
            const int64_t last = std::max(same->first + same->n, end);
            same->first = std::min(same->first, first);
            same->n     = last - same->first;
        }
    }
    return all;
}

// Runs a node of ggml's over rows that are not in memory: they are put there, and those that it changed are written
// back. A row that comes out as it went in keeps its digits.
ggml_status executor::compute_borrowing(ggml_cgraph * graph, int i, std::vector<borrowed> & all) {
    for (borrowed & b : all) {
        const std::lock_guard<std::mutex> lock(b.home->mutex);
        char * at = b.owner->rows(b.h).row(b.first);
        const size_t bytes = size_t(b.n) * b.owner->rows(b.h).row_bytes();
        if (!b.owner->plain() && !b.owner->read(b.h, b.first, b.n, (ggml_fp16_t *) at)) {
            b.owner->make_plain(last_error());
        }
        if (b.written) {
            b.before.assign(at, at + bytes);
        }
    }
    const ggml_status status = compute_plain(graph, i, i + 1);
    for (borrowed & b : all) {
        const std::lock_guard<std::mutex> lock(b.home->mutex);
        layer & l = *b.owner;
        if (l.plain()) {
            continue;
        }
        char * const begin = l.rows(b.h).row(b.first);
        const size_t row = l.rows(b.h).row_bytes();
        bool kept = true;
        for (int64_t r = 0, end; b.written && kept && r < b.n; r = end) {
            end = r + 1;
            const auto same = [&](int64_t at) { return memcmp(begin + size_t(at) * row, b.before.data() + size_t(at) * row, row) == 0; };
            if (same(r)) {
                continue;
            }
            slots_.assign(1, b.first + r);
            for (; end < b.n && !same(end); end++) {
                slots_.push_back(b.first + end);
            }
            kept = l.write(b.h, slots_.data(), end - r, (const ggml_fp16_t *) (begin + size_t(r) * row));
        }
        if (kept) {
            b.home->release(begin, begin + size_t(b.n) * row);
        } else {
            const std::vector<char> after(begin, begin + size_t(b.n) * row);
            l.make_plain(last_error());
            memcpy(begin, after.data(), after.size());
        }
    }
    return status;
}

executor::outcome executor::set_rows(const ggml_tensor * node) {
    storage * s = lasting(node);
    if (!s) {
        return outcome::delegate;
    }
    const std::lock_guard<std::mutex> lock(s->mutex);
    half h;
    layer * l = s->find(node->data, h);
    if (!l || l->plain() || l->memory_is_truth()) {
        return outcome::delegate;
    }
    const ggml_tensor * from = node->src[0], * index = node->src[1];
    const row_layout & rows = l->rows(h);
    const int64_t n = from->ne[1];
    if (node->type != GGML_TYPE_F16 || node->data != rows.begin || ggml_row_size(node->type, node->ne[0]) != rows.row_bytes() ||
        node->nb[1] != rows.row_bytes() || node->ne[1] != rows.n_slots() || node->ne[2] != 1 || node->ne[3] != 1 ||
        index->ne[1] != 1 || index->ne[2] != 1 || lasting(from)) {
        return outcome::delegate;
    }
    slots_.resize(size_t(n));
    rows_.resize(size_t(n * from->ne[0]));
    for (int64_t i = 0; i < n; i++) {
        const char * at = (const char *) index->data + size_t(i) * index->nb[0];
        slots_[size_t(i)] = index->type == GGML_TYPE_I64 ? *(const int64_t *) at : *(const int32_t *) at;
        const char * row = (const char *) from->data + size_t(i) * from->nb[1];
        ggml_fp16_t * to = &rows_[size_t(i * from->ne[0])];
        if (from->type == GGML_TYPE_F32) {
            ggml_fp32_to_fp16_row((const float *) row, to, from->ne[0]); // as ggml would store it
        } else {
            memcpy(to, row, size_t(from->ne[0]) * sizeof(ggml_fp16_t));
        }
    }
    if (!l->write(h, slots_.data(), n, rows_.data())) {
        l->make_plain(last_error());
        return outcome::delegate;
    }
    return outcome::done;
}

executor::outcome executor::attend(const ggml_tensor * out) {
    const ggml_tensor * k = out->src[1], * v = out->src[2];
    storage * s = lasting(k);
    if (!s || lasting(v) != s) {
        return outcome::delegate;
    }
    row_view keys, values;
    if (!describe(k, keys) || !describe(v, values)) {
        say_once(std::string("attention over K of ") + ggml_type_name(k->type) + " and V of " + ggml_type_name(v->type) +
                 " stays ggml's: f16 is needed");
        return outcome::delegate;
    }
    const attention_node node(out);
    const std::lock_guard<std::mutex> lock(s->mutex);
    const std::string objection = node.objection(keys, values);
    layer * l = s->find((const char *) k->data, (const char *) v->data);
    if (!l) {
        half h;
        const layer * of_k = s->find(k->data, h), * of_v = s->find(v->data, h);
        if (of_k || of_v) {
            if ((of_k && !of_k->plain()) || (of_v && !of_v->plain())) {
                say_once("one attention call stays ggml's: K and V belong to different layers");
            }
            return outcome::delegate;
        }
        const settings set = settings::from_environment();
        std::string why = objection;
        std::unique_ptr<layer> made;
        if (set.where != placement::off && why.empty()) {
            made = layer::create(*s, set, keys.rows, values.rows, node.n_heads, node.sketch(set), why);
        }
        if (!made) {
            if (set.where != placement::off) {
                count.layers_refused++;
                say_once("attention stays ggml's: " + why);
            }
            made = layer::refused(*s, set, keys.rows, values.rows);
        }
        l = s->add(std::move(made));
        AKV_LOG_TRACE_("%s: K %lld x %lld, V %lld x %lld, %lld cells x %lld streams, %s\n", k->name, (long long) keys.rows.n_heads,
                       (long long) keys.rows.dim, (long long) values.rows.n_heads, (long long) values.rows.dim,
                       (long long) keys.rows.n_cells, (long long) keys.rows.n_streams, l->placement_name());
    }
    if (l->plain()) {
        return outcome::delegate;
    }
    if (!objection.empty() || !(l->rows(key) == keys.rows) || !(l->rows(value) == values.rows) || l->n_q_heads() != node.n_heads) {
        say_once("one attention call stays ggml's: " + (objection.empty() ? "it sees the rows in another shape" : objection));
        return outcome::delegate;
    }
    if (!l->flush()) {
        l->make_plain(last_error());
        return outcome::delegate;
    }
    akv_stats stats;
    std::string why;
    if (!attention_.run(node, *l, keys, stats, why)) {
        say_once("one attention call stays ggml's: " + why);
        return outcome::delegate;
    }
    if (!s->announced) {
        s->announced = true;
        static const char * const isa[]  = {"", "scalar", "avx2", "avx512"};
        static const char * const mode[] = {"expected", "guaranteed", "exact"};
        char tolerance[32] = "default";
        if (l->set().tolerance > 0) {
            snprintf(tolerance, sizeof(tolerance), "%g", double(l->set().tolerance));
        }
        AKV_LOG_INFO_("attention reads digit planes: placement %s, mode %s, tolerance %s, %s, %d threads, K %lld x %lld, "
                      "V %lld x %lld, %lld cells x %lld streams\n",
                      l->placement_name(), mode[l->set().mode], tolerance, stats.isa >= 1 && stats.isa <= 3 ? isa[stats.isa] : "?",
                      attention_.n_threads(), (long long) keys.rows.n_heads, (long long) keys.rows.dim,
                      (long long) values.rows.n_heads, (long long) values.rows.dim, (long long) keys.rows.n_cells,
                      (long long) keys.rows.n_streams);
    }
    return outcome::done;
}

// ---- Backend --------------------------------------------------------------------------------------------------------

executor & work(ggml_backend_t backend) {
    return *(executor *) backend->context;
}

// A function of ggml's CPU backend that only its registry knows.
template <typename F> F cpu_function(const char * name) {
    ggml_backend_dev_t cpu = cpu_device();
    return cpu ? (F) ggml_backend_reg_get_proc_address(ggml_backend_dev_backend_reg(cpu), name) : nullptr;
}

void set_n_threads(ggml_backend_t backend, int n) {
    work(backend).attention_.set_n_threads(n);
    if (auto set = cpu_function<ggml_backend_set_n_threads_t>("ggml_backend_set_n_threads")) {
        set(work(backend).cpu(), n);
    }
}

void set_abort_callback(ggml_backend_t backend, ggml_abort_callback callback, void * user) {
    if (auto set = cpu_function<ggml_backend_set_abort_callback_t>("ggml_backend_set_abort_callback")) {
        set(work(backend).cpu(), callback, user);
    }
}

ggml_backend_t init_backend(ggml_backend_dev_t dev, const char *) {
    static ggml_guid guid = {0xa1, 0x16, 0x9e, 0xd0, 0x4b, 0x5c, 0x4e, 0x9a, 0x8b, 0x0d, 0x61, 0x6b, 0x76, 0x00, 0x00, 0x01};
    ggml_backend_dev_t cpu = cpu_device();
    ggml_backend_t inner = cpu ? ggml_backend_dev_init(cpu, nullptr) : nullptr;
    if (!inner) {
        AKV_LOG_ERROR_("ggml has no CPU backend\n");
        return nullptr;
    }
    ggml_backend_i interface = {};
    interface.get_name      = [](ggml_backend_t) { return "AlignedKV"; };
    interface.free          = [](ggml_backend_t b) { delete &work(b); delete b; };
    interface.graph_compute = [](ggml_backend_t b, ggml_cgraph * graph) {
        try {
            return work(b).compute(graph);
        } catch (const std::exception & e) { // out of memory
            AKV_LOG_ERROR_("a graph failed: %s\n", e.what());
            return GGML_STATUS_ALLOC_FAILED;
        }
    };
    return new ggml_backend{&guid, interface, dev, new executor(inner)};
}

// ---- Device ---------------------------------------------------------------------------------------------------------

// Whether a tensor is (a view of) one in our buffers. A tensor that stands for a weight while llama.cpp asks where to
// load it has a buffer without memory; so does a KV cache whose memory is only being estimated, but is seen in views.
bool ours(const ggml_tensor * t) {
    const ggml_backend_buffer_t b = root_of(t)->buffer;
    return b && b->buft == buffer_type() && b->usage != GGML_BACKEND_BUFFER_USAGE_WEIGHTS && (b->size > 0 || t->view_src);
}

bool supports_op(ggml_backend_dev_t, const ggml_tensor * op) {
    if (ggml_op_is_empty(op->op)) {
        return true;
    }
    ggml_backend_dev_t cpu = cpu_device();
    if (!cpu || !ggml_backend_dev_supports_op(cpu, op)) {
        return false;
    }
    // Attention is ours unless its rows lie elsewhere: a refusal would make llama.cpp switch flash attention off, and
    // what libalignedkv cannot do runs on the CPU backend anyway.
    if (op->op == GGML_OP_FLASH_ATTN_EXT) {
        const auto fits = [](const ggml_tensor * t) { return !root_of(t)->buffer || ours(t); };
        return fits(op->src[1]) && fits(op->src[2]);
    }
    if (op->op == GGML_OP_SET_ROWS && !root_of(op)->buffer && root_of(op)->op == GGML_OP_NONE) {
        return true;
    }
    // Of the rest, only what touches the cache.
    if (ours(op)) {
        return true;
    }
    for (const ggml_tensor * src : op->src) {
        if (src && ours(src)) {
            return true;
        }
    }
    return false;
}

ggml_backend_dev_t device() {
    static ggml_backend_device dev = {
        /* .iface   = */ {
            /* .get_name             = */ [](ggml_backend_dev_t) { return "AlignedKV"; },
            /* .get_description      = */ [](ggml_backend_dev_t) { return akv_version_string(); },
            /* .get_memory           = */ [](ggml_backend_dev_t, size_t * free, size_t * total) {
                *free = *total = 0;
                if (ggml_backend_dev_t cpu = cpu_device()) { // the rows are in the host's memory
                    ggml_backend_dev_memory(cpu, free, total);
                }
            },
            // As a GPU the device is given the layers' KV cache.
            /* .get_type             = */ [](ggml_backend_dev_t) { return GGML_BACKEND_DEVICE_TYPE_GPU; },
            /* .get_props            = */ [](ggml_backend_dev_t dev, ggml_backend_dev_props * props) {
                *props = {};
                props->name        = ggml_backend_dev_name(dev);
                props->description = ggml_backend_dev_description(dev);
                props->type        = ggml_backend_dev_type(dev);
                ggml_backend_dev_memory(dev, &props->memory_free, &props->memory_total);
                props->caps.mmap_support = true; // of weights, which stay on the CPU
            },
            /* .init_backend         = */ init_backend,
            /* .get_buffer_type      = */ [](ggml_backend_dev_t) { return buffer_type(); },
            /* .get_host_buffer_type = */ nullptr,
            /* .buffer_from_host_ptr = */ nullptr,
            /* .supports_op          = */ supports_op,
            // q and the mask are read where the CPU backend has them.
            /* .supports_buft        = */ [](ggml_backend_dev_t, ggml_backend_buffer_type_t buft) {
                return buft == buffer_type() || ggml_backend_buft_is_host(buft);
            },
            /* .offload_op           = */ nullptr,
            /* .event_new            = */ nullptr,
            /* .event_free           = */ nullptr,
            /* .event_synchronize    = */ nullptr,
        },
        /* .reg     = */ registry(),
        /* .context = */ nullptr,
    };
    return &dev;
}

// ---- Registry -------------------------------------------------------------------------------------------------------

void get_counters(ggml_alignedkv_counters * out) {
    ggml_alignedkv_counters now = {};
    now.struct_size           = out->struct_size;
    now.bytes_k               = count.bytes_k;
    now.bytes_v               = count.bytes_v;
    now.elements_k            = count.elements_k;
    now.elements_v            = count.elements_v;
    now.attention_progressive = count.attention_progressive;
    now.attention_dense       = count.attention_dense;
    now.attention_delegated   = count.attention_delegated;
    now.ops_delegated         = count.ops_delegated;
    now.rows_written          = count.rows_written;
    now.layers_active         = count.layers_active;
    now.layers_refused        = count.layers_refused;
    now.us_attention          = count.us_attention;
    now.us_write              = count.us_write;
    now.bytes_progressive     = count.bytes_progressive;
    now.elements_progressive  = count.elements_progressive;
    memcpy(out, &now, std::min(sizeof(now), size_t(out->struct_size)));
}

void reset_counters() {
    for (std::atomic<uint64_t> * c : {&count.bytes_k, &count.bytes_v, &count.elements_k, &count.elements_v,
                                      &count.attention_progressive, &count.attention_dense, &count.attention_delegated,
                                      &count.ops_delegated, &count.rows_written, &count.us_attention, &count.us_write,
                                      &count.bytes_progressive, &count.elements_progressive}) {
        *c = 0;
    }
}

void * get_proc_address(ggml_backend_reg_t, const char * name) {
    const std::string wanted = name;
    if (wanted == "ggml_backend_set_n_threads") {
        return (void *) set_n_threads;
    }
    if (wanted == "ggml_backend_set_abort_callback") {
        return (void *) set_abort_callback;
    }
    if (wanted == "ggml_alignedkv_get_counters") {
        return (void *) get_counters;
    }
    if (wanted == "ggml_alignedkv_reset_counters") {
        return (void *) reset_counters;
    }
    return nullptr;
}

ggml_backend_reg_t registry() {
    static ggml_backend_reg reg = {
        /* .api_version = */ GGML_BACKEND_API_VERSION,
        /* .iface       = */ {
            /* .get_name         = */ [](ggml_backend_reg_t) { return "AlignedKV"; },
            /* .get_device_count = */ [](ggml_backend_reg_t) { return size_t(1); },
            /* .get_device       = */ [](ggml_backend_reg_t, size_t) { return device(); },
            /* .get_proc_address = */ get_proc_address,
        },
        /* .context     = */ nullptr,
    };
    return &reg;
}

} // namespace

// What ggml looks for in a backend that it loads. The structs above are internal to ggml and change between its
// versions: another one than we were built with is refused.
extern "C" __attribute__((visibility("default"))) ggml_backend_reg_t ggml_backend_init(void) {
    if (strcmp(ggml_version(), GGML_VERSION) != 0) {
        AKV_LOG_ERROR_("built for ggml %s, but this is ggml %s: rebuild the backend\n", GGML_VERSION, ggml_version());
        return nullptr;
    }
    if (akv_abi_version() != AKV_ABI_VERSION) {
        AKV_LOG_ERROR_("built for version %d of libalignedkv's interface, but it speaks %u\n", AKV_ABI_VERSION, akv_abi_version());
        return nullptr;
    }
    return registry();
}
