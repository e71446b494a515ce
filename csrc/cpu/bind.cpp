// The CPU kernels for Python, each with its arguments by name. They run without the GIL.
#include "bind.h"

#include "cpu/isa.h"
#include "cpu/kernels.h"
#include "cpu/memory.h"

namespace py = pybind11;
using prfl::Field;
using prfl::kernels;

namespace {

// `kernel` is a member of the table of the instruction set that runs.
template <class A>
void def_launch(py::module_& m, const char* name, void (*prfl::Kernels::*kernel)(const A&),
                const std::vector<Field<A>>& fields) {
  m.def(name, [=](const py::kwargs& given) {
    const A arguments = prfl::filled(name, fields, given);
    py::gil_scoped_release unlocked;
    (kernels().*kernel)(arguments);
  });
}

#define FIELD PRFL_FIELD
#define SHAPE \
  PRFL_NAMED("batch", shape.batch), PRFL_NAMED("length", shape.length), PRFL_NAMED("width", shape.width)
// q's, then k's.
#define PAIR(member) PRFL_NAMED(#member "_q", member[0]), PRFL_NAMED(#member "_k", member[1])
#define ROPE                                                                                 \
  PRFL_NAMED("cos", rope.cos), PRFL_NAMED("sin", rope.sin), PRFL_NAMED("heads", rope.heads), \
      PRFL_NAMED("head_dim", rope.head_dim), PRFL_NAMED("frame_pairs", rope.frame_pairs),    \
      PRFL_NAMED("row_pairs", rope.row_pairs), PRFL_NAMED("rows", rope.rows),                \
      PRFL_NAMED("columns", rope.columns), PRFL_NAMED("offset", rope.offset)
#define ATTENTION_SHAPE                                                                                   \
  PRFL_NAMED("batch", shape.batch), PRFL_NAMED("queries", shape.queries), PRFL_NAMED("keys", shape.keys), \
      PRFL_NAMED("heads", shape.heads), PRFL_NAMED("dim", shape.dim)

void bind_norm_forward(py::module_& m) {
  using A = prfl::NormForward;
  def_launch<A>(m, "norm_forward", &prfl::Kernels::norm_forward,
                {FIELD(x), FIELD(y), FIELD(gate), FIELD(scale), FIELD(shift), FIELD(total), FIELD(n),
                 FIELD(mean), FIELD(rstd), SHAPE, FIELD(boundary), FIELD(base), FIELD(eps), FIELD(threads)});
}

void bind_norm_backward(py::module_& m) {
  using A = prfl::NormBackward;
  def_launch<A>(m, "norm_backward", &prfl::Kernels::norm_backward,
                {FIELD(dn), FIELD(dsum), FIELD(x), FIELD(y), FIELD(gate), FIELD(scale), FIELD(mean),
                 FIELD(rstd), FIELD(dx), FIELD(dy), FIELD(part), FIELD(sums), SHAPE,
                 PRFL_NAMED("runs", runs.count), PRFL_NAMED("tokens", runs.tokens),
                 PRFL_NAMED("before", runs.before), PRFL_NAMED("boundary", runs.boundary), FIELD(sides),
                 FIELD(base), FIELD(wants_parameters), FIELD(threads)});
}

void bind_qk_norm_rope_forward(py::module_& m) {
  using A = prfl::QkNormRopeForward;
  def_launch<A>(m, "qk_norm_rope_forward", &prfl::Kernels::qk_norm_rope_forward,
                {PRFL_NAMED("q", x[0]), PRFL_NAMED("k", x[1]), PAIR(weight), PAIR(out), PAIR(rstd), SHAPE,
                 ROPE, FIELD(eps), FIELD(threads)});
}

void bind_qk_norm_rope_backward(py::module_& m) {
  using A = prfl::QkNormRopeBackward;
  def_launch<A>(
      m, "qk_norm_rope_backward", &prfl::Kernels::qk_norm_rope_backward,
      {PRFL_NAMED("dout_q", d[0]), PRFL_NAMED("dout_k", d[1]), PRFL_NAMED("q", x[0]), PRFL_NAMED("k", x[1]),
       PAIR(weight), PAIR(rstd), PRFL_NAMED("dq", dx[0]), PRFL_NAMED("dk", dx[1]), FIELD(part),
       FIELD(dweight), SHAPE, ROPE, FIELD(runs), FIELD(threads)});
}

void bind_bias_gelu_forward(py::module_& m) {
  using A = prfl::BiasGeluForward;
  def_launch<A>(m, "bias_gelu_forward", &prfl::Kernels::bias_gelu_forward,
                {FIELD(h), FIELD(bias), FIELD(g), SHAPE, FIELD(threads)});
}

void bind_bias_gelu_backward(py::module_& m) {
  using A = prfl::BiasGeluBackward;
  def_launch<A>(m, "bias_gelu_backward", &prfl::Kernels::bias_gelu_backward,
                {FIELD(dg), FIELD(h), FIELD(bias), FIELD(dh), FIELD(g), FIELD(part), FIELD(dbias), SHAPE,
                 FIELD(runs), FIELD(threads)});
}

void bind_reward_pool_forward(py::module_& m) {
  using A = prfl::RewardPoolForward;
  def_launch<A>(m, "reward_pool_forward", &prfl::Kernels::reward_pool_forward,
                {FIELD(x), FIELD(u), FIELD(part), FIELD(top), FIELD(total), FIELD(pooled), FIELD(lse),
                 FIELD(scores), SHAPE, FIELD(queries), FIELD(wanted), FIELD(runs), FIELD(threads)});
}

void bind_reward_pool_backward(py::module_& m) {
  using A = prfl::RewardPoolBackward;
  def_launch<A>(m, "reward_pool_backward", &prfl::Kernels::reward_pool_backward,
                {FIELD(x), FIELD(u), FIELD(dpooled), FIELD(delta), FIELD(scores), FIELD(lse), FIELD(dx),
                 FIELD(part), FIELD(du), SHAPE, FIELD(queries), FIELD(wanted), FIELD(runs), FIELD(threads)});
}

void bind_attention_forward(py::module_& m) {
  using A = prfl::AttentionForward;
  def_launch<A>(m, "attention_forward", &prfl::Kernels::attention_forward,
                {FIELD(q), FIELD(k), FIELD(v), FIELD(out), FIELD(lse), ATTENTION_SHAPE, FIELD(scale),
                 FIELD(last), FIELD(threads)});
}

void bind_attention_backward(py::module_& m) {
  using A = prfl::AttentionBackward;
  def_launch<A>(m, "attention_backward", &prfl::Kernels::attention_backward,
                {FIELD(dout), FIELD(dlse), FIELD(q), FIELD(k), FIELD(v), FIELD(out), FIELD(lse), FIELD(dq),
                 FIELD(dk), FIELD(dv), ATTENTION_SHAPE, FIELD(scale), FIELD(last), FIELD(threads)});
}

}  // namespace

void bind_cpu(py::module_& m) {
  m.def("advise_huge_pages", [](uintptr_t address, int64_t bytes) {
    prfl::advise_huge_pages(reinterpret_cast<void*>(address), bytes);
  });
  bind_norm_forward(m);
  bind_norm_backward(m);
  bind_qk_norm_rope_forward(m);
  bind_qk_norm_rope_backward(m);
  bind_bias_gelu_forward(m);
  bind_bias_gelu_backward(m);
  bind_reward_pool_forward(m);
  bind_reward_pool_backward(m);
  bind_attention_forward(m);
  bind_attention_backward(m);
}
