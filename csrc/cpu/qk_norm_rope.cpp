// n = x rstd weight over a whole row, then the pairs of every head turned by the token's angles:
// out = n cos + swapped(n) sin, where swapped exchanges the two of a pair and sin is (-sine, sine).
#include <math.h>

#include "rows.h"

namespace prfl::PRFL_ISA {
namespace {

// Cosines and sines [head_dim] of a token, gathered from the rows of its frame, row and column.
struct Angles {
  const Rope& rope;
  float *cos, *sin;

  void take(int64_t l) {
    const int64_t token = rope.offset + l;
    const int64_t frame = token / (rope.rows * rope.columns);
    const int64_t frames = 2 * rope.frame_pairs, frames_rows = frames + 2 * rope.row_pairs;
    copy(frame, 0, frames);
    copy(token / rope.columns % rope.rows, frames, frames_rows);
    copy(token % rope.columns, frames_rows, rope.head_dim);
  }
  void copy(int64_t place, int64_t from, int64_t to) {
    memcpy(cos + from, rope.cos.at<float>(place) + from, (to - from) * sizeof(float));
    memcpy(sin + from, rope.sin.at<float>(place) + from, (to - from) * sizeof(float));
  }
};

template <class X>
float squares(const X* x, int64_t n) {
  vf total[4] = {};
  each<4>(n, [&](int64_t i, auto m, int k) {
    vf a = load(x + i, m);
    total[k] += a * a;
  });
  return sum(total);
}

template <class X, bool ROPE>
void forward(const QkNormRopeForward& a) {
  const int64_t width = a.shape.width, dim = a.rope.head_dim;
  Scratch weights(2 * width);
  const float* weight[2];
  for (int t = 0; t < 2; t++) weight[t] = float_row(a.weight[t], 0, width, weights + t * width);
  over_tokens(a.shape, a.threads, [&](int64_t b, int64_t l0, int64_t l1) {
    Scratch room(2 * dim);
    Angles angles{a.rope, room, room + dim};
    for (int64_t l = l0; l < l1; l++) {
      if (ROPE) angles.take(l);
      for (int t = 0; t < 2 && a.x[t]; t++) {
        const X* x = a.x[t].at<X>(b, l);
        X* out = a.out[t].at<X>(b, l);
        const Writer<X> write(a.out[t], a.shape);
        const float rstd = 1.0f / sqrtf(squares(x, width) / width + a.eps);
        a.rstd[t].at<float>(b)[l] = rstd;
        const X* next = l + 1 < l1 ? a.x[t].at<X>(b, l + 1) : nullptr;
        for (int64_t h = 0; h < width; h += dim)
          each(dim, [&](int64_t i, auto m, int) {
            prefetch(next, h + i);
            vf n = load(x + h + i, m) * rstd * load(weight[t] + h + i, m);
            if (ROPE) n = n * load(angles.cos + i, m) + swapped(n) * load(angles.sin + i, m);
            write(out + h + i, n, m);
          });
      }
    }
  });
}

// What the tokens l ... l + T - 1 give one tensor; T at once, so that weight and d weight come from the
// second-level cache once for all of them.
//   dn = d turned back;  g = dn weight;  dx = rstd (g - x_hat mean(g x_hat));  d weight = sum dn x_hat
template <int T, class X, bool ROPE>
void backward_tokens(const QkNormRopeBackward& a, int which, int64_t b, int64_t l, const float* weight,
                     const float* cos, const float* sin, float* dweight) {
  const int64_t width = a.shape.width, dim = a.rope.head_dim;
  const X *x[T], *d[T];
  float rstd[T], mean[T];
  for (int t = 0; t < T; t++) x[t] = a.x[which].at<X>(b, l + t), rstd[t] = a.rstd[which].at<float>(b)[l + t];
  auto turned_back = [&](int t, int64_t i, auto m) {
    vf dn = load(d[t] + i, m);
    if (ROPE) dn = dn * load(cos + t * dim + i, m) - swapped(dn) * load(sin + t * dim + i, m);
    return dn;
  };
  vf total[T] = {};
  for (int64_t h = 0; h < width; h += dim) {
    for (int t = 0; t < T; t++) d[t] = a.d[which].at<X>(b, l + t, h / dim);
    each(dim, [&](int64_t i, auto m, int) {
      const vf w = load(weight + h + i, m);
      vf dw = {};
      if (dweight != nullptr) dw = load(dweight + h + i, m);
#pragma GCC unroll 8
      for (int t = 0; t < T; t++) {
        vf dn_x = turned_back(t, i, m) * (load(x[t] + h + i, m) * rstd[t]);
        dw += dn_x;
        total[t] += dn_x * w;
      }
      if (dweight != nullptr) store(dweight + h + i, dw, m);
    });
  }
  for (int t = 0; t < T; t++) mean[t] = sum(total[t]) / width;
  const Writer<X> write(a.dx[which], a.shape);
  for (int64_t h = 0; h < width; h += dim) {
    for (int t = 0; t < T; t++) d[t] = a.d[which].at<X>(b, l + t, h / dim);
    each(dim, [&](int64_t i, auto m, int) {
      const vf w = load(weight + h + i, m);
#pragma GCC unroll 8
      for (int t = 0; t < T; t++) {
        vf x_hat = load(x[t] + h + i, m) * rstd[t];
        write(a.dx[which].at<X>(b, l + t) + h + i, (turned_back(t, i, m) * w - x_hat * mean[t]) * rstd[t], m);
      }
    });
  }
}

template <class X, bool ROPE>
void backward(const QkNormRopeBackward& a) {
  constexpr int T = 4;
  const int64_t width = a.shape.width, dim = a.rope.head_dim;
  Scratch weights(2 * width);
  const float* weight[2];
  for (int t = 0; t < 2; t++) weight[t] = float_row(a.weight[t], 0, width, weights + t * width);
  over_runs(a.shape, a.runs, a.threads, [&](int64_t b, int64_t r, int64_t l0, int64_t l1) {
    Scratch room(2 * T * dim);
    float *cos = room, *sin = room + T * dim;
    float* part = a.part ? a.part.at<float>() + (b * a.runs + r) * 2 * width : nullptr;
    if (part != nullptr) memset(part, 0, 2 * width * sizeof(float));
    for (int64_t l = l0; l < l1;) {
      const bool together = l + T <= l1;
      for (int t = 0; ROPE && t < (together ? T : 1); t++)
        Angles{a.rope, cos + t * dim, sin + t * dim}.take(l + t);
      for (int t = 0; t < 2 && a.x[t]; t++) {
        float* dweight = part != nullptr ? part + t * width : nullptr;
        auto run = together ? backward_tokens<T, X, ROPE> : backward_tokens<1, X, ROPE>;
        run(a, t, b, l, weight[t], cos, sin, dweight);
      }
      l += together ? T : 1;
    }
  });
  if (a.part)
    add_runs(a.part.at<float>(), a.shape.batch * a.runs, 2 * width, 2 * width, a.dweight.at<float>(),
             a.threads);
}

}  // namespace

void qk_norm_rope_forward(const QkNormRopeForward& a) {
  with_type(a.x[0].dtype,
            [&](auto x) { a.rope.cos ? forward<decltype(x), true>(a) : forward<decltype(x), false>(a); });
}

void qk_norm_rope_backward(const QkNormRopeBackward& a) {
  with_type(a.x[0].dtype,
            [&](auto x) { a.rope.cos ? backward<decltype(x), true>(a) : backward<decltype(x), false>(a); });
}

}  // namespace prfl::PRFL_ISA
