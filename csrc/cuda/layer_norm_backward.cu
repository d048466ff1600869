// LayerNorm and RMSNorm over the last dimension, backward. Shapes: N rows (all leading dimensions together), C columns.
// With normed = (summed - mean) * rstd and scaled = grad_output * weight, the gradient of a row is
//
//     grad_input = rstd * (scaled - mean(scaled) - normed * mean(scaled * normed)) + grad_summed
//
// (without mean(scaled) in RMSNorm), and the weight's and bias's are the sums over rows of grad_output * normed and of
// grad_output. A few blocks a multiprocessor go over the rows, read each input once, and hold a row in registers and
// their sums over rows in registers too, or, of wider rows, in shared memory; a second kernel adds up the blocks' sums.
// Of rows wider still, the sums would not fit beside the row: there a block, or on Hopper a cluster, goes over one row,
// and the second kernel reads grad_output and summed again, each block a few columns of all rows. No atomics: every sum
// is taken in an order that depends on the sizes and the device alone.
#include <algorithm>
#include <tuple>

#include "layer_norm_backward.cuh"
#include "layer_norm_sums.cuh"

namespace fastformer::cuda {
namespace {

// --- kernels

// A thread's columns where registers hold its sums too, and where shared memory does: as many as ptxas gives 128
// registers without spilling.
template <int kPack, bool kInShared>
constexpr int kSummed = kInShared    ? 32
                        : kPack == 1 ? 12
                                     : 16;

template <typename T, typename W, int kPack, int kLanes, bool kInShared>
__global__ void __launch_bounds__(Team<kLanes>::kThreads)
    layer_norm_backward_held(const NormBackward<T, W> args,
                             float* weight_sums,  // [blocks, C]: each block's share of grad_weight; nullptr: not asked
                             float* bias_sums) {  // likewise of grad_bias
  constexpr int kCount = kSummed<kPack, kInShared>;
  Team<kLanes> team;
  const int column_count = static_cast<int>(args.column_count);
  const int64_t rows_a_block = team.kIsBlock ? 1 : blockDim.x / team.size();
  const int64_t team_in_block = team.kIsBlock ? 0 : threadIdx.x / team.size();
  const int used = kInShared ? ((column_count - 1) / (team.size() * kPack) + 1) * kPack : kCount;
  Sums<kCount, kInShared> sums(shared_memory<float>() + Team<kLanes>::kSharedBytes / sizeof(float), used);
  for (int64_t first_row = blockIdx.x * rows_a_block; first_row < args.row_count;
       first_row += gridDim.x * rows_a_block) {
    const int64_t row = first_row + team_in_block;
    const int columns = row < args.row_count ? column_count : 0;
    T grad[kCount], summed[kCount];
    load_row<kPack>(grad, args.grad_output + row * args.grad_output_stride, columns, team);
    load_row<kPack>(summed, args.summed + row * args.summed_stride, columns, team);
    const Statistics of = statistics_of(args, row);
    float products = 0.0f, scaled_sum = 0.0f;
    for_packs<kPack, kCount>(team, columns, [&](int first, int column) {
      float weight[kPack];
      load_vector(weight, args.weight, column, 1.0f);
#pragma unroll
      for (int i = 0; i < kPack; ++i) {
        const float normed = normed_of(summed[first + i], of), scaled = scaled_of(grad[first + i], weight[i]);
        sums.weight(first + i) += to_float(grad[first + i]) * normed;
        sums.bias(first + i) += to_float(grad[first + i]);
        products += scaled * normed;
        scaled_sum += scaled;
      }
    });
    const Means means = means_of(args, products, scaled_sum, team);
    store_grad_input<kPack>(args, grad, summed, of, means, row, 0, columns, team);
  }

  if (weight_sums == nullptr && bias_sums == nullptr) return;
  if constexpr (!Team<kLanes>::kIsBlock) {
    add_teams<kLanes>(sums);
    if (team_in_block > 0) return;
  }
  const int64_t place = blockIdx.x * args.column_count;
  for_packs<kPack, kCount>(team, column_count, [&](int first, int column) {
    float weight[kPack], bias[kPack];
#pragma unroll
    for (int i = 0; i < kPack; ++i) {
      weight[i] = sums.weight(first + i);
      bias[i] = sums.bias(first + i);
    }
    if (weight_sums != nullptr) store_floats<true>(weight_sums + place + column, weight);
    if (bias_sums != nullptr) store_floats<true>(bias_sums + place + column, bias);
  });
}

// A block adds up a few columns of the blocks' sums: kColumnsAdded threads side by side read 32 bytes, what memory
// gives at least.
constexpr int kColumnsAdded = 8, kAddingThreads = 512;

template <typename W>
__global__ void __launch_bounds__(kAddingThreads)
    layer_norm_backward_add(const float* weight_sums,  // [blocks, C] or nullptr
                            const float* bias_sums,    // likewise
                            W* grad_weight,            // [C] or nullptr
                            W* grad_bias,              // likewise
                            int64_t sum_count, int64_t column_count) {
  const int64_t column = static_cast<int64_t>(blockIdx.x) * kColumnsAdded + threadIdx.x % kColumnsAdded;
  Sums<1, false> sums;
  if (column < column_count) {
    for (int64_t i = threadIdx.x / kColumnsAdded; i < sum_count; i += kAddingThreads / kColumnsAdded) {
      if (weight_sums != nullptr) sums.weight(0) += weight_sums[i * column_count + column];
      if (bias_sums != nullptr) sums.bias(0) += bias_sums[i * column_count + column];
    }
  }
  add_teams<kColumnsAdded>(sums);
  if (threadIdx.x >= kColumnsAdded || column >= column_count) return;
  if (grad_weight != nullptr) grad_weight[column] = from_float<W>(sums.weight(0));
  if (grad_bias != nullptr) grad_bias[column] = from_float<W>(sums.bias(0));
}

// grad_weight and grad_bias of kLanes * kPack columns a block. Each team of kLanes threads adds up every so many-th
// row.
constexpr int kColumnThreads = 512;

template <typename T, typename W, int kPack, int kLanes>
__global__ void __launch_bounds__(kColumnThreads)
    layer_norm_backward_columns(const NormBackward<T, W> args,
                                W* grad_weight,  // [C], or nullptr if not asked for
                                W* grad_bias) {  // likewise
  const int64_t column = (static_cast<int64_t>(blockIdx.x) * kLanes + threadIdx.x % kLanes) * kPack;
  Sums<kPack, false> sums;
  if (column < args.column_count) {
#pragma unroll 4
    for (int64_t row = threadIdx.x / kLanes; row < args.row_count; row += kColumnThreads / kLanes) {
      const Pack<T, kPack> grad = load<kPack>(args.grad_output + row * args.grad_output_stride + column);
      const Pack<T, kPack> summed = load<kPack>(args.summed + row * args.summed_stride + column);
      const Statistics of = statistics_of(args, row);
#pragma unroll
      for (int i = 0; i < kPack; ++i) {
        sums.weight(i) += to_float(grad.values[i]) * normed_of(summed.values[i], of);
        sums.bias(i) += to_float(grad.values[i]);
      }
    }
  }
  add_teams<kLanes>(sums);
  if (threadIdx.x >= kLanes || column >= args.column_count) return;
#pragma unroll
  for (int i = 0; i < kPack; ++i) {
    if (grad_weight != nullptr) grad_weight[column + i] = from_float<W>(sums.weight(i));
    if (grad_bias != nullptr) grad_bias[column + i] = from_float<W>(sums.bias(i));
  }
}

// --- launcher

// Threads of all the blocks that go over rows on one multiprocessor: with up to 128 registers each they fill it. More
// blocks would also mean more sums to add up.
constexpr int kThreadsAMultiprocessor = 512;

// What is asked for, and where a kernel puts it.
template <typename W>
struct VectorGrads {
  std::optional<Tensor> weight, bias;

  bool any() const { return weight.has_value() || bias.has_value(); }
  W* to_weight() const { return weight.has_value() ? mutable_pointer<W>(*weight) : nullptr; }
  W* to_bias() const { return bias.has_value() ? mutable_pointer<W>(*bias) : nullptr; }
};

template <typename T, typename W, int kPack, int kLanes, bool kInShared>
void launch_held(const NormBackward<T, W>& args, const VectorGrads<W>& grads, int64_t most_blocks, dim3 block,
                 int64_t shared_bytes, const Tensor& like, const OnDevice& device) {
  const int64_t running = static_cast<int64_t>(device.multiprocessors()) * (kThreadsAMultiprocessor / block.x);
  const int64_t blocks = std::min(most_blocks, running);
  VectorGrads<float> sums;
  const auto new_sums = [&] { return empty_like_sizes(like, {blocks, args.column_count}, ScalarType::Float); };
  if (grads.weight.has_value()) sums.weight = new_sums();
  if (grads.bias.has_value()) sums.bias = new_sums();
  launch(layer_norm_backward_held<T, W, kPack, kLanes, kInShared>, dim3(static_cast<unsigned>(blocks)), block,
         shared_bytes, device.stream, args, sums.to_weight(), sums.to_bias());
  if (!grads.any()) return;
  launch(layer_norm_backward_add<W>, dim3(static_cast<unsigned>(ceil_div(args.column_count, kColumnsAdded))),
         dim3(kAddingThreads), add_teams_bytes(kAddingThreads, 1), device.stream, pointer<float>(sums.weight),
         pointer<float>(sums.bias), grads.to_weight(), grads.to_bias(), blocks, args.column_count);
}

template <typename T, typename W, int kPack>
void launch_grad_input(const NormBackward<T, W>& args, dim3 grid, const OnDevice& device) {
  Parts parts = parts_of(args.column_count, 2 * sizeof(T), device);
  if constexpr (FASTFORMER_HAS_HOPPER) {
    if (parts.blocks > 1) return launch_backward_clusters<T, W, kPack>(args, parts, device);
  }
  if (parts.kept == 0) parts.kept = kept_steps(2 * sizeof(T), kLargeBlock * kHeld<kPack>, device);
  launch(layer_norm_backward_looped<T, W, kPack, kBlock>, grid, dim3(kLargeBlock),
         Team<kBlock>::kSharedBytes + 2 * parts.kept * sizeof(T), device.stream, args, parts);
}

template <typename T, typename W, int kPack>
void launch_looped(const NormBackward<T, W>& args, const VectorGrads<W>& grads, dim3 grid, const OnDevice& device) {
  launch_grad_input<T, W, kPack>(args, grid, device);
  if (!grads.any()) return;
  // 128 bytes of a row side by side, or as many single elements as a warp has lanes.
  constexpr int kLanesAcross = kPack == 1 ? kWarp : 8;
  const dim3 columns(static_cast<unsigned>(ceil_div(args.column_count, kLanesAcross * kPack)));
  launch(layer_norm_backward_columns<T, W, kPack, kLanesAcross>, columns, dim3(kColumnThreads),
         add_teams_bytes(kColumnThreads, kPack), device.stream, args, grads.to_weight(), grads.to_bias());
}

template <typename T, typename W, int kPack>
void launch_backward(const NormBackward<T, W>& args, const VectorGrads<W>& grads, const Tensor& like,
                     const OnDevice& device) {
  constexpr int kCount = kSummed<kPack, false>, kWideCount = kSummed<kPack, true>;
  for_team<kCount>(args.row_count, args.column_count, [&]<int kLanes, bool kLooped>(dim3 grid, dim3 block) {
    constexpr int64_t kScratch = Team<kLanes>::kSharedBytes;
    if constexpr (!kLooped) {
      const int64_t shared_bytes = kLanes == kBlock ? kScratch : grads.any() ? add_teams_bytes(block.x, kCount) : 0;
      launch_held<T, W, kPack, kLanes, false>(args, grads, grid.x, block, shared_bytes, like, device);
    } else {
      const int64_t used = ceil_div(args.column_count, kLargeBlock * kPack) * kPack;
      const int64_t shared_bytes = Team<kLargeBlock>::kSharedBytes + used * 2 * kLargeBlock * sizeof(float);
      if (grads.any() && used <= kWideCount && shared_bytes <= device.shared_memory_limit()) {
        return launch_held<T, W, kPack, kLargeBlock, true>(args, grads, args.row_count, dim3(kLargeBlock), shared_bytes,
                                                           like, device);
      }
      launch_looped<T, W, kPack>(args, grads, grid, device);
    }
  });
}

// --- operator

std::tuple<Tensor, Tensor, Tensor> layer_norm_backward(const Tensor& grad_output,
                                                       const std::optional<Tensor>& grad_summed, const Tensor& summed,
                                                       const std::optional<Tensor>& weight, const Tensor& mean,
                                                       const Tensor& rstd, bool has_bias, bool rms) {
  const OnDevice device(summed);
  STD_TORCH_CHECK(summed.dim() >= 1, "summed must have at least one dimension");
  const DType dtype = dtype_of(summed, "summed");
  const int64_t row_count = rows_of(summed, "summed"), column_count = summed.size(summed.dim() - 1);
  const auto check_like = [&](const Tensor& tensor, const char* name) {
    check_device(tensor, name, summed, "summed");
    STD_TORCH_CHECK(same_sizes(tensor, summed), name, " must have the shape of summed");
    STD_TORCH_CHECK(tensor.scalar_type() == summed.scalar_type(), name, " must have the dtype of summed");
  };
  check_like(grad_output, "grad_output");
  if (grad_summed.has_value()) check_like(*grad_summed, "grad_summed");
  check_row_vector(weight, "weight", summed, "summed");
  check_device(rstd, "rstd", summed, "summed");
  STD_TORCH_CHECK(rstd.numel() == row_count && (rms || mean.numel() == row_count),
                  "mean and rstd must have an element a row");
  STD_TORCH_CHECK(rstd.scalar_type() == ScalarType::Float && (rms || mean.scalar_type() == ScalarType::Float),
                  "mean and rstd must be float32");
  if (!rms) check_device(mean, "mean", summed, "summed");

  const bool has_weight = weight.has_value();
  const ScalarType wanted_type = has_weight ? weight->scalar_type() : summed.scalar_type();
  const Tensor grad_input = empty_of_sizes(summed);
  if (summed.numel() == 0) {
    return {grad_input, has_weight ? zeros(summed, column_count, wanted_type) : no_result(summed),
            has_bias ? zeros(summed, column_count, wanted_type) : no_result(summed)};
  }
  const bool alike = wanted_type == summed.scalar_type();
  const ScalarType vector_type = alike ? wanted_type : ScalarType::Float;
  const auto vector_result = [&](bool asked) {
    return asked ? std::optional<Tensor>(empty_like_sizes(summed, {column_count}, vector_type)) : std::nullopt;
  };
  const std::optional<Tensor> grad_weight = vector_result(has_weight), grad_bias = vector_result(has_bias);

  const Rows grad_rows = as_rows(grad_output), rows = as_rows(summed);
  std::optional<Rows> added_rows;
  if (grad_summed.has_value()) added_rows = as_rows(*grad_summed);
  const bool widest = takes_widest(grad_rows) && takes_widest(rows) && (!added_rows || takes_widest(*added_rows));
  const std::optional<Tensor> w = row_vector(weight, vector_type, widest, "weight");
  const Tensor row_mean = as_contiguous(mean), row_rstd = as_contiguous(rstd);
  for_dtypes(dtype, alike ? dtype : DType::float32, [&]<typename T, typename W>() {
    const NormBackward<T, W> args{
        .grad_output = pointer<T>(grad_rows.tensor),
        .grad_summed = added_rows.has_value() ? pointer<T>(added_rows->tensor) : nullptr,
        .summed = pointer<T>(rows.tensor),
        .weight = pointer<W>(w),
        .mean = rms ? nullptr : pointer<float>(row_mean),
        .rstd = pointer<float>(row_rstd),
        .grad_input = mutable_pointer<T>(grad_input),
        .row_count = row_count,
        .column_count = column_count,
        .grad_output_stride = grad_rows.stride,
        .grad_summed_stride = added_rows.has_value() ? added_rows->stride : 0,
        .summed_stride = rows.stride,
    };
    const VectorGrads<W> grads{grad_weight, grad_bias};
    widest ? launch_backward<T, W, kWidest<T>>(args, grads, summed, device)
           : launch_backward<T, W, 1>(args, grads, summed, device);
  });
  const auto in_wanted_type = [&](const std::optional<Tensor>& result) {
    if (!result.has_value()) return no_result(summed);
    return vector_type == wanted_type ? *result : torch::stable::to(*result, wanted_type);
  };
  return {grad_input, in_wanted_type(grad_weight), in_wanted_type(grad_bias)};
}

}  // namespace
}  // namespace fastformer::cuda

FASTFORMER_CUDA_LIBRARY(m) { m.impl("layer_norm_backward", TORCH_BOX(&fastformer::cuda::layer_norm_backward)); }
