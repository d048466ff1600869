#include "product.h"

#include "lanes.h"

namespace fastformer::FASTFORMER_LEVEL {
namespace {

// Sums 32 rows at a time, so that the error grows with rows / 32 rather than with rows.
constexpr int64_t kRows = 32;

template <typename T>
void add_rows(const T* values, int64_t rows, int64_t cols, float* totals, int64_t begin, int64_t end) {
  for (int64_t top = 0; top < rows; top += kRows) {
    const int64_t bottom = top + kRows < rows ? top + kRows : rows;
    for_lanes(begin, end, [&](int64_t i, int n) FASTFORMER_LAMBDA {
      Vec sum = zero();
      for (int64_t row = top; row < bottom; ++row) sum = sum + load_n(values + row * cols + i, n);
      store_n(totals + i, load_n(totals + i, n) + sum, n);
    });
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
