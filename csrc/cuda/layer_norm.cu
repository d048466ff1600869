// LayerNorm and RMSNorm over the last dimension of summed = input + residual, forward. Shapes: N rows (all leading
// dimensions together), C columns. A row is held in registers where it fits (rows.cuh), and its mean is taken off
// before anything is squared. A wider one is read once if the shared memory of a block, or on Hopper of a cluster,
// holds it, else what a block's doesn't hold is read twice.
#include <tuple>

#include "layer_norm_forward.cuh"

namespace fastformer::cuda {
namespace {

// --- kernels

template <typename T, typename W, int kPack, int kLanes>
__global__ void __launch_bounds__(Team<kLanes>::kThreads) layer_norm_forward_held(const NormForward<T, W> args) {
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
  store_normed<kPack>(args, values, mean, rstd, args.output + row * args.column_count, 0, columns, team);
}

// --- launcher

// Registers: at most 64 in 16-byte accesses, so that a multiprocessor takes 1024 threads of the held kernels' and their
// loads; 85 in single elements, whose addresses count, and 128, what 512 threads can have, in the looped kernel. A
// thread's weights are therefore read pack by pack as they are used, not all ahead of the stores.
template <typename T, typename W, int kPack>
void launch_forward(const NormForward<T, W>& args, const OnDevice& device) {
  constexpr int kCount = kHeld<kPack>;
  for_team<kCount>(args.row_count, args.column_count, [&]<int kLanes, bool kLooped>(dim3 grid, dim3 block) {
    constexpr int64_t kScratch = Team<kLanes>::kSharedBytes;
    if constexpr (kLooped) {
      Parts parts = parts_of(args.column_count, sizeof(T), device);
      if constexpr (FASTFORMER_HAS_HOPPER) {
        if (parts.blocks > 1) return launch_forward_clusters<T, W, kPack>(args, parts, device);
      }
      if (parts.kept == 0) parts.kept = kept_steps(sizeof(T), kLargeBlock * kCount, device);
      launch(layer_norm_forward_looped<T, W, kPack, kBlock>, grid, block, kScratch + parts.kept * sizeof(T),
             device.stream, args, parts);
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
    const NormForward<T, W> args{
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
