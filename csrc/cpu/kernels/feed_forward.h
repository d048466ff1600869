// The elementwise part of the feed-forward layer, between its two products.
//
// It works on the sums of a product block by block as gemm.h hands them over, or in place on a product of torch's.
// Blocks are of the products' type (kernels/product.h), bias and hidden of `dtype`. Pointers are to the first row of
// the product.
#pragma once

#include "../../dtypes.h"
#include "../level.h"
#include "gemm.h"

namespace fastformer {

struct FeedForwardForward {
  void* up;          // [rows, cols]: the activated values are put here, in place of input weight1^T
  const void* gate;  // [rows, cols]: input weight_gate^T, or null
  const void* bias;  // [cols], added to `up`, or null
  void* hidden;      // [rows, cols], or [rows, 2 cols] = gate beside up: the activation's arguments; or null
  Activation activation;
  DType dtype;
  int64_t cols;
};

// Rows whose gradients by the bias are added up at once: short runs keep the rounding error small.
constexpr int64_t kBiasRows = 32;

struct FeedForwardBackward {
  const void* hidden;  // as forward left it
  void* grad;          // [rows, cols]: the gradient by `up` is put here, in place of that by the activated values
  void* grad_gate;     // [rows, cols]: gradient by `gate`; null without one
  void* activated;     // [rows, cols]: the activated values once more; or null
  float* grad_bias;    // [ceil(rows / kBiasRows), cols]: sums of the gradient by `up`; or null
  Activation activation;
  DType dtype;
  int64_t cols;
};

struct FeedForwardKernels {
  // Rows [row_begin, row_end) of a product in `up`. In backward, of one in `grad`; they begin at a multiple of
  // kBiasRows.
  void (*forward)(const FeedForwardForward&, int64_t row_begin, int64_t row_end);
  void (*backward)(const FeedForwardBackward&, int64_t row_begin, int64_t row_end);
  // The sums of a block instead. args: a FeedForwardForward, or a FeedForwardBackward.
  void (*forward_block)(const void* args, const GemmBlock&);
  void (*backward_block)(const void* args, const GemmBlock&);
};

FASTFORMER_KERNEL_TABLE(FeedForwardKernels, feed_forward)

}  // namespace fastformer
