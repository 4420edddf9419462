// Gradients of grouped scores. With x_g = lse(l) - lse(n_g), v_g = sigmoid'(x_g) / (G tau) and
// softmax weights p over the classes, q over a group:
//   dL/ds_k = (sum_g v_g) p_k,   dL/dn_j = -v_g q_j
// Similarities are computed again, block by block, as in backward.h: rows are shared out for
// d_image, classes and negatives for their own gradients.
//
// Scratch: 0 packed rows, 1 one row, 4 similarities, 6 packed gradient, 7 rows as panels.
#pragma once

// One of the two factors of the image: the classes, or the negatives.
struct GroupedSide {
    const float* panels;
    const float* columns;
    int64_t count;  // K, or G * m
    float* gradient;
    bool negative;
};

struct GroupedBackwardRun {
    const GroupedBackwardJob* job;
    Scale scale;
    GroupedSide side;
    float* s;       // [GRADIENT_ROWS][ld], similarities and then their gradient
    float* spread;  // the rows of the image in panels of columns
    int64_t first, rows, column, columns, span, ld, width;
};

// s[0:n] becomes factor * softmax(s / tau), given the log-sum-exp over all that it is a part of.
static inline void weighted_softmax(float* s, int64_t n, double lse, double factor, double tau,
                                    const Scale& scale) {
    const float shift = static_cast<float>(lse * tau);
    const float by = static_cast<float>(factor * __builtin_exp(shift * scale.inverse - lse));
    const vf at = all(shift), hi = all(scale.hi), lo = all(scale.lo), low = all(scale.lowest);
    for (int64_t k = 0; k < n; k += W) {
        const vf p = exp_scaled(larger(load(s + k) - at, low), hi, lo) * all(by);
        if (k + W <= n) {
            store(s + k, p);
        } else {
            float last[W];
            store(last, p);
            std::memcpy(s + k, last, sizeof(float) * (n - k));
        }
    }
}

static inline double slope(double lse_classes, double lse_group) {
    const double e = __builtin_exp(-__builtin_fabs(lse_classes - lse_group));
    return e / ((1 + e) * (1 + e));
}

// Turns s[0:n], columns `column`.. of one row, into the gradient.
static void grouped_gradient(const GroupedBackwardRun& run, int64_t row, float* s, int64_t n) {
    const GroupedBackwardJob& job = *run.job;
    const double* lse = job.lse + row * (job.G + 1);
    const double weight = job.upstream[row] * run.scale.inverse / job.G;
    if (!run.side.negative) {
        double slopes = 0;
        for (int64_t g = 0; g < job.G; ++g) slopes += slope(lse[0], lse[1 + g]);
        weighted_softmax(s, n, lse[0], weight * slopes, job.tau, run.scale);
    } else {
        for (int64_t j = 0; j < n;) {
            const int64_t g = (run.column + j) / job.m, offset = (run.column + j) % job.m;
            const int64_t piece = job.m - offset < n - j ? job.m - offset : n - j;
            weighted_softmax(s + j, piece, lse[1 + g], -weight * slope(lse[0], lse[1 + g]),
                             job.tau, run.scale);
            j += piece;
            if (g >= job.full && offset + piece == job.m) s[j - 1] = 0.0f;
        }
    }
    for (int64_t k = n; k < round_up(n, PANEL); ++k) s[k] = 0.0f;  // a multiply reads that far
}

// Rows begin..end (in units of MR) of the block: gradient of the similarities, then of the image.
static void grouped_backward_rows(const GroupedBackwardRun& run, int64_t begin, int64_t end) {
    const GroupedBackwardJob& job = *run.job;
    const int64_t from = begin * MR, to = end * MR < run.rows ? end * MR : run.rows;
    if (from >= to) return;
    const int64_t rows = to - from, n = run.columns;
    float* s = run.s + from * run.ld;
    const bool spread = run.column == 0 && run.side.gradient != nullptr;
    products_again(job.image, run.first + from, rows,
                   run.side.panels + run.column * round_up(job.image.width, CHUNK), n, s, run.ld,
                   from, spread ? run.spread : nullptr);
    for (int64_t i = 0; i < rows; ++i)
        grouped_gradient(run, run.first + from + i, s + i * run.ld, n);
    if (job.d_image == nullptr) return;
    const int64_t depth = round_up(n, CHUNK);
    float* gradient = scratch(6, rows * depth);
    for (int64_t i = 0; i < rows; ++i) pack_row(s + i * run.ld, i, rows, depth, gradient);
    float* out = job.d_image + (run.first + from) * run.width;
    if (run.column == 0 && !run.side.negative)
        std::memset(out, 0, sizeof(float) * rows * run.width);
    multiply<true>({gradient, rows, depth}, run.side.columns + run.column * PANEL,
                   round_up(run.side.count, CHUNK) * PANEL, run.width, out, run.width);
}

static void grouped_backward_kernel(const GroupedBackwardJob& job, const Pool& pool) {
    GroupedBackwardRun run{};
    run.job = &job;
    run.scale = make_scale(job.tau);
    const GroupedSide sides[2] = {
        {job.panels, job.columns, job.K, job.d_text, false},
        {job.negatives, job.negative_columns, job.G * job.m, job.d_negatives, true},
    };
    const int64_t spans[2] = {span_of(sides[0].count), span_of(sides[1].count)};
    run.width = round_up(job.image.width, PANEL);
    run.s = scratch(4, GRADIENT_ROWS * ((spans[0] > spans[1] ? spans[0] : spans[1]) + CHUNK) + W);
    run.spread = scratch(7, GRADIENT_ROWS * run.width);
    for (run.first = 0; run.first < job.image.count; run.first += GRADIENT_ROWS) {
        const int64_t left = job.image.count - run.first;
        run.rows = left < GRADIENT_ROWS ? left : GRADIENT_ROWS;
        for (int which = 0; which < 2; ++which) {
            run.side = sides[which];
            run.span = spans[which];
            run.ld = run.span + CHUNK;  // 4 KiB apart, rows would share a few lines of L1
            const GroupedSide& side = run.side;
            if (side.gradient == nullptr && job.d_image == nullptr) continue;
            for (run.column = 0; run.column < side.count; run.column += run.span) {
                run.columns = side.count - run.column < run.span ? side.count - run.column
                                                                 : run.span;
                pool.run(
                    (run.rows + MR - 1) / MR,
                    [](void* context, int64_t begin, int64_t end) {
                        grouped_backward_rows(*static_cast<const GroupedBackwardRun*>(context),
                                              begin, end);
                    },
                    &run);
                if (side.gradient == nullptr) continue;
                pool.run(
                    (run.columns + MR - 1) / MR,
                    [](void* context, int64_t begin, int64_t end) {
                        const GroupedBackwardRun& r =
                            *static_cast<const GroupedBackwardRun*>(context);
                        const int64_t from = begin * MR;
                        const int64_t to = end * MR < r.columns ? end * MR : r.columns;
                        if (from < to)
                            multiply_transposed(r.s + from, r.ld, r.rows, to - from, r.spread,
                                                GRADIENT_ROWS * PANEL, r.width,
                                                r.side.gradient + (r.column + from) * r.width,
                                                r.width);
                    },
                    &run);
            }
        }
    }
}
