"""What a call costs beside its kernel. Least times of many short runs in turn, which a busy machine hardly moves."""

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


def least_times(*calls: Callable[[], object], runs: int = 60, calls_a_run: int = 50) -> list[float]:
    """Microseconds a call."""
    least = [float("inf")] * len(calls)
    for _ in range(runs):
        for i, call in enumerate(calls):
            start = time.perf_counter()
            for _ in range(calls_a_run):
                call()
            least[i] = min(least[i], (time.perf_counter() - start) / calls_a_run * 1e6)
    return least


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
        ours, raw = least_times(call, operator)
    assert ours <= raw + 1.5, f"{ours:.2f} us, the operator {raw:.2f} us"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_small_layer_norm_with_its_backward(dtype: torch.dtype) -> None:
    x, grad = torch.randn(8, 64, dtype=dtype, requires_grad=True), torch.randn(8, 64, dtype=dtype)

    def step(module: torch.nn.Module) -> Callable[[], object]:
        wanted = (x, *module.parameters())
        return lambda: torch.autograd.grad(module(x), wanted, grad)

    modules = nn.LayerNorm(64, dtype=dtype), torch.nn.LayerNorm(64, dtype=dtype)
    ours, theirs = least_times(*map(step, modules), runs=200)
    assert ours <= 1.25 * theirs, f"{ours:.2f} us, torch's {theirs:.2f} us"


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
        mine, theirs = least_times(lambda: ours(x, row), lambda: torchs(x, row), runs=200)
    assert mine <= theirs + 1.0, f"{mine:.2f} us, torch's {theirs:.2f} us"
