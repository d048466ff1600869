"""Writes the measured tables of README.md from the JSON of a run, that of the operations or that of whole models:

python -m fastformer.benchmarks.readme_table benchmark-results/benchmark.json README.md
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from .report import PEERS, Results, best_peers

COLUMNS = [(dtype, mode) for dtype in ("fp32", "bf16") for mode in ("fwd", "fwd+bwd")]
MODELS = "hugging_face"  # the operation of rows that are whole models


def markers(table: str) -> tuple[str, str]:
    """Between which a table stands in the README."""
    return f"<!-- {table} table: begin -->", f"<!-- {table} table: end -->"


def tables(results: Results) -> dict[str, str]:
    """The tables that can be made from a run, by the name in their markers.

    Raises:
        ValueError: the run failed or was interrupted; its numbers are not for a README.
    """
    if results["interrupted"] or any(row["problem"] for row in results["rows"]):
        raise ValueError("results: an interrupted or failed run is not for the README")
    models = [row for row in results["rows"] if row["operation"] == MODELS]
    operations = [row for row in results["rows"] if row["operation"] != MODELS]
    environment = results["environment"]
    machine = "; ".join(environment[name] for name in ("gpu", "processor", "versions") if name in environment)
    found = {"benchmark": _operations(operations, results["end_to_end"])} if operations else {}
    found |= {"hugging face": _models(models)} if models else {}
    return {name: "\n".join([*lines, "", f"Measured on {machine}."]) for name, lines in found.items()}


def _operations(rows: list[dict], end_to_end: dict | None) -> list[str]:
    """One line for each operation and size, and the end-to-end run."""
    titles = ["operation", "size", *(f"{dtype} {mode}" for dtype, mode in COLUMNS)]
    lines = [
        f"Speed-up against torch: {' / '.join(PEERS)} (`-`: none, or not run; above 1: fastformer is faster).",
        "",
        f"| {' | '.join(titles)} |",
        f"|---|---|{'---:|' * len(COLUMNS)}",
    ]
    for (operation, shape), group in itertools.groupby(rows, lambda row: (row["operation"], row["shape"])):
        found = {(row["dtype"], row["mode"]): _speedups(row, PEERS) for row in group}
        cells = [f"`{operation}`", shape, *(found.get(column, "") for column in COLUMNS)]
        lines.append(f"| {' | '.join(cells)} |")
    return [*lines, "", _end_to_end(end_to_end)] if end_to_end else lines


def _models(rows: list[dict]) -> list[str]:
    """One line for each model: forward, training step and generation."""
    lines = [
        "Speed-up of an accelerated model against itself with its eager attention / with torch's"
        " `scaled_dot_product_attention` (`-`: transformers has none for it):",
        "",
        "| model, float32 | forward | forward + backward | generation |",
        "|---|---:|---:|---:|",
    ]
    for model, group in itertools.groupby(rows, lambda row: row["shape"].split()[0]):
        found = {}
        for row in group:
            task = "generation" if "+" in row["shape"] else row["mode"]
            found[task] = _speedups(row, ("eager", "fused"))
        lines.append(f"| {' | '.join([model, *(found.get(x, '') for x in ('fwd', 'fwd+bwd', 'generation'))])} |")
    return lines


def _speedups(row: dict, peers: Sequence[str]) -> str:
    columns = best_peers(row)
    return " / ".join(f"{columns[name]:.2f}" if name in columns else "-" for name in peers)


def _end_to_end(run: dict) -> str:
    if run["problem"] or run["speedup"] is None:
        raise ValueError("results: an interrupted or failed run is not for the README")
    speed, memory = run["tokens_per_second"], run["peak_bytes"]
    return (
        f"Training end to end ({run['model']}; {run['batch']}, {run['dtype']}): {speed['fastformer']:.0f} tokens/s,"
        f" torch {speed['torch']:.0f} (**{run['speedup']:.2f}x**), peak memory {memory['fastformer'] / 2**20:.0f} MiB,"
        f" torch {memory['torch'] / 2**20:.0f} MiB, losses equal within {run['loss_difference']:.0e} over"
        f" {run['steps']} steps."
    )


def replace_table(readme: str, name: str, table: str) -> str:
    """The README with what stands between a table's markers replaced.

    Raises:
        ValueError: the markers are not there once each, in order.
    """
    begin, end = markers(name)
    if readme.count(begin) != 1 or readme.count(end) != 1 or readme.index(begin) > readme.index(end):
        raise ValueError(f"README: must have {begin} and {end}, once each, in this order")
    before, _, rest = readme.partition(begin)
    return f"{before}{begin}\n{table}\n{end}{rest.partition(end)[2]}"


def main(argv: list[str]) -> int:
    """Rewrites the README in place. Exit status 2, and the README untouched, if that can't be done."""
    parser = argparse.ArgumentParser(description="Writes README.md's tables of measurements.")
    parser.add_argument("results", type=Path, help="a JSON file written by fastformer bench")
    parser.add_argument("readme", type=Path)
    options = parser.parse_args(argv)
    try:
        text = options.readme.read_text(encoding="utf-8")
        for name, table in tables(json.loads(options.results.read_text(encoding="utf-8"))).items():
            text = replace_table(text, name, table)
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    options.readme.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
