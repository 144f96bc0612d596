// alignedkv.hpp: libalignedkv for C++17, a thin layer over alignedkv.h (read that first; what it says holds here).
//
// - Failing calls throw akv::error. Destructors do not throw: destroy in reverse order of creation, as members and
//   locals do, and nothing is left behind.
// - Context, Cache, Batch, Sequence and Mask own what they stand for: movable, not copyable. get() gives the C handle.
// - akv::desc<T>() is a descriptor with its sizes set and everything else at its default.
// - akv::rows(pointer, ...) and akv::rows_mut(pointer, ...) make akv_rows; the element type tells the dtype.
// - Nothing here allocates, apart from the text of an error.
//
//   akv::Context context;
//   akv_layer_desc layer{};                          // n_q_heads, n_kv_heads, dim_k, ...
//   akv::Cache cache(context, &layer, 1);
//   akv::Sequence sequence(cache);
//   akv::Batch batch(cache);
//
//   const akv_sequence ids[] = {sequence.get()};
//   const int32_t n_new[] = {1};
//   akv::Step step(batch, ids, n_new, 1);            // aborts when it goes out of scope without commit
//   batch.quantize_kv(0, akv::rows(k), akv::rows(v));
//   auto call = akv::desc<akv_attention_desc>();
//   call.q = akv::rows(q);
//   call.out = akv::rows_mut(out);
//   batch.attention(0, call);
//   step.commit();
//
// Where the engine's cells are the truth, a mask stands for sequences and steps:
//
//   akv::Cache cache(context, desc);                 // placement AKV_SLOTS, n_slots cells
//   akv::Mask mask(context, max_rows, n_slots);
//   mask.set(values, n_q, n_kv);                     // once per step
//   cache.slots_write(0, slots, n_q, k, v);
//   call.mask = mask.get();
//   cache.slots_attention(0, span, call);

#ifndef ALIGNEDKV_HPP
#define ALIGNEDKV_HPP

#include "alignedkv.h"

#include <stdexcept>
#include <string>
#include <type_traits>
#include <utility>

namespace akv {

// A failed call: its status, and what() tells argument, value and expectation.
class error : public std::runtime_error {
public:
    error(akv_status status, const std::string &text)
        : std::runtime_error(std::string(akv_status_string(status)) + ": " + text), status_(status) {}

    akv_status status() const noexcept { return status_; }

private:
    akv_status status_;
};

// The text of this thread's last failed call.
inline std::string last_error() {
    size_t needed = 0;
    akv_last_error(nullptr, 0, &needed);
    std::string text(needed, '\0');
    akv_last_error(&text[0], text.size(), nullptr);
    text.resize(needed - 1);
    return text;
}

// Throws unless a call succeeded.
inline void check(akv_status status) {
    if (status != AKV_OK) throw error(status, last_error());
}

// A descriptor whose fields all stand for their defaults.
template <class T> T desc() noexcept {
    static_assert(std::is_trivially_copyable<T>::value, "a C descriptor");
    T d{};
    d.struct_size = static_cast<uint32_t>(sizeof d);
    return d;
}
template <> inline akv_context_desc desc<akv_context_desc>() noexcept {
    akv_context_desc d{};
    d.struct_size = static_cast<uint32_t>(sizeof d);
    d.abi_version = AKV_ABI_VERSION;
    return d;
}

// 16-bit element types, for memory whose own type (uint16_t, __half, ...) does not tell: cast the pointer to these.
struct f16 { uint16_t bits; };
struct bf16 { uint16_t bits; };

// The dtype of an element type. Specialise it for your own:
// template <> struct akv::dtype<_Float16> : akv::dtype<akv::f16> {};
template <class T> struct dtype;
template <> struct dtype<float> { static constexpr int32_t value = AKV_F32; };
template <> struct dtype<f16> { static constexpr int32_t value = AKV_F16; };
template <> struct dtype<bf16> { static constexpr int32_t value = AKV_BF16; };

// Rows [row][head][dim] to be written. Strides count elements here; 0 = contiguous.
template <class T> akv_rows rows_mut(T *data, int64_t stride_row = 0, int64_t stride_head = 0) noexcept {
    static_assert(!std::is_const<T>::value, "rows_mut is for outputs: use rows");
    const auto size = static_cast<int64_t>(sizeof(T));
    return akv_rows{data, stride_row * size, stride_head * size, dtype<T>::value, 0};
}

// Rows to be read: the library does not write through them.
template <class T> akv_rows rows(const T *data, int64_t stride_row = 0, int64_t stride_head = 0) noexcept {
    return rows_mut(const_cast<T *>(data), stride_row, stride_head);
}

namespace detail {

// Owner of a C handle. Destroy fails only with AKV_E_BUSY, and then something that was made from it is still alive: it
// is left to live on rather than taken from under it.
template <class T, akv_status (*Destroy)(T *)> class handle {
public:
    handle(handle &&other) noexcept : p_(std::exchange(other.p_, nullptr)) {}
    handle &operator=(handle &&other) noexcept {
        std::swap(p_, other.p_);
        return *this;
    }
    ~handle() {
        if (p_) Destroy(p_);
    }

    T *get() const noexcept { return p_; }
    // Gives the handle away: whoever takes it destroys it.
    T *release() noexcept { return std::exchange(p_, nullptr); }

protected:
    handle() noexcept = default;
    T *p_ = nullptr;
};

} // namespace detail

class Context : public detail::handle<akv_context, akv_context_destroy> {
public:
    explicit Context(const akv_context_desc &d = desc<akv_context_desc>()) { check(akv_context_create(&d, &p_)); }

    // The sum of AKV_PATH_* that such caches and calls can take; throws if they cannot.
    int32_t supports(const akv_cache_desc &cache, const akv_attention_desc *attention = nullptr) const {
        int32_t path = 0;
        check(akv_supports(get(), &cache, attention, &path));
        return path;
    }

    void merge_states(const akv_state *states, int32_t n, int64_t rows, int32_t heads, int32_t dim,
                      const akv_state &out) {
        check(akv_merge_states(get(), states, n, rows, heads, dim, &out, nullptr));
    }
};

class Cache : public detail::handle<akv_cache, akv_cache_destroy> {
public:
    Cache(const Context &context, const akv_cache_desc &d) { check(akv_cache_create(context.get(), &d, &p_)); }

    Cache(const Context &context, const akv_layer_desc *layers, int32_t n_layers, int32_t format = AKV_FORMAT_ALIGNED) {
        auto d = desc<akv_cache_desc>();
        d.layers = layers;
        d.n_layers = n_layers;
        d.format = format;
        check(akv_cache_create(context.get(), &d, &p_));
    }

    akv_usage usage() const {
        auto u = desc<akv_usage>();
        check(akv_cache_usage(get(), &u));
        return u;
    }

    // Cells (AKV_SLOTS, AKV_ATTACHED): rows written to slots; without them, the attached rows of the slots have changed.
    void slots_write(int32_t layer, const int64_t *slots, int64_t n, const akv_rows *key, const akv_rows *value) {
        check(akv_slots_write(get(), layer, slots, n, key, value, nullptr));
    }
    void slots_write(int32_t layer, const int64_t *slots, int64_t n, const akv_rows &key, const akv_rows &value) {
        slots_write(layer, slots, n, &key, &value);
    }
    void slots_write(int32_t layer, const int64_t *slots, int64_t n) { slots_write(layer, slots, n, nullptr, nullptr); }
    void slots_read(int32_t layer, int64_t first, int64_t n, const akv_rows *key, const akv_rows *value) const {
        check(akv_slots_read(get(), layer, first, n, key, value, nullptr));
    }
    // In one layer, or (-1) in all.
    void slots_invalidate(int32_t layer, int64_t first, int64_t n) {
        check(akv_slots_invalidate(get(), layer, first, n));
    }
    void slots_copy(int32_t layer, int64_t from, int64_t to, int64_t n) {
        check(akv_slots_copy(get(), layer, from, to, n));
    }
    void attach_rows(int32_t layer, const akv_rows &key, const akv_rows &value) {
        check(akv_attach_rows(get(), layer, &key, &value));
    }
    void slots_attention(int32_t layer, const akv_span *spans, int32_t n_spans, const akv_attention_desc &d) {
        check(akv_slots_attention(get(), layer, spans, n_spans, &d));
    }
    void slots_attention(int32_t layer, const akv_span &span, const akv_attention_desc &d) {
        slots_attention(layer, &span, 1, d);
    }
    // Bytes of workspace of an attention call over cells; they must be aligned to 64.
    size_t slots_workspace(int64_t max_kv, int32_t max_threads = 0) const {
        size_t bytes = 0, align = 0;
        check(akv_slots_workspace(get(), max_kv, max_threads, &bytes, &align));
        return bytes;
    }
};

// Who sees which cell: set once per step, for all layers and caches of its context.
class Mask : public detail::handle<akv_mask, akv_mask_destroy> {
public:
    Mask(const Context &context, int64_t max_rows, int64_t max_kv) {
        check(akv_mask_create(context.get(), max_rows, max_kv, &p_));
    }

    // From values [rows][n_kv]; the stride counts elements, 0 = contiguous.
    void set(const f16 *values, int64_t rows, int64_t n_kv, int64_t stride = 0, int64_t first_row = 0) {
        check(akv_mask_set(get(), first_row, rows, n_kv, values, stride * static_cast<int64_t>(sizeof(f16)), nullptr));
    }
};

// Owns a sequence of a cache, which must outlive it.
class Sequence {
public:
    explicit Sequence(const Cache &cache) : cache_(cache.get()) { check(akv_sequence_create(cache_, &id_)); }
    Sequence(Sequence &&other) noexcept : cache_(other.cache_), id_(std::exchange(other.id_, 0)) {}
    Sequence &operator=(Sequence &&other) noexcept {
        std::swap(cache_, other.cache_);
        std::swap(id_, other.id_);
        return *this;
    }
    ~Sequence() {
        if (id_) akv_sequence_destroy(cache_, id_);
    }

    akv_sequence get() const noexcept { return id_; }

    // A new sequence of the first n_tokens tokens (-1 = all).
    Sequence fork(int64_t n_tokens = -1) const {
        akv_sequence id = 0;
        check(akv_sequence_fork(cache_, id_, n_tokens, &id));
        return Sequence(cache_, id);
    }
    void truncate(int64_t n_tokens) { check(akv_sequence_truncate(cache_, id_, n_tokens)); }
    // Tokens in a layer; -1 = committed ones.
    int64_t length(int32_t layer = -1) const {
        int64_t n = 0;
        check(akv_sequence_length(cache_, id_, layer, &n));
        return n;
    }
    void dequantize_kv(int32_t layer, int64_t first, int64_t n, const akv_rows *key, const akv_rows *value) const {
        check(akv_dequantize_kv(cache_, id_, layer, first, n, key, value, nullptr));
    }

private:
    Sequence(akv_cache *cache, akv_sequence id) noexcept : cache_(cache), id_(id) {}
    akv_cache *cache_;
    akv_sequence id_ = 0;
};

class Batch : public detail::handle<akv_batch, akv_batch_destroy> {
public:
    explicit Batch(const Cache &cache, const akv_batch_desc &bounds = desc<akv_batch_desc>()) {
        check(akv_batch_create(cache.get(), &bounds, &p_));
    }

    void begin(const akv_batch_desc &step) { check(akv_batch_begin(get(), &step, nullptr)); }
    void commit() { check(akv_batch_commit(get())); }
    void abort() { check(akv_batch_abort(get())); }

    void quantize_kv(int32_t layer, const akv_rows &key, const akv_rows &value) {
        check(akv_quantize_kv(get(), layer, &key, &value, nullptr));
    }
    void attention(int32_t layer, const akv_attention_desc &d) { check(akv_aligned_attention(get(), layer, &d)); }

    // Bytes of workspace of a call; they must be aligned to 64.
    size_t workspace() const {
        size_t bytes = 0, align = 0;
        check(akv_batch_workspace(get(), &bytes, &align));
        return bytes;
    }
};

// A step in progress, on a batch that must outlive it. Without commit it never happened.
class Step {
public:
    Step(Batch &batch, const akv_batch_desc &step) : batch_(batch.get()) {
        check(akv_batch_begin(batch_, &step, nullptr));
    }
    Step(Batch &batch, const akv_sequence *sequences, const int32_t *n_new, uint32_t n, const int32_t *n_q = nullptr)
        : batch_(batch.get()) {
        auto d = desc<akv_batch_desc>();
        d.sequences = sequences;
        d.n_new = n_new;
        d.n_q = n_q;
        d.n_sequences = n;
        check(akv_batch_begin(batch_, &d, nullptr));
    }
    Step(const Step &) = delete;
    Step &operator=(const Step &) = delete;
    ~Step() {
        if (batch_) akv_batch_abort(batch_);
    }

    // A CUDA graph of an earlier step of the batch has been launched instead of this step's calls.
    void replayed() { check(akv_batch_replayed(batch_)); }
    // If this throws, the step is still in progress.
    void commit() {
        check(akv_batch_commit(batch_));
        batch_ = nullptr;
    }

private:
    akv_batch *batch_;
};

} // namespace akv

#endif
