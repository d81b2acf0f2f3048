// softmax(q k^T * scale) v, without a mask: the problem that the kernel solves.
#pragma once

namespace tenfold {

// q (batch, heads, queries, depth), k and v (batch, heads, keys, depth); strides in floats over the
// first three axes, the features of a token lie side by side. out (batch, queries, heads, depth).
struct Attention {
  struct Tokens {
    const float* at;
    long batch_stride, head_stride, token_stride;
  };
  Tokens q, k, v;
  float* out;
  long batch, heads, queries, keys, depth;
  float scale;
  int threads;
};

// Returns false if it ran out of memory.
#define TENFOLD_DECLARE(isa)         \
  namespace isa {                    \
  bool attention(const Attention&);  \
  }
TENFOLD_DECLARE(avx512)
TENFOLD_DECLARE(avx2)
TENFOLD_DECLARE(portable)
#undef TENFOLD_DECLARE

}  // namespace tenfold
