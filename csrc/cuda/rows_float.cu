#include "rows_launch.cuh"

namespace fastood {

cudaError_t launch_float(const RowArguments& a, const RowPlan& plan, cudaStream_t stream) {
    return launch_rows<float>(a, plan, stream);
}

}  // namespace fastood
