// Products c = a b on Hopper, by wgmma and TMA: which ones, and how they are shared out among blocks. The kernel is
// gemm_hopper.cuh's.
#pragma once

#include <algorithm>
#include <limits>
#include <optional>

#include "gemm_kernel.cuh"

namespace fastformer::cuda {

// The tile of c that a block is at, and the steps of the depth. Two warpgroups multiply 64 of the rows each; of a
// third, one thread asks for what they read.
//
// Registers of a thread: 240 for those that multiply, and 24 for the others, 63 K of 64 K. Of the 240 the sums are 96,
// and 64 those of the tile before that are not staged yet. Shared memory: 4 stages of 40 KB, and of each warp 4.5 KB of
// sums for the epilogue and the totals of 64 columns, are 198 KB of 227.
struct HopperGemmTile {
  static constexpr int kRows = 128, kColumns = 192, kDepth = 64, kStages = 4;
  static constexpr int kGroups = 2, kGroupRows = kRows / kGroups, kWarps = 4 * kGroups;  // that multiply
  static constexpr int kThreads = (kGroups + 1) * 128;
  static constexpr int kRegisters = 240, kLoadingRegisters = 24;
  static constexpr int kStageElements = (kRows + kColumns) * kDepth;
  static constexpr int kStagedRows = 16, kStagedColumns = 64, kStagedStride = 72;  // see HopperGemmStaged
  static constexpr int kStagedFloats = kStagedRows * kStagedStride + 4;
  static constexpr int kBarriers = 2 * kStages;
  static constexpr int kSharedBytes =
      kStages * kStageElements * 2 + kWarps * (kStagedFloats + kStagedColumns) * 4 + kBarriers * 8;
  static constexpr int kGroupedTiles = 8;  // 66 clusters of two then have about as many rows as columns between them
};
static_assert(HopperGemmTile::kGroupRows == kSumRows);  // the rows of c in a row of column_sums, in parts or not

// One matrix or two as each operand. The two of a lie side by side along the depth, as those of b do, or those of b are
// two factors of the one a.
template <typename T>
struct HopperGemmOperands {
  Matrix<T> a, second_a, b, second_b;
  int64_t first_depth, second_depth;  // of the matrices; 0: the second ones are no more of the depth
};

struct HopperGemmShape {
  int rows, columns;      // of c, where columns are those of one of the kSums products
  int blocks;             // of a cluster, 1 or 2: one's tile lies below the other's, and they share what they read of b
  int tiles;              // of c, as many blocks as a cluster has together
  int parts, part_steps;  // of the depth: a part's steps, but for the last
  int steps, first_steps;  // of all the depth, of the first matrices
};

// Defined in gemm_hopper.cuh, for the types that a file for sm_90a names.
template <typename T, TileRows kRowsOfA, TileRows kRowsOfB, typename Epilogue>
void launch_gemm_hopper(const HopperGemmOperands<T>& operands, const HopperGemmShape& shape, const GemmResults& results,
                        const Epilogue& epilogue, const OnDevice& device);

template <typename T>
HopperGemmOperands<T> hopper_operands(const Matrix<T>& a, const Matrix<T>& b, int64_t depth) {
  return {a, a, b, b, depth, 0};
}
template <typename T>
HopperGemmOperands<T> hopper_operands(const Matrix<T>& a, const Pair<T>& b, int64_t depth) {
  return {a, a, b.first, b.second, depth, 0};
}
template <typename T>
HopperGemmOperands<T> hopper_operands(const Matrix<T>& a, const Stacked<T>& b, int64_t depth) {
  const int64_t upper = b.upper_rows, lower = depth - upper;
  return {{a.data, a.rows, upper, a.stride},
          {a.data + upper, a.rows, lower, a.stride},
          {b.data, upper, b.columns, b.stride},
          {b.data + upper * b.stride + b.jump, lower, b.columns, b.stride},
          upper,
          lower};
}

// Cycles of a step of a tile, by count: those of its wgmmas for a cluster of two, whose blocks ask the L2 cache for 37
// bytes a cycle; for a block by itself, which asks for 53, an eighth more to wait for them.
constexpr int64_t kPairedStepCycles = 768, kStepCycles = 864;
// What parts of the depth cost: another kernel, and 8 bytes to and from memory for each of their sums.
constexpr int64_t kLaunchCycles = 4096, kSumsPerCycle = 256;

// How a product is shared out among blocks so that it takes the fewest cycles, or nothing where other tiles suit it
// better: as for large tiles on other devices, blocks are for half of the multiprocessors, and neither rows nor columns
// fill half a tile or less. Parts of the depth are at least 1024 but for the last.
inline std::optional<HopperGemmShape> plan_gemm_hopper(int64_t rows, int64_t columns, int sums, int64_t first_depth,
                                                       int64_t second_depth, int64_t multiprocessors) {
  using Tile = HopperGemmTile;
  const int64_t first_steps = ceil_div(first_depth, Tile::kDepth);
  const int64_t steps = first_steps + ceil_div(second_depth, Tile::kDepth), all_columns = sums * columns;
  if (2 * rows <= Tile::kRows || 2 * all_columns <= Tile::kColumns) return {};
  const int64_t down = ceil_div(rows, Tile::kRows), across = ceil_div(all_columns, Tile::kColumns);
  if (std::max({rows, all_columns, steps, down * across}) >= int64_t{1} << 26) return {};  // the kernel counts by int
  // No more than make four turns: their sums take memory.
  const int64_t most_parts = std::min(steps * Tile::kDepth / kLeastLargePart, 4 * multiprocessors / (down * across));
  HopperGemmShape best{};
  int64_t fewest_cycles = std::numeric_limits<int64_t>::max();
  for (const int blocks : {1, 2}) {
    if (blocks > std::min(down, multiprocessors)) break;
    const int64_t tiles = ceil_div(down, blocks) * across, clusters = multiprocessors / blocks;
    for (int64_t parts = 1; parts <= std::max<int64_t>(most_parts, 1); ++parts) {
      const int64_t part_steps = ceil_div(steps, parts);
      if (ceil_div(steps, part_steps) < parts || 2 * down * across * parts < multiprocessors) continue;
      int64_t cycles = ceil_div(tiles * parts, clusters) * part_steps * (blocks == 2 ? kPairedStepCycles : kStepCycles);
      if (parts > 1) cycles += kLaunchCycles + parts * rows * all_columns / kSumsPerCycle;
      if (cycles >= fewest_cycles) continue;
      fewest_cycles = cycles;
      best = {.rows = static_cast<int>(rows),
              .columns = static_cast<int>(columns),
              .blocks = blocks,
              .tiles = static_cast<int>(tiles),
              .parts = static_cast<int>(parts),
              .part_steps = static_cast<int>(part_steps),
              .steps = static_cast<int>(steps),
              .first_steps = static_cast<int>(first_steps)};
    }
  }
  if (best.blocks == 0) return {};
  return best;
}

// Whether TMA takes it: its coordinates are int, and rows don't overlap.
template <typename T>
bool suits_tma(const Matrix<T>& matrix) {
  constexpr int64_t kMost = int64_t{1} << 30;
  return matrix.rows < kMost && matrix.columns < kMost && matrix.stride >= matrix.columns;
}

// gemm() by the kernel that suits device and sizes. The one for Hopper leaves the sums of a to the caller.
template <typename T, TileRows kRowsOfA, TileRows kRowsOfB, bool kSumsA = false, typename A, typename B,
          typename Epilogue>
GemmSums product(const A& a, const B& b, int64_t rows, int64_t columns, int64_t depth, const Epilogue& epilogue,
                 const Tensor& like, const OnDevice& device, bool sums_columns = false, bool sums_a = false) {
  if constexpr (FASTFORMER_HAS_HOPPER) {
    const HopperGemmOperands<T> operands = hopper_operands(a, b, depth);
    const bool suits = device.is_hopper() && device.shared_memory_limit() >= HopperGemmTile::kSharedBytes &&
                       suits_tma(operands.a) && suits_tma(operands.second_a) && suits_tma(operands.b) &&
                       suits_tma(operands.second_b);
    std::optional<HopperGemmShape> shape;
    if (suits) {
      shape = plan_gemm_hopper(rows, columns, Epilogue::kSums, operands.first_depth, operands.second_depth,
                               device.multiprocessors());
    }
    if (shape.has_value()) {
      const auto multiply = [&](const GemmResults& results) {
        launch_gemm_hopper<T, kRowsOfA, kRowsOfB>(operands, *shape, results, epilogue, device);
      };
      return multiply_in_parts(shape->parts, HopperGemmTile::kGroupRows, rows, columns, epilogue, like, device,
                               sums_columns, false, multiply);
    }
  }
  return gemm<T, kRowsOfA, kRowsOfB, kSumsA>(a, b, rows, columns, depth, epilogue, like, device, sums_columns, sums_a);
}

}  // namespace fastformer::cuda
