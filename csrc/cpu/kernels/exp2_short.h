// 2^x for results that are rounded to 16 bits.
#pragma once

#include "vec.h"

namespace fastformer::FASTFORMER_LEVEL {
namespace {

// Minimax polynomials for 2^r, 0 <= r < 1, to a twenty-fifth of half an ulp of the type, relative.
FASTFORMER_INLINE Vec exp2_fraction(BFloat16, Vec r) {
  Vec p = fma(broadcast(0.078024521f), r, broadcast(0.22606716f));
  p = fma(p, r, broadcast(0.69583356f));
  return fma(p, r, broadcast(0.9999252f));
}
FASTFORMER_INLINE Vec exp2_fraction(Half, Vec r) {
  Vec p = fma(broadcast(0.013534168f), r, broadcast(0.05201146f));
  p = fma(p, r, broadcast(0.24144275f));
  p = fma(p, r, broadcast(0.69300383f));
  return fma(p, r, broadcast(1.0000026f));
}

// 2^x for a result of type T: x is split into its whole part and the fraction above it. -inf gives 0, NaN stays NaN; x
// may be at most 127.
template <typename T>
FASTFORMER_INLINE Vec exp2_short(Vec x) {
#if defined(__AVX512F__)
  const Vec fraction = _mm512_reduce_ps(x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
  return _mm512_scalef_ps(exp2_fraction(T{}, fraction), x);  // which takes the whole part itself
#else
  x = max(broadcast(-151.0f), x);  // 2^-150 times a fraction above 1 would not round to 0
  const Vec whole = round(x - broadcast(0.5f));
  return scale_exponent(exp2_fraction(T{}, x - whole), whole);
#endif
}

}  // namespace
}  // namespace fastformer::FASTFORMER_LEVEL
