// The kernels of rows_kernel.cuh, launched: one type of similarities a source file.
#pragma once

#include "rows_kernel.cuh"

namespace fastood {

template <typename In>
cudaError_t launch_rows(const RowArguments& a, const RowPlan& plan, cudaStream_t stream) {
    const dim3 grid(static_cast<unsigned>(plan.grid)), block(static_cast<unsigned>(plan.block));
    if (plan.threads == 32)
        rows_kernel<In, 32><<<grid, block, 0, stream>>>(a);
    else
        rows_kernel<In, WIDE><<<grid, block, 0, stream>>>(a);
    return cudaGetLastError();
}

cudaError_t launch_float(const RowArguments&, const RowPlan&, cudaStream_t);
cudaError_t launch_half(const RowArguments&, const RowPlan&, cudaStream_t);
cudaError_t launch_bfloat16(const RowArguments&, const RowPlan&, cudaStream_t);

}  // namespace fastood
