// What the grouped kernel is asked for: classes against groups of negative labels.
#pragma once

#include "kernels.h"

namespace fastood {

// scores[i] = mean over g of sigmoid(lse(s / tau) - lse(n_g / tau))
struct GroupedJob {
    Rows image;              // (B, D)
    bool normalize;          // divide image rows by their norm
    const float* panels;     // packed classes (K, D)
    const uint16_t* split;   // or packed for the matrix unit, the negatives likewise
    int64_t K;
    const float* negatives;  // packed (G * m, D): one group after the other
    const uint16_t* negatives_split;
    int64_t G, m;
    int64_t full;            // groups from this one on are padded: their last row does not count
    double tau;
    float* scores;           // (B,)
    double* lse;             // (B, 1 + G) of the classes, then of each group, or null
    uint8_t* faults;         // (B,)
};

struct GroupedBackwardJob {
    Rows image;              // (B, D) float32, as multiplied
    const float* panels;
    const float* columns;    // the classes spread in panels of columns, for d_image
    int64_t K;
    const float* negatives;
    const float* negative_columns;
    int64_t G, m, full;
    double tau;
    const double* lse;       // (B, 1 + G)
    const float* upstream;   // (B,)
    float* d_image;          // (B, width) or null; width = D padded to PANEL
    float* d_text;           // (K, width), zeros to start with, or null
    float* d_negatives;      // (G * m, width), likewise
};

}  // namespace fastood
