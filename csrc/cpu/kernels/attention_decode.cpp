// A few queries against many keys, as when one token is generated at a time: keys and values are read once, as they
// lie in memory, and nothing is packed.
#include "attention.h"
#include "attention_rows.h"
#include "attention_scores.h"
#include "philox.h"

namespace fastformer::FASTFORMER_LEVEL {
namespace {

// The softmax waits for a block's last score, and its values for the softmax. In blocks of 64 that took 1.1 times as
// long on a Zen 5; blocks of 256 were no faster, and prefetching the values meanwhile, or the next keys, was slower.
constexpr int64_t kKeyBlock = kMostKeys;

// Keys that certainly lie one stride apart: blocks begin at multiples of it, and pages are no shorter.
constexpr int64_t kRun = kDecodeAlignment;
static_assert(kRun % kLanes == 0 && kKeyBlock % kRun == 0);

// Queries of a group that keys and values are loaded for at once (groups of 8 in float32 took half as long with 4), and
// registers for the sums of their values.
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int kMostRows = 4, kSums = 16;
#else
constexpr int kMostRows = 2, kSums = 8;
#endif

// Rows of a block's keys, or values.
template <typename T>
struct Rows {
  const T* runs[kKeyBlock / kRun];
  int64_t stride;

  const T* at(int64_t j) const { return runs[j / kRun] + j % kRun * stride; }
};

template <typename T>
FASTFORMER_INLINE Rows<T> rows_of_block(const Attention& a, const Sequence& s, const void* base,
                                        const int64_t (&strides)[3], int64_t kv_head, int64_t first_key,
                                        int64_t last_key) {
  Rows<T> rows;
  rows.stride = strides[2];
  for (int64_t j = first_key; j < last_key; j += kRun) {
    rows.runs[(j - first_key) / kRun] = static_cast<const T*>(base) + key_offset(a, strides, s, kv_head, j);
  }
  return rows;
}

// One query's state: the sum of weighted values, in pair order; the largest score; the sum of weights, in
// the lanes of a register.
struct State {
  float *output, *total, *peak;
};
FASTFORMER_INLINE int64_t state_floats(const Attention& a) { return round_up(a.value_dim, kPair) + kLanes + 16; }
FASTFORMER_INLINE State state_at(const Attention& a, float* states, int64_t row) {
  float* output = states + row * state_floats(a);
  float* total = output + round_up(a.value_dim, kPair);
  return {output, total, total + kLanes};
}

// Scores of kRows queries with kLanes keys, the last of which stands for those after it. Rows are kPairs times kPair
// wide, or `width` if that is 0.
template <int kRows, int kPairs, typename T>
FASTFORMER_INLINE void multiply_lanes(const T* queries, int64_t query_stride, const T* keys, int64_t stride,
                                      int64_t last, int64_t width, float* scores) {
  Vec fours[kRows][kLanes / 4];
#pragma GCC unroll 4
  for (int four = 0; four < kLanes / 4; ++four) {
    Vec sums[kRows][4];
#pragma GCC unroll 4
    for (int row = 0; row < kRows; ++row) {
#pragma GCC unroll 4
      for (int r = 0; r < 4; ++r) sums[row][r] = zero();
    }
    const auto add = [&](int64_t i, int n) FASTFORMER_LAMBDA {
#pragma GCC unroll 4
      for (int r = 0; r < 4; ++r) {
        const auto key = load_part(keys + smaller(4 * four + r, last) * stride + i, n);
#pragma GCC unroll 4
        for (int row = 0; row < kRows; ++row) {
          sums[row][r] = multiply_add(key, load_part(queries + row * query_stride + i, kPair), sums[row][r]);
        }
      }
    };
    if constexpr (kPairs == 0) {
      for_pairs(0, width, add);
    } else {
#pragma GCC unroll 4
      for (int i = 0; i < kPairs; ++i) add(i * kPair, kPair);
    }
#pragma GCC unroll 4
    for (int row = 0; row < kRows; ++row) fours[row][four] = add_fours(sums[row]);
  }
#pragma GCC unroll 4
  for (int row = 0; row < kRows; ++row) store(scores + row * kKeyBlock, add_quarters(fours[row]));
}

// scores[row][j] = query_row key_j for whole registers of keys around [from, to); those of others may be anything.
template <int kRows, int kPairs, typename T>
void multiply_keys_of_width(const T* queries, int64_t query_stride, const Rows<T>& keys, int64_t from, int64_t to,
                            int64_t width, float* scores) {
  for (int64_t j = from / kLanes * kLanes; j < to; j += kLanes) {
    if (j + kLanes <= to) {
      multiply_lanes<kRows, kPairs>(queries, query_stride, keys.at(j), keys.stride, kLanes - 1, width, scores + j);
    } else {
      multiply_lanes<kRows, 0>(queries, query_stride, keys.at(j), keys.stride, to - 1 - j, width, scores + j);
    }
  }
}

template <int kRows, typename T>
FASTFORMER_INLINE void multiply_keys(const T* queries, int64_t query_stride, const Rows<T>& keys, int64_t from,
                                     int64_t to, int64_t width, float* scores) {
  if constexpr (kRows == 1) {  // which leaves the loop over the width short: a loop less took 5% off on a Zen 5
    if (width == 2 * kPair) {
      return multiply_keys_of_width<1, 2>(queries, query_stride, keys, from, to, width, scores);
    }
    if (width == 4 * kPair) {
      return multiply_keys_of_width<1, 4>(queries, query_stride, keys, from, to, width, scores);
    }
  }
  multiply_keys_of_width<kRows, 0>(queries, query_stride, keys, from, to, width, scores);
}

// states[row].output = fades[row] * it + sum of weights[row][j] values_j over j in [from, to), for kPairs times
// kPair columns, of the last of which there are n.
template <int kRows, int kPairs, typename T>
void weigh_columns(const float* weights, const Rows<T>& values, int64_t column, int64_t from, int64_t to,
                   const float (&fades)[kRows], const State (&states)[kRows], int n) {
  constexpr int kChains = kRows * kPairs < 4 ? 2 : 1;  // so many sums that additions don't wait for each other
  Pair sums[kChains][kRows][kPairs];
#pragma GCC unroll 4
  for (int c = 0; c < kChains; ++c) {
#pragma GCC unroll 4
    for (int row = 0; row < kRows; ++row) {
#pragma GCC unroll 4
      for (int v = 0; v < kPairs; ++v) sums[c][row][v] = {zero(), zero()};
    }
  }
  const auto add = [&](const T* value, int64_t j, Pair(&to_sums)[kRows][kPairs]) FASTFORMER_LAMBDA {
#pragma GCC unroll 4
    for (int v = 0; v < kPairs; ++v) {
      const Pair x = load_padded(value + v * kPair, v + 1 < kPairs ? kPair : n);
#pragma GCC unroll 4
      for (int row = 0; row < kRows; ++row) {
        const Vec weight = broadcast(weights[row * kKeyBlock + j]);
        Pair& sum = to_sums[row][v];
        sum = {fma(x.first, weight, sum.first), fma(x.second, weight, sum.second)};
      }
    }
  };
  for (int64_t j = from; j < to;) {
    const int64_t end = smaller(to, (j / kRun + 1) * kRun);
    const T* value = values.at(j) + column;
    for (; j + kChains <= end; j += kChains, value += kChains * values.stride) {
#pragma GCC unroll 4
      for (int c = 0; c < kChains; ++c) add(value + c * values.stride, j + c, sums[c]);
    }
    for (; j < end; ++j, value += values.stride) add(value, j, sums[0]);
  }
#pragma GCC unroll 4
  for (int row = 0; row < kRows; ++row) {
    const Vec fade = broadcast(fades[row]);
#pragma GCC unroll 4
    for (int v = 0; v < kPairs; ++v) {
      float *first = states[row].output + column + v * kPair, *second = first + kLanes;
      const Pair sum = sums[0][row][v], other = kChains == 1 ? Pair{zero(), zero()} : sums[kChains - 1][row][v];
      store(first, fma(load(first), fade, sum.first + other.first));
      store(second, fma(load(second), fade, sum.second + other.second));
    }
  }
}

#if defined(__AVX512BF16__)
// The same with weights in bfloat16, two keys at a time, the first of them even: their values are interleaved, and one
// instruction multiplies and adds both. A key outside [from, to) that makes a pair has no weight. For 4 queries a group
// that takes 15% off on a Zen 5, and nothing for one, which waits for memory.
template <int kRows, int kPairs>
void weigh_columns(const BFloat16* weights, const Rows<BFloat16>& values, int64_t column, int64_t from, int64_t to,
                   const float (&fades)[kRows], const State (&states)[kRows], int n) {
  constexpr int kChains = kRows * kPairs < 4 ? 2 : 1;
  Pair sums[kChains][kRows][kPairs];
#pragma GCC unroll 4
  for (int c = 0; c < kChains; ++c) {
#pragma GCC unroll 4
    for (int row = 0; row < kRows; ++row) {
#pragma GCC unroll 8
      for (int v = 0; v < kPairs; ++v) sums[c][row][v] = {zero(), zero()};
    }
  }
  const auto add = [&](const BFloat16* even, const BFloat16* odd, int64_t j,
                       Pair(&to_sums)[kRows][kPairs]) FASTFORMER_LAMBDA {
#pragma GCC unroll 8
    for (int v = 0; v < kPairs; ++v) {
      const int count = v + 1 < kPairs ? kPair : n;
      const __m512i a = (__m512i)load_part(even + v * kPair, count), b = (__m512i)load_part(odd + v * kPair, count);
      const __m512bh low = (__m512bh)_mm512_unpacklo_epi16(a, b), high = (__m512bh)_mm512_unpackhi_epi16(a, b);
#pragma GCC unroll 4
      for (int row = 0; row < kRows; ++row) {
        int two;
        memcpy(&two, weights + row * kKeyBlock + j, sizeof two);
        const __m512bh weight = (__m512bh)_mm512_set1_epi32(two);
        Pair& sum = to_sums[row][v];
        sum = {_mm512_dpbf16_ps(sum.first, low, weight), _mm512_dpbf16_ps(sum.second, high, weight)};
      }
    }
  };
  const BFloat16 nothing[kPairs * kPair] = {};
  int64_t j = from;
  if (j % 2 == 1) {
    add(nothing, values.at(j) + column, j - 1, sums[0]);
    ++j;
  }
  while (j + 1 < to) {
    const int64_t end = smaller(to, (j / kRun + 1) * kRun);
    const BFloat16* value = values.at(j) + column;
    for (; j + 2 * kChains <= end; j += 2 * kChains, value += 2 * kChains * values.stride) {
#pragma GCC unroll 4
      for (int c = 0; c < kChains; ++c) {
        const BFloat16* even = value + 2 * c * values.stride;
        add(even, even + values.stride, j + 2 * c, sums[c]);
      }
    }
    for (; j + 2 <= end; j += 2, value += 2 * values.stride) add(value, value + values.stride, j, sums[0]);
  }
  if (j < to) add(values.at(j) + column, nothing, j, sums[0]);
  const __m512i first_order = _mm512_set_epi32(30, 28, 14, 12, 26, 24, 10, 8, 22, 20, 6, 4, 18, 16, 2, 0);
  const __m512i second_order = _mm512_or_si512(first_order, _mm512_set1_epi32(1));
#pragma GCC unroll 4
  for (int row = 0; row < kRows; ++row) {
    const Vec fade = broadcast(fades[row]);
#pragma GCC unroll 8
    for (int v = 0; v < kPairs; ++v) {
      float *first = states[row].output + column + v * kPair, *second = first + kLanes;
      Pair sum = sums[0][row][v];
      if constexpr (kChains > 1) sum = sum + sums[1][row][v];
      store(first, fma(load(first), fade, _mm512_permutex2var_ps(sum.first, first_order, sum.second)));
      store(second, fma(load(second), fade, _mm512_permutex2var_ps(sum.first, second_order, sum.second)));
    }
  }
}
#endif

// All columns from `column` on: kPairs at a time, then fewer.
template <int kRows, int kPairs, typename Weight, typename T>
FASTFORMER_INLINE void weigh_values(const Weight* weights, const Rows<T>& values, int64_t from, int64_t to,
                                    int64_t width, const float (&fades)[kRows], const State (&states)[kRows],
                                    int64_t column = 0) {
  for (; column + kPairs * kPair <= width; column += kPairs * kPair) {
    weigh_columns<kRows, kPairs>(weights, values, column, from, to, fades, states, kPair);
  }
  if constexpr (kPairs > 1) {
    weigh_values<kRows, kPairs / 2>(weights, values, from, to, width, fades, states, column);
  } else if (column < width) {
    const int n = static_cast<int>(width - column);
    weigh_columns<kRows, 1>(weights, values, column, from, to, fades, states, n);
  }
}

// terms[key] of a query: what fill_terms gives a block.
FASTFORMER_INLINE const float* fill_terms_of_row(const Attention& a, const Sequence& s, const QueryBlock& q,
                                                 int64_t first_key, int64_t keys, bool plain, float* terms) {
  if (!plain) {
    const int64_t at = mask_offset(a, s, q, first_key);
    visit_mask(a, [&]<typename M>() { mask_row(static_cast<const M*>(a.mask) + at, a.mask_strides[3], keys, terms); });
  }
  if (a.slopes == nullptr) return plain ? nullptr : terms;
  const float slope = a.slopes[s.index * a.slopes_stride + q.head] * -kLog2e;
  const int64_t position = q.first + s.offset - first_key;
  for (int64_t j = 0; j < keys; ++j) {
    const float term = slope * fabsf(static_cast<float>(position - j));
    terms[j] = plain ? term : terms[j] + term;
  }
  return terms;
}

// Scores of keys [from, to) to weights of exp2(score - peak), with `terms` or null, and times `factors` or null where
// they are dropped; returns how much earlier sums fade.
FASTFORMER_INLINE float online_softmax(float* scores, const float* terms, const float* factors, int64_t from,
                                       int64_t to, const Attention& a, const State& s) {
  const Vec factor = broadcast(score_factor(a)), cap_factor = broadcast(a.scale / a.softcap);
  const int64_t begin = from / kLanes * kLanes;
  const float old_peak = *s.peak;
  Vec peaks = broadcast(old_peak);
  for (int64_t j = begin; j < to; j += kLanes) {
    Vec score = load(scores + j);
    if (has_softcap(a)) score = tanh(score * cap_factor);
    score = score * factor;
    if (terms != nullptr) score = score + load(terms + j);
    if (j < from || j + kLanes > to) {
      const Vec hidden = broadcast(-INFINITY), above = select(first_n(static_cast<int>(from - j)), hidden, score);
      score = select(first_n(static_cast<int>(smaller(kLanes, to - j))), above, hidden);
    }
    store(scores + j, score);
    peaks = max(peaks, score);
  }
  const float peak = reduce_max(peaks), shift = peak < -FLT_MAX ? 0.0f : peak;
  Vec sum = zero();
  for (int64_t j = begin; j < to; j += kLanes) {
    const Vec weight = exp2(load(scores + j) - broadcast(shift));
    store(scores + j, factors == nullptr ? weight : weight * load(factors + j));
    sum = sum + weight;
  }
  const Vec fade = exp2(broadcast(old_peak - shift));
  *s.peak = peak;
  store(s.total, fma(load(s.total), fade, sum));
  alignas(64) float lanes[kLanes];
  store(lanes, fade);
  return lanes[0];
}

// The queries of a sequence and key head, as rows: those of one head after those of another.
FASTFORMER_INLINE int64_t rows_of(const Attention& a, int64_t queries) { return a.heads / a.kv_heads * queries; }
FASTFORMER_INLINE QueryBlock query_of_row(const Attention& a, const Sequence& s, int64_t kv_head, int64_t row) {
  return {kv_head * (a.heads / a.kv_heads) + row / s.queries, row % s.queries, 1};
}

// The work on one sequence and key head.
template <typename T>
struct Decoding {
  const Attention& a;
  const Sequence& s;
  int64_t kv_head;
  const T* queries;      // of the rows
  int64_t query_stride;  // whole times kPair, with zeros
  float* states;
};

// Rows from `row` on against keys [from, to) of a block, which they all see. A mask shows all of them if `plain`.
template <int kRows, typename T>
void attend_to_keys(const Decoding<T>& d, int64_t row, int64_t first_key, int64_t from, int64_t to, bool plain,
                    const Rows<T>& keys, const Rows<T>& values) {
  const Attention& a = d.a;
  alignas(64) float scores[kRows * kKeyBlock], terms[kKeyBlock + kLanes], factors[kKeyBlock + 4 * kLanes];
  float fades[kRows];
  State states[kRows];
  multiply_keys<kRows>(d.queries + row * d.query_stride, d.query_stride, keys, from, to, a.head_dim, scores);
  for (int i = 0; i < kRows; ++i) {
    const QueryBlock q = query_of_row(a, d.s, d.kv_head, row + i);
    const float* some_terms = fill_terms_of_row(a, d.s, q, first_key + from, to - from, plain, terms + from);
    if (has_dropout(a)) dropout_factors_of_row(a, d.s, q.head, q.first, first_key, to, factors);
    states[i] = state_at(a, d.states, row + i);
    fades[i] = online_softmax(scores + i * kKeyBlock, some_terms == nullptr ? nullptr : terms,
                              has_dropout(a) ? factors : nullptr, from, to, a, states[i]);
  }
  constexpr int kPairs = kSums / 2 / kRows;
#if defined(__AVX512BF16__)
  if constexpr (kRows > 1 && __is_same(T, BFloat16)) {
    alignas(64) BFloat16 weights[kRows * kKeyBlock];
    for (int i = 0; i < kRows * kKeyBlock; i += kKeyBlock) {
      for (int64_t j = from / kLanes * kLanes; j < to; j += kLanes) store(weights + i + j, load(scores + i + j));
      if (from % 2 == 1) weights[i + from - 1] = {};
      if (to % 2 == 1) weights[i + to] = {};
    }
    return weigh_values<kRows, kPairs>(weights, values, from, to, a.value_dim, fades, states);
  }
#endif
  weigh_values<kRows, kPairs>(scores, values, from, to, a.value_dim, fades, states);
}

// What a row's query sees of a block, by the band and by a boolean mask, from its first key on.
FASTFORMER_INLINE Shown shown_to_row(const Attention& a, const Sequence& s, int64_t kv_head, int64_t row,
                                     int64_t first_key, int64_t last_key) {
  const QueryBlock q = query_of_row(a, s, kv_head, row);
  const KeyRange seen = keys_seen(a, s, q);
  const int64_t first = larger(first_key, seen.begin), last = smaller(last_key, seen.end);
  if (first >= last) return {0, 0, true};
  const Shown shown = shown_keys(a, s, q, first, last - first, 1);
  return {first - first_key + shown.from, first - first_key + shown.to, shown.plain};
}

template <typename T>
void decode_keys(const AttentionForward& args, const Sequence& s, int64_t kv_head, int64_t begin, int64_t end,
                 float* states, T* queries) {
  const Attention& a = args.inputs;
  const int64_t rows = rows_of(a, s.queries), width = round_up(a.head_dim, kPair);
  for (int64_t row = 0; row < rows; ++row) {
    const QueryBlock q = query_of_row(a, s, kv_head, row);
    const State state = state_at(a, states, row);
    memset(state.output, 0, round_up(a.value_dim, kPair) * sizeof(float));
    store(state.total, zero());
    *state.peak = -INFINITY;
    const T* query = static_cast<const T*>(a.query) + query_offset(a.query_strides, s, q.head, q.first);
    memcpy(queries + row * width, query, a.head_dim * sizeof(T));
    memset(static_cast<void*>(queries + row * width + a.head_dim), 0, (width - a.head_dim) * sizeof(T));
  }
  const Decoding<T> d = {a, s, kv_head, queries, width, states};
  for (int64_t first_key = begin; first_key < end; first_key += kKeyBlock) {
    const int64_t last_key = smaller(first_key + kKeyBlock, end);
    const Rows<T> keys = rows_of_block<T>(a, s, a.key, a.key_strides, kv_head, first_key, last_key);
    const Rows<T> values = rows_of_block<T>(a, s, a.value, a.value_strides, kv_head, first_key, last_key);
    for (int64_t row = 0; row < rows;) {
      const Shown shown = shown_to_row(a, s, kv_head, row, first_key, last_key);
      int64_t same = 1;  // rows that see the same keys
      while (same < kMostRows && row + same < rows) {
        const Shown other = shown_to_row(a, s, kv_head, row + same, first_key, last_key);
        if (other.from != shown.from || other.to != shown.to || other.plain != shown.plain) break;
        ++same;
      }
      if (shown.from >= shown.to) {
        row += same;
      } else if (same == kMostRows) {
        attend_to_keys<kMostRows>(d, row, first_key, shown.from, shown.to, shown.plain, keys, values);
        row += kMostRows;
      } else if (same >= 2) {
        attend_to_keys<2>(d, row, first_key, shown.from, shown.to, shown.plain, keys, values);
        row += 2;
      } else {
        attend_to_keys<1>(d, row, first_key, shown.from, shown.to, shown.plain, keys, values);
        row += 1;
      }
    }
  }
}

void part(const AttentionForward& args, const Sequence& s, int64_t kv_head, int64_t begin, int64_t end, float* states,
          void* scratch) {
  visit(args.inputs.dtype,
        [&]<typename T>() { decode_keys<T>(args, s, kv_head, begin, end, states, static_cast<T*>(scratch)); });
}

template <typename T>
void store_quotient(const float* from, T* to, int64_t width, float divisor) {
  const Vec d = broadcast(divisor == 0.0f ? 1.0f : divisor);
  for_pairs(0, width, [&](int64_t i, int n) FASTFORMER_LAMBDA {
    store_padded(to + i, {load(from + i) / d, load(from + i + kLanes) / d}, n);
  });
}

template <typename T>
void combine_rows(const AttentionForward& args, const Sequence& s, int64_t kv_head, float* states, int64_t parts) {
  const Attention& a = args.inputs;
  const int64_t rows = rows_of(a, s.queries);
  for (int64_t row = 0; row < rows; ++row) {
    const QueryBlock q = query_of_row(a, s, kv_head, row);
    const Sink sink = a.sinks == nullptr ? Sink{-INFINITY, 0.0f} : sink_of(a, q.head);  // it has no value
    float peak = sink.score;
    for (int64_t p = 0; p < parts; ++p) peak = fmaxf(peak, *state_at(a, states, p * rows + row).peak);
    const float shift = peak < -FLT_MAX ? 0.0f : peak;
    float total = exp2f(sink.score - shift + sink.rest);
    const State sum = state_at(a, states, row);
    for (int64_t p = 0; p < parts; ++p) {
      const State state = state_at(a, states, p * rows + row);
      const float fade = exp2f(*state.peak - shift);
      total += reduce_add(load(state.total)) * fade;
      for (int64_t d = 0; d < round_up(a.value_dim, kPair); d += kLanes) {
        const Vec part = load(state.output + d) * broadcast(fade);
        store(sum.output + d, p == 0 ? part : load(sum.output + d) + part);
      }
    }
    T* to = static_cast<T*>(args.output) + output_row(a, s, q.head, q.first) * a.value_dim;
    store_quotient(sum.output, to, a.value_dim, total);
    args.lse[lse_at(a, s, q.head, q.first)] = natural_lse(peak, total);
  }
}

void combine(const AttentionForward& args, const Sequence& s, int64_t kv_head, float* states, int64_t parts) {
  visit(args.inputs.dtype, [&]<typename T>() { combine_rows<T>(args, s, kv_head, states, parts); });
}

int64_t states(const AttentionForward& args, int64_t queries) {
  return rows_of(args.inputs, queries) * state_floats(args.inputs);
}

int64_t scratch(const AttentionForward& args, int64_t queries) {
  return rows_of(args.inputs, queries) * round_up(args.inputs.head_dim, kPair) * static_cast<int64_t>(sizeof(float));
}

}  // namespace

const AttentionDecodeKernels attention_decode{scratch, states, part, combine};

}  // namespace fastformer::FASTFORMER_LEVEL
