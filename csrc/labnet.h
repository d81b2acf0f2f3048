// Layers of LAB-Net on maps of whole images: the problems that the kernels solve.
#pragma once

#include <cstdint>

namespace tenfold {

// A map is (row, channel, column). `data` is column 0 of channel 0 of row 0, on a whole cache line;
// `border` reflected columns lie before a row of a channel and behind its last column. There is room
// behind for whole vectors and as many columns.
struct LabnetMap {
  float* data;
  long channels;
  long stride, pitch;  // floats between channels, and between rows
  long border;
};

// A convolution, 1x1 or 3x3 with reflected borders. Without `counts` the weights are dense, in the
// order (four outputs, row or source, channel, column, output of the four), filled up with zeros.
// With them each output has the weights that aren't zero, source by source, and their places in the
// source, channel * kernel + column. Biases are filled up to four.
struct LabnetWeight {
  const float* values;
  const float* bias;  // or null
  const std::int32_t* places;
  const std::int32_t* counts;  // (outputs, sources)
  long outputs, kernel, dilation;
};

constexpr long kLabnetGroup = 4, kLabnetSources = 3, kLabnetConvs = 3;
constexpr float kLabnetSlope = 0.2f;

// Convolutions side by side, then, where there is one, a 1x1 convolution of all their results. Each
// is followed by a leaky ReLU, the last one on request. 3x3 convolutions have one source, whose
// border holds their dilation; a 1x1 one may have several, whose channels come one after the other.
struct LabnetLayer {
  LabnetMap sources[kLabnetSources];
  long source_count;
  LabnetWeight convs[kLabnetConvs];
  long conv_count;
  LabnetWeight merge;  // without outputs where there is none
  LabnetMap add;       // ahead of the last leaky ReLU; without data where there is none
  LabnetMap out;       // its border is written, too
  long height, width;
  bool leaky;
  int threads;
};

// The unbiased variance of each channel's edges: what a 3x3 high-pass of the map gives where it
// meets no border. `memory` has room for 2 * channels * labnet_bands(height).
struct LabnetVariances {
  LabnetMap map;
  const float* highpass;  // (channels, 3, 3)
  double* memory;
  float* out;
  long height, width;
  int threads;
};
constexpr long kLabnetBand = 8;  // rows of edges that are summed up together
constexpr long labnet_bands(long height) { return (height - 2 + kLabnetBand - 1) / kLabnetBand; }

// to[y][c][x] = from[rows[y]][c][columns[x]], and the border of `to`.
struct LabnetResample {
  LabnetMap from, to;
  const std::int32_t* rows;
  const std::int32_t* columns;
  long height, width;  // of `to`
  int threads;
};

// Pixels of a map as rows of their channels, (count, channels), or back into the map. Places are
// row * width + column.
struct LabnetPixels {
  LabnetMap map;
  const std::int64_t* places;
  float* rows;
  long count, width;
  bool back;
  int threads;
};

// Returns false if it ran out of memory.
#define TENFOLD_DECLARE(isa)                           \
  namespace isa {                                      \
  bool labnet_layer(const LabnetLayer&);               \
  void labnet_variances(const LabnetVariances&);       \
  void labnet_resample(const LabnetResample&);         \
  void labnet_pixels(const LabnetPixels&);             \
  }
TENFOLD_DECLARE(avx512)
TENFOLD_DECLARE(avx2)
TENFOLD_DECLARE(portable)
#undef TENFOLD_DECLARE

}  // namespace tenfold
