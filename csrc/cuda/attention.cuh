// Attention's arguments as its kernels take them: sequences, where their rows are, and which keys a query sees. The
// meaning of each is that of the operators in csrc/ops.cpp. Its scores: attention_scores.cuh.
//
// Shapes: B batch, H heads, G key and value heads, Sq and Sk rows, D the width of queries and keys, Dv of values; both
// widths are multiples of 8, and rows begin at multiples of 16 bytes. Packed: B is 1, and Sq and Sk are those of all
// sequences together. Paged: [pages, G, page size, D].
#pragma once

#include "../attention.h"
#include "tile.cuh"

namespace fastformer::cuda {

// A side of the window without a bound. Sums of it with positions below 2^30 fit in 32 bits.
constexpr int kUnbounded = 1 << 30;

struct Attention {
  const void* query;                                           // [B, H, Sq, D]
  const void* key;                                             // [B, G, Sk, D]
  const void* value;                                           // [B, G, Sk, Dv]
  int64_t query_strides[3], key_strides[3], value_strides[3];  // batch or page, head, row; in elements
  int heads, kv_heads, head_dim, value_dim;
  int seqlen_q, seqlen_k;  // of the longest sequence
  int query_rows;          // Sq, the rows of a head in lse
  const void* mask;        // of [B, H, Sq, Sk] by its strides, or null
  MaskKind mask_kind;
  DType mask_dtype;  // of an additive one
  int64_t mask_strides[4];
  float scale;          // positive
  float softcap;        // positive; 0: none
  int left, right;      // of the window; kUnbounded: no bound
  bool bottom_right;    // how the window, and a query's distance from a key, is aligned
  const float* slopes;  // ALiBi's [B, H] by its stride, or null
  int64_t slopes_stride;
  const float* sinks;            // [H], or null
  const int64_t* dropout_state;  // [2]: seed and offset; null: no dropout
  uint32_t dropout_threshold;
  float kept_scale;             // 1 / (1 - p); 1 without dropout
  const int32_t* cu_seqlens_q;  // [sequences + 1], or null
  const int32_t* cu_seqlens_k;
  const int32_t* seqused_k;    // [sequences], or null
  const int32_t* block_table;  // [sequences, table_stride], or null
  int64_t table_stride;
  int page_bits;  // a page has 2^page_bits rows
};

// One of the sequences of a call. Its queries are rows first_query .. first_query + queries of entry query_entry of the
// query tensor, and likewise its keys, unless they are paged.
struct Sequence {
  int index;
  int query_entry, first_query, queries;
  int key_entry, first_key, keys;
  int offset;  // query i is at position i + offset among the keys
};

FASTFORMER_DEVICE Sequence sequence_at(const Attention& a, int index) {
  Sequence s{index, index, 0, a.seqlen_q, index, 0, a.seqlen_k, 0};
  if (a.cu_seqlens_q != nullptr) {
    s.query_entry = 0;
    s.first_query = a.cu_seqlens_q[index];
    s.queries = a.cu_seqlens_q[index + 1] - s.first_query;
  }
  if (a.cu_seqlens_k != nullptr) {
    s.key_entry = 0;
    s.first_key = a.cu_seqlens_k[index];
    s.keys = a.cu_seqlens_k[index + 1] - s.first_key;
  }
  if (a.seqused_k != nullptr) s.keys = min(s.keys, a.seqused_k[index]);
  if (a.bottom_right) s.offset = s.keys - s.queries;
  return s;
}

// --- rows

// Where the rows of a head of a sequence begin: call it with a row's number from the sequence's first on. Null from
// `count` on.
template <typename T>
struct HeadRows {
  T* first;
  int64_t stride;
  int count;

  FASTFORMER_DEVICE T* operator()(int row) const { return row < count ? first + row * stride : nullptr; }
};

template <typename T>
FASTFORMER_DEVICE HeadRows<T> head_rows(T* tensor, const int64_t (&strides)[3], int entry, int head, int first,
                                        int count) {
  return {tensor + entry * strides[0] + head * strides[1] + first * strides[2], strides[2], count};
}

template <typename T>
FASTFORMER_DEVICE HeadRows<const T> query_rows(const Attention& a, const Sequence& s, int head) {
  return head_rows(static_cast<const T*>(a.query), a.query_strides, s.query_entry, head, s.first_query, s.queries);
}

// The same of keys or values, which may be paged.
template <typename T>
struct KeyRows {
  HeadRows<const T> rows;
  const int32_t* pages;  // the sequence's, or null
  int64_t page_stride;
  int page_bits;

  FASTFORMER_DEVICE const T* operator()(int row) const {
    if (pages == nullptr || row >= rows.count) return rows(row);
    const int in_page = row & ((1 << page_bits) - 1);
    return rows.first + pages[row >> page_bits] * page_stride + in_page * rows.stride;
  }
};

template <typename T>
FASTFORMER_DEVICE KeyRows<T> key_rows(const Attention& a, const Sequence& s, int kv_head, const void* tensor,
                                      const int64_t (&strides)[3]) {
  const bool paged = a.block_table != nullptr;
  const int32_t* pages = paged ? a.block_table + s.index * a.table_stride : nullptr;
  return {head_rows(static_cast<const T*>(tensor), strides, paged ? 0 : s.key_entry, kv_head, s.first_key, s.keys),
          pages, strides[0], a.page_bits};
}

// Begins to copy rows from `from` on to a tile, as copy_async does, with few registers for addresses: those of rows
// that don't exist are computed too, but not read, and a loop unrolled as a whole would keep them all from tile to
// tile.
template <int kThreads, typename Tile, typename T>
FASTFORMER_DEVICE void copy_rows_async(const Tile& tile, int columns, const HeadRows<const T>& rows, int from) {
  constexpr unsigned kCount = Tile::kRows * Tile::kChunks;
  const T* first = rows.first + from * rows.stride;
  const int count = rows.count - from;
#pragma unroll 4
  for (unsigned start = 0; start < kCount; start += kThreads) {
    const unsigned index = start + threadIdx.x;
    if (kCount % kThreads != 0 && index >= kCount) break;
    const int row = index / Tile::kChunks, column = index % Tile::kChunks * kChunk;
    ptx::cp_async<16>(tile.at(row, column), first + row * rows.stride + column, row < count && column < columns);
  }
}
template <int kThreads, typename Tile, typename T>
FASTFORMER_DEVICE void copy_rows_async(const Tile& tile, int columns, const KeyRows<T>& rows, int from) {
  if (rows.pages == nullptr) {
    copy_rows_async<kThreads>(tile, columns, rows.rows, from);
    return;
  }
#pragma unroll 1
  for (unsigned index = threadIdx.x; index < Tile::kRows * Tile::kChunks; index += kThreads) {
    const int row = index / Tile::kChunks, column = index % Tile::kChunks * kChunk;
    const T* first = rows(from + row);
    const bool valid = first != nullptr && column < columns;
    ptx::cp_async<16>(tile.at(row, column), valid ? first + column : first, valid);
  }
}

// Of a head's rows in lse and what else is [B, H, Sq] float32.
FASTFORMER_DEVICE int64_t first_statistic(const Attention& a, const Sequence& s, int head) {
  return (static_cast<int64_t>(s.query_entry) * a.heads + head) * a.query_rows + s.first_query;
}

// --- what is seen

// Tiles of keys: [begin, end) are those that some of the queries see, [full, full_end), which lies within, those that
// all of them see.
struct TileRange {
  int begin, full, full_end, end;
};

FASTFORMER_DEVICE int tiles_up_to(int count, int tile) { return count <= 0 ? 0 : (count - 1) / tile + 1; }

// For the rows first .. last (inclusive) of one side, of which row i is at position i + offset on the other side, that
// see its `others` rows from `before` before their position to `after` after it. Queries see (left, right) and, the
// other way round, keys are seen by queries (right, left) and -offset.
template <int kTile>
FASTFORMER_DEVICE TileRange tiles_seen(int first, int last, int others, int offset, int before, int after) {
  TileRange range{0, 0, others / kTile, tiles_up_to(others, kTile)};
  if (after < kUnbounded) {
    range.full_end = min(range.full_end, max(first + offset + after + 1, 0) / kTile);
    range.end = min(range.end, tiles_up_to(last + offset + after + 1, kTile));
  }
  if (before < kUnbounded) {
    range.begin = max(first + offset - before, 0) / kTile;
    range.full = min(tiles_up_to(last + offset - before, kTile), range.end);
  }
  range.begin = min(range.begin, range.end);
  range.full = max(range.full, range.begin);
  range.full_end = min(max(range.full_end, range.full), range.end);
  return range;
}

template <int kTile>
FASTFORMER_DEVICE TileRange key_tiles(const Attention& a, const Sequence& s, int first_query, int queries) {
  const int last = min(first_query + queries, s.queries) - 1;
  return tiles_seen<kTile>(first_query, last, s.keys, s.offset, a.left, a.right);
}

// The tiles of queries that see some of the keys. Rows beyond the last query count as seeing them: what they would add
// is 0 (see lse_to_subtract).
template <int kTile>
FASTFORMER_DEVICE TileRange query_tiles(const Attention& a, const Sequence& s, int first_key, int keys) {
  const int last = min(first_key + keys, s.keys) - 1;
  return tiles_seen<kTile>(first_key, last, tiles_up_to(s.queries, kTile) * kTile, -s.offset, a.right, a.left);
}

FASTFORMER_DEVICE bool sees(const Attention& a, const Sequence& s, int query, int key) {
  const int position = query + s.offset;
  return key < s.keys && key <= position + a.right && key >= position - a.left;
}

}  // namespace fastformer::cuda
