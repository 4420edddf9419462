// The kernels for AVX-512 F, BW, DQ, VL.
#if defined(__x86_64__)
// Standard headers first: their inline functions must not be compiled for this instruction set.
#include <cmath>
#include <cstdint>
#include <cstring>

#if !defined(__clang__)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // GCC 12 sees some in immintrin.h itself
#endif
#include <immintrin.h>

#include "ebm_job.h"
#include "grouped_job.h"
#include "kernels.h"
#include "patch_job.h"

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,fma,f16c"))), apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,fma,f16c")
#endif

#define FASTOOD_ISA avx512
#define FASTOOD_WIDTH 16
#include "isa.h"

#if defined(__clang__)
#pragma clang attribute pop
#endif

namespace fastood {

static bool supported() {
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}

const Kernels kernels_avx512 = {
    "avx512",
    supported,
    avx512::pack_classes,
    avx512::spread_classes,
    avx512::rows_kernel,
    avx512::rows_backward_kernel,
    avx512::grouped_kernel,
    avx512::grouped_backward_kernel,
    avx512::patches_kernel,
    avx512::ebm_kernel,
};

}  // namespace fastood
#endif
