// What the CPU kernels take, and the table of them that every instruction set fills.
// To add one: its arguments and a line of PRFL_CPU_KERNELS here, a file that defines it inside
// namespace prfl::PRFL_ISA, a line in sources.txt, a call in bind.cpp.
#pragma once

#include "view.h"

namespace prfl {

// bias_gelu: h, dg, dh, g [rows, width]; bias [width] or absent. Strides of h, dg by row.
struct BiasGeluForward {
  View h, bias, out;
  int64_t rows, width;
  int threads;
};
struct BiasGeluBackward {
  View dg, h, bias, dh, g;
  View part;  // float [runs, width], sums of dh over runs of rows; absent if d bias is not wanted
  View dbias;  // float [width]
  int64_t rows, width, runs;
  int threads;
};

#define PRFL_CPU_KERNELS(KERNEL)                \
  KERNEL(bias_gelu_forward, BiasGeluForward)    \
  KERNEL(bias_gelu_backward, BiasGeluBackward)

struct Kernels {
#define PRFL_MEMBER(name, Arguments) void (*name)(const Arguments&);
  PRFL_CPU_KERNELS(PRFL_MEMBER)
#undef PRFL_MEMBER
};

}  // namespace prfl
