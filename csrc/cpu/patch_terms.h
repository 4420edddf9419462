// Ranks and entropies of patches while their logits are in cache: `patches.h` without gradients, with
// the products of the matrix unit where there is one, and with equal logits told apart.
//
// Scratch: 0, 1, 6 rows made ready, 4 logits, 5 as `patch_entropy`.
#pragma once

constexpr int64_t TERMS_BLOCK = int64_t{1} << 18;  // most logits at once, if K allows: 1 MiB

// How many of s[0:n] lie above `own` and how many are equal to it; s is readable up to a multiple
// of W and padded with anything.
static inline void above_and_equal(const float* s, int64_t n, float own, int64_t* above,
                                   int64_t* equal) {
    lanes_i32 more{}, same{};
    const vf at = all(own);
    int64_t k = 0;
    for (; k + W <= n; k += W) {
        const vf x = load(s + k);
        more = more - (lanes_i32)(x > at);
        same = same - (lanes_i32)(x == at);
    }
    if (k < n) {
        const vf x = load(s + k);
        more = more - ((lanes_i32)(x > at) & first_lanes(n - k));
        same = same - ((lanes_i32)(x == at) & first_lanes(n - k));
    }
    *above = *equal = 0;
    for (int i = 0; i < W; ++i) {
        *above += more[i];
        *equal += same[i];
    }
}

static void terms_of_block(const PatchTermsJob& job, const Scale& scale, int64_t first,
                           int64_t rows) {
    const int64_t ld = round_up(job.K, PANEL) + CHUNK;  // as in patches.h
    float* logits = scratch(4, rows * ld);
    const LeftRows left =
        left_rows(job.local, false, job.split != nullptr, first, rows, job.faults);
    products(left, {job.panels, job.split}, 0, job.K, logits, ld);
    for (int64_t i = 0; i < rows; ++i) {
        const int64_t row = first + i;
        float* s = logits + i * ld;
        if (job.bias != nullptr)
            for (int64_t k = 0; k < job.K; ++k) s[k] += job.bias[k];
        if (job.faults[row] == kZero) job.faults[row] = kFine;  // no direction is asked for
        check_products(false, s, job.K, job.faults + row);
        const int64_t label = job.labels[row];
        int64_t above, equal, rank;
        above_and_equal(s, job.K, s[label], &above, &equal);
        rank = above;
        if (equal > 1)
            for (int64_t k = 0; k < label; ++k) rank += s[k] == s[label];
        job.rank[row] = static_cast<int32_t>(rank);
        job.tied[row] = above < job.top_k && above + equal > job.top_k;
        job.entropy[row] = rank < job.top_k ? 0.0 : patch_entropy(s, job.K, scale, false);
    }
}

struct PatchTermsRun {
    const PatchTermsJob* job;
    Scale scale;
    int64_t unit, most;
};

static void patch_terms_kernel(const PatchTermsJob& job, const Pool& pool) {
    PatchTermsRun run{};
    run.job = &job;
    run.scale = make_scale(1.0);
    run.unit = unit_of_rows(job.split != nullptr);
    const int64_t fit = TERMS_BLOCK / (round_up(job.K, PANEL) + CHUNK) / run.unit * run.unit;
    run.most = fit < run.unit ? run.unit : fit;
    pool.run(
        (job.local.count + run.unit - 1) / run.unit,
        [](void* context, int64_t begin, int64_t end) {
            const PatchTermsRun& r = *static_cast<const PatchTermsRun*>(context);
            const int64_t N = r.job->local.count;
            const int64_t start = begin * r.unit, stop = end * r.unit < N ? end * r.unit : N;
            int64_t rows = rows_of_a_block(stop - start, r.unit);
            if (rows > r.most) rows = r.most;
            for (int64_t first = start; first < stop; first += rows)
                terms_of_block(*r.job, r.scale, first, stop - first < rows ? stop - first : rows);
        },
        &run);
}
