// Cross-entropy of rows of logits, and its gradient in their place.
#pragma once

#include "../../dtypes.h"
#include "../level.h"
#include "gemm.h"

namespace fastformer {

// What the loss needs to know of a part of a row of logits.
struct CrossEntropyPart {
  float peak, total, sum;  // the maximum, sum(exp(logits - peak)), and, where labels are smoothed, sum(logits)
};

// Rows are counted from the first of a chunk.
struct CrossEntropyRows {
  void* logits;             // [rows, cols]; with row_weight overwritten by row_weight * d loss / d logits
  DType dtype;              // of logits and bias
  const void* bias;         // [cols], which `block` adds; or null
  const int64_t* target;    // [rows], ignore_index or in [0, cols)
  const float* row_weight;  // [rows], or null
  float* losses;            // [rows]: lse - (1 - s) logits[target] - s mean(logits), or 0
  float* lse;               // [rows]
  int64_t cols;
  int64_t ignore_index;
  float label_smoothing;  // s
  // What `block` found; null where the logits are read instead.
  CrossEntropyPart* parts;  // [rows, blocks of columns]
  float* target_logits;     // [rows]
  int64_t blocks, block_cols;
};

struct LinearCrossEntropyKernels {
  // Takes a block of the product that makes the logits: adds the bias, fills in `parts` and `target_logits`, and stores
  // the logits, less the block's peak, unless there is no place for them. args is a CrossEntropyRows.
  void (*block)(const void* args, const GemmBlock&);
  // Rows [begin, end).
  void (*losses)(const CrossEntropyRows&, int64_t begin, int64_t end);
};

FASTFORMER_KERNEL_TABLE(LinearCrossEntropyKernels, linear_cross_entropy)

}  // namespace fastformer
