"""What all models have: embeddings of tokens and positions, the unembedding, and padding.

Shapes: B batch, S positions, C width (d_model), G heads of keys and values, D head_dim, V vocabulary.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from fastformer import functional as F
from fastformer import nn
from fastformer.models.checks import INTEGERS, check_count, check_tensor
from fastformer.models.config import RotaryScaling, TransformerConfig


class RotaryTable(nn.PositionalEncoding):
    """cos and sin [context_length, D / 2] of rotary positions, with Llama 3.1's scaling where it is given."""

    def __init__(self, head_dim: int, length: int, base: float, scaling: RotaryScaling | None) -> None:
        self.scaling = scaling  # read by _tables, which the constructor calls
        super().__init__(head_dim, length, kind="rotary", base=base)

    def _tables(self, like: Tensor) -> dict[str, Tensor]:
        if self.scaling is None:
            return super()._tables(like)
        exponents = torch.arange(0, self.d_model, 2, dtype=torch.float64, device="cpu") / self.d_model
        frequencies = scaled_frequencies(self.base**-exponents, self.scaling)
        positions = torch.arange(self.max_length, dtype=torch.float64, device="cpu")
        angles = torch.outer(positions, frequencies)
        dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
        return {name: x.to(like.device, dtype) for name, x in (("cos", angles.cos()), ("sin", angles.sin()))}


def scaled_frequencies(frequencies: Tensor, scaling: RotaryScaling) -> Tensor:
    """Radians a token of each pair of features, after ``scaling``; see RotaryScaling."""
    turns = scaling.original_context_length * frequencies / (2 * math.pi)  # within the original context
    kept = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    kept = kept.clamp(0.0, 1.0)
    return kept * frequencies + (1 - kept) * frequencies / scaling.factor


class Transformer(nn.Module):
    """What all models have: token embedding, positions, and the unembedding."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.config = config
        self.kept_settings: dict[str, Any] = {}  # of the config.json it was read from, what it doesn't compute with
        self.token_embedding = nn.Embedding(config.vocab_size, config.d_model)
        self.position_embedding = self.rotary = self.unembedding = None
        if config.positions == "rotary":
            self.rotary = RotaryTable(config.head_dim, config.context_length, config.rotary_base, config.rotary_scaling)
        else:
            self.position_embedding = nn.PositionalEncoding(
                config.d_model, config.context_length, kind=config.positions
            )
        if not config.tied_unembedding:
            self.unembedding = nn.Linear(config.d_model, config.vocab_size, bias=False)

    def initialise(self) -> None:
        """GPT-2's: N(0, 0.02); of what pre-norm blocks add to the residual stream, twice a layer, less.

        Token embeddings that sinusoidal positions are added to are N(0, 1) once multiplied by sqrt(d_model): as large.
        """
        for name, parameter in self.named_parameters():
            if name == "token_embedding.weight" and self.config.positions == "sinusoidal":
                torch.nn.init.normal_(parameter, std=1 / math.sqrt(self.config.d_model))
            elif name.endswith(("attention.out.weight", "feed_forward.linear2.weight")) and self.config.norm_first:
                torch.nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * self.config.num_layers))
            elif parameter.dim() == 2:
                torch.nn.init.normal_(parameter, std=0.02)
            elif name.endswith("bias"):
                torch.nn.init.zeros_(parameter)

    @property
    def unembedding_weight(self) -> Tensor:
        """[V, C]: the token embedding's, if tied."""
        return self.token_embedding.weight if self.unembedding is None else self.unembedding.weight

    def embed(
        self, tokens: Tensor, positions: slice | Tensor, segments: Tensor | None = None
    ) -> tuple[Tensor | None, Tensor]:
        """(branch, residual), [B, S, C] each, which sum to the embeddings of tokens [B, S]; see Block.

        Args:
            positions: slice, or int64 [B, S].
            segments: the embeddings of the segments, [B, S, C].
        """
        branch = self.token_embedding(tokens)  # [B, S, C]
        if self.config.positions == "sinusoidal":
            branch = branch * math.sqrt(self.config.d_model)
        if self.position_embedding is None:
            residual = segments
        else:
            encoding = self.position_embedding
            table = encoding.weight if encoding.kind == "learned" else encoding.table.to(branch.dtype)
            residual = table[positions]  # [S, C] or [B, S, C]
            residual = residual.expand_as(branch) if segments is None else residual + segments
        return (None, branch) if residual is None else (branch, residual)

    def enter(self, branch: Tensor | None, residual: Tensor, training: bool) -> tuple[Tensor | None, Tensor]:
        """What ``embed`` gave, for the first block: summed already where that one doesn't add, or would drop some."""
        config = self.config
        if config.norm_first and not (training and (config.dropout or config.embedding_dropout)):
            return branch, residual
        summed = residual if branch is None else branch + residual
        return None, F.dropout(summed, config.embedding_dropout, training)

    def rotation(self, positions: slice | Tensor) -> tuple[Tensor, Tensor] | None:
        """cos and sin for ``Context``, if positions are rotary."""
        return None if self.rotary is None else (self.rotary.cos[positions], self.rotary.sin[positions])

    def unembed(self, features: Tensor) -> Tensor:
        """Logits: [..., C] -> [..., V]."""
        return F.linear(features, self.unembedding_weight)

    def cache_shape(self, batch_size: int, room: int | None) -> tuple[int, int, int, int]:
        """(B, G, room, D) of a cache; a room of None is the whole context.

        Raises:
            TypeError: one is no int.
            ValueError: one is below 1, or there is no such room.
        """
        config = self.config
        room = config.context_length if room is None else room
        check_count("batch_size", batch_size, least=1)
        check_count("room", room, least=1)
        if room > config.context_length:
            raise ValueError(f"room is {room}, must be at most context_length, {config.context_length}")
        return batch_size, config.kv_heads, room, config.head_dim


def padding_mask(name: str, tokens: Tensor, lengths: Tensor | None, mask: Tensor | None) -> Tensor | None:
    """bool [B, 1, 1, S], True where there is a token, from one of the two, or None.

    Args:
        name: of the tokens.
        tokens: [B, S].
        lengths: int64 or int32 [B], from 0 to S, which is checked on the CPU alone: a GPU would have to be waited for.
        mask: bool [B, S].

    Raises:
        TypeError: ``lengths`` are not integers, or ``mask`` is not bool.
        ValueError: both are given, one is of another shape or on another device, or a length is out of range.
    """
    if lengths is None and mask is None:
        return None
    if lengths is not None and mask is not None:
        raise ValueError(f"{name}_mask is given with {name}_lengths, must be None")
    if mask is not None:
        check_tensor(f"{name}_mask", mask, (torch.bool,), tokens.shape, tokens.device)
    else:
        check_tensor(f"{name}_lengths", lengths, INTEGERS, tokens.shape[:1], tokens.device)
        if _readable(lengths):
            found = lengths.tolist()
            if min(found) < 0 or max(found) > tokens.shape[1]:
                raise ValueError(f"{name}_lengths is {found}, must be from 0 to {tokens.shape[1]}")
        mask = torch.arange(tokens.shape[1], device=tokens.device) < lengths[:, None]
    return mask[:, None, None]


def check_targets(targets: Tensor, tokens: Tensor) -> None:
    """TypeError or ValueError unless targets are int64, of the shape of tokens and on their device."""
    check_tensor("targets", targets, (torch.int64,), tokens.shape, tokens.device)


def _readable(x: Tensor) -> bool:
    """Whether its values can be read now, at once: not on a GPU, nor while a graph is being made."""
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return False
    return type(x) is Tensor and x.device.type == "cpu"
