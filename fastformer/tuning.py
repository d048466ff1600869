"""The tables that ``fastformer tune`` keeps: from how many elements on ours is faster than torch's on this machine.

One JSON file has a table for each machine (home folders are shared between machines, and versions change), which is
found by all that its times depend on. ``backends`` reads the file once, when fastformer is imported: a table of this
machine, and of the threads that torch has at a call, then stands before what was measured on ours.
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
    speedup: str  # over torch's, at the measured sizes from there on; empty where nothing tells
    broken: bool = False  # whether, at some size, ours gave a wrong answer or couldn't run: it is never chosen then

    def to_json(self) -> dict[str, Any]:
        least = [None if n == NEVER else n for n in self.least]
        return {**self._asdict(), "dtype": str(self.dtype).removeprefix("torch."), "least": least}

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
        if type(values["broken"]) is not bool:
            raise ValueError(f"broken is {values['broken']!r}, must be true or false")
        return cls(operation, DTYPES[values["dtype"]], kernel, (without, recorded), speedup, values["broken"])


class Table(NamedTuple):
    """What was measured on one machine."""

    machine: Machine
    made: str  # the day, in ISO 8601
    entries: tuple[Entry, ...]

    def to_json(self) -> dict[str, Any]:
        return {**self._asdict(), "entries": [entry.to_json() for entry in self.entries]}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Table:
        machine = values["machine"]
        if not isinstance(machine, dict) or not all(type(value) in (str, int) for value in machine.values()):
            raise ValueError(f"machine is {machine!r}, must be an object of strings and integers")
        return cls(machine, _string(values, "made"), tuple(map(Entry.from_json, values["entries"])))


def short_name(dtype: torch.dtype) -> str:
    """As printed tables have it: fp32, bf16, fp16."""
    return {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}[dtype]


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
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
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


def replaced(tables: Iterable[Table], new: Table) -> list[Table]:
    """The tables with the new one in the place of its machine's."""
    return [*(table for table in tables if table.machine != new.machine), new]


def cpu(level: str, threads: int) -> Machine:
    """This machine's processor, at an instruction-set level, with so many threads of torch's."""
    return {"device": "cpu", "name": processor_name(), "level": level, "threads": threads, **_versions()}


def by_threads(tables: Iterable[Table], level: str) -> dict[int, Table]:
    """The tables of this machine's processor, at an instruction-set level, by the threads that torch had."""
    processor = cpu(level, 0)
    return {
        table.machine["threads"]: table
        for table in tables
        if table.machine == processor | {"threads": table.machine.get("threads")}
    }


def gpu() -> Machine | None:
    """This machine's GPUs; None if they are not all of one kind."""
    names = {torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())}
    if len(names) != 1:
        return None
    return {"device": "cuda", "name": names.pop(), **_versions()}


def here(level: str) -> list[Machine]:
    """What tables must be of to hold for this process now: its processor at a level, its GPUs if they have one."""
    gpus = gpu() if torch.cuda.is_available() else None
    return [cpu(level, torch.get_num_threads()), *([gpus] if gpus else [])]


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
