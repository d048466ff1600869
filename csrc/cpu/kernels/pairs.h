// Two registers of a row at a time, in the order that is cheapest to load and to store.
//
// A register full of bfloat16 splits into its even and its odd elements by a shift and a mask, where loading them in
// order takes two shuffles and two shifts; and one conversion packs both again. Sums, maxima and elementwise arithmetic
// don't ask for the order. A vector that meets such pairs is brought into their order once, by in_pair_order.
#pragma once

#include "lanes.h"

namespace fastformer::FASTFORMER_LEVEL {
namespace {

constexpr int kPair = 2 * kLanes;

struct Pair {
  Vec first, second;
};

FASTFORMER_INLINE Pair both(Vec v) { return {v, v}; }
FASTFORMER_INLINE Pair operator+(Pair a, Pair b) { return {a.first + b.first, a.second + b.second}; }
FASTFORMER_INLINE Pair operator-(Pair a, Pair b) { return {a.first - b.first, a.second - b.second}; }
FASTFORMER_INLINE Pair operator*(Pair a, Pair b) { return {a.first * b.first, a.second * b.second}; }
FASTFORMER_INLINE Pair fma(Pair a, Pair b, Pair c) {
  return {fma(a.first, b.first, c.first), fma(a.second, b.second, c.second)};
}
FASTFORMER_INLINE Pair max(Pair a, Pair b) { return {max(a.first, b.first), max(a.second, b.second)}; }

template <typename T>
FASTFORMER_INLINE Pair load_pair(const T* p) {
  return {load(p), load(p + kLanes)};
}
template <typename T>
FASTFORMER_INLINE void store_pair(T* p, Pair v) {
  store(p, v.first);
  store(p + kLanes, v.second);
}
// What load_pair would give, from two neighbouring registers in order.
template <typename T>
FASTFORMER_INLINE Pair in_pair_order(Pair v) {
  return v;
}

#if defined(__AVX512F__)

FASTFORMER_INLINE Pair load_pair(const BFloat16* p) {
  const __m512i bits = _mm512_loadu_si512(p);
  return {(Vec)_mm512_slli_epi32(bits, 16), (Vec)_mm512_and_si512(bits, _mm512_set1_epi32(0xffff0000))};
}
FASTFORMER_INLINE void store_pair(BFloat16* p, Pair v) {
#if defined(__AVX512BF16__)
  const __m512i halves = (__m512i)_mm512_cvtne2ps_pbh(v.second, v.first);
  const __m512i interleave = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22,
                                              6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  _mm512_storeu_si512(p, _mm512_permutexvar_epi16(interleave, halves));
#else
  const __m512i even = _mm512_srli_epi32(round_to_bf16(v.first), 16);
  _mm512_storeu_si512(p, _mm512_mask_blend_epi16(0xaaaaaaaa, even, round_to_bf16(v.second)));
#endif
}
template <>
inline __attribute__((always_inline)) Pair in_pair_order<BFloat16>(Pair v) {
  const __m512i even = _mm512_set_epi32(30, 28, 26, 24, 22, 20, 18, 16, 14, 12, 10, 8, 6, 4, 2, 0);
  const __m512i odd = _mm512_or_si512(even, _mm512_set1_epi32(1));
  return {_mm512_permutex2var_ps(v.first, even, v.second), _mm512_permutex2var_ps(v.first, odd, v.second)};
}

#elif defined(__AVX2__)

FASTFORMER_INLINE Pair load_pair(const BFloat16* p) {
  const __m256i bits = _mm256_loadu_si256((const __m256i*)p);
  return {(Vec)_mm256_slli_epi32(bits, 16), (Vec)_mm256_and_si256(bits, _mm256_set1_epi32(0xffff0000))};
}
FASTFORMER_INLINE void store_pair(BFloat16* p, Pair v) {
  const __m256i even = _mm256_srli_epi32(round_to_bf16(v.first), 16);
  _mm256_storeu_si256((__m256i*)p, _mm256_blend_epi16(even, round_to_bf16(v.second), 0xaa));
}
template <>
inline __attribute__((always_inline)) Pair in_pair_order<BFloat16>(Pair v) {
  const Vec even = _mm256_shuffle_ps(v.first, v.second, 0x88), odd = _mm256_shuffle_ps(v.first, v.second, 0xdd);
  return {(Vec)_mm256_permute4x64_pd((__m256d)even, 0xd8), (Vec)_mm256_permute4x64_pd((__m256d)odd, 0xd8)};
}

#endif

// The first n elements, all kPair of them in pair order; fewer in order, with 0 in the lanes beyond.
template <typename T>
FASTFORMER_INLINE Pair load_pair(const T* p, int n) {
  if (n == kPair) return load_pair(p);
  return n < kLanes ? Pair{load(p, n), zero()} : Pair{load(p), load(p + kLanes, n - kLanes)};
}
template <typename T>
FASTFORMER_INLINE void store_pair(T* p, Pair v, int n) {
  if (n == kPair) {
    store_pair(p, v);
  } else if (n < kLanes) {
    store(p, v.first, n);
  } else {
    store(p, v.first);
    store(p + kLanes, v.second, n - kLanes);
  }
}
// v in the first n lanes, `rest` in those beyond.
FASTFORMER_INLINE Pair keep(Pair v, int n, Vec rest) {
  if (n == kPair) return v;
  return {select(first_n(n), v.first, rest), select(first_n(n - kLanes), v.second, rest)};
}

// f(i, n) for i = begin, begin + kPair, ...: n elements from i on.
template <typename F>
FASTFORMER_INLINE void for_pairs(int64_t begin, int64_t end, F f) {
  int64_t i = begin;
  for (; i + kPair <= end; i += kPair) f(i, kPair);
  if (i < end) f(i, static_cast<int>(end - i));
}

// Rows are added up in blocks of so many elements, so that long ones round no more than short ones.
constexpr int64_t kSumBlock = 128 * kLanes;

}  // namespace
}  // namespace fastformer::FASTFORMER_LEVEL
