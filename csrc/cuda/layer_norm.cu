// LayerNorm and RMSNorm over the last dimension of summed = input + residual, forward. Shapes: N rows (all leading
// dimensions together), C columns. A row is held in registers where it fits (rows.cuh), and its mean is taken off
// before anything is squared. A wider one is read once if shared memory holds it, else what it doesn't hold is read
// twice.
#include <tuple>

#include "layer_norm.cuh"

namespace fastformer::cuda {
namespace {

// --- kernels

template <typename T, typename W>
struct Forward {
  const T* input;           // [N, C], unit stride
  const T* residual;        // likewise, or nullptr
  const W* weight;          // [C] or nullptr
  const W* bias;            // [C] or nullptr
  T* output;                // [N, C], contiguous
  T* summed;                // [N, C], contiguous; nullptr without residual
  float* mean;              // [N]; nullptr if RMS
  float* rstd;              // [N]
  int64_t row_count;        // N
  int64_t column_count;     // C
  int64_t input_stride;     // from row to row
  int64_t residual_stride;  // likewise
  float eps;
};

// input + residual as it is stored in `summed`, from column `start` on; 0 where a column doesn't exist.
template <int kPack, typename T, typename W, int kCount, int kLanes>
FASTFORMER_DEVICE void load_summed(T (&values)[kCount], const Forward<T, W>& args, int64_t row, int64_t start,
                                   int columns, const Team<kLanes>& team) {
  load_row<kPack>(values, args.input + row * args.input_stride + start, columns, team);
  if (args.residual == nullptr) return;
  T added[kCount];
  load_row<kPack>(added, args.residual + row * args.residual_stride + start, columns, team);
#pragma unroll
  for (int i = 0; i < kCount; ++i) values[i] = from_float<T>(to_float(values[i]) + to_float(added[i]));
}

template <typename T, int kCount>
FASTFORMER_DEVICE float sum_of(const T (&values)[kCount]) {
  float total = 0.0f;
#pragma unroll
  for (int i = 0; i < kCount; ++i) total += to_float(values[i]);
  return total;
}

// The sum of squared distances from `centre`, over the columns that exist.
template <int kPack, typename T, int kCount, int kLanes>
FASTFORMER_DEVICE float squares_around(float centre, const T (&values)[kCount], int columns, const Team<kLanes>& team) {
  float squares = 0.0f;
  for_packs<kPack, kCount>(team, columns, [&](int first, int) {
#pragma unroll
    for (int i = 0; i < kPack; ++i) {
      const float distance = to_float(values[first + i]) - centre;
      squares += distance * distance;
    }
  });
  return squares;
}

// By how much a mean was rounded, times the number of values: in a row of nearly equal values that is more than they
// differ ("the corrected two-pass algorithm": Chan, Golub and LeVeque, "Algorithms for computing the sample variance",
// 1983).
template <int kPack, typename T, int kCount, int kLanes>
FASTFORMER_DEVICE float sum_around(float centre, const T (&values)[kCount], int columns, const Team<kLanes>& team) {
  float total = 0.0f;
  for_packs<kPack, kCount>(team, columns, [&](int first, int) {
#pragma unroll
    for (int i = 0; i < kPack; ++i) total += to_float(values[first + i]) - centre;
  });
  return total;
}

template <int kPack, typename T, typename W, int kCount, int kLanes>
FASTFORMER_DEVICE void store_normed(const Forward<T, W>& args, const T (&values)[kCount], float mean, float rstd,
                                    int64_t row, int64_t start, int columns, const Team<kLanes>& team) {
  T* output = args.output + row * args.column_count + start;
  for_packs<kPack, kCount>(team, columns, [&](int first, int column) {
    float weight[kPack], bias[kPack];
    load_vector(weight, args.weight, start + column, 1.0f);
    load_vector(bias, args.bias, start + column, 0.0f);
    Pack<T, kPack> pack;
#pragma unroll
    for (int i = 0; i < kPack; ++i) {
      pack.values[i] = from_float<T>((to_float(values[first + i]) - mean) * rstd * weight[i] + bias[i]);
    }
    store(output + column, pack);
  });
}

template <typename T, typename W>
FASTFORMER_DEVICE void store_statistics(const Forward<T, W>& args, int64_t row, float mean, float rstd) {
  if (args.mean != nullptr) args.mean[row] = mean;
  args.rstd[row] = rstd;
}

template <typename T, typename W, int kPack, int kLanes>
__global__ void __launch_bounds__(Team<kLanes>::kThreads) layer_norm_forward_held(const Forward<T, W> args) {
  Team<kLanes> team;
  const int64_t row = team.row();
  const int columns = row < args.row_count ? static_cast<int>(args.column_count) : 0;
  const float count = static_cast<float>(args.column_count);
  T values[kHeld<kPack>];
  load_summed<kPack>(values, args, row, 0, columns, team);
  if (args.summed != nullptr) store_row<kPack>(args.summed + row * args.column_count, values, columns, team);
  float mean = args.mean == nullptr ? 0.0f : team.sum(sum_of(values)) / count;
  if (args.mean != nullptr) mean += team.sum(sum_around<kPack>(mean, values, columns, team)) / count;
  const float squares = team.sum(squares_around<kPack>(mean, values, columns, team));
  const float rstd = rsqrtf(squares / count + args.eps);
  if (columns > 0 && team.rank() == 0) store_statistics(args, row, mean, rstd);
  store_normed<kPack>(args, values, mean, rstd, row, 0, columns, team);
}

// kept_columns: how many of a row's first columns shared memory has room for, whole steps of the loop or all of them.
template <typename T, typename W, int kPack>
__global__ void __launch_bounds__(kLargeBlock)
    layer_norm_forward_looped(const Forward<T, W> args, int64_t kept_columns) {
  constexpr int kCount = kHeld<kPack>;
  Team<kBlock> team;
  const int64_t row = team.row();
  const int step = team.size() * kCount;
  T* kept = shared_memory<T>() + Team<kBlock>::kSharedBytes / sizeof(T);
  T values[kCount];

  // The mean of this thread's columns and the sum of their squared distances from it: those of each step joined to
  // those of the steps before (Chan, Golub and LeVeque, "Updating formulae and a pairwise algorithm for computing
  // sample variances", 1979).
  float own_mean = 0.0f, own_squares = 0.0f, own_count = 0.0f;
  for (int64_t start = 0; start < args.column_count; start += step) {
    const int columns = at_most(step, args.column_count - start);
    load_summed<kPack>(values, args, row, start, columns, team);
    if (args.summed != nullptr) {
      store_row<kPack>(args.summed + row * args.column_count + start, values, columns, team);
    }
    if (start < kept_columns) store_row<kPack>(kept + start, values, columns, team);
    float count = 0.0f;
    for_packs<kPack, kCount>(team, columns, [&](int, int) { count += kPack; });
    if (count == 0.0f) break;
    float mean = args.mean == nullptr ? 0.0f : sum_of(values) / count;
    if (args.mean != nullptr) mean += sum_around<kPack>(mean, values, columns, team) / count;
    const float distance = mean - own_mean, share = count / (own_count + count);
    own_mean += distance * share;
    own_squares += distance * distance * own_count * share + squares_around<kPack>(mean, values, columns, team);
    own_count += count;
  }
  // All threads' likewise, around the mean of them all.
  const float count = static_cast<float>(args.column_count);
  float mean = args.mean == nullptr ? 0.0f : team.sum(own_mean * own_count) / count;
  if (args.mean != nullptr) mean += team.sum((own_mean - mean) * own_count) / count;
  const float distance = own_mean - mean;
  const float rstd = rsqrtf(team.sum(own_squares + distance * distance * own_count) / count + args.eps);
  if (team.rank() == 0) store_statistics(args, row, mean, rstd);

  // A thread reads of `kept` what it wrote itself, so no barrier is needed. Last columns first: of those that are read
  // again they are the likeliest to be in the L2 cache still.
  for (int64_t start = (args.column_count - 1) / step * step; start >= 0; start -= step) {
    const int columns = at_most(step, args.column_count - start);
    if (start < kept_columns) {
      load_row<kPack>(values, kept + start, columns, team);
    } else {
      load_summed<kPack>(values, args, row, start, columns, team);
    }
    store_normed<kPack>(args, values, mean, rstd, row, start, columns, team);
  }
}

// --- launcher

// Registers: at most 64 in 16-byte accesses, so that a multiprocessor takes 1024 threads of the held kernels' and their
// loads; 85 in single elements, whose addresses count, and 128, what 512 threads can have, in the looped kernel. A
// thread's weights are therefore read pack by pack as they are used, not all ahead of the stores.
template <typename T, typename W, int kPack>
void launch_forward(const Forward<T, W>& args, const OnDevice& device) {
  constexpr int kCount = kHeld<kPack>;
  for_team<kCount>(args.row_count, args.column_count, [&]<int kLanes, bool kLooped>(dim3 grid, dim3 block) {
    constexpr int64_t kScratch = Team<kLanes>::kSharedBytes;
    if constexpr (kLooped) {
      const int64_t room = (device.shared_memory_limit() - kScratch) / static_cast<int64_t>(sizeof(T));
      const int64_t step = static_cast<int64_t>(block.x) * kCount;
      const int64_t kept = args.column_count <= room ? args.column_count : room / step * step;
      launch(layer_norm_forward_looped<T, W, kPack>, grid, block, kScratch + kept * sizeof(T), device.stream, args,
             kept);
    } else {
      launch(layer_norm_forward_held<T, W, kPack, kLanes>, grid, block, kScratch, device.stream, args);
    }
  });
}

// --- operator

std::tuple<Tensor, Tensor, Tensor, Tensor> layer_norm_forward(const Tensor& input,
                                                              const std::optional<Tensor>& residual,
                                                              const std::optional<Tensor>& weight,
                                                              const std::optional<Tensor>& bias, double eps, bool rms) {
  const OnDevice device(input);
  STD_TORCH_CHECK(input.dim() >= 1, "input must have at least one dimension");
  const DType dtype = dtype_of(input, "input");
  check_row_vector(weight, "weight", input, "input");
  check_row_vector(bias, "bias", input, "input");
  if (residual.has_value()) {
    check_device(*residual, "residual", input, "input");
    STD_TORCH_CHECK(same_sizes(*residual, input), "residual must have the shape of input");
    STD_TORCH_CHECK(residual->scalar_type() == input.scalar_type(), "residual must have the dtype of input");
  }
  const int64_t row_count = rows_of(input, "input");
  const Tensor output = empty_of_sizes(input), summed = residual.has_value() ? empty_of_sizes(input) : no_result(input);
  if (input.numel() == 0) {
    return {output, summed, zeros(input, rms ? 0 : row_count, ScalarType::Float),
            zeros(input, row_count, ScalarType::Float)};
  }
  const Tensor mean = empty_like_sizes(input, {rms ? 0 : row_count}, ScalarType::Float);
  const Tensor rstd = empty_like_sizes(input, {row_count}, ScalarType::Float);

  const Rows rows = as_rows(input);
  std::optional<Rows> residual_rows;
  if (residual.has_value()) residual_rows = as_rows(*residual);
  const auto in_rows_dtype = [&](const std::optional<Tensor>& vector) {
    return !vector.has_value() || vector->scalar_type() == input.scalar_type();
  };
  const bool all_alike = in_rows_dtype(weight) && in_rows_dtype(bias);
  const ScalarType vector_type = all_alike ? input.scalar_type() : ScalarType::Float;
  const bool widest = takes_widest(rows) && (!residual_rows || takes_widest(*residual_rows));
  const std::optional<Tensor> w = row_vector(weight, vector_type, widest, "weight");
  const std::optional<Tensor> b = row_vector(bias, vector_type, widest, "bias");
  for_dtypes(dtype, all_alike ? dtype : DType::float32, [&]<typename T, typename W>() {
    const Forward<T, W> args{
        .input = pointer<T>(rows.tensor),
        .residual = residual_rows.has_value() ? pointer<T>(residual_rows->tensor) : nullptr,
        .weight = pointer<W>(w),
        .bias = pointer<W>(b),
        .output = mutable_pointer<T>(output),
        .summed = residual.has_value() ? mutable_pointer<T>(summed) : nullptr,
        .mean = rms ? nullptr : mutable_pointer<float>(mean),
        .rstd = mutable_pointer<float>(rstd),
        .row_count = row_count,
        .column_count = rows.columns,
        .input_stride = rows.stride,
        .residual_stride = residual_rows.has_value() ? residual_rows->stride : 0,
        .eps = static_cast<float>(eps),
    };
    widest ? launch_forward<T, W, kWidest<T>>(args, device) : launch_forward<T, W, 1>(args, device);
  });
  return {output, summed, mean, rstd};
}

}  // namespace
}  // namespace fastformer::cuda

FASTFORMER_CUDA_LIBRARY(m) { m.impl("layer_norm_forward", TORCH_BOX(&fastformer::cuda::layer_norm_forward)); }
