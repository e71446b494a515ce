// Launchers of qk_norm_rope.cu. q, k and their gradients [batch, length, width] have strides in elements
// (_b, _l) and contiguous columns; results are contiguous. k and what belongs to it may be null.
#pragma once
#include <driver_types.h>

#include "row_launch.h"

namespace prfl::cuda {

// How tokens turn: pairs (2i, 2i + 1) of a head by the angle of the token's frame, row or column. The
// tables are [largest side of the grid, head_dim / 2]; null where nothing turns.
struct Rotation {
  const float *cos, *sin;
  int head_dim, frame_pairs, row_pairs;  // the other pairs turn with the column
  int rows, columns, offset;             // of the grid of tokens; index of the first token here
};

struct QkNormRopeForward {
  const void *q, *k;
  const float *weight_q, *weight_k;  // [width]
  void *out_q, *out_k;
  float *quant_q, *quant_k;  // [batch, length, heads], for results in e4m3
  float *rstd_q, *rstd_k;    // [batch, length], or null
  int64_t q_b, q_l, k_b, k_l, batch, length, width;
  Rotation rotation;
  float eps;
  int q_kind, out_kind;  // of q and k, of the results
  bool aligned;          // all rows begin at multiples of 16 bytes, width is a multiple of 8
};

struct QkNormRopeBackward {
  const void *dout_q, *dout_k, *q, *k;
  const float *weight_q, *weight_k, *rstd_q, *rstd_k;
  void *dq, *dk;
  float* part;  // sums for the weights, [batch, runs, 2, width], or null
  int64_t dout_q_b, dout_q_l, dout_k_b, dout_k_l, q_b, q_l, k_b, k_l, batch, length, width;
  Rotation rotation;
  int q_kind;
  bool aligned;
};

void qk_norm_rope_forward(const QkNormRopeForward& arguments, cudaStream_t stream);
void qk_norm_rope_backward(const QkNormRopeBackward& arguments, cudaStream_t stream);

}  // namespace prfl::cuda
