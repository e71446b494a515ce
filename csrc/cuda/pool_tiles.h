// What the kernels of reward pooling share: a cluster of blocks walks over a run of tokens, tile by
// tile, and every block holds a slice of the columns.
//
// Tiles come through a ring of stages that the bulk copy engine fills, one copy a row. Each warp owns
// every eighth group of 16 columns of the slice. A product of a tile's rows with `vectors` over all
// columns is the sum over the warps (through shared memory) and over the blocks (each writes its
// sum into all others), in a fixed order.
#pragma once
#include "ptx/bulk.h"
#include "ptx/cluster.h"
#include "ptx/mma.h"

namespace prfl::cuda {

constexpr int kWarps = 8, kThreads = kWarps * kWarp, kRanks = 8, kStages = 4, kQueries = 8, kGroup = 16;

template <class T>
constexpr int kTokens = sizeof(T) == 2 ? 32 : 16;  // of a tile: 40 KB of a slice of 640 columns

// Padding bytes after a row of a slice, so that the rows of a matrix lie in different banks.
constexpr int kPad = 16;

__host__ __device__ inline int slice_columns(int64_t width, int ranks) {
  return int((width + kGroup * ranks - 1) / (kGroup * ranks)) * kGroup;
}

template <class T>
struct PoolShared {
  float part[kWarps][kTokens<T> * kQueries];
  float exchange[2][kRanks][kTokens<T> * kQueries];
  float first[kTokens<T> * kQueries], second[kTokens<T> * kQueries];  // of a tile: [token][query]
  uint64_t full[kStages];
};

template <class T>
size_t pool_shared_bytes(int columns) {
  return kStages * kTokens<T> * (columns * sizeof(T) + kPad) + sizeof(PoolShared<T>);
}

template <class T, int kGroups>
struct PoolTiles {
  static constexpr int kPairs = kTokens<T> * kQueries;

  const T* x;  // this block's columns of the first token of the run
  int64_t x_l, first;
  int tokens, count;    // of the run: tokens and tiles
  int column, columns;  // this block's first column, and how many of the width are its own
  int stride;           // bytes of a row in shared memory
  unsigned rank, ranks;
  unsigned char* ring;
  PoolShared<T>* shared;

  __device__ __forceinline__ PoolTiles(unsigned char* memory, const T* base, int64_t x_l, int64_t length,
                                       int64_t run, int64_t width)
      : x_l(x_l), rank(cluster_rank()), ranks(cluster_size()), ring(memory) {
    first = blockIdx.x / ranks * run;
    tokens = int(min(run, length - first));
    count = (tokens + kTokens<T> - 1) / kTokens<T>;
    const int slice = slice_columns(width, ranks);
    column = rank * slice;
    columns = max(0, min(slice, int(width) - column));
    stride = slice * int(sizeof(T)) + kPad;
    shared = reinterpret_cast<PoolShared<T>*>(ring + kStages * kTokens<T> * stride);
    x = base + first * x_l + column;
    start();
  }

  __device__ __forceinline__ Tile<T> stage(int tile) const {
    return {ring + tile % kStages * kTokens<T> * stride, stride};
  }
  __device__ __forceinline__ int rows(int tile) const { return min(kTokens<T>, tokens - tile * kTokens<T>); }

  // First column in the slice of a group of this warp; groups after the slice's end do not exist.
  __device__ __forceinline__ int group(int g) const { return (g * kWarps + warp_id()) * kGroup; }
  __device__ __forceinline__ bool exists(int g) const { return group(g) < columns; }

  // The first warp asks for a tile, one lane a row.
  __device__ __forceinline__ void load(int tile) const {
    if (warp_id() != 0 || tile >= count) return;
    uint64_t* bar = &shared->full[tile % kStages];
    const int n = rows(tile), bytes = columns * int(sizeof(T)), lane = lane_id();
    if (lane == 0) mbarrier_expect(bar, n * bytes);
    __syncwarp();
    if (lane < n && bytes)
      bulk_load(stage(tile).at(lane, 0), x + (int64_t(tile) * kTokens<T> + lane) * x_l, bytes, bar);
  }

  // Rows that a last tile does not have hold zeros; each warp sees to its own columns.
  __device__ __forceinline__ void wait(int tile) const {
    mbarrier_wait(&shared->full[tile % kStages], tile / kStages % 2);
    const int n = rows(tile);
    if (n == kTokens<T>) return;
    PRFL_UNROLL
    for (int g = 0; g < kGroups; ++g)
      if (exists(g))
        for (int i = lane_id(); i < (kTokens<T> - n) * kGroup; i += kWarp)
          *stage(tile).at(n + i / kGroup, group(g) + i % kGroup) = narrow<T>(0.0f);
    __syncwarp();
  }

  // B fragments of rows [queries, width] of float32: columns are the product's inner dimension.
  __device__ __forceinline__ void vectors(const float* rows, int64_t width, int queries,
                                          FragmentB<3> (&b)[kGroups]) const {
    const int query = lane_id() / 4, t = lane_id() % 4;
    PRFL_UNROLL
    for (int g = 0; g < kGroups; ++g) {
      float2 pair[2];
      PRFL_UNROLL
      for (int i = 0; i < 2; ++i) {
        const int c = group(g) + 2 * t + 8 * i;
        pair[i] = make_float2(0.0f, 0.0f);
        if (query < queries && c < columns)
          pair[i] = get(reinterpret_cast<const float2*>(rows + query * width + column + c));
      }
      b[g].set(pair[0].x, pair[0].y, pair[1].x, pair[1].y);
    }
  }

  // This warp's share of tile . vectors.
  __device__ __forceinline__ void multiply_rows(int tile, const FragmentB<3> (&b)[kGroups]) const {
    const int g4 = lane_id() / 4, t = lane_id() % 4;
    PRFL_UNROLL
    for (int m = 0; m < kTokens<T>; m += 16) {
      float s[4] = {};
      PRFL_UNROLL
      for (int g = 0; g < kGroups; ++g)
        if (exists(g)) multiply<3>(s, stage(tile).rows(m, group(g)), b[g]);
      PRFL_UNROLL
      for (int half = 0; half < 2; ++half)
        *reinterpret_cast<float2*>(&shared->part[warp_id()][(m + g4 + 8 * half) * kQueries + 2 * t]) =
            make_float2(s[2 * half], s[2 * half + 1]);
    }
  }

  // The block's sums go to all blocks of the cluster.
  __device__ __forceinline__ void share(int tile) const {
    if (const int i = threadIdx.x; i < kPairs) {
      float sum = 0.0f;
      PRFL_UNROLL
      for (int w = 0; w < kWarps; ++w) sum += shared->part[w][i];
      for (unsigned r = 0; r < ranks; ++r) store_at_rank(&shared->exchange[tile % 2][rank][i], r, sum);
    }
    cluster_arrive();
  }

  // The products of the first tile, on their way through the cluster.
  __device__ __forceinline__ void begin(const FragmentB<3> (&b)[kGroups]) const {
    wait(0);
    multiply_rows(0, b);
    __syncthreads();
    share(0);
    __syncthreads();  // the next tile's sums take the place of these
  }

  // The product of token threadIdx.x / 8 and query threadIdx.x % 8, once the cluster has met.
  __device__ __forceinline__ float collected(int tile) const {
    float sum = 0.0f;
    for (unsigned r = 0; r < ranks; ++r) sum += shared->exchange[tile % 2][r][threadIdx.x];
    return sum;
  }

 private:
  __device__ __forceinline__ void start() {
    if (threadIdx.x == 0) {
      for (int s = 0; s < kStages; ++s) mbarrier_init(&shared->full[s], 1);
      mbarrier_init_fence();
    }
    // The copies never write the columns between the end of the width and that of its group.
    const int last = (columns + kGroup - 1) / kGroup * kGroup;
    if (columns < last)
      for (int i = threadIdx.x; i < kStages * kTokens<T>; i += kThreads)
        for (int c = columns; c < last; ++c) *Tile<T>{ring, stride}.at(i, c) = narrow<T>(0.0f);
    // No block may write into another one before that has begun.
    cluster_arrive();
    cluster_wait();
  }
};

}  // namespace prfl::cuda
