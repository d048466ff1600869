// c[m, n] = a[m, k] b[n, k]^T in float, of 16-bit elements: a block of two warps makes a tile of 32 x 16, in steps of
// 16 of k, which come by cp.async, a step ahead.
#include "launch.h"
#include "ptx.cuh"
#include "test_kernels.h"

namespace fastformer::cuda {
namespace {

enum class Bug { none, wrong_fragment, no_wait, no_barrier_before_reuse };

constexpr int kRows = 32, kColumns = 16, kDepth = 16;
constexpr int kPitch =
    kDepth + 8;  // elements from a row of a tile to the next: 48 bytes, eight of which meet no bank twice
constexpr int kStage = (kRows + kColumns) * kPitch;
constexpr int kThreads = 64;

template <typename T, Bug kBug>
__global__ void product(const T* a, const T* b, float* c, int n, int k) {
  T* stages = shared_memory<T>();
  const int thread = threadIdx.x, warp = thread / kWarp, lane = thread % kWarp;
  const int64_t row = static_cast<int64_t>(blockIdx.y) * kRows, column = static_cast<int64_t>(blockIdx.x) * kColumns;
  // 48 rows of two packs of 8.
  const auto begin = [&](int step) {
    T* stage = stages + step % 2 * kStage;
    for (int i = thread; i < (kRows + kColumns) * 2; i += kThreads) {
      const int from_row = i / 2, from_column = step * kDepth + i % 2 * 8;
      const T* from = from_row < kRows ? a + (row + from_row) * k : b + (column + from_row - kRows) * k;
      ptx::cp_async<16>(stage + from_row * kPitch + i % 2 * 8, from + from_column, true);
    }
    ptx::cp_async_commit();
  };
  float sums[2][4] = {};
  const int steps = k / kDepth;
  begin(0);
  for (int step = 0; step < steps; ++step) {
    if (step + 1 < steps) {
      begin(step + 1);
      ptx::cp_async_wait<1>();
    } else if constexpr (kBug != Bug::no_wait) {
      ptx::cp_async_wait<0>();
    }
    __syncthreads();
    const T* tile_a = stages + step % 2 * kStage + warp * 16 * kPitch;
    const T* tile_b = stages + step % 2 * kStage + kRows * kPitch;
    // The four matrices: of a, both halves of its rows for the first 8 of k, then for the last; of b, both halves of k
    // for its first 8 rows, then for the last.
    uint32_t fragment_a[4], fragments_b[4];
    ptx::ldmatrix_x4<false>(fragment_a, tile_a + lane % 16 * kPitch + lane / 16 * 8);
    ptx::ldmatrix_x4<false>(fragments_b, tile_b + (lane / 16 * 8 + lane % 8) * kPitch + lane / 8 % 2 * 8);
    if constexpr (kBug == Bug::wrong_fragment) {
      const uint32_t second = fragment_a[1];
      fragment_a[1] = fragment_a[2];
      fragment_a[2] = second;
    }
    for (int half = 0; half < 2; ++half) {
      const uint32_t fragment_b[2] = {fragments_b[half * 2], fragments_b[half * 2 + 1]};
      ptx::mma_m16n8k16<T>(sums[half], fragment_a, fragment_b);
    }
    if constexpr (kBug != Bug::no_barrier_before_reuse) __syncthreads();
  }
  for (int half = 0; half < 2; ++half) {
    for (int i = 0; i < 4; ++i) {
      const int64_t to_row = row + warp * 16 + lane / 4 + i / 2 * 8,
                    to_column = column + half * 8 + lane % 4 * 2 + i % 2;
      c[to_row * n + to_column] = sums[half][i];
    }
  }
}

template <typename T, Bug kBug>
void run(const simt::TestArguments& arguments) {
  const int m = arguments.number(0), n = arguments.number(1), k = arguments.number(2);
  launch(product<T, kBug>, dim3(n / kColumns, m / kRows), kThreads, 2 * kStage * sizeof(T), nullptr,
         arguments.tensor<const T>(0), arguments.tensor<const T>(1), arguments.tensor<float>(2), n, k);
}

simt::TestKernel bfloat16("product", &run<BFloat16, Bug::none>);
simt::TestKernel half("product of halves", &run<Half, Bug::none>);
simt::TestKernel wrong_fragment("product: wrong fragment", &run<BFloat16, Bug::wrong_fragment>);
simt::TestKernel no_wait("product: no wait", &run<BFloat16, Bug::no_wait>);
simt::TestKernel no_barrier_before_reuse("product: no barrier before reuse",
                                         &run<BFloat16, Bug::no_barrier_before_reuse>);

}  // namespace
}  // namespace fastformer::cuda
