"""Generation with a cache: sampling, streaming and beam search, for any model that decodes.

Shapes: B sequences, S positions, V vocabulary, W beams of each sequence.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from fastformer.models.cache import Cache


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


def generate(decoding: Decoding, max_new_tokens: int, end_token: int | None, options: dict[str, Any]) -> Any:
    """All sequences at the end of ``stream``: int64 [B, S], or a list of int64 [S], each up to its end token."""
    for _ in stream(decoding, max_new_tokens, end_token, options):
        pass
    if not decoding.as_list:
        return decoding.tokens[:, decoding.hidden :]
    sequences = [decoding.sequence(row) for row in range(len(decoding.tokens))]
    if end_token is None:
        return sequences
    generated = decoding.tokens[:, decoding.prompt_length :]
    surplus = ((generated == end_token).cumsum(1) > 0).sum(1) - 1  # tokens behind the end token; -1 if there is none
    return [x[: len(x) - max(more, 0)] for x, more in zip(sequences, surplus.tolist(), strict=True)]


def stream(decoding: Decoding, max_new_tokens: int, end_token: int | None, options: dict[str, Any]) -> Iterator[Tensor]:
    """New tokens, int64 [B] each time, by ``sample`` with the options; behind an end token only that one."""
    check_options(**{name: options[name] for name in ("temperature", "top_k", "top_p")})
    if end_token is not None:
        check_count("end_token", end_token, least=0, most=decoding.model.config.vocab_size - 1)
    return _stream(decoding, max_new_tokens, end_token, options)


@torch.no_grad()
def _stream(
    decoding: Decoding, max_new_tokens: int, end_token: int | None, options: dict[str, Any]
) -> Iterator[Tensor]:
    ended = torch.zeros(len(decoding.tokens), 1, dtype=torch.bool, device=decoding.tokens.device)
    for _ in range(max_new_tokens):
        new = sample(decoding.logits(), **options)  # [B, 1]
        if end_token is not None:
            new = new.masked_fill(ended, end_token)
            ended |= new == end_token
        decoding.append(new)
        yield new[:, 0]
        if end_token is not None and ended.all():
            return


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
    check_options(temperature, top_k, top_p)
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


class Hypothesis(NamedTuple):
    """A sequence that beam search found."""

    tokens: Tensor  # int64 [S], the prompt's and the end token included
    score: float  # log-probability of the new tokens / their number ** length_penalty


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
        ValueError: a number is out of range, or there is no room for the continuations in the context.
    """
    check_count("max_new_tokens", max_new_tokens, least=1)
    longest = decoding.tokens.shape[1] - decoding.hidden + max_new_tokens
    if longest > decoding.model.config.context_length:
        raise ValueError(
            f"max_new_tokens is {max_new_tokens}, must be less: the longest sequence would have {longest} tokens, more"
            f" than context_length, {decoding.model.config.context_length}"
        )
    if not math.isfinite(length_penalty):
        raise ValueError(f"length_penalty is {length_penalty}, must be finite")
    if end_token is not None:
        check_count("end_token", end_token, least=0, most=decoding.model.config.vocab_size - 1)
    batch = len(decoding.tokens)
    log_probabilities = decoding.logits().float().log_softmax(-1)  # [B, V]
    decoding.repeat(num_beams)
    log_probabilities = log_probabilities.repeat_interleave(num_beams, dim=0)  # [B * W, V]
    vocabulary = log_probabilities.shape[1]
    sums = log_probabilities.new_full((batch, num_beams), -math.inf)  # of each beam's log-probabilities
    sums[:, 0] = 0.0  # the beams of a sequence are still the same: only the first counts
    ended: list[list[Hypothesis]] = [[] for _ in range(batch)]

    for length in range(1, max_new_tokens + 1):
        totals = (sums.view(-1, 1) + log_probabilities).view(batch, -1)  # [B, W * V]
        best = totals.topk(min(2 * num_beams, totals.shape[1]))  # enough if all W likeliest end
        rows, tokens, values = [], [], []
        for i, candidates in enumerate(zip(best.values.tolist(), best.indices.tolist(), strict=True)):
            living: list[tuple[int, int, float]] = []  # row, token, sum
            for rank, (value, index) in enumerate(zip(*candidates, strict=True)):
                row, token = i * num_beams + index // vocabulary, index % vocabulary
                if value == -math.inf or len(living) == num_beams or len(ended[i]) == num_beams:
                    break
                if token != end_token:
                    living.append((row, token, value))
                elif rank < num_beams:
                    whole = torch.cat((decoding.sequence(row), decoding.tokens.new_tensor([token])))
                    ended[i].append(Hypothesis(whole, value / length**length_penalty))
            if len(ended[i]) == num_beams:
                living = []
            living += [(i * num_beams, 0, -math.inf)] * (num_beams - len(living))
            for column, values_of in zip(zip(*living), (rows, tokens, values)):
                values_of.extend(column)
        decoding.select(torch.tensor(rows, device=decoding.tokens.device))
        decoding.append(decoding.tokens.new_tensor(tokens)[:, None])
        sums = torch.tensor(values, device=sums.device).view(batch, num_beams)
        if length == max_new_tokens or sums.max() == -math.inf:
            break
        log_probabilities = decoding.logits().float().log_softmax(-1)

    for i, living in enumerate(sums.tolist()):
        for beam, value in enumerate(living):
            if value > -math.inf:
                whole = decoding.sequence(i * num_beams + beam)
                ended[i].append(Hypothesis(whole, value / length**length_penalty))
    return [sorted(found, key=lambda x: x.score, reverse=True)[:num_beams] for found in ended]


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


def check_sequences(name: str, sequences: Tensor | Sequence[Tensor]) -> None:
    """TypeError or ValueError unless they are int64 [B, S], or B of int64 [S] on one device."""
    if isinstance(sequences, Tensor):
        if sequences.dim() != 2 or not sequences.numel():
            raise ValueError(f"{name} has shape {tuple(sequences.shape)}, must be [B, S] with at least one token")
    elif not sequences:
        raise ValueError(f"{name} is {sequences!r}, must have at least one sequence")
    for i, x in enumerate([sequences] if isinstance(sequences, Tensor) else sequences):
        what = name if isinstance(sequences, Tensor) else f"{name}[{i}]"
        if not isinstance(x, Tensor):
            raise TypeError(f"{what} is a {type(x).__name__}, must be a Tensor")
        if x.dtype not in (torch.int64, torch.int32):
            raise TypeError(f"{what} has dtype {x.dtype}, must be int64 or int32")
        if x is not sequences and (x.dim() != 1 or not len(x)):
            raise ValueError(f"{what} has shape {tuple(x.shape)}, must be [S] with at least one token")


def check_options(temperature: float, top_k: int | None, top_p: float | None) -> None:
    """ValueError unless these are what ``sample`` takes."""
    if not 0 <= temperature < math.inf:
        raise ValueError(f"temperature is {temperature}, must be finite and not negative")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k is {top_k}, must be at least 1")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p is {top_p}, must be above 0 and at most 1")


def check_count(name: str, count: int, *, least: int, most: int | None = None) -> None:
    """TypeError or ValueError unless ``count`` is an integer in range."""
    if not isinstance(count, int) or isinstance(count, bool):
        raise TypeError(f"{name} is a {type(count).__name__}, must be an int")
    if count < least:
        raise ValueError(f"{name} is {count}, must be at least {least}")
    if most is not None and count > most:
        raise ValueError(f"{name} is {count}, must be at most {most}")
