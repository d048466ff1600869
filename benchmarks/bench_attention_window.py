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

from . import peers
from .bench_attention import Shape, head_counts, training_inputs, training_work
from .harness import Case

SHAPES: dict[str, Shape] = {"cpu": (1, 2, 2, 8192, 64), "cuda": (2, 16, 16, 16384, 128)}
WINDOWS = (None, 4096, 1024, 256)  # keys that a query sees, itself among them; None: all before it
MORE: dict[str, list[tuple[Shape, int]]] = {
    "cpu": [((1, 4, 1, 4096, 128), 1024)],  # an eighth of Mistral 7B's heads; a fourth of its sequence and window
    "cuda": [((1, 32, 8, 16384, 128), 4096)],  # Mistral 7B
}
CHUNK = 512  # queries of the reference at once, whose scores are in float64


def cases(device: torch.device, dtype: torch.dtype, suite: str) -> Iterator[Case]:
    """The cases of this operation on a kind of device, those of the quick suite first."""
    for window in WINDOWS:
        yield _case(SHAPES[device.type], window, device, dtype, suite)
    if suite != "quick":
        for shape, window in MORE[device.type]:
            yield _case(shape, window, device, dtype, suite)


def _case(shape: Shape, window: int | None, device: torch.device, dtype: torch.dtype, suite: str) -> Case:
    batch, heads, kv_heads, length, head_dim = shape
    keys = length if window is None else window
    visible = keys * (keys + 1) // 2 + (length - keys) * keys  # pairs of a head
    mask = "causal" if window is None else f"window {window}"
    return Case(
        operation="attention_window",
        shape=f"{batch}x{head_counts(heads, kv_heads)}x{length}x{head_dim} {mask}",
        dtype=dtype,
        inputs=training_inputs(shape, device, dtype),
        ours=partial(_ours, window=window),
        reference=partial(_reference, window=window),
        peers={
            "eager": "would hold the scores of all pairs",
            "sdpa": partial(_torchs, window=window),
            **peers.flex(device, suite, peers.causal_mask_mod if window is None else window_mask_mod(window)),
            **peers.optional("attention", device, dtype, is_causal=True, window=window),
        },
        work=training_work(shape, visible, dtype),
        judged_by="sdpa",
        sizes={"batch": batch, "heads": heads, "kv_heads": kv_heads, "length": length, "window": keys},
    )


def window_mask_mod(window: int) -> peers.MaskMod:
    """FlexAttention's way to say that a query sees so many keys, itself the last."""
    return lambda batch, head, query, key: (query >= key) & (query - key < window)


def _ours(query: Tensor, key: Tensor, value: Tensor, *, window: int | None) -> Tensor:
    settings = {"is_causal": True, "enable_gqa": query.shape[1] != key.shape[1]}
    bounds = None if window is None else (window - 1, 0)
    return functional.scaled_dot_product_attention(query, key, value, window=bounds, **settings)


def _torchs(query: Tensor, key: Tensor, value: Tensor, *, window: int | None) -> Tensor:
    """torch has no windows: a mask says what is visible."""
    enable_gqa = query.shape[1] != key.shape[1]
    attend = partial(torch_functional.scaled_dot_product_attention, query, key, value, enable_gqa=enable_gqa)
    if window is None:
        return attend(is_causal=True)
    return attend(reference.window_mask(query.shape[2], key.shape[2], window - 1, 0, device=query.device))


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
