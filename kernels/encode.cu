// Appends rows: keeps them as given while their tile is open, and encodes them. What is in a page afterwards depends on
// the rows and their number alone, and is bit for bit what src/format/aligned.rs writes.
//
// A block has the rows of one tile and KV head.
#include "format.cuh"

namespace akv {

constexpr u32 ENCODE_THREADS = 256;

// What the threads of a block share.
struct Encoding {
    u32 peak[MAX_DIM];      // bits of the largest magnitude by channel
    float inverse[MAX_DIM];
    u32 grown[MAX_DIM / 8];  // by word: bits of its channels whose scale has grown
    u32 any_grown;
    u32 digit_sum, digit_square_sum;
    u32 slack, mean_peak;  // bits of floats that are not negative
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
};

DEVICE Source source_of(const EncodeParams &p, const Append &a, i32 head, bool is_value) {
    const Shape &s = p.shape;
    const Rows &rows = is_value ? p.v : p.k;
    i64 size_k = i64(s.n_kv_heads) * s.dim_k * size_of_dtype(s.dtype_k), size_v = i64(s.n_kv_heads) * s.dim_v * size_of_dtype(s.dtype_v);
    i64 size = is_value ? size_v : size_k;
    i64 kept = is_value ? (TILE * size_k + 63) / 64 * 64 : 0;
    return {row_of(rows, a.source - a.from, head), rows.stride_row, a.kept + kept + head * (size / s.n_kv_heads), size, rows.dtype, a.from,
            p.fault, a.id, i64(a.tile) * TILE, p.layer, head, u32(is_value ? FAULT_IN_V : FAULT_IN_K)};
}

// Copies the new rows to where they are kept as given.
DEVICE void keep(const EncodeParams &p, const Append &a, const Source &from, i32 head, bool is_value) {
    const Shape &s = p.shape;
    i32 dim = is_value ? s.dim_v : s.dim_k, size = size_of_dtype(from.dtype);
    i64 stride = i64(s.n_kv_heads) * dim * size;
    i64 before = i64(a.exact_head) * s.n_kv_heads * s.dim_k * size_of_dtype(s.dtype_k);
    u64 exact = a.head + (is_value ? (before + 63) / 64 * 64 : 0) + i64(head) * dim * size;
    for (i32 at = thread(); at < (a.to - a.from) * dim; at += ENCODE_THREADS) {
        i32 row = a.from + at / dim, c = at % dim;
        u64 address = from.row_address(row);
        for (i32 i = 0; i < 2; i++) {
            if (i == 0 ? a.kept == 0 : row >= a.exact_head) continue;
            u64 to = (i == 0 ? from.kept : exact) + row * stride;
            if (size == 4) {
                reinterpret_cast<u32 *>(to)[c] = reinterpret_cast<const u32 *>(address)[c];
            } else {
                reinterpret_cast<u16 *>(to)[c] = reinterpret_cast<const u16 *>(address)[c];
            }
        }
    }
}

// Channels of word j: four, and four that are half a row on.
DEVICE i32 channel_of(i32 j, i32 i, i32 half) { return 4 * j + i % 4 + (i < 4 ? 0 : half); }

DEVICE void encode_keys(const EncodeParams &p, const Append &a, const Source &from, const Tile &tile, i32 head, Encoding &e) {
    const Shape &s = p.shape;
    const i32 d = s.dim_k, words = d / 8, half = d / 2, skip = a.exact_head;
    const Tile base(s, a.base ? a.base : a.page, head);
    for (u32 c = thread(); c < MAX_DIM; c += ENCODE_THREADS) e.peak[c] = 0;
    if (thread() == 0) {
        e.any_grown = e.digit_sum = e.digit_square_sum = 0;
        e.slack = a.base ? float_bits(base.slack()) : 0;
    }
    sync_block();

    // Peaks by channel. Rows that attend as given do not count, but are checked.
    float peak[MAX_DIM / 32] = {};
    for (i32 row = a.from + warp(); row < a.to; row += ENCODE_THREADS / 32) {
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
            u32 old = a.from == 0 ? 0 : tile.k_scales[c], byte = smallest(bits_float(e.peak[c]));
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
        for (i32 at = thread(); at < (a.from - skip) * words; at += ENCODE_THREADS) {
            i32 row = skip + at / words, j = at % words;
            u32 grown = e.grown[j], code[8];
            if (!grown) continue;
            for (i32 i = 0; i < 8; i++) {
                if (!(grown >> i & 1)) continue;
                i32 c = channel_of(j, i, half);
                float x;
                if (row < a.base_rows) {
                    u32 stored = 0;
                    for (i32 plane = 0; plane < s.planes_k; plane++) {
                        u32 word = *reinterpret_cast<const u32 *>(base.k_word(row, plane, j));
                        stored = stored << 4 | (word >> (8 * (i % 4) + (i < 4 ? 0 : 4)) & 15);
                    }
                    x = mul_rn(decode(stored, s.planes_k), scale_of(base.k_scales[c]));
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
        u32 low[4], high[4];
        for (i32 i = 0; i < 4; i++) {
            i32 c = 4 * j + i;
            low[i] = row < skip ? ZERO : code_of(from.load(row, c), e.inverse[c]);
            high[i] = row < skip ? ZERO : code_of(from.load(row, c + half), e.inverse[c + half]);
        }
        for (i32 plane = 0; plane < s.planes_k; plane++) *reinterpret_cast<u32 *>(tile.k_word(row, plane, j)) = pack(low, high, plane);
    }

    // Rows that only the base knows carry its error, grown by what re-encoding them lost.
    if (a.base) {
        float lost = add_rn(left(s.planes_k), base.slack());
        for (i32 c = thread(); c < d; c += ENCODE_THREADS) {
            if (tile.k_scales[c] > base.k_scales[c]) {
                atomic_max(&e.slack, float_bits(mul_rn(lost, div_rn(scale_of(base.k_scales[c]), scale_of(tile.k_scales[c])))));
            }
        }
    }
    sync_block();
    if (a.to == TILE) {
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
        bool whole = a.to == TILE;
        tile.set_meta(whole ? e.digit_sum : 8 * d, whole ? e.digit_square_sum : 64 * d, bits_float(e.slack));
        if (a.from == 0 || a.base) *reinterpret_cast<u32 *>(tile.meta + 8) = 0;
    }
}

DEVICE void encode_values(const EncodeParams &p, const Append &a, const Source &from, const Tile &tile, Encoding &e) {
    const Shape &s = p.shape;
    const i32 d = s.dim_v, words = d / 8, half = d / 2, skip = a.exact_head;
    for (i32 row = a.from + warp(); row < a.to; row += ENCODE_THREADS / 32) {
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
    if (thread() == 0) e.mean_peak = 0;
    sync_block();

    // The mean is that of the values as stored, summed in the order of the tokens. A channel each.
    static_assert(MAX_DIM <= ENCODE_THREADS, "a thread per channel");
    const i32 c = thread();
    const bool closed = a.to == TILE && skip < TILE;
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
    encode_keys(p, a, k, tile, head, e);
    encode_values(p, a, v, tile, e);
}

}  // namespace akv
