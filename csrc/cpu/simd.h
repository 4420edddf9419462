// The vector type of one instruction set, and the few operations that operators do not cover.
//
// Included once per instruction set, inside its namespace and under its target pragma. Whatever is
// defined here and in the other headers of this folder must stay inside that namespace: a template
// of the standard library instantiated here would be compiled for this instruction set and could
// then be picked by the linker for everyone (SIGILL on a smaller machine).
#pragma once

#if FASTOOD_WIDTH == 16
using vf = __m512;
using vd = __m512d;
#elif FASTOOD_WIDTH == 8
using vf = __m256;
using vd = __m256d;
#else
typedef float vf __attribute__((vector_size(16)));
typedef double vd __attribute__((vector_size(16)));
#endif

constexpr int W = FASTOOD_WIDTH;  // floats in a vf
constexpr int WD = W / 2;         // doubles in a vd

typedef vf vf_unaligned __attribute__((aligned(4), may_alias));
typedef vd vd_unaligned __attribute__((aligned(8), may_alias));
typedef int32_t lanes_i32 __attribute__((vector_size(4 * FASTOOD_WIDTH)));
typedef int64_t lanes_i64 __attribute__((vector_size(4 * FASTOOD_WIDTH)));

static inline vf load(const float* p) { return *reinterpret_cast<const vf_unaligned*>(p); }
static inline void store(float* p, vf x) { *reinterpret_cast<vf_unaligned*>(p) = x; }
static inline vd load(const double* p) { return *reinterpret_cast<const vd_unaligned*>(p); }
static inline void store(double* p, vd x) { *reinterpret_cast<vd_unaligned*>(p) = x; }

// x - 0 is x for every x, so this is a broadcast; 0 + x would cost an addition (-0)
static inline vf all(float x) { return x - vf{}; }
static inline vd all(double x) { return x - vd{}; }

static inline vf fma(vf a, vf b, vf c) {
#if FASTOOD_WIDTH == 16
    return _mm512_fmadd_ps(a, b, c);
#elif FASTOOD_WIDTH == 8
    return _mm256_fmadd_ps(a, b, c);
#else
    return a * b + c;
#endif
}

static inline vd fma(vd a, vd b, vd c) {
#if FASTOOD_WIDTH == 16
    return _mm512_fmadd_pd(a, b, c);
#elif FASTOOD_WIDTH == 8
    return _mm256_fmadd_pd(a, b, c);
#else
    return a * b + c;
#endif
}

static inline vf larger(vf a, vf b) {
#if FASTOOD_WIDTH == 16
    return _mm512_max_ps(a, b);
#elif FASTOOD_WIDTH == 8
    return _mm256_max_ps(a, b);
#else
    return a > b ? a : b;
#endif
}

static inline vf smaller(vf a, vf b) {
#if FASTOOD_WIDTH == 16
    return _mm512_min_ps(a, b);
#elif FASTOOD_WIDTH == 8
    return _mm256_min_ps(a, b);
#else
    return a < b ? a : b;
#endif
}

// One bit a lane where a >= b.
static inline uint32_t at_least(vf a, vf b) {
#if FASTOOD_WIDTH == 16
    return _mm512_cmp_ps_mask(a, b, _CMP_GE_OQ);
#elif FASTOOD_WIDTH == 8
    return static_cast<uint32_t>(_mm256_movemask_ps(_mm256_cmp_ps(a, b, _CMP_GE_OQ)));
#else
    uint32_t bits = 0;
    for (int i = 0; i < W; ++i) bits |= static_cast<uint32_t>(a[i] >= b[i]) << i;
    return bits;
#endif
}

// Sums and extremes over the lanes, by halves: a fixed order.
#if FASTOOD_WIDTH == 16
static inline float sum(vf x) { return _mm512_reduce_add_ps(x); }
static inline float largest(vf x) { return _mm512_reduce_max_ps(x); }
static inline float smallest(vf x) { return _mm512_reduce_min_ps(x); }
#else
template <class F>
static inline float by_halves(vf x, F f) {
    float a[W];
    store(a, x);
    for (int half = W / 2; half > 0; half /= 2)
        for (int i = 0; i < half; ++i) a[i] = f(a[i], a[i + half]);
    return a[0];
}

static inline float sum(vf x) {
    return by_halves(x, [](float a, float b) { return a + b; });
}
static inline float largest(vf x) {
    return by_halves(x, [](float a, float b) { return a > b ? a : b; });
}
static inline float smallest(vf x) {
    return by_halves(x, [](float a, float b) { return a < b ? a : b; });
}
#endif

// Lane by lane choices for doubles (comparison masks of operators, without branches).
static inline vd select(lanes_i64 mask, vd yes, vd no) {
    return (vd)((mask & (lanes_i64)yes) | (~mask & (lanes_i64)no));
}
