"""What a call costs beside its kernel, in calls of a small Python function, whatever the speed of the processor."""

import statistics
import time
from collections.abc import Callable

import pytest
import torch
from support import needs_library

import fastformer
import fastformer.functional as F
from fastformer import nn

ops = torch.ops.fastformer
Call = Callable[..., object]
X, ROW, HEADS, MATRIX, ANGLES = (torch.randn(*size) for size in ((8, 64), (64,), (1, 2, 8, 16), (64, 64), (8, 8)))


def small_call(x: torch.Tensor, *, scale: float = 1.0) -> float:
    """What costs are counted in: 0.1 us on a Zen 5 at full speed."""
    return scale if type(x) is torch.Tensor and x.is_cpu else 0.0


def costs(*calls: Callable[[], object], runs: int = 60, calls_a_run: int = 50) -> list[float]:
    """Of each call, in small calls. Medians over runs in turn: a processor's speed can halve between two runs."""
    found: list[list[float]] = [[] for _ in calls]
    for _ in range(runs):
        unit, *times = (_time(call, calls_a_run) for call in (lambda: small_call(X, scale=2.0), *calls))
        for costs_of_one, seconds in zip(found, times):
            costs_of_one.append(seconds / unit)
    return [statistics.median(x) for x in found]


def _time(call: Callable[[], object], calls_a_run: int) -> float:
    start = time.perf_counter()
    for _ in range(calls_a_run):
        call()
    return time.perf_counter() - start


@needs_library
@pytest.mark.parametrize(
    ("call", "operator"),
    [
        (lambda: F.softmax(X, -1), lambda: ops.softmax_forward(X, None, 1.0, False)),
        (lambda: F.layer_norm(X, (64,), ROW, ROW), lambda: ops.layer_norm_forward(X, None, ROW, ROW, 1e-5, False)),
        (lambda: F.rms_norm(X, (64,), ROW), lambda: ops.layer_norm_forward(X, None, ROW, None, 1e-5, True)),
        (
            lambda: F.add_layer_norm(X, X, (64,), ROW, ROW),
            lambda: ops.layer_norm_forward(X, X, ROW, ROW, 1e-5, False),
        ),
        (
            lambda: F.scaled_dot_product_attention(HEADS, HEADS, HEADS),
            lambda: ops.attention_forward(HEADS, HEADS, HEADS, None, 0.25, False, False),
        ),
        (
            lambda: F.feed_forward(X, MATRIX, None, MATRIX, None),
            lambda: ops.feed_forward_forward(X, MATRIX, None, None, MATRIX, None, "gelu", False),
        ),
        (lambda: F.linear(X, MATRIX, ROW), lambda: ops.linear_forward(X, MATRIX, ROW)),
        (
            lambda: F.rotary(HEADS, HEADS, ANGLES, ANGLES),
            lambda: ops.rotary_forward(HEADS, HEADS, ANGLES, ANGLES, False),
        ),
    ],
    ids=["softmax", "layer_norm", "rms_norm", "add_layer_norm", "attention", "feed_forward", "linear", "rotary"],
)
def test_a_function_costs_little_more_than_its_operator(
    call: Callable[[], object], operator: Callable[[], object]
) -> None:
    with torch.no_grad(), fastformer.backend("cpu"):
        ours, raw = costs(call, operator)
    assert ours <= raw + 5, f"{ours:.1f} small calls, the operator {raw:.1f}"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_small_layer_norm_with_its_backward(dtype: torch.dtype) -> None:
    x, grad = torch.randn(8, 64, dtype=dtype, requires_grad=True), torch.randn(8, 64, dtype=dtype)

    def step(module: torch.nn.Module) -> Callable[[], object]:
        wanted = (x, *module.parameters())
        return lambda: torch.autograd.grad(module(x), wanted, grad)

    modules = nn.LayerNorm(64, dtype=dtype), torch.nn.LayerNorm(64, dtype=dtype)
    ours, theirs = costs(*map(step, modules), runs=200)
    assert ours <= 1.25 * theirs, f"{ours:.1f} small calls, torch's {theirs:.1f}"


def add_layer_norm(x: torch.Tensor, row: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    summed = x + x
    return torch.layer_norm(summed, (64,), row, row), summed


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("ours", "torchs"),
    [
        (lambda x, row: F.softmax(x, -1), lambda x, row: torch.softmax(x, -1)),
        (lambda x, row: F.layer_norm(x, (64,), row, row), lambda x, row: torch.layer_norm(x, (64,), row, row)),
        (lambda x, row: F.add_layer_norm(x, x, (64,), row, row), add_layer_norm),
    ],
    ids=["softmax", "layer_norm", "add_layer_norm"],
)
def test_a_small_call_costs_what_torchs_costs(ours: Call, torchs: Call, dtype: torch.dtype) -> None:
    x, row = X.to(dtype), ROW.to(dtype)
    torch.testing.assert_close(ours(x, row), torchs(x, row), rtol=0, atol=0)
    with torch.no_grad(), fastformer.backend("auto"):
        mine, theirs = costs(lambda: ours(x, row), lambda: torchs(x, row), runs=200)
    assert mine <= theirs + 10, f"{mine:.1f} small calls, torch's {theirs:.1f}"
