// What the kernels for sm_90a share: tiles that TMA fills and wgmma reads, and the ring through which they come.
#pragma once

#include "ptx_hopper.cuh"
#include "tile.cuh"

namespace fastformer::cuda {

// Registers of a thread as a block that has a multiprocessor to itself begins. Warpgroups share out what there is: more
// for one are fewer for another.
constexpr int launch_registers(int threads) { return 65536 / threads / 8 * 8; }

constexpr int kPanel = 64;  // elements of a row of 128 bytes

// kRows x kColumns of T in panels of 64 columns, one behind the other, each as Swizzle::bytes128 lays out a box.
template <typename T, int kRows_, int kColumns_>
struct PanelTile {
  static_assert(sizeof(T) == 2 && kColumns_ % kPanel == 0 && kRows_ % 8 == 0);
  static constexpr int kRows = kRows_, kColumns = kColumns_, kChunks = kColumns / kChunk;
  static constexpr int kPanels = kColumns / kPanel, kElements = kRows * kColumns, kBytes = 2 * kElements;
  static constexpr int kPanelElements = kRows * kPanel;
  using Element = T;

  T* data;  // aligned to 1024 bytes

  FASTFORMER_DEVICE T* panel(int i) const { return data + i * kPanelElements; }
  // `column` is a multiple of 2, where 2 elements are accessed; of 8, where 8 are.
  FASTFORMER_DEVICE T* at(int row, int column) const {
    return SharedTile<T, kRows, kPanel>{panel(column / kPanel)}.at(row, column % kPanel);
  }

  // Operands of wgmma, 16 of the depth from `depth` on: rows with the depth along them, from first_row on,
  FASTFORMER_DEVICE uint64_t rows_at(int first_row, int depth) const {
    return matrix_descriptor(panel(depth / kPanel) + first_row * kPanel + depth % kPanel, 0, 8 * kPanel * 2);
  }
  // or all columns, where rows are steps of the depth.
  FASTFORMER_DEVICE uint64_t columns_at(int depth) const {
    return matrix_descriptor(data + depth * kPanel, kPanelElements * 2, 8 * kPanel * 2);
  }
};

// Where in a ring of kStages a thread is: the stage, and the parity of the phase of its mbarriers that is awaited next.
template <int kStages>
struct RingPlace {
  int stage = 0, parity = 0;

  FASTFORMER_DEVICE void advance() {
    if (++stage == kStages) {
      stage = 0;
      parity ^= 1;
    }
  }
  // To release what one was at before; that says nothing of the parity.
  FASTFORMER_DEVICE RingPlace before() const { return {stage == 0 ? kStages - 1 : stage - 1, 0}; }
};

// The mbarriers of a ring. A producer waits until a stage is empty, and has TMA fill it; consumers wait until it is
// full, and each of their warps says when it has read it: kOfCluster to all blocks of the cluster, whose producers fill
// each other's stages.
template <int kStages_, bool kOfCluster = false>
struct Ring {
  static constexpr int kStages = kStages_;
  using Place = RingPlace<kStages>;

  Mbarrier full[kStages], empty[kStages];

  // A stage is full when so many producers have arrived, begin_fill's thread among them, and the bytes.
  FASTFORMER_DEVICE void init(int producers, int consumer_warps) {
#pragma unroll
    for (int i = 0; i < kStages; ++i) {
      ptx::mbarrier_init(&full[i], producers);
      ptx::mbarrier_init(&empty[i], consumer_warps);
    }
  }
  FASTFORMER_DEVICE void wait_empty(const Place& place) { ptx::mbarrier_wait(&empty[place.stage], place.parity ^ 1); }
  // Once the stage is empty, `bytes` are to come.
  FASTFORMER_DEVICE void begin_fill(const Place& place, int bytes) {
    wait_empty(place);
    ptx::mbarrier_arrive_expect(&full[place.stage], bytes);
  }
  FASTFORMER_DEVICE void wait_full(const Place& place) { ptx::mbarrier_wait(&full[place.stage], place.parity); }
  // By all lanes of a warp; `blocks` are the cluster's.
  FASTFORMER_DEVICE void release(const Place& place, int blocks = 1) {
    const int lane = lane_of();
    if (lane >= blocks) return;
    if constexpr (kOfCluster) {
      ptx::mbarrier_arrive_at(&empty[place.stage], lane);
    } else {
      ptx::mbarrier_arrive(&empty[place.stage]);
    }
  }
};

}  // namespace fastformer::cuda
