// 3-D convolutions in the Winograd domain: the problem that the kernel solves.
//
// Along each axis a tile of m outputs takes `inputs` neighbouring inputs to `coordinates` products.
// The points that the transforms are made of are 0, a, -a, b, -b and infinity.
#pragma once

#include "nm.h"

namespace tenfold {

enum class Axis : int {
  two = 0,   // F(2,3): 4 inputs, 4 products, points 0, 1, -1
  four = 1,  // F(4,3): 6 inputs, 6 products, points 0, a, -a, b, -b
  pair = 2,  // 2 outputs, the first and last input are padding: 3 products
};

// y = maximum(activation(conv(x) + bias + add)); tensors are channels-last, x (batch, depth, height,
// width, channels) and add (batch, out_depth, out_height, out_width, outputs). In out the sizes are
// divided by the windows of the maximum, rounded down.
struct Winograd3d {
  const float* x;
  const float* weight;  // packed: (kept columns, outputs / 32, channels, 32), zeros behind outputs
  const float* bias;
  const float* add;
  float* out;
  const int* kept;  // coordinates of the kept columns, ascending
  long columns;
  long batch, channels, depth, height, width;
  long outputs, out_depth, out_height, out_width;
  long padding[3];
  Axis axis[3];
  float a, b;  // the points of Axis::four
  Activation activation;
  long pool[3];  // windows of a maximum behind all, 1 or 2; 2 divides the tile's outputs
  int threads;
};

// Returns false if it ran out of memory.
#define TENFOLD_DECLARE(isa) \
  namespace isa {            \
  bool winograd3d(const Winograd3d&); \
  }
TENFOLD_DECLARE(avx512)
TENFOLD_DECLARE(avx2)
TENFOLD_DECLARE(portable)
#undef TENFOLD_DECLARE

}  // namespace tenfold
