// Prototypes of cuSOLVER's batched eigensolver as cusolverDn.h has them, with its opaque types as
// pointers and its enumerations as integers.
#pragma once

#include <cstddef>
#include <cstdint>

namespace fastood::solver {

constexpr int32_t kVectors = 1;  // CUSOLVER_EIG_MODE_VECTOR
constexpr int32_t kLower = 0;    // CUBLAS_FILL_MODE_LOWER
constexpr int32_t kDouble = 1;   // CUDA_R_64F

using Create = int32_t (*)(void** handle);
using CreateParams = int32_t (*)(void** params);
using SetStream = int32_t (*)(void* handle, void* stream);
using BufferSize = int32_t (*)(void* handle, void* params, int32_t jobz, int32_t uplo, int64_t n,
                               int32_t type_a, const void* a, int64_t lda, int32_t type_w,
                               const void* w, int32_t compute, size_t* on_device, size_t* on_host,
                               int64_t batch);
using Solve = int32_t (*)(void* handle, void* params, int32_t jobz, int32_t uplo, int64_t n,
                          int32_t type_a, void* a, int64_t lda, int32_t type_w, void* w,
                          int32_t compute, void* on_device, size_t device_bytes, void* on_host,
                          size_t host_bytes, int* info, int64_t batch);

}  // namespace fastood::solver
