// The feed-forward layer, activation(x W1^T + b1) W2^T + b2, plain or gated, forward and backward. Matrices of 16-bit
// elements whose rows take 16-byte accesses go to feed_forward_fused.cu. For others the products are the library's,
// with the bias in them: their sums reach `hidden` rounded once. What is between them is here.
//
// Shapes: N rows (all leading dimensions together), C columns, F hidden width, C2 output width.
#include <algorithm>
#include <tuple>

#include "feed_forward.cuh"

namespace fastformer::cuda {
namespace {

// --- kernels

// A block's 32 threads along x take neighbouring packs of a strip of columns, those along y different rows; the grid is
// strips by parts of the rows.
constexpr int kRowsAtOnce = 8;
constexpr int kThreads = kWarp * kRowsAtOnce;
// Of blocks on a multiprocessor: 64 registers a thread. Left to itself the compiler spills to get by with 32.
constexpr int kLeastBlocks = 4;

template <int kPack>
FASTFORMER_DEVICE int64_t first_column() {
  return (static_cast<int64_t>(blockIdx.x) * kWarp + threadIdx.x) * kPack;
}
FASTFORMER_DEVICE int64_t first_row() { return static_cast<int64_t>(blockIdx.y) * kRowsAtOnce + threadIdx.y; }
FASTFORMER_DEVICE int64_t row_step() { return static_cast<int64_t>(gridDim.y) * kRowsAtOnce; }

template <typename T, Activation kActivation, bool kGated, int kPack>
__global__ void __launch_bounds__(kThreads, kLeastBlocks)
    feed_forward_forward_kernel(const T* hidden,  // [N, F], or [N, 2F] = gate beside up; contiguous
                                T* activated,     // [N, F], unit stride; may be where `hidden` has the last F columns
                                int64_t activated_stride,  // from row to row
                                int64_t row_count,         // N
                                int64_t column_count) {    // F
  const int64_t column = first_column<kPack>();
  if (column >= column_count) return;
  for (int64_t row = first_row(); row < row_count; row += row_step()) {
    const T* from = hidden + row * (kGated ? 2 : 1) * column_count + column;
    const Pack<T, kPack> argument = load<kPack>(from);
    Pack<T, kPack> up, result;
    if constexpr (kGated) up = load<kPack>(from + column_count);
#pragma unroll
    for (int i = 0; i < kPack; ++i) {
      float value = activate<kActivation, __is_same(T, float)>(to_float(argument.values[i])).value;
      if constexpr (kGated) value *= to_float(up.values[i]);
      result.values[i] = from_float<T>(value);
    }
    store_global(activated + row * activated_stride + column, result);
  }
}

template <typename T, Activation kActivation, bool kGated, int kPack>
__global__ void __launch_bounds__(kThreads, kLeastBlocks)
    feed_forward_backward_kernel(const T* hidden,      // as above
                                 T* grad,              // [N, F]: by the activated values; by `up` when done
                                 T* grad_gate,         // [N, F]: by the gate's part of `hidden`; null without one
                                 T* activated,         // [N, F]: the activated values once more; or null
                                 float* bias_sums,     // [parts, F]: each part's rows of grad added up; or null
                                 int64_t row_count,    // N
                                 int64_t column_count  // F
    ) {
  const int64_t column = first_column<kPack>();
  float sums[kPack] = {};
  if (column < column_count) {
    for (int64_t row = first_row(); row < row_count; row += row_step()) {
      const T* from = hidden + row * (kGated ? 2 : 1) * column_count + column;
      const int64_t place = row * column_count + column;
      const Pack<T, kPack> argument = load<kPack>(from);
      Pack<T, kPack> up, by_value = load<kPack>(grad + place), by_gate, values;
      if constexpr (kGated) up = load<kPack>(from + column_count);
#pragma unroll
      for (int i = 0; i < kPack; ++i) {
        const Activated at = activate<kActivation, __is_same(T, float)>(to_float(argument.values[i]));
        const float incoming = to_float(by_value.values[i]);
        float by_up = incoming * at.slope, value = at.value;
        if constexpr (kGated) {
          const float factor = to_float(up.values[i]);
          by_gate.values[i] = from_float<T>(incoming * factor * at.slope);
          by_up = incoming * at.value;
          value *= factor;
        }
        values.values[i] = from_float<T>(value);
        by_value.values[i] = from_float<T>(by_up);
        sums[i] += by_up;
      }
      store_global(grad + place, by_value);
      if constexpr (kGated) store_global(grad_gate + place, by_gate);
      if (activated != nullptr) store_global(activated + place, values);
    }
  }
  if (bias_sums == nullptr) return;

  float* shared = shared_memory<float>();  // [kRowsAtOnce, kPack, kWarp]
#pragma unroll
  for (int i = 0; i < kPack; ++i) shared[(threadIdx.y * kPack + i) * kWarp + threadIdx.x] = sums[i];
  __syncthreads();
  static_assert(kPack <= kRowsAtOnce);
  const int i = threadIdx.y;
  if (i >= kPack || column >= column_count) return;
  float total = 0.0f;
#pragma unroll
  for (int y = 0; y < kRowsAtOnce; ++y) total += shared[(y * kPack + i) * kWarp + threadIdx.x];
  bias_sums[blockIdx.y * column_count + column + i] = total;
}

// --- launchers

// Enough blocks to hide the memory's latency and to even out the last ones; more would add rows to bias_sums.
constexpr int64_t kBlocksAMultiprocessor = 8;

// The number of parts of the rows.
int64_t parts_of(int64_t rows, int64_t columns, int pack, const OnDevice& device) {
  const int64_t strips = ceil_div(columns, kWarp * pack);
  const int64_t wanted = ceil_div(kBlocksAMultiprocessor * device.multiprocessors(), strips);
  return std::min(wanted, ceil_div(rows, kRowsAtOnce));
}

dim3 grid_of(int64_t parts, int64_t columns, int pack) { return dim3(ceil_div(columns, kWarp * pack), parts); }

template <typename Body>
void for_activation(Activation activation, Body&& body) {
  switch (activation) {
    case Activation::gelu:
      return body.template operator()<Activation::gelu>();
    case Activation::gelu_tanh:
      return body.template operator()<Activation::gelu_tanh>();
    case Activation::relu:
      return body.template operator()<Activation::relu>();
    case Activation::silu:
      return body.template operator()<Activation::silu>();
  }
}

// Calls body.operator()<T, kActivation, kGated, kPack>(). `widest`: whether rows take the widest accesses.
template <typename Body>
void for_kernel(DType dtype, Activation activation, bool gated, bool widest, Body&& body) {
  for_dtype(dtype, [&]<typename T>() {
    for_activation(activation, [&]<Activation kActivation>() {
      if (gated) {
        widest ? body.template operator()<T, kActivation, true, kWidest<T>>()
               : body.template operator()<T, kActivation, true, 1>();
      } else {
        widest ? body.template operator()<T, kActivation, false, kWidest<T>>()
               : body.template operator()<T, kActivation, false, 1>();
      }
    });
  });
}

// Contiguous, and so are rows of `columns` in it.
bool takes_widest(const Tensor& tensor, int64_t columns) {
  return is_aligned(tensor) && columns * tensor.element_size() % 16 == 0;
}

void launch_forward(const Tensor& hidden, const Tensor& activated, Activation activation, bool gated,
                    const OnDevice& device) {
  const int64_t N = activated.size(0), F = activated.size(1);
  if (N == 0 || F == 0) return;
  const bool widest = takes_widest(hidden, F) && takes_widest(activated, F);
  for_kernel(dtype_of(hidden, "hidden"), activation, gated, widest,
             [&]<typename T, Activation kActivation, bool kGated, int kPack>() {
               launch(feed_forward_forward_kernel<T, kActivation, kGated, kPack>,
                      grid_of(parts_of(N, F, kPack, device), F, kPack), dim3(kWarp, kRowsAtOnce), 0, device.stream,
                      pointer<T>(hidden), mutable_pointer<T>(activated), activated.stride(0), N, F);
             });
}

// The gradient by the first bias, or nothing.
Tensor launch_backward(const Tensor& hidden, const Tensor& grad, const std::optional<Tensor>& grad_gate,
                       const std::optional<Tensor>& activated, bool needs_grad_bias, Activation activation,
                       const OnDevice& device) {
  const int64_t N = grad.size(0), F = grad.size(1);
  const ScalarType dtype = grad.scalar_type();
  if (N == 0 || F == 0) return torch::stable::new_zeros(grad, {needs_grad_bias ? F : 0});
  Tensor grad_bias = no_result(grad);
  // What is not among these was allocated here, which is aligned.
  const bool widest = takes_widest(hidden, F);
  for_kernel(dtype_of(grad, "grad"), activation, grad_gate.has_value(), widest,
             [&]<typename T, Activation kActivation, bool kGated, int kPack>() {
               const int64_t parts = parts_of(N, F, kPack, device);
               const size_t shared_bytes = needs_grad_bias ? kThreads * kPack * sizeof(float) : 0;
               std::optional<Tensor> sums;
               if (needs_grad_bias) sums = empty_like_sizes(grad, {parts, F}, ScalarType::Float);
               launch(feed_forward_backward_kernel<T, kActivation, kGated, kPack>, grid_of(parts, F, kPack),
                      dim3(kWarp, kRowsAtOnce), shared_bytes, device.stream, pointer<T>(hidden),
                      mutable_pointer<T>(grad), mutable_pointer<T>(grad_gate), mutable_pointer<T>(activated),
                      mutable_pointer<float>(sums), N, F);
               if (needs_grad_bias) grad_bias = sum_of_rows(*sums, dtype);
             });
  return grad_bias;
}

// --- operators

bool is_fused(const Tensor& input, const FeedForwardSizes& sizes) {
  const auto fits = [](int64_t width) { return width > 0 && width % 8 == 0; };
  return dtype_of(input, "input") != DType::float32 && sizes.rows > 0 && fits(sizes.input) && fits(sizes.hidden) &&
         fits(sizes.output);
}

std::tuple<Tensor, Tensor> feed_forward_forward(const Tensor& input, const Tensor& weight1,
                                                const std::optional<Tensor>& bias1,
                                                const std::optional<Tensor>& weight_gate, const Tensor& weight2,
                                                const std::optional<Tensor>& bias2, std::string activation,
                                                bool save_hidden) {
  const OnDevice device(input);
  const FeedForwardSizes sizes = check_feed_forward(input, weight1, weight_gate, weight2);
  const auto [N, C, F, C2] = sizes;
  const ScalarType dtype = input.scalar_type();
  check_bias(bias1, "bias1", F, input);
  check_bias(bias2, "bias2", C2, input);
  check_device(weight1, "weight1", input, "input");
  check_device(weight2, "weight2", input, "input");
  if (weight_gate.has_value()) check_device(*weight_gate, "weight_gate", input, "input");
  if (bias1.has_value()) check_device(*bias1, "bias1", input, "input");
  if (bias2.has_value()) check_device(*bias2, "bias2", input, "input");
  const Activation act = activation_of(activation);
  const bool gated = weight_gate.has_value();
  if (is_fused(input, sizes)) {
    return feed_forward_forward_fused(input, weight1, bias1, weight_gate, weight2, bias2, act, save_hidden, device);
  }

  const Tensor x = as_matrix(input, "input");
  const Tensor hidden = empty_like_sizes(input, {N, gated ? 2 * F : F}, dtype);
  const Tensor up = gated ? narrow(hidden, 1, F, F) : hidden;
  if (gated) library_product(narrow(hidden, 1, 0, F), x, transposed(*weight_gate));
  library_linear(up, x, weight1, bias1);
  const Tensor activated = save_hidden ? empty_like_sizes(input, {N, F}, dtype) : up;
  launch_forward(hidden, activated, act, gated, device);
  const Tensor output = empty_like_sizes(input, sizes_with_last(input, C2), dtype);
  library_linear(as_matrix(output, "output"), activated, weight2, bias2);
  return {output, save_hidden ? hidden : no_result(input)};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> feed_forward_backward(
    const Tensor& grad_output, const Tensor& input, const Tensor& weight1, const std::optional<Tensor>& weight_gate,
    const Tensor& weight2, const Tensor& hidden, std::string activation, bool has_bias1, bool has_bias2,
    bool needs_grad_input, bool needs_grad_weights) {
  const OnDevice device(input);
  const FeedForwardSizes sizes = check_feed_forward(input, weight1, weight_gate, weight2);
  const auto [N, C, F, C2] = sizes;
  const ScalarType dtype = input.scalar_type();
  const bool gated = weight_gate.has_value();
  check_feed_forward_gradient(grad_output, hidden, input, sizes, gated);
  check_device(grad_output, "grad_output", input, "input");
  check_device(weight1, "weight1", input, "input");
  check_device(weight2, "weight2", input, "input");
  if (gated) check_device(*weight_gate, "weight_gate", input, "input");
  check_device(hidden, "hidden", input, "input");
  const Activation act = activation_of(activation);
  if (is_fused(input, sizes)) {
    return feed_forward_backward_fused(grad_output, input, weight1, weight_gate, weight2, hidden, act, has_bias1,
                                       has_bias2, needs_grad_input, needs_grad_weights, device);
  }

  const Tensor x = as_matrix(input, "input"), dy = as_matrix(grad_output, "grad_output");
  const auto new_matrix = [&](int64_t rows, int64_t cols) { return empty_like_sizes(input, {rows, cols}, dtype); };
  const Tensor grad = new_matrix(N, F);
  std::optional<Tensor> grad_gate, activated;
  if (gated) grad_gate = new_matrix(N, F);
  if (needs_grad_weights) activated = new_matrix(N, F);
  library_product(grad, dy, weight2);
  const Tensor grad_bias1 =
      launch_backward(as_contiguous(hidden), grad, grad_gate, activated, has_bias1 && needs_grad_weights, act, device);

  Tensor grad_input = no_result(input), grad_weight1 = no_result(input), grad_weight_gate = no_result(input);
  Tensor grad_weight2 = no_result(input), grad_bias2 = no_result(input);
  if (needs_grad_input) {
    grad_input = empty_like_sizes(input, sizes_with_last(input, C), dtype);
    const Tensor rows = as_matrix(grad_input, "grad_input");
    library_product(rows, grad, weight1);
    if (gated) library_product_add(rows, rows, *grad_gate, *weight_gate);
  }
  if (needs_grad_weights) {
    library_product(grad_weight1 = new_matrix(F, C), transposed(grad), x);
    if (gated) library_product(grad_weight_gate = new_matrix(F, C), transposed(*grad_gate), x);
    library_product(grad_weight2 = new_matrix(C2, F), transposed(dy), *activated);
    if (has_bias2) grad_bias2 = sum_of_rows(dy, dtype);
  }
  return {grad_input, grad_weight1, grad_bias1, grad_weight_gate, grad_weight2, grad_bias2};
}

}  // namespace
}  // namespace fastformer::cuda

FASTFORMER_CUDA_LIBRARY(m) {
  m.impl("feed_forward_forward", TORCH_BOX(&fastformer::cuda::feed_forward_forward));
  m.impl("feed_forward_backward", TORCH_BOX(&fastformer::cuda::feed_forward_backward));
}
