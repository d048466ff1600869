// What the feed-forward layer's wrappers share on every device.
#pragma once

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

}  // namespace fastformer
