// What every CPU operator's wrapper needs beside csrc/tensor.h: memory.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <optional>
#include <vector>

#include "../tensor.h"
#include "large_pages.h"

namespace fastformer {

// A tensor that was just allocated, nothing written to it yet.
inline Tensor fresh(Tensor tensor) {
  prefer_large_pages(tensor.mutable_data_ptr(), tensor.numel() * static_cast<int64_t>(tensor.element_size()));
  return tensor;
}

inline Tensor fresh_like(const Tensor& like) { return fresh(new_tensor(like, sizes_of(like), like.scalar_type())); }

// For results of products, which large pages gain little.
inline Tensor empty_like_sizes(const Tensor& like, const std::vector<int64_t>& sizes, ScalarType dtype) {
  return new_tensor(like, sizes, dtype);
}

// A result that was not asked for.
inline Tensor no_result(const Tensor& like) { return empty_like_sizes(like, {0}, like.scalar_type()); }

inline Tensor empty_heads(const Tensor& like, int64_t batch, int64_t heads, int64_t seqlen, int64_t width) {
  return fresh(new_heads(like, batch, heads, seqlen, width));
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
