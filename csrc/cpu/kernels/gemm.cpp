#include "gemm.h"

#include "lanes.h"
#include "matmul_tile.h"

namespace fastformer::FASTFORMER_LEVEL {
namespace {

constexpr int64_t kPanelCols = kTileVecs * kLanes;
static_assert(kPanelCols * kGemmPanels <= kGemmCols && kGemmRows % kTileRows == 0);

// Units of a depth of K elements.
template <typename T>
constexpr int64_t units(int64_t K) {
  return (K + kUnitDepth<UnitOf<T>> - 1) / kUnitDepth<UnitOf<T>>;
}

// Both give panel[k][j] = unit k of B's column j of the panel, zeros beyond N and K.

// B is stored as its transpose [N, K]: squares of units are turned around in registers.
template <typename T>
void pack_transposed(const Gemm& g, int64_t begin, int64_t end) {
  using Unit = UnitOf<T>;
  constexpr int64_t kDepth = kUnitDepth<Unit>;
  const int64_t stride = g.b.col_stride, depth = units<T>(g.K), whole_depth = g.K / kDepth / kLanes * kLanes;
  for (int64_t panel = begin; panel < end; ++panel) {
    const int64_t first = panel * kPanelCols, width = smaller(kPanelCols, g.N - first);
    const T* from = static_cast<const T*>(g.b.data) + first * stride;
    Unit* to = static_cast<Unit*>(g.packed) + first * depth;
    const int64_t whole_cols = stride % kDepth == 0 ? width / kLanes * kLanes : 0;
    if (whole_cols > 0) {
      transpose(reinterpret_cast<const Unit*>(from), stride / kDepth, to, kPanelCols, whole_cols, whole_depth);
    }
    for (int64_t k = 0; k < depth; ++k) {
      for (int64_t j = k < whole_depth ? whole_cols : 0; j < kPanelCols; ++j) {
        T elements[kDepth] = {};
        for (int64_t d = 0; d < kDepth && j < width && k * kDepth + d < g.K; ++d) {
          elements[d] = from[j * stride + k * kDepth + d];
        }
        memcpy(to + k * kPanelCols + j, elements, sizeof(Unit));
      }
    }
  }
}

// B is stored as [K, N]. A few rows at a time are taken through all panels, to read long runs of memory.
template <typename T>
void pack_straight(const Gemm& g, int64_t begin, int64_t end) {
  constexpr int64_t kRows = 32, kDepth = kUnitDepth<UnitOf<T>>;
  for (int64_t k = 0; k < g.K; k += kRows) {
    const T* from = static_cast<const T*>(g.b.data) + k * g.b.row_stride;
    const int64_t rows = smaller(kRows, g.K - k);
    for (int64_t panel = begin; panel < end; ++panel) {
      const int64_t first = panel * kPanelCols;
      UnitOf<T>* to = static_cast<UnitOf<T>*>(g.packed) + first * units<T>(g.K) + k / kDepth * kPanelCols;
      pack_depth_rows(from + first, g.b.row_stride, rows, smaller(kPanelCols, g.N - first), to, units<T>(rows) * kDepth,
                      kPanelCols);
    }
  }
}

// A block of A as multiply_panel reads it, with its rows filled up to a multiple of kTileRows.
template <typename Unit>
struct BlockOfA {
  const Unit* data;
  int64_t stride;
  bool by_depth;  // [depth][rows]
};

// Rows [row, row + rows) and units [k, k + depth).
template <typename T>
BlockOfA<UnitOf<T>> block_of_a(const Gemm& g, int64_t row, int64_t rows, int64_t k, int64_t depth, UnitOf<T>* scratch) {
  using Unit = UnitOf<T>;
  constexpr int64_t kDepth = kUnitDepth<Unit>;
  const T* from = static_cast<const T*>(g.a.data) + row * g.a.row_stride + k * kDepth * g.a.col_stride;
  const int64_t padded = round_up(rows, kTileRows), elements = smaller(depth * kDepth, g.K - k * kDepth);
  if (g.a.col_stride == 1) {
    if (padded == rows && elements == depth * kDepth && g.a.row_stride % kDepth == 0) {
      return {reinterpret_cast<const Unit*>(from), g.a.row_stride / kDepth, false};
    }
    pack_rows(from, g.a.row_stride, rows, elements, scratch, padded, depth);
    return {scratch, depth, false};
  }
  // A is stored as its transpose [K, M]. Close together the rows of a block keep to few pages.
  pack_depth_rows(from, g.a.col_stride, elements, rows, scratch, depth * kDepth, padded);
  return {scratch, padded, true};
}

template <typename Unit, Store mode>
void multiply_block(const BlockOfA<Unit>& a, const Unit* b, float* c, int64_t rows, int vecs, int64_t depth) {
  if (a.by_depth) {
    multiply_panel<Unit, Layout::depth_by_rows, mode>(a.data, a.stride, b, kPanelCols, c, kGemmCols, rows, vecs, depth);
  } else {
    multiply_panel<Unit, Layout::rows_by_depth, mode>(a.data, a.stride, b, kPanelCols, c, kGemmCols, rows, vecs, depth);
  }
}

template <typename T>
void multiply_units(const Gemm& g, int64_t row_begin, int64_t row_end, int64_t panel_begin, int64_t panel_end,
                    void* scratch) {
  using Unit = UnitOf<T>;
  Unit* const a_scratch = static_cast<Unit*>(scratch);
  float* const sums = reinterpret_cast<float*>(a_scratch + kGemmRows * kGemmDepth);
  const Unit* const packed = static_cast<const Unit*>(g.packed);
  const int64_t rows = row_end - row_begin, padded = round_up(rows, kTileRows), K = units<T>(g.K);
  int64_t k = 0;
  do {  // at least once, which makes zeros of a depth of 0
    const int64_t depth = smaller(kGemmDepth, K - k);
    const BlockOfA<Unit> a = block_of_a<T>(g, row_begin, rows, k, depth, a_scratch);
    for (int64_t panel = panel_begin; panel < panel_end; ++panel) {
      const int64_t first = panel * kPanelCols, width = smaller(kPanelCols, g.N - first);
      const int vecs = static_cast<int>((width + kLanes - 1) / kLanes);
      const Unit* b = packed + first * K + k * kPanelCols;
      float* c = sums + (panel - panel_begin) * kPanelCols;
      if (k == 0) {
        multiply_block<Unit, Store::overwrite>(a, b, c, padded, vecs, depth);
      } else {
        multiply_block<Unit, Store::accumulate>(a, b, c, padded, vecs, depth);
      }
    }
    k += depth;
  } while (k < K);
  const int64_t col = g.first_col + panel_begin * kPanelCols;
  const int64_t end = g.first_col + smaller(panel_end * kPanelCols, g.N);
  g.finish(g.context, {sums, kGemmCols, row_begin, row_end, col, end});
}

// Calls f with the element type: bfloat16 where units are pairs of it, else float32.
template <typename F>
FASTFORMER_INLINE void visit_units(DType dtype, F f) {
#if defined(__AVX512BF16__)
  if (dtype == DType::bfloat16) return f.template operator()<BFloat16>();
#endif
  (void)dtype;
  f.template operator()<float>();
}

void pack(const Gemm& g, int64_t begin, int64_t end) {
  visit_units(g.dtype, [&]<typename T>() {
    if (g.b.col_stride == 1) {
      pack_straight<T>(g, begin, end);
    } else {
      pack_transposed<T>(g, begin, end);
    }
  });
}

void multiply(const Gemm& g, int64_t row_begin, int64_t row_end, int64_t panel_begin, int64_t panel_end,
              void* scratch) {
  visit_units(g.dtype,
              [&]<typename T>() { multiply_units<T>(g, row_begin, row_end, panel_begin, panel_end, scratch); });
}

template <typename T>
void store_block(const GemmOutput& out, const GemmBlock& block) {
  const T* bias = static_cast<const T*>(out.bias);
  for (int64_t row = block.row_begin; row < block.row_end; ++row) {
    const float* sums = block.sums + (row - block.row_begin) * block.stride - block.col_begin;
    T* c = static_cast<T*>(out.c) + row * out.stride;
    for_lanes(block.col_begin, block.col_end, [&](int64_t i, int n) FASTFORMER_LAMBDA {
      Vec v = load_n(sums + i, n);
      if (bias != nullptr) v = v + load_n(bias + i, n);
      if (out.accumulate) v = v + load_n(c + i, n);
      store_n(c + i, v, n);
    });
  }
}

void store(const void* output, const GemmBlock& block) {
  const GemmOutput& out = *static_cast<const GemmOutput*>(output);
  visit(out.dtype, [&]<typename T>() { store_block<T>(out, block); });
}

}  // namespace

const GemmKernels gemm{kPanelCols, pack, multiply, store};

}  // namespace fastformer::FASTFORMER_LEVEL
