// Structural similarity of a shadow, of what is outside, and of the whole: the problem that the
// kernel solves.
#pragma once

#include <cstdint>

namespace tenfold {

// a and b are bytes (images, channels, height, width) and shadow (images, height, width) is 0 or 1.
// For each image and region, `out` (images, 3) is the mean over the pixels that have a whole window
// of 11 x 11. A region's is that of both images with the other region set to 0.
struct RegionSsim {
  const std::uint8_t* a;
  const std::uint8_t* b;
  const std::uint8_t* shadow;
  double* out;
  long images, channels, height, width;
  int threads;
};

#define TENFOLD_DECLARE(isa)            \
  namespace isa {                       \
  void region_ssim(const RegionSsim&);  \
  }
TENFOLD_DECLARE(avx512)
TENFOLD_DECLARE(avx2)
TENFOLD_DECLARE(portable)
#undef TENFOLD_DECLARE

}  // namespace tenfold
