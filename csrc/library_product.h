// Matrix products by torch's library, and the checks and shapes around them, on any device.
#pragma once

#if defined(USE_CUDA) && !defined(FASTFORMER_SIMT)
#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cuda.h>
#else
#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>
#endif

#include <optional>
#include <vector>

#include "tensor.h"

namespace fastformer {

// [..., C] as [N, C]; a view where there is one.
inline Tensor as_matrix(const Tensor& tensor, const char* name) {
  return torch::stable::reshape(tensor, {{rows_of(tensor, name), tensor.size(tensor.dim() - 1)}});
}

inline Tensor transposed(const Tensor& matrix) { return torch::stable::transpose(matrix, 0, 1); }

// A part of a tensor, which shares its memory.
inline Tensor narrow(Tensor tensor, int64_t dim, int64_t start, int64_t length) {
  return torch::stable::narrow(tensor, dim, start, length);
}

// out = a b. Any of them may be transposed, or a part of a wider matrix.
inline void library_product(const Tensor& out, const Tensor& a, const Tensor& b) {
#if defined(USE_CUDA) && !defined(FASTFORMER_SIMT)
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_cuda_mm_out(out.get(), a.get(), b.get()));
#else
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_mm_out(out.get(), a.get(), b.get()));
#endif
}

// out = added + a b; `added` is `out` itself, or a vector for every row.
inline void library_product_add(const Tensor& out, const Tensor& added, const Tensor& a, const Tensor& b) {
#if defined(USE_CUDA) && !defined(FASTFORMER_SIMT)
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_cuda_addmm_out(out.get(), added.get(), a.get(), b.get(), 1.0, 1.0));
#else
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_addmm_out(out.get(), added.get(), a.get(), b.get(), 1.0, 1.0));
#endif
}

// a b^T + bias, as torch keeps a layer's weight b.
inline void library_linear(const Tensor& out, const Tensor& a, const Tensor& b, const std::optional<Tensor>& bias) {
  if (bias.has_value()) {
    library_product_add(out, *bias, a, transposed(b));
  } else {
    library_product(out, a, transposed(b));
  }
}

// The sums over the rows, added up in float32: a vector, or `out`, a float32 matrix of one row.
inline Tensor sum_of_rows(const Tensor& matrix, ScalarType dtype) {
  const int64_t dim[] = {0};
  return torch::stable::to(torch::stable::sum(matrix, {{dim, 1}}, false, ScalarType::Float), dtype);
}
inline void sum_of_rows(Tensor out, const Tensor& matrix) {
  const int64_t dim[] = {0};
  torch::stable::sum_out(out, matrix, {{dim, 1}}, true, ScalarType::Float);
}

}  // namespace fastformer
