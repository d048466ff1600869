// Single instructions of a warp, for the tests of their layouts.
#include "launch.h"
#include "ptx.cuh"
#include "test_kernels.h"

namespace fastformer::cuda {
namespace {

// registers[lane][8 elements]: what each lane gets of in[32][8], whose row i lane i gives the address of.
template <bool kTransposed, bool kSynchronised>
__global__ void load_matrices(const BFloat16* in, uint32_t* registers) {
  BFloat16* rows = shared_memory<BFloat16>();
  const int lane = threadIdx.x;
  store<8>(rows + lane * 8, load<8>(in + lane * 8));
  if constexpr (kSynchronised) __syncwarp();
  uint32_t to[4];
  ptx::ldmatrix_x4<kTransposed>(to, rows + lane * 8);
  for (int i = 0; i < 4; ++i) registers[lane * 4 + i] = to[i];
}

// Fragments a[lane][4], b[lane][2] and d[lane][4].
template <typename T>
__global__ void multiply(const uint32_t* a, const uint32_t* b, float* d) {
  const int lane = threadIdx.x;
  uint32_t fragment_a[4], fragment_b[2];
  float sums[4];
  for (int i = 0; i < 4; ++i) fragment_a[i] = a[lane * 4 + i];
  for (int i = 0; i < 2; ++i) fragment_b[i] = b[lane * 2 + i];
  for (int i = 0; i < 4; ++i) sums[i] = d[lane * 4 + i];
  ptx::mma_m16n8k16<T>(sums, fragment_a, fragment_b);
  for (int i = 0; i < 4; ++i) d[lane * 4 + i] = sums[i];
}

template <bool kTransposed, bool kSynchronised = true>
void run_load(const simt::TestArguments& arguments) {
  launch(load_matrices<kTransposed, kSynchronised>, 1, kWarp, 512, nullptr, arguments.tensor<const BFloat16>(0),
         arguments.tensor<uint32_t>(1));
}
template <typename T>
void run_multiply(const simt::TestArguments& arguments) {
  launch(multiply<T>, 1, kWarp, 0, nullptr, arguments.tensor<const uint32_t>(0), arguments.tensor<const uint32_t>(1),
         arguments.tensor<float>(2));
}

simt::TestKernel plain("ldmatrix", &run_load<false>);
simt::TestKernel not_synchronised("ldmatrix: no syncwarp", &run_load<false, false>);
simt::TestKernel transposed("ldmatrix transposed", &run_load<true>);
simt::TestKernel bfloat16("mma of bfloat16", &run_multiply<BFloat16>);
simt::TestKernel half("mma of halves", &run_multiply<Half>);

}  // namespace
}  // namespace fastformer::cuda
