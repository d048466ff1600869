"""Runs of training: what each kind of model is trained on and with, from its start or from a checkpoint."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fastformer.models import data, training
from fastformer.models.base import Transformer
from fastformer.models.checkpoint import KINDS, Checkpoint
from fastformer.models.objectives import MaskedLanguage, NextToken, Objective, Translation
from fastformer.models.pairs import TextPair, TokenPair, read_pairs, reversed_words, split_pairs
from fastformer.models.tokenizer import BERT_SPECIAL_TOKENS, SEQ2SEQ_SPECIAL_TOKENS, Tokenizer

PADDING, START, END = SEQ2SEQ_SPECIAL_TOKENS

#: Text to train on and to hold out, each one string, or of a Seq2Seq pairs of them.
Material = tuple[Any, Any]


@dataclass(frozen=True)
class Preset:
    """What a new run of a kind of model starts from, unless told otherwise."""

    vocab_size: int
    model: Mapping[str, Any]  # fields of its configuration
    training: Mapping[str, Any]  # fields of TrainingConfig
    limits: training.Limits


MODERN = {"positions": "rotary", "norm": "rms_norm", "activation": "swiglu", "bias": False}

PRESETS = {
    "gpt": Preset(
        vocab_size=4096,
        model={"context_length": 256, "num_layers": 6, "num_heads": 6, "d_model": 384},
        training={"batch_size": 4, "learning_rate": 1e-3, "warmup_steps": 20},
        limits=training.Limits(minutes=10),
    ),
    "bert": Preset(
        vocab_size=2048,
        model={"context_length": 128, "num_layers": 4, "num_heads": 4, "d_model": 256, "norm_first": True}
        | MODERN
        | {"num_segments": 0},
        training={"batch_size": 16, "learning_rate": 2e-3, "warmup_steps": 100},
        limits=training.Limits(minutes=10),
    ),
    "seq2seq": Preset(
        vocab_size=2500,
        model={"context_length": 64, "num_layers": 2, "num_heads": 4, "d_model": 128}
        | MODERN
        # Cross-attention sees no rotary positions: with those a word that occurs twice is a riddle to it.
        | {"positions": "learned", "dropout": 0.1},
        training={"batch_size": 64, "learning_rate": 4e-3, "warmup_steps": 100},
        limits=training.Limits(steps=2500),
    ),
}


def read_material(kind: str, text: Path | None, pairs: Path | None) -> Material:
    """What to train on and what to hold out.

    Args:
        kind: "gpt", "bert" or "seq2seq".
        text: a file of text; None for the sample text. A Seq2Seq learns to reverse the words of its sentences.
        pairs: a file of pairs, of a Seq2Seq alone, in place of the text.

    Raises:
        OSError: a file can't be read.
        ValueError: a file is not what it must be, or ``pairs`` is given where it can't be.
    """
    if pairs is not None and kind != "seq2seq":
        raise ValueError(f"pairs is {pairs}, must not be given to train a {kind}: pairs are for a seq2seq")
    if pairs is not None and text is not None:
        raise ValueError(f"pairs is {pairs}, must not be given together with text")
    if pairs is not None:
        return split_pairs(read_pairs(pairs))
    whole = data.sample_text() if text is None else data.read_text(text)
    return reversed_words(whole) if kind == "seq2seq" else data.split_text(whole)


def new_run(
    kind: str, material: Material, options: Mapping[str, Any], device: torch.device | str = "cpu"
) -> tuple[training.Trainer, Tokenizer]:
    """A new model, and a tokenizer trained on the training part of the material.

    Args:
        kind: "gpt", "bert" or "seq2seq".
        material: from ``read_material``.
        options: what differs from the kind's preset: ``vocab_size``, fields of TrainingConfig, or of the model's
            configuration.
        device: where the model is.

    Raises:
        ValueError: an option is not what it must be, or the material is too short for it.
    """
    preset = PRESETS[kind]
    model_class, config_class = KINDS[kind]
    fields = {name: value for name, value in options.items() if name in training.TrainingConfig.__dataclass_fields__}
    config = training.TrainingConfig(**{**preset.training, **fields})
    tokenizer = train_tokenizer(kind, material[0], options.get("vocab_size", preset.vocab_size))
    sizes = {name: value for name, value in options.items() if name not in fields and name != "vocab_size"}
    if kind == "seq2seq":
        sizes["start_token"] = tokenizer.number(START)
    torch.manual_seed(config.seed)
    model = model_class(config_class(tokenizer.vocab_size, **{**preset.model, **sizes})).to(device)
    return _trainer(kind, model, tokenizer, material, config), tokenizer


def resumed_run(state: Checkpoint, model: Transformer, tokenizer: Tokenizer, material: Material) -> training.Trainer:
    """A run where it left off.

    Args:
        state, model, tokenizer: from ``load_folder``, ``with_training``.
        material: what the run began with, from ``read_material``.

    Raises:
        ValueError: the material is another, or the checkpoint can't be gone on from.
    """
    trainer = _trainer(state.kind, model, tokenizer, material, training.config_of(state))
    trainer.restore(state)
    return trainer


def train_tokenizer(kind: str, part: str | Sequence[TextPair], vocab_size: int) -> Tokenizer:
    """The tokenizer that goes with a kind of model: byte-level BPE, or WordPiece for a BERT."""
    if kind == "bert":
        return Tokenizer.train(part, vocab_size, kind="wordpiece")
    if kind == "gpt":
        return Tokenizer.train(part, vocab_size)
    texts = (text for pair in part for text in pair)
    return Tokenizer.train(texts, vocab_size, special_tokens=SEQ2SEQ_SPECIAL_TOKENS, prefix_space=True)


def encode(kind: str, tokenizer: Tokenizer, part: str | Sequence[TextPair]) -> torch.Tensor | list[TokenPair]:
    """The tokens of a text, int64 [N]; or of pairs, int64 [S] each, with the end token behind each target."""
    if kind != "seq2seq":
        return tokenizer.encode(part)
    sources = tokenizer.encode_all([source for source, _ in part])
    targets = tokenizer.encode_all([target for _, target in part])
    end = torch.tensor([tokenizer.number(END)])
    return [(source, torch.cat((target, end))) for source, target in zip(sources, targets, strict=True)]


def _objective(kind: str, tokenizer: Tokenizer) -> Objective:
    if kind == "gpt":
        return NextToken()
    if kind == "seq2seq":
        return Translation(tokenizer.number(START))
    start, end, mask = (tokenizer.number(token) for token in ("[CLS]", "[SEP]", "[MASK]"))
    return MaskedLanguage(start, end, mask, len(BERT_SPECIAL_TOKENS), tokenizer.vocab_size)


def _trainer(
    kind: str, model: Any, tokenizer: Tokenizer, material: Material, config: training.TrainingConfig
) -> training.Trainer:
    train_tokens, held_out_tokens = (encode(kind, tokenizer, part) for part in material)
    objective = _objective(kind, tokenizer)
    context_length = model.config.context_length
    return training.Trainer(model, train_tokens, held_out_tokens, context_length, config, objective=objective)
