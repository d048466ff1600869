"""Sliding windows: attention whose cost should follow what is visible, from all of a long causal sequence down to 256
keys a query."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
import torch.nn.functional as torch_functional
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from fastformer import functional, reference

from .bench_attention import attention_inputs, attention_work
from .harness import Case

SHAPES = {"cpu": (1, 4, 8192, 64), "cuda": (2, 16, 16384, 128)}  # batch, heads, length, head_dim
WINDOWS = (None, 4096, 1024, 256)  # keys that a query sees, itself among them; None: all before it
CHUNK = 512  # queries of the reference at once, whose scores are in float64


def cases(device: torch.device, dtype: torch.dtype) -> Iterator[Case]:
    """The cases of this operation on a kind of device."""
    batch, heads, length, head_dim = SHAPES[device.type]
    for window in WINDOWS:
        keys = length if window is None else window
        visible = keys * (keys + 1) // 2 + (length - keys) * keys  # pairs of a head
        yield Case(
            operation="attention_window",
            shape=f"{length}x{head_dim} {'causal' if window is None else f'window {window}'}",
            dtype=dtype,
            inputs=partial(attention_inputs, batch, heads, length, length, head_dim, device, dtype),
            ours=partial(_ours, window=window),
            reference=partial(_reference, window=window),
            peers={"eager": "holds the scores of all pairs", "fused": partial(_torchs, window=window)},
            work=attention_work(batch, heads, length, head_dim, dtype, visible),
            judged_by="fused",
        )


def _ours(query: Tensor, key: Tensor, value: Tensor, *, window: int | None) -> Tensor:
    bounds = None if window is None else (window - 1, 0)
    return functional.scaled_dot_product_attention(query, key, value, is_causal=True, window=bounds)


def _torchs(query: Tensor, key: Tensor, value: Tensor, *, window: int | None) -> Tensor:
    """torch has no windows: a mask says what is visible."""
    if window is None:
        return torch_functional.scaled_dot_product_attention(query, key, value, is_causal=True)
    lengths = query.shape[2], key.shape[2]
    mask = reference.window_mask(*lengths, window - 1, 0, device=query.device)
    return torch_functional.scaled_dot_product_attention(query, key, value, mask)


def _reference(query: Tensor, key: Tensor, value: Tensor, *, window: int | None) -> Tensor:
    """By chunks of queries, computed once more for the gradients."""
    outputs = []
    for begin in range(0, query.shape[2], CHUNK):
        end = begin + CHUNK
        first = 0 if window is None else max(0, begin - window + 1)
        attend = partial(_reference_chunk, left=None if window is None else window - 1)
        chunk = (query[:, :, begin:end], key[:, :, first:end], value[:, :, first:end])
        outputs.append(checkpoint(attend, *chunk, use_reentrant=False))
    return torch.cat(outputs, 2)


def _reference_chunk(query: Tensor, key: Tensor, value: Tensor, *, left: int | None) -> Tensor:
    return reference.attention(query, key, value, bottom_right=True, window=(left, 0))[0]
