"""The machinery of the benchmarks: check a case, then time ours and its peers side by side.

No time without a checked answer: each case is judged against ``fastformer.reference`` (float64) by the rule of
``fastformer.accuracy`` in the same run. Calls are timed as users make them, through ``fastformer.functional``,
fresh outputs included.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from fastformer import accuracy

FORWARD = "fwd"
TRAINING = "fwd+bwd"
# A peer further than this from torch's own answer, as a share of its largest value, computes something else.
PEER_TOLERANCE = 0.05

Function = Callable[..., Tensor | tuple[Tensor, ...]]
Call = Callable[[], object]


@dataclass(frozen=True)
class Work:
    """The least a kernel must do: bytes read and written in main memory, floating-point operations."""

    bytes: int
    flops: int
    reads: bool = False  # whether next to all of the bytes are read


@dataclass(frozen=True)
class Case:
    """One operation at one size and dtype.

    ``inputs()`` draws fresh tensors, passed to every function by name; those that require a gradient are
    differentiated. ``peers`` maps a name to a function of the same arguments, or to the reason why it is not run:
    "eager" (several torch calls or torch's own kernel), "fused" or "fused: which" (torch's fused kernel). ``judged_by``
    names the peer whose error sets the allowance, ``compiled`` the one that is also timed under torch.compile.
    ``few``, of an operation over ``rows`` rows: draws the inputs with so many rows instead.
    """

    operation: str
    shape: str
    dtype: torch.dtype
    inputs: Callable[[], dict[str, Tensor]]
    ours: Function
    reference: Function
    peers: dict[str, Function | str]
    work: dict[str, Work]
    judged_by: str = "eager"
    compiled: str | None = None
    rows: int = 0
    few: Callable[[int], dict[str, Tensor]] | None = None

    def __str__(self) -> str:
        return f"{self.operation} {self.shape} {short_name(self.dtype)}"


@dataclass(frozen=True)
class Timing:
    """Seconds per call: the median and the quartiles of ``samples`` calls."""

    median: float
    low: float
    high: float
    samples: int

    @classmethod
    def of(cls, seconds: list[float]) -> Timing:
        if len(seconds) == 1:
            return cls(seconds[0], seconds[0], seconds[0], 1)
        low, median, high = statistics.quantiles(seconds, n=4, method="inclusive")
        return cls(median, low, high, len(seconds))

    @property
    def spread(self) -> float:
        """Half the interquartile range, as a share of the median."""
        return (self.high - self.low) / (2 * self.median)


@dataclass
class Row:
    """One line of the table. A peer that has no time has the reason in its place; so has ours, in ``problem``."""

    operation: str
    shape: str
    dtype: str
    mode: str
    backend: str
    ours: Timing | None = None
    problem: str = ""
    error_share: float | None = None  # the worst row's error as a share of what the rule allows
    peers: dict[str, Timing | str] = field(default_factory=dict)
    limit: str = ""  # what bounds the case: one of Limits.bound
    limit_seconds: float = 0.0

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


@dataclass
class Pace:
    """How much time to spend. Under ``suite_seconds``, a slow machine gets fewer samples and compiles fewer peers."""

    row_seconds: float = 0.5
    min_rounds: int = 3
    max_rounds: int = 100
    compile: bool = True
    suite_seconds: float | None = None
    started: float = field(default_factory=time.monotonic)

    def late(self, share: float) -> bool:
        """Has this share of the suite's time passed?"""
        return self.suite_seconds is not None and time.monotonic() - self.started > share * self.suite_seconds

    def why_not_compile(self) -> str:
        """The reason not to compile another peer, "" if there is none."""
        if not self.compile:
            return "not asked for (--no-compile)"
        return "no time left for compiling in the quick suite" if self.late(0.5) else ""


class CpuTimer:
    """Seconds of one call by the wall clock. The result is freed outside of the measurement."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self.clock = clock

    def __call__(self, call: Call) -> float:
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
        self.flush.zero_()
        self.start.record()
        result = call()
        self.end.record()
        self.end.synchronize()
        del result
        return self.start.elapsed_time(self.end) / 1e3


Timer = Callable[[Call], float]


def timer_for(device: torch.device) -> Timer:
    return CudaTimer(device) if device.type == "cuda" else CpuTimer()


def short_name(dtype: torch.dtype) -> str:
    return {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}[dtype]


def measure(calls: dict[str, Call], timer: Timer, pace: Pace, rng: random.Random) -> dict[str, Timing]:
    """Times the calls in rounds: each round runs every call once, in random order. The first round warms up."""
    samples: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        timer(call)
    budget = 0.0 if pace.late(0.65) else pace.row_seconds
    spent, rounds = 0.0, 0
    while rounds < pace.min_rounds or (spent < budget and rounds < pace.max_rounds):
        for name in rng.sample(list(calls), len(calls)):
            seconds = timer(calls[name])
            samples[name].append(seconds)
            spent += seconds
        rounds += 1
    return {name: Timing.of(seconds) for name, seconds in samples.items()}


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


def run_case(case: Case, backend: str, timer: Timer, limits: Limits, pace: Pace, rng: random.Random) -> Iterator[Row]:
    """Checks the case and yields a row for each of its modes, timed only where the answer is right."""
    inputs = case.inputs()
    check = Check(case, inputs)
    for mode, work in case.work.items():
        row = Row(case.operation, case.shape, short_name(case.dtype), mode, backend)
        ours = check.caller(mode, case.ours)
        row.problem, row.error_share = check.verdict(mode, ours)
        resident = resident_seconds(case) if mode == FORWARD and not row.problem else 0.0
        row.limit, row.limit_seconds = limits.bound(work, case.dtype, resident)
        if not row.problem:
            calls = {"ours": ours}
            for name, function in _peers(case, pace):
                if isinstance(function, str):
                    row.peers[name] = function
                    continue
                call = check.caller(mode, function)
                if problem := check.difference(mode, call):
                    row.peers[name] = problem
                else:
                    calls[name] = call
            timings = measure(calls, timer, pace, rng)
            row.ours = timings.pop("ours")
            row.peers |= timings
        yield row


def _peers(case: Case, pace: Pace) -> Iterator[tuple[str, Function | str]]:
    """The case's peers by name, the compiled one last; instead of a function, the reason why there is none."""
    yield from case.peers.items()
    if case.compiled is None:
        return
    if reason := pace.why_not_compile():
        yield "compile", reason
        return
    torch._dynamo.reset()  # else the code object's limit of recompilations makes later cases run eagerly
    yield "compile", torch.compile(case.peers[case.compiled], fullgraph=True, dynamic=False)


class Check:
    """The right answers to one case, and torch's: what every function of the case is judged by."""

    def __init__(self, case: Case, inputs: dict[str, Tensor]) -> None:
        self.inputs = inputs
        self.leaves = [name for name, x in inputs.items() if x.requires_grad]
        standard = case.peers[case.judged_by]
        outputs = _tuple(standard(**inputs))
        self.grad_outputs = [torch.randn_like(x) for x in outputs]
        self.names = [f"output {i}" if i else "output" for i in range(len(outputs))]
        self.names += [f"gradient of {name}" for name in self.leaves]
        widest = TRAINING if TRAINING in case.work else FORWARD
        self.torchs = {mode: self.caller(mode, standard)() for mode in case.work}
        self.exact = self._call(widest, case.reference, _double(inputs), [x.double() for x in self.grad_outputs])

    def caller(self, mode: str, function: Function) -> Callable[[], tuple[Tensor, ...]]:
        """The function on the inputs: its outputs, followed in training by the gradients."""
        return lambda: self._call(mode, function, self.inputs, self.grad_outputs)

    def _call(
        self, mode: str, function: Function, inputs: dict[str, Tensor], grad_outputs: list[Tensor]
    ) -> tuple[Tensor, ...]:
        if mode == FORWARD:
            with torch.no_grad():
                return _tuple(function(**inputs))
        outputs = _tuple(function(**inputs))
        return outputs + torch.autograd.grad(outputs, [inputs[name] for name in self.leaves], grad_outputs)

    def verdict(self, mode: str, call: Callable[[], tuple[Tensor, ...]]) -> tuple[str, float | None]:
        """Judges ours: (what is wrong with the answer or "", worst error as a share of the allowed one)."""
        answers, problem = self._answers(mode, call)
        worst = 0.0
        for index, ours in enumerate(answers):
            is_output = index < len(self.grad_outputs)
            factor = accuracy.FORWARD_FACTOR if is_output else accuracy.GRADIENT_FACTOR
            verdict = accuracy.judge(ours, self.torchs[mode][index], self.exact[index], factor=factor)
            share = verdict.error / verdict.allowed
            if not verdict.ok:
                return f"wrong {self.names[index]}: {share:.3g}x the allowed error", share
            worst = max(worst, share)
        return problem, None if problem else worst

    def difference(self, mode: str, call: Callable[[], tuple[Tensor, ...]]) -> str:
        """Makes sure that a peer computes the same thing: what is wrong with its answer or ""."""
        answers, problem = self._answers(mode, call)
        for name, peer, torchs in zip(self.names, answers, self.torchs[mode]):
            # Not `distance > tolerance`: NaN must count as different.
            if not (peer - torchs).abs().max() <= PEER_TOLERANCE * torchs.abs().max():
                return f"computes something else: {name}"
        return problem

    def _answers(self, mode: str, call: Callable[[], tuple[Tensor, ...]]) -> tuple[tuple[Tensor, ...], str]:
        """(what the call returned, ""), or ((), the problem). A call that can't run must not end the suite."""
        try:
            answers = call()
        except Exception as error:
            return (), f"{type(error).__name__}: {' '.join(str(error).split())}"
        shapes, expected = ([tuple(x.shape) for x in xs] for xs in (answers, self.torchs[mode]))
        return (answers, "") if shapes == expected else ((), f"wrong shapes {shapes}, not {expected}")


def _tuple(result: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return result if isinstance(result, tuple) else (result,)


def _double(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    return {
        name: x.detach().double().requires_grad_(x.requires_grad) if x.is_floating_point() else x
        for name, x in inputs.items()
    }
