// Who is read how finely, and what that leaves uncertain: src/alignment, whose comments derive every formula.
#pragma once
#include "format.cuh"

namespace akv {

// What one score of a tile is uncertain by, for one query head.
struct TileError {
    float worst, rough, q_worst, q_rms, slack, bend;

    DEVICE float bound(i32 planes) const { return worst * (left(planes) + slack) + q_worst + bend; }
    DEVICE float rms(i32 planes) const {
        float left_out = rough * (left(planes) * 0.5773503f);
        return sqrt_fast(left_out * left_out + q_rms * q_rms);
    }
    // Of a score from K as the caller has it.
    DEVICE float bound_of_rows() const { return worst * slack + bend; }
};

DEVICE TileError error_of(const Scanned &s) { return {s.worst, s.rough, s.q_worst, s.q_rms, s.slack, s.bend}; }

// Float rounding of a score, in units of `worst`.
DEVICE float score_rounding(i32 dim) { return float(dim / 8 + 16) * (5.9604645e-8f * PEAK); }

// Every token's share of the allowed error, for one query head.
struct Share {
    float scaled, amplitude, max;
    i32 mode;

    DEVICE static Share of(i32 mode, float tolerance, i32 n, float max, double sum, double weighted) {
        double parts = mode == MODE_GUARANTEED ? 2.0 * n : sqrt(2.0 * n);
        return {float(double(tolerance) * weighted / parts), float(weighted / sum), max, mode};
    }
    DEVICE float slack(const TileError &e) const {
        float s = mode == MODE_GUARANTEED ? e.bound(1) : 2.0f * e.rms(1), most = mode == MODE_GUARANTEED ? 40.0f : 5.0f;
        return s < most ? s : most;
    }
    DEVICE float error_k(const TileError &e, i32 planes) const {
        return mode == MODE_GUARANTEED ? e.worst * (left(planes) * PEAK) : e.rough * (PEAK / 2.0f) * (left(planes) * 0.5773503f);
    }
    DEVICE float error_v(i32 planes) const { return mode == MODE_GUARANTEED ? left(planes) : left(planes) * 0.5773503f; }
    DEVICE float offset_k() const { return mode == MODE_GUARANTEED ? amplitude / PEAK : 0.0f; }
    DEVICE float offset_v(float mean) const { return mode == MODE_GUARANTEED ? mean / PEAK : 0.0f; }

    // False if no token of a tile reads more than the scan has.
    DEVICE bool any(const TileError &e, float mean, float score, float unit) const {
        float k = offset_k(), v = offset_v(mean);
        float most = exp(score - max + slack(e)) * (unit + (k > v ? k : v));
        float by_k = error_k(e, 1), by_v = error_v(0);
        return !(most * (by_k > by_v ? by_k : by_v) <= scaled);
    }
};

// A token with weight e and V scale vs reads the planes whose thresholds its products exceed: e * (vs + offset_k) * by_k for
// K; e * vs * by_v for V, and e * (vs + offset_v) * by_v whether there is any. Over several heads the largest products count.
struct Thresholds {
    float by_k, by_v;  // such that a product of 1 is the second plane's threshold

    DEVICE Thresholds(const Share &share, const TileError &e) {
        const float scaled = share.scaled * exp(-share.slack(e));
        by_k = share.error_k(e, 1) * inverse_fast(scaled), by_v = share.error_v(1) * inverse_fast(scaled);
    }
    DEVICE static i32 planes_k(float x) { return 1 + (x > 1.0f) + (x > left(1) / left(2)) + (x > left(1) / left(3)); }
    DEVICE static i32 planes_v(float x, float any) {
        return (any > left(1) / left(0)) + (x > 1.0f) + (x > left(1) / left(2)) + (x > left(1) / left(3));
    }
};

constexpr float LOG2_E = 1.442695041f;
constexpr double LOOSE = 60.0;  // score errors beyond this are not summed: the hull says more
constexpr float LOWEST = -3.402823466e38f;

DEVICE float infinity() { return bits_float(0x7f800000); }
DEVICE double larger(double a, double b) { return a > b ? a : b; }
DEVICE float larger(float a, float b) { return a > b ? a : b; }

DEVICE_CALL double grow_of(double x) { return expm1(x); }

DEVICE Sums no_sums(float max) {
    Sums s = {};
    s.max = max;
    return s;
}

// Adds tokens whose scores are all known alike.
DEVICE void add_scores(Sums &s, float bound, float rms, double e, double e_vs, double e_vs2) {
    double grow = grow_of(bound < float(LOOSE) ? double(bound) : LOOSE), half = double(rms) * double(PEAK) / 2.0;
    s.sum += e;
    s.weighted += e_vs * double(PEAK);
    s.spread += grow * e;
    s.spread_weighted += grow * e_vs * double(PEAK);
    s.square += e_vs2 * half * half;
    s.bound = larger(s.bound, bound);
}
// Adds to the same tokens that their values are off by at most left * V scale + offset.
DEVICE void add_values(Sums &s, float left, float offset, double e, double e_vs, double e_vs2) {
    double rms = double(left) * 0.5773503;
    s.value += double(left) * e_vs + double(offset) * e;
    s.square += e_vs2 * rms * rms;
}
DEVICE void note(Sums &s, i32 n, float peak) {
    s.n += n;
    s.peak = larger(s.peak, peak);
}

// What sums relative to exp(from) are multiplied with to be relative to exp(to).
DEVICE_CALL double factor_of(float from, float to) { return from == -infinity() ? 0.0 : exp(double(from) - double(to)); }

// Makes sums relative to another maximum.
DEVICE void rescale(Sums &s, float max) {
    double f = factor_of(s.max, max);
    s.sum *= f;
    s.weighted *= f;
    s.spread *= f;
    s.spread_weighted *= f;
    s.value *= f;
    s.square *= f * f;
    s.max = max;
}
// Takes in the sums of other tokens.
DEVICE_CALL void merge(Sums &s, const Sums &other) {
    double f = factor_of(other.max, other.max > s.max ? other.max : s.max);
    if (other.max > s.max) rescale(s, other.max);
    s.sum += f * other.sum;
    s.weighted += f * other.weighted;
    s.spread += f * other.spread;
    s.spread_weighted += f * other.spread_weighted;
    s.value += f * other.value;
    s.square += f * f * other.square;
    s.n += other.n;
    s.peak = larger(s.peak, other.peak);
    s.bound = larger(s.bound, other.bound);
}

struct Certificate {
    float lse, bound, lse_bound, estimate, amplitude;
};

DEVICE float next_up(float x) { return x < infinity() ? bits_float(float_bits(x) + 1) : x; }  // of x >= 0

// The result for one query head; out_peak = largest |channel| of the output.
DEVICE_CALL Certificate certificate(const Sums &s, float out_peak) {
    if (s.sum == 0.0) return {-infinity(), 0.0f, 0.0f, 0.0f, 0.0f};
    constexpr double ROUNDING = 301.0 / (1 << 24), FLUSHED = 2e-38;
    double lse = double(s.max) + log(s.sum);
    double peak = double(s.peak) * (1.0 + ROUNDING) + 1.1754943508222875e-38;
    double hull = peak + double(out_peak), bound = hull, lse_bound = s.bound;
    if (!(s.bound > float(LOOSE))) {
        // What binary32 has flushed is at most another token of which nothing is known.
        Sums all = s;
        double lost = s.n * FLUSHED, lost_weighted = lost * (1.0 + peak) / double(PEAK);
        add_scores(all, s.bound, 0.0f, lost, lost_weighted, 0.0);
        add_values(all, PEAK, s.peak, lost, lost_weighted, 0.0);
        double u = all.spread / all.sum, amplitude = all.weighted / all.sum;
        double scores = (1.0 + u) * all.spread_weighted / all.sum + u * amplitude;
        double sum = scores + all.value / all.sum + ROUNDING * amplitude;
        bound = sum < hull ? sum : hull;
        double most = log1p(u);
        lse_bound = most < double(s.bound) ? most : double(s.bound);
    }
    double estimate = sqrt(s.square) / s.sum, size = lse < 0 ? -lse : lse;
    return {float(lse), next_up(float(bound * (1.0 + 1e-4))), next_up(float((lse_bound + ROUNDING + size * 1.1920928955078125e-7) * (1.0 + 1e-4))),
            float(estimate < bound ? estimate : bound), float(s.weighted / s.sum)};
}

}  // namespace akv
