// Cross-entropy of rows of logits, and its gradient in their place.
#pragma once

#include "../level.h"
#include "dtypes.h"

namespace fastformer {

// Rows are counted from the first of a block.
struct CrossEntropyRows {
  void* logits;             // [rows, cols]; with row_weight overwritten by row_weight * d loss / d logits
  DType dtype;              // of logits
  const int64_t* target;    // [rows], ignore_index or in [0, cols)
  const float* row_weight;  // [rows], or null
  float* losses;            // [rows]: lse - (1 - s) logits[target] - s mean(logits), or 0
  float* lse;               // [rows]
  int64_t cols;
  int64_t ignore_index;
  float label_smoothing;  // s
};

struct LinearCrossEntropyKernels {
  // Rows [begin, end).
  void (*losses)(const CrossEntropyRows&, int64_t begin, int64_t end);
};

FASTFORMER_KERNEL_TABLE(LinearCrossEntropyKernels, linear_cross_entropy)

}  // namespace fastformer
