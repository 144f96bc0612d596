// alignedkv.hpp: libalignedkv for C++17, a thin layer over alignedkv.h (read that first; what it says holds here).
//
// - Failing calls throw akv::error. Destructors do not throw: destroy in reverse order of creation, as members and
//   locals do, and nothing is left behind.
// - Context, Cache, Batch, Sequence and Mask own what they stand for: movable, not copyable. get() gives the C handle.
// - akv::desc<T>() is a descriptor with its sizes set and everything else at its default.
// - akv::rows(pointer or container, ...) and akv::rows_mut(...) make akv_rows; the element type tells the dtype.
// - akv::view<T> is a pointer and a length, made by itself from arrays, std::vector, std::array and the like.
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
//   akv::Step step(batch, ids, n_new);               // aborts when it goes out of scope without commit
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
//   cache.slots_write(0, slots, akv::rows(k), akv::rows(v));
//   call.mask = mask.get();
//   cache.slots_attention(0, span, call);

#ifndef ALIGNEDKV_HPP
#define ALIGNEDKV_HPP

#include "alignedkv.h"

#include <exception>
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

// n elements in someone else's memory. Made by itself from arrays and from containers with data() and size().
template <class T> class view {
public:
    constexpr view() noexcept = default;
    constexpr view(T *data, size_t size) noexcept : data_(data), size_(size) {}
    template <size_t N> constexpr view(T (&array)[N]) noexcept : data_(array), size_(N) {}
    template <class C, class = std::enable_if_t<std::is_convertible<decltype(std::declval<C &>().data()), T *>::value>>
    constexpr view(C &&container) noexcept : data_(container.data()), size_(container.size()) {}

    constexpr T *data() const noexcept { return data_; }
    constexpr size_t size() const noexcept { return size_; }

private:
    T *data_ = nullptr;
    size_t size_ = 0;
};

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

// The same of a container with data().
template <class C>
auto rows_mut(C &data, int64_t stride_row = 0, int64_t stride_head = 0) noexcept -> decltype(rows_mut(data.data())) {
    return rows_mut(data.data(), stride_row, stride_head);
}
template <class C>
auto rows(const C &data, int64_t stride_row = 0, int64_t stride_head = 0) noexcept -> decltype(rows(data.data())) {
    return rows(data.data(), stride_row, stride_head);
}

namespace detail {

// A view that must be as long as another, or empty: what it is short of would be read beyond its end.
inline void same_length(size_t have, size_t need, const char *name) {
    if (have == need) return;
    const auto count = [](size_t n) { return std::to_string(n); };
    throw error(AKV_E_ARGUMENT, std::string(name) + " has " + count(have) + " elements, expected " + count(need));
}

// A function of the caller's behind a C callback; what it throws is thrown again on this side of C.
template <class F, class Bytes> struct callback {
    F *function;
    std::exception_ptr thrown;

    static int call(void *user, Bytes bytes, size_t n) noexcept {
        auto *self = static_cast<callback *>(user);
        try {
            (*self->function)(bytes, n);
            return 0;
        } catch (...) {
            self->thrown = std::current_exception();
            return 1;
        }
    }
    void check(akv_status status) const {
        if (thrown) std::rethrow_exception(thrown);
        akv::check(status);
    }
};

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

    // Throws and clears the first fault of work that was launched on a device.
    void poll() { check(akv_poll(get(), nullptr, nullptr, nullptr)); }

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
    void slots_write(int32_t layer, view<const int64_t> slots, const akv_rows &key, const akv_rows &value) {
        slots_write(layer, slots.data(), static_cast<int64_t>(slots.size()), &key, &value);
    }
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
    // The same sequence in another cache.
    Sequence copy_to(const Cache &cache) const {
        akv_sequence id = 0;
        check(akv_sequence_copy(cache_, id_, cache.get(), &id));
        return Sequence(cache.get(), id);
    }
    void truncate(int64_t n_tokens) { check(akv_sequence_truncate(cache_, id_, n_tokens)); }
    // Takes the memory of n_tokens more tokens ahead; truncate and destruction give it back.
    void reserve(int64_t n_tokens) { check(akv_sequence_reserve(cache_, id_, n_tokens)); }
    // Tokens in a layer; -1 = committed ones.
    int64_t length(int32_t layer = -1) const {
        int64_t n = 0;
        check(akv_sequence_length(cache_, id_, layer, &n));
        return n;
    }
    // Takes out the tokens at positions from <= p < to.
    void remove(int64_t from, int64_t to) { check(akv_sequence_remove(cache_, id_, from, to)); }
    // Adds delta to the positions from <= p < to and turns their K; an akv_rope per layer.
    void shift(int64_t from, int64_t to, int64_t delta, const akv_rope *rope_per_layer) {
        check(akv_sequence_shift(cache_, id_, from, to, delta, rope_per_layer));
    }
    // write(const void *bytes, size_t n) takes the bytes of a stream with checksums; what it throws ends it.
    template <class F> void save(F &&write, const akv_export_desc *part = nullptr) const {
        detail::callback<std::remove_reference_t<F>, const void *> to{&write, nullptr};
        to.check(akv_sequence_export(cache_, id_, part, &decltype(to)::call, &to));
    }
    // read(void *bytes, size_t n) fills in n bytes of such a stream, none beyond its end.
    template <class F> static Sequence load(const Cache &cache, F &&read) {
        return Sequence(cache.get(), load(cache.get(), 0, read));
    }
    // Adds layers that this sequence lacks, since it was loaded from a part of them.
    template <class F> void load_more(F &&read) { load(cache_, id_, read); }
    void dequantize_kv(int32_t layer, int64_t first, int64_t n, const akv_rows *key, const akv_rows *value) const {
        check(akv_dequantize_kv(cache_, id_, layer, first, n, key, value, nullptr));
    }

private:
    Sequence(akv_cache *cache, akv_sequence id) noexcept : cache_(cache), id_(id) {}
    template <class F> static akv_sequence load(akv_cache *cache, akv_sequence into, F &read) {
        detail::callback<F, void *> from{&read, nullptr};
        akv_sequence id = 0;
        from.check(akv_sequence_import(cache, into, &decltype(from)::call, &from, &id));
        return id;
    }
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
    // Where V is a part of K.
    void quantize_kv(int32_t layer, const akv_rows &key) {
        check(akv_quantize_kv(get(), layer, &key, nullptr, nullptr));
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
    // n_new and n_q have an element per sequence; without n_q it is n_new.
    Step(Batch &batch, view<const akv_sequence> sequences, view<const int32_t> n_new, view<const int32_t> n_q = {})
        : Step((detail::same_length(n_new.size(), sequences.size(), "n_new"),
                detail::same_length(n_q.data() ? n_q.size() : sequences.size(), sequences.size(), "n_q"), batch),
               sequences.data(), n_new.data(), static_cast<uint32_t>(sequences.size()), n_q.data()) {}
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
