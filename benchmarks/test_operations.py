"""Every case of the quick suite as benchmarks of pytest-benchmark, checked first, for its tables and comparisons:

pytest benchmarks/ -k "softmax and bf16" --benchmark-autosave
pytest benchmarks/ -k "softmax and bf16" --benchmark-compare

Ours and its peers in one mode are a group, so that the table shows them together. They run one after the other, not in
turns as under ``fastformer bench``, whose numbers are the ones to quote.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

import fastformer
from fastformer.benchmarks.checking import Check
from fastformer.benchmarks.harness import OURS, Case, Pace, peers
from fastformer.benchmarks.suite import BACKENDS
from fastformer.benchmarks.timing import Staged

STAGED_ROUNDS = 20


def test_operation(check: tuple[Case, Check], mode: str, contestant: str, benchmark: BenchmarkFixture) -> None:
    """A wrong answer of ours fails; a peer that can't run, or computes something else, is skipped with the reason."""
    case, right = check
    benchmark.group = f"{case} {mode}"
    device = right.grad_outputs[0].device
    with fastformer.backend(BACKENDS[device.type]):
        if contestant == OURS:
            call = right.caller(mode, case.ours)
            problem, share = right.verdict(mode, call)
            assert not problem
            benchmark.extra_info["error_share"] = share
        else:
            function = dict(peers(case, Pace(only=[contestant])))[contestant]
            call = right.caller(mode, function, copies=contestant in case.in_place)
            if problem := right.difference(mode, call):
                pytest.skip(problem)
        if isinstance(call, Staged):
            staged = {"setup": lambda: ((call.first(),), {}), "rounds": STAGED_ROUNDS, "warmup_rounds": 1}
            benchmark.pedantic(_finished(call.then, device), **staged)
        else:
            benchmark(_finished(call, device))


def _finished(call: Callable[..., object], device: torch.device) -> Callable[..., object]:
    """The call until the GPU is done with it."""
    if device.type != "cuda":
        return call

    def wait(*arguments: object) -> object:
        result = call(*arguments)
        torch.cuda.synchronize(device)
        return result

    return wait
