// What the library says of itself.
#include <cuda_runtime.h>

#include <cstddef>

#include "api.h"

#define FASTOOD_TEXT_OF(x) #x
#define FASTOOD_TEXT(x) FASTOOD_TEXT_OF(x)
#ifndef FASTOOD_BUILD_KEY
#define FASTOOD_BUILD_KEY none
#endif

// Kept in one piece in the file, where it is read before anything is loaded.
__attribute__((used)) static const char fastood_build_key[] =
    "fastood-build-key:" FASTOOD_TEXT(FASTOOD_BUILD_KEY);

using namespace fastood;

FASTOOD_API const char* fastood_key() { return &FASTOOD_TEXT(FASTOOD_BUILD_KEY)[1]; }

FASTOOD_API const char* fastood_message(int32_t status) {
    switch (status) {
        case 0:
            return "success";
        case kBadShape:
            return "similarity: expected (B, K) with 1 <= K < 2^31 and few enough rows";
        case kBadType:
            return "similarity: expected float32, bfloat16 or float16";
        case kBadTops:
            return "c: expected 1 <= c <= K, and at most 16";
        case kBadTaus:
            return "tau: expected at most 16 temperatures > 0";
        case kBadRequest:
            return "requests: at most 32 within the plan (temperature, c, moments), and their output";
        case kBadWorkspace:
            return "workspace: smaller than planned, or not aligned to 8 bytes";
        case kNoSolver:
            return "no library with a batched eigensolver";
        case kSolverFailed:
            return "the batched eigensolver refused its arguments";
        default:
            return cudaGetErrorString(static_cast<cudaError_t>(status));
    }
}

FASTOOD_API int64_t fastood_layout(int32_t what) {
    switch (what) {
        case 0:
            return sizeof(RowJob);
        case 1:
            return sizeof(RowPlan);
        case 2:
            return sizeof(Request);
        case 3:
            return sizeof(State);
        default:
            return offsetof(RowJob, requests);
    }
}
