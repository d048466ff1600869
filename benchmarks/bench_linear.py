"""linear: the products of a generated token, of 1 and of 8 sequences, and those of a training step's projections."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
import torch.nn.functional as torch_functional
from torch import Tensor

from fastformer import functional, reference
from fastformer.ops.linear import FEW_ROWS

from .harness import FORWARD, Case, Work
from .work import of_training

# (rows, columns of the weight, rows of the weight); for a GPU there is no kernel of ours
SHAPES = {"cpu": [(1, 4096, 4096), (8, 768, 3072), (1024, 768, 768)]}  # Llama 3 8B; GPT-2 small; one of its sequences
MORE_SHAPES = {
    "cpu": [
        # GPT-2 small's feed-forward layer and unembedding
        (1, 768, 3072),
        (1, 3072, 768),
        (8, 3072, 768),
        (1, 768, 50257),
        (8, 768, 50257),
        (1, 4096, 14336),  # Llama 3 8B's feed-forward layer
        (1024, 768, 2304),  # GPT-2 small's query, key and value of one sequence
        (128, 4096, 4096),  # Llama 3 8B
    ]
}


def cases(device: torch.device, dtype: torch.dtype, suite: str) -> Iterator[Case]:
    """The cases of this operation on a kind of device, those of the quick suite first."""
    for shape in SHAPES[device.type] + (MORE_SHAPES[device.type] if suite != "quick" else []):
        yield _case(*shape, device, dtype)


def _case(rows: int, columns: int, outputs: int, device: torch.device, dtype: torch.dtype) -> Case:
    few = rows <= FEW_ROWS  # one generates
    return Case(
        operation="linear",
        shape=f"{rows}x{columns}x{outputs}",
        dtype=dtype,
        inputs=partial(_inputs, rows, columns, outputs, device, dtype, requires_grad=not few),
        ours=functional.linear,
        reference=reference.linear,
        peers={"eager": torch_functional.linear},
        work=_work(rows, columns, outputs, dtype, training=not few),
        compiled="eager" if few else None,  # of many rows it is the same product of a library's
        sizes={"rows": rows, "columns": columns, "outputs": outputs},
    )


def _inputs(
    rows: int, columns: int, outputs: int, device: torch.device, dtype: torch.dtype, *, requires_grad: bool
) -> dict[str, Tensor]:
    draw = partial(torch.randn, device=device, dtype=dtype, requires_grad=requires_grad)
    return {"input": draw(rows, columns), "weight": draw(outputs, columns), "bias": draw(outputs)}


def _work(rows: int, columns: int, outputs: int, dtype: torch.dtype, *, training: bool) -> dict[str, Work]:
    # input, weight and bias read, the output written
    arguments, output = rows * columns + outputs * columns, rows * outputs
    flops = 2 * rows * columns * outputs  # 2 a term
    forward = Work((arguments + outputs + output) * dtype.itemsize, flops, reads=not training)
    if not training:
        return {FORWARD: forward}
    # grad_output, input and weight read, gradients of input, weight and bias written; two products
    return of_training(forward, Work((2 * arguments + outputs + output) * dtype.itemsize, 2 * flops))
