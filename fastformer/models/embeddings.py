"""Pretrained word vectors in the text formats of word2vec (Mikolov et al. 2013) and GloVe (Pennington et al. 2014)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from fastformer import nn


class HasVocabulary(Protocol):
    """A tokenizer: ours, one of ``tokenizers``, or one of transformers."""

    def get_vocab(self) -> dict[str, int]:
        """Each word and its number."""


class LoadedEmbeddings(NamedTuple):
    """What ``load_embeddings`` did, by the words of the vocabulary in the order of their numbers."""

    found: list[str]  # their rows are now the file's
    missing: list[str]  # the file lacks them: their rows are as they were


def load_embeddings(
    file: str | Path, vocabulary: Mapping[str, int] | HasVocabulary, embedding: torch.nn.Module
) -> LoadedEmbeddings:
    """Copy the vectors of the vocabulary's words from a text file into an embedding.

    Each line of the file is a word and its numbers, with spaces between; a word may have some in it. word2vec's has a
    first line with the number of words and the width, GloVe's has not. A word that the file has twice is taken from its
    first line; words that the vocabulary lacks are passed over.

    Args:
        file: UTF-8 text, with or without a byte order mark.
        vocabulary: each word and the row of its vector, or a tokenizer, whose words are taken as it writes them.
        embedding: an Embedding, or a model that has one as its ``token_embedding``.

    Raises:
        OSError: the file can't be read.
        TypeError: ``embedding`` is neither.
        ValueError: a line is not UTF-8, has too few numbers, or one, of a word in the vocabulary, that is not finite in
            the embedding's dtype; the first line's counts are not those of the file and the embedding; or a row of the
            vocabulary is outside the embedding. The embedding is then as it was.
    """
    weight = _weight(embedding)
    rows = vocabulary if isinstance(vocabulary, Mapping) else vocabulary.get_vocab()
    for word, row in rows.items():
        if not 0 <= row < len(weight):
            raise ValueError(f"vocabulary has row {row} for {word!r}, must be from 0 to {len(weight) - 1}")
    vectors: dict[str, tuple[int, list[float]]] = {}  # the word: its line, its numbers
    for number, word, numbers in _lines(Path(file), weight.shape[1]):
        if word in rows and word not in vectors:
            vectors[word] = number, _parse(file, number, numbers)
    ordered = sorted(rows, key=lambda word: rows[word])
    found = [word for word in ordered if word in vectors]
    if found:
        lines, values = zip(*(vectors[word] for word in found))
        values = torch.tensor(values, dtype=weight.dtype)
        finite = values.isfinite().all(dim=1).tolist()
        if not all(finite):
            line = min(line for line, fine in zip(lines, finite) if not fine)
            raise ValueError(f"{file}, line {line}: the vector has a number that is not finite in {weight.dtype}")
        with torch.no_grad():
            weight[torch.tensor([rows[word] for word in found], device=weight.device)] = values.to(weight.device)
    return LoadedEmbeddings(found, [word for word in ordered if word not in vectors])


def _weight(embedding: torch.nn.Module) -> Tensor:
    inner = getattr(embedding, "token_embedding", embedding)
    if not isinstance(inner, nn.Embedding):
        raise TypeError(
            f"embedding is a {type(embedding).__name__}, must be an Embedding, or have one as token_embedding"
        )
    return inner.weight


def _lines(path: Path, width: int) -> Iterator[tuple[int, str, list[str]]]:
    """Each line's number, word and numbers."""
    promised, count = None, 0
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8").rstrip(" \r\n")
            except UnicodeDecodeError as error:
                raise ValueError(f"{path}, line {number}: not UTF-8 (byte {error.start})") from error
            word, *numbers = text.rsplit(" ", width)
            word = word.rstrip(" ")
            if number == 1 and (header := _header(text)) is not None and width != 1:
                promised, file_width = header
                if file_width != width:
                    raise ValueError(f"{path}, line 1: has vectors of {file_width}, must be of {width} as embedding's")
                continue
            if len(numbers) != width or not word:
                raise ValueError(f"{path}, line {number}: must be a word and {width} numbers with spaces between")
            count += 1
            yield number, word, numbers
    if promised is not None and promised != count:
        raise ValueError(f"{path}: has {count} vectors, must have {promised} as line 1 says")


def _header(line: str) -> tuple[int, int] | None:
    """(number of words, width) of word2vec's first line, or None if it isn't one."""
    parts = line.split(" ")
    return (int(parts[0]), int(parts[1])) if len(parts) == 2 and all(x.isdecimal() for x in parts) else None


def _parse(file: str | Path, number: int, numbers: list[str]) -> list[float]:
    try:
        return [float(x) for x in numbers]
    except ValueError as error:
        raise ValueError(f"{file}, line {number}: {error}") from error
