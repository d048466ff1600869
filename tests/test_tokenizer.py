"""Tokenizers: round trips, special tokens, files."""

from __future__ import annotations

import copy
import json
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from fastformer.models import data
from fastformer.models.tokenizer import BERT_SPECIAL_TOKENS, SEQ2SEQ_SPECIAL_TOKENS, Tokenizer


@pytest.fixture(scope="module")
def text() -> str:
    return data.sample_text()[:60_000]


@pytest.fixture(scope="module")
def tokenizer(text: str) -> Tokenizer:
    return Tokenizer.train(text, 400)


@pytest.fixture(scope="module")
def wordpiece(text: str) -> Tokenizer:
    return Tokenizer.train(text, 400, kind="wordpiece")


@pytest.mark.parametrize("sample", ["Hello, world!", "  two\n\n\tspaces ", "naïve café 数学 🦊", "", "\x00\x7f"])
def test_tokenizer_round_trip(tokenizer: Tokenizer, sample: str) -> None:
    tokens = tokenizer.encode(sample)
    assert tokens.dtype == torch.int64
    assert tokenizer.decode(tokens) == sample


def test_tokenizer_learns_merges(tokenizer: Tokenizer, text: str) -> None:
    assert tokenizer.vocab_size == 400
    assert len(tokenizer.encode(text)) < 0.6 * len(text.encode())
    assert len(tokenizer.encode(" the")) == 1


@pytest.mark.parametrize("kind", ["bpe", "wordpiece"])
def test_tokenizer_training_repeats_itself(text: str, kind: str) -> None:
    first, second = (Tokenizer.train(text, 400, kind=kind) for _ in range(2))
    assert first.get_vocab() == second.get_vocab()
    assert torch.equal(first.encode(text), second.encode(text))


def test_tokenizer_saves_and_loads(tokenizer: Tokenizer, text: str, tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    tokenizer.save(path)
    assert torch.equal(Tokenizer.load(path).encode(text), tokenizer.encode(text))
    assert [file.name for file in tmp_path.iterdir()] == ["tokenizer.json"]


@pytest.mark.parametrize("content", [b"", b"{}", b"\xff\xfe", b'{"model": 3}'])
def test_tokenizer_refuses_other_files(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"tokenizer\.json: not a tokenizer\.json"):
        Tokenizer.load(path)


def test_tokenizer_refuses_a_small_vocabulary() -> None:
    with pytest.raises(ValueError, match=r"^vocab_size is 255, must"):
        Tokenizer.train("text", 255)


@pytest.mark.parametrize("sample", ["Hello, world!", "two  spaces", "naïve café 数学 🦊", "", " begins with a space"])
def test_prefix_space_round_trip(text: str, sample: str) -> None:
    spaced = Tokenizer.train(text, 400, special_tokens=SEQ2SEQ_SPECIAL_TOKENS, prefix_space=True)
    assert spaced.decode(spaced.encode(sample)) == sample.removeprefix(" ")
    the, of_the = spaced.encode("the"), spaced.encode("of the")
    assert torch.equal(the, of_the[-1:])


def test_special_tokens_come_first_and_are_plain_text_unless_asked_for(text: str) -> None:
    special = Tokenizer.train(text, 400, special_tokens=SEQ2SEQ_SPECIAL_TOKENS)
    assert special.special_tokens == {"<pad>": 0, "<start>": 1, "<end>": 2}
    assert special.vocab_size == 400
    assert special.number("<end>") == 2
    written = "all<end>"
    assert special.decode(special.encode(written)) == written
    assert 2 not in special.encode(written)
    assert special.encode(written, special_tokens=True)[-1] == 2
    assert special.decode(special.encode(written, special_tokens=True), skip_special_tokens=True) == "all"
    assert [x.tolist() for x in special.encode_all(["a", written])] == [
        special.encode(x).tolist() for x in ("a", written)
    ]
    with pytest.raises(ValueError, match=r"^token is '<mask>', must be one of"):
        special.number("<mask>")


def test_wordpiece_has_berts_special_tokens_and_lower_case(wordpiece: Tokenizer) -> None:
    assert list(wordpiece.special_tokens) == list(BERT_SPECIAL_TOKENS)
    assert list(wordpiece.special_tokens.values()) == [0, 1, 2, 3, 4]
    assert wordpiece.vocab_size == 400
    assert wordpiece.decode(wordpiece.encode("The Statement is valued: naïve")) == "the statement is valued : naive"
    assert wordpiece.encode("数").tolist() == [1]
    assert wordpiece.encode("the [MASK]", special_tokens=True).tolist() == [wordpiece.number("the"), 4]
    assert 4 not in wordpiece.encode("the [MASK]")
    pieces = {number: token for token, number in wordpiece.get_vocab().items()}
    assert [pieces[x] for x in wordpiece.encode("thethe").tolist()][1].startswith("##")


def test_load_says_which_kind_it_is(tokenizer: Tokenizer, wordpiece: Tokenizer, text: str, tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    for kind, saved in (("bpe", tokenizer), ("wordpiece", wordpiece)):
        assert saved.kind == kind
        saved.save(path)
        loaded = Tokenizer.load(path)
        assert loaded.kind == kind
        assert loaded.special_tokens == saved.special_tokens
        assert torch.equal(loaded.encode(text), saved.encode(text))


def test_load_drops_truncation_and_padding(tokenizer: Tokenizer, text: str, tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    tokenizer.save(path)
    stored = json.loads(path.read_text(encoding="utf-8"))
    stored["truncation"] = {"direction": "Right", "max_length": 8, "strategy": "LongestFirst", "stride": 0}
    stored["padding"] = {
        "strategy": {"Fixed": 16},
        "direction": "Right",
        "pad_to_multiple_of": None,
        "pad_id": 0,
        "pad_type_id": 0,
        "pad_token": "!",
    }
    path.write_text(json.dumps(stored), encoding="utf-8")
    loaded = Tokenizer.load(path)
    assert [x.tolist() for x in loaded.encode_all(["a", text])] == [tokenizer.encode(x).tolist() for x in ("a", text)]


def test_encodings_that_overlap_do_not_mix(wordpiece: Tokenizer) -> None:
    """One takes special tokens for plain text while another, as of a second thread, doesn't."""
    written = "what the [MASK] hides"

    def texts() -> Iterator[str]:
        assert 4 in wordpiece.encode(written, special_tokens=True)
        yield written

    (found,) = wordpiece.encode_all(texts())
    assert 4 not in found


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_copies_encode_alike(wordpiece: Tokenizer, copied: Callable[[Tokenizer], Tokenizer]) -> None:
    for special in (False, True):
        tokens = copied(wordpiece).encode("the [MASK]", special_tokens=special)
        assert torch.equal(tokens, wordpiece.encode("the [MASK]", special_tokens=special))


def test_tokenizers_of_another_kind_are_refused(tmp_path: Path) -> None:
    import tokenizers

    path = tmp_path / "tokenizer.json"
    tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0}, unk_token="a")).save(str(path))
    with pytest.raises(ValueError, match=r"tokenizer\.json: a tokenizer of type WordLevel, must be BPE or WordPiece"):
        Tokenizer.load(path)


def test_train_refuses_what_does_not_go_together(text: str) -> None:
    with pytest.raises(ValueError, match=r"^kind is 'unigram', must be one of bpe, wordpiece"):
        Tokenizer.train(text, kind="unigram")
    with pytest.raises(ValueError, match=r"^vocab_size is 258, must be at least 259: .* and 3 special tokens"):
        Tokenizer.train(text, 258, special_tokens=SEQ2SEQ_SPECIAL_TOKENS)
    with pytest.raises(ValueError, match=r"^vocab_size is 20, must be at least \d+: the special tokens and"):
        Tokenizer.train(text, 20, kind="wordpiece")
    with pytest.raises(ValueError, match=r"^special_tokens is \['\[PAD\]'\], must include \[UNK\]"):
        Tokenizer.train(text, kind="wordpiece", special_tokens=["[PAD]"])
    with pytest.raises(ValueError, match=r"^prefix_space is True, must be False"):
        Tokenizer.train(text, kind="wordpiece", prefix_space=True)
