// Attention: output = dropout(softmax(scores)) value, by blocks, never holding all the scores. The meaning of each
// option is that of the operators in csrc/ops.cpp.
//
// Work comes in blocks of kQueryBlock queries of one head of one sequence. Those of all the heads that share a key head
// are numbered through: block = block in head * group + head in group, so that neighbours see the same keys. (The other
// way round, the backward pass in groups of 4 heads took 1.4 times as long with a window of 256, 1.07 when causal.)
#pragma once

#include "../../dtypes.h"
#include "../level.h"

namespace fastformer {

constexpr int64_t kQueryBlock = 96;  // a multiple of every level's panel of columns

// A window's side without a bound; sums with it don't overflow.
constexpr int64_t kUnbounded = int64_t{1} << 60;

// The weights that are kept: see reference.dropout_mask.
struct Dropout {
  uint32_t threshold = 0;  // 0: no dropout
  uint32_t seed[2] = {0, 0}, offset = 0;
  float factor = 1.0f;  // of kept weights
};

struct Attention {
  const void* query;  // [batch, heads, seqlen_q, head_dim]
  const void* key;    // [batch, kv_heads, seqlen_k, head_dim]; if paged [pages, kv_heads, page_size, head_dim]
  const void* value;  // the same, of value_dim
  const void* mask;   // broadcast to [batch, heads, seqlen_q, seqlen_k]
  DType dtype;        // of query, key, value and output
  DType mask_dtype;   // of an additive mask
  MaskKind mask_kind;
  int64_t heads, kv_heads, head_dim, value_dim;
  int64_t seqlen_q, seqlen_k;  // of the tensors; each sequence has its own, see sequence_at
  int64_t query_strides[3], key_strides[3], value_strides[3];  // batch, head, row; in elements; 1 along a row
  int64_t mask_strides[4];
  float scale;
  float softcap;          // 0: none
  int64_t left, right;    // of the window; kUnbounded, or at most that
  bool bottom_right;      // how the window, and a query's distance from a key, is aligned
  const float* slopes;    // ALiBi's, [batch, heads], or null
  int64_t slopes_stride;  // between sequences; 0 if they share them
  const float* sinks;     // [heads], or null
  Dropout dropout;
  const int32_t* cu_seqlens_q;  // [sequences + 1] if queries are packed, or null
  const int32_t* cu_seqlens_k;  // likewise for keys
  const int32_t* seqused_k;     // [sequences], or null
  const int32_t* block_table;   // [sequences, table_stride], or null
  int64_t table_stride, page_size;
};

// One of the sequences of a call. Its queries are rows query_begin .. query_begin + queries of entry query_batch of the
// query tensor, and likewise its keys, unless they are paged.
struct Sequence {
  int64_t index;
  int64_t query_batch, query_begin, queries;
  int64_t key_batch, key_begin, keys;
  int64_t offset;  // query i is at position i + offset among the keys
};

static inline Sequence sequence_at(const Attention& a, int64_t index) {
  Sequence s{index, index, 0, a.seqlen_q, index, 0, a.seqlen_k, 0};
  if (a.cu_seqlens_q != nullptr) {
    s.query_batch = 0;
    s.query_begin = a.cu_seqlens_q[index];
    s.queries = a.cu_seqlens_q[index + 1] - s.query_begin;
  }
  if (a.cu_seqlens_k != nullptr) {
    s.key_batch = 0;
    s.key_begin = a.cu_seqlens_k[index];
    s.keys = a.cu_seqlens_k[index + 1] - s.key_begin;
  }
  if (a.seqused_k != nullptr) s.keys = a.seqused_k[index];
  if (a.bottom_right) s.offset = s.keys - s.queries;
  return s;
}

struct KeyRange {
  int64_t begin, end;
};

// The keys that some of the sequence's queries [first, first + count) see.
static inline KeyRange keys_seen(const Attention& a, const Sequence& s, int64_t first, int64_t count) {
  const int64_t position = first + s.offset;
  const int64_t begin = position - a.left, end = position + count + a.right;
  const int64_t last = end < s.keys ? end : s.keys;
  if (count <= 0 || last <= 0 || begin >= last) return {0, 0};
  return {begin > 0 ? begin : 0, last};
}

static inline int64_t query_blocks(int64_t queries) { return (queries + kQueryBlock - 1) / kQueryBlock; }

// The first query of a block.
static inline int64_t block_begin(const Attention& a, int64_t block) {
  return block / (a.heads / a.kv_heads) * kQueryBlock;
}

struct AttentionForward {
  Attention inputs;  // scale is positive
  void* output;      // [batch, seqlen_q, heads, value_dim]
  float* lse;        // [batch, heads, seqlen_q]
};

struct AttentionKernels {
  // Bytes of scratch for `blocks` blocks at once.
  int64_t (*forward_scratch)(const AttentionForward&, int64_t blocks);
  // Blocks [begin, end) of one sequence and key head.
  void (*forward)(const AttentionForward&, const Sequence&, int64_t kv_head, int64_t begin, int64_t end, void* scratch);
};

struct AttentionDecodeKernels {
  // Bytes of scratch, and floats of the states of all queries of one key head, for sequences of so many queries.
  int64_t (*scratch)(const AttentionForward&, int64_t queries);
  int64_t (*states)(const AttentionForward&, int64_t queries);
  // The states of one sequence and key head after keys [begin, end); begin is a multiple of kDecodeAlignment.
  void (*part)(const AttentionForward&, const Sequence&, int64_t kv_head, int64_t begin, int64_t end, float* states,
               void* scratch);
  // Output and lse from the states of all parts of the keys.
  void (*combine)(const AttentionForward&, const Sequence&, int64_t kv_head, float* states, int64_t parts);
};

// Of runs of keys: whole vectors of them, and whole draws of dropout.
constexpr int64_t kDecodeAlignment = 16;

struct AttentionBackward {
  Attention inputs;                                   // not paged
  const void* grad_output;                            // [batch, heads, seqlen_q, value_dim]
  const void* output;                                 // the same
  const float* grad_lse;                              // [batch, heads, seqlen_q], or null
  const float* lse;                                   // [batch, heads, seqlen_q]
  void* grad_query;                                   // [batch, seqlen_q, heads, head_dim]
  void* grad_key;                                     // [batch, seqlen_k, kv_heads, head_dim]
  void* grad_value;                                   // [batch, seqlen_k, kv_heads, value_dim]
  float* grad_mask;                                   // [batch, heads, seqlen_q, seqlen_k] of zeros, or null
  float* delta;                                       // [batch, heads, seqlen_q], to be written, or null
  int64_t grad_output_strides[3], output_strides[3];  // as query_strides
};

struct AttentionBackwardKernels {
  // Bytes of scratch for a part whose queries see so many keys, from the first that one sees to the last.
  int64_t (*scratch)(const AttentionBackward&, int64_t keys);
  // Floats of such a part's sums for the gradients of a key head's keys and values.
  int64_t (*sums)(const AttentionBackward&, int64_t keys);
  // Query blocks [begin, end) of one sequence and key head, which see keys of `seen` alone: their grad_query, and what
  // they add to the gradients of those keys and values.
  void (*part)(const AttentionBackward&, const Sequence&, int64_t kv_head, int64_t begin, int64_t end, KeyRange seen,
               float* sums, void* scratch);
  // Of a part's sums those of `some` of the keys, to `to`, which is as the sums of a part that sees only these.
  void (*take)(const AttentionBackward&, KeyRange seen, const float* sums, KeyRange some, float* to);
  // The gradients of keys [begin, end) and their values: sums + i * stride are those of the keys seen[i], and are added
  // up in this order; they are changed.
  void (*finish)(const AttentionBackward&, const Sequence&, int64_t kv_head, int64_t begin, int64_t end, float* sums,
                 int64_t stride, const KeyRange* seen, int64_t count);
};

FASTFORMER_KERNEL_TABLE(AttentionKernels, attention)
FASTFORMER_KERNEL_TABLE(AttentionDecodeKernels, attention_decode)
FASTFORMER_KERNEL_TABLE(AttentionBackwardKernels, attention_backward)

}  // namespace fastformer
