#include "gemm.h"

#include "matmul_tile.h"

namespace fastformer::FASTFORMER_LEVEL {
namespace {

constexpr int64_t kPanelCols = kTileVecs * kLanes;
static_assert(kPanelCols <= 64 && kGemmRows % kTileRows == 0);

// to[k][j] = B[k][first + j], zeros from `width` to the panel's end.
void pack_panel(const FloatMatrix& b, int64_t K, int64_t first, int64_t width, float* to) {
  if (b.col_stride == 1) {
    pack_rows(b.data + first, b.row_stride, K, width, to, K, kPanelCols);
    return;
  }
  // B is stored as its transpose [N, K]: squares are turned around in registers.
  const float* from = b.data + first * b.col_stride;
  const int64_t whole_cols = width / kLanes * kLanes, whole_depth = K / kLanes * kLanes;
  if (whole_cols > 0) transpose(from, b.col_stride, to, kPanelCols, whole_cols, whole_depth);
  for (int64_t k = 0; k < K; ++k) {
    for (int64_t j = k < whole_depth ? whole_cols : 0; j < kPanelCols; ++j) {
      to[k * kPanelCols + j] = j < width ? from[j * b.col_stride + k] : 0.0f;
    }
  }
}

void pack(const Gemm& g, int64_t begin, int64_t end) {
  for (int64_t panel = begin; panel < end; ++panel) {
    const int64_t first = panel * kPanelCols;
    pack_panel(g.b, g.K, first, smaller(kPanelCols, g.N - first), g.packed + first * g.K);
  }
}

// A block of A as multiply_panel reads it, with its rows filled up to a multiple of kTileRows.
struct BlockOfA {
  const float* data;
  int64_t stride;
  bool by_depth;  // [depth][rows]
};

BlockOfA block_of_a(const Gemm& g, int64_t row, int64_t rows, int64_t k, int64_t depth, float* scratch) {
  const float* from = g.a.data + row * g.a.row_stride + k * g.a.col_stride;
  const int64_t padded = round_up(rows, kTileRows);
  if (g.a.col_stride == 1) {
    if (padded == rows) return {from, g.a.row_stride, false};
    pack_rows(from, g.a.row_stride, rows, depth, scratch, padded, depth);
    return {scratch, depth, false};
  }
  // A is stored as its transpose [K, M]. Close together the rows of a block keep to few pages.
  for (int64_t i = 0; i < depth; ++i) {
    memcpy(scratch + i * padded, from + i * g.a.col_stride, rows * sizeof(float));
    for (int64_t r = rows; r < padded; ++r) scratch[i * padded + r] = 0.0f;
  }
  return {scratch, padded, true};
}

template <Store mode>
void multiply_block(const BlockOfA& a, const float* b, float* c, int64_t c_stride, int64_t rows, int vecs,
                    int64_t depth) {
  if (a.by_depth) {
    multiply_panel<float, Layout::depth_by_rows, mode>(a.data, a.stride, b, kPanelCols, c, c_stride, rows, vecs, depth);
  } else {
    multiply_panel<float, Layout::rows_by_depth, mode>(a.data, a.stride, b, kPanelCols, c, c_stride, rows, vecs, depth);
  }
}

// The bias in every row of a block of C, to which the product is then added.
void spread_bias(const Gemm& g, int64_t row_begin, int64_t row_end, int64_t first, int64_t last) {
  for (int64_t r = row_begin; r < row_end; ++r) {
    memcpy(g.c + r * g.c_stride + first, g.bias + first, (last - first) * sizeof(float));
  }
}

void multiply(const Gemm& g, int64_t row_begin, int64_t row_end, int64_t panel_begin, int64_t panel_end,
              float* scratch) {
  const int64_t rows = row_end - row_begin, padded_rows = round_up(rows, kTileRows);
  float* const edge = scratch + kGemmRows * kGemmDepth;  // a panel of C where C itself has no room for whole tiles
  if (g.bias != nullptr) {
    spread_bias(g, row_begin, row_end, panel_begin * kPanelCols, smaller(panel_end * kPanelCols, g.N));
  }
  for (int64_t k = 0; k < g.K; k += kGemmDepth) {
    const int64_t depth = smaller(kGemmDepth, g.K - k);
    const BlockOfA a = block_of_a(g, row_begin, rows, k, depth, scratch);
    const bool add = k > 0 || g.accumulate || g.bias != nullptr;
    for (int64_t panel = panel_begin; panel < panel_end; ++panel) {
      const int64_t first = panel * kPanelCols, width = smaller(kPanelCols, g.N - first);
      const int vecs = static_cast<int>((width + kLanes - 1) / kLanes);
      const float* b = g.packed + first * g.K + k * kPanelCols;
      float* c = g.c + row_begin * g.c_stride + first;
      if (padded_rows == rows && width % kLanes == 0) {
        if (add) {
          multiply_block<Store::accumulate>(a, b, c, g.c_stride, rows, vecs, depth);
        } else {
          multiply_block<Store::overwrite>(a, b, c, g.c_stride, rows, vecs, depth);
        }
        continue;
      }
      multiply_block<Store::overwrite>(a, b, edge, kPanelCols, padded_rows, vecs, depth);
      for (int64_t r = 0; r < rows; ++r) {
        for (int64_t j = 0; j < width; ++j) {
          float* to = c + r * g.c_stride + j;
          *to = edge[r * kPanelCols + j] + (add ? *to : 0.0f);
        }
      }
    }
  }
}

}  // namespace

const GemmKernels gemm{kPanelCols, pack, multiply};

}  // namespace fastformer::FASTFORMER_LEVEL
