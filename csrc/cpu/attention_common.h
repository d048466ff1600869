// What attention's forward and backward wrappers share: their arguments, checked, as the kernels want them, and the
// loop over tasks.
#pragma once

#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>

#include <algorithm>
#include <atomic>
#include <cmath>

#include "kernels/attention.h"
#include "mask.h"

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

inline Tensor rows_contiguous(const Tensor& tensor) {
  const int64_t last = tensor.dim() - 1;
  return tensor.stride(last) == 1 || tensor.size(last) <= 1 ? tensor : torch::stable::contiguous(tensor);
}

inline Tensor times(const Tensor& tensor, double factor) {
  AtenTensorHandle result = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_mul_Scalar(tensor.get(), factor, &result));
  return Tensor(result);
}

inline bool has_sizes(const Tensor& tensor, std::initializer_list<int64_t> sizes) {
  return std::equal(sizes.begin(), sizes.end(), tensor.sizes().begin(), tensor.sizes().end());
}

// Zeros in rows [begin, seqlen) of a packed tensor [1, heads, seqlen, width] from empty_heads: they are no sequence's.
inline void clear_rows(const Tensor& tensor, int64_t begin) {
  const int64_t row_bytes = tensor.size(1) * tensor.size(3) * tensor.element_size();
  const int64_t bytes = (tensor.size(2) - begin) * row_bytes;
  if (bytes > 0) memset(mutable_pointer<char>(tensor) + begin * row_bytes, 0, bytes);
}

// The operators' optional arguments, under their names.
struct AttentionOptions {
  std::optional<Tensor> mask;
  double scale;
  bool is_causal, bottom_right;
  std::optional<double> softcap;
  std::optional<int64_t> window_left, window_right;
  std::optional<Tensor> alibi_slopes, sinks;
  double dropout_p;
  std::optional<Tensor> dropout_state, cu_seqlens_q, cu_seqlens_k, seqused_k, block_table;
  int64_t max_seqlen_q, max_seqlen_k;

  bool packed_or_paged() const {
    return cu_seqlens_q.has_value() || cu_seqlens_k.has_value() || seqused_k.has_value() || block_table.has_value();
  }
};

// The arguments of a call as kernels take them, and the tensors that those pointers point into.
struct AttentionCall {
  Attention inputs;
  int64_t sequences;
  Tensor query, key, value;  // contiguous along a row
  std::optional<Tensor> mask, slopes, sinks, cu_seqlens_q, cu_seqlens_k, seqused_k, block_table;
};

inline void check_shapes(const Tensor& query, const Tensor& key, const Tensor& value) {
  STD_TORCH_CHECK(query.dim() == 4 && key.dim() == 4 && value.dim() == 4, "query, key, value must have 4 dimensions");
  STD_TORCH_CHECK(key.scalar_type() == query.scalar_type() && value.scalar_type() == query.scalar_type(),
                  "key and value must have the dtype of query");
  STD_TORCH_CHECK(value.size(0) == key.size(0), "value must have the batch size of key");
  STD_TORCH_CHECK(key.size(3) == query.size(3), "key must have the head_dim of query");
  STD_TORCH_CHECK(value.size(1) == key.size(1) && value.size(2) == key.size(2),
                  "value must have the heads and length of key");
  STD_TORCH_CHECK(key.size(1) == query.size(1) || (key.size(1) > 0 && query.size(1) % key.size(1) == 0),
                  "query's heads must be a multiple of key's");
}

// Checked for dtype and dimensions, and contiguous.
inline std::optional<Tensor> as_table(const std::optional<Tensor>& tensor, const char* name, ScalarType dtype,
                                      int64_t dims) {
  if (!tensor.has_value()) return std::nullopt;
  STD_TORCH_CHECK(tensor->scalar_type() == dtype, name, " must be ", dtype == ScalarType::Float ? "float32" : "int32");
  STD_TORCH_CHECK(tensor->dim() == dims, name, " must have ", dims, " dimension(s), not ", tensor->dim());
  return as_contiguous(*tensor);
}

// cu_seqlens of the `rows` rows of a packed tensor; null if it isn't packed.
inline void check_cu_seqlens(const std::optional<Tensor>& tensor, const char* name, const Tensor& of, int64_t rows) {
  if (!tensor.has_value()) return;
  STD_TORCH_CHECK(of.size(0) == 1, "with ", name, " what is packed must have batch size 1, not ", of.size(0));
  STD_TORCH_CHECK(tensor->size(0) > 0, name, " must have at least 1 element");
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
  const double p = options.dropout_p;
  STD_TORCH_CHECK(p >= 0.0 && p < 1.0, "dropout_p must be at least 0 and less than 1, not ", p);
  if (!options.dropout_state.has_value()) {
    STD_TORCH_CHECK(p == 0.0, "dropout_p wants dropout_state");
    return {};
  }
  const Tensor& state = *options.dropout_state;
  STD_TORCH_CHECK(state.scalar_type() == ScalarType::Long && has_sizes(state, {2}), "dropout_state must be int64 [2]");
  const Tensor words = as_contiguous(state);
  const int64_t seed = pointer<int64_t>(words)[0], offset = pointer<int64_t>(words)[1];
  return {
      .threshold = static_cast<uint32_t>(std::min(std::nearbyint(p * 0x1p32), 0x1p32 - 1)),
      .seed = {static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32)},
      .offset = static_cast<uint32_t>(offset),
      .factor = static_cast<float>(1.0 / (1.0 - p)),
  };
}

// Checks the arguments of a call.
inline AttentionCall attention_call(const Tensor& query, const Tensor& key, const Tensor& value,
                                    const AttentionOptions& options) {
  check_shapes(query, key, value);
  const auto& [mask, scale, is_causal, bottom_right, softcap, window_left, window_right, alibi_slopes, sinks, dropout_p,
               dropout_state, cu_seqlens_q, cu_seqlens_k, seqused_k, block_table, max_seqlen_q, max_seqlen_k] = options;
  STD_TORCH_CHECK(!softcap.has_value() || *softcap > 0, "softcap must be positive");
  STD_TORCH_CHECK(window_left.value_or(0) >= 0, "window_left must not be negative");
  STD_TORCH_CHECK(window_right.value_or(0) >= 0, "window_right must not be negative");
  STD_TORCH_CHECK(!mask.has_value() || !options.packed_or_paged(),
                  "there can be no mask with cu_seqlens_q, cu_seqlens_k, seqused_k or block_table");

  AttentionCall call{
      .inputs = {},
      .sequences = query.size(0),
      .query = rows_contiguous(query),
      .key = rows_contiguous(key),
      .value = rows_contiguous(value),
      .mask = mask,
      .slopes = as_table(alibi_slopes, "alibi_slopes", ScalarType::Float, alibi_slopes ? alibi_slopes->dim() : 1),
      .sinks = as_table(sinks, "sinks", ScalarType::Float, 1),
      .cu_seqlens_q = as_table(cu_seqlens_q, "cu_seqlens_q", ScalarType::Int, 1),
      .cu_seqlens_k = as_table(cu_seqlens_k, "cu_seqlens_k", ScalarType::Int, 1),
      .seqused_k = as_table(seqused_k, "seqused_k", ScalarType::Int, 1),
      .block_table = as_table(block_table, "block_table", ScalarType::Int, 2),
  };
  const int64_t heads = query.size(1), seqlen_q = query.size(2), seqlen_k = key.size(2);

  check_cu_seqlens(call.cu_seqlens_q, "cu_seqlens_q", query, seqlen_q);
  if (call.cu_seqlens_q.has_value()) call.sequences = call.cu_seqlens_q->size(0) - 1;
  if (call.block_table.has_value()) {
    STD_TORCH_CHECK(call.seqused_k.has_value(), "block_table wants seqused_k");
    STD_TORCH_CHECK(!call.cu_seqlens_k.has_value(), "there can be no cu_seqlens_k with block_table");
    STD_TORCH_CHECK(seqlen_k >= 16 && (seqlen_k & (seqlen_k - 1)) == 0,
                    "with block_table key's pages must be a power of two long, at least 16, not ", seqlen_k);
    STD_TORCH_CHECK(call.block_table->size(0) == call.sequences, "block_table must have ", call.sequences,
                    " rows, not ", call.block_table->size(0));
  } else if (call.cu_seqlens_k.has_value()) {
    check_cu_seqlens(call.cu_seqlens_k, "cu_seqlens_k", key, seqlen_k);
    STD_TORCH_CHECK(call.cu_seqlens_k->size(0) == call.sequences + 1, "cu_seqlens_k must have ", call.sequences + 1,
                    " elements, not ", call.cu_seqlens_k->size(0));
  } else {
    STD_TORCH_CHECK(key.size(0) == call.sequences, "key and value must have batch size ", call.sequences, ", not ",
                    key.size(0));
  }
  STD_TORCH_CHECK(!call.seqused_k.has_value() || call.seqused_k->size(0) == call.sequences, "seqused_k must have ",
                  call.sequences, " elements");
  STD_TORCH_CHECK(!call.sinks.has_value() || has_sizes(*call.sinks, {heads}), "sinks must have ", heads, " elements");
  STD_TORCH_CHECK(
      !call.slopes.has_value() || has_sizes(*call.slopes, {heads}) || has_sizes(*call.slopes, {call.sequences, heads}),
      "alibi_slopes must be [", heads, "] or [", call.sequences, ", ", heads, "]");

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
      // Beyond these bounds it changes nothing more, but scale / softcap might become 0 or infinite.
      .softcap = softcap.has_value() ? static_cast<float>(std::clamp(*softcap, 1e-30, 1e30)) : 0.0f,
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
