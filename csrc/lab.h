// sRGB to CIE LAB and back, and how far two images lie apart: the problems that the kernels solve.
#pragma once

#include <cstdint>

namespace tenfold {

// Images are (images, 3, pixels). RGB is bytes or floats in [0, 1]: one of the two is null. With
// `codes`, LAB stands for (L / 100, (a + 128) / 255, (b + 128) / 255).
struct LabOfRgb {
  const std::uint8_t* bytes;
  const float* floats;
  float* lab;
  long images, pixels;
  bool codes;
  int threads;
};

// Colours that no screen shows are clipped; bytes are rounded, halves to even ones.
struct RgbOfLab {
  const float* lab;
  std::uint8_t* bytes;
  float* floats;
  long images, pixels;
  bool codes;
  int threads;
};

// For each image, (kErrorKinds, kRegions): the number of pixels, and sums of |dL| + |da| + |db|, of
// their squares, and of the squared differences of bytes, where shadow (images, pixels) is 1, where
// it is 0, and everywhere.
constexpr int kErrorKinds = 4, kRegions = 3;
struct LabErrors {
  const std::uint8_t* a;
  const std::uint8_t* b;
  const std::uint8_t* shadow;
  double* sums;
  long images, pixels;
  int threads;
};

#define TENFOLD_DECLARE(isa)           \
  namespace isa {                      \
  void lab_of_rgb(const LabOfRgb&);    \
  void rgb_of_lab(const RgbOfLab&);    \
  void lab_errors(const LabErrors&);   \
  }
TENFOLD_DECLARE(avx512)
TENFOLD_DECLARE(avx2)
TENFOLD_DECLARE(portable)
#undef TENFOLD_DECLARE

}  // namespace tenfold
