// trace.c through alignedkv.hpp.
#include <alignedkv.hpp>
#include <cstdio>
#include <fstream>
#include <vector>

static std::uint64_t hash = 0xcbf29ce484222325; // FNV-1a
template <class T> static void add(const std::vector<T> &values) {
    const auto *bytes = reinterpret_cast<const unsigned char *>(values.data());
    for (std::size_t i = 0; i < values.size() * sizeof(T); i++) hash = (hash ^ bytes[i]) * 0x100000001b3;
}

int main(int argc, char **argv) try {
    std::ifstream file(argc > 1 ? argv[1] : "", std::ios::binary);
    file.exceptions(std::ios::failbit);
    const auto read = [&](auto &values) {
        file.read(reinterpret_cast<char *>(values.data()), std::streamsize(values.size() * sizeof values[0]));
    };
    std::vector<std::int32_t> size(5);
    read(size);
    const std::int32_t q_heads = size[0], kv_heads = size[1], dim = size[2], prompt = size[3], steps = size[4];
    const auto kv_row = std::size_t(kv_heads * dim), q_row = std::size_t(q_heads * dim), rows = std::size_t(prompt + steps);
    std::vector<akv::f16> k(kv_row * rows), v(kv_row * rows), q(q_row * std::size_t(steps));
    read(k), read(v), read(q);
    std::vector<float> out(q_row), lse(q_row / std::size_t(dim)), bound(lse.size());

    akv::Context context;
    akv_layer_desc layer{};
    layer.n_q_heads = q_heads;
    layer.n_kv_heads = kv_heads;
    layer.dim_k = dim;
    layer.dtype_k = layer.dtype_v = AKV_F16;
    akv::Cache cache(context, &layer, 1);
    akv::Sequence sequence(cache);
    akv::Batch batch(cache);
    const akv_sequence ids[] = {sequence.get()};
    for (std::int32_t i = -1; i < steps; i++) { // -1: the prompt, without attention
        const std::int32_t n_new[] = {i < 0 ? prompt : 1}, n_q[] = {i >= 0};
        const std::size_t at = i < 0 ? 0 : kv_row * std::size_t(prompt + i);
        akv::Step step(batch, ids, n_new, 1, n_q);
        batch.quantize_kv(0, akv::rows(&k[at]), akv::rows(&v[at]));
        if (i >= 0) {
            auto call = akv::desc<akv_attention_desc>();
            call.q = akv::rows(&q[q_row * std::size_t(i)]);
            call.out = akv::rows_mut(out.data());
            call.lse = lse.data();
            call.bound = bound.data();
            batch.attention(0, call);
            add(out), add(lse), add(bound);
        }
        step.commit();
    }
    std::printf("%016llx\n", static_cast<unsigned long long>(hash));
} catch (const std::exception &e) {
    std::fprintf(stderr, "%s\n", e.what());
    return 1;
}
