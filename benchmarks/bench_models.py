"""Whole models beside the same in plain PyTorch, each eagerly and under torch.compile: training, inference, generation.

All variants of a row have one set of random weights, which change nothing about the time; nor do random tokens.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

import fastformer
from fastformer.models import BERT, GPT, BERTConfig, GPTConfig
from fastformer.models.config import TransformerConfig
from fastformer.models.training import TrainingConfig, make_optimizer

from .checking import describe
from .harness import FORWARD, OURS, TRAINING, Limits, Pace, Row, Timer, measure, short_name
from .memory import peak_bytes
from .model_work import ModelWork
from .plain_models import Generator, PlainBERT, PlainGPT, PlainLlama, sizes
from .timing import Call

GPT2 = GPTConfig(50257, context_length=1024, num_layers=12, num_heads=12, d_model=768)
BERT_BASE = BERTConfig(30522, context_length=512, num_layers=12, num_heads=12, d_model=768)
LLAMA_OPTIONS = {
    "positions": "rotary",
    "norm": "rms_norm",
    "activation": "swiglu",
    "bias": False,
    "tied_unembedding": False,
}
LLAMA = GPTConfig(
    32000,
    context_length=1024,
    num_layers=8,
    num_heads=12,
    d_model=768,
    num_kv_heads=4,
    d_hidden=2048,
    **LLAMA_OPTIONS,
)
# TinyLlama's sizes (arXiv 2401.02385): 1.1 billion parameters.
LLAMA_1B = GPTConfig(
    32000,
    context_length=2048,
    num_layers=22,
    num_heads=32,
    d_model=2048,
    num_kv_heads=4,
    d_hidden=5632,
    **LLAMA_OPTIONS,
)
PROMPT, NEW_TOKENS = 128, 64
MAX_GRAD_NORM = 1.0
# Of our ``distance`` from the plain model in float32. Eager torch's own is up to 0.17 in bfloat16, ours 0.02.
TOLERANCE = {torch.bfloat16: 0.05, torch.float32: 2e-5}
PEER_FACTOR = 2.0  # a compiled variant's distance may be so many times that of eager torch


@dataclass(frozen=True)
class Model:
    """A model's sizes, and those of its batches in training and inference."""

    config: TransformerConfig
    batch: int
    length: int


# By kind of device: steps of a second or so.
MODELS = {
    "cpu": {
        "gpt2": Model(GPT2, 1, 512),
        "bert": Model(BERT_BASE, 1, 512),
        "llama": Model(LLAMA, 1, 512),
    },
    "cuda": {
        "gpt2": Model(GPT2, 16, 1024),
        "bert": Model(BERT_BASE, 32, 512),
        "llama": Model(LLAMA_1B, 2, 2048),
    },
}


@dataclass(frozen=True)
class Task:
    """What a row is about."""

    operation: str  # of OPERATIONS
    model: str  # of MODELS
    dtype: torch.dtype
    prompts: int = 0  # of generation


TASKS = (
    Task("train_step", "gpt2", torch.bfloat16),
    Task("train_step", "gpt2", torch.float32),
    Task("train_step", "bert", torch.bfloat16),
    Task("train_step", "llama", torch.bfloat16),
    Task("inference", "bert", torch.bfloat16),
    Task("generation", "gpt2", torch.bfloat16, prompts=1),
    Task("generation", "gpt2", torch.float32, prompts=1),
    Task("generation", "gpt2", torch.bfloat16, prompts=8),
    Task("generation", "llama", torch.bfloat16, prompts=1),
)
COUNT = len(TASKS)
EAGER, COMPILED, OURS_COMPILED = "eager", "compile", "ours: compile"
EXACT = "exact"  # the plain model in float32, for its answer alone


@dataclass(frozen=True)
class Contestant:
    """One variant: what is timed of it, and the tensors by which it is compared with the others."""

    call: Call
    answer: Callable[[], list[Tensor]]


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
        """That of a variant, or EXACT."""
        if name == EXACT:
            with self.device:
                exact = plain_model(self.config)
            exact.load_state_dict(self.plain.state_dict())  # in float32
            return exact
        return self.ours if name.startswith(OURS) else self.plain

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
    """Forward and backward pass, clipping of gradients, fused AdamW. Every token has a target, BERT's too."""

    mode = TRAINING

    def __init__(self, pair: Pair, batch: int, length: int) -> None:
        self.pair = pair
        self.parameters = list(pair.plain.parameters())
        self.optimizer = make_optimizer(pair.plain, TrainingConfig())
        self.batch = pair.random_tokens(2, batch, length)
        self.work = ModelWork.of(pair.plain, batch).training(length)
        self.shape, self.sizes, self.tokens = f"{batch}x{length}", {"batch": batch, "length": length}, batch * length

    def contestant(self, name: str) -> Contestant:
        model = _compiled(self.pair.model(name), name)
        parameters = list(model.parameters()) if name == EXACT else self.parameters
        return Contestant(partial(self._step, model), partial(self._gradients, model, parameters))

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
        self.work = ModelWork.of(pair.plain, batch).inference(length)
        self.shape, self.sizes, self.tokens = f"{batch}x{length}", {"batch": batch, "length": length}, batch * length

    def contestant(self, name: str) -> Contestant:
        forward = torch.no_grad()(partial(_compiled(self.pair.model(name), name), self.batch))
        return Contestant(forward, lambda: [forward()])


class Generation:
    """Greedy, with a cache of keys and values in room allotted once.

    The step of plain torch that is compiled has one shape for all positions (see plain_models.Generator), so that it
    can be a CUDA graph; ours is compiled as it is, for any position, which a CUDA graph can't be.
    """

    mode = FORWARD

    def __init__(self, pair: Pair, batch: int, length: int) -> None:
        self.pair = pair
        self.prompt = pair.random_tokens(batch, length)
        self.work = ModelWork.of(pair.plain, batch).generation(length, NEW_TOKENS)
        self.shape, self.tokens = f"{batch}x{length}+{NEW_TOKENS}", batch * NEW_TOKENS
        self.sizes = {"batch": batch, "length": length, "new_tokens": NEW_TOKENS}

    def contestant(self, name: str) -> Contestant:
        if name.startswith(OURS):
            model = self.pair.ours
            if name == OURS_COMPILED:
                model = copy.copy(model)
                model.features = torch.compile(model.features)
            return Contestant(
                partial(model.generate, self.prompt, NEW_TOKENS, temperature=0), partial(self._logits_of_ours, model)
            )
        options = None
        if name == COMPILED:
            options = {"fullgraph": True, "dynamic": False}
            options["mode"] = "reduce-overhead" if self.prompt.is_cuda else None
        batch, length = self.prompt.shape
        generator = Generator(self.pair.model(name), batch, length + NEW_TOKENS, options)
        return Contestant(partial(generator.generate, self.prompt, NEW_TOKENS), partial(self._logits, generator))

    # Logits of a token behind the prompt, in shapes that generation has too, or they would be compiled for nothing.

    @torch.no_grad()
    def _logits(self, generator: Generator) -> list[Tensor]:
        generator.logits(self.prompt, 0)
        return [generator.logits(self.prompt[:, :1], self.prompt.shape[1]).clone()]

    @torch.no_grad()
    def _logits_of_ours(self, model: GPT) -> list[Tensor]:
        batch, length = self.prompt.shape
        cache = model.new_cache(batch, length + NEW_TOKENS)
        model.features(self.prompt, cache)
        return [model.unembed(model.features(self.prompt[:, :1], cache)[:, -1])]


def _compiled(model: torch.nn.Module, name: str) -> Callable[..., Tensor]:
    """The model as a variant runs it."""
    return torch.compile(model, fullgraph=True, dynamic=False) if name in (COMPILED, OURS_COMPILED) else model


OPERATIONS = {"train_step": TrainStep, "inference": Inference, "generation": Generation}


def rows(
    device: torch.device,
    timer: Timer,
    limits: Limits,
    pace: Pace,
    rng: random.Random,
    wanted: Callable[[str], bool],
) -> Iterator[Row]:
    """A row for each of TASKS in a mode that is wanted. ``auto`` chooses our kernels, as it does for a user.

    Args:
        wanted: whether a variant is to be timed, by its name; ours always is.
    """
    for task in TASKS:
        if OPERATIONS[task.operation].mode not in pace.modes:
            continue
        row = Row(task.operation, task.model, short_name(task.dtype), OPERATIONS[task.operation].mode, "auto")
        try:
            with fastformer.backend("auto"):
                _fill(row, task, device, timer, limits, pace, rng, wanted)
        except Exception as error:  # such as too little memory; the other models go on
            row.problem = describe(error)
        finally:
            # Frees the compiled models; and rows share a limit of recompilations, behind which code runs eagerly.
            torch._dynamo.reset()
        yield row


def _fill(
    row: Row,
    task: Task,
    device: torch.device,
    timer: Timer,
    limits: Limits,
    pace: Pace,
    rng: random.Random,
    wanted: Callable[[str], bool],
) -> None:
    """The verdict, and where it is good the times and the memory of all variants."""
    model, tolerance = MODELS[device.type][task.model], TOLERANCE[task.dtype]
    batch, length = (task.prompts, PROMPT) if task.prompts else (model.batch, model.length)
    job = OPERATIONS[task.operation](Pair(model.config, device, task.dtype), batch, length)
    row.shape, row.sizes, row.tokens = f"{task.model} {job.shape}", job.sizes, job.tokens
    row.bytes, row.flops = job.work.bytes, job.work.flops
    row.limit, row.limit_seconds = limits.bound(job.work, task.dtype)
    ours, eager, right = job.contestant(OURS), job.contestant(EAGER), job.contestant(EXACT).answer()
    row.error_share = distance(ours.answer(), right) / tolerance
    if not row.error_share <= 1:  # nor if it is NaN
        row.problem = f"wrong answer: {row.error_share:.3g}x the allowed error"
        return
    calls = {OURS: ours.call} | ({EAGER: eager.call} if wanted(EAGER) else {})
    allowed = max(tolerance, PEER_FACTOR * distance(eager.answer(), right))
    for name in (COMPILED, OURS_COMPILED):
        if wanted(name) and wanted(COMPILED):
            found = pace.why_not_compile() or _checked(job, name, right, allowed)
            (row.peers if isinstance(found, str) else calls)[name] = found
    del right  # gradients of all parameters, as large as the model
    timings = measure(calls, timer, pace, rng)
    row.ours = timings.pop(OURS)
    row.peers |= timings
    row.memory = {name: peak_bytes(call, device) for name, call in calls.items()}


def _checked(job: TrainStep | Inference | Generation, name: str, right: list[Tensor], allowed: float) -> Call | str:
    """The call of a compiled variant, or why there is none."""
    try:
        contestant = job.contestant(name)
        share = distance(contestant.answer(), right) / allowed
    except Exception as error:
        return describe(error)
    return contestant.call if share <= 1 else f"computes something else: {share:.3g}x the allowed error"


def distance(answer: list[Tensor], right: list[Tensor]) -> float:
    """The norm of the difference as a share of the right tensor's norm, of the pair where it is largest.

    NaN if any is.
    """
    shares = [
        torch.linalg.vector_norm((a - b).double()) / torch.linalg.vector_norm(b.double())
        for a, b in zip(answer, right, strict=True)
    ]
    return torch.stack(shares).max().item()
