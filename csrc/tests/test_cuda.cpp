// Every CUDA kernel on the simulation, for the sanitizers: arrays of exactly the size they need, sizes that
// no tile divides, several runs, tiles and stages. What they compute is checked by
// tests/test_cuda_kernels.py; here it has to be finite, and the same twice.
#include <cmath>
#include <cstdio>
#include <cstring>
#include <functional>
#include <random>
#include <string>
#include <vector>

#include "cuda/attention_hopper.h"
#include "cuda/norm.h"
#include "cuda/qk_norm_rope.h"
#include "cuda/reward_pool.h"
#include "cuda/solver_step.h"
#include "sim/cusim.h"

using namespace prfl::cuda;
using Bytes = std::vector<char>;

static int failures = 0;
static bool races = false;  // under ThreadSanitizer, which takes its time: everything once

// Values of float32 or bf16, of which small ones serve for either.
static Bytes random(int64_t n, bool bf16 = false) {
  static std::mt19937 engine(1);
  std::normal_distribution<float> normal;
  Bytes made(n * (bf16 ? 2 : 4));
  for (int64_t i = 0; i < n; ++i) {
    const float x = normal(engine);
    if (bf16)
      std::memcpy(&made[2 * i], reinterpret_cast<const char*>(&x) + 2, 2);
    else
      std::memcpy(&made[4 * i], &x, 4);
  }
  return made;
}

static float* floats(Bytes& a) { return reinterpret_cast<float*>(a.data()); }

static bool finite(const Bytes& a, bool bf16) {
  for (size_t i = 0; i < a.size(); i += bf16 ? 2 : 4) {
    float x = 0;
    std::memcpy(reinterpret_cast<char*>(&x) + (bf16 ? 2 : 0), &a[i], bf16 ? 2 : 4);
    if (!std::isfinite(x)) return false;
  }
  return true;
}

struct Result {
  Bytes* bytes;
  bool bf16;
};

// Runs twice, on results that hold NaN before.
static void check(const std::string& name, const std::vector<Result>& results,
                  const std::function<void()>& run) {
  std::vector<Bytes> first;
  for (int i = 0; i < (races ? 1 : 2); ++i) {
    for (const Result& r : results) std::memset(r.bytes->data(), 0xff, r.bytes->size());
    run();
    for (size_t j = 0; j < results.size(); ++j) {
      bool good = finite(*results[j].bytes, results[j].bf16);
      if (i)
        good = good && first[j] == *results[j].bytes;
      else
        first.push_back(*results[j].bytes);
      failures += !good;
      if (!good) std::printf("FAILED %s, result %zu\n", name.c_str(), j);
    }
  }
}

static void test_reward_pool(int64_t b, int64_t l, int64_t c, int64_t n, bool bf16) {
  const int64_t runs = reward_pool_runs(b, l, c, bf16);
  Bytes x = random(b * l * c, bf16), u = random(n * c), pooled(b * n * c * 4), lse(b * n * 4),
        scores(b * l * n * 4);
  for (int64_t i = 0; i < n * c; ++i) floats(u)[i] /= std::sqrt(float(c));
  Bytes top(b * runs * n * 4), total(top), acc(b * runs * n * c * 4), part(acc), dx(x.size());
  Bytes g = random(b * n * c), delta = random(b * n);
  RewardPoolForward f{};
  f.x = x.data(), f.x_b = l * c, f.x_l = c, f.u = floats(u);
  f.pooled = floats(pooled), f.lse = floats(lse), f.scores = floats(scores);
  f.top = floats(top), f.total = floats(total), f.acc = floats(acc);
  f.batch = b, f.length = l, f.width = c, f.queries = n, f.bf16 = bf16;
  check("reward_pool forward", {{&pooled, false}, {&lse, false}, {&scores, false}},
        [&] { reward_pool_forward(f, nullptr); });
  RewardPoolBackward d{};
  d.x = x.data(), d.x_b = l * c, d.x_l = c, d.u = floats(u), d.dpooled = floats(g), d.delta = floats(delta);
  d.lse = floats(lse), d.scores = floats(scores), d.dx = dx.data(), d.part = floats(part);
  d.batch = b, d.length = l, d.width = c, d.queries = n, d.bf16 = bf16;
  check("reward_pool backward", {{&dx, bf16}, {&part, false}}, [&] { reward_pool_backward(d, nullptr); });
}

static void test_norm(int64_t b, int64_t l, int64_t c, bool bf16) {
  const int kind = bf16 ? kBfloat16 : kFloat32;
  const bool aligned = c % 8 == 0;
  const int64_t runs = row_runs(b, l, c);
  Bytes x = random(b * l * c, bf16), y = random(b * l * c, bf16), dn = random(b * l * c, bf16);
  Bytes gate = random(b * c), scale = random(b * c), shift = random(b * c), mean(b * l * 4), rstd(mean),
        quant(mean);
  Bytes sum(x.size()), n(x.size()), small(b * l * c), dx(x.size()), dy(x.size()), part(b * runs * 3 * c * 4);
  NormForward f{};
  f.x = x.data(), f.x_b = l * c, f.x_l = c, f.y = y.data(), f.y_b = l * c, f.y_l = c;
  f.gate = floats(gate), f.scale = floats(scale), f.shift = floats(shift);
  f.gate_b = f.scale_b = f.shift_b = c;
  f.total = sum.data(), f.n = n.data(), f.mean = floats(mean), f.rstd = floats(rstd);
  f.batch = b, f.length = l, f.width = c, f.eps = 1e-6f, f.base = 1.0f;
  f.x_kind = f.y_kind = f.n_kind = kind, f.aligned = aligned;
  check("norm forward", {{&sum, bf16}, {&n, bf16}, {&mean, false}, {&rstd, false}},
        [&] { norm_forward(f, nullptr); });
  NormForward fp8 = f;
  fp8.n = small.data(), fp8.n_kind = kE4m3, fp8.quant = floats(quant), fp8.mean = fp8.rstd = nullptr;
  check("norm forward in e4m3", {{&sum, bf16}, {&quant, false}}, [&] { norm_forward(fp8, nullptr); });
  NormBackward d{};
  d.dn = dn.data(), d.dn_b = l * c, d.dn_l = c, d.dsum = x.data(), d.dsum_b = l * c, d.dsum_l = c;
  d.x = sum.data(), d.x_b = l * c, d.x_l = c, d.y = y.data(), d.y_b = l * c, d.y_l = c;
  d.gate = floats(gate), d.scale = floats(scale), d.gate_b = d.scale_b = c;
  d.mean = floats(mean), d.rstd = floats(rstd), d.dx = dx.data(), d.dy = dy.data(), d.part = floats(part);
  d.batch = b, d.length = l, d.width = c, d.base = 1.0f, d.x_kind = d.y_kind = d.dn_kind = kind;
  d.aligned = aligned, d.wants_parameters = d.wants_gate = true;
  check("norm backward", {{&dx, bf16}, {&dy, bf16}, {&part, false}}, [&] { norm_backward(d, nullptr); });
}

static void test_qk_norm_rope(int64_t b, int64_t l, int heads, int d, bool bf16) {
  const int64_t c = heads * d, runs = row_runs(b, l, c);
  const int kind = bf16 ? kBfloat16 : kFloat32;
  const bool aligned = c % 8 == 0;
  Bytes q = random(b * l * c, bf16), k = random(b * l * c, bf16), dq = random(b * l * c, bf16), dk = dq;
  Bytes w = random(c), cos = random(l * d / 2), sin = random(l * d / 2), rstd_q(b * l * 4), rstd_k(rstd_q);
  Bytes out_q(q.size()), out_k(q.size()), small_q(b * l * c), small_k(small_q);
  Bytes quant_q(b * l * heads * 4), quant_k(quant_q), part(b * runs * 2 * c * 4);
  const Rotation r{floats(cos), floats(sin), d, d / 2 - 2 * (d / 6), d / 6, 1, 1, 0};
  QkNormRopeForward f{};
  f.q = q.data(), f.q_b = l * c, f.q_l = c, f.k = k.data(), f.k_b = l * c, f.k_l = c;
  f.weight_q = f.weight_k = floats(w), f.out_q = out_q.data(), f.out_k = out_k.data();
  f.rstd_q = floats(rstd_q), f.rstd_k = floats(rstd_k), f.rotation = r;
  f.batch = b, f.length = l, f.width = c, f.eps = 1e-6f, f.q_kind = f.out_kind = kind, f.aligned = aligned;
  check("qk_norm_rope forward", {{&out_q, bf16}, {&out_k, bf16}, {&rstd_q, false}, {&rstd_k, false}},
        [&] { qk_norm_rope_forward(f, nullptr); });
  f.out_q = small_q.data(), f.out_k = small_k.data(), f.quant_q = floats(quant_q),
  f.quant_k = floats(quant_k);
  f.out_kind = kE4m3, f.rstd_q = f.rstd_k = nullptr;
  if ((d & (d - 1)) == 0)
    check("qk_norm_rope forward in e4m3", {{&quant_q, false}, {&quant_k, false}},
          [&] { qk_norm_rope_forward(f, nullptr); });
  QkNormRopeBackward g{};
  g.dout_q = dq.data(), g.dout_q_b = l * c, g.dout_q_l = c, g.dout_k = dk.data(), g.dout_k_b = l * c;
  g.dout_k_l = c, g.q = q.data(), g.q_b = l * c, g.q_l = c, g.k = k.data(), g.k_b = l * c, g.k_l = c;
  g.weight_q = g.weight_k = floats(w), g.rstd_q = floats(rstd_q), g.rstd_k = floats(rstd_k);
  g.dq = out_q.data(), g.dk = out_k.data(), g.part = floats(part), g.rotation = r;
  g.batch = b, g.length = l, g.width = c, g.q_kind = kind, g.aligned = aligned;
  check("qk_norm_rope backward", {{&out_q, bf16}, {&out_k, bf16}, {&part, false}},
        [&] { qk_norm_rope_backward(g, nullptr); });
}

static void test_solver_step(int64_t b, int64_t n, bool bf16) {
  Bytes x = random(b * n), last = random(b * n), m0 = random(b * n), m1 = random(b * n),
        v = random(b * n, bf16);
  Bytes columns = random(b * 9), next(b * n * 4), corrected(next), m(next);
  SolverStep a{};
  a.x = floats(x), a.x_last = floats(last), a.m0 = floats(m0), a.m1 = floats(m1), a.velocity = v.data();
  a.columns = floats(columns), a.x_next = floats(next), a.x_c = floats(corrected), a.m_t = floats(m);
  a.batch = b, a.size = n, a.bf16 = bf16, a.aligned = n % 8 == 0;
  check("solver_step", {{&next, false}, {&corrected, false}, {&m, false}}, [&] { solver_step(a, nullptr); });
}

static void test_attention(int64_t b, int64_t lq, int64_t lk, int64_t h) {
  const int64_t d = 128, padded = (lk + 127) / 128 * 128;
  const auto sequence = [&](Bytes& a, int64_t l) { return Sequence{a.data(), l, {l * h * d, h * d, d}}; };
  Bytes out(b * lq * h * d * 2), lse(b * h * lq * 4);
  Bytes q = random(b * lq * h * d, true), k = random(b * lk * h * d, true), v = random(b * lk * h * d, true);
  check("attention", {{&out, true}, {&lse, false}}, [&] {
    attention_hopper_forward(sequence(q, lq), sequence(k, lk), sequence(v, lk), out.data(), floats(lse), b, h,
                             0.1f, nullptr);
  });
  const auto e4m3 = [](int64_t n) {  // up to 1.875, of either sign
    Bytes made = random((n + 3) / 4);
    made.resize(n);
    for (char& x : made) x &= 0xbf;
    return made;
  };
  Bytes q8 = e4m3(b * lq * h * d), k8 = e4m3(b * lk * h * d), v8 = e4m3(b * h * d * padded);
  Bytes q_scale = random(b * lq * h), k_scale = random(b * h * padded), v_scale = random(b * h * d);
  for (int64_t i = 0; i < b * lq * h; ++i) floats(q_scale)[i] = std::fabs(floats(q_scale)[i]) + 0.1f;
  check("attention in e4m3", {{&out, true}, {&lse, false}}, [&] {
    attention_hopper_fp8_forward(sequence(q8, lq), floats(q_scale), sequence(k8, lk), floats(k_scale),
                                 v8.data(), floats(v_scale), out.data(), floats(lse), b, h, 0.01f, nullptr);
  });
}

int main(int argc, char** argv) {
  races = argc > 1 && std::string(argv[1]) == "races";
  for (const bool bf16 : {false, true}) {
    // Empty slices of columns; more tiles in a run than stages, or two.
    test_reward_pool(1, races ? (bf16 ? 1100 : 550) : 16 * 32 * 6 - 5, 72, 3, bf16);
    if (!races) test_reward_pool(2, 21, 1600, 8, bf16);  // clusters of 8
    test_norm(1, 5, 1536, bf16);
    test_norm(races ? 99 : 3, races ? 8 : 140, 130, bf16);  // runs of two tokens
    test_qk_norm_rope(1, 5, 12, 128, bf16);
    test_qk_norm_rope(races ? 99 : 3, races ? 8 : 140, 2, 12, bf16);
    test_solver_step(2, 2056, bf16);
    test_solver_step(1, 77, bf16);
  }
  test_attention(1, 140, 1060, 1);  // a cluster of two blocks, which use their rings twice
  cusim::multiprocessors = 2;       // a block has several tiles of queries
  test_attention(1, 390, 257, races ? 1 : 2);  // of which a head's keys and values stay
  test_attention(1, 270, 440, 1);              // and go through the ring
  std::printf("%d failures\n", failures);
  return failures != 0;
}
