// Warp groups of 128 threads: their share of the registers, and barriers among some of a block's threads.
#pragma once
#include "cuda/device.h"

namespace prfl::cuda {

constexpr int kWarpGroup = 128;

// A barrier among some of a block's threads: 1 to 15, since 0 is that of __syncthreads. A kernel names its own.
enum class NamedBarrier : int {};

#ifndef CUSIM

// The number of this thread's warp group, which the compiler then knows to be the same in all of a warp:
// otherwise it serialises products after a branch on it.
__device__ __forceinline__ int warpgroup_id() { return __shfl_sync(~0u, threadIdx.x / kWarpGroup, 0); }

// All threads of a warp group give registers back, or wait for more: they have N each from here on.
template <int N>
__device__ __forceinline__ void shrink_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(N));
}
template <int N>
__device__ __forceinline__ void grow_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(N));
}

// A barrier of `threads` threads, of which some only arrive.
__device__ __forceinline__ void named_barrier_wait(NamedBarrier id, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(int(id)), "r"(threads) : "memory");
}
__device__ __forceinline__ void named_barrier_arrive(NamedBarrier id, int threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(int(id)), "r"(threads) : "memory");
}

#else

inline int warpgroup_id(CUSIM_HERE) { return __shfl_sync(~0u, threadIdx.x / kWarpGroup, 0, 32, file, line); }
template <int N>
inline void shrink_registers(CUSIM_HERE) {
  static_assert(N >= 24 && N <= 256 && N % 8 == 0, "setmaxnreg takes multiples of 8 from 24 to 256");
  __syncwarp(~0u, file, line);
}
template <int N>
inline void grow_registers(CUSIM_HERE) {
  shrink_registers<N>(file, line);
}
inline void named_barrier_wait(NamedBarrier id, int threads, CUSIM_HERE) {
  cusim::barrier(unsigned(id), threads, true, file, line);
}
inline void named_barrier_arrive(NamedBarrier id, int threads, CUSIM_HERE) {
  cusim::barrier(unsigned(id), threads, false, file, line);
}

#endif

}  // namespace prfl::cuda
