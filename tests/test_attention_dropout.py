"""Which weights attention's dropout keeps, how often, and that it leaves the expected value alone."""

import math
from collections.abc import Callable

import pytest
import torch
from attention_support import (
    TARGETS,
    Case,
    attend,
    check_case,
    composed,
    drawing,
    exact,
    inputs,
    on_fast_kernels,
    on_kernels,
    on_targets,
)
from support import Target, check, tensor
from torch import Tensor

import fastformer
import fastformer.functional as F
from fastformer import reference

OUR_TARGETS = [target for target in TARGETS if target.backend != "torch"]


def kept_by(
    target: Target, p: float, batch: int, heads: int, seqlen_q: int, seqlen_k: int, **options: object
) -> Tensor:
    """The kernel's own mask: equal scores, and values that tell the keys apart."""
    query, key = (tensor(target, batch, heads, n, 4) * 0 for n in (seqlen_q, seqlen_k))
    value = torch.eye(seqlen_k, dtype=target.dtype, device=target.device).expand(batch, heads, -1, -1)
    with fastformer.backend(target.backend):
        return F.scaled_dot_product_attention(query, key, value, dropout_p=p, **options) != 0


@on_kernels
@pytest.mark.parametrize("state", [(0, 0), (-1, -1), (2**63 - 1, 2**32 + 5), (-(2**63), 2**31)])
@pytest.mark.parametrize("p", [1e-9, 0.5, 0.999])
def test_the_mask_is_the_references(target: Target, p: float, state: tuple[int, int]) -> None:
    """To the bit, also where seed or offset fill their words, and beyond one tile of keys."""
    sizes = (2, 2, 5, 9) if target.slow else (2, 3, 70, 203)
    words = torch.tensor(state)
    with drawing(words):
        kept = kept_by(target, p, *sizes)
    assert torch.equal(kept.cpu(), reference.dropout_mask(words, p, *sizes))


@on_kernels
def test_neither_window_nor_tiles_change_the_mask(target: Target) -> None:
    sizes = (1, 2, 7, 20) if target.slow else (1, 2, 170, 256)
    words, window = torch.tensor([12, 3]), {"window": (9, 3), "causal_alignment": "bottom_right"}
    with drawing(words):
        kept = kept_by(target, 0.4, *sizes, **window)
    seen = reference.window_mask(*sizes[2:], 9, 3, bottom_right=True)
    assert torch.equal(kept.cpu(), reference.dropout_mask(words, 0.4, *sizes) & seen)


def test_our_backends_draw_one_mask_from_torchs_generator() -> None:
    """From equal seeds; and another one in the next call."""
    masks = {}
    for target in OUR_TARGETS:
        if target.device == "cpu" and target.dtype == torch.float32:
            torch.manual_seed(3)
            masks[target.backend] = [kept_by(target, 0.5, 1, 2, 8, 8) for _ in range(2)]
    for first, second in masks.values():
        assert torch.equal(first, masks["reference"][0]) and torch.equal(second, masks["reference"][1])
        assert not torch.equal(first, second)


@pytest.mark.parametrize("target", [target for target in OUR_TARGETS if target.device == "cpu"], ids=str)
def test_equal_seeds_give_what_the_reference_gives(target: Target) -> None:
    """Without a patched generator, forward and backward."""
    query, key, value = inputs(target, 1, 4, 2, 20, 24, 8, 8)
    torch.manual_seed(3)
    state = torch.randint(2**62, (2,))
    options = {"dropout_p": 0.5, "is_causal": True, "return_lse": False}

    def ours(*tensors: Tensor) -> Tensor:
        torch.manual_seed(3)
        return attend(*tensors, **options)

    def drawn(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda *tensors: function(*tensors, dropout_state=state, **options)

    check(target, ours, drawn(composed), drawn(exact), (query, key, value))


@pytest.mark.parametrize("target", [t for t in TARGETS if t.backend == "torch"], ids=str)
def test_torchs_backend_keeps_torchs_bits(target: Target) -> None:
    query, key, value = inputs(target, 1, 2, 2, 16, 16, 8, 8)
    torch.manual_seed(3)
    with fastformer.backend("torch"):
        ours = F.scaled_dot_product_attention(query, key, value, dropout_p=0.5)
    torch.manual_seed(3)
    theirs = torch.nn.functional.scaled_dot_product_attention(query, key, value, dropout_p=0.5)
    assert torch.equal(ours, theirs)


@on_fast_kernels
@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_it_keeps_one_minus_p_of_all_weights(target: Target, p: float) -> None:
    """Within five standard deviations in all, and of each row, column and place among four neighbours."""
    with drawing(torch.tensor([2026, 11])):
        kept = kept_by(target, p, 2, 4, 128, 200).double()
    spread = math.sqrt(p * (1 - p))
    assert abs(kept.mean() - (1 - p)) < 5 * spread / math.sqrt(kept.numel())
    for dim in (2, 3):
        rate = kept.mean(dim)
        assert (rate - (1 - p)).abs().max() < 5 * spread / math.sqrt(kept.shape[dim])
    for place in range(4):
        found = kept[..., place::4]
        assert abs(found.mean() - (1 - p)) < 5 * spread / math.sqrt(found.numel())
    neighbours = ((kept[..., 1:] - (1 - p)) * (kept[..., :-1] - (1 - p))).mean()  # nothing in common
    assert abs(neighbours) < 5 * spread**2 / math.sqrt(kept.numel())


@on_fast_kernels
def test_the_expected_output_is_that_without_dropout(target: Target) -> None:
    """The mean of many calls, within five standard deviations of such a mean."""
    calls, options = 400, {"enable_gqa": True, "is_causal": True}
    query, key, value = inputs(target, 1, 2, 1, 12, 16, 8, 8)
    with fastformer.backend(target.backend):
        draws = [F.scaled_dot_product_attention(query, key, value, dropout_p=0.3, **options) for _ in range(calls)]
    outputs = torch.stack(draws).double()
    error = (outputs.mean(0) - exact(query, key, value, is_causal=True, return_lse=False)).abs()
    rounding = 4 * torch.finfo(target.dtype).eps * value.abs().max()
    assert (error <= 5 * outputs.std(0) / math.sqrt(calls) + rounding).all()


@on_kernels
@pytest.mark.parametrize("p", [1e-12, 0.99])
def test_extreme_probabilities(target: Target, p: float) -> None:
    check_case(target, Case(seqlen_q=8, seqlen_k=12, dropout_p=p, return_lse=False))


def test_a_sink_is_never_dropped() -> None:
    """With one key the output is 0 or twice the value's share, which the sink halves when the scores are equal."""
    zeros = torch.zeros(1, 1, 1000, 8)
    value = torch.ones(1, 1, 1, 8)
    out = F.scaled_dot_product_attention(zeros, zeros[:, :, :1], value, dropout_p=0.5, sinks=torch.zeros(1))
    assert set(out.unique().tolist()) == {0.0, 1.0}


@on_kernels
def test_the_lse_is_that_without_dropout(target: Target) -> None:
    query, key, value = inputs(target, 1, 2, 1, 12, 16, 8, 8)
    with fastformer.backend(target.backend):
        options = {"enable_gqa": True, "is_causal": True, "return_lse": True}
        _, lse = F.scaled_dot_product_attention(query, key, value, dropout_p=0.5, **options)
        assert torch.equal(lse, F.scaled_dot_product_attention(query, key, value, **options)[1])


@pytest.mark.parametrize("p", [0.0, 1.0])
@on_targets
def test_nothing_and_everything_dropped(target: Target, p: float) -> None:
    x = tensor(target, 1, 2, 5, 8).requires_grad_()
    with fastformer.backend(target.backend):
        output, lse = F.scaled_dot_product_attention(x, x, x, dropout_p=p, is_causal=True, return_lse=True)
        plain, plain_lse = F.scaled_dot_product_attention(x, x, x, is_causal=True, return_lse=True)
        torch.testing.assert_close(output, plain * (1 - p))
        assert torch.equal(lse, plain_lse)
        (grad,) = torch.autograd.grad(output.sum(), x)
        torch.testing.assert_close(grad, torch.autograd.grad(plain.sum(), x)[0] * (1 - p))
