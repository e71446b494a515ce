// Blocks of a cluster: their rank, their barrier, and each other's shared memory.
#pragma once
#include "cuda/device.h"

namespace prfl::cuda {

#ifndef CUSIM

__device__ __forceinline__ unsigned cluster_rank() {
  unsigned rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}
__device__ __forceinline__ unsigned cluster_size() {
  unsigned size;
  asm volatile("mov.u32 %0, %%cluster_nctarank;" : "=r"(size));
  return size;
}
// Every thread of the cluster arrives, and waits; what it wrote before is then seen by all.
__device__ __forceinline__ void cluster_arrive() {
  asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
}
__device__ __forceinline__ void cluster_wait() {
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
}
// *there = value in the shared memory of another block, where `there` is this block's place of it.
__device__ __forceinline__ void store_at_rank(float* there, unsigned rank, float value) {
  uint32_t remote;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;"
               : "=r"(remote)
               : "r"(static_cast<uint32_t>(__cvta_generic_to_shared(there))), "r"(rank));
  asm volatile("st.shared::cluster.f32 [%0], %1;" ::"r"(remote), "f"(value) : "memory");
}
// An arrival at the barrier that is in another block where `there` is in this one.
__device__ __forceinline__ void mbarrier_arrive_at(uint64_t* there, unsigned rank) {
  uint32_t remote;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;"
               : "=r"(remote)
               : "r"(static_cast<uint32_t>(__cvta_generic_to_shared(there))), "r"(rank));
  asm volatile("mbarrier.arrive.shared::cluster.b64 _, [%0];" ::"r"(remote) : "memory");
}

#else

inline unsigned cluster_rank() { return cusim::self->rank; }
inline unsigned cluster_size() { return cusim::self->ranks; }
inline void cluster_arrive(CUSIM_HERE) { cusim::cluster_arrive(file, line); }
inline void cluster_wait(CUSIM_HERE) { cusim::cluster_wait(file, line); }
inline void store_at_rank(float* there, unsigned rank, float value) {
  *static_cast<float*>(cusim::at_rank(there, rank)) = value;
}
inline void mbarrier_arrive_at(uint64_t* there, unsigned rank) {
  cusim::mbarrier_add(static_cast<uint64_t*>(cusim::at_rank(there, rank)), 1, 0);
}

#endif

}  // namespace prfl::cuda
