// One source, two compilers: nvcc for a GPU, or a host compiler with -DCUSIM for sim/cusim.h.
#pragma once
#include <cstdint>
#ifdef CUSIM
#include "cusim.h"
#define PRFL_SHARED(name) unsigned char* name = reinterpret_cast<unsigned char*>(::cusim::self->shared)
#define PRFL_UNROLL
#else
#include <cuda_bf16.h>
#include <cuda_fp8.h>
#include <cuda_runtime.h>
// All shared memory is dynamic: the launch counts it, and cusim gives every block its own.
#define PRFL_SHARED(name) extern __shared__ __align__(1024) unsigned char name[]
#define PRFL_UNROLL _Pragma("unroll")
#endif

namespace prfl::cuda {

using bf16 = __nv_bfloat16;

constexpr int kWarp = 32;

__device__ __forceinline__ int lane_id() { return threadIdx.x % kWarp; }
__device__ __forceinline__ int warp_id() { return threadIdx.x / kWarp; }

// x, of which the compiler does not know that it is x: what is computed from it is computed here.
__device__ __forceinline__ int opaque(int x) {
#ifndef CUSIM
  asm volatile("" : "+r"(x));
#endif
  return x;
}

}  // namespace prfl::cuda
