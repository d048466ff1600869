// Attention's forward pass, softmax(scale query key^T + mask) value, without ever holding the Sq x Sk scores.
//
// FlashAttention-2 (arXiv 2307.08691): a block has a tile of queries and walks over the keys, with a running maximum
// (peak) and sum (total) of each row's softmax; when the peak rises, what was accumulated is scaled down. Few queries
// go to attention_decode.cu. Legend of shapes: attention.cuh.

#include "attention_decode.cuh"
#include "attention_hopper.cuh"
#include "attention_softmax.cuh"

namespace fastformer::cuda {
namespace {

// With so many rows, queries times the heads that share a key head, attention_decode reads each key once for all.
constexpr int64_t kDecodeRows = 16;

// The tiles of a block, four warps, each with a quarter of the queries. Shared memory has one tile of queries, one of
// keys and one of values. Of the 255 registers of a thread, the output takes kWidth * kWarpRows / 32, the scores
// kKeys * kWarpRows / 32; the compiler loads fragments ahead into what is left, of which it wants about 50.
//
// width  scores  queries x keys  shared memory  output + scores  blocks on a multiprocessor of sm_80
//    64  both       128 x 64          32 KB         64 + 64        2 (plain: and 32 registers for the queries)
//    96  plain      128 x 64          48 KB         96 + 64        2
//   128  plain      128 x 32          48 KB        128 + 32        2
//    96  any         64 x 64          36 KB         48 + 32        2
//   128  any         64 x 64          48 KB         64 + 32        2
//   256  both        64 x 64          96 KB        128 + 32        1
//
// Warps of 32 rows read keys and values from shared memory half as often for a product as those of 16. Biases and
// dropout need registers beside the scores, which at 96 and 128 leaves room for 16 only.
template <int kWidth_, Scores kScores>
struct ForwardTile {
  static constexpr int kWidth = kWidth_, kWarps = 4;
  static constexpr int kKeys = kWidth == 128 && kScores == Scores::plain ? 32 : 64;
  static constexpr int kWarpRows = kWidth == 64 || (kWidth < 256 && kScores == Scores::plain) ? 32 : 16;
  static constexpr int kQueries = kWarps * kWarpRows, kThreads = kWarps * kWarp;
  static constexpr int kSharedBytes = (kQueries + 2 * kKeys) * kWidth * 2;
  static constexpr int kLeastBlocks = kWidth < 256 ? 2 : 1;
  // Fragments of the queries stay in registers.
  static constexpr bool kHoldsQueries = kWidth == 64 && kScores == Scores::plain;
};

struct ForwardResults {
  void* output;  // [B, H, Sq, Dv]
  int64_t output_strides[3];
  float* lse;  // [B, H, Sq], contiguous
};

// Which queries a block has. Heads that share keys are neighbours, then come the tiles of a sequence, the longest
// causal rows first.
struct ForwardPlace {
  int sequence, kv_head, head, tile;
};

FASTFORMER_DEVICE ForwardPlace forward_place(const Attention& a, int tiles) {
  const int group = a.heads / a.kv_heads, block = blockIdx.x;
  const int tile = tiles - 1 - block / group % tiles, pair = block / group / tiles;
  const int kv_head = pair % a.kv_heads;
  return {pair / a.kv_heads, kv_head, kv_head * group + block % group, tile};
}

template <typename T, int kWidth, Scores kScores, typename Tile = ForwardTile<kWidth, kScores>>
__global__ void __launch_bounds__(Tile::kThreads, Tile::kLeastBlocks)
    attention_forward_kernel(const __grid_constant__ Attention a, const __grid_constant__ ForwardResults results) {
  constexpr int kQueries = Tile::kQueries, kKeys = Tile::kKeys, kThreads = Tile::kThreads;
  constexpr int kRowTiles = Tile::kWarpRows / 16;
  const ForwardPlace place = forward_place(a, tiles_up_to(a.seqlen_q, kQueries));
  const Sequence s = sequence_at(a, place.sequence);
  const int first_query = place.tile * kQueries, warp_row = threadIdx.x / kWarp * Tile::kWarpRows;
  if (first_query >= s.queries) return;

  using QueryTile = SharedTile<T, kQueries, kWidth>;
  using KeyTile = SharedTile<T, kKeys, kWidth>;
  const QueryTile query{shared_memory<T>()};
  const KeyTile key{query.data + QueryTile::kElements}, value{key.data + KeyTile::kElements};
  const HeadRows<const T> queries = query_rows<T>(a, s, place.head);
  const KeyRows<T> keys = key_rows<T>(a, s, place.kv_head, a.key, a.key_strides);
  const KeyRows<T> values = key_rows<T>(a, s, place.kv_head, a.value, a.value_strides);
  const TileRange range = key_tiles<kKeys>(a, s, first_query, kQueries);
  copy_rows_async<kThreads>(query, a.head_dim, queries, first_query);
  copy_rows_async<kThreads>(key, a.head_dim, keys, range.begin * kKeys);
  ptx::cp_async_commit();
  ptx::cp_async_wait<0>();
  __syncthreads();
  FragmentA held[Tile::kHoldsQueries ? kWidth / 16 : 1][kRowTiles];
  if constexpr (Tile::kHoldsQueries) {
#pragma unroll
    for (int step = 0; step < kWidth / 16; ++step) {
#pragma unroll
      for (int i = 0; i < kRowTiles; ++i) held[step][i] = load_a<TileRows::outer>(query, warp_row + 16 * i, 16 * step);
    }
  }

  const Biases biases(a, s, place.head);
  Accumulator<kRowTiles, kWidth / 8> output;  // sum of weights * value so far
  RowValues<kRowTiles> peak, total;           // see softmax_step
  output.fill(0.0f);
  peak.fill(-INFINITY);
  total.fill(0.0f);
  float factor = 1.0f;
  for (int number = range.begin; number < range.end; ++number) {
    // This tile of keys is there, and nobody reads values any more.
    copy_rows_async<kThreads>(value, a.value_dim, values, number * kKeys);
    ptx::cp_async_commit();
    Accumulator<kRowTiles, kKeys / 8> scores;
    scores.fill(0.0f);
    if constexpr (Tile::kHoldsQueries) {
      multiply<TileRows::outer>(scores, held, key, 0);
    } else {
      multiply<kWidth, TileRows::outer, TileRows::outer>(scores, query, warp_row, key, 0);
    }
    __syncthreads();  // nobody reads keys any more
    if (number + 1 < range.end) copy_rows_async<kThreads>(key, a.head_dim, keys, (number + 1) * kKeys);
    ptx::cp_async_commit();

    const int row = first_query + warp_row, first_key = number * kKeys;
    factor = cap_scores<kScores>(a, scores);
    factor = add_biases<kScores, BlockRows::queries>(a, s, biases, factor, row, first_key, scores);
    const bool edge = number < range.full || number >= range.full_end;
    hide<kScores, BlockRows::queries>(a, s, biases, edge, -INFINITY, row, first_key, scores);
    const RowValues<kRowTiles> decay = softmax_step(scores, factor, peak, total);
    if (kScores == Scores::any && a.dropout_state != nullptr) {
      const uint32_t batch_head = place.sequence * a.heads + place.head;
      for_each_kept<BlockRows::queries>(a, batch_head, row, first_key, scores, [](float& x, bool kept) {
        if (!kept) x = 0.0f;
      });
    }
    scale_down(output, decay);

    ptx::cp_async_wait<1>();
    __syncthreads();  // the values are there
    multiply<TileRows::depth>(output, scores, value, 0);
    ptx::cp_async_wait<0>();
    __syncthreads();  // the next keys are there, and nobody reads values any more
  }

  reduce_lanes(total, [](float x, float y) { return x + y; });
  RowValues<kRowTiles> multiplier;
  float* lse = results.lse + first_statistic(a, s, place.head);
#pragma unroll
  for (int i = 0; i < kRowTiles; ++i) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const RowEnd end = end_row(a, place.head, peak.values[i][half] * factor, total.values[i][half]);
      multiplier.values[i][half] = end.multiplier;
      const int row = first_query + warp_row + i * 16 + half * 8 + lane_of() / 4;
      if (lane_of() % 4 == 0 && row < s.queries) lse[row] = end.lse;
    }
  }
  for_each_with_row(output, multiplier, [](float& x, float by) { x *= by; });
  __syncwarp();  // a warp reads, and overwrites, queries of its own only
  store_tile(query, warp_row, 0, output);
  __syncwarp();
  const HeadRows<T> to = head_rows(static_cast<T*>(results.output), results.output_strides, s.query_entry, place.head,
                                   s.first_query, s.queries);
  copy_out<Tile::kWarpRows, kWarp>(query, warp_row, a.value_dim, lane_of(),
                                   [&](int row) { return to(first_query + row); });
}

template <typename T, int kWidth, Scores kScores>
void launch_forward(const AttentionCall& call, const ForwardResults& results, cudaStream_t stream) {
  using Tile = ForwardTile<kWidth, kScores>;
  const Attention& a = call.inputs;
  const int64_t blocks = ceil_div(a.seqlen_q, Tile::kQueries) * call.sequences * a.heads;
  launch(attention_forward_kernel<T, kWidth, kScores>, grid_of(blocks), dim3(Tile::kThreads), Tile::kSharedBytes,
         stream, a, results);
}

std::tuple<Tensor, Tensor> attention_forward(
    const Tensor& query, const Tensor& key, const Tensor& value, const std::optional<Tensor>& mask, double scale,
    bool is_causal, bool bottom_right, std::optional<double> softcap, std::optional<int64_t> window_left,
    std::optional<int64_t> window_right, const std::optional<Tensor>& alibi_slopes, const std::optional<Tensor>& sinks,
    double dropout_p, const std::optional<Tensor>& dropout_state, const std::optional<Tensor>& cu_seqlens_q,
    const std::optional<Tensor>& cu_seqlens_k, const std::optional<Tensor>& seqused_k,
    const std::optional<Tensor>& block_table, int64_t max_seqlen_q, int64_t max_seqlen_k, int64_t num_splits) {
  const OnDevice device(query);
  STD_TORCH_CHECK(num_splits >= 0, "num_splits must not be negative");
  const auto [scaled_query, positive_scale] = with_positive_scale(query, scale);
  const AttentionCall call = attention_call(scaled_query, key, value,
                                            {.mask = mask,
                                             .scale = positive_scale,
                                             .is_causal = is_causal,
                                             .bottom_right = bottom_right,
                                             .softcap = softcap,
                                             .window_left = window_left,
                                             .window_right = window_right,
                                             .alibi_slopes = alibi_slopes,
                                             .sinks = sinks,
                                             .dropout_p = dropout_p,
                                             .dropout_state = dropout_state,
                                             .cu_seqlens_q = cu_seqlens_q,
                                             .cu_seqlens_k = cu_seqlens_k,
                                             .seqused_k = seqused_k,
                                             .block_table = block_table,
                                             .max_seqlen_q = max_seqlen_q,
                                             .max_seqlen_k = max_seqlen_k});
  const int64_t batch = query.size(0), heads = query.size(1), seqlen_q = query.size(2), value_dim = value.size(3);
  Tensor output = new_heads(query, batch, heads, seqlen_q, call.inputs.value_dim);
  Tensor lse = empty_like_sizes(query, {batch, heads, seqlen_q}, ScalarType::Float);
  if (lse.numel() == 0) return {without_padding(output, value_dim), lse};
  const int64_t longest = call.inputs.seqlen_q;
  const bool packed = cu_seqlens_q.has_value(), few = longest * heads <= kDecodeRows * key.size(1);
  // With one split, how a packed sequence is computed must not depend on the others.
  if (longest > 0 && value_dim > 0 && (few || (packed && num_splits == 1))) {
    attention_decode(call, max_seqlen_k, num_splits, output, lse, device);
    return {without_padding(output, value_dim), lse};
  }
  if (packed) {  // there may be rows of no sequence
    torch::stable::zero_(output);
    torch::stable::fill_(lse, -INFINITY);
  }
#if FASTFORMER_HAS_HOPPER
  if (suits_hopper(call, kWidestForward, device)) {
    attention_forward_hopper(call, output, lse, device);
    return {without_padding(output, value_dim), lse};
  }
#endif
  const ForwardResults results{.output = mutable_pointer(output),
                               .output_strides = {output.stride(0), output.stride(1), output.stride(2)},
                               .lse = mutable_pointer<float>(lse)};
  for_width(call, [&]<typename T, int kWidth>() {
    call.plain() ? launch_forward<T, kWidth, Scores::plain>(call, results, device.stream)
                 : launch_forward<T, kWidth, Scores::any>(call, results, device.stream);
  });
  return {without_padding(output, value_dim), lse};
}

}  // namespace
}  // namespace fastformer::cuda

FASTFORMER_CUDA_LIBRARY(m) { m.impl("attention_forward", TORCH_BOX(&fastformer::cuda::attention_forward)); }
