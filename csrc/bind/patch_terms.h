// Ranks and entropies of patches, without gradients.
#pragma once

#include "../cpu/patch_terms_job.h"
#include "rows.h"

namespace fastood {

// rank, tied, entropy, all (N,): see ops/patchterms.py
inline std::tuple<Tensor, Tensor, Tensor> patch_terms(const Tensor& local_, const Tensor& weight_,
                                                      const OptionalTensor& panels_,
                                                      const OptionalTensor& bias_,
                                                      const Tensor& labels_, int64_t top_k) {
    const Tensor local = readable("local", local_, 2), weight = readable("weight", weight_, 2);
    const int64_t N = local.size(0), D = local.size(1), K = weight.size(0);
    TORCH_CHECK_VALUE(weight.size(1) == D, "weight: expected (K, ", D, "), got ", weight.sizes());
    TORCH_CHECK_VALUE(K >= 1 && K < (int64_t{1} << 31), "weight: expected 1 to 2^31 classes, got ", K);
    const Tensor panels = panels_.has_value() ? *panels_
                          : kernels().split != nullptr ? split_text(weight, false, "weight")
                                                       : pack_text(weight, false, "weight");
    const PackedClasses classes = packed_classes(panels, K, D);
    const Tensor labels = labels_.to(at::kLong).contiguous();
    TORCH_CHECK_VALUE(labels.dim() == 1 && labels.size(0) == N, "labels: expected (", N, ",), got ",
                      labels.sizes());
    const int64_t* y = labels.const_data_ptr<int64_t>();
    for (int64_t i = 0; i < N; ++i)
        TORCH_CHECK_VALUE(y[i] >= 0 && y[i] < K, "labels: expected values in 0..", K - 1,
                          " (K = ", K, "), got ", y[i]);
    Tensor bias;
    const auto options = local.options();
    const Tensor rank = at::empty({N}, options.dtype(at::kInt));
    const Tensor tied = at::empty({N}, options.dtype(at::kBool));
    const Tensor entropy = at::empty({N}, options.dtype(at::kDouble));
    const Tensor faults = at::empty({N}, options.dtype(at::kByte));
    PatchTermsJob job{};
    if (bias_.has_value()) {
        bias = readable("bias", *bias_, 1).to(at::kFloat).contiguous();
        TORCH_CHECK_VALUE(bias.size(0) == K, "bias: expected (", K, ",), got ", bias.sizes());
        job.bias = bias.const_data_ptr<float>();
    }
    job.local = rows_view("local", local);
    job.panels = classes.panels;
    job.split = classes.split;
    job.K = K;
    job.labels = y;
    job.top_k = top_k;
    job.rank = rank.data_ptr<int32_t>();
    job.tied = tied.data_ptr<bool>();
    job.entropy = entropy.data_ptr<double>();
    job.faults = faults.data_ptr<uint8_t>();
    kernels().patch_terms(job, pool());
    report("local", "features", faults);
    return {rank, tied, entropy};
}

}  // namespace fastood
