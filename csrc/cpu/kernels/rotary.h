// Rotates pairs of features by angles that depend on the position.
#pragma once

#include "../../dtypes.h"
#include "../level.h"

namespace fastformer {

struct RotaryTensor {
  const void* input;  // [batch, heads, seqlen, head_dim], features adjacent
  void* output;       // in memory [batch, seqlen, heads, head_dim]
  int64_t heads;
  int64_t strides[3];  // of input: batch, head, position; in elements
};

struct RotaryArgs {
  RotaryTensor tensors[2];  // query and key
  const float* cos;         // [(batch,) seqlen, width]
  const float* sin;
  int64_t angle_batch_stride;  // 0 where all sequences share the angles
  DType dtype;
  int64_t seqlen, head_dim, width;
  bool interleaved;  // pairs are (2i, 2i + 1), else (i, i + width)
  bool inverse;      // turn back
};

struct RotaryKernels {
  // Positions [begin, end) of batch * seqlen; scratch holds 4 * width floats.
  void (*rotate)(const RotaryArgs&, int64_t begin, int64_t end, float* scratch);
};

FASTFORMER_KERNEL_TABLE(RotaryKernels, rotary)

}  // namespace fastformer
