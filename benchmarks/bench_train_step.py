"""A training step of a GPT, optimizer included, beside the same model in plain PyTorch, eager and compiled.

Weights and gradients are of the row's dtype; the batch is of random tokens, which changes nothing about the time.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

import fastformer
from fastformer.models import GPT, GPTConfig
from fastformer.models.training import TrainingConfig, make_optimizer

from .harness import TRAINING, Limits, Pace, Row, Timer, Work, measure, short_name
from .plain_gpt import PlainGPT, sizes

OPERATION = "train_step"
CONFIG = GPTConfig(vocab_size=8192, context_length=512, num_layers=6, num_heads=6, d_model=384)
BATCH = 4
DTYPES = (torch.bfloat16, torch.float32)
COUNT = len(DTYPES)
# Of the first loss and of each gradient's norm, as a share of torch's.
TOLERANCE = {torch.bfloat16: 0.05, torch.float32: 1e-4}


def rows(device: torch.device, timer: Timer, limits: Limits, pace: Pace, rng: random.Random) -> Iterator[Row]:
    """A row for each dtype. ``auto`` chooses, as it does for a user."""
    for dtype in DTYPES:
        torch.manual_seed(0)
        ours = GPT(CONFIG)
        plain = PlainGPT(**sizes(CONFIG))
        plain.load_state_dict(ours.state_dict())
        ours, plain = ours.to(device, dtype), plain.to(device, dtype)
        tokens, targets = torch.randint(CONFIG.vocab_size, (2, BATCH, CONFIG.context_length), device=device)
        row = Row(OPERATION, f"{BATCH}x{CONFIG.context_length}", short_name(dtype), TRAINING, "auto")
        row.limit, row.limit_seconds = limits.bound(_work(ours, dtype), dtype)
        with fastformer.backend("auto"):
            row.error_share = _difference(ours, plain, tokens, targets) / TOLERANCE[dtype]
            if not row.error_share <= 1:  # nor if it is NaN
                row.problem = f"wrong loss or gradients: {row.error_share:.3g}x the allowed error"
                yield row
                continue
            calls = {"ours": _step(ours, tokens, targets), "eager": _step(plain, tokens, targets)}
            if reason := pace.why_not_compile():
                row.peers["compile"] = reason
            else:
                torch._dynamo.reset()
                copy = PlainGPT(**sizes(CONFIG)).to(device, dtype)
                calls["compile"] = _step(torch.compile(copy, dynamic=False), tokens, targets)
            timings = measure(calls, timer, pace, rng)
        row.ours = timings.pop("ours")
        row.peers |= timings
        yield row


def _step(model: Callable[..., Tensor], tokens: Tensor, targets: Tensor) -> Callable[[], None]:
    optimizer = make_optimizer(model, TrainingConfig())

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        model(tokens, targets).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    return step


def _difference(ours: GPT, plain: PlainGPT, tokens: Tensor, targets: Tensor) -> float:
    """The largest difference between our loss, or the norm of a gradient, and torch's, as a share of the latter."""
    losses = [model(tokens, targets) for model in (ours, plain)]
    parameters = [dict(model.named_parameters()) for model in (ours, plain)]
    grads = [torch.autograd.grad(loss, list(p.values())) for loss, p in zip(losses, parameters)]
    by_name = dict(zip(parameters[1], grads[1]))
    pairs = [(losses[0], losses[1]), *((grad, by_name[name]) for name, grad in zip(parameters[0], grads[0]))]
    # The gradient of the keys' bias is zero but for rounding: each is compared to the largest of all.
    norms = [[x.detach().double().norm().item() for x in pair] for pair in pairs]
    largest = max(torchs for _, torchs in norms[1:])
    shares = [abs(mine - torchs) / (torchs if i == 0 else largest) for i, (mine, torchs) in enumerate(norms)]
    return max(shares)


def _work(model: GPT, dtype: torch.dtype) -> Work:
    """Each weight takes 2 FLOPs a token in forward, 4 in backward; so do the two products of causal attention."""
    weights = sum(p.numel() for p in model.parameters() if p.dim() == 2) - model.position_embedding.weight.numel()
    length, layers, width = CONFIG.context_length, CONFIG.num_layers, CONFIG.d_model
    attention = layers * length * width  # half of the positions, twice
    flops = 6 * BATCH * length * (weights + attention)
    # read in forward and backward, gradients written and read, two moments and the weights read and written
    return Work(bytes=10 * sum(p.numel() for p in model.parameters()) * dtype.itemsize, flops=flops)
