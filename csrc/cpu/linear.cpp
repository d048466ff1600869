#include <tuple>

#include "product.h"

namespace fastformer {
namespace {

// The matrix in `dtype`, with one of its strides 1, as products take it.
Tensor as_factor(const Tensor& matrix, ScalarType dtype) {
  if (matrix.scalar_type() != dtype) return torch::stable::to(matrix, dtype);
  return matrix.stride(0) == 1 || matrix.stride(1) == 1 ? matrix : torch::stable::contiguous(matrix);
}

Tensor transposed(const Tensor& matrix) {
  return matrix_at(pointer(matrix), matrix.size(1), matrix.size(0), matrix.stride(1), matrix.stride(0),
                   matrix.scalar_type());
}

void check(const Tensor& input, const Tensor& weight) {
  STD_TORCH_CHECK(weight.dim() == 2, "weight must have two dimensions");
  STD_TORCH_CHECK(input.dim() >= 1, "input must have at least one dimension");
  check_matrix(weight, "weight", weight.size(0), input.size(input.dim() - 1), input);
}

Tensor linear_forward(const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias) {
  check(input, weight);
  check_bias(bias, "bias", weight.size(0), input);
  const int64_t M = rows_of(input, "input"), N = weight.size(0), K = weight.size(1);
  const ScalarType dtype = input.scalar_type();
  // The kernel for few rows converts what it reads; elsewhere all is converted before.
  const ScalarType product = M <= kFewRows && weight.stride(1) == 1 ? dtype : products_in(dtype);
  const Tensor x = as_dtype(input, product), w = as_factor(weight, product);
  const Tensor output = empty_like_sizes(x, sizes_with_last(input, N), x.scalar_type());
  const Tensor out = Matrix(pointer(output), M, N, product).tensor();
  const Tensor rows = Matrix(pointer(x), M, K, product).tensor();
  if (bias.has_value()) {
    multiply_add(out, as_dtype(*bias, product), rows, transposed(w));
  } else {
    multiply(out, rows, transposed(w));
  }
  return as_dtype(output, dtype);
}

std::tuple<Tensor, Tensor, Tensor> linear_backward(const Tensor& grad_output, const std::optional<Tensor>& input,
                                                   const std::optional<Tensor>& weight, bool needs_grad_bias) {
  const int64_t M = rows_of(grad_output, "grad_output"), N = grad_output.size(grad_output.dim() - 1);
  const ScalarType dtype = grad_output.scalar_type(), product = products_in(dtype);
  const Tensor dy = as_dtype(grad_output, product);
  const Matrix dys(pointer(dy), M, N, product);
  Tensor grad_input = no_result(dy), grad_weight = no_result(dy), grad_bias = no_result(dy);
  if (weight.has_value()) {
    STD_TORCH_CHECK(weight->dim() == 2, "weight must have two dimensions");
    const int64_t K = weight->size(1);
    check_matrix(*weight, "weight", N, K, grad_output);
    grad_input = empty_like_sizes(dy, sizes_with_last(grad_output, K), dy.scalar_type());
    multiply(Matrix(pointer(grad_input), M, K, product).tensor(), dys.tensor(), as_factor(*weight, product));
  }
  if (input.has_value()) {
    STD_TORCH_CHECK(rows_of(*input, "input") == M && input->scalar_type() == dtype,
                    "input must have the rows and dtype of grad_output");
    const int64_t K = input->size(input->dim() - 1);
    const Tensor x = as_dtype(*input, product);
    grad_weight = empty_like_sizes(dy, {N, K}, product);
    multiply(grad_weight, dys.transposed(), Matrix(pointer(x), M, K, product).tensor());
  }
  if (needs_grad_bias) {
    grad_bias = torch::stable::new_zeros(dy, {N}, ScalarType::Float);
    add_rows(dys, M, N, dtype_of(dy, "grad_output"), mutable_pointer<float>(grad_bias));
  }
  return {as_dtype(grad_input, dtype), as_dtype(grad_weight, dtype), as_dtype(grad_bias, dtype)};
}

}  // namespace
}  // namespace fastformer

STABLE_TORCH_LIBRARY_IMPL(fastformer, CPU, m) {
  m.impl("linear_forward", TORCH_BOX(&fastformer::linear_forward));
  m.impl("linear_backward", TORCH_BOX(&fastformer::linear_backward));
}
