// Single accesses of global memory, each right or wrong by itself: number 0 says which.
#include "launch.h"
#include "test_kernels.h"

namespace fastformer::cuda {
namespace {

enum class What { neighbours, same_by_blocks, atomically, packs, packs_one_further, writes_input, reads_output };

template <What kWhat>
__global__ void touch(const BFloat16* in, BFloat16* out, int* count) {
  const int at = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
  if constexpr (kWhat == What::neighbours) out[at] = in[at];
  if constexpr (kWhat == What::same_by_blocks) out[threadIdx.x] = in[at];
  if constexpr (kWhat == What::atomically) atomicAdd(count, 1);
  if constexpr (kWhat == What::packs) store<8>(out + at * 8, load<8>(in + at * 8));
  if constexpr (kWhat == What::packs_one_further) store<8>(out + at * 8, load<8>(in + at * 8 + 1));
  if constexpr (kWhat == What::writes_input) const_cast<BFloat16*>(in)[at] = out[at];
  if constexpr (kWhat == What::reads_output) out[at] = out[at + 1];
}

template <What kWhat>
void run(const simt::TestArguments& arguments) {
  launch(touch<kWhat>, arguments.number(0), arguments.number(1), 0, nullptr, arguments.tensor<const BFloat16>(0),
         arguments.tensor<BFloat16>(1), arguments.tensor<int>(2));
}

void run_twice(const simt::TestArguments& arguments) {
  run<What::neighbours>(arguments);
  launch(touch<What::neighbours>, arguments.number(0), arguments.number(1), 0, nullptr,
         arguments.tensor<const BFloat16>(1), arguments.tensor<BFloat16>(3), arguments.tensor<int>(2));
}

simt::TestKernel two_launches("two launches", &run_twice);
simt::TestKernel neighbours("neighbours", &run<What::neighbours>);
simt::TestKernel same_by_blocks("same by blocks", &run<What::same_by_blocks>);
simt::TestKernel atomically("atomically", &run<What::atomically>);
simt::TestKernel packs("packs", &run<What::packs>);
simt::TestKernel packs_one_further("packs one further", &run<What::packs_one_further>);
simt::TestKernel writes_input("writes input", &run<What::writes_input>);
simt::TestKernel reads_output("reads output", &run<What::reads_output>);

}  // namespace
}  // namespace fastformer::cuda
