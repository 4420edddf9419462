// The batched symmetric eigensolver of cuSOLVER, found at run time.
//
// Neither its headers nor its library are needed to build this: the library is the one torch has
// loaded, whatever its version, and one without a batched solver (before CUDA 12.6) has no such
// symbol. The prototypes are those of cusolverDn.h; tests/cuda compares them where that is at hand.
#include <dlfcn.h>

#include <cstddef>
#include <map>
#include <mutex>

#include "api.h"
#include "eigen.h"

namespace fastood {
namespace {

struct Library {
    solver::Create create = nullptr;
    solver::CreateParams create_params = nullptr;
    solver::SetStream set_stream = nullptr;
    solver::BufferSize buffer_size = nullptr;
    solver::Solve solve = nullptr;
    bool whole() const { return create && create_params && set_stream && buffer_size && solve; }
};

struct Handle {
    void* solver = nullptr;
    void* params = nullptr;
};

std::mutex lock;  // a handle has one user at a time
Library library;
std::map<int32_t, Handle> handles;  // of each device, kept: one takes milliseconds to make

template <class F>
void find(void* from, const char* name, F& function) {
    function = reinterpret_cast<F>(dlsym(from, name));
}

int32_t handle_of(int32_t device, Handle* out) {
    if (!library.whole()) return kNoSolver;
    Handle& h = handles[device];
    if (h.solver == nullptr && library.create(&h.solver) != 0) {
        h.solver = nullptr;
        return kSolverFailed;
    }
    if (h.params == nullptr && library.create_params(&h.params) != 0) {
        h.params = nullptr;
        return kSolverFailed;
    }
    *out = h;
    return 0;
}

}  // namespace
}  // namespace fastood

using namespace fastood;

FASTOOD_API int32_t fastood_eigen_load(const char* name) {
    const std::lock_guard<std::mutex> guard(lock);
    if (library.whole()) return 0;
    void* from = dlopen(name, RTLD_NOW | RTLD_LOCAL | RTLD_NOLOAD);
    if (from == nullptr) from = dlopen(name, RTLD_NOW | RTLD_LOCAL);
    if (from == nullptr) return kNoSolver;
    Library found;
    find(from, "cusolverDnCreate", found.create);
    find(from, "cusolverDnCreateParams", found.create_params);
    find(from, "cusolverDnSetStream", found.set_stream);
    find(from, "cusolverDnXsyevBatched_bufferSize", found.buffer_size);
    find(from, "cusolverDnXsyevBatched", found.solve);
    if (!found.whole()) {
        dlclose(from);
        return kNoSolver;
    }
    library = found;
    return 0;
}

FASTOOD_API int32_t fastood_eigen_workspace(int32_t device, int64_t n, int64_t N, double* a,
                                            double* values, uint64_t* on_device,
                                            uint64_t* on_host) {
    *on_device = *on_host = 0;
    if (n < 0 || N < 0) return kBadShape;
    if (n == 0 || N == 0) return 0;
    const std::lock_guard<std::mutex> guard(lock);
    Handle h;
    if (const int32_t fault = handle_of(device, &h)) return fault;
    size_t there = 0, here = 0;
    const int32_t status = library.buffer_size(
        h.solver, h.params, solver::kVectors, solver::kLower, n, solver::kDouble, a, n,
        solver::kDouble, values, solver::kDouble, &there, &here, N);
    *on_device = there;
    *on_host = here;
    return status == 0 ? 0 : kSolverFailed;
}

FASTOOD_API int32_t fastood_eigen(int32_t device, int64_t n, int64_t N, double* a, double* values,
                                  void* on_device, uint64_t device_bytes, void* on_host,
                                  uint64_t host_bytes, int32_t* info, void* stream) {
    if (n < 0 || N < 0) return kBadShape;
    if (n == 0 || N == 0) return 0;
    const std::lock_guard<std::mutex> guard(lock);
    Handle h;
    if (const int32_t fault = handle_of(device, &h)) return fault;
    if (library.set_stream(h.solver, stream) != 0) return kSolverFailed;
    const int32_t status = library.solve(
        h.solver, h.params, solver::kVectors, solver::kLower, n, solver::kDouble, a, n,
        solver::kDouble, values, solver::kDouble, on_device, device_bytes, on_host, host_bytes,
        info, N);
    return status == 0 ? 0 : kSolverFailed;
}
