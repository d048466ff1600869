// What every CPU operator's wrapper needs: tensor shorthands, checks, and scratch memory.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdlib>
#include <initializer_list>
#include <optional>
#include <vector>

#include "kernels/dtypes.h"

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

inline Tensor empty_like_sizes(const Tensor& like, std::initializer_list<int64_t> sizes, ScalarType dtype) {
  return torch::stable::new_empty(like, std::vector<int64_t>(sizes), dtype);
}

// A result that was not asked for.
inline Tensor no_result(const Tensor& like) { return empty_like_sizes(like, {0}, like.scalar_type()); }

// [batch, heads, seqlen, width] that lies in memory as [batch, seqlen, heads, width]. Not a view: of an output that is
// one autograd forbids changes in place.
inline Tensor empty_heads(const Tensor& like, int64_t batch, int64_t heads, int64_t seqlen, int64_t width) {
  const int64_t sizes[] = {batch, heads, seqlen, width};
  const int64_t row = width > 0 ? width : 1, position = (heads > 0 ? heads : 1) * row;
  const int64_t strides[] = {(seqlen > 0 ? seqlen : 1) * position, row, position, 1};
  int32_t dtype, device, index;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(like.get(), &dtype));
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device));
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(like.get(), &index));
  AtenTensorHandle result = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(4, sizes, strides, dtype, device, index, &result));
  return Tensor(result);
}

inline bool same_sizes(const Tensor& a, const Tensor& b) {
  if (a.dim() != b.dim()) return false;
  for (int64_t i = 0; i < a.dim(); ++i) {
    if (a.size(i) != b.size(i)) return false;
  }
  return true;
}

template <typename T = void>
const T* pointer(const Tensor& tensor) {
  return static_cast<const T*>(tensor.const_data_ptr());
}
template <typename T = void>
const T* pointer(const std::optional<Tensor>& tensor) {
  return tensor.has_value() ? pointer<T>(*tensor) : nullptr;
}
template <typename T = void>
T* mutable_pointer(const Tensor& tensor) {
  return static_cast<T*>(tensor.mutable_data_ptr());
}

// Uninitialised memory for one thread, on cache lines.
class Scratch {
 public:
  explicit Scratch(int64_t bytes) : data_(std::aligned_alloc(64, (bytes + 63) / 64 * 64)) {
    STD_TORCH_CHECK(bytes == 0 || data_ != nullptr, "out of memory: ", bytes, " bytes of scratch");
  }
  ~Scratch() { std::free(data_); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  template <typename T>
  T* as() const {
    return static_cast<T*>(data_);
  }

 private:
  void* data_;
};

// Rows per task so that a task moves about 32 KB: enough to hide the cost of handing it out.
inline int64_t row_grain(int64_t bytes_per_row) { return bytes_per_row >= 32768 ? 1 : 32768 / (bytes_per_row + 1) + 1; }

}  // namespace fastformer
