// Online softmax of scores that lie in registers as a wgmma product leaves them, float32 and base 2.
//
// A thread holds a quarter of each of two rows, the other threads of its quad the rest: s[4 j + 2 h + e] is
// of row h. Weights are 2^(s factor - top + kBits), top the largest s factor so far, factor > 0.
#pragma once
#include "device.h"

namespace prfl::cuda {

#ifdef CUSIM
inline float exp2_fast(float x) { return std::exp2(x); }
inline float log2_fast(float x) { return std::log2(x); }
#else
__device__ __forceinline__ float exp2_fast(float x) {  // to 2 ulp; 0 below 2^-126
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
__device__ __forceinline__ float log2_fast(float x) { return __log2f(x); }
#endif

// Four values as e4m3, the first in the lowest byte.
__device__ __forceinline__ uint32_t e4m3_quad(float a, float b, float c, float d) {
  const uint32_t low = __nv_cvt_float2_to_fp8x2(make_float2(a, b), __NV_SATFINITE, __NV_E4M3);
  return low | uint32_t(__nv_cvt_float2_to_fp8x2(make_float2(c, d), __NV_SATFINITE, __NV_E4M3)) << 16;
}

template <int kBits>
struct RowSoftmax {
  float shift[2] = {INFINITY, INFINITY};  // kBits - top
  float total[2] = {0.f, 0.f};            // of the weights of this thread

  // Scores become weights; sums over earlier blocks are worth alpha of what they were.
  template <int N>
  __device__ __forceinline__ void step(float (&s)[N], const float (&factor)[2], float (&alpha)[2]) {
    PRFL_UNROLL
    for (int h = 0; h < 2; ++h) {
      float a = s[2 * h], b = s[2 * h + 1];
      PRFL_UNROLL
      for (int i = 4 + 2 * h; i < N; i += 4) a = fmaxf(a, s[i]), b = fmaxf(b, s[i + 1]);
      a = fmaxf(a, b);
      a = fmaxf(a, __shfl_xor_sync(~0u, a, 1));
      a = fmaxf(a, __shfl_xor_sync(~0u, a, 2));
      const float now = fminf(shift[h], kBits - a * factor[h]);
      alpha[h] = exp2_fast(now - shift[h]);
      shift[h] = now;
      total[h] *= alpha[h];
    }
    PRFL_UNROLL
    for (int i = 0; i < N; ++i) {
      const int h = i / 2 % 2;
      s[i] = exp2_fast(fmaf(s[i], factor[h], shift[h]));
      total[h] += s[i];
    }
  }

  // True, whatever the weights. The compiler does not know it: what is done only if it is true is done
  // after all exponentials are there, and what follows that is not moved up before them.
  __device__ __forceinline__ bool done() const { return !(total[0] + total[1] < 0.f); }

  // 1 / sum of the weights of row h, and the logarithm of the sum of exp(s factor ln 2).
  __device__ __forceinline__ void finish(int h, float& inverse, float& lse) const {
    float sum = total[h] + __shfl_xor_sync(~0u, total[h], 1);
    sum += __shfl_xor_sync(~0u, sum, 2);
    inverse = __fdividef(1.f, sum);
    lse = (log2_fast(sum) - shift[h]) * 0.693147180559945309f;
  }
};

}  // namespace prfl::cuda
