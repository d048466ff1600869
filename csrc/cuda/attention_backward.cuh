// What the kernels of attention's backward pass share: their gradients, and a warp's block of weights and what flows
// back through it. The formulas: attention_backward.cu. Shapes: attention.cuh.
#pragma once

#include "attention_arguments.h"
#include "attention_scores.cuh"

namespace fastformer::cuda {

struct AttentionGradients {
  const void* grad_output;  // [B, H, Sq, Dv]
  const float* lse;         // [B, H, Sq]
  const float* delta;       // likewise
  void* grad_query;         // [B, H, Sq, D]
  void* grad_key;           // [B, G, Sk, D]
  void* grad_value;         // [B, G, Sk, Dv]
  float* grad_mask;         // [B, H, Sq, Sk], zeros before; or null
  int64_t grad_output_strides[3], grad_query_strides[3], grad_key_strides[3], grad_value_strides[3];
};

// attention_dkdv.cu, attention_dq.cu. `scores`: Scores::any has everything that Scores::plain has.
void launch_dkdv(const AttentionCall& call, const AttentionGradients& gradients, Scores scores, cudaStream_t stream);
void launch_dq(const AttentionCall& call, const AttentionGradients& gradients, Scores scores, cudaStream_t stream);

template <typename T>
FASTFORMER_DEVICE HeadRows<const T> grad_output_rows(const Attention& a, const AttentionGradients& g, const Sequence& s,
                                                     int head) {
  return head_rows(static_cast<const T*>(g.grad_output), g.grad_output_strides, s.query_entry, head, s.first_query,
                   s.queries);
}

// Of keys, values and their gradients: the backward pass has no pages.
template <typename T, typename Pointer>
FASTFORMER_DEVICE HeadRows<T> unpaged_rows(const Sequence& s, int kv_head, Pointer* tensor,
                                           const int64_t (&strides)[3]) {
  return head_rows(static_cast<T*>(tensor), strides, s.key_entry, kv_head, s.first_key, s.keys);
}

// sum += a b^T over the width of both, 64 columns at a time: the compiler would otherwise load more fragments ahead
// than there are registers beside the gradients.
template <int kRowTiles, int kColumnTiles, typename TileA, typename TileB>
FASTFORMER_DEVICE void multiply_rows(Accumulator<kRowTiles, kColumnTiles>& sum, const TileA& a, int first_row,
                                     const TileB& b) {
  constexpr int kWidth = TileA::kColumns, kPart = kWidth % 64 == 0 ? 64 : kWidth;
#pragma unroll 1
  for (int column = 0; column < kWidth; column += kPart) {
    multiply<kPart, TileRows::outer, TileRows::outer>(sum, TileA{a.data + column}, first_row, TileB{b.data + column},
                                                      0);
  }
}

// A value for each query of a warp's block: two for each 16 rows or 8 columns are this lane's.
template <BlockRows kAre, int kRowTiles, int kColumnTiles>
struct QueryValues {
  static constexpr int kTiles = kAre == BlockRows::queries ? kRowTiles : kColumnTiles;

  float values[kTiles][2];

  // of(query): the value of a query, by its number within the block.
  template <typename Of>
  FASTFORMER_DEVICE void load(Of of) {
    const int lane = lane_of();
#pragma unroll
    for (int i = 0; i < kTiles; ++i) {
#pragma unroll
      for (int k = 0; k < 2; ++k) {
        values[i][k] = of(kAre == BlockRows::queries ? i * 16 + k * 8 + lane / 4 : i * 8 + lane % 4 * 2 + k);
      }
    }
  }
  // That of the query of element `e` of an accumulator's tile (i, j).
  FASTFORMER_DEVICE float at(int i, int j, int e) const {
    return kAre == BlockRows::queries ? values[i][e / 2] : values[j][e % 2];
  }
};

// exp(x - lse) is 0 for a row that saw nothing, whatever x. Rows that don't exist have 0: their weights are no more
// than 1, and what they are multiplied by is 0.
FASTFORMER_DEVICE float lse_to_subtract(float lse) { return lse == -INFINITY ? INFINITY : lse; }

// A block of scores becomes its weights P = exp(scores - lse), at most 1 whatever the rounding of huge scores; negative
// where they are dropped. With softcap, `capped` is T of the formulas.
template <Scores kScores, BlockRows kAre, int kRowTiles, int kColumnTiles>
FASTFORMER_DEVICE void recompute_weights(const Attention& a, const Sequence& s, int head, bool edge, int first_query,
                                         int first_key, const QueryValues<kAre, kRowTiles, kColumnTiles>& lse,
                                         Accumulator<kRowTiles, kColumnTiles>& scores,
                                         Accumulator<kRowTiles, kColumnTiles>& capped) {
  const Biases biases(a, s, head);
  float factor = cap_scores<kScores>(a, scores);
  if constexpr (kScores == Scores::any) capped = scores;
  factor = add_biases<kScores, kAre>(a, s, biases, factor, first_query, first_key, scores);
#pragma unroll
  for (int i = 0; i < kRowTiles; ++i) {
#pragma unroll
    for (int j = 0; j < kColumnTiles; ++j) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        float& x = scores.values[i][j][e];
        // log2(e) last where there may be a mask as large as float32 has them: it must not overflow.
        const float power = kScores == Scores::any ? fmaf(x, factor, -lse.at(i, j, e)) * kLog2e
                                                   : fmaf(x, factor * kLog2e, lse.at(i, j, e) * -kLog2e);
        x = ptx::ex2(power > 0.0f ? 0.0f : power);  // unlike fminf, keeps NaN
      }
    }
  }
  hide<kScores, kAre>(a, s, biases, edge, 0.0f, first_query, first_key, scores);
  if (kScores == Scores::any && a.dropout_state != nullptr) {
    for_each_kept<kAre>(a, s.index * a.heads + head, first_query, first_key, scores,
                        [](float& weight, bool kept) { weight = kept ? weight : -weight; });
  }
}

// dP becomes dS = P (Z dP - delta), with Z of dropout.
template <Scores kScores, BlockRows kAre, int kRowTiles, int kColumnTiles>
FASTFORMER_DEVICE void grad_of_scores(const Attention& a, const Accumulator<kRowTiles, kColumnTiles>& weights,
                                      const QueryValues<kAre, kRowTiles, kColumnTiles>& delta,
                                      Accumulator<kRowTiles, kColumnTiles>& grad) {
#pragma unroll
  for (int i = 0; i < kRowTiles; ++i) {
#pragma unroll
    for (int j = 0; j < kColumnTiles; ++j) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const float weight = weights.values[i][j][e];
        float& x = grad.values[i][j][e];
        if constexpr (kScores == Scores::any) {
          x = fabsf(weight) * ((weight < 0.0f ? 0.0f : x * a.kept_scale) - delta.at(i, j, e));
        } else {
          x = weight * (x - delta.at(i, j, e));
        }
      }
    }
  }
}

// Multiplies by softcap's derivative, 1 - T^2.
template <Scores kScores, int kRowTiles, int kColumnTiles>
FASTFORMER_DEVICE void through_cap(const Attention& a, const Accumulator<kRowTiles, kColumnTiles>& capped,
                                   Accumulator<kRowTiles, kColumnTiles>& values) {
  if constexpr (kScores == Scores::any) {
    if (a.softcap == 0.0f) return;
#pragma unroll
    for (int i = 0; i < kRowTiles; ++i) {
#pragma unroll
      for (int j = 0; j < kColumnTiles; ++j) {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const float t = capped.values[i][j][e];
          values.values[i][j][e] *= fmaf(-t, t, 1.0f);
        }
      }
    }
  }
}

}  // namespace fastformer::cuda
