"""``fastformer tune``: from how many elements on ours is faster than torch's, measured on this machine.

Every call is timed in turn with torch's. The quotient of two calls that follow each other is hardly moved by a machine
whose speed drifts, so that quotients are what the rule goes by. ``fastformer.tuning`` keeps what is found, and ``auto``
goes by it from the next import on.
"""

from __future__ import annotations

import argparse
import datetime
import os
import random
import statistics
import sys
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby, pairwise
from pathlib import Path
from typing import NamedTuple

import torch

import fastformer
from fastformer import backends, tuning
from fastformer.models.files import require

from . import timing
from .case import FORWARD, TRAINING
from .checking import Check
from .machine import available_threads
from .timing import Call, Timer, describe, interval_rank, timer_for
from .tune_trials import OPERATIONS, STANDARD, Trial, trials, widths_of

# After so many rounds of calls it is looked at which is faster. However the looks end, noise passes for a difference in
# at most 5% of all cases: CONFIDENCE is that of each look, and the looks share the 5% (Bonferroni).
LOOKS = (8, 16, 32, 64, 128, 256)
CONFIDENCE = 1 - (1 - timing.CONFIDENCE) / len(LOOKS)
CLEAR_ROUNDS = 32  # before so many nothing ends because it is clear: a disturbance may outlast fewer short calls
CALL_SECONDS = 0.5  # of calls at one size; the first look after them is the last
LONGEST = 1.0  # seconds of torch's call; what takes longer is left out
AS_FAST = 0.97  # a smaller quotient is slower; between this and 1 they are as fast

BAR = "{desc:<44.44} {percentage:3.0f}%|{bar}| {elapsed}, about {remaining} left"
TORCH = "torch"
BROKEN = "a wrong answer, or it can't run"
MODES = (FORWARD, TRAINING)


class Point(NamedTuple):
    """How many times as fast as torch's ours is at one size: the median, and its confidence interval (see LOOKS)."""

    elements: int
    low: float
    median: float
    high: float


#: Of one operation or form, in one dtype, by one kernel of ours: the points of each of MODES.
Points = dict[str, list[Point]]


@dataclass
class Found:
    """What came out of the trials."""

    points: dict[tuple[str, torch.dtype], dict[str, Points]] = field(default_factory=dict)  # of forms, by kernel
    broken: dict[tuple[str, torch.dtype], dict[str, str]] = field(default_factory=dict)  # of operations, by kernel: why
    skipped: list[str] = field(default_factory=list)  # trials that couldn't be run, and why

    def add(
        self, trial: Trial, dtype: torch.dtype, kernels: Sequence[str], device: torch.device, rng: random.Random
    ) -> None:
        """Runs a trial with the kernels that nothing is wrong with so far."""
        broken = self.broken.setdefault((_base(trial.operation), dtype), {})
        kernels = [kernel for kernel in kernels if kernel not in broken]
        if not kernels:
            return
        try:
            points, problems = measure_trial(trial, dtype, kernels, device, rng)
        except Exception as error:  # such as too little memory for the exact answer; the other trials go on
            self.skipped.append(f"{_title(trial, dtype)}: {describe(error)}")
            return
        for kernel, problem in problems.items():
            broken[kernel] = f"{kernel}, {_title(trial, dtype)}: {problem}"
        for mode, of_kernels in points.items():
            for kernel, point in of_kernels.items():
                of_form = self.points.setdefault((trial.operation, dtype), {})
                of_form.setdefault(kernel, {}).setdefault(mode, []).append(point)


def least_elements(points: Iterable[Point]) -> int | None:
    """The smallest measured size at which ours is faster beyond noise, and from which on it is slower at none.

    tuning.NEVER if, beyond noise, ours is slower at a size above all where it is faster. None if that is left open, as
    it is by an interval that begins below AS_FAST.
    """
    found = None
    ordered = sorted(points, key=lambda point: point.elements, reverse=True)
    for elements, group in groupby(ordered, key=lambda point: point.elements):
        same = list(group)
        if any(point.low < AS_FAST for point in same):
            return tuning.NEVER if found is None and any(map(_is_slower, same)) else found
        if all(point.low > 1 for point in same):
            found = elements
    return found


def _is_slower(point: Point) -> bool:
    return point.high < AS_FAST


def _beyond_slower(least: int, points: Sequence[Point]) -> int:
    """``least``, or the next measured size where it is not above all sizes at which ours is slower."""
    slowest = max((point.elements for point in points if _is_slower(point)), default=-1)
    if least > slowest:
        return least
    return min((point.elements for point in points if point.elements > slowest), default=tuning.NEVER)


def entries(
    found: Found,
    old: Sequence[tuning.Entry],
    evidence: Mapping[tuple[str, torch.dtype], backends.Measurement],
) -> list[tuning.Entry]:
    """All entries of the machine's table: those of what was measured now, and of the ``old`` ones the others.

    All forms of an operation have one kernel. What noise leaves open stays as it was, by the old entries or else the
    ``evidence``, but begins beyond the sizes at which ours is slower now. A broken kernel is never chosen for any form.
    """
    known = {**evidence, **{(entry.operation, entry.dtype): entry for entry in old}}
    kernels: dict[tuple[str, torch.dtype], str] = {}
    new: dict[tuple[str, torch.dtype], tuning.Entry] = {}
    for operation, dtype in dict.fromkeys((_base(form), dtype) for form, dtype in (*found.points, *found.broken)):
        broken = found.broken.get((operation, dtype), {})
        of_forms = {form: found.points.get((form, dtype), {}) for form in backends.forms_of(operation)}
        staying = [x.kernel for x in old if x.dtype == dtype and of_forms.get(x.operation) == {}]
        kernel = _best_kernel(of_forms.values(), broken, staying)
        if kernel is None:  # all trials were skipped
            continue
        kernels[operation, dtype] = kernel
        for form, of_kernels in of_forms.items():
            if kernel in broken:
                entry = tuning.Entry(form, dtype, kernel, (tuning.NEVER, tuning.NEVER), "", broken=True)
            else:
                entry = _entry(form, dtype, kernel, of_kernels.get(kernel, {}), known.get((form, dtype)), bool(broken))
            if entry:
                new[form, dtype] = entry
    kept = [
        entry
        for entry in old
        if (entry.operation, entry.dtype) not in new
        and kernels.get((_base(entry.operation), entry.dtype), entry.kernel) == entry.kernel
    ]
    return [*kept, *new.values()]


def _best_kernel(
    of_forms: Iterable[Mapping[str, Points]], broken: Collection[str], staying: Sequence[str]
) -> str | None:
    """Of those that aren't ``broken``, the one whose entries are ``staying``, or that with the best geometric mean over
    all that was measured; a broken one if there is no other."""
    quotients: dict[str, list[float]] = {}
    for of_kernels in of_forms:
        for kernel, points in of_kernels.items():
            if kernel not in broken:
                quotients.setdefault(kernel, []).extend(point.median for mode in points for point in points[mode])
    if not quotients:
        return next(iter(broken), None)
    for kernel in staying:
        if kernel in quotients:
            return kernel
    return max(quotients, key=lambda kernel: statistics.geometric_mean(quotients[kernel]))


def _entry(
    form: str,
    dtype: torch.dtype,
    kernel: str,
    points: Points,
    known: backends.Measurement | tuning.Entry | None,
    needed: bool,
) -> tuning.Entry | None:
    """None if nothing new was found out, save where one is ``needed``."""
    before = known.least if known and known.kernel == kernel else (tuning.NEVER, tuning.NEVER)
    told = {mode: least_elements(points.get(mode, ())) for mode in MODES}
    without, recorded = (
        _beyond_slower(old, points.get(mode, ())) if told[mode] is None else told[mode]
        for mode, old in zip(MODES, before)
    )
    if set(told.values()) == {None} and (without, recorded) == before and not needed:
        return None
    won = [p.median for mode, least in told.items() if least for p in points.get(mode, ()) if p.elements >= least]
    speedup = f"{min(won):.1f}x to {max(won):.1f}x" if won else ""
    return tuning.Entry(form, dtype, kernel, (without, recorded), speedup)


def _base(operation: str) -> str:
    return backends.FORMS.get(operation, operation)


def _title(trial: Trial, dtype: torch.dtype) -> str:
    return str(trial.case(torch.device("cpu"), dtype))


def measure(elements: int, calls: Mapping[str, Call], timer: Timer, rng: random.Random) -> dict[str, Point]:
    """Ours by kernel, beside the call named TORCH, in rounds of random order until it is clear which is faster.

    Each call runs under the backend of its name. Nothing if torch's takes longer than LONGEST.
    """

    def run(name: str) -> float:
        with fastformer.backend(name):
            return timer(calls[name])

    if run(TORCH) > LONGEST and run(TORCH) > LONGEST:
        return {}
    for name in calls:  # a warm-up, which a compiler may be part of
        run(name)
    quotients: dict[str, list[float]] = {name: [] for name in calls if name != TORCH}
    points: dict[str, Point] = {}
    spent = 0.0
    for before, rounds in pairwise((0, *LOOKS)):
        for _ in range(rounds - before):
            seconds = {name: run(name) for name in rng.sample(list(calls), len(calls))}
            for name, found in quotients.items():
                found.append(seconds[TORCH] / seconds[name])
            spent += sum(seconds.values())
        points = {name: _point(elements, found) for name, found in quotients.items()}
        clear = all(point.low > 1 or _is_slower(point) for point in points.values())
        if (clear and rounds >= CLEAR_ROUNDS) or spent > CALL_SECONDS:
            break
    return points


def _point(elements: int, quotients: Sequence[float]) -> Point:
    ordered = sorted(quotients)
    rank = interval_rank(len(ordered), CONFIDENCE)  # not 0 after any of LOOKS
    return Point(elements, ordered[rank - 1], statistics.median(ordered), ordered[-rank])


def measure_trial(
    trial: Trial, dtype: torch.dtype, kernels: Sequence[str], device: torch.device, rng: random.Random
) -> tuple[dict[str, dict[str, Point]], dict[str, str]]:
    """The points of one trial by mode and kernel, and what is wrong with those kernels that have none.

    Raises:
        Exception: whatever torch's own function raises, or a kernel once its answer was right.
    """
    case = trial.case(device, dtype)
    with fastformer.backend(TORCH):
        check = Check(case, tuple(case.work))
    problems: dict[str, str] = {}
    for kernel in kernels:
        with fastformer.backend(kernel):
            said = (check.verdict(mode, check.caller(mode, trial.ours))[0] for mode in case.work)
            if problem := next(filter(None, said), ""):
                problems[kernel] = problem
    right = [kernel for kernel in kernels if kernel not in problems]
    calls = {
        mode: {
            TORCH: check.caller(mode, trial.torchs),
            **{kernel: check.caller(mode, trial.ours) for kernel in right},
        }
        for mode in case.work
    }
    del check  # the exact answers; the calls need the inputs alone
    timer = timer_for(device)
    return {mode: measure(trial.elements, calls[mode], timer, rng) for mode in calls if right}, problems


def kernels_on(kind: str, operation: str, dtype: torch.dtype) -> list[str]:
    """Ours of an operation in a dtype, on a kind of device."""
    if kind == "cpu":
        return ["cpu"] if backends.CPU_LIBRARY else []
    lacking = {"triton": operation == "linear", "cuda": bool(backends.cuda_lacks(operation, dtype))}
    return [kernel for kernel in lacking if backends.available(kernel, kind) and not lacking[kernel]]


def run(options: argparse.Namespace) -> int:
    """The command: ``show``, ``reset``, or to measure each ``op`` of ``model`` in each ``dtype`` on ``device``.

    Returns the exit status: 1 if a kernel of ours has a wrong answer or can't run; the table is written all the same.

    Raises:
        ValueError: there is nowhere to keep a table, the file there holds something else, or nothing to be measured.
        OSError: the file can't be written, or the model's configuration not be read.
        ImportError: tqdm is missing.
    """
    file = tuning.path()
    if file is None:
        raise ValueError("FASTFORMER_TUNING is off, must be a file, or not set, for tables to be kept")
    if options.reset:
        file.unlink(missing_ok=True)
        print(f"{file}: deleted")
        return 0
    tables = tuning.read(file)  # one that is damaged is better known now than in five minutes
    if options.show:
        print(_format(file, tables, tuning.here(backends.CPU_LEVEL)))
        return 0
    operations = _chosen("--op", options.op, tuple(OPERATIONS), tuple(OPERATIONS))
    dtypes = _chosen("--dtype", options.dtype, tuple(tuning.DTYPES), ("float32", "bfloat16"))
    device: torch.device = options.device
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"--device is {device}, must be cpu or cuda, where there are kernels of ours")
    machine = next((x for x in tuning.here(backends.CPU_LEVEL) if x["device"] == device.type), None)
    if machine is None:
        raise ValueError("--device: the GPUs are of several kinds; CUDA_VISIBLE_DEVICES chooses among them")
    widths = [widths_of(options.model)] if options.model else STANDARD
    tasks = [
        (trial, dtype, kernels)
        for operation in operations
        for dtype in map(tuning.DTYPES.__getitem__, dtypes)
        if (kernels := kernels_on(device.type, operation, dtype))
        for model in widths
        for trial in trials(operation, model, device.type)
    ]
    if not tasks:
        raise ValueError(f"--device: {device}, on which none of these operations has a kernel of ours")
    if hasattr(os, "getloadavg") and (load := os.getloadavg()[0]) > available_threads() / 2:
        print(f"{load:.1f} processes are running; on an idle machine less is left open by noise", file=sys.stderr)
    rng, found = random.Random(0), Found()
    with require("tqdm").tqdm(tasks, bar_format=BAR, file=sys.stderr) as bar:
        for trial, dtype, kernels in bar:
            bar.set_description_str(f"{trial.operation}, {trial.elements} elements, {tuning.short_name(dtype)}")
            found.add(trial, dtype, kernels, device, rng)
    tables = tuning.read(file)  # once more: another process may have written meanwhile
    old = tuning.find(tables, machine)
    evidence = backends.faster_at(backends.CPU_LEVEL) if device.type == "cpu" else {}
    kept = entries(found, old.entries if old else (), evidence)
    tables = tuning.replaced(tables, tuning.Table(machine, datetime.date.today().isoformat(), tuple(kept)))
    tuning.write(file, tables)
    for reason in found.skipped:
        print(f"not measured: {reason}", file=sys.stderr)
    problems = [problem for of_kernels in found.broken.values() for problem in of_kernels.values()]
    for problem in problems:
        print(f"never chosen: {problem}", file=sys.stderr)
    print(_format(file, tables, [machine]))
    print("Programs that import fastformer from now on go by it; fastformer.explain tells.")
    return 1 if problems else 0


def _chosen(flag: str, values: list[str] | None, names: Sequence[str], default: Sequence[str]) -> Sequence[str]:
    """The names given to a flag that may be repeated, each with commas; or the default."""
    chosen = [name for value in values or () for name in value.split(",")]
    for name in chosen:
        if name not in names:
            raise ValueError(f"{flag} is {name!r}, must be of {', '.join(names)}")
    return chosen or default


def _format(file: Path, tables: Sequence[tuning.Table], here: Sequence[tuning.Machine]) -> str:
    """The tables, those of this machine first."""
    lines = [f"{file}{'' if tables else ': no tables yet'}"]
    for table in sorted(tables, key=lambda table: table.machine not in here):
        use = "in use here" if table.machine in here else "not this machine, or other versions"
        lines += [
            "",
            f"{', '.join(f'{name} {value}' for name, value in table.machine.items())}",
            f"tuned {table.made}, {use}",
        ]
        lines.append(
            f"  {'operation':<24}{'dtype':<10}{'kernel':<8}{'from elements':>14}{'with gradients':>16}  speed-up"
        )
        for entry in table.entries:
            least = ["never" if n == tuning.NEVER else str(n) for n in entry.least]
            start = f"{entry.operation:<24}{tuning.short_name(entry.dtype):<10}{entry.kernel:<8}"
            speedup = BROKEN if entry.broken else entry.speedup
            lines.append(f"  {start}{least[0]:>14}{least[1]:>16}  {speedup}".rstrip())
    return "\n".join(lines)
