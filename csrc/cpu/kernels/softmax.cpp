#include "softmax.h"

#include "lanes.h"

namespace fastformer::FASTFORMER_LEVEL {
namespace {

// scores = scale x.
template <typename T>
void scale_row(const T* x, float* scores, int64_t cols, float scale) {
  const Vec factor = broadcast(scale);
  for_lanes(0, cols, [&](int64_t i, int n) FASTFORMER_LAMBDA { store_n(scores + i, load_n(x + i, n) * factor, n); });
}

void drop_masked(const bool* keep, int64_t stride, float* scores, int64_t cols) {
  for (int64_t i = 0; i < cols; ++i) scores[i] = keep[i * stride] ? scores[i] : -INFINITY;
}

template <typename M>
void add_mask(const M* mask, int64_t stride, float* scores, int64_t cols) {
  for (int64_t i = 0; i < cols; ++i) scores[i] += to_float(mask[i * stride]);
}

float row_max(const float* scores, int64_t cols) {
  Vec peak = broadcast(-INFINITY);
  int64_t i = 0;
  for (; i + kLanes <= cols; i += kLanes) peak = max(peak, load(scores + i));
  float result = reduce_max(peak);
  for (; i < cols; ++i) result = scores[i] > result ? scores[i] : result;
  return result;
}

// scores = e^(scores - peak); returns their sum.
float exponentiate(float* scores, int64_t cols, float peak) {
  const Vec shift = broadcast(peak);
  return sum_lanes(cols, [&](int64_t i, int n) FASTFORMER_LAMBDA {
    const Vec exponential = exp(load_n(scores + i, n) - shift);
    store_n(scores + i, exponential, n);
    return n == kLanes ? exponential : select(first_n(n), exponential, zero());
  });
}

template <typename T>
void scaled_copy(const float* values, T* y, int64_t cols, float factor) {
  const Vec f = broadcast(factor);
  for_lanes(0, cols, [&](int64_t i, int n) FASTFORMER_LAMBDA { store_n(y + i, load_n(values + i, n) * f, n); });
}

template <typename T>
void fill_zero(T* y, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i) y[i] = from_float<T>(0.0f);
}

template <typename T>
void forward_rows(const SoftmaxForward& a, int64_t begin, int64_t end, float* scores) {
  const bool fetch_ahead = beyond_cache<T>(end - begin, a.cols);
  for (int64_t index = begin; index < end; ++index) {
    const int64_t row = index % a.rows, head = index / a.rows % a.heads, outer = index / a.rows / a.heads;
    const int64_t visible = a.is_causal && row + 1 < a.cols ? row + 1 : a.cols;
    const T* x = static_cast<const T*>(a.input) + index * a.cols;
    T* y = static_cast<T*>(a.output) + index * a.cols;
    if (fetch_ahead && index + 1 < end) {
      prefetch_next(x, a.cols);
      prefetch_next(y, a.cols);
    }
    scale_row(x, scores, visible, a.scale);
    const int64_t offset = outer * a.mask_strides[0] + head * a.mask_strides[1] + row * a.mask_strides[2];
    if (a.mask_kind == MaskKind::boolean) {
      drop_masked(static_cast<const bool*>(a.mask) + offset, a.mask_strides[3], scores, visible);
    } else if (a.mask_kind == MaskKind::additive) {
      visit(a.mask_dtype, [&]<typename M>() {
        add_mask(static_cast<const M*>(a.mask) + offset, a.mask_strides[3], scores, visible);
      });
    }
    const float peak = row_max(scores, visible);
    const float total = exponentiate(scores, visible, peak == -INFINITY ? 0.0f : peak);
    if (total == 0.0f) {  // nothing to attend to
      fill_zero(y, 0, a.cols);
      continue;
    }
    scaled_copy(scores, y, visible, 1.0f / total);
    fill_zero(y, visible, a.cols);
  }
}

// grad_input = scale y (grad - sum(grad y)).
template <typename T>
void backward_rows(const SoftmaxBackward& a, int64_t begin, int64_t end) {
  const bool fetch_ahead = beyond_cache<T>(end - begin, a.cols);
  for (int64_t row = begin; row < end; ++row) {
    const T* grad = static_cast<const T*>(a.grad_output) + row * a.cols;
    const T* y = static_cast<const T*>(a.output) + row * a.cols;
    T* result = static_cast<T*>(a.grad_input) + row * a.cols;
    if (fetch_ahead && row + 1 < end) {
      prefetch_next(grad, a.cols);
      prefetch_next(y, a.cols);
      prefetch_next(result, a.cols);
    }
    const float dot_product =
        sum_lanes(a.cols, [&](int64_t i, int n) FASTFORMER_LAMBDA { return load_n(grad + i, n) * load_n(y + i, n); });
    const Vec dot = broadcast(dot_product), scale = broadcast(a.scale);
    for_lanes(0, a.cols, [&](int64_t i, int n) FASTFORMER_LAMBDA {
      store_n(result + i, scale * load_n(y + i, n) * (load_n(grad + i, n) - dot), n);
    });
  }
}

void forward(const SoftmaxForward& args, int64_t begin, int64_t end, float* scratch) {
  visit(args.dtype, [&]<typename T>() { forward_rows<T>(args, begin, end, scratch); });
}

void backward(const SoftmaxBackward& args, int64_t begin, int64_t end) {
  visit(args.dtype, [&]<typename T>() { backward_rows<T>(args, begin, end); });
}

}  // namespace

const SoftmaxKernels softmax{forward, backward};

}  // namespace fastformer::FASTFORMER_LEVEL
