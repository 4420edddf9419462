// The energy-bound loss of a batch and its gradients.
#pragma once

#include "kernels.h"

namespace fastood {

// With unit rows z and T, s = z T', y1 the best class, zm the elements of z that a mask keeps:
// loss = mean CE(edited or original logits, label) + weight mean (lse(edited) - lse(original)),
// the edited logits being s / tau with the entry of y1 (or all entries) taken from zm.
struct EbmJob {
    Rows image;             // (B, D)
    Rows text;              // (K, D)
    bool normalize_image, normalize_text;
    const int64_t* labels;  // (B,), each in 0..K-1
    double tau, weight;
    int64_t kept;           // elements a mask keeps, <= D; 0: those whose product is positive
    bool by_label;          // the product is with the label's class, not with y1
    bool edit_all;          // all entries are edited, not that of y1 alone
    bool ce_original;       // cross-entropy of the original logits
    bool renorm;            // zm has unit norm
    double* loss;           // 3: loss, mean p_y1, mean of st - s_y1 (st: the edited s_y1)
    float* columns;         // [width / PANEL][K padded to CHUNK][PANEL] to work in, for d_image
    float* d_image;         // (B, width) or null; width = D padded to PANEL
    float* d_text;          // (K, width) or null
    uint8_t* image_faults;  // (B,)
    uint8_t* text_faults;   // (K,)
};

}  // namespace fastood
