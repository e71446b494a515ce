// The copy engine on tensors (TMA): tokens of one head of [B, L, H, D], D contiguous, to and from tiles in
// shared memory. A tile is one or more panels of 128 bytes a token, one after the other, each in the
// 128-byte swizzle that wgmma reads. Tokens past the end of a sample are read as zeros and not written.
// A tensor map has five dimensions, (bytes of a panel, L, panels, H, B): one instruction moves a tile.
#pragma once
#include <cuda.h>

#include <stdexcept>
#include <string>

#include "bulk.h"
#ifdef CUSIM
#include "sim/hopper.h"
#endif

namespace prfl::cuda {

constexpr int kPanel = 128;     // bytes of a token in a panel, the span of the swizzle
constexpr int kSwizzle = 1024;  // bytes after which the swizzle repeats; tiles start at multiples

// Where byte `at` of token `row` lies in a panel.
__host__ __device__ constexpr int swizzled(int row, int at) { return row * kPanel + (at ^ row % 8 * 16); }

#ifndef CUSIM

__device__ __forceinline__ void tma_load(void* tile, const CUtensorMap* map, int row, int panel, int head,
                                         int batch, uint64_t* bar) {
  asm volatile(
      "cp.async.bulk.tensor.5d.shared::cluster.global.mbarrier::complete_tx::bytes"
      " [%0], [%1, {%3, %4, %5, %6, %7}], [%2];" ::"r"(shared_address(tile)),
      "l"(map), "r"(shared_address(bar)), "r"(0), "r"(row), "r"(panel), "r"(head), "r"(batch)
      : "memory");
}
// To the same place, and reported to the same barrier, in the first `ranks` blocks of the cluster.
__device__ __forceinline__ void tma_load_all(void* tile, const CUtensorMap* map, int row, int panel, int head,
                                             int batch, uint64_t* bar, unsigned ranks) {
  if (ranks == 1) return tma_load(tile, map, row, panel, head, batch, bar);
  asm volatile(
      "cp.async.bulk.tensor.5d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster"
      " [%0], [%1, {%3, %4, %5, %6, %7}], [%2], %8;" ::"r"(shared_address(tile)),
      "l"(map), "r"(shared_address(bar)), "r"(0), "r"(row), "r"(panel), "r"(head), "r"(batch),
      "h"(static_cast<uint16_t>((1 << ranks) - 1))
      : "memory");
}
// Belongs to the thread's next bulk_commit.
__device__ __forceinline__ void tma_store(const CUtensorMap* map, const void* tile, int row, int panel,
                                          int head, int batch) {
  asm volatile(
      "cp.async.bulk.tensor.5d.global.shared::cta.bulk_group [%0, {%2, %3, %4, %5, %6}], [%1];" ::"l"(map),
      "r"(shared_address(tile)), "r"(0), "r"(row), "r"(panel), "r"(head), "r"(batch)
      : "memory");
}

// Of the driver, which is asked at run time and once: the library has to load where there is none. Throws
// std::runtime_error if the driver does not have it.
inline decltype(&cuTensorMapEncodeTiled) tensor_map_encoder() {
  static void* const found = [] {
    const char* name = "cuTensorMapEncodeTiled";
    void* entry = nullptr;
    cudaDriverEntryPointQueryResult state{};
#if CUDART_VERSION >= 12050  // the other is gone in CUDA 13
    const cudaError_t got = cudaGetDriverEntryPointByVersion(name, &entry, 12000, cudaEnableDefault, &state);
#else
    const cudaError_t got = cudaGetDriverEntryPoint(name, &entry, cudaEnableDefault, &state);
#endif
    if (got != cudaSuccess)
      throw std::runtime_error(std::string(name) + ": got " + cudaGetErrorString(got) +
                               " from the CUDA driver");
    if (state != cudaDriverEntryPointSuccess)
      throw std::runtime_error(std::string(name) +
                               ": got a CUDA driver without it, want one for CUDA 12.0 or newer");
    return entry;
  }();
  return reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(found);
}

#else

inline void tma_load(void* tile, const CUtensorMap* map, int row, int panel, int head, int batch,
                     uint64_t* bar) {
  cusim::tensor_load(tile, map, {0, row, panel, head, batch}, bar);
}
inline void tma_load_all(void* tile, const CUtensorMap* map, int row, int panel, int head, int batch,
                         uint64_t* bar, unsigned ranks) {
  for (unsigned rank = 0; rank < ranks; ++rank)
    cusim::tensor_load(cusim::at_rank(tile, rank), map, {0, row, panel, head, batch},
                       static_cast<uint64_t*>(cusim::at_rank(bar, rank)), rank == 0);
}
inline void tma_store(const CUtensorMap* map, const void* tile, int row, int panel, int head, int batch) {
  cusim::tensor_store(map, tile, {0, row, panel, head, batch});
}
inline auto tensor_map_encoder() { return &cusim::encode_tiled; }

#endif

struct Rows {  // a tensor [B, L, H, D]; strides in elements, of which `bytes` bytes each
  const void* data;
  int64_t batch, length, heads, dim;
  int64_t batch_stride, length_stride, head_stride;
  CUtensorMapDataType type;
  int bytes;
};

// The map of tiles of `rows` tokens and `panels` panels, by default all of a token. Throws
// std::runtime_error with the kernel's name and the map's numbers if there is none.
inline CUtensorMap tensor_map(const char* kernel, const char* name, const Rows& a, int rows,
                              int64_t panels = 0) {
  const cuuint64_t width = kPanel / a.bytes, all = a.dim * a.bytes / kPanel;
  const cuuint64_t sizes[5] = {width, cuuint64_t(a.length), all, cuuint64_t(a.heads), cuuint64_t(a.batch)};
  // The stride of a dimension of size 1 is arbitrary; a map wants a multiple of 16 bytes all the same.
  const auto bytes = [&](int64_t size, int64_t stride) {
    return cuuint64_t(size == 1 ? kPanel : stride * a.bytes);
  };
  const cuuint64_t strides[4] = {bytes(a.length, a.length_stride), kPanel, bytes(a.heads, a.head_stride),
                                 bytes(a.batch, a.batch_stride)};
  const cuuint32_t box[5] = {cuuint32_t(width), cuuint32_t(rows), cuuint32_t(panels ? panels : all), 1, 1};
  const cuuint32_t steps[5] = {1, 1, 1, 1, 1};
  CUtensorMap map;
  const CUresult got = tensor_map_encoder()(
      &map, a.type, 5, const_cast<void*>(a.data), sizes, strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
      CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (got == CUDA_SUCCESS) return map;
  std::string text = std::string(kernel) + ": cuTensorMapEncodeTiled got " + name + " of sizes";
  for (int64_t n : {a.batch, a.length, a.heads, a.dim}) text += " " + std::to_string(n);
  text += ", strides";
  for (int64_t n : {a.batch_stride, a.length_stride, a.head_stride}) text += " " + std::to_string(n);
  text += " of " + std::to_string(a.bytes) + " bytes and boxes of " + std::to_string(rows) + " rows";
  throw std::runtime_error(text + ", and failed with " + std::to_string(got));
}

}  // namespace prfl::cuda
