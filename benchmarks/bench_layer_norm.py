"""layer_norm, rms_norm and the residual forms, which add first, at the widths of GPT-2, BERT, ViT-B and Llama 3 8B."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
import torch.nn.functional as torch_functional
from torch import Tensor

from fastformer import functional, reference

from . import peers
from .harness import Case, Function, Work
from .work import of_training

EPS = 1e-5
SHAPES = {  # (rows, columns)
    "layer_norm": {"cpu": [(4096, 768), (1024, 384)], "cuda": [(32768, 768), (16384, 4096)]},  # BERT: 8 x 512 tokens
    "rms_norm": {"cpu": [(1024, 4096)], "cuda": [(16384, 4096)]},  # Llama 3 8B
    "add_layer_norm": {"cpu": [(4096, 768)], "cuda": [(32768, 768)]},
}
MORE_SHAPES = {
    "layer_norm": {
        # 16384: GPT-2, 16 x 1024 tokens; 3152, 12608: ViT-B/16, 16 and 64 x 197
        "cpu": [(16384, 768), (3152, 768), (1024, 1024), (64, 768), (8, 768)],
        "cuda": [(12608, 768), (64, 768)],
    },
    "rms_norm": {"cpu": [(4096, 768), (64, 4096)], "cuda": [(64, 4096)]},
    "add_layer_norm": {
        "cpu": [(16384, 768), (3152, 768), (1024, 384), (1024, 1024), (64, 768), (8, 768)],
        "cuda": [(12608, 768), (16384, 4096)],
    },
    "add_rms_norm": {"cpu": [(1024, 4096), (64, 4096)], "cuda": [(16384, 4096), (64, 4096)]},  # Llama 3 8B
}


def cases(device: torch.device, dtype: torch.dtype, suite: str) -> Iterator[Case]:
    """The cases of these operations on a kind of device, those of the quick suite first."""
    for operation, shapes in SHAPES.items():
        for index, shape in enumerate(shapes[device.type]):
            yield _case(operation, *shape, device, dtype, compiled=index == 0 or suite != "quick")
    if suite != "quick":
        for operation, shapes in MORE_SHAPES.items():
            for shape in shapes[device.type]:
                yield _case(operation, *shape, device, dtype, compiled=True)


def _case(operation: str, rows: int, columns: int, device: torch.device, dtype: torch.dtype, *, compiled: bool) -> Case:
    settings = {"normalized_shape": (columns,), "eps": EPS}
    rms, add = "rms_norm" in operation, operation.startswith("add_")
    norm = torch_functional.rms_norm if rms else torch_functional.layer_norm
    return Case(
        operation=operation,
        shape=f"{rows}x{columns}",
        dtype=dtype,
        inputs=partial(_inputs, rows, columns, device, dtype, rms=rms, add=add),
        ours=partial(getattr(functional, operation), **settings),
        reference=partial(_reference, rms=rms),
        peers={
            "eager": partial(add_and_norm, norm, **settings) if add else partial(norm, **settings),
            **peers.optional(operation, device, dtype, eps=EPS),
        },
        work=_work(rows * columns, dtype, rms=rms, add=add),
        compiled="eager" if compiled else None,
        rows=rows,
        few=(lambda few: _inputs(few, columns, device, dtype, rms=rms, add=add)) if device.type == "cpu" else None,
        sizes={"rows": rows, "columns": columns},
    )


def _inputs(
    rows: int, columns: int, device: torch.device, dtype: torch.dtype, *, rms: bool, add: bool
) -> dict[str, Tensor]:
    draw = partial(torch.randn, device=device, dtype=dtype, requires_grad=True)
    inputs = {"input": draw(rows, columns)}
    if add:
        inputs["residual"] = draw(rows, columns)
    inputs["weight"] = draw(columns)
    if not rms:
        inputs["bias"] = draw(columns)
    return inputs


def add_and_norm(
    norm: Function, input: Tensor, residual: Tensor, **parameters: Tensor | tuple[int, ...] | float
) -> tuple[Tensor, Tensor]:
    """torch's norm of ``input + residual``, and that sum."""
    summed = input + residual
    return norm(summed, **parameters), summed


def _reference(
    input: Tensor, weight: Tensor, bias: Tensor | None = None, residual: Tensor | None = None, *, rms: bool
) -> Tensor | tuple[Tensor, Tensor]:
    normed, summed = reference.layer_norm(input, residual, weight, bias, eps=EPS, rms=rms)
    return normed if residual is None else (normed, summed)


def _work(elements: int, dtype: torch.dtype, *, rms: bool, add: bool) -> dict[str, Work]:
    # weight, bias, their gradients and the statistics are not counted: a row's share of them is nothing
    return of_training(
        # input (and residual) read, output (and the sum) written; square, sum, scale, weight, in a layer_norm mean,
        # subtract (2) and bias (and the sum)
        Work(bytes=(4 if add else 2) * elements * dtype.itemsize, flops=((4 if rms else 8) + add) * elements),
        # grad_output (and the sum's gradient) and the input (or sum) read, grad_input written, which is the residual's
        # too; for each of grad_input, grad_weight and in a layer_norm grad_bias a sum, and what is scaled and summed
        Work(bytes=(4 if add else 3) * elements * dtype.itemsize, flops=((10 if rms else 14) + add) * elements),
    )
