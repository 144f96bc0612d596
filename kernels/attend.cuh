// Second phase of a split: who is read how finely, and what comes of it. The last block of a unit merges its splits, in
// their order.
#pragma once
#include "finish.cuh"
#include "scan.cuh"

namespace akv {

// Tokens that are listed, each with its number of planes.
struct List {
    u16 entries[TILE];

    DEVICE i32 token(i32 i) const { return entries[i] & 255; }
    DEVICE i32 planes(i32 i) const { return entries[i] >> 8; }
    // Lists the tokens 4 lane .. 4 lane + 3 of all lanes that read least..most planes, behind n others. Returns how many there
    // are now.
    DEVICE i32 fill(const i32 (&planes)[4], i32 least, i32 most, i32 n) {
        UNROLLED
        for (i32 i = 0; i < 4; i++) {
            const bool is = planes[i] >= least && planes[i] <= most;
            const u32 listed = ballot(is);
            if (is) entries[n + popc(listed & ((1u << lane()) - 1))] = u16(planes[i] << 8 | (4 * lane() + i));
            n += popc(listed);
        }
        return n;
    }
};

// How finely a tile is read.
struct Plan {
    List k, v;             // who reads more than the scan has
    u32 planes[32];        // of tokens 4 lane .., a byte each: of K, plus 8 if it is not seen, and of V times 16
    i32 n_k, n_v, n_seen;  // tokens that are listed, and that are seen
    float mean_peak;       // largest magnitude of the tile's mean of V, and its rounding
    float weights[4][TILE];  // of four heads: e times the V scale; e alone of rows as the engine has them
    float rest[4];           // and the e of all tokens that the mean stands for
};

// A warp's tiles of a split, which it plans before it reads them.
constexpr i32 TURNS = SPLIT / ATTEND_WARPS;

// A warp's part of the shared memory.
struct Work {
    Plan plans[TURNS];
};

// Sums over some tokens of a split, for one head, in units of exp(max): those of Sums, but `weighted` and `spread_weighted`
// in units of PEAK.
struct Part {
    enum { SUM, WEIGHTED, SPREAD, SPREAD_WEIGHTED, VALUE, SQUARE, FIELDS };
    float of[FIELDS], max, bound, peak;
};

// Parts of a split: one of each warp, and one of the rows that are kept as given.
constexpr i32 PARTS = ATTEND_WARPS + 1;

// Shared memory of a block: q, then shares, what its warps work with, and outputs and sums of the parts, of four heads.
struct Memory {
    u8 *start;
    i32 heads, words, dim_v;

    DEVICE Memory(const Unit &u, i32 words) : start(shared<u8>()), heads((u.unit_heads + 3) / 4 * 4), words(words), dim_v(u.p.shape.dim_v) {}

    DEVICE Queries q() const { return {reinterpret_cast<float *>(start), words}; }
    DEVICE Share &share(i32 h) const { return reinterpret_cast<Share *>(start + heads * 32 * words * 4)[h]; }
    DEVICE Work &work(i32 warp) const { return reinterpret_cast<Work *>(&share(heads))[warp]; }
    DEVICE float *outs(i32 part, i32 hh) const { return reinterpret_cast<float *>(&work(ATTEND_WARPS)) + (4 * part + hh) * dim_v; }
    DEVICE Part &part(i32 part, i32 hh) const { return reinterpret_cast<Part *>(outs(PARTS, 0))[4 * part + hh]; }
    DEVICE u32 &flag() const { return *reinterpret_cast<u32 *>(&part(PARTS, 0)); }
};

// Rounding of a warp's sums of V, relative to what is added up: tensor cores may cut each of 17 addends, and their sum, in
// the last bit of the largest addend, two units in the last place; two tiles are up to 32 such sums. The rest of an output's
// rounding is in ROUNDING (src/alignment/certificate.rs): weights are off by up to 202 (2.22 * 87 of a difference times
// LOG2_E, 4 of ex2, 5 of its merging) through the token, 73 on average and 12 through the normaliser.
constexpr float CUTS = 18 * 2 * 32 * 5.9604645e-8f;

// exp(x) - 1 of x = b / LOG2_E >= 0, and two units in the last place of 1 more: no less, but for what `certificate` allows.
DEVICE float grow_above(float b) { return exp2_fast(b) - (1.0f - 3e-7f); }

// Scores as the softmax sees them, of tokens 4 lane .. of a tile and four heads; of those beyond the unit's as of its last.
DEVICE void logits(const Unit &u, i32 t, i32 first, float (&s)[4][4]) {
    UNROLLED
    for (i32 hh = 0; hh < 4; hh++) {
        const float4 x = reinterpret_cast<const float4 *>(u.scores(t, first + hh < u.heads ? first + hh : u.heads - 1))[lane()];
        s[hh][0] = x.x, s[hh][1] = x.y, s[hh][2] = x.z, s[hh][3] = x.w;
    }
    if (u.p.softcap > 0.0f) {
        UNROLLED
        for (i32 i = 0; i < 16; i++) s[i / 4][i % 4] = capped(s[i / 4][i % 4], u.p.softcap);
    }
    if (u.p.mask_added) {
        const uint2 x = reinterpret_cast<const uint2 *>(u.p.mask_added)[(i64(u.row_index) * u.p.mask_tiles + t) * (TILE / 4) + lane()];
        const float added[4] = {half_to_float(u16(x.x)), half_to_float(u16(x.x >> 16)), half_to_float(u16(x.y)), half_to_float(u16(x.y >> 16))};
        UNROLLED
        for (i32 i = 0; i < 16; i++) {
            const float y = s[i / 4][i % 4];
            s[i / 4][i % 4] = y > -infinity() ? y + u.slope(first + i / 4 < u.heads ? first + i / 4 : u.heads - 1) * added[i % 4] : y;
        }
    }
}

// One head's view of the whole context, from all splits' scans, by a warp.
DEVICE void share_of(const Unit &u, i32 h, Share &share) {
    const float sink = u.p.sinks ? reinterpret_cast<const float *>(u.p.sinks)[u.first_head + h] : -infinity();
    float max = sink;
    for (i32 s = lane(); s < u.n_splits; s += 32) max = larger(max, u.partial(s, h).max);
    max = warp_max(max);
    auto factor = [&](float from) { return from == -infinity() ? 0.0f : exp(from - max); };
    double sum = 0.0, weighted = 0.0;
    for (i32 s = lane(); s < u.n_splits; s += 32) {
        const Partial &partial = u.partial(s, h);
        sum += double(factor(partial.max)) * partial.sum;
        weighted += double(factor(partial.max)) * partial.weighted;
    }
    sum = warp_sum(sum) + double(factor(sink));
    weighted = warp_sum(weighted);
    if (lane() == 0) share = Share::of(u.p.mode, u.p.tolerance, u.row.n, max, sum, weighted);
}

// Largest magnitude of a tile's mean of V.
DEVICE float mean_peak_of(const Tile &tile) {
    u32 peak = 0;
    for (i32 j = lane(); 2 * j < tile.half_v; j += 32) {
        const u32 word = load_u32(tile.v_mean + 4 * j);
        UNROLLED
        for (i32 i = 0; i < 4; i++) {
            const i32 x = i8(word >> 8 * i);
            peak = u32(x < 0 ? -x : x) > peak ? u32(x < 0 ? -x : x) : peak;
        }
    }
    return float(reduce_max(peak)) * tile.mean_unit();
}

// Decides who of a tile is read how finely, for all heads of the unit: the maximum.
DEVICE void plan_tile(const Unit &u, const Memory &m, i32 t, Plan &plan) {
    const i32 n_seen = u.count_paged(t);
    const Tile tile = u.tile(t);
    const float mean_peak = mean_peak_of(tile);
    const u32 v_scales = load_u32(tile.v_scales + 4 * lane());
    const bool guaranteed = u.p.mode == MODE_GUARANTEED;

    // By lanes, a head's factors: products of a token's weight beyond 1 read another plane (Thresholds).
    bool need = false;
    float by_k = 0.0f, by_v = 0.0f, offset_k = 0.0f;
    if (i32(lane()) < u.heads && n_seen > 0) {
        const Scanned &s = u.scanned(t, lane());
        const Share &share = m.share(lane());
        const TileError error = error_of(s);
        need = s.max > -infinity() && share.any(error, mean_peak, s.max, s.unit);
        const Thresholds limits(share, error);
        by_k = limits.by_k, by_v = limits.by_v, offset_k = share.offset_k();
    }
    const u32 needs = ballot(need);
    float of_k[4] = {}, of_v[4] = {}, of_mean[4] = {}, vs[4];
    UNROLLED
    for (i32 i = 0; i < 4; i++) vs[i] = scale_of(byte_of(v_scales, i));
    ROLLED
    for (i32 first = 0; first < u.heads && needs >> first != 0; first += 4) {
        float s[4][4];
        logits(u, t, first, s);
        UNROLLED
        for (i32 hh = 0; hh < 4; hh++) {
            const i32 h = first + hh;
            if (!(needs >> h & 1)) continue;
            const float max = m.share(h).max, k = shuffle(by_k, h), v = shuffle(by_v, h), offset = shuffle(offset_k, h), mean = mean_peak * (1.0f / PEAK);
            UNROLLED
            for (i32 i = 0; i < 4; i++) {
                const float e = exp2_fast((s[hh][i] - max) * LOG2_E), x = e * vs[i];
                of_k[i] = most(x * k, of_k[i]);
                of_v[i] = most(x * v, of_v[i]);
                if (guaranteed) of_k[i] = most(fma_rn(e, offset, x) * k, of_k[i]), of_mean[i] = most(fma_rn(e, mean, x) * v, of_mean[i]);
            }
        }
    }
    i32 planes_k[4], planes_v[4];
    const u32 seen = u.seen_paged(t, lane() / 8) >> 4 * (lane() % 8) & 15;  // of tokens 4 lane ..
    u32 packed = 0;
    bool more = false;
    UNROLLED
    for (i32 i = 0; i < 4; i++) {
        i32 k = Thresholds::planes_k(of_k[i]), v = Thresholds::planes_v(of_v[i], most(of_v[i], of_mean[i]));
        if (u.attached()) {
            k = k > 1 ? PLANES : 1, v = v > 0 ? PLANES : 0;
        } else {
            k = k < tile.planes_k ? k : tile.planes_k, v = v < tile.planes_v ? v : tile.planes_v;
        }
        planes_k[i] = k, planes_v[i] = v;
        packed |= u32((seen >> i & 1 ? k : PLANES + 8) | v << 4) << 8 * i;
        more |= k > 1 || v > 0;
    }
    const bool some = any(more);
    // Of V those that read more come first: sixteen at a time are read alike.
    const i32 n_k = some ? plan.k.fill(planes_k, 2, PLANES, 0) : 0, n_v = some ? plan.v.fill(planes_v, 1, 1, plan.v.fill(planes_v, 2, PLANES, 0)) : 0;
    plan.planes[lane()] = packed;
    if (lane() == 0) plan.n_k = n_k, plan.n_v = n_v, plan.n_seen = n_seen, plan.mean_peak = mean_peak * (1.0f + CUTS);
    sync_warp();
}

// Adds further digits of K to the scores of the listed tokens, sixteen at a time.
template <i32 S>
DEVICE void refine_keys(const Unit &u, const Memory &m, i32 t, const List &list, i32 n) {
    const Queries q = m.q();
    const Tile tile = u.tile(t);
    const i32 quad = lane() / 4, row_bytes = (tile.planes_k - 1) * tile.half_k;
    ROLLED
    for (i32 first = 0; first < u.heads; first += 4) {
        const Fold<S> fold(q, tile, first);
        const i32 h = first + lane() % 4;
        float *const scores = u.scores(t, h);
        ROLLED
        for (i32 start = 0; start < n; start += 16) {
            const i32 i = start + quad, j = i + 8;
            const i32 token[2] = {i < n ? list.token(i) : 0, j < n ? list.token(j) : 0}, planes[2] = {i < n ? list.planes(i) : 0, j < n ? list.planes(j) : 0};
            const bool mine[2] = {planes[0] > 1 && h < u.heads, planes[1] > 1 && h < u.heads};
            const u8 *const rows[2] = {tile.k_rest + token[0] * row_bytes, tile.k_rest + token[1] * row_bytes};
            float score[2] = {mine[0] ? scores[token[0]] : 0.0f, mine[1] ? scores[token[1]] : 0.0f};
            ROLLED
            for (i32 plane = 1; plane < PLANES && any(planes[0] > plane || planes[1] > plane); plane++) {
                u32 x[S] = {}, y[S] = {};
                if (planes[0] > plane) load_words<S>(rows[0] + (plane - 1) * tile.half_k, tile.half_k, x);
                if (planes[1] > plane) load_words<S>(rows[1] + (plane - 1) * tile.half_k, tile.half_k, y);
                i32 c[4] = {fold.start[0], fold.start[1], fold.start[0], fold.start[1]};
                UNROLLED
                for (i32 s = 0; s < S; s++) {
                    const u32 a[4] = {x[s] & 0x0f0f0f0f, y[s] & 0x0f0f0f0f, x[s] >> 4 & 0x0f0f0f0f, y[s] >> 4 & 0x0f0f0f0f};
                    mma_u8s8(c, a, fold.low[s], fold.high[s]);
                }
                if (planes[0] > plane) score[0] += fold.more(c[0] * 256 + c[1], plane, planes[0]);
                if (planes[1] > plane) score[1] += fold.more(c[2] * 256 + c[3], plane, planes[1]);
            }
            if (mine[0]) scores[token[0]] = score[0];
            if (mine[1]) scores[token[1]] = score[1];
        }
    }
    sync_warp();
}

// Scores of the listed tokens from the engine's own rows.
DEVICE_CALL void read_keys(const AttendParams &p, i32 split, i32 t, const Plan &plan, i32 words) {
    const Unit u(p, block_y(), split);
    const Memory m(u, words);
    const Queries q = m.q();
    const List &list = plan.k;
    const i32 n = plan.n_k;
    const i32 d = p.shape.dim_k;
    ROLLED
    for (i32 i = 0; i < n; i++) {
        const i32 token = list.token(i);
        const u64 row = u.given_k(t * TILE + token);
        float x[MAX_DIM / 32];
        UNROLLED
        for (i32 j = 0; j < MAX_DIM / 32; j++) {
            const i32 c = lane() + 32 * j;
            x[j] = c < d ? load_element(row, p.shape.dtype_k, c) : 0.0f;
        }
        ROLLED
        for (i32 h = 0; h < u.heads; h++) {
            float dot = 0.0f;
            UNROLLED
            for (i32 j = 0; j < MAX_DIM / 32; j++) {
                const i32 c = lane() + 32 * j;
                if (c < d) dot = fma_rn(q.channel(h, c, d / 2), x[j], dot);
            }
            dot = warp_sum(dot);
            if (lane() == 0) u.scores(t, h)[token] = dot;
        }
    }
    sync_warp();
}

// Adds V of the listed tokens, from the engine's own rows, to the outputs of four heads.
DEVICE_CALL void add_rows(const AttendParams &p, i32 split, i32 t, const Plan &plan, i32 first, i32 words) {
    const Unit u(p, block_y(), split);
    const Memory m(u, words);
    const i32 n = plan.n_v;
    const i32 dv = p.shape.dim_v;
    ROLLED
    for (i32 c = lane(); c < dv; c += 32) {
        float acc[4] = {};
        ROLLED
        for (i32 i = 0; i < n; i++) {
            const i32 token = plan.v.token(i);
            const float x = load_element(u.given_v(t * TILE + token), p.shape.dtype_v, c);
            for (i32 h = 0; h < 4; h++) acc[h] = fma_rn(plan.weights[h][token], x, acc[h]);
        }
        UNROLLED
        for (i32 h = 0; h < 4; h++) {
            if (first + h < u.heads) m.outs(warp(), h)[c] += acc[h];
        }
    }
    sync_warp();
}

// What lanes know of some values, added up: of N of them, a power of two up to 32. Lane l returns that of value
// (l / (32 / N)), whose sum is the same at any order of lanes.
template <i32 N>
DEVICE float sum_apart(float (&x)[N]) {
    u32 mask = 16;
    UNROLLED
    for (i32 n = N / 2; n > 0; n /= 2) {
        const bool upper = lane() & mask;
        UNROLLED
        for (i32 i = 0; i < n; i++) {
            const float kept = upper ? x[i + n] : x[i], given = upper ? x[i] : x[i + n];
            x[i] = kept + shuffle_xor(given, mask);
        }
        mask /= 2;
    }
    for (; mask > 0; mask /= 2) x[0] += shuffle_xor(x[0], mask);
    return x[0];
}

// V of the listed tokens for four heads, by tensor cores: channels are rows, sixteen tokens are summed over, columns are the
// heads' weights, each as two f16. Lane 4 g + t has words g and g + 8 of 16 of a digit row, for tokens 2 t, 2 t + 1 (+ 8), and
// the sums of head t. Digits are the integers that they are: first and second ones together, in units of 1 / 16.
struct Values {
    float acc[8][4];  // by channels of a word: word g, and what the weights' second parts add; the same of word g + 8
    float scale;      // of the weights of head g / 2: the largest is next to 2^14; at most 2^74, for the means' sake
    float centred;    // what belongs to all channels of head g / 2, in part

    DEVICE explicit Values(const float (&most_weight)[4]) {
        const i32 head = lane() / 8;
        const float w = head == 0 ? most_weight[0] : head == 1 ? most_weight[1] : head == 2 ? most_weight[2] : most_weight[3];
        const u32 exponent = float_bits(w) >> 23;
        scale = bits_float((268 - (exponent > 67 ? exponent : 67)) << 23);
        centred = 0.0f;
        UNROLLED
        for (i32 i = 0; i < 32; i++) acc[i / 4][i % 4] = 0.0f;
    }

    // Sixteen listed tokens: this lane's four, and the first digits of their words, 8 (that is, 0) where there are none.
    struct Sixteen {
        u32 entries[2], words[2][4];

        DEVICE Sixteen(const Tile &tile, const List &list, i32 start, i32 n, i32 set) {
            const i32 at = start + 2 * i32(lane() % 4);
            const u32 *const pairs = reinterpret_cast<const u32 *>(list.entries + (start < TILE ? at : 0));
            entries[0] = at + 1 < n ? pairs[0] : at < n ? pairs[0] & 0xffff : 0;
            entries[1] = at + 9 < n ? pairs[4] : at + 8 < n ? pairs[4] & 0xffff : 0;
            load(tile, 0, set, words);
        }
        DEVICE u32 token(i32 j) const { return entries[j / 2] >> 16 * (j % 2) & 255; }
        DEVICE u32 planes(i32 j) const { return entries[j / 2] >> (16 * (j % 2) + 8) & 255; }
        DEVICE void load(const Tile &tile, u32 plane, i32 set, u32 (&to)[2][4]) const {
            const i32 word = 16 * set + lane() / 4;
            UNROLLED
            for (i32 j = 0; j < 4; j++) {
                const u8 *row = tile.v + (token(j) * tile.planes_v + plane) * tile.half_v + 4 * word;
                to[0][j] = planes(j) > plane && word < tile.half_v / 4 ? load_u32(row) : 0x88888888;
                to[1][j] = planes(j) > plane && word + 8 < tile.half_v / 4 ? load_u32(row + 32) : 0x88888888;
            }
        }
    };

    // Adds products of weights with two planes of digits. x * factor + offset of 1024 + a byte is the byte's value.
    DEVICE void multiply(const u32 (&first)[2][4], const u32 (&second)[2][4], u32 factor, u32 offset, u32 b0, u32 b1) {
        constexpr u32 UPPER = 0xf0f0f0f0;
        UNROLLED
        for (i32 high = 0; high < 2; high++) {
            u32 bytes[2][4];
            UNROLLED
            for (i32 i = 0; i < 8; i++) {
                const u32 x = first[i / 4][i % 4], y = second[i / 4][i % 4];
                bytes[i / 4][i % 4] = high ? (x & UPPER) | (y >> 4 & ~UPPER) : (x << 4 & UPPER) | (y & ~UPPER);
            }
            UNROLLED
            for (i32 i = 0; i < 4; i++) {
                // Of two tokens a byte each, then as f16.
                auto pair = [&](const u32 (&of)[4], i32 j) {
                    const u32 two = permute(of[j], of[j + 1], i < 2 ? 0x5140 : 0x7362);
                    return fma_halves(permute(two, 0x64646464, i % 2 ? 0x4342 : 0x4140), factor, offset);
                };
                const u32 a[4] = {pair(bytes[0], 0), pair(bytes[1], 0), pair(bytes[0], 2), pair(bytes[1], 2)};
                mma_f16(acc[4 * high + i], a, b0, b1);
            }
        }
    }
    DEVICE void add(const Tile &tile, const List &list, i32 n, const float (&weights)[4][TILE], i32 set) {
        Sixteen next(tile, list, 0, n, set);
        ROLLED
        for (i32 start = 0; start < n; start += 16) {
            const Sixteen now = next;
            next = Sixteen(tile, list, start + 16, n, set);  // under way meanwhile
            float w[4], rest[4];
            UNROLLED
            for (i32 j = 0; j < 4; j++) {
                w[j] = now.planes(j) ? weights[lane() / 8][now.token(j)] * scale : 0.0f;
                centred = fma_rn(w[j], centre(now.planes(j)), centred);
            }
            u32 b[2] = {halves(w[0], w[1]), halves(w[2], w[3])};
            if (lane() / 4 % 2) {
                UNROLLED
                for (i32 j = 0; j < 4; j++) rest[j] = (w[j] - half_to_float(u16(b[j / 2] >> 16 * (j % 2)))) * 2048.0f;
                b[0] = halves(rest[0], rest[1]), b[1] = halves(rest[2], rest[3]);
            }
            auto any_beyond = [&](u32 planes) { return any(now.planes(0) > planes || now.planes(1) > planes || now.planes(2) > planes || now.planes(3) > planes); };
            u32 second[2][4];
            UNROLLED
            for (i32 i = 0; i < 8; i++) second[i / 4][i % 4] = 0x88888888;
            if (any_beyond(1)) now.load(tile, 1, set, second);
            multiply(now.words, second, 0x3c003c00, 0xe488e488, b[0], b[1]);  // 1, -1160
            if (any_beyond(2)) {
                u32 third[2][4];
                now.load(tile, 2, set, third), now.load(tile, 3, set, second);
                multiply(third, second, 0x1c001c00, 0xc488c488, b[0], b[1]);  // a 256th of it
            }
        }
    }
    // Adds a multiple of the tile's mean for each head.
    DEVICE void add_mean(const Tile &tile, const float (&weights)[4], i32 set) {
        const float w = weights[lane() % 4] * shuffle(scale, 8 * (lane() % 4)) * (tile.mean_unit() * 16.0f);
        UNROLLED
        for (i32 k = 0; k < 2; k++) {
            const i32 word = 16 * set + 8 * k + lane() / 4;
            UNROLLED
            for (i32 high = 0; high < 2; high++) {
                const u32 mean = word < tile.half_v / 4 ? load_u32(tile.v_mean + 4 * word + high * tile.half_v) : 0;
                UNROLLED
                for (i32 i = 0; i < 4; i++) acc[4 * high + i][2 * k] = fma_rn(w, float(i8(mean >> 8 * i)), acc[4 * high + i][2 * k]);
            }
        }
    }
    // Writes all of it to the outputs [head][dim_v] of the four heads.
    DEVICE void flush(float *out, i32 heads, i32 half, i32 set) const {
        float all = centred;
        for (u32 mask = 1; mask <= 2; mask *= 2) all += shuffle_xor(all, mask);
        const i32 t = lane() % 4;
        const float unit = inverse_fast(shuffle(scale, 8 * t)) * (1.0f / 16.0f);
        all = shuffle(all, 8 * t) * 16.0f;
        if (t >= heads) return;
        UNROLLED
        for (i32 k = 0; k < 2; k++) {
            const i32 word = 16 * set + 8 * k + lane() / 4;
            if (word >= half / 4) break;
            UNROLLED
            for (i32 high = 0; high < 2; high++) {
                float x[4];
                UNROLLED
                for (i32 i = 0; i < 4; i++) x[i] = (fma_rn(acc[4 * high + i][2 * k + 1], 1.0f / 2048.0f, acc[4 * high + i][2 * k]) + all) * unit;
                *reinterpret_cast<float4 *>(out + t * 2 * half + 4 * word + high * half) = float4{x[0], x[1], x[2], x[3]};
            }
        }
    }
};

// A warp's sums for four heads, by lanes.
struct LaneSums {
    float of[4][Part::FIELDS], bound[4], weight[4], peak;  // the largest; the last: of head lane % 4
};

// What scores of a tile are uncertain by, of head first + lane % 4 and for the logarithm to base 2: at most
// worst * left + q + rest, of rows as the engine has them `rest` alone; its square `rough` * left^2 + `q_rough`.
struct ScoreErrors {
    float worst, q, rest, rough, q_rough;

    // Of tokens that leave out so much at most.
    DEVICE ScoreErrors(const TileError &e, float most_left) {
        // Beyond LOOSE nothing is summed.
        const bool loose = !(e.worst * (most_left + e.slack) + e.q_worst + e.bend <= float(LOOSE));
        worst = loose ? 0.0f : e.worst * LOG2_E, q = loose ? 0.0f : e.q_worst * LOG2_E, rest = loose ? 0.0f : (e.worst * e.slack + e.bend) * LOG2_E;
        auto square = [](float x) { return x * x < 1e30f ? x * x : 1e30f; };
        rough = square(e.rough * (0.5773503f * PEAK / 2.0f)), q_rough = square(e.q_rms * (PEAK / 2.0f));
    }
};

// Adds a tile to a warp's sums, for four heads, in units of exp(max), and weighs its tokens.
DEVICE void weigh_tile(const Unit &u, i32 t, Plan &plan, i32 first, const float (&max)[4], LaneSums &sums) {
    const Tile tile = u.tile(t);
    const bool attached = u.attached(), some = plan.n_k > 0 || plan.n_v > 0;
    const i32 mine = first + i32(lane() % 4);
    const Scanned s = mine < u.heads ? u.scanned(t, mine) : Scanned{};
    const TileError error = error_of(s);
    sums.peak = larger(sums.peak, s.unit * PEAK);
    if (!some) {
        // All tokens stand for the tile's mean of V, and the sums are those of the scan.
        const ScoreErrors errors(error, left(1));
        float factor = 0.0f;
        UNROLLED
        for (i32 hh = 0; hh < 4; hh++) factor = i32(lane()) == hh ? max[hh] : factor;
        factor = lane() < 4 && mine < u.heads && s.max > -infinity() ? exp2_fast((s.max - factor) * LOG2_E) : 0.0f;
        const float e = factor * s.e, x = factor * s.e_vs, x2 = factor * factor * s.e_vs2;
        const float grow = grow_above(fma_rn(errors.worst, left(1), errors.q + errors.rest)), bound = error.bound(1);
        const float value = x * left(0) + e * plan.mean_peak, square = x2 * (errors.rough * (left(1) * left(1)) + errors.q_rough + left(0) * left(0) * (1.0f / 3.0f));
        UNROLLED
        for (i32 hh = 0; hh < 4; hh++) {
            if (i32(lane()) != hh) continue;
            plan.rest[hh] = e;
            float(&of)[Part::FIELDS] = sums.of[hh];
            of[Part::SUM] += e, of[Part::WEIGHTED] += x;
            of[Part::SPREAD] += e * grow, of[Part::SPREAD_WEIGHTED] += x * grow;
            of[Part::VALUE] += value, of[Part::SQUARE] += square;
            sums.bound[hh] = larger(sums.bound[hh], bound);
        }
    } else {
        const u32 planes = plan.planes[lane()], v_scales = load_u32(tile.v_scales + 4 * lane());
        float rest[4] = {}, s_of[4][4];
        logits(u, t, first, s_of);
        // Of each token what it leaves out of K and V, whether its K is in digits, and whether it has the mean's V.
        float vs[4], left_k[4], square_k[4], left_v[4], square_v[4], digits[4], mean[4], most_left = 0.0f;
        UNROLLED
        for (i32 i = 0; i < 4; i++) {
            const i32 k = planes >> 8 * i & 7, v = planes >> (8 * i + 4) & 15;
            vs[i] = scale_of(byte_of(v_scales, i));
            digits[i] = attached && k > 1 ? 0.0f : 1.0f, mean[i] = v == 0 ? 1.0f : 0.0f;
            left_k[i] = digits[i] * left(k), left_v[i] = v == 0 ? left(0) : attached ? CUTS * PEAK : left(v) + CUTS * PEAK;
            square_k[i] = left_k[i] * left_k[i], square_v[i] = attached && v > 0 ? 0.0f : left(v) * left(v) * (1.0f / 3.0f);
            most_left = most(left_k[i], most_left);
        }
        most_left = bits_float(reduce_max(float_bits(most_left)));
        const ScoreErrors errors(error, most_left);
        UNROLLED
        for (i32 hh = 0; hh < 4; hh++) {
            if (first + hh >= u.heads) break;
            const float worst = shuffle(errors.worst, hh), q = shuffle(errors.q, hh), constant = shuffle(errors.rest, hh);
            const float rough = shuffle(errors.rough, hh), q_rough = shuffle(errors.q_rough, hh);
            float(&of)[Part::FIELDS] = sums.of[hh];
            float(&e)[4] = s_of[hh], w[4];
            UNROLLED
            for (i32 i = 0; i < 4; i++) {
                e[i] = exp2_fast((e[i] - max[hh]) * LOG2_E);
                const float x = e[i] * vs[i], grow = grow_above(fma_rn(worst, left_k[i], fma_rn(q, digits[i], constant)));
                of[Part::SUM] += e[i], of[Part::WEIGHTED] += x;
                of[Part::SPREAD] = fma_rn(e[i], grow, of[Part::SPREAD]), of[Part::SPREAD_WEIGHTED] = fma_rn(x, grow, of[Part::SPREAD_WEIGHTED]);
                of[Part::VALUE] = fma_rn(x, left_v[i], of[Part::VALUE]);
                of[Part::SQUARE] = fma_rn(x * x, fma_rn(rough, square_k[i], fma_rn(q_rough, digits[i], square_v[i])), of[Part::SQUARE]);
                rest[hh] = fma_rn(e[i], mean[i], rest[hh]);
                w[i] = attached ? e[i] : x;
                sums.weight[hh] = most(x, sums.weight[hh]);
            }
            of[Part::VALUE] = fma_rn(plan.mean_peak, rest[hh], of[Part::VALUE]);
            // Where LOOSE is exceeded the bound is what tells.
            const float reach = shuffle(error.worst, hh), others = shuffle(error.worst * error.slack + error.q_worst + error.bend, hh);
            sums.bound[hh] = larger(sums.bound[hh], fma_rn(reach, most_left, others));
            reinterpret_cast<float4 *>(plan.weights[hh])[lane()] = float4{w[0], w[1], w[2], w[3]};
        }
        const float sum = sum_apart(rest);
        if (lane() % 8 == 0) plan.rest[lane() / 8] = sum;
    }
    sync_warp();
}

// A warp's part of a split, for four heads.
DEVICE void add_tiles(const Unit &u, const Memory &m, i32 first) {
    Work &work = m.work(warp());
    // The largest score that is known of its tiles, or one that is close enough: e^30 is far from overflow.
    float known = -infinity();
    const i32 mine = first + i32(lane() % 4);
    ROLLED
    for (i32 i = 0; i < TURNS; i++) {
        const i32 t = u.first + i32(warp()) + i * ATTEND_WARPS;
        if (work.plans[i].n_seen == 0) continue;
        float s = -infinity();
        bool vague = false;
        if (mine < u.heads) {
            const Scanned &scanned = u.scanned(t, mine);
            s = scanned.max, vague = work.plans[i].n_k > 0 && error_of(scanned).bound(1) > 30.0f;
        }
        if (any(vague)) {
            float x[4][4];
            logits(u, t, first, x);
            UNROLLED
            for (i32 hh = 0; hh < 4; hh++) {
                const float found = warp_max(larger(larger(x[hh][0], x[hh][1]), larger(x[hh][2], x[hh][3])));
                s = i32(lane() % 4) == hh ? found : s;
            }
        }
        known = larger(known, s);
    }
    float max[4];
    UNROLLED
    for (i32 hh = 0; hh < 4; hh++) {
        max[hh] = shuffle(known, hh);
        max[hh] = max[hh] == -infinity() ? 0.0f : max[hh];
    }
    LaneSums sums = {};
    ROLLED
    for (i32 i = 0; i < TURNS; i++) {
        if (work.plans[i].n_seen > 0) weigh_tile(u, u.first + i32(warp()) + i * ATTEND_WARPS, work.plans[i], first, max, sums);
    }
    UNROLLED
    for (i32 hh = 0; hh < 4; hh++) {
        if (first + hh >= u.heads) break;
        Part &part = m.part(warp(), hh);
        float x[8] = {};
        UNROLLED
        for (i32 i = 0; i < Part::FIELDS; i++) x[i] = sums.of[hh][i];
        const float sum = sum_apart(x);
        if (lane() % 4 == 0 && lane() / 4 < Part::FIELDS) part.of[lane() / 4] = sum;
        const float bound = bits_float(reduce_max(float_bits(sums.bound[hh]))), peak = shuffle(sums.peak, hh), largest = shuffle(known, hh);
        if (lane() == 0) part.max = largest, part.bound = bound, part.peak = peak;
    }

    UNROLLED
    for (i32 hh = 0; hh < 4; hh++) sums.weight[hh] = bits_float(reduce_max(float_bits(sums.weight[hh])));
    ROLLED
    for (i32 set = 0; 128 * set < m.dim_v; set++) {
        Values values(sums.weight);
        ROLLED
        for (i32 i = 0; i < TURNS; i++) {
            const Plan &plan = work.plans[i];
            if (plan.n_seen == 0) continue;
            const Tile tile = u.tile(u.first + i32(warp()) + i * ATTEND_WARPS);
            if (!u.attached()) values.add(tile, plan.v, plan.n_v, plan.weights, set);
            values.add_mean(tile, plan.rest, set);
        }
        values.flush(m.outs(warp(), 0), u.heads - first, m.dim_v / 2, set);
    }
    sync_warp();
    ROLLED
    for (i32 i = 0; i < TURNS && u.attached(); i++) {
        if (work.plans[i].n_seen > 0) add_rows(u.p, u.split, u.first + i32(warp()) + i * ATTEND_WARPS, work.plans[i], first, m.words);
    }
}

// The rows that are kept as given, for one head, by a warp: a part of their own.
DEVICE_CALL void attend_exact(const AttendParams &p, i32 h, i32 words) {
    const Unit u(p, block_y(), 0);
    const Memory m(u, words);
    const Shape &s = p.shape;
    const Scanned &scanned = u.scanned(-1, h);
    float *out = m.outs(ATTEND_WARPS, h % 4);
    for (i32 c = lane(); c < s.dim_v; c += 32) out[c] = 0.0f;
    ROLLED
    for (i32 w = 0; w < 4; w++) {
        ROLLED
        for (u32 seen = u.seen_exact(w); seen != 0; seen &= seen - 1) {
            const i32 row = 32 * w + popc(~seen & (seen - 1));
            const float e = exp(u.logit(u.scores(-1, h)[row], 0, row, h) - scanned.max);
            const u64 v = u.given_v(row);
            for (i32 c = lane(); c < s.dim_v; c += 32) out[c] = fma_rn(e, load_element(v, s.dtype_v, c), out[c]);
        }
    }
    if (lane() == 0) {
        const float bound = error_of(scanned).bound_of_rows(), grow = bound < float(LOOSE) ? grow_above(bound * LOG2_E) : 0.0f;
        m.part(ATTEND_WARPS, h % 4) = {{scanned.e, scanned.e_vs, grow * scanned.e, grow * scanned.e_vs, 0.0f, 0.0f}, scanned.max, bound, scanned.unit * PEAK};
    }
}

// Adds up the parts of a split, in their order, for one head, by a warp.
DEVICE void sum_parts(const Unit &u, const Memory &m, i32 h, i32 n_parts, i32 n_tokens) {
    float max = -infinity(), bound = 0.0f, peak = 0.0f, factor[PARTS];
    for (i32 i = 0; i < n_parts; i++) {
        const Part &part = m.part(i, h % 4);
        max = larger(max, part.max), bound = larger(bound, part.bound), peak = larger(peak, part.peak);
    }
    UNROLLED
    for (i32 i = 0; i < PARTS; i++) factor[i] = i < n_parts && m.part(i, h % 4).max > -infinity() ? exp(m.part(i, h % 4).max - max) : 0.0f;
    for (i32 c = lane(); c < m.dim_v; c += 32) {
        float x = 0.0f;
        UNROLLED
        for (i32 i = 0; i < PARTS; i++) x = i < n_parts ? fma_rn(factor[i], m.outs(i, h % 4)[c], x) : x;
        u.outs(u.split, h)[c] = x;
    }
    Sums &sums = u.sums(u.split, h);
    if (lane() < Part::FIELDS) {
        const bool weighted = lane() == Part::WEIGHTED || lane() == Part::SPREAD_WEIGHTED;
        double x = 0.0;
        UNROLLED
        for (i32 i = 0; i < PARTS; i++) {
            const double f = factor[i];
            if (i < n_parts) x += (lane() == Part::SQUARE ? f * f : f) * double(m.part(i, h % 4).of[lane()]);
        }
        (&sums.sum)[lane()] = weighted ? x * double(PEAK) : x;
    }
    if (lane() == 0) sums.n = n_tokens, sums.max = max, sums.peak = peak, sums.bound = bound;
}

// Adds to the call's statistics what a warp has read.
DEVICE_CALL void count(const AttendParams &p, i32 split, i32 words) {
    const Unit u(p, block_y(), split);
    const Work &work = Memory(u, words).work(warp());
    const i32 n_exact = u.count_exact();
    Stats *stats = reinterpret_cast<Stats *>(p.stats);
    u32 tokens = 0, tiles = 0, k[PLANES + 1] = {}, v[PLANES + 1] = {};
    for (i32 i = 0; i < TURNS; i++) {
        const Plan &plan = work.plans[i];
        tokens += plan.n_seen, tiles += plan.n_seen > 0;
        for (i32 j = 0; j < 4 && plan.n_seen > 0; j++) {
            const u32 byte = plan.planes[lane()] >> 8 * j & 255;
            for (i32 planes = 0; planes <= PLANES; planes++) {
                k[planes] += popc(ballot(byte % 16 == u32(planes))), v[planes] += popc(ballot(byte % 16 <= PLANES && byte / 16 == u32(planes)));
            }
        }
    }
    if (lane() != 0) return;
    for (i32 planes = 0; planes <= PLANES; planes++) {
        if (k[planes]) atomic_add(&stats->planes_k[planes], u64(k[planes]));
        if (v[planes]) atomic_add(&stats->planes_v[planes], u64(v[planes]));
    }
    if (tokens) atomic_add(&stats->tokens, u64(tokens));
    if (tiles) atomic_add(&stats->tiles, u64(tiles)), atomic_add(&stats->means, u64(tiles));
    if (thread() != 0) return;
    if (n_exact) atomic_add(&stats->tokens_exact, u64(n_exact));
    if (u.split == 0 && block_x() == 0) atomic_add(&stats->rows[PATH_PROGRESSIVE], u64(1));
}

// The whole phase, of one split.
template <i32 S>
DEVICE void attend_split(const Unit &u, const Memory &m) {
    const i32 n_exact = u.count_exact(), n_parts = n_exact > 0 ? PARTS : ATTEND_WARPS;
    sync_block();  // shares are there, and the split before is written

    Work &work = m.work(warp());
    ROLLED
    for (i32 i = 0; i < TURNS; i++) {
        const i32 t = u.first + i32(warp()) + i * ATTEND_WARPS;
        Plan &plan = work.plans[i];
        if (t >= u.last) {
            if (lane() == 0) plan.n_seen = 0;
            sync_warp();
            continue;
        }
        plan_tile(u, m, t, plan);
        if (plan.n_k == 0) continue;
        if (u.attached()) read_keys(u.p, u.split, t, plan, m.words);
        else refine_keys<S>(u, m, t, plan.k, plan.n_k);
    }
    if (u.p.stats) count(u.p, u.split, m.words);
    static_assert(ATTEND_WARPS == 4, "of four heads a warp has one");
    ROLLED
    for (i32 first = 0; first < u.heads; first += 4) {
        const i32 h = first + warp();
        if (first > 0) sync_block();  // the heads before are written
        add_tiles(u, m, first);
        if (n_exact > 0 && h < u.heads) attend_exact(u.p, h, S);
        sync_block();
        i32 n_tokens = n_exact;
        for (i32 i = 0; i < SPLIT; i++) n_tokens += m.work(i % ATTEND_WARPS).plans[i / ATTEND_WARPS].n_seen;
        if (h < u.heads) sum_parts(u, m, h, n_parts, n_tokens);
    }
}

}  // namespace akv
