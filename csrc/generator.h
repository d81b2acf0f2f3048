// A generator that turns one image into another, as a program of convolutions: the problem that the
// kernel solves.
#pragma once

namespace tenfold {

enum class GeneratorOp : int {
  convolution = 0,  // stride 1, borders reflected
  down = 1,         // 3x3, stride 2, zeros around
  up = 2,           // transposed 3x3, stride 2, padding 1, output padding 1
  depthwise = 3,    // 3x3, borders reflected
  pointwise = 4,    // 1x1
};

enum class GeneratorNorm : int {
  none = 0,
  instance = 1,  // mean and variance of each channel of the image
  given = 2,     // scales, then shifts, in the weights
};

enum class GeneratorActivation : int { none = 0, relu = 1, clamp = 2 };

// A convolution, and what is made of the map that it reads: norm, activation, addition of another
// map, in this order. Maps go by number; -1 is the image in `reads` and the result in `writes`.
// Offsets are into the weights; -1 where there is nothing.
struct GeneratorLayer {
  GeneratorOp op;
  long channels, outputs, kernel;
  long reads, writes;
  GeneratorNorm norm;
  GeneratorActivation activation;
  long add;     // a map
  long keep;    // where the map that was made is kept, for later additions
  long weight;  // see kernels/generator.py for the order
  long bias;
  long norms;     // of a given norm
  bool measured;  // an instance norm reads what it writes
};

constexpr long kGeneratorFields = 14;
constexpr long kGeneratorMaps = 4;
// As many outputs have their weights side by side.
constexpr long kGeneratorTile = 8, kSmallGeneratorTile = 4;
constexpr long generator_tile(long outputs) {
  return outputs > kSmallGeneratorTile ? kGeneratorTile : kSmallGeneratorTile;
}

// x (batch, channels, height, width), out (batch, outputs, height, width); the last layer's result
// goes through a hyperbolic tangent. Sides are multiples of 4 where there are strides.
struct Generator {
  const GeneratorLayer* layers;
  long count;
  const float* weights;
  const float* x;
  float* out;
  long batch, height, width;
  float epsilon;  // of the instance norms
  int threads;
};

// Returns false if it ran out of memory.
#define TENFOLD_DECLARE(isa)            \
  namespace isa {                       \
  bool generator(const Generator&);     \
  }
TENFOLD_DECLARE(avx512)
TENFOLD_DECLARE(avx2)
TENFOLD_DECLARE(portable)
#undef TENFOLD_DECLARE

}  // namespace tenfold
