// The gradients of keys and values: a block keeps a tile of keys and walks over the queries that see it, of all heads
// that share the keys.
//
// A warp has some of the keys. Scores are held transposed, keys by queries, so that P^T and dS^T, as the accumulators
// have them, are what the products P^T dO and dS^T Q take from registers; nothing is exchanged between warps.
#include "attention_backward.cuh"

namespace fastformer::cuda {
namespace {

// What a block makes of its keys.
enum class Wanted { both, grad_key, grad_value };

template <int kWidth_, int kWarpKeys_, int kQueries_, int kStages_, bool kApart_>
struct DkdvTile {
  static constexpr int kWidth = kWidth_, kWarpKeys = kWarpKeys_, kQueries = kQueries_, kStages = kStages_;
  static constexpr bool kApart = kApart_;  // grad_key and grad_value by a block each
  static constexpr int kWarps = 4, kThreads = kWarps * kWarp, kKeys = kWarps * kWarpKeys;
  static constexpr int kStatistics = 2 * kQueries;  // lse, and then delta
  static constexpr int kSharedBytes = 2 * (kKeys + kStages * kQueries) * kWidth * 2 + kStages * kStatistics * 4;
  static_assert(kStatistics <= kThreads && kSharedBytes <= 99 * 1024);

  using Block = Accumulator<kWarpKeys / 16, kQueries / 8>;
  using Sums = Accumulator<kWarpKeys / 16, kWidth / 8>;
};

template <typename T, typename Tile, Scores kScores, Wanted kWanted>
FASTFORMER_DEVICE void sum_over_queries(const Attention& a, const AttentionGradients& g, const Sequence& s, int kv_head,
                                        int first_key) {
  constexpr int kKeys = Tile::kKeys, kQueries = Tile::kQueries, kWidth = Tile::kWidth, kThreads = Tile::kThreads;
  using Keys = SharedTile<T, kKeys, kWidth>;
  using Queries = SharedTile<T, kQueries, kWidth>;
  T* shared = shared_memory<T>();
  const Keys key_tile{shared}, value_tile{shared + Keys::kElements};
  T* stages = shared + 2 * Keys::kElements;  // of queries, and rows of grad_output
  float* statistics = reinterpret_cast<float*>(stages + Tile::kStages * 2 * Queries::kElements);

  const TileRange range = query_tiles<kQueries>(a, s, first_key, kKeys);
  const int group = a.heads / a.kv_heads, first_head = kv_head * group, end_head = first_head + group;

  const auto copy_step = [&](int head, int tile, int slot) {
    const Queries query_tile{stages + slot * 2 * Queries::kElements};
    const Queries grad_tile{query_tile.data + Queries::kElements};
    const auto query = query_rows<T>(a, s, head);
    const auto grad = grad_output_rows<T>(a, g, s, head);
    const int first_query = tile * kQueries;
    copy_rows_async<kThreads>(query_tile, a.head_dim, query, first_query);
    copy_rows_async<kThreads>(grad_tile, a.value_dim, grad, first_query);
    if (threadIdx.x < Tile::kStatistics) {
      const int row = first_query + threadIdx.x % kQueries;
      const float* from = (threadIdx.x < kQueries ? g.lse : g.delta) + first_statistic(a, s, head);
      const bool valid = row < s.queries;
      ptx::cp_async<4>(statistics + slot * Tile::kStatistics + threadIdx.x, valid ? from + row : from, valid);
    }
    ptx::cp_async_commit();
  };

  typename Tile::Sums grad_key, grad_value;
  grad_key.fill(0.0f);
  grad_value.fill(0.0f);
  const int warp_row = threadIdx.x / kWarp * Tile::kWarpKeys;
  if (range.begin < range.end) {
    const auto keys = unpaged_rows<const T>(s, kv_head, a.key, a.key_strides);
    const auto values = unpaged_rows<const T>(s, kv_head, a.value, a.value_strides);
    copy_rows_async<kThreads>(key_tile, a.head_dim, keys, first_key);
    if (kWanted != Wanted::grad_value) copy_rows_async<kThreads>(value_tile, a.value_dim, values, first_key);
    copy_step(first_head, range.begin, 0);
  }
  int slot = 0, tile = range.begin;
#pragma unroll 1
  for (int head = range.begin < range.end ? first_head : end_head; head < end_head;) {
    ptx::cp_async_wait<0>();
    __syncthreads();  // this step's tiles are there; and all have read those of the step before
    const bool last = tile + 1 == range.end;
    const int next_head = last ? head + 1 : head, next_tile = last ? range.begin : tile + 1;
    const int next_slot = (slot + 1) % Tile::kStages;
    if (Tile::kStages > 1 && next_head < end_head) copy_step(next_head, next_tile, next_slot);

    const Queries query_tile{stages + slot * 2 * Queries::kElements};
    const Queries grad_tile{query_tile.data + Queries::kElements};
    const float* row_statistics = statistics + slot * Tile::kStatistics;
    const bool edge = tile < range.full || tile >= range.full_end;

    typename Tile::Block weights, capped;
    weights.fill(0.0f);
    multiply_rows(weights, key_tile, warp_row, query_tile);
    QueryValues<BlockRows::keys, Tile::Block::kRowTiles, Tile::Block::kColumnTiles> of_queries;
    of_queries.load([&](int query) { return lse_to_subtract(row_statistics[query]); });
    recompute_weights<kScores>(a, s, head, edge, tile * kQueries, first_key + warp_row, of_queries, weights, capped);
    if constexpr (kWanted != Wanted::grad_key) {
      typename Tile::Block kept = weights;
      if constexpr (kScores == Scores::any) kept.for_each([](float& x, int, int) { x = x < 0.0f ? 0.0f : x; });
      multiply<TileRows::depth>(grad_value, kept, grad_tile, 0);
    }
    if constexpr (kWanted != Wanted::grad_value) {
      through_cap<kScores>(a, capped, weights);  // on P, not dS: of capped, P and dP there are then two at any time
      typename Tile::Block grad_scores;
      grad_scores.fill(0.0f);
      multiply_rows(grad_scores, value_tile, warp_row, grad_tile);
      of_queries.load([&](int query) { return row_statistics[kQueries + query]; });
      grad_of_scores<kScores>(a, weights, of_queries, grad_scores);
      multiply<TileRows::depth>(grad_key, grad_scores, query_tile, 0);
    }
    if (Tile::kStages == 1) {
      __syncthreads();  // all have read this step's tiles
      if (next_head < end_head) copy_step(next_head, next_tile, next_slot);
    }
    head = next_head, tile = next_tile, slot = next_slot;
  }

  // A warp's rows of the tiles of keys and values are read by no other.
  const auto deliver = [&](const Keys& staged, typename Tile::Sums& sums, float factor, int columns, void* to,
                           const int64_t (&strides)[3]) {
    const auto rows = unpaged_rows<T>(s, kv_head, to, strides);
    sums.for_each([&](float& x, int, int) { x *= factor; });
    store_tile(staged, warp_row, 0, sums);
    __syncwarp();
    copy_out<Tile::kWarpKeys, kWarp>(staged, warp_row, columns, lane_of(),
                                     [&](int row) { return rows(first_key + row); });
  };
  __syncwarp();
  if (kWanted != Wanted::grad_value) {
    deliver(key_tile, grad_key, a.scale, a.head_dim, g.grad_key, g.grad_key_strides);
  }
  if (kWanted != Wanted::grad_key) {
    deliver(value_tile, grad_value, a.kept_scale, a.value_dim, g.grad_value, g.grad_value_strides);
  }
}

// One block: kKeys keys of one head. With kApart, blocks of blockIdx.y 0 make grad_key, the others grad_value.
template <typename T, typename Tile, Scores kScores>
__global__ void __launch_bounds__(Tile::kThreads, 2)
    attention_dkdv_kernel(const __grid_constant__ Attention a, const __grid_constant__ AttentionGradients g) {
  // The first keys of a causal head, which the most queries see, come first.
  const int tiles = tiles_up_to(a.seqlen_k, Tile::kKeys), first_key = blockIdx.x % tiles * Tile::kKeys;
  const int sequence_head = blockIdx.x / tiles, kv_head = sequence_head % a.kv_heads;
  const Sequence s = sequence_at(a, sequence_head / a.kv_heads);
  if (first_key >= s.keys) return;
  if constexpr (!Tile::kApart) {
    sum_over_queries<T, Tile, kScores, Wanted::both>(a, g, s, kv_head, first_key);
  } else if (blockIdx.y == 0) {
    sum_over_queries<T, Tile, kScores, Wanted::grad_key>(a, g, s, kv_head, first_key);
  } else {
    sum_over_queries<T, Tile, kScores, Wanted::grad_value>(a, g, s, kv_head, first_key);
  }
}

// Registers of a thread, of 255 (two blocks a multiprocessor, by __launch_bounds__): the sums of grad_key and of
// grad_value have kWarpKeys * kWidth / 32 each, so that those of a width of 256 are made by a block each; two blocks of
// scores (P and dP, or P and softcap's T) kWarpKeys * kQueries / 32 each. Shared memory, of 99 KB (sm_86, sm_89): see
// kSharedBytes.
//
//     width  sums     blocks  shared memory
//     64     2 x  64  2 x 32  48.5 KB: two blocks on sm_86 and sm_89 too
//     96     2 x  48  2 x 16  48.5 KB
//     128    2 x  64  2 x 16  64.5 KB
//     256    1 x 128  2 x 16  96.25 KB: one stage
//
// A warp of 32 keys reads queries and their gradients half as often as two of 16; wider heads have no registers for it.
template <int kWidth>
auto tile_for() {
  if constexpr (kWidth == 64) {
    return DkdvTile<64, 32, 32, 2, false>{};
  } else if constexpr (kWidth <= 128) {
    return DkdvTile<kWidth, 16, 32, 2, false>{};
  } else {
    return DkdvTile<256, 16, 32, 1, true>{};
  }
}

}  // namespace

void launch_dkdv(const AttentionCall& call, const AttentionGradients& gradients, Scores scores, cudaStream_t stream) {
  for_width(call, [&]<typename T, int kWidth>() {
    const auto run = [&]<Scores kScores>() {
      using Tile = decltype(tile_for<kWidth>());
      const int64_t tiles = ceil_div(call.inputs.seqlen_k, Tile::kKeys);
      dim3 grid = grid_of(tiles * call.sequences * call.inputs.kv_heads);
      grid.y = Tile::kApart ? 2 : 1;
      launch(attention_dkdv_kernel<T, Tile, kScores>, grid, dim3(Tile::kThreads), Tile::kSharedBytes, stream,
             call.inputs, gradients);
    };
    scores == Scores::plain ? run.template operator()<Scores::plain>() : run.template operator()<Scores::any>();
  });
}

}  // namespace fastformer::cuda
