// The kernels for AVX2, FMA and F16C.
#if defined(__x86_64__)
// Standard headers first: their inline functions must not be compiled for this instruction set.
#include <cmath>
#include <cstdint>
#include <cstring>

#include <immintrin.h>

#include "ebm_job.h"
#include "grouped_job.h"
#include "kernels.h"
#include "patch_job.h"
#include "patch_terms_job.h"

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c")
#endif

#define FASTOOD_ISA avx2
#define FASTOOD_AMX 0
#define FASTOOD_WIDTH 8
#include "isa.h"

#if defined(__clang__)
#pragma clang attribute pop
#endif

namespace fastood {

static bool supported() {
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
}

const Kernels kernels_avx2 = {
    "avx2",
    supported,
    avx2::unit_rows,
    avx2::pack_classes,
    nullptr,  // split
    avx2::spread_classes,
    avx2::rows_kernel,
    avx2::rows_backward_kernel,
    avx2::grouped_kernel,
    avx2::grouped_backward_kernel,
    avx2::patches_kernel,
    avx2::patch_terms_kernel,
    avx2::ebm_kernel,
};

}  // namespace fastood
#endif
