#include "rows_launch.cuh"

namespace fastood {

cudaError_t launch_half(const RowArguments& a, const RowPlan& plan, cudaStream_t stream) {
    return launch_rows<__half>(a, plan, stream);
}

}  // namespace fastood
