"""Pairs of a source and a target to train a Seq2Seq on, and batches of them."""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path

import torch
from torch import Tensor

from fastformer.models.data import read_text
from fastformer.models.seq2seq import Seq2Seq, shift_right

#: A source and its target, as text, or as tokens int64 [S] each.
TextPair = tuple[str, str]
TokenPair = tuple[Tensor, Tensor]

#: Letters, with apostrophes between them: no part of a name with digits or underscores.
WORD = r"(?<![\w'])[^\W\d_]+(?:'[^\W\d_]+)*(?![\w'])"
SHORTEST, LONGEST = 2, 8  # words of a source made from a text
COMMON_WORDS = 1000  # that such sources have


def reversed_words(text: str, held_out: float = 0.1) -> tuple[list[TextPair], list[TextPair]]:
    """(training pairs, held-out pairs): 2 to 8 words of ``text`` in a row, in lower case, and those in reverse.

    Sentences are cut at rare words, and at what is no word. The share ``held_out`` of the parts is kept apart, and cut
    to runs; in the others a run begins at every word. No source is there twice, or on both sides.

    Raises:
        ValueError: the text has too few words for that.
    """
    text = text.lower()
    common = {word for word, _ in Counter(re.findall(WORD, text)).most_common(COMMON_WORDS)}
    parts: dict[tuple[str, ...], None] = {}  # keys alone: in order, and none twice
    for sentence in re.findall(rf"{WORD}(?:\s+{WORD})+", text):
        for is_common, words in groupby(sentence.split(), common.__contains__):
            if is_common:
                parts[tuple(words)] = None
    shuffled = list(parts)
    random.Random(0).shuffle(shuffled)
    first = max(1, round(len(shuffled) * held_out))
    apart = {x: None for part in shuffled[:first] for x in _runs(part, LONGEST)}
    training = {x: None for part in shuffled[first:] for x in _runs(part, 1) if x not in apart}
    if not training or not apart:
        raise ValueError("text is too short: its sentences give no pairs to hold out, or none to train on")
    return [_reversed(words) for words in training], [_reversed(words) for words in apart]


def _runs(words: tuple[str, ...], stride: int) -> list[tuple[str, ...]]:
    """Runs of words that begin ``stride`` words apart."""
    return [words[start : start + LONGEST] for start in range(0, len(words) - SHORTEST + 1, stride)]


def _reversed(words: Sequence[str]) -> TextPair:
    return " ".join(words), " ".join(reversed(words))


def read_pairs(path: str | Path) -> list[TextPair]:
    """A UTF-8 file with a pair in each line: source, tab, target. Empty lines don't count.

    Raises:
        OSError: it can't be read.
        ValueError: it is not UTF-8 text, has no pair, or has a line that is none; names the line.
    """
    pairs = []
    for number, line in enumerate(read_text(path).split("\n"), start=1):
        line = line.removesuffix("\r")
        if not line:
            continue
        fields = line.split("\t")
        if len(fields) != 2:
            raise ValueError(f"{path}, line {number}: has {len(fields) - 1} tabs, must be source, tab, target")
        source, target = fields
        for name, field in (("source", source), ("target", target)):
            if not field.strip():
                raise ValueError(f"{path}, line {number}: the {name} is empty")
        pairs.append((source, target))
    return pairs


def split_pairs(pairs: Sequence[TextPair], held_out: float = 0.1) -> tuple[list[TextPair], list[TextPair]]:
    """(training pairs, held-out pairs): about the share ``held_out`` of the sources is kept apart, always the same.

    All the pairs of a source go to one side.

    Raises:
        ValueError: there are fewer than two different sources.
    """
    sources = sorted({source for source, _ in pairs})
    if len(sources) < 2:
        raise ValueError(f"pairs have {len(sources)} different sources, must have at least 2: one is held out")
    apart = set(random.Random(0).sample(sources, max(1, round(len(sources) * held_out))))
    return [pair for pair in pairs if pair[0] not in apart], [pair for pair in pairs if pair[0] in apart]


def check_pairs(pairs: Sequence[TokenPair], context_length: int, name: str) -> None:
    """Raise ValueError unless there is a pair, and each source and target has 1 to ``context_length`` tokens."""
    if not pairs:
        raise ValueError(f"pairs: there are no {name} pairs, must be one at least")
    lengths = [len(tokens) for pair in pairs for tokens in pair]
    if min(lengths) < 1:
        raise ValueError(f"pairs: a {name} source or target is empty, must have a token at least")
    if max(lengths) > context_length:
        raise ValueError(
            f"pairs: the longest {name} source or target has {max(lengths)} tokens, its end included, must have at most"
            f" context_length, {context_length}"
        )


def batch_of(pairs: Sequence[TokenPair], start_token: int) -> dict[str, Tensor]:
    """What a Seq2Seq is called with to learn from pairs: source, tokens, targets, source_lengths.

    Sources are padded with zeros, which nothing attends to, and targets with -100.
    """
    sources, targets = (
        torch.nn.utils.rnn.pad_sequence([pair[side] for pair in pairs], batch_first=True, padding_value=padding)
        for side, padding in ((0, 0), (1, -100))
    )
    lengths = torch.tensor([len(source) for source, _ in pairs])
    return {
        "source": sources,
        "tokens": shift_right(targets, start_token),
        "targets": targets,
        "source_lengths": lengths,
    }


def random_pairs(pairs: Sequence[TokenPair], batch_size: int, generator: torch.Generator) -> list[TokenPair]:
    """``batch_size`` of the pairs, drawn with replacement."""
    return [pairs[i] for i in torch.randint(len(pairs), (batch_size,), generator=generator).tolist()]


@torch.no_grad()
def exact_share(model: Seq2Seq, pairs: Sequence[TokenPair], *, batch_size: int = 64) -> float:
    """Share of the pairs whose target, which ends with the end token, greedy decoding gives token for token."""
    model.eval()
    device = model.token_embedding.weight.device
    right = 0
    for start in range(0, len(pairs), batch_size):
        part = pairs[start : start + batch_size]
        longest = max(len(target) for _, target in part)
        found = model.generate([source.to(device) for source, _ in part], longest, end_token=int(part[0][1][-1]))
        right += sum(torch.equal(tokens.cpu(), target) for tokens, (_, target) in zip(found, part, strict=True))
    return right / len(pairs)
