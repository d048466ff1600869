// What the wrappers of the unembedding's cross-entropy share on every device.
#pragma once

#include <optional>

#include "tensor.h"

namespace fastformer {

inline void check_linear_cross_entropy(const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias,
                                       const Tensor& target, double label_smoothing) {
  STD_TORCH_CHECK(input.dim() == 2 && weight.dim() == 2 && input.size(1) == weight.size(1),
                  "input must be [N, C] and weight [V, C]");
  STD_TORCH_CHECK(weight.scalar_type() == input.scalar_type(), "weight must have the dtype of input");
  STD_TORCH_CHECK(!bias.has_value() || (bias->dim() == 1 && bias->size(0) == weight.size(0)), "bias must be [",
                  weight.size(0), "]");
  STD_TORCH_CHECK(!bias.has_value() || bias->scalar_type() == input.scalar_type(), "bias must have the dtype of input");
  STD_TORCH_CHECK(target.dim() == 1 && target.size(0) == input.size(0) && target.scalar_type() == ScalarType::Long,
                  "target must be int64 [", input.size(0), "]");
  STD_TORCH_CHECK(label_smoothing >= 0.0 && label_smoothing <= 1.0, "label_smoothing must be in [0, 1], not ",
                  label_smoothing);
}

inline void check_row_values(const std::optional<Tensor>& values, const char* name, int64_t rows) {
  STD_TORCH_CHECK(!values.has_value() ||
                      (values->dim() == 1 && values->size(0) == rows && values->scalar_type() == ScalarType::Float),
                  name, " must be float32 [", rows, "]");
}

}  // namespace fastformer
