"""Writes the measured table of README.md from the JSON of a run:

python -m fastformer.benchmarks.readme_table benchmark-results/benchmark.json README.md
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from pathlib import Path

from .report import PEERS, Results, best_peers

BEGIN, END = "<!-- benchmark table: begin -->", "<!-- benchmark table: end -->"
COLUMNS = [(dtype, mode) for dtype in ("fp32", "bf16") for mode in ("fwd", "fwd+bwd")]


def markdown(results: Results) -> str:
    """One line for each operation and size: speed-up against torch eager / fused / compile, and the end-to-end run.

    Raises:
        ValueError: the run failed or was interrupted; its numbers are not for a README.
    """
    if results["interrupted"] or any(row["problem"] for row in results["rows"]):
        raise ValueError("results: an interrupted or failed run is not for the README")
    titles = ["operation", "size", *(f"{dtype} {mode}" for dtype, mode in COLUMNS)]
    lines = [
        f"Speed-up against torch: {' / '.join(PEERS)} (`-`: none, or not run; above 1: fastformer is faster).",
        "",
        f"| {' | '.join(titles)} |",
        f"|---|---|{'---:|' * len(COLUMNS)}",
    ]
    for (operation, shape), rows in itertools.groupby(results["rows"], lambda row: (row["operation"], row["shape"])):
        found = {(row["dtype"], row["mode"]): _speedups(row) for row in rows}
        cells = [f"`{operation}`", shape, *(found.get(column, "") for column in COLUMNS)]
        lines.append(f"| {' | '.join(cells)} |")
    if run := results["end_to_end"]:
        lines += ["", _end_to_end(run)]
    environment = results["environment"]
    machine = [environment[name] for name in ("gpu", "processor", "versions") if name in environment]
    return "\n".join([*lines, "", f"Measured on {'; '.join(machine)}."])


def _speedups(row: dict) -> str:
    columns = best_peers(row)
    return " / ".join(f"{columns[name]:.2f}" if name in columns else "-" for name in PEERS)


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


def replace_table(readme: str, table: str) -> str:
    """The README with what stands between the two markers replaced.

    Raises:
        ValueError: the markers are not there once each, in order.
    """
    if readme.count(BEGIN) != 1 or readme.count(END) != 1 or readme.index(BEGIN) > readme.index(END):
        raise ValueError(f"README: must have {BEGIN} and {END}, once each, in this order")
    before, _, rest = readme.partition(BEGIN)
    return f"{before}{BEGIN}\n{table}\n{END}{rest.partition(END)[2]}"


def main(argv: list[str]) -> int:
    """Rewrites the README in place. Exit status 2, and the README untouched, if that can't be done."""
    parser = argparse.ArgumentParser(description="Writes README.md's table of measurements.")
    parser.add_argument("results", type=Path, help="a JSON file written by fastformer bench")
    parser.add_argument("readme", type=Path)
    options = parser.parse_args(argv)
    try:
        table = markdown(json.loads(options.results.read_text(encoding="utf-8")))
        text = replace_table(options.readme.read_text(encoding="utf-8"), table)
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    options.readme.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
