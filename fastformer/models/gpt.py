"""GPT: a decoder-only transformer (Radford et al. 2019), GPT-2 and Llama among them, on the fused operators.

Shapes: B batch, S new positions, C width (d_model), V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from fastformer import functional as F
from fastformer.models import generation, pretrained
from fastformer.models.base import Transformer, check_targets
from fastformer.models.cache import PAGE_SIZE, Cache, KVCache, PagedKVCache, pages_needed
from fastformer.models.checks import check_count, check_sequences, check_tokens
from fastformer.models.config import GPTConfig
from fastformer.models.layers import Context, Stack, make_norm


class GPT(Transformer):
    """Token and position embeddings, causal blocks, a final norm (of pre-norm blocks), and the unembedding."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__(config)
        self.blocks = Stack(config, config.num_layers)
        self.norm = make_norm(config) if config.norm_first else None
        self.initialise()

    def forward(self, tokens: Tensor, targets: Tensor | None = None, *, cache: Cache | None = None) -> Tensor:
        """Logits [B, S, V]; given targets, the mean cross-entropy (scalar, nats a token), and logits are never stored.

        Args:
            tokens: int64 [B, S].
            targets: int64 [B, S], the token that follows each; -100 counts for nothing.
            cache: from ``new_cache`` or ``new_paged_cache``; tokens are the positions after those it holds, and are
                added to it. Of a paged cache, tokens are packed: [1, T], see PagedKVCache. There is then no dropout.

        Raises:
            TypeError: tokens are not integers, or targets not int64.
            ValueError: tokens are not [B, S] with one at least, are more than the context or the cache has room for, or
                targets differ in shape or device.
        """
        features = self.features(tokens, cache)
        if targets is None:
            return self.unembed(features)
        check_targets(targets, tokens)
        return F.linear_cross_entropy(features.flatten(0, 1), self.unembedding_weight, targets.flatten())

    def features(self, tokens: Tensor, cache: Cache | None = None) -> Tensor:
        """What the last norm gives: [B, S, C]. Arguments as in ``forward``."""
        check_tokens("tokens", tokens, self.config.context_length if cache is None else None)
        positions = slice(0, tokens.shape[1]) if cache is None else cache.place(tokens)
        training = self.training and cache is None
        context = Context(is_causal=True, training=training, rotation=self.rotation(positions), cache=cache)
        branch, residual = self.enter(*self.embed(tokens, positions), training)
        features = self.blocks(branch, residual, self.norm, context)
        if cache is not None:
            cache.advance()
        return features

    def new_cache(self, batch_size: int, room: int | None = None) -> KVCache:
        """An empty cache.

        Args:
            batch_size: B.
            room: the most positions, context_length at most; None for that.

        Raises:
            TypeError: one is no int.
            ValueError: one is below 1, or ``room`` above context_length.
        """
        return KVCache(self.config.num_layers, self.cache_shape(batch_size, room), self.token_embedding.weight)

    def new_paged_cache(
        self, batch_size: int, room: int | None = None, *, page_size: int = PAGE_SIZE, num_pages: int | None = None
    ) -> PagedKVCache:
        """An empty cache in pages; arguments, and what is raised, as in ``new_cache`` and PagedKVCache."""
        shape = self.cache_shape(batch_size, room)
        return PagedKVCache(self.config.num_layers, shape, self.token_embedding.weight, page_size, num_pages)

    def generate(
        self,
        tokens: Tensor | Sequence[Tensor],
        max_new_tokens: int,
        *,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        generator: torch.Generator | None = None,
        end_token: int | None = None,
        paged: bool = False,
    ) -> Tensor | list[Tensor]:
        """Continue prompts; when the longest fills the context, each is cut to half a context, and generation goes on.

        Args:
            tokens: int64 [B, S], S at least 1, or a list of prompts of any lengths, int64 [S] each; of a longer prompt
                the last ``context_length`` tokens count.
            max_new_tokens: the most to add.
            temperature, top_k, top_p, generator: see ``generation.Sampling``.
            end_token: ends a sequence, and is part of it.
            paged: keep keys and values in pages (PagedKVCache), without any padding.

        Returns:
            Prompts included: int64 [B, S + max_new_tokens], filled up with ``end_token`` behind it, and shorter where
            all end sooner; or for a list, a list of int64 [S + new], each up to its end token.

        Raises:
            TypeError: tokens are not integers, or what ``Sampling`` refuses.
            ValueError: an empty prompt, prompts on several devices, a negative ``max_new_tokens``, ``end_token``
                outside the vocabulary, or what ``Sampling`` refuses.
        """
        sampling = generation.Sampling(temperature, top_k, top_p, generator)
        return generation.generate(self._decoding(tokens, max_new_tokens, paged), max_new_tokens, end_token, sampling)

    def stream(
        self,
        tokens: Tensor | Sequence[Tensor],
        max_new_tokens: int,
        *,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        generator: torch.Generator | None = None,
        end_token: int | None = None,
        paged: bool = False,
    ) -> Iterator[Tensor]:
        """As ``generate``, giving the new tokens as they come: int64 [B] each time, ``end_token`` where one has ended.

        It is over when all have ended.
        """
        sampling = generation.Sampling(temperature, top_k, top_p, generator)
        return generation.stream(self._decoding(tokens, max_new_tokens, paged), max_new_tokens, end_token, sampling)

    def beam_search(
        self,
        tokens: Tensor | Sequence[Tensor],
        max_new_tokens: int,
        *,
        num_beams: int = 4,
        length_penalty: float = 1.0,
        end_token: int | None = None,
        paged: bool = False,
    ) -> list[list[generation.Hypothesis]]:
        """For each prompt the ``num_beams`` likeliest continuations that were found, best first.

        Args:
            tokens, max_new_tokens, end_token, paged: as in ``generate``; prompt and continuation fit in the context.
            num_beams, length_penalty: see ``generation.beam_search``.

        Raises:
            TypeError, ValueError: as in ``generate``, or no room for the continuation, or what
                ``generation.beam_search`` refuses.
        """
        decoding = self._decoding(tokens, max_new_tokens, paged, num_beams)
        return generation.beam_search(decoding, max_new_tokens, num_beams, length_penalty, end_token)

    def _decoding(
        self, tokens: Tensor | Sequence[Tensor], max_new_tokens: int, paged: bool, num_beams: int = 1
    ) -> generation.Decoding:
        check_count("max_new_tokens", max_new_tokens, least=0)
        check_count("num_beams", num_beams, least=1)
        check_sequences("tokens", tokens)
        padded, lengths = generation.pad(tokens, left=True)
        starts = None if lengths is None else padded.shape[1] - lengths

        def new_cache(longest: int) -> Cache:
            room, rows = min(longest + max_new_tokens, self.config.context_length), len(padded)
            if not paged:
                return self.new_cache(rows, room)
            return self.new_paged_cache(rows, room, num_pages=pages_needed(rows * num_beams, room))

        return generation.Decoding(self, new_cache, padded, starts, hidden=0, as_list=padded is not tokens)

    @classmethod
    def from_pretrained(cls, folder: str | Path, *, dtype: torch.dtype | None = None) -> GPT:
        """A GPT-2 or Llama checkpoint in Hugging Face's layout: config.json and safetensors, in one file or several.

        Args:
            folder: where they are.
            dtype: of the parameters; None for the checkpoint's.

        Returns:
            The model, on the CPU, in evaluation mode.

        Raises:
            FileNotFoundError: a file is missing.
            TypeError: ``dtype`` is none.
            ValueError: ``dtype`` is not a floating-point one; or the checkpoint is of another kind of model, has an
                option that GPT hasn't, or has a tensor too few, one too many or one of the wrong shape.
        """
        return pretrained.load(cls, GPTConfig, Path(folder), dtype)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write config.json and model.safetensors as Hugging Face has them, of a GPT-2 or a Llama.

        A model from ``from_pretrained`` keeps the numbers of its special tokens. An older checkpoint in the folder is
        replaced, one in several files too.

        Raises:
            ValueError: the configuration is that of neither.
        """
        pretrained.save(self, Path(folder))
