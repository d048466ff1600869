"""Training: what each step does, when it ends, and what is learned."""

from __future__ import annotations

import itertools
import math
from pathlib import Path

import pytest
import torch

from fastformer.models import GPT, GPTConfig, checkpoint, data, objectives, pairs, runs, training
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


def test_too_short_a_text_is_refused(tokenizer: Tokenizer) -> None:
    with pytest.raises(ValueError, match=r"^text is too short: its held-out part has \d+ tokens"):
        make_trainer(tokenizer, "word " * 60)


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
    windows = data.consecutive_batches(trainer.held_out_tokens, 1, 32, objectives.HELD_OUT_WINDOWS)
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


@pytest.mark.parametrize(
    "limits",
    [{}, {"steps": 0}, {"steps": 2.5}, {"steps": True}, {"minutes": -1.0}, {"minutes": math.nan}, {"minutes": "1"}],
)
def test_limits_are_refused(limits: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=f"^{next(iter(limits), 'steps')} .*, (must be |one must be given)"):
        training.Limits(**limits)


@pytest.mark.parametrize("save_every", [0, 1.5, True])
def test_save_every_is_checked(save_every: object, tokenizer: Tokenizer, text: str, tmp_path: Path) -> None:
    trainer = make_trainer(tokenizer, text)
    with pytest.raises(ValueError, match=r"^save_every is .*, must be an integer of at least 1"):
        training.train(trainer, tmp_path / "model.safetensors", training.Limits(steps=1), save_every=save_every)
    assert trainer.steps_done == 0


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


class Root(torch.nn.Module):
    """A loss that is finite at weights of zero, where its gradient is not."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(3))

    def forward(self, tokens: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return 1 + self.weight.abs().sqrt().sum()


def test_gradient_that_is_not_finite_stops_training() -> None:
    trainer = training.Trainer(Root(), torch.arange(9), torch.arange(9), 4, training.TrainingConfig())
    with pytest.raises(ValueError, match=r"^learning_rate is 0.001, must be lower: the gradient's norm became nan"):
        trainer.train_step(0.0)
    assert trainer.steps_done == 0
    assert trainer.model.weight.tolist() == [0, 0, 0]


# Options of a step

OPTIONS = {**SIZES, "context_length": 64, "vocab_size": 400}


def material_of(kind: str, text: str) -> runs.Material:
    return pairs.reversed_words(text) if kind == "seq2seq" else data.split_text(text)


@pytest.mark.parametrize("kind", ["gpt", "bert", "seq2seq"])
def test_accumulated_steps_are_those_of_one_large_batch(kind: str, text: str) -> None:
    found = []
    for batch_size, accumulate in ((6, 1), (2, 3)):
        options = {"batch_size": batch_size, "accumulate": accumulate, "warmup_steps": 0, "dropout": 0.0}
        trainer, _ = runs.new_run(kind, material_of(kind, text), OPTIONS | options)
        found.append(([trainer.train_step(0.0) for _ in range(3)], trainer.model))
    (losses, model), (accumulated, other) = found
    assert accumulated == pytest.approx(losses, rel=1e-5)
    for ours, theirs in zip(other.parameters(), model.parameters()):
        assert torch.allclose(ours, theirs, atol=1e-4)


@pytest.mark.parametrize("kind", ["gpt", "bert", "seq2seq"])
def test_checkpointed_activations_change_no_loss_and_no_weight(kind: str, text: str) -> None:
    found = []
    for anew in (False, True):
        options = {**OPTIONS, "dropout": 0.2, "attention_dropout": 0.2, "checkpoint_activations": anew}
        trainer, _ = runs.new_run(kind, material_of(kind, text), options)
        found.append(([trainer.train_step(0.0) for _ in range(2)], list(trainer.model.parameters())))
    (losses, weights), (others, theirs) = found
    assert losses == others
    assert all(torch.equal(a, b) for a, b in zip(weights, theirs, strict=True))


def test_checkpointed_activations_are_computed_once_more(text: str) -> None:
    for anew, calls in ((False, 1), (True, 2)):
        trainer, _ = runs.new_run("gpt", material_of("gpt", text), {**OPTIONS, "checkpoint_activations": anew})
        seen = []
        trainer.model.blocks[0].attention.register_forward_hook(lambda *_, seen=seen: seen.append(1))
        trainer.train_step(0.0)
        assert len(seen) == calls


def test_bf16_autocasts_products_and_keeps_parameters(text: str) -> None:
    losses = {}
    for precision, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        trainer, _ = runs.new_run("gpt", material_of("gpt", text), {**OPTIONS, "precision": precision})
        seen = []
        feed_forward = trainer.model.blocks[0].feed_forward
        feed_forward.register_forward_hook(lambda module, x, y, seen=seen: seen.append(y.dtype))
        losses[precision] = trainer.train_step(0.0)
        assert seen == [dtype]
        assert {p.dtype for p in trainer.model.parameters()} == {torch.float32}
    assert losses["bf16"] == pytest.approx(losses["fp32"], rel=0.01)


def test_gradients_are_clipped(tokenizer: Tokenizer, text: str) -> None:
    trainer = make_trainer(tokenizer, text)
    seen = []
    step = trainer.optimizer.step
    trainer.optimizer.step = lambda: (seen.append([p.grad.clone() for p in trainer.model.parameters()]), step())
    trainer.config = training.TrainingConfig(max_grad_norm=0.01)
    trainer.train_step(0.0)
    assert torch.cat([x.flatten() for x in seen[0]]).norm().item() == pytest.approx(0.01, rel=1e-3)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("batch_size", 0),
        ("batch_size", 2.5),
        ("batch_size", "2"),
        ("accumulate", 0),
        ("accumulate", True),
        ("learning_rate", math.inf),
        ("learning_rate", None),
        ("max_grad_norm", 0.0),
        ("max_grad_norm", "1"),
        ("warmup_steps", -1),
        ("warmup_steps", 1.5),
        ("weight_decay", -0.1),
        ("weight_decay", math.inf),
        ("weight_decay", None),
        ("precision", "fp16"),
        ("precision", ["fp32"]),
        ("checkpoint_activations", "no"),
        ("seed", -1),
        ("seed", 2**63),
        ("seed", 1.0),
    ],
)
def test_training_config_is_checked(name: str, value: object) -> None:
    with pytest.raises(ValueError, match=f"^{name} is .*, must be "):
        training.TrainingConfig(**{name: value})


def test_the_largest_seed_is_taken() -> None:
    trainer = training.Trainer(Root(), torch.arange(9), torch.arange(9), 4, training.TrainingConfig(seed=2**63 - 1))
    assert trainer.generator.initial_seed() == 2**63 - 1


def test_only_stacks_of_blocks_checkpoint_activations() -> None:
    config = training.TrainingConfig(checkpoint_activations=True)
    with pytest.raises(ValueError, match=r"^checkpoint_activations is True, must be False: the model has no Stack"):
        training.Trainer(torch.nn.Linear(2, 2), torch.arange(9), torch.arange(9), 4, config)


# What is learned


def unigram_entropy(tokens: torch.Tensor) -> float:
    """Nats a token: the least loss of a model that sees no other token, even one that knows how often each occurs."""
    shares = tokens.bincount().float() / len(tokens)
    return -(shares.xlogy(shares)).sum().item()


SMALL_RUNS = {
    "gpt": {"vocab_size": 300, "batch_size": 16, "num_heads": 2, "learning_rate": 5e-3},
    "bert": {"vocab_size": 200, "batch_size": 16, "num_heads": 4, "learning_rate": 1e-2, "d_hidden": 128},
}


@pytest.mark.parametrize(("kind", "steps", "margin"), [("gpt", 150, 1.0), ("bert", 500, 0.3)])
def test_held_out_loss_falls_well_below_the_unigram_entropy(
    kind: str, steps: int, margin: float, tmp_path: Path
) -> None:
    options = {"context_length": 64, "num_layers": 2, "d_model": 64, "warmup_steps": 50, **SMALL_RUNS[kind]}
    trainer, _ = runs.new_run(kind, data.split_text(data.sample_text()), options)
    loss = training.train(trainer, tmp_path / "model.safetensors", training.Limits(steps=steps), save_every=1000)
    assert loss < unigram_entropy(trainer.held_out_tokens) - margin


def test_a_small_seq2seq_learns_to_reverse(tmp_path: Path) -> None:
    words = ["red", "green", "blue", "black", "white", "pink", "grey", "brown"]
    sources = [" ".join(x) for count in (1, 2, 3) for x in itertools.product(words, repeat=count)]
    material = pairs.split_pairs([(source, " ".join(reversed(source.split()))) for source in sources])
    options = {"vocab_size": 300, "context_length": 8, "num_layers": 1, "num_heads": 4, "d_model": 64}
    options |= {"d_hidden": 128, "dropout": 0.0, "learning_rate": 5e-3, "warmup_steps": 30}
    trainer, _ = runs.new_run("seq2seq", material, options)
    before = pairs.exact_share(trainer.model, trainer.held_out_tokens)
    training.train(trainer, tmp_path / "model.safetensors", training.Limits(steps=200), save_every=1000)
    assert before < 0.1
    assert pairs.exact_share(trainer.model, trainer.held_out_tokens) > 0.95
