// Softmax over the last dimension, forward and backward: softmax(scale * input + mask). Shapes: N rows (all leading
// dimensions together), C columns. A row is held in registers where it fits (rows.cuh). A wider one is read once if
// shared memory holds it, else twice, the first time for its maximum and its sum together (Milakov and Gimelshein,
// "Online normalizer calculation for softmax", 2018).
#include <algorithm>

#include "../mask.h"
#include "rows.cuh"

namespace fastformer::cuda {
namespace {

// --- kernels

// Broadcast to [outer, heads, rows, C].
struct Mask {
  const void* data;  // nullptr: none
  MaskKind kind;
  DType dtype;         // of an additive one
  bool whole_packs;    // as many neighbours as one access reads of the input can be read together
  int64_t strides[4];  // in elements
  int64_t heads, rows;

  // Where the mask of row `row` starts.
  FASTFORMER_DEVICE int64_t offset(int64_t row) const {
    const int64_t head = row / rows;
    return head / heads * strides[0] + head % heads * strides[1] + row % rows * strides[2];
  }
};

// apply(i, value) for the mask's values at columns first + i, i < kCount, those before `end`.
template <typename M, int kCount, typename Apply>
FASTFORMER_DEVICE void for_mask_values(const Mask& mask, int64_t offset, int first, int end, Apply apply) {
  const M* values = static_cast<const M*>(mask.data) + offset + first * mask.strides[3];
  if (mask.whole_packs) {
    constexpr int kTogether = kCount < kWidest<M> ? kCount : kWidest<M>;
#pragma unroll
    for (int i = 0; i < kCount; i += kTogether) {
      const Pack<M, kTogether> pack = load<kTogether>(values + i);
#pragma unroll
      for (int j = 0; j < kTogether; ++j) {
        if (first + i + j < end) apply(i + j, pack.values[j]);
      }
    }
  } else {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      if (first + i < end) apply(i, values[i * mask.strides[3]]);
    }
  }
}

template <int kCount>
FASTFORMER_DEVICE void apply_mask(float* scores, const Mask& mask, int64_t offset, int first, int end) {
  const auto keep = [&](int i, uint8_t value) { scores[i] = value != 0 ? scores[i] : -INFINITY; };
  const auto add = [&](int i, auto value) { scores[i] += to_float(value); };
  if (mask.kind == MaskKind::boolean) {
    for_mask_values<uint8_t, kCount>(mask, offset, first, end, keep);
  } else if (mask.dtype == DType::float32) {
    for_mask_values<float, kCount>(mask, offset, first, end, add);
  } else if (mask.dtype == DType::bfloat16) {
    for_mask_values<BFloat16, kCount>(mask, offset, first, end, add);
  } else {
    for_mask_values<Half, kCount>(mask, offset, first, end, add);
  }
}

// scale * row + mask for this thread's columns, -inf where masked out, and from column `end` on. `kept`: gets a copy of
// what is read.
template <typename T, int kPack, bool kMasked, int kLanes>
FASTFORMER_DEVICE void load_scores(float (&scores)[kHeld<kPack>], const T* row, T* kept, const Mask& mask,
                                   int64_t mask_offset, int end, float scale, const Team<kLanes>& team) {
#pragma unroll
  for (int p = 0; p < kHeld<kPack> / kPack; ++p) {
    float* const pack_scores = &scores[p * kPack];
    const int column = team.template column<kPack>(p);
#pragma unroll
    for (int i = 0; i < kPack; ++i) pack_scores[i] = -INFINITY;
    if (column < end) {
      const Pack<T, kPack> pack = load<kPack>(row + column);
      if (kept != nullptr) store(kept + column, pack);
#pragma unroll
      for (int i = 0; i < kPack; ++i) {
        // __fmul_rn: never fused with an addition, or the greatest of huge scores would not be the maximum exactly.
        if (column + i < end) pack_scores[i] = __fmul_rn(to_float(pack.values[i]), scale);
      }
      if constexpr (kMasked) apply_mask<kPack>(pack_scores, mask, mask_offset, column, end);
    }
  }
}

template <int kCount>
FASTFORMER_DEVICE float greatest(const float (&values)[kCount]) {
  float result = values[0];
#pragma unroll
  for (int i = 1; i < kCount; ++i) result = fmaxf(result, values[i]);
  return result;
}

template <int kCount>
FASTFORMER_DEVICE void multiply(float (&values)[kCount], float factor) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) values[i] *= factor;
}

// The columns of a row that it has, or that it sees if causal.
FASTFORMER_DEVICE int64_t visible_columns(int64_t row, int64_t columns, int64_t causal_rows) {
  const int64_t seen = causal_rows > 0 ? row % causal_rows + 1 : columns;
  return seen < columns ? seen : columns;
}

template <typename T, int kPack, int kLanes, bool kMasked>
__global__ void __launch_bounds__(Team<kLanes>::kThreads)
    softmax_forward_held(const T* input,  // [N, C], unit stride
                         T* output,       // [N, C], contiguous
                         const Mask mask,
                         int64_t row_count,     // N
                         int64_t column_count,  // C
                         int64_t input_stride,  // from row to row
                         int64_t causal_rows,   // row n is row n % causal_rows of its matrix; 0: not causal
                         float scale) {
  Team<kLanes> team;
  const int64_t row = team.row();
  const bool exists = row < row_count;
  const int visible = exists ? static_cast<int>(visible_columns(row, column_count, causal_rows)) : 0;
  float scores[kHeld<kPack>];
  const int64_t mask_offset = kMasked && exists ? mask.offset(row) : 0;
  load_scores<T, kPack, kMasked>(scores, input + row * input_stride, nullptr, mask, mask_offset, visible, scale, team);
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
  store_row<kPack>(output + row * column_count, scores, exists ? static_cast<int>(column_count) : 0, team);
}

template <typename T, int kPack, bool kMasked>
__global__ void __launch_bounds__(kLargeBlock, 1)  // 1: else ptxas stops at 64 registers, and spills
    softmax_forward_looped(const T* input,         // as above
                           T* output, const Mask mask, int64_t column_count, int64_t input_stride, int64_t causal_rows,
                           float scale,
                           bool keeps) {  // shared memory has room for the row
  Team<kBlock> team;
  const int64_t row = team.row();
  const int step = team.size() * kHeld<kPack>;
  const int64_t visible = visible_columns(row, column_count, causal_rows);
  const int64_t mask_offset = kMasked ? mask.offset(row) : 0;
  const T* input_row = input + row * input_stride;
  T* output_row = output + row * column_count;
  T* kept = shared_memory<T>() + Team<kBlock>::kSharedBytes / sizeof(T);
  float scores[kHeld<kPack>];

  float peak = -INFINITY, total = 0.0f;  // of this thread's columns
  for (int64_t start = 0; start < visible; start += step) {
    load_scores<T, kPack, kMasked>(scores, input_row + start, keeps ? kept + start : nullptr, mask,
                                   mask_offset + start * mask.strides[3], at_most(step, visible - start), scale, team);
    const float new_peak = fmaxf(peak, greatest(scores));
    const float shift = finite(new_peak);
    total *= exp_below(peak, shift);
#pragma unroll
    for (int i = 0; i < kHeld<kPack>; ++i) total += exp_below(scores[i], shift);
    peak = new_peak;
  }
  const float row_peak = finite(team.max(peak));
  total = team.sum(total * exp_below(peak, row_peak));
  const float inverse = total == 0.0f ? 0.0f : 1.0f / total;

  // A thread reads of `kept` what it wrote itself, so no barrier is needed for that.
  const T* source = keeps ? kept : input_row;
  for (int64_t start = 0; start < column_count; start += step) {
    load_scores<T, kPack, kMasked>(scores, source + start, nullptr, mask, mask_offset + start * mask.strides[3],
                                   at_most(step, visible - start), scale, team);
#pragma unroll
    for (int i = 0; i < kHeld<kPack>; ++i) scores[i] = exp_below(scores[i], row_peak);
    multiply(scores, inverse);
    store_row<kPack>(output_row + start, scores, at_most(step, column_count - start), team);
  }
}

// The sum over this thread's columns of (grad - mean) * probability.
template <typename T, int kCount>
FASTFORMER_DEVICE float weighted_sum(const T (&grad)[kCount], const T (&probability)[kCount], float mean) {
  float result = 0.0f;
#pragma unroll
  for (int i = 0; i < kCount; ++i) result += (to_float(grad[i]) - mean) * to_float(probability[i]);
  return result;
}

template <typename T, int kPack, int kLanes>
__global__ void __launch_bounds__(Team<kLanes>::kThreads)
    softmax_backward_held(const T* grad_output,  // [N, C], unit stride
                          const T* output,       // [N, C], unit stride
                          T* grad_input,         // [N, C], contiguous
                          int64_t row_count,     // N
                          int64_t column_count,  // C
                          int64_t grad_stride,   // from row to row of grad_output
                          int64_t output_stride, float scale) {
  Team<kLanes> team;
  const int64_t row = team.row();
  const int columns = row < row_count ? static_cast<int>(column_count) : 0;
  T grad[kHeld<kPack>], probability[kHeld<kPack>];
  load_row<kPack>(grad, grad_output + row * grad_stride, columns, team);
  load_row<kPack>(probability, output + row * output_stride, columns, team);
  // The second sum takes off what rounding left in the first: all of the answer where one probability is close to 1.
  const float mean = team.sum(weighted_sum(grad, probability, 0.0f));
  const float rest = team.sum(weighted_sum(grad, probability, mean));
  float result[kHeld<kPack>];
#pragma unroll
  for (int i = 0; i < kHeld<kPack>; ++i) result[i] = to_float(probability[i]) * (to_float(grad[i]) - mean - rest);
  multiply(result, scale);
  store_row<kPack>(grad_input + row * column_count, result, columns, team);
}

template <typename T, int kPack>
__global__ void __launch_bounds__(kLargeBlock, 1)
    softmax_backward_looped(const T* grad_output,  // as above
                            const T* output, T* grad_input, int64_t column_count, int64_t grad_stride,
                            int64_t output_stride, float scale,
                            bool keeps) {  // shared memory has room for both rows
  Team<kBlock> team;
  const int64_t row = team.row();
  const int step = team.size() * kHeld<kPack>;
  const T *grad_row = grad_output + row * grad_stride, *output_row = output + row * output_stride;
  T* result_row = grad_input + row * column_count;
  T* kept_grad = shared_memory<T>() + Team<kBlock>::kSharedBytes / sizeof(T);
  T* kept_output = kept_grad + column_count;
  T grad[kHeld<kPack>], probability[kHeld<kPack>];

  float mean = 0.0f;
  for (int64_t start = 0; start < column_count; start += step) {
    const int end = at_most(step, column_count - start);
    load_row<kPack>(grad, grad_row + start, end, team);
    load_row<kPack>(probability, output_row + start, end, team);
    if (keeps) {
      store_row<kPack>(kept_grad + start, grad, end, team);
      store_row<kPack>(kept_output + start, probability, end, team);
    }
    mean += weighted_sum(grad, probability, 0.0f);
  }
  mean = team.sum(mean);

  // A thread reads of what is kept what it wrote itself, so no barrier is needed for that.
  const T *grad_source = keeps ? kept_grad : grad_row, *output_source = keeps ? kept_output : output_row;
  if (keeps) {  // then to correct the mean, as above, costs no reading
    float rest = 0.0f;
    for (int64_t start = 0; start < column_count; start += step) {
      const int end = at_most(step, column_count - start);
      load_row<kPack>(grad, grad_source + start, end, team);
      load_row<kPack>(probability, output_source + start, end, team);
      rest += weighted_sum(grad, probability, mean);
    }
    mean += team.sum(rest);
  }
  for (int64_t start = 0; start < column_count; start += step) {
    const int end = at_most(step, column_count - start);
    load_row<kPack>(grad, grad_source + start, end, team);
    load_row<kPack>(probability, output_source + start, end, team);
    float result[kHeld<kPack>];
#pragma unroll
    for (int i = 0; i < kHeld<kPack>; ++i) result[i] = to_float(probability[i]) * (to_float(grad[i]) - mean);
    multiply(result, scale);
    store_row<kPack>(result_row + start, result, end, team);
  }
}

// --- launchers

template <typename T, int kPack, bool kMasked>
void launch_forward(const Rows& rows, const Tensor& output, const Mask& mask, int64_t causal_rows, float scale,
                    const OnDevice& device) {
  const T* from = pointer<T>(rows.tensor);
  T* to = mutable_pointer<T>(output);
  for_team<kHeld<kPack>>(rows.count, rows.columns, [&]<int kLanes, bool kLooped>(dim3 grid, dim3 block) {
    constexpr int64_t kScratch = Team<kLanes>::kSharedBytes;
    if constexpr (kLooped) {
      const int64_t wanted = kScratch + rows.columns * static_cast<int64_t>(sizeof(T));
      const bool keeps = wanted <= device.shared_memory_limit();
      launch(softmax_forward_looped<T, kPack, kMasked>, grid, block, keeps ? wanted : kScratch, device.stream, from, to,
             mask, rows.columns, rows.stride, causal_rows, scale, keeps);
    } else {
      launch(softmax_forward_held<T, kPack, kLanes, kMasked>, grid, block, kScratch, device.stream, from, to, mask,
             rows.count, rows.columns, rows.stride, causal_rows, scale);
    }
  });
}

template <typename T, int kPack>
void launch_backward(const Rows& grad, const Rows& output, const Tensor& grad_input, float scale,
                     const OnDevice& device) {
  const T *grad_from = pointer<T>(grad.tensor), *output_from = pointer<T>(output.tensor);
  T* to = mutable_pointer<T>(grad_input);
  for_team<kHeld<kPack>>(output.count, output.columns, [&]<int kLanes, bool kLooped>(dim3 grid, dim3 block) {
    constexpr int64_t kScratch = Team<kLanes>::kSharedBytes;
    if constexpr (kLooped) {
      const int64_t wanted = kScratch + 2 * output.columns * static_cast<int64_t>(sizeof(T));
      const bool keeps = wanted <= device.shared_memory_limit();
      launch(softmax_backward_looped<T, kPack>, grid, block, keeps ? wanted : kScratch, device.stream, grad_from,
             output_from, to, output.columns, grad.stride, output.stride, scale, keeps);
    } else {
      launch(softmax_backward_held<T, kPack, kLanes>, grid, block, kScratch, device.stream, grad_from, output_from, to,
             output.count, output.columns, grad.stride, output.stride, scale);
    }
  });
}

// --- operators

// `mask` over `input`, with its last four dimensions named as in Mask.
Mask broadcast(const std::optional<Tensor>& mask, const Tensor& input) {
  Mask result{};
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
bool takes_packs(const Mask& mask, int64_t element_size, int count) {
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
  Mask applied = broadcast(mask, input);
  const Tensor output = empty_of_sizes(input);
  if (input.numel() == 0) return output;
  const Rows rows = as_rows(input);
  const int64_t causal_rows = is_causal ? input.size(dims - 2) : 0;
  for_dtype(dtype, [&]<typename T>() {
    const auto run = [&]<int kPack>() {
      const float factor = static_cast<float>(scale);
      if (mask.has_value()) {
        applied.whole_packs = takes_packs(applied, mask->element_size(), kPack);
        launch_forward<T, kPack, true>(rows, output, applied, causal_rows, factor, device);
      } else {
        launch_forward<T, kPack, false>(rows, output, applied, causal_rows, factor, device);
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
    const float factor = static_cast<float>(scale);
    widest ? launch_backward<T, kWidest<T>>(grad, rows, grad_input, factor, device)
           : launch_backward<T, 1>(grad, rows, grad_input, factor, device);
  });
  return grad_input;
}

}  // namespace
}  // namespace fastformer::cuda

FASTFORMER_CUDA_LIBRARY(m) {
  m.impl("softmax_forward", TORCH_BOX(&fastformer::cuda::softmax_forward));
  m.impl("softmax_backward", TORCH_BOX(&fastformer::cuda::softmax_backward));
}
