// First phase of a split: scores of all its tokens from plane 0 of K, and the sums that everything is decided from.
#pragma once
#include "fold.cuh"

namespace akv {

// Sums of plane-0 digits * q, of 32 tokens and four heads: this lane's are four tokens of one head. Nibbles are not shifted:
// high ones count sixteenfold in sums of their own, which are divided at the end. A word without a partner is shifted.
template <i32 S>
DEVICE void multiply(const uint4 *words, const Fold<S> &fold, i32 (&sums)[4]) {
    constexpr u32 LOW = 0x0f0f0f0f, HIGH = 0xf0f0f0f0;
    UNROLLED
    for (i32 pair = 0; pair < 2; pair++) {
        auto first = [&](i32 s) { return pair == 0 ? words[s].x : words[s].z; };
        auto second = [&](i32 s) { return pair == 0 ? words[s].y : words[s].w; };
        i32 low[4] = {fold.start[0], fold.start[1], fold.start[0], fold.start[1]}, high[4] = {};
        UNROLLED
        for (i32 s = 0; s + 1 < S; s += 2) {
            const u32 x[4] = {first(s), second(s), first(s + 1), second(s + 1)};
            const u32 a[4] = {x[0] & LOW, x[1] & LOW, x[2] & LOW, x[3] & LOW};
            const u32 b[4] = {x[0] & HIGH, x[1] & HIGH, x[2] & HIGH, x[3] & HIGH};
            mma_u8s8(low, a, fold.low[s], fold.low[s + 1]);
            mma_u8s8(high, b, fold.high[s], fold.high[s + 1]);
        }
        if (S % 2 == 1) {
            const u32 x = first(S - 1), y = second(S - 1), a[4] = {x & LOW, y & LOW, x >> 4 & LOW, y >> 4 & LOW};
            mma_u8s8(low, a, fold.low[S - 1], fold.high[S - 1]);
        }
        UNROLLED
        for (i32 i = 0; i < 2; i++) {
            const i32 sixteenfold = high[2 * i] * 256 + high[2 * i + 1];
            sums[2 * pair + i] = low[2 * i] * 256 + low[2 * i + 1] + (sixteenfold >> 4);
        }
    }
}

// What a warp scans of a tile, on its way from memory: plane 0 in groups of 32 tokens, and the scales with the first group.
// Where a group has been read, that of the tile after it follows. Copies are of whole lines: lane l has every 32nd piece of
// 16 bytes. Pieces of the four lanes of a quad lie in different banks (`place`).
template <i32 S>
struct Ring {
    static constexpr i32 PIECES = 32 * S, SCALES = 2 * S + TILE / 16 + 1;  // of a group; of the scales of K and V and the rest
    uint4 *pieces;

    DEVICE Ring(float *scratch) : pieces(reinterpret_cast<uint4 *>(scratch + ATTEND_WARPS * TILE) + warp() * (4 * PIECES + SCALES)) {}
    // Piece i of a group: 4 of each word, which is of 16 tokens.
    DEVICE static i32 place(i32 i) { return i ^ (i % (16 * S) / (4 * S)) << 1; }
    DEVICE u8 *scales() const { return reinterpret_cast<u8 *>(pieces + 4 * PIECES); }

    // Where a lane's pieces of a tile come from.
    struct Source {
        const uint4 *words, *scales;

        DEVICE Source(const Shape &shape, u64 page, i32 kv_head) {
            const Tile tile(shape, page, kv_head);
            const i32 i = lane();
            words = page ? reinterpret_cast<const uint4 *>(tile.k0) + i : nullptr;
            scales = reinterpret_cast<const uint4 *>(i < 2 * S ? tile.k_scales + 16 * i : i < SCALES - 1 ? tile.v_scales + 16 * (i - 2 * S) : tile.meta);
        }
    };
    DEVICE void ask(const Source &from, i32 group) const {
        if (from.words) {
            UNROLLED
            for (i32 s = 0; s < S; s++) {
                // place(32 * s + lane), which stays within the 32.
                const i32 at = lane() ^ (32 * s + lane()) % (16 * S) / (4 * S) << 1;
                copy_async(near(pieces) + 16 * at + 16 * (group * PIECES + 32 * s), from.words + group * PIECES + 32 * s);
            }
            if (group == 0 && lane() < SCALES) copy_async(near(pieces) + 16 * (4 * PIECES + lane()), from.scales);
        }
        commit();
    }
    // A whole tile, in place of what is there.
    DEVICE void ask(const Source &from) const {
        wait<0>();
        sync_warp();
        ROLLED
        for (i32 group = 0; group < 4; group++) ask(from, group);
    }
    // Waits for a group; then nobody may still read what it took the place of.
    DEVICE void arrive() const {
        wait<3>();
        sync_warp();
    }
    // This lane's words of a group, four tokens' each.
    DEVICE void take(i32 group, uint4 (&to)[S]) const {
        const i32 quad = lane() / 4, first = (quad >> 2) * 16 * S + 4 * S * (lane() % 4) + (quad & 3);
        UNROLLED
        for (i32 s = 0; s < S; s++) to[s] = pieces[group * PIECES + place(first + 4 * s)];
    }
};

// The scan of a tile by a warp, four heads at a time: lane 4 g + t has, of every 32 tokens, scores of tokens
// 4 g .. 4 g + 3 for the head first + t. PLAIN: all tokens are seen, no score is bent, and rows fill the lanes' words; such
// tiles are nearly all, have no branches and no inner loops, and come through the ring, which goes on with the tile at
// `next`, if it has a page. Results go to scanned[head] and all_scores[head][token].
template <i32 S, bool PLAIN>
DEVICE void scan_tile(const Unit &u, const Queries &q, i32 t, Tile tile, Scanned *scanned, float *all_scores, const Ring<S> &ring, const typename Ring<S>::Source &next) {
    const i32 quad = lane() / 4;
    const u32 seen = PLAIN ? 15 : u.seen_paged(t, lane() / 8) >> 4 * (lane() % 8) & 15;  // of tokens 4 lane ..
    if (!PLAIN && !any(seen)) {
        for (i32 h = lane(); h < u.heads; h += 32) {
            scanned[h] = Scanned{};
            scanned[h].max = -infinity();
        }
        return;
    }
    if (PLAIN) {
        tile.half_k = 16 * S;
        ring.arrive();
        tile.k_scales = ring.scales(), tile.v_scales = tile.k_scales + 32 * S, tile.meta = tile.v_scales + TILE;
    }

    const u8 *const from = tile.k0 + (quad >> 2) * LANES * tile.half_k + (quad & 3) * 16 + S * (lane() % 4) * 4 * LANES;

    // V scales, by tokens.
    float *const units = q.end((u.unit_heads + 3) / 4 * 4) + warp() * TILE;
    const u32 bytes = *reinterpret_cast<const u32 *>(tile.v_scales + 4 * lane());
    float unit[4], unit_max = 0.0f;
    UNROLLED
    for (i32 i = 0; i < 4; i++) {
        unit[i] = scale_of(byte_of(bytes, i));
        if (PLAIN || (seen >> i & 1)) unit_max = most(unit_max, unit[i]);
    }
    unit_max = bits_float(reduce_max(float_bits(unit_max)));
    sync_warp();
    reinterpret_cast<float4 *>(units)[lane()] = float4{unit[0], unit[1], unit[2], unit[3]};
    sync_warp();

    ROLLED
    for (i32 first = 0; first < u.heads; first += 4) {
        const Fold<S> fold(q, tile, first, PLAIN);
        const float worst = fold.most_of_score(), reach = worst * PEAK;
        if (const i32 h = first + lane() / 8; lane() % 8 == 0 && h < u.heads) {
            Scanned &s = scanned[h];
            s.worst = worst, s.rough = sqrt_fast(fold.rough), s.q_worst = fold.q_worst(tile), s.q_rms = fold.q_rms(tile);
            s.slack = tile.slack() + score_rounding(2 * tile.half_k), s.bend = PLAIN ? 0.0f : u.bend(t, h, reach);
            s.unit = unit_max, s.reserved = 0.0f;
        }
        const i32 h = first + lane() % 4;
        const bool mine = h < u.heads;
        float *const scores = all_scores + TILE * h + 4 * quad;
        float score[4][4], max = -infinity();
        UNROLLED_BY(PLAIN ? 4 : 1)
        for (i32 block = 0; block < 4; block++) {
            uint4 words[S];
            if (PLAIN) {
                if (block > 0) ring.arrive();
                ring.take(block, words);
            } else {
                UNROLLED
                for (i32 s = 0; s < S; s++) {
                    const bool there = S * i32(lane() % 4) + s < tile.half_k / 4;
                    words[s] = there ? *global(reinterpret_cast<const uint4 *>(from + block * 2 * LANES * tile.half_k + s * 4 * LANES)) : uint4{0, 0, 0, 0};
                }
            }
            i32 sums[4];
            multiply<S>(words, fold, sums);
            if (PLAIN) {
                sync_warp();
                if (first + 4 >= u.heads) ring.ask(next, block);
                else commit();
            }
            float(&s)[4] = score[block];
            const u32 seen_block = PLAIN ? 15 : shuffle(seen, 8 * block + quad);
            UNROLLED
            for (i32 i = 0; i < 4; i++) s[i] = PLAIN || (seen_block >> i & 1) ? fold.score(sums[i]) : -infinity();
            if (mine) *reinterpret_cast<float4 *>(scores + 32 * block) = float4{s[0], s[1], s[2], s[3]};
        }
        UNROLLED_BY(PLAIN ? 16 : 1)
        for (i32 i = 0; i < 16; i++) {
            float &s = score[i / 4][i % 4];
            if (!PLAIN && mine) s = u.logit(s, t, 32 * (i / 4) + 4 * quad + i % 4, h);
            max = most(max, s);
        }
        for (u32 mask = 4; mask <= 16; mask *= 2) max = most(max, shuffle_xor(max, mask));
        float e_sum = 0.0f, e_vs = 0.0f, e_vs2 = 0.0f;
        UNROLLED_BY(PLAIN ? 4 : 1)
        for (i32 block = 0; block < 4; block++) {
            const float4 vs = reinterpret_cast<const float4 *>(units)[8 * block + quad];
            const float of_token[4] = {vs.x, vs.y, vs.z, vs.w};
            UNROLLED_BY(PLAIN ? 4 : 1)
            for (i32 i = 0; i < 4; i++) {
                const float e = exp2_fast((score[block][i] - max) * LOG2_E), x = e * of_token[i];
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
            Scanned &s = scanned[h];
            s.max = max, s.e = e_sum, s.e_vs = e_vs, s.e_vs2 = e_vs2;
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

// The rows that are kept as given, by warps that share the heads: their scores are final.
DEVICE_CALL void scan_exact(const AttendParams &p, const Queries q) {
    for (i32 h = warp(); h < Unit(p).heads; h += ATTEND_WARPS) {
        const Unit u(anew(p), block_y(), 0);
        const Shape &s = u.p.shape;
        const i32 d = s.dim_k, half = d / 2;
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
            const float worst = reach * (1.0f / PEAK), bend = u.bend(0, h, reach);
            u.scanned(-1, h) = {max, e_sum, e_vs, e_vs2, worst, 0.0f, 0.0f, 0.0f, score_rounding(d), bend, largest, 0.0f};
        }
    }
}

// Tiles of any kind, by a warp: bits of `tiles`, from the split's first on.
template <i32 S>
DEVICE_CALL void scan_others(const AttendParams &p, i32 split, u32 tiles) {
    ROLLED
    for (; tiles != 0; tiles &= tiles - 1) {
        const Unit u(anew(p), block_y(), split);
        const i32 t = u.first + popc(~tiles & (tiles - 1));
        scan_tile<S, false>(u, {shared<float>(), S}, t, u.tile(t), &u.scanned(t, 0), u.scores(t, 0), Ring<S>(shared<float>()), {u.p.shape, 0, 0});
    }
}

// Rows as given, and then the split's sums, from those of its tiles.
DEVICE_CALL void sum_split(const AttendParams &p, i32 split, const Queries q) {
    const Unit u(p, block_y(), split);
    if (u.count_exact() > 0) scan_exact(p, q);
    sync_block();
    // A lane has a tile, the last one the exact rows.
    const i32 tile = lane() == 31 ? -1 : u.first + i32(lane());
    const bool has = lane() == 31 ? u.count_exact() > 0 : tile < u.last;
    ROLLED
    for (i32 h = warp(); h < u.heads; h += ATTEND_WARPS) {
        Scanned s = {};
        s.max = -infinity();
        if (has) s = u.scanned(tile, h);
        u.check(s.worst * PEAK, s.max);
        const float max = warp_max(s.max), factor = s.max > -infinity() ? exp(s.max - max) : 0.0f;
        const float sum = warp_sum(factor * s.e), weighted = warp_sum(factor * s.e_vs);
        if (lane() == 0) u.partial(u.split, h) = {sum, double(weighted) * double(PEAK), max, 0.0f};
    }
}

// The whole phase, of one split. What is rare is called, and reads its parameters anew: nothing of it stays in registers in
// the loop. `in_ring`: the page whose tile is in the ring, if any; `then`: the block's next split, or -1.
template <i32 S>
DEVICE void scan_split(const Unit &u, i32 then, u64 &in_ring) {
    const AttendParams &p = u.p;
    // Lanes have a tile each.
    const i32 tile = u.first + i32(lane());
    const u64 pages = tile < u.last ? u.page(tile) : 0;
    const bool plain = p.shape.dim_k == 32 * S && tile < u.last && !u.bends(tile) && u.sees_all(tile);
    // Bits of the plain ones, and above them of the others: one register.
    static_assert(SPLIT == 8 && ATTEND_WARPS == 4, "a warp's turns are bits 4 apart");
    constexpr u32 TURNS = 0x11;
    const u32 kinds = ballot(plain) | ballot(tile < u.last && !plain) << 16;
    const i32 ahead = then < 0 ? -1 : u.in_split(then, warp());
    const u64 page_ahead = ahead < 0 ? 0 : u.page(ahead);
    const Queries q = {shared<float>(), S};
    const Ring<S> ring(q.end((u.unit_heads + 3) / 4 * 4));
    Scanned *const scanned = &u.scanned(u.first, 0);
    float *const scores = u.scores(u.first, 0);
    if (const u32 mine = kinds & TURNS << warp(); mine != 0) {
        const u64 page = shuffle(pages, popc(~mine & (mine - 1)));
        if (in_ring != page) ring.ask({p.shape, page, u.kv_head});
    }
    ROLLED
    for (i32 i = warp(); i < SPLIT; i += ATTEND_WARPS) {
        const u64 page = shuffle(pages, i);
        if (!(kinds >> i & 1)) continue;
        const Tile tile(p.shape, page, u.kv_head);
        const u64 next = kinds >> i >> ATTEND_WARPS & 1 ? shuffle(pages, i + ATTEND_WARPS) : page_ahead;
        const i32 offset = i * u.unit_heads;
        scan_tile<S, true>(u, q, u.first + i, tile, scanned + offset, scores + offset * TILE, ring, {p.shape, next, u.kv_head});
        in_ring = next;
    }
    const u32 others = kinds >> 16 & TURNS << warp();
    if (others != 0) scan_others<S>(p, u.split, others);
    sum_split(p, u.split, q);
}

}  // namespace akv
