"""``fastformer tune``: the rule on a fake clock, the kept table, and what ``auto`` makes of it."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from support import needs_library

import fastformer
import fastformer.functional as F
from fastformer import backends, cli, tuning
from fastformer.benchmarks import tune, tune_trials
from fastformer.benchmarks.case import FORWARD, TRAINING
from fastformer.benchmarks.timing import CpuTimer
from fastformer.benchmarks.tune import Point, least_elements
from fastformer.models import GPT, GPTConfig, checkpoint
from fastformer.tuning import NEVER, Entry, Table

FP32, BF16 = torch.float32, torch.bfloat16
MACHINE = {"device": "cpu", "name": "a processor", "level": "avx2", "threads": 2, "torch": "2.13.0", "fastformer": "1"}
ENTRY = Entry("softmax", FP32, "cpu", (100, NEVER), "1.2x to 3.4x")
TABLE = Table(MACHINE, "2026-01-31", (ENTRY, Entry("rotary", BF16, "cpu", (0, 7), "")))
TINY = {"n_embd": 8, "n_head": 2, "vocab_size": 10, "n_positions": 16}


def points(*quotients: tuple[int, float, float, float]) -> list[Point]:
    return [Point(*quotient) for quotient in quotients]


FAST, SLOW, AS_FAST, OPEN = (1.1, 1.2, 1.3), (0.5, 0.6, 0.7), (0.98, 1.0, 1.02), (0.6, 0.95, 1.4)


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


def test_entries_take_the_best_kernel_for_all_forms() -> None:
    def of(quotient: float) -> tune.Points:
        found = points((8, 0.9 * quotient, quotient, 1.1 * quotient))
        return {FORWARD: found, TRAINING: found}

    measured = {
        ("layer_norm", FP32, "triton"): of(1.5),
        ("rms_norm", FP32, "triton"): of(4.0),
        ("layer_norm", FP32, "cuda"): of(2.0),
        ("rms_norm", FP32, "cuda"): of(2.0),
        ("softmax", FP32, "cuda"): of(0.5),
        ("rotary", FP32, "cuda"): of(1.0),  # open: within 10% of torch's
    }
    layer_norm, rms_norm, softmax = tune.entries(measured, {})
    assert layer_norm == Entry("layer_norm", FP32, "triton", (8, 8), "1.5x to 1.5x")
    assert rms_norm.kernel == "triton" and rms_norm.speedup == "4.0x to 4.0x"
    assert softmax == Entry("softmax", FP32, "cuda", (NEVER, NEVER), "")


def test_what_noise_leaves_open_stays_as_it_was() -> None:
    def of(forward: tuple, training: tuple) -> dict:
        return {("softmax", FP32, "cpu"): {FORWARD: points((8, *forward)), TRAINING: points((8, *training))}}

    known = {("softmax", FP32): backends.Measurement("softmax", (), (FP32,), "2x", (5, 6))}
    assert tune.entries(of(FAST, OPEN), known)[0] == Entry("softmax", FP32, "cpu", (8, 6), "1.2x to 1.2x")
    assert tune.entries(of(OPEN, SLOW), known)[0].least == (5, NEVER)
    assert tune.entries(of(FAST, OPEN), {})[0].least == (8, NEVER)
    assert tune.entries(of(OPEN, OPEN), known) == []


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
    assert clock.seen.count("reference") == 21 + 1 and clock.seen.count("torch") == 21 + 2
    assert measured_at(lambda: 0.3, lambda: 0.9)[1].seen.count("reference") == 7 + 1  # where calls are long
    found, clock = measured_at(lambda: 0.01, lambda: 0.01)  # as fast: until the time is over
    assert found["reference"].median == pytest.approx(1) and clock.now == pytest.approx(tune.CALL_SECONDS, rel=0.5)
    found, _ = measured_at(lambda: 1.0, lambda: 2 * tune.LONGEST)
    assert found == {}


def test_a_machine_that_drifts_and_stumbles_changes_nothing() -> None:
    for seed in range(20):
        rng, clock = random.Random(seed), Clock()

        def seconds(base: float, rng: random.Random = rng, clock: Clock = clock) -> Callable[[], float]:
            return lambda: base * (1 + 3 * clock.now) * rng.lognormvariate(0, 0.1) * rng.choice([1] * 9 + [8])

        calls = {"torch": clock.takes(seconds(0.0012)), "reference": clock.takes(seconds(0.001))}
        point = tune.measure(64, calls, CpuTimer(lambda clock=clock: clock.now), rng)["reference"]
        assert point.low > 1 and 1.05 < point.median < 1.5


def trial(ours: Callable[..., torch.Tensor]) -> tune_trials.Trial:
    return tune_trials.Trial("softmax", 6, {"input": (2, 3)}, ours, lambda input: torch.softmax(input, -1))


@pytest.mark.parametrize("mode", [FORWARD, TRAINING])
def test_a_kernel_with_a_wrong_answer_is_never_faster(mode: str) -> None:
    def fails(input: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError("no kernel")

    for ours, said in ((lambda input: input.exp(), "the answer is wrong"), (fails, "NotImplementedError: no kernel")):
        problems: list[str] = []
        arguments = (mode, ["reference"], torch.device("cpu"), FP32, random.Random(0), problems)
        assert tune.measure_trial(trial(ours), *arguments) == {"reference": Point(6, 0.0, 0.0, 0.0)}
        assert len(problems) == 1 and said in problems[0]


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
            inputs = each.inputs(torch.device("cpu"), FP32, record=each.trained)
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


def test_the_file_gives_back_what_was_written(tmp_path: Path) -> None:
    file = tmp_path / "folder" / "tuning.json"
    assert tuning.read(file) == []
    other = Table(MACHINE | {"threads": 4}, "2026-02-01", ())
    tuning.write(file, [TABLE, other])
    assert tuning.read(file) == [TABLE, other] and list(file.parent.iterdir()) == [file]
    assert tuning.find([TABLE, other], dict(MACHINE)) == TABLE
    for name, value in MACHINE.items():
        assert tuning.find([TABLE], MACHINE | {name: f"{value}1"}) is None


def test_a_new_table_replaces_what_it_measured_again() -> None:
    new = Table(MACHINE, "2026-03-01", (ENTRY._replace(least=(5, 5)),))
    other = Table(MACHINE | {"threads": 4}, "2026-02-01", (ENTRY,))
    assert tuning.merged([TABLE, other], new) == [other, Table(MACHINE, "2026-03-01", (TABLE.entries[1], *new.entries))]
    assert tuning.merged([], new) == [new]


DAMAGED = {
    "no JSON": "{",
    "another format": '{"format": 2, "tables": []}',
    "no tables": '{"format": 1}',
    "a list": "[]",
    "no machine": '{"format": 1, "tables": [{"made": "", "entries": []}]}',
    **{
        f"{name} {value!r}": json.dumps(
            {"format": 1, "tables": [{"machine": {}, "made": "", "entries": [ENTRY.to_json() | {name: value}]}]}
        )
        for name, value in (
            ("dtype", "int8"),
            ("kernel", "torch"),
            ("least", [1]),
            ("least", ["1", 2]),
            ("operation", 1),
        )
    },
}


@pytest.mark.parametrize("text", DAMAGED.values(), ids=DAMAGED)
def test_a_damaged_file_is_a_warning_that_names_it(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "tuning.json"
    file.write_text(text)
    monkeypatch.setenv("FASTFORMER_TUNING", str(file))
    with pytest.raises(ValueError, match=r"tuning.json holds no tables of fastformer tune: .+"):
        tuning.read(file)
    with pytest.warns(UserWarning, match=r"tuning.json .*ignored; `fastformer tune --reset` deletes it"):
        assert tuning.read_or_warn() == []


def test_where_the_file_is(monkeypatch: pytest.MonkeyPatch) -> None:
    assert tuning.path() is None and backends.TUNED is None  # for all tests
    monkeypatch.setenv("FASTFORMER_TUNING", "/some/file")
    assert tuning.path() == Path("/some/file")
    monkeypatch.delenv("FASTFORMER_TUNING")
    monkeypatch.setenv("XDG_CACHE_HOME", "/cache")
    assert tuning.path() == Path("/cache/fastformer/tuning.json")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/home/me")
    assert tuning.path() == Path("/home/me/.cache/fastformer/tuning.json")


@pytest.fixture
def tuned(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Makes ``auto`` go by these entries, as tuned on this machine's processor and GPU."""

    def use(*entries: Entry) -> None:
        found = backends._tuned(Table(MACHINE, "2026-01-31", entries))
        for name in ("FASTER", "FASTER_ON_GPU"):
            monkeypatch.setattr(backends, name, found)
        monkeypatch.setattr(backends, "_SMALL", {key: min(row.least) for key, row in found.items()})
        monkeypatch.setattr(backends, "_decided", {})

    return use


@needs_library
def test_auto_goes_by_the_table_and_explain_names_it(tuned: Callable[..., None]) -> None:
    tuned(ENTRY, Entry("rotary", FP32, "cpu", (NEVER, NEVER), ""), Entry("rms_norm", FP32, "cpu", (NEVER, 4), "2x"))
    small, large = torch.ones(3, 33), torch.ones(4, 25)
    said = "tuned on this machine 2026-01-31: ours is faster from 100 elements on, never with gradients"
    assert fastformer.explain(F.softmax, small, -1) == f"softmax: torch ({said})"
    assert fastformer.explain(F.softmax, large, -1) == f"softmax: cpu ({said})"
    assert fastformer.explain(F.softmax, large.requires_grad_(), -1) == f"softmax: torch ({said})"
    assert backends.is_small("softmax", small) and not backends.is_small("softmax", large)
    assert fastformer.explain(F.softmax, large.bfloat16(), -1).startswith("softmax: torch (no measurement")
    heads = torch.ones(1, 2, 3, 4)
    assert "ours is never faster" in fastformer.explain(F.rotary, heads, heads, torch.ones(3, 2), torch.ones(3, 2))
    assert fastformer.explain(F.rms_norm, small, (33,)).startswith("rms_norm: torch (tuned")
    said = "ours is faster with gradients alone, from 4 elements on"
    assert said in fastformer.explain(F.rms_norm, torch.ones(2, 2, requires_grad=True), (2,))


@needs_library
@pytest.mark.parametrize(("least", "ours"), [((10**6, NEVER), True), ((NEVER, NEVER), False)])
def test_compiled_code_takes_ours_unless_it_never_is_faster(
    least: tuple[int, int], ours: bool, tuned: Callable[..., None]
) -> None:
    tuned(ENTRY._replace(least=least))
    called: list[str] = []

    def look(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> torch.fx.GraphModule:
        called.extend(str(node.target) for node in graph.graph.nodes)
        return graph

    torch._dynamo.reset()
    torch.compile(lambda x: F.softmax(x, -1), backend=look, fullgraph=True)(torch.ones(2, 3))
    assert any("fastformer" in name for name in called) is ours


def test_a_gpus_table_gives_the_kernel(tuned: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "TRITON", True)
    monkeypatch.setattr(backends, "CUDA_DEVICES", {"cuda"})
    tuned(Entry("softmax", FP32, "cuda", (100, 200), "2x"), Entry("rotary", FP32, "triton", (0, 0), "3x"))
    on_gpu = types.SimpleNamespace(dtype=FP32, is_cpu=False, device=torch.device("cuda"))
    for elements, record, kernel in (
        (99, False, "torch"),
        (100, False, "cuda"),
        (100, True, "torch"),
        (200, True, "cuda"),
    ):
        on_gpu.numel = lambda elements=elements: elements
        assert backends.choose("softmax", on_gpu, record=record) == kernel
    assert backends.decide("rotary", "cuda", FP32, "auto").kernel == "triton"
    assert backends.decide("layer_norm", "cuda", FP32, "auto").kernel == "torch"
    assert backends.decide("rotary", "mps", FP32, "auto").kernel == "torch"
    assert backends.preferred("softmax", torch.empty(2, 3, device="meta")) == "cuda"
    monkeypatch.setattr(backends, "TRITON", False)
    assert backends.decide("rotary", "cuda", FP32, "auto") == ("torch", "Triton is not installed")


def test_gpus_of_one_kind_have_a_table(monkeypatch: pytest.MonkeyPatch) -> None:
    names = ["H200", "H200"]
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(names))
    monkeypatch.setattr(torch.cuda, "get_device_name", names.__getitem__)
    machine = tuning.gpu()
    assert machine["name"] == "H200" and machine["device"] == "cuda" and machine["torch"] == torch.__version__
    names[1] = "A100"
    assert tuning.gpu() is None


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
    file.write_text("damaged")
    damaged = python(code, file=file)
    assert damaged.returncode == 0 and damaged.stdout.startswith("softmax: torch (") and "tuned" not in damaged.stdout
    assert f"UserWarning: {file} holds no tables" in damaged.stderr


def test_env_names_the_table(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def said() -> str:
        assert cli.main(["env"]) == 0
        return next(line for line in capsys.readouterr().out.splitlines() if line.startswith("tuning "))

    assert "no table is used (FASTFORMER_TUNING=off)" in said()
    monkeypatch.setenv("FASTFORMER_TUNING", "/some/file")
    assert "no table of this machine and these versions in /some/file: `fastformer tune` measures one" in said()
    monkeypatch.setattr(backends, "TUNED", TABLE)
    assert "/some/file, of 2026-01-31, 2 entries" in said()


def test_show_and_reset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "tuning.json"
    monkeypatch.setenv("FASTFORMER_TUNING", str(file))
    assert cli.main(["tune", "--show"]) == 0
    assert capsys.readouterr().out == f"{file}: no tables yet\n"
    here = Table(tuning.cpu(backends.CPU_LEVEL), "2026-02-02", (ENTRY._replace(least=(5, 6)),))
    tuning.write(file, [TABLE, here])
    assert cli.main(["tune", "--show"]) == 0
    first, second = capsys.readouterr().out.split("\n\n")[1:]
    assert "tuned 2026-02-02, in use here" in first and "not this machine" in second
    assert second.splitlines()[3].split() == ["softmax", "float32", "cpu", "100", "never", "1.2x", "to", "3.4x"]
    assert cli.main(["tune", "--reset"]) == 0 and not file.exists()
    assert cli.main(["tune", "--reset"]) == 0


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
    assert cli.main(["tune"]) == 130 and "interrupted" in capsys.readouterr().err
    assert tuning.read(file) == [TABLE]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--op", "softmax,nonsense"], "--op is 'nonsense', must be of softmax, layer_norm"),
        (["--dtype", "int8"], "--dtype is 'int8', must be of float32"),
        (["--model", "nowhere"], "--model is nowhere, must be one of gpt2"),
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
