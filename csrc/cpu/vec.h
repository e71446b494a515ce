// Vectors of float32 as wide as the instruction set's registers, for every PRFL_ISA alike: the
// compilers' vector extensions, with intrinsics only where these compile badly.
//
// Everything here lives in namespace prfl::PRFL_ISA, so that the linker cannot merge an inline function
// compiled for AVX-512 into the generic build. For the same reason kernels use no templates of std.
#pragma once

#if defined(__AVX512F__) || defined(__AVX2__)
#include <immintrin.h>
#endif

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <new>

#include "view.h"

namespace prfl::PRFL_ISA {

#if defined(__AVX512F__)
constexpr int LANES = 16;
#elif defined(__AVX2__)
constexpr int LANES = 8;
#else
constexpr int LANES = 4;
#endif

typedef float vf __attribute__((vector_size(4 * LANES)));
typedef int32_t vi __attribute__((vector_size(4 * LANES)));
typedef uint32_t vu __attribute__((vector_size(4 * LANES)));
typedef uint16_t vh __attribute__((vector_size(2 * LANES)));

// How much of a vector a step of `each` has: all of it, or the first n lanes at the end of a row.
struct Full {
  static constexpr int n = LANES;
};
struct Tail {
  int n;
};

template <class V, class T>
inline V as(T a) {
  static_assert(sizeof(V) == sizeof(T), "bits are reinterpreted, not converted");
  V b;
  memcpy(&b, &a, sizeof b);
  return b;
}

inline vf all(float a) { return vf{} + a; }

inline vf widen(vh h) {
#if defined(__AVX512F__)
  return as<vf>((vu)_mm512_cvtepu16_epi32((__m256i)h) << 16);
#elif defined(__AVX2__)
  return as<vf>((vu)_mm256_cvtepu16_epi32((__m128i)h) << 16);
#else
  return as<vf>(__builtin_convertvector(h, vu) << 16);
#endif
}

// To the nearest, ties to even; NaN stays NaN.
inline vh narrow(vf a) {
#if defined(__AVX512BF16__)
  return (vh)_mm512_cvtneps_pbh((__m512)a);
#else
  vu u = as<vu>(a);
  vu rounded = (u + (0x7fffu + ((u >> 16) & 1u))) >> 16;
  vi nan = a != a;
  rounded = (rounded & ~as<vu>(nan)) | (0x7fc0u & as<vu>(nan));
#if defined(__AVX512F__)
  return (vh)_mm512_cvtepi32_epi16((__m512i)rounded);
#elif defined(__AVX2__)
  __m256i packed = _mm256_packus_epi32((__m256i)rounded, (__m256i)rounded);
  return (vh)_mm256_castsi256_si128(_mm256_permute4x64_epi64(packed, 0x08));
#else
  return __builtin_convertvector(rounded, vh);
#endif
#endif
}

inline vf load(const float* p, Full) {
  vf a;
  memcpy(&a, p, sizeof a);
  return a;
}
inline vf load(const bf16* p, Full) {
  vh h;
  memcpy(&h, p, sizeof h);
  return widen(h);
}
// The lanes that a tail does not have are zero.
template <class T>
inline vf load(const T* p, Tail m) {
  T room[LANES] = {};
  memcpy(room, p, m.n * sizeof(T));
  return load(room, Full{});
}

inline void store(float* p, vf a, Full) { memcpy(p, &a, sizeof a); }
inline void store(bf16* p, vf a, Full) {
  vh h = narrow(a);
  memcpy(p, &h, sizeof h);
}
template <class T>
inline void store(T* p, vf a, Tail m) {
  T room[LANES];
  store(room, a, Full{});
  memcpy(p, room, m.n * sizeof(T));
}

// Around the caches, which then need not fetch what is overwritten; p is a multiple of the vector's size.
inline void store_around(float* p, vf a) {
#if defined(__AVX512F__)
  _mm512_stream_ps(p, (__m512)a);
#elif defined(__AVX2__)
  _mm256_stream_ps(p, (__m256)a);
#else
  store(p, a, Full{});
#endif
}
inline void store_around(bf16* p, vf a) {
#if defined(__AVX512F__)
  _mm256_stream_si256(reinterpret_cast<__m256i*>(p), (__m256i)narrow(a));
#elif defined(__AVX2__)
  _mm_stream_si128(reinterpret_cast<__m128i*>(p), (__m128i)narrow(a));
#else
  store(p, a, Full{});
#endif
}
inline void fence() {
#if defined(__AVX512F__) || defined(__AVX2__)
  _mm_sfence();
#endif
}

// What is left of `a` after storing it as T.
inline vf rounded(vf a, float) { return a; }
inline vf rounded(vf a, bf16) { return widen(narrow(a)); }

// Asks for a row's place i ahead of its use, into the second level; null is nothing.
template <class T>
inline void prefetch(const T* row, int64_t i) {
  if (row != nullptr) __builtin_prefetch(row + i, 0, 2);
}

// f(i, lanes, k) for i = 0, LANES, ... < n; k = 0 ... U - 1 in turn numbers independent accumulators.
template <int U = 1, class F>
inline void each(int64_t n, F&& f) {
  int64_t i = 0;
  for (; i + U * LANES <= n; i += U * LANES)
#pragma GCC unroll 8
    for (int k = 0; k < U; k++) f(i + k * LANES, Full{}, k);
  for (; i + LANES <= n; i += LANES) f(i, Full{}, 0);
  if (i < n) f(i, Tail{static_cast<int>(n - i)}, 0);
}

// `a` with zeros in the lanes that a tail does not have.
inline vf first_lanes(vf a, Full) { return a; }
inline vf first_lanes(vf a, Tail m) {
  for (int i = m.n; i < LANES; i++) a[i] = 0.0f;
  return a;
}

// Lanes 2i and 2i + 1 exchanged.
inline vf swapped(vf a) {
#if defined(__AVX512F__)
  return (vf)_mm512_permute_ps((__m512)a, 0xb1);
#elif defined(__AVX2__)
  return (vf)_mm256_permute_ps((__m256)a, 0xb1);
#else
  return vf{a[1], a[0], a[3], a[2]};
#endif
}

inline float sum(vf a) {
  float lanes[LANES];
  memcpy(lanes, &a, sizeof a);
  for (int half = LANES / 2; half > 0; half /= 2)
    for (int i = 0; i < half; i++) lanes[i] += lanes[i + half];
  return lanes[0];
}
template <int U>
inline float sum(const vf (&a)[U]) {
  vf total = a[0];
  for (int k = 1; k < U; k++) total += a[k];
  return sum(total);
}

inline vf select(vi mask, vf a, vf b) {
  return as<vf>((mask & as<vi>(a)) | (~mask & as<vi>(b)));
}

// e^a to 1 ULP; 0 below -87.3, e^88.3 above 88.3, NaN stays. Cephes' expf.
inline vf exp(vf a) {
  vf x = select(a > 88.3f, all(88.3f), a);
  vf n = x * 1.44269504088896341f;
  constexpr float magic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
  vf shifted = n + magic;
  n = shifted - magic;
  vf r = x - n * 0.693359375f;
  r = r + n * 2.12194440e-4f;
  vf p = all(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  vi power = (as<vi>(shifted) - as<int32_t>(magic) + 127) << 23;
  return select(a < -87.3f, all(0.0f), p * as<vf>(power));
}

// f(T{}, ...) with T the element types.
template <class F>
inline void with_type(DType dtype, F&& f) {
  if (dtype == DType::bf16)
    f(bf16{});
  else
    f(float{});
}
template <class F>
inline void with_types(DType a, DType b, DType c, F&& f) {
  with_type(a, [&](auto a) {
    with_type(b, [&](auto b) { with_type(c, [&](auto c) { f(a, b, c); }); });
  });
}

// n floats of scratch on a cache line; what a thread needs while it works on a piece.
class Scratch {
 public:
  explicit Scratch(int64_t n) : data_(static_cast<float*>(aligned_alloc(64, (4 * n + 127) / 64 * 64))) {
    if (data_ == nullptr) throw std::bad_alloc();
  }
  ~Scratch() { free(data_); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  operator float*() const { return data_; }

 private:
  float* data_;
};

inline int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }

}  // namespace prfl::PRFL_ISA
