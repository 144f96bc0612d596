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
        if (begin(p, S)) scan_split<S>(p);                                     \
    }                                                                          \
    KERNEL(akv_attend_##S, ATTEND_THREADS, ATTENDS, AttendParams) {            \
        if (!begin(p, S)) return;                                              \
        if (p.fused) {                                                         \
            scan_split<S>(p);                                                  \
            sync_block();                                                      \
        }                                                                      \
        attend_split<S>(p);                                                    \
    }
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000  // their compiler would spill
INSTANCE(2, 4, 2)
INSTANCE(3, 3, 2)
INSTANCE(4, 4, 2)
INSTANCE(6, 3, 2)
INSTANCE(8, 3, 2)
#else
INSTANCE(2, 5, 3)
INSTANCE(3, 5, 3)
INSTANCE(4, 5, 3)
INSTANCE(6, 4, 3)
INSTANCE(8, 4, 2)
#endif
#undef INSTANCE

}  // namespace akv
