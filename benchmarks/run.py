"""``fastformer bench``: every operation and whole models, checked, timed beside their peers, shown in one table."""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch

from fastformer import backends
from fastformer.cli import BENCHMARK_PACKAGES, MODEL_PACKAGES
from fastformer.tuning import DTYPES

from . import compare, html_report, pictures, report, scaling
from .case import AUTOTUNED, COMPILE, FORWARD, IMPLEMENTATIONS, MODES, TRAINING, VARIANTS
from .checking import describe
from .pace import Pace
from .suite import BACKENDS, EVERYTHING, SUITES, TORCHS, Found, Runner

LISTS = {  # option -> (what can be in it, what is in it unless it is given)
    "--mode": (MODES, (FORWARD, TRAINING)),
    "--dtype": (tuple(DTYPES), ("float32", "bfloat16")),
    "--metrics": (tuple(report.METRICS), report.DEFAULT_METRICS),
}


def main(argv: list[str]) -> int:
    """Runs the benchmarks.

    Returns:
        The exit status: 0, 1 if one of our kernels got no time, 3 if --compare found one slower, 130 if interrupted.

    Raises:
        ImportError: a package that the benchmarks need is missing.
        OSError: the results can't be written there, or the old ones not read.
        ValueError: the device is not there, has no such kernels or is not the suite's; the old results are none.
    """
    options = _parse(argv)
    _require(options)
    old = _read(options.compare) if options.compare else None
    data, page = options.json or options.out / "benchmark.json", options.html or options.out / "benchmark.html"
    for folder in (options.out, data.parent, page.parent):  # better known now than when all is done
        folder.mkdir(parents=True, exist_ok=True)
    threads = torch.get_num_threads()
    torch.set_num_threads(options.threads or threads)
    try:
        found = _runner(options).run()
    finally:
        torch.set_num_threads(threads)
    results = report.collect(
        found.environment,
        found.limits,
        found.rows,
        found.end_to_end,
        scaling=scaling.as_rows(found.points),
        interrupted=found.interrupted,
    )
    report.write_json(results, data)
    drawn = pictures.draw(results)
    html_report.write(results, page, drawn)
    pictures.write_all(results, options.out, drawn)
    comparison = compare.compare(old, results) if old else None
    texts = [
        report.format_environment(results),
        report.format_table(results, options.metrics) if results["rows"] else "",
        report.format_models(results),
        report.format_end_to_end(results["end_to_end"]) if results["end_to_end"] else "",
        comparison.format() if comparison else "",
        f"written: {data}, {page}, {len(drawn)} pictures in {options.out}",
    ]
    print("\n\n".join(filter(None, texts)))
    return _status(found, results, comparison)


def _status(found: Found, results: report.Results, comparison: compare.Comparison | None) -> int:
    if found.interrupted:
        print("interrupted: this is what there was", file=sys.stderr)
        return 130
    if report.failed(results):
        return 1
    return 3 if comparison and comparison.worse else 0


def _runner(options: argparse.Namespace) -> Runner:
    torch.manual_seed(0)
    suite = SUITES[options.suite]
    only, skip = options.only or (), options.skip or ()
    compiles = suite.compiles or any(name.endswith(COMPILE) for name in only) or AUTOTUNED in only
    pace = Pace(
        row_seconds=suite.row_seconds,
        modes=options.mode,
        only=only,
        skip=(*skip, *([] if compiles else [COMPILE])),
        thorough=suite.thorough or AUTOTUNED in only,
        cuda_graphs=options.cuda_graphs,
        suite_seconds=options.seconds or suite.seconds,
        cut=options.seconds is not None,
    )
    return Runner(
        device=torch.device(options.device),
        backend=options.backend or BACKENDS[options.device],
        suite=options.suite,
        names=options.op or suite.parts,
        dtypes=[DTYPES[name] for name in options.dtype],
        pace=pace,
    )


def _require(options: argparse.Namespace) -> None:
    missing = [name for name in MODEL_PACKAGES + BENCHMARK_PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise ImportError(f"{', '.join(missing)} not installed: pip install fastformer[bench]")
    if options.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device: cuda is not available")
    if options.backend and not backends.available(options.backend, options.device):
        raise ValueError(f"--backend: {options.backend} is not available on {options.device}")
    for suite, device in (("cpu", "cpu"), ("gpu", "cuda")):
        if options.suite == suite and options.device != device:
            raise ValueError(f"--device: {options.device}, must be {device} with --suite {suite}")
    if options.threads is not None and options.threads < 1:
        raise ValueError(f"--threads: {options.threads}, must be at least 1")
    if options.seconds is not None and not options.seconds > 0:
        raise ValueError(f"--seconds: {options.seconds:g}, must be more than 0")
    lacking = sorted(TORCHS[options.device].intersection(options.op or ()))
    if lacking:
        raise ValueError(f"--op: {', '.join(lacking)}, which on {options.device} are torch's own")
    if options.cuda_graphs and options.device != "cuda":
        raise ValueError(f"--cuda-graphs: there are none on {options.device}, must be with --device cuda")


def _read(path: Path) -> report.Results:
    """The old results, which are better refused now than when all is done."""
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
        compare.compare(results, results)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"--compare: {path} has no results of this benchmark ({describe(error)})") from error
    return results


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="fastformer bench",
        description="Checks every operation against a float64 reference, times it beside its peers, trains a GPT.",
        epilog="Names can be given as a list with commas, or by repeating the option. Whole models have dtypes of their"
        " own; gpt, a training run end to end, has its mode and peers too.",
    )

    def add_list(option: str, names: Sequence[str], help: str) -> None:
        parser.add_argument(option, type=partial(_names, names), action="extend", metavar="NAME", help=help)

    parser.add_argument(
        "--suite",
        choices=SUITES,
        default="quick",
        help="quick: at most 4 minutes on 2 cores (the default); cpu: more sizes, and how times grow with them, without"
        " torch.compile; full: everything there is, within 25 minutes on 2 cores; gpu: everything that matters on one",
    )
    add_list("--op", EVERYTHING, f"run these parts alone (those of the suite): {', '.join(EVERYTHING)}")
    parser.add_argument(
        "--seconds",
        type=float,
        metavar="S",
        help="the time for all of it: fewer samples and compiled peers; what has not begun by then is left out,"
        " operations in the order of --op",
    )
    known = (*IMPLEMENTATIONS, *VARIANTS)
    add_list(
        "--only", known, f"time these beside ours alone (all): {', '.join(known[1:])}; sdpa means all of its kernels"
    )
    add_list("--skip", known[1:], "leave these out, of the same names")
    for option, (names, default) in LISTS.items():
        add_list(option, names, f"of {', '.join(names)} ({','.join(default)})")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", choices=BACKENDS, default=device, help="(%(default)s)")
    parser.add_argument(
        "--backend",
        choices=sorted({*BACKENDS.values(), "cuda"}),
        help=f"of our kernels ({', '.join(f'{backend} on {kind}' for kind, backend in BACKENDS.items())})",
    )
    parser.add_argument(
        "--threads", type=int, metavar="N", help=f"of torch on a CPU (as it chooses itself: {torch.get_num_threads()})"
    )
    parser.add_argument("--cuda-graphs", action="store_true", help="time replays of captured calls, without the host")
    parser.add_argument("--out", type=Path, metavar="DIR", default=Path("benchmark-results"), help="(%(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="where the JSON goes (DIR/benchmark.json)")
    parser.add_argument("--html", type=Path, metavar="FILE", help="where the page goes (DIR/benchmark.html)")
    parser.add_argument("--compare", type=Path, metavar="OLD.json", help="say what is faster and slower than then")
    options = parser.parse_args(argv)
    for option, (_, default) in LISTS.items():
        name = option.removeprefix("--")
        setattr(options, name, getattr(options, name) or default)
    return options


def _names(known: Sequence[str], text: str) -> list[str]:
    """The names in a list with commas."""
    names = text.split(",")
    for name in names:
        if name not in known:
            raise argparse.ArgumentTypeError(f"{name!r} must be among {', '.join(known)}")
    return names
