// A step through the C++ layer, from begin to commit, without a call of operator new. Not under valgrind, which has an
// operator new of its own.
#include "alignedkv.hpp"

#include <array>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <new>

// How often this program has asked for memory through operator new: the library has an allocator of its own.
static long allocations;
void *operator new(std::size_t n) {
    allocations++;
    if (void *p = std::malloc(n ? n : 1)) return p;
    throw std::bad_alloc();
}
void operator delete(void *p) noexcept { std::free(p); }
void operator delete(void *p, std::size_t) noexcept { std::free(p); }

static int failures;
static void check(bool condition, const char *what) {
    if (condition) return;
    failures++;
    std::printf("failed: %s\n", what);
}

int main() {
    constexpr std::size_t q_heads = 4, heads = 2, dim = 32, steps = 10;
    akv_layer_desc layer{};
    layer.n_q_heads = q_heads;
    layer.n_kv_heads = heads;
    layer.dim_k = dim;
    akv::Context context;
    akv::Cache cache(context, &layer, 1);
    akv::Sequence sequence(cache);
    akv::Batch batch(cache);
    std::array<float, heads * dim> k, v;
    std::array<float, q_heads * dim> q, out;
    k.fill(0.5f), v.fill(0.25f), q.fill(1.0f), out.fill(0.0f);
    const akv_sequence ids[] = {sequence.get()};
    const int32_t one[] = {1};
    float bound[q_heads];
    akv_stats stats{};

    const long before = allocations;
    for (std::size_t i = 0; i < steps; i++) {
        akv::Step step(batch, ids, one);
        batch.quantize_kv(0, akv::rows(k), akv::rows(v));
        auto call = akv::desc<akv_attention_desc>();
        call.q = akv::rows(q);
        call.out = akv::rows_mut(out);
        call.bound = bound;
        call.stats = &stats;
        batch.attention(0, call);
        step.commit();
    }
    check(allocations == before, "a step allocates");
    check(std::fabs(out[0] - 0.25f) < 1e-2f && stats.tokens == steps * heads, "attention");
    akv_status status = AKV_OK;
    try {
        akv::Step step(batch, ids, akv::view<const int32_t>(one, 0));
    } catch (const akv::error &e) {
        status = e.status();
    }
    check(status == AKV_E_ARGUMENT && allocations > before, "an error has a text, and its memory is counted");
    std::printf("allocations: %ld outside of steps, %d failed\n", allocations, failures);
    return failures != 0;
}
