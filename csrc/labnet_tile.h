// Convolutions of a tile of pixels of one row: sums of some outputs times some vectors of pixels in
// registers.
#pragma once

#include "generator_tile.h"
#include "labnet.h"

namespace tenfold::TENFOLD_ISA {

constexpr long kLabnetVectors = 6;  // of pixels in a tile, at most
// Groups of four outputs that have their sums in registers at once.
constexpr int kMostGroups = kRegisters == 24 ? 2 : 1;

// Negative values times the slope; NaN passes through.
TENFOLD_INLINE Simd<kLanes>::Float leaky(Simd<kLanes>::Float x) {
  return x < 0.0f ? x * kLabnetSlope : x;
}

// What a tile reads: at its first pixel, `count` rows of a map, or rows of several maps.
struct LabnetRows {
  const float* at[kLabnetSources];
  long channels[kLabnetSources];
  long stride[kLabnetSources];
  long count;
};

// Where a tile's sums go.
struct LabnetTarget {
  float* out;
  long stride;       // between outputs
  const float* add;  // or null
  long add_stride;
  bool leaky;
};

// Write the sums of one output.
template <int V>
TENFOLD_INLINE void finish_output(const LabnetTarget& to, long output,
                                  Simd<kLanes>::Float (&sum)[V]) {
  using S = Simd<kLanes>;
  if (to.add) {
    const float* add = to.add + output * to.add_stride;
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) sum[v] += S::load(add + v * kLanes);
  }
  if (to.leaky)
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) sum[v] = leaky(sum[v]);
  float* out = to.out + output * to.stride;
#pragma GCC unroll 8
  for (int v = 0; v < V; ++v) S::store(out + v * kLanes, sum[v]);
}

// G groups of outputs; `size` is a group's number of weights.
template <int G, int V, int K>
void dense_tile(const LabnetRows& rows, long dilation, const float* weight, long size,
                const float* bias, const LabnetTarget& to, long outputs) {
  using S = Simd<kLanes>;
  constexpr int R = 4 * G;
  S::Float sum[R][V];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) sum[r][v] = S::broadcast(bias ? bias[r] : 0.0f);
  const float* w = weight;
  for (long source = 0; source < rows.count; ++source) {
    const float* x = rows.at[source] - (K == 3 ? dilation : 0);
    const long channels = rows.channels[source], stride = rows.stride[source];
    for (long c = 0; c < channels; ++c, x += stride, w += 4 * K) {
#pragma GCC unroll 3
      for (int k = 0; k < K; ++k) {
        S::Float value[V];
#pragma GCC unroll 8
        for (int v = 0; v < V; ++v) value[v] = S::load(x + k * dilation + v * kLanes);
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) {
          const S::Float factor = S::broadcast(w[r / 4 * size + k * 4 + r % 4]);
#pragma GCC unroll 8
          for (int v = 0; v < V; ++v) sum[r][v] += factor * value[v];
        }
      }
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
    if (r < outputs) finish_output<V>(to, r, sum[r]);
}

// One output; `offsets` are those of its weights from the tile's first pixel.
template <int V>
void sparse_tile(const LabnetRows& rows, const float* values, const std::int32_t* offsets,
                 const std::int32_t* counts, float bias, const LabnetTarget& to, long output) {
  using S = Simd<kLanes>;
  S::Float sum[V];
#pragma GCC unroll 8
  for (int v = 0; v < V; ++v) sum[v] = S::broadcast(bias);
  for (long source = 0; source < rows.count; ++source) {
    const float* x = rows.at[source];
    const long count = counts[source];
    for (long i = 0; i < count; ++i) {
      const S::Float factor = S::broadcast(values[i]);
      const float* at = x + offsets[i];
#pragma GCC unroll 8
      for (int v = 0; v < V; ++v) sum[v] += factor * S::load(at + v * kLanes);
    }
    values += count;
    offsets += count;
  }
  finish_output<V>(to, output, sum);
}

}  // namespace tenfold::TENFOLD_ISA
