// What attention does to a block of scores before the softmax: softcap, masks and ALiBi.
#pragma once

#include "attention_block.h"

namespace fastformer::FASTFORMER_LEVEL {
namespace {

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
    for (int64_t j = band.from(v); j < band.to(v); ++j) {
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
  if (term < -FLT_MAX && x >= -FLT_MAX) return -FLT_MAX;
  return term > FLT_MAX && x <= FLT_MAX ? FLT_MAX : term;
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

FASTFORMER_INLINE int64_t mask_offset(const Attention& a, const Sequence& s, const QueryBlock& q, int64_t first_key) {
  const int64_t (&strides)[4] = a.mask_strides;
  return s.index * strides[0] + q.head * strides[1] + q.first * strides[2] + first_key * strides[3];
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
FASTFORMER_INLINE Shown shown_keys(const Attention& a, const Sequence& s, const QueryBlock& q, int64_t first_key,
                                   int64_t keys, int64_t step) {
  if (a.mask_kind != MaskKind::boolean) return {0, keys, a.mask_kind == MaskKind::none};
  uint8_t some[kMostKeys], every[kMostKeys];
  const uint8_t* mask = static_cast<const uint8_t*>(a.mask) + mask_offset(a, s, q, first_key);
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
void mask_terms_of_type(const Attention& a, const Sequence& s, const QueryBlock& q, int64_t first_key, int64_t keys,
                        float* rows_scratch, float* terms) {
  const int64_t (&strides)[4] = a.mask_strides;
  const M* mask = static_cast<const M*>(a.mask) + mask_offset(a, s, q, first_key);
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

// terms[key][query] -= slope |p - key|, or = -slope |p - key| where nothing was there.
FASTFORMER_INLINE void alibi_terms(const Attention& a, const Sequence& s, const QueryBlock& q, int64_t first_key,
                                   int64_t keys, bool add, float* terms) {
  const Vec slope = broadcast(a.slopes[s.index * a.slopes_stride + q.head] * -kLog2e);
  alignas(64) float lanes[kLanes];
  for (int i = 0; i < kLanes; ++i) lanes[i] = static_cast<float>(i);
  const int64_t position = q.first + s.offset - first_key;
  for (int64_t j = 0; j < keys; ++j) {
    for (int64_t v = 0; v < q.vecs(); ++v) {
      float* p = terms + j * kQueryBlock + v * kLanes;
      const Vec distance = abs(load(lanes) + broadcast(static_cast<float>(position + v * kLanes - j)));
      store(p, add ? fma(slope, distance, load(p)) : slope * distance);
    }
  }
}

FASTFORMER_INLINE bool has_terms(const Attention& a) { return a.mask_kind != MaskKind::none || a.slopes != nullptr; }

// terms[key][query], what is added to the scores of a block of keys from `first_key`, in base 2; rows_scratch holds
// [kQueryBlock][padded(keys)]. Null where nothing is: `plain` says that the mask shows all of them.
FASTFORMER_INLINE const float* fill_terms(const Attention& a, const Sequence& s, const QueryBlock& q, int64_t first_key,
                                          int64_t keys, bool plain, float* rows_scratch, float* terms) {
  if (!plain) {
    visit_mask(a, [&]<typename M>() { mask_terms_of_type<M>(a, s, q, first_key, keys, rows_scratch, terms); });
  }
  if (a.slopes != nullptr) alibi_terms(a, s, q, first_key, keys, !plain, terms);
  return plain && a.slopes == nullptr ? nullptr : terms;
}

// --- sinks

// A head's sink in base 2, and what rounding took from it: a row that sees nothing else has just this as its sum.
struct Sink {
  float score, rest;
};
FASTFORMER_INLINE Sink sink_of(const Attention& a, int64_t head) {
  const float score = a.sinks[head] * kLog2e;
  // Beyond that it is no small part of a weight; of an infinite one it isn't a number.
  const bool small = fabsf(score) < 1e6f;
  return {score, small ? fmaf(a.sinks[head], kLog2e, -score) : 0.0f};
}

}  // namespace
}  // namespace fastformer::FASTFORMER_LEVEL
