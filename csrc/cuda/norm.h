// Launchers of norm.cu. Rows [batch, length, width] have strides in elements (_b, _l) and contiguous
// columns; results are contiguous. gate, scale and shift are float32 [batch, 2, width] with the strides _b and _s:
// tokens before `boundary` take the first of a pair, the others the second.
// Null pointers where an input is absent or a result is not wanted.
#pragma once
#include <driver_types.h>

#include "row_launch.h"

namespace prfl::cuda {

struct NormForward {
  const void *x, *y;
  const float *gate, *scale, *shift;
  void *total, *n;             // total = x + gate y
  float *quant, *mean, *rstd;  // [batch, length]
  int64_t x_b, x_l, y_b, y_l, gate_b, gate_s, scale_b, scale_s, shift_b, shift_s, batch, length, width, boundary;
  float eps, base;
  int x_kind, y_kind, n_kind;  // of x and total, of y, of n
  bool aligned;                // all rows begin at multiples of 16 bytes, width is a multiple of 8
};

struct NormBackward {
  const void *dn, *dsum, *x, *y;  // dsum is the gradient of total
  const float *gate, *scale, *mean, *rstd;
  void *dx, *dy;
  float* part;  // [batch, runs, d scale | d shift | d gate as wanted, width]
  int64_t dn_b, dn_l, dsum_b, dsum_l, x_b, x_l, y_b, y_l, gate_b, gate_s, scale_b, scale_s, batch, length, width, boundary;
  int64_t before;  // runs before the boundary
  float base;
  int x_kind, y_kind, dn_kind;  // of x, dsum and dx, of y and dy, of dn
  bool aligned, wants_parameters, wants_gate;
};

void norm_forward(const NormForward& arguments, cudaStream_t stream);
void norm_backward(const NormBackward& arguments, cudaStream_t stream);

}  // namespace prfl::cuda
