"""Hugging Face transformers' layers on fastformer's kernels, known by the names of their classes.

For each known class there is one subclass of it, of the same name, since transformers writes and compares the names of
classes. Only one method of it is ours, which computes what the original does; where that would skip a hook, a replaced
submodule or dropout, it calls the original. Importing this file doesn't import transformers.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastformer import functional as F
from fastformer.integrations import transformers_loss
from fastformer.nn.fusion import is_plain
from fastformer.nn.residual import activation_name, add_norm, fused_feed_forward

#: The attribute of a swapped module, or of its class, that holds the class it had.
ORIGINAL = "_fastformer_original"

#: transformers' activations, and the names by which feed_forward knows them.
ACTIVATIONS = {
    "FastGELUActivation": "gelu_tanh",
    "GELUActivation": "gelu",
    "GELUTanh": "gelu_tanh",
    "NewGELUActivation": "gelu_tanh",
    "SiLUActivation": "silu",
}

#: Rows from which a fused GPT2MLP is faster: its weights lie transposed, and our kernels copy them in every call.
CONV1D_ROWS = 128

Module = type[torch.nn.Module]
Method = Callable[..., Any]


class Recipe(NamedTuple):
    """How our subclass of one of transformers' classes comes about."""

    make: Callable[[Module], Method]  # of the original class, which it may call, our method
    now: str  # what the report says
    method: str = "forward"


# --- norms


def _rms_norm(original: Module) -> Method:
    def forward(self: torch.nn.Module, hidden_states: Tensor) -> Tensor:
        weight = self.weight
        if hidden_states.dtype != weight.dtype:  # the original's result is then of either dtype
            return original.forward(self, hidden_states)
        return F.rms_norm(hidden_states, weight.shape, weight, self.variance_epsilon).to(weight.dtype)

    return forward


def _gemma_rms_norm(original: Module) -> Method:
    """The weight is stored less 1, and the result is rounded after the product with it."""

    def forward(self: torch.nn.Module, x: Tensor) -> Tensor:
        weight = 1.0 + self.weight.float()
        return F.rms_norm(x, weight.shape, weight, self.eps).to(x.dtype)

    return forward


def _residual_norm(original: Module) -> Method:
    """BERT's projection, dropout, residual addition and layer norm."""

    def forward(self: torch.nn.Module, hidden_states: Tensor, input_tensor: Tensor) -> Tensor:
        return add_norm(self.dropout(self.dense(hidden_states)), input_tensor, self.LayerNorm)[0]

    return forward


# --- feed-forward


class Parts(NamedTuple):
    """The names of a feed-forward layer's submodules: ``down(dropout(activation(gate(x)) * up(x)))``."""

    up: str
    down: str
    activation: str
    gate: str | None = None
    dropout: str | None = None


def _mlp(parts: Parts) -> Callable[[Module], Method]:
    def make(original: Module) -> Method:
        def forward(self: torch.nn.Module, hidden_states: Tensor) -> Tensor:
            up, down, activation, gate, dropout = (None if name is None else getattr(self, name) for name in parts)
            output = fused_feed_forward(hidden_states, up, down, _activation(activation), gate, dropout)
            return original.forward(self, hidden_states) if output is None else output

        return forward

    return make


def _gpt2_mlp(original: Module) -> Method:
    def forward(self: torch.nn.Module, hidden_states: Tensor) -> Tensor:
        up, down = self.c_fc, self.c_proj
        enough = hidden_states.numel() >= CONV1D_ROWS * hidden_states.shape[-1]
        activation = _activation(self.act) if enough and _is(up, "Conv1D") and _is(down, "Conv1D") else None
        if activation is None:
            return original.forward(self, hidden_states)
        weights = (up.weight.t(), up.bias, down.weight.t(), down.bias)
        return self.dropout(F.feed_forward(hidden_states, *weights, activation=activation))

    return forward


def _bert_layer(original: Module) -> Method:
    family = original.__name__.removesuffix("Layer")

    def feed_forward_chunk(self: torch.nn.Module, attention_output: Tensor) -> Tensor:
        first, last = self.intermediate, self.output
        hidden = None
        if _is(first, f"{family}Intermediate") and _is(last, f"{family}Output"):
            activation = _activation(first.intermediate_act_fn)
            hidden = fused_feed_forward(attention_output, first.dense, last.dense, activation)
        if hidden is None:
            return original.feed_forward_chunk(self, attention_output)
        return add_norm(last.dropout(hidden), attention_output, last.LayerNorm)[0]

    return feed_forward_chunk


def _activation(activation: Callable[[Tensor], Tensor]) -> str | None:
    """The name by which feed_forward knows an activation, or None."""
    kind = type(activation)
    if kind.__module__ == "transformers.activations":
        return ACTIVATIONS.get(kind.__name__) if is_plain(activation, kind) else None
    return activation_name(activation)


def _is(module: torch.nn.Module, name: str) -> bool:
    """Whether the module is plainly of transformers' class of that name, or of our subclass of it."""
    kind = type(module)
    return kind.__name__ == name and is_transformers(kind) and is_plain(module, kind)


# --- the known classes

_NORM = "now on fastformer's rms_norm"
_MLP = "now on fastformer's feed_forward"
_GATED = Parts("up_proj", "down_proj", "act_fn", gate="gate_proj")

RECIPES: dict[str, Recipe] = {
    **{
        f"{family}RMSNorm": Recipe(_rms_norm, _NORM)
        for family in ("GptOss", "Llama", "Mistral", "Mixtral", "Qwen2", "Qwen3")
    },
    "T5LayerNorm": Recipe(_rms_norm, _NORM),
    **{f"{family}RMSNorm": Recipe(_gemma_rms_norm, _NORM) for family in ("Gemma", "Gemma2", "Gemma3")},
    **{
        f"{family}MLP": Recipe(_mlp(_GATED), _MLP)
        for family in ("Gemma", "Gemma2", "Gemma3", "Llama", "Mistral", "Qwen2", "Qwen3")
    },
    "GPT2MLP": Recipe(_gpt2_mlp, f"{_MLP} from {CONV1D_ROWS} rows on"),
    "T5DenseActDense": Recipe(_mlp(Parts("wi", "wo", "act", dropout="dropout")), _MLP),
    "T5DenseGatedActDense": Recipe(_mlp(Parts("wi_1", "wo", "act", gate="wi_0", dropout="dropout")), _MLP),
    "ViTMLP": Recipe(_mlp(Parts("fc1", "fc2", "activation_fn")), _MLP),
    **{
        f"{family}{part}": Recipe(_residual_norm, "now on fastformer's add_layer_norm")
        for family in ("Bert", "Roberta")
        for part in ("SelfOutput", "Output")
    },
    **{f"{family}Layer": Recipe(_bert_layer, _MLP, "feed_forward_chunk") for family in ("Bert", "Roberta")},
    **{
        name: Recipe(transformers_loss.causal_lm, transformers_loss.NOW)
        for name in (
            "GPT2LMHeadModel",
            *(f"{x}ForCausalLM" for x in ("Gemma", "Gemma2", "Gemma3", "Llama", "Mistral", "Qwen2", "Qwen3")),
        )
    },
}

#: Classes that a reader of the report might miss, and why they stay.
LEFT = {
    **dict.fromkeys(("BartDecoderLayer", "BartEncoderLayer"), "its feed-forward is part of a longer forward"),
    **dict.fromkeys(("GptOssExperts", "MixtralExperts"), "fastformer has no experts"),
    **dict.fromkeys(("GptOssForCausalLM", "MixtralForCausalLM"), "its loss may have the router's added"),
    **dict.fromkeys(
        ("BartForConditionalGeneration", "BertForMaskedLM", "RobertaForMaskedLM", "T5ForConditionalGeneration"),
        "its loss is part of a longer forward",
    ),
}


def is_transformers(kind: Module) -> bool:
    """Whether transformers defines the class."""
    return kind.__module__.startswith("transformers.")


def reason_to_leave(module: torch.nn.Module) -> str:
    """Why a module of a class in RECIPES can't become ours, or the empty string."""
    recipe = RECIPES[type(module).__name__]
    if ORIGINAL in vars(type(module)):
        return "is fastformer's already"
    if recipe.method in module.__dict__ or "forward" in module.__dict__:
        return "its forward was replaced"
    return transformers_loss.reason_to_leave(module) if recipe.make is transformers_loss.causal_lm else ""


@functools.cache
def faster_class(original: Module) -> Module:
    """Our subclass of a class in RECIPES."""
    recipe = RECIPES[original.__name__]
    namespace = {
        "__module__": original.__module__,
        "__qualname__": original.__qualname__,
        "__doc__": original.__doc__,
        "__reduce_ex__": _reduce_ex,
        ORIGINAL: original,
        recipe.method: functools.wraps(getattr(original, recipe.method))(recipe.make(original)),
    }
    return type(original)(original.__name__, (original,), namespace)


def _reduce_ex(self: torch.nn.Module, protocol: int) -> tuple[Any, ...]:
    """Copying and pickling find our subclass through the original: by its own name they would find the original."""
    _, _, *state = object.__reduce_ex__(self, protocol)
    return _rebuild, (getattr(type(self), ORIGINAL),), *state


def _rebuild(original: Module) -> torch.nn.Module:
    kind = faster_class(original)
    return kind.__new__(kind)
