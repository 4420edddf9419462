// What the patch kernel is asked for: the term of the LoCoOp loss and its gradients.
#pragma once

#include "kernels.h"

namespace fastood {

// With p = softmax(s / tau) over the classes, h = sum_k p_k log(p_k + 1e-5), and the patches that
// count being those where at least top_k classes lie above the image's label:
//   value = mean of h over the patches that count, 0 if none does
struct PatchJob {
    Rows local;               // (N, D) patches, image by image
    bool normalize;           // divide them by their norm
    const float* panels;      // packed classes (K, D)
    const float* columns;     // the classes spread in panels of columns, for d_local
    int64_t K;
    const int64_t* labels;    // of each image
    int64_t P;                // patches an image
    int64_t top_k;
    double tau;
    int32_t* rank;            // (N,) how many classes lie above the label
    double* entropy;          // (N,) h of the patches that count, 0 for the others
    double* value;
    float* d_text;            // (K, width), zeros to start with, or null; width = D padded to PANEL
    float* d_local;           // (N, width), zeros to start with, or null
    uint8_t* faults;          // (N,)
};

}  // namespace fastood
