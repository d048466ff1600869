"""The benchmark suite: no time for a wrong answer, true medians, one table, JSON that says what the table says."""

from __future__ import annotations

import json
import random
import time
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from fastformer.benchmarks import (
    bench_generation,
    bench_gpt,
    bench_train_step,
    harness,
    machine,
    readme_table,
    report,
    run,
    scaling,
)
from fastformer.benchmarks.harness import FORWARD, TRAINING, Case, Limits, Pace, Timing, Work

LIMITS = Limits(
    copy={2**10: 1e11, 2**20: 1e10},
    read={2**10: 2e11, 2**20: 2e10},
    product={torch.float32: 1e11, torch.bfloat16: 2e11},
)
PACE = Pace(row_seconds=0.0, compile=False)


class Clock:
    """Advances only when a call says so."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def takes(self, *seconds: float) -> object:
        """A call that takes these seconds, one after the other; the last ones for ever."""
        left = list(seconds)

        def call() -> None:
            self.now += left.pop(0) if len(left) > 1 else left[0]

        return call


def double(input: Tensor) -> Tensor:
    return 2 * input


def wrong_value(input: Tensor) -> Tensor:
    return 2.001 * input


def wrong_shape(input: Tensor) -> Tensor:
    return (2 * input)[:1]


def wrong_gradient(input: Tensor) -> Tensor:
    return input.detach() + input


def not_there(input: Tensor) -> Tensor:
    raise NotImplementedError("no kernel for\nthis device")


def case(ours: object = double, **changes: object) -> Case:
    """Doubling, 3 x 5."""
    settings = {
        "operation": "double",
        "shape": "3x5",
        "dtype": torch.float32,
        "inputs": lambda: {"input": torch.randn(3, 5, requires_grad=True)},
        "ours": ours,
        "reference": lambda input: 2 * input,
        "peers": {"eager": double},
        "work": {FORWARD: Work(bytes=120, flops=15), TRAINING: Work(bytes=240, flops=30)},
    }
    return Case(**(settings | changes))


def rows_of(the_case: Case) -> list[harness.Row]:
    return list(harness.run_case(the_case, "cpu", harness.CpuTimer(), LIMITS, PACE, random.Random(0)))


def results_of(rows: list[harness.Row], end_to_end: dict | None = None) -> dict:
    environment = {"processor": "a processor, 2 threads", "versions": "torch 2"}
    collected = report.collect(environment, LIMITS, rows, end_to_end, interrupted=False)
    return json.loads(json.dumps(collected))


END_TO_END = {
    "model": "GPT, 6 layers",
    "batch": "4 x 256 tokens",
    "dtype": "fp32",
    "backend": "cpu",
    "steps": 2,
    "losses": {"torch": [8.0, 7.0], "fastformer": [8.0, 7.0001]},
    "held_out_loss": {"torch": 7.5, "fastformer": 7.5},
    "peak_bytes": {"torch": 3 * 2**20, "fastformer": 2 * 2**20},
    "logits_difference": 1e-6,
    "largest_logit": 2.0,
    "loss_difference": 1e-4,
    "tokens_per_second": {"torch": 100.0, "fastformer": 150.0},
    "speedup": 1.5,
    "problem": "",
}


def test_right_answer_gets_times_and_speedups() -> None:
    rows = rows_of(case())
    assert [row.mode for row in rows] == [FORWARD, TRAINING]
    for row in rows:
        assert row.problem == "" and row.error_share == 0 and row.ours.samples == PACE.min_rounds
        assert row.speedups() == {"eager": row.peers["eager"].median / row.ours.median}
    assert not report.failed(results_of(rows))


@pytest.mark.parametrize("ours", [wrong_value, wrong_shape, not_there, lambda input: torch.nan * input])
def test_wrong_kernel_gets_no_time(ours: object) -> None:
    results = results_of(rows_of(case(ours)))
    for row in results["rows"]:
        assert row["problem"] and row["ours"] is None and row["peers"] == {} and row["speedups"] == {}
    assert report.failed(results)
    table = report.format_table(results)
    assert results["rows"][0]["problem"][:30] in table and " ms" in table
    assert max(map(len, table.splitlines())) <= report.WIDTH


def test_wrong_gradient_keeps_the_forward_time() -> None:
    forward, training = rows_of(case(wrong_gradient))
    assert forward.ours is not None and forward.problem == ""
    assert training.ours is None and "gradient of input" in training.problem


def test_wrong_kernel_ends_the_command_with_status_1(
    monkeypatch: pytest.MonkeyPatch, tmp_path: object, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(run, "_cases", lambda *_, **__: iter([case(), case(wrong_value, shape="wrong")]))
    monkeypatch.setattr(machine, "measure_limits", lambda *arguments: LIMITS)
    data = tmp_path / "folder" / "results.json"
    arguments = ["--only", "softmax", "--device", "cpu", "--out", str(tmp_path), "--json", str(data)]
    assert run.main(arguments) == 1
    rows = json.loads(data.read_text())["rows"]
    assert [bool(row["ours"]) for row in rows] == [True, True, False, False]
    assert (tmp_path / "benchmark.png").read_bytes().startswith(b"\x89PNG")
    output = capsys.readouterr().out
    assert "wrong output" in output and str(data) in output
    assert max(map(len, output.split("\nwritten")[0].splitlines())) <= report.WIDTH


def test_interruption_keeps_what_there_is(monkeypatch: pytest.MonkeyPatch, tmp_path: object) -> None:
    def interrupt(input: Tensor) -> Tensor:
        raise KeyboardInterrupt

    monkeypatch.setattr(run, "_cases", lambda *_, **__: iter([case(), case(interrupt)]))
    monkeypatch.setattr(machine, "measure_limits", lambda *arguments: LIMITS)
    assert run.main(["--only", "softmax", "--device", "cpu", "--out", str(tmp_path)]) == 130
    results = json.loads((tmp_path / "benchmark.json").read_text())
    assert results["interrupted"] and len(results["rows"]) == 2


def test_peers_that_cannot_run_say_why() -> None:
    peers = {"eager": double, "fused": not_there, "fused: other": wrong_shape, "compile": "too slow"}
    row = rows_of(case(peers=peers | {"fused: third": lambda input: 3 * input}))[0]
    assert row.peers["fused"] == "NotImplementedError: no kernel for this device"
    assert "shapes" in row.peers["fused: other"]
    assert row.peers["fused: third"] == "computes something else: output"
    assert row.peers["compile"] == "too slow"
    assert list(row.speedups()) == ["eager"]
    table = report.format_table(results_of([row]))
    assert "[1]: NotImplementedError: no kernel for this device" in table and "[2]: too slow" in table


def test_compiled_peer() -> None:
    assert rows_of(case(compiled="eager"))[0].peers["compile"] == "not asked for (--no-compile)"
    late = Pace(suite_seconds=1.0, started=time.monotonic() - 0.6)
    assert "no time left" in late.why_not_compile()
    assert Pace(suite_seconds=1e6).why_not_compile() == ""


def test_medians_and_quartiles_on_a_fake_clock() -> None:
    clock = Clock()
    calls = {"ours": clock.takes(9.0, 1.0, 2.0, 3.0, 4.0, 5.0), "eager": clock.takes(6.0)}  # 9.0 is the warm-up
    pace = Pace(row_seconds=0.0, min_rounds=5)
    timings = harness.measure(calls, harness.CpuTimer(clock), pace, random.Random(0))
    assert timings == {"ours": Timing(3.0, 2.0, 4.0, 5), "eager": Timing(6.0, 6.0, 6.0, 5)}
    assert timings["ours"].spread == pytest.approx(1 / 3)
    row = harness.Row("o", "s", "fp32", FORWARD, "cpu", ours=timings.pop("ours"), peers=timings, limit_seconds=1.5)
    assert row.speedups() == {"eager": 2.0}
    assert row.limit_share() == 0.5


def test_rounds_end_with_the_budget_and_are_in_random_order() -> None:
    clock, order = Clock(), []

    def call(name: str, seconds: float) -> None:
        order.append(name)
        clock.now += seconds

    calls = {name: partial(call, name, 1.0) for name in "abc"}
    timings = harness.measure(calls, harness.CpuTimer(clock), Pace(row_seconds=30.0), random.Random(0))
    assert all(timing.samples == 10 for timing in timings.values())
    rounds = ["".join(order[i : i + 3]) for i in range(0, len(order), 3)]
    assert len(set(rounds)) > 1 and all(sorted(r) == ["a", "b", "c"] for r in rounds)


def test_limits_bind() -> None:
    assert LIMITS.bound(Work(bytes=100, flops=0), torch.float32) == ("copy", 100 / 1e11)
    assert LIMITS.bound(Work(bytes=2000, flops=0), torch.float32) == ("copy", 2000 / 1e11)
    assert LIMITS.bound(Work(bytes=10**9, flops=0), torch.float32) == ("copy", 0.1)
    assert LIMITS.bound(Work(bytes=10**9, flops=0, reads=True), torch.float32) == ("read", 0.05)
    assert LIMITS.bound(Work(bytes=1000, flops=2 * 10**11), torch.bfloat16) == ("product", 1.0)
    assert LIMITS.bound(Work(bytes=1000, flops=0), torch.float32, 0.5) == ("resident", 0.5)


def test_resident_seconds_are_those_of_the_rows_alone() -> None:
    """A call that takes 0.5 ms, and 0.01 ms a row."""

    def call(input: Tensor) -> Tensor:
        end = time.perf_counter() + 5e-4 + 1e-5 * len(input)
        while time.perf_counter() < end:
            pass
        return input

    few = case(call, rows=1000, few=lambda rows: {"input": torch.zeros(rows, 5)})
    expected = 1e-5 * 1000 / torch.get_num_threads()
    assert harness.resident_seconds(few) == pytest.approx(expected, rel=0.2)
    assert harness.resident_seconds(case(call)) == 0


def test_scaling_points_and_picture(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(scaling, "LENGTHS", (8, 16))
    monkeypatch.setattr(scaling, "WIDTHS", (64,))
    threads = torch.get_num_threads()
    found = [point for count in (1, 2) for point in scaling.points(count, random.Random(0))]
    assert torch.get_num_threads() == threads
    sizes = [(x.operation, x.size, x.threads, x.dtype) for x in found]
    assert len(set(sizes)) == len(sizes) == 2 * 2 * 4
    assert all(0 < seconds < 1 for x in found for seconds in (x.ours, x.torch))
    scaling.write_picture(json.loads(json.dumps(scaling.as_rows(found))), tmp_path / "scaling.png")
    assert (tmp_path / "scaling.png").stat().st_size > 10_000


@pytest.mark.parametrize("device", run.BACKENDS)
@pytest.mark.parametrize("operation", run.OPERATIONS)
def test_every_case_fits_the_table(operation: str, device: str) -> None:
    timing = Timing(123.4567, 100.0, 150.0, 3)
    with FakeTensorMode():  # a device that may not be there
        cases = list(run._cases(operation, torch.device(device), list(run.DTYPES.values()), more=device == "cpu"))
    rows = [
        harness.Row(
            the_case.operation,
            the_case.shape,
            harness.short_name(the_case.dtype),
            mode,
            run.BACKENDS[device],
            ours=timing,
            error_share=0.99,
            peers=dict.fromkeys(("eager", "fused", "compile"), timing),
            limit="product",
            limit_seconds=work.bytes / 1e12,
        )
        for the_case in cases
        for mode, work in the_case.work.items()
    ]
    assert {row.dtype for row in rows} == {"fp32", "bf16"} and {row.mode for row in rows} == {FORWARD, TRAINING}
    table = report.format_table(results_of(rows))
    assert max(map(len, table.splitlines())) <= report.WIDTH
    assert all(f" {row.shape} " in table for row in rows)


def test_json_holds_what_the_table_shows() -> None:
    results = results_of(rows_of(case(peers={"eager": double, "fused": double})), END_TO_END)
    row = results["rows"][0]
    line = report.format_table(results).splitlines()[3]
    for text in (
        f"{row['ours']['median'] * 1e3:.3f}",
        f"{row['speedups']['eager']:.2f}x",
        f"{row['speedups']['fused']:.2f}x",
        f"{row['limit_share']:.0%} {row['limit']}",
    ):
        assert text in line
    summary = report.format_end_to_end(results["end_to_end"])
    assert "1.50x" in summary and "2 MiB" in summary and "7.0001" in summary
    assert max(map(len, summary.splitlines())) <= report.WIDTH


def test_generation_is_checked_and_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = {"vocab_size": 50, "context_length": 32, "num_layers": 2, "num_heads": 2, "d_model": 16}
    for name, value in {"SIZES": sizes, "PROMPT": 7, "NEW_TOKENS": 5, "BATCHES": (2,)}.items():
        monkeypatch.setattr(bench_generation, name, value)
    limits = Limits({1024: 1e9}, {1024: 1e9}, dict.fromkeys(bench_generation.DTYPES, 1e9))
    arguments = (torch.device("cpu"), harness.CpuTimer(), limits, Pace(row_seconds=0.0, min_rounds=1), random.Random(0))
    rows = list(bench_generation.rows(*arguments))
    assert [(row.shape, row.dtype, row.problem) for row in rows] == [("2x7+5", "bf16", ""), ("2x7+5", "fp32", "")]
    assert all(row.speedups().keys() == {"eager"} and row.error_share < 1 for row in rows)

    plain = bench_generation.PlainGPT(*sizes.values())
    prompt = torch.randint(50, (2, 7))
    tokens = bench_generation.PlainGenerator(plain, 2).generate(prompt)
    for length in range(7, 12):  # its cache changes nothing
        assert torch.equal(plain(tokens[:, :length])[:, -1].argmax(-1), tokens[:, length])
    monkeypatch.setattr(bench_generation.GPT, "unembed", lambda self, x: 1.1 * x @ self.token_embedding.weight.mT)
    assert all(row.problem and row.ours is None for row in bench_generation.rows(*arguments))


def test_train_step_is_checked_and_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    config = bench_train_step.GPTConfig(50, context_length=16, num_layers=1, num_heads=2, d_model=16)
    monkeypatch.setattr(bench_train_step, "CONFIG", config)
    limits = Limits({1024: 1e9}, {1024: 1e9}, dict.fromkeys(bench_train_step.DTYPES, 1e9))
    pace = Pace(row_seconds=0.0, min_rounds=1, compile=False)
    arguments = (torch.device("cpu"), harness.CpuTimer(), limits, pace, random.Random(0))
    rows = list(bench_train_step.rows(*arguments))
    assert [(row.shape, row.dtype, row.problem) for row in rows] == [("4x16", "bf16", ""), ("4x16", "fp32", "")]
    assert all(row.speedups().keys() == {"eager"} and row.error_share < 1 for row in rows)
    forward = bench_train_step.GPT.forward
    monkeypatch.setattr(bench_train_step.GPT, "forward", lambda *args, **kwargs: 1.1 * forward(*args, **kwargs))
    assert all(row.problem and row.ours is None for row in bench_train_step.rows(*arguments))


def test_end_to_end_runs_agree_and_unequal_ones_get_no_speed() -> None:
    config = bench_gpt.GPTConfig(4096, context_length=16, num_layers=1, num_heads=2, d_model=16)
    steps = bench_gpt.WARMUP_STEPS + 2
    done: list[int] = []
    with bench_gpt.Comparison(torch.device("cpu"), "auto", config) as comparison:
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


def test_best_of_several_fused_kernels_is_shown() -> None:
    assert report.best_peers({"speedups": {"fused": 3.0, "fused: flash": 1.5, "eager": 9.0}}) == {
        "fused": 1.5,
        "eager": 9.0,
    }


BEGIN, END = readme_table.markers("benchmark")


def test_readme_tables(tmp_path: object) -> None:
    data, readme = tmp_path / "benchmark.json", tmp_path / "README.md"
    begin, end = readme_table.markers("hugging face")
    readme.write_text(f"before\n{BEGIN}\nold\n{END}\nbetween\n{begin}\nolder\n{end}\nafter\n")
    report.write_json(results_of(rows_of(case()), END_TO_END), data)
    assert readme_table.main([str(data), str(readme)]) == 0
    text = readme.read_text()
    assert text.startswith(f"before\n{BEGIN}\n") and text.endswith(f"{END}\nbetween\n{begin}\nolder\n{end}\nafter\n")
    assert "old\n" not in text.partition(END)[0] and "| `double` | 3x5 |" in text and "**1.50x**" in text
    assert readme_table.main([str(data), str(readme)]) == 0
    assert readme.read_text() == text

    results = results_of(rows_of(case()))
    (row,) = results["rows"][:1]
    row |= {"operation": readme_table.MODELS, "speedups": {"eager": 2.0}}
    results["rows"] = [
        {**row, "shape": "gpt 2x16", "mode": FORWARD},
        {**row, "shape": "gpt 2x16", "mode": TRAINING, "speedups": {"eager": 3.0, "fused": 1.5}},
        {**row, "shape": "gpt 2x16+4", "mode": FORWARD, "speedups": {"fused": 0.5}},
    ]
    data.write_text(json.dumps(results))
    assert readme_table.main([str(data), str(readme)]) == 0
    before, _, models = readme.read_text().partition(begin)
    assert before == text.partition(begin)[0]
    assert "| gpt | 2.00 / - | 3.00 / 1.50 | - / 0.50 |" in models and "older" not in models


@pytest.mark.parametrize("markers", ["", BEGIN, f"{END}\n{BEGIN}"])
def test_readme_without_markers_is_left_alone(markers: str, tmp_path: object, capsys: pytest.CaptureFixture) -> None:
    data, readme = tmp_path / "benchmark.json", tmp_path / "README.md"
    report.write_json(results_of(rows_of(case())), data)
    readme.write_text(markers)
    assert readme_table.main([str(data), str(readme)]) == 2
    assert readme.read_text() == markers and "README" in capsys.readouterr().err


def test_failed_run_is_not_for_the_readme() -> None:
    with pytest.raises(ValueError, match="failed"):
        readme_table.tables(results_of(rows_of(case(wrong_value))))


@pytest.mark.parametrize("arguments", [["--only", "nonsense"], ["--dtype", "int8"], ["--suite", "slow"]])
def test_bad_arguments(arguments: list[str], capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as exit:
        run.main(arguments)
    assert exit.value.code == 2 and "usage" in capsys.readouterr().err
