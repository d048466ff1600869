"""Whole models beside the same in plain PyTorch, each eagerly and under torch.compile: training, inference, generation.

All variants of a row have one set of random weights, which change nothing about the time; nor do random tokens. Their
answers are judged before they are timed, and once more behind the timed calls: only those show what a CUDA graph
replays, or what a kernel left behind for the call after it.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import torch

import fastformer
from fastformer.models import BERTConfig, GPTConfig
from fastformer.models.config import TransformerConfig

from .case import COMPILE, OURS, OURS_COMPILED
from .checking import Kept, describe
from .harness import Limits, Pace, Row, Timer, measure, of_each, short_name
from .memory import peak_bytes
from .model_jobs import Contestant, Generation, Inference, Job, Pair, TrainStep
from .pace import MODELS_LAG
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
PROMPT = 128  # tokens, of generation
# Of our ``distance`` from the plain model in float32. Eager torch's own is up to 0.17 in bfloat16, ours 0.02.
TOLERANCE = {torch.bfloat16: 0.05, torch.float32: 2e-5}
EAGER_TOLERANCE = {torch.bfloat16: 0.25, torch.float32: 2e-5}  # of the eager plain model, which is no kernel of ours
PEER_FACTOR = 2.0  # the compiled plain model's distance may be so many times that of the eager one


@dataclass(frozen=True)
class Model:
    """A model's sizes, and those of its batches in training and inference."""

    config: TransformerConfig
    batch: int
    length: int


# By kind of device: steps of a second or so.
MODELS = {
    "cpu": {
        "gpt2": Model(GPT2, 1, 256),
        "bert": Model(BERT_BASE, 1, 256),
        "llama": Model(LLAMA, 1, 256),
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
OPERATIONS = {"train_step": TrainStep, "inference": Inference, "generation": Generation}
EAGER = "eager"
OVERWRITES = "overwrites what it is given"


def rows(device: torch.device, timer: Timer, limits: Limits, pace: Pace, rng: random.Random) -> Iterator[Row]:
    """A row for each of TASKS in a mode that is wanted. ``auto`` chooses our kernels, as it does for a user."""
    for task in TASKS:
        if OPERATIONS[task.operation].mode not in pace.modes:
            continue
        row = Row(task.operation, task.model, short_name(task.dtype), OPERATIONS[task.operation].mode, "auto")
        try:
            with fastformer.backend("auto"):
                _fill(row, task, device, timer, limits, pace, rng)
        except Exception as error:  # such as too little memory; the other models go on
            row.problem = describe(error)
        finally:
            # Frees the compiled models; and rows share a limit of recompilations, behind which code runs eagerly.
            torch._dynamo.reset()
        yield row


def _fill(
    row: Row, task: Task, device: torch.device, timer: Timer, limits: Limits, pace: Pace, rng: random.Random
) -> None:
    """The verdict, and where it is good the times and the memory of all variants."""
    model = MODELS[device.type][task.model]
    batch, length = (task.prompts, PROMPT) if task.prompts else (model.batch, model.length)
    job = OPERATIONS[task.operation](Pair(model.config, device, task.dtype), batch, length)
    row.shape, row.sizes, row.tokens = f"{task.model} {job.shape}", job.sizes, job.tokens
    row.bytes, row.flops = job.work.bytes, job.work.flops
    row.limit, row.limit_seconds = limits.bound(job.work, task.dtype)
    match = Match(row, job, task.dtype, pace)
    match.judge()
    if row.problem:
        return
    timings = measure(match.calls(), timer, pace, rng)
    for name, reason in timings.items():
        if isinstance(reason, str):
            match.drop(name, reason)
    match.look_again()
    if row.problem:
        row.problem = f"after the timed calls: {row.problem}"
        return
    row.ours = timings.pop(OURS)
    row.peers = timings | row.peers
    row.memory = of_each(partial(peak_bytes, device=device), match.calls(pooled=False))


class Match:
    """The contestants of a row, and what is found out about them, which goes into the row.

    Ours is first. The eager one may be there for the compiled one's sake alone.
    """

    def __init__(self, row: Row, job: Job, dtype: torch.dtype, pace: Pace) -> None:
        self.row, self.job, self.pace, self.kept = row, job, pace, Kept(dict(enumerate(job.constants)))
        ours = TOLERANCE[dtype]
        self.allowed = {OURS: ours, EAGER: EAGER_TOLERANCE[dtype], COMPILE: ours, OURS_COMPILED: ours}
        compiled: dict[str, Contestant] = {}
        for name in filter(pace.wants, (COMPILE, OURS_COMPILED)):
            try:
                reason = pace.why_not_compile(MODELS_LAG)
                compiled |= {} if reason else {name: job.contestant(name)}
            except Exception as error:
                reason = describe(error)
            if reason:
                row.peers[name] = reason
        eager = [EAGER] if pace.wants(EAGER) or COMPILE in compiled else []
        self.contestants = {name: job.contestant(name) for name in (OURS, *eager)} | compiled

    def calls(self, *, pooled: bool = True) -> dict[str, Call]:
        """Of those that are wanted; ``pooled``: also where peak_bytes doesn't see the memory."""
        wanted = {name: found for name, found in self.contestants.items() if self.pace.wants(name)}
        return {name: found.call for name, found in wanted.items() if pooled or not found.pooled}

    def judge(self) -> None:
        """Drops the contestants whose answers are wrong now; the row's problem ends it."""
        error_of, tolerance = self.job.judge(), dict(self.allowed)
        for name, contestant in list(self.contestants.items()):
            try:
                error = error_of(contestant)
            except Exception as raised:
                self.kept.restore()
                self.drop(name, describe(raised))
            else:
                self._judge_one(name, error / tolerance[name])
                if name == EAGER and name in self.contestants:
                    tolerance[COMPILE] = max(tolerance[COMPILE], PEER_FACTOR * error)
            if self.row.problem:
                return

    def _judge_one(self, name: str, share: float) -> None:
        """``share``: of the allowed error."""
        if name == OURS:
            self.row.error_share = max(share, self.row.error_share or 0.0)  # NaN if it is
        if self.kept.restore():
            self.drop(name, OVERWRITES, wrong=True)
        elif not share <= 1:  # nor if it is NaN
            what = "wrong answer" if name in (OURS, OURS_COMPILED) else "computes something else"
            self.drop(name, f"{what}: {share:.3g}x the allowed error", wrong=True)

    def look_again(self) -> None:
        """Judges those that were timed once more, if none of ours has failed."""
        overwritten = self.kept.restore()
        if not self.row.problem:
            self.judge()
        if overwritten and not self.row.problem and OVERWRITES not in self.row.peers.values():
            self.row.problem = "what the calls are given was overwritten"

    def drop(self, name: str, reason: str, *, wrong: bool = False) -> None:
        """A contestant that gets no time. It is the row's problem where it is ours, or ours compiled and ``wrong``."""
        del self.contestants[name]
        if name == OURS:
            self.row.problem = reason
        elif name == OURS_COMPILED and wrong:
            self.row.problem = f"{name}: {reason}"
        elif self.pace.wants(name):
            self.row.peers[name] = reason
