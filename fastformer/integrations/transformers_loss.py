"""Hugging Face's causal language models: unembedding and loss in one, without the logits."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastformer import functional as F
from fastformer.nn.fusion import is_plain

NOW = "now on fastformer's linear_cross_entropy: no logits are returned in training when labels are given"


def causal_lm(original: type[torch.nn.Module]) -> Callable[..., Any]:
    """The forward of a subclass of a class whose forward is base model, ``lm_head``, ForCausalLMLoss.

    Its ``loss`` is the original's. ``logits`` is None when the loss was computed without them: while training, with
    gradients, when labels are given.
    """
    from transformers.modeling_outputs import CausalLMOutputWithCrossAttentions, CausalLMOutputWithPast

    def forward(self: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
        fused = (
            kwargs.get("labels") is not None
            and self.training
            and torch.is_grad_enabled()
            and len(args) <= 1  # input_ids; the order of the others differs between classes
            and _is_zero(kwargs.get("logits_to_keep", 0))
            and kwargs.get("return_dict") is not False  # in a tuple without logits all that follows would move
            and not reason_to_leave(self)
        )
        if not fused:
            return original.forward(self, *args, **kwargs)
        labels = kwargs.pop("labels")
        kwargs.pop("logits_to_keep", None)
        kwargs.pop("return_dict", None)
        outputs = self.base_model(*args, **kwargs)
        fields = {
            "loss": _loss(outputs.last_hidden_state, self.lm_head, labels, **kwargs),
            "past_key_values": outputs.past_key_values,
            "hidden_states": outputs.hidden_states,
            "attentions": outputs.attentions,
        }
        if hasattr(outputs, "cross_attentions"):
            return CausalLMOutputWithCrossAttentions(**fields, cross_attentions=outputs.cross_attentions)
        return CausalLMOutputWithPast(**fields)

    return forward


def reason_to_leave(model: torch.nn.Module) -> str:
    """Why the model's unembedding and loss can't be one, or the empty string."""
    if getattr(model.config, "final_logit_softcapping", None) is not None:
        return "its logits are softcapped before the loss"
    # The property loss_function would warn of a loss_type of None, which stands for ForCausalLM.
    if hasattr(model, "_loss_function") or model.loss_type not in (None, "ForCausalLM"):
        return "its loss function was replaced"
    head = model.lm_head
    if not is_plain(head, torch.nn.Linear) or head.weight.shape[0] != model.config.vocab_size:
        return "its lm_head is no plain torch.nn.Linear over the vocabulary"
    return ""


def _loss(
    hidden_states: Tensor,
    head: torch.nn.Linear,
    labels: Tensor,
    *,
    num_items_in_batch: Tensor | int | None = None,
    ignore_index: int = -100,
    shift_labels: Tensor | None = None,
    **_: Any,
) -> Tensor:
    """transformers' ForCausalLMLoss of ``head(hidden_states)``, [B, S, C], for labels [B, S]; in float32."""
    if shift_labels is None:
        shift_labels = F.pad(labels, (0, 1), value=ignore_index)[..., 1:]
    device, dtype = hidden_states.device.type, hidden_states.dtype
    low = dtype in (torch.bfloat16, torch.float16) and not torch.is_autocast_enabled(device)
    # Under autocast the loss of low-precision states is float32, as it is from logits that were cast.
    with torch.autocast(device, dtype) if low else contextlib.nullcontext():
        loss = F.linear_cross_entropy(
            hidden_states,
            head.weight,
            shift_labels.to(hidden_states.device).reshape(hidden_states.shape[:-1]),
            linear_bias=head.bias,
            reduction="mean" if num_items_in_batch is None else "sum",
            ignore_index=ignore_index,
        )
    if isinstance(num_items_in_batch, Tensor):
        num_items_in_batch = num_items_in_batch.to(loss.device)
    return loss if num_items_in_batch is None else loss / num_items_in_batch


def _is_zero(logits_to_keep: int | Tensor) -> bool:
    """Whether all logits are kept."""
    return isinstance(logits_to_keep, int) and logits_to_keep == 0
