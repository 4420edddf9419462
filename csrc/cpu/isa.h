// Everything of one instruction set, in its namespace. See generic.cpp, avx2.cpp, avx512.cpp.

namespace fastood {
namespace FASTOOD_ISA {

#include "simd.h"
#include "math.h"
#include "gemm.h"
#include "pack.h"
#if FASTOOD_AMX
#include "amx.h"
#endif
#include "left.h"
#include "top.h"
#include "state.h"
#include "epilogue.h"
#include "rows.h"
#include "backward.h"
#include "grouped.h"
#include "grouped_backward.h"
#include "patches.h"
#include "patch_terms.h"
#include "ebm.h"

}  // namespace FASTOOD_ISA
}  // namespace fastood
