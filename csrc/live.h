// The gradient of a convolution's weight at chosen places alone: the problem that the kernels solve.
//
// gradient of weight (o, p) = sum over images and output pixels of
//     gradient[image, y, x, o] * x[image, y * stride_y + row[p], x * stride_x + column[p], channel[p]]
// where pixels outside the image are zeros. A linear layer is one of 1 x 1 over tokens.
#pragma once

#include <cstdint>

namespace tenfold {

struct LiveGradient {
  const float* x;             // (images, height, width, channels)
  const float* gradient;      // (images, out_height, out_width, outputs)
  const std::uint8_t* live;   // (outputs, weights), not zero where the gradient is wanted
  const std::int32_t* channel;  // (weights)
  const std::int32_t* row;      // (weights), of the pixel of output row 0, may be negative
  const std::int32_t* column;   // (weights)
  float* out;                 // (outputs, weights), zeros beforehand
  long images, height, width, channels;
  long out_height, out_width, outputs, weights;
  long stride_y, stride_x;
  long first_row, rows, first_column, columns;  // least row and column, and how many they span
  int threads;
};

// The kernels return false if they ran out of memory.
#define TENFOLD_DECLARE_LIVE(isa) \
  namespace isa {                 \
  bool live_gradient(const LiveGradient&); \
  }
TENFOLD_DECLARE_LIVE(avx512)
TENFOLD_DECLARE_LIVE(avx2)
TENFOLD_DECLARE_LIVE(portable)
#undef TENFOLD_DECLARE_LIVE

}  // namespace tenfold
