// Between tensors and the plain structures of cpu/kernels.h: checks, threads, faults.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <c10/util/Exception.h>

#include <cstdlib>
#include <string>
#include <string_view>
#include <vector>

#include "../cpu/kernels.h"
#include "../parallel.h"

namespace fastood {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

// The kernels in use: the widest this machine has, or what was chosen with `choose`.
const Kernels& kernels();
Pool pool();

// The argument is for GPUs: products are float32 here.
inline void check_precision(std::string_view precision) {
    TORCH_CHECK_VALUE(precision.empty() || precision == "fp32", "precision: '", precision,
                      "' is for the kernels of a GPU; the CPU computes in float32");
}

inline Type type_of(const char* name, const Tensor& x) {
    switch (x.scalar_type()) {
        case at::kFloat:
            return Type::kFloat;
        case at::kBFloat16:
            return Type::kBFloat16;
        case at::kHalf:
            return Type::kHalf;
        default:
            TORCH_CHECK_VALUE(false, name, ": expected float32, bfloat16 or float16 for impl=\"cpu\", got ",
                              toString(x.scalar_type()), "; impl=\"reference\" takes any float");
    }
}

// Last dimension contiguous; other strides are free (expanded and sliced tensors pass as they are).
// A view that is negative by a mark alone (imaginary parts of conjugates) is written out.
inline Tensor readable(const char* name, const Tensor& x, int64_t dims) {
    TORCH_CHECK_VALUE(x.device().is_cpu(), name, ": expected a CPU tensor, got ", x.device());
    TORCH_CHECK_VALUE(x.dim() == dims, name, ": expected ", dims, " dimensions, got ", x.sizes());
    if (x.is_neg()) return x.clone();
    return x.dim() == 0 || x.size(-1) <= 1 || x.stride(-1) == 1 ? x : x.contiguous();
}

inline Rows rows_view(const char* name, const Tensor& x) {
    return {x.const_data_ptr(), type_of(name, x), x.size(0), x.size(1), x.stride(0)};
}

inline std::string rows_named(const uint8_t* faults, int64_t n, uint8_t fault, int64_t per_row) {
    int64_t count = 0, last = -1;
    std::string shown;
    for (int64_t i = 0; i < n; ++i) {
        const int64_t row = i / per_row;
        if (faults[i] != fault || row == last) continue;
        last = row;
        if (++count <= 5) shown += (count > 1 ? ", " : "") + std::to_string(row);
    }
    return count == 1 ? "row " + shown : std::to_string(count) + " rows, first " + shown;
}

// Raises what the reference raises. `per_row`: faults per row of the tensor (patches of an image).
inline void report(const char* name, const char* what, const Tensor& faults, int64_t per_row = 1) {
    const uint8_t* f = faults.const_data_ptr<uint8_t>();
    const int64_t n = faults.numel();
    bool not_finite = false, zero = false, overflow = false;
    for (int64_t i = 0; i < n; ++i) {
        not_finite |= f[i] == kNotFinite;
        zero |= f[i] == kZero;
        overflow |= f[i] == kOverflow;
    }
    TORCH_CHECK_VALUE(!not_finite, name, ": ", what, " must be finite, found NaN or Inf in ",
                      rows_named(f, n, kNotFinite, per_row));
    TORCH_CHECK_VALUE(!zero, name, ": a zero vector has no direction, found in ",
                      rows_named(f, n, kZero, per_row),
                      "; was an image or a prompt left out without being masked?");
    TORCH_CHECK_VALUE(!overflow, "similarity: values must be finite, found NaN or Inf in ",
                      rows_named(f, n, kOverflow, per_row));
}

}  // namespace fastood
