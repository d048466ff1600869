"""What the machine can do at most: as it is measured, and which limit binds."""

from __future__ import annotations

import time

import pytest
import torch
from bench_support import LIMITS, case
from torch import Tensor

from fastformer.benchmarks import limits
from fastformer.benchmarks.case import Work

CPU = torch.device("cpu")


def test_limits_bind() -> None:
    assert LIMITS.bound(Work(bytes=100, flops=0), torch.float32) == ("copy", 100 / 1e11)
    assert LIMITS.bound(Work(bytes=2000, flops=0), torch.float32) == ("copy", 2000 / 1e11)
    assert LIMITS.bound(Work(bytes=10**9, flops=0), torch.float32) == ("copy", 0.1)
    assert LIMITS.bound(Work(bytes=10**9, flops=0, reads=True), torch.float32) == ("read", 0.05)
    assert LIMITS.bound(Work(bytes=1000, flops=2 * 10**11), torch.bfloat16) == ("product", 1.0)
    assert LIMITS.bound(Work(bytes=1000, flops=0), torch.float32, 0.5) == ("resident", 0.5)
    assert limits.Limits({}, {}, {}).bound(Work(bytes=1, flops=1), torch.float32) == ("", 0.0)


def test_measured_limits_on_a_fake_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every call takes a second, those at the end half of one."""
    monkeypatch.setattr(limits, "cache_bytes", lambda device: 2**20)
    monkeypatch.setattr(torch.ops.mkldnn, "_linear_pointwise", None)
    seconds = iter([1.0] * 20 * (5 + 2 * 5 + 2) + [0.5] * 20)
    found = limits.measure_limits(CPU, lambda call: next(seconds))
    assert found.copy == found.read == {2**20 * megabytes: 2**20 * megabytes for megabytes in (1, 4, 12, 24, 8)}
    assert found.product == {torch.float32: 2 * 256**3, torch.bfloat16: 2 * 256**3}  # at that rate no larger product
    assert limits.copy_drift(found, CPU, lambda call: next(seconds)) == 1.0
    with pytest.raises(StopIteration):
        next(seconds)


def test_product_limit_is_of_the_larger_product_where_that_is_quick() -> None:
    assert limits.product_rate(torch.bfloat16, CPU, lambda call: 1e-3) == 2 * 1536**3 / 1e-3


def test_resident_seconds_are_those_of_the_rows_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """A call that takes 0.5 ms, and 0.01 ms a row."""

    def call(input: Tensor) -> Tensor:
        end = time.perf_counter() + 5e-4 + 1e-5 * len(input)
        while time.perf_counter() < end:
            pass
        return input

    few = case(call, rows=1000, few=lambda rows: {"input": torch.zeros(rows, 5)})
    expected = 1e-5 * 1000 / torch.get_num_threads()
    assert limits.resident_seconds(few) == pytest.approx(expected, rel=0.2)
    assert limits.resident_seconds(case(call)) == 0
    monkeypatch.setattr(limits, "cache_bytes", lambda device, level: 2 * 24 * 5 * 4 - 1)  # inputs and outputs
    assert limits.resident_seconds(few) == 0
