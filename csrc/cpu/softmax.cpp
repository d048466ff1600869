#include "kernels/softmax.h"

#include "../mask.h"
#include "streaming.h"

namespace fastformer {
namespace {

Tensor softmax_forward(const Tensor& input, const std::optional<Tensor>& mask, double scale, bool is_causal) {
  const int64_t dims = input.dim();
  STD_TORCH_CHECK(dims >= 1, "input must have at least one dimension");
  STD_TORCH_CHECK(!is_causal || dims >= 2, "is_causal: input must have rows and columns");
  STD_TORCH_CHECK(!mask.has_value() || (dims <= 4 && mask->dim() <= dims), "mask: input may have at most 4 dimensions");
  const Tensor x = as_contiguous(input);
  const Tensor y = fresh_like(x);
  const auto size = [&](int64_t from_last) { return dims >= from_last ? x.size(dims - from_last) : 1; };
  const int64_t cols = size(1), rows = size(2), heads = size(3);
  const BroadcastMask m = broadcast_mask(mask, {size(4), heads, rows, cols});
  if (x.numel() == 0) return y;
  const int64_t outer = x.numel() / (cols * rows * heads);
  const int64_t row_bytes = cols * static_cast<int64_t>(x.element_size()), bytes = outer * heads * rows * row_bytes;
  const SoftmaxForward args{
      .input = pointer(x),
      .output = mutable_pointer(y),
      .mask = m.data,
      .mask_kind = m.kind,
      .dtype = dtype_of(x, "input"),
      .mask_dtype = m.dtype,
      .heads = heads,
      .rows = rows,
      .cols = cols,
      .mask_strides = {m.strides[0], m.strides[1], m.strides[2], m.strides[3]},
      .scale = static_cast<float>(scale),
      .is_causal = is_causal,
      .stream = worth_streaming(2 * bytes, row_bytes, y),
  };
  const SoftmaxKernels& kernels = softmax_kernels();
  torch::stable::parallel_for(0, outer * heads * rows, row_grain(cols * 4), [&](int64_t begin, int64_t end) {
    const Scratch scores(cols * sizeof(float));
    kernels.forward(args, begin, end, scores.as<float>());
  });
  return y;
}

Tensor softmax_backward(const Tensor& grad_output, const Tensor& output, double scale) {
  STD_TORCH_CHECK(same_sizes(grad_output, output), "grad_output must have the shape of output");
  STD_TORCH_CHECK(grad_output.scalar_type() == output.scalar_type(), "grad_output must have the dtype of output");
  const Tensor grad = as_contiguous(grad_output), y = as_contiguous(output);
  const Tensor result = fresh_like(y);
  if (y.numel() == 0) return result;
  const int64_t cols = y.size(y.dim() - 1);
  const int64_t row_bytes = cols * static_cast<int64_t>(y.element_size()), bytes = y.numel() / cols * row_bytes;
  const SoftmaxBackward args{
      .grad_output = pointer(grad),
      .output = pointer(y),
      .grad_input = mutable_pointer(result),
      .dtype = dtype_of(y, "output"),
      .cols = cols,
      .scale = static_cast<float>(scale),
      .stream = worth_streaming(3 * bytes, row_bytes, result),
  };
  const SoftmaxKernels& kernels = softmax_kernels();
  torch::stable::parallel_for(0, y.numel() / cols, row_grain(cols * 4),
                              [&](int64_t begin, int64_t end) { kernels.backward(args, begin, end); });
  return result;
}

}  // namespace
}  // namespace fastformer

STABLE_TORCH_LIBRARY_IMPL(fastformer, CPU, m) {
  m.impl("softmax_forward", TORCH_BOX(&fastformer::softmax_forward));
  m.impl("softmax_backward", TORCH_BOX(&fastformer::softmax_backward));
}
