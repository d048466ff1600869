// The element types the kernels read and write; arithmetic is in float.
#pragma once

#include <stdint.h>
#include <string.h>

namespace fastformer {

enum class DType { float32, bfloat16, float16 };

struct BFloat16 {
  uint16_t bits;
};
struct Half {
  uint16_t bits;
};

}  // namespace fastformer
