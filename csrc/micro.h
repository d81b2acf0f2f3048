// The inner product: R outputs x one panel of columns, over the kept weights of one block of K.
//
// A panel is a block of K rows and `width` columns of the activations, packed to lie in L1. Each
// kept weight picks its row of the panel; every multiply-add takes its operand from there, and the
// sums stay in registers. R > 1 keeps enough independent sums in flight on narrow panels.
#pragma once

#include "activation.h"

namespace tenfold::TENFOLD_ISA {

#if defined(__AVX512F__)
constexpr int kMaxVectors = 4;
constexpr bool kHalves = true;  // a panel may end in half a vector
#elif defined(__AVX2__)
constexpr int kMaxVectors = 8;
constexpr bool kHalves = false;
#else
constexpr int kMaxVectors = 8;
constexpr bool kHalves = false;
#endif
constexpr int kMaxWidth = (kMaxVectors + (kHalves ? 1 : 0)) * kLanes;

// What a kernel does with R rows of one block.
struct Step {
  const void* values;  // row r starts at r * slots values
  const std::uint8_t* index;
  long slots;  // of a row in this block
  const float* panel;
  float* tile;           // sums of earlier blocks, row stride = the panel's width
  bool first;            // no earlier block: start from zero
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

template <int R, int V, bool half, class Value>
void micro(const Step& step) {
  using S = Simd<kLanes>;
  using H = Simd<kHalves ? kLanes / 2 : kLanes>;
  constexpr int kWidth = V * kLanes + (half ? kLanes / 2 : 0);
  typename S::Float sum[R][V > 0 ? V : 1];
  typename H::Float rest[R];

#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
    const float* tile = step.tile + r * kWidth;
#pragma GCC unroll 16
    for (int v = 0; v < V; ++v)
      sum[r][v] = step.first ? S::broadcast(0) : S::load(tile + v * kLanes);
    if (half) rest[r] = step.first ? H::broadcast(0) : H::load(tile + V * kLanes);
  }

  const auto* values = static_cast<const Value*>(step.values);
  const std::uint8_t* index = step.index;
  const long slots = step.slots;
  const float* panel = step.panel;
  for (long s = 0; s < slots; ++s) {
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const float weight = to_float(values[s + r * slots]);
      const float* row = panel + static_cast<std::size_t>(index[s + r * slots]) * kWidth;
#pragma GCC unroll 16
      for (int v = 0; v < V; ++v) sum[r][v] += S::broadcast(weight) * S::load(row + v * kLanes);
      if (half) rest[r] += H::broadcast(weight) * H::load(row + V * kLanes);
    }
  }

  if (step.out == nullptr) {
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      float* tile = step.tile + r * kWidth;
#pragma GCC unroll 16
      for (int v = 0; v < V; ++v) S::store(tile + v * kLanes, sum[r][v]);
      if (half) H::store(tile + V * kLanes, rest[r]);
    }
    return;
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
    const float scale = step.scale ? step.scale[r] : 1.0f;
    const float bias = step.bias ? step.bias[r] : 0.0f;
    alignas(64) float edge[kWidth];  // a panel that is not full takes the way round
    const bool full = step.columns == kWidth;
    float* out = full ? step.out + r * step.out_stride : edge;
    const float* add = step.add ? step.add + r * step.out_stride : nullptr;
    if (add && !full) {
      std::memcpy(edge, add, static_cast<std::size_t>(step.columns) * sizeof(float));
      std::memset(edge + step.columns, 0,
                  static_cast<std::size_t>(kWidth - step.columns) * sizeof(float));
      add = edge;
    }
    const auto low = step.clamp.low, high = step.clamp.high;
#pragma GCC unroll 16
    for (int v = 0; v < V; ++v) {
      auto y = sum[r][v] * scale + bias;
      if (add) y += S::load(add + v * kLanes);
      y = y < low ? S::broadcast(low) : y;
      S::store(out + v * kLanes, y > high ? S::broadcast(high) : y);
    }
    if (half) {
      auto y = rest[r] * scale + bias;
      if (add) y += H::load(add + V * kLanes);
      y = y < low ? H::broadcast(low) : y;
      H::store(out + V * kLanes, y > high ? H::broadcast(high) : y);
    }
    if (!full)
      std::memcpy(step.out + r * step.out_stride, edge,
                  static_cast<std::size_t>(step.columns) * sizeof(float));
  }
}

// Rows at once for a panel of so many vectors: about eight sums in registers.
constexpr int rows_at_once(int vectors) {
  const int most = kLanes == 16 ? 8 : kLanes == 8 ? 8 : 6;
  const int rows = most / (vectors > 0 ? vectors : 1);
  return rows < 1 ? 1 : rows > 4 ? 4 : rows == 3 ? 2 : rows;
}

// A panel's width in vectors, and the kernels for it.
struct Width {
  int vectors;
  bool half;
  int rows;      // that `many` takes
  Micro many, one;
  int columns() const { return vectors * kLanes + (half ? kLanes / 2 : 0); }
};

template <int V, bool half, class Value>
Width width_of() {
  constexpr int rows = rows_at_once(V + (half ? 1 : 0));
  return {V, half, rows, micro<rows, V, half, Value>, micro<1, V, half, Value>};
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
#if !defined(__AVX512F__)
    TENFOLD_WIDTH(5)
    TENFOLD_WIDTH(6)
    TENFOLD_WIDTH(7)
    TENFOLD_WIDTH(8)
#endif
    default:
      break;
  }
#undef TENFOLD_WIDTH
  return width_of<1, false, Value>();
}

}  // namespace tenfold::TENFOLD_ISA
