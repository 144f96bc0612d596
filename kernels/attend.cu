// Decode attention: akv_scan and then akv_attend; contexts of one split by akv_attend alone (`fused`). A block, of
// ATTEND_THREADS, takes several splits of a unit.
//
// Instances are named by words of a digit row per lane: head_dim up to 32 times that.
#include "attend.cuh"

namespace akv {

// A block's turns at the scan. What a turn is about is read anew: nothing of it stays in registers.
template <i32 S>
DEVICE void scan_splits(const AttendParams &p) {
    i32 turn, stride, n_splits;
    {
        const Unit u(p);
        turn = u.split, stride = u.stride(), n_splits = u.n_splits;
        if (turn >= stride || u.row.dense) return;
        Memory(u, S).q().load(u);
    }
    sync_block();
    u64 in_ring = 0;
    ROLLED
    for (; turn < n_splits; turn += stride) {
        const Unit u = Unit(anew(p)).in_turn(turn);
        scan_split<S>(u, turn + stride < n_splits ? u.split - stride : -1, in_ring);
    }
    wait<0>();  // for a tile that was asked for and turned out to be of another kind
}

// The same of the second phase.
template <i32 S>
DEVICE void attend_splits(const AttendParams &p) {
    {
        const Unit u(p);
        const Memory m(u, S);
        if (u.split >= u.stride() || u.row.dense) return;
        m.q().load(u);
        if (p.fused) {
            sync_block();
            u64 in_ring = 0;
            scan_split<S>(u, -1, in_ring);
            sync_block();
        }
        for (i32 h = warp(); h < u.heads; h += ATTEND_WARPS) share_of(u, h, m.share(h));
    }
    i32 n = 0;
    ROLLED
    for (i32 turn = block_z(), stride = Unit(p).stride(); turn < Unit(anew(p)).n_splits; turn += stride, n++) {
        const Unit u = Unit(anew(p)).in_turn(turn);
        attend_split<S>(u, Memory(u, S));
    }
    const Unit u(anew(p));
    leave(u, Memory(u, S).flag(), n);
}

#define INSTANCE(S, SCANS, ATTENDS)                                                              \
    KERNEL(akv_scan_##S, ATTEND_THREADS, SCANS, AttendParams) { scan_splits<S>(p); }             \
    KERNEL(akv_attend_##S, ATTEND_THREADS, ATTENDS, AttendParams) { attend_splits<S>(p); }
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000  // their compiler would spill
INSTANCE(2, 3, 2)
INSTANCE(3, 3, 2)
INSTANCE(4, 3, 2)
INSTANCE(6, 3, 2)
INSTANCE(8, 2, 2)
#elif defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900  // the same
INSTANCE(2, 4, 2)
INSTANCE(3, 4, 2)
INSTANCE(4, 4, 2)
INSTANCE(6, 3, 2)
INSTANCE(8, 3, 2)
#else
INSTANCE(2, 4, 3)
INSTANCE(3, 4, 3)
INSTANCE(4, 4, 3)
INSTANCE(6, 3, 2)
INSTANCE(8, 3, 2)
#endif
#undef INSTANCE

}  // namespace akv
