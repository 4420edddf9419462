// The row kernels on the host, block by block, for ctypes.
#include "emulator.h"

#include "rows_merge.cuh"
#include "rows_plan.h"

using namespace fastood;

namespace {

template <class Body>
bool run_blocks(int64_t grid, int32_t block, const Body& body) {
    blockDim.x = static_cast<unsigned>(block);
    for (int64_t i = 0; i < grid; ++i) {
        blockIdx.x = static_cast<unsigned>(i);
        if (!emulator::run_block(blockDim.x, threadIdx, body)) return false;
    }
    return true;
}

template <class In>
bool run_rows(const RowArguments& a, const RowPlan& plan) {
    return run_blocks(plan.grid, plan.block, [&] {
        if (plan.threads == 32)
            rows_kernel<In, 32>(a);
        else
            rows_kernel<In, WIDE>(a);
    });
}

bool run_rows_of(Type type, const RowArguments& a, const RowPlan& plan) {
    if (type == kFloat) return run_rows<float>(a, plan);
    if (type == kHalf) return run_rows<__half>(a, plan);
    return run_rows<__nv_bfloat16>(a, plan);
}

}  // namespace

// As fastood_rows, with the plan given; 1 if threads of a block did not meet.
extern "C" int32_t emulate_rows(const RowJob* job, const RowPlan* plan) {
    const RowArguments a = arguments_of(*job, *plan);
    if (!run_rows_of(static_cast<Type>(job->type), a, *plan)) return 1;
    if (plan->splits == 1) return 0;
    const int64_t grid = (job->B + WARP_ROWS - 1) / WARP_ROWS;
    return run_blocks(grid, 32 * WARP_ROWS, [&] { merge_kernel(a); }) ? 0 : 1;
}

extern "C" int32_t emulate_plan(const RowJob* job, RowPlan* plan) { return plan_rows(*job, plan); }

namespace {

// A state that takes values one by one, by the same algebra: what falls out joins the rest.
struct Folded {
    Top<MAX_TOPS> top;
    Rest rest = no_rest();
    int c;
    double inverse;

    void take(Best value) {
        Best out = top.push(value);
        for (int j = c; j < MAX_TOPS; ++j)  // a list of c in one of MAX_TOPS
            if (top.at[j].index != NO_INDEX) {
                out = top.at[j];
                top.at[j] = nothing();
            }
        if (out.index != NO_INDEX) join(rest, out.value, inverse);
    }

    void take(const Folded& other) {
        rest = merged(rest, other.rest, inverse);
        for (const Best& best : other.top.at)
            if (best.index != NO_INDEX) take(best);
    }
};

}  // namespace

// A row of K values in parts: values i with part[i] = p go to state p in this order, and states
// are merged in the order given. `centre` is the centre of rests that start as centred.
extern "C" void fold(const float* s, const int32_t* part, const int32_t* order, int64_t K,
                     int32_t parts, int32_t c, double tau, int32_t centred, float centre,
                     State* out) {
    std::vector<Folded> states(static_cast<size_t>(parts));
    for (Folded& state : states) {
        state.top.clear();
        state.c = c;
        state.inverse = 1.0 / tau;
        state.rest.centred = centred;
        state.rest.shift = centre;
    }
    for (int64_t k = 0; k < K; ++k) states[part[k]].take(Best{s[k], static_cast<int32_t>(k)});
    Folded& whole = states[order[0]];
    for (int32_t i = 1; i < parts; ++i) whole.take(states[order[i]]);
    out->bad = 0;
    for (int j = 0; j < c; ++j) out->top[j] = whole.top.at[j];
    out->rest[0] = whole.rest;
}

extern "C" double finish(const State* state, const Request* request, int32_t c, int64_t K,
                         double tau) {
    return score_of(*request, *state, c, K, &tau);
}

extern "C" int32_t state_bytes() { return static_cast<int32_t>(sizeof(State)); }
