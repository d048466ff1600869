#include "product.h"

#include "lanes.h"

namespace fastformer::FASTFORMER_LEVEL {
namespace {

// Sums 32 rows at a time, and 32 of these sums, so that the error grows with rows / 1024 rather than with rows.
constexpr int64_t kRows = 32;
constexpr int64_t kBlock = kRows * kRows;
constexpr int64_t kStripe = 512;  // of columns, whose sums stay in the first-level cache

// sums[c] = the sum over rows [top, bottom), for columns [left, right).
template <typename T>
void sum_block(const T* values, int64_t cols, int64_t top, int64_t bottom, int64_t left, int64_t right, float* sums) {
  for (int64_t i = 0; i < right - left; ++i) sums[i] = 0.0f;
  for (; top < bottom; top += kRows) {
    const int64_t end = smaller(top + kRows, bottom);
    for_lanes(left, right, [&](int64_t i, int n) FASTFORMER_LAMBDA {
      Vec sum = zero();
      for (int64_t row = top; row < end; ++row) sum = sum + load_n(values + row * cols + i, n);
      store_n(sums + (i - left), load_n(sums + (i - left), n) + sum, n);
    });
  }
}

template <typename T>
void add_rows(const T* values, int64_t rows, int64_t cols, float* totals, int64_t begin, int64_t end) {
  float sums[kStripe];
  for (int64_t left = begin; left < end; left += kStripe) {
    const int64_t right = smaller(left + kStripe, end);
    for (int64_t top = 0; top < rows; top += kBlock) {
      sum_block(values, cols, top, smaller(top + kBlock, rows), left, right, sums);
      for (int64_t i = left; i < right; ++i) totals[i] += sums[i - left];
    }
  }
}

void add_rows(const void* values, DType dtype, int64_t rows, int64_t cols, float* totals, int64_t begin, int64_t end) {
  visit(dtype, [&]<typename T>() { add_rows(static_cast<const T*>(values), rows, cols, totals, begin, end); });
}

void accumulate(const void* values, DType dtype, float* totals, int64_t begin, int64_t end) {
  visit(dtype, [&]<typename T>() {
    const T* x = static_cast<const T*>(values);
    for_lanes(begin, end, [&](int64_t i, int n) FASTFORMER_LAMBDA {
      store_n(totals + i, load_n(totals + i, n) + load_n(x + i, n), n);
    });
  });
}

}  // namespace

const ProductKernels product{add_rows, accumulate};

}  // namespace fastformer::FASTFORMER_LEVEL
