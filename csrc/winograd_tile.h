// Between tensors and the Winograd domain, a vector of channels at a time: axis by axis, the
// intermediate results in the first-level cache.
#pragma once

#include "activation.h"
#include "winograd_axis.h"

namespace tenfold::TENFOLD_ISA {

constexpr int kMost = 6;  // inputs, and coordinates, of an axis

// Sizes that follow from a problem.
struct Geometry {
  long outputs[3], inputs[3], coordinates[3];  // of a tile
  long tiles[3];                               // of an image
  long v_pitch, m_pitch;                       // floats between the tiles of a column

  explicit Geometry(const Winograd3d& conv) {
    const long sizes[3] = {conv.out_depth, conv.out_height, conv.out_width};
    for (int i = 0; i < 3; ++i) {
      const bool four = conv.axis[i] == Axis::four;
      outputs[i] = four ? 4 : 2;
      inputs[i] = four ? 6 : 4;
      coordinates[i] = four ? 6 : conv.axis[i] == Axis::two ? 4 : 3;
      tiles[i] = ceil_div(sizes[i], outputs[i]);
    }
    v_pitch = ceil_div(conv.channels, 16) * 16;
    m_pitch = ceil_div(conv.outputs, 16) * 16;
  }
  long tiles_an_image() const { return tiles[0] * tiles[1] * tiles[2]; }
  long all() const { return coordinates[0] * coordinates[1] * coordinates[2]; }
};

// Where the kept columns are: place[j] of coordinate j, or -1; mask[a][b] has bit c when a column
// (a, b, c) is kept.
struct Columns {
  int place[kMost * kMost * kMost];
  std::uint8_t mask[kMost][kMost];

  Columns(const Winograd3d& conv, const Geometry& geometry) {
    for (int& each : place) each = -1;
    std::memset(mask, 0, sizeof mask);
    const long h = geometry.coordinates[1], w = geometry.coordinates[2];
    for (long i = 0; i < conv.columns; ++i) {
      const long j = conv.kept[i];
      place[j] = static_cast<int>(i);
      mask[j / w / h][j / w % h] |= static_cast<std::uint8_t>(1u << j % w);
    }
  }
};

// Tiles that lie side by side along the width.
struct Run {
  long image, depth, height, width;  // of the first tile, in tiles
  long count;
  long first;  // its number in the block

  Run(const Geometry& geometry, long tile, long last, long first) : first(first) {
    width = tile % geometry.tiles[2];
    height = tile / geometry.tiles[2] % geometry.tiles[1];
    depth = tile / geometry.tiles[2] / geometry.tiles[1] % geometry.tiles[0];
    image = tile / geometry.tiles_an_image();
    count = smaller(geometry.tiles[2] - width, last - tile);
  }
};

// A vector of channels; the last one may have fewer.
struct Slice {
  long channel;
  int lanes;

  Slice(long channel, long channels)
      : channel(channel), lanes(static_cast<int>(smaller<long>(kLanes, channels - channel))) {}
  bool partial() const { return lanes < kLanes; }
  TENFOLD_INLINE Float load(const float* from) const {
    return partial() ? load_lanes(from, lanes_between(0, lanes)) : Simd<kLanes>::load(from);
  }
  TENFOLD_INLINE void store(float* to, Float value) const {
    if (!partial()) return Simd<kLanes>::store(to, value);
    alignas(64) float whole[kLanes];
    Simd<kLanes>::store(whole, value);
    std::memcpy(to, whole, static_cast<std::size_t>(lanes) * sizeof(float));
  }
};

alignas(64) constexpr float kZeros[16] = {};

// The lines along the width that the tiles of a run see, at one slice of channels.
struct Lines {
  const float* start[kMost][kMost];  // of (depth, height), at width 0; zeros outside of the tensor
  long step[kMost][kMost];           // to the next position; 0 where there are zeros
  Slice slice;

  Lines(const Winograd3d& conv, const Geometry& geometry, const Run& run, const Slice& slice)
      : slice(slice) {
    for (long i = 0; i < geometry.inputs[0]; ++i)
      for (long k = 0; k < geometry.inputs[1]; ++k) {
        const long d = run.depth * geometry.outputs[0] - conv.padding[0] + i;
        const long h = run.height * geometry.outputs[1] - conv.padding[1] + k;
        start[i][k] = kZeros;
        step[i][k] = 0;
        if (d < 0 || d >= conv.depth || h < 0 || h >= conv.height) continue;
        const long line = (run.image * conv.depth + d) * conv.height + h;
        start[i][k] = conv.x + line * conv.width * conv.channels + slice.channel;
        step[i][k] = conv.channels;
      }
  }
};

TENFOLD_INLINE void prefetch_to_write(const float* at) {
#if defined(__x86_64__)
  asm volatile("prefetchw %0" : : "m"(*at));
#else
  __builtin_prefetch(at, 1);
#endif
}

// The inputs of one position along the width, transformed along depth and height: (a, b) vectors.
using Plane = float[kMost * kMost * kLanes];
constexpr long kColumnsAhead = 4;  // positions along the width, to fetch ahead

template <Axis axis>
void along_depth(const Lines& lines, long heights, long w, const Constants& constants,
                 float* plane) {
  using T = Transform<axis>;
  using S = Simd<kLanes>;
  for (long h = 0; h < heights; ++h) {
    Float d[T::kInputs], v[T::kCoordinates];
#pragma GCC unroll 6
    for (int i = 0; i < T::kInputs; ++i) {
      const float* at = lines.start[i][h] + w * lines.step[i][h];
      d[i] = lines.slice.load(at);
      __builtin_prefetch(at + kColumnsAhead * lines.step[i][h]);
    }
    T::input(d, v, constants);
#pragma GCC unroll 6
    for (int a = 0; a < T::kCoordinates; ++a) S::store(plane + (a * kMost + h) * kLanes, v[a]);
  }
}

template <Axis axis>
void along_height(long depths, const Constants& constants, float* plane) {
  using T = Transform<axis>;
  using S = Simd<kLanes>;
  for (long a = 0; a < depths; ++a) {
    Float d[T::kInputs], v[T::kCoordinates];
    float* line = plane + a * kMost * kLanes;
#pragma GCC unroll 6
    for (int i = 0; i < T::kInputs; ++i) d[i] = S::load(line + i * kLanes);
    T::input(d, v, constants);
#pragma GCC unroll 6
    for (int b = 0; b < T::kCoordinates; ++b) S::store(line + b * kLanes, v[b]);
  }
}

// `to` is where this tile and slice lie in the first column.
template <Axis axis>
void along_width(const Geometry& geometry, const Columns& columns, const float* const* planes,
                 const Constants& constants, float* to, long column_pitch) {
  using T = Transform<axis>;
  using S = Simd<kLanes>;
  constexpr unsigned kAll = (1u << T::kCoordinates) - 1;
  const int* place = columns.place;
  for (long a = 0; a < geometry.coordinates[0]; ++a)
    for (long b = 0; b < geometry.coordinates[1]; ++b, place += T::kCoordinates) {
      const unsigned mask = columns.mask[a][b];
      if (mask == 0) continue;
      Float d[T::kInputs], v[T::kCoordinates];
#pragma GCC unroll 6
      for (int i = 0; i < T::kInputs; ++i) d[i] = S::load(planes[i] + (a * kMost + b) * kLanes);
      T::input(d, v, constants);
      if (mask == kAll) {
        float* line = to + place[0] * column_pitch;
#pragma GCC unroll 6
        for (int c = 0; c < T::kCoordinates; ++c) S::store(line + c * column_pitch, v[c]);
      } else {
#pragma GCC unroll 6
        for (int c = 0; c < T::kCoordinates; ++c)
          if (mask & (1u << c)) S::store(to + place[c] * column_pitch, v[c]);
      }
    }
}

template <template <Axis> class Pass, class... Arguments>
TENFOLD_INLINE void choose(Axis axis, Arguments&&... arguments) {
  switch (axis) {
    case Axis::two:
      return Pass<Axis::two>::run(arguments...);
    case Axis::four:
      return Pass<Axis::four>::run(arguments...);
    case Axis::pair:
      return Pass<Axis::pair>::run(arguments...);
  }
}

#define TENFOLD_PASS(name, function)                              \
  template <Axis axis>                                            \
  struct name {                                                   \
    template <class... Arguments>                                 \
    static TENFOLD_INLINE void run(Arguments&&... arguments) {    \
      function<axis>(arguments...);                               \
    }                                                             \
  };
TENFOLD_PASS(AlongDepth, along_depth)
TENFOLD_PASS(AlongHeight, along_height)
TENFOLD_PASS(AlongWidth, along_width)

// The inputs of a run of tiles, for one slice of channels, to V (column, tile, channel).
inline void transform_inputs(const Winograd3d& conv, const Geometry& geometry,
                             const Columns& columns, const Constants& constants, const Run& run,
                             const Slice& slice, float* v, long column_pitch) {
  alignas(64) Plane memory[kMost];
  float* planes[kMost];
  const long inputs = geometry.inputs[2], shift = geometry.outputs[2];
  for (long i = 0; i < inputs; ++i) planes[i] = memory[i];
  const Lines lines(conv, geometry, run, slice);
  for (long tile = 0; tile < run.count; ++tile) {
    const long left = (run.width + tile) * shift - conv.padding[2];
    const long shared = tile > 0 ? inputs - shift : 0;  // positions that the tile before has done
    if (tile > 0) {
      float* before[kMost];
      for (long i = 0; i < inputs; ++i) before[i] = planes[i];
      for (long i = 0; i < inputs; ++i) planes[i] = before[(i + shift) % inputs];
    }
    for (long i = shared; i < inputs; ++i) {
      const long w = left + i;
      if (w < 0 || w >= conv.width) {
        std::memset(planes[i], 0, sizeof(Plane));
        continue;
      }
      choose<AlongDepth>(conv.axis[0], lines, geometry.inputs[1], w, constants, planes[i]);
      choose<AlongHeight>(conv.axis[1], geometry.coordinates[0], constants, planes[i]);
    }
    float* to = v + (run.first + tile) * geometry.v_pitch + slice.channel;
    choose<AlongWidth>(conv.axis[2], geometry, columns, planes, constants, to, column_pitch);
  }
}

// M of a tile, (a, b) lines along the width -> (a, b, w).
template <Axis axis>
void back_width(const Geometry& geometry, const Columns& columns, const float* from,
                long column_pitch, const Constants& constants, float* result) {
  using T = Transform<axis>;
  using S = Simd<kLanes>;
  constexpr unsigned kAll = (1u << T::kCoordinates) - 1;
  const int* place = columns.place;
  for (long a = 0; a < geometry.coordinates[0]; ++a)
    for (long b = 0; b < geometry.coordinates[1]; ++b, place += T::kCoordinates) {
      const unsigned mask = columns.mask[a][b];
      Float m[T::kCoordinates], y[T::kOutputs];
      if (mask == kAll) {
        const float* line = from + place[0] * column_pitch;
#pragma GCC unroll 6
        for (int c = 0; c < T::kCoordinates; ++c) m[c] = S::load(line + c * column_pitch);
      } else {
#pragma GCC unroll 6
        for (int c = 0; c < T::kCoordinates; ++c)
          m[c] = mask & (1u << c) ? S::load(from + place[c] * column_pitch) : S::broadcast(0);
      }
      T::output(m, y, constants);
      float* line = result + (a * kMost + b) * 4 * kLanes;
#pragma GCC unroll 4
      for (int w = 0; w < T::kOutputs; ++w) S::store(line + w * kLanes, y[w]);
    }
}

// (a, b, w) -> (a, h, w), in place.
template <Axis axis>
void back_height(const Geometry& geometry, const Constants& constants, float* result) {
  using T = Transform<axis>;
  using S = Simd<kLanes>;
  for (long a = 0; a < geometry.coordinates[0]; ++a)
    for (long w = 0; w < geometry.outputs[2]; ++w) {
      float* line = result + (a * kMost * 4 + w) * kLanes;
      Float m[T::kCoordinates], y[T::kOutputs];
#pragma GCC unroll 6
      for (int b = 0; b < T::kCoordinates; ++b) m[b] = S::load(line + b * 4 * kLanes);
      T::output(m, y, constants);
#pragma GCC unroll 4
      for (int h = 0; h < T::kOutputs; ++h) S::store(line + h * 4 * kLanes, y[h]);
    }
}

// The outputs of a tile at one slice of channels.
struct Target {
  long start[3];  // the first one's place in its image
  long valid[3];  // how many exist
  long image;
  Slice slice;

  Target(const Winograd3d& conv, const Geometry& geometry, const Run& run, const Slice& slice)
      : start{run.depth * geometry.outputs[0], run.height * geometry.outputs[1],
              run.width * geometry.outputs[2]},
        valid{smaller(geometry.outputs[0], conv.out_depth - start[0]),
              smaller(geometry.outputs[1], conv.out_height - start[1]),
              smaller(geometry.outputs[2], conv.out_width - start[2])},
        image(run.image),
        slice(slice) {}
};

// A tensor of outputs: floats between neighbours of each axis, and the slice's first output.
struct Strides {
  long d, h, w, first;

  // `pool` divides the tensor's sizes and the places in it.
  Strides(const Winograd3d& conv, const Target& target, const long* pool) {
    const long depth = conv.out_depth / pool[0], height = conv.out_height / pool[1];
    w = conv.outputs;
    h = conv.out_width / pool[2] * w;
    d = height * h;
    first = (target.image * depth + target.start[0] / pool[0]) * d +
            target.start[1] / pool[1] * h + target.start[2] / pool[2] * w + target.slice.channel;
  }
  long at(long depth, long height, long width) const {
    return first + depth * d + height * h + width * w;
  }
};

constexpr long kNoPool[3] = {1, 1, 1};

// (a, h, w) -> outputs: to the tensor, or where these are pooled, to (d, h, w) in place.
template <Axis axis>
void back_depth(const Winograd3d& conv, const Target& target, const Strides& full, bool pooled,
                const Constants& constants, float* result) {
  using T = Transform<axis>;
  using S = Simd<kLanes>;
  const Slice& slice = target.slice;
  const Float bias =
      conv.bias ? slice.load(conv.bias + slice.channel) : S::broadcast(0);
  for (long h = 0; h < target.valid[1]; ++h)
    for (long w = 0; w < target.valid[2]; ++w) {
      float* line = result + (h * 4 + w) * kLanes;
      Float m[T::kCoordinates], y[T::kOutputs];
#pragma GCC unroll 6
      for (int a = 0; a < T::kCoordinates; ++a) m[a] = S::load(line + a * kMost * 4 * kLanes);
      T::output(m, y, constants);
#pragma GCC unroll 4
      for (int d = 0; d < T::kOutputs; ++d) {
        if (d >= target.valid[0]) break;
        const long at = full.at(d, h, w);
        Float value = y[d] + bias;
        if (conv.add) value += slice.load(conv.add + at);
        value = activate<kLanes>(value, conv.activation);
        if (pooled) {
          S::store(line + d * kMost * 4 * kLanes, value);
        } else {
          slice.store(conv.out + at, value);
        }
      }
    }
}

// The largest of each window of (d, h, w), NaN before all.
inline void pool(const Winograd3d& conv, const Target& target, const Strides& pooled,
                 const float* result) {
  using S = Simd<kLanes>;
  const long* window = conv.pool;
  for (long d = 0; d < target.valid[0] / window[0]; ++d)
    for (long h = 0; h < target.valid[1] / window[1]; ++h)
      for (long w = 0; w < target.valid[2] / window[2]; ++w) {
        Float most = S::broadcast(-std::numeric_limits<float>::infinity());
        for (long i = d * window[0]; i < (d + 1) * window[0]; ++i)
          for (long j = h * window[1]; j < (h + 1) * window[1]; ++j)
            for (long k = w * window[2]; k < (w + 1) * window[2]; ++k) {
              const Float value = S::load(result + ((i * kMost + j) * 4 + k) * kLanes);
              most = (most > value) | (most != most) ? most : value;
            }
        target.slice.store(conv.out + pooled.at(d, h, w), most);
      }
}

TENFOLD_PASS(BackWidth, back_width)
TENFOLD_PASS(BackHeight, back_height)
TENFOLD_PASS(BackDepth, back_depth)
#undef TENFOLD_PASS

// One slice of the outputs of one tile, from M (column, tile, output).
inline void transform_outputs(const Winograd3d& conv, const Geometry& geometry,
                              const Columns& columns, const Constants& constants, const Run& run,
                              const Slice& slice, const float* m, long column_pitch) {
  alignas(64) float result[kMost * kMost * 4 * kLanes];
  const bool pooled = conv.pool[0] * conv.pool[1] * conv.pool[2] > 1;
  const Target target(conv, geometry, run, slice);
  const Strides full(conv, target, kNoPool);
  if (!pooled)
    for (long d = 0; d < target.valid[0]; ++d)
      for (long h = 0; h < target.valid[1]; ++h)
        for (long w = 0; w < target.valid[2]; ++w) prefetch_to_write(conv.out + full.at(d, h, w));
  const float* from = m + run.first * geometry.m_pitch + slice.channel;
  choose<BackWidth>(conv.axis[2], geometry, columns, from, column_pitch, constants, result);
  choose<BackHeight>(conv.axis[1], geometry, constants, result);
  choose<BackDepth>(conv.axis[0], conv, target, full, pooled, constants, result);
  if (pooled) pool(conv, target, Strides(conv, target, conv.pool), result);
}

}  // namespace tenfold::TENFOLD_ISA
