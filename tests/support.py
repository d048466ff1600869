"""What the tests of the operations share: the targets they run on, and the comparison by the error rule."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

import fastformer
from fastformer import accuracy, backends

Function = Callable[..., "Tensor | tuple[Tensor, ...]"]


@dataclass(frozen=True)
class Target:
    """A backend on a device in a dtype."""

    backend: str
    device: str
    dtype: torch.dtype

    def __str__(self) -> str:
        return f"{self.backend}-{self.device}-{str(self.dtype).removeprefix('torch.')}"

    @property
    def slow(self) -> bool:
        """Triton's interpreter, or the emulator of the CUDA C++ kernels: only small tensors."""
        return self.backend in ("triton", "cuda") and self.device == "cpu"


def _targets() -> list[Target]:
    every = (torch.float32, torch.bfloat16, torch.float16)
    found = [Target("reference", "cpu", torch.float32)]
    found += [Target("torch", "cpu", dtype) for dtype in every]
    if backends.CPU_LIBRARY:
        found += [Target("cpu", "cpu", dtype) for dtype in every]
    if torch.cuda.is_available():
        found += [Target("torch", "cuda", dtype) for dtype in every]
        found += [Target("triton", "cuda", dtype) for dtype in every]
    elif backends.TRITON_INTERPRETED:  # which gets bfloat16 products wrong
        found += [Target("triton", "cpu", dtype) for dtype in (torch.float32, torch.float16)]
    return found


TARGETS = _targets()
#: The targets that run our own kernels.
KERNEL_TARGETS = [target for target in TARGETS if target.backend not in ("torch", "reference")]

#: The backend to ask for where ``auto`` would leave small CPU tensors to torch.
KERNEL = "cpu" if backends.CPU_LIBRARY else "torch"

#: Marks what tests the C++ kernels.
needs_library = pytest.mark.skipif(not backends.CPU_LIBRARY, reason="built without a C++ compiler")

on_targets = pytest.mark.parametrize("target", TARGETS, ids=str)
on_kernels = pytest.mark.parametrize("target", KERNEL_TARGETS, ids=str)


def tensor(target: Target, *shape: int, scale: float = 1.0) -> Tensor:
    """Normally distributed values."""
    return (torch.randn(*shape) * scale).to(target.dtype).to(target.device)


def check(
    target: Target,
    ours: Function,
    peer: Function,
    exact: Function,
    inputs: Sequence[Tensor | None],
    *,
    grad: bool = True,
    sums: Callable[[list[Tensor]], dict[int, Tensor]] | None = None,
) -> None:
    """Judge ``ours(*inputs)`` and its gradients under the target's backend.

    ``peer`` is torch's own way in the same dtype; ``exact`` gets the inputs in float64. A cotangent is drawn for every
    output. Outputs must have one shape in all three and, in ours, the dtype of the peer's.

    ``sums``: from the cotangents, for gradients of few elements that are sums of many terms, their place among the
    gradients and the greatest sum of absolute terms. Such sums cancel, and torch's error in a few of them is a matter
    of luck: two ulp of what was added up are allowed.
    """
    sizes: dict[int, Tensor] = {}

    def run(function: Function, double: bool) -> tuple[list[Tensor], list[Tensor]]:
        leaves = [_leaf(x, double, grad) for x in inputs]
        outputs = function(*leaves)
        outputs = [outputs] if isinstance(outputs, Tensor) else list(outputs)
        if not grad:
            return outputs, []
        generator = torch.Generator().manual_seed(1)
        cotangents = [torch.randn(y.shape, generator=generator).to(target.dtype).to(y) for y in outputs]
        if double and sums is not None:
            sizes.update(sums(cotangents))
        wanted = [x for x in leaves if x is not None and x.requires_grad]
        return outputs, list(torch.autograd.grad(outputs, wanted, cotangents, allow_unused=True))

    with fastformer.backend(target.backend):
        mine, my_grads = run(ours, double=False)
    with fastformer.backend("torch"):
        theirs, their_grads = run(peer, double=False)
    truth, true_grads = run(exact, double=True)
    for i, (a, b, c) in enumerate(zip(mine, theirs, truth, strict=True)):
        assert a.dtype == b.dtype, f"output {i}: dtype {a.dtype}, torch's {b.dtype}"
        _pass(accuracy.judge(a, b, c, factor=accuracy.FORWARD_FACTOR), f"output {i}")
    for i, (a, b, c) in enumerate(zip(my_grads, their_grads, true_grads, strict=True)):
        assert (a is None) == (c is None), f"gradient {i} is {a}, the reference's {c}"
        if a is not None:
            if i in sizes:  # in one row with that size, whose ulp then counts
                a, b, c = (torch.cat((x.flatten(), sizes[i].to(a.dtype).to(x).view(1))) for x in (a, b, c))
            _pass(accuracy.judge(a, b, c, factor=accuracy.GRADIENT_FACTOR), f"gradient {i}")


class RuleBroken(AssertionError):
    """The error rule is broken; ``excess`` is the error in units of what is allowed."""

    def __init__(self, verdict: accuracy.Verdict, name: str) -> None:
        super().__init__(f"{name}: {verdict}")
        self.excess = verdict.share


def _pass(verdict: accuracy.Verdict, name: str) -> None:
    if not verdict.ok:
        raise RuleBroken(verdict, name)


def _leaf(x: Tensor | None, double: bool, grad: bool) -> Tensor | None:
    """A fresh leaf with the values, strides and offset of ``x``; what is no floating-point tensor, as it is."""
    if not isinstance(x, Tensor) or not x.dtype.is_floating_point:
        return x
    leaf = x.detach().double() if double else x.detach().view_as(x)
    return leaf.requires_grad_(grad)


def awkward(target: Target, *shape: int, scale: float = 1.0) -> Tensor:
    """Values in a tensor that is not contiguous and starts inside its storage, its last stride 2."""
    wide = tensor(target, *shape[:-1], 2 * shape[-1] + 1, scale=scale)
    return wide[..., 1::2]


LAYOUTS = ("contiguous", "awkward", "transposed", "expanded")


def laid_out(target: Target, layout: str, *shape: int) -> Tensor:
    """Values in one of LAYOUTS: as ``awkward``, the last two dimensions swapped in memory, or the first of stride 0."""
    if layout == "awkward":
        return awkward(target, *shape)
    if layout == "transposed":
        return tensor(target, *shape[:-2], shape[-1], shape[-2]).transpose(-1, -2)
    if layout == "expanded":
        return tensor(target, 1, *shape[1:]).expand(shape)
    return tensor(target, *shape)
