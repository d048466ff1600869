"""scaled_dot_product_attention: training at the sizes of known models, and one new token over a cache."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
import torch.nn.functional as torch_functional
from torch import Tensor

from fastformer import functional, reference

from . import peers
from .harness import FORWARD, Case, Function, Work
from .work import of_training

Shape = tuple[int, int, int, int, int]  # batch, heads, key heads, length, head_dim

# Shape, causal
TRAINING_SHAPES: dict[str, list[tuple[Shape, bool]]] = {
    "cpu": [((4, 6, 6, 256, 64), True), ((1, 12, 12, 1024, 64), True)],  # nanoGPT's; GPT-2 small
    "cuda": [((8, 12, 12, 1024, 64), True), ((1, 32, 8, 4096, 128), True)],  # GPT-2 small; Llama 3 8B
}
MORE_TRAINING_SHAPES: dict[str, list[tuple[Shape, bool]]] = {
    "cpu": [
        ((1, 12, 12, 512, 64), True),
        ((1, 12, 12, 2048, 64), True),
        ((1, 8, 8, 2048, 128), True),
        ((8, 12, 12, 128, 64), True),
        ((4, 12, 12, 512, 64), False),  # BERT base
        ((8, 12, 12, 197, 64), False),  # ViT-B/16: 196 patches and the class token
        ((1, 32, 8, 1024, 128), True),  # Llama 3 8B
    ],
    "cuda": [((32, 12, 12, 512, 64), False), ((64, 12, 12, 197, 64), False), ((2, 16, 16, 4096, 128), True)],
}
# One query over so many keys: (batch, heads, key heads, keys, head_dim)
DECODING_SHAPES = {"cpu": [(1, 12, 12, 4096, 64)], "cuda": [(16, 32, 8, 8192, 128)]}
MORE_DECODING_SHAPES = {
    "cpu": [
        (1, 8, 8, 4096, 128),
        (4, 12, 12, 1024, 64),  # GPT-2 small
        (16, 12, 12, 256, 64),
        (1, 32, 32, 8192, 64),
        (1, 32, 8, 8192, 128),  # Llama 3 8B
    ],
    "cuda": [(8, 12, 12, 1024, 64), (1, 32, 8, 32768, 128)],
}


def cases(device: torch.device, dtype: torch.dtype, suite: str) -> Iterator[Case]:
    """The cases of this operation on a kind of device, those of the quick suite first."""
    for index, (shape, is_causal) in enumerate(TRAINING_SHAPES[device.type]):
        flex = peers.flex(device, suite, peers.causal_mask_mod if is_causal else None)
        yield _training(shape, is_causal, device, dtype, flex, compiled=index == 0 or suite != "quick")
    for shape in DECODING_SHAPES[device.type]:
        yield _decoding(*shape, device, dtype)
    if suite != "quick":
        for shape, is_causal in MORE_TRAINING_SHAPES[device.type]:
            yield _training(shape, is_causal, device, dtype, {}, compiled=True)
        for shape in MORE_DECODING_SHAPES[device.type]:
            yield _decoding(*shape, device, dtype)


def _training(
    shape: Shape,
    is_causal: bool,
    device: torch.device,
    dtype: torch.dtype,
    flex: dict[str, Function | str],
    *,
    compiled: bool,
) -> Case:
    batch, heads, kv_heads, length, head_dim = shape
    settings = {"is_causal": is_causal, "enable_gqa": heads != kv_heads}
    visible = length * (length + 1) // 2 if is_causal else length * length
    return Case(
        operation="attention",
        shape=f"{batch}x{head_counts(heads, kv_heads)}x{length}x{head_dim}{' causal' if is_causal else ''}",
        dtype=dtype,
        inputs=training_inputs(shape, device, dtype),
        ours=partial(functional.scaled_dot_product_attention, **settings),
        reference=partial(_reference, is_causal=is_causal),
        peers={
            **_torchs(device, settings),
            **flex,
            **peers.optional("attention", device, dtype, is_causal=is_causal),
        },
        work=training_work(shape, visible, dtype),
        judged_by="sdpa",
        compiled="eager" if compiled else None,
        sizes={"batch": batch, "heads": heads, "kv_heads": kv_heads, "length": length, "head_dim": head_dim},
    )


def _decoding(
    batch: int,
    heads: int,
    kv_heads: int,
    length: int,
    head_dim: int,
    device: torch.device,
    dtype: torch.dtype,
) -> Case:
    sizes = {"batch": batch, "heads": heads, "kv_heads": kv_heads, "keys": length, "head_dim": head_dim}
    settings = {"is_causal": False, "enable_gqa": heads != kv_heads}
    return Case(
        operation="attention",
        shape=f"{batch}x{head_counts(heads, kv_heads)}x1x{head_dim}, {length} keys",
        dtype=dtype,
        inputs=partial(_inputs, batch, heads, kv_heads, 1, length, head_dim, device, dtype, requires_grad=False),
        ours=partial(functional.scaled_dot_product_attention, **settings),
        reference=partial(_reference, is_causal=False),
        peers={
            **_torchs(device, settings),
            **peers.optional("decoding", device, dtype),
        },
        work=decoding_work(batch * heads, batch * kv_heads * length, batch * heads * length, head_dim, dtype),
        judged_by="sdpa",
        sizes=sizes,
    )


def head_counts(heads: int, kv_heads: int) -> str:
    """In a shape: "12", or "32/8" of grouped queries."""
    return f"{heads}" if heads == kv_heads else f"{heads}/{kv_heads}"


def training_inputs(shape: Shape, device: torch.device, dtype: torch.dtype) -> Callable[[], dict[str, Tensor]]:
    """Draws query, key and value of one length."""
    batch, heads, kv_heads, length, head_dim = shape
    return partial(_inputs, batch, heads, kv_heads, length, length, head_dim, device, dtype, requires_grad=True)


def _inputs(
    batch: int,
    heads: int,
    kv_heads: int,
    seqlen_q: int,
    seqlen_k: int,
    head_dim: int,
    device: torch.device,
    dtype: torch.dtype,
    *,
    requires_grad: bool,
) -> dict[str, Tensor]:
    draw = partial(torch.randn, device=device, dtype=dtype, requires_grad=requires_grad)
    return {
        "query": draw(batch, heads, seqlen_q, head_dim),
        "key": draw(batch, kv_heads, seqlen_k, head_dim),
        "value": draw(batch, kv_heads, seqlen_k, head_dim),
    }


def _reference(query: Tensor, key: Tensor, value: Tensor, *, is_causal: bool) -> Tensor:
    return reference.attention(query, key, value, is_causal=is_causal)[0]


def _eager(query: Tensor, key: Tensor, value: Tensor, *, is_causal: bool, enable_gqa: bool) -> Tensor:
    if enable_gqa:  # as Hugging Face's models do it
        key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], dim=1) for x in (key, value))
    scores = query @ key.mT * query.shape[-1] ** -0.5
    if is_causal:
        visible = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
        scores = scores.masked_fill(~visible, -torch.inf)
    return scores.softmax(-1) @ value


def _torchs(device: torch.device, settings: dict[str, bool]) -> dict[str, Function]:
    attend = partial(torch_functional.scaled_dot_product_attention, **settings)
    return {"eager": partial(_eager, **settings), **peers.sdpa(device, attend)}


def training_work(shape: Shape, visible: int, dtype: torch.dtype) -> dict[str, Work]:
    """``visible``: pairs of a query and a key that it sees, of one head."""
    batch, heads, kv_heads, length, head_dim = shape
    elements = batch * length * head_dim
    return attention_work(heads * elements, kv_heads * elements, batch * heads * visible, head_dim, dtype)


def attention_work(queries: int, keys: int, visible: int, head_dim: int, dtype: torch.dtype) -> dict[str, Work]:
    """Of training.

    Args:
        queries, keys: elements of the query and of the key.
        visible: pairs of a query and a key that it sees, of all heads.
    """
    product = 2 * visible * head_dim  # 2 FLOPs a term
    return of_training(
        # scores and output; query, key, value read, output written
        Work(bytes=(2 * queries + 2 * keys) * dtype.itemsize, flops=2 * product),
        # scores again, the weights' gradient, grad_query, grad_key, grad_value; query, key, value, output, grad_output
        # read, three gradients written
        Work(bytes=(4 * queries + 4 * keys) * dtype.itemsize, flops=5 * product),
    )


def decoding_work(queries: int, keys: int, visible: int, head_dim: int, dtype: torch.dtype) -> dict[str, Work]:
    """Of a new token: ``queries`` and ``keys`` are rows of all heads, ``visible`` is as in attention_work."""
    # query, key and value read, output written; two products
    size = (2 * queries + 2 * keys) * head_dim * dtype.itemsize
    return {FORWARD: Work(bytes=size, flops=2 * 2 * visible * head_dim, reads=True)}
