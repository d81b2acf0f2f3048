// The product of one column: rows of V (tiles) times the weight of that column.
//
// Sums of R tiles x some panels of 16 outputs stay in registers. The weight is read in the order
// in which it lies in memory, since for large layers it comes from there.
#pragma once

#include "simd.h"

namespace tenfold::TENFOLD_ISA {

constexpr int kPanel = 16;              // outputs, a cache line
constexpr int kPairLength = 2 * kPanel;  // panels lie in pairs: (pair, channels, 32)

#if defined(__AVX512F__)
constexpr int kMostRows = 14, kMostRowsWide = 7;  // of one pair, and of two pairs at once
constexpr int kMostPanels = 2;
#elif defined(__AVX2__)
constexpr int kMostRows = 6, kMostRowsWide = 0;
constexpr int kMostPanels = 1;
#elif defined(__aarch64__)
constexpr int kMostRows = 6, kMostRowsWide = 0;
constexpr int kMostPanels = 1;
#else
constexpr int kMostRows = 2, kMostRowsWide = 0;
constexpr int kMostPanels = 1;
#endif
constexpr long kFetchAhead = 24;  // channels

struct Product {
  const float* weight;  // of the first panel
  const float* v;       // (rows, channels), rows v_pitch apart
  float* m;             // (rows, outputs), rows m_pitch apart
  long channels, v_pitch, m_pitch;
};

template <int R, int panels>
void product(const Product& given) {
  using S = Simd<kLanes>;
  using Float = typename S::Float;
  constexpr int kVectors = panels * kPanel / kLanes, kInPair = kPairLength / kLanes;
  const float* const weight = given.weight;
  const float* const v = given.v;
  const long v_pitch = given.v_pitch, channels = given.channels;
  const long next_pair = channels * kPairLength;
  Float sum[R][kVectors];
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
    for (int i = 0; i < kVectors; ++i) sum[r][i] = S::broadcast(0);
  for (long c = 0; c < channels; ++c) {
    Float w[kVectors];
#pragma GCC unroll 8
    for (int i = 0; i < kVectors; ++i) {
      const float* at = weight + i / kInPair * next_pair + c * kPairLength + i % kInPair * kLanes;
      w[i] = S::load(at);
      if (i * kLanes % kPanel == 0) __builtin_prefetch(at + kFetchAhead * kPairLength);
    }
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      const Float spread = S::broadcast(v[r * v_pitch + c]);
#pragma GCC unroll 8
      for (int i = 0; i < kVectors; ++i) sum[r][i] += spread * w[i];
    }
  }
  float* m = given.m;
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r, m += given.m_pitch)
#pragma GCC unroll 8
    for (int i = 0; i < kVectors; ++i)
      S::store(m + i / kInPair * kPairLength + i % kInPair * kLanes, sum[r][i]);
}

using Kernel = void (*)(const Product&);

template <int panels, int... R>
Kernel product_of(int rows, std::integer_sequence<int, R...>) {
  constexpr Kernel kernels[] = {product<R + 1, panels>...};
  return kernels[rows - 1];
}

// The kernel for `rows` tiles and 1, 2 or 4 panels.
inline Kernel product_of(int rows, int panels) {
  if constexpr (kMostRowsWide > 0) {
    if (panels == 4)
      return product_of<4>(rows, std::make_integer_sequence<int, kMostRowsWide>());
  }
  if constexpr (kMostPanels > 1) {
    if (panels == 2) return product_of<2>(rows, std::make_integer_sequence<int, kMostRows>());
  }
  return product_of<1>(rows, std::make_integer_sequence<int, kMostRows>());
}

}  // namespace tenfold::TENFOLD_ISA
