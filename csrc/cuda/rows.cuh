// What kernels over rows share: which threads work on a row, how they read and write it, their sums and maxima.
#pragma once

#include "common.h"
#include "ptx.cuh"

namespace fastformer::cuda {

// The elements of the widest access.
template <typename T>
constexpr int kWidest = 16 / static_cast<int>(sizeof(T));
// The elements of a row that one thread holds in registers, read kPack together: four of the widest accesses, or 16
// single elements.
template <int kPack>
constexpr int kHeld = kPack == 1 ? 16 : 4 * kPack;

// A team is the threads that share a row: kLanes neighbours in a warp, or the whole block. kLanes is then kBlock, or
// kLargeBlock if the block has that size always: so that places a whole number of teams apart cost one address.
constexpr int kBlock = 0;
constexpr int kCluster = -1;      // all blocks of a cluster, each of which has a part of the row: rows_hopper.cuh
constexpr int kSmallBlock = 128;  // threads of a block of several teams
constexpr int kLargeBlock = 512;  // at most, of a block that is one: 1024 would have 64 registers each, too few

// How blocks go over a row that is too wide for registers.
struct Parts {
  int blocks;       // that share it: 1, or those of a cluster
  int64_t columns;  // of each one's part; the last one's may have fewer
  int64_t kept;     // of a part's first columns: those that shared memory has room for
};

template <int kLanes>
class Team {
 public:
  static constexpr bool kIsBlock = kLanes == kBlock || kLanes == kLargeBlock;
  static constexpr int kThreads = kIsBlock ? kLargeBlock : kSmallBlock;  // of the block, at most
  static constexpr int kSharedBytes = kIsBlock ? 2 * kWarp * static_cast<int>(sizeof(float)) : 0;

  Team() = default;
  FASTFORMER_DEVICE explicit Team(const Parts&) {}  // of one block

  FASTFORMER_DEVICE int size() const { return kLanes == kBlock ? blockDim.x : kLanes; }
  FASTFORMER_DEVICE int rank() const { return kIsBlock ? threadIdx.x : threadIdx.x % kLanes; }
  FASTFORMER_DEVICE int64_t row() const {
    if constexpr (kIsBlock) {
      return blockIdx.x;
    } else {
      return static_cast<int64_t>(blockIdx.x) * (blockDim.x / kLanes) + threadIdx.x / kLanes;
    }
  }

  FASTFORMER_DEVICE int first_column() const { return 0; }  // of the block's part of the row
  // Whether this is the thread that stores what there is one of a row.
  FASTFORMER_DEVICE bool is_first() const { return rank() == 0; }

  // This thread's columns, from where the team starts: packs of kPack neighbours, one a thread in turn.
  template <int kPack>
  FASTFORMER_DEVICE int column(int pack) const {
    return (pack * size() + rank()) * kPack;
  }

  // Over the team; each thread gets the same. All threads of the block call it, also those whose row does not exist.
  FASTFORMER_DEVICE float sum(float x) {
    return over_team(x, 0.0f, [](float a, float b) { return a + b; });
  }
  // NaN counts for nothing, as in fmaxf.
  FASTFORMER_DEVICE float max(float x) {
    return over_team(x, -INFINITY, [](float a, float b) { return fmaxf(a, b); });
  }

 private:
  template <int kCount, typename Combine>
  FASTFORMER_DEVICE static float over_lanes(float x, Combine combine) {
#pragma unroll
    for (int lane = kCount / 2; lane > 0; lane /= 2) x = combine(x, __shfl_xor_sync(kAllLanes, x, lane));
    return x;
  }

  template <typename Combine>
  FASTFORMER_DEVICE float over_team(float x, float nothing, Combine combine) {
    if constexpr (!kIsBlock) {
      return over_lanes<kLanes>(x, combine);
    } else {
      // One barrier each: the two halves of the scratch memory take turns. A thread writes to a half again only after
      // the barrier of the call in between, to which every thread comes after it has read that half.
      float* each_warp = shared_memory<float>() + turn_ * kWarp;
      turn_ ^= 1;
      x = over_lanes<kWarp>(x, combine);
      const int lane = threadIdx.x % kWarp;
      if (lane == 0) each_warp[threadIdx.x / kWarp] = x;
      __syncthreads();
      return over_lanes<kWarp>(lane < size() / kWarp ? each_warp[lane] : nothing, combine);
    }
  }

  int turn_ = 0;
};

template <>
class Team<kCluster>;

// Calls apply(first, column) for each pack of a thread's columns before `columns`: `first` is the place of its first
// element among the kCount that the thread holds.
template <int kPack, int kCount, int kLanes, typename Apply>
FASTFORMER_DEVICE void for_packs(const Team<kLanes>& team, int columns, Apply apply) {
#pragma unroll
  for (int p = 0; p < kCount / kPack; ++p) {
    const int column = team.template column<kPack>(p);
    if (column < columns) apply(p * kPack, column);
  }
}

// 0 where a column doesn't exist.
template <int kPack, typename T, int kCount, int kLanes>
FASTFORMER_DEVICE void load_row(T (&values)[kCount], const T* row, int columns, const Team<kLanes>& team) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) values[i] = T{};
  for_packs<kPack, kCount>(team, columns, [&](int first, int column) {
    const Pack<T, kPack> pack = load<kPack>(row + column);
#pragma unroll
    for (int i = 0; i < kPack; ++i) values[first + i] = pack.values[i];
  });
}

// To global memory. The compiler makes up to eight stores of one whose parts it has put together: each has a part of
// every sector that 16 bytes a thread fill.
template <int kCount, typename T>
FASTFORMER_DEVICE void store_global(T* to, const Pack<T, kCount>& pack) {
#ifndef FASTFORMER_SIMT
  if constexpr (sizeof(pack) == 16) {
    return ptx::store_global(to, words_of(pack).values);
  }
#endif
  store(to, pack);
}

template <int kPack, typename T, int kCount>
FASTFORMER_DEVICE Pack<T, kPack> pack_at(const T (&values)[kCount], int first) {
  Pack<T, kPack> pack;
#pragma unroll
  for (int i = 0; i < kPack; ++i) pack.values[i] = values[first + i];
  return pack;
}

// To global memory. V: T, or float, which is rounded.
template <int kPack, typename T, typename V, int kCount, int kLanes>
FASTFORMER_DEVICE void store_row(T* row, const V (&values)[kCount], int columns, const Team<kLanes>& team) {
  for_packs<kPack, kCount>(team, columns, [&](int first, int column) {
    if constexpr (__is_same(T, float)) {  // one access as it is, and in the registers there are
      store(row + column, pack_at<kPack>(values, first));
    } else if constexpr (__is_same(T, V)) {
      store_global(row + column, pack_at<kPack>(values, first));
    } else {
      store_global(row + column, round_to_pack<T, kPack>(&values[first]));
    }
  });
}

// To shared memory.
template <int kPack, typename T, int kCount, int kLanes>
FASTFORMER_DEVICE void keep_row(T* kept, const T (&values)[kCount], int columns, const Team<kLanes>& team) {
  for_packs<kPack, kCount>(team, columns,
                           [&](int first, int column) { store(kept + column, pack_at<kPack>(values, first)); });
}

// kCount neighbours as float, in as few accesses as there can be if `from` is kAligned to all their bytes, or to 16.
template <bool kAligned, int kCount, typename T>
FASTFORMER_DEVICE void load_floats(float (&to)[kCount], const T* from) {
  constexpr int kMost = kAligned ? kWidest<T> : 1, kPack = kCount < kMost ? kCount : kMost;
#pragma unroll
  for (int i = 0; i < kCount; i += kPack) {
    const Pack<T, kPack> pack = load<kPack>(from + i);
#pragma unroll
    for (int j = 0; j < kPack; ++j) to[i + j] = to_float(pack.values[j]);
  }
}
template <bool kAligned, int kCount, typename T>
FASTFORMER_DEVICE void store_floats(T* to, const float (&from)[kCount]) {
  constexpr int kMost = kAligned ? kWidest<T> : 1, kPack = kCount < kMost ? kCount : kMost;
#pragma unroll
  for (int i = 0; i < kCount; i += kPack) {
    const Pack<T, kPack> pack = round_to_pack<T, kPack>(&from[i]);
    if constexpr (sizeof(T) == 2) {
      store_global(to + i, pack);
    } else {
      store(to + i, pack);
    }
  }
}

// What is left of a row to one step of a loop over it: `step` at most, and 0 beyond the end.
FASTFORMER_DEVICE int at_most(int step, int64_t left) {
  return left < 0 ? 0 : static_cast<int>(left < step ? left : step);
}

FASTFORMER_DEVICE int64_t fewer(int64_t a, int64_t b) { return a < b ? a : b; }

// exp(score - peak), twice as cheap as expf. The difference is taken first: its rounding is what counts for huge ones.
FASTFORMER_DEVICE float exp_below(float score, float peak) {
  constexpr float kLog2E = 1.44269504f;
  return ptx::ex2((score - peak) * kLog2E);
}

// With all columns masked out the maximum is -inf; the exponentials are then 0 below any finite one, never NaN.
FASTFORMER_DEVICE float finite(float peak) { return peak == -INFINITY ? 0.0f : peak; }

// x [..., C], not empty, as [N, C] of unit stride.
struct Rows {
  Tensor tensor;
  int64_t count, columns, stride;  // stride: elements from row to row
};

// Copies only where no such view exists.
inline Rows as_rows(const Tensor& x) {
  const int64_t columns = x.size(x.dim() - 1), count = x.numel() / columns;
  bool is_view = columns == 1 || x.stride(x.dim() - 1) == 1;
  int64_t stride = columns, merged = 1;  // merged: rows of the dimensions so far
  for (int64_t i = x.dim() - 2; i >= 0; --i) {
    if (x.size(i) == 1) continue;
    if (merged == 1) stride = x.stride(i);
    is_view = is_view && x.stride(i) == stride * merged;
    merged *= x.size(i);
  }
  if (!is_view) return {torch::stable::contiguous(x), count, columns, columns};
  return {x, count, columns, stride};
}

// Whether every access to such rows can be of the widest kind.
inline bool takes_widest(const Rows& rows) {
  const int64_t widest = 16 / rows.tensor.element_size();
  return is_aligned(rows.tensor) && rows.stride % widest == 0 && rows.columns % widest == 0;
}

// Calls body.operator()<kLanes, kLooped>(grid, block) for rows of which a thread holds kHeldColumns. Eight lanes have
// rows of up to 512 bytes (in 16-byte accesses), four rows a warp, so that short rows leave few lanes idle; a warp 2
// KB, without a barrier; a block 32 KB, with no more threads than the row fills. Wider rows a block goes over in a
// loop.
template <int kHeldColumns, typename Body>
void for_team(int64_t rows, int64_t columns, Body&& body) {
  const auto grid = [&](int64_t rows_a_block) { return dim3(static_cast<unsigned>((rows - 1) / rows_a_block + 1)); };
  const int64_t threads = (columns - 1) / kHeldColumns + 1;
  if (threads <= 8) {
    body.template operator()<8, false>(grid(kSmallBlock / 8), dim3(kSmallBlock));
  } else if (threads <= kWarp) {
    body.template operator()<kWarp, false>(grid(kSmallBlock / kWarp), dim3(kSmallBlock));
  } else if (threads <= kLargeBlock) {
    body.template operator()<kBlock, false>(grid(1), dim3(static_cast<unsigned>((threads - 1) / kWarp + 1) * kWarp));
  } else {
    body.template operator()<kBlock, true>(grid(1), dim3(kLargeBlock));
  }
}

// A cluster's blocks, at most: more the hardware does not promise.
constexpr int kMostBlocks = 8;
// Shared memory for the cluster's sums and maxima, beside those of the block.
constexpr int kClusterSharedBytes = Team<kBlock>::kSharedBytes + 2 * kMostBlocks * static_cast<int>(sizeof(float));

// Where rows are kept that take `column_bytes` of shared memory a column: in one block if it has room for them, else,
// on Hopper, in the fewest blocks of a cluster that have, else nowhere. Parts are multiples of 64 columns, so that
// those of aligned rows start at a whole line of 128 bytes. Smaller parts, of which two fit on a multiprocessor, may be
// better: one's stores would overlap the other's loads. No measurement yet says so.
inline Parts parts_of(int64_t columns, int64_t column_bytes, const OnDevice& device) {
  const auto fit = [&](int64_t part, int64_t scratch) {
    return scratch + part * column_bytes <= device.shared_memory_limit();
  };
  if (fit(columns, Team<kBlock>::kSharedBytes)) return {1, columns, columns};
  if (FASTFORMER_HAS_HOPPER && device.is_hopper()) {
    for (int blocks = 2; blocks <= kMostBlocks; blocks *= 2) {
      const int64_t part = ceil_div(columns, blocks * 64) * 64;
      if (fit(part, kClusterSharedBytes)) return {blocks, part, part};
    }
  }
  return {1, columns, 0};
}

}  // namespace fastformer::cuda
