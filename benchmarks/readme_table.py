"""What README.md shows of the results kept in benchmarks/results/: its tables, its pictures, and the index there.

python -m fastformer.benchmarks.readme_table [ROOT]
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from . import pictures
from .report import (
    CONTESTANTS,
    FORMAT,
    GROUP_TITLES,
    GROUPS,
    Results,
    best_speedups,
    format_noise,
    is_model,
    model_numbers,
)
from .table import compact, number, percent

RESULTS = Path("benchmarks/results")  # in the repository
NAME = re.compile(r"(\d{4}-\d\d-\d\d)-(.+?)(-hugging-face|-suite-cpu|-triton|-cuda|)\.json")
KINDS = {  # the end of a file's name, and what was run
    "": "`--suite full`",
    "-hugging-face": "`--op hugging_face`",
    "-suite-cpu": "`--suite cpu`",
    "-triton": "`--suite gpu`, Triton kernels",
    "-cuda": "`--suite gpu`, CUDA C++ kernels",
}
# README.md's tables: the name in their markers -> kinds of results that they may come from.
TABLES = {"benchmark": ("",), "hugging face": ("-hugging-face", ""), "gpu": ("-triton",)}
PICTURES = {"benchmark": ("speedups", "roofline"), "gpu": ("speedups", "roofline")}  # of pictures.draw
CURVES = {"benchmark": ("", "-suite-cpu"), "gpu": ("-triton",)}  # kinds that have the picture of how times grow
TITLES = {"speedups": "Speed-up by operation", "roofline": "Roofline", "scaling": "How times grow"}
SIZES = 3  # of an operation, at most: the quick suite's come first
HUGGING_FACE = "hugging_face"  # the operation of its rows
DTYPES, MODES = ("fp32", "bf16", "fp16"), ("fwd", "fwd_bwd")


@dataclass(frozen=True)
class Kept:
    """A file of results."""

    path: Path
    date: str
    kind: str  # a key of KINDS
    results: Results


def kept(folder: Path) -> list[Kept]:
    """The files of results in the folder, the newest last: by the date in their name, then by the name.

    Raises:
        ValueError: a file has another name than DATE-MACHINE[-KIND].json, or isn't of this format.
    """
    found = []
    for path in sorted(folder.glob("*.json")):
        name = NAME.fullmatch(path.name)
        if name is None:
            raise ValueError(f"{path}: must be named YYYY-MM-DD-MACHINE[-KIND].json, KIND one of {', '.join(KINDS)}")
        results = json.loads(path.read_text(encoding="utf-8"))
        if results.get("format") != FORMAT:
            raise ValueError(f"{path}: has format {results.get('format')}, must be {FORMAT}: measure again")
        found.append(Kept(path, name[1], name[3], results))
    return sorted(found, key=lambda file: (file.date, file.path.name))


def generate(root: Path) -> dict[Path, str]:
    """The repository's generated texts: path -> what must stand there. Pictures apart, see draw().

    Raises:
        ValueError: results can't be used, see kept(); the newest ones are of a run that failed or was interrupted;
            README.md lacks a table's markers.
    """
    files = kept(root / RESULTS)
    shown = _pictures(files)
    text = (root / "README.md").read_text(encoding="utf-8")
    for name, source in _sources(files).items():
        links = [f"![{TITLES[picture.name]}]({picture.path})" for picture in shown if picture.table == name]
        text = replace_table(text, name, "\n\n".join([*links, table_of(name, source)]))
    return {root / "README.md": text, root / RESULTS / "README.md": index(files)}


def outdated(root: Path) -> list[Path]:
    """Which of the generated files aren't what they would be if they were made now."""
    found = [path for path, text in generate(root).items() if not path.exists() or path.read_text("utf-8") != text]
    # Not drawn for this: another version of matplotlib draws other letters.
    for picture in _pictures(kept(root / RESULTS)):
        path = root / picture.path
        if not path.exists() or picture.origin not in path.read_text("utf-8"):
            found.append(path)
    return found


def draw(root: Path) -> list[Path]:
    """Writes the pictures that README.md shows, and returns their paths."""
    written = []
    for picture in _pictures(kept(root / RESULTS)):
        (svg,) = pictures.draw(picture.source.results, [picture.name]).values()
        path = root / picture.path
        path.parent.mkdir(exist_ok=True)
        path.write_text(svg.replace("<svg", f"{picture.origin}\n<svg", 1), encoding="utf-8")
        written.append(path)
    return written


@dataclass(frozen=True)
class Picture:
    """One that README.md shows above a table."""

    name: str  # in pictures.draw
    table: str
    source: Kept

    @property
    def path(self) -> Path:
        """In the repository."""
        return RESULTS / "pictures" / f"{self.table}-{self.name}.svg"

    @property
    def origin(self) -> str:
        """The comment in it that tells what it was made from."""
        digest = hashlib.sha256(self.source.path.read_bytes()).hexdigest()
        return f"<!-- made from {self.source.path.name}, SHA-256 {digest} -->"


def _pictures(files: Sequence[Kept]) -> list[Picture]:
    found = [
        Picture(name, table, source)
        for table, source in _sources(files).items()
        for name in PICTURES.get(table, ())
        if name in pictures.plans(source.results)
    ]
    for table, kinds in CURVES.items():
        curves = [file for file in files if file.kind in kinds and file.results["scaling"]]
        found += [Picture("scaling", table, file) for file in curves[-1:]]
    return found


def _sources(files: Sequence[Kept]) -> dict[str, Kept]:
    """README.md's tables -> the newest results that have rows for them."""
    found = {}
    for file in files:  # the newest last
        for name, kinds in TABLES.items():
            if file.kind in kinds and any(_rows(name, file.results)):
                found[name] = file
    return found


def _rows(table: str, results: Results) -> list[dict]:
    return [row for row in results["rows"] if (row["operation"] == HUGGING_FACE) == (table == "hugging face")]


def table_of(name: str, source: Kept) -> str:
    """What stands between the markers of README.md's table.

    Raises:
        ValueError: the run failed or was interrupted; its numbers are not for a README.
    """
    results = source.results
    if results["interrupted"] or any(row["problem"] for row in results["rows"]):
        raise ValueError(f"{source.path}: an interrupted or failed run is not for the README")
    rows = _rows(name, results)
    if name == "hugging face":
        lines = _hugging_face(rows)
    else:
        lines = _operations([row for row in rows if not is_model(row)])
        lines += _models([row for row in rows if is_model(row)], results["limits"])
        if results["end_to_end"]:
            lines += ["", _end_to_end(results["end_to_end"], source.path)]
    environment = results["environment"]
    machine = "; ".join(environment[key] for key in ("gpu", "processor", "versions") if key in environment)
    whole = f"[{len(rows)} rows]({RESULTS / source.path.name})"
    measured = f"Measured on {source.date}, all of it: {whole}. {machine}. {format_noise(results)}"
    return "\n".join([*lines, "", measured.rstrip()])


def _operations(rows: Sequence[dict]) -> list[str]:
    """One line for each of the first sizes of each operation."""
    columns = [
        (dtype, mode)
        for dtype in DTYPES
        for mode in MODES
        if any((row["dtype"], row["mode"]) == (dtype, mode) for row in rows)
    ]
    groups = [group for group in GROUPS if any(group in best_speedups(row) for row in rows)]
    titles = " / ".join(GROUP_TITLES[group] for group in groups)
    lines = [
        f"Speed-up against {titles} (`-`: none, or not run; above 1: fastformer is faster).",
        "",
        *_head(["operation", "size"], [f"{dtype} {mode}" for dtype, mode in columns]),
    ]
    cells: dict[tuple[str, str], dict[tuple[str, str], str]] = {}
    for row in rows:
        cells.setdefault((row["operation"], row["shape"]), {})[row["dtype"], row["mode"]] = _speedups(row, groups)
    sizes = Counter()
    for (operation, shape), found in cells.items():
        sizes[operation] += 1
        if sizes[operation] > SIZES:
            continue
        lines.append(f"| {' | '.join([f'`{operation}`', shape, *(found.get(column, '') for column in columns)])} |")
    return lines


def _models(rows: Sequence[dict], limits: dict) -> list[str]:
    """One line for each whole model: tokens/s, MFU and memory of each contestant."""
    if not rows:
        return []
    names = " / ".join(CONTESTANTS).replace("ours / +compile", "fastformer / fastformer + compile")
    lines = [
        "",
        f"Whole models: {names}. MFU is of the matrix products that were measured; memory beyond weights and inputs.",
        "",
        *_head(["task", "model", "type"], ["tokens/s", "MFU", "peak MiB"]),
    ]
    for row in rows:
        found = model_numbers(row, limits).values()
        cells = [
            " / ".join(compact(numbers.get("tokens")) for numbers in found),
            " / ".join(percent(numbers.get("mfu")) for numbers in found),
            " / ".join(number(numbers["memory"] / 2**20) if "memory" in numbers else "-" for numbers in found),
        ]
        lines.append(f"| {' | '.join([row['operation'], row['shape'], row['dtype'], *cells])} |")
    return lines


def _hugging_face(rows: Sequence[dict]) -> list[str]:
    """One line for each model: forward, training step and generation."""
    lines = [
        "Speed-up of an accelerated model against itself with its eager attention / with torch's"
        " `scaled_dot_product_attention` (`-`: transformers has none for it):",
        "",
        *_head(["model, float32"], ["forward", "forward + backward", "generation"]),
    ]
    cells: dict[str, dict[str, str]] = {}
    for row in rows:
        task = "generation" if "+" in row["shape"] else row["mode"]
        cells.setdefault(row["shape"].split()[0], {})[task] = _speedups(row, ("eager", "fused"))
    for model, found in cells.items():
        lines.append(f"| {' | '.join([model, *(found.get(task, '') for task in (*MODES, 'generation'))])} |")
    return lines


def _head(left: Sequence[str], right: Sequence[str]) -> list[str]:
    return [f"| {' | '.join([*left, *right])} |", f"|{'---|' * len(left)}{'---:|' * len(right)}"]


def _speedups(row: dict, groups: Iterable[str]) -> str:
    found = best_speedups(row)
    return " / ".join(f"{found[group]:.2f}" if group in found else "-" for group in groups)


def _end_to_end(run: dict, path: Path) -> str:
    if run["problem"] or run["speedup"] is None:
        raise ValueError(f"{path}: an interrupted or failed run is not for the README")
    speed, memory = run["tokens_per_second"], run["peak_bytes"]
    return (
        f"Training end to end ({run['model']}; {run['batch']}, {run['dtype']}): {speed['fastformer']:.0f} tokens/s,"
        f" torch {speed['torch']:.0f} (**{run['speedup']:.2f}x**), peak memory {memory['fastformer'] / 2**20:.0f} MiB,"
        f" torch {memory['torch'] / 2**20:.0f} MiB, losses equal within {run['loss_difference']:.0e} over"
        f" {run['steps']} steps."
    )


def markers(table: str) -> tuple[str, str]:
    """Between which a table stands in the README."""
    return f"<!-- {table} table: begin -->", f"<!-- {table} table: end -->"


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


def index(files: Sequence[Kept]) -> str:
    """benchmarks/results/README.md: a line for each file, the newest first."""
    sources: dict[Path, list[str]] = {}
    for name, source in _sources(files).items():
        sources.setdefault(source.path, []).append(name)
    lines = [
        "# Results that are kept",
        "",
        "Written by `make readme-table`. A file is what `fastformer bench --json FILE` wrote, named",
        "`DATE-MACHINE[-KIND].json`. README.md shows the newest of a kind: by the date in its name, then by the name.",
        "`fastformer bench --compare FILE` holds a new run against one.",
        "",
        *_head(["file", "date", "what", "machine", "versions"], ["rows", "README.md's table"]),
    ]
    for file in reversed(files):
        environment = file.results["environment"]
        cells = [
            f"[{file.path.stem}]({file.path.name})",
            file.date,
            KINDS[file.kind],
            environment.get("gpu", environment["processor"]),
            environment["versions"],
            str(len(file.results["rows"])),
            ", ".join(sources.get(file.path, [])),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main(argv: list[str]) -> int:
    """Rewrites README.md, the index and the pictures. Exit status 2, and nothing written, if results can't be used."""
    parser = argparse.ArgumentParser(description="Writes README.md's tables and pictures of the results that are kept.")
    parser.add_argument("root", type=Path, nargs="?", default=Path(), help="of the repository (.)")
    root = parser.parse_args(argv).root
    try:
        texts = generate(root)
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for path, text in texts.items():
        path.write_text(text, encoding="utf-8")
    print(f"written: {', '.join(map(str, [*texts, *draw(root)]))}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
