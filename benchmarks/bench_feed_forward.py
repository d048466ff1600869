"""feed_forward: GPT-2's (gelu, four times as wide) and a gated one (SwiGLU)."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
import torch.nn.functional as torch_functional
from torch import Tensor

from fastformer import functional, reference

from .harness import FORWARD, TRAINING, Case, Work

SHAPES = {  # (rows, columns, hidden, activation, gated)
    "cpu": [(1024, 384, 1536, "gelu", False), (2048, 768, 3072, "gelu", False), (1024, 768, 2048, "silu", True)],
    "cuda": [(16384, 768, 3072, "gelu", False), (8192, 4096, 16384, "gelu", False), (8192, 4096, 14336, "silu", True)],
}
MORE_SHAPES = [  # of the CPU's suite
    (4096, 768, 3072, "gelu", False),
    (4096, 768, 3072, "gelu_tanh", False),
    (256, 768, 3072, "gelu", False),
    (512, 1024, 4096, "relu", False),
]
TORCH_ACTIVATIONS = {
    "gelu": torch_functional.gelu,
    "gelu_tanh": partial(torch_functional.gelu, approximate="tanh"),
    "silu": torch_functional.silu,
    "relu": torch_functional.relu,
}


def cases(device: torch.device, dtype: torch.dtype) -> Iterator[Case]:
    """The cases of this operation on a kind of device."""
    for index, shape in enumerate(SHAPES[device.type]):
        yield _case(*shape, device, dtype, compiled=index == 1)


def more_cases(device: torch.device, dtype: torch.dtype) -> Iterator[Case]:
    """Of the CPU's suite."""
    for shape in MORE_SHAPES:
        yield _case(*shape, device, dtype)


def _case(
    rows: int,
    columns: int,
    hidden: int,
    activation: str,
    gated: bool,
    device: torch.device,
    dtype: torch.dtype,
    *,
    compiled: bool = False,
) -> Case:
    return Case(
        operation="feed_forward",
        shape=f"{rows}x{columns}x{hidden} {'swiglu' if gated else activation}",
        dtype=dtype,
        inputs=partial(_inputs, rows, columns, hidden, device, dtype, gated=gated),
        ours=partial(functional.feed_forward, activation=activation),
        reference=partial(reference.feed_forward, activation=activation),
        peers={"eager": partial(_eager, activation=activation)},
        work=_work(rows, columns, hidden, dtype, products=3 if gated else 2),
        compiled="eager" if compiled else None,
    )


def _inputs(
    rows: int, columns: int, hidden: int, device: torch.device, dtype: torch.dtype, *, gated: bool
) -> dict[str, Tensor]:
    def draw(*shape: int, scale: float = 1.0) -> Tensor:
        return (scale * torch.randn(shape, device=device, dtype=dtype)).requires_grad_()

    # weights scaled so that every activation is of order one
    inputs = {
        "input": draw(rows, columns),
        "weight1": draw(hidden, columns, scale=columns**-0.5),
        "bias1": draw(hidden),
        "weight2": draw(columns, hidden, scale=hidden**-0.5),
        "bias2": draw(columns),
    }
    if gated:
        inputs["weight_gate"] = draw(hidden, columns, scale=columns**-0.5)
    return inputs


def _eager(
    input: Tensor,
    weight1: Tensor,
    bias1: Tensor,
    weight2: Tensor,
    bias2: Tensor,
    weight_gate: Tensor | None = None,
    *,
    activation: str,
) -> Tensor:
    hidden = torch_functional.linear(input, weight1, bias1)
    act = TORCH_ACTIVATIONS[activation]
    hidden = act(hidden) if weight_gate is None else act(torch_functional.linear(input, weight_gate)) * hidden
    return torch_functional.linear(hidden, weight2, bias2)


def _work(rows: int, columns: int, hidden: int, dtype: torch.dtype, *, products: int) -> dict[str, Work]:
    # each product reads its weight matrix and takes 2 FLOPs a term; input read, output written; the hidden layer stays
    weights = products * columns * hidden
    forward_bytes = weights + 2 * rows * columns
    # and backward, two products for each of forward's: weights read, their gradients written, the saved hidden layer
    # written and read, grad_output and input read, grad_input written
    backward_bytes = 2 * weights + 2 * (products - 1) * rows * hidden + 3 * rows * columns
    return {
        FORWARD: Work(bytes=forward_bytes * dtype.itemsize, flops=2 * rows * weights),
        TRAINING: Work(bytes=(forward_bytes + backward_bytes) * dtype.itemsize, flops=3 * 2 * rows * weights),
    }
