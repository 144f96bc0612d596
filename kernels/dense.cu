// Dense attention: every stored digit of every token that is seen, for many query rows at once. Blocks are (split, KV head
// and unit, query row), all of ATTEND_THREADS; of the dense rows of a sequence one in so many has a block that works, for
// itself and those that follow. A row's result does not depend on which ones share its block.
//
// A block decodes some tokens at a time into shared memory and multiplies them on tensor cores, in tf32. That has 11 bits:
// every factor is two of them, high and low, and what two low ones give is left out.
#include "finish.cuh"

namespace akv {

constexpr i32 DENSE_ROWS = 64;  // query heads of query rows: 16 for every warp
constexpr i32 CHAIN = 4;        // products that a tensor core adds up in a row

// Float rounding of a score, in units of 2^-24 of the largest that it could be. A tensor core may cut each of an mma's eight
// products and their sum in the last bit of the largest (2 units): 72 in a chain. Chains are added, at most 8 of them, and
// the low parts: 9. The parts leave out 16 (low times low) and 6 of each factor. With the scale, 110.
constexpr float DENSE_ROUNDING = 112 * (5.9604645e-8f * PEAK);
// That of an output, beyond what every certificate has (ROUNDING in src/alignment/certificate.rs): parts 28, a chain 72, its
// additions in a split 36 and as many factors, in place of 148 (of wide rows 28, 36, 72, 72); the sum of weights 30, not 12.
constexpr float DENSE_VALUE_ROUNDING = 80 * (5.9604645e-8f * PEAK);
// Added to the magnitudes of channels: makes up for parts that tensor cores flush to zero.
constexpr float TINY = 1e-30f;

// float(x) = high + low, but for its last two bits.
struct Parts {
    float high, low;

    DEVICE explicit Parts(float x) {
        high = bits_float(float_bits(x) & 0xffffe000);
        low = bits_float(float_bits(x - high) & 0xffffe000);
    }
};

// The left-hand operand of an mma, in parts.
struct Left {
    float high[4], low[4];

    DEVICE Left(float a0, float a1, float a2, float a3) {
        const float x[4] = {a0, a1, a2, a3};
        UNROLLED
        for (i32 i = 0; i < 4; i++) {
            const Parts parts(x[i]);
            high[i] = parts.high, low[i] = parts.low;
        }
    }
};

// A sum of up to CHAIN products, and what the low parts add to it: apart, they round far less.
struct Product {
    float high[4], low[4];

    DEVICE Product() : high(), low() {}
    DEVICE void add(const Left &a, float b0, float b1) {
        const Parts x(b0), y(b1);
        mma_tf32(high, a.high, x.high, y.high);
        mma_tf32(low, a.low, x.high, y.high);
        mma_tf32(low, a.high, x.low, y.low);
    }
    DEVICE float sum(i32 i) const { return high[i] + low[i]; }
};

// Shared memory of a block: q and tokens, by rows that lie in different banks; then what is known of the tokens.
template <i32 S>
struct DenseMemory {
    static constexpr i32 DIM = 32 * S, STRIDE = DIM + 4, TOKENS = S <= 6 ? 32 : 16;

    DEVICE static float *q() { return shared<float>(); }
    DEVICE static float *tokens() { return q() + DENSE_ROWS * STRIDE; }
    DEVICE static float *k_unit() { return tokens() + TOKENS * STRIDE; }  // by channel: |K| is at most PEAK times this
    DEVICE static float *v_unit() { return k_unit() + DIM; }              // by token, the same of V
    DEVICE static Sums *sums() { return reinterpret_cast<Sums *>(v_unit() + TOKENS); }
    DEVICE static u32 *flags() { return reinterpret_cast<u32 *>(sums() + DENSE_ROWS); }  // [DENSE_ROWS]
};

// Query rows that a block works for: those that follow its own, up to the next whole number of DENSE_ROWS.
struct Team {
    i32 n, from, to;  // what they see together

    DEVICE explicit Team(const Unit &u) : n(0), from(u.row.from), to(0) {
        const QueryRow *const rows = reinterpret_cast<const QueryRow *>(u.p.rows) + u.row_index;
        const i32 most = DENSE_ROWS / u.heads, index = u.row.dense - 1;
        // The first row of a launch may be any of its sequence.
        if (u.row.sequence < 0 || index < 0 || (u.row_index > 0 && index % most != 0)) return;
        const i32 left = most - index % most, rest = u.p.n_rows - u.row_index;
        for (; n < left && n < rest && rows[n].sequence == u.row.sequence; n++) {
            from = rows[n].from < from ? rows[n].from : from, to = rows[n].to > to ? rows[n].to : to;
        }
    }
};

// Tokens start.. in shared memory; what there is not is 0.
template <i32 S>
DEVICE_CALL void load_given(const AttendParams &p, i32 tile, bool exact, bool values, i32 start) {
    using M = DenseMemory<S>;
    const Unit u(p);
    const Given given = u.given(tile, exact, values);
    ROLLED
    for (i32 at = thread(); at < M::TOKENS * M::DIM; at += ATTEND_THREADS) {
        const i32 i = at / M::DIM, c = at % M::DIM;
        M::tokens()[i * M::STRIDE + c] = given.load(start + i, c);
    }
}

// What k_unit and v_unit are of them.
DEVICE_CALL float given_k_unit(const AttendParams &p, i32 tile, bool exact, i32 c) {
    const Unit u(p);
    const Given rows = u.given(tile, exact, false);
    float unit = 0.0f;
    for (i32 i = 0; i < rows.n; i++) unit = larger(unit, magnitude(rows.load(i, c)));
    return unit * (1.0f / PEAK);
}
DEVICE_CALL float given_v_unit(const AttendParams &p, i32 tile, bool exact, i32 row) {
    const Unit u(p);
    const Given rows = u.given(tile, exact, true);
    float peak = 0.0f;
    for (i32 c = lane(); c < rows.dim; c += 32) peak = larger(peak, magnitude(rows.load(row, c)));
    return warp_max(peak) * (1.0f / PEAK);
}

// The same of a page's digits, by the scales in k_unit or v_unit.
template <i32 S, bool VALUES>
DEVICE void load_digits(const Tile &tile, i32 start) {
    using M = DenseMemory<S>;
    const i32 half = VALUES ? tile.half_v : tile.half_k, words = half / 4, planes = VALUES ? tile.planes_v : tile.planes_k;
    ROLLED
    for (i32 at = thread(); at < M::TOKENS * 4 * S; at += ATTEND_THREADS) {
        const i32 i = at / (4 * S), j = at % (4 * S), row = start + i;
        float *const to = M::tokens() + i * M::STRIDE;
        float x[2][4] = {};
        if (j < words) {
            u32 prefix[2][4] = {};
            for (i32 p = 0; p < planes; p++) {
                const u32 word = load_u32(VALUES ? tile.v_word(row, p, j) : tile.k_word(row, p, j));
                for (i32 n = 0; n < 8; n++) prefix[n / 4][n % 4] = prefix[n / 4][n % 4] << 4 | (word >> (8 * (n % 4) + 4 * (n / 4)) & 15);
            }
            for (i32 n = 0; n < 8; n++) {
                const float unit = VALUES ? M::v_unit()[i] : M::k_unit()[n / 4 * half + 4 * j + n % 4];
                x[n / 4][n % 4] = mul_rn(decode(prefix[n / 4][n % 4], planes), unit);
            }
        }
        // Words beyond the row's are its channels beyond dim.
        const i32 low = j < words ? 4 * j : 2 * half + 8 * (j - words), high = j < words ? half + 4 * j : low + 4;
        *reinterpret_cast<float4 *>(to + low) = float4{x[0][0], x[0][1], x[0][2], x[0][3]};
        *reinterpret_cast<float4 *>(to + high) = float4{x[1][0], x[1][1], x[1][2], x[1][3]};
    }
}

// A lane's two rows of the block: 16 warp + lane / 4, and 8 further.
struct Asked {
    QueryRow row;
    i32 index, head;  // index -1: there is no such row
    float max;        // of the scores so far
    // Of a tile, over the tokens that this lane has: sums relative to `max`.
    float e, e_vs, e_vs2, v_peak;
    i32 n;  // tokens that are seen, also by other lanes
};

// Sum and maximum over the lanes that share a row.
DEVICE float quad_sum(float x) {
    x += shuffle_xor(x, 1);
    return x + shuffle_xor(x, 2);
}
DEVICE float quad_max(float x) {
    x = larger(x, shuffle_xor(x, 1));
    return larger(x, shuffle_xor(x, 2));
}

// Scores of the warp's rows: [8 tokens][row g: tokens 2 t and 2 t + 1; row g + 8: the same].
template <i32 S>
DEVICE void dense_scores(i32 dim, float (&scores)[DenseMemory<S>::TOKENS / 8][4]) {
    using M = DenseMemory<S>;
    constexpr i32 TILES = M::TOKENS / 8, SOME = TILES < 4 ? TILES : 4, STRIDE = M::STRIDE;
    const i32 g = lane() / 4, t = lane() % 4;
    const float *const q = M::q() + (16 * warp() + g) * STRIDE + t, *const k = M::tokens() + g * STRIDE + t;
    UNROLLED
    for (i32 first = 0; first < TILES; first += SOME) {
        for (i32 n = 0; n < SOME; n++) {
            for (i32 j = 0; j < 4; j++) scores[first + n][j] = 0.0f;
        }
        ROLLED
        for (i32 start = 0; start < dim; start += 8 * CHAIN) {
            const i32 end = start + 8 * CHAIN < dim ? start + 8 * CHAIN : dim;
            Product product[SOME];
            ROLLED
            for (i32 c = start; c < end; c += 8) {
                const Left a(q[c], q[8 * STRIDE + c], q[c + 4], q[8 * STRIDE + c + 4]);
                UNROLLED
                for (i32 n = 0; n < SOME; n++) product[n].add(a, k[8 * (first + n) * STRIDE + c], k[8 * (first + n) * STRIDE + c + 4]);
            }
            UNROLLED
            for (i32 n = 0; n < SOME; n++) {
                for (i32 j = 0; j < 4; j++) scores[first + n][j] += product[n].sum(j);
            }
        }
    }
}

// out = out * factor + weights * V. Tokens in the order in which the weights lie: 8 n + 2 t is column t, the next one 4 + t.
template <i32 S>
DEVICE void dense_values(i32 dim, const float (&e)[DenseMemory<S>::TOKENS / 8][4], const float (&factor)[2], float (&out)[4 * S][4]) {
    using M = DenseMemory<S>;
    constexpr i32 TILES = M::TOKENS / 8, SOME = TILES < CHAIN ? TILES : CHAIN, STRIDE = M::STRIDE;
    const float *const v = M::tokens() + 2 * (lane() % 4) * STRIDE + lane() / 4;
    UNROLLED
    for (i32 c = 0; c < 4 * S; c += 4) {
        if (8 * c >= dim) continue;
        UNROLLED
        for (i32 first = 0; first < TILES; first += SOME) {
            Product product[4];
            UNROLLED
            for (i32 n = first; n < first + SOME; n++) {
                const Left a(e[n][0], e[n][2], e[n][1], e[n][3]);
                UNROLLED
                for (i32 i = 0; i < 4; i++) product[i].add(a, v[8 * n * STRIDE + 8 * (c + i)], v[(8 * n + 1) * STRIDE + 8 * (c + i)]);
            }
            UNROLLED
            for (i32 i = 0; i < 4; i++) {
                for (i32 j = 0; j < 4; j++) out[c + i][j] = fma_rn(out[c + i][j], first == 0 ? factor[j / 2] : 1.0f, product[i].sum(j));
            }
        }
    }
}

template <i32 S>
DEVICE void dense_split(const AttendParams &p) {
    using M = DenseMemory<S>;
    constexpr i32 DIM = M::DIM, STRIDE = M::STRIDE, TOKENS = M::TOKENS, TILES = TOKENS / 8;
    const Unit u(p);
    const Team team(u);
    const Shape &s = p.shape;
    const i32 tiles = (team.to + TILE - 1) / TILE, n_asked = team.n * u.heads, g = lane() / 4, t = lane() % 4;
    if (team.n == 0 || (u.split > 0 && u.split * SPLIT >= tiles)) return;
    const i32 first = u.split * SPLIT > team.from / TILE ? u.split * SPLIT : team.from / TILE;
    const i32 last = (u.split + 1) * SPLIT < tiles ? (u.split + 1) * SPLIT : tiles;

    for (i32 at = thread(); at < DENSE_ROWS * DIM; at += ATTEND_THREADS) {
        const i32 m = at / DIM, c = at % DIM, row = u.row_index + m / u.heads, head = m % u.heads;
        float x = 0.0f;
        if (m < n_asked && c < s.dim_k) x = load_element(row_of(p.q, row, u.first_head + head), p.q.dtype, c);
        if (!(magnitude(x) < infinity())) {
            u.report(FAULT_NONFINITE, FAULT_IN_Q, row, head);
            x = 0.0f;
        }
        M::q()[m * STRIDE + c] = x * p.scale;
    }
    if (thread() < DENSE_ROWS) M::sums()[thread()] = no_sums(-infinity());
    Asked asked[2];
    UNROLLED
    for (i32 r = 0; r < 2; r++) {
        const i32 m = 16 * warp() + g + 8 * r;
        asked[r] = {};
        asked[r].index = m < n_asked ? u.row_index + m / u.heads : -1;
        asked[r].head = m % u.heads;
        if (asked[r].index >= 0) asked[r].row = reinterpret_cast<const QueryRow *>(p.rows)[asked[r].index];
        asked[r].max = -infinity();
    }
    float out[4 * S][4] = {};
    u32 n_paged = 0, n_exact = 0, n_attached = 0, n_tiles = 0;

    // The rows that are kept as given come first, as a tile of their own. Where no page has digits, all are given.
    const bool has_exact = u.split == 0 && u.view.n_exact > 0 && team.from < u.view.n_exact;
    ROLLED
    for (i32 at = has_exact ? first - 1 : first; at < last; at++) {
        const bool exact = at < first, given = exact || u.attached() || s.format != FORMAT_ALIGNED;
        const i32 tile_index = exact ? 0 : at;
        const Tile tile = u.tile(tile_index);
        // Which of the tokens start.. a row sees.
        auto seen = [&](const Asked &a, i32 start) {
            if (a.index < 0) return 0u;
            const u32 seen = u.seen(a.row, a.index, tile_index, start / 32), in_head = u.exact_bits(start / 32);
            return (exact ? seen & in_head : at == 0 ? seen & ~in_head : seen) >> start % 32 & ~0u >> (32 - TOKENS);
        };
        // A bit for every TOKENS tokens: the warp wants them.
        u32 wanted = 0;
        for (i32 i = 0; i < TILE / TOKENS; i++) wanted |= u32(any((seen(asked[0], i * TOKENS) | seen(asked[1], i * TOKENS)) != 0)) << i;
        sync_block();  // before this, the last tile's memory is in use
        if (lane() == 0) M::flags()[warp()] = wanted;
        for (i32 c = thread(); c < DIM; c += ATTEND_THREADS) {
            float unit = 0.0f;
            if (given) {
                unit = given_k_unit(p, tile_index, exact, c);
            } else if (c < s.dim_k) {
                unit = scale_of(tile.k_scales[c]);
            }
            M::k_unit()[c] = unit;
        }
        sync_block();
        const u32 of_block = M::flags()[0] | M::flags()[1] | M::flags()[2] | M::flags()[3];
        if (of_block == 0) continue;
        UNROLLED
        for (i32 r = 0; r < 2; r++) asked[r].e = asked[r].e_vs = asked[r].e_vs2 = asked[r].v_peak = 0.0f, asked[r].n = 0;
        ROLLED
        for (i32 start = 0; start < TILE; start += TOKENS) {
            if (!(of_block >> start / TOKENS & 1)) continue;
            const bool mine = wanted >> start / TOKENS & 1;
            sync_block();
            if (given) {
                load_given<S>(p, tile_index, exact, false, start);
                for (i32 i = warp(); i < TOKENS; i += ATTEND_WARPS) {
                    const float unit = given_v_unit(p, tile_index, exact, start + i);
                    if (lane() == 0) M::v_unit()[i] = unit;
                }
            } else {
                load_digits<S, false>(tile, start);
                for (i32 i = thread(); i < TOKENS; i += ATTEND_THREADS) M::v_unit()[i] = scale_of(tile.v_scales[start + i]);
            }
            sync_block();
            float e[TILES][4], factor[2] = {1.0f, 1.0f};
            if (mine) {
                dense_scores<S>(s.dim_k, e);
                UNROLLED
                for (i32 r = 0; r < 2; r++) {
                    Asked &a = asked[r];
                    const u32 bits = seen(a, start);
                    a.n += popc(bits);
                    float max = -infinity();
                    UNROLLED
                    for (i32 n = 0; n < TILES; n++) {
                        for (i32 j = 0; j < 2; j++) {
                            const i32 token = 8 * n + 2 * t + j;
                            float &x = e[n][2 * r + j];
                            const bool is_seen = bits >> token & 1;
                            if (is_seen && u.bends()) x = u.logit(x, a.index, tile_index, start + token, a.head);
                            if (!is_seen) x = -infinity();
                            max = larger(max, x);
                            a.v_peak = larger(a.v_peak, is_seen ? M::v_unit()[token] : 0.0f);
                        }
                    }
                    max = larger(a.max, quad_max(max));
                    if (max > a.max) factor[r] = float(factor_of(a.max, max)), a.max = max;
                    float sum = 0.0f, sum_vs = 0.0f, sum_vs2 = 0.0f;
                    UNROLLED
                    for (i32 n = 0; n < TILES; n++) {
                        for (i32 j = 0; j < 2; j++) {
                            float &x = e[n][2 * r + j];
                            x = max == -infinity() ? 0.0f : exp(x - max);
                            const float weighted = x * M::v_unit()[8 * n + 2 * t + j];
                            sum += x, sum_vs += weighted;
                            sum_vs2 = fma_rn(weighted, weighted, sum_vs2);
                        }
                    }
                    a.e = fma_rn(a.e, factor[r], sum), a.e_vs = fma_rn(a.e_vs, factor[r], sum_vs);
                    a.e_vs2 = fma_rn(a.e_vs2, factor[r] * factor[r], sum_vs2);
                }
            }
            sync_block();
            if (given) load_given<S>(p, tile_index, exact, true, start);
            else load_digits<S, true>(tile, start);
            sync_block();
            if (mine) dense_values<S>(s.dim_v, e, factor, out);
        }

        const float left_k = given ? 0.0f : left(tile.planes_k) + tile.slack(), left_v = given ? 0.0f : left(tile.planes_v);
        UNROLLED
        for (i32 r = 0; r < 2; r++) {
            Asked &a = asked[r];
            const float *const q = M::q() + (16 * warp() + g + 8 * r) * STRIDE;
            float worst = 0.0f, rough = 0.0f;
            ROLLED
            for (i32 c = t; c < s.dim_k; c += 4) {
                const float x = (magnitude(q[c]) + TINY) * (M::k_unit()[c] + TINY);
                worst += x;
                rough = fma_rn(x, x, rough);
            }
            worst = quad_sum(worst) * (1.0f + 1e-5f), rough = sqrt_rn(quad_sum(rough));
            const float e = quad_sum(a.e), e_vs = quad_sum(a.e_vs), e_vs2 = quad_sum(a.e_vs2), v_peak = quad_max(a.v_peak);
            if (t != 0 || a.n == 0) continue;
            const float reach = worst * PEAK, bound = worst * (left_k + DENSE_ROUNDING) + u.bend(a.index, tile_index, a.head, reach);
            Sums &sums = M::sums()[16 * warp() + g + 8 * r];
            if (a.max > sums.max) rescale(sums, a.max);
            add_scores(sums, bound, rough * (left_k * 0.5773503f), e, e_vs, e_vs2);
            add_values(sums, left_v, 0.0f, e, e_vs, e_vs2);
            sums.value += double(DENSE_VALUE_ROUNDING) * e_vs;
            note(sums, a.n, v_peak * PEAK);
            if (!(reach < infinity()) || a.max == infinity()) u.report(FAULT_OVERFLOW, FAULT_IN_OUT, a.index, a.head);
            if (a.head == 0) {
                const bool paged = !exact && !u.attached();
                n_exact += exact ? a.n : 0, n_attached += exact || paged ? 0 : a.n, n_paged += paged ? a.n : 0;
                n_tiles += paged ? 1 : 0;
            }
        }
    }

    if (p.stats) {
        Stats *stats = reinterpret_cast<Stats *>(p.stats);
        if (n_paged) atomic_add(&stats->tokens, u64(n_paged));
        if (n_paged && s.format == FORMAT_ALIGNED) {
            atomic_add(&stats->planes_k[s.planes_k], u64(n_paged));
            atomic_add(&stats->planes_v[s.planes_v], u64(n_paged));
            atomic_add(&stats->tiles, u64(n_tiles));
        } else if (n_paged) {
            atomic_add(&stats->bytes_k, u64(n_paged) * s.dim_k * size_of_dtype(s.dtype_k));
            atomic_add(&stats->bytes_v, u64(n_paged) * s.dim_v * size_of_dtype(s.dtype_v));
        }
        if (n_exact) atomic_add(&stats->tokens_exact, u64(n_exact));
        if (n_attached) atomic_add(&stats->tokens_attached, u64(n_attached));
        if (thread() == 0 && u.split == 0 && block_x() == 0) atomic_add(&stats->rows[PATH_DENSE], u64(team.n));
    }
    sync_block();
    UNROLLED
    for (i32 r = 0; r < 2; r++) {
        const Asked &a = asked[r];
        if (a.index < 0 || u.split >= Unit::splits_of(a.row)) continue;
        const i64 at = u.of_split(u.index_of(a.index), u.split, a.head);
        float *const to_out = reinterpret_cast<float *>(p.outs) + at * s.dim_v + 2 * t;
        UNROLLED
        for (i32 c = 0; c < 4 * S; c++) {
            if (8 * c < s.dim_v) *reinterpret_cast<float2 *>(to_out + 8 * c) = float2{out[c][2 * r], out[c][2 * r + 1]};
        }
        if (t == 0) reinterpret_cast<Sums *>(p.sums)[at] = M::sums()[16 * warp() + g + 8 * r];
    }
    fence();
    sync_block();
    if (i32(thread()) < team.n) {
        const i32 row = u.row_index + thread(), n_splits = Unit::splits_of(reinterpret_cast<const QueryRow *>(p.rows)[row]);
        u32 &done = reinterpret_cast<u32 *>(p.done)[u.index_of(row)];
        const bool finished = u.split < n_splits && atomic_add(&done, 1u) + 1 == u32(n_splits);
        if (finished) done = 0;
        M::flags()[thread()] = finished;
    }
    sync_block();
    fence();
    ROLLED
    for (i32 row = 0; row < team.n; row++) {
        if (M::flags()[row]) finish(p, u.row_index + row);
    }
}

#define INSTANCE(S, BLOCKS) \
    KERNEL(akv_dense_##S, ATTEND_THREADS, BLOCKS, AttendParams) { dense_split<S>(p); }
INSTANCE(2, 2)
INSTANCE(3, 2)
INSTANCE(4, 2)
INSTANCE(6, 2)
INSTANCE(8, 2)
#undef INSTANCE

}  // namespace akv
