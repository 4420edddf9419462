#include "rows_launch.cuh"

namespace fastood {

cudaError_t launch_bfloat16(const RowArguments& a, const RowPlan& plan, cudaStream_t stream) {
    return launch_rows<__nv_bfloat16>(a, plan, stream);
}

}  // namespace fastood
