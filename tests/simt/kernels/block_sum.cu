// out[block] = the sum of its row of in; every thread adds up some columns, then a tree adds up the threads.
#include "launch.h"
#include "test_kernels.h"

namespace fastformer::cuda {
namespace {

enum class Bug { none, no_barrier, no_last_barrier, column_beyond, shared_beyond };

template <Bug kBug>
__global__ void block_sum(const float* in, float* out, int columns) {
  float* partial = shared_memory<float>();
  const int thread = threadIdx.x, threads = blockDim.x;
  const float* row = in + static_cast<int64_t>(blockIdx.x) * columns;
  float sum = 0.0f;
  for (int i = thread; i < columns + (kBug == Bug::column_beyond); i += threads) sum += row[i];
  partial[thread + (kBug == Bug::shared_beyond)] = sum;
  if constexpr (kBug != Bug::no_barrier) __syncthreads();
  for (int half = threads / 2; half > 0; half /= 2) {
    if (thread < half) partial[thread] += partial[thread + half];
    if (kBug != Bug::no_last_barrier || half > 1) __syncthreads();
  }
  if (thread == threads - 1) out[blockIdx.x] = partial[0];
}

template <Bug kBug>
void run(const simt::TestArguments& arguments) {
  const int rows = arguments.number(0), columns = arguments.number(1), threads = arguments.number(2);
  launch(block_sum<kBug>, rows, threads, threads * sizeof(float), nullptr, arguments.tensor<const float>(0),
         arguments.tensor<float>(1), columns);
}

simt::TestKernel none("block_sum", &run<Bug::none>);
simt::TestKernel no_barrier("block_sum: no barrier", &run<Bug::no_barrier>);
simt::TestKernel no_last_barrier("block_sum: no last barrier", &run<Bug::no_last_barrier>);
simt::TestKernel column_beyond("block_sum: column beyond", &run<Bug::column_beyond>);
simt::TestKernel shared_beyond("block_sum: shared beyond", &run<Bug::shared_beyond>);

}  // namespace
}  // namespace fastformer::cuda
