// Each block stores its own numbers and those of its cluster, step by step. A producer loads a box of its own and a
// part of the cluster's box, which it sends to every block; two consumer warps store a box each, and say to every block
// that they have read it.
#include "launch.h"
#include "ptx_hopper.cuh"
#include "test_kernels.h"

namespace fastformer::cuda {
namespace {

enum class Bug {
  none,
  awaited_end,
  no_sync_after_init,
  init_after_sync,
  no_init_fence,
  empty_not_fenced,
  empty_of_one_block,
  released_to_itself,
  released_by_other,
  released_under_way,
  reads_by_threads,
  not_awaited_empty,
  not_awaited_full,
  expects_its_part,
  to_itself,
  to_nobody,
  to_one_more,
  release_to_one_more,
  release_not_shared,
  same_part,
  never_awaited,
  no_last_sync,
};

constexpr int kStages = 2, kConsumers = 64, kThreads = kWarp + kConsumers;
constexpr int kRows = 8, kColumns = 32, kElements = kRows * kColumns;
constexpr int kBoxBytes = kElements * static_cast<int>(sizeof(float));

struct Problem {
  TensorMap own, of_cluster;  // boxes of kRows rows, and of a block's part of them
  TensorMap stored;           // boxes of kRows rows of `out`
  float* out;                 // [blocks, steps, 2, kElements]
  int blocks, steps;          // blocks of a cluster
};

struct Shared {
  float boxes[2][kStages][kElements];  // of the block, and of its cluster
  Mbarrier full[kStages], empty[kStages];
};

template <Bug kBug>
FASTFORMER_DEVICE void make_mbarriers(Shared& shared, int blocks) {
  const bool few = kBug == Bug::released_to_itself || kBug == Bug::empty_of_one_block;
  const auto make_empty = [&] {
    for (auto& empty : shared.empty) ptx::mbarrier_init(&empty, kConsumers / kWarp * (few ? 1 : blocks));
  };
  for (auto& full : shared.full) ptx::mbarrier_init(&full, 1);
  if constexpr (kBug != Bug::empty_not_fenced) make_empty();
  if constexpr (kBug != Bug::no_init_fence) ptx::fence_mbarrier_init();
  if constexpr (kBug == Bug::empty_not_fenced) make_empty();
}

template <Bug kBug>
FASTFORMER_DEVICE void produce(const Problem& problem, Shared& shared) {
  const int rank = ptx::cluster_rank(), part = kRows / problem.blocks;
  const int row = blockIdx.x * problem.steps * kRows;
  const int row_of_cluster = blockIdx.x / problem.blocks * problem.steps * kRows;
  const int all = (1 << problem.blocks) - 1, itself = 1 << rank;
  const int to = kBug == Bug::to_itself     ? itself
                 : kBug == Bug::to_nobody   ? 0
                 : kBug == Bug::to_one_more ? all + (1 << problem.blocks)
                                            : all;
  const auto wait_empty = [&](int count) {
    Mbarrier* empty = &shared.empty[count % kStages];
    const int parity = count / kStages % 2 ^ 1;
    if constexpr (kBug != Bug::not_awaited_empty) ptx::mbarrier_wait(empty, parity);
  };
  const auto send = [&](int step, int stage) {
    const int first = kBug == Bug::same_part ? 0 : rank * part;
    ptx::tma_load_to(shared.boxes[1][stage] + first * kColumns, problem.of_cluster, &shared.full[stage],
                     {0, row_of_cluster + step * kRows + rank * part}, to);
  };
  for (int step = 0; step < problem.steps; ++step) {
    const int stage = step % kStages;
    wait_empty(step);
    ptx::mbarrier_arrive_expect(&shared.full[stage],
                                kBoxBytes + (kBug == Bug::expects_its_part ? kBoxBytes / problem.blocks : kBoxBytes));
    send(step, stage);
    ptx::tma_load(shared.boxes[0][stage], problem.own, &shared.full[stage], {0, row + step * kRows});  // its own
  }
  if constexpr (kBug == Bug::never_awaited) {
    wait_empty(problem.steps);
    send(0, problem.steps % kStages);
  }
  if constexpr (kBug == Bug::awaited_end) {
    for (int count = problem.steps; count < problem.steps + kStages; ++count) wait_empty(count);
  }
}

template <Bug kBug>
FASTFORMER_DEVICE void consume(const Problem& problem, Shared& shared) {
  const int lane = threadIdx.x % kWarp, which = threadIdx.x / kWarp - 1;
  for (int step = 0; step < problem.steps; ++step) {
    const int stage = step % kStages, parity = step / kStages % 2;
    if constexpr (kBug != Bug::not_awaited_full) ptx::mbarrier_wait(&shared.full[stage], parity);
    const float* box = shared.boxes[which][stage];
    const int number = (blockIdx.x * problem.steps + step) * 2 + which;
    float* out = problem.out + static_cast<int64_t>(number) * kElements;
    if constexpr (kBug == Bug::reads_by_threads) {
      for (int i = lane; i < kElements; i += kWarp) out[i] = box[i];  // by threads
    } else if (lane == 0) {
      ptx::tma_store(problem.stored, box, {0, number * kRows});
      ptx::tma_store_commit();
      if constexpr (kBug != Bug::released_under_way) ptx::tma_store_wait<0>();
    }
    if constexpr (kBug != Bug::released_by_other) __syncwarp();
    if constexpr (kBug == Bug::released_to_itself) {
      if (lane == 0) ptx::mbarrier_arrive_at(&shared.empty[stage], ptx::cluster_rank());
    } else {
      Mbarrier* empty = &shared.empty[stage];
      if constexpr (kBug == Bug::release_not_shared) empty = reinterpret_cast<Mbarrier*>(out);
      const bool one_more = kBug == Bug::release_to_one_more;
      if (lane < problem.blocks + one_more) ptx::mbarrier_arrive_at(empty, lane);  // to each block
    }
  }
  if constexpr (kBug == Bug::released_under_way) ptx::tma_store_wait<0>();
}

template <Bug kBug>
__global__ void store_by_clusters(const Problem problem) {
  Shared& shared = *shared_memory<Shared>();
  if constexpr (kBug == Bug::init_after_sync) ptx::cluster_sync();
  if (threadIdx.x == 0) make_mbarriers<kBug>(shared, problem.blocks);
  if constexpr (kBug == Bug::no_sync_after_init || kBug == Bug::init_after_sync) {
    __syncthreads();
  } else {
    ptx::cluster_sync();
  }
  if (threadIdx.x == 0) produce<kBug>(problem, shared);
  if (threadIdx.x >= kWarp) consume<kBug>(problem, shared);
  if constexpr (kBug != Bug::no_last_sync && kBug != Bug::awaited_end) ptx::cluster_sync();
}

// Tensors own [clusters, blocks, steps, kRows, kColumns], of_cluster [clusters, steps, kRows, kColumns] and out;
// numbers: clusters, blocks of each, and steps.
template <Bug kBug>
void run(const simt::TestArguments& arguments) {
  const int clusters = arguments.number(0), blocks = arguments.number(1), steps = arguments.number(2);
  const auto map = [&](int tensor, int boxes, int rows) {
    return tensor_map(Boxes<2>{arguments.tensor<float>(tensor),
                               DType::float32,
                               {kColumns, int64_t{kRows} * boxes * steps},
                               {1, kColumns},
                               {kColumns, rows},
                               Swizzle::none});
  };
  const Problem problem{map(0, clusters * blocks, kRows),
                        map(1, clusters, kRows / blocks),
                        map(2, clusters * blocks * 2, kRows),
                        arguments.tensor<float>(2),
                        blocks,
                        steps};
  launch_clusters(store_by_clusters<kBug>, blocks, clusters * blocks, kThreads, sizeof(Shared), nullptr, problem);
}

simt::TestKernel none("cluster_copies", &run<Bug::none>);
simt::TestKernel awaited_end("cluster_copies, awaited", &run<Bug::awaited_end>);
simt::TestKernel no_sync_after_init("cluster_copies: no sync after init", &run<Bug::no_sync_after_init>);
simt::TestKernel init_after_sync("cluster_copies: init after sync", &run<Bug::init_after_sync>);
simt::TestKernel no_init_fence("cluster_copies: no init fence", &run<Bug::no_init_fence>);
simt::TestKernel empty_not_fenced("cluster_copies: empty not fenced", &run<Bug::empty_not_fenced>);
simt::TestKernel empty_of_one_block("cluster_copies: empty of one block", &run<Bug::empty_of_one_block>);
simt::TestKernel released_to_itself("cluster_copies: released to itself", &run<Bug::released_to_itself>);
simt::TestKernel released_by_other("cluster_copies: released by other", &run<Bug::released_by_other>);
simt::TestKernel released_under_way("cluster_copies: released under way", &run<Bug::released_under_way>);
simt::TestKernel reads_by_threads("cluster_copies: reads by threads", &run<Bug::reads_by_threads>);
simt::TestKernel not_awaited_empty("cluster_copies: not awaited empty", &run<Bug::not_awaited_empty>);
simt::TestKernel not_awaited_full("cluster_copies: not awaited full", &run<Bug::not_awaited_full>);
simt::TestKernel expects_its_part("cluster_copies: expects its part", &run<Bug::expects_its_part>);
simt::TestKernel to_itself("cluster_copies: to itself", &run<Bug::to_itself>);
simt::TestKernel to_nobody("cluster_copies: to nobody", &run<Bug::to_nobody>);
simt::TestKernel to_one_more("cluster_copies: to one more", &run<Bug::to_one_more>);
simt::TestKernel release_to_one_more("cluster_copies: release to one more", &run<Bug::release_to_one_more>);
simt::TestKernel release_not_shared("cluster_copies: release not shared", &run<Bug::release_not_shared>);
simt::TestKernel same_part("cluster_copies: same part", &run<Bug::same_part>);
simt::TestKernel never_awaited("cluster_copies: never awaited", &run<Bug::never_awaited>);
simt::TestKernel no_last_sync("cluster_copies: no last sync", &run<Bug::no_last_sync>);

}  // namespace
}  // namespace fastformer::cuda
