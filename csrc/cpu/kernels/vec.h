// One register of floats and what the kernels do with it, at the level this translation unit is compiled for.
//
// Vec supports + - * / as operators at every level. Element types are float, BFloat16 and Half; loads widen, stores
// round to nearest even. `n` counts lanes: load(p, n) reads n elements and fills the rest with 0, store(p, v, n) writes
// n. Everything is in an anonymous namespace: a function compiled with AVX-512 must never be picked by the linker for
// the portable level.
#pragma once

#include <math.h>

#include "../../dtypes.h"

#if defined(__AVX2__) || defined(__AVX512F__)
#include <immintrin.h>
#endif

#ifndef FASTFORMER_LEVEL
#error "kernels are compiled once per level, with FASTFORMER_LEVEL set by setup.py"
#endif

#define FASTFORMER_INLINE static inline __attribute__((always_inline))

namespace fastformer::FASTFORMER_LEVEL {
namespace {

FASTFORMER_INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
FASTFORMER_INLINE int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

// --- scalar conversions

FASTFORMER_INLINE float bits_to_float(uint32_t bits) {
  float x;
  memcpy(&x, &bits, 4);
  return x;
}
FASTFORMER_INLINE uint32_t float_to_bits(float x) {
  uint32_t bits;
  memcpy(&bits, &x, 4);
  return bits;
}

FASTFORMER_INLINE float to_float(float x) { return x; }
FASTFORMER_INLINE float to_float(BFloat16 x) { return bits_to_float(static_cast<uint32_t>(x.bits) << 16); }
FASTFORMER_INLINE float to_float(Half x) {
#if defined(__F16C__)
  return _cvtsh_ss(x.bits);
#else
  // Moves exponent and mantissa into place and rebiases by a multiplication, which also handles subnormals.
  const uint32_t magnitude = static_cast<uint32_t>(x.bits & 0x7fff) << 13;
  const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000) << 16;
  if (magnitude >= 0x0f800000) return bits_to_float(sign | magnitude | 0x7f800000);  // infinity or NaN
  return bits_to_float(sign | float_to_bits(bits_to_float(magnitude) * 0x1p112f));
#endif
}

template <typename T>
FASTFORMER_INLINE T from_float(float x);
template <>
inline __attribute__((always_inline)) float from_float<float>(float x) {
  return x;
}
template <>
inline __attribute__((always_inline)) BFloat16 from_float<BFloat16>(float x) {
  const uint32_t bits = float_to_bits(x);
  if (x != x) return {static_cast<uint16_t>((bits >> 16) | 0x40)};
  return {static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16)};
}
template <>
inline __attribute__((always_inline)) Half from_float<Half>(float x) {
#if defined(__F16C__)
  return {static_cast<uint16_t>(_cvtss_sh(x, _MM_FROUND_TO_NEAREST_INT))};
#else
  const uint32_t bits = float_to_bits(x);
  const uint16_t sign = static_cast<uint16_t>((bits >> 16) & 0x8000);
  const uint32_t magnitude = bits & 0x7fffffff;
  if (magnitude > 0x7f800000) return {static_cast<uint16_t>(sign | 0x7e00)};   // NaN
  if (magnitude >= 0x477ff000) return {static_cast<uint16_t>(sign | 0x7c00)};  // rounds to infinity
  if (magnitude < 0x38800000) {  // subnormal: adding 0.5 leaves the rounded bits at the bottom of the mantissa
    return {static_cast<uint16_t>(sign | (float_to_bits(bits_to_float(magnitude) + 0.5f) - 0x3f000000))};
  }
  const uint32_t rounded = magnitude + 0xfff + ((magnitude >> 13) & 1);
  return {static_cast<uint16_t>(sign | ((rounded - 0x38000000) >> 13))};
#endif
}

// --- registers

#if defined(__AVX512F__)

using Vec = __m512;
using Mask = __mmask16;
constexpr int kLanes = 16;

FASTFORMER_INLINE Vec broadcast(float x) { return _mm512_set1_ps(x); }
FASTFORMER_INLINE Mask first_n(int n) { return static_cast<Mask>(n >= 16 ? 0xffff : n <= 0 ? 0 : (1 << n) - 1); }
FASTFORMER_INLINE Vec select(Mask m, Vec a, Vec b) { return _mm512_mask_blend_ps(m, b, a); }
FASTFORMER_INLINE Mask less(Vec a, Vec b) { return _mm512_cmp_ps_mask(a, b, _CMP_LT_OQ); }

FASTFORMER_INLINE Vec load(const float* p) { return _mm512_loadu_ps(p); }
FASTFORMER_INLINE Vec load(const float* p, int n) { return _mm512_maskz_loadu_ps(first_n(n), p); }
FASTFORMER_INLINE void store(float* p, Vec v) { _mm512_storeu_ps(p, v); }
FASTFORMER_INLINE void store(float* p, Vec v, int n) { _mm512_mask_storeu_ps(p, first_n(n), v); }

FASTFORMER_INLINE Vec widen_bf16(__m256i x) { return (Vec)_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16); }
// The upper half of each lane is v in bfloat16.
FASTFORMER_INLINE __m512i round_to_bf16(Vec v) {
  const __m512i bits = (__m512i)v;
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd);
  const __m512i quiet = _mm512_or_si512(bits, _mm512_set1_epi32(0x400000));
  return _mm512_mask_blend_epi32(_mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q), rounded, quiet);
}
FASTFORMER_INLINE __m256i narrow_bf16(Vec v) {
#if defined(__AVX512BF16__)
  return (__m256i)_mm512_cvtneps_pbh(v);
#else
  return _mm512_cvtepi32_epi16(_mm512_srli_epi32(round_to_bf16(v), 16));
#endif
}
FASTFORMER_INLINE Vec load(const BFloat16* p) { return widen_bf16(_mm256_loadu_si256((const __m256i*)p)); }
FASTFORMER_INLINE Vec load(const BFloat16* p, int n) { return widen_bf16(_mm256_maskz_loadu_epi16(first_n(n), p)); }
FASTFORMER_INLINE void store(BFloat16* p, Vec v) { _mm256_storeu_si256((__m256i*)p, narrow_bf16(v)); }
FASTFORMER_INLINE void store(BFloat16* p, Vec v, int n) { _mm256_mask_storeu_epi16(p, first_n(n), narrow_bf16(v)); }

FASTFORMER_INLINE __m256i narrow_half(Vec v) { return _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT); }
FASTFORMER_INLINE Vec load(const Half* p) { return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p)); }
FASTFORMER_INLINE Vec load(const Half* p, int n) { return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(first_n(n), p)); }
FASTFORMER_INLINE void store(Half* p, Vec v) { _mm256_storeu_si256((__m256i*)p, narrow_half(v)); }
FASTFORMER_INLINE void store(Half* p, Vec v, int n) { _mm256_mask_storeu_epi16(p, first_n(n), narrow_half(v)); }

FASTFORMER_INLINE Vec fma(Vec a, Vec b, Vec c) { return _mm512_fmadd_ps(a, b, c); }
// Where an operand is NaN, max and min give the second: put the value that may be NaN there to keep it.
FASTFORMER_INLINE Vec max(Vec a, Vec b) { return _mm512_max_ps(a, b); }
FASTFORMER_INLINE Vec min(Vec a, Vec b) { return _mm512_min_ps(a, b); }
FASTFORMER_INLINE Vec sqrt(Vec a) { return _mm512_sqrt_ps(a); }
FASTFORMER_INLINE Vec abs(Vec a) { return _mm512_abs_ps(a); }
FASTFORMER_INLINE Vec round(Vec a) { return _mm512_roundscale_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
FASTFORMER_INLINE float reduce_add(Vec v) { return _mm512_reduce_add_ps(v); }
FASTFORMER_INLINE float reduce_max(Vec v) { return _mm512_reduce_max_ps(v); }
// v * 2^n for whole n in [-152, 129].
FASTFORMER_INLINE Vec scale_exponent(Vec v, Vec n) { return _mm512_scalef_ps(v, n); }

#elif defined(__AVX2__)

using Vec = __m256;
using Mask = __m256;  // all bits of a lane set or clear
constexpr int kLanes = 8;

FASTFORMER_INLINE Vec broadcast(float x) { return _mm256_set1_ps(x); }
FASTFORMER_INLINE __m256i first_n_bits(int n) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
FASTFORMER_INLINE Mask first_n(int n) { return (Mask)first_n_bits(n); }
FASTFORMER_INLINE Vec select(Mask m, Vec a, Vec b) { return _mm256_blendv_ps(b, a, m); }
FASTFORMER_INLINE Mask less(Vec a, Vec b) { return _mm256_cmp_ps(a, b, _CMP_LT_OQ); }

FASTFORMER_INLINE Vec load(const float* p) { return _mm256_loadu_ps(p); }
FASTFORMER_INLINE Vec load(const float* p, int n) { return _mm256_maskload_ps(p, first_n_bits(n)); }
FASTFORMER_INLINE void store(float* p, Vec v) { _mm256_storeu_ps(p, v); }
FASTFORMER_INLINE void store(float* p, Vec v, int n) { _mm256_maskstore_ps(p, first_n_bits(n), v); }

FASTFORMER_INLINE Vec widen(BFloat16, __m128i x) { return (Vec)_mm256_slli_epi32(_mm256_cvtepu16_epi32(x), 16); }
FASTFORMER_INLINE Vec widen(Half, __m128i x) { return _mm256_cvtph_ps(x); }
// The upper half of each lane is v in bfloat16.
FASTFORMER_INLINE __m256i round_to_bf16(Vec v) {
  const __m256i bits = (__m256i)v;
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i rounded = _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), odd);
  const __m256i quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x400000));
  return _mm256_blendv_epi8(rounded, quiet, (__m256i)_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
}
FASTFORMER_INLINE __m128i narrow(BFloat16, Vec v) {
  const __m256i high = _mm256_srli_epi32(round_to_bf16(v), 16);
  return _mm_packus_epi32(_mm256_castsi256_si128(high), _mm256_extracti128_si256(high, 1));
}
FASTFORMER_INLINE __m128i narrow(Half, Vec v) { return _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT); }

template <typename T>
FASTFORMER_INLINE Vec load(const T* p) {
  return widen(T{}, _mm_loadu_si128((const __m128i*)p));
}
template <typename T>
FASTFORMER_INLINE Vec load(const T* p, int n) {
  T lanes[kLanes] = {};
  memcpy(lanes, p, (n < kLanes ? n : kLanes) * sizeof(T));
  return load(lanes);
}
template <typename T>
FASTFORMER_INLINE void store(T* p, Vec v) {
  _mm_storeu_si128((__m128i*)p, narrow(T{}, v));
}
template <typename T>
FASTFORMER_INLINE void store(T* p, Vec v, int n) {
  T lanes[kLanes];
  store(lanes, v);
  memcpy(p, lanes, (n < kLanes ? n : kLanes) * sizeof(T));
}

FASTFORMER_INLINE Vec fma(Vec a, Vec b, Vec c) { return _mm256_fmadd_ps(a, b, c); }
// Where an operand is NaN, max and min give the second: put the value that may be NaN there to keep it.
FASTFORMER_INLINE Vec max(Vec a, Vec b) { return _mm256_max_ps(a, b); }
FASTFORMER_INLINE Vec min(Vec a, Vec b) { return _mm256_min_ps(a, b); }
FASTFORMER_INLINE Vec sqrt(Vec a) { return _mm256_sqrt_ps(a); }
FASTFORMER_INLINE Vec abs(Vec a) { return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), a); }
FASTFORMER_INLINE Vec round(Vec a) { return _mm256_round_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
FASTFORMER_INLINE float reduce_add(Vec v) {
  __m128 x = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  x = _mm_add_ps(x, _mm_movehl_ps(x, x));
  return _mm_cvtss_f32(_mm_add_ss(x, _mm_movehdup_ps(x)));
}
FASTFORMER_INLINE float reduce_max(Vec v) {
  __m128 x = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  x = _mm_max_ps(x, _mm_movehl_ps(x, x));
  return _mm_cvtss_f32(_mm_max_ss(x, _mm_movehdup_ps(x)));
}
// v * 2^n for whole n in [-152, 129], in two steps, since 2^n alone may not be a normal number.
FASTFORMER_INLINE Vec scale_exponent(Vec v, Vec n) {
  const __m256i whole = _mm256_cvtps_epi32(n);
  const __m256i half = _mm256_srai_epi32(whole, 1);
  const __m256i bias = _mm256_set1_epi32(127);
  const Vec first = (Vec)_mm256_slli_epi32(_mm256_add_epi32(half, bias), 23);
  const Vec second = (Vec)_mm256_slli_epi32(_mm256_add_epi32(_mm256_sub_epi32(whole, half), bias), 23);
  return v * first * second;
}

#else  // portable: GCC and Clang vectors of four

typedef float Vec __attribute__((vector_size(16)));
typedef int32_t Mask __attribute__((vector_size(16)));
constexpr int kLanes = 4;

FASTFORMER_INLINE Vec broadcast(float x) { return Vec{x, x, x, x}; }
FASTFORMER_INLINE Mask first_n(int n) { return Mask{0, 1, 2, 3} < Mask{n, n, n, n}; }
FASTFORMER_INLINE Vec select(Mask m, Vec a, Vec b) { return m ? a : b; }
FASTFORMER_INLINE Mask less(Vec a, Vec b) { return a < b; }

template <typename T>
FASTFORMER_INLINE Vec load(const T* p) {
  return Vec{to_float(p[0]), to_float(p[1]), to_float(p[2]), to_float(p[3])};
}
template <typename T>
FASTFORMER_INLINE Vec load(const T* p, int n) {
  Vec v = broadcast(0.0f);
  for (int i = 0; i < n && i < kLanes; ++i) v[i] = to_float(p[i]);
  return v;
}
template <typename T>
FASTFORMER_INLINE void store(T* p, Vec v) {
  for (int i = 0; i < kLanes; ++i) p[i] = from_float<T>(v[i]);
}
template <typename T>
FASTFORMER_INLINE void store(T* p, Vec v, int n) {
  for (int i = 0; i < n && i < kLanes; ++i) p[i] = from_float<T>(v[i]);
}

FASTFORMER_INLINE Vec fma(Vec a, Vec b, Vec c) { return a * b + c; }
// Where an operand is NaN, max and min give the second: put the value that may be NaN there to keep it.
FASTFORMER_INLINE Vec max(Vec a, Vec b) { return a > b ? a : b; }
FASTFORMER_INLINE Vec min(Vec a, Vec b) { return a < b ? a : b; }
FASTFORMER_INLINE Vec sqrt(Vec a) { return Vec{sqrtf(a[0]), sqrtf(a[1]), sqrtf(a[2]), sqrtf(a[3])}; }
FASTFORMER_INLINE Vec abs(Vec a) { return (Vec)((Mask)a & 0x7fffffff); }
// Adding 1.5 * 2^23 leaves no bits for a fraction. |a| must be below 2^22.
FASTFORMER_INLINE Vec round(Vec a) {
  volatile Vec shifted = a + 12582912.0f;  // volatile: -ffast-math elsewhere must not cancel it
  return shifted - 12582912.0f;
}
FASTFORMER_INLINE float reduce_add(Vec v) { return (v[0] + v[2]) + (v[1] + v[3]); }
FASTFORMER_INLINE float reduce_max(Vec v) { return fmaxf(fmaxf(v[0], v[2]), fmaxf(v[1], v[3])); }
// v * 2^n for whole n in [-152, 129], in two steps, since 2^n alone may not be a normal number.
FASTFORMER_INLINE Vec scale_exponent(Vec v, Vec n) {
  const Mask whole = __builtin_convertvector(n, Mask);
  const Mask half = whole >> 1;
  return v * (Vec)((half + 127) << 23) * (Vec)((whole - half + 127) << 23);
}

#endif

FASTFORMER_INLINE Vec zero() { return broadcast(0.0f); }

// 2^x within 1 ulp: x = n + r with |r| <= 1/2, a degree-6 minimax polynomial for 2^r (2.6e-9), then the exponent.
// -inf gives 0, results below 2^-149 give 0, above 2^128 inf; NaN stays NaN.
FASTFORMER_INLINE Vec exp2(Vec x) {
  x = min(broadcast(129.0f), max(broadcast(-150.0f), x));
  const Vec n = round(x);
  const Vec r = x - n;
  Vec p = fma(broadcast(1.5469732e-4f), r, broadcast(1.3400433e-3f));
  p = fma(p, r, broadcast(9.6180253e-3f));
  p = fma(p, r, broadcast(5.5503272e-2f));
  p = fma(p, r, broadcast(0.24022651f));
  p = fma(p, r, broadcast(0.69314718f));
  p = fma(p, r, broadcast(1.0f));
  return scale_exponent(p, n);
}

// e^x within 1 ulp, for x that is at most 89: x = n ln 2 + r, with ln 2 in two parts so that r is exact for large n.
FASTFORMER_INLINE Vec exp_to_89(Vec x) {
  x = max(broadcast(-104.0f), x);
  const Vec n = round(x * broadcast(1.44269504f));
  Vec r = fma(n, broadcast(-0.693359375f), x);
  r = fma(n, broadcast(2.12194440e-4f), r);
  Vec p = fma(broadcast(1.3948581e-3f), r, broadcast(8.3751287e-3f));
  p = fma(p, r, broadcast(4.1666217e-2f));
  p = fma(p, r, broadcast(0.16666415f));
  p = fma(p, r, broadcast(0.5f));
  p = fma(p, r, broadcast(1.0f));
  p = fma(p, r, broadcast(1.0f));
  return scale_exponent(p, n);
}

// e^x within 1 ulp.
FASTFORMER_INLINE Vec exp(Vec x) { return exp_to_89(min(broadcast(89.0f), x)); }

// Calls f.template operator()<T>() with the element type of dtype: f is `[&]<typename T>() { ... }`.
template <typename F>
FASTFORMER_INLINE void visit(DType dtype, F f) {
  switch (dtype) {
    case DType::float32:
      return f.template operator()<float>();
    case DType::bfloat16:
      return f.template operator()<BFloat16>();
    case DType::float16:
      return f.template operator()<Half>();
  }
}

}  // namespace
}  // namespace fastformer::FASTFORMER_LEVEL
