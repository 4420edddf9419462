// The patch term of LoCoOp: forward and gradients while similarities are in cache.
//
// Rows go through in blocks. A thread takes some rows of one: their similarities and ranks, and in
// place of the similarities of those that count, the gradient. Then these alone are multiplied into
// the gradient of the text, shared out by classes. The gradients lack one factor until the end,
// when the number of patches that count is known. The order of every sum depends on the data alone,
// never on the threads.
//
// Scratch: 0 packed rows, 2 similarities and gradients, 3 unit rows,
// 5 logarithms, 6 packed gradients and their product, 7 rows as panels.
#pragma once

constexpr float PATCH_SMALL = 1e-5f;  // inside the logarithm, as in the authors' code

constexpr int64_t PATCH_BLOCK = 1008;  // rows whose gradients are held: a multiple of every MR
static_assert(PATCH_BLOCK % MR == 0, "a block is a whole number of register tiles");

struct PatchRun {
    const PatchJob* job;
    Scale scale;
    int64_t block;  // rows of a block
    int64_t width, ld;
    float* g;       // [block][ld] similarities, then gradients
    float* unit;    // [block][width]
    float* spread;  // rows of the patches that count, in panels of columns
    int32_t* kept;  // [block] which of the block these are
    int64_t first, rows, count;
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

// Entropy term of one row of similarities s, which becomes its gradient with respect to the logits:
//   dh/dl_j = p_j (u_j - sum_k p_k u_k),   u_k = log(p_k + e) + p_k / (p_k + e)
static double patch_entropy(float* s, int64_t n, const Scale& scale, bool gradient) {
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
        store(s + k, p);
        z = z + p;
    }
    const vf share = all(static_cast<float>(1.0 / static_cast<double>(sum(z))));
    const vf small = all(PATCH_SMALL);
    vf h{}, pu{};
    for (k = 0; k < padded; k += W) {
        const vf p = load(s + k) * share;
        const vf q = p + small;
        const vf l = log_positive(q);
        h = fma(p, l, h);
        if (!gradient) continue;
        const vf v = l + p / q;
        pu = fma(p, v, pu);
        store(s + k, p);
        store(u + k, v);
    }
    if (gradient) {
        const vf mean = all(sum(pu));
        for (k = 0; k < padded; k += W) store(s + k, load(s + k) * (load(u + k) - mean));
        for (k = padded; k < round_up(n, PANEL); k += W) store(s + k, vf{});
    }
    return sum(h);
}

// Rows from..to of the block: similarities, ranks, entropies, gradients.
static void patch_rows(const PatchRun& run, int64_t from, int64_t to) {
    const PatchJob& job = *run.job;
    const int64_t rows = to - from, inner = round_up(job.local.width, CHUNK);
    const bool gradient = job.d_text != nullptr || job.d_local != nullptr;
    float* packed = scratch(0, rows * inner);
    for (int64_t i = 0; i < rows; ++i) {
        const int64_t patch = run.first + from + i;
        float* row = run.unit + (from + i) * run.width;
        read_row(job.local, patch, 0, job.local.width, run.width, row);
        job.faults[patch] = prepare_row(row, run.width, job.normalize);
        if (job.faults[patch] != kFine) std::memset(row, 0, sizeof(float) * run.width);
        pack_row(row, i, rows, inner, packed);
    }
    float* g = run.g + from * run.ld;
    multiply_panels({packed, rows, inner}, job.panels, round_up(job.K, PANEL), g, run.ld);
    int64_t count = 0;
    for (int64_t i = 0; i < rows; ++i) {
        const int64_t patch = run.first + from + i;
        float* s = g + i * run.ld;
        check_products(job.normalize, s, job.K, job.faults + patch);
        job.rank[patch] = rank_of(s, job.K, s[job.labels[patch / job.P]]);
        job.entropy[patch] = 0;
        if (job.rank[patch] < job.top_k) continue;
        job.entropy[patch] = patch_entropy(s, job.K, run.scale, gradient);
        ++count;
    }
    if (job.d_local == nullptr || count == 0) return;

    const int64_t depth = round_up(job.K, CHUNK);
    float* left = scratch(6, count * (depth + run.width));
    float* out = left + count * depth;
    int64_t at = 0;
    for (int64_t i = 0; i < rows; ++i)
        if (job.rank[run.first + from + i] >= job.top_k)
            pack_row(g + i * run.ld, at++, count, depth, left);
    multiply<false>({left, count, depth}, job.columns, depth * PANEL, run.width, out, run.width);
    for (int64_t i = 0; i < rows; ++i)
        if (job.rank[run.first + from + i] >= job.top_k) {
            std::memcpy(job.d_local + (run.first + from + i) * run.width, out,
                        sizeof(float) * run.width);
            out += run.width;
        }
}

// Adds the gradients of the patches that count to classes from..to of the text, as
// multiply_transposed does, but with the rows of g that these patches have.
static void patch_text(const PatchRun& run, int64_t from, int64_t to) {
    alignas(64) float columns[TRANSPOSED * DEPTH];
    for (int64_t k = 0; k < run.count; k += DEPTH) {
        const int64_t depth = run.count - k < DEPTH ? run.count - k : DEPTH;
        for (int64_t first = from; first < to; first += TRANSPOSED) {
            const int64_t n = to - first < TRANSPOSED ? to - first : TRANSPOSED;
            for (int64_t i = 0; i < depth; ++i) {
                const float* g = run.g + run.kept[k + i] * run.ld + first;
                for (int64_t row = 0; row < n; row += MR) {
                    const int64_t height = n - row < MR ? n - row : MR;
                    std::memcpy(columns + row * depth + i * height, g + row,
                                sizeof(float) * height);
                }
            }
            for (int64_t d = 0; d < run.width; d += NS) {
                const float* b = run.spread + d / PANEL * run.block * PANEL + k * PANEL + d % PANEL;
                for (int64_t row = 0; row < n; row += MR) {
                    const int64_t height = n - row < MR ? n - row : MR;
                    tile_of<Left::kColumns, true>(height)(
                        columns + row * depth, height, b, PANEL, depth,
                        run.job->d_text + (first + row) * run.width + d, run.width);
                }
            }
        }
    }
}

static void patches_kernel(const PatchJob& job, const Pool& pool) {
    PatchRun run{};
    run.job = &job;
    run.scale = make_scale(job.tau);
    run.width = round_up(job.local.width, PANEL);
    run.ld = round_up(job.K, PANEL) + CHUNK;  // 4 KiB apart, rows would share a few lines of L1
    // at most 4 MiB of similarities, or MR rows; a function of K alone
    const int64_t most = (int64_t{1} << 20) / run.ld / MR * MR;
    run.block = most < MR ? MR : most < PATCH_BLOCK ? most : PATCH_BLOCK;
    run.g = scratch(2, run.block * run.ld);
    run.unit = scratch(3, run.block * run.width);
    if (job.d_text != nullptr) run.spread = scratch(7, run.block * run.width);
    int32_t kept[PATCH_BLOCK];
    run.kept = kept;

    double total = 0;
    int64_t count = 0;
    for (run.first = 0; run.first < job.local.count; run.first += run.block) {
        const int64_t left = job.local.count - run.first;
        run.rows = left < run.block ? left : run.block;
        pool.run(
            (run.rows + MR - 1) / MR,
            [](void* context, int64_t begin, int64_t end) {
                const PatchRun& r = *static_cast<const PatchRun*>(context);
                const int64_t stop = end * MR < r.rows ? end * MR : r.rows;
                for (int64_t from = begin * MR; from < stop; from += BLOCK)
                    patch_rows(r, from, stop - from < BLOCK ? stop : from + BLOCK);
            },
            &run);
        run.count = 0;
        for (int64_t i = 0; i < run.rows; ++i) {
            if (job.rank[run.first + i] < job.top_k) continue;
            kept[run.count++] = static_cast<int32_t>(i);
            total += job.entropy[run.first + i];
        }
        count += run.count;
        if (run.count == 0 || job.d_text == nullptr) continue;
        pool.run(
            run.count,
            [](void* context, int64_t begin, int64_t end) {
                const PatchRun& r = *static_cast<const PatchRun*>(context);
                for (int64_t i = begin; i < end; ++i)
                    spread_row(r.unit + r.kept[i] * r.width, i, r.width, r.block * PANEL, r.spread);
            },
            &run);
        pool.run(
            (job.K + MR - 1) / MR,
            [](void* context, int64_t begin, int64_t end) {
                const PatchRun& r = *static_cast<const PatchRun*>(context);
                const int64_t K = r.job->K, to = end * MR < K ? end * MR : K;
                if (begin * MR < to) patch_text(r, begin * MR, to);
            },
            &run);
    }
    *job.value = count > 0 ? total / static_cast<double>(count) : 0.0;
    if (count == 0) return;
    const float by = static_cast<float>(run.scale.inverse / static_cast<double>(count));
    if (job.d_text != nullptr) scale_row(job.d_text, job.K * run.width, by);
    if (job.d_local != nullptr) scale_row(job.d_local, job.local.count * run.width, by);
}
