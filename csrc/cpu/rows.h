// Whole rows, and the sums over rows that do not depend on how many threads there are.
#pragma once

#include "parallel.h"
#include "vec.h"

namespace prfl::PRFL_ISA {

// Row of any type as float32; absent: `otherwise` everywhere.
inline void read_row(const View& a, const void* row, int64_t n, float* out, float otherwise = 0.0f) {
  if (!a) {
    each(n, [&](int64_t i, auto m, int) { store(out + i, all(otherwise), m); });
    return;
  }
  with_type(a.dtype, [&](auto type) {
    const auto* p = static_cast<const decltype(type)*>(row);
    each(n, [&](int64_t i, auto m, int) { store(out + i, load(p + i, m), m); });
  });
}

// out[width] = the sum of part[count][width], rows `step` apart, added one after another.
inline void add_runs(const float* part, int64_t count, int64_t step, int64_t width, float* out, int threads) {
  constexpr int64_t COLUMNS = 1024;
  parallel_for(0, width, COLUMNS, threads, [=](int64_t first, int64_t last) {
    each(last - first, [=](int64_t i, auto m, int) {
      vf total = {};
      for (int64_t r = 0; r < count; r++) total += load(part + r * step + first + i, m);
      store(out + first + i, total, m);
    });
  });
}

}  // namespace prfl::PRFL_ISA
