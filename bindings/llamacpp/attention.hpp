// FLASH_ATTN_EXT over a layer, by libalignedkv, on the threads of ggml's CPU backend.
#pragma once

#include "storage.hpp"

#include <string>
#include <vector>

namespace akv_ggml {

// The parts of a FLASH_ATTN_EXT node.
struct attention_node {
    explicit attention_node(const ggml_tensor * node);
    // Empty if libalignedkv can be asked for it; otherwise what stands against it.
    std::string objection(const row_view & k, const row_view & v) const;
    // The call without its arrays, but not NULL where there are any: for akv_supports.
    akv_attention_desc sketch(const settings & set) const;

    const ggml_tensor * out, * q, * mask, * sinks;
    float   scale, max_bias, softcap;
    int64_t n_q, n_heads, n_streams;
};

class attention {
  public:
    explicit attention(ggml_backend_t cpu);
    ~attention();
    attention(const attention &) = delete;
    attention & operator=(const attention &) = delete;

    void set_n_threads(int n) { n_threads_ = n; }
    int  n_threads() const { return n_threads_; }
    // False, with the reason, if the library refused: the output is undefined then.
    bool run(const attention_node & node, layer & l, const row_view & k, akv_stats & stats, std::string & why);

  private:
    struct call;
    struct mask_entry;
    const akv_mask * mask(const attention_node & node, int64_t n_kv, std::string & why);
    static void on_thread(ggml_tensor * dst, int ith, int nth, void * user);

    ggml_backend_t cpu_;
    int            n_threads_ = GGML_DEFAULT_N_THREADS;
    // A graph of one custom node: how the CPU backend's threads are had.
    ggml_context * graph_context_ = nullptr;
    ggml_cgraph *  graph_ = nullptr;
    ggml_tensor *  node_  = nullptr;

    std::vector<mask_entry> masks_;
    uint64_t                clock_ = 0;
    std::vector<char>       workspace_;
    std::vector<float>      queries_;
};

} // namespace akv_ggml
