// What cusim knows of an sm_90's tensor maps and of its products of warp groups.
#pragma once
#include <cuda.h>

#include <array>

#include "cusim.h"

namespace cusim {

// cuTensorMapEncodeTiled: arguments are checked as the driver documents them, and kept in the map. Only five
// dimensions in the 128-byte swizzle are modelled.
CUresult encode_tiled(CUtensorMap* map, CUtensorMapDataType type, cuuint32_t rank, void* data,
                      const cuuint64_t* sizes, const cuuint64_t* strides, const cuuint32_t* box,
                      const cuuint32_t* steps, CUtensorMapInterleave interleave, CUtensorMapSwizzle swizzle,
                      CUtensorMapL2promotion promotion, CUtensorMapFloatOOBfill fill);

using Corner = std::array<int, 5>;
// A copy that is not read for itself, but comes with that of another block, is none of the traffic.
void tensor_load(void* tile, const CUtensorMap* map, Corner corner, uint64_t* bar, bool reads = true);
void tensor_store(const CUtensorMap* map, const void* tile, Corner corner);

struct Product {
  float* d;
  int columns;
  uint64_t a;             // descriptor, or
  const uint32_t* a_own;  // this thread's four registers
  uint64_t b;
  bool b_by_k;  // B lies as [K, N], not [N, K]
  bool fp8;
  bool accumulate;
};
// wgmma of the running thread. Every thread computes its own part when it waits, the latest moment: what
// reads a result or overwrites an operand too early gets wrong numbers. Sums are float32.
void product_fence();
void product_issue(const Product& p);
void product_commit();
void product_wait(size_t unfinished, const char* file, int line);

}  // namespace cusim
