// at::parallel_for, on torch's own OpenMP threads whichever compiler this is.
//
// GCC's OpenMP code calls GOMP_parallel, which torch has loaded. Clang's would call __kmpc_..., for
// which a second runtime would be needed; its threads all look like thread 0 to torch's
// omp_get_thread_num, and at::parallel_for would compute the first range several times and the
// others never. So with another compiler OpenMP is off and GOMP_parallel is called by hand.
#pragma once

#include <ATen/Parallel.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <exception>

#ifndef _OPENMP
extern "C" {
void GOMP_parallel(void (*run)(void*), void* data, unsigned threads, unsigned flags)
    __attribute__((weak));
int omp_get_num_threads() __attribute__((weak));
int omp_get_thread_num() __attribute__((weak));
}
#endif

namespace fastood {

#ifdef _OPENMP

inline bool parallel_runs() { return true; }

// f(begin, end) on ranges that cover [begin, end), at least grain long, on torch's threads.
template <class F>
inline void parallel_for(int64_t begin, int64_t end, int64_t grain, const F& f) {
    at::parallel_for(begin, end, grain, f);
}

#else

inline bool parallel_runs() {
    return GOMP_parallel != nullptr && omp_get_num_threads != nullptr &&
           omp_get_thread_num != nullptr;
}

template <class F>
inline void parallel_for(int64_t begin, int64_t end, int64_t grain, const F& f) {
    if (begin >= end) return;
    const int64_t count = end - begin;
    const int64_t wanted = std::min<int64_t>(
        at::get_num_threads(), (count + std::max<int64_t>(grain, 1) - 1) / std::max<int64_t>(grain, 1));
    if (wanted <= 1 || !parallel_runs() || at::in_parallel_region()) {
        at::internal::ThreadIdGuard thread(0);
        f(begin, end);
        return;
    }
    struct Work {
        const F& f;
        int64_t begin, end;
        std::atomic_flag failed;
        std::exception_ptr error;
    } work{f, begin, end, ATOMIC_FLAG_INIT, nullptr};
    GOMP_parallel(
        [](void* data) {
            Work& w = *static_cast<Work*>(data);
            const int64_t threads = omp_get_num_threads(), thread = omp_get_thread_num();
            const int64_t chunk = (w.end - w.begin + threads - 1) / threads;
            const int64_t from = w.begin + thread * chunk;
            if (from >= w.end) return;
            try {
                at::internal::ThreadIdGuard id(static_cast<int>(thread));
                w.f(from, std::min(w.end, from + chunk));
            } catch (...) {  // nothing may leave a parallel region
                if (!w.failed.test_and_set()) w.error = std::current_exception();
            }
        },
        &work, static_cast<unsigned>(wanted), 0);
    if (work.error) std::rethrow_exception(work.error);
}

#endif

}  // namespace fastood
