"""layer_norm, rms_norm and the fused residual form add_layer_norm, at the widths of GPT-2, BERT and Llama 3 8B."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
import torch.nn.functional as torch_functional
from torch import Tensor

from fastformer import functional, reference

from .harness import FORWARD, TRAINING, Case, Work

EPS = 1e-5
SHAPES = {  # (rows, columns)
    "layer_norm": {"cpu": [(4096, 768), (1024, 384)], "cuda": [(32768, 768), (16384, 4096)]},
    "rms_norm": {"cpu": [(1024, 4096)], "cuda": [(16384, 4096)]},
    "add_layer_norm": {"cpu": [(4096, 768)], "cuda": [(32768, 768)]},
}


MORE_SHAPES = {
    "layer_norm": [(16384, 768), (1024, 1024), (64, 768), (8, 768)],
    "rms_norm": [(4096, 768), (64, 4096)],
    "add_layer_norm": [(16384, 768), (1024, 384), (1024, 1024), (64, 768), (8, 768)],
}


def cases(device: torch.device, dtype: torch.dtype) -> Iterator[Case]:
    """The cases of this operation on a kind of device."""
    for operation, shapes in SHAPES.items():
        for index, shape in enumerate(shapes[device.type]):
            yield _case(operation, *shape, device, dtype, compiled=index == 0)


def more_cases(device: torch.device, dtype: torch.dtype) -> Iterator[Case]:
    """Of the CPU's suite."""
    for operation, shapes in MORE_SHAPES.items():
        for shape in shapes:
            yield _case(operation, *shape, device, dtype)


def _case(
    operation: str, rows: int, columns: int, device: torch.device, dtype: torch.dtype, *, compiled: bool = False
) -> Case:
    settings = {"normalized_shape": (columns,), "eps": EPS}
    rms, add = operation == "rms_norm", operation == "add_layer_norm"
    return Case(
        operation=operation,
        shape=f"{rows}x{columns}",
        dtype=dtype,
        inputs=partial(_inputs, rows, columns, device, dtype, rms=rms, add=add),
        ours=partial(getattr(functional, operation), **settings),
        reference=partial(_reference, rms=rms),
        peers={"eager": partial(_add_layer_norm if add else getattr(torch_functional, operation), **settings)},
        work=_work(rows, columns, dtype, add=add),
        compiled="eager" if compiled else None,
        rows=rows,
        few=(lambda few: _inputs(few, columns, device, dtype, rms=rms, add=add)) if device.type == "cpu" else None,
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


def _add_layer_norm(
    input: Tensor, residual: Tensor, normalized_shape: tuple[int, ...], weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    summed = input + residual
    return torch_functional.layer_norm(summed, normalized_shape, weight, bias, eps), summed


def _reference(
    input: Tensor, weight: Tensor, bias: Tensor | None = None, residual: Tensor | None = None, *, rms: bool
) -> Tensor | tuple[Tensor, Tensor]:
    normed, summed = reference.layer_norm(input, residual, weight, bias, eps=EPS, rms=rms)
    return normed if residual is None else (normed, summed)


def _work(rows: int, columns: int, dtype: torch.dtype, *, add: bool) -> dict[str, Work]:
    elements = rows * columns
    # weight, bias and the statistics are not counted: a row's share of them is nothing
    # input (and residual) read, output (and the sum) written
    forward = 4 if add else 2
    # and: grad_output (and the sum's gradient) and input read, grad_input written (the residual's gradient is the same)
    backward = 4 if add else 3
    return {
        # mean, subtract, square, sum, scale, weight, bias
        FORWARD: Work(bytes=forward * elements * dtype.itemsize, flops=8 * elements),
        # and two dot products and three scaled sums for grad_input, grad_weight, grad_bias
        TRAINING: Work(bytes=(forward + backward) * elements * dtype.itemsize, flops=22 * elements),
    }
