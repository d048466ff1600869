// Does what program[step][thread] says to 64 bytes of shared memory: kind + 8 * log2(bytes) + 64 * address.
#include "launch.h"
#include "test_kernels.h"

namespace fastformer::cuda {
namespace {

enum Kind { nothing, reads, writes, meets_block, meets_warp };
constexpr int kBytes = 64;

template <int kCount>
FASTFORMER_DEVICE int access(Kind kind, uint8_t* at) {
  if (kind == reads) return load<kCount>(at).values[0];
  store(at, Pack<uint8_t, kCount>{});
  return 0;
}

__global__ void run_program(const int* program, int* out, int steps) {
  uint8_t* bytes = shared_memory<uint8_t>();
  const int thread = threadIdx.x;
  if (thread < kBytes) bytes[thread] = 0;
  __syncthreads();
  int sum = 0;
  for (int step = 0; step < steps; ++step) {
    const int what = program[step * blockDim.x + thread];
    const auto kind = static_cast<Kind>(what % 8);
    uint8_t* at = bytes + what / 64;
    if (kind == meets_block) {
      __syncthreads();
    } else if (kind == meets_warp) {
      __syncwarp();
    } else if (kind != nothing) {
      const int log_bytes = what / 8 % 8;
      sum += log_bytes == 0   ? access<1>(kind, at)
             : log_bytes == 1 ? access<2>(kind, at)
             : log_bytes == 2 ? access<4>(kind, at)
                              : access<16>(kind, at);
    }
  }
  out[thread] = sum;
}

void run(const simt::TestArguments& arguments) {
  launch(run_program, 1, arguments.number(0), kBytes, nullptr, arguments.tensor<const int>(0), arguments.tensor<int>(1),
         arguments.number(1));
}

simt::TestKernel program("program", &run);

}  // namespace
}  // namespace fastformer::cuda
