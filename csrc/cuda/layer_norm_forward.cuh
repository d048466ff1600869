// Layer norm forward: arguments, what its kernels share, and the one for rows too wide for registers, over a block
// (layer_norm.cu) or over a cluster (layer_norm_hopper.cu).
#pragma once

#include "layer_norm.cuh"

namespace fastformer::cuda {

template <typename T, typename W>
struct NormForward {
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

// Over clusters, defined in layer_norm_hopper.cu.
template <typename T, typename W, int kPack>
void launch_forward_clusters(const NormForward<T, W>& args, const Parts& parts, const OnDevice& device);

// input + residual as it is stored in `summed`, from column `start` on; 0 where a column doesn't exist.
template <int kPack, typename T, typename W, int kCount, int kLanes>
FASTFORMER_DEVICE void load_summed(T (&values)[kCount], const NormForward<T, W>& args, int64_t row, int64_t start,
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
FASTFORMER_DEVICE void store_normed(const NormForward<T, W>& args, const T (&values)[kCount], float mean, float rstd,
                                    T* output, int64_t start, int columns, const Team<kLanes>& team) {
  for_packs<kPack, kCount>(team, columns, [&](int first, int column) {
    float weight[kPack], bias[kPack];
    load_vector(weight, args.weight, start + column, 1.0f);
    load_vector(bias, args.bias, start + column, 0.0f);
    Pack<T, kPack> pack;
#pragma unroll
    for (int i = 0; i < kPack; ++i) {
      pack.values[i] = from_float<T>((to_float(values[first + i]) - mean) * rstd * weight[i] + bias[i]);
    }
    if constexpr (sizeof(T) == 2 || kLanes <= kBlock) {
      store_global(output + column, pack);
    } else {  // one access as it is, and in the registers there are
      store(output + column, pack);
    }
  });
}

template <typename T, typename W>
FASTFORMER_DEVICE void store_statistics(const NormForward<T, W>& args, int64_t row, float mean, float rstd) {
  if (args.mean != nullptr) args.mean[row] = mean;
  args.rstd[row] = rstd;
}

// Shared memory keeps whole steps of the loop, or all.
template <typename T, typename W, int kPack, int kLanes>
__global__ void __launch_bounds__(kLargeBlock, kLanes == kCluster ? 1 : 0)  // 1: as in softmax
    layer_norm_forward_looped(const NormForward<T, W> args, const Parts parts) {
  constexpr int kCount = kHeld<kPack>;
  Team<kLanes> team(parts);
  const int64_t row = team.row();
  const int first = team.first_column();
  const int64_t part_columns = fewer(parts.columns, args.column_count - first);
  const int step = team.size() * kCount;
  T* kept = shared_memory<T>() + Team<kLanes>::kSharedBytes / sizeof(T);
  const auto is_kept = [&](int64_t start) { return kLanes == kCluster || start < parts.kept; };
  const int64_t place = row * args.column_count + first;
  T* output_row = args.output + place;
  T values[kCount];

  // The mean of this thread's columns and the sum of their squared distances from it: those of each step joined to
  // those of the steps before (Chan, Golub and LeVeque, "Updating formulae and a pairwise algorithm for computing
  // sample variances", 1979).
  float own_mean = 0.0f, own_squares = 0.0f, own_count = 0.0f;
  for (int64_t start = 0; start < part_columns; start += step) {
    const int columns = at_most(step, part_columns - start);
    load_summed<kPack>(values, args, row, first + start, columns, team);
    if (args.summed != nullptr) store_row<kPack>(args.summed + place + start, values, columns, team);
    if (is_kept(start)) keep_row<kPack>(kept + start, values, columns, team);
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
  if (team.is_first()) store_statistics(args, row, mean, rstd);

  // A thread reads of `kept` what it wrote itself, so no barrier is needed. Last columns first: of those that are read
  // again they are the likeliest to be in the L2 cache still.
  for (int64_t start = (part_columns - 1) / step * step; start >= 0; start -= step) {
    const int columns = at_most(step, part_columns - start);
    if (is_kept(start)) {
      load_row<kPack>(values, kept + start, columns, team);
    } else {
      load_summed<kPack>(values, args, row, first + start, columns, team);
    }
    store_normed<kPack>(args, values, mean, rstd, output_row + start, first + start, columns, team);
  }
}

}  // namespace fastformer::cuda
