"""Two results of ``fastformer bench``: which rows moved beyond what two runs of the same commit differ by.

Measured: 14 runs of one commit, each of 134 rows on one thread of 2 shared cores, compared in 28 pairs; in 3 pairs the
runs had a core to themselves, in 25 they shared both cores with some seven other programs. From run to run the times of
peers, whose code is the same, changed by 3% (by up to 48%) in the median, and those of a single row typically by 3%
more or less than that (up to 47%). Rows of ours, divided by their peers, changed by some 5% in the median, but up to 4
rows of a pair by a factor of 1.3 to 1.8, however steady they were within each run: most are forward passes bound by
memory, whose buffers lie elsewhere in each process. So a row can't speak for itself, whatever its spread. What two runs
of a commit hardly ever have is an operation whose rows moved one way together. Hence the rule:

1. A row's change is that of ours divided by that of its peers, which run in the same rounds: a machine whose speed
   drifts cancels out. (If their versions differ, they are no controls, and the change of all peers together is.)
2. An operation moved, in all modes or in one, if the median of its rows' changes did: if its 95% interval lies beyond
   5%, or its 78% interval beyond 8% and the scatter of the peers' changes from row to row. (With 6 rows: all of them
   beyond the one, or five of them beyond the other. At least 4 rows.)
3. A row moved if its operation did and the row itself did by 5% or more; or else by a factor of 2, beyond its noise.
   Rows beyond their noise whose operation stays where it was are told, but are no finding: run again.

None of the 3 pairs has a finding by this, and one of the 25: an operation that ran while other programs started. An
operation whose rows were all made 20% slower is found in 94% of the cases with a core to itself, in 49% of the others.

The curves over sizes and the GPT trained both ways are not compared: they have no rows, and one number each.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from .report import FORMAT, WIDTH, Results, noise
from .table import shorten, wrap
from .timing import Timing, interval_rank

FLOOR, FLOOR_OF_MOST, FLOOR_ALONE, LONE_FACTOR = 1.05, 1.08, 1.08, 2.0
ALL, MOST = 0.95, 0.78  # confidence of the intervals of an operation's median
FEWEST_SAMPLES = 6  # with a 95% interval
# What makes times comparable, from the environment; the rest (load, clock) differs from run to run.
IDENTITY = ("processor", "threads", "gpu", "driver", "system", "versions")

Key = tuple[str, str, str, str]  # operation, shape, dtype, mode


@dataclass(frozen=True)
class Change:
    """A row in both runs. Factors are new by old: above 1 is slower."""

    key: Key
    old: float  # seconds, ours
    new: float
    factor: float  # without what the machine's speed changed
    noise: float  # the factor, 1 or more, that the noise of both runs explains; inf: too few samples to tell

    def __str__(self) -> str:
        operation, shape, dtype, mode = self.key
        times = f"{self.old * 1e3:>10.3f} ->{self.new * 1e3:>10.3f} ms"
        return f"  {shorten(f'{operation} {shape}', 40):<41}{dtype:<5}{mode:<8}{times}  {_times(self.factor)}"


@dataclass(frozen=True)
class Family:
    """An operation that moved, in one mode or ("") in all of them together."""

    operation: str
    mode: str
    rows: int
    factor: float  # the median of its rows' factors, and its interval
    low: float
    high: float

    def __contains__(self, change: Change) -> bool:
        operation, _, _, mode = change.key
        return operation == self.operation and self.mode in ("", mode)

    def __str__(self) -> str:
        interval = f"{_times(self.factor)} ({self.low:.2f} to {self.high:.2f})"
        return f"  {self.operation:<41}{self.mode or 'all modes':<13}{f'{self.rows} rows':<12}{interval}"


@dataclass(frozen=True)
class Comparison:
    """What changed from an old run to a new one."""

    rows: int  # that have a time in both
    moved: list[Change]
    families: list[Family]  # the operations that moved
    alone: list[Change]  # rows beyond their noise, whose operation didn't move
    broken: list[str]  # rows with a time in the old run and a problem in the new one, which is told
    mended: list[str]  # the other way round
    new: list[str]  # rows of the new run only
    gone: list[str]
    machine: float | None  # the factor of the peers' times; None without any
    scatter: float  # the factor that peers typically differ by from it
    notes: list[str]  # what makes the runs different, or doubtful

    @property
    def worse(self) -> bool:
        """Whether a row or an operation is slower, or a right answer is wrong now."""
        return bool(self.broken) or any(change.factor > 1 for change in (*self.moved, *self.families))

    def format(self) -> str:
        """For a terminal of 100 columns."""
        lines = [line for note in self.notes for line in wrap(note, WIDTH)]
        if self.machine is not None:
            lines += wrap(
                f"The machine: peers took {self.machine:.2f}x as long as in the old run, typically within"
                f" {self.scatter - 1:.0%} of that in each row. This is taken out of the factors below.",
                WIDTH,
            )
        for title, found in (
            ("wrong now:", self.broken),
            ("operations that are slower:", _slower(self.families)),
            ("rows that are slower:", _slower(self.moved)),
            ("operations that are faster:", _faster(self.families)),
            ("rows that are faster:", _faster(self.moved)),
            ("beyond their noise, but not with their operation: run again", _slower(self.alone) + _faster(self.alone)),
            ("right now:", self.mended),
            ("only in the new run:", self.new),
            ("only in the old run:", self.gone),
        ):
            if found:
                lines += [title, *(shorten(str(x).rstrip(), WIDTH) for x in found)]
        if not (self.moved or self.families or self.broken):
            lines.append(f"None of {self.rows} rows moved beyond the noise of the two runs.")
        return "\n".join(lines)


def _slower(found: Iterable[Any]) -> list[Any]:
    return sorted((x for x in found if x.factor > 1), key=lambda x: -x.factor)


def _faster(found: Iterable[Any]) -> list[Any]:
    return sorted((x for x in found if x.factor <= 1), key=lambda x: x.factor)


def _times(factor: float) -> str:
    return f"{factor:.2f}x slower" if factor > 1 else f"{1 / factor:.2f}x faster"


def compare(old: Results, new: Results) -> Comparison:
    """Compares two results as ``report.collect`` makes them, or as read from their JSON.

    Raises:
        ValueError: one is not of format 2.
    """
    for name, results in (("old", old), ("new", new)):
        if results.get("format") != FORMAT:
            raise ValueError(f"the {name} results have format {results.get('format')!r}, must have {FORMAT}")
    before, after = ({_key(row): row for row in results["rows"]} for results in (old, new))
    both = [key for key in after if key in before]
    timed = [key for key in both if before[key]["ours"] and after[key]["ours"]]
    peers = {key: _controls(before[key], after[key]) for key in timed}
    speeds = {key: statistics.median(now.median / was.median for was, now in peers[key]) for key in timed if peers[key]}
    machine = statistics.median(speeds.values()) if speeds else None
    scatter = statistics.median(_size(speed / machine) for speed in speeds.values()) if speeds else 1.0
    if _versions(old) != _versions(new):
        speeds = {}
    common = machine or _limits_factor(old, new)
    changes = [_change(key, before[key], after[key], peers[key], speeds.get(key, common)) for key in timed]
    families = _families(changes, scatter)
    moved = [change for change in changes if _moved(change, families, scatter)]
    lone = [
        change
        for change in changes
        if change not in moved and _size(change.factor) > max(FLOOR_ALONE, change.noise) * scatter
    ]
    return Comparison(
        rows=len(timed),
        moved=moved,
        families=families,
        alone=lone,
        broken=[_problem(after[key]) for key in both if before[key]["ours"] and after[key]["problem"]],
        mended=[f"  {_name(key)}" for key in both if before[key]["problem"] and after[key]["ours"]],
        new=[f"  {_name(key)}" for key in after if key not in before],
        gone=[f"  {_name(key)}" for key in before if key not in after],
        machine=machine,
        scatter=scatter,
        notes=_notes(old, new),
    )


def _key(row: Mapping[str, Any]) -> Key:
    return row["operation"], row["shape"], row["dtype"], row["mode"]


def _name(key: Key) -> str:
    return " ".join(key)


def _problem(row: Mapping[str, Any]) -> str:
    return f"  {_name(_key(row))}: {row['problem']}"


def _controls(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[tuple[Timing, Timing]]:
    """The times of the peers that both runs have; "ours: compile" is none that stays as it was."""
    both = [(peer, new["peers"].get(name)) for name, peer in old["peers"].items() if not name.startswith("ours")]
    return [
        (Timing(**was), Timing(**now)) for was, now in both if isinstance(was, Mapping) and isinstance(now, Mapping)
    ]


def _size(factor: float) -> float:
    """How far a factor is from 1, as one above 1."""
    return max(factor, 1 / factor)


def _limits_factor(old: Results, new: Results) -> float:
    """For runs without peers: how much longer the machine takes for copies, reads and products."""
    factors = [
        rate / new_rate
        for kind in ("copy", "read", "product")
        for rate, new_rate in zip(old["limits"][kind].values(), new["limits"][kind].values())
    ]
    return statistics.median(factors) if factors else 1.0


def _change(
    key: Key, old: Mapping[str, Any], new: Mapping[str, Any], peers: list[tuple[Timing, Timing]], speed: float
) -> Change:
    was, now = Timing(**old["ours"]), Timing(**new["ours"])
    factor = now.median / was.median / speed
    if min(was.samples, now.samples) < FEWEST_SAMPLES:
        return Change(key, was.median, now.median, factor, math.inf)
    medians = _uncertain(was, now) * (statistics.median(_uncertain(*pair) for pair in peers) if peers else 1.0)
    spread = math.sqrt(was.high / was.low * now.high / now.low)
    return Change(key, was.median, now.median, factor, max(medians**2, spread))


def _uncertain(*timings: Timing) -> float:
    """The factor by which the medians may be off together."""
    return math.prod(max(x.ci_high / x.median, x.median / x.ci_low) for x in timings)


def _families(changes: list[Change], scatter: float) -> list[Family]:
    found = []
    for operation in dict.fromkeys(change.key[0] for change in changes):
        rows = [change for change in changes if change.key[0] == operation]
        modes = list(dict.fromkeys(change.key[3] for change in rows))
        for mode in ("", *modes) if len(modes) > 1 else modes:
            factors = sorted(change.factor for change in rows if mode in ("", change.key[3]))
            for confidence, floor in ((ALL, FLOOR), (MOST, FLOOR_OF_MOST * scatter)):
                rank = interval_rank(len(factors), confidence)
                if rank and (factors[rank - 1] > floor or factors[-rank] < 1 / floor):
                    interval = factors[rank - 1], factors[-rank]
                    found.append(Family(operation, mode, len(factors), statistics.median(factors), *interval))
                    break
    return found


def _moved(change: Change, families: Iterable[Family], scatter: float) -> bool:
    if _size(change.factor) > max(LONE_FACTOR, change.noise) * scatter:
        return True
    same_way = any(change in family and (family.factor > 1) == (change.factor > 1) for family in families)
    return same_way and _size(change.factor) > FLOOR


def _versions(results: Results) -> set[str]:
    """Of the peers' packages: those of fastformer and Python change nothing for them."""
    parts = {part.strip() for part in str(results["environment"].get("versions", "")).split(",")}
    return {part for part in parts if not part.startswith(("fastformer", "Python"))}


def _notes(old: Results, new: Results) -> list[str]:
    notes = []
    environments = old["environment"], new["environment"]
    for name in IDENTITY:
        was, now = (str(environment.get(name, "none")) for environment in environments)
        if was != now:
            notes.append(f"{name}: {was}; now {now}")
    if any(environments[0].get(name) != environments[1].get(name) for name in ("processor", "threads", "gpu")):
        notes.append("The machines differ: the factors are of machines as much as of kernels.")
    kernels = [sorted({row["backend"] for row in results["rows"]}) for results in (old, new)]
    if kernels[0] != kernels[1]:
        notes.append(f"kernels: {', '.join(kernels[0])}; now {', '.join(kernels[1])}")
    for name, results in (("old", old), ("new", new)):
        if results["interrupted"]:
            notes.append(f"The {name} run was interrupted.")
        if reasons := noise(results):
            notes.append(f"The {name} run was noisy: {'; '.join(reasons)}.")
    return notes
