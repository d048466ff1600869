"""The cases in the documentation of torch's scaled_dot_product_attention, with torch's arguments, against torch."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as torch_functional
from attention_support import without_chance
from support import Target, check, needs_library, tensor
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right, causal_upper_left

import fastformer
import fastformer.functional as F

N, H, L, S, E, EV = 2, 4, 20, 27, 16, 12  # the letters of torch's documentation
REQUESTS = [("auto", "cpu", ()), ("cpu", "cpu", needs_library)]
if torch.cuda.is_available():
    REQUESTS += [("auto", "cuda", ()), ("triton", "cuda", ())]
on_backends = pytest.mark.parametrize(
    "target",
    [
        pytest.param(Target(name, device, dtype), marks=marks, id=str(Target(name, device, dtype)))
        for name, device, marks in REQUESTS
        for dtype in (torch.float32, torch.bfloat16)
    ],
)


def check_torchs(target: Target, draw: Callable[[], Sequence[Tensor]], **arguments: Any) -> None:
    """Our function against torch's in the same dtype and in float64, on the query, key, value and perhaps mask that
    ``draw`` gives: values, and gradients by all that has one.

    An added mask of one column has none but what rounding leaves: it moves all scores of a row together.
    """

    def judge() -> None:
        tensors = list(draw())
        fixed = [tensors.pop()] if tensors[-1].shape[-1] == 1 else []

        def bound(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
            def call(*leaves: Tensor) -> Tensor:
                masks = [x if x.dtype == torch.bool else x.to(leaves[0].dtype) for x in fixed]
                return function(*leaves, *masks, **arguments)

            return call

        theirs = bound(torch_functional.scaled_dot_product_attention)
        check(target, bound(F.scaled_dot_product_attention), theirs, theirs, tensors)

    without_chance(judge)


def drawn(target: Target, *leading: int, seqlen_q: int = L) -> tuple[Tensor, Tensor, Tensor]:
    return (
        tensor(target, *leading, seqlen_q, E),
        tensor(target, *leading, S, E),
        tensor(target, *leading, S, EV),
    )


def mask_of(target: Target, kind: str, shape: tuple[int, ...]) -> Tensor:
    if kind == "float":
        return tensor(target, *shape)
    mask = torch.rand(shape) > 0.3
    return (mask | ~mask.any(-1, keepdim=True)).to(target.device)


@on_backends
@pytest.mark.parametrize("leading", [(), (3,), (N, H), (2, 1, H), (2, 1, 3, H)], ids=str)
@pytest.mark.parametrize("arguments", [{}, {"is_causal": True}, {"scale": 0.1}, {"scale": -0.4, "is_causal": True}])
def test_inputs_of_any_number_of_dimensions(
    target: Target, leading: tuple[int, ...], arguments: dict[str, Any]
) -> None:
    check_torchs(target, lambda: drawn(target, *leading), **arguments)


@on_backends
@pytest.mark.parametrize("kind", ["bool", "float"])
@pytest.mark.parametrize(
    ("leading", "shape"),
    [
        ((), (L, S)),
        ((), (1, S)),
        ((), (L, 1)),
        ((3,), (L, S)),
        ((3,), (1, L, S)),
        ((3,), (3, L, S)),
        ((3,), (3, 1, S)),
        ((N, H), (L, S)),
        ((N, H), (1, S)),
        ((N, H), (1, L, S)),
        ((N, H), (H, L, S)),
        ((N, H), (H, 1, S)),
        ((N, H), (1, 1, L, S)),
        ((N, H), (N, 1, L, S)),
        ((N, H), (1, H, L, S)),
        ((N, H), (N, H, L, S)),
        ((N, H), (N, 1, 1, S)),
        ((N, H), (N, H, 1, S)),
        ((N, H), (N, H, L, 1)),
        ((2, 3, H), (L, S)),
        ((2, 3, H), (H, L, S)),
        ((2, 3, H), (3, 1, L, S)),
        ((2, 3, H), (2, 1, 1, L, S)),
        ((2, 3, H), (1, 3, H, 1, S)),
        ((2, 3, H), (2, 3, H, L, S)),
    ],
    ids=str,
)
def test_masks_that_broadcast(target: Target, leading: tuple[int, ...], shape: tuple[int, ...], kind: str) -> None:
    check_torchs(target, lambda: (*drawn(target, *leading), mask_of(target, kind, shape)))


@on_backends
@pytest.mark.parametrize("seqlen_q", [2, L, S, 40])
def test_causal_is_the_upper_left_triangle(target: Target, seqlen_q: int) -> None:
    query, key, value = drawn(target, N, H, seqlen_q=seqlen_q)
    triangle = torch.ones(seqlen_q, S, dtype=torch.bool, device=target.device).tril()
    check_torchs(target, lambda: drawn(target, N, H, seqlen_q=seqlen_q), is_causal=True)
    with fastformer.backend(target.backend):
        causal = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        torch.testing.assert_close(F.scaled_dot_product_attention(query, key, value, triangle), causal)


@on_backends
@pytest.mark.parametrize("key_heads", [1, 2, H])
@pytest.mark.parametrize("kind", ["none", "bool", "float", "causal"])
def test_grouped_query_attention(target: Target, key_heads: int, kind: str) -> None:
    def draw() -> list[Tensor]:
        key, value = tensor(target, N, key_heads, S, E), tensor(target, N, key_heads, S, EV)
        masks = [mask_of(target, kind, (N, H, L, S))] if kind in ("bool", "float") else []
        return [tensor(target, N, H, L, E), key, value, *masks]

    check_torchs(target, draw, is_causal=kind == "causal", enable_gqa=True)


@on_backends
def test_masks_of_minus_infinity(target: Target) -> None:
    mask = tensor(target, N, 1, L, S)
    mask = mask.masked_fill(mask < -0.5, -math.inf)
    mask[..., 0] = 0.0
    check_torchs(target, lambda: (*drawn(target, N, H), mask))


@on_backends
def test_positional_arguments_and_layouts(target: Target) -> None:
    """Heads behind the length, as a projection gives them, and all of torch's arguments in its order."""
    query, key, value = drawn(target, N, H)
    query, key, value = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (query, key, value))
    mask = mask_of(target, "bool", (S, L)).t()
    with fastformer.backend(target.backend):
        ours = F.scaled_dot_product_attention(query, key, value, mask, 0.0, False, scale=0.4, enable_gqa=False)
    theirs = torch_functional.scaled_dot_product_attention(
        query, key, value, mask, 0.0, False, scale=0.4, enable_gqa=False
    )
    assert ours.dtype == theirs.dtype and ours.shape == theirs.shape
    check_torchs(target, lambda: (query, key, value, mask), scale=0.4)


def test_float64_is_torchs_to_the_bit() -> None:
    query, key, value = (x.double() for x in drawn(Target("auto", "cpu", torch.float32), N, H))
    for arguments in ({}, {"is_causal": True}, {"scale": 0.3}):
        ours = F.scaled_dot_product_attention(query, key, value, **arguments)
        assert torch.equal(ours, torch_functional.scaled_dot_product_attention(query, key, value, **arguments))


def test_a_sequence_of_queries_that_see_nothing_gives_zeros() -> None:
    """As torch does since 2.5, in every one of its backends."""
    query, key, value = drawn(Target("auto", "cpu", torch.float32), N, H)
    mask = torch.ones(N, 1, L, S, dtype=torch.bool)
    mask[1] = False
    ours = F.scaled_dot_product_attention(query, key, value, mask)
    theirs = torch_functional.scaled_dot_product_attention(query, key, value, mask)
    assert (ours[1] == 0).all()
    torch.testing.assert_close(ours, theirs)


@on_backends
@pytest.mark.parametrize("kind", [causal_upper_left, causal_lower_right])
def test_causal_biases(target: Target, kind: Callable[[int, int], Tensor]) -> None:
    query, key, value = drawn(target, N, H)
    with fastformer.backend(target.backend):
        ours = F.scaled_dot_product_attention(query, key, value, kind(L, S))
        alignment = "top_left" if kind is causal_upper_left else "bottom_right"
        aligned = F.scaled_dot_product_attention(query, key, value, is_causal=True, causal_alignment=alignment)
    assert torch.equal(ours, aligned)
    theirs = torch_functional.scaled_dot_product_attention(query, key, value, kind(L, S))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=4 * torch.finfo(target.dtype).eps)
    with pytest.raises(ValueError, match=f"attn_mask is for {L} queries and {L} keys, must be for"):
        F.scaled_dot_product_attention(query, key, value, kind(L, L))
    with pytest.raises(ValueError, match="is_causal is True, must be False"):
        F.scaled_dot_product_attention(query, key, value, kind(L, S), is_causal=True)
