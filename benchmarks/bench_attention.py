"""scaled_dot_product_attention: causal training at the sizes of small GPTs, and one new token over a cache."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
import torch.nn.functional as torch_functional
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from fastformer import functional, reference

from .harness import FORWARD, TRAINING, Case, Function, Work

TRAINING_SHAPES = {  # (batch, heads, length, head_dim), causal
    "cpu": [(4, 6, 256, 64), (1, 12, 1024, 64)],
    "cuda": [(8, 12, 1024, 64), (2, 16, 4096, 128)],
}
MORE_TRAINING_SHAPES = [(1, 12, 512, 64), (1, 12, 2048, 64), (1, 8, 2048, 128), (8, 12, 128, 64)]
DECODING_SHAPES = {"cpu": [(1, 12, 4096, 64)], "cuda": [(64, 32, 8192, 128)]}  # one query over this many keys

MORE_DECODING_SHAPES = [(1, 8, 4096, 128), (4, 12, 1024, 64), (16, 12, 256, 64), (1, 32, 8192, 64)]


def cases(device: torch.device, dtype: torch.dtype) -> Iterator[Case]:
    """The cases of this operation on a kind of device."""
    for index, shape in enumerate(TRAINING_SHAPES[device.type]):
        yield _training(*shape, device, dtype, compiled=index == 0)
    for shape in DECODING_SHAPES[device.type]:
        yield _decoding(*shape, device, dtype)


def more_cases(device: torch.device, dtype: torch.dtype) -> Iterator[Case]:
    """Of the CPU's suite."""
    for shape in MORE_TRAINING_SHAPES:
        yield _training(*shape, device, dtype)
    for shape in MORE_DECODING_SHAPES:
        yield _decoding(*shape, device, dtype)


def _training(
    batch: int,
    heads: int,
    length: int,
    head_dim: int,
    device: torch.device,
    dtype: torch.dtype,
    *,
    compiled: bool = False,
) -> Case:
    return Case(
        operation="attention",
        shape=f"{batch}x{heads}x{length}x{head_dim} causal",
        dtype=dtype,
        inputs=partial(attention_inputs, batch, heads, length, length, head_dim, device, dtype),
        ours=partial(functional.scaled_dot_product_attention, is_causal=True),
        reference=partial(_reference, is_causal=True),
        peers=_peers(device, is_causal=True),
        work=attention_work(batch, heads, length, head_dim, dtype, length * length // 2),
        judged_by="fused",
        compiled="eager" if compiled else None,
    )


def _decoding(batch: int, heads: int, length: int, head_dim: int, device: torch.device, dtype: torch.dtype) -> Case:
    return Case(
        operation="attention",
        shape=f"{batch}x{heads}x1x{head_dim}, {length} keys",
        dtype=dtype,
        inputs=partial(attention_inputs, batch, heads, 1, length, head_dim, device, dtype),
        ours=functional.scaled_dot_product_attention,
        reference=partial(_reference, is_causal=False),
        peers=_peers(device, is_causal=False),
        work=_decoding_work(batch, heads, length, head_dim, dtype),
        judged_by="fused",
    )


def attention_inputs(
    batch: int, heads: int, seqlen_q: int, seqlen_k: int, head_dim: int, device: torch.device, dtype: torch.dtype
) -> dict[str, Tensor]:
    """query, key and value of attention with as many heads in each."""
    lengths = {"query": seqlen_q, "key": seqlen_k, "value": seqlen_k}
    return {
        name: torch.randn(batch, heads, length, head_dim, device=device, dtype=dtype, requires_grad=True)
        for name, length in lengths.items()
    }


def _reference(query: Tensor, key: Tensor, value: Tensor, *, is_causal: bool) -> Tensor:
    return reference.attention(query, key, value, is_causal=is_causal)[0]


def _eager(query: Tensor, key: Tensor, value: Tensor, *, is_causal: bool) -> Tensor:
    scores = query @ key.mT * query.shape[-1] ** -0.5
    if is_causal:
        visible = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
        scores = scores.masked_fill(~visible, -torch.inf)
    return scores.softmax(-1) @ value


def _sdpa(query: Tensor, key: Tensor, value: Tensor, *, is_causal: bool, backend: SDPBackend) -> Tensor:
    with sdpa_kernel(backend):
        return torch_functional.scaled_dot_product_attention(query, key, value, is_causal=is_causal)


def _peers(device: torch.device, *, is_causal: bool) -> dict[str, Function]:
    """The eager composition, what torch's SDPA picks itself and, on a GPU, each of its fused kernels."""
    peers: dict[str, Function] = {
        "eager": partial(_eager, is_causal=is_causal),
        "fused": partial(torch_functional.scaled_dot_product_attention, is_causal=is_causal),
    }
    if device.type == "cuda":
        for backend in (SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.CUDNN_ATTENTION):
            peers[f"fused: {backend.name.lower()}"] = partial(_sdpa, is_causal=is_causal, backend=backend)
    return peers


def attention_work(
    batch: int, heads: int, length: int, head_dim: int, dtype: torch.dtype, visible: int
) -> dict[str, Work]:
    """Of training with as many keys as queries; ``visible``: pairs of a query and a key in a head."""
    tensor = batch * heads * length * head_dim * dtype.itemsize
    # two products (scores, output), 2 FLOPs a term
    flops = 2 * 2 * batch * heads * visible * head_dim
    return {
        # query, key, value read, output written
        FORWARD: Work(bytes=4 * tensor, flops=flops),
        # and five products instead of two (scores again, grad_value, the weights' gradient, grad_query, grad_key);
        # query, key, value, output, grad_output read, three gradients written
        TRAINING: Work(bytes=12 * tensor, flops=flops * 7 // 2),
    }


def _decoding_work(batch: int, heads: int, length: int, head_dim: int, dtype: torch.dtype) -> dict[str, Work]:
    # key and value read; query and output are one row each
    cache = 2 * batch * heads * length * head_dim * dtype.itemsize
    return {FORWARD: Work(bytes=cache, flops=2 * 2 * batch * heads * length * head_dim, reads=True)}
