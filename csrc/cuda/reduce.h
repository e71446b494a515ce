// Sums and maxima over the threads of a block, in the same order every time.
#pragma once
#include "device.h"

namespace prfl::cuda {

struct Add {
  __device__ __forceinline__ float operator()(float a, float b) const { return a + b; }
};
struct Max {
  __device__ __forceinline__ float operator()(float a, float b) const { return fmaxf(a, b); }
};

template <class Join>
__device__ __forceinline__ float over_warp(float value, Join join) {
  PRFL_UNROLL
  for (int step = kWarp / 2; step > 0; step /= 2) value = join(value, __shfl_xor_sync(~0u, value, step));
  return value;
}

// Every thread gets each of `values` joined over the block. `slots` holds kValues floats a warp in
// shared memory, and may be reused after the second reduction or barrier of the block from here.
template <int kValues, class Join>
__device__ __forceinline__ void over_block(float (&values)[kValues], Join join, float empty, float* slots) {
  const int warps = (blockDim.x + kWarp - 1) / kWarp, lane = lane_id();
  PRFL_UNROLL
  for (int i = 0; i < kValues; ++i) {
    values[i] = over_warp(values[i], join);
    if (lane == 0) slots[warp_id() * kValues + i] = values[i];
  }
  __syncthreads();
  PRFL_UNROLL
  for (int i = 0; i < kValues; ++i)
    values[i] = over_warp(lane < warps ? slots[lane * kValues + i] : empty, join);
}

template <int kValues>
__device__ __forceinline__ void block_sum(float (&values)[kValues], float* slots) {
  over_block(values, Add(), 0.0f, slots);
}
__device__ __forceinline__ float block_sum(float value, float* slots) {
  float values[1] = {value};
  block_sum(values, slots);
  return values[0];
}
// Of values that are not negative.
__device__ __forceinline__ float block_max(float value, float* slots) {
  float values[1] = {value};
  over_block(values, Max(), 0.0f, slots);
  return values[0];
}

}  // namespace prfl::cuda
