// Tiles of 16-bit elements and their products on tensor cores: the words in which attention and the matrix products are
// written. Tiles come to shared memory by cp.async, go from there to registers by ldmatrix, are multiplied by
// mma.sync, reduced over rows by shuffles, and leave through shared memory again, 16 bytes a thread.
//
// A warp owns kRowTiles x 16 rows of an Accumulator, which is 8 kColumnTiles wide. The layouts within a warp are those
// of the PTX ISA, "Matrix fragments for mma.m16n8k16 with floating point type".
#pragma once

#include "common.h"
#include "ptx.cuh"

namespace fastformer::cuda {

constexpr int kChunk = 8;  // elements of one 16-byte access

// What the rows of a tile in shared memory are for a product: rows (of a) or columns (of b) of the result, with the
// depth along them; or steps of the depth.
enum class TileRows { outer, depth };

// kRows x kColumns of T. Chunks are swapped about within their row, by its number, so that the same chunk of eight
// neighbouring rows, which ldmatrix reads at once, meets no bank twice.
template <typename T, int kRows_, int kColumns_>
struct SharedTile {
  static_assert(sizeof(T) == 2 && kColumns_ % 32 == 0);
  static constexpr int kRows = kRows_, kColumns = kColumns_, kChunks = kColumns / kChunk;
  static constexpr int kElements = kRows * kColumns, kBytes = kElements * static_cast<int>(sizeof(T));
  using Element = T;

  T* data;  // aligned to 128 bytes

  // `column` is a multiple of 2, where 2 elements are accessed; of 8, where 8 are.
  FASTFORMER_DEVICE T* at(int row, int column) const {
    // Two rows of 64 or 192 bytes begin at all the banks that there are: then pairs of rows are numbered.
    const int swap = kChunks % 8 == 0 ? row % 8 : row / 2 % 4;
    return data + row * kColumns + (column ^ (swap * kChunk));
  }
};

// Begins to copy a tile: row_of(row) is where its row begins in global memory, null for a row of zeros. Columns from
// `columns`, a multiple of 8, on are zeros too. The kThreads threads that do it all call it, then cp_async_commit;
// `rank` is the thread's among them.
template <int kThreads, typename Tile, typename RowOf>
FASTFORMER_DEVICE void copy_async(const Tile& tile, int columns, RowOf row_of, int rank = threadIdx.x) {
  constexpr int kCount = Tile::kRows * Tile::kChunks;
#pragma unroll
  for (int first = 0; first < kCount; first += kThreads) {
    const int index = first + rank;
    if (kCount % kThreads != 0 && index >= kCount) break;
    const int row = index / Tile::kChunks, column = index % Tile::kChunks * kChunk;
    const typename Tile::Element* from = row_of(row);
    const bool valid = from != nullptr && column < columns;
    ptx::cp_async<16>(tile.at(row, column), valid ? from + column : from, valid);
  }
}

// Copies kRows rows of a tile from `first_row` on to global memory: row_of(row in the tile) is where a row begins
// there, null for one that stays. `rank` is the thread's among the kThreads that do it; they see what is in the tile.
template <int kRows, int kThreads, typename Tile, typename RowOf>
FASTFORMER_DEVICE void copy_out(const Tile& tile, int first_row, int columns, int rank, RowOf row_of) {
  constexpr int kCount = kRows * Tile::kChunks;
#pragma unroll
  for (int first = 0; first < kCount; first += kThreads) {
    const int index = first + rank;
    if (kCount % kThreads != 0 && index >= kCount) break;
    const int row = first_row + index / Tile::kChunks, column = index % Tile::kChunks * kChunk;
    typename Tile::Element* to = row_of(row);
    if (to != nullptr && column < columns) store(to + column, load<kChunk>(tile.at(row, column)));
  }
}

// --- fragments

// 16 rows of a by 16 of the depth.
struct FragmentA {
  uint32_t values[4];
};
// 16 of the depth by two times 8 columns of b.
struct FragmentB {
  uint32_t values[2][2];
};

FASTFORMER_DEVICE int lane_of() { return threadIdx.x % kWarp; }

template <TileRows kAre, typename Tile>
FASTFORMER_DEVICE FragmentA load_a(const Tile& tile, int first_row, int first_depth) {
  const int lane = lane_of();
  FragmentA result;
  if constexpr (kAre == TileRows::outer) {
    ptx::ldmatrix_x4<false>(result.values, tile.at(first_row + lane % 16, first_depth + lane / 16 * 8));
  } else {
    ptx::ldmatrix_x4<true>(result.values,
                           tile.at(first_depth + lane % 8 + lane / 16 * 8, first_row + lane / 8 % 2 * 8));
  }
  return result;
}

template <TileRows kAre, typename Tile>
FASTFORMER_DEVICE FragmentB load_b(const Tile& tile, int first_column, int first_depth) {
  const int lane = lane_of();
  uint32_t values[4];
  if constexpr (kAre == TileRows::outer) {
    ptx::ldmatrix_x4<false>(values, tile.at(first_column + lane % 8 + lane / 16 * 8, first_depth + lane / 8 % 2 * 8));
  } else {
    ptx::ldmatrix_x4<true>(values, tile.at(first_depth + lane % 16, first_column + lane / 16 * 8));
  }
  return {{{values[0], values[1]}, {values[2], values[3]}}};
}

// --- accumulators

template <int kRowTiles_, int kColumnTiles_>
struct Accumulator {
  static constexpr int kRowTiles = kRowTiles_, kColumnTiles = kColumnTiles_;
  static constexpr int kRows = 16 * kRowTiles, kColumns = 8 * kColumnTiles;

  float values[kRowTiles][kColumnTiles][4];

  FASTFORMER_DEVICE void fill(float value) {
    for_each([&](float& x, int, int) { x = value; });
  }
  // Calls f(value, row, column) for each value this lane holds.
  template <typename F>
  FASTFORMER_DEVICE void for_each(F f) {
    const int lane = lane_of();
#pragma unroll
    for (int i = 0; i < kRowTiles; ++i) {
#pragma unroll
      for (int j = 0; j < kColumnTiles; ++j) {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          f(values[i][j][e], i * 16 + lane / 4 + e / 2 * 8, j * 8 + lane % 4 * 2 + e % 2);
        }
      }
    }
  }
};

// What a lane has for each of its rows, 2 of each 16: rows lane / 4 and lane / 4 + 8. The four lanes of a row have the
// same after a reduction.
template <int kRowTiles>
struct RowValues {
  float values[kRowTiles][2];

  FASTFORMER_DEVICE void fill(float value) {
#pragma unroll
    for (int i = 0; i < kRowTiles; ++i) values[i][0] = values[i][1] = value;
  }
};

// Calls f(value, what this lane has for its row) for each value this lane holds.
template <int kRowTiles, int kColumnTiles, typename F>
FASTFORMER_DEVICE void for_each_with_row(Accumulator<kRowTiles, kColumnTiles>& values, const RowValues<kRowTiles>& rows,
                                         F f) {
#pragma unroll
  for (int i = 0; i < kRowTiles; ++i) {
#pragma unroll
    for (int j = 0; j < kColumnTiles; ++j) {
#pragma unroll
      for (int e = 0; e < 4; ++e) f(values.values[i][j][e], rows.values[i][e / 2]);
    }
  }
}

// result = combine(result, each value of the row), on this lane's values alone.
template <int kRowTiles, int kColumnTiles, typename Combine>
FASTFORMER_DEVICE void reduce_lane(RowValues<kRowTiles>& result, const Accumulator<kRowTiles, kColumnTiles>& of,
                                   Combine combine) {
#pragma unroll
  for (int i = 0; i < kRowTiles; ++i) {
#pragma unroll
    for (int j = 0; j < kColumnTiles; ++j) {
#pragma unroll
      for (int e = 0; e < 4; ++e) result.values[i][e / 2] = combine(result.values[i][e / 2], of.values[i][j][e]);
    }
  }
}

// Over the four lanes that share each row.
template <int kRowTiles, typename Combine>
FASTFORMER_DEVICE void reduce_lanes(RowValues<kRowTiles>& result, Combine combine) {
#pragma unroll
  for (int i = 0; i < kRowTiles; ++i) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float& x = result.values[i][half];
      x = combine(x, __shfl_xor_sync(kAllLanes, x, 1));
      x = combine(x, __shfl_xor_sync(kAllLanes, x, 2));
    }
  }
}

// --- products

// sum += a b for one 16 of the depth, over all of sum's rows and 16 of its columns from 8 * column_tile on.
template <typename T, int kRowTiles, int kColumnTiles>
FASTFORMER_DEVICE void multiply_step(Accumulator<kRowTiles, kColumnTiles>& sum, const FragmentA (&a)[kRowTiles],
                                     const FragmentB& b, int column_tile) {
#pragma unroll
  for (int i = 0; i < kRowTiles; ++i) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      ptx::mma_m16n8k16<T>(sum.values[i][column_tile + half], a[i].values, b.values[half]);
    }
  }
}

// sum += a b over kDepth: a's rows from first_row on, b's columns from first_column on, both from shared memory.
template <int kDepth, TileRows kRowsOfA, TileRows kRowsOfB, int kRowTiles, int kColumnTiles, typename TileA,
          typename TileB>
FASTFORMER_DEVICE void multiply(Accumulator<kRowTiles, kColumnTiles>& sum, const TileA& a, int first_row,
                                const TileB& b, int first_column) {
  static_assert(kDepth % 16 == 0 && kColumnTiles % 2 == 0);
#pragma unroll
  for (int depth = 0; depth < kDepth; depth += 16) {
    FragmentA rows[kRowTiles];
#pragma unroll
    for (int i = 0; i < kRowTiles; ++i) rows[i] = load_a<kRowsOfA>(a, first_row + 16 * i, depth);
#pragma unroll
    for (int j = 0; j < kColumnTiles; j += 2) {
      multiply_step<typename TileB::Element>(sum, rows, load_b<kRowsOfB>(b, first_column + 8 * j, depth), j);
    }
  }
}

// The same with a's fragments in registers.
template <TileRows kRowsOfB, int kSteps, int kRowTiles, int kColumnTiles, typename TileB>
FASTFORMER_DEVICE void multiply(Accumulator<kRowTiles, kColumnTiles>& sum, const FragmentA (&a)[kSteps][kRowTiles],
                                const TileB& b, int first_column) {
#pragma unroll
  for (int step = 0; step < kSteps; ++step) {
#pragma unroll
    for (int j = 0; j < kColumnTiles; j += 2) {
      multiply_step<typename TileB::Element>(sum, a[step], load_b<kRowsOfB>(b, first_column + 8 * j, 16 * step), j);
    }
  }
}

// Two neighbouring tiles of an accumulator, rounded to T, as 16 of a product's depth: d's layout is that of a.
template <typename T>
FASTFORMER_DEVICE FragmentA as_fragment(const float (&left)[4], const float (&right)[4]) {
  return {{pack_pair<T>(left[0], left[1]), pack_pair<T>(left[2], left[3]), pack_pair<T>(right[0], right[1]),
           pack_pair<T>(right[2], right[3])}};
}

// sum += a b with a, rounded to the elements of b, from registers: its columns are all of the depth.
template <TileRows kRowsOfB, int kRowTiles, int kColumnTiles, int kDepthTiles, typename TileB>
FASTFORMER_DEVICE void multiply(Accumulator<kRowTiles, kColumnTiles>& sum, const Accumulator<kRowTiles, kDepthTiles>& a,
                                const TileB& b, int first_column) {
  static_assert(kDepthTiles % 2 == 0 && kColumnTiles % 2 == 0);
  using T = typename TileB::Element;
#pragma unroll
  for (int depth = 0; depth < kDepthTiles; depth += 2) {
    FragmentA rows[kRowTiles];
#pragma unroll
    for (int i = 0; i < kRowTiles; ++i) rows[i] = as_fragment<T>(a.values[i][depth], a.values[i][depth + 1]);
#pragma unroll
    for (int j = 0; j < kColumnTiles; j += 2) {
      multiply_step<T>(sum, rows, load_b<kRowsOfB>(b, first_column + 8 * j, 8 * depth), j);
    }
  }
}

// Rounds an accumulator to the elements of a tile, at its row first_row and column first_column.
template <int kRowTiles, int kColumnTiles, typename Tile>
FASTFORMER_DEVICE void store_tile(const Tile& tile, int first_row, int first_column,
                                  const Accumulator<kRowTiles, kColumnTiles>& values) {
  using Pair = Pack<typename Tile::Element, 2>;
  const int lane = lane_of();
#pragma unroll
  for (int i = 0; i < kRowTiles; ++i) {
#pragma unroll
    for (int j = 0; j < kColumnTiles; ++j) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float (&value)[4] = values.values[i][j];
        store(tile.at(first_row + i * 16 + half * 8 + lane / 4, first_column + j * 8 + lane % 4 * 2),
              __builtin_bit_cast(Pair, pack_pair<typename Tile::Element>(value[2 * half], value[2 * half + 1])));
      }
    }
  }
}

// --- what tiles are read from

// With rows of a multiple of 8 elements that begin at multiples of 16 bytes: a copy, in the last dimension padded with
// zeros, unless they do.
inline Tensor with_aligned_rows(const Tensor& tensor) {
  const int64_t last = tensor.dim() - 1, rest = tensor.size(last) % kChunk;
  bool aligned = rest == 0 && (tensor.size(last) <= 1 || tensor.stride(last) == 1) && is_aligned(tensor);
  for (int64_t i = 0; i < last; ++i) aligned = aligned && (tensor.size(i) <= 1 || tensor.stride(i) % kChunk == 0);
  if (aligned || (rest == 0 && tensor.numel() == 0)) return tensor;
  if (rest != 0) return torch::stable::contiguous(torch::stable::pad(tensor, {0, kChunk - rest}));
  // A contiguous one may begin anywhere in its storage; a copy begins at its own.
  return tensor.is_contiguous() ? torch::stable::clone(tensor) : torch::stable::contiguous(tensor);
}

inline std::optional<Tensor> with_aligned_rows(const std::optional<Tensor>& tensor) {
  return tensor.has_value() ? std::optional(with_aligned_rows(*tensor)) : std::nullopt;
}

}  // namespace fastformer::cuda
