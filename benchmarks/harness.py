"""The machinery of the benchmarks: check a case, then time ours and its peers side by side.

No time without a checked answer: each case is judged against ``fastformer.reference`` (float64) by the rule of
``fastformer.accuracy`` in the same run. Calls are timed as users make them, through ``fastformer.functional``,
fresh outputs included.
"""

from __future__ import annotations

import random
import sys
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import TypeVar

import torch

from .case import AUTOTUNED, BACKWARD, COMPILE, FLEX, FORWARD, MODES, OURS, TRAINING, Case, Function, Work, short_name
from .checking import Check, as_tuple, caller, describe
from .limits import Limits, resident_seconds
from .memory import peak_bytes
from .pace import AUTOTUNE_LAG, COMPILE_LAG, Pace
from .timing import Call, CpuTimer, CudaTimer, Timer, Timing, captured, host_seconds, measure, timer_for

# What the files of the operations and of the whole models need, from one place.
__all__ = [
    "BACKWARD",
    "COMPILE",
    "FORWARD",
    "MODES",
    "OURS",
    "TRAINING",
    "Case",
    "CpuTimer",
    "CudaTimer",
    "Function",
    "Limits",
    "Pace",
    "Row",
    "Timer",
    "Timing",
    "Work",
    "measure",
    "of_each",
    "peers",
    "run_case",
    "short_name",
    "timer_for",
]

T = TypeVar("T")


@dataclass
class Row:
    """One line of the table. A peer that has no time has the reason in its place; so has ours, in ``problem``."""

    operation: str
    shape: str
    dtype: str
    mode: str
    backend: str
    sizes: dict[str, int] = field(default_factory=dict)
    ours: Timing | None = None
    problem: str = ""
    error_share: float | None = None  # the worst row's error as a share of what the rule allows
    peers: dict[str, Timing | str] = field(default_factory=dict)
    limit: str = ""  # what bounds the case: one of Limits.bound, "" where no limits were measured
    limit_seconds: float = 0.0
    bytes: int = 0  # of Work
    flops: int = 0
    # By name, ours among them. Host seconds a call: on a GPU until it returns, on a CPU those of a call on one row.
    overhead: dict[str, float] = field(default_factory=dict)
    memory: dict[str, int] = field(default_factory=dict)  # peak bytes during a call beyond its inputs
    tokens: int = 0  # of whole models: a call's

    def speedups(self) -> dict[str, float]:
        """How many times faster ours is than each peer that was timed."""
        if self.ours is None:
            return {}
        return {name: peer.median / self.ours.median for name, peer in self.peers.items() if isinstance(peer, Timing)}

    def limit_share(self) -> float | None:
        """The share of the machine's limit that ours reaches."""
        return self.limit_seconds / self.ours.median if self.ours and self.limit else None


def run_case(case: Case, backend: str, timer: Timer, limits: Limits, pace: Pace, rng: random.Random) -> Iterator[Row]:
    """Checks the case and yields a row for each of its modes that is wanted, timed only where the answer is right."""
    modes = [mode for mode in case.work if mode in pace.modes]
    if not modes:
        return
    # Of the case alone, so that its inputs are the same whatever was run before it.
    torch.manual_seed(zlib.crc32(str(case).encode()))
    try:
        check, broken, contestants = Check(case, modes), "", list(peers(case, pace))
    except Exception as error:  # such as too little memory for the reference; the other cases go on
        check, broken, contestants = None, f"can't be checked: {describe(error)}", []
    for mode in modes:
        work = case.work[mode]
        row = Row(case.operation, case.shape, short_name(case.dtype), mode, backend, case.sizes)
        row.bytes, row.flops, row.problem = work.bytes, work.flops, broken
        if check:
            _fill(row, case, contestants, check, timer, pace, rng)
        resident = resident_seconds(case) if mode == FORWARD and not row.problem else 0.0
        row.limit, row.limit_seconds = limits.bound(work, case.dtype, resident)
        yield row


def _fill(
    row: Row,
    case: Case,
    contestants: list[tuple[str, Function | str]],
    check: Check,
    timer: Timer,
    pace: Pace,
    rng: random.Random,
) -> None:
    """The verdict, and where it is good the times, of ours and the peers, and what else is measured of them."""
    device = check.grad_outputs[0].device
    plain: dict[str, Call] = {}  # the calls as they are without CUDA graphs
    calls: dict[str, Call] = {}

    def ready(name: str, function: Function) -> str:
        """Makes the call and looks at its first answer: what is wrong, or ""."""
        plain[name] = check.caller(row.mode, function, copies=name in case.in_place)
        try:
            calls[name] = captured(plain[name], device) if pace.cuda_graphs else plain[name]
        except Exception as error:
            return f"no CUDA graph: {describe(error)}"
        if name != OURS:
            return check.difference(row.mode, calls[name])
        problem, row.error_share = check.verdict(row.mode, calls[name])
        return problem

    row.problem = ready(OURS, case.ours)
    if row.problem:
        return
    for name, function in contestants:
        if problem := function if isinstance(function, str) else ready(name, function):
            row.peers[name] = problem
            calls.pop(name, None)
    timings = measure(calls, timer, pace, rng)
    _look_again(row, check, calls, timings)
    if row.problem:
        return
    row.ours = timings.pop(OURS)
    row.peers |= timings
    timed = [OURS, *(name for name, timing in timings.items() if isinstance(timing, Timing))]
    # Under "max-autotune" torch.compile keeps a CUDA graph's memory in a pool where it is not seen.
    pooled = [AUTOTUNED] if device.type == "cuda" and not pace.cuda_graphs else []
    row.memory = of_each(partial(peak_bytes, device=device), {n: plain[n] for n in timed if n not in pooled})
    if device.type == "cuda":
        row.overhead = of_each(partial(host_seconds, device=device), {name: calls[name] for name in timed})
    elif case.few is not None:
        functions = {OURS: case.ours} | {name: f for name, f in contestants if name in timed}
        row.overhead = _overhead_of_a_row(row.mode, case, check, functions)


def _look_again(row: Row, check: Check, calls: dict[str, Call], timings: dict[str, Timing | str]) -> None:
    """Puts what is wrong now into the row's problem, or in place of a peer's time: first answers prove little of a
    CUDA graph that is replayed, or of a kernel that is chosen by the calls before."""
    for name, call in calls.items():
        if isinstance(timings[name], str):
            problem = timings[name]
        elif name == OURS:
            problem, share = check.verdict(row.mode, call)
            row.error_share = max(row.error_share, share or 0.0)
            problem = problem and f"after {timings[name].samples} calls: {problem}"
        else:
            problem = check.difference(row.mode, call)
        if problem and name == OURS:
            row.problem = problem
        elif problem:
            timings[name] = problem


def of_each(measured: Callable[[Call], T], calls: dict[str, Call]) -> dict[str, T]:
    """By name, without those that raise: what has a time has it whatever else can't be measured of it."""
    found = {}
    for name, call in calls.items():
        try:
            found[name] = measured(call)
        except Exception as error:
            print(f"{name}: {describe(error)}", file=sys.stderr)
    return found


def _overhead_of_a_row(mode: str, case: Case, check: Check, functions: dict[str, Function]) -> dict[str, float]:
    """Row.overhead on a CPU."""
    inputs = {name: x.requires_grad_(check.inputs[name].requires_grad) for name, x in case.few(1).items()}
    with torch.no_grad():
        grad_outputs = [torch.randn_like(x) for x in as_tuple(case.ours(**inputs))]
    calls = {
        name: caller(mode, function, inputs, grad_outputs)
        for name, function in functions.items()
        if name not in (COMPILE, AUTOTUNED)  # would be compiled again
    }
    return of_each(partial(host_seconds, device=check.grad_outputs[0].device), calls)


def peers(case: Case, pace: Pace) -> Iterator[tuple[str, Function | str]]:
    """The case's peers by name, the compiled ones last; instead of a function, the reason why there is none."""
    for name, peer in case.peers.items():
        if pace.wants(name):
            yield name, (name == FLEX and callable(peer) and pace.why_not_compile()) or peer
    if case.compiled is None or isinstance(case.peers[case.compiled], str):
        return
    # A CUDA graph around what has CUDA graphs of its own can't be captured.
    thorough = "max-autotune-no-cudagraphs" if pace.cuda_graphs else "max-autotune"
    modes = {COMPILE: None} | ({AUTOTUNED: thorough} if pace.thorough else {})
    wanted = {name: mode for name, mode in modes.items() if pace.wants(name)}
    if wanted:
        torch._dynamo.reset()  # else the code object's limit of recompilations makes later cases run eagerly
    for name, mode in wanted.items():
        reason = pace.why_not_compile(AUTOTUNE_LAG if mode else COMPILE_LAG)
        yield name, reason or _compiled(case.peers[case.compiled], mode)


def _compiled(function: Function, mode: str | None) -> Function:
    if mode:
        from torch._inductor import select_algorithm  # slow to import

        select_algorithm.PRINT_AUTOTUNE = False  # a table for each product, over the progress bar
    return torch.compile(function, fullgraph=True, dynamic=False, mode=mode)
