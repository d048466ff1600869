"""The whole models of the benchmarks: fair peers, checked before they are timed, work counted as torch counts it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import ModuleType

import pytest
import torch
from bench_models_support import CONFIGS, CPU, DECODERS, pair_of, plant, rows_of
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from fastformer.benchmarks import bench_models, model_jobs, plain_models
from fastformer.benchmarks.bench_models import MODELS, TASKS, Model, Task
from fastformer.benchmarks.harness import FORWARD, TRAINING, Timing
from fastformer.benchmarks.memory import peak_bytes
from fastformer.benchmarks.model_jobs import Generation, distance, plain_model
from fastformer.benchmarks.model_work import ModelWork
from fastformer.benchmarks.plain_models import Generator

every_model = pytest.mark.parametrize("name", CONFIGS)


def close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5 * b.detach().abs().max().item())


@every_model
def test_plain_models_equal_ours(name: str) -> None:
    pair = pair_of(name)
    tokens, targets = pair.random_tokens(2, 3, 17)
    close(pair.ours(tokens), pair.plain(tokens))
    losses = [model(tokens, targets) for model in (pair.ours, pair.plain)]
    close(*losses)
    ours, plains = (
        dict(zip(dict(model.named_parameters()), torch.autograd.grad(loss, list(model.parameters()))))
        for model, loss in zip((pair.ours, pair.plain), losses)
    )
    assert ours.keys() == plains.keys()
    for key, gradient in plains.items():
        close(ours[key], gradient)


@every_model
def test_state_dicts_load_both_ways(name: str) -> None:
    pair = pair_of(name)
    tokens = pair.random_tokens(2, 9)
    plain, ours = plain_model(CONFIGS[name]), type(pair.ours)(CONFIGS[name])
    plain.load_state_dict(pair.ours.state_dict())
    ours.load_state_dict(pair.plain.state_dict())
    assert torch.equal(plain(tokens), pair.plain(tokens)) and torch.equal(ours(tokens), pair.ours(tokens))


@every_model
def test_plain_models_run_with_only_their_imports_changed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    source = Path(plain_models.__file__).read_text()
    for old, new in (
        ("import torch.nn.functional as F", "import fastformer.functional as F"),
        ("from torch import nn", "from fastformer import nn"),
    ):
        assert source.count(old) == 1
        source = source.replace(old, new)
    swapped = ModuleType("swapped")
    exec(compile(source, "swapped.py", "exec"), swapped.__dict__)
    pair = pair_of(name)
    for model in ("PlainGPT", "PlainBERT", "PlainLlama"):
        monkeypatch.setattr(model_jobs, model, getattr(swapped, model))
    model = plain_model(CONFIGS[name])
    model.load_state_dict(pair.plain.state_dict())
    assert type(model).__module__ == "swapped" and type(model.blocks[0].norm1).__module__.startswith("fastformer")
    tokens = pair.random_tokens(2, 3, 17)
    losses = [model(*tokens), pair.plain(*tokens)]
    close(*losses)
    gradients = (torch.autograd.grad(loss, list(m.parameters())) for m, loss in zip((model, pair.plain), losses))
    for ours, plains in zip(*gradients, strict=True):
        close(ours, plains)


@pytest.mark.parametrize("options", [None, {"backend": "eager", "fullgraph": True, "dynamic": False}])
@pytest.mark.parametrize("name", DECODERS)
def test_generation_of_the_plain_models_is_that_of_their_full_forward(name: str, options: dict | None) -> None:
    pair = pair_of(name)
    prompt = pair.random_tokens(3, 7)
    tokens = Generator(pair.plain, 3, 12, options).generate(prompt, 5)
    assert torch.equal(tokens[:, :7], prompt) and len(set(tokens[:, 7:].flatten().tolist())) > 3
    for length in range(7, 12):
        assert torch.equal(pair.plain(tokens[:, :length])[:, -1].argmax(-1), tokens[:, length])
    assert torch.equal(pair.ours.generate(prompt, 5, temperature=0), tokens)


def flops_of(call: Callable[[], object]) -> tuple[int, int]:
    """As torch counts them: (all, those of the products that have a batch, which are attention's)."""
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops(), counter.get_flop_counts()["Global"][torch.ops.aten.bmm]


@every_model
def test_flops_are_those_that_torch_counts(name: str) -> None:
    """But for the half of causal attention that torch counts too."""
    pair = pair_of(name)
    batch, length, new = 3, 16, 5
    tokens, targets = pair.random_tokens(2, batch, length)
    work = ModelWork.of(pair.plain, batch)
    masked = 0.5 if name in DECODERS else 0.0
    with torch.no_grad():
        every, attention = flops_of(lambda: pair.plain(tokens))
    assert work.inference(length).flops == every - masked * attention
    every, attention = flops_of(lambda: pair.plain(tokens, targets).backward())
    assert work.training(length).flops == every - masked * attention
    if name in DECODERS:
        generator = Generator(pair.plain, batch, length + new)
        _, attention = flops_of(lambda: generator.generate(tokens, 1))  # of the prompt alone
        every, _ = flops_of(lambda: generator.generate(tokens, new))
        assert work.generation(length, new).flops == every - masked * attention


def test_bytes_of_a_small_gpt() -> None:
    """d_model 32, 2 layers: by hand."""
    pair = pair_of("gpt2")
    block = 2 * (32 * 96 + 96 + 32 * 32 + 32 + 2 * 32 * 128 + 128 + 32 + 4 * 32) + 2 * 32
    parameters = 61 * 32 + 32 * 32 + block
    work = ModelWork.of(pair.plain, 3)
    assert work.training(16).bytes == 10 * 4 * parameters
    assert work.inference(16).bytes == 4 * (parameters + 3 * 16 * 61)
    weights = 61 * 32 + 2 * (4 * 32 * 32 + 2 * 32 * 128)
    assert work.generation(16, 3).bytes == 4 * (3 * weights + 2 * 2 * 32 * 3 * (17 + 18))
    assert work.generation(16, 3).reads


def test_sizes_are_those_of_the_models_by_name() -> None:
    with torch.device("meta"):
        counts = {
            (device, name): sum(p.numel() for p in plain_model(model.config).parameters())
            for device, models in MODELS.items()
            for name, model in models.items()
        }
    assert counts[("cpu", "gpt2")] == counts[("cuda", "gpt2")] == 124_439_808
    assert counts[("cpu", "bert")] == pytest.approx(109.5e6, rel=1e-3)
    assert counts[("cuda", "llama")] == pytest.approx(1.1e9, rel=1e-2)
    assert all(task.model in models for task in TASKS for models in MODELS.values())


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    plant(monkeypatch)


def test_rows_are_checked_and_timed(tiny: None) -> None:
    rows = list(rows_of())
    assert len(rows) == bench_models.COUNT
    assert [(row.operation, row.shape, row.dtype, row.mode) for row in rows] == [
        ("train_step", "gpt2 2x16", "bf16", TRAINING),
        ("train_step", "gpt2 2x16", "fp32", TRAINING),
        ("train_step", "bert 2x16", "bf16", TRAINING),
        ("train_step", "llama 2x16", "bf16", TRAINING),
        ("inference", "bert 2x16", "bf16", FORWARD),
        ("generation", "gpt2 1x7+6", "bf16", FORWARD),
        ("generation", "gpt2 1x7+6", "fp32", FORWARD),
        ("generation", "gpt2 8x7+6", "bf16", FORWARD),
        ("generation", "llama 1x7+6", "bf16", FORWARD),
    ]
    for row in rows:
        assert row.problem == "" and 0 <= row.error_share < 1
        assert row.peers.keys() == {"eager", "compile", "ours: compile"}
        assert all(isinstance(timing, Timing) for timing in (row.ours, *row.peers.values()))
        assert row.memory.keys() == {"ours", *row.peers} and min(row.memory.values()) > 0
        assert row.flops > 0 and row.bytes > 0
        assert row.limit_seconds == max(row.flops, row.bytes) / 1e9
        assert row.tokens == (row.sizes["batch"] * row.sizes.get("new_tokens", row.sizes["length"]))
    # Logits and their gradient are in eager torch's memory at once, of all tokens.
    eager = {row.operation: row.memory["eager"] for row in rows if row.dtype == "fp32"}
    parameters = sum(p.numel() for p in plain_model(CONFIGS["gpt2"]).parameters())
    assert eager["train_step"] > 4 * (parameters + 2 * 2 * 16 * 61)


@pytest.mark.parametrize("task", [TASKS[3], TASKS[5]], ids=lambda task: task.operation)
def test_compiled_variants(task: Task, tiny: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """By Dynamo alone: what the options ask for can be had, of a single layer."""
    config = replace(CONFIGS[task.model], num_layers=1)
    monkeypatch.setattr(bench_models, "MODELS", {"cpu": {task.model: Model(config, batch=2, length=16)}})
    monkeypatch.setattr(bench_models, "TASKS", (task,))
    compiled: list[object] = []

    def by_dynamo(function: Callable, *, mode: str | None = None, **options: bool) -> Callable:
        compiled.append(function)
        return torch._dynamo.optimize("eager", nopython=options.get("fullgraph", False))(function)

    monkeypatch.setattr(torch, "compile", by_dynamo)
    (row,) = rows_of()
    assert len(compiled) == 2 and isinstance(row.peers["compile"], Timing)
    assert isinstance(row.peers["ours: compile"], Timing)


@pytest.mark.parametrize("batch", [1, 3])
def test_compiled_step_that_is_judged_is_the_one_that_is_timed(
    batch: int, tiny: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    graphs = []

    def by_dynamo(function: Callable, **options: object) -> Callable:
        backend = lambda graph, inputs: graphs.append(graph) or graph.forward  # noqa: E731
        return torch._dynamo.optimize(backend, nopython=True, dynamic=False)(function)

    monkeypatch.setattr(torch, "compile", by_dynamo)
    job = Generation(pair_of("gpt2"), batch, 7)
    contestant = job.contestant("compile")
    contestant.call()
    assert len(graphs) == 1
    assert job.judge()(contestant) < 1e-5 and len(graphs) == 1


def test_pace_chooses(tiny: None) -> None:
    for row in rows_of(modes=(FORWARD,), skip=("compile",)):
        assert row.mode == FORWARD and row.peers.keys() == {"eager"} == row.memory.keys() - {"ours"}
    for row in rows_of(modes=(TRAINING,), only=("compile",), suite_seconds=1e-9):
        assert row.ours and row.peers.keys() == {"compile", "ours: compile"}
        assert all("no time left" in reason for reason in row.peers.values())


def test_only_who_is_wanted_is_run(tiny: None, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[str] = []
    contestant = model_jobs.TrainStep.contestant
    monkeypatch.setattr(
        model_jobs.TrainStep, "contestant", lambda self, name: made.append(name) or contestant(self, name)
    )
    monkeypatch.setattr(bench_models, "TASKS", TASKS[:1])
    for chosen, expected, timed in (
        ({"only": ("liger",)}, ["ours"], set()),
        ({"skip": ("compile",)}, ["ours", "eager"], {"eager"}),
        ({"only": ("ours: compile",)}, ["ours: compile", "ours"], {"ours: compile"}),
        # Its allowance is from the eager one.
        ({"skip": ("eager", "ours: compile")}, ["compile", "ours", "eager"], {"compile"}),
    ):
        (row,) = rows_of(**chosen)
        assert made == expected and row.peers.keys() == timed == row.memory.keys() - {"ours"}
        made.clear()


def test_eager_generation_makes_its_cache_in_the_call() -> None:
    """As ours does: in its time and in its memory."""
    pair = pair_of("gpt2")
    prompt = pair.random_tokens(3, 7)
    peak = {room: peak_bytes(partial(Generator(pair.plain, 3, room).generate, prompt, 2), CPU) for room in (9, 32)}
    position = 2 * 2 * 3 * 32 * 4  # bytes: layers, keys and values, sequences, width, of a float32
    assert peak[32] - peak[9] == (32 - 9) * position and peak[9] > 9 * position


def test_cuda_graph_keeps_one_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    plain = pair_of("llama").plain
    graph = Generator(plain, 3, 9, {"mode": "reduce-overhead"})
    assert graph.cache() is graph.cache() is graph.kept
    for options in (None, {"mode": None}):
        generator = Generator(plain, 3, 9, options)
        assert generator.kept is None and generator.cache()[0][0] is not generator.cache()[0][0]


def test_a_model_that_fails_leaves_the_others(tiny: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def out_of_memory(self: torch.nn.Module, *args: object) -> None:
        raise torch.OutOfMemoryError("too large")

    monkeypatch.setattr(model_jobs.BERT, "forward", out_of_memory)
    rows = list(rows_of(skip=("compile",)))
    assert [row.problem for row in rows if "bert" in row.shape] == ["OutOfMemoryError: too large"] * 2
    assert all(row.ours for row in rows if "bert" not in row.shape) and len(rows) == bench_models.COUNT


def test_interruption_keeps_the_rows_before_it(tiny: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*args: object, **kwargs: object) -> None:
        raise KeyboardInterrupt

    found = rows_of(skip=("compile",))
    assert next(found).ours
    monkeypatch.setattr(bench_models, "measure", interrupt)
    with pytest.raises(KeyboardInterrupt):
        next(found)


def test_distance_is_that_of_the_worst_tensor() -> None:
    right = [torch.full((4,), 2.0), torch.full((9,), 1.0)]
    assert distance(right, right) == 0
    assert distance([right[0] * 1.5, right[1] * 1.25], right) == 0.5
    assert math.isnan(distance([right[0], right[1] * torch.nan], right))


@every_model
def test_training_steps_are_judged_at_the_parameters_of_the_beginning(name: str) -> None:
    pair = pair_of(name)
    job = model_jobs.TrainStep(pair, 2, 16)
    beginning = [x.detach().clone() for x in job.parameters]
    contestant = job.contestant("ours")
    contestant.call()
    assert not any(map(torch.equal, beginning, job.parameters))
    assert job.judge()(contestant) < 1e-4
    assert all(map(torch.equal, beginning, job.parameters))
