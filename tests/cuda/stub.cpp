// The interface of the CUDA library without CUDA, for tests of finding, building and loading it.
// Where VALUE is not 7 its structures are not those that Python knows.
#include <cstddef>

#include "api.h"
#include "rows_plan.h"
#include "value.h"

#define TEXT_OF(x) #x
#define TEXT(x) TEXT_OF(x)
__attribute__((used)) static const char build_key[] = "fastood-build-key:" TEXT(FASTOOD_BUILD_KEY);

using namespace fastood;

FASTOOD_API int32_t fastood_rows_plan(const RowJob* job, RowPlan* plan) {
    return plan_rows(*job, plan);
}
FASTOOD_API int32_t fastood_rows(const RowJob*, void*) { return 0; }
FASTOOD_API int32_t fastood_eigen_load(const char*) { return kNoSolver; }
FASTOOD_API int32_t fastood_eigen_workspace(int32_t, int64_t, int64_t, double*, double*, uint64_t*,
                                            uint64_t*) {
    return kNoSolver;
}
FASTOOD_API int32_t fastood_eigen(int32_t, int64_t, int64_t, double*, double*, void*, uint64_t,
                                  void*, uint64_t, int32_t*, void*) {
    return kNoSolver;
}
FASTOOD_API const char* fastood_message(int32_t) { return "stub"; }
FASTOOD_API const char* fastood_key() { return &TEXT(FASTOOD_BUILD_KEY)[1]; }
FASTOOD_API int64_t fastood_layout(int32_t what) {
    const int64_t sizes[] = {sizeof(RowJob), sizeof(RowPlan), sizeof(Request), sizeof(State),
                             static_cast<int64_t>(offsetof(RowJob, requests))};
    return sizes[what] + VALUE - 7;
}
