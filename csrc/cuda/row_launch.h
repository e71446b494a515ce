// What the launches of norm.cu and qk_norm_rope.cu have in common. No device code.
#pragma once
#include <algorithm>
#include <cstdint>

namespace prfl::cuda {

enum Kind : int { kFloat32 = 0, kBfloat16 = 1, kE4m3 = 2 };  // the dtype codes of kernels/extension.py

constexpr int kRowWidth = 5120;  // the largest width

// Tokens of a run, which one block of a backward kernel walks over. There are as many runs as blocks fit on 132
// SMs at a time, so few that their partial sums stay under 5 % of the traffic at 32,760 tokens. No run crosses
// the boundary, which may take one run more.
inline int64_t run_length(int64_t batch, int64_t length, int64_t width, int64_t boundary = 0) {
  const int64_t blocks = width > 3072 ? 132 : width > 2560 ? 264 : 396;
  const int64_t most = std::max<int64_t>(1, blocks / batch - (boundary > 0));
  return (length + most - 1) / most;
}

// How many runs of tokens of a sample lie before the boundary, and how many there are.
inline int64_t runs_before(int64_t batch, int64_t length, int64_t width, int64_t boundary) {
  const int64_t run = run_length(batch, length, width, boundary);
  return (boundary + run - 1) / run;
}
inline int64_t row_runs(int64_t batch, int64_t length, int64_t width, int64_t boundary = 0) {
  const int64_t run = run_length(batch, length, width, boundary);
  return (boundary + run - 1) / run + (length - boundary + run - 1) / run;
}

}  // namespace prfl::cuda
