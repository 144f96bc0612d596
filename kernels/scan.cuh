// First phase of a split: scores of all its tokens from plane 0 of K, and the sums that everything is decided from.
#pragma once
#include "fold.cuh"

namespace akv {

// The scan of a tile by a warp, four heads at a time: lane 4 g + t has, of every 32 tokens, scores of tokens
// 4 g .. 4 g + 3 for the head first + t.
template <i32 S>
DEVICE void scan_tile(const Unit &u, const Queries &q, i32 t) {
    const i32 quad = lane() / 4;
    u32 seen[4];
    for (i32 w = 0; w < 4; w++) seen[w] = u.seen_paged(t, w);
    if ((seen[0] | seen[1] | seen[2] | seen[3]) == 0) {
        for (i32 h = lane(); h < u.heads; h += 32) {
            Scanned none = {};
            none.max = -infinity();
            u.scanned(t, h) = none;
        }
        return;
    }
    const Tile tile = u.tile(t);
    u32 v_scales[4];
    float unit_max = 0.0f;
    UNROLLED
    for (i32 block = 0; block < 4; block++) {
        v_scales[block] = load_u32(tile.v_scales + 32 * block + 4 * quad);
        for (i32 i = 0; i < 4; i++) {
            if (seen[block] >> (4 * quad + i) & 1) unit_max = most(unit_max, scale_of(v_scales[block] >> 8 * i & 255));
        }
    }
    for (u32 mask = 4; mask <= 16; mask *= 2) unit_max = most(unit_max, shuffle_xor(unit_max, mask));

    const bool bends = u.bends(t);
    const u8 *from = tile.k0 + (quad >> 2) * LANES * tile.half_k + (quad & 3) * 16;
    ROLLED
    for (i32 first = 0; first < u.heads; first += 4) {
        const Fold<S> fold(q, tile, first);
        const Folded &head = fold.head;
        const i32 h = first + lane() % 4;
        const bool mine = h < u.heads;
        float *const scores = u.scores(t, h) + 4 * quad;
        float score[4][4], max = -infinity();
        UNROLLED
        for (i32 block = 0; block < 4; block++) {
            // Plain loads: they stay behind the stores of the block before, and take its registers.
            uint4 words[S] = {};
            UNROLLED
            for (i32 s = 0; s < S; s++) {
                const i32 j = S * (lane() % 4) + s;
                if (j < tile.half_k / 4) words[s] = *reinterpret_cast<const uint4 *>(from + block * 2 * LANES * tile.half_k + j * 4 * LANES);
            }
            UNROLLED
            for (i32 pair = 0; pair < 2; pair++) {
                i32 c[4] = {};
                UNROLLED
                for (i32 s = 0; s < S; s++) {
                    const u32 x = pair == 0 ? words[s].x : words[s].z, y = pair == 0 ? words[s].y : words[s].w;
                    const u32 a[4] = {x & 0x0f0f0f0f, y & 0x0f0f0f0f, x >> 4 & 0x0f0f0f0f, y >> 4 & 0x0f0f0f0f};
                    mma_u8s8(c, a, fold.b[s][0], fold.b[s][1]);
                }
                score[block][2 * pair] = head.score(c[0], c[1]);
                score[block][2 * pair + 1] = head.score(c[2], c[3]);
            }
            float(&s)[4] = score[block];
            if (seen[block] != ~0u) {
                for (i32 i = 0; i < 4; i++) {
                    if (!(seen[block] >> (4 * quad + i) & 1)) s[i] = -infinity();
                }
            }
            if (mine) *reinterpret_cast<float4 *>(scores + 32 * block) = float4{s[0], s[1], s[2], s[3]};
            if (bends && mine) {
                for (i32 i = 0; i < 4; i++) s[i] = u.logit(s[i], t, 32 * block + 4 * quad + i, h);
            }
            for (i32 i = 0; i < 4; i++) max = most(max, s[i]);
        }
        for (u32 mask = 4; mask <= 16; mask *= 2) max = most(max, shuffle_xor(max, mask));
        float e_sum = 0.0f, e_vs = 0.0f, e_vs2 = 0.0f;
        UNROLLED
        for (i32 block = 0; block < 4; block++) {
            for (i32 i = 0; i < 4; i++) {
                float e = exp(score[block][i] - max), x = e * scale_of(v_scales[block] >> 8 * i & 255);
                e_sum += e;
                e_vs += x;
                e_vs2 = fma_rn(x, x, e_vs2);
            }
        }
        for (u32 mask = 4; mask <= 16; mask *= 2) {
            e_sum += shuffle_xor(e_sum, mask);
            e_vs += shuffle_xor(e_vs, mask);
            e_vs2 += shuffle_xor(e_vs2, mask);
        }
        if (quad == 0 && mine) {
            const float reach = head.worst * PEAK, q_rms = head.step * 0.28867513f * sqrt_rn(float(tile.digit_square_sum()));
            const float slack = tile.slack() + score_rounding(2 * tile.half_k);
            u.scanned(t, h) = {max, unit_max, e_sum, e_vs, e_vs2, head.worst, head.rough, head.q_worst, q_rms, slack, u.bend(t, h, reach), 0.0f};
            u.check(reach, max);
        }
    }
}

// Largest magnitude of V of a row as given, as if in units of a scale; its address on every lane.
DEVICE float exact_unit(const Unit &u, i32 row) {
    const Shape &s = u.p.shape;
    const u64 v = u.given_v(row);
    float peak = 0.0f;
    for (i32 c = lane(); c < s.dim_v; c += 32) peak = larger(peak, magnitude(load_element(v, s.dtype_v, c)));
    return warp_max(peak) * (1.0f / PEAK);
}

// The rows that are kept as given, by a warp: their scores are final.
DEVICE_CALL void scan_exact(const AttendParams &p, const Queries q) {
    const Unit u(p);
    const Shape &s = p.shape;
    const i32 d = s.dim_k, half = d / 2;
    for (i32 h = 0; h < u.heads; h++) {
        // By lanes: channels while a row is read, rows while they are weighed.
        float peak[MAX_DIM / 32] = {}, score[4], unit[4];
        for (i32 w = 0; w < 4; w++) {
            score[w] = -infinity(), unit[w] = 0.0f;
            const u32 seen = u.seen_exact(w);
            ROLLED
            for (i32 i = 0; i < 32; i++) {
                if (!(seen >> i & 1)) continue;
                const i32 row = 32 * w + i;
                const u64 k = u.given_k(row);
                float dot = 0.0f;
                for (i32 n = 0; n < MAX_DIM / 32; n++) {
                    i32 c = lane() + 32 * n;
                    if (c >= d) break;
                    float x = load_element(k, s.dtype_k, c);
                    dot = fma_rn(q.channel(h, c, half), x, dot);
                    peak[n] = larger(peak[n], magnitude(x));
                }
                dot = warp_sum(dot);
                float largest = exact_unit(u, row);
                if (i32(lane()) == i) score[w] = dot, unit[w] = largest;
            }
            u.scores(-1, h)[32 * w + lane()] = score[w];
        }
        float reach = 0.0f, max = -infinity(), e_sum = 0.0f, e_vs = 0.0f, e_vs2 = 0.0f;
        for (i32 n = 0; n < MAX_DIM / 32; n++) {
            i32 c = lane() + 32 * n;
            if (c < d) reach += magnitude(q.channel(h, c, half)) * peak[n];
        }
        reach = warp_sum(reach) * (1.0f + 1e-5f);
        for (i32 w = 0; w < 4; w++) {
            score[w] = u.logit(score[w], 0, 32 * w + lane(), h);
            max = larger(max, score[w]);
        }
        max = warp_max(max);
        for (i32 w = 0; w < 4; w++) {
            float e = exp(score[w] - max), x = e * unit[w];
            e_sum += e, e_vs += x, e_vs2 += x * x;
        }
        e_sum = warp_sum(e_sum), e_vs = warp_sum(e_vs), e_vs2 = warp_sum(e_vs2);
        float largest = larger(larger(unit[0], unit[1]), larger(unit[2], unit[3]));
        largest = warp_max(largest);
        if (lane() == 0) {
            u.scanned(-1, h) = {max, largest, e_sum, e_vs, e_vs2, reach * (1.0f / PEAK), 0.0f, 0.0f, 0.0f, score_rounding(d), u.bend(0, h, reach), 0.0f};
            u.check(reach, max);
        }
    }
}

// The whole phase.
template <i32 S>
DEVICE void scan_inline(const AttendParams &p, i32 stride) {
    const Unit u(p);
    const Queries q{shared<float>(), stride};
    const bool exact = u.count_exact() > 0;
    if (exact && warp() == 0) scan_exact(u.p, q);
    ROLLED
    for (i32 t = u.first + warp(); t < u.last; t += ATTEND_WARPS) scan_tile<S>(u, q, t);
    sync_block();
    for (i32 h = thread(); h < u.heads; h += ATTEND_THREADS) {
        float max = exact ? u.scanned(-1, h).max : -infinity();
        for (i32 t = u.first; t < u.last; t++) max = larger(max, u.scanned(t, h).max);
        Partial partial = {0.0, 0.0, max, 0.0f};
        for (i32 t = u.first - 1; t < u.last; t++) {
            if (t < u.first && !exact) continue;
            const Scanned &s = u.scanned(t < u.first ? -1 : t, h);
            double factor = factor_of(s.max, max);
            partial.sum += factor * s.e;
            partial.weighted += factor * s.e_vs * double(PEAK);
        }
        u.partial(u.split, h) = partial;
    }
}
template <i32 S>
DEVICE_CALL void scan_called(const AttendParams &p, i32 stride) {
    scan_inline<S>(p, stride);
}
// Inline, parameters are read from constant memory.
template <i32 S>
DEVICE void scan_split(const AttendParams &p, i32 stride) {
    if (HAS_ROOM<S>) scan_inline<S>(p, stride);
    else scan_called<S>(p, stride);
}

}  // namespace akv
