"""``fastformer tune``: the rule, measuring on a fake clock, and the command."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from support import needs_library

import fastformer
from fastformer import backends, cli, tuning
from fastformer.benchmarks import tune, tune_trials
from fastformer.benchmarks.case import FORWARD, TRAINING
from fastformer.benchmarks.timing import CpuTimer, interval_rank
from fastformer.benchmarks.tune import Found, Point, least_elements
from fastformer.models import GPT, GPTConfig, checkpoint
from fastformer.tuning import NEVER, Entry, Table

FP32, BF16 = torch.float32, torch.bfloat16
MACHINE = {"device": "cpu", "name": "a processor", "level": "avx2", "threads": 2, "torch": "2.13.0", "fastformer": "1"}
ENTRY = Entry("softmax", FP32, "cpu", (100, NEVER), "1.2x to 3.4x")
TABLE = Table(MACHINE, "2026-01-31", (ENTRY, Entry("rotary", BF16, "cpu", (0, 7), "")))
TINY = {"n_embd": 8, "n_head": 2, "vocab_size": 10, "n_positions": 16}


def points(*quotients: tuple[int, float, float, float]) -> list[Point]:
    return [Point(*quotient) for quotient in quotients]


FAST, SLOW, AS_FAST = (1.1, 1.2, 1.3), (0.5, 0.6, 0.7), (0.98, 1.0, 1.02)
OPEN, NEARLY_AS_FAST = (0.6, 0.95, 1.4), (0.96, 1.0, 1.04)


@pytest.mark.parametrize(
    ("sizes", "least"),
    [
        ({1: SLOW, 2: FAST, 3: FAST}, 2),
        ({1: FAST, 2: FAST}, 1),
        ({1: FAST, 2: SLOW, 3: FAST}, 3),
        ({1: FAST, 2: OPEN, 3: FAST}, 3),
        ({1: SLOW, 2: FAST, 3: AS_FAST}, 2),
        ({1: AS_FAST, 2: FAST}, 2),
        ({1: FAST, 2: SLOW}, NEVER),
        ({1: FAST, 2: SLOW, 3: AS_FAST}, NEVER),
        ({1: FAST, 2: OPEN}, None),
        ({1: FAST, 2: NEARLY_AS_FAST}, None),
        ({1: FAST, 2: SLOW, 3: OPEN}, None),
        ({1: FAST, 2: NEARLY_AS_FAST, 3: FAST}, 3),
        ({1: AS_FAST, 2: AS_FAST}, None),
        ({}, None),
    ],
)
def test_from_which_size_on(sizes: dict[int, tuple[float, float, float]], least: int | None) -> None:
    found = [Point(size, *quotient) for size, quotient in sizes.items()]
    random.Random(0).shuffle(found)
    assert least_elements(found) == least


def test_every_shape_of_a_size_counts() -> None:
    assert least_elements(points((5, *FAST), (5, *SLOW), (9, *FAST))) == 9
    assert least_elements(points((5, *FAST), (5, *AS_FAST), (9, *FAST))) == 9


Triple = tuple[float, float, float]


def found(by_size: dict[tuple[str, str], dict[int, Triple] | tuple[dict[int, Triple], dict[int, Triple]]]) -> Found:
    """From (form, kernel) -> the quotients by size, without and with gradients, or of both, in float32."""
    result = Found()
    for (form, kernel), quotients in by_size.items():
        modes = quotients if isinstance(quotients, tuple) else (quotients, quotients)
        result.points.setdefault((form, FP32), {})[kernel] = {
            mode: points(*((size, *triple) for size, triple in sizes.items()))
            for mode, sizes in zip((FORWARD, TRAINING), modes)
        }
    return result


def around(quotient: float) -> dict[int, Triple]:
    return {8: (0.9 * quotient, quotient, 1.1 * quotient)}


FORMS_ON_GPU = {
    ("layer_norm", "triton"): around(1.5),
    ("rms_norm", "triton"): around(4.0),
    ("layer_norm", "cuda"): around(2.0),
    ("rms_norm", "cuda"): around(2.0),
}


def test_entries_take_the_best_kernel_for_all_forms() -> None:
    others = {("softmax", "cuda"): around(0.5), ("rotary", "cuda"): around(1.0)}  # slower; open
    layer_norm, rms_norm, softmax = tune.entries(found(FORMS_ON_GPU | others), [], {})
    assert layer_norm == Entry("layer_norm", FP32, "triton", (8, 8), "1.5x to 1.5x")
    assert rms_norm.kernel == "triton" and rms_norm.speedup == "4.0x to 4.0x"
    assert softmax == Entry("softmax", FP32, "cuda", (NEVER, NEVER), "")


@pytest.mark.parametrize("recorded", ["measured by us", "tuned before"])
def test_what_noise_leaves_open_stays_as_it_was(recorded: str) -> None:
    least = (5, 6)
    if recorded == "tuned before":  # which stands before the evidence
        evidence = {("softmax", FP32): backends.Measurement("softmax", (), (FP32,), "2x", (1, 2))}
        old = [ENTRY._replace(least=least)]
    else:
        evidence, old = {("softmax", FP32): backends.Measurement("softmax", (), (FP32,), "2x", least)}, []

    def told(forward: dict, training: dict, kernel: str = "cpu") -> list[Entry]:
        return tune.entries(found({("softmax", kernel): (forward, training)}), old, evidence)

    assert told({8: FAST}, {8: OPEN}) == [Entry("softmax", FP32, "cpu", (8, 6), "1.2x to 1.2x")]
    assert told({8: OPEN}, {8: SLOW})[0].least == (5, NEVER)
    assert told({8: OPEN}, {8: OPEN}) == old
    assert told({8: FAST}, {8: OPEN}, kernel="cuda")[0].least == (8, NEVER)  # what stood was another kernel's
    # never at a size at which it was slower, nor below one
    assert told({1: SLOW, 4: SLOW, 8: OPEN, 9: OPEN}, {9: FAST})[0].least == (5, 9)
    assert told({1: SLOW, 5: SLOW, 8: OPEN, 9: OPEN}, {9: FAST})[0].least == (8, 9)
    assert told({8: OPEN}, {7: SLOW, 8: OPEN}) == [Entry("softmax", FP32, "cpu", (5, 8), "")]


def test_what_was_not_measured_stays() -> None:
    old = [ENTRY, Entry("layer_norm", FP32, "cuda", (3, 4), "9x"), ENTRY._replace(dtype=BF16)]
    only_rms_norm = {key: value for key, value in FORMS_ON_GPU.items() if key[0] == "rms_norm"}
    kept = tune.entries(found(only_rms_norm), old, {})
    # its kernel too, which all forms share, though another one is faster here
    assert kept == [*old, Entry("rms_norm", FP32, "cuda", (8, 8), "2.0x to 2.0x")]
    kept = tune.entries(found(FORMS_ON_GPU), old, {})
    assert kept[:2] == [old[0], old[2]] and {entry.kernel for entry in kept[2:]} == {"triton"}
    assert tune.entries(Found(broken={("softmax", FP32): {}}), old, {}) == old  # where all trials were skipped


def test_a_broken_kernel_is_never_chosen_for_any_form() -> None:
    evidence = {("add_layer_norm", FP32): backends.Measurement("add_layer_norm", (), (FP32,), "2x", kernel="triton")}
    result = found(FORMS_ON_GPU)
    result.broken["layer_norm", FP32] = {"triton": "wrong"}
    never = (NEVER, NEVER)
    assert tune.entries(result, [Entry("add_layer_norm", FP32, "triton", (1, 1), "")], evidence) == [
        Entry("layer_norm", FP32, "cuda", (8, 8), "2.0x to 2.0x"),
        Entry("add_layer_norm", FP32, "cuda", never, ""),
        Entry("rms_norm", FP32, "cuda", (8, 8), "2.0x to 2.0x"),
    ]
    result.broken["layer_norm", FP32] = {"triton": "wrong", "cuda": "wrong"}
    assert tune.entries(result, [], evidence) == [
        Entry(form, FP32, "triton", never, "", broken=True) for form in ("layer_norm", "add_layer_norm", "rms_norm")
    ]


class Clock:
    """Advances by what the running call takes; the backend that was asked for is written down."""

    def __init__(self) -> None:
        self.now, self.seen = 0.0, []

    def takes(self, seconds: Callable[[], float]) -> Callable[[], None]:
        def call() -> None:
            self.seen.append(backends.requested())
            self.now += seconds()

        return call


def measured_at(ours: Callable[[], float], torchs: Callable[[], float]) -> tuple[dict[str, Point], Clock]:
    clock = Clock()
    calls = {"torch": clock.takes(torchs), "reference": clock.takes(ours)}
    return tune.measure(64, calls, CpuTimer(lambda: clock.now), random.Random(0)), clock


def test_measuring_ends_when_it_is_clear_and_runs_each_call_under_its_backend() -> None:
    found, clock = measured_at(lambda: 0.001, lambda: 0.003)
    assert found == {"reference": Point(64, *[pytest.approx(3.0)] * 3)}
    assert clock.seen.count("reference") == 32 + 1 and clock.seen.count("torch") == 32 + 2
    assert measured_at(lambda: 0.3, lambda: 0.9)[1].seen.count("reference") == 8 + 1  # where calls are long
    found, clock = measured_at(lambda: 0.01, lambda: 0.01)  # as fast: until the time is over
    assert found["reference"].median == pytest.approx(1) and clock.seen.count("reference") == 32 + 1
    assert measured_at(lambda: 1e-5, lambda: 1e-5)[1].seen.count("reference") == 256 + 1
    found, _ = measured_at(lambda: 1.0, lambda: 2 * tune.LONGEST)
    assert found == {}


@pytest.mark.parametrize("seconds", [1e-5, 5e-3])  # calls so short that all looks are taken, and longer ones
def test_noise_is_seldom_faster_and_a_faster_kernel_is_mostly_found(seconds: float) -> None:
    """5% noise, of which a tie has to be called faster, or slower, in at most 5% of cases, whatever the looks."""
    rng = random.Random(0)

    def noisy(base: float) -> Callable[[], float]:
        return lambda: base * rng.lognormvariate(0, 0.05)

    def simulated(ours: float, count: int) -> list[Point]:
        return [measured_at(noisy(ours), noisy(seconds))[0]["reference"] for _ in range(count)]

    ties = simulated(seconds, 400)
    assert sum(point.low > 1 or point.high < 1 for point in ties) <= 20
    assert sum(point.low > 1 for point in simulated(seconds / 1.1, 100)) >= 95


def test_every_look_can_tell_which_is_faster() -> None:
    assert all(interval_rank(rounds, tune.CONFIDENCE) >= 1 for rounds in tune.LOOKS)


def test_a_machine_that_drifts_and_stumbles_changes_nothing() -> None:
    for seed in range(20):
        rng, clock = random.Random(seed), Clock()

        def seconds(base: float, rng: random.Random = rng, clock: Clock = clock) -> Callable[[], float]:
            return lambda: base * (1 + 3 * clock.now) * rng.lognormvariate(0, 0.1) * rng.choice([1] * 9 + [8])

        calls = {"torch": clock.takes(seconds(0.0012)), "reference": clock.takes(seconds(0.001))}
        point = tune.measure(64, calls, CpuTimer(lambda clock=clock: clock.now), rng)["reference"]
        assert point.low > 1 and 1.05 < point.median < 1.5


def trial(ours: Callable[..., torch.Tensor], *, rows: int = 2, trained: bool = True) -> tune_trials.Trial:
    torchs = partial(torch.softmax, dim=-1)
    return tune_trials.Trial("softmax", 3 * rows, {"input": (rows, 3)}, ours, torchs, trained)


def fails(input: torch.Tensor) -> torch.Tensor:
    raise NotImplementedError("no kernel")


def inexact(input: torch.Tensor) -> torch.Tensor:
    """Wrong by less than what a difference of rounding would be in bfloat16."""
    return torch.softmax(input, -1) * (1 + 1e-4)


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize(
    ("ours", "said"),
    [
        (lambda input: input.exp(), "wrong output: "),
        (inexact, "wrong output: "),
        (fails, "NotImplementedError: no kernel"),
    ],
)
def test_a_kernel_with_a_wrong_answer_has_no_time(ours: Callable, said: str, trained: bool) -> None:
    arguments = (FP32, ["reference"], torch.device("cpu"), random.Random(0))
    points, problems = tune.measure_trial(trial(ours, trained=trained), *arguments)
    assert points == {} and list(problems) == ["reference"] and problems["reference"].startswith(said)


def test_a_wrong_gradient_counts() -> None:
    def ours(input: torch.Tensor) -> torch.Tensor:
        return torch.softmax(input, -1) + 0.01 * (input - input.detach())

    arguments = (FP32, ["reference"], torch.device("cpu"), random.Random(0))
    assert "wrong gradient of input" in tune.measure_trial(trial(ours), *arguments)[1]["reference"]
    points, problems = tune.measure_trial(trial(ours, trained=False), *arguments)
    assert problems == {} and list(points) == [FORWARD] and points[FORWARD]["reference"].elements == 6


@pytest.mark.parametrize("kind", ["cpu", "cuda"])
@pytest.mark.parametrize("operation", tune_trials.OPERATIONS)
def test_trials_are_what_they_say(operation: str, kind: str) -> None:
    """They run, ours gives torch's answer, and ``choose`` is asked for that form with so many elements."""
    widths = tune_trials.Widths(
        32, 4, 2, 8, 48, 11, 16, ("layer_norm", "add_layer_norm", "rms_norm"), "silu", True, True
    )
    sizes = tune_trials.Sizes((1, 3), (2, 5), (1, 3, 40))
    seen: list[tuple[str, int]] = []
    found = list(tune_trials.OPERATIONS[operation](widths, sizes, "cpu"))
    assert found and list(tune_trials.trials(operation, widths, kind))
    with pytest.MonkeyPatch.context() as patch:
        choose = backends.choose
        patch.setattr(backends, "FASTER", {("feed_forward_few_rows", FP32): ENTRY})
        patch.setattr(
            backends, "choose", lambda name, x, **how: seen.append((name, x.numel())) or choose(name, x, **how)
        )
        for each in found:
            inputs = each.inputs(torch.device("cpu"), FP32)
            with fastformer.backend("torch"):
                expected = each.torchs(**inputs)
                seen.clear()
                ours = each.ours(**inputs)
            assert set(seen) == {(each.operation, each.elements)}
            torch.testing.assert_close(ours, expected)


def test_widths_of_models(tmp_path: Path) -> None:
    gpt2 = tune_trials.widths_of("gpt2")
    assert gpt2[:7] == (768, 12, 12, 64, 3072, 50257, 1024) and gpt2.activation == "gelu_tanh" and not gpt2.gated
    llama = tune_trials.widths_of("llama")
    assert (llama.kv_heads, llama.norms, llama.gated, llama.rotary) == (8, ("rms_norm",), True, True)
    file = tmp_path / "config.json"
    file.write_text(json.dumps(TINY))
    assert tune_trials.widths_of(str(tmp_path))[:7] == (8, 2, 2, 4, 32, 10, 16)
    theirs = {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32, "vocab_size": 9}
    file.write_text(json.dumps(theirs | {"intermediate_size": 100, "rms_norm_eps": 1e-6, "hidden_act": "silu"}))
    found = tune_trials.widths_of(str(tmp_path))
    assert found[:7] == (64, 4, 2, 32, 100, 9, 1024) and found.activation == "silu" and found.norms == ("rms_norm",)
    for text, said in (("{}", "lacks hidden_size or n_embd"), ("[]", "not the configuration"), ("{", "not the config")):
        file.write_text(text)
        with pytest.raises(ValueError, match=said):
            tune_trials.widths_of(str(tmp_path))
    file.unlink()
    config = GPTConfig(11, context_length=12, num_layers=1, num_heads=2, d_model=8, activation="geglu")
    checkpoint.save(tmp_path / "model.safetensors", checkpoint.Checkpoint(config, GPT(config).state_dict(), {}, {}))
    found = tune_trials.widths_of(str(tmp_path))
    assert found[:7] == (8, 2, 2, 4, 32, 11, 12) and (found.activation, found.gated) == ("gelu", True)
    with pytest.raises(FileNotFoundError, match="must be one of gpt2, bert, llama or a folder"):
        tune_trials.widths_of(str(tmp_path / "nowhere"))


def test_kernels_to_measure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "TRITON", True)
    monkeypatch.setattr(backends, "CUDA_DEVICES", {"cuda"})
    assert tune.kernels_on("cuda", "softmax", FP32) == ["triton", "cuda"]
    assert tune.kernels_on("cuda", "attention", FP32) == ["triton"]
    assert tune.kernels_on("cuda", "linear", FP32) == []
    monkeypatch.setattr(backends, "CPU_LIBRARY", False)
    assert tune.kernels_on("cpu", "softmax", FP32) == []


def python(code: str, *arguments: str, file: Path) -> subprocess.CompletedProcess:
    """A program of its own, for which FASTFORMER_TUNING is this file."""
    environment = {**os.environ, "FASTFORMER_TUNING": str(file), "TRITON_INTERPRET": "0"}
    program = [sys.executable, "-c", code, *arguments]
    return subprocess.run(program, capture_output=True, text=True, env=environment, timeout=120)


@needs_library
def test_the_command_keeps_a_table_that_the_next_program_uses(tmp_path: Path) -> None:
    file = tmp_path / "tuning.json"
    (tmp_path / "config.json").write_text(json.dumps(TINY))
    other = Table(MACHINE, "2025-01-01", (ENTRY,))
    tuning.write(file, [other])
    arguments = ("tune", "--model", str(tmp_path), "--op", "rotary,softmax", "--dtype", "float32")
    done = python("import sys; from fastformer.cli import main; sys.exit(main(sys.argv[1:]))", *arguments, file=file)
    assert done.returncode == 0, done.stderr
    kept, new = tuning.read(file)
    assert kept == other and new.machine["level"] == backends.CPU_LEVEL
    assert {entry.operation for entry in new.entries} <= {"softmax"}  # a GPT-2 has no rotary positions
    assert "100%" in done.stderr and str(file) in done.stdout and "in use here" in done.stdout

    tuning.write(file, [other, new._replace(made="2026-05-05", entries=(ENTRY._replace(least=(77, 88)),))])
    code = (
        "import torch, fastformer, fastformer.functional as F; print(fastformer.explain(F.softmax, torch.ones(80), -1))"
    )
    used = python(code, file=file)
    assert used.stdout == (
        "softmax: cpu (tuned on this machine 2026-05-05: ours is faster from 77 elements on, 88 with gradients)\n"
    )
    tuning.write(file, [Table(new.machine | {"threads": 7}, "2026-05-05", (ENTRY,))])
    with_threads = python(code.replace("print", "torch.set_num_threads(7); print"), file=file)
    assert with_threads.stdout.startswith("softmax: torch (tuned on this machine 2026-05-05: ours is faster from 100 ")
    file.write_text("damaged")
    damaged = python(code, file=file)
    assert damaged.returncode == 0 and damaged.stdout.startswith("softmax: torch (") and "tuned" not in damaged.stdout
    assert f"UserWarning: {file} holds no tables" in damaged.stderr


def test_show_and_reset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "tuning.json"
    monkeypatch.setenv("FASTFORMER_TUNING", str(file))
    assert cli.main(["tune", "--show"]) == 0
    assert capsys.readouterr().out == f"{file}: no tables yet\n"
    here = Table(tuning.here(backends.CPU_LEVEL)[0], "2026-02-02", (ENTRY._replace(least=(5, 6), broken=True),))
    tuning.write(file, [TABLE, here])
    assert cli.main(["tune", "--show"]) == 0
    first, second = capsys.readouterr().out.split("\n\n")[1:]
    assert "tuned 2026-02-02, in use here" in first and "not this machine" in second
    assert second.splitlines()[3].split() == ["softmax", "fp32", "cpu", "100", "never", "1.2x", "to", "3.4x"]
    assert first.endswith("a wrong answer, or it can't run")
    assert cli.main(["tune", "--reset"]) == 0 and not file.exists()
    assert cli.main(["tune", "--reset"]) == 0


class Tuned(NamedTuple):
    """What ``fastformer tune`` did."""

    status: int
    errors: str
    entries: tuple[Entry, ...]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Tuned]:
    """Tunes softmax in float32 by these trials."""

    def tuned(*trials: tune_trials.Trial) -> Tuned:
        file = tmp_path / "tuning.json"
        monkeypatch.setenv("FASTFORMER_TUNING", str(file))
        monkeypatch.setattr(tune, "trials", lambda *arguments: iter(trials))
        monkeypatch.setattr(tune, "kernels_on", lambda *arguments: ["cpu"])
        monkeypatch.setattr(tune, "STANDARD", tune.STANDARD[:1])
        status = cli.main(["tune", "--op", "softmax", "--dtype", "float32", "--device", "cpu"])
        machine = tuning.here(backends.CPU_LEVEL)[0]
        return Tuned(status, capsys.readouterr().err, tuning.find(tuning.read(file), machine).entries)

    return tuned


def test_a_wrong_answer_at_one_size_is_told_by_the_status_and_the_table(run: Callable[..., Tuned]) -> None:
    def wrong_if_small(input: torch.Tensor) -> torch.Tensor:
        right = torch.softmax(input, -1)
        return right if len(input) > 2 else 1.01 * right

    status, errors, entries = run(trial(wrong_if_small, rows=4), trial(wrong_if_small), trial(wrong_if_small, rows=8))
    assert status == 1
    (line,) = (line for line in errors.splitlines() if line.startswith("never chosen: "))
    assert line.startswith("never chosen: cpu, softmax input 2x3 fp32: wrong output: ")
    assert entries == (Entry("softmax", FP32, "cpu", (NEVER, NEVER), "", broken=True),)


def test_a_trial_that_cannot_be_run_is_told_and_the_others_go_on(run: Callable[..., Tuned]) -> None:
    def exhausted(input: torch.Tensor, dim: int) -> torch.Tensor:
        raise torch.OutOfMemoryError("8 EiB")

    right = partial(torch.softmax, dim=-1)

    def slow(input: torch.Tensor) -> torch.Tensor:
        for _ in range(30):
            right(input)
        return right(input)

    status, errors, entries = run(trial(right)._replace(torchs=partial(exhausted, dim=-1)), trial(slow, rows=8))
    assert status == 0 and "not measured: softmax input 2x3 fp32: OutOfMemoryError: 8 EiB\n" in errors
    assert entries == (Entry("softmax", FP32, "cpu", (NEVER, NEVER), ""),)


def test_what_another_process_wrote_meanwhile_stays(run: Callable[..., Tuned], tmp_path: Path) -> None:
    machine, rotary = tuning.here(backends.CPU_LEVEL)[0], ENTRY._replace(operation="rotary")
    meanwhile = [TABLE, Table(machine, "2026-01-31", (rotary,))]

    def writes(input: torch.Tensor) -> torch.Tensor:
        tuning.write(tmp_path / "tuning.json", meanwhile)
        return input

    assert run(trial(writes)).entries == (rotary, Entry("softmax", FP32, "cpu", (NEVER, NEVER), "", broken=True))
    assert TABLE in tuning.read(tmp_path / "tuning.json")


def test_an_interruption_keeps_the_old_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(*arguments: object) -> None:
        raise KeyboardInterrupt

    file = tmp_path / "tuning.json"
    tuning.write(file, [TABLE])
    monkeypatch.setenv("FASTFORMER_TUNING", str(file))
    monkeypatch.setattr(tune, "measure_trial", interrupt)
    monkeypatch.setattr(tune, "kernels_on", lambda *arguments: ["cpu"])
    assert cli.main(["tune", "--device", "cpu"]) == 130 and "interrupted" in capsys.readouterr().err
    assert tuning.read(file) == [TABLE]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--op", "softmax,nonsense"], "--op is 'nonsense', must be of softmax, layer_norm"),
        (["--dtype", "int8"], "--dtype is 'int8', must be of float32"),
        (["--model", "nowhere"], "--model is nowhere, must be one of gpt2"),
        (["--device", "meta"], "--device is meta, must be cpu or cuda"),
    ],
)
def test_bad_arguments(
    arguments: list[str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FASTFORMER_TUNING", str(tmp_path / "tuning.json"))
    assert cli.main(["tune", *arguments]) == 2
    assert said in capsys.readouterr().err
    monkeypatch.setenv("FASTFORMER_TUNING", "off")
    assert cli.main(["tune"]) == 2
    assert "FASTFORMER_TUNING is off" in capsys.readouterr().err
