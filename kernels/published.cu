// Attention by the criterion of AlignedKV as published: src/backend/cpu/published.rs and src/alignment/published.rs. Every
// choice is made over the whole context of a query row: four kernels, one after another. Blocks are (split, KV head and
// unit, query row), all of ATTEND_THREADS; of akv_published_align there is one for all splits.
#include "finish.cuh"

namespace akv {

constexpr i32 GROUPS = 32;  // a lane each
static_assert(MAX_DIM == 2 * ATTEND_THREADS, "two channels per thread");

DEVICE i32 exponent(u32 half) { return half >> 10 & 31; }
// An f16 of which `bits` are read: the midpoint stands for the rest.
DEVICE float read_half(u32 half, i32 bits) {
    return half_to_float(u16(bits == 8 ? (half & 0xff00) | 0x80 : bits == 12 ? (half & 0xfff0) | 0x8 : half));
}

// What a row's context is aligned by, for one query head.
DEVICE Aim &aim_of(const Unit &u, i32 head) { return reinterpret_cast<Aim *>(u.p.aims)[i64(u.index) * u.unit_heads + head]; }
DEVICE u16 *peaks_of(const Unit &u, i32 split) {
    return reinterpret_cast<u16 *>(u.p.peaks) + (i64(u.index) * ((u.p.max_tiles + SPLIT - 1) / SPLIT) + split) * 2 * MAX_DIM;
}
// Bits of the largest magnitude of a channel over the context.
DEVICE u32 peak_of(const Unit &u, bool values, i32 c) {
    u32 peak = 0;
    for (i32 s = 0; s < u.n_splits; s++) {
        const u32 x = peaks_of(u, s)[values * MAX_DIM + c];
        peak = x > peak ? x : peak;
    }
    return peak;
}

// Tokens of a split that the row sees.
struct Stretch {
    i32 from, to;

    DEVICE explicit Stretch(const Unit &u) {
        const i32 start = u.split * SPLIT * TILE, end = start + SPLIT * TILE;
        from = u.row.from > start ? u.row.from : start, to = u.row.to < end ? u.row.to : end;
    }
};

DEVICE bool is_idle(const Unit &u) { return u.split >= u.n_splits || u.row.dense; }

KERNEL(akv_published_peaks, ATTEND_THREADS, 4, AttendParams) {
    const Unit u(p);
    if (is_idle(u)) return;
    const Stretch some(u);
    for (i32 at = thread(); at < 2 * MAX_DIM; at += ATTEND_THREADS) {
        const bool values = at >= MAX_DIM;
        const i32 c = at % MAX_DIM;
        u32 peak = 0;
        for (i32 i = some.from; i < some.to; i++) {
            const Given rows = u.given(i / TILE, values);
            const u32 x = c < rows.dim ? rows.half_bits(i % TILE, c) & 0x7fff : 0;
            peak = x > peak ? x : peak;
        }
        peaks_of(u, u.split)[at] = u16(peak);
    }
}

struct ScoresMemory {
    float q[UNIT_HEADS][MAX_DIM];
    u8 bits[UNIT_HEADS][MAX_DIM];  // of K that are read
    u16 peak[MAX_DIM];
};

KERNEL(akv_published_scores, ATTEND_THREADS, 4, AttendParams) {
    const Unit u(p);
    if (is_idle(u)) return;
    const Shape &s = p.shape;
    ScoresMemory &m = *shared<ScoresMemory>();
    for (i32 c = thread(); c < s.dim_k; c += ATTEND_THREADS) m.peak[c] = u16(peak_of(u, false, c));
    sync_block();
    for (i32 h = warp(); h < u.heads; h += ATTEND_WARPS) {
        // From q as it is.
        i32 most = 0;
        for (i32 c = lane(); c < s.dim_k; c += 32) {
            float x = load_element(row_of(p.q, u.row_index, u.first_head + h), p.q.dtype, c);
            if (!(magnitude(x) < infinity())) {
                u.report(FAULT_NONFINITE, FAULT_IN_Q, h);
                x = 0.0f;
            }
            m.q[h][c] = x;
            const i32 e = exponent(float_to_half(x)) + exponent(m.peak[c]);
            most = e > most ? e : most;
        }
        most = i32(warp_max(float(most)));
        for (i32 c = lane(); c < s.dim_k; c += 32) {
            const i32 gap = most - exponent(float_to_half(m.q[h][c])) - exponent(m.peak[c]);
            m.bits[h][c] = gap >= 8 ? 8 : gap >= 4 ? 12 : 16;
            m.q[h][c] *= p.scale;
        }
    }
    sync_block();
    if (p.stats && u.split == 0 && warp() == 0) {
        u32 bits = 0;
        for (i32 c = lane(); c < s.dim_k; c += 32) {
            u32 most = 0;
            for (i32 h = 0; h < u.heads; h++) most = m.bits[h][c] > most ? m.bits[h][c] : most;
            bits += most;
        }
        bits = u32(warp_sum(float(bits)));
        const u64 n = u.row.to - u.row.from;
        Stats *stats = reinterpret_cast<Stats *>(p.stats);
        if (lane() == 0) {
            atomic_add(&stats->tokens, n);
            atomic_add(&stats->bytes_k, bits * n / 8);
            if (block_x() == 0) atomic_add(&stats->rows[PATH_PUBLISHED], u64(1));
        }
    }
    const Stretch some(u);
    for (i32 i = some.from + warp(); i < some.to; i += ATTEND_WARPS) {
        const Given rows = u.given(i / TILE, false);
        u32 half[MAX_DIM / 32];
        UNROLLED
        for (i32 n = 0; n < MAX_DIM / 32; n++) half[n] = i32(lane()) + 32 * n < s.dim_k ? rows.half_bits(i % TILE, lane() + 32 * n) : 0;
        for (i32 h = 0; h < u.heads; h++) {
            float sum = 0.0f;
            UNROLLED
            for (i32 n = 0; n < MAX_DIM / 32; n++) {
                const i32 c = lane() + 32 * n;
                if (c < s.dim_k) sum = fma_rn(read_half(half[n], m.bits[h][c]), m.q[h][c], sum);
            }
            sum = warp_sum(sum);
            if (lane() == 0) u.scores(i / TILE, h)[i % TILE] = sum;
        }
    }
    sync_block();
    for (i32 h = warp(); h < u.heads; h += ATTEND_WARPS) {
        float max = -infinity();
        for (i32 i = some.from + lane(); i < some.to; i += 32) max = larger(max, u.scores(i / TILE, h)[i % TILE]);
        max = warp_max(max);
        double sum = 0.0;
        for (i32 i = some.from + lane(); i < some.to; i += 32) sum += exp(u.scores(i / TILE, h)[i % TILE] - max);
        sum = warp_sum(sum);
        if (lane() == 0) u.partial(u.split, h) = {sum, 0.0, max, 0.0f};
    }
}

// A token's weight, as an f16.
DEVICE u16 weight_of(const Unit &u, const Aim &aim, i32 token, i32 head) {
    return float_to_half(float(double(exp(u.scores(token / TILE, head)[token % TILE] - aim.max)) / aim.sum));
}

KERNEL(akv_published_align, ATTEND_THREADS, 4, AttendParams) {
    const Unit u(p);
    if (is_idle(u) || u.row.from >= u.row.to) return;
    const Shape &s = p.shape;
    for (i32 h = warp(); h < u.heads; h += ATTEND_WARPS) {
        Aim aim = {0.0, -infinity(), 0};
        for (i32 split = 0; split < u.n_splits; split++) aim.max = larger(aim.max, u.partial(split, h).max);
        for (i32 split = 0; split < u.n_splits; split++) aim.sum += u.partial(split, h).sum * factor_of(u.partial(split, h).max, aim.max);
        // The largest weight of every group, the first of equal ones.
        u32 best = 0;
        i32 at = u.row.from;
        for (i32 i = u.row.from + lane(); i < u.row.to; i += GROUPS) {
            const u32 weight = weight_of(u, aim, i, h);
            if (weight > best) best = weight, at = i;
        }
        float probe[MAX_DIM / 32] = {};
        for (i32 group = 0; group < GROUPS; group++) {
            const i32 token = shuffle(at, group);
            const float weight = half_to_float(u16(shuffle(best, group)));
            const Given rows = u.given(token / TILE, true);
            UNROLLED
            for (i32 n = 0; n < MAX_DIM / 32; n++) {
                const i32 c = lane() + 32 * n;
                if (c < s.dim_v) probe[n] = add_rn(probe[n], mul_rn(magnitude(read_half(rows.half_bits(token % TILE, c), 8)), weight));
            }
        }
        i32 least = 1 << 20;
        UNROLLED
        for (i32 n = 0; n < MAX_DIM / 32; n++) {
            const i32 c = lane() + 32 * n;
            if (c >= s.dim_v) continue;
            const i32 e = exponent(float_to_half(probe[n])) - 1 + 15 - exponent(peak_of(u, true, c));
            least = e < least ? e : least;
        }
        aim.alignment = -i32(warp_max(float(-least))) * 1024;
        if (lane() == 0) aim_of(u, h) = aim;
    }
}

struct ValuesMemory {
    double weighted[UNIT_HEADS];
    float weights[UNIT_HEADS][TILE];
    float peak[TILE];
    u8 bits[UNIT_HEADS][TILE];
    u32 flag;
};
static_assert(sizeof(ScoresMemory) == 20992 && sizeof(ValuesMemory) <= 20992, "PUBLISHED_SHARED_BYTES");

KERNEL(akv_published_values, ATTEND_THREADS, 4, AttendParams) {
    const Unit u(p);
    if (is_idle(u)) return;
    const Shape &s = p.shape;
    ValuesMemory &m = *shared<ValuesMemory>();
    const Stretch some(u);
    float out[UNIT_HEADS][2] = {};
    if (thread() < UNIT_HEADS) m.weighted[thread()] = 0.0;
    u64 bits_read = 0;
    for (i32 t = some.from / TILE; t * TILE < some.to; t++) {
        const Given rows = u.given(t, true);
        const i32 first = some.from > t * TILE ? some.from - t * TILE : 0, end = some.to < (t + 1) * TILE ? some.to - t * TILE : TILE;
        const i32 i = thread();  // a token each
        sync_block();
        u32 peak = 0, most = 0;
        if (i >= first && i < end) {
            for (i32 c = 0; c < s.dim_v; c++) peak = (rows.half_bits(i, c) & 0x7fff) > peak ? rows.half_bits(i, c) & 0x7fff : peak;
        }
        m.peak[i] = half_to_float(u16(peak));
        for (i32 h = 0; h < u.heads; h++) {
            u32 weight = 0, bits = 8;
            if (i >= first && i < end) {
                weight = weight_of(u, aim_of(u, h), t * TILE + i, h);
                const i32 gap = aim_of(u, h).alignment - i32(weight);
                bits = gap >= 0x800 ? 8 : gap >= 0x400 ? 12 : 16;
                most = bits > most ? bits : most;
            }
            m.weights[h][i] = half_to_float(u16(weight)), m.bits[h][i] = u8(bits);
        }
        bits_read += most;
        sync_block();
        for (i32 h = warp(); h < u.heads; h += ATTEND_WARPS) {
            double sum = 0.0;
            for (i32 n = lane(); n < TILE; n += 32) sum += double(m.weights[h][n]) * double(m.peak[n]);
            sum = warp_sum(sum);
            if (lane() == 0) m.weighted[h] += sum * aim_of(u, h).sum;
        }
        for (i32 n = first; n < end; n++) {
            u32 half[2];
            for (i32 j = 0; j < 2; j++) half[j] = i + j * ATTEND_THREADS < s.dim_v ? rows.half_bits(n, i + j * ATTEND_THREADS) : 0;
            UNROLLED
            for (i32 h = 0; h < UNIT_HEADS; h++) {
                if (h >= u.heads) continue;
                // Divided by the sum again when splits are merged.
                const float weight = m.weights[h][n] * float(aim_of(u, h).sum);
                for (i32 j = 0; j < 2; j++) out[h][j] = fma_rn(weight, read_half(half[j], m.bits[h][n]), out[h][j]);
            }
        }
    }
    sync_block();
    UNROLLED
    for (i32 h = 0; h < UNIT_HEADS; h++) {
        if (h >= u.heads) continue;
        for (i32 j = 0; j < 2; j++) {
            const i32 c = thread() + j * ATTEND_THREADS;
            if (c < s.dim_v) u.outs(u.split, h)[c] = out[h][j];
        }
    }
    if (i32(thread()) < u.heads) {
        const i32 h = thread();
        Sums sums = no_sums(-infinity());
        if (some.from < some.to) {
            sums.max = aim_of(u, h).max;
            sums.sum = u.partial(u.split, h).sum * factor_of(u.partial(u.split, h).max, sums.max);
            sums.weighted = m.weighted[h];
            sums.bound = infinity();  // nothing is claimed
            note(sums, some.to - some.from, PEAK);
        }
        u.sums(u.split, h) = sums;
    }
    if (p.stats && bits_read) atomic_add(&reinterpret_cast<Stats *>(p.stats)->bytes_v, bits_read * u64(s.dim_v) / 8);
    leave(u, m.flag, 1);
}

}  // namespace akv
