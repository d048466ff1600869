"""Checkpoints: one safetensors file, replaced whole or not at all."""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from fastformer.models.base import Transformer
from fastformer.models.bert import BERT
from fastformer.models.config import BERTConfig, GPTConfig, Seq2SeqConfig, TransformerConfig
from fastformer.models.files import replacing, require
from fastformer.models.gpt import GPT
from fastformer.models.seq2seq import Seq2Seq
from fastformer.models.tokenizer import Tokenizer

FORMAT = "fastformer-2"
MODEL_FILE = "model.safetensors"
TOKENIZER_FILE = "tokenizer.json"

#: The kind of a model: (its class, that of its configuration).
KINDS: dict[str, tuple[type[Transformer], type[TransformerConfig]]] = {
    "gpt": (GPT, GPTConfig),
    "bert": (BERT, BERTConfig),
    "seq2seq": (Seq2Seq, Seq2SeqConfig),
}


@dataclass
class Checkpoint:
    """What the file holds."""

    config: TransformerConfig
    weights: dict[str, Tensor]  # the model's state_dict
    training_tensors: dict[str, Tensor]  # optimizer and random state; empty unless asked for
    training: dict[str, object]  # what else training needs to go on, as JSON has it

    @property
    def kind(self) -> str:
        """Of the model: "gpt", "bert" or "seq2seq"."""
        return next(kind for kind, (_, config) in KINDS.items() if type(self.config) is config)


def save(path: Path, checkpoint: Checkpoint) -> None:
    """Write ``checkpoint``; an older file at ``path`` stays whole if that fails or is interrupted."""
    tensors = {f"model.{name}": x for name, x in checkpoint.weights.items()}
    tensors |= {f"training.{name}": x for name, x in checkpoint.training_tensors.items()}
    tensors = {name: x.detach().cpu().contiguous() for name, x in tensors.items()}
    metadata = {
        "format": FORMAT,
        "kind": checkpoint.kind,
        "config": json.dumps(asdict(checkpoint.config)),
        "training": json.dumps(checkpoint.training),
    }
    metadata["crc32"] = _crc32(metadata, tensors)
    save_file = require("safetensors.torch").save_file
    with replacing(path) as temporary:
        save_file(tensors, temporary, metadata)


def load(path: Path, *, with_training: bool = False) -> Checkpoint:
    """Read a checkpoint onto the CPU.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not a checkpoint of fastformer's, or is damaged.
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
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
        if metadata.pop("crc32", None) != _crc32(metadata, tensors):
            raise ValueError("its checksum is wrong: the file is damaged")
        config = KINDS[metadata["kind"]][1](**json.loads(metadata["config"]))
        training = json.loads(metadata["training"])
        for key, tensor in tensors.items():
            group, _, name = key.partition(".")
            if group == "model" or with_training:
                groups[group][name] = tensor.clone()  # else it would be part of the file, mapped into memory
    except (safetensors.SafetensorError, ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{path}: not a fastformer checkpoint ({error})") from error
    return Checkpoint(config, groups["model"], groups["training"], training)


def build_model(path: Path, checkpoint: Checkpoint, device: torch.device | str = "cpu") -> Transformer:
    """The model of a checkpoint read from ``path``.

    Raises:
        ValueError: the weights are not those of its configuration.
    """
    model = KINDS[checkpoint.kind][0](checkpoint.config)
    try:
        model.load_state_dict(checkpoint.weights)
    except RuntimeError as error:
        raise ValueError(f"{path}: the weights don't fit the configuration ({error})") from error
    return model.to(device)


def load_folder(
    folder: Path, device: torch.device | str = "cpu", *, with_training: bool = False
) -> tuple[Checkpoint, Transformer, Tokenizer]:
    """What ``fastformer train`` wrote: the checkpoint, its model, in training mode, and the tokenizer.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file is damaged or foreign, or the tokenizer is not the model's.
    """
    path = folder / MODEL_FILE
    state = load(path, with_training=with_training)
    model = build_model(path, state, device)
    tokenizer = Tokenizer.load(folder / TOKENIZER_FILE)
    if tokenizer.vocab_size != state.config.vocab_size:
        raise ValueError(
            f"{folder}: the tokenizer has {tokenizer.vocab_size} tokens, the model {state.config.vocab_size}"
        )
    return state, model, tokenizer


def _crc32(metadata: Mapping[str, str], tensors: Mapping[str, Tensor]) -> str:
    """Checksum of all the file says."""
    found = zlib.crc32(json.dumps(metadata, sort_keys=True).encode())
    for name in sorted(tensors):
        header = f"{name} {tensors[name].dtype} {list(tensors[name].shape)}"
        found = zlib.crc32(header.encode(), found)
        found = zlib.crc32(memoryview(tensors[name].reshape(-1).view(torch.uint8).numpy()), found)
    return f"{found:08x}"
