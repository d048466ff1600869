"""All that is to be measured on an NVIDIA GPU, within a time: ``python benchmarks/gpu_plan.py``, or `make gpu`.

The parts run one after the other, those of most worth first, each as processes with a time of their own. What a part
leaves of its time goes to those behind it; one that takes longer is stopped, and what it wrote until then is kept.
DIR/PART.log has what a part printed, DIR/results what benchmarks/results can keep, DIR/tiles.json the times of the
Triton kernels' tiles and the lines of source for faster ones, DIR/tuning.json the table of `fastformer tune`.

Needs no network, and the installed fastformer is what is tested, which may come from a wheel. Imports nothing but
Python's own, so that no broken package ends it.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import importlib.util
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
TESTS = REPOSITORY / "tests"  # where everything runs, so that the repository's own packages are not on the path

OK, NOTE, LEFT_OUT, STOPPED, FAILED = "ok", "note", "left out", "stopped", "failed"
STATES = (OK, NOTE, LEFT_OUT, STOPPED, FAILED)  # from good to bad; a part's is the worst of its commands'
WELL = (OK, NOTE)

SECONDS = 480.0
GRACE = 15.0  # seconds between the request to end and the end: `fastformer bench` writes what it has
SECONDS_ARGUMENT = "{seconds}"  # in a command's arguments: for how long it may begin something new ...
BEGIN_SHARE = 0.7  # ... which is this share of the command's time; what has begun, and the start, take the rest
POLL_SECONDS = 1.0  # between two looks at what runs
NEWS_SECONDS = 30.0  # between two lines about what runs, where they can't be overwritten
WIDTH = 120  # of lines on the screen

PYTHON = sys.executable
FASTFORMER = (PYTHON, "-m", "fastformer.cli")
# A line for each test as it ends, so that nothing is lost when it is stopped. One that hangs for a minute shows where.
PYTEST = (PYTHON, "-m", "pytest", "-vv", "-rfE", "--tb=short", "--durations=10", "-o", "faulthandler_timeout=60")

#: Test files with one small case or more for each CUDA C++ and Triton kernel; those for one architecture come first.
KERNEL_TESTS = (
    "test_attention_hopper.py",
    "test_feed_forward_hopper.py",
    "test_rows_hopper.py",
    "test_attention.py",
    "test_feed_forward.py",
    "test_decoding.py",
    "test_varlen_attn.py",
    "test_layer_norm.py",
    "test_softmax.py",
    "test_linear_cross_entropy.py",
    "test_rotary.py",
)
#: About builds and emulators, which need no GPU; and what measures this project's own files.
ELSEWHERE = ("test_build.py", "test_simt*.py", "test_cuda_static.py", "test_ahead_of_time.py", "test_matrix.py")
SANITIZERS = ("memcheck", "racecheck", "synccheck")
#: In this order: of those that come last some may be left out.
OPERATIONS = (
    "attention",
    "feed_forward",
    "layer_norm",
    "softmax",
    "linear_cross_entropy",
    "rotary",
    "varlen_attn",
    "attention_window",
)
TUNED = ("attention", "feed_forward", "softmax", "linear_cross_entropy", "rotary", "layer_norm")
FAMILIES = ("triton", "cuda")
#: Said by tools that can't look into this machine's GPU, whatever runs on it.
REFUSALS = ("Device not supported", "ERR_NVGPUCTRPERM", "Failed to initialize the profiler")
#: `fastformer env`, which must know both families of kernels: tests of one that is not there would just be fewer.
ENVIRONMENT = """
import sys
from fastformer import backends
from fastformer.cli import main
main(["env"])
sys.exit(backends.CUDA_PROBLEM or (0 if backends.TRITON else "Triton is not installed"))
"""
#: `fastformer tune` of one operation after the other in one process: what is found of each is kept as it ends.
SWEEP = """
import sys, time
from fastformer.cli import main
end, statuses = time.monotonic() + float(sys.argv[1]), []
for operation in sys.argv[2:]:
    if time.monotonic() > end:
        print(f"no time for {operation} and what is behind it")
        break
    statuses.append(main(["tune", "--op", operation, "--dtype", "bfloat16"]))
    if statuses[-1] == 130:  # interrupted
        break
sys.exit(max(statuses, default=1))
"""
#: That ask the plan to end. Seen at the next look: raised at once, they could leave a process behind as it starts.
_signals: list[int] = []


@dataclass(frozen=True)
class Command:
    """One process of a part."""

    title: str
    arguments: tuple[str, ...]
    environment: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Part:
    """Processes that run one after the other, each with an equal share of the time that is left of the part's."""

    name: str
    share: float  # of the whole time, as against the other parts'
    least: float  # seconds; it is not begun with fewer
    commands: tuple[Command, ...]
    missing: str = ""  # the tool without which it can't run


@dataclass(frozen=True)
class Outcome:
    """How a part ended."""

    part: str
    state: str  # of STATES
    seconds: float
    limit: float  # seconds that it had
    said: str  # one line


def parts(out: Path, gpu: str) -> list[Part]:
    """All of them, of most worth first; ``gpu`` is its name, for the names of results."""
    name = f"{datetime.date.today()}-{re.sub(r'[^a-z0-9]+', '-', gpu.lower())}"
    return [
        Part("env", 4, 15, _environment()),
        Part("kernels", 17, 30, (_kernels(),)),
        Part("bench", 34, 60, tuple(_bench(family, name, out) for family in FAMILIES)),
        Part("sanitizer", 15, 40, tuple(map(_sanitizer, SANITIZERS)), missing=_missing("compute-sanitizer")),
        Part("sweep", 20, 40, (_tiles(out), _sweep(out))),
        Part("tests", 6, 20, (_tests(),)),
        Part("ncu", 8, 30, tuple(_ncu(family, out) for family in FAMILIES), missing=_missing("ncu")),
    ]


def _environment() -> tuple[Command, ...]:
    tools = {"nvidia-smi": (), "nvcc": ("--version",)}
    return (
        *(Command(name, (find(name), *options)) for name, options in tools.items() if not _missing(name)),
        Command("fastformer env", (PYTHON, "-c", ENVIRONMENT)),
    )


def _kernels() -> Command:
    """In the dtype that most models have; the others come with all tests. Failures beyond 30 tell nothing new."""
    chosen = f"({' or '.join(f'{family}-cuda' for family in FAMILIES)}) and bfloat16"
    return Command("pytest", (*PYTEST, *_workers(), "--maxfail=30", "-k", chosen, *KERNEL_TESTS))


def _tests() -> Command:
    ignored = (f"--ignore-glob={name}" for name in ELSEWHERE)
    return Command("pytest", (*PYTEST, *_workers(), "-k", "cuda", ".", *ignored))


def _workers() -> tuple[str, ...]:
    """pytest-xdist's, if it is there: most of the time goes into compiling Triton's kernels."""
    if importlib.util.find_spec("xdist") is None:
        return ()
    # Few tests wait in each, which would all be run before it is stopped.
    return ("-n", str(min(8, os.cpu_count() or 1)), "--maxschedchunk", "1")


def _bench(family: str, name: str, out: Path) -> Command:
    """Without torch.compile, which takes longer than all the rest, and whole models, which go by a sweep's table."""
    where = ("--json", str(out / "results" / f"{name}-{family}.json"), "--out", str(out / f"bench-{family}"))
    what = ("--suite", "gpu", "--backend", family, "--op", ",".join(OPERATIONS), "--dtype", "bfloat16")
    limits = ("--skip", "compile", "--seconds", SECONDS_ARGUMENT)
    arguments = (*FASTFORMER, "bench", "--device", "cuda", *what, *limits, *where)
    return Command(family, arguments, {"FASTFORMER_TUNING": "off"})


def _sanitizer(tool: str) -> Command:
    # Each tensor in memory of its own: in a piece of torch's cache an access past its end would not show.
    environment = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    options = ("--tool", tool, "--error-exitcode", "1")
    script = (PYTHON, str(TESTS / "gpu_cases.py"), "--seconds", SECONDS_ARGUMENT)
    return Command(tool, (find("compute-sanitizer"), *options, *script), environment)


def _tiles(out: Path) -> Command:
    options = ("--seconds", SECONDS_ARGUMENT, "--json", str(out / "tiles.json"))
    return Command("tiles", (PYTHON, "-m", "fastformer.benchmarks.tile_sweep", *options))


def _sweep(out: Path) -> Command:
    environment = {"FASTFORMER_TUNING": str(out / "tuning.json")}
    return Command("tune", (PYTHON, "-c", SWEEP, SECONDS_ARGUMENT, *TUNED), environment)


def _ncu(family: str, out: Path) -> Command:
    options = ("--ncu", find("ncu"), "--backend", family, "--out", str(out / f"ncu-{family}.csv"))
    return Command(family, (PYTHON, "-m", "fastformer.benchmarks.gpu_profile", *options))


def find(program: str) -> str:
    """Its path, or its name if it is neither on PATH nor in the CUDA toolkit."""
    toolkit = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda")) / "bin" / program
    return shutil.which(program) or (str(toolkit) if toolkit.exists() else program)


def _missing(program: str) -> str:
    return "" if Path(find(program)).is_absolute() else program


def run_plan(chosen: Sequence[Part], seconds: float, out: Path, grace: float = GRACE) -> list[Outcome]:
    """Runs the parts, and tells of each as it ends.

    Args:
        seconds: of all of it.
        out: an absolute path, for the logs.
        grace: seconds in which a command that is stopped may end by itself.
    """
    end = time.monotonic() + seconds - grace
    outcomes = []
    for index, part in enumerate(chosen):
        left = max(0.0, end - time.monotonic())
        limit = limit_of(left, [other.share for other in chosen[index:] if not other.missing], part.least)
        if part.missing:
            outcome = Outcome(part.name, NOTE, 0.0, 0.0, f"{part.missing} is neither on PATH nor in the CUDA toolkit")
        elif limit < part.least:
            said = f"{left:.0f} s were left, it needs {part.least:.0f}"
            outcome = Outcome(part.name, LEFT_OUT, 0.0, limit, said)
        else:
            outcome = run_part(part, limit, out / f"{part.name}.log", grace)
        show(format_outcome(outcome), last=True)
        outcomes.append(outcome)
    return outcomes


def limit_of(left: float, shares: Sequence[float], least: float) -> float:
    """The seconds for the first of those that share what is left: its share, or ``least`` if there is so much."""
    return min(left, max(least, left * shares[0] / sum(shares))) if shares else 0.0


def run_part(part: Part, limit: float, log: Path, grace: float) -> Outcome:
    """Its commands, whatever becomes of those before, within ``limit`` seconds and the grace of what is stopped."""
    log.write_bytes(b"")
    began = time.monotonic()
    states, said = [], []
    for index, command in enumerate(part.commands):
        seconds = max(0.0, began + limit - time.monotonic()) / (len(part.commands) - index)
        title = f"{part.name}, {command.title}"
        state, line = run_command(command, seconds, log, grace, partial(_tell, title, seconds, log))
        states.append(state)
        said.append(line if len(part.commands) == 1 else f"{command.title}: {line}")
    worst = max(states, key=STATES.index)
    lines = [line for line, state in zip(said, states) if state not in WELL] or said[-1:]
    return Outcome(part.name, worst, time.monotonic() - began, limit, "; ".join(lines))


def run_command(
    command: Command, seconds: float, log: Path, grace: float, tell: Callable[[float], None]
) -> tuple[str, str]:
    """(state, the last line of its output), which is appended to ``log``. It ends with all of its children."""
    arguments = [x.replace(SECONDS_ARGUMENT, f"{BEGIN_SHARE * seconds:.0f}") for x in command.arguments]
    with log.open("ab") as stream:
        stream.write(f"== {command.title}, {seconds:.0f} s: {shlex.join(arguments)}\n".encode())
        stream.flush()
        start = stream.tell()
        try:
            status = _run(arguments, command.environment, seconds, stream.fileno(), grace, tell)
        except OSError as error:
            stream.write(f"{error}\n".encode())
            status = 127
    text = log.read_bytes()[start:].decode(errors="replace")
    line = _last_line(text)
    if status is None:
        return STOPPED, f"after {seconds:.0f} s: {line}"
    if status and any(refusal in text for refusal in REFUSALS):
        return NOTE, next(x.strip() for x in text.splitlines() if any(refusal in x for refusal in REFUSALS))
    return (FAILED, f"status {status}: {line}") if status else (OK, line)


def _run(
    arguments: list[str],
    environment: dict[str, str],
    seconds: float,
    output: int,
    grace: float,
    tell: Callable[[float], None],
) -> int | None:
    """The exit status; None if it was stopped."""
    process = subprocess.Popen(
        arguments,
        cwd=TESTS,
        env={**os.environ, "PYTHONUNBUFFERED": "1", **environment},
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=subprocess.STDOUT,
        start_new_session=True,  # a process group, which is ended as one
    )
    began = time.monotonic()
    try:
        while (left := began + seconds - time.monotonic()) > 0:
            if _signals:
                raise SystemExit(128 + _signals[0])
            with contextlib.suppress(subprocess.TimeoutExpired):
                return process.wait(min(left, POLL_SECONDS))
            tell(time.monotonic() - began)
        os.killpg(process.pid, signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(grace)
        return None
    finally:
        with contextlib.suppress(ProcessLookupError):  # nothing of it is left
            os.killpg(process.pid, signal.SIGKILL)
        with contextlib.suppress(subprocess.TimeoutExpired):  # a driver can hold it
            process.wait(grace)


def _last_line(text: str) -> str:
    """The last that isn't empty, without rulers around it; of a progress bar its last state."""
    lines = [line.strip(" \t=") for line in re.split(r"[\r\n]+", text)]
    return next((line for line in reversed(lines) if line), "")


def _tell(title: str, limit: float, log: Path, seconds: float) -> None:
    if sys.stdout.isatty() or seconds % NEWS_SECONDS < POLL_SECONDS:
        with log.open("rb") as stream:
            stream.seek(max(0, log.stat().st_size - 2000))
            line = _last_line(stream.read().decode(errors="replace"))
        show(f"{title}: {seconds:.0f} of {limit:.0f} s; {line}")


def show(text: str, *, last: bool = False) -> None:
    """A line on the screen; on a terminal the next one overwrites it, unless it is the ``last`` of something."""
    text = text if len(text) <= WIDTH else f"{text[: WIDTH - 3]}..."
    if sys.stdout.isatty():
        print(f"\r{text:<{WIDTH}}", end="\n" if last else "", flush=True)
    else:
        print(text, flush=True)


def format_outcome(outcome: Outcome) -> str:
    """A line of the table."""
    times = f"{outcome.seconds:>5.0f} of {outcome.limit:>3.0f} s"
    return f"{outcome.part:<10} {outcome.state:<9} {times}  {outcome.said}"


def main(arguments: list[str] | None = None) -> int:
    """The exit status: 0 if all went well, 1 if not, 2 if there is no GPU."""
    began = time.monotonic()
    options = _parse(arguments)
    gpu = gpu_name()
    if not gpu:
        print("torch finds no GPU", file=sys.stderr)
        return 2
    out: Path = options.out.resolve()
    (out / "results").mkdir(parents=True, exist_ok=True)
    chosen = [part for part in parts(out, gpu) if not options.only or part.name in options.only]
    outcomes = run_plan(chosen, began + options.seconds - time.monotonic(), out)
    well = all(outcome.state in WELL for outcome in outcomes)
    print(f"\n{gpu}, {'all went well' if well else 'not all went well'}; logs and results are in {out}")
    for outcome in outcomes:
        show(format_outcome(outcome), last=True)
    return 0 if well else 1


def gpu_name() -> str:
    """As torch has it; empty if it finds none."""
    code = "import torch; print(torch.cuda.get_device_name() if torch.cuda.is_available() else '')"
    found = subprocess.run([PYTHON, "-c", code], cwd=TESTS, stdout=subprocess.PIPE, text=True, check=False)
    return found.stdout.strip()


def _end_on_signals() -> None:
    """Ctrl-C and a request to terminate end what runs too. A shell's background jobs would ignore the former."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, frame: _signals.append(number))


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    names = [part.name for part in parts(Path(), "")]
    parser = argparse.ArgumentParser(
        description="Tests, measures and tunes on an NVIDIA GPU, within a time.",
        epilog=f"The parts, of most worth first: {', '.join(names)}.",
    )
    parser.add_argument("--seconds", type=_seconds, default=SECONDS, metavar="S", help="for all of it (%(default).0f)")
    parser.add_argument(
        "--out", type=Path, default=REPOSITORY / "benchmark-results" / "gpu", metavar="DIR", help="(%(default)s)"
    )
    parser.add_argument(
        "--only", type=partial(_names, names), metavar="PART[,PART]", help="these parts, in the plan's order (all)"
    )
    return parser.parse_args(arguments)


def _seconds(text: str) -> float:
    seconds = float(text)
    if not seconds > GRACE:
        raise argparse.ArgumentTypeError(f"{text} must be more than {GRACE:.0f}")
    return seconds


def _names(known: Sequence[str], text: str) -> list[str]:
    names = text.split(",")
    for name in names:
        if name not in known:
            raise argparse.ArgumentTypeError(f"{name!r} must be among {', '.join(known)}")
    return names


if __name__ == "__main__":
    _end_on_signals()
    sys.exit(main())
