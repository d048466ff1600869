// The instruction-set levels the CPU kernels are compiled for, and the one this process uses.
#pragma once

#if defined(__x86_64__)
#define FASTFORMER_X86 1
#else
#define FASTFORMER_X86 0
#endif

namespace fastformer {

enum class Level { portable, avx2, avx512, avx512_bf16 };

const char* level_name(Level level);

// The best level the processor has, or the lower one that FASTFORMER_CPU_ISA names. Read once; throws on a name that
// doesn't exist or a level the processor lacks.
Level cpu_level();

}  // namespace fastformer

// kernels/X.h ends with FASTFORMER_KERNEL_TABLE(XKernels, x): a table of functions, compiled once per level from
// kernels/X.cpp, and `x_kernels()`, the table of this process's level.
#if FASTFORMER_X86
#define FASTFORMER_KERNEL_TABLE(Table, name)    \
  namespace portable {                          \
  extern const Table name;                      \
  }                                             \
  namespace avx2 {                              \
  extern const Table name;                      \
  }                                             \
  namespace avx512 {                            \
  extern const Table name;                      \
  }                                             \
  namespace avx512_bf16 {                       \
  extern const Table name;                      \
  }                                             \
  static inline const Table& name##_kernels() { \
    switch (cpu_level()) {                      \
      case Level::avx512_bf16:                  \
        return avx512_bf16::name;               \
      case Level::avx512:                       \
        return avx512::name;                    \
      case Level::avx2:                         \
        return avx2::name;                      \
      default:                                  \
        return portable::name;                  \
    }                                           \
  }
#else
#define FASTFORMER_KERNEL_TABLE(Table, name) \
  namespace portable {                       \
  extern const Table name;                   \
  }                                          \
  static inline const Table& name##_kernels() { return portable::name; }
#endif
