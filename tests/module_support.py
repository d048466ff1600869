"""What the tests of the modules share: a module of ours beside torch's, and their comparison."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from fastformer import accuracy, nn
from fastformer.accelerate import FASTER

#: The classes that stand in for torch.nn's.
MODULES = sorted(kind.__name__ for kind in FASTER)

DEVICES = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
on_devices = pytest.mark.parametrize("device", DEVICES)

B, L, S, E, H = 2, 5, 7, 20, 4  # batch, queries or targets, keys or sources, width, heads


def close(ours: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(ours, theirs, rtol=2e-5, atol=2e-5)


def twins(name: str, *args: Any, **kwargs: Any) -> tuple[torch.nn.Module, torch.nn.Module]:
    """Our module ``name`` and torch's of equal parameters; see build_twins."""
    return build_twins(lambda library: getattr(library, name)(*args, **kwargs))


def build_twins(build: Callable[[ModuleType], torch.nn.Module]) -> tuple[torch.nn.Module, torch.nn.Module]:
    """``build`` of fastformer.nn and of torch.nn, from one seed: equal parameters, and each loads the other's."""
    torch.manual_seed(0)
    theirs, after_theirs = build(torch.nn), torch.get_rng_state()
    torch.manual_seed(0)
    ours, after_ours = build(nn), torch.get_rng_state()
    assert torch.equal(after_ours, after_theirs)  # as much was drawn
    for (name, mine), reference in zip(ours.named_modules(), theirs.modules(), strict=True):
        faster = getattr(nn, type(mine).__name__, None)
        assert faster is None or type(mine) is faster, name
        assert isinstance(mine, type(reference)) and mine.training == reference.training, name
    mine, reference = ours.state_dict(), theirs.state_dict()
    assert list(mine) == list(reference)
    assert all(torch.equal(mine[key], reference[key]) for key in mine)
    with torch.no_grad():  # no vector of ones or zeros
        for parameter in theirs.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    copy.deepcopy(theirs).load_state_dict(ours.state_dict(), strict=True)
    return ours, theirs


def run(
    module: torch.nn.Module, inputs: Sequence[Tensor], options: dict[str, Any]
) -> tuple[list[Tensor], list[Tensor | None]]:
    """(outputs, gradients of inputs, parameters and masks that want them) for a cotangent that depends on shapes alone.

    ``inputs`` that are the same tensor stay the same tensor; those that are no floating-point tensors get no gradient.
    """
    leaves = {id(x): x.detach().clone().requires_grad_(x.is_floating_point()) for x in inputs}
    outputs = module(*(leaves[id(x)] for x in inputs), **options)
    outputs = [outputs] if isinstance(outputs, Tensor) else [y for y in outputs if y is not None]
    generator = torch.Generator().manual_seed(1)
    cotangents = [torch.randn(y.shape, generator=generator).bfloat16().to(y) for y in outputs]
    wanted = [x for x in (*leaves.values(), *module.parameters(), *options.values()) if _wants_gradient(x)]
    return outputs, list(torch.autograd.grad(outputs, wanted, cotangents, allow_unused=True))


def _wants_gradient(x: object) -> bool:
    return isinstance(x, Tensor) and x.requires_grad


def compare(
    ours: torch.nn.Module,
    theirs: torch.nn.Module,
    inputs: Sequence[Tensor],
    check: Callable[[Tensor, Tensor], None] = close,
    **options: Any,
) -> None:
    """Equal outputs, and equal gradients of inputs, parameters and masks that want them."""
    for mine, reference in zip(run(ours, inputs, options), run(theirs, inputs, options), strict=True):
        for a, b in zip(mine, reference, strict=True):
            assert (a is None) == (b is None)
            if a is not None:
                assert a.dtype == b.dtype
                check(a, b)


def judge(ours: torch.nn.Module, theirs: torch.nn.Module, inputs: Sequence[Tensor], **options: Any) -> None:
    """The error rule on outputs and gradients; the reference is torch's module in float64."""
    exact = copy.deepcopy(theirs).double()
    mine, peer = run(ours, inputs, options), run(theirs, inputs, options)
    doubled = {id(x): _double(x) for x in (*inputs, *options.values())}
    truth = run(exact, [doubled[id(x)] for x in inputs], {name: doubled[id(x)] for name, x in options.items()})
    for factor, triples in zip(
        (accuracy.FORWARD_FACTOR, accuracy.GRADIENT_FACTOR), zip(mine, peer, truth, strict=True)
    ):
        for i, (a, b, c) in enumerate(zip(*triples, strict=True)):
            assert a.dtype == b.dtype
            verdict = accuracy.judge(a, b, c, factor=factor)
            assert verdict.ok, f"{'output' if factor == accuracy.FORWARD_FACTOR else 'gradient'} {i}: {verdict}"


def _double(value: Any) -> Any:
    floating = isinstance(value, Tensor) and value.is_floating_point()
    return value.detach().double().requires_grad_(value.requires_grad) if floating else value


def causal_mask(length: int) -> Tensor:
    """[length, length], 0 where a query may attend and -inf elsewhere."""
    return torch.nn.Transformer.generate_square_subsequent_mask(length)


def padding_mask(length: int, *lengths: int) -> Tensor:
    """[batch, length], True from each sequence's length on."""
    return torch.arange(length) >= torch.tensor(lengths).unsqueeze(1)


def added(mask: Tensor) -> Tensor:
    """A boolean mask as one that is added to the scores."""
    return torch.zeros(mask.shape).masked_fill(mask, -torch.inf)
