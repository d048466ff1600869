// Every PTX instruction the kernels use, by its name in the PTX ISA (sm_80 and later). The emulator has its own meaning
// for each (tests/simt/simt_ptx.h).
#pragma once

#include "device.cuh"

#ifdef FASTFORMER_SIMT
#include "simt_ptx.h"
#else

namespace fastformer::cuda::ptx {

FASTFORMER_DEVICE uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// cp.async: kBytes (4, 8 or 16) from global to shared memory, or as many zeros where not `valid` (then nothing is
// read). Both addresses are multiples of kBytes.
template <int kBytes>
FASTFORMER_DEVICE void cp_async(void* shared, const void* global, bool valid) {
  static_assert(kBytes == 4 || kBytes == 8 || kBytes == 16);
  const uint32_t to = shared_address(shared);
  const int bytes = valid ? kBytes : 0;
  if constexpr (kBytes == 16) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(global), "r"(bytes) : "memory");
  } else {
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(to), "l"(global), "n"(kBytes), "r"(bytes)
                 : "memory");
  }
}
// cp.async.commit_group: this thread's copies since the last commit become its newest group.
FASTFORMER_DEVICE void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// cp.async.wait_group: until at most kGroups of this thread's newest groups are under way. Others see what was copied
// after a barrier only.
template <int kGroups>
FASTFORMER_DEVICE void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kGroups) : "memory");
}

// ldmatrix.x4: four 8 x 8 matrices of 16-bit elements; lane l gives the address of row l % 8 of matrix l / 8 (16 bytes,
// aligned), and gets of each matrix row l / 4, columns 2 (l % 4) and the next. `kTransposed`: of each one's transpose.
template <bool kTransposed>
FASTFORMER_DEVICE void ldmatrix_x4(uint32_t (&to)[4], const void* row) {
  const uint32_t from = shared_address(row);
  if constexpr (kTransposed) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "r"(from)
                 : "memory");
  } else {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "r"(from)
                 : "memory");
  }
}

// mma.sync.m16n8k16: d += a b over a warp; a is 16 x 16 by rows, b 16 x 8 by columns, both of T, d 16 x 8 of float.
// The fragments are those of the PTX ISA, "Matrix fragments for mma.m16n8k16 with floating point type".
template <typename T>
FASTFORMER_DEVICE void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  if constexpr (__is_same(T, BFloat16)) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  } else {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  }
}

// Named barriers, numbers 1 to 15 (0 is __syncthreads), for `threads` of the block, a multiple of 32: bar.sync waits
// until so many have come, those of bar.arrive included, which doesn't wait.
FASTFORMER_DEVICE void barrier_sync(int barrier, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}
FASTFORMER_DEVICE void barrier_arrive(int barrier, int threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}

// st.global.v4: 16 bytes to global memory.
FASTFORMER_DEVICE void store_global(void* to, const uint32_t (&words)[4]) {
  asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(__cvta_generic_to_global(to)), "r"(words[0]),
               "r"(words[1]), "r"(words[2]), "r"(words[3])
               : "memory");
}

// rcp.approx.ftz: 1 / x within 1 ulp; of infinity 0.
FASTFORMER_DEVICE float rcp(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// ex2.approx.ftz: 2^x within 2 ulp; -inf gives 0, NaN stays NaN.
FASTFORMER_DEVICE float ex2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

}  // namespace fastformer::cuda::ptx
#endif
