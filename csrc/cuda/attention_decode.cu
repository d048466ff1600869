// Attention of a few queries over many keys, as in decoding: the keys are split among blocks, and then combined.
//
// Flash-decoding (https://pytorch.org/blog/flash-decoding): reading the keys is what takes the time, so a block takes
// all the queries of all the query heads that share a key head as its rows, and one part of the keys. What parts leave
// is combined by a second kernel (attention_combine.cuh); with one part, one kernel does it all.
//
// A sequence has Sq * H / G rows for each key head, row = query * (H / G) + head within the group. Legend of shapes:
// attention.cuh.

#include "attention_combine.cuh"
#include "attention_decode.cuh"

namespace fastformer::cuda {
namespace {

constexpr int kDecodeWarps = 4, kDecodeThreads = kDecodeWarps * kWarp;

// What a block has in shared memory: a tile of queries; for each warp a ring of kStages tiles of keys and as many of
// values, in which it leaves its output at the end; peaks and totals of each warp's rows. Three of the ring's four
// tiles, 12 KB at width 128, are under way while a warp works on the fourth: 96 KB of two blocks on a multiprocessor.
// 30 KB would do for 4 TB/s, of memory that answers after a microsecond, shared out among 132.
//
// width  keys  stages  shared memory with 16 rows  with 32
//    64    32       2        66.5 KB                69 KB
//    96    16       2        51.5 KB                55 KB
//   128    16       2        68.5 KB                73 KB
//   256    16       1        72.5 KB                        (whose output would take all the registers)
template <typename T, int kWidth, int kRowTiles>
struct DecodeTile {
  static constexpr int kRows = 16 * kRowTiles;
  static constexpr int kKeys = kWidth <= 64 ? 32 : 16, kStages = kWidth <= 128 ? 2 : 1;
  using QueryTile = SharedTile<T, kRows, kWidth>;
  using KeyTile = SharedTile<T, kKeys, kWidth>;
  static constexpr int kRing = 2 * kStages * KeyTile::kElements, kStatistics = kDecodeWarps * kRows;
  static constexpr int kSharedBytes =
      (QueryTile::kElements + kDecodeWarps * kRing) * sizeof(T) + 2 * kStatistics * sizeof(float);
  static_assert(kSharedBytes <= 99 * 1024 && kRows * kWidth * sizeof(float) <= kRing * sizeof(T));

  T* base = shared_memory<T>();

  FASTFORMER_DEVICE QueryTile query() const { return {base}; }
  FASTFORMER_DEVICE T* ring(int warp) const { return base + QueryTile::kElements + warp * kRing; }
  FASTFORMER_DEVICE KeyTile key(int warp, int stage) const { return {ring(warp) + 2 * stage * KeyTile::kElements}; }
  FASTFORMER_DEVICE KeyTile value(int warp, int stage) const { return {key(warp, stage).data + KeyTile::kElements}; }
  // 8 neighbours, of which `column` is the first. They change places with others of their row, by its number, so that
  // the lanes of a warp write an accumulator to different banks.
  FASTFORMER_DEVICE float* output(int warp, int row, int column) const {
    return reinterpret_cast<float*>(ring(warp)) + row * kWidth + (column ^ row % 4 * 8);
  }
  FASTFORMER_DEVICE float* peak(int warp, int row) const {
    return reinterpret_cast<float*>(ring(kDecodeWarps)) + warp * kRows + row;
  }
  FASTFORMER_DEVICE float* total(int warp, int row) const { return peak(warp, row) + kStatistics; }
};

// Of a block that may have any number of rows to itself.
template <int kWidth>
constexpr int kManyRowTiles = kWidth <= 128 ? 2 : 1;

// What a block has to do: neighbours read the same keys.
struct DecodePlace {
  int row_tile, part, kv_head, sequence;
};

FASTFORMER_DEVICE DecodePlace decode_place(const Attention& a, const DecodeResults& results) {
  const int block = blockIdx.x, head_part = block / results.row_tiles, head = head_part / results.parts;
  return {block % results.row_tiles, head_part % results.parts, head % a.kv_heads, head / a.kv_heads};
}

struct DecodeRow {
  int query, head;
};

FASTFORMER_DEVICE DecodeRow decode_row(const Attention& a, int kv_head, int row) {
  const int group = a.heads / a.kv_heads;
  return {row / group, kv_head * group + row % group};
}

// Begins to copy the keys, or values, from first_key on, a multiple of the tile's, to a tile of the calling warp. As
// copy_async, but with one look at the table for the keys of a page, and nothing decided for each row: addresses of
// those that don't exist are computed too, but not read.
template <typename Tile, typename T>
FASTFORMER_DEVICE void copy_keys(const Tile& tile, int columns, const KeyRows<T>& keys, int first_key) {
  constexpr int kOnOnePage = 16;  // keys: the shortest pages
  const int lane = lane_of();
#pragma unroll
  for (int first = 0; first < Tile::kRows; first += kOnOnePage) {
    const int count = keys.rows.count - first_key - first;
    const T* from = count > 0 ? keys(first_key + first) : keys.rows.first;
#pragma unroll 4  // all addresses at once would take more registers than there are
    for (int i = 0; i < kOnOnePage * Tile::kChunks; i += kWarp) {
      const int row = (i + lane) / Tile::kChunks, column = (i + lane) % Tile::kChunks * kChunk;
      ptx::cp_async<16>(tile.at(first + row, column), from + row * keys.rows.stride + column,
                        row < count && column < columns);
    }
  }
}

// The rows that a lane has scores of, i * 16 + lane / 4 and 8 further.
template <int kRowTiles>
struct LaneRows {
  struct Row {
    int query;
    Biases biases;
  };
  Row rows[kRowTiles][2];

  // Calls f(score, row, key).
  template <int kColumnTiles, typename F>
  FASTFORMER_DEVICE void for_each(Accumulator<kRowTiles, kColumnTiles>& scores, int first_key, F f) const {
#pragma unroll
    for (int i = 0; i < kRowTiles; ++i) {
#pragma unroll
      for (int j = 0; j < kColumnTiles; ++j) {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          f(scores.values[i][j][e], rows[i][e / 2], first_key + j * 8 + lane_of() % 4 * 2 + e % 2);
        }
      }
    }
  }
};

// add_biases and hide of attention_scores.cuh, for rows of several heads.
template <Scores kScores, int kRowTiles, int kColumnTiles>
FASTFORMER_DEVICE float bias_and_hide(const Attention& a, const Sequence& s, const LaneRows<kRowTiles>& rows,
                                      float factor, bool edge, int first_key,
                                      Accumulator<kRowTiles, kColumnTiles>& scores) {
  using Row = typename LaneRows<kRowTiles>::Row;
  const auto in_mask = [&](const Row& row, int key) { return row.query < s.queries && key < s.keys; };
  if (has_biases<kScores>(a)) {
    rows.for_each(scores, first_key, [&](float& x, const Row& row, int key) {
      const float distance = fabsf(static_cast<float>(row.query + s.offset - key));
      x = fmaf(-row.biases.slope, distance, x * factor);
      if (a.mask_kind == MaskKind::additive && in_mask(row, key)) {
        x += additive_mask(a, mask_offset(a, row.biases, row.query, key));
      }
    });
    factor = 1.0f;
  }
  if (edge) {
    rows.for_each(scores, first_key, [&](float& x, const Row& row, int key) {
      if (!sees(a, s, row.query, key)) x = -INFINITY;
    });
  }
  if (kScores == Scores::any && a.mask_kind == MaskKind::boolean) {
    const uint8_t* mask = static_cast<const uint8_t*>(a.mask);
    rows.for_each(scores, first_key, [&](float& x, const Row& row, int key) {
      if (in_mask(row, key) && mask[mask_offset(a, row.biases, row.query, key)] == 0) x = -INFINITY;
    });
  }
  return factor;
}

// Packed rows that belong to no sequence, which come last: the blocks of the last sequence share them.
template <typename T>
FASTFORMER_DEVICE void clear_unclaimed(const Attention& a, const Sequence& s, const DecodeResults& results,
                                       const DecodePlace& place) {
  const int first = s.first_query + s.queries, packs = a.value_dim / kChunk;
  const int64_t step = int64_t{results.row_tiles} * kDecodeThreads;
  const int64_t count = static_cast<int64_t>(a.query_rows - first) * (a.heads / a.kv_heads) * packs;
  for (int64_t i = int64_t{place.row_tile} * kDecodeThreads + threadIdx.x; i < count; i += step) {
    const DecodeRow row = decode_row(a, place.kv_head, static_cast<int>(i / packs));
    const int column = static_cast<int>(i % packs) * kChunk, query = first + row.query;
    store(output_row<T>(results, s.query_entry, row.head, query) + column, Pack<T, kChunk>{});
    if (column == 0) results.lse[static_cast<int64_t>(row.head) * a.query_rows + query] = -INFINITY;
  }
}

// A warp's output, peaks and totals go to shared memory; the lanes' totals are added up.
template <typename Shared, int kRowTiles, int kColumnTiles>
FASTFORMER_DEVICE void leave_rows(const Shared& shared, int warp, const Accumulator<kRowTiles, kColumnTiles>& output,
                                  const RowValues<kRowTiles>& peak, RowValues<kRowTiles> total) {
  const int lane = lane_of();
  reduce_lanes(total, [](float x, float y) { return x + y; });
#pragma unroll
  for (int i = 0; i < kRowTiles; ++i) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = i * 16 + half * 8 + lane / 4;
      if (lane % 4 == 0) {
        *shared.peak(warp, row) = peak.values[i][half];
        *shared.total(warp, row) = total.values[i][half];
      }
#pragma unroll
      for (int j = 0; j < kColumnTiles; ++j) {
        const float (&x)[4] = output.values[i][j];
        store(shared.output(warp, row, j * 8) + lane % 4 * 2, Pack<float, 2>{x[2 * half], x[2 * half + 1]});
      }
    }
  }
}

// What the warps left becomes one, in their order: the output, or that of the part.
template <typename T, int kWidth, typename Shared>
FASTFORMER_DEVICE void merge_warps(const Attention& a, const Sequence& s, const DecodeResults& results,
                                   const DecodePlace& place, const Shared& shared) {
  constexpr int kPacks = kWidth / kChunk;
  const float factor = score_factor(a);
  for (int index = threadIdx.x; index < Shared::kRows * kPacks; index += kDecodeThreads) {
    const int i = index / kPacks, column = index % kPacks * kChunk;
    const DecodeRow row = decode_row(a, place.kv_head, place.row_tile * Shared::kRows + i);
    if (row.query >= s.queries || column >= a.value_dim) continue;
    float peak = -INFINITY, total = 0.0f, sums[kChunk] = {};
#pragma unroll
    for (int warp = 0; warp < kDecodeWarps; ++warp) peak = fmaxf(peak, *shared.peak(warp, i));
#pragma unroll
    for (int warp = 0; warp < kDecodeWarps; ++warp) {
      const float weight = ptx::ex2((*shared.peak(warp, i) - finite(peak)) * (factor * kLog2e));
      float values[kChunk];
      load_floats<true>(values, shared.output(warp, i, column));
#pragma unroll
      for (int e = 0; e < kChunk; ++e) sums[e] += weight * values[e];
      total += weight * *shared.total(warp, i);
    }
    const int64_t statistic = first_statistic(a, s, row.head) + row.query;
    if (results.partial_outputs != nullptr) {
      const int64_t at = place.part * results.count + statistic;
      if (total != 0.0f) store_floats<true>(results.partial_outputs + at * a.value_dim + column, sums);
      if (column == 0) {
        results.partial_peaks[at] = peak;
        results.partial_totals[at] = total;
      }
    } else {
      const RowEnd end = end_row(a, row.head, peak * factor, total);
#pragma unroll
      for (int e = 0; e < kChunk; ++e) sums[e] *= end.multiplier;
      store_floats<true>(output_row<T>(results, s.query_entry, row.head, s.first_query + row.query) + column, sums);
      if (column == 0) results.lse[statistic] = end.lse;
    }
  }
}

// One block: a tile of rows, and one part of their keys. Each of its warps has every fourth tile of keys to itself,
// with copies and a softmax of its own, and waits for no other until the end.
template <typename T, int kWidth, Scores kScores, int kRowTiles>
__global__ void __launch_bounds__(kDecodeThreads)
    attention_decode_kernel(const __grid_constant__ Attention a, const __grid_constant__ DecodeResults results) {
  using Shared = DecodeTile<T, kWidth, kRowTiles>;
  constexpr int kRows = Shared::kRows, kKeys = Shared::kKeys, kStages = Shared::kStages;
  const Shared shared;
  const int warp = threadIdx.x / kWarp, lane = lane_of();
  const DecodePlace place = decode_place(a, results);
  const Sequence s = sequence_at(a, place.sequence);
  if (a.cu_seqlens_q != nullptr && results.partial_outputs == nullptr && s.index == results.sequences - 1) {
    clear_unclaimed<T>(a, s, results, place);
  }
  const auto row_at = [&](int i) { return decode_row(a, place.kv_head, place.row_tile * kRows + i); };
  const int first_query = row_at(0).query, last_query = row_at(kRows - 1).query;
  if (first_query >= s.queries) return;

  // The tiles that any of the rows sees, and of them this part: it depends on this sequence alone.
  const TileRange range = key_tiles<kKeys>(a, s, first_query, last_query - first_query + 1);
  const int part_tiles = tiles_up_to(range.end - range.begin, results.parts);
  const int begin = range.begin + place.part * part_tiles, end = min(begin + part_tiles, range.end);

  copy_async<kDecodeThreads>(shared.query(), a.head_dim, [&](int i) {
    const DecodeRow row = row_at(i);
    return query_rows<T>(a, s, row.head)(row.query);
  });
  ptx::cp_async_commit();
  const KeyRows<T> keys = key_rows<T>(a, s, place.kv_head, a.key, a.key_strides);
  const KeyRows<T> values = key_rows<T>(a, s, place.kv_head, a.value, a.value_strides);
  const auto fetch_keys = [&](int tile, int stage) {
    if (tile < end) copy_keys(shared.key(warp, stage), a.head_dim, keys, tile * kKeys);
    ptx::cp_async_commit();
  };
  const auto fetch_values = [&](int tile, int stage) {
    if (tile < end) copy_keys(shared.value(warp, stage), a.value_dim, values, tile * kKeys);
    ptx::cp_async_commit();
  };
#pragma unroll
  for (int stage = 0; stage < kStages; ++stage) {
    fetch_keys(begin + warp + stage * kDecodeWarps, stage);
    fetch_values(begin + warp + stage * kDecodeWarps, stage);
  }

  LaneRows<kRowTiles> rows;
  DropoutRow drawn[kRowTiles];
#pragma unroll
  for (int i = 0; i < kRowTiles; ++i) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const DecodeRow row = row_at(i * 16 + half * 8 + lane / 4);
      rows.rows[i][half] = {row.query, Biases(a, s, row.head)};
    }
    const DecodeRow row = row_at(i * 16 + lane % 16);
    drawn[i] = {static_cast<uint32_t>(row.query), static_cast<uint32_t>(s.index * a.heads + row.head)};
  }
  Accumulator<kRowTiles, kWidth / 8> output;  // sum of weights * value so far
  RowValues<kRowTiles> peak, total;           // see softmax_step
  output.fill(0.0f);
  peak.fill(-INFINITY);
  total.fill(0.0f);

  // Groups of copies, of one tile each, that may be under way when the oldest tile is wanted.
  constexpr int kUnderWay = 2 * kStages - 1;
  ptx::cp_async_wait<kUnderWay + 1>();
  __syncthreads();  // the queries are there
  int stage = 0;
  for (int tile = begin + warp; tile < end; tile += kDecodeWarps) {
    Accumulator<kRowTiles, kKeys / 8> scores;
    scores.fill(0.0f);
    ptx::cp_async_wait<kUnderWay>();
    __syncwarp();  // the keys are there
    multiply<kWidth, TileRows::outer, TileRows::outer>(scores, shared.query(), 0, shared.key(warp, stage), 0);
    __syncwarp();  // no lane reads them any more
    fetch_keys(tile + kStages * kDecodeWarps, stage);

    const bool edge = tile < range.full || tile >= range.full_end;
    const float capped = cap_scores<kScores>(a, scores);
    const float factor = bias_and_hide<kScores>(a, s, rows, capped, edge, tile * kKeys, scores);
    const RowValues<kRowTiles> decay = softmax_step(scores, factor, peak, total);
    if (kScores == Scores::any && a.dropout_state != nullptr) {
      const auto row_of = [&](int i) { return drawn[i]; };
      for_each_kept<BlockRows::queries>(a, row_of, tile * kKeys, scores, [](float& x, bool kept) {
        if (!kept) x = 0.0f;
      });
    }
    for_each_with_row(output, decay, [](float& x, float shrunk) { x *= shrunk; });

    ptx::cp_async_wait<kUnderWay>();
    __syncwarp();  // the values are there
    multiply<TileRows::depth>(output, scores, shared.value(warp, stage), 0);
    __syncwarp();  // no lane reads them any more
    fetch_values(tile + kStages * kDecodeWarps, stage);
    stage = (stage + 1) % kStages;
  }
  leave_rows(shared, warp, output, peak, total);
  __syncthreads();
  merge_warps<T, kWidth>(a, s, results, place, shared);
}

// So many blocks a multiprocessor has at a time, that of an sm_80 too.
constexpr int kBlocksPerMultiprocessor = 2;
// A part has so many keys at least, for what it leaves to be small beside them.
constexpr int kLeastKeys = 128;

// Into how many parts the keys are split, so that `blocks`, each times the parts, fill the device. A longest sequence
// is all it knows of lengths: the rest is on the device.
int64_t select_parts(const AttentionCall& call, int64_t max_seqlen_k, int64_t num_splits, int64_t blocks, int tile_keys,
                     const OnDevice& device) {
  const Attention& a = call.inputs;
  const int64_t longest = call.block_table.has_value() ? std::min<int64_t>(a.seqlen_k, max_seqlen_k) : a.seqlen_k;
  int64_t parts = num_splits;
  if (parts == 0) {
    const bool windowed = a.left < kUnbounded && a.right < kUnbounded;
    const int64_t seen = windowed ? std::min(longest, int64_t{a.left} + a.right + a.seqlen_q) : longest;
    parts = std::min(kBlocksPerMultiprocessor * device.multiprocessors() / blocks, seen / kLeastKeys);
  }
  return std::max<int64_t>(1, std::min(parts, ceil_div(longest, tile_keys)));
}

template <typename T, int kWidth, int kRowTiles>
void launch_decode(const AttentionCall& call, int64_t max_seqlen_k, int64_t num_splits, DecodeResults results,
                   const Tensor& lse, const OnDevice& device) {
  using Shared = DecodeTile<T, kWidth, kRowTiles>;
  const Attention& a = call.inputs;
  const int64_t row_tiles = ceil_div(int64_t{a.seqlen_q} * (a.heads / a.kv_heads), Shared::kRows);
  const int64_t blocks = row_tiles * call.sequences * a.kv_heads;
  const int64_t parts = select_parts(call, max_seqlen_k, num_splits, blocks, Shared::kKeys, device);
  const int64_t rows = std::max(a.seqlen_q, a.query_rows) * int64_t{a.heads / a.kv_heads} + Shared::kRows;
  STD_TORCH_CHECK(rows < int64_t{1} << 31, "query has too many rows for a key head: ", rows);
  results.row_tiles = static_cast<int>(row_tiles);
  results.parts = static_cast<int>(parts);
  std::optional<Tensor> partial;
  if (parts > 1) {
    const int64_t partial_rows = parts * results.count;
    partial = empty_like_sizes(lse, {partial_rows * (a.value_dim + 2)}, ScalarType::Float);
    results.partial_outputs = mutable_pointer<float>(partial);
    results.partial_peaks = results.partial_outputs + partial_rows * a.value_dim;
    results.partial_totals = results.partial_peaks + partial_rows;
  }
  launch(call.plain() ? attention_decode_kernel<T, kWidth, Scores::plain, kRowTiles>
                      : attention_decode_kernel<T, kWidth, Scores::any, kRowTiles>,
         grid_of(blocks * parts), dim3(kDecodeThreads), Shared::kSharedBytes, device.stream, a, results);
  if (parts > 1) launch_combine<T>(a, results, device.stream);
}

}  // namespace

void attention_decode(const AttentionCall& call, int64_t max_seqlen_k, int64_t num_splits, const Tensor& output,
                      const Tensor& lse, const OnDevice& device) {
  const DecodeResults results{.output = mutable_pointer(output),
                              .output_strides = {output.stride(0), output.stride(1), output.stride(2)},
                              .lse = mutable_pointer<float>(lse),
                              .count = lse.numel(),
                              .partial_outputs = nullptr,
                              .partial_peaks = nullptr,
                              .partial_totals = nullptr,
                              .sequences = call.sequences,
                              .row_tiles = 1,
                              .parts = 1};
  if (call.sequences == 0 || call.inputs.seqlen_q == 0) {  // all rows are those of no sequence
    Tensor to_clear = output, lse_to_clear = lse;
    torch::stable::zero_(to_clear);
    torch::stable::fill_(lse_to_clear, -INFINITY);
    return;
  }
  // What is packed with one split has any number of rows, for which a sequence's results must not depend on others: nor
  // must the tile. All else has few.
  const bool many = num_splits == 1 && call.cu_seqlens_q.has_value();
  for_width(call, [&]<typename T, int kWidth>() {
    many ? launch_decode<T, kWidth, kManyRowTiles<kWidth>>(call, max_seqlen_k, num_splits, results, lse, device)
         : launch_decode<T, kWidth, 1>(call, max_seqlen_k, num_splits, results, lse, device);
  });
}

}  // namespace fastformer::cuda
