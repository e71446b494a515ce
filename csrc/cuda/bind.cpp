// The launchers of csrc/cuda for Python. Tensors come as in cpu/bind.cpp, the stream as its address; also
// part of the module that the tests build on cusim.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <tuple>

#include "bind.h"
#include "cuda/add_norm.h"
#include "cuda/attention_hopper.h"
#include "cuda/qk_norm_rope.h"
#include "cuda/reward_pool.h"
#include "cuda/solver_step.h"

namespace py = pybind11;
using prfl::DType;
using prfl::View;
using Size = int64_t;

namespace {

cudaStream_t at(Size stream) { return reinterpret_cast<cudaStream_t>(stream); }

void bind_attention(py::module_& m) {
  using namespace prfl::cuda;
  const auto sequence = [](const View& a, Size length) {
    return Sequence{a.data, length, {a.stride[0], a.stride[1], a.stride[2]}};
  };
  m.def("attention_hopper_forward", [=](View q, View k, View v, View out, View lse, Size batch, Size queries,
                                        Size keys, Size heads, float scale, Size stream) {
    py::gil_scoped_release unlocked;
    attention_hopper_forward(sequence(q, queries), sequence(k, keys), sequence(v, keys), out.data,
                             lse.at<float>(), batch, heads, scale, at(stream));
  });
  m.def("attention_hopper_fp8_forward",
        [=](View q, View q_scale, View k, View k_scale, View v, View v_scale, View out, View lse, Size batch,
            Size queries, Size keys, Size heads, float scale, Size stream) {
          py::gil_scoped_release unlocked;
          attention_hopper_fp8_forward(sequence(q, queries), q_scale.at<float>(), sequence(k, keys),
                                       k_scale.at<float>(), v.data, v_scale.at<float>(), out.data,
                                       lse.at<float>(), batch, heads, scale, at(stream));
        });
}

void bind_reward_pool(py::module_& m) {
  using namespace prfl::cuda;
  m.attr("reward_pool_queries") = kPoolQueries;
  m.attr("reward_pool_width") = kPoolWidth;
  m.def("reward_pool_runs", &reward_pool_runs);
  m.def("reward_pool_forward", [](View x, View u, View pooled, View lse, View scores, View top, View total,
                                  View acc, Size batch, Size length, Size width, Size queries, Size stream) {
    py::gil_scoped_release unlocked;
    reward_pool_forward({x.data, u.at<float>(), pooled.at<float>(), lse.at<float>(), scores.at<float>(),
                         top.at<float>(), total.at<float>(), acc.at<float>(), x.stride[0], x.stride[1], batch,
                         length, width, queries, x.dtype == DType::bf16},
                        at(stream));
  });
  m.def("reward_pool_backward",
        [](View x, View u, View dpooled, View scores, View lse, View delta, View dx, View part, Size batch,
           Size length, Size width, Size queries, Size stream) {
          py::gil_scoped_release unlocked;
          reward_pool_backward({x.data, u.at<float>(), dpooled.at<float>(), scores.at<float>(),
                                lse.at<float>(), delta.at<float>(), dx.data, part.at<float>(), x.stride[0],
                                x.stride[1], batch, length, width, queries, x.dtype == DType::bf16},
                               at(stream));
        });
}

void bind_add_norm(py::module_& m) {
  using namespace prfl::cuda;
  m.attr("norm_width") = kNormWidth;
  m.def("add_norm_runs", &add_norm_runs);
  m.def("add_norm_forward", [](View x, View y, View gate, View scale, View shift, View sum, View n,
                               View quant, View mean, View rstd, Size batch, Size length, Size width,
                               float eps, float base, int branch, bool aligned, Size stream) {
    py::gil_scoped_release unlocked;
    add_norm_forward({x.data,
                      y.data,
                      gate.at<float>(),
                      scale.at<float>(),
                      shift.at<float>(),
                      sum.data,
                      n.data,
                      quant.at<float>(),
                      mean.at<float>(),
                      rstd.at<float>(),
                      x.stride[0],
                      x.stride[1],
                      y.stride[0],
                      y.stride[1],
                      gate.stride[0],
                      scale.stride[0],
                      shift.stride[0],
                      batch,
                      length,
                      width,
                      eps,
                      base,
                      int(x.dtype),
                      branch,
                      int(n.dtype),
                      aligned},
                     at(stream));
  });
  m.def("add_norm_backward",
        [](View dn, View dsum, View x, View y, View gate, View scale, View mean, View rstd, View dx, View dy,
           View part, Size batch, Size length, Size width, float base, int kind, int branch, int grad,
           bool aligned, bool parameters, bool wants_gate, Size stream) {
          py::gil_scoped_release unlocked;
          add_norm_backward({dn.data,
                             dsum.data,
                             x.data,
                             y.data,
                             gate.at<float>(),
                             scale.at<float>(),
                             mean.at<float>(),
                             rstd.at<float>(),
                             dx.data,
                             dy.data,
                             part.at<float>(),
                             dn.stride[0],
                             dn.stride[1],
                             dsum.stride[0],
                             dsum.stride[1],
                             x.stride[0],
                             x.stride[1],
                             y.stride[0],
                             y.stride[1],
                             gate.stride[0],
                             scale.stride[0],
                             batch,
                             length,
                             width,
                             base,
                             kind,
                             branch,
                             grad,
                             aligned,
                             parameters,
                             wants_gate},
                            at(stream));
        });
}

// (head_dim, frame pairs, row pairs, rows, columns, offset)
using Places = std::tuple<int, int, int, int, int, int>;

prfl::cuda::Rotation rotation(View cos, View sin, const Places& p) {
  const auto [head_dim, frame_pairs, row_pairs, rows, columns, offset] = p;
  return {cos.at<float>(), sin.at<float>(), head_dim, frame_pairs, row_pairs, rows, columns, offset};
}

void bind_qk_norm_rope(py::module_& m) {
  using namespace prfl::cuda;
  m.def("qk_norm_rope_forward",
        [](View q, View k, View weight_q, View weight_k, View out_q, View out_k, View quant_q, View quant_k,
           View rstd_q, View rstd_k, View cos, View sin, Size batch, Size length, Size width, Places places,
           float eps, bool aligned, Size stream) {
          py::gil_scoped_release unlocked;
          qk_norm_rope_forward({q.data,
                                k.data,
                                weight_q.at<float>(),
                                weight_k.at<float>(),
                                out_q.data,
                                out_k.data,
                                quant_q.at<float>(),
                                quant_k.at<float>(),
                                rstd_q.at<float>(),
                                rstd_k.at<float>(),
                                q.stride[0],
                                q.stride[1],
                                k.stride[0],
                                k.stride[1],
                                batch,
                                length,
                                width,
                                rotation(cos, sin, places),
                                eps,
                                int(q.dtype),
                                int(out_q.dtype),
                                aligned},
                               at(stream));
        });
  m.def("qk_norm_rope_backward",
        [](View dq, View dk, View q, View k, View weight_q, View weight_k, View rstd_q, View rstd_k,
           View out_q, View out_k, View part, View cos, View sin, Size batch, Size length, Size width,
           Places places, bool aligned, Size stream) {
          py::gil_scoped_release unlocked;
          qk_norm_rope_backward({dq.data,
                                 dk.data,
                                 q.data,
                                 k.data,
                                 weight_q.at<float>(),
                                 weight_k.at<float>(),
                                 rstd_q.at<float>(),
                                 rstd_k.at<float>(),
                                 out_q.data,
                                 out_k.data,
                                 part.at<float>(),
                                 dq.stride[0],
                                 dq.stride[1],
                                 dk.stride[0],
                                 dk.stride[1],
                                 q.stride[0],
                                 q.stride[1],
                                 k.stride[0],
                                 k.stride[1],
                                 batch,
                                 length,
                                 width,
                                 rotation(cos, sin, places),
                                 int(q.dtype),
                                 aligned},
                                at(stream));
        });
}

void bind_solver_step(py::module_& m) {
  m.def("solver_step", [](View x, View x_last, View m0, View m1, View velocity, View columns, View x_next,
                          View x_c, View m_t, Size batch, Size size, bool aligned, Size stream) {
    py::gil_scoped_release unlocked;
    prfl::cuda::solver_step({x.at<float>(), x_last.at<float>(), m0.at<float>(), m1.at<float>(), velocity.data,
                             columns.at<float>(), x_next.at<float>(), x_c.at<float>(), m_t.at<float>(), batch,
                             size, velocity.dtype == DType::bf16, aligned},
                            at(stream));
  });
}

}  // namespace

void bind_cuda(py::module_& m) {
  bind_reward_pool(m);
  bind_add_norm(m);
  bind_qk_norm_rope(m);
  bind_solver_step(m);
  bind_attention(m);
}

#ifdef CUSIM
// The module of the tests: the launchers on cusim, and what the tests ask of it.
#include "sim/cusim.h"

PYBIND11_MODULE(prfl_sim, m) {
  bind_cuda(m);
  m.def("watch", [](Size base, Size bytes) { cusim::watch(reinterpret_cast<void*>(base), bytes); });
  m.def("unwatch", &cusim::unwatch);
  m.def("load_early", &cusim::load_early);
  m.def("use_multiprocessors", [](int number) { cusim::multiprocessors = number; });
  m.def("traffic", [](Size base) { return cusim::traffic(reinterpret_cast<void*>(base)); });
  // The launches since the last unwatch: (blocks along x, y, threads, bytes of shared memory, cluster).
  m.def("launches", [] {
    std::vector<std::tuple<unsigned, unsigned, unsigned, size_t, unsigned>> found;
    for (const cusim::Launch& l : cusim::launches())
      found.emplace_back(l.grid.x, l.grid.y, l.block.x, l.shared, l.cluster.x);
    return found;
  });
}
#endif
