// What Python calls for rows of similarities: checks, the plan, the launches, the merge of parts.
#include "rows_kernel.cuh"

#include "api.h"

namespace fastood {
namespace {

int32_t fault_of_request(const Request& r, const RowJob& job) {
    if (r.kind < kMaxSimilarity || r.kind > kDeltaEnergy) return kBadRequest;
    if (r.tau < 0 || r.tau >= job.T || r.c < 1 || r.c > job.c) return kBadRequest;
    if (r.kind == kMargin && job.c < 2) return kBadRequest;
    if ((r.kind == kNegEntropy || r.kind == kVariance) && !job.moments) return kBadRequest;
    return 0;
}

int32_t fault_of(const RowJob& job) {
    if (job.B < 0 || job.K < 1 || job.K > 0x7fffffff || job.stride < 0) return kBadShape;
    if ((job.B > 0 && job.data == nullptr) || job.multiprocessors < 1) return kBadShape;
    if (job.type < kFloat || job.type > kHalf) return kBadType;
    if (job.c < 1 || job.c > MAX_TOPS || job.c > job.K) return kBadTops;
    if (job.T < 0 || job.T > MAX_TAUS) return kBadTaus;
    for (int t = 0; t < job.T; ++t)
        if (!(job.taus[t] > 0) || std::isinf(job.taus[t])) return kBadTaus;
    if (job.R < 0 || job.R > MAX_REQUESTS) return kBadRequest;
    if (job.R > 0 && job.B > 0 && job.scores == nullptr) return kBadRequest;
    if (!job.moments && (job.neg_entropy != nullptr || job.variance != nullptr)) return kBadRequest;
    for (int r = 0; r < job.R; ++r)
        if (const int32_t fault = fault_of_request(job.requests[r], job)) return fault;
    return 0;
}

// One more than c where possible: the largest of the rest is then in the list.
int32_t list_of(int32_t c) {
    int32_t list = 2;
    while (list < c + 1 && list < MAX_TOPS) list *= 2;
    return list;
}

// Thresholds are guesses: nobody has timed them.
RowPlan plan_of(const RowJob& job) {
    RowPlan plan{};
    const int64_t chip = job.multiprocessors;
    plan.list = list_of(job.c);
    plan.splits = 1;
    plan.segment = job.K;
    if (job.K <= 512 || (job.K <= 4096 && job.B >= 16 * chip)) {
        plan.threads = 32;
        plan.block = 32 * WARP_ROWS;
        plan.grid = (job.B + WARP_ROWS - 1) / WARP_ROWS;
        return plan;
    }
    plan.threads = plan.block = WIDE;
    if (job.B > 0 && job.B < 2 * chip && job.K >= 2 * SPLIT_LEAST) {
        int64_t parts = (4 * chip + job.B - 1) / job.B;  // about four blocks a multiprocessor
        if (parts > MAX_SPLITS) parts = MAX_SPLITS;
        if (parts > job.K / SPLIT_LEAST) parts = job.K / SPLIT_LEAST;
        plan.segment = ((job.K + parts - 1) / parts + 31) / 32 * 32;
        plan.splits = static_cast<int32_t>((job.K + plan.segment - 1) / plan.segment);
    }
    plan.grid = job.B * plan.splits;
    if (plan.splits > 1) plan.workspace_bytes = plan.grid * static_cast<int64_t>(sizeof(State));
    return plan;
}

__device__ __forceinline__ Rest from_below(const Rest& r, int o) {
    Rest out;
    out.z = __shfl_down_sync(ALL_LANES, r.z, o);
    out.n = __shfl_down_sync(ALL_LANES, r.n, o);
    out.y = __shfl_down_sync(ALL_LANES, r.y, o);
    out.e = __shfl_down_sync(ALL_LANES, r.e, o);
    out.ye = __shfl_down_sync(ALL_LANES, r.ye, o);
    out.ee = __shfl_down_sync(ALL_LANES, r.ee, o);
    out.yp = __shfl_down_sync(ALL_LANES, r.yp, o);
    out.pp = __shfl_down_sync(ALL_LANES, r.pp, o);
    out.shift = __shfl_down_sync(ALL_LANES, r.shift, o);
    out.centred = __shfl_down_sync(ALL_LANES, r.centred, o);
    return out;
}

// The parts of a row, one in each lane of a warp, to a whole row in shared memory.
__device__ __forceinline__ void merge_row(const RowArguments& arguments, const State* parts,
                                          State& state) {
    const RowJob& job = arguments.job;
    const int lane = threadIdx.x % 32;
    const bool has = lane < arguments.splits;
    const State& part = parts[has ? lane : 0];
    Top<MAX_TOPS> left;
    left.clear();
    if (has) {
#pragma unroll
        for (int j = 0; j < MAX_TOPS; ++j)
            if (j < job.c) left.at[j] = part.top[j];
    }
    const bool bad = __any_sync(ALL_LANES, has && part.bad);
    for (int j = 0; j < job.c; ++j) {
        const Best best = warp_take(left);
        if (lane == 0) state.top[j] = best;
    }
    if (lane == 0) state.bad = bad;
    if (bad) return;  // all lanes
    for (int t = 0; t < job.T; ++t) {
        const double inverse = arguments.scales[t].inverse;
        Rest rest = no_rest();
        if (has) {
            rest = part.rest[t];
            Top<MAX_TOPS> out = left;
            for (; out.at[0].index != NO_INDEX; out.pop()) join(rest, out.at[0].value, inverse);
        }
        // lane i < o takes what lanes i and i + o have: a fixed order, whole in lane 0
        for (int o = 16; o > 0; o /= 2) rest = merged(rest, from_below(rest, o), inverse);
        if (lane == 0) state.rest[t] = rest;
    }
}

__global__ void __launch_bounds__(32 * WARP_ROWS)
    merge_kernel(const __grid_constant__ RowArguments arguments) {
    __shared__ State states[WARP_ROWS];
    const RowJob& job = arguments.job;
    const int64_t first = static_cast<int64_t>(blockIdx.x) * WARP_ROWS;
    const int own = threadIdx.x / 32;
    if (first + own < job.B)
        merge_row(arguments,
                  static_cast<const State*>(job.workspace) + (first + own) * arguments.splits,
                  states[own]);
    __syncthreads();
    finish_rows(job, states, WARP_ROWS, first);
}

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
    if (const int32_t fault = fault_of(*job)) return fault;
    *plan = plan_of(*job);
    return plan->grid > 0x7fffffff ? kBadShape : 0;
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
    RowArguments a{};
    a.job = *job;
    a.segment = plan.segment;
    a.splits = plan.splits;
    a.list = plan.list;
    for (int t = 0; t < job->T; ++t) a.scales[t] = make_scale(job->taus[t]);
    cudaError_t error = launch(a, plan, stream);
    if (error == cudaSuccess && plan.splits > 1) {
        const unsigned grid = static_cast<unsigned>((job->B + WARP_ROWS - 1) / WARP_ROWS);
        merge_kernel<<<grid, 32 * WARP_ROWS, 0, stream>>>(a);
        error = cudaGetLastError();
    }
    return static_cast<int32_t>(error);
}
