// Gradients of row statistics: the similarities are computed again, block by block, turned into
// their gradient in place, and multiplied on. No (B, K) array, and no sum over rows whose order
// depends on the threads: rows are shared out for d_image, classes for d_text.
#pragma once

constexpr int64_t GRADIENT_ROWS = 256;  // rows between two additions to d_text

struct BackwardRun {
    const RowBackwardJob* job;
    const Scale* scales;
    float* s;       // [GRADIENT_ROWS][ld], similarities and then their gradient
    float* spread;  // the rows of the image in panels of columns
    int64_t first, rows, class_first, classes, span, ld, width;
};

// Turns s[0:n], classes class_first.. of one row, into the gradient.
static void gradient_of_span(const RowBackwardJob& job, const Scale* scales, int64_t row,
                             int64_t class_first, int64_t n, float* s) {
    const float* coefficients = job.coefficients + row * job.T * 3;
    const float* shift = job.shift + row * job.T;
    const vf best = all(job.best[row]);
    for (int64_t k = 0; k < n; k += W) {
        const vf x = load(s + k), above = x - best;
        vf g{};
        for (int t = 0; t < job.T; ++t) {
            const Scale& scale = scales[t];
            const vf a = all(coefficients[3 * t]), b = all(coefficients[3 * t + 1]),
                     e2 = all(coefficients[3 * t + 2]);
            const vf y = larger(x - all(shift[t]), all(scale.lowest));
            const vf p = exp_scaled(y, all(scale.hi), all(scale.lo));
            const vf d = above * all(static_cast<float>(scale.inverse));
            g = fma(p, fma(e2, p, fma(b, d, a)), g);
        }
        store(s + k, g);
    }
    for (int64_t j = 0; j < job.c; ++j) {
        const int64_t k = job.index[row * job.c + j] - class_first;
        if (k >= 0 && k < n) s[k] = job.tops[row * job.c + j];
    }
    for (int64_t k = n; k < round_up(n, PANEL); ++k) s[k] = 0.0f;  // a multiply reads that far
}

// s[rows, columns] = the similarities of rows first..first+rows again. `spread`, unless null, receives
// the rows in panels of columns as rows from.. of a block of GRADIENT_ROWS.
static void products_again(const Rows& image, int64_t first, int64_t rows, const float* panels,
                           int64_t columns, float* s, int64_t ld, int64_t from, float* spread) {
    const int64_t inner = round_up(image.width, CHUNK), width = round_up(image.width, PANEL);
    float* row = scratch(1, width);
    float* packed = scratch(0, rows * inner);
    for (int64_t i = 0; i < rows; ++i) {
        read_row(image, first + i, 0, image.width, width, row);
        pack_row(row, i, rows, inner, packed);
        if (spread != nullptr) spread_row(row, from + i, width, GRADIENT_ROWS * PANEL, spread);
    }
    multiply_panels({packed, rows, inner}, panels, round_up(columns, PANEL), s, ld);
}

// Rows begin..end (in units of MR) of the block: gradient of the similarities, then of the image.
static void backward_rows(const BackwardRun& run, int64_t begin, int64_t end) {
    const RowBackwardJob& job = *run.job;
    const int64_t from = begin * MR, to = end * MR < run.rows ? end * MR : run.rows;
    if (from >= to) return;
    const int64_t rows = to - from, n = run.classes;
    float* s = run.s + from * run.ld;
    const bool spread = run.class_first == 0 && job.d_text != nullptr;
    products_again(job.image, run.first + from, rows,
                   job.panels + run.class_first * round_up(job.image.width, CHUNK), n, s, run.ld,
                   from, spread ? run.spread : nullptr);
    for (int64_t i = 0; i < rows; ++i)
        gradient_of_span(job, run.scales, run.first + from + i, run.class_first, n,
                         s + i * run.ld);
    if (job.d_image == nullptr) return;
    const int64_t depth = round_up(n, CHUNK);
    float* gradient = scratch(6, rows * depth);
    for (int64_t i = 0; i < rows; ++i) pack_row(s + i * run.ld, i, rows, depth, gradient);
    float* out = job.d_image + (run.first + from) * run.width;
    if (run.class_first == 0) std::memset(out, 0, sizeof(float) * rows * run.width);
    multiply<true>({gradient, rows, depth}, job.columns + run.class_first * PANEL,
                   round_up(job.K, CHUNK) * PANEL, run.width, out, run.width);
}

static void backward_of_given(const RowBackwardJob& job, const Scale* scales, int64_t begin,
                              int64_t end) {
    const int64_t span = span_of(job.K);
    float* s = scratch(4, span);
    for (int64_t i = begin; i < end; ++i)
        for (int64_t k = 0; k < job.K; k += span) {
            const int64_t n = job.K - k < span ? job.K - k : span;
            read_row(job.similarity, i, k, n, round_up(n, W), s);
            gradient_of_span(job, scales, i, k, n, s);
            std::memcpy(job.d_similarity + i * job.K + k, s, sizeof(float) * n);
        }
}

static void rows_backward_kernel(const RowBackwardJob& job, const Pool& pool) {
    Scale scales[MAX_TAUS];
    for (int t = 0; t < job.T; ++t) scales[t] = make_scale(job.taus[t]);
    BackwardRun run{};
    run.job = &job;
    run.scales = scales;
    if (job.panels == nullptr) {
        pool.run(
            job.similarity.count,
            [](void* context, int64_t begin, int64_t end) {
                const BackwardRun& r = *static_cast<const BackwardRun*>(context);
                backward_of_given(*r.job, r.scales, begin, end);
            },
            &run);
        return;
    }
    run.span = span_of(job.K);
    run.width = round_up(job.image.width, PANEL);
    run.ld = run.span + CHUNK;  // a stride of 4 kB would put all rows into a few sets of the cache
    run.s = scratch(4, GRADIENT_ROWS * run.ld);
    run.spread = scratch(7, GRADIENT_ROWS * run.width);
    for (run.first = 0; run.first < job.image.count; run.first += GRADIENT_ROWS) {
        const int64_t left = job.image.count - run.first;
        run.rows = left < GRADIENT_ROWS ? left : GRADIENT_ROWS;
        for (run.class_first = 0; run.class_first < job.K; run.class_first += run.span) {
            run.classes = job.K - run.class_first < run.span ? job.K - run.class_first : run.span;
            pool.run(
                (run.rows + MR - 1) / MR,
                [](void* context, int64_t begin, int64_t end) {
                    backward_rows(*static_cast<const BackwardRun*>(context), begin, end);
                },
                &run);
            if (job.d_text == nullptr) continue;
            pool.run(
                (run.classes + MR - 1) / MR,
                [](void* context, int64_t begin, int64_t end) {
                    const BackwardRun& r = *static_cast<const BackwardRun*>(context);
                    const int64_t from = begin * MR;
                    const int64_t to = end * MR < r.classes ? end * MR : r.classes;
                    if (from < to)
                        multiply_transposed(r.s + from, r.ld, r.rows, to - from, r.spread,
                                            GRADIENT_ROWS * PANEL, r.width,
                                            r.job->d_text + (r.class_first + from) * r.width,
                                            r.width);
                },
                &run);
        }
    }
}
