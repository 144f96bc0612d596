#include "storage.hpp"

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstring>

namespace akv_ggml {

namespace {

constexpr size_t  page        = 4096;
constexpr int64_t chunk_slots = 512; // rows that are read or written at once

bool all_zero(const char * p, size_t n) {
    return n == 0 || (p[0] == 0 && memcmp(p, p + 1, n - 1) == 0);
}

akv_rows packed_rows(const ggml_fp16_t * data) {
    akv_rows rows = {};
    rows.data  = const_cast<ggml_fp16_t *>(data);
    rows.dtype = AKV_F16;
    return rows;
}

akv_rows rows_at(const row_layout & l, int64_t slot) {
    akv_rows rows = {};
    rows.data        = l.row(slot);
    rows.stride_row  = int64_t(l.stride_cell);
    rows.stride_head = int64_t(l.stride_head);
    rows.dtype       = AKV_F16;
    return rows;
}

class timer {
  public:
    explicit timer(std::atomic<uint64_t> & sum) : sum_(sum), start_(ggml_time_us()) {}
    ~timer() { sum_ += uint64_t(ggml_time_us() - start_); }
  private:
    std::atomic<uint64_t> & sum_;
    int64_t start_;
};

} // namespace

bool row_layout::operator==(const row_layout & o) const {
    return begin == o.begin && end == o.end && data == o.data && dim == o.dim && n_heads == o.n_heads &&
           n_cells == o.n_cells && n_streams == o.n_streams && stride_cell == o.stride_cell &&
           stride_head == o.stride_head && stride_stream == o.stride_stream;
}

bool describe(const ggml_tensor * t, row_view & out) {
    const ggml_tensor * root = t->view_src ? t->view_src : t;
    if (t->type != GGML_TYPE_F16 || root->type != GGML_TYPE_F16 || !ggml_is_contiguous(root) ||
        t->nb[0] != sizeof(ggml_fp16_t) || t->data == nullptr || root->data == nullptr) {
        return false;
    }
    row_layout & l = out.rows;
    l.begin       = (char *) root->data;
    l.end         = l.begin + ggml_nbytes(root);
    l.dim         = t->ne[0];
    l.n_heads     = t->ne[2];
    l.stride_cell = t->nb[1];
    l.stride_head = t->nb[2];
    out.n_kv      = t->ne[1];
    out.n_streams = t->ne[3];

    const size_t offset = size_t((char *) t->data - l.begin);
    l.packed = root->ne[0] == l.dim * l.n_heads && root->ne[3] == 1 && t->nb[1] == root->nb[1] &&
               t->nb[2] == size_t(l.dim) * sizeof(ggml_fp16_t) && (t->ne[3] == 1 || t->nb[3] == root->nb[2]) &&
               offset % root->nb[2] == 0 && t->ne[1] <= root->ne[1];
    if (l.packed) {
        l.data          = l.begin;
        l.n_cells       = root->ne[1];
        l.n_streams     = root->ne[2];
        l.stride_stream = root->nb[2];
        out.stream      = int64_t(offset / root->nb[2]);
    } else {
        l.data          = (char *) t->data;
        l.n_cells       = t->ne[1];
        l.n_streams     = t->ne[3];
        l.stride_stream = t->nb[3];
        out.stream      = 0;
    }
    return true;
}

// ---- layer ----------------------------------------------------------------------------------------------------------

layer::layer(storage & home, const settings & set, const row_layout & k, const row_layout & v)
    : home_(home), set_(set), rows_{k, v} {}

layer::~layer() {
    if (cache_) {
        count.layers_active--;
        akv_cache_destroy(cache_);
    }
}

const char * layer::placement_name() const {
    return plain() ? "plain" : attached_ ? "attached" : truth_in_memory_ ? "mirrored" : "slots";
}

std::unique_ptr<layer> layer::refused(storage & home, const settings & set, const row_layout & k, const row_layout & v) {
    return std::unique_ptr<layer>(new layer(home, set, k, v));
}

std::unique_ptr<layer> layer::create(storage & home, const settings & set, const row_layout & k, const row_layout & v,
                                     int64_t n_q_heads, const akv_attention_desc & wanted, std::string & why) {
    std::unique_ptr<layer> made(new layer(home, set, k, v));
    made->n_q_heads_ = n_q_heads;

    const bool packed = k.packed && v.packed;
    // Attached rows have one stride over all streams.
    const auto even = [](const row_layout & l) {
        return l.n_streams == 1 || l.stride_stream == size_t(l.n_cells) * l.stride_cell;
    };
    made->attached_        = set.where == placement::attached && even(k) && even(v);
    made->truth_in_memory_ = made->attached_ || !packed;

    akv_layer_desc shape = {};
    shape.n_q_heads  = int32_t(n_q_heads);
    shape.n_kv_heads = int32_t(k.n_heads);
    shape.dim_k      = int32_t(k.dim);
    shape.dim_v      = int32_t(v.dim);
    shape.dtype_k    = AKV_F16;
    shape.dtype_v    = AKV_F16;
    akv_cache_desc desc = {};
    desc.struct_size = sizeof(desc);
    desc.placement   = made->attached_ ? AKV_ATTACHED : AKV_SLOTS;
    desc.n_layers    = 1;
    desc.layers      = &shape;
    desc.n_streams   = uint32_t(k.n_streams);
    desc.n_slots     = uint64_t(k.n_cells);

    akv_context * ctx = context();
    if (!ctx) {
        why = "there is no context";
        return nullptr;
    }
    if (akv_supports(ctx, &desc, &wanted, nullptr) != AKV_OK || akv_cache_create(ctx, &desc, &made->cache_) != AKV_OK) {
        why = last_error();
        return nullptr;
    }
    count.layers_active++;
    if (!made->fill()) {
        why = last_error();
        return nullptr;
    }
    return made;
}

// Moves in, or indexes, what has been written so far (and, of its pages, what has not: it is zero and nobody sees it).
bool layer::fill() {
    if (attached_) {
        const akv_rows k = rows_at(rows_[key], 0), v = rows_at(rows_[value], 0);
        if (akv_attach_rows(cache_, 0, &k, &v) != AKV_OK) {
            return false;
        }
    }
    if (!rows_[key].packed || !rows_[value].packed) {
        all_dirty_ = true;
        return flush();
    }
    std::vector<int64_t> live;
    for (int64_t slot = 0; slot < rows_[key].n_slots(); slot++) {
        for (const row_layout & l : rows_) {
            const char * row = l.row(slot);
            if (home_.touched(row, l.row_bytes())) {
                live.push_back(slot);
                break;
            }
        }
    }
    if (truth_in_memory_) {
        dirty_ = std::move(live);
        return flush();
    }
    if (!write_runs(live)) {
        return false;
    }
    for (const row_layout & l : rows_) {
        home_.release(l.begin, l.end);
    }
    return true;
}

// Writes rows from the tensors' memory, K and V.
bool layer::write_runs(const std::vector<int64_t> & slots) {
    const timer time(count.us_write);
    const size_t n = slots.size();
    for (size_t i = 0, j; i < n; i = j) {
        const int64_t stream = slots[i] / rows_[key].n_cells;
        for (j = i + 1; j < n && slots[j] == slots[j - 1] + 1 && slots[j] / rows_[key].n_cells == stream; j++) {
        }
        const akv_rows k = rows_at(rows_[key], slots[i]), v = rows_at(rows_[value], slots[i]);
        if (akv_slots_write(cache_, 0, &slots[i], int64_t(j - i), &k, &v, nullptr) != AKV_OK) {
            return false;
        }
    }
    count.rows_written += 2 * n;
    return true;
}

bool layer::read(half h, int64_t first, int64_t n, ggml_fp16_t * to) {
    if (!finish_copy()) {
        return false;
    }
    const akv_rows rows = packed_rows(to);
    return akv_slots_read(cache_, 0, first, n, h == key ? &rows : nullptr, h == value ? &rows : nullptr, nullptr) == AKV_OK;
}

bool layer::write(half h, const int64_t * slots, int64_t n, const ggml_fp16_t * from) {
    if (!finish_copy()) {
        return false;
    }
    const timer time(count.us_write);
    const akv_rows rows = packed_rows(from);
    if (akv_slots_write(cache_, 0, slots, n, h == key ? &rows : nullptr, h == value ? &rows : nullptr, nullptr) != AKV_OK) {
        return false;
    }
    count.rows_written += uint64_t(n);
    return true;
}

bool layer::get_bytes(half h, size_t offset, void * to, size_t n) {
    const size_t row = rows_[h].row_bytes();
    while (n > 0) {
        const int64_t first = int64_t(offset / row);
        const size_t  skip  = offset % row;
        const int64_t rows  = std::min(chunk_slots, int64_t((skip + n + row - 1) / row));
        const size_t  bytes = std::min(n, size_t(rows) * row - skip);
        scratch_.resize(size_t(rows) * row / sizeof(ggml_fp16_t));
        if (!read(h, first, rows, scratch_.data())) {
            return false;
        }
        memcpy(to, (const char *) scratch_.data() + skip, bytes);
        to = (char *) to + bytes;
        offset += bytes;
        n -= bytes;
    }
    return true;
}

bool layer::set_bytes(half h, size_t offset, const void * from, size_t n) {
    const size_t row = rows_[h].row_bytes();
    int64_t slots[chunk_slots];
    while (n > 0) {
        const int64_t first = int64_t(offset / row);
        const size_t  skip  = offset % row;
        const int64_t rows  = std::min(chunk_slots, int64_t((skip + n + row - 1) / row));
        const size_t  bytes = std::min(n, size_t(rows) * row - skip);
        scratch_.resize(size_t(rows) * row / sizeof(ggml_fp16_t));
        const bool whole = bytes == size_t(rows) * row;
        if (!whole && !read(h, first, rows, scratch_.data())) {
            return false;
        }
        memcpy((char *) scratch_.data() + skip, from, bytes);
        for (int64_t i = 0; i < rows; i++) {
            slots[i] = first + i;
        }
        if (!write(h, slots, rows, scratch_.data())) {
            return false;
        }
        from = (const char *) from + bytes;
        offset += bytes;
        n -= bytes;
    }
    return true;
}

bool layer::copy(half h, int64_t from, int64_t to, int64_t n) {
    if (copy_.waits && copy_.h != h && copy_.from == from && copy_.to == to && copy_.n == n) {
        copy_.waits = false;
        return akv_slots_copy(cache_, 0, from, to, n) == AKV_OK;
    }
    if (!finish_copy()) {
        return false;
    }
    copy_.waits = true;
    copy_.h     = h;
    copy_.from  = from;
    copy_.to    = to;
    copy_.n     = n;
    return true;
}

// Does the copy of one tensor that waits for the other's.
bool layer::finish_copy() {
    if (!copy_.waits) {
        return true;
    }
    copy_.waits = false;
    const size_t row = rows_[copy_.h].row_bytes();
    std::vector<ggml_fp16_t> rows(size_t(chunk_slots) * row / sizeof(ggml_fp16_t));
    int64_t slots[chunk_slots];
    for (int64_t done = 0; done < copy_.n; done += chunk_slots) {
        const int64_t n = std::min(chunk_slots, copy_.n - done);
        for (int64_t i = 0; i < n; i++) {
            slots[i] = copy_.to + done + i;
        }
        if (!read(copy_.h, copy_.from + done, n, rows.data()) || !write(copy_.h, slots, n, rows.data())) {
            return false;
        }
    }
    return true;
}

bool layer::flush() {
    if (!truth_in_memory_) {
        return finish_copy();
    }
    if (all_dirty_) {
        dirty_.resize(size_t(rows_[key].n_slots()));
        for (size_t i = 0; i < dirty_.size(); i++) {
            dirty_[i] = int64_t(i);
        }
    }
    if (dirty_.empty()) {
        return true;
    }
    // K and V of a cell change one after the other.
    std::sort(dirty_.begin(), dirty_.end());
    dirty_.erase(std::unique(dirty_.begin(), dirty_.end()), dirty_.end());
    if (!attached_) {
        if (!write_runs(dirty_)) {
            return false;
        }
    } else {
        const timer time(count.us_write);
        if (akv_slots_write(cache_, 0, dirty_.data(), int64_t(dirty_.size()), nullptr, nullptr, nullptr) != AKV_OK) {
            return false;
        }
        count.rows_written += 2 * dirty_.size();
    }
    dirty_.clear();
    all_dirty_ = false;
    return true;
}

bool layer::forget() {
    copy_.waits = false;
    dirty_.clear();
    all_dirty_ = !rows_[key].packed || !rows_[value].packed;
    return akv_slots_invalidate(cache_, 0, 0, rows_[key].n_slots()) == AKV_OK;
}

void layer::make_plain(const std::string & why) {
    if (plain()) {
        return;
    }
    AKV_LOG_WARN_("a layer falls back to f16 rows and ggml's attention: %s\n", why.c_str());
    count.layers_refused++;
    count.layers_active--;
    if (!truth_in_memory_) {
        const auto waiting = copy_;
        copy_.waits = false;
        for (half h : {key, value}) {
            const row_layout & l = rows_[h];
            scratch_.resize(size_t(chunk_slots) * l.row_bytes() / sizeof(ggml_fp16_t));
            for (int64_t first = 0; first < l.n_slots(); first += chunk_slots) {
                const int64_t n = std::min(chunk_slots, l.n_slots() - first);
                const size_t  bytes = size_t(n) * l.row_bytes();
                if (!read(h, first, n, scratch_.data())) {
                    AKV_LOG_ERROR_("rows of cells %lld to %lld are lost: %s\n", (long long) first, (long long) (first + n),
                                   last_error().c_str());
                } else if (!all_zero((const char *) scratch_.data(), bytes)) { // leaves pages without rows untouched
                    memcpy(l.row(first), scratch_.data(), bytes);
                }
            }
            home_.touch(l.begin, size_t(l.end - l.begin));
        }
        if (waiting.waits) {
            const row_layout & l = rows_[waiting.h];
            memmove(l.row(waiting.to), l.row(waiting.from), size_t(waiting.n) * l.row_bytes());
        }
    }
    akv_cache_destroy(cache_);
    cache_ = nullptr;
    truth_in_memory_ = true;
    dirty_.clear();
}

// ---- storage --------------------------------------------------------------------------------------------------------

std::unique_ptr<storage> storage::create(size_t size) {
    size = (size + page - 1) / page * page;
    void * base = mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (base == MAP_FAILED) {
        return nullptr;
    }
    return std::unique_ptr<storage>(new storage((char *) base, size));
}

storage::storage(char * base, size_t size) : base_(base), size_(size), touched_(size / page) {}

storage::~storage() {
    layers_.clear();
    munmap(base_, size_);
}

void storage::touch(const void * begin, size_t bytes) {
    const size_t first = size_t((const char *) begin - base_) / page;
    const size_t last  = (size_t((const char *) begin - base_) + bytes + page - 1) / page;
    std::fill(touched_.begin() + std::ptrdiff_t(first), touched_.begin() + std::ptrdiff_t(std::min(last, touched_.size())), true);
}

void storage::wrote(const void * begin, size_t bytes) {
    half h;
    layer * l = find(begin, h);
    if (!l || l->plain() || !l->rows(h).packed) {
        touch(begin, bytes);
        if (l && !l->plain()) {
            l->all_changed();
        }
        return;
    }
    // Ops over the whole tensor (K-shift) write zeros over zeros where there are no rows.
    const row_layout & rows = l->rows(h);
    const size_t  offset = size_t((const char *) begin - rows.begin), row = rows.row_bytes();
    const int64_t end    = int64_t((offset + bytes + row - 1) / row);
    for (int64_t slot = int64_t(offset / row); slot < end; slot++) {
        const char * at = rows.row(slot);
        if (touched(at, row) || !all_zero(at, row)) {
            touch(at, row);
            l->changed(slot);
        }
    }
}

bool storage::touched(const void * begin, size_t bytes) const {
    const size_t first = size_t((const char *) begin - base_) / page;
    const size_t last  = std::min((size_t((const char *) begin - base_) + bytes + page - 1) / page, touched_.size());
    for (size_t i = first; i < last; i++) {
        if (touched_[i]) {
            return true;
        }
    }
    return false;
}

void storage::release(char * begin, char * end) {
    char * first = base_ + (size_t(begin - base_) + page - 1) / page * page;
    char * last  = base_ + size_t(end - base_) / page * page;
    if (first >= last) {
        memset(begin, 0, size_t(end - begin));
        return;
    }
    memset(begin, 0, size_t(first - begin));
    memset(last, 0, size_t(end - last));
#ifdef __linux__
    // Private anonymous pages read as zeros afterwards.
    if (madvise(first, size_t(last - first), MADV_DONTNEED) == 0) {
        return;
    }
#endif
    memset(first, 0, size_t(last - first));
}

layer * storage::find(const void * address, half & h) const {
    const char * p = (const char *) address;
    auto r = std::upper_bound(regions_.begin(), regions_.end(), p, [](const char * a, const region & b) { return a < b.begin; });
    if (r == regions_.begin() || p >= (--r)->end) {
        return nullptr;
    }
    h = r->h;
    return r->owner;
}

layer * storage::find(const char * k, const char * v) const {
    half hk, hv;
    layer * l = find(k, hk);
    return l && hk == key && find(v, hv) == l && hv == value ? l : nullptr;
}

layer * storage::add(std::unique_ptr<layer> made) {
    layer * l = made.get();
    layers_.push_back(std::move(made));
    for (half h : {key, value}) {
        regions_.push_back({l->rows(h).begin, l->rows(h).end, l, h});
    }
    std::sort(regions_.begin(), regions_.end(), [](const region & a, const region & b) { return a.begin < b.begin; });
    return l;
}

void storage::set(void * to, const void * from, size_t n) {
    const std::lock_guard<std::mutex> lock(mutex);
    half h;
    layer * l = find(to, h);
    if (l && !l->memory_is_truth() && !l->plain()) {
        if (l->set_bytes(h, size_t((char *) to - l->rows(h).begin), from, n)) {
            return;
        }
        l->make_plain(last_error());
    }
    memcpy(to, from, n);
    wrote(to, n);
}

void storage::fill(void * to, uint8_t byte, size_t n) {
    std::vector<uint8_t> bytes(std::min(n, size_t(1) << 20), byte);
    for (size_t done = 0; done < n; done += bytes.size()) {
        set((char *) to + done, bytes.data(), std::min(bytes.size(), n - done));
    }
}

void storage::get(const void * from, void * to, size_t n) {
    const std::lock_guard<std::mutex> lock(mutex);
    half h;
    layer * l = find(from, h);
    if (l && !l->memory_is_truth() && !l->plain()) {
        if (l->get_bytes(h, size_t((const char *) from - l->rows(h).begin), to, n)) {
            return;
        }
        l->make_plain(last_error());
    }
    memcpy(to, from, n);
}

bool storage::copy(const ggml_tensor * from, ggml_tensor * to) {
    const std::lock_guard<std::mutex> lock(mutex);
    half h, to_h;
    layer * l = find(from->data, h);
    if (!l || l->plain() || l->memory_is_truth() || find(to->data, to_h) != l || to_h != h ||
        !ggml_is_contiguous(from) || !ggml_is_contiguous(to)) {
        return false;
    }
    const row_layout & rows = l->rows(h);
    const size_t a = size_t((const char *) from->data - rows.begin), b = size_t((const char *) to->data - rows.begin);
    const size_t n = ggml_nbytes(from), row = rows.row_bytes();
    if (a % row || b % row || n % row || (a < b + n && b < a + n)) {
        return false;
    }
    if (!l->copy(h, int64_t(a / row), int64_t(b / row), int64_t(n / row))) {
        l->make_plain(last_error());
        return false;
    }
    return true;
}

void storage::clear(uint8_t byte) {
    const std::lock_guard<std::mutex> lock(mutex);
    if (byte != 0) {
        for (auto & l : layers_) {
            l->make_plain("the buffer is filled with a byte other than 0");
        }
        memset(base_, byte, size_);
        touch(base_, size_);
        return;
    }
    for (auto & l : layers_) {
        if (!l->plain() && !l->forget()) {
            l->make_plain(last_error());
        }
    }
    // Layers that fell back get another chance with new rows.
    regions_.erase(std::remove_if(regions_.begin(), regions_.end(), [](const region & r) { return r.owner->plain(); }), regions_.end());
    layers_.erase(std::remove_if(layers_.begin(), layers_.end(), [](const std::unique_ptr<layer> & l) { return l->plain(); }), layers_.end());
    release(base_, base_ + size_);
    std::fill(touched_.begin(), touched_.end(), false);
}

} // namespace akv_ggml
