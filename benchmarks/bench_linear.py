"""linear: the products of a generated token, of 1 and of 8 sequences, and those of a training step's projections."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
import torch.nn.functional as torch_functional
from torch import Tensor

from fastformer import functional, reference
from fastformer.ops.linear import FEW_ROWS

from .harness import FORWARD, TRAINING, Case, Work

SHAPES = {  # (rows, columns of the weight, rows of the weight)
    "cpu": [(1, 4096, 4096), (8, 768, 3072), (1024, 768, 768)],
    "cuda": [(8, 4096, 4096), (8192, 4096, 4096)],
}
MORE_SHAPES = [(1, 768, 3072), (1, 3072, 768), (8, 3072, 768), (1, 768, 50257), (8, 768, 50257)]


def cases(device: torch.device, dtype: torch.dtype) -> Iterator[Case]:
    """The cases of this operation on a kind of device."""
    yield from (_case(*shape, device, dtype) for shape in SHAPES[device.type])


def more_cases(device: torch.device, dtype: torch.dtype) -> Iterator[Case]:
    """A small GPT's feed-forward layer and unembedding."""
    yield from (_case(*shape, device, dtype) for shape in MORE_SHAPES)


def _case(rows: int, cols: int, outputs: int, device: torch.device, dtype: torch.dtype) -> Case:
    few = rows <= FEW_ROWS  # one generates
    return Case(
        operation="linear",
        shape=f"{rows}x{cols}x{outputs}",
        dtype=dtype,
        inputs=partial(_inputs, rows, cols, outputs, device, dtype, not few),
        ours=functional.linear,
        reference=reference.linear,
        peers={"eager": torch_functional.linear},
        work=_work(rows, cols, outputs, dtype, not few),
        compiled="eager" if few else None,
    )


def _inputs(
    rows: int, cols: int, outputs: int, device: torch.device, dtype: torch.dtype, training: bool
) -> dict[str, Tensor]:
    make = partial(torch.randn, device=device, dtype=dtype, requires_grad=training)
    return {"input": make(rows, cols), "weight": make(outputs, cols), "bias": make(outputs)}


def _work(rows: int, cols: int, outputs: int, dtype: torch.dtype, training: bool) -> dict[str, Work]:
    # input, weight and bias read, the output written
    size = (rows * cols + outputs * (cols + 1) + rows * outputs) * dtype.itemsize
    flops = 2 * rows * cols * outputs
    work = {FORWARD: Work(bytes=size, flops=flops, reads=not training)}
    if training:
        # and the gradients of all of them; two products more
        work[TRAINING] = Work(bytes=2 * size, flops=3 * flops)
    return work
