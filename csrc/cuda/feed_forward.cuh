// What the feed-forward layer's files share: the activations, and the products that are our own.
#pragma once

#include <tuple>

#include "../feed_forward.h"
#include "../library_product.h"
#include "rows.cuh"

namespace fastformer::cuda {

struct Sigmoid {
  float value, slope;
};

// The slope is sigmoid(x) (1 - sigmoid(x)), without the subtraction, which would cancel.
FASTFORMER_DEVICE Sigmoid sigmoid(float x) {
  const float exponential = expf(-fabsf(x));
  const float larger = 1.0f / (1.0f + exponential), smaller = exponential * larger;
  return {x < 0.0f ? smaller : larger, smaller * larger};
}

struct Activated {
  float value, slope;
};

// The activation at x, and its derivative there.
template <Activation kActivation>
FASTFORMER_DEVICE Activated activate(float x) {
  if constexpr (kActivation == Activation::gelu) {  // the normal distribution's integral, and x times its density
    const float integral = 0.5f * (1.0f + erff(x * 0.70710678f));
    return {x * integral, integral + x * 0.39894228f * expf(-0.5f * x * x)};
  } else if constexpr (kActivation == Activation::gelu_tanh) {  // 0.5 (1 + tanh(u)) = sigmoid(2 u)
    const Sigmoid gate = sigmoid(1.59576912f * (x + 0.044715f * x * x * x));
    return {x * gate.value, gate.value + x * gate.slope * 1.59576912f * (1.0f + 0.134145f * x * x)};
  } else if constexpr (kActivation == Activation::relu) {  // NaN stays NaN
    return {x < 0.0f ? 0.0f : x, x > 0.0f ? 1.0f : 0.0f};
  } else {
    const Sigmoid gate = sigmoid(x);
    return {x * gate.value, gate.value + x * gate.slope};
  }
}

// --- feed_forward_fused.cu: for 16-bit elements, sizes other than 0, and widths that are multiples of 8

// (output, hidden).
std::tuple<Tensor, Tensor> feed_forward_forward_fused(const Tensor& input, const Tensor& weight1,
                                                      const std::optional<Tensor>& bias1,
                                                      const std::optional<Tensor>& weight_gate, const Tensor& weight2,
                                                      const std::optional<Tensor>& bias2, Activation activation,
                                                      bool save_hidden, const OnDevice& device);

// The gradients by input, weight1, bias1, weight_gate, weight2 and bias2.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> feed_forward_backward_fused(
    const Tensor& grad_output, const Tensor& input, const Tensor& weight1, const std::optional<Tensor>& weight_gate,
    const Tensor& weight2, const Tensor& hidden, Activation activation, bool has_bias1, bool has_bias2,
    bool needs_grad_input, bool needs_grad_weights, const OnDevice& device);

}  // namespace fastformer::cuda
