// The Python module of the tests: the launchers of csrc/cuda on cusim, and cusim's own functions.
#include <pybind11/pybind11.h>

#include <cstdint>

#include "bind.h"

extern "C" void cusim_watch(const void* base, size_t bytes);
extern "C" void cusim_eager(int on);
extern "C" uint64_t cusim_traffic(const void* base, int written);

PYBIND11_MODULE(PRFL_MODULE, m) {
  bind_cuda(m);
  m.def("watch", [](intptr_t base, size_t bytes) { cusim_watch(reinterpret_cast<void*>(base), bytes); });
  m.def("eager", [](bool on) { cusim_eager(on); });
  m.def("traffic",
        [](intptr_t base, bool written) { return cusim_traffic(reinterpret_cast<void*>(base), written); });
}
