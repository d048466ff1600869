"""Greedy generation by a GPT of GPT-2's small size, beside the same model in plain PyTorch.

Both keep keys and values in room allotted once. The weights are random, which changes nothing about the time.
"""

from __future__ import annotations

import random
from collections.abc import Iterator

import torch
import torch.nn.functional as torch_functional
from torch import Tensor

import fastformer
from fastformer.models import GPT, GPTConfig

from .harness import FORWARD, Limits, Pace, Row, Timer, Work, measure, short_name
from .plain_gpt import PlainGPT

OPERATION = "generation"
SIZES = {"vocab_size": 50257, "context_length": 1024, "num_layers": 12, "num_heads": 12, "d_model": 768}
PROMPT, NEW_TOKENS = 128, 64
BATCHES = (1, 8)
DTYPES = (torch.bfloat16, torch.float32)
COUNT = len(BATCHES) * len(DTYPES)
# As a share of the largest logit. Two orders of rounding differ by up to 0.02 in bfloat16.
TOLERANCE = {torch.bfloat16: 0.05, torch.float32: 1e-4}


class PlainGenerator:
    """PlainGPT with a cache of keys and values, as one writes it with torch's own functions."""

    def __init__(self, model: PlainGPT, batch: int) -> None:
        self.model = model
        weight, heads = model.token_embedding.weight, SIZES["num_heads"]
        shape = (2, SIZES["num_layers"], batch, heads, PROMPT + NEW_TOKENS, SIZES["d_model"] // heads)
        self.keys, self.values = weight.new_empty(shape)

    def logits(self, tokens: Tensor, start: int) -> Tensor:
        """Of the last position, [B, V], for tokens [B, S] that stand behind ``start`` others."""
        model, end = self.model, start + tokens.shape[1]
        x = model.token_embedding(tokens) + model.position_embedding.weight[start:end]
        for block, keys, values in zip(model.blocks, self.keys, self.values):
            x = x + self._attention(block.attention, block.norm1(x), keys, values, start, end)
            x = x + block.feed_forward(block.norm2(x))
        return torch_functional.linear(model.norm(x[:, -1]), model.token_embedding.weight)

    @staticmethod
    def _attention(attention: torch.nn.Module, x: Tensor, keys: Tensor, values: Tensor, start: int, end: int) -> Tensor:
        heads = (y.unflatten(-1, (attention.num_heads, -1)).transpose(1, 2) for y in attention.qkv(x).chunk(3, dim=-1))
        query, keys[:, :, start:end], values[:, :, start:end] = heads
        y = torch_functional.scaled_dot_product_attention(
            query, keys[:, :, :end], values[:, :, :end], is_causal=start == 0
        )
        return attention.out(y.transpose(1, 2).flatten(2))

    @torch.no_grad()
    def generate(self, prompt: Tensor) -> Tensor:
        """[B, PROMPT] -> [B, PROMPT + NEW_TOKENS], always the likeliest token."""
        tokens, pending = prompt, prompt
        for _ in range(NEW_TOKENS):
            pending = self.logits(pending, tokens.shape[1] - pending.shape[1]).argmax(-1, keepdim=True)
            tokens = torch.cat((tokens, pending), dim=1)
        return tokens


def rows(device: torch.device, timer: Timer, limits: Limits, pace: Pace, rng: random.Random) -> Iterator[Row]:
    """A row for each batch and dtype. ``auto`` chooses, as it does for a user."""
    for dtype in DTYPES:
        plain = PlainGPT(*SIZES.values()).to(device, dtype)
        torch.nn.init.normal_(plain.token_embedding.weight, std=0.02)  # the unembedding too
        ours = GPT(GPTConfig(**SIZES)).to(device, dtype)
        ours.load_state_dict(plain.state_dict())
        for batch in BATCHES:
            prompt = torch.randint(SIZES["vocab_size"], (batch, PROMPT), device=device)
            yield _row(plain, ours, prompt, dtype, timer, limits, pace, rng)


@torch.no_grad()
def _row(
    plain: PlainGPT,
    ours: GPT,
    prompt: Tensor,
    dtype: torch.dtype,
    timer: Timer,
    limits: Limits,
    pace: Pace,
    rng: random.Random,
) -> Row:
    generator = PlainGenerator(plain, len(prompt))
    row = Row(OPERATION, f"{len(prompt)}x{PROMPT}+{NEW_TOKENS}", short_name(dtype), FORWARD, "auto")
    work = _work(ours, len(prompt), dtype)
    row.limit, row.limit_seconds = limits.bound(work, dtype)
    calls = {
        "ours": lambda: ours.generate(prompt, NEW_TOKENS, temperature=0),
        "eager": lambda: generator.generate(prompt),
    }
    with fastformer.backend("auto"):
        row.error_share = _difference(ours, generator, prompt) / TOLERANCE[dtype]
        if not row.error_share <= 1:  # nor if it is NaN
            row.problem = f"wrong logits: {row.error_share:.3g}x the allowed error"
        else:
            timings = measure(calls, timer, pace, rng)
            row.ours, row.peers = timings["ours"], {"eager": timings["eager"]}
    return row


def _difference(ours: GPT, generator: PlainGenerator, prompt: Tensor) -> float:
    """How far our logits of the prompt's last token are from torch's, as a share of the largest; through the cache."""
    cache = ours.new_cache(len(prompt))
    ours.features(prompt[:, :-1], cache)
    mine = ours.unembed(ours.features(prompt[:, -1:], cache)[:, -1])
    generator.logits(prompt[:, :-1], 0)
    theirs = generator.logits(prompt[:, -1:], PROMPT - 1)
    return ((mine - theirs).abs().max() / theirs.abs().max()).item()


def _work(model: GPT, batch: int, dtype: torch.dtype) -> Work:
    """Each new token, the first with the prompt, reads the weights once; of the embeddings as their unembedding."""
    unembedding = model.token_embedding.weight.numel()
    blocks = sum(p.numel() for p in model.parameters()) - unembedding - model.position_embedding.weight.numel()
    return Work(
        bytes=NEW_TOKENS * (blocks + unembedding) * dtype.itemsize,
        flops=2 * batch * (blocks * (PROMPT + NEW_TOKENS - 1) + unembedding * NEW_TOKENS),
        reads=True,
    )
