// Merges partial attention over disjoint parts of a context: src/backend/cpu/merge.rs. A block has a row of a head.
#include "unit.cuh"

namespace akv {

constexpr u32 MERGE_THREADS = 64;

DEVICE double said(u64 field, i64 at) { return field ? double(reinterpret_cast<const float *>(field)[at]) : double(infinity()); }
DEVICE double known(double x) { return x == x ? x : double(infinity()); }

KERNEL(akv_merge, MERGE_THREADS, 8, MergeParams) {
    const State (&states)[MAX_STATES] = p.states;
    float *all = shared<float>();  // the output, then what each warp has found
    float *found = all + MAX_DIM;
    const i64 at = block_x();
    const double nothing = -double(infinity());
    auto lse_of = [&](i32 i) { return double(reinterpret_cast<const float *>(states[i].lse)[at]); };
    double max = nothing, sum = 0.0, u = 0.0;
    for (i32 i = 0; i < p.n; i++) max = larger(max, lse_of(i));
    for (i32 i = 0; i < p.n && max > nothing; i++) sum += exp(lse_of(i) - max);
    for (i32 i = 0; i < p.n && max > nothing; i++) {
        if (lse_of(i) > nothing) u += exp(lse_of(i) - max) / sum * expm1(said(states[i].lse_bound, at));
    }
    // States may lie where the result goes: all are read before anything is written.
    for (i32 c = thread(); c < p.dim; c += MERGE_THREADS) {
        double x = 0.0;
        for (i32 i = 0; i < p.n && max > nothing; i++) {
            if (lse_of(i) > nothing) x += exp(lse_of(i) - max) / sum * double(reinterpret_cast<const float *>(states[i].out)[at * p.dim + c]);
        }
        all[c] = float(x);
    }
    sync_block();
    double bound = 0.0, hull = 0.0, square = 0.0, amplitude = 0.0, most = 0.0;
    for (i32 i = 0; i < p.n && max > nothing; i++) {
        if (!(lse_of(i) > nothing)) continue;
        float apart = 0.0f, size = 0.0f;
        for (i32 c = thread(); c < p.dim; c += MERGE_THREADS) {
            float x = reinterpret_cast<const float *>(states[i].out)[at * p.dim + c];
            apart = larger(apart, magnitude(x - all[c])), size = larger(size, magnitude(x));
        }
        apart = warp_max(apart), size = warp_max(size);
        if (lane() == 0) found[2 * warp()] = apart, found[2 * warp() + 1] = size;
        sync_block();
        apart = larger(found[0], found[2]), size = larger(found[1], found[3]);
        sync_block();
        const double w = exp(lse_of(i) - max) / sum, grow = expm1(said(states[i].lse_bound, at)), rounding = double(size) / (1 << 22);
        // The difference has been rounded.
        const double far = double(apart) * (1.0 + 1.2e-7), error = said(states[i].bound, at);
        bound += w * ((1.0 + grow) * (1.0 + u) * error + (grow * (1.0 + u) + u) * far + rounding);
        hull = larger(hull, error + far + rounding);
        square += w * said(states[i].estimate, at) * w * said(states[i].estimate, at);
        amplitude += w * said(states[i].amplitude, at);
        most = larger(most, said(states[i].lse_bound, at));
    }
    sync_block();
    for (i32 c = thread(); c < p.dim; c += MERGE_THREADS) reinterpret_cast<float *>(p.out.out)[at * p.dim + c] = all[c];
    if (thread() != 0) return;
    const double lse = max > nothing ? max + log(sum) : nothing, size = max > nothing ? (lse < 0 ? -lse : lse) : 0.0;
    auto up = [&](double x) { return max > nothing ? next_up(float(x * (1.0 + 1e-6))) : 0.0f; };
    auto least = [](double a, double b) { return a < b ? a : b; };
    auto put = [&](u64 to, float x) {
        if (to) reinterpret_cast<float *>(to)[at] = x;
    };
    put(p.out.lse, float(lse));
    put(p.out.bound, up(least(known(bound), hull)));
    put(p.out.lse_bound, up(least(known(log1p(u)), most) + size * 1.1920928955078125e-7));
    put(p.out.estimate, float(known(sqrt(square))));
    put(p.out.amplitude, float(known(amplitude)));
}

}  // namespace akv
