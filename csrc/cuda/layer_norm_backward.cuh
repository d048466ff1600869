// Layer norm backward: arguments, what its kernels share, and the one for rows too wide for registers, over a block
// (layer_norm_backward.cu) or over a cluster (layer_norm_backward_hopper.cu).
#pragma once

#include "layer_norm.cuh"

namespace fastformer::cuda {

template <typename T, typename W>
struct NormBackward {
  const T* grad_output;        // [N, C], unit stride
  const T* grad_summed;        // likewise, or nullptr
  const T* summed;             // likewise
  const W* weight;             // [C] or nullptr
  const float* mean;           // [N]; nullptr if RMS
  const float* rstd;           // [N]
  T* grad_input;               // [N, C], contiguous
  int64_t row_count;           // N
  int64_t column_count;        // C
  int64_t grad_output_stride;  // from row to row
  int64_t grad_summed_stride;  // likewise
  int64_t summed_stride;       // likewise
};

// Over clusters, defined in layer_norm_backward_hopper.cu.
template <typename T, typename W, int kPack>
void launch_backward_clusters(const NormBackward<T, W>& args, const Parts& parts, const OnDevice& device);

struct Statistics {
  float mean, rstd;
};

template <typename T, typename W>
FASTFORMER_DEVICE Statistics statistics_of(const NormBackward<T, W>& args, int64_t row) {
  if (row >= args.row_count) return {0.0f, 0.0f};
  return {args.mean == nullptr ? 0.0f : args.mean[row], args.rstd[row]};
}

// Means over a row of scaled * normed and, but in RMSNorm, of scaled.
struct Means {
  float product, scaled;
};

template <int kLanes, typename T, typename W>
FASTFORMER_DEVICE Means means_of(const NormBackward<T, W>& args, float products, float scaled, Team<kLanes>& team) {
  const float count = static_cast<float>(args.column_count);
  products = team.sum(products) / count;
  return {products, args.mean == nullptr ? 0.0f : team.sum(scaled) / count};
}

template <typename T>
FASTFORMER_DEVICE float normed_of(T summed, const Statistics& of) {
  return (to_float(summed) - of.mean) * of.rstd;
}

// __fmul_rn: never fused with what follows, so that the one column of a row is exactly its own mean.
template <typename T>
FASTFORMER_DEVICE float scaled_of(T grad, float weight) {
  return __fmul_rn(to_float(grad), weight);
}

// grad_input of a thread's columns of a row from `start` on.
template <int kPack, typename T, typename W, int kCount, int kLanes>
FASTFORMER_DEVICE void store_grad_input(const NormBackward<T, W>& args, const T (&grad)[kCount],
                                        const T (&summed)[kCount], const Statistics& of, const Means& means,
                                        int64_t row, int64_t start, int columns, const Team<kLanes>& team) {
  // Several packs of grad_summed at once: between the stores each would be waited for alone. Large blocks have no
  // registers for that.
  constexpr int kAtOnce = kCount % 16 == 0 && kLanes < kLargeBlock ? 16 : kCount % 8 == 0 ? 8 : kCount;
#pragma unroll
  for (int group = 0; group < kCount; group += kAtOnce) {
    const int shift = group * team.size(), left = columns - shift;
    T added[kAtOnce] = {};
    if (args.grad_summed != nullptr) {
      load_row<kPack>(added, args.grad_summed + row * args.grad_summed_stride + start + shift, left, team);
    }
    T* grad_input = args.grad_input + row * args.column_count + start + shift;
    for_packs<kPack, kAtOnce>(team, left, [&](int first, int column) {
      float weight[kPack];
      load_vector(weight, args.weight, start + shift + column, 1.0f);
      Pack<T, kPack> pack;
#pragma unroll
      for (int i = 0; i < kPack; ++i) {
        const float scaled = scaled_of(grad[group + first + i], weight[i]);
        const float normed = normed_of(summed[group + first + i], of);
        const float centred = scaled - means.scaled - normed * means.product;
        pack.values[i] = from_float<T>(centred * of.rstd + to_float(added[first + i]));
      }
      store_global(grad_input + column, pack);
    });
  }
}

// grad_input. Shared memory keeps whole steps of the loop, or all, of grad_output and of summed.
template <typename T, typename W, int kPack, int kLanes>
__global__ void __launch_bounds__(kLargeBlock)
    layer_norm_backward_looped(const NormBackward<T, W> args, const Parts parts) {
  constexpr int kCount = kHeld<kPack>;
  Team<kLanes> team(parts);
  const int64_t row = team.row();
  const int first_column = team.first_column();
  const int64_t part_columns = fewer(parts.columns, args.column_count - first_column);
  const int step = team.size() * kCount;
  const T* grad_row = args.grad_output + row * args.grad_output_stride + first_column;
  const T* summed_row = args.summed + row * args.summed_stride + first_column;
  T* kept_grad = shared_memory<T>() + Team<kLanes>::kSharedBytes / sizeof(T);
  T* kept_summed = kept_grad + parts.kept;
  const auto is_kept = [&](int64_t start) { return kLanes == kCluster || start < parts.kept; };
  const Statistics of = statistics_of(args, row);
  T grad[kCount], summed[kCount];

  float products = 0.0f, scaled_sum = 0.0f;
  for (int64_t start = 0; start < part_columns; start += step) {
    const int columns = at_most(step, part_columns - start);
    load_row<kPack>(grad, grad_row + start, columns, team);
    load_row<kPack>(summed, summed_row + start, columns, team);
    if (is_kept(start)) {
      keep_row<kPack>(kept_grad + start, grad, columns, team);
      keep_row<kPack>(kept_summed + start, summed, columns, team);
    }
    for_packs<kPack, kCount>(team, columns, [&](int first, int column) {
      float weight[kPack];
      load_vector(weight, args.weight, first_column + start + column, 1.0f);
#pragma unroll
      for (int i = 0; i < kPack; ++i) {
        const float scaled = scaled_of(grad[first + i], weight[i]);
        products += scaled * normed_of(summed[first + i], of);
        scaled_sum += scaled;
      }
    });
  }
  const Means means = means_of(args, products, scaled_sum, team);

  // As in the forward: a thread reads of what is kept what it wrote itself, and last columns come first.
  for (int64_t start = (part_columns - 1) / step * step; start >= 0; start -= step) {
    const int columns = at_most(step, part_columns - start);
    const bool kept = is_kept(start);
    load_row<kPack>(grad, (kept ? kept_grad : grad_row) + start, columns, team);
    load_row<kPack>(summed, (kept ? kept_summed : summed_row) + start, columns, team);
    store_grad_input<kPack>(args, grad, summed, of, means, row, first_column + start, columns, team);
  }
}

}  // namespace fastformer::cuda
