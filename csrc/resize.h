// Images of another size, each pixel a weighted mean of those around its place: the problem that
// the kernel solves. Weights are in fixed point, so that results are the same everywhere.
#pragma once

#include <cstdint>

namespace tenfold {

constexpr int kWeightBits = 22;  // a weight of 1 is 2^22

// Place i of the output is the sum over k < taps of weight[i * taps + k] * input[first[i] + k].
struct ResizeAxis {
  const std::int32_t* first;
  const std::int32_t* weight;
  long taps;
};

// pixels (height, width, channels) to out (channels, out_height, out_width); first along x, then
// along y, rounded in between.
struct Resize {
  const std::uint8_t* pixels;
  std::uint8_t* out;
  long height, width, channels, out_height, out_width;
  ResizeAxis x, y;
};

// false: no memory.
#define TENFOLD_DECLARE(isa)   \
  namespace isa {              \
  bool resize(const Resize&);  \
  }
TENFOLD_DECLARE(avx512)
TENFOLD_DECLARE(avx2)
TENFOLD_DECLARE(portable)
#undef TENFOLD_DECLARE

}  // namespace tenfold
