// A loop over a row, register by register, whose body is written once for whole registers and for the last part; and
// the type that products of T come in.
#pragma once

#include "vec.h"

// A lambda called for whole registers and again for the rest is inlined in both places, with `n` constant in the first.
#define FASTFORMER_LAMBDA __attribute__((always_inline))

namespace fastformer::FASTFORMER_LEVEL {
namespace {

template <typename T>
FASTFORMER_INLINE Vec load_n(const T* p, int n) {
  return n == kLanes ? load(p) : load(p, n);
}
template <typename T>
FASTFORMER_INLINE void store_n(T* p, Vec v, int n) {
  if (n == kLanes) {
    store(p, v);
  } else {
    store(p, v, n);
  }
}

// f(i, n) for i = begin, begin + kLanes, ...: n lanes from i on.
template <typename F>
FASTFORMER_INLINE void for_lanes(int64_t begin, int64_t end, F f) {
  int64_t i = begin;
  for (; i + kLanes <= end; i += kLanes) f(i, kLanes);
  if (i < end) f(i, static_cast<int>(end - i));
}

// The sum of f(i, n) over all lanes, where f gives the register of columns from i on, 0 in lanes beyond n. Four chains
// overlap their additions; each block of them is added up before the next, so that long rows round no more than short.
template <typename F>
FASTFORMER_INLINE float sum_lanes(int64_t cols, F f) {
  constexpr int64_t kBlock = 128 * kLanes;
  Vec total = zero();
  for (int64_t begin = 0; begin < cols; begin += kBlock) {
    const int64_t end = begin + kBlock < cols ? begin + kBlock : cols;
    Vec chains[4] = {zero(), zero(), zero(), zero()};
    int64_t i = begin;
    for (; i + 4 * kLanes <= end; i += 4 * kLanes) {
#pragma GCC unroll 4
      for (int c = 0; c < 4; ++c) chains[c] = chains[c] + f(i + c * kLanes, kLanes);
    }
    for_lanes(i, end, [&](int64_t j, int n) FASTFORMER_LAMBDA { chains[0] = chains[0] + f(j, n); });
    total = total + ((chains[0] + chains[1]) + (chains[2] + chains[3]));
  }
  return reduce_add(total);
}

// The other side of products_in() in csrc/cpu/product.h.
template <typename T>
struct ProductOf {
  using type = float;
};
#if defined(__AVX512BF16__)
template <>
struct ProductOf<BFloat16> {
  using type = BFloat16;
};
#endif

}  // namespace
}  // namespace fastformer::FASTFORMER_LEVEL
