// The activations of the feed-forward layer and their derivatives, on registers.
#pragma once

#include "feed_forward.h"
#include "vec.h"

namespace fastformer::FASTFORMER_LEVEL {
namespace {

struct ValueAndSlope {
  Vec value, slope;
};

// The normal distribution function within 1e-7, and in its lower tail within a few ulp down to x = -5.6.
// |x| < 1: 1/2 + x p(x^2), p of degree 5 (7e-10). Beyond: Phi(-|x|) = exp(q(|x|)), q of degree 7 (2e-8 of the value).
FASTFORMER_INLINE Vec normal_cdf(Vec x) {
  const Vec square = x * x;
  Vec p = fma(broadcast(-7.65420593e-6f), square, broadcast(1.13486366e-4f));
  p = fma(p, square, broadcast(-1.18632994e-3f));
  p = fma(p, square, broadcast(9.97332341e-3f));
  p = fma(p, square, broadcast(-6.64903599e-2f));
  p = fma(p, square, broadcast(0.39894228f));
  const Vec centre = fma(p, x, broadcast(0.5f));
  const Vec t = abs(x);
  Vec q = fma(broadcast(-1.55176184e-6f), t, broadcast(4.85506829e-5f));
  q = fma(q, t, broadcast(-6.94029576e-4f));
  q = fma(q, t, broadcast(6.10746641e-3f));
  q = fma(q, t, broadcast(-3.78910398e-2f));
  q = fma(q, t, broadcast(-0.317182468f));
  q = fma(q, t, broadcast(-0.798336599f));
  q = fma(q, t, broadcast(-0.693071993f));
  const Vec tail = exp(q);
  const Vec outside = select(less(x, zero()), tail, broadcast(1.0f) - tail);
  return select(less(t, broadcast(1.0f)), centre, outside);
}

// sigmoid(x) and sigmoid(-x), each accurate where it is small.
struct Sigmoid {
  Vec plus, minus;
};
FASTFORMER_INLINE Sigmoid sigmoid(Vec x) {
  const Vec small = exp(zero() - abs(x));
  const Vec large = broadcast(1.0f) / (broadcast(1.0f) + small);
  const Vec other = small * large;
  const auto negative = less(x, zero());
  return {select(negative, other, large), select(negative, large, other)};
}

struct Gelu {
  FASTFORMER_INLINE Vec value(Vec x) { return x * normal_cdf(x); }
  FASTFORMER_INLINE ValueAndSlope value_and_slope(Vec x) {
    const Vec cdf = normal_cdf(x);
    const Vec density = broadcast(0.39894228f) * exp(broadcast(-0.5f) * x * x);
    return {x * cdf, fma(x, density, cdf)};
  }
};

// 0.5 x (1 + tanh(u)) = x sigmoid(2u), u = sqrt(2 / pi) (x + 0.044715 x^3).
struct GeluTanh {
  static constexpr float kLinear = 1.59576912f, kCubic = 0.0713548163f;  // of 2u
  FASTFORMER_INLINE Vec twice_u(Vec x) { return x * fma(broadcast(kCubic) * x, x, broadcast(kLinear)); }
  FASTFORMER_INLINE Vec value(Vec x) { return x * sigmoid(twice_u(x)).plus; }
  FASTFORMER_INLINE ValueAndSlope value_and_slope(Vec x) {
    const Sigmoid s = sigmoid(twice_u(x));
    const Vec twice_u_slope = fma(broadcast(3 * kCubic) * x, x, broadcast(kLinear));
    // x times the sigmoids first: 0 where the cube of x would overflow.
    return {x * s.plus, fma(x * (s.plus * s.minus), twice_u_slope, s.plus)};
  }
};

struct Relu {
  FASTFORMER_INLINE Vec value(Vec x) { return max(zero(), x); }
  FASTFORMER_INLINE ValueAndSlope value_and_slope(Vec x) {
    return {value(x), select(less(zero(), x), broadcast(1.0f), zero())};
  }
};

struct Silu {
  FASTFORMER_INLINE Vec value(Vec x) { return x * sigmoid(x).plus; }
  FASTFORMER_INLINE ValueAndSlope value_and_slope(Vec x) {
    const Sigmoid s = sigmoid(x);
    return {x * s.plus, fma(x * s.plus, s.minus, s.plus)};
  }
};

// Calls f with the type of the activation as its template argument.
template <typename F>
FASTFORMER_INLINE void visit(Activation activation, F f) {
  switch (activation) {
    case Activation::gelu:
      return f.template operator()<Gelu>();
    case Activation::gelu_tanh:
      return f.template operator()<GeluTanh>();
    case Activation::relu:
      return f.template operator()<Relu>();
    case Activation::silu:
      return f.template operator()<Silu>();
  }
}

}  // namespace
}  // namespace fastformer::FASTFORMER_LEVEL
