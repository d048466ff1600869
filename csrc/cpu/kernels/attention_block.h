// What attention's forward and backward share: which keys a block of queries sees, softcap, masks, and packing.
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

// A block of queries against a block of keys: lane i, of the whole query block, sees keys j < min(keys, i + diagonal).
struct Band {
  int64_t keys, diagonal;

  int64_t seen_by(int64_t lane) const { return larger(0, smaller(keys, lane + diagonal)); }
  // Keys that every lane of register v sees, and those that some lane sees, in whole tiles.
  int64_t all(int64_t v) const { return seen_by(v * kLanes); }
  int64_t reach(int64_t v) const { return round_up(seen_by(v * kLanes + kLanes - 1), kTileRows); }
  // Of register v, how many lanes from the first don't see key j.
  int hidden(int64_t v, int64_t j) const {
    return static_cast<int>(j >= keys ? kLanes : larger(0, smaller(kLanes, j + 1 - diagonal - v * kLanes)));
  }
};

// One block of queries: where it begins, and how many there are.
struct QueryBlock {
  int64_t head, first, count;

  int64_t vecs() const { return (count + kLanes - 1) / kLanes; }
};

FASTFORMER_INLINE QueryBlock query_block(const Attention& a, int64_t kv_head, int64_t block) {
  const int64_t blocks_per_head = (a.seqlen_q + kQueryBlock - 1) / kQueryBlock;
  const int64_t first = block % blocks_per_head * kQueryBlock;
  const int64_t head = kv_head * (a.heads / a.kv_heads) + block / blocks_per_head;
  return {head, first, smaller(kQueryBlock, a.seqlen_q - first)};
}

// Keys that the last of the queries sees.
FASTFORMER_INLINE int64_t keys_seen(const Attention& a, const QueryBlock& q) {
  return larger(0, smaller(a.seqlen_k, q.first + q.count - 1 + a.diagonal));
}

FASTFORMER_INLINE int64_t row_offset(const int64_t (&strides)[3], int64_t batch, int64_t head, int64_t row) {
  return batch * strides[0] + head * strides[1] + row * strides[2];
}

// Calls f(v, vecs, from, to): registers [v, v + vecs) of the query block against keys [from, to), in panels that follow
// the steps of the diagonal.
template <typename F>
FASTFORMER_INLINE void walk_band(const Band& band, int64_t all_vecs, F f) {
  for (int64_t v = 0; v < all_vecs;) {
    const int vecs = panel_vecs(all_vecs - v);
    int64_t done = band.reach(v);
    if (done > 0) f(v, vecs, int64_t{0}, done);
    for (int64_t w = v + 1; w < v + vecs; ++w) {
      const int64_t reach = band.reach(w);
      if (reach == done) continue;
      f(w, static_cast<int>(v + vecs - w), done, reach);
      done = reach;
    }
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

// --- softcap

// tanh within 1.5 ulp. |x| < 0.6: x + x^3 p(x^2), p of degree 4. Beyond: 1 - 2e / (1 + e) with e = e^(-2|x|).
FASTFORMER_INLINE Vec tanh(Vec x) {
  const Vec square = x * x;
  Vec p = fma(broadcast(-6.26911968e-3f), square, broadcast(2.11109594e-2f));
  p = fma(p, square, broadcast(-5.38739487e-2f));
  p = fma(p, square, broadcast(0.133329153f));
  p = fma(p, square, broadcast(-0.333333313f));
  const Vec small = fma(p * square, x, x);
  const Vec t = abs(x), one = broadcast(1.0f), e = exp(broadcast(-2.0f) * t);
  const Vec large = one - (e + e) / (one + e);
  return select(less(t, broadcast(0.6f)), small, select(less(x, zero()), zero() - large, large));
}

FASTFORMER_INLINE bool has_softcap(const Attention& a) { return a.softcap > 0.0f; }

// With softcap, scores of a block become tanh(scale / softcap * score), as far as the band reaches.
FASTFORMER_INLINE void cap_scores(const Attention& a, float* scores, const Band& band, int64_t all_vecs) {
  if (!has_softcap(a)) return;
  const Vec factor = broadcast(a.scale / a.softcap);
  for (int64_t v = 0; v < all_vecs; ++v) {
    for (int64_t j = 0; j < band.reach(v); ++j) {
      float* p = scores + j * kQueryBlock + v * kLanes;
      store(p, tanh(load(p) * factor));
    }
  }
}

// What scores, or their tanh, are to be multiplied by.
FASTFORMER_INLINE float score_factor(const Attention& a) { return (has_softcap(a) ? a.softcap : a.scale) * kLog2e; }

// --- masks, as what they add to a score

// -inf stays; what only the change of base would make infinite does not.
FASTFORMER_INLINE float mask_term(float x) {
  const float term = x * kLog2e;
  return term < -FLT_MAX && x >= -FLT_MAX ? -FLT_MAX : term;
}
FASTFORMER_INLINE float mask_term(uint8_t keep) {  // a branch would be mispredicted, and not become vector code
  return bits_to_float((static_cast<uint32_t>(keep != 0) - 1) & 0xff800000);  // 0 or -inf
}
FASTFORMER_INLINE float mask_term(BFloat16 x) { return mask_term(to_float(x)); }
FASTFORMER_INLINE float mask_term(Half x) { return mask_term(to_float(x)); }

// Calls f with the type of the mask's elements as its template argument.
template <typename F>
FASTFORMER_INLINE void visit_mask(const Attention& a, F f) {
  if (a.mask_kind == MaskKind::boolean) {
    f.template operator()<uint8_t>();
  } else {
    visit(a.mask_dtype, f);
  }
}

FASTFORMER_INLINE int64_t mask_offset(const Attention& a, int64_t batch, const QueryBlock& q, int64_t first_key) {
  const int64_t (&strides)[4] = a.mask_strides;
  return batch * strides[0] + q.head * strides[1] + q.first * strides[2] + first_key * strides[3];
}

// Of a block's keys, [from, to) are those that the mask shows to some query; it shows them all to every one if `plain`.
struct Shown {
  int64_t from, to;
  bool plain;
};

// Of kKeys keys: some[key], not 0 if any query sees the key, and every[key], 0 unless all do. (It may be 0 then too,
// where a true is not stored as 1.)
template <int kKeys>
FASTFORMER_INLINE void look_at_keys(const uint8_t* mask, int64_t row_stride, int64_t stride, int64_t rows,
                                    uint8_t* some, uint8_t* every) {
  uint8_t any[kKeys] = {}, all[kKeys];
  memset(all, 0xff, kKeys);
  for (int64_t i = 0; i < rows; ++i) {
    for (int j = 0; j < kKeys; ++j) {
      any[j] |= mask[i * row_stride + j * stride];
      all[j] &= mask[i * row_stride + j * stride];
    }
  }
  memcpy(some, any, kKeys);
  memcpy(every, all, kKeys);
}

// What a boolean mask shows of a block; all of it without one. `from` is a multiple of `step`.
FASTFORMER_INLINE Shown shown_keys(const Attention& a, int64_t batch, const QueryBlock& q, int64_t first_key,
                                   int64_t keys, int64_t step) {
  if (a.mask_kind != MaskKind::boolean) return {0, keys, a.mask_kind == MaskKind::none};
  uint8_t some[kMostKeys], every[kMostKeys];
  const uint8_t* mask = static_cast<const uint8_t*>(a.mask) + mask_offset(a, batch, q, first_key);
  const int64_t row_stride = a.mask_strides[2], stride = a.mask_strides[3], rows = row_stride == 0 ? 1 : q.count;
  int64_t j = 0;
  if (stride == 1) {
    for (; j + 64 <= keys; j += 64) look_at_keys<64>(mask + j, row_stride, 1, rows, some + j, every + j);
    for (; j < keys && keys >= 16; j += 16) {
      const int64_t at = smaller(j, keys - 16);  // the last run begins early
      look_at_keys<16>(mask + at, row_stride, 1, rows, some + at, every + at);
    }
  }
  for (; j < keys; ++j) look_at_keys<1>(mask + j * stride, row_stride, stride, rows, some + j, every + j);
  int64_t from = 0, to = keys;
  while (from < keys && !some[from]) ++from;
  while (to > from && !some[to - 1]) --to;
  from = from / step * step;
  return {from, to, memchr(every + from, 0, to - from) == nullptr};
}

template <typename M>
void mask_row(const M* mask, int64_t stride, int64_t keys, float* __restrict terms) {
  if (stride == 1 && keys >= 16) {
    for (int64_t j = 0; j < keys; j += 16) {
      const int64_t at = smaller(j, keys - 16);  // the last run begins early
      for (int64_t i = at; i < at + 16; ++i) terms[i] = mask_term(mask[i]);
    }
  } else {
    for (int64_t j = 0; j < keys; ++j) terms[j] = mask_term(mask[j * stride]);
  }
}

template <typename M>
void mask_terms_of_type(const Attention& a, int64_t batch, const QueryBlock& q, int64_t first_key, int64_t keys,
                        float* rows_scratch, float* terms) {
  const int64_t (&strides)[4] = a.mask_strides;
  const M* mask = static_cast<const M*>(a.mask) + mask_offset(a, batch, q, first_key);
  if (strides[2] == 0) {  // the same for every query
    mask_row(mask, strides[3], keys, rows_scratch);
    for (int64_t j = 0; j < keys; ++j) {
      for (int64_t i = 0; i < kQueryBlock; i += kLanes) store(terms + j * kQueryBlock + i, broadcast(rows_scratch[j]));
    }
    return;
  }
  const int64_t columns = padded(keys);
  const int64_t rows = round_up(q.count, kLanes);
  for (int64_t i = 0; i < q.count; ++i) mask_row(mask + i * strides[2], strides[3], keys, rows_scratch + i * columns);
  memset(rows_scratch + q.count * columns, 0, (rows - q.count) * columns * sizeof(float));
  transpose(rows_scratch, columns, terms, kQueryBlock, rows, columns);
}

// terms[key][query] of a block of keys from `first_key`; rows_scratch holds [kQueryBlock][padded(keys)].
FASTFORMER_INLINE void mask_terms(const Attention& a, int64_t batch, const QueryBlock& q, int64_t first_key,
                                  int64_t keys, float* rows_scratch, float* terms) {
  visit_mask(a, [&]<typename M>() { mask_terms_of_type<M>(a, batch, q, first_key, keys, rows_scratch, terms); });
}

// terms[key] of one query.
FASTFORMER_INLINE void mask_terms_of_row(const Attention& a, int64_t batch, const QueryBlock& q, int64_t first_key,
                                         int64_t keys, float* terms) {
  const int64_t at = mask_offset(a, batch, q, first_key);
  visit_mask(a, [&]<typename M>() { mask_row(static_cast<const M*>(a.mask) + at, a.mask_strides[3], keys, terms); });
}

}  // namespace
}  // namespace fastformer::FASTFORMER_LEVEL
