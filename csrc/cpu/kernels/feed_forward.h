// The elementwise part of the feed-forward layer, between its two products.
//
// It works in place on a block of rows of a product, while that is still in cache. Blocks are of the products' type
// (kernels/product.h), bias and hidden of `dtype`.
#pragma once

#include "../level.h"
#include "dtypes.h"

namespace fastformer {

enum class Activation { gelu, gelu_tanh, relu, silu };

struct FeedForwardForward {
  void* up;          // [rows, cols]: input weight1^T; overwritten by the activated values
  const void* gate;  // [rows, cols]: input weight_gate^T, or null
  const void* bias;  // [cols], added to `up`, or null
  void* hidden;      // [rows, cols], or [rows, 2 cols] = gate beside up: the activation's arguments; or null
  Activation activation;
  DType dtype;
  int64_t cols;
};

struct FeedForwardBackward {
  const void* hidden;  // as forward left it
  void* grad;          // [rows, cols]: gradient by the activated values; overwritten by the one by `up`
  void* grad_gate;     // [rows, cols]: gradient by `gate`; null without one
  void* activated;     // [rows, cols]: the activated values once more; or null
  float* grad_bias;    // [cols]: the sum over the rows of the gradient by `up` is added; or null
  Activation activation;
  DType dtype;
  int64_t rows, cols;
};

struct FeedForwardKernels {
  void (*forward)(const FeedForwardForward&, int64_t row_begin, int64_t row_end);
  // By columns, so that each column's sum is one task's, in the order of the rows.
  void (*backward)(const FeedForwardBackward&, int64_t col_begin, int64_t col_end);
};

FASTFORMER_KERNEL_TABLE(FeedForwardKernels, feed_forward)

}  // namespace fastformer
