"""The tables that ``fastformer tune`` keeps: from how many elements on ours is faster than torch's on this machine.

One JSON file has a table for each machine (home folders are shared between machines, and versions change), which is
found by all that its times depend on. ``backends`` reads the file once, when fastformer is imported: a table of this
machine then stands before what was measured on ours.
"""

from __future__ import annotations

import json
import os
import platform
import sys
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch

import fastformer

FORMAT = 1
#: More elements than any tensor has: ours is not faster, whatever the size.
NEVER = sys.maxsize
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

#: What a table holds for: the kind of device, the processor's or GPU's name, versions and so on.
Machine = dict[str, str | int]


class Entry(NamedTuple):
    """What was measured of an operation, or of a form of it, in one dtype."""

    operation: str  # as backends.EVIDENCE has it
    dtype: torch.dtype
    kernel: str  # of ours: "cpu", "triton" or "cuda"
    least: tuple[int, int]  # elements from which ours is faster, without and with gradients; or NEVER
    speedup: str  # over torch's, at the sizes from there on; empty where it never is

    def to_json(self) -> dict[str, Any]:
        least = [None if n == NEVER else n for n in self.least]
        return {**self._asdict(), "dtype": short_name(self.dtype), "least": least}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Entry:
        operation, kernel, speedup = (_string(values, name) for name in ("operation", "kernel", "speedup"))
        if kernel not in ("cpu", "triton", "cuda"):
            raise ValueError(f"kernel is {kernel!r}, must be cpu, triton or cuda")
        if values["dtype"] not in DTYPES:
            raise ValueError(f"dtype is {values['dtype']!r}, must be one of {', '.join(DTYPES)}")
        without, recorded = (NEVER if n is None else n for n in values["least"])
        if not all(type(n) is int and n >= 0 for n in (without, recorded)):
            raise ValueError(f"least is {values['least']!r}, must be two numbers of elements, or null for never")
        return cls(operation, DTYPES[values["dtype"]], kernel, (without, recorded), speedup)


class Table(NamedTuple):
    """What was measured on one machine."""

    machine: Machine
    made: str  # the day, in ISO 8601
    entries: tuple[Entry, ...]

    def to_json(self) -> dict[str, Any]:
        return {**self._asdict(), "entries": [entry.to_json() for entry in self.entries]}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Table:
        if not isinstance(values["machine"], dict):
            raise ValueError(f"machine is {values['machine']!r}, must be an object")
        return cls(values["machine"], _string(values, "made"), tuple(map(Entry.from_json, values["entries"])))


def short_name(dtype: torch.dtype) -> str:
    """A dtype as the file has it: a key of DTYPES."""
    return str(dtype).removeprefix("torch.")


def _string(values: dict[str, Any], name: str) -> str:
    if not isinstance(values[name], str):
        raise ValueError(f"{name} is {values[name]!r}, must be a string")
    return values[name]


def path() -> Path | None:
    """The file: FASTFORMER_TUNING, else tuning.json in the user's cache folder. None if it is "off"."""
    wanted = os.environ.get("FASTFORMER_TUNING")
    if wanted == "off":
        return None
    if wanted:
        return Path(wanted)
    cache = os.environ.get("XDG_CACHE_HOME")
    return (Path(cache) if cache else Path(os.path.expanduser("~")) / ".cache") / "fastformer" / "tuning.json"


def read(file: Path) -> list[Table]:
    """All tables of the file; none if there is no such file.

    Raises:
        ValueError: it holds something else; the file is named.
        OSError: it can't be read.
    """
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
        if values["format"] != FORMAT:
            raise ValueError(f"format is {values['format']!r}, must be {FORMAT}")
        return [Table.from_json(table) for table in values["tables"]]
    except FileNotFoundError:
        return []
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        said = f"{error} is missing" if isinstance(error, KeyError) else str(error)
        raise ValueError(f"{file} holds no tables of fastformer tune: {said}") from error


def read_or_warn() -> list[Table]:
    """The tables there are; a file that can't be read is a warning and no tables."""
    file = path()
    try:
        return read(file) if file else []
    except (ValueError, OSError) as error:
        warnings.warn(f"{error}. It is ignored; `fastformer tune --reset` deletes it.", stacklevel=2)
        return []


def write(file: Path, tables: Iterable[Table]) -> None:
    """Replace the file, whole or not at all."""
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_name(f".{file.name}.{os.getpid()}.tmp")
    text = json.dumps({"format": FORMAT, "tables": [table.to_json() for table in tables]}, indent=1)
    try:
        temporary.write_text(text + "\n", encoding="utf-8")
        temporary.replace(file)
    finally:
        temporary.unlink(missing_ok=True)


def find(tables: Iterable[Table], machine: Machine) -> Table | None:
    """The table of that very machine."""
    return next((table for table in tables if table.machine == machine), None)


def merged(tables: Iterable[Table], new: Table) -> list[Table]:
    """The tables with the new one's entries in place of those that its machine had for the same operation and dtype."""
    others = [table for table in tables if table.machine != new.machine]
    old = find(tables, new.machine)
    measured = {(entry.operation, entry.dtype) for entry in new.entries}
    kept = [entry for entry in old.entries if (entry.operation, entry.dtype) not in measured] if old else []
    return [*others, new._replace(entries=(*kept, *new.entries))]


def cpu(level: str) -> Machine:
    """This machine's processor, at an instruction-set level, with the threads that torch has now."""
    return {
        "device": "cpu",
        "name": processor_name(),
        "level": level,
        "threads": torch.get_num_threads(),
        **_versions(),
    }


def gpu() -> Machine | None:
    """This machine's GPUs; None if they are not all of one kind."""
    names = {torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())}
    if len(names) != 1:
        return None
    return {"device": "cuda", "name": names.pop(), **_versions()}


def _versions() -> Machine:
    return {"torch": str(torch.__version__), "fastformer": fastformer.__version__}


def processor_name() -> str:
    """What the system calls its processor."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as lines:  # long, with many cores
            for line in lines:
                if line.startswith("model name"):
                    return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
