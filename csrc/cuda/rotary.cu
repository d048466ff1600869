// Rotary position embedding of query and key in one launch, forward and backward.
//
// Feature pairs (first, second) are turned by an angle (Su et al., "RoFormer", 2021):
//   first' = first cos - second sin
//   second' = second cos + first sin
//
// Shapes: B batch, S length, D head_dim, R angles (2R <= D). Query and key may have different numbers of heads.
#include <algorithm>
#include <tuple>

#include "../rotary.h"
#include "rows.cuh"

namespace fastformer::cuda {
namespace {

// --- kernels

constexpr int kThreads = 256;

// Query or key.
template <typename T>
struct Side {
  const T* input;  // [B, heads, S, D], unit stride in D
  T* output;       // [B, S, heads, D], contiguous
  int64_t heads, stride_batch, stride_head, stride_position;
};

// The cosines or the sines: [(B,) S, R], unit stride in R.
template <typename Angle>
struct Table {
  const Angle* values;
  int64_t stride_batch, stride_position;
};

template <typename T, typename Angle>
struct Rotation {
  Side<T> query, key;
  Table<Angle> cos, sin;
  int64_t positions;  // B * S
  int64_t seqlen, head_dim, angles;
  float direction;  // -1 turns back: by the negative angle
};

// One head at one position.
template <typename T>
struct Row {
  const T* from;
  T* to;
};

template <typename T, typename Angle>
FASTFORMER_DEVICE Row<T> row_of(const Rotation<T, Angle>& args, int64_t place, int64_t batch, int64_t position,
                                int64_t head) {
  const bool is_key = head >= args.query.heads;
  if (is_key) head -= args.query.heads;
  const Side<T>& side = is_key ? args.key : args.query;
  return {side.input + batch * side.stride_batch + head * side.stride_head + position * side.stride_position,
          side.output + (place * side.heads + head) * args.head_dim};
}

// The pairs of two accesses (first, second), or of one where pairs are neighbours; at least one pair.
template <bool kInterleaved, int kPack>
constexpr int kPairsAThread = kInterleaved && kPack > 1 ? kPack / 2 : kPack;

// Threads along x share a row, those along y take different heads (query's, then key's), those along z different
// positions. A thread keeps its cos and sin for all its heads. kPack: as many elements as the widest access has, or 1.
template <typename T, typename Angle, bool kInterleaved, int kPack>
__global__ void __launch_bounds__(kThreads) rotate(const Rotation<T, Angle> args) {
  constexpr bool kAligned = kPack > 1;
  constexpr int kPairs = kPairsAThread<kInterleaved, kPack>;
  const int64_t place = static_cast<int64_t>(blockIdx.x) * blockDim.z + threadIdx.z;
  if (place >= args.positions) return;
  const int64_t batch = place / args.seqlen, position = place % args.seqlen;
  const int64_t heads = args.query.heads + args.key.heads;
  const int64_t first_head = static_cast<int64_t>(blockIdx.y) * blockDim.y + threadIdx.y;
  const int64_t head_step = static_cast<int64_t>(gridDim.y) * blockDim.y;
  const Angle* cos = args.cos.values + batch * args.cos.stride_batch + position * args.cos.stride_position;
  const Angle* sin = args.sin.values + batch * args.sin.stride_batch + position * args.sin.stride_position;

  for (int64_t i = threadIdx.x * kPairs; i < args.angles; i += blockDim.x * kPairs) {
    float c[kPairs], s[kPairs];
    load_floats<kAligned>(c, cos + i);
    load_floats<kAligned>(s, sin + i);
#pragma unroll
    for (int j = 0; j < kPairs; ++j) s[j] *= args.direction;
    for (int64_t head = first_head; head < heads; head += head_step) {
      const Row<T> row = row_of(args, place, batch, position, head);
      if constexpr (kInterleaved) {
        float pairs[2 * kPairs];
        load_floats<kAligned>(pairs, row.from + 2 * i);
#pragma unroll
        for (int j = 0; j < kPairs; ++j) {
          const float first = pairs[2 * j], second = pairs[2 * j + 1];
          pairs[2 * j] = first * c[j] - second * s[j];
          pairs[2 * j + 1] = second * c[j] + first * s[j];
        }
        store_floats<kAligned>(row.to + 2 * i, pairs);
      } else {
        float first[kPairs], second[kPairs];
        load_floats<kAligned>(first, row.from + i);
        load_floats<kAligned>(second, row.from + args.angles + i);
#pragma unroll
        for (int j = 0; j < kPairs; ++j) {
          const float old = first[j];
          first[j] = old * c[j] - second[j] * s[j];
          second[j] = second[j] * c[j] + old * s[j];
        }
        store_floats<kAligned>(row.to + i, first);
        store_floats<kAligned>(row.to + args.angles + i, second);
      }
    }
  }

  for (int64_t i = 2 * args.angles + threadIdx.x * kPack; i < args.head_dim; i += blockDim.x * kPack) {
    for (int64_t head = first_head; head < heads; head += head_step) {
      const Row<T> row = row_of(args, place, batch, position, head);
      store_global(row.to + i, load<kPack>(row.from + i));
    }
  }
}

// --- launchers

// Four heads a thread repay its loads of cos and sin.
constexpr int64_t kHeads = 4;
constexpr int64_t kMostBlockZ = 64, kMostGridY = 65535;

template <typename T, typename Angle, bool kInterleaved, int kPack>
void launch_rotate(const Rotation<T, Angle>& args, cudaStream_t stream) {
  const int64_t heads = args.query.heads + args.key.heads, rest = args.head_dim - 2 * args.angles;
  const int64_t packs = std::max(ceil_div(args.angles, kPairsAThread<kInterleaved, kPack>), ceil_div(rest, kPack));
  const int64_t x = std::clamp(packs, int64_t{1}, int64_t{kThreads});
  const int64_t y = std::clamp(ceil_div(heads, kHeads), int64_t{1}, kThreads / x);
  const int64_t z = std::min({kThreads / (x * y), kMostBlockZ, args.positions});
  const dim3 block(x, y, z), grid(ceil_div(args.positions, z), std::min(ceil_div(heads, y * kHeads), kMostGridY));
  launch(rotate<T, Angle, kInterleaved, kPack>, grid, block, 0, stream, args);
}

// --- operators

Tensor new_output(const Tensor& input) {
  return new_heads(input, input.size(0), input.size(1), input.size(2), input.size(3));
}

// Whether every access to rows of it, each `width` wide, can be of `bytes`.
bool takes_accesses(const Tensor& tensor, int64_t width, int64_t bytes) {
  const int64_t size = tensor.element_size();
  bool all = is_aligned(tensor, bytes) && width * size % bytes == 0;
  for (int64_t i = 0; i + 1 < tensor.dim(); ++i) all = all && tensor.stride(i) * size % bytes == 0;
  return all;
}

template <typename T>
Side<T> describe(const Tensor& input, const Tensor& output) {
  return {pointer<T>(input), mutable_pointer<T>(output), input.size(1), input.stride(0), input.stride(1),
          input.stride(2)};
}

template <typename Angle>
Table<Angle> describe(const Tensor& angles) {
  const int64_t position = angles.dim() - 2;
  return {pointer<Angle>(angles), position == 1 ? angles.stride(0) : 0, angles.stride(position)};
}

// Backward is the inverse: the gradients of the results, turned back.
template <bool kInverse>
std::tuple<Tensor, Tensor> rotary(const Tensor& query, const Tensor& key, const Tensor& cos, const Tensor& sin,
                                  bool interleaved) {
  const OnDevice device(query);
  const DType dtype = dtype_of(query, "query");
  check_rotary(query, key, cos, sin);
  check_device(key, "key", query, "query");
  check_device(cos, "cos", query, "query");
  check_device(sin, "sin", query, "query");
  const Tensor query_out = new_output(query), key_out = new_output(key);
  if (query.numel() + key.numel() == 0) return {query_out, key_out};
  const Tensor q = with_adjacent_features(query), k = with_adjacent_features(key);
  // The angles' kernels read float32 and the dtype of query.
  const bool as_query = cos.scalar_type() == query.scalar_type() && sin.scalar_type() == query.scalar_type();
  const Tensor c = with_adjacent_features(as_query ? cos : as_float(cos, "cos"));
  const Tensor s = with_adjacent_features(as_query ? sin : as_float(sin, "sin"));
  const int64_t D = query.size(3), R = cos.size(cos.dim() - 1);

  const auto run = [&]<typename T, typename Angle, bool kInterleaved>() {
    const Rotation<T, Angle> args{
        .query = describe<T>(q, query_out),
        .key = describe<T>(k, key_out),
        .cos = describe<Angle>(c),
        .sin = describe<Angle>(s),
        .positions = query.size(0) * query.size(2),
        .seqlen = query.size(2),
        .head_dim = D,
        .angles = R,
        .direction = kInverse ? -1.0f : 1.0f,
    };
    constexpr int kPairs = kPairsAThread<kInterleaved, kWidest<T>>;
    constexpr int64_t kAngleBytes = std::min(kPairs * sizeof(Angle), size_t{16});
    const bool aligned = R % kPairs == 0 && takes_accesses(q, D, 16) && takes_accesses(k, D, 16) &&
                         takes_accesses(c, R, kAngleBytes) && takes_accesses(s, R, kAngleBytes);
    aligned ? launch_rotate<T, Angle, kInterleaved, kWidest<T>>(args, device.stream)
            : launch_rotate<T, Angle, kInterleaved, 1>(args, device.stream);
  };
  for_dtype(dtype, [&]<typename T>() {
    if (as_query) {
      interleaved ? run.template operator()<T, T, true>() : run.template operator()<T, T, false>();
    } else {
      interleaved ? run.template operator()<T, float, true>() : run.template operator()<T, float, false>();
    }
  });
  return {query_out, key_out};
}

}  // namespace
}  // namespace fastformer::cuda

FASTFORMER_CUDA_LIBRARY(m) {
  m.impl("rotary_forward", TORCH_BOX(&fastformer::cuda::rotary<false>));
  m.impl("rotary_backward", TORCH_BOX(&fastformer::cuda::rotary<true>));
}
