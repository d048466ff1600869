// Tensor maps: how the tensor memory accelerator (TMA, sm_90) sees a tensor, and the boxes of it that it copies.
#pragma once

#include <torch/headeronly/util/Exception.h>

#include "device.cuh"

#ifndef FASTFORMER_SIMT
#include <cuda.h>
#include <dlfcn.h>
#endif

namespace fastformer::cuda {

// How a box lies in shared memory. With bytes128 its rows are 128 bytes long, and the 16-byte chunks of each are
// swapped about: chunk c of row r lies at c ^ (r % 8). The box begins at a multiple of 1024 bytes. The others are the
// same with rows of 64 and 32 bytes, r / 2 % 4 and r / 4 % 2, and multiples of 512 and 256 bytes.
enum class Swizzle { none, bytes32, bytes64, bytes128 };

constexpr int kMostDimensions = 5;

// A tensor and its boxes, in elements, innermost dimension first. The inner one's stride is 1; the others are multiples
// of 16 bytes, as is the address.
template <int kRank>
struct Boxes {
  static_assert(1 <= kRank && kRank <= kMostDimensions);
  const void* data;
  DType dtype;
  int64_t sizes[kRank];
  int64_t strides[kRank];
  int box[kRank];
  Swizzle swizzle;
};

#ifdef FASTFORMER_SIMT
using TensorMap = simt::TensorMap;

template <int kRank>
TensorMap tensor_map(const Boxes<kRank>& boxes) {
  return simt::tensor_map(boxes.data, boxes.dtype == DType::float32 ? 4 : 2, kRank, boxes.sizes, boxes.strides,
                          boxes.box, static_cast<int>(boxes.swizzle));
}
#else
using TensorMap = CUtensorMap;

template <int kRank>
TensorMap tensor_map(const Boxes<kRank>& boxes) {
  // The driver's function, found past the runtime: the library is not linked with the driver (see driver.cpp).
  static const auto encode = reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(
      dlsym(dlopen("libcuda.so.1", RTLD_NOW), "cuTensorMapEncodeTiled"));
  STD_TORCH_CHECK(encode != nullptr, "CUDA: the driver has no cuTensorMapEncodeTiled");
  constexpr CUtensorMapDataType kTypes[] = {CU_TENSOR_MAP_DATA_TYPE_FLOAT32, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
                                            CU_TENSOR_MAP_DATA_TYPE_FLOAT16};
  constexpr CUtensorMapSwizzle kSwizzles[] = {CU_TENSOR_MAP_SWIZZLE_NONE, CU_TENSOR_MAP_SWIZZLE_32B,
                                              CU_TENSOR_MAP_SWIZZLE_64B, CU_TENSOR_MAP_SWIZZLE_128B};
  cuuint64_t sizes[kRank], strides[kRank];
  cuuint32_t box[kRank], steps[kRank];
  const int bytes = boxes.dtype == DType::float32 ? 4 : 2;
  for (int i = 0; i < kRank; ++i) {
    sizes[i] = boxes.sizes[i];
    strides[i] = boxes.strides[i] * bytes;
    box[i] = boxes.box[i];
    steps[i] = 1;
  }
  // The driver wants a context, which this makes current; a thread that has only asked for attributes may have none.
  int device = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) error = cudaSetDevice(device);
  STD_TORCH_CHECK(error == cudaSuccess, "CUDA: ", cudaGetErrorString(error));
  TensorMap map;
  const CUresult result =
      encode(&map, kTypes[static_cast<int>(boxes.dtype)], kRank, const_cast<void*>(boxes.data), sizes, strides + 1, box,
             steps, CU_TENSOR_MAP_INTERLEAVE_NONE, kSwizzles[static_cast<int>(boxes.swizzle)],
             CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  STD_TORCH_CHECK(result == CUDA_SUCCESS, "CUDA: cuTensorMapEncodeTiled refuses a tensor, error ",
                  static_cast<int>(result));
  return map;
}
#endif

}  // namespace fastformer::cuda
