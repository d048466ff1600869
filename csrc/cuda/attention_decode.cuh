// Attention of a few queries over many keys; see attention_decode.cu.
#pragma once

#include "attention_arguments.h"

namespace fastformer::cuda {

// Fills output [B, H, Sq, Dv] and lse [B, H, Sq], neither of them empty; Dv is the value_dim of call.inputs. Packed
// rows that belong to no sequence get output 0 and lse -inf. Right for any number of queries, fast where they and the
// heads that share a key head are few. The meaning of num_splits and max_seqlen_k is that of attention_forward's in
// csrc/ops.cpp.
void attention_decode(const AttentionCall& call, int64_t max_seqlen_k, int64_t num_splits, const Tensor& output,
                      const Tensor& lse, const OnDevice& device);

}  // namespace fastformer::cuda
