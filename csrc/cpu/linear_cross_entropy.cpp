#include "kernels/linear_cross_entropy.h"

#include <tuple>

#include "../linear_cross_entropy.h"
#include "product.h"

namespace fastformer {
namespace {

// Logits are held for one chunk of rows: about this many bytes, but at least kLeastRows rows. Each chunk reads all of
// weight and adds to all of its gradient's float32 sums, 12 bytes an element: at 128 rows that takes as long as the
// product (2 * 128 FLOPs an element), at 512 a quarter of it.
constexpr int64_t kChunkBytes = 16 << 20;
constexpr int64_t kLeastRows = 512;

// Equal chunks, but for the last one.
int64_t chunk_rows(int64_t rows, int64_t cols, ScalarType dtype) {
  const int64_t fitting = kChunkBytes / (cols * size_of(dtype) + 1);
  const int64_t most = fitting > kLeastRows ? fitting : kLeastRows;
  const int64_t chunks = (rows + most - 1) / most;
  if (chunks <= 1) return rows;
  const int64_t even = (rows + chunks - 1) / chunks;
  return (even + 15) / 16 * 16;
}

void check_arguments(const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias, const Tensor& target,
                     int64_t ignore_index, double label_smoothing) {
  check_linear_cross_entropy(input, weight, bias, target, label_smoothing);
  const Tensor targets = as_contiguous(target);
  const int64_t* values = pointer<int64_t>(targets);
  for (int64_t i = 0; i < target.size(0); ++i) {
    STD_TORCH_CHECK(values[i] == ignore_index || (values[i] >= 0 && values[i] < weight.size(0)), "target[", i, "] is ",
                    values[i], ", which is out of bounds: it must be in [0, ", weight.size(0), ") or ignore_index (",
                    ignore_index, ")");
  }
}

struct Gradients {
  Tensor input, weight, bias;
};

Gradients no_gradients(const Tensor& like) { return {no_result(like), no_result(like), no_result(like)}; }

// Takes the rows chunk by chunk: their logits and losses, and with row_weight the products of the logits' gradients.
Gradients for_chunks(const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias,
                     CrossEntropyRows args, bool gradients) {
  const int64_t N = input.size(0), C = input.size(1), V = weight.size(0);
  dtype_of(input, "input");  // an error for any other
  const ScalarType dtype = input.scalar_type(), product = products_in(dtype);
  // Our own product gives the losses block by block: then the logits are kept for the gradients alone.
  const bool own = own_product_is_faster(product, N, V), keep_logits = gradients || !own;
  const int64_t block_cols = kGemmPanels * gemm_kernels().panel_cols, blocks = ceil_div(V, block_cols);
  // Without them `parts` are what is large; the weights are packed once for each chunk.
  const int64_t most = keep_logits ? chunk_rows(N, V, product) : std::min<int64_t>(N, 4096);
  const Tensor x = as_dtype(input, product), w = as_dtype(weight, product);
  const Tensor b = bias.has_value() ? as_dtype(*bias, product) : w;
  // Into float32 it can take so deep a product in parts.
  const bool own_dx = own_product_is_faster(product, N, C);
  const ScalarType dx_dtype = own_dx ? ScalarType::Float : product;
  const Tensor grad_input = gradients ? empty_like_sizes(input, {N, C}, dx_dtype) : no_result(input);
  const Tensor grad_bias = torch::stable::new_zeros(input, {gradients && bias.has_value() ? V : 0}, ScalarType::Float);
  TransposedProductSum grad_weight(input, gradients ? V : 0, gradients ? C : 0, product, N <= most);

  const Scratch logits_memory(keep_logits ? most * V * size_of(product) : 0);
  const Scratch parts(own ? most * blocks * static_cast<int64_t>(sizeof(CrossEntropyPart)) : 0);
  const Scratch target_logits(own ? most * static_cast<int64_t>(sizeof(float)) : 0);
  const Tensor w_rows = Matrix(w).tensor(), w_t = Matrix(w).transposed();
  args.dtype = dtype_of(x, "input");
  args.bias = bias.has_value() ? pointer(b) : nullptr;
  args.logits = keep_logits ? logits_memory.as<void>() : nullptr;
  args.parts = own ? parts.as<CrossEntropyPart>() : nullptr;
  args.target_logits = target_logits.as<float>();
  args.cols = V;
  args.blocks = blocks;
  args.block_cols = block_cols;
  const LinearCrossEntropyKernels& kernels = linear_cross_entropy_kernels();
  for (int64_t begin = 0; begin < N; begin += most) {
    const int64_t count = N - begin < most ? N - begin : most;
    const Matrix block = Matrix(x).rows(begin, count), logits(args.logits, count, V, product);
    const Tensor logits_tensor = logits.tensor();
    if (own) {
      own_product(block.tensor(), w_t, {kernels.block, &args});
    } else if (bias.has_value()) {
      multiply_add(logits_tensor, b, block.tensor(), w_t);
    } else {
      multiply(logits_tensor, block.tensor(), w_t);
    }
    torch::stable::parallel_for(0, count, row_grain(keep_logits ? V * 4 : blocks * 64),
                                [&](int64_t first, int64_t last) { kernels.losses(args, first, last); });
    args.target += count;
    args.losses += count;
    args.lse += count;
    if (!gradients) continue;
    args.row_weight += count;
    const Tensor dx = Matrix(grad_input).rows(begin, count).tensor();
    if (own_dx) {
      own_product(dx, logits_tensor, w_rows, nullptr, false);
    } else {
      multiply(dx, logits_tensor, w_rows);
    }
    grad_weight.add(logits, block);
    if (bias.has_value()) add_rows(logits, count, V, args.dtype, mutable_pointer<float>(grad_bias));
  }
  if (!gradients) return no_gradients(input);
  return {as_dtype(grad_input, dtype), grad_weight.result(dtype), as_dtype(grad_bias, dtype)};
}

// Losses and lse of each row, and with row_weight its sum's gradients.
struct Result {
  Tensor losses, lse;
  Gradients gradients;
};

Result losses_of(const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias, const Tensor& target,
                 const std::optional<Tensor>& row_weight, int64_t ignore_index, double label_smoothing) {
  const int64_t N = input.size(0);
  const Tensor targets = as_contiguous(target);
  const Tensor losses = empty_like_sizes(input, {N}, ScalarType::Float);
  const Tensor lse = empty_like_sizes(input, {N}, ScalarType::Float);
  const Tensor weights = row_weight.has_value() ? as_contiguous(*row_weight) : losses;
  CrossEntropyRows args{};
  args.target = pointer<int64_t>(targets);
  args.row_weight = row_weight.has_value() ? pointer<float>(weights) : nullptr;
  args.losses = mutable_pointer<float>(losses);
  args.lse = mutable_pointer<float>(lse);
  args.ignore_index = ignore_index;
  args.label_smoothing = static_cast<float>(label_smoothing);
  return {losses, lse, for_chunks(input, weight, bias, args, row_weight.has_value())};
}

// sum(row_weight * losses), in double and in order.
Tensor weighted_sum(const Tensor& row_weight, const Tensor& losses) {
  const Tensor weights = as_contiguous(row_weight);
  double total = 0.0;
  for (int64_t i = 0; i < losses.size(0); ++i) {
    total += static_cast<double>(pointer<float>(weights)[i]) * pointer<float>(losses)[i];
  }
  const Tensor sum = empty_like_sizes(losses, {}, ScalarType::Float);
  *mutable_pointer<float>(sum) = static_cast<float>(total);
  return sum;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> linear_cross_entropy_forward(
    const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias, const Tensor& target,
    const std::optional<Tensor>& row_weight, int64_t ignore_index, double label_smoothing, bool save_grads) {
  check_arguments(input, weight, bias, target, ignore_index, label_smoothing);
  check_row_values(row_weight, "row_weight", input.size(0));
  STD_TORCH_CHECK(!save_grads || row_weight.has_value(), "save_grads needs row_weight");
  const Result r =
      losses_of(input, weight, bias, target, save_grads ? row_weight : std::nullopt, ignore_index, label_smoothing);
  const Tensor loss = row_weight.has_value() ? weighted_sum(*row_weight, r.losses) : r.losses;
  return {loss, r.lse, r.gradients.input, r.gradients.weight, r.gradients.bias};
}

// lse is not read: the losses' own pass finds each row's maximum, which shifts the exponentials with less rounding.
std::tuple<Tensor, Tensor, Tensor> linear_cross_entropy_backward(const Tensor& grad_losses, const Tensor& input,
                                                                 const Tensor& weight,
                                                                 const std::optional<Tensor>& bias,
                                                                 const Tensor& target, const Tensor& lse,
                                                                 int64_t ignore_index, double label_smoothing) {
  check_arguments(input, weight, bias, target, ignore_index, label_smoothing);
  check_row_values(grad_losses, "grad_losses", input.size(0));
  check_row_values(lse, "lse", input.size(0));
  const Gradients g = losses_of(input, weight, bias, target, grad_losses, ignore_index, label_smoothing).gradients;
  return {g.input, g.weight, g.bias};
}

}  // namespace
}  // namespace fastformer

STABLE_TORCH_LIBRARY_IMPL(fastformer, CPU, m) {
  m.impl("linear_cross_entropy_forward", TORCH_BOX(&fastformer::linear_cross_entropy_forward));
  m.impl("linear_cross_entropy_backward", TORCH_BOX(&fastformer::linear_cross_entropy_backward));
}
