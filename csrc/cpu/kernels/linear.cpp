#include "linear.h"

#include "lanes.h"
#include "matmul_tile.h"

namespace fastformer::FASTFORMER_LEVEL {
namespace {

// Input and weight both have their depth adjacent, so a register holds neighbours along it, and each sum is spread over
// the lanes of one register until the end. kRows x kCols sums are held in registers beside those of a row and a column.
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int kMostRows = 8, kMostSums = 24;  // 32 registers
#else
constexpr int kMostRows = 4, kMostSums = 8;  // 16 registers
#endif
template <int kRows>
constexpr int kCols = kRows == 1              ? 8
                      : kMostSums / kRows < 4 ? kMostSums / kRows
                                              : 4;
// How many columns ahead to ask for. One row of input leaves the processor time to look ahead by itself: 8 columns read
// as fast as nothing but reading (Zen 5, 240 MB), 4 at 85% of that, and both less with this. More rows don't: 8 go from
// 37% to 85%.
template <int kRows>
constexpr int kAhead = kRows == 1         ? 0
                       : kCols<kRows> < 4 ? 6
                                          : 4;

// A register of elements of type T along the depth: floats, or at level avx512_bf16 pairs of bfloat16.
template <typename T>
struct Depth {
  static constexpr int64_t kStep = kLanes;
  FASTFORMER_INLINE Vec load_all(const T* p) { return load(p); }
  FASTFORMER_INLINE Vec load_first(const T* p, int n) { return load(p, n); }
  FASTFORMER_INLINE Vec multiply_add(Vec a, Vec b, Vec sum) { return fma(a, b, sum); }
};
#if defined(__AVX512BF16__)
template <>
struct Depth<BFloat16> {
  static constexpr int64_t kStep = 2 * kLanes;
  FASTFORMER_INLINE __m512bh load_all(const BFloat16* p) { return (__m512bh)_mm512_loadu_si512(p); }
  FASTFORMER_INLINE __m512bh load_first(const BFloat16* p, int n) {
    return (__m512bh)_mm512_maskz_loadu_epi16((1u << n) - 1, p);
  }
  FASTFORMER_INLINE Vec multiply_add(__m512bh a, __m512bh b, Vec sum) { return _mm512_dpbf16_ps(sum, a, b); }
};
#endif

// Depth that is summed up in one go: the rows' part of it stays in the first-level cache while a group of columns
// passes, and longer sums come from partial ones (see kGemmDepth in gemm.h).
template <typename T>
constexpr int64_t kChain = 128 * Depth<T>::kStep;
template <typename T, int kRows>
constexpr int64_t kInCache = 32768 / (kRows * static_cast<int64_t>(sizeof(T)));
template <typename T, int kRows>
constexpr int64_t kDepth = kChain<T> < kInCache<T, kRows> ? kChain<T> : kInCache<T, kRows>;

// to[0 .. 3] += the sums over the lanes of four registers, together: one by one takes two and a half times as long, a
// quarter of the time of 8 rows over a depth of 768.
FASTFORMER_INLINE void add_lanes(Vec a, Vec b, Vec c, Vec d, float* to) {
  const Vec ab = unpack_low(a, b) + unpack_high(a, b), cd = unpack_low(c, d) + unpack_high(c, d);
  const Vec fours = unpack_low_two(ab, cd) + unpack_high_two(ab, cd);  // in each quarter a part of all four
#if defined(__AVX512F__)
  const __m256 half = _mm512_castps512_ps256(fours) + _mm512_extractf32x8_ps(fours, 1);
#elif defined(__AVX2__)
  const __m256 half = fours;
#endif
#if defined(__AVX2__)
  _mm_storeu_ps(to, _mm_loadu_ps(to) + (_mm256_castps256_ps128(half) + _mm256_extractf128_ps(half, 1)));
#else
  store(to, load(to) + fours);
#endif
}

// sums[c * kRows + r] += the product over `depth` of kRows rows and kColumns columns.
template <typename T, int kRows, int kColumns>
FASTFORMER_INLINE void multiply_tile(const T* input, int64_t input_stride, const T* weight, int64_t weight_stride,
                                     int64_t depth, float* sums) {
  using D = Depth<T>;
  Vec tile[kRows][kColumns];
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
    for (int c = 0; c < kColumns; ++c) tile[r][c] = zero();
  }
  const auto step = [&](auto read, int64_t k) FASTFORMER_LAMBDA {
    decltype(read(weight)) columns[kColumns];
#pragma GCC unroll 8
    for (int c = 0; c < kColumns; ++c) columns[c] = read(weight + c * weight_stride + k);
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      auto row = read(input + r * input_stride + k);
#if defined(__AVX512F__)
      asm("" : "+v"(row));  // loaded once: GCC would read it from memory for each column, which binds 8 rows
#endif
#pragma GCC unroll 8
      for (int c = 0; c < kColumns; ++c) tile[r][c] = D::multiply_add(row, columns[c], tile[r][c]);
    }
  };
  int64_t k = 0;
  for (; k + D::kStep <= depth; k += D::kStep) {
    if constexpr (kAhead<kRows> > 0) {
#pragma GCC unroll 4
      for (int c = 0; c < kColumns; ++c) __builtin_prefetch(weight + (c + kAhead<kRows>)*weight_stride + k);
    }
    step([](const T* p) FASTFORMER_LAMBDA { return D::load_all(p); }, k);
  }
  if (const int rest = static_cast<int>(depth - k)) {
    step([rest](const T* p) FASTFORMER_LAMBDA { return D::load_first(p, rest); }, k);
  }
  constexpr int kSums = kRows * kColumns;
  const auto sum = [&](int i) FASTFORMER_LAMBDA { return i < kSums ? tile[i % kRows][i / kRows] : zero(); };
#pragma GCC unroll 8
  for (int i = 0; i < kSums; i += 4) add_lanes(sum(i), sum(i + 1), sum(i + 2), sum(i + 3), sums + i);
}

// kRows rows in columns [begin, end), a group at most.
template <typename T, int kRows>
void multiply_group(const LinearArgs& a, int64_t row, int64_t begin, int64_t end) {
  float sums[kRows * kLinearGroup + 3] = {};  // [column][row]; the last four sums may be fewer
  for (int64_t k = 0; k < a.depth; k += kDepth<T, kRows>) {
    const int64_t depth = smaller(kDepth<T, kRows>, a.depth - k);
    const T* input = static_cast<const T*>(a.input) + row * a.depth + k;
    const T* weight = static_cast<const T*>(a.weight) + begin * a.weight_stride + k;
    int64_t c = 0;
    for (; c + kCols<kRows> <= end - begin; c += kCols<kRows>) {
      multiply_tile<T, kRows, kCols<kRows>>(input, a.depth, weight + c * a.weight_stride, a.weight_stride, depth,
                                            sums + c * kRows);
    }
    for (; c < end - begin; ++c) {
      multiply_tile<T, kRows, 1>(input, a.depth, weight + c * a.weight_stride, a.weight_stride, depth,
                                 sums + c * kRows);
    }
  }
  for (int r = 0; r < kRows; ++r) {
    T* output = static_cast<T*>(a.output) + (row + r) * a.cols;
    float of_row[kLinearGroup];
    for (int64_t c = 0; c < end - begin; ++c) of_row[c] = sums[c * kRows + r];
    for_lanes(begin, end, [&](int64_t i, int n) FASTFORMER_LAMBDA {
      Vec sum = load_n(of_row + (i - begin), n);
      if (a.bias != nullptr) sum = sum + load_n(static_cast<const T*>(a.bias) + i, n);
      store_n(output + i, sum, n);
    });
  }
}

// The same for a number of rows that is known now, kRows at most.
template <typename T, int kRows>
void multiply_rows(const LinearArgs& a, int64_t row, int64_t rows, int64_t begin, int64_t end) {
  if constexpr (kRows > 1) {
    if (rows < kRows) return multiply_rows<T, kRows - 1>(a, row, rows, begin, end);
  }
  multiply_group<T, kRows>(a, row, begin, end);
}

void multiply(const LinearArgs& a, int64_t begin, int64_t end) {
  visit(a.dtype, [&]<typename T>() {
    for (int64_t first = begin; first < end; first += kLinearGroup) {
      const int64_t last = smaller(first + kLinearGroup, end);
      for (int64_t row = 0; row < a.rows; row += kMostRows) {
        multiply_rows<T, kMostRows>(a, row, smaller(kMostRows, a.rows - row), first, last);
      }
    }
  });
}

}  // namespace

const LinearKernels linear{multiply};

}  // namespace fastformer::FASTFORMER_LEVEL
