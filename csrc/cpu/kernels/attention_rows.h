// Rows of keys and values as decoding reads them, two registers' elements at a time.
#pragma once

#include "matmul_tile.h"
#include "pairs.h"

namespace fastformer::FASTFORMER_LEVEL {
namespace {

// The first n elements, and zeros, in pair order whatever n is: they meet rows that are padded to whole pairs.
template <typename T>
FASTFORMER_INLINE Pair load_padded(const T* p, int n) {
  if (n == kPair) return load_pair(p);
  T lanes[kPair] = {};
  memcpy(lanes, p, n * sizeof(T));
  return load_pair(lanes);
}
template <typename T>
FASTFORMER_INLINE void store_padded(T* p, Pair x, int n) {
  if (n == kPair) return store_pair(p, x);
  T lanes[kPair];
  store_pair(lanes, x);
  memcpy(p, lanes, n * sizeof(T));
}

// As many elements as a product of two rows wants them.
template <typename T>
FASTFORMER_INLINE Pair load_part(const T* p, int n) {
  return load_padded(p, n);
}
FASTFORMER_INLINE Vec multiply_add(Pair a, Pair b, Vec c) { return fma(a.second, b.second, fma(a.first, b.first, c)); }
#if defined(__AVX512BF16__)
FASTFORMER_INLINE __m512bh load_part(const BFloat16* p, int n) {
  return (__m512bh)(n == kPair ? _mm512_loadu_si512(p) : _mm512_maskz_loadu_epi16((1u << n) - 1, p));
}
#endif

// Of four rows, [4q + r] of the result is what lanes 4q .. 4q + 3 of sums[r] add up to.
FASTFORMER_INLINE Vec add_fours(const Vec (&sums)[4]) {
  const Vec low = unpack_low(sums[0], sums[1]) + unpack_high(sums[0], sums[1]);
  const Vec high = unpack_low(sums[2], sums[3]) + unpack_high(sums[2], sums[3]);
  return unpack_low_two(low, high) + unpack_high_two(low, high);
}
// From add_fours of kLanes rows, what each row adds up to.
FASTFORMER_INLINE Vec add_quarters(const Vec (&fours)[kLanes / 4]) {
#if defined(__AVX512F__)
  const Vec low = _mm512_shuffle_f32x4(fours[0], fours[1], 0x88) + _mm512_shuffle_f32x4(fours[0], fours[1], 0xdd);
  const Vec high = _mm512_shuffle_f32x4(fours[2], fours[3], 0x88) + _mm512_shuffle_f32x4(fours[2], fours[3], 0xdd);
  return _mm512_shuffle_f32x4(low, high, 0x88) + _mm512_shuffle_f32x4(low, high, 0xdd);
#elif defined(__AVX2__)
  return _mm256_permute2f128_ps(fours[0], fours[1], 0x20) + _mm256_permute2f128_ps(fours[0], fours[1], 0x31);
#else
  return fours[0];
#endif
}

}  // namespace
}  // namespace fastformer::FASTFORMER_LEVEL
