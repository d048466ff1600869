// softmax over rows: y = exp(scale x + mask - max) / sum.
#pragma once

#include "../../dtypes.h"
#include "../level.h"

namespace fastformer {

// Rows are indexed (outer, head, row), of sizes (.., heads, rows); the mask's strides broadcast it to that.
struct SoftmaxForward {
  const void* input;  // [outer * heads * rows, cols]
  void* output;       // the same
  const void* mask;   // bool (True keeps) or the mask's dtype, by mask_kind
  MaskKind mask_kind;
  DType dtype;       // of input and output
  DType mask_dtype;  // of an additive mask
  int64_t heads, rows, cols;
  int64_t mask_strides[4];  // outer, head, row, column; in elements
  float scale;
  bool is_causal;
  bool stream;  // the output past the cache
};

struct SoftmaxBackward {
  const void* grad_output;  // [rows, cols]
  const void* output;
  void* grad_input;
  DType dtype;
  int64_t cols;
  float scale;
  bool stream;  // grad_input past the cache
};

struct SoftmaxKernels {
  // Rows [begin, end); scratch holds cols floats.
  void (*forward)(const SoftmaxForward&, int64_t begin, int64_t end, float* scratch);
  void (*backward)(const SoftmaxBackward&, int64_t begin, int64_t end);
};

FASTFORMER_KERNEL_TABLE(SoftmaxKernels, softmax)

}  // namespace fastformer
