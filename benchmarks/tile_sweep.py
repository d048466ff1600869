"""Times the Triton kernels with the tiles of their tables and with neighbours of those, on this GPU, in bfloat16:

python -m fastformer.benchmarks.tile_sweep --seconds S --json FILE

One entry of a table after the other. Its own tile and its neighbours take turns in rounds, and a time is that of the
whole operation. A neighbour is chosen if its answers are those of the table's tile and it is faster beyond the noise.
What would change in the tables is printed as lines of source.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import fastformer
from fastformer import accuracy, backends
from fastformer.models.files import replacing, require

from . import machine, table
from .checking import as_tuple
from .pace import Pace
from .tile_entries import DTYPE, AnyTile, Entry, entries, fields_of, label, source
from .timing import Call, Staged, Timer, Timing, describe, measure, prepared, timer_for

PACE = Pace(row_seconds=0.5, min_rounds=10)  # a row is an entry with all that is tried for it
WORTH = 1.01  # times as fast; a smaller gain changes no table
BAR = "{desc:<44.44} {percentage:3.0f}%|{bar}| {elapsed}"
WIDTH = 120


@dataclass
class Found:
    """What came out of one entry."""

    entry: Entry
    own: AnyTile
    times: dict[AnyTile, Timing] = field(default_factory=dict)  # the own tile's, too
    skipped: dict[AnyTile, str] = field(default_factory=dict)  # that can't be run, and why
    wrong: dict[AnyTile, str] = field(default_factory=dict)  # with other answers
    late: int = 0  # how many there was no time for
    problem: str = ""  # why nothing is known: the own tile can't be run

    @property
    def fastest(self) -> AnyTile:
        """By the median, of all that were timed."""
        return min(self.times, key=lambda tile: self.times[tile].median)

    @property
    def chosen(self) -> AnyTile:
        """The fastest if that is worth it and beyond the noise: the medians' confidence intervals are apart. Else the
        table's own."""
        if self.problem:
            return self.own
        best, own = self.times[self.fastest], self.times[self.own]
        return self.fastest if best.ci_high < own.ci_low and self.gain >= WORTH else self.own

    @property
    def gain(self) -> float:
        """How many times as fast as the table's own tile the fastest is."""
        return self.times[self.own].median / self.times[self.fastest].median

    def to_json(self) -> dict[str, Any]:
        tried: list[dict[str, Any]] = [
            {"tile": fields_of(tile), "ms": 1e3 * x.median, "ci_ms": [1e3 * x.ci_low, 1e3 * x.ci_high]}
            for tile, x in self.times.items()
        ]
        tried += [{"tile": fields_of(tile), "skipped": why} for tile, why in self.skipped.items()]
        tried += [{"tile": fields_of(tile), "wrong": why} for tile, why in self.wrong.items()]
        return {
            "entry": self.entry.name,
            "table": self.entry.table_name,
            "row": [*self.entry.key, *([self.entry.part] if self.entry.part else [])],
            "own": fields_of(self.own),
            "tried": tried,
            "late": self.late,
            "problem": self.problem,
            "chosen": fields_of(self.chosen),
        }


def in_tile(entry: Entry, tile: AnyTile, call: Call) -> Call:
    """The call, with this tile in the table while it runs."""

    def run(part: Callable[..., object], *arguments: object) -> object:
        with entry.using(tile):
            return part(*arguments)

    return Staged(call.first, partial(run, call.then)) if isinstance(call, Staged) else partial(run, call)


def answers(call: Call) -> tuple[Tensor, ...]:
    """Of a call, once it has run on the device too."""
    found = as_tuple(prepared(call)())
    if found[0].is_cuda:
        torch.cuda.synchronize()
    return found


def difference(found: Sequence[Tensor], expected: Sequence[Tensor], dtype: torch.dtype) -> str:
    """What is wrong with the answers or "": each may be two units in the last place of the dtype off in each row."""
    for index, (x, y) in enumerate(zip(found, expected, strict=True)):
        verdict = accuracy.judge(x.to(dtype), y, y)
        if not verdict.ok:
            return f"wrong answer {index}: {verdict}"
    return ""


def sweep_entry(
    entry: Entry,
    timer: Timer,
    rng: random.Random,
    is_over: Callable[[], bool],
    advance: Callable[[], object] = lambda: None,
    dtype: torch.dtype = DTYPE,
    pace: Pace = PACE,
) -> Found:
    """Tries and times the candidates of one entry that begin before it ``is_over``; ``advance`` is told of each."""
    found = Found(entry, entry.own)
    candidates = entry.candidates()
    try:
        call = entry.make()
        expected = answers(call)
    except Exception as error:  # such as too little memory; the other entries go on
        found.problem = describe(error)
        return found
    calls = {found.own: in_tile(entry, found.own, call)}
    for index, tile in enumerate(candidates):
        if is_over():
            found.late = len(candidates) - index
            break
        tried = in_tile(entry, tile, call)
        try:
            wrong = difference(answers(tried), expected, dtype)
        except Exception as error:  # the compiler's, or that it takes more than the device has
            found.skipped[tile] = describe(error)
        else:
            if wrong:
                found.wrong[tile] = wrong
            else:
                calls[tile] = tried
        advance()
    named = {str(index): tile for index, tile in enumerate(calls)}
    times = measure({name: calls[tile] for name, tile in named.items()}, timer, pace, rng)
    for name, tile in named.items():
        if isinstance(timing := times[name], Timing):
            found.times[tile] = timing
        else:
            found.skipped[tile] = timing
    if found.own not in found.times:
        found.problem = found.skipped.pop(found.own)
    return found


def lines_to_paste(results: Sequence[Found]) -> dict[str, list[str]]:
    """By table the rows that change, with all that was chosen for them."""
    rows: dict[tuple[str, tuple[str | int, ...]], Any] = {}
    for found in results:
        if found.chosen != found.own:
            place, entry = (found.entry.table_name, found.entry.key), found.entry
            before = rows.get(place, entry.table[entry.key])
            rows[place] = before._replace(**{entry.part: found.chosen}) if entry.part else found.chosen
    lines: dict[str, list[str]] = {}
    for (name, key), row in rows.items():
        lines.setdefault(name, []).append(f"({json.dumps(key)[1:-1]}): {source(row)},")
    return lines


def format_report(results: Sequence[Found], left_out: Sequence[str]) -> str:
    """A line for each entry, what was skipped, and what to paste; the last line has the sum of it."""
    titles = [("in the table", "tile"), ("", "ms"), ("fastest", "tile"), ("", "ms"), ("", "gain")]
    titles += [("tiles", "tried"), ("", "skipped")]
    lines = [table.Line([found.entry.name], _cells(found)) for found in results]
    lines += [table.Line([name], "no time") for name in left_out]
    heading = {"in brackets: within the noise, or too little": lines}
    out = table.lay_out(["entry"], titles, heading, WIDTH) if lines else []
    for found in results:
        for kind, tiles in (("skipped", found.skipped), ("WRONG", found.wrong)):
            out += [table.shorten(f"{kind}: {found.entry.name} {label(tile)}: {tiles[tile]}", WIDTH) for tile in tiles]
        if found.late:
            out.append(f"no time: {found.late} more of {found.entry.name}")
    for name, rows in lines_to_paste(results).items():
        out += ["", f"{name}:", *(f"    {row}" for row in rows)]
    timed = sum(len(found.times) for found in results)
    better = sum(found.chosen != found.own for found in results)
    entries_timed = sum(not found.problem for found in results)
    out += ["", f"{better} of {entries_timed} entries have a faster tile; {timed} were timed"]
    return "\n".join(out)


def _cells(found: Found) -> list[str] | str:
    if found.problem:
        return found.problem
    own, best = found.times[found.own], found.times[found.fastest]
    gain = f"{found.gain:.3f}x" if found.chosen == found.fastest else f"({found.gain:.3f}x)"
    missed = len(found.skipped) + len(found.wrong) + found.late
    times = [f"{1e3 * x.median:.3f}" for x in (own, best)]
    return [label(found.own), times[0], label(found.fastest), times[1], gain, str(len(found.times) - 1), str(missed)]


def write_json(file: Path, environment: dict[str, str], results: Sequence[Found], left_out: Sequence[str]) -> None:
    """All that is known so far."""
    data = {
        "environment": environment,
        "entries": [found.to_json() for found in results],
        "left out": list(left_out),
        "paste": lines_to_paste(results),
    }
    file.parent.mkdir(parents=True, exist_ok=True)
    with replacing(file) as temporary:
        temporary.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")


def run(
    swept: Sequence[Entry],
    timer: Timer,
    environment: dict[str, str],
    is_over: Callable[[], bool],
    file: Path,
    dtype: torch.dtype = DTYPE,
    pace: Pace = PACE,
) -> int:
    """Sweeps the entries, writes what is found as each ends, and prints the report.

    Returns the exit status: 1 if an answer was wrong or an entry's own tile can't be run, 130 if it was interrupted.
    """
    results: list[Found] = []
    rng, names, status = random.Random(0), [entry.name for entry in swept], 0
    total = sum(1 + len(entry.candidates()) for entry in swept)
    try:
        with require("tqdm").tqdm(total=total, bar_format=BAR, file=sys.stderr) as bar, fastformer.backend("triton"):
            for entry in swept:
                if is_over():
                    break
                bar.set_description_str(entry.name)
                results.append(sweep_entry(entry, timer, rng, is_over, bar.update, dtype, pace))
                bar.update()
                write_json(file, environment, results, names[len(results) :])
    except KeyboardInterrupt:
        status = 130
    left_out = names[len(results) :]
    write_json(file, environment, results, left_out)
    print(format_report(results, left_out))
    return status or int(any(found.wrong or found.problem for found in results))


def main(arguments: list[str] | None = None) -> int:
    """The exit status: 2 if there is nothing to sweep, else see ``run``."""
    parser = argparse.ArgumentParser(description="Times the Triton kernels' tiles and their neighbours on this GPU.")
    parser.add_argument(
        "--seconds", type=float, default=600.0, metavar="S", help="in which to begin tiles (%(default)g)"
    )
    parser.add_argument("--json", type=Path, required=True, metavar="FILE", help="where all that is found goes")
    options = parser.parse_args(arguments)
    end = time.monotonic() + options.seconds
    if not backends.available("triton", "cuda") or not torch.cuda.is_available():
        print("Triton's kernels and a GPU are needed", file=sys.stderr)
        return 2
    device = torch.device("cuda")
    return run(
        entries(device), timer_for(device), machine.environment(device), lambda: time.monotonic() > end, options.json
    )


if __name__ == "__main__":
    sys.exit(main())
