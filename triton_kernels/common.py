"""What several kernel files share: how tensors become rows, and how large a grid should be.

Launch inside ``with torch.cuda.device_of(tensor)``, so that a tensor on another GPU than the current one works; on the
CPU, under Triton's interpreter, it does nothing.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

# Stands in for a GPU's multiprocessors under the interpreter: more than one, so that partial results get combined.
INTERPRETER_MULTIPROCESSORS = 3


def unit_stride(x: Tensor) -> Tensor:
    """``x``, copied only where neighbours in its last dimension are not neighbours in memory."""
    return x if x.shape[-1] == 1 or x.stride(-1) == 1 else x.contiguous()


def as_rows(x: Tensor) -> Tensor:
    """``x`` [..., C], not empty, as [N, C] of unit stride: a view where one exists, whatever the stride of its rows."""
    return unit_stride(x.reshape(-1, x.shape[-1]))


def multiprocessors(x: Tensor) -> int:
    """How many multiprocessors the device of ``x`` has."""
    if not x.is_cuda:
        return INTERPRETER_MULTIPROCESSORS
    return torch.cuda.get_device_properties(x.device).multi_processor_count


def power_of_two(n: int) -> int:
    """The smallest power of two that is at least ``n``: the extent of a block that holds n elements."""
    return triton.next_power_of_2(n)


@triton.jit
def finite_peak(peak):
    """A row's maximum, or 0 where it is -inf (every column masked): exp(scores - peak) is then 0 there, never NaN."""
    return tl.where(peak == float("-inf"), 0.0, peak)
