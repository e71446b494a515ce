// How kernels share out rows: a thread holds eight columns, a block one token at a time.
#pragma once
#include <algorithm>

#include "add_norm.h"
#include "launch.h"

namespace prfl::cuda {

constexpr float kE4m3Max = 448.0f;

template <int kWidth>
constexpr int kBlock = (kWidth ? kWidth : kNormWidth) / 8;
// Blocks that have to fit an SM: 48 registers a thread forward, and half as many blocks backward.
template <int kWidth>
constexpr int kResident = 1280 / kBlock<kWidth>;
constexpr int kSlots = kNormWidth / 8 / kWarp;  // warps of a block at most

// Tokens that a block of a backward kernel walks over: one run an SM where a block fills it, and few
// enough runs that their partial sums stay under 5 % of the traffic at 32,760 tokens.
inline int64_t run_length(int64_t batch, int64_t length, int64_t width) {
  const int64_t most = std::max<int64_t>(1, (width > 2560 ? 132 : 396) / batch);
  return (length + most - 1) / most;
}

// With room for two reductions of two values.
inline Shape row_shape(int64_t blocks, int64_t batch, int64_t width) {
  const unsigned threads = unsigned((width + 8 * kWarp - 1) / (8 * kWarp)) * kWarp;
  return {dim3(unsigned(blocks), unsigned(batch)), dim3(threads), 4 * kSlots * sizeof(float)};
}

}  // namespace prfl::cuda
