// What every CUDA operator's wrapper needs: the device and its stream, pointers, registration.
#pragma once

#include <torch/csrc/stable/accelerator.h>

#include <optional>
#include <vector>

#include "../tensor.h"
#include "launch.h"
#include "ptx.cuh"

// The block that follows registers this file's operators. The emulator's have a namespace of their own, beside the
// CPU's.
#ifdef FASTFORMER_SIMT
#define FASTFORMER_CUDA_LIBRARY(m) STABLE_TORCH_LIBRARY_IMPL(fastformer_simt, CPU, m)
#else
#define FASTFORMER_CUDA_LIBRARY(m) STABLE_TORCH_LIBRARY_IMPL(fastformer, CUDA, m)
#endif

// Whether the kernels of *_hopper.cu are there: setup.py compiles them if sm_90a is asked for.
#if defined(FASTFORMER_SIMT) || defined(FASTFORMER_SM90A)
#define FASTFORMER_HAS_HOPPER 1
#else
#define FASTFORMER_HAS_HOPPER 0
#endif

namespace fastformer::cuda {

// The device of `tensor` is the current one while this lives; `stream` is the one that torch works on there.
class OnDevice {
 public:
  cudaStream_t stream = nullptr;

#ifdef FASTFORMER_SIMT
  explicit OnDevice(const Tensor&) {}
  int multiprocessors() const { return simt::device.multiprocessors; }
  int64_t shared_memory_limit() const { return static_cast<int64_t>(simt::device.shared_bytes); }
  int64_t l2_bytes() const { return simt::device.l2_bytes; }
  bool is_hopper() const { return simt::device.compute_capability == 90; }

 private:
  simt::Call call_;  // forgets the memory of the call before
#else
  explicit OnDevice(const Tensor& tensor) : index_(tensor.get_device_index()), guard_(index_) {
    void* current = nullptr;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(index_, &current));
    stream = static_cast<cudaStream_t>(current);
  }
  int multiprocessors() const { return attribute(cudaDevAttrMultiProcessorCount); }
  // Bytes that a block may have: 227 KB on sm_90, 163 KB on sm_80, 99 KB on sm_86 and sm_89.
  int64_t shared_memory_limit() const { return attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin); }
  int64_t l2_bytes() const { return attribute(cudaDevAttrL2CacheSize); }
  // Whether code for sm_90a runs.
  bool is_hopper() const {
    return attribute(cudaDevAttrComputeCapabilityMajor) == 9 && attribute(cudaDevAttrComputeCapabilityMinor) == 0;
  }

 private:
  int attribute(cudaDeviceAttr which) const {
    int value = 0;
    const cudaError_t error = cudaDeviceGetAttribute(&value, which, index_);
    STD_TORCH_CHECK(error == cudaSuccess, "CUDA: ", cudaGetErrorString(error));
    return value;
  }

  int32_t index_;
  torch::stable::accelerator::DeviceGuard guard_;
#endif
};

// Where kernels read or write a tensor. The emulator refuses them everything else.
template <typename T = void>
const T* pointer(const Tensor& tensor) {
  const T* data = static_cast<const T*>(tensor.const_data_ptr());
#ifdef FASTFORMER_SIMT
  simt::allow(data, extent_in_bytes(tensor), simt::Access::read);
#endif
  return data;
}
template <typename T = void>
const T* pointer(const std::optional<Tensor>& tensor) {
  return tensor.has_value() ? pointer<T>(*tensor) : nullptr;
}
template <typename T = void>
T* mutable_pointer(const Tensor& tensor) {
  T* data = static_cast<T*>(tensor.mutable_data_ptr());
#ifdef FASTFORMER_SIMT
  simt::allow(data, extent_in_bytes(tensor), simt::Access::write);
#endif
  return data;
}

template <typename T = void>
T* mutable_pointer(const std::optional<Tensor>& tensor) {
  return tensor.has_value() ? mutable_pointer<T>(*tensor) : nullptr;
}

// Tells the emulator that nobody has written this tensor yet.
inline Tensor unwritten(Tensor fresh) {
#ifdef FASTFORMER_SIMT
  simt::unwritten(fresh.mutable_data_ptr(), extent_in_bytes(fresh));
#endif
  return fresh;
}

inline Tensor empty_like_sizes(const Tensor& like, const std::vector<int64_t>& sizes, ScalarType dtype) {
  return unwritten(new_tensor(like, sizes, dtype));
}
inline Tensor new_heads(const Tensor& like, int64_t batch, int64_t heads, int64_t seqlen, int64_t width) {
  return unwritten(fastformer::new_heads(like, batch, heads, seqlen, width));
}

// Calls body.operator()<T>() for the element type.
template <typename Body>
void for_dtype(DType dtype, Body&& body) {
  switch (dtype) {
    case DType::float32:
      return body.template operator()<float>();
    case DType::bfloat16:
      return body.template operator()<BFloat16>();
    case DType::float16:
      return body.template operator()<Half>();
  }
}

inline void check_device(const Tensor& tensor, const char* name, const Tensor& other, const char* other_name) {
  STD_TORCH_CHECK(tensor.is_cuda() == other.is_cuda() && tensor.get_device_index() == other.get_device_index(), name,
                  " must be on the device of ", other_name);
}

inline bool is_aligned(const Tensor& tensor, int64_t bytes = 16) {
  return reinterpret_cast<uintptr_t>(tensor.const_data_ptr()) % bytes == 0;
}

// Contiguous, of the sizes and dtype of `like`.
inline Tensor empty_of_sizes(const Tensor& like) { return empty_like_sizes(like, sizes_of(like), like.scalar_type()); }

// A result that was not asked for.
inline Tensor no_result(const Tensor& like) { return empty_like_sizes(like, {0}, like.scalar_type()); }

}  // namespace fastformer::cuda
