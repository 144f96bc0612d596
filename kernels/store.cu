// Appends rows to pages that lose nothing. A block has the rows of one tile and KV head.
#include "alignment.cuh"

namespace akv {

constexpr u32 STORE_THREADS = 256;

KERNEL(akv_store, STORE_THREADS, 4, EncodeParams) {
    const Append a = reinterpret_cast<const Append *>(p.appends)[block_x()];
    if (a.to == 0) return;
    const i32 head = block_y();
    for (i32 which = 0; which < 2; which++) {
        const Rows &rows = which == 0 ? p.k : p.v;
        const Given to = Given::page(p.shape, a.page, head, which == 1, TILE);
        const i32 half = to.dim / 2;
        for (i32 at = thread(); at < (a.to - a.from) * half; at += STORE_THREADS) {
            const i32 row = a.from + at / half, c = at % half;
            const u64 from = row_of(rows, a.source + row - a.from, head);
            u32 x[2];
            for (i32 i = 0; i < 2; i++) {
                x[i] = load_bits(from, rows.dtype, c + i * half);
                if (magnitude(load_element(from, rows.dtype, c + i * half)) < infinity()) continue;
                report_fault(p.fault, FAULT_NONFINITE, {a.id, i64(a.tile) * TILE + row, p.layer, head, u32(which == 0 ? FAULT_IN_K : FAULT_IN_V)});
                x[i] = 0;
            }
            to.store(row, c, x[0], x[1]);
        }
    }
}

}  // namespace akv
