// Pieces of work of decode attention: a unit is one query row on up to 16 query heads of one KV head, a split eight tiles
// of its context. A block has a split; its warps take turns at the tiles.
#pragma once
#include "alignment.cuh"

namespace akv {

constexpr i32 SPLIT = 8;         // tiles; the same on every machine, since results depend on it
constexpr i32 UNIT_HEADS = 16;   // larger groups are several units, which decide apart
constexpr i32 ATTEND_THREADS = 128, ATTEND_WARPS = ATTEND_THREADS / 32;

// A score after the soft cap, and with what a mask adds.
DEVICE float capped(float score, float cap) {
    const float e = exp2_fast(-2.0f * LOG2_E * inverse_fast(cap) * magnitude(score)), y = (1.0f - e) * inverse_fast(1.0f + e) * cap;
    return score == -infinity() ? score : score < 0.0f ? -y : y;
}
DEVICE float bent(float score, float cap, u64 added, float slope) {
    if (cap > 0.0f) score = capped(score, cap);
    if (added && score > -infinity()) score += slope * half_to_float(*reinterpret_cast<const u16 *>(added));
    return score;
}

struct Unit {
    const AttendParams &p;
    QueryRow row;
    View view;
    i32 index, row_index, split, kv_head, first_head, heads, unit_heads;  // heads of this unit, and of the workspace
    i32 first, last, n_splits;                                            // tiles of the split, splits of the unit

    // Blocks are (unit, query row, split): neighbours begin with the same splits of other units.
    DEVICE explicit Unit(const AttendParams &p) : Unit(p, block_y(), block_z()) {}
    DEVICE Unit(const AttendParams &p, i32 row_index, i32 split) : p(p), row_index(row_index), split(split) {
        const Shape &s = p.shape;
        i32 group = s.n_q_heads / s.n_kv_heads, units = (group + UNIT_HEADS - 1) / UNIT_HEADS;
        kv_head = block_x() / units;
        i32 part = block_x() % units;
        unit_heads = group < UNIT_HEADS ? group : UNIT_HEADS;
        first_head = kv_head * group + part * UNIT_HEADS;
        heads = group - part * UNIT_HEADS < UNIT_HEADS ? group - part * UNIT_HEADS : UNIT_HEADS;
        index = index_of(row_index);
        row = reinterpret_cast<const QueryRow *>(p.rows)[row_index];
        view = reinterpret_cast<const View *>(p.views)[row.sequence < 0 ? 0 : row.sequence];
        n_splits = splits_of(row);
        go_to(split);
    }
    DEVICE void go_to(i32 to) {
        i32 tiles = (row.to + TILE - 1) / TILE;
        split = to;
        first = split * SPLIT > row.from / TILE ? split * SPLIT : row.from / TILE;
        last = (split + 1) * SPLIT < tiles ? (split + 1) * SPLIT : tiles;
    }
    // A split's tile i, or -1.
    DEVICE i32 in_split(i32 split, i32 i) const {
        Unit u = *this;
        u.go_to(split);
        return u.first + i < u.last ? u.first + i : -1;
    }
    // The unit's blocks, as few as take as many turns. Splits go backwards, as what is recent takes longest.
    DEVICE i32 stride() const {
        const i32 turns = (n_splits + p.blocks - 1) / p.blocks;
        return (n_splits + turns - 1) / (turns > 0 ? turns : 1);
    }
    DEVICE Unit in_turn(i32 turn) const {
        Unit u = *this;
        u.go_to(n_splits - 1 - turn);
        return u;
    }

    // Rows that the engine keeps itself: the pages are an index beside them, and finer digits are those of whole rows.
    DEVICE bool attached() const { return p.attached_k.data != 0; }
    // Rows as given, of the exact head or the engine's own.
    DEVICE u64 given_k(i32 token) const {
        if (attached()) return row_of(p.attached_k, view.first + token, kv_head);
        return view.head_k + (i64(token) * p.shape.n_kv_heads + kv_head) * p.shape.dim_k * size_of_dtype(p.shape.dtype_k);
    }
    DEVICE u64 given_v(i32 token) const {
        if (attached()) return row_of(p.attached_v, view.first + token, kv_head);
        return view.head_v + (i64(token) * p.shape.n_kv_heads + kv_head) * p.shape.dim_v * size_of_dtype(p.shape.dtype_v);
    }

    DEVICE i32 index_of(i32 row_index) const {
        const i32 group = p.shape.n_q_heads / p.shape.n_kv_heads;
        return row_index * p.shape.n_kv_heads * ((group + UNIT_HEADS - 1) / UNIT_HEADS) + block_x();
    }
    DEVICE static i32 splits_of(const QueryRow &row) {
        i32 splits = (row.to + SPLIT * TILE - 1) / (SPLIT * TILE);
        return row.sequence < 0 ? 0 : splits > 1 ? splits : 1;
    }
    DEVICE u64 page(i32 t) const { return reinterpret_cast<const u64 *>(view.pages)[t]; }
    DEVICE Tile tile(i32 t) const { return Tile(p.shape, page(t), kv_head); }
    // Rows of a tile that are no digits: those that are kept as given (`exact`), the engine's own, or a page that loses nothing.
    DEVICE Given given(i32 t, bool exact, bool values) const {
        const Shape &s = p.shape;
        const i32 n = exact ? view.n_exact : attached() ? TILE : view.len - t * TILE, most = n < TILE ? n : TILE;
        if (!exact && !attached()) return Given::page(s, page(t), kv_head, values, most);
        const i32 dim = values ? s.dim_v : s.dim_k, dtype = values ? s.dtype_v : s.dtype_k;
        const i64 stride = attached() ? (values ? p.attached_v : p.attached_k).stride_row : i64(s.n_kv_heads) * dim * size_of_dtype(dtype);
        const u64 written = view.written ? view.written + 16 * t : 0;
        return {values ? given_v(t * TILE) : given_k(t * TILE), written, stride, dtype, dim, most, false};
    }
    DEVICE Given given(i32 t, bool values) const { return given(t, false, values); }
    DEVICE float *scores(i32 t, i32 head) const {  // t = -1: of the exact rows
        return reinterpret_cast<float *>(p.scores) + ((i64(index) * (p.max_tiles + 1) + t + 1) * unit_heads + head) * TILE;
    }
    DEVICE Scanned &scanned(i32 t, i32 head) const {
        return reinterpret_cast<Scanned *>(p.scanned)[(i64(index) * (p.max_tiles + 1) + t + 1) * unit_heads + head];
    }
    DEVICE i64 of_split(i32 split, i32 head) const { return of_split(index, split, head); }
    DEVICE i64 of_split(i32 index, i32 split, i32 head) const { return (i64(index) * ((p.max_tiles + SPLIT - 1) / SPLIT) + split) * unit_heads + head; }
    DEVICE Partial &partial(i32 split, i32 head) const { return reinterpret_cast<Partial *>(p.partials)[of_split(split, head)]; }
    DEVICE Sums &sums(i32 split, i32 head) const { return reinterpret_cast<Sums *>(p.sums)[of_split(split, head)]; }
    DEVICE float *outs(i32 split, i32 head) const { return reinterpret_cast<float *>(p.outs) + of_split(split, head) * p.shape.dim_v; }

    // Tokens 32 w.. of a tile that the row sees, as bits.
    DEVICE u32 seen(i32 t, i32 w) const { return seen(row, row_index, t, w); }
    DEVICE u32 seen(const QueryRow &row, i32 row_index, i32 t, i32 w) const {
        i32 start = t * TILE + 32 * w, from = row.from - start, to = row.to - start;
        u32 bits = to >= 32 ? ~0u : to <= 0 ? 0 : (1u << to) - 1;
        bits &= from >= 32 ? 0 : from <= 0 ? ~0u : ~((1u << from) - 1);
        if (view.written) bits &= reinterpret_cast<const u32 *>(view.written)[4 * t + w];
        if (p.mask_seen) bits &= reinterpret_cast<const u32 *>(p.mask_seen)[4 * (i64(row_index) * p.mask_tiles + t) + w];
        return bits;
    }
    DEVICE u32 exact_bits(i32 w) const {
        i32 n = view.n_exact - 32 * w;
        return n >= 32 ? ~0u : n <= 0 ? 0 : (1u << n) - 1;
    }
    // Those that attend through pages, and through rows as given.
    DEVICE u32 seen_paged(i32 t, i32 w) const { return t == 0 ? seen(t, w) & ~exact_bits(w) : seen(t, w); }
    // True if all tokens of a tile do.
    DEVICE bool sees_all(i32 t) const {
        if (row.from > t * TILE || row.to < (t + 1) * TILE || (t == 0 && view.n_exact > 0)) return false;
        return !(view.written || p.mask_seen) || (seen(t, 0) & seen(t, 1) & seen(t, 2) & seen(t, 3)) == ~0u;
    }
    DEVICE u32 seen_exact(i32 w) const { return split == 0 && view.n_exact > 0 ? seen(0, w) & exact_bits(w) : 0; }
    DEVICE i32 count_paged(i32 t) const { return popc(seen_paged(t, 0)) + popc(seen_paged(t, 1)) + popc(seen_paged(t, 2)) + popc(seen_paged(t, 3)); }
    DEVICE i32 count_exact() const { return popc(seen_exact(0)) + popc(seen_exact(1)) + popc(seen_exact(2)) + popc(seen_exact(3)); }

    DEVICE float slope(i32 head) const { return p.slopes ? reinterpret_cast<const float *>(p.slopes)[first_head + head] : 1.0f; }

    // True if the softmax may see other scores than K and q give, and if it does in a tile.
    DEVICE bool bends() const { return p.softcap != 0.0f || p.mask_added != 0; }
    DEVICE bool bends(i32 t) const {
        return p.softcap != 0.0f || (p.mask_added && reinterpret_cast<const float *>(p.mask_peak)[i64(row_index) * p.mask_tiles + t] > 0.0f);
    }
    // What the softmax sees of the score of a token: capped, and with what the mask adds.
    DEVICE float logit(float score, i32 t, i32 token, i32 head) const { return logit(score, row_index, t, token, head); }
    DEVICE float logit(float score, i32 row_index, i32 t, i32 token, i32 head) const {
        if (!bends()) return score;
        const u64 added = p.mask_added ? p.mask_added + 2 * ((i64(row_index) * p.mask_tiles + t) * TILE + token) : 0;
        return bent(score, p.softcap, added, slope(head));
    }
    // What that adds to the error of a score that is at most `reach`.
    DEVICE float bend(i32 t, i32 head, float reach) const { return bend(row_index, t, head, reach); }
    DEVICE float bend(i32 row_index, i32 t, i32 head, float reach) const {
        float error = p.softcap * 1e-6f;
        if (p.mask_added) {
            float peak = reinterpret_cast<const float *>(p.mask_peak)[i64(row_index) * p.mask_tiles + t];
            if (peak > 0.0f) error += 1.1920929e-7f * (2.0f * magnitude(peak * slope(head)) + reach);
        }
        return error;
    }
    DEVICE void check(float reach, float max) const {
        if (!(reach < infinity()) || max == infinity()) report(FAULT_OVERFLOW, FAULT_IN_OUT, 0);
    }
    DEVICE void report(u32 status, u32 where, i32 head) const { report(status, where, row_index, head); }
    DEVICE void report(u32 status, u32 where, i32 row_index, i32 head) const {
        report_fault(p.fault, status, {view.id, p.first_row + row_index, p.layer, first_head + head, where});
    }
};

// A layer's q, times the softmax scale, in shared memory, as lanes fold it: [head][word of a lane][low, high nibbles][lane of
// a quad][4 channels], zeros where there are none.
struct Queries {
    float *q;
    i32 words;  // of a digit row per lane

    DEVICE void load(const Unit &u) const {
        const i32 d = u.p.shape.dim_k, heads = (u.unit_heads + 3) / 4 * 4;
        for (i32 at = thread(); at < 32 * words * heads; at += ATTEND_THREADS) {
            const i32 h = at / (32 * words), s = at / 32 % words, high = at / 16 % 2, t = at / 4 % 4, c = 4 * (words * t + s) + at % 4;
            float x = 0.0f;
            if (h < u.heads && c < d / 2) x = load_element(row_of(u.p.q, u.row_index, u.first_head + h), u.p.q.dtype, c + high * (d / 2));
            if (!(magnitude(x) < infinity())) {
                u.report(FAULT_NONFINITE, FAULT_IN_Q, h);
                x = 0.0f;
            }
            q[at] = x * u.p.scale;
        }
    }
    // A lane's channels of the low or the high nibbles: four of every 32.
    DEVICE const float *part(i32 head, i32 high, i32 t) const { return q + 32 * words * head + 16 * high + 4 * t; }
    // What lies behind, aligned as it is.
    DEVICE float *end(i32 heads) const { return q + 32 * words * heads; }
    DEVICE float channel(i32 head, i32 c, i32 half) const {
        const i32 high = c >= half, i = high ? c - half : c, j = i / 4;
        return part(head, high, j / words)[j % words * 32 + i % 4];
    }
};

DEVICE float warp_max(float x) {
    for (u32 mask = 16; mask > 0; mask /= 2) x = larger(x, shuffle_xor(x, mask));
    return x;
}
DEVICE float warp_sum(float x) {
    for (u32 mask = 16; mask > 0; mask /= 2) x += shuffle_xor(x, mask);
    return x;
}
DEVICE double warp_sum(double x) {
    for (u32 mask = 16; mask > 0; mask /= 2) x += shuffle_xor(x, mask);
    return x;
}

}  // namespace akv
