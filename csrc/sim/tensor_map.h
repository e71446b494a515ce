// Tensor maps and their copies for cusim. A map holds its arguments, which are checked as the driver
// documents them; only the 128-byte swizzle without interleaving is modelled.
#pragma once
#include <cuda.h>

#include <array>

#include "cusim.h"

namespace cusim {

struct TiledMap {
  char* data;
  uint64_t sizes[5], strides[4];
  uint32_t box[5], bytes;
};
static_assert(sizeof(TiledMap) <= sizeof(CUtensorMap));

inline CUresult encode_tiled(CUtensorMap* map, CUtensorMapDataType type, cuuint32_t rank, void* data,
                             const cuuint64_t* sizes, const cuuint64_t* strides, const cuuint32_t* box,
                             const cuuint32_t* steps, CUtensorMapInterleave interleave,
                             CUtensorMapSwizzle swizzle, CUtensorMapL2promotion,
                             CUtensorMapFloatOOBfill fill) {
  const bool bf16 = type == CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
  bool fits = (bf16 || type == CU_TENSOR_MAP_DATA_TYPE_UINT8) && rank == 5 && uintptr_t(data) % 16 == 0 &&
              interleave == CU_TENSOR_MAP_INTERLEAVE_NONE && swizzle == CU_TENSOR_MAP_SWIZZLE_128B &&
              fill == CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE;
  TiledMap made{static_cast<char*>(data), {}, {}, {}, bf16 ? 2u : 1u};
  for (unsigned i = 0; i < 5; ++i) {
    fits = fits && sizes[i] >= 1 && sizes[i] <= 1ull << 32 && box[i] >= 1 && box[i] <= 256 && steps[i] == 1;
    if (i < 4) fits = fits && strides[i] % 16 == 0 && strides[i] < 1ull << 40;
    made.sizes[i] = sizes[i], made.box[i] = box[i];
    if (i < 4) made.strides[i] = strides[i];
  }
  if (!fits || box[0] * made.bytes != 128) return CUDA_ERROR_INVALID_VALUE;
  std::memcpy(map, &made, sizeof made);
  return CUDA_SUCCESS;
}

using Corner = std::array<int, 5>;

// f(global pointer or nullptr if out of bounds, shared pointer) for every 16 bytes of a box.
template <class F>
void each_unit(const TiledMap& m, char* tile, const Corner& corner, F f) {
  unsigned at[5];
  unsigned place = 0;
  for (at[4] = 0; at[4] < m.box[4]; ++at[4])
    for (at[3] = 0; at[3] < m.box[3]; ++at[3])
      for (at[2] = 0; at[2] < m.box[2]; ++at[2])
        for (at[1] = 0; at[1] < m.box[1]; ++at[1])
          for (at[0] = 0; at[0] < m.box[0]; at[0] += 16 / m.bytes, place += 16) {
            bool in = true;
            char* global = m.data;
            for (int i = 0; i < 5; ++i) {
              const int64_t x = int64_t(corner[i]) + at[i];
              in = in && x >= 0 && x < int64_t(m.sizes[i]);
              global += x * int64_t(i ? m.strides[i - 1] : m.bytes);
            }
            f(in ? global : nullptr, tile + (place ^ (place >> 7 & 7) << 4));
          }
}

inline void need_tile(const void* tile) {
  if (uintptr_t(tile) % 1024) fail("a tile that does not start at 1024 bytes");
}

inline void tensor_load(void* tile, const CUtensorMap* map, Corner corner, uint64_t* bar) {
  TiledMap m;
  std::memcpy(&m, map, sizeof m);
  need_tile(tile);
  const unsigned bytes = m.box[0] * m.box[1] * m.box[2] * m.box[3] * m.box[4] * m.bytes;
  char* to = static_cast<char*>(tile);
  each_unit(m, to, corner, [](char* global, char*) {
    if (global) touch(global, 16, false);
  });
  later(bar, bytes, [=] {
    each_unit(m, to, corner, [](char* global, char* shared) {
      if (global)
        std::memcpy(shared, global, 16);
      else
        std::memset(shared, 0, 16);
    });
  });
}

inline void tensor_store(const CUtensorMap* map, const void* tile, Corner corner) {
  TiledMap m;
  std::memcpy(&m, map, sizeof m);
  need_tile(tile);
  each_unit(m, static_cast<char*>(const_cast<void*>(tile)), corner, [](char* global, char* shared) {
    if (global) bulk_store(global, shared, 16);
  });
}

}  // namespace cusim
