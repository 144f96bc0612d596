// The stored numbers, as src/format defines them: scale bytes, codes, planes, and where the bytes of a tile lie.
#pragma once
#include "fault.cuh"

namespace akv {

constexpr i32 TILE = 128;
constexpr i32 MAX_DIM = 256;
constexpr i32 PLANES = 4;
constexpr i32 META_BYTES = 12;
constexpr i32 OFFSET = 0x8888;
constexpr float CODE_MAX = 0x7777, CODE_MIN = -0x8888;
constexpr float PEAK = 30583.0f / 4096.0f;
constexpr float MAGIC = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer, in the low bits

// What p planes leave out on average, and at most, in units of the scale.
DEVICE float centre(i32 planes) {
    constexpr float table[PLANES + 1] = {0.0f, -0.5f * (1 / 16.0f + 1 / 256.0f + 1 / 4096.0f), -0.5f * (1 / 256.0f + 1 / 4096.0f),
                                         -0.5f / 4096.0f, 0.0f};
    return planes == 1 ? table[1] : planes == 2 ? table[2] : planes == 3 ? table[3] : 0.0f;
}
DEVICE float left(i32 planes) {
    constexpr float rounding = 0.51f / 4096.0f;
    constexpr float table[PLANES + 1] = {PEAK, 7.5f * (1 / 16.0f + 1 / 256.0f + 1 / 4096.0f) + rounding,
                                         7.5f * (1 / 256.0f + 1 / 4096.0f) + rounding, 7.5f / 4096.0f + rounding, rounding};
    return planes == 0 ? table[0] : planes == 1 ? table[1] : planes == 2 ? table[2] : planes == 3 ? table[3] : table[4];
}
// Weight of a plane's digit: 16^-plane.
DEVICE float weight(i32 plane) { return bits_float(u32(127 - 4 * plane) << 23); }

DEVICE float scale_of(u32 byte) { return bits_float((byte << 21) + (95u << 23) + (1u << 20)); }
DEVICE u32 byte_of(u32 word, i32 i) { return permute(word, 0, 0x4440 + i); }
// What a value is multiplied with to get its code.
DEVICE float inverse_of(u32 byte) { return div_rn(4096.0f, scale_of(byte)); }
DEVICE float limit_of(u32 byte) { return mul_rn(scale_of(byte), PEAK); }

// Smallest scale byte that holds |x| <= peak; the peak fits.
DEVICE u32 smallest(float peak) {
    u32 bits = float_bits(div_rn(peak, PEAK)) >> 21;
    u32 u = bits < 380 ? 0 : bits - 380 > 255 ? 255 : bits - 380;
    while (u < 255 && limit_of(u) < peak) u++;
    while (u > 0 && limit_of(u - 1) >= peak) u--;
    return u;
}

// Stored code of x, given the inverse of its scale.
DEVICE u32 code_of(float x, float inverse) {
    float y = mul_rn(x, inverse);
    y = y < CODE_MIN ? CODE_MIN : y > CODE_MAX ? CODE_MAX : y;
    return (float_bits(add_rn(y, MAGIC)) - float_bits(MAGIC) + OFFSET) & 0xffff;
}
constexpr u32 ZERO = OFFSET;

// Value of a prefix of planes (the digits as one integer), in units of the scale.
DEVICE float decode(u32 prefix, i32 planes) {
    i32 digits = i32(prefix) - (OFFSET >> 4 * (PLANES - planes));
    return add_rn(mul_rn(float(digits), weight(planes - 1)), centre(planes));
}

// Digit `plane` of eight codes: a word of a plane's row. The first four channels are in the low nibbles.
DEVICE u32 pack(const u32 (&low)[4], const u32 (&high)[4], i32 plane) {
    i32 shift = 12 - 4 * plane;
    u32 word = 0;
    for (i32 i = 0; i < 4; i++) word |= ((low[i] >> shift & 15) | (high[i] >> shift & 15) << 4) << 8 * i;
    return word;
}

constexpr i32 LANES = 16;  // tokens whose plane-0 words lie together

DEVICE i32 align64(i32 bytes) { return (bytes + 63) & ~63; }

// A tile of one KV head: addresses of its arrays (src/format/aligned.rs has their order and shapes). Word j of a row
// holds channels 4j.. in its low nibbles and dim / 2 + 4j.. in its high ones.
struct Tile {
    u8 *k0, *k_rest, *v, *k_scales, *v_scales, *v_mean, *meta;
    i32 half_k, half_v, planes_k, planes_v;

    DEVICE static i32 bytes(const Shape &s) {
        return align64(TILE * s.dim_k / 2) + align64(TILE * (s.planes_k - 1) * s.dim_k / 2) + align64(TILE * s.planes_v * s.dim_v / 2) +
               align64(s.dim_k) + align64(TILE) + align64(s.dim_v) + align64(12);
    }

    // Offsets in a page have 32 bits: loops keep them in half as many registers.
    DEVICE Tile(const Shape &s, u64 page, i32 kv_head)
        : half_k(s.dim_k / 2), half_v(s.dim_v / 2), planes_k(s.planes_k), planes_v(s.planes_v) {
        u32 offset = u32(kv_head) * u32(bytes(s));
        auto next = [&](i32 bytes) {
            u8 *array = reinterpret_cast<u8 *>(page + offset);
            offset += align64(bytes);
            return array;
        };
        k0 = next(TILE * half_k);
        k_rest = next(TILE * (planes_k - 1) * half_k);
        v = next(TILE * planes_v * half_v);
        k_scales = next(s.dim_k);
        v_scales = next(TILE);
        v_mean = next(s.dim_v);
        meta = next(META_BYTES);
    }
    // Word j of a token's plane-0 row.
    DEVICE u8 *k0_word(i32 row, i32 j) const { return k0 + row / LANES * LANES * half_k + j * 4 * LANES + row % LANES * 4; }
    DEVICE u8 *k_word(i32 row, i32 plane, i32 j) const {
        return plane == 0 ? k0_word(row, j) : k_rest + (row * (planes_k - 1) + plane - 1) * half_k + 4 * j;
    }
    DEVICE u8 *v_word(i32 row, i32 plane, i32 j) const { return v + (row * planes_v + plane) * half_v + 4 * j; }

    DEVICE u32 digit_sum() const { return *reinterpret_cast<const u16 *>(meta); }
    DEVICE u32 digit_square_sum() const { return *reinterpret_cast<const u16 *>(meta + 2); }
    DEVICE float slack() const { return *reinterpret_cast<const float *>(meta + 4); }
    DEVICE float mean_unit() const { return scale_of(meta[8]) * (1.0f / 16.0f); }
    DEVICE void set_meta(u32 digit_sum, u32 digit_square_sum, float slack) const {
        *reinterpret_cast<u32 *>(meta) = digit_sum | digit_square_sum << 16;
        *reinterpret_cast<float *>(meta + 4) = slack;
    }
};

DEVICE i32 size_of_dtype(i32 dtype) { return dtype == F32 ? 4 : 2; }

// An element of a caller's row as a float, and back.
DEVICE float load_element(u64 row, i32 dtype, i32 i) {
    if (dtype == F32) return reinterpret_cast<const float *>(row)[i];
    u16 bits = reinterpret_cast<const u16 *>(row)[i];
    return dtype == F16 ? half_to_float(bits) : bf16_to_float(bits);
}
DEVICE void store_element(u64 row, i32 dtype, i32 i, float x) {
    if (dtype == F32) {
        reinterpret_cast<float *>(row)[i] = x;
    } else {
        reinterpret_cast<u16 *>(row)[i] = dtype == F16 ? float_to_half(x) : float_to_bf16(x);
    }
}
// Where V begins in a block of `n` rows as given, of all KV heads.
DEVICE i64 kept_offset(const Shape &s, i32 n) { return (i64(n) * s.n_kv_heads * s.dim_k * size_of_dtype(s.dtype_k) + 63) / 64 * 64; }

// The bits of an element, and back.
DEVICE u32 load_bits(u64 row, i32 dtype, i32 i) {
    return dtype == F32 ? reinterpret_cast<const u32 *>(row)[i] : reinterpret_cast<const u16 *>(row)[i];
}
DEVICE void store_bits(u64 row, i32 dtype, i32 i, u32 bits) {
    if (dtype == F32) {
        reinterpret_cast<u32 *>(row)[i] = bits;
    } else {
        reinterpret_cast<u16 *>(row)[i] = u16(bits);
    }
}

// Tokens of one KV head, without loss: rows in a dtype; or cut, as published: [token][dim] of high bytes, then [token][dim / 2]
// of the middle and of the low digits of f16 (src/format/raw.rs, published.rs).
struct Given {
    u64 rows, written;  // the latter: const u32 [4], bits of those that there are; 0 = all
    i64 stride;
    i32 dtype, dim, n;
    bool cut;

    // The first n rows of a page.
    DEVICE static Given page(const Shape &s, u64 page, i32 kv_head, bool values, i32 n) {
        const i32 dim = values ? s.dim_v : s.dim_k, dtype = values ? s.dtype_v : s.dtype_k;
        const i32 size_k = align64(TILE * s.dim_k * size_of_dtype(s.dtype_k)), size_v = align64(TILE * s.dim_v * size_of_dtype(s.dtype_v));
        const u64 part = page + i64(kv_head) * (size_k + size_v);
        return {part + (values ? size_k : 0), 0, dim * size_of_dtype(dtype), dtype, dim, n, s.format == FORMAT_PUBLISHED};
    }

    DEVICE u8 *high(i32 i, i32 c) const { return reinterpret_cast<u8 *>(rows) + i * dim + c; }
    DEVICE u8 *middle(i32 i, i32 c) const { return reinterpret_cast<u8 *>(rows) + TILE * dim + i * (dim / 2) + c % (dim / 2); }
    DEVICE u8 *low(i32 i, i32 c) const { return middle(i, c) + TILE * (dim / 2); }
    // The f16 of a cut row.
    DEVICE u32 half_bits(i32 i, i32 c) const {
        const i32 shift = c < dim / 2 ? 0 : 4;
        return u32(*high(i, c)) << 8 | (*middle(i, c) >> shift & 15) << 4 | (*low(i, c) >> shift & 15);
    }
    DEVICE bool has(i32 i) const { return i < n && (!written || reinterpret_cast<const u32 *>(written)[i / 32] >> i % 32 & 1); }
    // 0 where there is no element.
    DEVICE float load(i32 i, i32 c) const {
        if (c >= dim || !has(i)) return 0.0f;
        return cut ? half_to_float(u16(half_bits(i, c))) : load_element(rows + i * stride, dtype, c);
    }
    // Channels c and c + dim / 2.
    DEVICE void store(i32 i, i32 c, u32 x, u32 y) const {
        if (cut) {
            *high(i, c) = u8(x >> 8), *high(i, c + dim / 2) = u8(y >> 8);
            *middle(i, c) = u8((x >> 4 & 15) | (y >> 4 & 15) << 4), *low(i, c) = u8((x & 15) | (y & 15) << 4);
        } else {
            store_bits(rows + i * stride, dtype, c, x), store_bits(rows + i * stride, dtype, c + dim / 2, y);
        }
    }
};

DEVICE u64 row_of(const Rows &rows, i64 row, i32 head) { return rows.data + row * rows.stride_row + head * rows.stride_head; }

}  // namespace akv
