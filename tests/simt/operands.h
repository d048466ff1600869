// How the operands of a wgmma lie in shared memory and in registers.
#pragma once

#include <bit>
#include <cstring>

#include "runtime.h"

namespace simt {

constexpr int kDepth = 16;         // of one wgmma
constexpr int kMostColumns = 256;  // of its b

// The fields of a matrix descriptor, in bytes.
struct Descriptor {
  explicit Descriptor(uint64_t bits)
      : start(static_cast<int>(bits & 0x3fff) << 4),
        leading(static_cast<int>(bits >> 16 & 0x3fff) << 4),
        stride(static_cast<int>(bits >> 32 & 0x3fff) << 4),
        base(static_cast<int>(bits >> 49 & 7)),
        swizzle(static_cast<int>(bits >> 62)) {}
  int start, leading, stride, base, swizzle;

  // What the emulator does not know, or would be misread; nullptr if all is well.
  const char* mistake(bool transposed, int outers) const {
    constexpr int kPattern = 1024;
    if (swizzle != 1) return "the emulator knows the swizzle of 128 bytes only";
    if (base != 0) return "the emulator knows patterns at multiples of 1024 bytes only";
    if (start % kPattern >= (transposed ? 16 : 128) || (!transposed && start % 32 != 0)) {
      return "the matrix begins within a pattern of 1024 bytes";
    }
    if (stride % kPattern != 0 || (transposed && outers > 64 && leading % kPattern != 0)) {
      return "patterns must begin at multiples of 1024 bytes";
    }
    return nullptr;
  }
};

// Calls each(address, outer, depth) for the chunks of 16 bytes that hold outers `first` to `first + outers`, rows of a
// or columns of b, at all 16 steps of the depth: eight steps of one outer or, transposed, eight outers at one step.
template <typename Each>
void for_chunks(const Descriptor& matrix, bool transposed, int first, int outers, Each each) {
  const auto swizzled = [](int address) { return address ^ ((address >> 7 & 7) << 4); };
  if (transposed) {
    for (int depth = 0; depth < kDepth; ++depth) {
      const int row = matrix.start + depth / 8 * matrix.stride + depth % 8 * 128;
      for (int outer = first; outer < first + outers; outer += 8) {
        each(swizzled(row + outer / 64 * matrix.leading + outer % 64 * 2), outer, depth);
      }
    }
  } else {
    for (int outer = first; outer < first + outers; ++outer) {
      const int row = matrix.start + outer / 8 * matrix.stride + outer % 8 * 128;
      each(swizzled(row), outer, 0);
      each(swizzled(row + 16), outer, 8);
    }
  }
}

inline float element_of(uint16_t bits, bool bfloat16) {
  if (bfloat16) return std::bit_cast<float>(static_cast<uint32_t>(bits) << 16);
  const uint32_t sign = (bits & 0x8000u) << 16, rest = (bits & 0x7fffu) << 13;
  if (rest >= 0x7c00u << 13) return std::bit_cast<float>(sign | 0x7f800000u | rest);
  return std::bit_cast<float>(sign | std::bit_cast<uint32_t>(std::bit_cast<float>(rest) * 0x1p112f));
}

// Eight elements at an address.
inline void load_chunk(float (&to)[8], uintptr_t from, bool bfloat16) {
  uint16_t bits[8];
  std::memcpy(bits, reinterpret_cast<const void*>(from), sizeof(bits));
  for (int i = 0; i < 8; ++i) to[i] = element_of(bits[i], bfloat16);
}

// Where a lane's values lie in its warp's 16 rows: e of its 4 of a tile of the accumulator, and of its 4 registers of
// a.
inline int row_of_value(int lane, int e) { return lane / 4 + e / 2 * 8; }
inline int column_of_value(int lane, int e) { return lane % 4 * 2 + e % 2; }
inline int row_of_register(int lane, int e) { return lane / 4 + e % 2 * 8; }
inline int depth_of_register(int lane, int e) { return lane % 4 * 2 + e / 2 * 8; }  // and the next

}  // namespace simt
