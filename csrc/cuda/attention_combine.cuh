// The last step of attention whose keys were split into parts: unfinished results of the parts become the output.
#pragma once

#include "attention_softmax.cuh"

namespace fastformer::cuda {

// Where results go, N = B H Sq rows in all, and what the parts leave of each: the sum of weights * value, the largest
// score before it is multiplied by score_factor, and the sum of the weights.
struct DecodeResults {
  void* output;  // [B, H, Sq, Dv]
  int64_t output_strides[3];
  float* lse;              // [B, H, Sq], contiguous
  int64_t count;           // N
  float* partial_outputs;  // [parts, N, Dv], not written where the total is 0; null: there is one part
  float* partial_peaks;    // [parts, N]
  float* partial_totals;   // [parts, N]
  int sequences, row_tiles, parts;
};

template <typename T>
FASTFORMER_DEVICE T* output_row(const DecodeResults& results, int64_t entry, int head, int row) {
  const int64_t (&strides)[3] = results.output_strides;
  return static_cast<T*>(results.output) + entry * strides[0] + head * strides[1] + row * strides[2];
}

constexpr int kCombineWarps = 8;  // of a block, at most
constexpr int kLaneColumns = 4;   // neighbours that a lane has, twice: a warp has up to 256 columns

// One block: one row. Its warps share out the parts, and what they add up is added in their order.
template <typename T>
__global__ void __launch_bounds__(kCombineWarps* kWarp)
    attention_combine_kernel(const __grid_constant__ Attention a, const __grid_constant__ DecodeResults results) {
  const int64_t place = blockIdx.x;
  const int row = static_cast<int>(place % a.query_rows), head = static_cast<int>(place / a.query_rows % a.heads);
  const int lane = lane_of(), warp = threadIdx.x / kWarp, warps = blockDim.x / kWarp;
  // Nothing was written for packed rows that belong to no sequence, which come last.
  const bool claimed = a.cu_seqlens_q == nullptr || row < a.cu_seqlens_q[results.sequences];
  const int parts = claimed ? results.parts : 0;
  const auto at = [&](int part) { return part * results.count + place; };
  const float factor = score_factor(a);

  float peak = -INFINITY;
  for (int part = lane; part < parts; part += kWarp) peak = fmaxf(peak, results.partial_peaks[at(part)]);
#pragma unroll
  for (int other = kWarp / 2; other > 0; other /= 2) peak = fmaxf(peak, __shfl_xor_sync(kAllLanes, peak, other));

  float total = 0.0f, sums[2][kLaneColumns] = {};
  const auto for_columns = [&](auto f) {  // calls f(this lane's sums, the first one's column)
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int column = (i * kWarp + lane) * kLaneColumns;
      if (column < a.value_dim) f(sums[i], column);
    }
  };
#pragma unroll 4
  for (int part = warp; part < parts; part += warps) {
    const float part_total = results.partial_totals[at(part)];
    if (part_total == 0.0f)
      continue;  // it saw no key; of scores that are NaN the peak is -inf too, but not the total 0
    const float weight = ptx::ex2((results.partial_peaks[at(part)] - finite(peak)) * (factor * kLog2e));
    total += weight * part_total;
    for_columns([&](float (&sum)[kLaneColumns], int column) {
      const auto pack = load<kLaneColumns>(results.partial_outputs + at(part) * a.value_dim + column);
#pragma unroll
      for (int e = 0; e < kLaneColumns; ++e) sum[e] += weight * pack.values[e];
    });
  }

  const int stride = a.value_dim + 1;
  float* each_warp = shared_memory<float>();  // [warps, Dv + 1]: its sums, then its total
  for_columns([&](float (&sum)[kLaneColumns], int column) {
#pragma unroll
    for (int e = 0; e < kLaneColumns; ++e) each_warp[warp * stride + column + e] = sum[e];
  });
  if (lane == 0) each_warp[warp * stride + a.value_dim] = total;
  __syncthreads();
  const auto over_warps = [&](int column) {
    float sum = 0.0f;
    for (int i = 0; i < warps; ++i) sum += each_warp[i * stride + column];
    return sum;
  };
  const RowEnd end = claimed ? end_row(a, head, peak * factor, over_warps(a.value_dim)) : RowEnd{0.0f, -INFINITY};
  T* to = output_row<T>(results, place / a.query_rows / a.heads, head, row);
  for (int column = threadIdx.x; column < a.value_dim; column += blockDim.x) {
    to[column] = from_float<T>(over_warps(column) * end.multiplier);
  }
  if (threadIdx.x == 0) results.lse[place] = end.lse;
}

template <typename T>
void launch_combine(const Attention& a, const DecodeResults& results, cudaStream_t stream) {
  const int warps = std::min(kCombineWarps, results.parts);
  launch(attention_combine_kernel<T>, grid_of(results.count), dim3(warps * kWarp),
         warps * (a.value_dim + 1) * sizeof(float), stream, a, results);
}

}  // namespace fastformer::cuda
