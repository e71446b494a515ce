// Softmax attention forward for sm_90a, head dim 128, in bfloat16 and in e4m3.
//
// A block computes 128 queries of one head. One thread of its first warp group keeps a ring of tiles of keys
// and values full, in the order in which they are used. The other two warp groups compute, 64 queries each: a
// group issues the scores of the next block of keys and p v of the current one, and turns the scores into
// weights while p v runs. The two take turns at issuing, so that the softmax of one also runs under the
// products of the other. Weights stay in registers: what a thread holds of a result is what it has to hold of
// the left operand.
//
// Blocks of keys go from last to first: the last one alone may be partly filled, and is masked before the
// loop. Queries past the end are zeros and are never written. Every sum has one order: no atomics.
// Source: FlashAttention-3 (Shah et al. 2024), algorithms 1 and 2.
#include "attention_formats.h"
#include "attention_hopper.h"
#include "launch.h"

namespace prfl::cuda {
namespace {

constexpr int kThreads = (1 + kConsumers) * kWarpGroup;
constexpr int kProducerRegisters = 24, kConsumerRegisters = 240;
// Together no more than a launch gives, in units of 8 a thread.
static_assert(kProducerRegisters + kConsumers * kConsumerRegisters <=
              65536 / kThreads / 8 * 8 * (1 + kConsumers));

// The barriers of a consumer: one lets it issue products, the other is among its own threads.
__device__ constexpr NamedBarrier turn(int group) { return NamedBarrier(1 + group); }
__device__ constexpr NamedBarrier own(int group) { return NamedBarrier(1 + kConsumers + group); }

template <class Format>
struct Ring {
  int slot = 0, phase = 0;
  __device__ void next() {
    if (++slot == Format::kSlots) slot = 0, phase ^= 1;
  }
};

template <class Format>
__device__ __forceinline__ void produce(Shared<Format>& s, const Arguments<Format>& a, int blocks) {
  const Place at{int(blockIdx.x), int(blockIdx.y), int(blockIdx.z), cluster_rank(), cluster_size()};
  mbarrier_expect(&s.loaded, kConsumers * kQueries * kDim * Format::kBytes);
  for (int g = 0; g < kConsumers; ++g)
    tma_load(s.queries[g], &a.q, (at.tile * kConsumers + g) * kQueries, 0, at.head, at.batch, &s.loaded);
  Ring<Format> ring;
  const auto load = [&](bool keys, int block) {
    uint64_t* full = &s.full[ring.slot];
    mbarrier_wait(&s.empty[ring.slot], ring.phase ^ 1);
    mbarrier_expect(full, Format::kTile + (keys ? Format::kScaleBytes : 0));
    if (keys) Format::load_scales(s, ring.slot, a, block, at);
    for (unsigned half = at.rank; half < 2; half += at.ranks) {
      const Corner c = keys ? Format::key_half(block, half) : Format::value_half(block, half);
      unsigned char* to = s.tiles[ring.slot] + half * (Format::kTile / 2);
      tma_load_all(to, keys ? &a.k : &a.v, c.row, c.panel, at.head, at.batch, full, at.ranks);
    }
    ring.next();
  };
  for (int j = blocks; j >= 0; --j) {
    if (j > 0) load(true, j - 1);
    if (j < blocks) load(false, j);
  }
}

// Normalised rows go out through this group's queries, which all of its products have read by now.
template <class Format>
__device__ __forceinline__ void write(Shared<Format>& s, const Arguments<Format>& a, int group,
                                      const float (&acc)[kDim / 2],
                                      const RowSoftmax<Format::kBits>& softmax) {
  const int thread = threadIdx.x % kWarpGroup, lane = thread % 32, row = thread / 32 * 16 + lane / 4;
  const int first = (blockIdx.x * kConsumers + group) * kQueries;
  float* lse = a.lse + (int64_t(blockIdx.z) * gridDim.y + blockIdx.y) * a.queries + first;
  float inverse[2];
  PRFL_UNROLL
  for (int h = 0; h < 2; ++h) {
    float value;
    softmax.finish(h, inverse[h], value);
    if (lane % 4 == 0 && first + row + 8 * h < a.queries) put(lse + row + 8 * h, value);
  }
  named_barrier_wait(own(group), kWarpGroup);
  PRFL_UNROLL
  for (int i = 0; i < kDim / 2; i += 2) {
    const int h = i / 2 % 2, byte = 16 * (i / 4) + 4 * (lane % 4);
    unsigned char* panel = s.queries[group] + byte / kPanel * kQueries * kPanel;
    *reinterpret_cast<uint32_t*>(panel + swizzled(row + 8 * h, byte % kPanel)) =
        bf16_pair(acc[i] * inverse[h], acc[i + 1] * inverse[h]);
  }
  bulk_fence();
  named_barrier_wait(own(group), kWarpGroup);
  if (thread == 0) {
    tma_store(&a.out, s.queries[group], first, 0, blockIdx.y, blockIdx.z);
    bulk_commit();
    bulk_wait_read<0>();
  }
}

template <class Format>
__device__ __forceinline__ void consume(Shared<Format>& s, const Arguments<Format>& a, int group,
                                        int blocks) {
  constexpr int kKeys = Format::kKeys;
  const int lane = lane_id();
  const bool release = lane < int(cluster_size());  // a lane for every block
  Format format(a, (blockIdx.x * kConsumers + group) * kQueries);
  RowSoftmax<Format::kBits> softmax;
  float scores[kKeys / 2], acc[kDim / 2], alpha[2];
  uint32_t p[Format::kWeights];
  PRFL_UNROLL
  for (int i = 0; i < kDim / 2; ++i) acc[i] = 0.f;
  if (group == 0 && blocks > 1) named_barrier_arrive(turn(0), kConsumers * kWarpGroup);

  Ring<Format> ring;
  const uint64_t q = mma_operand(s.queries[group]), k = mma_operand(s.tiles[0]),
                 v = Format::values(s.tiles[0]);
  constexpr int kStep = Format::kTile / 16;
  mbarrier_wait(&s.loaded, 0);
  mbarrier_wait(&s.full[0], 0);
  mma_fence();
  Format::issue_scores(scores, q, k);
  mma_commit();
  mma_wait<0>();
  format.scale(scores, s, 0);
  if (release) mbarrier_arrive_at(&s.empty[0], lane);
  ring.next();
  const int valid = a.keys - (blocks - 1) * kKeys;
  PRFL_UNROLL
  for (int i = 0; i < kKeys / 2; ++i)
    if (8 * (i / 4) + 2 * (lane % 4) + i % 2 >= valid) scores[i] = -INFINITY;
  softmax.step(scores, format.factor, alpha);
  format.fold(acc, alpha, true);
  Format::round(p, scores);

  for (int j = blocks - 1; j > 0; --j) {
    const int k_slot = ring.slot;
    mbarrier_wait(&s.full[k_slot], ring.phase);
    ring.next();
    named_barrier_wait(turn(group), kConsumers * kWarpGroup);
    mma_fence();
    Format::issue_scores(scores, q, k + k_slot * kStep);
    mma_commit();
    const int v_slot = ring.slot;
    mbarrier_wait(&s.full[v_slot], ring.phase);
    ring.next();
    mma_fence();
    format.issue_values(acc, p, v + v_slot * kStep);
    mma_commit();
    // Nobody waits for the very last turn.
    if (group == 0 || j > 1) named_barrier_arrive(turn(group ^ 1), kConsumers * kWarpGroup);
    mma_wait<1>();
    format.scale(scores, s, k_slot);
    softmax.step(scores, format.factor, alpha);
    // Tied to the weights, or the compiler moves the exponentials behind the next wait.
    if (release && softmax.done()) mbarrier_arrive_at(&s.empty[k_slot], lane);
    mma_wait<0>();
    if (release) mbarrier_arrive_at(&s.empty[v_slot], lane);
    Format::round(p, scores);
    format.fold(acc, alpha, false);
  }
  mbarrier_wait(&s.full[ring.slot], ring.phase);
  mma_fence();
  format.issue_values(acc, p, v + ring.slot * kStep);
  mma_commit();
  mma_wait<0>();
  format.finish(acc, a);
  write<Format>(s, a, group, acc, softmax);
}

template <class Format>
__global__ void __launch_bounds__(kThreads, 1)
    attention_hopper_kernel(const __grid_constant__ Arguments<Format> a) {
#if defined(CUSIM) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
  PRFL_SHARED(base);
  Shared<Format>& s = *reinterpret_cast<Shared<Format>*>(base);
  if (threadIdx.x == 0) {
    mbarrier_init(&s.loaded, 1);
    for (int i = 0; i < Format::kSlots; ++i) {
      mbarrier_init(&s.full[i], 1);
      mbarrier_init(&s.empty[i], kConsumers * kWarpGroup / kWarp * cluster_size());  // every consuming warp
    }
    mbarrier_init_fence();
  }
  cluster_arrive();
  cluster_wait();
  const int blocks = (a.keys + Format::kKeys - 1) / Format::kKeys, group = warpgroup_id() - 1;
  if (group < 0) {
    shrink_registers<kProducerRegisters>();
    if (threadIdx.x == 0) produce<Format>(s, a, blocks);
  } else {
    grow_registers<kConsumerRegisters>();
    consume<Format>(s, a, group, blocks);
  }
  // The other block may still report to this one's barriers.
  __syncwarp();
  cluster_arrive();
  cluster_wait();
#else
  __trap();  // other targets have no such instructions; the dispatcher asks for capability 9.0
#endif
}

Rows rows(const Sequence& a, int64_t batch, int64_t heads, CUtensorMapDataType type, int bytes) {
  return {a.data, batch, a.length, heads, kDim, a.strides[0], a.strides[1], a.strides[2], type, bytes};
}

// What both formats have in common: all but v and scales.
template <class Format>
Arguments<Format> arguments(const char* name, const Sequence& q, const Sequence& k, void* out, float* lse,
                            int64_t batch, int64_t heads, float scale) {
  const int64_t dense[3] = {q.length * heads * kDim, heads * kDim, kDim};
  const Sequence o{out, q.length, {dense[0], dense[1], dense[2]}};
  Arguments<Format> a{};
  a.q = tensor_map(name, "q", rows(q, batch, heads, Format::kType, Format::kBytes), kQueries);
  a.k = tensor_map(name, "k", rows(k, batch, heads, Format::kType, Format::kBytes), Format::kHalfRows, 1);
  a.out = tensor_map(name, "out", rows(o, batch, heads, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 2), kQueries);
  a.lse = lse, a.queries = int(q.length), a.keys = int(k.length);
  a.factor = scale * 1.44269504088896341f;  // log2 e
  return a;
}

template <class Format>
void run(const char* name, const Arguments<Format>& a, int64_t batch, int64_t heads, CUstream_st* stream) {
  // Two blocks of a head read keys and values together, half of each tile from memory: half the traffic of
  // the L2. An odd number of tiles gets one that computes nothing, where that is less than 3 % of the work.
  const unsigned tile = kConsumers * kQueries, tiles = (a.queries + tile - 1) / tile;
  const unsigned ranks = tiles % 2 == 0 || tiles > 32 ? 2 : 1;
  const dim3 grid((tiles + ranks - 1) / ranks * ranks, heads, batch);
  launch(name, attention_hopper_kernel<Format>, {grid, dim3(kThreads), sizeof(Shared<Format>), ranks}, stream,
         a);
}

}  // namespace

void attention_hopper_forward(const Sequence& q, const Sequence& k, const Sequence& v, void* out, float* lse,
                              int64_t batch, int64_t heads, float scale, CUstream_st* stream) {
  const char* name = "attention_hopper";
  Arguments<Bf16> a = arguments<Bf16>(name, q, k, out, lse, batch, heads, scale);
  a.v = tensor_map(name, "v", rows(v, batch, heads, Bf16::kType, Bf16::kBytes), Bf16::kHalfRows, 1);
  run(name, a, batch, heads, stream);
}

void attention_hopper_fp8_forward(const Sequence& q, const float* q_scale, const Sequence& k,
                                  const float* k_scale, const void* v, const float* v_scale, void* out,
                                  float* lse, int64_t batch, int64_t heads, float scale,
                                  CUstream_st* stream) {
  const char* name = "attention_hopper_fp8";
  Arguments<E4m3> a = arguments<E4m3>(name, q, k, out, lse, batch, heads, scale);
  const int64_t padded = (k.length + E4m3::kKeys - 1) / E4m3::kKeys * E4m3::kKeys;
  // Values lie by channel: rows of keys, of which a tile has one panel.
  const Rows by_channel{v,      batch,         kDim,        heads,       padded, heads * kDim * padded,
                        padded, kDim * padded, E4m3::kType, E4m3::kBytes};
  a.v = tensor_map(name, "v", by_channel, E4m3::kHalfRows, 1);
  a.q_scale = q_scale, a.k_scale = k_scale, a.v_scale = v_scale;
  run(name, a, batch, heads, stream);
}

}  // namespace prfl::cuda
