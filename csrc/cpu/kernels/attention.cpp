#include "attention.h"

#include "attention_block.h"

namespace fastformer::FASTFORMER_LEVEL {
namespace {

constexpr int64_t kKeyBlock = kMostKeys;

// A query block's state between blocks of keys.
template <typename Unit>
struct Running {
  Unit* queries_t;  // [head_dim][kQueryBlock]
  float* output_t;  // [value_dim][kQueryBlock], not yet divided by total
  float* peak;      // [kQueryBlock] largest score
  float* total;     // [kQueryBlock] sum of exp2(score - peak)
};

template <typename Unit>
struct Workspace {
  Unit* keys;      // [kKeyBlock][head_dim]
  Unit* values;    // [kKeyBlock][value_dim], in units along the keys
  float* scores;   // [kKeyBlock][kQueryBlock], and then the weights in units along the keys
  float* terms;    // [kKeyBlock][kQueryBlock] of the mask
  float* rows;     // rows before, or after, a transposition
  float* running;  // one Running for each query block
  int64_t key_units, value_units;
};

template <typename Unit>
Workspace<Unit> carve_workspace(const Attention& a, int64_t blocks, Carver& carver) {
  Workspace<Unit> w;
  w.key_units = padded(depth_units<Unit>(a.head_dim));
  w.value_units = padded(a.value_dim);
  w.keys = carver.take<Unit>(kKeyBlock * w.key_units);
  w.values = carver.take<Unit>(kKeyBlock / kUnitDepth<Unit> * w.value_units);
  w.scores = carver.take<float>(kKeyBlock * kQueryBlock);
  w.terms = carver.take<float>(a.mask_kind == MaskKind::none ? 0 : kKeyBlock * kQueryBlock);
  w.rows = carver.take<float>(kQueryBlock * larger(kKeyBlock, larger(w.key_units, w.value_units)));
  w.running = carver.take<float>(blocks * (w.key_units + w.value_units + 2) * kQueryBlock);
  return w;
}

template <typename Unit>
FASTFORMER_INLINE Running<Unit> running_at(const Workspace<Unit>& w, int64_t index) {
  float* base = w.running + index * (w.key_units + w.value_units + 2) * kQueryBlock;
  float* output_t = base + w.key_units * kQueryBlock;
  float* peak = output_t + w.value_units * kQueryBlock;
  return {reinterpret_cast<Unit*>(base), output_t, peak, peak + kQueryBlock};
}

// The largest score of each lane over the keys [0, reach). Scores become scale * score + term where there are terms,
// and -inf where the band hides them.
FASTFORMER_INLINE Vec mask_and_peak(float* scores, const float* terms, Vec scale, const Band& band, int64_t v) {
  const int64_t all = band.all(v) / kTileRows * kTileRows, reach = band.reach(v);
  Vec peak = broadcast(-INFINITY);
  for (int64_t j = 0; j < reach; j += kTileRows) {
    Vec tile = broadcast(-INFINITY);
#pragma GCC unroll 8
    for (int r = 0; r < kTileRows; ++r) {
      float* p = scores + (j + r) * kQueryBlock;
      Vec score = load(p);
      if (terms != nullptr) score = fma(score, scale, load(terms + (j + r) * kQueryBlock));
      if (j >= all) score = select(first_n(band.hidden(v, j + r)), broadcast(-INFINITY), score);
      if (terms != nullptr || j >= all) store(p, score);
      tile = max(tile, score);
    }
    peak = max(peak, tile);
  }
  return peak;
}

FASTFORMER_INLINE void store_weights(float* weights, int64_t key, Vec even, Vec odd) {
  store(weights + key * kQueryBlock, even);
  store(weights + (key + 1) * kQueryBlock, odd);
}
#if defined(__AVX512BF16__)
FASTFORMER_INLINE void store_weights(Pair* weights, int64_t key, Vec even, Vec odd) {
  store_pairs(weights + key / 2 * kQueryBlock, even, odd);
}
#endif

// weights = exp2(scale * score - shift) in place of the scores; returns each lane's sum. A pair of rows is read before
// it is overwritten.
template <typename Unit>
FASTFORMER_INLINE Vec exponentiate(const float* scores, Unit* weights, int64_t keys, Vec scale, Vec shift) {
  const Vec offset = zero() - shift;
  Vec sum = zero();
  for (int64_t j = 0; j < keys; j += kTileRows) {
    Vec tile[kTileRows];
#pragma GCC unroll 4
    for (int r = 0; r < kTileRows; r += 2) {
      tile[r] = exp2(fma(load(scores + (j + r) * kQueryBlock), scale, offset));
      tile[r + 1] = exp2(fma(load(scores + (j + r + 1) * kQueryBlock), scale, offset));
      store_weights(weights, j + r, tile[r], tile[r + 1]);
    }
#pragma GCC unroll 4
    for (int step = 1; step < kTileRows; step *= 2) {  // pairwise: few roundings
#pragma GCC unroll 4
      for (int r = 0; r < kTileRows; r += 2 * step) tile[r] = tile[r] + tile[r + step];
    }
    sum = sum + tile[0];
  }
  return sum;
}

// A shift above this is rounded by so much that factor * score - shift, whose product is not, may be far from 0 for the
// largest score: the products are then rounded first, as the shift was.
constexpr float kRoundingShift = 1e6f;

// Turns the scores of a block into weights, and brings what was summed so far to the new peak.
template <typename Unit>
void online_softmax(const Workspace<Unit>& w, const Running<Unit>& r, const float* terms, float score_factor,
                    int64_t value_dim, const Band& band, int64_t all_vecs) {
  for (int64_t v = 0; v < all_vecs; ++v) {
    const int64_t lane = v * kLanes, reach = band.reach(v);
    if (reach == 0) continue;
    const Vec factor = broadcast(score_factor);
    const Vec found = mask_and_peak(w.scores + lane, terms == nullptr ? nullptr : terms + lane, factor, band, v);
    Vec rest = terms == nullptr ? factor : broadcast(1.0f);  // of the factor, still to be applied
    const Vec old_peak = load(r.peak + lane), peak = max(old_peak, found * rest);
    const Vec shift = select(less(peak, broadcast(-FLT_MAX)), zero(), peak);  // -inf: nothing was visible yet
    if (terms == nullptr && reduce_max(max(abs(shift), zero())) > kRoundingShift) {
      for (int64_t j = 0; j < reach; ++j) {
        float* p = w.scores + j * kQueryBlock + lane;
        store(p, load(p) * factor);
      }
      rest = broadcast(1.0f);
    }
    const Vec fade = exp2(old_peak - shift);
    const Vec sum = exponentiate(w.scores + lane, reinterpret_cast<Unit*>(w.scores) + lane, reach, rest, shift);
    store(r.peak + lane, peak);
    store(r.total + lane, fma(load(r.total + lane), fade, sum));
    if (reduce_max(max(broadcast(1.0f) - fade, zero())) > 0.0f) {  // 0 for a lane of NaN, which would hide the others
      for (int64_t d = 0; d < value_dim; ++d) {
        float* p = r.output_t + d * kQueryBlock + lane;
        store(p, load(p) * fade);
      }
    }
  }
}

template <typename T, typename Unit>
void finish_block(const AttentionForward& args, int64_t batch, const QueryBlock& q, const Running<Unit>& r,
                  const Workspace<Unit>& w) {
  const Attention& a = args.inputs;
  for (int64_t v = 0; v < q.vecs(); ++v) {
    const Vec total = load(r.total + v * kLanes);
    const Vec divisor = max(broadcast(FLT_MIN), total);  // a total of 0, of an output of 0, becomes a number
    for (int64_t d = 0; d < a.value_dim; ++d) {
      float* p = r.output_t + d * kQueryBlock + v * kLanes;
      store(p, load(p) / divisor);
    }
  }
  transpose(r.output_t, kQueryBlock, w.rows, w.value_units, w.value_units, q.vecs() * kLanes);
  for (int64_t i = 0; i < q.count; ++i) {
    T* to = static_cast<T*>(args.output) + ((batch * a.seqlen_q + q.first + i) * a.heads + q.head) * a.value_dim;
    store_scaled(w.rows + i * w.value_units, to, a.value_dim, 1.0f);
    args.lse[(batch * a.heads + q.head) * a.seqlen_q + q.first + i] = natural_lse(r.peak[i], r.total[i]);
  }
}

template <typename T, typename Unit>
void pack_key_block(const Attention& a, int64_t batch, int64_t kv_head, int64_t first_key, int64_t keys,
                    const Workspace<Unit>& w) {
  const int64_t rows = round_up(keys, kTileRows);
  const T* key = static_cast<const T*>(a.key) + row_offset(a.key_strides, batch, kv_head, first_key);
  const T* value = static_cast<const T*>(a.value) + row_offset(a.value_strides, batch, kv_head, first_key);
  pack_rows(key, a.key_strides[2], keys, a.head_dim, w.keys, rows, w.key_units);
  pack_depth_rows(value, a.value_strides[2], keys, a.value_dim, w.values, rows, w.value_units);
}

template <typename T, typename Unit>
void forward_blocks(const AttentionForward& args, int64_t batch, int64_t kv_head, int64_t begin, int64_t end,
                    void* scratch) {
  const Attention& a = args.inputs;
  Carver carver{static_cast<char*>(scratch)};
  const Workspace<Unit> w = carve_workspace<Unit>(a, end - begin, carver);

  int64_t last_key = 0;
  for (int64_t block = begin; block < end; ++block) {
    const QueryBlock q = query_block(a, kv_head, block);
    const Running<Unit> r = running_at(w, block - begin);
    const T* query = static_cast<const T*>(a.query) + row_offset(a.query_strides, batch, q.head, q.first);
    pack_transposed(query, a.query_strides[2], q.count, a.head_dim, reinterpret_cast<Unit*>(w.rows), r.queries_t);
    memset(r.output_t, 0, w.value_units * kQueryBlock * sizeof(float));
    for (int64_t i = 0; i < kQueryBlock; ++i) {
      r.peak[i] = -INFINITY;
      r.total[i] = 0.0f;
    }
    last_key = larger(last_key, keys_seen(a, q));
  }

  for (int64_t first_key = 0; first_key < last_key; first_key += kKeyBlock) {
    const int64_t keys = smaller(kKeyBlock, last_key - first_key);
    bool packed = false;
    for (int64_t block = begin; block < end; ++block) {
      const QueryBlock q = query_block(a, kv_head, block);
      if (keys_seen(a, q) <= first_key) continue;
      // Of the keys that this block sees: how many more its neighbours see depends on the number of threads.
      const Shown shown = shown_keys(a, batch, q, first_key, smaller(keys, keys_seen(a, q) - first_key), kTileRows);
      if (shown.from >= shown.to) continue;
      if (!packed) pack_key_block<T>(a, batch, kv_head, first_key, keys, w);
      packed = true;
      const Running<Unit> r = running_at(w, block - begin);
      const int64_t first = first_key + shown.from;
      const Band band{shown.to - shown.from, q.first + a.diagonal - first};
      multiply_keys(w.keys + shown.from * w.key_units, w.key_units, r.queries_t, w.scores,
                    depth_units<Unit>(a.head_dim), band, q.vecs());
      if (!shown.plain) mask_terms(a, batch, q, first, band.keys, w.rows, w.terms);
      cap_scores(a, w.scores, band, q.vecs());
      online_softmax(w, r, shown.plain ? nullptr : w.terms, score_factor(a), a.value_dim, band, q.vecs());
      multiply_values(w.values + shown.from / kUnitDepth<Unit> * w.value_units, w.value_units,
                      reinterpret_cast<const Unit*>(w.scores), r.output_t, a.value_dim, band, q.vecs());
    }
  }

  for (int64_t block = begin; block < end; ++block) {
    finish_block<T>(args, batch, query_block(a, kv_head, block), running_at(w, block - begin), w);
  }
}

void forward(const AttentionForward& args, int64_t batch, int64_t kv_head, int64_t begin, int64_t end, void* scratch) {
  visit(args.inputs.dtype,
        [&]<typename T>() { forward_blocks<T, UnitOf<T>>(args, batch, kv_head, begin, end, scratch); });
}

int64_t forward_scratch(const AttentionForward& args, int64_t blocks) {
  Carver carver{nullptr};
  visit(args.inputs.dtype, [&]<typename T>() { carve_workspace<UnitOf<T>>(args.inputs, blocks, carver); });
  return carver.used;
}

}  // namespace

const AttentionKernels attention{forward_scratch, forward};

}  // namespace fastformer::FASTFORMER_LEVEL
