"""What a run found: as one object that JSON holds, and as text for the terminal."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from .harness import Limits, Row, Timing, short_name
from .table import Line, compact, lay_out, number, percent, shorten, wrap

FORMAT = 2
WIDTH = 100
# The kinds of peers, and the names before ":" of the peers that are of each kind. Of several it shows the fastest.
GROUPS = {
    "eager": ("eager",),
    "fused": ("sdpa", "chunked", "flex"),
    "compile": ("compile",),
    "others": ("liger", "flash-attn", "quack"),
}
GROUP_TITLES = {"eager": "eager", "fused": "torch's fused", "compile": "compile", "others": "others"}
# Whose numbers of a whole model are shown: title -> name in a row.
CONTESTANTS = {"eager": "eager", "compile": "compile", "ours": "ours", "+compile": "ours: compile"}
NOISY = 0.15  # a larger median spread, or drift of the copy rate, makes a run noisy

Results = dict  # as json.loads gives it back, see collect


def collect(
    environment: dict[str, str],
    limits: Limits,
    rows: Sequence[Row],
    end_to_end: dict | None,
    *,
    scaling: Sequence[dict] = (),
    interrupted: bool = False,
) -> Results:
    """One object with all that was found: "format", "environment", "limits", "rows", "scaling", "end_to_end",
    "interrupted". A row has the fields of Row and "speedups", "limit_share", "spread". No number is infinite or NaN.
    """
    found = {
        "format": FORMAT,
        "environment": environment,
        "limits": {
            "copy": {str(size): rate for size, rate in limits.copy.items()},
            "read": {str(size): rate for size, rate in limits.read.items()},
            "product": {short_name(dtype): rate for dtype, rate in limits.product.items()},
            "drift": limits.drift,
        },
        "rows": [
            {**asdict(row), "speedups": row.speedups(), "limit_share": row.limit_share(), "spread": _spread(row.ours)}
            for row in rows
        ],
        "scaling": list(scaling),
        "end_to_end": end_to_end,
        "interrupted": interrupted,
    }
    return _finite(found)


def _finite(found: Any) -> Any:
    """None in place of infinities and NaN, which JSON has not."""
    if isinstance(found, dict):
        return {name: _finite(x) for name, x in found.items()}
    if isinstance(found, (list, tuple)):
        return [_finite(x) for x in found]
    return None if isinstance(found, float) and not math.isfinite(found) else found


def _spread(timing: Timing | None) -> float | None:
    return timing.spread if timing else None


def write_json(results: Results, path: Path) -> None:
    """The results, whole or not at all."""
    temporary = path.with_name(path.name + ".part")
    temporary.write_text(json.dumps(results, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    temporary.replace(path)


def failed(results: Results) -> bool:
    """Did any of our kernels get no time?"""
    end_to_end = results["end_to_end"]
    return any(row["problem"] for row in results["rows"]) or bool(end_to_end and end_to_end["problem"])


def label(row: dict) -> str:
    """What tells a row from the others."""
    return f"{row['operation']} {row['shape']} {row['dtype']} {row['mode']}"


def group_of(peer: str) -> str | None:
    """The key of GROUPS that a peer belongs to; none for "ours: compile"."""
    kind = peer.partition(":")[0]
    return next((group for group, kinds in GROUPS.items() if kind in kinds), None)


def best_speedups(row: dict) -> dict[str, float]:
    """Our speed-up over the fastest peer of each group."""
    found: dict[str, float] = {}
    for name, speedup in row["speedups"].items():
        if (group := group_of(name)) is not None:
            found[group] = min(speedup, found.get(group, speedup))
    return {group: found[group] for group in GROUPS if group in found}


def gaps(row: dict, group: str) -> str:
    """Why none of the group's peers was timed, "" if there is none."""
    reasons = {n: peer for n, peer in row["peers"].items() if group_of(n) == group and isinstance(peer, str)}
    # The group's name says it where the peer has the same.
    return "; ".join(reason if name == group else f"{name}: {reason}" for name, reason in reasons.items())


def noise(results: Results) -> list[str]:
    """The reasons to call the run noisy."""
    reasons = []
    spreads = sorted(row["spread"] for row in results["rows"] if row["spread"] is not None)
    if spreads and (typical := spreads[len(spreads) // 2]) > NOISY:
        reasons.append(f"half of the rows spread by more than {typical:.0%} (limit {NOISY:.0%})")
    if abs(drift := results["limits"]["drift"]) > NOISY:
        reasons.append(f"the rate of copies drifted by {abs(drift):.0%} during the run (limit {NOISY:.0%})")
    load, threads = (_leading_number(results["environment"].get(key, "")) for key in ("load", "threads"))
    if load is not None and threads is not None and load > threads:
        reasons.append(f"{load:g} processes were running on {threads:g} cores at the start")
    return reasons


def _leading_number(text: str) -> float | None:
    found = re.match(r"\d+(\.\d+)?", text)
    return float(found.group()) if found else None


def format_noise(results: Results) -> str:
    """One sentence, "" for a quiet run."""
    reasons = noise(results)
    return f"This run was noisy: {'; '.join(reasons)}." if reasons else ""


Notes = dict[str, str]  # reason -> its mark, "[1]", in the order in which the table names them
Cell = Callable[[dict, Notes], str]


@dataclass(frozen=True)
class Column:
    """A column of the table: its title on two lines, and what stands in it for a row that was timed."""

    title: tuple[str, str]
    cell: Cell


def _speedup(group: str) -> Cell:
    def cell(row: dict, notes: Notes) -> str:
        speedups = best_speedups(row)
        if group in speedups:
            return number(speedups[group], decimals=2)
        reason = gaps(row, group)
        return notes.setdefault(reason, f"[{len(notes) + 1}]") if reason else "-"

    return cell


def _rate(quantity: str, unit: float) -> Cell:
    return lambda row, notes: number(row[quantity] / row["ours"]["median"] / unit if row[quantity] else None)


def _of_ours(quantity: str, unit: float) -> Cell:
    return lambda row, notes: number(row[quantity]["ours"] / unit if "ours" in row[quantity] else None, decimals=2)


SHORT_TITLES = {"eager": "eager", "fused": "fused", "compile": "comp.", "others": "other"}
LIMIT_NAMES = {"copy": "copy", "read": "read", "product": "prod", "resident": "core"}
METRICS: dict[str, list[Column]] = {
    "latency": [Column(("ours", "ms"), lambda row, notes: number(row["ours"]["median"] * 1e3, digits=4))],
    "spread": [Column(("", "+-"), lambda row, notes: percent(row["spread"]))],
    "speedup": [
        Column(("speed-up over" if group == "eager" else "", title), _speedup(group))
        for group, title in SHORT_TITLES.items()
    ],
    "limit": [
        Column(
            ("share of", "limit"),
            lambda row, notes: f"{percent(row['limit_share'])} {LIMIT_NAMES.get(row['limit'], row['limit'])}",
        )
    ],
    "error": [Column(("", "error"), lambda row, notes: number(row["error_share"], decimals=2))],
    "tflops": [Column(("", "TFLOP/s"), _rate("flops", 1e12))],
    "gbps": [Column(("", "GB/s"), _rate("bytes", 1e9))],
    "overhead": [Column(("host", "us"), _of_ours("overhead", 1e-6))],
    "memory": [Column(("peak", "MiB"), _of_ours("memory", 2**20))],
}
DEFAULT_METRICS = ("latency", "spread", "speedup", "limit", "error", "overhead", "memory")
LEGEND = {
    "spread": "+-: half the quartile range.",
    "speedup": "fused: torch's own kernels (SDPA, flex_attention, linear_cross_entropy in chunks). comp.:"
    " torch.compile. other: Liger, flash-attn, quack.",
    "limit": "limit: copy or read of main memory, prod: matrix product, core: arithmetic in the first caches.",
    "error": "error: 1 is the most that is allowed.",
    "overhead": "host: a call on one row (CPU) or until it returns (GPU).",
    "memory": "peak: most memory beyond the inputs.",
}


def format_table(results: Results, metrics: Sequence[str] = DEFAULT_METRICS) -> str:
    """The table, at most 100 columns wide, with the reasons for its gaps and what noise there was beneath it.

    Args:
        metrics: which columns, in their order: names of METRICS.

    Raises:
        ValueError: there is no such metric.
    """
    if unknown := [name for name in metrics if name not in METRICS]:
        raise ValueError(f"metrics: {', '.join(map(repr, unknown))}, must be among {', '.join(METRICS)}")
    columns = [column for name in metrics for column in METRICS[name]]
    notes: Notes = {}
    sections: dict[str, list[Line]] = {}
    for row in results["rows"]:
        cells = row["problem"] or [column.cell(row, notes) for column in columns]
        heading = f"{' '.join(filter(None, (row['operation'], row['dtype'])))}, {row['backend']} kernel"
        sections.setdefault(heading, []).append(Line((row["shape"], row["mode"]), cells))
    lines = lay_out(("shape", "mode"), [column.title for column in columns], sections, WIDTH)
    for reason, mark in notes.items():
        lines += wrap(f"{mark} {shorten(reason, 3 * WIDTH)}", WIDTH)
    lines += wrap(" ".join(LEGEND[name] for name in metrics if name in LEGEND), WIDTH)
    if sentence := format_noise(results):
        lines += wrap(sentence, WIDTH)
    return "\n".join(lines)


def is_model(row: dict) -> bool:
    """Is it a row of a whole model, with tokens to count, that was timed?"""
    return bool(row["tokens"]) and row["ours"] is not None


def model_numbers(row: dict, limits: dict) -> dict[str, dict[str, float]]:
    """Of a whole model, by contestant: "tokens" (per second), "mfu" (share of the product limit), "memory" (bytes)."""
    timings = {"ours": row["ours"], **row["peers"]}
    found: dict[str, dict[str, float]] = {}
    for title, name in CONTESTANTS.items():
        timing, numbers = timings.get(name), {}
        if isinstance(timing, dict):
            numbers["tokens"] = row["tokens"] / timing["median"]
            if row["dtype"] in limits["product"]:
                numbers["mfu"] = row["flops"] / timing["median"] / limits["product"][row["dtype"]]
        if name in row["memory"]:
            numbers["memory"] = row["memory"][name]
        found[title] = numbers
    return found


def format_models(results: Results) -> str:
    """Tokens/s, model FLOP utilisation and peak memory of the whole models, at most 100 columns wide; "" for none."""
    sections: dict[str, list[Line]] = {}
    for row in filter(is_model, results["rows"]):
        by_name = model_numbers(row, results["limits"]).values()
        cells = [compact(numbers.get("tokens")) for numbers in by_name]
        cells += [percent(numbers.get("mfu")) for numbers in by_name]
        cells += [compact(numbers["memory"] / 2**20 if "memory" in numbers else None) for numbers in by_name]
        sections.setdefault(f"{row['operation']} {row['dtype']}", []).append(Line((row["shape"],), cells))
    if not sections:
        return ""
    titles = [
        (title if i == 0 else "", name)
        for title in ("tokens/s", "MFU (of the product limit)", "peak MiB beyond the inputs")
        for i, name in enumerate(CONTESTANTS)
    ]
    return "\n".join(lay_out(("whole model",), titles, sections, WIDTH))


def format_environment(results: Results) -> str:
    """The machine and its measured limits."""
    facts = results["environment"] | {"limits": format_limits(results)}
    return "\n".join(line for name, text in facts.items() for line in wrap(f"{name}: {text}", WIDTH))


def format_limits(results: Results) -> str:
    """What the machine can do, in one line."""
    limits = results["limits"]
    rates = [
        f"{name} " + ", ".join(f"{rate / 1e9:.0f} at {int(size) / 2**20:g} MiB" for size, rate in limits[name].items())
        for name in ("copy", "read")
        if limits[name]
    ]
    products = ", ".join(f"{dtype} {number(rate / 1e9)}" for dtype, rate in limits["product"].items())
    drift = f"drift of copy {limits['drift']:+.0%}"
    return f"{'; '.join(rates)} (GB/s); product {products} (GFLOP/s); {drift}"


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
        lines.append(shorten(f"  {run['problem']}", WIDTH))
    elif run["loss_difference"] is not None:
        lines.append(
            f"  same answers: logits differ by {run['logits_difference']:.1e} at most (largest"
            f" {run['largest_logit']:.2f}), losses by {run['loss_difference']:.1e}"
        )
    return "\n".join(lines)


def _number(value: float | None, form: str, width: int) -> str:
    return f"{'-' if value is None else format(value, form):>{width}}"
