"""How a call's time grows with the length of a sequence and the width of a row, on one thread and on all of them."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as torch_functional
from torch import Tensor

from fastformer import functional

from .harness import CpuTimer, Pace, measure, short_name

HEADS, HEAD_DIM = 12, 64
LENGTHS = (128, 256, 512, 1024, 2048, 4096)
ELEMENTS = 3 * 2**20  # in the rows of each width together
WIDTHS = (64, 128, 256, 512, 1024, 2048, 4096, 16384)
DTYPES = (torch.float32, torch.bfloat16)
POINTS = 2 * (len(LENGTHS) + 2 * len(WIDTHS))  # of one number of threads


@dataclass(frozen=True)
class Point:
    """Seconds of one forward call at one size, ours and torch's."""

    operation: str
    dtype: str
    axis: str
    size: int
    threads: int
    ours: float
    torch: float


def points(threads: int, rng: random.Random) -> Iterator[Point]:
    """Attention over LENGTHS, softmax and layer_norm over WIDTHS, under the backend that is set."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for dtype in DTYPES:
            for operation, axis, size, ours, peer in _calls(dtype):
                pace = Pace(row_seconds=0.2, min_rounds=5)
                with torch.no_grad():
                    timings = measure({"ours": ours, "torch": peer}, CpuTimer(), pace, rng)
                seconds = {name: timing.median for name, timing in timings.items()}
                yield Point(operation, short_name(dtype), axis, size, threads, **seconds)
    finally:
        torch.set_num_threads(before)


def _calls(dtype: torch.dtype) -> Iterator[tuple[str, str, int, Callable[[], Tensor], Callable[[], Tensor]]]:
    for length in LENGTHS:
        inputs = torch.randn(3, 1, HEADS, length, HEAD_DIM, dtype=dtype).unbind()
        functions = (functional.scaled_dot_product_attention, torch_functional.scaled_dot_product_attention)
        yield "attention", "length", length, *(partial(f, *inputs, is_causal=True) for f in functions)
    for width in WIDTHS:
        rows, (weight, bias) = torch.randn(ELEMENTS // width, width, dtype=dtype), torch.randn(2, width, dtype=dtype)
        yield "softmax", "width", width, *(partial(m.softmax, rows, -1) for m in (functional, torch_functional))
        norms = (partial(m.layer_norm, rows, (width,), weight, bias) for m in (functional, torch_functional))
        yield "layer_norm", "width", width, *norms


def write_picture(found: list[dict], path: Path) -> None:
    """PNG: a panel for each operation and dtype, a line for each of ours and torch's and each number of threads."""
    from matplotlib.figure import Figure  # no pyplot: no display, no global state

    operations = list(dict.fromkeys(point["operation"] for point in found))
    dtypes = list(dict.fromkeys(point["dtype"] for point in found))
    figure = Figure(figsize=(4.5 * len(operations), 3.5 * len(dtypes)), layout="constrained")
    panels = figure.subplots(len(dtypes), len(operations), squeeze=False)
    for row, dtype in zip(panels, dtypes):
        for axes, operation in zip(row, operations):
            chosen = [point for point in found if (point["operation"], point["dtype"]) == (operation, dtype)]
            for threads, style in zip(sorted({point["threads"] for point in chosen}), ("--", "-")):
                line = [point for point in chosen if point["threads"] == threads]
                for name, color in (("ours", "tab:blue"), ("torch", "tab:orange")):
                    label = f"{'fastformer' if name == 'ours' else name}, {threads} thread{'s'[: threads > 1]}"
                    times = [point[name] * 1e3 for point in line]
                    axes.plot([point["size"] for point in line], times, style, color=color, marker=".", label=label)
            axes.set(xscale="log", yscale="log", title=f"{operation} {dtype}", xlabel=chosen[0]["axis"], ylabel="ms")
            axes.xaxis.set_major_formatter("{x:g}")
            axes.grid(alpha=0.3)
    panels[0][0].legend(fontsize=8)
    figure.savefig(path, dpi=110, format="png")


def as_rows(found: list[Point]) -> list[dict]:
    """The points as JSON holds them."""
    return [asdict(point) for point in found]
