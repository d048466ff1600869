// Tensors as every operator's wrapper sees them: shorthands and checks.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <vector>

#include "dtypes.h"

namespace fastformer {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline DType dtype_of(const Tensor& tensor, const char* name) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float:
      return DType::float32;
    case ScalarType::BFloat16:
      return DType::bfloat16;
    case ScalarType::Half:
      return DType::float16;
    default:
      STD_TORCH_CHECK(false, name, " must be float32, bfloat16 or float16");
  }
}

inline Tensor as_contiguous(const Tensor& tensor) {
  return tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor);
}

// A copy in float32, or the tensor itself if it is contiguous float32 already.
inline Tensor as_float(const Tensor& tensor, const char* name) {
  dtype_of(tensor, name);  // an error for any that kernels don't read
  return as_contiguous(tensor.scalar_type() == ScalarType::Float ? tensor
                                                                 : torch::stable::to(tensor, ScalarType::Float));
}

inline bool same_sizes(const Tensor& a, const Tensor& b) {
  if (a.dim() != b.dim()) return false;
  for (int64_t i = 0; i < a.dim(); ++i) {
    if (a.size(i) != b.size(i)) return false;
  }
  return true;
}

// Of all leading dimensions together.
inline int64_t rows_of(const Tensor& tensor, const char* name) {
  STD_TORCH_CHECK(tensor.dim() >= 1, name, " must have at least one dimension");
  int64_t rows = 1;
  for (int64_t i = 0; i + 1 < tensor.dim(); ++i) rows *= tensor.size(i);
  return rows;
}

inline std::vector<int64_t> sizes_of(const Tensor& tensor) { return {tensor.sizes().begin(), tensor.sizes().end()}; }

inline std::vector<int64_t> sizes_with_last(const Tensor& tensor, int64_t last) {
  std::vector<int64_t> sizes = sizes_of(tensor);
  sizes.back() = last;
  return sizes;
}

inline void check_matrix(const Tensor& tensor, const char* name, int64_t rows, int64_t cols, const Tensor& input) {
  STD_TORCH_CHECK(tensor.dim() == 2 && tensor.size(0) == rows && tensor.size(1) == cols, name, " must be [", rows, ", ",
                  cols, "]");
  STD_TORCH_CHECK(tensor.scalar_type() == input.scalar_type(), name, " must have the dtype of input");
}

inline void check_bias(const std::optional<Tensor>& bias, const char* name, int64_t width, const Tensor& input) {
  if (!bias.has_value()) return;
  STD_TORCH_CHECK(bias->dim() == 1 && bias->size(0) == width, name, " must be [", width, "]");
  STD_TORCH_CHECK(bias->scalar_type() == input.scalar_type(), name, " must have the dtype of input");
}

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// An uninitialised tensor of `dims` sizes and strides on the device of `like`. Half the cost of torch::stable's
// empty_like and new_empty, which ask the dispatcher for an operator by its name: add + layer norm of few elements 3.1
// us, not 4.5.
inline Tensor new_strided(const Tensor& like, const int64_t* sizes, const int64_t* strides, int64_t dims,
                          ScalarType dtype) {
  int32_t device, index;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device));
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(like.get(), &index));
  const auto type = torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype));
  AtenTensorHandle result = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(dims, sizes, strides, type, device, index, &result));
  return Tensor(result);
}

// The same, contiguous.
inline Tensor new_tensor(const Tensor& like, const std::vector<int64_t>& sizes, ScalarType dtype) {
  std::vector<int64_t> strides(sizes.size());
  int64_t stride = 1;
  for (size_t i = sizes.size(); i-- > 0; stride *= sizes[i] > 0 ? sizes[i] : 1) strides[i] = stride;
  return new_strided(like, sizes.data(), strides.data(), static_cast<int64_t>(sizes.size()), dtype);
}

// [batch, heads, seqlen, width] that lies in memory as [batch, seqlen, heads, width]. Not a view: of an output that is
// one autograd forbids changes in place.
inline Tensor new_heads(const Tensor& like, int64_t batch, int64_t heads, int64_t seqlen, int64_t width) {
  const int64_t sizes[] = {batch, heads, seqlen, width};
  const int64_t row = width > 0 ? width : 1, position = (heads > 0 ? heads : 1) * row;
  const int64_t strides[] = {(seqlen > 0 ? seqlen : 1) * position, row, position, 1};
  return new_strided(like, sizes, strides, 4, like.scalar_type());
}

// From the first element to the end of the last, whatever lies between.
inline int64_t extent_in_bytes(const Tensor& tensor) {
  if (tensor.numel() == 0) return 0;
  int64_t last = 0;
  for (int64_t i = 0; i < tensor.dim(); ++i) last += (tensor.size(i) - 1) * tensor.stride(i);
  return (last + 1) * static_cast<int64_t>(tensor.element_size());
}

}  // namespace fastformer
