"""What the tests of checkpoints in Hugging Face's layout share: small models of transformers' with random weights."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("transformers", reason="transformers is not installed: pip install fastformer[transformers]")

import transformers

transformers.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()

TOLERANCE = 2e-5  # of the largest value

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 32}
GPT2 = {"vocab_size": 61, "n_positions": 32, "n_embd": 32, "n_layer": 2, "n_head": 4}
GPT2 |= {"bos_token_id": 1, "eos_token_id": 2}
LLAMA = {**SIZES, "vocab_size": 61, "intermediate_size": 48, "num_key_value_heads": 2}
BERT_SIZES = {**SIZES, "vocab_size": 61, "intermediate_size": 48}
SCALED = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}

CAUSAL = {
    "gpt2": lambda: transformers.GPT2LMHeadModel(transformers.GPT2Config(**GPT2)),
    "gpt2 untied, relu": lambda: transformers.GPT2LMHeadModel(
        transformers.GPT2Config(**GPT2, tie_word_embeddings=False, activation_function="relu", n_inner=40)
    ),
    "llama": lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**LLAMA)),
    "llama scaled, tied": lambda: transformers.LlamaForCausalLM(
        transformers.LlamaConfig(**LLAMA, rope_parameters=SCALED, tie_word_embeddings=True)
    ),
}
BERTS = {
    "pretraining": transformers.BertForPreTraining,
    "masked": transformers.BertForMaskedLM,
    "classes": transformers.BertForSequenceClassification,
    "base": transformers.BertModel,
}


def randomised(theirs: torch.nn.Module) -> torch.nn.Module:
    """Weights larger than transformers' first ones, so that every part has a say, in evaluation mode."""
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    theirs.set_attn_implementation("eager")
    return theirs.eval()


def bert(name: str, **options: Any) -> torch.nn.Module:
    return randomised(BERTS[name](transformers.BertConfig(**BERT_SIZES, num_labels=3, **options)))


def assert_close(ours: Tensor, theirs: Tensor, what: str, *, scale: float | None = None) -> None:
    largest = theirs.abs().max().item() if scale is None else scale
    difference = (ours - theirs).abs().max().item()
    assert difference <= TOLERANCE * largest, f"{what} differs by {difference:.2e}, the largest value is {largest:.2e}"


def edit(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    path = folder / "config.json"
    settings = json.loads(path.read_text())
    change(settings)
    path.write_text(json.dumps(settings))
