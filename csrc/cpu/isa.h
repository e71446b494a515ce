// Which build of the kernels runs: the best one the processor and the system take, unless forced.
#pragma once

#include <string>
#include <vector>

#include "kernels.h"

namespace prfl {

struct Build {
  const char* name;
  bool runs_here;
  const Kernels* kernels;
};

const std::vector<Build>& builds();   // poorest first
const Build& active();
void use_isa(const std::string& name);  // "" for the best; throws std::invalid_argument

inline const Kernels& kernels() { return *active().kernels; }

}  // namespace prfl
