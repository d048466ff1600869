"""The pictures of a run, as SVG: speed-ups, roofline, times over sizes, errors, training losses."""

from __future__ import annotations

import io
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from .report import GROUPS, Results, best_speedups, group_of
from .table import number

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, GRID, PAPER = "#24292f", "#c8ccd0", "#ffffff"  # text and axes; lines behind the data; the background
# Okabe and Ito's colours, which colour-blind readers can tell apart.
ORANGE, SKY, GREEN, BLUE, RED, PURPLE = "#e69f00", "#56b4e9", "#009e73", "#0072b2", "#d55e00", "#cc79a7"
OURS = RED
GROUP_COLORS = {"eager": ORANGE, "fused": BLUE, "compile": GREEN, "others": PURPLE}
GROUP_LABELS = {
    "eager": "torch, eager",
    "fused": "torch, fused",
    "compile": "torch.compile",
    "others": "Liger and others",
}
DTYPE_COLORS = {"fp32": BLUE, "bf16": ORANGE, "fp16": GREEN}
FONT = "DejaVu Sans"
FONTS = "DejaVu Sans, Verdana, sans-serif"  # text stays text, in what the reader's machine has
STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "fastformer",  # the same ids in every run
    "font.family": [FONT],
    "font.size": 9,
    "axes.titlesize": 10,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "figure.facecolor": PAPER,
    "axes.facecolor": "none",
    "legend.frameon": False,
}
WIDTH = 9.5  # inches of 72 pixels
# Rows whose time is drawn over one of their sizes need so many values of it.
MIN_SIZES = 3

Draw = Callable[[], "Figure"]


def write_all(results: Results, folder: Path, drawn: Mapping[str, str] | None = None) -> list[Path]:
    """Writes every picture that there is data for; the files written. ``drawn``: what draw made, if that is done."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for name, svg in (draw(results) if drawn is None else drawn).items():
        path = folder / f"{name}.svg"
        path.write_text(svg, encoding="utf-8")
        paths.append(path)
    return paths


def draw(results: Results, names: Sequence[str] | None = None) -> dict[str, str]:
    """The pictures (or those named) that there is data for: name -> SVG, the same for the same results."""
    from matplotlib import rc_context

    drawn = {}
    for name, plan in plans(results).items():
        if names is None or name in names:
            with rc_context(STYLE):
                text = io.StringIO()
                # Not the backend's own name, version and day: they change, and the picture doesn't.
                plan().savefig(text, format="svg", metadata={"Date": None, "Creator": None})
            drawn[name] = text.getvalue().replace(f"'{FONT}'", FONTS)
    return drawn


def plans(results: Results) -> dict[str, Draw]:
    """How each picture that there is data for is drawn, by name."""
    timed = [row for row in results["rows"] if best_speedups(row)]
    found: dict[str, Draw] = {}
    if timed:
        found["speedups"] = partial(_speedups, timed)
    for operation in dict.fromkeys(row["operation"] for row in timed):
        found[f"speedups-{operation}"] = partial(_bars, [row for row in timed if row["operation"] == operation])
    measured = [row for row in results["rows"] if row["ours"] and row["flops"] and row["bytes"]]
    measured = [row for row in measured if row["dtype"] in results["limits"]["product"]]
    if measured and results["limits"]["copy"]:
        found["roofline"] = partial(_roofline, measured, results["limits"])
    if results["scaling"]:
        found["scaling"] = partial(_scaling, results["scaling"])
    if series := sizes_series(results["rows"]):
        found["sizes"] = partial(_sizes, series)
    judged = [row for row in results["rows"] if row["error_share"] is not None]
    if judged:
        found["errors"] = partial(_errors, judged)
    run = results["end_to_end"]
    if run and run["steps"]:
        found["losses"] = partial(_losses, run)
    return found


def _figure(width: float, height: float) -> Figure:
    from matplotlib.figure import Figure  # no pyplot: no display, no global state

    return Figure(figsize=(width, height), layout="constrained")


def _values(rows: Sequence[dict], key: str, order: Sequence[str] = ()) -> list[str]:
    """What the rows have under the key: those of ``order`` first, then as they come."""
    found = dict.fromkeys(row[key] for row in rows)
    return [value for value in order if value in found] + [value for value in found if value not in order]


def _legend(figure: Figure, handles: Sequence[object], columns: int = 5) -> None:
    figure.legend(handles=list(handles), loc="outside upper center", ncols=columns)


def _patches(groups: Sequence[str]) -> list[object]:
    from matplotlib.patches import Patch

    return [Patch(color=GROUP_COLORS[group], label=f"over {GROUP_LABELS[group]}") for group in groups]


def _groups(rows: Sequence[dict]) -> list[str]:
    found = {group for row in rows for group in best_speedups(row)}
    return [group for group in GROUPS if group in found]


def _speedup_axis(axes: Axes) -> None:
    axes.axvline(1, color=INK, linewidth=1)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter("{x:.3g}x")
    axes.set_xlabel("speed-up of fastformer (right of 1: faster)")
    axes.grid(visible=False, axis="y")
    axes.tick_params(axis="y", length=0)


def _speedups(rows: Sequence[dict]) -> Figure:
    """By operation: a bar for the geometric mean over the rows, a dot for each row; a panel for each dtype."""
    operations, groups = _values(rows, "operation"), _groups(rows)
    dtypes = _values(rows, "dtype", list(DTYPE_COLORS))
    height = 0.8 / len(groups)
    figure = _figure(WIDTH, 1.2 + len(operations) * (0.12 + 0.16 * len(groups)))
    panels = figure.subplots(1, len(dtypes), sharey=True, sharex=True, squeeze=False)[0]
    for axes, dtype in zip(panels, dtypes):
        for y, operation in enumerate(operations):
            own = [best_speedups(row) for row in rows if (row["operation"], row["dtype"]) == (operation, dtype)]
            for i, group in enumerate(groups):
                found = [speedups[group] for speedups in own if group in speedups]
                if found:
                    place = y + (i - (len(groups) - 1) / 2) * height
                    mean = math.exp(sum(map(math.log, found)) / len(found))
                    axes.barh(place, mean - 1, 0.85 * height, left=1, color=GROUP_COLORS[group])
                    axes.plot(found, [place] * len(found), ".", color=INK, markersize=2.5)
        axes.set_title(dtype)
        _speedup_axis(axes)
    panels[0].set_yticks(range(len(operations)), operations)
    panels[0].set_ylim(len(operations) - 0.4, -0.6)
    _legend(figure, _patches(groups))
    figure.supxlabel("bars: geometric mean; dots: each row", fontsize=8)
    return figure


def _bars(rows: Sequence[dict]) -> Figure:
    """One operation: the speed-ups of each shape and mode, with their numbers; a panel for each dtype."""
    groups, dtypes = _groups(rows), _values(rows, "dtype", list(DTYPE_COLORS))
    names = list(dict.fromkeys((row["shape"], row["mode"]) for row in rows))
    height = 0.84 / len(groups)
    figure = _figure(WIDTH, 1.2 + len(names) * (0.1 + 0.15 * len(groups)))
    panels = figure.subplots(1, len(dtypes), sharey=True, sharex=True, squeeze=False)[0]
    for axes, dtype in zip(panels, dtypes):
        for row in (row for row in rows if row["dtype"] == dtype):
            y = names.index((row["shape"], row["mode"]))
            for group, speedup in best_speedups(row).items():
                place = y + (groups.index(group) - (len(groups) - 1) / 2) * height
                axes.barh(place, speedup - 1, 0.85 * height, left=1, color=GROUP_COLORS[group])
                axes.annotate(
                    number(speedup, decimals=2),
                    (max(speedup, 1), place),
                    (3, 0),
                    textcoords="offset points",
                    va="center_baseline",
                    fontsize=7,
                )
        axes.set_title(f"{rows[0]['operation']} {dtype}")
        _speedup_axis(axes)
        axes.margins(x=0.12)  # for the numbers
    panels[0].set_yticks(range(len(names)), [f"{shape} {mode}" for shape, mode in names])
    panels[0].set_ylim(len(names) - 0.4, -0.6)
    _legend(figure, _patches(groups))
    return figure


def _roofline(rows: Sequence[dict], limits: dict) -> Figure:
    """FLOP/s over FLOP/byte: ours and the fastest peer of each row under what the machine was measured to do."""
    from matplotlib.lines import Line2D

    operations, dtypes = _values(rows, "operation"), _values(rows, "dtype", list(DTYPE_COLORS))
    colors = itertools.cycle((BLUE, ORANGE, GREEN, PURPLE, SKY))
    looks = {name: (marker, color) for name, marker, color in zip(operations, itertools.cycle("os^DvPX"), colors)}
    figure = _figure(WIDTH, 5.2)
    panels = figure.subplots(1, len(dtypes), sharex=True, sharey=True, squeeze=False)[0]
    intensities = [_intensity(row) for row in rows]
    for axes, dtype in zip(panels, dtypes):
        _draw_roofs(axes, limits, limits["product"][dtype], (min(intensities) / 2, 2 * max(intensities)))
        for operation, (marker, color) in looks.items():
            own = [row for row in rows if (row["operation"], row["dtype"]) == (operation, dtype)]
            ours = [(_intensity(row), row["flops"] / row["ours"]["median"]) for row in own]
            best = [(_intensity(row), row["flops"] / seconds) for row in own if (seconds := _best_seconds(row))]
            look = {"marker": marker, "color": color, "linestyle": "none", "markersize": 4.5}
            axes.plot(*zip(*ours) if ours else ((), ()), **look)
            axes.plot(*zip(*best) if best else ((), ()), **look, markerfacecolor="none")
            pairs = [
                (x, y, row["flops"] / seconds) for (x, y), row in zip(ours, own) if (seconds := _best_seconds(row))
            ]
            if pairs:
                axes.vlines(*zip(*pairs), color=color, linewidth=0.7, alpha=0.6)
        axes.set(xscale="log", yscale="log", title=dtype, xlabel="FLOP a byte of main memory, at least")
    panels[0].set_ylabel("FLOP/s")
    panels[0].legend(loc="lower right", fontsize=8)
    handles = [
        Line2D([], [], marker=marker, color=color, linestyle="none", label=name)
        for name, (marker, color) in looks.items()
    ]
    _legend(figure, handles, columns=6)
    figure.supxlabel("filled: fastformer; hollow: the fastest peer of the same row", fontsize=8)
    return figure


def _intensity(row: dict) -> float:
    """FLOP a byte."""
    return row["flops"] / row["bytes"]


def _best_seconds(row: dict) -> float | None:
    """Of the fastest peer."""
    timed = [peer["median"] for name, peer in row["peers"].items() if isinstance(peer, dict) and group_of(name)]
    return min(timed, default=None)


def _draw_roofs(axes: Axes, limits: dict, peak: float, ends: tuple[float, float]) -> None:
    """What bounds calls that compute little (copies, reads), and those that compute much (products at ``peak``)."""
    copies, reads = ({int(size): rate for size, rate in limits[name].items()} for name in ("copy", "read"))
    roofs = {"copy, main memory": (copies[max(copies)], "-"), "copy, caches": (max(copies.values()), "--")}
    if reads:
        roofs["read, main memory"] = (reads[max(reads)], ":")
    bends = [peak / rate for rate, _ in roofs.values()]
    start, end = min(ends[0], *bends), max(ends[1], *bends)
    for (name, (rate, line)), bend in zip(roofs.items(), bends):
        axes.plot([start, bend], [rate * start, peak], line, color=INK, linewidth=1, label=name)
    axes.plot([min(bends), end], [peak, peak], color=INK, linewidth=1)
    text = f"product, {number(peak / 1e12)} TFLOP/s"
    axes.annotate(text, (end, peak), (0, 3), textcoords="offset points", ha="right")


def _scaling(points: Sequence[dict]) -> Figure:
    """Milliseconds over the size: a panel for each operation and dtype, a line for each contestant and thread count."""
    operations, dtypes = _values(points, "operation"), _values(points, "dtype", list(DTYPE_COLORS))
    figure = _figure(WIDTH, 0.7 + 2.6 * len(dtypes))
    panels = figure.subplots(len(dtypes), len(operations), squeeze=False)
    for line, dtype in zip(panels, dtypes):
        for axes, operation in zip(line, operations):
            chosen = [point for point in points if (point["operation"], point["dtype"]) == (operation, dtype)]
            for threads, style in zip(sorted({point["threads"] for point in chosen}), ("--", "-", ":")):
                own = [point for point in chosen if point["threads"] == threads]
                for name, color in (("ours", OURS), ("torch", BLUE)):
                    label = "fastformer" if name == "ours" else name
                    if threads:  # none on a GPU
                        label += f", {threads} thread{'s'[: threads > 1]}"
                    times = [point[name] * 1e3 for point in own]
                    axes.plot([point["size"] for point in own], times, style, color=color, marker=".", label=label)
            if chosen:
                _time_axes(axes, f"{operation} {dtype}", chosen[0]["axis"])
    _legend(figure, panels[0][0].lines, columns=4)
    return figure


def _time_axes(axes: Axes, title: str, axis: str) -> None:
    from matplotlib.ticker import LogLocator, NullFormatter

    axes.set(yscale="log", title=title, xlabel=axis, ylabel="ms")
    axes.set_xscale("log", base=2)
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5), numticks=8))
    for ticks in (axes.xaxis, axes.yaxis):
        ticks.set_major_formatter("{x:g}")
        ticks.set_minor_formatter(NullFormatter())


Series = dict[tuple[str, str, str, str], list[dict]]  # operation, axis, mode, dtype -> rows, by size


def sizes_series(rows: Sequence[dict]) -> Series:
    """The timed rows that differ in one of their sizes alone; of several such series the longest."""
    candidates: dict[tuple, dict[int, dict]] = {}
    for row in (row for row in rows if row["ours"]):
        for axis, size in row["sizes"].items():
            others = tuple(sorted((name, value) for name, value in row["sizes"].items() if name != axis))
            # Shapes say more than sizes ("causal"): what is left of them without numbers must agree too.
            kind = "".join(letter for letter in row["shape"] if not letter.isdigit())
            key = (row["operation"], axis, row["mode"], row["dtype"])
            candidates.setdefault((key, others, kind), {})[size] = row
    series: Series = {}
    for (key, _, _), by_size in candidates.items():
        if len(by_size) >= max(MIN_SIZES, 1 + len(series.get(key, []))):
            series[key] = [by_size[size] for size in sorted(by_size)]
    return series


def _sizes(series: Series) -> Figure:
    """Milliseconds of ours and of the fastest peer of each group over one of the rows' sizes."""
    from matplotlib.lines import Line2D

    wanted = list(dict.fromkeys((operation, axis, dtype) for operation, axis, _, dtype in series))
    modes = list(dict.fromkeys(mode for _, _, mode, _ in series))
    styles = dict(zip(modes, ("-", "--", ":")))
    columns = 3
    lines = -(-len(wanted) // columns)
    figure = _figure(WIDTH, 0.9 + 2.5 * lines)
    panels = figure.subplots(lines, columns, squeeze=False).flat
    groups: set[str] = set()
    for axes, (operation, axis, dtype) in itertools.zip_longest(panels, wanted, fillvalue=("", "", "")):
        if not operation:
            axes.set_axis_off()
            continue
        for mode, style in styles.items():
            rows = series.get((operation, axis, mode, dtype), [])
            look = {"linestyle": style, "marker": "."}
            for group in _groups(rows):
                groups.add(group)
                timed = [(row["sizes"][axis], _fastest(row, group)) for row in rows if group in best_speedups(row)]
                axes.plot(*zip(*timed), color=GROUP_COLORS[group], **look)
            times = [row["ours"]["median"] * 1e3 for row in rows]
            axes.plot([row["sizes"][axis] for row in rows], times, color=OURS, **look)
        _time_axes(axes, f"{operation} {dtype}", axis)
    colors = {"fastformer": OURS} | {GROUP_LABELS[group]: GROUP_COLORS[group] for group in GROUPS if group in groups}
    handles = [Line2D([], [], marker=".", color=color, label=name) for name, color in colors.items()]
    handles += [Line2D([], [], linestyle=style, color=INK, label=mode) for mode, style in styles.items()]
    _legend(figure, handles, columns=len(handles))
    return figure


def _fastest(row: dict, group: str) -> float:
    """Milliseconds of the fastest peer of the group."""
    return best_speedups(row)[group] * row["ours"]["median"] * 1e3


def _errors(rows: Sequence[dict]) -> Figure:
    """Each row's error as a share of the allowed one: a line for each operation, a dot for each row."""
    operations, dtypes = _values(rows, "operation"), _values(rows, "dtype", list(DTYPE_COLORS))
    figure = _figure(WIDTH, 1.2 + 0.32 * len(operations))
    axes = figure.subplots()
    for i, dtype in enumerate(dtypes):
        own = [row for row in rows if row["dtype"] == dtype]
        shift = (i - (len(dtypes) - 1) / 2) * 0.24
        places = [operations.index(row["operation"]) + shift for row in own]
        # Errors of zero have no place on a logarithmic axis: they are drawn at its end.
        shares = [max(row["error_share"], 1e-3) for row in own]
        axes.plot(shares, places, ".", color=DTYPE_COLORS[dtype], markersize=7, alpha=0.75, label=dtype)
    axes.axvline(1, color=INK, linewidth=1)
    axes.annotate("allowed", (1, -0.6), (-3, -2), textcoords="offset points", ha="right", va="top", fontsize=8)
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter("{x:g}")
    axes.set_yticks(range(len(operations)), operations)
    axes.set_ylim(len(operations) - 0.4, -0.6)
    axes.set_xlabel("worst error, as a share of what is allowed")
    _legend(figure, axes.lines[: len(dtypes)])
    return figure


def _losses(run: dict) -> Figure:
    """The training losses of the two GPTs over the steps."""
    figure = _figure(WIDTH, 3.6)
    axes = figure.subplots()
    for (name, losses), color, style in zip(run["losses"].items(), (BLUE, OURS), ("-", "--")):
        speed = run["tokens_per_second"].get(name)
        label = name + (f", {speed:.0f} tokens/s" if speed else "")
        values = [math.nan if loss is None else loss for loss in losses]
        axes.plot(range(1, len(losses) + 1), values, style, color=color, linewidth=2, label=label)
    axes.set(xlabel="step", ylabel="training loss (nats a token)", title=run["model"])
    axes.legend()
    return figure
