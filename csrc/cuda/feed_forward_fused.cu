// The feed-forward layer's products on tensor cores, each with what follows it (feed_forward_epilogues.cuh).
//
// Shapes: N rows (all leading dimensions together), C columns, F hidden width, C2 output width. Gated, the gate and
// `up` are two products over one reading of the rows, and their gradients one matrix [N, 2F], as `hidden` is.
#include "feed_forward_epilogues.cuh"
#include "gemm_hopper.h"

namespace fastformer::cuda {
namespace {

// Two of one stride, one above the other.
template <typename T>
Stacked<T> stacked(const Tensor& upper, const Tensor& lower) {
  const Matrix<T> first = matrix_of<T>(upper), second = matrix_of<T>(lower);
  const auto apart = reinterpret_cast<intptr_t>(second.data) - reinterpret_cast<intptr_t>(first.data);
  const int64_t jump = apart / static_cast<int64_t>(sizeof(T)) - first.rows * first.stride;
  return {first.data, first.rows + second.rows, first.columns, first.stride, first.rows, jump};
}

constexpr auto kOuter = TileRows::outer, kDepth = TileRows::depth;

}  // namespace

std::tuple<Tensor, Tensor> feed_forward_forward_fused(const Tensor& input, const Tensor& weight1,
                                                      const std::optional<Tensor>& bias1,
                                                      const std::optional<Tensor>& weight_gate, const Tensor& weight2,
                                                      const std::optional<Tensor>& bias2, Activation activation,
                                                      bool save_hidden, const OnDevice& device) {
  const bool gated = weight_gate.has_value();
  const Tensor x = with_aligned_rows(as_matrix(input, "input")), w1 = with_aligned_rows(weight1),
               w2 = with_aligned_rows(weight2);
  const std::optional<Tensor> b1 = with_aligned_rows(bias1), b2 = with_aligned_rows(bias2);
  const int64_t N = x.size(0), C = x.size(1), F = w1.size(0), C2 = w2.size(0);
  const ScalarType dtype = input.scalar_type();
  const Tensor activated = empty_like_sizes(input, {N, F}, dtype);
  const Tensor output = empty_like_sizes(input, sizes_with_last(input, C2), dtype);
  const Tensor hidden = save_hidden ? empty_like_sizes(input, {N, gated ? 2 * F : F}, dtype) : no_result(input);
  for_gemm_dtype(dtype_of(input, "input"), [&]<typename T>() {
    const auto first_product = [&]<bool kGated>(const auto& weights) {
      const Activate<T, kGated> epilogue{pointer<T>(b1), mutable_pointer<T>(activated),
                                         save_hidden ? mutable_pointer<T>(hidden) : nullptr, F, activation};
      product<T, kOuter, kOuter>(matrix_of<T>(x), weights, N, F, C, epilogue, input, device);
    };
    if (gated) {
      const Tensor gate = with_aligned_rows(*weight_gate);
      first_product.template operator()<true>(Pair<T>{matrix_of<T>(gate), matrix_of<T>(w1)});
    } else {
      first_product.template operator()<false>(matrix_of<T>(w1));
    }
    const Store<T> epilogue{pointer<T>(b2), mutable_pointer<T>(output), nullptr, N, C2};
    product<T, kOuter, kOuter>(matrix_of<T>(activated), matrix_of<T>(w2), N, C2, F, epilogue, input, device);
  });
  return {output, hidden};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> feed_forward_backward_fused(
    const Tensor& grad_output, const Tensor& input, const Tensor& weight1, const std::optional<Tensor>& weight_gate,
    const Tensor& weight2, const Tensor& hidden, Activation activation, bool has_bias1, bool has_bias2,
    bool needs_grad_input, bool needs_grad_weights, const OnDevice& device) {
  const bool gated = weight_gate.has_value();
  const Tensor x = with_aligned_rows(as_matrix(input, "input")),
               dy = with_aligned_rows(as_matrix(grad_output, "grad_output"));
  const Tensor w2 = with_aligned_rows(weight2), saved = with_aligned_rows(as_contiguous(hidden));
  const int64_t N = x.size(0), C = x.size(1), F = weight1.size(0), C2 = w2.size(0);
  const int64_t H = gated ? 2 * F : F;  // columns of hidden
  const ScalarType dtype = input.scalar_type();
  const auto new_matrix = [&](int64_t rows, int64_t cols) { return empty_like_sizes(input, {rows, cols}, dtype); };
  const Tensor grad_hidden = new_matrix(N, H);
  std::optional<Tensor> activated;
  if (needs_grad_weights) activated = new_matrix(N, F);

  Tensor grad_input = no_result(input), grad_weight1 = no_result(input), grad_weight_gate = no_result(input);
  Tensor grad_weight2 = no_result(input), grad_bias1 = no_result(input), grad_bias2 = no_result(input);
  for_gemm_dtype(dtype_of(input, "input"), [&]<typename T>() {
    const auto derive = [&]<bool kGated>() {
      const Derive<T, kGated> epilogue{pointer<T>(saved), mutable_pointer<T>(grad_hidden),
                                       mutable_pointer<T>(activated), F, activation};
      return product<T, kOuter, kDepth>(matrix_of<T>(dy), matrix_of<T>(w2), N, F, C2, epilogue, input, device,
                                        has_bias1 && needs_grad_weights);
    };
    const GemmSums sums = gated ? derive.template operator()<true>() : derive.template operator()<false>();
    if (sums.of_columns.has_value()) grad_bias1 = sum_of_rows(*sums.of_columns, dtype);

    if (needs_grad_input) {
      grad_input = empty_like_sizes(input, sizes_with_last(input, C), dtype);
      const Store<T> epilogue{nullptr, mutable_pointer<T>(grad_input), nullptr, N, C};
      const auto multiply = [&](const auto& weights) {
        product<T, kOuter, kDepth>(matrix_of<T>(grad_hidden), weights, N, C, H, epilogue, input, device);
      };
      const Tensor up = with_aligned_rows(weight1);
      if (gated) {
        const Tensor gate = with_aligned_rows(*weight_gate);
        const bool alike = gate.stride(0) == up.stride(0);
        multiply(stacked<T>(alike ? gate : as_contiguous(gate), alike ? up : as_contiguous(up)));
      } else {
        multiply(matrix_of<T>(up));
      }
    }
    if (needs_grad_weights) {
      grad_weight1 = new_matrix(F, C);
      if (gated) grad_weight_gate = new_matrix(F, C);
      const Store<T> by_hidden{nullptr, mutable_pointer<T>(gated ? grad_weight_gate : grad_weight1),
                               mutable_pointer<T>(grad_weight1), F, C};
      product<T, kDepth, kDepth>(matrix_of<T>(grad_hidden), matrix_of<T>(x), H, C, N, by_hidden, input, device);
      grad_weight2 = new_matrix(C2, F);
      const Store<T> by_output{nullptr, mutable_pointer<T>(grad_weight2), nullptr, C2, F};
      const GemmSums of_output = product<T, kDepth, kDepth, true>(matrix_of<T>(dy), matrix_of<T>(*activated), C2, F, N,
                                                                  by_output, input, device, false, has_bias2);
      if (has_bias2) grad_bias2 = sum_of_rows(of_output.of_a.value_or(dy), dtype);
    }
  });
  return {grad_input, grad_weight1, grad_bias1, grad_weight_gate, grad_weight2, grad_bias2};
}

}  // namespace fastformer::cuda
