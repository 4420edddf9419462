// What Python calls for rows of similarities: checks, the plan, the launches.
#include "api.h"
#include "rows_launch.cuh"
#include "rows_merge.cuh"
#include "rows_plan.h"

namespace fastood {
namespace {

cudaError_t launch(const RowArguments& a, const RowPlan& plan, cudaStream_t stream) {
    switch (a.job.type) {
        case kFloat:
            return launch_float(a, plan, stream);
        case kHalf:
            return launch_half(a, plan, stream);
        default:
            return launch_bfloat16(a, plan, stream);
    }
}

}  // namespace
}  // namespace fastood

using namespace fastood;

FASTOOD_API int32_t fastood_rows_plan(const RowJob* job, RowPlan* plan) {
    return plan_rows(*job, plan);
}

FASTOOD_API int32_t fastood_rows(const RowJob* job, void* stream_) {
    RowPlan plan;
    if (const int32_t fault = fastood_rows_plan(job, &plan)) return fault;
    if (job->B == 0) return 0;
    if (plan.workspace_bytes > 0 &&
        (job->workspace == nullptr || job->workspace_bytes < plan.workspace_bytes ||
         reinterpret_cast<uintptr_t>(job->workspace) % alignof(State) != 0))
        return kBadWorkspace;
    const cudaStream_t stream = static_cast<cudaStream_t>(stream_);
    const RowArguments a = arguments_of(*job, plan);
    cudaError_t error = launch(a, plan, stream);
    if (error == cudaSuccess && plan.splits > 1) {
        const unsigned grid = static_cast<unsigned>((job->B + WARP_ROWS - 1) / WARP_ROWS);
        merge_kernel<<<grid, 32 * WARP_ROWS, 0, stream>>>(a);
        error = cudaGetLastError();
    }
    return static_cast<int32_t>(error);
}
