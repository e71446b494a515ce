#include "memory.h"

#include <sys/mman.h>

namespace prfl {

void advise_huge_pages(void* address, int64_t bytes) {
  constexpr uintptr_t page = 2 << 20;
  const uintptr_t first = (reinterpret_cast<uintptr_t>(address) + page - 1) / page * page;
  const uintptr_t last = (reinterpret_cast<uintptr_t>(address) + bytes) / page * page;
  // A system without large pages refuses; the memory is as good, only slower to come by.
  if (first < last) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
}

}  // namespace prfl
