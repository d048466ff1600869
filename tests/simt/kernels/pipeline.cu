// out = 2 in: one warp fills two buffers in turn, another empties them. Named barriers 1 and 2 say that a buffer is
// full, 3 and 4 that it is empty.
#include "launch.h"
#include "ptx.cuh"
#include "test_kernels.h"

namespace fastformer::cuda {
namespace {

enum class Bug { none, never_empty, not_awaited_full, not_awaited_empty, wrong_count };

template <Bug kBug>
__global__ void pipeline(const float* in, float* out, int tiles) {
  float* buffers = shared_memory<float>();
  const int lane = threadIdx.x % kWarp;
  if (threadIdx.x < kWarp) {
    for (int tile = 0; tile < tiles; ++tile) {
      if (tile >= 2 && kBug != Bug::not_awaited_empty) ptx::barrier_sync(3 + tile % 2, 64);
      buffers[tile % 2 * kWarp + lane] = 2.0f * in[tile * kWarp + lane];
      ptx::barrier_arrive(1 + tile % 2, 64);
    }
  } else {
    for (int tile = 0; tile < tiles; ++tile) {
      if constexpr (kBug != Bug::not_awaited_full) {
        ptx::barrier_sync(1 + tile % 2, kBug == Bug::wrong_count ? 32 : 64);
      }
      out[tile * kWarp + lane] = buffers[tile % 2 * kWarp + (kWarp - 1 - lane)];
      if (kBug != Bug::never_empty && tile + 2 < tiles) ptx::barrier_arrive(3 + tile % 2, 64);
    }
  }
}

template <Bug kBug>
void run(const simt::TestArguments& arguments) {
  launch(pipeline<kBug>, 2, 64, 2 * kWarp * sizeof(float), nullptr, arguments.tensor<const float>(0),
         arguments.tensor<float>(1), arguments.number(0));
}

template <Bug kBug>
void run_one_block(const simt::TestArguments& arguments) {
  launch(pipeline<kBug>, 1, 64, 2 * kWarp * sizeof(float), nullptr, arguments.tensor<const float>(0),
         arguments.tensor<float>(1), arguments.number(0));
}

simt::TestKernel none("pipeline", &run_one_block<Bug::none>);
simt::TestKernel two_blocks("pipeline: two blocks", &run<Bug::none>);
simt::TestKernel never_empty("pipeline: never empty", &run_one_block<Bug::never_empty>);
simt::TestKernel not_awaited_full("pipeline: not awaited full", &run_one_block<Bug::not_awaited_full>);
simt::TestKernel not_awaited_empty("pipeline: not awaited empty", &run_one_block<Bug::not_awaited_empty>);
simt::TestKernel wrong_count("pipeline: wrong count", &run_one_block<Bug::wrong_count>);

}  // namespace
}  // namespace fastformer::cuda
