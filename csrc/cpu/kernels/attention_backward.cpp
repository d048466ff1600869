// With P = exp(scores - lse), F = 1 / (1 - dropout_p) where a weight is kept and 0 where it is dropped, and
// dP = F * grad_output value^T:
//   delta = rowsum(grad_output * output) - grad_lse,  dS = P * (dP - delta),
//   grad_value = (F * P)^T grad_output,  grad_query = scale dS key,  grad_key = scale dS^T query,  grad_mask = dS.
// With softcap, t = tanh(scale query key^T / softcap), and dS (1 - t^2) is what goes on to query and key. A sink is in
// lse, and its gradient follows from delta: see the operator.
#include "attention.h"
#include "attention_block.h"
#include "attention_scores.h"
#include "philox.h"

namespace fastformer::FASTFORMER_LEVEL {
namespace {

constexpr int64_t kKeyBlock = 64;
static_assert(kKeyBlock <= kMostKeys && kKeyBlock % kTileRows == 0);
static_assert(kTileRows % 4 == 0);  // where dropout may begin

// Rows whose sums are added up at once, in the first-level cache.
constexpr int64_t kFinishRows = 16;

// Blocks of P and dS serve as A, in units along the queries, and dS as B too, in units along the keys.
template <typename Unit>
constexpr int64_t kRowUnits = kQueryBlock / kUnitDepth<Unit>;

// A part's packed keys, and the rows of its sums, begin with a whole tile, and are at most so many.
FASTFORMER_INLINE int64_t first_row(const KeyRange& seen) { return seen.begin / kTileRows * kTileRows; }
FASTFORMER_INLINE int64_t key_rows(int64_t keys) { return round_up(keys + kTileRows - 1, kTileRows); }

template <typename Unit>
struct Workspace {
  int64_t key_units, value_units;  // of a row, as a depth
  int64_t key_columns, value_columns;
  // All the keys that the part's queries see, from first_row() on; `packed` says of each block of them whether it is.
  Unit* keys;       // [key_rows][key_units]
  Unit* keys_deep;  // [key_rows][key_columns], in units along the keys
  Unit* values;     // [key_rows][value_units]
  bool* packed;     // [key_rows / kKeyBlock]
  // One block of queries.
  Unit* queries_t;      // [key_units][kQueryBlock]
  Unit* queries_deep;   // [kQueryBlock][key_columns], in units along the queries
  Unit* grads_t;        // [value_units][kQueryBlock]
  Unit* grads_deep;     // [kQueryBlock][value_columns], in units along the queries
  float* grad_query_t;  // [key_columns][kQueryBlock]
  float* lse;           // [kQueryBlock], base 2; +inf for a query that sees nothing
  float* lse_rest;      // [kQueryBlock] what rounding took from it
  float* delta;         // [kQueryBlock]
  // One block of queries against one of keys.
  float* scores;           // [kKeyBlock][kQueryBlock]
  float* grad_scores;      // [kKeyBlock][kQueryBlock], first dP and then dS, with softcap times 1 - t^2
  float* terms;            // [kKeyBlock][kQueryBlock] of masks and ALiBi; with softcap, dS in the end
  float* factors;          // [kKeyBlock][kQueryBlock] of dropout
  Unit* weights;           // F * P as A
  Unit* grad_scores_rows;  // dS as A
  Unit* grad_scores_deep;  // dS as B
  float* rows;             // rows before, or after, a transposition
};

template <typename Unit>
Workspace<Unit> carve_workspace(const Attention& a, int64_t keys, Carver& carver) {
  constexpr bool kFloat = kUnitDepth<Unit> == 1;
  constexpr int64_t kBlock = kKeyBlock * kQueryBlock;
  Workspace<Unit> w;
  w.key_units = padded(depth_units<Unit>(a.head_dim));
  w.value_units = padded(depth_units<Unit>(a.value_dim));
  w.key_columns = padded(a.head_dim);
  w.value_columns = padded(a.value_dim);
  const int64_t rows = key_rows(keys);
  w.keys = carver.take<Unit>(rows * w.key_units);
  w.keys_deep = kFloat ? w.keys : carver.take<Unit>(rows / kUnitDepth<Unit> * w.key_columns);
  w.values = carver.take<Unit>(rows * w.value_units);
  w.packed = carver.take<bool>(rows / kKeyBlock + 1);
  w.queries_t = carver.take<Unit>(w.key_units * kQueryBlock);
  w.queries_deep = carver.take<Unit>(kRowUnits<Unit> * w.key_columns);
  w.grads_t = carver.take<Unit>(w.value_units * kQueryBlock);
  w.grads_deep = carver.take<Unit>(kRowUnits<Unit> * w.value_columns);
  w.grad_query_t = carver.take<float>(w.key_columns * kQueryBlock);
  w.lse = carver.take<float>(kQueryBlock);
  w.lse_rest = carver.take<float>(kQueryBlock);
  w.delta = carver.take<float>(kQueryBlock);
  w.scores = carver.take<float>(kBlock);
  w.grad_scores = carver.take<float>(kBlock);
  w.terms = carver.take<float>(has_terms(a) || has_softcap(a) ? kBlock : 0);
  w.factors = carver.take<float>(has_dropout(a) ? kBlock : 0);
  w.weights = kFloat ? reinterpret_cast<Unit*>(w.scores) : carver.take<Unit>(kBlock / kUnitDepth<Unit>);
  w.grad_scores_rows = kFloat ? reinterpret_cast<Unit*>(w.grad_scores) : carver.take<Unit>(kBlock / kUnitDepth<Unit>);
  w.grad_scores_deep = kFloat ? w.grad_scores_rows : carver.take<Unit>(kBlock / kUnitDepth<Unit>);
  w.rows = carver.take<float>(kQueryBlock * larger(kKeyBlock, larger(w.key_columns, w.value_columns)));
  return w;
}

// Keys [begin, end) to their rows of the packed ones, the first of which is `base`.
template <typename T, typename Unit>
void pack_keys(const Attention& a, const Sequence& s, int64_t kv_head, int64_t base, int64_t begin, int64_t end,
               const Workspace<Unit>& w) {
  const T* key = static_cast<const T*>(a.key) + key_offset(a, a.key_strides, s, kv_head, begin);
  const T* value = static_cast<const T*>(a.value) + key_offset(a, a.value_strides, s, kv_head, begin);
  const int64_t key_stride = a.key_strides[2], value_stride = a.value_strides[2];
  const int64_t row = begin - base, keys = end - begin, rows = round_up(keys, kTileRows);
  pack_rows(key, key_stride, keys, a.head_dim, w.keys + row * w.key_units, rows, w.key_units);
  pack_rows(value, value_stride, keys, a.value_dim, w.values + row * w.value_units, rows, w.value_units);
  if (kUnitDepth<Unit> > 1) {
    Unit* deep = w.keys_deep + row / kUnitDepth<Unit> * w.key_columns;
    pack_depth_rows(key, key_stride, keys, a.head_dim, deep, rows, w.key_columns);
  }
}

template <typename T>
float dot(const T* x, const T* y, int64_t width) {
  Vec sum = zero();
  for_lanes(0, width, [&](int64_t i, int n) FASTFORMER_LAMBDA { sum = fma(load_n(x + i, n), load_n(y + i, n), sum); });
  return reduce_add(sum);
}

// Queries, and what flows into their outputs.
template <typename T, typename Unit>
void pack_queries(const AttentionBackward& args, const Sequence& s, const QueryBlock& q, const Workspace<Unit>& w) {
  const Attention& a = args.inputs;
  const T* query = static_cast<const T*>(a.query) + query_offset(a.query_strides, s, q.head, q.first);
  const T* grad = static_cast<const T*>(args.grad_output) + query_offset(args.grad_output_strides, s, q.head, q.first);
  const int64_t query_stride = a.query_strides[2], grad_stride = args.grad_output_strides[2];
  if constexpr (kUnitDepth<Unit> == 1) {  // the rows to be transposed are those wanted as they are
    pack_transposed(query, query_stride, q.count, a.head_dim, w.queries_deep, w.queries_t);
    pack_transposed(grad, grad_stride, q.count, a.value_dim, w.grads_deep, w.grads_t);
  } else {
    Unit* rows = reinterpret_cast<Unit*>(w.rows);
    pack_transposed(query, query_stride, q.count, a.head_dim, rows, w.queries_t);
    pack_transposed(grad, grad_stride, q.count, a.value_dim, rows, w.grads_t);
    pack_depth_rows(query, query_stride, q.count, a.head_dim, w.queries_deep, q.vecs() * kLanes, w.key_columns);
    pack_depth_rows(grad, grad_stride, q.count, a.value_dim, w.grads_deep, q.vecs() * kLanes, w.value_columns);
  }
}

template <typename T, typename Unit>
void fill_statistics(const AttentionBackward& args, const Sequence& s, const QueryBlock& q, const Workspace<Unit>& w) {
  const T* grad = static_cast<const T*>(args.grad_output) + query_offset(args.grad_output_strides, s, q.head, q.first);
  const T* output = static_cast<const T*>(args.output) + query_offset(args.output_strides, s, q.head, q.first);
  const int64_t at = lse_at(args.inputs, s, q.head, q.first);
  for (int64_t i = 0; i < q.vecs() * kLanes; ++i) {
    w.lse[i] = INFINITY;
    w.lse_rest[i] = 0.0f;
    w.delta[i] = 0.0f;
    if (i >= q.count || args.lse[at + i] == -INFINITY) continue;
    const double lse = args.lse[at + i] * 1.4426950408889634;
    w.lse[i] = static_cast<float>(lse);
    w.lse_rest[i] = static_cast<float>(lse - w.lse[i]);
    w.delta[i] =
        dot(grad + i * args.grad_output_strides[2], output + i * args.output_strides[2], args.inputs.value_dim);
    if (args.grad_lse != nullptr) w.delta[i] -= args.grad_lse[at + i];
  }
  if (args.delta != nullptr) memcpy(args.delta + at, w.delta, q.count * sizeof(float));
}

// Writes two rows of P and dS of one register's queries.
FASTFORMER_INLINE void store_gradients(const Workspace<float>& w, int64_t key, int64_t lane, const Vec (&weights)[2],
                                       const Vec (&grads)[2]) {
  for (int r = 0; r < 2; ++r) {
    store(w.weights + (key + r) * kQueryBlock + lane, weights[r]);
    store(w.grad_scores + (key + r) * kQueryBlock + lane, grads[r]);
  }
}
#if defined(__AVX512BF16__)
FASTFORMER_INLINE void store_gradients(const Workspace<Bf16Pair>& w, int64_t key, int64_t lane, const Vec (&weights)[2],
                                       const Vec (&grads)[2]) {
  for (int r = 0; r < 2; ++r) {
    const int64_t at = (key + r) * kQueryBlock + lane;
    store(reinterpret_cast<BFloat16*>(w.weights) + at, weights[r]);
    store(reinterpret_cast<BFloat16*>(w.grad_scores_rows) + at, grads[r]);
    store(w.grad_scores + at, grads[r]);
  }
  store_pairs(w.grad_scores_deep + key / 2 * kQueryBlock + lane, grads[0], grads[1]);
}
#endif

// scores and grad_output value^T become F * P and dS.
template <typename Unit>
void differentiate(const Attention& a, const Workspace<Unit>& w, const float* terms, const float* factors,
                   const Band& band, int64_t all_vecs) {
  const Vec factor = broadcast(score_factor(a));
  for (int64_t v = 0; v < all_vecs; ++v) {
    const int64_t lane = v * kLanes, to = band.to(v), all_from = band.all_from(v), all_to = band.all_to(v);
    const Vec lse = load(w.lse + lane), rest = load(w.lse_rest + lane), delta = load(w.delta + lane);
    for (int64_t j = band.from(v); j < to; j += 2) {
      Vec weights[2], grads[2];
#pragma GCC unroll 2
      for (int r = 0; r < 2; ++r) {
        const int64_t at = (j + r) * kQueryBlock + lane;
        const Vec score = load(w.scores + at);
        const Vec above =
            terms == nullptr ? fma(score, factor, zero() - lse) : fma(score, factor, load(terms + at)) - lse;
        Vec weight = exp2(min(zero(), above - rest));  // a weight is at most 1 whatever the rounding of huge scores
        if (j + r < all_from || j + r >= all_to) weight = where_seen(band, v, j + r, weight, zero());
        weights[r] = weight;
        Vec grad = load(w.grad_scores + at);
        if (factors != nullptr) {
          const Vec kept = load(factors + at);
          weights[r] = weight * kept;
          grad = grad * kept;
        }
        grads[r] = weight * (grad - delta);
        if (has_softcap(a)) {
          store(w.terms + at, grads[r]);
          grads[r] = grads[r] * fma(zero() - score, score, broadcast(1.0f));
        }
      }
      store_gradients(w, j, lane, weights, grads);
    }
  }
}

// sums[key][column] += weights rows, where rows are the queries that see the key; both in units along the queries.
template <typename Unit>
void multiply_queries(const Unit* weights, const Unit* rows, float* sums, int64_t columns, const Band& band,
                      int64_t all_vecs) {
  walk_registers(band, 0, all_vecs, [&](int64_t v, int vecs, int64_t from, int64_t to) FASTFORMER_LAMBDA {
    const int64_t first = v * kLanes / kUnitDepth<Unit>;
    multiply<Unit, Layout::rows_by_depth, Store::accumulate>(
        weights + from * kRowUnits<Unit> + first, kRowUnits<Unit>, rows + first * columns, columns,
        sums + from * columns, columns, to - from, columns, vecs * kLanes / kUnitDepth<Unit>);
  });
}

void store_grad_mask(const AttentionBackward& args, const Sequence& s, const QueryBlock& q, int64_t first_key,
                     const Band& band, const float* grad_scores, float* rows) {
  const Attention& a = args.inputs;
  transpose(grad_scores, kQueryBlock, rows, kKeyBlock, kKeyBlock, q.vecs() * kLanes);
  for (int64_t i = 0; i < q.count; ++i) {
    const int64_t from = band.seen_from(i), to = band.seen_to(i);
    if (from >= to) continue;
    float* grads = args.grad_mask + lse_at(a, s, q.head, q.first + i) * a.seqlen_k + first_key;
    memcpy(grads + from, rows + i * kKeyBlock + from, (to - from) * sizeof(float));
  }
}

template <typename T, typename Unit>
void store_grad_query(const AttentionBackward& args, const Sequence& s, const QueryBlock& q, const Workspace<Unit>& w) {
  const Attention& a = args.inputs;
  transpose(w.grad_query_t, kQueryBlock, w.rows, w.key_columns, w.key_columns, q.vecs() * kLanes);
  for (int64_t i = 0; i < q.count; ++i) {
    T* to = static_cast<T*>(args.grad_query) + output_row(a, s, q.head, q.first + i) * a.head_dim;
    store_scaled(w.rows + i * w.key_columns, to, a.head_dim, a.scale);
  }
}

// One block of queries against `keys` keys from `first_key` on, which lie from `row` on among the packed ones.
template <typename Unit>
void backward_block(const AttentionBackward& args, const Sequence& s, const QueryBlock& q, int64_t first_key,
                    int64_t keys, bool plain, int64_t row, const Workspace<Unit>& w, float* key_sums,
                    float* value_sums) {
  const Attention& a = args.inputs;
  const Band band = band_at(a, s, q, first_key, keys);
  const int64_t vecs = q.vecs();
  multiply_keys(w.keys + row * w.key_units, w.key_units, w.queries_t, w.scores, depth_units<Unit>(a.head_dim), band,
                vecs);
  multiply_keys(w.values + row * w.value_units, w.value_units, w.grads_t, w.grad_scores, depth_units<Unit>(a.value_dim),
                band, vecs);
  const float* terms = fill_terms(a, s, q, first_key, keys, plain, w.rows, w.terms);
  const bool drops = has_dropout(a);
  if (drops) dropout_factors(a, s, q, first_key, round_up(keys, kTileRows), w.factors);
  cap_scores(a, w.scores, band, vecs);
  differentiate(a, w, terms, drops ? w.factors : nullptr, band, vecs);
  if (args.grad_mask != nullptr) {
    store_grad_mask(args, s, q, first_key, band, has_softcap(a) ? w.terms : w.grad_scores, w.rows);
  }
  multiply_queries(w.weights, w.grads_deep, value_sums + row * w.value_columns, w.value_columns, band, vecs);
  multiply_queries(w.grad_scores_rows, w.queries_deep, key_sums + row * w.key_columns, w.key_columns, band, vecs);
  multiply_values(w.keys_deep + row / kUnitDepth<Unit> * w.key_columns, w.key_columns, w.grad_scores_deep,
                  w.grad_query_t, a.head_dim, band, vecs);
}

int64_t sums(const AttentionBackward& args, int64_t keys) {
  return key_rows(keys) * (padded(args.inputs.head_dim) + padded(args.inputs.value_dim));
}

template <typename T, typename Unit>
void backward_part(const AttentionBackward& args, const Sequence& s, int64_t kv_head, int64_t begin, int64_t end,
                   const KeyRange& seen, float* key_sums, void* scratch) {
  const Attention& a = args.inputs;
  const int64_t base = first_row(seen), rows = key_rows(seen.end - seen.begin);
  Carver carver{static_cast<char*>(scratch)};
  const Workspace<Unit> w = carve_workspace<Unit>(a, seen.end - seen.begin, carver);
  float* value_sums = key_sums + rows * w.key_columns;
  memset(key_sums, 0, sums(args, seen.end - seen.begin) * sizeof(float));
  memset(w.packed, 0, rows / kKeyBlock + 1);

  for (int64_t block = begin; block < end; ++block) {
    const QueryBlock q = query_block(a, s, kv_head, block);
    const KeyRange own = keys_seen(a, s, q);
    bool packed = false;
    fill_statistics<T>(args, s, q, w);
    memset(w.grad_query_t, 0, w.key_columns * kQueryBlock * sizeof(float));
    for (int64_t key = first_row(own), next; key < own.end; key = next) {
      const int64_t key_block = (key - base) / kKeyBlock, block_begin = base + key_block * kKeyBlock;
      next = smaller(block_begin + kKeyBlock, own.end);
      const Shown shown = shown_keys(a, s, q, key, next - key, kTileRows);
      if (shown.from >= shown.to) continue;
      if (!w.packed[key_block]) {
        pack_keys<T>(a, s, kv_head, base, block_begin, smaller(block_begin + kKeyBlock, seen.end), w);
        w.packed[key_block] = true;
      }
      if (!packed) pack_queries<T>(args, s, q, w);
      packed = true;
      const int64_t first_key = key + shown.from;
      backward_block(args, s, q, first_key, shown.to - shown.from, shown.plain, first_key - base, w, key_sums,
                     value_sums);
    }
    store_grad_query<T>(args, s, q, w);
  }
}

void part(const AttentionBackward& args, const Sequence& s, int64_t kv_head, int64_t begin, int64_t end, KeyRange seen,
          float* sums, void* scratch) {
  visit(args.inputs.dtype,
        [&]<typename T>() { backward_part<T, UnitOf<T>>(args, s, kv_head, begin, end, seen, sums, scratch); });
}

void take(const AttentionBackward& args, KeyRange seen, const float* sums, KeyRange some, float* to) {
  const int64_t key_columns = padded(args.inputs.head_dim), value_columns = padded(args.inputs.value_dim);
  const int64_t first = first_row(some) - first_row(seen), rows = some.end - first_row(some);
  const float* value_sums = sums + key_rows(seen.end - seen.begin) * key_columns;
  float* to_values = to + key_rows(some.end - some.begin) * key_columns;
  memcpy(to, sums + first * key_columns, rows * key_columns * sizeof(float));
  memcpy(to_values, value_sums + first * value_columns, rows * value_columns * sizeof(float));
}

// Rows [begin, end) of the gradients of keys, or of values: `factor` times the sum of all the sums that have such a
// row. These hold their rows of that kind after `offset` floats for each of them. A few rows at a time, whose sum stays
// in the first-level cache, in the first of the sums.
template <typename T>
void finish_rows(float* sums, int64_t stride, const KeyRange* seen, int64_t count, int64_t offset, int64_t columns,
                 T* to, int64_t to_stride, int64_t width, int64_t begin, int64_t end, float factor) {
  for (int64_t key = begin, next; key < end; key = next) {
    next = smaller(end, key + kFinishRows);
    for (int64_t p = 0; p < count; ++p) {
      if (key < seen[p].begin) next = smaller(next, seen[p].begin);
      if (key < seen[p].end) next = smaller(next, seen[p].end);
    }
    float* total = nullptr;
    for (int64_t p = 0; p < count; ++p) {
      if (key < seen[p].begin || key >= seen[p].end) continue;
      float* rows =
          sums + p * stride + key_rows(seen[p].end - seen[p].begin) * offset + (key - first_row(seen[p])) * columns;
      if (total == nullptr) {
        total = rows;
        continue;
      }
      for (int64_t i = 0; i < (next - key) * columns; i += kLanes) store(total + i, load(total + i) + load(rows + i));
    }
    for (int64_t row = key; row < next; ++row) {
      if (total == nullptr) {
        memset(to + row * to_stride, 0, width * sizeof(T));
      } else {
        store_scaled(total + (row - key) * columns, to + row * to_stride, width, factor);
      }
    }
  }
}

void finish(const AttentionBackward& args, const Sequence& s, int64_t kv_head, int64_t begin, int64_t end, float* sums,
            int64_t stride, const KeyRange* seen, int64_t count) {
  const Attention& a = args.inputs;
  const int64_t key_columns = padded(a.head_dim), value_columns = padded(a.value_dim);
  const int64_t row = (s.key_batch * a.seqlen_k + s.key_begin) * a.kv_heads + kv_head;
  visit(a.dtype, [&]<typename T>() {
    finish_rows(sums, stride, seen, count, 0, key_columns, static_cast<T*>(args.grad_key) + row * a.head_dim,
                a.kv_heads * a.head_dim, a.head_dim, begin, end, a.scale);
    finish_rows(sums, stride, seen, count, key_columns, value_columns,
                static_cast<T*>(args.grad_value) + row * a.value_dim, a.kv_heads * a.value_dim, a.value_dim, begin, end,
                1.0f);
  });
}

int64_t scratch(const AttentionBackward& args, int64_t keys) {
  Carver carver{nullptr};
  visit(args.inputs.dtype, [&]<typename T>() { carve_workspace<UnitOf<T>>(args.inputs, keys, carver); });
  return carver.used;
}

}  // namespace

const AttentionBackwardKernels attention_backward{scratch, sums, part, take, finish};

}  // namespace fastformer::FASTFORMER_LEVEL
