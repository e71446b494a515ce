// Tensor-core products 16 x 8 x 16 of bf16 with float32 sums, to float32 accuracy: a factor that is
// float32 is split into three bf16 parts, whose products of order 2^-27 and smaller are left out.
//
// Fragments as PTX lays them out, for lane = 4 g + t: element pairs
//   A [16, 16]: rows g, g + 8, g, g + 8 and columns 2t, 2t, 2t + 8, 2t + 8
//   B [16, 8]:  rows 2t, 2t + 8, column g          C [16, 8]: rows g, g + 8, columns 2t
#pragma once
#include "vector.h"

namespace prfl::cuda {

// x = sum of the parts, each a pair of bf16.
template <int kParts>
__device__ __forceinline__ void split(float low, float high, uint32_t (&parts)[kParts]) {
  PRFL_UNROLL
  for (int i = 0; i < kParts; ++i) {
    parts[i] = bf16_pair(low, high);
    low -= low_half(parts[i]), high -= high_half(parts[i]);
  }
}

template <int kParts>
struct FragmentA {
  uint32_t part[kParts][4];
};
template <int kParts>
struct FragmentB {
  uint32_t part[kParts][2];

  // Values at rows 2t, 2t + 1, 2t + 8, 2t + 9 of column g.
  __device__ __forceinline__ void set(float a, float b, float c, float d) {
    uint32_t first[kParts], second[kParts];
    split(a, b, first), split(c, d, second);
    PRFL_UNROLL
    for (int i = 0; i < kParts; ++i) part[i][0] = first[i], part[i][1] = second[i];
  }
};

#ifndef CUSIM

__device__ __forceinline__ void mma(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
// Four 8 x 8 matrices of 16-bit values, whose rows lanes 0-7, 8-15, ... point to.
__device__ __forceinline__ void load_matrices(uint32_t (&m)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(m[0]), "=r"(m[1]), "=r"(m[2]), "=r"(m[3])
               : "r"(static_cast<uint32_t>(__cvta_generic_to_shared(row)))
               : "memory");
}
__device__ __forceinline__ void load_transposed(uint32_t (&m)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(m[0]), "=r"(m[1]), "=r"(m[2]), "=r"(m[3])
               : "r"(static_cast<uint32_t>(__cvta_generic_to_shared(row)))
               : "memory");
}

#else

inline void mma(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], CUSIM_HERE) {
  struct {
    uint32_t a[4], b[2];
  } mine, from;
  std::memcpy(mine.a, a, sizeof a), std::memcpy(mine.b, b, sizeof b);
  const char* all = cusim::exchange(~0u, &mine, sizeof mine, false, file, line);
  const int g = lane_id() / 4, t = lane_id() % 4;
  for (int half = 0; half < 2; ++half) {
    float row[16];  // row g + 8 half of A
    for (int i = 0; i < 4; ++i) {
      std::memcpy(&from, all + cusim::kSlot * (4 * g + i), sizeof from);
      for (int k = 0; k < 2; ++k) {
        const uint32_t pair = from.a[half + 2 * k];
        row[8 * k + 2 * i] = low_half(pair), row[8 * k + 2 * i + 1] = high_half(pair);
      }
    }
    for (int j = 0; j < 2; ++j) {
      double sum = 0;  // the units add the exact products of one instruction with bits to spare
      for (int i = 0; i < 4; ++i) {
        std::memcpy(&from, all + cusim::kSlot * (4 * (2 * t + j) + i), sizeof from);
        for (int k = 0; k < 2; ++k)
          sum += double(row[8 * k + 2 * i]) * low_half(from.b[k]) +
                 double(row[8 * k + 2 * i + 1]) * high_half(from.b[k]);
      }
      c[2 * half + j] = float(c[2 * half + j] + sum);
    }
  }
}
inline void load_matrices(uint32_t (&m)[4], const void* row, CUSIM_HERE) {
  const char* all = cusim::exchange(~0u, &row, sizeof row, false, file, line);
  for (int i = 0; i < 4; ++i) {
    const uint32_t* from;
    std::memcpy(&from, all + cusim::kSlot * (8 * i + lane_id() / 4), sizeof from);
    if (uintptr_t(from) % 16) cusim::fail("a misaligned row of a matrix");
    m[i] = from[lane_id() % 4];
  }
}
inline void load_transposed(uint32_t (&m)[4], const void* row, CUSIM_HERE) {
  const char* all = cusim::exchange(~0u, &row, sizeof row, false, file, line);
  for (int i = 0; i < 4; ++i) {
    uint32_t halves[2];
    for (int j = 0; j < 2; ++j) {
      const uint16_t* from;
      std::memcpy(&from, all + cusim::kSlot * (8 * i + 2 * (lane_id() % 4) + j), sizeof from);
      if (uintptr_t(from) % 16) cusim::fail("a misaligned row of a matrix");
      halves[j] = from[lane_id() / 4];
    }
    m[i] = halves[0] | halves[1] << 16;
  }
}

#endif

// c += a b, keeping the products of parts i and j with i + j < kKept.
template <int kKept, int kPartsA, int kPartsB>
__device__ __forceinline__ void multiply(float (&c)[4], const FragmentA<kPartsA>& a,
                                         const FragmentB<kPartsB>& b) {
  PRFL_UNROLL
  for (int i = 0; i < kPartsA; ++i) {
    PRFL_UNROLL
    for (int j = 0; j < kPartsB; ++j)
      if (i + j < kKept) mma(c, a.part[i], b.part[j]);
  }
}

// Fragments of a tile of rows in shared memory, `stride` bytes apart.
template <class T>
struct Tile;

template <>
struct Tile<bf16> {
  static constexpr int kParts = 1;
  unsigned char* base;
  int stride;

  __device__ __forceinline__ bf16* at(int row, int column) const {
    return reinterpret_cast<bf16*>(base + row * stride) + column;
  }
  // Rows row ... + 15 by columns column ... + 15.
  __device__ __forceinline__ FragmentA<1> rows(int row, int column) const {
    const int lane = lane_id();
    FragmentA<1> a;
    load_matrices(a.part[0], at(row + lane % 16, column + lane / 16 * 8));
    return a;
  }
  // The same place, transposed: columns are the rows of A.
  __device__ __forceinline__ FragmentA<1> columns(int row, int column) const {
    const int lane = lane_id();
    FragmentA<1> a;
    load_transposed(a.part[0], at(row + lane % 8 + lane / 16 * 8, column + lane / 8 % 2 * 8));
    return a;
  }
  __device__ __forceinline__ void set_pair(int row, int column, float a, float b) const {
    *reinterpret_cast<uint32_t*>(at(row, column)) = bf16_pair(a, b);
  }
};

template <>
struct Tile<float> {
  static constexpr int kParts = 3;
  unsigned char* base;
  int stride;

  __device__ __forceinline__ float* at(int row, int column) const {
    return reinterpret_cast<float*>(base + row * stride) + column;
  }
  __device__ __forceinline__ FragmentA<3> rows(int row, int column) const {
    const int g = lane_id() / 4, t = lane_id() % 4;
    FragmentA<3> a;
    PRFL_UNROLL
    for (int i = 0; i < 4; ++i) {
      const float2 pair =
          *reinterpret_cast<const float2*>(at(row + g + i % 2 * 8, column + 2 * t + i / 2 * 8));
      set(a, i, pair.x, pair.y);
    }
    return a;
  }
  __device__ __forceinline__ FragmentA<3> columns(int row, int column) const {
    const int g = lane_id() / 4, t = lane_id() % 4;
    FragmentA<3> a;
    PRFL_UNROLL
    for (int i = 0; i < 4; ++i) {
      const float* first = at(row + 2 * t + i / 2 * 8, column + g + i % 2 * 8);
      set(a, i, *first, *reinterpret_cast<const float*>(reinterpret_cast<const char*>(first) + stride));
    }
    return a;
  }
  __device__ __forceinline__ void set_pair(int row, int column, float a, float b) const {
    *reinterpret_cast<float2*>(at(row, column)) = make_float2(a, b);
  }

 private:
  __device__ __forceinline__ static void set(FragmentA<3>& a, int i, float low, float high) {
    uint32_t parts[3];
    split(low, high, parts);
    PRFL_UNROLL
    for (int p = 0; p < 3; ++p) a.part[p][i] = parts[p];
  }
};

}  // namespace prfl::cuda
