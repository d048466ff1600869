// Rows that go through several steps, such as a sum, the squares about its mean, and what becomes of them.
//
// A row's step waits for the last one's result, and while rows are in arithmetic, memory has nothing to do. So the
// steps of neighbouring rows are done in one loop: the last of row r with the one before of row r + 1, and so on. Layer
// norm of 4096 x 768 bfloat16 on a Zen 5 core took 106 ns a row step by step, and takes 55.
#pragma once

#include "pairs.h"

namespace fastformer::FASTFORMER_LEVEL {
namespace {

// Calls step.operator()<S>(row), where S has bit k set if step k is to be done, on row - k. All rows of [begin, end) go
// through all kSteps; one behind the other if `overlap`, else each row on its own. Where a call does several steps,
// each must take what the last one found of its row before that finds it of the next row.
template <int kSteps, typename F>
FASTFORMER_INLINE void pipeline_rows(int64_t begin, int64_t end, bool overlap, F step) {
  const auto alone = [&](int k, int64_t row) FASTFORMER_LAMBDA {
    if (k == 0) step.template operator()<1>(row);
    if (k == 1) step.template operator()<2>(row);
    if constexpr (kSteps > 2) {
      if (k == 2) step.template operator()<4>(row);
    }
  };
  constexpr int kLast = kSteps - 1;
  if (!overlap) {
    for (int64_t row = begin; row < end; ++row) {
      for (int k = 0; k < kSteps; ++k) alone(k, row + k);
    }
    return;
  }
  for (int64_t row = begin; row < end + kLast; ++row) {
    if (row - kLast >= begin && row < end) {
      step.template operator()<(1 << kSteps) - 1>(row);
    } else {
      for (int k = kLast; k >= 0; --k) {
        if (row - k >= begin && row - k < end) alone(k, row);
      }
    }
  }
}

// Rows of at most so many bytes overlap. Those of softmax, whose step 1 is long, until they no longer are in the second
// level of cache when the last step comes to them; those of norms, until they no longer are in the first.
constexpr int64_t kSoftmaxOverlap = 1 << 16, kNormOverlap = 1 << 13;

// Asks for what is some bytes ahead of p, to be read or written soon; `elements` from p on are worked on at a time.
template <int ahead, int elements = kPair, typename T>
FASTFORMER_INLINE void fetch(const T* p) {
  const char* const first = reinterpret_cast<const char*>(p) + ahead;
#pragma GCC unroll 4
  for (int line = 0; line < elements * static_cast<int>(sizeof(T)); line += 64) __builtin_prefetch(first + line);
}

// How far ahead: a read takes longer than a write, for which there are buffers. What was fetched must stay in the first
// level of cache until it is needed, so that more rows at a time leave less room for each. On a Zen 5 core layer norm
// of 4096 x 768 floats takes 126 ns a row without, 97 with half of these distances, 91 with them; with a residual 291
// without, 280 with them, 265 with half.
constexpr int kReadAhead = 8192, kWriteAhead = 4096;

// Stores that neither read a line into the cache first nor leave it there; see csrc/cpu/streaming.h. p is a multiple of
// a register. Other threads see them after end_of_stream().
FASTFORMER_INLINE void stream_register(float* p, Vec v) {
#if defined(__AVX512F__)
  _mm512_stream_ps(p, v);
#elif defined(__AVX2__)
  _mm256_stream_ps(p, v);
#else
  store(p, v);
#endif
}
FASTFORMER_INLINE void stream_pair(float* p, Pair v) {
  stream_register(p, v.first);
  stream_register(p + kLanes, v.second);
}
template <typename T>
FASTFORMER_INLINE void stream_pair(T* p, Pair v) {  // of 16 bits: one register
#if defined(__AVX2__)
  alignas(64) T pair[kPair];
  store_pair(pair, v);
  Vec bits;
  memcpy(&bits, pair, sizeof(bits));
  stream_register(reinterpret_cast<float*>(p), bits);
#else
  store_pair(p, v);
#endif
}
FASTFORMER_INLINE void end_of_stream() {
#if defined(__AVX2__)
  _mm_sfence();
#endif
}

// The first n elements; see store_pair.
template <typename T>
FASTFORMER_INLINE void put_pair(T* p, Pair v, int n, bool stream) {
  if (stream && n == kPair) {
    stream_pair(p, v);
  } else {
    store_pair(p, v, n);
  }
}

// A backward pass reads two rows for each that it writes. In float32 memory is then all that counts, and it is fastest
// where a row is first read and then written, with nothing in between and nothing fetched ahead: 143 ns a row of
// softmax with 768 floats, and 169 overlapped. In 16 bits it is the other way round: 58 and 51.
template <typename T>
constexpr bool kOverlapBackward = sizeof(T) == 2;

}  // namespace
}  // namespace fastformer::FASTFORMER_LEVEL
