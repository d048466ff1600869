// What the files of the unembedding's cross-entropy share: a row's statistics and its loss, the arguments, and the
// products that are our own.
//
// Shapes: N rows, C columns, V vocabulary. With label smoothing s, a row's loss is
//   lse - (1 - s) logit[target] - s mean(logits)
// and its gradient by the logits softmax(logits) - (1 - s) onehot(target) - s / V; both are 0 where target is
// ignore_index, and the loss lacks its target's logit where target is no column at all.
#pragma once

#include <algorithm>

#include "../library_product.h"
#include "../linear_cross_entropy.h"
#include "rows.cuh"

namespace fastformer::cuda {

// What a row's loss is made of. The exponentials are relative to the greatest logit, which keeps them in range, and
// more columns can be joined to (Milakov and Gimelshein, "Online normalizer calculation for softmax", 2018).
struct alignas(16) LossStatistics {
  float peak, total;  // the greatest logit, and the sum of exp(logit - peak)
  float picked;       // the target's logit
  float sum;          // of the logits

  FASTFORMER_DEVICE void join(const LossStatistics& other) {
    const float new_peak = fmaxf(peak, other.peak), shift = finite(new_peak);
    total = total * exp_below(peak, shift) + other.total * exp_below(other.peak, shift);
    peak = new_peak;
    picked += other.picked;
    sum += other.sum;
  }

  // Joins what the threads of a team have, but for picked. All threads of the block call it.
  template <int kLanes>
  FASTFORMER_DEVICE void join_over(Team<kLanes>& team) {
    const float new_peak = team.max(peak);
    total = team.sum(total * exp_below(peak, finite(new_peak)));
    peak = new_peak;
    sum = team.sum(sum);
  }

  FASTFORMER_DEVICE float lse() const { return peak + logf(total); }
};

struct Loss {
  int64_t vocabulary;  // V
  int64_t ignore_index;
  float smoothing;

  FASTFORMER_DEVICE bool keeps(int64_t label) const { return label != ignore_index; }

  // By differences from the greatest logit: a small loss keeps its digits.
  FASTFORMER_DEVICE float of(const LossStatistics& row, int64_t label) const {
    if (!keeps(label)) return 0.0f;
    const float log_total = logf(row.total), loss = log_total - (row.picked - row.peak);
    if (smoothing == 0.0f) return loss;
    return (1.0f - smoothing) * loss + smoothing * (log_total - (row.sum / vocabulary - row.peak));
  }
};

// What both operators were given, checked.
struct LossArguments {
  const Tensor &input, &weight;
  const std::optional<Tensor>& bias;
  Tensor target;
  std::optional<Tensor> row_weight;  // of the losses, or the gradient by them
  Loss loss;
  DType dtype;

  LossArguments(const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias, const Tensor& targets,
                const std::optional<Tensor>& row_values, const char* row_values_name, int64_t ignore_index,
                double label_smoothing)
      : input(input), weight(weight), bias(bias), dtype(dtype_of(input, "input")) {
    check_linear_cross_entropy(input, weight, bias, targets, label_smoothing);
    check_row_values(row_values, row_values_name, input.size(0));
    check_device(weight, "weight", input, "input");
    if (bias.has_value()) check_device(*bias, "bias", input, "input");
    check_device(targets, "target", input, "input");
    if (row_values.has_value()) check_device(*row_values, row_values_name, input, "input");
    target = as_contiguous(targets);
    if (row_values.has_value()) row_weight = as_contiguous(*row_values);
    loss = {weight.size(0), ignore_index, static_cast<float>(label_smoothing)};
  }
};

struct LossGradients {
  Tensor input, weight, bias;
};

// A buffer's bytes, where its size may be chosen.
#ifdef FASTFORMER_SIMT  // where small tests are to take all turns
constexpr int64_t kBufferBytes = 4096;
#else
constexpr int64_t kBufferBytes = int64_t{64} << 20;
#endif

// How many times `extent` elements fit into so many bytes, once at least.
inline int64_t fitting(int64_t bytes, int64_t extent, int64_t element_size) {
  return std::max(bytes / (std::max(extent, int64_t{1}) * element_size), int64_t{1});
}

// The size of one where `extent` is taken in equal parts of `most`, at most.
inline int64_t even(int64_t extent, int64_t most) {
  const int64_t parts = std::max(ceil_div(extent, most), int64_t{1});
  return std::max(ceil_div(extent, parts), int64_t{1});
}

// --- linear_cross_entropy_fused.cu: for 16-bit elements, at least one row, and C and V that are multiples of 8, not 0

// Writes losses, times row_weight if there is one, and lse.
void compute_losses_fused(const LossArguments& args, const Tensor& losses, const Tensor& lse, const OnDevice& device);

// The gradients of the sum of row_weight * loss. Writes losses and lse like compute_losses_fused; without `losses`,
// reads lse.
LossGradients compute_gradients_fused(const LossArguments& args, const std::optional<Tensor>& losses, const Tensor& lse,
                                      const OnDevice& device);

}  // namespace fastformer::cuda
