#include "attention_common.h"

namespace fastformer {
namespace {

// Up to so many queries stream keys and values instead of packing them.
constexpr int64_t kDecodeQueries = 4;

// What a query that streams its keys costs beside one of a block, for each key: about so many times as much.
constexpr int64_t kDecodeCost = 4;

// Part of the work on one sequence, the same for each key head: query blocks [begin, end); or, if there are few
// queries, part `part` of `parts` of their keys, [begin, end).
struct Task {
  int64_t sequence, begin, end, cost;
  int64_t part = 0, parts = 0;
  int64_t states = 0;    // where those of the sequence's parts begin
  int64_t counters = 0;  // and those of its key heads' finished parts
};

int64_t group_size(const Attention& a) { return a.heads / a.kv_heads; }

// Runs of query blocks that share packed keys and values.
void add_blocks(const Attention& a, const Sequence& s, int64_t run, std::vector<Task>& tasks) {
  const int64_t blocks = group_size(a) * query_blocks(s.queries);
  for (int64_t begin = 0; begin < blocks; begin += run) {
    Task task{s.index, begin, std::min(begin + run, blocks), 0};
    for (int64_t block = begin; block < task.end; ++block) {
      const int64_t first = block_begin(a, block), count = std::min(kQueryBlock, s.queries - first);
      const KeyRange seen = keys_seen(a, s, first, count);
      task.cost += kQueryBlock * (seen.end - seen.begin);
    }
    tasks.push_back(task);
  }
}

// At most `most` runs of keys, between multiples of kDecodeAlignment.
void add_parts(const Attention& a, const Sequence& s, int64_t most, std::vector<Task>& tasks) {
  const KeyRange seen = keys_seen(a, s, 0, s.queries);
  const int64_t begin = seen.begin / kDecodeAlignment * kDecodeAlignment, keys = seen.end - begin;
  const int64_t units = (keys + kDecodeAlignment - 1) / kDecodeAlignment;
  const int64_t run = std::max<int64_t>((units - 1) / most + 1, 1) * kDecodeAlignment;
  const int64_t parts = std::max<int64_t>((keys + run - 1) / run, 1);
  for (int64_t part = 0; part < parts; ++part) {
    const int64_t from = begin + part * run, to = std::min(from + run, seen.end);
    tasks.push_back({s.index, from, to, kDecodeCost * group_size(a) * s.queries * (to - from), part, parts});
  }
}

// How many parts suit; never by the number of threads, so that results don't depend on it.
int64_t decode_parts(int64_t sequences, int64_t keys) {
  return std::clamp<int64_t>(std::min(kTasks / sequences, keys / 256), 1, kTasks);
}

void attend(const AttentionForward& args, int64_t sequences, int64_t num_splits) {
  const Attention& a = args.inputs;
  const AttentionKernels& kernels = attention_kernels();
  const AttentionDecodeKernels& decode = attention_decode_kernels();

  // Runs of several for each thread, but with no more state than the second-level cache holds.
  const int64_t block_bytes = kernels.forward_scratch(args, 2) - kernels.forward_scratch(args, 1);
  int64_t blocks = 0;
  for (int64_t i = 0; i < sequences; ++i) blocks += query_blocks(sequence_at(a, i).queries) * a.heads;
  const int64_t fair = blocks / (4 * static_cast<int64_t>(torch::stable::get_num_threads()));
  const int64_t run = std::clamp<int64_t>(fair, 1, std::max<int64_t>((512 << 10) / block_bytes, 1));

  std::vector<Task> tasks;
  int64_t longest_run = 0, most_queries = 0, all_states = 0, all_counters = 0;
  for (int64_t i = 0; i < sequences; ++i) {
    const Sequence s = sequence_at(a, i);
    const size_t before = tasks.size();
    if (s.queries > kDecodeQueries) {
      add_blocks(a, s, run, tasks);
      longest_run = std::max(longest_run, tasks[before].end);
    } else if (s.queries > 0) {
      const KeyRange seen = keys_seen(a, s, 0, s.queries);
      add_parts(a, s, num_splits > 0 ? num_splits : decode_parts(sequences * a.kv_heads, seen.end - seen.begin), tasks);
      most_queries = std::max(most_queries, s.queries);
      if (tasks.back().parts == 1) continue;
      for (size_t t = before; t < tasks.size(); ++t) {
        tasks[t].states = all_states;
        tasks[t].counters = all_counters;
      }
      all_states += tasks.back().parts * a.kv_heads * decode.states(args, s.queries);
      all_counters += a.kv_heads;
    }
  }
  std::stable_sort(tasks.begin(), tasks.end(), [](const Task& x, const Task& y) { return x.cost > y.cost; });

  // A sequence of one part needs its states for no longer than its task.
  const Scratch states(all_states * static_cast<int64_t>(sizeof(float)));
  std::vector<std::atomic<int64_t>> finished(all_counters);
  const int64_t own_states = decode.states(args, most_queries) * static_cast<int64_t>(sizeof(float));
  const int64_t bytes = std::max(longest_run > 0 ? kernels.forward_scratch(args, longest_run) : 0,
                                 most_queries > 0 ? own_states + decode.scratch(args, most_queries) : 0);
  const auto states_of = [&](const Task& task, int64_t kv_head, int64_t part) {
    const int64_t index = kv_head * task.parts + part, queries = sequence_at(a, task.sequence).queries;
    return states.as<float>() + task.states + index * decode.states(args, queries);
  };
  run_tasks(static_cast<int64_t>(tasks.size()) * a.kv_heads, bytes, [&](int64_t index, void* scratch) {
    const Task& task = tasks[index / a.kv_heads];
    const int64_t kv_head = index % a.kv_heads;
    const Sequence s = sequence_at(a, task.sequence);
    if (task.parts == 0) {
      kernels.forward(args, s, kv_head, task.begin, task.end, scratch);
      return;
    }
    float* part = task.parts == 1 ? static_cast<float*>(scratch) : states_of(task, kv_head, task.part);
    decode.part(args, s, kv_head, task.begin, task.end, part, static_cast<char*>(scratch) + own_states);
    // Whoever finishes the last part adds them all up, in their order.
    if (task.parts > 1 && ++finished[task.counters + kv_head] < task.parts) return;
    decode.combine(args, s, kv_head, task.parts == 1 ? part : states_of(task, kv_head, 0), task.parts);
  });
}

std::tuple<Tensor, Tensor> attention_forward(
    const Tensor& query, const Tensor& key, const Tensor& value, const std::optional<Tensor>& mask, double scale,
    bool is_causal, bool bottom_right, std::optional<double> softcap, std::optional<int64_t> window_left,
    std::optional<int64_t> window_right, const std::optional<Tensor>& alibi_slopes, const std::optional<Tensor>& sinks,
    double dropout_p, const std::optional<Tensor>& dropout_state, const std::optional<Tensor>& cu_seqlens_q,
    const std::optional<Tensor>& cu_seqlens_k, const std::optional<Tensor>& seqused_k,
    const std::optional<Tensor>& block_table, int64_t max_seqlen_q, int64_t max_seqlen_k, int64_t num_splits) {
  STD_TORCH_CHECK(num_splits >= 0, "num_splits must not be negative");
  const auto [scaled_query, positive_scale] = with_positive_scale(query, scale);
  const AttentionCall call = attention_call(scaled_query, key, value,
                                            {.mask = mask,
                                             .scale = positive_scale,
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
                                             .block_table = block_table,
                                             .max_seqlen_q = max_seqlen_q,
                                             .max_seqlen_k = max_seqlen_k});
  const int64_t batch = query.size(0), heads = query.size(1), seqlen_q = query.size(2), value_dim = value.size(3);
  const Tensor output = empty_heads(query, batch, heads, seqlen_q, value_dim);
  const Tensor lse = empty_like_sizes(query, {batch, heads, seqlen_q}, ScalarType::Float);
  if (lse.numel() == 0) return {output, lse};
  const AttentionForward args{
      .inputs = call.inputs,
      .output = mutable_pointer(output),
      .lse = mutable_pointer<float>(lse),
  };
  if (call.sequences > 0) attend(args, call.sequences, num_splits);
  if (const int32_t* ends = call.inputs.cu_seqlens_q) {
    const int64_t end = ends[call.sequences];
    clear_rows(output, end);
    for (int64_t head = 0; head < heads; ++head) {
      std::fill_n(args.lse + head * seqlen_q + end, seqlen_q - end, -INFINITY);
    }
  }
  return {output, lse};
}

}  // namespace
}  // namespace fastformer

STABLE_TORCH_LIBRARY_IMPL(fastformer, CPU, m) {
  m.impl("attention_forward", TORCH_BOX(&fastformer::attention_forward));
}
