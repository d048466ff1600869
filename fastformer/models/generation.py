"""Generation with a cache: sampling, streaming and beam search, for any model that decodes.

Shapes: B sequences, S positions, V vocabulary, W beams of each sequence.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from fastformer.models.cache import Cache
from fastformer.models.checks import check_count, check_number

#: A smaller one is taken for this: float32 holds neither it nor its reciprocal.
LEAST_TEMPERATURE = torch.finfo(torch.float32).tiny


class Decoder(Protocol):
    """What generation asks of a model."""

    config: Any

    def features(self, tokens: Tensor, cache: Cache) -> Tensor:
        """Features of the tokens that follow those in the cache, to which they are added."""

    def unembed(self, features: Tensor) -> Tensor:
        """Their logits."""


class Decoding:
    """Sequences that grow, and the model's cache of them.

    Args:
        model: gives the logits.
        new_cache: makes an empty cache, of the length that the longest sequence has.
        tokens: int64 [B, S], the sequences so far, padded at their start.
        starts: int64 [B], where each begins; None for no padding.
        hidden: how many tokens at the start are not the user's.
        as_list: whether the user gave a list, and gets one.
    """

    def __init__(
        self,
        model: Decoder,
        new_cache: Callable[[int], Cache],
        tokens: Tensor,
        starts: Tensor | None,
        *,
        hidden: int,
        as_list: bool,
    ) -> None:
        self.model = model
        self.new_cache = new_cache
        self.tokens = tokens
        self.starts = starts
        self.hidden = hidden
        self.as_list = as_list
        self.prompt_length = tokens.shape[1]
        self._cache: Cache | None = None
        self._pending: Tensor | None = None  # the tokens that the cache lacks, as the model takes them

    def logits(self) -> Tensor:
        """Of the token that follows each sequence: [B, V]."""
        context_length = self.model.config.context_length
        if self._cache is None:
            self._fill(context_length)
        elif self._cache.longest == context_length:
            self._fill(context_length // 2)
        features = self.model.features(self._pending, self._cache)
        return self.model.unembed(self._cache.last(features))

    def append(self, tokens: Tensor) -> None:
        """Add a token [B, 1] to each sequence."""
        self.tokens = torch.cat((self.tokens, tokens), dim=1)
        self._pending = self._cache.pack(tokens)

    def repeat(self, times: int) -> None:
        """Make ``times`` neighbouring sequences of each."""
        self.tokens = self.tokens.repeat_interleave(times, dim=0)
        self.starts = None if self.starts is None else self.starts.repeat_interleave(times)
        self._cache.repeat(times)

    def select(self, rows: Tensor) -> None:
        """Make sequence ``rows[b]``, int64, sequence b; both come from the same one by ``repeat``."""
        self.tokens = self.tokens.index_select(0, rows)
        self._cache.select(rows)

    def sequence(self, row: int) -> Tensor:
        """The user's tokens of a sequence, int64 [S]."""
        start = self.hidden if self.starts is None else int(self.starts[row])
        return self.tokens[row, start:]

    def _fill(self, length: int) -> None:
        """Begin anew with the last ``length`` tokens, which become the pending ones."""
        cut = max(0, self.tokens.shape[1] - length)
        window = self.tokens[:, cut:]
        starts = None if self.starts is None else (self.starts - cut).clamp(min=0)
        self._cache = self.new_cache(window.shape[1])
        self._pending = self._cache.pack(window, starts)


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn.

    Args:
        temperature: divides the logits; 0 takes the likeliest token.
        top_k: draw among the k likeliest tokens only.
        top_p: draw among the fewest likeliest tokens whose probabilities reach this sum (Holtzman et al. 2020).
        generator: on the device of the logits; torch's global one by default.

    Raises:
        TypeError: one is of another type.
        ValueError: temperature is negative or not finite, top_k below 1, or top_p outside (0, 1]; or one of the others
            is given with temperature 0, which draws nothing.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    generator: torch.Generator | None = None

    def __post_init__(self) -> None:
        check_number("temperature", self.temperature)
        if not 0 <= self.temperature < math.inf:
            raise ValueError(f"temperature is {self.temperature}, must be finite and not negative")
        if self.top_k is not None:
            check_count("top_k", self.top_k, least=1)
        if self.top_p is not None:
            check_number("top_p", self.top_p)
            if not 0 < self.top_p <= 1:
                raise ValueError(f"top_p is {self.top_p}, must be above 0 and at most 1")
        if self.generator is not None and not isinstance(self.generator, torch.Generator):
            raise TypeError(f"generator is a {type(self.generator).__name__}, must be a torch.Generator or None")
        if self.temperature == 0:
            for name in ("top_k", "top_p", "generator"):
                if (value := getattr(self, name)) is not None:
                    found = "given" if name == "generator" else value
                    raise ValueError(f"{name} is {found}, must be None with temperature 0")

    def draw(self, logits: Tensor) -> Tensor:
        """A token for each row: [B, V] -> [B, 1]."""
        if self.temperature == 0 or self.top_k == 1:
            return logits.argmax(dim=-1, keepdim=True)
        logits = logits.float()
        if self.temperature < 1:
            logits = logits - logits.amax(dim=-1, keepdim=True)  # 0 at most, so no quotient overflows
        if self.temperature != 1:
            logits = logits / max(self.temperature, LEAST_TEMPERATURE)
        order = None  # int64 [B, up to V], the tokens, likeliest first
        if self.top_k is not None:
            logits, order = logits.topk(min(self.top_k, logits.shape[-1]))
        elif self.top_p is not None:
            logits, order = logits.sort(descending=True)
        probabilities = torch.softmax(logits, dim=-1)
        if self.top_p is not None:
            likelier = probabilities.cumsum(dim=-1) - probabilities  # what the tokens before each one sum to
            probabilities = probabilities.masked_fill(likelier >= self.top_p, 0.0)
        drawn = torch.multinomial(probabilities, 1, generator=self.generator)
        return drawn if order is None else order.gather(-1, drawn)


def generate(decoding: Decoding, max_new_tokens: int, end_token: int | None, sampling: Sampling) -> Any:
    """All sequences at the end of ``stream``: int64 [B, S], or a list of int64 [S], each up to its end token."""
    for _ in stream(decoding, max_new_tokens, end_token, sampling):
        pass
    if not decoding.as_list:
        return decoding.tokens[:, decoding.hidden :]
    sequences = [decoding.sequence(row) for row in range(len(decoding.tokens))]
    if end_token is None:
        return sequences
    generated = decoding.tokens[:, decoding.prompt_length :]
    surplus = ((generated == end_token).cumsum(1) > 0).sum(1) - 1  # tokens behind the end token; -1 if there is none
    return [x[: len(x) - max(more, 0)] for x, more in zip(sequences, surplus.tolist(), strict=True)]


def stream(decoding: Decoding, max_new_tokens: int, end_token: int | None, sampling: Sampling) -> Iterator[Tensor]:
    """New tokens, int64 [B] each time; behind an end token only that one.

    Raises:
        TypeError, ValueError: there is no such end token; at once, not with the first token.
    """
    _check_end_token(decoding, end_token)
    return _stream(decoding, max_new_tokens, end_token, sampling)


@torch.no_grad()
def _stream(decoding: Decoding, max_new_tokens: int, end_token: int | None, sampling: Sampling) -> Iterator[Tensor]:
    ended = torch.zeros(len(decoding.tokens), 1, dtype=torch.bool, device=decoding.tokens.device)
    for _ in range(max_new_tokens):
        new = sampling.draw(decoding.logits())  # [B, 1]
        if end_token is not None:
            new = new.masked_fill(ended, end_token)
            ended |= new == end_token
        decoding.append(new)
        yield new[:, 0]
        if end_token is not None and ended.all():
            return


class Hypothesis(NamedTuple):
    """A sequence that beam search found."""

    tokens: Tensor  # int64 [S], the prompt's and the end token included
    score: float  # log-probability of the new tokens / their number ** length_penalty


class Candidate(NamedTuple):
    """A way for one beam to go on."""

    row: int  # of the beam
    token: int
    sum: float  # of the log-probabilities of all new tokens


@torch.no_grad()
def beam_search(
    decoding: Decoding, max_new_tokens: int, num_beams: int, length_penalty: float, end_token: int | None
) -> list[list[Hypothesis]]:
    """For each sequence the ``num_beams`` likeliest continuations that were found, best first.

    In each step the W likeliest continuations of a sequence's W beams live on; those that end with ``end_token`` are
    set aside. The search is over when W have ended, or after ``max_new_tokens``, when those that live are taken too. So
    one beam is greedy generation.

    Args:
        decoding: of the sequences.
        max_new_tokens: the most to add, 1 at least.
        num_beams: W.
        length_penalty: above 0 it favours longer continuations, as their scores are negative.
        end_token: ends a sequence, and is part of it.

    Raises:
        TypeError: an argument is no number.
        ValueError: a number is out of range, or there is no room for the continuations in the context.
    """
    _check_beam_search(decoding, max_new_tokens, length_penalty, end_token)
    batch, device = len(decoding.tokens), decoding.tokens.device
    log_probabilities = decoding.logits().float().log_softmax(-1)  # [B, V]
    decoding.repeat(num_beams)
    log_probabilities = log_probabilities.repeat_interleave(num_beams, dim=0)  # [B * W, V]
    vocabulary = log_probabilities.shape[1]
    sums = log_probabilities.new_full((batch, num_beams), -math.inf)  # of each beam's log-probabilities
    sums[:, 0] = 0.0  # the beams of a sequence are still the same: only the first counts
    ended: list[list[Hypothesis]] = [[] for _ in range(batch)]

    for length in range(1, max_new_tokens + 1):
        if length > 1:
            log_probabilities = decoding.logits().float().log_softmax(-1)
        totals = (sums.view(-1, 1) + log_probabilities).view(batch, -1)  # [B, W * V]
        best = totals.topk(min(2 * num_beams, totals.shape[1]))  # enough if all W likeliest end
        beams: list[Candidate] = []
        for i, (values, indices) in enumerate(zip(best.values.tolist(), best.indices.tolist(), strict=True)):
            first = i * num_beams  # row of the sequence's first beam
            candidates = [
                Candidate(first + index // vocabulary, index % vocabulary, value)
                for value, index in zip(values, indices, strict=True)
                if value > -math.inf
            ]
            living, ending = _choose(candidates, num_beams, num_beams - len(ended[i]), end_token)
            for row, token, total in ending:
                whole = torch.cat((decoding.sequence(row), decoding.tokens.new_tensor([token])))
                ended[i].append(Hypothesis(whole, total / length**length_penalty))
            beams += living + [Candidate(first, 0, -math.inf)] * (num_beams - len(living))
        rows, tokens, values = zip(*beams)
        decoding.select(torch.tensor(rows, device=device))
        decoding.append(decoding.tokens.new_tensor(tokens)[:, None])
        sums = torch.tensor(values, device=device).view(batch, num_beams)
        if sums.max() == -math.inf:
            break

    for row, total in enumerate(sums.flatten().tolist()):
        if total > -math.inf:
            found = Hypothesis(decoding.sequence(row), total / length**length_penalty)
            ended[row // num_beams].append(found)
    return [sorted(found, key=lambda x: x.score, reverse=True)[:num_beams] for found in ended]


def _choose(
    candidates: list[Candidate], num_beams: int, wanted: int, end_token: int | None
) -> tuple[list[Candidate], list[Candidate]]:
    """Of a sequence's candidates, likeliest first: those that live on, and those that end.

    At most ``num_beams`` live on, and none where the ``wanted`` last hypotheses have ended. Only one that is among the
    ``num_beams`` likeliest ends.
    """
    living: list[Candidate] = []
    ending: list[Candidate] = []
    for rank, candidate in enumerate(candidates):
        if len(living) == num_beams or len(ending) == wanted:
            break
        if candidate.token != end_token:
            living.append(candidate)
        elif rank < num_beams:
            ending.append(candidate)
    return ([] if len(ending) == wanted else living), ending


def _check_beam_search(decoding: Decoding, max_new_tokens: int, length_penalty: float, end_token: int | None) -> None:
    check_count("max_new_tokens", max_new_tokens, least=1)
    longest = decoding.tokens.shape[1] - decoding.hidden + max_new_tokens
    if longest > decoding.model.config.context_length:
        raise ValueError(
            f"max_new_tokens is {max_new_tokens}, must be less: the longest sequence would have {longest} tokens, more"
            f" than context_length, {decoding.model.config.context_length}"
        )
    check_number("length_penalty", length_penalty)
    if not math.isfinite(length_penalty):
        raise ValueError(f"length_penalty is {length_penalty}, must be finite")
    _check_end_token(decoding, end_token)


def _check_end_token(decoding: Decoding, end_token: int | None) -> None:
    if end_token is not None:
        check_count("end_token", end_token, least=0, most=decoding.model.config.vocab_size - 1)


def pad(sequences: Sequence[Tensor], *, left: bool) -> tuple[Tensor, Tensor | None]:
    """Sequences int64 [S] as one int64 [B, longest], filled up with zeros, and int64 [B], their lengths.

    The lengths are None where all are equal.
    """
    if isinstance(sequences, Tensor):
        return sequences, None
    lengths = [len(x) for x in sequences]
    longest = max(lengths)
    padded = sequences[0].new_zeros(len(sequences), longest)
    for row, x in zip(padded, sequences, strict=True):
        first = longest - len(x) if left else 0
        row[first : first + len(x)] = x
    return padded, None if min(lengths) == longest else torch.tensor(lengths, device=padded.device)
