"""Runs each CUDA C++ kernel once, for compute-sanitizer: ``python tests/gpu_cases.py`` (see benchmarks/gpu_plan.py).

A case's name is printed once it has run, so that what a sanitizer says stands above it.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

import fastformer
import fastformer.functional as F

Results = Tensor | tuple[Tensor, ...]

DTYPES = (torch.bfloat16, torch.float32, torch.float16)
# Eight lanes, a warp, a block, and loops with rows in shared memory and not; in 16-byte accesses and, if odd, others.
WIDTHS = (64, 63, 520, 519, 4096, 4095, 40_000, 39_999, 131_072, 131_071)


def cases(device: str, dtype: torch.dtype) -> Iterator[tuple[str, Results]]:
    """(name, an operation's results), which have gradients. Those with the most in shared memory come first."""

    def leaf(*shape: int) -> Tensor:
        return torch.randn(*shape, device=device).to(dtype).requires_grad_()

    if dtype != torch.float32:
        yield from attention_cases(device, dtype)
    for rows, columns, hidden in ((1153, 64, 1032), (9, 2048, 64)):  # tiles of 128 rows; depths in parts
        layers = (leaf(rows, columns), leaf(hidden, columns), leaf(hidden), leaf(72, hidden), leaf(72))
        gate = leaf(hidden, columns)
        yield f"feed_forward {rows}", F.feed_forward(*layers)
        yield f"gated feed_forward {rows}", F.feed_forward(*layers, weight_gate=gate)
    for hidden in (64, 67):
        layers, gate = (leaf(9, 32), leaf(hidden, 32), leaf(hidden), leaf(32, hidden), leaf(32)), leaf(hidden, 32)
        for activation in ("gelu", "gelu_tanh", "relu", "silu"):
            yield f"{activation} {hidden}", F.feed_forward(*layers, activation=activation)
            yield f"gated {activation} {hidden}", F.feed_forward(*layers, activation=activation, weight_gate=gate)
    for words in (1000, 997):
        x, weight, target = leaf(9, 32), leaf(words, 32), torch.randint(words, (9,), device=device)
        for reduction in ("mean", "none"):
            yield f"linear_cross_entropy {words}", F.linear_cross_entropy(x, weight, target, reduction=reduction)
    for half in (32, 17):
        query, key, angles = leaf(2, 4, 9, 2 * half), leaf(2, 2, 9, 2 * half), torch.randn(9, half, device=device)
        for interleaved in (False, True):
            turned = F.rotary(query, key, angles.cos(), angles.sin(), interleaved=interleaved)
            yield f"rotary {half} {interleaved}", turned
    for width in WIDTHS:
        x, residual, weight, bias = leaf(5, width), leaf(5, width), leaf(width), leaf(width)
        mask = torch.rand(5, width, device=device) > 0.3
        yield f"softmax {width}", F.softmax(x, -1)
        yield f"masked softmax {width}", F.softmax(x, -1, mask=mask)
        yield f"layer_norm {width}", F.layer_norm(x, (width,), weight, bias)
        yield f"rms_norm {width}", F.rms_norm(x, (width,), weight)
        yield f"add_layer_norm {width}", F.add_layer_norm(x, residual, (width,), weight, bias)


def attention_cases(device: str, dtype: torch.dtype) -> Iterator[tuple[str, Results]]:
    """Every width that is compiled, and one that is padded; with options and without; prompts, and a few queries."""

    def leaf(*shape: int) -> Tensor:
        return torch.randn(*shape, device=device).to(dtype).requires_grad_()

    bias = torch.randn(2, 1, 150, 150, device=device, requires_grad=True)
    options = {"softcap": 20.0, "alibi_slopes": torch.rand(4, device=device), "window": (70, 0), "dropout_p": 0.1}
    sinks = torch.zeros(4, device=device, requires_grad=True)
    starts = torch.tensor([0, 100, 100, 150], dtype=torch.int32, device=device)
    attend = partial(F.scaled_dot_product_attention, enable_gqa=True)
    for width in (128, 64, 96, 256, 33):
        query, key, value = leaf(2, 4, 150, width), leaf(2, 2, 150, width), leaf(2, 2, 150, width)
        yield f"attention {width}", attend(query, key, value, is_causal=True)
        longer = leaf(1, 4, 600, width), leaf(1, 2, 600, width), leaf(1, 2, 600, width)  # several tiles of each
        yield f"attention {width}, 600 tokens", attend(*longer)
        packed = leaf(150, 4, width), leaf(150, 2, width), leaf(150, 2, width)
        yield f"varlen_attn {width}", F.varlen_attn(*packed, starts, starts, 100, 100, enable_gqa=True)
        yield f"attention {width}, options", attend(query, key, value, bias, **options, sinks=sinks)
        yield f"attention {width}, mask", attend(query, key, value, bias > 0)
        for count in (1, 3):
            few = attend(query[:, :, :count], key, value, is_causal=True, causal_alignment="bottom_right")
            yield f"attention {width}, {count} queries", few


def run(device: str, seconds: float = math.inf) -> None:
    """Forward and backward of each, until no time is left to begin another."""
    end, count = time.monotonic() + seconds, 0
    for dtype in DTYPES:
        for name, results in cases(device, dtype):
            total = sum(x.float().sum() for x in ((results,) if isinstance(results, Tensor) else results))
            total.backward()
            if not torch.isfinite(total):
                sys.exit(f"{name} in {dtype}: {total.item()}")
            count += 1
            print(f"{name} in {dtype}", flush=True)
            if time.monotonic() > end:
                print(f"{count} cases; no time for those behind {name} in {dtype}")
                return
    print(f"all {count} cases")


def main() -> None:
    """The CUDA C++ kernels on a GPU."""
    parser = argparse.ArgumentParser(description="Runs each CUDA C++ kernel once, forward and backward.")
    parser.add_argument("--seconds", type=float, default=math.inf, help="begin no more after so many (no limit)")
    with fastformer.backend("cuda"):
        run("cuda", parser.parse_args().seconds)


if __name__ == "__main__":
    main()
