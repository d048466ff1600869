#include "layer_norm.h"

#include "lanes.h"

namespace fastformer::FASTFORMER_LEVEL {
namespace {

template <typename T>
void forward_rows(const LayerNormForward& a, int64_t begin, int64_t end, float* row_values) {
  const float inverse = 1.0f / static_cast<float>(a.cols);
  const bool fetch_ahead = beyond_cache<T>(end - begin, a.cols);
  for (int64_t row = begin; row < end; ++row) {
    const int64_t offset = row * a.cols;
    const T* input = static_cast<const T*>(a.input) + offset;
    const T* residual = a.residual == nullptr ? nullptr : static_cast<const T*>(a.residual) + offset;
    T* summed = static_cast<T*>(a.summed) + offset;
    T* output = static_cast<T*>(a.output) + offset;
    if (fetch_ahead && row + 1 < end) {
      prefetch_next(input, a.cols);
      prefetch_next(output, a.cols);
      if (residual != nullptr) {
        prefetch_next(residual, a.cols);
        prefetch_next(summed, a.cols);
      }
    }
    if (residual == nullptr) {
      for_lanes(0, a.cols,
                [&](int64_t i, int n) FASTFORMER_LAMBDA { store_n(row_values + i, load_n(input + i, n), n); });
    } else {
      // What is normed is the sum as it was rounded for `summed`: what an unfused pair would norm.
      for_lanes(0, a.cols, [&](int64_t i, int n) FASTFORMER_LAMBDA {
        store_n(summed + i, load_n(input + i, n) + load_n(residual + i, n), n);
        store_n(row_values + i, load_n(summed + i, n), n);
      });
    }
    float mean = 0.0f;
    if (a.mean != nullptr) {
      mean = inverse * sum_lanes(a.cols, [&](int64_t i, int n) FASTFORMER_LAMBDA { return load_n(row_values + i, n); });
      a.mean[row] = mean;
    }
    const Vec centre = broadcast(mean);
    // The variance from centred values: sums of squares would cancel where the mean is large.
    const float variance = inverse * sum_lanes(a.cols, [&](int64_t i, int n) FASTFORMER_LAMBDA {
                             const Vec centred = load_n(row_values + i, n) - centre;
                             const Vec square = centred * centred;
                             return n == kLanes ? square : select(first_n(n), square, zero());
                           });
    const float rstd = 1.0f / sqrtf(variance + a.eps);
    a.rstd[row] = rstd;
    const Vec factor = broadcast(rstd);
    for_lanes(0, a.cols, [&](int64_t i, int n) FASTFORMER_LAMBDA {
      Vec y = (load_n(row_values + i, n) - centre) * factor;
      if (a.weight != nullptr) y = y * load_n(a.weight + i, n);
      if (a.bias != nullptr) y = y + load_n(a.bias + i, n);
      store_n(output + i, y, n);
    });
  }
}

// With g = grad_output * weight and xhat = (summed - mean) rstd:
//   grad_input = rstd (g - mean(g) - xhat mean(g xhat)) + grad_summed        (RMS norm: without mean(g))
template <typename T>
void backward_rows(const LayerNormBackward& a, int64_t begin, int64_t end, float* grad_weight, float* grad_bias,
                   float* scratch) {
  const float inverse = 1.0f / static_cast<float>(a.cols);
  float* const normed = scratch;
  float* const scaled = scratch + a.cols;
  const bool fetch_ahead = beyond_cache<T>(end - begin, a.cols);
  for (int64_t row = begin; row < end; ++row) {
    const int64_t offset = row * a.cols;
    const T* grad = static_cast<const T*>(a.grad_output) + offset;
    const T* summed = static_cast<const T*>(a.summed) + offset;
    const T* grad_summed = a.grad_summed == nullptr ? nullptr : static_cast<const T*>(a.grad_summed) + offset;
    T* grad_input = static_cast<T*>(a.grad_input) + offset;
    if (fetch_ahead && row + 1 < end) {
      prefetch_next(grad, a.cols);
      prefetch_next(summed, a.cols);
      prefetch_next(grad_input, a.cols);
      if (grad_summed != nullptr) prefetch_next(grad_summed, a.cols);
    }
    const Vec centre = broadcast(a.mean == nullptr ? 0.0f : a.mean[row]), rstd = broadcast(a.rstd[row]);
    for_lanes(0, a.cols, [&](int64_t i, int n) FASTFORMER_LAMBDA {
      const Vec dy = load_n(grad + i, n);
      const Vec xhat = (load_n(summed + i, n) - centre) * rstd;
      const Vec g = a.weight == nullptr ? dy : dy * load_n(a.weight + i, n);
      store_n(normed + i, xhat, n);
      store_n(scaled + i, g, n);
      if (grad_weight != nullptr) store_n(grad_weight + i, fma(dy, xhat, load_n(grad_weight + i, n)), n);
      if (grad_bias != nullptr) store_n(grad_bias + i, load_n(grad_bias + i, n) + dy, n);
    });
    const auto sum_g = [&](int64_t i, int n) FASTFORMER_LAMBDA { return load_n(scaled + i, n); };
    const auto sum_gx = [&](int64_t i, int n)
                            FASTFORMER_LAMBDA { return load_n(scaled + i, n) * load_n(normed + i, n); };
    const Vec mean_g = broadcast(a.mean == nullptr ? 0.0f : inverse * sum_lanes(a.cols, sum_g));
    const Vec mean_gx = broadcast(inverse * sum_lanes(a.cols, sum_gx));
    for_lanes(0, a.cols, [&](int64_t i, int n) FASTFORMER_LAMBDA {
      Vec dx = (load_n(scaled + i, n) - mean_g - load_n(normed + i, n) * mean_gx) * rstd;
      if (grad_summed != nullptr) dx = dx + load_n(grad_summed + i, n);
      store_n(grad_input + i, dx, n);
    });
  }
}

void forward(const LayerNormForward& args, int64_t begin, int64_t end, float* scratch) {
  visit(args.dtype, [&]<typename T>() { forward_rows<T>(args, begin, end, scratch); });
}

void backward(const LayerNormBackward& args, int64_t begin, int64_t end, float* grad_weight, float* grad_bias,
              float* scratch) {
  visit(args.dtype, [&]<typename T>() { backward_rows<T>(args, begin, end, grad_weight, grad_bias, scratch); });
}

}  // namespace

const LayerNormKernels layer_norm{forward, backward};

}  // namespace fastformer::FASTFORMER_LEVEL
