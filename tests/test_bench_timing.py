"""What the benchmarks measure with: medians and their intervals, warm-up, rounds, host time, memory, the schedule."""

from __future__ import annotations

import random
import time
from functools import partial

import pytest
import torch
from bench_support import Clock

from fastformer.benchmarks import timing
from fastformer.benchmarks.harness import CpuTimer, Pace, Timing, measure
from fastformer.benchmarks.memory import peak_bytes
from fastformer.benchmarks.pace import AUTOTUNE_LAG
from fastformer.benchmarks.timing import Staged, host_seconds

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("samples", "rank"),  # of tables of the sign test, for 95%
    [(6, 1), (8, 1), (9, 2), (10, 2), (12, 3), (15, 4), (20, 6), (25, 8), (30, 10), (50, 18), (100, 40)],
)
def test_confidence_interval_is_between_known_ranks(samples: int, rank: int) -> None:
    seconds = [float(i) for i in range(1, samples + 1)]
    random.Random(0).shuffle(seconds)
    found = Timing.of(seconds)
    assert (found.ci_low, found.ci_high) == (rank, samples + 1 - rank)
    assert found.median == (samples + 1) / 2 and found.samples == samples


@pytest.mark.parametrize("samples", [1, 2, 5])
def test_confidence_interval_of_few_samples_is_their_range(samples: int) -> None:
    found = Timing.of([float(i) for i in range(1, samples + 1)])
    assert (found.ci_low, found.ci_high) == (1, samples)


def test_confidence_interval_holds_the_median_as_often_as_it_says() -> None:
    rng = random.Random(0)
    draws = [Timing.of([rng.expovariate(1.0) for _ in range(15)]) for _ in range(4000)]
    held = sum(draw.ci_low <= 0.6931 <= draw.ci_high for draw in draws) / len(draws)
    assert 0.95 <= held <= 0.98  # exactly 1 - 2 * P(fewer than 4 of 15) = 0.965


def test_medians_and_quartiles_on_a_fake_clock() -> None:
    clock = Clock()
    calls = {"ours": clock.takes(9.0, 1.0, 2.0, 3.0, 4.0, 5.0), "eager": clock.takes(6.0)}  # 9.0 is the warm-up
    timings = measure(calls, CpuTimer(clock), Pace(row_seconds=0.0, min_rounds=5), random.Random(0))
    assert timings == {"ours": Timing(3.0, 2.0, 4.0, 1.0, 5.0, 5), "eager": Timing(*[6.0] * 5, 5)}
    assert timings["ours"].spread == pytest.approx(1 / 3)


def test_warm_up_goes_on_until_times_are_stable() -> None:
    clock = Clock()
    # After nine rounds the medians of the last three and of the three before them are 1.
    calls = {"slow to start": clock.takes(9.0, 5.0, 3.0, 2.0, 1.0), "steady": clock.takes(1.0)}
    measure(calls, CpuTimer(clock), Pace(row_seconds=1e3, min_rounds=1, max_rounds=1), random.Random(0))
    assert clock.now == (9 + 5 + 3 + 2 + 5 * 1) + 9 * 1 + 2


@pytest.mark.parametrize(("row_seconds", "rounds"), [(1e12, timing.WARMUP_ROUNDS), (100.0, 4), (0.0, 1)])
def test_warm_up_that_never_settles_ends(row_seconds: float, rounds: int) -> None:
    """2, 4, 8, ... seconds: four rounds are 30% of 100 seconds."""
    clock, calls = Clock(), []

    def slower_and_slower() -> None:
        calls.append(2.0 ** (len(calls) + 1))
        clock.now += calls[-1]

    pace = Pace(row_seconds=row_seconds, min_rounds=1, max_rounds=1)
    measure({"ours": slower_and_slower}, CpuTimer(clock), pace, random.Random(0))
    assert len(calls) == rounds + 1


def test_rounds_end_with_the_budget_and_are_in_random_order() -> None:
    clock, order = Clock(), []

    def call(name: str) -> None:
        order.append(name)
        clock.now += 1.0

    calls = {name: partial(call, name) for name in "abc"}
    timings = measure(calls, CpuTimer(clock), Pace(row_seconds=30.0), random.Random(0))
    assert all(timing.samples == 10 for timing in timings.values())
    rounds = ["".join(order[i : i + 3]) for i in range(0, len(order), 3)]
    assert len(set(rounds)) > 1 and all(sorted(r) == ["a", "b", "c"] for r in rounds)


def test_call_that_raises_ends_for_itself_alone() -> None:
    def fails() -> None:
        calls.append(1)
        if len(calls) == fails_at:
            raise MemoryError("too\nlittle")

    clock = Clock()
    for fails_at in (1, 3):  # in the warm-up, and after it
        calls: list[int] = []
        timings = measure({"a": fails, "b": clock.takes(2.0)}, CpuTimer(clock), Pace(0.0), random.Random(0))
        assert timings == {"a": "MemoryError: too little", "b": Timing(*[2.0] * 5, 3)} and len(calls) == fails_at


def test_only_the_second_stage_is_timed() -> None:
    clock = Clock()
    first = clock.takes(5.0)

    def then(nothing: None) -> None:
        clock.now += 2.0

    timings = measure({"ours": Staged(first, then)}, CpuTimer(clock), Pace(0.0), random.Random(0))
    assert timings["ours"] == Timing(*[2.0] * 5, 3)
    assert host_seconds(Staged(first, then), CPU, clock) == 2.0


def test_host_seconds_are_a_median() -> None:
    clock = Clock()
    assert host_seconds(clock.takes(9.0, 1.0, 3.0, 2.0, 4.0), CPU, clock) == 3.0


def kilobytes(count: int) -> torch.Tensor:
    return torch.empty(1000 * count, dtype=torch.uint8)


def in_turns() -> list[torch.Tensor]:
    first = kilobytes(1)
    between = kilobytes(3)
    del between
    return [first, kilobytes(1), kilobytes(1)]


def test_peak_memory_of_a_known_pattern() -> None:
    assert peak_bytes(in_turns, CPU) == 4000  # not 6000, of all allocations, nor 3000, of the results
    assert peak_bytes(lambda: None, CPU) == 0
    x = torch.randn(1000)
    assert peak_bytes(lambda: x.exp().mul_(x), CPU) == 4000
    assert peak_bytes(lambda: x.exp() + x, CPU) == 8000


def test_peak_memory_of_a_second_stage_is_beyond_the_first() -> None:
    held = kilobytes(7)
    assert peak_bytes(Staged(lambda: kilobytes(100), lambda x: kilobytes(2)), CPU) == 2000
    assert peak_bytes(Staged(lambda: [kilobytes(100)], lambda x: (x.pop(), kilobytes(2))), CPU) == 2000
    assert peak_bytes(Staged(lambda: [kilobytes(100)], lambda x: (x.clear(), kilobytes(2))), CPU) == 0
    assert len(held) == 7000


def test_pace_wants() -> None:
    assert Pace().wants("sdpa: flash")
    only = Pace(only=["sdpa", "compile: max-autotune"])
    names = ("eager", "sdpa", "sdpa: flash", "compile", "compile: max-autotune")
    assert list(filter(only.wants, names)) == ["sdpa", "sdpa: flash", "compile: max-autotune"]
    skip = Pace(only=["sdpa"], skip=["sdpa: flash", "ours"])
    assert skip.wants("sdpa") and not skip.wants("sdpa: flash") and skip.wants("ours")
    assert not Pace(only=["ours"]).wants("ours: compile") and Pace(only=["ours: compile"]).wants("ours: compile")
    assert Pace(only=["compile"]).wants("ours: compile") and not Pace(skip=["compile"]).wants("ours: compile")


def test_pace_that_is_behind_its_schedule_does_less() -> None:
    def pace(elapsed: float, done: float) -> Pace:
        return Pace(row_seconds=3.0, suite_seconds=100.0, started=time.monotonic() - elapsed, done=done)

    assert pace(50, 0.51).why_not_compile(AUTOTUNE_LAG) == "" and pace(50, 0.51).row_budget() == 3.0
    assert "no time left" in pace(50, 0.47).why_not_compile(AUTOTUNE_LAG)
    assert pace(50, 0.47).why_not_compile() == ""
    assert "no time left" in pace(50, 0.45).why_not_compile() and pace(50, 0.45).row_budget() == 3.0
    assert pace(50, 0.43).row_budget() == pytest.approx(0.3)
    assert Pace(started=-1e9).why_not_compile(AUTOTUNE_LAG) == ""
