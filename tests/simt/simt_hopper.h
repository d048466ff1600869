// The functions of csrc/cuda/ptx_hopper.cuh by what the PTX ISA says of each instruction.
#pragma once

#include "simt_ptx.h"

namespace simt {

struct Registers {
  const void* begin;
  size_t bytes;
};
// A product as a lane asks for it: a lies in shared memory, or `registers` of it are given.
struct Wgmma {
  float* d;
  const uint32_t* registers;
  uint64_t a, b;
  int tiles;
  bool add, transposed_a, transposed_b, bfloat16;
};

// These are compiled once, in asynchronous.cpp, mbarrier.cpp, tma.cpp, counter.cpp, cluster.cpp, setmaxnreg.cpp and
// wgmma.cpp.
void mbarrier_init(void* barrier, int arrivals);
void fence_mbarrier_init();
void mbarrier_arrive(void* barrier);
void mbarrier_arrive_expect(void* barrier, int bytes);
void mbarrier_wait(void* barrier, int parity);
void mbarrier_arrive_at(void* barrier, int rank);
void fence_proxy_async();
void tma_load(void* shared, const TensorMap& map, void* barrier, const int* at, int rank);
void tma_load_to(void* shared, const TensorMap& map, void* barrier, const int* at, int rank, int blocks);
void tma_store(const TensorMap& map, const void* shared, const int* at, int rank);
void tma_store_commit();
void tma_store_wait(int groups);
void bulk_add(float* to, const float* shared, int bytes);
void bulk_wait_all();
void count_up(int* counter);
void wait_for_count(const int* counter, int count);
int cluster_rank();
void* of_block(void* shared, int rank);
void cluster_sync();
void set_registers(int registers, bool more);
void wgmma_fence(const Registers* registers, int count);
void wgmma(const Wgmma& product);
void wgmma_commit();
void wgmma_wait(int groups, const Registers* registers, int count);

}  // namespace simt

#ifndef FASTFORMER_SIMT_RUNTIME
namespace fastformer::cuda::ptx {

__forceinline__ void mbarrier_init(Mbarrier* barrier, int arrivals) { simt::mbarrier_init(barrier, arrivals); }
__forceinline__ void fence_mbarrier_init() { simt::fence_mbarrier_init(); }
__forceinline__ void mbarrier_arrive(Mbarrier* barrier) { simt::mbarrier_arrive(barrier); }
__forceinline__ void mbarrier_arrive_expect(Mbarrier* barrier, int bytes) {
  simt::mbarrier_arrive_expect(barrier, bytes);
}
__forceinline__ void mbarrier_wait(Mbarrier* barrier, int parity) { simt::mbarrier_wait(barrier, parity); }
__forceinline__ void mbarrier_arrive_at(Mbarrier* barrier, int rank) { simt::mbarrier_arrive_at(barrier, rank); }

__forceinline__ void fence_proxy_async() { simt::fence_proxy_async(); }

template <int kRank>
__forceinline__ void tma_load(void* shared, const TensorMap& map, Mbarrier* barrier, const int (&at)[kRank]) {
  static_assert(2 <= kRank && kRank <= 5);
  simt::tma_load(shared, map, barrier, at, kRank);
}
template <int kRank>
__forceinline__ void tma_load_to(void* shared, const TensorMap& map, Mbarrier* barrier, const int (&at)[kRank],
                                 int blocks) {
  static_assert(kRank == 2);
  simt::tma_load_to(shared, map, barrier, at, kRank, blocks);
}
template <int kRank>
__forceinline__ void tma_store(const TensorMap& map, const void* shared, const int (&at)[kRank]) {
  static_assert(2 <= kRank && kRank <= 5);
  simt::tma_store(map, shared, at, kRank);
}
__forceinline__ void tma_store_commit() { simt::tma_store_commit(); }
template <int kGroups>
__forceinline__ void tma_store_wait() {
  simt::tma_store_wait(kGroups);
}

__forceinline__ void bulk_add(float* to, const float* shared, int bytes) { simt::bulk_add(to, shared, bytes); }
__forceinline__ void bulk_wait_all() { simt::bulk_wait_all(); }
__forceinline__ void count_up(int* counter) { simt::count_up(counter); }
__forceinline__ void wait_for_count(const int* counter, int count) { simt::wait_for_count(counter, count); }

__forceinline__ int cluster_rank() { return simt::cluster_rank(); }
template <typename T>
__forceinline__ T* of_block(T* shared, int rank) {
  return static_cast<T*>(simt::of_block(const_cast<std::remove_const_t<T>*>(shared), rank));
}
__forceinline__ void cluster_sync() { simt::cluster_sync(); }

template <int kRegisters>
__forceinline__ void fewer_registers() {
  static_assert(kRegisters % 8 == 0 && 24 <= kRegisters && kRegisters <= 256);
  simt::set_registers(kRegisters, false);
}
template <int kRegisters>
__forceinline__ void more_registers() {
  static_assert(kRegisters % 8 == 0 && 24 <= kRegisters && kRegisters <= 256);
  simt::set_registers(kRegisters, true);
}

template <typename... R>
__forceinline__ void wgmma_fence(R&... registers) {
  const simt::Registers all[] = {{&registers, sizeof(registers)}..., {nullptr, 0}};
  simt::wgmma_fence(all, sizeof...(R));
}
__forceinline__ void stay_behind(float) {}
__forceinline__ void wgmma_commit() { simt::wgmma_commit(); }
template <int kGroups, typename... R>
__forceinline__ void wgmma_wait(R&... registers) {
  const simt::Registers all[] = {{&registers, sizeof(registers)}..., {nullptr, 0}};
  simt::wgmma_wait(kGroups, all, sizeof...(R));
}

template <typename T, bool kTransposedA, bool kTransposedB, int kTiles>
__forceinline__ void wgmma(float (&d)[kTiles][4], uint64_t of_a, uint64_t of_b, bool add) {
  static_assert(kTiles <= 32);
  simt::wgmma({d[0], nullptr, of_a, of_b, kTiles, add, kTransposedA, kTransposedB, __is_same(T, BFloat16)});
}
template <typename T, bool kTransposedB, int kTiles>
__forceinline__ void wgmma(float (&d)[kTiles][4], const uint32_t (&of_a)[4], uint64_t of_b, bool add) {
  static_assert(kTiles <= 32);
  simt::wgmma({d[0], of_a, 0, of_b, kTiles, add, false, kTransposedB, __is_same(T, BFloat16)});
}

}  // namespace fastformer::cuda::ptx
#endif
