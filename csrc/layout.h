// Between channels-first and channels-last tensors.
#pragma once

namespace tenfold {

// from (batch, rows, columns) -> to (batch, columns, rows).
struct Transpose {
  const float* from;
  float* to;
  long batch, rows, columns;
  int threads;
};

#define TENFOLD_DECLARE(isa)         \
  namespace isa {                    \
  void transpose(const Transpose&);  \
  }
TENFOLD_DECLARE(avx512)
TENFOLD_DECLARE(avx2)
TENFOLD_DECLARE(portable)
#undef TENFOLD_DECLARE

}  // namespace tenfold
