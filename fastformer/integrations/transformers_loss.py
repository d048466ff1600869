"""Hugging Face's causal language models: unembedding and loss in one, and logits only if they are asked for."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fastformer import functional as F
from fastformer.nn.fusion import LINEAR, is_plain

if TYPE_CHECKING:
    from transformers.utils import ModelOutput

NOW = "now on fastformer's linear_cross_entropy: in training with labels, logits are computed if they are read"


def causal_lm(original: type[torch.nn.Module]) -> Callable[..., Any]:
    """The forward of a subclass of a class whose forward is base model, ``lm_head``, ForCausalLMLoss.

    While training, with gradients, when labels are given, the loss is computed without logits; the output then has
    ``logits`` that are computed when they are first read. Compiled code can't wait for that, and computes them first.
    """
    from transformers.loss.loss_utils import ForCausalLMLoss
    from transformers.modeling_outputs import CausalLMOutputWithCrossAttentions, CausalLMOutputWithPast

    def forward(self: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
        fused = (
            self.training
            and type(self) is not original  # restored, behind a wrapper that has kept this method
            and kwargs.get("labels") is not None
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
        hidden_states = outputs.last_hidden_state
        fields = {
            "past_key_values": outputs.past_key_values,
            "hidden_states": outputs.hidden_states,
            "attentions": outputs.attentions,
        }
        kind = CausalLMOutputWithPast
        if hasattr(outputs, "cross_attentions"):
            kind, fields["cross_attentions"] = CausalLMOutputWithCrossAttentions, outputs.cross_attentions
        if torch.compiler.is_compiling():
            logits = self.lm_head(hidden_states)
            loss = ForCausalLMLoss(logits, labels, self.config.vocab_size, **kwargs)
            return kind(loss=loss, logits=logits, **fields)
        output = _with_late_logits(kind)(loss=_loss(hidden_states, self.lm_head, labels, **kwargs), **fields)
        output.unembed = _unembedding(self.lm_head, hidden_states)
        return output

    return forward


@functools.cache
def _with_late_logits(kind: type[ModelOutput]) -> type[ModelOutput]:
    """A subclass of an output class whose ``logits`` are what ``unembed`` returns when they are first read.

    As an attribute, by name, by number or in a tuple; they are not among ``keys``, so that what goes through all of an
    output doesn't compute them. A wrapper that builds another output of its keys gives ``logits`` that are None.
    """

    class Output(kind):
        unembed: Callable[[], Tensor] | None = None

        @property
        def logits(self) -> Tensor | None:
            if self.unembed is not None:
                self.logits = self.unembed()
            return vars(self).get("_logits")

        @logits.setter
        def logits(self, logits: Tensor | None) -> None:
            vars(self).update(_logits=logits, unembed=None)

        def __getitem__(self, key: str | int | slice) -> Any:
            if key == "logits" and self.logits is not None:
                return self.logits
            return super().__getitem__(key)

        def to_tuple(self) -> tuple[Any, ...]:
            values = (getattr(self, field.name) for field in dataclasses.fields(self))
            return tuple(value for value in values if value is not None)

        def __reduce__(self) -> tuple[Any, ...]:
            return kind, tuple(getattr(self, field.name) for field in dataclasses.fields(self))

    Output.__name__, Output.__qualname__, Output.__module__ = kind.__name__, kind.__qualname__, kind.__module__
    return Output


def _unembedding(head: torch.nn.Linear, hidden_states: Tensor) -> Callable[[], Tensor]:
    """The head's output, later, under the autocast of now."""
    device, version = hidden_states.device.type, head.weight._version
    enabled, dtype = torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)

    def unembed() -> Tensor:
        if head.weight._version != version:
            raise RuntimeError("lm_head has changed since the forward pass: read logits before the optimizer's step")
        with torch.autocast(device, dtype, enabled=enabled):
            return head(hidden_states)

    return unembed


def reason_to_leave(model: torch.nn.Module) -> str:
    """Why the model's unembedding and loss can't be one, or the empty string."""
    if getattr(model.config, "final_logit_softcapping", None) is not None:
        return "its logits are softcapped before the loss"
    # The property loss_function would warn of a loss_type of None, which stands for ForCausalLM.
    if hasattr(model, "_loss_function") or model.loss_type not in (None, "ForCausalLM"):
        return "its loss function was replaced"
    head = model.lm_head
    if not is_plain(head, *LINEAR) or head.weight.shape[0] != model.config.vocab_size:
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
    return (loss if num_items_in_batch is None else loss / num_items_in_batch).float()


def _is_zero(logits_to_keep: int | Tensor) -> bool:
    """Whether all logits are kept."""
    return isinstance(logits_to_keep, int) and logits_to_keep == 0
