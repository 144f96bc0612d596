// The memory behind a ggml buffer, and the layers of a KV cache that live in it.
//
// A buffer is anonymous memory, mapped and untouched until it is written: ggml's own kernels work on it as on any other
// ("plain"). The first FLASH_ATTN_EXT that names two f16 tensors of it as K and V makes them a `layer`: what has been
// written moves into an akv_cache. From then on
//   slots      the rows live in the akv_cache; the tensor's memory is zero and takes no pages,
//   attached   the tensor's memory is the truth, the akv_cache an index beside it,
//   mirrored   the tensor's memory is the truth, the akv_cache a copy (tensors that are not laid out as llama.cpp's
//              cache: test-backend-ops).
// Whatever libalignedkv refuses sends the layer back to plain rows, once and for good: the engine then gets what it
// would have got without this backend.
#pragma once

#include "settings.hpp"

#include "ggml-backend-impl.h"

#include <memory>
#include <mutex>
#include <string>
#include <vector>

namespace akv_ggml {

enum half { key = 0, value = 1 };

// Where a tensor keeps rows of f16: [stream][cell][head][dim], dim contiguous. Cell c of stream s is slot s * n_cells + c.
struct row_layout {
    char *  begin = nullptr; // the whole tensor
    char *  end   = nullptr;
    char *  data  = nullptr; // slot 0, head 0
    int64_t dim = 0, n_heads = 0, n_cells = 0, n_streams = 0;
    size_t  stride_cell = 0, stride_head = 0, stride_stream = 0;
    bool    packed = false;  // llama.cpp's cache: the tensor is nothing but rows, in the order of slots

    int64_t n_slots() const { return n_cells * n_streams; }
    size_t  row_bytes() const { return size_t(dim * n_heads) * sizeof(ggml_fp16_t); }
    char *  row(int64_t slot) const {
        return data + size_t(slot / n_cells) * stride_stream + size_t(slot % n_cells) * stride_cell;
    }
    bool operator==(const row_layout & o) const;
};

// What a K or V operand of FLASH_ATTN_EXT looks at: n_kv cells of streams stream..stream + n_streams.
struct row_view {
    row_layout rows;
    int64_t stream = 0, n_streams = 0, n_kv = 0;
};

// False if the operand is not rows of f16.
bool describe(const ggml_tensor * operand, row_view & out);

class storage;

class layer {
  public:
    // `wanted` is an attention call as it will be made: what libalignedkv does not support is refused here. On failure
    // `why` says so, and nothing has changed.
    static std::unique_ptr<layer> create(storage & home, const settings & set, const row_layout & k, const row_layout & v,
                                         int64_t n_q_heads, const akv_attention_desc & wanted, std::string & why);
    // A layer that stays plain.
    static std::unique_ptr<layer> refused(storage & home, const settings & set, const row_layout & k, const row_layout & v);
    ~layer();

    bool plain() const { return cache_ == nullptr; }
    bool memory_is_truth() const { return truth_in_memory_; }
    const char * placement_name() const;

    akv_cache * cache() const { return cache_; }
    const row_layout & rows(half h) const { return rows_[h]; }
    const settings & set() const { return set_; }
    int64_t n_q_heads() const { return n_q_heads_; }

    // ---- Rows of an akv_cache that is the truth

    bool read(half h, int64_t first, int64_t n, ggml_fp16_t * to);
    bool write(half h, const int64_t * slots, int64_t n, const ggml_fp16_t * from);
    bool get_bytes(half h, size_t offset, void * to, size_t n);
    bool set_bytes(half h, size_t offset, const void * from, size_t n);
    // K and V are copied one after the other; the library copies both at once. So the first one waits for the second,
    // and is done alone if anything else comes first.
    bool copy(half h, int64_t from, int64_t to, int64_t n);

    // ---- An akv_cache beside memory that is the truth

    // A row has changed since the akv_cache last saw it.
    void changed(int64_t slot) { dirty_.push_back(slot); }
    void all_changed() { all_dirty_ = true; }
    // Brings the akv_cache up to date.
    bool flush();

    // ---- Both

    // Forgets all rows.
    bool forget();
    // Moves everything back into the tensors' memory and lets go of the akv_cache.
    void make_plain(const std::string & why);

  private:
    layer(storage & home, const settings & set, const row_layout & k, const row_layout & v);
    bool fill();
    bool write_runs(const std::vector<int64_t> & slots);
    bool finish_copy();

    storage &   home_;
    settings    set_;
    row_layout  rows_[2];
    int64_t     n_q_heads_ = 0;
    akv_cache * cache_ = nullptr;
    bool        truth_in_memory_ = false;
    bool        attached_ = false;

    std::vector<int64_t> dirty_;
    bool                 all_dirty_ = false;

    struct { bool waits = false; half h = key; int64_t from = 0, to = 0, n = 0; } copy_;
    std::vector<ggml_fp16_t> scratch_;
};

// A buffer's memory. Its public calls lock; `mutex` is for who works on a layer in between.
class storage {
  public:
    static std::unique_ptr<storage> create(size_t size); // NULL: no memory
    ~storage();
    storage(const storage &) = delete;
    storage & operator=(const storage &) = delete;

    char * base() const { return base_; }

    void set(void * to, const void * from, size_t n);
    void get(const void * from, void * to, size_t n);
    void fill(void * to, uint8_t byte, size_t n);
    bool copy(const ggml_tensor * from, ggml_tensor * to); // false: neither of a kind that can be copied at once
    void clear(uint8_t byte);

    // The layer that an address belongs to and which of its tensors, or NULL.
    layer * find(const void * address, half & h) const;
    layer * find(const char * k, const char * v) const;
    layer * add(std::unique_ptr<layer> made);
    bool    empty() const { return regions_.empty(); }

    // Memory that has been written to, by pages: what has to move when a layer is laid out. `wrote` also tells the layer
    // whose memory it is.
    void wrote(const void * begin, size_t bytes);
    void touch(const void * begin, size_t bytes);
    bool touched(const void * begin, size_t bytes) const;
    // Zeroes memory and gives its pages back.
    void release(char * begin, char * end);

    std::mutex mutex;
    bool       announced = false; // the line that says what runs

  private:
    storage(char * base, size_t size);
    struct region { const char * begin, * end; layer * owner; half h; };

    char * base_;
    size_t size_;
    std::vector<bool> touched_;
    std::vector<region> regions_; // by address
    std::vector<std::unique_ptr<layer>> layers_;
};

} // namespace akv_ggml
