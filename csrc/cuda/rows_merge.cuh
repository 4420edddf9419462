// Rows whose parts several blocks have read: merged by a warp each, and finished.
#pragma once

#include "rows_kernel.cuh"

namespace fastood {

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

static __global__ void __launch_bounds__(32 * WARP_ROWS)
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

}  // namespace fastood
