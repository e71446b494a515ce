// Products of a warp group on the tensor cores (PTX: wgmma): D[64, N] += A[64, K] B[N, K]^T, D in float32.
//
// Products are asynchronous: between issuing one and waiting for it nothing may touch its registers. Of a
// row of D a thread holds 2 neighbouring columns of every 8, of two rows: with lane l of warp w,
// d[4 j + 2 h + e] is row 16 w + l / 4 + 8 h, column 8 j + 2 (l % 4) + e.
#pragma once
#include "bulk.h"
#ifdef CUSIM
#include "sim/hopper.h"
#endif

namespace prfl::cuda {

#ifdef CUSIM
inline uint32_t shared_address(const void* p) {
  return uint32_t(static_cast<const char*>(p) - cusim::self->shared);
}
#endif

// Descriptor of an operand in shared memory: panels of 128 bytes a row in the 128-byte swizzle, 8 rows every
// 1024 bytes. `panel` is the distance of two panels in bytes; only an operand read as [K, N] needs it.
// Adding n moves it by 16 n bytes.
__device__ __forceinline__ uint64_t mma_operand(const void* tile, int panel = 16) {
  return uint64_t((shared_address(tile) & 0x3ffff) >> 4) | uint64_t(panel >> 4) << 16 |
         uint64_t(1024 >> 4) << 32 | uint64_t(1) << 62;
}

#ifndef CUSIM

// Before the first product that uses registers which other instructions have written.
__device__ __forceinline__ void mma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }

// Ends a group of products.
__device__ __forceinline__ void mma_commit() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}

// Waits until at most N of the last groups are unfinished.
template <int N>
__device__ __forceinline__ void mma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(N) : "memory");
}

#define PRFL_F8(d, i)                                                                         \
  "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), \
      "+f"(d[i + 6]), "+f"(d[i + 7])
#define PRFL_F64(d)                                                                             \
  PRFL_F8(d, 0), PRFL_F8(d, 8), PRFL_F8(d, 16), PRFL_F8(d, 24), PRFL_F8(d, 32), PRFL_F8(d, 40), \
      PRFL_F8(d, 48), PRFL_F8(d, 56)
#define PRFL_NAMES_64                                                                \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "           \
  "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, " \
  "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, " \
  "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define PRFL_NAMES_72 PRFL_NAMES_64 ", %64, %65, %66, %67, %68, %69, %70, %71"
#define PRFL_NAMES_88                                                                                    \
  PRFL_NAMES_64                                                                                          \
  ", "                                                                                                   \
  "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, %80, %81, %82, %83, " \
  "%84, %85, %86, %87"

// A and B in shared memory, both along K. The first product of a sum has accumulate = 0.
__device__ __forceinline__ void mma_bf16(float (&d)[64], uint64_t a, uint64_t b, int accumulate) {
  asm volatile(
      "{\n.reg .pred p;\nsetp.ne.b32 p, %66, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {" PRFL_NAMES_64 "}, %64, %65, p, 1, 1, 0, 0;\n}"
      : PRFL_F64(d)
      : "l"(a), "l"(b), "r"(accumulate));
}

__device__ __forceinline__ void mma_bf16(float (&d)[72], uint64_t a, uint64_t b, int accumulate) {
  asm volatile(
      "{\n.reg .pred p;\nsetp.ne.b32 p, %74, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n144k16.f32.bf16.bf16 {" PRFL_NAMES_72 "}, %72, %73, p, 1, 1, 0, 0;\n}"
      : PRFL_F64(d), PRFL_F8(d, 64)
      : "l"(a), "l"(b), "r"(accumulate));
}

__device__ __forceinline__ void mma_bf16(float (&d)[88], uint64_t a, uint64_t b, int accumulate) {
  asm volatile(
      "{\n.reg .pred p;\nsetp.ne.b32 p, %90, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n176k16.f32.bf16.bf16 {" PRFL_NAMES_88 "}, %88, %89, p, 1, 1, 0, 0;\n}"
      : PRFL_F64(d), PRFL_F8(d, 64), PRFL_F8(d, 72), PRFL_F8(d, 80)
      : "l"(a), "l"(b), "r"(accumulate));
}

// A in registers, four a thread; B in shared memory as [K, N].
__device__ __forceinline__ void mma_bf16(float (&d)[64], const uint32_t* a, uint64_t b, int accumulate) {
  asm volatile(
      "{\n.reg .pred p;\nsetp.ne.b32 p, %69, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {" PRFL_NAMES_64
      "},"
      " {%64, %65, %66, %67}, %68, p, 1, 1, 1;\n}"
      : PRFL_F64(d)
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(accumulate));
}

// The same of e4m3, 32 of K at a time, both operands along K.
__device__ __forceinline__ void mma_e4m3(float (&d)[64], uint64_t a, uint64_t b, int accumulate) {
  asm volatile(
      "{\n.reg .pred p;\nsetp.ne.b32 p, %66, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n128k32.f32.e4m3.e4m3 {" PRFL_NAMES_64 "}, %64, %65, p, 1, 1;\n}"
      : PRFL_F64(d)
      : "l"(a), "l"(b), "r"(accumulate));
}

__device__ __forceinline__ void mma_e4m3(float (&d)[64], const uint32_t* a, uint64_t b, int accumulate) {
  asm volatile(
      "{\n.reg .pred p;\nsetp.ne.b32 p, %69, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n128k32.f32.e4m3.e4m3 {" PRFL_NAMES_64
      "},"
      " {%64, %65, %66, %67}, %68, p, 1, 1;\n}"
      : PRFL_F64(d)
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(accumulate));
}

#undef PRFL_F8
#undef PRFL_F64
#undef PRFL_NAMES_64
#undef PRFL_NAMES_72
#undef PRFL_NAMES_88

#else

inline void mma_fence() { cusim::product_fence(); }
inline void mma_commit() { cusim::product_commit(); }
template <int N>
inline void mma_wait(CUSIM_HERE) {
  __syncwarp(~0u, file, line);
  cusim::product_wait(N, file, line);
  __syncwarp(~0u, file, line);
}
template <int N>
inline void mma_bf16(float (&d)[N], uint64_t a, uint64_t b, int accumulate) {
  cusim::product_issue({d, 2 * N, a, nullptr, b, false, false, accumulate != 0});
}
template <int N>
inline void mma_bf16(float (&d)[N], const uint32_t* a, uint64_t b, int accumulate) {
  cusim::product_issue({d, 2 * N, 0, a, b, true, false, accumulate != 0});
}
template <int N>
inline void mma_e4m3(float (&d)[N], uint64_t a, uint64_t b, int accumulate) {
  cusim::product_issue({d, 2 * N, a, nullptr, b, false, true, accumulate != 0});
}
template <int N>
inline void mma_e4m3(float (&d)[N], const uint32_t* a, uint64_t b, int accumulate) {
  cusim::product_issue({d, 2 * N, 0, a, b, false, true, accumulate != 0});
}

#endif

}  // namespace prfl::cuda
