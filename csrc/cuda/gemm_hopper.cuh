// The matrix product as a kernel for Hopper, in files for sm_90a: wgmma on tiles that TMA brings. Blocks are
// persistent; while their consumers are at the epilogue of a tile, the next one's operands come.
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

// What is staged for the epilogue: 16 rows of a warp by 64 columns of its sums, as float. Within each 32 columns chunks
// are swapped by the row, and the halves of a chunk, so that neither kind of access meets a bank twice.
struct HopperGemmStaged {
  float* data;

  FASTFORMER_DEVICE float* at(int row, int column) const {
    const int swap = row % 4 * kChunk + (row + column / 32) % 2 * 4;
    return data + row * HopperGemmTile::kStagedColumns + (column ^ swap);
  }
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

// sums = a b over the steps, for the group's rows; all its threads call it. One step's products are under way while the
// next step's begin.
template <typename Shared, typename T, TileRows kRowsOfA, TileRows kRowsOfB, typename Sums>
FASTFORMER_DEVICE void multiply_steps(Sums& sums, typename Shared::Stages::Place& place, int group, int steps) {
  auto& ring = Shared::ring();
  auto last = place;
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
    ptx::wgmma_wait<1>(sums.values[0]);
    if (step > 0) ring.release(last);
    last = place;
    place.advance();
  }
  ptx::wgmma_wait<0>(sums.values[0]);
  ring.release(last);
}

// Calls apply(row, column, values, loaded) as deliver() does (gemm.cuh), for the warp's 16 rows of c from first_row on,
// where `loaded` is what load() returned kAhead calls earlier. The columns come in turns, which are staged together;
// after each all lanes call end_turn(the first of its columns).
template <int kSums, typename Sums, typename Load, typename Apply, typename EndTurn>
FASTFORMER_DEVICE void deliver_rows(const Sums& sums, const HopperGemmStaged& staged, int first_row, int first_column,
                                    int rows, int columns, Load load_for, Apply apply, EndTurn end_turn) {
  constexpr int kColumns = HopperGemmTile::kStagedColumns / kSums, kTiles = kColumns / 8;  // of a turn, of each product
  constexpr int kTurns = Sums::kColumnTiles / kSums / kTiles;
  constexpr int kChunks = kColumns / kChunk, kRowsAtOnce = kWarp / kChunks;
  using Loaded = decltype(load_for(first_row, first_column));
  constexpr int kPasses = HopperGemmTile::kStagedRows / kRowsAtOnce;  // of a turn
  constexpr int kAhead = 32 / sizeof(Loaded);                         // 8 registers, of those that the sums leave
  static_assert(kPasses % kAhead == 0);
  const int lane = lane_of(), my_row = lane / kChunks, my_column = lane % kChunks * kChunk;
  const auto row_of = [&](int pass) { return first_row + my_row + pass % kPasses * kRowsAtOnce; };
  const auto column_of = [&](int pass) { return first_column + my_column + pass / kPasses * kColumns; };
  const auto exists = [&](int pass) {
    return pass < kTurns * kPasses && row_of(pass) < rows && column_of(pass) < columns;
  };
  struct Words {  // whole registers: elements of 16 bits would be taken apart from pass to pass
    uint32_t values[sizeof(Loaded) / 4];
  };
  const auto load_words = [&](int pass) { return __builtin_bit_cast(Words, load_for(row_of(pass), column_of(pass))); };
  Words next[kAhead]{};
#pragma unroll
  for (int i = 0; i < kAhead; ++i) {
    if (exists(i)) next[i] = load_words(i);
  }
#pragma unroll 1
  for (int turn = 0; turn < kTurns; ++turn) {
    __syncwarp();  // the turn before has been read
#pragma unroll
    for (int each = 0; each < kTurns; ++each) {
      if (each != turn) continue;  // of registers none can be chosen by a variable
#pragma unroll
      for (int i = 0; i < kSums * kTiles; ++i) {
        const int tile = i / kTiles * (Sums::kColumnTiles / kSums) + each * kTiles + i % kTiles;
        const float (&value)[4] = sums.values[0][tile];
        const int to = i * 8 + lane % 4 * 2;
        store(staged.at(lane / 4, to), Pack<float, 2>{value[0], value[1]});
        store(staged.at(lane / 4 + 8, to), Pack<float, 2>{value[2], value[3]});
      }
    }
    __syncwarp();
#pragma unroll 1
    for (int first = turn * kPasses; first < (turn + 1) * kPasses; first += kAhead) {
#pragma unroll
      for (int i = 0; i < kAhead; ++i) {
        const int pass = first + i;
        const auto loaded = __builtin_bit_cast(Loaded, next[i]);
        if (exists(pass + kAhead)) next[i] = load_words(pass + kAhead);
        if (!exists(pass)) continue;
        float values[kSums][kChunk];
#pragma unroll
        for (int k = 0; k < kSums; ++k) {
#pragma unroll
          for (int from = 0; from < kChunk; from += 4) {
            const int row = my_row + pass % kPasses * kRowsAtOnce;
            const auto half = load<4>(staged.at(row, k * kColumns + my_column + from));
#pragma unroll
            for (int j = 0; j < 4; ++j) values[k][from + j] = half.values[j];
          }
        }
        apply(row_of(pass), column_of(pass), values, loaded);
      }
    }
    end_turn(first_column + turn * kColumns);
  }
}

// Adds up what the lanes of a group have for the columns of a turn, of which `left` exist, and begins anew.
template <typename Shared>
FASTFORMER_DEVICE void store_column_sums(float* to, int left, float (&mine)[kChunk], int group) {
  constexpr int kColumns = HopperGemmTile::kStagedColumns, kChunks = kColumns / kChunk;
  const int lane = lane_of(), rank = threadIdx.x % kWarpgroup;
  sum_over_rows<kChunks>(mine);
  if (lane < kChunks) store_floats<true>(Shared::column_sums(threadIdx.x / kWarp) + lane * kChunk, mine);
#pragma unroll
  for (int i = 0; i < kChunk; ++i) mine[i] = 0.0f;
  ptx::barrier_sync(1 + group, kWarpgroup);
  if (rank < at_most(kColumns, left)) {
    float total = 0.0f;
#pragma unroll
    for (int i = 0; i < kWarpgroup / kWarp; ++i) total += Shared::column_sums(group * kWarpgroup / kWarp + i)[rank];
    to[rank] = total;
  }
  ptx::barrier_sync(1 + group, kWarpgroup);  // they have been read
}

template <typename T, TileRows kRowsOfA, TileRows kRowsOfB, typename Epilogue>
__global__ void __launch_bounds__(HopperGemmTile::kThreads)
    gemm_hopper_kernel(const __grid_constant__ HopperGemmMaps maps, const HopperGemmShape shape,
                       float* parts,        // as gemm_kernel has them
                       float* column_sums,  // [groups of 64 rows, columns]: the epilogue's; or null
                       const Epilogue epilogue) {
  using Tile = HopperGemmTile;
  using Shared = HopperGemmShared<T, kRowsOfA, kRowsOfB>;
  constexpr int kSums = Epilogue::kSums;
  if (threadIdx.x == 0) {
    Shared::ring().init(1, Tile::kWarps);
    ptx::fence_mbarrier_init();
  }
  __syncthreads();
  const int group = threadIdx.x / kWarpgroup, warp = threadIdx.x / kWarp;
  if (group == Tile::kGroups) {
    ptx::fewer_registers<Tile::kLoadingRegisters>();
    if (threadIdx.x % kWarpgroup == 0) load_operands<T, kRowsOfA, kRowsOfB, kSums>(maps, shape);
    return;
  }
  ptx::more_registers<Tile::kRegisters>();
  Accumulator<1, Tile::kColumns / 8> sums;
  sums.fill(0.0f);
  const HopperGemmStaged staged = Shared::staged(warp);
  typename Shared::Stages::Place stage;
  for_work<kSums>(shape, [&](const HopperGemmWork& work) {
    multiply_steps<Shared, T, kRowsOfA, kRowsOfB>(sums, stage, group, work.end - work.begin);
    using Loaded = decltype(epilogue.load(0, 0));
    float mine[kChunk] = {};
    const int group_row = work.row + group * Tile::kGroupRows;
    deliver_rows<kSums>(
        sums, staged, group_row + warp % 4 * HopperGemmTile::kStagedRows, work.column / kSums, shape.rows,
        shape.columns, [&](int row, int column) { return parts == nullptr ? epilogue.load(row, column) : Loaded{}; },
        [&](int row, int column, float (&values)[kSums][kChunk], const Loaded& loaded) {
          if (parts == nullptr) return epilogue(row, column, values, loaded, mine);
#pragma unroll
          for (int i = 0; i < kSums; ++i) {
            const int64_t to = ((int64_t{work.part} * kSums + i) * shape.rows + row) * shape.columns + column;
            store_floats<true>(parts + to, values[i]);
          }
        },
        [&](int first_column) {
          if constexpr (Epilogue::kSumsColumns) {
            if (column_sums == nullptr) return;
            const int left = group_row < shape.rows ? shape.columns - first_column : 0;
            float* to = column_sums + int64_t{group_row / Tile::kGroupRows} * shape.columns + first_column;
            store_column_sums<Shared>(to, left, mine, group);
          }
        });
  });
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
