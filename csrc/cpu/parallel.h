// Loops over torch's own threads. A second pool would fight torch's for the cores.
#pragma once

#include <cstdint>
#include <string>
#include <type_traits>

namespace prfl {

// The OpenMP runtime whose threads are used, as a path; "" where there is none and loops run serially.
std::string openmp_runtime();

using LoopBody = void (*)(void* context, int64_t begin, int64_t end);
void run_parallel(int64_t begin, int64_t end, int64_t grain, int threads, LoopBody body, void* context);

// fn(i, j) over pieces [i, j) of at most `grain` that cover [begin, end), on up to `threads` threads.
// Which thread takes which piece is left to chance: results must not depend on it. Inside another
// parallel region the loop is serial. What fn throws is thrown again here.
template <class F>
void parallel_for(int64_t begin, int64_t end, int64_t grain, int threads, F&& fn) {
  run_parallel(
      begin, end, grain, threads,
      [](void* context, int64_t i, int64_t j) {
        (*static_cast<std::remove_reference_t<F>*>(context))(i, j);
      },
      const_cast<void*>(static_cast<const void*>(&fn)));
}

}  // namespace prfl
