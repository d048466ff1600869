// The softmax of attention's forward pass, over one block of scores after the other.
#pragma once

#include "attention_scores.cuh"
#include "rows.cuh"

namespace fastformer::cuda {

// What a row has so far: its largest score (peak), before it is multiplied by `factor`, and a lane's part of the sum of
// weights (total). Turns scores into weights, and returns what was accumulated by earlier weights is to be multiplied
// by. A row that has seen no key has peak -inf, and weights 0.
template <int kRowTiles, int kColumnTiles>
FASTFORMER_DEVICE RowValues<kRowTiles> softmax_step(Accumulator<kRowTiles, kColumnTiles>& scores, float factor,
                                                    RowValues<kRowTiles>& peak, RowValues<kRowTiles>& total) {
  // The peak is one of the scores as they are, and is taken off before they are multiplied: so its own weight is 1
  // however large they are. A fused multiply-add of the scaled ones would round the peak and not the score.
  const auto weight = [factor](float score, float shift) { return ptx::ex2((score - shift) * (factor * kLog2e)); };
  RowValues<kRowTiles> decay = peak, shift;
  reduce_lane(peak, scores, [](float x, float y) { return fmaxf(x, y); });
  reduce_lanes(peak, [](float x, float y) { return fmaxf(x, y); });
#pragma unroll
  for (int i = 0; i < kRowTiles; ++i) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      shift.values[i][half] = finite(peak.values[i][half]);
      decay.values[i][half] = weight(decay.values[i][half], shift.values[i][half]);
      total.values[i][half] *= decay.values[i][half];
    }
  }
  for_each_with_row(scores, shift, [&](float& x, float top) { x = weight(x, top); });
  reduce_lane(total, scores, [](float x, float y) { return x + y; });
  return decay;
}

// Multiplies rows by their decays. Peaks seldom rise beyond the first few tiles: then all are 1.
template <int kRowTiles, int kColumnTiles>
FASTFORMER_DEVICE void scale_down(Accumulator<kRowTiles, kColumnTiles>& sums, const RowValues<kRowTiles>& decay) {
  bool rises = false;
#pragma unroll
  for (int i = 0; i < kRowTiles; ++i) rises = rises || decay.values[i][0] != 1.0f || decay.values[i][1] != 1.0f;
  if (__any_sync(kAllLanes, rises)) for_each_with_row(sums, decay, [](float& x, float by) { x *= by; });
}

// What cap_scores and add_biases leave scores to be multiplied by.
FASTFORMER_DEVICE float score_factor(const Attention& a) {
  if (has_biases<Scores::any>(a)) return 1.0f;
  return a.softcap == 0.0f ? a.scale : a.softcap;
}

struct RowEnd {
  float multiplier;  // makes sum of weights * value the output
  float lse;
};

// `peak`: the largest score, multiplied; `total`: of all lanes. A sink is one more score, whose value is 0.
FASTFORMER_DEVICE RowEnd end_row(const Attention& a, int head, float peak, float total) {
  float multiplier = a.kept_scale;
  if (a.sinks != nullptr) {
    const float sink = a.sinks[head], new_peak = fmaxf(peak, sink), shift = finite(new_peak);
    const float decay = ptx::ex2((peak - shift) * kLog2e);
    total = total * decay + ptx::ex2((sink - shift) * kLog2e);
    multiplier *= decay;
    peak = new_peak;
  }
  // A row that saw no key has total 0: its output is 0 and its lse -inf + log(0) = -inf.
  return {total == 0.0f ? 0.0f : multiplier / total, peak + logf(total)};
}

}  // namespace fastformer::cuda
