// Dropout's random numbers: Philox-4x32 with 7 rounds (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2,
// 3"), as in reference.dropout_mask.
//
// The counter is (key / 4, query, sequence * heads + head, offset) and gives a word for each of four neighbouring keys.
#pragma once

#include "attention_block.h"

#if !defined(__AVX2__) && defined(__SSE2__)
#include <emmintrin.h>
#endif

namespace fastformer::FASTFORMER_LEVEL {
namespace {

FASTFORMER_INLINE bool has_dropout(const Attention& a) { return a.dropout.threshold != 0; }

// 32-bit words in the low halves of the lanes, as products want and leave them; anything may be in the high halves. Two
// of these serve one register of floats: the words of its even, and of its odd lanes.
typedef uint64_t Words __attribute__((vector_size(4 * kLanes)));
typedef uint32_t PackedWords __attribute__((vector_size(4 * kLanes)));

FASTFORMER_INLINE Words all_words(uint64_t x) { return Words{} + x; }

// The products of the low halves; `b` has nothing in the high halves.
FASTFORMER_INLINE Words multiply_words(Words a, Words b) {
#if defined(__AVX512F__)
  return (Words)_mm512_mul_epu32((__m512i)a, (__m512i)b);
#elif defined(__AVX2__)
  return (Words)_mm256_mul_epu32((__m256i)a, (__m256i)b);
#elif defined(__SSE2__)
  return (Words)_mm_mul_epu32((__m128i)a, (__m128i)b);
#else
  return (a & 0xffffffff) * b;
#endif
}

constexpr uint32_t kPhiloxMultipliers[2] = {0xD2511F53, 0xCD9E8D57}, kPhiloxSteps[2] = {0x9E3779B9, 0xBB67AE85};
constexpr uint32_t kPhiloxRounds = 7;

// Rounds [begin, kPhiloxRounds) of the counter's four words.
FASTFORMER_INLINE void philox_rounds(const Dropout& dropout, uint32_t begin, Words (&words)[4]) {
  for (uint32_t round = begin; round < kPhiloxRounds; ++round) {
    const Words low = all_words(dropout.seed[0] + round * kPhiloxSteps[0]);
    const Words high = all_words(dropout.seed[1] + round * kPhiloxSteps[1]);
    const Words first = multiply_words(words[0], all_words(kPhiloxMultipliers[0]));
    const Words third = multiply_words(words[2], all_words(kPhiloxMultipliers[1]));
    words[0] = (third >> 32) ^ words[1] ^ low;
    words[2] = (first >> 32) ^ words[3] ^ high;
    words[1] = third;
    words[3] = first;
  }
}

// dropout.factor in the lanes whose words are not below the threshold, else 0.
FASTFORMER_INLINE Vec kept_factor(const Dropout& dropout, Words even, Words odd) {
  const PackedWords words = (PackedWords)((even & 0xffffffff) | (odd << 32));
  const PackedWords kept = (PackedWords)(words >= PackedWords{} + dropout.threshold);
  return (Vec)(kept & (PackedWords)broadcast(dropout.factor));
}

FASTFORMER_INLINE uint32_t dropout_head(const Attention& a, const Sequence& s, int64_t head) {
  return static_cast<uint32_t>(s.index * a.heads + head);
}

// Lanes `step` apart from `first` on.
FASTFORMER_INLINE Words ascending_words(uint32_t first, uint32_t step) {
  Words words;
  for (int i = 0; i < kLanes / 2; ++i) words[i] = first + static_cast<uint32_t>(i) * step;
  return words;
}

// factors[key][kQueryBlock], for q.vecs() registers and keys from first_key on, both a multiple of 4: dropout.factor
// where the weight is kept, else 0.
void dropout_factors(const Attention& a, const Sequence& s, const QueryBlock& q, int64_t first_key, int64_t keys,
                     float* factors) {
  const Dropout& d = a.dropout;
  // The first two rounds, in which the words that don't depend on the query are numbers, and the product by the only
  // one that does is the same for all keys.
  const uint64_t head = uint64_t{kPhiloxMultipliers[1]} * dropout_head(a, s, q.head);
  const uint32_t low = d.seed[0] + kPhiloxSteps[0], high = d.seed[1] + kPhiloxSteps[1];
  for (int64_t v = 0; v < q.vecs(); ++v) {
    Words queries[2];
    for (int odd = 0; odd < 2; ++odd) {
      const Words first = ascending_words(static_cast<uint32_t>(q.first + v * kLanes) + odd, 2) ^
                          all_words(static_cast<uint32_t>(head >> 32) ^ d.seed[0]);
      queries[odd] = multiply_words(first, all_words(kPhiloxMultipliers[0]));
    }
    for (int64_t j = 0; j < keys; j += 4) {
      const uint64_t fours = uint64_t{kPhiloxMultipliers[0]} * static_cast<uint32_t>((first_key + j) / 4);
      const uint32_t third = static_cast<uint32_t>(fours >> 32) ^ d.offset ^ d.seed[1];
      const uint64_t product = uint64_t{kPhiloxMultipliers[1]} * third;
      Words words[2][4];
      for (int odd = 0; odd < 2; ++odd) {
        words[odd][0] = all_words(static_cast<uint32_t>(product >> 32) ^ static_cast<uint32_t>(head) ^ low);
        words[odd][1] = all_words(static_cast<uint32_t>(product));
        words[odd][2] = (queries[odd] >> 32) ^ all_words(static_cast<uint32_t>(fours) ^ high);
        words[odd][3] = queries[odd];
        philox_rounds(d, 2, words[odd]);
      }
      for (int r = 0; r < 4; ++r) {
        store(factors + (j + r) * kQueryBlock + v * kLanes, kept_factor(d, words[0][r], words[1][r]));
      }
    }
  }
}

// factors[key] of one query, for keys from first_key on, a multiple of 4.
void dropout_factors_of_row(const Attention& a, const Sequence& s, int64_t head, int64_t query, int64_t first_key,
                            int64_t keys, float* factors) {
  alignas(64) float lanes[4][kLanes];
  for (int64_t j = 0; j < keys; j += 4 * kLanes) {
    Words words[2][4];
    for (int odd = 0; odd < 2; ++odd) {
      words[odd][0] = ascending_words(static_cast<uint32_t>((first_key + j) / 4) + odd, 2);
      words[odd][1] = all_words(static_cast<uint32_t>(query));
      words[odd][2] = all_words(dropout_head(a, s, head));
      words[odd][3] = all_words(a.dropout.offset);
      philox_rounds(a.dropout, 0, words[odd]);
    }
    for (int r = 0; r < 4; ++r) store(lanes[r], kept_factor(a.dropout, words[0][r], words[1][r]));
    for (int64_t i = 0; i < 4 * kLanes && j + i < keys; ++i) factors[j + i] = lanes[i % 4][i / 4];
  }
}

}  // namespace
}  // namespace fastformer::FASTFORMER_LEVEL
