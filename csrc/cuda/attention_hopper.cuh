// What attention's kernels for sm_90a share, and what they offer to attention.cu and attention_backward.cu.
#pragma once

#include "attention_backward.cuh"
#include "tile_hopper.cuh"

namespace fastformer::cuda {

// The widest that they have, forward and backward.
constexpr int kWidestForward = 256, kWidestBackward = 128;

// Whether they can do a call: plain scores, no wider than `widest`, more queries than a warpgroup has rows, no pages,
// and no keys behind those that are used, unless packed: what TMA brings besides must be zeros, since a weight of 0
// would not hide infinities.
bool suits_hopper(const AttentionCall& call, int widest, const OnDevice& device);

// To `output` [B, H, Sq, Dv] and `lse` [B, H, Sq], contiguous.
void attention_forward_hopper(const AttentionCall& call, const Tensor& output, const Tensor& lse,
                              const OnDevice& device);

// To grad_query, grad_key and grad_value of the widths of the call's tensors. `grad_output` has aligned rows, `lse` and
// `delta` are contiguous.
void attention_backward_hopper(const AttentionCall& call, const Tensor& grad_output, const Tensor& lse,
                               const Tensor& delta, const Tensor& grad_query, const Tensor& grad_key,
                               const Tensor& grad_value, const OnDevice& device);

// Calls body.operator()<T, kWidth>() for the element type and the compiled width.
template <int kWidest, typename Body>
void for_hopper_width(const AttentionCall& call, Body&& body) {
  const int width = std::max(call.inputs.head_dim, call.inputs.value_dim);
  const auto run = [&]<typename T>() {
    if (width <= 64) {
      body.template operator()<T, 64>();
    } else if (width <= 128) {
      body.template operator()<T, 128>();
    } else if constexpr (kWidest == 256) {
      body.template operator()<T, 256>();
    }
  };
  call.dtype == DType::bfloat16 ? run.template operator()<BFloat16>() : run.template operator()<Half>();
}

// --- the order of tiles

// All tiles of all heads: those of `heads_at_once` heads, which find what they share in the L2 cache, the last tile of
// each first; then those of the next heads.
struct HeadSchedule {
  int heads, heads_of_sequence;
  int heads_at_once;
  int tiles;  // of a head

  struct Place {
    int sequence, head, tile;
  };
  FASTFORMER_DEVICE Place place(int number) const {
    const int first = number / (heads_at_once * tiles) * heads_at_once, count = min(heads_at_once, heads - first);
    const int within = number - first * tiles;
    const int head = first + within % count;
    return {head / heads_of_sequence, head % heads_of_sequence, tiles - 1 - within / count};
  }
};

// `group` heads that share keys are not parted; their `bytes` are to stay in half of the cache: the rest is for what
// comes and goes. Raises if the tiles, and a grid more of them, are too many to be numbered by an int.
inline HeadSchedule head_schedule(const OnDevice& device, int sequences, int heads_of_sequence, int64_t group,
                                  int64_t tiles, int64_t bytes) {
  const int64_t heads = int64_t{sequences} * heads_of_sequence;
  grid_of(heads * tiles + device.multiprocessors());
  const int64_t groups = std::max<int64_t>(device.l2_bytes() / 2 / bytes, 1);
  return {static_cast<int>(heads), heads_of_sequence, static_cast<int>(std::min(groups * group, heads)),
          static_cast<int>(tiles)};
}

// --- rows

// [B, H, S, D] as boxes of 64 columns and `rows` rows of a head.
//
// Packed sequences lie one behind the other, and each is to end, for TMA, where the next begins. So row `r` of one that
// has n rows from row f on is told as row 2^30 - n + r of 2^30, and two more dimensions make up for it: their
// coordinates f + n and 2^30, by strides of a row and of 2^34 elements less a row, come to the right address modulo
// 2^64 (as in triton/tools/ragged_tma.py).
constexpr int kEndOfPacked = 1 << 30;

inline TensorMap rows_map(const Tensor& tensor, DType dtype, int rows, bool packed) {
  // The stride of a dimension of one entry may be anything.
  const auto stride = [&](int64_t i) { return tensor.size(i) > 1 ? tensor.stride(i) : kChunk; };
  Boxes<5> boxes{.data = tensor.const_data_ptr(),
                 .dtype = dtype,
                 .sizes = {tensor.size(3), tensor.size(2), tensor.size(1), tensor.size(0), 1},
                 .strides = {1, stride(2), stride(1), stride(0), kChunk},
                 .box = {kPanel, rows, 1, 1, 1},
                 .swizzle = Swizzle::bytes128};
  if (packed) {
    boxes.sizes[1] = kEndOfPacked;
    boxes.sizes[3] = boxes.sizes[4] = 0x7fff0000;
    boxes.strides[3] = stride(2);
    boxes.strides[4] = (int64_t{1} << 34) - stride(2);
  }
  return tensor_map(boxes);
}

// A sequence's rows in such a map.
struct RowsInMap {
  int first, entry, around;  // coordinates: of the first row, and of the dimensions behind the heads

  FASTFORMER_DEVICE RowsInMap(bool packed, int entry, int first, int count)
      : first(packed ? kEndOfPacked - count : 0),
        entry(packed ? first + count : entry),
        around(packed ? kEndOfPacked : 0) {}
};
FASTFORMER_DEVICE RowsInMap queries_in_map(const Attention& a, const Sequence& s) {
  return {a.cu_seqlens_q != nullptr, s.query_entry, s.first_query, s.queries};
}
FASTFORMER_DEVICE RowsInMap keys_in_map(const Attention& a, const Sequence& s) {
  return {a.cu_seqlens_k != nullptr, s.key_entry, s.first_key, s.keys};
}

// TMA has no stride of 0.
inline bool is_expanded(const Tensor& tensor) {
  for (int64_t i = 0; i < 3; ++i) {
    if (tensor.size(i) > 1 && tensor.stride(i) == 0) return true;
  }
  return false;
}

// Begins to load rows of a head, from `row` on, into a tile; by one thread.
template <typename Tile>
FASTFORMER_DEVICE void load_rows(const Tile& tile, const TensorMap& map, Mbarrier* full, const RowsInMap& rows, int row,
                                 int head) {
#pragma unroll
  for (int i = 0; i < Tile::kPanels; ++i) {
    ptx::tma_load(tile.panel(i), map, full, {i * kPanel, rows.first + row, head, rows.entry, rows.around});
  }
}

// Begins to store rows of a tile, from first_row on, as many as the map's boxes have; by one thread.
template <typename Tile>
FASTFORMER_DEVICE void store_rows(const TensorMap& map, const Tile& tile, int first_row, const RowsInMap& rows, int row,
                                  int head) {
#pragma unroll
  for (int i = 0; i < Tile::kPanels; ++i) {
    ptx::tma_store(map, tile.panel(i) + first_row * kPanel,
                   {i * kPanel, rows.first + row, head, rows.entry, rows.around});
  }
  ptx::tma_store_commit();
}

// --- products of a warpgroup, begun

// sum = rows of a (from first_row on) by rows of b, over the width of both.
template <int kColumnTiles, typename TileA, typename TileB>
FASTFORMER_DEVICE void begin_rows_by_rows(Accumulator<1, kColumnTiles>& sum, const TileA& a, int first_row,
                                          const TileB& b) {
  static_assert(TileB::kRows == 8 * kColumnTiles);
#pragma unroll
  for (int depth = 0; depth < TileB::kColumns; depth += 16) {
    ptx::wgmma<typename TileB::Element, false, false>(sum.values[0], a.rows_at(first_row, depth), b.rows_at(0, depth),
                                                      depth > 0);
  }
  ptx::wgmma_commit();
}

// sum += a b, with a's fragments in registers, and b's rows the steps of the depth.
template <int kColumnTiles, int kSteps, typename TileB>
FASTFORMER_DEVICE void begin_fragments_by_columns(Accumulator<1, kColumnTiles>& sum, const uint32_t (&a)[kSteps][4],
                                                  const TileB& b) {
  static_assert(TileB::kColumns == 8 * kColumnTiles && TileB::kRows == 16 * kSteps);
#pragma unroll
  for (int i = 0; i < kSteps; ++i) {
    ptx::wgmma<typename TileB::Element, true>(sum.values[0], a[i], b.columns_at(16 * i), true);
  }
  ptx::wgmma_commit();
}

// An accumulator, rounded to T, as fragments.
template <typename T, int kSteps>
FASTFORMER_DEVICE void round_to_fragments(uint32_t (&to)[kSteps][4], const Accumulator<1, 2 * kSteps>& values) {
#pragma unroll
  for (int i = 0; i < kSteps; ++i) {
    const FragmentA fragment = as_fragment<T>(values.values[0][2 * i], values.values[0][2 * i + 1]);
#pragma unroll
    for (int k = 0; k < 4; ++k) to[i][k] = fragment.values[k];
  }
}

}  // namespace fastformer::cuda
