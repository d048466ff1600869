"""Attention over long sequences and extreme scores: the error rule, and rounding without a bias."""

import math
from collections.abc import Callable

import pytest
import torch
from attention_support import FAST_TARGETS, attend, exact, inputs, on_fast_kernels, on_kernels
from support import Target, check, tensor
from torch import Tensor

import fastformer
import fastformer.functional as F
from fastformer import accuracy

Window = tuple[int, int] | None


def by_chunks(
    attention: Callable[..., Tensor], tensors: list[Tensor], cotangent: Tensor, window: Window
) -> list[Tensor]:
    """Output and gradients of causal attention, a few queries at a time, which keeps memory small.

    The last query of a chunk is level with the last key it may see: causal_alignment is bottom_right.
    """
    query, key, value = (x.detach().requires_grad_() for x in tensors)
    outputs, length, chunk = [], query.shape[2], 64
    for start in reversed(range(0, length, chunk)):  # the longest first: later ones fit where it was
        end = min(start + chunk, length)
        first = 0 if window is None else max(0, start - window[0])
        kwargs = {"is_causal": True, "causal_alignment": "bottom_right", "window": window, "return_lse": False}
        output = attention(query[:, :, start:end], key[:, :, first:end], value[:, :, first:end], **kwargs)
        output.backward(cotangent[:, :, start:end])
        outputs.append(output.detach())
    return [torch.cat(outputs[::-1], 2), query.grad, key.grad, value.grad]


@pytest.mark.parametrize("device", sorted({target.device for target in FAST_TARGETS}))
@pytest.mark.parametrize("window", [None, (300, 0)])
@pytest.mark.parametrize("length", [4096, 16384])
def test_error_rule(length: int, window: Window, device: str) -> None:
    """One truth for all dtypes: the values are bfloat16's."""
    low = [torch.randn(1, 1, length, 32).bfloat16() for _ in range(4)]
    truth = by_chunks(exact, [x.double() for x in low[:3]], low[3].double(), window)
    for target in FAST_TARGETS:
        if target.device != device or target.dtype == torch.float16:
            continue
        query, key, value, cotangent = (x.to(device, target.dtype) for x in low)
        leaves = [x.detach().requires_grad_() for x in (query, key, value)]
        with fastformer.backend(target.backend):
            output = F.scaled_dot_product_attention(*leaves, is_causal=True, window=window)
            mine = [output.detach(), *torch.autograd.grad(output, leaves, cotangent)]
        with fastformer.backend("torch"):
            theirs = by_chunks(attend, [query, key, value], cotangent, window)
        for i, arrays in enumerate(zip(mine, theirs, truth)):
            factor = accuracy.FORWARD_FACTOR if i == 0 else accuracy.GRADIENT_FACTOR
            verdict = accuracy.judge(*arrays, factor=factor)
            assert verdict.ok, f"{target}, {('output', 'query', 'key', 'value')[i]}: {verdict}"


@on_fast_kernels
@pytest.mark.parametrize("higher", [False, True], ids=["all keys alike", "one key above the others"])
@pytest.mark.parametrize("sign", [-1, 1])
def test_rounding_has_no_bias(target: Target, sign: int, higher: bool) -> None:
    """Many equal weights and values of one sign, where a bias adds up (arXiv 2510.04212): errors must cancel."""
    queries, keys = 2048, 300
    query = tensor(target, 1, 1, queries, 16)
    key = tensor(target, 1, 1, 1, 16).repeat(1, 1, keys, 1)
    if higher:  # in the rows with a positive score; then the others' weights are alike, and no power of two
        key[:, :, 0] *= 1.5
    value = sign * (0.5 + torch.rand(1, 1, keys, 16)).to(target.device, target.dtype)
    check(target, attend, attend, exact, (query, key, value), grad=False)
    if higher:  # else every row is the same: too few errors for their mean
        with fastformer.backend(target.backend):
            ours = F.scaled_dot_product_attention(query, key, value).double()
        error = ours - exact(query, key, value, return_lse=False)
        rms = error.square().mean().sqrt()
        assert error.mean().abs() < 0.15 * rms, f"mean {error.mean():.2e}, rms {rms:.2e}"


@on_kernels
@pytest.mark.parametrize("lengths", [(3, 700), (80, 300)], ids=str)
def test_scores_of_ten_thousand(target: Target, lengths: tuple[int, int]) -> None:
    """Both signs, and first the low ones: the running maximum climbs from -1e4 to 1e4."""
    queries, keys = (3, 40) if target.slow else lengths
    query = torch.full((1, 1, queries, 16), 50.0) + torch.randn(1, 1, queries, 16)
    climb = torch.linspace(-1, 1, keys).view(1, 1, keys, 1)
    key = climb * 50 + torch.randn(1, 1, keys, 16)
    query, key = (x.to(target.device, target.dtype) for x in (query, key))
    value = tensor(target, 1, 1, keys, 16)
    check(target, attend, attend, exact, (query, key, value), grad=False)
    leaves = [x.requires_grad_() for x in (query, key.flip(2), value)]  # and from the highest down
    with fastformer.backend(target.backend):
        output, lse = attend(*leaves)
        grads = torch.autograd.grad((output, lse), leaves, (torch.ones_like(output), torch.ones_like(lse)))
    assert lse.max() > 9e3
    assert all(x.isfinite().all() for x in (output, lse, *grads))


@on_kernels
@pytest.mark.parametrize("spread", [1, 30])
def test_one_key(target: Target, spread: int) -> None:
    """Its weight is 1: the output is its value, whatever the score, and query and key have no gradient."""
    queries = 20 if target.slow else 1500
    query, key, value = inputs(target, 1, 2, 1, queries, 1, 16, 8)
    query *= spread
    leaves = [x.detach().requires_grad_() for x in (query, key, value)]
    with fastformer.backend(target.backend):
        output, lse = attend(*leaves)
        grads = torch.autograd.grad(output.sum(), leaves)
    rounding = torch.finfo(target.dtype).eps
    torch.testing.assert_close(output, value.expand_as(output), rtol=2 * rounding, atol=0)
    check(target, attend, attend, exact, (query, key, value), grad=False)
    # The weight is computed again from the score and the lse, which has as large an error as float32's.
    error = 4 * torch.finfo(torch.float32).eps * max(1.0, lse.abs().max().item())
    assert (grads[2] / (2 * queries) - 1).abs().max() <= error + rounding
    assert grads[0].abs().max() <= 64 * (error + rounding)
    assert grads[1].abs().max() <= 64 * (error + rounding) * spread * queries


@on_kernels
@pytest.mark.parametrize("boolean", [False, True])
@pytest.mark.parametrize("lengths", [(60, 700), (4, 1100)], ids=str)
def test_rows_that_begin_or_are_hidden_throughout(target: Target, lengths: tuple[int, int], boolean: bool) -> None:
    """Blocks of -inf before the first key that a row sees, and rows that see none."""
    queries, keys = (6, 40) if target.slow else lengths
    first = torch.arange(queries).unsqueeze(1) * 397 % keys
    hidden = (torch.arange(keys) < first) | (torch.arange(queries) % 3 == 1).unsqueeze(1)
    hidden = hidden.to(target.device)
    added = torch.randn(queries, keys).to(target.device).masked_fill(hidden, -math.inf)
    mask = ~hidden if boolean else added
    query, key, value = inputs(target, 2, 2, 1, queries, keys, 16, 8)
    functions = [lambda *x, function=function: function(*x, mask) for function in (attend, attend, exact)]
    check(target, *functions, (query, key, value))
    with fastformer.backend(target.backend):
        output, lse = attend(query, key, value, mask)
    nothing = hidden.all(-1)
    assert nothing.any() and (output[:, :, nothing] == 0).all() and (lse[:, :, nothing] == -math.inf).all()
