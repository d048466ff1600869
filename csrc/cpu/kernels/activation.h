// The activations of the feed-forward layer and their derivatives, on registers: within 1e-7 for tensors of float and
// Half, and within 4e-4 of the value, a tenth of an ulp, for those of BFloat16.
#pragma once

#include "feed_forward.h"
#include "vec.h"

namespace fastformer::FASTFORMER_LEVEL {
namespace {

struct ValueAndSlope {
  Vec value, slope;
};

// 2^x within 7.5e-5 of the value. Not the shorter exp2_for of exponentials.h: near the zero of gelu's slope, where two
// terms cancel, the error of that one adds to the tail's, and this one's is taken from it.
FASTFORMER_INLINE Vec rough_exp2(Vec x) {
  x = min(broadcast(129.0f), max(broadcast(-150.0f), x));
  const Vec n = round(x), r = x - n;
  Vec p = fma(broadcast(5.51716680e-2f), r, broadcast(0.242611122f));
  p = fma(p, r, broadcast(0.693260986f));
  p = fma(p, r, broadcast(0.999928074f));
  return scale_exponent(p, n);
}

// e^x for tensors of T.
template <typename T>
FASTFORMER_INLINE Vec exp_for(Vec x) {
  if constexpr (__is_same(T, BFloat16)) return rough_exp2(x * broadcast(1.44269504f));
  return exp(x);
}

// Phi(-t) for t >= 0, within 4e-4 of the value: 2^q(t), q of degree 5, which falls for all t.
FASTFORMER_INLINE Vec rough_normal_tail(Vec t) {
  Vec q = fma(broadcast(-2.13733178e-4f), t, broadcast(4.62514540e-3f));
  q = fma(q, t, broadcast(-4.35423080e-2f));
  q = fma(q, t, broadcast(-0.471507646f));
  q = fma(q, t, broadcast(-1.14518399f));
  q = fma(q, t, broadcast(-1.00045741f));
  return rough_exp2(q);
}

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

template <typename T>
FASTFORMER_INLINE Vec normal_cdf_for(Vec x) {
  if constexpr (!__is_same(T, BFloat16)) return normal_cdf(x);
  const Vec tail = rough_normal_tail(abs(x));
  return select(less(x, zero()), tail, broadcast(1.0f) - tail);
}

// sigmoid(x) and sigmoid(-x), each accurate where it is small.
struct Sigmoid {
  Vec plus, minus;
};
template <typename T>
FASTFORMER_INLINE Sigmoid sigmoid(Vec x) {
  const Vec small = exp_for<T>(zero() - abs(x));
  const Vec large = broadcast(1.0f) / (broadcast(1.0f) + small);
  const Vec other = small * large;
  const auto negative = less(x, zero());
  return {select(negative, other, large), select(negative, large, other)};
}

// Each has value<T> and value_and_slope<T> for tensors of T.

struct Gelu {
  template <typename T>
  FASTFORMER_INLINE Vec value(Vec x) {
    return x * normal_cdf_for<T>(x);
  }
  template <typename T>
  FASTFORMER_INLINE ValueAndSlope value_and_slope(Vec x) {
    const Vec cdf = normal_cdf_for<T>(x);
    const Vec density = broadcast(0.39894228f) * exp_for<T>(broadcast(-0.5f) * x * x);
    return {x * cdf, fma(x, density, cdf)};
  }
};

// 0.5 x (1 + tanh(u)) = x sigmoid(2u), u = sqrt(2 / pi) (x + 0.044715 x^3).
struct GeluTanh {
  static constexpr float kLinear = 1.59576912f, kCubic = 0.0713548163f;  // of 2u
  FASTFORMER_INLINE Vec twice_u(Vec x) { return x * fma(broadcast(kCubic) * x, x, broadcast(kLinear)); }
  template <typename T>
  FASTFORMER_INLINE Vec value(Vec x) {
    return x / (broadcast(1.0f) + exp_for<T>(zero() - twice_u(x)));
  }
  template <typename T>
  FASTFORMER_INLINE ValueAndSlope value_and_slope(Vec x) {
    const Sigmoid s = sigmoid<T>(twice_u(x));
    const Vec twice_u_slope = fma(broadcast(3 * kCubic) * x, x, broadcast(kLinear));
    // x times the sigmoids first: 0 where the cube of x would overflow.
    return {x * s.plus, fma(x * (s.plus * s.minus), twice_u_slope, s.plus)};
  }
};

struct Relu {
  template <typename T>
  FASTFORMER_INLINE Vec value(Vec x) {
    return max(zero(), x);
  }
  template <typename T>
  FASTFORMER_INLINE ValueAndSlope value_and_slope(Vec x) {
    return {value<T>(x), select(less(zero(), x), broadcast(1.0f), zero())};
  }
};

struct Silu {
  template <typename T>
  FASTFORMER_INLINE Vec value(Vec x) {
    return x / (broadcast(1.0f) + exp_for<T>(zero() - x));
  }
  template <typename T>
  FASTFORMER_INLINE ValueAndSlope value_and_slope(Vec x) {
    const Sigmoid s = sigmoid<T>(x);
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
