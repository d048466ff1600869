// Matrix products: torch's, or our own where torch's library is slow.
//
// They use all threads themselves: never call one inside a parallel_for.
#pragma once

#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>

#include <algorithm>

#include "common.h"
#include "kernels/gemm.h"
#include "kernels/linear.h"
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

// A matrix in memory that somebody else owns.
inline Tensor matrix_at(const void* data, int64_t rows, int64_t cols, int64_t row_stride, int64_t col_stride,
                        ScalarType dtype) {
  const int64_t sizes[] = {rows, cols}, strides[] = {row_stride, col_stride};
  return torch::stable::from_blob(const_cast<void*>(data), {sizes, 2}, {strides, 2},
                                  torch::stable::Device(torch::headeronly::DeviceType::CPU), dtype);
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
    return matrix_at(data_, rows, cols, row_stride, col_stride, dtype_);
  }

  void* data_;
  int64_t rows_, cols_;
  ScalarType dtype_;
};

// Whether our own product is the faster one. MKL holds AMD processors to AVX2: 107 GF/s a core on a Zen 5 where ours
// makes 245, packing included. In bfloat16 oneDNN makes 490 there and ours 500, whose sums can be worked on before they
// are stored. (On Intel's, oneDNN has AMX.) A few rows don't repay the packing.
inline bool own_product_is_faster(ScalarType dtype, int64_t rows, int64_t cols) {
#if FASTFORMER_X86
  static const bool amd = __builtin_cpu_is("amd");
  const bool has_kernel = dtype == ScalarType::Float ? cpu_level() >= Level::avx512
                                                     : dtype == ScalarType::BFloat16 && products_in(dtype) == dtype;
  return amd && has_kernel && rows >= 32 && cols >= 16;
#else
  return false;
#endif
}

// What is to be done with the blocks of a product; see Gemm.
struct Finish {
  void (*function)(const void* context, const GemmBlock&);
  const void* context;
};

// Memory for one product's packed panels at a time, at most kKeptPacking, which each calling thread keeps: pieces of
// ever other sizes among the tensors would scatter these over more pages than they need.
constexpr int64_t kKeptPacking = int64_t{16} << 20;
inline void* packing_memory(int64_t bytes) {
  static thread_local std::optional<Scratch> memory;
  static thread_local int64_t size = 0;
  if (!memory.has_value() || bytes > size) {
    memory.reset();  // before the larger one is taken
    memory.emplace(bytes);
    size = bytes;
  }
  return memory->as<void>();
}

// a b, whose blocks are handed to `finish`, by several threads. For dtypes that own_product_is_faster has said yes to.
inline void own_product(const Tensor& a, const Tensor& b, const Finish& finish) {
  const GemmKernels& kernels = gemm_kernels();
  const auto matrix = [](const Tensor& t, int64_t col) {
    const int64_t offset = col * t.stride(1) * size_of(t.scalar_type());
    return GemmMatrix{static_cast<const char*>(t.const_data_ptr()) + offset, t.stride(0), t.stride(1)};
  };
  const int64_t M = a.size(0), K = a.size(1), N = b.size(1);
  const DType dtype = dtype_of(a, "a");
  // B is packed in groups of panels that stay in the third-level cache until all rows have been multiplied.
  constexpr int64_t kGroupBytes = 4 << 20;
  const int64_t block_cols = kGemmPanels * kernels.panel_cols,
                block_bytes = kGemmPanels * packed_bytes(kernels, dtype, K);
  const int64_t blocks = ceil_div(N, block_cols), fitting = std::max<int64_t>(kGroupBytes / (block_bytes + 1), 1);
  const int64_t group_blocks = ceil_div(blocks, ceil_div(blocks, fitting));
  int64_t rows = kGemmRows;  // of a task
  while (rows > 32 && ceil_div(M, rows) * group_blocks < 16) rows /= 2;
  const int64_t row_tasks = ceil_div(M, rows);
  const int64_t bytes = group_blocks * block_bytes;
  const Scratch own(bytes > kKeptPacking ? bytes : 0);
  void* const packed = bytes > kKeptPacking ? own.as<void>() : packing_memory(bytes);
  for (int64_t first = 0; first < N; first += group_blocks * block_cols) {
    const int64_t cols = std::min(group_blocks * block_cols, N - first), panels = ceil_div(cols, kernels.panel_cols);
    const Gemm gemm{dtype, matrix(a, 0), matrix(b, first), packed, M, cols, K, first, finish.function, finish.context};
    torch::stable::parallel_for(0, panels, row_grain(block_bytes / kGemmPanels),
                                [&](int64_t begin, int64_t end) { kernels.pack(gemm, begin, end); });
    const int64_t panel_tasks = ceil_div(panels, kGemmPanels), task_terms = rows * std::min(cols, block_cols) * K;
    torch::stable::parallel_for(
        0, row_tasks * panel_tasks, row_grain(task_terms / 16), [&](int64_t begin, int64_t end) {
          const Scratch scratch(kGemmScratch);
          for (int64_t task = begin; task < end; ++task) {
            const int64_t row = task / panel_tasks * rows, panel = task % panel_tasks * kGemmPanels;
            kernels.multiply(gemm, row, std::min(row + rows, M), panel, std::min(panel + kGemmPanels, panels),
                             scratch.as<void>());
          }
        });
  }
}

// out = a b, plus out itself if `accumulate`, plus `bias` in every row if there is one, of out's dtype.
inline void own_product(const Tensor& out, const Tensor& a, const Tensor& b, const void* bias, bool accumulate) {
  GemmOutput output{out.mutable_data_ptr(), out.stride(0), dtype_of(out, "out"), accumulate, bias};
  const int64_t K = a.size(1), most = (size_t{16} << 10) / size_of(a.scalar_type());
  if (out.scalar_type() != ScalarType::Float || K <= most) return own_product(a, b, {gemm_kernels().store, &output});
  // A part of B so deep is packed at once, which keeps to the third-level cache.
  const auto part = [&](const Tensor& t, int64_t row, int64_t col, int64_t rows, int64_t cols) {
    const int64_t offset = (row * t.stride(0) + col * t.stride(1)) * size_of(t.scalar_type());
    return matrix_at(static_cast<const char*>(t.const_data_ptr()) + offset, rows, cols, t.stride(0), t.stride(1),
                     t.scalar_type());
  };
  for (int64_t k = 0; k < K; k += most) {
    const int64_t depth = std::min(most, K - k);
    own_product(part(a, 0, k, a.size(0), depth), part(b, k, 0, depth, b.size(1)), {gemm_kernels().store, &output});
    output.accumulate = true;
    output.bias = nullptr;
  }
}

inline bool own_product_is_faster(const Tensor& out, const Tensor& a) {
  return own_product_is_faster(a.scalar_type(), out.size(0), out.size(1));
}

// Whether the kernel for few rows takes a product: it reads b, which is stored as its transpose, once, and packs
// nothing. At 32 rows it is still 1.2 times as fast as torch's in bfloat16, and as fast as own_product in float32.
constexpr int64_t kFewRows = 32;
inline bool has_few_rows(const Tensor& out, const Tensor& a, const Tensor& b) {
  return a.size(0) <= kFewRows && b.stride(0) == 1 && a.is_contiguous() && out.is_contiguous();
}

inline void few_rows_product(const Tensor& out, const Tensor& a, const Tensor& b, const void* bias) {
  const LinearArgs args{
      .input = pointer(a),
      .weight = pointer(b),
      .bias = bias,
      .output = mutable_pointer(out),
      .dtype = dtype_of(a, "input"),
      .rows = a.size(0),
      .cols = b.size(1),
      .depth = a.size(1),
      .weight_stride = b.stride(1),
  };
  const LinearKernels& kernels = linear_kernels();
  const int64_t groups = (args.cols + kLinearGroup - 1) / kLinearGroup;
  const int64_t group_bytes = kLinearGroup * args.depth * size_of(a.scalar_type());
  torch::stable::parallel_for(0, groups, row_grain(group_bytes), [&](int64_t begin, int64_t end) {
    kernels.multiply(args, begin * kLinearGroup, end * kLinearGroup < args.cols ? end * kLinearGroup : args.cols);
  });
}

// out = a b
inline void multiply(const Tensor& out, const Tensor& a, const Tensor& b) {
  if (has_few_rows(out, a, b)) return few_rows_product(out, a, b, nullptr);
  if (own_product_is_faster(out, a)) return own_product(out, a, b, nullptr, false);
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_mm_out(out.get(), a.get(), b.get()));
}

// out = added + a b; `added` is `out` itself, or a vector for every row.
inline void multiply_add(const Tensor& out, const Tensor& added, const Tensor& a, const Tensor& b) {
  if (added.dim() == 1 && has_few_rows(out, a, b)) return few_rows_product(out, a, b, pointer(added));
  if (own_product_is_faster(out, a)) {
    const bool accumulate = added.dim() == 2;
    return own_product(out, a, b, accumulate ? nullptr : pointer(added), accumulate);
  }
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_addmm_out(out.get(), added.get(), a.get(), b.get(), 1.0, 1.0));
}

// The sum over blocks of rows of left_block^T right_block, a [rows, cols] matrix, accumulated in float32.
class TransposedProductSum {
 public:
  // dtype: that of the products. single: there is one block at most, so that its product is the sum.
  TransposedProductSum(const Tensor& like, int64_t rows, int64_t cols, ScalarType dtype, bool single)
      : total_(empty_like_sizes(like, {rows, cols}, single ? dtype : ScalarType::Float)), dtype_(dtype) {
    const bool own = own_product_is_faster(dtype, rows, cols);  // which adds to float32 whatever it multiplies
    if (total_.scalar_type() != dtype && !own) part_ = empty_like_sizes(like, {rows, cols}, dtype);
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
  std::optional<Tensor> part_;  // a product that can't be added to the sum at once, for its dtype
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
