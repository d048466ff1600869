#include "kernels/rotary.h"

#include <tuple>

#include "../rotary.h"
#include "common.h"

namespace fastformer {
namespace {

RotaryTensor describe(const Tensor& input, const Tensor& output) {
  return {pointer(input), mutable_pointer(output), input.size(1), {input.stride(0), input.stride(1), input.stride(2)}};
}

// Backward is the inverse: the gradients of the results, turned back.
template <bool kInverse>
std::tuple<Tensor, Tensor> rotary(const Tensor& query, const Tensor& key, const Tensor& cos, const Tensor& sin,
                                  bool interleaved) {
  check_rotary(query, key, cos, sin);
  const int64_t B = query.size(0), S = query.size(2), D = query.size(3), R = cos.size(cos.dim() - 1);
  const Tensor c = as_float(cos, "cos"), s = as_float(sin, "sin");
  const Tensor q = with_adjacent_features(query), k = with_adjacent_features(key);
  const Tensor query_out = empty_heads(query, B, query.size(1), S, D), key_out = empty_heads(key, B, key.size(1), S, D);
  const RotaryArgs args{
      .tensors = {describe(q, query_out), describe(k, key_out)},
      .cos = pointer<float>(c),
      .sin = pointer<float>(s),
      .angle_batch_stride = cos.dim() == 3 ? S * R : 0,
      .dtype = dtype_of(query, "query"),
      .seqlen = S,
      .head_dim = D,
      .width = R,
      .interleaved = interleaved,
      .inverse = kInverse,
  };
  const RotaryKernels& kernels = rotary_kernels();
  const int64_t bytes_per_position = (query.size(1) + key.size(1)) * D * 4;
  torch::stable::parallel_for(0, B * S, row_grain(bytes_per_position), [&](int64_t begin, int64_t end) {
    const Scratch angles(4 * R * sizeof(float));
    kernels.rotate(args, begin, end, angles.as<float>());
  });
  return {query_out, key_out};
}

}  // namespace
}  // namespace fastformer

STABLE_TORCH_LIBRARY_IMPL(fastformer, CPU, m) {
  m.impl("rotary_forward", TORCH_BOX(&fastformer::rotary<false>));
  m.impl("rotary_backward", TORCH_BOX(&fastformer::rotary<true>));
}
