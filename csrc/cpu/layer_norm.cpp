#include "kernels/layer_norm.h"

#include <algorithm>
#include <tuple>

#include "streaming.h"

namespace fastformer {
namespace {

void check_row_vector(const std::optional<Tensor>& tensor, int64_t cols, const char* name) {
  STD_TORCH_CHECK(!tensor.has_value() || (tensor->dim() == 1 && tensor->size(0) == cols), name,
                  " must be a vector as long as a row of input");
}

std::optional<Tensor> as_contiguous(const std::optional<Tensor>& tensor) {
  return tensor.has_value() ? std::optional<Tensor>(fastformer::as_contiguous(*tensor)) : std::nullopt;
}

DType dtype_of(const std::optional<Tensor>& tensor, const char* name) {
  return tensor.has_value() ? fastformer::dtype_of(*tensor, name) : DType::float32;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> layer_norm_forward(const Tensor& input,
                                                              const std::optional<Tensor>& residual,
                                                              const std::optional<Tensor>& weight,
                                                              const std::optional<Tensor>& bias, double eps, bool rms) {
  STD_TORCH_CHECK(input.dim() >= 1, "input must have at least one dimension");
  const Tensor x = fastformer::as_contiguous(input);
  const int64_t cols = x.size(x.dim() - 1), rows = rows_of(x, "input");
  check_row_vector(weight, cols, "weight");
  check_row_vector(bias, cols, "bias");
  std::optional<Tensor> r;
  if (residual.has_value()) {
    STD_TORCH_CHECK(same_sizes(*residual, x), "residual must have the shape of input");
    STD_TORCH_CHECK(residual->scalar_type() == x.scalar_type(), "residual must have the dtype of input");
    r = fastformer::as_contiguous(*residual);
  }
  const Tensor output = fresh_like(x);
  const Tensor summed = r.has_value() ? fresh_like(x) : no_result(x);
  const Tensor mean = empty_like_sizes(x, {rms ? 0 : rows}, ScalarType::Float);
  const Tensor rstd = empty_like_sizes(x, {rows}, ScalarType::Float);
  const std::optional<Tensor> w = as_contiguous(weight), b = as_contiguous(bias);
  const int64_t row_bytes = cols * static_cast<int64_t>(x.element_size()), bytes = rows * row_bytes;
  const LayerNormForward args{
      .input = pointer(x),
      .residual = pointer(r),
      .weight = pointer(w),
      .bias = pointer(b),
      .output = mutable_pointer(output),
      .summed = mutable_pointer(summed),
      .mean = rms ? nullptr : mutable_pointer<float>(mean),
      .rstd = mutable_pointer<float>(rstd),
      .dtype = fastformer::dtype_of(x, "input"),
      .weight_dtype = dtype_of(weight, "weight"),
      .bias_dtype = dtype_of(bias, "bias"),
      .cols = cols,
      .eps = static_cast<float>(eps),
      .stream = worth_streaming((r.has_value() ? 4 : 2) * bytes, row_bytes, output),
  };
  const LayerNormKernels& kernels = layer_norm_kernels();
  torch::stable::parallel_for(0, rows, row_grain(cols * 4), [&](int64_t begin, int64_t end) {
    const Scratch scratch((args.stream && r.has_value() ? 5 : 2) * cols * sizeof(float));
    kernels.forward(args, begin, end, scratch.as<float>());
  });
  return {output, summed, mean, rstd};
}

// Rows whose sums of grad_weight and grad_bias make one partial sum: fixed, so that the order of additions, and with it
// every bit of the result, doesn't depend on the number of threads.
constexpr int64_t kRowsPerPartial = 64;

std::tuple<Tensor, Tensor, Tensor> layer_norm_backward(const Tensor& grad_output,
                                                       const std::optional<Tensor>& grad_summed, const Tensor& summed,
                                                       const std::optional<Tensor>& weight, const Tensor& mean,
                                                       const Tensor& rstd, bool has_bias, bool rms) {
  STD_TORCH_CHECK(same_sizes(grad_output, summed), "grad_output must have the shape of summed");
  STD_TORCH_CHECK(grad_output.scalar_type() == summed.scalar_type(), "grad_output must have the dtype of summed");
  const Tensor x = fastformer::as_contiguous(summed), grad = fastformer::as_contiguous(grad_output);
  const int64_t cols = x.size(x.dim() - 1), rows = cols == 0 ? 0 : x.numel() / cols;
  check_row_vector(weight, cols, "weight");
  STD_TORCH_CHECK(rstd.numel() == rows && (rms || mean.numel() == rows), "mean and rstd must have an element a row");
  STD_TORCH_CHECK(rstd.scalar_type() == ScalarType::Float && (rms || mean.scalar_type() == ScalarType::Float),
                  "mean and rstd must be float32");
  std::optional<Tensor> gs;
  if (grad_summed.has_value()) {
    STD_TORCH_CHECK(same_sizes(*grad_summed, x) && grad_summed->scalar_type() == x.scalar_type(),
                    "grad_summed must have the shape and dtype of summed");
    gs = fastformer::as_contiguous(*grad_summed);
  }
  const std::optional<Tensor> w = as_contiguous(weight);
  const Tensor m = fastformer::as_contiguous(mean), r = fastformer::as_contiguous(rstd);
  const Tensor grad_input = fresh_like(x);
  const LayerNormBackward args{
      .grad_output = pointer(grad),
      .grad_summed = pointer(gs),
      .summed = pointer(x),
      .weight = pointer(w),
      .mean = rms ? nullptr : pointer<float>(m),
      .rstd = pointer<float>(r),
      .grad_input = mutable_pointer(grad_input),
      .dtype = fastformer::dtype_of(x, "summed"),
      .weight_dtype = dtype_of(weight, "weight"),
      .cols = cols,
  };
  const bool has_weight = weight.has_value();
  const int64_t partials = (rows + kRowsPerPartial - 1) / kRowsPerPartial;
  const Scratch sums(partials * 2 * cols * static_cast<int64_t>(sizeof(float)));
  const LayerNormKernels& kernels = layer_norm_kernels();
  const int64_t partials_per_task = std::max<int64_t>(1, row_grain(cols * 4) / kRowsPerPartial);
  torch::stable::parallel_for(0, partials, partials_per_task, [&](int64_t begin, int64_t end) {
    const Scratch scratch(cols * sizeof(float));
    for (int64_t p = begin; p < end; ++p) {
      float* partial = sums.as<float>() + p * 2 * cols;
      std::fill_n(partial, 2 * cols, 0.0f);
      kernels.backward(args, p * kRowsPerPartial, std::min(rows, (p + 1) * kRowsPerPartial),
                       has_weight ? partial : nullptr, has_bias ? partial + cols : nullptr, scratch.as<float>());
    }
  });
  const auto total = [&](int64_t offset) {
    const Tensor result = empty_like_sizes(x, {cols}, ScalarType::Float);
    float* to = mutable_pointer<float>(result);
    std::fill_n(to, cols, 0.0f);
    for (int64_t p = 0; p < partials; ++p) {
      const float* from = sums.as<float>() + p * 2 * cols + offset;
      for (int64_t i = 0; i < cols; ++i) to[i] += from[i];
    }
    const ScalarType dtype = has_weight ? weight->scalar_type() : x.scalar_type();
    return dtype == ScalarType::Float ? result : torch::stable::to(result, dtype);
  };
  return {grad_input, has_weight ? total(0) : no_result(x), has_bias ? total(cols) : no_result(x)};
}

}  // namespace
}  // namespace fastformer

STABLE_TORCH_LIBRARY_IMPL(fastformer, CPU, m) {
  m.impl("layer_norm_forward", TORCH_BOX(&fastformer::layer_norm_forward));
  m.impl("layer_norm_backward", TORCH_BOX(&fastformer::layer_norm_backward));
}
