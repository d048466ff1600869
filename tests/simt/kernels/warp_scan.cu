// A warp a row: out[row][lane] = the sum of in[row][0..lane], once by shuffles and once through shared memory; count[0]
// += how many are positive.
#include "launch.h"
#include "test_kernels.h"

namespace fastformer::cuda {
namespace {

enum class Bug { none, no_syncwarp, missing_lane, ended_lane, divergent, lane_past_mask };

template <Bug kBug>
__global__ void warp_scan(const float* in, float* out, int* count) {
  float* scratch = shared_memory<float>() + threadIdx.x / kWarp * kWarp;
  const int lane = threadIdx.x % kWarp;
  const int64_t at = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  const float x = in[at];
  float sum = x;
  if (kBug == Bug::ended_lane && lane == 7) return;
  for (int step = 1; step < kWarp; step *= 2) {
    if (kBug == Bug::missing_lane && lane == 5) break;
    const float before = __shfl_up_sync(kBug == Bug::lane_past_mask && lane == 3 ? 0xfffffff0u : kAllLanes, sum, step);
    if (lane >= step) sum += before;
  }
  scratch[lane] = x;
  if constexpr (kBug != Bug::no_syncwarp) __syncwarp();
  float again = 0.0f;
  for (int i = 0; i <= lane; ++i) again += scratch[i];
  const unsigned positive = __ballot_sync(kAllLanes, x > 0.0f);
  if (lane == 0) atomicAdd(count, __popc(positive));
  if constexpr (kBug == Bug::divergent) {
    if (threadIdx.x < kWarp) {
      __syncthreads();  // of the first warp
    } else {
      __syncthreads();  // of the others
    }
  } else {
    __syncthreads();
  }
  out[at] = fabsf(sum - again) < 1e-4f ? sum : NAN;
}

template <Bug kBug>
void run(const simt::TestArguments& arguments) {
  const int blocks = arguments.number(0), threads = arguments.number(1);
  launch(warp_scan<kBug>, blocks, threads, threads * sizeof(float), nullptr, arguments.tensor<const float>(0),
         arguments.tensor<float>(1), arguments.tensor<int>(2));
}

simt::TestKernel none("warp_scan", &run<Bug::none>);
simt::TestKernel no_syncwarp("warp_scan: no syncwarp", &run<Bug::no_syncwarp>);
simt::TestKernel missing_lane("warp_scan: missing lane", &run<Bug::missing_lane>);
simt::TestKernel ended_lane("warp_scan: ended lane", &run<Bug::ended_lane>);
simt::TestKernel divergent("warp_scan: divergent", &run<Bug::divergent>);
simt::TestKernel lane_past_mask("warp_scan: lane past mask", &run<Bug::lane_past_mask>);

}  // namespace
}  // namespace fastformer::cuda
