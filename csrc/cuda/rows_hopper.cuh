// Rows over the blocks of a cluster: a team's sums and maxima through distributed shared memory.
#pragma once

#include "ptx_hopper.cuh"
#include "rows.cuh"

namespace fastformer::cuda {

// In a block a thread has columns of the block's part of the row, as if that were a row.
template <>
class Team<kCluster> : public Team<kBlock> {
 public:
  static constexpr int kSharedBytes = kClusterSharedBytes;

  FASTFORMER_DEVICE explicit Team(const Parts& parts)
      : blocks_(parts.blocks), part_(ptx::cluster_rank()), part_columns_(static_cast<int>(parts.columns)) {
    ptx::cluster_sync();  // all blocks have begun: their shared memory may be written
  }
  FASTFORMER_DEVICE int64_t row() const { return blockIdx.x / blocks_; }
  FASTFORMER_DEVICE int first_column() const { return part_ * part_columns_; }
  FASTFORMER_DEVICE bool is_first() const { return part_ == 0 && rank() == 0; }

  FASTFORMER_DEVICE float sum(float x) {
    return over_cluster(Team<kBlock>::sum(x), [](float a, float b) { return a + b; });
  }
  FASTFORMER_DEVICE float max(float x) {
    return over_cluster(Team<kBlock>::max(x), [](float a, float b) { return fmaxf(a, b); });
  }

 private:
  // x: what the block's threads have in common. Two halves of scratch memory take turns, as in the block. After the
  // last barrier no block touches another's memory, so a block may end then.
  template <typename Combine>
  FASTFORMER_DEVICE float over_cluster(float x, Combine combine) {
    float* each_block = shared_memory<float>() + Team<kBlock>::kSharedBytes / sizeof(float) + turn_ * kMostBlocks;
    turn_ ^= 1;
    if (rank() < blocks_) ptx::of_block(each_block, rank())[part_] = x;
    ptx::cluster_sync();
    x = each_block[0];
#pragma unroll 1
    for (int i = 1; i < blocks_; ++i) x = combine(x, each_block[i]);
    return x;
  }

  int blocks_, part_, part_columns_;
  int turn_ = 0;
};

}  // namespace fastformer::cuda
