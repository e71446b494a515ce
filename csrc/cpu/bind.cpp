// prfl_kernels._C. No torch header: a tensor comes as (tensor, address, dtype code, strides of all dimensions
// but the last, which is 1) or None, so that one build serves every torch. Shapes are checked in Python.
#include "bind.h"

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <tuple>

#include "cpu/isa.h"
#include "cpu/memory.h"
#include "cpu/parallel.h"

namespace py = pybind11;
using prfl::View;

// The kernels run without the GIL.
template <class Arguments>
static void run(void (*kernel)(const Arguments&), const Arguments& arguments) {
  py::gil_scoped_release unlocked;
  kernel(arguments);
}

static void bind_cpu(py::module_& m) {
  using Size = int64_t;
  using prfl::kernels;
  using Place = std::tuple<Size, Size, Size, Size, Size, Size, Size>;  // of Rope, after its tables
  auto shape = [](Size batch, Size length, Size width) { return prfl::Shape{batch, length, width}; };
  auto rope = [](View cos, View sin, const Place& place) {
    return std::apply([&](auto... n) { return prfl::Rope{cos, sin, n...}; }, place);
  };
  m.def("advise_huge_pages", [](uintptr_t address, Size bytes) {
    prfl::advise_huge_pages(reinterpret_cast<void*>(address), bytes);
  });
  m.def("add_norm_forward", [=](View x, View y, View gate, View scale, View shift, View sum, View n,
                                View mean, View rstd, Size batch, Size length, Size width, float base,
                                float eps, int threads) {
    run(kernels().add_norm_forward,
        {x, y, gate, scale, shift, sum, n, mean, rstd, shape(batch, length, width), base, eps, threads});
  });
  m.def("add_norm_backward", [=](View dn, View dsum, View x, View y, View gate, View scale, View mean,
                                 View rstd, View dx, View dy, View part, View sums, Size batch, Size length,
                                 Size width, Size runs, float base, bool parameters, int threads) {
    run(kernels().add_norm_backward, {dn, dsum, x, y, gate, scale, mean, rstd, dx, dy, part, sums,
                                      shape(batch, length, width), runs, base, parameters, threads});
  });
  m.def("qk_norm_rope_forward", [=](View q, View k, View weight_q, View weight_k, View out_q, View out_k,
                                    View rstd_q, View rstd_k, View cos, View sin, const Place& place,
                                    Size batch, Size length, Size width, float eps, int threads) {
    run(kernels().qk_norm_rope_forward, {{q, k},
                                         {weight_q, weight_k},
                                         {out_q, out_k},
                                         {rstd_q, rstd_k},
                                         shape(batch, length, width),
                                         rope(cos, sin, place),
                                         eps,
                                         threads});
  });
  m.def("qk_norm_rope_backward",
        [=](View dq, View dk, View q, View k, View weight_q, View weight_k, View rstd_q, View rstd_k,
            View out_q, View out_k, View part, View dweight, View cos, View sin, const Place& place,
            Size batch, Size length, Size width, Size runs, int threads) {
          run(kernels().qk_norm_rope_backward, {{dq, dk},
                                                {q, k},
                                                {weight_q, weight_k},
                                                {rstd_q, rstd_k},
                                                {out_q, out_k},
                                                part,
                                                dweight,
                                                shape(batch, length, width),
                                                rope(cos, sin, place),
                                                runs,
                                                threads});
        });
  m.def("bias_gelu_forward",
        [=](View h, View bias, View g, Size batch, Size length, Size width, int threads) {
          run(kernels().bias_gelu_forward, {h, bias, g, shape(batch, length, width), threads});
        });
  m.def("bias_gelu_backward", [=](View dg, View h, View bias, View dh, View g, View part, View dbias,
                                  Size batch, Size length, Size width, Size runs, int threads) {
    run(kernels().bias_gelu_backward,
        {dg, h, bias, dh, g, part, dbias, shape(batch, length, width), runs, threads});
  });
  m.def("reward_pool_forward",
        [=](View x, View u, View part, View top, View total, View pooled, View lse, View scores, Size batch,
            Size length, Size width, Size queries, Size wanted, Size runs, int threads) {
          run(kernels().reward_pool_forward, {x, u, part, top, total, pooled, lse, scores,
                                              shape(batch, length, width), queries, wanted, runs, threads});
        });
  m.def("reward_pool_backward",
        [=](View x, View u, View dpooled, View delta, View scores, View lse, View dx, View part, View du,
            Size batch, Size length, Size width, Size queries, Size wanted, Size runs, int threads) {
          run(kernels().reward_pool_backward, {x, u, dpooled, delta, scores, lse, dx, part, du,
                                               shape(batch, length, width), queries, wanted, runs, threads});
        });
  using Sizes = std::tuple<Size, Size, Size, Size, Size>;  // of AttentionShape
  auto sized = [](const Sizes& sizes) {
    return std::apply([](auto... n) { return prfl::AttentionShape{n...}; }, sizes);
  };
  m.def("attention_forward",
        [sized](View q, View k, View v, View out, View lse, const Sizes& sizes, float scale, float last,
                int threads) {
          run(kernels().attention_forward, {q, k, v, out, lse, sized(sizes), scale, last, threads});
        });
  m.def("attention_backward",
        [sized](View dout, View dlse, View q, View k, View v, View out, View lse, View dq, View dk, View dv,
                const Sizes& sizes, float scale, float last, int threads) {
          run(kernels().attention_backward,
              {dout, dlse, q, k, v, out, lse, dq, dk, dv, sized(sizes), scale, last, threads});
        });
}

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
  bind_cuda(m);
#endif
}
