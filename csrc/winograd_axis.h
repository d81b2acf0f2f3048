// Winograd's transforms along one axis, on vectors: B^T of the inputs, A^T of the products.
//
// The points come in pairs of opposite sign, so a pair's two products share their even and their
// odd part. That halves the work.
#pragma once

#include "simd.h"
#include "winograd.h"

namespace tenfold::TENFOLD_ISA {

using Float = Simd<kLanes>::Float;

// The constants of Axis::four.
struct Constants {
  Float a, b, a2, b2, a3, b3, product, sum;  // product a^2 b^2, sum a^2 + b^2

  Constants(float pa, float pb) {
    using S = Simd<kLanes>;
    const double x = pa, y = pb;
    const auto spread = [](double value) { return S::broadcast(static_cast<float>(value)); };
    a = spread(x);
    b = spread(y);
    a2 = spread(x * x);
    b2 = spread(y * y);
    a3 = spread(x * x * x);
    b3 = spread(y * y * y);
    product = spread(x * x * y * y);
    sum = spread(x * x + y * y);
  }
};

template <Axis axis>
struct Transform;

template <>
struct Transform<Axis::two> {
  static constexpr int kInputs = 4, kCoordinates = 4, kOutputs = 2;
  static TENFOLD_INLINE void input(const Float* d, Float* v, const Constants&) {
    v[0] = d[0] - d[2];
    v[1] = d[1] + d[2];
    v[2] = d[2] - d[1];
    v[3] = d[3] - d[1];
  }
  static TENFOLD_INLINE void output(const Float* m, Float* y, const Constants&) {
    y[0] = m[0] + (m[1] + m[2]);
    y[1] = (m[1] - m[2]) + m[3];
  }
};

template <>
struct Transform<Axis::four> {
  static constexpr int kInputs = 6, kCoordinates = 6, kOutputs = 4;
  static TENFOLD_INLINE void input(const Float* d, Float* v, const Constants& c) {
    v[0] = c.product * d[0] + (d[4] - c.sum * d[2]);
    const Float even_a = d[4] - c.b2 * d[2], odd_a = d[3] - c.b2 * d[1];
    v[1] = even_a + c.a * odd_a;
    v[2] = even_a - c.a * odd_a;
    const Float even_b = d[4] - c.a2 * d[2], odd_b = d[3] - c.a2 * d[1];
    v[3] = even_b + c.b * odd_b;
    v[4] = even_b - c.b * odd_b;
    v[5] = c.product * d[1] + (d[5] - c.sum * d[3]);
  }
  static TENFOLD_INLINE void output(const Float* m, Float* y, const Constants& c) {
    const Float even_a = m[1] + m[2], odd_a = m[1] - m[2];
    const Float even_b = m[3] + m[4], odd_b = m[3] - m[4];
    y[0] = m[0] + (even_a + even_b);
    y[1] = c.a * odd_a + c.b * odd_b;
    y[2] = c.a2 * even_a + c.b2 * even_b;
    y[3] = m[5] + (c.a3 * odd_a + c.b3 * odd_b);
  }
};

// y0 = g1 d1 + g2 d2 and y1 = g0 d1 + g1 d2, since d0 = d3 = 0: the products are
// g1 (d1 + d2), (g2 - g1) d2 and (g0 - g1) d1.
template <>
struct Transform<Axis::pair> {
  static constexpr int kInputs = 4, kCoordinates = 3, kOutputs = 2;
  static TENFOLD_INLINE void input(const Float* d, Float* v, const Constants&) {
    v[0] = d[1] + d[2];
    v[1] = d[2];
    v[2] = d[1];
  }
  static TENFOLD_INLINE void output(const Float* m, Float* y, const Constants&) {
    y[0] = m[0] + m[1];
    y[1] = m[0] + m[2];
  }
};

}  // namespace tenfold::TENFOLD_ISA
