// What every CPU operator's wrapper needs: tensor shorthands, checks, and scratch memory.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#ifdef __linux__
#include <sys/mman.h>
#endif

#include <cstdint>
#include <cstdlib>
#include <cstring>
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

// Asks for pages of 2 MiB under a large piece of fresh memory. One beyond malloc's largest threshold, 32 MiB, comes
// from the system anew each time, a smaller one now and then, and to map it in pages of 4 KiB takes longer than most
// kernels do: 64 MiB are filled in 16 ms so, in 4.4 ms in large pages (two cores of a Zen 5). Where it had pages,
// nothing changes. THP_MEM_ALLOC_ENABLE=0, torch's own switch, leaves it to the system.
inline void prefer_large_pages([[maybe_unused]] void* data, [[maybe_unused]] int64_t bytes) {
#ifdef __linux__
  static const bool kWanted = [] {
    const char* value = std::getenv("THP_MEM_ALLOC_ENABLE");
    return value == nullptr || std::strcmp(value, "0") != 0;
  }();
  constexpr uintptr_t kPage = uintptr_t{2} << 20;
  if (!kWanted || bytes < 2 * static_cast<int64_t>(kPage)) return;
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(data) + kPage - 1) / kPage * kPage;
  const uintptr_t end = (reinterpret_cast<uintptr_t>(data) + bytes) / kPage * kPage;
  madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
}

// A tensor that was just allocated, nothing written to it yet.
inline Tensor fresh(Tensor tensor) {
  prefer_large_pages(tensor.mutable_data_ptr(), tensor.numel() * static_cast<int64_t>(tensor.element_size()));
  return tensor;
}

inline Tensor fresh_like(const Tensor& like) { return fresh(torch::stable::empty_like(like)); }

inline Tensor empty_like_sizes(const Tensor& like, const std::vector<int64_t>& sizes, ScalarType dtype) {
  return fresh(torch::stable::new_empty(like, sizes, dtype));
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
  return fresh(Tensor(result));
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
  explicit Scratch(int64_t bytes) : memory_(std::malloc(bytes + kLine)) {
    STD_TORCH_CHECK(memory_ != nullptr, "out of memory: ", bytes, " bytes of scratch");
    data_ = reinterpret_cast<void*>((reinterpret_cast<uintptr_t>(memory_) + kLine - 1) / kLine * kLine);
    prefer_large_pages(data_, bytes);
  }
  ~Scratch() { std::free(memory_); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  template <typename T>
  T* as() const {
    return static_cast<T*>(data_);
  }

 private:
  static constexpr int64_t kLine = 64;
  // Not from aligned_alloc: before glibc 2.38 that can't take a piece again that it has given back, and the process
  // grows.
  void* memory_;
  void* data_;
};

// Rows per task so that a task moves about 32 KB: enough to hide the cost of handing it out.
inline int64_t row_grain(int64_t bytes_per_row) { return bytes_per_row >= 32768 ? 1 : 32768 / (bytes_per_row + 1) + 1; }

}  // namespace fastformer
