"""What the tests of the benchmarks' whole models share: models and batches that take milliseconds."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from fastformer.benchmarks import bench_models, harness, model_jobs
from fastformer.benchmarks.bench_models import Model
from fastformer.benchmarks.harness import Limits, Pace
from fastformer.benchmarks.model_jobs import Pair

TINY = {"vocab_size": 61, "context_length": 32, "num_layers": 2, "d_model": 32}
CONFIGS = {
    "gpt2": replace(bench_models.GPT2, **TINY, num_heads=2),
    "bert": replace(bench_models.BERT_BASE, **TINY, num_heads=2),
    "llama": replace(bench_models.LLAMA, **TINY, num_heads=4, num_kv_heads=2, d_hidden=48),
}
DECODERS = ("gpt2", "llama")
CPU = torch.device("cpu")
LIMITS = Limits({1024: 1e9}, {1024: 1e9}, {torch.float32: 1e9, torch.bfloat16: 1e9})


def pair_of(name: str) -> Pair:
    """In float32; the parameters are larger than at the start of training, so that every part has a say."""
    pair = Pair(CONFIGS[name], CPU, torch.float32)
    with torch.no_grad():
        for parameter in pair.plain.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
    return pair


def plant(monkeypatch: pytest.MonkeyPatch) -> None:
    """Models and batches that take milliseconds, and a torch.compile that takes none and changes nothing."""
    models = {name: Model(config, batch=2, length=16) for name, config in CONFIGS.items()}
    monkeypatch.setattr(bench_models, "MODELS", {"cpu": models})
    monkeypatch.setattr(bench_models, "PROMPT", 7)
    monkeypatch.setattr(model_jobs, "NEW_TOKENS", 6)
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)


def rows_of(**pace: object) -> Iterator[harness.Row]:
    found = Pace(**({"row_seconds": 0.0, "min_rounds": 1} | pace))
    return bench_models.rows(CPU, harness.CpuTimer(), LIMITS, found, random.Random(0))


def too_large_by_15_percent(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda *args, **kwargs: 1.15 * function(*args, **kwargs)
