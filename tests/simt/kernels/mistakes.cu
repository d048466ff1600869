// Kernels with one mistake each, none of them a race.
#include <vector>

#include "common.h"
#include "ptx.cuh"
#include "test_kernels.h"

namespace fastformer::cuda {
namespace {

// --- loops that never end

enum class Loop { on_memory, without_access, on_barrier, on_warp };

template <Loop kLoop>
__global__ void loop(const int* stop) {
  if constexpr (kLoop == Loop::on_memory) {
    while (*const_cast<const volatile int*>(stop) == 0) continue;
  }
  if constexpr (kLoop == Loop::without_access) {
    for (unsigned odd = 2 * *stop + 1; odd != 0;) odd *= 3;  // stays odd
  }
  if constexpr (kLoop == Loop::on_barrier) {
    for (;;) __syncthreads();  // without end
  }
  if constexpr (kLoop == Loop::on_warp) {
    while (__any_sync(kAllLanes, *stop == 0)) continue;
  }
}

template <Loop kLoop>
void run_loop(const simt::TestArguments& arguments) {
  launch(loop<kLoop>, 1, 33, 0, nullptr, arguments.tensor<const int>(0));
}

simt::TestKernel on_memory("loop: on memory", &run_loop<Loop::on_memory>);
simt::TestKernel without_access("loop: without an access", &run_loop<Loop::without_access>);
simt::TestKernel on_barrier("loop: on a barrier", &run_loop<Loop::on_barrier>);
simt::TestKernel on_warp("loop: on a vote", &run_loop<Loop::on_warp>);

// --- memory that is not the kernel's

struct Numbers {
  const int* data;
  int copied[32];  // which the kernel may read
};

__global__ void read_pointer(const int* from, int* out) {
  out[threadIdx.x] = from[threadIdx.x];  // of a pointer
}

__global__ void read_struct(const Numbers from, int* out) {
  out[threadIdx.x] = from.copied[threadIdx.x];
  if (from.data != nullptr) out[threadIdx.x] += from.data[threadIdx.x];
}

// Thread 0's local memory.
__global__ void read_neighbour(int* out) {
  const int mine[1] = {static_cast<int>(threadIdx.x)};
  const int** shared = shared_memory<const int*>();
  if (threadIdx.x == 0) shared[0] = mine;
  __syncthreads();
  out[threadIdx.x] = *shared[0];
  __syncthreads();
}

void run_host_stack(const simt::TestArguments& arguments) {
  const int numbers[32] = {};
  launch(read_pointer, 1, 32, 0, nullptr, numbers, arguments.tensor<int>(1));
}
void run_host_heap(const simt::TestArguments& arguments) {
  const std::vector<int> numbers(32);
  launch(read_pointer, 1, 32, 0, nullptr, numbers.data(), arguments.tensor<int>(1));
}
void run_struct(const simt::TestArguments& arguments) {
  launch(read_struct, 1, 32, 0, nullptr, Numbers{nullptr, {0, 1, 2, 3}}, arguments.tensor<int>(1));
}
void run_struct_of_tensor(const simt::TestArguments& arguments) {
  launch(read_struct, 1, 32, 0, nullptr, Numbers{arguments.tensor<int>(0), {0, 1, 2, 3}}, arguments.tensor<int>(1));
}
void run_struct_of_stack(const simt::TestArguments& arguments) {
  const int numbers[32] = {};
  launch(read_struct, 1, 32, 0, nullptr, Numbers{numbers, {}}, arguments.tensor<int>(1));
}
void run_struct_of_heap(const simt::TestArguments& arguments) {
  const std::vector<int> numbers(32);
  launch(read_struct, 1, 32, 0, nullptr, Numbers{numbers.data(), {}}, arguments.tensor<int>(1));
}
void run_neighbour(const simt::TestArguments& arguments) {
  launch(read_neighbour, 1, 32, sizeof(int*), nullptr, arguments.tensor<int>(1));
}

simt::TestKernel host_stack("memory: host's stack", &run_host_stack);
simt::TestKernel host_heap("memory: host's heap", &run_host_heap);
simt::TestKernel by_value("memory", &run_struct);
simt::TestKernel by_value_of_tensor("memory by a struct", &run_struct_of_tensor);
simt::TestKernel struct_of_stack("memory: struct of host's stack", &run_struct_of_stack);
simt::TestKernel struct_of_heap("memory: struct of host's heap", &run_struct_of_heap);
simt::TestKernel neighbour("memory: neighbour's", &run_neighbour);

// --- local arrays, and addresses that are not aligned

struct alignas(16) Four {
  int x, y, z, w;
};

enum class Local { array, pack, cast };

template <Local kLocal>
__global__ void use_local(const int* from, int* out) {
  const int thread = threadIdx.x;
  if constexpr (kLocal == Local::array) {
    int sums[4] = {};
    for (int i = 0; i < 4; ++i) sums[i] += from[i];
    out[thread] = sums[thread];
  }
  if constexpr (kLocal == Local::pack) {
    Pack<int, 4> pack = load<4>(from);
    out[thread] = pack.values[thread];
  }
  if constexpr (kLocal == Local::cast) {
    const Four four = *reinterpret_cast<const Four*>(from + thread);  // of a cast pointer
    out[thread] = four.x + four.w;
  }
}

template <Local kLocal>
void run_local(const simt::TestArguments& arguments) {
  launch(use_local<kLocal>, 1, arguments.number(0), 0, nullptr, arguments.tensor<const int>(0),
         arguments.tensor<int>(1));
}

simt::TestKernel array("local: array", &run_local<Local::array>);
simt::TestKernel pack("local: pack", &run_local<Local::pack>);
simt::TestKernel cast("local: cast", &run_local<Local::cast>);

// --- barriers of half warps

enum class Half { one, ended, each_its_own };

template <Half kHalf>
__global__ void meet_by_halves(int* out) {
  const int half = threadIdx.x % kWarp / 16;
  if constexpr (kHalf == Half::each_its_own) {
    ptx::barrier_sync(1 + half, 32);  // another for each half
  } else {
    if (half == 0) ptx::barrier_sync(1, 32);  // of one half
    if constexpr (kHalf == Half::one) __syncthreads();
  }
  out[threadIdx.x] = 1;
}

template <Half kHalf>
void run_halves(const simt::TestArguments& arguments) {
  launch(meet_by_halves<kHalf>, 1, 64, 0, nullptr, arguments.tensor<int>(1));
}

simt::TestKernel one_half("halves: one", &run_halves<Half::one>);
simt::TestKernel ended_half("halves: one, the other ends", &run_halves<Half::ended>);
simt::TestKernel own_barriers("halves: each its own", &run_halves<Half::each_its_own>);

// --- results that nobody writes

__global__ void add_one(float* out) {
  out[threadIdx.x] += 1.0f;  // to what was there
}

void run_heads(const simt::TestArguments&) {
  AtenTensorHandle made = nullptr;
  const int64_t one = 1;
  STABLE_TORCH_ERROR_CODE_CHECK(
      aoti_torch_empty_strided(1, &one, &one, aoti_torch_dtype_float32(), aoti_torch_device_type_cpu(), 0, &made));
  const Tensor heads = new_heads(Tensor(made), 1, 2, 3, 4);
  launch(add_one, 1, 24, 0, nullptr, mutable_pointer<float>(heads));
}

simt::TestKernel heads("heads: read", &run_heads);

}  // namespace
}  // namespace fastformer::cuda
