// What rotary's wrappers share on every device.
#pragma once

#include "tensor.h"

namespace fastformer {

inline void check_rotary(const Tensor& query, const Tensor& key, const Tensor& cos, const Tensor& sin) {
  STD_TORCH_CHECK(query.dim() == 4 && key.dim() == 4, "query and key must have four dimensions");
  const int64_t B = query.size(0), S = query.size(2), D = query.size(3);
  STD_TORCH_CHECK(key.size(0) == B && key.size(2) == S && key.size(3) == D,
                  "key must have the batch, length and head_dim of query");
  STD_TORCH_CHECK(key.scalar_type() == query.scalar_type(), "key must have the dtype of query");
  STD_TORCH_CHECK(cos.dim() == 2 || cos.dim() == 3, "cos must be [S, R] or [B, S, R]");
  STD_TORCH_CHECK(same_sizes(cos, sin), "sin must have the shape of cos");
  const int64_t R = cos.size(cos.dim() - 1);
  STD_TORCH_CHECK(cos.size(cos.dim() - 2) == S && (cos.dim() == 2 || cos.size(0) == B), "cos must be [", S, ", R] or [",
                  B, ", ", S, ", R]");
  STD_TORCH_CHECK(2 * R <= D, "cos may have at most half of head_dim, ", D / 2, " columns, not ", R);
}

inline Tensor with_adjacent_features(const Tensor& tensor) {
  const int64_t last = tensor.dim() - 1;
  return tensor.size(last) <= 1 || tensor.stride(last) == 1 ? tensor : torch::stable::contiguous(tensor);
}

}  // namespace fastformer
