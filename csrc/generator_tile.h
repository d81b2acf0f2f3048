// Convolutions of prepared rows: sums of some outputs times some vectors of pixels in registers.
//
// A row holds all channels, one after the other: rows[k] + c * stride is row k of channel c.
#pragma once

#include "generator.h"
#include "simd.h"

namespace tenfold::TENFOLD_ISA {

// What a tile of sums reads and writes.
struct TileProblem {
  const float* const* rows;
  long offset;               // of the tile's first pixel
  long stride;               // between channels
  long second;               // with stride 2: from the odd columns to the even ones
  long channels;
  long kernel_rows;
  const float* weight;  // (channel, row, column, tile)
  const float* bias;    // or null
  float* out;
  long out_stride;  // between outputs
  long outputs;     // those that are stored
};

// How many outputs and vectors have their sums in registers at once.
constexpr int kRegisters =
#if defined(__AVX512F__) || defined(__ARM_NEON)
    24;
#else
    12;
#endif
constexpr int kMostOutputs = kRegisters == 24 ? 8 : 4;
constexpr int most_vectors(int outputs) {
  return kRegisters / outputs < 8 ? kRegisters / outputs : 8;
}

// `tile` outputs have their weights side by side.
template <int V, int R, int K, bool halved, int tile>
TENFOLD_INLINE void convolve_tile(const TileProblem& p) {
  using S = Simd<kLanes>;
  S::Float sum[R][V];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
    const S::Float first = S::broadcast(p.bias ? p.bias[r] : 0.0f);
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) sum[r][v] = first;
  }
  const float* w = p.weight;
  for (long c = 0; c < p.channels; ++c) {
    for (long row = 0; row < p.kernel_rows; ++row, w += K * tile) {
      const float* x = p.rows[row] + p.offset + c * p.stride;
#pragma GCC unroll 8
      for (int k = 0; k < K; ++k) {
        // Padded column 2i + k: even ones lie in the second half of a row.
        const float* at = halved ? (k == 1 ? x : x + p.second + k / 2) : x + k;
        if constexpr (R < V) {  // the fewer operands stay in registers
          S::Float factor[R];
#pragma GCC unroll 8
          for (int r = 0; r < R; ++r) factor[r] = S::broadcast(w[k * tile + r]);
#pragma GCC unroll 8
          for (int v = 0; v < V; ++v) {
            const S::Float value = S::load(at + v * kLanes);
#pragma GCC unroll 8
            for (int r = 0; r < R; ++r) sum[r][v] += factor[r] * value;
          }
        } else {
          S::Float value[V];
#pragma GCC unroll 8
          for (int v = 0; v < V; ++v) value[v] = S::load(at + v * kLanes);
#pragma GCC unroll 8
          for (int r = 0; r < R; ++r) {
            const S::Float factor = S::broadcast(w[k * tile + r]);
#pragma GCC unroll 8
            for (int v = 0; v < V; ++v) sum[r][v] += factor * value[v];
          }
        }
      }
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
    if (r < p.outputs)
#pragma GCC unroll 8
      for (int v = 0; v < V; ++v) S::store(p.out + r * p.out_stride + v * kLanes, sum[r][v]);
}

// Two floats of each pair to where they belong in a row of twice the length.
TENFOLD_INLINE void store_interleaved(float* to, Simd<kLanes>::Float even, Simd<kLanes>::Float odd) {
#if defined(__AVX512F__)
  const __m512i low = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
  const __m512i high =
      _mm512_setr_epi32(8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
  Simd<kLanes>::store(to, _mm512_permutex2var_ps(even, low, odd));
  Simd<kLanes>::store(to + kLanes, _mm512_permutex2var_ps(even, high, odd));
#elif defined(__AVX2__)
  const __m256 low = _mm256_unpacklo_ps(even, odd), high = _mm256_unpackhi_ps(even, odd);
  Simd<kLanes>::store(to, _mm256_permute2f128_ps(low, high, 0x20));
  Simd<kLanes>::store(to + kLanes, _mm256_permute2f128_ps(low, high, 0x31));
#else
  for (int lane = 0; lane < kLanes; ++lane) {
    to[2 * lane] = even[lane];
    to[2 * lane + 1] = odd[lane];
  }
#endif
}

// A row of a transposed convolution. Even columns of the result get w[1] x[i], odd ones
// w[0] x[i + 1] + w[2] x[i]; the three weights lie in the order 1, 0, 2. Even rows take one row of
// the input, odd rows two.
template <int V, int R, int tile>
TENFOLD_INLINE void transposed_tile(const TileProblem& p) {
  using S = Simd<kLanes>;
  S::Float even[R][V], odd[R][V];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
    const S::Float first = S::broadcast(p.bias ? p.bias[r] : 0.0f);
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) even[r][v] = odd[r][v] = first;
  }
  for (long c = 0; c < p.channels; ++c) {
    const float* w = p.weight + c * 9 * tile;
    for (long row = 0; row < p.kernel_rows; ++row, w += 3 * tile) {
      const float* x = p.rows[row] + p.offset + c * p.stride;
      S::Float here[V], next[V];
#pragma GCC unroll 8
      for (int v = 0; v < V; ++v) {
        here[v] = S::load(x + v * kLanes);
        next[v] = S::load(x + v * kLanes + 1);
      }
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        const S::Float a = S::broadcast(w[r]), b = S::broadcast(w[tile + r]),
                       d = S::broadcast(w[2 * tile + r]);
#pragma GCC unroll 8
        for (int v = 0; v < V; ++v) {
          even[r][v] += a * here[v];
          odd[r][v] += b * next[v];
        }
#pragma GCC unroll 8
        for (int v = 0; v < V; ++v) odd[r][v] += d * here[v];
      }
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
    if (r < p.outputs)
#pragma GCC unroll 8
      for (int v = 0; v < V; ++v)
        store_interleaved(p.out + r * p.out_stride + 2 * v * kLanes, even[r][v], odd[r][v]);
}

// Rows of a depthwise convolution of one channel, 3x3; `from` are the T + 2 rows at the left column.
template <int V, int T>
TENFOLD_INLINE void depthwise_tile(const float* const* from, const float* w, float bias,
                                   float* const* to) {
  using S = Simd<kLanes>;
  S::Float sum[T][V], factor[9];
#pragma GCC unroll 9
  for (int i = 0; i < 9; ++i) factor[i] = S::broadcast(w[i]);
#pragma GCC unroll 2
  for (int t = 0; t < T; ++t)
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) sum[t][v] = S::broadcast(bias);
#pragma GCC unroll 4
  for (int k = 0; k < T + 2; ++k)
#pragma GCC unroll 3
    for (int i = 0; i < 3; ++i)
#pragma GCC unroll 8
      for (int v = 0; v < V; ++v) {
        const S::Float x = S::load(from[k] + i + v * kLanes);
#pragma GCC unroll 2
        for (int t = 0; t < T; ++t)
          if (k >= t && k < t + 3) sum[t][v] += factor[(k - t) * 3 + i] * x;
      }
#pragma GCC unroll 2
  for (int t = 0; t < T; ++t)
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) S::store(to[t] + v * kLanes, sum[t][v]);
}

template <auto n>
struct Constant {
  static constexpr auto value = n;
};

// Call f with a compile-time number of vectors.
template <int most, class F>
TENFOLD_INLINE void with_vectors(long vectors, const F& f) {
  if constexpr (most > 1) {
    if (vectors < most) return with_vectors<most - 1>(vectors, f);
  }
  f(Constant<most>{});
}

// Cut `vectors` into pieces of about equal length and call f(first, count) for each.
template <int most, class F>
TENFOLD_INLINE void in_pieces(long vectors, const F& f) {
  const long pieces = ceil_div(vectors, most);
  for (long i = 0; i < pieces; ++i) {
    const long first = vectors * i / pieces, count = vectors * (i + 1) / pieces - first;
    with_vectors<most>(count, [&](auto n) { f(first, n); });
  }
}

}  // namespace tenfold::TENFOLD_ISA
