// What a KV scheme does to a model's predictions inside llama.cpp: windows of held-out text, the first half of each
// prefilled, the rest decoded token by token and compared with the same model on an f32 cache without flash attention.
// usage: quality --model M.gguf --text TEXT --json OUT.json [--device libggml-alignedkv.so] [--windows 16] [--window 2048]
//                [--greedy 256] [--threads 1] [--shift N]
// --shift: every N decoded tokens the oldest N, the first 16 apart, are removed and the others move up, as in a chat that
// outgrows its context; in the truth, too.
// MIT OR Apache-2.0.
#include "common.hpp"

#include <algorithm>
#include <cmath>
#include <fstream>
#include <iterator>

namespace {

struct settings {
    int windows, window, greedy, threads, shift;
    int half() const { return window / 2; }
};

// Predictions for the second half of every window: log-probabilities, and tokens generated from the first half.
struct predictions {
    std::vector<std::vector<double>>      logprob;  // [window][position * n_vocab]
    std::vector<std::vector<llama_token>> greedy;   // [window][position]
};

struct result {
    double bits_k = 0, bits_v = 0;
    double kld_mean = 0, kld_se = 0, kld_max = 0, top1 = 0;
    double nll = 0, nll_delta = 0, nll_delta_se = 0;
    std::vector<int> first_difference;  // per window; = greedy where there is none
};

std::vector<double> log_softmax(const float * logits, int n) {
    const float  top = *std::max_element(logits, logits + n);
    double       sum = 0;
    for (int i = 0; i < n; i++) sum += exp((double) logits[i] - top);
    const double     lse = top + log(sum);
    std::vector<double> out(n);
    for (int i = 0; i < n; i++) out[i] = logits[i] - lse;
    return out;
}

void decode(llama_context * context, const llama_token * tokens, int n) {
    std::vector<llama_token> copy(tokens, tokens + n);
    if (llama_decode(context, llama_batch_get_one(copy.data(), n)) != 0) fail("llama_decode");
}

void shift_context(llama_memory_t memory, int n) {
    constexpr int keep = 16;
    llama_memory_seq_rm(memory, 0, keep, keep + n);
    llama_memory_seq_add(memory, 0, keep + n, -1, -n);
}

struct reads {
    double bytes_k = 0, bytes_v = 0, elements_k = 0, elements_v = 0;
};

predictions run(llama_context * context, const device & akv, const scheme & s, const settings & set,
                const std::vector<llama_token> & text, int n_vocab, reads & read) {
    predictions out;
    for (int w = 0; w < set.windows; w++) {
        const llama_token * window = text.data() + (size_t) w * set.window;
        llama_memory_t      memory = llama_get_memory(context);
        llama_memory_clear(memory, true);
        decode(context, window, set.half());
        if (s.ours()) akv.reset();  // what follows is decoding alone

        auto & logprob = out.logprob.emplace_back();
        for (int t = set.half(); t + 1 < set.window; t++) {
            if (set.shift && (t - set.half()) % set.shift == 0) shift_context(memory, set.shift);
            decode(context, window + t, 1);
            const auto row = log_softmax(llama_get_logits_ith(context, -1), n_vocab);
            logprob.insert(logprob.end(), row.begin(), row.end());
        }
        if (s.ours()) {
            const ggml_alignedkv_counters c = akv.counters();
            read.bytes_k += c.bytes_k, read.elements_k += c.elements_k;
            read.bytes_v += c.bytes_v, read.elements_v += c.elements_v;
        }

        llama_memory_clear(memory, true);
        decode(context, window, set.half());
        auto & greedy = out.greedy.emplace_back();
        for (int i = 0; i < set.greedy; i++) {
            const float * logits = llama_get_logits_ith(context, -1);
            greedy.push_back((llama_token) (std::max_element(logits, logits + n_vocab) - logits));
            decode(context, &greedy.back(), 1);
        }
    }
    return out;
}

double mean(const std::vector<double> & x) {
    double sum = 0;
    for (double v : x) sum += v;
    return sum / x.size();
}

// Standard error of the mean.
double error(const std::vector<double> & x) {
    const double m = mean(x);
    double       sum = 0;
    for (double v : x) sum += (v - m) * (v - m);
    return x.size() > 1 ? sqrt(sum / (x.size() - 1) / x.size()) : NAN;
}

result compare(const predictions & truth, const predictions & p, const settings & set,
               const std::vector<llama_token> & text, int n_vocab) {
    result r;
    std::vector<double> kld, nll, delta;  // per window
    const int n = set.window - set.half() - 1;
    for (int w = 0; w < set.windows; w++) {
        double kld_sum = 0, nll_sum = 0, truth_sum = 0;
        for (int t = 0; t < n; t++) {
            const double * a = &truth.logprob[w][(size_t) t * n_vocab], * b = &p.logprob[w][(size_t) t * n_vocab];
            double        divergence = 0;
            for (int i = 0; i < n_vocab; i++) divergence += exp(a[i]) * (a[i] - b[i]);
            kld_sum += divergence;
            r.kld_max = std::max(r.kld_max, divergence);
            r.top1 += std::max_element(a, a + n_vocab) - a == std::max_element(b, b + n_vocab) - b;
            const llama_token next = text[(size_t) w * set.window + set.half() + t + 1];
            nll_sum -= b[next];
            truth_sum -= a[next];
        }
        kld.push_back(kld_sum / n);
        nll.push_back(nll_sum / n);
        delta.push_back((nll_sum - truth_sum) / n);
        const auto differs = std::mismatch(truth.greedy[w].begin(), truth.greedy[w].end(), p.greedy[w].begin());
        r.first_difference.push_back((int) (differs.first - truth.greedy[w].begin()));
    }
    r.kld_mean = mean(kld), r.kld_se = error(kld);
    r.top1 /= (double) n * set.windows;
    r.nll = mean(nll), r.nll_delta = mean(delta), r.nll_delta_se = error(delta);
    return r;
}

void number(FILE * f, const char * key, double x) {
    std::isfinite(x) ? fprintf(f, ", \"%s\": %.7g", key, x) : fprintf(f, ", \"%s\": null", key);
}

void write_json(const std::string & path, const settings & set, const std::vector<scheme> & schemes,
                const std::vector<result> & results) {
    FILE * f = create(path);
    fprintf(f, "{\"windows\": %d, \"window\": %d, \"decoded_from\": %d, \"greedy\": %d, \"threads\": %d, \"shift\": %d, \"cpu\": \"%s\", "
               "\"ggml_isa\": \"%s\",\n \"schemes\": [\n",
            set.windows, set.window, set.half(), set.greedy, set.threads, set.shift, cpu_name().c_str(), ggml_isa().c_str());
    for (size_t i = 0; i < schemes.size(); i++) {
        const scheme & s = schemes[i];
        const result & r = results[i];
        fprintf(f, "  {\"name\": \"%s\", \"type\": \"%s\", \"placement\": \"%s\", \"mode\": \"%s\"", s.name.c_str(),
                ggml_type_name(s.type), s.placement.c_str(), s.mode.c_str());
        number(f, "tolerance", s.tolerance > 0 ? s.tolerance : NAN);
        number(f, "bits_k", r.bits_k);
        number(f, "bits_v", r.bits_v);
        number(f, "bits", (r.bits_k + r.bits_v) / 2);
        number(f, "kld_mean", r.kld_mean);
        number(f, "kld_se", r.kld_se);
        number(f, "kld_max", r.kld_max);
        number(f, "top1_agreement", r.top1);
        number(f, "ppl", exp(r.nll));
        number(f, "ln_ppl_delta", r.nll_delta);
        number(f, "ln_ppl_delta_se", r.nll_delta_se);
        fprintf(f, ", \"first_difference\": [");
        for (size_t w = 0; w < r.first_difference.size(); w++) fprintf(f, "%s%d", w ? ", " : "", r.first_difference[w]);
        fprintf(f, "]}%s\n", i + 1 < schemes.size() ? "," : "");
    }
    fprintf(f, " ]}\n");
    if (fclose(f) != 0) fail("cannot write " + path);
}

}  // namespace

int main(int argc, char ** argv) {
    quiet();
    ggml_backend_load_all();
    const device   akv(argument(argc, argv, "--device"));
    const settings set = {argument(argc, argv, "--windows", 16), argument(argc, argv, "--window", 2048),
                          argument(argc, argv, "--greedy", 256), argument(argc, argv, "--threads", 1),
                          argument(argc, argv, "--shift", 0)};
    const std::string model_path = argument(argc, argv, "--model"), text_path = argument(argc, argv, "--text");
    const std::string json_path = argument(argc, argv, "--json");
    if (model_path.empty() || text_path.empty() || json_path.empty()) fail("--model, --text and --json are needed");
    if (set.windows < 1 || set.window < 4 || set.greedy < 0 || set.greedy > set.half() || set.shift < 0 ||
        set.shift > set.half() / 2)
        fail("--windows, --window, --greedy, --shift");

    const model_ptr cpu_model = load_model(model_path, nullptr);
    const model_ptr akv_model = akv.dev ? load_model(model_path, akv.dev) : model_ptr(nullptr, llama_model_free);
    const int       n_vocab   = llama_vocab_n_tokens(llama_model_get_vocab(cpu_model.get()));

    std::ifstream                   file(text_path, std::ios::binary);
    const std::vector<char>         bytes{std::istreambuf_iterator<char>(file), {}};
    const std::vector<llama_token>  text(reinterpret_cast<const uint8_t *>(bytes.data()),
                                         reinterpret_cast<const uint8_t *>(bytes.data()) + bytes.size());
    if (text.size() < (size_t) set.windows * set.window) fail(text_path + " is too short");

    std::vector<scheme> schemes = {
        {"f32", GGML_TYPE_F32, false}, {"f16", GGML_TYPE_F16}, {"q8_0", GGML_TYPE_Q8_0}, {"q4_0", GGML_TYPE_Q4_0}};
    if (akv.dev) {
        for (const char * placement : {"slots", "attached"}) {
            for (const char * tolerance : {"1e-4", "1e-3", "3e-3", "1e-2"})
                schemes.push_back({std::string("alignedkv ") + placement + " " + tolerance, GGML_TYPE_F16, true, placement,
                                   atof(tolerance), "expected"});
            schemes.push_back({std::string("alignedkv ") + placement + " exact", GGML_TYPE_F16, true, placement, 0, "exact"});
        }
    }

    llama_context_params params = llama_context_default_params();
    params.n_ctx = params.n_batch = set.window;
    params.n_threads = params.n_threads_batch = set.threads;
    predictions         truth;
    std::vector<result> results;
    printf("%-26s %9s %10s %10s %9s %11s %22s %16s\n", "KV cache", "bits read", "mean KLD", "max KLD", "same top", "perplexity",
           "ln PPL - truth's", "same greedy text");
    for (const scheme & s : schemes) {
        const context_ptr context = make_context(s.ours() ? akv_model.get() : cpu_model.get(), s, params);
        reads             read;
        predictions       p = run(context.get(), akv, s, set, text, n_vocab, read);
        if (&s == &schemes[0]) truth = p;
        result r = compare(truth, p, set, text, n_vocab);
        r.bits_k = s.ours() ? 8 * read.bytes_k / read.elements_k : stored_bits(s.type);
        r.bits_v = s.ours() ? 8 * read.bytes_v / read.elements_v : stored_bits(s.type);
        const auto same = std::count(r.first_difference.begin(), r.first_difference.end(), set.greedy);
        printf("%-26s %9.2f %10.2e %10.2e %8.2f%% %11.5f %+.6f +- %.6f %10d of %2d\n", s.name.c_str(), (r.bits_k + r.bits_v) / 2,
               r.kld_mean, r.kld_max, 100 * r.top1, exp(r.nll), r.nll_delta, r.nll_delta_se, (int) same, set.windows);
        fflush(stdout);
        results.push_back(std::move(r));
    }
    write_json(json_path, set, schemes, results);
    return 0;
}
