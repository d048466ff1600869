// What the feed-forward layer's wrappers share on every device.
#pragma once

#include <optional>
#include <string>

#include "tensor.h"

namespace fastformer {

inline Activation activation_of(const std::string& name) {
  if (name == "gelu") return Activation::gelu;
  if (name == "gelu_tanh") return Activation::gelu_tanh;
  if (name == "relu") return Activation::relu;
  STD_TORCH_CHECK(name == "silu", "activation must be gelu, gelu_tanh, relu or silu, not ", name);
  return Activation::silu;
}

struct FeedForwardSizes {
  int64_t rows, input, hidden, output;
};

inline FeedForwardSizes check_feed_forward(const Tensor& input, const Tensor& weight1,
                                           const std::optional<Tensor>& weight_gate, const Tensor& weight2) {
  STD_TORCH_CHECK(weight1.dim() == 2 && weight2.dim() == 2, "weight1 and weight2 must have two dimensions");
  dtype_of(input, "input");  // an error for any that kernels don't read
  const int64_t N = rows_of(input, "input"), C = input.size(input.dim() - 1), F = weight1.size(0), C2 = weight2.size(0);
  check_matrix(weight1, "weight1", F, C, input);
  check_matrix(weight2, "weight2", C2, F, input);
  if (weight_gate.has_value()) check_matrix(*weight_gate, "weight_gate", F, C, input);
  return {N, C, F, C2};
}

// What the backward pass has besides.
inline void check_feed_forward_gradient(const Tensor& grad_output, const Tensor& hidden, const Tensor& input,
                                        const FeedForwardSizes& sizes, bool gated) {
  check_matrix(hidden, "hidden", sizes.rows, gated ? 2 * sizes.hidden : sizes.hidden, input);
  STD_TORCH_CHECK(
      rows_of(grad_output, "grad_output") == sizes.rows && grad_output.size(grad_output.dim() - 1) == sizes.output,
      "grad_output must be [..., ", sizes.output, "] with the rows of input");
  STD_TORCH_CHECK(grad_output.scalar_type() == input.scalar_type(), "grad_output must have the dtype of input");
}

}  // namespace fastformer
