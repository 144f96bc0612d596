// Decode attention: akv_scan and then akv_attend; contexts of one split by akv_attend alone (`fused`). Blocks are (split,
// KV head and unit, query row), all of ATTEND_THREADS.
//
// Instances are named by words of a digit row per lane: head_dim up to 32 times that.
#include "attend.cuh"

namespace akv {

// Loads q, and says whether there is anything to do.
DEVICE bool begin(const AttendParams &p, i32 words) {
    const Unit u(p);
    const Memory m(u, words);
    if (u.split >= u.n_splits || u.row.dense) return false;
    m.q().load(u, m.heads);
    sync_block();
    return true;
}

#define INSTANCE(S, SCANS, ATTENDS)                                            \
    KERNEL(akv_scan_##S, ATTEND_THREADS, SCANS, AttendParams) {                \
        if (begin(p, S)) scan_split<S>(p, 32 * S + 4);                         \
    }                                                                          \
    KERNEL(akv_attend_##S, ATTEND_THREADS, ATTENDS, AttendParams) {            \
        if (!begin(p, S)) return;                                              \
        if (p.fused) {                                                         \
            scan_split<S>(p, 32 * S + 4);                                      \
            sync_block();                                                      \
        }                                                                      \
        attend_split<S>(p);                                                    \
    }
INSTANCE(2, 3, 3)
INSTANCE(3, 3, 2)
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000  // their compiler would spill
INSTANCE(4, 2, 2)
#else
INSTANCE(4, 3, 2)
#endif
INSTANCE(6, 2, 2)
INSTANCE(8, 2, 2)
#undef INSTANCE

}  // namespace akv
