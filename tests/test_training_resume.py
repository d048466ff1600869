"""Runs that end early: checkpoints, exact resume, Ctrl-C, kills at the worst moment, the log."""

from __future__ import annotations

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
from fastformer.models.log import LOG_FILE, PICTURE_FILE, Log, Row, draw_losses, read_log

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
    trainer, _ = runs.resumed_run(tmp_path, materials[kind])
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


def test_restore_refuses_another_text(saved: Path, materials: dict[str, runs.Material]) -> None:
    text, held_out = materials["gpt"]
    with pytest.raises(ValueError, match=r"^text is not the one"):
        runs.resumed_run(saved.parent, (text[:-5000], held_out))


def test_weights_alone_are_not_resumed(saved: Path, materials: dict[str, runs.Material]) -> None:
    state = checkpoint.load(saved, with_training=True)
    assert training.config_of(state) == training.TrainingConfig(learning_rate=3e-3, warmup_steps=5)
    bare = checkpoint.Checkpoint(state.config, state.weights, {}, {})
    with pytest.raises(ValueError, match=r"^checkpoint lacks the training configuration"):
        training.config_of(bare)
    with pytest.raises(ValueError, match=r"^checkpoint lacks the limits"):
        training.limits_of(bare)
    trainer, _ = runs.resumed_run(saved.parent, materials["gpt"])
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


# The log


def row(step: int, held_out: float | None = None) -> Row:
    return Row(step, 5.0 - step / 7, held_out, 1e-3 / 3, step * 0.1)


def test_log_drops_what_came_after_the_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / LOG_FILE
    log = Log(path)
    for step in range(1, 6):
        log.add(row(step, 4.5 if step == 3 else None))
    log.flush()
    log.add(row(6))
    assert read_log(path) == [row(1), row(2), row(3, 4.5), row(4), row(5)]
    assert path.read_text().splitlines()[:2] == [
        "step,loss,held_out_loss,learning_rate,seconds",
        f"1,{5 - 1 / 7!r},,{1e-3 / 3!r},0.1",
    ]

    with path.open("a") as file:
        file.write("6,4.1")  # killed while writing
    resumed = Log(path, steps_done=3)
    resumed.add(row(4))
    resumed.flush()
    assert read_log(path) == [row(1), row(2), row(3, 4.5), row(4)]
    Log(path)
    assert read_log(path) == []


@pytest.mark.parametrize("content", [b"a,b\n1,2\n", b"\xff\xfe\n", b""])
def test_other_files_are_no_logs(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / LOG_FILE
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"{path}: not a log of training"):
        Log(path, steps_done=3)
    assert path.read_bytes() == content
    path.write_text(",".join(Row._fields) + "\n1,2\n")
    with pytest.raises(ValueError, match=f"{path}, line 2: not a row"):
        Log(path)


def test_losses_are_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / PICTURE_FILE
    draw_losses([row(step, 4.0 if step % 2 else None) for step in range(1, 9)], path)
    assert path.read_bytes().startswith(b"\x89PNG")
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"^matplotlib is not installed: pip install matplotlib"):
        draw_losses([row(1)], path)


def test_no_loss_is_lost_in_the_log(tmp_path: Path) -> None:
    log = Log(tmp_path / LOG_FILE)
    log.add(row(1)._replace(loss=math.pi))
    log.flush()
    assert read_log(log.path)[0].loss == math.pi
