// Attention's backward pass on Hopper, as FlashAttention-3 does it (arXiv 2407.08608): a block keeps a tile of keys and
// walks over the queries that see it, of all heads that share the keys. The formulas: attention_backward.cu.
//
// Each of two warpgroups has 64 of the keys. Scores are held transposed, keys by queries, so that P^T and dS^T go from
// registers to the products P^T dO and dS^T Q. For dQ = dS K, whose depth is all keys of the block, dS goes through
// shared memory. Blocks add their parts of dQ to floats in global memory: those of a tile of queries in a fixed order,
// the last keys first, so that the result is the same bits each time. A second kernel rounds the sums.
#include "attention_hopper.cuh"

namespace fastformer::cuda {
namespace {

// Registers of a thread: grad_key and grad_value 2 x kWidth / 2, S and dP 2 x 32, both rounded 2 x 16, dQ 32; of
// 232, 240 of width 128.
//
// Of dQ a warpgroup makes 64 x 64: of width 128 each has its own columns of 64 queries; of width 64 the tiles are of
// 128 queries, walked over 64 at a time, and each has its own 64 of them.
//
// Shared memory by kilobytes, width 64 and 128: keys and values 32, 64; two stages of queries and their gradients 64,
// 64; two of dS 64, 32; dQ 32. Together 192.
template <int kWidth_>
struct BackwardTile {
  static constexpr int kWidth = kWidth_, kKeys = 128, kQueries = kWidth == 64 ? 128 : 64, kStages = 2;
  static constexpr int kGroups = 2, kGroupKeys = kKeys / kGroups, kThreads = (kGroups + 1) * kWarpgroup;
  static constexpr int kProducerRegisters = kWidth == 64 ? 40 : 24;
  static constexpr int kConsumerRegisters = kWidth == 64 ? 232 : 240;
  static_assert(kProducerRegisters + kGroups * kConsumerRegisters <= (kGroups + 1) * launch_registers(kThreads));
};

// 64 x 64 of dQ, as the threads of a warpgroup hold them.
using QueryPart = Accumulator<1, kPanel / 8>;
constexpr int kParts = 2, kPartFloats = kPanel * kPanel;

// Where a part of dQ has the four floats of tile i of a thread's accumulator: neighbours in one instruction are
// neighbours in memory.
template <typename T>
FASTFORMER_DEVICE T* part_floats(T* part, int i) {
  return part + (i * kWarpgroup + threadIdx.x % kWarpgroup) * 4;
}

struct BackwardMaps {
  TensorMap query, grad_output, key, value, grad_key, grad_value;
};

struct BackwardSums {
  const float* lse;    // [B, H, Sq]
  const float* delta;  // likewise
  float* grad_query;   // [H, tiles, kParts, kPartFloats], zeros before
  int* turns;          // [H, tiles]: how many tiles of keys have been added; zeros before
  int64_t tiles;       // of queries, of all sequences

  // The number of a sequence's tile: packed sequences have one more than would do if they followed without a gap.
  template <typename Tile>
  FASTFORMER_DEVICE int64_t tile(const Attention& a, const Sequence& s, int head, int number) const {
    const int64_t first = a.cu_seqlens_q != nullptr
                              ? s.first_query / Tile::kQueries + s.index
                              : static_cast<int64_t>(s.index) * tiles_up_to(a.seqlen_q, Tile::kQueries);
    return head * tiles + first + number;
  }
};

template <typename T, typename Tile>
struct BackwardShared {
  using KeyTile = PanelTile<T, Tile::kKeys, Tile::kWidth>;
  using QueryTile = PanelTile<T, Tile::kQueries, Tile::kWidth>;
  using ScoreTile = PanelTile<T, Tile::kKeys, Tile::kQueries>;  // dS^T
  using QueryRing = Ring<Tile::kStages>;
  using GradRing = Ring<2>;  // of dQ, from the warpgroups to the thread that adds it
  struct Rest {
    float statistics[Tile::kStages][2][Tile::kQueries];  // lse, as it is to be subtracted, and delta
    QueryRing ring;
    GradRing grads;
    Mbarrier keys_full;
  };
  static constexpr int kGradQueryFloats = kParts * kPartFloats;
  static_assert(kGradQueryFloats == Tile::kQueries * Tile::kWidth);
  static constexpr int kBytes = 2 * KeyTile::kBytes + Tile::kStages * (2 * QueryTile::kBytes + ScoreTile::kBytes) +
                                GradRing::kStages * kGradQueryFloats * 4 + sizeof(Rest);

  FASTFORMER_DEVICE static KeyTile key() { return {shared_memory<T>()}; }
  FASTFORMER_DEVICE static KeyTile value() { return {key().data + KeyTile::kElements}; }
  FASTFORMER_DEVICE static QueryTile query(int stage) {
    return {value().data + KeyTile::kElements + 2 * stage * QueryTile::kElements};
  }
  FASTFORMER_DEVICE static QueryTile grad_output(int stage) { return {query(stage).data + QueryTile::kElements}; }
  FASTFORMER_DEVICE static ScoreTile grad_scores(int stage) {
    return {query(Tile::kStages).data + stage * ScoreTile::kElements};
  }
  FASTFORMER_DEVICE static float* grad_query(int stage) {
    return reinterpret_cast<float*>(grad_scores(Tile::kStages).data) + stage * kGradQueryFloats;
  }
  FASTFORMER_DEVICE static Rest& rest() { return *reinterpret_cast<Rest*>(grad_query(GradRing::kStages)); }
};

// What a block does: a tile of keys, and the tiles of queries of each head that see it.
struct BackwardPlace {
  Sequence s;
  int kv_head, first_head, end_head, key_tile, first_key;
  TileRange range;
  RowsInMap queries, keys;
};

template <typename Tile>
FASTFORMER_DEVICE BackwardPlace backward_place(const Attention& a, const HeadSchedule& schedule) {
  const auto [sequence, kv_head, key_tile] = schedule.place(blockIdx.x);
  const Sequence s = sequence_at(a, sequence);
  const int group = a.heads / a.kv_heads, first_key = key_tile * Tile::kKeys;
  TileRange range = query_tiles<Tile::kQueries>(a, s, first_key, Tile::kKeys);
  // Rows beyond the last query may be all that see the keys.
  if (range.begin < range.end &&
      key_tiles<Tile::kKeys>(a, s, (range.end - 1) * Tile::kQueries, Tile::kQueries).end <= key_tile) {
    --range.end;
  }
  return {s,         kv_head, kv_head * group,      kv_head * group + group, key_tile,
          first_key, range,   queries_in_map(a, s), keys_in_map(a, s)};
}

// Calls f(head, tile) for all that the block walks over, in order.
template <typename F>
FASTFORMER_DEVICE void for_each_query_tile(const BackwardPlace& place, F f) {
#pragma unroll 1
  for (int head = place.first_head; head < place.end_head; ++head) {
#pragma unroll 1
    for (int tile = place.range.begin; tile < place.range.end; ++tile) f(head, tile);
  }
}

// --- the producers, a warp each

template <typename T, typename Tile>
FASTFORMER_DEVICE void load_tiles(const BackwardPlace& place, const BackwardMaps& maps) {
  using Shared = BackwardShared<T, Tile>;
  auto& rest = Shared::rest();
  if (place.range.begin == place.range.end) return;
  ptx::mbarrier_arrive_expect(&rest.keys_full, 2 * Shared::KeyTile::kBytes);
  load_rows(Shared::key(), maps.key, &rest.keys_full, place.keys, place.first_key, place.kv_head);
  load_rows(Shared::value(), maps.value, &rest.keys_full, place.keys, place.first_key, place.kv_head);
  typename Shared::QueryRing::Place at;
  for_each_query_tile(place, [&](int head, int tile) {
    Mbarrier* full = &rest.ring.full[at.stage];
    rest.ring.begin_fill(at, 2 * Shared::QueryTile::kBytes);
    load_rows(Shared::query(at.stage), maps.query, full, place.queries, tile * Tile::kQueries, head);
    load_rows(Shared::grad_output(at.stage), maps.grad_output, full, place.queries, tile * Tile::kQueries, head);
    at.advance();
  });
}

template <typename T, typename Tile>
FASTFORMER_DEVICE void load_statistics(const Attention& a, const BackwardPlace& place, const BackwardSums& sums) {
  using Shared = BackwardShared<T, Tile>;
  auto& rest = Shared::rest();
  typename Shared::QueryRing::Place at;
  for_each_query_tile(place, [&](int head, int tile) {
    constexpr int kEach = Tile::kQueries / kWarp;
    const int64_t first = first_statistic(a, place.s, head);
    float lse[kEach], delta[kEach];
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      const int query = tile * Tile::kQueries + i * kWarp + lane_of();
      const bool exists = query < place.s.queries;
      lse[i] = exists ? lse_to_subtract(sums.lse[first + query]) : 0.0f;
      delta[i] = exists ? sums.delta[first + query] : 0.0f;
    }
    rest.ring.wait_empty(at);
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      rest.statistics[at.stage][0][i * kWarp + lane_of()] = lse[i];
      rest.statistics[at.stage][1][i * kWarp + lane_of()] = delta[i];
    }
    __syncwarp();
    if (lane_of() == 0) ptx::mbarrier_arrive(&rest.ring.full[at.stage]);
    at.advance();
  });
}

// Adds what the warpgroups made of dQ, by one thread. Blocks have turns at a tile of queries, the last keys first: they
// were launched first, so that nobody waits for a block that has yet to begin.
template <typename T, typename Tile>
FASTFORMER_DEVICE void add_grad_query(const Attention& a, const BackwardPlace& place, const BackwardSums& sums) {
  using Shared = BackwardShared<T, Tile>;
  auto& rest = Shared::rest();
  typename Shared::GradRing::Place at;
  for_each_query_tile(place, [&](int head, int tile) {
    const int64_t number = sums.tile<Tile>(a, place.s, head, tile);
    const TileRange keys = key_tiles<Tile::kKeys>(a, place.s, tile * Tile::kQueries, Tile::kQueries);
    rest.grads.wait_full(at);
    ptx::wait_for_count(sums.turns + number, keys.end - 1 - place.key_tile);
    ptx::bulk_add(sums.grad_query + number * Shared::kGradQueryFloats, Shared::grad_query(at.stage),
                  Shared::kGradQueryFloats * 4);
    ptx::tma_store_commit();
    ptx::bulk_wait_all();
    ptx::count_up(sums.turns + number);
    ptx::mbarrier_arrive(&rest.grads.empty[at.stage]);
    at.advance();
  });
}

// --- the consumers

template <typename T, typename Tile>
FASTFORMER_DEVICE void differentiate(const Attention& a, const BackwardPlace& place, const BackwardMaps& maps,
                                     int group) {
  using Shared = BackwardShared<T, Tile>;
  using Block = Accumulator<1, kPanel / 8>;         // 64 keys by 64 queries
  using Rows = PanelTile<T, kPanel, Tile::kWidth>;  // 64 queries
  static_assert(Tile::kQueries == kPanel || Tile::kWidth == kPanel);
  constexpr int kBothGroups = 1, kOwnGroup = 2;  // named barriers
  auto& rest = Shared::rest();
  const int group_row = group * Tile::kGroupKeys, warp_row = group_row + threadIdx.x % kWarpgroup / kWarp * 16;
  const int first_key = place.first_key + warp_row;
  const TileRange mine = query_tiles<kPanel>(a, place.s, place.first_key + group_row, Tile::kGroupKeys);
  Accumulator<1, Tile::kWidth / 8> grad_key, grad_value;
  grad_key.fill(0.0f);
  grad_value.fill(0.0f);
  typename Shared::QueryRing::Place at;
  typename Shared::GradRing::Place out;
  if (place.range.begin < place.range.end) ptx::mbarrier_wait(&rest.keys_full, 0);
  for_each_query_tile(place, [&](int head, int tile) {
    const auto query = Shared::query(at.stage), grad_output = Shared::grad_output(at.stage);
    // Both warpgroups' dS, in one of two places: the other one's product with the place before may still be under way.
    const auto shared_grads = Shared::grad_scores(out.stage);
    Block weights, grad_scores;
    uint32_t rounded_weights[kPanel / 16][4], rounded_grads[kPanel / 16][4];
    rest.ring.wait_full(at);
#pragma unroll
    for (int row = 0; row < Tile::kQueries; row += kPanel) {
      const Rows queries{query.data + row * kPanel}, grad_outputs{grad_output.data + row * kPanel};
      const int first_query = tile * Tile::kQueries + row;
      ptx::wgmma_fence(weights.values[0], grad_scores.values[0]);
      begin_rows_by_rows(weights, Shared::key(), group_row, queries);
      begin_rows_by_rows(grad_scores, Shared::value(), group_row, grad_outputs);
      QueryValues<BlockRows::keys, 1, Block::kColumnTiles> of_queries;
      of_queries.load([&](int i) { return rest.statistics[at.stage][0][row + i]; });
      if (row == 0) {
        ptx::wgmma_wait<1>(weights.values[0]);
      } else {
        ptx::wgmma_wait<1>(grad_value.values[0], rounded_weights, grad_key.values[0], rounded_grads, weights.values[0]);
      }
      const bool edge = first_query / kPanel < mine.full || first_query / kPanel >= mine.full_end;
      Block capped;
      recompute_weights<Scores::plain>(a, place.s, head, edge, first_query, first_key, of_queries, weights, capped);
      round_to_fragments<T>(rounded_weights, weights);
      of_queries.load([&](int i) { return rest.statistics[at.stage][1][row + i]; });
      ptx::wgmma_wait<0>(grad_scores.values[0]);
      ptx::wgmma_fence(grad_value.values[0], rounded_weights);
      begin_fragments_by_columns(grad_value, rounded_weights, grad_outputs);
      grad_of_scores<Scores::plain>(a, weights, of_queries, grad_scores);
      round_to_fragments<T>(rounded_grads, grad_scores);
      ptx::wgmma_fence(grad_key.values[0], rounded_grads);
      begin_fragments_by_columns(grad_key, rounded_grads, queries);
      store_tile(shared_grads, warp_row, row, grad_scores);
    }
    ptx::fence_proxy_async();
    ptx::barrier_sync(kBothGroups, Tile::kGroups * kWarpgroup);
    using Panel = PanelTile<T, Tile::kKeys, kPanel>;
    const Panel grads{shared_grads.panel(Tile::kWidth == kPanel ? group : 0)};
    const Panel key{Shared::key().panel(Tile::kWidth == kPanel ? 0 : group)};
    QueryPart grad_query;
    ptx::wgmma_fence(grad_query.values[0]);
#pragma unroll
    for (int depth = 0; depth < Tile::kKeys; depth += 16) {
      ptx::wgmma<T, true, true>(grad_query.values[0], grads.columns_at(depth), key.columns_at(depth), depth > 0);
    }
    ptx::wgmma_commit();
    ptx::wgmma_wait<1>(grad_value.values[0], rounded_weights, grad_key.values[0], rounded_grads);
    rest.ring.release(at);
    at.advance();
    ptx::wgmma_wait<0>(grad_query.values[0]);
    rest.grads.wait_empty(out);
    float* part = Shared::grad_query(out.stage) + group * kPartFloats;
#pragma unroll
    for (int i = 0; i < QueryPart::kColumnTiles; ++i) {
      const float (&x)[4] = grad_query.values[0][i];
      store(part_floats(part, i), Pack<float, 4>{x[0], x[1], x[2], x[3]});
    }
    ptx::fence_proxy_async();
    __syncwarp();
    if (lane_of() == 0) ptx::mbarrier_arrive(&rest.grads.full[out.stage]);
    out.advance();
  });

  // The results go out through the keys' and the values' shared memory. The other warpgroup reads all keys.
  ptx::barrier_sync(kBothGroups, Tile::kGroups * kWarpgroup);
  grad_key.for_each([&](float& x, int, int) { x *= a.scale; });
  store_tile(Shared::key(), warp_row, 0, grad_key);
  store_tile(Shared::value(), warp_row, 0, grad_value);
  ptx::fence_proxy_async();
  ptx::barrier_sync(kOwnGroup + group, kWarpgroup);
  if (threadIdx.x % kWarpgroup != 0) return;
  store_rows(maps.grad_key, Shared::key(), group_row, place.keys, place.first_key + group_row, place.kv_head);
  store_rows(maps.grad_value, Shared::value(), group_row, place.keys, place.first_key + group_row, place.kv_head);
  ptx::tma_store_wait<0>();
}

template <typename T, typename Tile>
__global__ void __launch_bounds__(Tile::kThreads, 1)
    attention_backward_hopper_kernel(const __grid_constant__ Attention a, const __grid_constant__ BackwardMaps maps,
                                     const __grid_constant__ HeadSchedule schedule,
                                     const __grid_constant__ BackwardSums sums) {
  auto& rest = BackwardShared<T, Tile>::rest();
  if (threadIdx.x == 0) {
    constexpr int kWarps = Tile::kGroups * kWarpgroup / kWarp;
    rest.ring.init(2, kWarps);
    ptx::mbarrier_init(&rest.keys_full, 1);
    rest.grads.init(kWarps, 1);
    ptx::fence_mbarrier_init();
  }
  __syncthreads();
  const BackwardPlace place = backward_place<Tile>(a, schedule);
  if (place.first_key >= place.s.keys) return;
  const int group = threadIdx.x / kWarpgroup;
  if (group < Tile::kGroups) {
    ptx::more_registers<Tile::kConsumerRegisters>();
    differentiate<T, Tile>(a, place, maps, group);
    return;
  }
  ptx::fewer_registers<Tile::kProducerRegisters>();
  const int warp = threadIdx.x % kWarpgroup / kWarp;
  if (warp == 0 && lane_of() == 0) load_tiles<T, Tile>(place, maps);
  if (warp == 1) load_statistics<T, Tile>(a, place, sums);
  if (warp == 2 && lane_of() == 0) add_grad_query<T, Tile>(a, place, sums);
}

// One block: a tile of queries of one head, as BackwardTile has them; a warpgroup one part.
template <typename T, typename Tile>
__global__ void __launch_bounds__(kParts* kWarpgroup)
    attention_grad_query_kernel(const __grid_constant__ Attention a, const __grid_constant__ BackwardSums sums,
                                T* grad_query, int64_t stride_b, int64_t stride_h, int64_t stride_s) {
  using Staged = SharedTile<T, kPanel, kPanel>;
  const int tiles = tiles_up_to(a.seqlen_q, Tile::kQueries), tile = blockIdx.x % tiles;
  const int sequence_head = blockIdx.x / tiles, head = sequence_head % a.heads;
  const Sequence s = sequence_at(a, sequence_head / a.heads);
  const int part = threadIdx.x / kWarpgroup, warp_row = threadIdx.x % kWarpgroup / kWarp * 16;
  const int first_query = tile * Tile::kQueries + part * kPanel % Tile::kQueries;
  const int first_column = part * kPanel % Tile::kWidth;
  if (first_query >= s.queries) return;
  const float* from = sums.grad_query + (sums.tile<Tile>(a, s, head, tile) * kParts + part) * kPartFloats;
  QueryPart values;
#pragma unroll
  for (int i = 0; i < QueryPart::kColumnTiles; ++i) {
    const auto four = load<4>(part_floats(from, i));
#pragma unroll
    for (int e = 0; e < 4; ++e) values.values[0][i][e] = four.values[e] * a.scale;
  }
  const Staged staged{shared_memory<T>() + part * Staged::kElements};
  store_tile(staged, warp_row, 0, values);
  __syncwarp();
  const int64_t strides[3] = {stride_b, stride_h, stride_s};
  const auto to = head_rows(grad_query + first_column, strides, s.query_entry, head, s.first_query, s.queries);
  copy_out<16, kWarp>(staged, warp_row, a.head_dim - first_column, lane_of(),
                      [&](int row) { return to(first_query + row); });
}

template <typename T, int kWidth>
void launch_backward(const AttentionCall& call, const BackwardMaps& maps, const Tensor& lse, const Tensor& delta,
                     const Tensor& grad_query, const OnDevice& device) {
  using Tile = BackwardTile<kWidth>;
  const Attention& a = call.inputs;
  const int64_t longest = ceil_div(a.seqlen_q, Tile::kQueries);
  const int64_t tiles =
      a.cu_seqlens_q != nullptr ? a.query_rows / Tile::kQueries + call.sequences : int64_t{call.sequences} * longest;
  Tensor grads = new_tensor(grad_query, {a.heads, tiles, kParts, kPartFloats}, ScalarType::Float);
  Tensor turns = new_tensor(grad_query, {a.heads, tiles}, ScalarType::Int);
  torch::stable::zero_(grads);
  torch::stable::zero_(turns);
  const BackwardSums sums{pointer<float>(lse), pointer<float>(delta), mutable_pointer<float>(grads),
                          mutable_pointer<int>(turns), tiles};
  const int64_t key_tiles = ceil_div(a.seqlen_k, Tile::kKeys);
  // Of queries, their gradients, and the sums.
  const int64_t bytes = int64_t{a.heads / a.kv_heads} * a.seqlen_q * kWidth * (2 + 2 + 4);
  launch(attention_backward_hopper_kernel<T, Tile>, grid_of(int64_t{call.sequences} * a.kv_heads * key_tiles),
         dim3(Tile::kThreads), BackwardShared<T, Tile>::kBytes, device.stream, a, maps,
         head_schedule(device, call.sequences, a.kv_heads, 1, key_tiles, bytes), sums);
  launch(attention_grad_query_kernel<T, Tile>, grid_of(int64_t{call.sequences} * a.heads * longest),
         dim3(kParts * kWarpgroup), kParts * kPartFloats * sizeof(T), device.stream, a, sums,
         mutable_pointer<T>(grad_query), grad_query.stride(0), grad_query.stride(1), grad_query.stride(2));
}

}  // namespace

void attention_backward_hopper(const AttentionCall& call, const Tensor& grad_output, const Tensor& lse,
                               const Tensor& delta, const Tensor& grad_query, const Tensor& grad_key,
                               const Tensor& grad_value, const OnDevice& device) {
  pointer(grad_output);
  mutable_pointer(grad_key);
  mutable_pointer(grad_value);
  for_hopper_width<kWidestBackward>(call, [&]<typename T, int kWidth>() {
    using Tile = BackwardTile<kWidth>;
    const bool packed_q = call.inputs.cu_seqlens_q != nullptr, packed_k = call.inputs.cu_seqlens_k != nullptr;
    const BackwardMaps maps{.query = rows_map(call.query, call.dtype, Tile::kQueries, packed_q),
                            .grad_output = rows_map(grad_output, call.dtype, Tile::kQueries, packed_q),
                            .key = rows_map(call.key, call.dtype, Tile::kKeys, packed_k),
                            .value = rows_map(call.value, call.dtype, Tile::kKeys, packed_k),
                            .grad_key = rows_map(grad_key, call.dtype, Tile::kGroupKeys, packed_k),
                            .grad_value = rows_map(grad_value, call.dtype, Tile::kGroupKeys, packed_k)};
    launch_backward<T, kWidth>(call, maps, lse, delta, grad_query, device);
  });
}

}  // namespace fastformer::cuda
