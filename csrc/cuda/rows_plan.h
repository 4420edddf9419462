// Checks of a job and its plan: what the host decides, without a device and without CUDA.
#pragma once

#include "rows.h"

namespace fastood {

inline int32_t fault_of_request(const Request& r, const RowJob& job) {
    if (r.kind < kMaxSimilarity || r.kind > kDeltaEnergy) return kBadRequest;
    if (r.tau < 0 || r.tau >= job.T || r.c < 1 || r.c > job.c) return kBadRequest;
    if (r.kind == kMargin && job.c < 2) return kBadRequest;
    if ((r.kind == kNegEntropy || r.kind == kVariance) && !job.moments) return kBadRequest;
    return 0;
}

inline int32_t fault_of(const RowJob& job) {
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
inline int32_t list_of(int32_t c) {
    int32_t list = 2;
    while (list < c + 1 && list < MAX_TOPS) list *= 2;
    return list;
}

// Thresholds are guesses: nobody has timed them.
inline RowPlan plan_of(const RowJob& job) {
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
    if (job.B > 0 && job.B < 2 * chip && job.K > 2 * SPLIT_LEAST) {
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

// A Status; the plan only where it is 0.
inline int32_t plan_rows(const RowJob& job, RowPlan* plan) {
    if (const int32_t fault = fault_of(job)) return fault;
    *plan = plan_of(job);
    return plan->grid > 0x7fffffff ? kBadShape : 0;
}

inline RowArguments arguments_of(const RowJob& job, const RowPlan& plan) {
    RowArguments a{};
    a.job = job;
    a.segment = plan.segment;
    a.splits = plan.splits;
    a.list = plan.list;
    for (int t = 0; t < job.T; ++t) a.scales[t] = make_scale(job.taus[t]);
    return a;
}

}  // namespace fastood
