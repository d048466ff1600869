// What one block of a cluster tells another by mbarriers, and by copies.
#include "launch.h"
#include "ptx_hopper.cuh"
#include "test_kernels.h"

namespace fastformer::cuda {
namespace {

// Block 0 writes to global memory, and to the shared memory of block 1, arrives at an mbarrier there, which orders
// neither, and meets block 1, which then reads both.
enum class Way { synced, within_block, not_synced, by_another, within_block_relaxed, no_last_sync, no_mbarrier, twice };

struct Message {
  float value;
  Mbarrier ready, passed_on;
};

template <Way kWay>
__global__ void tell(float* out, float* told) {
  Message& message = *shared_memory<Message>();
  const int thread = threadIdx.x, rank = ptx::cluster_rank();
  const int from = kWay == Way::within_block || kWay == Way::within_block_relaxed ? 1 : 0;
  if (thread == 0 && !(kWay == Way::no_mbarrier && rank == 1)) {
    ptx::mbarrier_init(&message.ready, 1);
    ptx::mbarrier_init(&message.passed_on, 1);
    ptx::fence_mbarrier_init();
    if constexpr (kWay == Way::twice) ptx::mbarrier_arrive_expect(&message.ready, 16);
  }
  ptx::cluster_sync();
  if (rank == from && thread == 33) {
    ptx::of_block(&message, 1)->value = 3.0f;
    told[0] = 4.0f;
    if constexpr (kWay == Way::within_block) {
      ptx::mbarrier_arrive(&message.ready);
    } else {
      ptx::mbarrier_arrive_at(&message.ready, 1);
    }
  }
  if (rank == 1 && thread == (kWay == Way::by_another ? 2 : 1)) {
    ptx::mbarrier_wait(&message.ready, 0);
    if constexpr (kWay == Way::by_another) ptx::mbarrier_arrive(&message.passed_on);
  }
  if constexpr (kWay == Way::synced) ptx::cluster_sync();
  if (rank == 1 && thread == 1) {
    if constexpr (kWay == Way::by_another) ptx::mbarrier_wait(&message.passed_on, 0);
    out[0] = message.value;  // as told
    out[1] = told[0];        // in global memory
  }
  if constexpr (kWay != Way::no_last_sync) ptx::cluster_sync();
}

template <Way kWay>
void run_tell(const simt::TestArguments& arguments) {
  launch_clusters(tell<kWay>, 2, 2, 64, sizeof(Message), nullptr, arguments.tensor<float>(0),
                  arguments.tensor<float>(1));
}

simt::TestKernel synced("tell", &run_tell<Way::synced>);
simt::TestKernel within_block("tell within the block", &run_tell<Way::within_block>);
simt::TestKernel not_synced("tell: not synced", &run_tell<Way::not_synced>);
simt::TestKernel by_another("tell: by another", &run_tell<Way::by_another>);
simt::TestKernel relaxed("tell: relaxed within the block", &run_tell<Way::within_block_relaxed>);
simt::TestKernel no_last_sync("tell: no last sync", &run_tell<Way::no_last_sync>);
simt::TestKernel no_mbarrier("tell: no mbarrier", &run_tell<Way::no_mbarrier>);
simt::TestKernel twice("tell: twice", &run_tell<Way::twice>);

// --- block 0 loads a box for block 1 alone, which stores it elsewhere

enum class Bug { none, block_ended, changed_by_other, registers };

constexpr int kFloats = 32;

template <Bug kBug>
__global__ void pass_box(const TensorMap in, const TensorMap out) {
  float* box = shared_memory<float>();
  Mbarrier& full = *reinterpret_cast<Mbarrier*>(box + kFloats);
  const int rank = ptx::cluster_rank();
  if (threadIdx.x == 0) {
    ptx::mbarrier_init(&full, 1);
    ptx::fence_mbarrier_init();
  }
  ptx::cluster_sync();
  if (rank == 0 && threadIdx.x == 0) ptx::tma_load_to(box, in, &full, {0, 0}, 2);  // to block 1
  if constexpr (kBug == Bug::block_ended) return;
  if (rank == 1) {
    if (threadIdx.x == 0) ptx::mbarrier_arrive_expect(&full, kFloats * sizeof(float));
    ptx::mbarrier_wait(&full, 0);
  }
  if constexpr (kBug == Bug::changed_by_other) {
    ptx::cluster_sync();
    if (rank == 0 && threadIdx.x == 5) ptx::of_block(box, 1)[5] = 0.0f;  // of the neighbour's box
    ptx::fence_proxy_async();
    ptx::cluster_sync();
  }
  if (rank == 1 && threadIdx.x == 0) {
    ptx::tma_store(out, box, {0, 0});
    ptx::tma_store_commit();
    ptx::tma_store_wait<0>();
  }
  if constexpr (kBug == Bug::registers) {
    if (rank == 1 && threadIdx.x >= kWarp) ptx::fewer_registers<128>();
  }
  ptx::cluster_sync();  // the last
}

template <Bug kBug>
void run_pass_box(const simt::TestArguments& arguments) {
  const auto map = [&](int tensor) {
    return tensor_map(Boxes<2>{
        arguments.tensor<float>(tensor), DType::float32, {kFloats, 1}, {1, kFloats}, {kFloats, 1}, Swizzle::none});
  };
  launch_clusters(pass_box<kBug>, 2, 2, 64, kFloats * sizeof(float) + sizeof(Mbarrier), nullptr, map(0), map(1));
}

simt::TestKernel box("box", &run_pass_box<Bug::none>);
simt::TestKernel block_ended("box: block ended", &run_pass_box<Bug::block_ended>);
simt::TestKernel changed_by_other("box: changed by other", &run_pass_box<Bug::changed_by_other>);
simt::TestKernel registers("box: registers", &run_pass_box<Bug::registers>);

// --- what program[step][thread of the cluster] says: kind + 8 * number of an mbarrier + 4096 * rank

enum Kind { nothing, reads, writes, arrives, waits };

// Each block has a number that is read and written, and mbarriers for one arrival each.
__global__ void run_messages(const int* program, int* out, int steps) {
  auto* mbarriers = shared_memory<Mbarrier>();
  auto* number_of_block = reinterpret_cast<int*>(mbarriers + steps);
  const int thread = blockIdx.x * blockDim.x + threadIdx.x, threads = gridDim.x * blockDim.x;
  const int own = ptx::cluster_rank();
  if (threadIdx.x == 0) {
    *number_of_block = 0;
    for (int i = 0; i < steps; ++i) ptx::mbarrier_init(&mbarriers[i], 1);
    ptx::fence_mbarrier_init();
  }
  ptx::cluster_sync();
  int sum = 0;
  for (int step = 0; step < steps; ++step) {
    const int what = program[step * threads + thread], number = what / 8 % 512, rank = what / 4096;
    const auto kind = static_cast<Kind>(what % 8);
    if (kind == reads) sum += *ptx::of_block(number_of_block, rank);
    if (kind == writes) *ptx::of_block(number_of_block, rank) = 1;
    if (kind == arrives && rank == own) ptx::mbarrier_arrive(&mbarriers[number]);
    if (kind == arrives && rank != own) ptx::mbarrier_arrive_at(&mbarriers[number], rank);
    if (kind == waits) ptx::mbarrier_wait(&mbarriers[number], 0);
  }
  out[thread] = sum;
  ptx::cluster_sync();
}

void run_program(const simt::TestArguments& arguments) {
  const int blocks = arguments.number(0), threads = arguments.number(1), steps = arguments.number(2);
  launch_clusters(run_messages, blocks, blocks, threads, steps * sizeof(Mbarrier) + sizeof(int), nullptr,
                  arguments.tensor<const int>(0), arguments.tensor<int>(1), steps);
}

simt::TestKernel messages("messages", &run_program);

}  // namespace
}  // namespace fastformer::cuda
