// Launcher of solver_step.cu. Everything is float32 [batch, size] and contiguous but the velocity, which
// may be bf16.
#pragma once
#include <driver_types.h>

#include <cstdint>

namespace prfl::cuda {

struct SolverStep {
  const float *x, *x_last, *m0, *m1;
  const void* velocity;
  const float* columns;  // [batch, 9]: sigma, a_x, a_l, a_0, a_1, a_t, b_x, b_t, b_0
  float *x_next, *x_c, *m_t;
  int64_t batch, size;
  bool bf16;     // the velocity
  bool aligned;  // all samples begin at multiples of 16 bytes
};

void solver_step(const SolverStep& arguments, cudaStream_t stream);

}  // namespace prfl::cuda
