// What attention's wrappers share on every device: the operators' options, and the checks of shapes and dtypes.
#pragma once

#if defined(USE_CUDA) && !defined(FASTFORMER_SIMT)
#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cuda.h>
#else
#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>
#endif

#include <algorithm>
#include <cmath>
#include <initializer_list>
#include <optional>

#include "mask.h"

namespace fastformer {

inline Tensor rows_contiguous(const Tensor& tensor) {
  const int64_t last = tensor.dim() - 1;
  return tensor.stride(last) == 1 || tensor.size(last) <= 1 ? tensor : torch::stable::contiguous(tensor);
}

inline std::optional<Tensor> as_contiguous(const std::optional<Tensor>& tensor) {
  return tensor.has_value() ? std::optional(as_contiguous(*tensor)) : std::nullopt;
}

inline bool has_sizes(const Tensor& tensor, std::initializer_list<int64_t> sizes) {
  return std::equal(sizes.begin(), sizes.end(), tensor.sizes().begin(), tensor.sizes().end());
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

// How many sequences there are. Raises for arguments that don't fit each other; looks at no values.
inline int64_t check_attention(const Tensor& query, const Tensor& key, const Tensor& value,
                               const AttentionOptions& options) {
  check_shapes(query, key, value);
  STD_TORCH_CHECK(!options.softcap.has_value() || *options.softcap > 0, "softcap must be positive");
  STD_TORCH_CHECK(options.window_left.value_or(0) >= 0, "window_left must not be negative");
  STD_TORCH_CHECK(options.window_right.value_or(0) >= 0, "window_right must not be negative");
  STD_TORCH_CHECK(!options.mask.has_value() || !options.packed_or_paged(),
                  "there can be no mask with cu_seqlens_q, cu_seqlens_k, seqused_k or block_table");
  const double p = options.dropout_p;
  STD_TORCH_CHECK(p >= 0.0 && p < 1.0, "dropout_p must be at least 0 and less than 1, not ", p);
  STD_TORCH_CHECK(p == 0.0 || options.dropout_state.has_value(), "dropout_p wants dropout_state");
  if (options.dropout_state.has_value()) {
    STD_TORCH_CHECK(options.dropout_state->scalar_type() == ScalarType::Long && has_sizes(*options.dropout_state, {2}),
                    "dropout_state must be int64 [2]");
  }
  const auto check_table = [](const std::optional<Tensor>& table, const char* name, ScalarType dtype, int64_t dims) {
    if (!table.has_value()) return;
    STD_TORCH_CHECK(table->scalar_type() == dtype, name, " must be ", dtype == ScalarType::Float ? "float32" : "int32");
    STD_TORCH_CHECK(table->dim() == dims, name, " must have ", dims, " dimension(s), not ", table->dim());
  };
  const auto& slopes = options.alibi_slopes;
  check_table(slopes, "alibi_slopes", ScalarType::Float, slopes.has_value() ? slopes->dim() : 1);
  check_table(options.sinks, "sinks", ScalarType::Float, 1);
  check_table(options.cu_seqlens_q, "cu_seqlens_q", ScalarType::Int, 1);
  check_table(options.cu_seqlens_k, "cu_seqlens_k", ScalarType::Int, 1);
  check_table(options.seqused_k, "seqused_k", ScalarType::Int, 1);
  check_table(options.block_table, "block_table", ScalarType::Int, 2);
  const auto check_packed = [](const std::optional<Tensor>& ends, const char* name, const Tensor& of) {
    if (!ends.has_value()) return;
    STD_TORCH_CHECK(of.size(0) == 1, "with ", name, " what is packed must have batch size 1, not ", of.size(0));
    STD_TORCH_CHECK(ends->size(0) > 0, name, " must have at least 1 element");
  };
  check_packed(options.cu_seqlens_q, "cu_seqlens_q", query);
  const int64_t heads = query.size(1), seqlen_k = key.size(2);
  const int64_t sequences = options.cu_seqlens_q.has_value() ? options.cu_seqlens_q->size(0) - 1 : query.size(0);
  if (options.block_table.has_value()) {
    STD_TORCH_CHECK(options.seqused_k.has_value(), "block_table wants seqused_k");
    STD_TORCH_CHECK(!options.cu_seqlens_k.has_value(), "there can be no cu_seqlens_k with block_table");
    STD_TORCH_CHECK(seqlen_k >= 16 && (seqlen_k & (seqlen_k - 1)) == 0,
                    "with block_table key's pages must be a power of two long, at least 16, not ", seqlen_k);
    STD_TORCH_CHECK(options.block_table->size(0) == sequences, "block_table must have ", sequences, " rows, not ",
                    options.block_table->size(0));
  } else if (options.cu_seqlens_k.has_value()) {
    check_packed(options.cu_seqlens_k, "cu_seqlens_k", key);
    STD_TORCH_CHECK(options.cu_seqlens_k->size(0) == sequences + 1, "cu_seqlens_k must have ", sequences + 1,
                    " elements, not ", options.cu_seqlens_k->size(0));
  } else {
    STD_TORCH_CHECK(key.size(0) == sequences, "key and value must have batch size ", sequences, ", not ", key.size(0));
  }
  STD_TORCH_CHECK(!options.seqused_k.has_value() || options.seqused_k->size(0) == sequences, "seqused_k must have ",
                  sequences, " elements");
  STD_TORCH_CHECK(!options.sinks.has_value() || has_sizes(*options.sinks, {heads}), "sinks must have ", heads,
                  " elements");
  STD_TORCH_CHECK(!slopes.has_value() || has_sizes(*slopes, {heads}) || has_sizes(*slopes, {sequences, heads}),
                  "alibi_slopes must be [", heads, "] or [", sequences, ", ", heads, "]");
  return sequences;
}

struct ScaledQuery {
  Tensor query;
  double scale;
};

// The same scores by a scale that is positive, in float too: the largest product is then the largest score.
inline ScaledQuery with_positive_scale(const Tensor& query, double scale) {
  const float narrow = static_cast<float>(scale);
  if (narrow > 0) return {query, scale};
  const double sign = narrow < 0 ? -1.0 : narrow;  // 0 and NaN go into the query
  AtenTensorHandle result = nullptr;
#if defined(USE_CUDA) && !defined(FASTFORMER_SIMT)
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_cuda_mul_Scalar(query.get(), sign, &result));
#else
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_mul_Scalar(query.get(), sign, &result));
#endif
  return {Tensor(result), sign == -1.0 ? std::abs(scale) : 1.0};
}

// What the backward pass has besides, which must fit the forward's arguments.
inline void check_attention_gradients(const Tensor& query, const Tensor& value, const Tensor& output, const Tensor& lse,
                                      const Tensor& grad_output, const std::optional<Tensor>& grad_lse) {
  const int64_t batch = query.size(0), heads = query.size(1), seqlen_q = query.size(2), value_dim = value.size(3);
  STD_TORCH_CHECK(has_sizes(output, {batch, heads, seqlen_q, value_dim}) && output.scalar_type() == query.scalar_type(),
                  "output must be [", batch, ", ", heads, ", ", seqlen_q, ", ", value_dim, "] in the dtype of query");
  STD_TORCH_CHECK(same_sizes(grad_output, output) && grad_output.scalar_type() == query.scalar_type(),
                  "grad_output must have the shape of output and the dtype of query");
  STD_TORCH_CHECK(has_sizes(lse, {batch, heads, seqlen_q}) && lse.scalar_type() == ScalarType::Float,
                  "lse must be float32 [", batch, ", ", heads, ", ", seqlen_q, "]");
  STD_TORCH_CHECK(!grad_lse.has_value() || same_sizes(*grad_lse, lse), "grad_lse must have the shape of lse");
}

// The kernels' softcap: beyond these bounds it changes nothing more, but scale / softcap might become 0 or infinite.
// 0: none.
inline float bounded_softcap(const AttentionOptions& options) {
  return options.softcap.has_value() ? static_cast<float>(std::clamp(*options.softcap, 1e-30, 1e30)) : 0.0f;
}

// The words of dropped weights are below this.
inline uint32_t dropout_threshold(double p) {
  return static_cast<uint32_t>(std::min(std::nearbyint(p * 0x1p32), 0x1p32 - 1));
}

}  // namespace fastformer
