"""Seq2Seq: an encoder-decoder transformer (Vaswani et al. 2017, arXiv 1706.03762) on the fused operators.

Shapes: B batch, Ss source positions, S target positions, C width (d_model), V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from fastformer import functional as F
from fastformer.models import generation
from fastformer.models.base import Transformer, check_targets, padding_mask
from fastformer.models.cache import PAGE_SIZE, Cache, KVCache, PagedKVCache, pages_needed
from fastformer.models.checks import check_count, check_sequences, check_tokens
from fastformer.models.config import Seq2SeqConfig
from fastformer.models.layers import Context, Stack, make_norm


def shift_right(targets: Tensor, start_token: int) -> Tensor:
    """What the decoder sees when it is to predict targets [B, S]: the start token, then all targets but the last.

    Where targets are -100, which count for nothing, the start token stands in: only padding sees it.

    Raises:
        TypeError: targets are not integers, or ``start_token`` is not one.
        ValueError: targets are not [B, S] with one at least, or ``start_token`` is negative.
    """
    check_tokens("targets", targets)
    check_count("start_token", start_token, least=0)
    shifted = targets.roll(1, dims=1)
    shifted[:, :1] = start_token
    return shifted.masked_fill(shifted == -100, start_token)


class Seq2Seq(Transformer):
    """An encoder that sees the whole source, and a causal decoder that attends to what the encoder makes of it.

    Source and target share one token embedding, and positions where they are learned; tied, so does the unembedding.
    Sources of different lengths are padded: source_lengths, int64 [B], says how many tokens at the start of each row
    count, or source_mask, bool [B, Ss], is True where one does. Targets of different lengths are padded at the end with
    -100: the decoder is causal, so no position sees the padding behind it.
    """

    def __init__(self, config: Seq2SeqConfig) -> None:
        super().__init__(config)
        self.encoder = Stack(config, config.num_layers)
        self.encoder_norm = make_norm(config) if config.norm_first else None
        self.decoder = Stack(config, config.decoder_layers, cross_attention=True)
        self.decoder_norm = make_norm(config) if config.norm_first else None
        self.initialise()

    def forward(
        self,
        source: Tensor,
        tokens: Tensor,
        targets: Tensor | None = None,
        *,
        source_lengths: Tensor | None = None,
        source_mask: Tensor | None = None,
    ) -> Tensor:
        """Logits [B, S, V]; given targets, the mean cross-entropy (scalar, nats a token), and logits are never stored.

        Args:
            source: int64 [B, Ss].
            tokens: int64 [B, S], what the decoder sees: ``shift_right(targets, start_token)`` to train.
            targets: int64 [B, S]; -100 counts for nothing.
            source_lengths, source_mask: see the class.

        Raises:
            TypeError, ValueError: an argument is of the wrong kind or shape.
        """
        memory, mask = self._encode(source, source_lengths, source_mask, self.training)
        check_tokens("tokens", tokens, self.config.context_length)
        if len(tokens) != len(source):
            raise ValueError(f"tokens has {len(tokens)} rows, must have {len(source)} like source")
        positions = slice(0, tokens.shape[1])
        context = Context(
            is_causal=True,
            training=self.training,
            rotation=self.rotation(positions),
            memory=memory,
            memory_mask=mask,
        )
        branch, residual = self.enter(*self.embed(tokens, positions), self.training)
        features = self.decoder(branch, residual, self.decoder_norm, context)
        if targets is None:
            return self.unembed(features)
        check_targets(targets, tokens)
        return F.linear_cross_entropy(features.flatten(0, 1), self.unembedding_weight, targets.flatten())

    def encode(
        self, source: Tensor, *, source_lengths: Tensor | None = None, source_mask: Tensor | None = None
    ) -> Tensor:
        """The memory: what the encoder makes of the source, [B, Ss, C]. Arguments as in ``forward``."""
        return self._encode(source, source_lengths, source_mask, self.training)[0]

    def _encode(
        self, source: Tensor, lengths: Tensor | None, source_mask: Tensor | None, training: bool
    ) -> tuple[Tensor, Tensor | None]:
        """The memory [B, Ss, C], and its mask, bool [B, 1, 1, Ss], if there is padding."""
        check_tokens("source", source, self.config.context_length)
        mask = padding_mask("source", source, lengths, source_mask)
        positions = slice(0, source.shape[1])
        context = Context(is_causal=False, training=training, rotation=self.rotation(positions), mask=mask)
        branch, residual = self.enter(*self.embed(source, positions), training)
        return self.encoder(branch, residual, self.encoder_norm, context), mask

    def features(self, tokens: Tensor, cache: Cache) -> Tensor:
        """What the decoder's last norm gives for the tokens after those in the cache: [B, S, C], without dropout.

        Args:
            tokens: int64 [B, S], or [1, T], packed, of a paged cache.
            cache: from ``new_cache`` or ``new_paged_cache``; gets the tokens' keys and values.

        Raises:
            TypeError: tokens are not integers.
            ValueError: tokens are of the wrong shape, or more than the cache has room for.
        """
        check_tokens("tokens", tokens)
        positions = cache.place(tokens)
        context = Context(is_causal=True, training=False, rotation=self.rotation(positions), cache=cache)
        branch, residual = self.enter(*self.embed(tokens, positions), training=False)
        features = self.decoder(branch, residual, self.decoder_norm, context)
        cache.advance()
        return features

    def new_cache(
        self,
        source: Tensor,
        room: int | None = None,
        *,
        source_lengths: Tensor | None = None,
        source_mask: Tensor | None = None,
    ) -> KVCache:
        """A cache that holds the keys and values of the encoder's output, computed once, and nothing of the target yet.

        Args:
            source, source_lengths, source_mask: as in ``forward``; the encoder runs without dropout.
            room: the most positions of the target, context_length at most; None for that.

        Raises:
            TypeError, ValueError: an argument is of the wrong kind or shape, or ``room`` out of range.
        """
        memory, mask = self._encode(source, source_lengths, source_mask, training=False)
        cache = KVCache(self.config.decoder_layers, self.cache_shape(len(source), room), memory)
        cache.memory = [block.cross_attention.keys_values(memory) for block in self.decoder]
        cache.memory_mask = mask
        return cache

    def new_paged_cache(
        self,
        source: Tensor,
        room: int | None = None,
        *,
        source_lengths: Tensor | None = None,
        source_mask: Tensor | None = None,
        page_size: int = PAGE_SIZE,
        num_pages: int | None = None,
    ) -> PagedKVCache:
        """As ``new_cache``, in pages, see PagedKVCache; the encoder's keys and values are packed, without padding.

        Raises:
            TypeError, ValueError: as ``new_cache`` and PagedKVCache.
        """
        memory, mask = self._encode(source, source_lengths, source_mask, training=False)
        shape = self.cache_shape(len(source), room)
        cache = PagedKVCache(self.config.decoder_layers, shape, memory, page_size, num_pages)
        kept = torch.ones_like(source, dtype=torch.bool) if mask is None else mask[:, 0, 0]
        packed = memory[kept][None]  # [1, Tk, C]
        for block in self.decoder:
            keys_values = block.cross_attention.keys_values(packed)  # [2, 1, G, Tk, D]
            cache.memory.append(keys_values[:, 0].transpose(1, 2))
        cache.memory_lengths = kept.sum(1).tolist()
        return cache

    def generate(
        self,
        source: Tensor | Sequence[Tensor],
        max_new_tokens: int,
        *,
        temperature: float = 0.0,
        top_k: int | None = None,
        top_p: float | None = None,
        generator: torch.Generator | None = None,
        end_token: int | None = None,
        paged: bool = False,
    ) -> Tensor | list[Tensor]:
        """Targets of sources.

        Args:
            source: int64 [B, Ss], Ss at least 1, or a list of sources of any lengths, int64 [Ss] each.
            max_new_tokens: the most tokens of a target, context_length at most.
            temperature, top_k, top_p, generator: see ``generation.Sampling``; the likeliest token by default.
            end_token: ends a target, and is part of it.
            paged: keep keys and values in pages (PagedKVCache), without any padding.

        Returns:
            Without the start token: int64 [B, max_new_tokens], filled up with ``end_token`` behind it, and shorter
            where all end sooner; or for a list, a list of int64 [S], each up to its end token.

        Raises:
            TypeError: source is not of integers, or what ``Sampling`` refuses.
            ValueError: an empty source, sources on several devices, ``max_new_tokens`` or ``end_token`` out of range,
                or what ``Sampling`` refuses: ``top_k``, ``top_p`` and ``generator`` want a temperature above 0.
        """
        sampling = generation.Sampling(temperature, top_k, top_p, generator)
        return generation.generate(self._decoding(source, max_new_tokens, paged), max_new_tokens, end_token, sampling)

    def stream(
        self,
        source: Tensor | Sequence[Tensor],
        max_new_tokens: int,
        *,
        temperature: float = 0.0,
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
        return generation.stream(self._decoding(source, max_new_tokens, paged), max_new_tokens, end_token, sampling)

    def beam_search(
        self,
        source: Tensor | Sequence[Tensor],
        max_new_tokens: int,
        *,
        num_beams: int = 4,
        length_penalty: float = 1.0,
        end_token: int | None = None,
        paged: bool = False,
    ) -> list[list[generation.Hypothesis]]:
        """For each source the ``num_beams`` likeliest targets that were found, best first, without the start token.

        Args:
            source, max_new_tokens, end_token, paged: as in ``generate``.
            num_beams, length_penalty: see ``generation.beam_search``.

        Raises:
            TypeError, ValueError: as in ``generate``, or what ``generation.beam_search`` refuses.
        """
        decoding = self._decoding(source, max_new_tokens, paged, num_beams)
        return generation.beam_search(decoding, max_new_tokens, num_beams, length_penalty, end_token)

    def _decoding(
        self, source: Tensor | Sequence[Tensor], max_new_tokens: int, paged: bool, num_beams: int = 1
    ) -> generation.Decoding:
        check_count("max_new_tokens", max_new_tokens, least=0, most=self.config.context_length)
        check_count("num_beams", num_beams, least=1)
        check_sequences("source", source)
        padded, lengths = generation.pad(source, left=False)

        def new_cache(longest: int) -> Cache:
            room = max(longest + max_new_tokens - 1, 1)
            if not paged:
                return self.new_cache(padded, room, source_lengths=lengths)
            pages = pages_needed(len(padded) * num_beams, room)
            return self.new_paged_cache(padded, room, source_lengths=lengths, num_pages=pages)

        start = padded.new_full((len(padded), 1), self.config.start_token)
        return generation.Decoding(self, new_cache, start, None, hidden=1, as_list=padded is not source)
