// gelu(a) = a s(2 t),  t = sqrt(2/pi) (a + 0.044715 a^3),  s the logistic function,  a = h + bias:
// the same as the tanh form, 1 + tanh t = 2 s(2 t), and accurate where 1 + tanh t cancels.
#include "rows.h"

namespace prfl::PRFL_ISA {
namespace {

constexpr float TWICE_ROOT = 1.5957691216057308f;  // 2 sqrt(2 / pi)
constexpr float CUBIC = 0.044715f;

// e^-2t; s = 1 / (1 + it), and 1 - s = it s.
inline vf tail_of(vf a) { return exp(-TWICE_ROOT * a * (1.0f + CUBIC * a * a)); }

template <class T, class M>
inline vf biased(const T* h, const float* bias, int64_t i, M m) {
  vf a = load(h + i, m);
  return bias != nullptr ? a + load(bias + i, m) : a;
}

template <class T>
void forward(const BiasGeluForward& a) {
  Scratch room(a.shape.width);
  const float* bias = float_row(a.bias, 0, a.shape.width, room);
  over_tokens(a.shape, a.threads, [&](int64_t b, int64_t l0, int64_t l1) {
    for (int64_t l = l0; l < l1; l++) {
      const T* h = a.h.at<T>(b, l);
      T* g = a.g.at<T>(b, l);
      each(a.shape.width, [&](int64_t i, auto m, int) {
        vf z = biased(h, bias, i, m);
        store(g + i, z / (1.0f + tail_of(z)), m);
      });
    }
  });
}

// gelu'(a) = s + a s (1 - s) 2 t',  2 t' = 2 sqrt(2/pi) (1 + 3 * 0.044715 a^2)
template <class T>
void backward(const BiasGeluBackward& a) {
  const int64_t width = a.shape.width;
  Scratch room(width);
  const float* bias = float_row(a.bias, 0, width, room);
  over_runs(a.shape, a.runs, a.threads, [&](int64_t b, int64_t r, int64_t l0, int64_t l1) {
    float* total = a.part ? a.part.at<float>() + (b * a.runs + r) * width : nullptr;
    if (total != nullptr) memset(total, 0, width * sizeof(float));
    for (int64_t l = l0; l < l1; l++) {
      const T *dg = a.dg.at<T>(b, l), *h = a.h.at<T>(b, l);
      T *dh = a.dh.at<T>(b, l), *g = a.g.at<T>(b, l);
      each(width, [&](int64_t i, auto m, int) {
        vf z = biased(h, bias, i, m);
        vf tail = tail_of(z);
        vf s = 1.0f / (1.0f + tail);
        vf slope = s + z * s * (tail * s) * (TWICE_ROOT * (1.0f + 3.0f * CUBIC * z * z));
        vf d = load(dg + i, m) * slope;
        store(g + i, z / (1.0f + tail), m);
        store(dh + i, d, m);
        if (total != nullptr) store(total + i, load(total + i, m) + d, m);
      });
    }
  });
  if (a.part)
    add_runs(a.part.at<float>(), a.shape.batch * a.runs, width, width, a.dbias.at<float>(), a.threads);
}

}  // namespace

void bias_gelu_forward(const BiasGeluForward& a) {
  with_type(a.h.dtype, [&](auto h) { forward<decltype(h)>(a); });
}

void bias_gelu_backward(const BiasGeluBackward& a) {
  with_type(a.h.dtype, [&](auto h) { backward<decltype(h)>(a); });
}

}  // namespace prfl::PRFL_ISA
