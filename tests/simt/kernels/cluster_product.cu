// c = a b^T by clusters of two blocks of a producer and a consumer warpgroup: each block has 64 rows of a, loads one
// half of b's rows, and sends it to both. Results leave through shared memory, by TMA.
#include "launch.h"
#include "ptx_hopper.cuh"
#include "test_kernels.h"

namespace fastformer::cuda {
namespace {

enum class Bug { none, released_before_wait, released_to_itself, no_proxy_fence, no_store_wait, sent_first, adds };

constexpr int kBlocks = 2, kRows = 64, kColumns = 128, kStep = 64, kStages = 2, kThreads = 2 * kWarpgroup;
constexpr int kPattern = 8 * 128;  // of the swizzle
constexpr int kHalf = kColumns / kBlocks;

struct Problem {
  TensorMap a, b, c;  // boxes of kRows rows, of kHalf, and of kRows
  int steps;
};

struct alignas(1024) Shared {
  uint16_t a[kStages][kRows * kStep], b[kStages][kColumns * kStep];
  float c[kRows * kColumns];
  Mbarrier full[kStages], empty[kStages];
};
constexpr int kStageBytes = static_cast<int>(sizeof(Shared::a) + sizeof(Shared::b)) / kStages;

template <Bug kBug>
FASTFORMER_DEVICE void produce(const Problem& problem, Shared& shared) {
  const int rank = ptx::cluster_rank();
  for (int step = 0; step < problem.steps; ++step) {
    const int stage = step % kStages;
    const auto wait_empty = [&] { ptx::mbarrier_wait(&shared.empty[stage], step / kStages % 2 ^ 1); };
    if constexpr (kBug != Bug::sent_first) wait_empty();
    ptx::tma_load_to(shared.b[stage] + rank * kHalf * kStep, problem.b, &shared.full[stage],
                     {step * kStep, rank * kHalf}, (1 << kBlocks) - 1);
    if constexpr (kBug == Bug::sent_first) wait_empty();
    ptx::mbarrier_arrive_expect(&shared.full[stage], kStageBytes);
    ptx::tma_load(shared.a[stage], problem.a, &shared.full[stage],
                  {step * kStep, static_cast<int>(blockIdx.x) * kRows});
  }
}

template <Bug kBug>
FASTFORMER_DEVICE void consume(const Problem& problem, Shared& shared) {
  constexpr int kTiles = kColumns / 8;
  const int thread = threadIdx.x % kWarpgroup, lane = thread % kWarp, warp = thread / kWarp;
  const auto release = [&](int step) {
    const bool to_it = kBug == Bug::released_to_itself ? lane == ptx::cluster_rank() : lane < kBlocks;
    if (to_it) ptx::mbarrier_arrive_at(&shared.empty[step % kStages], lane);
  };
  float sum[kTiles][4];
  ptx::wgmma_fence(sum);
  for (int step = 0; step < problem.steps; ++step) {
    const int stage = step % kStages;
    ptx::mbarrier_wait(&shared.full[stage], step / kStages % 2);
    for (int depth = 0; depth < kStep; depth += 16) {
      ptx::wgmma<BFloat16, false, false>(sum, matrix_descriptor(shared.a[stage] + depth, 0, kPattern),
                                         matrix_descriptor(shared.b[stage] + depth, 0, kPattern), step + depth > 0);
    }
    ptx::wgmma_commit();
    if constexpr (kBug == Bug::released_before_wait) {
      release(step);
    } else {
      ptx::wgmma_wait<1>();
      if (step > 0) release(step - 1);
    }
  }
  ptx::wgmma_wait<0>(sum);
  for (int i = 0; i < kTiles; ++i) {
    for (int e = 0; e < 4; ++e) {
      const int row = warp * 16 + lane / 4 + e / 2 * 8, column = i * 8 + lane % 4 * 2 + e % 2;
      shared.c[row * kColumns + column] = sum[i][e];  // the result
    }
  }
  if constexpr (kBug != Bug::no_proxy_fence) ptx::fence_proxy_async();
  ptx::barrier_sync(1, kWarpgroup);
  if (thread == 0) {
    ptx::tma_store(problem.c, shared.c, {0, static_cast<int>(blockIdx.x) * kRows});
    ptx::tma_store_commit();
    if constexpr (kBug != Bug::no_store_wait) ptx::tma_store_wait<0>();
    if constexpr (kBug == Bug::adds) ptx::bulk_add(shared.c, shared.c, 16);
  }
}

template <Bug kBug>
__global__ void multiply_with_peer(const Problem problem) {
  Shared& shared = *shared_memory<Shared>();
  if (threadIdx.x == 0) {
    const int blocks = kBug == Bug::released_to_itself ? 1 : kBlocks;
    for (auto& full : shared.full) ptx::mbarrier_init(&full, 1);
    for (auto& empty : shared.empty) ptx::mbarrier_init(&empty, kWarpgroup / kWarp * blocks);
    ptx::fence_mbarrier_init();
  }
  ptx::cluster_sync();
  if (threadIdx.x < kWarpgroup) {
    ptx::fewer_registers<24>();
    if (threadIdx.x == 0) produce<kBug>(problem, shared);
  } else {
    ptx::more_registers<256>();
    consume<kBug>(problem, shared);
  }
  ptx::cluster_sync();
}

// Tensors a, b and c; numbers: a's rows, and the depth.
template <Bug kBug>
void run(const simt::TestArguments& arguments) {
  const int64_t rows = arguments.number(0), depth = arguments.number(1);
  const auto of_bfloat16 = [&](int tensor, int64_t rows) {
    return tensor_map(Boxes<2>{
        arguments.tensor<void>(tensor), DType::bfloat16, {depth, rows}, {1, depth}, {kStep, 64}, Swizzle::bytes128});
  };
  const Problem problem{of_bfloat16(0, rows), of_bfloat16(1, kColumns),
                        tensor_map(Boxes<2>{arguments.tensor<void>(2),
                                            DType::float32,
                                            {kColumns, rows},
                                            {1, kColumns},
                                            {kColumns, kRows},
                                            Swizzle::none}),
                        static_cast<int>(depth / kStep)};
  launch_clusters(multiply_with_peer<kBug>, kBlocks, static_cast<unsigned>(rows / kRows), kThreads, sizeof(Shared),
                  nullptr, problem);
}

simt::TestKernel none("cluster_product", &run<Bug::none>);
simt::TestKernel released_before_wait("cluster_product: released before wait", &run<Bug::released_before_wait>);
simt::TestKernel released_to_itself("cluster_product: released to itself", &run<Bug::released_to_itself>);
simt::TestKernel no_proxy_fence("cluster_product: no proxy fence", &run<Bug::no_proxy_fence>);
simt::TestKernel no_store_wait("cluster_product: no store wait", &run<Bug::no_store_wait>);
simt::TestKernel sent_first("cluster_product: sent first", &run<Bug::sent_first>);
simt::TestKernel adds("cluster_product: adds", &run<Bug::adds>);

}  // namespace
}  // namespace fastformer::cuda
