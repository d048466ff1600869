#include "kernels/attention.h"

#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>

#include <algorithm>
#include <atomic>

#include "mask.h"

namespace fastformer {
namespace {

// Fewer sequences than this are cut into parts by the backward pass and by decoding.
constexpr int64_t kTasks = 32;

// Up to so many queries stream keys and values instead of packing them.
constexpr int64_t kDecodeQueries = 4;

// Calls f(task, scratch) for every task, each thread taking the next one that is left: causal tasks differ in length.
template <typename F>
void run_tasks(int64_t tasks, int64_t scratch_bytes, const F& f) {
  std::atomic<int64_t> next{0};
  const int64_t workers = std::min<int64_t>(tasks, torch::stable::get_num_threads());
  torch::stable::parallel_for(0, workers, 1, [&](int64_t, int64_t) {
    const Scratch scratch(scratch_bytes);
    for (int64_t task = next++; task < tasks; task = next++) f(task, scratch.as<void>());
  });
}

Tensor rows_contiguous(const Tensor& tensor) {
  const int64_t last = tensor.dim() - 1;
  return tensor.stride(last) == 1 || tensor.size(last) <= 1 ? tensor : torch::stable::contiguous(tensor);
}

Tensor times(const Tensor& tensor, double factor) {
  AtenTensorHandle result = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_mul_Scalar(tensor.get(), factor, &result));
  return Tensor(result);
}

bool has_sizes(const Tensor& tensor, std::initializer_list<int64_t> sizes) {
  return std::equal(sizes.begin(), sizes.end(), tensor.sizes().begin(), tensor.sizes().end());
}

void check_inputs(const Tensor& query, const Tensor& key, const Tensor& value) {
  STD_TORCH_CHECK(query.dim() == 4 && key.dim() == 4 && value.dim() == 4, "query, key, value must have 4 dimensions");
  STD_TORCH_CHECK(key.scalar_type() == query.scalar_type() && value.scalar_type() == query.scalar_type(),
                  "key and value must have the dtype of query");
  STD_TORCH_CHECK(key.size(0) == query.size(0) && value.size(0) == query.size(0),
                  "key and value must have the batch size of query");
  STD_TORCH_CHECK(key.size(3) == query.size(3), "key must have the head_dim of query");
  STD_TORCH_CHECK(value.size(1) == key.size(1) && value.size(2) == key.size(2),
                  "value must have the heads and length of key");
  STD_TORCH_CHECK(key.size(1) == query.size(1) || (key.size(1) > 0 && query.size(1) % key.size(1) == 0),
                  "query's heads must be a multiple of key's");
}

Attention attention_inputs(const Tensor& query, const Tensor& key, const Tensor& value, const BroadcastMask& mask,
                           double scale, bool is_causal, bool bottom_right, std::optional<double> softcap) {
  STD_TORCH_CHECK(!softcap.has_value() || *softcap > 0, "softcap must be positive");
  const int64_t seqlen_q = query.size(2), seqlen_k = key.size(2);
  const auto strides = [](const Tensor& t, int64_t (&to)[3]) {
    for (int64_t i = 0; i < 3; ++i) to[i] = t.stride(i);
  };
  Attention a{
      .query = pointer(query),
      .key = pointer(key),
      .value = pointer(value),
      .mask = mask.data,
      .dtype = dtype_of(query, "query"),
      .mask_dtype = mask.dtype,
      .mask_kind = mask.kind,
      .heads = query.size(1),
      .kv_heads = key.size(1),
      .seqlen_q = seqlen_q,
      .seqlen_k = seqlen_k,
      .head_dim = query.size(3),
      .value_dim = value.size(3),
      .query_strides = {},
      .key_strides = {},
      .value_strides = {},
      .mask_strides = {mask.strides[0], mask.strides[1], mask.strides[2], mask.strides[3]},
      .scale = static_cast<float>(scale),
      // Beyond these bounds it changes nothing more, but scale / softcap might become 0 or infinite.
      .softcap = softcap.has_value() ? static_cast<float>(std::clamp(*softcap, 1e-30, 1e30)) : 0.0f,
      .diagonal = !is_causal     ? seqlen_k
                  : bottom_right ? seqlen_k - seqlen_q + 1
                                 : 1,
  };
  strides(query, a.query_strides);
  strides(key, a.key_strides);
  strides(value, a.value_strides);
  return a;
}

int64_t blocks_per_kv_head(const Attention& a) {
  return a.heads / a.kv_heads * ((a.seqlen_q + kQueryBlock - 1) / kQueryBlock);
}

// Tasks are runs of query blocks that share packed keys and values: several for each thread, but no more state than the
// second-level cache holds.
void attend(const AttentionForward& args, int64_t batch) {
  const AttentionKernels& kernels = attention_kernels();
  const int64_t kv_heads = args.inputs.kv_heads, sequences = batch * kv_heads, blocks = blocks_per_kv_head(args.inputs);
  const int64_t block_bytes = kernels.forward_scratch(args, 2) - kernels.forward_scratch(args, 1);
  const int64_t fair = sequences * blocks / (4 * static_cast<int64_t>(torch::stable::get_num_threads()));
  const int64_t run = std::clamp<int64_t>(std::min<int64_t>(fair, (512 << 10) / block_bytes), 1, blocks);
  const int64_t runs = (blocks + run - 1) / run;
  run_tasks(runs * sequences, kernels.forward_scratch(args, run), [&](int64_t task, void* scratch) {
    const int64_t sequence = task % sequences, begin = (runs - 1 - task / sequences) * run;  // the longest ones first
    kernels.forward(args, sequence / kv_heads, sequence % kv_heads, begin, std::min(begin + run, blocks), scratch);
  });
}

// Tasks are runs of keys; their number doesn't depend on that of the threads, so that results don't either.
void decode(const AttentionForward& args, int64_t batch) {
  const AttentionDecodeKernels& kernels = attention_decode_kernels();
  const int64_t kv_heads = args.inputs.kv_heads, sequences = batch * kv_heads, keys = args.inputs.seqlen_k;
  const int64_t parts = std::clamp<int64_t>(std::min(kTasks / sequences, keys / 256), 1, kTasks);
  const int64_t run = (keys + parts - 1) / parts, states = kernels.states(args);
  const Scratch all_states(sequences * parts * states * sizeof(float));
  run_tasks(sequences * parts, kernels.scratch(args), [&](int64_t task, void* scratch) {
    const int64_t sequence = task / parts, begin = task % parts * run;
    kernels.part(args, sequence / kv_heads, sequence % kv_heads, begin, std::min(begin + run, keys),
                 all_states.as<float>() + task * states, scratch);
  });
  for (int64_t sequence = 0; sequence < sequences; ++sequence) {
    kernels.combine(args, sequence / kv_heads, sequence % kv_heads, all_states.as<float>() + sequence * parts * states,
                    parts);
  }
}

std::tuple<Tensor, Tensor> attention_forward(const Tensor& query, const Tensor& key, const Tensor& value,
                                             const std::optional<Tensor>& mask, double scale, bool is_causal,
                                             bool bottom_right, std::optional<double> softcap) {
  check_inputs(query, key, value);
  const int64_t batch = query.size(0), heads = query.size(1), seqlen_q = query.size(2), seqlen_k = key.size(2);
  const Tensor output = empty_heads(query, batch, heads, seqlen_q, value.size(3));
  const Tensor lse = empty_like_sizes(query, {batch, heads, seqlen_q}, ScalarType::Float);
  if (lse.numel() == 0) return {output, lse};
  // The kernel's scale is positive: the largest product is then the largest score.
  const double sign = scale > 0 ? 1.0 : scale < 0 ? -1.0 : scale;  // 0 and NaN stay
  const Tensor q = rows_contiguous(sign == 1.0 ? query : times(query, sign)), k = rows_contiguous(key),
               v = rows_contiguous(value);
  const AttentionForward args{
      .inputs = attention_inputs(q, k, v, broadcast_mask(mask, {batch, heads, seqlen_q, seqlen_k}),
                                 sign == 0.0 ? 1.0 : std::abs(scale), is_causal, bottom_right, softcap),
      .output = mutable_pointer(output),
      .lse = mutable_pointer<float>(lse),
  };
  if (seqlen_q <= kDecodeQueries) {
    decode(args, batch);
  } else {
    attend(args, batch);
  }
  return {output, lse};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> attention_backward(
    const Tensor& grad_output, const std::optional<Tensor>& grad_lse, const Tensor& query, const Tensor& key,
    const Tensor& value, const std::optional<Tensor>& mask, const Tensor& output, const Tensor& lse, double scale,
    bool is_causal, bool bottom_right, std::optional<double> softcap, bool needs_grad_mask) {
  check_inputs(query, key, value);
  const int64_t batch = query.size(0), heads = query.size(1), seqlen_q = query.size(2), seqlen_k = key.size(2);
  const int64_t kv_heads = key.size(1), head_dim = query.size(3), value_dim = value.size(3);
  STD_TORCH_CHECK(has_sizes(output, {batch, heads, seqlen_q, value_dim}) && output.scalar_type() == query.scalar_type(),
                  "output must be [", batch, ", ", heads, ", ", seqlen_q, ", ", value_dim, "] in the dtype of query");
  STD_TORCH_CHECK(same_sizes(grad_output, output) && grad_output.scalar_type() == query.scalar_type(),
                  "grad_output must have the shape of output and the dtype of query");
  STD_TORCH_CHECK(has_sizes(lse, {batch, heads, seqlen_q}) && lse.scalar_type() == ScalarType::Float,
                  "lse must be float32 [", batch, ", ", heads, ", ", seqlen_q, "]");
  STD_TORCH_CHECK(!grad_lse.has_value() || same_sizes(*grad_lse, lse), "grad_lse must have the shape of lse");
  const Tensor grad_query = empty_heads(query, batch, heads, seqlen_q, head_dim);
  Tensor grad_key = empty_heads(key, batch, kv_heads, seqlen_k, head_dim);
  Tensor grad_value = empty_heads(value, batch, kv_heads, seqlen_k, value_dim);
  const Tensor grad_mask = needs_grad_mask
                               ? torch::stable::new_zeros(query, {batch, heads, seqlen_q, seqlen_k}, ScalarType::Float)
                               : empty_like_sizes(query, {0}, ScalarType::Float);
  if (batch * heads == 0) {
    return {grad_query, torch::stable::zero_(grad_key), torch::stable::zero_(grad_value), grad_mask};
  }
  const Tensor q = rows_contiguous(query), k = rows_contiguous(key), v = rows_contiguous(value);
  const Tensor dout = rows_contiguous(grad_output), out = rows_contiguous(output), row_lse = as_contiguous(lse);
  const std::optional<Tensor> dlse =
      grad_lse.has_value() ? std::optional(as_float(*grad_lse, "grad_lse")) : std::nullopt;
  AttentionBackward args{
      .inputs = attention_inputs(q, k, v, broadcast_mask(mask, {batch, heads, seqlen_q, seqlen_k}), scale, is_causal,
                                 bottom_right, softcap),
      .grad_output = pointer(dout),
      .output = pointer(out),
      .grad_lse = pointer<float>(dlse),
      .lse = pointer<float>(row_lse),
      .grad_query = mutable_pointer(grad_query),
      .grad_key = mutable_pointer(grad_key),
      .grad_value = mutable_pointer(grad_value),
      .grad_mask = needs_grad_mask ? mutable_pointer<float>(grad_mask) : nullptr,
      .grad_output_strides = {dout.stride(0), dout.stride(1), dout.stride(2)},
      .output_strides = {out.stride(0), out.stride(1), out.stride(2)},
  };
  const AttentionBackwardKernels& kernels = attention_backward_kernels();
  const int64_t sequences = batch * kv_heads, blocks = blocks_per_kv_head(args.inputs);
  const int64_t sums = kernels.sums(args), sums_bytes = sums * sizeof(float), scratch_bytes = kernels.scratch(args);
  // Few sequences are cut into parts of their queries, whose sums are added up in a fixed order. The number of parts
  // must not depend on the number of threads, so that the gradients don't either.
  const int64_t wanted = std::clamp<int64_t>(kTasks / sequences, 1, std::max<int64_t>(blocks, 1));
  const int64_t run = (blocks + wanted - 1) / wanted, parts = blocks == 0 ? 1 : (blocks + run - 1) / run;
  if (parts == 1) {
    run_tasks(sequences, sums_bytes + scratch_bytes, [&](int64_t task, void* scratch) {
      float* own_sums = static_cast<float*>(scratch);
      kernels.part(args, task / kv_heads, task % kv_heads, 0, blocks, own_sums, own_sums + sums);
      kernels.finish(args, task / kv_heads, task % kv_heads, 0, seqlen_k, own_sums, 1);
    });
  } else {
    const Scratch all_sums(sequences * parts * sums_bytes);
    run_tasks(sequences * parts, scratch_bytes, [&](int64_t task, void* scratch) {
      const int64_t sequence = task % sequences, part = parts - 1 - task / sequences;  // the longest ones first
      kernels.part(args, sequence / kv_heads, sequence % kv_heads, part * run, std::min((part + 1) * run, blocks),
                   all_sums.as<float>() + (sequence * parts + part) * sums, scratch);
    });
    constexpr int64_t kRows = 256;
    const int64_t slices = (seqlen_k + kRows - 1) / kRows;
    run_tasks(sequences * slices, 0, [&](int64_t task, void*) {
      const int64_t sequence = task / slices, begin = task % slices * kRows;
      kernels.finish(args, sequence / kv_heads, sequence % kv_heads, begin, std::min(begin + kRows, seqlen_k),
                     all_sums.as<float>() + sequence * parts * sums, parts);
    });
  }
  return {grad_query, grad_key, grad_value, grad_mask};
}

}  // namespace
}  // namespace fastformer

STABLE_TORCH_LIBRARY_IMPL(fastformer, CPU, m) {
  m.impl("attention_forward", TORCH_BOX(&fastformer::attention_forward));
  m.impl("attention_backward", TORCH_BOX(&fastformer::attention_backward));
}
