#include "linear_cross_entropy.h"

#include "lanes.h"

namespace fastformer::FASTFORMER_LEVEL {
namespace {

template <typename T>
float row_max(const T* logits, int64_t cols) {
  Vec peak = broadcast(-INFINITY);
  for_lanes(0, cols, [&](int64_t i, int n) FASTFORMER_LAMBDA {
    const Vec x = load_n(logits + i, n);
    peak = max(peak, n == kLanes ? x : select(first_n(n), x, broadcast(-INFINITY)));
  });
  return reduce_max(peak);
}

// sum(exp(logits - peak))
template <typename T>
float sum_exponentials(const T* logits, int64_t cols, float peak) {
  const Vec shift = broadcast(peak);
  return sum_lanes(cols, [&](int64_t i, int n) FASTFORMER_LAMBDA {
    const Vec exponential = exp(load_n(logits + i, n) - shift);
    return n == kLanes ? exponential : select(first_n(n), exponential, zero());
  });
}

template <typename T>
float row_sum(const T* logits, int64_t cols) {
  return sum_lanes(cols, [&](int64_t i, int n) FASTFORMER_LAMBDA { return load_n(logits + i, n); });
}

// logits = weight (exp(logits - peak) / total - s / cols), and weight (1 - s) less at the target.
template <typename T>
void gradient(const CrossEntropyRows& a, int64_t row, float peak, float total) {
  T* logits = static_cast<T*>(a.logits) + row * a.cols;
  const float weight = a.row_weight[row], s = a.label_smoothing;
  const Vec shift = broadcast(peak), factor = broadcast(weight / total);
  const Vec smooth = broadcast(-weight * s / static_cast<float>(a.cols));
  T* at_target = logits + a.target[row];
  const Vec hit = fma(exp(load(at_target, 1) - shift), factor, smooth) - broadcast(weight * (1.0f - s));
  for_lanes(0, a.cols, [&](int64_t i, int n) FASTFORMER_LAMBDA {
    store_n(logits + i, fma(exp(load_n(logits + i, n) - shift), factor, smooth), n);
  });
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
    const float peak = row_max(logits, a.cols), total = sum_exponentials(logits, a.cols, peak);
    const float log_total = logf(total);
    a.lse[row] = peak + log_total;
    if (a.target[row] == a.ignore_index) {
      a.losses[row] = 0.0f;
      if (a.row_weight != nullptr) clear(logits, a.cols);
      continue;
    }
    float loss = log_total + (peak - to_float(logits[a.target[row]]));
    if (s > 0.0f) {
      const float mean = row_sum(logits, a.cols) / static_cast<float>(a.cols);
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

const LinearCrossEntropyKernels linear_cross_entropy{losses};

}  // namespace fastformer::FASTFORMER_LEVEL
