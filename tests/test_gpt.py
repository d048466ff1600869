"""GPT: equal to a plain torch.nn GPT, and its cached generation equal to the full forward."""

from __future__ import annotations

import pytest
import torch
from support import needs_library
from torch import Tensor

import fastformer
from fastformer.benchmarks.plain_models import PlainGPT, sizes
from fastformer.models import GPT, GPTConfig
from fastformer.models.generation import Sampling

CONFIG = GPTConfig(vocab_size=61, context_length=16, num_layers=2, num_heads=2, d_model=32)


def random_tokens(batch: int, length: int, seed: int = 0) -> Tensor:
    return torch.randint(CONFIG.vocab_size, (batch, length), generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def model() -> GPT:
    torch.manual_seed(0)
    model = GPT(CONFIG)
    with torch.no_grad():  # larger than at the start of training, so that every part has a say in the logits
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return model


def plain_copy(model: GPT) -> torch.nn.Module:
    plain = PlainGPT(**sizes(model.config))
    plain.load_state_dict(model.state_dict(), strict=True)
    return plain


def assert_same(ours: Tensor, plain: Tensor) -> None:
    torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-5 * max(1.0, plain.detach().abs().max().item()))


@pytest.mark.parametrize("length", [1, 7, 16])
def test_equals_plain_gpt(model: GPT, length: int) -> None:
    plain = plain_copy(model)
    tokens, targets = random_tokens(3, length), random_tokens(3, length, seed=1)
    assert_same(model(tokens), plain(tokens))
    loss, plain_loss = model(tokens, targets), plain(tokens, targets)
    assert_same(loss, plain_loss)
    loss.backward()
    plain_loss.backward()
    plain_gradients = {name: p.grad for name, p in plain.named_parameters()}
    for name, parameter in model.named_parameters():
        assert_same(parameter.grad, plain_gradients.pop(name))
    assert not plain_gradients


def test_state_dict_loads_both_ways(model: GPT) -> None:
    plain = plain_copy(model)
    other = GPT(CONFIG)
    other.load_state_dict(plain.state_dict(), strict=True)
    tokens = random_tokens(2, 9)
    assert torch.equal(other(tokens), model(tokens))


def test_later_tokens_change_nothing_before_them(model: GPT) -> None:
    tokens = random_tokens(1, 12)
    changed = tokens.clone()
    changed[:, 8:] = (changed[:, 8:] + 1) % CONFIG.vocab_size
    before, after = model(tokens), model(changed)
    torch.testing.assert_close(before[:, :8], after[:, :8], rtol=1e-5, atol=1e-6)
    assert (before[:, 8:] - after[:, 8:]).abs().max() > 0.1


def test_ignored_targets_count_for_nothing(model: GPT) -> None:
    tokens, targets = random_tokens(2, 8), random_tokens(2, 8, seed=1)
    targets[1] = -100
    assert_same(model(tokens, targets), model(tokens[:1], targets[:1]))


@needs_library
def test_training_never_keeps_logits(model: GPT) -> None:
    tokens = random_tokens(2, 16)
    shapes: list[torch.Size] = []

    def pack(saved: Tensor) -> Tensor:
        shapes.append(saved.shape)
        return saved

    with fastformer.backend("cpu"), torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved):
        model(tokens, tokens)
    assert shapes
    assert not [shape for shape in shapes if shape[-1:] == (CONFIG.vocab_size,)]


@pytest.mark.parametrize("chunks", [[9], [1] * 9, [4, 1, 3, 1], [1, 8]])
def test_cache_gives_the_full_forward(model: GPT, chunks: list[int]) -> None:
    tokens = random_tokens(2, 9)
    cache = model.new_cache(2)
    with torch.no_grad():
        pieces = [model(piece, cache=cache) for piece in tokens.split(chunks, dim=1)]
        assert_same(torch.cat(pieces, dim=1), model(tokens))
    assert cache.length == 9


def test_cache_holds_keys_and_values_by_head(model: GPT) -> None:
    cache = model.new_cache(2)
    heads = CONFIG.num_heads
    new = [torch.randn(2, 2 * heads, count, CONFIG.head_dim) for count in (3, 1)]
    for keys_values in new:
        count = keys_values.shape[2]
        cache.place(torch.zeros(2, count, dtype=torch.int64))
        output = cache.attend(1, torch.randn(2, heads, count, CONFIG.head_dim), keys_values)
        cache.advance()
    assert cache.length == 4
    assert torch.equal(cache.keys_values[1][:, :, :4], torch.cat(new, dim=2))
    values = cache.keys_values[1][:, heads:, :4]
    assert output.shape == (2, heads, 1, CONFIG.head_dim)
    assert (output.amax(2) <= values.amax(2)).all()  # a mean of the values


@torch.no_grad()
def greedy_without_cache(model: GPT, tokens: Tensor, count: int) -> Tensor:
    window = tokens
    for _ in range(count):
        if window.shape[1] > CONFIG.context_length:
            window = window[:, -(CONFIG.context_length // 2) :]
        following = model(window)[:, -1].argmax(dim=-1, keepdim=True)
        tokens, window = (torch.cat((x, following), dim=1) for x in (tokens, window))
    return tokens


@pytest.mark.parametrize("batch", [1, 3])
def test_generation_equals_the_full_forward(model: GPT, batch: int) -> None:
    """Token for token, beyond the end of the context too."""
    prompt = random_tokens(batch, 5)
    generated = model.generate(prompt, 30, temperature=0)
    assert generated.shape == (batch, 35)
    assert torch.equal(generated, greedy_without_cache(model, prompt, 30))
    assert len(generated.unique()) > 3


def test_generation_takes_the_end_of_a_long_prompt(model: GPT) -> None:
    prompt = random_tokens(1, 40)
    generated = model.generate(prompt, 1, temperature=0)
    assert torch.equal(generated[:, :40], prompt)
    assert generated[0, 40] == model(prompt[:, -16:])[0, -1].argmax()


def test_generation_repeats_with_its_seed(model: GPT) -> None:
    prompt = random_tokens(2, 4)
    first, again, other = (
        model.generate(prompt, 10, generator=torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def frequencies(logits: Tensor, **options: float) -> Tensor:
    generator = torch.Generator().manual_seed(0) if options.get("temperature") != 0 else None
    drawn = Sampling(generator=generator, **options).draw(logits.expand(20_000, -1))
    return torch.bincount(drawn.flatten(), minlength=logits.shape[-1]) / len(drawn)


def test_sample_follows_the_distribution() -> None:
    probabilities = torch.tensor([0.1, 0.5, 0.15, 0.25])
    logits = probabilities.log()[None]

    def expected(kept: Tensor) -> Tensor:
        return kept / kept.sum()

    for options, kept in (
        ({}, probabilities),
        ({"temperature": 0.5}, probabilities**2),
        ({"top_k": 2}, torch.tensor([0.0, 0.5, 0.0, 0.25])),
        ({"top_k": 9}, probabilities),
        ({"top_p": 0.7}, torch.tensor([0.0, 0.5, 0.0, 0.25])),
        ({"top_p": 0.01}, torch.tensor([0.0, 1.0, 0.0, 0.0])),
        ({"top_p": 1.0}, probabilities),
        ({"top_k": 3, "top_p": 0.5}, torch.tensor([0.0, 1.0, 0.0, 0.0])),
        ({"top_k": 1}, torch.tensor([0.0, 1.0, 0.0, 0.0])),
        ({"temperature": 0}, torch.tensor([0.0, 1.0, 0.0, 0.0])),
        ({"temperature": 1e-45}, torch.tensor([0.0, 1.0, 0.0, 0.0])),
        ({"temperature": 5e-324}, torch.tensor([0.0, 1.0, 0.0, 0.0])),
    ):
        found = frequencies(logits, **options)
        torch.testing.assert_close(found, expected(kept), rtol=0, atol=0.015)
        assert torch.equal(found[kept == 0], torch.zeros(int((kept == 0).sum())))


def test_sample_draws_no_more_than_top_k_of_equal_ones() -> None:
    logits = torch.zeros(1, 50)
    logits[:, 7::13] = 5.0
    for top_k in (1, 2, 3):
        assert (frequencies(logits, top_k=top_k) > 0).sum() == top_k
    assert Sampling(top_k=1).draw(logits) == Sampling(temperature=0).draw(logits) == 7


def test_forward_refuses(model: GPT) -> None:
    with pytest.raises(ValueError, match="tokens end at position 17, must be at most context_length, 16"):
        model(random_tokens(1, 17))
    with pytest.raises(ValueError, match=r"tokens has shape \(3,\), must be \[B, S\]"):
        model(torch.zeros(3, dtype=torch.int64))
    with pytest.raises(TypeError, match=r"tokens has dtype torch\.float32, must be int64"):
        model(torch.zeros(1, 3))
    with pytest.raises(ValueError, match=r"targets has shape \(1, 4\), must be \(1, 3\)"):
        model(random_tokens(1, 3), random_tokens(1, 4))
    with pytest.raises(ValueError, match=r"tokens has shape \(1, 0\), must .* at least one"):
        model.generate(torch.zeros(1, 0, dtype=torch.int64), 3)


@pytest.mark.parametrize(
    ("sizes", "name"),
    [({"vocab_size": 0}, "vocab_size"), ({"context_length": 1}, "context_length"), ({"num_heads": 5}, "d_model")],
)
def test_config_refuses(sizes: dict[str, int], name: str) -> None:
    with pytest.raises(ValueError, match=f"^{name} is .*, must "):
        GPTConfig(**({"vocab_size": 8} | sizes))
