"""The targets of the operations that have CUDA C++ kernels: those of ``support``, and these kernels.

Without a GPU they are executed on CPU tensors by the emulator of tests/simt, which is built here, at the first import.
"""

from __future__ import annotations

import pytest
import simt
import support
import torch
from support import Target

from fastformer import backends, library
from fastformer.ops import _common

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def _emulate() -> bool:
    """Make the emulated kernels those of the backend ``cuda`` on CPU tensors, if there is a compiler for them."""
    if simt.compiler() is None:
        return False
    simt.load()
    for schema in library.schemas():
        name = schema.split("(")[0]
        if name.rpartition("_")[0] in backends.CUDA_OPERATIONS:
            _common.offer(name, "CPU", "cuda", getattr(torch.ops.fastformer_simt, name).default)
    backends.CUDA_DEVICES.add("cpu")
    return True


def _cuda_targets() -> list[Target]:
    if torch.cuda.is_available():
        return [Target("cuda", "cuda", dtype) for dtype in DTYPES] if backends.CUDA_LIBRARY else []
    return [Target("cuda", "cpu", dtype) for dtype in DTYPES] if _emulate() else []


CUDA_TARGETS = _cuda_targets()
TARGETS = support.TARGETS + CUDA_TARGETS
KERNEL_TARGETS = support.KERNEL_TARGETS + CUDA_TARGETS

on_targets = pytest.mark.parametrize("target", TARGETS, ids=str)
on_kernels = pytest.mark.parametrize("target", KERNEL_TARGETS, ids=str)
