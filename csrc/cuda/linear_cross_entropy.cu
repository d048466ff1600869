// Cross-entropy of logits = input weight^T + bias, which are never all in memory, forward and backward. Matrices of
// 16-bit elements whose rows take 16-byte accesses go to linear_cross_entropy_fused.cu. For others the products are the
// library's, into a buffer of bounded size; the losses, and the gradients in the logits' place, are here.
//
// Shapes: N rows, C columns, V vocabulary.
#include <tuple>

#include "linear_cross_entropy.cuh"

namespace fastformer::cuda {
namespace {

// --- kernels: a block takes a row

constexpr int kThreads = 256;  // of a block, at most
// Of blocks on a multiprocessor: 128 registers a thread, for four accesses in flight and their 32 logits; while one
// waits at a barrier another works.
constexpr int kLeastBlocks = 2;

// This thread's columns of a row in the buffer from `start` on, -inf from `columns` on, and the sum of those that
// exist.
template <typename T>
FASTFORMER_DEVICE float load_logits(float (&logits)[kHeld<kWidest<T>>], const T* row, int64_t start, int64_t columns,
                                    const Team<kBlock>& team) {
  float sum = 0.0f;
#pragma unroll
  for (int p = 0; p < kHeld<kWidest<T>>; p += kWidest<T>) {
    const int64_t column = start + team.column<kWidest<T>>(p / kWidest<T>);
    Pack<T, kWidest<T>> pack{};
    if (column < columns) pack = load<kWidest<T>>(row + column);  // the row's padding with it
#pragma unroll
    for (int i = 0; i < kWidest<T>; ++i) {
      const bool exists = column + i < columns;
      logits[p + i] = exists ? to_float(pack.values[i]) : -INFINITY;
      sum += exists ? logits[p + i] : 0.0f;
    }
  }
  return sum;
}

// Of the logits in a row of the buffer; its columns are those of the vocabulary from `first` on. A barrier lies between
// its reads and its end.
template <typename T>
FASTFORMER_DEVICE LossStatistics statistics_of(const T* row, int64_t columns, int64_t first, int64_t label,
                                               Team<kBlock>& team) {
  const bool has_label = label >= first && label < first + columns;
  LossStatistics result{-INFINITY, 0.0f, has_label ? to_float(row[label - first]) : 0.0f, 0.0f};
  const int64_t step = static_cast<int64_t>(team.size()) * kHeld<kWidest<T>>;
  float logits[kHeld<kWidest<T>>];
  for (int64_t start = 0; start < columns; start += step) {
    result.sum += load_logits(logits, row, start, columns, team);
    float peak = result.peak;
#pragma unroll
    for (int i = 0; i < kHeld<kWidest<T>>; ++i) peak = fmaxf(peak, logits[i]);
    const float shift = finite(peak);
    result.total *= exp_below(result.peak, shift);
#pragma unroll
    for (int i = 0; i < kHeld<kWidest<T>>; ++i) result.total += exp_below(logits[i], shift);
    result.peak = peak;
  }
  result.join_over(team);
  return result;
}

template <typename T>
__global__ void __launch_bounds__(kThreads, kLeastBlocks)
    linear_cross_entropy_loss(const T* logits,          // [rows, columns], rows `stride` apart, a multiple of 16 bytes
                              const int64_t* target,    // [rows]
                              const float* row_weight,  // [rows]: a factor of the loss; or null
                              LossStatistics* running,  // [rows]: of the columns before `first`
                              float* losses,            // [rows]
                              float* lse,               // [rows]
                              int64_t columns, int64_t stride, int64_t first, const Loss loss) {
  Team<kBlock> team;
  const int64_t row = team.row(), label = target[row];
  LossStatistics statistics = statistics_of(logits + row * stride, columns, first, label, team);
  if (team.rank() != 0) return;
  if (first > 0) statistics.join(running[row]);
  if (first + columns < loss.vocabulary) {
    running[row] = statistics;
  } else {
    losses[row] = loss.of(statistics, label) * (row_weight == nullptr ? 1.0f : row_weight[row]);
    lse[row] = statistics.lse();
  }
}

template <typename T>
__global__ void __launch_bounds__(kThreads, kLeastBlocks)
    linear_cross_entropy_gradient(T* logits,              // [rows, columns], as above; their gradient takes their place
                                  const int64_t* target,  // [rows]
                                  const float* row_grad,  // [rows]: the gradient by the row's loss
                                  float* losses,          // [rows]: times row_grad; or null
                                  float* lse,             // [rows]; null where losses is
                                  int64_t stride, const Loss loss) {
  Team<kBlock> team;
  const int64_t index = team.row(), label = target[index], columns = loss.vocabulary;
  T* row = logits + index * stride;
  const float grad = row_grad[index];
  const LossStatistics statistics = statistics_of(row, columns, 0, label, team);
  if (losses != nullptr && team.rank() == 0) {
    losses[index] = loss.of(statistics, label) * grad;
    lse[index] = statistics.lse();
  }
  const float shift = finite(statistics.peak), inverse = 1.0f / statistics.total;
  const float spread = loss.smoothing / columns, at_label = 1.0f - loss.smoothing;
  const int64_t step = static_cast<int64_t>(team.size()) * kHeld<kWidest<T>>;
  float values[kHeld<kWidest<T>>];
  for (int64_t start = 0; start < columns; start += step) {
    load_logits(values, row, start, columns, team);
#pragma unroll
    for (int p = 0; p < kHeld<kWidest<T>>; p += kWidest<T>) {
      const int64_t column = start + team.column<kWidest<T>>(p / kWidest<T>);
      if (column >= columns) continue;
      Pack<T, kWidest<T>> pack;
#pragma unroll
      for (int i = 0; i < kWidest<T>; ++i) {
        float value = exp_below(values[p + i], shift) * inverse - spread;
        if (column + i == label) value -= at_label;
        pack.values[i] = from_float<T>(loss.keeps(label) ? grad * value : 0.0f);
      }
      store_global(row + column, pack);
    }
  }
}

// The gradient by weight, a sum over chunks of rows in float32, gets one chunk's product; the last one ends it.
template <typename T, int kPack>
__global__ void __launch_bounds__(kSmallBlock)
    linear_cross_entropy_add(const T* part,  // [elements], a multiple of kPack
                             float* total,   // [elements]
                             T* result,      // [elements]; null for all parts but the last
                             int64_t elements, bool is_first) {
  constexpr int kFloats = kPack < kWidest<float> ? kPack : kWidest<float>;
  const int64_t step = static_cast<int64_t>(gridDim.x) * blockDim.x * kPack;
  for (int64_t i = (static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x) * kPack; i < elements; i += step) {
    const Pack<T, kPack> added = load<kPack>(part + i);
    Pack<T, kPack> rounded;
#pragma unroll
    for (int j = 0; j < kPack; j += kFloats) {
      Pack<float, kFloats> sum{};
      if (!is_first) sum = load<kFloats>(total + i + j);
#pragma unroll
      for (int k = 0; k < kFloats; ++k) {
        sum.values[k] += to_float(added.values[j + k]);
        rounded.values[j + k] = from_float<T>(sum.values[k]);
      }
      if (result == nullptr) store(total + i + j, sum);
    }
    if (result != nullptr) store_global(result + i, rounded);
  }
}

// --- launchers

// A thread for each kHeld logits, and a whole number of warps.
template <typename T>
dim3 block_of(int64_t columns) {
  const int64_t warps = ceil_div(columns, kHeld<kWidest<T>> * kWarp);
  return dim3(std::clamp(warps, int64_t{1}, int64_t{kThreads / kWarp}) * kWarp);
}

// Logits are held for a block of rows by columns of the vocabulary: about kBufferBytes of them. Where the vocabulary
// has to be taken in parts, of kLossRows rows, so that a product reads few operands for its sums.
#ifdef FASTFORMER_SIMT
constexpr int64_t kLossRows = 8;
#else
constexpr int64_t kLossRows = 2048;
#endif
// Rows in the buffer begin at multiples of so many elements, for the widest accesses.
constexpr int64_t kRowAlignment = 64;

int64_t aligned(int64_t columns) { return ceil_div(columns, kRowAlignment) * kRowAlignment; }

struct Chunks {
  int64_t rows, columns;  // of one
};

// A loss needs no row as a whole.
Chunks chunks_for_losses(int64_t N, int64_t V, int64_t element_size) {
  const int64_t rows = std::clamp(N, int64_t{1}, std::max(kLossRows, fitting(kBufferBytes, V, element_size)));
  const int64_t columns = even(V, fitting(kBufferBytes, rows, element_size));
  return {even(N, rows), std::min(aligned(columns), V)};
}

// Gradients do, and each chunk passes over the float32 sums of weight's gradient, 12 bytes an element: with 1000 rows
// that takes as long as the product (2 * 1000 FLOPs an element; 4 TB/s, 700 TFLOP/s). So the buffer may also get as
// large as weight, of whose gradient there are two copies anyway.
int64_t rows_for_gradients(int64_t N, int64_t C, int64_t V, int64_t element_size) {
  return even(N, std::max(fitting(kBufferBytes, V, element_size), C));
}

template <typename T>
void launch_add(const Tensor& part, const Tensor& total, const std::optional<Tensor>& result, bool is_first,
                const OnDevice& device) {
  const int64_t elements = part.numel();
  if (elements == 0) return;
  const auto run = [&]<int kPack>() {
    const int64_t blocks = std::min(ceil_div(elements, kSmallBlock * kPack), int64_t{16} * device.multiprocessors());
    launch(linear_cross_entropy_add<T, kPack>, dim3(blocks), dim3(kSmallBlock), 0, device.stream, pointer<T>(part),
           mutable_pointer<float>(total), mutable_pointer<T>(result), elements, is_first);
  };
  elements % kWidest<T> == 0 ? run.template operator()<kWidest<T>>() : run.template operator()<1>();
}

// --- operators

Tensor new_buffer(const Tensor& input, int64_t rows, int64_t columns) {
  return empty_like_sizes(input, {rows, aligned(columns)}, input.scalar_type());
}

// The logits of the rows of x, from column `first` of the vocabulary on.
void multiply(const LossArguments& args, const Tensor& logits, const Tensor& x, int64_t first) {
  const int64_t columns = logits.size(1);
  std::optional<Tensor> added;
  if (args.bias.has_value()) added = narrow(*args.bias, 0, first, columns);
  library_linear(logits, x, narrow(args.weight, 0, first, columns), added);
}

// Writes losses, times row_weight if there is one, and lse.
void compute_losses(const LossArguments& args, const Tensor& losses, const Tensor& lse, const OnDevice& device) {
  const int64_t N = args.input.size(0), V = args.weight.size(0);
  const Chunks most = chunks_for_losses(N, V, args.input.element_size());
  const Tensor buffer = new_buffer(args.input, most.rows, most.columns);
  const Tensor running = empty_like_sizes(args.input, {most.rows, 4}, ScalarType::Float);
  for (int64_t begin = 0; begin < N; begin += most.rows) {
    const int64_t rows = std::min(most.rows, N - begin);
    const Tensor x = narrow(args.input, 0, begin, rows);
    int64_t first = 0;
    do {
      const int64_t columns = std::min(most.columns, V - first);
      multiply(args, narrow(narrow(buffer, 0, 0, rows), 1, 0, columns), x, first);
      for_dtype(args.dtype, [&]<typename T>() {
        const float* row_weight = pointer<float>(args.row_weight);
        launch(linear_cross_entropy_loss<T>, dim3(rows), block_of<T>(columns), Team<kBlock>::kSharedBytes,
               device.stream, pointer<T>(buffer), pointer<int64_t>(args.target) + begin,
               row_weight == nullptr ? nullptr : row_weight + begin, mutable_pointer<LossStatistics>(running),
               mutable_pointer<float>(losses) + begin, mutable_pointer<float>(lse) + begin, columns, buffer.stride(0),
               first, args.loss);
      });
      first += columns;
    } while (first < V);
  }
}

// The gradients of the sum of row_weight * loss. Writes losses and lse like compute_losses, if they are asked for.
LossGradients compute_gradients(const LossArguments& args, const std::optional<Tensor>& losses,
                                const std::optional<Tensor>& lse, const OnDevice& device) {
  const int64_t N = args.input.size(0), C = args.input.size(1), V = args.weight.size(0);
  const ScalarType dtype = args.input.scalar_type();
  const int64_t most = rows_for_gradients(N, C, V, args.input.element_size());
  const int64_t chunks = ceil_div(N, most);
  const Tensor buffer = new_buffer(args.input, most, V);
  const Tensor grad_input = empty_like_sizes(args.input, {N, C}, dtype);
  const Tensor grad_weight =
      chunks > 0 ? empty_like_sizes(args.input, {V, C}, dtype) : torch::stable::new_zeros(args.input, {V, C});
  const Tensor bias_sums = empty_like_sizes(args.input, {chunks, args.bias.has_value() ? V : 0}, ScalarType::Float);
  // In half precision each chunk's product is `part`, and their sum is in float32.
  const bool adds_parts = chunks > 1 && dtype != ScalarType::Float;
  const std::vector<int64_t> part_sizes = {adds_parts ? V : 0, C};
  const Tensor part = empty_like_sizes(args.input, part_sizes, dtype);
  const Tensor total = empty_like_sizes(args.input, part_sizes, ScalarType::Float);
  for (int64_t chunk = 0; chunk < chunks; ++chunk) {
    const int64_t begin = chunk * most, rows = std::min(most, N - begin);
    const bool is_first = chunk == 0, is_last = chunk + 1 == chunks;
    const Tensor x = narrow(args.input, 0, begin, rows);
    const Tensor logits = narrow(narrow(buffer, 0, 0, rows), 1, 0, V);
    multiply(args, logits, x, 0);
    for_dtype(args.dtype, [&]<typename T>() {
      launch(linear_cross_entropy_gradient<T>, dim3(rows), block_of<T>(V), Team<kBlock>::kSharedBytes, device.stream,
             mutable_pointer<T>(buffer), pointer<int64_t>(args.target) + begin, pointer<float>(args.row_weight) + begin,
             losses.has_value() ? mutable_pointer<float>(*losses) + begin : nullptr,
             lse.has_value() ? mutable_pointer<float>(*lse) + begin : nullptr, buffer.stride(0), args.loss);
    });
    library_product(narrow(grad_input, 0, begin, rows), logits, args.weight);
    if (adds_parts) {
      library_product(part, transposed(logits), x);
      const std::optional<Tensor> result = is_last ? std::optional<Tensor>(grad_weight) : std::nullopt;
      for_dtype(args.dtype, [&]<typename T>() {
        if constexpr (!__is_same(T, float)) launch_add<T>(part, total, result, is_first, device);
      });
    } else if (is_first) {
      library_product(grad_weight, transposed(logits), x);
    } else {
      library_product_add(grad_weight, grad_weight, transposed(logits), x);
    }
    if (args.bias.has_value()) sum_of_rows(narrow(bias_sums, 0, chunk, 1), logits);
  }
  return {grad_input, grad_weight, args.bias.has_value() ? sum_of_rows(bias_sums, dtype) : no_result(args.input)};
}

bool is_fused(const LossArguments& args) {
  const auto fits = [](int64_t width) { return width > 0 && width % 8 == 0; };
  return args.dtype != DType::float32 && args.input.size(0) > 0 && fits(args.input.size(1)) &&
         fits(args.weight.size(0));
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> linear_cross_entropy_forward(
    const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias, const Tensor& target,
    const std::optional<Tensor>& row_weight, int64_t ignore_index, double label_smoothing, bool save_grads) {
  const OnDevice device(input);
  const LossArguments args(input, weight, bias, target, row_weight, "row_weight", ignore_index, label_smoothing);
  STD_TORCH_CHECK(!save_grads || row_weight.has_value(), "save_grads needs row_weight");
  const Tensor losses = empty_like_sizes(input, {input.size(0)}, ScalarType::Float);
  const Tensor lse = empty_like_sizes(input, {input.size(0)}, ScalarType::Float);
  LossGradients gradients{no_result(input), no_result(input), no_result(input)};
  const bool fused = is_fused(args);
  if (save_grads) {
    gradients =
        fused ? compute_gradients_fused(args, losses, lse, device) : compute_gradients(args, losses, lse, device);
  } else {
    fused ? compute_losses_fused(args, losses, lse, device) : compute_losses(args, losses, lse, device);
  }
  return {row_weight.has_value() ? torch::stable::sum(losses) : losses, lse, gradients.input, gradients.weight,
          gradients.bias};
}

// The library's products leave lse unread: each row's greatest logit shifts the exponentials with less rounding, and is
// found with their sum.
std::tuple<Tensor, Tensor, Tensor> linear_cross_entropy_backward(const Tensor& grad_losses, const Tensor& input,
                                                                 const Tensor& weight,
                                                                 const std::optional<Tensor>& bias,
                                                                 const Tensor& target, const Tensor& lse,
                                                                 int64_t ignore_index, double label_smoothing) {
  const OnDevice device(input);
  const LossArguments args(input, weight, bias, target, grad_losses, "grad_losses", ignore_index, label_smoothing);
  check_row_values(lse, "lse", input.size(0));
  check_device(lse, "lse", input, "input");
  const LossGradients gradients = is_fused(args)
                                      ? compute_gradients_fused(args, std::nullopt, as_contiguous(lse), device)
                                      : compute_gradients(args, std::nullopt, std::nullopt, device);
  return {gradients.input, gradients.weight, gradients.bias};
}

}  // namespace
}  // namespace fastformer::cuda

FASTFORMER_CUDA_LIBRARY(m) {
  m.impl("linear_cross_entropy_forward", TORCH_BOX(&fastformer::cuda::linear_cross_entropy_forward));
  m.impl("linear_cross_entropy_backward", TORCH_BOX(&fastformer::cuda::linear_cross_entropy_backward));
}
