// A few queries against many keys, as when one token is generated at a time: keys and values are read once, as they
// lie in memory, and nothing is packed.
#include "attention.h"
#include "attention_block.h"

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

// Scores to weights of exp2(score - peak), with `terms` of the mask or null; returns how much earlier sums fade.
FASTFORMER_INLINE float online_softmax(float* scores, const float* terms, int64_t count, const Attention& a,
                                       const State& s) {
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
    store(scores + i, weight);
    sum = sum + weight;
  });
  const float fade = exp2f(*s.peak - shift);
  *s.peak = peak;
  *s.total = *s.total * fade + reduce_add(sum);
  return fade;
}

template <typename T>
void decode_keys(const AttentionForward& args, int64_t batch, int64_t kv_head, int64_t begin, int64_t end,
                 float* states, float* query) {
  const Attention& a = args.inputs;
  const int64_t group = a.heads / a.kv_heads, rows = group * a.seqlen_q;
  alignas(64) float scores[kKeyBlock], terms[kKeyBlock];
  for (int64_t row = 0; row < rows; ++row) {
    const State s = state_at(a, states, row);
    for (int64_t i = 0; i < padded(a.value_dim); ++i) s.output[i] = 0.0f;
    *s.peak = -INFINITY;
    *s.total = 0.0f;
    const T* from = static_cast<const T*>(a.query) +
                    row_offset(a.query_strides, batch, kv_head * group + row / a.seqlen_q, row % a.seqlen_q);
    pack_row(from, a.head_dim, query + row * padded(a.head_dim), padded(a.head_dim));
  }
  for (int64_t first = begin; first < end; first += kKeyBlock) {
    const T* key = static_cast<const T*>(a.key) + row_offset(a.key_strides, batch, kv_head, first);
    const T* value = static_cast<const T*>(a.value) + row_offset(a.value_strides, batch, kv_head, first);
    for (int64_t row = 0; row < rows; ++row) {
      const QueryBlock q{kv_head * group + row / a.seqlen_q, row % a.seqlen_q, 1};
      const int64_t count = smaller(smaller(kKeyBlock, end - first), keys_seen(a, q) - first);
      if (count <= 0) continue;
      const Shown shown = shown_keys(a, batch, q, first, count, 1);
      const int64_t keys = shown.to - shown.from;
      if (keys <= 0) continue;
      const State s = state_at(a, states, row);
      dot_products(query + row * padded(a.head_dim), key + shown.from * a.key_strides[2], a.key_strides[2], keys,
                   a.head_dim, scores);
      if (!shown.plain) mask_terms_of_row(a, batch, q, first + shown.from, keys, terms);
      const float fade = online_softmax(scores, shown.plain ? nullptr : terms, keys, a, s);
      weigh_values(scores, value + shown.from * a.value_strides[2], a.value_strides[2], keys, a.value_dim, fade,
                   s.output);
    }
  }
}

void part(const AttentionForward& args, int64_t batch, int64_t kv_head, int64_t begin, int64_t end, float* states,
          void* scratch) {
  visit(args.inputs.dtype,
        [&]<typename T>() { decode_keys<T>(args, batch, kv_head, begin, end, states, static_cast<float*>(scratch)); });
}

template <typename T>
void store_quotient(const float* from, T* to, int64_t width, float divisor) {
  const Vec d = broadcast(divisor == 0.0f ? 1.0f : divisor);
  for_lanes(0, width, [&](int64_t i, int n) FASTFORMER_LAMBDA { store_n(to + i, load(from + i) / d, n); });
}

template <typename T>
void combine_rows(const AttentionForward& args, int64_t batch, int64_t kv_head, float* states, int64_t parts) {
  const Attention& a = args.inputs;
  const int64_t group = a.heads / a.kv_heads, rows = group * a.seqlen_q;
  for (int64_t row = 0; row < rows; ++row) {
    const int64_t head = kv_head * group + row / a.seqlen_q, i = row % a.seqlen_q;
    float peak = -INFINITY, total = 0.0f;
    for (int64_t p = 0; p < parts; ++p) peak = fmaxf(peak, *state_at(a, states, p * rows + row).peak);
    const float shift = peak < -FLT_MAX ? 0.0f : peak;
    const State sum = state_at(a, states, row);
    for (int64_t p = 0; p < parts; ++p) {
      const State s = state_at(a, states, p * rows + row);
      const float fade = exp2f(*s.peak - shift);
      total += *s.total * fade;
      for (int64_t d = 0; d < padded(a.value_dim); d += kLanes) {
        const Vec part = load(s.output + d) * broadcast(fade);
        store(sum.output + d, p == 0 ? part : load(sum.output + d) + part);
      }
    }
    T* to = static_cast<T*>(args.output) + ((batch * a.seqlen_q + i) * a.heads + head) * a.value_dim;
    store_quotient(sum.output, to, a.value_dim, total);
    args.lse[(batch * a.heads + head) * a.seqlen_q + i] = natural_lse(peak, total);
  }
}

void combine(const AttentionForward& args, int64_t batch, int64_t kv_head, float* states, int64_t parts) {
  visit(args.inputs.dtype, [&]<typename T>() { combine_rows<T>(args, batch, kv_head, states, parts); });
}

int64_t states(const AttentionForward& args) {
  return args.inputs.heads / args.inputs.kv_heads * args.inputs.seqlen_q * state_floats(args.inputs);
}

int64_t scratch(const AttentionForward& args) {
  const Attention& a = args.inputs;
  return a.heads / a.kv_heads * a.seqlen_q * padded(a.head_dim) * static_cast<int64_t>(sizeof(float));
}

}  // namespace

const AttentionDecodeKernels attention_decode{scratch, states, part, combine};

}  // namespace fastformer::FASTFORMER_LEVEL
