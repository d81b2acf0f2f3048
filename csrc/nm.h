// N:M sparse weights times dense activations: the problems that the kernels solve.
//
// A row of a weight has `k` values in the order (tile of channels of its group, ky, kx, channel in
// the tile), so that a block needs few channels of the image. They are cut into blocks of
// `block` (the last may be shorter). Of each block its `slots` kept values are stored, with their
// places inside the block: values and index are (blocks, rows, slots), so that a kernel which runs
// all rows over one block reads them in order.
#pragma once

#include <cstdint>

namespace tenfold {

enum class WeightType : int { float32 = 0, bfloat16 = 1, int8 = 2 };
enum class Activation : int { none = 0, relu = 1, relu6 = 2, gelu = 3, silu = 4 };

// y = activation(scale * (W x) + bias + add); scale, bias and add may be null.
struct Weight {
  const void* values;
  const std::uint8_t* index;
  const float* scale;
  const float* bias;
  WeightType type;
  Activation activation;
  long rows;   // outputs, over all groups
  long k;      // weights an output, zeros included
  long tile;   // channels; the last tile may be shorter
  long block;  // of k, a multiple of m
  long slots;  // kept values of a row in a block
};

// x (batch, channels, height, width), out and add (batch, rows, out_height, out_width).
struct Conv2d {
  Weight weight;
  const float* x;
  const float* add;
  float* out;
  long batch, channels, height, width;
  long out_height, out_width;
  long kernel_height, kernel_width, stride_y, stride_x;
  long padding_y, padding_x, dilation_y, dilation_x, groups;
  int threads;
};

// x (tokens, k), out and add (tokens, rows).
struct Linear {
  Weight weight;
  const float* x;
  const float* add;
  float* out;
  long tokens;
  int threads;
};

// The kernels return false if they ran out of memory. `peak` measures the most multiply-adds a second
// of one thread: all operands in registers, or one of them in the first-level cache.
#define TENFOLD_DECLARE(isa)      \
  namespace isa {                 \
  bool nm_conv2d(const Conv2d&);  \
  bool nm_linear(const Linear&);  \
  double peak(bool from_cache);   \
  }
TENFOLD_DECLARE(avx512)
TENFOLD_DECLARE(avx2)
TENFOLD_DECLARE(portable)
#undef TENFOLD_DECLARE

}  // namespace tenfold
