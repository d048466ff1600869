"""What a whole model does for a benchmark, by ours and by the plain one: training, inference, generation.

Each job has ``contestant(name)``, one variant of it; ``judge()``, which tells how far a variant's answers are from the
plain model's in float32; and ``constants``, the tensors that no call may change.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from fastformer.models import BERT, GPT, BERTConfig
from fastformer.models.config import TransformerConfig
from fastformer.models.training import TrainingConfig, make_optimizer

from .case import COMPILE, OURS, OURS_COMPILED
from .checking import Kept
from .harness import FORWARD, TRAINING
from .model_work import ModelWork
from .plain_models import Generator, PlainBERT, PlainGPT, PlainLlama, sizes
from .timing import Call

NEW_TOKENS = 32
MAX_GRAD_NORM = 1.0


@dataclass(frozen=True)
class Contestant:
    """One variant.

    Args:
        call: what is timed.
        answer: the tensors by which the job's ``judge`` compares it with the others, which knows its arguments.
        pooled: whether its memory is a CUDA graph's, in a pool where ``memory.peak_bytes`` doesn't see it.
    """

    call: Call
    answer: Callable[..., list[Tensor]]
    pooled: bool = False


Judge = Callable[[Contestant], float]  # see distance


class Job(Protocol):
    """One of those below."""

    constants: list[Tensor]

    def contestant(self, name: str) -> Contestant:
        """A variant by its name."""

    def judge(self) -> Judge:
        """Of contestants as they are now."""


class Pair:
    """Our model and the plain one, with one set of parameters."""

    def __init__(self, config: TransformerConfig, device: torch.device, dtype: torch.dtype) -> None:
        self.config, self.device = config, device
        torch.manual_seed(0)
        with device:
            self.ours = (BERT if isinstance(config, BERTConfig) else GPT)(config).to(dtype)
            self.plain = plain_model(config).to(dtype)
        self.plain.load_state_dict(self.ours.state_dict(keep_vars=True), assign=True)

    def model(self, name: str) -> torch.nn.Module:
        """That of a variant."""
        return self.ours if name in (OURS, OURS_COMPILED) else self.plain

    def exact(self) -> torch.nn.Module:
        """The plain model with the parameters as they are now, in float32."""
        with self.device:
            exact = plain_model(self.config)
        exact.load_state_dict(self.plain.state_dict())
        return exact

    def random_tokens(self, *shape: int) -> Tensor:
        """Of the vocabulary."""
        return torch.randint(self.plain.token_embedding.num_embeddings, shape, device=self.device)


def plain_model(config: TransformerConfig) -> torch.nn.Module:
    """The model of a configuration in plain PyTorch."""
    if isinstance(config, BERTConfig):
        return PlainBERT(**sizes(config), norm_eps=config.norm_eps)
    if config.positions == "learned":
        return PlainGPT(**sizes(config))
    return PlainLlama(
        **sizes(config),
        num_kv_heads=config.kv_heads,
        d_hidden=config.hidden_width,
        norm_eps=config.norm_eps,
        rotary_base=config.rotary_base,
    )


class TrainStep:
    """Forward and backward pass, clipping of gradients, fused AdamW. Every token has a target, BERT's too.

    Each step changes the parameters, which all variants share. What is judged are the loss and every parameter's
    gradient, at the parameters of the beginning: after steps on one batch the gradients are nearly 0, and rounding
    errors are as large as they. Clipping and AdamW are the same for all.
    """

    mode = TRAINING

    def __init__(self, pair: Pair, batch: int, length: int) -> None:
        self.pair = pair
        self.parameters = list(pair.plain.parameters())
        self.beginning = Kept(dict(pair.plain.named_parameters()))
        self.optimizer = make_optimizer(pair.plain, TrainingConfig())
        self.batch = pair.random_tokens(2, batch, length)
        self.constants = [self.batch]
        self.work = ModelWork.of(pair.plain, batch).training(length)
        self.shape, self.sizes, self.tokens = f"{batch}x{length}", {"batch": batch, "length": length}, batch * length

    def contestant(self, name: str) -> Contestant:
        model = _compiled(self.pair.model(name), name)
        return Contestant(partial(self._step, model), partial(self._gradients, model, self.parameters))

    def judge(self) -> Judge:
        self.beginning.restore()
        exact = self.pair.exact()
        right = self._gradients(exact, list(exact.parameters()))
        return lambda contestant: distance(contestant.answer(), right)

    def _step(self, model: Callable[..., Tensor]) -> None:
        model(*self.batch).backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, MAX_GRAD_NORM)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def _gradients(self, model: Callable[..., Tensor], parameters: list[torch.nn.Parameter]) -> list[Tensor]:
        """Behind the loss."""
        loss = model(*self.batch)
        return [loss.detach(), *torch.autograd.grad(loss, parameters)]


class Inference:
    """Logits of every token."""

    mode = FORWARD

    def __init__(self, pair: Pair, batch: int, length: int) -> None:
        self.pair = pair
        self.batch = pair.random_tokens(batch, length)
        self.constants = [self.batch, *pair.plain.parameters()]
        self.work = ModelWork.of(pair.plain, batch).inference(length)
        self.shape, self.sizes, self.tokens = f"{batch}x{length}", {"batch": batch, "length": length}, batch * length

    def contestant(self, name: str) -> Contestant:
        forward = torch.no_grad()(partial(_compiled(self.pair.model(name), name), self.batch))
        return Contestant(forward, lambda: [forward()])

    def judge(self) -> Judge:
        with torch.no_grad():
            right = [self.pair.exact()(self.batch)]
        return lambda contestant: distance(contestant.answer(), right)


class Generation:
    """Greedy, with a cache of keys and values in room allotted once.

    The step of plain torch that is compiled has one shape for all positions (see plain_models.Generator), so that it
    can be a CUDA graph; ours is compiled as it is, for any position, which a CUDA graph can't be.
    """

    mode = FORWARD

    def __init__(self, pair: Pair, batch: int, length: int) -> None:
        self.pair = pair
        self.prompt = pair.random_tokens(batch, length)
        self.constants = [self.prompt, *pair.plain.parameters()]
        self.work = ModelWork.of(pair.plain, batch).generation(length, NEW_TOKENS)
        self.shape, self.tokens = f"{batch}x{length}+{NEW_TOKENS}", batch * NEW_TOKENS
        self.sizes = {"batch": batch, "length": length, "new_tokens": NEW_TOKENS}

    def contestant(self, name: str) -> Contestant:
        model = self.pair.model(name)
        if name in (OURS, OURS_COMPILED):
            if name == OURS_COMPILED:
                model = copy.copy(model)
                model.features = torch.compile(model.features)
            return Contestant(
                partial(model.generate, self.prompt, NEW_TOKENS, temperature=0), partial(self._logits_of_ours, model)
            )
        options = None
        if name == COMPILE:
            options = {"fullgraph": True, "dynamic": False}
            options["mode"] = "reduce-overhead" if self.prompt.is_cuda else None
        batch, length = self.prompt.shape
        generator = Generator(model, batch, length + NEW_TOKENS, options)
        return Contestant(
            partial(generator.generate, self.prompt, NEW_TOKENS),
            partial(self._logits, generator),
            pooled=generator.kept is not None,
        )

    def judge(self) -> Judge:
        return partial(self._error, self.pair.exact())

    @torch.no_grad()
    def _error(self, exact: torch.nn.Module, contestant: Contestant) -> float:
        """The distance of the worst step's logits, given the tokens that a call has generated; infinite where those
        are not what such logits make likeliest.

        The call's own logits are not to be had. Those that the same steps give once more, fed the call's tokens, differ
        from exact ones by some ``error`` at most; so the token of the largest is, by the exact ones, at most twice that
        behind the likeliest. In float32 that leaves next to no choice.
        """
        tokens, length = contestant.call(), self.prompt.shape[1]
        if tokens.shape != (len(self.prompt), length + NEW_TOKENS) or not torch.equal(tokens[:, :length], self.prompt):
            return math.inf
        seen = tokens[:, :-1]
        features = exact.features(seen, torch.arange(seen.shape[1], device=seen.device))
        right = list(exact.unembed(features[:, length - 1 :]).unbind(1))  # of each step [B, V]
        answer = contestant.answer(tokens)
        for chosen, logits, likely in zip(tokens[:, length:].unbind(1), answer, right, strict=True):
            error = (logits.double() - likely).abs().amax(-1)
            behind = likely.double().amax(-1) - likely.gather(-1, chosen[:, None])[:, 0]
            if not (behind <= 2 * error).all():  # nor if it is NaN
                return math.inf
        return distance(answer, right)

    # The logits of each step, [B, V], from tokens of generation's shapes and strides: others would be compiled apart.

    def _logits(self, generator: Generator, tokens: Tensor) -> list[Tensor]:
        cache = generator.cache()
        return [generator.logits(pending, start, cache).clone() for start, pending in self._steps(tokens)]

    def _logits_of_ours(self, model: GPT, tokens: Tensor) -> list[Tensor]:
        cache = model.new_cache(*tokens.shape)
        return [model.unembed(model.features(pending, cache)[:, -1]) for _, pending in self._steps(tokens)]

    def _steps(self, tokens: Tensor) -> list[tuple[int, Tensor]]:
        """The prompt, then all but the last of the tokens behind it one by one, each with its position."""
        length = self.prompt.shape[1]
        # Not contiguous(), which leaves a single sequence its strides. [NEW_TOKENS - 1, B, 1]
        columns = tokens[:, length:-1].T.clone(memory_format=torch.contiguous_format).unsqueeze(-1)
        return [(0, self.prompt), *enumerate(columns, start=length)]


def _compiled(model: torch.nn.Module, name: str) -> Callable[..., Tensor]:
    """The model as a variant runs it."""
    return torch.compile(model, fullgraph=True, dynamic=False) if name in (COMPILE, OURS_COMPILED) else model


def distance(answer: list[Tensor], right: list[Tensor]) -> float:
    """The norm of the difference as a share of the right tensor's norm, of the pair where it is largest.

    NaN if any is.
    """
    shares = [
        torch.linalg.vector_norm((a - b).double()) / torch.linalg.vector_norm(b.double())
        for a, b in zip(answer, right, strict=True)
    ]
    return torch.stack(shares).max().item()
