#include "kernels/feed_forward.h"

#include <string>
#include <tuple>

#include "../feed_forward.h"
#include "product.h"

namespace fastformer {
namespace {

// The hidden part of a block of rows, which is to stay in cache between the two products. Below kLeastRows rows the
// products, which read all weights for each block, get slower.
constexpr int64_t kBlockBytes = 8 << 20;
constexpr int64_t kLeastRows = 256;
// Memory for the gradients of one panel of blocks, whose part of the weights' gradients is one product.
constexpr int64_t kPanelBytes = 32 << 20;

int64_t rows_of_block(int64_t hidden_width, ScalarType dtype) {
  const int64_t fitting = kBlockBytes / (hidden_width * size_of(dtype) + 1) / kLeastRows * kLeastRows;
  return fitting > kLeastRows ? fitting : kLeastRows;
}

std::tuple<Tensor, Tensor> feed_forward_forward(const Tensor& input, const Tensor& weight1,
                                                const std::optional<Tensor>& bias1,
                                                const std::optional<Tensor>& weight_gate, const Tensor& weight2,
                                                const std::optional<Tensor>& bias2, std::string activation,
                                                bool save_hidden) {
  const auto [N, C, F, C2] = check_feed_forward(input, weight1, weight_gate, weight2);
  const ScalarType dtype = input.scalar_type(), product = products_in(dtype);
  const DType element = dtype_of(input, "input");
  check_bias(bias1, "bias1", F, input);
  check_bias(bias2, "bias2", C2, input);
  const Activation act = activation_of(activation);
  const bool gated = weight_gate.has_value();

  const Tensor x = as_dtype(input, product), w1 = as_dtype(weight1, product), w2 = as_dtype(weight2, product);
  const Tensor wg = gated ? as_dtype(*weight_gate, product) : w1;
  const Tensor b1 = bias1.has_value() ? as_contiguous(*bias1) : w1;
  const Tensor b2 = bias2.has_value() ? as_dtype(*bias2, product) : w1;
  const Tensor output = empty_like_sizes(x, sizes_with_last(input, C2), x.scalar_type());
  const Tensor hidden = save_hidden ? empty_like_sizes(input, {N, gated ? 2 * F : F}, dtype) : no_result(input);

  const Matrix xs(pointer(x), N, C, product), outputs(pointer(output), N, C2, product);
  const Tensor w1_t = Matrix(w1).transposed(), wg_t = Matrix(wg).transposed(), w2_t = Matrix(w2).transposed();
  const int64_t block_rows = rows_of_block(F, product);
  const int64_t block_bytes = (N < block_rows ? N : block_rows) * F * size_of(product);
  const Scratch up_memory(block_bytes), gate_memory(gated ? block_bytes : 0);
  const FeedForwardKernels& kernels = feed_forward_kernels();
  for (int64_t begin = 0; begin < N; begin += block_rows) {
    const int64_t count = N - begin < block_rows ? N - begin : block_rows;
    const Matrix up(up_memory.as<void>(), count, F, product), gate(gate_memory.as<void>(), count, F, product);
    const Tensor block = xs.rows(begin, count).tensor(), up_block = up.tensor();
    if (gated) multiply(gate.tensor(), block, wg_t);
    const bool own = own_product_is_faster(up_block, block);
    // The kernel adds the bias for less, but to a bfloat16 product of torch's only after that was rounded.
    const bool bias_in_product = bias1.has_value() && product != ScalarType::Float && !own;
    const FeedForwardForward args{
        .up = up.at(0),
        .gate = gated ? gate.at(0) : nullptr,
        .bias = bias1.has_value() && !bias_in_product ? pointer(b1) : nullptr,
        .hidden = save_hidden ? Matrix(hidden).at(begin) : nullptr,
        .activation = act,
        .dtype = element,
        .cols = F,
    };
    if (own) {
      own_product(block, w1_t, {kernels.forward_block, &args});
    } else {
      if (bias_in_product) {
        multiply_add(up_block, b1, block, w1_t);
      } else {
        multiply(up_block, block, w1_t);
      }
      torch::stable::parallel_for(0, count, row_grain(F * 4),
                                  [&](int64_t first, int64_t last) { kernels.forward(args, first, last); });
    }
    const Tensor out_block = outputs.rows(begin, count).tensor();
    if (bias2.has_value()) {
      multiply_add(out_block, b2, up_block, w2_t);
    } else {
      multiply(out_block, up_block, w2_t);
    }
  }
  return {as_dtype(output, dtype), hidden};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> feed_forward_backward(
    const Tensor& grad_output, const Tensor& input, const Tensor& weight1, const std::optional<Tensor>& weight_gate,
    const Tensor& weight2, const Tensor& hidden, std::string activation, bool has_bias1, bool has_bias2,
    bool needs_grad_input, bool needs_grad_weights) {
  const FeedForwardSizes sizes = check_feed_forward(input, weight1, weight_gate, weight2);
  const auto [N, C, F, C2] = sizes;
  const ScalarType dtype = input.scalar_type(), product = products_in(dtype);
  const DType element = dtype_of(input, "input");
  const bool gated = weight_gate.has_value();
  check_feed_forward_gradient(grad_output, hidden, input, sizes, gated);
  const Activation act = activation_of(activation);
  has_bias1 = has_bias1 && needs_grad_weights;
  has_bias2 = has_bias2 && needs_grad_weights;

  const Tensor dy = as_dtype(grad_output, product), h = as_contiguous(hidden);
  const Tensor x = needs_grad_weights ? as_dtype(input, product) : input;
  const Tensor w2 = as_dtype(weight2, product);
  const Tensor w1 = needs_grad_input ? as_dtype(weight1, product) : weight1;
  const Tensor wg = needs_grad_input && gated ? as_dtype(*weight_gate, product) : weight1;
  const Tensor grad_input =
      needs_grad_input ? empty_like_sizes(dy, sizes_with_last(input, C), dy.scalar_type()) : no_result(input);
  const Tensor grad_bias1 = torch::stable::new_zeros(input, {has_bias1 ? F : 0}, ScalarType::Float);
  const Tensor grad_bias2 = torch::stable::new_zeros(input, {has_bias2 ? C2 : 0}, ScalarType::Float);

  const Matrix dys(pointer(dy), N, C2, product), hs(h), xs(pointer(x), N, C, product);
  const Matrix dxs(pointer(grad_input), N, C, product);
  const Tensor w2_rows = Matrix(w2).tensor(), w1_rows = Matrix(w1).tensor(), wg_rows = Matrix(wg).tensor();
  // The gradients of a panel are kept for the weights' products; without these, those of one block.
  const int64_t block_rows = rows_of_block(F, product);
  const int64_t fitting = kPanelBytes / (F * size_of(product) + 1) / block_rows * block_rows;
  const int64_t wanted = needs_grad_weights && fitting > block_rows ? fitting : block_rows;
  const int64_t panel_rows = N < wanted ? N : wanted;
  const int64_t panel_bytes = panel_rows * F * size_of(product);
  const Scratch grad_memory(panel_bytes), gate_memory(gated ? panel_bytes : 0);
  const Scratch activated_memory(needs_grad_weights ? panel_bytes : 0);
  const Matrix grads(grad_memory.as<void>(), panel_rows, F, product);
  const Matrix grad_gates(gate_memory.as<void>(), panel_rows, F, product);
  const Matrix activated(activated_memory.as<void>(), panel_rows, F, product);
  const bool single = N <= wanted;
  const auto sum = [&](bool needed, int64_t rows, int64_t cols) {
    return TransposedProductSum(input, needed ? rows : 0, needed ? cols : 0, product, single);
  };
  TransposedProductSum grad_weight1 = sum(needs_grad_weights, F, C);
  TransposedProductSum grad_weight_gate = sum(needs_grad_weights && gated, F, C);
  TransposedProductSum grad_weight2 = sum(needs_grad_weights, C2, F);
  const auto bias_sums = [](int64_t rows) { return ceil_div(rows, kBiasRows); };
  const Scratch grad_bias1_memory(has_bias1 ? bias_sums(std::min(N, block_rows)) * F * size_of(ScalarType::Float) : 0);

  const FeedForwardKernels& kernels = feed_forward_kernels();
  for (int64_t panel = 0; panel < N; panel += wanted) {
    const int64_t panel_count = N - panel < wanted ? N - panel : wanted;
    for (int64_t begin = 0; begin < panel_count; begin += block_rows) {
      const int64_t count = panel_count - begin < block_rows ? panel_count - begin : block_rows;
      const Matrix dy_block = dys.rows(panel + begin, count);
      const Tensor grad = grads.rows(begin, count).tensor();
      const FeedForwardBackward args{
          .hidden = hs.at(panel + begin),
          .grad = grads.at(begin),
          .grad_gate = gated ? grad_gates.at(begin) : nullptr,
          .activated = needs_grad_weights ? activated.at(begin) : nullptr,
          .grad_bias = has_bias1 ? grad_bias1_memory.as<float>() : nullptr,
          .activation = act,
          .dtype = element,
          .cols = F,
      };
      if (own_product_is_faster(grad, dy_block.tensor())) {
        own_product(dy_block.tensor(), w2_rows, {kernels.backward_block, &args});
      } else {
        multiply(grad, dy_block.tensor(), w2_rows);
        torch::stable::parallel_for(0, bias_sums(count), row_grain(F * 4 * kBiasRows),
                                    [&](int64_t first, int64_t last) {
                                      kernels.backward(args, first * kBiasRows, std::min(last * kBiasRows, count));
                                    });
      }
      if (has_bias1) {
        const Matrix sums(args.grad_bias, bias_sums(count), F, ScalarType::Float);
        add_rows(sums, bias_sums(count), F, DType::float32, mutable_pointer<float>(grad_bias1));
      }
      if (has_bias2) add_rows(dy_block, count, C2, dtype_of(dy, "grad_output"), mutable_pointer<float>(grad_bias2));
      if (!needs_grad_input) continue;
      const Tensor dx = dxs.rows(panel + begin, count).tensor();
      multiply(dx, grad, w1_rows);
      if (gated) multiply_add(dx, dx, grad_gates.rows(begin, count).tensor(), wg_rows);
    }
    if (!needs_grad_weights) continue;
    const Matrix x_panel = xs.rows(panel, panel_count);
    grad_weight1.add(grads.rows(0, panel_count), x_panel);
    if (gated) grad_weight_gate.add(grad_gates.rows(0, panel_count), x_panel);
    grad_weight2.add(dys.rows(panel, panel_count), activated.rows(0, panel_count));
  }
  const auto result = [&](TransposedProductSum& total, bool needed) {
    return needed ? total.result(dtype) : no_result(input);
  };
  return {as_dtype(grad_input, dtype),
          result(grad_weight1, needs_grad_weights),
          as_dtype(grad_bias1, dtype),
          result(grad_weight_gate, needs_grad_weights && gated),
          result(grad_weight2, needs_grad_weights),
          as_dtype(grad_bias2, dtype)};
}

}  // namespace
}  // namespace fastformer

STABLE_TORCH_LIBRARY_IMPL(fastformer, CPU, m) {
  m.impl("feed_forward_forward", TORCH_BOX(&fastformer::feed_forward_forward));
  m.impl("feed_forward_backward", TORCH_BOX(&fastformer::feed_forward_backward));
}
