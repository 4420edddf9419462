// The energy-bound loss, with its gradients in the same pass: the loss is a number, so all that the
// way back has to do is to scale them. The similarities of a block of rows are turned into their
// gradient where they lie; there is no (B, K) array. Blocks are cut by the shape alone, and a row
// of d_text is summed by one thread in order of rows.
//
// The classes are packed a few panels at a time, right before they are multiplied: training changes
// them in every step, and pages fresh from the system for all of them would cost more than packing.
//
// Scratch of the caller: 0 packed rows, 2 states, 4 similarities, 7 rows as right factors.
// Of each thread: 3 rows, 5 panels or the gradient through masks, 6 packed gradients.
#pragma once

constexpr int64_t EBM_ROWS = 256;               // rows in a block, a multiple of DEPTH if K allows
constexpr int64_t EBM_NUMBERS = int64_t{1} << 20;  // similarities of a block: 4 MB
constexpr int64_t EBM_PANELS = 4;               // packed together
constexpr int64_t EBM_CLASSES = 4 * MR;         // rows of d_text at a time

// What a row leaves for the sums over rows.
struct EbmRow {
    double loss, best, rise;  // best: p_y1; rise: st - s_y1
    int64_t y1;
    double from_masked;       // d loss / d st, if y1 alone is edited
    float scale;              // of the masked row: 1, or what gives it unit norm
};

struct EbmRun {
    const EbmJob* job;
    Scale scale;
    int64_t first, rows, block;             // rows of the batch, and the most there are
    int64_t inner, width, stride;           // D padded to CHUNK, to PANEL; K padded
    float *packed, *packed_masked;
    float *s, *masked_s;                    // [block][stride], similarities and then their gradient
    float *spread, *spread_masked;          // rows in panels of columns; or, if y1 alone is edited,
    float* masked;                          // [block][width], masked rows times d loss / d st
    EbmRow* states;
    bool last;
};

// ---------------------------------------------------------------- rows

static inline float dot(const float* a, const float* b, int64_t padded) {
    vf s[2] = {vf{}, vf{}};
    int64_t k = 0;
    for (; k + 2 * W <= padded; k += 2 * W)
        for (int v = 0; v < 2; ++v) s[v] = fma(load(a + k + v * W), load(b + k + v * W), s[v]);
    for (; k < padded; k += W) s[0] = fma(load(a + k), load(b + k), s[0]);
    return sum(s[0] + s[1]);
}

static inline void add_scaled(float* to, const float* x, float by, int64_t padded) {
    for (int64_t k = 0; k < padded; k += W) store(to + k, fma(load(x + k), all(by), load(to + k)));
}

static inline void text_row(const EbmRun& run, int64_t k, float* out) {
    read_row(run.job->text, k, 0, run.job->text.width, run.width, out);
    prepare_row(out, run.width, run.job->normalize_text);
}

static inline Fault image_row(const EbmRun& run, int64_t i, float* out) {
    read_row(run.job->image, run.first + i, 0, run.job->image.width, run.width, out);
    const Fault fault = prepare_row(out, run.width, run.job->normalize_image);
    // a row that is reported in the end must not slow the others down with NaN or Inf
    if (fault != kFine) std::memset(out, 0, sizeof(float) * run.width);
    return fault;
}

// d x from d u for u = x / |x|, in place; x is row i of `rows`, `memory` two rows long.
static void through_norm(const Rows& rows, int64_t i, int64_t width, float* memory,
                         float* gradient) {
    const float* x = memory;
    if (rows.type == Type::kFloat && rows.width == width)
        x = static_cast<const float*>(rows.data) + i * rows.stride;
    else
        read_row(rows, i, 0, rows.width, width, memory);
    const float along = dot(gradient, x, width), squares = dot(x, x, width);
    if (squares > 1e-30f && squares < 1e30f) {
        const float inverse = 1.0f / __builtin_sqrtf(squares);
        const vf a = all(-along / squares), b = all(inverse);
        for (int64_t k = 0; k < width; k += W)
            store(gradient + k, fma(load(x + k), a, load(gradient + k)) * b);
        return;
    }
    float* unit = memory + width;
    std::memcpy(unit, x, sizeof(float) * width);
    prepare_row(unit, width, true);
    add_scaled(gradient, unit, -dot(gradient, unit, width), width);
    scale_row(gradient, width, 1.0f / dot(x, unit, width));  // 1 / |x| without a square
}

// ---------------------------------------------------------------- masks

static inline int64_t count_from(const int32_t* keys, int64_t padded, int32_t bound) {
    lanes_i32 count{};
    for (int64_t k = 0; k < padded; k += W) {
        lanes_i32 x;
        std::memcpy(&x, keys + k, sizeof(x));
        count -= x >= bound;
    }
    int64_t total = 0;
    for (int i = 0; i < W; ++i) total += count[i];
    return total;
}

// 1 for the `count` largest of x[0:n], equal ones in order of index, else 0; x is overwritten.
// The bound is found by bisection over integers that are ordered like the floats.
static void keep_largest(float* x, int64_t n, int64_t count, int64_t padded, float* mask) {
    int32_t* keys = reinterpret_cast<int32_t*>(x);
    for (int64_t k = 0; k < n; ++k) {
        const float value = x[k] + 0.0f;  // -0 becomes 0: they are equal
        int32_t bits;
        std::memcpy(&bits, &value, 4);
        bits ^= (bits >> 31) & 0x7fffffff;
        std::memcpy(keys + k, &bits, 4);
    }
    for (int64_t k = n; k < padded; ++k) keys[k] = INT32_MIN;
    int64_t low = INT32_MIN + 1, beyond = int64_t{INT32_MAX} + 1, found = n;
    while (beyond - low > 1 && found != count) {
        const int64_t middle = (low + beyond) >> 1;
        const int64_t reached = count_from(keys, padded, static_cast<int32_t>(middle));
        if (reached >= count) {
            low = middle;
            found = reached;
        } else {
            beyond = middle;
        }
    }
    for (int64_t k = 0; k < padded; ++k) mask[k] = keys[k] >= low ? 1.0f : 0.0f;
    for (int64_t k = n - 1; found > count; --k)  // all of these equal the bound
        if (keys[k] == low) {
            mask[k] = 0.0f;
            --found;
        }
}

// The mask of an image row with a class row; `work` is a row too.
static void mask_of(const EbmRun& run, const float* z, const float* t, float* work, float* mask) {
    if (run.job->kept == 0) {
        const lanes_i32 one = (lanes_i32)all(1.0f);
        for (int64_t k = 0; k < run.width; k += W)
            store(mask + k, (vf)(one & (lanes_i32)(load(z + k) * load(t + k) > vf{})));
        return;
    }
    for (int64_t k = 0; k < run.width; k += W) store(work + k, load(z + k) * load(t + k));
    keep_largest(work, run.job->image.width, run.job->kept, run.width, mask);
}

// ---------------------------------------------------------------- numbers of a row, in double

static inline double softplus_of(double x) {
    return (x > 0 ? x : 0.0) + __builtin_log1p(__builtin_exp(x > 0 ? -x : x));
}

// softplus(x) - softplus(y), x = y + gap; y may be infinite
static inline double softplus_rise_of(double x, double y, double gap) {
    if (y > 1e300) return gap;
    if (gap <= 1 && gap >= -1)
        return __builtin_log1p(__builtin_expm1(gap) / (1 + __builtin_exp(-y)));
    return softplus_of(x) - softplus_of(y);
}

// s[0:n] becomes exp((s - shift) / tau), what follows up to the stride 0; returns their sum.
static double exponentials(const EbmRun& run, float* s, float shift) {
    const int64_t n = run.job->text.count;
    const vf hi = all(run.scale.hi), lo = all(run.scale.lo), at = all(shift),
             lowest = all(run.scale.lowest);
    vf total[2] = {vf{}, vf{}};
    int64_t k = 0;
    for (; k + 2 * W <= n; k += 2 * W)
        for (int v = 0; v < 2; ++v) {
            const vf e = exp_scaled(larger(load(s + k + v * W) - at, lowest), hi, lo);
            total[v] = total[v] + e;
            store(s + k + v * W, e);
        }
    for (; k < run.stride; k += W) {
        const vf e = keep<true>(exp_scaled(larger(load(s + k) - at, lowest), hi, lo),
                                first_lanes(n > k ? n - k : 0));
        total[0] = total[0] + e;
        store(s + k, e);
    }
    return sum(total[0] + total[1]);
}

// Loss and gradient of a row of which y1 alone is edited: s becomes d loss / d s, all but the part
// of y1 that comes through the masked row.
static void edit_best(const EbmRun& run, float* s, const Best* tops, int64_t y, EbmRow& row) {
    const EbmJob& job = *run.job;
    const double inverse = run.scale.inverse, w = job.weight;
    const bool own = y == row.y1, alone = job.text.count == 1;
    // everything is relative to the second best: next to the best the others may vanish
    const float shift = alone ? tops[0].value : tops[1].value;
    const double label = (static_cast<double>(s[y]) - shift) * inverse;
    const double gap = row.rise * inverse;
    const double before = (static_cast<double>(tops[0].value) - shift) * inverse, after = before + gap;
    s[row.y1] = shift + run.scale.lowest;
    const double z = exponentials(run, s, shift);
    const double others = alone ? -INFINITY : __builtin_log(z);
    // log-sum-exp over all classes, minus the entry of y1
    const double over_before = softplus_of(others - before), over_after = softplus_of(others - after);
    const double p = __builtin_exp(-over_before), q = __builtin_exp(-over_after);
    // what exp((s_k - shift) / tau) is a share of, before and after
    const double P = __builtin_exp(-before - over_before), Q = __builtin_exp(-after - over_after);
    const double over = job.ce_original ? over_before : over_after;
    const double top = job.ce_original ? before : after;
    row.loss = (own ? over : top + over - label) +
               w * softplus_rise_of(after - others, before - others, gap);
    row.best = p;
    const double unit = inverse / static_cast<double>(job.image.count), hit = own ? 1.0 : 0.0;
    row.from_masked = unit * (w * q + (job.ce_original ? 0.0 : q - hit));
    // one class alone has no others to scale, and its Q may be infinite
    const double c = alone ? 0.0 : unit * (w * (Q - P) + (job.ce_original ? P : Q));
    scale_row(s, run.stride, static_cast<float>(c));
    s[row.y1] = static_cast<float>(unit * ((job.ce_original ? p - hit : 0.0) - w * p));
    if (!own) s[y] -= static_cast<float>(unit);
}

// The same of a row that is edited as a whole: t are its edited similarities.
static void edit_all(const EbmRun& run, float* s, float* t, float best, int64_t y, EbmRow& row) {
    const EbmJob& job = *run.job;
    const double inverse = run.scale.inverse, w = job.weight;
    Best top;
    float lowest;
    top_of(t, job.text.count, 1, &top, &lowest);
    const double label = job.ce_original ? (static_cast<double>(s[y]) - best) * inverse
                                         : (static_cast<double>(t[y]) - top.value) * inverse;
    row.rise = static_cast<double>(t[row.y1]) - best;
    const double zs = exponentials(run, s, best), zt = exponentials(run, t, top.value);
    const double rise = (static_cast<double>(top.value) - best) * inverse + __builtin_log(zt / zs);
    row.loss = __builtin_log(job.ce_original ? zs : zt) - label + w * rise;
    row.best = 1 / zs;
    const double unit = inverse / static_cast<double>(job.image.count);
    scale_row(s, run.stride, static_cast<float>(unit * ((job.ce_original ? 1.0 : 0.0) - w) / zs));
    scale_row(t, run.stride, static_cast<float>(unit * ((job.ce_original ? 0.0 : 1.0) + w) / zt));
    (job.ce_original ? s : t)[y] -= static_cast<float>(unit);
}

// ---------------------------------------------------------------- stages of a block

static void take_rows(const EbmRun& run, int64_t begin, int64_t end) {
    float* row = scratch(3, run.width);
    for (int64_t i = begin; i < end; ++i) {
        run.job->image_faults[run.first + i] = image_row(run, i, row);
        pack_row(row, i, run.rows, run.inner, run.packed);
        if (run.spread != nullptr)
            spread_row(row, i, run.width, run.block * PANEL, run.spread);
    }
}

static inline Rows part_of(const Rows& rows, int64_t first, int64_t count) {
    const int64_t bytes = rows.type == Type::kFloat ? 4 : 2;
    return {static_cast<const char*>(rows.data) + first * rows.stride * bytes, rows.type, count,
            rows.width, rows.stride};
}

// Panels begin..end of the classes with all rows of the block.
static void multiply_classes(const EbmRun& run, const float* packed, float* s, int64_t begin,
                             int64_t end) {
    const EbmJob& job = *run.job;
    float* panels = scratch(5, EBM_PANELS * PANEL * run.inner);
    for (int64_t panel = begin; panel < end; panel += EBM_PANELS) {
        const int64_t from = panel * PANEL, to = panel + EBM_PANELS < end ? panel + EBM_PANELS : end;
        const int64_t left = job.text.count - from, wide = (to - panel) * PANEL;
        const int64_t n = left < wide ? left : wide;
        pack_classes(part_of(job.text, from, n), job.normalize_text, 0, n, panels,
                     job.text_faults + from);
        multiply_panels({packed, run.rows, run.inner}, panels, wide, s + from, run.stride);
    }
}

// The best class, the mask, and what they are needed for.
static void edit_rows(const EbmRun& run, int64_t begin, int64_t end) {
    const EbmJob& job = *run.job;
    const int64_t width = run.width, K = job.text.count;
    float* memory = scratch(3, 5 * width);
    float *z = memory, *t = z + width, *label = t + width, *work = label + width,
          *mask = work + width;
    for (int64_t i = begin; i < end; ++i) {
        float* s = run.s + i * run.stride;
        const int64_t y = job.labels[run.first + i];
        EbmRow& row = run.states[i];
        Best tops[2];
        float lowest;
        top_of(s, K, K > 1 ? 2 : 1, tops, &lowest);
        row.y1 = tops[0].index;
        image_row(run, i, z);
        text_row(run, row.y1, t);
        if (job.by_label) text_row(run, y, label);
        mask_of(run, z, job.by_label ? label : t, work, mask);
        vf dropped{};  // st - s_y1 without a difference of the two
        for (int64_t k = 0; k < width; k += W) {
            const vf kept = load(z + k) * load(mask + k);
            dropped = fma(load(z + k) - kept, load(t + k), dropped);
            store(z + k, kept);
        }
        row.rise = -sum(dropped);
        row.scale = 1.0f;
        if (job.renorm) {
            // a mask that keeps nothing leaves a zero vector, which has no direction to restore
            const float norm = __builtin_sqrtf(sum_of_squares(z, width));
            row.scale = 1.0f / (norm > 1e-12f ? norm : 1e-12f);
            row.rise = static_cast<double>(row.scale) * dot(z, t, width) - tops[0].value;
        }
        if (job.edit_all) {
            if (job.renorm) scale_row(z, width, row.scale);
            pack_row(z, i, run.rows, run.inner, run.packed_masked);
            if (run.spread != nullptr)
                spread_row(z, i, width, run.block * PANEL, run.spread_masked);
            continue;
        }
        edit_best(run, s, tops, y, row);
        if (run.masked == nullptr) continue;
        float* out = run.masked + i * width;
        std::memcpy(out, z, sizeof(float) * width);
        scale_row(out, width, static_cast<float>(row.from_masked * row.scale));
    }
}

static void edit_all_rows(const EbmRun& run, int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
        float *s = run.s + i * run.stride, *t = run.masked_s + i * run.stride;
        EbmRow& row = run.states[i];
        edit_all(run, s, t, s[row.y1], run.job->labels[run.first + i], row);
    }
}

// Classes begin..end in units of MR.
static void text_gradient(const EbmRun& run, int64_t begin, int64_t end) {
    const EbmJob& job = *run.job;
    const int64_t width = run.width, K = job.text.count;
    float* memory = scratch(3, 2 * width);
    const int64_t stop = end * MR < K ? end * MR : K;
    for (int64_t from = begin * MR; from < stop; from += EBM_CLASSES) {
        const int64_t n = stop - from < EBM_CLASSES ? stop - from : EBM_CLASSES;
        float* out = job.d_text + from * width;
        if (run.first == 0) std::memset(out, 0, sizeof(float) * n * width);
        multiply_transposed(run.s + from, run.stride, run.rows, n, run.spread, run.block * PANEL,
                            width, out, width);
        if (job.edit_all) {
            multiply_transposed(run.masked_s + from, run.stride, run.rows, n, run.spread_masked,
                                run.block * PANEL, width, out, width);
        } else {
            for (int64_t i = 0; i < run.rows; ++i) {
                const int64_t k = run.states[i].y1 - from;
                if (k >= 0 && k < n)
                    add_scaled(out + k * width, run.masked + i * width, 1.0f, width);
            }
        }
        if (!run.last || !job.normalize_text) continue;
        for (int64_t k = 0; k < n; ++k)
            through_norm(job.text, from + k, width, memory, out + k * width);
    }
}

// Rows begin..end in units of MR.
static void image_gradient(const EbmRun& run, int64_t begin, int64_t end) {
    const EbmJob& job = *run.job;
    const int64_t from = begin * MR, to = end * MR < run.rows ? end * MR : run.rows;
    const int64_t width = run.width, depth = round_up(job.text.count, CHUNK);
    float* memory = scratch(3, 7 * width);
    float *z = memory, *t = z + width, *work = t + width, *mask = work + width,
          *masked = mask + width, *raw = masked + width;
    float* through_mask = scratch(5, MR * width);
    float* packed = scratch(6, MR * depth);
    for (int64_t first = from; first < to; first += MR) {
        const int64_t rows = to - first < MR ? to - first : MR;
        float* out = job.d_image + (run.first + first) * width;
        for (int64_t i = 0; i < rows; ++i)
            pack_row(run.s + (first + i) * run.stride, i, rows, depth, packed);
        multiply<false>({packed, rows, depth}, job.columns, depth * PANEL, width, out, width);
        if (job.edit_all) {
            for (int64_t i = 0; i < rows; ++i)
                pack_row(run.masked_s + (first + i) * run.stride, i, rows, depth, packed);
            multiply<false>({packed, rows, depth}, job.columns, depth * PANEL, width, through_mask,
                            width);
        }
        for (int64_t i = 0; i < rows; ++i) {
            const EbmRow& row = run.states[first + i];
            float *d = out + i * width, *u = through_mask + i * width;
            image_row(run, first + i, z);
            text_row(run, row.y1, t);
            if (!job.edit_all) {
                std::memcpy(u, t, sizeof(float) * width);
                scale_row(u, width, static_cast<float>(row.from_masked));
            }
            if (job.by_label) text_row(run, job.labels[run.first + first + i], t);
            mask_of(run, z, t, work, mask);
            if (job.renorm) {
                for (int64_t k = 0; k < width; k += W)
                    store(masked + k, load(z + k) * load(mask + k) * all(row.scale));
                if (row.scale < 1e12f)  // otherwise the scale is a constant
                    add_scaled(u, masked, -dot(u, masked, width), width);
                scale_row(u, width, row.scale);
            }
            for (int64_t k = 0; k < width; k += W)
                store(d + k, fma(load(u + k), load(mask + k), load(d + k)));
            if (job.normalize_image && job.image_faults[run.first + first + i] == kFine)
                through_norm(job.image, run.first + first + i, width, raw, d);
        }
    }
}

static void spread_text(const EbmRun& run, int64_t begin, int64_t end) {
    const int64_t height = round_up(run.job->text.count, CHUNK);
    float* row = scratch(3, run.width);
    for (int64_t k = begin; k < end; ++k) {
        if (k < run.job->text.count)
            text_row(run, k, row);
        else
            std::memset(row, 0, sizeof(float) * run.width);
        spread_row(row, k, run.width, height * PANEL, run.job->columns);
    }
}

template <void (*STAGE)(const EbmRun&, int64_t, int64_t)>
static void on_all_threads(const Pool& pool, int64_t n, EbmRun& run) {
    pool.run(
        n,
        [](void* context, int64_t begin, int64_t end) {
            STAGE(*static_cast<const EbmRun*>(context), begin, end);
        },
        &run);
}

static void multiply_rows(const EbmRun& run, int64_t begin, int64_t end) {
    multiply_classes(run, run.packed, run.s, begin, end);
}

static void multiply_masked(const EbmRun& run, int64_t begin, int64_t end) {
    multiply_classes(run, run.packed_masked, run.masked_s, begin, end);
}

static EbmRun ebm_run(const EbmJob& job) {
    const int64_t K = job.text.count, D = job.image.width;
    EbmRun run{};
    run.job = &job;
    run.scale = make_scale(job.tau);
    run.inner = round_up(D, CHUNK);
    run.width = round_up(D, PANEL);
    run.stride = round_up(K, PANEL) + CHUNK;  // rows 4096 bytes apart would share cache sets
    run.block = EBM_ROWS;
    while (run.block > 16 && run.block * run.stride > EBM_NUMBERS) run.block /= 2;
    const int copies = job.edit_all ? 2 : 1;
    run.packed = scratch(0, copies * run.block * run.inner);
    run.packed_masked = run.packed + run.block * run.inner;
    run.s = scratch(4, copies * run.block * run.stride);
    run.masked_s = run.s + run.block * run.stride;
    run.states = reinterpret_cast<EbmRow*>(
        scratch(2, floats_for(run.block * static_cast<int64_t>(sizeof(EbmRow)))));
    if (job.d_text != nullptr) {
        run.spread = scratch(7, 2 * run.block * run.width);
        run.spread_masked = run.spread + run.block * run.width;
        run.masked = job.edit_all ? nullptr : run.spread_masked;
    }
    return run;
}

static void ebm_kernel(const EbmJob& job, const Pool& pool) {
    const int64_t B = job.image.count, K = job.text.count, panels = round_up(K, PANEL) / PANEL;
    EbmRun run = ebm_run(job);
    if (job.d_image != nullptr) on_all_threads<spread_text>(pool, round_up(K, CHUNK), run);
    double loss = 0, best = 0, rise = 0;
    for (run.first = 0; run.first < B; run.first += run.block) {
        run.rows = B - run.first < run.block ? B - run.first : run.block;
        run.last = run.first + run.rows == B;
        on_all_threads<take_rows>(pool, run.rows, run);
        on_all_threads<multiply_rows>(pool, panels, run);
        on_all_threads<edit_rows>(pool, run.rows, run);
        if (job.edit_all) {
            on_all_threads<multiply_masked>(pool, panels, run);
            on_all_threads<edit_all_rows>(pool, run.rows, run);
        }
        for (int64_t i = 0; i < run.rows; ++i) {
            loss += run.states[i].loss;
            best += run.states[i].best;
            rise += run.states[i].rise;
        }
        if (job.d_text != nullptr)
            on_all_threads<text_gradient>(pool, (K + MR - 1) / MR, run);
        if (job.d_image != nullptr)
            on_all_threads<image_gradient>(pool, (run.rows + MR - 1) / MR, run);
    }
    job.loss[0] = loss / static_cast<double>(B);
    job.loss[1] = best / static_cast<double>(B);
    job.loss[2] = rise / static_cast<double>(B);
}
