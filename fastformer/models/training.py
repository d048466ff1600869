"""Training: AdamW, warm-up and cosine, clipped gradients, held-out loss, checkpoints that resume exactly."""

from __future__ import annotations

import math
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from fastformer.models.checkpoint import Checkpoint, save
from fastformer.models.files import require
from fastformer.models.layers import Stack
from fastformer.models.log import Log, Row
from fastformer.models.objectives import Batch, NextToken, Objective, digest

PRECISIONS = ("fp32", "bf16")


@dataclass(frozen=True)
class TrainingConfig:
    """How to train.

    Raises:
        ValueError: a value outside its range.
    """

    batch_size: int = 4  # sequences of a forward pass
    learning_rate: float = 1e-3  # at the end of the warm-up; the cosine ends at a tenth of it
    warmup_steps: int = 20
    weight_decay: float = 0.1  # of matrices; vectors have none
    max_grad_norm: float = 1.0
    seed: int = 0
    accumulate: int = 1  # forward passes of a step
    precision: str = "fp32"  # of products and activations; "bf16" by autocast, parameters stay float32
    checkpoint_activations: bool = False  # keep the inputs of blocks alone for backward, which computes the rest anew

    def __post_init__(self) -> None:
        for name in ("batch_size", "accumulate"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, must be at least 1")
        for name in ("learning_rate", "max_grad_norm"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} is {getattr(self, name)}, must be positive and finite")
        for name in ("warmup_steps", "weight_decay"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} is {getattr(self, name)}, must be finite and not negative")
        if self.precision not in PRECISIONS:
            raise ValueError(f"precision is {self.precision!r}, must be one of {', '.join(PRECISIONS)}")


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

    The learning rate follows the share of the run that is done: only with the same steps, and no minutes, is a resumed
    run equal to an unbroken one, to the bit.

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
        model: maps the batches of the objective to the mean loss; of NextToken, (tokens, targets), int64 [B, S] each.
        train_tokens, held_out_tokens: int64 [N], on the CPU, each longer than ``context_length``; of Translation, lists
            of pairs of int64 [S].
        context_length: tokens of a training window, or the most of a source or a target.
        config: how to train.
        objective: what to learn.

    Raises:
        ValueError: the data are too short, or too long, for ``context_length``; or ``checkpoint_activations`` of a
            model that is not one of fastformer.models.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        train_tokens: Any,
        held_out_tokens: Any,
        context_length: int,
        config: TrainingConfig,
        *,
        objective: Objective | None = None,
    ) -> None:
        self.objective = NextToken() if objective is None else objective
        self.objective.check(train_tokens, context_length, "training")
        self.objective.check(held_out_tokens, context_length, "held-out")
        stacks = [module for module in model.modules() if isinstance(module, Stack)]
        if config.checkpoint_activations and not stacks:
            raise ValueError("checkpoint_activations is True, must be False: the model has no Stack of blocks")
        for stack in stacks:
            stack.checkpoint_activations = config.checkpoint_activations
        self.model = model
        self.train_tokens = train_tokens
        self.held_out_tokens = held_out_tokens
        self.context_length = context_length
        self.config = config
        self.optimizer = make_optimizer(model, config)
        self.generator = torch.Generator().manual_seed(config.seed)  # of batches and of the seeds of dropout
        self.steps_done = 0
        self.seconds = 0.0
        self._device = next(model.parameters()).device

    def train_step(self, fraction: float) -> float:
        """One step on the next random batch; ``fraction`` of the run lies behind. Returns the loss.

        torch's own random state is afterwards what it was before: dropout draws from a seed of this step.

        Raises:
            ValueError: the loss is not finite (the weights are left as they were).
        """
        config = self.config
        rows = config.batch_size * config.accumulate
        batch = self.objective.random_batch(self.train_tokens, rows, self.context_length, self.generator)
        parts = _split(batch, config.batch_size)
        counts = [_count(part) for part in parts]
        self.model.train()
        self.optimizer.zero_grad(set_to_none=True)
        value = 0.0
        with self._dropout_seed():
            for part, count in zip(parts, counts, strict=True):
                loss = self._loss(part) * (count / sum(counts))
                value += loss.item()
                loss.backward()
        if not math.isfinite(value):
            raise ValueError(f"learning_rate is {config.learning_rate}, must be lower: the loss became {value}")
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), config.max_grad_norm)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(config, self.steps_done, fraction)
        self.optimizer.step()
        self.steps_done += 1
        return value

    @torch.no_grad()
    def held_out_loss(self) -> float:
        """Mean loss, in nats a token, over at most 64 windows of the held-out text, or 512 held-out pairs."""
        self.model.eval()
        total, count = 0.0, 0
        for batch in self.objective.held_out_batches(self.held_out_tokens, self.config.batch_size, self.context_length):
            targets = _count(batch)
            total += self._loss(batch).item() * targets
            count += targets
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
            "text": digest(self.train_tokens),
        }
        return Checkpoint(self.model.config, self.model.state_dict(), tensors, training)

    def restore(self, checkpoint: Checkpoint) -> None:
        """Go on where ``checkpoint`` (loaded ``with_training``, its weights already in the model) left off.

        Raises:
            ValueError: the text is another one, or the checkpoint lacks part of the state.
        """
        if checkpoint.training.get("text") != digest(self.train_tokens):
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

    def _loss(self, batch: Batch) -> torch.Tensor:
        batch = {name: x.to(self._device) for name, x in batch.items()}
        with torch.autocast(self._device.type, torch.bfloat16, enabled=self.config.precision == "bf16"):
            return self.model(**batch)

    @contextmanager
    def _dropout_seed(self) -> Iterator[None]:
        seed = int(torch.randint(2**62, (), generator=self.generator))
        with torch.random.fork_rng([self._device] if self._device.type == "cuda" else []):
            torch.manual_seed(seed)
            yield


def train(trainer: Trainer, path: Path, limits: Limits, *, save_every: int = 100, log: Log | None = None) -> float:
    """Train until one of the limits, with a progress bar.

    Every ``save_every`` steps, and at the end, measures the held-out loss, writes the log and saves a checkpoint to
    ``path``. Ctrl-C ends the step, saves, and raises KeyboardInterrupt; a second one raises it at once. A run that is
    killed loses what came after the last checkpoint, nothing else.

    Returns:
        The held-out loss at the end, in nats a token.

    Raises:
        KeyboardInterrupt: Ctrl-C.
        ValueError: a limit is reached already, or ``save_every`` is below 1.
    """
    if save_every < 1:
        raise ValueError(f"save_every is {save_every}, must be at least 1")
    fraction = limits.fraction_done(trainer)
    if fraction >= 1:
        raise ValueError(
            f"{trainer.steps_done} steps and {trainer.seconds / 60:.1f} minutes are done already, steps or minutes must"
            " be more"
        )
    began = time.monotonic() - trainer.seconds
    held_out = math.nan
    bar_format = "{percentage:3.0f}% {bar} {elapsed} {postfix}"
    with (
        require("tqdm").tqdm(total=1.0, initial=fraction, bar_format=bar_format) as bar,
        _noted_interrupt() as interrupted,
    ):
        while fraction < 1:
            loss = trainer.train_step(fraction)
            trainer.seconds = time.monotonic() - began
            fraction = limits.fraction_done(trainer)
            measure = fraction >= 1 or trainer.steps_done % save_every == 0
            if measure:
                held_out = trainer.held_out_loss()
            if log is not None:
                rate = trainer.optimizer.param_groups[0]["lr"]
                log.add(Row(trainer.steps_done, loss, held_out if measure else None, rate, trainer.seconds))
            stop = interrupted()
            if measure or stop:
                _save(trainer, path, limits, log)
            measured = "" if math.isnan(held_out) else f" held-out {held_out:.3f}"
            bar.set_postfix_str(f"step {trainer.steps_done} loss {loss:.3f}{measured}", refresh=False)
            bar.update(min(fraction, 1.0) - bar.n)
            if stop and fraction < 1:
                raise KeyboardInterrupt
    return held_out


def config_of(checkpoint: Checkpoint) -> TrainingConfig:
    """How the checkpoint's model was trained.

    Raises:
        ValueError: the checkpoint doesn't say.
    """
    return _stored(checkpoint, "config", TrainingConfig)


def limits_of(checkpoint: Checkpoint) -> Limits:
    """When the checkpoint's run was to end.

    Raises:
        ValueError: the checkpoint doesn't say.
    """
    return _stored(checkpoint, "limits", Limits)


def _stored(checkpoint: Checkpoint, name: str, kind: type) -> Any:
    try:
        return kind(**checkpoint.training[name])
    except (KeyError, TypeError) as error:
        named = "training configuration" if name == "config" else name
        raise ValueError(f"checkpoint lacks the {named}, so training can't go on from it") from error


def _save(trainer: Trainer, path: Path, limits: Limits, log: Log | None) -> None:
    """The log first: rows that come after the checkpoint are dropped by a run that goes on from it."""
    if log is not None:
        log.flush()
    state = trainer.checkpoint()
    state.training["limits"] = asdict(limits)
    save(path, state)


@contextmanager
def _noted_interrupt() -> Iterator[Callable[[], bool]]:
    """Gives a function that says whether there was a Ctrl-C, which raises nothing within; a second one does.

    Elsewhere than in the main thread, and where the program ignores Ctrl-C, it changes nothing.
    """
    before = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or before in (signal.SIG_IGN, None):
        yield lambda: False
        return
    noted = False

    def note(number: int, frame: object) -> None:
        nonlocal noted
        if noted:
            raise KeyboardInterrupt
        noted = True

    signal.signal(signal.SIGINT, note)
    try:
        yield lambda: noted
    finally:
        signal.signal(signal.SIGINT, before)


def _split(batch: Batch, rows: int) -> list[Batch]:
    """Parts of at most ``rows`` rows."""
    parts = zip(*(x.split(rows) for x in batch.values()))
    return [dict(zip(batch, part)) for part in parts]


def _count(batch: Batch) -> int:
    """Targets that count."""
    return int((batch["targets"] != -100).sum())
