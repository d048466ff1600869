"""``fastformer bench``: every operation and a whole GPT, checked, timed beside torch, shown in one table."""

from __future__ import annotations

import argparse
import importlib.util
import random
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import torch

import fastformer
from fastformer import backends

from . import bench_generation, bench_hugging_face, bench_train_step, machine, report, scaling
from .harness import Case, Pace, Row, run_case, timer_for

OPERATIONS = ("softmax", "layer_norm", "attention", "linear", "feed_forward", "linear_cross_entropy", "rotary")
# In the full suite alone.
LONG_OPERATIONS = ("attention_window", "varlen_attn")
# Whole models, whose rows come from the module itself; likewise.
MODELS = {"train_step": bench_train_step, "generation": bench_generation, "hugging_face": bench_hugging_face}
SUITES = ("quick", "cpu", "full")
END_TO_END = "gpt"
PACKAGES = ("matplotlib", "tqdm", "tokenizers", "safetensors", "numpy")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
BACKENDS = {"cpu": "cpu", "cuda": "triton"}  # our own kernels of each kind of device, whatever `auto` would choose
# Seconds that the progress bar expects of each part until it has seen how fast the machine is.
LIMITS_SECONDS = 3.0
CASE_SECONDS = {False: 2.0, True: 5.0}  # without, with torch.compile
MODEL_SECONDS = 5.0  # a row
END_TO_END_SECONDS = 60.0
SCALING_SECONDS = 0.5  # a point
QUICK_SECONDS = 230.0
BAR = "{desc:<50.50} {percentage:3.0f}%|{bar}| {elapsed}, about {remaining} left"


def main(argv: list[str]) -> int:
    """Runs the benchmarks. Exit status: 0, 1 if one of our kernels got no time, 130 if interrupted.

    Raises:
        ImportError: a package that the benchmarks need is missing.
        OSError: the results can't be written there.
        ValueError: the device is not there, or has no such kernels.
    """
    options = _parse(argv)
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise ImportError(f"{', '.join(missing)} not installed: pip install fastformer[bench]")
    if options.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device: cuda is not available")
    if options.backend and not backends.available(options.backend, options.device):
        raise ValueError(f"--backend: {options.backend} is not available on {options.device}")
    if options.device == "cuda" and options.suite == "cpu":
        raise ValueError("--device: cuda, must be cpu with --suite cpu")
    picture, data = options.out / "benchmark.png", options.json or options.out / "benchmark.json"
    curves = options.out / "scaling.png"
    for path in (picture, data):  # a folder that can't be made is better known now than in four minutes
        path.parent.mkdir(parents=True, exist_ok=True)
    threads = torch.get_num_threads()
    torch.set_num_threads(machine.available_threads())
    try:
        results = _run(options)
    finally:
        torch.set_num_threads(threads)
    report.write_json(results, data)
    report.write_picture(results, picture)
    if results["scaling"]:
        scaling.write_picture(results["scaling"], curves)
    print(report.format_environment(results))
    if results["rows"]:
        print(f"\n{report.format_table(results)}")
    if results["end_to_end"]:
        print(f"\n{report.format_end_to_end(results['end_to_end'])}")
    print(f"\nwritten: {', '.join(map(str, [data, picture, *([curves] if results['scaling'] else [])]))}")
    if results["interrupted"]:
        print("interrupted: this is what there was", file=sys.stderr)
        return 130
    return int(report.failed(results))


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="fastformer bench",
        description="Checks every operation against a float64 reference, times it beside torch's, trains a GPT.",
    )
    parser.add_argument(
        "--suite",
        choices=SUITES,
        default="quick",
        help="quick: at most 4 minutes on 2 cores (the default); cpu: more sizes, and how times grow with them, without"
        " torch.compile of single operations; full: ten times as many samples, everything, no time limit",
    )
    names = (*OPERATIONS, END_TO_END, *LONG_OPERATIONS, *MODELS)
    only_named = ", ".join((*LONG_OPERATIONS, *MODELS))
    metavar = f"OP ({', '.join((*OPERATIONS, END_TO_END))}; only if named or with --suite full: {only_named})"
    parser.add_argument("--only", action="append", choices=names, metavar="OP", help=f"run this {metavar}; repeatable")
    parser.add_argument("--skip", action="append", choices=names, metavar="OP", default=[], help="leave this out")
    parser.add_argument("--dtype", choices=DTYPES, help="of the operations (both); whole models are float32")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", choices=BACKENDS, default=device, help="(%(default)s)")
    parser.add_argument(
        "--backend",
        choices=sorted({*BACKENDS.values(), "cuda"}),
        help=f"of our kernels ({', '.join(f'{backend} on {kind}' for kind, backend in BACKENDS.items())})",
    )
    parser.add_argument("--out", type=Path, metavar="DIR", default=Path("benchmark-results"), help="(%(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="where the JSON goes (DIR/benchmark.json)")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    return parser.parse_args(argv)


def _run(options: argparse.Namespace) -> report.Results:
    """Everything that was asked for; an interruption keeps what there is."""
    from tqdm import tqdm

    device, backend = torch.device(options.device), options.backend or BACKENDS[options.device]
    torch.manual_seed(0)
    compiles = not options.no_compile and options.suite != "cpu"
    if options.suite == "full":
        pace = Pace(compile=compiles, row_seconds=5.0, min_rounds=10, max_rounds=1000)
    else:
        pace = Pace(compile=compiles, suite_seconds=QUICK_SECONDS if options.suite == "quick" else None)
    long = (*LONG_OPERATIONS, *MODELS) if options.suite == "full" else ()
    wanted = [name for name in options.only or (*OPERATIONS, *long, END_TO_END) if name not in options.skip]
    dtypes = [DTYPES[options.dtype]] if options.dtype else list(DTYPES.values())
    cases = [
        case
        for name in (*OPERATIONS, *LONG_OPERATIONS)
        if name in wanted
        for case in _cases(name, device, dtypes, more=options.suite == "cpu")
        if backend != "cuda" or case.dtype in _cuda_dtypes(name)
    ]
    expected = [CASE_SECONDS[compiles and case.compiled is not None] for case in cases]
    total = LIMITS_SECONDS + sum(expected) + (END_TO_END_SECONDS if END_TO_END in wanted else 0)
    total += MODEL_SECONDS * sum(module.COUNT for name, module in MODELS.items() if name in wanted)
    # Of the whole suite, not of what is picked from it.
    threads = {1, torch.get_num_threads()} if options.suite == "cpu" and not options.only else set()
    total += SCALING_SECONDS * scaling.POINTS * len(threads)

    environment = machine.environment(device)
    timer, rng = timer_for(device), random.Random(0)
    rows: list[Row] = []
    curves: list[scaling.Point] = []
    comparison, interrupted = None, False
    with tqdm(total=total, smoothing=0, bar_format=BAR, file=sys.stderr) as bar:
        bar.set_description_str("what the machine can do")
        limits = machine.measure_limits(device, timer)
        bar.update(LIMITS_SECONDS)
        try:
            for case, seconds in zip(cases, expected):
                bar.set_description_str(str(case))
                with fastformer.backend(backend):
                    for row in run_case(case, backend, timer, limits, pace, rng):
                        rows.append(row)
                bar.update(seconds)
            own_pace = pace if options.suite == "full" else Pace(compile=False, row_seconds=1.0, min_rounds=9)
            for name in (name for name in MODELS if name in wanted):
                bar.set_description_str(f"{name}: whole models")
                for row in MODELS[name].rows(device, timer, limits, own_pace, rng):
                    rows.append(row)
                    bar.update(MODEL_SECONDS)
            for count in sorted(threads):
                bar.set_description_str("how times grow")
                with fastformer.backend(backend):
                    for point in scaling.points(count, rng):
                        curves.append(point)
                        bar.update(SCALING_SECONDS)
            if END_TO_END in wanted:
                from .bench_gpt import STEPS, Comparison

                bar.set_description_str("a GPT trained by torch and by fastformer")
                with Comparison(device, backend) as comparison:
                    comparison.run(on_step=lambda: bar.update(END_TO_END_SECONDS / STEPS))
        except KeyboardInterrupt:
            interrupted = True
    end_to_end = comparison.results() if comparison else None
    results = report.collect(environment, limits, rows, end_to_end, interrupted=interrupted)
    return results | {"scaling": scaling.as_rows(curves)}


def _cuda_dtypes(name: str) -> tuple[torch.dtype, ...]:
    """Those that the CUDA C++ kernels of an operation, or one of attention's other forms, have."""
    operation = "attention" if name in ("attention_window", "varlen_attn") else name
    return backends.CUDA_DTYPES.get(operation, backends.KERNEL_DTYPES)


def _cases(operation: str, device: torch.device, dtypes: list[torch.dtype], *, more: bool = False) -> Iterator[Case]:
    """An operation's cases, the dtypes of one shape side by side; with ``more`` those of the CPU's suite too."""
    module = import_module(f".bench_{operation}", __package__)
    sources = [module.cases, *([module.more_cases] if more and hasattr(module, "more_cases") else [])]
    for source in sources:
        for same_shape in zip(*(source(device, dtype) for dtype in dtypes)):
            yield from same_shape
