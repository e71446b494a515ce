// prfl_kernels._C. No torch header: a tensor comes as (tensor, address, dtype code, strides of all dimensions
// but the last, which is 1) or None, so that one build serves every torch. Shapes are checked in Python.
#include "bind.h"

#include <pybind11/stl.h>

#include "cpu/isa.h"
#include "cpu/parallel.h"
#ifdef PRFL_CUDA
#include <cuda_runtime_api.h>
#endif

PYBIND11_MODULE(_C, m) {
  m.attr("cuda_architectures") = PRFL_CUDA_ARCHITECTURES;  // "" where it is not built
  m.attr("cuda_reason") = PRFL_CUDA_REASON;                // why not
  m.attr("isas_left_out") = PRFL_ISAS_LEFT_OUT;            // the compiler does not know their flags
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
  m.attr("cuda_version") = CUDART_VERSION;  // of the runtime that is linked in, 1000 major + 10 minor
  m.def("cuda_driver_version", [] {         // the newest that the driver supports; 0 without a driver
    int version = 0;
    return cudaDriverGetVersion(&version) == cudaSuccess ? version : 0;
  });
  bind_cuda(m);
#endif
}
