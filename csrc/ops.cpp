// Every operator's schema, once. Python reads the same text when this library was not built (fastformer/library.py).
//
// Shapes: B batch, H query heads, G key/value heads (H a multiple of G), Sq and Sk lengths, D head_dim, Dv value width,
// N rows (all leading dimensions together), C columns, F hidden width, V vocabulary.
// Statistics (mean, rstd, lse, losses) are float32. A tensor "not asked for" comes back with no elements.
#include <torch/csrc/stable/library.h>

#include <string>

#include "cpu/level.h"

STABLE_TORCH_LIBRARY(fastformer, m) {
  // softmax over the last dimension of scale * input + mask. A bool mask keeps where True; it broadcasts to input.
  // is_causal: row i of the last two dimensions keeps columns 0..i.
  m.def("softmax_forward(Tensor input, Tensor? mask, float scale, bool is_causal) -> Tensor");
  m.def("softmax_backward(Tensor grad_output, Tensor output, float scale) -> Tensor");

  // Over the last dimension of summed = input + residual (input itself, and an empty `summed`, without a residual).
  // rms: no mean is taken off, and `mean` is empty. mean, rstd: [N].
  m.def(
      "layer_norm_forward(Tensor input, Tensor? residual, Tensor? weight, Tensor? bias, float eps, bool rms)"
      " -> (Tensor output, Tensor summed, Tensor mean, Tensor rstd)");
  // grad_summed: what flows into `summed` from elsewhere. has_bias asks for grad_bias.
  m.def(
      "layer_norm_backward(Tensor grad_output, Tensor? grad_summed, Tensor summed, Tensor? weight, Tensor mean,"
      " Tensor rstd, bool has_bias, bool rms) -> (Tensor grad_input, Tensor grad_weight, Tensor grad_bias)");

  // query [B, H, Sq, D], key [B, G, Sk, D], value [B, G, Sk, Dv]. The scores are scale * query key^T; with softcap,
  // softcap * tanh(scale * query key^T / softcap); plus -alibi_slopes |p - j| (float32 [H] or [B, H]); plus mask, which
  // broadcasts to [B, H, Sq, Sk] (bool: True may attend). Query i is at position p = i among the keys, or i + Sk - Sq
  // with bottom_right, and sees keys p - window_left .. p + window_right (none: no bound); is_causal: window_right is 0
  // at most. sinks [H] float32: one more score in each row of a head, without a value. A weight is dropped with
  // probability dropout_p by fastformer.reference.dropout_mask of dropout_state (int64 [2]: seed, offset).
  //
  // Packed: with cu_seqlens_q (int32 [B + 1], ascending from 0) query is [1, H, Tq, D], and sequence b has rows
  // cu_seqlens_q[b] .. cu_seqlens_q[b + 1]; cu_seqlens_k likewise for key and value. seqused_k (int32 [B]): only so
  // many keys of each sequence are there. Paged: with block_table (int32 [B, P]) key and value are [pages, G, page
  // size, D], and key j of sequence b is row j % size of page block_table[b, j / size]; wants seqused_k. Sq and Sk
  // above are then each sequence's own lengths. max_seqlen_q, max_seqlen_k: no sequence of what is packed or paged is
  // longer. No mask with any of these.
  //
  // output [B, H, Sq, Dv] lies in memory as [B, Sq, H, Dv]; lse [B, H, Sq], natural logarithm, -inf and an output of 0
  // where there is nothing to attend to ([1, H, Tq, Dv] and [1, H, Tq] if packed). num_splits: into how many parts the
  // keys of a few queries are split (0: as many as suit).
  m.def(
      "attention_forward(Tensor query, Tensor key, Tensor value, Tensor? mask, float scale, bool is_causal,"
      " bool bottom_right, float? softcap=None, SymInt? window_left=None, SymInt? window_right=None,"
      " Tensor? alibi_slopes=None, Tensor? sinks=None, float dropout_p=0.0, Tensor? dropout_state=None,"
      " Tensor? cu_seqlens_q=None, Tensor? cu_seqlens_k=None, Tensor? seqused_k=None, Tensor? block_table=None,"
      " SymInt max_seqlen_q=0, SymInt max_seqlen_k=0, int num_splits=0) -> (Tensor output, Tensor lse)");
  // The gradients lie in memory like output: [B, S, heads, width]. grad_mask [B, H, Sq, Sk] float32, if asked for;
  // grad_sinks [H] float32, if there are sinks. Not for paged keys.
  m.def(
      "attention_backward(Tensor grad_output, Tensor? grad_lse, Tensor query, Tensor key, Tensor value, Tensor? mask,"
      " Tensor output, Tensor lse, float scale, bool is_causal, bool bottom_right, float? softcap,"
      " bool needs_grad_mask, SymInt? window_left=None, SymInt? window_right=None, Tensor? alibi_slopes=None,"
      " Tensor? sinks=None, float dropout_p=0.0, Tensor? dropout_state=None, Tensor? cu_seqlens_q=None,"
      " Tensor? cu_seqlens_k=None, Tensor? seqused_k=None, SymInt max_seqlen_q=0, SymInt max_seqlen_k=0)"
      " -> (Tensor grad_query, Tensor grad_key, Tensor grad_value, Tensor grad_mask, Tensor grad_sinks)");

  // input weight^T + bias. input [..., C], weight [F, C], bias [F].
  m.def("linear_forward(Tensor input, Tensor weight, Tensor? bias) -> Tensor");
  // weight asks for grad_input, input for grad_weight.
  m.def(
      "linear_backward(Tensor grad_output, Tensor? input, Tensor? weight, bool needs_grad_bias)"
      " -> (Tensor grad_input, Tensor grad_weight, Tensor grad_bias)");

  // activation(input weight1^T + bias1) weight2^T + bias2, or with weight_gate
  // (activation(input weight_gate^T) * (input weight1^T + bias1)) weight2^T + bias2.
  // input [..., C], weight1 and weight_gate [F, C], weight2 [C2, F]. hidden: the arguments of the activation and the
  // product, saved when save_hidden: [N, F], or [N, 2F] = gate beside up.
  // activation: gelu, gelu_tanh, relu or silu.
  m.def(
      "feed_forward_forward(Tensor input, Tensor weight1, Tensor? bias1, Tensor? weight_gate, Tensor weight2,"
      " Tensor? bias2, str activation, bool save_hidden) -> (Tensor output, Tensor hidden)");
  m.def(
      "feed_forward_backward(Tensor grad_output, Tensor input, Tensor weight1, Tensor? weight_gate, Tensor weight2,"
      " Tensor hidden, str activation, bool has_bias1, bool has_bias2, bool needs_grad_input, bool needs_grad_weights)"
      " -> (Tensor grad_input, Tensor grad_weight1, Tensor grad_bias1, Tensor grad_weight_gate, Tensor grad_weight2,"
      " Tensor grad_bias2)");

  // Cross-entropy of logits = input weight^T + bias, which are never all in memory. input [N, C], weight [V, C],
  // bias [V], target [N] int64 (ignore_index: no loss). Without row_weight, loss [N]; with it ([N] float32), the scalar
  // sum of row_weight * loss, and with save_grads its gradients by input, weight and bias from the same pass.
  m.def(
      "linear_cross_entropy_forward(Tensor input, Tensor weight, Tensor? bias, Tensor target, Tensor? row_weight,"
      " int ignore_index, float label_smoothing, bool save_grads)"
      " -> (Tensor loss, Tensor lse, Tensor grad_input, Tensor grad_weight, Tensor grad_bias)");
  // grad_losses [N] float32: the gradient by each row's own loss.
  m.def(
      "linear_cross_entropy_backward(Tensor grad_losses, Tensor input, Tensor weight, Tensor? bias, Tensor target,"
      " Tensor lse, int ignore_index, float label_smoothing)"
      " -> (Tensor grad_input, Tensor grad_weight, Tensor grad_bias)");

  // query [B, H, S, D], key [B, G, S, D]; cos, sin [S, R] or [B, S, R], 2R <= D. Feature pairs (i, i + R), or
  // (2i, 2i + 1) when interleaved, are turned by the angle; features from 2R on pass through.
  // Results keep the layout rule of attention: memory [B, S, heads, D].
  m.def(
      "rotary_forward(Tensor query, Tensor key, Tensor cos, Tensor sin, bool interleaved)"
      " -> (Tensor query_out, Tensor key_out)");
  // Turns back: the same rotation by the negative angle.
  m.def(
      "rotary_backward(Tensor grad_query, Tensor grad_key, Tensor cos, Tensor sin, bool interleaved)"
      " -> (Tensor grad_query_in, Tensor grad_key_in)");

  // The instruction-set level the CPU kernels run at.
  m.def("cpu_isa() -> str");
}

namespace {
std::string cpu_isa() { return fastformer::level_name(fastformer::cpu_level()); }
}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastformer, CompositeExplicitAutograd, m) { m.impl("cpu_isa", TORCH_BOX(&cpu_isa)); }
