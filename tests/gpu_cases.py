"""Runs each CUDA C++ kernel once, for compute-sanitizer: ``python tests/gpu_cases.py`` (see tests/gpu.py)."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

import fastformer
import fastformer.functional as F

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Eight lanes, a warp, a block, and loops with rows in shared memory and not; in 16-byte accesses and, if odd, others.
WIDTHS = (64, 63, 520, 519, 4096, 4095, 40_000, 39_999, 131_072, 131_071)


def cases(device: str, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    """(name, sum of an operation's results), which has a gradient."""

    def leaf(*shape: int) -> Tensor:
        return torch.randn(*shape, device=device).to(dtype).requires_grad_()

    for width in WIDTHS:
        x, residual, weight, bias = leaf(5, width), leaf(5, width), leaf(width), leaf(width)
        mask = torch.rand(5, width, device=device) > 0.3
        yield f"softmax {width}", F.softmax(x, -1).sum()
        yield f"masked softmax {width}", F.softmax(x, -1, mask=mask).sum()
        yield f"layer_norm {width}", F.layer_norm(x, (width,), weight, bias).sum()
        yield f"rms_norm {width}", F.rms_norm(x, (width,), weight).sum()
        normed, summed = F.add_layer_norm(x, residual, (width,), weight, bias)
        yield f"add_layer_norm {width}", normed.sum() + summed.sum()
    for half in (32, 17):
        query, key, angles = leaf(2, 4, 9, 2 * half), leaf(2, 2, 9, 2 * half), torch.randn(9, half, device=device)
        for interleaved in (False, True):
            turned = F.rotary(query, key, angles.cos(), angles.sin(), interleaved=interleaved)
            yield f"rotary {half} {interleaved}", turned[0].sum() + turned[1].sum()
    for hidden in (64, 67):
        layers, gate = (leaf(9, 32), leaf(hidden, 32), leaf(hidden), leaf(32, hidden), leaf(32)), leaf(hidden, 32)
        for activation in ("gelu", "gelu_tanh", "relu", "silu"):
            yield f"{activation} {hidden}", F.feed_forward(*layers, activation=activation).sum()
            yield f"gated {activation} {hidden}", F.feed_forward(*layers, activation=activation, weight_gate=gate).sum()
    for rows, columns, hidden in ((1153, 64, 1032), (9, 2048, 64)):  # tiles of 128 rows; depths in parts
        layers = (leaf(rows, columns), leaf(hidden, columns), leaf(hidden), leaf(72, hidden), leaf(72))
        gate = leaf(hidden, columns)
        yield f"feed_forward {rows}", F.feed_forward(*layers).sum()
        yield f"gated feed_forward {rows}", F.feed_forward(*layers, weight_gate=gate).sum()
    for words in (1000, 997):
        x, weight, target = leaf(9, 32), leaf(words, 32), torch.randint(words, (9,), device=device)
        for reduction in ("mean", "none"):
            yield f"linear_cross_entropy {words}", F.linear_cross_entropy(x, weight, target, reduction=reduction).sum()
    if dtype != torch.float32:
        yield from attention_cases(device, dtype)


def attention_cases(device: str, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    """Every width that is compiled, and one that is padded; with options and without; prompts, and a few queries."""

    def leaf(*shape: int) -> Tensor:
        return torch.randn(*shape, device=device).to(dtype).requires_grad_()

    bias = torch.randn(2, 1, 150, 150, device=device, requires_grad=True)
    options = {"softcap": 20.0, "alibi_slopes": torch.rand(4, device=device), "window": (70, 0), "dropout_p": 0.1}
    sinks = torch.zeros(4, device=device, requires_grad=True)
    starts = torch.tensor([0, 100, 100, 150], dtype=torch.int32, device=device)
    attend = partial(F.scaled_dot_product_attention, enable_gqa=True)
    for width in (64, 96, 128, 256, 33):
        query, key, value = leaf(2, 4, 150, width), leaf(2, 2, 150, width), leaf(2, 2, 150, width)
        yield f"attention {width}", attend(query, key, value, is_causal=True).sum()
        yield f"attention {width}, options", attend(query, key, value, bias, **options, sinks=sinks).sum()
        yield f"attention {width}, mask", attend(query, key, value, bias > 0).sum()
        packed = leaf(150, 4, width), leaf(150, 2, width), leaf(150, 2, width)
        yield f"varlen_attn {width}", F.varlen_attn(*packed, starts, starts, 100, 100, enable_gqa=True).sum()
        for count in (1, 3):
            few = attend(query[:, :, :count], key, value, is_causal=True, causal_alignment="bottom_right")
            yield f"attention {width}, {count} queries", few.sum()


def main(device: str = "cuda") -> None:
    """Forward and backward of each."""
    with fastformer.backend("cuda"):
        for dtype in DTYPES:
            for name, result in cases(device, dtype):
                result.backward()
                if not torch.isfinite(result):
                    sys.exit(f"{name} in {dtype}: {result.item()}")


if __name__ == "__main__":
    main()
