// What the feed-forward layer's files share: the activations, and the products that are our own.
#pragma once

#include <tuple>

#include "../feed_forward.h"
#include "../library_product.h"
#include "ptx.cuh"
#include "rows.cuh"

namespace fastformer::cuda {

struct Sigmoid {
  float value, slope;
};

// What follows has two precisions: kExact to float32's last bits, or within 5e-6 of each value, a hundredth of what
// rounding to 16 bits loses, by half of the instructions. They count beside a product: one on Hopper of a tile of 128 x
// 192 over a depth of 1024 is 12 thousand cycles of the tensor cores, and exact gelu about 5 thousand of the other
// units.

// The slope is sigmoid(x) (1 - sigmoid(x)), without the subtraction, which would cancel.
template <bool kExact>
FASTFORMER_DEVICE Sigmoid sigmoid(float x) {
  const float exponential = kExact ? expf(-fabsf(x)) : ptx::ex2(fabsf(x) * -1.44269504f);
  const float larger = kExact ? 1.0f / (1.0f + exponential) : ptx::rcp(1.0f + exponential);
  const float smaller = exponential * larger;
  return {x < 0.0f ? smaller : larger, smaller * larger};
}

// The normal distribution's density, and its integral up to x.
struct Normal {
  float density, integral;
};

template <bool kExact>
FASTFORMER_DEVICE Normal normal(float x) {
  if constexpr (kExact) {
    return {0.39894228f * expf(-0.5f * x * x), 0.5f * (1.0f + erff(x * 0.70710678f))};
  } else {
    // Beyond |x|: e^(-x^2 / 2) t p(t), t = 1 / (1 + 0.31 |x|), as Abramowitz and Stegun have it (7.1.26); p, of degree
    // 5, fitted for the least relative error, 4.7e-6.
    const float exponential = ptx::ex2(x * x * -0.721347520f), t = ptx::rcp(fmaf(0.31f, fabsf(x), 1.0f));
    float p = fmaf(-0.0739293152f, t, 0.180450690f);
    p = fmaf(p, t, 0.0157446103f);
    p = fmaf(p, t, 0.133429612f);
    p = fmaf(p, t, 0.120441404f);
    p = fmaf(p, t, 0.123860679f);
    const float beyond = p * t * exponential;
    return {0.39894228f * exponential, x < 0.0f ? beyond : 1.0f - beyond};
  }
}

struct Activated {
  float value, slope;
};

// The activation at x, and its derivative there.
template <Activation kActivation, bool kExact>
FASTFORMER_DEVICE Activated activate(float x) {
  if constexpr (kActivation == Activation::gelu) {
    const Normal at = normal<kExact>(x);
    return {x * at.integral, at.integral + x * at.density};
  } else if constexpr (kActivation == Activation::gelu_tanh) {  // 0.5 (1 + tanh(u)) = sigmoid(2 u)
    const Sigmoid gate = sigmoid<kExact>(1.59576912f * (x + 0.044715f * x * x * x));
    return {x * gate.value, gate.value + x * gate.slope * 1.59576912f * (1.0f + 0.134145f * x * x)};
  } else if constexpr (kActivation == Activation::relu) {  // NaN stays NaN
    return {x < 0.0f ? 0.0f : x, x > 0.0f ? 1.0f : 0.0f};
  } else {
    const Sigmoid gate = sigmoid<kExact>(x);
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
