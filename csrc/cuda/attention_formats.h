// What attention_hopper.cu does differently in bfloat16 and in e4m3.
//
// bfloat16: tiles of keys and values are both [keys, 128] in two panels; p v adds to the accumulator. Many
// keys have tiles of 176. Few, as in cross-attention, have 128 or 144 and room for two tiles of queries.
// e4m3: keys are [128, 128] and values by channel, [128, keys], in one panel: these tensor cores want both
// operands along the summed dimension. They also add with about 14 bits, so p v of a block is a sum
// of its own, and the accumulator is float32 in registers; weights are stored times 2^8. See
// kernels/attention/fp8.py.
#pragma once
#include "ptx/cluster.h"
#include "softmax.h"
#include "ptx/tma.h"
#include "ptx/vector.h"
#include "ptx/warpgroup.h"
#include "ptx/wgmma.h"

namespace prfl::cuda {

constexpr int kDim = 128;
constexpr int kQueries = 64;  // of a warp group: the rows of a product
constexpr int kConsumers = 2;
constexpr int kMaxShared = 227 << 10;
constexpr int kQueryTile = kQueries * kDim * 2;  // bytes; results take as many

template <class Format>
struct Arguments {
  CUtensorMap q, k, v, out;
  float* lse;
  const float *q_scale, *k_scale, *v_scale;  // of e4m3
  int queries, keys, heads;
  int blocks;     // of keys
  int columns;    // of a head: a cluster works on one of them at a time, each of its blocks on 128 queries
  int items;      // columns of all heads and samples
  bool resident;  // keys and values of a head are all in shared memory at once
  float factor;
};

template <class Format>
struct Shared {
  unsigned char queries[kConsumers][Format::kQuerySlots][kQueryTile];  // later out
  unsigned char tiles[Format::kSlots][Format::kKeys * kDim * Format::kBytes];
  typename Format::Scales scales;
  uint64_t full[Format::kSlots], empty[Format::kSlots];
  uint64_t asked[kConsumers][Format::kQuerySlots], written[kConsumers][Format::kQuerySlots];
};

// What a block works on: a tile of 128 queries of a head, `left` of them with this one, in the order of
// tiles, heads and samples. Blocks of a cluster have head and batch in common: all read the same keys.
struct Place {
  int tile, head, batch, left;

  template <class Format>
  __device__ __forceinline__ explicit Place(const Arguments<Format>& a, int block = blockIdx.x) {
    const int ranks = cluster_size(), cluster = block / ranks, clusters = gridDim.x / ranks;
    const int each = a.items / clusters, more = a.items % clusters;
    const int first = cluster * each + min(cluster, more);
    left = each + (cluster < more);
    tile = first % a.columns * ranks + cluster_rank();
    head = first / a.columns % a.heads, batch = first / a.columns / a.heads;
  }
  template <class Format>
  __device__ __forceinline__ bool ends_head(const Arguments<Format>& a) const {
    return tile + int(cluster_size()) >= a.columns * int(cluster_size());
  }
  template <class Format>
  __device__ __forceinline__ void next(const Arguments<Format>& a) {
    const bool ends = ends_head(a);
    --left;
    tile = ends ? cluster_rank() : tile + cluster_size();
    if (ends && ++head == a.heads) head = 0, ++batch;
  }
  // Whether the next tile uses the keys and values that are in shared memory.
  template <class Format>
  __device__ __forceinline__ bool stays(const Arguments<Format>& a) const {
    return Format::kQuerySlots > 1 && a.resident && left > 1 && !ends_head(a);
  }
  __device__ __forceinline__ int row(int group) const { return (tile * kConsumers + group) * kQueries; }
};

struct Corner {  // of a box of a tensor map
  int row, panel;
};

template <int kKeys_>
struct Bf16 {
  static constexpr CUtensorMapDataType kType = CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
  static constexpr int kBytes = 2, kKeys = kKeys_, kBits = 0, kHalfRows = kKeys, kScaleBytes = 0;
  static constexpr int kWeights = kKeys / 4, kTile = kKeys * kDim * kBytes;
  static constexpr int kQuerySlots = kKeys > 144 ? 1 : 2;
  static constexpr int kSlots = (kMaxShared - 1024 - kConsumers * kQuerySlots * kQueryTile) / kTile;
  static_assert(kTile / 2 % kSwizzle == 0 && kKeys % 16 == 0);
  struct Scales {};
  float factor[2];

  static __device__ __forceinline__ uint64_t values(const void* tile) {
    return mma_operand(tile, kKeys * kPanel);
  }
  __device__ __forceinline__ Bf16(const Arguments<Bf16>& a, const Place&, int) : factor{a.factor, a.factor} {}

  // A half of a tile is a panel.
  static __device__ __forceinline__ Corner key_half(int block, int half) { return {block * kKeys, half}; }
  static __device__ __forceinline__ Corner value_half(int block, int half) { return {block * kKeys, half}; }
  static __device__ __forceinline__ void load_scales(Shared<Bf16>&, int, const Arguments<Bf16>&, int,
                                                     const Place&) {}
  static __device__ __forceinline__ void issue_scores(float (&scores)[kKeys / 2], uint64_t q, uint64_t k) {
    PRFL_UNROLL
    for (int d = 0; d < kDim; d += 16) {
      const int panel = d * 2 / kPanel, byte = d * 2 % kPanel;
      mma_bf16(scores, q + (panel * kQueries * kPanel + byte) / 16, k + (panel * kKeys * kPanel + byte) / 16,
               d > 0);
    }
  }
  __device__ __forceinline__ void issue_values(float (&acc)[kDim / 2], const uint32_t (&p)[kWeights],
                                               uint64_t v) {
    PRFL_UNROLL
    for (int j = 0; j < kKeys; j += 16) mma_bf16(acc, p + j / 4, v + j * kPanel / 16, 1);
  }
  __device__ __forceinline__ void scale(float (&)[kKeys / 2], const Shared<Bf16>&, int) const {}
  // After p v of a block: what is summed counts alpha as much from here on.
  __device__ __forceinline__ void fold(float (&acc)[kDim / 2], const float (&alpha)[2], bool first) {
    if (first) return;
    PRFL_UNROLL
    for (int i = 0; i < kDim / 2; ++i) acc[i] *= alpha[i / 2 % 2];
  }
  __device__ __forceinline__ void finish(float (&)[kDim / 2], const Arguments<Bf16>&, const Place&) const {}
  static __device__ __forceinline__ void round(uint32_t (&p)[kWeights], const float (&weights)[kKeys / 2]) {
    PRFL_UNROLL
    for (int i = 0; i < kWeights; ++i) p[i] = bf16_pair(weights[2 * i], weights[2 * i + 1]);
  }
};

struct E4m3 {
  static constexpr CUtensorMapDataType kType = CU_TENSOR_MAP_DATA_TYPE_UINT8;
  static constexpr int kBytes = 1, kKeys = 128, kSlots = 8, kQuerySlots = 1, kBits = 8, kHalfRows = 64,
                       kScaleBytes = 4 * kKeys;
  static constexpr int kWeights = kKeys / 8, kTile = kKeys * kDim;
  struct Scales {
    float of[kSlots][kKeys];  // of the keys of a tile
  };
  float factor[2];

  static __device__ __forceinline__ uint64_t values(const void* tile) { return mma_operand(tile); }
  __device__ __forceinline__ E4m3(const Arguments<E4m3>& a, const Place& at, int group) {
    const int row = at.row(group) + threadIdx.x % kWarpGroup / 32 * 16 + lane_id() / 4;
    PRFL_UNROLL
    for (int h = 0; h < 2; ++h) {
      const int64_t query = int64_t(at.batch) * a.queries + row + 8 * h;
      factor[h] = row + 8 * h < a.queries ? get(a.q_scale + query * a.heads + at.head) * a.factor : 1.f;
    }
  }

  static __device__ __forceinline__ Corner key_half(int block, int half) {
    return {block * kKeys + half * kHalfRows, 0};
  }
  static __device__ __forceinline__ Corner value_half(int block, int half) {
    return {half * kHalfRows, block};
  }
  static __device__ __forceinline__ void load_scales(Shared<E4m3>& s, int slot, const Arguments<E4m3>& a,
                                                     int block, const Place& at) {
    const int padded = (a.keys + kKeys - 1) / kKeys * kKeys;
    const float* scales = a.k_scale + (int64_t(at.batch) * a.heads + at.head) * padded + block * kKeys;
    bulk_load(s.scales.of[slot], scales, kScaleBytes, &s.full[slot]);
  }
  static __device__ __forceinline__ void issue_scores(float (&scores)[kKeys / 2], uint64_t q, uint64_t k) {
    PRFL_UNROLL
    for (int d = 0; d < kDim; d += 32) mma_e4m3(scores, q + d / 16, k + d / 16, d > 0);
  }
  __device__ __forceinline__ void issue_values(float (&)[kDim / 2], const uint32_t (&p)[kWeights],
                                               uint64_t v) {
    PRFL_UNROLL
    for (int j = 0; j < kKeys; j += 32) mma_e4m3(made_, p + j / 8, v + j / 16, j > 0);
  }
  __device__ __forceinline__ void scale(float (&scores)[kKeys / 2], const Shared<E4m3>& s, int slot) const {
    PRFL_UNROLL
    for (int j = 0; j < kKeys / 8; ++j) {
      const float2 pair = get(reinterpret_cast<const float2*>(s.scales.of[slot]) + 4 * j + lane_id() % 4);
      PRFL_UNROLL
      for (int h = 0; h < 2; ++h) scores[4 * j + 2 * h] *= pair.x, scores[4 * j + 2 * h + 1] *= pair.y;
    }
    __syncwarp();  // one lane gives the tile back for all
  }
  // Adds p v of a block, which is worth what its own maximum made it; sums before that count alpha of it.
  __device__ __forceinline__ void fold(float (&acc)[kDim / 2], const float (&alpha)[2], bool first) {
    if (!first) finish_block(acc);
    PRFL_UNROLL
    for (int h = 0; h < 2; ++h) before_[h] = alpha[h];
  }
  __device__ __forceinline__ void finish(float (&acc)[kDim / 2], const Arguments<E4m3>& a, const Place& at) {
    finish_block(acc);
    const float* v_scale = a.v_scale + (int64_t(at.batch) * a.heads + at.head) * kDim;
    PRFL_UNROLL
    for (int j = 0; j < kDim / 8; ++j) {
      const float2 pair = get(reinterpret_cast<const float2*>(v_scale) + 4 * j + lane_id() % 4);
      PRFL_UNROLL
      for (int h = 0; h < 2; ++h) acc[4 * j + 2 * h] *= pair.x, acc[4 * j + 2 * h + 1] *= pair.y;
    }
  }
  static __device__ __forceinline__ void round(uint32_t (&p)[kWeights], const float (&weights)[kKeys / 2]) {
    PRFL_UNROLL
    for (int i = 0; i < kWeights; ++i) {
      const float* w = weights + i / 2 * 8 + i % 2 * 2;  // keys 0 1 8 9 of a group of 16, of row i % 2
      p[i] = e4m3_quad(w[0], w[1], w[4], w[5]);
    }
  }

 private:
  __device__ __forceinline__ void finish_block(float (&acc)[kDim / 2]) {
    PRFL_UNROLL
    for (int i = 0; i < kDim / 2; ++i) acc[i] = fmaf(acc[i], before_[i / 2 % 2], made_[i]);
  }
  float made_[kDim / 2], before_[2];  // p v of the block, and what sums before it count
};

}  // namespace prfl::cuda
