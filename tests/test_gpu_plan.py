"""The plan for a machine with a GPU, on one without: its time, parts that run over, and commands that exist."""

from __future__ import annotations

import importlib.util
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import gpu_cases
import pytest
import torch
from _pytest.mark.expression import Expression

from fastformer import backends, cli, tuning
from fastformer.benchmarks import gpu_plan, gpu_profile, readme_table, run, tune_trials
from fastformer.benchmarks.gpu_plan import FAILED, LEFT_OUT, NOTE, OK, STOPPED, Command, Outcome, Part

GRACE = 0.6
PYTHON = sys.executable


def shell(script: str, title: str = "sh") -> Command:
    return Command(title, ("sh", "-c", script))


def part(name: str, *scripts: str, share: float = 1.0, least: float = 0.0, missing: str = "") -> Part:
    return Part(name, share, least, tuple(map(shell, scripts)), missing)


@pytest.fixture
def plan(tmp_path: Path) -> Callable[..., dict[str, Outcome]]:
    """Runs parts within so many seconds: their outcomes by name."""

    def run_parts(seconds: float, *parts: Part) -> dict[str, Outcome]:
        began = time.monotonic()
        outcomes = gpu_plan.run_plan(parts, seconds, tmp_path, GRACE)
        assert time.monotonic() - began < seconds + 1.0
        return {outcome.part: outcome for outcome in outcomes}

    return run_parts


def wait_for_end(process: int) -> None:
    """Of what may be a zombie for a moment, whose parent was another process."""
    end = time.monotonic() + 5
    status = Path(f"/proc/{process}/stat")
    while status.exists() and status.read_text().rpartition(") ")[2][0] != "Z":
        assert time.monotonic() < end, f"process {process} is still there"
        time.sleep(0.01)


@pytest.mark.parametrize(
    ("left", "shares", "least", "limit"),
    [
        (100, [1, 3], 0, 25),
        (100, [1, 3], 40, 40),
        (30, [1, 3], 40, 30),  # fewer than the least: it won't be begun
        (100, [5], 0, 100),
        (0, [1, 1], 10, 0),
        (100, [], 0, 0),
    ],
)
def test_limits(left: float, shares: list[float], least: float, limit: float) -> None:
    assert gpu_plan.limit_of(left, shares, least) == limit


def test_time_that_a_part_leaves_goes_to_those_behind_it(plan: Callable) -> None:
    found = plan(8.0 + GRACE, part("first", "true", share=2), part("second", "true", share=1), part("third", "true"))
    assert [outcome.state for outcome in found.values()] == [OK, OK, OK]
    assert [outcome.limit for outcome in found.values()] == pytest.approx([4, 4, 8], abs=0.5)


def test_part_that_runs_over_is_stopped_with_its_children(plan: Callable, tmp_path: Path) -> None:
    """One that ends as it is asked to, and one that doesn't."""
    asked = "echo begun; trap 'echo saved; exit 0' INT; sleep 60 & echo child $!; wait"
    deaf = "trap '' INT; sleep 60 & echo child $!; while :; do sleep 0.1; done"
    found = plan(3.0 + 2 * GRACE, part("asked", asked), part("deaf", deaf), part("last", "echo done"))
    assert [outcome.state for outcome in found.values()] == [STOPPED, STOPPED, OK]
    assert found["asked"].said == "after 1 s: saved" and found["last"].said == "done"
    logs = {name: (tmp_path / f"{name}.log").read_text() for name in found}
    assert "\nbegun\n" in logs["asked"]
    for name in ("asked", "deaf"):
        (child,) = re.findall(r"^child (\d+)$", logs[name], re.MULTILINE)
        wait_for_end(int(child))


def test_what_a_part_leaves_running_is_ended(plan: Callable, tmp_path: Path) -> None:
    assert plan(5.0, part("quick", "sleep 60 & echo $!"))["quick"].state == OK
    wait_for_end(int((tmp_path / "quick.log").read_text().split()[-1]))


def test_failure_ends_neither_its_part_nor_the_plan(plan: Callable, tmp_path: Path) -> None:
    bad = Part("bad", 1, 0, (shell("echo broken; exit 3", "one"), shell("echo fine", "two"), shell("exit 0", "three")))
    absent = Part("absent", 1, 0, (Command("program", ("/no/such/program",)),))
    found = plan(5.0, bad, absent, part("later", "echo done"))
    assert [outcome.state for outcome in found.values()] == [FAILED, FAILED, OK]
    assert found["bad"].said == "one: status 3: broken" and "No such file" in found["absent"].said
    log = (tmp_path / "bad.log").read_text()
    assert "== one, " in log and "\nfine\n" in log and "== three, " in log


def test_commands_share_the_time_of_their_part(plan: Callable, tmp_path: Path) -> None:
    slow = tuple(shell("sleep 60", title) for title in ("one", "two"))
    outcome = plan(1.0 + GRACE, Part("slow", 1, 0, (*slow, shell("sleep 60", "three"))))["slow"]
    said = r"one: after 0 s: ; two: after 0 s: ; three: after 0 s: "
    assert outcome.state == STOPPED and re.fullmatch(said, outcome.said)
    (tmp_path / "times").mkdir()
    state, line = gpu_plan.run_command(shell("echo {seconds}"), 100.0, tmp_path / "log", GRACE, lambda seconds: None)
    assert state == OK and float(line) == gpu_plan.BEGIN_SHARE * 100


def test_notes_and_what_is_left_out(plan: Callable) -> None:
    refused = part("refused", "echo ==ERROR== ERR_NVGPUCTRPERM; echo bye; exit 1")
    large, small = part("large", "true", least=60), part("small", "true")
    found = plan(3.0, part("lacking", missing="ncu"), refused, large, small, part("last", missing="ncu"))
    assert [outcome.state for outcome in found.values()] == [NOTE, NOTE, LEFT_OUT, OK, NOTE]
    assert found["small"].limit == pytest.approx(3.0 - GRACE, abs=0.5)  # none is kept for what is missing
    assert "ncu" in found["lacking"].said and found["refused"].said == "==ERROR== ERR_NVGPUCTRPERM"
    assert found["large"].said.endswith("s were left, it needs 60")


def test_the_screen_has_a_line_for_each_part_and_news_of_what_runs(
    plan: Callable, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu_plan, "NEWS_SECONDS", 1.0)
    plan(5.0 + GRACE, part("long", f"printf 'case 1\\rcase 2\\r'; sleep 1.3; echo; echo === {300 * 'x'} ==="))
    news, line = capsys.readouterr().out.splitlines()
    assert news.startswith("long, sh: 1 of ") and news.endswith("s; case 2")
    assert line.startswith("long       ok            1 of   5 s  xxx") and len(line) == gpu_plan.WIDTH
    assert (tmp_path / "long.log").read_text().endswith("xxx ===\n")


@pytest.fixture
def on_gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., int]:
    """The command, as on a machine with a GPU, with two parts instead of the real ones."""
    monkeypatch.setattr(gpu_plan, "gpu_name", lambda: "NVIDIA H200")
    monkeypatch.setattr(gpu_plan, "parts", lambda out, gpu: [part("good", "echo fine"), part("bad", "exit 1")])
    return lambda *arguments: gpu_plan.main(["--out", str(tmp_path / "out"), *arguments])


def test_command(on_gpu: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert on_gpu() == 1
    output = capsys.readouterr().out
    assert "NVIDIA H200, not all went well" in output and output.count("good       ok") == 2
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"results", "good.log", "bad.log"}
    assert on_gpu("--only", "good") == 0
    assert "bad" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--only", "good,better"], "--only: 'better' must be among good, bad"),
        (["--seconds", "15"], "--seconds: 15 must be more than 15"),
        (["--seconds", "long"], "--seconds: invalid"),
    ],
)
def test_bad_arguments(
    on_gpu: Callable[..., int], arguments: list[str], message: str, capsys: pytest.CaptureFixture
) -> None:
    with pytest.raises(SystemExit, match="2"):
        on_gpu(*arguments)
    assert message in capsys.readouterr().err


def test_without_a_gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setattr(gpu_plan, "gpu_name", lambda: "")
    assert gpu_plan.main(["--out", str(tmp_path / "out")]) == 2
    assert "torch finds no GPU" in capsys.readouterr().err and not (tmp_path / "out").exists()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_what_runs_ends_with_the_plan(number: int, tmp_path: Path) -> None:
    """Imported from its folder: it needs nothing but Python's own modules."""
    code = f"""
import sys
sys.path.insert(0, {str(gpu_plan.REPOSITORY / "benchmarks")!r})
import gpu_plan
from pathlib import Path
assert "torch" not in sys.modules
gpu_plan._end_on_signals()
gpu_plan.POLL_SECONDS = 0.1
command = gpu_plan.Command("sh", ("sh", "-c", "trap '' INT TERM; sleep 60 & echo $! >pid.part; mv pid.part pid; wait"))
gpu_plan.TESTS = out = Path({str(tmp_path)!r})
gpu_plan.run_plan([gpu_plan.Part("part", 1, 0, (command,))], 60.0, out, 1.0)
"""
    process = subprocess.Popen([PYTHON, "-c", code])
    end = time.monotonic() + 5
    while not (tmp_path / "pid").exists():
        assert time.monotonic() < end and process.poll() is None
        time.sleep(0.01)
    process.send_signal(number)
    assert process.wait(5) == 128 + number
    wait_for_end(int((tmp_path / "pid").read_text()))


# --- the real parts ---


def real_commands(tmp_path: Path) -> dict[str, list[Command]]:
    """Of the real plan, by part."""
    return {part.name: list(part.commands) for part in gpu_plan.parts(tmp_path, "NVIDIA H200")}


def module_arguments(command: Command, module: str) -> list[str]:
    """Those behind `python -m module`."""
    start = list(command.arguments).index("-m")
    assert command.arguments[start - 1 : start + 2] == (PYTHON, "-m", module)
    assert importlib.util.find_spec(module) is not None
    return [x.replace(gpu_plan.SECONDS_ARGUMENT, "30") for x in command.arguments[start + 2 :]]


def test_the_shares_leave_every_part_its_least(tmp_path: Path) -> None:
    """Each part that needs all of its time, or the ends of its grace, leaves enough to those behind it."""
    parts = gpu_plan.parts(tmp_path, "NVIDIA H200")
    left = gpu_plan.SECONDS - gpu_plan.GRACE
    for index, each in enumerate(parts):
        limit = gpu_plan.limit_of(left, [other.share for other in parts[index:]], each.least)
        assert each.least <= limit <= 0.4 * gpu_plan.SECONDS or each is parts[-1]
        left -= limit
    assert left == pytest.approx(0)


def in_target(target: str, name: str, **_: object) -> bool:
    """What pytest -k asks about a test."""
    return name in target


def test_tests_that_are_named_exist(tmp_path: Path) -> None:
    commands = real_commands(tmp_path)
    assert Path(__file__).parent == gpu_plan.TESTS
    for name in (*gpu_plan.KERNEL_TESTS, *gpu_plan.ELSEWHERE):
        assert list(gpu_plan.TESTS.glob(name)), name
    for name in ("kernels", "tests"):
        arguments = module_arguments(commands[name][0], "pytest")
        chosen = Expression.compile(arguments[arguments.index("-k") + 1])
        for target in ("triton-cuda-bfloat16", "cuda-cuda-bfloat16"):  # as support.Target names them
            assert chosen.evaluate(partial(in_target, target))
        assert not chosen.evaluate(partial(in_target, "cpu-cpu-bfloat16"))


def test_bench_knows_its_arguments_and_names_results_that_can_be_kept(tmp_path: Path) -> None:
    kinds = []
    for command in real_commands(tmp_path)["bench"]:
        name, *arguments = module_arguments(command, "fastformer.cli")
        options = run._parse(arguments)
        assert name == "bench" and options.seconds == 30 and options.json.parent == tmp_path / "results"
        kinds.append(readme_table.NAME.fullmatch(options.json.name)[3])
        assert "-nvidia-h200-" in options.json.name
    assert kinds == ["-triton", "-cuda"]


@pytest.mark.parametrize(
    ("problem", "triton", "status"), [("", True, "0"), ("no nvcc", True, "no nvcc"), ("", False, "Triton is not")]
)
def test_environment_must_have_both_families(
    problem: str,
    triton: bool,
    status: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    monkeypatch.setattr(backends, "CUDA_PROBLEM", problem)
    monkeypatch.setattr(backends, "TRITON", triton)
    python, option, code = real_commands(tmp_path)["env"][-1].arguments
    assert (python, option) == (PYTHON, "-c")
    with pytest.raises(SystemExit, match=status):
        exec(code, {})
    assert "CUDA kernels" in capsys.readouterr().out


def test_sweep_tunes_until_the_time_is_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    _, command = real_commands(tmp_path)["sweep"]
    python, option, code, *arguments = command.arguments
    assert (python, option) == (PYTHON, "-c")
    statuses, tuned = [0, 1, 0, 130], []

    def tune(arguments: list[str]) -> int:
        options = cli._parser().parse_args(arguments)
        assert options.run is cli._tune and options.dtype == ["bfloat16"]
        tuned.extend(options.op)
        return statuses[len(tuned) - 1]

    monkeypatch.setattr(cli, "main", tune)
    for seconds, status, count in (("100", 130, 4), ("-1", 1, 0)):
        tuned.clear()
        monkeypatch.setattr(sys, "argv", ["-c", *(x.replace("{seconds}", seconds) for x in arguments)])
        with pytest.raises(SystemExit, match=str(status)):
            exec(code, {})
        assert tuned == list(gpu_plan.TUNED[:count])
    assert "no time for attention and what is behind it" in capsys.readouterr().out
    assert set(gpu_plan.TUNED) <= set(tune_trials.OPERATIONS)
    monkeypatch.setenv("FASTFORMER_TUNING", command.environment["FASTFORMER_TUNING"])
    assert tuning.path() == tmp_path / "tuning.json"


def test_sweep_begins_with_the_tiles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the GPU, until the time is over."""
    pytest.importorskip("triton", reason="Triton is not installed")
    from fastformer.benchmarks import tile_sweep

    seen: list[tuple] = []

    def sweep(swept: str, timer: str, environment: str, is_over: Callable[[], bool], file: Path) -> int:
        seen.append((swept, timer, environment, is_over(), is_over(), file))
        return 7

    monkeypatch.setattr(tile_sweep, "run", sweep)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(backends, "available", lambda *where: where == ("triton", "cuda"))
    for module, name in ((tile_sweep, "entries"), (tile_sweep, "timer_for"), (tile_sweep.machine, "environment")):
        monkeypatch.setattr(module, name, lambda device, name=name: f"{name} of {device}")
    monkeypatch.setattr(time, "monotonic", iter((1000.0, 1029.9, 1030.1)).__next__)
    tiles, _ = real_commands(tmp_path)["sweep"]
    assert tile_sweep.main(module_arguments(tiles, "fastformer.benchmarks.tile_sweep")) == 7
    on_gpu = ("entries of cuda", "timer_for of cuda", "environment of cuda")
    assert seen == [(*on_gpu, False, True, tmp_path / "tiles.json")]


def test_programs_are_found_in_the_toolkit_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    missing = {part.name: part.missing for part in gpu_plan.parts(tmp_path, "")}
    assert missing["sanitizer"] == "compute-sanitizer" and missing["ncu"] == "ncu" and missing["bench"] == ""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "compute-sanitizer").touch()
    commands = real_commands(tmp_path)["sanitizer"]
    assert [command.arguments[0] for command in commands] == 3 * [str(tmp_path / "bin" / "compute-sanitizer")]


def test_sanitizers_cases(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    """On a CPU: that all of them run, and that no more are begun when the time is over."""
    gpu_cases.run("cpu")
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == f"all {len(lines) - 1} cases" and len(lines) > 250
    gpu_cases.run("cpu", seconds=0)
    assert capsys.readouterr().out.splitlines()[-1].startswith("1 cases; no time for those behind attention 128 in")
    for command in real_commands(tmp_path)["sanitizer"]:
        script, *arguments = command.arguments[list(command.arguments).index(PYTHON) + 1 :]
        assert Path(script) == Path(gpu_cases.__file__)
        seen = []
        monkeypatch.setattr(gpu_cases, "run", lambda device, seconds, seen=seen: seen.append((device, seconds)))
        monkeypatch.setattr(gpu_cases.fastformer, "backend", lambda name: torch.no_grad())
        monkeypatch.setattr(sys, "argv", [script, *(x.replace("{seconds}", "30") for x in arguments)])
        gpu_cases.main()
        assert seen == [("cuda", 30.0)]


# --- the profile ---

NCU = """==PROF== Connected to process 1234
==PROF== Profiling "spin_kernel" - 0: 0%....100% - 3 passes
"ID","Process ID","Kernel Name","Section Name","Metric Name","Metric Unit","Metric Value"
"0","1","at::cuda::<unnamed>::spin_kernel(long)","GPU Speed Of Light Throughput","Duration","us","1.02"
"1","1","void fastformer::cuda::<unnamed>::attend<__nv_bfloat16, (int)64>(Attention)","S","Duration","ms","1.25"
"1","1","void fastformer::cuda::<unnamed>::attend<__nv_bfloat16, (int)64>(Attention)","S","Memory Throughput","%","41.5"
"2","1","at::cuda::<unnamed>::spin_kernel(long)","GPU Speed Of Light Throughput","Duration","us","1.02"
"3","1","_attention_delta","GPU Speed Of Light Throughput","Duration","us","12.50"
"4","1","void fastformer::cuda::(anonymous namespace)::backward(int)","Occupancy","Achieved Occupancy","%","18.70"
"""


def test_profile_names_the_cases_of_kernels(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """By a program that writes what Nsight Compute does, or only why it can't."""
    ncu, out = tmp_path / "ncu", tmp_path / "found.csv"
    ncu.write_text(f'#!/bin/sh\nwhile [ "$1" != --log-file ]; do shift; done\ncat >"$2" <<"E"\n{NCU}E\n')
    ncu.chmod(0o755)
    arguments = ["gpu_profile", "--backend", "cuda", "--ncu", str(ncu), "--out", str(out)]
    monkeypatch.setattr(sys, "argv", arguments)
    assert gpu_profile.main() == 0
    title, *lines = capsys.readouterr().out.splitlines()
    assert title.split()[:3] == ["case", "kernel", "time"]
    assert [" ".join(line.split()) for line in lines] == [
        "attention d64 forward attend 1.25 ms - 41.5 % - - -",
        "attention d64 backward _attention_delta 12.50 us - - - - -",
        "attention d64 backward backward - - - - - 18.70 %",
    ]
    ncu.write_text("#!/bin/sh\necho '==ERROR== ERR_NVGPUCTRPERM'\nexit 1\n")
    assert gpu_profile.main() == 1 and not out.exists()
    assert capsys.readouterr().out.endswith("ncu profiled no kernel\n")


def test_profile_runs_its_own_cases(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for command in real_commands(tmp_path)["ncu"]:
        arguments = module_arguments(command, gpu_profile.MODULE)
        assert Path(arguments[arguments.index("--out") + 1]).parent == tmp_path
        (*options, _, backend) = gpu_profile.command("ncu", command.title, tmp_path / "x.csv")
        assert backend == command.title and options[-3:] == [PYTHON, "-m", gpu_profile.MODULE]

    def draw(*shape: int, scale: float = 1.0) -> torch.Tensor:
        return torch.empty(shape, device="meta", requires_grad=True)

    for make in gpu_profile.CASES.values():
        make(draw)()


def test_makefile_runs_the_plan() -> None:
    command = ["make", "--no-print-directory", "-n", "gpu"]  # make may run the tests, and would say where it is
    found = subprocess.run(command, cwd=gpu_plan.REPOSITORY, capture_output=True, text=True, check=True)
    script = shlex.split(found.stdout)[-1]
    assert os.path.samefile(gpu_plan.REPOSITORY / script, gpu_plan.__file__)
