// Softmax attention forward for sm_90a, head dim 128, in bfloat16 and in e4m3.
//
// A block computes 128 queries of one head at a time. One thread of its first warp group keeps a ring of
// tiles of keys and values full, in the order in which they are used; two more load queries and store
// results. The other two warp groups compute, 64 queries each: a group issues the scores of the next block of
// keys and p v of the current one, and turns the scores into weights while p v runs. The two take turns at
// issuing, so that the softmax of one also runs under the products of the other. Weights stay in registers:
// what a thread holds of a result is what it has to hold of the left operand.
//
// Where keys are few, as in cross-attention, a block for every multiprocessor computes many tiles of queries
// without a pause: the next tile's first scores are issued before the last p v of this one, and results are
// written under the products of the other group. Keys and values that fit into the ring stay there for all
// queries of a head.
//
// Blocks of keys go from last to first: the last one alone may be partly filled, and is masked before the
// loop. Where a block computes many tiles of queries the last one is the last, since at the beginning of a
// tile results of the one before are written. Queries past the end are zeros and are never written. Every
// sum has one order: no atomics.
// Source: FlashAttention-3 (Shah et al. 2024), algorithms 1 and 2.
#include "attention_formats.h"
#include "attention_hopper.h"
#include "launch.h"

#ifdef __CUDACC__
#pragma nv_diag_suppress 177  // no target but sm_90a uses what the kernel is made of
#endif

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

struct Ring {
  int slots, slot = 0;
  unsigned phase = 0;
  // stays: what is in the ring is used once more.
  __device__ __forceinline__ void next(bool stays = false) {
    if (++slot == slots) slot = 0, phase ^= !stays;
  }
};

// The ring of keys and values: of a head that stays all of it, so that each of its tiles keeps its slot.
template <class Format>
__device__ __forceinline__ Ring tiles_ring(const Arguments<Format>& a) {
  return {Format::kQuerySlots > 1 && a.resident ? 2 * a.blocks : Format::kSlots};
}

// The block of keys of a tile's step; steps go down to 0.
template <class Format>
__device__ __forceinline__ int block_of(const Arguments<Format>& a, int step) {
  return Format::kQuerySlots == 1 ? step : step == 0 ? a.blocks - 1 : step - 1;
}

// Keys and values of one tile of queries after the other.
template <class Format>
__device__ __forceinline__ void produce(Shared<Format>& s, const Arguments<Format>& a) {
  Ring ring = tiles_ring(a);
  Place at(a);
  const auto load = [&](bool keys, int step) {
    const int block = block_of(a, step);
    const unsigned ranks = cluster_size();
    uint64_t* full = &s.full[ring.slot];
    mbarrier_wait(&s.empty[ring.slot], ring.phase ^ 1);
    mbarrier_expect(full, Format::kTile + (keys ? Format::kScaleBytes : 0));
    if (keys) Format::load_scales(s, ring.slot, a, block, at);
    for (unsigned half = cluster_rank(); half < 2; half += ranks) {
      const Corner c = keys ? Format::key_half(block, half) : Format::value_half(block, half);
      unsigned char* to = s.tiles[ring.slot] + half * (Format::kTile / 2);
      tma_load_all(to, keys ? &a.k : &a.v, c.row, c.panel, at.head, at.batch, full, ranks);
    }
    ring.next();
  };
  for (bool stays = false; at.left; at.next(a)) {
    for (int j = stays ? -1 : a.blocks; j >= 0; --j) {
      if (j > 0) load(true, j - 1);
      if (j < a.blocks) load(false, j);
    }
    stays = at.stays(a);
  }
}

// Queries of a group in, and its results out through the same place.
template <class Format>
__device__ __forceinline__ void carry(Shared<Format>& s, const Arguments<Format>& a, int group) {
  Ring ring{Format::kQuerySlots};
  Place in(a), out(a);
  for (int n = 0; out.left; ++n, ring.next()) {
    unsigned char* tile = s.queries[group][ring.slot];
    if (n >= Format::kQuerySlots) {
      mbarrier_wait(&s.written[group][ring.slot], ring.phase ^ 1);
      tma_store(&a.out, tile, out.row(group), 0, out.head, out.batch);
      bulk_commit();
      bulk_wait_read<0>();
      out.next(a);
    }
    if (in.left) {
      uint64_t* asked = &s.asked[group][ring.slot];
      mbarrier_expect(asked, kQueries * kDim * Format::kBytes);
      tma_load(tile, &a.q, in.row(group), 0, in.head, in.batch, asked);
      in.next(a);
    }
  }
}

// The first of the two rows of a group that a thread has.
__device__ __forceinline__ int own_row() {
  const int thread = threadIdx.x % kWarpGroup;
  return thread / kWarp * 16 + thread % kWarp / 4;
}

// log-sum-exp of a tile's rows goes out; inverse is what normalises them. All of it is known, and runs, while
// the last p v of the tile does.
template <class Format>
__device__ __forceinline__ void write_lse(const Arguments<Format>& a, const Place& at, int group,
                                          const RowSoftmax<Format::kBits>& softmax, float (&inverse)[2]) {
  const int first = at.row(group);
  float* lse = a.lse + (int64_t(at.batch) * a.heads + at.head) * a.queries + first;
  PRFL_UNROLL
  for (int h = 0; h < 2; ++h) {
    float value;
    softmax.finish(h, inverse[h], value);
    if (threadIdx.x % 4 == 0 && first + own_row() + 8 * h < a.queries) put(lse + own_row() + 8 * h, value);
  }
}

// Normalised rows go out through this group's queries, which all of its products have read by now.
template <class Format>
__device__ __forceinline__ void write(Shared<Format>& s, int group, int slot, const float (&acc)[kDim / 2],
                                      const float (&inverse)[2]) {
  const int lane = threadIdx.x % kWarp, row = own_row();
  named_barrier_wait(own(group), kWarpGroup);
  PRFL_UNROLL
  for (int i = 0; i < kDim / 2; i += 2) {
    const int h = i / 2 % 2, byte = 16 * (i / 4) + 4 * (lane % 4);
    unsigned char* panel = s.queries[group][slot] + byte / kPanel * kQueries * kPanel;
    *reinterpret_cast<uint32_t*>(panel + swizzled(row + 8 * h, byte % kPanel)) =
        bf16_pair(acc[i] * inverse[h], acc[i + 1] * inverse[h]);
  }
  bulk_fence();
  mbarrier_arrive(&s.written[group][slot]);
}

template <class Format>
__device__ __forceinline__ void consume(Shared<Format>& s, const Arguments<Format>& a, int group) {
  constexpr int kKeys = Format::kKeys, kStep = Format::kTile / 16;
  const int lane = lane_id(), valid = a.keys - (a.blocks - 1) * kKeys;  // of the last block's keys
  const bool releases = lane < int(cluster_size());  // a lane for every block
  Place at(a);
  Ring ring = tiles_ring(a), queries{Format::kQuerySlots};
  Format format(a, at, group);
  RowSoftmax<Format::kBits> softmax;
  float scores[kKeys / 2], acc[kDim / 2], alpha[2];
  uint32_t p[Format::kWeights];
  // Whether there is a tile of queries after this one.
  const auto another = [&] { return Format::kQuerySlots > 1 && at.left > 1; };
  const auto mask = [&](int step) {
    if (valid == kKeys || block_of(a, step) != a.blocks - 1) return;
    PRFL_UNROLL
    for (int first = 0; first < kKeys; first += 32) {
      if (first + 32 <= valid) continue;  // the many that need none
      PRFL_UNROLL
      for (int i = first / 2; i < min(first + 32, kKeys) / 2; ++i)
        if (8 * (i / 4) + 2 * (lane % 4) + i % 2 >= valid) scores[i] = -INFINITY;
    }
  };
  // The first step of a tile of queries: no sums before it count.
  const auto begin = [&](const float(&factor)[2]) {
    if (Format::kQuerySlots == 1 || a.blocks == 1) mask(a.blocks - 1);
    softmax = {};
    softmax.step(scores, factor, alpha);
  };
  const auto clear = [&] {
    PRFL_UNROLL
    for (int i = 0; i < kDim / 2; ++i) acc[i] = 0.f;
    format.fold(acc, alpha, true);
    Format::round(p, scores);
  };
  const auto pass_turn = [&](bool more) {  // nobody waits for the very last one
    if (more || group == 0) named_barrier_arrive(turn(group ^ 1), kConsumers * kWarpGroup);
  };
  if (group == 0 && (a.blocks > 1 || another())) named_barrier_arrive(turn(0), kConsumers * kWarpGroup);

  uint64_t q = mma_operand(s.queries[group][0]);
  const uint64_t k = mma_operand(s.tiles[0]), v = Format::values(s.tiles[0]);
  mbarrier_wait(&s.asked[group][0], 0);
  mbarrier_wait(&s.full[0], 0);
  mma_fence();
  Format::issue_scores(scores, q, k);
  mma_commit();
  mma_wait<0>();
  format.scale(scores, s, 0);
  if (releases && !at.stays(a)) mbarrier_arrive_at(&s.empty[0], lane);
  ring.next();
  begin(format.factor);
  clear();

  while (true) {
    const bool stays = at.stays(a), release = releases && !stays;
    for (int j = a.blocks - 1; j > 0; --j) {
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
      pass_turn(j > 1 || another());
      mma_wait<1>();
      format.scale(scores, s, k_slot);
      if (Format::kQuerySlots > 1 && j == 1) mask(0);
      softmax.step(scores, format.factor, alpha);
      // Tied to the weights, or the compiler moves the exponentials behind the next wait.
      if (release && softmax.done()) mbarrier_arrive_at(&s.empty[k_slot], lane);
      mma_wait<0>();
      if (release) mbarrier_arrive_at(&s.empty[v_slot], lane);
      Format::round(p, scores);
      format.fold(acc, alpha, false);
    }
    if (!another()) break;

    // The last p v of this tile of queries, under it the first softmax of the next one.
    const int v_slot = ring.slot, slot = queries.slot;
    const unsigned v_phase = ring.phase;
    ring.next(stays);
    queries.next();
    const int k_slot = ring.slot;
    q = mma_operand(s.queries[group][queries.slot]);
    mbarrier_wait(&s.asked[group][queries.slot], queries.phase);
    mbarrier_wait(&s.full[k_slot], ring.phase);
    ring.next();
    named_barrier_wait(turn(group), kConsumers * kWarpGroup);
    mma_fence();
    Format::issue_scores(scores, q, k + k_slot * kStep);
    mma_commit();
    mbarrier_wait(&s.full[v_slot], v_phase);
    mma_fence();
    format.issue_values(acc, p, v + v_slot * kStep);
    mma_commit();
    pass_turn(a.blocks > 1 || at.left > 2);
    const Place done = at;
    at.next(a);
    const Format next(a, at, group);
    float inverse[2];
    write_lse<Format>(a, done, group, softmax, inverse);
    mma_wait<1>();
    next.scale(scores, s, k_slot);
    begin(next.factor);
    if (releases && !at.stays(a) && softmax.done()) mbarrier_arrive_at(&s.empty[k_slot], lane);
    mma_wait<0>();
    if (release) mbarrier_arrive_at(&s.empty[v_slot], lane);
    format.finish(acc, a, done);
    write<Format>(s, group, slot, acc, inverse);
    format.factor[0] = next.factor[0], format.factor[1] = next.factor[1];
    clear();
  }
  mbarrier_wait(&s.full[ring.slot], ring.phase);
  mma_fence();
  format.issue_values(acc, p, v + ring.slot * kStep);
  mma_commit();
  if (Format::kQuerySlots == 1) at = Place(a, opaque(blockIdx.x));  // rather than registers through the loop
  float inverse[2];
  write_lse<Format>(a, at, group, softmax, inverse);
  mma_wait<0>();
  format.finish(acc, a, at);
  write<Format>(s, group, queries.slot, acc, inverse);
}

template <class Format>
__global__ void __launch_bounds__(kThreads, 1)
    attention_hopper_kernel(const __grid_constant__ Arguments<Format> a) {
#if defined(CUSIM) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
  PRFL_SHARED(base);
  Shared<Format>& s = *reinterpret_cast<Shared<Format>*>(base);
  if (threadIdx.x == 0) {
    for (int i = 0; i < Format::kSlots; ++i) {
      mbarrier_init(&s.full[i], 1);
      mbarrier_init(&s.empty[i], kConsumers * kWarpGroup / kWarp * cluster_size());  // every consuming warp
    }
    for (int g = 0; g < kConsumers; ++g)
      for (int i = 0; i < Format::kQuerySlots; ++i) {
        mbarrier_init(&s.asked[g][i], 1);
        mbarrier_init(&s.written[g][i], kWarpGroup);
      }
    mbarrier_init_fence();
  }
  cluster_arrive();
  cluster_wait();
  const int group = warpgroup_id() - 1;
  if (group < 0) {
    shrink_registers<kProducerRegisters>();
    if (threadIdx.x == 0) produce<Format>(s, a);
    for (int g = 0; g < kConsumers; ++g)
      if (int(threadIdx.x) == (1 + g) * kWarp) carry<Format>(s, a, g);
  } else {
    grow_registers<kConsumerRegisters>();
    consume<Format>(s, a, group);
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
  a.lse = lse, a.queries = int(q.length), a.keys = int(k.length), a.heads = int(heads);
  a.factor = scale * 1.44269504088896341f;  // log2 e
  return a;
}

template <class Format>
void run(const char* name, Arguments<Format>& a, int64_t batch, CUstream_st* stream) {
  // Two blocks of a head read keys and values together, half of each tile from memory: half the traffic of
  // the L2. An odd number of tiles gets one that computes nothing, where that is less than 3 % of the work.
  const int tile = kConsumers * kQueries, tiles = (a.queries + tile - 1) / tile;
  const int ranks = tiles % 2 == 0 || tiles > 32 ? 2 : 1;
  a.blocks = (a.keys + Format::kKeys - 1) / Format::kKeys;
  a.resident = 2 * a.blocks <= Format::kSlots;
  a.columns = (tiles + ranks - 1) / ranks, a.items = a.columns * a.heads * int(batch);
  const int most = Format::kQuerySlots == 1 ? a.items : max(1, multiprocessors() / ranks);
  const dim3 grid(min(a.items, most) * ranks);
  const Shape shape{grid, dim3(kThreads), sizeof(Shared<Format>), unsigned(ranks)};
  launch(name, attention_hopper_kernel<Format>, shape, stream, a);
}

template <int kKeys>
void run_bf16(const Sequence& q, const Sequence& k, const Sequence& v, void* out, float* lse, int64_t batch,
              int64_t heads, float scale, CUstream_st* stream) {
  using Format = Bf16<kKeys>;
  const char* name = "attention_hopper";
  Arguments<Format> a = arguments<Format>(name, q, k, out, lse, batch, heads, scale);
  a.v = tensor_map(name, "v", rows(v, batch, heads, Format::kType, Format::kBytes), Format::kHalfRows, 1);
  run(name, a, batch, stream);
}

}  // namespace

int attention_hopper_tile(int64_t keys) {
  const auto padded = [=](int64_t tile) { return (keys + tile - 1) / tile * tile; };
  return keys > 1024 ? 176 : padded(144) < padded(128) ? 144 : 128;
}

void attention_hopper_forward(const Sequence& q, const Sequence& k, const Sequence& v, void* out, float* lse,
                              int64_t batch, int64_t heads, float scale, CUstream_st* stream) {
  const int tile = attention_hopper_tile(k.length);
  const auto run = tile == 176 ? run_bf16<176> : tile == 144 ? run_bf16<144> : run_bf16<128>;
  run(q, k, v, out, lse, batch, heads, scale, stream);
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
  run(name, a, batch, stream);
}

}  // namespace prfl::cuda
