// The patch term of the LoCoOp loss.
#pragma once

#include "../cpu/patch_job.h"
#include "grouped.h"

namespace fastood {

// value, rank (B, P), d_text (K, D), d_local (B, P, D): see ops/patches.py
inline std::tuple<Tensor, Tensor, Tensor, Tensor> patch_entropy(
    const Tensor& local_, const Tensor& text_, const Tensor& labels_, int64_t top_k, double tau,
    bool normalize, bool text_gradient, bool local_gradient, std::string_view precision) {
    check_precision(precision);
    const Tensor local = local_.stride(-1) == 1 || local_.size(-1) <= 1 ? local_
                                                                        : local_.contiguous();
    TORCH_CHECK_VALUE(local.dim() == 3, "local: expected shape (B, P, D), got ", local.sizes());
    const int64_t B = local.size(0), P = local.size(1), D = local.size(2), N = B * P;
    const Tensor flat = readable("local", local.reshape({N, D}), 2);
    const Tensor text = readable("text", text_, 2).to(at::kFloat);
    const int64_t K = text.size(0);
    const Tensor panels = pack_text(text, false, "text");
    check_panels(panels, K, D);
    const Tensor labels = labels_.to(at::kLong).contiguous();
    TORCH_CHECK_VALUE(labels.dim() == 1 && labels.size(0) == B, "labels: expected (", B, ",), got ",
                      labels.sizes());
    const int64_t* y = labels.const_data_ptr<int64_t>();
    for (int64_t i = 0; i < B; ++i)
        TORCH_CHECK_VALUE(y[i] >= 0 && y[i] < K, "labels: expected values in 0..", K - 1,
                          " (K = ", K, "), got ", y[i]);
    TORCH_CHECK_VALUE(tau > 0 && std::isfinite(tau), "tau: expected a temperature > 0, got ", tau);
    const auto options = text.options();
    const Tensor rank = at::empty({B, P}, options.dtype(at::kInt));
    const Tensor entropy = at::empty({N}, options.dtype(at::kDouble));
    const Tensor faults = at::empty({N}, options.dtype(at::kByte));
    Tensor d_text = at::empty({0}, options), d_local = at::empty({0}, options), columns;
    double value = 0;
    PatchJob job{};
    job.local = rows_view("local", flat);
    job.normalize = normalize;
    job.panels = panels.const_data_ptr<float>();
    job.K = K;
    job.labels = y;
    job.P = P;
    job.top_k = top_k;
    job.tau = tau;
    job.rank = rank.data_ptr<int32_t>();
    job.entropy = entropy.data_ptr<double>();
    job.value = &value;
    job.faults = faults.data_ptr<uint8_t>();
    if (text_gradient) {
        d_text = padded_zeros(K, D, text);
        job.d_text = d_text.data_ptr<float>();
    }
    if (local_gradient) {
        columns = columns_of(text);
        d_local = padded_zeros(N, D, text);
        job.columns = columns.const_data_ptr<float>();
        job.d_local = d_local.data_ptr<float>();
    }
    kernels().patches(job, pool());
    report("local", "features", faults, P);
    if (text_gradient) d_text = unpadded(d_text, D);
    if (local_gradient) d_local = unpadded(d_local, D).view({B, P, D});
    const Tensor mean = at::empty({}, options);
    *mean.data_ptr<float>() = static_cast<float>(value);
    return {mean, rank, d_text, d_local};
}

}  // namespace fastood
