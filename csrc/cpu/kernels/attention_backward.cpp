// With P = exp(scores - lse) and dP = grad_output value^T:
//   delta = rowsum(grad_output * output) - grad_lse,  dS = P * (dP - delta),
//   grad_value = P^T grad_output,  grad_query = scale dS key,  grad_key = scale dS^T query,  grad_mask = dS.
// With softcap, t = tanh(scale query key^T / softcap), and dS (1 - t^2) is what goes on to query and key.
#include "attention.h"
#include "attention_block.h"

namespace fastformer::FASTFORMER_LEVEL {
namespace {

constexpr int64_t kKeyBlock = 64;
static_assert(kKeyBlock <= kMostKeys);

// Blocks of P and dS serve as A, in units along the queries, and dS as B too, in units along the keys.
template <typename Unit>
constexpr int64_t kRowUnits = kQueryBlock / kUnitDepth<Unit>;

template <typename Unit>
struct Workspace {
  int64_t key_units, value_units;  // of a row, as a depth
  int64_t key_columns, value_columns;
  // All the keys the queries see.
  Unit* keys;       // [seqlen_k][key_units]
  Unit* keys_deep;  // [seqlen_k][key_columns], in units along the keys
  Unit* values;     // [seqlen_k][value_units]
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
  float* terms;            // [kKeyBlock][kQueryBlock] of the mask; with softcap, dS in the end
  Unit* weights;           // P as A
  Unit* grad_scores_rows;  // dS as A
  Unit* grad_scores_deep;  // dS as B
  float* rows;             // rows before, or after, a transposition
};

template <typename Unit>
Workspace<Unit> carve_workspace(const Attention& a, Carver& carver) {
  constexpr bool kFloat = kUnitDepth<Unit> == 1;
  constexpr int64_t kBlock = kKeyBlock * kQueryBlock;
  Workspace<Unit> w;
  w.key_units = padded(depth_units<Unit>(a.head_dim));
  w.value_units = padded(depth_units<Unit>(a.value_dim));
  w.key_columns = padded(a.head_dim);
  w.value_columns = padded(a.value_dim);
  const int64_t keys = round_up(a.seqlen_k, kKeyBlock);
  w.keys = carver.take<Unit>(keys * w.key_units);
  w.keys_deep = kFloat ? w.keys : carver.take<Unit>(keys / kUnitDepth<Unit> * w.key_columns);
  w.values = carver.take<Unit>(keys * w.value_units);
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
  w.terms = carver.take<float>(a.mask_kind == MaskKind::none && !has_softcap(a) ? 0 : kBlock);
  w.weights = kFloat ? reinterpret_cast<Unit*>(w.scores) : carver.take<Unit>(kBlock / kUnitDepth<Unit>);
  w.grad_scores_rows = kFloat ? reinterpret_cast<Unit*>(w.grad_scores) : carver.take<Unit>(kBlock / kUnitDepth<Unit>);
  w.grad_scores_deep = kFloat ? w.grad_scores_rows : carver.take<Unit>(kBlock / kUnitDepth<Unit>);
  w.rows = carver.take<float>(kQueryBlock * larger(kKeyBlock, larger(w.key_columns, w.value_columns)));
  return w;
}

template <typename T, typename Unit>
void pack_keys(const Attention& a, int64_t batch, int64_t kv_head, int64_t keys, const Workspace<Unit>& w) {
  const T* key = static_cast<const T*>(a.key) + row_offset(a.key_strides, batch, kv_head, 0);
  const T* value = static_cast<const T*>(a.value) + row_offset(a.value_strides, batch, kv_head, 0);
  const int64_t rows = round_up(keys, kTileRows);
  pack_rows(key, a.key_strides[2], keys, a.head_dim, w.keys, rows, w.key_units);
  pack_rows(value, a.value_strides[2], keys, a.value_dim, w.values, rows, w.value_units);
  if (kUnitDepth<Unit> > 1) {
    pack_depth_rows(key, a.key_strides[2], keys, a.head_dim, w.keys_deep, rows, w.key_columns);
  }
}

template <typename T>
float dot(const T* x, const T* y, int64_t width) {
  Vec sum = zero();
  for_lanes(0, width, [&](int64_t i, int n) FASTFORMER_LAMBDA { sum = fma(load_n(x + i, n), load_n(y + i, n), sum); });
  return reduce_add(sum);
}

template <typename T, typename Unit>
void pack_queries(const AttentionBackward& args, int64_t batch, const QueryBlock& q, const Workspace<Unit>& w) {
  const Attention& a = args.inputs;
  const T* query = static_cast<const T*>(a.query) + row_offset(a.query_strides, batch, q.head, q.first);
  const T* grad =
      static_cast<const T*>(args.grad_output) + row_offset(args.grad_output_strides, batch, q.head, q.first);
  const T* output = static_cast<const T*>(args.output) + row_offset(args.output_strides, batch, q.head, q.first);
  const int64_t query_stride = a.query_strides[2], grad_stride = args.grad_output_strides[2];
  const int64_t lanes = q.vecs() * kLanes;
  Unit* rows = reinterpret_cast<Unit*>(w.rows);
  pack_transposed(query, query_stride, q.count, a.head_dim, rows, w.queries_t);
  pack_transposed(grad, grad_stride, q.count, a.value_dim, rows, w.grads_t);
  pack_depth_rows(query, query_stride, q.count, a.head_dim, w.queries_deep, lanes, w.key_columns);
  pack_depth_rows(grad, grad_stride, q.count, a.value_dim, w.grads_deep, lanes, w.value_columns);
  memset(w.grad_query_t, 0, w.key_columns * kQueryBlock * sizeof(float));
  const int64_t statistics = (batch * a.heads + q.head) * a.seqlen_q + q.first;
  for (int64_t i = 0; i < lanes; ++i) {
    w.lse[i] = INFINITY;
    w.lse_rest[i] = 0.0f;
    w.delta[i] = 0.0f;
    if (i >= q.count || args.lse[statistics + i] == -INFINITY) continue;
    const double lse = args.lse[statistics + i] * 1.4426950408889634;
    w.lse[i] = static_cast<float>(lse);
    w.lse_rest[i] = static_cast<float>(lse - w.lse[i]);
    w.delta[i] = dot(grad + i * grad_stride, output + i * args.output_strides[2], a.value_dim);
    if (args.grad_lse != nullptr) w.delta[i] -= args.grad_lse[statistics + i];
  }
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
FASTFORMER_INLINE void store_gradients(const Workspace<Pair>& w, int64_t key, int64_t lane, const Vec (&weights)[2],
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

// scores and dP become P and dS.
template <typename Unit>
void differentiate(const Attention& a, const Workspace<Unit>& w, const float* terms, const Band& band,
                   int64_t all_vecs) {
  const Vec factor = broadcast(score_factor(a));
  for (int64_t v = 0; v < all_vecs; ++v) {
    const int64_t lane = v * kLanes, all = band.all(v), reach = band.reach(v);
    const Vec lse = load(w.lse + lane), rest = load(w.lse_rest + lane), delta = load(w.delta + lane);
    for (int64_t j = 0; j < reach; j += 2) {
      Vec weights[2], grads[2];
#pragma GCC unroll 2
      for (int r = 0; r < 2; ++r) {
        const int64_t at = (j + r) * kQueryBlock + lane;
        const Vec score = load(w.scores + at);
        const Vec above =
            terms == nullptr ? fma(score, factor, zero() - lse) : fma(score, factor, load(terms + at)) - lse;
        Vec weight = exp2(min(zero(), above - rest));  // a weight is at most 1 whatever the rounding of huge scores
        if (j + r >= all) weight = select(first_n(band.hidden(v, j + r)), zero(), weight);
        weights[r] = weight;
        grads[r] = weight * (load(w.grad_scores + at) - delta);
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
  int64_t done = 0;
  for (int64_t v = 0; v < all_vecs; ++v) {
    const int64_t reach = band.reach(v), first = v * kLanes / kUnitDepth<Unit>;
    if (reach == done) continue;
    multiply<Unit, Layout::rows_by_depth, Store::accumulate>(
        weights + done * kRowUnits<Unit> + first, kRowUnits<Unit>, rows + first * columns, columns,
        sums + done * columns, columns, reach - done, columns, (all_vecs - v) * kLanes / kUnitDepth<Unit>);
    done = reach;
  }
}

void store_grad_mask(const AttentionBackward& args, int64_t batch, const QueryBlock& q, int64_t first_key,
                     const Band& band, const float* grad_scores, float* rows) {
  const Attention& a = args.inputs;
  transpose(grad_scores, kQueryBlock, rows, kKeyBlock, kKeyBlock, q.vecs() * kLanes);
  for (int64_t i = 0; i < q.count; ++i) {
    float* to = args.grad_mask + ((batch * a.heads + q.head) * a.seqlen_q + q.first + i) * a.seqlen_k + first_key;
    memcpy(to, rows + i * kKeyBlock, band.seen_by(i) * sizeof(float));
  }
}

template <typename T, typename Unit>
void store_grad_query(const AttentionBackward& args, int64_t batch, const QueryBlock& q, const Workspace<Unit>& w) {
  const Attention& a = args.inputs;
  transpose(w.grad_query_t, kQueryBlock, w.rows, w.key_columns, w.key_columns, q.vecs() * kLanes);
  for (int64_t i = 0; i < q.count; ++i) {
    T* to = static_cast<T*>(args.grad_query) + ((batch * a.seqlen_q + q.first + i) * a.heads + q.head) * a.head_dim;
    store_scaled(w.rows + i * w.key_columns, to, a.head_dim, a.scale);
  }
}

FASTFORMER_INLINE int64_t sum_rows(const Attention& a) { return round_up(a.seqlen_k, kKeyBlock); }

int64_t sums(const AttentionBackward& args) {
  return sum_rows(args.inputs) * (padded(args.inputs.head_dim) + padded(args.inputs.value_dim));
}

template <typename T, typename Unit>
void backward_part(const AttentionBackward& args, int64_t batch, int64_t kv_head, int64_t begin, int64_t end,
                   float* key_sums, void* scratch) {
  const Attention& a = args.inputs;
  Carver carver{static_cast<char*>(scratch)};
  const Workspace<Unit> w = carve_workspace<Unit>(a, carver);
  float* value_sums = key_sums + sum_rows(a) * w.key_columns;
  memset(key_sums, 0, sums(args) * sizeof(float));
  int64_t last_key = 0;
  for (int64_t block = begin; block < end; ++block) {
    last_key = larger(last_key, keys_seen(a, query_block(a, kv_head, block)));
  }
  pack_keys<T>(a, batch, kv_head, last_key, w);

  for (int64_t block = begin; block < end; ++block) {
    const QueryBlock q = query_block(a, kv_head, block);
    const int64_t vecs = q.vecs(), seen = keys_seen(a, q);
    pack_queries<T>(args, batch, q, w);
    for (int64_t first_key = 0; first_key < seen; first_key += kKeyBlock) {
      const Shown shown = shown_keys(a, batch, q, first_key, smaller(kKeyBlock, seen - first_key), kTileRows);
      if (shown.from >= shown.to) continue;
      const int64_t first = first_key + shown.from;
      const Band band{shown.to - shown.from, q.first + a.diagonal - first};
      multiply_keys(w.keys + first * w.key_units, w.key_units, w.queries_t, w.scores, depth_units<Unit>(a.head_dim),
                    band, vecs);
      multiply_keys(w.values + first * w.value_units, w.value_units, w.grads_t, w.grad_scores,
                    depth_units<Unit>(a.value_dim), band, vecs);
      if (!shown.plain) mask_terms(a, batch, q, first, band.keys, w.rows, w.terms);
      cap_scores(a, w.scores, band, vecs);
      differentiate(a, w, shown.plain ? nullptr : w.terms, band, vecs);
      if (args.grad_mask != nullptr) {
        store_grad_mask(args, batch, q, first, band, has_softcap(a) ? w.terms : w.grad_scores, w.rows);
      }
      multiply_queries(w.weights, w.grads_deep, value_sums + first * w.value_columns, w.value_columns, band, vecs);
      multiply_queries(w.grad_scores_rows, w.queries_deep, key_sums + first * w.key_columns, w.key_columns, band, vecs);
      multiply_values(w.keys_deep + first / kUnitDepth<Unit> * w.key_columns, w.key_columns, w.grad_scores_deep,
                      w.grad_query_t, a.head_dim, band, vecs);
    }
    store_grad_query<T>(args, batch, q, w);
  }
}

void part(const AttentionBackward& args, int64_t batch, int64_t kv_head, int64_t begin, int64_t end, float* sums,
          void* scratch) {
  visit(args.inputs.dtype,
        [&]<typename T>() { backward_part<T, UnitOf<T>>(args, batch, kv_head, begin, end, sums, scratch); });
}

// Adds the parts up in the first one, always in the same order, and stores rows [begin, end) of it.
template <typename T>
void finish_rows(float* sums, int64_t parts, int64_t part_stride, int64_t columns, T* to, int64_t to_stride,
                 int64_t width, int64_t begin, int64_t end, float factor) {
  for (int64_t i = begin * columns; i < end * columns; i += kLanes) {
    Vec sum = load(sums + i);
    for (int64_t p = 1; p < parts; ++p) sum = sum + load(sums + p * part_stride + i);
    store(sums + i, sum);
  }
  for (int64_t r = begin; r < end; ++r) store_scaled(sums + r * columns, to + r * to_stride, width, factor);
}

void finish(const AttentionBackward& args, int64_t batch, int64_t kv_head, int64_t begin, int64_t end, float* key_sums,
            int64_t parts) {
  const Attention& a = args.inputs;
  const int64_t row = batch * a.seqlen_k * a.kv_heads + kv_head, part_stride = sums(args);
  const int64_t key_columns = padded(a.head_dim), value_columns = padded(a.value_dim);
  visit(a.dtype, [&]<typename T>() {
    finish_rows(key_sums, parts, part_stride, key_columns, static_cast<T*>(args.grad_key) + row * a.head_dim,
                a.kv_heads * a.head_dim, a.head_dim, begin, end, a.scale);
    finish_rows(key_sums + sum_rows(a) * key_columns, parts, part_stride, value_columns,
                static_cast<T*>(args.grad_value) + row * a.value_dim, a.kv_heads * a.value_dim, a.value_dim, begin, end,
                1.0f);
  });
}

int64_t scratch(const AttentionBackward& args) {
  Carver carver{nullptr};
  visit(args.inputs.dtype, [&]<typename T>() { carve_workspace<UnitOf<T>>(args.inputs, carver); });
  return carver.used;
}

}  // namespace

const AttentionBackwardKernels attention_backward{scratch, sums, part, finish};

}  // namespace fastformer::FASTFORMER_LEVEL
