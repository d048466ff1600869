// The gradients of queries and of an additive mask: a block keeps a tile of queries and walks over the keys they see.
// A warp has some of the queries; dS goes from its accumulators to the product dS K in registers.
#include "attention_backward.cuh"

namespace fastformer::cuda {
namespace {

template <int kWidth_, int kWarpQueries_, int kKeys_, int kStages_>
struct DqTile {
  static constexpr int kWidth = kWidth_, kWarpQueries = kWarpQueries_, kKeys = kKeys_, kStages = kStages_;
  static constexpr int kWarps = 4, kThreads = kWarps * kWarp, kQueries = kWarps * kWarpQueries;
  static constexpr int kSharedBytes = 2 * (kQueries + kStages * kKeys) * kWidth * 2;

  static_assert(kSharedBytes <= 99 * 1024);

  using Block = Accumulator<kWarpQueries / 16, kKeys / 8>;
  using Sum = Accumulator<kWarpQueries / 16, kWidth / 8>;
};

// One block: kQueries queries of one head.
template <typename T, typename Tile, Scores kScores>
__global__ void __launch_bounds__(Tile::kThreads, 2)
    attention_dq_kernel(const __grid_constant__ Attention a, const __grid_constant__ AttentionGradients g) {
  constexpr int kQueries = Tile::kQueries, kKeys = Tile::kKeys, kWidth = Tile::kWidth, kThreads = Tile::kThreads;
  using Queries = SharedTile<T, kQueries, kWidth>;
  using Keys = SharedTile<T, kKeys, kWidth>;
  // The last queries of a causal head, which see the most keys, come first; heads that share keys are neighbours.
  const int tiles = tiles_up_to(a.seqlen_q, kQueries), first_query = (tiles - 1 - blockIdx.x % tiles) * kQueries;
  const int sequence_head = blockIdx.x / tiles, head = sequence_head % a.heads, kv_head = head / (a.heads / a.kv_heads);
  const Sequence s = sequence_at(a, sequence_head / a.heads);
  if (first_query >= s.queries) return;

  T* shared = shared_memory<T>();
  const Queries query_tile{shared}, grad_tile{shared + Queries::kElements};
  T* stages = shared + 2 * Queries::kElements;  // of keys and values
  const TileRange range = key_tiles<kKeys>(a, s, first_query, kQueries);
  const auto keys = unpaged_rows<const T>(s, kv_head, a.key, a.key_strides);
  const auto values = unpaged_rows<const T>(s, kv_head, a.value, a.value_strides);
  const auto copy_tile = [&](int tile) {
    const Keys key_tile{stages + tile % Tile::kStages * 2 * Keys::kElements};
    const Keys value_tile{key_tile.data + Keys::kElements};
    copy_rows_async<kThreads>(key_tile, a.head_dim, keys, tile * kKeys);
    copy_rows_async<kThreads>(value_tile, a.value_dim, values, tile * kKeys);
    ptx::cp_async_commit();
  };

  typename Tile::Sum grad_query;
  grad_query.fill(0.0f);
  const int warp_row = threadIdx.x / kWarp * Tile::kWarpQueries;
  QueryValues<BlockRows::queries, Tile::Block::kRowTiles, Tile::Block::kColumnTiles> lse, delta;
  const int64_t statistic = first_statistic(a, s, head) + first_query + warp_row;
  const int rows_left = s.queries - first_query - warp_row;
  lse.load([&](int row) { return row < rows_left ? lse_to_subtract(g.lse[statistic + row]) : 0.0f; });
  delta.load([&](int row) { return row < rows_left ? g.delta[statistic + row] : 0.0f; });
  if (range.begin < range.end) {
    const auto query = query_rows<T>(a, s, head);
    const auto grad = grad_output_rows<T>(a, g, s, head);
    copy_rows_async<kThreads>(query_tile, a.head_dim, query, first_query);
    copy_rows_async<kThreads>(grad_tile, a.value_dim, grad, first_query);
    copy_tile(range.begin);
  }
#pragma unroll 1
  for (int tile = range.begin; tile < range.end; ++tile) {
    ptx::cp_async_wait<0>();
    __syncthreads();  // this tile of keys is there; and all have read the one before
    if (Tile::kStages > 1 && tile + 1 < range.end) copy_tile(tile + 1);

    const Keys key_tile{stages + tile % Tile::kStages * 2 * Keys::kElements};
    const Keys value_tile{key_tile.data + Keys::kElements};
    const bool edge = tile < range.full || tile >= range.full_end;
    typename Tile::Block weights, capped, grad_scores;
    weights.fill(0.0f);
    multiply_rows(weights, query_tile, warp_row, key_tile);
    recompute_weights<kScores>(a, s, head, edge, first_query + warp_row, tile * kKeys, lse, weights, capped);
    grad_scores.fill(0.0f);
    multiply_rows(grad_scores, grad_tile, warp_row, value_tile);
    grad_of_scores<kScores>(a, weights, delta, grad_scores);
    if (kScores == Scores::any && g.grad_mask != nullptr) {  // there is one sequence of all rows for each of the batch
      float* grad_mask = g.grad_mask + static_cast<int64_t>(sequence_head) * a.seqlen_q * a.seqlen_k;
      for_each_score<BlockRows::queries>(grad_scores, first_query + warp_row, tile * kKeys,
                                         [&](float& x, int query, int key) {
                                           if (query < s.queries && key < s.keys)
                                             grad_mask[static_cast<int64_t>(query) * a.seqlen_k + key] = x;
                                         });
    }
    through_cap<kScores>(a, capped, grad_scores);
    multiply<TileRows::depth>(grad_query, grad_scores, key_tile, 0);
    if (Tile::kStages == 1) {
      __syncthreads();  // all have read this tile of keys
      if (tile + 1 < range.end) copy_tile(tile + 1);
    }
  }

  // A warp's rows of the tile of queries are read by no other.
  const auto to =
      head_rows(static_cast<T*>(g.grad_query), g.grad_query_strides, s.query_entry, head, s.first_query, s.queries);
  grad_query.for_each([&](float& x, int, int) { x *= a.scale; });
  __syncwarp();
  store_tile(query_tile, warp_row, 0, grad_query);
  __syncwarp();
  copy_out<Tile::kWarpQueries, kWarp>(query_tile, warp_row, a.head_dim, lane_of(),
                                      [&](int row) { return to(first_query + row); });
}

// Registers of a thread, of 255 (two blocks a multiprocessor, by __launch_bounds__): the sums of grad_query have
// kWarpQueries * kWidth / 32, each of P, dS and softcap's T (Scores::any) kWarpQueries * kKeys / 32. Shared memory, of
// 99 KB (sm_86, sm_89): see kSharedBytes.
//
//     width  scores  sums  blocks  shared memory
//     64     plain     64  2 x 32  48 KB
//     64     any       32  3 x 32  48 KB
//     96     both      48  3 x 16  48 KB
//     128    both      64  3 x 16  64 KB
//     256    plain    128  2 x 16  96 KB: one stage
//     256    any      128  3 x  8  96 KB
//
// A warp of 32 queries reads keys and values half as often as two of 16; wider heads have no registers for that.
template <int kWidth, Scores kScores>
auto tile_for() {
  constexpr bool kPlain = kScores == Scores::plain;
  if constexpr (kWidth == 64) {
    return DqTile<64, kPlain ? 32 : 16, kPlain ? 32 : 64, 2>{};
  } else if constexpr (kWidth <= 128) {
    return DqTile<kWidth, 16, 32, 2>{};
  } else {
    return DqTile<256, 16, kPlain ? 32 : 16, kPlain ? 1 : 2>{};
  }
}

}  // namespace

void launch_dq(const AttentionCall& call, const AttentionGradients& gradients, Scores scores, cudaStream_t stream) {
  for_width(call, [&]<typename T, int kWidth>() {
    const auto run = [&]<Scores kScores>() {
      using Tile = decltype(tile_for<kWidth, kScores>());
      const int64_t tiles = ceil_div(call.inputs.seqlen_q, Tile::kQueries);
      const dim3 grid = grid_of(tiles * call.sequences * call.inputs.heads);
      launch(attention_dq_kernel<T, Tile, kScores>, grid, dim3(Tile::kThreads), Tile::kSharedBytes, stream, call.inputs,
             gradients);
    };
    scores == Scores::plain ? run.template operator()<Scores::plain>() : run.template operator()<Scores::any>();
  });
}

}  // namespace fastformer::cuda
