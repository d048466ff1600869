"""The same bits from every run and any number of threads, and nothing of what is hidden."""

import math
from collections.abc import Iterator

import pytest
import torch
from attention_support import Case, attend, inputs, on_fast_kernels
from support import KERNEL_TARGETS, Target, on_kernels
from torch import Tensor

import fastformer
import fastformer.functional as F

EVERYTHING = {
    "sinks": True,
    "slopes": "BH",
    "softcap": 4.0,
    "dropout_p": 0.2,
    "window": (60, 20),
    "causal_alignment": "bottom_right",
}
CASES = {
    "causal": {"is_causal": True},
    "everything": {"mask": "infinite", **EVERYTHING},
    "everything with a bool mask of tiles": {"mask": "tiles", **EVERYTHING},
    "dropout": {"dropout_p": 0.5},
    "softcap, sinks and few keys": {"softcap": 4.0, "sinks": True, "window": (3, 0)},
    "a learned mask over sequences": {"mask": "added", "mask_over": "HQK", "is_causal": True},
}
SMALL = {"seqlen_q": 20, "seqlen_k": 24}
LARGE = {"batch": 2, "heads": 4, "kv_heads": 2, "seqlen_q": 300, "seqlen_k": 340, "head_dim": 32, "value_dim": 24}


def results(target: Target, case: Case, tensors: dict[str, Tensor]) -> list[Tensor]:
    """Output, lse and gradients under a loss that weighs every element of the output differently."""
    leaves = {name: x.detach() for name, x in tensors.items()}
    constant = case.constants()
    wanted = [x.requires_grad_() for name, x in leaves.items() if x.is_floating_point() and name not in constant]
    with fastformer.backend(target.backend):
        output, lse = attend(**leaves, **case.options())
        loss = output.square().sum() + lse.masked_fill(lse.isinf(), 0.0).square().sum()
        return [output, lse, *torch.autograd.grad(loss, wanted)]


@pytest.fixture
def restored_threads() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@on_fast_kernels
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("lengths", [(300, 340), (2, 900)], ids=str)
@pytest.mark.usefixtures("restored_threads")
def test_threads_change_nothing(target: Target, name: str, lengths: tuple[int, int]) -> None:
    case = Case(**LARGE | {"seqlen_q": lengths[0], "seqlen_k": lengths[1]} | CASES[name])
    tensors = case.tensors(target)
    runs = []
    for threads in (1, 2, 3, 1):
        torch.set_num_threads(threads)
        runs.append(results(target, case, tensors))
    for run in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], run))


@pytest.mark.parametrize("target", [target for target in KERNEL_TARGETS if target.slow], ids=str)
def test_runs_change_nothing(target: Target) -> None:
    case = Case(**SMALL, **CASES["everything"])
    tensors = case.tensors(target)
    first, second = (results(target, case, tensors) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second))


CPU_TARGETS = [target for target in KERNEL_TARGETS if target.backend == "cpu"]
on_cpu = pytest.mark.parametrize("target", CPU_TARGETS, ids=str)
HIDDEN = slice(256, 512)


@on_cpu
@pytest.mark.parametrize("with_dropout", [False, True])
@pytest.mark.parametrize("by", ["mask of keys", "mask", "window", "causal"])
def test_a_block_that_every_query_hides_is_not_computed(target: Target, by: str, with_dropout: bool) -> None:
    """NaN in its keys and values reaches nothing, and their gradients are 0."""
    shown = torch.ones(300, 800, dtype=torch.bool)
    shown[:, HIDDEN] = False
    masks = {"mask of keys": shown[:1], "mask": shown}
    options = {
        "window": {"window": (10, None), "causal_alignment": "bottom_right"},  # queries are keys 500 to 799
        "causal": {"is_causal": True},
    }.get(by, {})
    hidden = {"window": slice(0, 256), "causal": slice(512, None)}.get(by, HIDDEN)
    case = Case(**LARGE | {"seqlen_k": 800, "dropout_p": 0.3 * with_dropout, **options})
    tensors = case.tensors(target)
    if by in masks:
        tensors["attn_mask"] = masks[by]
    clean = results(target, case, tensors)
    for name in ("key", "value"):
        tensors[name][:, :, hidden] = math.nan
    poisoned = results(target, case, tensors)
    for mine, expected in zip(poisoned, clean):
        assert torch.equal(mine, expected)
    assert all((grad[:, :, hidden] == 0).all() for grad in poisoned[3:5])


@on_cpu
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize("left", [5, 6, 260])
def test_new_queries_read_nothing_that_they_do_not_see(target: Target, left: int, dropout_p: float) -> None:
    """Keys from an even one and from an odd one on, by the queries of a group together."""
    query, key, value = inputs(target, 1, 8, 2, 1, 301, 64, 40)
    options = {"window": (left, 0), "causal_alignment": "bottom_right", "enable_gqa": True, "dropout_p": dropout_p}

    def output() -> Tensor:
        torch.manual_seed(1)
        with fastformer.backend(target.backend):
            return F.scaled_dot_product_attention(query, key, value, **options)

    clean = output()
    for tensor in (key, value):
        tensor[:, :, : 300 - left] = math.nan
    assert torch.equal(output(), clean)


@on_cpu
@pytest.mark.parametrize("by", ["mask", "window"])
def test_a_block_that_some_queries_hide_does_not_reach_them(target: Target, by: str) -> None:
    """Where no query of their own block sees it."""
    length, far = 1024, slice(0, 256)
    case = Case(**LARGE | {"seqlen_q": length, "seqlen_k": length, "window": (64, 64) if by == "window" else None})
    tensors = case.tensors(target)
    if by == "mask":
        tensors["attn_mask"] = torch.ones(length, length, dtype=torch.bool)
        tensors["attn_mask"][:512, 512:] = False
    clean = results(target, case, tensors)
    for name in ("key", "value"):
        tensors[name][:, :, 768:] = math.nan
    poisoned = results(target, case, tensors)
    for mine, expected in zip(poisoned[:3], clean):  # output, lse and the gradient of the queries
        assert torch.equal(mine[:, :, far], expected[:, :, far])
        assert mine[:, :, -1].isnan().all()


@on_kernels
def test_hidden_gradients_are_zero(target: Target) -> None:
    """Of keys that no query sees, in a block with others."""
    case = Case(**SMALL, window=(2, 0), causal_alignment="bottom_right")
    grads = results(target, case, case.tensors(target))[3:]
    assert all((grad[:, :, :2] == 0).all() and (grad[:, :, 2:].abs().sum(-1) > 0).all() for grad in grads)
