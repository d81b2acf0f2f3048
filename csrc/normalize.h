// Layer norm: the problem that the kernel solves.
#pragma once

namespace tenfold {

// out = (x - mean) / sqrt(variance + epsilon) * weight + bias, row by row of x and out (rows,
// features); weight and bias (features) may be null.
struct LayerNorm {
  const float* x;
  const float* weight;
  const float* bias;
  float* out;
  long rows, features;
  float epsilon;
  int threads;
};

#define TENFOLD_DECLARE(isa)          \
  namespace isa {                     \
  void layer_norm(const LayerNorm&);  \
  }
TENFOLD_DECLARE(avx512)
TENFOLD_DECLARE(avx2)
TENFOLD_DECLARE(portable)
#undef TENFOLD_DECLARE

}  // namespace tenfold
