// Reads tokens back as attention sees them with all stored planes, or cells as they are known. Blocks are (token, KV head).
#include "unit.cuh"

namespace akv {

KERNEL(akv_dequantize, 64, 8, DequantizeParams) {
    const View &view = p.view;
    const Shape &s = p.shape;
    const i32 token = p.first + block_x(), head = block_y(), row = token % TILE;
    const bool exact = token < view.n_exact;
    const Tile tile(s, p.page ? p.page : reinterpret_cast<const u64 *>(view.pages)[token / TILE], head);
    auto has = [&](const u32(&cells)[4]) { return p.page != 0 && cells[row / 32] >> row % 32 & 1; };
    for (i32 which = 0; which < 2; which++) {
        const Rows &to = which == 0 ? p.k : p.v;
        if (to.data == 0) continue;
        const i32 dim = which == 0 ? s.dim_k : s.dim_v, dtype = which == 0 ? s.dtype_k : s.dtype_v, planes = which == 0 ? s.planes_k : s.planes_v;
        const u64 given = (which == 0 ? view.head_k : view.head_v) + (i64(token) * s.n_kv_heads + head) * dim * size_of_dtype(dtype);
        const u64 kept = p.kept + (which == 0 ? 0 : kept_offset(s, TILE)) + (i64(row) * s.n_kv_heads + head) * dim * size_of_dtype(dtype);
        const bool fresh = has(which == 0 ? p.fresh_k : p.fresh_v), blank = p.page != 0 && !has(which == 0 ? p.written_k : p.written_v);
        const float limit = to.dtype != F16 ? -LOWEST : p.clamps ? 65504.0f : 65519.0f;
        for (i32 c = thread(); c < dim; c += 64) {
            float x;
            if (blank) {
                x = 0.0f;
            } else if (exact || fresh) {
                x = load_element(exact ? given : kept, dtype, c);
            } else if (s.format != FORMAT_ALIGNED) {
                x = Given::page(s, reinterpret_cast<const u64 *>(view.pages)[token / TILE], head, which == 1, TILE).load(row, c);
            } else {
                const i32 half = dim / 2, j = c % half / 4, shift = 8 * (c % 4) + (c < half ? 0 : 4);
                u32 prefix = 0;
                for (i32 plane = 0; plane < planes; plane++) {
                    const u8 *word = which == 0 ? tile.k_word(row, plane, j) : tile.v_word(row, plane, j);
                    prefix = prefix << 4 | (*reinterpret_cast<const u32 *>(word) >> shift & 15);
                }
                x = mul_rn(decode(prefix, planes), scale_of(which == 0 ? tile.k_scales[c] : tile.v_scales[row]));
            }
            if (p.clamps) {
                x = x > limit ? limit : x < -limit ? -limit : x;
            } else if (!(magnitude(x) <= limit)) {
                report_fault(p.fault, FAULT_RANGE, {view.id, view.first + token, p.layer, head, which == 0 ? FAULT_IN_K : FAULT_IN_V});
            }
            store_element(row_of(to, block_x(), head), to.dtype, c, x);
        }
    }
}

}  // namespace akv
