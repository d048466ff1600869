// What attention's forward and backward wrappers share: their arguments, checked, as the kernels want them, and the
// loop over tasks.
#pragma once

#include <algorithm>
#include <atomic>
#include <cmath>

#include "../attention.h"
#include "common.h"
#include "kernels/attention.h"

namespace fastformer {

// Fewer sequences than this are cut into parts by the backward pass and by decoding.
constexpr int64_t kTasks = 32;

// Calls f(task, scratch) for every task, each thread taking the next one that is left: tasks differ in length.
template <typename F>
void run_tasks(int64_t tasks, int64_t scratch_bytes, const F& f) {
  std::atomic<int64_t> next{0};
  const int64_t workers = std::min<int64_t>(tasks, torch::stable::get_num_threads());
  torch::stable::parallel_for(0, workers, 1, [&](int64_t, int64_t) {
    const Scratch scratch(scratch_bytes);
    for (int64_t task = next++; task < tasks; task = next++) f(task, scratch.as<void>());
  });
}

// Zeros in rows [begin, seqlen) of a packed tensor [1, heads, seqlen, width] from empty_heads: they are no sequence's.
inline void clear_rows(const Tensor& tensor, int64_t begin) {
  const int64_t row_bytes = tensor.size(1) * tensor.size(3) * tensor.element_size();
  const int64_t bytes = (tensor.size(2) - begin) * row_bytes;
  if (bytes > 0) memset(mutable_pointer<char>(tensor) + begin * row_bytes, 0, bytes);
}

// The arguments of a call as kernels take them, and the tensors that those pointers point into.
struct AttentionCall {
  Attention inputs;
  int64_t sequences;
  Tensor query, key, value;  // contiguous along a row
  std::optional<Tensor> mask, slopes, sinks, cu_seqlens_q, cu_seqlens_k, seqused_k, block_table;
};

// The values of cu_seqlens, of `rows` packed rows.
inline void check_cu_seqlens(const std::optional<Tensor>& tensor, const char* name, int64_t rows) {
  if (!tensor.has_value()) return;
  const int32_t* ends = pointer<int32_t>(*tensor);
  STD_TORCH_CHECK(ends[0] == 0, name, " must begin with 0, not ", ends[0]);
  for (int64_t i = 1; i < tensor->size(0); ++i) {
    STD_TORCH_CHECK(ends[i] >= ends[i - 1], name, " must not descend: element ", i, " is ", ends[i], " after ",
                    ends[i - 1]);
  }
  STD_TORCH_CHECK(ends[tensor->size(0) - 1] <= rows, name, " must end within the ", rows, " packed rows, not at ",
                  ends[tensor->size(0) - 1]);
}

inline void check_sequences(const AttentionCall& call, const AttentionOptions& options) {
  const Attention& a = call.inputs;
  const int64_t capacity = a.block_table != nullptr ? a.table_stride * a.page_size : a.seqlen_k;
  for (int64_t i = 0; i < call.sequences; ++i) {
    const Sequence s = sequence_at(a, i);
    if (a.seqused_k != nullptr) {
      const int64_t most = a.cu_seqlens_k != nullptr ? a.cu_seqlens_k[i + 1] - a.cu_seqlens_k[i] : capacity;
      STD_TORCH_CHECK(0 <= s.keys && s.keys <= most, "seqused_k must be from 0 to ", most, " for sequence ", i,
                      ", not ", s.keys);
    }
    STD_TORCH_CHECK(a.cu_seqlens_q == nullptr || s.queries <= options.max_seqlen_q, "max_seqlen_q must be at least ",
                    s.queries, ", not ", options.max_seqlen_q);
    STD_TORCH_CHECK((a.cu_seqlens_k == nullptr && a.block_table == nullptr) || s.keys <= options.max_seqlen_k,
                    "max_seqlen_k must be at least ", s.keys, ", not ", options.max_seqlen_k);
    if (a.block_table == nullptr) continue;
    const int64_t pages = call.key.size(0);
    for (int64_t page = 0; page * a.page_size < s.keys; ++page) {
      const int32_t at = a.block_table[i * a.table_stride + page];
      STD_TORCH_CHECK(0 <= at && at < pages, "block_table must hold pages 0 to ", pages - 1, " where sequence ", i,
                      " has keys, not ", at);
    }
  }
}

inline Dropout dropout_of(const AttentionOptions& options) {
  if (!options.dropout_state.has_value()) return {};
  const Tensor words = as_contiguous(*options.dropout_state);
  const int64_t seed = pointer<int64_t>(words)[0], offset = pointer<int64_t>(words)[1];
  return {
      .threshold = dropout_threshold(options.dropout_p),
      .seed = {static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32)},
      .offset = static_cast<uint32_t>(offset),
      .factor = static_cast<float>(1.0 / (1.0 - options.dropout_p)),
  };
}

// Checks the arguments of a call.
inline AttentionCall attention_call(const Tensor& query, const Tensor& key, const Tensor& value,
                                    const AttentionOptions& options) {
  const auto& [mask, scale, is_causal, bottom_right, softcap, window_left, window_right, alibi_slopes, sinks, dropout_p,
               dropout_state, cu_seqlens_q, cu_seqlens_k, seqused_k, block_table, max_seqlen_q, max_seqlen_k] = options;
  AttentionCall call{
      .inputs = {},
      .sequences = check_attention(query, key, value, options),
      .query = rows_contiguous(query),
      .key = rows_contiguous(key),
      .value = rows_contiguous(value),
      .mask = mask,
      .slopes = as_contiguous(alibi_slopes),
      .sinks = as_contiguous(sinks),
      .cu_seqlens_q = as_contiguous(cu_seqlens_q),
      .cu_seqlens_k = as_contiguous(cu_seqlens_k),
      .seqused_k = as_contiguous(seqused_k),
      .block_table = as_contiguous(block_table),
  };
  const int64_t heads = query.size(1), seqlen_q = query.size(2), seqlen_k = key.size(2);

  check_cu_seqlens(call.cu_seqlens_q, "cu_seqlens_q", seqlen_q);
  check_cu_seqlens(call.cu_seqlens_k, "cu_seqlens_k", seqlen_k);
  const BroadcastMask scores_mask = broadcast_mask(mask, {query.size(0), heads, seqlen_q, seqlen_k});
  const auto bound = [](std::optional<int64_t> side) { return std::min(side.value_or(kUnbounded), kUnbounded); };
  Attention& a = call.inputs;
  a = {
      .query = pointer(call.query),
      .key = pointer(call.key),
      .value = pointer(call.value),
      .mask = scores_mask.data,
      .dtype = dtype_of(query, "query"),
      .mask_dtype = scores_mask.dtype,
      .mask_kind = scores_mask.kind,
      .heads = heads,
      .kv_heads = key.size(1),
      .head_dim = query.size(3),
      .value_dim = value.size(3),
      .seqlen_q = seqlen_q,
      .seqlen_k = seqlen_k,
      .query_strides = {},
      .key_strides = {},
      .value_strides = {},
      .mask_strides = {},
      .scale = static_cast<float>(scale),
      .softcap = bounded_softcap(options),
      .left = bound(window_left),
      .right = is_causal ? 0 : bound(window_right),
      .bottom_right = bottom_right,
      .slopes = pointer<float>(call.slopes),
      .slopes_stride = call.slopes.has_value() && call.slopes->dim() == 2 ? heads : 0,
      .sinks = pointer<float>(call.sinks),
      .dropout = dropout_of(options),
      .cu_seqlens_q = pointer<int32_t>(call.cu_seqlens_q),
      .cu_seqlens_k = pointer<int32_t>(call.cu_seqlens_k),
      .seqused_k = pointer<int32_t>(call.seqused_k),
      .block_table = pointer<int32_t>(call.block_table),
      .table_stride = call.block_table.has_value() ? call.block_table->size(1) : 0,
      .page_size = call.block_table.has_value() ? seqlen_k : 0,
  };
  for (int64_t i = 0; i < 3; ++i) {
    a.query_strides[i] = call.query.stride(i);
    a.key_strides[i] = call.key.stride(i);
    a.value_strides[i] = call.value.stride(i);
  }
  std::copy_n(scores_mask.strides, 4, a.mask_strides);
  check_sequences(call, options);
  return call;
}

}  // namespace fastformer
