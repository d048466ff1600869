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
from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

import fastformer
from fastformer import backends, tuning
from fastformer.models.files import require

from .case import FORWARD, TRAINING
from .checking import PEER_TOLERANCE, as_tuple, caller, describe, doubled
from .machine import available_threads
from .timing import Call, Timer, Timing, timer_for
from .tune_trials import OPERATIONS, STANDARD, Trial, trials, widths_of

# Rounds of calls: at least, between two looks at whether it is clear which is faster, and at most.
MIN_ROUNDS, ROUNDS, MAX_ROUNDS = 21, 7, 350
CALL_SECONDS = 0.5  # of calls at one size, beyond the first ROUNDS
LONGEST = 1.0  # seconds of torch's call; what takes longer is left out
AS_FAST = 0.97  # a smaller quotient is slower; between this and 1 they are as fast

BAR = "{desc:<44.44} {percentage:3.0f}%|{bar}| {elapsed}, about {remaining} left"
TORCH = "torch"


class Point(NamedTuple):
    """How many times as fast as torch's ours is at one size: the median, and its 95% confidence interval."""

    elements: int
    low: float
    median: float
    high: float


#: Of one operation or form, in one dtype, by one kernel of ours: the points of FORWARD and of TRAINING.
Points = dict[str, list[Point]]


def least_elements(points: Iterable[Point]) -> int | None:
    """The smallest measured size at which ours is faster beyond noise, and from which on it is slower at none.

    tuning.NEVER if, beyond noise, ours is slower at a size above all where it is faster. None if that is left open.
    """
    found = None
    ordered = sorted(points, key=lambda point: point.elements, reverse=True)
    for elements, group in groupby(ordered, key=lambda point: point.elements):
        same = list(group)
        if found is None and any(point.high < AS_FAST for point in same):
            return tuning.NEVER
        if any(point.median < AS_FAST for point in same):
            break
        if all(point.low > 1 for point in same):
            found = elements
    return found


def entries(
    measured: Mapping[tuple[str, torch.dtype, str], Points],
    known: Mapping[tuple[str, torch.dtype], backends.Measurement],
) -> list[tuning.Entry]:
    """The table's entries, from the points by (operation, dtype, kernel).

    All forms of an operation get one kernel, that with the best geometric mean over all that was measured. What noise
    leaves open stays as it is in ``known``, or else is never; there is no entry if all is open.
    """
    quotients: dict[tuple[str, torch.dtype], dict[str, list[float]]] = {}
    for (operation, dtype, kernel), points in measured.items():
        of_kernel = quotients.setdefault((_base(operation), dtype), {}).setdefault(kernel, [])
        of_kernel += [max(point.median, 1e-3) for mode in points for point in points[mode]]
    found = []
    for operation, dtype in dict.fromkeys(key[:2] for key in measured):
        of_kernels = quotients[_base(operation), dtype]
        kernel = max(of_kernels, key=lambda name: statistics.geometric_mean(of_kernels[name]))
        points = measured[operation, dtype, kernel]
        told = {mode: least_elements(points.get(mode, ())) for mode in (FORWARD, TRAINING)}
        if set(told.values()) == {None}:
            continue
        before = known[operation, dtype].least if (operation, dtype) in known else (tuning.NEVER, tuning.NEVER)
        without, recorded = (old if new is None else new for new, old in zip(told.values(), before))
        won = [p.median for mode, least in told.items() if least for p in points.get(mode, ()) if p.elements >= least]
        speedup = f"{min(won):.1f}x to {max(won):.1f}x" if won else ""
        found.append(tuning.Entry(operation, dtype, kernel, (without, recorded), speedup))
    return found


def _base(operation: str) -> str:
    return backends.FORMS.get(operation, operation)


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
    spent, rounds = 0.0, 0
    while True:
        seconds = {name: run(name) for name in rng.sample(list(calls), len(calls))}
        for name, found in quotients.items():
            found.append(seconds[TORCH] / seconds[name])
        spent, rounds = spent + sum(seconds.values()), rounds + 1
        if rounds % ROUNDS:
            continue
        intervals = {name: Timing.of(found) for name, found in quotients.items()}  # of quotients, not of seconds
        clear = all(x.ci_low > 1 or x.ci_high < AS_FAST for x in intervals.values())
        if (clear and rounds >= MIN_ROUNDS) or rounds >= MAX_ROUNDS or spent > CALL_SECONDS:
            return {name: Point(elements, x.ci_low, x.median, x.ci_high) for name, x in intervals.items()}


def measure_trial(
    trial: Trial,
    mode: str,
    kernels: Sequence[str],
    device: torch.device,
    dtype: torch.dtype,
    rng: random.Random,
    problems: list[str],
) -> dict[str, Point]:
    """The points of one trial by kernel. One whose answer is wrong, or that can't run, is told in ``problems`` and is
    never faster."""
    inputs = trial.inputs(device, dtype, record=mode == TRAINING)
    doubles = doubled(inputs)
    with fastformer.backend(TORCH):
        with torch.no_grad():
            grad_outputs = [torch.randn_like(x) for x in as_tuple(trial.torchs(**inputs))]
        calls = {TORCH: caller(mode, trial.torchs, inputs, grad_outputs)}
        torchs, exact = calls[TORCH](), caller(mode, trial.torchs, doubles, [x.double() for x in grad_outputs])()
    found = {}
    for kernel in kernels:
        call = caller(mode, trial.ours, inputs, grad_outputs)
        with fastformer.backend(kernel):
            problem = _problem(call, torchs, exact)
        if problem:
            problems.append(f"{kernel}, {trial.operation} {tuning.short_name(dtype)}, {trial.shapes}: {problem}")
            found[kernel] = Point(trial.elements, 0.0, 0.0, 0.0)
        else:
            calls[kernel] = call
    del doubles, torchs, exact
    return found | (measure(trial.elements, calls, timer_for(device), rng) if len(calls) > 1 else {})


def _problem(call: Call, torchs: Sequence[Tensor], exact: Sequence[Tensor]) -> str:
    """What is wrong with a call, or "": its answers may be as far from the exact ones as a peer's in the benchmarks, or
    as torch's, which adds up some gradients in 16 bits."""
    try:
        answers = call()
    except Exception as error:  # of a kernel that can't be compiled, for one: it must not end the others' turn
        return describe(error)
    for answer, torchs_answer, right in zip(answers, torchs, exact):
        if right.numel():
            allowed = max(PEER_TOLERANCE * right.abs().max(), (torchs_answer - right).abs().max())
            # Not `distance > allowed`: NaN must count as wrong.
            if not (answer - right).abs().max() <= allowed:
                return "the answer is wrong"
    return ""


def kernels_on(kind: str, operation: str, dtype: torch.dtype) -> list[str]:
    """Ours of an operation in a dtype, on a kind of device."""
    if kind == "cpu":
        return ["cpu"] if backends.CPU_LIBRARY else []
    lacking = {"triton": operation == "linear", "cuda": bool(backends.cuda_lacks(operation, dtype))}
    return [kernel for kernel in lacking if backends.available(kernel, kind) and not lacking[kernel]]


def run(options: argparse.Namespace) -> int:
    """The command: ``show``, ``reset``, or to measure each ``op`` of ``model`` in each ``dtype`` on ``device``.

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
        print(_format(file, tables, [tuning.cpu(backends.CPU_LEVEL), *_gpus()]))
        return 0
    operations = _chosen("--op", options.op, tuple(OPERATIONS), tuple(OPERATIONS))
    dtypes = _chosen("--dtype", options.dtype, tuple(tuning.DTYPES), ("float32", "bfloat16"))
    device: torch.device = options.device
    machine = tuning.cpu(backends.CPU_LEVEL) if device.type == "cpu" else tuning.gpu()
    if machine is None:
        raise ValueError("--device: the GPUs are of several kinds; CUDA_VISIBLE_DEVICES chooses among them")
    widths = [widths_of(options.model)] if options.model else STANDARD
    tasks = [
        (trial, mode, dtype, kernels)
        for operation in operations
        for dtype in map(tuning.DTYPES.__getitem__, dtypes)
        if (kernels := kernels_on(device.type, operation, dtype))
        for model in widths
        for trial in trials(operation, model, device.type)
        for mode in ((FORWARD, TRAINING) if trial.trained else (FORWARD,))
    ]
    if not tasks:
        raise ValueError(f"--device: {device}, on which none of these operations has a kernel of ours")
    if hasattr(os, "getloadavg") and (load := os.getloadavg()[0]) > available_threads() / 2:
        print(f"{load:.1f} processes are running; on an idle machine less is left open by noise", file=sys.stderr)
    rng, problems = random.Random(0), []
    measured: dict[tuple[str, torch.dtype, str], Points] = {}
    with require("tqdm").tqdm(tasks, bar_format=BAR, file=sys.stderr) as bar:
        for trial, mode, dtype, kernels in bar:
            bar.set_description_str(f"{trial.operation}, {trial.elements} elements, {tuning.short_name(dtype)}")
            found = measure_trial(trial, mode, kernels, device, dtype, rng, problems)
            for kernel, point in found.items():
                measured.setdefault((trial.operation, dtype, kernel), {}).setdefault(mode, []).append(point)
    known = backends.faster_at(backends.CPU_LEVEL) if device.type == "cpu" else {}
    table = tuning.Table(machine, datetime.date.today().isoformat(), tuple(entries(measured, known)))
    tuning.write(file, tuning.merged(tables, table))
    for problem in problems:
        print(f"never chosen: {problem}", file=sys.stderr)
    print(_format(file, tuning.read(file), [machine]))
    print("Programs that import fastformer from now on go by it; fastformer.explain tells.")
    return 0


def _chosen(flag: str, values: list[str] | None, names: Sequence[str], default: Sequence[str]) -> Sequence[str]:
    """The names given to a flag that may be repeated, each with commas; or the default."""
    chosen = [name for value in values or () for name in value.split(",")]
    for name in chosen:
        if name not in names:
            raise ValueError(f"{flag} is {name!r}, must be of {', '.join(names)}")
    return chosen or default


def _gpus() -> list[tuning.Machine]:
    machine = tuning.gpu() if torch.cuda.is_available() else None
    return [machine] if machine else []


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
            lines.append(f"  {start}{least[0]:>14}{least[1]:>16}  {entry.speedup}".rstrip())
    return "\n".join(lines)
