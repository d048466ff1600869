"""Tokenizers trained on the user's own text: byte-level BPE (Sennrich et al. 2016; Radford et al. 2019) and WordPiece
(Schuster and Nakajima 2012; Devlin et al. 2019)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from fastformer.models.files import replacing, require

#: The kind of a tokenizer, and the type of its model in tokenizer.json.
KINDS = {"bpe": "BPE", "wordpiece": "WordPiece"}

#: BERT's: padding, unknown, start, end of a sequence, and what hides a token that is to be predicted.
BERT_SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
#: A Seq2Seq's: padding, what its decoder starts from, and what ends a target.
SEQ2SEQ_SPECIAL_TOKENS = ("<pad>", "<start>", "<end>")


class Tokenizer:
    """Text to tokens and back.

    Two kinds: "bpe", whose tokens are runs of bytes, so that any text comes back as it was, and "wordpiece", whose
    tokens are pieces of words, in lower case, without accents; a word with a character it never saw is [UNK].
    """

    def __init__(self, tokenizer: object) -> None:
        """``tokenizer``: a ``tokenizers.Tokenizer``; see ``train`` and ``load``."""
        self._tokenizer = tokenizer
        # Whether special tokens are plain text is a state of the library's tokenizer: one of each, for threads.
        self._plain = type(tokenizer).from_str(tokenizer.to_str())
        self._plain.encode_special_tokens = True

    def __reduce__(self) -> tuple[type[Tokenizer], tuple[object]]:
        return type(self), (self._tokenizer,)

    @classmethod
    def train(
        cls,
        text: str | Iterable[str],
        vocab_size: int = 4096,
        *,
        kind: str = "bpe",
        special_tokens: Sequence[str] | None = None,
        prefix_space: bool = False,
    ) -> Tokenizer:
        """Learn merges from ``text`` until there are ``vocab_size`` tokens, or nothing is left to merge.

        Args:
            text: one text, or several.
            vocab_size: the most tokens, special ones included.
            kind: "bpe" or "wordpiece".
            special_tokens: the first tokens of the vocabulary, which stand for no text; None for none, or of
                "wordpiece" for BERT's. Of "wordpiece" they include [UNK].
            prefix_space: of "bpe" alone, encode a text as if a space stood before it, so that its first word is the
                same token as within a sentence; decoding drops it.

        Raises:
            ValueError: an unknown ``kind``, or a ``vocab_size`` too small for the special tokens with the 256 bytes, or
                with the characters of the text; special tokens without [UNK]; ``prefix_space`` of "wordpiece".
        """
        if kind not in KINDS:
            raise ValueError(f"kind is {kind!r}, must be one of {', '.join(KINDS)}")
        if special_tokens is None:
            special_tokens = BERT_SPECIAL_TOKENS if kind == "wordpiece" else ()
        lines = (
            line for part in ([text] if isinstance(text, str) else text) for line in part.splitlines(keepends=True)
        )
        train = _train_bpe if kind == "bpe" else _train_wordpiece
        return cls(train(lines, vocab_size, list(special_tokens), prefix_space))

    @classmethod
    def load(cls, path: str | Path) -> Tokenizer:
        """Read a tokenizer.json, but for its truncation and padding; ``kind`` then says which it is.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: it is not a tokenizer.json, or of neither kind.
        """
        content = Path(path).read_bytes()
        tokenizers = require("tokenizers")
        try:
            tokenizer = tokenizers.Tokenizer.from_str(content.decode())
            found = type(tokenizer.model).__name__
        except Exception as error:  # the library raises bare Exceptions
            raise ValueError(f"{path}: not a tokenizer.json ({error})") from error
        if found not in KINDS.values():
            raise ValueError(f"{path}: a tokenizer of type {found}, must be {' or '.join(KINDS.values())}")
        tokenizer.no_truncation()
        tokenizer.no_padding()
        return cls(tokenizer)

    def save(self, path: str | Path) -> None:
        """Write tokenizer.json; an older one stays whole if that fails."""
        with replacing(Path(path)) as temporary:
            temporary.write_text(self._tokenizer.to_str(), encoding="utf-8")

    @property
    def kind(self) -> str:
        """ "bpe" or "wordpiece"."""
        found = type(self._tokenizer.model).__name__
        return next(kind for kind, name in KINDS.items() if name == found)

    @property
    def vocab_size(self) -> int:
        """How many tokens there are, special ones included."""
        return self._tokenizer.get_vocab_size()

    def get_vocab(self) -> dict[str, int]:
        """Each token as it is written in tokenizer.json, and its number."""
        return self._tokenizer.get_vocab()

    @property
    def special_tokens(self) -> dict[str, int]:
        """The special tokens, and their numbers."""
        added = self._tokenizer.get_added_tokens_decoder().items()
        return {token.content: number for number, token in sorted(added) if token.special}

    def number(self, token: str) -> int:
        """The number of a token.

        Raises:
            ValueError: the vocabulary lacks it.
        """
        found = self._tokenizer.token_to_id(token)
        if found is None:
            raise ValueError(f"token is {token!r}, must be one of the tokenizer's {self.vocab_size} tokens")
        return found

    def encode(self, text: str, *, special_tokens: bool = False) -> Tensor:
        """Tokens of ``text``, int64 [N].

        Special tokens written in the text are taken for such where ``special_tokens`` is True, else for plain text.
        """
        return torch.tensor(self._encode([text], special_tokens)[0], dtype=torch.int64)

    def encode_all(self, texts: Sequence[str]) -> list[Tensor]:
        """Tokens of each text, int64 [N]; special tokens are plain text."""
        return [torch.tensor(tokens, dtype=torch.int64) for tokens in self._encode(texts, special_tokens=False)]

    def decode(self, tokens: Tensor, *, skip_special_tokens: bool = False) -> str:
        """Text of tokens [N]. Bytes that are no UTF-8, as a sampled end may be, become U+FFFD."""
        return self._tokenizer.decode(tokens.tolist(), skip_special_tokens=skip_special_tokens)

    def _encode(self, texts: Sequence[str], special_tokens: bool) -> list[list[int]]:
        tokenizer = self._tokenizer if special_tokens else self._plain
        return [encoding.ids for encoding in tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)]


def _train_bpe(lines: Iterable[str], vocab_size: int, special_tokens: list[str], prefix_space: bool) -> object:
    least = 256 + len(special_tokens)
    if vocab_size < least:
        named = f" and {len(special_tokens)} special tokens" if special_tokens else ""
        raise ValueError(f"vocab_size is {vocab_size}, must be at least {least}: a token for each byte{named}")
    tokenizers = require("tokenizers")
    byte_level = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=prefix_space)
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = byte_level
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    if prefix_space:
        strip = tokenizers.decoders.Strip(" ", 1, 0)  # of the whole text: ByteLevel has joined it
        tokenizer.decoder = tokenizers.decoders.Sequence([tokenizer.decoder, strip])
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size,
        initial_alphabet=byte_level.alphabet(),
        special_tokens=special_tokens,
        show_progress=False,
    )
    tokenizer.train_from_iterator(lines, trainer)
    return tokenizer


def _train_wordpiece(lines: Iterable[str], vocab_size: int, special_tokens: list[str], prefix_space: bool) -> object:
    if "[UNK]" not in special_tokens:
        raise ValueError(f"special_tokens is {special_tokens}, must include [UNK] of a wordpiece tokenizer")
    if prefix_space:
        raise ValueError("prefix_space is True, must be False of a wordpiece tokenizer, which encodes no spaces")
    tokenizers = require("tokenizers")
    normalizer = tokenizers.normalizers.BertNormalizer(lowercase=True)
    splitter = tokenizers.pre_tokenizers.BertPreTokenizer()
    words = Counter(word for x in lines for word, _ in splitter.pre_tokenize_str(normalizer.normalize_str(x)))
    # The trainer numbers characters in an order that changes from run to run, unless they are special tokens to it.
    characters = sorted({word[0] for word in words}) + sorted({f"##{x}" for word in words for x in word[1:]})
    trainer = tokenizers.trainers.WordPieceTrainer(
        vocab_size=vocab_size, special_tokens=special_tokens + characters, show_progress=False
    )
    trained = tokenizers.Tokenizer(tokenizers.models.WordPiece(unk_token="[UNK]"))
    trained.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    trained.train_from_iterator((f"{word} " * count for word, count in words.items()), trainer)

    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordPiece(trained.get_vocab(), unk_token="[UNK]"))
    tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer = splitter
    tokenizer.decoder = tokenizers.decoders.WordPiece()
    tokenizer.add_special_tokens(special_tokens)
    least = tokenizer.get_vocab_size()
    if least > vocab_size:
        raise ValueError(
            f"vocab_size is {vocab_size}, must be at least {least}: the special tokens and the text's characters"
        )
    return tokenizer
