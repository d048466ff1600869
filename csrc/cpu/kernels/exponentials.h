// Exponentials as exact as what becomes of them. Those of vec.h are within an ulp of float32; here are shorter ones for
// results of 16 bits, whose rounding is far above their error.
#pragma once

#include "vec.h"

namespace fastformer::FASTFORMER_LEVEL {
namespace {

// 2^x, where `fraction` gives 2^r for 0 <= r <= 1. -inf gives 0, above 2^128 inf; NaN stays NaN.
template <typename F>
FASTFORMER_INLINE Vec exp2_by(F fraction, Vec x) {
#if defined(__AVX512F__)
  const Vec r = _mm512_reduce_ps(x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);  // 0 for infinite x
  return _mm512_scalef_ps(fraction(r), x);                                       // which takes the whole part itself
#else
  x = min(broadcast(129.0f), max(broadcast(-151.0f), x));  // 2^-150 times a fraction above 1 would not round to 0
  const Vec whole = round(x - broadcast(0.5f));
  return scale_exponent(fraction(x - whole), whole);
#endif
}

// 2^x for results of type T, by minimax polynomials.
template <typename T>
FASTFORMER_INLINE Vec exp2_for(Vec x);
template <>
inline __attribute__((always_inline)) Vec exp2_for<float>(Vec x) {
  return exp2(x);
}
// Within 7.5e-5 of the value, a twenty-sixth of half an ulp.
template <>
inline __attribute__((always_inline)) Vec exp2_for<BFloat16>(Vec x) {
  const auto fraction = [](Vec r) __attribute__((always_inline)) {
    Vec p = fma(broadcast(0.078024521f), r, broadcast(0.22606716f));
    p = fma(p, r, broadcast(0.69583356f));
    return fma(p, r, broadcast(0.9999252f));
  };
  return exp2_by(fraction, x);
}
// Within 2.7e-6 of the value, a ninetieth of half an ulp.
template <>
inline __attribute__((always_inline)) Vec exp2_for<Half>(Vec x) {
  const auto fraction = [](Vec r) __attribute__((always_inline)) {
    Vec p = fma(broadcast(0.013534168f), r, broadcast(0.05201146f));
    p = fma(p, r, broadcast(0.24144275f));
    p = fma(p, r, broadcast(0.69300383f));
    return fma(p, r, broadcast(1.0000026f));
  };
  return exp2_by(fraction, x);
}

// 2^x for values that are rounded to 16 bits, but whose sum is not: within 1.5e-7 of the value, in either direction
// (the mean over r is -4e-9), and 1 for 0.
FASTFORMER_INLINE Vec exp2_for_sum(Vec x) {
  const auto fraction = [](Vec r) __attribute__((always_inline)) {
    Vec p = fma(broadcast(1.86713057e-3f), r, broadcast(9.01702925e-3f));
    p = fma(p, r, broadcast(5.57999139e-2f));
    p = fma(p, r, broadcast(0.24016445f));
    p = fma(p, r, broadcast(0.693151312f));
    return fma(p, r, broadcast(1.0f));
  };
  return exp2_by(fraction, x);
}

constexpr float kLog2E = 1.44269504f;

// e^x for results of type T.
template <typename T>
FASTFORMER_INLINE Vec exp_for(Vec x) {
  return exp2_for<T>(x * broadcast(kLog2E));
}
template <>
inline __attribute__((always_inline)) Vec exp_for<float>(Vec x) {
  return exp(x);
}

}  // namespace
}  // namespace fastformer::FASTFORMER_LEVEL
