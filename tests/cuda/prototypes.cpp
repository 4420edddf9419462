// Compiles only if the prototypes that are called agree with those of cuSOLVER's own header:
// enumerations as integers of their size, opaque types as pointers.
#include <cusolverDn.h>

#include <type_traits>

#include "eigen.h"

template <class Ours, class Theirs>
constexpr bool passes() {
    if (std::is_pointer_v<Ours> || std::is_pointer_v<Theirs>)
        return std::is_pointer_v<Ours> && std::is_pointer_v<Theirs>;
    return sizeof(Ours) == sizeof(Theirs) && !std::is_floating_point_v<Theirs>;
}

template <class R, class... A, class S, class... B>
constexpr bool agree(R (*)(A...), S (*)(B...)) {
    if constexpr (sizeof...(A) == sizeof...(B))
        return passes<R, S>() && (passes<A, B>() && ...);
    else
        return false;
}

using namespace fastood::solver;
static_assert(agree(Create{}, &cusolverDnCreate));
static_assert(agree(CreateParams{}, &cusolverDnCreateParams));
static_assert(agree(SetStream{}, &cusolverDnSetStream));
static_assert(agree(BufferSize{}, &cusolverDnXsyevBatched_bufferSize));
static_assert(agree(Solve{}, &cusolverDnXsyevBatched));
static_assert(!agree(Create{}, &cusolverDnSetStream));
static_assert(kVectors == CUSOLVER_EIG_MODE_VECTOR && kLower == CUBLAS_FILL_MODE_LOWER &&
              kDouble == CUDA_R_64F);
