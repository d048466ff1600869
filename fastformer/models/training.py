"""Training a GPT: AdamW, warm-up and cosine, clipped gradients, held-out loss, checkpoints that resume exactly."""

from __future__ import annotations

import hashlib
import math
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from fastformer.models.checkpoint import Checkpoint, save
from fastformer.models.data import check_length, consecutive_batches, random_batch
from fastformer.models.files import require

HELD_OUT_WINDOWS = 64  # of context_length tokens, at most


@dataclass(frozen=True)
class TrainingConfig:
    """How to train.

    Raises:
        ValueError: a value outside its range.
    """

    batch_size: int = 4
    learning_rate: float = 1e-3  # at the end of the warm-up; the cosine ends at a tenth of it
    warmup_steps: int = 20
    weight_decay: float = 0.1  # of matrices; vectors have none
    max_grad_norm: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise ValueError(f"batch_size is {self.batch_size}, must be at least 1")
        if not 0 < self.learning_rate < math.inf:
            raise ValueError(f"learning_rate is {self.learning_rate}, must be positive and finite")


def config_of(checkpoint: Checkpoint) -> TrainingConfig:
    """How the checkpoint's model was trained.

    Raises:
        ValueError: the checkpoint doesn't say.
    """
    try:
        return TrainingConfig(**checkpoint.training["config"])
    except (KeyError, TypeError) as error:
        raise ValueError("checkpoint lacks the training configuration, so training can't go on from it") from error


def make_optimizer(model: torch.nn.Module, config: TrainingConfig) -> torch.optim.AdamW:
    """AdamW that decays matrices only."""
    parameters = list(model.parameters())
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=(0.9, 0.95), fused=True)


def learning_rate(config: TrainingConfig, step: int, fraction: float) -> float:
    """Rate of a step: a linear warm-up by steps, times a cosine over the fraction of the run that is done."""
    warmup = min(1.0, (step + 1) / config.warmup_steps) if config.warmup_steps else 1.0
    return config.learning_rate * warmup * (0.1 + 0.45 * (1 + math.cos(math.pi * fraction)))


@dataclass(frozen=True)
class Limits:
    """When training ends: at the first of these, both counted from the start of the run, before any resuming.

    Raises:
        ValueError: neither is given, or one is not positive and finite.
    """

    steps: int | None = None
    minutes: float | None = None

    def __post_init__(self) -> None:
        if self.steps is None and self.minutes is None:
            raise ValueError("steps and minutes are None, one must be given")
        for name, limit in asdict(self).items():
            if limit is not None and not 0 < limit < math.inf:
                raise ValueError(f"{name} is {limit}, must be positive and finite")

    def fraction_done(self, trainer: Trainer) -> float:
        """How much of the run lies behind; 1 or more at its end."""
        by_steps = trainer.steps_done / self.steps if self.steps is not None else 0.0
        by_time = trainer.seconds / (60 * self.minutes) if self.minutes is not None else 0.0
        return max(by_steps, by_time)


class Trainer:
    """A model in training, with all that its next step depends on.

    Args:
        model: maps (tokens, targets), int64 [B, S] each, to the mean loss.
        train_tokens, held_out_tokens: int64 [N], on the CPU; each longer than ``context_length``.
        context_length: tokens of a training window.
        config: how to train.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        train_tokens: Tensor,
        held_out_tokens: Tensor,
        context_length: int,
        config: TrainingConfig,
    ) -> None:
        check_length(train_tokens, context_length, "training")
        check_length(held_out_tokens, context_length, "held-out")
        self.model = model
        self.train_tokens = train_tokens
        self.held_out_tokens = held_out_tokens
        self.context_length = context_length
        self.config = config
        self.optimizer = make_optimizer(model, config)
        self.generator = torch.Generator().manual_seed(config.seed)
        self.steps_done = 0
        self.seconds = 0.0
        self._device = next(model.parameters()).device

    def train_step(self, fraction: float) -> float:
        """One step on the next random batch; ``fraction`` of the run lies behind. Returns the loss.

        Raises:
            ValueError: the loss is not finite (the weights are left as they were).
        """
        batch = random_batch(self.train_tokens, self.config.batch_size, self.context_length, self.generator)
        inputs, targets = (x.to(self._device) for x in batch)
        self.model.train()
        loss = self.model(inputs, targets)
        value = loss.item()
        if not math.isfinite(value):
            raise ValueError(f"learning_rate is {self.config.learning_rate}, must be lower: the loss became {value}")
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.config.max_grad_norm)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.config, self.steps_done, fraction)
        self.optimizer.step()
        self.steps_done += 1
        return value

    @torch.no_grad()
    def held_out_loss(self) -> float:
        """Mean loss, in nats a token, over at most 64 windows of the held-out text."""
        self.model.eval()
        total, count = 0.0, 0
        batches = consecutive_batches(
            self.held_out_tokens, self.config.batch_size, self.context_length, HELD_OUT_WINDOWS
        )
        for inputs, targets in batches:
            total += self.model(inputs.to(self._device), targets.to(self._device)).item() * len(inputs)
            count += len(inputs)
        return total / count

    def checkpoint(self) -> Checkpoint:
        """All of it (tensors shared, not copied)."""
        names = {parameter: name for name, parameter in self.model.named_parameters()}
        tensors = {
            f"optimizer.{names[parameter]}.{key}": value
            for parameter, state in self.optimizer.state.items()
            for key, value in state.items()
        }
        tensors["generator"] = self.generator.get_state()
        training = {
            "config": asdict(self.config),
            "steps_done": self.steps_done,
            "seconds": self.seconds,
            "text": _digest(self.train_tokens),
        }
        return Checkpoint(self.model.config, self.model.state_dict(), tensors, training)

    def restore(self, checkpoint: Checkpoint) -> None:
        """Go on where ``checkpoint`` (loaded ``with_training``, its weights already in the model) left off.

        Raises:
            ValueError: the text is another one, or the checkpoint lacks part of the state.
        """
        if checkpoint.training.get("text") != _digest(self.train_tokens):
            raise ValueError("text is not the one that the checkpoint was trained on")
        tensors = checkpoint.training_tensors
        try:
            for name, parameter in self.model.named_parameters():
                keys = ("step", "exp_avg", "exp_avg_sq")
                state = {key: tensors[f"optimizer.{name}.{key}"].to(parameter.device) for key in keys}
                if state["exp_avg"].shape != parameter.shape or state["exp_avg_sq"].shape != parameter.shape:
                    raise ValueError(f"checkpoint has optimizer state of another shape than {name}")
                self.optimizer.state[parameter] = state
            self.generator.set_state(tensors["generator"])
            self.steps_done = int(checkpoint.training["steps_done"])
            self.seconds = float(checkpoint.training["seconds"])
        except KeyError as error:
            raise ValueError(f"checkpoint lacks {error}, so training can't go on from it") from error


def train(trainer: Trainer, path: Path, limits: Limits, *, save_every: int = 100) -> float:
    """Train until one of the limits, with a progress bar.

    Every ``save_every`` steps, and at the end, measures the held-out loss and saves a checkpoint to ``path``. An
    interrupted run loses what came after the last checkpoint, nothing else.

    Returns:
        The held-out loss at the end, in nats a token.

    Raises:
        ValueError: a limit is reached already.
    """
    fraction = limits.fraction_done(trainer)
    if fraction >= 1:
        raise ValueError(
            f"{trainer.steps_done} steps and {trainer.seconds / 60:.1f} minutes are done already, steps or minutes must"
            " be more"
        )
    began = time.monotonic() - trainer.seconds
    held_out = math.nan
    bar_format = "{percentage:3.0f}% {bar} {elapsed} {postfix}"
    with require("tqdm").tqdm(total=1.0, initial=fraction, bar_format=bar_format) as bar:
        while fraction < 1:
            loss = trainer.train_step(fraction)
            trainer.seconds = time.monotonic() - began
            fraction = limits.fraction_done(trainer)
            if fraction >= 1 or trainer.steps_done % save_every == 0:
                held_out = trainer.held_out_loss()
                save(path, trainer.checkpoint())
            measured = "" if math.isnan(held_out) else f" held-out {held_out:.3f}"
            bar.set_postfix_str(f"step {trainer.steps_done} loss {loss:.3f}{measured}", refresh=False)
            bar.update(min(fraction, 1.0) - bar.n)
    return held_out


def _digest(tokens: Tensor) -> str:
    return hashlib.sha256(require("numpy").ascontiguousarray(tokens)).hexdigest()
