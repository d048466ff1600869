// PTX of sm_90a: mbarriers, copies by the tensor memory accelerator (TMA), and products of warpgroups (wgmma). Files
// that use it are compiled for that architecture alone. The emulator has its own meaning for each
// (tests/simt/simt_hopper.h).
//
// TMA and wgmma access memory by the asynchronous proxy. What threads wrote to shared memory themselves is seen there
// once they have called fence_proxy_async, and a barrier has passed.
#pragma once

#include "ptx.cuh"
#include "tensor_map.h"

namespace fastformer::cuda {

constexpr int kWarpgroup = 128;

// An mbarrier in shared memory: its phase ends when the arrivals it was made for have come, and the bytes expected.
struct alignas(8) Mbarrier {
  uint64_t state;
};

}  // namespace fastformer::cuda

#ifdef FASTFORMER_SIMT
#include "simt_hopper.h"
#else

namespace fastformer::cuda::ptx {

// mbarrier.init, by one thread; fence_mbarrier_init and __syncthreads before anyone uses it, or cluster_sync where
// other blocks do.
FASTFORMER_DEVICE void mbarrier_init(Mbarrier* barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals) : "memory");
}
// fence.mbarrier_init: the copies of TMA, and other blocks, see the mbarriers this thread made.
FASTFORMER_DEVICE void fence_mbarrier_init() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }
FASTFORMER_DEVICE void mbarrier_arrive(Mbarrier* barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
}
// mbarrier.arrive.expect_tx: one arrival, and the phase waits for so many bytes more.
FASTFORMER_DEVICE void mbarrier_arrive_expect(Mbarrier* barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes)
               : "memory");
}
// mbarrier.try_wait.parity: until the phase of that parity (of the first 0, of the next 1, ...) has ended. A new
// mbarrier counts as if a phase of parity 1 had.
FASTFORMER_DEVICE void mbarrier_wait(Mbarrier* barrier, int parity) {
  uint32_t done;
  do {
    asm volatile("{\n.reg .pred p;\nmbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\nselp.u32 %0, 1, 0, p;\n}"
                 : "=r"(done)
                 : "r"(shared_address(barrier)), "r"(parity)
                 : "memory");
  } while (done == 0);
}

// mbarrier.arrive at the one that block `rank` of the cluster has where this one has `barrier`. Relaxed: products and
// copies that this thread has waited for have read and written by then; of what threads did it passes on nothing. To
// release that at the scope of a cluster would wait for all of the thread's stores to global memory (MEMBAR.ALL.GPU).
FASTFORMER_DEVICE void mbarrier_arrive_at(Mbarrier* barrier, int rank) {
  asm volatile(
      "{\n.reg .b32 there;\nmapa.shared::cluster.u32 there, %0, %1;\n"
      "mbarrier.arrive.relaxed.cluster.shared::cluster.b64 _, [there];\n}" ::"r"(shared_address(barrier)),
      "r"(rank)
      : "memory");
}

FASTFORMER_DEVICE void fence_proxy_async() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

#define FASTFORMER_AT_2 "r"(at[0]), "r"(at[1])
#define FASTFORMER_AT_3 FASTFORMER_AT_2, "r"(at[2])
#define FASTFORMER_AT_4 FASTFORMER_AT_3, "r"(at[3])
#define FASTFORMER_AT_5 FASTFORMER_AT_4, "r"(at[4])

// cp.async.bulk.tensor, by one thread: the box whose first element has these coordinates, innermost first, to shared
// memory. What lies outside of the tensor becomes zeros. Its bytes count for the barrier, those outside too.
template <int kRank>
FASTFORMER_DEVICE void tma_load(void* shared, const TensorMap& map, Mbarrier* barrier, const int (&at)[kRank]) {
#define FASTFORMER_LOAD(rank, places)                                                                        \
  asm volatile("cp.async.bulk.tensor." rank                                                                         \
               ".shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {" places "}], [%2];" ::"r"(        \
                   shared_address(shared)),                                                                         \
               "l"(&map), "r"(shared_address(barrier))
  if constexpr (kRank == 2) {
    FASTFORMER_LOAD("2d", "%3, %4"), FASTFORMER_AT_2 : "memory");
  } else if constexpr (kRank == 3) {
    FASTFORMER_LOAD("3d", "%3, %4, %5"), FASTFORMER_AT_3 : "memory");
  } else if constexpr (kRank == 4) {
    FASTFORMER_LOAD("4d", "%3, %4, %5, %6"), FASTFORMER_AT_4 : "memory");
  } else {
    static_assert(kRank == 5);
    FASTFORMER_LOAD("5d", "%3, %4, %5, %6, %7"), FASTFORMER_AT_5 : "memory");
  }
#undef FASTFORMER_LOAD
}
// The same to each block of the cluster whose bit in `blocks` is set: to where it has what this one has at `shared`,
// and the bytes count for the mbarrier it has where this one has `barrier`. They may come before it has said that it
// expects them.
template <int kRank>
FASTFORMER_DEVICE void tma_load_to(void* shared, const TensorMap& map, Mbarrier* barrier, const int (&at)[kRank],
                                   int blocks) {
  static_assert(kRank == 2);
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster"
      " [%0], [%1, {%3, %4}], [%2], %5;" ::"r"(shared_address(shared)),
      "l"(&map), "r"(shared_address(barrier)), FASTFORMER_AT_2, "h"(static_cast<uint16_t>(blocks))
      : "memory");
}
// The other way round: what lies outside of the tensor is dropped. tma_store_wait says when shared memory has been
// read.
template <int kRank>
FASTFORMER_DEVICE void tma_store(const TensorMap& map, const void* shared, const int (&at)[kRank]) {
#define FASTFORMER_STORE(rank, places)                                                                              \
  asm volatile("cp.async.bulk.tensor." rank ".global.shared::cta.bulk_group [%0, {" places "}], [%1];" ::"l"(&map), \
               "r"(shared_address(shared))
  if constexpr (kRank == 2) {
    FASTFORMER_STORE("2d", "%2, %3"), FASTFORMER_AT_2 : "memory");
  } else if constexpr (kRank == 3) {
    FASTFORMER_STORE("3d", "%2, %3, %4"), FASTFORMER_AT_3 : "memory");
  } else if constexpr (kRank == 4) {
    FASTFORMER_STORE("4d", "%2, %3, %4, %5"), FASTFORMER_AT_4 : "memory");
  } else {
    static_assert(kRank == 5);
    FASTFORMER_STORE("5d", "%2, %3, %4, %5, %6"), FASTFORMER_AT_5 : "memory");
  }
#undef FASTFORMER_STORE
}

// cp.async.bulk.commit_group: this thread's stores since the last commit become its newest group.
FASTFORMER_DEVICE void tma_store_commit() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }
// cp.async.bulk.wait_group.read: until at most kGroups of this thread's newest groups have yet to read shared memory.
template <int kGroups>
FASTFORMER_DEVICE void tma_store_wait() {
  asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(kGroups) : "memory");
}

// cp.reduce.async.bulk: adds `bytes` of floats to global memory, each atomically; a copy like tma_store. Bytes and both
// addresses are multiples of 16.
FASTFORMER_DEVICE void bulk_add(float* to, const float* shared, int bytes) {
  asm volatile("cp.reduce.async.bulk.global.shared::cta.bulk_group.add.f32 [%0], [%1], %2;" ::"l"(to),
               "r"(shared_address(shared)), "r"(bytes)
               : "memory");
}
// cp.async.bulk.wait_group: until all of this thread's groups have been carried out.
FASTFORMER_DEVICE void bulk_wait_all() { asm volatile("cp.async.bulk.wait_group 0;" ::: "memory"); }

// A counter in global memory puts blocks in order: what a thread did before count_up, its bulk copies that it has
// waited for too, comes before what another does after wait_for_count.
FASTFORMER_DEVICE void count_up(int* counter) {
  asm volatile("fence.proxy.async.global;\nred.release.gpu.global.add.s32 [%0], 1;" ::"l"(counter) : "memory");
}
FASTFORMER_DEVICE void wait_for_count(const int* counter, int count) {
  int now;
  do {
    asm volatile("ld.acquire.gpu.global.s32 %0, [%1];" : "=r"(now) : "l"(counter) : "memory");
  } while (now != count);
  asm volatile("fence.proxy.async.global;" ::: "memory");
}

// --- clusters: blocks that run at the same time and see each other's shared memory (launch_clusters)

// The block's number in its cluster.
FASTFORMER_DEVICE int cluster_rank() {
  int rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}
// mapa: where another block of the cluster has what is at `shared` in this one. It must have begun, and not have ended:
// cluster_sync sees to either.
template <typename T>
FASTFORMER_DEVICE T* of_block(T* shared, int rank) {
  uint64_t address;
  asm volatile("mapa.u64 %0, %1, %2;" : "=l"(address) : "l"(shared), "r"(rank));
  return reinterpret_cast<T*>(address);
}
// barrier.cluster: __syncthreads for all blocks of the cluster.
FASTFORMER_DEVICE void cluster_sync() {
  asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
}

// setmaxnreg, by all warps of a warpgroup: from here on a thread has that many registers, a multiple of 8. More waits
// until others have given theirs up.
template <int kRegisters>
FASTFORMER_DEVICE void fewer_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
template <int kRegisters>
FASTFORMER_DEVICE void more_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

// --- products of warpgroups

// The compiler doesn't know that products go on in the background. It must neither move an accumulator, or a fragment,
// into another register while they do, nor read one before they have ended.
template <int kTiles>
FASTFORMER_DEVICE void pin(float (&values)[kTiles][4]) {
#pragma unroll
  for (int i = 0; i < kTiles; ++i) {
    asm volatile("" : "+f"(values[i][0]), "+f"(values[i][1]), "+f"(values[i][2]), "+f"(values[i][3])::"memory");
  }
}
template <int kTiles>
FASTFORMER_DEVICE void pin(uint32_t (&values)[kTiles][4]) {
#pragma unroll
  for (int i = 0; i < kTiles; ++i) {
    asm volatile("" : "+r"(values[i][0]), "+r"(values[i][1]), "+r"(values[i][2]), "+r"(values[i][3])::"memory");
  }
}

// wgmma.fence: before the first product that uses these registers, accumulators and fragments of a, and again after
// they were changed.
template <typename... Registers>
FASTFORMER_DEVICE void wgmma_fence(Registers&... registers) {
  (pin(registers), ...);
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}
// wgmma.commit_group: the warpgroup's products since the last commit become its newest group.
FASTFORMER_DEVICE void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
// wgmma.wait_group: until at most kGroups of the newest groups are under way. These registers are then free: they must
// be all that the ended groups used.
template <int kGroups, typename... Registers>
FASTFORMER_DEVICE void wgmma_wait(Registers&... registers) {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kGroups) : "memory");
  (pin(registers), ...);
}

// What comes next stays behind the arithmetic that x, which is never negative, comes from: ptxas moves a wgmma_wait up
// across arithmetic that the products were to hide, but across no instruction that may sleep.
FASTFORMER_DEVICE void stay_behind(float x) {
  asm volatile("{\n.reg .pred p;\nsetp.lt.f32 p, %0, 0f00000000;\n@p nanosleep.u32 0;\n}" ::"f"(x) : "memory");
}

#define FASTFORMER_TILES_8(d, i)                                                                                       \
  "+f"(d[i][0]), "+f"(d[i][1]), "+f"(d[i][2]), "+f"(d[i][3]), "+f"(d[i + 1][0]), "+f"(d[i + 1][1]), "+f"(d[i + 1][2]), \
      "+f"(d[i + 1][3]), "+f"(d[i + 2][0]), "+f"(d[i + 2][1]), "+f"(d[i + 2][2]), "+f"(d[i + 2][3]),                   \
      "+f"(d[i + 3][0]), "+f"(d[i + 3][1]), "+f"(d[i + 3][2]), "+f"(d[i + 3][3]), "+f"(d[i + 4][0]),                   \
      "+f"(d[i + 4][1]), "+f"(d[i + 4][2]), "+f"(d[i + 4][3]), "+f"(d[i + 5][0]), "+f"(d[i + 5][1]),                   \
      "+f"(d[i + 5][2]), "+f"(d[i + 5][3]), "+f"(d[i + 6][0]), "+f"(d[i + 6][1]), "+f"(d[i + 6][2]),                   \
      "+f"(d[i + 6][3]), "+f"(d[i + 7][0]), "+f"(d[i + 7][1]), "+f"(d[i + 7][2]), "+f"(d[i + 7][3])
#define FASTFORMER_OPERANDS_0                                                                                      \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, " \
  "%24, %25, %26, %27, %28, %29, %30, %31"
#define FASTFORMER_OPERANDS_1                                                                                      \
  "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, %53, " \
  "%54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define FASTFORMER_OPERANDS_2                                                                                      \
  "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, %80, %81, %82, %83, %84, %85, " \
  "%86, %87, %88, %89, %90, %91, %92, %93, %94, %95"
#define FASTFORMER_OPERANDS_3                                                                                      \
  "%96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, %112, %113, %114, " \
  "%115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"
// The instruction for `columns` columns of a type, with the accumulator's operands, and the numbers of the others: a
// from shared memory (two descriptors, whether to add, and how each lies), or from four registers.
#define FASTFORMER_WGMMA_SHARED(columns, type, list, a, b, add, a_lies, b_lies, ...)                              \
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" #add                                                          \
               ", 0;\n"                                                                                           \
               "wgmma.mma_async.sync.aligned.m64n" #columns "k16.f32." type "." type " {" list "}, %" #a ", %" #b \
               ", p, 1, 1, %" #a_lies ", %" #b_lies ";\n}"                                                        \
               : __VA_ARGS__                                                                                      \
               : "l"(of_a), "l"(of_b), "r"(accumulate), "n"(kLiesA), "n"(kLiesB))
#define FASTFORMER_WGMMA_REGISTERS(columns, type, list, a0, a1, a2, a3, b, add, b_lies, ...)                         \
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" #add                                                             \
               ", 0;\n"                                                                                              \
               "wgmma.mma_async.sync.aligned.m64n" #columns "k16.f32." type "." type " {" list "}, {%" #a0 ", %" #a1 \
               ", %" #a2 ", %" #a3 "}, %" #b ", p, 1, 1, %" #b_lies ";\n}"                                           \
               : __VA_ARGS__                                                                                         \
               : "r"(of_a[0]), "r"(of_a[1]), "r"(of_a[2]), "r"(of_a[3]), "l"(of_b), "r"(accumulate), "n"(kLiesB))

// wgmma.mma_async.m64nNk16, N = 8 kTiles: d = a b, or d += a b where `add`. a is 64 x 16, b 16 x N, both of T and told
// by matrix_descriptor; d is 64 x N, warp w of the warpgroup has its rows 16 w to 16 w + 15 as mma_m16n8k16 has them,
// tile by tile. In shared memory rows are rows of a (columns of b) with the depth along them, or, transposed, steps of
// the depth.
template <typename T, bool kTransposedA, bool kTransposedB, int kTiles>
FASTFORMER_DEVICE void wgmma(float (&d)[kTiles][4], uint64_t of_a, uint64_t of_b, bool add) {
  constexpr int kLiesA = kTransposedA, kLiesB = kTransposedB;
  const int accumulate = add;
  constexpr bool kBFloat16 = __is_same(T, BFloat16);
#define FASTFORMER_BOTH_TYPES(columns, ...)                \
  if constexpr (kBFloat16) {                               \
    FASTFORMER_WGMMA_SHARED(columns, "bf16", __VA_ARGS__); \
  } else {                                                 \
    FASTFORMER_WGMMA_SHARED(columns, "f16", __VA_ARGS__);  \
  }
  if constexpr (kTiles == 8) {
    FASTFORMER_BOTH_TYPES(64, FASTFORMER_OPERANDS_0, 32, 33, 34, 35, 36, FASTFORMER_TILES_8(d, 0))
  } else if constexpr (kTiles == 16) {
    FASTFORMER_BOTH_TYPES(128, FASTFORMER_OPERANDS_0 ", " FASTFORMER_OPERANDS_1, 64, 65, 66, 67, 68,
                          FASTFORMER_TILES_8(d, 0), FASTFORMER_TILES_8(d, 8))
  } else if constexpr (kTiles == 24) {
    FASTFORMER_BOTH_TYPES(192, FASTFORMER_OPERANDS_0 ", " FASTFORMER_OPERANDS_1 ", " FASTFORMER_OPERANDS_2, 96, 97, 98,
                          99, 100, FASTFORMER_TILES_8(d, 0), FASTFORMER_TILES_8(d, 8), FASTFORMER_TILES_8(d, 16))
  } else {
    static_assert(kTiles == 32);
    FASTFORMER_BOTH_TYPES(
        256, FASTFORMER_OPERANDS_0 ", " FASTFORMER_OPERANDS_1 ", " FASTFORMER_OPERANDS_2 ", " FASTFORMER_OPERANDS_3,
        128, 129, 130, 131, 132, FASTFORMER_TILES_8(d, 0), FASTFORMER_TILES_8(d, 8), FASTFORMER_TILES_8(d, 16),
        FASTFORMER_TILES_8(d, 24))
  }
#undef FASTFORMER_BOTH_TYPES
}

// The same with a in registers: each warp its 16 rows, as mma_m16n8k16 has them.
template <typename T, bool kTransposedB, int kTiles>
FASTFORMER_DEVICE void wgmma(float (&d)[kTiles][4], const uint32_t (&of_a)[4], uint64_t of_b, bool add) {
  constexpr int kLiesB = kTransposedB;
  const int accumulate = add;
  constexpr bool kBFloat16 = __is_same(T, BFloat16);
#define FASTFORMER_BOTH_TYPES(columns, ...)                   \
  if constexpr (kBFloat16) {                                  \
    FASTFORMER_WGMMA_REGISTERS(columns, "bf16", __VA_ARGS__); \
  } else {                                                    \
    FASTFORMER_WGMMA_REGISTERS(columns, "f16", __VA_ARGS__);  \
  }
  if constexpr (kTiles == 8) {
    FASTFORMER_BOTH_TYPES(64, FASTFORMER_OPERANDS_0, 32, 33, 34, 35, 36, 37, 38, FASTFORMER_TILES_8(d, 0))
  } else if constexpr (kTiles == 16) {
    FASTFORMER_BOTH_TYPES(128, FASTFORMER_OPERANDS_0 ", " FASTFORMER_OPERANDS_1, 64, 65, 66, 67, 68, 69, 70,
                          FASTFORMER_TILES_8(d, 0), FASTFORMER_TILES_8(d, 8))
  } else {
    static_assert(kTiles == 32);
    FASTFORMER_BOTH_TYPES(
        256, FASTFORMER_OPERANDS_0 ", " FASTFORMER_OPERANDS_1 ", " FASTFORMER_OPERANDS_2 ", " FASTFORMER_OPERANDS_3,
        128, 129, 130, 131, 132, 133, 134, FASTFORMER_TILES_8(d, 0), FASTFORMER_TILES_8(d, 8),
        FASTFORMER_TILES_8(d, 16), FASTFORMER_TILES_8(d, 24))
  }
#undef FASTFORMER_BOTH_TYPES
}

#undef FASTFORMER_WGMMA_SHARED
#undef FASTFORMER_WGMMA_REGISTERS

}  // namespace fastformer::cuda::ptx
#endif

namespace fastformer::cuda {

// The operand of a wgmma in shared memory, swizzled as by Swizzle::bytes128, in the instruction's 64 bits. `start` lies
// in patterns of 8 rows of 128 bytes, each at a multiple of 1024 bytes. From 8 rows to the next 8 it is `stride` bytes.
// Transposed, where a row has more than 64 elements, it is `leading` bytes from 64 of them to the next 64, which lie in
// other patterns; else that is ignored. Not transposed, 16 steps of the depth further `start` is 32 bytes further.
FASTFORMER_DEVICE uint64_t matrix_descriptor(const void* start, int leading, int stride) {
  constexpr uint64_t kSwizzle128 = uint64_t{1} << 62;
  const auto field = [](uint32_t bytes) { return static_cast<uint64_t>((bytes & 0x3ffff) >> 4); };
  return field(ptx::shared_address(start)) | field(leading) << 16 | field(stride) << 32 | kSwizzle128;
}

}  // namespace fastformer::cuda
