// Layer norm and RMS norm over rows, with an optional residual added first.
#pragma once

#include "../../dtypes.h"
#include "../level.h"

namespace fastformer {

struct LayerNormForward {
  const void* input;     // [rows, cols]
  const void* residual;  // [rows, cols], or null
  const void* weight;    // [cols], or null
  const void* bias;      // [cols], or null
  void* output;          // [rows, cols]
  void* summed;          // [rows, cols] where there is a residual
  float* mean;           // [rows]; null for RMS norm
  float* rstd;           // [rows]
  DType dtype;           // of input, residual, output and summed
  DType weight_dtype, bias_dtype;
  int64_t cols;
  float eps;
  bool stream;  // output and summed past the cache
};

struct LayerNormBackward {
  const void* grad_output;  // [rows, cols]
  const void* grad_summed;  // [rows, cols], or null
  const void* summed;       // [rows, cols]
  const void* weight;       // [cols], or null
  const float* mean;        // [rows]; null for RMS norm
  const float* rstd;        // [rows]
  void* grad_input;         // [rows, cols]
  DType dtype;              // of gradients and summed
  DType weight_dtype;
  int64_t cols;
};

struct LayerNormKernels {
  // Rows [begin, end); scratch holds 2 * cols floats, or 5 * cols of what streams sums.
  void (*forward)(const LayerNormForward&, int64_t begin, int64_t end, float* scratch);
  // grad_input of rows [begin, end), and their sums of grad_output * normed and grad_output added into grad_weight and
  // grad_bias ([cols] each, either may be null); scratch holds cols floats.
  void (*backward)(const LayerNormBackward&, int64_t begin, int64_t end, float* grad_weight, float* grad_bias,
                   float* scratch);
};

FASTFORMER_KERNEL_TABLE(LayerNormKernels, layer_norm)

}  // namespace fastformer
