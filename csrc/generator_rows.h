// Rows of maps: what a convolution reads is made of them, and what it wrote is measured.
//
// A map is (row, channel, column), so that a thread's rows of all channels lie together. Its columns
// are filled up to whole vectors; what stands there is never used.
#pragma once

#include "generator.h"
#include "reduce.h"

namespace tenfold::TENFOLD_ISA {

constexpr long whole_vectors(long columns) { return ceil_div(columns, kLanes) * kLanes; }

// Floats of a row of one channel of a map: pairs of vectors, as transposed convolutions write them.
constexpr long map_stride(long columns) { return ceil_div(columns, 2 * kLanes) * 2 * kLanes; }

struct Map {
  float* data;
  long channels, width;
  long stride, pitch;  // between channels, and between rows

  float* row(long y) const { return data + y * pitch; }
  // Some of the channels.
  Map part(long first, long count) const {
    return {data ? data + first * stride : nullptr, count, width, stride, pitch};
  }
};

// How columns lie in a prepared row of one channel: `lead` floats, of which the last are the left
// border, then the columns, then the right border. Rows that are read with stride 2 have two such
// parts: the padded row's odd columns, then its even ones.
struct PreparedRow {
  static constexpr long lead = 16;
  long part, stride;  // of the first half of a channel, and of a channel

  PreparedRow(long width, long padding, bool halved)
      : part(lead + whole_vectors(halved ? width / 2 : width) + ceil_div(padding + 1, 16) * 16 +
             kLanes),
        stride(halved ? 2 * part : part) {}
};

// Even and odd lanes of two neighbouring vectors.
TENFOLD_INLINE void part_lanes(Simd<kLanes>::Float a, Simd<kLanes>::Float b,
                               Simd<kLanes>::Float& even, Simd<kLanes>::Float& odd) {
#if defined(__AVX512F__)
  const __m512i evens =
      _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
  even = _mm512_permutex2var_ps(a, evens, b);
  odd = _mm512_permutex2var_ps(a, _mm512_add_epi32(evens, _mm512_set1_epi32(1)), b);
#elif defined(__AVX2__)
  const __m256 e = _mm256_shuffle_ps(a, b, 0x88), o = _mm256_shuffle_ps(a, b, 0xdd);
  even = _mm256_castpd_ps(_mm256_permute4x64_pd(_mm256_castps_pd(e), 0xd8));
  odd = _mm256_castpd_ps(_mm256_permute4x64_pd(_mm256_castps_pd(o), 0xd8));
#else
  for (int lane = 0; lane < kLanes / 2; ++lane) {
    even[lane] = a[2 * lane];
    even[lane + kLanes / 2] = b[2 * lane];
    odd[lane] = a[2 * lane + 1];
    odd[lane + kLanes / 2] = b[2 * lane + 1];
  }
#endif
}

// What a row of one channel is made of: x * scale + shift [ReLU or clamp] [+ add], which is kept
// where that is asked for. NaN passes through.
struct Source {
  const float* x;
  float scale, shift;
  const float* add;  // null without
  float* keep;       // null without
};

template <GeneratorActivation activation, bool add, bool keep>
TENFOLD_INLINE Simd<kLanes>::Float make(const Source& from, long i) {
  using S = Simd<kLanes>;
  S::Float x = S::load(from.x + i) * S::broadcast(from.scale) + S::broadcast(from.shift);
  if constexpr (activation == GeneratorActivation::relu) x = x < 0.0f ? S::broadcast(0.0f) : x;
  if constexpr (activation == GeneratorActivation::clamp) {
    x = x < -1.0f ? S::broadcast(-1.0f) : x;
    x = x > 1.0f ? S::broadcast(1.0f) : x;
  }
  if constexpr (add) x += S::load(from.add + i);
  if constexpr (keep) S::store(from.keep + i, x);
  return x;
}

// Reflect column `i`, which may lie up to width - 1 outside.
constexpr long reflected(long i, long width) {
  return i < 0 ? -i : i >= width ? 2 * (width - 1) - i : i;
}

// Make a row of one channel, with borders that are reflected or zero.
template <GeneratorActivation activation, bool add, bool keep>
TENFOLD_INLINE void make_row(const Source& from, long width, long padding, bool reflect,
                             float* row) {
  using S = Simd<kLanes>;
  float* to = row + PreparedRow::lead;
  for (long i = 0; i < width; i += kLanes) S::store(to + i, make<activation, add, keep>(from, i));
  for (long i = 1; i <= padding; ++i) {
    to[-i] = reflect ? to[reflected(-i, width)] : 0.0f;
    to[width - 1 + i] = reflect ? to[reflected(width - 1 + i, width)] : 0.0f;
  }
}

// Make a row that is read with stride 2: padded column i + 1 is column i, so even columns come to
// the odd half.
template <GeneratorActivation activation>
TENFOLD_INLINE void make_halved_row(const Source& from, long width, long part, float* row) {
  using S = Simd<kLanes>;
  float* odds = row + PreparedRow::lead;
  float* evens = odds + part;
  for (long i = 0; i < width; i += 2 * kLanes) {  // maps have pairs of vectors
    S::Float even, odd;
    part_lanes(make<activation, false, false>(from, i),
               make<activation, false, false>(from, i + kLanes), even, odd);
    S::store(odds + i / 2, even);
    S::store(evens + i / 2 + 1, odd);
  }
  evens[0] = 0;
}

// Sums over a band of rows of what deviates from one of its values, for each channel and lane.
struct BandSums {
  float* origin;  // (channels)
  float* sums;    // (channels, 2, kLanes): of the deviations and of their squares

  static long floats(long channels) { return whole_vectors(channels) + channels * 2 * kLanes; }
  BandSums(float* memory, long channels)
      : origin(memory), sums(memory + whole_vectors(channels)) {}

  // `fresh`: the rows are a band's first ones.
  void add_rows(const Map& map, long y, long rows, bool fresh) const {
    using S = Simd<kLanes>;
    S::Int lane;
    for (int i = 0; i < kLanes; ++i) lane[i] = i;
    const long whole = map.width / kLanes * kLanes;
    const S::Int inside = lane < static_cast<std::int32_t>(map.width - whole);
    const float* first = map.row(y);
    for (long c = 0; c < map.channels; ++c, first += map.stride) {
      float* to = sums + c * 2 * kLanes;
      if (fresh) origin[c] = first[map.width / 2];
      const S::Float from = S::broadcast(origin[c]);
      S::Float sum[2] = {S::broadcast(0), S::broadcast(0)}, squares[2] = {sum[0], sum[0]};
      if (!fresh) sum[0] = S::load(to), squares[0] = S::load(to + kLanes);
      for (long r = 0; r < rows; ++r) {
        const float* row = first + r * map.pitch;
        long i = 0;
        for (; i + 2 * kLanes <= whole; i += 2 * kLanes)
#pragma GCC unroll 2
          for (int j = 0; j < 2; ++j) {
            const S::Float value = S::load(row + i + j * kLanes) - from;
            sum[j] += value;
            squares[j] += value * value;
          }
        if (i < whole) {
          const S::Float value = S::load(row + i) - from;
          sum[1] += value;
          squares[1] += value * value;
        }
        if (whole < map.width) {
          S::Float value = S::load(row + whole) - from;
          value = reinterpret_cast<S::Float>(reinterpret_cast<S::Int>(value) & inside);
          sum[0] += value;
          squares[0] += value * value;
        }
      }
      S::store(to, sum[0] + sum[1]);
      S::store(to + kLanes, squares[0] + squares[1]);
    }
  }

  // Write each channel's mean and sum of squared deviations from it, of `pixels`.
  void finish(long channels, long pixels, double* means, double* squares) const {
    using S = Simd<kLanes>;
    const auto count = static_cast<double>(pixels);
    for (long c = 0; c < channels; ++c) {
      const double sum = sum_of(S::load(sums + c * 2 * kLanes));
      means[c] = origin[c] + sum / count;
      squares[c] = sum_of(S::load(sums + c * 2 * kLanes + kLanes)) - sum * sum / count;
    }
  }
};

// Scales and shifts of an instance norm, from the bands' means and squares; bands have `rows` rows
// but the last, which has what is left of the height.
inline void norms_of(const double* means, const double* squares, long channels, long rows,
                     long height, long width, float epsilon, double* memory, float* scale,
                     float* shift) {
  const long bands = ceil_div(height, rows);
  const auto pixels = static_cast<double>(height * width);
  double* mean = memory;
  double* total = memory + channels;
  for (long c = 0; c < channels; ++c) mean[c] = total[c] = 0;
  const auto count = [&](long band) {
    return static_cast<double>(smaller(rows, height - band * rows) * width);
  };
  for (long band = 0; band < bands; ++band)
    for (long c = 0; c < channels; ++c) mean[c] += means[band * channels + c] * (count(band) / pixels);
  for (long band = 0; band < bands; ++band)
    for (long c = 0; c < channels; ++c) {
      const double away = means[band * channels + c] - mean[c];
      total[c] += squares[band * channels + c] + away * away * count(band);
    }
  for (long c = 0; c < channels; ++c) {
    const double variance = total[c] / pixels;
    const double factor = 1.0 / __builtin_sqrt((variance > 0 ? variance : 0) + epsilon);
    scale[c] = static_cast<float>(factor);
    shift[c] = static_cast<float>(-mean[c] * factor);
  }
}

}  // namespace tenfold::TENFOLD_ISA
