// From the operators' arguments to those of the kernels.
#pragma once

#include <algorithm>
#include <bit>

#include "attention.cuh"

namespace fastformer::cuda {

// Of batch, head and row. 0 where there is but one: the tensor's may be anything there, and kernels make addresses,
// which must be aligned, of rows that they don't read.
inline void copy_strides(int64_t (&to)[3], const Tensor& of) {
  for (int64_t i = 0; i < 3; ++i) to[i] = of.size(i) > 1 ? of.stride(i) : 0;
}

// The first `width` columns of what a kernel wrote, as new_heads lays tensors out.
inline Tensor without_padding(const Tensor& padded, int64_t width) {
  if (padded.size(3) == width) return padded;
  Tensor result = new_heads(padded, padded.size(0), padded.size(1), padded.size(2), width);
  Tensor from = padded;
  return torch::stable::copy_(result, torch::stable::narrow(from, 3, 0, width));
}

// The arguments of a call as kernels take them, and the tensors that those pointers point into.
struct AttentionCall {
  Attention inputs;
  int sequences;
  DType dtype;
  Tensor query, key, value;
  std::optional<Tensor> mask, slopes, sinks, dropout_state, cu_seqlens_q, cu_seqlens_k, seqused_k, block_table;

  // Whether kernels compiled for Scores::plain can do it.
  bool plain() const {
    return inputs.softcap == 0.0f && inputs.slopes == nullptr && inputs.mask == nullptr &&
           inputs.dropout_state == nullptr;
  }
};

// Checks the arguments of a call. Nothing may be empty: see the wrappers.
inline AttentionCall attention_call(const Tensor& query, const Tensor& key, const Tensor& value,
                                    const AttentionOptions& options) {
  const DType dtype = dtype_of(query, "query");
  STD_TORCH_CHECK(dtype != DType::float32, "query must be bfloat16 or float16: attention in CUDA C++ has no float32");
  const int64_t sequences = check_attention(query, key, value, options);
  check_device(key, "key", query, "query");
  check_device(value, "value", query, "query");
  const auto check_option = [&](const std::optional<Tensor>& tensor, const char* name) {
    if (tensor.has_value()) check_device(*tensor, name, query, "query");
  };
  check_option(options.mask, "mask");
  check_option(options.alibi_slopes, "alibi_slopes");
  check_option(options.sinks, "sinks");
  check_option(options.dropout_state, "dropout_state");
  check_option(options.cu_seqlens_q, "cu_seqlens_q");
  check_option(options.cu_seqlens_k, "cu_seqlens_k");
  check_option(options.seqused_k, "seqused_k");
  check_option(options.block_table, "block_table");
  const bool paged = options.block_table.has_value();
  AttentionCall call{
      .inputs = {},
      .sequences = static_cast<int>(sequences),
      .dtype = dtype,
      .query = with_aligned_rows(query),
      .key = with_aligned_rows(key),
      .value = with_aligned_rows(value),
      .mask = options.mask,
      .slopes = as_contiguous(options.alibi_slopes),
      .sinks = as_contiguous(options.sinks),
      .dropout_state = options.dropout_p > 0.0 ? as_contiguous(options.dropout_state) : std::nullopt,
      .cu_seqlens_q = as_contiguous(options.cu_seqlens_q),
      .cu_seqlens_k = as_contiguous(options.cu_seqlens_k),
      .seqused_k = as_contiguous(options.seqused_k),
      .block_table = as_contiguous(options.block_table),
  };
  const int64_t heads = query.size(1), query_rows = query.size(2);
  const int64_t seqlen_q = options.cu_seqlens_q.has_value() ? options.max_seqlen_q : query_rows;
  const int64_t seqlen_k = options.cu_seqlens_k.has_value() ? options.max_seqlen_k
                           : paged                          ? key.size(2) * options.block_table->size(1)
                                                            : key.size(2);
  const BroadcastMask mask = broadcast_mask(options.mask, {query.size(0), heads, query_rows, key.size(2)});
  for (const int64_t length : {query_rows, key.size(2), seqlen_q, seqlen_k}) {
    STD_TORCH_CHECK(0 <= length && length < kUnbounded - 1024, "sequences must be shorter than 2^30, not ", length);
  }
  const int64_t reach = std::max(seqlen_q, seqlen_k);
  const auto bound = [reach](std::optional<int64_t> side) {
    return side.has_value() && *side < reach ? static_cast<int>(*side) : kUnbounded;
  };
  Attention& a = call.inputs;
  a = {
      .query = pointer(call.query),
      .key = pointer(call.key),
      .value = pointer(call.value),
      .query_strides = {},
      .key_strides = {},
      .value_strides = {},
      .heads = static_cast<int>(heads),
      .kv_heads = static_cast<int>(key.size(1)),
      .head_dim = static_cast<int>(call.query.size(3)),
      .value_dim = static_cast<int>(call.value.size(3)),
      .seqlen_q = static_cast<int>(seqlen_q),
      .seqlen_k = static_cast<int>(seqlen_k),
      .query_rows = static_cast<int>(query_rows),
      .mask = pointer(call.mask),
      .mask_kind = mask.kind,
      .mask_dtype = mask.dtype,
      .mask_strides = {},
      .scale = static_cast<float>(options.scale),
      .softcap = bounded_softcap(options),
      .left = bound(options.window_left),
      .right = options.is_causal ? 0 : bound(options.window_right),
      .bottom_right = options.bottom_right,
      .slopes = pointer<float>(call.slopes),
      .slopes_stride = call.slopes.has_value() && call.slopes->dim() == 2 ? heads : 0,
      .sinks = pointer<float>(call.sinks),
      .dropout_state = pointer<int64_t>(call.dropout_state),
      .dropout_threshold = dropout_threshold(options.dropout_p),
      .kept_scale = static_cast<float>(1.0 / (1.0 - options.dropout_p)),
      .cu_seqlens_q = pointer<int32_t>(call.cu_seqlens_q),
      .cu_seqlens_k = pointer<int32_t>(call.cu_seqlens_k),
      .seqused_k = pointer<int32_t>(call.seqused_k),
      .block_table = pointer<int32_t>(call.block_table),
      .table_stride = paged ? call.block_table->size(1) : 0,
      .page_bits = paged ? std::countr_zero(static_cast<uint64_t>(key.size(2))) : 0,
  };
  copy_strides(a.query_strides, call.query);
  copy_strides(a.key_strides, call.key);
  copy_strides(a.value_strides, call.value);
  std::copy_n(mask.strides, 4, a.mask_strides);
  return call;
}

// Calls body.operator()<T, kWidth>() for the element type and the compiled width that holds keys and values.
template <typename Body>
void for_width(const AttentionCall& call, Body&& body) {
  const int width = std::max(call.inputs.head_dim, call.inputs.value_dim);
  STD_TORCH_CHECK(width <= 256, "head_dim must be at most 256, not ", width);
  const auto run = [&]<typename T>() {
    if (width <= 64) {
      body.template operator()<T, 64>();
    } else if (width <= 96) {
      body.template operator()<T, 96>();
    } else if (width <= 128) {
      body.template operator()<T, 128>();
    } else {
      body.template operator()<T, 256>();
    }
  };
  call.dtype == DType::bfloat16 ? run.template operator()<BFloat16>() : run.template operator()<Half>();
}

}  // namespace fastformer::cuda
