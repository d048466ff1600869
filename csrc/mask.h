// A mask that broadcasts to four dimensions.
#pragma once

#include "tensor.h"

namespace fastformer {

// Strides over the four dimensions; 0 where the mask broadcasts.
struct BroadcastMask {
  MaskKind kind = MaskKind::none;
  DType dtype = DType::float32;
  const void* data = nullptr;
  int64_t strides[4] = {0, 0, 0, 0};
};

inline BroadcastMask broadcast_mask(const std::optional<Tensor>& mask, const int64_t (&sizes)[4]) {
  BroadcastMask result;
  if (!mask.has_value()) return result;
  STD_TORCH_CHECK(mask->dim() <= 4, "mask may have at most 4 dimensions");
  const bool boolean = mask->scalar_type() == ScalarType::Bool;
  result.kind = boolean ? MaskKind::boolean : MaskKind::additive;
  if (!boolean) result.dtype = dtype_of(*mask, "mask");
  result.data = mask->const_data_ptr();
  for (int64_t i = 0; i < mask->dim(); ++i) {
    const int64_t to = 4 - mask->dim() + i, size = mask->size(i);
    STD_TORCH_CHECK(size == sizes[to] || size == 1, "mask must broadcast to the scores");
    result.strides[to] = size == 1 ? 0 : mask->stride(i);
  }
  return result;
}

}  // namespace fastformer
