// out += every row of in, a block each, in the order of the blocks.
#include "launch.h"
#include "ptx_hopper.cuh"
#include "test_kernels.h"

namespace fastformer::cuda {
namespace {

enum class Bug { none, not_awaited, no_turn, wrong_turn, read_again };

constexpr int kWidth = 256;

template <Bug kBug>
__global__ void bulk_sums(const float* in, float* out, int* turns) {
  float* row = shared_memory<float>();
  const int thread = threadIdx.x;
  for (int i = thread; i < kWidth; i += blockDim.x) row[i] = in[blockIdx.x * kWidth + i];
  ptx::fence_proxy_async();
  __syncthreads();
  if (thread == 0) {
    if constexpr (kBug != Bug::no_turn) ptx::wait_for_count(turns, blockIdx.x + (kBug == Bug::wrong_turn));
    ptx::bulk_add(out, row, kWidth * sizeof(float));
    ptx::tma_store_commit();
    ptx::tma_store_wait<0>();
    if constexpr (kBug != Bug::not_awaited) ptx::bulk_wait_all();
    ptx::count_up(turns);
  }
  __syncthreads();  // after its turn
  if constexpr (kBug == Bug::read_again) {
    if (thread == 5 && out[thread] == 0.0f) __trap();  // of what was added
  }
}

template <Bug kBug>
void run(const simt::TestArguments& arguments) {
  launch(bulk_sums<kBug>, arguments.number(0), 64, kWidth * sizeof(float), nullptr, arguments.tensor<const float>(0),
         arguments.tensor<float>(1), arguments.tensor<int>(2));
}

simt::TestKernel none("bulk_sums", &run<Bug::none>);
simt::TestKernel not_awaited("bulk_sums: not awaited", &run<Bug::not_awaited>);
simt::TestKernel no_turn("bulk_sums: no turn", &run<Bug::no_turn>);
simt::TestKernel wrong_turn("bulk_sums: wrong turn", &run<Bug::wrong_turn>);
simt::TestKernel read_again("bulk_sums: read again", &run<Bug::read_again>);

}  // namespace
}  // namespace fastformer::cuda
