// The CPU kernels against loops in double, in every instruction set that runs here, on buffers of
// exactly the size they need: under the sanitizers a step outside of one ends the test.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#include "cpu/isa.h"
#include "cpu/parallel.h"

using prfl::View;
using Floats = std::vector<float>;

static int failures = 0;

static void expect(bool good, const std::string& what) {
  if (good) return;
  failures++;
  std::printf("FAILED %s\n", what.c_str());
}

static Floats random(int64_t n, unsigned seed) {
  std::mt19937 engine(seed);
  std::normal_distribution<float> normal;
  Floats a(n);
  for (float& x : a) x = normal(engine);
  return a;
}

static View view(Floats& a, int64_t s0 = 0, int64_t s1 = 0, int64_t s2 = 0) {
  return {a.data(), prfl::DType::f32, {s0, s1, s2}};
}

static void expect_close(const Floats& got, const std::function<double(int64_t)>& want, double limit,
                         const std::string& what) {
  double error = 0, norm = 0;
  for (size_t i = 0; i < got.size(); i++) {
    double w = want(i);
    error += (got[i] - w) * (got[i] - w);
    norm += w * w;
  }
  error = std::sqrt(error / (norm > 0 ? norm : 1));
  expect(error <= limit, what + ": error " + std::to_string(error));
}

static void test_parallel_for() {
  std::vector<int> seen(1000);
  prfl::parallel_for(3, 1000, 7, 2, [&](int64_t i, int64_t j) {
    for (; i < j; i++) seen[i]++;
  });
  for (int i = 0; i < 1000; i++) expect(seen[i] == (i >= 3), "parallel_for covers its range once");
  bool caught = false;
  try {
    prfl::parallel_for(0, 100, 1, 2, [](int64_t i, int64_t) {
      if (i == 50) throw std::runtime_error("");
    });
  } catch (const std::runtime_error&) {
    caught = true;
  }
  expect(caught, "parallel_for hands on what is thrown");
}

struct Sizes {
  int64_t batch, length, width;
  prfl::Shape shape() const { return {batch, length, width}; }
  int64_t rows() const { return batch * length; }
  int64_t values() const { return rows() * width; }
  View view3(Floats& a) const { return view(a, length * width, width); }
};

static void test_bias_gelu(const Sizes& s) {
  const int64_t runs = 3;
  Floats h = random(s.values(), 1), bias = random(s.width, 2), dg = random(s.values(), 3);
  Floats g(s.values()), dh(s.values()), again(s.values()), part(s.batch * runs * s.width), dbias(s.width);
  prfl::kernels().bias_gelu_forward({s.view3(h), view(bias), s.view3(g), s.shape(), 2});
  prfl::kernels().bias_gelu_backward({s.view3(dg), s.view3(h), view(bias), s.view3(dh), s.view3(again),
                                      view(part), view(dbias), s.shape(), runs, 2});
  auto exact = [&](double a) {
    return 0.5 * a * (1 + std::tanh(std::sqrt(2 / M_PI) * (a + 0.044715 * a * a * a)));
  };
  auto slope = [&](int64_t i) {
    double a = double(h[i]) + bias[i % s.width], step = 1e-5;
    return dg[i] * (exact(a + step) - exact(a - step)) / (2 * step);
  };
  expect_close(g, [&](int64_t i) { return exact(double(h[i]) + bias[i % s.width]); }, 1e-6, "bias_gelu g");
  expect(again == g, "bias_gelu g made again");
  expect_close(dh, slope, 1e-6, "bias_gelu dh");
  auto summed = [&](int64_t c) {
    double total = 0;
    for (int64_t i = c; i < s.values(); i += s.width) total += slope(i);
    return total;
  };
  expect_close(dbias, summed, 1e-5, "bias_gelu dbias");
}

static void test_norm(const Sizes& s) {
  const int64_t runs = 2;
  Floats x = random(s.values(), 1), y = random(s.values(), 2), gate = random(s.batch * s.width, 3);
  Floats scale = random(s.batch * s.width, 4), shift = random(s.batch * s.width, 5);
  Floats total(s.values()), n(s.values()), mean(s.rows()), rstd(s.rows());
  View gates = view(gate, s.width), scales = view(scale, s.width), shifts = view(shift, s.width);
  View means = view(mean, s.length), rstds = view(rstd, s.length);
  prfl::kernels().norm_forward({s.view3(x), s.view3(y), gates, scales, shifts, s.view3(total), s.view3(n),
                                means, rstds, s.shape(), 0, 1.0f, 1e-6f, 2});
  auto parameter = [&](int64_t i) { return i / (s.length * s.width) * s.width + i % s.width; };
  expect_close(
      total, [&](int64_t i) { return x[i] + double(gate[parameter(i)]) * y[i]; }, 1e-6, "norm total");
  std::vector<double> hat(s.values());
  for (int64_t r = 0; r < s.rows(); r++) {
    const float* row = total.data() + r * s.width;
    double m = 0, v = 0;
    for (int64_t c = 0; c < s.width; c++) m += row[c] / double(s.width);
    for (int64_t c = 0; c < s.width; c++) v += (row[c] - m) * (row[c] - m) / double(s.width);
    for (int64_t c = 0; c < s.width; c++) hat[r * s.width + c] = (row[c] - m) / std::sqrt(v + 1e-6);
  }
  auto normed = [&](int64_t i) { return hat[i] * (1.0 + scale[parameter(i)]) + shift[parameter(i)]; };
  expect_close(n, normed, 1e-5, "norm n");

  Floats dn = random(s.values(), 6), dsum = random(s.values(), 7), dx(s.values()), dy(s.values());
  Floats part(s.batch * runs * 3 * s.width), sums(s.batch * 3 * s.width);
  prfl::kernels().norm_backward({s.view3(dn), s.view3(dsum), s.view3(total), s.view3(y), gates, scales, means,
                                 rstds, s.view3(dx), s.view3(dy), view(part), view(sums), s.shape(),
                                 {runs, (s.length + runs - 1) / runs, 0, 0}, 1, 1.0f, true, 2});
  std::vector<double> want(s.values());
  for (int64_t r = 0; r < s.rows(); r++) {
    double mg = 0, mgx = 0;
    auto g = [&](int64_t i) { return dn[i] * (1.0 + scale[parameter(i)]); };
    for (int64_t i = r * s.width; i < (r + 1) * s.width; i++) {
      mg += g(i) / s.width;
      mgx += g(i) * hat[i] / s.width;
    }
    for (int64_t i = r * s.width; i < (r + 1) * s.width; i++)
      want[i] = (g(i) - mg - hat[i] * mgx) * rstd[r] + dsum[i];
  }
  if (s.width > 1) expect_close(dx, [&](int64_t i) { return want[i]; }, 1e-5, "norm dx");
  expect_close(dy, [&](int64_t i) { return dx[i] * double(gate[parameter(i)]); }, 1e-6, "norm dy");
  auto summed = [&](int64_t k) {
    const int64_t b = k / (3 * s.width), slot = k / s.width % 3, c = k % s.width;
    double total = 0;
    for (int64_t l = 0; l < s.length; l++) {
      const int64_t i = (b * s.length + l) * s.width + c;
      total += slot == 0 ? dn[i] * hat[i] : slot == 1 ? dn[i] : double(dx[i]) * y[i];
    }
    return total;
  };
  expect_close(sums, summed, 1e-5, "norm sums");
}

static void test_qk_norm_rope(int64_t batch, int64_t length, int64_t heads, int64_t dim) {
  const Sizes s{batch, length, heads * dim};
  const int64_t runs = 2, positions = length;
  Floats q = random(s.values(), 1), k = random(s.values(), 2), wq = random(s.width, 3),
         wk = random(s.width, 4);
  Floats out_q(s.values()), out_k(s.values()), rq(s.rows()), rk(s.rows()), cos(positions * dim),
      sin(positions * dim);
  auto angle = [&](int64_t place, int64_t c) { return 0.1 * place * (1 + c / 2); };
  for (int64_t i = 0; i < positions * dim; i++) {
    cos[i] = std::cos(angle(i / dim, i % dim));
    sin[i] = std::sin(angle(i / dim, i % dim)) * (i % 2 ? 1 : -1);
  }
  // Two rows of one column: frames turn the first pair, columns none.
  prfl::Rope rope{view(cos, dim), view(sin, dim), heads, dim, 1, dim / 2 - 1, 2, 1, 0};
  View stats[2] = {view(rq, s.length), view(rk, s.length)};
  prfl::kernels().qk_norm_rope_forward({{s.view3(q), s.view3(k)},
                                        {view(wq), view(wk)},
                                        {s.view3(out_q), s.view3(out_k)},
                                        {stats[0], stats[1]},
                                        s.shape(),
                                        rope,
                                        1e-6f,
                                        2});
  auto place = [&](int64_t l, int64_t c) { return c < 2 ? l / 2 : l % 2; };
  auto rotated = [&](int64_t i) {
    const int64_t r = i / s.width, c = i % dim, other = i ^ 1;
    const double a = angle(place(r % s.length, c), c) * (c % 2 ? 1 : -1);
    auto n = [&](int64_t j) { return double(q[j]) * rq[r] * wq[j % s.width]; };
    return n(i) * std::cos(a) + n(other) * std::sin(a);
  };
  expect_close(out_q, rotated, 1e-6, "qk_norm_rope q");
  auto rms = [&](int64_t r) {
    double total = 0;
    for (int64_t c = 0; c < s.width; c++) total += double(k[r * s.width + c]) * k[r * s.width + c];
    return 1 / std::sqrt(total / s.width + 1e-6);
  };
  expect_close(rk, rms, 1e-6, "qk_norm_rope rstd");

  // The gradient of sum(out_q)^2 / 2 is out_q: turned back it is the normalised row.
  Floats dq(s.values()), dk(s.values()), part(s.batch * runs * 2 * s.width), dweight(2 * s.width);
  View dq_in{out_q.data(), prfl::DType::f32, {s.length * s.width, s.width, dim}};
  View dk_in{out_k.data(), prfl::DType::f32, {s.length * s.width, s.width, dim}};
  prfl::kernels().qk_norm_rope_backward({{dq_in, dk_in},
                                         {s.view3(q), s.view3(k)},
                                         {view(wq), view(wk)},
                                         {stats[0], stats[1]},
                                         {s.view3(dq), s.view3(dk)},
                                         view(part),
                                         view(dweight),
                                         s.shape(),
                                         rope,
                                         runs,
                                         2});
  auto summed = [&](int64_t c) {
    double total = 0;
    for (int64_t r = 0; r < s.rows(); r++) total += std::pow(double(q[r * s.width + c]) * rq[r], 2) * wq[c];
    return total;
  };
  dweight.resize(s.width);
  expect_close(dweight, summed, 1e-5, "qk_norm_rope d weight");
}

static void test_reward_pool(const Sizes& s, int64_t wanted) {
  const int64_t runs = 2, queries = (wanted + 7) / 8 * 8;
  Floats x = random(s.values(), 1), u = random(queries * s.width, 2),
         g = random(s.batch * queries * s.width, 3);
  for (int64_t i = wanted * s.width; i < queries * s.width; i++) u[i] = 0;
  for (int64_t i = 0; i < s.batch * queries * s.width; i++)
    if (i / s.width % queries >= wanted) g[i] = 0;
  Floats part(s.batch * runs * queries * s.width), top(s.batch * runs * queries),
      total(s.batch * runs * queries);
  Floats pooled(s.batch * wanted * s.width), lse(s.batch * wanted), scores(s.rows() * wanted);
  View u_in = view(u, s.width), score_view = view(scores, s.length * wanted, wanted);
  prfl::kernels().reward_pool_forward({s.view3(x), u_in, view(part), view(top), view(total),
                                       view(pooled, wanted * s.width, s.width), view(lse, wanted), score_view,
                                       s.shape(), queries, wanted, runs, 2});
  auto dot = [&](int64_t row, const float* a) {
    double sum = 0;
    for (int64_t c = 0; c < s.width; c++) sum += double(x[row * s.width + c]) * a[c];
    return sum;
  };
  expect_close(
      scores, [&](int64_t i) { return dot(i / wanted, u.data() + i % wanted * s.width); }, 1e-5,
      "pool scores");
  auto weight = [&](int64_t row, int64_t q) {
    return std::exp(double(scores[row * wanted + q]) - lse[row / s.length * wanted + q]);
  };
  auto pool = [&](int64_t i) {
    const int64_t b = i / (wanted * s.width), q = i / s.width % wanted, c = i % s.width;
    double sum = 0;
    for (int64_t l = 0; l < s.length; l++)
      sum += weight(b * s.length + l, q) * x[(b * s.length + l) * s.width + c];
    return sum;
  };
  expect_close(pooled, pool, 1e-5, "pooled");

  Floats delta(s.batch * wanted, 0.25f), dx(s.values()), du(wanted * s.width);
  prfl::kernels().reward_pool_backward({s.view3(x), u_in, view(g, queries * s.width, s.width),
                                        view(delta, wanted), score_view, view(lse, wanted), s.view3(dx),
                                        view(part), view(du), s.shape(), queries, wanted, runs, 2});
  auto ds = [&](int64_t row, int64_t q) {
    const int64_t b = row / s.length;
    return weight(row, q) * (dot(row, g.data() + (b * queries + q) * s.width) - 0.25);
  };
  auto features = [&](int64_t i) {
    const int64_t row = i / s.width, b = row / s.length, c = i % s.width;
    double sum = 0;
    for (int64_t q = 0; q < wanted; q++)
      sum += weight(row, q) * g[(b * queries + q) * s.width + c] + ds(row, q) * u[q * s.width + c];
    return sum;
  };
  expect_close(dx, features, 1e-5, "pool dx");
  auto queried = [&](int64_t i) {
    double sum = 0;
    for (int64_t row = 0; row < s.rows(); row++) sum += ds(row, i / s.width) * x[row * s.width + i % s.width];
    return sum;
  };
  expect_close(du, queried, 1e-5, "pool du");
}

// float32 or bfloat16 values of exactly their size, [batch, length, heads, dim].
struct Tensor {
  prfl::DType dtype;
  Floats values;
  std::vector<uint16_t> bits;

  Tensor(prfl::DType dtype, Floats a) : dtype(dtype), values(std::move(a)) {
    if (dtype == prfl::DType::f32) return;
    for (float& x : values) {  // cut to bfloat16
      uint32_t u;
      std::memcpy(&u, &x, sizeof u);
      bits.push_back(u >> 16);
      u &= 0xffff0000u;
      std::memcpy(&x, &u, sizeof u);
    }
  }
  View view(const prfl::AttentionShape& s, int64_t length) {
    void* data = dtype == prfl::DType::f32 ? static_cast<void*>(values.data()) : bits.data();
    return {data, dtype, {length * s.heads * s.dim, s.heads * s.dim, s.dim}};
  }
  const Floats& read() {
    for (size_t i = 0; i < bits.size(); i++) {
      const uint32_t u = static_cast<uint32_t>(bits[i]) << 16;
      std::memcpy(&values[i], &u, sizeof u);
    }
    return values;
  }
};

// The last key counts `repeats` times.
static void test_attention(const prfl::AttentionShape& s, prfl::DType dtype, int repeats = 1) {
  const int64_t q_size = s.batch * s.queries * s.heads * s.dim, k_size = s.batch * s.keys * s.heads * s.dim;
  const int64_t rows = s.batch * s.heads * s.queries;
  Tensor q(dtype, random(q_size, 1)), k(dtype, random(k_size, 2)), v(dtype, random(k_size, 3));
  Tensor dout(dtype, random(q_size, 4)), out(dtype, Floats(q_size)), dq(dtype, Floats(q_size));
  Tensor dk(dtype, Floats(k_size)), dv(dtype, Floats(k_size));
  Floats lse(rows), dlse = random(rows, 5);
  const float scale = 1 / std::sqrt(static_cast<float>(s.dim)), last = std::log(static_cast<float>(repeats));
  const View q_in = q.view(s, s.queries), k_in = k.view(s, s.keys), v_in = v.view(s, s.keys);
  const View out_view = out.view(s, s.queries), lse_view = view(lse, s.heads * s.queries, s.queries);
  prfl::kernels().attention_forward({q_in, k_in, v_in, out_view, lse_view, s, scale, last, 3});
  const View dlse_view = view(dlse, s.heads * s.queries, s.queries);
  prfl::kernels().attention_backward({dout.view(s, s.queries), dlse_view, q_in, k_in, v_in, out_view,
                                      lse_view, dq.view(s, s.queries), dk.view(s, s.keys), dv.view(s, s.keys),
                                      s, scale, last, 3});

  std::vector<double> want_lse(rows), want_out(q_size), want_dq(q_size), want_dk(k_size), want_dv(k_size);
  for (int64_t row = 0; row < rows; row++) {
    const int64_t b = row / (s.heads * s.queries), h = row / s.queries % s.heads, l = row % s.queries;
    const int64_t at = ((b * s.queries + l) * s.heads + h) * s.dim;
    auto key = [&](int64_t j) { return ((b * s.keys + j) * s.heads + h) * s.dim; };
    auto times = [&](int64_t j) { return j == s.keys - 1 ? repeats : 1; };
    std::vector<double> p(s.keys), dp(s.keys);
    double total = 0, delta = -dlse[row];
    for (int64_t j = 0; j < s.keys; j++) {
      for (int64_t d = 0; d < s.dim; d++) {
        p[j] += scale * double(q.values[at + d]) * k.values[key(j) + d];
        dp[j] += double(dout.values[at + d]) * v.values[key(j) + d];
      }
      total += times(j) * std::exp(p[j]);
    }
    want_lse[row] = std::log(total);
    for (int64_t j = 0; j < s.keys; j++) {
      p[j] = times(j) * std::exp(p[j]) / total;
      delta += p[j] * dp[j];
    }
    for (int64_t j = 0; j < s.keys; j++)
      for (int64_t d = 0; d < s.dim; d++) {
        const double ds = scale * p[j] * (dp[j] - delta);
        want_out[at + d] += p[j] * v.values[key(j) + d];
        want_dq[at + d] += ds * k.values[key(j) + d];
        want_dk[key(j) + d] += ds * q.values[at + d];
        want_dv[key(j) + d] += p[j] * dout.values[at + d];
      }
  }
  const double limit = dtype == prfl::DType::f32 ? 1e-5 : 1e-2;
  auto compare = [&](const Floats& got, const std::vector<double>& want, const char* what) {
    expect_close(got, [&](int64_t i) { return want[i]; }, limit, std::string("attention ") + what);
  };
  compare(lse, want_lse, "lse");
  compare(out.read(), want_out, "out");
  compare(dq.read(), want_dq, "dq");
  compare(dk.read(), want_dk, "dk");
  compare(dv.read(), want_dv, "dv");
}

int main() {
  test_parallel_for();
  for (const prfl::Build& build : prfl::builds()) {
    if (!build.runs_here) continue;
    prfl::use_isa(build.name);
    for (int64_t width : {1, 3, 16, 17, 130}) {
      const Sizes sizes{2, 5, width};
      test_bias_gelu(sizes);
      test_norm(sizes);
      test_reward_pool({2, 35, width}, width == 16 ? 11 : 3);
    }
    for (int64_t dim : {2, 12, 32, 34}) test_qk_norm_rope(2, 6, 3, dim);
    for (prfl::DType dtype : {prfl::DType::f32, prfl::DType::bf16}) {
      test_attention({2, 37, 61, 2, 33}, dtype);
      test_attention({1, 140, 261, 1, 16}, dtype);  // two blocks of queries and of keys
      test_attention({1, 140, 261, 1, 16}, dtype, 435);
      test_attention({1, 21, 256, 2, 16}, dtype, 2);  // a whole block, or one and a rest
      test_attention({1, 3, 5, 1, 256}, dtype);       // the largest head dim
    }
  }
  std::printf("%d failures, OpenMP runtime '%s'\n", failures, prfl::openmp_runtime().c_str());
  return failures != 0;
}
