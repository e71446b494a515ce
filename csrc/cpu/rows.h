// Whole rows of tokens, and the sums over tokens that do not depend on how many threads there are.
#pragma once

#include "kernels.h"
#include "parallel.h"
#include "vec.h"

namespace prfl::PRFL_ISA {

// A row of [rows, n], or of a pair of them in [rows, 2, n], as float32: itself, or a copy in `room`; null where
// the tensor is absent.
inline const float* float_row(const View& a, int64_t row, int64_t n, float* room, int64_t side = 0) {
  if (!a) return nullptr;
  if (a.dtype == DType::f32) return a.at<float>(row, side);
  const bf16* p = a.at<bf16>(row, side);
  each(n, [&](int64_t i, auto m, int) { store(room + i, load(p + i, m), m); });
  return room;
}

constexpr int64_t CACHES = 1 << 24;  // bytes of a result that will not be found there by what reads it

// Writes rows of one result: around the caches if it is larger than they are and its rows are aligned; for
// no View in particular, through them.
template <class T>
class Writer {
 public:
  Writer(const View& out, const Shape& shape)
      : around_(shape.batch * shape.length * shape.width * int64_t(sizeof(T)) > CACHES && aligned(out)) {}
  void operator()(T* p, vf a, Full m) const { around_ ? store_around(p, a) : store(p, a, m); }
  void operator()(T* p, vf a, Tail m) const { store(p, a, m); }

 private:
  static bool aligned(const View& out) {
    const int64_t values = 64 / sizeof(T);
    return out && reinterpret_cast<uintptr_t>(out.data) % 64 == 0 && out.stride[0] % values == 0 &&
           out.stride[1] % values == 0;
  }
  bool around_;
};

constexpr int64_t PIECE = 1 << 15;  // values that are worth waking a thread for

inline int threads_for(int64_t values, int threads) { return values > PIECE ? threads : 1; }

// fn(b, l0, l1) for tokens [l0, l1) of sample b, in pieces of about PIECE values.
template <class F>
inline void over_tokens(const Shape& shape, int threads, F&& fn) {
  const int64_t grain = 1 + PIECE / shape.width;
  const int64_t pieces = (shape.length + grain - 1) / grain;
  threads = threads_for(shape.batch * shape.length * shape.width, threads);
  parallel_for(0, shape.batch * pieces, 1, threads, [&](int64_t piece, int64_t) {
    const int64_t first = piece % pieces * grain;
    fn(piece / pieces, first, min(first + grain, shape.length));
    fence();
  });
}

// fn(b, r, l0, l1) for the tokens [l0, l1) of run r of sample b.
template <class F>
inline void over_runs(const Shape& shape, const Runs& runs, int threads, F&& fn) {
  threads = threads_for(shape.batch * shape.length * shape.width, threads);
  parallel_for(0, shape.batch * runs.count, 1, threads, [&](int64_t piece, int64_t) {
    const int64_t r = piece % runs.count, end = r < runs.before ? runs.boundary : shape.length;
    const int64_t first = r * runs.tokens + (r < runs.before ? 0 : runs.boundary - runs.before * runs.tokens);
    fn(piece / runs.count, r, min(first, end), min(first + runs.tokens, end));
    fence();
  });
}

// All runs of a sample equally long.
template <class F>
inline void over_runs(const Shape& shape, int64_t runs, int threads, F&& fn) {
  over_runs(shape, Runs{runs, (shape.length + runs - 1) / runs, 0, 0}, threads, fn);
}

// out[width] = the sum of `count` rows of part, `step` apart, added one after another.
inline void add_runs(const float* part, int64_t count, int64_t step, int64_t width, float* out, int threads) {
  parallel_for(0, width, 1024, threads_for(count * width, threads), [=](int64_t first, int64_t last) {
    each(last - first, [=](int64_t i, auto m, int) {
      vf total = {};
      for (int64_t r = 0; r < count; r++) total += load(part + r * step + first + i, m);
      store(out + first + i, total, m);
    });
  });
}

}  // namespace prfl::PRFL_ISA
