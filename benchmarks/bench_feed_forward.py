"""feed_forward: plain ones (gelu or relu, four times as wide) and gated ones (SwiGLU, GeGLU), which have no biases."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
import torch.nn.functional as torch_functional
from torch import Tensor

from fastformer import functional, reference

from . import peers
from .harness import Case, Work
from .work import of_training

# (rows, columns, hidden, activation, gated)
SHAPES = {
    # nanoGPT's; GPT-2 small's size, 2 x 1024 tokens
    "cpu": [(1024, 384, 1536, "gelu", False), (2048, 768, 3072, "gelu", False), (1024, 768, 2048, "silu", True)],
    # GPT-2 small's size, 16 x 1024 tokens; Llama 3 8B, 8192 tokens
    "cuda": [(16384, 768, 3072, "gelu", False), (8192, 4096, 16384, "gelu", False), (8192, 4096, 14336, "silu", True)],
}
MORE_SHAPES = {
    "cpu": [
        (4096, 768, 3072, "gelu", False),  # BERT base, 8 x 512 tokens
        (4096, 768, 3072, "gelu_tanh", False),  # GPT-2 small, 4 x 1024 tokens
        (3152, 768, 3072, "gelu", False),  # ViT-B/16, 16 x 197 patches
        (256, 768, 3072, "gelu", False),
        (512, 1024, 4096, "relu", False),
        (128, 2048, 8192, "silu", True),  # Llama 3.2 1B
    ],
    "cuda": [
        (16384, 768, 3072, "gelu_tanh", False),  # GPT-2 small, 16 x 1024 tokens
        (12608, 768, 3072, "gelu", False),  # ViT-B/16, 64 x 197 patches
        (8192, 2304, 9216, "gelu_tanh", True),  # Gemma 2 2B
        (64, 4096, 14336, "silu", True),  # Llama 3 8B, 64 generated tokens
    ],
}
COMPILED_IN_QUICK = 1  # the index of the shape that is
TORCH_ACTIVATIONS = {
    "gelu": torch_functional.gelu,
    "gelu_tanh": partial(torch_functional.gelu, approximate="tanh"),
    "silu": torch_functional.silu,
    "relu": torch_functional.relu,
}
GATED_NAMES = {"silu": "swiglu", "gelu_tanh": "geglu"}


def cases(device: torch.device, dtype: torch.dtype, suite: str) -> Iterator[Case]:
    """The cases of this operation on a kind of device, those of the quick suite first."""
    shapes = SHAPES[device.type] + (MORE_SHAPES[device.type] if suite != "quick" else [])
    for index, shape in enumerate(shapes):
        yield _case(*shape, device, dtype, compiled=index == COMPILED_IN_QUICK or suite != "quick")


def _case(
    rows: int,
    columns: int,
    hidden: int,
    activation: str,
    gated: bool,
    device: torch.device,
    dtype: torch.dtype,
    *,
    compiled: bool,
) -> Case:
    settings = {"activation": activation} | ({"bias1": None, "bias2": None} if gated else {})
    return Case(
        operation="feed_forward",
        shape=f"{rows}x{columns}x{hidden} {GATED_NAMES[activation] if gated else activation}",
        dtype=dtype,
        inputs=partial(_inputs, rows, columns, hidden, device, dtype, gated=gated),
        ours=partial(functional.feed_forward, **settings),
        reference=partial(reference.feed_forward, **settings),
        peers={
            "eager": partial(_eager, **settings),
            **peers.optional("feed_forward", device, dtype, activation=activation, gated=gated),
        },
        work=_work(rows, columns, hidden, dtype, gated=gated),
        compiled="eager" if compiled else None,
        sizes={"rows": rows, "columns": columns, "hidden": hidden},
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
        "weight2": draw(columns, hidden, scale=hidden**-0.5),
    }
    if gated:
        return inputs | {"weight_gate": draw(hidden, columns, scale=columns**-0.5)}
    return inputs | {"bias1": draw(hidden), "bias2": draw(columns)}


def _eager(
    input: Tensor,
    weight1: Tensor,
    bias1: Tensor | None,
    weight2: Tensor,
    bias2: Tensor | None,
    weight_gate: Tensor | None = None,
    *,
    activation: str,
) -> Tensor:
    hidden = torch_functional.linear(input, weight1, bias1)
    act = TORCH_ACTIVATIONS[activation]
    hidden = act(hidden) if weight_gate is None else act(torch_functional.linear(input, weight_gate)) * hidden
    return torch_functional.linear(hidden, weight2, bias2)


def _work(rows: int, columns: int, hidden: int, dtype: torch.dtype, *, gated: bool) -> dict[str, Work]:
    products = 3 if gated else 2
    weights, flops = products * columns * hidden, 2 * rows * products * columns * hidden  # 2 FLOPs a term
    # of a training step's forward pass: the hidden layer (and the gate) before the activation
    saved = (products - 1) * rows * hidden * dtype.itemsize
    return of_training(
        # each product reads its weight matrix; input read, output written; the hidden layer stays in caches
        Work(bytes=(weights + 2 * rows * columns) * dtype.itemsize, flops=flops),
        # two products for each of forward's: weights read, their gradients written; what was saved, grad_output and
        # input read, grad_input written
        Work(bytes=(2 * weights + 3 * rows * columns) * dtype.itemsize + saved, flops=2 * flops),
        saved=saved,
    )
