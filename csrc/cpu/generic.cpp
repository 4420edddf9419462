// The kernels for the compiler's baseline: SSE2 on x86-64, NEON on ARM.
// Standard headers first: their inline functions must not be compiled for this instruction set.
#include <cmath>
#include <cstdint>
#include <cstring>

#include "ebm_job.h"
#include "grouped_job.h"
#include "kernels.h"
#include "patch_job.h"
#include "patch_terms_job.h"

#define FASTOOD_ISA generic
#define FASTOOD_AMX 0
#define FASTOOD_WIDTH 4
#include "isa.h"

namespace fastood {

static bool supported() {
    return true;
}

const Kernels kernels_generic = {
    "generic",
    supported,
    generic::unit_rows,
    generic::pack_classes,
    nullptr,  // split
    generic::spread_classes,
    generic::rows_kernel,
    generic::rows_backward_kernel,
    generic::grouped_kernel,
    generic::grouped_backward_kernel,
    generic::patches_kernel,
    generic::patch_terms_kernel,
    generic::ebm_kernel,
};

}  // namespace fastood
