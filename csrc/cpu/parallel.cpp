#include "parallel.h"

#include <dlfcn.h>

#include <algorithm>
#include <atomic>
#include <exception>
#include <mutex>

namespace prfl {
namespace {

// GNU's entry points, which LLVM's and Intel's runtimes export as well.
struct OpenMP {
  void (*parallel)(void (*)(void*), void*, unsigned threads, unsigned flags) = nullptr;
  int (*in_parallel)() = nullptr;
  std::string path;

  OpenMP() {
    // Symbols are looked up through libtorch_cpu, loaded before us: of several runtimes in a process
    // (scikit-learn and Intel's tools bring their own) that finds the one torch is linked to.
    void* torch = dlopen("libtorch_cpu.so", RTLD_NOLOAD | RTLD_LAZY);
    void* from = torch != nullptr ? torch : RTLD_DEFAULT;
    parallel = reinterpret_cast<decltype(parallel)>(dlsym(from, "GOMP_parallel"));
    in_parallel = reinterpret_cast<decltype(in_parallel)>(dlsym(from, "omp_in_parallel"));
    if (torch != nullptr) dlclose(torch);
    Dl_info info;
    if (in_parallel == nullptr) parallel = nullptr;
    if (parallel != nullptr && dladdr(reinterpret_cast<void*>(parallel), &info) != 0)
      path = info.dli_fname;
  }
};

const OpenMP& openmp() {
  static const OpenMP found;
  return found;
}

struct Loop {
  int64_t end, grain;
  LoopBody body;
  void* context;
  std::atomic<int64_t> next;
  std::mutex mutex;
  std::exception_ptr error;

  void work() noexcept {
    for (;;) {
      int64_t i = next.fetch_add(grain, std::memory_order_relaxed);
      if (i >= end) return;
      try {
        body(context, i, std::min(i + grain, end));
      } catch (...) {
        std::lock_guard<std::mutex> lock(mutex);
        error = std::current_exception();
        next.store(end, std::memory_order_relaxed);
      }
    }
  }
};

}  // namespace

std::string openmp_runtime() { return openmp().path; }

void run_parallel(int64_t begin, int64_t end, int64_t grain, int threads, LoopBody body, void* context) {
  if (begin >= end) return;
  grain = std::max<int64_t>(grain, 1);
  const OpenMP& runtime = openmp();
  if (threads <= 1 || end - begin <= grain || runtime.parallel == nullptr || runtime.in_parallel()) {
    for (int64_t i = begin; i < end; i += grain) body(context, i, std::min(i + grain, end));
    return;
  }
  Loop loop{end, grain, body, context, {begin}, {}, {}};
  // Always the whole team, as torch does it: libgomp ends the threads that a smaller one leaves over.
  runtime.parallel([](void* l) { static_cast<Loop*>(l)->work(); }, &loop, threads, 0);
  if (loop.error) std::rethrow_exception(loop.error);
}

}  // namespace prfl
