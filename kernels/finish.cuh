// The end of attention: the last block of a unit merges its splits, in their order, and writes its outputs.
#pragma once
#include "unit.cuh"

namespace akv {

// Merges a unit's splits and writes its outputs.
DEVICE_CALL void finish(const AttendParams &p, i32 row_index) {
    const Unit u(p, row_index, 0);
    const i32 dv = p.shape.dim_v;
    for (i32 h = warp(); h < u.heads; h += ATTEND_WARPS) {
        const i32 head = u.first_head + h;
        const float sink = p.sinks ? reinterpret_cast<const float *>(p.sinks)[head] : -infinity();
        float max = sink;
        for (i32 s = lane(); s < u.n_splits; s += 32) max = larger(max, u.sums(s, h).max);
        max = warp_max(max);
        Sums total = no_sums(max);
        for (i32 s = lane(); s < u.n_splits; s += 32) merge(total, u.sums(s, h));
        UNROLLED
        for (i32 i = 0; i < 7; i++) (&total.sum)[i] = warp_sum((&total.sum)[i]);
        total.peak = warp_max(total.peak), total.bound = warp_max(total.bound);
        if (p.sinks) {
            // A token more, whose value is 0: nothing is known less well for it.
            total.sum += factor_of(sink, max), total.n += 1.0;
        }
        const u64 out = row_of(p.out, u.row_index, head);
        float peak = 0.0f;
        for (i32 start = 0; start < dv; start += 128) {
            double x[4] = {};
            for (i32 first = 0; first < u.n_splits; first += 32) {
                const i32 n = u.n_splits - first < 32 ? u.n_splits - first : 32;
                const double factor = i32(lane()) < n ? factor_of(u.sums(first + lane(), h).max, max) : 0.0;
                UNROLLED_BY(4)
                for (i32 s = 0; s < n; s++) {
                    const double f = shuffle(factor, s);
                    const float *from = u.outs(first + s, h) + start + lane();
                    UNROLLED
                    for (i32 i = 0; i < 4; i++) x[i] += start + i32(lane()) + 32 * i < dv ? f * double(from[32 * i]) : 0.0;
                }
            }
            for (i32 i = 0; i < 4; i++) {
                const i32 c = start + lane() + 32 * i;
                if (c >= dv) break;
                float y = total.sum > 0.0 ? float(x[i] / total.sum) : 0.0f;
                peak = magnitude(y) <= peak ? peak : magnitude(y);
                store_element(out, p.out.dtype, c, y);
            }
        }
        peak = warp_max(peak);
        if (!(peak <= (p.out.dtype == F16 ? 65519.0f : -LOWEST))) u.report(FAULT_OVERFLOW, FAULT_IN_OUT, h);
        if (lane() == 0) {
            Certificate c = certificate(total, peak);
            if (p.shape.format == FORMAT_PUBLISHED && !u.row.dense) c.bound = c.lse_bound = c.estimate = infinity();
            const i64 at = i64(u.row_index) * p.shape.n_q_heads + head;
            if (p.lse) reinterpret_cast<float *>(p.lse)[at] = c.lse;
            if (p.bound) reinterpret_cast<float *>(p.bound)[at] = c.bound;
            if (p.lse_bound) reinterpret_cast<float *>(p.lse_bound)[at] = c.lse_bound;
            if (p.estimate) reinterpret_cast<float *>(p.estimate)[at] = c.estimate;
            if (p.amplitude) reinterpret_cast<float *>(p.amplitude)[at] = c.amplitude;
        }
    }
}

// A block has written sums and outputs of `n` splits; `flag` is in shared memory. The last one of the unit merges.
DEVICE void leave(const Unit &u, u32 &flag, u32 n) {
    u32 *done = reinterpret_cast<u32 *>(u.p.done) + u.index;
    fence();
    sync_block();
    if (thread() == 0) flag = atomic_add(done, n) + n == u32(u.n_splits);
    sync_block();
    if (!flag) return;
    fence();
    finish(u.p, u.row_index);
    if (thread() == 0) *done = 0;
}

}  // namespace akv
