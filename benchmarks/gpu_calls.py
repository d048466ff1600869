"""Calls of our operations on inputs drawn for them: what is profiled on a GPU, and what tiles are timed with."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from fastformer import functional as F

from .timing import Call

Draw = Callable[..., Tensor]  # of a shape and a scale
Forward = partial[Tensor]


def attention(batch: int, heads: int, tokens: int, head_dim: int, draw: Draw) -> Forward:
    """Causal."""
    inputs = [draw(batch, heads, tokens, head_dim) for _ in range(3)]
    return partial(F.scaled_dot_product_attention, *inputs, is_causal=True)


def feed_forward(rows: int, columns: int, hidden: int, draw: Draw, *, gated: bool = False) -> Forward:
    """With biases; weights are scaled so that every activation is of order one."""
    weight1, bias1 = draw(hidden, columns, scale=columns**-0.5), draw(hidden)
    weight2, bias2 = draw(columns, hidden, scale=hidden**-0.5), draw(columns)
    call = partial(F.feed_forward, draw(rows, columns), weight1, bias1, weight2, bias2)
    if gated:
        return partial(call, activation="silu", weight_gate=draw(hidden, columns, scale=columns**-0.5))
    return call


def backward(make: Callable[..., Forward], *arguments: int | Draw) -> Call:
    """The gradients of all that the call made from the arguments takes by position, over and over."""
    forward = make(*arguments)
    for leaf in forward.args:
        leaf.requires_grad_()
    output = forward()
    return partial(torch.autograd.grad, output, forward.args, torch.randn_like(output), retain_graph=True)
