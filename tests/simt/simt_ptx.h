// The functions of csrc/cuda/ptx.cuh by what the PTX ISA says of each instruction.
#pragma once

#include "simt.h"

namespace simt {

// These are compiled once, in ptx.cpp.
void cp_async(void* shared, const void* global, int bytes, bool valid);
void cp_async_commit();
void cp_async_wait(int groups);
void ldmatrix_x4(uint32_t (&to)[4], const void* row, bool transposed);
void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], bool bfloat16);
void barrier_sync(int barrier, int threads);
void barrier_arrive(int barrier, int threads);
float ex2(float x);
float rcp(float x);
uint32_t shared_address(const void* pointer);

}  // namespace simt

namespace fastformer::cuda::ptx {

// Bytes from the beginning of the block's shared memory.
__forceinline__ uint32_t shared_address(const void* pointer) { return simt::shared_address(pointer); }

template <int kBytes>
__forceinline__ void cp_async(void* shared, const void* global, bool valid) {
  static_assert(kBytes == 4 || kBytes == 8 || kBytes == 16);
  simt::cp_async(shared, global, kBytes, valid);
}
__forceinline__ void cp_async_commit() { simt::cp_async_commit(); }
template <int kGroups>
__forceinline__ void cp_async_wait() {
  simt::cp_async_wait(kGroups);
}

template <bool kTransposed>
__forceinline__ void ldmatrix_x4(uint32_t (&to)[4], const void* row) {
  simt::ldmatrix_x4(to, row, kTransposed);
}

template <typename T>
__forceinline__ void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  simt::mma_m16n8k16(d, a, b, __is_same(T, BFloat16));
}

__forceinline__ void barrier_sync(int barrier, int threads) { simt::barrier_sync(barrier, threads); }
__forceinline__ void barrier_arrive(int barrier, int threads) { simt::barrier_arrive(barrier, threads); }

__forceinline__ float ex2(float x) { return simt::ex2(x); }
__forceinline__ float rcp(float x) { return simt::rcp(x); }

}  // namespace fastformer::cuda::ptx
