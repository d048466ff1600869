"""What is trained on: text, hidden tokens, pairs, and batches of them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fastformer.models import data, pairs
from fastformer.models.objectives import MaskedLanguage, Translation, digest


@pytest.fixture(scope="module")
def text() -> str:
    return data.sample_text()[:60_000]


def test_sample_text_is_english_and_always_the_same() -> None:
    text = data.sample_text()
    assert len(text) > 300_000
    assert text == data.sample_text()
    assert text.count(" the ") > 2000


def test_split_text_keeps_everything_and_cuts_at_a_line(text: str) -> None:
    train_text, held_out_text = data.split_text(text)
    assert train_text + held_out_text == text
    assert train_text.endswith("\n")
    assert len(held_out_text) == pytest.approx(0.1 * len(text), rel=0.05)
    assert data.split_text("abcdefghij") == ("abcdefghi", "j")


def test_batches_are_windows_and_their_successors() -> None:
    tokens = torch.arange(50)
    inputs, targets = data.random_batch(tokens, 200, 7, torch.Generator().manual_seed(0))
    assert torch.equal(inputs, inputs[:, :1] + torch.arange(7))
    assert torch.equal(targets, inputs + 1)
    assert set(inputs[:, 0].tolist()) == set(range(43))  # the last window ends with the last token

    batches = list(data.consecutive_batches(tokens, 3, 7, 64))
    assert [len(x) for x, _ in batches] == [3, 3, 1]
    assert torch.equal(torch.cat([x for x, _ in batches]).flatten(), torch.arange(49))
    assert torch.equal(torch.cat([y for _, y in batches]).flatten(), torch.arange(1, 50))
    assert sum(len(x) for x, _ in data.consecutive_batches(tokens, 3, 7, 2)) == 2


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"\x89PNG\r\n\x1a\n\x00", "not a text file, or not UTF-8"),
        (b"text\x00text", "zero bytes"),
        (b"", "empty"),
        (b" \n", "empty"),
    ],
)
def test_read_text_refuses(tmp_path: Path, content: bytes, problem: str) -> None:
    path = tmp_path / "file"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"{path}: .*{problem}"):
        data.read_text(path)


def test_read_text_drops_the_byte_order_mark(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes("\ufeffnaïve".encode())
    assert data.read_text(path) == "naïve"


# Hidden tokens


def test_masking_hides_15_percent_80_10_10() -> None:
    tokens = torch.randint(5, 1000, (400, 100), generator=torch.Generator().manual_seed(1))
    inputs, targets = data.mask_tokens(tokens, 4, 1000, torch.Generator().manual_seed(0), special_tokens=5)
    chosen = targets != -100
    assert (chosen.sum(1) == 15).all()
    assert torch.equal(targets[chosen], tokens[chosen])
    assert torch.equal(inputs[~chosen], tokens[~chosen])
    count = chosen.sum().item()
    hidden = (inputs[chosen] == 4).sum().item() / count
    kept = (inputs[chosen] == tokens[chosen]).sum().item() / count
    assert hidden == pytest.approx(0.8, abs=0.02)
    assert kept == pytest.approx(0.1, abs=0.015)
    others = inputs[chosen & (inputs != 4) & (inputs != tokens)]
    assert others.min() >= 5 and others.max() < 1000 and others.unique().numel() > 300
    assert chosen.float().mean(0).std() < 0.04  # every place alike


def test_masking_follows_its_generator_and_hides_one_at_least() -> None:
    tokens = torch.arange(10, 40).view(10, 3)
    first, second = (data.mask_tokens(tokens, 4, 50, torch.Generator().manual_seed(3)) for _ in range(2))
    assert torch.equal(first[0], second[0]) and torch.equal(first[1], second[1])
    assert ((first[1] != -100).sum(1) == 1).all()


def test_masked_windows_stand_between_start_and_end() -> None:
    objective = MaskedLanguage(start_token=2, end_token=3, mask_token=4, special_tokens=5, vocab_size=60)
    tokens = torch.arange(5, 55)
    batch = objective.random_batch(tokens, 6, 12, torch.Generator().manual_seed(0))
    assert batch["tokens"].shape == batch["targets"].shape == (6, 12)
    assert (batch["tokens"][:, 0] == 2).all() and (batch["tokens"][:, -1] == 3).all()
    assert (batch["targets"][:, [0, -1]] == -100).all()
    first, second = (list(objective.held_out_batches(tokens, 2, 12)) for _ in range(2))
    assert [len(x["tokens"]) for x in first] == [2, 2]  # four windows of ten tokens and a successor
    assert all(torch.equal(x[name], y[name]) for x, y in zip(first, second) for name in x)
    with pytest.raises(ValueError, match=r"^context_length is 2, must be at least 3"):
        objective.check(tokens, 2, "training")
    with pytest.raises(ValueError, match=r"^text is too short: its training part has 50 tokens"):
        objective.check(tokens, 52, "training")


# Pairs


def test_sample_pairs_are_words_in_reverse() -> None:
    training, held_out = pairs.reversed_words(data.sample_text())
    assert len(training) > 10_000 and len(held_out) > 500
    for source, target in training + held_out:
        assert target.split() == source.split()[::-1]
        assert 2 <= len(source.split()) <= 8
    sources = [source for source, _ in training + held_out]
    assert len(set(sources)) == len(sources)
    assert pairs.reversed_words(data.sample_text()) == (training, held_out)


def test_words_are_letters_and_apostrophes() -> None:
    text = "Don't use __name__ or x1 here. Sie müssen nicht; 3 words. " + "one two. three four! " * 3
    training, held_out = pairs.reversed_words(text)
    sources = {source for source, _ in training + held_out}
    assert sources - {"müssen nicht"} == {"don't use", "sie müssen nicht", "one two", "three four"}


def test_sample_pairs_want_a_few_sentences() -> None:
    with pytest.raises(ValueError, match=r"^text is too short: its sentences give no pairs"):
        pairs.reversed_words("Too short.")


def test_read_pairs(tmp_path: Path) -> None:
    path = tmp_path / "pairs.tsv"
    path.write_bytes("one\teins\r\n\ntwo words\tzwei Wörter\n".encode())
    assert pairs.read_pairs(path) == [("one", "eins"), ("two words", "zwei Wörter")]


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ("a\tb\nno tab\n", "line 2: has 0 tabs, must be source, tab, target"),
        ("a\tb\n\nc\td\te\n", "line 3: has 2 tabs"),
        ("a\tb\n \tb\n", "line 2: the source is empty"),
        ("a\t\n", "line 1: the target is empty"),
        ("\n", "the file is empty"),
    ],
)
def test_read_pairs_refuses(tmp_path: Path, content: str, problem: str) -> None:
    path = tmp_path / "pairs.tsv"
    path.write_text(content)
    with pytest.raises(ValueError, match=f"{path}.*{problem}"):
        pairs.read_pairs(path)


def test_split_pairs_keeps_sources_apart() -> None:
    given = [(f"source {i % 40}", f"target {i}") for i in range(80)]
    training, held_out = pairs.split_pairs(given)
    assert sorted(training + held_out) == sorted(given)
    assert len(held_out) == 8  # both pairs of four of forty sources
    assert not {source for source, _ in training} & {source for source, _ in held_out}
    assert pairs.split_pairs(given) == (training, held_out)
    with pytest.raises(ValueError, match=r"^pairs have 1 different sources, must have at least 2"):
        pairs.split_pairs([("a", "b"), ("a", "c")])


def test_batches_of_pairs_are_shifted_and_padded() -> None:
    some = [(torch.tensor([5, 6, 7]), torch.tensor([8, 2])), (torch.tensor([9]), torch.tensor([5, 6, 2]))]
    batch = pairs.batch_of(some, start_token=1)
    assert batch["source"].tolist() == [[5, 6, 7], [9, 0, 0]]
    assert batch["source_lengths"].tolist() == [3, 1]
    assert batch["targets"].tolist() == [[8, 2, -100], [5, 6, 2]]
    assert batch["tokens"].tolist() == [[1, 8, 2], [1, 5, 6]]
    assert [len(x["source"]) for x in Translation(1).held_out_batches(some * 3, 4, 8)] == [4, 2]


def test_pairs_must_fit_in_the_context() -> None:
    fitting = (torch.arange(4), torch.arange(3))
    pairs.check_pairs([fitting], 4, "training")
    with pytest.raises(ValueError, match=r"^pairs: the longest training .* has 4 tokens, .* context_length, 3"):
        pairs.check_pairs([fitting], 3, "training")
    with pytest.raises(ValueError, match=r"^pairs: there are no held-out pairs"):
        pairs.check_pairs([], 3, "held-out")
    with pytest.raises(ValueError, match=r"^pairs: a training source or target is empty"):
        pairs.check_pairs([(torch.arange(0), torch.arange(3))], 3, "training")


def test_digest_tells_data_apart() -> None:
    a, b = torch.arange(4), torch.arange(5)
    found = {digest(a), digest(b), digest([(a, b)]), digest([(b, a)]), digest([(a, b), (a, b)])}
    assert len(found) == 5
    assert digest(a) == digest(a.clone())
