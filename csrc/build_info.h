// What a library says of itself: the key it was built for, its compiler, its threads.
#pragma once

#include <ATen/Parallel.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <vector>

#include "parallel.h"

#define FASTOOD_TEXT_OF(x) #x
#define FASTOOD_TEXT(x) FASTOOD_TEXT_OF(x)
#ifndef FASTOOD_BUILD_KEY
#define FASTOOD_BUILD_KEY none
#endif

// Kept in one piece in the file, where it is read before anything is loaded.
__attribute__((used)) static const char fastood_build_key[] =
    "fastood-build-key:" FASTOOD_TEXT(FASTOOD_BUILD_KEY);

namespace fastood {

// The thread that ran each of as many pieces of work as there are threads: 0, 1, ... if all did.
inline std::vector<int> parallel_threads() {
    std::vector<int> seen(static_cast<size_t>(at::get_num_threads()), -1);
    parallel_for(0, static_cast<int64_t>(seen.size()), 1, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) seen[static_cast<size_t>(i)] = at::get_thread_num();
    });
    return seen;
}

inline void add_build_info(pybind11::module_& m) {
    m.attr("build_key") = &FASTOOD_TEXT(FASTOOD_BUILD_KEY)[1];  // without its k
    m.attr("openmp") = parallel_runs();
    m.attr("compiler") = __VERSION__;
    m.def("parallel_threads", &parallel_threads, "The thread of each of get_num_threads() pieces");
}

}  // namespace fastood
