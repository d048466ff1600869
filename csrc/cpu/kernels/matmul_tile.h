// Matrix products of small blocks that lie in scratch memory: C[rows][columns] (+)= A[rows][depth] B[depth][columns].
//
// Blocks are made of units of four bytes: a float, or a pair of bfloat16 that are neighbours along the depth, which the
// AVX-512-BF16 instruction multiplies and adds at once. B and C hold their columns in the lanes of registers; an
// element of A is broadcast. Rows come in multiples of kTileRows and columns in multiples of kLanes: pack with zeros
// around.
#pragma once

#include "vec.h"

namespace fastformer::FASTFORMER_LEVEL {
namespace {

// A tile of C is held in kTileRows x kTileVecs registers, beside one row of B and one element of A.
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int kTileRows = 8, kTileVecs = 3;  // 32 registers
#elif defined(__AVX2__)
constexpr int kTileRows = 4, kTileVecs = 3;  // 16 registers
#else
constexpr int kTileRows = 4, kTileVecs = 2;  // 16 registers, one of them for products
#endif

FASTFORMER_INLINE int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

// Neighbours along the depth; the first in the low half.
struct Bf16Pair {
  BFloat16 first, second;
};

template <typename Unit>
constexpr int kUnitDepth = 1;
template <>
constexpr int kUnitDepth<Bf16Pair> = 2;

// The unit that elements of type T are packed into.
template <typename T>
struct UnitFor {
  using type = float;
};
#if defined(__AVX512BF16__)
template <>
struct UnitFor<BFloat16> {
  using type = Bf16Pair;
};
#endif
template <typename T>
using UnitOf = typename UnitFor<T>::type;

FASTFORMER_INLINE Vec load_units(const float* p) { return load(p); }
FASTFORMER_INLINE Vec broadcast_unit(const float* p) { return broadcast(*p); }
FASTFORMER_INLINE Vec multiply_add(Vec a, Vec b, Vec c) { return fma(a, b, c); }

#if defined(__AVX512BF16__)
FASTFORMER_INLINE __m512bh load_units(const Bf16Pair* p) { return (__m512bh)_mm512_loadu_si512(p); }
FASTFORMER_INLINE __m512bh broadcast_unit(const Bf16Pair* p) {
  int32_t bits;
  memcpy(&bits, p, 4);
  return (__m512bh)_mm512_set1_epi32(bits);
}
FASTFORMER_INLINE Vec multiply_add(__m512bh a, __m512bh b, Vec c) { return _mm512_dpbf16_ps(c, a, b); }
#endif

// Whether A lies in memory as [rows][depth] or as [depth][rows].
enum class Layout { rows_by_depth, depth_by_rows };
enum class Store { overwrite, accumulate };

template <typename Unit, Layout layout, Store mode, int kVecs>
FASTFORMER_INLINE void multiply_tile(const Unit* a, int64_t a_stride, const Unit* b, int64_t b_stride, float* c,
                                     int64_t c_stride, int64_t depth) {
  Vec sums[kTileRows][kVecs];
#pragma GCC unroll 8
  for (int r = 0; r < kTileRows; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < kVecs; ++v) sums[r][v] = zero();
  }
  for (int64_t k = 0; k < depth; ++k) {
    decltype(load_units(b)) row[kVecs];
#pragma GCC unroll 4
    for (int v = 0; v < kVecs; ++v) row[v] = load_units(b + k * b_stride + v * kLanes);
#pragma GCC unroll 8
    for (int r = 0; r < kTileRows; ++r) {
      const auto element =
          broadcast_unit(layout == Layout::rows_by_depth ? a + r * a_stride + k : a + k * a_stride + r);
#pragma GCC unroll 4
      for (int v = 0; v < kVecs; ++v) sums[r][v] = multiply_add(element, row[v], sums[r][v]);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < kTileRows; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < kVecs; ++v) {
      float* p = c + r * c_stride + v * kLanes;
      store(p, mode == Store::accumulate ? load(p) + sums[r][v] : sums[r][v]);  // last: sums round less from 0
    }
  }
}

// All row tiles of one panel of `vecs` registers' columns; the panel of B stays in the first-level cache meanwhile.
template <typename Unit, Layout layout, Store mode>
void multiply_panel(const Unit* a, int64_t a_stride, const Unit* b, int64_t b_stride, float* c, int64_t c_stride,
                    int64_t rows, int vecs, int64_t depth) {
  for (int64_t r = 0; r < rows; r += kTileRows) {
    const Unit* tile = a + (layout == Layout::rows_by_depth ? r * a_stride : r);
    float* out = c + r * c_stride;
    switch (vecs) {
      case 1:
        multiply_tile<Unit, layout, mode, 1>(tile, a_stride, b, b_stride, out, c_stride, depth);
        break;
      case 2:
        multiply_tile<Unit, layout, mode, 2>(tile, a_stride, b, b_stride, out, c_stride, depth);
        break;
      default:
        multiply_tile<Unit, layout, mode, kTileVecs>(tile, a_stride, b, b_stride, out, c_stride, depth);
    }
  }
}

// How many of `vecs` remaining registers' columns the next panel takes: as even as can be.
FASTFORMER_INLINE int panel_vecs(int64_t vecs) {
  return static_cast<int>(vecs <= kTileVecs ? vecs : vecs < 2 * kTileVecs ? (vecs + 1) / 2 : kTileVecs);
}

template <typename Unit, Layout layout, Store mode>
void multiply(const Unit* a, int64_t a_stride, const Unit* b, int64_t b_stride, float* c, int64_t c_stride,
              int64_t rows, int64_t columns, int64_t depth) {
  for (int64_t v = 0; v < columns / kLanes;) {
    const int vecs = panel_vecs(columns / kLanes - v);
    multiply_panel<Unit, layout, mode>(a, a_stride, b + v * kLanes, b_stride, c + v * kLanes, c_stride, rows, vecs,
                                       depth);
    v += vecs;
  }
}

// --- packing

// One row of `width` elements as floats, then zeros up to `padded`.
template <typename T>
FASTFORMER_INLINE void pack_row(const T* from, int64_t width, float* to, int64_t padded) {
  int64_t i = 0;
  for (; i + kLanes <= width; i += kLanes) store(to + i, load(from + i));
  for (; i < padded; i += kLanes) {
    const int n = static_cast<int>(smaller(kLanes, padded - i));
    store(to + i, i < width ? load(from + i, static_cast<int>(width - i)) : zero(), n);
  }
}

// The same as pairs along the row; `padded` counts pairs.
FASTFORMER_INLINE void pack_row(const BFloat16* from, int64_t width, Bf16Pair* to, int64_t padded) {
  int64_t i = 0;  // by whole registers: calls for a row of one head would take longer than its copy
  for (; 2 * (i + kLanes) <= width; i += kLanes) memcpy(to + i, from + 2 * i, kLanes * sizeof(Bf16Pair));
  if (i == padded) return;
  const int64_t rest = (width - 2 * i) * static_cast<int64_t>(sizeof(BFloat16));
  memcpy(to + i, from + 2 * i, rest);
  memset(reinterpret_cast<char*>(to + i) + rest, 0, (padded - i) * sizeof(Bf16Pair) - rest);
}

// [rows][width] with `stride` between rows into [padded_rows][padded] units, zeros around.
template <typename T, typename Unit>
void pack_rows(const T* from, int64_t stride, int64_t rows, int64_t width, Unit* to, int64_t padded_rows,
               int64_t padded) {
  for (int64_t r = 0; r < rows; ++r) pack_row(from + r * stride, width, to + r * padded, padded);
  memset(static_cast<void*>(to + rows * padded), 0, (padded_rows - rows) * padded * sizeof(Unit));
}

// The same where depth runs along the rows: floats as in pack_rows; of bfloat16, pairs of rows become one row of pairs.
template <typename T>
void pack_depth_rows(const T* from, int64_t stride, int64_t rows, int64_t width, float* to, int64_t padded_rows,
                     int64_t padded) {
  pack_rows(from, stride, rows, width, to, padded_rows, padded);
}

#if defined(__AVX512BF16__)
void pack_depth_rows(const BFloat16* from, int64_t stride, int64_t rows, int64_t width, Bf16Pair* to,
                     int64_t padded_rows, int64_t padded) {
  // Of the 64 elements of two registers, those of even rows are 0 to 31.
  alignas(64) uint16_t left[2 * kLanes], right[2 * kLanes];
  for (int i = 0; i < kLanes; ++i) {
    left[2 * i] = i, left[2 * i + 1] = 32 + i;
    right[2 * i] = kLanes + i, right[2 * i + 1] = 32 + kLanes + i;
  }
  const __m512i low = _mm512_load_si512(left), high = _mm512_load_si512(right);
  for (int64_t r = 0; r < padded_rows; r += 2) {
    int64_t i = 0;
    for (; r + 1 < rows && i + 2 * kLanes <= width; i += 2 * kLanes) {
      const __m512i even = _mm512_loadu_si512(from + r * stride + i),
                    odd = _mm512_loadu_si512(from + (r + 1) * stride + i);
      _mm512_storeu_si512(to + r / 2 * padded + i, _mm512_permutex2var_epi16(even, low, odd));
      _mm512_storeu_si512(to + r / 2 * padded + i + kLanes, _mm512_permutex2var_epi16(even, high, odd));
    }
    for (; i < padded; i += kLanes) {
      const __mmask16 in_row = first_n(static_cast<int>(smaller(kLanes, width - i)));
      const BFloat16* p = from + r * stride + i;
      const __m256i even = _mm256_maskz_loadu_epi16(r < rows ? in_row : 0, p);
      const __m256i odd = _mm256_maskz_loadu_epi16(r + 1 < rows ? in_row : 0, p + stride);
      const __m512i pairs =
          _mm512_or_si512(_mm512_cvtepu16_epi32(even), _mm512_slli_epi32(_mm512_cvtepu16_epi32(odd), 16));
      _mm512_mask_storeu_epi32(to + r / 2 * padded + i, first_n(static_cast<int>(smaller(kLanes, padded - i))), pairs);
    }
  }
}

// Two rows of floats as one row of pairs along the depth.
FASTFORMER_INLINE void store_pairs(Bf16Pair* p, Vec even, Vec odd) {
  alignas(64) static constexpr uint16_t kAlternate[32] = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                                          8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  const __m512i rows = (__m512i)_mm512_cvtne2ps_pbh(odd, even);  // even in the lower half
  _mm512_storeu_si512(p, _mm512_permutexvar_epi16(_mm512_load_si512(kAlternate), rows));
}
#endif

// --- transposition

#if defined(__AVX512F__)
FASTFORMER_INLINE Vec unpack_low(Vec a, Vec b) { return _mm512_unpacklo_ps(a, b); }
FASTFORMER_INLINE Vec unpack_high(Vec a, Vec b) { return _mm512_unpackhi_ps(a, b); }
FASTFORMER_INLINE Vec unpack_low_two(Vec a, Vec b) { return (Vec)_mm512_unpacklo_pd((__m512d)a, (__m512d)b); }
FASTFORMER_INLINE Vec unpack_high_two(Vec a, Vec b) { return (Vec)_mm512_unpackhi_pd((__m512d)a, (__m512d)b); }
// fours[4g + j] holds, in its quarter q, column 4q + j of rows 4g .. 4g + 3.
FASTFORMER_INLINE void store_columns(const Vec* fours, float* to, int64_t stride) {
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) {
    const Vec even01 = _mm512_shuffle_f32x4(fours[j], fours[4 + j], 0x88);
    const Vec even23 = _mm512_shuffle_f32x4(fours[8 + j], fours[12 + j], 0x88);
    const Vec odd01 = _mm512_shuffle_f32x4(fours[j], fours[4 + j], 0xdd);
    const Vec odd23 = _mm512_shuffle_f32x4(fours[8 + j], fours[12 + j], 0xdd);
    store(to + j * stride, _mm512_shuffle_f32x4(even01, even23, 0x88));
    store(to + (4 + j) * stride, _mm512_shuffle_f32x4(odd01, odd23, 0x88));
    store(to + (8 + j) * stride, _mm512_shuffle_f32x4(even01, even23, 0xdd));
    store(to + (12 + j) * stride, _mm512_shuffle_f32x4(odd01, odd23, 0xdd));
  }
}
#elif defined(__AVX2__)
FASTFORMER_INLINE Vec unpack_low(Vec a, Vec b) { return _mm256_unpacklo_ps(a, b); }
FASTFORMER_INLINE Vec unpack_high(Vec a, Vec b) { return _mm256_unpackhi_ps(a, b); }
FASTFORMER_INLINE Vec unpack_low_two(Vec a, Vec b) { return (Vec)_mm256_unpacklo_pd((__m256d)a, (__m256d)b); }
FASTFORMER_INLINE Vec unpack_high_two(Vec a, Vec b) { return (Vec)_mm256_unpackhi_pd((__m256d)a, (__m256d)b); }
FASTFORMER_INLINE void store_columns(const Vec* fours, float* to, int64_t stride) {
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) {
    store(to + j * stride, _mm256_permute2f128_ps(fours[j], fours[4 + j], 0x20));
    store(to + (4 + j) * stride, _mm256_permute2f128_ps(fours[j], fours[4 + j], 0x31));
  }
}
#else
FASTFORMER_INLINE Vec unpack_low(Vec a, Vec b) { return Vec{a[0], b[0], a[1], b[1]}; }
FASTFORMER_INLINE Vec unpack_high(Vec a, Vec b) { return Vec{a[2], b[2], a[3], b[3]}; }
FASTFORMER_INLINE Vec unpack_low_two(Vec a, Vec b) { return Vec{a[0], a[1], b[0], b[1]}; }
FASTFORMER_INLINE Vec unpack_high_two(Vec a, Vec b) { return Vec{a[2], a[3], b[2], b[3]}; }
FASTFORMER_INLINE void store_columns(const Vec* fours, float* to, int64_t stride) {
  for (int j = 0; j < 4; ++j) store(to + j * stride, fours[j]);
}
#endif

// to[column][row] = from[row][column] for kLanes x kLanes units.
FASTFORMER_INLINE void transpose_square(const float* from, int64_t from_stride, float* to, int64_t to_stride) {
  Vec twos[kLanes], fours[kLanes];
#pragma GCC unroll 8
  for (int i = 0; i < kLanes; i += 2) {
    const Vec a = load(from + i * from_stride), b = load(from + (i + 1) * from_stride);
    twos[i] = unpack_low(a, b);
    twos[i + 1] = unpack_high(a, b);
  }
#pragma GCC unroll 4
  for (int i = 0; i < kLanes; i += 4) {
    fours[i] = unpack_low_two(twos[i], twos[i + 2]);
    fours[i + 1] = unpack_high_two(twos[i], twos[i + 2]);
    fours[i + 2] = unpack_low_two(twos[i + 1], twos[i + 3]);
    fours[i + 3] = unpack_high_two(twos[i + 1], twos[i + 3]);
  }
  store_columns(fours, to, to_stride);
}

// to[column][row] = from[row][column]; rows and columns are multiples of kLanes.
template <typename Unit>
void transpose(const Unit* from, int64_t from_stride, Unit* to, int64_t to_stride, int64_t rows, int64_t columns) {
  for (int64_t r = 0; r < rows; r += kLanes) {
    for (int64_t c = 0; c < columns; c += kLanes) {
      transpose_square(reinterpret_cast<const float*>(from + r * from_stride + c), from_stride,
                       reinterpret_cast<float*>(to + c * to_stride + r), to_stride);
    }
  }
}

}  // namespace
}  // namespace fastformer::FASTFORMER_LEVEL
