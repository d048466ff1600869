// What follows a tile's product on Hopper: its place in c, and the epilogue, which runs while the next tile is
// multiplied.
#pragma once

#include "gemm_hopper.h"
#include "tile_hopper.cuh"

namespace fastformer::cuda {

// What a cluster does at a time: a tile for each of its blocks, and a part of the depth.
struct HopperGemmWork {
  int number;  // part by part
  int part;
  int begin, end;  // steps
};

// Where the block's tile begins; columns count those of both products.
template <int kSums>
FASTFORMER_DEVICE TilePlace tile_of(const HopperGemmShape& shape, int number, int part) {
  const int rows = (shape.rows + shape.blocks - 1) / shape.blocks;
  const TilePlace place = place_of<HopperGemmTile>(number - part * shape.tiles, rows, kSums * shape.columns);
  return {place.row * shape.blocks + ptx::cluster_rank() * HopperGemmTile::kRows, place.column};
}

// What is staged for the epilogue: 16 rows of a warp by 64 columns of its sums, as float. The gaps after 32 columns,
// 64, and 4 rows keep all accesses from meeting a bank twice: pairs at the places of an accumulator, and fours by lanes
// that are 8 columns apart, of one row, or of two that are 4 rows apart.
struct HopperGemmStaged {
  float* data;

  FASTFORMER_DEVICE static constexpr int place(int row, int column) {
    return row * HopperGemmTile::kStagedStride + row / 4 % 2 * 4 + column + column / 32 * 4;
  }
  FASTFORMER_DEVICE float* at(int row, int column) const { return data + place(row, column); }
};

// What becomes of a tile's sums: the epilogue's results, or parts of sums. A warp delivers its 16 rows in passes, each
// 8 columns a lane, which it makes between the steps of the next tile's products: while those run on the tensor cores,
// in accumulators of their own. The columns come in turns, which are staged together.
template <typename Shared, typename Epilogue>
class HopperGemmDelivery {
 public:
  static constexpr int kSums = Epilogue::kSums;
  static constexpr int kColumns = HopperGemmTile::kStagedColumns / kSums;  // of a turn, of each product
  static constexpr int kChunks = kColumns / kChunk, kRowsAtOnce = kWarp / kChunks;
  static constexpr int kTurnPasses = HopperGemmTile::kStagedRows / kRowsAtOnce;
  static constexpr int kTurns = HopperGemmTile::kColumns / kSums / kColumns, kPasses = kTurns * kTurnPasses;
  using Sums = Accumulator<1, HopperGemmTile::kColumns / 8>;

  FASTFORMER_DEVICE HopperGemmDelivery(const HopperGemmShape& shape, float* parts, float* column_sums,
                                       const Epilogue& epilogue)
      : shape_(shape), parts_(parts), column_sums_(column_sums), epilogue_(epilogue) {}

  FASTFORMER_DEVICE bool is_done() const { return pass_ == kPasses; }
  // Whether there is a pass to make now that `step` of the `steps` of a tile's products has begun.
  FASTFORMER_DEVICE bool is_due(int step, int steps) const {
    return (pass_ - kFind) * steps < (step + 1) * (kPasses - kFind);
  }

  // Takes over a tile's sums. The first turn is staged at once: its registers are enough for what a pass needs.
  FASTFORMER_DEVICE void begin(const Sums& sums, const HopperGemmWork& work) {
    TurnSums first;
#pragma unroll
    for (int turn = 0; turn < kTurns; ++turn) {
#pragma unroll
      for (int i = 0; i < kTurnTiles; ++i) {
        const int tile = i / kTiles * (Sums::kColumnTiles / kSums) + turn * kTiles + i % kTiles;
#pragma unroll
        for (int j = 0; j < 4; ++j) (turn == 0 ? first : kept_[turn - 1])[i][j] = sums.values[0][tile][j];
      }
    }
    stage(first);
    number_ = work.number;
    part_ = work.part;
    pass_ = kFind;
  }

  // Makes a pass; all lanes of the group call it, unless it is done.
  FASTFORMER_DEVICE void advance() {
    if (pass_ == kFind) return find();
#pragma unroll
    for (int turn = 1; turn < kTurns; ++turn) {
      if (pass_ == turn * kTurnPasses) stage(kept_[turn - 1]);  // of registers none can be chosen by a variable
    }
    const Words<Loaded> now = next_;
    const int pass = pass_, row = row_, column = column_;
    const bool delivers = exists();
    ++pass_;
    row_ += kRowsAtOnce;
    const bool ends_turn = pass_ % kTurnPasses == 0;
    if (ends_turn) {
      row_ -= HopperGemmTile::kStagedRows;
      column_ += kColumns;
    }
    load_next();  // this pass hides how long that takes
    if (delivers) deliver(pass, row, column, __builtin_bit_cast(Loaded, now));
    if constexpr (Epilogue::kSumsColumns) {
      if (ends_turn) end_turn(column);
    }
  }

 private:
  static constexpr int kFind = -1;

  // The pass before the first: divides for its place now that products are under way.
  FASTFORMER_DEVICE void find() {
    const TilePlace tile = tile_of<kSums>(shape_, number_, part_);
    row_ = tile.row + threadIdx.x / kWarp * HopperGemmTile::kStagedRows + lane_row();
    column_ = tile.column / kSums + lane_of() % kChunks * kChunk;
    pass_ = 0;
    load_next();
  }

  using Loaded = decltype(std::declval<const Epilogue&>().load(0, 0));

  FASTFORMER_DEVICE bool exists() const { return pass_ < kPasses && row_ < shape_.rows && column_ < shape_.columns; }
  FASTFORMER_DEVICE void load_next() {
    if (parts_ == nullptr && exists()) next_ = words_of(epilogue_.load(row_, column_));
  }
  // Of the rows of a pass, the lane's.
  FASTFORMER_DEVICE static int lane_row() { return kSums == 1 ? lane_of() / 8 : lane_of() / 8 + lane_of() / 4 % 2 * 4; }
  FASTFORMER_DEVICE static HopperGemmStaged staged() { return Shared::staged(threadIdx.x / kWarp); }

  static constexpr int kTiles = kColumns / 8, kTurnTiles = kSums * kTiles;  // of the accumulator, in a turn
  using TurnSums = float[kTurnTiles][4];

  FASTFORMER_DEVICE static void stage(const TurnSums& sums) {
    float* mine = staged().at(lane_of() / 4, lane_of() % 4 * 2);
    __syncwarp();  // the turn before has been read
#pragma unroll
    for (int i = 0; i < kTurnTiles; ++i) {
      float* to = mine + HopperGemmStaged::place(0, i * 8);
      store(to, Pack<float, 2>{sums[i][0], sums[i][1]});
      store(to + HopperGemmStaged::place(8, 0), Pack<float, 2>{sums[i][2], sums[i][3]});
    }
    __syncwarp();
  }

  FASTFORMER_DEVICE void deliver(int pass, int row, int column, const Loaded& loaded) {
    const int staged_row = lane_row() + pass % kTurnPasses * kRowsAtOnce;
    const int staged_column = lane_of() % kChunks * kChunk;
    float values[kSums][kChunk], mine[kChunk];
#pragma unroll
    for (float& x : mine) x = -0.0f;  // what is added to it stays as it is, and in its registers
#pragma unroll
    for (int k = 0; k < kSums; ++k) {
#pragma unroll
      for (int from = 0; from < kChunk; from += 4) {
        const auto half = load<4>(staged().at(staged_row, k * kColumns + staged_column + from));
#pragma unroll
        for (int j = 0; j < 4; ++j) values[k][from + j] = half.values[j];
      }
    }
    if (parts_ == nullptr) {
      epilogue_(row, column, values, loaded, mine);
      if constexpr (Epilogue::kSumsColumns) {  // they take the place of the sums
#pragma unroll
        for (int from = 0; from < kChunk; from += 4) {
          store(staged().at(staged_row, staged_column + from),
                Pack<float, 4>{mine[from], mine[from + 1], mine[from + 2], mine[from + 3]});
        }
      }
      return;
    }
#pragma unroll
    for (int i = 0; i < kSums; ++i) {
      const int64_t product = int64_t{part_} * kSums + i;
      const int64_t to = (product * shape_.rows + row) * shape_.columns + column;
      store_floats<true>(parts_ + to, values[i]);
    }
  }

  // Adds up what the epilogue has for the columns of a turn, over the group's rows. `column` is the lane's.
  FASTFORMER_DEVICE void end_turn(int column) {
    if (column_sums_ == nullptr) return;
    const int group = threadIdx.x / kWarpgroup, rank = threadIdx.x % kWarpgroup;
    const int rows = shape_.rows - (row_ - lane_row());
    __syncwarp();
#pragma unroll
    for (int i = 0; i < kColumns; i += kWarp) {
      float sum = 0.0f;
#pragma unroll
      for (int row = 0; row < HopperGemmTile::kStagedRows; ++row) {
        if (row < rows) sum += *staged().at(row, i + lane_of());
      }
      Shared::column_sums(threadIdx.x / kWarp)[i + lane_of()] = sum;
    }
    ptx::barrier_sync(1 + group, kWarpgroup);
    const int first_row = row_ - row_ % HopperGemmTile::kGroupRows;
    column += rank - lane_of() % kChunks * kChunk;
    if (rank < kColumns && first_row < shape_.rows && column < shape_.columns) {
      float total = 0.0f;
#pragma unroll
      for (int i = 0; i < kWarpgroup / kWarp; ++i) total += Shared::column_sums(group * kWarpgroup / kWarp + i)[rank];
      column_sums_[int64_t{first_row / HopperGemmTile::kGroupRows} * shape_.columns + column] = total;
    }
    ptx::barrier_sync(1 + group, kWarpgroup);  // they have been read
  }

  const HopperGemmShape& shape_;
  float *parts_, *column_sums_;
  const Epilogue& epilogue_;
  TurnSums kept_[kTurns - 1];          // of all turns but the first
  int number_, part_;                  // of the work
  int pass_ = kPasses, row_, column_;  // the next pass, and the lane's place in c
  Words<Loaded> next_;                 // what the epilogue loads for it
};

}  // namespace fastformer::cuda
