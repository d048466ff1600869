"""Training: AdamW, warm-up and cosine, clipped gradients, held-out loss, checkpoints that resume exactly."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from fastformer.models.checkpoint import Checkpoint, save
from fastformer.models.config import _check_choice, _check_flag, _check_number, _check_size
from fastformer.models.files import require
from fastformer.models.interrupts import noted_interrupt
from fastformer.models.layers import Stack
from fastformer.models.log import Log, Row
from fastformer.models.objectives import Batch, NextToken, Objective, digest

PRECISIONS = ("fp32", "bf16")

#: What AdamW keeps of each parameter that has had a gradient.
MOMENTS = ("step", "exp_avg", "exp_avg_sq")


class Divergence(ValueError):
    """The loss, a gradient or a weight is not finite any more."""


def check_seed(seed: object) -> None:
    """ValueError unless it is one that torch's generators take."""
    if not isinstance(seed, int) or isinstance(seed, bool) or not 0 <= seed < 2**63:
        raise ValueError(f"seed is {seed!r}, must be an integer of at least 0 and below 2**63")


@dataclass(frozen=True)
class TrainingConfig:
    """How to train.

    Raises:
        ValueError: a field is not what it must be; names the field.
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
        for name, least in (("batch_size", 1), ("accumulate", 1), ("warmup_steps", 0)):
            _check_size(name, getattr(self, name), least)
        for name in ("learning_rate", "max_grad_norm"):
            _check_number(name, getattr(self, name), above=0.0)
        decay = self.weight_decay
        if not isinstance(decay, int | float) or isinstance(decay, bool) or not 0 <= decay < math.inf:
            raise ValueError(f"weight_decay is {decay!r}, must be finite and not negative")
        check_seed(self.seed)
        _check_choice("precision", self.precision, PRECISIONS)
        _check_flag("checkpoint_activations", self.checkpoint_activations)


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
        ValueError: neither is given, or one is not what it must be: steps a positive integer, minutes positive and
            finite.
    """

    steps: int | None = None
    minutes: float | None = None

    def __post_init__(self) -> None:
        if self.steps is None and self.minutes is None:
            raise ValueError("steps and minutes are None, one must be given")
        if self.steps is not None:
            _check_size("steps", self.steps)
        if self.minutes is not None:
            _check_number("minutes", self.minutes, above=0.0)

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
            Divergence: the loss or its gradient is not finite (the weights are left as they were).
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
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), config.max_grad_norm).item()
        for what, x in (("the loss", value), ("the gradient's norm", norm)):
            if not math.isfinite(x):
                raise self._divergence(f"{what} became {x}")
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(config, self.steps_done, fraction)
        self.optimizer.step()
        self.steps_done += 1
        return value

    @torch.no_grad()
    def held_out_loss(self, batches: int | None = None) -> float:
        """Mean loss, in nats a token, over at most 64 windows of the held-out text, or 512 held-out pairs.

        Args:
            batches: measure with the first so many alone.
        """
        self.model.eval()
        total, count = 0.0, 0
        size, length = self.config.batch_size, self.context_length
        for batch in islice(self.objective.held_out_batches(self.held_out_tokens, size, length), batches):
            targets = _count(batch)
            total += self._loss(batch).item() * targets
            count += targets
        return total / count

    def check_finite(self, held_out_loss: float) -> None:
        """Raise Divergence unless the loss, each weight and what the optimizer keeps of it are finite."""
        if not math.isfinite(held_out_loss):
            raise self._divergence(f"the held-out loss became {held_out_loss}")
        state = self.checkpoint()
        for name, x in (state.weights | state.training_tensors).items():
            if not x.isfinite().all():
                raise self._divergence(f"{name} became infinite or NaN")

    def checkpoint(self) -> Checkpoint:
        """All of it (tensors shared, not copied)."""
        states = self.optimizer.state
        names = {name: states[parameter] for name, parameter in self.model.named_parameters() if parameter in states}
        tensors = {f"optimizer.{name}.{key}": state[key] for name, state in names.items() for key in MOMENTS}
        tensors["generator"] = self.generator.get_state()
        training = {
            "config": asdict(self.config),
            "steps_done": self.steps_done,
            "seconds": self.seconds,
            "data": self._digests,
            "optimizer": list(names),  # the parameters that it has a state of
        }
        return Checkpoint(self.model.config, self.model.state_dict(), tensors, training)

    def restore(self, checkpoint: Checkpoint) -> None:
        """Go on where ``checkpoint`` (loaded ``with_training``, its weights already in the model) left off.

        Raises:
            ValueError: the data are others, or the checkpoint lacks part of the state.
        """
        tensors, training = checkpoint.training_tensors, checkpoint.training
        parameters = dict(self.model.named_parameters())
        states = {}
        try:
            for part, found in self._digests.items():
                if training["data"][part] != found:
                    raise ValueError(
                        f"text or pairs are not those that the checkpoint was trained with: the {part} part is another"
                    )
            for name in training["optimizer"]:
                if name not in parameters:
                    raise ValueError(f"checkpoint has optimizer state of {name}, which the model lacks")
                parameter = parameters[name]
                state = {key: tensors[f"optimizer.{name}.{key}"].to(parameter.device, copy=True) for key in MOMENTS}
                if state["exp_avg"].shape != parameter.shape or state["exp_avg_sq"].shape != parameter.shape:
                    raise ValueError(f"checkpoint has optimizer state of another shape than {name}")
                states[parameter] = state
            steps_done, seconds = int(training["steps_done"]), float(training["seconds"])
            self.generator.set_state(tensors["generator"])
        except KeyError as error:
            raise ValueError(f"checkpoint lacks {error}, so training can't go on from it") from error
        self.steps_done, self.seconds = steps_done, seconds
        self.optimizer.state.clear()
        self.optimizer.state.update(states)

    @cached_property
    def _digests(self) -> dict[str, str]:
        return {"training": digest(self.train_tokens), "held-out": digest(self.held_out_tokens)}

    def _divergence(self, what: str) -> Divergence:
        return Divergence(f"learning_rate is {self.config.learning_rate}, must be lower: {what}")

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
    killed, or diverges, loses what came after the last checkpoint, nothing else.

    Returns:
        The held-out loss at the end, in nats a token.

    Raises:
        KeyboardInterrupt: Ctrl-C.
        Divergence: the loss, a gradient or a weight is not finite; says which file keeps the last good checkpoint.
        ValueError: a limit is reached already, or ``save_every`` is not a positive integer.
    """
    _check_size("save_every", save_every)
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
        noted_interrupt() as interrupted,
        _naming_what_is_kept(path),
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
                # After Ctrl-C one batch has to do: nobody waits for more.
                trainer.check_finite(held_out if measure else trainer.held_out_loss(batches=1))
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
def _naming_what_is_kept(path: Path) -> Iterator[None]:
    """Adds to the message of a Divergence what became of the checkpoint."""
    try:
        yield
    except Divergence as error:
        kept = f"{path} keeps the last good checkpoint" if path.exists() else "nothing was saved"
        raise Divergence(f"{error}; {kept}") from error


def _split(batch: Batch, rows: int) -> list[Batch]:
    """Parts of at most ``rows`` rows."""
    parts = zip(*(x.split(rows) for x in batch.values()))
    return [dict(zip(batch, part)) for part in parts]


def _count(batch: Batch) -> int:
    """Targets that count."""
    return int((batch["targets"] != -100).sum())
