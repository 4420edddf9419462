// exp, expm1, log and their relatives on vectors: float for every element, double for every row.
#pragma once

// ---------------------------------------------------------------- float, one call an element

// A temperature as the factor from similarities to powers of two: log2(e) / tau, in two parts.
struct Scale {
    float hi, lo;
    float lowest;   // below this, exp is taken there (2^-126): nothing underflows to a subnormal
    double inverse; // 1 / tau
};

static inline Scale make_scale(double tau) {
    const double exact = 1.4426950408889634074 / tau;
    Scale s;
    s.hi = static_cast<float>(exact);
    s.lo = static_cast<float>(exact - s.hi);
    s.lowest = static_cast<float>(-126.0 / exact);
    s.inverse = 1.0 / tau;
    return s;
}

typedef uint32_t lanes_u32 __attribute__((vector_size(4 * FASTOOD_WIDTH)));

struct Power {
    vf fraction;  // 2^f - 1, |f| <= 1/2, relative error 1.2e-8
    vf whole;     // 2^n
};

// y * log2(e) / tau = n + f. The product is exact before n is taken off (fma), so what is rounded
// is f alone.
static inline Power power_of_two(vf y, vf hi, vf lo) {
    const vf magic = all(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
    const vf t = fma(y, hi, magic);
    const vf n = t - magic;
    const vf f = fma(y, lo, fma(y, hi, -n));
    vf q = all(1.545316294e-4f);
    q = fma(q, f, all(1.339086336e-3f));
    q = fma(q, f, all(9.618082557e-3f));
    q = fma(q, f, all(5.550357114e-2f));
    q = fma(q, f, all(2.402265076e-1f));
    q = fma(q, f, all(6.931471880e-1f));
    // the low bits of t hold n: move them into the exponent
    const lanes_u32 bits = ((lanes_u32)t << 23) + (127u << 23);
    return {q * f, (vf)bits};
}

// exp(y / tau) for lowest <= y and y / tau <= 88.
static inline vf exp_scaled(vf y, vf hi, vf lo) {
    const Power p = power_of_two(y, hi, lo);
    return fma(p.fraction, p.whole, p.whole);
}

// log(x) for normal x > 0, relative error about 1e-7.
static inline vf log_positive(vf x) {
    const lanes_i32 bits = (lanes_i32)x;
    // split so that the mantissa lies in [sqrt(1/2), sqrt(2))
    const lanes_i32 e = (bits - 0x3f3504f3) >> 23;
    const vf m = (vf)(bits - (e << 23));
    const vf n = __builtin_convertvector(e, vf);
    const vf s = (m - all(1.0f)) / (m + all(1.0f));
    const vf s2 = s * s;
    vf p = all(2.0f / 9.0f);
    p = fma(p, s2, all(2.0f / 7.0f));
    p = fma(p, s2, all(2.0f / 5.0f));
    p = fma(p, s2, all(2.0f / 3.0f));
    const vf tail = s * s2 * p;
    return fma(n, all(0.693147182464599609375f), fma(n, all(-1.904654323148236e-9f), tail + s + s));
}

// ---------------------------------------------------------------- double, a few calls a row

static inline vd absolute(vd x) { return (vd)((lanes_i64)x & 0x7fffffffffffffffLL); }
static inline vd largest_of(vd a, vd b) { return select(a > b, a, b); }

// exp(x), relative error about 3e-16; below -700 it is 0, above 700 infinite.
static inline vd exp(vd x) {
    const vd clamped = select(x > all(700.0), all(700.0), select(x < all(-700.0), all(-700.0), x));
    const vd magic = all(6755399441055744.0);  // 1.5 * 2^52
    const vd t = fma(clamped, all(1.4426950408889634074), magic);
    const vd n = t - magic;
    vd f = fma(n, all(-6.93147180369123816490e-01), clamped);
    f = fma(n, all(-1.90821492927058770002e-10), f);
    vd p = all(1.0 / 479001600.0);
    const double c[] = {1.0 / 39916800, 1.0 / 3628800, 1.0 / 362880, 1.0 / 40320, 1.0 / 5040,
                        1.0 / 720,      1.0 / 120,     1.0 / 24,     1.0 / 6,     0.5, 1.0, 1.0};
    for (double coefficient : c) p = fma(p, f, all(coefficient));
    const vd y = p * (vd)(((lanes_i64)t << 52) + (1023LL << 52));
    return select(x < all(-700.0), vd{}, select(x > all(700.0), all((double)INFINITY), y));
}

// log(x) for normal x > 0; log(0) = -inf, log(inf) = inf.
static inline vd log(vd x) {
    const lanes_i64 bits = (lanes_i64)x;
    const lanes_i64 e = (bits - 0x3fe6a09e667f3bcdLL) >> 52;
    const vd m = (vd)(bits - (e << 52));
    const vd n = __builtin_convertvector(e, vd);
    const vd s = (m - all(1.0)) / (m + all(1.0));
    const vd s2 = s * s;
    vd p = all(2.0 / 21);
    for (int k = 19; k >= 3; k -= 2) p = fma(p, s2, all(2.0 / k));
    const vd tail = s * s2 * p;
    const vd y = fma(n, all(6.93147180369123816490e-01),
                     fma(n, all(1.90821492927058770002e-10), tail + s + s));
    return select(x <= vd{}, all(-(double)INFINITY),
                  select(x == all((double)INFINITY), all((double)INFINITY), y));
}

static inline vd log1p(vd x) {
    const vd u = all(1.0) + x;
    return log(u) + (x - (u - all(1.0))) / u;  // the second term is what rounding 1 + x lost
}

// log(1 + exp(x))
static inline vd softplus(vd x) {
    const lanes_i64 positive = x > vd{};
    return select(positive, x, vd{}) + log1p(exp(-absolute(x)));
}

// exp(x) - 1 for |x| <= 1, to the last digits also where x is small (Kahan's quotient).
static inline vd expm1(vd x) {
    const vd u = exp(x);
    const lanes_i64 one = u == all(1.0);
    return select(one, x, (u - all(1.0)) * x / log(select(one, all(2.0), u)));
}

// softplus(x) - softplus(y), to the last digits also where x is close to y; x = y + gap, and
// infinite arguments mean the difference is the gap.
static inline vd softplus_rise(vd x, vd y, vd gap) {
    const lanes_i64 beyond = absolute(x) > all(1e300), near = absolute(gap) <= all(1.0);
    const vd far = softplus(select(beyond, vd{}, x)) - softplus(select(beyond, vd{}, y));
    const vd share = all(1.0) / (all(1.0) + exp(-select(beyond, vd{}, y)));
    const vd close = log1p(share * expm1(select(near, gap, vd{})));
    return select(beyond, select(x > vd{}, gap, vd{}), select(near, close, far));
}
