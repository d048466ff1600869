"""Runs that end early: checkpoints, exact resume, Ctrl-C, divergence, kills at the worst moment."""

from __future__ import annotations

import dataclasses
import math
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from fastformer.models import BERTConfig, GPTConfig, Seq2SeqConfig, checkpoint, data, runs, training
from fastformer.models.log import LOG_FILE, Log, read_log

SIZES = {"num_layers": 2, "num_heads": 2, "d_model": 32, "context_length": 48}
OPTIONS = {**SIZES, "vocab_size": 400, "learning_rate": 3e-3, "warmup_steps": 5, "batch_size": 4}
DROPOUT = {"dropout": 0.1, "embedding_dropout": 0.1, "attention_dropout": 0.1}
KINDS = ["gpt", "bert", "seq2seq"]


@pytest.fixture(scope="module")
def materials() -> dict[str, runs.Material]:
    text = data.sample_text()[:60_000]
    training_pairs, held_out_pairs = runs.reversed_words(text)
    halves = data.split_text(text)
    return {"gpt": halves, "bert": halves, "seq2seq": (training_pairs[:500], held_out_pairs[:40])}


def new_trainer(kind: str, materials: dict[str, runs.Material], folder: Path, **options: Any) -> training.Trainer:
    """A new run, whose tokenizer is in the folder."""
    trainer, tokenizer = runs.new_run(kind, materials[kind], {**OPTIONS, **options})
    tokenizer.save(folder / checkpoint.TOKENIZER_FILE)
    return trainer


def resumed(folder: Path, material: runs.Material) -> training.Trainer:
    """The run whose checkpoint is in the folder."""
    return runs.resumed_run(*checkpoint.load_folder(folder, with_training=True), material)


def assert_equal_runs(ours: training.Trainer, theirs: training.Trainer) -> None:
    for name, weight in theirs.model.state_dict().items():
        assert torch.equal(ours.model.state_dict()[name], weight), name
    for a, b in zip(ours.model.parameters(), theirs.model.parameters()):
        for key, value in theirs.optimizer.state[b].items():
            assert torch.equal(ours.optimizer.state[a][key], value)
    assert torch.equal(ours.generator.get_state(), theirs.generator.get_state())


@pytest.fixture
def saved(materials: dict[str, runs.Material], tmp_path: Path) -> Path:
    trainer = new_trainer("gpt", materials, tmp_path)
    trainer.train_step(0.0)
    path = tmp_path / checkpoint.MODEL_FILE
    checkpoint.save(path, trainer.checkpoint())
    return path


# Resuming


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "options",
    [DROPOUT, {**DROPOUT, "accumulate": 2, "batch_size": 2, "precision": "bf16", "checkpoint_activations": True}],
)
def test_an_interrupted_run_goes_on_as_an_unbroken_one(
    kind: str, options: dict[str, Any], materials: dict[str, runs.Material], tmp_path: Path, monkeypatch: Any
) -> None:
    unbroken = new_trainer(kind, materials, tmp_path, **options)
    path, limits = tmp_path / checkpoint.MODEL_FILE, training.Limits(steps=9)
    log = Log(tmp_path / "unbroken.csv")
    training.train(unbroken, tmp_path / "unbroken.safetensors", limits, save_every=3, log=log)

    broken = new_trainer(kind, materials, tmp_path, **options)
    step = broken.train_step

    def interrupted_step(fraction: float) -> float:
        if broken.steps_done == 4:
            os.kill(os.getpid(), signal.SIGINT)
        return step(fraction)

    monkeypatch.setattr(broken, "train_step", interrupted_step)
    with pytest.raises(KeyboardInterrupt):
        training.train(broken, path, limits, save_every=3, log=Log(tmp_path / LOG_FILE))
    assert broken.steps_done == 5
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler

    torch.manual_seed(77)
    trainer = resumed(tmp_path, materials[kind])
    assert trainer.steps_done == 5
    held_out = training.train(trainer, path, limits, save_every=3, log=Log(tmp_path / LOG_FILE, 5))
    assert held_out == unbroken.held_out_loss()
    assert_equal_runs(trainer, unbroken)
    ours, theirs = read_log(tmp_path / LOG_FILE), read_log(log.path)
    assert [row[:4] for row in ours] == [row[:4] for row in theirs]
    assert [row.step for row in ours] == list(range(1, 10))
    assert [row.step for row in ours if row.held_out_loss is not None] == [3, 6, 9]


def test_a_second_interrupt_ends_training_at_once(
    materials: dict[str, runs.Material], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = new_trainer("gpt", materials, tmp_path)

    def interrupted_step(fraction: float) -> float:
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGINT)
        raise AssertionError("still running")

    monkeypatch.setattr(trainer, "train_step", interrupted_step)
    with pytest.raises(KeyboardInterrupt):
        training.train(trainer, tmp_path / "model.safetensors", training.Limits(steps=3))
    assert not (tmp_path / "model.safetensors").exists()


def test_dropout_leaves_torchs_random_state_alone(materials: dict[str, runs.Material], tmp_path: Path) -> None:
    losses = []
    for seed in (1, 2):
        trainer = new_trainer("gpt", materials, tmp_path, **DROPOUT)
        torch.manual_seed(seed)
        before = torch.get_rng_state()
        losses.append([trainer.train_step(0.0) for _ in range(2)])
        assert torch.equal(torch.get_rng_state(), before)
    assert losses[0] == losses[1]


@pytest.mark.parametrize(("part", "name"), [(0, "training"), (1, "held-out")])
@pytest.mark.parametrize("kind", ["gpt", "seq2seq"])
def test_restore_refuses_other_data(
    kind: str, part: int, name: str, materials: dict[str, runs.Material], tmp_path: Path
) -> None:
    trainer = new_trainer(kind, materials, tmp_path)
    checkpoint.save(tmp_path / checkpoint.MODEL_FILE, trainer.checkpoint())
    others = list(materials[kind])
    others[part] = others[part][: -len(others[part]) // 5]
    with pytest.raises(ValueError, match=rf"^text or pairs are not those .*: the {name} part is another$"):
        resumed(tmp_path, tuple(others))
    resumed(tmp_path, materials[kind])


def test_parameters_without_a_gradient_have_no_state_to_resume(
    materials: dict[str, runs.Material], tmp_path: Path
) -> None:
    trainer = new_trainer("bert", materials, tmp_path, pooler=True)  # whose output no loss depends on
    trainer.model.embedding_norm.weight.requires_grad_(False)
    trainer.train_step(0.0)
    checkpoint.save(tmp_path / checkpoint.MODEL_FILE, trainer.checkpoint())
    again = resumed(tmp_path, materials["bert"])
    assert_equal_runs(again, trainer)
    assert len(again.optimizer.state) == len(list(again.model.parameters())) - 3
    again.model.embedding_norm.weight.requires_grad_(False)
    assert again.train_step(0.1) == trainer.train_step(0.1)
    assert_equal_runs(again, trainer)


def test_restore_refuses_incomplete_optimizer_state(saved: Path, materials: dict[str, runs.Material]) -> None:
    trainer = resumed(saved.parent, materials["gpt"])
    state = checkpoint.load(saved, with_training=True)
    name = "optimizer.norm.weight.exp_avg"
    state.training_tensors[name] = torch.zeros(3)
    with pytest.raises(ValueError, match=r"^checkpoint has optimizer state of another shape than norm\.weight"):
        trainer.restore(state)
    del state.training_tensors[name]
    with pytest.raises(ValueError, match=rf"^checkpoint lacks '{name}'"):
        trainer.restore(state)
    state.training["optimizer"] = ["norm.scale"]
    with pytest.raises(ValueError, match=r"^checkpoint has optimizer state of norm\.scale, which the model lacks"):
        trainer.restore(state)
    assert trainer.optimizer.state[trainer.model.norm.weight]["exp_avg"].shape == trainer.model.norm.weight.shape


def test_what_was_loaded_outlives_the_file(saved: Path, materials: dict[str, runs.Material]) -> None:
    state = checkpoint.load(saved, with_training=True)
    first, second = (resumed(saved.parent, materials["gpt"]) for _ in range(2))
    second.restore(state)
    with saved.open("r+b") as file:  # in place: a mapping of the file would see it
        file.write(bytes(saved.stat().st_size))
    assert state.weights["norm.weight"].abs().sum() > 0
    assert_equal_runs(first, second)
    first.train_step(0.0)
    second.train_step(0.0)
    assert_equal_runs(first, second)
    assert not torch.equal(  # a copy: training changes no checkpoint
        state.training_tensors["optimizer.norm.weight.exp_avg"],
        second.optimizer.state[second.model.norm.weight]["exp_avg"],
    )


# Runs that diverge


@pytest.mark.parametrize("moment", ["measured", "interrupted"])
def test_a_diverging_run_keeps_the_last_good_checkpoint(
    moment: str, materials: dict[str, runs.Material], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer, path = new_trainer("gpt", materials, tmp_path), tmp_path / checkpoint.MODEL_FILE
    training.train(trainer, path, training.Limits(steps=2))
    before = path.read_bytes()
    trainer.config = dataclasses.replace(trainer.config, learning_rate=1e30, warmup_steps=0)
    step = trainer.train_step

    def interrupted_step(fraction: float) -> float:
        os.kill(os.getpid(), signal.SIGINT)
        return step(fraction)

    if moment == "interrupted":
        monkeypatch.setattr(trainer, "train_step", interrupted_step)
    kept = f"{path} keeps the last good checkpoint"
    problem = rf"^learning_rate is 1e\+30, must be lower: the held-out loss became nan; {kept}$"
    limits, save_every = training.Limits(steps=4), {"measured": 1, "interrupted": 1000}[moment]
    with pytest.raises(ValueError, match=problem):
        training.train(trainer, path, limits, save_every=save_every)
    assert trainer.steps_done == 3
    assert path.read_bytes() == before
    assert resumed(tmp_path, materials["gpt"]).steps_done == 2


def test_a_diverging_run_that_saved_nothing_says_so(materials: dict[str, runs.Material], tmp_path: Path) -> None:
    trainer = new_trainer("gpt", materials, tmp_path, learning_rate=1e30, warmup_steps=0)
    path = tmp_path / checkpoint.MODEL_FILE
    with pytest.raises(ValueError, match=r"^learning_rate is .*: the loss became nan; nothing was saved$"):
        training.train(trainer, path, training.Limits(steps=3))
    assert not path.exists()


def test_weights_that_no_loss_depends_on_must_be_finite_too(
    materials: dict[str, runs.Material], tmp_path: Path
) -> None:
    trainer = new_trainer("bert", materials, tmp_path, pooler=True)
    with torch.no_grad():
        trainer.model.pooler.weight[0, 0] = math.inf
    path = tmp_path / checkpoint.MODEL_FILE
    with pytest.raises(ValueError, match=r": pooler\.weight became infinite or NaN; nothing was saved$"):
        training.train(trainer, path, training.Limits(steps=1))
    assert not path.exists()


def test_weights_alone_are_not_resumed(saved: Path, materials: dict[str, runs.Material]) -> None:
    state = checkpoint.load(saved, with_training=True)
    assert training.config_of(state) == training.TrainingConfig(learning_rate=3e-3, warmup_steps=5)
    bare = checkpoint.Checkpoint(state.config, state.weights, {}, {})
    with pytest.raises(ValueError, match=r"^checkpoint lacks the training configuration"):
        training.config_of(bare)
    with pytest.raises(ValueError, match=r"^checkpoint lacks the limits"):
        training.limits_of(bare)
    trainer = resumed(saved.parent, materials["gpt"])
    with pytest.raises(ValueError, match=r"^checkpoint lacks "):
        trainer.restore(checkpoint.load(saved))


# Checkpoints


@pytest.mark.parametrize(
    ("kind", "config_class"), [("gpt", GPTConfig), ("bert", BERTConfig), ("seq2seq", Seq2SeqConfig)]
)
def test_checkpoint_rebuilds_the_model(
    kind: str, config_class: type, materials: dict[str, runs.Material], tmp_path: Path
) -> None:
    trainer = new_trainer(kind, materials, tmp_path)
    trainer.train_step(0.0)
    path = tmp_path / checkpoint.MODEL_FILE
    checkpoint.save(path, trainer.checkpoint())
    state, model, tokenizer = checkpoint.load_folder(tmp_path)
    assert state.kind == kind and type(state.config) is config_class
    assert not state.training_tensors
    assert model.config == trainer.model.config
    assert tokenizer.vocab_size == model.config.vocab_size
    for name, weight in trainer.model.state_dict().items():
        assert torch.equal(model.state_dict()[name], weight)


KILLED_WHILE_SAVING = """
import os, signal, sys
from pathlib import Path
import safetensors.torch
from fastformer.models import checkpoint

def die(*arguments):
    os.kill(os.getpid(), signal.SIGKILL)

def half_a_file(tensors, path, metadata):
    save_file(tensors, path, metadata)
    os.truncate(path, path.stat().st_size // 2)
    die()

path, moment = Path(sys.argv[1]), sys.argv[2]
state = checkpoint.load(path, with_training=True)
state.training["steps_done"] = 77
save_file = safetensors.torch.save_file
if moment == "writing":
    safetensors.torch.save_file = half_a_file
else:
    os.replace = die
checkpoint.save(path, state)
"""


@pytest.mark.parametrize("moment", ["writing", "replacing"])
def test_a_kill_while_saving_leaves_the_old_checkpoint(saved: Path, moment: str) -> None:
    before = saved.read_bytes()
    killed = subprocess.run([sys.executable, "-c", KILLED_WHILE_SAVING, str(saved), moment], check=False)
    assert killed.returncode == -signal.SIGKILL
    assert list(saved.parent.glob(".*.tmp"))  # it did write
    assert saved.read_bytes() == before


def test_a_failure_while_saving_keeps_the_old_checkpoint(
    saved: Path, materials: dict[str, runs.Material], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = saved.read_bytes()
    state = checkpoint.load(saved)
    files = sorted(saved.parent.iterdir())

    def half_a_file(tensors: dict[str, torch.Tensor], path: Path, metadata: dict[str, str]) -> None:
        path.write_bytes(before[: len(before) // 2])
        raise KeyboardInterrupt

    monkeypatch.setattr(safetensors.torch, "save_file", half_a_file)
    with pytest.raises(KeyboardInterrupt):
        checkpoint.save(saved, state)
    assert saved.read_bytes() == before
    assert sorted(saved.parent.iterdir()) == files


def test_damaged_and_foreign_files_are_no_checkpoints(saved: Path, tmp_path: Path) -> None:
    whole = saved.read_bytes()
    path = tmp_path / "other.safetensors"
    flipped = bytearray(whole)
    flipped[-1000] ^= 1
    misread = whole.replace(b'\\"num_heads\\": 2', b'\\"num_heads\\": 4')
    assert misread != whole
    for content in (b"", b"garbage" * 100, whole[: len(whole) // 2], whole + b"more", bytes(flipped), misread):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=f"{path}: not a fastformer checkpoint"):
            checkpoint.load(path)
    torch.save({"weight": torch.zeros(3)}, path)
    with pytest.raises(ValueError, match=f"{path}: not a fastformer checkpoint"):
        checkpoint.load(path)
    safetensors.torch.save_file({"weight": torch.zeros(3)}, path)
    with pytest.raises(ValueError, match=f"{path}: not a fastformer checkpoint .*its format is None"):
        checkpoint.load(path)
    with pytest.raises(FileNotFoundError, match="missing: no such file"):
        checkpoint.load(tmp_path / "missing")


def test_weights_must_fit_the_configuration(saved: Path) -> None:
    state = checkpoint.load(saved)
    state.weights["norm.weight"] = torch.zeros(3)
    with pytest.raises(ValueError, match=f"{saved}: the weights don't fit"):
        checkpoint.build_model(saved, state)


def test_the_tokenizer_must_be_the_models(saved: Path, materials: dict[str, runs.Material]) -> None:
    runs.train_tokenizer("gpt", materials["gpt"][0], 300).save(saved.parent / checkpoint.TOKENIZER_FILE)
    with pytest.raises(ValueError, match=f"{saved.parent}: the tokenizer has 300 tokens, the model 400"):
        checkpoint.load_folder(saved.parent)
