"""The losses of a run, step by step: a CSV file, and a picture of it."""

from __future__ import annotations

import csv
import os
from pathlib import Path
from typing import NamedTuple

from fastformer.models.files import replacing

LOG_FILE = "log.csv"
PICTURE_FILE = "loss.png"


class Row(NamedTuple):
    """A step of training, counted from 1."""

    step: int
    loss: float  # of the batch, before the step
    held_out_loss: float | None  # after the step, where it was measured
    learning_rate: float
    seconds: float  # of training, since the start of the run


class Log:
    """A CSV file that grows by a row a step, written whenever ``flush`` is called.

    Args:
        path: the file; it is begun anew where ``steps_done`` is 0.
        steps_done: rows of later steps are dropped: they came after the checkpoint that the run goes on from.

    Raises:
        OSError: it can't be read or written.
        ValueError: the file is there, but not such a log.
    """

    def __init__(self, path: Path, steps_done: int = 0) -> None:
        self.path = path
        self._pending: list[Row] = []
        kept = [row for row in read_log(path) if row.step <= steps_done] if path.exists() else []
        with replacing(path) as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
            csv.writer(file, lineterminator="\n").writerows([Row._fields, *kept])

    def add(self, row: Row) -> None:
        """One more step."""
        self._pending.append(row)

    def flush(self) -> None:
        """Write the rows that were added since the last time."""
        with open(self.path, "a", newline="", encoding="utf-8") as file:
            csv.writer(file, lineterminator="\n").writerows(self._pending)
            file.flush()
            os.fsync(file.fileno())
        self._pending.clear()


def read_log(path: Path) -> list[Row]:
    """The rows of a log; a last line without its end, of a run that was killed while writing it, is left out.

    Raises:
        ValueError: it is not such a log.
    """
    lines = path.read_bytes().decode(errors="replace").split("\n")[:-1]
    header = ",".join(Row._fields)
    if lines[:1] != [header]:
        raise ValueError(f"{path}: not a log of training: its first line is not {header}")
    rows = []
    for number, line in enumerate(lines[1:], start=2):
        try:
            step, loss, held_out_loss, learning_rate, seconds = line.split(",")
            measured = float(held_out_loss) if held_out_loss else None
            rows.append(Row(int(step), float(loss), measured, float(learning_rate), float(seconds)))
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: not a row of a log of training ({error})") from error
    return rows


def draw_losses(rows: list[Row], path: Path) -> None:
    """Write the curve of the losses over the steps as a picture (PNG).

    Raises:
        ImportError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure  # no pyplot: no display, no global state
    except ModuleNotFoundError as error:
        raise ImportError("matplotlib is not installed: pip install matplotlib", name="matplotlib") from error
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    axes.plot([row.step for row in rows], [row.loss for row in rows], linewidth=0.8, label="training")
    measured = [row for row in rows if row.held_out_loss is not None]
    axes.plot([row.step for row in measured], [row.held_out_loss for row in measured], "o-", label="held-out")
    axes.set_xlabel("step")
    axes.set_ylabel("loss (nats a token)")
    axes.grid(alpha=0.3)
    axes.legend()
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)
