"""What the tests of accelerate on Hugging Face's models share: comparisons, and a causal model beside its original."""

from __future__ import annotations

import copy
import functools
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("transformers", reason="transformers is not installed: pip install fastformer[transformers]")

import transformers

import fastformer
from fastformer.benchmarks.bench_hugging_face import build_model

transformers.logging.set_verbosity_error()

TOLERANCE = 2e-5  # of the largest value


def kinds(model: torch.nn.Module) -> dict[str, type]:
    return {name: type(module) for name, module in model.named_modules(remove_duplicate=False)}


def assert_close(ours: Tensor, theirs: Tensor, what: str = "", *, scale: float | None = None) -> None:
    largest = theirs.abs().max() if scale is None else scale
    difference = (ours - theirs).abs().max()
    assert difference <= TOLERANCE * largest, f"{what} differs by {difference:.2e}, the largest value is {largest:.2e}"


def assert_same_step(ours: torch.nn.Module, theirs: torch.nn.Module, **inputs: Any) -> Any:
    """Equal loss and gradients; returns our output."""
    outputs = []
    for model in (ours, theirs):
        model.zero_grad()
        torch.manual_seed(0)
        outputs.append(model(**inputs))
        outputs[-1].loss.backward()
    assert outputs[0].loss.dtype == outputs[1].loss.dtype
    assert_close(outputs[0].loss, outputs[1].loss, "loss")
    largest = max(p.grad.abs().max() for p in theirs.parameters() if p.grad is not None)
    for (name, a), b in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        assert (a.grad is None) == (b.grad is None), name
        if b.grad is not None:
            assert_close(a.grad, b.grad, f"gradient of {name}", scale=largest)
    return outputs[0]


@functools.cache
def causal_pair(name: str) -> tuple[torch.nn.Module, torch.nn.Module]:
    options = {"attn_pdrop": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0} if name == "gpt2" else {}
    model = build_model(name, **options).train()
    original = copy.deepcopy(model)
    fastformer.accelerate(model)
    return model, original


class Head(torch.nn.Linear):
    """An unembedding that may compute something of its own."""
