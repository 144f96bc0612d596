// q folded with a tile's K scales and rounded to two int8 digits (src/backend/cpu/fold.rs, the same integers), as the
// right-hand operand of an integer mma: tokens are rows, the digits of four heads its eight columns.
//
// A quad of lanes shares a row of the left-hand operand: its lane t has words S t .. S t + S - 1 of a digit row, the low
// nibbles as k = 4t.., the high ones as k = 16 + 4t.. of one mma per word.
#pragma once
#include "unit.cuh"

namespace akv {

// True if there are registers for a lane's whole part of q, and for whatever else saves instructions: not for wide rows, nor
// on architectures from 10.0 on, whose compiler keeps more in registers, and spills.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000
template <i32 S>
constexpr bool HAS_ROOM = false;
#else
template <i32 S>
constexpr bool HAS_ROOM = S <= 4;
#endif

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
        // Eight channels of a word, times their scales.
        auto folded = [&](i32 s, float (&f)[8]) {
            const u32 bytes[2] = {scales(s, 0), scales(s, 1)};
            for (i32 i = 0; i < 8; i++) f[i] = mul_rn(q.at(h, S * t + s, i), scale_of(bytes[i / 4] >> 8 * (i % 4) & 255));
        };
        // Wide rows have too many channels to keep them in registers: they are folded once more below.
        constexpr bool KEEPS = HAS_ROOM<S>;
        float kept[KEEPS ? S : 1][8], peak = 0.0f, worst = 0.0f, rough = 0.0f;
        auto weigh = [&](const float (&f)[8]) {
            for (i32 i = 0; i < 8; i++) {
                peak = most(peak, magnitude(f[i]));
                worst += magnitude(f[i]);
                rough = fma_rn(f[i], f[i], rough);
            }
        };
        if (KEEPS) {
            UNROLLED
            for (i32 s = 0; s < S; s++) folded(s, kept[KEEPS ? s : 0]), weigh(kept[KEEPS ? s : 0]);
        } else {
            ROLLED
            for (i32 s = 0; s < S; s++) folded(s, kept[0]), weigh(kept[0]);
        }
        for (u32 mask = 1; mask <= 2; mask *= 2) {
            peak = most(peak, shuffle_xor(peak, mask));
            worst += shuffle_xor(worst, mask);
            rough += shuffle_xor(rough, mask);
        }
        constexpr float LEVELS = 127.0f * 257.0f;
        // Too small to be rounded to anything: all digits 0, and the whole of q is error.
        const bool vanishing = peak < 1e-30f;
        const float step = vanishing ? 0.0f : div_rn(peak, LEVELS), inverse = vanishing ? 0.0f : div_rn(LEVELS, peak);
        // The high digit is byte 1 of r + 128, the low one byte 0 of r: packed by fours, from two and two.
        const u32 zero = float_bits(MAGIC) - (digit == 0 ? 128 : 0), bytes_of_two = digit == 0 ? 0x51 : 0x40;
        i32 q_sum = digit == 0 ? -128 * 8 * S : 0;
        UNROLLED
        for (i32 s = 0; s < S; s++) {
            float(&f)[8] = kept[KEEPS ? s : 0];
            if (!KEEPS) folded(s, f);
            u32 r[8];
            for (i32 i = 0; i < 8; i++) {
                r[i] = float_bits(add_rn(mul_rn(f[i], inverse), MAGIC)) - zero;
                q_sum += i32(r[i]);
            }
            for (i32 i = 0; i < 2; i++) {
                const u32 *x = r + 4 * i;
                b[s][i] = permute(permute(x[0], x[1], bytes_of_two), permute(x[2], x[3], bytes_of_two), 0x5410);
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
