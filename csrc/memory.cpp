#include "memory.h"

#include <cstdlib>
#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace tenfold {
namespace {

constexpr std::size_t kLargePage = std::size_t{2} << 20;

}  // namespace

void advise_large_pages(void* memory, std::size_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  const auto address = reinterpret_cast<std::size_t>(memory);
  const std::size_t first = (address + kLargePage - 1) / kLargePage * kLargePage;
  const std::size_t last = (address + bytes) / kLargePage * kLargePage;
  if (first < last) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#else
  static_cast<void>(memory);
  static_cast<void>(bytes);
#endif
}

LargeScratch::~LargeScratch() { std::free(memory_); }

float* LargeScratch::get(long floats) {
  if (floats <= floats_) return memory_;
  std::free(memory_);
  const std::size_t wanted = static_cast<std::size_t>(floats) * sizeof(float);
  const std::size_t bytes = (wanted + kLargePage - 1) / kLargePage * kLargePage;
  memory_ = static_cast<float*>(std::aligned_alloc(kLargePage, bytes));
  floats_ = memory_ ? static_cast<long>(bytes / sizeof(float)) : 0;
  if (memory_) advise_large_pages(memory_, bytes);
  return memory_;
}

}  // namespace tenfold
