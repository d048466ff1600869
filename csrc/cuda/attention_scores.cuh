// What attention does to a warp's block of scores, query key^T, before the softmax, and to its weights after it:
// softcap, ALiBi, masks, dropout.
#pragma once

#include "attention.cuh"

namespace fastformer::cuda {

constexpr float kLog2e = 1.44269504f;

// What a kernel is compiled for. The rest of the options are asked for as it runs: a branch that all threads take
// alike costs little beside the products, a kernel for each combination would make hundreds.
enum class Scores {
  plain,  // scale, window, packed and paged sequences
  any     // all options: softcap, ALiBi, masks and dropout too
};

// Of a block of scores held by a warp: what its rows and columns are.
enum class BlockRows { queries, keys };

// Calls f(value, query, key), numbers within the sequence.
template <BlockRows kAre, int kRowTiles, int kColumnTiles, typename F>
FASTFORMER_DEVICE void for_each_score(Accumulator<kRowTiles, kColumnTiles>& scores, int first_query, int first_key,
                                      F f) {
  scores.for_each([&](float& value, int row, int column) {
    if constexpr (kAre == BlockRows::queries) {
      f(value, first_query + row, first_key + column);
    } else {
      f(value, first_query + column, first_key + row);
    }
  });
}

// tanh within 2 ulp. |x| < 0.6: x + x^3 p(x^2), p of degree 4. Beyond: 1 - 2e / (1 + e) with e = e^(-2|x|).
FASTFORMER_DEVICE float tanh_of(float x) {
  const float square = x * x;
  float p = fmaf(-6.26911968e-3f, square, 2.11109594e-2f);
  p = fmaf(p, square, -5.38739487e-2f);
  p = fmaf(p, square, 0.133329153f);
  p = fmaf(p, square, -0.333333313f);
  const float e = ptx::ex2(fabsf(x) * (-2.0f * kLog2e));
  const float large = copysignf(1.0f - 2.0f * e / (1.0f + e), x);
  return fabsf(x) < 0.6f ? fmaf(p * square, x, x) : large;
}

// Scores become tanh(scale / softcap * score), where there is a softcap. What they are to be multiplied by then.
template <Scores kScores, int kRowTiles, int kColumnTiles>
FASTFORMER_DEVICE float cap_scores(const Attention& a, Accumulator<kRowTiles, kColumnTiles>& scores) {
  if (kScores == Scores::plain || a.softcap == 0.0f) return a.scale;
  const float factor = a.scale / a.softcap;
  scores.for_each([&](float& x, int, int) { x = tanh_of(x * factor); });
  return a.softcap;
}

// A head's part of ALiBi and the mask.
struct Biases {
  float slope;      // 0 without ALiBi
  int64_t mask_at;  // of the sequence and head

  Biases() = default;
  FASTFORMER_DEVICE Biases(const Attention& a, const Sequence& s, int head)
      : slope(a.slopes == nullptr ? 0.0f : a.slopes[s.index * a.slopes_stride + head]),
        mask_at(s.index * a.mask_strides[0] + head * a.mask_strides[1]) {}
};

FASTFORMER_DEVICE int64_t mask_offset(const Attention& a, const Biases& biases, int query, int key) {
  return biases.mask_at + query * a.mask_strides[2] + key * a.mask_strides[3];
}

FASTFORMER_DEVICE float additive_mask(const Attention& a, int64_t offset) {
  switch (a.mask_dtype) {
    case DType::float32:
      return static_cast<const float*>(a.mask)[offset];
    case DType::bfloat16:
      return to_float(static_cast<const BFloat16*>(a.mask)[offset]);
    default:
      return to_float(static_cast<const Half*>(a.mask)[offset]);
  }
}

template <Scores kScores>
FASTFORMER_DEVICE bool has_biases(const Attention& a) {
  return kScores == Scores::any && (a.slopes != nullptr || a.mask_kind == MaskKind::additive);
}

// Multiplies scores by `factor` and adds ALiBi and an additive mask, where there are such. What they are to be
// multiplied by then.
template <Scores kScores, BlockRows kAre, int kRowTiles, int kColumnTiles>
FASTFORMER_DEVICE float add_biases(const Attention& a, const Sequence& s, const Biases& biases, float factor,
                                   int first_query, int first_key, Accumulator<kRowTiles, kColumnTiles>& scores) {
  if (!has_biases<kScores>(a)) return factor;
  const bool masked = a.mask_kind == MaskKind::additive;
  for_each_score<kAre>(scores, first_query, first_key, [&](float& x, int query, int key) {
    const float distance = fabsf(static_cast<float>(query + s.offset - key));
    x = fmaf(-biases.slope, distance, x * factor);
    if (masked && query < s.queries && key < s.keys) x += additive_mask(a, mask_offset(a, biases, query, key));
  });
  return 1.0f;
}

// `hidden` wherever the query doesn't see the key. `edge`: the band of the window, or the end of the keys, passes
// through the block.
template <Scores kScores, BlockRows kAre, int kRowTiles, int kColumnTiles>
FASTFORMER_DEVICE void hide(const Attention& a, const Sequence& s, const Biases& biases, bool edge, float hidden,
                            int first_query, int first_key, Accumulator<kRowTiles, kColumnTiles>& values) {
  if (edge) {
    for_each_score<kAre>(values, first_query, first_key, [&](float& x, int query, int key) {
      if (!sees(a, s, query, key)) x = hidden;
    });
  }
  if (kScores == Scores::any && a.mask_kind == MaskKind::boolean) {
    const uint8_t* mask = static_cast<const uint8_t*>(a.mask);
    for_each_score<kAre>(values, first_query, first_key, [&](float& x, int query, int key) {
      if (query < s.queries && key < s.keys && mask[mask_offset(a, biases, query, key)] == 0) x = hidden;
    });
  }
}

// --- dropout: the bits of fastformer.reference.dropout_mask

constexpr int kPhiloxRounds = 7;

// Philox-4x32 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"): bit i says whether the weight of
// key 4 * fours + i is kept.
FASTFORMER_DEVICE uint32_t kept_of_four(const Attention& a, uint32_t fours, uint32_t query, uint32_t batch_head) {
  const uint64_t seed = static_cast<uint64_t>(a.dropout_state[0]);
  uint32_t low = static_cast<uint32_t>(seed), high = static_cast<uint32_t>(seed >> 32);
  uint32_t words[4] = {fours, query, batch_head, static_cast<uint32_t>(a.dropout_state[1])};
#pragma unroll
  for (int round = 0; round < kPhiloxRounds; ++round) {
    const uint64_t first = static_cast<uint64_t>(words[0]) * 0xD2511F53u;
    const uint64_t third = static_cast<uint64_t>(words[2]) * 0xCD9E8D57u;
    words[0] = static_cast<uint32_t>(third >> 32) ^ words[1] ^ low;
    words[2] = static_cast<uint32_t>(first >> 32) ^ words[3] ^ high;
    words[1] = static_cast<uint32_t>(third);
    words[3] = static_cast<uint32_t>(first);
    low += 0x9E3779B9u;
    high += 0xBB67AE85u;
  }
  uint32_t kept = 0;
#pragma unroll
  for (int i = 0; i < 4; ++i) kept |= static_cast<uint32_t>(words[i] >= a.dropout_threshold) << i;
  return kept;
}

// What the weights of a row depend on, besides their keys.
struct DropoutRow {
  uint32_t query, batch_head;
};

// Calls f(value, kept) for each score this lane holds. A tile of 16 x 8 scores takes 32 draws of four keys' words: a
// lane makes one, and gets those of its own scores by shuffles. row_of(i) is what this lane draws for: row lane % 16 of
// the i-th 16, or if rows are keys column lane % 8 of the i-th 8. first_key is a multiple of 4.
template <BlockRows kAre, int kRowTiles, int kColumnTiles, typename RowOf, typename F>
FASTFORMER_DEVICE void for_each_kept(const Attention& a, RowOf row_of, int first_key,
                                     Accumulator<kRowTiles, kColumnTiles>& scores, F f) {
  const int lane = lane_of(), group = lane / 4, member = lane % 4;
#pragma unroll
  for (int i = 0; i < kRowTiles; ++i) {
#pragma unroll
    for (int j = 0; j < kColumnTiles; ++j) {
      float (&values)[4] = scores.values[i][j];
      if constexpr (kAre == BlockRows::queries) {  // lane l: row l % 16, half l / 16 of the 8 keys
        const DropoutRow row = row_of(i);
        const uint32_t four = (first_key + j * 8) / 4 + lane / 16;
        const uint32_t mine = kept_of_four(a, four, row.query, row.batch_head);
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const uint32_t kept = __shfl_sync(kAllLanes, mine, group + 8 * half + member / 2 * 16) >> member % 2 * 2;
          f(values[2 * half], (kept & 1) != 0);
          f(values[2 * half + 1], (kept & 2) != 0);
        }
      } else {  // lane l: column l % 8, quarter l / 8 of the 16 keys
        const DropoutRow column = row_of(j);
        const uint32_t four = (first_key + i * 16) / 4 + lane / 8;
        const uint32_t mine = kept_of_four(a, four, column.query, column.batch_head);
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const int query = member * 2 + e % 2, key = group + e / 2 * 8;
          f(values[e], (__shfl_sync(kAllLanes, mine, query + key / 4 * 8) >> key % 4 & 1) != 0);
        }
      }
    }
  }
}

// The same where the block is of one head and its queries follow each other.
template <BlockRows kAre, int kRowTiles, int kColumnTiles, typename F>
FASTFORMER_DEVICE void for_each_kept(const Attention& a, uint32_t batch_head, int first_query, int first_key,
                                     Accumulator<kRowTiles, kColumnTiles>& scores, F f) {
  constexpr int kQueries = kAre == BlockRows::queries ? 16 : 8;
  const uint32_t first = first_query + lane_of() % kQueries;
  for_each_kept<kAre>(a, [=](int i) { return DropoutRow{first + i * kQueries, batch_head}; }, first_key, scores, f);
}

}  // namespace fastformer::cuda
