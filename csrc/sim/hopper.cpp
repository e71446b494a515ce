// Tensor maps and products of warp groups. As cusim.cpp, compiled without -fsanitize=thread.
#include "hopper.h"

#include <deque>
#include <map>
#include <vector>

namespace cusim {

namespace {

struct TiledMap {
  char* data;
  uint64_t sizes[5], strides[4];
  uint32_t box[5], bytes;
};
static_assert(sizeof(TiledMap) <= sizeof(CUtensorMap));

TiledMap opened(const CUtensorMap* map) {
  TiledMap m;
  std::memcpy(&m, map, sizeof m);
  return m;
}

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
            int64_t offset = 0;
            for (int i = 0; i < 5; ++i) {
              const int64_t x = int64_t(corner[i]) + at[i];
              in = in && x >= 0 && x < int64_t(m.sizes[i]);
              offset += x * int64_t(i ? m.strides[i - 1] : m.bytes);
            }
            f(in ? m.data + offset : nullptr, tile + (place ^ (place >> 7 & 7) << 4));
          }
}

void need_tile(const void* tile) {
  if (uintptr_t(tile) % 1024) fail("a tile that does not start at 1024 bytes");
}

float number(const char* p, bool fp8) {
  if (fp8) {
    __nv_fp8_e4m3 x;
    std::memcpy(&x, p, 1);
    return float(x);
  }
  uint16_t bits;
  std::memcpy(&bits, p, 2);
  return __uint_as_float(uint32_t(bits) << 16);
}

// Element (row, k) of an operand in shared memory.
float operand(uint64_t desc, int row, int k, bool by_k, bool fp8) {
  if (desc >> 62 != 1) fail("a wgmma operand without the 128-byte swizzle");
  const uint32_t start = uint32_t(desc & 0x3fff) << 4, leading = uint32_t(desc >> 16 & 0x3fff) << 4,
                 stride = uint32_t(desc >> 32 & 0x3fff) << 4;
  const uint32_t at = by_k ? row / 64 * leading + row % 64 * 2 + k / 8 * stride + k % 8 * 128
                           : row / 8 * stride + row % 8 * 128 + k * (fp8 ? 1 : 2);
  const uint32_t address = start + at;
  const char* p = self->shared + (address ^ (address >> 7 & 7) << 4);
  if (k % 8 == 0) race_check(p, 1, false);  // often enough to meet a copy
  return number(p, fp8);
}

// A[row, 0:depth] of this thread's rows l / 4 and l / 4 + 8. In registers a quad has them together.
void left_rows(const Product& p, int depth, float (&a)[2][32]) {
  const int thread = self->thread.x % 128, lane = thread % 32, size = p.fp8 ? 1 : 2, held = 4 / size;
  const char* all = p.a_own ? exchange(~0u, p.a_own, 16, false, __FILE__, __LINE__) : nullptr;
  for (int h = 0; h < 2; ++h)
    for (int k = 0; k < depth; ++k) {
      const int owner = lane / 4 * 4 + k / held % 4, byte = 4 * (h + 2 * (k / (depth / 2))) + k % held * size;
      a[h][k] = all ? number(all + kSlot * owner + byte, p.fp8)
                    : operand(p.a, thread / 32 * 16 + lane / 4 + 8 * h, k, false, p.fp8);
    }
}

void compute(const Product& p) {
  const int lane = self->thread.x % 32, depth = p.fp8 ? 32 : 16;
  float a[2][32];
  left_rows(p, depth, a);
  for (int j = 0; j < p.columns / 8; ++j)
    for (int e = 0; e < 2; ++e) {
      float sum[2] = {0, 0};
      for (int k = 0; k < depth; ++k) {
        const float b = operand(p.b, 8 * j + 2 * (lane % 4) + e, k, p.b_by_k, p.fp8);
        for (int h = 0; h < 2; ++h) sum[h] += a[h][k] * b;
      }
      for (int h = 0; h < 2; ++h) {
        float& d = p.d[4 * j + 2 * h + e];
        d = p.accumulate ? d + sum[h] : sum[h];
      }
    }
}

struct Products {  // of a thread
  uint3 block;
  bool fenced;
  std::vector<Product> open;
  std::deque<std::vector<Product>> groups;
};

Products& products() {
  static std::map<const Thread*, Products> all;
  Products& found = all[self];
  const uint3 now = self->block;
  if (found.block.x != now.x || found.block.y != now.y || found.block.z != now.z)
    found = Products{now, {}, {}, {}};
  return found;
}

}  // namespace

CUresult encode_tiled(CUtensorMap* map, CUtensorMapDataType type, cuuint32_t rank, void* data,
                      const cuuint64_t* sizes, const cuuint64_t* strides, const cuuint32_t* box,
                      const cuuint32_t* steps, CUtensorMapInterleave interleave, CUtensorMapSwizzle swizzle,
                      CUtensorMapL2promotion, CUtensorMapFloatOOBfill fill) {
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

void tensor_load(void* tile, const CUtensorMap* map, Corner corner, uint64_t* bar, bool reads) {
  const TiledMap m = opened(map);
  need_tile(tile);
  const unsigned bytes = m.box[0] * m.box[1] * m.box[2] * m.box[3] * m.box[4] * m.bytes;
  char* to = static_cast<char*>(tile);
  race_check(to, bytes, true);
  const Unseen unseen;
  each_unit(m, to, corner, [reads](char* global, char*) {
    if (global && reads) touch(global, 16, false);
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

void tensor_store(const CUtensorMap* map, const void* tile, Corner corner) {
  need_tile(tile);
  each_unit(opened(map), static_cast<char*>(const_cast<void*>(tile)), corner, [](char* global, char* shared) {
    if (global) bulk_store(global, shared, 16);
  });
}

void product_fence() { products().fenced = true; }

void product_issue(const Product& p) {
  if (!products().fenced) fail("a wgmma without a fence since the last wait");
  products().open.push_back(p);
}

void product_commit() {
  Products& p = products();
  p.groups.push_back(std::move(p.open));
  p.open.clear();
}

void product_wait(size_t unfinished, const char* file, int line) {
  pause(file, line);  // what overwrites an operand too early may do so now
  Products& p = products();
  p.fenced = false;
  for (; p.groups.size() > unfinished; p.groups.pop_front())
    for (const Product& product : p.groups.front()) compute(product);
}

}  // namespace cusim
