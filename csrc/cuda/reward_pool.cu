// Learned-query pooling of the reward model, one pass over the features each way.
//
//   s = x u^T,   p = softmax over tokens,   pooled = p^T x
//   dp = x . dpooled,  ds = p (dp - delta),  dx = p dpooled + ds u,  du = ds^T x
//
// Clusters of blocks split the columns, so that a tile of tokens lies in their shared memory once, is
// read there twice, and the sums over tokens stay in registers for a whole run. While the cluster
// waits for the scores of a tile it computes those of the next. dx replaces the tile in its stage and
// leaves through the bulk copy engine. The runs (16 for 5,120 columns) are merged by a second kernel
// in a fixed order. Products run on the tensor cores to float32 accuracy.
#include <algorithm>

#include "launch.h"
#include "pool_tiles.h"
#include "reward_pool.h"

namespace prfl::cuda {
namespace {

struct Geometry {
  int ranks;
  int64_t runs, run;
};

// Clusters of 8 for more than 1,536 columns, of 4 for fewer; 128 of 132 SMs, since clusters of either
// size leave out the odd ones of a GPC.
Geometry geometry(int64_t batch, int64_t length, int64_t width, bool is_bf16) {
  const int64_t tokens = is_bf16 ? kTokens<bf16> : kTokens<float>, ranks = width > 1536 ? 8 : 4;
  const int64_t tiles = (length + tokens - 1) / tokens;
  const int64_t most = std::max<int64_t>(1, 128 / ranks / batch);
  const int64_t run = (tiles + most - 1) / most * tokens;
  return {int(ranks), (length + run - 1) / run, run};
}

// Writes a group of columns of sums [queries, width], as the products leave them in the lanes.
template <class T, int kGroups>
__device__ __forceinline__ void put_sums(const PoolTiles<T, kGroups>& tiles, int g, const float (&sums)[4],
                                         float* out, int64_t width, int64_t queries) {
  const int g4 = lane_id() / 4, t = lane_id() % 4;
  PRFL_UNROLL
  for (int j = 0; j < 4; ++j) {
    const int query = 2 * t + j % 2, c = tiles.group(g) + g4 + j / 2 * 8;
    if (query < queries && c < tiles.columns) put(out + query * width + tiles.column + c, sums[j]);
  }
}

template <class T, int kGroups>
__global__ void __launch_bounds__(kThreads, 1)
    pool_forward(const RewardPoolForward a, int64_t runs, int64_t run) {
  PRFL_SHARED(memory);
  const int64_t b = blockIdx.y;
  using Tiles = PoolTiles<T, kGroups>;
  const Tiles tiles(memory, static_cast<const T*>(a.x) + b * a.x_b, a.x_l, a.length, run, a.width);
  for (int i = 0; i < kStages; ++i) tiles.load(i);
  FragmentB<3> u[kGroups];
  tiles.vectors(a.u, a.width, int(a.queries), u);

  const int g4 = lane_id() / 4, t = lane_id() % 4;
  float acc[kGroups][4] = {}, top = -INFINITY, total = 0.0f;  // top, total of query g4
  tiles.begin(u);
  for (int i = 0; i < tiles.count; ++i) {
    const bool more = i + 1 < tiles.count;
    if (more) {
      tiles.wait(i + 1);
      tiles.multiply_rows(i + 1, u);
    }
    cluster_wait();
    if (const int pair = threadIdx.x; pair < Tiles::kPairs) {
      const int token = pair / kQueries, query = pair % kQueries;
      const float s = tiles.collected(i);
      const bool valid = token < tiles.rows(i);
      tiles.shared->first[pair] = valid ? s : -INFINITY;
      const int64_t row = b * a.length + tiles.first + i * kTokens<T> + token;
      if (valid && query < a.queries && tiles.rank == 0) put(a.scores + row * a.queries + query, s);
    }
    __syncthreads();
    if (more) tiles.share(i + 1);

    float p[kTokens<T> / 16][4], best = top;
    PRFL_UNROLL
    for (int m = 0; m < kTokens<T> / 16; ++m) {
      PRFL_UNROLL
      for (int j = 0; j < 4; ++j) {
        p[m][j] = tiles.shared->first[(16 * m + 2 * t + j % 2 + j / 2 * 8) * kQueries + g4];
        best = fmaxf(best, p[m][j]);
      }
    }
    best = fmaxf(best, __shfl_xor_sync(~0u, best, 1));
    best = fmaxf(best, __shfl_xor_sync(~0u, best, 2));
    const float shrink = expf(top - best);
    top = best, total *= shrink;
    const float shrinks[2] = {__shfl_sync(~0u, shrink, 8 * t), __shfl_sync(~0u, shrink, 8 * t + 4)};
    PRFL_UNROLL
    for (int g = 0; g < kGroups; ++g) {
      PRFL_UNROLL
      for (int j = 0; j < 4; ++j) acc[g][j] *= shrinks[j % 2];
    }
    PRFL_UNROLL
    for (int m = 0; m < kTokens<T> / 16; ++m) {
      PRFL_UNROLL
      for (int j = 0; j < 4; ++j) p[m][j] = expf(p[m][j] - best), total += p[m][j];
      FragmentB<3> weights;
      weights.set(p[m][0], p[m][1], p[m][2], p[m][3]);
      PRFL_UNROLL
      for (int g = 0; g < kGroups; ++g)
        if (tiles.exists(g)) multiply<3>(acc[g], tiles.stage(i).columns(16 * m, tiles.group(g)), weights);
    }
    __syncthreads();
    tiles.load(i + kStages);
  }

  const int64_t slot = (b * runs + blockIdx.x / tiles.ranks) * a.queries;
  total += __shfl_xor_sync(~0u, total, 1);
  total += __shfl_xor_sync(~0u, total, 2);
  if (tiles.rank == 0 && warp_id() == 0 && t == 0 && g4 < a.queries)
    put(a.top + slot + g4, top), put(a.total + slot + g4, total);
  PRFL_UNROLL
  for (int g = 0; g < kGroups; ++g) put_sums(tiles, g, acc[g], a.acc + slot * a.width, a.width, a.queries);
}

// Joins the runs: four columns a thread; grid (columns, queries, batch).
__global__ void __launch_bounds__(kThreads) pool_merge(const RewardPoolForward a, int64_t runs) {
  const int64_t c = (int64_t(blockIdx.x) * kThreads + threadIdx.x) * 4,
                row = blockIdx.z * a.queries + blockIdx.y;
  const int64_t first = blockIdx.z * runs * a.queries + blockIdx.y;  // of run 0
  float top = -INFINITY, total = 0.0f;
  for (int64_t r = 0; r < runs; ++r) top = fmaxf(top, get(a.top + first + r * a.queries));
  float4 acc = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
  for (int64_t r = 0; r < runs; ++r) {
    const int64_t slot = first + r * a.queries;
    const float scale = expf(get(a.top + slot) - top);
    total += scale * get(a.total + slot);
    if (c >= a.width) continue;
    const float4 part = get(reinterpret_cast<const float4*>(a.acc + slot * a.width + c));
    acc.x += scale * part.x, acc.y += scale * part.y, acc.z += scale * part.z, acc.w += scale * part.w;
  }
  if (c < a.width)
    put(reinterpret_cast<float4*>(a.pooled + row * a.width + c),
        make_float4(acc.x / total, acc.y / total, acc.z / total, acc.w / total));
  if (c == 0) put(a.lse + row, top + logf(total));
}

// dx needs the accuracy of its own type only.
template <class T>
constexpr int kKept = sizeof(T) == 2 ? 2 : 3;

template <class T, int kGroups>
struct Gradient {
  FragmentB<3> g[kGroups];             // dpooled, for dp
  FragmentB<kKept<T>> gu[kGroups][2];  // dpooled over u, 16 x 8 columns, for dx
  float du[kGroups][4];
};

template <class T, int kGroups>
__device__ __forceinline__ void load_gradient(const RewardPoolBackward& a, const PoolTiles<T, kGroups>& tiles,
                                              const float* dpooled, Gradient<T, kGroups>& state) {
  tiles.vectors(dpooled, a.width, int(a.queries), state.g);
  const int g4 = lane_id() / 4, t = lane_id() % 4;
  PRFL_UNROLL
  for (int g = 0; g < kGroups; ++g) {
    PRFL_UNROLL
    for (int half = 0; half < 2; ++half) {
      const int c = tiles.group(g) + 8 * half + g4;
      float value[4] = {};
      PRFL_UNROLL
      for (int j = 0; j < 2; ++j)
        if (2 * t + j < a.queries && c < tiles.columns) {
          const int64_t at = (2 * t + j) * a.width + tiles.column + c;
          value[j] = get(dpooled + at), value[2 + j] = get(a.u + at);
        }
      state.gu[g][half].set(value[0], value[1], value[2], value[3]);
    }
    PRFL_UNROLL
    for (int j = 0; j < 4; ++j) state.du[g][j] = 0.0f;
  }
}

// du += ds^T x, and dx = p dpooled + ds u in the place of x, for 16 tokens of a tile.
template <class T, int kGroups>
__device__ __forceinline__ void differentiate(const PoolTiles<T, kGroups>& tiles, const Tile<T>& tile, int m,
                                              bool want_x, bool want_u, Gradient<T, kGroups>& state) {
  const int g4 = lane_id() / 4, t = lane_id() % 4;
  const float *p = tiles.shared->first, *ds = tiles.shared->second;
  float column[4];
  PRFL_UNROLL
  for (int j = 0; j < 4; ++j) column[j] = ds[(m + 2 * t + j % 2 + j / 2 * 8) * kQueries + g4];
  FragmentB<3> weights;
  weights.set(column[0], column[1], column[2], column[3]);
  FragmentA<kKept<T>> both;  // p, then ds
  PRFL_UNROLL
  for (int i = 0; i < 4; ++i) {
    const float* from = i / 2 ? ds : p;
    const float2 pair = *reinterpret_cast<const float2*>(from + (m + g4 + i % 2 * 8) * kQueries + 2 * t);
    uint32_t parts[kKept<T>];
    split(pair.x, pair.y, parts);
    PRFL_UNROLL
    for (int k = 0; k < kKept<T>; ++k) both.part[k][i] = parts[k];
  }
  PRFL_UNROLL
  for (int g = 0; g < kGroups; ++g) {
    if (!tiles.exists(g)) continue;
    const int c = tiles.group(g);
    if (want_u) multiply<3>(state.du[g], tile.columns(m, c), weights);
    if (!want_x) continue;
    __syncwarp();  // all lanes have read x
    PRFL_UNROLL
    for (int half = 0; half < 2; ++half) {
      float dx[4] = {};
      multiply<kKept<T>>(dx, both, state.gu[g][half]);
      PRFL_UNROLL
      for (int i = 0; i < 2; ++i)
        tile.set_pair(m + g4 + 8 * i, c + 8 * half + 2 * t, dx[2 * i], dx[2 * i + 1]);
    }
  }
}

template <class T, int kGroups>
__global__ void __launch_bounds__(kThreads, 1)
    pool_backward(const RewardPoolBackward a, int64_t runs, int64_t run) {
  PRFL_SHARED(memory);
  const int64_t b = blockIdx.y;
  using Tiles = PoolTiles<T, kGroups>;
  const Tiles tiles(memory, static_cast<const T*>(a.x) + b * a.x_b, a.x_l, a.length, run, a.width);
  for (int i = 0; i < kStages; ++i) tiles.load(i);
  Gradient<T, kGroups> state;
  load_gradient(a, tiles, a.dpooled + b * a.queries * a.width, state);

  const int pair = threadIdx.x, token = pair / kQueries, query = pair % kQueries;
  const bool has_query = pair < Tiles::kPairs && query < a.queries;
  const float lse = has_query ? get(a.lse + b * a.queries + query) : 0.0f;
  const float delta = has_query ? get(a.delta + b * a.queries + query) : 0.0f;
  tiles.begin(state.g);
  for (int i = 0; i < tiles.count; ++i) {
    const bool more = i + 1 < tiles.count, valid = has_query && token < tiles.rows(i);
    const int64_t row = b * a.length + tiles.first + i * kTokens<T> + token;
    const float score = valid ? get(a.scores + row * a.queries + query) : -INFINITY;
    if (more) {
      tiles.wait(i + 1);
      tiles.multiply_rows(i + 1, state.g);
    }
    cluster_wait();
    if (pair < Tiles::kPairs) {
      const float p = expf(score - lse);
      tiles.shared->first[pair] = p;
      tiles.shared->second[pair] = valid ? p * (tiles.collected(i) - delta) : 0.0f;
    }
    __syncthreads();
    if (more) tiles.share(i + 1);
    const Tile<T> tile = tiles.stage(i);
    for (int m = 0; m < kTokens<T>; m += 16)
      differentiate(tiles, tile, m, a.dx != nullptr, a.part != nullptr, state);
    bulk_fence();
    __syncthreads();
    if (warp_id() == 0) {
      if (const int lane = lane_id(); a.dx != nullptr && lane < tiles.rows(i) && tiles.columns)
        bulk_store(static_cast<T*>(a.dx) + (row - token + lane) * a.width + tiles.column, tile.at(lane, 0),
                   tiles.columns * int(sizeof(T)));
      bulk_commit();
      bulk_wait_read<1>();  // the stage of the tile before is free
      if (i) tiles.load(i - 1 + kStages);
    }
  }
  bulk_wait_read<0>();
  if (a.part == nullptr) return;
  const int64_t slot = (b * runs + blockIdx.x / tiles.ranks) * a.queries;
  PRFL_UNROLL
  for (int g = 0; g < kGroups; ++g)
    put_sums(tiles, g, state.du[g], a.part + slot * a.width, a.width, a.queries);
}

template <class T>
Shape shape(const Geometry& g, int64_t batch, int64_t width) {
  return {dim3(unsigned(g.runs * g.ranks), unsigned(batch)), dim3(kThreads),
          pool_shared_bytes<T>(slice_columns(width, g.ranks)), unsigned(g.ranks)};
}

template <class T, int kGroups>
void forward(const RewardPoolForward& a, const Geometry& g, cudaStream_t stream) {
  launch("reward_pool forward", pool_forward<T, kGroups>, shape<T>(g, a.batch, a.width), stream, a, g.runs,
         g.run);
}

template <class T, int kGroups>
void backward(const RewardPoolBackward& a, const Geometry& g, cudaStream_t stream) {
  launch("reward_pool backward", pool_backward<T, kGroups>, shape<T>(g, a.batch, a.width), stream, a, g.runs,
         g.run);
}

template <class Arguments>
Geometry checked(const Arguments& a) {
  if (a.queries < 1 || a.queries > kPoolQueries || a.width < 8 || a.width > kPoolWidth || a.width % 8)
    throw std::runtime_error("reward_pool: got " + std::to_string(a.queries) + " queries of width " +
                             std::to_string(a.width) + ", want 1 to 8 of a multiple of 8 up to 5120");
  return geometry(a.batch, a.length, a.width, a.bf16);
}

}  // namespace

int64_t reward_pool_runs(int64_t batch, int64_t length, int64_t width, bool bf16) {
  return geometry(batch, length, width, bf16).runs;
}

void reward_pool_forward(const RewardPoolForward& a, cudaStream_t stream) {
  const Geometry g = checked(a);
  const auto run = a.bf16 ? (g.ranks == 8 ? forward<bf16, 5> : forward<bf16, 3>)
                          : (g.ranks == 8 ? forward<float, 5> : forward<float, 3>);
  run(a, g, stream);
  const dim3 grid(unsigned((a.width + 4 * kThreads - 1) / (4 * kThreads)), unsigned(a.queries),
                  unsigned(a.batch));
  launch("reward_pool merge", pool_merge, Shape{grid, dim3(kThreads)}, stream, a, g.runs);
}

void reward_pool_backward(const RewardPoolBackward& a, cudaStream_t stream) {
  const Geometry g = checked(a);
  const auto run = a.bf16 ? (g.ranks == 8 ? backward<bf16, 5> : backward<bf16, 3>)
                          : (g.ranks == 8 ? backward<float, 5> : backward<float, 3>);
  run(a, g, stream);
}

}  // namespace prfl::cuda
