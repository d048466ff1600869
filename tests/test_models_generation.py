"""Generation: prompts of different lengths, both caches, streaming, end tokens and beams, of GPT and Seq2Seq."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from fastformer.models import GPT, GPTConfig, Hypothesis, Seq2Seq, Seq2SeqConfig

SIZES = {"vocab_size": 23, "context_length": 24, "num_layers": 2, "num_heads": 4, "d_model": 32}
LLAMA = {"positions": "rotary", "norm": "rms_norm", "activation": "swiglu", "num_kv_heads": 2, "bias": False}
CONFIGS = {"gpt2": {}, "llama": LLAMA, "sinusoidal, post-norm": {"positions": "sinusoidal", "norm_first": False}}
PROMPTS = (7, 2, 11, 7)
END = 5


def randomised(model: GPT | Seq2Seq) -> GPT | Seq2Seq:
    """Weights so large that sequences vary."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    return model


@pytest.fixture(params=CONFIGS)
def gpt(request: pytest.FixtureRequest) -> GPT:
    return randomised(GPT(GPTConfig(**SIZES, **CONFIGS[request.param])))


@pytest.fixture
def seq2seq() -> Seq2Seq:
    return randomised(Seq2Seq(Seq2SeqConfig(**SIZES, num_kv_heads=2, num_decoder_layers=3, start_token=1)))


def draw(lengths: tuple[int, ...] = PROMPTS) -> list[Tensor]:
    return [torch.randint(SIZES["vocab_size"], (length,)) for length in lengths]


def assert_close(ours: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5 * expected.abs().max().item())


def assert_equal(ours: list[Tensor], expected: list[Tensor]) -> None:
    assert [x.tolist() for x in ours] == [x.tolist() for x in expected]


# The caches give what the full forward gives


@pytest.mark.parametrize("chunks", [[9], [1] * 9, [4, 1, 3, 1]])
@torch.no_grad()
def test_cache_of_gpt(gpt: GPT, chunks: list[int]) -> None:
    tokens = torch.randint(23, (3, 9))
    cache = gpt.new_cache(3, room=9)
    assert_close(torch.cat([gpt(piece, cache=cache) for piece in tokens.split(chunks, dim=1)], 1), gpt(tokens))


@pytest.mark.parametrize("counts", [[[9, 2, 20]], [[9, 0, 3], [0, 2, 16], [0, 0, 1]], [[4, 1, 10], [5, 1, 10]]])
@torch.no_grad()
def test_paged_cache_of_gpt(gpt: GPT, counts: list[list[int]]) -> None:
    """Any number of tokens of each sequence in a call."""
    sequences = draw((9, 2, 20))
    cache = gpt.new_paged_cache(3, num_pages=4)
    logits: list[list[Tensor]] = [[], [], []]
    done = [0, 0, 0]
    for count in counts:
        cache.reserve(count)
        packed = torch.cat([x[start : start + new] for x, start, new in zip(sequences, done, count)])
        for piece, mine in zip(gpt(packed[None], cache=cache)[0].split(count), logits):
            mine.append(piece)
        done = [start + new for start, new in zip(done, count)]
    assert cache.sequence_lengths == [9, 2, 20] == done
    for mine, tokens in zip(logits, sequences):
        assert_close(torch.cat(mine), gpt(tokens[None])[0])


@torch.no_grad()
def test_left_padded_cache(gpt: GPT) -> None:
    sequences = draw((9, 4))
    padded = torch.stack((sequences[0], torch.cat((torch.zeros(5, dtype=torch.int64), sequences[1]))))
    cache = gpt.new_cache(2)
    first = cache.pack(padded[:, :7], torch.tensor([0, 5]))
    logits = torch.cat([gpt(piece, cache=cache) for piece in (first, padded[:, 7:8], padded[:, 8:])], 1)
    assert_close(logits[0], gpt(sequences[0][None])[0])
    assert_close(logits[1, 5:], gpt(sequences[1][None])[0])


@pytest.mark.parametrize("paged", [False, True])
@torch.no_grad()
def test_caches_of_seq2seq(seq2seq: Seq2Seq, paged: bool) -> None:
    """The encoder's keys and values are those of each source alone."""
    sources, tokens = draw((6, 3)), torch.randint(23, (2, 7))
    padded = torch.zeros(2, 6, dtype=torch.int64)
    for row, source in zip(padded, sources):
        row[: len(source)] = source
    new_cache = seq2seq.new_paged_cache if paged else seq2seq.new_cache
    cache = new_cache(padded, source_lengths=torch.tensor([6, 3]))
    pieces = [seq2seq.unembed(seq2seq.features(cache.pack(x), cache)) for x in tokens.split([4, 1, 2], dim=1)]
    logits = torch.cat([x.view(2, -1, 23) for x in pieces], 1)
    for mine, source, target in zip(logits, sources, tokens):
        assert_close(mine, seq2seq(source[None], target[None])[0])


def test_padding_is_told_with_the_first_tokens(gpt: GPT) -> None:
    cache = gpt.new_cache(1)
    gpt(cache.pack(torch.tensor([[1, 2]])), cache=cache)
    with pytest.raises(ValueError, match="starts is given for tokens at position 2, must be given with the first"):
        cache.pack(torch.tensor([[1]]), torch.tensor([0]))


def test_pages_are_shared_until_they_are_written_to() -> None:
    gpt = randomised(GPT(GPTConfig(**SIZES | {"context_length": 64})))
    prompt = torch.randint(23, (1, 20))
    cache = gpt.new_paged_cache(1, num_pages=6)
    with torch.no_grad():
        gpt(cache.pack(prompt), cache=cache)
        cache.repeat(3)  # one full page and one begun, each of three
        assert len({tuple(table) for table in cache._tables}) == 1
        tokens = torch.tensor([[3, 4, 5]])
        logits = gpt(tokens, cache=cache)[0]
        assert [len({table[i] for table in cache._tables}) for i in (0, 1)] == [1, 3]  # four pages, not six
        cache.select(torch.tensor([2, 2, 0]))
        after = gpt(torch.tensor([[6, 7, 8]]), cache=cache)[0]
    for i in range(3):
        assert_close(logits[i], gpt(torch.cat((prompt[0], tokens[0, i : i + 1]))[None])[0, -1])
    for i, (parent, last) in enumerate([(5, 6), (5, 7), (3, 8)]):
        assert_close(after[i], gpt(torch.cat((prompt[0], torch.tensor([parent, last])))[None])[0, -1])


# Sequences of different lengths


def greedy(gpt: GPT, prompt: Tensor, count: int) -> Tensor:
    with torch.no_grad():
        for _ in range(count):
            prompt = torch.cat((prompt, gpt(prompt[None])[0, -1:].argmax(-1)))
    return prompt


@pytest.mark.parametrize("paged", [False, True])
def test_prompts_of_different_lengths_go_on_as_alone(gpt: GPT, paged: bool) -> None:
    prompts = draw()
    found = gpt.generate(prompts, 12, temperature=0, paged=paged)
    assert_equal(found, [greedy(gpt, prompt, 12) for prompt in prompts])
    assert len(torch.cat(found).unique()) > 5


def test_both_caches_agree_beyond_the_context(gpt: GPT) -> None:
    prompts = draw((30, 3, 24))
    found = gpt.generate(prompts, 40, temperature=0)
    assert [len(x) for x in found] == [70, 43, 64]
    assert_equal(found, gpt.generate(prompts, 40, temperature=0, paged=True))
    for prompt, x in zip(prompts, found):
        assert torch.equal(x[: len(prompt)], prompt)
    assert torch.equal(found[0][:31], torch.cat((prompts[0], gpt(prompts[0][None, -24:])[0, -1:].argmax(-1))))


@pytest.mark.parametrize("paged", [False, True])
def test_sources_of_different_lengths_go_on_as_alone(seq2seq: Seq2Seq, paged: bool) -> None:
    sources = draw()
    found = seq2seq.generate(sources, 24, paged=paged)
    for source, target in zip(sources, found):
        tokens = torch.cat((torch.tensor([1]), target[:-1]))
        assert torch.equal(seq2seq(source[None], tokens[None])[0].argmax(-1), target)
    assert_equal(found, [seq2seq.generate(source[None], 24)[0] for source in sources])


# End tokens and streams


def cut(tokens: Tensor, start: int) -> Tensor:
    """Up to the first END from ``start`` on, which stays."""
    ends = (tokens[start:] == END).nonzero()
    return tokens[: start + int(ends[0]) + 1] if len(ends) else tokens


@pytest.mark.parametrize("paged", [False, True])
def test_end_token(gpt: GPT, paged: bool) -> None:
    prompts = [torch.cat((torch.tensor([END]), x)) for x in draw()]  # one in a prompt ends nothing
    options = {"temperature": 3.0, "paged": paged}
    whole = gpt.generate(prompts, 12, generator=torch.Generator().manual_seed(3), **options)
    found = gpt.generate(prompts, 12, generator=torch.Generator().manual_seed(3), end_token=END, **options)
    assert_equal(found, [cut(x, len(prompt)) for x, prompt in zip(whole, prompts)])
    assert len({len(x) - len(prompt) for x, prompt in zip(found, prompts)}) > 1


def test_end_token_in_a_tensor(seq2seq: Seq2Seq) -> None:
    source = torch.randint(23, (6, 5))
    whole = seq2seq.generate(source, 20)
    end = int(whole[0, 3])
    found = seq2seq.generate(source, 20, end_token=end)
    lengths = [(row == end).tolist().index(True) + 1 if end in row else 20 for row in whole]
    assert found.shape == (6, max(lengths))
    for row, expected, length in zip(found, whole, lengths):
        assert torch.equal(row[:length], expected[:length])
        assert (row[length:] == end).all()


def test_stream_gives_the_tokens_as_they_come(gpt: GPT, seq2seq: Seq2Seq) -> None:
    prompts = torch.randint(23, (2, 4))
    stream = gpt.stream(prompts, 10, generator=torch.Generator().manual_seed(0))
    first = next(stream)
    assert first.shape == (2,)
    assert torch.is_grad_enabled()
    tokens = torch.stack([first, *stream], dim=1)
    assert torch.equal(tokens, gpt.generate(prompts, 10, generator=torch.Generator().manual_seed(0))[:, 4:])
    assert torch.equal(torch.stack(list(seq2seq.stream(prompts, 5)), 1), seq2seq.generate(prompts, 5))


def test_generation_has_no_dropout() -> None:
    options = {"dropout": 0.5, "embedding_dropout": 0.5, "attention_dropout": 0.5}
    gpt = randomised(GPT(GPTConfig(**SIZES, **options)))
    seq2seq = randomised(Seq2Seq(Seq2SeqConfig(**SIZES, **options)))
    prompts = torch.randint(23, (2, 4))
    trained = gpt.generate(prompts, 8, temperature=0), seq2seq.generate(prompts, 8)
    assert gpt.training and seq2seq.training
    gpt.eval(), seq2seq.eval()
    assert_equal(list(trained), [gpt.generate(prompts, 8, temperature=0), seq2seq.generate(prompts, 8)])


# Beam search


@torch.no_grad()
def score(gpt: GPT, tokens: Tensor, prompt: int, length_penalty: float) -> float:
    log_probabilities = gpt(tokens[None, :-1])[0].log_softmax(-1)[prompt - 1 :]
    found = log_probabilities.gather(1, tokens[prompt:, None])
    return (found.sum() / len(found) ** length_penalty).item()


@pytest.mark.parametrize("paged", [False, True])
@pytest.mark.parametrize("end_token", [None, END])
def test_one_beam_is_greedy(gpt: GPT, end_token: int | None, paged: bool) -> None:
    prompts = draw()
    found = gpt.beam_search(prompts, 12, num_beams=1, end_token=end_token, paged=paged)
    assert [len(x) for x in found] == [1, 1, 1, 1]
    assert_equal([x[0].tokens for x in found], gpt.generate(prompts, 12, temperature=0, end_token=end_token))


def test_one_beam_is_greedy_in_seq2seq(seq2seq: Seq2Seq) -> None:
    sources = draw()
    found = seq2seq.beam_search(sources, 24, num_beams=1, end_token=END)
    assert_equal([x[0].tokens for x in found], seq2seq.generate(sources, 24, end_token=END))


@pytest.mark.parametrize("length_penalty", [0.0, 1.0, 2.0])
def test_beams_are_scored_by_their_log_probabilities(gpt: GPT, length_penalty: float) -> None:
    prompts = draw()
    options = {"num_beams": 5, "length_penalty": length_penalty, "end_token": END}
    for prompt, hypotheses in zip(prompts, gpt.beam_search(prompts, 8, **options)):
        assert len(hypotheses) == 5
        assert len({tuple(x.tokens.tolist()) for x in hypotheses}) == 5
        scores = [x.score for x in hypotheses]
        assert scores == sorted(scores, reverse=True)
        for tokens, found in hypotheses:
            assert torch.equal(tokens[: len(prompt)], prompt)
            assert END not in tokens[len(prompt) : -1]
            assert len(tokens) == len(prompt) + 8 or tokens[-1] == END
            assert found == pytest.approx(score(gpt, tokens, len(prompt), length_penalty), rel=1e-4)


@torch.no_grad()
def plain_beam_search(gpt: GPT, prompt: Tensor, count: int, num_beams: int, end: int) -> list[tuple[list[int], float]]:
    """The same search of one prompt, written with lists and without a cache."""
    living, ended = [(prompt.tolist(), 0.0)], []
    for length in range(1, count + 1):
        grown = []
        for tokens, total in living:
            following = gpt(torch.tensor([tokens]))[0, -1].log_softmax(-1).tolist()
            grown += [([*tokens, token], total + value) for token, value in enumerate(following)]
        grown.sort(key=lambda x: -x[1])
        ended += [(tokens, total / length) for tokens, total in grown[:num_beams] if tokens[-1] == end]
        if len(ended) >= num_beams:
            return sorted(ended[:num_beams], key=lambda x: -x[1])
        living = [x for x in grown if x[0][-1] != end][:num_beams]
    ended += [(tokens, total / count) for tokens, total in living]
    return sorted(ended, key=lambda x: -x[1])[:num_beams]


@pytest.mark.parametrize("num_beams", [2, 4])
def test_beam_search_is_the_plain_one(gpt: GPT, num_beams: int) -> None:
    prompts = draw((7, 2, 11, 7, 3, 5))
    living = torch.cat([x.tokens[-8:] for found in gpt.beam_search(prompts, 8, num_beams=num_beams) for x in found])
    ends = []
    for end in living.bincount().topk(4).indices.tolist():  # which beams choose more and less often
        found = gpt.beam_search(prompts, 8, num_beams=num_beams, end_token=end)
        for prompt, hypotheses in zip(prompts, found):
            expected = plain_beam_search(gpt, prompt, 8, num_beams, end)
            assert [x.tokens.tolist() for x in hypotheses] == [tokens for tokens, _ in expected]
            assert [x.score for x in hypotheses] == pytest.approx([score for _, score in expected], rel=1e-4)
            ends += [tokens[-1] == end for tokens, _ in expected]
    assert any(ends) and not all(ends)


def test_enough_beams_find_the_best_of_all() -> None:
    """As many beams as there are sequences: the best of all, by trying each."""
    gpt = randomised(GPT(GPTConfig(**SIZES | {"vocab_size": 4})))
    prompt = torch.tensor([1, 2])
    found = gpt.beam_search([prompt], 3, num_beams=64, length_penalty=0.0)[0]
    every = [torch.cat((prompt, torch.tensor(x))) for x in itertools.product(range(4), repeat=3)]
    expected = sorted(((score(gpt, x, 2, 0.0), x.tolist()) for x in every), reverse=True)
    assert [x.tokens.tolist() for x in found] == [tokens for _, tokens in expected]


def test_wider_beams_find_likelier_sequences(gpt: GPT) -> None:
    prompts = draw((5,) * 8)
    best = [[x[0].score for x in gpt.beam_search(prompts, 10, num_beams=n)] for n in (1, 8)]
    assert sum(best[1]) > sum(best[0])


def test_beams_of_both_caches_agree(gpt: GPT, seq2seq: Seq2Seq) -> None:
    for model in (gpt, seq2seq):
        prompts, options = draw(), {"num_beams": 4, "end_token": END}
        contiguous, paged = (model.beam_search(prompts, 12, paged=paged, **options) for paged in (False, True))
        for a, b in zip(contiguous, paged, strict=True):
            assert_equal([x.tokens for x in a], [x.tokens for x in b])
            assert [x.score for x in a] == pytest.approx([x.score for x in b], rel=1e-4)
            assert isinstance(a[0], Hypothesis)
