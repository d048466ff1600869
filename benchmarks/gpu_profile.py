"""What bounds the kernels that matter most: Nsight Compute over one call of each, as a short table.

python -m fastformer.benchmarks.gpu_profile --ncu PROGRAM --backend cuda --out FILE.csv
"""

from __future__ import annotations

import argparse
import csv
import re
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

import fastformer
from fastformer import functional as F

from .gpu_calls import Draw, attention, backward, feed_forward
from .timing import Call

MODULE = "fastformer.benchmarks.gpu_profile"
SEQUENCES = (2, 16, 4096)  # batch, heads and tokens of the attention cases
MARK = "spin_kernel"  # of torch.cuda._sleep, which runs in front of each case: so the kernels behind it are known
COLUMNS = {  # ncu's name of a metric -> title, and in the table's order
    "Duration": "time",
    "Compute (SM) Throughput": "compute",
    "Memory Throughput": "memory",
    "DRAM Throughput": "DRAM",
    "Theoretical Occupancy": "occupancy: limit",
    "Achieved Occupancy": "achieved",
}


class Kernel(NamedTuple):
    """One launch: the case that it is of, its name, and by ncu's names of the metrics a value with its unit."""

    case: str
    name: str
    metrics: dict[str, str]


def _layer_norm(rows: int, columns: int, draw: Draw) -> Call:
    return partial(F.layer_norm, draw(rows, columns), (columns,), draw(columns), draw(columns))


def _softmax(rows: int, columns: int, draw: Draw) -> Call:
    return partial(F.softmax, draw(rows, columns), -1)


CASES: dict[str, Callable[[Draw], Call]] = {
    "attention d64 forward": partial(attention, *SEQUENCES, 64),
    "attention d64 backward": partial(backward, attention, *SEQUENCES, 64),
    "attention d128 forward": partial(attention, *SEQUENCES, 128),
    "attention d128 backward": partial(backward, attention, *SEQUENCES, 128),
    "feed_forward 8192x1024x4096": partial(feed_forward, 8192, 1024, 4096),
    "layer_norm 16384x4096": partial(_layer_norm, 16384, 4096),
    "softmax 16384x4096": partial(_softmax, 16384, 4096),
}


def run_cases() -> None:
    """Each in bfloat16: once to compile and load what it needs, and once where ncu looks at it."""

    def draw(*shape: int, scale: float = 1.0) -> Tensor:
        return (scale * torch.randn(shape, device="cuda", dtype=torch.bfloat16)).requires_grad_()

    for make in CASES.values():
        call = make(draw)
        call()
        torch.cuda.synchronize()
        torch.cuda.profiler.start()
        torch.cuda._sleep(1)
        call()
        torch.cuda.synchronize()
        torch.cuda.profiler.stop()


def command(ncu: str, backend: str, out: Path) -> list[str]:
    """ncu over run_cases; it writes to ``out``, and leaves the clocks as they are."""
    options = ["--profile-from-start", "off", "--clock-control", "none", "--csv", "--log-file", str(out)]
    sections = ["--section", "SpeedOfLight", "--section", "Occupancy"]
    return [ncu, *options, *sections, sys.executable, "-m", MODULE, "--backend", backend]


def kernels(text: str) -> list[Kernel]:
    """Those in what ncu wrote about run_cases."""
    names = list(CASES)
    lines = text.splitlines()
    start = next((i for i, line in enumerate(lines) if line.startswith('"ID"')), len(lines))
    found: list[Kernel] = []
    marks, last = 0, None
    for row in csv.DictReader(lines[start:]):  # a row for each metric of a launch
        if row["ID"] != last:
            last = row["ID"]
            marks += MARK in row["Kernel Name"]
            found.append(Kernel(names[marks - 1], short_name(row["Kernel Name"]), {}))
        found[-1].metrics[row["Metric Name"]] = f"{row['Metric Value']} {row['Metric Unit']}"
    return [kernel for kernel in found if kernel.name != MARK]


def short_name(kernel: str) -> str:
    """Without return type, namespaces and arguments: of "void a::<unnamed>::b<float, (int)4>(c *)" it is "b"."""
    plain = re.sub(r"<unnamed>|\(anonymous namespace\)", "", kernel)
    return re.sub(r"[<(].*", "", plain).split("::")[-1].removeprefix("void ")


def format_table(found: list[Kernel]) -> str:
    """A line for each kernel."""
    rows = [("case", "kernel", *COLUMNS.values())]
    rows += [(x.case, x.name, *(x.metrics.get(metric, "-") for metric in COLUMNS)) for x in found]
    widths = [max(map(len, column)) for column in zip(*rows)]
    aligned = (
        [cell.ljust(width) if i < 2 else cell.rjust(width) for i, (cell, width) in enumerate(zip(row, widths))]
        for row in rows
    )
    return "\n".join("  ".join(cells).rstrip() for cells in aligned)


def main() -> int:
    """Without --ncu: the cases themselves, which is what ncu runs."""
    parser = argparse.ArgumentParser(description="Profiles one call of each of the kernels that matter most.")
    parser.add_argument("--backend", choices=("triton", "cuda"), required=True, help="whose kernels")
    parser.add_argument("--ncu", metavar="PROGRAM", help="Nsight Compute")
    parser.add_argument("--out", type=Path, metavar="FILE.csv", help="where ncu writes all that it found")
    options = parser.parse_args()
    if (options.ncu is None) != (options.out is None):
        parser.error("--out: goes with --ncu")
    if options.ncu is None:
        with fastformer.backend(options.backend):
            run_cases()
        return 0
    options.out.unlink(missing_ok=True)
    status = subprocess.run(command(options.ncu, options.backend, options.out), check=False).returncode
    text = options.out.read_text(encoding="utf-8") if options.out.exists() else ""
    found = kernels(text)
    print(format_table(found) if found else f"{text}\nncu profiled no kernel")
    return status or (0 if found else 1)


if __name__ == "__main__":
    sys.exit(main())
