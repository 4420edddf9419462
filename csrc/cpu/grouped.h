// Classes against groups of negatives (NegLabel): one pass over all K + G m similarities of a row.
//
// A group is always summed whole, wherever the multiply cut its columns: what is left of a span
// moves in front of the next one. So a score depends on neither batch nor threads. A group of more
// than SPAN is summed in pieces of SPAN from its first row.
//
// Scratch: 0 packed rows, 1 one row, 2 sums, 4 similarities.
#pragma once

// sum of exp((s - shift) / tau), shift being the largest s
struct Mass {
    float shift;
    double z;
};

static inline Mass joined(const Mass& a, const Mass& b, double inverse_tau) {
    if (a.z == 0) return b;
    const float shift = a.shift > b.shift ? a.shift : b.shift;
    const double from = (static_cast<double>(a.shift) - shift) * inverse_tau;
    const double to = (static_cast<double>(b.shift) - shift) * inverse_tau;
    return {shift, a.z * __builtin_exp(from) + b.z * __builtin_exp(to)};
}

// s is readable up to W - 1 numbers beyond n.
static inline Mass mass_of(const float* s, int64_t n, const Scale& scale) {
    vf high = all(-INFINITY);
    int64_t i = 0;
    for (; i + W <= n; i += W) high = larger(high, load(s + i));
    if (i < n) {
        const lanes_i32 mask = first_lanes(n - i);
        const lanes_i32 none = (lanes_i32)all(-INFINITY);
        high = larger(high, (vf)(((lanes_i32)load(s + i) & mask) | (none & ~mask)));
    }
    const float shift = largest(high);
    return {shift, sums_of<false, false>(s, n, shift, scale).z};
}

struct GroupedRow {
    Mass classes;
    Mass group;    // the pieces of a long group so far
    double total;  // of the sigmoids
};

// Where the next piece begins: in which group, at which of its rows, and how many of its columns
// lie before the span.
struct Cursor {
    int64_t group, offset, left;
};

struct GroupedRun {
    const GroupedJob* job;
    Scale scale;
    int64_t class_span, span;  // columns multiplied at once: classes, negatives
    int64_t unit;              // rows multiplied together
    int64_t ahead, ldc;        // room before them for what is left of a span; a row of both
    // a batch too small to share by rows: shared by classes instead
    LeftRows left;
    float* s;
    GroupedRow* rows;
    Classes right;
    int64_t first, n;
    Cursor at, next;
};

static void take_classes(const GroupedRun& run, float* s, int64_t first, int64_t n, int64_t index,
                         GroupedRow& row) {
    check_products(run.job->normalize, s, n, run.job->faults + index);
    const Mass mass = mass_of(s, n, run.scale);
    if (first == 0) row = {mass, {}, 0};
    else row.classes = joined(row.classes, mass, run.scale.inverse);
    if (run.job->lse != nullptr && first + n == run.job->K)
        run.job->lse[index * (run.job->G + 1)] =
            row.classes.shift * run.scale.inverse + __builtin_log(row.classes.z);
}

// Adds the sigmoids of `count` <= WD finished groups, and writes their sums if asked.
static void add_groups(const GroupedRun& run, const Mass* groups, int64_t count, double* lse,
                       GroupedRow& row) {
    vd gap{}, z{};
    for (int64_t i = 0; i < count; ++i) {
        gap[i] = static_cast<double>(groups[i].shift) - row.classes.shift;
        z[i] = groups[i].z;
    }
    const vd ours = all(row.classes.z);
    const vd sigmoid = ours / (ours + z * exp(gap * all(run.scale.inverse)));
    for (int64_t i = 0; i < count; ++i) row.total += sigmoid[i];
    if (lse == nullptr) return;
    const vd log_z = log(z);
    for (int64_t i = 0; i < count; ++i)
        lse[i] = groups[i].shift * run.scale.inverse + log_z[i];
}

// Takes n more columns of negatives of one row, at s, into its sums; what is left of the last piece
// is moved to where the next span will find it. Returns where that begins.
static Cursor take_negatives(const GroupedRun& run, Cursor at, float* s, int64_t n, int64_t index,
                             GroupedRow& row) {
    const GroupedJob& job = *run.job;
    check_products(job.normalize, s, n, job.faults + index);
    const float* from = s - at.left;
    const float* const end = s + n;
    double* lse = job.lse != nullptr ? job.lse + index * (job.G + 1) + 1 : nullptr;
    Mass finished[WD];
    int64_t count = 0;
    for (;;) {
        const int64_t piece = job.m - at.offset < SPAN ? job.m - at.offset : SPAN;
        if (at.group == job.G || end - from < piece) break;
        const int64_t real = job.m - (at.group >= job.full);
        const int64_t length = real - at.offset < piece ? real - at.offset : piece;
        Mass mass = at.offset > 0 ? row.group : Mass{};
        if (length > 0)
            mass = joined(mass, mass_of(from, length, run.scale), run.scale.inverse);
        from += piece;
        at.offset += piece;
        if (at.offset < job.m) {
            row.group = mass;
            continue;
        }
        finished[count++] = mass;
        at.offset = 0;
        ++at.group;
        if (count == WD) {
            add_groups(run, finished, count, lse + (lse ? at.group - count : 0), row);
            count = 0;
        }
    }
    if (count > 0) add_groups(run, finished, count, lse + (lse ? at.group - count : 0), row);
    at.left = end - from;
    std::memmove(s - at.left, from, sizeof(float) * at.left);
    if (at.group == job.G) job.scores[index] = static_cast<float>(row.total / job.G);
    return at;
}

static void grouped_block(const GroupedRun& run, int64_t first, int64_t rows) {
    const GroupedJob& job = *run.job;
    const int64_t N = job.G * job.m;
    float* s = scratch(4, rows * run.ldc + W) + run.ahead;
    GroupedRow* sums = reinterpret_cast<GroupedRow*>(
        scratch(2, floats_for(rows * static_cast<int64_t>(sizeof(GroupedRow)))));
    const LeftRows left =
        left_rows(job.image, job.normalize, job.split != nullptr, first, rows, job.faults);
    for (int64_t k = 0; k < job.K; k += run.class_span) {
        const int64_t n = job.K - k < run.class_span ? job.K - k : run.class_span;
        products(left, {job.panels, job.split}, k, n, s, run.ldc);
        for (int64_t i = 0; i < rows; ++i)
            take_classes(run, s + i * run.ldc, k, n, first + i, sums[i]);
    }
    Cursor at{};
    for (int64_t j = 0; j < N; j += run.span) {
        const int64_t n = N - j < run.span ? N - j : run.span;
        products(left, {job.negatives, job.negatives_split}, j, n, s, run.ldc);
        Cursor next{};
        for (int64_t i = 0; i < rows; ++i)
            next = take_negatives(run, at, s + i * run.ldc, n, first + i, sums[i]);
        at = next;
    }
}

// One span of a few rows: its product is shared out by panels, its sums by rows.
static void span_shared(GroupedRun& run, const Pool& pool,
                        void (*sums)(void*, int64_t, int64_t)) {
    pool.run(
        round_up(run.n, PANEL) / PANEL,
        [](void* context, int64_t begin, int64_t end) {
            const GroupedRun& r = *static_cast<const GroupedRun*>(context);
            const int64_t column = begin * PANEL;
            products(r.left, r.right, r.first + column, (end - begin) * PANEL, r.s + column,
                     r.ldc);
        },
        &run);
    pool.run(run.left.packed.rows, sums, &run);
}

static void grouped_shared(GroupedRun& run, const Pool& pool) {
    const GroupedJob& job = *run.job;
    const int64_t B = job.image.count, N = job.G * job.m;
    run.left = left_rows(job.image, job.normalize, job.split != nullptr, 0, B, job.faults);
    // few rows leave room for more columns, and so for fewer meetings of the threads
    const int64_t room = (int64_t{1} << 19) / B / PANEL * PANEL;
    if (room > run.span) run.span = room < N ? room : round_up(N, PANEL);
    run.ldc = run.ahead + (run.span > run.class_span ? run.span : run.class_span);
    run.s = scratch(4, B * run.ldc + W) + run.ahead;
    run.rows = reinterpret_cast<GroupedRow*>(
        scratch(2, floats_for(B * static_cast<int64_t>(sizeof(GroupedRow)))));
    run.right = {job.panels, job.split};
    for (run.first = 0; run.first < job.K; run.first += run.class_span) {
        run.n = job.K - run.first < run.class_span ? job.K - run.first : run.class_span;
        span_shared(run, pool, [](void* context, int64_t begin, int64_t end) {
            const GroupedRun& r = *static_cast<const GroupedRun*>(context);
            for (int64_t i = begin; i < end; ++i)
                take_classes(r, r.s + i * r.ldc, r.first, r.n, i, r.rows[i]);
        });
    }
    run.right = {job.negatives, job.negatives_split};
    for (run.first = 0; run.first < N; run.first += run.span, run.at = run.next) {
        run.n = N - run.first < run.span ? N - run.first : run.span;
        span_shared(run, pool, [](void* context, int64_t begin, int64_t end) {
            GroupedRun& r = *static_cast<GroupedRun*>(context);
            for (int64_t i = begin; i < end; ++i) {
                const Cursor next = take_negatives(r, r.at, r.s + i * r.ldc, r.n, i, r.rows[i]);
                if (i == 0) r.next = next;
            }
        });
    }
}

static void grouped_kernel(const GroupedJob& job, const Pool& pool) {
    const int64_t B = job.image.count;
    if (B == 0) return;
    GroupedRun run{};
    run.job = &job;
    run.scale = make_scale(job.tau);
    run.class_span = span_of(job.K);  // classes are summed span by span: it depends on K alone
    run.span = span_of(job.G * job.m);
    run.ahead = round_up(job.m < SPAN ? job.m : SPAN, PANEL);
    run.ldc = run.ahead + (run.span > run.class_span ? run.span : run.class_span);
    run.unit = unit_of_rows(job.split != nullptr);
    const int64_t units = (B + run.unit - 1) / run.unit;
    if (units < 2 * pool.threads && job.K + job.G * job.m >= 8 * PANEL) {
        grouped_shared(run, pool);
        return;
    }
    pool.run(
        units,
        [](void* context, int64_t begin, int64_t end) {
            const GroupedRun& r = *static_cast<const GroupedRun*>(context);
            const int64_t B = r.job->image.count;
            const int64_t from = begin * r.unit, stop = end * r.unit < B ? end * r.unit : B;
            const int64_t rows = rows_of_a_block(stop - from, r.unit);
            for (int64_t first = from; first < stop; first += rows)
                grouped_block(r, first, stop - first < rows ? stop - first : rows);
        },
        &run);
}
