// What one pass over a row of similarities leaves behind, and how parts of a row are merged: the
// algebra of ../cpu/state.h, one value at a time, for the device and for the host (tests).
//
// The c largest values stay outside every sum: nothing here is obtained by taking a large part off
// a sum. When parts are merged, a value that falls out of the c largest joins the rest.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#ifdef __CUDACC__
#define FASTOOD_BOTH __host__ __device__ __forceinline__
#else
#define FASTOOD_BOTH inline
#endif

namespace fastood {

constexpr int MAX_TAUS = 16;
constexpr int MAX_TOPS = 16;
constexpr double CENTRED_RANGE = 20.0;
constexpr int32_t NO_INDEX = 0x7fffffff;  // of an empty place in a list

struct Best {
    float value;
    int32_t index;
};

// The order of a row: larger first, then lower index. Total, so any merge order gives one list.
FASTOOD_BOTH bool before(const Best& a, const Best& b) {
    return a.value > b.value || (a.value == b.value && a.index < b.index);
}

FASTOOD_BOTH Best nothing() { return {-INFINITY, NO_INDEX}; }

// The C largest of what was pushed, in order. Every loop unrolls: on the device the list is
// registers, so no index into it may depend on data.
template <int C>
struct Top {
    Best at[C];

    FASTOOD_BOTH void clear() {
#pragma unroll
        for (int j = 0; j < C; ++j) at[j] = nothing();
    }

    // What falls out is returned: the candidate itself, or the last of the list.
    FASTOOD_BOTH Best push(Best candidate) {
#pragma unroll
        for (int j = 0; j < C; ++j) {
            const bool first = before(candidate, at[j]);
            const Best kept = first ? candidate : at[j];
            candidate = first ? at[j] : candidate;
            at[j] = kept;
        }
        return candidate;
    }

    // Takes the first off.
    FASTOOD_BOTH void pop() {
#pragma unroll
        for (int j = 0; j + 1 < C; ++j) at[j] = at[j + 1];
        at[C - 1] = nothing();
    }

    // Entry j, or nothing for j outside of the list; j is the same for all threads of a warp.
    FASTOOD_BOTH Best get(int j) const {
        Best found = nothing();
#pragma unroll
        for (int i = 0; i < C; ++i)
            if (i == j) found = at[i];
        return found;
    }
};

// 1 / tau as the sums need it: exp(y / tau) = 2^(y * (hi + lo)).
struct Scale {
    float hi, lo;
    float lowest;    // below this, exp is taken there (2^-126): nothing becomes subnormal
    double inverse;  // 1 / tau
};

inline Scale make_scale(double tau) {
    const double exact = 1.4426950408889634074 / tau;
    Scale s;
    s.hi = static_cast<float>(exact);
    s.lo = static_cast<float>(exact - s.hi);
    s.lowest = static_cast<float>(-126.0 / exact);
    s.inverse = 1.0 / tau;
    return s;
}

struct Power {
    float exponent;  // f, |f| <= 1/2
    float whole;     // 2^n
};

// y * log2(e) / tau = n + f. The product is exact before n is taken off (fma), so what is rounded
// is f alone. y >= scale.lowest, and y / tau <= 88.
FASTOOD_BOTH Power power_of(float y, const Scale& scale) {
    const float n = rintf(y * scale.hi);
    const float f = fmaf(y, scale.lo, fmaf(y, scale.hi, -n));
    // n >= -126 but for the rounding of `lowest`
    const int32_t bits = (static_cast<int32_t>(n < -126.0f ? -126.0f : n) + 127) << 23;
    float whole;
#ifdef __CUDA_ARCH__
    whole = __int_as_float(bits);
#else
    std::memcpy(&whole, &bits, sizeof(whole));
#endif
    return {f, whole};
}

FASTOOD_BOTH float exp_of(float y, const Scale& scale) {
    const Power p = power_of(y, scale);
    return exp2f(p.exponent) * p.whole;
}

// exp(y / tau) - 1, to the last digits also where y is small; `p` receives exp(y / tau).
FASTOOD_BOTH float expm1_of(float y, const Scale& scale, float* p) {
    const Power power = power_of(y, scale);
    const float fraction = expm1f(power.exponent * 0.693147180559945f);
    *p = fmaf(fraction, power.whole, power.whole);
    return fmaf(fraction, power.whole, power.whole - 1.0f);
}

// Sums over the rest of a row at one temperature. With y = (s - shift) / tau, p = exp(y):
struct Rest {
    double z;                // sum p
    double n, y, e, ye, ee;  // centred: how many, sums of y, e, y e, e e
    double yp, pp;           // otherwise: sums of y p and p p
    float shift;             // the largest of the rest, or the row's centre if `centred`
    int32_t centred;         // every |y| <= 20 about the centre, where e = p - 1 keeps its digits
};

FASTOOD_BOTH Rest no_rest() { return {0, 0, 0, 0, 0, 0, 0, 0, 0.0f, 0}; }

// The same sums about another shift, no longer centred.
FASTOOD_BOTH Rest moved(const Rest& r, float shift, double inverse_tau) {
    Rest out = no_rest();
    out.shift = shift;
    if (r.z == 0) return out;
    const double by = (static_cast<double>(r.shift) - shift) * inverse_tau;
    const double f = exp(by);
    const double yp = r.centred ? r.ye + r.y : r.yp;
    const double pp = r.centred ? r.n + 2 * r.e + r.ee : r.pp;
    out.z = f * r.z;
    out.yp = f * (yp + by * r.z);
    out.pp = f * f * pp;
    return out;
}

// Adds one value that was held outside the sums.
FASTOOD_BOTH void join(Rest& r, float value, double inverse_tau) {
    if (r.centred) {
        const double y = (static_cast<double>(value) - r.shift) * inverse_tau;
        if (y <= CENTRED_RANGE && y >= -CENTRED_RANGE) {
            const double e = expm1(y);
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
    const double p = exp(y);
    r.z += p;
    r.yp += y * p;
    r.pp += p * p;
}

// Swapping a and b changes nothing, to the bit: a sum by a butterfly of shuffles relies on it.
FASTOOD_BOTH Rest merged(const Rest& a, const Rest& b, double inverse_tau) {
    if (b.z == 0) return a;
    if (a.z == 0) return b;
    if (a.centred && b.centred && a.shift == b.shift) {
        Rest out = a;
        out.z += b.z;
        out.n += b.n;
        out.y += b.y;
        out.e += b.e;
        out.ye += b.ye;
        out.ee += b.ee;
        return out;
    }
    const float shift = a.shift > b.shift ? a.shift : b.shift;
    Rest out = moved(a, shift, inverse_tau);
    const Rest other = moved(b, shift, inverse_tau);
    out.z += other.z;
    out.yp += other.yp;
    out.pp += other.pp;
    return out;
}

// Whether sums about the centre keep their digits: for values between lowest and highest.
FASTOOD_BOTH bool near_centre(float lowest, float highest, float centre, double inverse_tau) {
    return (static_cast<double>(highest) - centre) * inverse_tau <= CENTRED_RANGE &&
           (static_cast<double>(centre) - lowest) * inverse_tau <= CENTRED_RANGE;
}

// Lane sums in float, from at most a few dozen values, before they are added up in double.
struct Sums {
    float p, y, e, ye, ee;
};

FASTOOD_BOTH void clear(Sums& t) { t = {0, 0, 0, 0, 0}; }

// One value of a rest; y here is s - shift, not yet divided by tau.
template <bool CENTRED, bool MOMENTS>
FASTOOD_BOTH void add(Sums& t, float s, float shift, const Scale& scale) {
    const float y = fmaxf(s - shift, scale.lowest);
    if (CENTRED && MOMENTS) {
        float p;
        const float e = expm1_of(y, scale, &p);
        t.p += p;
        t.y += y;
        t.e += e;
        t.ye = fmaf(y, e, t.ye);
        t.ee = fmaf(e, e, t.ee);
    } else {
        const float p = exp_of(y, scale);
        t.p += p;
        if (MOMENTS) {
            t.ye = fmaf(y, p, t.ye);
            t.ee = fmaf(p, p, t.ee);
        }
    }
}

// Lane sums into a rest of the same shift; `n` values. The factor 1 / tau of y enters here.
template <bool CENTRED, bool MOMENTS>
FASTOOD_BOTH void collect(Rest& r, const Sums& t, double inverse_tau) {
    r.z += t.p;
    if (CENTRED && MOMENTS) {
        r.y += t.y * inverse_tau;
        r.e += t.e;
        r.ye += t.ye * inverse_tau;
        r.ee += t.ee;
    } else if (MOMENTS) {
        r.yp += t.ye * inverse_tau;
        r.pp += t.ee;
    }
}

// A row, or a part of one: as it lies in shared memory and between two launches.
struct State {
    Best top[MAX_TOPS];
    int32_t bad;  // a value was NaN or infinite
    int32_t unused;
    Rest rest[MAX_TAUS];
};

}  // namespace fastood
