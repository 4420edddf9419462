// From the state of rows to their scores: arithmetic on a few numbers a row, WD rows at a time, in
// double precision so that the only rounding a score sees is the one to float32 at its end.
#pragma once

// WD rows at one temperature. Everything is relative to the largest similarity, in logits.
struct Lane {
    vd rest;                  // log sum over all but the top c
    vd neg_entropy, variance; // if moments were asked for
};

struct Tops {
    const vd* values;  // [c] similarities
    int64_t c;
};

// exp((values[j] - values[i]) / tau)
static inline vd ratio(const Tops& t, int64_t j, int64_t i, double inverse) {
    return exp((t.values[j] - t.values[i]) * all(inverse));
}

// sum_k exp((s_k - s(1)) / tau)
static inline vd partition(const Tops& t, vd rest, double inverse) {
    vd z = exp(rest) + all(1.0);
    for (int64_t j = 1; j < t.c; ++j) z = z + ratio(t, j, 0, inverse);
    return z;
}

static inline vd log_of_sum(vd a, vd b) {  // log(exp(a) + exp(b)), -inf allowed
    const vd high = largest_of(a, b);
    const vd safe = select(high == all(-(double)INFINITY), vd{}, high);
    return safe + log(exp(a - safe) + exp(b - safe));
}

// log of the mean of exp((values[j] - reset) / tau): `far` unless all of them are small.
static vd joint_gap(const Tops& t, int64_t c, double inverse, double reset, vd far) {
    vd mean{}, most{};
    for (int64_t j = 0; j < c; ++j) {
        const vd gap = (t.values[j] - all(reset)) * all(inverse);
        most = largest_of(most, absolute(gap));
        mean = mean + expm1(select(absolute(gap) <= all(1.0), gap, vd{}));
    }
    return select(most <= all(1.0), log1p(mean * all(1.0 / static_cast<double>(c))), far);
}

static vd delta_energy(const Tops& t, vd rest, double inverse, const Request& r, bool none_left) {
    const int64_t c = r.c;
    // of the values held, those beyond c belong to the rest here
    for (int64_t j = c; j < t.c; ++j)
        rest = log_of_sum(rest, (t.values[j] - t.values[0]) * all(inverse));
    none_left = none_left && c == t.c;
    const vd best = t.values[0];
    const vd reset = (all(r.reset) - best) * all(inverse);
    if (r.flag && c > 1) {
        vd z{};
        for (int64_t j = 0; j < c; ++j) z = z + ratio(t, j, 0, inverse);
        const vd together = log(z);
        const vd to = reset + all(__builtin_log(static_cast<double>(c)));
        const vd gap = joint_gap(t, c, inverse, r.reset, together - to);
        if (none_left) return gap;
        return softplus_rise(together - rest, to - rest, gap);
    }
    vd whole = exp(rest);  // sum of all
    for (int64_t j = 0; j < c; ++j) whole = whole + ratio(t, j, 0, inverse);
    vd total{};
    for (int64_t j = 0; j < c; ++j) {
        const vd own = (t.values[j] - best) * all(inverse);
        const vd gap = (t.values[j] - all(r.reset)) * all(inverse);
        vd others;  // log sum over every class but the j-th
        if (j == 0) {
            others = rest;
            if (c > 1) {  // relative to the second: next to the first the others may vanish
                const vd second = (t.values[1] - best) * all(inverse);
                vd z = exp(rest - second) + all(1.0);
                for (int64_t i = 2; i < c; ++i) z = z + ratio(t, i, 1, inverse);
                others = second + log(z);
            } else if (none_left) {
                return gap;
            }
        } else {
            others = log(whole - exp(own));  // at least 1, the largest, stays in
        }
        total = total + softplus_rise(own - others, reset - others, gap);
    }
    return total;
}

static vd score_of(const Request& r, const Tops& t, const Lane* lanes, const double* taus,
                   bool none_left) {
    const double tau = taus[r.tau], inverse = 1.0 / tau;
    const Lane& lane = lanes[r.tau];
    switch (r.score) {
        case Score::kMaxSimilarity:
            return t.values[0];
        case Score::kMaxLogit:
            return t.values[0] * all(inverse);
        case Score::kMaxSoftmax:
            return all(1.0) / partition(t, lane.rest, inverse);
        case Score::kEnergy: {
            const vd log_z = log(partition(t, lane.rest, inverse));
            return r.flag ? t.values[0] * all(inverse) + log_z : t.values[0] + all(tau) * log_z;
        }
        case Score::kNegEntropy:
            return lane.neg_entropy;
        case Score::kVariance:
            return lane.variance;
        case Score::kMargin: {
            if (!r.flag) return t.values[0] - t.values[1];
            const vd gap = (t.values[1] - t.values[0]) * all(inverse);
            const vd close = gap * (all(1.0) + gap * all(0.5) * (all(1.0) + gap * all(1.0 / 3)));
            const vd loss = select(gap > all(-1e-4), close, exp(gap) - all(1.0));
            return -loss / partition(t, lane.rest, inverse);
        }
        case Score::kDeltaEnergy:
            return delta_energy(t, lane.rest, inverse, r, none_left);
    }
    return vd{};
}

// log K - H and var p from the sums of the rest and the top values (methods of reference.py).
static void moments_of(const Rest& rest, const Best* tops, int64_t c, int64_t K, double inverse,
                       double* neg_entropy, double* variance) {
    const double k = static_cast<double>(K);
    const double best = tops[0].value;
    if (rest.centred && (best - rest.shift) * inverse <= CENTRED_RANGE) {
        double y = rest.y, e = rest.e, ye = rest.ye, ee = rest.ee;
        for (int64_t j = 0; j < c; ++j) {
            const double yj = (static_cast<double>(tops[j].value) - rest.shift) * inverse;
            const double ej = __builtin_expm1(yj);
            y += yj;
            e += ej;
            ye += yj * ej;
            ee += ej * ej;
        }
        const double m = e / k, one = 1 + m;
        *neg_entropy = (y / k + ye / k) / one - __builtin_log1p(m);
        *variance = (ee / k - m * m) / (k * one * k * one);
        return;
    }
    Rest all_of_it = moved(rest, tops[0].value, inverse);
    for (int64_t j = 0; j < c; ++j) {
        const double y = (static_cast<double>(tops[j].value) - best) * inverse;
        const double p = __builtin_exp(y);
        all_of_it.z += p;
        all_of_it.yp += y * p;
        all_of_it.pp += p * p;
    }
    const double z = all_of_it.z;
    *neg_entropy = __builtin_log(k) - __builtin_log(z) + all_of_it.yp / z;
    *variance = all_of_it.pp / (k * z * z) - 1 / (k * k);
}
