"""What encoder and decoder layers share: residual additions fused into the norms, and the feed-forward block."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fastformer import functional as F
from fastformer.nn.fusion import LINEAR, is_plain
from fastformer.nn.linear import Linear
from fastformer.nn.multihead_attention import MultiheadAttention
from fastformer.nn.normalization import LayerNorm

_FASTER = {torch.nn.MultiheadAttention: MultiheadAttention, torch.nn.LayerNorm: LayerNorm, torch.nn.Linear: Linear}


def use_faster_parts(layer: torch.nn.Module) -> None:
    """Make the attention, norms and linear layers of torch's constructor ours, which have the same parameters."""
    for part in layer.children():
        if type(part) in _FASTER:
            part.__class__ = _FASTER[type(part)]


def residual_blocks(
    x: Tensor, norms: Sequence[torch.nn.Module], blocks: Sequence[Callable[[Tensor], Tensor]], norm_first: bool
) -> Tensor:
    """``x = norm(x + block(x))`` for each norm and block; with ``norm_first``, ``x = x + block(norm(x))``."""
    if not norm_first:
        for norm, block in zip(norms, blocks):
            x, _ = add_norm(block(x), x, norm)
        return x
    normed = norms[0](x)
    for next_norm, block in zip(norms[1:], blocks):
        normed, x = add_norm(block(normed), x, next_norm)
    return x + blocks[-1](normed)


def feed_forward(layer: torch.nn.Module, x: Tensor) -> Tensor:
    """``linear2(dropout(activation(linear1(x))))`` with the layer's submodules, fused where that does the same."""
    activation = activation_name(layer.activation)
    output = fused_feed_forward(x, layer.linear1, layer.linear2, activation, dropout=layer.dropout)
    return layer.linear2(layer.dropout(layer.activation(layer.linear1(x)))) if output is None else output


def fused_feed_forward(
    x: Tensor,
    up: torch.nn.Module,
    down: torch.nn.Module,
    activation: str | None,
    gate: torch.nn.Module | None = None,
    dropout: torch.nn.Module | None = None,
) -> Tensor | None:
    """``down(dropout(activation(up(x))))`` in one, or gated ``down(dropout(activation(gate(x)) * up(x)))``.

    None where that is not known to be what calling the submodules does; ``activation`` is None if it has no name.
    """
    fused = (
        activation is not None
        and is_plain(up, *LINEAR)
        and is_plain(down, *LINEAR)
        and (gate is None or (is_plain(gate, *LINEAR) and gate.bias is None))
        and (dropout is None or (is_plain(dropout, torch.nn.Dropout) and not (dropout.training and dropout.p > 0)))
        and up.weight.dtype == down.weight.dtype  # transformers' T5 may keep the last in float32
    )
    if not fused:
        return None
    weight_gate = None if gate is None else gate.weight
    return F.feed_forward(x, up.weight, up.bias, down.weight, down.bias, activation=activation, weight_gate=weight_gate)


def add_norm(branch: Tensor, residual: Tensor, norm: torch.nn.Module) -> tuple[Tensor, Tensor]:
    """(norm(summed), summed) of ``summed = residual + branch``."""
    same_dtype = branch.dtype == residual.dtype or torch.is_autocast_enabled(branch.device.type)
    if same_dtype and is_plain(norm, LayerNorm, torch.nn.LayerNorm):
        return F.add_layer_norm(branch, residual, norm.normalized_shape, norm.weight, norm.bias, norm.eps)
    summed = residual + branch
    return norm(summed), summed


def activation_name(activation: Callable[[Tensor], Tensor]) -> str | None:
    """The name by which ``feed_forward`` knows a torch function or module, or None."""
    if isinstance(activation, torch.nn.Module):
        if is_plain(activation, torch.nn.GELU):
            return "gelu" if activation.approximate == "none" else "gelu_tanh"
        if is_plain(activation, torch.nn.ReLU):
            return "relu"
        return "silu" if is_plain(activation, torch.nn.SiLU) else None
    if activation is F.gelu:
        return "gelu"
    if activation is F.relu or activation is torch.relu:
        return "relu"
    return "silu" if activation is F.silu else None
