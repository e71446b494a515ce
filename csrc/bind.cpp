// prfl_kernels._C. No torch header: a tensor comes as (address, dtype code, strides of all dimensions
// but the last, which is 1) or None, so that one build serves every torch. Shapes are checked in Python.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "bind.h"
#include "cpu/isa.h"
#include "cpu/parallel.h"

namespace py = pybind11;
using prfl::View;

static void bind_cpu(py::module_& m) {
  using Size = int64_t;
  m.def("bias_gelu_forward", [](View h, View bias, View out, Size rows, Size width, int threads) {
    py::gil_scoped_release unlocked;
    prfl::kernels().bias_gelu_forward({h, bias, out, rows, width, threads});
  });
  m.def("bias_gelu_backward", [](View dg, View h, View bias, View dh, View g, View part, View dbias,
                                 Size rows, Size width, Size runs, int threads) {
    py::gil_scoped_release unlocked;
    prfl::kernels().bias_gelu_backward({dg, h, bias, dh, g, part, dbias, rows, width, runs, threads});
  });
}

PYBIND11_MODULE(_C, m) {
  m.attr("cuda_architectures") = PRFL_CUDA_ARCHITECTURES;  // "" where it is not built
  m.attr("cuda_reason") = PRFL_CUDA_REASON;                // why not
  m.def("isas", [] {  // [(instruction set, whether it runs on this processor)], poorest first
    std::vector<std::pair<std::string, bool>> found;
    for (const prfl::Build& build : prfl::builds()) found.emplace_back(build.name, build.runs_here);
    return found;
  });
  m.def("active_isa", [] { return std::string(prfl::active().name); });
  m.def("use_isa", &prfl::use_isa);
  m.def("openmp_runtime", &prfl::openmp_runtime);
  bind_cpu(m);
#ifdef PRFL_CUDA
  bind_cuda(m);
#endif
}
