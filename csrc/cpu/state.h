// What one pass over a row of similarities leaves behind, and how two parts of a row are merged.
//
// The c largest values stay outside every sum: nothing here is obtained by taking a large part off
// a sum. When parts are merged, a value that falls out of the c largest joins the rest.
#pragma once

// Sums over the rest of a row at one temperature. With y = (s - shift) / tau, p = exp(y):
struct Rest {
    double z = 0;          // sum p
    float shift = 0;       // the largest of the rest, or the row's centre if `centred`
    bool centred = false;  // every |y| <= 20 about the centre, where e = p - 1 keeps its digits
    double n = 0, y = 0, e = 0, ye = 0, ee = 0;  // centred: how many, sums of y, e, y e, e e
    double yp = 0, pp = 0;                       // otherwise: sums of y p and p p
};

constexpr double CENTRED_RANGE = 20.0;

// The same sums about another shift, no longer centred.
static inline Rest moved(const Rest& r, float shift, double inverse_tau) {
    Rest out;
    out.shift = shift;
    if (r.z == 0) return out;
    const double by = (static_cast<double>(r.shift) - shift) * inverse_tau;
    const double f = __builtin_exp(by);
    const double yp = r.centred ? r.ye + r.y : r.yp;
    const double pp = r.centred ? r.n + 2 * r.e + r.ee : r.pp;
    out.z = f * r.z;
    out.yp = f * (yp + by * r.z);
    out.pp = f * f * pp;
    return out;
}

// Adds one value that was held outside the sums.
static inline void join(Rest& r, float value, double inverse_tau) {
    if (r.centred) {
        const double y = (static_cast<double>(value) - r.shift) * inverse_tau;
        if (y <= CENTRED_RANGE && y >= -CENTRED_RANGE) {
            const double e = __builtin_expm1(y);
            r.n += 1;
            r.z += 1 + e;
            r.y += y;
            r.e += e;
            r.ye += y * e;
            r.ee += e * e;
            return;
        }
    }
    if (r.centred || r.z == 0 || value > r.shift)
        r = moved(r, r.z == 0 || value > r.shift ? value : r.shift, inverse_tau);
    const double y = (static_cast<double>(value) - r.shift) * inverse_tau;
    const double p = __builtin_exp(y);
    r.z += p;
    r.yp += y * p;
    r.pp += p * p;
}

static inline Rest merged(const Rest& a, const Rest& b, double inverse_tau) {
    if (a.z == 0) return b;
    if (b.z == 0) return a;
    Rest out = a;
    if (a.centred && b.centred && a.shift == b.shift) {
        out.z += b.z;
        out.n += b.n;
        out.y += b.y;
        out.e += b.e;
        out.ye += b.ye;
        out.ee += b.ee;
        return out;
    }
    const float shift = a.shift > b.shift ? a.shift : b.shift;
    out = moved(a, shift, inverse_tau);
    const Rest other = moved(b, shift, inverse_tau);
    out.z += other.z;
    out.yp += other.yp;
    out.pp += other.pp;
    return out;
}

alignas(64) static const int32_t kLaneNumbers[16] = {0, 1, 2,  3,  4,  5,  6,  7,
                                                     8, 9, 10, 11, 12, 13, 14, 15};

// All bits set in the first n lanes.
static inline lanes_i32 first_lanes(int64_t n) {
    lanes_i32 numbers;
    std::memcpy(&numbers, kLaneNumbers, sizeof(numbers));
    return numbers < static_cast<int32_t>(n < W ? n : W);
}

template <bool MASK>
static inline vf keep(vf x, lanes_i32 mask) {
    return MASK ? (vf)((lanes_i32)x & mask) : x;
}

struct Sums {
    vf p, y, e, ye, ee;
};

// One vector of a rest: y is s - shift, not yet divided by tau.
template <bool CENTRED, bool MOMENTS, bool MASK>
static inline void add_lane(Sums& t, vf s, vf shift, const Scale& scale, vf hi, vf lo,
                            lanes_i32 mask) {
    const vf y = keep<MASK>(larger(s - shift, all(scale.lowest)), mask);
    if (CENTRED && MOMENTS) {
        const Power power = power_of_two(y, hi, lo);
        const vf p = keep<MASK>(fma(power.fraction, power.whole, power.whole), mask);
        const vf e = fma(power.fraction, power.whole, power.whole - all(1.0f));
        t.p = t.p + p;
        t.y = t.y + y;
        t.e = t.e + e;
        t.ye = fma(y, e, t.ye);
        t.ee = fma(e, e, t.ee);
    } else {
        const vf p = keep<MASK>(exp_scaled(y, hi, lo), mask);
        t.p = t.p + p;
        if (MOMENTS) {
            t.ye = fma(y, p, t.ye);
            t.ee = fma(p, p, t.ee);
        }
    }
}

// The sums over s[0:n] at one temperature.
template <bool CENTRED, bool MOMENTS>
static Rest sums_of(const float* s, int64_t n, float shift, const Scale& scale) {
    const vf hi = all(scale.hi), lo = all(scale.lo), at = all(shift);
    const lanes_i32 every = ~lanes_i32{};
    Sums a{}, b{};
    int64_t i = 0;
    for (; i + 2 * W <= n; i += 2 * W) {
        add_lane<CENTRED, MOMENTS, false>(a, load(s + i), at, scale, hi, lo, every);
        add_lane<CENTRED, MOMENTS, false>(b, load(s + i + W), at, scale, hi, lo, every);
    }
    for (; i < n; i += W) {  // s is readable up to a multiple of W
        add_lane<CENTRED, MOMENTS, true>(a, load(s + i), at, scale, hi, lo, first_lanes(n - i));
    }
    Rest r;
    r.shift = shift;
    r.centred = CENTRED;
    r.z = sum(a.p + b.p);
    if (CENTRED && MOMENTS) {
        r.n = static_cast<double>(n);
        r.y = sum(a.y + b.y) * scale.inverse;
        r.e = sum(a.e + b.e);
        r.ye = sum(a.ye + b.ye) * scale.inverse;
        r.ee = sum(a.ee + b.ee);
    } else if (MOMENTS) {
        r.yp = sum(a.ye + b.ye) * scale.inverse;
        r.pp = sum(a.ee + b.ee);
    }
    return r;
}
