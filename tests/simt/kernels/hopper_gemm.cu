// c[m, n] = a[m, k] b[n, k]^T of bfloat16: a producer warp, two consumer warpgroups of 64 rows each, and blocks that go
// from tile to tile. Results leave through shared memory.
#include "launch.h"
#include "ptx_hopper.cuh"
#include "test_kernels.h"

namespace fastformer::cuda {
namespace {

enum class Bug {
  none,
  released_before_wait,
  no_proxy_fence,
  no_store_wait,
  read_early,
  wrong_parity,
  parity_runs_on,
  one_warp_releases,
  not_all_expected,
  other_swizzle,
  too_many_registers,
};

constexpr int kTileM = 128, kTileN = 128, kStep = 64, kStages = 3, kConsumers = 2;
constexpr int kThreads = (1 + kConsumers) * kWarpgroup;
constexpr int kRowBytes = 128;           // of all boxes
constexpr int kPattern = 8 * kRowBytes;  // of the swizzle
constexpr int kBytesA = kTileM * kRowBytes, kBytesB = kTileN * kRowBytes, kStageBytes = kBytesA + kBytesB;
constexpr int kBytesC = kTileM * kRowBytes;  // of half the columns
constexpr int kSharedBytes = kStages * kStageBytes + 2 * kBytesC + 2 * kStages * static_cast<int>(sizeof(Mbarrier));

struct Problem {
  TensorMap a, b, c;
  int tiles_m, tiles, steps;
};

template <Bug kBug>
FASTFORMER_DEVICE void produce(const Problem& problem, char* stages, Mbarrier* full, Mbarrier* empty) {
  int count = 0;
  for (int tile = blockIdx.x; tile < problem.tiles; tile += gridDim.x) {
    const int row = tile % problem.tiles_m * kTileM, column = tile / problem.tiles_m * kTileN;
    for (int step = 0; step < problem.steps; ++step, ++count) {
      const int stage = count % kStages, parity = count / kStages % 2;
      char* to = stages + stage * kStageBytes;
      ptx::mbarrier_wait(&empty[stage], parity ^ 1);
      ptx::mbarrier_arrive_expect(&full[stage], kBug == Bug::not_all_expected ? kBytesA : kStageBytes);
      ptx::tma_load(to, problem.a, &full[stage], {step * kStep, row});
      ptx::tma_load(to + kBytesA, problem.b, &full[stage], {step * kStep, column});
    }
  }
}

template <Bug kBug>
FASTFORMER_DEVICE void consume(const Problem& problem, char* stages, char* results, Mbarrier* full, Mbarrier* empty) {
  constexpr int kTiles = kTileN / 8;
  const int thread = threadIdx.x % kWarpgroup, group = threadIdx.x / kWarpgroup - 1, lane = thread % kWarp;
  const int warp = thread / kWarp;
  const auto release = [&](int stage) {
    const bool mine = kBug == Bug::one_warp_releases ? thread == 0 : lane == 0;
    if (mine) ptx::mbarrier_arrive(&empty[stage]);
  };
  int count = 0;
  for (int tile = blockIdx.x; tile < problem.tiles; tile += gridDim.x) {
    float sum[kTiles][4];
    ptx::wgmma_fence(sum);
    for (int step = 0; step < problem.steps; ++step, ++count) {
      const int stage = count % kStages, parity = kBug == Bug::parity_runs_on ? count % 2 : count / kStages % 2;
      ptx::mbarrier_wait(&full[stage], kBug == Bug::wrong_parity ? parity ^ 1 : parity);
      const char* a = stages + stage * kStageBytes + group * 64 * kRowBytes;
      const char* b = stages + stage * kStageBytes + kBytesA;
      for (int depth = 0; depth < kStep; depth += 16) {
        ptx::wgmma<BFloat16, false, false>(sum, matrix_descriptor(a + depth * 2, 0, kPattern),
                                           matrix_descriptor(b + depth * 2, 0, kPattern), step > 0 || depth > 0);
      }
      ptx::wgmma_commit();
      if constexpr (kBug == Bug::released_before_wait) {
        release(stage);
      } else {
        // The step before has ended.
        ptx::wgmma_wait<1>();
        if (step > 0) release((count - 1) % kStages);
      }
    }
    if constexpr (kBug == Bug::read_early) sum[0][0] *= 2.0f;  // which is not there yet
    ptx::wgmma_wait<0>(sum);
    if constexpr (kBug != Bug::released_before_wait) release((count - 1) % kStages);
    // In two halves of 64 columns, the width of the swizzle.
    if constexpr (kBug != Bug::no_store_wait) {
      if (thread == 0) ptx::tma_store_wait<0>();
    }
    ptx::barrier_sync(1 + group, kWarpgroup);
    for (int i = 0; i < kTiles; ++i) {
      for (int half = 0; half < 2; ++half) {
        const int row = group * 64 + warp * 16 + half * 8 + lane / 4, chunk = i % 8;
        char* to = results + i / 8 * kBytesC + row * kRowBytes + (chunk ^ row % 8) * 16 + lane % 4 * 4;
        *reinterpret_cast<uint32_t*>(to) = pack_pair<BFloat16>(sum[i][2 * half], sum[i][2 * half + 1]);  // the result
      }
    }
    if constexpr (kBug != Bug::no_proxy_fence) ptx::fence_proxy_async();
    ptx::barrier_sync(1 + group, kWarpgroup);  // written
    if (thread == 0) {
      const int row = tile % problem.tiles_m * kTileM + group * 64, column = tile / problem.tiles_m * kTileN;
      for (int half = 0; half < 2; ++half) {
        ptx::tma_store(problem.c, results + half * kBytesC + group * 64 * kRowBytes, {column + half * 64, row});
      }
      ptx::tma_store_commit();
    }
  }
  if (thread == 0) ptx::tma_store_wait<0>();
}

template <Bug kBug>
__global__ void hopper_gemm(const Problem problem) {
  char* stages = shared_memory<char>();
  char* results = stages + kStages * kStageBytes;
  auto* full = reinterpret_cast<Mbarrier*>(results + 2 * kBytesC);
  Mbarrier* empty = full + kStages;
  if (threadIdx.x == 0) {
    for (int i = 0; i < kStages; ++i) {
      ptx::mbarrier_init(&full[i], 1);
      ptx::mbarrier_init(&empty[i], kBug == Bug::one_warp_releases ? kConsumers : kConsumers * 4);
    }
    ptx::fence_mbarrier_init();
  }
  __syncthreads();
  if (threadIdx.x < kWarpgroup) {
    ptx::fewer_registers<24>();
    if (threadIdx.x == 0) produce<kBug>(problem, stages, full, empty);
  } else {
    ptx::more_registers<kBug == Bug::too_many_registers ? 248 : 240>();
    consume<kBug>(problem, stages, results, full, empty);
  }
}

// Tensors a, b and c; numbers: m, n, k, and blocks.
template <Bug kBug>
void run(const simt::TestArguments& arguments) {
  const int64_t m = arguments.number(0), n = arguments.number(1), k = arguments.number(2);
  const auto map = [](const void* data, int64_t rows, int64_t columns, int box_rows, bool swizzled = true) {
    return tensor_map(Boxes<2>{data,
                               DType::bfloat16,
                               {columns, rows},
                               {1, columns},
                               {64, box_rows},
                               swizzled ? Swizzle::bytes128 : Swizzle::none});
  };
  const int tiles_m = static_cast<int>((m + kTileM - 1) / kTileM);
  const Problem problem{map(arguments.tensor<void>(0), m, k, kTileM),
                        map(arguments.tensor<void>(1), n, k, kTileN, kBug != Bug::other_swizzle),
                        map(arguments.tensor<void>(2), m, n, 64),
                        tiles_m,
                        tiles_m * static_cast<int>((n + kTileN - 1) / kTileN),
                        static_cast<int>((k + kStep - 1) / kStep)};
  launch(hopper_gemm<kBug>, arguments.number(3), kThreads, kSharedBytes, nullptr, problem);
}

simt::TestKernel none("hopper_gemm", &run<Bug::none>);
simt::TestKernel released_before_wait("hopper_gemm: released before wait", &run<Bug::released_before_wait>);
simt::TestKernel no_proxy_fence("hopper_gemm: no proxy fence", &run<Bug::no_proxy_fence>);
simt::TestKernel no_store_wait("hopper_gemm: no store wait", &run<Bug::no_store_wait>);
simt::TestKernel read_early("hopper_gemm: read early", &run<Bug::read_early>);
simt::TestKernel wrong_parity("hopper_gemm: wrong parity", &run<Bug::wrong_parity>);
simt::TestKernel parity_runs_on("hopper_gemm: parity runs on", &run<Bug::parity_runs_on>);
simt::TestKernel one_warp_releases("hopper_gemm: one warp releases", &run<Bug::one_warp_releases>);
simt::TestKernel not_all_expected("hopper_gemm: not all expected", &run<Bug::not_all_expected>);
simt::TestKernel other_swizzle("hopper_gemm: other swizzle", &run<Bug::other_swizzle>);
simt::TestKernel too_many_registers("hopper_gemm: too many registers", &run<Bug::too_many_registers>);

}  // namespace
}  // namespace fastformer::cuda
