// The launchers of this folder for Python, each with its arguments by name and the stream as its address.
// Part of prfl_kernels._C, and of the module that the tests build on cusim.
#include "bind.h"

#include "cuda/attention_hopper.h"
#include "cuda/norm.h"
#include "cuda/qk_norm_rope.h"
#include "cuda/reward_pool.h"
#include "cuda/solver_step.h"

namespace py = pybind11;
using prfl::Field;
using prfl::View;
using Size = int64_t;

namespace {

// Without the GIL; what `given` holds stays alive.
template <class A, class Run>
void def_launch(py::module_& m, const char* name, Run run, const std::vector<Field<A>>& fields) {
  m.def(name, [=](const py::kwargs& given) {
    if (!given.contains("stream"))
      throw py::type_error(std::string(name) + ": got no argument stream, want it");
    const py::object stream = given.attr("pop")("stream");
    const A arguments = prfl::filled(name, fields, given);
    const auto handle = reinterpret_cast<cudaStream_t>(stream.cast<Size>());
    py::gil_scoped_release unlocked;
    run(arguments, handle);
  });
}

#define FIELD PRFL_FIELD
// A tensor whose strides are members too: by sample and side of a boundary, or by sample and token.
#define VECTOR(member) \
  {#member, [](A& a, py::handle given) { prfl::fill_strided(given, a.member, a.member##_b, a.member##_s); }}
#define ROWS(member) \
  {#member, [](A& a, py::handle given) { prfl::fill_strided(given, a.member, a.member##_b, a.member##_l); }}

void bind_attention(py::module_& m) {
  struct A {
    View q, k, v, out, lse, q_scale, k_scale, v_scale;
    Size batch, queries, keys, heads;
    float scale;

    static prfl::cuda::Sequence sequence(const View& a, Size length) {
      return {a.data, length, {a.stride[0], a.stride[1], a.stride[2]}};
    }
  };
  const std::vector<Field<A>> common = {FIELD(q),     FIELD(k),     FIELD(v),       FIELD(out),
                                        FIELD(lse),   FIELD(batch), FIELD(queries), FIELD(keys),
                                        FIELD(heads), FIELD(scale)};
  std::vector<Field<A>> fp8 = {FIELD(q_scale), FIELD(k_scale), FIELD(v_scale)};
  fp8.insert(fp8.end(), common.begin(), common.end());
  const auto forward = [](const A& a, cudaStream_t stream) {
    prfl::cuda::attention_hopper_forward(A::sequence(a.q, a.queries), A::sequence(a.k, a.keys),
                                         A::sequence(a.v, a.keys), a.out.data, a.lse.at<float>(), a.batch,
                                         a.heads, a.scale, stream);
  };
  const auto forward_fp8 = [](const A& a, cudaStream_t stream) {
    prfl::cuda::attention_hopper_fp8_forward(
        A::sequence(a.q, a.queries), a.q_scale.at<float>(), A::sequence(a.k, a.keys), a.k_scale.at<float>(),
        a.v.data, a.v_scale.at<float>(), a.out.data, a.lse.at<float>(), a.batch, a.heads, a.scale, stream);
  };
  def_launch<A>(m, "attention_hopper_forward", forward, common);
  def_launch<A>(m, "attention_hopper_fp8_forward", forward_fp8, fp8);
}

void bind_norm_forward(py::module_& m) {
  using A = prfl::cuda::NormForward;
  def_launch<A>(m, "norm_forward", prfl::cuda::norm_forward,
                {ROWS(x), ROWS(y), VECTOR(gate), VECTOR(scale), VECTOR(shift), FIELD(total), FIELD(n),
                 FIELD(quant), FIELD(mean), FIELD(rstd), FIELD(batch), FIELD(length), FIELD(width),
                 FIELD(boundary), FIELD(eps), FIELD(base), FIELD(x_kind), FIELD(y_kind), FIELD(n_kind), FIELD(aligned)});
}

void bind_norm_backward(py::module_& m) {
  using A = prfl::cuda::NormBackward;
  def_launch<A>(m, "norm_backward", prfl::cuda::norm_backward,
                {ROWS(dn),         ROWS(dsum),    ROWS(x),        ROWS(y),        VECTOR(gate),
                 VECTOR(scale),    FIELD(mean),   FIELD(rstd),    FIELD(dx),      FIELD(dy),
                 FIELD(part),      FIELD(batch),  FIELD(length),  FIELD(width),   FIELD(boundary),
                 FIELD(before),    FIELD(base),   FIELD(x_kind),  FIELD(y_kind),  FIELD(dn_kind),
                 FIELD(aligned),   FIELD(wants_parameters),       FIELD(wants_gate)});
}

// What both directions of qk_norm_rope have.
#define ROTATION                                                                                  \
  PRFL_NAMED("cos", rotation.cos), PRFL_NAMED("sin", rotation.sin),                               \
      PRFL_NAMED("head_dim", rotation.head_dim), PRFL_NAMED("frame_pairs", rotation.frame_pairs), \
      PRFL_NAMED("row_pairs", rotation.row_pairs), PRFL_NAMED("rows", rotation.rows),             \
      PRFL_NAMED("columns", rotation.columns), PRFL_NAMED("offset", rotation.offset)

void bind_qk_norm_rope_forward(py::module_& m) {
  using A = prfl::cuda::QkNormRopeForward;
  def_launch<A>(m, "qk_norm_rope_forward", prfl::cuda::qk_norm_rope_forward,
                {ROWS(q), ROWS(k), FIELD(weight_q), FIELD(weight_k), FIELD(out_q), FIELD(out_k),
                 FIELD(quant_q), FIELD(quant_k), FIELD(rstd_q), FIELD(rstd_k), FIELD(batch), FIELD(length),
                 FIELD(width), ROTATION, FIELD(eps), FIELD(q_kind), FIELD(out_kind), FIELD(aligned)});
}

void bind_qk_norm_rope_backward(py::module_& m) {
  using A = prfl::cuda::QkNormRopeBackward;
  def_launch<A>(m, "qk_norm_rope_backward", prfl::cuda::qk_norm_rope_backward,
                {ROWS(dout_q), ROWS(dout_k), ROWS(q), ROWS(k), FIELD(weight_q), FIELD(weight_k),
                 FIELD(rstd_q), FIELD(rstd_k), FIELD(dq), FIELD(dk), FIELD(part), FIELD(batch), FIELD(length),
                 FIELD(width), ROTATION, FIELD(q_kind), FIELD(aligned)});
}

void bind_reward_pool_forward(py::module_& m) {
  using A = prfl::cuda::RewardPoolForward;
  def_launch<A>(m, "reward_pool_forward", prfl::cuda::reward_pool_forward,
                {ROWS(x), FIELD(u), FIELD(pooled), FIELD(lse), FIELD(scores), FIELD(top), FIELD(total),
                 FIELD(acc), FIELD(batch), FIELD(length), FIELD(width), FIELD(queries), FIELD(bf16)});
}

void bind_reward_pool_backward(py::module_& m) {
  using A = prfl::cuda::RewardPoolBackward;
  def_launch<A>(m, "reward_pool_backward", prfl::cuda::reward_pool_backward,
                {ROWS(x), FIELD(u), FIELD(dpooled), FIELD(scores), FIELD(lse), FIELD(delta), FIELD(dx),
                 FIELD(part), FIELD(batch), FIELD(length), FIELD(width), FIELD(queries), FIELD(bf16)});
}

void bind_solver_step(py::module_& m) {
  using A = prfl::cuda::SolverStep;
  def_launch<A>(
      m, "solver_step", prfl::cuda::solver_step,
      {FIELD(x), FIELD(x_last), FIELD(m0), FIELD(m1), FIELD(velocity), FIELD(columns), FIELD(x_next),
       FIELD(x_c), FIELD(m_t), FIELD(batch), FIELD(size), FIELD(bf16), FIELD(aligned)});
}

}  // namespace

void bind_cuda(py::module_& m) {
  m.attr("row_width") = prfl::cuda::kRowWidth;
  m.attr("reward_pool_queries") = prfl::cuda::kPoolQueries;
  m.attr("reward_pool_width") = prfl::cuda::kPoolWidth;
  m.def("row_runs", &prfl::cuda::row_runs, py::arg("batch"), py::arg("length"), py::arg("width"),
        py::arg("boundary") = 0);
  m.def("runs_before", &prfl::cuda::runs_before);
  m.def("reward_pool_runs", &prfl::cuda::reward_pool_runs);
  bind_attention(m);
  bind_norm_forward(m);
  bind_norm_backward(m);
  bind_qk_norm_rope_forward(m);
  bind_qk_norm_rope_backward(m);
  bind_reward_pool_forward(m);
  bind_reward_pool_backward(m);
  bind_solver_step(m);
}
