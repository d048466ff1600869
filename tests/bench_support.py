"""What the tests of the benchmarks share: a clock that only calls advance, and a case small enough to follow."""

from __future__ import annotations

import random
from collections.abc import Callable

import torch
from torch import Tensor

from fastformer.benchmarks import harness
from fastformer.benchmarks.harness import BACKWARD, FORWARD, TRAINING, Case, Limits, Pace, Work

LIMITS = Limits(
    copy={2**10: 1e11, 2**20: 1e10},
    read={2**10: 2e11, 2**20: 2e10},
    product={torch.float32: 1e11, torch.bfloat16: 2e11},
)
PACE = Pace(row_seconds=0.0)


class Clock:
    """Advances only when a call says so."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def takes(self, *seconds: float) -> Callable[[], None]:
        """A call that takes these seconds, one after the other; the last ones for ever."""
        left = list(seconds)

        def call() -> None:
            self.now += left.pop(0) if len(left) > 1 else left[0]

        return call


def double(input: Tensor) -> Tensor:
    return 2 * input


def wrong_value(input: Tensor) -> Tensor:
    return 2.001 * input


def case(ours: object = double, **changes: object) -> Case:
    """Doubling, 3 x 5."""
    settings = {
        "operation": "double",
        "shape": "3x5",
        "dtype": torch.float32,
        "inputs": lambda: {"input": torch.randn(3, 5, requires_grad=True)},
        "ours": ours,
        "reference": lambda input: 2 * input,
        "peers": {"eager": double},
        "work": {
            FORWARD: Work(bytes=120, flops=15),
            BACKWARD: Work(bytes=120, flops=15),
            TRAINING: Work(bytes=240, flops=30),
        },
    }
    return Case(**(settings | changes))


def rows_of(the_case: Case, pace: Pace = PACE) -> list[harness.Row]:
    return list(harness.run_case(the_case, "cpu", harness.CpuTimer(), LIMITS, pace, random.Random(0)))
