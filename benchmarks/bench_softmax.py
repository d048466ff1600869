"""softmax: rows of activations, attention scores, a vocabulary of logits."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
import torch.nn.functional as torch_functional
from torch import Tensor

from fastformer import functional, reference

from . import peers
from .harness import Case, Work
from .work import of_training

ROWS = {  # (rows, columns)
    "cpu": [(4096, 768), (256, 50257)],  # GPT-2's width and vocabulary
    "cuda": [(32768, 4096), (4096, 50257)],
}
MORE_ROWS = {
    "cpu": [
        (16384, 384),
        (1024, 768),
        (512, 4096),
        (64, 768),
        (8, 768),
        (6144, 512),  # BERT base: scores of 12 heads, 512 tokens
        (2364, 197),  # ViT-B/16: of 12 heads, 196 patches and the class token
        (64, 128256),  # Llama 3: logits
    ],
    "cuda": [(196608, 512), (151296, 197), (4096, 128256), (64, 768)],  # BERT, batch 32; ViT-B, batch 64; Llama 3
}
# Scores of causal attention, (heads of all sequences, length); GPT-2 small has 12 heads and 1024 positions.
CAUSAL = {"cpu": [(12, 512)], "cuda": [(64, 2048)]}
MORE_CAUSAL = {"cpu": [(12, 1024)], "cuda": [(96, 1024)]}
HEAD_DIM = 64


def cases(device: torch.device, dtype: torch.dtype, suite: str) -> Iterator[Case]:
    """The cases of this operation on a kind of device, those of the quick suite first."""
    for index, shape in enumerate(ROWS[device.type]):
        yield _rows(*shape, device, dtype, compiled=index == 0 or suite != "quick")
    for shape in CAUSAL[device.type]:
        yield _causal(*shape, device, dtype)
    if suite != "quick":
        for shape in MORE_ROWS[device.type]:
            yield _rows(*shape, device, dtype, compiled=True)
        for shape in MORE_CAUSAL[device.type]:
            yield _causal(*shape, device, dtype)


def _rows(rows: int, columns: int, device: torch.device, dtype: torch.dtype, *, compiled: bool) -> Case:
    return Case(
        operation="softmax",
        shape=f"{rows}x{columns}",
        dtype=dtype,
        inputs=partial(_inputs, (rows, columns), device, dtype),
        ours=partial(functional.softmax, dim=-1),
        reference=reference.softmax,
        peers={
            "eager": partial(torch_functional.softmax, dim=-1),
            **peers.optional("softmax", device, dtype),
        },
        work=_work(rows * columns, rows * columns, dtype),
        compiled="eager" if compiled else None,
        rows=rows,
        few=(lambda few: _inputs((few, columns), device, dtype)) if device.type == "cpu" else None,
        sizes={"rows": rows, "columns": columns},
    )


def _causal(heads: int, length: int, device: torch.device, dtype: torch.dtype) -> Case:
    scale = HEAD_DIM**-0.5
    visible = reference.causal_mask(length, length, device=device)
    return Case(
        operation="softmax",
        shape=f"{heads}x{length}x{length} causal",
        dtype=dtype,
        inputs=partial(_inputs, (heads, length, length), device, dtype),
        ours=partial(functional.softmax, dim=-1, scale=scale, is_causal=True),
        reference=partial(reference.softmax, scale=scale, is_causal=True),
        peers={"eager": partial(_eager_causal, visible=visible, scale=scale)},
        work=_work(heads * length * length, heads * length * (length + 1) // 2, dtype),
        compiled="eager",
        sizes={"heads": heads, "length": length},
    )


def _inputs(shape: tuple[int, ...], device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
    return {"input": torch.randn(shape, device=device, dtype=dtype, requires_grad=True)}


def _eager_causal(input: Tensor, visible: Tensor, scale: float) -> Tensor:
    return torch_functional.softmax((input * scale).masked_fill(~visible, -torch.inf), dim=-1)


def _work(elements: int, visible: int, dtype: torch.dtype) -> dict[str, Work]:
    """``visible``: how many of the elements are not masked. Zeros are written where they are, nothing is read."""
    return of_training(
        # input read, output written; max, subtract, exp, sum, divide
        Work(bytes=(visible + elements) * dtype.itemsize, flops=5 * visible),
        # grad_output and output read, grad_input written; dot product (2), subtract, multiply
        Work(bytes=(2 * visible + elements) * dtype.itemsize, flops=4 * visible),
    )
