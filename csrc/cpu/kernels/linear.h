// Products of a few rows with a large matrix, which are bound by reading the matrix once.
#pragma once

#include "../../dtypes.h"
#include "../level.h"

namespace fastformer {

struct LinearArgs {
  const void* input;   // [rows, depth]
  const void* weight;  // [cols, depth], rows weight_stride elements apart
  const void* bias;    // [cols] or null
  void* output;        // [rows, cols]
  DType dtype;
  int64_t rows, cols, depth, weight_stride;
};

struct LinearKernels {
  // Columns [begin, end) of input weight^T + bias.
  void (*multiply)(const LinearArgs&, int64_t begin, int64_t end);
};

// Columns that are worked on together; tasks are best made of whole groups.
constexpr int64_t kLinearGroup = 48;

FASTFORMER_KERNEL_TABLE(LinearKernels, linear)

}  // namespace fastformer
