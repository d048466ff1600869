"""The machinery of the benchmarks: check a case, then time ours and its peers side by side.

No time without a checked answer: each case is judged against ``fastformer.reference`` (float64) by the rule of
``fastformer.accuracy`` in the same run. Calls are timed as users make them, through ``fastformer.functional``,
fresh outputs included.
"""

from __future__ import annotations

import random
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial

import torch

from .case import BACKWARD, FORWARD, IMPLEMENTATIONS, MODES, OURS, TRAINING, Case, Function, Work, short_name
from .checking import Check, as_tuple, caller, describe
from .memory import peak_bytes
from .pace import Pace
from .timing import Call, CpuTimer, CudaTimer, Timer, Timing, captured, host_seconds, measure, timer_for

# What the files of the operations and of the whole models need, from one place.
__all__ = [
    "BACKWARD",
    "COMPILE",
    "FORWARD",
    "IMPLEMENTATIONS",
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
    "peers",
    "resident_seconds",
    "run_case",
    "short_name",
    "timer_for",
]

COMPILE, AUTOTUNED = "compile", "compile: max-autotune"


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
    limit: str = ""  # what bounds the case: one of Limits.bound
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
        return self.limit_seconds / self.ours.median if self.ours else None


@dataclass(frozen=True)
class Limits:
    """What the machine can do, measured in this run. Bytes/s depend on how many bytes there are: caches."""

    copy: dict[int, float]  # bytes read and written -> bytes/s
    read: dict[int, float]  # bytes -> bytes/s
    product: dict[torch.dtype, float]  # FLOP/s
    drift: float = 0.0  # how far the copy rates at the run's end are from the first ones, as a share

    def bound(self, work: Work, dtype: torch.dtype, resident: float = 0.0) -> tuple[str, float]:
        """(name, seconds) of the limit that binds: "copy", "read", "product", or "resident", see resident_seconds."""
        name, rates = ("read", self.read) if work.reads else ("copy", self.copy)
        measured = max((size for size in rates if size <= work.bytes), default=min(rates))
        limits = {
            name: work.bytes / rates[measured],
            "product": work.flops / self.product[dtype],
            "resident": resident,
        }
        binding = max(limits, key=limits.__getitem__)
        return binding, limits[binding]


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
    functions: dict[str, Function] = {OURS: case.ours}
    calls: dict[str, Call] = {}

    def ready(function: Function) -> Call:
        call = check.caller(row.mode, function)
        return captured(call, device) if pace.cuda_graphs else call

    try:
        calls[OURS] = ready(case.ours)
    except Exception as error:
        row.problem = f"no CUDA graph: {describe(error)}"
        return
    row.problem, row.error_share = check.verdict(row.mode, calls[OURS])
    if row.problem:
        return
    for name, function in contestants:
        if isinstance(function, str):
            row.peers[name] = function
            continue
        try:
            call = ready(function)
        except Exception as error:
            row.peers[name] = f"no CUDA graph: {describe(error)}"
            continue
        if problem := check.difference(row.mode, call):
            row.peers[name] = problem
        else:
            functions[name], calls[name] = function, call
    timings = measure(calls, timer, pace, rng)
    row.ours = timings.pop(OURS)
    row.peers |= timings
    row.memory = {name: peak_bytes(check.caller(row.mode, function), device) for name, function in functions.items()}
    row.overhead = _overhead(row.mode, case, check, functions, calls)


def _overhead(
    mode: str, case: Case, check: Check, functions: dict[str, Function], calls: dict[str, Call]
) -> dict[str, float]:
    """Row.overhead: on a GPU of the calls as they were timed, on a CPU of the same functions on a single row."""
    device = check.grad_outputs[0].device
    if device.type == "cuda":
        return {name: host_seconds(call, device) for name, call in calls.items()}
    if case.few is None:
        return {}
    inputs = {name: x.requires_grad_(check.inputs[name].requires_grad) for name, x in case.few(1).items()}
    with torch.no_grad():
        grad_outputs = [torch.randn_like(x) for x in as_tuple(case.ours(**inputs))]
    return {
        name: host_seconds(caller(mode, function, inputs, grad_outputs), device)
        for name, function in functions.items()
        if name not in (COMPILE, AUTOTUNED)  # would be compiled again
    }


def peers(case: Case, pace: Pace) -> Iterator[tuple[str, Function | str]]:
    """The case's peers by name, the compiled ones last; instead of a function, the reason why there is none."""
    yield from ((name, peer) for name, peer in case.peers.items() if pace.wants(name))
    if case.compiled is None or isinstance(case.peers[case.compiled], str):
        return
    # A CUDA graph around what has CUDA graphs of its own can't be captured.
    thorough = "max-autotune-no-cudagraphs" if pace.cuda_graphs else "max-autotune"
    modes = {COMPILE: None} | ({AUTOTUNED: thorough} if pace.thorough else {})
    wanted = {name: mode for name, mode in modes.items() if pace.wants(name)}
    if wanted:
        torch._dynamo.reset()  # else the code object's limit of recompilations makes later cases run eagerly
    for name, mode in wanted.items():
        reason = pace.why_not_compile(autotune=mode is not None)
        yield name, reason or _compiled(case.peers[case.compiled], mode)


def _compiled(function: Function, mode: str | None) -> Function:
    if mode:
        from torch._inductor import select_algorithm  # slow to import

        select_algorithm.PRINT_AUTOTUNE = False  # a table for each product, over the progress bar
    return torch.compile(function, fullgraph=True, dynamic=False, mode=mode)


def resident_seconds(case: Case) -> float:
    """The CPU kernel's forward over rows that don't leave the first caches: what its arithmetic alone takes.

    From what one thread needs for 16 rows more than for 8, so that the call itself doesn't count.
    """
    if case.few is None:
        return 0.0
    threads, timer = torch.get_num_threads(), CpuTimer()
    torch.set_num_threads(1)
    try:
        with torch.no_grad():
            calls = {rows: partial(case.ours, **case.few(rows)) for rows in (8, 24)}
            best = {rows: min(timer(call) for _ in range(1000)) for rows, call in calls.items()}
    finally:
        torch.set_num_threads(threads)
    return (best[24] - best[8]) / 16 * case.rows / threads
