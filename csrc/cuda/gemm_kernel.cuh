// The matrix product as a kernel: tiles on tensor cores, or parts of the depth and their sum, each with an epilogue.
//
// An epilogue is a struct that a launch copies to the device, with
//   static constexpr int kSums;          // products that share a: 2 with a Pair b
//   static constexpr bool kSumsColumns;  // whether it adds anything to column_sums
//   Loaded load(int64_t row, int64_t column) const;
//   void operator()(int64_t row, int64_t column, float (&values)[kSums][kChunk], const Loaded& loaded,
//                   float (&column_sums)[kChunk]) const;
// Both are called once for every 8 neighbouring columns of c that exist, with neighbouring lanes on neighbouring
// columns: the first loads what is needed besides (bias, hidden values), the second stores the results, both by 16-byte
// accesses. What is added to column_sums is added up over the rows of the tile. The kernels for Hopper
// (gemm_hopper.cuh) and for the sum of a split product's parts call them just as well.
#pragma once

#include <algorithm>
#include <optional>
#include <type_traits>
#include <utility>

#include "gemm.cuh"

namespace fastformer::cuda {

// --- for epilogues

template <typename T>
using Chunk = Pack<T, kChunk>;

// Of the bias, for every row; zeros if there is none.
template <typename T>
FASTFORMER_DEVICE Chunk<T> load_bias(const T* bias, int64_t column) {
  Words<Chunk<T>> words{};
  if (bias != nullptr) words = words_of(load<kChunk>(bias + column));
  return __builtin_bit_cast(Chunk<T>, words);
}
template <typename T>
FASTFORMER_DEVICE void add(float (&values)[kChunk], const Chunk<T>& bias) {
#pragma unroll
  for (int i = 0; i < kChunk; ++i) values[i] += to_float(bias.values[i]);
}

// --- kernels

struct GemmShape {
  int64_t rows, columns, depth;  // of c, where columns are those of one of the kSums products
  int64_t part_depth;            // of each part of the depth, a multiple of 32: part blockIdx.y
};

// Adds up what the lanes of a warp have for the same 8 columns: those whose numbers are equal modulo kChunks.
template <int kChunks>
FASTFORMER_DEVICE void sum_over_rows(float (&column_sums)[kChunk]) {
#pragma unroll
  for (int lanes = kChunks; lanes < kWarp; lanes *= 2) {
#pragma unroll
    for (int i = 0; i < kChunk; ++i) column_sums[i] += __shfl_xor_sync(kAllLanes, column_sums[i], lanes);
  }
}

template <typename Tile, typename T, TileRows kRowsOfA, TileRows kRowsOfB, bool kSumsA, typename A, typename B,
          typename Epilogue>
__global__ void __launch_bounds__(Tile::kThreads, Tile::kLeastBlocks)
    gemm_kernel(const A a, const B b, const GemmShape shape,
                float* parts,        // [parts, kSums, rows, columns]: each part's sums, without an epilogue; or null
                float* column_sums,  // [tiles down, columns]: the epilogue's; or null
                float* row_sums,     // [parts, rows]: of a over each part of the depth, with kSumsA; or null
                const Epilogue epilogue) {
  constexpr int kSums = Epilogue::kSums;
  const TilePlace place =
      place_of<Tile, int64_t>(blockIdx.x, shape.rows, kRowsOfB == TileRows::outer ? b.rows : b.columns);
  const int64_t first_depth = blockIdx.y * shape.part_depth, left = shape.depth - first_depth;
  typename Tile::Sums sums;
  sums.fill(0.0f);
  const int64_t depth_end = first_depth + (left < shape.part_depth ? left : shape.part_depth);
  if constexpr (kSumsA) {
    // Each column of a's product with ones. One warp in each row of tiles does that, for an eighth more work.
    const bool is_first = row_sums != nullptr && place.column == 0 && Tile::warp_column() == 0;
    const uint32_t ones[2] = {pack_pair<T>(1.0f, 1.0f), pack_pair<T>(1.0f, 1.0f)};
    Accumulator<Tile::Sums::kRowTiles, 1> sums_of_a;
    sums_of_a.fill(0.0f);
    multiply_matrices<Tile, T, kRowsOfA, kRowsOfB>(sums, a, b, place, first_depth, depth_end, [&](const auto& of_a) {
      if (!is_first) return;
#pragma unroll
      for (int i = 0; i < Tile::Sums::kRowTiles; ++i)
        ptx::mma_m16n8k16<T>(sums_of_a.values[i][0], of_a[i].values, ones);
    });
    sums_of_a.for_each([&](float total, int row, int column) {
      const int64_t place_of_row = place.row + Tile::warp_row() + row;
      if (is_first && column == 0 && place_of_row < shape.rows)
        row_sums[blockIdx.y * shape.rows + place_of_row] = total;
    });
  } else {
    multiply_matrices<Tile, T, kRowsOfA, kRowsOfB>(sums, a, b, place, first_depth, depth_end);
  }
  __syncthreads();  // the ring is free
  using Loaded = decltype(epilogue.load(0, 0));
  float mine[kChunk] = {};
  deliver<Tile, kSums>(
      sums, place, shape.rows, shape.columns,
      [&](int64_t row, int64_t column) { return parts == nullptr ? epilogue.load(row, column) : Loaded{}; },
      [&](int64_t row, int64_t column, float (&values)[kSums][kChunk], const Loaded& loaded) {
        if (parts == nullptr) return epilogue(row, column, values, loaded, mine);
#pragma unroll
        for (int i = 0; i < kSums; ++i) {
          const int64_t to = ((blockIdx.y * kSums + i) * shape.rows + row) * shape.columns + column;
          store_floats<true>(parts + to, values[i]);
        }
      });
  if constexpr (Epilogue::kSumsColumns) {
    if (column_sums == nullptr) return;
    constexpr int kColumns = Tile::kWarpColumns / kSums, kChunks = kColumns / kChunk;
    float* shared = shared_memory<float>() + Tile::kWarps * Tile::kStagedFloats;  // [warps, columns]
    const int lane = lane_of(), warp = threadIdx.x / kWarp;
    sum_over_rows<kChunks>(mine);
    if (lane < kChunks) store_floats<true>(shared + warp * kColumns + lane * kChunk, mine);
    __syncthreads();
    const int column = threadIdx.x;
    static_assert(Tile::kThreads >= Tile::kWarpsAcross * kColumns);
    if (column >= Tile::kWarpsAcross * kColumns) return;
    const int64_t place_of_column = place.column / kSums + column;
    if (place_of_column >= shape.columns) return;
    float total = 0.0f;
#pragma unroll
    for (int i = 0; i < Tile::kWarpsDown; ++i) {
      total += shared[(i * Tile::kWarpsAcross + column / kColumns) * kColumns + column % kColumns];
    }
    column_sums[place.row / Tile::kRows * shape.columns + place_of_column] = total;
  }
}

// The parts of a split product added up, in their order, and the epilogue. A block takes 64 rows by 64 columns.
constexpr int kSumRows = 64, kSumChunks = 8, kSumThreads = 256, kSumRowsAtOnce = kSumThreads / kSumChunks;
constexpr int kSumLeastBlocks = 2;  // 128 registers: left to itself the compiler spills to get by with 80

template <typename Epilogue>
__global__ void __launch_bounds__(kSumThreads, kSumLeastBlocks)
    sum_parts_kernel(const float* parts,  // [part_count, kSums, rows, columns]
                     int part_count, int64_t rows, int64_t columns,
                     float* column_sums,  // [blocks down, columns], or null
                     const Epilogue epilogue) {
  constexpr int kSums = Epilogue::kSums;
  const int64_t column = blockIdx.x * int64_t{kSumChunks * kChunk} + threadIdx.x % kSumChunks * kChunk;
  float mine[kChunk] = {};
#pragma unroll 1
  for (int i = threadIdx.x / kSumChunks; i < kSumRows; i += kSumRowsAtOnce) {
    const int64_t row = blockIdx.y * int64_t{kSumRows} + i;
    if (row >= rows || column >= columns) continue;
    const auto loaded = epilogue.load(row, column);
    float values[kSums][kChunk] = {};
    for (int part = 0; part < part_count; ++part) {
#pragma unroll
      for (int j = 0; j < kSums; ++j) {
        float more[kChunk];
        load_floats<true>(more, parts + ((static_cast<int64_t>(part) * kSums + j) * rows + row) * columns + column);
#pragma unroll
        for (int k = 0; k < kChunk; ++k) values[j][k] += more[k];
      }
    }
    epilogue(row, column, values, loaded, mine);
  }
  if constexpr (Epilogue::kSumsColumns) {
    if (column_sums == nullptr) return;
    float* shared = shared_memory<float>();  // [warps, columns]
    constexpr int kColumns = kSumChunks * kChunk;
    sum_over_rows<kSumChunks>(mine);
    if (lane_of() < kSumChunks) store_floats<true>(shared + threadIdx.x / kWarp * kColumns + lane_of() * kChunk, mine);
    __syncthreads();
    const int64_t place = blockIdx.x * int64_t{kColumns} + threadIdx.x;
    if (threadIdx.x >= kColumns || place >= columns) return;
    float total = 0.0f;
#pragma unroll
    for (int warp = 0; warp < kSumThreads / kWarp; ++warp) total += shared[warp * kColumns + threadIdx.x];
    column_sums[blockIdx.y * columns + place] = total;
  }
}

// --- operands of launches

// Calls body.operator()<T>() for the element type, one of those that products take.
template <typename Body>
void for_gemm_dtype(DType dtype, Body&& body) {
  dtype == DType::bfloat16 ? body.template operator()<BFloat16>() : body.template operator()<Half>();
}

// Of a tensor that has aligned rows. A single row's stride may be anything, but places beyond it are to be aligned too.
template <typename T>
Matrix<T> matrix_of(const Tensor& matrix) {
  const int64_t rows = matrix.size(0), columns = matrix.size(1);
  return {pointer<T>(matrix), rows, columns, rows == 1 ? columns : matrix.stride(0)};
}

// --- launchers

// How the depth of a product is shared out among blocks.
struct DepthParts {
  int64_t count, depth;  // of each, a multiple of the tile's
  int64_t blocks;        // of all tiles and parts
};

// Parts of at least `least_depth`, as many as the multiprocessors have room for.
template <typename Tile>
DepthParts depth_parts(int64_t rows, int64_t columns, int64_t depth, int64_t least_depth, int64_t multiprocessors) {
  const int64_t tiles = ceil_div(rows, Tile::kRows) * ceil_div(columns, Tile::kColumns);
  const int64_t most = std::max<int64_t>(std::min(multiprocessors / tiles, depth / least_depth), 1);
  const int64_t part_depth = ceil_div(ceil_div(depth, most), Tile::kDepth) * Tile::kDepth;
  const int64_t count = ceil_div(depth, part_depth);
  return {count, part_depth, tiles * count};
}

// How a product is shared out among blocks.
struct GemmPlan {
  bool large;  // tiles
  DepthParts parts;

  // Rows of c that are added up in one row of column_sums.
  int64_t summed_rows() const { return parts.count == 1 && large ? LargeTile::kRows : SmallTile::kRows; }
};
static_assert(SmallTile::kRows == kSumRows);

// Large tiles do twice the arithmetic for each element that they read, so they are taken wherever their blocks, with
// the depth in parts of at least 1024, are enough for half of the multiprocessors. Else small ones, in parts of at
// least 256, until every multiprocessor has one. A part costs its sums' way to memory and back, 8 bytes an element of
// c: beside such depths that is little. The parts' sums are float [parts, c]: at most a tile for each multiprocessor.
constexpr int64_t kLeastLargePart = 1024, kLeastSmallPart = 256;

inline GemmPlan plan_gemm(int64_t rows, int64_t columns, int64_t depth, int64_t multiprocessors) {
  const DepthParts large = depth_parts<LargeTile>(rows, columns, depth, kLeastLargePart, multiprocessors);
  if (rows > SmallTile::kRows && columns > SmallTile::kColumns && 2 * large.blocks >= multiprocessors) {
    return {true, large};
  }
  return {false, depth_parts<SmallTile>(rows, columns, depth, kLeastSmallPart, multiprocessors)};
}

// Two matrices b of the same size, both of which a is multiplied with.
template <typename T>
struct Pair {
  Matrix<T> first, second;
};

template <typename Tile, typename Operand>
Operand for_tile(const Operand& operand) {
  return operand;
}
template <typename Tile, typename T>
Paired<T, Tile::kWarpColumns / 2> for_tile(const Pair<T>& pair) {
  constexpr int kTurn = Tile::kWarpColumns / 2;
  return {pair.first, pair.second, 2 * kTurn * ceil_div(pair.first.rows, kTurn), pair.first.columns};
}

// What an epilogue sums besides, in parts: their sum over the first dimension is the result.
struct GemmSums {
  std::optional<Tensor> of_columns;  // [.., columns]: what the epilogue adds up
  std::optional<Tensor> of_a;        // [.., rows]: a over the depth
};

// Where the kernel that multiplies writes what is no epilogue's; null for what is not wanted.
struct GemmResults {
  float *parts, *column_sums, *row_sums;  // as gemm_kernel has them
};

// Calls multiply(results), and adds up the parts that it leaves if the depth is in several. The sums are those asked
// for; summed_rows of c are a row of those of columns.
template <typename Epilogue, typename Multiply>
GemmSums multiply_in_parts(int64_t part_count, int64_t summed_rows, int64_t rows, int64_t columns,
                           const Epilogue& epilogue, const Tensor& like, const OnDevice& device, bool sums_columns,
                           bool sums_a, Multiply multiply) {
  constexpr int kSums = Epilogue::kSums;
  const auto new_sums = [&](const std::vector<int64_t>& sizes) {
    return empty_like_sizes(like, sizes, ScalarType::Float);
  };
  GemmSums sums;
  if (sums_columns) sums.of_columns = new_sums({ceil_div(rows, summed_rows), columns});
  if (sums_a) sums.of_a = new_sums({part_count, rows});
  std::optional<Tensor> parts;
  if (part_count > 1) parts = new_sums({part_count, kSums, rows, columns});

  multiply(GemmResults{mutable_pointer<float>(parts),
                       parts.has_value() ? nullptr : mutable_pointer<float>(sums.of_columns),
                       mutable_pointer<float>(sums.of_a)});
  if (!parts.has_value()) return sums;
  constexpr int kSharedBytes = Epilogue::kSumsColumns ? kSumThreads / kWarp * kSumChunks * kChunk * sizeof(float) : 0;
  launch(sum_parts_kernel<Epilogue>, dim3(ceil_div(columns, kSumChunks * kChunk), ceil_div(rows, kSumRows)),
         dim3(kSumThreads), kSharedBytes, device.stream, pointer<float>(*parts), static_cast<int>(part_count), rows,
         columns, mutable_pointer<float>(sums.of_columns), epilogue);
  return sums;
}

// c = a b, as far as `epilogue` stores it: rows and columns of c, by the depth; none is 0. The sums of a over the depth
// may be asked for with kSumsA.
template <typename T, TileRows kRowsOfA, TileRows kRowsOfB, bool kSumsA = false, typename A, typename B,
          typename Epilogue>
GemmSums gemm(const A& a, const B& b, int64_t rows, int64_t columns, int64_t depth, const Epilogue& epilogue,
              const Tensor& like, const OnDevice& device, bool sums_columns = false, bool sums_a = false) {
  const GemmPlan plan = plan_gemm(rows, Epilogue::kSums * columns, depth, device.multiprocessors());
  const auto multiply = [&](const GemmResults& results) {
    const auto launch_tiles = [&]<typename Tile>() {
      const auto operand_b = for_tile<Tile>(b);
      const int64_t columns_of_b = kRowsOfB == TileRows::outer ? operand_b.rows : operand_b.columns;
      const int64_t tiles = ceil_div(rows, Tile::kRows) * ceil_div(columns_of_b, Tile::kColumns);
      launch(gemm_kernel<Tile, T, kRowsOfA, kRowsOfB, kSumsA, A, std::remove_const_t<decltype(operand_b)>, Epilogue>,
             dim3(tiles, plan.parts.count), dim3(Tile::kThreads), Tile::kSharedBytes, device.stream, a, operand_b,
             GemmShape{rows, columns, depth, plan.parts.depth}, results.parts, results.column_sums, results.row_sums,
             epilogue);
    };
    plan.large ? launch_tiles.template operator()<LargeTile>() : launch_tiles.template operator()<SmallTile>();
  };
  return multiply_in_parts(plan.parts.count, plan.summed_rows(), rows, columns, epilogue, like, device, sums_columns,
                           kSumsA && sums_a, multiply);
}

}  // namespace fastformer::cuda
