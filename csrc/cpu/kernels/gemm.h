// Matrix products A B on packed panels of B, with float32 sums: of float32, and at level avx512_bf16 of bfloat16.
//
// A product is taken in blocks of C. The sums of a block are handed to a function while they are in the second-level
// cache: to store them, or to go on with them.
#pragma once

#include "../../dtypes.h"
#include "../level.h"

namespace fastformer {

// A matrix in memory that somebody else owns; one of the strides, counted in elements, is 1.
struct GemmMatrix {
  const void* data;
  int64_t row_stride, col_stride;
};

// The sums of C's rows [row_begin, row_end) in columns [col_begin, col_end).
struct GemmBlock {
  const float* sums;  // the first of them, in scratch memory
  int64_t stride;     // from row to row
  int64_t row_begin, row_end, col_begin, col_end;
};

struct Gemm {
  DType dtype;   // of A and B
  GemmMatrix a;  // [M, K]
  GemmMatrix b;  // [K, N]
  void* packed;  // B in panels of panel_cols columns, zeros beyond N and K; see packed_bytes
  int64_t M, N, K;
  int64_t first_col;  // of C that B's first column makes
  void (*finish)(const void* context, const GemmBlock&);
  const void* context;
};

// The context of `store`.
struct GemmOutput {
  void* c;  // [M, N]
  int64_t stride;
  DType dtype;
  bool accumulate;   // C += A B
  const void* bias;  // [N] of dtype, added to every row; or null
};

// What one call of multiply may span.
constexpr int64_t kGemmRows = 128;
constexpr int64_t kGemmPanels = 8;
constexpr int64_t kGemmCols = kGemmPanels * 48;
// Depth of a block, in units of four bytes. Longer sums are added up from partial sums, which also rounds less than one
// long chain: in one chain of 1536 the error reaches 2.6 times what accuracy.py allows (measured with a library that
// does so).
constexpr int64_t kGemmDepth = 192;
constexpr int64_t kGemmScratch = 4 * (kGemmRows * kGemmDepth + kGemmRows * kGemmCols);

struct GemmKernels {
  int64_t panel_cols;
  // Packs panels [begin, end) of B.
  void (*pack)(const Gemm&, int64_t begin, int64_t end);
  // Rows [row_begin, row_end) of C in the columns of panels [panel_begin, panel_end); scratch has kGemmScratch bytes.
  void (*multiply)(const Gemm&, int64_t row_begin, int64_t row_end, int64_t panel_begin, int64_t panel_end,
                   void* scratch);
  // A `finish`: C = A B + bias.
  void (*store)(const void* output, const GemmBlock&);
};

FASTFORMER_KERNEL_TABLE(GemmKernels, gemm)

// Of one panel of a product of depth K.
inline int64_t packed_bytes(const GemmKernels& kernels, DType dtype, int64_t K) {
  return kernels.panel_cols * 4 * (dtype == DType::float32 ? K : (K + 1) / 2);
}

}  // namespace fastformer
