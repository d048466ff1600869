"""What the models are built of: attention, blocks and stacks of them.

Shapes: B batch, S positions, T positions attended to, C width (d_model), H heads of queries, G of keys and values, D
head_dim.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from fastformer import functional as F
from fastformer import nn
from fastformer.models.cache import Cache
from fastformer.models.config import ACTIVATIONS, TransformerConfig


@dataclass
class Context:
    """What the layers of a stack are told beside their input."""

    is_causal: bool
    training: bool  # whether there is dropout
    rotation: tuple[Tensor, Tensor] | None = None  # cos and sin, [S, D / 2] or [B, S, D / 2]
    mask: Tensor | None = None  # bool [B, 1, 1, T], True where there is a token
    memory: Tensor | None = None  # the encoder's output, [B, Sk, C]
    memory_mask: Tensor | None = None  # bool [B, 1, 1, Sk]
    cache: Cache | None = None


class SelfAttention(nn.Module):
    """Multi-head self-attention (arXiv 1706.03762), query, key and value from one product.

    The rows of ``qkv.weight`` are those of H query heads, G key heads and G value heads.
    """

    def __init__(self, config: TransformerConfig, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.num_heads, self.kv_heads, self.head_dim = config.num_heads, config.kv_heads, config.head_dim
        self.dropout = config.attention_dropout
        self.qkv = nn.Linear(config.d_model, (self.num_heads + 2 * self.kv_heads) * self.head_dim, bias=config.bias)
        self.out = nn.Linear(config.d_model, config.d_model, bias=config.bias)

    def forward(self, input: Tensor, context: Context) -> Tensor:
        """[B, S, C] -> [B, S, C]."""
        batch, length, _ = input.shape
        heads = self.qkv(input).view(batch, length, -1, self.head_dim)  # [B, S, H + 2 G, D]
        output = self._attend(heads, context) if context.cache is None else self._attend_cached(heads, context)
        return self.out(output.transpose(1, 2).flatten(2))  # [B, H, S, D] -> [B, S, C], no copy

    def _attend(self, heads: Tensor, context: Context) -> Tensor:
        query, key, value = heads.split((self.num_heads, self.kv_heads, self.kv_heads), dim=2)
        query, key, value = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)  # [B, H or G, S, D]
        if context.rotation is not None:
            query, key = F.rotary(query, key, *context.rotation)
        return F.scaled_dot_product_attention(
            query,
            key,
            value,
            context.mask,
            self.dropout if context.training else 0.0,
            context.is_causal,
            enable_gqa=True,
        )

    def _attend_cached(self, heads: Tensor, context: Context) -> Tensor:
        heads = heads.transpose(1, 2)  # [B, H + 2 G, S, D]
        query = heads.narrow(1, 0, self.num_heads)
        keys_values = heads.narrow(1, self.num_heads, 2 * self.kv_heads)  # one copy stores both
        if context.rotation is not None:
            key, value = keys_values.chunk(2, dim=1)
            query, key = F.rotary(query, key, *context.rotation)
            keys_values = torch.cat((key, value), dim=1)
        return context.cache.attend(self.layer, query, keys_values)


class CrossAttention(nn.Module):
    """Multi-head attention of a decoder to the encoder's output, the memory."""

    def __init__(self, config: TransformerConfig, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.num_heads, self.kv_heads, self.head_dim = config.num_heads, config.kv_heads, config.head_dim
        self.dropout = config.attention_dropout
        self.query = nn.Linear(config.d_model, config.d_model, bias=config.bias)
        self.key_value = nn.Linear(config.d_model, 2 * self.kv_heads * self.head_dim, bias=config.bias)
        self.out = nn.Linear(config.d_model, config.d_model, bias=config.bias)

    def keys_values(self, memory: Tensor) -> Tensor:
        """Keys and values of memory [B, Sk, C]: [2, B, G, Sk, D]."""
        heads = self.key_value(memory).unflatten(-1, (2, self.kv_heads, self.head_dim))  # [B, Sk, 2, G, D]
        return heads.permute(2, 0, 3, 1, 4)

    def forward(self, input: Tensor, context: Context) -> Tensor:
        """[B, S, C] -> [B, S, C]."""
        query = self.query(input).unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2)  # [B, H, S, D]
        if context.cache is not None:
            output = context.cache.attend_memory(self.layer, query)
        else:
            key, value = self.keys_values(context.memory).unbind()
            output = F.scaled_dot_product_attention(
                query,
                key,
                value,
                context.memory_mask,
                self.dropout if context.training else 0.0,
                enable_gqa=True,
            )
        return self.out(output.transpose(1, 2).flatten(2))


class Block(nn.Module):
    """Attention, in a decoder with an encoder attention to its output, then feed-forward, each added to its input.

    Of pre-norm blocks, a sublayer's output is added where the next norm reads it, in one pass: ``forward`` takes and
    gives two tensors [B, S, C], the last sublayer's output ("branch") and the residual stream without it. A branch of
    None adds nothing: there is none after a post-norm block.
    """

    def __init__(self, config: TransformerConfig, layer: int, *, cross_attention: bool = False) -> None:
        super().__init__()
        activation, gated = ACTIVATIONS[config.activation]
        self.norm_first = config.norm_first
        self.dropout = config.dropout
        self.norm1 = make_norm(config)
        self.attention = SelfAttention(config, layer)
        if cross_attention:
            self.cross_norm = make_norm(config)
            self.cross_attention = CrossAttention(config, layer)
        else:
            self.cross_attention = None
        self.norm2 = make_norm(config)
        self.feed_forward = nn.FeedForward(
            config.d_model, config.hidden_width, activation=activation, gated=gated, bias=config.bias
        )

    def forward(self, branch: Tensor | None, residual: Tensor, context: Context) -> tuple[Tensor | None, Tensor]:
        dropout_p = self.dropout if context.training else 0.0
        cross = self.cross_attention
        if self.norm_first:
            normed, residual = add_norm(branch, residual, self.norm1, dropout_p)
            branch = self.attention(normed, context)
            if cross is not None:
                normed, residual = add_norm(branch, residual, self.cross_norm, dropout_p)
                branch = cross(normed, context)
            normed, residual = add_norm(branch, residual, self.norm2, dropout_p)
            return self.feed_forward(normed), residual
        residual, _ = add_norm(self.attention(residual, context), residual, self.norm1, dropout_p)
        if cross is not None:
            residual, _ = add_norm(cross(residual, context), residual, self.cross_norm, dropout_p)
        residual, _ = add_norm(self.feed_forward(residual), residual, self.norm2, dropout_p)
        return None, residual


class Stack(nn.ModuleList):
    """Blocks one after the other.

    Where ``checkpoint_activations`` is set to True, a backward pass computes the activations of each block anew from
    its inputs, which alone are kept (Chen et al. 2016, arXiv 1604.06174).
    """

    def __init__(self, config: TransformerConfig, layers: int, *, cross_attention: bool = False) -> None:
        super().__init__(Block(config, layer, cross_attention=cross_attention) for layer in range(layers))
        self.checkpoint_activations = False

    def forward(self, branch: Tensor | None, residual: Tensor, norm: nn.Module | None, context: Context) -> Tensor:
        """Blocks, then the last norm, None after post-norm blocks: [B, S, C]. See Block for the arguments."""
        anew = self.checkpoint_activations and torch.is_grad_enabled() and context.cache is None
        for block in self:
            if anew:
                branch, residual = checkpoint(block, branch, residual, context, use_reentrant=False)
            else:
                branch, residual = block(branch, residual, context)
        if norm is None:
            return residual
        return add_norm(branch, residual, norm, self[-1].dropout if context.training else 0.0)[0]


def make_norm(config: TransformerConfig) -> nn.Module:
    """The norm of a configuration."""
    if config.norm == "rms_norm":
        return nn.RMSNorm(config.d_model, config.norm_eps)
    return nn.LayerNorm(config.d_model, config.norm_eps, bias=config.bias)


def add_norm(branch: Tensor | None, residual: Tensor, norm: nn.Module, dropout_p: float) -> tuple[Tensor, Tensor]:
    """(norm(summed), summed) of ``summed = dropout(branch) + residual``, in one pass."""
    if branch is None:
        return norm(residual), residual
    if isinstance(norm, nn.LayerNorm):
        return F.add_layer_norm(
            branch, residual, norm.normalized_shape, norm.weight, norm.bias, norm.eps, dropout_p=dropout_p
        )
    return F.add_rms_norm(branch, residual, norm.normalized_shape, norm.weight, norm.eps, dropout_p=dropout_p)
