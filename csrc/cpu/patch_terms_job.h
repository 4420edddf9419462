// What is asked of patches where no gradient is: the terms of a search over low-rank weights.
#pragma once

#include "kernels.h"

namespace fastood {

// Of every row, with logits l = local weight' + bias and p = softmax(l).
struct PatchTermsJob {
    Rows local;               // (N, D) patches
    const float* panels;      // packed weight (K, D)
    const uint16_t* split;    // or packed for the matrix unit
    const float* bias;        // (K,) or null
    int64_t K;
    const int64_t* labels;    // (N,)
    int64_t top_k;
    int32_t* rank;            // (N,) classes before the label, by (logit descending, index ascending)
    bool* tied;               // (N,) whether classes of the label's logit decide rank >= top_k
    double* entropy;          // (N,) sum_k p_k log(p_k + 1e-5) where rank >= top_k, 0 elsewhere
    uint8_t* faults;          // (N,)
};

}  // namespace fastood
