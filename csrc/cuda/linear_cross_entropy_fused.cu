// The unembedding's cross-entropy on tensor cores, whose logits never leave the chip: a tile of them ends as its rows'
// statistics, which a second kernel joins to losses. Gradients are products once more: the logits, whose epilogue
// stores their gradient for some columns of the vocabulary, and what that is multiplied with.
//
// Shapes: N rows, C columns, V vocabulary.
#include "gemm_kernel.cuh"
#include "linear_cross_entropy.cuh"

namespace fastformer::cuda {
namespace {

// --- losses

// A tile of logits, x weight^T + bias, and what its rows' losses need of it.
template <typename Tile, typename T>
__global__ void __launch_bounds__(Tile::kThreads, Tile::kLeastBlocks)
    linear_cross_entropy_statistics(const Matrix<T> x, const Matrix<T> weight,
                                    const T* bias,            // [V], or null
                                    const int64_t* target,    // [rows]
                                    LossStatistics* parts) {  // [rows, tiles across]
  constexpr int kRowTiles = Tile::Sums::kRowTiles, kColumnTiles = Tile::Sums::kColumnTiles;
  const TilePlace place = place_of<Tile, int64_t>(blockIdx.x, x.rows, weight.rows);
  typename Tile::Sums logits;
  logits.fill(0.0f);
  multiply_matrices<Tile, T, TileRows::outer, TileRows::outer>(logits, x, weight, place, 0, x.columns);

  const int lane = lane_of();
  const int64_t first_row = place.row + Tile::warp_row() + lane / 4, vocabulary = weight.rows;
  const int64_t first_column = place.column + Tile::warp_column() + lane % 4 * 2;
  int labels[kRowTiles][2];  // the target's place among this lane's columns, which `first_column` is 0 of; or -1
#pragma unroll
  for (int i = 0; i < kRowTiles; ++i) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int64_t row = first_row + 16 * i + 8 * half, label = row < x.rows ? target[row] : -1;
      const int64_t apart = label - first_column;
      labels[i][half] = label < vocabulary && apart >= 0 && apart < Tile::kWarpColumns ? static_cast<int>(apart) : -1;
    }
  }

  RowValues<kRowTiles> peak, total, picked, sum;
  peak.fill(-INFINITY);
  total.fill(0.0f);
  picked.fill(0.0f);
  sum.fill(0.0f);
#pragma unroll
  for (int j = 0; j < kColumnTiles; ++j) {
    const bool exists = first_column + 8 * j < vocabulary;
    Pack<T, 2> added{};
    if (bias != nullptr && exists) added = load<2>(bias + first_column + 8 * j);
#pragma unroll
    for (int i = 0; i < kRowTiles; ++i) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        float& logit = logits.values[i][j][e];
        logit = exists ? logit + to_float(added.values[e % 2]) : -INFINITY;
        if (exists) sum.values[i][e / 2] += logit;
        if (labels[i][e / 2] == 8 * j + e % 2) picked.values[i][e / 2] = logit;
      }
    }
  }
  const auto add = [](float a, float b) { return a + b; };
  const auto greater = [](float a, float b) { return fmaxf(a, b); };
  reduce_lane(peak, logits, greater);
  reduce_lanes(peak, greater);
  for_each_with_row(logits, peak, [](float& x, float peak) { x = exp_below(x, finite(peak)); });
  reduce_lane(total, logits, add);
  reduce_lanes(total, add);
  reduce_lanes(picked, add);
  reduce_lanes(sum, add);

  __syncthreads();  // the ring is free

  LossStatistics* each_warp = shared_memory<LossStatistics>();  // [warps across, rows of the tile]
#pragma unroll
  for (int i = 0; i < kRowTiles; ++i) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = Tile::warp_row() + lane / 4 + 16 * i + 8 * half;
      if (lane % 4 == 0) {
        each_warp[Tile::warp_column() / Tile::kWarpColumns * Tile::kRows + row] = {
            peak.values[i][half], total.values[i][half], picked.values[i][half], sum.values[i][half]};
      }
    }
  }
  __syncthreads();
  static_assert(Tile::kThreads >= Tile::kRows);
  static_assert(Tile::kWarpsAcross * Tile::kRows * static_cast<int>(sizeof(LossStatistics)) <= Tile::kSharedBytes);
  const int64_t row = place.row + threadIdx.x;
  if (threadIdx.x >= Tile::kRows || row >= x.rows) return;
  LossStatistics result = each_warp[threadIdx.x];
#pragma unroll
  for (int i = 1; i < Tile::kWarpsAcross; ++i) result.join(each_warp[i * Tile::kRows + threadIdx.x]);
  parts[row * ((vocabulary + Tile::kColumns - 1) / Tile::kColumns) + place.column / Tile::kColumns] = result;
}

// A warp takes a row.
__global__ void __launch_bounds__(kSmallBlock)
    linear_cross_entropy_join(const LossStatistics* parts,  // [rows, count]
                              int64_t rows, int64_t count,
                              const int64_t* target,    // [rows]
                              const float* row_weight,  // [rows]: a factor of the loss; or null
                              float* losses,            // [rows]
                              float* lse,               // [rows]
                              const Loss loss) {
  Team<kWarp> team;
  const int64_t row = team.row();
  LossStatistics result{-INFINITY, 0.0f, 0.0f, 0.0f};
  if (row < rows) {
#pragma unroll 4
    for (int64_t i = team.rank(); i < count; i += kWarp) result.join(parts[row * count + i]);
  }
  result.join_over(team);
  result.picked = team.sum(result.picked);
  if (row >= rows || team.rank() != 0) return;
  losses[row] = loss.of(result, target[row]) * (row_weight == nullptr ? 1.0f : row_weight[row]);
  lse[row] = result.lse();
}

// --- epilogues of the gradients' products

// Logits -> their gradient. Its column sums are the gradient by the bias. The rounding of lse makes probabilities
// inexact, by up to 6e-8 |lse| of themselves; with the greatest logit it would not, but that is not saved.
template <typename T>
struct LogitsToGradient {
  static constexpr int kSums = 1;
  static constexpr bool kSumsColumns = true;

  const T* bias;          // [columns], or null
  const int64_t* target;  // [N]
  const float* row_grad;  // [N]: the gradient by the row's loss
  const float* lse;       // [N]
  T* grad_logits;         // [N, columns], rows `stride` apart
  int64_t stride;
  int64_t first;  // of the vocabulary, in these columns
  Loss loss;

  struct Loaded {
    Chunk<T> bias;
    int64_t label;
    float grad, lse;
  };

  FASTFORMER_DEVICE Loaded load(int64_t row, int64_t column) const {
    return {load_bias(bias, column), target[row], row_grad[row], lse[row]};
  }
  FASTFORMER_DEVICE void operator()(int64_t row, int64_t column, float (&values)[kSums][kChunk], const Loaded& loaded,
                                    float (&column_sums)[kChunk]) const {
    float (&value)[kChunk] = values[0];
    add(value, loaded.bias);
    const float spread = loss.smoothing / loss.vocabulary, at_label = 1.0f - loss.smoothing;
#pragma unroll
    for (int i = 0; i < kChunk; ++i) {
      value[i] = exp_below(value[i], loaded.lse) - spread;
      if (first + column + i == loaded.label) value[i] -= at_label;
      value[i] = loss.keeps(loaded.label) ? loaded.grad * value[i] : 0.0f;
      column_sums[i] += value[i];
    }
    store_floats<true>(grad_logits + row * stride + column, value);
  }
};

// What is added to the sums of the products before this one. The last one ends them.
template <typename T>
struct AddTo {
  static constexpr int kSums = 1;
  static constexpr bool kSumsColumns = false;

  float* total;  // [rows, width]; unread by the first
  T* result;     // [rows, width]; null for all but the last
  int64_t width;
  bool is_first;

  struct Loaded {
    float values[kChunk];
  };

  FASTFORMER_DEVICE Loaded load(int64_t row, int64_t column) const {
    Loaded loaded{};
    if (!is_first) load_floats<true>(loaded.values, total + row * width + column);
    return loaded;
  }
  FASTFORMER_DEVICE void operator()(int64_t row, int64_t column, float (&values)[kSums][kChunk], const Loaded& loaded,
                                    float (&)[kChunk]) const {
#pragma unroll
    for (int i = 0; i < kChunk; ++i) values[0][i] += loaded.values[i];
    const int64_t place = row * width + column;
    result == nullptr ? store_floats<true>(total + place, values[0]) : store_floats<true>(result + place, values[0]);
  }
};

// --- launchers

constexpr auto kOuter = TileRows::outer, kDepth = TileRows::depth;

// The matrices with rows for 16-byte accesses.
struct Operands {
  Tensor x, weight;
  std::optional<Tensor> bias;

  explicit Operands(const LossArguments& args)
      : x(with_aligned_rows(args.input)), weight(with_aligned_rows(args.weight)), bias(with_aligned_rows(args.bias)) {}

  // Of the bias, from column `first` of the vocabulary on.
  template <typename T>
  const T* bias_from(int64_t first) const {
    return bias.has_value() ? pointer<T>(*bias) + first : nullptr;
  }
};

// Rows are taken by as many as have kBufferBytes of statistics.
template <typename T>
void launch_losses(const LossArguments& args, const Operands& operands, const Tensor& losses, const Tensor& lse,
                   const OnDevice& device) {
  const int64_t N = operands.x.size(0), V = operands.weight.size(0);
  const auto launch_tiles = [&]<typename Tile>() {
    const int64_t tiles = ceil_div(V, Tile::kColumns);
    const int64_t fit = fitting(kBufferBytes, tiles, sizeof(LossStatistics));
    const int64_t most = std::min(std::max(fit / Tile::kRows, int64_t{1}) * Tile::kRows, N);
    const Tensor parts = empty_like_sizes(args.input, {most, tiles, 4}, ScalarType::Float);
    const float* row_weight = pointer<float>(args.row_weight);
    for (int64_t begin = 0; begin < N; begin += most) {
      const int64_t rows = std::min(most, N - begin);
      const int64_t* target = pointer<int64_t>(args.target) + begin;
      launch(linear_cross_entropy_statistics<Tile, T>, dim3(ceil_div(rows, Tile::kRows) * tiles), dim3(Tile::kThreads),
             Tile::kSharedBytes, device.stream, matrix_of<T>(narrow(operands.x, 0, begin, rows)),
             matrix_of<T>(operands.weight), operands.bias_from<T>(0), target, mutable_pointer<LossStatistics>(parts));
      launch(linear_cross_entropy_join, dim3(ceil_div(rows, kSmallBlock / kWarp)), dim3(kSmallBlock), 0, device.stream,
             pointer<LossStatistics>(parts), rows, tiles, target, row_weight == nullptr ? nullptr : row_weight + begin,
             mutable_pointer<float>(losses) + begin, mutable_pointer<float>(lse) + begin, args.loss);
    }
  };
  // As for a product of a depth that is not split.
  const bool large = plan_gemm(N, V, LargeTile::kDepth, device.multiprocessors()).large;
  large ? launch_tiles.template operator()<LargeTile>() : launch_tiles.template operator()<SmallTile>();
}

// Columns of the vocabulary whose gradients are in memory at a time. With 4096 the float sums of input's gradient, 8
// bytes an element to memory and back, take a sixth of the time of the product that is added to them (2 * 4096 FLOPs; 4
// TB/s, 700 TFLOP/s). Where C is small, there are more, up to 8192: weight's gradient by these columns then has a tile
// for every block that the machine has room for. And whatever fits into kBufferBytes is taken at once.
#ifdef FASTFORMER_SIMT  // where small tests are to take all turns
constexpr int64_t kFewestColumns = 128, kLeastColumns = 128, kMostColumns = 128;
#else
constexpr int64_t kFewestColumns = 1024, kLeastColumns = 4096, kMostColumns = 8192;
#endif

int64_t columns_for_gradients(int64_t N, int64_t C, int64_t V, const OnDevice& device) {
  const int64_t blocks = LargeTile::kLeastBlocks * device.multiprocessors();
  const int64_t filling = ceil_div(blocks, ceil_div(C, LargeTile::kColumns)) * LargeTile::kRows;
  // With many rows of few columns, no more memory than the operands have, or kBufferBytes.
  const int64_t room = fitting(std::max({kBufferBytes, N * C * 2, V * C * 2}), N, sizeof(BFloat16));
  const int64_t wanted = std::min(std::clamp(filling, kLeastColumns, kMostColumns), std::max(kFewestColumns, room));
  const int64_t columns = even(V, std::max(wanted, fitting(kBufferBytes, N, sizeof(BFloat16))));
  return std::min(ceil_div(columns, LargeTile::kRows) * LargeTile::kRows, V);
}

template <typename T>
LossGradients launch_gradients(const LossArguments& args, const Operands& operands, const Tensor& lse,
                               const OnDevice& device) {
  const Tensor &x = operands.x, &weight = operands.weight;
  const int64_t N = x.size(0), C = x.size(1), V = weight.size(0);
  const ScalarType dtype = x.scalar_type();
  const int64_t most = columns_for_gradients(N, C, V, device);
  const Tensor buffer = empty_like_sizes(x, {N, most}, dtype);
  const Tensor grad_input = empty_like_sizes(x, {N, C}, dtype), grad_weight = empty_like_sizes(x, {V, C}, dtype);
  const Tensor bias_sums = empty_like_sizes(x, {1, args.bias.has_value() ? V : 0}, ScalarType::Float);
  std::optional<Tensor> total;  // of the products that grad_input is the sum of
  if (most < V) total = empty_like_sizes(x, {N, C}, ScalarType::Float);
  for (int64_t first = 0; first < V; first += most) {
    const int64_t columns = std::min(most, V - first);
    const Tensor part = narrow(weight, 0, first, columns), grad_logits = narrow(buffer, 1, 0, columns);
    const LogitsToGradient<T> derive{operands.bias_from<T>(first),
                                     pointer<int64_t>(args.target),
                                     pointer<float>(args.row_weight),
                                     pointer<float>(lse),
                                     mutable_pointer<T>(buffer),
                                     most,
                                     first,
                                     args.loss};
    const GemmSums sums = gemm<T, kOuter, kOuter>(matrix_of<T>(x), matrix_of<T>(part), N, columns, C, derive, x, device,
                                                  args.bias.has_value());
    if (sums.of_columns.has_value()) sum_of_rows(narrow(bias_sums, 1, first, columns), *sums.of_columns);
    const bool is_last = first + columns == V;
    const AddTo<T> by_input{mutable_pointer<float>(total), is_last ? mutable_pointer<T>(grad_input) : nullptr, C,
                            first == 0};
    gemm<T, kOuter, kDepth>(matrix_of<T>(grad_logits), matrix_of<T>(part), N, C, columns, by_input, x, device);
    const AddTo<T> by_weight{nullptr, mutable_pointer<T>(grad_weight) + first * C, C, true};
    gemm<T, kDepth, kDepth>(matrix_of<T>(grad_logits), matrix_of<T>(x), columns, C, N, by_weight, x, device);
  }
  return {grad_input, grad_weight, args.bias.has_value() ? sum_of_rows(bias_sums, dtype) : no_result(x)};
}

}  // namespace

void compute_losses_fused(const LossArguments& args, const Tensor& losses, const Tensor& lse, const OnDevice& device) {
  const Operands operands(args);
  for_gemm_dtype(args.dtype, [&]<typename T>() { launch_losses<T>(args, operands, losses, lse, device); });
}

LossGradients compute_gradients_fused(const LossArguments& args, const std::optional<Tensor>& losses, const Tensor& lse,
                                      const OnDevice& device) {
  const Operands operands(args);
  LossGradients gradients{no_result(args.input), no_result(args.input), no_result(args.input)};
  for_gemm_dtype(args.dtype, [&]<typename T>() {
    if (losses.has_value()) launch_losses<T>(args, operands, *losses, lse, device);
    gradients = launch_gradients<T>(args, operands, lse, device);
  });
  return gradients;
}

}  // namespace fastformer::cuda
