// Attention's forward pass on Hopper, as FlashAttention-3 does it (arXiv 2407.08608): TMA brings tiles to shared
// memory, asked for by one thread; warpgroups of 64 queries each multiply them by wgmma. While a warpgroup is at its
// softmax, the tensor cores work on its own last weights, and on the scores of the others, by turns. Blocks are
// persistent.
//
// The walk over the keys is that of attention.cu, from the last tile seen to the first. Legend of shapes:
// attention.cuh.
#include "attention_hopper.cuh"
#include "attention_softmax.cuh"

namespace fastformer::cuda {
namespace {

// width  queries x keys  warpgroups  registers of each thread: scores, output, weights, all; of the producer
//    64    192 x 128         3                                    64      32      32   160          32
//   128    128 x 128         2                                    64      64      32   240          24
//   256    128 x  64         2                                    32     128      16   240          24
//
// Shared memory: queries, output, and a ring of 4 tiles of keys and values by turns: 112 KB and 192 KB. Of width 256,
// 192 KB without a place for the output: it takes that of the queries.
template <int kWidth_>
struct HopperTile {
  static constexpr int kWidth = kWidth_, kGroups = kWidth == 64 ? 3 : 2, kStages = 4;
  static constexpr int kGroupQueries = 64, kQueries = kGroups * kGroupQueries, kKeys = kWidth == 256 ? 64 : 128;
  static constexpr int kThreads = (kGroups + 1) * kWarpgroup, kConsumerWarps = kGroups * kWarpgroup / kWarp;
  static constexpr int kProducerRegisters = kWidth == 64 ? 32 : 24, kConsumerRegisters = kWidth == 64 ? 160 : 240;
  static constexpr bool kOutputOverQueries = kWidth == 256;
  static_assert(kProducerRegisters + kGroups * kConsumerRegisters <= (kGroups + 1) * launch_registers(kThreads));
};

struct HopperMaps {
  TensorMap query, key, value, output;
};

template <typename T, typename Tile>
struct HopperShared {
  using QueryTile = PanelTile<T, Tile::kQueries, Tile::kWidth>;
  using KeyTile = PanelTile<T, Tile::kKeys, Tile::kWidth>;
  using KeyRing = Ring<Tile::kStages>;
  struct Barriers {
    KeyRing ring;
    Mbarrier query_full, query_empty;
  };
  static constexpr int kBytes =
      (Tile::kOutputOverQueries ? 1 : 2) * QueryTile::kBytes + Tile::kStages * KeyTile::kBytes + sizeof(Barriers);

  FASTFORMER_DEVICE static QueryTile query() { return {shared_memory<T>()}; }
  FASTFORMER_DEVICE static KeyTile stage(int i) {
    return {shared_memory<T>() + QueryTile::kElements + i * KeyTile::kElements};
  }
  FASTFORMER_DEVICE static QueryTile output() {
    return Tile::kOutputOverQueries ? query() : QueryTile{stage(Tile::kStages).data};
  }
  FASTFORMER_DEVICE static Barriers& barriers() {
    T* end = stage(Tile::kStages).data + (Tile::kOutputOverQueries ? 0 : QueryTile::kElements);
    return *reinterpret_cast<Barriers*>(end);
  }
};

// One thread asks for all tiles, in the order in which the consumers take them: the keys are one tile ahead of the
// values.
template <typename T, typename Tile>
FASTFORMER_DEVICE void load_tiles(const Attention& a, const HopperMaps& maps, const HeadSchedule& schedule) {
  using Shared = HopperShared<T, Tile>;
  auto& barriers = Shared::barriers();
  typename Shared::KeyRing::Place place;
  int query_parity = 1;
  for (int number = blockIdx.x; number < schedule.heads * schedule.tiles; number += gridDim.x) {
    const auto [sequence, head, query_tile] = schedule.place(number);
    const int first_query = query_tile * Tile::kQueries;
    const Sequence s = sequence_at(a, sequence);
    const TileRange range = key_tiles<Tile::kKeys>(a, s, first_query, Tile::kQueries);
    if (first_query >= s.queries) continue;
    const int kv_head = head / (a.heads / a.kv_heads);
    ptx::mbarrier_wait(&barriers.query_empty, query_parity);
    query_parity ^= 1;
    ptx::mbarrier_arrive_expect(&barriers.query_full, Shared::QueryTile::kBytes);
    load_rows(Shared::query(), maps.query, &barriers.query_full, queries_in_map(a, s), first_query, head);
    const RowsInMap keys = keys_in_map(a, s);
    const auto load_next = [&](const TensorMap& map, int tile) {
      barriers.ring.begin_fill(place, Shared::KeyTile::kBytes);
      load_rows(Shared::stage(place.stage), map, &barriers.ring.full[place.stage], keys, tile * Tile::kKeys, kv_head);
      place.advance();
    };
    if (range.begin < range.end) load_next(maps.key, range.end - 1);
    for (int tile = range.end - 1; tile >= range.begin; --tile) {
      if (tile > range.begin) load_next(maps.key, tile - 1);
      load_next(maps.value, tile);
    }
  }
}

// The warpgroups' turns at the tensor cores: named barriers, one for each, of the threads that wait for their turn and
// of those that pass it on.
template <typename Tile>
FASTFORMER_DEVICE void take_turn(int group) {
  ptx::barrier_sync(1 + group, 2 * kWarpgroup);
}
template <typename Tile>
FASTFORMER_DEVICE void pass_turn(int group) {
  ptx::barrier_arrive(1 + (group + 1 == Tile::kGroups ? 0 : group + 1), 2 * kWarpgroup);
}

// The part of a warpgroup in a block's tiles.
template <typename T, typename Tile>
FASTFORMER_DEVICE void attend(const Attention& a, const HopperMaps& maps, const HeadSchedule& schedule, float* lse,
                              int group) {
  using Shared = HopperShared<T, Tile>;
  constexpr int kKeys = Tile::kKeys;
  auto& barriers = Shared::barriers();
  auto& ring = barriers.ring;
  const int warp_row = threadIdx.x % kWarpgroup / kWarp * 16;
  typename Shared::KeyRing::Place place;
  int query_parity = 0;
  if (group == Tile::kGroups - 1) pass_turn<Tile>(group);
  for (int number = blockIdx.x; number < schedule.heads * schedule.tiles; number += gridDim.x) {
    const auto [sequence, head, query_tile] = schedule.place(number);
    const int first_query = query_tile * Tile::kQueries;
    const Sequence s = sequence_at(a, sequence);
    if (first_query >= s.queries) continue;
    const TileRange range = key_tiles<kKeys>(a, s, first_query, Tile::kQueries);
    const int first_row = first_query + group * Tile::kGroupQueries, row = first_row + warp_row;
    const TileRange mine = key_tiles<kKeys>(a, s, first_row, Tile::kGroupQueries);
    Accumulator<1, Tile::kWidth / 8> output;  // sum of weights * value so far
    RowValues<1> peak, total;                 // see softmax_step
    output.fill(0.0f);
    peak.fill(-INFINITY);
    total.fill(0.0f);
    ptx::mbarrier_wait(&barriers.query_full, query_parity);
    query_parity ^= 1;
    if (range.begin < range.end) {
      Accumulator<1, kKeys / 8> scores;
      uint32_t weights[kKeys / 16][4];
      const auto softmax = [&](int tile) {
        const bool edge = tile < mine.full || tile >= mine.full_end;
        hide<Scores::plain, BlockRows::queries>(a, s, Biases{}, edge, -INFINITY, row, tile * kKeys, scores);
        return softmax_step(scores, a.scale, peak, total);
      };
      ring.wait_full(place);
      ptx::wgmma_fence(scores.values[0]);
      begin_rows_by_rows(scores, Shared::query(), group * Tile::kGroupQueries, Shared::stage(place.stage));
      ptx::wgmma_wait<0>(scores.values[0]);
      ring.release(place);
      place.advance();
      softmax(range.end - 1);
      round_to_fragments<T>(weights, scores);
      for (int tile = range.end - 2; tile >= range.begin; --tile) {
        const auto of_keys = place;
        place.advance();
        ring.wait_full(of_keys);
        take_turn<Tile>(group);
        ptx::wgmma_fence(scores.values[0]);
        begin_rows_by_rows(scores, Shared::query(), group * Tile::kGroupQueries, Shared::stage(of_keys.stage));
        ring.wait_full(place);
        ptx::wgmma_fence(output.values[0], weights);
        begin_fragments_by_columns(output, weights, Shared::stage(place.stage));
        pass_turn<Tile>(group);
        ptx::wgmma_wait<1>(scores.values[0]);
        ring.release(of_keys);
        const RowValues<1> decay = softmax(tile);
        ptx::stay_behind(total.values[0][0] + total.values[0][1]);
        ptx::wgmma_wait<0>(output.values[0], weights);
        ring.release(place);
        place.advance();
        scale_down(output, decay);
        round_to_fragments<T>(weights, scores);
      }
      ring.wait_full(place);
      ptx::wgmma_fence(output.values[0], weights);
      begin_fragments_by_columns(output, weights, Shared::stage(place.stage));
      ptx::wgmma_wait<0>(output.values[0], weights);
      ring.release(place);
      place.advance();
    }
    __syncwarp();  // without keys, lanes may still wait for the queries that are there: not for the next ones
    if (!Tile::kOutputOverQueries && lane_of() == 0) ptx::mbarrier_arrive(&barriers.query_empty);

    reduce_lanes(total, [](float x, float y) { return x + y; });
    RowValues<1> multiplier;
    float* lse_of_head = lse + first_statistic(a, s, head);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const RowEnd end = end_row(a, head, peak.values[0][half] * a.scale, total.values[0][half]);
      multiplier.values[0][half] = end.multiplier;
      const int query = row + half * 8 + lane_of() / 4;
      if (lane_of() % 4 == 0 && query < s.queries) lse_of_head[query] = end.lse;
    }
    for_each_with_row(output, multiplier, [](float& x, float by) { x *= by; });
    // The output goes through shared memory, which the store before may still read; a warpgroup has its own rows there.
    const int staged_row = group * Tile::kGroupQueries;
    const bool stores = threadIdx.x % kWarpgroup == 0;
    const int own_barrier = 1 + Tile::kGroups + group;
    if (stores) ptx::tma_store_wait<0>();
    ptx::barrier_sync(own_barrier, kWarpgroup);
    store_tile(Shared::output(), staged_row + warp_row, 0, output);
    ptx::fence_proxy_async();
    ptx::barrier_sync(own_barrier, kWarpgroup);
    if (stores) {
      store_rows(maps.output, Shared::output(), staged_row, queries_in_map(a, s), first_row, head);
      if (Tile::kOutputOverQueries) {
        ptx::tma_store_wait<0>();
        ptx::mbarrier_arrive(&barriers.query_empty);
      }
    }
  }
  ptx::tma_store_wait<0>();
}

template <typename T, typename Tile>
__global__ void __launch_bounds__(Tile::kThreads, 1)
    attention_hopper_kernel(const __grid_constant__ Attention a, const __grid_constant__ HopperMaps maps,
                            const __grid_constant__ HeadSchedule schedule, float* lse) {
  auto& barriers = HopperShared<T, Tile>::barriers();
  if (threadIdx.x == 0) {
    barriers.ring.init(1, Tile::kConsumerWarps);
    ptx::mbarrier_init(&barriers.query_full, 1);
    ptx::mbarrier_init(&barriers.query_empty, Tile::kOutputOverQueries ? Tile::kGroups : Tile::kConsumerWarps);
    ptx::fence_mbarrier_init();
  }
  __syncthreads();
  const int group = threadIdx.x / kWarpgroup;
  if (group == Tile::kGroups) {
    ptx::fewer_registers<Tile::kProducerRegisters>();
    if (threadIdx.x % kWarpgroup == 0) load_tiles<T, Tile>(a, maps, schedule);
  } else {
    ptx::more_registers<Tile::kConsumerRegisters>();
    attend<T, Tile>(a, maps, schedule, lse, group);
  }
}

// --- the launch

template <typename T, int kWidth>
void launch_hopper(const AttentionCall& call, const Tensor& output, const Tensor& lse, const OnDevice& device) {
  using Tile = HopperTile<kWidth>;
  const Attention& a = call.inputs;
  mutable_pointer(output);
  const HopperMaps maps{.query = rows_map(call.query, call.dtype, Tile::kQueries, a.cu_seqlens_q != nullptr),
                        .key = rows_map(call.key, call.dtype, Tile::kKeys, a.cu_seqlens_k != nullptr),
                        .value = rows_map(call.value, call.dtype, Tile::kKeys, a.cu_seqlens_k != nullptr),
                        .output = rows_map(output, call.dtype, Tile::kGroupQueries, a.cu_seqlens_q != nullptr)};
  const int64_t heads = int64_t{call.sequences} * a.heads, tiles = ceil_div(a.seqlen_q, Tile::kQueries);
  const int64_t bytes = int64_t{2} * a.seqlen_k * (a.head_dim + a.value_dim);  // of a head's keys and values
  launch(attention_hopper_kernel<T, Tile>, grid_of(std::min<int64_t>(device.multiprocessors(), heads * tiles)),
         dim3(Tile::kThreads), HopperShared<T, Tile>::kBytes, device.stream, a, maps,
         head_schedule(device, call.sequences, a.heads, a.heads / a.kv_heads, tiles, bytes),
         mutable_pointer<float>(lse));
}

}  // namespace

bool suits_hopper(const AttentionCall& call, int widest, const OnDevice& device) {
  const Attention& a = call.inputs;
  return device.is_hopper() && call.plain() && a.block_table == nullptr &&
         (a.seqused_k == nullptr || a.cu_seqlens_k != nullptr) && std::max(a.head_dim, a.value_dim) <= widest &&
         std::min(a.head_dim, a.value_dim) > 0 && a.seqlen_q > 64 && a.seqlen_k > 0 && call.key.size(2) > 0 &&
         !is_expanded(call.query) && !is_expanded(call.key) && !is_expanded(call.value);
}

void attention_forward_hopper(const AttentionCall& call, const Tensor& output, const Tensor& lse,
                              const OnDevice& device) {
  for_hopper_width<kWidestForward>(
      call, [&]<typename T, int kWidth>() { launch_hopper<T, kWidth>(call, output, lse, device); });
}

}  // namespace fastformer::cuda
