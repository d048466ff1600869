// Attention: output = softmax(scale query key^T + mask) value, by blocks, never holding all the scores. With softcap,
// softcap tanh(scale query key^T / softcap) instead of scale query key^T.
//
// Work comes in blocks of kQueryBlock queries of one head; those of all the heads that share a key head are numbered
// through: block = head in group * query_blocks + block in head.
#pragma once

#include "../level.h"
#include "dtypes.h"

namespace fastformer {

constexpr int64_t kQueryBlock = 96;  // a multiple of every level's panel of columns

struct Attention {
  const void* query;  // [batch, heads, seqlen_q, head_dim]
  const void* key;    // [batch, kv_heads, seqlen_k, head_dim]
  const void* value;  // [batch, kv_heads, seqlen_k, value_dim]
  const void* mask;   // broadcast to [batch, heads, seqlen_q, seqlen_k]
  DType dtype;        // of query, key, value and output
  DType mask_dtype;   // of an additive mask
  MaskKind mask_kind;
  int64_t heads, kv_heads, seqlen_q, seqlen_k, head_dim, value_dim;
  int64_t query_strides[3], key_strides[3], value_strides[3];  // batch, head, row; in elements; 1 along a row
  int64_t mask_strides[4];
  float scale;
  float softcap;     // 0: none
  int64_t diagonal;  // query i sees keys j < i + diagonal; seqlen_k if not causal
};

struct AttentionForward {
  Attention inputs;  // scale is positive
  void* output;      // [batch, seqlen_q, heads, value_dim]
  float* lse;        // [batch, heads, seqlen_q]
};

struct AttentionKernels {
  // Bytes of scratch for `blocks` blocks at once.
  int64_t (*forward_scratch)(const AttentionForward&, int64_t blocks);
  // Blocks [begin, end) of one batch entry and key head.
  void (*forward)(const AttentionForward&, int64_t batch, int64_t kv_head, int64_t begin, int64_t end, void* scratch);
};

struct AttentionDecodeKernels {
  int64_t (*scratch)(const AttentionForward&);
  // Floats of the states of all queries of one key head.
  int64_t (*states)(const AttentionForward&);
  // The states of one batch entry and key head after keys [begin, end).
  void (*part)(const AttentionForward&, int64_t batch, int64_t kv_head, int64_t begin, int64_t end, float* states,
               void* scratch);
  // Output and lse from the states of all parts of the keys.
  void (*combine)(const AttentionForward&, int64_t batch, int64_t kv_head, float* states, int64_t parts);
};

struct AttentionBackward {
  Attention inputs;
  const void* grad_output;                            // [batch, heads, seqlen_q, value_dim]
  const void* output;                                 // the same
  const float* grad_lse;                              // [batch, heads, seqlen_q], or null
  const float* lse;                                   // [batch, heads, seqlen_q]
  void* grad_query;                                   // [batch, seqlen_q, heads, head_dim]
  void* grad_key;                                     // [batch, seqlen_k, kv_heads, head_dim]
  void* grad_value;                                   // [batch, seqlen_k, kv_heads, value_dim]
  float* grad_mask;                                   // [batch, heads, seqlen_q, seqlen_k] of zeros, or null
  int64_t grad_output_strides[3], output_strides[3];  // as query_strides
};

struct AttentionBackwardKernels {
  int64_t (*scratch)(const AttentionBackward&);
  // Floats of one part's sums for the gradients of a key head's keys and values.
  int64_t (*sums)(const AttentionBackward&);
  // Query blocks [begin, end) of one batch entry and key head: their grad_query, and what they add to the gradients of
  // keys and values.
  void (*part)(const AttentionBackward&, int64_t batch, int64_t kv_head, int64_t begin, int64_t end, float* sums,
               void* scratch);
  // The gradients of keys [begin, end) and their values, from all the parts' sums.
  void (*finish)(const AttentionBackward&, int64_t batch, int64_t kv_head, int64_t begin, int64_t end, float* sums,
                 int64_t parts);
};

FASTFORMER_KERNEL_TABLE(AttentionKernels, attention)
FASTFORMER_KERNEL_TABLE(AttentionDecodeKernels, attention_decode)
FASTFORMER_KERNEL_TABLE(AttentionBackwardKernels, attention_backward)

}  // namespace fastformer
