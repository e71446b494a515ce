// The bulk copy engine and the barriers that it reports to: one thread starts copies of contiguous
// bytes (multiples of 16, at multiples of 16) between global and shared memory.
#pragma once
#include "cuda/device.h"

namespace prfl::cuda {

#ifndef CUSIM

__device__ __forceinline__ uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}
__device__ __forceinline__ void mbarrier_init(uint64_t* bar, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(bar)), "r"(arrivals)
               : "memory");
}
// Makes initialised barriers visible to the copy engine and to the cluster.
__device__ __forceinline__ void mbarrier_init_fence() {
  asm volatile("fence.mbarrier_init.release.cluster;\nfence.proxy.async;" ::: "memory");
}
__device__ __forceinline__ void mbarrier_arrive(uint64_t* bar) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(bar)) : "memory");
}
// One arrival that also announces the bytes of copies to come.
__device__ __forceinline__ void mbarrier_expect(uint64_t* bar, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(bar)), "r"(bytes)
               : "memory");
}
// Until the phase of that parity (0 first) has ended.
__device__ __forceinline__ void mbarrier_wait(uint64_t* bar, unsigned parity) {
  asm volatile(
      "{\n.reg .pred done;\nagain:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@!done bra again;\n}" ::"r"(shared_address(bar)),
      "r"(parity)
      : "memory");
}
__device__ __forceinline__ void bulk_load(void* to, const void* from, unsigned bytes, uint64_t* bar) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
          shared_address(to)),
      "l"(__cvta_generic_to_global(from)), "r"(bytes), "r"(shared_address(bar))
      : "memory");
}
__device__ __forceinline__ void bulk_store(void* to, const void* from, unsigned bytes) {
  asm volatile(
      "cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" ::"l"(__cvta_generic_to_global(to)),
      "r"(shared_address(from)), "r"(bytes)
      : "memory");
}
__device__ __forceinline__ void bulk_commit() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }
// Until at most kGroups of the groups that this thread committed still read shared memory.
template <int kGroups>
__device__ __forceinline__ void bulk_wait_read() {
  asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(kGroups) : "memory");
}
// What this thread wrote to shared memory, the copy engine reads from now on, and the other way round.
__device__ __forceinline__ void bulk_fence() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

#else

inline void mbarrier_init(uint64_t* bar, int arrivals) { cusim::mbarrier_init(bar, arrivals); }
inline void mbarrier_init_fence() {}
inline void mbarrier_arrive(uint64_t* bar) { cusim::mbarrier_add(bar, 1, 0); }
inline void mbarrier_expect(uint64_t* bar, int bytes) {
  cusim::mbarrier_add(bar, 0, bytes);
  cusim::mbarrier_add(bar, 1, 0);
}
inline void mbarrier_wait(uint64_t* bar, unsigned parity, CUSIM_HERE) {
  cusim::mbarrier_wait(bar, parity, file, line);
}
inline void bulk_load(void* to, const void* from, unsigned bytes, uint64_t* bar) {
  cusim::bulk_load(to, from, bytes, bar);
}
inline void bulk_store(void* to, const void* from, unsigned bytes) { cusim::bulk_store(to, from, bytes); }
inline void bulk_commit() { cusim::bulk_commit(); }
template <int kGroups>
inline void bulk_wait_read() {
  cusim::bulk_wait(kGroups);
}
inline void bulk_fence() {}

#endif

}  // namespace prfl::cuda
