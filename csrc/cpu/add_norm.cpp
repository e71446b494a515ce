// x' = x + gate y, then n = LN(x') (scale + base) + shift; both optional. One visit to memory a token:
// the later steps find its row in the first-level cache.
#include <math.h>

#include "rows.h"

namespace prfl::PRFL_ISA {
namespace {

// Stores x + gate y and returns its sum over the row. The norm sees it as it is stored.
template <class X, class Y>
float add_row(const X* x, const Y* y, const float* gate, X* out, int64_t n) {
  vf total[4] = {};
  each<4>(n, [&](int64_t i, auto m, int k) {
    vf branch = load(y + i, m);
    if (gate != nullptr) branch *= load(gate + i, m);
    vf a = rounded(load(x + i, m) + branch, X{});
    store(out + i, a, m);
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
void forward(const AddNormForward& a) {
  const int64_t width = a.shape.width;
  over_tokens(a.shape, a.threads, [&](int64_t b, int64_t l0, int64_t l1) {
    Scratch room(3 * width);
    const float* gate = float_row(a.gate, b, width, room);
    const float* scale = float_row(a.scale, b, width, room + width);
    const float* shift = float_row(a.shift, b, width, room + 2 * width);
    for (int64_t l = l0; l < l1; l++) {
      const X* x = a.x.at<X>(b, l);
      X* out = a.y ? a.sum.at<X>(b, l) : nullptr;
      const float total = a.y ? add_row(x, a.y.at<Y>(b, l), gate, out, width) : row_sum(x, width);
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
        store(n + i, x_hat * (load(scale + i, m) + a.base) + load(shift + i, m), m);
      });
      if (a.mean) {
        a.mean.at<float>(b)[l] = mean;
        a.rstd.at<float>(b)[l] = rstd;
      }
    }
  });
}

// What a run of tokens adds to: rows of `part`, null where not wanted.
struct Sums {
  float *scale = nullptr, *shift = nullptr, *gate = nullptr;
};

// g = dn (scale + base) and x_hat; returns their means over the row.
template <class X, class N>
void norm_row(const N* dn, const X* x, const float* scale, float base, float mean, float rstd,
              const Sums& sums, float* g, float* x_hat, float* mean_g, float* mean_gx, int64_t n) {
  vf total[2] = {}, total_x[2] = {};
  each<2>(n, [&](int64_t i, auto m, int k) {
    vf d = load(dn + i, m);
    vf h = first_lanes((load(x + i, m) - mean) * rstd, m);
    vf a = d * (load(scale + i, m) + base);
    if (sums.scale != nullptr) {
      store(sums.scale + i, load(sums.scale + i, m) + d * h, m);
      store(sums.shift + i, load(sums.shift + i, m) + d, m);
    }
    store(g + i, a, m);
    store(x_hat + i, h, m);
    total[k] += a;
    total_x[k] += a * h;
  });
  *mean_g = sum(total) / n;
  *mean_gx = sum(total_x) / n;
}

template <class X, class Y, class N>
void backward(const AddNormBackward& a) {
  const int64_t width = a.shape.width;
  const int64_t slots = 2 * a.parameters + (a.y && a.gate);
  over_runs(a.shape, a.runs, a.threads, [&](int64_t b, int64_t r, int64_t l0, int64_t l1) {
    Scratch room(4 * width);
    float *g = room, *x_hat = room + width;
    const float* gate = float_row(a.gate, b, width, room + 2 * width);
    const float* scale = float_row(a.scale, b, width, room + 3 * width);
    Sums sums;
    if (slots > 0) {
      float* part = a.part.at<float>() + (b * a.runs + r) * slots * width;
      memset(part, 0, slots * width * sizeof(float));
      if (a.parameters) sums.scale = part, sums.shift = part + width;
      if (a.y && a.gate) sums.gate = part + (slots - 1) * width;
    }
    for (int64_t l = l0; l < l1; l++) {
      // dx' = rstd (g - mean(g) - x_hat mean(g x_hat)) + d sum;  dy = gate dx',  d gate = sum y dx'
      float mean_g = 0, mean_gx = 0, rstd = 0;
      if (a.dn) {
        rstd = a.rstd.at<float>(b)[l];
        norm_row(a.dn.at<N>(b, l), a.x.at<X>(b, l), scale, a.base, a.mean.at<float>(b)[l], rstd, sums, g,
                 x_hat, &mean_g, &mean_gx, width);
      }
      const X* dsum = a.dsum ? a.dsum.at<X>(b, l) : nullptr;
      X* dx = a.dx ? a.dx.at<X>(b, l) : nullptr;
      const Y* y = sums.gate != nullptr ? a.y.at<Y>(b, l) : nullptr;
      Y* dy = a.dy ? a.dy.at<Y>(b, l) : nullptr;
      const X* next_x = l + 1 < l1 && a.dn ? a.x.at<X>(b, l + 1) : nullptr;
      const N* next_dn = l + 1 < l1 && a.dn ? a.dn.at<N>(b, l + 1) : nullptr;
      each(width, [&](int64_t i, auto m, int) {
        prefetch(next_x, i);
        prefetch(next_dn, i);
        vf d = {};
        if (dx != nullptr) d = (load(g + i, m) - mean_g - load(x_hat + i, m) * mean_gx) * rstd;
        if (dsum != nullptr) d += load(dsum + i, m);
        if (dx != nullptr) store(dx + i, d, m);
        if (y != nullptr) store(sums.gate + i, load(sums.gate + i, m) + d * load(y + i, m), m);
        if (dy != nullptr) store(dy + i, gate != nullptr ? d * load(gate + i, m) : d, m);
      });
    }
  });
  for (int64_t b = 0; slots > 0 && b < a.shape.batch; b++) {
    const int64_t values = slots * width;
    add_runs(a.part.at<float>() + b * a.runs * values, a.runs, values, values,
             a.sums.at<float>() + b * values, a.threads);
  }
}

}  // namespace

void add_norm_forward(const AddNormForward& a) {
  with_types(a.x.dtype, a.y.dtype, a.n.dtype,
             [&](auto x, auto y, auto n) { forward<decltype(x), decltype(y), decltype(n)>(a); });
}

void add_norm_backward(const AddNormBackward& a) {
  const DType x = a.dn ? a.x.dtype : a.dsum.dtype;
  const DType y = a.dy ? a.dy.dtype : a.y.dtype;
  with_types(x, y, a.dn.dtype,
             [&](auto x, auto y, auto n) { backward<decltype(x), decltype(y), decltype(n)>(a); });
}

}  // namespace prfl::PRFL_ISA
