"""rotary: position embeddings of query and key, at a small GPT's sizes and Llama 3 8B's (8 key heads)."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from fastformer import functional, reference

from .harness import FORWARD, TRAINING, Case, Work

SHAPES = {  # (batch, query heads, key heads, length, head_dim)
    "cpu": [(4, 6, 6, 256, 64), (1, 32, 8, 1024, 128)],
    "cuda": [(16, 12, 12, 1024, 64), (4, 32, 8, 8192, 128)],
}


def cases(device: torch.device, dtype: torch.dtype) -> Iterator[Case]:
    """The cases of this operation on a kind of device."""
    for index, (batch, heads, key_heads, length, head_dim) in enumerate(SHAPES[device.type]):
        yield Case(
            operation="rotary",
            shape=f"{batch}x{heads}/{key_heads}x{length}x{head_dim}",
            dtype=dtype,
            inputs=partial(_inputs, batch, heads, key_heads, length, head_dim, device, dtype),
            ours=functional.rotary,
            reference=reference.rotary,
            peers={"eager": _eager},
            work=_work(batch, heads + key_heads, length, head_dim, dtype),
            compiled="eager" if index == 1 else None,
        )


def _inputs(
    batch: int, heads: int, key_heads: int, length: int, head_dim: int, device: torch.device, dtype: torch.dtype
) -> dict[str, Tensor]:
    frequencies = 10000.0 ** -(torch.arange(0, head_dim, 2, device=device) / head_dim)
    angles = torch.arange(length, device=device).unsqueeze(-1) * frequencies  # [length, head_dim / 2]
    return {
        "query": torch.randn(batch, heads, length, head_dim, device=device, dtype=dtype, requires_grad=True),
        "key": torch.randn(batch, key_heads, length, head_dim, device=device, dtype=dtype, requires_grad=True),
        "cos": angles.cos().to(dtype),
        "sin": angles.sin().to(dtype),
    }


def _eager(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """As Hugging Face's models do it: the halves swapped, one negated."""
    cos, sin = torch.cat((cos, cos), -1), torch.cat((sin, sin), -1)

    def rotate(x: Tensor) -> Tensor:
        first, second = x.chunk(2, dim=-1)
        return x * cos + torch.cat((-second, first), dim=-1) * sin

    return rotate(query), rotate(key)


def _work(batch: int, heads: int, length: int, head_dim: int, dtype: torch.dtype) -> dict[str, Work]:
    elements = batch * heads * length * head_dim
    return {
        # query and key read and written; two multiplications and a sum for each element
        FORWARD: Work(bytes=2 * elements * dtype.itemsize, flops=3 * elements),
        # and their gradients read and written
        TRAINING: Work(bytes=4 * elements * dtype.itemsize, flops=6 * elements),
    }
