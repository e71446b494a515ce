// The kernels of one instruction set, as isa.cpp hands them out.
#include "kernels.h"

namespace prfl::PRFL_ISA {

#define PRFL_DECLARE(name, Arguments) void name(const Arguments&);
PRFL_CPU_KERNELS(PRFL_DECLARE)
#undef PRFL_DECLARE

#define PRFL_ENTRY(name, Arguments) name,
extern const Kernels table;
const Kernels table = {PRFL_CPU_KERNELS(PRFL_ENTRY)};
#undef PRFL_ENTRY

}  // namespace prfl::PRFL_ISA
