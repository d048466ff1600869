#include "attention_common.h"

namespace fastformer {
namespace {

// A run of query blocks of one sequence, and of each key head, with sums of its own for the gradients of the keys that
// it sees.
struct Part {
  int64_t sequence;
  int64_t begin, end;  // query blocks
  KeyRange seen;
  KeyRange own;    // those of them that no other part sees, if they are most: their gradients are finished at once
  int64_t work;    // pairs of a query and a key
  int64_t shared;  // where its ranges begin among the sequence's shared ones

  bool in_place() const { return own.begin == own.end && seen.begin < seen.end; }  // all of its sums are shared
};

// What is left to do for a sequence once its parts are done.
struct Rest {
  std::vector<KeyRange> shared;    // keys of one part, whose sums wait for those of the others
  int64_t stride = 0;              // floats from the sums of one range to the next's
  int64_t sums_at = 0;             // where those of the first key head begin
  std::vector<KeyRange> finished;  // ascending

  int64_t floats() const { return static_cast<int64_t>(shared.size()) * stride; }
};

int64_t length(const KeyRange& range) { return range.end - range.begin; }

// Cuts the query blocks of a sequence into parts, and appends them. Their number doesn't depend on that of the threads,
// so that the gradients, which are sums over parts in a fixed order, don't either.
void cut(const AttentionBackward& args, int64_t index, int64_t all_blocks, std::vector<Part>& parts) {
  const Attention& a = args.inputs;
  const Sequence s = sequence_at(a, index);
  const int64_t blocks = a.heads / a.kv_heads * query_blocks(s.queries);
  if (blocks == 0) return;
  const int64_t wanted = std::clamp<int64_t>(kTasks * blocks / all_blocks, 1, blocks);
  const int64_t run = (blocks + wanted - 1) / wanted;
  for (int64_t begin = 0; begin < blocks; begin += run) {
    Part part{.sequence = index,
              .begin = begin,
              .end = std::min(begin + run, blocks),
              .seen = {},
              .own = {},
              .work = 0,
              .shared = 0};
    for (int64_t block = begin; block < part.end; ++block) {
      const int64_t first = block_begin(a, block), count = std::min(kQueryBlock, s.queries - first);
      const KeyRange keys = keys_seen(a, s, first, count);
      if (length(keys) == 0) continue;
      part.seen = length(part.seen) == 0
                      ? keys
                      : KeyRange{std::min(part.seen.begin, keys.begin), std::max(part.seen.end, keys.end)};
      part.work += count * length(keys);
    }
    parts.push_back(part);
  }
}

// Which of part i's keys no other of `count` parts sees; none if they are less than half: sums that are mostly shared
// are not worth copying.
KeyRange own_keys(const Part* parts, int64_t count, int64_t i) {
  KeyRange own = parts[i].seen;
  for (int64_t j = 0; j < count; ++j) {
    const KeyRange& other = parts[j].seen;
    if (j == i || length(other) == 0) continue;
    if (other.begin <= own.begin) {
      own.begin = std::max(own.begin, other.end);
    } else {
      own.end = std::min(own.end, other.begin);
    }
  }
  return 2 * length(own) < length(parts[i].seen) ? KeyRange{0, 0} : own;
}

// The ranges of a part's other keys.
std::vector<KeyRange> shared_keys(const Part& part) {
  std::vector<KeyRange> ranges;
  if (length(part.own) == 0) {
    ranges = {part.seen};
  } else {
    ranges = {{part.seen.begin, part.own.begin}, {part.own.end, part.seen.end}};
  }
  std::erase_if(ranges, [](const KeyRange& range) { return length(range) == 0; });
  return ranges;
}

// Fills in what the parts of one sequence have of their own and share.
Rest share(const AttentionBackward& args, Part* parts, int64_t count) {
  Rest rest;
  for (int64_t i = 0; i < count; ++i) {
    Part& part = parts[i];
    part.own = own_keys(parts, count, i);
    part.shared = static_cast<int64_t>(rest.shared.size());
    if (length(part.own) > 0) rest.finished.push_back(part.own);
    for (const KeyRange& range : shared_keys(part)) {
      rest.shared.push_back(range);
      rest.stride = std::max(rest.stride, attention_backward_kernels().sums(args, length(range)));
    }
  }
  std::sort(rest.finished.begin(), rest.finished.end(),
            [](const KeyRange& x, const KeyRange& y) { return x.begin < y.begin; });
  return rest;
}

// The rows of the key tensor from a sequence's first one to the next sequence's.
int64_t rows_to_next(const Attention& a, int64_t sequence, int64_t sequences) {
  if (a.cu_seqlens_k == nullptr) return a.seqlen_k;
  return (sequence + 1 < sequences ? a.cu_seqlens_k[sequence + 1] : a.seqlen_k) - a.cu_seqlens_k[sequence];
}

// The parts, with what is left to do for each sequence.
struct Plan {
  std::vector<Part> parts;  // the longest ones first
  std::vector<Rest> rests;
  int64_t shared_sums = 0, own_sums = 0;  // floats: of all, and of one part
  int64_t scratch_bytes = 0;
};

Plan plan_parts(const AttentionBackward& args, int64_t sequences) {
  const AttentionBackwardKernels& kernels = attention_backward_kernels();
  const Attention& a = args.inputs;
  Plan plan;
  int64_t all_blocks = 0;
  for (int64_t i = 0; i < sequences; ++i) all_blocks += query_blocks(sequence_at(a, i).queries) * a.heads;
  for (int64_t i = 0; i < sequences; ++i) {
    const int64_t first = static_cast<int64_t>(plan.parts.size());
    cut(args, i, all_blocks, plan.parts);
    Rest rest = share(args, plan.parts.data() + first, static_cast<int64_t>(plan.parts.size()) - first);
    rest.sums_at = plan.shared_sums;
    plan.shared_sums += a.kv_heads * rest.floats();
    plan.rests.push_back(std::move(rest));
  }
  for (const Part& part : plan.parts) {
    plan.scratch_bytes = std::max(plan.scratch_bytes, kernels.scratch(args, length(part.seen)));
    if (!part.in_place()) plan.own_sums = std::max(plan.own_sums, kernels.sums(args, length(part.seen)));
  }
  std::stable_sort(plan.parts.begin(), plan.parts.end(), [](const Part& x, const Part& y) { return x.work > y.work; });
  return plan;
}

void run_parts(const AttentionBackward& args, const Plan& plan, float* shared_sums) {
  const AttentionBackwardKernels& kernels = attention_backward_kernels();
  const int64_t kv_heads = args.inputs.kv_heads, own_bytes = plan.own_sums * sizeof(float);
  const int64_t tasks = static_cast<int64_t>(plan.parts.size()) * kv_heads;
  run_tasks(tasks, own_bytes + plan.scratch_bytes, [&](int64_t task, void* scratch) {
    const Part& part = plan.parts[task / kv_heads];
    const Rest& rest = plan.rests[part.sequence];
    const Sequence s = sequence_at(args.inputs, part.sequence);
    const int64_t kv_head = task % kv_heads;
    float* shared = shared_sums + rest.sums_at + kv_head * rest.floats() + part.shared * rest.stride;
    float* sums = part.in_place() ? shared : static_cast<float*>(scratch);
    kernels.part(args, s, kv_head, part.begin, part.end, part.seen, sums, static_cast<char*>(scratch) + own_bytes);
    if (part.in_place()) return;
    kernels.finish(args, s, kv_head, part.own.begin, part.own.end, sums, 0, &part.seen, 1);
    for (const KeyRange& range : shared_keys(part)) {
      kernels.take(args, part.seen, sums, range, shared);
      shared += rest.stride;
    }
  });
}

// The gradients of the keys that several parts see, and of those that no query sees.
void finish_rest(const AttentionBackward& args, const Plan& plan, float* shared_sums) {
  constexpr int64_t kRows = 256;
  struct Slice {
    int64_t sequence;
    KeyRange keys;
  };
  const int64_t kv_heads = args.inputs.kv_heads, sequences = static_cast<int64_t>(plan.rests.size());
  std::vector<Slice> slices;
  for (int64_t i = 0; i < sequences; ++i) {
    const int64_t rows = rows_to_next(args.inputs, i, sequences);
    std::vector<KeyRange> finished = plan.rests[i].finished;
    finished.push_back({rows, rows});
    int64_t row = 0;
    for (const KeyRange& range : finished) {
      for (; row < range.begin; row += kRows) slices.push_back({i, {row, std::min(row + kRows, range.begin)}});
      row = range.end;
    }
  }
  run_tasks(static_cast<int64_t>(slices.size()) * kv_heads, 0, [&](int64_t task, void*) {
    const auto& [sequence, keys] = slices[task / kv_heads];
    const Rest& rest = plan.rests[sequence];
    const int64_t kv_head = task % kv_heads;
    attention_backward_kernels().finish(args, sequence_at(args.inputs, sequence), kv_head, keys.begin, keys.end,
                                        shared_sums + rest.sums_at + kv_head * rest.floats(), rest.stride,
                                        rest.shared.data(), static_cast<int64_t>(rest.shared.size()));
  });
}

// -sum of exp(sink - lse) * delta over a head's queries, in double precision. Where lse is -inf nothing was attended.
void fill_grad_sinks(const AttentionBackward& args, int64_t sequences, float* grad_sinks) {
  const Attention& a = args.inputs;
  torch::stable::parallel_for(0, a.heads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t head = begin; head < end; ++head) {
      double sum = 0.0;
      for (int64_t i = 0; i < sequences; ++i) {
        const Sequence s = sequence_at(a, i);
        const int64_t at = (s.query_batch * a.heads + head) * a.seqlen_q + s.query_begin;
        for (int64_t row = at; row < at + s.queries; ++row) {
          if (args.lse[row] == -INFINITY) continue;
          sum -= std::exp(static_cast<double>(a.sinks[head]) - args.lse[row]) * args.delta[row];
        }
      }
      grad_sinks[head] = static_cast<float>(sum);
    }
  });
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> attention_backward(
    const Tensor& grad_output, const std::optional<Tensor>& grad_lse, const Tensor& query, const Tensor& key,
    const Tensor& value, const std::optional<Tensor>& mask, const Tensor& output, const Tensor& lse, double scale,
    bool is_causal, bool bottom_right, std::optional<double> softcap, bool needs_grad_mask,
    std::optional<int64_t> window_left, std::optional<int64_t> window_right, const std::optional<Tensor>& alibi_slopes,
    const std::optional<Tensor>& sinks, double dropout_p, const std::optional<Tensor>& dropout_state,
    const std::optional<Tensor>& cu_seqlens_q, const std::optional<Tensor>& cu_seqlens_k,
    const std::optional<Tensor>& seqused_k, int64_t max_seqlen_q, int64_t max_seqlen_k) {
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
  const int64_t batch = query.size(0), heads = query.size(1), seqlen_q = query.size(2), head_dim = query.size(3);
  const int64_t kv_heads = key.size(1), seqlen_k = key.size(2), value_dim = value.size(3);
  check_attention_gradients(query, value, output, lse, grad_output, grad_lse);
  Tensor grad_query = empty_heads(query, batch, heads, seqlen_q, head_dim);
  Tensor grad_key = empty_heads(key, key.size(0), kv_heads, seqlen_k, head_dim);
  Tensor grad_value = empty_heads(value, key.size(0), kv_heads, seqlen_k, value_dim);
  const Tensor grad_mask = needs_grad_mask
                               ? torch::stable::new_zeros(query, {batch, heads, seqlen_q, seqlen_k}, ScalarType::Float)
                               : empty_like_sizes(query, {0}, ScalarType::Float);
  Tensor grad_sinks = empty_like_sizes(query, {sinks.has_value() ? heads : 0}, ScalarType::Float);
  if (call.sequences * heads == 0) {
    for (Tensor* grad : {&grad_query, &grad_key, &grad_value, &grad_sinks}) torch::stable::zero_(*grad);
    return {grad_query, grad_key, grad_value, grad_mask, grad_sinks};
  }
  const Tensor dout = rows_contiguous(grad_output), out = rows_contiguous(output), row_lse = as_contiguous(lse);
  const std::optional<Tensor> dlse =
      grad_lse.has_value() ? std::optional(as_float(*grad_lse, "grad_lse")) : std::nullopt;
  const Scratch delta(sinks.has_value() ? lse.numel() * sizeof(float) : 0);
  const AttentionBackward args{
      .inputs = call.inputs,
      .grad_output = pointer(dout),
      .output = pointer(out),
      .grad_lse = pointer<float>(dlse),
      .lse = pointer<float>(row_lse),
      .grad_query = mutable_pointer(grad_query),
      .grad_key = mutable_pointer(grad_key),
      .grad_value = mutable_pointer(grad_value),
      .grad_mask = needs_grad_mask ? mutable_pointer<float>(grad_mask) : nullptr,
      .delta = sinks.has_value() ? delta.as<float>() : nullptr,
      .grad_output_strides = {dout.stride(0), dout.stride(1), dout.stride(2)},
      .output_strides = {out.stride(0), out.stride(1), out.stride(2)},
  };
  const Plan plan = plan_parts(args, call.sequences);
  const Scratch shared_sums(plan.shared_sums * sizeof(float));
  run_parts(args, plan, shared_sums.as<float>());
  finish_rest(args, plan, shared_sums.as<float>());
  if (const int32_t* ends = args.inputs.cu_seqlens_q) clear_rows(grad_query, ends[call.sequences]);
  if (sinks.has_value()) fill_grad_sinks(args, call.sequences, mutable_pointer<float>(grad_sinks));
  return {grad_query, grad_key, grad_value, grad_mask, grad_sinks};
}

}  // namespace
}  // namespace fastformer

STABLE_TORCH_LIBRARY_IMPL(fastformer, CPU, m) {
  m.impl("attention_backward", TORCH_BOX(&fastformer::attention_backward));
}
