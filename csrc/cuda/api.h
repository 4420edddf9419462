// What Python calls through ctypes: C names, plain structures, raw pointers and a stream.
#pragma once

#include "rows.h"

#define FASTOOD_API extern "C" __attribute__((visibility("default")))

// Every function returns a Status, a cudaError_t or 0.

// How the job would be launched; needs no device.
FASTOOD_API int32_t fastood_rows_plan(const fastood::RowJob* job, fastood::RowPlan* plan);

// Launches it on a stream of the current device; nothing is allocated or waited for.
FASTOOD_API int32_t fastood_rows(const fastood::RowJob* job, void* stream);

// Looks for a library's batched eigensolver: that of cuSOLVER, by name or path.
FASTOOD_API int32_t fastood_eigen_load(const char* library);

// Bytes the eigensolver needs on the device and on the host.
FASTOOD_API int32_t fastood_eigen_workspace(int32_t device, int64_t n, int64_t N, double* a,
                                            double* values, uint64_t* on_device,
                                            uint64_t* on_host);

// Eigenvalues (N, n), ascending, of symmetric a (N, n, n), whose rows become the eigenvectors.
// `info` (N,) is not 0 where the solver did not converge. `device` is the current one.
FASTOOD_API int32_t fastood_eigen(int32_t device, int64_t n, int64_t N, double* a, double* values,
                                  void* on_device, uint64_t device_bytes, void* on_host,
                                  uint64_t host_bytes, int32_t* info, void* stream);

// A status in words.
FASTOOD_API const char* fastood_message(int32_t status);

// Sizes of RowJob, RowPlan, Request and State, and the offset of RowJob.requests.
FASTOOD_API int64_t fastood_layout(int32_t what);

// The library's key, where FASTOOD_BUILD_KEY gave it one.
FASTOOD_API const char* fastood_key();
