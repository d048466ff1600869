"""End to end: one GPT trained on real text by plain torch and by fastformer, from the same weights on the same batches.

Each runs in a process of its own, so that peak memory can be told apart, and they take turns step by step, so that a
noisy machine disturbs both alike. Float32, no dropout.
"""

from __future__ import annotations

import multiprocessing
import random
import signal
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path

import torch
from torch import Tensor

import fastformer
from fastformer.models import GPT, GPTConfig
from fastformer.models.data import random_batch, sample_text, split_text
from fastformer.models.tokenizer import Tokenizer
from fastformer.models.training import Trainer, TrainingConfig

from .plain_models import PlainGPT, sizes

STEPS = 40
WARMUP_STEPS = 3  # trained, but not timed
BATCH_SIZE = 4
TOLERANCE = 1e-3  # between the losses of a step, in nats, and between any two logits
NAMES = ("torch", "fastformer")


@dataclass(frozen=True)
class Job:
    """What a worker trains, and on what."""

    name: str  # of NAMES
    config: GPTConfig
    train_tokens: Tensor  # int64 [N]
    held_out_tokens: Tensor
    device: str
    backend: str
    threads: int


class Comparison:
    """The two runs; use as a context manager, which ends their processes."""

    def __init__(self, device: torch.device, backend: str, config: GPTConfig | None = None) -> None:
        train_text, held_out_text = split_text(sample_text())
        tokenizer = Tokenizer.train(train_text)
        self.config = config or GPTConfig(tokenizer.vocab_size)
        self.device, self.backend = device, backend
        tokens = tokenizer.encode(train_text), tokenizer.encode(held_out_text)
        threads = torch.get_num_threads()
        jobs = [Job(name, self.config, *tokens, str(device), backend, threads) for name in NAMES]
        self.workers = {job.name: Worker(job) for job in jobs}
        self.losses: dict[str, list[float]] = {name: [] for name in NAMES}
        self.seconds: dict[str, list[float]] = {name: [] for name in NAMES}
        self.held_out: dict[str, float] = {}
        self.peak_bytes: dict[str, int] = {}
        self.logits_difference: float | None = None
        self.largest_logit: float | None = None
        self.failure = ""
        self.rng = random.Random(0)

    def __enter__(self) -> Comparison:
        return self

    def __exit__(self, *exception: object) -> None:
        for worker in self.workers.values():
            worker.close()

    def run(self, on_step: Callable[[], object], steps: int = STEPS) -> None:
        """Compares the logits while the weights are the same, trains both, measures held-out loss and peak memory.

        A process that fails ends the run: ``results`` says why.
        """
        try:
            torchs, ours = (self.workers[name]("logits") for name in NAMES)
            self.logits_difference = (ours - torchs).abs().max().item()
            self.largest_logit = torchs.abs().max().item()
            for _ in range(steps):
                for name in self.rng.sample(NAMES, len(NAMES)):
                    loss, seconds = self.workers[name]("step")
                    self.losses[name].append(loss)
                    self.seconds[name].append(seconds)
                on_step()
            for name, worker in self.workers.items():
                self.peak_bytes[name] = worker("peak_bytes")  # of training: asked for before the held-out batches
                self.held_out[name] = worker("held_out")
        except RuntimeError as error:
            self.failure = str(error)

    def results(self) -> dict:
        """All of it, as far as it went, for the JSON. Unequal runs get no speed."""
        config = self.config
        results = {
            "model": (
                f"GPT, {config.num_layers} layers, width {config.d_model}, {config.num_heads} heads,"
                f" vocabulary {config.vocab_size}"
            ),
            "batch": f"{BATCH_SIZE} x {config.context_length} tokens",
            "dtype": "fp32",
            "backend": self.backend,
            "steps": min(map(len, self.losses.values())),
            "losses": self.losses,
            "held_out_loss": self.held_out,
            "peak_bytes": self.peak_bytes,
            "logits_difference": self.logits_difference,
            "largest_logit": self.largest_logit,
            "loss_difference": None,
            "tokens_per_second": {},
            "speedup": None,
        }
        if results["steps"]:
            torchs, ours = (torch.tensor(self.losses[name]) for name in NAMES)
            results["loss_difference"] = (ours - torchs).abs().max().item()  # NaN if any is
        results["problem"] = self._problem(results["loss_difference"])
        if results["steps"] > WARMUP_STEPS and not results["problem"]:
            tokens = BATCH_SIZE * config.context_length
            speed = {name: tokens / statistics.median(s[WARMUP_STEPS:]) for name, s in self.seconds.items()}
            results["tokens_per_second"] = speed
            results["speedup"] = speed["fastformer"] / speed["torch"]
        return results

    def _problem(self, loss_difference: float | None) -> str:
        if self.failure:
            return self.failure
        differences = {"logits": self.logits_difference, "losses": loss_difference}
        for name, difference in differences.items():
            # Not `difference > TOLERANCE`: NaN must count as different.
            if difference is not None and not difference <= TOLERANCE:
                return f"wrong answer: {name} differ by {difference:.1e}, at most {TOLERANCE:.0e} is allowed"
        return ""


class Worker:
    """A process that trains one of the models. Calling it runs a method of ``_Training`` there."""

    def __init__(self, job: Job) -> None:
        context = multiprocessing.get_context("spawn")
        self.name = job.name
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs, job), daemon=True)
        self.process.start()
        theirs.close()

    def __call__(self, method: str) -> object:
        try:
            self.connection.send(method)
            result = self.connection.recv()
        except (EOFError, ConnectionError):
            self.process.join()
            raise RuntimeError(
                f"the training process of {self.name} ended with status {self.process.exitcode}"
            ) from None
        if isinstance(result, Exception):
            raise result
        return result

    def close(self) -> None:
        """Ends the process at once: nothing of it is needed any more."""
        self.process.kill()
        self.process.join()


class _Training:
    """What a worker does."""

    def __init__(self, job: Job) -> None:
        torch.set_num_threads(job.threads)
        fastformer.set_backend(job.backend)
        self.device = torch.device(job.device)
        torch.manual_seed(0)
        model = GPT(job.config)
        if job.name == "torch":
            plain = PlainGPT(**sizes(job.config))
            plain.load_state_dict(model.state_dict())
            model = plain
        self.trainer = Trainer(
            model.to(self.device),
            job.train_tokens,
            job.held_out_tokens,
            job.config.context_length,
            TrainingConfig(batch_size=BATCH_SIZE),
        )

    def logits(self) -> Tensor:
        generator = torch.Generator().manual_seed(1)
        tokens, _ = random_batch(self.trainer.held_out_tokens, 1, self.trainer.context_length, generator)
        with torch.no_grad():
            return self.trainer.model(tokens.to(self.device)).cpu()

    def step(self) -> tuple[float, float]:
        start = time.perf_counter()
        loss = self.trainer.train_step(self.trainer.steps_done / STEPS)
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return loss, time.perf_counter() - start

    def held_out(self) -> float:
        return self.trainer.held_out_loss()

    def peak_bytes(self) -> int:
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        return peak_resident_bytes()


def peak_resident_bytes() -> int:
    """The most main memory that this process has held.

    On Linux not getrusage's: that one starts from what the process which started this one held.
    """
    status = Path("/proc/self/status")
    if status.exists():
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024
    import resource  # not on Windows

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _serve(connection: Connection, job: Job) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches both processes; the parent decides
    training = None
    while True:
        try:
            method = connection.recv()
        except EOFError:
            return
        try:
            training = training or _Training(job)
            connection.send(getattr(training, method)())
        except Exception as error:
            connection.send(RuntimeError(f"training with {job.name}: {type(error).__name__}: {error}"))
