// The CPU kernels against loops in double, in every instruction set that runs here, on buffers of
// exactly the size they need: under the sanitizers a step outside of one ends the test.
#include <cmath>
#include <cstdio>
#include <cstdlib>
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

static void test_bias_gelu(int64_t rows, int64_t width) {
  Floats h = random(rows * width, 1), bias = random(width, 2), g(rows * width);
  prfl::kernels().bias_gelu_forward({view(h, width), view(bias), view(g, width), rows, width, 2});
  auto exact = [&](int64_t i) {
    double a = double(h[i]) + bias[i % width];
    return 0.5 * a * (1 + std::tanh(std::sqrt(2 / M_PI) * (a + 0.044715 * a * a * a)));
  };
  expect_close(g, exact, 1e-6, "bias_gelu");
}

int main() {
  test_parallel_for();
  for (const prfl::Build& build : prfl::builds()) {
    if (!build.runs_here) continue;
    prfl::use_isa(build.name);
    for (int64_t width : {1, 3, 16, 17, 130}) test_bias_gelu(5, width);
  }
  std::printf("%d failures, runtime '%s'\n", failures, prfl::openmp_runtime().c_str());
  return failures != 0;
}
