"""The benchmark suite: no time for a wrong answer, every mode measured as it says, a command that keeps what it has."""

from __future__ import annotations

import itertools
import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from bench_support import LIMITS, PACE, Clock, case, double, rows_of, wrong_value
from torch import Tensor

from fastformer.benchmarks import (
    bench_gpt,
    harness,
    limits,
    machine,
    pace,
    report,
    run,
    scaling,
    suite,
    test_operations,
)
from fastformer.benchmarks.checking import Check
from fastformer.benchmarks.harness import BACKWARD, FORWARD, MODES, TRAINING, Pace, Timing, Work

CPU = torch.device("cpu")
REPOSITORY = Path(run.__file__).resolve().parent.parent


def wrong_shape(input: Tensor) -> Tensor:
    return (2 * input)[:1]


def wrong_gradient(input: Tensor) -> Tensor:
    return input.detach() + input


def not_there(input: Tensor) -> Tensor:
    raise NotImplementedError("no kernel for\nthis device")


def test_right_answer_gets_times_and_speedups() -> None:
    rows = rows_of(case())
    assert [row.mode for row in rows] == [FORWARD, TRAINING]
    for row in rows:
        assert row.problem == "" and row.error_share == 0 and row.ours.samples == PACE.min_rounds
        assert row.speedups() == {"eager": row.peers["eager"].median / row.ours.median}
        assert (row.bytes, row.flops) == {FORWARD: (120, 15), TRAINING: (240, 30)}[row.mode]


@pytest.mark.parametrize("ours", [wrong_value, wrong_shape, not_there, lambda input: torch.nan * input])
def test_wrong_kernel_gets_no_time(ours: object) -> None:
    for row in rows_of(case(ours)):
        assert row.problem and row.ours is None and row.peers == {} and row.speedups() == {}
        assert row.memory == {} and row.overhead == {} and row.limit_share() is None


def test_wrong_gradient_keeps_the_forward_time() -> None:
    forward, backward, training = rows_of(case(wrong_gradient), Pace(row_seconds=0.0, modes=MODES))
    assert forward.ours is not None and forward.problem == ""
    for row in (backward, training):
        assert row.ours is None and "gradient of input" in row.problem


def test_error_is_a_share_of_what_is_allowed() -> None:
    """Torch's error is 0 here: allowed are 2 ulp of the largest value of a row."""
    inputs = torch.tensor([[1.0, 0.75], [0.5, 0.25]])
    off = torch.tensor([[2**-22, 0.0], [0.0, 0.0]])  # an ulp of 2
    the_case = case(lambda input: 2 * input + off, inputs=lambda: {"input": inputs}, work={FORWARD: Work(8, 1)})
    assert [row.error_share for row in rows_of(the_case)] == [0.5]
    (row,) = rows_of(case(lambda input: 2 * input + 5 * off, inputs=the_case.inputs, work=the_case.work))
    assert row.error_share == 2.5 and "2.5x the allowed error" in row.problem


def test_modes_time_their_own_part_on_a_fake_clock() -> None:
    """A forward pass of 5 seconds, a backward pass of 1."""
    clock = Clock()

    class Slow(torch.autograd.Function):
        @staticmethod
        def forward(context: object, input: Tensor) -> Tensor:
            clock.now += 5
            return 2 * input

        @staticmethod
        def backward(context: object, grad: Tensor) -> Tensor:
            clock.now += 1
            return 2 * grad

    the_case = case(Slow.apply, peers={"eager": Slow.apply})
    pace = Pace(row_seconds=0.0, modes=MODES)
    rows = list(harness.run_case(the_case, "cpu", harness.CpuTimer(clock), LIMITS, pace, random.Random(0)))
    assert {row.mode: row.ours.median for row in rows} == {FORWARD: 5, BACKWARD: 1, TRAINING: 6}
    assert {row.mode: row.peers["eager"].median for row in rows} == {FORWARD: 5, BACKWARD: 1, TRAINING: 6}


def test_forward_has_no_graph_and_modes_that_a_case_lacks_no_row() -> None:
    grad_modes = []

    def ours(input: Tensor) -> Tensor:
        grad_modes.append(torch.is_grad_enabled())
        return 2 * input

    pace = Pace(row_seconds=0.0, modes=MODES)
    assert [row.mode for row in rows_of(case(ours, work={FORWARD: Work(120, 15)}), pace)] == [FORWARD]
    assert not any(grad_modes)
    assert rows_of(case(ours, work={FORWARD: Work(120, 15)}), Pace(modes=[BACKWARD])) == []


def test_inputs_are_the_cases_own_and_never_zeros() -> None:
    seen: list[Tensor] = []

    def ours(input: Tensor) -> Tensor:
        seen.append(input)
        return 2 * input

    for other in ("another", "3x5"):
        rows_of(case(shape=other))
        torch.randn(7)
        rows_of(case(ours))
    assert torch.equal(seen[0], seen[-1]) and seen[0] is not seen[-1]
    rows_of(case(ours, shape="another"))
    assert not torch.equal(seen[0], seen[-1])
    zeros = rows_of(case(inputs=lambda: {"input": torch.zeros(3, 5)}))
    assert all("input is all zeros" in row.problem and row.ours is None for row in zeros)


def test_case_that_cannot_be_checked_is_a_row_with_the_reason() -> None:
    rows = rows_of(case(reference=not_there))
    assert [row.mode for row in rows] == [FORWARD, TRAINING]
    assert all(row.problem.startswith("can't be checked: NotImplementedError") and row.ours is None for row in rows)


def test_peers_that_cannot_run_say_why() -> None:
    peers = {"eager": double, "sdpa": not_there, "sdpa: other": wrong_shape, "liger": "not installed"}
    row = rows_of(case(peers=peers | {"flex": lambda input: 3 * input}))[0]
    assert row.peers["sdpa"] == "NotImplementedError: no kernel for this device"
    assert "shapes" in row.peers["sdpa: other"]
    assert row.peers["flex"] == "computes something else: output"
    assert row.peers["liger"] == "not installed"
    assert list(row.speedups()) == ["eager"] and row.memory.keys() == {"ours", "eager"}


class Later:
    """Doubles, but does something else from its second call on."""

    def __init__(self, then: Callable[[Tensor], Tensor]) -> None:
        self.calls, self.then = 0, then

    def __call__(self, input: Tensor) -> Tensor:
        self.calls += 1
        return 2 * input if self.calls == 1 else self.then(input)


def test_answers_are_looked_at_again_when_all_is_timed() -> None:
    forward = {FORWARD: Work(120, 15)}
    (row,) = rows_of(case(Later(wrong_value), work=forward))
    assert row.problem.startswith(f"after {PACE.min_rounds} calls: wrong output: ") and row.error_share > 1
    assert row.ours is None and row.peers == {} and row.memory == {}
    (row,) = rows_of(case(Later(not_there), work=forward))
    assert row.problem == "NotImplementedError: no kernel for this device" and row.ours is None
    peers = {"eager": double, "sdpa": Later(lambda input: 3 * input), "flex": Later(not_there)}
    (row,) = rows_of(case(peers=peers, work=forward))
    assert row.problem == "" and list(row.speedups()) == ["eager"] and row.memory.keys() == {"ours", "eager"}
    assert row.peers["sdpa"] == "computes something else: output"
    assert row.peers["flex"] == "NotImplementedError: no kernel for this device"


def test_kernel_that_overwrites_what_it_is_given() -> None:
    """In its second row, or the gradient of its output."""

    class InPlace(torch.autograd.Function):
        @staticmethod
        def forward(context: object, input: Tensor) -> Tensor:
            return 2 * input

        @staticmethod
        def backward(context: object, grad: Tensor) -> Tensor:
            return grad.mul_(2)

    def in_place(input: Tensor) -> Tensor:
        output = 2 * input
        input.detach()[1] = 0
        return output

    assert [row.problem for row in rows_of(case(in_place))] == 2 * ["overwrites input"]
    assert [row.problem for row in rows_of(case(InPlace.apply))] == ["", "overwrites gradient of output"]
    peers = {"eager": double, "sdpa": in_place, "flex": InPlace.apply, "liger": in_place}
    pace = Pace(0.0, modes=MODES)
    for row in rows_of(case(peers=peers, in_place=("liger",)), pace):
        assert row.problem == "" and row.error_share == 0 and row.peers["sdpa"] == "overwrites input"
        assert isinstance(row.peers["liger"], Timing) and "liger" in row.memory
        assert isinstance(row.peers["flex"], Timing if row.mode == FORWARD else str)


def test_what_cannot_be_measured_costs_no_time(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_memory(call: object, device: torch.device) -> int:
        raise MemoryError("too little")

    monkeypatch.setattr(harness, "peak_bytes", no_memory)
    for row in rows_of(case()):
        assert row.problem == "" and row.ours is not None and list(row.speedups()) == ["eager"] and row.memory == {}


def test_gradient_of_a_loss_is_one() -> None:
    check = Check(case(double, reference=lambda input: input.sum(), peers={"eager": lambda input: input.sum()}))
    assert check.grad_outputs[0].item() == 1


def test_peers_are_held_to_the_right_answer_not_to_torchs() -> None:
    peers = {"eager": lambda input: 2.16 * input, "sdpa": double, "flex": lambda input: 1.8 * input}
    (row,) = rows_of(case(peers=peers, work={FORWARD: Work(120, 15)}))
    assert list(row.speedups()) == ["eager", "sdpa"] and row.peers["flex"] == "computes something else: output"


def test_only_and_skip() -> None:
    the_case = case(peers={"eager": not_there, "sdpa": double, "sdpa: math": double, "flex": double}, judged_by="sdpa")
    assert rows_of(the_case, Pace(0.0, only=["sdpa"]))[0].peers.keys() == {"sdpa", "sdpa: math"}
    assert rows_of(the_case, Pace(0.0, skip=["sdpa: math", "eager"]))[0].peers.keys() == {"sdpa", "flex"}
    row = rows_of(the_case, Pace(0.0, only=["ours"]))[0]
    assert row.peers == {} and row.ours is not None  # checked against sdpa all the same


def test_compiled_peers(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[dict] = []

    def compile(function: object, **options: object) -> object:
        made.append(options)
        return function

    monkeypatch.setattr(torch, "compile", compile)
    forward = {FORWARD: Work(120, 15)}
    (row,) = rows_of(case(compiled="eager", work=forward), Pace(0.0, thorough=True))
    assert list(row.peers) == ["eager", "compile", "compile: max-autotune"]
    assert all(isinstance(peer, Timing) for peer in row.peers.values())
    assert [options["mode"] for options in made] == [None, "max-autotune"]
    assert all(options["fullgraph"] and options["dynamic"] is False for options in made)
    (row,) = rows_of(case(compiled="eager", work=forward), Pace(0.0))
    assert list(row.peers) == ["eager", "compile"]
    late = Pace(0.0, suite_seconds=1.0, started=-1e9)
    (row,) = rows_of(case(compiled="eager", work=forward), late)
    assert "no time left" in row.peers["compile"] and len(made) == 3
    (row,) = rows_of(case(peers={"eager": double, "flex": double}, work=forward), late)
    assert "no time left" in row.peers["flex"] and isinstance(row.peers["eager"], Timing)
    assert rows_of(case(compiled="eager", work=forward), Pace(0.0, skip=["compile"]))[0].peers.keys() == {"eager"}


def test_memory_and_overhead_of_ours_and_each_peer() -> None:
    rows = rows_of(case(lambda input: input + input, few=lambda rows: {"input": torch.randn(rows, 5)}, rows=3))
    forward, training = rows
    assert forward.memory["ours"] == 3 * 5 * 4  # the output
    assert training.memory["ours"] >= 2 * 3 * 5 * 4  # and the gradient
    for row in rows:
        assert row.memory.keys() == row.overhead.keys() == {"ours", "eager"}
        assert all(1e-7 < seconds < 1e-2 for seconds in row.overhead.values())
    assert rows_of(case())[0].overhead == {}


def test_cuda_graph_that_cannot_be_captured_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def captured(call: object, device: torch.device) -> object:
        if len(attempts) == fails_at:
            raise RuntimeError("operation not permitted when stream is capturing")
        attempts.append(call)
        return call

    monkeypatch.setattr(harness, "captured", captured)
    the_case, pace = case(work={FORWARD: Work(120, 15)}), Pace(0.0, cuda_graphs=True)
    attempts, fails_at = [], 1
    (row,) = rows_of(the_case, pace)
    assert row.peers["eager"].startswith("no CUDA graph: RuntimeError: operation not") and row.ours is not None
    attempts, fails_at = [], 0
    (row,) = rows_of(the_case, pace)
    assert row.problem.startswith("no CUDA graph: RuntimeError") and row.ours is None


def test_environment_says_what_reports_count(monkeypatch: pytest.MonkeyPatch) -> None:
    facts = machine.environment(CPU)
    assert facts.keys() >= {"processor", "threads", "system", "versions", "load"}
    assert int(facts["threads"].split()[0]) == torch.get_num_threads() and float(facts["load"].split()[0]) >= 0
    assert f"torch {torch.__version__}" in facts["versions"] and "tuning" not in facts
    monkeypatch.setattr(machine.backends, "tables_in_use", lambda: "cpu of 2026-11-21, 3 entries")
    assert machine.environment(CPU)["tuning"] == "cpu of 2026-11-21, 3 entries"


@pytest.fixture
def small_scaling(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scaling, "LENGTHS", {"cpu": (8, 300)})
    monkeypatch.setattr(scaling, "WIDTHS", {"cpu": (64,)})
    monkeypatch.setattr(scaling, "ELEMENTS", {"cpu": 2**12})


def scaled(threads: int) -> list[scaling.Point | harness.Row]:
    dtypes = (torch.float32, torch.bfloat16)
    found = list(scaling.points(CPU, dtypes, threads, "cpu", harness.CpuTimer(), PACE, random.Random(0)))
    assert len(found) == scaling.count(CPU, dtypes)
    return found


def test_scaling_points(small_scaling: None) -> None:
    threads = torch.get_num_threads()
    found = [point for count in (1, 2) for point in scaled(count)]
    assert torch.get_num_threads() == threads
    sizes = [(x.operation, x.size, x.threads, x.dtype) for x in found]
    assert len(set(sizes)) == len(sizes) == 2 * 2 * 4
    assert all(0 < seconds < 1 for x in found for seconds in (x.ours, x.torch))
    assert json.loads(json.dumps(scaling.as_rows(found)))[0]["operation"] == "attention"


def test_scaling_checks_its_answers(small_scaling: None, monkeypatch: pytest.MonkeyPatch) -> None:
    attend = scaling.functional.scaled_dot_product_attention

    def wrong_in_the_last_query(*inputs: Tensor, is_causal: bool) -> Tensor:
        output = attend(*inputs, is_causal=is_causal)
        output[0, -1, -1] += 0.1
        return output

    monkeypatch.setattr(scaling.functional, "scaled_dot_product_attention", wrong_in_the_last_query)
    found = scaled(1)
    wrong = [row for row in found if isinstance(row, harness.Row)]
    assert [(row.operation, row.shape) for row in wrong] == 2 * [("attention", "length 8"), ("attention", "length 300")]
    assert all("allowed error" in row.problem and row.error_share > 1 and row.ours is None for row in wrong)
    assert len(found) - len(wrong) == 4


@pytest.fixture
def no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """They take most of the time of a small run."""
    monkeypatch.setattr(run.pictures, "draw", lambda results: {})
    monkeypatch.setattr(run.html_report, "write", lambda results, path, drawn: None)


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> object:
    """``fastformer bench`` of given cases: (exit status, the JSON)."""
    monkeypatch.setattr(limits, "measure_limits", lambda *arguments: LIMITS)
    monkeypatch.setattr(limits, "copy_drift", lambda *arguments: -0.02)

    def command(cases: list, *arguments: str) -> tuple[int, dict]:
        monkeypatch.setattr(suite, "cases_of", lambda *arguments: iter(cases))
        data = tmp_path / "results" / "data.json"
        common = ["--op", "softmax", "--device", "cpu", "--out", str(tmp_path / "out"), "--json", str(data)]
        status = run.main([*common, *arguments])
        return status, json.loads(data.read_text())

    return command


def test_wrong_kernel_ends_the_command_with_status_1(
    bench: object, no_pictures: None, capsys: pytest.CaptureFixture
) -> None:
    status, results = bench([case(), case(wrong_value, shape="wrong")])
    assert status == 1 and not results["interrupted"]
    assert [bool(row["ours"]) for row in results["rows"]] == [True, True, False, False]
    assert results["limits"]["drift"] == -0.02
    output = capsys.readouterr().out
    assert "wrong output" in output and "data.json" in output
    assert max(map(len, output.partition("\nwritten")[0].splitlines())) <= report.WIDTH


def test_numbers_that_are_none_are_null_in_the_json(bench: object, no_pictures: None) -> None:
    status, results = bench([case(lambda input: torch.nan * input)])
    assert status == 1 and [row["error_share"] for row in results["rows"]] == [None, None]
    assert all("inf" in row["problem"] for row in results["rows"])


def test_threads_are_torchs_own_or_as_told(bench: object, no_pictures: None) -> None:
    def ours(input: Tensor) -> Tensor:
        seen.add(torch.get_num_threads())
        return 2 * input

    before, seen = torch.get_num_threads(), set()
    assert bench([case(ours)])[0] == 0 and seen == {before}
    seen.clear()
    status, results = bench([case(ours)], "--threads", str(before + 1))
    assert status == 0 and seen == {before + 1} and torch.get_num_threads() == before
    assert results["environment"]["threads"].startswith(f"{before + 1} of torch")


def test_command_writes_what_it_says(bench: object, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    page = tmp_path / "page" / "index.html"
    status, results = bench([case()], "--html", str(page), "--mode", "bwd", "--dtype", "float32", "--metrics", "error")
    assert status == 0 and [row["mode"] for row in results["rows"]] == [BACKWARD]
    output = capsys.readouterr().out
    files = {path for path in tmp_path.rglob("*") if path.is_file()}
    pictures = {path for path in files if path.suffix == ".svg"}
    assert files - pictures == {page, tmp_path / "results" / "data.json"}
    assert {path.parent for path in pictures} == {tmp_path / "out"}
    assert f"written: {tmp_path / 'results' / 'data.json'}, {page}, {len(pictures)} pictures in" in output
    assert "speed-up" not in output and "allowed" in output


def test_interruption_keeps_what_there_is(bench: object, no_pictures: None, capsys: pytest.CaptureFixture) -> None:
    def interrupt(input: Tensor) -> Tensor:
        raise KeyboardInterrupt

    status, results = bench([case(), case(interrupt), case()])
    assert status == 130 and results["interrupted"] and len(results["rows"]) == 2
    assert "interrupted" in capsys.readouterr().err


def test_interruption_before_anything_is_measured(
    bench: object, no_pictures: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*arguments: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(limits, "measure_limits", interrupt)
    status, results = bench([case()])
    assert status == 130 and results["interrupted"] and results["rows"] == []


def test_part_that_raises_does_not_end_the_others(
    bench: object, small_scaling: None, no_pictures: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def rows(*arguments: object) -> None:
        raise MemoryError("too little")

    monkeypatch.setattr(suite.bench_models, "rows", rows)
    status, results = bench([case()], "--op", "models,scaling", "--mode", FORWARD, "--threads", "1")
    assert status == 1 and len(results["scaling"]) == 2 * 4
    assert [row["problem"] for row in results["rows"]] == ["MemoryError: too little", ""]


def test_slower_than_an_old_run_is_status_3(
    bench: object, no_pictures: None, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    status, results = bench([case()])
    assert status == 0
    for row in results["rows"]:
        row["ours"] = {name: x if name == "samples" else x / 100 for name, x in row["ours"].items()}
    old = tmp_path / "old.json"
    old.write_text(json.dumps(results))
    assert bench([case()], "--compare", str(old))[0] == 3
    for row in results["rows"]:
        row["ours"] = {name: x if name == "samples" else x * 1e4 for name, x in row["ours"].items()}
    old.write_text(json.dumps(results))
    assert bench([case()], "--compare", str(old))[0] == 0


def test_schedule_follows_what_is_done(monkeypatch: pytest.MonkeyPatch) -> None:
    with_flex = case(shape="second", peers={"eager": double, "flex": double})
    monkeypatch.setattr(suite, "cases_of", lambda *arguments: iter([case(), with_flex]))
    monkeypatch.setattr(limits, "measure_limits", lambda *arguments: LIMITS)
    monkeypatch.setattr(limits, "copy_drift", lambda *arguments: 0.0)
    pace = Pace(row_seconds=10.0, skip=["compile"])
    seen = []

    def run_case(*arguments: object) -> list:
        seen.append(pace.done)
        return []

    def model_rows(*arguments: object) -> object:
        for _ in range(2):
            seen.append(pace.done)
            yield harness.Row("model", "small", "fp32", FORWARD, "auto")

    monkeypatch.setattr(suite, "run_case", run_case)
    monkeypatch.setattr(suite.bench_models, "rows", model_rows)
    suite.Runner(CPU, "cpu", "quick", ["softmax", "models"], [torch.float32], pace).run()
    each, models = 2 * (10.0 + suite.CHECK_SECONDS), suite.bench_models.COUNT * suite.MODEL_SECONDS
    first = suite.LIMITS_SECONDS
    starts = [first, first + suite.MODEL_SECONDS, first + models, first + models + each]
    total = first + models + 2 * each + suite.FLEX_SECONDS + 1
    assert seen == pytest.approx([start / total for start in starts])
    assert pace.done == pytest.approx(1.0)


@pytest.fixture
def late(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """So many seconds, the sum, does the schedule's clock seem to be late."""
    seconds: list[float] = []
    clock = SimpleNamespace(monotonic=lambda: time.monotonic() + sum(seconds))
    monkeypatch.setattr(pace, "time", clock)
    return seconds


def test_seconds_cut_a_suite_between_its_cases(bench: object, no_pictures: None, late: list[float]) -> None:
    """What has begun is finished, and copies are measured again; the results say what there was no time for."""

    def ours(input: Tensor) -> Tensor:
        late.append(100.0)
        return 2 * input

    cases = [case(shape="1"), case(ours, shape="2"), case(shape="3"), case(shape="4")]
    status, results = bench(cases, "--seconds", "99", "--dtype", "float32")
    assert status == 0 and not results["interrupted"] and results["limits"]["drift"] == -0.02
    assert [row["shape"] for row in results["rows"]] == ["1", "1", "2", "2"]
    assert results["environment"]["left out"] == "double 3 fp32 and 1 more: no time left"
    late.clear()
    status, results = bench(cases[:1] + cases[2:], "--seconds", "99")
    assert len(results["rows"]) == 6 and "left out" not in results["environment"]


def test_seconds_cut_whole_models_between_their_rows(
    bench: object, no_pictures: None, late: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    def rows(*arguments: object) -> object:
        for number in range(suite.bench_models.COUNT):
            late.append(60.0)
            yield harness.Row("model", str(number), "fp32", FORWARD, "auto", problem="not run")

    monkeypatch.setattr(suite.bench_models, "rows", rows)
    _, results = bench([case()], "--op", "models", "--seconds", "100")
    assert [row["shape"] for row in results["rows"]] == ["0", "1"]
    said = results["environment"]["left out"]
    assert said == f"whole models beyond 2 of {suite.bench_models.COUNT} and 1 more: no time left"


def test_operations_come_in_the_order_in_which_they_are_named() -> None:
    named = ("rotary", "models", "softmax", "rotary")
    cases = list(suite.cases_of(named, "quick", CPU, "cpu", [torch.float32]))
    assert list(dict.fromkeys(case.operation for case in cases)) == ["rotary", "softmax"]
    assert len({str(case) for case in cases}) == len(cases)


@pytest.mark.parametrize(
    "arguments",
    [
        ["--op", "nonsense"],
        ["--op", "softmax,"],
        ["--only", "fused"],
        ["--skip", "ours"],
        ["--skip", "fused: flash"],
        ["--only", "sdpa: flsh"],
        ["--mode", "fwd+bwd"],
        ["--dtype", "int8"],
        ["--metrics", "speed"],
        ["--suite", "slow"],
        ["--seconds", "few"],
        ["--no-compile"],
    ],
)
def test_bad_arguments(arguments: list[str], capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as exit:
        run.main(arguments)
    assert exit.value.code == 2 and "usage" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--suite", "gpu"], "--device: cpu, must be cuda with --suite gpu"),
        (["--threads", "0"], "--threads: 0, must be at least 1"),
        (["--seconds", "0"], "--seconds: 0, must be more than 0"),
        (["--seconds", "nan"], "--seconds: nan, must be more than 0"),
        (["--cuda-graphs"], "--cuda-graphs: there are none on cpu"),
        (["--backend", "triton"], "--backend: triton is not available on cpu"),
        (["--compare", __file__], "test_bench.py has no results of this benchmark .JSONDecodeError"),
        (["--compare", "{old}"], "old.json has no results of this benchmark .ValueError: .* format 1, must have 2"),
    ],
)
def test_arguments_that_do_not_go_together(
    arguments: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run.backends, "available", lambda backend, device: False)
    monkeypatch.delattr(run, "Runner")  # is not reached
    old = tmp_path / "old.json"
    old.write_text('{"format": 1}')
    arguments = [argument.format(old=old) for argument in arguments]
    with pytest.raises(ValueError, match=message):
        run.main(["--device", "cpu", "--out", str(tmp_path), *arguments])


def test_operations_that_a_gpu_has_none_of_are_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(ValueError, match="--op: linear, which on cuda are torch's own"):
        run.main(["--device", "cuda", "--op", "softmax,linear", "--out", str(tmp_path)])


@pytest.mark.parametrize(
    ("only", "compiled"),
    [
        ("eager", []),
        ("compile", ["compile", "compile: max-autotune", "ours: compile"]),
        ("compile: max-autotune", ["compile: max-autotune"]),
        ("ours: compile", ["ours: compile"]),
    ],
)
def test_asking_for_a_compiled_peer_is_enough(only: str, compiled: list[str]) -> None:
    """In a suite that compiles nothing otherwise."""
    pace = run._runner(run._parse(["--suite", "cpu", "--only", only, "--device", "cpu"])).pace
    names = ("ours", "compile", "compile: max-autotune", "ours: compile")
    assert list(filter(pace.wants, names)) == ["ours", *compiled]
    assert pace.thorough == ("compile: max-autotune" in compiled and only != "compile")


def test_lists_with_commas_and_repeated_options() -> None:
    options = run._parse(["--op", "softmax,rotary", "--op", "gpt", "--only", "sdpa: flash,eager", "--mode", "bwd,fwd"])
    assert options.op == ["softmax", "rotary", "gpt"] and options.only == ["sdpa: flash", "eager"]
    assert options.mode == ["bwd", "fwd"] and options.dtype == ("float32", "bfloat16") and options.skip is None


def test_suites_nest() -> None:
    for suites in (("quick", "cpu", "full"), ("quick", "gpu")):
        for smaller, larger in itertools.pairwise(suites):
            assert set(suite.SUITES[smaller].parts) <= set(suite.SUITES[larger].parts)


def test_pytest_benchmark_runs_a_case() -> None:
    """Ours and a peer in the three modes of one of the quick suite's cases."""
    chosen = "softmax and 4096x768 and fp32 and (ours or eager)"
    fast = ["--benchmark-max-time=0.02", "--benchmark-min-rounds=2", "--benchmark-columns=median"]
    command = [sys.executable, "-m", "pytest", "benchmarks/", "-k", chosen, "--device", "cpu", *fast]
    # Without what pytest-xdist says, under which pytest-benchmark measures nothing.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    environment["OMP_NUM_THREADS"] = "1"
    found = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, env=environment)
    assert found.returncode == 0, found.stdout + found.stderr
    assert "\n6 passed" in found.stdout
    for mode in MODES:
        assert f"benchmark 'softmax 4096x768 fp32 {mode}': 2 tests" in found.stdout


def test_pytest_benchmark_checks_first() -> None:
    def benchmark(call: object) -> None:
        timed.append(call())

    timed: list[object] = []
    benchmark.extra_info = {}
    the_case = case(wrong_value, peers={"eager": double, "sdpa": wrong_value, "flex": not_there, "liger": wrong_shape})
    check = the_case, Check(the_case)
    with pytest.raises(AssertionError, match="wrong output"):
        test_operations.test_operation(check, FORWARD, "ours", benchmark)
    for peer, reason in (("flex", "no kernel for this device"), ("liger", "wrong shapes")):
        with pytest.raises(pytest.skip.Exception, match=reason):
            test_operations.test_operation(check, FORWARD, peer, benchmark)
    assert timed == []
    test_operations.test_operation(check, FORWARD, "sdpa", benchmark)  # within what peers may differ by
    assert len(timed) == 1 and benchmark.group == "double 3x5 fp32 fwd"


def test_end_to_end_runs_agree_and_unequal_ones_get_no_speed() -> None:
    config = bench_gpt.GPTConfig(4096, context_length=16, num_layers=1, num_heads=2, d_model=16)
    steps = bench_gpt.WARMUP_STEPS + 2
    done: list[int] = []
    with bench_gpt.Comparison(CPU, "auto", config) as comparison:
        comparison.run(on_step=lambda: done.append(1), steps=steps)
        with pytest.raises(RuntimeError, match="training with torch: AttributeError"):
            comparison.workers["torch"]("nonsense")
    results = json.loads(json.dumps(comparison.results()))
    assert results["problem"] == "" and results["steps"] == len(done) == steps
    assert results["loss_difference"] < 1e-4 and results["logits_difference"] < 1e-4 < results["largest_logit"]
    assert results["speedup"] == results["tokens_per_second"]["fastformer"] / results["tokens_per_second"]["torch"]
    assert results["held_out_loss"]["torch"] == pytest.approx(results["held_out_loss"]["fastformer"], abs=1e-4)
    assert min(results["peak_bytes"].values()) > 2**20
    comparison.losses["fastformer"][-1] += 0.01
    results = comparison.results()
    assert "losses differ by 1.0e-02" in results["problem"]
    assert results["speedup"] is None and results["tokens_per_second"] == {}
    assert report.failed({"rows": [], "end_to_end": results})
    assert "losses differ" in report.format_end_to_end(results)
    comparison.run(on_step=lambda: None, steps=1)  # the processes have been ended
    assert comparison.results()["problem"] == "the training process of torch ended with status -9"
