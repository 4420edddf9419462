// One pass over rows of similarities in memory, by a warp or a block for each.
//
// A row is read three times, all but the first out of the cache: for its top values, for their
// absence from the rest only where the list is full, and once for each temperature. Which threads
// add what, and in which order, depends on shapes alone: results are the same to the bit.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "rows.h"

namespace fastood {

constexpr unsigned ALL_LANES = 0xffffffffu;
constexpr int AT_ONCE = 4;  // loads in flight of a thread; a guess

__device__ __forceinline__ float as_float(float x) { return x; }
__device__ __forceinline__ float as_float(__half x) { return __half2float(x); }
__device__ __forceinline__ float as_float(__nv_bfloat16 x) { return __bfloat162float(x); }

// What the threads of a row share while they reduce; none where a row has a single warp.
template <int THREADS>
struct Exchange {
    static constexpr int WARPS = THREADS / 32;
    Best best[WARPS][MAX_TOPS];
    double sums[WARPS][5];
    float low[WARPS], high[WARPS];
    int32_t bad[WARPS];
};
template <>
struct Exchange<32> {};

__device__ __forceinline__ double warp_sum(double x) {
#pragma unroll
    for (int o = 16; o > 0; o /= 2) x += __shfl_xor_sync(ALL_LANES, x, o);
    return x;
}

__device__ __forceinline__ float warp_low(float x) {
#pragma unroll
    for (int o = 16; o > 0; o /= 2) x = fminf(x, __shfl_xor_sync(ALL_LANES, x, o));
    return x;
}

__device__ __forceinline__ float warp_high(float x) { return -warp_low(-x); }

// The first of the lists of all lanes, in every lane; it leaves the list it was in.
template <int C>
__device__ __forceinline__ Best warp_take(Top<C>& left) {
    Best best = left.at[0];
#pragma unroll
    for (int o = 16; o > 0; o /= 2) {
        Best other;
        other.value = __shfl_xor_sync(ALL_LANES, best.value, o);
        other.index = __shfl_xor_sync(ALL_LANES, best.index, o);
        if (before(other, best)) best = other;
    }
    if (left.at[0].index == best.index) left.pop();  // no two lanes have one index
    return best;
}

// The first C of the lists of all lanes, in every lane.
template <int C>
__device__ __forceinline__ Top<C> warp_top(Top<C>& left) {
    Top<C> out;
#pragma unroll
    for (int j = 0; j < C; ++j) out.at[j] = warp_take(left);
    return out;
}

// Adds up five numbers over the threads of a row; the result is in every thread.
template <int THREADS>
__device__ __forceinline__ void row_sum(double (&x)[5], int used, Exchange<THREADS>& shared) {
#pragma unroll
    for (int i = 0; i < 5; ++i)
        if (i < used) x[i] = warp_sum(x[i]);
    if constexpr (THREADS > 32) {
        const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
        __syncthreads();  // whoever still reads the last sums
        if (lane == 0)
#pragma unroll
            for (int i = 0; i < 5; ++i)
                if (i < used) shared.sums[warp][i] = x[i];
        __syncthreads();
#pragma unroll
        for (int i = 0; i < 5; ++i) {
            if (i >= used) continue;
            x[i] = 0;
            for (int w = 0; w < THREADS / 32; ++w) x[i] += shared.sums[w][i];
        }
    }
}

// What the first reading of a row finds, the same in every thread of it; and its c top values, in
// `state`.
struct First {
    Best last;   // of the values held
    float next;  // the largest behind it, where the list has room for one more than c
    float low, centre;
    bool bad;
};

template <typename In, int C, int THREADS>
__device__ __forceinline__ First first_reading(const In* __restrict__ row, int64_t begin,
                                               int64_t end, int c, State& state,
                                               Exchange<THREADS>& shared) {
    const int thread = threadIdx.x % THREADS;
    Top<C> own;
    own.clear();
    float low = INFINITY;
    double total = 0;
    bool bad = false;
    for (int64_t k = begin + thread; k < end; k += AT_ONCE * THREADS) {
        float s[AT_ONCE];
#pragma unroll
        for (int u = 0; u < AT_ONCE; ++u)
            s[u] = k + u * THREADS < end ? as_float(row[k + u * THREADS]) : 0.0f;
        float sum = 0;
#pragma unroll
        for (int u = 0; u < AT_ONCE; ++u) {
            if (k + u * THREADS >= end) break;
            bad = bad || !(fabsf(s[u]) <= 3.402823466e38f);
            low = fminf(low, s[u]);
            sum += s[u];
            // indices of a thread ascend: an equal value is never before what it has
            if (s[u] > own.at[C - 1].value) own.push({s[u], static_cast<int32_t>(k + u * THREADS)});
        }
        total += sum;
    }
    First found;
    found.bad = __any_sync(ALL_LANES, bad);
    low = warp_low(low);
    Top<C> top = warp_top(own);
    if constexpr (THREADS > 32) {
        constexpr int WARPS = THREADS / 32;
        const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
        if (lane == 0) {
#pragma unroll
            for (int j = 0; j < C; ++j) shared.best[warp][j] = top.at[j];
            shared.low[warp] = low;
            shared.bad[warp] = found.bad;
        }
        __syncthreads();
        own.clear();
        if (lane < WARPS) {
#pragma unroll
            for (int j = 0; j < C; ++j) own.at[j] = shared.best[lane][j];
        }
        top = warp_top(own);  // every warp finds the same
        for (int w = 0; w < WARPS; ++w) {
            low = fminf(low, shared.low[w]);
            found.bad = found.bad || shared.bad[w];
        }
    }
    double sums[5] = {total, 0, 0, 0, 0};
    row_sum<THREADS>(sums, 1, shared);
    found.last = top.get(c - 1);
    found.next = top.get(c).value;
    if (thread == 0) {
        state.bad = found.bad;
#pragma unroll
        for (int j = 0; j < C; ++j)
            if (j < c) state.top[j] = top.at[j];
    }
    found.low = low;
    found.centre = static_cast<float>(sums[0] / static_cast<double>(end - begin));
    return found;
}

// The mean of the first classes of a row: a centre that all its parts agree on.
template <typename In, int THREADS>
__device__ __forceinline__ float mean_of_start(const In* __restrict__ row, int64_t K,
                                               Exchange<THREADS>& shared) {
    constexpr int64_t START = 4 * THREADS;
    const int64_t end = K < START ? K : START;
    double sums[5] = {0, 0, 0, 0, 0};
    for (int64_t k = threadIdx.x % THREADS; k < end; k += THREADS) sums[0] += as_float(row[k]);
    row_sum<THREADS>(sums, 1, shared);
    return static_cast<float>(sums[0] / static_cast<double>(end));
}

// The largest of a row behind `last`, -inf if there is none: where the list holds no more.
template <typename In, int THREADS>
__device__ __forceinline__ float largest_behind(const In* __restrict__ row, int64_t begin,
                                                int64_t end, Best last,
                                                Exchange<THREADS>& shared) {
    float high = -INFINITY;
    for (int64_t k = begin + threadIdx.x % THREADS; k < end; k += THREADS) {
        const Best s = {as_float(row[k]), static_cast<int32_t>(k)};
        if (before(last, s)) high = fmaxf(high, s.value);
    }
    high = warp_high(high);
    if constexpr (THREADS > 32) {
        if (threadIdx.x % 32 == 0) shared.high[threadIdx.x / 32] = high;
        __syncthreads();
        for (int w = 0; w < THREADS / 32; ++w) high = fmaxf(high, shared.high[w]);
    }
    return high;
}

// The sums over what is behind `last`, the smallest value held, at one temperature.
template <bool CENTRED, bool MOMENTS, typename In, int THREADS>
__device__ __forceinline__ Rest sums_behind(const In* __restrict__ row, int64_t begin, int64_t end,
                                            Best last, float shift, const Scale& scale,
                                            Exchange<THREADS>& shared) {
    Rest own = no_rest();
    for (int64_t k = begin + threadIdx.x % THREADS; k < end; k += AT_ONCE * THREADS) {
        float s[AT_ONCE];
#pragma unroll
        for (int u = 0; u < AT_ONCE; ++u)
            s[u] = k + u * THREADS < end ? as_float(row[k + u * THREADS]) : 0.0f;
        Sums lane;
        clear(lane);
#pragma unroll
        for (int u = 0; u < AT_ONCE; ++u) {
            const int64_t at = k + u * THREADS;
            if (at < end && before(last, {s[u], static_cast<int32_t>(at)}))
                add<CENTRED, MOMENTS>(lane, s[u], shift, scale);
        }
        collect<CENTRED, MOMENTS>(own, lane, scale.inverse);
    }
    constexpr int USED = !MOMENTS ? 1 : CENTRED ? 5 : 3;
    double sums[5] = {own.z, CENTRED ? own.y : own.yp, CENTRED ? own.e : own.pp, own.ye, own.ee};
    row_sum<THREADS>(sums, USED, shared);
    Rest rest = no_rest();
    rest.shift = shift;
    rest.centred = CENTRED;
    rest.z = sums[0];
    if (MOMENTS && CENTRED) {
        rest.y = sums[1];
        rest.e = sums[2];
        rest.ye = sums[3];
        rest.ee = sums[4];
    } else if (MOMENTS) {
        rest.yp = sums[1];
        rest.pp = sums[2];
    }
    return rest;
}

template <typename In, int THREADS>
__device__ __forceinline__ void take_row(const RowArguments& arguments, const In* __restrict__ row,
                                         int64_t begin, int64_t end, State& state,
                                         Exchange<THREADS>& shared) {
    const RowJob& job = arguments.job;
    const int c = job.c;
    const bool writes = threadIdx.x % THREADS == 0;
    First found;
    switch (arguments.list) {  // what follows is the same for all: one kernel has them all
        case 2:
            found = first_reading<In, 2, THREADS>(row, begin, end, c, state, shared);
            break;
        case 4:
            found = first_reading<In, 4, THREADS>(row, begin, end, c, state, shared);
            break;
        case 8:
            found = first_reading<In, 8, THREADS>(row, begin, end, c, state, shared);
            break;
        default:
            found = first_reading<In, 16, THREADS>(row, begin, end, c, state, shared);
    }
    const Best last = found.last;
    float centre = found.centre;
    if constexpr (THREADS > 32)  // no warp has a part of a row
        if (arguments.splits > 1) centre = mean_of_start<In, THREADS>(row, job.K, shared);
    float next = found.next;
    if (c == arguments.list) next = largest_behind<In, THREADS>(row, begin, end, last, shared);
    for (int t = 0; t < job.T; ++t) {
        const Scale& scale = arguments.scales[t];
        // not only where moments need it: a score is the same whatever is asked with it
        const bool near = near_centre(found.low, next, centre, scale.inverse);
        const float shift = near ? centre : next;
        Rest rest;
        if (found.bad || next == -INFINITY) {
            rest = no_rest();
            rest.shift = centre;
            rest.centred = near;  // of no rest: its top values are taken about the centre
        } else if (near) {
            rest = job.moments ? sums_behind<true, true, In, THREADS>(row, begin, end, last, shift,
                                                                      scale, shared)
                               : sums_behind<true, false, In, THREADS>(row, begin, end, last,
                                                                       shift, scale, shared);
        } else {
            rest = job.moments ? sums_behind<false, true, In, THREADS>(row, begin, end, last,
                                                                       shift, scale, shared)
                               : sums_behind<false, false, In, THREADS>(row, begin, end, last,
                                                                        shift, scale, shared);
        }
        rest.n = rest.z == 0 ? 0 : static_cast<double>(end - begin - c);
        if (writes) state.rest[t] = rest;
    }
}

// Item i of what a job wants of one row: the scores, then the columns of top values, then those of
// temperatures. Not inlined: it is a few thousand instructions, and needed once.
static __device__ __noinline__ void finish_item(const RowJob& job, const State& state, int64_t b,
                                                int i) {
    const int c = job.c, T = job.T;
    if (i < job.R) {
        const double score =
            state.bad ? NAN : score_of(job.requests[i], state, c, job.K, job.taus);
        if (job.scores != nullptr) job.scores[i * job.B + b] = static_cast<float>(score);
        return;
    }
    i -= job.R;
    if (i < c) {
        const Best best = state.bad ? Best{NAN, i} : state.top[i];  // an index is always one
        if (job.values != nullptr) job.values[b * c + i] = best.value;
        if (job.index != nullptr) job.index[b * c + i] = best.index;
        if (job.classes != nullptr && i == 0) job.classes[b] = best.index;
        return;
    }
    i -= c;
    const int64_t at = b * T + i;
    const double inverse = 1.0 / job.taus[i];
    if (job.rest != nullptr)
        job.rest[at] = state.bad ? NAN : log_rest(state.rest[i], state.top, inverse);
    if (job.neg_entropy == nullptr && job.variance == nullptr) return;
    Moments moments = {NAN, NAN};
    if (!state.bad) moments = moments_of(state.rest[i], state.top, c, job.K, inverse);
    if (job.neg_entropy != nullptr) job.neg_entropy[at] = static_cast<float>(moments.neg_entropy);
    if (job.variance != nullptr) job.variance[at] = static_cast<float>(moments.variance);
}

// `states` of rows first, first + 1, ... up to B, by all threads of the block.
__device__ __forceinline__ void finish_rows(const RowJob& job, const State* states, int rows,
                                            int64_t first) {
    const int items = job.R + job.c + job.T;
    for (int i = threadIdx.x; i < items * rows; i += blockDim.x) {
        const int row = i % rows;
        if (first + row < job.B) finish_item(job, states[row], first + row, i / rows);
    }
}

template <typename In, int THREADS>
__global__ void __launch_bounds__(THREADS == 32 ? 32 * WARP_ROWS : THREADS,
                                  THREADS == 32 ? 5 : 2)  // registers enough not to spill
    rows_kernel(const __grid_constant__ RowArguments arguments) {
    constexpr int ROWS = THREADS == 32 ? WARP_ROWS : 1;
    __shared__ State states[ROWS];
    __shared__ Exchange<THREADS> shared;
    const RowJob& job = arguments.job;
    const In* data = static_cast<const In*>(job.data);
    const int own = threadIdx.x / THREADS;
    const int64_t splits = arguments.splits;
    const int64_t first = static_cast<int64_t>(blockIdx.x) / splits * ROWS;
    const int64_t part = static_cast<int64_t>(blockIdx.x) % splits;
    const int64_t begin = part * arguments.segment;
    const int64_t end = begin + arguments.segment < job.K ? begin + arguments.segment : job.K;
    if (first + own < job.B)  // the same for all threads of a row; no other barrier inside
        take_row<In, THREADS>(arguments, data + (first + own) * job.stride, begin, end, states[own],
                              shared);
    __syncthreads();
    if (splits == 1) {
        finish_rows(job, states, ROWS, first);
    } else if (threadIdx.x == 0) {  // only where a block has one row
        State& out = static_cast<State*>(job.workspace)[first * splits + part];
        out.bad = states[0].bad;
        for (int j = 0; j < job.c; ++j) out.top[j] = states[0].top[j];
        for (int t = 0; t < job.T; ++t) out.rest[t] = states[0].rest[t];
    }
}

}  // namespace fastood
