// Launchers of reward_pool.cu. All tensors are float32 and contiguous but x and dx, which are bf16
// or float32; x [batch, length, width] has strides (in elements) x_b and x_l and contiguous rows.
// x, its strides and width have to allow accesses of 16 bytes: width a multiple of 8.
#pragma once
#include <driver_types.h>

#include <cstdint>

namespace prfl::cuda {

struct RewardPoolForward {
  const void* x;
  const float* u;            // [queries, width]
  float *pooled, *lse;       // [batch, queries, width], [batch, queries]
  float* scores;             // [batch, length, queries]
  float *top, *total, *acc;  // scratch: [batch, runs, queries] twice, [batch, runs, queries, width]
  int64_t x_b, x_l, batch, length, width, queries, bf16;
};

struct RewardPoolBackward {
  const void* x;
  const float *u, *dpooled, *scores, *lse, *delta;
  void* dx;     // [batch, length, width], or null
  float* part;  // sums for du, [batch, runs, queries, width], or null
  int64_t x_b, x_l, batch, length, width, queries, bf16;
};

constexpr int kPoolQueries = 8, kPoolWidth = 5120;

// How many runs of tokens of a sample there are; each leaves a partial result.
int64_t reward_pool_runs(int64_t batch, int64_t length, int64_t width, bool bf16);
void reward_pool_forward(const RewardPoolForward& arguments, cudaStream_t stream);
void reward_pool_backward(const RewardPoolBackward& arguments, cudaStream_t stream);

}  // namespace prfl::cuda
