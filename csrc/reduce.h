// A vector's lanes to one number; the largest of vectors without NaN.
#pragma once

#include "simd.h"

namespace tenfold::TENFOLD_ISA {

TENFOLD_INLINE float largest(Simd<kLanes>::Float x) {
#if defined(__AVX512F__)
  return _mm512_reduce_max_ps(x);
#else
  float lane[kLanes];
  Simd<kLanes>::store(lane, x);
  for (int half = kLanes / 2; half > 0; half /= 2)
    for (int i = 0; i < half; ++i) lane[i] = lane[i + half] > lane[i] ? lane[i + half] : lane[i];
  return lane[0];
#endif
}

TENFOLD_INLINE float sum_of(Simd<kLanes>::Float x) {
#if defined(__AVX512F__)
  return _mm512_reduce_add_ps(x);
#else
  float lane[kLanes];
  Simd<kLanes>::store(lane, x);
  for (int half = kLanes / 2; half > 0; half /= 2)
    for (int i = 0; i < half; ++i) lane[i] += lane[i + half];
  return lane[0];
#endif
}

}  // namespace tenfold::TENFOLD_ISA
