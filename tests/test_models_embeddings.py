"""Word vectors in text files: both formats, what is found, and what is refused with its line."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fastformer import nn
from fastformer.models import GPT, GPTConfig, load_embeddings

VOCABULARY = {"<pad>": 0, "cat": 1, "naïve": 2, "New York": 3, "dog": 4}
LINES = ["cat 1 2.5 -3e-1", "unknown 9 9 9", "New York 4 5 6", "naïve 7 8 9"]
EXPECTED = {1: [1.0, 2.5, -0.3], 2: [7.0, 8.0, 9.0], 3: [4.0, 5.0, 6.0]}


class Tokenizer:
    def get_vocab(self) -> dict[str, int]:
        return VOCABULARY


@pytest.mark.parametrize("header", [[], ["4 3"]])
@pytest.mark.parametrize("ending", ["\n", " \r\n"])
@pytest.mark.parametrize("vocabulary", [VOCABULARY, Tokenizer()])
def test_loads_both_formats(header: list[str], ending: str, vocabulary: object, tmp_path: Path) -> None:
    path = tmp_path / "vectors.txt"
    path.write_bytes("".join(line + ending for line in header + LINES).encode())
    embedding = nn.Embedding(6, 3)
    before = embedding.weight.detach().clone()
    found, missing = load_embeddings(path, vocabulary, embedding)
    assert found == ["cat", "naïve", "New York"]
    assert missing == ["<pad>", "dog"]
    for row in range(6):
        assert torch.equal(embedding.weight[row], torch.tensor(EXPECTED[row]) if row in EXPECTED else before[row])
    assert embedding.weight.requires_grad


def test_loads_into_a_model_in_its_dtype(tmp_path: Path) -> None:
    path = tmp_path / "vectors.txt"
    path.write_text("dog 0.1 1 2 3\ncat 9 9 9 9\ndog 5 5 5 5\n")
    model = GPT(GPTConfig(5, num_heads=2, d_model=4, num_layers=1)).bfloat16()
    assert load_embeddings(path, {"dog": 4}, model) == (["dog"], [])
    assert torch.equal(model.token_embedding.weight[4], torch.tensor([0.1, 1.0, 2.0, 3.0]).bfloat16())  # the first
    assert torch.equal(model.unembedding_weight, model.token_embedding.weight)


def test_byte_order_mark_and_more_spaces_belong_to_no_word(tmp_path: Path) -> None:
    path = tmp_path / "vectors.txt"
    path.write_bytes("\ufeffcat  1 2 3\nNew York   4 5 6\n".encode())
    embedding = nn.Embedding(5, 3)
    assert load_embeddings(path, VOCABULARY, embedding).found == ["cat", "New York"]
    assert embedding.weight[[1, 3]].tolist() == [[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]
    path.write_bytes("\ufeff1 3\ndog 7 8 9\n".encode())
    assert load_embeddings(path, VOCABULARY, embedding).found == ["dog"]


def test_double_embedding_gets_every_digit(tmp_path: Path) -> None:
    path = tmp_path / "vectors.txt"
    path.write_text("cat 0.1 1e300\n")
    embedding = nn.Embedding(2, 2, dtype=torch.float64)
    load_embeddings(path, {"cat": 1}, embedding)
    assert embedding.weight[1].tolist() == [0.1, 1e300]


@pytest.mark.parametrize(("dtype", "number"), [(torch.float32, "1e300"), (torch.float16, "70000")])
def test_refuses_numbers_that_the_dtype_lacks(dtype: torch.dtype, number: str, tmp_path: Path) -> None:
    path = tmp_path / "vectors.txt"
    path.write_text(f"cat 1 2 3\ndog 1 {number} 3\n")
    embedding = nn.Embedding(5, 3, dtype=dtype)
    before = embedding.weight.detach().clone()
    with pytest.raises(ValueError, match=rf"line 2: the vector has a number that is not finite in {dtype}"):
        load_embeddings(path, VOCABULARY, embedding)
    assert torch.equal(embedding.weight, before)


def test_width_of_one_has_no_header(tmp_path: Path) -> None:
    path = tmp_path / "vectors.txt"
    path.write_text("7 1\n8 2\n")
    embedding = nn.Embedding(2, 1)
    assert load_embeddings(path, {"7": 0, "8": 1}, embedding).found == ["7", "8"]
    assert embedding.weight.flatten().tolist() == [1.0, 2.0]


def test_vocabulary_of_our_tokenizer(tmp_path: Path) -> None:
    pytest.importorskip("tokenizers")
    from fastformer.models.tokenizer import Tokenizer

    tokenizer = Tokenizer.train("cat cat cat", 258)
    path = tmp_path / "vectors.txt"
    path.write_text("cat 1 2\nz 3 4\n")
    embedding = nn.Embedding(tokenizer.vocab_size, 2)
    found, missing = load_embeddings(path, tokenizer, embedding)
    assert sorted(found) == ["cat", "z"]
    assert len(missing) == tokenizer.vocab_size - 2
    assert embedding.weight[tokenizer.encode("cat")].tolist() == [[1.0, 2.0]]


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"cat 1 2 3\ndog 1 2\n", "line 2: must be a word and 3 numbers"),
        (b"cat 1 2 3\n\n", "line 2: must be a word and 3 numbers"),
        (b"cat 1 2 3\ndog 1 x 3\n", "line 2: could not convert string to float: 'x'"),
        (b"cat 1 2 nan\n", "line 1: the vector has a number that is not finite"),
        (b"cat 1 2 3\nd\xffg 1 2 3\n", r"line 2: not UTF-8 \(byte 1\)"),
        (b"2 4\ncat 1 2 3 4\ndog 1 2 3 4\n", "line 1: has vectors of 4, must be of 3"),
        (b"3 3\ncat 1 2 3\ndog 1 2 3\n", "has 2 vectors, must have 3 as line 1 says"),
    ],
)
def test_refuses_bad_lines_and_changes_nothing(content: bytes, problem: str, tmp_path: Path) -> None:
    path = tmp_path / "vectors.txt"
    path.write_bytes(content)
    embedding = nn.Embedding(6, 3)
    before = embedding.weight.detach().clone()
    with pytest.raises(ValueError, match=rf"vectors\.txt(,|:) {problem}"):
        load_embeddings(path, VOCABULARY, embedding)
    assert torch.equal(embedding.weight, before)


def test_refuses_arguments(tmp_path: Path) -> None:
    path = tmp_path / "vectors.txt"
    path.write_text("cat 1 2 3\n")
    with pytest.raises(TypeError, match="embedding is a Linear, must be an Embedding"):
        load_embeddings(path, VOCABULARY, nn.Linear(3, 3))
    with pytest.raises(ValueError, match="vocabulary has row 3 for 'New York', must be from 0 to 2"):
        load_embeddings(path, VOCABULARY, nn.Embedding(3, 3))
    with pytest.raises(FileNotFoundError):
        load_embeddings(tmp_path / "none.txt", VOCABULARY, nn.Embedding(5, 3))
