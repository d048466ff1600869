"""Cases that must fail, to show that the check can."""

from __future__ import annotations

import triton
import triton.language as tl

from fastformer.triton_kernels import softmax

from . import Case
from .softmax import row_case


@triton.jit
def _transpose(input, output, SIDE: tl.constexpr):
    first, second = tl.arange(0, SIDE)[:, None], tl.arange(0, SIDE)[None, :]
    tl.store(output + second * SIDE + first, tl.load(input + first * SIDE + second))


def cases(target) -> list[Case]:
    """Too much shared memory, too many registers, and no program at all."""
    pointers = {"input": "*fp32", "output": "*fp32"}
    rows = {"grad_output": "*fp32", "output": "*fp32", "grad_input": "*fp32", "scale": "fp32"}
    return [
        row_case("shared", _transpose, pointers, {"SIDE": 256}, 16),
        row_case("spills", softmax._backward, rows, {"ROWS": 1, "BLOCK": 16384}, 1),
        row_case("does not compile", _transpose, pointers, {"SIDE": 3}, 4),
    ]
