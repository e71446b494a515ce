#include "isa.h"

#include <atomic>
#include <stdexcept>

namespace prfl {

namespace generic { extern const Kernels table; }
namespace avx2 { extern const Kernels table; }
namespace avx512 { extern const Kernels table; }
namespace avx512_bf16 { extern const Kernels table; }

// The build defines PRFL_HAVE_<ISA> for what the compiler could make; generic is always there.
const std::vector<Build>& builds() {
  static const std::vector<Build> all = {
      {"generic", true, &generic::table},
#ifdef PRFL_HAVE_AVX2
      {"avx2", __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"), &avx2::table},
#endif
#ifdef PRFL_HAVE_AVX512
      {"avx512",
       __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"),
       &avx512::table},
#endif
#ifdef PRFL_HAVE_AVX512_BF16
      {"avx512_bf16",
       __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"),
       &avx512_bf16::table},
#endif
  };
  return all;
}

static const Build& best() {
  const Build* found = nullptr;
  for (const Build& build : builds())
    if (build.runs_here) found = &build;
  return *found;
}

static std::atomic<const Build*> chosen{nullptr};

const Build& active() {
  const Build* build = chosen.load(std::memory_order_relaxed);
  if (build == nullptr) chosen.store(build = &best(), std::memory_order_relaxed);
  return *build;
}

void use_isa(const std::string& name) {
  std::string known;
  const Build* found = name.empty() ? &best() : nullptr;
  for (const Build& build : builds()) {
    if (!build.runs_here) continue;
    if (build.name == name) found = &build;
    known += (known.empty() ? "" : ", ") + std::string(build.name);
  }
  if (found == nullptr)
    throw std::invalid_argument("got instruction set '" + name + "', want one of " + known);
  chosen.store(found, std::memory_order_relaxed);
}

}  // namespace prfl
