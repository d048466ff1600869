#include "attention.h"

#include "attention_scores.h"
#include "exponentials.h"
#include "philox.h"

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
  float* terms;    // [kKeyBlock][kQueryBlock] of masks and ALiBi
  float* factors;  // [kKeyBlock][kQueryBlock] of dropout; null without it
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
  w.terms = carver.take<float>(has_terms(a) ? kKeyBlock * kQueryBlock : 0);
  w.factors = has_dropout(a) ? carver.take<float>(kKeyBlock * kQueryBlock) : nullptr;
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

// The largest score of each lane of register v. Scores become scale * score + term where there are terms, and -inf
// where the band hides them.
FASTFORMER_INLINE Vec mask_and_peak(float* scores, const float* terms, Vec scale, const Band& band, int64_t v) {
  const int64_t all_from = band.all_from(v), all_to = band.all_to(v);
  Vec peak = broadcast(-INFINITY);
  for (int64_t j = band.from(v); j < band.to(v); j += kTileRows) {
    const bool partial = j < all_from || j + kTileRows > all_to;
    Vec tile = broadcast(-INFINITY);
#pragma GCC unroll 8
    for (int r = 0; r < kTileRows; ++r) {
      float* p = scores + (j + r) * kQueryBlock;
      Vec score = load(p);
      if (terms != nullptr) score = fma(score, scale, load(terms + (j + r) * kQueryBlock));
      if (partial) score = where_seen(band, v, j + r, score, broadcast(-INFINITY));
      if (terms != nullptr || partial) store(p, score);
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
FASTFORMER_INLINE void store_weights(Bf16Pair* weights, int64_t key, Vec even, Vec odd) {
  store_pairs(weights + key / 2 * kQueryBlock, even, odd);
}
#endif

// Weights come as units, and their sum as floats.
template <typename Unit>
FASTFORMER_INLINE Vec weight_at(Vec x) {
  return __is_same(Unit, float) ? exp2(x) : exp2_for_sum(x);
}

// weights = 2^(scale * score - shift) in place of the scores of keys [from, to), times dropout's factors if there are
// any; returns each lane's sum, of what dropout drops too. A pair of rows is read before it is overwritten.
template <typename Unit>
FASTFORMER_INLINE Vec exponentiate(const float* scores, Unit* weights, const float* factors, int64_t from, int64_t to,
                                   Vec scale, Vec shift) {
  const Vec offset = zero() - shift;
  Vec sum = zero();
  for (int64_t j = from; j < to; j += kTileRows) {
    Vec tile[kTileRows];
#pragma GCC unroll 4
    for (int r = 0; r < kTileRows; r += 2) {
      tile[r] = weight_at<Unit>(fma(load(scores + (j + r) * kQueryBlock), scale, offset));
      tile[r + 1] = weight_at<Unit>(fma(load(scores + (j + r + 1) * kQueryBlock), scale, offset));
      if (factors == nullptr) {
        store_weights(weights, j + r, tile[r], tile[r + 1]);
      } else {
        const float* f = factors + (j + r) * kQueryBlock;
        store_weights(weights, j + r, tile[r] * load(f), tile[r + 1] * load(f + kQueryBlock));
      }
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

// What is taken from scores of that peak; 0 for -inf, where nothing was visible yet.
FASTFORMER_INLINE Vec finite_shift(Vec peak) { return select(less(peak, broadcast(-FLT_MAX)), zero(), peak); }

// A shift above this is rounded by so much that factor * score - shift, whose product is not, may be far from 0 for the
// largest score: the products are then rounded first, as the shift was.
constexpr float kRoundingShift = 1e6f;

// Turns the scores of a block into weights, and brings what was summed so far to the new peak.
template <typename Unit>
void online_softmax(const Workspace<Unit>& w, const Running<Unit>& r, const float* terms, float score_factor,
                    int64_t value_dim, const Band& band, int64_t all_vecs) {
  for (int64_t v = 0; v < all_vecs; ++v) {
    const int64_t lane = v * kLanes, from = band.from(v), to = band.to(v);
    if (from >= to) continue;
    const Vec factor = broadcast(score_factor);
    const Vec found = mask_and_peak(w.scores + lane, terms == nullptr ? nullptr : terms + lane, factor, band, v);
    Vec rest = terms == nullptr ? factor : broadcast(1.0f);  // of the factor, still to be applied
    const Vec old_peak = load(r.peak + lane), peak = max(old_peak, found * rest);
    const Vec shift = finite_shift(peak);
    if (terms == nullptr && reduce_max(max(abs(shift), zero())) > kRoundingShift) {
      for (int64_t j = from; j < to; ++j) {
        float* p = w.scores + j * kQueryBlock + lane;
        store(p, load(p) * factor);
      }
      rest = broadcast(1.0f);
    }
    const Vec fade = exp2(old_peak - shift);
    Unit* weights = reinterpret_cast<Unit*>(w.scores) + lane;
    const Vec sum = w.factors == nullptr
                        ? exponentiate(w.scores + lane, weights, nullptr, from, to, rest, shift)
                        : exponentiate(w.scores + lane, weights, w.factors + lane, from, to, rest, shift);
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

// Takes in a sink, which has a weight but no value; returns what that leaves of the output.
template <typename Unit>
FASTFORMER_INLINE Vec add_sink(const Sink& sink, const Running<Unit>& r, int64_t lane) {
  const Vec old_peak = load(r.peak + lane), peak = max(broadcast(sink.score), old_peak);
  const Vec shift = finite_shift(peak), fade = exp2(old_peak - shift);
  const Vec weight = exp2(broadcast(sink.score) - shift + broadcast(sink.rest));
  store(r.peak + lane, peak);
  store(r.total + lane, fma(load(r.total + lane), fade, weight));
  return fade;
}

template <typename T, typename Unit>
void finish_block(const AttentionForward& args, const Sequence& s, const QueryBlock& q, const Running<Unit>& r,
                  const Workspace<Unit>& w) {
  const Attention& a = args.inputs;
  for (int64_t v = 0; v < q.vecs(); ++v) {
    const Vec fade = a.sinks == nullptr ? broadcast(1.0f) : add_sink(sink_of(a, q.head), r, v * kLanes);
    const Vec total = load(r.total + v * kLanes);
    const Vec factor = fade / max(broadcast(FLT_MIN), total);  // a total of 0, of an output of 0, becomes a number
    for (int64_t d = 0; d < a.value_dim; ++d) {
      float* p = r.output_t + d * kQueryBlock + v * kLanes;
      store(p, load(p) * factor);
    }
  }
  transpose(r.output_t, kQueryBlock, w.rows, w.value_units, w.value_units, q.vecs() * kLanes);
  for (int64_t i = 0; i < q.count; ++i) {
    T* to = static_cast<T*>(args.output) + output_row(a, s, q.head, q.first + i) * a.value_dim;
    store_scaled(w.rows + i * w.value_units, to, a.value_dim, 1.0f);
    args.lse[lse_at(a, s, q.head, q.first + i)] = natural_lse(r.peak[i], r.total[i]);
  }
}

template <typename T>
FASTFORMER_INLINE void prefetch_rows(const T* from, int64_t stride, int64_t rows, int64_t width) {
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t i = 0; i < width; i += 64 / sizeof(T)) __builtin_prefetch(from + r * stride + i);
  }
}

// Keys and values [first, end) into rows of the workspace from first - first_key on, and zeros after them. Some rows
// are packed while the next are fetched: with a window of 256 bfloat16 keys, where few queries share the packing of a
// key, that took 8% off the whole on a Zen 4.
template <typename T, typename Unit>
void pack_key_block(const Attention& a, const Sequence& s, int64_t kv_head, int64_t first_key, int64_t first,
                    int64_t end, const Workspace<Unit>& w) {
  constexpr int64_t kRows = 16;  // a multiple of kTileRows
  const int64_t key_stride = a.key_strides[2], value_stride = a.value_strides[2];
  for_key_runs(a, first, end - first, [&](int64_t run_begin, int64_t run) FASTFORMER_LAMBDA {
    const T* key = static_cast<const T*>(a.key) + key_offset(a, a.key_strides, s, kv_head, run_begin);
    const T* value = static_cast<const T*>(a.value) + key_offset(a, a.value_strides, s, kv_head, run_begin);
    for (int64_t i = 0; i < run; i += kRows, key += kRows * key_stride, value += kRows * value_stride) {
      const int64_t at = run_begin + i - first_key, rows = smaller(kRows, run - i);
      prefetch_rows(key + kRows * key_stride, key_stride, kRows, a.head_dim);
      prefetch_rows(value + kRows * value_stride, value_stride, kRows, a.value_dim);
      pack_rows(key, key_stride, rows, a.head_dim, w.keys + at * w.key_units, round_up(rows, kTileRows), w.key_units);
      pack_depth_rows(value, value_stride, rows, a.value_dim, w.values + at / kUnitDepth<Unit> * w.value_units,
                      round_up(rows, kTileRows), w.value_units);
    }
  });
}

// One block of queries against those of the keys from `first` on that a mask shows; they are packed from first_key on.
template <typename Unit>
void attend_to_keys(const Attention& a, const Sequence& s, const QueryBlock& q, int64_t first_key, int64_t first,
                    const Shown& shown, const Running<Unit>& r, const Workspace<Unit>& w) {
  first += shown.from;
  const Band band = band_at(a, s, q, first, shown.to - shown.from);
  const int64_t at = first - first_key;
  multiply_keys(w.keys + at * w.key_units, w.key_units, r.queries_t, w.scores, depth_units<Unit>(a.head_dim), band,
                q.vecs());
  const float* terms = fill_terms(a, s, q, first, band.keys, shown.plain, w.rows, w.terms);
  cap_scores(a, w.scores, band, q.vecs());
  if (has_dropout(a)) dropout_factors(a, s, q, first, round_up(band.keys, kTileRows), w.factors);
  online_softmax(w, r, terms, score_factor(a), a.value_dim, band, q.vecs());
  multiply_values(w.values + at / kUnitDepth<Unit> * w.value_units, w.value_units,
                  reinterpret_cast<const Unit*>(w.scores), r.output_t, a.value_dim, band, q.vecs());
}

template <typename T, typename Unit>
void forward_blocks(const AttentionForward& args, const Sequence& s, int64_t kv_head, int64_t begin, int64_t end,
                    void* scratch) {
  const Attention& a = args.inputs;
  Carver carver{static_cast<char*>(scratch)};
  const Workspace<Unit> w = carve_workspace<Unit>(a, end - begin, carver);

  KeyRange all{s.keys, 0};
  for (int64_t block = begin; block < end; ++block) {
    const QueryBlock q = query_block(a, s, kv_head, block);
    const Running<Unit> r = running_at(w, block - begin);
    const T* query = static_cast<const T*>(a.query) + query_offset(a.query_strides, s, q.head, q.first);
    pack_transposed(query, a.query_strides[2], q.count, a.head_dim, reinterpret_cast<Unit*>(w.rows), r.queries_t);
    memset(r.output_t, 0, w.value_units * kQueryBlock * sizeof(float));
    for (int64_t i = 0; i < kQueryBlock; ++i) {
      r.peak[i] = -INFINITY;
      r.total[i] = 0.0f;
    }
    const KeyRange seen = keys_seen(a, s, q);
    if (seen.begin < seen.end) all = {smaller(all.begin, seen.begin), larger(all.end, seen.end)};
  }

  // Blocks of keys begin at multiples of kKeyBlock, and a block of queries takes of them what it sees itself: which
  // queries it shares packed keys with depends on the number of threads, and must change nothing.
  const auto tile_begin = [](int64_t key) { return key / kTileRows * kTileRows; };
  for (int64_t first_key = all.begin / kKeyBlock * kKeyBlock; first_key < all.end; first_key += kKeyBlock) {
    const int64_t last_key = smaller(first_key + kKeyBlock, all.end);
    bool packed = false;
    for (int64_t block = begin; block < end; ++block) {
      const QueryBlock q = query_block(a, s, kv_head, block);
      const KeyRange seen = keys_seen(a, s, q);
      const int64_t first = larger(first_key, tile_begin(seen.begin)), last = smaller(last_key, seen.end);
      if (first >= last) continue;
      const Shown shown = shown_keys(a, s, q, first, last - first, kTileRows);
      if (shown.from >= shown.to) continue;
      if (!packed) {
        pack_key_block<T>(a, s, kv_head, first_key, larger(first_key, tile_begin(all.begin)), last_key, w);
        packed = true;
      }
      attend_to_keys(a, s, q, first_key, first, shown, running_at(w, block - begin), w);
    }
  }

  for (int64_t block = begin; block < end; ++block) {
    finish_block<T>(args, s, query_block(a, s, kv_head, block), running_at(w, block - begin), w);
  }
}

void forward(const AttentionForward& args, const Sequence& s, int64_t kv_head, int64_t begin, int64_t end,
             void* scratch) {
  visit(args.inputs.dtype, [&]<typename T>() { forward_blocks<T, UnitOf<T>>(args, s, kv_head, begin, end, scratch); });
}

int64_t forward_scratch(const AttentionForward& args, int64_t blocks) {
  Carver carver{nullptr};
  visit(args.inputs.dtype, [&]<typename T>() { carve_workspace<UnitOf<T>>(args.inputs, blocks, carver); });
  return carver.used;
}

}  // namespace

const AttentionKernels attention{forward_scratch, forward};

}  // namespace fastformer::FASTFORMER_LEVEL
