// prfl_sim, the module of the tests: the launchers of csrc/cuda on cusim, and what the tests ask of it.
#include "bind.h"

#include <pybind11/stl.h>

#include <tuple>

#include "cuda/bind.cpp"
#include "sim/cusim.h"

PYBIND11_MODULE(prfl_sim, m) {
  bind_cuda(m);
  m.def("watch", [](int64_t base, int64_t bytes) { cusim::watch(reinterpret_cast<void*>(base), bytes); });
  m.def("unwatch", &cusim::unwatch);
  m.def("load_early", &cusim::load_early);
  m.def("use_multiprocessors", [](int number) { cusim::multiprocessors = number; });
  m.def("traffic", [](int64_t base) { return cusim::traffic(reinterpret_cast<void*>(base)); });
  // The launches since the last unwatch: (blocks along x, y, threads, bytes of shared memory, cluster).
  m.def("launches", [] {
    std::vector<std::tuple<unsigned, unsigned, unsigned, size_t, unsigned>> found;
    for (const cusim::Launch& l : cusim::launches())
      found.emplace_back(l.grid.x, l.grid.y, l.block.x, l.shared, l.cluster.x);
    return found;
  });
}
