// out = in with every tile of a row reversed; a tile comes by cp.async while the one before it is written.
#include "launch.h"
#include "ptx.cuh"
#include "test_kernels.h"

namespace fastformer::cuda {
namespace {

enum class Bug {
  none,
  no_wait,
  group_too_many,
  no_barrier_after_wait,
  no_barrier_before_reuse,
  misaligned,
  source_written
};

template <Bug kBug>
__global__ void copy_reversed(const float* in, float* out, int tiles) {
  constexpr int kPack = 4;
  const int thread = threadIdx.x, threads = blockDim.x, width = threads * kPack;
  float* buffers = shared_memory<float>();
  const float* row = in + static_cast<int64_t>(blockIdx.x) * tiles * width;
  float* to = out + static_cast<int64_t>(blockIdx.x) * tiles * width;
  const auto begin = [&](int tile) {
    float* buffer = buffers + tile % 2 * width;
    const int column = thread * kPack;
    ptx::cp_async<16>(buffer + column, row + tile * width + column + (kBug == Bug::misaligned), tile < tiles);
    ptx::cp_async_commit();
  };
  begin(0);
  for (int tile = 0; tile < tiles; ++tile) {
    if (tile + 1 < tiles) {
      begin(tile + 1);
      if constexpr (kBug == Bug::source_written) const_cast<float*>(row)[(tile + 1) * width + thread * kPack] = 0.0f;
      if constexpr (kBug == Bug::group_too_many) {
        ptx::cp_async_wait<2>();
      } else if constexpr (kBug != Bug::no_wait) {
        ptx::cp_async_wait<1>();
      }
    } else if constexpr (kBug != Bug::no_wait) {
      ptx::cp_async_wait<0>();
    }
    if constexpr (kBug != Bug::no_barrier_after_wait) __syncthreads();
    const float* buffer = buffers + tile % 2 * width;
    for (int i = thread; i < width; i += threads) to[tile * width + i] = buffer[width - 1 - i];
    if constexpr (kBug != Bug::no_barrier_before_reuse) __syncthreads();
  }
}

template <Bug kBug>
void run(const simt::TestArguments& arguments) {
  const int rows = arguments.number(0), tiles = arguments.number(1), threads = arguments.number(2);
  launch(copy_reversed<kBug>, rows, threads, 2 * threads * 16, nullptr, arguments.tensor<const float>(0),
         arguments.tensor<float>(1), tiles);
}

simt::TestKernel none("copy_reversed", &run<Bug::none>);
simt::TestKernel no_wait("copy_reversed: no wait", &run<Bug::no_wait>);
simt::TestKernel group_too_many("copy_reversed: group too many", &run<Bug::group_too_many>);
simt::TestKernel no_barrier_after_wait("copy_reversed: no barrier after wait", &run<Bug::no_barrier_after_wait>);
simt::TestKernel no_barrier_before_reuse("copy_reversed: no barrier before reuse", &run<Bug::no_barrier_before_reuse>);
simt::TestKernel source_written("copy_reversed: source written", &run<Bug::source_written>);
simt::TestKernel misaligned("copy_reversed: misaligned", &run<Bug::misaligned>);

}  // namespace
}  // namespace fastformer::cuda
