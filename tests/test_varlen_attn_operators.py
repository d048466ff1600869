"""The attention operators on packed tensors: what varlen_attn never asks for, dropout for one, and their own checks."""

import functools
from typing import Any

import pytest
import torch
from packed_support import FEWER_TARGETS, Packed, Problem
from support import KERNEL_TARGETS, Target, check, needs_library
from torch import Tensor

import fastformer
from fastformer import reference
from fastformer.ops import attention_torch
from fastformer.ops.attention import forward
from fastformer.ops.attention_torch import Options

H, G, D = 4, 2, 8
CU = torch.tensor([0, 3, 3, 9], dtype=torch.int32)
CU_K = torch.tensor([0, 5, 9, 12], dtype=torch.int32)

#: (whether queries are dense, how keys are laid out, room for further keys, dropout_p)
COMBINATIONS = [
    (True, "dense", 4, 0.0),
    (True, "dense", 4, 0.3),
    (True, "packed", 0, 0.3),
    (True, "paged", 0, 0.3),
    (False, "dense", 0, 0.3),
    (False, "dense", 4, 0.0),
    (False, "packed", 4, 0.3),
    (False, "paged", 0, 0.3),
]


@pytest.mark.parametrize("target", [target for target in FEWER_TARGETS if target in KERNEL_TARGETS], ids=str)
@pytest.mark.parametrize(("dense_queries", "keys", "room", "dropout_p"), COMBINATIONS)
def test_queries_and_keys_may_be_packed_each_by_itself(
    target: Target, dense_queries: bool, keys: str, room: int, dropout_p: float
) -> None:
    sizes: dict[str, Any] = {"room": room, "page_size": 16 * (keys == "paged")}
    sizes["heads"], sinks = ((2, 1), "fixed") if target.slow else ((8, 2), "learned")
    problem = Problem(target, Packed(((18, 20),) * 3, **sizes, scale=0.25, window=(12, 0), alibi=2, sinks=sinks))
    (cu_seqlens_q, cu_seqlens_k, max_q, max_k), given = problem.arguments()
    dropout = {"dropout_p": dropout_p}
    if dropout_p:
        dropout["dropout_state"] = torch.tensor([2**40 + 5, 2**33 + 7], device=target.device)
    packed = Options(
        scale=0.25,
        bottom_right=True,
        window_left=12,
        window_right=0,
        alibi_slopes=problem.slopes,
        cu_seqlens_q=cu_seqlens_q,
        cu_seqlens_k=cu_seqlens_k,
        seqused_k=given["seqused_k"],
        block_table=problem.table,
        max_seqlen_q=max_q,
        max_seqlen_k=max_k,
        **dropout,
    )

    def heads_first(x: Tensor, dense: bool) -> Tensor:
        return x.unflatten(0, (3, -1)).transpose(1, 2) if dense else x.transpose(0, 1).unsqueeze(0)

    def ours(query: Tensor, key: Tensor, value: Tensor, sinks: Tensor | None) -> tuple[Tensor, Tensor]:
        query = heads_first(query, dense_queries)
        key, value = (x.transpose(1, 2) if keys == "paged" else heads_first(x, keys == "dense") for x in (key, value))
        options = packed._replace(sinks=(problem.sinks if sinks is None else sinks).float())
        options = options._replace(cu_seqlens_q=None) if dense_queries else options
        options = options._replace(cu_seqlens_k=None) if keys == "dense" else options
        output, lse = forward(keys != "paged", query, key, value, None, *options)
        return output.transpose(1, 2).flatten(0, 1), lse.transpose(0, 1).flatten(1)

    def peer(query: Tensor, key: Tensor, value: Tensor, sinks: Tensor | None) -> tuple[Tensor, Tensor]:
        query = heads_first(query, False)
        key, value = (x.transpose(1, 2) if keys == "paged" else heads_first(x, False) for x in (key, value))
        sinks = problem.sinks if sinks is None else sinks
        output, lse = attention_torch.composed(query, key, value, None, packed._replace(sinks=sinks))
        return output[0].transpose(0, 1), lse[0]

    def exact(i: int, *tensors: Tensor) -> tuple[Tensor, Tensor]:
        *tensors, sinks = tensors
        options = {"bottom_right": True, "window": (12, 0), "sinks": sinks, **problem.options_of(i), **dropout}
        return reference.attention(*tensors, **options, first_sequence=i)

    each = functools.partial(problem.each, exact)
    check(target, ours, peer, each, problem.inputs, grad=keys != "paged")


OPERATOR = {"scale": 0.3, "is_causal": True, "bottom_right": True}
PACKED = {"cu_seqlens_q": CU, "cu_seqlens_k": CU_K, "max_seqlen_q": 6, "max_seqlen_k": 5}
USED = torch.tensor([5, 1, 0], dtype=torch.int32)
PAGES = {"block_table": torch.tensor([[1], [0], [-1]], dtype=torch.int32), "seqused_k": USED, "cu_seqlens_k": None}


def heads_first() -> list[Tensor]:
    """Packed query, key and value."""
    shapes = ((1, H, 9, D), (1, G, 12, D), (1, G, 12, 6))
    return [torch.randn(shape, requires_grad=True) for shape in shapes]


def pages() -> list[Tensor]:
    return [torch.randn(2, G, 16, width) for width in (D, 6)]


def test_opcheck() -> None:
    operator, backward = torch.ops.fastformer.attention_forward, torch.ops.fastformer.attention_backward
    query, key, value = heads_first()
    more = {"sinks": torch.randn(H), "alibi_slopes": torch.rand(3, H), "window_left": 3, "seqused_k": USED}
    torch.library.opcheck(operator, (query, key, value, None), OPERATOR | PACKED | more)
    plain = [x.detach() for x in (query, key, value)]
    torch.library.opcheck(operator, (plain[0], *pages(), None), OPERATOR | PACKED | PAGES | {"num_splits": 2})
    output, lse = operator(*plain, None, **OPERATOR, **PACKED)
    arguments = (torch.randn_like(output), torch.randn_like(lse), *plain, None, output, lse)
    required = OPERATOR | {"softcap": None, "needs_grad_mask": False}
    torch.library.opcheck(backward, arguments, required | PACKED | more)


@needs_library
@pytest.mark.parametrize(
    ("words", "changes"),
    [
        ("there can be no mask with cu_seqlens_q", {"mask": torch.ones(12).bool()}),
        ("cu_seqlens_q must be int32", {"cu_seqlens_q": CU.long()}),
        ("cu_seqlens_q must have 1 dim", {"cu_seqlens_q": CU[None]}),
        ("cu_seqlens_q must begin with 0", {"cu_seqlens_q": CU + 1}),
        ("cu_seqlens_q must not descend", {"cu_seqlens_q": CU.flip(0) - CU[-1] + CU}),
        ("cu_seqlens_q must end within the 9", {"cu_seqlens_q": CU * 2}),
        ("cu_seqlens_k must have 4 elements", {"cu_seqlens_k": CU_K[:3]}),
        ("cu_seqlens_k must end within the 12", {"cu_seqlens_k": CU_K * 2}),
        ("key and value must have batch size 3", {"cu_seqlens_k": None}),
        ("seqused_k must have 3 elements", {"seqused_k": USED[:2]}),
        ("seqused_k must be from 0 to 5", {"seqused_k": USED + 1}),
        ("seqused_k must be from 0 to 5", {"seqused_k": USED - 9}),
        ("max_seqlen_q must be at least 6", {"max_seqlen_q": 5}),
        ("max_seqlen_k must be at least 5", {"max_seqlen_k": 4}),
        ("block_table wants seqused_k", PAGES | {"seqused_k": None}),
        ("there can be no cu_seqlens_k with block_table", PAGES | {"cu_seqlens_k": CU_K}),
        ("pages must be a power of two", PAGES),
        ("alibi_slopes must be", {"alibi_slopes": torch.ones(2, H)}),
        ("dropout_p wants dropout_state", {"dropout_p": 0.5}),
        ("num_splits must not be negative", {"num_splits": -1}),
    ],
)
def test_errors_of_the_operator(words: str, changes: dict[str, Any]) -> None:
    arguments = {"mask": None, **OPERATOR, **PACKED} | changes
    with fastformer.backend("cpu"), pytest.raises(RuntimeError, match=words):
        torch.ops.fastformer.attention_forward(*(x.detach() for x in heads_first()), **arguments)


@needs_library
def test_the_operator_checks_pages() -> None:
    query, key, value = heads_first()[0].detach(), *pages()
    for entry in (2, -1):
        table = torch.tensor([[entry], [0], [-1]], dtype=torch.int32)
        with fastformer.backend("cpu"), pytest.raises(RuntimeError, match="block_table must hold pages 0 to 1"):
            options = OPERATOR | PACKED | PAGES | {"block_table": table}
            torch.ops.fastformer.attention_forward(query, key, value, None, **options)
