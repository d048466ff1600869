#include "level.h"

#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

namespace fastformer {
namespace {

constexpr const char* kNames[] = {"portable", "avx2", "avx512", "avx512_bf16"};

Level best_level() {
#if FASTFORMER_X86
  __builtin_cpu_init();
  // AMX is never asked for: gating AVX-512 paths on it keeps them from every AMD processor.
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  if (avx2 && avx512) return __builtin_cpu_supports("avx512bf16") ? Level::avx512_bf16 : Level::avx512;
  if (avx2) return Level::avx2;
#endif
  return Level::portable;
}

Level chosen_level() {
  const Level best = best_level();
  const char* request = std::getenv("FASTFORMER_CPU_ISA");
  if (request == nullptr || *request == '\0') return best;
  for (int i = 0; i < 4; ++i) {
    if (std::strcmp(request, kNames[i]) != 0) continue;
    if (i > static_cast<int>(best)) {
      throw std::runtime_error(std::string("FASTFORMER_CPU_ISA is ") + request + ", but this processor has only " +
                               level_name(best));
    }
    return static_cast<Level>(i);
  }
  throw std::runtime_error(std::string("FASTFORMER_CPU_ISA is '") + request +
                           "', must be one of portable, avx2, avx512, avx512_bf16");
}

}  // namespace

const char* level_name(Level level) { return kNames[static_cast<int>(level)]; }

Level cpu_level() {
  static const Level level = chosen_level();
  return level;
}

}  // namespace fastformer
