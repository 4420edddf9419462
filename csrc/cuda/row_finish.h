// From the state of a row to its scores: the arithmetic of ../cpu/epilogue.h, one row at a time, in
// double precision so that the only rounding a score sees is the one to float32 at its end.
#pragma once

#include "row_state.h"

namespace fastood {

// The order of ../cpu/kernels.h and of fastood/ops/requests.py.
enum Kind : int32_t {
    kMaxSimilarity, kMaxLogit, kMaxSoftmax, kEnergy, kNegEntropy, kVariance, kMargin, kDeltaEnergy,
};

struct Request {
    int32_t kind;
    int32_t tau;   // which of the temperatures
    int32_t c;     // delta_energy: classes reset
    int32_t flag;  // energy: unit; margin: of probabilities; delta_energy: joint
    double reset;  // delta_energy
};

// The top values of a row of K classes, c of them, and its rest at one temperature.
struct Row {
    const Best* top;
    int32_t c;
    int64_t K;
    double inverse;  // 1 / tau
    double rest;     // log sum over all but the top c, in logits relative to the largest; -inf: none
};

FASTOOD_BOTH double log_rest(const Rest& rest, const Best* top, double inverse) {
    if (rest.z == 0) return -INFINITY;
    return (static_cast<double>(rest.shift) - top[0].value) * inverse + log(rest.z);
}

// (s(j) - s(i)) / tau
FASTOOD_BOTH double distance(const Row& row, int j, int i) {
    return (static_cast<double>(row.top[j].value) - row.top[i].value) * row.inverse;
}

// sum_k exp((s_k - s(1)) / tau)
FASTOOD_BOTH double partition(const Row& row) {
    double z = exp(row.rest) + 1;
    for (int j = 1; j < row.c; ++j) z += exp(distance(row, j, 0));
    return z;
}

FASTOOD_BOTH double log_of_sum(double a, double b) {  // log(exp(a) + exp(b)), -inf allowed
    const double high = a > b ? a : b;
    if (high == -INFINITY) return high;
    return high + log(exp(a - high) + exp(b - high));
}

FASTOOD_BOTH double softplus(double x) { return (x > 0 ? x : 0) + log1p(exp(-fabs(x))); }

// softplus(x) - softplus(y), to the last digits also where x is close to y; x = y + gap. Without
// any other class both are infinite, and the difference is the gap.
FASTOOD_BOTH double softplus_rise(double x, double y, double gap) {
    if (fabs(x) > 1e300) return x > 0 ? gap : 0;
    if (fabs(gap) > 1) return softplus(x) - softplus(y);
    return log1p(expm1(gap) / (1 + exp(-y)));
}

// softplus(own - others) - softplus(to - others), which is the gap where nothing else is left.
struct Rise {
    double own, to, gap;
};

// All c at once: their sum, what it is reset to, and log of the mean of exp(gap_j).
FASTOOD_BOTH Rise together(const Row& row, const Request& r) {
    const double to = (r.reset - row.top[0].value) * row.inverse + log(static_cast<double>(r.c));
    double z = 0, mean = 0, most = 0;
    for (int j = 0; j < r.c; ++j) {
        z += exp(distance(row, j, 0));
        const double gap = (row.top[j].value - r.reset) * row.inverse;
        most = fmax(most, fabs(gap));
        mean += expm1(fmin(fmax(gap, -1.0), 1.0));
    }
    const double own = log(z);
    return {own, to, most <= 1 ? log1p(mean / r.c) : own - to};
}

// log sum over every class but the j-th; `whole` is the sum over all.
FASTOOD_BOTH double log_of_others(const Row& row, int j, double rest, double whole, int c) {
    if (j > 0) return log(whole - exp(distance(row, j, 0)));  // at least 1, the largest, stays in
    if (c == 1) return rest;
    const double second = distance(row, 1, 0);  // next to the first the others may vanish
    double z = exp(rest - second) + 1;
    for (int i = 2; i < c; ++i) z += exp(distance(row, i, 1));
    return second + log(z);
}

FASTOOD_BOTH double delta_energy(const Row& row, const Request& r) {
    const double best = row.top[0].value;
    const bool joint = r.flag && r.c > 1;
    double rest = row.rest;
    // of the values held, those beyond c belong to the rest here
    for (int j = r.c; j < row.c; ++j) rest = log_of_sum(rest, distance(row, j, 0));
    double whole = exp(rest);
    for (int j = 0; j < r.c; ++j) whole += exp(distance(row, j, 0));
    double total = 0;
    for (int j = 0; j < (joint ? 1 : r.c); ++j) {
        Rise rise;
        double others = rest;
        if (joint) {
            rise = together(row, r);
        } else {
            rise.own = distance(row, j, 0);
            rise.to = (r.reset - best) * row.inverse;
            rise.gap = (row.top[j].value - r.reset) * row.inverse;
            others = log_of_others(row, j, rest, whole, r.c);
        }
        total += softplus_rise(rise.own - others, rise.to - others, rise.gap);
    }
    return total;
}

struct Moments {
    double neg_entropy, variance;
};

// log K - H and var p from the sums of the rest and the top values (methods of reference.py).
FASTOOD_BOTH Moments moments_of(const Rest& rest, const Best* top, int c, int64_t K,
                                double inverse) {
    const double k = static_cast<double>(K);
    const double best = top[0].value;
    if (rest.centred && (best - rest.shift) * inverse <= CENTRED_RANGE) {
        double y = rest.y, e = rest.e, ye = rest.ye, ee = rest.ee;
        for (int j = 0; j < c; ++j) {
            const double yj = (static_cast<double>(top[j].value) - rest.shift) * inverse;
            const double ej = expm1(yj);
            y += yj;
            e += ej;
            ye += yj * ej;
            ee += ej * ej;
        }
        const double m = e / k, one = 1 + m;
        return {(y / k + ye / k) / one - log1p(m), (ee / k - m * m) / (k * one * k * one)};
    }
    Rest all = moved(rest, top[0].value, inverse);
    for (int j = 0; j < c; ++j) {
        const double y = (static_cast<double>(top[j].value) - best) * inverse;
        const double p = exp(y);
        all.z += p;
        all.yp += y * p;
        all.pp += p * p;
    }
    return {log(k) - log(all.z) + all.yp / all.z, all.pp / (k * all.z * all.z) - 1 / (k * k)};
}

// One score of a row with c values held outside its rests; needs c >= r.c, and 2 for the margin.
// Each part is called in one place: on the device all of it is inlined.
FASTOOD_BOTH double score_of(const Request& r, const State& state, int c, int64_t K,
                             const double* taus) {
    const Rest& rest = state.rest[r.tau];
    const double tau = taus[r.tau], inverse = 1.0 / tau;
    const double best = state.top[0].value;
    if (r.kind == kMaxSimilarity) return best;
    if (r.kind == kMaxLogit) return best * inverse;
    if (r.kind == kMargin && !r.flag) return best - state.top[1].value;
    if (r.kind == kNegEntropy || r.kind == kVariance) {
        const Moments moments = moments_of(rest, state.top, c, K, inverse);
        return r.kind == kNegEntropy ? moments.neg_entropy : moments.variance;
    }
    const Row row = {state.top, c, K, inverse, log_rest(rest, state.top, inverse)};
    if (r.kind == kDeltaEnergy) return delta_energy(row, r);
    const double z = partition(row);
    if (r.kind == kEnergy) return r.flag ? best * inverse + log(z) : best + tau * log(z);
    return (r.kind == kMargin ? -expm1(distance(row, 1, 0)) : 1.0) / z;
}

}  // namespace fastood
