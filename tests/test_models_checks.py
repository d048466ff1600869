"""What the models refuse: each argument named, what it was, and what it must be."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from fastformer.models import BERT, GPT, BERTConfig, GPTConfig, PagedKVCache, Seq2Seq, Seq2SeqConfig, shift_right
from fastformer.models.generation import Sampling

SIZES = {"vocab_size": 23, "context_length": 24, "num_layers": 2, "num_heads": 4, "d_model": 32}
TOKENS = torch.ones(2, 5, dtype=torch.int64)
PROMPT = torch.tensor([1, 2, 3, 4])
LENGTHS = torch.tensor([5, 2])


@pytest.fixture(scope="module")
def gpt() -> GPT:
    return GPT(GPTConfig(**SIZES))


@pytest.fixture(scope="module")
def seq2seq() -> Seq2Seq:
    return Seq2Seq(Seq2SeqConfig(**SIZES))


def bert(**options: object) -> BERT:
    return BERT(BERTConfig(**SIZES, **options))


@pytest.mark.parametrize(
    ("call", "error", "problem"),
    [
        (lambda m: m([1, 2]), TypeError, "tokens is a list, must be a Tensor"),
        (lambda m: m(TOKENS[:, :0]), ValueError, r"tokens has shape \(2, 0\), must be \[B, S\] with at least one"),
        (lambda m: m(TOKENS[:0]), ValueError, r"tokens has shape \(0, 5\), must be \[B, S\] with at least one"),
        (lambda m: m([[1]], cache=m.new_cache(1)), TypeError, "tokens is a list, must be a Tensor"),
        (lambda m: m(TOKENS, TOKENS.tolist()), TypeError, "targets is a list, must be a Tensor"),
        (lambda m: m(TOKENS, TOKENS.float()), TypeError, r"targets has dtype torch\.float32, must be int64"),
        (lambda m: m(TOKENS, TOKENS[:, :3]), ValueError, r"targets has shape \(2, 3\), must be \(2, 5\)"),
        (lambda m: m(TOKENS, TOKENS.to("meta")), ValueError, "targets is on meta, must be on cpu"),
    ],
)
def test_gpt_refuses(gpt: GPT, call: Callable[[GPT], object], error: type[Exception], problem: str) -> None:
    with pytest.raises(error, match=f"^{problem}"):
        call(gpt)


@pytest.mark.parametrize(
    ("call", "error", "problem"),
    [
        (lambda m: m([1, 2]), TypeError, "tokens is a list, must be a Tensor"),
        (
            lambda m: m(TOKENS, tokens_mask=TOKENS),
            TypeError,
            r"tokens_mask has dtype torch\.int64, must be bool",
        ),
        (lambda m: m(TOKENS, tokens_mask=[[True]]), TypeError, "tokens_mask is a list, must be a Tensor"),
        (lambda m: m(TOKENS, tokens_mask=TOKENS[:1] > 0), ValueError, r"tokens_mask has shape \(1, 5\), must be"),
        (lambda m: m(TOKENS, tokens_lengths=TOKENS), ValueError, r"tokens_lengths has shape .*, must be \(2,\)"),
        (lambda m: m(TOKENS, tokens_lengths=[5, 2]), TypeError, "tokens_lengths is a list, must be a Tensor"),
        (lambda m: m(TOKENS, tokens_lengths=LENGTHS * 0.5), TypeError, "tokens_lengths has dtype"),
        (
            lambda m: m(TOKENS, tokens_lengths=LENGTHS + 1),
            ValueError,
            r"tokens_lengths is \[6, 3\], must be from 0 to",
        ),
        (lambda m: m(TOKENS, tokens_lengths=LENGTHS - 3), ValueError, r"tokens_lengths is \[2, -1\], must be from 0"),
        (
            lambda m: m(TOKENS, tokens_lengths=LENGTHS, tokens_mask=TOKENS > 0),
            ValueError,
            "tokens_mask is given with tokens_lengths, must be None",
        ),
        (lambda m: m(TOKENS, TOKENS[:, :3]), ValueError, r"targets has shape \(2, 3\), must be \(2, 5\)"),
        (lambda m: m(TOKENS, segments=TOKENS[:, :3]), ValueError, r"segments has shape \(2, 3\), must be"),
        (lambda m: m(TOKENS, segments=TOKENS.float()), TypeError, r"segments has dtype torch\.float32, must be"),
        (lambda m: m(TOKENS, segments=TOKENS.tolist()), TypeError, "segments is a list, must be a Tensor"),
        (lambda m: m.classify(TOKENS, TOKENS), ValueError, r"targets has shape \(2, 5\), must be \(2,\)"),
        (lambda m: m.classify(TOKENS, [0, 1]), TypeError, "targets is a list, must be a Tensor"),
        (lambda m: m.classify(TOKENS, LENGTHS * 0.5), TypeError, r"targets has dtype torch\.float32, must be"),
        (lambda m: m.classify_next_sentence(TOKENS), ValueError, "next_sentence_head is False, must be True"),
    ],
)
def test_bert_refuses(call: Callable[[BERT], object], error: type[Exception], problem: str) -> None:
    with pytest.raises(error, match=f"^{problem}"):
        call(bert(pooler=True, num_classes=2))


@pytest.mark.parametrize(
    ("call", "problem"),
    [
        (lambda: bert(num_segments=0)(TOKENS, segments=TOKENS), "segments is given, must be None"),
        (lambda: bert(masked_language_head=False)(TOKENS), "masked_language_head is False, must be True"),
        (lambda: bert().classify(TOKENS), "num_classes is None, must be given"),
        (lambda: bert().pool(torch.ones(1, 2, 32)), "pooler is False, must be True"),
        (lambda: bert(pooler=True, num_classes=1).classify(TOKENS, LENGTHS), "targets is given, must be None with num"),
    ],
)
def test_bert_refuses_what_it_has_no_head_for(call: Callable[[], object], problem: str) -> None:
    with pytest.raises(ValueError, match=f"^{problem}"):
        call()


def test_lengths_from_nothing_to_everything_are_taken() -> None:
    model = bert()
    found = model(TOKENS, tokens_lengths=torch.tensor([5, 0]))
    assert torch.equal(found[0], model(TOKENS[:1])[0])
    assert found.isfinite().all()


def test_checks_of_values_stay_out_of_a_compiled_model() -> None:
    """Else lengths would break the graph."""
    model = BERT(BERTConfig(**SIZES | {"num_layers": 1}))
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(TOKENS, tokens_lengths=LENGTHS), model(TOKENS, tokens_lengths=LENGTHS))


@pytest.mark.parametrize(
    ("call", "error", "problem"),
    [
        (lambda m: m(TOKENS, TOKENS[:1]), ValueError, "tokens has 1 rows, must have 2"),
        (
            lambda m: m(TOKENS.repeat(1, 5), TOKENS),
            ValueError,
            "source end at position 25, must be at most",
        ),
        (lambda m: m(TOKENS[:, :0], TOKENS), ValueError, r"source has shape \(2, 0\), must be \[B, S\] with at least"),
        (lambda m: m.encode(TOKENS, source_lengths=LENGTHS * 3), ValueError, r"source_lengths is \[15, 6\], must be"),
        (lambda m: m.new_cache(TOKENS, 25), ValueError, "room is 25, must be at most context_length, 24"),
        (lambda m: m.new_cache(TOKENS, source_lengths=[5, 2]), TypeError, "source_lengths is a list, must be a Tensor"),
        (lambda m: m.generate(TOKENS, 25), ValueError, "max_new_tokens is 25, must be at most 24"),
        (lambda m: m.generate(TOKENS, 3, top_k=5), ValueError, "top_k is 5, must be None with temperature 0"),
    ],
)
def test_seq2seq_refuses(
    seq2seq: Seq2Seq, call: Callable[[Seq2Seq], object], error: type[Exception], problem: str
) -> None:
    with pytest.raises(error, match=f"^{problem}"):
        call(seq2seq)


@pytest.mark.parametrize(
    ("targets", "start_token", "error", "problem"),
    [
        (PROMPT, 1, ValueError, r"targets has shape \(4,\), must be \[B, S\]"),
        (TOKENS.tolist(), 1, TypeError, "targets is a list, must be a Tensor"),
        (TOKENS.float(), 1, TypeError, r"targets has dtype torch\.float32, must be"),
        (TOKENS, -1, ValueError, "start_token is -1, must be at least 0"),
        (TOKENS, 1.0, TypeError, "start_token is a float, must be an int"),
    ],
)
def test_shift_right_refuses(targets: Tensor, start_token: int, error: type[Exception], problem: str) -> None:
    with pytest.raises(error, match=f"^{problem}"):
        shift_right(targets, start_token)


@pytest.mark.parametrize(
    ("options", "error", "problem"),
    [
        ({"temperature": -1.0}, ValueError, "temperature is -1.0, must be finite and not negative"),
        ({"temperature": math.nan}, ValueError, "temperature is nan, must be finite"),
        ({"temperature": None}, TypeError, "temperature is a NoneType, must be a number"),
        ({"temperature": True}, TypeError, "temperature is a bool, must be a number"),
        ({"top_k": 0}, ValueError, "top_k is 0, must be at least 1"),
        ({"top_k": 1.5}, TypeError, "top_k is a float, must be an int"),
        ({"top_k": True}, TypeError, "top_k is a bool, must be an int"),
        ({"top_p": 0.0}, ValueError, "top_p is 0.0, must be above 0 and at most 1"),
        ({"top_p": 1.5}, ValueError, "top_p is 1.5, must be above 0 and at most 1"),
        ({"top_p": "0.5"}, TypeError, "top_p is a str, must be a number"),
        ({"generator": 3}, TypeError, "generator is a int, must be a torch.Generator or None"),
        ({"temperature": 0, "top_k": 5}, ValueError, "top_k is 5, must be None with temperature 0"),
        ({"temperature": 0.0, "top_p": 1.0}, ValueError, "top_p is 1.0, must be None with temperature 0"),
    ],
)
def test_sampling_refuses(gpt: GPT, options: dict[str, object], error: type[Exception], problem: str) -> None:
    for call in (lambda: Sampling(**options), lambda: gpt.generate([PROMPT], 2, **options)):
        with pytest.raises(error, match=f"^{problem}"):
            call()


def test_the_likeliest_token_takes_no_generator(gpt: GPT) -> None:
    with pytest.raises(ValueError, match=r"^generator is given, must be None with temperature 0"):
        gpt.generate([PROMPT], 2, temperature=0, generator=torch.Generator())


@pytest.mark.parametrize(
    ("call", "error", "problem"),
    [
        (lambda m, p: m.generate([], 3), ValueError, r"tokens is \[\], must have at least one"),
        (lambda m, p: m.generate([[1, 2]], 3), TypeError, r"tokens\[0\] is a list, must be a Tensor"),
        (
            lambda m, p: m.generate([p, p.float()], 3),
            TypeError,
            r"tokens\[1\] has dtype torch.float32, must be int64",
        ),
        (lambda m, p: m.generate([p[:0]], 3), ValueError, r"tokens\[0\] has shape \(0,\), must be \[S\] with at least"),
        (lambda m, p: m.generate([p, p.to("meta")], 3), ValueError, r"tokens\[1\] is on meta, must be on cpu"),
        (lambda m, p: m.generate(p, 3), ValueError, r"tokens has shape \(4,\), must be \[B, S\]"),
        (lambda m, p: m.generate(3, 3), TypeError, "tokens is a int, must be a Tensor or a list of them"),
        (lambda m, p: m.generate([p], 3.0), TypeError, "max_new_tokens is a float, must be an int"),
        (lambda m, p: m.generate([p], -1), ValueError, "max_new_tokens is -1, must be at least 0"),
        (lambda m, p: m.generate([p], 3, end_token=23), ValueError, "end_token is 23, must be at most 22"),
        (lambda m, p: m.stream([p], 3, top_p=2.0), ValueError, "top_p is 2.0, must"),
        (lambda m, p: m.beam_search([p], 3, num_beams=0), ValueError, "num_beams is 0, must be at least 1"),
        (lambda m, p: m.beam_search([p], 0), ValueError, "max_new_tokens is 0, must be at least 1"),
        (lambda m, p: m.beam_search([p], 21), ValueError, "max_new_tokens is 21, must be less: .* 25 tokens, .* 24"),
        (lambda m, p: m.beam_search([p], 3, length_penalty=math.nan), ValueError, "length_penalty is nan, must be"),
        (
            lambda m, p: m.beam_search([p], 3, length_penalty="a"),
            TypeError,
            "length_penalty is a str, must be a num",
        ),
        (lambda m, p: m.new_cache(1, room=25), ValueError, "room is 25, must be at most context_length, 24"),
        (lambda m, p: m.new_cache(1, room=0), ValueError, "room is 0, must be at least 1"),
        (lambda m, p: m.new_cache(2, 1.5), TypeError, "room is a float, must be an int"),
        (lambda m, p: m.new_cache(0), ValueError, "batch_size is 0, must be at least 1"),
        (lambda m, p: m.new_cache(-1), ValueError, "batch_size is -1, must be at least 1"),
        (lambda m, p: m.new_paged_cache(2.0), TypeError, "batch_size is a float, must be an int"),
        (lambda m, p: m(p[None].expand(2, -1), cache=m.new_cache(1)), ValueError, "tokens has 2 rows, must have 1"),
        (lambda m, p: m(p[None], cache=m.new_cache(1, 3)), ValueError, "tokens end at position 4, must be at most"),
        (lambda m, p: m(p[None], cache=m.new_paged_cache(1)), ValueError, r"tokens has shape .*, must be \(1, 1\)"),
        (lambda m, p: m.new_paged_cache(1, page_size=24), ValueError, "page_size is 24, must be a power of two"),
        (lambda m, p: m.new_paged_cache(1, page_size=8), ValueError, "page_size is 8, must be a power of two, 16"),
        (lambda m, p: m.new_paged_cache(1, page_size=16.0), TypeError, "page_size is a float, must be an int"),
        (lambda m, p: m.new_paged_cache(1, num_pages=0), ValueError, "num_pages is 0, must be at least 1"),
        (lambda m, p: m.new_paged_cache(1, num_pages=2.5), TypeError, "num_pages is a float, must be an int"),
        (lambda m, p: m.new_paged_cache(2).reserve([1]), ValueError, r"counts is \[1\], must have 2 counts"),
    ],
)
def test_generation_refuses(
    gpt: GPT, call: Callable[[GPT, Tensor], object], error: type[Exception], problem: str
) -> None:
    with pytest.raises(error, match=f"^{problem}"):
        call(gpt, PROMPT)


def test_refuses_more_than_the_pool_has(gpt: GPT) -> None:
    cache = gpt.new_paged_cache(2, num_pages=1)
    assert isinstance(cache, PagedKVCache)
    with pytest.raises(ValueError, match="num_pages is 1, must be more"):
        gpt(cache.pack(torch.zeros(2, 3, dtype=torch.int64)), cache=cache)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_both_integers_are_taken(gpt: GPT, seq2seq: Seq2Seq, dtype: torch.dtype) -> None:
    tokens = TOKENS.to(dtype)
    assert torch.equal(gpt(tokens), gpt(TOKENS))
    assert torch.equal(gpt.generate(tokens, 3, temperature=0), gpt.generate(TOKENS, 3, temperature=0))
    lengths = LENGTHS.to(dtype)
    found = seq2seq.encode(tokens, source_lengths=lengths)
    assert torch.equal(found, seq2seq.encode(TOKENS, source_lengths=LENGTHS))
