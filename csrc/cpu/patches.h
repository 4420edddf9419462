// The patch term of LoCoOp: forward and gradients while similarities are in cache.
//
// Rows go through in blocks. First their similarities and ranks; then, for those that count alone,
// entropy and gradient, written row after row to `g`; and when enough of these are together, they
// are multiplied into the gradient of the text, shared out by classes. The gradients lack one
// factor until the end, when the number of patches that count is known. The order of every sum
// depends on the data alone, never on the threads.
//
// Scratch: 0 packed rows, 1 one row, 2 gradients, 3 unit rows, 4 similarities, 5 logarithms,
// 6 packed gradients and their product, 7 rows as panels.
#pragma once

constexpr float PATCH_SMALL = 1e-5f;  // inside the logarithm, as in the authors' code

struct PatchRun {
    const PatchJob* job;
    Scale scale;
    int64_t block;   // rows whose similarities are held
    int64_t room;    // rows of g
    int64_t width, ld;
    float* s;        // [block][ld]
    float* unit;     // [block][width]
    float* g;        // [room][ld]
    float* spread;   // rows of g's patches in panels of columns
    int64_t first, rows;
    int64_t kept;    // rows of g in use
    int64_t chosen;  // of them, from this block
    int32_t* chosen_rows;
};

// How many of s[0:n] lie above `own`; s is readable up to a multiple of W and padded with anything.
static inline int32_t rank_of(const float* s, int64_t n, float own) {
    lanes_i32 count{};
    const vf at = all(own);
    int64_t k = 0;
    for (; k + W <= n; k += W) count = count - (lanes_i32)(load(s + k) > at);
    if (k < n) count = count - ((lanes_i32)(load(s + k) > at) & first_lanes(n - k));
    int32_t total = 0;
    for (int i = 0; i < W; ++i) total += count[i];
    return total;
}

// Entropy term of one row, and if wanted its gradient with respect to the logits in g:
//   dh/dl_j = p_j (u_j - sum_k p_k u_k),   u_k = log(p_k + e) + p_k / (p_k + e)
static double patch_entropy(const float* s, int64_t n, const Scale& scale, bool gradient,
                            float* g) {
    float* u = scratch(5, round_up(n, W));
    const int64_t padded = round_up(n, W);
    vf high = all(-INFINITY);
    int64_t k = 0;
    for (; k + W <= n; k += W) high = larger(high, load(s + k));
    float shift = largest(high);
    for (; k < n; ++k) shift = s[k] > shift ? s[k] : shift;

    const vf at = all(shift), hi = all(scale.hi), lo = all(scale.lo), low = all(scale.lowest);
    vf z{};
    for (k = 0; k < padded; k += W) {
        vf p = exp_scaled(larger(load(s + k) - at, low), hi, lo);
        if (k + W > n) p = keep<true>(p, first_lanes(n - k));
        store(g + k, p);
        z = z + p;
    }
    const vf share = all(static_cast<float>(1.0 / static_cast<double>(sum(z))));
    const vf small = all(PATCH_SMALL);
    vf h{}, pu{};
    for (k = 0; k < padded; k += W) {
        const vf p = load(g + k) * share;
        const vf q = p + small;
        const vf l = log_positive(q);
        h = fma(p, l, h);
        if (!gradient) continue;
        const vf v = l + p / q;
        pu = fma(p, v, pu);
        store(g + k, p);
        store(u + k, v);
    }
    if (gradient) {
        const vf mean = all(sum(pu));
        for (k = 0; k < padded; k += W) store(g + k, load(g + k) * (load(u + k) - mean));
        for (k = padded; k < round_up(n, PANEL); k += W) store(g + k, vf{});
    }
    return sum(h);
}

// Rows begin..end (in units of MR) of the block: similarities and ranks.
static void patch_ranks(const PatchRun& run, int64_t begin, int64_t end) {
    const PatchJob& job = *run.job;
    const int64_t from = begin * MR, to = end * MR < run.rows ? end * MR : run.rows;
    if (from >= to) return;
    const int64_t rows = to - from, inner = round_up(job.local.width, CHUNK);
    float* packed = scratch(0, rows * inner);
    for (int64_t i = 0; i < rows; ++i) {
        const int64_t patch = run.first + from + i;
        float* row = run.unit + (from + i) * run.width;
        read_row(job.local, patch, 0, job.local.width, run.width, row);
        job.faults[patch] = prepare_row(row, run.width, job.normalize);
        if (job.faults[patch] != kFine) std::memset(row, 0, sizeof(float) * run.width);
        pack_row(row, i, rows, inner, packed);
    }
    float* s = run.s + from * run.ld;
    multiply_panels({packed, rows, inner}, job.panels, round_up(job.K, PANEL), s, run.ld);
    for (int64_t i = 0; i < rows; ++i, s += run.ld) {
        const int64_t patch = run.first + from + i;
        job.rank[patch] = rank_of(s, job.K, s[job.labels[patch / job.P]]);
    }
}

// Patches begin..end of those of the block that count.
static void patch_gradients(const PatchRun& run, int64_t begin, int64_t end) {
    const PatchJob& job = *run.job;
    const bool gradient = job.d_text != nullptr || job.d_local != nullptr;
    for (int64_t i = begin; i < end; ++i) {
        const int64_t row = run.chosen_rows[i], at = run.kept + i;
        job.entropy[run.first + row] =
            patch_entropy(run.s + row * run.ld, job.K, run.scale, gradient, run.g + at * run.ld);
        if (job.d_text != nullptr)
            spread_row(run.unit + row * run.width, at, run.width, run.room * PANEL, run.spread);
    }
    if (job.d_local == nullptr) return;
    const int64_t rows = end - begin, depth = round_up(job.K, CHUNK);
    float* packed = scratch(6, rows * (depth + run.width));
    float* out = packed + rows * depth;
    for (int64_t i = 0; i < rows; ++i)
        pack_row(run.g + (run.kept + begin + i) * run.ld, i, rows, depth, packed);
    multiply<false>({packed, rows, depth}, job.columns, depth * PANEL, run.width, out, run.width);
    for (int64_t i = 0; i < rows; ++i)
        std::memcpy(job.d_local + (run.first + run.chosen_rows[begin + i]) * run.width,
                    out + i * run.width, sizeof(float) * run.width);
}

// Adds what g holds to the gradient of the text.
static void patch_flush(PatchRun& run, const Pool& pool) {
    if (run.kept > 0 && run.job->d_text != nullptr)
        pool.run(
            (run.job->K + MR - 1) / MR,
            [](void* context, int64_t begin, int64_t end) {
                const PatchRun& r = *static_cast<const PatchRun*>(context);
                const int64_t from = begin * MR, K = r.job->K;
                const int64_t to = end * MR < K ? end * MR : K;
                if (from < to)
                    multiply_transposed(r.g + from, r.ld, r.kept, to - from, r.spread,
                                        r.room * PANEL, r.width, r.job->d_text + from * r.width,
                                        r.width);
            },
            &run);
    run.kept = 0;
}

static void patches_kernel(const PatchJob& job, const Pool& pool) {
    PatchRun run{};
    run.job = &job;
    run.scale = make_scale(job.tau);
    run.width = round_up(job.local.width, PANEL);
    run.ld = round_up(job.K, PANEL);
    // at most 2 MiB of similarities, or MR rows; a function of K alone
    const int64_t most = (int64_t{1} << 19) / run.ld / MR * MR, bound = DEPTH / MR * MR;
    run.block = most < MR ? MR : most < bound ? most : bound;
    run.room = 2 * run.block;
    const bool text = job.d_text != nullptr;
    run.s = scratch(4, run.block * run.ld);
    run.unit = scratch(3, run.block * run.width);
    run.g = scratch(2, run.room * run.ld);
    if (text) run.spread = scratch(7, run.room * run.width);
    int32_t chosen_rows[DEPTH];
    run.chosen_rows = chosen_rows;

    double total = 0;
    int64_t count = 0;
    for (run.first = 0; run.first < job.local.count; run.first += run.block) {
        const int64_t left = job.local.count - run.first;
        run.rows = left < run.block ? left : run.block;
        pool.run(
            (run.rows + MR - 1) / MR,
            [](void* context, int64_t begin, int64_t end) {
                patch_ranks(*static_cast<const PatchRun*>(context), begin, end);
            },
            &run);
        run.chosen = 0;
        for (int64_t i = 0; i < run.rows; ++i) {
            job.entropy[run.first + i] = 0;
            if (job.rank[run.first + i] >= job.top_k) chosen_rows[run.chosen++] = static_cast<int32_t>(i);
        }
        if (run.chosen == 0) continue;
        pool.run(
            run.chosen,
            [](void* context, int64_t begin, int64_t end) {
                patch_gradients(*static_cast<const PatchRun*>(context), begin, end);
            },
            &run);
        for (int64_t i = 0; i < run.chosen; ++i) total += job.entropy[run.first + chosen_rows[i]];
        count += run.chosen;
        run.kept += run.chosen;
        if (run.kept > run.room - run.block) patch_flush(run, pool);
    }
    patch_flush(run, pool);
    *job.value = count > 0 ? total / static_cast<double>(count) : 0.0;
    if (count == 0) return;
    const float by = static_cast<float>(run.scale.inverse / static_cast<double>(count));
    if (job.d_text != nullptr) scale_row(job.d_text, job.K * run.width, by);
    if (job.d_local != nullptr) scale_row(job.d_local, job.local.count * run.width, by);
}
