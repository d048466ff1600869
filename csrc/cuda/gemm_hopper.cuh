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

  // Begins to copy it.
  FASTFORMER_DEVICE static void load(const Tile& to, const TensorMap& map, Mbarrier* full, int outer, int depth) {
#pragma unroll
    for (int i = 0; i < Tile::kPanels; ++i) {
      if constexpr (kOuterRows) {
        ptx::tma_load(to.panel(i), map, full, {depth + i * kPanel, outer});
      } else {
        ptx::tma_load(to.panel(i), map, full, {outer + i * kPanel, depth});
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
  using Stages = Ring<Tile::kStages>;
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

// A tile of c and a part of the depth: what a block does at a time.
struct HopperGemmWork {
  int row, column;       // where the tile begins; the column of b
  int part, begin, end;  // begin, end: steps
};

template <int kSums>
FASTFORMER_DEVICE HopperGemmWork work_of(const HopperGemmShape& shape, int number) {
  const int part = number / shape.tiles, begin = part * shape.part_steps;
  const TilePlace place = place_of<HopperGemmTile>(number % shape.tiles, shape.rows, kSums * shape.columns);
  return {static_cast<int>(place.row), static_cast<int>(place.column), part, begin,
          min(begin + shape.part_steps, shape.steps)};
}

// Calls body(work) for all that this block does.
template <int kSums, typename Body>
FASTFORMER_DEVICE void for_work(const HopperGemmShape& shape, Body body) {
  for (int number = blockIdx.x; number < shape.tiles * shape.parts; number += gridDim.x) {
    body(work_of<kSums>(shape, number));
  }
}

// One thread asks for all operands, step by step, as stages become empty.
template <typename T, TileRows kRowsOfA, TileRows kRowsOfB, int kSums>
FASTFORMER_DEVICE void load_operands(const HopperGemmMaps& maps, const HopperGemmShape& shape) {
  using Shared = HopperGemmShared<T, kRowsOfA, kRowsOfB>;
  using OperandA = typename Shared::OperandA;
  using OperandB = HopperOperandTile<T, kRowsOfB, HopperGemmTile::kColumns / kSums>;
  auto& ring = Shared::ring();
  typename Shared::Stages::Place place;
  for_work<kSums>(shape, [&](const HopperGemmWork& work) {
    const int row = work.row, column = work.column / kSums;
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
      const typename OperandB::Tile b{Shared::b(place.stage).data};
      OperandB::load(b, second ? maps.second_b : maps.b, full, column, depth);
      if constexpr (kSums == 2) OperandB::load({b.data + b.kElements}, maps.second_b, full, column, depth);
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
    pass_ = 0;
    part_ = work.part;
    row_ = work.row + threadIdx.x / kWarp * HopperGemmTile::kStagedRows + lane_row();
    column_ = work.column / kSums + lane_of() % kChunks * kChunk;
    load_next();
  }

  // Makes a pass; all lanes of the group call it, unless it is done.
  FASTFORMER_DEVICE void advance() {
#pragma unroll
    for (int turn = 1; turn < kTurns; ++turn) {
      if (pass_ == turn * kTurnPasses) stage(kept_[turn - 1]);  // of registers none can be chosen by a variable
    }
    if (exists()) deliver();
    ++pass_;
    row_ += kRowsAtOnce;
    if (pass_ % kTurnPasses == 0) {
      row_ -= HopperGemmTile::kStagedRows;
      if constexpr (Epilogue::kSumsColumns) end_turn();
      column_ += kColumns;
    }
    load_next();
  }

 private:
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

  FASTFORMER_DEVICE void deliver() {
    const int staged_row = lane_row() + pass_ % kTurnPasses * kRowsAtOnce;
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
      epilogue_(row_, column_, values, __builtin_bit_cast(Loaded, next_), mine);
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
      const int64_t to = ((int64_t{part_} * kSums + i) * shape_.rows + row_) * shape_.columns + column_;
      store_floats<true>(parts_ + to, values[i]);
    }
  }

  // Adds up what the epilogue has for the columns of a turn, over the group's rows.
  FASTFORMER_DEVICE void end_turn() {
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
    const int column = column_ - lane_of() % kChunks * kChunk + rank;
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
  TurnSums kept_[kTurns - 1];                 // of all turns but the first
  int pass_ = kPasses, part_, row_, column_;  // the next pass, and the lane's place in c
  Words next_;                                // what the epilogue loads for it
};

// sums = a b over the steps, for the group's rows; all its threads call it. One step's products are under way while the
// next step's begin, and while `delivery` makes its passes.
template <typename Shared, typename T, TileRows kRowsOfA, TileRows kRowsOfB, typename Sums, typename Delivery>
FASTFORMER_DEVICE void multiply_steps(Sums& sums, typename Shared::Stages::Place& place, int steps,
                                      Delivery& delivery) {
  const int group = threadIdx.x / kWarpgroup, passes = (Delivery::kPasses + steps - 1) / steps;  // of a step
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
    for (int i = 0; i < passes && !delivery.is_done(); ++i) delivery.advance();
    ptx::wgmma_wait<1>(sums.values[0]);
    if (step > 0) ring.release(place.before());
    place.advance();
  }
  ptx::wgmma_wait<0>(sums.values[0]);
  ring.release(place.before());
}

template <typename T, TileRows kRowsOfA, TileRows kRowsOfB, typename Epilogue>
__global__ void __launch_bounds__(HopperGemmTile::kThreads)
    gemm_hopper_kernel(const __grid_constant__ HopperGemmMaps maps, const __grid_constant__ HopperGemmShape shape,
                       float* parts,        // as gemm_kernel has them
                       float* column_sums,  // [groups of 64 rows, columns]: the epilogue's; or null
                       const __grid_constant__ Epilogue epilogue) {
  using Tile = HopperGemmTile;
  using Shared = HopperGemmShared<T, kRowsOfA, kRowsOfB>;
  constexpr int kSums = Epilogue::kSums;
  if (threadIdx.x == 0) {
    Shared::ring().init(1, Tile::kWarps);
    ptx::fence_mbarrier_init();
  }
  __syncthreads();
  if (threadIdx.x / kWarpgroup == Tile::kGroups) {
    ptx::fewer_registers<Tile::kLoadingRegisters>();
    if (threadIdx.x % kWarpgroup == 0) load_operands<T, kRowsOfA, kRowsOfB, kSums>(maps, shape);
    return;
  }
  ptx::more_registers<Tile::kRegisters>();
  HopperGemmDelivery<Shared, Epilogue> delivery(shape, parts, column_sums, epilogue);
  Accumulator<1, Tile::kColumns / 8> sums;
  sums.fill(0.0f);
  typename Shared::Stages::Place stage;
  for_work<kSums>(shape, [&](const HopperGemmWork& work) {
    multiply_steps<Shared, T, kRowsOfA, kRowsOfB>(sums, stage, work.end - work.begin, delivery);
    delivery.begin(sums, work);
  });
#pragma unroll 1
  while (!delivery.is_done()) delivery.advance();
}

// --- launcher

// Boxes of a step of the depth by outer_rows, or of a step by a panel.
template <TileRows kRowsAre, typename T>
TensorMap map_of(const Matrix<T>& matrix, int outer_rows) {
  constexpr DType kType = __is_same(T, BFloat16) ? DType::bfloat16 : DType::float16;
  return tensor_map(Boxes<2>{matrix.data,
                             kType,
                             {matrix.columns, matrix.rows},
                             {1, matrix.stride},
                             {kPanel, kRowsAre == TileRows::outer ? outer_rows : HopperGemmTile::kDepth},
                             Swizzle::bytes128});
}

template <typename T, TileRows kRowsOfA, TileRows kRowsOfB, typename Epilogue>
void launch_gemm_hopper(const HopperGemmOperands<T>& operands, const HopperGemmShape& shape, const GemmResults& results,
                        const Epilogue& epilogue, const OnDevice& device) {
  using Tile = HopperGemmTile;
  constexpr int kColumns = Tile::kColumns / Epilogue::kSums;
  const HopperGemmMaps maps{map_of<kRowsOfA>(operands.a, Tile::kGroupRows),
                            map_of<kRowsOfA>(operands.second_a, Tile::kGroupRows),
                            map_of<kRowsOfB>(operands.b, kColumns), map_of<kRowsOfB>(operands.second_b, kColumns)};
  const int64_t blocks = std::min<int64_t>(int64_t{shape.tiles} * shape.parts, device.multiprocessors());
  launch(gemm_hopper_kernel<T, kRowsOfA, kRowsOfB, Epilogue>, grid_of(blocks), dim3(Tile::kThreads), Tile::kSharedBytes,
         device.stream, maps, shape, results.parts, results.column_sums, epilogue);
}

}  // namespace fastformer::cuda
