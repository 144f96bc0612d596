// The C++ layer: ownership, moves, errors as exceptions, steps that abort by themselves; and its results are those of the
// calls beneath.
#include "alignedkv.hpp"

#include <cmath>
#include <cstdio>
#include <cstring>
#include <stdexcept>
#include <type_traits>
#include <utility>
#include <vector>

static long count, failures;
#define CHECK(condition)                                               \
    do {                                                               \
        count++;                                                       \
        if (!(condition)) {                                            \
            failures++;                                                \
            std::printf("%s:%d: %s\n", __FILE__, __LINE__, #condition); \
        }                                                              \
    } while (0)

// Status of the error that a call throws; AKV_OK if none. The text must name `word`.
template <class F> static akv_status thrown(const char *word, F call) {
    try {
        call();
    } catch (const akv::error &e) {
        CHECK(std::strstr(e.what(), word));
        CHECK(std::strstr(e.what(), akv_status_string(e.status())) == e.what());
        return e.status();
    }
    return AKV_OK;
}

static_assert(!std::is_copy_constructible<akv::Context>::value && !std::is_copy_assignable<akv::Cache>::value, "owners");
static_assert(!std::is_copy_constructible<akv::Sequence>::value && !std::is_copy_constructible<akv::Step>::value, "owners");
static_assert(std::is_nothrow_move_constructible<akv::Batch>::value && std::is_nothrow_move_assignable<akv::Batch>::value, "moves");
static_assert(std::is_nothrow_move_constructible<akv::Sequence>::value, "moves");

constexpr int heads = 2, q_heads = 4, dim = 32, tokens = 150;

static akv_cache_desc cache_of(const akv_layer_desc &layer) {
    auto d = akv::desc<akv_cache_desc>();
    d.n_layers = 1;
    d.layers = &layer;
    return d;
}

// Rows in cells, a mask, and attention over what it shows: that of the rows alone.
static void cells(const akv::Context &context, const akv_layer_desc &layer) {
    constexpr int n_slots = 200, n = 40;
    auto d = cache_of(layer);
    d.placement = AKV_SLOTS;
    d.n_slots = n_slots;
    akv::Cache cache(context, d);
    akv::Mask mask(context, 1, n_slots);
    std::vector<float> k(n * heads * dim), v(k.size()), back(v.size()), q(q_heads * dim), out(q.size());
    for (std::size_t i = 0; i < k.size(); i++) k[i] = std::sin(0.7f * float(i)), v[i] = std::cos(0.3f * float(i));
    for (std::size_t i = 0; i < q.size(); i++) q[i] = std::sin(0.11f * float(i));
    std::vector<std::int64_t> slots;
    std::vector<akv::f16> shown(n_slots, akv::f16{0xfc00});
    for (int i = 0; i < n; i++) slots.push_back(100 + i);
    cache.slots_write(0, slots.data(), n, akv::rows(k.data()), akv::rows(v.data()));
    const akv_rows value = akv::rows_mut(back.data());
    cache.slots_read(0, 100, n, nullptr, &value);
    CHECK(back == v);
    float lse[q_heads];
    auto call = akv::desc<akv_attention_desc>();
    call.q = akv::rows(q.data());
    call.out = akv::rows_mut(out.data());
    call.lse = lse;
    call.mask = mask.get();
    const akv_span span = {0, 1, n_slots};
    cache.slots_attention(0, span, call); // until it is set, rows see nothing
    CHECK(std::isinf(lse[0]) && out == std::vector<float>(out.size()));
    shown[107].bits = 0;
    mask.set(shown.data(), 1, n_slots);
    cache.slots_attention(0, span, call);
    for (int h = 0; h < q_heads; h++)
        for (int c = 0; c < dim; c++)
            CHECK(std::fabs(out[std::size_t(h * dim + c)] - v[std::size_t((7 * heads + h * heads / q_heads) * dim + c)]) < 1e-2f);
    CHECK(cache.slots_workspace(n_slots, 2) > 0);
    CHECK(thrown("slots[0]", [&] {
              slots[0] = n_slots;
              cache.slots_write(0, slots.data(), 1, akv::rows(k.data()), akv::rows(v.data()));
          }) == AKV_E_ARGUMENT);
    cache.slots_copy(-1, 100, 10, n);
    cache.slots_invalidate(-1, 100, n);
    CHECK(thrown("AKV_SLOTS", [&] { cache.attach_rows(0, akv::rows(k.data()), akv::rows(v.data())); }) == AKV_E_ARGUMENT);
    akv::Mask moved(std::move(mask));
    CHECK(!mask.get() && moved.get());
    CHECK(thrown("n_kv", [&] { moved.set(shown.data(), 1, n_slots + 1); }) == AKV_E_CAPACITY);
}

// Streams end with what the caller's function throws, on the caller's side of the library.
static void streams(const akv::Context &context, const akv_layer_desc &layer) {
    akv::Cache cache(context, &layer, 1);
    akv::Sequence sequence(cache);
    std::vector<char> bytes;
    sequence.save([&](const void *part, std::size_t n) {
        bytes.insert(bytes.end(), static_cast<const char *>(part), static_cast<const char *>(part) + n);
    });
    std::size_t at = 0;
    const auto read = [&](void *part, std::size_t n) {
        if (bytes.size() - at < n) throw std::runtime_error("the end");
        std::memcpy(part, bytes.data() + at, n);
        at += n;
    };
    akv::Sequence copy = akv::Sequence::load(cache, read);
    CHECK(copy.length() == 0 && at == bytes.size() && at > 0);
    CHECK(thrown("", [&] { at = 0, copy.load_more(read); }) == AKV_E_ARGUMENT); // it lacks no layer
    bool caught = false;
    try {
        sequence.save([](const void *, std::size_t) { throw std::runtime_error("full"); });
    } catch (const std::runtime_error &e) {
        caught = std::strcmp(e.what(), "full") == 0;
    }
    CHECK(caught);
}

int main() {
    akv_layer_desc layer{};
    layer.n_q_heads = q_heads;
    layer.n_kv_heads = heads;
    layer.dim_k = dim;

    // Errors.
    auto wrong = akv::desc<akv_context_desc>();
    CHECK(wrong.struct_size == sizeof wrong && wrong.abi_version == AKV_ABI_VERSION);
    wrong.n_threads = -1;
    CHECK(thrown("n_threads", [&] { akv::Context c(wrong); }) == AKV_E_ARGUMENT);
    akv::Context context;
    auto bad = layer;
    bad.dim_k = 17;
    CHECK(thrown("dim_k", [&] { akv::Cache c(context, &bad, 1); }) == AKV_E_ARGUMENT);
    CHECK(thrown("dim_k", [&] { context.supports(cache_of(bad)); }) == AKV_E_ARGUMENT);
    CHECK(context.supports(cache_of(layer)) == (AKV_PATH_PROGRESSIVE | AKV_PATH_DENSE));

    akv::Cache cache(context, &layer, 1);
    {
        akv::Sequence sequence(cache);
        akv::Batch batch(cache);
        std::vector<float> k(tokens * heads * dim), v(k.size()), q(q_heads * dim), out(q.size()), again(q.size());
        for (std::size_t i = 0; i < k.size(); i++) k[i] = std::sin(0.7f * float(i)), v[i] = std::cos(0.3f * float(i));
        for (std::size_t i = 0; i < q.size(); i++) q[i] = std::sin(0.11f * float(i));
        const akv_sequence ids[] = {sequence.get()};
        const int32_t n_new[] = {tokens}, one[] = {1}, none[] = {0};

        // A step that is not committed never happened, whether by leaving or by an exception.
        {
            akv::Step step(batch, ids, n_new, 1);
            batch.quantize_kv(0, akv::rows(k.data()), akv::rows(v.data()));
            CHECK(sequence.length(0) == tokens && sequence.length() == 0);
        }
        CHECK(sequence.length(0) == 0 && cache.usage().tokens == 0);
        CHECK(thrown("layer 0", [&] {
                  akv::Step step(batch, ids, n_new, 1);
                  step.commit();
              }) == AKV_E_ARGUMENT);
        CHECK(sequence.length(0) == 0);

        akv::Step step(batch, ids, n_new, 1, one);
        CHECK(thrown("step in progress", [&] { akv::Step second(batch, ids, n_new, 1); }) == AKV_E_BUSY);
        batch.quantize_kv(0, akv::rows(k.data()), akv::rows(v.data()));
        float lse[q_heads], bound[q_heads];
        auto call = akv::desc<akv_attention_desc>();
        call.q = akv::rows(q.data());
        call.out = akv::rows_mut(out.data());
        call.lse = lse;
        call.bound = bound;
        batch.attention(0, call);
        step.commit();
        CHECK(sequence.length() == tokens && cache.usage().n_sequences == 1);

        // The same through the C functions.
        auto plain = akv::desc<akv_batch_desc>();
        plain.n_sequences = 1;
        plain.sequences = ids;
        plain.n_q = one;
        plain.n_new = none;
        CHECK(akv_batch_begin(batch.get(), &plain, nullptr) == AKV_OK);
        call.out.data = again.data();
        CHECK(akv_aligned_attention(batch.get(), 0, &call) == AKV_OK);
        CHECK(akv_batch_abort(batch.get()) == AKV_OK);
        CHECK(std::memcmp(out.data(), again.data(), out.size() * sizeof(float)) == 0);
        for (int h = 0; h < q_heads; h++) CHECK(std::isfinite(lse[h]) && bound[h] >= 0);

        // One state merged is itself.
        const akv_state state = {out.data(), lse, bound, nullptr, nullptr, nullptr};
        float merged_lse[q_heads];
        const akv_state merged = {again.data(), merged_lse, nullptr, nullptr, nullptr, nullptr};
        context.merge_states(&state, 1, 1, q_heads, dim, merged);
        for (int h = 0; h < q_heads; h++) CHECK(std::fabs(merged_lse[h] - lse[h]) <= 1e-5f);

        // Forks share, moves move, rows read back in other types.
        akv::Sequence fork = sequence.fork(130);
        CHECK(fork.length() == 130 && cache.usage().pages_shared == 1);
        akv::Sequence moved(std::move(fork));
        CHECK(fork.get() == 0 && moved.length() == 130);
        moved.truncate(129);
        CHECK(moved.length() == 129 && sequence.length() == tokens);
        std::vector<akv::f16> halves(heads * dim);
        std::vector<float> back(heads * dim);
        const akv_rows key = akv::rows_mut(halves.data()), value = akv::rows_mut(back.data());
        moved.dequantize_kv(0, 0, 1, &key, &value); // in the exact head
        CHECK(std::memcmp(back.data(), v.data(), back.size() * sizeof(float)) == 0);
        CHECK(thrown("n_tokens", [&] { moved.truncate(1000); }) == AKV_E_ARGUMENT);
        akv::Batch other(std::move(batch));
        CHECK(!batch.get() && other.get());
        CHECK(thrown("max_", [&] { other.workspace(); }) == AKV_E_ARGUMENT);

        // What is moved from holds nothing, and destroying an owner's handle behind its back is noticed.
        CHECK(thrown("batch", [&] { batch.commit(); }) == AKV_E_HANDLE);
        CHECK(akv_batch_destroy(other.get()) == AKV_OK && akv_batch_destroy(other.get()) == AKV_E_HANDLE);
        CHECK(thrown("batch", [&] { akv::Step late(other, ids, n_new, 1); }) == AKV_E_HANDLE);
        auto small = cache_of(layer);
        small.max_bytes = 1 << 20;
        akv::Cache full(context, small);
        akv::Sequence in_full(full);
        akv::Batch batch_of_full(full);
        const akv_sequence id_of_full[] = {in_full.get()};
        const int32_t many[] = {1000000};
        CHECK(thrown("max_bytes", [&] { akv::Step step(batch_of_full, id_of_full, many); }) == AKV_E_CAPACITY);
        CHECK(in_full.length() == 0);
    }
    CHECK(cache.usage().n_sequences == 0 && cache.usage().pages_used == 0);
    cells(context, layer);
    streams(context, layer);
    context.poll();
    std::printf("raii: %ld checks, %ld failed\n", count, failures);
    return failures != 0;
}
