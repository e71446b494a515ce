// Fresh memory in large pages.
#pragma once

#include <cstdint>

namespace prfl {

// Advise the system to back [address, address + bytes) with 2 MiB pages when it is first written.
void advise_huge_pages(void* address, int64_t bytes);

}  // namespace prfl
