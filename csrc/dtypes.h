// The element types the kernels read and write (arithmetic is in float), the kinds of masks, and the activations.
#pragma once

#include <stdint.h>
#include <string.h>

namespace fastformer {

enum class DType { float32, bfloat16, float16 };

// boolean: True keeps; additive: of its own DType.
enum class MaskKind { none, boolean, additive };

enum class Activation { gelu, gelu_tanh, relu, silu };

struct BFloat16 {
  uint16_t bits;
};
struct Half {
  uint16_t bits;
};

}  // namespace fastformer
