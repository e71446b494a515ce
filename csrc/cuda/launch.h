// Launching a kernel, with what went wrong as an exception.
#pragma once
#include <stdexcept>
#include <string>

#include "device.h"

namespace prfl::cuda {

struct Shape {
  dim3 grid, block;
  size_t shared = 0;
  unsigned cluster = 1;  // blocks, along x
};

inline std::string described(const char* name, const Shape& s) {
  return std::string(name) + " (grid " + std::to_string(s.grid.x) + " x " + std::to_string(s.grid.y) +
         ", cluster " + std::to_string(s.cluster) + ", block " + std::to_string(s.block.x) + ", shared " +
         std::to_string(s.shared) + ")";
}

inline void require(cudaError_t status, const char* name, const Shape& s) {
  if (status != cudaSuccess)
    throw std::runtime_error(described(name, s) + ": got " + cudaGetErrorString(status) + ", want success");
}

// Of the current device.
inline int multiprocessors() {
  int device = 0, found = 0;
  if (cudaGetDevice(&device) != cudaSuccess ||
      cudaDeviceGetAttribute(&found, cudaDevAttrMultiProcessorCount, device) != cudaSuccess)
    throw std::runtime_error("got no number of multiprocessors from the driver, want a device");
  return found;
}

// kernel<<<...>>>(arguments...) on the stream. Throws std::runtime_error with the kernel's name and
// the numbers of the launch.
template <class... Parameters, class... Arguments>
void launch(const char* name, void (*kernel)(Parameters...), const Shape& s, cudaStream_t stream,
            Arguments... arguments) {
  if (s.shared > 48 << 10)
    require(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(s.shared)), name,
            s);
  cudaLaunchAttribute cluster;
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim.x = s.cluster, cluster.val.clusterDim.y = 1, cluster.val.clusterDim.z = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = s.grid, config.blockDim = s.block, config.dynamicSmemBytes = s.shared;
  config.stream = stream, config.attrs = &cluster, config.numAttrs = s.cluster > 1 ? 1 : 0;
  require(cudaLaunchKernelEx(&config, kernel, Parameters(arguments)...), name, s);
}

}  // namespace prfl::cuda
