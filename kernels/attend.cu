// Decode attention: akv_scan and then akv_attend; contexts of one split by akv_attend alone (`fused`). Blocks are (split,
// KV head and unit, query row), all of ATTEND_THREADS.
//
// Instances are named by words of a digit row per lane (head_dim up to 32 times that) and by four query heads.
#include "attend.cuh"

namespace akv {

#define INSTANCE(S, NT, BLOCKS)                                                                                                     \
    KERNEL(akv_scan_##S##_##NT, ATTEND_THREADS, BLOCKS, AttendParams) {                                                             \
        const Unit u(p);                                                                                                            \
        const Memory<S, NT> m{shared<u8>(), p.shape.dim_v};                                                                         \
        if (u.split >= u.n_splits) return;                                                                                          \
        m.q().load(u, 4 * NT);                                                                                                      \
        sync_block();                                                                                                               \
        scan_split<S, NT>(u, m.q());                                                                                                \
    }                                                                                                                               \
    KERNEL(akv_attend_##S##_##NT, ATTEND_THREADS, BLOCKS, AttendParams) {                                                           \
        const Unit u(p);                                                                                                            \
        const Memory<S, NT> m{shared<u8>(), p.shape.dim_v};                                                                         \
        if (u.split >= u.n_splits) return;                                                                                          \
        m.q().load(u, 4 * NT);                                                                                                      \
        sync_block();                                                                                                               \
        if (p.fused) {                                                                                                              \
            scan_split<S, NT>(u, m.q());                                                                                            \
            sync_block();                                                                                                           \
        }                                                                                                                           \
        attend_split<S, NT>(u, m);                                                                                                  \
    }
#define INSTANCES(S) INSTANCE(S, 1, 3) INSTANCE(S, 2, 2) INSTANCE(S, 4, 2)
INSTANCES(2)
INSTANCES(3)
INSTANCES(4)
INSTANCES(6)
INSTANCES(8)
#undef INSTANCES
#undef INSTANCE

}  // namespace akv
