// Does what program[step][thread of the cluster] says to 32 bytes of the shared memory of a block:
// kind + 8 * log2(bytes) + 64 * address + 4096 * rank.
#include "launch.h"
#include "ptx_hopper.cuh"
#include "test_kernels.h"

namespace fastformer::cuda {
namespace {

enum Kind { nothing, reads, writes, adds, meets_warp, meets_block, meets_cluster };
constexpr int kBytes = 32;

template <int kCount>
FASTFORMER_DEVICE int access(Kind kind, uint8_t* at) {
  if (kind == reads) return load<kCount>(at).values[0];
  store(at, Pack<uint8_t, kCount>{});
  return 0;
}

__global__ void run_cluster_program(const int* program, int* out, int steps) {
  uint8_t* bytes = shared_memory<uint8_t>();
  const int thread = blockIdx.x * blockDim.x + threadIdx.x, threads = gridDim.x * blockDim.x;
  if (threadIdx.x < kBytes) bytes[threadIdx.x] = 0;
  ptx::cluster_sync();
  int sum = 0;
  for (int step = 0; step < steps; ++step) {
    const int what = program[step * threads + thread];
    const auto kind = static_cast<Kind>(what % 8);
    if (kind == meets_warp) __syncwarp();
    if (kind == meets_block) __syncthreads();
    if (kind == meets_cluster) ptx::cluster_sync();
    if (kind == nothing || kind >= meets_warp) continue;
    uint8_t* at = ptx::of_block(bytes + what / 64 % 64, what / 4096);
    const int log_bytes = what / 8 % 8;
    if (kind == adds) {
      atomicAdd(reinterpret_cast<int*>(at), 1);
    } else {
      sum += log_bytes == 0 ? access<1>(kind, at) : log_bytes == 2 ? access<4>(kind, at) : access<16>(kind, at);
    }
  }
  out[thread] = sum;
  ptx::cluster_sync();
}

void run(const simt::TestArguments& arguments) {
  const int blocks = arguments.number(0), threads = arguments.number(1), steps = arguments.number(2);
  launch_clusters(run_cluster_program, blocks, blocks, threads, kBytes, nullptr, arguments.tensor<const int>(0),
                  arguments.tensor<int>(1), steps);
}

simt::TestKernel program("cluster program", &run);

}  // namespace
}  // namespace fastformer::cuda
