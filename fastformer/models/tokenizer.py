"""Byte-level byte-pair encoding (Sennrich et al. 2016; Radford et al. 2019), trained on the user's own text."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from fastformer.models.files import replacing, require


class Tokenizer:
    """Text to tokens and back. Any text can be encoded: what the vocabulary lacks becomes bytes."""

    def __init__(self, tokenizer: object) -> None:
        """``tokenizer``: a ``tokenizers.Tokenizer``; see ``train`` and ``load``."""
        self._tokenizer = tokenizer

    @classmethod
    def train(cls, text: str, vocab_size: int = 4096) -> Tokenizer:
        """Learn merges from ``text`` until there are ``vocab_size`` tokens, or nothing is left to merge.

        Raises:
            ValueError: ``vocab_size`` is below the 256 bytes.
        """
        if vocab_size < 256:
            raise ValueError(f"vocab_size is {vocab_size}, must be at least 256: a token for each byte")
        tokenizers = require("tokenizers")
        byte_level = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
        tokenizer.pre_tokenizer = byte_level
        tokenizer.decoder = tokenizers.decoders.ByteLevel()
        trainer = tokenizers.trainers.BpeTrainer(
            vocab_size=vocab_size, initial_alphabet=byte_level.alphabet(), show_progress=False
        )
        tokenizer.train_from_iterator(text.splitlines(keepends=True), trainer)
        return cls(tokenizer)

    @classmethod
    def load(cls, path: str | Path) -> Tokenizer:
        """Read a tokenizer.json.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: it is not a tokenizer.json.
        """
        content = Path(path).read_bytes()
        tokenizers = require("tokenizers")
        try:
            return cls(tokenizers.Tokenizer.from_str(content.decode()))
        except Exception as error:  # the library raises bare Exceptions
            raise ValueError(f"{path}: not a tokenizer.json ({error})") from error

    def save(self, path: str | Path) -> None:
        """Write tokenizer.json; an older one stays whole if that fails."""
        with replacing(Path(path)) as temporary:
            temporary.write_text(self._tokenizer.to_str(), encoding="utf-8")

    @property
    def vocab_size(self) -> int:
        return self._tokenizer.get_vocab_size()

    def get_vocab(self) -> dict[str, int]:
        """Each token as it is written in tokenizer.json, and its number."""
        return self._tokenizer.get_vocab()

    def encode(self, text: str) -> Tensor:
        """Tokens of ``text``, int64 [N]."""
        return torch.tensor(self._tokenizer.encode(text).ids, dtype=torch.int64)

    def decode(self, tokens: Tensor) -> str:
        """Text of tokens [N]. Bytes that are no UTF-8, as a sampled end may be, become U+FFFD."""
        return self._tokenizer.decode(tokens.tolist(), skip_special_tokens=False)
