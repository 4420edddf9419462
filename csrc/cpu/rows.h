// Global scores: product, top values, sums and epilogue of a block of rows, one pass.
#pragma once

// The states of a block of rows, in memory of the calling thread.
struct States {
    Best* tops;     // [rows][c]
    Rest* rests;    // [rows][T]
    int64_t* held;  // [rows] how many tops so far
    float* centres; // [rows]
};

static inline int64_t floats_for(int64_t bytes) { return (bytes + 63) / 64 * 16; }

static States states_for(int64_t rows, int64_t c, int T) {
    const int64_t tops = floats_for(rows * c * static_cast<int64_t>(sizeof(Best)));
    const int64_t rests = floats_for(rows * T * static_cast<int64_t>(sizeof(Rest)));
    const int64_t held = floats_for(rows * 8);
    float* memory = scratch(2, tops + rests + held + floats_for(rows * 4));
    States s;
    s.tops = reinterpret_cast<Best*>(memory);
    s.rests = reinterpret_cast<Rest*>(memory + tops);
    s.held = reinterpret_cast<int64_t*>(memory + tops + rests);
    s.centres = memory + tops + rests + held;
    return s;
}

static inline float mean_of(const float* s, int64_t n) {
    vf a{}, b{};
    int64_t i = 0;
    for (; i + 2 * W <= n; i += 2 * W) {
        a = a + load(s + i);
        b = b + load(s + i + W);
    }
    for (; i < n; i += W) a = a + keep<true>(load(s + i), first_lanes(n - i));
    return sum(a + b) / static_cast<float>(n);
}

// Takes classes first..first+n of one row into its state. Rewrites s.
static void take_span(const RowJob& job, const Scale* scales, float* s, int64_t first, int64_t n,
                      int64_t row, const States& st) {
    const int64_t c = job.c;
    Best* tops = st.tops + row * c;
    Rest* rests = st.rests + row * job.T;
    int64_t& held = st.held[row];
    if (first == 0) st.centres[row] = mean_of(s, n);
    const float centre = st.centres[row];

    const int64_t own = c < n ? c : n;
    const int64_t want = own < n ? own + 1 : own;
    Best* list = reinterpret_cast<Best*>(scratch(3, floats_for((want + 1) * sizeof(Best))));
    float lowest;
    top_of(s, n, want, list, &lowest);
    const float next = want > own ? list[own].value : -INFINITY;

    // Move the top values behind the rest: what remains is contiguous.
    int64_t end = n;
    for (int64_t j = 0; j < own; ++j) s[list[j].index] = NAN;
    for (int64_t j = 0; j < own; ++j) {
        while (end > n - own && __builtin_isnan(s[end - 1])) --end;
        if (end <= n - own) break;
        const int64_t hole = list[j].index;
        if (hole >= n - own) continue;
        s[hole] = s[end - 1];
        --end;
    }
    const int64_t rest = n - own;

    for (int t = 0; t < job.T; ++t) {
        const Scale& scale = scales[t];
        // not only where moments need it: a score is the same whatever is asked with it
        const bool near = (next - centre) * scale.inverse <= CENTRED_RANGE &&
                          (centre - lowest) * scale.inverse <= CENTRED_RANGE;
        Rest sums;
        sums.centred = near;  // also of no rest at all: its top values are taken about the centre
        sums.shift = centre;
        if (rest > 0) {
            if (job.moments)
                sums = near ? sums_of<true, true>(s, rest, centre, scale)
                            : sums_of<false, true>(s, rest, next, scale);
            else
                sums = near ? sums_of<true, false>(s, rest, centre, scale)
                            : sums_of<false, false>(s, rest, next, scale);
        }
        rests[t] = first == 0 ? sums : merged(rests[t], sums, scale.inverse);
    }

    if (first == 0) {
        for (int64_t j = 0; j < own; ++j) tops[j] = list[j];
        held = own;
        return;
    }
    for (int64_t j = 0; j < own; ++j) {
        const Best candidate = {list[j].value, list[j].index + first};
        const bool full = held == c;
        if (full && !(candidate.value > tops[c - 1].value)) {
            for (int t = 0; t < job.T; ++t) join(rests[t], candidate.value, scales[t].inverse);
            continue;
        }
        const float evicted = full ? tops[c - 1].value : 0.0f;
        insert(tops, held, c, candidate.value, candidate.index);
        if (full)
            for (int t = 0; t < job.T; ++t) join(rests[t], evicted, scales[t].inverse);
    }
}

// Writes what was asked for of `rows` finished rows that start at `first` in the batch.
static void finish(const RowJob& job, const Scale* scales, int64_t first, int64_t rows,
                   const States& st) {
    const int64_t c = job.c;
    const int64_t B = job.similarity.data != nullptr ? job.similarity.count : job.image.count;
    const bool none_left = c == job.K;
    Lane lanes[MAX_TAUS];
    vd* values = reinterpret_cast<vd*>(scratch(3, floats_for(c * sizeof(vd))));
    for (int64_t r0 = 0; r0 < rows; r0 += WD) {
        const int64_t n = rows - r0 < WD ? rows - r0 : WD;
        for (int64_t j = 0; j < c; ++j)
            for (int i = 0; i < WD; ++i)
                values[j][i] = st.tops[(r0 + (i < n ? i : n - 1)) * c + j].value;
        for (int t = 0; t < job.T; ++t) {
            vd z, shift, neg_entropy{}, variance{};
            for (int i = 0; i < WD; ++i) {
                const int64_t row = r0 + (i < n ? i : n - 1);
                const Rest& rest = st.rests[row * job.T + t];
                z[i] = rest.z;
                shift[i] = rest.shift;
                if (job.moments && i < n) {
                    double a, b;
                    moments_of(rest, st.tops + row * c, c, job.K, scales[t].inverse, &a, &b);
                    neg_entropy[i] = a;
                    variance[i] = b;
                }
            }
            lanes[t].rest = select(z == vd{}, all(-(double)INFINITY),
                                   (shift - values[0]) * all(scales[t].inverse) + log(z));
            lanes[t].neg_entropy = neg_entropy;
            lanes[t].variance = variance;
        }
        const Tops tops = {values, c};
        for (int64_t r = 0; r < job.R; ++r) {
            const vd score = score_of(job.requests[r], tops, lanes, job.taus, none_left);
            for (int i = 0; i < n; ++i)
                job.scores[r * B + first + r0 + i] = static_cast<float>(score[i]);
        }
        for (int i = 0; i < n; ++i) {
            const int64_t row = first + r0 + i;
            for (int64_t j = 0; j < c; ++j) {
                const Best& best = st.tops[(r0 + i) * c + j];
                if (job.values != nullptr) job.values[row * c + j] = best.value;
                if (job.index != nullptr) job.index[row * c + j] = best.index;
            }
            for (int t = 0; t < job.T; ++t) {
                const int64_t at = row * job.T + t;
                if (job.rest != nullptr) job.rest[at] = lanes[t].rest[i];
                if (job.neg_entropy != nullptr)
                    job.neg_entropy[at] = static_cast<float>(lanes[t].neg_entropy[i]);
                if (job.variance != nullptr)
                    job.variance[at] = static_cast<float>(lanes[t].variance[i]);
            }
        }
    }
}

// Classes reduced at once: K in equal spans of at most SPAN, so that no span is a sliver.
static inline int64_t span_of(int64_t K) {
    const int64_t spans = (K + SPAN - 1) / SPAN;
    return round_up((K + spans - 1) / spans, PANEL);
}

// Whether s[0:n], readable and finite up to a multiple of W, has neither NaN nor Inf.
static bool all_finite(const float* s, int64_t n) {
    vf odd{};
    for (int64_t k = 0; k < n; k += W) {
        const vf a = load(s + k);
        odd = odd + (a - a);
    }
    return sum(odd) == 0.0f;
}

// A span of given similarities as float32; false if one is not finite.
static bool read_span(const Rows& rows, int64_t i, int64_t first, int64_t n, float* out) {
    read_row(rows, i, first, n, round_up(n, W), out);
    return all_finite(out, n);
}

// Features taken as they come may overflow in a product, which must end neither in a ranking nor in
// the search for the top values: that relies on numbers that compare. `s` is n products of a row.
static void check_products(bool normalized, float* s, int64_t n, uint8_t* fault) {
    if (normalized || all_finite(s, n)) return;
    *fault = kOverflow;
    std::memset(s, 0, sizeof(float) * n);
}

static bool given(const RowJob& job) { return job.similarity.data != nullptr; }

static void rows_of_block(const RowJob& job, const Scale* scales, int64_t first, int64_t rows) {
    const int64_t span = span_of(job.K);
    const States states = states_for(rows, job.c, job.T);
    // a stride of 4 kB would put all rows into a few sets of the cache
    const int64_t ld = span + CHUNK;
    float* s = scratch(4, rows * ld);
    LeftRows left{};
    if (!given(job))
        left = left_rows(job.image, job.normalize, job.split != nullptr, first, rows, job.faults);
    for (int64_t k = 0; k < job.K; k += span) {
        const int64_t n = job.K - k < span ? job.K - k : span;
        if (!given(job)) products(left, {job.panels, job.split}, k, n, s, ld);
        for (int64_t i = 0; i < rows; ++i) {
            if (!given(job)) {
                check_products(job.normalize, s + i * ld, n, job.faults + first + i);
            } else if (!read_span(job.similarity, first + i, k, n, s + i * ld)) {
                job.faults[first + i] = kNotFinite;
                std::memset(s + i * ld, 0, sizeof(float) * n);
            }
            take_span(job, scales, s + i * ld, k, n, i, states);
        }
    }
    finish(job, scales, first, rows, states);
}

struct RowRun {
    const RowJob* job;
    const Scale* scales;
    int64_t B, unit;
    // a batch too small to share by rows: shared by classes instead
    LeftRows left;
    float* s;
    States states;
    int64_t first, n, span, ld;
};

// One span of rows begin..end (in units of WD) of a shared batch, and after the last their scores.
static void take_shared(const RowRun& run, int64_t begin, int64_t end) {
    const RowJob& job = *run.job;
    const int64_t from = begin * WD, to = end * WD < run.B ? end * WD : run.B;
    for (int64_t i = from; i < to; ++i) {
        float* s = run.s + i * run.ld;
        check_products(job.normalize, s, run.n, job.faults + i);
        take_span(job, run.scales, s, run.first, run.n, i, run.states);
    }
    if (run.first + run.n < job.K) return;
    const States& all = run.states;
    finish(job, run.scales, from, to - from,
           {all.tops + from * job.c, all.rests + from * job.T, all.held + from,
            all.centres + from});
}

static void rows_kernel(const RowJob& job, const Pool& pool) {
    RowRun run{};
    run.B = given(job) ? job.similarity.count : job.image.count;
    if (run.B == 0) return;
    Scale scales[MAX_TAUS];
    for (int t = 0; t < job.T; ++t) scales[t] = make_scale(job.taus[t]);
    run.job = &job;
    run.scales = scales;
    run.unit = unit_of_rows(job.split != nullptr);
    if (given(job)) std::memset(job.faults, kFine, run.B);

    const int64_t units = (run.B + run.unit - 1) / run.unit;
    const bool shared = !given(job) && units < 2 * pool.threads && job.K >= 8 * PANEL;
    if (!shared) {
        pool.run(
            units,
            [](void* context, int64_t begin, int64_t end) {
                const RowRun& r = *static_cast<const RowRun*>(context);
                const int64_t stop = end * r.unit < r.B ? end * r.unit : r.B;
                const int64_t rows = rows_of_a_block(stop - begin * r.unit, r.unit);
                for (int64_t first = begin * r.unit; first < stop; first += rows)
                    rows_of_block(*r.job, r.scales, first,
                                  stop - first < rows ? stop - first : rows);
            },
            &run);
        return;
    }

    run.span = span_of(job.K);
    run.ld = run.span + CHUNK;
    run.left = left_rows(job.image, job.normalize, job.split != nullptr, 0, run.B, job.faults);
    run.s = scratch(4, run.B * run.ld);
    run.states = states_for(run.B, job.c, job.T);
    for (run.first = 0; run.first < job.K; run.first += run.span) {
        run.n = job.K - run.first < run.span ? job.K - run.first : run.span;
        pool.run(
            round_up(run.n, PANEL) / PANEL,
            [](void* context, int64_t begin, int64_t end) {
                const RowRun& r = *static_cast<const RowRun*>(context);
                products(r.left, {r.job->panels, r.job->split}, r.first + begin * PANEL,
                         (end - begin) * PANEL, r.s + begin * PANEL, r.ld);
            },
            &run);
        pool.run(
            (run.B + WD - 1) / WD,
            [](void* context, int64_t begin, int64_t end) {
                take_shared(*static_cast<const RowRun*>(context), begin, end);
            },
            &run);
    }
}
