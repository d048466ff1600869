"""What a run leaves behind: one table, one JSON file, one picture. All three are made from the same results."""

from __future__ import annotations

import itertools
import json
from dataclasses import asdict
from pathlib import Path

from .harness import Limits, Row, Timing, short_name

WIDTH = 100
PEERS = ("eager", "fused", "compile")  # the table's columns; of several fused kernels it shows the best
NOISY_SPREAD = 0.15  # a median spread above this is called noisy

Results = dict  # as json.loads gives it back: "environment", "limits", "rows", "end_to_end", "interrupted", "scaling"


def collect(
    environment: dict[str, str], limits: Limits, rows: list[Row], end_to_end: dict | None, *, interrupted: bool
) -> Results:
    """One object with all that was found."""
    return {
        "environment": environment,
        "limits": {
            "copy": limits.copy,
            "read": limits.read,
            "product": {short_name(dtype): rate for dtype, rate in limits.product.items()},
        },
        "rows": [
            {**asdict(row), "speedups": row.speedups(), "limit_share": row.limit_share(), "spread": _spread(row.ours)}
            for row in rows
        ],
        "end_to_end": end_to_end,
        "interrupted": interrupted,
    }


def _spread(timing: Timing | None) -> float | None:
    return timing.spread if timing else None


def failed(results: Results) -> bool:
    """Did any of our kernels get no time?"""
    end_to_end = results["end_to_end"]
    return any(row["problem"] for row in results["rows"]) or bool(end_to_end and end_to_end["problem"])


def best_peers(row: dict) -> dict[str, float]:
    """Our speed-up by column of the table: against the best kernel of each kind ("fused: a", "fused: b" -> "fused")."""
    columns: dict[str, float] = {}
    for name, speedup in row["speedups"].items():
        column = name.partition(":")[0]
        columns[column] = min(speedup, columns.get(column, speedup))
    return columns


def format_table(results: Results) -> str:
    """The table, at most 100 columns wide, with the reasons for its gaps beneath it."""
    lines = [
        f"{'':<39}{'ours':>9}{'':>5}   {'speed-up against torch':<22}{'share of':>13}{'error /':>8}",
        f"  {'shape':<24}{'type':<5}{'mode':<8}{'ms':>9}{'+-':>5}"
        f"{'eager':>8}{'fused':>8}{'compile':>9}{'the limit':>13}{'allowed':>8}",
    ]
    notes: dict[str, str] = {}  # reason -> letter
    for (operation, backend), rows in itertools.groupby(results["rows"], lambda r: (r["operation"], r["backend"])):
        lines.append(f"{operation} ({backend} kernel)")
        lines += [_format_row(row, notes) for row in rows]
    lines += [_shorten(f"{letter}: {reason}") for reason, letter in notes.items()]
    lines.append("fused: torch's own fused kernel (SDPA; linear_cross_entropy in chunks). +-: half the quartile range.")
    spreads = sorted(row["spread"] for row in results["rows"] if row["spread"] is not None)
    if spreads and (typical := spreads[len(spreads) // 2]) > NOISY_SPREAD:
        lines.append(f"The machine was noisy: half of the rows spread by more than {typical:.0%}.")
    return "\n".join(line.rstrip() for line in lines)


def _format_row(row: dict, notes: dict[str, str]) -> str:
    start = f"  {row['shape']:<24}{row['dtype']:<5}{row['mode']:<8}"
    if row["problem"]:
        return _shorten(f"{start} {row['problem']}")
    speedups = best_peers(row)
    cells = []
    for column, width in zip(PEERS, (8, 8, 9)):
        reasons = [p for name, p in row["peers"].items() if name.partition(":")[0] == column and isinstance(p, str)]
        if column in speedups:
            cell = f"{speedups[column]:.2f}x"
        elif reasons:
            cell = notes.setdefault(reasons[0], f"[{len(notes) + 1}]")
        else:
            cell = "-"
        cells.append(f"{cell:>{width}}")
    share = f"{row['limit_share']:.0%} {row['limit']}"
    return (
        f"{start}{row['ours']['median'] * 1e3:>9.3f}{row['spread']:>5.0%}{''.join(cells)}"
        f"{share:>13}{row['error_share']:>8.2f}"
    )


def _shorten(line: str) -> str:
    return line if len(line) <= WIDTH else line[: WIDTH - 3] + "..."


def format_environment(results: Results) -> str:
    """The machine and its measured limits."""
    limits = results["limits"]
    products = ", ".join(f"{dtype} {rate / 1e9:.0f} GFLOP/s" for dtype, rate in limits["product"].items())
    lines = [f"{name}: {text}" for name, text in results["environment"].items()]
    rates = [
        f"{name} " + ", ".join(f"{rate / 1e9:.0f} at {int(size) >> 20} MiB" for size, rate in limits[name].items())
        for name in ("copy", "read")
    ]
    lines.append(f"limits: {'; '.join(rates)} (GB/s); product {products}")
    return "\n".join(line for text in lines for line in _wrap(text))


def _wrap(text: str) -> list[str]:
    lines = [""]
    for word in text.split(" "):
        if len(lines[-1]) + len(word) + 1 > WIDTH and lines[-1].strip():
            lines.append("   ")
        lines[-1] += f" {word}" if lines[-1] else word
    return lines


def format_end_to_end(run: dict) -> str:
    """The summary of the two GPT runs."""
    lines = [
        f"End to end: {run['model']},",
        f"  {run['batch']}, {run['steps']} steps, {run['dtype']}, {run['backend']} kernels",
        f"  {'':<12}{'tokens/s':>10}{'first loss':>12}{'last loss':>12}{'held-out':>10}{'peak memory':>14}",
    ]
    for name, losses in run["losses"].items():
        cells = [
            _number(run["tokens_per_second"].get(name), ".0f", 10),
            _number(losses[0] if losses else None, ".4f", 12),
            _number(losses[-1] if losses else None, ".4f", 12),
            _number(run["held_out_loss"].get(name), ".4f", 10),
            f"{run['peak_bytes'][name] / 2**20:>10.0f} MiB" if name in run["peak_bytes"] else f"{'-':>14}",
        ]
        lines.append(f"  {name:<12}{''.join(cells)}")
    if run["speedup"] is not None:
        lines.append(f"  {run['speedup']:.2f}x as many tokens/s")
    if run["problem"]:
        lines.append(_shorten(f"  {run['problem']}"))
    elif run["loss_difference"] is not None:
        lines.append(
            f"  same answers: logits differ by {run['logits_difference']:.1e} at most (largest"
            f" {run['largest_logit']:.2f}), losses by {run['loss_difference']:.1e}"
        )
    return "\n".join(lines)


def _number(value: float | None, form: str, width: int) -> str:
    return f"{'-' if value is None else format(value, form):>{width}}"


def write_json(results: Results, path: Path) -> None:
    """The results, whole or not at all."""
    temporary = path.with_name(path.name + ".part")
    temporary.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    temporary.replace(path)


def write_picture(results: Results, path: Path) -> None:
    """PNG: our speed-up against each kind of peer as bars, and the loss curves of the end-to-end run."""
    from matplotlib.figure import Figure  # no pyplot: no display, no global state

    rows = [row for row in results["rows"] if row["speedups"]]
    run = results["end_to_end"]
    has_curves = bool(run and run["steps"])
    figure = Figure(figsize=(14 if has_curves else 9, max(5, 1 + 0.22 * len(rows))), layout="constrained")
    axes = figure.subplots(1, 1 + has_curves, width_ratios=[3, 2][: 1 + has_curves], squeeze=False)[0]
    _draw_bars(axes[0], rows)
    if has_curves:
        _draw_losses(axes[1], run)
    figure.suptitle(results["environment"].get("gpu", results["environment"]["processor"].partition(",")[0]))
    figure.savefig(path, dpi=110, format="png")


def _draw_bars(axes: object, rows: list[dict]) -> None:
    height = 0.8 / len(PEERS)
    for index, column in enumerate(PEERS):
        bars = [(y, best_peers(row)[column]) for y, row in enumerate(rows) if column in best_peers(row)]
        if bars:
            places, speedups = zip(*bars)
            offset = (index - (len(PEERS) - 1) / 2) * height
            axes.barh(
                [y + offset for y in places], [s - 1 for s in speedups], height, left=1, label=f"over torch, {column}"
            )
    axes.axvline(1, color="black", linewidth=1)
    axes.set_yticks(range(len(rows)), [f"{r['operation']} {r['shape']} {r['dtype']} {r['mode']}" for r in rows])
    axes.tick_params(axis="y", labelsize=7)
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.set_xscale("log", base=2)
    axes.set_xlabel("speed-up of fastformer (right of 1: faster)")
    axes.xaxis.set_major_formatter("{x:g}x")
    axes.grid(axis="x", alpha=0.3)
    if rows:
        axes.legend(loc="lower right")


def _draw_losses(axes: object, run: dict) -> None:
    for (name, losses), style in zip(run["losses"].items(), ("-", "--")):
        speed = run["tokens_per_second"].get(name)
        axes.plot(losses, style, linewidth=2, label=name + (f", {speed:.0f} tokens/s" if speed else ""))
    axes.set_xlabel("step")
    axes.set_ylabel("training loss (nats a token)")
    axes.set_title(run["model"], fontsize=9)
    axes.grid(alpha=0.3)
    axes.legend()
