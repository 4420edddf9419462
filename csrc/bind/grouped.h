// Scores of classes against groups of negative labels.
#pragma once

#include "../cpu/grouped_job.h"
#include "rows.h"

namespace fastood {

// Sizes of a grouped bank: K classes, G groups of m, of m - 1 from group `full` on.
inline void check_groups(int64_t K, int64_t G, int64_t m, int64_t full, double tau) {
    TORCH_CHECK_VALUE(K >= 1, "text: expected at least one class, got K = 0");
    TORCH_CHECK_VALUE(G >= 1 && m >= 1, "negatives: expected at least one, got (", G, ", ", m, ")");
    TORCH_CHECK_VALUE(full >= 0 && full <= G && (m > 1 || full == G),
                      "full: expected a number of groups, 0 <= full <= G = ", G, ", got ", full);
    TORCH_CHECK_VALUE(tau > 0 && std::isfinite(tau), "tau: expected a temperature > 0, got ", tau);
}

// `lse` (B, 1 + G) is written if wanted.
inline Tensor run_grouped(const Tensor& image_, const Tensor& panels, const Tensor& negatives,
                          int64_t K, int64_t G, int64_t m, int64_t full, double tau, bool normalize,
                          Tensor* lse) {
    const Tensor image = readable("image", image_, 2);
    check_groups(K, G, m, full, tau);
    const PackedClasses classes = packed_classes(panels, K, image.size(1));
    const PackedClasses others = packed_classes(negatives, G * m, image.size(1));
    TORCH_CHECK_VALUE((classes.split == nullptr) == (others.split == nullptr),
                      "negatives: expected packed as the classes are");
    const int64_t B = image.size(0);
    const auto options = image.options().dtype(at::kFloat);
    const Tensor scores = at::empty({B}, options), faults = at::empty({B}, options.dtype(at::kByte));
    GroupedJob job{};
    job.image = rows_view("image", image);
    job.normalize = normalize;
    job.panels = classes.panels;
    job.split = classes.split;
    job.K = K;
    job.negatives = others.panels;
    job.negatives_split = others.split;
    job.G = G;
    job.m = m;
    job.full = full;
    job.tau = tau;
    job.scores = scores.data_ptr<float>();
    if (lse != nullptr) {
        *lse = at::empty({B, G + 1}, options.dtype(at::kDouble));
        job.lse = lse->data_ptr<double>();
    }
    job.faults = faults.data_ptr<uint8_t>();
    kernels().grouped(job, pool());
    report("image", "features", faults);
    return scores;
}

// For Python in eager mode without gradients.
inline Tensor grouped_scores(const Tensor& image, const Tensor& panels, const Tensor& negatives,
                             int64_t K, int64_t G, int64_t m, int64_t full, double tau,
                             bool normalize) {
    return run_grouped(image, panels, negatives, K, G, m, full, tau, normalize, nullptr);
}

// ---------------------------------------------------------------- operators (ops/grouped.py)

inline std::tuple<Tensor, Tensor> grouped(const Tensor& image, const Tensor& text,
                                          const Tensor& negatives, const OptionalTensor& panels,
                                          const OptionalTensor& negative_panels, int64_t full,
                                          double tau, std::string_view precision) {
    check_precision(precision);
    const Tensor flat = negatives.flatten(0, 1);
    Tensor lse;
    const Tensor scores = run_grouped(
        image, panels.has_value() ? *panels : pack_text(text, false, "text"),
        negative_panels.has_value() ? *negative_panels : pack_text(flat, false, "negatives"),
        text.size(0), negatives.size(0), negatives.size(1), full, tau, false, &lse);
    return {scores, lse};
}

inline Tensor columns_of(const Tensor& text) {
    const int64_t K = text.size(0), D = text.size(1);
    Tensor out = at::empty({round_up(D, PANEL) / PANEL, round_up(K, CHUNK), PANEL}, text.options());
    kernels().spread(text.const_data_ptr<float>(), text.stride(0), K, D, out.data_ptr<float>());
    return out;
}

inline std::tuple<Tensor, Tensor, Tensor> grouped_backward(
    const Tensor& upstream_, const Tensor& image_, const Tensor& text_, const Tensor& negatives_,
    const OptionalTensor& panels_, const OptionalTensor& negative_panels_, const Tensor& lse,
    int64_t full, double tau, bool image_gradient, bool text_gradient, bool negatives_gradient) {
    const Tensor image = readable("image", image_, 2);
    const Tensor text = readable("text", text_, 2).to(at::kFloat);
    const int64_t G = negatives_.size(0), m = negatives_.size(1);
    const Tensor negatives = readable("negatives", negatives_.flatten(0, 1), 2).to(at::kFloat);
    const int64_t B = image.size(0), K = text.size(0), D = image.size(1);
    const Tensor panels = panels_.has_value() ? *panels_ : pack_text(text, false, "text");
    const Tensor negative_panels = negative_panels_.has_value()
                                       ? *negative_panels_
                                       : pack_text(negatives, false, "negatives");
    check_groups(K, G, m, full, tau);
    check_panels(panels, K, D);
    check_panels(negative_panels, G * m, D);
    TORCH_CHECK_VALUE(lse.is_contiguous() && lse.scalar_type() == at::kDouble && lse.dim() == 2 &&
                          lse.size(0) == B && lse.size(1) == G + 1,
                      "lse: expected what grouped returned");
    const Tensor upstream = upstream_.to(at::kFloat).contiguous();
    Tensor d_image = at::empty({0}, text.options()), d_text = d_image, d_negatives = d_image;
    Tensor columns, negative_columns;
    GroupedBackwardJob job{};
    job.image = rows_view("image", image);
    job.panels = panels.const_data_ptr<float>();
    job.K = K;
    job.negatives = negative_panels.const_data_ptr<float>();
    job.G = G;
    job.m = m;
    job.full = full;
    job.tau = tau;
    job.lse = lse.const_data_ptr<double>();
    job.upstream = upstream.const_data_ptr<float>();
    if (image_gradient) {
        d_image = padded_zeros(B, D, text);
        columns = columns_of(text);
        negative_columns = columns_of(negatives);
        job.columns = columns.const_data_ptr<float>();
        job.negative_columns = negative_columns.const_data_ptr<float>();
        job.d_image = d_image.data_ptr<float>();
    }
    if (text_gradient) {
        d_text = padded_zeros(K, D, text);
        job.d_text = d_text.data_ptr<float>();
    }
    if (negatives_gradient) {
        d_negatives = padded_zeros(G * m, D, text);
        job.d_negatives = d_negatives.data_ptr<float>();
    }
    kernels().grouped_backward(job, pool());
    if (image_gradient) d_image = unpadded(d_image, D);
    if (text_gradient) d_text = unpadded(d_text, D);
    if (negatives_gradient) d_negatives = unpadded(d_negatives, D).view({G, m, D});
    return {d_image, d_text, d_negatives};
}

}  // namespace fastood
