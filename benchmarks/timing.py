"""How long a call takes: timers, rounds in random order, medians with their confidence intervals."""

from __future__ import annotations

import math
import random
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from .pace import Pace

CONFIDENCE = 0.95
# A call is warm when the median of so many samples differs by at most STABLE from that of as many before them.
WINDOW = 3
STABLE = 0.05
WARMUP_ROUNDS = 30  # at most
WARMUP_SHARE = 0.3  # of a row's time, at most

Call = Callable[[], object]
Timer = Callable[[Call], float]  # seconds of one call


@dataclass(frozen=True)
class Timing:
    """Seconds of one call, of ``samples`` calls: median, quartiles and the 95% confidence interval of the median."""

    median: float
    low: float
    high: float
    ci_low: float
    ci_high: float
    samples: int

    @classmethod
    def of(cls, seconds: list[float]) -> Timing:
        """From the samples, at least one.

        The interval is between two order statistics: how many samples lie below the median is binomial, whatever their
        distribution. Fewer than six samples can't have such an interval: then it is all of their range.
        """
        ordered = sorted(seconds)
        rank = max(interval_rank(len(ordered)), 1)
        interval = ordered[rank - 1], ordered[-rank]
        if len(ordered) == 1:
            return cls(*ordered, *ordered, *ordered, *interval, 1)
        low, median, high = statistics.quantiles(ordered, n=4, method="inclusive")
        return cls(median, low, high, *interval, len(ordered))

    @property
    def spread(self) -> float:
        """Half the interquartile range, as a share of the median."""
        return (self.high - self.low) / (2 * self.median)


def interval_rank(count: int, confidence: float = CONFIDENCE) -> int:
    """The largest r such that the median lies between the r-th smallest and the r-th largest of so many; 0: none.

    It lies below the r-th smallest where fewer than r of them are below it.
    """
    tail, rank = 0.0, 0
    while rank < count:
        tail += math.comb(count, rank) / 2**count
        if tail > (1 - confidence) / 2:
            break
        rank += 1
    return rank


@dataclass(frozen=True)
class Staged:
    """A call of which only the second part is timed: ``then`` takes what ``first`` returned."""

    first: Callable[[], Any]
    then: Callable[[Any], object]

    def __call__(self) -> object:
        return self.then(self.first())


def prepared(call: Call) -> Call:
    """What is to be timed of a call, once; the part before it is done now."""
    return partial(call.then, call.first()) if isinstance(call, Staged) else call


class CpuTimer:
    """Seconds of one call by the wall clock. The result is freed outside of the measurement.

    Caches are as what ran before has left them: mostly another contestant on the same inputs, or the first stage.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self.clock = clock

    def __call__(self, call: Call) -> float:
        call = prepared(call)
        start = self.clock()
        result = call()
        seconds = self.clock() - start
        del result
        return seconds


class CudaTimer:
    """Seconds of one call by CUDA events, the L2 cache flushed before it."""

    def __init__(self, device: torch.device) -> None:
        size = torch.cuda.get_device_properties(device).L2_cache_size
        self.flush = torch.empty(4 * size, dtype=torch.int8, device=device)
        self.start, self.end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def __call__(self, call: Call) -> float:
        call = prepared(call)
        self.flush.zero_()
        self.start.record()
        result = call()
        self.end.record()
        self.end.synchronize()
        del result
        return self.start.elapsed_time(self.end) / 1e3


def timer_for(device: torch.device) -> Timer:
    """The timer of a kind of device."""
    return CudaTimer(device) if device.type == "cuda" else CpuTimer()


def measure(calls: dict[str, Call], timer: Timer, pace: Pace, rng: random.Random) -> dict[str, Timing | str]:
    """Times the calls in rounds: each round runs every call once, in random order.

    Rounds before all calls are warm don't count (see WINDOW and what follows it); there is one of them at least. A call
    that raises has no part in what follows, and the reason in place of its time.
    """
    budget = pace.row_budget()
    failures: dict[str, str] = {}
    warmup: dict[str, list[float]] = {name: [] for name in calls}
    samples: dict[str, list[float]] = {name: [] for name in calls}

    def run_round(seconds: dict[str, list[float]]) -> float:
        spent = 0.0
        for name in rng.sample(list(seconds), len(seconds)):
            try:
                seconds[name].append(timer(calls[name]))
            except Exception as error:  # such as too little memory beside what the others keep
                failures[name] = describe(error)
                warmup.pop(name, None)
                samples.pop(name, None)
            else:
                spent += seconds[name][-1]
        return spent

    spent, rounds = run_round(warmup), 1
    while rounds < WARMUP_ROUNDS and spent < WARMUP_SHARE * budget and not all(map(_is_stable, warmup.values())):
        spent += run_round(warmup)
        rounds += 1

    spent, rounds = 0.0, 0
    while rounds < pace.min_rounds or (spent < budget and rounds < pace.max_rounds):
        spent += run_round(samples)
        rounds += 1
    return {name: failures.get(name) or Timing.of(samples[name]) for name in calls}


def _is_stable(seconds: list[float]) -> bool:
    if len(seconds) < 2 * WINDOW:
        return False
    before, last = (statistics.median(x) for x in (seconds[-2 * WINDOW : -WINDOW], seconds[-WINDOW:]))
    return abs(last - before) <= STABLE * before


def describe(error: Exception) -> str:
    """An exception in one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def host_seconds(call: Call, device: torch.device, clock: Callable[[], float] = time.perf_counter) -> float:
    """The median time until a call returns, of up to 50 calls; on a GPU nothing is queued before each of them."""
    seconds: list[float] = []
    while len(seconds) < 5 or (len(seconds) < 50 and sum(seconds) < 0.02):
        once = prepared(call)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        start = clock()
        result = once()
        seconds.append(clock() - start)
        del result
    return statistics.median(seconds)


def captured(call: Call, device: torch.device) -> Call:
    """A call that replays the CUDA graph of this one, for its time without the host's.

    Of a Staged call its second part, over and over on what the first has returned once.

    Raises:
        Exception: whatever the call raises when it can't be captured.
    """
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        for _ in range(3):  # autotuning, libraries' workspaces: what happens in first calls and can't be captured
            call()
        # A backward pass runs on the stream of its forward pass, which must be the one that is captured.
        once = prepared(call)
    torch.cuda.current_stream(device).wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        result = once()

    def replay(_alive: Call = once) -> object:  # the graph reads what the first part returned
        graph.replay()
        return result

    return replay
