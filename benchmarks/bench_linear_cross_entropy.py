"""linear_cross_entropy: the unembedding and the loss, with a small vocabulary and with those of known models."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
import torch.nn.functional as torch_functional
from torch import Tensor

from fastformer import functional, reference

from . import peers
from .harness import FORWARD, TRAINING, Case, Function, Work

SHAPES = {  # (rows, columns, vocabulary)
    "cpu": [(1024, 384, 4096), (256, 768, 50257)],  # nanoGPT's size; GPT-2 small
    "cuda": [(8192, 768, 50257), (4096, 4096, 128256)],  # GPT-2 small; Llama 3 8B
}
MORE_SHAPES = {
    "cpu": [(256, 768, 30522)],  # BERT base: the masked words of 4 x 512 tokens
    "cuda": [(2560, 768, 30522), (8192, 2048, 128256)],  # likewise, of 32 x 512 tokens; Llama 3.2 1B
}
# About 30 times its eager form.
TOO_SLOW = "takes seconds a call on a CPU with so large a vocabulary"


def cases(device: torch.device, dtype: torch.dtype, suite: str) -> Iterator[Case]:
    """The cases of this operation on a kind of device, those of the quick suite first."""
    shapes = SHAPES[device.type] + (MORE_SHAPES[device.type] if suite != "quick" else [])
    for index, (rows, columns, vocabulary) in enumerate(shapes):
        yield Case(
            operation="linear_cross_entropy",
            shape=f"{rows}x{columns}x{vocabulary}",
            dtype=dtype,
            inputs=partial(_inputs, rows, columns, vocabulary, device, dtype),
            ours=functional.linear_cross_entropy,
            reference=_reference,
            peers={
                "eager": _eager,
                "chunked": _chunked_or_reason(vocabulary, device),
                **peers.optional("linear_cross_entropy", device, dtype),
            },
            work=_work(rows, columns, vocabulary, dtype),
            compiled="eager" if index == 0 or suite != "quick" else None,
            sizes={"rows": rows, "columns": columns, "vocabulary": vocabulary},
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


def _chunked_or_reason(vocabulary: int, device: torch.device) -> Function | str:
    if not hasattr(torch_functional, "linear_cross_entropy"):
        return "torch has it from 2.13 on"
    return TOO_SLOW if device.type == "cpu" and vocabulary > 10_000 else _chunked


def _chunked(input: Tensor, linear_weight: Tensor, target: Tensor) -> Tensor:
    """torch's own, which never holds all the logits when it is given options."""
    options = torch.nn.LinearCrossEntropyOptions()
    return torch_functional.linear_cross_entropy(input, linear_weight, target, options=options)


def _work(rows: int, columns: int, vocabulary: int, dtype: torch.dtype) -> dict[str, Work]:
    """No backward pass alone: what never holds all the logits computes the gradients in the forward pass, and has no
    more left to do than a multiplication."""
    # one product, 2 FLOPs a term; input and weight read; the logits stay in cache
    arguments = (rows + vocabulary) * columns * dtype.itemsize
    flops = 2 * rows * columns * vocabulary
    return {
        FORWARD: Work(bytes=arguments, flops=flops),
        # and two more products from the same logits; gradients of input and weight written
        TRAINING: Work(bytes=2 * arguments, flops=3 * flops),
    }
