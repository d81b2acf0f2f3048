// The inner product: R outputs x one panel of columns, over the kept weights of one block of K.
//
// A panel is a block of K rows and `width` columns of the activations, packed to lie in L1. Each
// kept weight picks its row of the panel; every multiply-add takes its operand from there, and the
// sums stay in registers. R > 1 keeps enough independent sums in flight on narrow panels.
#pragma once

#include "activation.h"

namespace tenfold::TENFOLD_ISA {

#if defined(__AVX512F__)
constexpr int kMaxVectors = 8;
constexpr bool kHalves = true;  // a panel may end in half a vector
#elif defined(__AVX2__)
constexpr int kMaxVectors = 8;
constexpr bool kHalves = false;
#else
constexpr int kMaxVectors = 8;
constexpr bool kHalves = false;
#endif
constexpr int kMaxWidth = (kMaxVectors + (kHalves ? 1 : 0)) * kLanes;

// Rows of one block times one panel.
struct Step {
  const void* values;         // (rows, slots)
  const std::uint8_t* index;  // (rows, slots)
  long rows;
  long slots;
  const float* panel;
  float* tile;  // (rows, width): sums of earlier blocks, and then of this one too
  bool first;   // there is no earlier block: start from zero
  // The last block may write its outputs at once: out != null.
  float* out;
  const float* add;
  long out_stride;
  int columns;  // of the panel, that are written
  const float* scale;
  const float* bias;
  Clamp clamp;
};

using Micro = void (*)(const Step&);

// The epilogue of one vector of an output row.
template <int lanes, class Sum>
TENFOLD_INLINE void finish(const Sum& sum, float scale, float bias, const float* add, float low,
                           float high, float* out) {
  using S = Simd<lanes>;
  auto y = sum * scale + bias;
  if (add) y += S::load(add);
  y = y < low ? S::broadcast(low) : y;
  S::store(out, y > high ? S::broadcast(high) : y);
}

// The outputs' rows lie pages apart, which hides them from the processor's own prefetching: fetch
// those of the next rows while this one's sums are made.
template <int R, int width>
TENFOLD_INLINE void fetch_ahead(const Step& step, long row) {
  if (row >= step.rows) return;
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
    const long at = (row + r) * step.out_stride;
    for (int column = 0; column < width; column += 16) {
      __builtin_prefetch(step.out + at + column, 1);
      if (step.add) __builtin_prefetch(step.add + at + column);
    }
  }
}

// `step.rows` is a multiple of R.
template <int R, int V, bool half, bool direct, class Value>
void micro(const Step& step) {
  using S = Simd<kLanes>;
  using H = Simd<kHalves ? kLanes / 2 : kLanes>;
  constexpr int kWidth = V * kLanes + (half ? kLanes / 2 : 0);
  const auto* values = static_cast<const Value*>(step.values);
  const std::uint8_t* index = step.index;
  const long slots = step.slots;
  const float* const panel = step.panel;
  float* tile = step.tile;
  const bool first = step.first;

  for (long row = 0; row < step.rows; row += R) {
    typename S::Float sum[R][V > 0 ? V : 1];
    typename H::Float rest[R];
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 16
      for (int v = 0; v < V; ++v) sum[r][v] = S::broadcast(0);
      if (half) rest[r] = H::broadcast(0);
    }
    if (!first) {
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
#pragma GCC unroll 16
        for (int v = 0; v < V; ++v) sum[r][v] = S::load(tile + r * kWidth + v * kLanes);
        if (half) rest[r] = H::load(tile + r * kWidth + V * kLanes);
      }
    }

    if (direct) fetch_ahead<R, kWidth>(step, row + R);
    for (long s = 0; s < slots; ++s) {
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        const float weight = to_float(values[s + r * slots]);
        const float* at = panel + static_cast<std::size_t>(index[s + r * slots]) * kWidth;
#pragma GCC unroll 16
        for (int v = 0; v < V; ++v) sum[r][v] += S::broadcast(weight) * S::load(at + v * kLanes);
        if (half) rest[r] += H::broadcast(weight) * H::load(at + V * kLanes);
      }
    }
    values += R * slots;
    index += R * slots;

    if (!direct) {
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
#pragma GCC unroll 16
        for (int v = 0; v < V; ++v) S::store(tile + r * kWidth + v * kLanes, sum[r][v]);
        if (half) H::store(tile + r * kWidth + V * kLanes, rest[r]);
      }
      tile += R * kWidth;
      continue;
    }
    if (!first) tile += R * kWidth;
    const float low = step.clamp.low, high = step.clamp.high;
    const bool full = step.columns == kWidth;
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const float scale = step.scale ? step.scale[row + r] : 1.0f;
      const float bias = step.bias ? step.bias[row + r] : 0.0f;
      float* const to = step.out + (row + r) * step.out_stride;
      const float* add = step.add ? step.add + (row + r) * step.out_stride : nullptr;
      alignas(64) float edge[kWidth];  // a panel that is not full takes the way round
      float* out = full ? to : edge;
      const auto bytes = static_cast<std::size_t>(step.columns) * sizeof(float);
      if (add && !full) {
        std::memcpy(edge, add, bytes);
        std::memset(edge + step.columns, 0, sizeof edge - bytes);
        add = edge;
      }
#pragma GCC unroll 16
      for (int v = 0; v < V; ++v)
        finish<kLanes>(sum[r][v], scale, bias, add ? add + v * kLanes : nullptr, low, high,
                       out + v * kLanes);
      if constexpr (half)
        finish<kLanes / 2>(rest[r], scale, bias, add ? add + V * kLanes : nullptr, low, high,
                           out + V * kLanes);
      if (!full) std::memcpy(to, edge, bytes);
      if (step.clamp.more) activate_row(to, step.columns, step.clamp.activation);
    }
  }
}

// Rows at once for a panel of so many vectors: what the registers hold.
constexpr int rows_at_once(int vectors) {
  const int most = kLanes == 16 ? 16 : kLanes == 8 ? 8 : 6;
  const int rows = most / (vectors > 0 ? vectors : 1);
  return rows < 1 ? 1 : rows > 4 ? 4 : rows == 3 ? 2 : rows;
}

// A panel's width in vectors, and the kernels for it.
struct Width {
  int vectors;
  bool half;
  int rows;  // that the kernels for many rows take at once
  Micro many, one;                // to the tile
  Micro many_direct, one_direct;  // to the output
  int columns() const { return vectors * kLanes + (half ? kLanes / 2 : 0); }
};

template <int V, bool half, class Value>
Width width_of() {
  constexpr int rows = rows_at_once(V + (half ? 1 : 0));
  return {V,
          half,
          rows,
          micro<rows, V, half, false, Value>,
          micro<1, V, half, false, Value>,
          micro<rows, V, half, true, Value>,
          micro<1, V, half, true, Value>};
}

template <class Value>
Width narrowest(int columns) {
  const int halves = (columns + kLanes / 2 - 1) / (kLanes / 2);
  const int vectors = kHalves ? halves / 2 : (columns + kLanes - 1) / kLanes;
  const bool half = kHalves && halves % 2 != 0;
#define TENFOLD_WIDTH(v)                                \
  case v:                                               \
    if constexpr (kHalves) {                            \
      if (half) return width_of<v, kHalves, Value>();   \
    }                                                   \
    if constexpr (v > 0) return width_of<v, false, Value>(); \
    break;
  switch (vectors) {
    TENFOLD_WIDTH(0)
    TENFOLD_WIDTH(1)
    TENFOLD_WIDTH(2)
    TENFOLD_WIDTH(3)
    TENFOLD_WIDTH(4)
    TENFOLD_WIDTH(5)
    TENFOLD_WIDTH(6)
    TENFOLD_WIDTH(7)
    TENFOLD_WIDTH(8)
    default:
      break;
  }
#undef TENFOLD_WIDTH
  return width_of<1, false, Value>();
}

}  // namespace tenfold::TENFOLD_ISA
