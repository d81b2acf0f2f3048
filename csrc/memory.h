// Working memory in large pages: the kernels walk over it in strides of many small ones.
#pragma once

#include <cstddef>

namespace tenfold {

// Ask for large pages where whole ones fit in; memory that was touched already isn't changed.
void advise_large_pages(void* memory, std::size_t bytes);

// Memory of one thread, grown when needed and kept; its contents are undefined.
class LargeScratch {
 public:
  LargeScratch() = default;
  LargeScratch(const LargeScratch&) = delete;
  LargeScratch& operator=(const LargeScratch&) = delete;
  ~LargeScratch();

  // Returns null if there is no memory.
  float* get(long floats);

 private:
  float* memory_ = nullptr;
  long floats_ = 0;
};

}  // namespace tenfold
