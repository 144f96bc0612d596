// Decode attention: akv_scan and then akv_attend; contexts of one split by akv_attend alone (`fused`). Blocks are (split,
// KV head and unit, query row), all of ATTEND_THREADS.
//
// Instances are named by words of a digit row per lane: head_dim up to 32 times that.
#include "attend.cuh"

namespace akv {

#define INSTANCE(S, SCANS, ATTENDS)                                             \
    KERNEL(akv_scan_##S, ATTEND_THREADS, SCANS, AttendParams) {                 \
        const Unit u(p);                                                        \
        const Memory m(u, S);                                                   \
        if (u.split >= u.n_splits) return;                                      \
        m.q().load(u, m.heads);                                                 \
        sync_block();                                                           \
        scan_split<S>(p, m.q());                                                \
    }                                                                           \
    KERNEL(akv_attend_##S, ATTEND_THREADS, ATTENDS, AttendParams) {             \
        const Unit u(p);                                                        \
        const Memory m(u, S);                                                   \
        if (u.split >= u.n_splits) return;                                      \
        m.q().load(u, m.heads);                                                 \
        sync_block();                                                           \
        if (p.fused) {                                                          \
            scan_split<S>(p, m.q());                                            \
            sync_block();                                                       \
        }                                                                       \
        attend_split<S>(u, m);                                                  \
    }
INSTANCE(2, 4, 3)
INSTANCE(3, 4, 2)
INSTANCE(4, 3, 2)
INSTANCE(6, 2, 2)
INSTANCE(8, 2, 2)
#undef INSTANCE

}  // namespace akv
