// Each cluster has a row, of which a block has `width` numbers: out = the row over its sum, and shifted = the numbers
// of the next block. Every block tells the others its sum by writing it to their shared memory.
#include "launch.h"
#include "ptx_hopper.cuh"
#include "test_kernels.h"

namespace fastformer::cuda {
namespace {

enum class Bug {
  none,
  no_first_sync,
  no_sync,
  block_barrier,
  no_last_sync,
  no_sync_before_reuse,
  wrong_rank,
  wrong_slot,
  wrong_block,
  not_shared,
  beyond_shared,
  unwritten,
  thread_ended,
  block_ended,
  half_warps,
  not_all,
  copies_to_peer,
};

constexpr int kMostBlocks = 8;

template <Bug kBug>
__global__ void normalise(const float* in, float* out, float* shifted, int blocks, int rows, int width) {
  float* sums = shared_memory<float>();  // of all blocks
  float* mine = sums + kMostBlocks;
  const int thread = threadIdx.x, threads = blockDim.x, rank = ptx::cluster_rank();
  const int next = kBug == Bug::wrong_rank ? rank + 1 : (rank + 1) % blocks;
  for (int row = 0; row < rows; ++row) {
    const int64_t begin = (static_cast<int64_t>(row) * gridDim.x + blockIdx.x) * width;
    for (int i = thread; i < width; i += threads) mine[i] = in[begin + i];
    if constexpr (kBug == Bug::thread_ended) {
      if (rank == 1 && thread == 3) return;
    }
    if constexpr (kBug == Bug::block_ended) {
      if (rank == 1) return;
    }
    if constexpr (kBug == Bug::not_all) {
      if (rank == 1 && thread < kWarp) ptx::barrier_sync(1, 64);  // of one warp
    }
    if constexpr (kBug == Bug::no_first_sync) {
      __syncthreads();
    } else if (kBug == Bug::half_warps && thread < 16) {
      ptx::cluster_sync();  // of half a warp
    } else {
      ptx::cluster_sync();  // the first
    }
    if (thread < blocks) {
      float sum = 0.0f;
      for (int i = 0; i < width; ++i) sum += mine[i];
      const float* of = kBug == Bug::not_shared ? out : sums;
      float* slots = const_cast<float*>(ptx::of_block(of, thread));
      slots[kBug == Bug::wrong_slot ? 0 : rank] = sum;  // to each block
    }
    if constexpr (kBug == Bug::copies_to_peer) ptx::cp_async<4>(ptx::of_block(mine, next), in, true);
    if constexpr (kBug == Bug::block_barrier) {
      __syncthreads();
    } else if constexpr (kBug != Bug::no_sync) {
      ptx::cluster_sync();
    }
    float total = 0.0f;
    for (int i = 0; i < blocks + (kBug == Bug::unwritten); ++i) {
      total += kBug == Bug::unwritten ? ptx::of_block(sums, next)[i] : sums[i];  // of each block
    }
    const float* theirs = kBug == Bug::wrong_block ? mine : ptx::of_block(mine, next);
    for (int i = thread; i < width; i += threads) {
      out[begin + i] = mine[i] / total;
      shifted[begin + i] = theirs[i + (kBug == Bug::beyond_shared)];  // of the neighbour
    }
    const bool last = row + 1 == rows;
    if (kBug == Bug::no_last_sync ? !last : kBug != Bug::no_sync_before_reuse || last) ptx::cluster_sync();
  }
}

template <Bug kBug>
void run(const simt::TestArguments& arguments) {
  const int blocks = arguments.number(0), clusters = arguments.number(1), rows = arguments.number(2);
  const int width = arguments.number(3), threads = arguments.number(4);
  launch_clusters(normalise<kBug>, blocks, blocks * clusters, threads, (kMostBlocks + width) * sizeof(float), nullptr,
                  arguments.tensor<const float>(0), arguments.tensor<float>(1), arguments.tensor<float>(2), blocks,
                  rows, width);
}

simt::TestKernel none("cluster", &run<Bug::none>);
simt::TestKernel no_first_sync("cluster: no first sync", &run<Bug::no_first_sync>);
simt::TestKernel no_sync("cluster: no sync", &run<Bug::no_sync>);
simt::TestKernel block_barrier("cluster: block's barrier", &run<Bug::block_barrier>);
simt::TestKernel no_last_sync("cluster: no last sync", &run<Bug::no_last_sync>);
simt::TestKernel no_sync_before_reuse("cluster: no sync before reuse", &run<Bug::no_sync_before_reuse>);
simt::TestKernel wrong_rank("cluster: wrong rank", &run<Bug::wrong_rank>);
simt::TestKernel wrong_slot("cluster: wrong slot", &run<Bug::wrong_slot>);
simt::TestKernel wrong_block("cluster: wrong block", &run<Bug::wrong_block>);
simt::TestKernel not_shared("cluster: not shared", &run<Bug::not_shared>);
simt::TestKernel beyond_shared("cluster: beyond shared", &run<Bug::beyond_shared>);
simt::TestKernel unwritten("cluster: unwritten", &run<Bug::unwritten>);
simt::TestKernel thread_ended("cluster: thread ended", &run<Bug::thread_ended>);
simt::TestKernel block_ended("cluster: block ended", &run<Bug::block_ended>);
simt::TestKernel half_warps("cluster: half warps", &run<Bug::half_warps>);
simt::TestKernel not_all("cluster: not all", &run<Bug::not_all>);
simt::TestKernel copies_to_peer("cluster: copies to peer", &run<Bug::copies_to_peer>);

// --- one block reads of another, and nobody of it

enum class Reads { its_neighbour, after_neighbours_barrier, its_neighbour_too_late };

// out = what block 1 of each cluster wrote to its shared memory.
template <Reads kReads>
__global__ void read_second(float* out) {
  float* shared = shared_memory<float>();
  const int rank = ptx::cluster_rank();
  shared[threadIdx.x] = static_cast<float>(blockIdx.x);
  if (kReads == Reads::after_neighbours_barrier && rank == 1) __syncthreads();
  ptx::cluster_sync();
  if (rank == 0) out[blockIdx.x * blockDim.x + threadIdx.x] = ptx::of_block(shared, 1)[threadIdx.x];  // of block 1
  if constexpr (kReads != Reads::its_neighbour_too_late) ptx::cluster_sync();
}

// Block 0 writes to global memory what the others read; through it, blocks of one cluster only.
template <bool kOfCluster>
__global__ void pass_on(float* out, float* passed) {
  const int rank = ptx::cluster_rank();
  if (threadIdx.x == 0 && (kOfCluster ? rank : static_cast<int>(blockIdx.x)) == 0) out[blockIdx.x] = 3.0f;
  ptx::cluster_sync();
  passed[blockIdx.x * blockDim.x + threadIdx.x] = out[kOfCluster ? blockIdx.x - rank : 0];  // of a block before
}

__global__ void meet() { ptx::cluster_sync(); }

template <Reads kReads>
void run_read(const simt::TestArguments& arguments) {
  const int threads = arguments.number(4);
  launch_clusters(read_second<kReads>, 2, 4, threads, threads * sizeof(float), nullptr, arguments.tensor<float>(1));
}

template <bool kOfCluster>
void run_pass(const simt::TestArguments& arguments) {
  launch_clusters(pass_on<kOfCluster>, 4, 8, 32, 0, nullptr, arguments.tensor<float>(1), arguments.tensor<float>(2));
}

void run_meet(const simt::TestArguments& arguments) {
  launch_clusters(meet, arguments.number(0), arguments.number(1), arguments.number(2), 0, nullptr);
}

simt::TestKernel read("cluster read", &run_read<Reads::its_neighbour>);
simt::TestKernel read_after("cluster read, after a barrier", &run_read<Reads::after_neighbours_barrier>);
simt::TestKernel read_late("cluster read: too late", &run_read<Reads::its_neighbour_too_late>);
simt::TestKernel pass("cluster pass", &run_pass<true>);
simt::TestKernel pass_far("cluster pass: to another", &run_pass<false>);
simt::TestKernel meets("cluster launch", &run_meet);

}  // namespace
}  // namespace fastformer::cuda
