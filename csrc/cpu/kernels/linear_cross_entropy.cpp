#include "linear_cross_entropy.h"

#include <float.h>

#include "exponentials.h"
#include "pairs.h"

namespace fastformer::FASTFORMER_LEVEL {
namespace {

// e^x for the sum over a row of logits that are products of T.
template <typename T>
FASTFORMER_INLINE Vec exp_for_sum(Vec x) {
  return __is_same(T, float) ? exp(x) : exp2_for_sum(x * broadcast(kLog2E));
}

// Of logits that are products of T and lie there as S. What they are less than the peak is given to store(i, n, Vec).
template <typename T, typename S, typename F>
FASTFORMER_INLINE CrossEntropyPart part_of(const S* logits, int64_t cols, bool with_sum, float peak, F store) {
  const Vec shift = broadcast(peak);
  const float total = sum_lanes(cols, [&](int64_t i, int n) FASTFORMER_LAMBDA {
    const Vec distance = load_n(logits + i, n) - shift;
    store(i, n, distance);
    const Vec exponential = exp_for_sum<T>(distance);
    return n == kLanes ? exponential : select(first_n(n), exponential, zero());
  });
  if (!with_sum) return {peak, total, 0.0f};
  return {peak, total, sum_lanes(cols, [&](int64_t i, int n) FASTFORMER_LAMBDA { return load_n(logits + i, n); })};
}

FASTFORMER_INLINE Vec greater(Vec peaks, Vec x, int n) {
  return max(peaks, n == kLanes ? x : select(first_n(n), x, broadcast(-FLT_MAX)));
}

template <typename T>
CrossEntropyPart part_of(const T* logits, int64_t cols, bool with_sum) {
  Vec peaks = broadcast(-FLT_MAX);  // not -inf, whose distance to logits of -inf is NaN
  for_lanes(0, cols, [&](int64_t i, int n) FASTFORMER_LAMBDA { peaks = greater(peaks, load_n(logits + i, n), n); });
  return part_of<T>(logits, cols, with_sum, reduce_max(peaks), [](int64_t, int, Vec) FASTFORMER_LAMBDA {});
}

CrossEntropyPart combined(const CrossEntropyPart* parts, int64_t count) {
  CrossEntropyPart all = parts[0];
  for (int64_t i = 1; i < count; ++i) all.peak = parts[i].peak > all.peak ? parts[i].peak : all.peak;
  all.total = all.sum = 0.0f;
  for (int64_t i = 0; i < count; ++i) {
    all.total += parts[i].total * expf(parts[i].peak - all.peak);
    all.sum += parts[i].sum;
  }
  return all;
}

template <typename T>
void block(const CrossEntropyRows& a, const GemmBlock& block) {
  const int64_t cols = block.col_end - block.col_begin;
  const T* bias = static_cast<const T*>(a.bias) + (a.bias == nullptr ? 0 : block.col_begin);
  float logits[kGemmCols];
  for (int64_t row = block.row_begin; row < block.row_end; ++row) {
    const float* sums = block.sums + (row - block.row_begin) * block.stride;
    T* stored = static_cast<T*>(a.logits) + (a.logits == nullptr ? 0 : row * a.cols + block.col_begin);
    Vec peaks = broadcast(-FLT_MAX);
    for_lanes(0, cols, [&](int64_t i, int n) FASTFORMER_LAMBDA {
      Vec x = load_n(sums + i, n);
      if (a.bias != nullptr) x = x + load_n(bias + i, n);
      store_n(logits + i, x, n);
      peaks = greater(peaks, x, n);
    });
    const auto keep = [&](int64_t i, int n, Vec distance) FASTFORMER_LAMBDA {
      if (a.logits != nullptr) store_n(stored + i, distance, n);
    };
    a.parts[row * a.blocks + block.col_begin / a.block_cols] =
        part_of<T>(logits, cols, a.label_smoothing > 0.0f, reduce_max(peaks), keep);
    const int64_t target = a.target[row] - block.col_begin;
    if (target >= 0 && target < cols) a.target_logits[row] = logits[target];
  }
}

void block(const void* args, const GemmBlock& part) {
  const CrossEntropyRows& a = *static_cast<const CrossEntropyRows*>(args);
  visit(a.dtype, [&]<typename T>() { block<T>(a, part); });
}

// logits = weight (exp(logits - peak) / total - s / cols), and weight (1 - s) less at the target. With parts, logits
// are held as their distances to the peaks of these: rounded to bfloat16 they are exact where probabilities are large.
template <typename T>
void gradient(const CrossEntropyRows& a, int64_t row, float peak, float total) {
  T* logits = static_cast<T*>(a.logits) + row * a.cols;
  const float weight = a.row_weight[row], s = a.label_smoothing;
  const Vec factor = broadcast(weight / total), smooth = broadcast(-weight * s / static_cast<float>(a.cols));
  const CrossEntropyPart* parts = a.parts == nullptr ? nullptr : a.parts + row * a.blocks;
  const int64_t block_cols = parts == nullptr ? a.cols : a.block_cols, target = a.target[row];
  const auto shift_at = [&](int64_t col)
                            FASTFORMER_LAMBDA { return parts == nullptr ? peak : peak - parts[col / block_cols].peak; };
  T* at_target = logits + target;
  // Near 1 the distance of its probability to that is what counts: with the longer exponential.
  const Vec hit =
      fma(exp(load(at_target, 1) - broadcast(shift_at(target))), factor, smooth) - broadcast(weight * (1.0f - s));
  for (int64_t begin = 0; begin < a.cols; begin += block_cols) {
    const Pair shift = both(broadcast(shift_at(begin)));
    for_pairs(begin, smaller(begin + block_cols, a.cols), [&](int64_t i, int n) FASTFORMER_LAMBDA {
      const Pair x = load_pair(logits + i, n) - shift;
      const Pair exponential = {exp_for<T>(x.first), exp_for<T>(x.second)};
      store_pair(logits + i, fma(exponential, both(factor), both(smooth)), n);
    });
  }
  store(at_target, hit, 1);
}

template <typename T>
void clear(T* logits, int64_t cols) {
  for_lanes(0, cols, [&](int64_t i, int n) FASTFORMER_LAMBDA { store_n(logits + i, zero(), n); });
}

template <typename T>
void loss_rows(const CrossEntropyRows& a, int64_t begin, int64_t end) {
  const float s = a.label_smoothing;
  for (int64_t row = begin; row < end; ++row) {
    T* logits = static_cast<T*>(a.logits) + row * a.cols;
    const auto [peak, total, sum] =
        a.parts != nullptr ? combined(a.parts + row * a.blocks, a.blocks) : part_of(logits, a.cols, s > 0.0f);
    const float log_total = logf(total);
    a.lse[row] = peak + log_total;
    if (a.target[row] == a.ignore_index) {
      a.losses[row] = 0.0f;
      if (a.row_weight != nullptr) clear(logits, a.cols);
      continue;
    }
    const float hit = a.parts != nullptr ? a.target_logits[row] : to_float(logits[a.target[row]]);
    float loss = log_total + (peak - hit);
    if (s > 0.0f) {
      const float mean = sum / static_cast<float>(a.cols);
      loss = (1.0f - s) * loss + s * (log_total + (peak - mean));
    }
    a.losses[row] = loss;
    if (a.row_weight != nullptr) gradient<T>(a, row, peak, total);
  }
}

void losses(const CrossEntropyRows& args, int64_t begin, int64_t end) {
  visit(args.dtype, [&]<typename T>() { loss_rows<T>(args, begin, end); });
}

}  // namespace

const LinearCrossEntropyKernels linear_cross_entropy{block, losses};

}  // namespace fastformer::FASTFORMER_LEVEL
