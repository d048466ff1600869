"""softmax: rows of activations, scaled causal attention scores, a vocabulary of logits."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
import torch.nn.functional as torch_functional
from torch import Tensor

from fastformer import functional, reference

from .harness import FORWARD, TRAINING, Case, Work

PLAIN_SHAPES = {"cpu": [(4096, 768), (256, 50257)], "cuda": [(32768, 4096), (4096, 50257)]}
MORE_SHAPES = [(16384, 384), (1024, 768), (512, 4096), (64, 768), (8, 768)]
CAUSAL_SHAPES = {"cpu": [(12, 512, 512)], "cuda": [(64, 2048, 2048)]}  # (heads, query, key)


def cases(device: torch.device, dtype: torch.dtype) -> Iterator[Case]:
    """The cases of this operation on a kind of device."""
    for index, shape in enumerate(PLAIN_SHAPES[device.type]):
        yield _plain(shape, device, dtype, compiled=index == 0)
    for shape in CAUSAL_SHAPES[device.type]:
        heads, seqlen_q, seqlen_k = shape
        scale = 64**-0.5  # of head_dim 64
        visible = reference.causal_mask(seqlen_q, seqlen_k, device=device)
        yield Case(
            operation="softmax",
            shape=f"{heads}x{seqlen_q}x{seqlen_k} causal",
            dtype=dtype,
            inputs=partial(_inputs, shape, device, dtype),
            ours=partial(functional.softmax, dim=-1, scale=scale, is_causal=True),
            reference=partial(reference.softmax, scale=scale, is_causal=True),
            peers={"eager": partial(_causal, visible=visible, scale=scale)},
            work=_work(shape, dtype),
            compiled="eager",
        )


def more_cases(device: torch.device, dtype: torch.dtype) -> Iterator[Case]:
    """Of the CPU's suite."""
    for shape in MORE_SHAPES:
        yield _plain(shape, device, dtype)


def _plain(shape: tuple[int, int], device: torch.device, dtype: torch.dtype, *, compiled: bool = False) -> Case:
    return Case(
        operation="softmax",
        shape=f"{shape[0]}x{shape[1]}",
        dtype=dtype,
        inputs=partial(_inputs, shape, device, dtype),
        ours=partial(functional.softmax, dim=-1),
        reference=reference.softmax,
        peers={"eager": partial(torch_functional.softmax, dim=-1)},
        work=_work(shape, dtype),
        compiled="eager" if compiled else None,
        rows=shape[0],
        few=(lambda rows: _inputs((rows, shape[1]), device, dtype)) if device.type == "cpu" else None,
    )


def _inputs(shape: tuple[int, ...], device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
    return {"input": torch.randn(shape, device=device, dtype=dtype, requires_grad=True)}


def _causal(input: Tensor, visible: Tensor, scale: float) -> Tensor:
    return torch_functional.softmax((input * scale).masked_fill(~visible, -torch.inf), dim=-1)


def _work(shape: tuple[int, ...], dtype: torch.dtype) -> dict[str, Work]:
    elements = torch.Size(shape).numel()
    return {
        # input read, output written; max, subtract, exp, sum, divide
        FORWARD: Work(bytes=2 * elements * dtype.itemsize, flops=5 * elements),
        # and: grad_output and output read, grad_input written; dot product (2), subtract, multiply
        TRAINING: Work(bytes=5 * elements * dtype.itemsize, flops=9 * elements),
    }
