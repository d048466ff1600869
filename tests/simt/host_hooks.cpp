// What -fsanitize=thread makes of host code in the kernels' files, and of atomics in either: the plain operations.
#include <cstddef>
#include <cstdint>

#include "simt.h"

#define FASTFORMER_SIMT_ATOMICS(bits, type)                                                                       \
  type __tsan_atomic##bits##_load(const volatile type* at, int) { return __atomic_load_n(at, __ATOMIC_SEQ_CST); } \
  void __tsan_atomic##bits##_store(volatile type* at, type value, int) {                                          \
    __atomic_store_n(at, value, __ATOMIC_SEQ_CST);                                                                \
  }                                                                                                               \
  type __tsan_atomic##bits##_exchange(volatile type* at, type value, int) {                                       \
    return __atomic_exchange_n(at, value, __ATOMIC_SEQ_CST);                                                      \
  }                                                                                                               \
  type __tsan_atomic##bits##_fetch_add(volatile type* at, type value, int) {                                      \
    return __atomic_fetch_add(at, value, __ATOMIC_SEQ_CST);                                                       \
  }                                                                                                               \
  type __tsan_atomic##bits##_fetch_sub(volatile type* at, type value, int) {                                      \
    return __atomic_fetch_sub(at, value, __ATOMIC_SEQ_CST);                                                       \
  }                                                                                                               \
  type __tsan_atomic##bits##_fetch_and(volatile type* at, type value, int) {                                      \
    return __atomic_fetch_and(at, value, __ATOMIC_SEQ_CST);                                                       \
  }                                                                                                               \
  type __tsan_atomic##bits##_fetch_or(volatile type* at, type value, int) {                                       \
    return __atomic_fetch_or(at, value, __ATOMIC_SEQ_CST);                                                        \
  }                                                                                                               \
  type __tsan_atomic##bits##_fetch_xor(volatile type* at, type value, int) {                                      \
    return __atomic_fetch_xor(at, value, __ATOMIC_SEQ_CST);                                                       \
  }                                                                                                               \
  int __tsan_atomic##bits##_compare_exchange_strong(volatile type* at, type* expected, type value, int, int) {    \
    return __atomic_compare_exchange_n(at, expected, value, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST);           \
  }                                                                                                               \
  int __tsan_atomic##bits##_compare_exchange_weak(volatile type* at, type* expected, type value, int, int) {      \
    return __atomic_compare_exchange_n(at, expected, value, true, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST);            \
  }

extern "C" {
void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_vptr_update(void*, void*) {}
void __tsan_vptr_read(void*) {}
void __tsan_atomic_thread_fence(int) { __atomic_thread_fence(__ATOMIC_SEQ_CST); }
void __tsan_atomic_signal_fence(int) {}
FASTFORMER_SIMT_ATOMICS(8, uint8_t)
FASTFORMER_SIMT_ATOMICS(16, uint16_t)
FASTFORMER_SIMT_ATOMICS(32, uint32_t)
FASTFORMER_SIMT_ATOMICS(64, uint64_t)
}
