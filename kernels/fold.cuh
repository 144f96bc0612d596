// q folded with a tile's K scales and rounded to two int8 digits (src/backend/cpu/fold.rs, the same integers), as the
// right-hand operand of an integer mma: tokens are rows, the digits of four heads its eight columns.
//
// A quad of lanes shares a row of the left-hand operand: its lane t has words S t .. S t + S - 1 of a digit row, the low
// nibbles as k = 4t.., the high ones as k = 16 + 4t.. of one mma per word.
#pragma once
#include "unit.cuh"

namespace akv {

// One head's folded q, on the lanes that get its scores.
struct Folded {
    float step, worst, rough, q_worst;
    i32 q_sum;

    // A score from the sum of nibbles * q: digits are nibbles - 8, centred on what they leave out.
    DEVICE float score(i32 high, i32 low) const {
        i32 digits = i32(u32(high) * 256u + u32(low) - u32(q_sum) * 8u);
        return mul_rn(add_rn(float(digits), mul_rn(centre(1), float(q_sum))), step);
    }
    // What digit `plane` of a token that is read to `planes` planes adds to it.
    DEVICE float more(i32 high, i32 low, i32 plane, i32 planes) const {
        i32 digits = i32(u32(high) * 256u + u32(low) - u32(q_sum) * 8u);
        float centred = plane == 1 ? mul_rn(centre(planes) - centre(1), float(q_sum)) : 0.0f;
        return mul_rn(add_rn(mul_rn(float(digits), weight(plane)), centred), step);
    }
};

// Of the four heads from `first` on.
template <i32 S>
struct Fold {
    u32 b[S][2];
    Folded head;

    DEVICE Fold(const Queries &q, const Tile &tile, i32 first) {
        const i32 t = lane() % 4, column = lane() / 4, words = tile.half_k / 4, digit = column % 2, h = first + column / 2;
        // Scale bytes of four channels of a word.
        auto scales = [&](i32 s, i32 high) {
            const i32 j = S * t + s;
            return j < words ? load_u32(tile.k_scales + high * tile.half_k + 4 * j) : 0;
        };
        float peak = 0.0f, worst = 0.0f, rough = 0.0f;
        // Once more below: wide rows have too many channels to keep them in registers.
        ROLLED
        for (i32 s = 0; s < S; s++) {
            const u32 bytes[2] = {scales(s, 0), scales(s, 1)};
            UNROLLED
            for (i32 i = 0; i < 8; i++) {
                const float f = mul_rn(q.at(h, S * t + s, i), scale_of(bytes[i / 4] >> 8 * (i % 4) & 255)), size = magnitude(f);
                peak = larger(peak, size);
                worst += size;
                rough = fma_rn(f, f, rough);
            }
        }
        for (u32 mask = 1; mask <= 2; mask *= 2) {
            peak = larger(peak, shuffle_xor(peak, mask));
            worst += shuffle_xor(worst, mask);
            rough += shuffle_xor(rough, mask);
        }
        constexpr float LEVELS = 127.0f * 257.0f;
        // Too small to be rounded to anything: all digits 0, and the whole of q is error.
        const bool vanishing = peak < 1e-30f;
        const float step = vanishing ? 0.0f : div_rn(peak, LEVELS), inverse = vanishing ? 0.0f : div_rn(LEVELS, peak);
        i32 q_sum = 0;
        UNROLLED
        for (i32 s = 0; s < S; s++) {
            const u32 bytes[2] = {scales(s, 0), scales(s, 1)};
            b[s][0] = b[s][1] = 0;
            UNROLLED
            for (i32 i = 0; i < 8; i++) {
                const float f = mul_rn(q.at(h, S * t + s, i), scale_of(bytes[i / 4] >> 8 * (i % 4) & 255));
                const i32 r = i32(float_bits(add_rn(mul_rn(f, inverse), MAGIC)) - float_bits(MAGIC));
                q_sum += r;
                b[s][i / 4] |= (u32(digit == 0 ? (r + 128) >> 8 : r) & 255) << 8 * (i % 4);
            }
        }
        q_sum += shuffle_xor(q_sum, 1);
        q_sum += shuffle_xor(q_sum, 2);
        // Scores of head first + t go to lane t of a quad.
        const u32 from = 8 * t;
        head = {shuffle(step, from), shuffle(worst, from) * (1.0f + 1e-5f), sqrt_rn(shuffle(rough, from)), shuffle(peak, from), shuffle(q_sum, from)};
        // Half a step (0.51: the product is rounded too) for every channel, whose value is within its digit's +- 1.
        head.q_worst = head.q_worst < 1e-30f ? head.q_worst * float(2 * tile.half_k) * PEAK
                                             : 0.51f * head.step * float(i32(tile.digit_sum()) + 2 * tile.half_k);
    }
};

// Words of a digit row that belong to this lane, zeros beyond its end.
template <i32 S>
DEVICE void load_words(const u8 *row, i32 half, u32 (&w)[S]) {
    const i32 t = lane() % 4;
    if (S % 4 == 0 && half == 16 * S) {
        for (i32 s = 0; s < S; s += 4) {
            uint4 x = load_u32x4(row + 4 * (S * t + s));
            w[s] = x.x, w[(s + 1) % S] = x.y, w[(s + 2) % S] = x.z, w[(s + 3) % S] = x.w;
        }
    } else if (S % 2 == 0 && half == 16 * S) {
        for (i32 s = 0; s < S; s += 2) {
            uint2 x = load_u32x2(row + 4 * (S * t + s));
            w[s] = x.x, w[(s + 1) % S] = x.y;
        }
    } else {
        for (i32 s = 0; s < S; s++) w[s] = S * t + s < half / 4 ? load_u32(row + 4 * (S * t + s)) : 0;
    }
}

}  // namespace akv
