"""Checkpoints: one safetensors file, replaced whole or not at all."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from fastformer.models.config import GPTConfig
from fastformer.models.files import replacing, require
from fastformer.models.gpt import GPT

FORMAT = "fastformer-gpt-1"
MODEL_FILE = "model.safetensors"
TOKENIZER_FILE = "tokenizer.json"


@dataclass
class Checkpoint:
    """What the file holds."""

    config: GPTConfig
    weights: dict[str, Tensor]  # the model's state_dict
    training_tensors: dict[str, Tensor]  # optimizer and random state; empty unless asked for
    training: dict[str, object]  # what else training needs to go on, as JSON has it


def save(path: Path, checkpoint: Checkpoint) -> None:
    """Write ``checkpoint``; an older file at ``path`` stays whole if that fails or is interrupted."""
    tensors = {f"model.{name}": x for name, x in checkpoint.weights.items()}
    tensors |= {f"training.{name}": x for name, x in checkpoint.training_tensors.items()}
    metadata = {
        "format": FORMAT,
        "config": json.dumps(asdict(checkpoint.config)),
        "training": json.dumps(checkpoint.training),
    }
    save_file = require("safetensors.torch").save_file
    with replacing(path) as temporary:
        save_file({name: x.contiguous() for name, x in tensors.items()}, temporary, metadata)


def load(path: Path, *, with_training: bool = False) -> Checkpoint:
    """Read a checkpoint onto the CPU.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not a checkpoint of a fastformer GPT.
    """
    safetensors = require("safetensors")
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    groups: dict[str, dict[str, Tensor]] = {"model": {}, "training": {}}
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != FORMAT:
                raise ValueError(f"its format is {metadata.get('format')!r}, not {FORMAT!r}")
            config, training = GPTConfig(**json.loads(metadata["config"])), json.loads(metadata["training"])
            for key in file.keys():  # noqa: SIM118 (not a dict: it can't be iterated)
                group, _, name = key.partition(".")
                if group == "model" or with_training:
                    groups[group][name] = file.get_tensor(key)
    except (safetensors.SafetensorError, ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{path}: not a fastformer checkpoint ({error})") from error
    return Checkpoint(config, groups["model"], groups["training"], training)


def build_model(path: Path, checkpoint: Checkpoint, device: torch.device | str = "cpu") -> GPT:
    """The model of a checkpoint read from ``path``.

    Raises:
        ValueError: the weights are not those of its configuration.
    """
    model = GPT(checkpoint.config)
    try:
        model.load_state_dict(checkpoint.weights)
    except RuntimeError as error:
        raise ValueError(f"{path}: the weights don't fit the configuration ({error})") from error
    return model.to(device)
