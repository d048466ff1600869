// d = a b by one warpgroup, from images of shared memory that the host gives.
#include "launch.h"
#include "ptx_hopper.cuh"
#include "test_kernels.h"

namespace fastformer::cuda {
namespace {

enum class Bug {
  none,
  no_proxy_fence,
  no_fence,
  no_fence_of_fragment,
  no_fence_after_wait,
  fenced_early,
  not_named,
  fragment_not_named,
  no_commit,
  no_wait,
  read_early,
  sum_changed,
  fragment_changed,
  overwritten,
  missing_warp,
  missing_lane,
  other_matrix,
  lanes_differ,
  within_pattern,
  beyond_shared,
  registers,
};

constexpr int kSteps = 4;  // of 16 of the depth

// Where matrices lie: bytes of shared memory, and from a step of the depth to the next.
struct Lies {
  int begin, leading, stride, step;
};

template <typename T, bool kTransposedA, bool kTransposedB, int kTiles, bool kFromRegisters, Bug kBug>
__global__ void multiply(const uint32_t* image, int bytes, const uint32_t* fragments, float* d, Lies a, Lies b) {
  char* shared = shared_memory<char>();
  const int thread = threadIdx.x, warp = thread / kWarp;
  for (int i = thread * 16; i < bytes; i += kWarpgroup * 16) {
    store(reinterpret_cast<uint32_t*>(shared + i), load<4>(image + i / 4));  // the image
  }
  if constexpr (kBug != Bug::no_proxy_fence) ptx::fence_proxy_async();
  __syncthreads();
  if constexpr (kBug == Bug::registers) {
    if (warp == 1) ptx::fewer_registers<128>();
  }
  float sum[kTiles][4];
  uint32_t fragment[kSteps][4];
  for (int i = 0; i < kSteps; ++i) {
    for (int e = 0; e < 4; ++e) fragment[i][e] = kFromRegisters ? fragments[(i * kWarpgroup + thread) * 4 + e] : 0;
  }
  const auto begin = [&](int step) {
    const int first = b.begin + step * b.step + (kBug == Bug::within_pattern ? 128 : 0) +
                      (kBug == Bug::beyond_shared ? 16384 : 0) + (kBug == Bug::other_matrix && warp == 2 ? 32 : 0) +
                      (kBug == Bug::lanes_differ && thread == 40 ? 32 : 0);
    const uint64_t of_b = matrix_descriptor(shared + first, b.leading, b.stride);
    if constexpr (kFromRegisters) {
      ptx::wgmma<T, kTransposedB>(sum, fragment[step], of_b, step > 0);  // with a from registers
    } else {
      const uint64_t of_a = matrix_descriptor(shared + a.begin + step * a.step, a.leading, a.stride);
      ptx::wgmma<T, kTransposedA, kTransposedB>(sum, of_a, of_b, step > 0);  // with a from shared memory
    }
  };
  if constexpr (kFromRegisters && kBug != Bug::no_fence_of_fragment) {
    ptx::wgmma_fence(sum, fragment);
  } else if constexpr (kBug != Bug::no_fence) {
    ptx::wgmma_fence(sum);
  }
  if constexpr (kBug == Bug::fenced_early) {
    if (thread == 97) fragment[1][3] += 1;
  }
  for (int step = 0; step < kSteps; ++step) {
    if (kBug == Bug::missing_warp && warp == 3) break;
    if (kBug == Bug::missing_lane && thread == 70) continue;
    begin(step);
    if constexpr (kBug == Bug::no_fence_after_wait) {
      ptx::wgmma_commit();
      ptx::wgmma_wait<0>(sum);
    }
  }
  if constexpr (kBug == Bug::overwritten) {
    if (thread == 7) shared[b.begin + 16] = 0;
  }
  if constexpr (kBug == Bug::fragment_changed) {
    if (thread == 33) fragment[2][1] = 0;
  }
  if constexpr (kBug == Bug::sum_changed) {
    if (thread == 33) sum[3][1] = 0.0f;
  }
  if constexpr (kBug != Bug::no_commit) ptx::wgmma_commit();
  float early = 0.0f;
  if constexpr (kBug == Bug::read_early) early = sum[0][0];
  if constexpr (kBug == Bug::not_named) {
    ptx::wgmma_wait<0>();  // of nothing
  } else if constexpr (kFromRegisters && kBug != Bug::fragment_not_named) {
    ptx::wgmma_wait<0>(sum, fragment);  // of both
  } else if constexpr (kBug != Bug::no_wait) {
    ptx::wgmma_wait<0>(sum);  // of the accumulator
  }
  for (int i = 0; i < kTiles; ++i) {
    for (int e = 0; e < 4; ++e) d[(thread * kTiles + i) * 4 + e] = sum[i][e];
  }
  if constexpr (kBug == Bug::read_early) d[thread * kTiles * 4] = early;
}

// Tensors image, fragments, d; numbers: the image's bytes, and how a and b lie.
template <typename T, bool kTransposedA, bool kTransposedB, int kTiles, bool kFromRegisters = false,
          Bug kBug = Bug::none>
void run(const simt::TestArguments& arguments) {
  const auto lies = [&](int i) {
    return Lies{arguments.number(i), arguments.number(i + 1), arguments.number(i + 2), arguments.number(i + 3)};
  };
  launch(multiply<T, kTransposedA, kTransposedB, kTiles, kFromRegisters, kBug>, 1, kWarpgroup, arguments.number(0),
         nullptr, arguments.tensor<const uint32_t>(0), arguments.number(0), arguments.tensor<const uint32_t>(1),
         arguments.tensor<float>(2), lies(1), lies(5));
}

simt::TestKernel n64("wgmma 64", &run<BFloat16, false, false, 8>);
simt::TestKernel n64_b("wgmma 64 transposed b", &run<BFloat16, false, true, 8>);
simt::TestKernel n64_ab("wgmma 64 transposed a b", &run<BFloat16, true, true, 8>);
simt::TestKernel n128("wgmma 128", &run<BFloat16, false, false, 16>);
simt::TestKernel n128_a("wgmma 128 transposed a", &run<BFloat16, true, false, 16>);
simt::TestKernel n128_b("wgmma 128 transposed b", &run<BFloat16, false, true, 16>);
simt::TestKernel n192("wgmma 192", &run<BFloat16, false, false, 24>);
simt::TestKernel n192_b("wgmma 192 transposed b", &run<BFloat16, false, true, 24>);
simt::TestKernel n256("wgmma 256", &run<BFloat16, false, false, 32>);
simt::TestKernel n256_ab("wgmma 256 transposed a b", &run<BFloat16, true, true, 32>);
simt::TestKernel half("wgmma 64 halves transposed b", &run<Half, false, true, 8>);
simt::TestKernel r64("wgmma 64 registers", &run<BFloat16, false, false, 8, true>);
simt::TestKernel r64_b("wgmma 64 registers transposed b", &run<BFloat16, false, true, 8, true>);
simt::TestKernel r64_half("wgmma 64 registers halves transposed b", &run<Half, false, true, 8, true>);
simt::TestKernel r128_b("wgmma 128 registers halves transposed b", &run<Half, false, true, 16, true>);

template <Bug kBug, bool kFromRegisters = false>
constexpr auto kRun = &run<BFloat16, false, false, 8, kFromRegisters, kBug>;
simt::TestKernel no_proxy_fence("wgmma: no proxy fence", kRun<Bug::no_proxy_fence>);
simt::TestKernel no_fence("wgmma: no fence", kRun<Bug::no_fence>);
simt::TestKernel no_fence_of_fragment("wgmma: no fence of registers", kRun<Bug::no_fence_of_fragment, true>);
simt::TestKernel no_fence_after_wait("wgmma: no fence after wait", kRun<Bug::no_fence_after_wait>);
simt::TestKernel fenced_early("wgmma: fenced early", kRun<Bug::fenced_early, true>);
simt::TestKernel not_named("wgmma: not named", kRun<Bug::not_named>);
simt::TestKernel fragment_not_named("wgmma: registers not named", kRun<Bug::fragment_not_named, true>);
simt::TestKernel no_commit("wgmma: no commit", kRun<Bug::no_commit>);
simt::TestKernel no_wait("wgmma: no wait", kRun<Bug::no_wait>);
simt::TestKernel read_early("wgmma: read early", kRun<Bug::read_early>);
simt::TestKernel sum_changed("wgmma: sum changed", kRun<Bug::sum_changed>);
simt::TestKernel fragment_changed("wgmma: registers changed", kRun<Bug::fragment_changed, true>);
simt::TestKernel overwritten("wgmma: overwritten", kRun<Bug::overwritten>);
simt::TestKernel missing_warp("wgmma: missing warp", kRun<Bug::missing_warp>);
simt::TestKernel missing_lane("wgmma: missing lane", kRun<Bug::missing_lane>);
simt::TestKernel other_matrix("wgmma: other matrix", kRun<Bug::other_matrix>);
simt::TestKernel lanes_differ("wgmma: lanes differ", kRun<Bug::lanes_differ>);
simt::TestKernel within_pattern("wgmma: within pattern", kRun<Bug::within_pattern>);
simt::TestKernel beyond_shared("wgmma: beyond shared", kRun<Bug::beyond_shared>);
simt::TestKernel registers("wgmma: registers", kRun<Bug::registers>);

}  // namespace
}  // namespace fastformer::cuda
