// Global scores and statistics of given similarities: what is asked for, and how it is launched.
// No Torch and no CUDA header: Python fills these structures through ctypes.
#pragma once

#include "row_finish.h"

namespace fastood {

constexpr int MAX_REQUESTS = 32;
constexpr int MAX_SPLITS = 32;      // parts of a row: one for each lane of the warp that merges them
constexpr int SPLIT_LEAST = 4096;   // classes in a part, at least
constexpr int WARP_ROWS = 4;        // rows of a block where a warp has one each
constexpr int WIDE = 256;           // threads of a block that has one row

enum Type : int32_t { kFloat, kBFloat16, kHalf };

enum Status : int32_t {  // 0 is success, positive numbers are cudaError_t, these are ours
    kBadShape = -1,
    kBadType = -2,
    kBadTops = -3,
    kBadTaus = -4,
    kBadRequest = -5,
    kBadWorkspace = -6,
    kNoSolver = -7,
    kSolverFailed = -8,
};

// Element (i, k) is data[i * stride + k]. Every output may be null.
struct RowJob {
    const void* data;
    int64_t B, K, stride;
    int32_t type;
    int32_t c;        // top values held outside the sums, 1 <= c <= min(K, MAX_TOPS)
    int32_t T, R;     // temperatures and requests used of those below
    int32_t moments;  // neg_entropy and variance are wanted
    int32_t multiprocessors;
    float* values;         // (B, c)
    int64_t* index;        // (B, c)
    double* rest;          // (B, T) log sum over all but the top c, relative to values[0]
    float* neg_entropy;    // (B, T)
    float* variance;       // (B, T)
    float* scores;         // (R, B)
    int64_t* classes;      // (B,) index of the largest
    void* workspace;       // as many bytes as the plan says
    int64_t workspace_bytes;
    double taus[MAX_TAUS];
    Request requests[MAX_REQUESTS];
};

// How a job is launched. Of no device: the same job and multiprocessors give the same plan.
struct RowPlan {
    int32_t list;      // capacity of the register list: 2, 4, 8 or 16
    int32_t threads;   // of a row: 32 or WIDE
    int32_t splits;    // parts of a row; more than 1 needs a second launch, which merges them
    int32_t block;     // threads of a block
    int64_t grid;      // blocks of the first launch
    int64_t segment;   // classes in a part
    int64_t workspace_bytes;
};

// Arguments of the kernels: the job, and what is computed of it once.
struct RowArguments {
    RowJob job;
    Scale scales[MAX_TAUS];
    int64_t segment;
    int32_t splits;
    int32_t list;
};

}  // namespace fastood
