// Appends rows, or writes them to cells: keeps them as given while their tile is open, and encodes them. What is in a page
// afterwards is bit for bit what src/format/aligned.rs writes; of appended rows it depends on them and their number alone.
//
// A block has the rows of one tile and KV head.
#include "format.cuh"

namespace akv {

constexpr u32 ENCODE_THREADS = 256;

// What the threads of a block share.
struct Encoding {
    u32 peak[MAX_DIM];      // bits of the largest magnitude by channel
    float inverse[MAX_DIM];
    u8 before[MAX_DIM];      // scale bytes of the base
    u32 grown[MAX_DIM / 8];  // by word: bits of its channels whose scale has grown
    u32 any_grown;
    u32 digit_sum, digit_square_sum;
    u32 slack, mean_peak;  // bits of floats that are not negative
};

// Rows of a tile, as bits.
struct Bits {
    u64 low, high;

    DEVICE static u64 below(i32 n) { return n >= 64 ? ~u64(0) : n <= 0 ? 0 : (u64(1) << n) - 1; }
    DEVICE static Bits range(i32 from, i32 to) { return {below(to) & ~below(from), below(to - 64) & ~below(from - 64)}; }
    DEVICE static Bits of(const u32 (&words)[4]) { return {u64(words[1]) << 32 | words[0], u64(words[3]) << 32 | words[2]}; }
    DEVICE bool has(i32 row) const { return (row < 64 ? low : high) >> (row & 63) & 1; }
    DEVICE bool any() const { return (low | high) != 0; }
    DEVICE Bits operator&(const Bits &other) const { return {low & other.low, high & other.high}; }
    DEVICE Bits operator~() const { return {~low, ~high}; }
};

// What is to be encoded into a tile, K or V.
struct Task {
    Bits rows;         // of them
    i32 from, to;      // all of them are among these
    Bits others;       // encoded before, under scales that may have to grow
    Bits stored;       // of the others: those that `base` alone knows
    u64 base;          // page that has them as they were stored, which may be the tile's own; or 0
    i32 skip;          // rows below this attend as given: zeros stand for them
    bool anew;         // scales start from the smallest
    bool closes;       // the tile is whole then
    bool keeps_mean;   // what stands for tokens of which no V is read stays as it is
};

// Rows of one KV head, K or V: where each one comes from.
struct Source {
    u64 rows;  // row i of the tile, from `from` on
    i64 stride;
    u64 kept;  // rows below, or 0
    i64 kept_stride;
    i32 dtype, from;
    u64 fault, sequence;
    i64 row;  // the tile's first token
    i32 layer, head;
    u32 where;

    DEVICE u64 row_address(i32 i) const { return i >= from ? rows + i64(i) * stride : kept + i64(i) * kept_stride; }

    // A channel, 0 in place of what cannot be stored: that is a fault, which the host learns of later.
    DEVICE float load(i32 i, i32 channel) const {
        float x = load_element(row_address(i), dtype, channel);
        float size = magnitude(x);
        if (!(size <= limit_of(255))) {
            if (i >= from) report_fault(fault, size <= bits_float(0x7f7fffff) ? FAULT_RANGE : FAULT_NONFINITE, {sequence, row + i, layer, head, where});
            x = 0.0f;
        }
        return x;
    }
    // Copies a channel, or 0 likewise, to a row that is kept as given.
    DEVICE void keep(i32 i, i32 channel, u64 to) const {
        const bool zero = load(i, channel) == 0.0f;
        const u64 address = row_address(i);
        if (size_of_dtype(dtype) == 4) {
            u32 bits = reinterpret_cast<const u32 *>(address)[channel];
            reinterpret_cast<u32 *>(to)[channel] = zero ? bits & 0x80000000 : bits;
        } else {
            u16 bits = reinterpret_cast<const u16 *>(address)[channel];
            reinterpret_cast<u16 *>(to)[channel] = zero ? bits & 0x8000 : bits;
        }
    }
};

// Bytes of a row of all KV heads.
DEVICE i64 kept_stride(const Shape &s, bool is_value) { return i64(s.n_kv_heads) * (is_value ? s.dim_v * size_of_dtype(s.dtype_v) : s.dim_k * size_of_dtype(s.dtype_k)); }

DEVICE Source source_of(const EncodeParams &p, const Append &a, i32 head, bool is_value) {
    const Shape &s = p.shape;
    const Rows &rows = is_value ? p.v : p.k;
    const i64 stride = kept_stride(s, is_value), kept = (is_value ? kept_offset(s, TILE) : 0) + head * (stride / s.n_kv_heads);
    return {row_of(rows, a.source - a.from, head), rows.stride_row, a.kept + kept, stride, rows.dtype, a.from,
            p.fault, a.id, i64(a.tile) * TILE, p.layer, head, u32(is_value ? FAULT_IN_V : FAULT_IN_K)};
}

// Copies the new rows to where they are kept as given.
DEVICE void keep(const EncodeParams &p, const Append &a, const Source &from, i32 head, bool is_value) {
    const Shape &s = p.shape;
    const i32 dim = is_value ? s.dim_v : s.dim_k;
    const i64 stride = kept_stride(s, is_value);
    const u64 exact = a.head + (is_value ? kept_offset(s, a.exact_head) : 0) + head * (stride / s.n_kv_heads);
    for (i32 at = thread(); at < (a.to - a.from) * dim; at += ENCODE_THREADS) {
        const i32 row = a.from + at / dim, c = at % dim;
        if (a.kept) from.keep(row, c, from.kept + row * stride);
        if (row < a.exact_head) from.keep(row, c, exact + row * stride);
    }
}

// Channels of word j: four, and four that are half a row on.
DEVICE i32 channel_of(i32 j, i32 i, i32 half) { return 4 * j + i % 4 + (i < 4 ? 0 : half); }

DEVICE void encode_keys(const Shape &s, const Task &a, const Source &from, const Tile &tile, i32 head, Encoding &e) {
    const i32 d = s.dim_k, words = d / 8, half = d / 2, skip = a.skip;
    const Tile base = a.base ? Tile(s, a.base, head) : tile;
    for (u32 c = thread(); c < MAX_DIM; c += ENCODE_THREADS) {
        e.peak[c] = 0;
        if (i32(c) < d) e.before[c] = base.k_scales[c];
    }
    if (thread() == 0) {
        e.any_grown = e.digit_sum = e.digit_square_sum = 0;
        e.slack = a.base ? float_bits(base.slack()) : 0;
    }
    const float lost = a.base ? add_rn(left(s.planes_k), base.slack()) : 0.0f;
    sync_block();

    // Peaks by channel. Rows that attend as given do not count, but are checked.
    float peak[MAX_DIM / 32] = {};
    for (i32 row = a.from + warp(); row < a.to; row += ENCODE_THREADS / 32) {
        if (!a.rows.has(row)) continue;
        for (i32 i = 0; i < MAX_DIM / 32; i++) {
            i32 c = lane() + 32 * i;
            if (c < d) {
                float x = magnitude(from.load(row, c));
                if (row >= skip && x > peak[i]) peak[i] = x;
            }
        }
    }
    for (i32 i = 0; i < MAX_DIM / 32; i++) {
        if (peak[i] > 0.0f) atomic_max(&e.peak[lane() + 32 * i], float_bits(peak[i]));
    }
    sync_block();

    // Scales only ever grow while a tile is open.
    for (i32 j = thread(); j < words; j += ENCODE_THREADS) {
        u32 grown = 0;
        for (i32 i = 0; i < 8; i++) {
            i32 c = channel_of(j, i, half);
            u32 old = a.anew ? 0 : tile.k_scales[c], byte = smallest(bits_float(e.peak[c]));
            if (byte > old) grown |= 1u << i;
            u32 now = byte > old ? byte : old;
            tile.k_scales[c] = u8(now);
            e.inverse[c] = inverse_of(now);
        }
        e.grown[j] = grown;
        if (grown) e.any_grown = 1;
    }
    sync_block();

    // Rows that were encoded under a smaller scale: these channels of theirs anew.
    if (e.any_grown) {
        for (i32 at = thread(); at < TILE * words; at += ENCODE_THREADS) {
            i32 row = at / words, j = at % words;
            u32 grown = e.grown[j], code[8];
            if (!grown || !a.others.has(row)) continue;
            for (i32 i = 0; i < 8; i++) {
                if (!(grown >> i & 1)) continue;
                i32 c = channel_of(j, i, half);
                float x;
                if (a.stored.has(row)) {
                    u32 stored = 0;
                    for (i32 plane = 0; plane < s.planes_k; plane++) {
                        u32 word = *reinterpret_cast<const u32 *>(base.k_word(row, plane, j));
                        stored = stored << 4 | (word >> (8 * (i % 4) + (i < 4 ? 0 : 4)) & 15);
                    }
                    x = mul_rn(decode(stored, s.planes_k), scale_of(e.before[c]));
                } else {
                    x = from.load(row, c);
                }
                code[i] = code_of(x, e.inverse[c]);
            }
            for (i32 plane = 0; plane < s.planes_k; plane++) {
                u32 *word = reinterpret_cast<u32 *>(tile.k_word(row, plane, j)), changed = *word;
                for (i32 i = 0; i < 8; i++) {
                    if (!(grown >> i & 1)) continue;
                    i32 shift = 8 * (i % 4) + (i < 4 ? 0 : 4);
                    changed = (changed & ~(15u << shift)) | (code[i] >> (12 - 4 * plane) & 15) << shift;
                }
                *word = changed;
            }
        }
    }

    for (i32 at = thread(); at < (a.to - a.from) * words; at += ENCODE_THREADS) {
        i32 row = a.from + at / words, j = at % words;
        if (!a.rows.has(row)) continue;
        u32 low[4], high[4];
        for (i32 i = 0; i < 4; i++) {
            i32 c = 4 * j + i;
            low[i] = row < skip ? ZERO : code_of(from.load(row, c), e.inverse[c]);
            high[i] = row < skip ? ZERO : code_of(from.load(row, c + half), e.inverse[c + half]);
        }
        for (i32 plane = 0; plane < s.planes_k; plane++) *reinterpret_cast<u32 *>(tile.k_word(row, plane, j)) = pack(low, high, plane);
    }

    // Rows that only the base knows carry its error, grown by what re-encoding them lost.
    if (a.base && a.stored.any()) {
        for (i32 c = thread(); c < d; c += ENCODE_THREADS) {
            if (tile.k_scales[c] > e.before[c]) {
                atomic_max(&e.slack, float_bits(mul_rn(lost, div_rn(scale_of(e.before[c]), scale_of(tile.k_scales[c])))));
            }
        }
    }
    sync_block();
    if (a.closes) {
        // Largest sum of magnitudes and of squares of a token's plane-0 digits.
        for (i32 row = skip + warp(); row < TILE; row += ENCODE_THREADS / 32) {
            i32 sum = 0, squares = 0;
            if (i32(lane()) < words) {
                u32 word = *reinterpret_cast<const u32 *>(tile.k0_word(row, lane()));
                for (i32 i = 0; i < 8; i++) {
                    i32 digit = i32(word >> 4 * i & 15) - 8;
                    sum += digit < 0 ? -digit : digit;
                    squares += digit * digit;
                }
            }
            for (u32 mask = 16; mask > 0; mask /= 2) {
                sum += shuffle_xor(sum, mask);
                squares += shuffle_xor(squares, mask);
            }
            if (lane() == 0) {
                atomic_max(&e.digit_sum, u32(sum));
                atomic_max(&e.digit_square_sum, u32(squares));
            }
        }
        sync_block();
    }
    if (thread() == 0) {
        tile.set_meta(a.closes ? e.digit_sum : 8 * d, a.closes ? e.digit_square_sum : 64 * d, bits_float(e.slack));
        if (!a.keeps_mean) *reinterpret_cast<u32 *>(tile.meta + 8) = 0;
    }
}

DEVICE void encode_values(const Shape &s, const Task &a, const Source &from, const Tile &tile, Encoding &e) {
    const i32 d = s.dim_v, words = d / 8, half = d / 2, skip = a.skip;
    for (i32 row = a.from + warp(); row < a.to; row += ENCODE_THREADS / 32) {
        if (!a.rows.has(row)) continue;
        const i32 j = lane();
        float x[8] = {}, peak = 0.0f;
        if (j < words) {
            for (i32 i = 0; i < 8; i++) {
                x[i] = from.load(row, channel_of(j, i, half));
                peak = magnitude(x[i]) > peak ? magnitude(x[i]) : peak;
            }
        }
        for (u32 mask = 16; mask > 0; mask /= 2) {
            float other = shuffle_xor(peak, mask);
            peak = other > peak ? other : peak;
        }
        u32 byte = row < skip ? 0 : smallest(peak);
        float inverse = inverse_of(byte);
        if (lane() == 0) tile.v_scales[row] = u8(byte);
        if (j < words) {
            u32 low[4], high[4];
            for (i32 i = 0; i < 4; i++) {
                low[i] = row < skip ? ZERO : code_of(x[i], inverse);
                high[i] = row < skip ? ZERO : code_of(x[i + 4], inverse);
            }
            for (i32 plane = 0; plane < s.planes_v; plane++) *reinterpret_cast<u32 *>(tile.v_word(row, plane, j)) = pack(low, high, plane);
        }
    }
    if (a.keeps_mean && !a.closes) return;
    if (thread() == 0) e.mean_peak = 0;
    sync_block();

    // The mean is that of the values as stored, summed in the order of the tokens. A channel each.
    static_assert(MAX_DIM <= ENCODE_THREADS, "a thread per channel");
    const i32 c = thread();
    const bool closed = a.closes && skip < TILE;
    float mean = 0.0f;
    if (closed && c < d) {
        i32 j = c % half / 4, shift = 8 * (c % 4) + (c < half ? 0 : 4);
        for (i32 row = skip; row < TILE; row++) {
            u32 prefix = 0;
            for (i32 plane = 0; plane < s.planes_v; plane++) {
                prefix = prefix << 4 | (*reinterpret_cast<const u32 *>(tile.v_word(row, plane, j)) >> shift & 15);
            }
            float x = s.planes_v == 0 ? from.load(row, c) : mul_rn(decode(prefix, s.planes_v), scale_of(tile.v_scales[row]));
            mean = add_rn(mean, x);
        }
        mean = div_rn(mean, float(TILE - skip));
        atomic_max(&e.mean_peak, float_bits(magnitude(mean)));
    }
    sync_block();
    if (c < d) {
        u32 code = 0;
        if (closed) {
            u32 byte = smallest(bits_float(e.mean_peak));
            if (c == 0) tile.meta[8] = u8(byte);
            // Sixteenths of the scale: two digits.
            code = float_bits(add_rn(mul_rn(mean, mul_rn(inverse_of(byte), 1.0f / 256.0f)), MAGIC)) - float_bits(MAGIC);
        }
        tile.v_mean[c] = u8(code);
    }
}

KERNEL(akv_encode, ENCODE_THREADS, 2, EncodeParams) {
    const Append a = reinterpret_cast<const Append *>(p.appends)[block_x()];
    if (a.to == 0) return;
    const i32 head = block_y();
    Encoding &e = *shared<Encoding>();
    const Tile tile(p.shape, a.page, head);
    const Source k = source_of(p, a, head, false), v = source_of(p, a, head, true);
    keep(p, a, k, head, false);
    keep(p, a, v, head, true);
    const bool anew = a.from == 0;
    const Task task = {Bits::range(a.from, a.to), a.from, a.to, Bits::range(a.exact_head, a.from), Bits::range(0, a.base_rows), a.base, a.exact_head,
                       anew, a.to == TILE, !anew && a.base == 0};
    encode_keys(p.shape, task, k, tile, head, e);
    encode_values(p.shape, task, v, tile, e);
}

// A tile's rows: kept ones, or the engine's own, from which what cannot be stored is told.
DEVICE Source rows_of_tile(const WriteParams &p, const CellWrite &w, i32 head, bool is_value) {
    const Shape &s = p.shape;
    const Rows &rows = is_value ? p.v : p.k;
    const i64 stride = kept_stride(s, is_value), kept = (is_value ? kept_offset(s, TILE) : 0) + head * (stride / s.n_kv_heads);
    return {row_of(rows, w.source, head), rows.stride_row, w.kept + kept, stride, is_value ? s.dtype_v : s.dtype_k, w.kept ? TILE : 0,
            p.fault, 0, w.slot, p.layer, head, u32(is_value ? FAULT_IN_V : FAULT_IN_K)};
}

// Copies the rows of cells to where they are kept as given.
DEVICE void keep_cells(const WriteParams &p, const CellWrite &w, i32 head, bool is_value) {
    const Shape &s = p.shape;
    const i32 dim = is_value ? s.dim_v : s.dim_k;
    const i64 stride = kept_stride(s, is_value), of_head = head * (stride / s.n_kv_heads);
    const u64 kept = w.kept + (is_value ? kept_offset(s, TILE) : 0) + of_head, exact = w.head + (is_value ? kept_offset(s, w.exact_head) : 0) + of_head;
    Source caller = rows_of_tile(p, w, head, is_value);
    caller.from = 0;
    for (i32 at = thread(); at < TILE * dim; at += ENCODE_THREADS) {
        const i32 cell = at / dim, row = w.from[cell];
        if (!Bits::of(w.cells).has(cell)) continue;
        caller.row = w.slot + cell - row;
        caller.keep(row, at % dim, (cell < w.skip ? exact : kept) + cell * stride);
    }
}

// A page of zeros, none of them a row.
DEVICE void blank(const Shape &s, const Tile &tile) {
    constexpr u32 ZEROS = (ZERO >> 8) * 0x01010101u;
    for (i32 i = thread(); i < TILE * tile.half_k / 4; i += ENCODE_THREADS) reinterpret_cast<u32 *>(tile.k0)[i] = ZEROS;
    for (i32 i = thread(); i < TILE * (tile.planes_k - 1) * tile.half_k / 4; i += ENCODE_THREADS) reinterpret_cast<u32 *>(tile.k_rest)[i] = ZEROS;
    for (i32 i = thread(); i < TILE * tile.planes_v * tile.half_v / 4; i += ENCODE_THREADS) reinterpret_cast<u32 *>(tile.v)[i] = ZEROS;
    for (i32 i = thread(); i < MAX_DIM; i += ENCODE_THREADS) {
        if (i < s.dim_k) tile.k_scales[i] = 0;
        if (i < TILE) tile.v_scales[i] = 0;
        if (i < s.dim_v) tile.v_mean[i] = 0;
    }
    if (thread() == 0) {
        tile.set_meta(8 * s.dim_k, 64 * s.dim_k, 0.0f);
        *reinterpret_cast<u32 *>(tile.meta + 8) = 0;
    }
}

KERNEL(akv_write, ENCODE_THREADS, 2, WriteParams) {
    const CellWrite &w = p.writes[block_x()];
    const i32 head = block_y();
    Encoding &e = *shared<Encoding>();
    // First the tile that rows are taken from, then the one that they go to.
    ROLLED
    for (i32 step = w.closed ? 0 : 1; step < 2; step++) {
        const bool closing = step == 0;
        const Tile tile(p.shape, closing ? w.closed : w.page, head);
        if (!closing) {
            if (w.what & WRITE_BLANK) blank(p.shape, tile);
            if (w.kept && p.k.data) keep_cells(p, w, head, false);
            if (w.kept && p.v.data) keep_cells(p, w, head, true);
        }
        sync_block();
        const u32 k_all = closing ? CLOSE_K : WRITE_K_ALL, v_all = closing ? CLOSE_V : WRITE_V_ALL;
        const i32 skip = closing ? w.closed_skip : w.skip;
        // The engine's own rows are checked, those too for which zeros stand.
        const Bits none = {0, 0}, cells = Bits::of(w.cells), paged = Bits::range(skip, TILE), others = Bits::of(w.others) & paged & ~cells;
        const Bits rows = w.kept ? cells & paged : cells, stored = others & ~Bits::of(w.known);
        auto task = [&](bool all) -> Task {
            return {all ? ~none : rows, 0, TILE, all ? none : others, all ? none : stored, all ? 0 : w.page, skip, all, all, !all};
        };
        if (w.what & (k_all | (closing ? 0 : WRITE_K))) encode_keys(p.shape, task(w.what & k_all), rows_of_tile(p, w, head, false), tile, head, e);
        sync_block();
        if (w.what & (v_all | (closing ? 0 : WRITE_V))) encode_values(p.shape, task(w.what & v_all), rows_of_tile(p, w, head, true), tile, e);
        sync_block();
    }
    if (head == 0 && thread() < 4 && w.written) reinterpret_cast<u32 *>(w.written)[thread()] = w.seen[thread()];
}

KERNEL(akv_adopt, ENCODE_THREADS, 2, AdoptParams) {
    const Shape &s = p.shape;
    const Tile from(s, p.from, block_y()), to(s, p.to, block_y());
    u32 &ratio = *shared<u32>();
    if (thread() == 0) ratio = 0;
    sync_block();
    if (p.key) {
        // Its error there, in units of the scales here.
        for (i32 c = thread(); c < s.dim_k; c += ENCODE_THREADS) {
            atomic_max(&ratio, float_bits(div_rn(scale_of(from.k_scales[c]), scale_of(to.k_scales[c]))));
        }
        sync_block();
        if (thread() == 0) {
            float lost = mul_rn(mul_rn(add_rn(left(s.planes_k), from.slack()), bits_float(ratio)), 1.0f + 1.1920929e-7f);
            // Rounding it to the layer's dtype, which can hold the row, moves it no further than it was off.
            if (s.dtype_k != F32) lost = mul_rn(2.0f, lost);
            if (lost > to.slack()) *reinterpret_cast<float *>(to.meta + 4) = lost;
        }
    }
    if (p.value) {
        for (i32 i = thread(); i < s.planes_v * to.half_v / 4; i += ENCODE_THREADS) {
            reinterpret_cast<u32 *>(to.v_word(p.to_row, 0, 0))[i] = reinterpret_cast<const u32 *>(from.v_word(p.from_row, 0, 0))[i];
        }
        if (thread() == 0) to.v_scales[p.to_row] = from.v_scales[p.from_row];
    }
}

}  // namespace akv
