// One step of the Euler and UniPC samplers (engine/flow.py), in one pass over the state:
//
//   m_t = x - sigma v,   x_c = a_x x + a_l x_last + a_0 m_0 + a_1 m_1 + a_t m_t,
//   x_next = b_x x_c + b_t m_t + b_0 m_0
#include <algorithm>

#include "launch.h"
#include "solver_step.h"
#include "ptx/vector.h"

namespace prfl::cuda {
namespace {

constexpr int kThreads = 256, kValues = 8 * kThreads;  // of a block

template <class Velocity, bool kAligned>
__global__ void __launch_bounds__(kThreads) solver_step_kernel(const SolverStep a) {
  const int64_t b = blockIdx.y, first = int64_t(blockIdx.x) * kValues, at = b * a.size + first;
  const Columns<kAligned ? kValues : 0> columns(min(a.size - first, int64_t(kValues)), kAligned);
  if (columns.count == 0) return;
  float x[8], x_last[8], m0[8], m1[8], m_t[8];
  columns.load(a.x + at, x), columns.load(a.x_last + at, x_last);
  columns.load(a.m0 + at, m0), columns.load(a.m1 + at, m1);
  columns.load(static_cast<const Velocity*>(a.velocity) + at, m_t);
  float c[9];
  PRFL_UNROLL
  for (int i = 0; i < 9; ++i) c[i] = get(a.columns + 9 * b + i);
  PRFL_UNROLL
  for (int i = 0; i < 8; ++i) {
    m_t[i] = x[i] - c[0] * m_t[i];
    x[i] = c[1] * x[i] + c[2] * x_last[i] + c[3] * m0[i] + c[4] * m1[i] + c[5] * m_t[i];
    m0[i] = c[6] * x[i] + c[7] * m_t[i] + c[8] * m0[i];
  }
  columns.store(a.m_t + at, m_t), columns.store(a.x_c + at, x), columns.store(a.x_next + at, m0);
}

}  // namespace

void solver_step(const SolverStep& a, cudaStream_t stream) {
  const Shape shape{dim3(unsigned((a.size + kValues - 1) / kValues), unsigned(a.batch)), dim3(kThreads)};
  const auto kernel = a.bf16
                          ? (a.aligned ? solver_step_kernel<bf16, true> : solver_step_kernel<bf16, false>)
                          : (a.aligned ? solver_step_kernel<float, true> : solver_step_kernel<float, false>);
  launch("solver_step", kernel, shape, stream, a);
}

}  // namespace prfl::cuda
