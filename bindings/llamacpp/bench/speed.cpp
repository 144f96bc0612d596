// How long attention takes inside llama.cpp, by KV scheme and length of the context, at decode (one token a step).
//
// Every scheme has a context of its own, all in this process; they take turns on the same tokens, so that what the
// machine does otherwise meets all of them. A step's attention time is its whole time less that of llama.cpp's f16
// cache when it is (almost) empty: everything beyond the rest of the network, encoding new rows, copies between devices
// and splits of the graph included. Inputs are random embeddings, which makes K and V random rows.
//
// The cache is filled in chunks of 512 tokens that see only themselves, at positions 0.. of one sequence: attention over
// everything before would take minutes and change nothing but the values of the later layers' random rows.
//
// usage: speed --model M.gguf --json OUT.json [--device libggml-alignedkv.so] [--lengths 512,2048,8192,32768]
//              [--threads 1,2] [--rounds 16] [--tokens 1]
// MIT OR Apache-2.0.
#include "common.hpp"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <random>
#include <sstream>

namespace {

constexpr int CHUNK = 512;

double now_us() {
    return std::chrono::duration<double, std::micro>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

double quantile(std::vector<double> x, double q) {
    std::sort(x.begin(), x.end());
    const double at = q * (x.size() - 1);
    const size_t i  = (size_t) at;
    return i + 1 < x.size() ? x[i] + (at - i) * (x[i + 1] - x[i]) : x[i];
}

// Random embeddings, the same for all contexts.
class inputs {
  public:
    explicit inputs(int n_embd, int n) : n_embd_(n_embd), data_((size_t) n_embd * n) {
        std::mt19937                    generator(1);
        std::normal_distribution<float> normal;
        for (float & x : data_) x = normal(generator);
    }

    // Decodes inputs first..first + n at these positions, as tokens of `sequence`.
    void decode(llama_context * context, int first, int n, llama_seq_id sequence, bool logits) {
        llama_batch batch = llama_batch_init(n, n_embd_, 1);
        batch.n_tokens    = n;
        memcpy(batch.embd, &data_[(size_t) first * n_embd_], sizeof(float) * n * n_embd_);
        for (int i = 0; i < n; i++) {
            batch.pos[i]       = first + i;
            batch.n_seq_id[i]  = 1;
            batch.seq_id[i][0] = sequence;
            batch.logits[i]    = logits && i == n - 1;
        }
        const int status = llama_decode(context, batch);
        llama_batch_free(batch);
        if (status != 0) fail("llama_decode: " + std::to_string(status));
        llama_synchronize(context);
    }

  private:
    int                n_embd_;
    std::vector<float> data_;
};

void fill(llama_context * context, inputs & in, int from, int to) {
    llama_memory_t memory = llama_get_memory(context);
    for (int first = from; first < to; first += CHUNK) {
        in.decode(context, first, std::min(CHUNK, to - first), 1, false);
        llama_memory_seq_cp(memory, 1, 0, -1, -1);
        llama_memory_seq_rm(memory, 1, -1, -1);
    }
}

// Time per token of decoding `tokens` tokens one by one behind n, which are removed again.
double decode_us(llama_context * context, inputs & in, int n, int tokens) {
    const double start = now_us();
    for (int i = 0; i < tokens; i++) in.decode(context, n + i, 1, 0, true);
    const double us = (now_us() - start) / tokens;
    llama_memory_seq_rm(llama_get_memory(context), 0, n, -1);
    return us;
}

// ---- entropy of attention, from the softmax tensors of a context without flash attention ----

struct entropy_sum {
    double sum = 0;
    long   rows = 0;
};

bool observe(ggml_tensor * t, bool ask, void * user) {
    if (t->op != GGML_OP_SOFT_MAX) return !ask;
    if (ask) return true;
    auto &             total = *static_cast<entropy_sum *>(user);
    std::vector<float> row(t->ne[0]);
    for (int64_t head = 0; head < t->ne[2]; head++) {  // decode: one row per head
        ggml_backend_tensor_get(t, row.data(), head * t->nb[2], row.size() * sizeof(float));
        for (float p : row)
            if (p > 0) total.sum -= p * log(p);
        total.rows++;
    }
    return true;
}

double entropy(llama_model * model, inputs & in, llama_context_params params, int n, int threads) {
    entropy_sum total;
    params.n_ctx             = n + CHUNK;
    params.n_threads         = params.n_threads_batch = threads;
    params.cb_eval           = observe;
    params.cb_eval_user_data = &total;
    const context_ptr context = make_context(model, {"f32", GGML_TYPE_F32, false}, params);
    fill(context.get(), in, 0, n);
    total = {};
    in.decode(context.get(), n, 1, 0, true);
    return total.rows ? total.sum / total.rows : NAN;
}

std::vector<int> numbers(const std::string & text) {
    std::vector<int>  out;
    std::stringstream stream(text);
    for (std::string part; std::getline(stream, part, ',');) out.push_back(atoi(part.c_str()));
    return out;
}

}  // namespace

int main(int argc, char ** argv) {
    quiet();
    ggml_backend_load_all();
    const device           akv(argument(argc, argv, "--device"));
    const std::string      model_path = argument(argc, argv, "--model"), json_path = argument(argc, argv, "--json");
    const std::vector<int> lengths = numbers(argument(argc, argv, "--lengths", "512,2048,8192,32768"));
    const std::vector<int> threads = numbers(argument(argc, argv, "--threads", "1,2"));
    const int rounds = argument(argc, argv, "--rounds", 16), tokens = argument(argc, argv, "--tokens", 1);
    if (model_path.empty() || json_path.empty()) fail("--model and --json are needed");
    if (lengths.empty() || threads.empty() || rounds < 1 || tokens < 1 || !std::is_sorted(lengths.begin(), lengths.end()))
        fail("--lengths (ascending), --threads, --rounds, --tokens");

    const model_ptr cpu_model = load_model(model_path, nullptr);
    const model_ptr akv_model = akv.dev ? load_model(model_path, akv.dev) : model_ptr(nullptr, llama_model_free);
    llama_model *   model     = cpu_model.get();
    inputs          in(llama_model_n_embd(model), lengths.back() + tokens + CHUNK);

    std::vector<scheme> schemes = {{"f16", GGML_TYPE_F16}, {"q8_0", GGML_TYPE_Q8_0}};
    if (akv.dev)
        for (const char * placement : {"slots", "attached"})
            schemes.push_back({std::string("alignedkv ") + placement, GGML_TYPE_F16, true, placement});

    llama_context_params params = llama_context_default_params();
    params.n_ctx      = lengths.back() + CHUNK;
    params.n_batch    = params.n_ubatch = CHUNK;
    params.n_seq_max  = 2;
    params.kv_unified = true;
    params.no_perf    = true;
    const int all_threads = *std::max_element(threads.begin(), threads.end());

    const int    entropy_at = std::min(2048, lengths.back());
    const double nats       = entropy(model, in, params, entropy_at, all_threads);
    printf("entropy of attention over %d tokens: %.2f nats (uniform: %.2f)\n", entropy_at, nats, log(entropy_at));

    std::vector<context_ptr> contexts;
    for (const scheme & s : schemes) contexts.push_back(make_context(s.ours() ? akv_model.get() : model, s, params));
    llama_context_params small = params;
    small.n_ctx                = CHUNK;
    const context_ptr empty    = make_context(model, schemes[0], small);

    FILE * f = create(json_path);
    fprintf(f, "{\"model\": \"%s\", \"layers\": %d, \"heads\": %d, \"kv_heads\": %d, \"n_embd\": %d, \"cpu\": \"%s\", \"ggml_isa\": \"%s\", "
               "\"rounds\": %d, \"tokens_per_round\": %d, \"entropy_nats\": %.4f, \"entropy_tokens\": %d,\n \"rows\": [",
            model_path.substr(model_path.rfind('/') + 1).c_str(), llama_model_n_layer(model), llama_model_n_head(model),
            llama_model_n_head_kv(model), llama_model_n_embd(model), cpu_name().c_str(), ggml_isa().c_str(), rounds, tokens, nats,
            entropy_at);
    bool first_row = true;
    int  filled    = 0;
    printf("%7s %7s  %-20s %12s %22s %22s %9s\n", "tokens", "threads", "KV cache", "us per token", "attention, us", "f16's / its attention",
           "bits read");
    for (int n : lengths) {
        for (size_t i = 0; i < schemes.size(); i++) {
            schemes[i].set_environment();
            llama_set_n_threads(contexts[i].get(), all_threads, all_threads);
            fill(contexts[i].get(), in, filled, n);
        }
        filled = n;
        for (int t : threads) {
            for (auto & context : contexts) llama_set_n_threads(context.get(), t, t);
            llama_set_n_threads(empty.get(), t, t);

            // Steps shorter than a millisecond are repeated, so that clocks and wake-ups do not show.
            const int steps = std::max(tokens, (int) (4000 / std::max(1.0, decode_us(contexts[0].get(), in, n, tokens))));
            const int used  = std::min(steps, CHUNK / 2);
            std::vector<double>              base;
            std::vector<std::vector<double>> whole(schemes.size()), bits(schemes.size()), inside(schemes.size());
            decode_us(empty.get(), in, 0, used);
            for (auto & context : contexts) decode_us(context.get(), in, n, tokens);
            for (int r = 0; r < rounds; r++) {
                base.push_back(decode_us(empty.get(), in, 0, used));
                for (size_t j = 0; j < schemes.size(); j++) {
                    const size_t i = (j + r) % schemes.size();  // nobody is always the first
                    if (schemes[i].ours()) akv.reset();
                    whole[i].push_back(decode_us(contexts[i].get(), in, n, used));
                    if (schemes[i].ours()) {
                        const ggml_alignedkv_counters c = akv.counters();
                        bits[i].push_back(8.0 * (c.bytes_k + c.bytes_v) / (double) (c.elements_k + c.elements_v));
                        inside[i].push_back((double) (c.us_attention + c.us_write) / used);
                    }
                }
            }
            const double rest = quantile(base, 0.5);
            if (quantile(base, 0.9) > 1.5 * quantile(base, 0.1)) fprintf(stderr, "warning: the machine is busy, times are off\n");
            for (size_t i = 0; i < schemes.size(); i++) {
                std::vector<double> attention, ratio, whole_ratio;
                for (int r = 0; r < rounds; r++) {
                    attention.push_back(whole[i][r] - rest);
                    ratio.push_back((whole[0][r] - rest) / (whole[i][r] - rest));
                    whole_ratio.push_back(whole[0][r] / whole[i][r]);
                }
                const double read = schemes[i].ours() ? quantile(bits[i], 0.5) : stored_bits(schemes[i].type);
                printf("%7d %7d  %-20s %12.0f %8.0f (%5.0f, %5.0f) %8.2f (%5.2f, %5.2f) %9.2f\n", n, t, schemes[i].name.c_str(),
                       quantile(whole[i], 0.5), quantile(attention, 0.5), quantile(attention, 0.25), quantile(attention, 0.75),
                       quantile(ratio, 0.5), quantile(ratio, 0.25), quantile(ratio, 0.75), read);
                fflush(stdout);
                fprintf(f,
                        "%s\n  {\"n\": %d, \"threads\": %d, \"name\": \"%s\", \"us\": %.2f, \"rest_us\": %.2f, \"attention_us\": %.2f, "
                        "\"attention_us_p25\": %.2f, \"attention_us_p75\": %.2f, \"speedup\": %.4f, \"speedup_p25\": %.4f, "
                        "\"speedup_p75\": %.4f, \"whole_speedup\": %.4f, \"bits\": %.4f, \"inside_us\": %s}",
                        first_row ? "" : ",", n, t, schemes[i].name.c_str(), quantile(whole[i], 0.5), rest, quantile(attention, 0.5),
                        quantile(attention, 0.25), quantile(attention, 0.75), quantile(ratio, 0.5), quantile(ratio, 0.25),
                        quantile(ratio, 0.75), quantile(whole_ratio, 0.5), read,
                        inside[i].empty() ? "null" : std::to_string(quantile(inside[i], 0.5)).c_str());
                first_row = false;
            }
        }
    }
    fprintf(f, "\n ]}\n");
    if (fclose(f) != 0) fail("cannot write " + json_path);
    return 0;
}
