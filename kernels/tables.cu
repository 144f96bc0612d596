// Small kernels around attention: what is written into tables on the device, and what a call read.
#include "format.cuh"

namespace akv {

KERNEL(akv_poke, 256, 1, PokeParams) {
    const u64 i = u64(block_x()) * 256 + thread();
    if (i >= p.n) return;
    const Poke poke = reinterpret_cast<const Poke *>(p.pokes)[i];
    *reinterpret_cast<u64 *>(poke.address) = poke.value;
}

// The formulas of src/backend/cpu: digits, scale bytes (the tile's meta data with K's, its mean with V's), rows as given. A
// shape without planes of V is that of an index: whoever reads more than that reads rows of the engine's own.
KERNEL(akv_report, 32, 1, ReportParams) {
    if (thread() != 0) return;
    Stats &stats = *reinterpret_cast<Stats *>(p.stats);
    const Shape &s = p.shape;
    const u64 row_k = u64(s.dim_k) * size_of_dtype(s.dtype_k), row_v = u64(s.dim_v) * size_of_dtype(s.dtype_v);
    u64 in_digits = 0;
    for (i32 planes = 0; planes <= PLANES; planes++) in_digits += stats.planes_k[planes];
    const u64 scales_k = stats.tiles * u64(s.dim_k + META_BYTES), scales_v = in_digits + stats.means * u64(s.dim_v);
    Report r = {};
    r.bytes_exact = stats.tokens_exact * (row_k + row_v);
    r.bytes_scales = scales_k + scales_v;
    r.bytes_k = scales_k + (stats.tokens_exact + stats.tokens_attached) * row_k + stats.bytes_k;
    r.bytes_v = scales_v + (stats.tokens_exact + stats.tokens_attached) * row_v + stats.bytes_v;
    const bool attached = s.planes_v == 0;
    for (i32 planes = 0; planes <= PLANES; planes++) {
        r.planes_k[planes] = stats.planes_k[planes];
        r.planes_v[planes] = stats.planes_v[planes];
        r.bytes_k += stats.planes_k[planes] * (attached && planes > 1 ? s.dim_k / 2 + row_k : planes * (s.dim_k / 2));
        r.bytes_v += stats.planes_v[planes] * (attached && planes > 0 ? row_v : planes * (s.dim_v / 2));
    }
    r.tokens = stats.tokens + stats.tokens_exact + stats.tokens_attached;
    r.dense_rows = stats.rows[PATH_DENSE];
    r.backend = p.backend;
    for (i32 path = 0; path < 3; path++) r.path |= stats.rows[path] ? 1 << path : 0;
    *reinterpret_cast<Report *>(p.to) = r;
    stats = Stats{};
}

}  // namespace akv
