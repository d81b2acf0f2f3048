// Pooling of planes, each a contiguous image of one channel: the problems that the kernels solve.
#pragma once

namespace tenfold {

// x (planes, height, width), out (planes, out_height, out_width). What lies outside of the image
// doesn't count; NaN wins.
struct MaxPool2d {
  const float* x;
  float* out;
  long planes, height, width, out_height, out_width;
  long kernel_height, kernel_width, stride_y, stride_x;
  long padding_y, padding_x, dilation_y, dilation_x;
  bool relu;  // of the result
  int threads;
};

// out (planes): means of x (planes, pixels).
struct MeanPool {
  const float* x;
  float* out;
  long planes, pixels;
  int threads;
};

// `max_pool2d` returns false if it ran out of memory.
#define TENFOLD_DECLARE(isa)           \
  namespace isa {                      \
  bool max_pool2d(const MaxPool2d&);   \
  void mean_pool(const MeanPool&);     \
  }
TENFOLD_DECLARE(avx512)
TENFOLD_DECLARE(avx2)
TENFOLD_DECLARE(portable)
#undef TENFOLD_DECLARE

}  // namespace tenfold
