// How kernels share out rows: a thread holds eight columns, a block one token at a time.
#pragma once
#include <type_traits>

#include "launch.h"
#include "row_launch.h"

namespace prfl::cuda {

constexpr float kE4m3Max = 448.0f;

template <int kWidth>
constexpr int kBlock = (kWidth ? kWidth : kRowWidth) / 8;
// Blocks that have to fit an SM: 48 registers a thread forward, and half as many blocks backward. At 3,072
// half would be one of 384 threads: where rows of 16 bits leave room there are two, of 80 registers a thread.
template <int kWidth>
constexpr int kResident = 1280 / kBlock<kWidth>;
template <int kWidth, class T>
constexpr bool kTwoBackward = kWidth == 3072 && sizeof(T) == 2;
template <int kWidth, class T>
constexpr int kResidentBackward = kTwoBackward<kWidth, T> ? 2 : kResident<kWidth> / 2;
constexpr int kSlots = kRowWidth / 8 / kWarp;  // warps of a block at most

// With room for two reductions of two values.
inline Shape row_shape(int64_t blocks, int64_t batch, int64_t width) {
  const unsigned threads = unsigned((width + 8 * kWarp - 1) / (8 * kWarp)) * kWarp;
  return {dim3(unsigned(blocks), unsigned(batch)), dim3(threads), 4 * kSlots * sizeof(float)};
}

// A kernel over tokens, and one over runs of tokens on both sides of a boundary, which also takes the length of
// a run.
template <class Arguments>
void launch_tokens(const char* name, void (*kernel)(Arguments), const Arguments& a, cudaStream_t stream) {
  launch(name, kernel, row_shape(a.length, a.batch, a.width), stream, a);
}
template <class Arguments>
void launch_runs(const char* name, void (*kernel)(Arguments, int64_t), const Arguments& a,
                 cudaStream_t stream, int64_t boundary = 0) {
  launch(name, kernel, row_shape(row_runs(a.batch, a.length, a.width, boundary), a.batch, a.width), stream, a,
         run_length(a.batch, a.length, a.width, boundary));
}

// f of the width that a kernel is specialised for, as a constant: 5120, 3072, 1536, or 0 for any other.
template <class F>
void with_width(int64_t width, F f) {
  if (width == 5120) return f(std::integral_constant<int, 5120>());
  if (width == 3072) return f(std::integral_constant<int, 3072>());
  if (width == 1536) return f(std::integral_constant<int, 1536>());
  f(std::integral_constant<int, 0>());
}

__device__ __forceinline__ float largest8(const float (&x)[8]) {
  float most = 0.0f;
  PRFL_UNROLL
  for (int i = 0; i < 8; ++i) most = fmaxf(most, fabsf(x[i]));
  return most;
}

// Divides x by the scale that takes `most` to the largest number of e4m3, and returns the scale.
__device__ __forceinline__ float scale_to_e4m3(float (&x)[8], float most) {
  const float scale = most > 0.0f ? most / kE4m3Max : 1.0f;
  PRFL_UNROLL
  for (int i = 0; i < 8; ++i) x[i] /= scale;
  return scale;
}

}  // namespace prfl::cuda
