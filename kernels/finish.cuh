// The end of attention: the last block of a unit merges its splits, in their order, and writes its outputs.
#pragma once
#include "unit.cuh"

namespace akv {

// Merges a unit's splits and writes its outputs.
DEVICE_CALL void finish(const AttendParams &p, i32 row_index) {
    const Unit u(p, row_index);
    const i32 dv = p.shape.dim_v;
    for (i32 h = warp(); h < u.heads; h += ATTEND_WARPS) {
        const i32 head = u.first_head + h;
        Sums total = no_sums(-infinity());
        for (i32 s = 0; s < u.n_splits; s++) merge(total, u.sums(s, h));
        if (p.sinks) {
            // A token more, whose value is 0: nothing is known less well for it.
            Sums sink = no_sums(reinterpret_cast<const float *>(p.sinks)[head]);
            sink.sum = sink.n = 1.0;
            merge(total, sink);
        }
        const u64 out = row_of(p.out, u.row_index, head);
        float peak = 0.0f;
        for (i32 c = lane(); c < dv; c += 32) {
            double x = 0.0;
            for (i32 s = 0; s < u.n_splits; s++) x += factor_of(u.sums(s, h).max, total.max) * double(u.outs(s, h)[c]);
            float y = total.sum > 0.0 ? float(x / total.sum) : 0.0f;
            peak = magnitude(y) <= peak ? peak : magnitude(y);
            store_element(out, p.out.dtype, c, y);
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

// A block has written its split's sums and outputs; `flag` is in shared memory. The last one of the unit merges.
DEVICE void leave(const Unit &u, u32 &flag) {
    u32 *done = reinterpret_cast<u32 *>(u.p.done) + u.index;
    fence();
    sync_block();
    if (thread() == 0) flag = atomic_add(done, 1u) + 1 == u32(u.n_splits);
    sync_block();
    if (!flag) return;
    fence();
    finish(u.p, u.row_index);
    if (thread() == 0) *done = 0;
}

}  // namespace akv
