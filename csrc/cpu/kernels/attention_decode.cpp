// A few queries against many keys, as when one token is generated at a time: keys and values are read once, as they
// lie in memory, and nothing is packed.
#include "attention.h"
#include "attention_scores.h"
#include "philox.h"

namespace fastformer::FASTFORMER_LEVEL {
namespace {

// Of keys, or values, that stay in the first-level cache for the group's queries.
constexpr int64_t kKeyBlock = kMostKeys;

// One query's state: the sum of weighted values, then the largest score and the sum of weights.
FASTFORMER_INLINE int64_t state_floats(const Attention& a) { return padded(a.value_dim) + 16; }

struct State {
  float *output, *peak, *total;
};
FASTFORMER_INLINE State state_at(const Attention& a, float* states, int64_t row) {
  float* output = states + row * state_floats(a);
  return {output, output + padded(a.value_dim), output + padded(a.value_dim) + 1};
}

// scores[j] = query key_j for 4 keys at once.
template <typename T>
void dot_products(const float* query, const T* keys, int64_t stride, int64_t count, int64_t width, float* scores) {
  for (int64_t j = 0; j < count; j += 4) {
    Vec sums[4] = {zero(), zero(), zero(), zero()};
    const T* rows[4];
    for (int r = 0; r < 4; ++r) rows[r] = keys + smaller(j + r, count - 1) * stride;
    for_lanes(0, width, [&](int64_t i, int n) FASTFORMER_LAMBDA {
      const Vec q = load(query + i);
#pragma GCC unroll 4
      for (int r = 0; r < 4; ++r) sums[r] = fma(load_n(rows[r] + i, n), q, sums[r]);
    });
    for (int r = 0; r < 4; ++r) scores[j + r] = reduce_add(sums[r]);
  }
}

// output = fade output + sum of weights[j] values_j, for kVecs registers of columns.
template <int kVecs, typename T>
FASTFORMER_INLINE void weigh_columns(const float* weights, const T* values, int64_t stride, int64_t count, float fade,
                                     float* output, int n) {
  Vec sums[kVecs];
#pragma GCC unroll 4
  for (int v = 0; v < kVecs; ++v) sums[v] = zero();
  for (int64_t j = 0; j < count; ++j) {
    const Vec weight = broadcast(weights[j]);
#pragma GCC unroll 4
    for (int v = 0; v < kVecs; ++v) sums[v] = fma(load_n(values + j * stride + v * kLanes, n), weight, sums[v]);
  }
#pragma GCC unroll 4
  for (int v = 0; v < kVecs; ++v) {
    store(output + v * kLanes, fma(load(output + v * kLanes), broadcast(fade), sums[v]));
  }
}

template <typename T>
void weigh_values(const float* weights, const T* values, int64_t stride, int64_t count, int64_t width, float fade,
                  float* output) {
  int64_t i = 0;
  for (; i + 4 * kLanes <= width; i += 4 * kLanes) {
    weigh_columns<4>(weights, values + i, stride, count, fade, output + i, kLanes);
  }
  for (; i + kLanes <= width; i += kLanes) {
    weigh_columns<1>(weights, values + i, stride, count, fade, output + i, kLanes);
  }
  if (const int n = static_cast<int>(width - i)) {
    weigh_columns<1>(weights, values + i, stride, count, fade, output + i, n);
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

// Scores to weights of exp2(score - peak), with `terms` or null, and times `factors` or null where they are dropped;
// returns how much earlier sums fade.
FASTFORMER_INLINE float online_softmax(float* scores, const float* terms, const float* factors, int64_t count,
                                       const Attention& a, const State& s) {
  const Vec factor = broadcast(score_factor(a)), cap_factor = broadcast(a.scale / a.softcap);
  Vec peaks = broadcast(*s.peak);
  for_lanes(0, count, [&](int64_t i, int n) FASTFORMER_LAMBDA {
    Vec score = load(scores + i);
    if (has_softcap(a)) score = tanh(score * cap_factor);
    score = score * factor;
    if (terms != nullptr) score = score + load(terms + i);
    score = select(first_n(n), score, broadcast(-INFINITY));
    store(scores + i, score);
    peaks = max(peaks, score);
  });
  const float peak = reduce_max(peaks), shift = peak < -FLT_MAX ? 0.0f : peak;
  Vec sum = zero();
  for_lanes(0, count, [&](int64_t i, int) FASTFORMER_LAMBDA {
    const Vec weight = exp2(load(scores + i) - broadcast(shift));
    store(scores + i, factors == nullptr ? weight : weight * load(factors + i));
    sum = sum + weight;
  });
  const float fade = exp2f(*s.peak - shift);
  *s.peak = peak;
  *s.total = *s.total * fade + reduce_add(sum);
  return fade;
}

// One query against those of the keys from `first` on, all of which it sees, that a mask shows.
template <typename T>
void attend_to_keys(const Attention& a, const Sequence& s, const QueryBlock& q, int64_t kv_head, int64_t first,
                    const Shown& shown, const float* query, const State& state) {
  // Products come by fours, and dropout's factors begin with a whole four.
  alignas(64) float scores[kKeyBlock + kLanes], terms[kKeyBlock + kLanes], factors[kKeyBlock + 4 + kLanes];
  first += shown.from;
  const int64_t keys = shown.to - shown.from;
  for_key_runs(a, first, keys, [&](int64_t row, int64_t rows) FASTFORMER_LAMBDA {
    dot_products(query, static_cast<const T*>(a.key) + key_offset(a, a.key_strides, s, kv_head, row), a.key_strides[2],
                 rows, a.head_dim, scores + (row - first));
  });
  const float* row_terms = fill_terms_of_row(a, s, q, first, keys, shown.plain, terms);
  const int64_t before = first % 4;
  if (has_dropout(a)) dropout_factors_of_row(a, s, q.head, q.first, first - before, before + keys, factors);
  float fade = online_softmax(scores, row_terms, has_dropout(a) ? factors + before : nullptr, keys, a, state);
  for_key_runs(a, first, keys, [&](int64_t row, int64_t rows) FASTFORMER_LAMBDA {
    weigh_values(scores + (row - first),
                 static_cast<const T*>(a.value) + key_offset(a, a.value_strides, s, kv_head, row), a.value_strides[2],
                 rows, a.value_dim, fade, state.output);
    fade = 1.0f;
  });
}

// The queries of a sequence and key head, as rows: those of one head after those of another.
FASTFORMER_INLINE int64_t rows_of(const Attention& a, int64_t queries) { return a.heads / a.kv_heads * queries; }
FASTFORMER_INLINE QueryBlock query_of_row(const Attention& a, const Sequence& s, int64_t kv_head, int64_t row) {
  return {kv_head * (a.heads / a.kv_heads) + row / s.queries, row % s.queries, 1};
}

template <typename T>
void decode_keys(const AttentionForward& args, const Sequence& s, int64_t kv_head, int64_t begin, int64_t end,
                 float* states, float* queries) {
  const Attention& a = args.inputs;
  const int64_t rows = rows_of(a, s.queries), width = padded(a.head_dim);
  for (int64_t row = 0; row < rows; ++row) {
    const QueryBlock q = query_of_row(a, s, kv_head, row);
    const State state = state_at(a, states, row);
    memset(state.output, 0, padded(a.value_dim) * sizeof(float));
    *state.peak = -INFINITY;
    *state.total = 0.0f;
    pack_row(static_cast<const T*>(a.query) + query_offset(a.query_strides, s, q.head, q.first), a.head_dim,
             queries + row * width, width);
  }
  for (int64_t first_key = begin; first_key < end; first_key += kKeyBlock) {
    const int64_t last_key = smaller(first_key + kKeyBlock, end);
    for (int64_t row = 0; row < rows; ++row) {
      const QueryBlock q = query_of_row(a, s, kv_head, row);
      const KeyRange seen = keys_seen(a, s, q);
      const int64_t first = larger(first_key, seen.begin), last = smaller(last_key, seen.end);
      if (first >= last) continue;
      const Shown shown = shown_keys(a, s, q, first, last - first, 1);
      if (shown.from >= shown.to) continue;
      attend_to_keys<T>(a, s, q, kv_head, first, shown, queries + row * width, state_at(a, states, row));
    }
  }
}

void part(const AttentionForward& args, const Sequence& s, int64_t kv_head, int64_t begin, int64_t end, float* states,
          void* scratch) {
  visit(args.inputs.dtype,
        [&]<typename T>() { decode_keys<T>(args, s, kv_head, begin, end, states, static_cast<float*>(scratch)); });
}

template <typename T>
void store_quotient(const float* from, T* to, int64_t width, float divisor) {
  const Vec d = broadcast(divisor == 0.0f ? 1.0f : divisor);
  for_lanes(0, width, [&](int64_t i, int n) FASTFORMER_LAMBDA { store_n(to + i, load(from + i) / d, n); });
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
      total += *state.total * fade;
      for (int64_t d = 0; d < padded(a.value_dim); d += kLanes) {
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
  return rows_of(args.inputs, queries) * padded(args.inputs.head_dim) * static_cast<int64_t>(sizeof(float));
}

}  // namespace

const AttentionDecodeKernels attention_decode{scratch, states, part, combine};

}  // namespace fastformer::FASTFORMER_LEVEL
