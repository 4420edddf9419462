// The Python module and the registration of operators: the one file that includes Torch.
#include <torch/csrc/utils/pybind.h>
#include <torch/library.h>

#include <atomic>
#include <cmath>

#include "bind/ebm.h"
#include "bind/grouped.h"
#include "bind/patch_terms.h"
#include "bind/patches.h"
#include "bind/rows.h"
#include "build_info.h"

namespace py = pybind11;

namespace fastood {
namespace {

const Kernels* const kAll[] = {
#if defined(__x86_64__)
    &kernels_amx, &kernels_avx512, &kernels_avx2,
#endif
    &kernels_generic,
};

std::atomic<const Kernels*> chosen{nullptr};

}  // namespace

const Kernels& kernels() {
    const Kernels* k = chosen.load(std::memory_order_relaxed);
    if (k == nullptr) {
        for (const Kernels* candidate : kAll)
            if (candidate->supported()) {
                k = candidate;
                break;
            }
        chosen.store(k, std::memory_order_relaxed);
    }
    return *k;
}

static void choose(const std::string& name) {
    for (const Kernels* candidate : kAll)
        if (name == candidate->name) {
            TORCH_CHECK_VALUE(candidate->supported(), "instruction set: this machine has no ", name);
            chosen.store(candidate);
            return;
        }
    TORCH_CHECK_VALUE(false, "instruction set: expected generic, avx2, avx512 or amx, got ", name);
}

Pool pool() {
    return {at::in_parallel_region() ? 1 : at::get_num_threads(),
            [](int64_t n, void (*body)(void*, int64_t, int64_t), void* context) {
                parallel_for(0, n, 1,
                             [&](int64_t begin, int64_t end) { body(context, begin, end); });
            }};
}

// For Python in eager mode without gradients: past the dispatcher, which costs several microseconds.
static std::tuple<Tensor, OptionalTensor> row_scores(
    const Plan& plan, const OptionalTensor& image, const OptionalTensor& panels,
    const OptionalTensor& similarity, int64_t K, bool normalize, bool classes,
    const std::string& name, int64_t per_row) {
    Tensor scores;
    Statistics found;
    found.whole = false;
    run_rows(plan, image, panels, similarity, K, normalize, &scores, classes ? &found : nullptr,
             name, per_row);
    return {scores, classes ? OptionalTensor(found.index.select(1, 0)) : OptionalTensor()};
}

}  // namespace fastood

TORCH_LIBRARY_IMPL(fastood, CPU, m) {
    m.impl("row_statistics", &fastood::row_statistics);
    m.impl("row_statistics_backward", &fastood::row_statistics_backward);
    m.impl("similarity_statistics", &fastood::similarity_statistics);
    m.impl("similarity_statistics_backward", &fastood::similarity_statistics_backward);
    m.impl("grouped", &fastood::grouped);
    m.impl("grouped_backward", &fastood::grouped_backward);
    m.impl("patch_entropy", &fastood::patch_entropy);
    m.impl("patch_terms", &fastood::patch_terms);
    m.impl("ebm_loss", &fastood::ebm_loss_operator);
}

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
    using namespace fastood;
    m.doc() = "Fused CPU kernels of fastood.";
    py::register_local_exception_translator([](std::exception_ptr p) {
        try {
            if (p) std::rethrow_exception(p);
        } catch (const c10::ValueError& e) {
            PyErr_SetString(PyExc_ValueError, e.what_without_backtrace());
        }
    });
    add_build_info(m);

    const auto no_gil = py::call_guard<py::gil_scoped_release>();

    m.def("instruction_sets", [] {
        std::vector<std::string> names;
        for (const Kernels* k : kAll)
            if (k->supported()) names.emplace_back(k->name);
        return names;
    });
    m.def("active_instruction_set", [] { return std::string(kernels().name); });
    m.def("choose_instruction_set", &choose, py::arg("name"));

    py::class_<Plan>(m, "Plan").def(
        py::init<std::vector<double>,
                 const std::vector<std::tuple<int, int, int64_t, double, bool>>&, int64_t, bool>(),
        py::arg("taus"), py::arg("requests"), py::arg("c"), py::arg("moments"));
    m.def("unit_rows", &fastood::unit_rows, no_gil, py::arg("rows"), py::arg("name"));
    m.def("pack_text", &pack_text, no_gil, py::arg("text"), py::arg("normalize"), py::arg("name"));
    m.def("splits_text", [] { return kernels().split != nullptr; });
    m.def("split_text", &split_text, no_gil, py::arg("text"), py::arg("normalize"),
          py::arg("name"));
    m.def("row_scores", &row_scores, no_gil, py::arg("plan"), py::arg("image"), py::arg("panels"),
          py::arg("similarity"), py::arg("K"), py::arg("normalize"), py::arg("classes"),
          py::arg("name"), py::arg("per_row"));
    m.def("grouped_scores", &grouped_scores, no_gil, py::arg("image"), py::arg("panels"),
          py::arg("negatives"), py::arg("K"), py::arg("G"), py::arg("m"), py::arg("full"),
          py::arg("tau"), py::arg("normalize"));
    m.def("ebm_loss", &ebm_loss, no_gil, py::arg("image"), py::arg("text"), py::arg("labels"),
          py::arg("tau"), py::arg("weight"), py::arg("kept"), py::arg("by_label"),
          py::arg("edit_all"), py::arg("ce_original"), py::arg("renorm"),
          py::arg("normalize_image"), py::arg("normalize_text"), py::arg("wants_image"),
          py::arg("wants_text"));
}
