"""What a suite consists of, and the loop that runs it: parts with a progress bar, until the end or an interruption."""

from __future__ import annotations

import random
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from importlib import import_module
from itertools import zip_longest
from typing import TypeVar

import torch

import fastformer
from fastformer import backends

from . import bench_hugging_face, bench_models, limits, machine, scaling
from .case import FLEX
from .checking import describe
from .harness import Case, Limits, Pace, Row, Timer, run_case, timer_for
from .scaling import Point

OPERATIONS = ("softmax", "layer_norm", "attention", "linear", "feed_forward", "linear_cross_entropy", "rotary")
MORE_OPERATIONS = ("attention_window", "varlen_attn")
MODELS, HUGGING_FACE, SCALING, END_TO_END = "models", "hugging_face", "scaling", "gpt"
EVERYTHING = (*OPERATIONS, *MORE_OPERATIONS, MODELS, HUGGING_FACE, SCALING, END_TO_END)


@dataclass(frozen=True)
class Suite:
    """Which parts a suite has, and how much time; no ``seconds``: it takes as long as it takes."""

    parts: Sequence[str]
    row_seconds: float
    seconds: float | None = None
    compiles: bool = True
    thorough: bool = False  # torch.compile's max-autotune too


SUITES = {
    "quick": Suite((*OPERATIONS, END_TO_END), row_seconds=0.5, seconds=225),
    "cpu": Suite((*OPERATIONS, SCALING, END_TO_END), row_seconds=0.5, compiles=False),
    "full": Suite(EVERYTHING, row_seconds=0.7, seconds=1260, thorough=True),
    "gpu": Suite(EVERYTHING, row_seconds=0.2, seconds=440, thorough=True),
}
# Operations of which there is no kernel of ours on a kind of device: they would be torch's beside torch's.
TORCHS = {"cpu": frozenset(), "cuda": frozenset({"linear"})}
BACKENDS = {"cpu": "cpu", "cuda": "triton"}  # our own kernels of each kind of device, whatever `auto` would choose
# Seconds that are expected of each piece: for the schedule and the progress bar.
LIMITS_SECONDS = 8.0
CHECK_SECONDS, COMPILE_SECONDS = 0.5, 2.5  # of a case in one mode; max-autotune uses what is left
FLEX_SECONDS = 10.0  # of a case, to compile FlexAttention
MODEL_SECONDS, HUGGING_FACE_SECONDS = 40.0, 5.0  # of a row
SCALING_SECONDS = 0.5  # of a point
END_TO_END_SECONDS = 60.0
SCALING_PACE = Pace(row_seconds=0.2, min_rounds=5)
BAR = "{desc:<50.50} {percentage:3.0f}%|{bar}| {elapsed}, about {remaining} left"


T = TypeVar("T")
Advance = Callable[[float], object]  # told the expected seconds of what has just been done


@dataclass
class Part:
    """A piece of a suite, and what it is expected to take."""

    title: str
    seconds: float
    run: Callable[[Advance], object]
    needed: bool = False  # by the others' numbers, even when the time is over


@dataclass
class Found:
    """What a run has found so far."""

    environment: dict[str, str]
    limits: Limits = field(default_factory=lambda: Limits({}, {}, {}))
    rows: list[Row] = field(default_factory=list)
    points: list[Point] = field(default_factory=list)
    end_to_end: dict | None = None
    interrupted: bool = False


@dataclass
class Runner:
    """Runs what was asked for on one device, with our kernels of one backend."""

    device: torch.device
    backend: str
    suite: str  # of SUITES
    names: Sequence[str]  # of EVERYTHING
    dtypes: Sequence[torch.dtype]
    pace: Pace

    def __post_init__(self) -> None:
        self.timer: Timer = timer_for(self.device)
        self.rng = random.Random(0)
        self.found = Found(machine.environment(self.device))
        self.late: list[str] = []  # what there was no time for

    def run(self) -> Found:
        """All parts. An interruption keeps what there is; a part that raises gets a row that says so."""
        from tqdm import tqdm

        try:
            parts = list(self.parts())
            total = sum(part.seconds for part in parts)
            with tqdm(total=total, smoothing=0, bar_format=BAR, file=sys.stderr) as bar:

                def advance(seconds: float) -> None:
                    bar.update(seconds)
                    self.pace.done = bar.n / total

                expected = 0.0
                for part in parts:
                    bar.set_description_str(part.title)
                    if self.pace.is_over() and not part.needed:
                        self.late.append(part.title)
                    else:
                        self._run_part(part, advance)
                    expected += part.seconds
                    advance(expected - bar.n)  # what the part has not told of
        except KeyboardInterrupt:
            self.found.interrupted = True
        if self.late:
            more = f" and {len(self.late) - 1} more" if len(self.late) > 1 else ""
            self._leave_out(f"{self.late[0]}{more}: no time left")
        return self.found

    def _leave_out(self, what: str) -> None:
        before = self.found.environment.get("left out")
        self.found.environment["left out"] = f"{before}; {what}" if before else what

    def _run_part(self, part: Part, advance: Advance) -> None:
        try:
            part.run(advance)
        except Exception as error:  # such as too little memory; what else there is goes on
            traceback.print_exc()
            self.found.rows.append(Row(part.title, "", "", "", self.backend, problem=describe(error)))

    def parts(self) -> Iterator[Part]:
        """Of the whole run, in order."""
        yield Part("what the machine can do", LIMITS_SECONDS, self._limits, needed=True)
        if MODELS in self.names:  # before the schedule can be late: their compiled variants matter most
            yield Part("whole models", MODEL_SECONDS * bench_models.COUNT, self._models)
        for case in cases_of(self.names, self.suite, self.device, self.backend, self.dtypes):
            yield Part(str(case), self._expected(case), partial(self._case, case))
        lacking = bench_hugging_face.missing() if HUGGING_FACE in self.names else ""
        if lacking:
            self._leave_out(f"models of Hugging Face: {lacking}")
        elif HUGGING_FACE in self.names:
            seconds = HUGGING_FACE_SECONDS * bench_hugging_face.COUNT
            yield Part("models of Hugging Face", seconds, self._hugging_face)
        if SCALING in self.names:
            counts = sorted({1, torch.get_num_threads()}) if self.device.type == "cpu" else [0]
            seconds = SCALING_SECONDS * scaling.count(self.device, self.dtypes) * len(counts)
            yield Part("how times grow", seconds, partial(self._scaling, counts))
        if END_TO_END in self.names:
            yield Part("a GPT trained by torch and by fastformer", END_TO_END_SECONDS, self._end_to_end)
        yield Part("what the machine can still do", 1.0, self._drift, needed=True)

    def _expected(self, case: Case) -> float:
        seconds = self.pace.row_seconds + CHECK_SECONDS
        if case.compiled and self.pace.wants("compile"):
            seconds += COMPILE_SECONDS
        flex = FLEX_SECONDS if callable(case.peers.get(FLEX)) and self.pace.wants(FLEX) else 0.0
        return seconds * sum(mode in self.pace.modes for mode in case.work) + flex

    def _limits(self, advance: Advance) -> None:
        dtypes = dict.fromkeys((torch.float32, torch.bfloat16, *self.dtypes))
        self.found.limits = limits.measure_limits(self.device, self.timer, dtypes)

    def _drift(self, advance: Advance) -> None:
        drift = limits.copy_drift(self.found.limits, self.device, self.timer)
        self.found.limits = replace(self.found.limits, drift=drift)

    def _case(self, case: Case, advance: Advance) -> None:
        with fastformer.backend(self.backend):
            for row in run_case(case, self.backend, self.timer, self.found.limits, self.pace, self.rng):
                self.found.rows.append(row)

    def _models(self, advance: Advance) -> None:
        rows = bench_models.rows(self.device, self.timer, self.found.limits, self.pace, self.rng)
        for row in self._in_time("whole models", rows, bench_models.COUNT):
            self.found.rows.append(row)
            advance(MODEL_SECONDS)

    def _hugging_face(self, advance: Advance) -> None:
        rows = bench_hugging_face.rows(self.device, self.timer, self.found.limits, self.pace, self.rng)
        for row in self._in_time("models of Hugging Face", rows, bench_hugging_face.COUNT):
            self.found.rows.append(row)
            advance(HUGGING_FACE_SECONDS)

    def _scaling(self, counts: Sequence[int], advance: Advance) -> None:
        for threads in counts:
            arguments = (self.device, self.dtypes, threads, self.backend, self.timer, SCALING_PACE, self.rng)
            count = scaling.count(self.device, self.dtypes)
            with fastformer.backend(self.backend):
                for found in self._in_time("how times grow", scaling.points(*arguments), count):
                    (self.found.points if isinstance(found, Point) else self.found.rows).append(found)
                    advance(SCALING_SECONDS)

    def _in_time(self, title: str, found: Iterable[T], count: int) -> Iterator[T]:
        """Of so many, those that begin before the time is over, and always the first."""
        for index, one in enumerate(found, start=1):
            yield one
            if self.pace.is_over() and index < count:
                self.late.append(f"{title} beyond {index} of {count}")
                return

    def _end_to_end(self, advance: Advance) -> None:
        from .bench_gpt import STEPS, Comparison

        with Comparison(self.device, self.backend) as comparison:
            try:
                comparison.run(on_step=lambda: advance(END_TO_END_SECONDS / STEPS))
            finally:
                self.found.end_to_end = comparison.results()


def cases_of(
    names: Sequence[str], suite: str, device: torch.device, backend: str, dtypes: Sequence[torch.dtype]
) -> Iterator[Case]:
    """Those of the named operations, in that order, the dtypes of one shape side by side."""
    for name in dict.fromkeys(names):
        if name not in (*OPERATIONS, *MORE_OPERATIONS) or name in TORCHS[device.type]:
            continue
        cases = import_module(f".bench_{name}", __package__).cases
        known = [dtype for dtype in dtypes if backend != "cuda" or dtype in _cuda_dtypes(name)]
        for same_shape in zip_longest(*(cases(device, dtype, suite) for dtype in known)):
            yield from filter(None, same_shape)


def _cuda_dtypes(name: str) -> tuple[torch.dtype, ...]:
    """Those that the CUDA C++ kernels of an operation, or one of attention's other forms, have."""
    operation = "attention" if name in MORE_OPERATIONS else name
    return backends.CUDA_DTYPES.get(operation, backends.KERNEL_DTYPES)
