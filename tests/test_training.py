"""Tokenizer, data, training and checkpoints."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import safetensors.torch
import torch

from fastformer.models import GPT, GPTConfig, checkpoint, data, training
from fastformer.models.tokenizer import Tokenizer

SIZES = {"context_length": 32, "num_layers": 2, "num_heads": 2, "d_model": 32}


@pytest.fixture(scope="module")
def text() -> str:
    return data.sample_text()[:60_000]


@pytest.fixture(scope="module")
def tokenizer(text: str) -> Tokenizer:
    return Tokenizer.train(text, 400)


def make_trainer(tokenizer: Tokenizer, text: str) -> training.Trainer:
    torch.manual_seed(0)
    model = GPT(GPTConfig(tokenizer.vocab_size, **SIZES))
    train_tokens, held_out_tokens = (tokenizer.encode(part) for part in data.split_text(text))
    config = training.TrainingConfig(learning_rate=3e-3, warmup_steps=5)
    return training.Trainer(model, train_tokens, held_out_tokens, SIZES["context_length"], config)


def resumed(path: Path, tokenizer: Tokenizer, text: str) -> training.Trainer:
    trainer = make_trainer(tokenizer, text)
    state = checkpoint.load(path, with_training=True)
    trainer.model.load_state_dict(state.weights)
    trainer.restore(state)
    return trainer


# Tokenizer


@pytest.mark.parametrize("sample", ["Hello, world!", "  two\n\n\tspaces ", "naïve café 数学 🦊", "", "\x00\x7f"])
def test_tokenizer_round_trip(tokenizer: Tokenizer, sample: str) -> None:
    tokens = tokenizer.encode(sample)
    assert tokens.dtype == torch.int64
    assert tokenizer.decode(tokens) == sample


def test_tokenizer_learns_merges(tokenizer: Tokenizer, text: str) -> None:
    assert tokenizer.vocab_size == 400
    assert len(tokenizer.encode(text)) < 0.6 * len(text.encode())
    assert len(tokenizer.encode(" the")) == 1


def test_tokenizer_training_repeats_itself(tokenizer: Tokenizer, text: str) -> None:
    assert torch.equal(Tokenizer.train(text, 400).encode(text), tokenizer.encode(text))


def test_tokenizer_saves_and_loads(tokenizer: Tokenizer, text: str, tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    tokenizer.save(path)
    assert torch.equal(Tokenizer.load(path).encode(text), tokenizer.encode(text))
    assert [file.name for file in tmp_path.iterdir()] == ["tokenizer.json"]


@pytest.mark.parametrize("content", [b"", b"{}", b"\xff\xfe", b'{"model": 3}'])
def test_tokenizer_refuses_other_files(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"tokenizer\.json: not a tokenizer\.json"):
        Tokenizer.load(path)


def test_tokenizer_refuses_a_small_vocabulary() -> None:
    with pytest.raises(ValueError, match=r"^vocab_size is 255, must"):
        Tokenizer.train("text", 255)


# Data


def test_sample_text_is_english_and_always_the_same() -> None:
    text = data.sample_text()
    assert len(text) > 300_000
    assert text == data.sample_text()
    assert text.count(" the ") > 2000


def test_split_text_keeps_everything_and_cuts_at_a_line(text: str) -> None:
    train_text, held_out_text = data.split_text(text)
    assert train_text + held_out_text == text
    assert train_text.endswith("\n")
    assert len(held_out_text) == pytest.approx(0.1 * len(text), rel=0.05)
    assert data.split_text("abcdefghij") == ("abcdefghi", "j")


def test_batches_are_windows_and_their_successors() -> None:
    tokens = torch.arange(50)
    inputs, targets = data.random_batch(tokens, 200, 7, torch.Generator().manual_seed(0))
    assert torch.equal(inputs, inputs[:, :1] + torch.arange(7))
    assert torch.equal(targets, inputs + 1)
    assert set(inputs[:, 0].tolist()) == set(range(43))  # the last window ends with the last token

    batches = list(data.consecutive_batches(tokens, 3, 7, 64))
    assert [len(x) for x, _ in batches] == [3, 3, 1]
    assert torch.equal(torch.cat([x for x, _ in batches]).flatten(), torch.arange(49))
    assert torch.equal(torch.cat([y for _, y in batches]).flatten(), torch.arange(1, 50))
    assert sum(len(x) for x, _ in data.consecutive_batches(tokens, 3, 7, 2)) == 2


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"\x89PNG\r\n\x1a\n\x00", "not a text file, or not UTF-8"),
        (b"text\x00text", "zero bytes"),
        (b"", "empty"),
        (b" \n", "empty"),
    ],
)
def test_read_text_refuses(tmp_path: Path, content: bytes, problem: str) -> None:
    path = tmp_path / "file"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"{path}: .*{problem}"):
        data.read_text(path)


def test_read_text_drops_the_byte_order_mark(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes("\ufeffnaïve".encode())
    assert data.read_text(path) == "naïve"


def test_too_short_a_text_is_refused(tokenizer: Tokenizer) -> None:
    with pytest.raises(ValueError, match=r"^text is too short: its held-out part has \d+ tokens"):
        make_trainer(tokenizer, "word " * 60)


# Training


def test_training_lowers_the_loss(tokenizer: Tokenizer, text: str, tmp_path: Path) -> None:
    trainer = make_trainer(tokenizer, text)
    before = trainer.held_out_loss()
    assert before == pytest.approx(math.log(tokenizer.vocab_size), abs=0.1)
    after = training.train(trainer, tmp_path / "model.safetensors", training.Limits(steps=60))
    assert trainer.steps_done == 60
    assert after < before - 1.0
    assert after == trainer.held_out_loss()


def test_held_out_loss_weighs_every_window_alike(tokenizer: Tokenizer, text: str) -> None:
    trainer = make_trainer(tokenizer, text)
    windows = data.consecutive_batches(trainer.held_out_tokens, 1, 32, training.HELD_OUT_WINDOWS)
    losses = [trainer.model(inputs, targets).item() for inputs, targets in windows]
    assert len(losses) == 64
    assert trainer.held_out_loss() == pytest.approx(sum(losses) / len(losses), rel=1e-5)


def test_learning_rate_warms_up_and_decays_to_a_tenth() -> None:
    config = training.TrainingConfig(learning_rate=1.0, warmup_steps=4)
    rates = [training.learning_rate(config, step, 0.0) for step in range(6)]
    assert rates == pytest.approx([0.25, 0.5, 0.75, 1.0, 1.0, 1.0])
    assert training.learning_rate(config, 9, 0.5) == pytest.approx(0.55)
    assert training.learning_rate(config, 9, 1.0) == pytest.approx(0.1)


def test_only_matrices_decay(tokenizer: Tokenizer, text: str) -> None:
    trainer = make_trainer(tokenizer, text)
    decayed, free = trainer.optimizer.param_groups
    assert {p.dim() for p in decayed["params"]} == {2}
    assert {p.dim() for p in free["params"]} == {1}
    assert (decayed["weight_decay"], free["weight_decay"]) == (0.1, 0.0)
    assert len(decayed["params"]) + len(free["params"]) == len(list(trainer.model.parameters()))


def test_resumed_run_equals_an_unbroken_one(
    tokenizer: Tokenizer, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    unbroken = make_trainer(tokenizer, text)
    losses = [unbroken.train_step(step / 12) for step in range(12)]

    path = tmp_path / "model.safetensors"
    broken = make_trainer(tokenizer, text)
    step = broken.train_step

    def interrupted_step(fraction: float) -> float:
        if broken.steps_done == 7:
            raise KeyboardInterrupt
        return step(fraction)

    monkeypatch.setattr(broken, "train_step", interrupted_step)
    with pytest.raises(KeyboardInterrupt):
        training.train(broken, path, training.Limits(steps=12), save_every=5)

    trainer = resumed(path, tokenizer, text)
    assert trainer.steps_done == 5
    assert [trainer.train_step(step / 12) for step in range(5, 12)] == losses[5:]
    assert trainer.held_out_loss() == unbroken.held_out_loss()
    for ours, theirs in zip(trainer.model.parameters(), unbroken.model.parameters()):
        assert torch.equal(ours, theirs)


def test_minutes_count_from_the_first_start(tokenizer: Tokenizer, text: str, tmp_path: Path) -> None:
    path, limits = tmp_path / "model.safetensors", training.Limits(minutes=0.2 / 60)
    trainer = make_trainer(tokenizer, text)
    training.train(trainer, path, limits)
    assert trainer.steps_done > 0
    assert trainer.seconds >= 0.2
    again = resumed(path, tokenizer, text)
    assert again.seconds == trainer.seconds
    with pytest.raises(ValueError, match=r"^\d+ steps and 0\.0 minutes are done already"):
        training.train(again, path, limits)


@pytest.mark.parametrize("limits", [{}, {"steps": 0}, {"minutes": -1.0}, {"minutes": math.nan}])
def test_limits_are_refused(limits: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=f"^{next(iter(limits), 'steps')} .*, (must be positive|one must be given)"):
        training.Limits(**limits)


def test_the_first_limit_ends_training(tokenizer: Tokenizer, text: str) -> None:
    trainer = make_trainer(tokenizer, text)
    trainer.steps_done, trainer.seconds = 30, 30.0
    assert training.Limits(steps=40, minutes=1).fraction_done(trainer) == 0.75
    assert training.Limits(steps=100, minutes=1).fraction_done(trainer) == 0.5


def test_loss_that_is_not_finite_stops_training(tokenizer: Tokenizer, text: str) -> None:
    trainer = make_trainer(tokenizer, text)
    with torch.no_grad():
        trainer.model.norm.weight.fill_(math.nan)
    with pytest.raises(ValueError, match=r"^learning_rate .* the loss became nan"):
        trainer.train_step(0.0)
    assert trainer.steps_done == 0
    assert not torch.isnan(trainer.model.token_embedding.weight).any()


# Checkpoints


@pytest.fixture
def saved(tokenizer: Tokenizer, text: str, tmp_path: Path) -> Path:
    trainer = make_trainer(tokenizer, text)
    trainer.train_step(0.0)
    path = tmp_path / "model.safetensors"
    checkpoint.save(path, trainer.checkpoint())
    return path


def test_checkpoint_rebuilds_the_model(saved: Path, tokenizer: Tokenizer, text: str) -> None:
    trainer = make_trainer(tokenizer, text)
    trainer.train_step(0.0)
    state = checkpoint.load(saved)
    assert not state.training_tensors
    model = checkpoint.build_model(saved, state)
    assert model.config == trainer.model.config
    for name, weight in trainer.model.state_dict().items():
        assert torch.equal(model.state_dict()[name], weight)


def test_interrupted_save_keeps_the_old_checkpoint(
    saved: Path, tokenizer: Tokenizer, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = saved.read_bytes()

    def half_a_file(tensors: dict[str, torch.Tensor], path: Path, metadata: dict[str, str]) -> None:
        path.write_bytes(before[: len(before) // 2])
        raise KeyboardInterrupt

    monkeypatch.setattr(safetensors.torch, "save_file", half_a_file)
    with pytest.raises(KeyboardInterrupt):
        checkpoint.save(saved, make_trainer(tokenizer, text).checkpoint())
    assert saved.read_bytes() == before
    assert list(saved.parent.iterdir()) == [saved]


def test_other_files_are_no_checkpoints(saved: Path, tmp_path: Path) -> None:
    whole = saved.read_bytes()
    path = tmp_path / "other.safetensors"
    for content in (b"", b"garbage" * 100, whole[: len(whole) // 2], whole + b"more"):
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


def test_restore_refuses_another_text(saved: Path, tokenizer: Tokenizer, text: str) -> None:
    with pytest.raises(ValueError, match=r"^text is not the one"):
        make_trainer(tokenizer, text[:-5000]).restore(checkpoint.load(saved, with_training=True))


def test_weights_alone_are_not_resumed(saved: Path, tokenizer: Tokenizer, text: str) -> None:
    state = checkpoint.load(saved, with_training=True)
    assert training.config_of(state) == training.TrainingConfig(learning_rate=3e-3, warmup_steps=5)
    with pytest.raises(ValueError, match=r"^checkpoint lacks the training configuration"):
        training.config_of(checkpoint.Checkpoint(state.config, state.weights, {}, {}))
    with pytest.raises(ValueError, match=r"^checkpoint lacks "):
        make_trainer(tokenizer, text).restore(checkpoint.load(saved))
