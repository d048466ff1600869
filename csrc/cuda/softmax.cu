// Softmax over the last dimension, forward and backward: softmax(scale * input + mask). Shapes: N rows (all leading
// dimensions together), C columns. A row is held in registers where it fits (rows.cuh). A wider one is read once if the
// shared memory of a block, or on Hopper of a cluster, holds it, else twice, the first time for its maximum and its sum
// together (Milakov and Gimelshein, "Online normalizer calculation for softmax", 2018).
#include <algorithm>

#include "softmax.cuh"

namespace fastformer::cuda {
namespace {

// --- kernels

template <typename T, int kPack, int kLanes, bool kMasked>
__global__ void __launch_bounds__(Team<kLanes>::kThreads) softmax_forward_held(const SoftmaxForward<T> args) {
  Team<kLanes> team;
  const int64_t row = team.row();
  const bool exists = row < args.row_count;
  const int columns = exists ? static_cast<int>(args.column_count) : 0;
  const int visible = exists ? static_cast<int>(visible_columns(row, args.column_count, args.causal_rows)) : 0;
  float scores[kHeld<kPack>];
  const int64_t mask_offset = kMasked && exists ? args.mask.offset(row) : 0;
  load_scores<T, kPack, kMasked>(scores, args.input + row * args.input_stride, nullptr, args.mask, mask_offset, visible,
                                 args.scale, team);
  const float peak = finite(team.max(greatest(scores)));
  float total = 0.0f;
#pragma unroll
  for (int i = 0; i < kHeld<kPack>; ++i) {
    scores[i] = exp_below(scores[i], peak);
    total += scores[i];
  }
  total = team.sum(total);
  const float inverse = total == 0.0f ? 0.0f : 1.0f / total;
  multiply(scores, inverse);
  store_row<kPack>(args.output + row * args.column_count, scores, columns, team);
}

template <typename T, int kPack, int kLanes>
__global__ void __launch_bounds__(Team<kLanes>::kThreads) softmax_backward_held(const SoftmaxBackward<T> args) {
  Team<kLanes> team;
  const int64_t row = team.row();
  const int columns = row < args.row_count ? static_cast<int>(args.column_count) : 0;
  T grad[kHeld<kPack>], probability[kHeld<kPack>];
  load_row<kPack>(grad, args.grad_output + row * args.grad_stride, columns, team);
  load_row<kPack>(probability, args.output + row * args.output_stride, columns, team);
  // The second sum takes off what rounding left in the first: all of the answer where one probability is close to 1.
  const float mean = team.sum(weighted_sum(grad, probability, 0.0f));
  const float rest = team.sum(weighted_sum(grad, probability, mean));
  float result[kHeld<kPack>];
#pragma unroll
  for (int i = 0; i < kHeld<kPack>; ++i) result[i] = to_float(probability[i]) * (to_float(grad[i]) - mean - rest);
  multiply(result, args.scale);
  store_row<kPack>(args.grad_input + row * args.column_count, result, columns, team);
}

// --- launchers

template <typename T, int kPack, bool kMasked>
void launch_forward(const SoftmaxForward<T>& args, const OnDevice& device) {
  for_team<kHeld<kPack>>(args.row_count, args.column_count, [&]<int kLanes, bool kLooped>(dim3 grid, dim3 block) {
    constexpr int64_t kScratch = Team<kLanes>::kSharedBytes;
    if constexpr (kLooped) {
      const Parts parts = parts_of(args.column_count, sizeof(T), device);
      if constexpr (FASTFORMER_HAS_HOPPER) {
        if (parts.blocks > 1) return launch_forward_clusters<T, kPack, kMasked>(args, parts, device);
      }
      launch(softmax_forward_looped<T, kPack, kMasked, kBlock>, grid, block, kScratch + parts.kept * sizeof(T),
             device.stream, args, parts);
    } else {
      launch(softmax_forward_held<T, kPack, kLanes, kMasked>, grid, block, kScratch, device.stream, args);
    }
  });
}

template <typename T, int kPack>
void launch_backward(const SoftmaxBackward<T>& args, const OnDevice& device) {
  for_team<kHeld<kPack>>(args.row_count, args.column_count, [&]<int kLanes, bool kLooped>(dim3 grid, dim3 block) {
    constexpr int64_t kScratch = Team<kLanes>::kSharedBytes;
    if constexpr (kLooped) {
      const Parts parts = parts_of(args.column_count, 2 * sizeof(T), device);
      if constexpr (FASTFORMER_HAS_HOPPER) {
        if (parts.blocks > 1) return launch_backward_clusters<T, kPack>(args, parts, device);
      }
      launch(softmax_backward_looped<T, kPack, kBlock>, grid, block, kScratch + 2 * parts.kept * sizeof(T),
             device.stream, args, parts);
    } else {
      launch(softmax_backward_held<T, kPack, kLanes>, grid, block, kScratch, device.stream, args);
    }
  });
}

// --- operators

// `mask` over `input`, with its last four dimensions named as in SoftmaxMask.
SoftmaxMask broadcast(const std::optional<Tensor>& mask, const Tensor& input) {
  SoftmaxMask result{};
  if (!mask.has_value()) return result;
  check_device(*mask, "mask", input, "input");
  const int64_t dims = input.dim();
  STD_TORCH_CHECK(dims <= 4 && mask->dim() <= dims, "mask: input may have at most 4 dimensions");
  const auto size = [&](int64_t from_last) { return dims >= from_last ? input.size(dims - from_last) : 1; };
  const BroadcastMask applied = broadcast_mask(mask, {size(4), size(3), size(2), size(1)});
  std::copy_n(applied.strides, 4, result.strides);
  result.data = pointer(mask);
  result.kind = applied.kind;
  result.dtype = applied.dtype;
  result.heads = size(3);
  result.rows = size(2);
  return result;
}

// Whether `count` neighbours can be read together anywhere, in the widest accesses where they are several.
bool takes_packs(const SoftmaxMask& mask, int64_t element_size, int count) {
  const int64_t bytes = count * element_size < 16 ? count * element_size : 16;
  bool whole = mask.strides[3] == 1 && reinterpret_cast<uintptr_t>(mask.data) % bytes == 0;
  for (int i = 0; i < 3; ++i) whole = whole && mask.strides[i] % count == 0;
  return whole;
}

Tensor softmax_forward(const Tensor& input, const std::optional<Tensor>& mask, double scale, bool is_causal) {
  const OnDevice device(input);
  const int64_t dims = input.dim();
  const DType dtype = dtype_of(input, "input");
  STD_TORCH_CHECK(dims >= 1, "input must have at least one dimension");
  STD_TORCH_CHECK(!is_causal || dims >= 2, "is_causal: input must have rows and columns");
  const SoftmaxMask applied = broadcast(mask, input);
  const Tensor output = empty_of_sizes(input);
  if (input.numel() == 0) return output;
  const Rows rows = as_rows(input);
  for_dtype(dtype, [&]<typename T>() {
    SoftmaxForward<T> args{
        .input = pointer<T>(rows.tensor),
        .output = mutable_pointer<T>(output),
        .mask = applied,
        .row_count = rows.count,
        .column_count = rows.columns,
        .input_stride = rows.stride,
        .causal_rows = is_causal ? input.size(dims - 2) : 0,
        .scale = static_cast<float>(scale),
    };
    const auto run = [&]<int kPack>() {
      if (mask.has_value()) {
        args.mask.whole_packs = takes_packs(args.mask, mask->element_size(), kPack);
        launch_forward<T, kPack, true>(args, device);
      } else {
        launch_forward<T, kPack, false>(args, device);
      }
    };
    takes_widest(rows) ? run.template operator()<kWidest<T>>() : run.template operator()<1>();
  });
  return output;
}

Tensor softmax_backward(const Tensor& grad_output, const Tensor& output, double scale) {
  const OnDevice device(output);
  const DType dtype = dtype_of(output, "output");
  check_device(grad_output, "grad_output", output, "output");
  STD_TORCH_CHECK(output.dim() >= 1, "output must have at least one dimension");
  STD_TORCH_CHECK(same_sizes(grad_output, output), "grad_output must have the shape of output");
  STD_TORCH_CHECK(grad_output.scalar_type() == output.scalar_type(), "grad_output must have the dtype of output");
  const Tensor grad_input = empty_of_sizes(output);
  if (output.numel() == 0) return grad_input;
  const Rows grad = as_rows(grad_output), rows = as_rows(output);
  const bool widest = takes_widest(grad) && takes_widest(rows);
  for_dtype(dtype, [&]<typename T>() {
    const SoftmaxBackward<T> args{
        .grad_output = pointer<T>(grad.tensor),
        .output = pointer<T>(rows.tensor),
        .grad_input = mutable_pointer<T>(grad_input),
        .row_count = rows.count,
        .column_count = rows.columns,
        .grad_stride = grad.stride,
        .output_stride = rows.stride,
        .scale = static_cast<float>(scale),
    };
    widest ? launch_backward<T, kWidest<T>>(args, device) : launch_backward<T, 1>(args, device);
  });
  return grad_input;
}

}  // namespace
}  // namespace fastformer::cuda

FASTFORMER_CUDA_LIBRARY(m) {
  m.impl("softmax_forward", TORCH_BOX(&fastformer::cuda::softmax_forward));
  m.impl("softmax_backward", TORCH_BOX(&fastformer::cuda::softmax_backward));
}
