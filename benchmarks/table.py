"""Text tables of bounded width: columns as wide as what stands in them, in as many blocks as it takes."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Line:
    """A line of a table: its name's cells, and the cells behind them, or one text in place of those."""

    name: Sequence[str]
    cells: Sequence[str] | str


def lay_out(
    names: Sequence[str], titles: Sequence[tuple[str, str]], sections: Mapping[str, Sequence[Line]], width: int
) -> list[str]:
    """The lines of the table, none longer than ``width`` as long as the names and one column fit.

    Args:
        names: titles of a line's name, left-aligned and repeated in every block.
        titles: of the other columns, right-aligned, on two lines. An upper one that is too long for its column runs
            on over the next ones, which then need empty upper titles.
        sections: heading -> lines.
        width: in characters. Columns that don't fit go to a further block beneath.
    """
    lines = [line for section in sections.values() for line in section]
    name_widths = [max(len(cell) for cell in column) for column in zip(names, *(line.name for line in lines))]
    start = sum(width + 1 for width in name_widths)
    full = [line.cells for line in lines if not isinstance(line.cells, str)]
    widths = [max([len(title), *(len(cells[i]) for cells in full)]) for i, (_, title) in enumerate(titles)]
    out: list[str] = []
    for shown in _blocks(widths, start, width):
        out += [""] if out else []
        out += _head(names, name_widths, titles, widths, shown)
        for heading, section in sections.items():
            out.append(shorten(heading, width))
            for line in section:
                name = "".join(f" {cell:<{w}}" for cell, w in zip(line.name, name_widths))
                if isinstance(line.cells, str):
                    out.append(shorten(f"{name}  {line.cells}", width))
                else:
                    out.append(name + "".join(f" {line.cells[i]:>{widths[i]}}" for i in shown))
    return [line.rstrip() for line in out]


def _blocks(widths: Sequence[int], start: int, width: int) -> list[list[int]]:
    """Which columns stand in each block, of which names take the first ``start`` characters."""
    blocks: list[list[int]] = [[]]
    used = start
    for i, column in enumerate(widths):
        if blocks[-1] and used + column + 1 > width:
            blocks.append([])
            used = start
        blocks[-1].append(i)
        used += column + 1
    return blocks


def _head(
    names: Sequence[str],
    name_widths: Sequence[int],
    titles: Sequence[tuple[str, str]],
    widths: Sequence[int],
    shown: Sequence[int],
) -> list[str]:
    upper = lower = ""
    for name, width in zip(names, name_widths):
        lower += f" {name:<{width}}"
    end = len(lower)
    for i in shown:
        begin, end = end + 1, end + 1 + widths[i]
        if titles[i][0]:
            upper = f"{upper:<{max(begin, end - len(titles[i][0]))}}{titles[i][0]}"
        lower += f" {titles[i][1]:>{widths[i]}}"
    return [upper, lower]


def number(value: float | None, digits: int = 3, decimals: int = 4) -> str:
    """So many significant digits, at most so many of them behind the point, never an exponent; "-" for None."""
    if value is None:
        return "-"
    leading = math.floor(math.log10(abs(value))) + 1 if value and math.isfinite(value) else 1
    return f"{value:.{min(max(digits - leading, 0), decimals)}f}"


def compact(value: float | None) -> str:
    """A count in at most five characters: 950, 12.3k, 4.56M; "-" for None."""
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e4)):
        if value is not None and value >= size:
            return number(value / (1e3 if unit == "k" else size)) + unit
    return number(value, decimals=1)


def percent(share: float | None) -> str:
    return "-" if share is None else f"{share:.0%}"


def shorten(text: str, width: int) -> str:
    return text if len(text) <= width else text[: width - 3] + "..."


def wrap(text: str, width: int) -> list[str]:
    """Lines of at most ``width`` characters, those behind the first indented."""
    return textwrap.wrap(text, width, subsequent_indent="    ", break_on_hyphens=False) or [""]
