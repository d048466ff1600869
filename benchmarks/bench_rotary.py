"""rotary: position embeddings of query and key, at a small GPT's sizes and at those of Llama 3 (8 key heads).

Query and key lie in memory as a model's projection leaves them: the heads of a position side by side.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from fastformer import functional, reference

from . import peers
from .bench_attention import head_counts
from .harness import Case, Work
from .work import of_training

SHAPES = {  # (batch, query heads, key heads, length, head_dim)
    "cpu": [(4, 6, 6, 256, 64), (1, 32, 8, 1024, 128)],  # nanoGPT's; Llama 3 8B
    "cuda": [(16, 12, 12, 1024, 64), (4, 32, 8, 8192, 128)],
}
MORE_SHAPES = {
    "cpu": [(1, 32, 8, 4096, 128), (2, 32, 8, 1024, 64)],  # Llama 3 8B; Llama 3.2 1B
    "cuda": [(1, 32, 8, 2048, 128), (4, 32, 8, 8192, 64)],
}


def cases(device: torch.device, dtype: torch.dtype, suite: str) -> Iterator[Case]:
    """The cases of this operation on a kind of device, those of the quick suite first."""
    shapes = SHAPES[device.type] + (MORE_SHAPES[device.type] if suite != "quick" else [])
    for index, (batch, heads, kv_heads, length, head_dim) in enumerate(shapes):
        yield Case(
            operation="rotary",
            shape=f"{batch}x{head_counts(heads, kv_heads)}x{length}x{head_dim}",
            dtype=dtype,
            inputs=partial(_inputs, batch, heads, kv_heads, length, head_dim, device, dtype),
            ours=functional.rotary,
            reference=reference.rotary,
            peers={"eager": _eager, **peers.optional("rotary", device, dtype)},
            work=_work(batch * (heads + kv_heads) * length * head_dim, dtype),
            compiled="eager" if index == 1 or suite != "quick" else None,
            sizes={"batch": batch, "heads": heads, "kv_heads": kv_heads, "length": length, "head_dim": head_dim},
            in_place=("liger",),
        )


def _inputs(
    batch: int, heads: int, kv_heads: int, length: int, head_dim: int, device: torch.device, dtype: torch.dtype
) -> dict[str, Tensor]:
    def draw(heads: int) -> Tensor:
        """[batch, heads, length, head_dim], a view."""
        drawn = torch.randn(batch, length, heads, head_dim, device=device, dtype=dtype)
        return drawn.transpose(1, 2).requires_grad_()

    frequencies = 10000.0 ** -(torch.arange(0, head_dim, 2, device=device) / head_dim)
    angles = torch.arange(length, device=device).unsqueeze(-1) * frequencies  # [length, head_dim / 2]
    return {
        "query": draw(heads),
        "key": draw(kv_heads),
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


def _work(elements: int, dtype: torch.dtype) -> dict[str, Work]:
    """``elements``: of query and key. cos and sin are not counted: all heads share them."""
    # query and key read and written; two multiplications and a sum for each element; their gradients likewise
    once = Work(bytes=2 * elements * dtype.itemsize, flops=3 * elements)
    return of_training(once, once)
