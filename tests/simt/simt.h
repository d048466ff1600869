// CUDA's own words for a host compiler, and the door to the emulator that gives them their meaning (runtime.h says
// how).
#pragma once

#ifndef FASTFORMER_SIMT_RUNTIME
// The compiler makes calls of these, which have no hooks, of memcpy and of large copies: the emulator's are called.
extern "C" void* memcpy(void*, const void*, __SIZE_TYPE__) noexcept __asm__("fastformer_simt_memcpy");
extern "C" void* memmove(void*, const void*, __SIZE_TYPE__) noexcept __asm__("fastformer_simt_memmove");
extern "C" void* memset(void*, int, __SIZE_TYPE__) noexcept __asm__("fastformer_simt_memset");
#endif

#include <math.h>

#include <algorithm>
#include <bit>
#include <cstddef>
#include <cstdint>
#include <initializer_list>
#include <tuple>
#include <type_traits>

#include "../../csrc/dtypes.h"

#define __global__ __attribute__((patchable_function_entry(1, 0)))  // the compiler keeps a list of these functions
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __grid_constant__
#define __align__(n) alignas(n)

struct uint3 {
  unsigned x, y, z;
};
struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
using cudaStream_t = struct CUstream_st*;

// Constant for the kernel's code: the compiler leaves reads of constants uninstrumented. The runtime changes threadIdx
// at each switch of fibers, which a fiber can't see.
#ifdef FASTFORMER_SIMT_RUNTIME
#define FASTFORMER_SIMT_INDEX __attribute__((visibility("hidden"))) uint3
#else
#define FASTFORMER_SIMT_INDEX __attribute__((visibility("hidden"))) const uint3
#endif
extern FASTFORMER_SIMT_INDEX threadIdx, blockIdx, blockDim, gridDim;

namespace simt {

enum class Access { read, write };

// What the kernels are told of the device.
struct Device {
  size_t shared_bytes = 163 * 1024;  // that a block can have, as on sm_80
  int multiprocessors = 4;
  int compute_capability = 80;
  int64_t l2_bytes = 50 << 20;
};
extern __attribute__((visibility("hidden"))) Device device;

// Lives as long as an operator's call: what was allowed is forgotten at its begin and at its end. Calls of other
// threads wait.
class Call {
 public:
  Call();
  ~Call();
  Call(const Call&) = delete;
  Call& operator=(const Call&) = delete;
};

// Kernels may read `bytes` from `begin` on, and with Access::write write them too.
void allow(const void* begin, int64_t bytes, Access access);
// Nobody has written this memory yet: what kernels read there before they write it is reported. Filled with NaN.
void unwritten(void* begin, int64_t bytes);

// A tensor, and the boxes of it that TMA copies: see csrc/cuda/tensor_map.h. `strides` are bytes here.
struct alignas(64) TensorMap {
  const char* data;
  int64_t sizes[5], strides[5];
  int box[5];
  int element_bytes, rank;
  int swizzle;  // 0: none; n: of rows of 16 << n bytes
};
// Raises std::runtime_error with what cuTensorMapEncodeTiled would refuse.
TensorMap tensor_map(const void* data, int element_bytes, int rank, const int64_t* sizes, const int64_t* strides,
                     const int* box, int swizzle);

// The dynamic shared memory of the block that runs.
void* shared_memory();

struct Launch {
  const void* kernel;
  unsigned cluster;  // blocks
  dim3 grid, block;
  size_t shared_bytes;
  const void* const* pointers;  // the arguments in order, nullptr where the parameter is no pointer
  int num_arguments;
  const void* arguments;  // as the host has them: kernels may read these
  size_t arguments_bytes;
};
// Runs `body(context)` for every thread of the grid. Raises std::runtime_error with what was found wrong.
void launch(const Launch& launch, void (*body)(void*), void* context);

template <typename T>
const void* pointer_or_null(const T& value) {
  if constexpr (std::is_pointer_v<T>) {
    return value;
  } else {
    return nullptr;
  }
}

// `kernel(arguments...)` on a grid of blocks, of which `cluster` neighbours along x run at the same time.
template <typename... Parameters>
void launch(void (*kernel)(Parameters...), unsigned cluster, dim3 grid, dim3 block, size_t shared_bytes,
            std::type_identity_t<Parameters>... arguments) {
  static_assert((!std::is_reference_v<Parameters> && ...), "a kernel's parameter can't refer to the host's memory");
  const void* pointers[] = {nullptr, pointer_or_null(arguments)...};
  std::tuple<void (*)(Parameters...), Parameters...> call{kernel, arguments...};
  launch(
      {reinterpret_cast<const void*>(kernel), cluster, grid, block, shared_bytes, pointers + 1, sizeof...(Parameters),
       &call, sizeof(call)},
      [](void* context) {
        std::apply([](auto run, const Parameters&... values) { run(values...); },
                   *static_cast<decltype(call)*>(context));
      },
      &call);
}

// One access of `bytes` at an address that is a multiple of them. The value comes in registers: a local variable whose
// address is taken would be watched at each of its uses.
uint8_t load1(const void* from);
uint16_t load2(const void* from);
uint32_t load4(const void* from);
uint64_t load8(const void* from);
unsigned __int128 load16(const void* from);
void store1(void* to, uint8_t value);
void store2(void* to, uint16_t value);
void store4(void* to, uint32_t value);
void store8(void* to, uint64_t value);
void store16(void* to, unsigned __int128 value);

template <int kBytes>
using Bits = std::conditional_t<
    kBytes == 1, uint8_t,
    std::conditional_t<
        kBytes == 2, uint16_t,
        std::conditional_t<kBytes == 4, uint32_t, std::conditional_t<kBytes == 8, uint64_t, unsigned __int128>>>>;
// What is wider than 16 bytes takes several accesses.
template <typename T>
constexpr int kAccess = sizeof(T) < 16 ? sizeof(T) : 16;
template <typename T>
struct Accesses {
  static_assert(sizeof(T) % kAccess<T> == 0);
  Bits<kAccess<T>> values[sizeof(T) / kAccess<T>];
};

template <typename T>
__forceinline__ T load(const void* from) {
  Accesses<T> accesses;
#pragma GCC unroll 8
  for (auto& value : accesses.values) {
    if constexpr (sizeof(value) == 1) value = load1(from);
    if constexpr (sizeof(value) == 2) value = load2(from);
    if constexpr (sizeof(value) == 4) value = load4(from);
    if constexpr (sizeof(value) == 8) value = load8(from);
    if constexpr (sizeof(value) == 16) value = load16(from);
    from = static_cast<const char*>(from) + sizeof(value);
  }
  return std::bit_cast<T>(accesses);
}
template <typename T>
__forceinline__ void store(void* to, const T& pack) {
  const auto accesses = std::bit_cast<Accesses<T>>(pack);
#pragma GCC unroll 8
  for (auto value : accesses.values) {
    if constexpr (sizeof(value) == 1) store1(to, value);
    if constexpr (sizeof(value) == 2) store2(to, value);
    if constexpr (sizeof(value) == 4) store4(to, value);
    if constexpr (sizeof(value) == 8) store8(to, value);
    if constexpr (sizeof(value) == 16) store16(to, value);
    to = static_cast<char*>(to) + sizeof(value);
  }
}

// The lane whose value each lane gets, or that of the lane itself where there is none.
enum class Shuffle { index, up, down, xor_ };

void sync_threads();
void sync_warp(unsigned mask);
uint64_t shuffle(Shuffle kind, unsigned mask, uint64_t value, int lane, int width);
unsigned ballot(unsigned mask, bool vote);
unsigned active_mask();
// Called before an atomic read-modify-write, which is one since fibers switch nowhere else.
void atomic_access(const void* address, size_t bytes);
[[noreturn]] void trap();

template <typename T>
__forceinline__ T shuffle(Shuffle kind, unsigned mask, T value, int lane, int width) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8);
  using Value = Bits<sizeof(T)>;
  return std::bit_cast<T>(static_cast<Value>(shuffle(kind, mask, uint64_t{std::bit_cast<Value>(value)}, lane, width)));
}

template <typename T, typename Change>
__forceinline__ T atomic(T* address, Change change) {
  atomic_access(address, sizeof(T));
  T before, after;
  __atomic_load(address, &before, __ATOMIC_RELAXED);
  after = change(before);
  __atomic_store(address, &after, __ATOMIC_RELAXED);
  return before;
}

}  // namespace simt

// Synchronisation. Every call keeps its own return address: that is where the source line comes from.
__forceinline__ void __syncthreads() { simt::sync_threads(); }
__forceinline__ void __syncwarp(unsigned mask = 0xffffffffu) { simt::sync_warp(mask); }
__forceinline__ void __threadfence() {}
__forceinline__ void __threadfence_block() {}
__forceinline__ void __trap() { simt::trap(); }
__forceinline__ unsigned __activemask() { return simt::active_mask(); }

template <typename T>
__forceinline__ T __shfl_sync(unsigned mask, T value, int lane, int width = 32) {
  return simt::shuffle(simt::Shuffle::index, mask, value, lane, width);
}
template <typename T>
__forceinline__ T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32) {
  return simt::shuffle(simt::Shuffle::up, mask, value, static_cast<int>(delta), width);
}
template <typename T>
__forceinline__ T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32) {
  return simt::shuffle(simt::Shuffle::down, mask, value, static_cast<int>(delta), width);
}
template <typename T>
__forceinline__ T __shfl_xor_sync(unsigned mask, T value, int lane_mask, int width = 32) {
  return simt::shuffle(simt::Shuffle::xor_, mask, value, lane_mask, width);
}
__forceinline__ unsigned __ballot_sync(unsigned mask, int vote) { return simt::ballot(mask, vote != 0); }
__forceinline__ int __any_sync(unsigned mask, int vote) { return simt::ballot(mask, vote != 0) != 0; }
__forceinline__ int __all_sync(unsigned mask, int vote) { return simt::ballot(mask, vote == 0) == 0; }

template <typename T>
__forceinline__ T atomicAdd(T* address, std::type_identity_t<T> value) {
  return simt::atomic(address, [=](T before) { return static_cast<T>(before + value); });
}
template <typename T>
__forceinline__ T atomicMax(T* address, std::type_identity_t<T> value) {
  return simt::atomic(address, [=](T before) { return before < value ? value : before; });
}
template <typename T>
__forceinline__ T atomicMin(T* address, std::type_identity_t<T> value) {
  return simt::atomic(address, [=](T before) { return value < before ? value : before; });
}
template <typename T>
__forceinline__ T atomicExch(T* address, std::type_identity_t<T> value) {
  return simt::atomic(address, [=](T) { return value; });
}
template <typename T>
__forceinline__ T atomicCAS(T* address, std::type_identity_t<T> compare, std::type_identity_t<T> value) {
  return simt::atomic(address, [=](T before) { return before == compare ? value : before; });
}

// Arithmetic: CUDA's functions that <math.h> lacks.
using std::isfinite;
using std::isinf;
using std::isnan;
using std::max;
using std::min;
// Of floats they are fmaxf and fminf: NaN counts for nothing.
__forceinline__ float max(float a, float b) { return fmaxf(a, b); }
__forceinline__ float min(float a, float b) { return fminf(a, b); }

__forceinline__ float rsqrtf(float x) { return 1.0f / sqrtf(x); }
__forceinline__ float __expf(float x) { return expf(x); }
__forceinline__ float __logf(float x) { return logf(x); }
__forceinline__ float __log2f(float x) { return log2f(x); }
__forceinline__ float __fdividef(float x, float y) { return x / y; }
__forceinline__ float __fdiv_rn(float x, float y) { return x / y; }
__forceinline__ float __frcp_rn(float x) { return 1.0f / x; }
__forceinline__ float __fadd_rn(float x, float y) { return x + y; }
__forceinline__ float __fmul_rn(float x, float y) { return x * y; }
__forceinline__ float __fmaf_rn(float x, float y, float z) { return fmaf(x, y, z); }
__forceinline__ float __fsqrt_rn(float x) { return sqrtf(x); }
__forceinline__ float __saturatef(float x) { return x > 0.0f ? (x < 1.0f ? x : 1.0f) : 0.0f; }
__forceinline__ int __float_as_int(float x) { return std::bit_cast<int>(x); }
__forceinline__ unsigned __float_as_uint(float x) { return std::bit_cast<unsigned>(x); }
__forceinline__ float __int_as_float(int x) { return std::bit_cast<float>(x); }
__forceinline__ float __uint_as_float(unsigned x) { return std::bit_cast<float>(x); }
__forceinline__ int __popc(unsigned x) { return std::popcount(x); }
__forceinline__ int __clz(int x) { return std::countl_zero(static_cast<unsigned>(x)); }
__forceinline__ int __ffs(int x) { return __builtin_ffs(x); }

template <typename T>
__forceinline__ T __ldg(const T* from) {
  return *from;
}

namespace fastformer::cuda {

__forceinline__ float to_float(BFloat16 x) { return std::bit_cast<float>(static_cast<uint32_t>(x.bits) << 16); }
__forceinline__ float to_float(Half x) { return static_cast<float>(std::bit_cast<_Float16>(x.bits)); }
// To nearest even. The hardware has one NaN, 0x7fff.
__forceinline__ BFloat16 to_bfloat16(float x) {
  const uint32_t bits = std::bit_cast<uint32_t>(x);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return {0x7fff};
  return {static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1)) >> 16)};
}
__forceinline__ Half to_half(float x) {
  return {x != x ? uint16_t{0x7fff} : std::bit_cast<uint16_t>(static_cast<_Float16>(x))};
}

__forceinline__ uint32_t pack_bfloat16(float low, float high) {
  return to_bfloat16(low).bits | static_cast<uint32_t>(to_bfloat16(high).bits) << 16;
}
__forceinline__ uint32_t pack_half(float low, float high) {
  return to_half(low).bits | static_cast<uint32_t>(to_half(high).bits) << 16;
}

}  // namespace fastformer::cuda
