"""What a whole model has to do: FLOPs of its matrix products, and the bytes that must move.

A weight of a linear layer takes 2 FLOPs for each token in a forward pass and 4 in a backward one: with N weights, 6N a
training step's token. Attention takes 4 d_model for each query and each key that it sees in a forward pass, twice that
in a backward one; that causal attention sees half of the keys is counted. Nothing that is computed twice is.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .harness import Work


@dataclass(frozen=True)
class ModelWork:
    """Of one model and batch.

    Args:
        block_weights: of the linear layers before the unembedding.
        unembedding_weights: V d_model.
        parameters: all of them, embeddings too.
        layers, d_model, kv_width: of the blocks; keys and values of a token are ``kv_width`` wide each.
        is_causal: whether a token sees only those before it.
        batch: sequences.
        dtype: of everything.
    """

    block_weights: int
    unembedding_weights: int
    parameters: int
    layers: int
    d_model: int
    kv_width: int
    is_causal: bool
    batch: int
    dtype: torch.dtype

    @classmethod
    def of(cls, plain: torch.nn.Module, batch: int) -> ModelWork:
        """Of one of ``plain_models``."""
        unembedding = plain.token_embedding.weight
        attention = plain.blocks[0].attention
        linear = sum(m.weight.numel() for m in plain.modules() if isinstance(m, torch.nn.Linear))
        if hasattr(plain, "unembedding"):  # not tied: it was one of them
            linear -= unembedding.numel()
        return cls(
            block_weights=linear,
            unembedding_weights=unembedding.numel(),
            parameters=sum(p.numel() for p in plain.parameters()),
            layers=len(plain.blocks),
            d_model=unembedding.shape[1],
            kv_width=attention.num_kv_heads * attention.head_dim,
            is_causal=attention.is_causal,
            batch=batch,
            dtype=unembedding.dtype,
        )

    def inference(self, length: int) -> Work:
        """Logits of all tokens: the weights are read, the logits written."""
        vocabulary = self.unembedding_weights // self.d_model
        moved = self.parameters + self.batch * length * vocabulary
        return Work(bytes=moved * self.dtype.itemsize, flops=self._forward_flops(length))

    def training(self, length: int) -> Work:
        """A step. Weights are read in the forward and the backward pass, gradients written and read, and AdamW reads
        and writes the weights and its two moments."""
        return Work(bytes=10 * self.parameters * self.dtype.itemsize, flops=3 * self._forward_flops(length))

    def generation(self, length: int, new_tokens: int) -> Work:
        """With a cache: each new token, the first with the prompt, reads the weights; the later ones all before them.

        Of the embeddings only the unembedding is read whole.
        """
        seen = sum(range(length + 1, length + new_tokens))  # by the later tokens of a sequence
        attention = 4 * self.layers * self.d_model * (self._pairs(length) + self.batch * seen)
        blocks = 2 * self.block_weights * self.batch * (length + new_tokens - 1)
        weights = new_tokens * (self.block_weights + self.unembedding_weights)
        cached = 2 * self.layers * self.kv_width * self.batch * seen
        return Work(
            bytes=(weights + cached) * self.dtype.itemsize,
            flops=blocks + 2 * self.unembedding_weights * self.batch * new_tokens + attention,
            reads=True,
        )

    def _forward_flops(self, length: int) -> int:
        weights = self.block_weights + self.unembedding_weights
        return 2 * weights * self.batch * length + 4 * self.layers * self.d_model * self._pairs(length)

    def _pairs(self, length: int) -> int:
        """Of queries and keys."""
        pairs = self.batch * length * length
        return pairs // 2 if self.is_causal else pairs
