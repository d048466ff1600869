"""What each kind of model learns from: how its batches are drawn, and what it is called with."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from fastformer.models import pairs
from fastformer.models.data import check_length, consecutive_batches, mask_tokens, random_batch
from fastformer.models.files import require

HELD_OUT_WINDOWS = 64  # of context_length tokens, at most
HELD_OUT_PAIRS = 512  # at most, to measure the loss

#: Arguments of the model's ``forward``, each with a row for each sequence; "targets" are -100 where nothing counts.
Batch = dict[str, Tensor]


class Objective(Protocol):
    """What training asks of an objective. ``data`` is int64 [N], or a list of pairs of int64 [S]."""

    def check(self, data: Any, context_length: int, name: str) -> None:
        """Raise ValueError unless batches can be drawn from the data, whose part ``name`` says ("training")."""

    def random_batch(self, data: Any, batch_size: int, context_length: int, generator: torch.Generator) -> Batch:
        """A batch to learn from."""

    def held_out_batches(self, data: Any, batch_size: int, context_length: int) -> Iterator[Batch]:
        """Batches to measure the loss with, always the same."""


@dataclass(frozen=True)
class NextToken:
    """GPT's: windows of a text; each token's target is its successor."""

    def check(self, data: Tensor, context_length: int, name: str) -> None:
        check_length(data, context_length, name)

    def random_batch(self, data: Tensor, batch_size: int, context_length: int, generator: torch.Generator) -> Batch:
        inputs, targets = random_batch(data, batch_size, context_length, generator)
        return {"tokens": inputs, "targets": targets}

    def held_out_batches(self, data: Tensor, batch_size: int, context_length: int) -> Iterator[Batch]:
        for inputs, targets in consecutive_batches(data, batch_size, context_length, HELD_OUT_WINDOWS):
            yield {"tokens": inputs, "targets": targets}


@dataclass(frozen=True)
class MaskedLanguage:
    """BERT's: windows of a text between a start and an end token, some tokens of them hidden; see ``mask_tokens``."""

    start_token: int
    end_token: int
    mask_token: int
    special_tokens: int  # at the start of the vocabulary
    vocab_size: int

    def check(self, data: Tensor, context_length: int, name: str) -> None:
        if context_length < 3:
            raise ValueError(f"context_length is {context_length}, must be at least 3: a token, a start and an end")
        check_length(data, context_length - 2, name)

    def random_batch(self, data: Tensor, batch_size: int, context_length: int, generator: torch.Generator) -> Batch:
        windows, _ = random_batch(data, batch_size, context_length - 2, generator)
        return self._masked(windows, generator)

    def held_out_batches(self, data: Tensor, batch_size: int, context_length: int) -> Iterator[Batch]:
        generator = torch.Generator().manual_seed(0)
        for windows, _ in consecutive_batches(data, batch_size, context_length - 2, HELD_OUT_WINDOWS):
            yield self._masked(windows, generator)

    def _masked(self, windows: Tensor, generator: torch.Generator) -> Batch:
        inputs, targets = mask_tokens(
            windows, self.mask_token, self.vocab_size, generator, special_tokens=self.special_tokens
        )
        pad = torch.nn.functional.pad
        inputs = pad(pad(inputs, (1, 0), value=self.start_token), (0, 1), value=self.end_token)
        return {"tokens": inputs, "targets": pad(targets, (1, 1), value=-100)}


@dataclass(frozen=True)
class Translation:
    """Seq2Seq's: pairs of a source and a target, which ends with an end token; see ``pairs.batch_of``."""

    start_token: int

    def check(self, data: Sequence[pairs.TokenPair], context_length: int, name: str) -> None:
        pairs.check_pairs(data, context_length, name)

    def random_batch(
        self, data: Sequence[pairs.TokenPair], batch_size: int, context_length: int, generator: torch.Generator
    ) -> Batch:
        return pairs.batch_of(pairs.random_pairs(data, batch_size, generator), self.start_token)

    def held_out_batches(
        self, data: Sequence[pairs.TokenPair], batch_size: int, context_length: int
    ) -> Iterator[Batch]:
        count = min(len(data), HELD_OUT_PAIRS)
        for start in range(0, count, batch_size):
            yield pairs.batch_of(data[start : min(start + batch_size, count)], self.start_token)


def digest(data: Tensor | Sequence[pairs.TokenPair]) -> str:
    """A fingerprint of the tokens, in hexadecimal."""
    as_array = require("numpy").ascontiguousarray
    found = hashlib.sha256()
    if isinstance(data, Tensor):
        found.update(as_array(data))
    else:
        for pair in data:
            for tokens in pair:
                found.update(len(tokens).to_bytes(8, "little"))
                found.update(as_array(tokens))
    return found.hexdigest()
