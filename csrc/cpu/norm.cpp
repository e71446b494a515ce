// x' = x + gate y, then n = LN(x') (scale + base) + shift; both optional. No run of tokens crosses the boundary
// between those that take one vector and the others. A token is read from memory once:
// the later steps find its row in the first-level cache.
#include <math.h>

#include "rows.h"

namespace prfl::PRFL_ISA {
namespace {

// Writes x + gate y and returns its sum over the row. The norm sees it as it is stored.
template <class X, class Y, class Write>
float add_row(const X* x, const Y* y, const float* gate, X* out, int64_t n, Write&& write) {
  vf total[4] = {};
  each<4>(n, [&](int64_t i, auto m, int k) {
    vf added = load(y + i, m);
    if (gate != nullptr) added *= load(gate + i, m);
    vf a = rounded(load(x + i, m) + added, X{});
    write(out + i, a, m);
    total[k] += a;
  });
  return sum(total);
}

template <class X>
float row_sum(const X* x, int64_t n) {
  vf total[4] = {};
  each<4>(n, [&](int64_t i, auto m, int k) { total[k] += load(x + i, m); });
  return sum(total);
}

template <class X>
float squares(const X* x, float mean, int64_t n) {
  vf total[4] = {};
  each<4>(n, [&](int64_t i, auto m, int k) {
    vf a = first_lanes(load(x + i, m) - mean, m);
    total[k] += a * a;
  });
  return sum(total);
}

template <class X, class Y, class N>
void forward(const NormForward& a) {
  const int64_t width = a.shape.width;
  over_tokens(a.shape, a.threads, [&](int64_t b, int64_t l0, int64_t l1) {
    Scratch room(3 * width);
    const Writer<X> write_sum(a.n ? View{} : a.total, a.shape);  // the norm reads it again
    const Writer<N> write(a.n, a.shape);
    for (int side = 0; side < 2; side++) {
      const int64_t first = side && l0 < a.boundary ? a.boundary : l0, last = side ? l1 : min(l1, a.boundary);
      if (first >= last) continue;
      const float* gate = float_row(a.gate, b, width, room, side);
      const float* scale = float_row(a.scale, b, width, room + width, side);
      const float* shift = float_row(a.shift, b, width, room + 2 * width, side);
      for (int64_t l = first; l < last; l++) {
        const X* x = a.x.at<X>(b, l);
        X* out = a.y ? a.total.at<X>(b, l) : nullptr;
        const float total =
            a.y ? add_row(x, a.y.at<Y>(b, l), gate, out, width, write_sum) : row_sum(x, width);
        if (!a.n) continue;
        const X* row = a.y ? out : x;
        const float mean = total / width;
        const float rstd = 1.0f / sqrtf(squares(row, mean, width) / width + a.eps);
        N* n = a.n.at<N>(b, l);
        // The next token comes from memory while this one is finished from the cache.
        const X* next_x = l + 1 < l1 ? a.x.at<X>(b, l + 1) : nullptr;
        const Y* next_y = l + 1 < l1 && a.y ? a.y.at<Y>(b, l + 1) : nullptr;
        each(width, [&](int64_t i, auto m, int) {
          prefetch(next_x, i);
          prefetch(next_y, i);
          vf x_hat = (load(row + i, m) - mean) * rstd;
          write(n + i, x_hat * (load(scale + i, m) + a.base) + load(shift + i, m), m);
        });
        if (a.mean) {
          a.mean.at<float>(b)[l] = mean;
          a.rstd.at<float>(b)[l] = rstd;
        }
      }
    }
  });
}

// What a run of tokens adds to: rows of `part`, null where not wanted.
struct Sums {
  float *scale = nullptr, *shift = nullptr, *gate = nullptr;
};

// The rows of tokens l ... l + T - 1, null where the tensor is absent.
template <int T, class E>
struct Rows {
  E* row[T];
  Rows(const View& a, int64_t b, int64_t l, bool there = true) {
    for (int t = 0; t < T; t++) row[t] = a && there ? a.at<E>(b, l + t) : nullptr;
  }
  explicit operator bool() const { return row[0] != nullptr; }
  E* operator[](int t) const { return row[t]; }
};

// T tokens at once, so that scale, gate and sums come from the second-level cache once for all of them.
//   g = dn (scale + base);  dx' = rstd (g - mean(g) - x_hat mean(g x_hat)) + d sum
//   dy = gate dx',  d gate = sum y dx',  d scale = sum dn x_hat,  d shift = sum dn
template <int T, class X, class Y, class N>
void backward_tokens(const NormBackward& a, int64_t b, int64_t l, int64_t l1, const float* scale,
                     const float* gate, const Sums& sums) {
  const int64_t width = a.shape.width;
  const bool norm = bool(a.dn), more = l + 2 * T <= l1;
  Rows<T, X> x(a.x, b, l, norm), dsum(a.dsum, b, l), dx(a.dx, b, l), next_x(a.x, b, l + T, norm && more);
  Rows<T, N> dn(a.dn, b, l), next_dn(a.dn, b, l + T, more);
  Rows<T, Y> y(a.y, b, l, sums.gate != nullptr), dy(a.dy, b, l);
  const Writer<X> write_dx(a.dx, a.shape);
  const Writer<Y> write_dy(a.dy, a.shape);
  float mean[T] = {}, rstd[T] = {}, mean_g[T] = {}, mean_gx[T] = {};
  if (norm) {
    vf total[T] = {}, total_x[T] = {};
    for (int t = 0; t < T; t++) mean[t] = a.mean.at<float>(b)[l + t], rstd[t] = a.rstd.at<float>(b)[l + t];
    each(width, [&](int64_t i, auto m, int) {
      const vf factor = load(scale + i, m) + a.base;
      vf dscale = {}, dshift = {};
      if (sums.scale != nullptr) dscale = load(sums.scale + i, m), dshift = load(sums.shift + i, m);
#pragma GCC unroll 8
      for (int t = 0; t < T; t++) {
        vf d = load(dn[t] + i, m);
        vf x_hat = first_lanes((load(x[t] + i, m) - mean[t]) * rstd[t], m);
        vf g = d * factor;
        dscale += d * x_hat;
        dshift += d;
        total[t] += g;
        total_x[t] += g * x_hat;
      }
      if (sums.scale != nullptr) store(sums.scale + i, dscale, m), store(sums.shift + i, dshift, m);
    });
    for (int t = 0; t < T; t++) mean_g[t] = sum(total[t]) / width, mean_gx[t] = sum(total_x[t]) / width;
  }
  each(width, [&](int64_t i, auto m, int) {
    vf factor = {}, dgate = {};
    if (dx) factor = load(scale + i, m) + a.base;
    if (y) dgate = load(sums.gate + i, m);
#pragma GCC unroll 8
    for (int t = 0; t < T; t++) {
      prefetch(next_x[t], i);
      prefetch(next_dn[t], i);
      vf d = {};
      if (dx) {
        vf x_hat = (load(x[t] + i, m) - mean[t]) * rstd[t];
        d = (load(dn[t] + i, m) * factor - mean_g[t] - x_hat * mean_gx[t]) * rstd[t];
      }
      if (dsum) d += load(dsum[t] + i, m);
      if (dx) write_dx(dx[t] + i, d, m);
      if (y) dgate += d * load(y[t] + i, m);
      if (dy) write_dy(dy[t] + i, gate != nullptr ? d * load(gate + i, m) : d, m);
    }
    if (y) store(sums.gate + i, dgate, m);
  });
}

template <class X, class Y, class N>
void backward(const NormBackward& a) {
  const int64_t width = a.shape.width;
  const int64_t slots = 2 * a.wants_parameters + (a.y && a.gate);
  over_runs(a.shape, a.runs, a.threads, [&](int64_t b, int64_t r, int64_t l0, int64_t l1) {
    Scratch room(2 * width);
    const int64_t side = r >= a.runs.before;
    const float* gate = float_row(a.gate, b, width, room, side);
    const float* scale = float_row(a.scale, b, width, room + width, side);
    Sums sums;
    if (slots > 0) {
      float* part = a.part.at<float>() + (b * a.runs.count + r) * slots * width;
      memset(part, 0, slots * width * sizeof(float));
      if (a.wants_parameters) sums.scale = part, sums.shift = part + width;
      if (a.y && a.gate) sums.gate = part + (slots - 1) * width;
    }
    constexpr int T = 4;
    int64_t l = l0;
    for (; l + T <= l1; l += T) backward_tokens<T, X, Y, N>(a, b, l, l1, scale, gate, sums);
    for (; l < l1; l++) backward_tokens<1, X, Y, N>(a, b, l, l1, scale, gate, sums);
  });
  const int64_t values = slots * width, before = a.sides > 1 ? a.runs.before : 0;
  for (int64_t b = 0; slots > 0 && b < a.shape.batch; b++) {
    const float* part = a.part.at<float>() + b * a.runs.count * values;
    float* sums = a.sums.at<float>() + b * a.sides * values;
    if (a.sides > 1) add_runs(part, before, values, values, sums, a.threads), sums += values;
    add_runs(part + before * values, a.runs.count - before, values, values, sums, a.threads);
  }
}

}  // namespace

void norm_forward(const NormForward& a) {
  with_types(a.x.dtype, a.y.dtype, a.n.dtype,
             [&](auto x, auto y, auto n) { forward<decltype(x), decltype(y), decltype(n)>(a); });
}

void norm_backward(const NormBackward& a) {
  const DType x = a.dn ? a.x.dtype : a.dsum.dtype;
  const DType y = a.dy ? a.dy.dtype : a.y.dtype;
  with_types(x, y, a.dn.dtype,
             [&](auto x, auto y, auto n) { backward<decltype(x), decltype(y), decltype(n)>(a); });
}

}  // namespace prfl::PRFL_ISA
