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
    // Lists the tokens 4 lane .. 4 lane + 3 of all lanes that have more than `least` planes. Returns how many.
    DEVICE i32 fill(const i32 (&planes)[4], i32 least) {
        i32 n = 0;
        for (i32 i = 0; i < 4; i++) {
            u32 listed = ballot(planes[i] > least);
            if (planes[i] > least) entries[n + popc(listed & ((1u << lane()) - 1))] = u16(planes[i] << 8 | (4 * lane() + i));
            n += popc(listed);
        }
        return n;
    }
};

// A warp's part of the shared memory.
struct Work {
    List k, v;
    float weights[4][TILE];         // e times the V scale, of four heads; e alone of rows as the engine has them
    float factors[4], unread[4];    // of their outputs so far, and of the tile's mean
};

// Shared memory of a block: q, then shares, then by warp sums, what it works with, and outputs.
struct Memory {
    u8 *start;
    i32 heads, words, dim_v;

    DEVICE Memory(const Unit &u, i32 words) : start(shared<u8>()), heads((u.unit_heads + 3) / 4 * 4), words(words), dim_v(u.p.shape.dim_v) {}

    DEVICE Queries q() const { return {reinterpret_cast<float *>(start), words}; }
    DEVICE Share *shares() const { return reinterpret_cast<Share *>(start + heads * 32 * words * 4); }
    DEVICE Share &share(i32 h) const { return shares()[h]; }
    DEVICE Sums &sums(i32 warp, i32 h) const { return reinterpret_cast<Sums *>(shares() + heads)[warp * heads + h]; }
    DEVICE Work &work(i32 warp) const { return reinterpret_cast<Work *>(&sums(ATTEND_WARPS, 0))[warp]; }
    DEVICE u32 &flag() const { return *reinterpret_cast<u32 *>(&work(ATTEND_WARPS)); }
    DEVICE float *outs(i32 warp, i32 h) const { return reinterpret_cast<float *>(&flag() + 4) + (warp * heads + h) * dim_v; }
};

// What a warp has counted.
struct Counts {
    u32 k[PLANES + 1], v[PLANES + 1], tokens, exact, tiles;
};

// One head's view of the whole context, from all splits' scans, by a warp.
DEVICE_CALL void share_of(const AttendParams &p, i32 h, Share &share) {
    const Unit u(p);
    const float sink = u.p.sinks ? reinterpret_cast<const float *>(u.p.sinks)[u.first_head + h] : -infinity();
    float max = sink;
    for (i32 s = lane(); s < u.n_splits; s += 32) max = larger(max, u.partial(s, h).max);
    max = warp_max(max);
    double sum = 0.0, weighted = 0.0;
    for (i32 s = lane(); s < u.n_splits; s += 32) {
        const Partial &partial = u.partial(s, h);
        double factor = factor_of(partial.max, max);
        sum += factor * partial.sum;
        weighted += factor * partial.weighted;
    }
    sum = warp_sum(sum) + factor_of(sink, max);
    weighted = warp_sum(weighted);
    if (lane() == 0) share = Share::of(u.p.mode, u.p.tolerance, u.row.n, max, sum, weighted);
}

// Adds further digits of K to the scores of the listed tokens, sixteen at a time.
template <i32 S>
DEVICE_CALL void refine_keys(const AttendParams &p, i32 t, i32 n) {
    const Unit u(p);
    const Memory m(u, S);
    const Queries q = m.q();
    const List &list = m.work(warp()).k;
    const Tile tile = u.tile(t);
    const i32 quad = lane() / 4, row_bytes = (tile.planes_k - 1) * tile.half_k;
    ROLLED
    for (i32 first = 0; first < u.heads; first += 4) {
        const Fold<S> fold(q, tile, first);
        const i32 h = first + lane() % 4;
        ROLLED
        for (i32 start = 0; start < n; start += 16) {
            const i32 i = start + quad, j = i + 8;
            const i32 token[2] = {i < n ? list.token(i) : 0, j < n ? list.token(j) : 0}, planes[2] = {i < n ? list.planes(i) : 0, j < n ? list.planes(j) : 0};
            const bool mine[2] = {planes[0] > 1 && h < u.heads, planes[1] > 1 && h < u.heads};
            float score[2] = {mine[0] ? u.scores(t, h)[token[0]] : 0.0f, mine[1] ? u.scores(t, h)[token[1]] : 0.0f};
            ROLLED
            for (i32 plane = 1; plane < PLANES && any(planes[0] > plane || planes[1] > plane); plane++) {
                u32 x[S] = {}, y[S] = {};
                if (planes[0] > plane) load_words<S>(tile.k_rest + token[0] * row_bytes + (plane - 1) * tile.half_k, tile.half_k, x);
                if (planes[1] > plane) load_words<S>(tile.k_rest + token[1] * row_bytes + (plane - 1) * tile.half_k, tile.half_k, y);
                i32 c[4] = {fold.start[0], fold.start[1], fold.start[0], fold.start[1]};
                UNROLLED
                for (i32 s = 0; s < S; s++) {
                    const u32 a[4] = {x[s] & 0x0f0f0f0f, y[s] & 0x0f0f0f0f, x[s] >> 4 & 0x0f0f0f0f, y[s] >> 4 & 0x0f0f0f0f};
                    mma_u8s8(c, a, fold.low[s], fold.high[s]);
                }
                if (planes[0] > plane) score[0] += fold.more(c[0] * 256 + c[1], plane, planes[0]);
                if (planes[1] > plane) score[1] += fold.more(c[2] * 256 + c[3], plane, planes[1]);
            }
            if (mine[0]) u.scores(t, h)[token[0]] = score[0];
            if (mine[1]) u.scores(t, h)[token[1]] = score[1];
        }
    }
    sync_warp();
}

// Scores of the listed tokens from the engine's own rows.
DEVICE_CALL void read_keys(const AttendParams &p, i32 t, i32 n, i32 words) {
    const Unit u(p);
    const Memory m(u, words);
    const Queries q = m.q();
    const List &list = m.work(warp()).k;
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
DEVICE_CALL void add_rows(const AttendParams &p, i32 t, i32 n, i32 first, i32 words) {
    const Unit u(p);
    const Memory m(u, words);
    const Work &work = m.work(warp());
    const i32 dv = p.shape.dim_v;
    ROLLED
    for (i32 c = lane(); c < dv; c += 32) {
        float acc[4] = {};
        ROLLED
        for (i32 i = 0; i < n; i++) {
            const i32 token = work.v.token(i);
            const float x = load_element(u.given_v(t * TILE + token), p.shape.dtype_v, c);
            for (i32 h = 0; h < 4; h++) acc[h] = fma_rn(work.weights[h][token], x, acc[h]);
        }
        UNROLLED
        for (i32 h = 0; h < 4; h++) {
            if (first + h < u.heads) m.outs(warp(), first + h)[c] += acc[h];
        }
    }
    sync_warp();
}

// V of the listed tokens for four heads: each lane has eight channels of a word, and of several tokens one.
struct Values {
    float acc[4][8];
    i32 slot, word, slots;

    DEVICE explicit Values(const Tile &tile) {
        const i32 words = tile.half_v / 4;
        slots = 32 / words;
        slot = lane() / words, word = lane() % words;
        for (i32 h = 0; h < 4; h++) {
            for (i32 i = 0; i < 8; i++) acc[h][i] = 0.0f;
        }
    }
    DEVICE void add(const Tile &tile, const List &list, i32 n, const float (&weights)[4][TILE]) {
        ROLLED
        for (i32 at = slot; at < n; at += slots) {
            if (slot >= slots) break;
            const i32 token = list.token(at), planes = list.planes(at);
            const u8 *row = tile.v_word(token, 0, word);
            u32 low[4], high[4];
            prefixes(row, tile.half_v, planes, false, low);
            prefixes(row, tile.half_v, planes, true, high);
            float x[8];
            for (i32 i = 0; i < 4; i++) x[i] = decode(low[i], planes), x[i + 4] = decode(high[i], planes);
            for (i32 h = 0; h < 4; h++) {
                float w = weights[h][token];
                for (i32 i = 0; i < 8; i++) acc[h][i] = fma_rn(w, x[i], acc[h][i]);
            }
        }
    }
    // Adds them to an output, that is rescaled first, and a multiple of the tile's mean.
    DEVICE void flush(const Tile &tile, i32 h, float *out, float factor, float mean) const {
        const float unit = mean * tile.mean_unit();
        ROLLED
        for (i32 r = 0; r < slots; r++) {
            if (slot == r) {
                for (i32 i = 0; i < 8; i++) {
                    i32 c = 4 * word + i % 4 + (i < 4 ? 0 : tile.half_v);
                    float x = acc[h][i];
                    if (r == 0) x = fma_rn(out[c], factor, fma_rn(float(i8(tile.v_mean[c])), unit, x));
                    out[c] = r == 0 ? x : out[c] + x;
                }
            }
            sync_warp();
        }
    }
};

// A tile, by a warp.
template <i32 S>
DEVICE void attend_tile(const Unit &u, const Memory &m, i32 t, Counts &counts) {
    const i32 n_seen = u.count_paged(t);
    if (n_seen == 0) return;
    const Tile tile = u.tile(t);
    Work &work = m.work(warp());
    const u32 seen = u.seen_paged(t, lane() / 8) >> 4 * (lane() % 8) & 15;  // of tokens 4 lane ..
    const u32 v_scales = *reinterpret_cast<const u32 *>(tile.v_scales + 4 * lane());
    float mean_peak = 0.0f;
    for (i32 c = lane(); c < 2 * tile.half_v; c += 32) mean_peak = larger(mean_peak, magnitude(float(i8(tile.v_mean[c]))));
    mean_peak = warp_max(mean_peak) * tile.mean_unit();

    // Who reads more than the scan has, over the heads the maximum.
    bool need = false;
    if (i32(lane()) < u.heads) {
        const Scanned &s = u.scanned(t, lane());
        need = s.max > -infinity() && m.share(lane()).any(error_of(s), mean_peak, s.max, s.unit);
    }
    const u32 needs = ballot(need);
    i32 planes_k[4] = {1, 1, 1, 1}, planes_v[4] = {};
    ROLLED
    for (i32 h = 0; h < u.heads; h++) {
        if (!(needs >> h & 1)) continue;
        const Share &share = m.share(h);
        const Thresholds limits(share, error_of(u.scanned(t, h)), mean_peak);
        for (i32 i = 0; i < 4; i++) {
            if (!(seen >> i & 1)) continue;
            float s = u.logit(u.scores(t, h)[4 * lane() + i], t, 4 * lane() + i, h);
            float e = exp(s - share.max), vs = scale_of(v_scales >> 8 * i & 255);
            i32 k = limits.planes_k(e, vs), v = limits.planes_v(e, vs);
            planes_k[i] = k > planes_k[i] ? k : planes_k[i];
            planes_v[i] = v > planes_v[i] ? v : planes_v[i];
        }
    }
    bool more = false;
    const bool attached = u.attached();
    for (i32 i = 0; i < 4; i++) {
        if (attached) {
            planes_k[i] = planes_k[i] > 1 ? PLANES : 1;
            planes_v[i] = planes_v[i] > 0 ? PLANES : 0;
        } else {
            planes_k[i] = planes_k[i] < tile.planes_k ? planes_k[i] : tile.planes_k;
            planes_v[i] = planes_v[i] < tile.planes_v ? planes_v[i] : tile.planes_v;
        }
        more |= planes_k[i] > 1 || planes_v[i] > 0;
    }
    for (i32 p = 0; p <= PLANES; p++) {
        for (i32 i = 0; i < 4; i++) {
            counts.k[p] += popc(ballot((seen >> i & 1) && planes_k[i] == p));
            counts.v[p] += popc(ballot((seen >> i & 1) && planes_v[i] == p));
        }
    }
    counts.tokens += n_seen;
    counts.tiles++;

    if (!any(more)) {
        // All tokens stand for the tile's mean of V, and the sums are those of the scan.
        float factor = 0.0f, weight = 0.0f;
        if (i32(lane()) < u.heads) {
            const Scanned &s = u.scanned(t, lane());
            Sums &sums = m.sums(warp(), lane());
            const TileError error = error_of(s);
            const float max = larger(sums.max, s.max);
            factor = float(factor_of(sums.max, max));
            if (max > sums.max) rescale(sums, max);
            const double f = factor_of(s.max, max);
            weight = float(f * s.e);
            add_scores(sums, error.bound(1), error.rms(1), f * s.e, f * s.e_vs, f * f * s.e_vs2);
            if (weight > 0.0f) add_values(sums, left(0), mean_peak, f * s.e, f * s.e_vs, f * f * s.e_vs2);
            note(sums, n_seen, s.unit * PEAK);
        }
        const Values none(tile);
        ROLLED
        for (i32 h = 0; h < u.heads; h++) {
            const float f = shuffle(factor, h), w = shuffle(weight, h);
            if (f != 1.0f || w != 0.0f) none.flush(tile, 0, m.outs(warp(), h), f, w);
        }
        return;
    }

    const i32 n_k = work.k.fill(planes_k, 1), n_v = work.v.fill(planes_v, 0);
    sync_warp();
    if (n_k > 0 && attached) read_keys(u.p, t, n_k, m.words);
    else if (n_k > 0) refine_keys<S>(u.p, t, n_k);
    ROLLED
    for (i32 first = 0; first < u.heads; first += 4) {
        ROLLED
        for (i32 hh = 0; hh < 4; hh++) {
            const i32 h = first + hh;
            for (i32 i = 0; i < 4; i++) work.weights[hh][4 * lane() + i] = 0.0f;
            if (h >= u.heads) continue;
            const Scanned &scanned = u.scanned(t, h);
            const TileError error = error_of(scanned);
            Sums &sums = m.sums(warp(), h);
            float s[4], max = sums.max;
            const float before = sums.max;
            for (i32 i = 0; i < 4; i++) {
                s[i] = u.logit(u.scores(t, h)[4 * lane() + i], t, 4 * lane() + i, h);
                max = larger(max, s[i]);
            }
            max = warp_max(max);
            // Classes of K: a lane each.
            const i32 planes = lane() < PLANES ? lane() + 1 : 1;
            const bool known = attached && planes > 1;  // but for rounding
            const float bound = known ? error.bound_of_rows() : error.bound(planes), class_spread = spread_of(bound), class_square = known ? 0.0f : square_of(error.rms(planes));
            float most = 0.0f, sum = 0.0f, sum_vs = 0.0f, spread = 0.0f, spread_vs = 0.0f, value = 0.0f, square = 0.0f, rest = 0.0f;
            for (i32 p = 1; p <= PLANES; p++) {
                bool present = false;
                for (i32 i = 0; i < 4; i++) present |= (seen >> i & 1) && planes_k[i] == p;
                const float of_class = shuffle(bound, p - 1);
                if (any(present)) most = larger(most, of_class);
            }
            for (i32 i = 0; i < 4; i++) {
                const float grow = shuffle(class_spread, planes_k[i] - 1), rough = shuffle(class_square, planes_k[i] - 1);
                const float e = max == -infinity() ? 0.0f : exp(s[i] - max), x = e * scale_of(v_scales >> 8 * i & 255), l = attached && planes_v[i] > 0 ? 0.0f : left(planes_v[i]);
                sum += e, sum_vs += x;
                spread += e * grow, spread_vs += x * grow;
                value += x * l, square += x * x * (rough + l * l * (1.0f / 3.0f));
                if (planes_v[i] == 0) rest += e;
                work.weights[hh][4 * lane() + i] = attached ? e : x;
            }
            sum = warp_sum(sum), sum_vs = warp_sum(sum_vs), spread = warp_sum(spread), spread_vs = warp_sum(spread_vs);
            value = warp_sum(value), square = warp_sum(square), rest = warp_sum(rest);
            sync_warp();
            if (lane() == 0) {
                if (max > before) rescale(sums, max);
                sums.sum += sum;
                sums.weighted += double(sum_vs) * double(PEAK);
                sums.spread += spread;
                sums.spread_weighted += double(spread_vs) * double(PEAK);
                sums.value += double(value) + double(mean_peak) * double(rest);
                sums.square += square;
                sums.bound = larger(sums.bound, most);
                note(sums, n_seen, scanned.unit * PEAK);
                work.factors[hh] = float(factor_of(before, max)), work.unread[hh] = rest;
            }
        }
        sync_warp();
        Values values(tile);
        if (!attached) values.add(tile, work.v, n_v, work.weights);
        UNROLLED
        for (i32 hh = 0; hh < 4; hh++) {
            if (first + hh < u.heads) values.flush(tile, hh, m.outs(warp(), first + hh), work.factors[hh], work.unread[hh]);
        }
        if (attached) add_rows(u.p, t, n_v, first, m.words);
    }
}

// The rows that are kept as given, by the warp that has scanned them.
DEVICE_CALL void attend_exact(const AttendParams &p, Sums *of_heads, float *outs) {
    const Unit u(p);
    const Shape &s = p.shape;
    const i32 n = u.count_exact();
    for (i32 h = 0; h < u.heads; h++) {
        const Scanned &scanned = u.scanned(-1, h);
        const TileError error = error_of(scanned);
        float *out = outs + h * s.dim_v;
        for (i32 w = 0; w < 4; w++) {
            const u32 seen = u.seen_exact(w);
            for (i32 i = 0; i < 32; i++) {
                if (!(seen >> i & 1)) continue;
                const i32 row = 32 * w + i;
                const float e = exp(u.logit(u.scores(-1, h)[row], 0, row, h) - scanned.max);
                const u64 v = u.given_v(row);
                for (i32 c = lane(); c < s.dim_v; c += 32) out[c] = fma_rn(e, load_element(v, s.dtype_v, c), out[c]);
            }
        }
        if (lane() == 0) {
            Sums &sums = of_heads[h];
            sums.max = scanned.max;
            add_scores(sums, error.bound_of_rows(), 0.0f, scanned.e, scanned.e_vs, scanned.e_vs2);
            note(sums, n, scanned.unit * PEAK);
        }
    }
    sync_warp();
}

// The whole phase.
template <i32 S>
DEVICE void attend_split(const AttendParams &p) {
    const Unit u(p);
    const Memory m(u, S);
    const i32 dv = u.p.shape.dim_v;
    for (i32 h = warp(); h < u.heads; h += ATTEND_WARPS) {
        share_of(u.p, h, m.share(h));
    }
    ROLLED
    for (i32 h = 0; h < u.heads; h++) {
        if (lane() == 0) m.sums(warp(), h) = no_sums(-infinity());
        for (i32 c = lane(); c < dv; c += 32) m.outs(warp(), h)[c] = 0.0f;
    }
    sync_block();
    Counts counts = {};
    if (warp() == 0 && u.count_exact() > 0) {
        attend_exact(u.p, &m.sums(0, 0), m.outs(0, 0));
        counts.exact = u.count_exact();
    }
    ROLLED
    for (i32 t = u.first + warp(); t < u.last; t += ATTEND_WARPS) attend_tile<S>(u, m, t, counts);
    if (p.stats && lane() == 0) {
        Stats *stats = reinterpret_cast<Stats *>(p.stats);
        for (i32 i = 0; i <= PLANES; i++) {
            if (counts.k[i]) atomic_add(&stats->planes_k[i], u64(counts.k[i]));
            if (counts.v[i]) atomic_add(&stats->planes_v[i], u64(counts.v[i]));
        }
        if (counts.tokens) atomic_add(&stats->tokens, u64(counts.tokens));
        if (counts.exact) atomic_add(&stats->tokens_exact, u64(counts.exact));
        if (counts.tiles) atomic_add(&stats->tiles, u64(counts.tiles)), atomic_add(&stats->means, u64(counts.tiles));
        if (thread() == 0 && u.split == 0 && block_y() == 0) atomic_add(&stats->rows[PATH_PROGRESSIVE], u64(1));
    }
    sync_block();

    // The warps' sums in their order.
    for (i32 h = warp(); h < u.heads; h += ATTEND_WARPS) {
        Sums total = m.sums(0, h);
        for (i32 w = 1; w < ATTEND_WARPS; w++) merge(total, m.sums(w, h));
        float factor[ATTEND_WARPS];
        for (i32 w = 0; w < ATTEND_WARPS; w++) factor[w] = float(factor_of(m.sums(w, h).max, total.max));
        for (i32 c = lane(); c < dv; c += 32) {
            float x = 0.0f;
            for (i32 w = 0; w < ATTEND_WARPS; w++) x = fma_rn(factor[w], m.outs(w, h)[c], x);
            u.outs(u.split, h)[c] = x;
        }
        if (lane() == 0) u.sums(u.split, h) = total;
    }
    leave(u, m.flag());
}

}  // namespace akv
