"""Whole models of the benchmarks that are wrong, fail or overwrite what they are given: none gets a time."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import pytest
import torch
from bench_models_support import DECODERS, LIMITS, pair_of, plant, rows_of, too_large_by_15_percent
from torch import Tensor

from fastformer.benchmarks import bench_models, harness, model_jobs, report
from fastformer.benchmarks.bench_models import TASKS
from fastformer.benchmarks.harness import FORWARD, TRAINING, Timing
from fastformer.benchmarks.model_jobs import Generation


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    plant(monkeypatch)


@pytest.fixture
def generation(tiny: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """That alone, without ours compiled."""
    monkeypatch.setattr(bench_models, "TASKS", tuple(task for task in TASKS if task.operation == "generation"))


def test_wrong_model_gets_no_time(tiny: None, monkeypatch: pytest.MonkeyPatch) -> None:
    for model, name in ((model_jobs.GPT, "unembed"), (model_jobs.GPT, "forward"), (model_jobs.BERT, "forward")):
        monkeypatch.setattr(model, name, too_large_by_15_percent(getattr(model, name)))
    for row in rows_of():
        assert "wrong answer" in row.problem and row.error_share > 1 and row.ours is None and not row.peers


def test_wrong_gradient_gets_no_time(tiny: None, monkeypatch: pytest.MonkeyPatch) -> None:
    forward = model_jobs.GPT.forward

    def same_loss(self: torch.nn.Module, *batch: Tensor) -> Tensor:
        loss = forward(self, *batch)
        return loss + 0.2 * (loss - loss.detach())

    monkeypatch.setattr(model_jobs.GPT, "forward", same_loss)
    problems = [row.problem for row in rows_of(modes=(TRAINING,), skip=("compile",))]
    assert [bool(problem) for problem in problems] == [True, True, False, True]


def test_compiled_plain_model_that_is_wrong_gets_no_time(tiny: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", lambda function, **options: too_large_by_15_percent(function))
    for row in rows_of(skip=("ours: compile",)):
        assert row.ours and isinstance(row.peers["eager"], Timing) and row.memory.keys() == {"ours", "eager"}
        assert "computes something else" in row.peers["compile"] and row.problem == ""


def test_eager_plain_model_that_is_wrong_gets_no_time(generation: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor do its errors make an allowance."""
    logits = model_jobs.Generator.logits
    monkeypatch.setattr(model_jobs.Generator, "logits", lambda *args: 2 * logits(*args))
    for row in rows_of(skip=("ours: compile",)):
        assert row.ours and row.memory.keys() == {"ours"}
        assert all("computes something else" in row.peers[name] for name in ("eager", "compile"))


def test_ours_compiled_and_wrong_fails_the_run(tiny: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", lambda function, **options: too_large_by_15_percent(function))
    rows = list(rows_of())
    for row in rows:
        assert row.problem.startswith("ours: compile: wrong answer: ") and row.ours is None
    assert report.failed(report.collect({}, LIMITS, rows[:1], None))


def test_compiler_that_fails_says_so(tiny: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*args: object, **kwargs: object) -> None:
        raise RuntimeError("no\ncompiler")

    monkeypatch.setattr(torch, "compile", fails)
    row = next(rows_of())
    assert row.ours and row.peers["compile"] == row.peers["ours: compile"] == "RuntimeError: no compiler"


@pytest.fixture
def timed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Has an entry for each row whose calls are timed, from then on; a test clears it between rows."""
    begun: list[str] = []

    def measured(calls: dict, *args: object) -> dict:
        begun.append("now")
        return harness.measure(calls, *args)

    monkeypatch.setattr(bench_models, "measure", measured)
    return begun


def wrong_once_timed(function: Callable[..., Tensor], timed: list[str]) -> Callable[..., Tensor]:
    return lambda *args, **kwargs: (1.15 if timed else 1.0) * function(*args, **kwargs)


def test_only_the_first_call_is_right(tiny: None, timed: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    for model, name in ((model_jobs.GPT, "unembed"), (model_jobs.GPT, "forward"), (model_jobs.BERT, "forward")):
        monkeypatch.setattr(model, name, wrong_once_timed(getattr(model, name), timed))
    for row in rows_of(skip=("compile",)):
        assert row.problem.startswith("after the timed calls: wrong answer: ")
        assert row.error_share > 1 and row.ours is None
        timed.clear()


def test_only_the_first_compiled_call_is_right(tiny: None, timed: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", lambda function, **options: wrong_once_timed(function, timed))
    for row in rows_of(skip=("ours: compile",)):
        assert row.ours and "computes something else" in row.peers["compile"] and "compile" not in row.memory
        timed.clear()
    row = next(rows_of())
    assert row.problem.startswith("after the timed calls: ours: compile: wrong answer: ") and row.ours is None


FIFTH = 7 + 4  # the position of the token that the fifth decoding step takes


def test_generation_that_is_wrong_from_the_fifth_step_on(generation: None, monkeypatch: pytest.MonkeyPatch) -> None:
    features = model_jobs.GPT.features

    def wrong(self: torch.nn.Module, tokens: Tensor, cache: object) -> Tensor:
        factor = 1.15 if cache.length >= FIFTH - 1 else 1.0
        return factor * features(self, tokens, cache)

    monkeypatch.setattr(model_jobs.GPT, "features", wrong)
    assert all("wrong answer" in row.problem for row in rows_of(skip=("compile",)))


def test_compiled_generation_that_is_wrong_from_the_fifth_step_on(
    generation: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def compiled(function: Callable[..., Tensor], **options: object) -> Callable[..., Tensor]:
        def step(tokens: Tensor, position: Tensor, cache: object) -> Tensor:
            return (1.15 if position >= FIFTH - 1 else 1.0) * function(tokens, position, cache)

        return step

    monkeypatch.setattr(torch, "compile", compiled)
    for row in rows_of(skip=("ours: compile",)):
        assert row.ours and "computes something else" in row.peers["compile"]


@pytest.mark.parametrize("place", [0, -1], ids=["prompt", "last token"])
def test_generated_tokens_are_judged(place: int, generation: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Though the logits are right."""
    generate = model_jobs.GPT.generate

    def another(self: torch.nn.Module, *args: object, **options: object) -> Tensor:
        tokens = generate(self, *args, **options).clone()
        tokens[:, place] = (tokens[:, place] + 1) % 61
        return tokens

    monkeypatch.setattr(model_jobs.GPT, "generate", another)
    assert [row.problem for row in rows_of(skip=("compile",))] == ["wrong answer: infx the allowed error"] * 4


@pytest.mark.parametrize("name", DECODERS)
def test_second_likeliest_token_is_no_answer(name: str, tiny: None, monkeypatch: pytest.MonkeyPatch) -> None:
    job = Generation(pair_of(name), 2, 7)
    assert job.judge()(job.contestant("ours")) < 1e-5 and job.judge()(job.contestant("eager")) < 1e-5
    contestant = job.contestant("eager")

    def second_likeliest() -> Tensor:
        tokens = contestant.call()
        with torch.no_grad():
            tokens[:, -1] = job.pair.plain(tokens[:, :-1])[:, -1].topk(2).indices[:, 1]
        return tokens

    assert job.judge()(replace(contestant, call=second_likeliest)) == math.inf


def overwriting(function: Callable[..., Tensor], when: Callable[[], object] = lambda: True) -> Callable[..., Tensor]:
    """A method whose first argument is changed by calls, behind a right answer."""

    def call(self: torch.nn.Module, tokens: Tensor, *args: object, **options: object) -> Tensor:
        result = function(self, tokens, *args, **options)
        if when():
            tokens[..., -1] = (tokens[..., -1] + 1) % 61
        return result

    return call


def test_ours_that_overwrites_its_input(tiny: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model_jobs.GPT, "generate", overwriting(model_jobs.GPT.generate))
    monkeypatch.setattr(model_jobs.BERT, "forward", overwriting(model_jobs.BERT.forward))
    rows = list(rows_of(modes=(FORWARD,), skip=("compile",)))
    assert [row.problem for row in rows] == ["overwrites what it is given"] * 5


def test_peer_that_overwrites_its_input(tiny: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def compiled(function: Callable[..., Tensor], **options: object) -> Callable[..., Tensor]:
        if not isinstance(function, torch.nn.Module):
            return function
        return partial(overwriting(torch.nn.Module.__call__), function)

    monkeypatch.setattr(model_jobs.Generator, "generate", overwriting(model_jobs.Generator.generate))
    monkeypatch.setattr(torch, "compile", compiled)
    for row in rows_of(modes=(FORWARD,), skip=("ours: compile",)):
        assert row.ours and row.error_share <= 1
        overwriting_ones = {name for name, reason in row.peers.items() if reason == "overwrites what it is given"}
        assert overwriting_ones == ({"compile"} if row.operation == "inference" else {"compile", "eager"})


def test_parameters_that_are_overwritten(generation: None, monkeypatch: pytest.MonkeyPatch) -> None:
    generate = model_jobs.GPT.generate

    def worn(self: torch.nn.Module, *args: object, **options: object) -> Tensor:
        tokens = generate(self, *args, **options)
        with torch.no_grad():
            self.token_embedding.weight[0] *= 1.01
        return tokens

    monkeypatch.setattr(model_jobs.GPT, "generate", worn)
    assert all(row.problem == "overwrites what it is given" for row in rows_of(skip=("compile",)))


def test_input_that_a_timed_call_overwrites(
    generation: None, timed: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once, so that none of the later calls shows whose fault it was."""
    once = overwriting(model_jobs.Generator.generate, lambda: timed and timed.pop())
    monkeypatch.setattr(model_jobs.Generator, "generate", once)
    for row in rows_of(skip=("compile",)):
        assert row.problem == "after the timed calls: what the calls are given was overwritten" and row.ours is None


def test_peer_that_fails_while_it_is_timed(tiny: None, timed: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def compiled(function: Callable[..., Tensor], **options: object) -> Callable[..., Tensor]:
        def call(*args: object, **kwargs: object) -> Tensor:
            if timed:
                raise torch.OutOfMemoryError("too large")
            return function(*args, **kwargs)

        return call

    monkeypatch.setattr(torch, "compile", compiled)
    for row in rows_of():
        assert row.ours and isinstance(row.peers["eager"], Timing) and row.memory.keys() == {"ours", "eager"}
        assert row.peers["compile"] == row.peers["ours: compile"] == "OutOfMemoryError: too large"
        timed.clear()


def test_ours_that_fails_while_it_is_timed(tiny: None, timed: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    forward = model_jobs.BERT.forward

    def fails(*args: object) -> Tensor:
        if timed:
            raise torch.OutOfMemoryError("too large")
        return forward(*args)

    monkeypatch.setattr(model_jobs.BERT, "forward", fails)
    monkeypatch.setattr(bench_models, "TASKS", TASKS[2:3])
    (row,) = rows_of(skip=("compile",))
    assert row.problem == "after the timed calls: OutOfMemoryError: too large" and row.ours is None
