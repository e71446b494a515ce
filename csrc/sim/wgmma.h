// Products of warp groups for cusim. Every thread computes its own part of a product when it waits for it,
// the latest moment: what reads a result or overwrites an operand too early gets wrong numbers.
// Descriptors are those of the 128-byte swizzle; sums are float32.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp8.h>

#include <deque>
#include <map>
#include <vector>

#include "cusim.h"

namespace cusim {

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

inline float number(const char* p, bool fp8) {
  if (fp8) {
    __nv_fp8_e4m3 x;
    std::memcpy(&x, p, 1);
    return float(x);
  }
  uint16_t bits;
  std::memcpy(&bits, p, 2);
  return __uint_as_float(uint32_t(bits) << 16);
}

// Element (row, k) of an operand in shared memory.
inline float operand(uint64_t desc, int row, int k, bool by_k, bool fp8) {
  if (desc >> 62 != 1) fail("a wgmma operand without the 128-byte swizzle");
  const uint32_t start = uint32_t(desc & 0x3fff) << 4, leading = uint32_t(desc >> 16 & 0x3fff) << 4,
                 stride = uint32_t(desc >> 32 & 0x3fff) << 4;
  const uint32_t at = by_k ? row / 64 * leading + row % 64 * 2 + k / 8 * stride + k % 8 * 128
                           : row / 8 * stride + row % 8 * 128 + k * (fp8 ? 1 : 2);
  const uint32_t address = start + at;
  return number(self->shared + (address ^ (address >> 7 & 7) << 4), fp8);
}

// A[row, 0:depth] of this thread's rows l / 4 and l / 4 + 8. In registers a quad has them together.
inline void left_rows(const Product& p, int depth, float (&a)[2][32]) {
  const int thread = self->thread.x % 128, lane = thread % 32, size = p.fp8 ? 1 : 2, held = 4 / size;
  const char* all = p.a_own ? exchange(~0u, p.a_own, 16, false, __FILE__, __LINE__) : nullptr;
  for (int h = 0; h < 2; ++h)
    for (int k = 0; k < depth; ++k) {
      const int owner = lane / 4 * 4 + k / held % 4, byte = 4 * (h + 2 * (k / (depth / 2))) + k % held * size;
      a[h][k] = all ? number(all + kSlot * owner + byte, p.fp8)
                    : operand(p.a, thread / 32 * 16 + lane / 4 + 8 * h, k, false, p.fp8);
    }
}

inline void compute(const Product& p) {
  const int lane = self->thread.x % 32, depth = p.fp8 ? 32 : 16;
  float a[2][32];
  left_rows(p, depth, a);
  for (int j = 0; j < p.columns / 8; ++j)
    for (int e = 0; e < 2; ++e) {
      float sum[2] = {0, 0};
      for (int k = 0; k < depth; ++k) {
        const float b = operand(p.b, 8 * j + 2 * (lane % 4) + e, k, p.b_by_k, p.fp8);
        for (int h = 0; h < 2; ++h) sum[h] += a[h][k] * b;
      }
      for (int h = 0; h < 2; ++h) {
        float& d = p.d[4 * j + 2 * h + e];
        d = p.accumulate ? d + sum[h] : sum[h];
      }
    }
}

class Products {  // of one thread
 public:
  void fence() { fenced_ = true; }
  void issue(const Product& p) {
    if (!fenced_) fail("a wgmma without a fence since the last wait");
    open_.push_back(p);
  }
  void commit() {
    groups_.push_back(std::move(open_));
    open_.clear();
  }
  void wait(size_t unfinished) {
    fenced_ = false;
    for (; groups_.size() > unfinished; groups_.pop_front())
      for (const Product& p : groups_.front()) compute(p);
  }

 private:
  bool fenced_ = false;
  std::vector<Product> open_;
  std::deque<std::vector<Product>> groups_;
};

// Of the running thread of the running block.
inline Products& products() {
  static std::map<const Thread*, std::pair<uint3, Products>> all;
  auto& [block, found] = all[self];
  if (block.x != self->block.x || block.y != self->block.y || block.z != self->block.z) found = Products();
  block = self->block;
  return found;
}

}  // namespace cusim
