// What surrounds a matrix product: sums over rows and over partial products.
//
// Products of bfloat16 run, and come, in bfloat16 at level avx512_bf16; all others in float32, which torch multiplies
// several times faster than a half type the processor doesn't know.
#pragma once

#include "../../dtypes.h"
#include "../level.h"

namespace fastformer {

struct ProductKernels {
  // totals[c] += the sum over the rows of values [rows, cols], for columns [begin, end).
  void (*add_rows)(const void* values, DType dtype, int64_t rows, int64_t cols, float* totals, int64_t begin,
                   int64_t end);
  // totals[i] += values[i] for i in [begin, end).
  void (*accumulate)(const void* values, DType dtype, float* totals, int64_t begin, int64_t end);
};

FASTFORMER_KERNEL_TABLE(ProductKernels, product)

}  // namespace fastformer
