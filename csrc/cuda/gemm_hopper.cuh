// The matrix product as a kernel for Hopper, in files for sm_90a: wgmma on tiles that TMA brings. Blocks are
// persistent, and the epilogue of a tile runs while the tensor cores multiply the next one.
#pragma once

#include "gemm_hopper.h"
#include "tile_hopper.cuh"

namespace fastformer::cuda {

// The operands as HopperGemmOperands has them.
struct HopperGemmMaps {
  TensorMap a, second_a, b, second_b;
};

// A tile of an operand: kOuter rows of a (columns of b) by a step of the depth.
template <typename T, TileRows kRowsAre, int kOuter>
struct HopperOperandTile {
  static constexpr bool kOuterRows = kRowsAre == TileRows::outer;
  static constexpr int kDepth = HopperGemmTile::kDepth;
  using Tile = std::conditional_t<kOuterRows, PanelTile<T, kOuter, kDepth>, PanelTile<T, kDepth, kOuter>>;
  // Boxes are panels of a tile of a, or of half the rows of a tile of b.
  static constexpr int kHalfRows = Tile::kRows / 2;

  // Begins to copy a box of each panel to its rows from `first` on, in all `blocks` of the cluster.
  FASTFORMER_DEVICE static void load(const Tile& to, const TensorMap& map, Mbarrier* full, int outer, int depth,
                                     int first = 0, int blocks = 1) {
    const int column = kOuterRows ? depth : outer, row = (kOuterRows ? outer : depth) + first;
#pragma unroll
    for (int i = 0; i < Tile::kPanels; ++i) {
      T* panel = to.panel(i) + first * kPanel;
      if (blocks == 1) {
        ptx::tma_load(panel, map, full, {column + i * kPanel, row});
      } else {
        ptx::tma_load_to(panel, map, full, {column + i * kPanel, row}, (1 << blocks) - 1);
      }
    }
  }
  // 16 of its depth, for wgmma.
  FASTFORMER_DEVICE static uint64_t descriptor(const Tile& tile, int depth) {
    if constexpr (kOuterRows) {
      return tile.rows_at(0, depth);
    } else {
      return tile.columns_at(depth);
    }
  }
};

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

template <typename T, TileRows kRowsOfA, TileRows kRowsOfB>
struct HopperGemmShared {
  using Tile = HopperGemmTile;
  using OperandA = HopperOperandTile<T, kRowsOfA, Tile::kGroupRows>;  // of a group
  using OperandB = HopperOperandTile<T, kRowsOfB, Tile::kColumns>;
  using TileA = typename OperandA::Tile;
  using TileB = typename OperandB::Tile;
  using Stages = Ring<Tile::kStages, true>;
  static_assert(sizeof(Stages) == Tile::kBarriers * sizeof(Mbarrier));

  FASTFORMER_DEVICE static TileA a(int stage, int group) {
    return {shared_memory<T>() + stage * Tile::kStageElements + group * TileA::kElements};
  }
  FASTFORMER_DEVICE static TileB b(int stage) { return {a(stage, Tile::kGroups).data}; }
  FASTFORMER_DEVICE static HopperGemmStaged staged(int warp) {
    return {reinterpret_cast<float*>(a(Tile::kStages, 0).data) + warp * Tile::kStagedFloats};
  }
  FASTFORMER_DEVICE static float* column_sums(int warp) {
    return staged(Tile::kWarps).data + warp * Tile::kStagedColumns;
  }
  FASTFORMER_DEVICE static Stages& ring() { return *reinterpret_cast<Stages*>(column_sums(Tile::kWarps)); }
};

// What a cluster does at a time: a tile for each of its blocks, and a part of the depth.
struct HopperGemmWork {
  int number;  // part by part
  int part;
  int begin, end;  // steps
};

// Calls body(work) for all that this block's cluster does.
template <typename Body>
FASTFORMER_DEVICE void for_work(const HopperGemmShape& shape, Body body) {
  const int clusters = gridDim.x / shape.blocks;
  int part = 0;
  for (int number = blockIdx.x / shape.blocks; number < shape.tiles * shape.parts; number += clusters) {
    while (number >= (part + 1) * shape.tiles) ++part;  // to divide would take longer
    const int begin = part * shape.part_steps;
    body(HopperGemmWork{number, part, begin, min(begin + shape.part_steps, shape.steps)});
  }
}

// Where the block's tile begins; columns count those of both products.
template <int kSums>
FASTFORMER_DEVICE TilePlace tile_of(const HopperGemmShape& shape, int number, int part) {
  const int rows = (shape.rows + shape.blocks - 1) / shape.blocks;
  const TilePlace place = place_of<HopperGemmTile>(number - part * shape.tiles, rows, kSums * shape.columns);
  return {place.row * shape.blocks + ptx::cluster_rank() * HopperGemmTile::kRows, place.column};
}

// One thread asks for the operands, step by step, as stages become empty. Of two blocks, each brings half of b for
// both.
template <typename T, TileRows kRowsOfA, TileRows kRowsOfB, int kSums>
FASTFORMER_DEVICE void load_operands(const HopperGemmMaps& maps, const HopperGemmShape& shape) {
  using Shared = HopperGemmShared<T, kRowsOfA, kRowsOfB>;
  using OperandA = typename Shared::OperandA;
  using OperandB = typename Shared::OperandB;
  auto& ring = Shared::ring();
  typename Shared::Stages::Place place;
  const int rank = ptx::cluster_rank();
  static_assert(kSums == 1 || OperandB::kOuterRows);
  for_work(shape, [&](const HopperGemmWork& work) {
    const TilePlace tile = tile_of<kSums>(shape, work.number, work.part);
    const int row = tile.row, column = tile.column / kSums;
    for (int step = work.begin; step < work.end; ++step) {
      const bool second = step >= shape.first_steps;
      const int depth = (second ? step - shape.first_steps : step) * HopperGemmTile::kDepth;
      ring.begin_fill(place, HopperGemmTile::kStageElements * sizeof(T));
      Mbarrier* full = &ring.full[place.stage];
#pragma unroll
      for (int group = 0; group < HopperGemmTile::kGroups; ++group) {
        OperandA::load(Shared::a(place.stage, group), second ? maps.second_a : maps.a, full,
                       row + group * HopperGemmTile::kGroupRows, depth);
      }
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        if (shape.blocks == 2 && half != rank) continue;
        const int first = half * OperandB::kHalfRows;
        // With two factors, a half is the rows of one.
        const int outer = kSums == 2 ? column - first : column;
        const bool other = kSums == 2 ? half == 1 : second;
        OperandB::load(Shared::b(place.stage), other ? maps.second_b : maps.b, full, outer, depth, first, shape.blocks);
      }
      place.advance();
    }
  });
}

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
    const Words now = next_;
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
  struct Words {  // whole registers: elements of 16 bits would be taken apart from pass to pass
    uint32_t values[sizeof(Loaded) / 4];
  };

  FASTFORMER_DEVICE bool exists() const { return pass_ < kPasses && row_ < shape_.rows && column_ < shape_.columns; }
  FASTFORMER_DEVICE void load_next() {
    if (parts_ == nullptr && exists()) next_ = __builtin_bit_cast(Words, epilogue_.load(row_, column_));
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
  Words next_;                         // what the epilogue loads for it
};

// sums = a b over the steps, for the group's rows; all its threads call it. One step's products are under way while the
// next step's begin, and while `delivery` makes its passes.
template <typename Shared, typename T, TileRows kRowsOfA, TileRows kRowsOfB, typename Sums, typename Delivery>
FASTFORMER_DEVICE void multiply_steps(Sums& sums, typename Shared::Stages::Place& place, int steps, Delivery& delivery,
                                      int blocks) {
  const int group = threadIdx.x / kWarpgroup;
  auto& ring = Shared::ring();
#pragma unroll 1
  for (int step = 0; step < steps; ++step) {
    ring.wait_full(place);
    const auto a = Shared::a(place.stage, group);
    const auto b = Shared::b(place.stage);
    ptx::wgmma_fence(sums.values[0]);
#pragma unroll
    for (int depth = 0; depth < HopperGemmTile::kDepth; depth += 16) {
      ptx::wgmma<T, kRowsOfA == TileRows::depth, kRowsOfB == TileRows::depth>(
          sums.values[0], Shared::OperandA::descriptor(a, depth), Shared::OperandB::descriptor(b, depth),
          step > 0 || depth > 0);
    }
    ptx::wgmma_commit();
#pragma unroll 1
    while (delivery.is_due(step, steps)) delivery.advance();
    ptx::wgmma_wait<1>(sums.values[0]);
    if (step > 0) ring.release(place.before(), blocks);
    place.advance();
  }
  ptx::wgmma_wait<0>(sums.values[0]);
  ring.release(place.before(), blocks);
}

template <typename T, TileRows kRowsOfA, TileRows kRowsOfB, typename Epilogue>
__global__ void __launch_bounds__(HopperGemmTile::kThreads)
    gemm_hopper_kernel(const __grid_constant__ HopperGemmMaps maps, const __grid_constant__ HopperGemmShape shape,
                       float* parts,        // as gemm_kernel has them
                       float* column_sums,  // [groups of 64 rows, columns]: the epilogue's; or null
                       const __grid_constant__ Epilogue epilogue) {
  using Tile = HopperGemmTile;
  using Shared = HopperGemmShared<T, kRowsOfA, kRowsOfB>;
  if (threadIdx.x == 0) {
    Shared::ring().init(1, Tile::kWarps * shape.blocks);
    ptx::fence_mbarrier_init();
  }
  ptx::cluster_sync();
  if (threadIdx.x / kWarpgroup == Tile::kGroups) {
    ptx::fewer_registers<Tile::kLoadingRegisters>();
    if (threadIdx.x % kWarpgroup == 0) load_operands<T, kRowsOfA, kRowsOfB, Epilogue::kSums>(maps, shape);
    __syncwarp();  // cluster_sync is for whole warps
  } else {
    ptx::more_registers<Tile::kRegisters>();
    HopperGemmDelivery<Shared, Epilogue> delivery(shape, parts, column_sums, epilogue);
    Accumulator<1, Tile::kColumns / 8> sums;
    sums.fill(0.0f);
    typename Shared::Stages::Place stage;
    for_work(shape, [&](const HopperGemmWork& work) {
      multiply_steps<Shared, T, kRowsOfA, kRowsOfB>(sums, stage, work.end - work.begin, delivery, shape.blocks);
      delivery.begin(sums, work);
    });
#pragma unroll 1
    while (!delivery.is_done()) delivery.advance();
  }
  ptx::cluster_sync();  // a block's mbarriers are there until the other has arrived at them for the last time
}

// --- launcher

// Boxes of so many rows by a panel.
template <typename T>
TensorMap map_of(const Matrix<T>& matrix, int rows) {
  constexpr DType kType = __is_same(T, BFloat16) ? DType::bfloat16 : DType::float16;
  return tensor_map(Boxes<2>{
      matrix.data, kType, {matrix.columns, matrix.rows}, {1, matrix.stride}, {kPanel, rows}, Swizzle::bytes128});
}

template <typename T, TileRows kRowsOfA, TileRows kRowsOfB, typename Epilogue>
void launch_gemm_hopper(const HopperGemmOperands<T>& operands, const HopperGemmShape& shape, const GemmResults& results,
                        const Epilogue& epilogue, const OnDevice& device) {
  using Tile = HopperGemmTile;
  using Shared = HopperGemmShared<T, kRowsOfA, kRowsOfB>;
  constexpr int kRowsA = Shared::TileA::kRows, kRowsB = Shared::OperandB::kHalfRows;
  const HopperGemmMaps maps{map_of(operands.a, kRowsA), map_of(operands.second_a, kRowsA), map_of(operands.b, kRowsB),
                            map_of(operands.second_b, kRowsB)};
  const int64_t clusters =
      std::min<int64_t>(int64_t{shape.tiles} * shape.parts, device.multiprocessors() / shape.blocks);
  launch_clusters(gemm_hopper_kernel<T, kRowsOfA, kRowsOfB, Epilogue>, shape.blocks, grid_of(clusters * shape.blocks),
                  dim3(Tile::kThreads), Tile::kSharedBytes, device.stream, maps, shape, results.parts,
                  results.column_sums, epilogue);
}

}  // namespace fastformer::cuda
