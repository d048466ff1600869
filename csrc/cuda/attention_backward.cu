// The backward pass of attention: FlashAttention-2 (arXiv 2307.08691), section 3.1.2.
//
// With P = exp(scale * Q K^T + mask - lse), recomputed tile by tile, and dP = dO V^T:
//
//     delta = rowsum(dO * O) - dlse      dS = P * (dP - delta)
//     dV = P^T dO      dK = scale * dS^T Q      dQ = scale * dS K      dmask = dS
//
// With softcap, P = exp(softcap * T + mask - lse), T = tanh(scale * Q K^T / softcap), and dK and dQ have dS * (1 - T^2)
// for dS. With dropout, of a mask Z that is 0 or 1 / (1 - p), dV = (P * Z)^T dO and dS = P * (Z * dP - delta). A sink's
// gradient is -sum of exp(sink - lse) * delta.
//
// Here: delta, the gradients of sinks, and the wrapper. Each gradient is summed by one block in a fixed order, so that
// the result is the same bits each time.
#include "attention_backward.cuh"
#include "attention_hopper.cuh"
#include "rows.cuh"

namespace fastformer::cuda {
namespace {

constexpr int kDeltaLanes = 8, kDeltaThreads = 128;  // a row's, a block's

// Eight lanes: one row of [B, H, Sq].
template <typename T>
__global__ void __launch_bounds__(kDeltaThreads)
    attention_delta_kernel(const T* grad_output,   // [B, H, Sq, Dv], unit stride along a row
                           const T* output,        // likewise
                           const float* grad_lse,  // [B, H, Sq], or null
                           const float* lse,       // [B, H, Sq]
                           float* delta,           // likewise
                           int64_t grad_stride_b, int64_t grad_stride_h, int64_t grad_stride_s, int64_t output_stride_b,
                           int64_t output_stride_h, int64_t output_stride_s, int heads, int seqlen_q, int value_dim) {
  constexpr int kRows = kDeltaThreads / kDeltaLanes;
  const int tiles = tiles_up_to(seqlen_q, kRows), batch_head = blockIdx.x / tiles;
  const int query = blockIdx.x % tiles * kRows + threadIdx.x / kDeltaLanes;
  const int64_t batch = batch_head / heads, head = batch_head % heads, row = int64_t{batch_head} * seqlen_q + query;
  const bool exists = query < seqlen_q;
  float sum = 0.0f;
  if (exists) {
    grad_output += batch * grad_stride_b + head * grad_stride_h + query * grad_stride_s;
    output += batch * output_stride_b + head * output_stride_h + query * output_stride_s;
    for (int column = threadIdx.x % kDeltaLanes * kChunk; column < value_dim; column += kDeltaLanes * kChunk) {
      const Pack<T, kChunk> grads = load<kChunk>(grad_output + column), outputs = load<kChunk>(output + column);
#pragma unroll
      for (int i = 0; i < kChunk; ++i) sum = fmaf(to_float(grads.values[i]), to_float(outputs.values[i]), sum);
    }
  }
#pragma unroll
  for (int lane = kDeltaLanes / 2; lane > 0; lane /= 2) sum += __shfl_xor_sync(kAllLanes, sum, lane);
  if (!exists || threadIdx.x % kDeltaLanes != 0) return;
  if (grad_lse != nullptr) sum -= grad_lse[row];
  delta[row] = lse[row] == -INFINITY ? 0.0f : sum;  // nothing flows back through a row that saw nothing
}

// One block: one head.
__global__ void __launch_bounds__(kLargeBlock) attention_sinks_kernel(const float* sinks,  // [H]
                                                                      const float* lse,    // [B, H, Sq]
                                                                      const float* delta,  // likewise
                                                                      float* grad_sinks,   // [H]
                                                                      int batch, int heads, int seqlen_q) {
  const int head = blockIdx.x;
  const float sink = sinks[head];
  Team<kLargeBlock> team;
  float sum = 0.0f;
  for (int b = 0; b < batch; ++b) {
    const int64_t first = (static_cast<int64_t>(b) * heads + head) * seqlen_q;
    for (int query = threadIdx.x; query < seqlen_q; query += kLargeBlock) {
      const float row_lse = lse[first + query];
      if (row_lse != -INFINITY) sum = fmaf(-expf(sink - row_lse), delta[first + query], sum);
    }
  }
  sum = team.sum(sum);
  if (threadIdx.x == 0) grad_sinks[head] = sum;
}

// grad_output's rows are aligned.
Tensor delta_of(const Tensor& grad_output, const std::optional<Tensor>& grad_lse, const Tensor& output,
                const Tensor& lse, cudaStream_t stream) {
  const Tensor delta = empty_of_sizes(lse), out = with_aligned_rows(output);
  const int64_t heads = lse.size(1), seqlen_q = lse.size(2);
  const int64_t tiles = ceil_div(seqlen_q, kDeltaThreads / kDeltaLanes);
  const auto run = [&]<typename T>() {
    launch(attention_delta_kernel<T>, grid_of(tiles * lse.size(0) * heads), dim3(kDeltaThreads), 0, stream,
           pointer<T>(grad_output), pointer<T>(out), pointer<float>(grad_lse), pointer<float>(lse),
           mutable_pointer<float>(delta), grad_output.stride(0), grad_output.stride(1), grad_output.stride(2),
           out.stride(0), out.stride(1), out.stride(2), heads, seqlen_q, out.size(3));
  };
  output.scalar_type() == ScalarType::BFloat16 ? run.template operator()<BFloat16>() : run.template operator()<Half>();
  return delta;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> attention_backward(
    const Tensor& grad_output, const std::optional<Tensor>& grad_lse, const Tensor& query, const Tensor& key,
    const Tensor& value, const std::optional<Tensor>& mask, const Tensor& output, const Tensor& lse, double scale,
    bool is_causal, bool bottom_right, std::optional<double> softcap, bool needs_grad_mask,
    std::optional<int64_t> window_left, std::optional<int64_t> window_right, const std::optional<Tensor>& alibi_slopes,
    const std::optional<Tensor>& sinks, double dropout_p, const std::optional<Tensor>& dropout_state,
    const std::optional<Tensor>& cu_seqlens_q, const std::optional<Tensor>& cu_seqlens_k,
    const std::optional<Tensor>& seqused_k, int64_t max_seqlen_q, int64_t max_seqlen_k) {
  const OnDevice device(query);
  const AttentionCall call = attention_call(query, key, value,
                                            {
                                                .mask = mask,
                                                .scale = scale,
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
                                                .block_table = std::nullopt,
                                                .max_seqlen_q = max_seqlen_q,
                                                .max_seqlen_k = max_seqlen_k,
                                            });
  const int64_t batch = query.size(0), heads = query.size(1), seqlen_q = query.size(2);
  const int64_t kv_heads = key.size(1), seqlen_k = key.size(2), value_dim = value.size(3);
  check_attention_gradients(query, value, output, lse, grad_output, grad_lse);
  check_device(grad_output, "grad_output", query, "query");
  check_device(output, "output", query, "query");
  check_device(lse, "lse", query, "query");
  if (grad_lse.has_value()) check_device(*grad_lse, "grad_lse", query, "query");
  STD_TORCH_CHECK(!needs_grad_mask || mask.has_value(), "needs_grad_mask wants mask");

  const Tensor grad_mask = needs_grad_mask
                               ? torch::stable::new_zeros(query, {batch, heads, seqlen_q, seqlen_k}, ScalarType::Float)
                               : empty_like_sizes(query, {0}, ScalarType::Float);
  Tensor grad_sinks = empty_like_sizes(query, {sinks.has_value() ? heads : 0}, ScalarType::Float);
  // In the widths that kernels have.
  Tensor grad_query = new_heads(query, batch, heads, seqlen_q, call.query.size(3));
  Tensor grad_key = new_heads(key, key.size(0), kv_heads, seqlen_k, call.key.size(3));
  Tensor grad_value = new_heads(value, key.size(0), kv_heads, seqlen_k, call.value.size(3));
  const bool nothing = batch * heads * seqlen_q * call.inputs.seqlen_q == 0 || seqlen_k * call.inputs.seqlen_k == 0;
  if (nothing || cu_seqlens_q.has_value()) torch::stable::zero_(grad_query);  // there may be rows of no sequence
  if (nothing || cu_seqlens_k.has_value() || seqused_k.has_value()) {
    torch::stable::zero_(grad_key);
    torch::stable::zero_(grad_value);
  }
  if (batch * heads * seqlen_q > 0) {
    const Tensor row_lse = as_contiguous(lse);
    const std::optional<Tensor> dlse =
        grad_lse.has_value() ? std::optional(as_float(*grad_lse, "grad_lse")) : std::nullopt;
    const Tensor grad = with_aligned_rows(grad_output);
    const Tensor delta = delta_of(grad, dlse, output, row_lse, device.stream);
    if (sinks.has_value()) {
      launch(attention_sinks_kernel, grid_of(heads), dim3(kLargeBlock), Team<kLargeBlock>::kSharedBytes, device.stream,
             call.inputs.sinks, pointer<float>(row_lse), pointer<float>(delta), mutable_pointer<float>(grad_sinks),
             batch, heads, seqlen_q);
    }
    const auto by_hopper = [&] {
#if FASTFORMER_HAS_HOPPER
      // Its sums have room for 64 queries or more of each sequence.
      const bool short_sequences = seqlen_q * batch < 64 * int64_t{call.sequences};
      if (nothing || short_sequences || !suits_hopper(call, kWidestBackward, device) || is_expanded(grad)) return false;
      attention_backward_hopper(call, grad, row_lse, delta, grad_query, grad_key, grad_value, device);
      return true;
#else
      return false;
#endif
    };
    if (!nothing && !by_hopper()) {
      AttentionGradients gradients{
          .grad_output = pointer(grad),
          .lse = pointer<float>(row_lse),
          .delta = pointer<float>(delta),
          .grad_query = mutable_pointer(grad_query),
          .grad_key = mutable_pointer(grad_key),
          .grad_value = mutable_pointer(grad_value),
          .grad_mask = needs_grad_mask ? mutable_pointer<float>(grad_mask) : nullptr,
          .grad_output_strides = {},
          .grad_query_strides = {},
          .grad_key_strides = {},
          .grad_value_strides = {},
      };
      copy_strides(gradients.grad_output_strides, grad);
      copy_strides(gradients.grad_query_strides, grad_query);
      copy_strides(gradients.grad_key_strides, grad_key);
      copy_strides(gradients.grad_value_strides, grad_value);
      launch_dkdv(call, gradients, call.plain() ? Scores::plain : Scores::any, device.stream);
      launch_dq(call, gradients, call.plain() && !needs_grad_mask ? Scores::plain : Scores::any, device.stream);
    }
  } else if (sinks.has_value()) {
    torch::stable::zero_(grad_sinks);
  }
  return {without_padding(grad_query, query.size(3)), without_padding(grad_key, key.size(3)),
          without_padding(grad_value, value_dim), grad_mask, grad_sinks};
}

}  // namespace
}  // namespace fastformer::cuda

FASTFORMER_CUDA_LIBRARY(m) { m.impl("attention_backward", TORCH_BOX(&fastformer::cuda::attention_backward)); }
