// q folded with a tile's K scales and rounded to two int8 digits (src/backend/cpu/fold.rs, the same integers), as the
// right-hand operand of an integer mma: tokens are rows, the digits of four heads its eight columns.
//
// A quad of lanes shares a row of the left-hand operand: its lane t has words S t .. S t + S - 1 of a digit row, low nibbles
// apart from high ones. Any four channels of a lane may be any four of an mma's, as long as both operands agree.
#pragma once
#include "unit.cuh"

namespace akv {

// Words of a digit row that belong to this lane, zeros beyond its end. `near`: they are in shared memory.
template <i32 S>
DEVICE void load_words(const u8 *row, i32 half, u32 (&w)[S], bool near = false) {
    const i32 t = lane() % 4;
    if (S % 4 == 0 && half == 16 * S) {
        UNROLLED
        for (i32 s = 0; s < S; s += 4) {
            const uint4 *const from = reinterpret_cast<const uint4 *>(row + 4 * (S * t + s));
            const uint4 x = near ? *from : *global(from);
            w[s] = x.x, w[(s + 1) % S] = x.y, w[(s + 2) % S] = x.z, w[(s + 3) % S] = x.w;
        }
    } else if (S % 2 == 0 && half == 16 * S) {
        UNROLLED
        for (i32 s = 0; s < S; s += 2) {
            const uint2 *const from = reinterpret_cast<const uint2 *>(row + 4 * (S * t + s));
            const uint2 x = near ? *from : *global(from);
            w[s] = x.x, w[(s + 1) % S] = x.y;
        }
    } else {
        UNROLLED
        for (i32 s = 0; s < S; s++) w[s] = S * t + s < half / 4 ? *reinterpret_cast<const u32 *>(row + 4 * (S * t + s)) : 0;
    }
}

// a / b rounded once, if both are normal numbers and their quotient is far from the ends of the range. `inverse`: of b,
// within 1 unit in the last place.
DEVICE float divide(float a, float b, float inverse) {
    float y = mul_rn(a, inverse);
    return fma_rn(fma_rn(-b, y, a), inverse, y);
}

// Of the four heads from `first` on.
template <i32 S>
struct Fold {
    u32 low[S], high[S];  // this lane's part of the operand: channels of the low nibbles, of the high ones
    // Of head first + lane % 4, whose scores are this lane's.
    i32 start[2];        // -8 times the sum of each digit: sums start from it, as digits are nibbles - 8
    float step, q_sum;   // the sum of rounded q, in steps
    // Of head first + lane / 8.
    float worst, rough, peak, own_step;

    // `near`: the tile's scales are in shared memory.
    DEVICE Fold(const Queries &q, const Tile &tile, i32 first, bool near = false) {
        // Of two lanes with a head's two digits, one folds the channels of the low nibbles, and one those of the high
        // ones; then each has the other's digits of its kind.
        const i32 t = lane() % 4, odd = lane() / 4 % 2;
        const float *of_head = q.part(first + lane() / 8, odd, t);
        u32 scales[S];
        load_words<S>(tile.k_scales + odd * tile.half_k, tile.half_k, scales, near);
        float f[S][4];
        peak = worst = rough = 0.0f;
        UNROLLED
        for (i32 s = 0; s < S; s++) {
            const float4 x = *reinterpret_cast<const float4 *>(of_head + 32 * s);
            const float channels[4] = {x.x, x.y, x.z, x.w};
            UNROLLED
            for (i32 i = 0; i < 4; i++) {
                f[s][i] = mul_rn(channels[i], scale_of(byte_of(scales[s], i)));
                peak = most(peak, magnitude(f[s][i]));
                worst += magnitude(f[s][i]);
                rough = fma_rn(f[s][i], f[s][i], rough);
            }
        }
        for (u32 mask = 1; mask <= 4; mask *= 2) {
            peak = most(peak, shuffle_xor(peak, mask));
            worst += shuffle_xor(worst, mask);
            rough += shuffle_xor(rough, mask);
        }
        constexpr float LEVELS = 127.0f * 257.0f;
        // Too small to be rounded to anything: all digits 0, and the whole of q is error. (Too large: a fault, by `worst`.)
        const bool vanishing = peak < 1e-30f;
        float inverse = inverse_fast(peak);
        inverse = fma_rn(fma_rn(-peak, inverse, 1.0f), inverse, inverse);
        inverse = vanishing ? 0.0f : divide(LEVELS, peak, inverse);
        own_step = vanishing ? 0.0f : divide(peak, LEVELS, 1.0f / LEVELS);
        // Rounded q + 0x8080, which is positive: its bytes are the digits, but for their topmost bits.
        const u32 mine = odd ? 0x6420 : 0x7531, other = odd ? 0x7531 : 0x6420;
        UNROLLED
        for (i32 s = 0; s < S; s++) {
            u32 r[4];
            UNROLLED
            for (i32 i = 0; i < 4; i++) r[i] = float_bits(add_rn(mul_rn(f[s][i], inverse), MAGIC + 32896.0f));
            const u32 x = permute(r[0], r[1], 0x5410) ^ 0x80808080, y = permute(r[2], r[3], 0x5410) ^ 0x80808080;
            const u32 own = permute(x, y, mine), got = shuffle_xor(permute(x, y, other), 4);
            low[s] = odd ? got : own, high[s] = odd ? own : got;
        }
        i32 c[4] = {};
        const u32 eights[4] = {0x08080808, 0x08080808, 0x08080808, 0x08080808};
        UNROLLED
        for (i32 s = 0; s + 1 < S; s += 2) mma_u8s8(c, eights, low[s], low[s + 1]), mma_u8s8(c, eights, high[s], high[s + 1]);
        if (S % 2 == 1) mma_u8s8(c, eights, low[S - 1], high[S - 1]);
        start[0] = -c[0], start[1] = -c[1];
        q_sum = float((c[0] * 256 + c[1]) / 8);
        step = shuffle(own_step, 8 * t);
    }

    // A score from the sums of digits * q.
    DEVICE float score(i32 digits) const { return mul_rn(add_rn(float(digits), mul_rn(centre(1), q_sum)), step); }
    // What digit `plane` of a token that is read to `planes` planes adds to it.
    DEVICE float more(i32 digits, i32 plane, i32 planes) const {
        float centred = plane == 1 ? mul_rn(centre(planes) - centre(1), q_sum) : 0.0f;
        return mul_rn(add_rn(mul_rn(float(digits), weight(plane)), centred), step);
    }

    // The errors of head first + lane / 8.
    DEVICE float most_of_score() const { return worst * (1.0f + 1e-5f); }
    // Half a step (0.51: the product is rounded too) for every channel, whose value is within its digit's +- 1.
    DEVICE float q_worst(const Tile &tile) const {
        return peak < 1e-30f ? peak * float(2 * tile.half_k) * PEAK : 0.51f * own_step * float(i32(tile.digit_sum()) + 2 * tile.half_k);
    }
    DEVICE float q_rms(const Tile &tile) const { return own_step * 0.28867513f * sqrt_fast(float(tile.digit_square_sum())); }
};

}  // namespace akv
