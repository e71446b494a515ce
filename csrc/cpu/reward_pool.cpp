// s = x u^T, p = softmax over the tokens, pooled = p^T x, with the features read from memory once: a
// tile of tokens gives its scores, and is read again, now from the second-level cache, for the pooled
// columns. Every run of tokens keeps its own maximum, sum and pooled columns; they are merged in order.
#include <math.h>

#include "rows.h"

namespace prfl::PRFL_ISA {
namespace {

constexpr int GROUP = 8;          // queries that are handled together
constexpr int64_t TILE = 16;      // tokens of a tile
constexpr int64_t COLUMNS = 256;  // columns of a step: 8 queries and 2 tokens of them fit the first level
// Tokens and columns whose accumulators for 8 queries fit the registers: 32 with AVX-512, otherwise 16.
constexpr int TOKENS = LANES == 16 ? 2 : 1, WIDE = LANES == 16 ? 2 : 1;

// partial[t][q][LANES] += x_t u_q over `n` columns, for TOKENS tokens and 8 queries.
template <class X>
void dots(const X* const (&x)[TOKENS], const float* u, int64_t stride, int64_t n,
          float* const (&partial)[TOKENS]) {
  vf acc[TOKENS][GROUP];
  for (int t = 0; t < TOKENS; t++)
    for (int q = 0; q < GROUP; q++) acc[t][q] = load(partial[t] + q * LANES, Full{});
  each(n, [&](int64_t c, auto m, int) {
    vf xs[TOKENS];
    for (int t = 0; t < TOKENS; t++) xs[t] = load(x[t] + c, m);
#pragma GCC unroll 8
    for (int q = 0; q < GROUP; q++) {
      vf uq = load(u + q * stride + c, m);
      for (int t = 0; t < TOKENS; t++) acc[t][q] += xs[t] * uq;
    }
  });
  for (int t = 0; t < TOKENS; t++)
    for (int q = 0; q < GROUP; q++) store(partial[t] + q * LANES, acc[t][q], Full{});
}

// out[token][query] = x_token . u_query for the tokens [l0, l1) of a tile; `room` holds
// (TILE + 1) * queries vectors.
template <class X>
void tile_dots(const View& x, int64_t b, int64_t l0, int64_t l1, const float* u, int64_t queries,
               int64_t width, float* room, float* out) {
  const int64_t token = queries * LANES;
  memset(room, 0, (TILE + 1) * token * sizeof(float));
  for (int64_t c = 0; c < width; c += COLUMNS)
    for (int64_t q = 0; q < queries; q += GROUP)
      for (int64_t l = l0; l < l1; l += TOKENS) {
        const X* rows[TOKENS];
        float* partial[TOKENS];
        for (int t = 0; t < TOKENS; t++) {
          // Beyond the last token: the last one again, its sums go to the spare row.
          rows[t] = x.at<X>(b, min(l + t, l1 - 1)) + c;
          partial[t] = room + (l + t < l1 ? l + t - l0 : TILE) * token + q * LANES;
        }
        dots(rows, u + q * width + c, width, min(COLUMNS, width - c), partial);
      }
  for (int64_t i = 0; i < (l1 - l0) * queries; i++) out[i] = sum(load(room + i * LANES, Full{}));
}

// acc[q] = shrink[q] acc[q] + sum over tokens of p[token][q] x_token, for V vectors of columns at c.
template <int V, class X, class M>
void add_columns(const View& x, int64_t b, int64_t l0, int64_t l1, int64_t c, const float* p, int64_t queries,
                 const float* shrink, float* acc, int64_t width, M m) {
  vf a[GROUP][V];
#pragma GCC unroll 8
  for (int q = 0; q < GROUP; q++)
    for (int v = 0; v < V; v++) a[q][v] = load(acc + q * width + c + v * LANES, m) * shrink[q];
  for (int64_t l = l0; l < l1; l++, p += queries) {
    const X* row = x.at<X>(b, l) + c;
    vf xs[V];
    for (int v = 0; v < V; v++) xs[v] = load(row + v * LANES, m);
#pragma GCC unroll 8
    for (int q = 0; q < GROUP; q++)
      for (int v = 0; v < V; v++) a[q][v] += p[q] * xs[v];
  }
#pragma GCC unroll 8
  for (int q = 0; q < GROUP; q++)
    for (int v = 0; v < V; v++) store(acc + q * width + c + v * LANES, a[q][v], m);
}

template <class X>
void add_tile(const View& x, int64_t b, int64_t l0, int64_t l1, const float* p, int64_t queries,
              const float* shrink, float* acc, int64_t width) {
  for (int64_t q = 0; q < queries; q += GROUP) {
    int64_t c = 0;
    for (; c + WIDE * LANES <= width; c += WIDE * LANES)
      add_columns<WIDE, X>(x, b, l0, l1, c, p + q, queries, shrink + q, acc + q * width, width, Full{});
    each(width - c, [&](int64_t i, auto m, int) {
      add_columns<1, X>(x, b, l0, l1, c + i, p + q, queries, shrink + q, acc + q * width, width, m);
    });
  }
}

template <class X>
void forward(const RewardPoolForward& a) {
  const int64_t width = a.shape.width, queries = a.queries;
  over_runs(a.shape, a.runs, a.threads, [&](int64_t b, int64_t r, int64_t l0, int64_t l1) {
    Scratch room((TILE + 1) * queries * LANES + TILE * queries + 2 * queries);
    float* p = room + (TILE + 1) * queries * LANES;
    float *shrink = p + TILE * queries, *next = shrink + queries;
    float* top = a.top.at<float>() + (b * a.runs + r) * queries;
    float* total = a.total.at<float>() + (b * a.runs + r) * queries;
    float* acc = a.part.at<float>() + (b * a.runs + r) * queries * width;
    memset(acc, 0, queries * width * sizeof(float));
    for (int64_t q = 0; q < queries; q++) top[q] = -INFINITY, total[q] = 0.0f;
    for (int64_t l = l0; l < l1; l += TILE) {
      const int64_t end = min(l + TILE, l1), tokens = end - l;
      tile_dots<X>(a.x, b, l, end, a.u.at<float>(), queries, width, room, p);
      for (int64_t q = 0; q < queries; q++) next[q] = top[q];
      for (int64_t t = 0; t < tokens; t++) {
        memcpy(a.scores.at<float>(b, l + t), p + t * queries, a.wanted * sizeof(float));
        for (int64_t q = 0; q < queries; q++)
          next[q] = p[t * queries + q] > next[q] ? p[t * queries + q] : next[q];
      }
      each(queries, [&](int64_t q, auto m, int) {
        vf top_q = load(next + q, m);
        store(shrink + q, exp(load(top + q, m) - top_q), m);
        store(top + q, top_q, m);
        vf sum = load(total + q, m) * load(shrink + q, m);
        for (int64_t t = 0; t < tokens; t++) {
          vf weight = exp(load(p + t * queries + q, m) - top_q);
          store(p + t * queries + q, weight, m);
          sum += weight;
        }
        store(total + q, sum, m);
      });
      add_tile<X>(a.x, b, l, end, p, queries, shrink, acc, width);
    }
  });
  const int threads = threads_for(a.shape.batch * a.runs * queries * width, a.threads);
  parallel_for(0, a.shape.batch * a.wanted, 1, threads, [&](int64_t i, int64_t) {
    const int64_t b = i / a.wanted, q = i % a.wanted;
    auto at = [&](const View& v, int64_t r) { return v.at<float>() + (b * a.runs + r) * queries + q; };
    float top = -INFINITY, total = 0.0f;
    for (int64_t r = 0; r < a.runs; r++) top = *at(a.top, r) > top ? *at(a.top, r) : top;
    for (int64_t r = 0; r < a.runs; r++) total += expf(*at(a.top, r) - top) * *at(a.total, r);
    a.lse.at<float>(b)[q] = top + logf(total);
    Scratch share(a.runs);
    for (int64_t r = 0; r < a.runs; r++) share[r] = expf(*at(a.top, r) - top) / total;
    each(width, [&](int64_t c, auto m, int) {
      vf sum = {};
      for (int64_t r = 0; r < a.runs; r++)
        sum += share[r] * load(a.part.at<float>() + ((b * a.runs + r) * queries + q) * width + c, m);
      store(a.pooled.at<float>(b, q) + c, sum, m);
    });
  });
}

// dx_token = sum over queries of p[token][q] g_q + ds[token][q] u_q, for the columns [c, c + n).
template <class X>
void feature_gradient(const View& dx, int64_t b, int64_t l0, int64_t l1, int64_t c, int64_t n, const float* p,
                      const float* ds, int64_t queries, const float* g, const float* u, int64_t width,
                      float* tile) {
  for (int64_t q = 0; q < queries; q += GROUP) {
    const bool first = q == 0, last = q + GROUP == queries;
    each(n, [&](int64_t i, auto m, int) {
      vf gs[GROUP], us[GROUP];
#pragma GCC unroll 8
      for (int k = 0; k < GROUP; k++) {
        gs[k] = load(g + (q + k) * width + c + i, m);
        us[k] = load(u + (q + k) * width + c + i, m);
      }
      for (int64_t l = l0; l < l1; l++) {
        const float *pl = p + (l - l0) * queries + q, *dsl = ds + (l - l0) * queries + q;
        float* kept = tile + (l - l0) * COLUMNS + i;
        vf even = {}, odd = {};
        if (!first) even = load(kept, m);
#pragma GCC unroll 8
        for (int k = 0; k < GROUP; k++) {
          even += pl[k] * gs[k];
          odd += dsl[k] * us[k];
        }
        if (last)
          store(dx.at<X>(b, l) + c + i, even + odd, m);
        else
          store(kept, even + odd, m);
      }
    });
  }
}

// dp = x . d pooled,  ds = p (dp - delta),  dx = p d pooled + ds u,  du = ds^T x
template <class X>
void backward(const RewardPoolBackward& a) {
  const int64_t width = a.shape.width, queries = a.queries;
  Scratch ones(queries);
  for (int64_t q = 0; q < queries; q++) ones[q] = 1.0f;
  over_runs(a.shape, a.runs, a.threads, [&](int64_t b, int64_t r, int64_t l0, int64_t l1) {
    Scratch room((TILE + 1) * queries * LANES + 2 * TILE * queries + TILE * COLUMNS);
    float* p = room + (TILE + 1) * queries * LANES;
    float *ds = p + TILE * queries, *tile = ds + TILE * queries;
    float* du = a.du ? a.part.at<float>() + (b * a.runs + r) * queries * width : nullptr;
    const float *u = a.u.at<float>(), *g = a.dpooled.at<float>(b);
    const float *lse = a.lse.at<float>(b), *delta = a.delta.at<float>(b);
    if (du != nullptr) memset(du, 0, queries * width * sizeof(float));
    for (int64_t l = l0; l < l1; l += TILE) {
      const int64_t end = min(l + TILE, l1), tokens = end - l;
      tile_dots<X>(a.x, b, l, end, g, queries, width, room, ds);
      memset(p, 0, TILE * queries * sizeof(float));
      for (int64_t t = 0; t < tokens; t++) {
        const float* scores = a.scores.at<float>(b, l + t);
        float *pt = p + t * queries, *dst = ds + t * queries;
        each(a.wanted, [&](int64_t q, auto m, int) {
          vf weight = exp(load(scores + q, m) - load(lse + q, m));
          store(pt + q, weight, m);
          store(dst + q, weight * (load(dst + q, m) - load(delta + q, m)), m);
        });
      }
      if (a.dx)
        for (int64_t c = 0; c < width; c += COLUMNS)
          feature_gradient<X>(a.dx, b, l, end, c, min(COLUMNS, width - c), p, ds, queries, g, u, width, tile);
      if (du != nullptr) add_tile<X>(a.x, b, l, end, ds, queries, ones, du, width);
    }
  });
  if (a.du)
    add_runs(a.part.at<float>(), a.shape.batch * a.runs, queries * width, a.wanted * width, a.du.at<float>(),
             a.threads);
}

}  // namespace

void reward_pool_forward(const RewardPoolForward& a) {
  with_type(a.x.dtype, [&](auto x) { forward<decltype(x)>(a); });
}

void reward_pool_backward(const RewardPoolBackward& a) {
  with_type(a.x.dtype, [&](auto x) { backward<decltype(x)>(a); });
}

}  // namespace prfl::PRFL_ISA
