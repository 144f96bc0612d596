// What attention is told of cells: masks, prepared once per graph, and which cells of its stream a query row sees.
#include "unit.cuh"

namespace akv {

// The lowest and the highest bit that is set.
DEVICE i32 lowest(u32 x) { return popc((x & (0 - x)) - 1); }
DEVICE i32 highest(u32 x) {
    for (u32 n = 1; n < 32; n *= 2) x |= x >> n;
    return popc(x) - 1;
}

// A thread per cell.
KERNEL(akv_mask, 128, 8, MaskParams) {
    constexpr u16 HIDDEN = 0xfc00;
    const i64 row = block_x() / u32(p.tiles), tile = block_x() % u32(p.tiles), at = row * p.tiles + tile;
    const i32 cell = i32(tile) * TILE + i32(thread());
    u32 *const peaks = shared<u32>();
    u16 x = HIDDEN;
    if (cell < p.n_kv) x = reinterpret_cast<const u16 *>(p.f16 + row * p.stride)[cell];
    const u16 size = x & 0x7fff;
    if (size > 0x7c00 || x == 0x7c00) {
        report_fault(p.fault, FAULT_NONFINITE, {0, p.first_row + row, 0, cell, FAULT_IN_MASK});
        x = HIDDEN;
    }
    const bool seen = x != HIDDEN;
    const u32 bits = ballot(seen);
    const float peak = warp_max(seen ? half_to_float(size) : 0.0f);
    if (lane() == 0) {
        reinterpret_cast<u32 *>(p.seen)[4 * at + warp()] = bits;
        peaks[warp()] = float_bits(peak);
    }
    sync_block();
    float most = 0.0f;
    for (i32 i = 0; i < 4; i++) most = larger(most, bits_float(peaks[i]));
    if (thread() == 0) reinterpret_cast<float *>(p.peak)[at] = most;
    reinterpret_cast<u16 *>(p.added)[at * TILE + thread()] = seen ? x : 0;
}

KERNEL(akv_spans, 128, 8, SpansParams) {
    const i32 row = block_x();
    i32 s = 0, before = 0;
    while (row - before >= p.spans[s].rows) before += p.spans[s++].rows;
    const Span span = p.spans[s];
    const i64 first_tile = i64(span.stream) * p.tiles;
    // What is lowest is the highest of what lies above.
    u32 *const sums = shared<u32>();
    if (thread() < 3) sums[thread()] = 0;
    sync_block();
    for (i32 tile = thread(); tile * TILE < span.n_kv; tile += 128) {
        for (i32 w = 0; w < 4; w++) {
            const i32 start = tile * TILE + 32 * w, left = span.n_kv - start;
            u32 bits = left >= 32 ? ~0u : left <= 0 ? 0 : (1u << left) - 1;
            bits &= reinterpret_cast<const u32 *>(p.written)[4 * (first_tile + tile) + w];
            if (p.seen) bits &= reinterpret_cast<const u32 *>(p.seen)[4 * (i64(row) * p.mask_tiles + tile) + w];
            if (bits == 0) continue;
            atomic_add(&sums[0], u32(popc(bits)));
            atomic_max(&sums[1], ~u32(start + lowest(bits)));
            atomic_max(&sums[2], u32(start + highest(bits) + 1));
        }
    }
    sync_block();
    if (thread() != 0) return;
    const bool none = sums[0] == 0;
    reinterpret_cast<QueryRow *>(p.rows)[row] = {p.first_span + s, none ? 0 : i32(~sums[1]), i32(sums[2]), i32(sums[0]), span.dense ? span.dense + row - before : 0, 0};
    if (row == before) {
        const u64 head = reinterpret_cast<const u64 *>(p.heads)[span.stream];
        const i32 n_exact = i32(reinterpret_cast<const u32 *>(p.n_exact)[span.stream]);
        reinterpret_cast<View *>(p.views)[s] = {p.pages + 8 * first_tile, head, head ? head + p.head_v : 0, p.written + 16 * first_tile, 0,
                                                span.stream * p.n_slots, span.n_kv, n_exact < span.n_kv ? n_exact : span.n_kv};
    }
}

}  // namespace akv
