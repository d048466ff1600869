"""The transformer encoder layer as a module."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastformer import functional as F
from fastformer.nn.fusion import is_plain
from fastformer.nn.multihead_attention import MultiheadAttention
from fastformer.nn.normalization import LayerNorm


class TransformerEncoderLayer(torch.nn.TransformerEncoderLayer):
    """torch.nn.TransformerEncoderLayer, each residual addition fused into the next norm, and the feed-forward fused.

    A submodule that was replaced by one of another class, or that has hooks, is called instead of being fused.
    """

    @functools.wraps(torch.nn.TransformerEncoderLayer.__init__)
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # torch's constructor has drawn the parameters, which are the same in our subclasses.
        self.self_attn.__class__ = MultiheadAttention
        self.norm1.__class__ = self.norm2.__class__ = LayerNorm

    def forward(
        self,
        src: Tensor,
        src_mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Tensor:
        """The layer's output, shaped like ``src``.

        Args:
            src: [B, S, C] with ``batch_first``, else [S, B, C]; unbatched [S, C]; or a nested tensor, as
                torch.nn.TransformerEncoder makes of a padded batch in eval mode.
            src_mask, src_key_padding_mask, is_causal: MultiheadAttention's attn_mask, key_padding_mask and is_causal.
        """
        if src.is_nested:
            if src_mask is not None or src_key_padding_mask is not None:
                raise ValueError("src is a nested tensor, so src_mask and src_key_padding_mask must be None")
            return self._forward_nested(src)
        if self.norm_first:
            branch = self._sa_block(self.norm1(src), src_mask, src_key_padding_mask, is_causal)
            normed, summed = _add_norm(branch, src, self.norm2)
            return summed + self._ff_block(normed)
        branch = self._sa_block(src, src_mask, src_key_padding_mask, is_causal)
        x, _ = _add_norm(branch, src, self.norm1)
        return _add_norm(self._ff_block(x), x, self.norm2)[0]

    def _ff_block(self, x: Tensor) -> Tensor:
        activation = _activation_name(self.activation)
        fused = (
            activation is not None
            and is_plain(self.linear1, torch.nn.Linear)
            and is_plain(self.linear2, torch.nn.Linear)
            and is_plain(self.dropout, torch.nn.Dropout)
            and not (self.dropout.training and self.dropout.p > 0)
        )
        if not fused:
            return super()._ff_block(x)
        x = F.feed_forward(
            x, self.linear1.weight, self.linear1.bias, self.linear2.weight, self.linear2.bias, activation=activation
        )
        return self.dropout2(x)

    def _forward_nested(self, src: Tensor) -> Tensor:
        """Of a nested tensor with B sequences [S_b, C], through a padded batch; nested again."""
        lengths = [len(sequence) for sequence in src.unbind()]
        padded = src.to_padded_tensor(0.0)  # [B, S, C]
        positions = torch.arange(padded.shape[1], device=src.device)
        padding = positions >= torch.tensor(lengths, device=src.device).unsqueeze(1)  # [B, S]
        output = self.forward(padded, src_key_padding_mask=padding)
        return torch.nested.as_nested_tensor([row[:length] for row, length in zip(output, lengths)])


def _add_norm(branch: Tensor, residual: Tensor, norm: torch.nn.Module) -> tuple[Tensor, Tensor]:
    """(norm(summed), summed) of ``summed = residual + branch``."""
    if is_plain(norm, LayerNorm, torch.nn.LayerNorm):
        return F.add_layer_norm(branch, residual, norm.normalized_shape, norm.weight, norm.bias, norm.eps)
    summed = residual + branch
    return norm(summed), summed


def _activation_name(activation: Callable[[Tensor], Tensor]) -> str | None:
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
