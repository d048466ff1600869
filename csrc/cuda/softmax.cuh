// Softmax's arguments, what its kernels share, and those for rows too wide for registers: over a block (softmax.cu) or
// over a cluster (softmax_hopper.cu).
#pragma once

#include "../mask.h"
#include "rows.cuh"

namespace fastformer::cuda {

// Broadcast to [outer, heads, rows, C].
struct SoftmaxMask {
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

template <typename T>
struct SoftmaxForward {
  const T* input;  // [N, C], unit stride
  T* output;       // [N, C], contiguous
  SoftmaxMask mask;
  int64_t row_count;     // N
  int64_t column_count;  // C
  int64_t input_stride;  // from row to row
  int64_t causal_rows;   // row n is row n % causal_rows of its matrix; 0: not causal
  float scale;
};

template <typename T>
struct SoftmaxBackward {
  const T* grad_output;  // [N, C], unit stride
  const T* output;       // likewise
  T* grad_input;         // [N, C], contiguous
  int64_t row_count;     // N
  int64_t column_count;  // C
  int64_t grad_stride;   // from row to row of grad_output
  int64_t output_stride;
  float scale;
};

// Over clusters, defined in softmax_hopper.cu.
template <typename T, int kPack, bool kMasked>
void launch_forward_clusters(const SoftmaxForward<T>& args, const Parts& parts, const OnDevice& device);
template <typename T, int kPack>
void launch_backward_clusters(const SoftmaxBackward<T>& args, const Parts& parts, const OnDevice& device);

// apply(i, value) for the mask's values at columns first + i, i < kCount, those before `end`.
template <typename M, int kCount, typename Apply>
FASTFORMER_DEVICE void for_mask_values(const SoftmaxMask& mask, int64_t offset, int first, int end, Apply apply) {
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
FASTFORMER_DEVICE void apply_mask(float* scores, const SoftmaxMask& mask, int64_t offset, int first, int end) {
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
FASTFORMER_DEVICE void load_scores(float (&scores)[kHeld<kPack>], const T* row, T* kept, const SoftmaxMask& mask,
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

template <typename T, int kPack, bool kMasked, int kLanes>
__global__ void __launch_bounds__(kLargeBlock, 1)  // 1: else ptxas stops at 64 registers, and spills
    softmax_forward_looped(const SoftmaxForward<T> args, const Parts parts) {
  Team<kLanes> team(parts);
  const int64_t row = team.row();
  const int first = team.first_column();
  const int step = team.size() * kHeld<kPack>;
  // Of the part.
  const int64_t columns = fewer(parts.columns, args.column_count - first);
  const int64_t visible = fewer(columns, visible_columns(row, args.column_count, args.causal_rows) - first);
  const int64_t mask_offset = kMasked ? args.mask.offset(row) + first * args.mask.strides[3] : 0;
  const T* input_row = args.input + row * args.input_stride + first;
  T* output_row = args.output + row * args.column_count + first;
  const bool keeps = kLanes == kCluster || parts.kept > 0;
  T* kept = shared_memory<T>() + Team<kLanes>::kSharedBytes / sizeof(T);
  float scores[kHeld<kPack>];

  float peak = -INFINITY, total = 0.0f;  // of this thread's columns
  for (int64_t start = 0; start < visible; start += step) {
    load_scores<T, kPack, kMasked>(scores, input_row + start, keeps ? kept + start : nullptr, args.mask,
                                   mask_offset + start * args.mask.strides[3], at_most(step, visible - start),
                                   args.scale, team);
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
  for (int64_t start = 0; start < columns; start += step) {
    load_scores<T, kPack, kMasked>(scores, source + start, nullptr, args.mask,
                                   mask_offset + start * args.mask.strides[3], at_most(step, visible - start),
                                   args.scale, team);
#pragma unroll
    for (int i = 0; i < kHeld<kPack>; ++i) scores[i] = exp_below(scores[i], row_peak);
    multiply(scores, inverse);
    store_row<kPack>(output_row + start, scores, at_most(step, columns - start), team);
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
__global__ void __launch_bounds__(kLargeBlock, 1)
    softmax_backward_looped(const SoftmaxBackward<T> args, const Parts parts) {
  Team<kLanes> team(parts);
  const int64_t row = team.row();
  const int first = team.first_column();
  const int64_t columns = fewer(parts.columns, args.column_count - first);  // of the part
  const int step = team.size() * kHeld<kPack>;
  const T* grad_row = args.grad_output + row * args.grad_stride + first;
  const T* output_row = args.output + row * args.output_stride + first;
  T* result_row = args.grad_input + row * args.column_count + first;
  const bool keeps = kLanes == kCluster || parts.kept > 0;
  T* kept_grad = shared_memory<T>() + Team<kLanes>::kSharedBytes / sizeof(T);
  T* kept_output = kept_grad + parts.kept;
  T grad[kHeld<kPack>], probability[kHeld<kPack>];

  float mean = 0.0f;
  for (int64_t start = 0; start < columns; start += step) {
    const int end = at_most(step, columns - start);
    load_row<kPack>(grad, grad_row + start, end, team);
    load_row<kPack>(probability, output_row + start, end, team);
    if (keeps) {
      keep_row<kPack>(kept_grad + start, grad, end, team);
      keep_row<kPack>(kept_output + start, probability, end, team);
    }
    mean += weighted_sum(grad, probability, 0.0f);
  }
  mean = team.sum(mean);

  // A thread reads of what is kept what it wrote itself, so no barrier is needed for that.
  const T *grad_source = keeps ? kept_grad : grad_row, *output_source = keeps ? kept_output : output_row;
  if (keeps) {  // then to correct the mean, as in a row held in registers, costs no reading
    float rest = 0.0f;
    for (int64_t start = 0; start < columns; start += step) {
      const int end = at_most(step, columns - start);
      load_row<kPack>(grad, grad_source + start, end, team);
      load_row<kPack>(probability, output_source + start, end, team);
      rest += weighted_sum(grad, probability, mean);
    }
    mean += team.sum(rest);
  }
  for (int64_t start = 0; start < columns; start += step) {
    const int end = at_most(step, columns - start);
    load_row<kPack>(grad, grad_source + start, end, team);
    load_row<kPack>(probability, output_source + start, end, team);
    float result[kHeld<kPack>];
#pragma unroll
    for (int i = 0; i < kHeld<kPack>; ++i) result[i] = to_float(probability[i]) * (to_float(grad[i]) - mean);
    multiply(result, args.scale);
    store_row<kPack>(result_row + start, result, end, team);
  }
}

}  // namespace fastformer::cuda
