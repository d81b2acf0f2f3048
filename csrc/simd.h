// Vectors of the instruction set that this file is compiled for, in the namespace TENFOLD_ISA.
//
// GCC's and Clang's vector types carry the arithmetic; intrinsics only do what those can't: masked
// loads, gathers, transposes. Everything is in a namespace of its own and nothing of the standard
// library is instantiated here: the linker must not hand AVX-512 code to a smaller processor.
#pragma once

#include <cstdint>
#include <cstring>
#include <utility>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#define TENFOLD_INLINE inline __attribute__((always_inline))

namespace tenfold::TENFOLD_ISA {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

template <class T>
constexpr T smaller(T a, T b) { return a < b ? a : b; }
constexpr long ceil_div(long a, long b) { return (a + b - 1) / b; }

template <int lanes>
struct Simd {
  typedef float Float __attribute__((vector_size(4 * lanes)));
  typedef std::int32_t Int __attribute__((vector_size(4 * lanes)));
  typedef float Unaligned __attribute__((vector_size(4 * lanes), aligned(4), may_alias));

  static TENFOLD_INLINE Float load(const float* from) {
    return *reinterpret_cast<const Unaligned*>(from);
  }
  static TENFOLD_INLINE void store(float* to, Float value) {
    *reinterpret_cast<Unaligned*>(to) = value;
  }
  static TENFOLD_INLINE Float broadcast(float value) {
    // Becomes one instruction; adding to a vector of zeros would stay an addition.
    return [value]<int... lane>(std::integer_sequence<int, lane...>) {
      return Float{(static_cast<void>(lane), value)...};
    }(std::make_integer_sequence<int, lanes>{});
  }
};

// A choice of lanes of a vector, in the form that loads want.
struct Lanes {
#if defined(__AVX512F__)
  __mmask16 mask;
  std::uint32_t spread;  // the same lanes of every second float
#else
  int begin, end;
#endif
};

TENFOLD_INLINE Lanes lanes_between(int begin, int end) {
#if defined(__AVX512F__)
  const std::uint32_t lanes = ((1u << end) - 1u) & ~((1u << begin) - 1u);
  return {static_cast<__mmask16>(lanes), _pdep_u32(lanes, 0x55555555u)};
#else
  return {begin, end};
#endif
}

#if defined(__AVX2__) && !defined(__AVX512F__)
TENFOLD_INLINE __m256i lane_mask(Lanes lanes) {
  const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  return _mm256_andnot_si256(_mm256_cmpgt_epi32(_mm256_set1_epi32(lanes.begin), lane),
                             _mm256_cmpgt_epi32(_mm256_set1_epi32(lanes.end), lane));
}
#endif

// The chosen lanes from memory, zeros elsewhere; the other lanes' memory is never touched.
TENFOLD_INLINE Simd<kLanes>::Float load_lanes(const float* from, Lanes lanes) {
#if defined(__AVX512F__)
  return _mm512_maskz_loadu_ps(lanes.mask, from);
#elif defined(__AVX2__)
  return _mm256_maskload_ps(from, lane_mask(lanes));
#else
  Simd<kLanes>::Float value{};
  for (int lane = lanes.begin; lane < lanes.end; ++lane) value[lane] = from[lane];
  return value;
#endif
}

// The same with lane i from from[2 * i].
TENFOLD_INLINE Simd<kLanes>::Float load_even(const float* from, Lanes lanes) {
#if defined(__AVX512F__)
  const __m512 low = _mm512_maskz_loadu_ps(static_cast<__mmask16>(lanes.spread), from);
  const __m512 high = _mm512_maskz_loadu_ps(static_cast<__mmask16>(lanes.spread >> 16), from + 16);
  const __m512i even =
      _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
  return _mm512_permutex2var_ps(low, even, high);
#else
  Simd<kLanes>::Float value{};
  for (int lane = lanes.begin; lane < lanes.end; ++lane) value[lane] = from[2 * lane];
  return value;
#endif
}

// Vectors without a lane in common.
TENFOLD_INLINE Simd<kLanes>::Float merge(Simd<kLanes>::Float a, Simd<kLanes>::Float b) {
  using S = Simd<kLanes>;
  return reinterpret_cast<S::Float>(reinterpret_cast<S::Int>(a) | reinterpret_cast<S::Int>(b));
}

// Transpose 8 x 8 floats.
TENFOLD_INLINE void transpose8(const float* from, long from_stride, float* to, long to_stride) {
#if defined(__AVX2__)
  __m256 r[8], t[8];
  for (int i = 0; i < 8; ++i) r[i] = _mm256_loadu_ps(from + i * from_stride);
  for (int i = 0; i < 8; i += 2) {
    t[i] = _mm256_unpacklo_ps(r[i], r[i + 1]);
    t[i + 1] = _mm256_unpackhi_ps(r[i], r[i + 1]);
  }
  for (int i = 0; i < 8; i += 4) {
    r[i] = _mm256_shuffle_ps(t[i], t[i + 2], 0x44);
    r[i + 1] = _mm256_shuffle_ps(t[i], t[i + 2], 0xee);
    r[i + 2] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0x44);
    r[i + 3] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0xee);
  }
  for (int i = 0; i < 4; ++i) {
    _mm256_storeu_ps(to + i * to_stride, _mm256_permute2f128_ps(r[i], r[i + 4], 0x20));
    _mm256_storeu_ps(to + (i + 4) * to_stride, _mm256_permute2f128_ps(r[i], r[i + 4], 0x31));
  }
#else
  for (int i = 0; i < 8; ++i)
    for (int j = 0; j < 8; ++j) to[j * to_stride + i] = from[i * from_stride + j];
#endif
}

TENFOLD_INLINE float to_float(float value) { return value; }
TENFOLD_INLINE float to_float(std::int8_t value) { return static_cast<float>(value); }
TENFOLD_INLINE float to_float(std::uint16_t bfloat16) {
  const std::uint32_t bits = static_cast<std::uint32_t>(bfloat16) << 16;
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

}  // namespace tenfold::TENFOLD_ISA
