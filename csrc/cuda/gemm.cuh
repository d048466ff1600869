// Products c = a b of 16-bit matrices on tensor cores, and what follows them: the result reaches an epilogue as float,
// before it is ever stored.
//
// A kernel is three calls: place_of (where the block's tile of c is), multiply_matrices (the sums, in registers), and
// either deliver, which hands the sums to a function 8 neighbouring columns at a time, or a reduction over rows of the
// accumulator (tile.cuh). gemm_kernel.cuh has the kernel that delivers, and its launcher.
#pragma once

#include <algorithm>

#include "rows.cuh"
#include "tile.cuh"

namespace fastformer::cuda {

// --- operands

// A matrix in memory: unit stride along a row, `stride` elements from row to row.
template <typename T>
struct Matrix {
  const T* data;
  int64_t rows, columns, stride;

  // Where a row begins, the last one for any beyond it.
  FASTFORMER_DEVICE const T* row(int64_t i) const { return data + (i < rows ? i : rows - 1) * stride; }
  // `from`, which is in row i, some rows further down.
  FASTFORMER_DEVICE const T* below(const T* from, int64_t, int rows_down) const { return from + rows_down * stride; }
};

// Two matrices of as many columns and the same stride, one above the other.
template <typename T>
struct Stacked {
  const T* data;
  int64_t rows, columns, stride;
  int64_t upper_rows;  // of the first
  int64_t jump;        // elements from where its next row would be to the second

  FASTFORMER_DEVICE const T* row(int64_t i) const {
    const int64_t existing = i < rows ? i : rows - 1;
    return data + existing * stride + (existing < upper_rows ? 0 : jump);
  }
  FASTFORMER_DEVICE const T* below(const T* from, int64_t i, int rows_down) const {
    return from + rows_down * stride + (i < upper_rows && i + rows_down >= upper_rows ? jump : 0);
  }
};

// The rows of two matrices by turns, kTurn of one and as many of the other: as b's columns they put both products with
// a for kTurn columns into one warp's tile of 2 kTurn.
template <typename T, int kTurn>
struct Paired {
  Matrix<T> first, second;
  int64_t rows, columns;  // rows: with those that fill up the last turns

  FASTFORMER_DEVICE const T* row(int64_t i) const {
    const int64_t of_each = i / (2 * kTurn) * kTurn + i % kTurn;
    return i / kTurn % 2 == 0 ? first.row(of_each) : second.row(of_each);
  }
};

// --- tiles

// The block's tile of c, kRows x kColumns, the part of it that each warp has, and the ring of kStages steps of 32 of
// the depth in shared memory, through which both operands come.
template <int kRows_, int kColumns_, int kWarpRows_, int kWarpColumns_, int kStages_, int kLeastBlocks_>
struct GemmTile {
  static constexpr int kRows = kRows_, kColumns = kColumns_, kWarpRows = kWarpRows_, kWarpColumns = kWarpColumns_;
  static constexpr int kDepth = 32, kStages = kStages_, kLeastBlocks = kLeastBlocks_;
  static constexpr int kGroupedTiles = 8;
  static constexpr int kWarpsAcross = kColumns / kWarpColumns, kWarpsDown = kRows / kWarpRows;
  static constexpr int kWarps = kWarpsAcross * kWarpsDown, kThreads = kWarp * kWarps;
  static constexpr int kStageElements = (kRows + kColumns) * kDepth;
  // deliver() has 32 rows of each warp in shared memory at a time. 8 floats more put neighbours on other banks.
  static constexpr int kStagedRows = 32, kStagedStride = kWarpColumns + 8;
  static constexpr int kStagedFloats = kStagedRows * kStagedStride;
  static constexpr int kSharedBytes =  // the ring, or behind what is staged a float for each column of each warp
      std::max<int>(kStages * kStageElements * 2, kWarps*(kStagedFloats + kWarpColumns) * sizeof(float));
  static_assert(kWarpRows % kStagedRows == 0);
  // The system keeps 1 KB a block of the 100 KB that a multiprocessor has at least.
  static_assert(kLeastBlocks * (kSharedBytes + 1024) <= 100 * 1024);

  using Sums = Accumulator<kWarpRows / 16, kWarpColumns / 8>;

  // Where the warp's part of the tile begins.
  FASTFORMER_DEVICE static int warp_row() { return threadIdx.x / kWarp / kWarpsAcross * kWarpRows; }
  FASTFORMER_DEVICE static int warp_column() { return threadIdx.x / kWarp % kWarpsAcross * kWarpColumns; }
};

// Of a thread's 255 registers 128 are for the sums and 40 for fragments. Shared memory: 3 stages of 16 KB, for two
// blocks on a multiprocessor even of sm_86 and sm_89: while one is at its epilogue or waits, the other multiplies.
// Warps of 64 x 64 read each element from shared memory the least often.
using LargeTile = GemmTile<128, 128, 64, 64, 3, 2>;
// For few rows or columns, or few tiles: 32 registers for the sums, 24 for fragments; 4 stages of 8 KB.
using SmallTile = GemmTile<64, 64, 32, 32, 4, 3>;

struct TilePlace {
  int64_t row, column;
};

// Where a block's tile begins: down kGroupedTiles tiles, then one to the right, and so on. Blocks that run at the same
// time then have few rows and columns between them, which come from the L2 cache.
template <typename Tile, typename Index>
FASTFORMER_DEVICE TilePlace place_of(Index block, Index rows, Index columns) {
  constexpr Index kRows = Tile::kRows, kColumns = Tile::kColumns, kGrouped = Tile::kGroupedTiles;
  const Index tiles_down = (rows + kRows - 1) / kRows, tiles_across = (columns + kColumns - 1) / kColumns;
  const Index group = block / (kGrouped * tiles_across), within = block % (kGrouped * tiles_across);
  const Index left = tiles_down - group * kGrouped, in_group = left < kGrouped ? left : kGrouped;
  return {(group * kGrouped + within % in_group) * kRows, within / in_group * kColumns};
}

// --- the main loop

// A thread's part in copying an operand, step by step of the depth: the places it reads from are found once. Rows or
// columns beyond c's are copies of its last: they are multiplied like the others, and not delivered. Beyond the depth
// there are zeros.
template <int kThreads, TileRows kRowsAre, typename T, int kOuter, int kDepth, typename Operand>
class OperandCopy {
 public:
  static constexpr bool kOuterRows = kRowsAre == TileRows::outer;
  using Tile = SharedTile<T, kOuterRows ? kOuter : kDepth, kOuterRows ? kDepth : kOuter>;

  FASTFORMER_DEVICE OperandCopy(const Operand& operand, int64_t outer, int64_t depth) : operand_(operand) {
    if constexpr (kOuterRows) {
#pragma unroll
      for (int i = 0; i < kCount; ++i) from_[i] = operand.row(outer + row(i)) + depth + column();
    } else {
      const int64_t mine = outer + column(), last = operand.columns - kChunk;
      row_ = depth + row(0);
      from_[0] = operand.row(row_) + (mine < last ? mine : last);
    }
  }

  // Begins to copy the next kDepth of the depth, of which `left` are left.
  FASTFORMER_DEVICE void next(const Tile& to, int left) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      if constexpr (kOuterRows) {
        ptx::cp_async<16>(to.at(row(i), column()), from_[i], column() < left);
        from_[i] += kDepth;
      } else {
        ptx::cp_async<16>(to.at(row(i), column()), operand_.below(from_[0], row_, i * kRowsAtOnce), row(i) < left);
      }
    }
    if constexpr (!kOuterRows) {
      from_[0] = operand_.below(from_[0], row_, kDepth);
      row_ += kDepth;
    }
  }

 private:
  static constexpr int kRowsAtOnce = kThreads / Tile::kChunks, kCount = Tile::kRows / kRowsAtOnce;
  static_assert(kThreads % Tile::kChunks == 0 && Tile::kRows % kRowsAtOnce == 0);

  FASTFORMER_DEVICE static int row(int i) { return threadIdx.x / Tile::kChunks + i * kRowsAtOnce; }
  FASTFORMER_DEVICE static int column() { return threadIdx.x % Tile::kChunks * kChunk; }

  const Operand& operand_;
  const T* from_[kOuterRows ? kCount : 1];
  int64_t row_;  // where from_[0] is, if rows are steps of the depth
};

// sums += a b for the warp's part of the block's tile, over the depth from first_depth to depth_end; all threads of the
// block call it. Where depth_end is no multiple of 32, it is the end of a's and b's depth. The rows of an operand are
// those of c (columns, for b), or steps of the depth. Bases, strides, and the columns of both operands are multiples of
// 8 elements. Afterwards shared memory is free once all threads have met at a barrier.
//
// with_a is called with the fragments of the warp's rows of a, for each 16 of the depth.
template <typename Tile, typename T, TileRows kRowsOfA, TileRows kRowsOfB, typename A, typename B, typename WithA>
FASTFORMER_DEVICE void multiply_matrices(typename Tile::Sums& sums, const A& a, const B& b, const TilePlace& place,
                                         int64_t first_depth, int64_t depth_end, WithA with_a) {
  constexpr int kStages = Tile::kStages, kDepth = Tile::kDepth, kThreads = Tile::kThreads;
  constexpr int kRowTiles = Tile::Sums::kRowTiles, kColumnTiles = Tile::Sums::kColumnTiles;
  T* ring = shared_memory<T>();
  const int steps = static_cast<int>((depth_end - first_depth + kDepth - 1) / kDepth);

  OperandCopy<kThreads, kRowsOfA, T, Tile::kRows, kDepth, A> copy_a(a, place.row, first_depth);
  OperandCopy<kThreads, kRowsOfB, T, Tile::kColumns, kDepth, B> copy_b(b, place.column, first_depth);
  using TileA = typename decltype(copy_a)::Tile;
  using TileB = typename decltype(copy_b)::Tile;
  int64_t left = depth_end - first_depth;  // not yet asked for
  const auto copy_step = [&](int slot) {
    if (left > 0) {
      const TileA to{ring + slot * Tile::kStageElements};
      const int step_left = left < kDepth ? static_cast<int>(left) : kDepth;
      copy_a.next(to, step_left);
      copy_b.next(TileB{to.data + TileA::kElements}, step_left);
    }
    left -= kDepth;
    ptx::cp_async_commit();  // an empty group beyond the end: each step waits for as many
  };

  // Fragments of 16 of the depth, in registers: while the tensor cores have some, the next are on their way.
  constexpr int kPairs = kColumnTiles / 2;  // FragmentBs of 16 of the depth
  static_assert(kDepth == 32 && kPairs % 2 == 0);
  FragmentA fragments_a[2][kRowTiles];
  FragmentB fragments_b[2];
  const auto load_all_a = [&](FragmentA(&to)[kRowTiles], int slot, int depth) {
    const TileA tile{ring + slot * Tile::kStageElements};
#pragma unroll
    for (int i = 0; i < kRowTiles; ++i) to[i] = load_a<kRowsOfA>(tile, Tile::warp_row() + 16 * i, depth);
  };
  const auto load_one_b = [&](int pair, int slot, int depth) {
    const TileB tile{ring + slot * Tile::kStageElements + TileA::kElements};
    fragments_b[pair % 2] = load_b<kRowsOfB>(tile, Tile::warp_column() + 16 * pair, depth);
  };

#pragma unroll 1
  for (int i = 0; i < kStages - 1; ++i) copy_step(i);
  ptx::cp_async_wait<kStages - 2>();
  __syncthreads();
  load_all_a(fragments_a[0], 0, 0);
  load_one_b(0, 0, 0);
  int slot = 0, free_slot = kStages - 1;
  for (int step = 0; step < steps; ++step) {
    const bool last = step + 1 == steps;
    const int next_slot = slot + 1 == kStages ? 0 : slot + 1;
    load_all_a(fragments_a[1], slot, 16);
    copy_step(free_slot);  // where the step before this one was
    with_a(fragments_a[0]);
#pragma unroll
    for (int pair = 0; pair < kPairs; ++pair) {
      pair + 1 < kPairs ? load_one_b(pair + 1, slot, 0) : load_one_b(0, slot, 16);
      multiply_step<T>(sums, fragments_a[0], fragments_b[pair % 2], 2 * pair);
    }
    with_a(fragments_a[1]);
#pragma unroll
    for (int pair = 0; pair < kPairs; ++pair) {
      if (pair + 1 < kPairs) load_one_b(pair + 1, slot, 16);
      if (pair + 1 == kPairs && !last) {
        ptx::cp_async_wait<kStages - 2>();
        __syncthreads();  // the next step is there; and all have read this one
        load_all_a(fragments_a[0], next_slot, 0);
        load_one_b(0, next_slot, 0);
      }
      multiply_step<T>(sums, fragments_a[1], fragments_b[pair % 2], 2 * pair);
    }
    free_slot = slot;
    slot = next_slot;
  }
}

// The same without a look at a.
template <typename Tile, typename T, TileRows kRowsOfA, TileRows kRowsOfB, typename A, typename B>
FASTFORMER_DEVICE void multiply_matrices(typename Tile::Sums& sums, const A& a, const B& b, const TilePlace& place,
                                         int64_t first_depth, int64_t depth_end) {
  multiply_matrices<Tile, T, kRowsOfA, kRowsOfB>(sums, a, b, place, first_depth, depth_end, [](const auto&) {});
}

// --- the way out

// Calls apply(row, column, values, loaded) for every 8 columns of the warp's part of c that exist, where `loaded` is
// what load(row, column) returned one turn earlier: so memory's latency is behind the arithmetic. With kSums = 2 the
// columns are those of either product, and values has both. Shared memory must be free.
template <typename Tile, int kSums, typename Load, typename Apply>
FASTFORMER_DEVICE void deliver(const typename Tile::Sums& sums, const TilePlace& place, int64_t rows, int64_t columns,
                               Load load_for, Apply apply) {
  constexpr int kColumns = Tile::kWarpColumns / kSums, kChunks = kColumns / kChunk;
  static_assert(kWarp % kChunks == 0);
  const int lane = lane_of();
  float* staged = shared_memory<float>() + threadIdx.x / kWarp * Tile::kStagedFloats;
  const int64_t first_row = place.row + Tile::warp_row() + lane / kChunks;
  const int64_t column = (place.column + Tile::warp_column()) / kSums + lane % kChunks * kChunk;
  constexpr int kRowsAtOnce = kWarp / kChunks;
  const auto exists = [&](int64_t row) { return row < rows && column < columns; };
  decltype(load_for(first_row, column)) next{};
  if (exists(first_row)) next = load_for(first_row, column);
#pragma unroll
  for (int part = 0; part < Tile::kWarpRows / Tile::kStagedRows; ++part) {
    if (part > 0) __syncwarp();  // the part before has been read
#pragma unroll
    for (int i = 0; i < Tile::kStagedRows / 16; ++i) {
#pragma unroll
      for (int j = 0; j < Tile::Sums::kColumnTiles; ++j) {
        const float (&value)[4] = sums.values[part * Tile::kStagedRows / 16 + i][j];
        float* to = staged + (i * 16 + lane / 4) * Tile::kStagedStride + j * 8 + lane % 4 * 2;
        store(to, Pack<float, 2>{value[0], value[1]});
        store(to + 8 * Tile::kStagedStride, Pack<float, 2>{value[2], value[3]});
      }
    }
    __syncwarp();
#pragma unroll 1  // what follows may be long, and its registers come on top of the sums'
    for (int i = 0; i < Tile::kStagedRows; i += kRowsAtOnce) {
      const int64_t row = first_row + part * Tile::kStagedRows + i;
      if (!exists(row)) continue;
      const auto loaded = next;
      if (part * Tile::kStagedRows + i + kRowsAtOnce < Tile::kWarpRows && exists(row + kRowsAtOnce)) {
        next = load_for(row + kRowsAtOnce, column);
      }
      float values[kSums][kChunk];
#pragma unroll
      for (int k = 0; k < kSums; ++k) {
        const int place_in_row = k * kColumns + lane % kChunks * kChunk;
        load_floats<true>(values[k], staged + (lane / kChunks + i) * Tile::kStagedStride + place_in_row);
      }
      apply(row, column, values, loaded);
    }
  }
}

}  // namespace fastformer::cuda
