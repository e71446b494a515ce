// The kernel pair that modulate, layer_norm and the gated additions run on:
//
//   x' = x + gate y,   n = (x' - mean) rstd (scale + base) + shift
//
// A thread holds eight columns. Forward, a block makes one token; the loads of the other
// resident blocks hide its reductions. Backward, a block walks over a run of tokens with the sums for scale,
// shift and gate in registers (it does not cross the boundary between two vectors), and loads the next token's rows before it reduces over this one's.
#include "norm.h"
#include "ptx/vector.h"
#include "reduce.h"
#include "rows.h"

namespace prfl::cuda {
namespace {

template <class X, class Y, int kWidth>
__global__ void __launch_bounds__(kBlock<kWidth>, kResident<kWidth>)
    norm_forward_kernel(const NormForward a) {
  PRFL_SHARED(memory);
  float* slots = reinterpret_cast<float*>(memory);
  const int64_t b = blockIdx.y, l = blockIdx.x, width = kWidth ? kWidth : a.width;
  const int64_t token = b * a.length + l, side = l >= a.boundary;
  const Columns<kWidth> columns(width, a.aligned);
  const Raw8<X> x_raw = columns.load(static_cast<const X*>(a.x) + b * a.x_b + l * a.x_l);
  float x[8];
  if (a.y != nullptr) {
    const Raw8<Y> y_raw = columns.load(static_cast<const Y*>(a.y) + b * a.y_b + l * a.y_l);
    float y[8], gate[8];
    if (a.gate != nullptr) columns.load(a.gate + b * a.gate_b + side * a.gate_s, gate);
    unpack8(x_raw, x), unpack8(y_raw, y);
    PRFL_UNROLL
    for (int i = 0; i < 8; ++i)
      x[i] = wide(narrow<X>(a.gate != nullptr ? x[i] + y[i] * gate[i] : x[i] + y[i]));
    columns.store(static_cast<X*>(a.total) + token * width, x);
  } else {
    unpack8(x_raw, x);
  }
  if (a.n == nullptr) return;

  // The norm sees the residual stream as it is stored. Columns past the width hold zeros.
  float sum = 0.0f, squares = 0.0f;
  PRFL_UNROLL
  for (int i = 0; i < 8; ++i) sum += x[i];
  const float mean = block_sum(sum, slots) / width;
  PRFL_UNROLL
  for (int i = 0; i < 8; ++i) {
    x[i] = kWidth || i < columns.count ? x[i] - mean : 0.0f;
    squares += x[i] * x[i];
  }
  const float rstd = rsqrtf(block_sum(squares, slots + kSlots) / width + a.eps);
  float scale[8], shift[8];
  columns.load(a.scale + b * a.scale_b + side * a.scale_s, scale);
  columns.load(a.shift + b * a.shift_b + side * a.shift_s, shift);
  PRFL_UNROLL
  for (int i = 0; i < 8; ++i) x[i] = x[i] * rstd * (scale[i] + a.base) + shift[i];
  if (a.mean != nullptr && threadIdx.x == 0) put(a.mean + token, mean), put(a.rstd + token, rstd);
  if (a.n_kind == kFloat32) {
    columns.store(static_cast<float*>(a.n) + token * width, x);
  } else if (a.n_kind == kBfloat16) {
    columns.store(static_cast<bf16*>(a.n) + token * width, x);
  } else {
    const float quant = scale_to_e4m3(x, block_max(largest8(x), slots));
    columns.store_e4m3(static_cast<uint8_t*>(a.n) + token * width, x);
    if (threadIdx.x == 0) put(a.quant + token, quant);
  }
}

// Prefetched rows of a token.
template <class X, class Y, class Dn>
struct Incoming {
  Raw8<Dn> dn;
  Raw8<X> dsum, x;
  Raw8<Y> y;
  float mean, rstd;
};

template <class X, class Y, class Dn, int kWidth>
__device__ __forceinline__ void fetch(const NormBackward& a, const Columns<kWidth>& columns, int64_t b,
                                      int64_t l, Incoming<X, Y, Dn>& row) {
  if (a.dn == nullptr) return;
  row.dn = columns.load(static_cast<const Dn*>(a.dn) + b * a.dn_b + l * a.dn_l);
  row.x = columns.load(static_cast<const X*>(a.x) + b * a.x_b + l * a.x_l);
  row.mean = get(a.mean + b * a.length + l), row.rstd = get(a.rstd + b * a.length + l);
}

// What is added to dx, and what it is multiplied with for d gate.
template <class X, class Y, class Dn, int kWidth>
__device__ __forceinline__ void fetch_rest(const NormBackward& a, const Columns<kWidth>& columns, int64_t b,
                                           int64_t l, Incoming<X, Y, Dn>& row) {
  if (a.dsum != nullptr) row.dsum = columns.load(static_cast<const X*>(a.dsum) + b * a.dsum_b + l * a.dsum_l);
  if (a.wants_gate) row.y = columns.load(static_cast<const Y*>(a.y) + b * a.y_b + l * a.y_l);
}

struct ColumnSums {
  float scale[8] = {}, shift[8] = {}, gate[8] = {};
};

// dx of the norm, from x and dn of a token:  n = x_hat (base + scale) + shift,  g = dn (base + scale),
// dx = rstd (g - mean(g) - x_hat mean(g x_hat)),  d scale = sum dn x_hat,  d shift = sum dn
template <class X, class Y, class Dn, int kWidth>
__device__ __forceinline__ void through_norm(const NormBackward& a, const Columns<kWidth>& columns,
                                             const float* factors, int64_t width, const Incoming<X, Y, Dn>& row, float* slots,
                                             ColumnSums& sums, float (&dx)[8]) {
  float x[8], dn[8], scale[8], means[2] = {};
  columns.load(factors, scale);
  unpack8(row.x, x), unpack8(row.dn, dn);
  PRFL_UNROLL
  for (int i = 0; i < 8; ++i) {
    x[i] = kWidth || i < columns.count ? (x[i] - row.mean) * row.rstd : 0.0f;
    sums.scale[i] += dn[i] * x[i], sums.shift[i] += dn[i];
    dx[i] = dn[i] * (scale[i] + a.base);
    means[0] += dx[i], means[1] += dx[i] * x[i];
  }
  block_sum(means, slots);
  PRFL_UNROLL
  for (int i = 0; i < 8; ++i) dx[i] = (dx[i] - means[0] / width - x[i] * (means[1] / width)) * row.rstd;
}

template <class X, class Y, class Dn, int kWidth>
__global__ void __launch_bounds__(kBlock<kWidth>, kResidentBackward<kWidth, Dn>)
    norm_backward_kernel(const NormBackward a, int64_t run) {
  PRFL_SHARED(memory);
  float* slots = reinterpret_cast<float*>(memory);
  const int64_t b = blockIdx.y, side = blockIdx.x >= a.before;
  const int64_t first = blockIdx.x * run + side * (a.boundary - a.before * run);
  const int64_t last = min(first + run, side ? a.length : a.boundary);
  const float *scale = a.scale + b * a.scale_b + side * a.scale_s, *gate = a.gate + b * a.gate_b + side * a.gate_s;
  const int64_t width = kWidth ? kWidth : a.width;
  // Four prefetched rows of float32 would not fit the registers; nor, where two blocks do, four with one of them.
  constexpr bool kAllAhead = sizeof(X) + sizeof(Y) + sizeof(Dn) < (kTwoBackward<kWidth, Dn> ? 8 : 12);
  const Columns<kWidth> columns(width, a.aligned);
  ColumnSums sums;
  Incoming<X, Y, Dn> next;
  fetch(a, columns, b, first, next);
  if (kAllAhead) fetch_rest(a, columns, b, first, next);
  for (int64_t l = first; l < last; ++l) {
    Incoming<X, Y, Dn> row = next;
    if (!kAllAhead) fetch_rest(a, columns, b, l, row);
    if (l + 1 < last) {
      fetch(a, columns, b, l + 1, next);
      if (kAllAhead) fetch_rest(a, columns, b, l + 1, next);
    }
    const int64_t out = (b * a.length + l) * width;
    float dx[8], other[8];
    if (a.dn != nullptr) {
      through_norm(a, columns, scale, width, row, slots + 2 * kSlots * ((l - first) % 2), sums, dx);
      if (a.dsum != nullptr) {
        unpack8(row.dsum, other);
        PRFL_UNROLL
        for (int i = 0; i < 8; ++i) dx[i] += other[i];
      }
      columns.store(static_cast<X*>(a.dx) + out, dx);
    } else {
      unpack8(row.dsum, dx);
    }
    if (a.wants_gate) {
      unpack8(row.y, other);
      PRFL_UNROLL
      for (int i = 0; i < 8; ++i) sums.gate[i] += dx[i] * other[i];
    }
    if (a.dy == nullptr) continue;
    if (a.gate != nullptr) {
      columns.load(gate, other);
      PRFL_UNROLL
      for (int i = 0; i < 8; ++i) dx[i] *= other[i];
    }
    columns.store(static_cast<Y*>(a.dy) + out, dx);
  }
  float* part = a.part + (b * gridDim.x + blockIdx.x) * (2 * a.wants_parameters + a.wants_gate) * width;
  if (a.wants_parameters) columns.store(part, sums.scale), columns.store(part + width, sums.shift);
  if (a.wants_gate) columns.store(part + 2 * a.wants_parameters * width, sums.gate);
}

template <class X, class Y>
void forward(const NormForward& a, cudaStream_t stream) {
  with_width(a.aligned ? a.width : 0, [&](auto width) {
    launch_tokens("norm forward", norm_forward_kernel<X, Y, width()>, a, stream);
  });
}

template <class X, class Y, class Dn>
void backward(const NormBackward& a, cudaStream_t stream) {
  with_width(a.aligned ? a.width : 0, [&](auto width) {
    launch_runs("norm backward", norm_backward_kernel<X, Y, Dn, width()>, a, stream, a.boundary);
  });
}

template <class Arguments>
void check(const Arguments& a, bool kinds) {
  if (!kinds)
    throw std::runtime_error("norm: got kinds " + std::to_string(a.x_kind) + " of x and " +
                             std::to_string(a.y_kind) + " of y, want y no wider than x");
  if (a.width < 1 || a.width > kRowWidth)
    throw std::runtime_error("norm: got width " + std::to_string(a.width) + ", want 1 to 5120");
}

}  // namespace

void norm_forward(const NormForward& a, cudaStream_t stream) {
  check(a, a.x_kind == kFloat32 || a.y_kind == kBfloat16);
  const auto run = a.x_kind == kBfloat16   ? forward<bf16, bf16>
                   : a.y_kind == kBfloat16 ? forward<float, bf16>
                                           : forward<float, float>;
  run(a, stream);
}

void norm_backward(const NormBackward& a, cudaStream_t stream) {
  const int kinds = 4 * a.x_kind + 2 * a.y_kind + a.dn_kind;
  check(a, kinds == 0 || kinds == 2 || kinds == 3 || kinds == 7);
  const auto run = kinds == 7   ? backward<bf16, bf16, bf16>
                   : kinds == 3 ? backward<float, bf16, bf16>
                   : kinds == 2 ? backward<float, bf16, float>
                                : backward<float, float, float>;
  run(a, stream);
}

}  // namespace prfl::cuda
