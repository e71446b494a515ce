// Launchers of add_norm.cu. Rows [batch, length, width] have strides in elements (_b, _l) and contiguous
// columns; results are contiguous. gate, scale and shift are float32 [batch, width] with the stride _b.
// Null pointers where an input is absent or a result is not wanted.
#pragma once
#include <driver_types.h>

#include <cstdint>

namespace prfl::cuda {

enum Kind : int { kFloat32 = 0, kBfloat16 = 1, kE4m3 = 2 };

constexpr int kNormWidth = 5120;  // the largest

struct AddNormForward {
  const void *x, *y;
  const float *gate, *scale, *shift;
  void *sum, *n;
  float *quant, *mean, *rstd;  // [batch, length]
  int64_t x_b, x_l, y_b, y_l, gate_b, scale_b, shift_b, batch, length, width;
  float eps, base;
  int stream, branch, out;  // kinds of x and sum, of y, of n
  bool aligned;             // all rows begin at multiples of 16 bytes, width is a multiple of 8
};

struct AddNormBackward {
  const void *dn, *dsum, *x, *y;
  const float *gate, *scale, *mean, *rstd;
  void *dx, *dy;
  float *part;  // [batch, runs, d scale | d shift | d gate as wanted, width]
  int64_t dn_b, dn_l, dsum_b, dsum_l, x_b, x_l, y_b, y_l, gate_b, scale_b, batch, length, width;
  float base;
  int stream, branch, grad;  // kinds of x, dsum and dx, of y and dy, of dn
  bool aligned, parameters, wants_gate;
};

// How many runs of tokens of a sample leave partial sums.
int64_t add_norm_runs(int64_t batch, int64_t length, int64_t width);
void add_norm_forward(const AddNormForward &arguments, cudaStream_t stream);
void add_norm_backward(const AddNormBackward &arguments, cudaStream_t stream);

}  // namespace prfl::cuda
