// RMSNorm over the whole width and rotation of every head's pairs, of q and k at once:
//
//   n = x / sqrt(mean(x^2) + eps) weight,   out = n turned by the angles of the token
//
// A thread holds eight columns of q and of k: four pairs of one head. Forward, a block makes one token;
// backward it walks over a run of tokens with the sums for the weights in registers.
#include "ptx/vector.h"
#include "qk_norm_rope.h"
#include "reduce.h"
#include "rows.h"

namespace prfl::cuda {
namespace {

// Cosines and sines of the thread's pairs at token l.
struct Angles {
  float cos[4], sin[4];
};

template <int kWidth>
__device__ __forceinline__ void load_angles(const Rotation& r, const Columns<kWidth>& columns, int64_t l,
                                            Angles& angles) {
  const unsigned pairs = (kWidth ? 128 : r.head_dim) / 2, token = unsigned(r.offset + l);
  const unsigned line = token / unsigned(r.columns), column = token - line * unsigned(r.columns);
  const unsigned frame = line / unsigned(r.rows), row = line - frame * unsigned(r.rows);
  PRFL_UNROLL
  for (int i = 0; i < 4; ++i) {
    const unsigned pair = unsigned(columns.first / 2 + i) % pairs;
    const unsigned place = pair < unsigned(r.frame_pairs)                 ? frame
                           : pair < unsigned(r.frame_pairs + r.row_pairs) ? row
                                                                          : column;
    angles.cos[i] = get(r.cos + place * pairs + pair), angles.sin[i] = get(r.sin + place * pairs + pair);
  }
}

// By the angles, or back for sign -1.
__device__ __forceinline__ void turn(const Angles& angles, float sign, float (&x)[8]) {
  PRFL_UNROLL
  for (int i = 0; i < 4; ++i) {
    const float even = x[2 * i], odd = x[2 * i + 1], sin = sign * angles.sin[i];
    x[2 * i] = even * angles.cos[i] - odd * sin;
    x[2 * i + 1] = even * sin + odd * angles.cos[i];
  }
}

// As e4m3 with one scale for each head, whose columns neighbouring lanes hold.
template <int kWidth>
__device__ __forceinline__ void store_heads(const Columns<kWidth>& columns, int head_dim, int64_t token,
                                            int64_t width, float (&x)[8], void* out, float* quant) {
  float most = largest8(x);
  for (int step = (kWidth ? 128 : head_dim) / 16; step > 0; step /= 2)
    most = fmaxf(most, __shfl_xor_sync(~0u, most, step));
  const float scale = scale_to_e4m3(x, most);
  columns.store_e4m3(static_cast<uint8_t*>(out) + token * width, x);
  if (columns.count && columns.first % head_dim == 0)
    put(quant + (token * width + columns.first) / head_dim, scale);
}

template <class T, int kWidth>
__device__ __forceinline__ void store_row(const QkNormRopeForward& a, const Columns<kWidth>& columns,
                                          int64_t token, int64_t width, float rstd, const float* weight,
                                          const Angles& angles, float (&x)[8], void* out, float* quant) {
  float w[8];
  columns.load(weight, w);
  PRFL_UNROLL
  for (int i = 0; i < 8; ++i) x[i] *= rstd * w[i];
  if (a.rotation.cos != nullptr) turn(angles, 1.0f, x);
  if (a.out_kind == kE4m3)
    store_heads(columns, a.rotation.head_dim, token, width, x, out, quant);
  else
    columns.store(static_cast<T*>(out) + token * width, x);
}

template <class T, int kWidth>
__global__ void __launch_bounds__(kBlock<kWidth>, kResident<kWidth>)
    qk_forward_kernel(const QkNormRopeForward a) {
  PRFL_SHARED(memory);
  const int64_t b = blockIdx.y, l = blockIdx.x, width = kWidth ? kWidth : a.width;
  const int64_t token = b * a.length + l;
  const Columns<kWidth> columns(width, a.aligned);
  float q[8], k[8] = {}, squares[2] = {};
  columns.load(static_cast<const T*>(a.q) + b * a.q_b + l * a.q_l, q);
  if (a.k != nullptr) columns.load(static_cast<const T*>(a.k) + b * a.k_b + l * a.k_l, k);
  Angles angles = {};
  if (a.rotation.cos != nullptr) load_angles(a.rotation, columns, l, angles);
  PRFL_UNROLL
  for (int i = 0; i < 8; ++i) squares[0] += q[i] * q[i], squares[1] += k[i] * k[i];
  block_sum(squares, reinterpret_cast<float*>(memory));
  const float rstd_q = rsqrtf(squares[0] / width + a.eps), rstd_k = rsqrtf(squares[1] / width + a.eps);
  store_row<T>(a, columns, token, width, rstd_q, a.weight_q, angles, q, a.out_q, a.quant_q);
  if (a.k != nullptr)
    store_row<T>(a, columns, token, width, rstd_k, a.weight_k, angles, k, a.out_k, a.quant_k);
  if (a.rstd_q == nullptr || threadIdx.x != 0) return;
  put(a.rstd_q + token, rstd_q);
  if (a.k != nullptr) put(a.rstd_k + token, rstd_k);
}

template <class T>
struct Pair {
  Raw8<T> d, x;
  float rstd;
};

// x_hat and g = dn weight of one token; d weight = sum dn x_hat.
template <class T, int kWidth>
__device__ __forceinline__ void through_weight(const Columns<kWidth>& columns, const Pair<T>& row,
                                               bool turned, const Angles& angles, const float* weight,
                                               float (&x_hat)[8], float (&g)[8], float (&dweight)[8]) {
  float w[8];
  columns.load(weight, w);
  unpack8(row.x, x_hat), unpack8(row.d, g);
  if (turned) turn(angles, -1.0f, g);
  PRFL_UNROLL
  for (int i = 0; i < 8; ++i) {
    x_hat[i] *= row.rstd;
    dweight[i] += g[i] * x_hat[i];
    g[i] *= w[i];
  }
}

__device__ __forceinline__ float dot8(const float (&a)[8], const float (&b)[8]) {
  float sum = 0.0f;
  PRFL_UNROLL
  for (int i = 0; i < 8; ++i) sum += a[i] * b[i];
  return sum;
}

// dx = rstd (g - x_hat mean(g x_hat))
template <class T, int kWidth>
__device__ __forceinline__ void store_dx(const Columns<kWidth>& columns, void* out, float rstd, float mean,
                                         const float (&x_hat)[8], float (&g)[8]) {
  PRFL_UNROLL
  for (int i = 0; i < 8; ++i) g[i] = (g[i] - x_hat[i] * mean) * rstd;
  columns.store(static_cast<T*>(out), g);
}

template <class T, int kWidth>
__device__ __forceinline__ void fetch(const QkNormRopeBackward& a, const Columns<kWidth>& columns, int64_t b,
                                      int64_t l, Pair<T>& q, Pair<T>& k) {
  q.x = columns.load(static_cast<const T*>(a.q) + b * a.q_b + l * a.q_l);
  q.rstd = get(a.rstd_q + b * a.length + l);
  if (a.k == nullptr) return;
  k.x = columns.load(static_cast<const T*>(a.k) + b * a.k_b + l * a.k_l);
  k.rstd = get(a.rstd_k + b * a.length + l);
}

template <class T, int kWidth>
__device__ __forceinline__ void fetch_gradients(const QkNormRopeBackward& a, const Columns<kWidth>& columns,
                                                int64_t b, int64_t l, Pair<T>& q, Pair<T>& k) {
  q.d = columns.load(static_cast<const T*>(a.dout_q) + b * a.dout_q_b + l * a.dout_q_l);
  if (a.k != nullptr) k.d = columns.load(static_cast<const T*>(a.dout_k) + b * a.dout_k_b + l * a.dout_k_l);
}

template <class T, int kWidth>
__global__ void __launch_bounds__(kBlock<kWidth>, kResidentBackward<kWidth, T>)
    qk_backward_kernel(const QkNormRopeBackward a, int64_t run) {
  PRFL_SHARED(memory);
  // Four prefetched rows of float32, in addition to those in use, would not fit the registers; where two blocks
  // do, two rows of 16 bits fit.
  constexpr bool kAhead = sizeof(T) == 2, kAllAhead = kAhead && !kTwoBackward<kWidth, T>;
  const int64_t b = blockIdx.y, first = blockIdx.x * run, last = min(first + run, a.length);
  const int64_t width = kWidth ? kWidth : a.width;
  const Columns<kWidth> columns(width, a.aligned);
  float dweight_q[8] = {}, dweight_k[8] = {};
  Pair<T> next_q, next_k;
  if (kAhead) fetch(a, columns, b, first, next_q, next_k);
  if (kAllAhead) fetch_gradients(a, columns, b, first, next_q, next_k);
  for (int64_t l = first; l < last; ++l) {
    Pair<T> q = next_q, k = next_k;
    if (!kAhead) fetch(a, columns, b, l, q, k);
    if (!kAllAhead) fetch_gradients(a, columns, b, l, q, k);
    if (kAhead && l + 1 < last) {
      fetch(a, columns, b, l + 1, next_q, next_k);
      if (kAllAhead) fetch_gradients(a, columns, b, l + 1, next_q, next_k);
    }
    Angles angles = {};
    const bool turned = a.rotation.cos != nullptr;
    if (turned) load_angles(a.rotation, columns, l, angles);
    float x_q[8], g_q[8], x_k[8] = {}, g_k[8] = {};
    through_weight(columns, q, turned, angles, a.weight_q, x_q, g_q, dweight_q);
    if (a.k != nullptr) through_weight(columns, k, turned, angles, a.weight_k, x_k, g_k, dweight_k);
    float means[2] = {dot8(g_q, x_q), dot8(g_k, x_k)};
    block_sum(means, reinterpret_cast<float*>(memory) + 2 * kSlots * ((l - first) % 2));
    const int64_t out = (b * a.length + l) * width;
    store_dx<T>(columns, static_cast<T*>(a.dq) + out, q.rstd, means[0] / width, x_q, g_q);
    if (a.k != nullptr) store_dx<T>(columns, static_cast<T*>(a.dk) + out, k.rstd, means[1] / width, x_k, g_k);
  }
  if (a.part == nullptr) return;
  float* part = a.part + (b * gridDim.x + blockIdx.x) * 2 * width;
  columns.store(part, dweight_q), columns.store(part + width, dweight_k);
}

// The width to specialise for: heads of 128 where there is a rotation or a scale a head.
template <class Arguments>
int64_t checked(const Arguments& a) {
  if (a.width < 1 || a.width > kRowWidth)
    throw std::runtime_error("qk_norm_rope: got width " + std::to_string(a.width) + ", want 1 to 5120");
  return a.aligned && (a.rotation.cos == nullptr || a.rotation.head_dim == 128) ? a.width : 0;
}

template <class T>
void forward(const QkNormRopeForward& a, cudaStream_t stream) {
  with_width(checked(a), [&](auto width) {
    launch_tokens("qk_norm_rope forward", qk_forward_kernel<T, width()>, a, stream);
  });
}

template <class T>
void backward(const QkNormRopeBackward& a, cudaStream_t stream) {
  with_width(checked(a), [&](auto width) {
    launch_runs("qk_norm_rope backward", qk_backward_kernel<T, width()>, a, stream);
  });
}

}  // namespace

void qk_norm_rope_forward(const QkNormRopeForward& a, cudaStream_t stream) {
  const int d = a.rotation.head_dim;
  if (a.out_kind == kE4m3 && (d < 8 || d > 256 || d & (d - 1)))
    throw std::runtime_error("qk_norm_rope: got heads of " + std::to_string(d) +
                             " for e4m3, want a power of two from 8 to 256");
  (a.q_kind == kBfloat16 ? forward<bf16> : forward<float>)(a, stream);
}

void qk_norm_rope_backward(const QkNormRopeBackward& a, cudaStream_t stream) {
  (a.q_kind == kBfloat16 ? backward<bf16> : backward<float>)(a, stream);
}

}  // namespace prfl::cuda
