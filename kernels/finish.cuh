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
            const Certificate c = certificate(total, peak);
            const i64 at = i64(u.row_index) * p.shape.n_q_heads + head;
            if (p.lse) reinterpret_cast<float *>(p.lse)[at] = c.lse;
            if (p.bound) reinterpret_cast<float *>(p.bound)[at] = c.bound;
            if (p.lse_bound) reinterpret_cast<float *>(p.lse_bound)[at] = c.lse_bound;
            if (p.estimate) reinterpret_cast<float *>(p.estimate)[at] = c.estimate;
            if (p.amplitude) reinterpret_cast<float *>(p.amplitude)[at] = c.amplitude;
        }
    }
}

}  // namespace akv
