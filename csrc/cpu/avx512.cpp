// The kernels for AVX-512 F, BW, DQ, VL, and for AMX beside it.
#if defined(__x86_64__)
// Standard headers first: their inline functions must not be compiled for this instruction set.
#include <cmath>
#include <cstdint>
#include <cstring>

#if !defined(__clang__)
// GCC 12 sees some in immintrin.h itself
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#endif
#include <cpuid.h>
#include <immintrin.h>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include "ebm_job.h"
#include "grouped_job.h"
#include "kernels.h"
#include "patch_job.h"
#include "patch_terms_job.h"

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,fma,f16c"))), apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,fma,f16c")
#endif

#define FASTOOD_ISA avx512
#if defined(__clang__) ? __clang_major__ >= 12 : __GNUC__ >= 11
#define FASTOOD_AMX 1
#else
#define FASTOOD_AMX 0  // the compiler does not know the unit
#endif
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
    avx512::unit_rows,
    avx512::pack_classes,
    nullptr,  // split
    avx512::spread_classes,
    avx512::rows_kernel,
    avx512::rows_backward_kernel,
    avx512::grouped_kernel,
    avx512::grouped_backward_kernel,
    avx512::patches_kernel,
    avx512::patch_terms_kernel,
    avx512::ebm_kernel,
};

#if FASTOOD_AMX
// AMX: the same, but the products of row scores, which go through the matrix unit.

static bool amx_supported() {
    unsigned eax, ebx, ecx, edx;
    if (!supported() || !__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx)) return false;
    constexpr unsigned kBFloat16Tiles = 1u << 22, kTiles = 1u << 24;
    if ((edx & kBFloat16Tiles) == 0 || (edx & kTiles) == 0) return false;
#if defined(__linux__)
    // Linux keeps the tiles' 8 kB a thread from processes that have not asked for them.
    constexpr int kRequestPermission = 0x1023, kTileData = 18;
    return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
    return false;
#endif
}

const Kernels kernels_amx = {
    "amx",
    amx_supported,
    avx512::unit_rows,
    avx512::pack_classes,
    avx512::split_classes,
    avx512::spread_classes,
    avx512::rows_kernel,
    avx512::rows_backward_kernel,
    avx512::grouped_kernel,
    avx512::grouped_backward_kernel,
    avx512::patches_kernel,
    avx512::patch_terms_kernel,
    avx512::ebm_kernel,
};
#else
static bool amx_supported() { return false; }

const Kernels kernels_amx = {"amx", amx_supported};
#endif

}  // namespace fastood
#endif
