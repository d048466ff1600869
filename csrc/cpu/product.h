// Matrix products: torch's, or our own where torch's library is slow.
//
// They use all threads themselves: never call one inside a parallel_for.
#pragma once

#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>

#include "common.h"
#include "kernels/gemm.h"
#include "kernels/product.h"

namespace fastformer {

// The dtype that products of `dtype` run and come in; the kernels' side of the rule is ProductOf in kernels/lanes.h.
inline ScalarType products_in(ScalarType dtype) {
  const bool native = dtype == ScalarType::BFloat16 && cpu_level() == Level::avx512_bf16;
  return native ? ScalarType::BFloat16 : ScalarType::Float;
}

inline int64_t size_of(ScalarType dtype) { return dtype == ScalarType::Float ? 4 : 2; }

// Contiguous, in `dtype`; the tensor itself where it is that already.
inline Tensor as_dtype(const Tensor& tensor, ScalarType dtype) {
  return as_contiguous(tensor.scalar_type() == dtype ? tensor : torch::stable::to(tensor, dtype));
}

// A contiguous matrix in memory that somebody else owns, and its transpose.
class Matrix {
 public:
  Matrix(const void* data, int64_t rows, int64_t cols, ScalarType dtype)
      : data_(const_cast<void*>(data)), rows_(rows), cols_(cols), dtype_(dtype) {}
  explicit Matrix(const Tensor& tensor)
      : Matrix(tensor.const_data_ptr(), tensor.size(0), tensor.size(1), tensor.scalar_type()) {}

  Matrix rows(int64_t begin, int64_t count) const { return {at(begin), count, cols_, dtype_}; }
  void* at(int64_t row) const { return static_cast<char*>(data_) + row * cols_ * size_of(dtype_); }
  Tensor tensor() const { return view(rows_, cols_, cols_, 1); }
  Tensor transposed() const { return view(cols_, rows_, 1, cols_); }

 private:
  Tensor view(int64_t rows, int64_t cols, int64_t row_stride, int64_t col_stride) const {
    const int64_t sizes[] = {rows, cols}, strides[] = {row_stride, col_stride};
    return torch::stable::from_blob(data_, {sizes, 2}, {strides, 2},
                                    torch::stable::Device(torch::headeronly::DeviceType::CPU), dtype_);
  }

  void* data_;
  int64_t rows_, cols_;
  ScalarType dtype_;
};

// Whether our own float32 product is the faster one. MKL holds AMD processors to AVX2: 107 GF/s a core on a Zen 5 where
// ours makes 245, packing included. A few rows don't repay the packing.
inline bool own_product_is_faster(const Tensor& out, const Tensor& a) {
#if FASTFORMER_X86
  static const bool held_back = cpu_level() >= Level::avx512 && __builtin_cpu_is("amd");
  return held_back && out.scalar_type() == ScalarType::Float && out.size(0) >= 32 && out.size(1) >= 16 &&
         a.size(1) >= 16;
#else
  return false;
#endif
}

inline void own_product(const Tensor& out, const Tensor& a, const Tensor& b, const float* bias, bool accumulate) {
  const GemmKernels& kernels = gemm_kernels();
  const auto matrix = [](const Tensor& t) { return FloatMatrix{pointer<float>(t), t.stride(0), t.stride(1)}; };
  const int64_t M = a.size(0), K = a.size(1), N = b.size(1);
  const int64_t panels = (N + kernels.panel_cols - 1) / kernels.panel_cols;
  const Scratch packed(panels * kernels.panel_cols * K * static_cast<int64_t>(sizeof(float)));
  const Gemm gemm{matrix(a),  matrix(b), mutable_pointer<float>(out), out.stride(0), packed.as<float>(), M, N, K,
                  accumulate, bias};
  torch::stable::parallel_for(0, panels, 1, [&](int64_t begin, int64_t end) { kernels.pack(gemm, begin, end); });
  // Blocks of C: eight panels beside a block of A are what a second-level cache holds.
  constexpr int64_t kPanels = 8;
  const int64_t row_blocks = (M + kGemmRows - 1) / kGemmRows, panel_blocks = (panels + kPanels - 1) / kPanels;
  torch::stable::parallel_for(0, row_blocks * panel_blocks, 1, [&](int64_t begin, int64_t end) {
    const Scratch scratch(kGemmScratch * sizeof(float));
    for (int64_t block = begin; block < end; ++block) {
      const int64_t row = block / panel_blocks * kGemmRows, panel = block % panel_blocks * kPanels;
      kernels.multiply(gemm, row, row + kGemmRows < M ? row + kGemmRows : M, panel,
                       panel + kPanels < panels ? panel + kPanels : panels, scratch.as<float>());
    }
  });
}

// out = a b
inline void multiply(const Tensor& out, const Tensor& a, const Tensor& b) {
  if (own_product_is_faster(out, a)) return own_product(out, a, b, nullptr, false);
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_mm_out(out.get(), a.get(), b.get()));
}

// out = added + a b; `added` is `out` itself, or a vector for every row.
inline void multiply_add(const Tensor& out, const Tensor& added, const Tensor& a, const Tensor& b) {
  if (own_product_is_faster(out, a)) {
    const bool accumulate = added.dim() == 2;
    return own_product(out, a, b, accumulate ? nullptr : pointer<float>(added), accumulate);
  }
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_addmm_out(out.get(), added.get(), a.get(), b.get(), 1.0, 1.0));
}

// The sum over blocks of rows of left_block^T right_block, a [rows, cols] matrix, accumulated in float32.
class TransposedProductSum {
 public:
  // dtype: that of the products. single: there is one block at most, so that its product is the sum.
  TransposedProductSum(const Tensor& like, int64_t rows, int64_t cols, ScalarType dtype, bool single)
      : total_(empty_like_sizes(like, {rows, cols}, single ? dtype : ScalarType::Float)), dtype_(dtype) {
    if (total_.scalar_type() != dtype) part_ = empty_like_sizes(like, {rows, cols}, dtype);
  }

  void add(const Matrix& left, const Matrix& right) {
    if (part_.has_value()) {
      if (empty_) torch::stable::zero_(total_);
      multiply(*part_, left.transposed(), right.tensor());
      const ProductKernels& kernels = product_kernels();
      torch::stable::parallel_for(0, total_.numel(), 16384, [&](int64_t begin, int64_t end) {
        kernels.accumulate(part_->const_data_ptr(), dtype_of(*part_, "product"), mutable_pointer<float>(total_), begin,
                           end);
      });
    } else if (empty_) {
      multiply(total_, left.transposed(), right.tensor());
    } else {
      multiply_add(total_, total_, left.transposed(), right.tensor());
    }
    empty_ = false;
  }

  Tensor result(ScalarType dtype) {
    if (empty_) torch::stable::zero_(total_);
    return as_dtype(total_, dtype);
  }

 private:
  Tensor total_;
  std::optional<Tensor> part_;  // a product whose dtype is not that of the sum
  ScalarType dtype_;
  bool empty_ = true;
};

// totals += the sum over the rows; the same for every number of threads.
inline void add_rows(const Matrix& block, int64_t rows, int64_t cols, DType dtype, float* totals) {
  const ProductKernels& kernels = product_kernels();
  torch::stable::parallel_for(0, (cols + 63) / 64, row_grain(64 * 4 * rows), [&](int64_t begin, int64_t end) {
    kernels.add_rows(block.at(0), dtype, rows, cols, totals, begin * 64, end * 64 < cols ? end * 64 : cols);
  });
}

}  // namespace fastformer
