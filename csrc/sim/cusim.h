// cusim runs CUDA C++ on a CPU: one fiber for every CUDA thread of a block, or of all blocks of a
// cluster; clusters run one after another. A .cu file that includes cuda/device.h is compiled as host
// C++ with -DCUSIM. Conversions are those of NVIDIA's own bf16 and fp8 headers.
//
// What it finds: divergent barriers, deadlocks, lanes that miss a collective, accesses through
// cuda/vector.h that are misaligned or outside every watched array, copies not waited for, launches
// that a GPU would refuse, and reads of memory nobody wrote (shared memory starts as NaN). They
// come back as std::runtime_error from the launch. AddressSanitizer adds out-of-bounds accesses of
// shared memory, ThreadSanitizer (-DCUSIM_TSAN for cusim.cpp) races between threads of a cluster.
// What it does not find: races between clusters, missing proxy fences, anything about time.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp8.h>
#include <driver_types.h>
#include <vector_functions.h>
#include <vector_types.h>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <utility>
#include <vector>

#undef __global__
#undef __device__
#undef __host__
#undef __shared__  // stays undefined: kernels use dynamic shared memory, which is checked
#undef __constant__
#undef __forceinline__
#undef __launch_bounds__
#undef __grid_constant__
#undef __cluster_dims__
#define __global__
#define __device__
#define __host__
#define __constant__ static
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__
#define CUSIM_HERE const char *file = __builtin_FILE(), int line = __builtin_LINE()

inline dim3 gridDim, blockDim;  // of the launch now running; no macros, since structs have such members

namespace cusim {

struct Thread {
  uint3 thread, block;
  unsigned lane, rank, ranks;  // in the warp; of the block in its cluster, and blocks of that
  char* shared;
};
extern Thread* self;  // the CUDA thread now running

struct Launch {
  dim3 grid, block, cluster;
  size_t shared;
  const void* kernel;
};

[[noreturn]] void fail(const char* what);
// bar.sync and bar.arrive (wait false) of `count` threads; 0: all of the block, at one call site.
void barrier(unsigned id, unsigned count, bool wait, const char* file, int line);
void pause(const char* file, int line);  // until every other warp has run as far as it can
void cluster_arrive(const char* file, int line);
void cluster_wait(const char* file, int line);
void* at_rank(void* shared, unsigned rank);  // the same place in another block of the cluster
// Every lane of mask gives n bytes and gets those of all, lane i at slot i.
constexpr size_t kSlot = 256;
char* exchange(unsigned mask, const void* value, size_t n, bool fence, const char* file, int line);
void mbarrier_init(uint64_t* bar, unsigned count);
void mbarrier_add(uint64_t* bar, unsigned arrivals, int64_t bytes);
void mbarrier_wait(uint64_t* bar, unsigned parity, const char* file, int line);
// Work of the asynchronous copy engine happens as late as it may: loads when no thread can go on
// otherwise, or after load_early(true) at once; stores when their group is waited for. `work` moves the
// data, `bytes` go to bar.
void later(uint64_t* bar, int64_t bytes, std::function<void()> work);
void bulk_load(void* to, const void* from, size_t bytes, uint64_t* bar);
void bulk_store(void* to, const void* from, size_t bytes);
void bulk_commit();
void bulk_wait(size_t groups);
// An access of global or shared memory by the running thread: alignment, bounds, byte counts.
void touch(const void* p, size_t bytes, bool write);
// For models outside cusim.cpp: an access for ThreadSanitizer alone, and a scope that it does not see.
void race_check(const void* p, size_t bytes, bool write);
struct Unseen {
  Unseen();
  ~Unseen();
};
void allow_shared(const void* kernel, size_t bytes);  // cudaFuncSetAttribute
void launch(const Launch& launch, const std::function<void()>& body);

// For tests: the arrays that kernels may access (anything, if there are none), the bytes (read, written)
// of one, and what was launched since the last unwatch.
void watch(const void* base, size_t bytes);
void unwatch();
void load_early(bool on);
inline int multiprocessors = 132;  // of the device, as an H100 has
std::pair<uint64_t, uint64_t> traffic(const void* base);
const std::vector<Launch>& launches();

template <class T, class Source>
T shuffle(unsigned mask, T value, int width, Source source, const char* file, int line) {
  const char* all = exchange(mask, &value, sizeof(T), false, file, line);
  const int from = source(int(self->lane), int(self->lane) & ~(width - 1));
  if (from >= 0) std::memcpy(&value, all + kSlot * from, sizeof(T));
  return value;
}

}  // namespace cusim

#define threadIdx (::cusim::self->thread)
#define blockIdx (::cusim::self->block)

inline void __syncthreads(CUSIM_HERE) { cusim::barrier(0, 0, true, file, line); }
inline void __syncwarp(unsigned mask = ~0u, CUSIM_HERE) {
  const int nothing = 0;
  cusim::exchange(mask, &nothing, 4, true, file, line);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int other, int width = 32, CUSIM_HERE) {
  auto source = [=](int lane, int first) { return (lane ^ other) < first + width ? lane ^ other : -1; };
  return cusim::shuffle(mask, value, width, source, file, line);
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned by, int width = 32, CUSIM_HERE) {
  auto source = [=](int lane, int first) { return lane + int(by) < first + width ? lane + int(by) : -1; };
  return cusim::shuffle(mask, value, width, source, file, line);
}
template <class T>
T __shfl_sync(unsigned mask, T value, int from, int width = 32, CUSIM_HERE) {
  auto source = [=](int, int first) { return first + (from & (width - 1)); };
  return cusim::shuffle(mask, value, width, source, file, line);
}
inline unsigned __ballot_sync(unsigned mask, int predicate, CUSIM_HERE) {
  const int mine = predicate != 0;
  const char* all = cusim::exchange(mask, &mine, 4, false, file, line);
  unsigned votes = 0;
  for (int i = 0; i < 32; ++i)
    if (mask >> i & 1) votes |= unsigned(all[cusim::kSlot * i]) << i;
  return votes;
}
inline int __any_sync(unsigned mask, int p, CUSIM_HERE) { return __ballot_sync(mask, p, file, line) != 0; }
inline int __all_sync(unsigned mask, int p, CUSIM_HERE) { return __ballot_sync(mask, p, file, line) == mask; }

template <class T>
T __ldg(const T* p) {
  return *p;
}
inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }
inline float __expf(float x) { return std::exp(x); }
inline float __fdividef(float a, float b) { return a / b; }
inline unsigned __float_as_uint(float x) {
  unsigned u;
  std::memcpy(&u, &x, 4);
  return u;
}
inline float __uint_as_float(unsigned u) {
  float x;
  std::memcpy(&x, &u, 4);
  return x;
}
inline int __float_as_int(float x) { return int(__float_as_uint(x)); }
inline float __int_as_float(int i) { return __uint_as_float(unsigned(i)); }
using std::max;
using std::min;

inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline const char* cudaGetErrorString(cudaError_t) { return "no error"; }
inline cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int) {
  return *value = cusim::multiprocessors, cudaSuccess;
}
template <class Kernel>
cudaError_t cudaFuncSetAttribute(Kernel* kernel, cudaFuncAttribute attribute, int value) {
  if (attribute == cudaFuncAttributeMaxDynamicSharedMemorySize)
    cusim::allow_shared(reinterpret_cast<const void*>(kernel), size_t(value));
  return cudaSuccess;
}
template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Arguments... arguments) {
  cusim::Launch launch{config->gridDim, config->blockDim, dim3(1, 1, 1), config->dynamicSmemBytes,
                       reinterpret_cast<const void*>(kernel)};
  for (unsigned i = 0; i < config->numAttrs; ++i)
    if (config->attrs[i].id == cudaLaunchAttributeClusterDimension) {
      const auto& c = config->attrs[i].val.clusterDim;
      launch.cluster = dim3(c.x, c.y, c.z);
    }
  cusim::launch(launch, [=] { kernel(arguments...); });
  return cudaSuccess;
}
