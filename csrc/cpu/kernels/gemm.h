// float32 matrix product C = A B, or C += A B, on packed panels of B.
#pragma once

#include "../level.h"
#include "dtypes.h"

namespace fastformer {

// A float matrix in memory that somebody else owns; one of the strides is 1.
struct FloatMatrix {
  const float* data;
  int64_t row_stride, col_stride;
};

struct Gemm {
  FloatMatrix a;     // [M, K]
  FloatMatrix b;     // [K, N]
  float* c;          // [M, N]
  int64_t c_stride;  // from row to row
  float* packed;     // B in panels of panel_cols columns: [panels][K][panel_cols], zeros beyond N
  int64_t M, N, K;
  bool accumulate;    // C += A B
  const float* bias;  // [N], added to every row; or null
};

struct GemmKernels {
  int64_t panel_cols;
  // Packs panels [begin, end) of B.
  void (*pack)(const Gemm&, int64_t begin, int64_t end);
  // Rows [row_begin, row_end) of C in the columns of panels [panel_begin, panel_end); scratch holds kGemmScratch
  // floats.
  void (*multiply)(const Gemm&, int64_t row_begin, int64_t row_end, int64_t panel_begin, int64_t panel_end,
                   float* scratch);
};

// Rows that one call of multiply may span.
constexpr int64_t kGemmRows = 128;
// Depth of a block. Sums longer than this are added up from partial sums, which also rounds less than one long chain:
// in one chain of 1536 the error reaches 2.6 times what accuracy.py allows (measured with a library that does so).
constexpr int64_t kGemmDepth = 192;
constexpr int64_t kGemmScratch = kGemmRows * kGemmDepth + kGemmRows * 64;

FASTFORMER_KERNEL_TABLE(GemmKernels, gemm)

}  // namespace fastformer
