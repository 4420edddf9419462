// Row statistics and global scores.
#pragma once

#include "common.h"

namespace fastood {

// What to compute of each row, checked once and used for many batches.
struct Plan {
    std::vector<double> taus;
    std::vector<Request> requests;
    int64_t c;
    bool moments;

    // requests: (score, index of its temperature, c, reset, flag)
    Plan(std::vector<double> taus_, const std::vector<std::tuple<int, int, int64_t, double, bool>>& asked,
         int64_t c_, bool moments_)
        : taus(std::move(taus_)), c(c_), moments(moments_) {
        TORCH_CHECK_VALUE(taus.size() <= MAX_TAUS, "tau: expected at most ", MAX_TAUS,
                          " temperatures in one pass, got ", taus.size());
        for (double tau : taus)
            TORCH_CHECK_VALUE(tau > 0 && std::isfinite(tau), "tau: expected a temperature > 0, got ",
                              tau);
        for (const auto& [score, tau, count, reset, flag] : asked) {
            TORCH_CHECK_VALUE(tau >= 0 && tau < static_cast<int>(taus.size()) && count <= c,
                              "requests: out of range of the plan");
            // where a similarity equals its reset the change is zero, not the rounding of the reset
            requests.push_back({static_cast<Score>(score), tau, count,
                                static_cast<double>(static_cast<float>(reset)), flag});
        }
    }
};

struct Statistics {
    Tensor values, index, rest, neg_entropy, variance;
    bool whole = true;  // of exactly c values; otherwise what came with some scores
};

constexpr int64_t HELD = 4;

// (K, D), any float dtype, as float32 rows of unit norm, in the arithmetic of the kernels.
inline Tensor unit_rows(const Tensor& x_, const char* name) {
    const Tensor x = readable(name, x_, 2);
    const Rows rows = rows_view(name, x);
    Tensor out = at::empty(x.sizes(), x.options().dtype(at::kFloat));
    const Tensor faults = at::empty({x.size(0)}, x.options().dtype(at::kByte));
    float* to = out.data_ptr<float>();
    uint8_t* fault = faults.data_ptr<uint8_t>();
    parallel_for(0, x.size(0), 64, [&](int64_t begin, int64_t end) {
        kernels().unit(rows, begin, end - begin, to, fault);
    });
    report(name, "features", faults);
    return out;
}

// (K, D), any float dtype, to panels; rows are checked, and normalised if asked.
inline Tensor pack_text(const Tensor& text_, bool normalize, const char* name) {
    const Tensor text = readable(name, text_, 2);
    const int64_t K = text.size(0), D = text.size(1), panels = round_up(K, PANEL) / PANEL;
    const Rows rows = rows_view(name, text);
    const auto options = text.options().dtype(at::kFloat);
    Tensor out = at::empty({panels, round_up(D, CHUNK), PANEL}, options);
    const Tensor faults = at::empty({K}, options.dtype(at::kByte));
    float* to = out.data_ptr<float>();
    uint8_t* fault = faults.data_ptr<uint8_t>();
    parallel_for(0, panels, 2, [&](int64_t begin, int64_t end) {
        const int64_t first = begin * PANEL, last = end * PANEL < K ? end * PANEL : K;
        kernels().pack(rows, normalize, first, last - first, to, fault);
    });
    report(name, "features", faults);
    return out;
}

// The same for the matrix unit; only where kernels().split is not null.
inline Tensor split_text(const Tensor& text_, bool normalize, const char* name) {
    TORCH_CHECK_VALUE(kernels().split != nullptr, name, ": ", kernels().name, " has no matrix unit");
    const Tensor text = readable(name, text_, 2);
    const int64_t K = text.size(0), panels = round_up(K, PANEL) / PANEL;
    const int64_t slices = round_up(text.size(1), SLICE) / SLICE;
    const Rows rows = rows_view(name, text);
    Tensor out = at::empty({panels, slices, SPLIT_SLICE}, text.options().dtype(at::kShort));
    const Tensor faults = at::empty({K}, text.options().dtype(at::kByte));
    uint16_t* to = reinterpret_cast<uint16_t*>(out.data_ptr<int16_t>());
    uint8_t* fault = faults.data_ptr<uint8_t>();
    parallel_for(0, panels, 2, [&](int64_t begin, int64_t end) {
        const int64_t first = begin * PANEL, last = end * PANEL < K ? end * PANEL : K;
        kernels().split(rows, normalize, first, last - first, to, fault);
    });
    report(name, "features", faults);
    return out;
}

inline void check_split(const Tensor& panels, int64_t K, int64_t D) {
    TORCH_CHECK_VALUE(kernels().split != nullptr && panels.dim() == 3 && panels.is_contiguous() &&
                          panels.size(0) == round_up(K, PANEL) / PANEL &&
                          panels.size(1) == round_up(D, SLICE) / SLICE &&
                          panels.size(2) == SPLIT_SLICE,
                      "text: expected classes split for (", K, ", ", D, ") and a matrix unit, got ",
                      panels.sizes(), " and ", kernels().name);
}

inline void check_panels(const Tensor& panels, int64_t K, int64_t D) {
    TORCH_CHECK_VALUE(panels.dim() == 3 && panels.is_contiguous() && panels.scalar_type() == at::kFloat &&
                          panels.size(0) == round_up(K, PANEL) / PANEL &&
                          panels.size(1) == round_up(D, CHUNK) && panels.size(2) == PANEL,
                      "text: expected classes packed for (", K, ", ", D, "), got ", panels.sizes());
}

struct PackedClasses {
    const float* panels;
    const uint16_t* split;
};

// Classes in either layout, checked.
inline PackedClasses packed_classes(const Tensor& panels, int64_t K, int64_t D) {
    if (panels.scalar_type() == at::kShort) {
        check_split(panels, K, D);
        return {nullptr, reinterpret_cast<const uint16_t*>(panels.const_data_ptr<int16_t>())};
    }
    check_panels(panels, K, D);
    return {panels.const_data_ptr<float>(), nullptr};
}

// One of (image, panels) or similarity. `scores` (R, B) and `statistics` are written if wanted.
// Errors speak of `name`, whose rows are `per_row` rows here (the patches of an image).
inline void run_rows(const Plan& plan, const OptionalTensor& image_, const OptionalTensor& panels,
                     const OptionalTensor& similarity_, int64_t K, bool normalize, Tensor* scores,
                     Statistics* statistics, const std::string& name = "", int64_t per_row = 1) {
    RowJob job{};
    const bool given = similarity_.has_value();
    Tensor x = given ? readable("similarity", *similarity_, 2) : readable("image", *image_, 2);
    if (given) {
        job.similarity = rows_view("similarity", x);
        K = x.size(1);
    } else {
        job.image = rows_view("image", x);
        const PackedClasses classes = packed_classes(*panels, K, x.size(1));
        job.panels = classes.panels;
        job.split = classes.split;
    }
    TORCH_CHECK_VALUE(K >= 1, given ? "similarity" : "text", ": expected at least one class, got K = 0");
    TORCH_CHECK_VALUE(K < (int64_t{1} << 31), "text: expected fewer than 2^31 classes, got ", K);
    TORCH_CHECK_VALUE(plan.c >= 1 && plan.c <= K, "c: expected 1 <= c <= K = ", K, ", got ", plan.c);
    const int64_t B = x.size(0), T = static_cast<int64_t>(plan.taus.size());
    job.normalize = normalize;
    job.K = K;
    // Scores alone hold some top values always: how the rest is summed, hence the last digit of a
    // score, then does not depend on what else is asked.
    const int64_t held = statistics == nullptr || !statistics->whole ? std::max(plan.c, HELD) : plan.c;
    job.c = held < K ? held : K;
    job.T = static_cast<int>(T);
    job.taus = plan.taus.data();
    job.moments = plan.moments;
    const auto options = x.options().dtype(at::kFloat);
    if (scores != nullptr) {
        *scores = at::empty({static_cast<int64_t>(plan.requests.size()), B}, options);
        job.scores = scores->data_ptr<float>();
        job.requests = plan.requests.data();
        job.R = static_cast<int64_t>(plan.requests.size());
    }
    if (statistics != nullptr) {
        Statistics& s = *statistics;
        s.values = at::empty({B, job.c}, options);
        s.index = at::empty({B, job.c}, options.dtype(at::kLong));
        s.rest = at::empty({B, T}, options.dtype(at::kDouble));
        s.neg_entropy = at::empty({B, plan.moments ? T : 0}, options);
        s.variance = at::empty({B, plan.moments ? T : 0}, options);
        job.values = s.values.data_ptr<float>();
        job.index = s.index.data_ptr<int64_t>();
        job.rest = s.rest.data_ptr<double>();
        if (plan.moments) {
            job.neg_entropy = s.neg_entropy.data_ptr<float>();
            job.variance = s.variance.data_ptr<float>();
        }
    }
    const Tensor faults = at::empty({B}, options.dtype(at::kByte));
    job.faults = faults.data_ptr<uint8_t>();
    kernels().rows(job, pool());
    const std::string what = !name.empty() ? name : given ? "similarity" : "image";
    report(what.c_str(), given ? "values" : "features", faults, per_row);
}

// ---------------------------------------------------------------- operators (schemas: ops/rows.py)

using FiveTensors = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

inline FiveTensors tuple_of(const Statistics& s) {
    return {s.values, s.index, s.rest, s.neg_entropy, s.variance};
}

inline FiveTensors row_statistics(const Tensor& image, const Tensor& text,
                                  const OptionalTensor& panels, at::ArrayRef<double> taus,
                                  int64_t c, bool moments, std::string_view precision) {
    check_precision(precision);
    Statistics s;
    run_rows({taus.vec(), {}, c, moments}, image,
             panels.has_value() ? *panels : pack_text(text, false, "text"), {},
             text.size(0), false, nullptr, &s);
    return tuple_of(s);
}

inline FiveTensors similarity_statistics(const Tensor& similarity, at::ArrayRef<double> taus,
                                         int64_t c, bool moments) {
    Statistics s;
    run_rows({taus.vec(), {}, c, moments}, {}, {}, similarity, 0, false, nullptr, &s);
    return tuple_of(s);
}

// The first D columns of a buffer whose rows are padded to a multiple of PANEL.
inline Tensor unpadded(const Tensor& x, int64_t D) {
    return x.size(1) == D ? x : x.narrow(1, 0, D).contiguous();
}

inline Tensor padded_zeros(int64_t rows, int64_t D, const Tensor& like) {
    return at::zeros({rows, round_up(D, PANEL)}, like.options().dtype(at::kFloat));
}

inline RowBackwardJob backward_job(const std::vector<double>& taus, const Tensor& best,
                                   const Tensor& shift, const Tensor& coefficients,
                                   const Tensor& index, const Tensor& tops) {
    TORCH_CHECK_VALUE(best.is_contiguous() && shift.is_contiguous() && coefficients.is_contiguous() &&
                          index.is_contiguous() && tops.is_contiguous(),
                      "row gradients: expected contiguous coefficients");
    RowBackwardJob job{};
    job.T = static_cast<int>(taus.size());
    job.taus = taus.data();
    job.c = index.size(1);
    job.best = best.const_data_ptr<float>();
    job.shift = shift.const_data_ptr<float>();
    job.coefficients = coefficients.const_data_ptr<float>();
    job.index = index.const_data_ptr<int64_t>();
    job.tops = tops.const_data_ptr<float>();
    return job;
}

inline std::tuple<Tensor, Tensor> row_statistics_backward(
    const Tensor& image_, const Tensor& text_, const OptionalTensor& panels_,
    at::ArrayRef<double> taus_, const Tensor& best, const Tensor& shift, const Tensor& coefficients,
    const Tensor& index, const Tensor& tops, bool image_gradient, bool text_gradient) {
    const Tensor image = readable("image", image_, 2);
    const Tensor text = readable("text", text_, 2).to(at::kFloat);
    const Tensor panels = panels_.has_value() ? *panels_ : pack_text(text, false, "text");
    const int64_t B = image.size(0), K = text.size(0), D = image.size(1);
    check_panels(panels, K, D);
    const std::vector<double> taus = taus_.vec();
    RowBackwardJob job = backward_job(taus, best, shift, coefficients, index, tops);
    job.image = rows_view("image", image);
    job.panels = panels.const_data_ptr<float>();
    job.K = K;
    Tensor d_image = at::empty({0}, text.options()), d_text = d_image, columns;
    if (image_gradient) {
        d_image = padded_zeros(B, D, text);
        columns = at::empty({round_up(D, PANEL) / PANEL, round_up(K, CHUNK), PANEL}, text.options());
        kernels().spread(text.const_data_ptr<float>(), text.stride(0), K, D,
                         columns.data_ptr<float>());
        job.columns = columns.const_data_ptr<float>();
        job.d_image = d_image.data_ptr<float>();
    }
    if (text_gradient) {
        d_text = padded_zeros(K, D, text);
        job.d_text = d_text.data_ptr<float>();
    }
    kernels().rows_backward(job, pool());
    if (image_gradient) d_image = unpadded(d_image, D);
    if (text_gradient) d_text = unpadded(d_text, D);
    return {d_image, d_text};
}

inline Tensor similarity_statistics_backward(const Tensor& similarity_, at::ArrayRef<double> taus_,
                                             const Tensor& best, const Tensor& shift,
                                             const Tensor& coefficients, const Tensor& index,
                                             const Tensor& tops) {
    const Tensor similarity = readable("similarity", similarity_, 2);
    const std::vector<double> taus = taus_.vec();
    RowBackwardJob job = backward_job(taus, best, shift, coefficients, index, tops);
    job.similarity = rows_view("similarity", similarity);
    job.K = similarity.size(1);
    Tensor out = at::empty(similarity.sizes(), similarity.options().dtype(at::kFloat));
    job.d_similarity = out.data_ptr<float>();
    kernels().rows_backward(job, pool());
    return out;
}

}  // namespace fastood
