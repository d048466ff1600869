// The language of the kernels, for nvcc and for the emulator in tests/simt, which runs the same sources on a CPU.
#pragma once

#ifdef FASTFORMER_SIMT
#include "simt.h"
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#endif

#include <cstdint>

#include "../dtypes.h"

#define FASTFORMER_DEVICE __device__ __forceinline__

namespace fastformer::cuda {

constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffffu;

#ifndef FASTFORMER_SIMT  // whose own are in simt.h
FASTFORMER_DEVICE float to_float(BFloat16 x) { return __bfloat162float(__ushort_as_bfloat16(x.bits)); }
FASTFORMER_DEVICE float to_float(Half x) { return __half2float(__ushort_as_half(x.bits)); }
FASTFORMER_DEVICE BFloat16 to_bfloat16(float x) { return {__bfloat16_as_ushort(__float2bfloat16_rn(x))}; }
FASTFORMER_DEVICE Half to_half(float x) { return {__half_as_ushort(__float2half_rn(x))}; }
FASTFORMER_DEVICE uint32_t pack_bfloat16(float low, float high) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
  return __bfloat16_as_ushort(pair.x) | static_cast<uint32_t>(__bfloat16_as_ushort(pair.y)) << 16;
}
FASTFORMER_DEVICE uint32_t pack_half(float low, float high) {
  const __half2 pair = __floats2half2_rn(low, high);
  return __half_as_ushort(pair.x) | static_cast<uint32_t>(__half_as_ushort(pair.y)) << 16;
}
#endif
FASTFORMER_DEVICE float to_float(float x) { return x; }

// Rounded to nearest even.
template <typename T>
FASTFORMER_DEVICE T from_float(float x) {
  if constexpr (__is_same(T, BFloat16)) {
    return to_bfloat16(x);
  } else if constexpr (__is_same(T, Half)) {
    return to_half(x);
  } else {
    return x;
  }
}

// Two neighbours in a register, as mma's operands have them, by one instruction.
template <typename T>
FASTFORMER_DEVICE uint32_t pack_pair(float low, float high) {
  if constexpr (__is_same(T, BFloat16)) {
    return pack_bfloat16(low, high);
  } else {
    return pack_half(low, high);
  }
}

// The block's dynamic shared memory, which `launch` was told the size of; aligned to 1024 bytes, as TMA's boxes
// want it.
template <typename T>
FASTFORMER_DEVICE T* shared_memory() {
#ifdef FASTFORMER_SIMT
  return static_cast<T*>(simt::shared_memory());
#else
  extern __shared__ __align__(1024) unsigned char fastformer_shared[];
  return reinterpret_cast<T*>(fastformer_shared);
#endif
}

// kCount neighbours that are loaded and stored together: 16 bytes are the widest access there is.
template <typename T, int kCount>
struct alignas(sizeof(T) * kCount) Pack {
  T values[kCount];
};

template <int kCount, typename T>
FASTFORMER_DEVICE Pack<T, kCount> load(const T* from) {
#ifdef FASTFORMER_SIMT  // checks that the pack lies at a multiple of its size
  return simt::load<Pack<T, kCount>>(from);
#else
  return *reinterpret_cast<const Pack<T, kCount>*>(from);
#endif
}
template <int kCount, typename T>
FASTFORMER_DEVICE void store(T* to, const Pack<T, kCount>& pack) {
#ifdef FASTFORMER_SIMT
  simt::store(to, pack);
#else
  *reinterpret_cast<Pack<T, kCount>*>(to) = pack;
#endif
}

// What a T holds as whole registers: the compiler takes one with elements of 16 bits apart to choose it, or to keep it
// for the next turn of a loop.
template <typename T>
struct Words {
  uint32_t values[sizeof(T) / 4];
};
template <typename T>
FASTFORMER_DEVICE Words<T> words_of(const T& value) {
  return __builtin_bit_cast(Words<T>, value);
}

// Floats rounded to a pack.
template <typename T, int kCount>
FASTFORMER_DEVICE Pack<T, kCount> round_to_pack(const float* values) {
  Pack<T, kCount> pack;
  if constexpr (sizeof(T) == 2 && kCount % 2 == 0) {  // by an instruction for two
#pragma unroll
    for (int i = 0; i < kCount; i += 2) {
      const auto two = __builtin_bit_cast(Pack<T, 2>, pack_pair<T>(values[i], values[i + 1]));
      pack.values[i] = two.values[0];
      pack.values[i + 1] = two.values[1];
    }
  } else {
#pragma unroll
    for (int i = 0; i < kCount; ++i) pack.values[i] = from_float<T>(values[i]);
  }
  return pack;
}

}  // namespace fastformer::cuda
