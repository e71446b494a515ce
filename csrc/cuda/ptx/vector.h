// Access to memory in units of 16 bytes a thread, and eight values at a time as float32.
// All that kernels read and write goes through here (or through bulk.h), where cusim checks it.
#pragma once
#include "cuda/device.h"

namespace prfl::cuda {

#ifdef CUSIM
template <class T>
inline T get(const T* p) {
  cusim::touch(p, sizeof(T), false);
  return *p;
}
template <class T>
inline void put(T* p, T value) {
  cusim::touch(p, sizeof(T), true);
  *p = value;
}
#else
template <class T>
__device__ __forceinline__ T get(const T* p) {
  return *p;
}
template <class T>
__device__ __forceinline__ void put(T* p, T value) {
  *p = value;
}
#endif

__device__ __forceinline__ float wide(float x) { return x; }
__device__ __forceinline__ float wide(bf16 x) { return __bfloat162float(x); }
template <class T>
__device__ __forceinline__ T narrow(float x);
template <>
__device__ __forceinline__ float narrow<float>(float x) {
  return x;
}
template <>
__device__ __forceinline__ bf16 narrow<bf16>(float x) {
  return __float2bfloat16_rn(x);
}

// The two bf16 values of a register, the one at the lower address first.
__device__ __forceinline__ float low_half(uint32_t pair) { return __uint_as_float(pair << 16); }
__device__ __forceinline__ float high_half(uint32_t pair) { return __uint_as_float(pair & 0xffff0000u); }
__device__ __forceinline__ uint32_t bf16_pair(float low, float high) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
  return *reinterpret_cast<const uint32_t*>(&pair);
}

// Eight values as they lie in memory, so that a row can be on its way while another is worked on.
template <class T>
struct Raw8;
template <>
struct Raw8<float> {
  float4 part[2];
};
template <>
struct Raw8<bf16> {
  uint4 part[1];
};

__device__ __forceinline__ Raw8<float> load8(const float* p) {
  const float4* q = reinterpret_cast<const float4*>(p);
  return {{get(q), get(q + 1)}};
}
__device__ __forceinline__ Raw8<bf16> load8(const bf16* p) {
  return {{get(reinterpret_cast<const uint4*>(p))}};
}

__device__ __forceinline__ void unpack8(const Raw8<float>& raw, float (&x)[8]) {
  PRFL_UNROLL
  for (int i = 0; i < 2; ++i) {
    x[4 * i] = raw.part[i].x, x[4 * i + 1] = raw.part[i].y;
    x[4 * i + 2] = raw.part[i].z, x[4 * i + 3] = raw.part[i].w;
  }
}
__device__ __forceinline__ void unpack8(const Raw8<bf16>& raw, float (&x)[8]) {
  const uint32_t pairs[4] = {raw.part[0].x, raw.part[0].y, raw.part[0].z, raw.part[0].w};
  PRFL_UNROLL
  for (int i = 0; i < 4; ++i) x[2 * i] = low_half(pairs[i]), x[2 * i + 1] = high_half(pairs[i]);
}

__device__ __forceinline__ void store8(float* p, const float (&x)[8]) {
  put(reinterpret_cast<float4*>(p), make_float4(x[0], x[1], x[2], x[3]));
  put(reinterpret_cast<float4*>(p) + 1, make_float4(x[4], x[5], x[6], x[7]));
}
__device__ __forceinline__ void store8(bf16* p, const float (&x)[8]) {
  put(reinterpret_cast<uint4*>(p),
      make_uint4(bf16_pair(x[0], x[1]), bf16_pair(x[2], x[3]), bf16_pair(x[4], x[5]), bf16_pair(x[6], x[7])));
}

__device__ __forceinline__ Raw8<float> pack8(const float (&x)[8], float) {
  return {{make_float4(x[0], x[1], x[2], x[3]), make_float4(x[4], x[5], x[6], x[7])}};
}
__device__ __forceinline__ Raw8<bf16> pack8(const float (&x)[8], bf16) {
  return {{make_uint4(bf16_pair(x[0], x[1]), bf16_pair(x[2], x[3]), bf16_pair(x[4], x[5]),
                      bf16_pair(x[6], x[7]))}};
}

// The eight columns of a row that a thread works on. kWidth: the width, if it is known at compile time
// and rows allow 16-byte accesses; 0 for any other.
template <int kWidth>
struct Columns {
  int first, count;  // of them within the row
  bool vectors;      // whether rows allow 16-byte accesses

  __device__ __forceinline__ Columns(int64_t width, bool aligned)
      : first(8 * threadIdx.x), count(min(8, max(0, int(width) - first))), vectors(aligned && count == 8) {}

  template <class T>
  __device__ __forceinline__ Raw8<T> load(const T* row) const {
    if constexpr (kWidth == 0) {
      if (!vectors) {
        float x[8];
        PRFL_UNROLL
        for (int i = 0; i < 8; ++i) x[i] = i < count ? wide(get(row + first + i)) : 0.0f;
        return pack8(x, T());
      }
    }
    return load8(row + first);
  }
  template <class T>
  __device__ __forceinline__ void load(const T* row, float (&x)[8]) const {
    unpack8(load(row), x);
  }
  template <class T>
  __device__ __forceinline__ void store(T* row, const float (&x)[8]) const {
    if constexpr (kWidth == 0) {
      if (!vectors) {
        PRFL_UNROLL
        for (int i = 0; i < 8; ++i)
          if (i < count) put(row + first + i, narrow<T>(x[i]));
        return;
      }
    }
    store8(row + first, x);
  }
  // As e4m3. Two neighbouring lanes make one access of 16 bytes.
  __device__ __forceinline__ void store_e4m3(uint8_t* row, const float (&x)[8]) const {
    uint32_t words[4];
    PRFL_UNROLL
    for (int i = 0; i < 2; ++i) {
      const uint32_t low =
          __nv_cvt_float2_to_fp8x2(make_float2(x[4 * i], x[4 * i + 1]), __NV_SATFINITE, __NV_E4M3);
      const uint32_t high =
          __nv_cvt_float2_to_fp8x2(make_float2(x[4 * i + 2], x[4 * i + 3]), __NV_SATFINITE, __NV_E4M3);
      words[i] = low | high << 16;
    }
    if constexpr (kWidth != 0) {
      words[2] = __shfl_down_sync(~0u, words[0], 1), words[3] = __shfl_down_sync(~0u, words[1], 1);
      if (threadIdx.x % 2 == 0)
        put(reinterpret_cast<uint4*>(row + first), make_uint4(words[0], words[1], words[2], words[3]));
    } else {
      PRFL_UNROLL
      for (int i = 0; i < 8; ++i)
        if (i < count) put(row + first + i, uint8_t(words[i / 4] >> 8 * (i % 4)));
    }
  }
};

}  // namespace prfl::cuda
