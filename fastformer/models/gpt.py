"""GPT: a decoder-only transformer (Radford et al. 2019) on the fused operators.

Shapes: B batch, S new positions, T positions attended to (cached, then new), C width (d_model), H heads, D = C / H
head_dim, V vocabulary.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from fastformer import functional as F
from fastformer import nn


@dataclass(frozen=True)
class GPTConfig:
    """Sizes of a GPT. The default trains in minutes on a laptop.

    Raises:
        ValueError: a size below 1 (``context_length``: 2), or a ``d_model`` that ``num_heads`` does not divide.
    """

    vocab_size: int
    context_length: int = 256
    num_layers: int = 6
    num_heads: int = 6
    d_model: int = 384

    def __post_init__(self) -> None:
        for field in fields(self):
            size, least = getattr(self, field.name), 2 if field.name == "context_length" else 1
            if not isinstance(size, int) or size < least:
                raise ValueError(f"{field.name} is {size!r}, must be an integer of at least {least}")
        if self.d_model % self.num_heads:
            raise ValueError(f"d_model is {self.d_model}, must be a multiple of num_heads, {self.num_heads}")


@dataclass
class KVCache:
    """Keys and values one attention layer has seen, in room allotted once for the whole context."""

    keys_values: Tensor  # [2, B, H, context_length, D]
    length: int = 0

    def append(self, keys_values: Tensor) -> tuple[Tensor, Tensor]:
        """Store S new positions, [2, B, H, S, D]; returns views of all positions so far, [B, H, T, D] each."""
        start, count = self.length, keys_values.shape[3]
        self.length += count
        self.keys_values.narrow(3, start, count).copy_(keys_values)
        return self.keys_values.narrow(3, 0, self.length).unbind()


class SelfAttention(nn.Module):
    """Causal multi-head self-attention, query, key and value from one product."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.qkv = nn.Linear(config.d_model, 3 * config.d_model)
        self.out = nn.Linear(config.d_model, config.d_model)

    def forward(self, input: Tensor, cache: KVCache | None) -> Tensor:
        batch, length, width = input.shape
        heads = self.qkv(input).view(batch, length, 3, self.num_heads, width // self.num_heads)  # [B, S, 3, H, D]
        if cache is None:
            query, key, value = (x.transpose(1, 2) for x in heads.unbind(2))  # [B, H, S, D]
        else:
            heads = heads.permute(2, 0, 3, 1, 4)  # [3, B, H, S, D]
            query, (key, value) = heads[0], cache.append(heads[1:])  # [B, H, S, D], [B, H, T, D]
        # The last query is the newest position: it sees every key.
        output = F.scaled_dot_product_attention(query, key, value, is_causal=True, causal_alignment="bottom_right")
        return self.out(output.transpose(1, 2).flatten(2))  # [B, H, S, D] -> [B, S, C], no copy


class Block(nn.Module):
    """Pre-norm layer: attention, then feed-forward, each added to the residual stream.

    A sublayer's output is added where the next norm reads it, so ``forward`` takes and gives two tensors [B, S, C]: the
    last sublayer's output and the residual stream without it.
    """

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(config.d_model)
        self.attention = SelfAttention(config)
        self.norm2 = nn.LayerNorm(config.d_model)
        self.feed_forward = nn.FeedForward(config.d_model, 4 * config.d_model)

    def forward(self, branch: Tensor, residual: Tensor, cache: KVCache | None) -> tuple[Tensor, Tensor]:
        normed, residual = add_norm(branch, residual, self.norm1)
        normed, residual = add_norm(self.attention(normed, cache), residual, self.norm2)
        return self.feed_forward(normed), residual


def add_norm(branch: Tensor, residual: Tensor, norm: nn.LayerNorm) -> tuple[Tensor, Tensor]:
    """(norm(branch + residual), branch + residual) in one pass."""
    return F.add_layer_norm(branch, residual, norm.normalized_shape, norm.weight, norm.bias, norm.eps)


class GPT(nn.Module):
    """Token and learned position embeddings, pre-norm causal blocks, a final norm, and the token embedding once more as
    the unembedding."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.config = config
        self.token_embedding = nn.Embedding(config.vocab_size, config.d_model)
        self.position_embedding = nn.Embedding(config.context_length, config.d_model)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.norm = nn.LayerNorm(config.d_model)
        self._initialise()

    def _initialise(self) -> None:
        """GPT-2's: N(0, 0.02), and less for what is added to the residual stream, twice a layer."""
        for name, parameter in self.named_parameters():
            if name.endswith(("attention.out.weight", "feed_forward.linear2.weight")):
                torch.nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * self.config.num_layers))
            elif parameter.dim() == 2:
                torch.nn.init.normal_(parameter, std=0.02)
            elif name.endswith("bias"):
                torch.nn.init.zeros_(parameter)

    def forward(self, tokens: Tensor, targets: Tensor | None = None, *, cache: list[KVCache] | None = None) -> Tensor:
        """Logits [B, S, V]; given targets, the mean cross-entropy (scalar, nats a token), and logits are never stored.

        Args:
            tokens: int64 [B, S].
            targets: int64 [B, S], the token that follows each; -100 counts for nothing.
            cache: from ``new_cache``; tokens are the positions after those it holds, and are added to it.

        Raises:
            TypeError: tokens are not integers.
            ValueError: tokens are not [B, S], are more than the context has room for, or targets differ in shape.
        """
        features = self.features(tokens, cache)
        if targets is None:
            return self.unembed(features)
        if targets.shape != tokens.shape:
            raise ValueError(f"targets has shape {tuple(targets.shape)}, must be {tuple(tokens.shape)} like tokens")
        return F.linear_cross_entropy(features.flatten(0, 1), self.token_embedding.weight, targets.flatten())

    def features(self, tokens: Tensor, cache: list[KVCache] | None = None) -> Tensor:
        """What the last norm gives: [B, S, C]. Arguments as in ``forward``."""
        if tokens.dtype not in (torch.int64, torch.int32):
            raise TypeError(f"tokens has dtype {tokens.dtype}, must be int64 or int32")
        if tokens.dim() != 2:
            raise ValueError(f"tokens has shape {tuple(tokens.shape)}, must be [B, S]")
        start = cache[0].length if cache else 0
        end, room = start + tokens.shape[1], self.config.context_length
        if end > room:
            raise ValueError(f"tokens end at position {end}, must be at most context_length, {room}")
        branch = self.token_embedding(tokens)  # [B, S] -> [B, S, C]
        residual = self.position_embedding.weight[start:end].expand_as(branch)  # [S, C] -> [B, S, C]
        for block, layer_cache in zip(self.blocks, cache or [None] * len(self.blocks), strict=True):
            branch, residual = block(branch, residual, layer_cache)
        return add_norm(branch, residual, self.norm)[0]

    def unembed(self, features: Tensor) -> Tensor:
        """Logits: [..., C] -> [..., V]."""
        return F.linear(features, self.token_embedding.weight)

    def new_cache(self, batch_size: int) -> list[KVCache]:
        """An empty cache for each layer, with room for the whole context."""
        config, weight = self.config, self.token_embedding.weight
        shape = (2, batch_size, config.num_heads, config.context_length, config.d_model // config.num_heads)
        return [KVCache(weight.new_empty(shape)) for _ in self.blocks]

    @torch.no_grad()
    def generate(
        self,
        tokens: Tensor,
        max_new_tokens: int,
        *,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Continue prompts of one length; a full context is cut to its latter half, and generation goes on.

        Args:
            tokens: int64 [B, S], S at least 1; of a longer prompt the last ``context_length`` tokens count.
            max_new_tokens: how many to add.
            temperature, top_k, top_p, generator: see ``sample``.

        Returns:
            int64 [B, S + max_new_tokens], the prompts included.

        Raises:
            ValueError: an empty prompt, a negative ``max_new_tokens``, or what ``sample`` refuses.
        """
        if tokens.dim() != 2 or not tokens.shape[1]:
            raise ValueError(f"tokens has shape {tuple(tokens.shape)}, must be [B, S] with at least one token")
        if max_new_tokens < 0:
            raise ValueError(f"max_new_tokens is {max_new_tokens}, must not be negative")
        context = self.config.context_length
        cache = self.new_cache(tokens.shape[0])
        pending = tokens[:, -context:]  # not in the cache yet
        for _ in range(max_new_tokens):
            if cache[0].length + pending.shape[1] > context:
                for layer_cache in cache:
                    layer_cache.length = 0
                pending = tokens[:, -(context // 2) :]
            logits = self.unembed(self.features(pending, cache)[:, -1])  # [B, S, C] -> [B, V]
            pending = sample(logits, temperature=temperature, top_k=top_k, top_p=top_p, generator=generator)  # [B, 1]
            tokens = torch.cat((tokens, pending), dim=1)
        return tokens


def sample(
    logits: Tensor,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Draw one token for each row: [B, V] -> [B, 1].

    Args:
        logits: [B, V].
        temperature: divides the logits; 0 takes the likeliest token.
        top_k: draw among the k likeliest tokens only.
        top_p: draw among the fewest likeliest tokens whose probabilities reach this sum (Holtzman et al. 2020).
        generator: on the device of the logits; torch's global one by default.

    Raises:
        ValueError: temperature is negative or not finite, top_k below 1, or top_p outside (0, 1].
    """
    if not 0 <= temperature < math.inf:
        raise ValueError(f"temperature is {temperature}, must be finite and not negative")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k is {top_k}, must be at least 1")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p is {top_p}, must be above 0 and at most 1")
    if temperature == 0:
        return logits.argmax(dim=-1, keepdim=True)
    logits = logits.float() / temperature
    if top_k is not None:
        least = logits.topk(min(top_k, logits.shape[-1])).values[:, -1:]
        logits = logits.masked_fill(logits < least, -math.inf)
    probabilities = torch.softmax(logits, dim=-1)
    if top_p is not None:
        ordered, order = probabilities.sort(dim=-1, descending=True)
        likelier = ordered.cumsum(dim=-1) - ordered  # what the tokens before each one sum to
        probabilities = torch.zeros_like(ordered).scatter(-1, order, ordered.masked_fill(likelier >= top_p, 0.0))
    return torch.multinomial(probabilities, 1, generator=generator)
