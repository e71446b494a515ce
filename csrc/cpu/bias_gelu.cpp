// gelu(a) = a s(2 t),  t = sqrt(2/pi) (a + 0.044715 a^3),  s the logistic function,  a = h + bias:
// the same as the tanh form, 1 + tanh t = 2 s(2 t), and accurate where 1 + tanh t cancels.
#include "kernels.h"
#include "rows.h"

namespace prfl::PRFL_ISA {
namespace {

constexpr float TWICE_ROOT = 1.5957691216057308f;  // 2 sqrt(2 / pi)
constexpr float CUBIC = 0.044715f;

inline vf logistic(vf a) {
  vf t = TWICE_ROOT * a * (1.0f + CUBIC * a * a);
  return 1.0f / (1.0f + exp(-t));
}

template <class T, class M>
inline vf biased(const T* h, const float* bias, int64_t i, M m) {
  vf a = load(h + i, m);
  return bias != nullptr ? a + load(bias + i, m) : a;
}

}  // namespace

void bias_gelu_forward(const BiasGeluForward& a) {
  Scratch bias(a.width);
  if (a.bias) read_row(a.bias, a.bias.data, a.width, bias);
  const float* b = a.bias ? static_cast<float*>(bias) : nullptr;
  with_type(a.h.dtype, [&](auto type) {
    using T = decltype(type);
    const int64_t grain = 1 + (1 << 14) / a.width;
    parallel_for(0, a.rows, grain, a.threads, [&](int64_t first, int64_t last) {
      for (int64_t l = first; l < last; l++) {
        const T* h = a.h.at<T>(l);
        T* out = a.out.at<T>(l);
        each(a.width, [&](int64_t i, auto m, int) {
          vf z = biased(h, b, i, m);
          store(out + i, z * logistic(z), m);
        });
      }
    });
  });
}

// gelu'(a) = s + a s (1 - s) 2 t',  2 t' = 2 sqrt(2/pi) (1 + 3 * 0.044715 a^2)
void bias_gelu_backward(const BiasGeluBackward& a) {
  Scratch bias(a.width);
  if (a.bias) read_row(a.bias, a.bias.data, a.width, bias);
  const float* b = a.bias ? static_cast<float*>(bias) : nullptr;
  const int64_t run = (a.rows + a.runs - 1) / a.runs;
  with_type(a.h.dtype, [&](auto type) {
    using T = decltype(type);
    parallel_for(0, a.runs, 1, a.threads, [&](int64_t r, int64_t) {
      float* total = a.part ? a.part.at<float>(r) : nullptr;
      if (total != nullptr) memset(total, 0, a.width * sizeof(float));
      for (int64_t l = r * run; l < min((r + 1) * run, a.rows); l++) {
        const T* dg = a.dg.at<T>(l);
        const T* h = a.h.at<T>(l);
        T* dh = a.dh.at<T>(l);
        T* g = a.g.at<T>(l);
        each(a.width, [&](int64_t i, auto m, int) {
          vf z = biased(h, b, i, m);
          vf s = logistic(z);
          vf slope = s + z * s * (1.0f - s) * (TWICE_ROOT * (1.0f + 3.0f * CUBIC * z * z));
          vf d = load(dg + i, m) * slope;
          store(g + i, z * s, m);
          store(dh + i, d, m);
          if (total != nullptr) store(total + i, load(total + i, m) + d, m);
        });
      }
    });
  });
  if (a.part) add_runs(a.part.at<float>(), a.runs, a.width, a.width, a.dbias.at<float>(), a.threads);
}

}  // namespace prfl::PRFL_ISA
