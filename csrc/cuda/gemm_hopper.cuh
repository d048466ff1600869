// The matrix product as a kernel for Hopper, in files for sm_90a: wgmma on tiles that TMA brings. Blocks are
// persistent, and the epilogue of a tile runs while the tensor cores multiply the next one.
#pragma once

#include "gemm_hopper_delivery.cuh"

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

// Calls body(work) for all that this block's cluster does.
template <typename Body>
FASTFORMER_DEVICE void for_work(const HopperGemmShape& shape, Body body) {
  const int clusters = gridDim.x / shape.blocks;
  int part = 0;
  for (int number = blockIdx.x / shape.blocks; number < shape.tiles * shape.parts; number += clusters) {
    while (number >= (part + 1) * shape.tiles) ++part;
    const int begin = part * shape.part_steps;
    body(HopperGemmWork{number, part, begin, min(begin + shape.part_steps, shape.steps)});
  }
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
