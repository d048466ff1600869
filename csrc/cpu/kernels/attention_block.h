// What attention's forward and backward share: which keys a block of queries sees, where rows lie, and products.
//
// Scores are held transposed, [keys][queries], so that a query is a lane: its maximum and sum need no work across
// lanes, and keys and values are broadcast as they lie in memory. Logarithms and scores are to the base 2.
#pragma once

#include <float.h>

#include "attention.h"
#include "lanes.h"
#include "matmul_tile.h"

namespace fastformer::FASTFORMER_LEVEL {
namespace {

constexpr float kLog2e = 1.44269504f;
constexpr int64_t kQueryVecs = kQueryBlock / kLanes;
static_assert(kQueryVecs % kTileVecs == 0);

// Products longer than this are summed in parts, which rounds less.
constexpr int64_t kSumDepth = 128;

// No block of keys is longer.
constexpr int64_t kMostKeys = 128;

// Hands out parts of one piece of scratch memory, on cache lines. With a null base it only counts the bytes.
struct Carver {
  char* base;
  int64_t used = 0;

  template <typename T>
  T* take(int64_t count) {
    T* part = reinterpret_cast<T*>(base + used);
    used += round_up(count * static_cast<int64_t>(sizeof(T)), 64);
    return part;
  }
};

// Widths in scratch: whole registers and whole tiles.
FASTFORMER_INLINE int64_t padded(int64_t n) { return round_up(n, kLanes > kTileRows ? kLanes : kTileRows); }
template <typename Unit>
FASTFORMER_INLINE int64_t depth_units(int64_t n) {
  return (n + kUnitDepth<Unit> - 1) / kUnitDepth<Unit>;
}

// A block of queries against a block of keys: lane i, of the whole query block, sees keys j with
// max(0, i + low) <= j < min(keys, i + diagonal).
struct Band {
  int64_t keys, low, diagonal;

  int64_t seen_from(int64_t lane) const { return larger(0, smaller(keys, lane + low)); }
  int64_t seen_to(int64_t lane) const { return larger(0, smaller(keys, lane + diagonal)); }
  // Keys [all_from, all_to) are seen by every lane of register v, those outside [from, to), whole tiles, by none.
  int64_t all_from(int64_t v) const { return seen_from(v * kLanes + kLanes - 1); }
  int64_t all_to(int64_t v) const { return seen_to(v * kLanes); }
  int64_t from(int64_t v) const { return seen_from(v * kLanes) / kTileRows * kTileRows; }
  int64_t to(int64_t v) const { return round_up(seen_to(v * kLanes + kLanes - 1), kTileRows); }
  // Of register v, lanes [first, last) see key j, where it is not one of those that all see.
  int first(int64_t v, int64_t j) const {
    return static_cast<int>(j >= keys ? kLanes : larger(0, smaller(kLanes, j + 1 - diagonal - v * kLanes)));
  }
  int last(int64_t v, int64_t j) const {
    return static_cast<int>(larger(0, smaller(kLanes, j + 1 - low - v * kLanes)));
  }
};

// `x` where lanes of register v see key j, else `hidden`.
FASTFORMER_INLINE Vec where_seen(const Band& band, int64_t v, int64_t j, Vec x, Vec hidden) {
  return select(first_n(band.first(v, j)), hidden, select(first_n(band.last(v, j)), x, hidden));
}

// One block of queries: where it begins in its sequence, and how many there are.
struct QueryBlock {
  int64_t head, first, count;

  int64_t vecs() const { return (count + kLanes - 1) / kLanes; }
};

FASTFORMER_INLINE QueryBlock query_block(const Attention& a, const Sequence& s, int64_t kv_head, int64_t block) {
  const int64_t group = a.heads / a.kv_heads, first = block_begin(a, block), head = kv_head * group + block % group;
  return {head, first, smaller(kQueryBlock, s.queries - first)};
}

FASTFORMER_INLINE KeyRange keys_seen(const Attention& a, const Sequence& s, const QueryBlock& q) {
  return keys_seen(a, s, q.first, q.count);
}

// The block against `keys` keys from first_key on.
FASTFORMER_INLINE Band band_at(const Attention& a, const Sequence& s, const QueryBlock& q, int64_t first_key,
                               int64_t keys) {
  const int64_t position = q.first + s.offset - first_key;
  return {keys, position - a.left, position + a.right + 1};
}

// --- where rows lie

// Of a sequence's query, or what has its shape, by strides of batch, head and row.
FASTFORMER_INLINE int64_t query_offset(const int64_t (&strides)[3], const Sequence& s, int64_t head, int64_t row) {
  return s.query_batch * strides[0] + head * strides[1] + (s.query_begin + row) * strides[2];
}

// Of a sequence's key, or value.
FASTFORMER_INLINE int64_t key_offset(const Attention& a, const int64_t (&strides)[3], const Sequence& s, int64_t head,
                                     int64_t row) {
  if (a.block_table == nullptr) return s.key_batch * strides[0] + head * strides[1] + (s.key_begin + row) * strides[2];
  const int64_t page = a.block_table[s.index * a.table_stride + row / a.page_size];
  return page * strides[0] + head * strides[1] + row % a.page_size * strides[2];
}

// Calls f(row, rows) for the parts of the sequence's keys [first, first + count) whose rows are strides[2] apart.
template <typename F>
FASTFORMER_INLINE void for_key_runs(const Attention& a, int64_t first, int64_t count, F f) {
  const int64_t end = first + count;
  for (int64_t row = first; row < end;) {
    const int64_t rows = a.block_table == nullptr ? end - row : smaller(end - row, a.page_size - row % a.page_size);
    f(row, rows);
    row += rows;
  }
}

// Where a query's row lies in [batch, seqlen_q, heads, ...], and in [batch, heads, seqlen_q].
FASTFORMER_INLINE int64_t output_row(const Attention& a, const Sequence& s, int64_t head, int64_t row) {
  return (s.query_batch * a.seqlen_q + s.query_begin + row) * a.heads + head;
}
FASTFORMER_INLINE int64_t lse_at(const Attention& a, const Sequence& s, int64_t head, int64_t row) {
  return (s.query_batch * a.heads + head) * a.seqlen_q + s.query_begin + row;
}

// --- products

// Calls f(v, vecs, from, to): registers [v, v + vecs), all of them among [begin, end), against the keys [from, to) that
// they see, following the steps of the band on both sides.
template <typename F>
FASTFORMER_INLINE void walk_registers(const Band& band, int64_t begin, int64_t end, F f) {
  int64_t key = 0;
  for (int64_t v = begin; v < end;) {
    key = larger(key, band.from(v));
    if (band.to(v) <= key) {
      ++v;
      continue;
    }
    int64_t last = v + 1, to = band.to(v);
    while (last < end && band.from(last) <= key) ++last;
    if (last < end) to = smaller(to, band.from(last));
    f(v, static_cast<int>(last - v), key, to);
    key = to;
  }
}

// The same, by panels of registers.
template <typename F>
FASTFORMER_INLINE void walk_band(const Band& band, int64_t all_vecs, F f) {
  for (int64_t v = 0; v < all_vecs;) {
    const int64_t vecs = panel_vecs(all_vecs - v);
    walk_registers(band, v, v + vecs, f);
    v += vecs;
  }
}

// scores[key][query] = keys queries^T as far as the band reaches; queries_t is [depth][kQueryBlock].
template <typename Unit>
void multiply_keys(const Unit* keys, int64_t stride, const Unit* queries_t, float* scores, int64_t depth,
                   const Band& band, int64_t all_vecs) {
  walk_band(band, all_vecs, [&](int64_t v, int vecs, int64_t from, int64_t to) FASTFORMER_LAMBDA {
    const Unit *a = keys + from * stride, *b = queries_t + v * kLanes;
    float* c = scores + from * kQueryBlock + v * kLanes;
    const int64_t head = smaller(depth, kSumDepth);
    multiply_panel<Unit, Layout::rows_by_depth, Store::overwrite>(a, stride, b, kQueryBlock, c, kQueryBlock, to - from,
                                                                  vecs, head);
    for (int64_t k = head; k < depth; k += kSumDepth) {
      multiply_panel<Unit, Layout::rows_by_depth, Store::accumulate>(a + k, stride, b + k * kQueryBlock, kQueryBlock, c,
                                                                     kQueryBlock, to - from, vecs,
                                                                     smaller(kSumDepth, depth - k));
    }
  });
}

// sums[column][query] += values^T weights as far as the band reaches; values is [keys][columns], weights are
// [keys][kQueryBlock], both in units along the keys.
template <typename Unit>
void multiply_values(const Unit* values, int64_t stride, const Unit* weights, float* sums, int64_t columns,
                     const Band& band, int64_t all_vecs) {
  walk_band(band, all_vecs, [&](int64_t v, int vecs, int64_t from, int64_t to) FASTFORMER_LAMBDA {
    const int64_t begin = from / kUnitDepth<Unit>, depth = (to - from) / kUnitDepth<Unit>;
    multiply_panel<Unit, Layout::depth_by_rows, Store::accumulate>(
        values + begin * stride, stride, weights + begin * kQueryBlock + v * kLanes, kQueryBlock, sums + v * kLanes,
        kQueryBlock, round_up(columns, kTileRows), vecs, depth);
  });
}

// Queries, or gradients, of one block as [depth][kQueryBlock] units; lanes beyond the last query are 0.
template <typename T, typename Unit>
void pack_transposed(const T* from, int64_t stride, int64_t rows, int64_t width, Unit* rows_scratch, Unit* to) {
  const int64_t units = padded(depth_units<Unit>(width));
  pack_rows(from, stride, rows, width, rows_scratch, round_up(rows, kLanes), units);
  transpose(rows_scratch, units, to, kQueryBlock, round_up(rows, kLanes), units);
}

template <typename T>
void store_scaled(const float* from, T* to, int64_t width, float factor) {
  for_lanes(0, width,
            [&](int64_t i, int n) FASTFORMER_LAMBDA { store_n(to + i, load_n(from + i, n) * broadcast(factor), n); });
}

// The natural logarithm of total * 2^peak.
FASTFORMER_INLINE float natural_lse(float peak, float total) {
  return static_cast<float>(peak * 0.6931471805599453 + log(static_cast<double>(total)));
}

}  // namespace
}  // namespace fastformer::FASTFORMER_LEVEL
