// Bytes to vectors of numbers and back. What compilers make of vector conversions to and from bytes
// goes lane by lane, hence the intrinsics.
#pragma once

#if defined(__SSE2__)
#include <emmintrin.h>
#endif

#include "simd.h"

namespace tenfold::TENFOLD_ISA {

TENFOLD_INLINE Simd<kLanes>::Int load_bytes(const std::uint8_t* from) {
#if defined(__AVX512F__)
  return reinterpret_cast<Simd<kLanes>::Int>(
      _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from))));
#elif defined(__AVX2__)
  return reinterpret_cast<Simd<kLanes>::Int>(
      _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from))));
#elif defined(__SSE2__)
  std::int32_t four;
  std::memcpy(&four, from, sizeof four);
  const __m128i zero = _mm_setzero_si128();
  const __m128i wide = _mm_unpacklo_epi8(_mm_cvtsi32_si128(four), zero);
  return reinterpret_cast<Simd<kLanes>::Int>(_mm_unpacklo_epi16(wide, zero));
#else
  Simd<kLanes>::Int value;
  for (int lane = 0; lane < kLanes; ++lane) value[lane] = from[lane];
  return value;
#endif
}

// Numbers below 0 become 0, and those above 255 become 255.
TENFOLD_INLINE void store_bytes(std::uint8_t* to, Simd<kLanes>::Int value) {
#if defined(__AVX512F__)
  const __m512i clipped =
      _mm512_max_epi32(reinterpret_cast<__m512i>(value), _mm512_setzero_si512());
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm512_cvtusepi32_epi8(clipped));
#elif defined(__AVX2__)
  const __m256i both = reinterpret_cast<__m256i>(value);
  const __m128i words =
      _mm_packs_epi32(_mm256_castsi256_si128(both), _mm256_extracti128_si256(both, 1));
  _mm_storel_epi64(reinterpret_cast<__m128i*>(to), _mm_packus_epi16(words, words));
#elif defined(__SSE2__)
  const __m128i words = _mm_packs_epi32(reinterpret_cast<__m128i>(value), _mm_setzero_si128());
  const std::int32_t four = _mm_cvtsi128_si32(_mm_packus_epi16(words, words));
  std::memcpy(to, &four, sizeof four);
#else
  for (int lane = 0; lane < kLanes; ++lane) {
    const std::int32_t least = value[lane] < 0 ? 0 : value[lane];
    to[lane] = static_cast<std::uint8_t>(least > 255 ? 255 : least);
  }
#endif
}

}  // namespace tenfold::TENFOLD_ISA
