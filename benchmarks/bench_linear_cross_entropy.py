"""linear_cross_entropy: the unembedding and the loss, with a small trained vocabulary and with GPT-2's."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
import torch.nn.functional as torch_functional
from torch import Tensor

from fastformer import functional, reference

from .harness import FORWARD, TRAINING, Case, Work

SHAPES = {  # (rows, columns, vocabulary)
    "cpu": [(1024, 384, 4096), (256, 768, 50257)],
    "cuda": [(8192, 768, 50257), (8192, 4096, 128256)],
}
# About 30 times its eager form.
TOO_SLOW = "torch's linear_cross_entropy in chunks takes seconds a call on a CPU with so large a vocabulary"


def cases(device: torch.device, dtype: torch.dtype) -> Iterator[Case]:
    """The cases of this operation on a kind of device."""
    for index, (rows, columns, vocabulary) in enumerate(SHAPES[device.type]):
        yield Case(
            operation="linear_cross_entropy",
            shape=f"{rows}x{columns}x{vocabulary}",
            dtype=dtype,
            inputs=partial(_inputs, rows, columns, vocabulary, device, dtype),
            ours=functional.linear_cross_entropy,
            reference=_reference,
            peers={"eager": _eager, "fused": TOO_SLOW if device.type == "cpu" and vocabulary > 10_000 else _chunked},
            work=_work(rows, columns, vocabulary, dtype),
            compiled="eager" if index == 0 else None,
        )


def _inputs(rows: int, columns: int, vocabulary: int, device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
    weight = columns**-0.5 * torch.randn(vocabulary, columns, device=device, dtype=dtype)  # logits of order one
    return {
        "input": torch.randn(rows, columns, device=device, dtype=dtype, requires_grad=True),
        "linear_weight": weight.requires_grad_(),
        "target": torch.randint(vocabulary, (rows,), device=device),
    }


def _reference(input: Tensor, linear_weight: Tensor, target: Tensor) -> Tensor:
    return reference.linear_cross_entropy(input, linear_weight, None, target)[0].mean()


def _eager(input: Tensor, linear_weight: Tensor, target: Tensor) -> Tensor:
    return torch_functional.cross_entropy(torch_functional.linear(input, linear_weight), target)


def _chunked(input: Tensor, linear_weight: Tensor, target: Tensor) -> Tensor:
    """torch's own (2.13 and later), which never holds all the logits when it is given options."""
    options = torch.nn.LinearCrossEntropyOptions()
    return torch_functional.linear_cross_entropy(input, linear_weight, target, options=options)


def _work(rows: int, columns: int, vocabulary: int, dtype: torch.dtype) -> dict[str, Work]:
    # one product, 2 FLOPs a term; input and weight read; the logits stay in cache
    forward = (rows + vocabulary) * columns * dtype.itemsize
    flops = 2 * rows * columns * vocabulary
    return {
        FORWARD: Work(bytes=forward, flops=flops),
        # and two more products from the same logits; gradients of input and weight written
        TRAINING: Work(bytes=2 * forward, flops=3 * flops),
    }
