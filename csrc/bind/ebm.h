// The energy-bound loss (schema: ops/ebm.py).
#pragma once

#include "../cpu/ebm_job.h"
#include "rows.h"

namespace fastood {

inline void check_labels(const Tensor& labels, int64_t B, int64_t K) {
    TORCH_CHECK_VALUE(labels.scalar_type() == at::kLong && labels.device().is_cpu(),
                      "labels: expected int64 on the CPU, got ", labels.scalar_type(), " on ",
                      labels.device());
    TORCH_CHECK_VALUE(labels.dim() == 1 && labels.size(0) == B, "labels: expected (", B, ",), got ",
                      labels.sizes());
    const int64_t* y = labels.const_data_ptr<int64_t>();
    int64_t low = y[0], high = y[0];
    for (int64_t i = 1; i < B; ++i) {
        low = y[i] < low ? y[i] : low;
        high = y[i] > high ? y[i] : high;
    }
    TORCH_CHECK_VALUE(low >= 0 && high < K, "labels: expected values in 0..", K - 1, " (K = ", K,
                      "), got ", low, "..", high);
}

// loss (), diagnostics (2,), and the gradients that are wanted; the others are empty.
inline std::tuple<Tensor, Tensor, Tensor, Tensor> ebm_loss(
    const Tensor& image_, const Tensor& text_, const Tensor& labels_, double tau, double weight,
    int64_t kept, bool by_label, bool edit_all, bool ce_original, bool renorm, bool normalize_image,
    bool normalize_text, bool wants_image, bool wants_text) {
    const Tensor image = readable("image", image_, 2), text = readable("text", text_, 2);
    const int64_t B = image.size(0), D = image.size(1), K = text.size(0);
    TORCH_CHECK_VALUE(B >= 1, "image: a loss needs at least one image, got B = 0");
    TORCH_CHECK_VALUE(K >= 1, "text: expected at least one class, got K = 0");
    TORCH_CHECK_VALUE(text.size(1) == D, "text: expected (K, ", D, ") to match image, got ",
                      text.sizes());
    TORCH_CHECK_VALUE(kept >= 0 && kept <= D, "kept: expected 0..", D, ", got ", kept);
    TORCH_CHECK_VALUE(tau > 0 && std::isfinite(tau), "tau: expected a temperature > 0, got ", tau);
    const Tensor labels = labels_.contiguous();
    check_labels(labels, B, K);
    const auto options = image.options().dtype(at::kFloat);
    const Tensor image_faults = at::empty({B}, options.dtype(at::kByte));
    const Tensor text_faults = at::empty({K}, options.dtype(at::kByte));
    Tensor d_image = at::empty({0}, options), d_text = at::empty({0}, options), columns;
    double loss[3];

    EbmJob job{};
    job.image = rows_view("image", image);
    job.text = rows_view("text", text);
    job.normalize_image = normalize_image;
    job.normalize_text = normalize_text;
    job.labels = labels.const_data_ptr<int64_t>();
    job.tau = tau;
    job.weight = weight;
    job.kept = kept;
    job.by_label = by_label;
    job.edit_all = edit_all;
    job.ce_original = ce_original;
    job.renorm = renorm;
    job.loss = loss;
    job.image_faults = image_faults.data_ptr<uint8_t>();
    job.text_faults = text_faults.data_ptr<uint8_t>();
    const int64_t width = round_up(D, PANEL);
    if (wants_image) {
        d_image = at::empty({B, width}, options);
        columns = at::empty({width / PANEL, round_up(K, CHUNK), PANEL}, options);
        job.d_image = d_image.data_ptr<float>();
        job.columns = columns.data_ptr<float>();
    }
    if (wants_text) {
        d_text = at::empty({K, width}, options);
        job.d_text = d_text.data_ptr<float>();
    }
    kernels().ebm(job, pool());
    report("image", "features", image_faults);
    report("text", "features", text_faults);

    const Tensor out = at::empty({3}, options);
    float* to = out.data_ptr<float>();
    for (int i = 0; i < 3; ++i) to[i] = static_cast<float>(loss[i]);
    if (wants_image) d_image = unpadded(d_image, D);
    if (wants_text) d_text = unpadded(d_text, D);
    return {out.select(0, 0).clone(), out.narrow(0, 1, 2).clone(), d_image, d_text};
}

// The same as an operator.
inline std::tuple<Tensor, Tensor, Tensor, Tensor> ebm_loss_operator(
    const Tensor& image, const Tensor& text, const Tensor& labels, double tau, double weight,
    int64_t kept, bool by_label, bool edit_all, bool ce_original, bool renorm, bool normalize_image,
    bool normalize_text, bool wants_image, bool wants_text, std::string_view precision) {
    check_precision(precision);
    return ebm_loss(image, text, labels, tau, weight, kept, by_label, edit_all, ce_original, renorm,
                    normalize_image, normalize_text, wants_image, wants_text);
}

}  // namespace fastood
