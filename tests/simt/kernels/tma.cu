// out = 2 in, and as much in `plain`, box by box: a producer's TMA loads, two consumer warps, and TMA stores. Boxes
// begin before the tensors and end behind them.
#include "launch.h"
#include "ptx_hopper.cuh"
#include "test_kernels.h"

namespace fastformer::cuda {
namespace {

enum class Bug {
  none,
  no_barrier_after_init,
  no_init_fence,
  no_init,
  init_twice,
  mbarrier_written,
  expects_too_much,
  expects_too_little,
  arrives_twice,
  not_awaited_empty,
  not_awaited_full,
  wrong_parity,
  released_early,
  never_awaited,
  misaligned,
  beyond_shared,
  tensor_too_large,
  no_proxy_fence,
  source_overwritten,
  store_not_awaited,
  stored_twice,
  in_written,
};

constexpr int kStages = 2, kConsumers = 64, kThreads = kWarp + kConsumers, kBlocks = 2;
constexpr int kBoxBytes = 3072;  // at least; a multiple of 1024

template <int kRank>
struct Arguments {
  TensorMap in, out;
  int sizes[kRank], box[kRank], before[kRank];  // where the first box begins, that far before the tensor
  float* from;
  float* plain;
};

struct Barriers {
  Mbarrier full[kStages], empty[kStages];
};

// Chunks of 16 bytes change places within their row.
FASTFORMER_DEVICE int place(Swizzle swizzle, int row, int chunk) {
  switch (swizzle) {
    case Swizzle::none:
      return chunk;
    case Swizzle::bytes32:
      return chunk ^ (row / 4 % 2);
    case Swizzle::bytes64:
      return chunk ^ (row / 2 % 4);
    case Swizzle::bytes128:
      return chunk ^ (row % 8);
  }
  return chunk;
}

template <int kRank, Swizzle kSwizzle, Bug kBug>
__global__ void copy_boxes(const Arguments<kRank> arguments) {
  char* shared = shared_memory<char>();
  float* stages[kStages + 1];  // the last one is for what is stored
  for (int i = 0; i <= kStages; ++i) stages[i] = reinterpret_cast<float*>(shared + i * kBoxBytes);
  Barriers& barriers = *reinterpret_cast<Barriers*>(shared + (kStages + 1) * kBoxBytes);
  const int thread = threadIdx.x, lane = thread % kWarp;
  if (thread == 0) {
    for (int i = 0; i < kStages; ++i) {
      if constexpr (kBug != Bug::no_init) ptx::mbarrier_init(&barriers.full[i], 1);  // to be full
      ptx::mbarrier_init(&barriers.empty[i], kConsumers / kWarp);
      if constexpr (kBug == Bug::init_twice) ptx::mbarrier_init(&barriers.full[i], 1);  // again
    }
    if constexpr (kBug != Bug::no_init_fence) ptx::fence_mbarrier_init();
  }
  if constexpr (kBug == Bug::in_written) {
    if (thread == 0) arguments.from[5] = 0.0f;  // of in
  }
  if constexpr (kBug != Bug::no_barrier_after_init) __syncthreads();
  if constexpr (kBug == Bug::mbarrier_written) {
    if (thread == 40) barriers.full[1].state = 0;
  }
  int elements = 1, boxes = 1, counts[kRank];
  for (int i = 0; i < kRank; ++i) {
    elements *= arguments.box[i];
    counts[i] = (arguments.sizes[i] + arguments.before[i] + arguments.box[i] - 1) / arguments.box[i];
    boxes *= counts[i];
  }
  const auto begin_of = [&](int box, int (&at)[kRank]) {
    for (int i = 0; i < kRank; ++i) {
      at[i] = box % counts[i] * arguments.box[i] - arguments.before[i];
      box /= counts[i];
    }
  };
  const int bytes = elements * static_cast<int>(sizeof(float));
  int at[kRank];
  if (thread < kWarp) {
    if (thread != 0) return;
    int count = 0;
    for (int box = blockIdx.x; box < boxes; box += gridDim.x, ++count) {
      const int stage = count % kStages, parity = count / kStages % 2;
      if constexpr (kBug != Bug::not_awaited_empty) ptx::mbarrier_wait(&barriers.empty[stage], parity ^ 1);
      ptx::mbarrier_arrive_expect(&barriers.full[stage], bytes + (kBug == Bug::expects_too_much     ? 16
                                                                  : kBug == Bug::expects_too_little ? -16
                                                                                                    : 0));
      if constexpr (kBug == Bug::arrives_twice) ptx::mbarrier_arrive(&barriers.full[stage]);
      begin_of(box, at);
      float* to = stages[stage] + (kBug == Bug::misaligned ? 4 : 0) + (kBug == Bug::beyond_shared ? 4096 : 0);
      ptx::tma_load(to, arguments.in, &barriers.full[stage], at);
    }
    if constexpr (kBug == Bug::never_awaited) {
      const int stage = count % kStages;
      ptx::mbarrier_wait(&barriers.empty[stage], count / kStages % 2 ^ 1);
      ptx::mbarrier_arrive_expect(&barriers.full[stage], bytes);
      ptx::tma_load(stages[stage], arguments.in, &barriers.full[stage], at);  // of nobody
    }
    return;
  }
  const bool stores = thread == kWarp;
  int count = 0;
  for (int box = blockIdx.x; box < boxes; box += gridDim.x, ++count) {
    const int stage = count % kStages, parity = count / kStages % 2;
    begin_of(box, at);
    if constexpr (kBug != Bug::not_awaited_full) {
      ptx::mbarrier_wait(&barriers.full[stage], kBug == Bug::wrong_parity ? parity ^ 1 : parity);  // for the box
    }
    if constexpr (kBug == Bug::released_early) {
      if (lane == 0) ptx::mbarrier_arrive(&barriers.empty[stage]);
    }
    if constexpr (kBug != Bug::source_overwritten && kBug != Bug::store_not_awaited) {
      if (stores) ptx::tma_store_wait<0>();
    }
    ptx::barrier_sync(1, kConsumers);
    constexpr int kPack = 4;
    for (int i = (thread - kWarp) * kPack; i < elements; i += kConsumers * kPack) {
      const int row = i / arguments.box[0], chunk = i % arguments.box[0] / kPack;
      const int where = row * arguments.box[0] + place(kSwizzle, row, chunk) * kPack;
      Pack<float, kPack> pack = load<kPack>(stages[stage] + where);  // of the box
      for (float& x : pack.values) x *= 2.0f;
      store(stages[kStages] + where, pack);  // to the box that is stored
      for (int k = 0; k < kPack; ++k) {
        bool inside = true;
        int64_t to = 0, stride = 1;
        for (int d = 0, rest = i + k; d < kRank; ++d) {
          const int index = at[d] + rest % arguments.box[d];
          rest /= arguments.box[d];
          inside = inside && 0 <= index && index < arguments.sizes[d];
          to += index * stride;
          stride *= arguments.sizes[d];
        }
        if (inside) arguments.plain[to] = pack.values[k];
      }
    }
    __syncwarp();
    if (kBug != Bug::released_early && lane == 0) ptx::mbarrier_arrive(&barriers.empty[stage]);
    if constexpr (kBug != Bug::no_proxy_fence) ptx::fence_proxy_async();
    ptx::barrier_sync(1, kConsumers);
    if (stores) {
      ptx::tma_store(arguments.out, stages[kStages], at);                                           // to out
      if constexpr (kBug == Bug::stored_twice) ptx::tma_store(arguments.out, stages[kStages], at);  // once more
      ptx::tma_store_commit();
    }
    if constexpr (kBug == Bug::store_not_awaited) {
      if (stores && box + static_cast<int>(gridDim.x) < boxes) ptx::tma_store_wait<0>();
    }
  }
  if (stores && kBug != Bug::store_not_awaited) ptx::tma_store_wait<0>();
}

// Tensors in, out and plain; numbers: of each dimension, innermost first, the size, the box's, and where it begins.
template <int kRank, Swizzle kSwizzle, Bug kBug = Bug::none>
void run(const simt::TestArguments& arguments) {
  Arguments<kRank> of{};
  Boxes<kRank> boxes{arguments.tensor<float>(0), DType::float32, {}, {}, {}, kSwizzle};
  int64_t stride = 1;
  for (int i = 0; i < kRank; ++i) {
    of.sizes[i] = arguments.number(3 * i);
    boxes.sizes[i] = of.sizes[i] + (kBug == Bug::tensor_too_large && i == kRank - 1);
    boxes.box[i] = of.box[i] = arguments.number(3 * i + 1);
    of.before[i] = arguments.number(3 * i + 2);
    boxes.strides[i] = stride;
    stride *= of.sizes[i];
  }
  of.in = tensor_map(boxes);
  boxes.data = arguments.tensor<float>(1);
  of.out = tensor_map(boxes);
  of.from = arguments.tensor<float>(0);
  of.plain = arguments.tensor<float>(2);
  launch(copy_boxes<kRank, kSwizzle, kBug>, kBlocks, kThreads, (kStages + 1) * kBoxBytes + sizeof(Barriers), nullptr,
         of);
}

// out = the bytes of shared memory after a load of the box at 0.
template <Swizzle kSwizzle>
__global__ void load_box(const TensorMap map, int bytes, uint32_t* out) {
  uint32_t* shared = shared_memory<uint32_t>();
  Mbarrier& barrier = *reinterpret_cast<Mbarrier*>(shared + bytes / 4);
  if (threadIdx.x == 0) {
    ptx::mbarrier_init(&barrier, 1);
    ptx::fence_mbarrier_init();
    ptx::mbarrier_arrive_expect(&barrier, bytes);
    ptx::tma_load(shared, map, &barrier, {0, 0});
  }
  __syncthreads();
  ptx::mbarrier_wait(&barrier, 0);
  for (int i = threadIdx.x; i < bytes / 4; i += blockDim.x) out[i] = shared[i];
}

// Numbers: rows, and columns of 16 bits.
template <Swizzle kSwizzle>
void run_load(const simt::TestArguments& arguments) {
  const int rows = arguments.number(0), columns = arguments.number(1);
  const TensorMap map = tensor_map(
      Boxes<2>{arguments.tensor<void>(0), DType::bfloat16, {columns, rows}, {1, columns}, {columns, rows}, kSwizzle});
  launch(load_box<kSwizzle>, 1, 64, rows * columns * 2 + 8, nullptr, map, rows * columns * 2,
         arguments.tensor<uint32_t>(1));
}

// Numbers: the address, two sizes, two strides, the box, and the swizzle.
void make_map(const simt::TestArguments& arguments) {
  const auto& of = arguments.numbers;
  tensor_map(Boxes<2>{reinterpret_cast<void*>(of.at(0)),
                      DType::bfloat16,
                      {of.at(1), of.at(2)},
                      {of.at(3), of.at(4)},
                      {arguments.number(5), arguments.number(6)},
                      static_cast<Swizzle>(of.at(7))});
}

simt::TestKernel map("tensor map", &make_map);
simt::TestKernel of_2("tma of 2 dimensions", &run<2, Swizzle::none>);
simt::TestKernel of_3("tma of 3 dimensions", &run<3, Swizzle::bytes32>);
simt::TestKernel of_3_wider("tma of 3 dimensions, wider", &run<3, Swizzle::bytes64>);
simt::TestKernel of_4("tma of 4 dimensions", &run<4, Swizzle::bytes128>);
simt::TestKernel load_none("load box", &run_load<Swizzle::none>);
simt::TestKernel load_32("load box, 32 bytes", &run_load<Swizzle::bytes32>);
simt::TestKernel load_64("load box, 64 bytes", &run_load<Swizzle::bytes64>);
simt::TestKernel load_128("load box, 128 bytes", &run_load<Swizzle::bytes128>);

template <Bug kBug>
constexpr auto kRun = &run<2, Swizzle::bytes128, kBug>;
simt::TestKernel none("tma", kRun<Bug::none>);
simt::TestKernel no_barrier_after_init("tma: no barrier after init", kRun<Bug::no_barrier_after_init>);
simt::TestKernel no_init_fence("tma: no init fence", kRun<Bug::no_init_fence>);
simt::TestKernel no_init("tma: no init", kRun<Bug::no_init>);
simt::TestKernel init_twice("tma: init twice", kRun<Bug::init_twice>);
simt::TestKernel mbarrier_written("tma: mbarrier written", kRun<Bug::mbarrier_written>);
simt::TestKernel expects_too_much("tma: expects too much", kRun<Bug::expects_too_much>);
simt::TestKernel expects_too_little("tma: expects too little", kRun<Bug::expects_too_little>);
simt::TestKernel arrives_twice("tma: arrives twice", kRun<Bug::arrives_twice>);
simt::TestKernel not_awaited_empty("tma: not awaited empty", kRun<Bug::not_awaited_empty>);
simt::TestKernel not_awaited_full("tma: not awaited full", kRun<Bug::not_awaited_full>);
simt::TestKernel wrong_parity("tma: wrong parity", kRun<Bug::wrong_parity>);
simt::TestKernel released_early("tma: released early", kRun<Bug::released_early>);
simt::TestKernel never_awaited("tma: never awaited", kRun<Bug::never_awaited>);
simt::TestKernel misaligned("tma: misaligned", kRun<Bug::misaligned>);
simt::TestKernel beyond_shared("tma: beyond shared", kRun<Bug::beyond_shared>);
simt::TestKernel tensor_too_large("tma: tensor too large", kRun<Bug::tensor_too_large>);
simt::TestKernel no_proxy_fence("tma: no proxy fence", kRun<Bug::no_proxy_fence>);
simt::TestKernel source_overwritten("tma: source overwritten", kRun<Bug::source_overwritten>);
simt::TestKernel store_not_awaited("tma: store not awaited", kRun<Bug::store_not_awaited>);
simt::TestKernel stored_twice("tma: stored twice", kRun<Bug::stored_twice>);
simt::TestKernel in_written("tma: in written", kRun<Bug::in_written>);

}  // namespace
}  // namespace fastformer::cuda
