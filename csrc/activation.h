// Epilogues: scale, bias, residual and activation on vectors of any length.
#pragma once

#include <limits>

#include "nm.h"
#include "simd.h"

namespace tenfold::TENFOLD_ISA {

// exp(x), relative error below 2e-7 on [-87, 88]; clamped outside. Cody-Waite, degree 6.
template <int lanes>
TENFOLD_INLINE typename Simd<lanes>::Float exponential(typename Simd<lanes>::Float x) {
  using S = Simd<lanes>;
  using Float = typename S::Float;
  using Int = typename S::Int;
  x = x < -87.0f ? S::broadcast(-87.0f) : x;
  x = x > 88.0f ? S::broadcast(88.0f) : x;
  constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
  const Float shifted = x * 1.44269504f + kRound;
  const Float n = shifted - kRound;
  Float r = x - n * 0.693359375f;
  r = r + n * 2.12194440e-4f;
  Float p = r * (1.0f / 720) + 1.0f / 120;
  p = p * r + 1.0f / 24;
  p = p * r + 1.0f / 6;
  p = p * r + 0.5f;
  p = p * r * r + r + 1.0f;
  const Int exponent = (reinterpret_cast<Int>(shifted) - 0x4b400000) << 23;
  return reinterpret_cast<Float>(reinterpret_cast<Int>(p) + exponent);
}

// erf(x), absolute error below 5e-7: x P(x^2) / Q(x^2) with the coefficients that Eigen and XLA use,
// clamped where float32 reaches one.
template <int lanes>
TENFOLD_INLINE typename Simd<lanes>::Float error_function(typename Simd<lanes>::Float x) {
  using S = Simd<lanes>;
  using Float = typename S::Float;
  constexpr float kOne = 3.832506856900711f;
  x = x < -kOne ? S::broadcast(-kOne) : x;
  x = x > kOne ? S::broadcast(kOne) : x;
  const Float z = x * x;
  Float p = z * -2.72614225801306e-10f + 2.77068142495902e-08f;
  p = p * z - 2.10102402082508e-06f;
  p = p * z - 5.69250639462346e-05f;
  p = p * z - 7.34990630326855e-04f;
  p = p * z - 2.95459980854025e-03f;
  p = p * z - 1.60960333262415e-02f;
  Float q = z * -1.45660718464996e-05f - 2.13374055278905e-04f;
  q = q * z - 1.68282697438203e-03f;
  q = q * z - 7.37332916720468e-03f;
  q = q * z - 1.42647390514189e-02f;
  return x * p / q;
}

template <int lanes>
TENFOLD_INLINE typename Simd<lanes>::Float activate(typename Simd<lanes>::Float x,
                                                    Activation activation) {
  // Comparisons are written so that NaN passes through.
  using S = Simd<lanes>;
  switch (activation) {
    case Activation::none:
      return x;
    case Activation::relu:
      return x < 0.0f ? S::broadcast(0.0f) : x;
    case Activation::relu6:
      x = x < 0.0f ? S::broadcast(0.0f) : x;
      return x > 6.0f ? S::broadcast(6.0f) : x;
    case Activation::gelu:
      return x * 0.5f * (error_function<lanes>(x * 0.70710678f) + 1.0f);
    case Activation::silu:
      return x / (exponential<lanes>(-x) + 1.0f);
  }
  return x;
}

// In place, for what the kernels have just written.
TENFOLD_INLINE void activate_row(float* row, long length, Activation activation) {
  using S = Simd<kLanes>;
  long i = 0;
  for (; i + kLanes <= length; i += kLanes)
    S::store(row + i, activate<kLanes>(S::load(row + i), activation));
  if (i == length) return;
  float rest[kLanes] = {};
  std::memcpy(rest, row + i, static_cast<std::size_t>(length - i) * sizeof(float));
  S::store(rest, activate<kLanes>(S::load(rest), activation));
  std::memcpy(row + i, rest, static_cast<std::size_t>(length - i) * sizeof(float));
}

// Activations that are a clamp run in registers; the others follow in a second pass.
struct Clamp {
  float low = -std::numeric_limits<float>::infinity();
  float high = std::numeric_limits<float>::infinity();
  Activation activation;
  bool more = false;  // a second pass is needed

  explicit Clamp(Activation activation) : activation(activation) {
    if (activation == Activation::relu || activation == Activation::relu6) low = 0;
    if (activation == Activation::relu6) high = 6;
    more = activation == Activation::gelu || activation == Activation::silu;
  }
};

}  // namespace tenfold::TENFOLD_ISA
