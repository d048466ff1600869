"""The one plain definition of each operation: what the kernels are judged against.

Everything is computed in float64 from the formula, whatever the input's dtype, and is returned in float64. Slow on
purpose. Gradients come from autograd through these definitions. Shapes and meaning: csrc/ops.cpp.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

ACTIVATIONS = {
    "gelu": lambda x: 0.5 * x * (1 + torch.erf(x / math.sqrt(2))),
    "gelu_tanh": lambda x: 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
    "relu": lambda x: torch.where(x > 0, x, 0.0),  # slope 0 at 0, as torch has it
    "silu": lambda x: x * torch.sigmoid(x),
}


def causal_mask(
    seqlen_q: int, seqlen_k: int, *, bottom_right: bool = False, device: torch.device | None = None
) -> Tensor:
    """bool [seqlen_q, seqlen_k], True where query i may attend key j <= i (+ seqlen_k - seqlen_q if bottom_right)."""
    return window_mask(seqlen_q, seqlen_k, None, 0, bottom_right=bottom_right, device=device)


def window_mask(
    seqlen_q: int,
    seqlen_k: int,
    left: int | None,
    right: int | None,
    *,
    bottom_right: bool = False,
    device: torch.device | None = None,
) -> Tensor:
    """bool [seqlen_q, seqlen_k], True where query i may attend key j: p - left <= j <= p + right, None for no bound.

    p is i, or i + seqlen_k - seqlen_q if bottom_right.
    """
    offset = seqlen_k - seqlen_q if bottom_right else 0
    mask = torch.ones(seqlen_q, seqlen_k, dtype=torch.bool, device=device)
    mask = mask if right is None else mask.tril(offset + right)
    return mask if left is None else mask.triu(offset - left)


def softmax(input: Tensor, *, scale: float = 1.0, mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
    """Over the last dimension of ``scale * input + mask``. A row with every column masked gives zeros."""
    scores = input.double() * scale
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else scores + mask.double()
    if is_causal:
        scores = scores.masked_fill(~causal_mask(*scores.shape[-2:], device=scores.device), -math.inf)
    return _masked_softmax(scores)[0]


def layer_norm(
    input: Tensor,
    residual: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    eps: float = 1e-5,
    rms: bool = False,
) -> tuple[Tensor, Tensor]:
    """(normed, summed) over the last dimension of ``summed = input + residual``; RMSNorm keeps the mean.

    Kernels, like torch's unfused pair, store ``summed`` in the input's dtype and norm what they stored.
    """
    summed = input.double() if residual is None else input.double() + residual.double()
    centred = summed if rms else summed - summed.mean(-1, keepdim=True)
    normed = centred * torch.rsqrt(centred.square().mean(-1, keepdim=True) + eps)
    if weight is not None:
        normed = normed * weight.double()
    if bias is not None:
        normed = normed + bias.double()
    return normed, summed


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None = None,
    *,
    scale: float | None = None,
    is_causal: bool = False,
    bottom_right: bool = False,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """(output, lse): softmax(scores + mask) value with scores = scale * query key^T, and the log-sum-exp of each row.

    softcap c: scores become c tanh(scores / c). sinks [H]: one more score for each row of a head, without a value.
    """
    scale = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
    groups = query.shape[-3] // key.shape[-3]
    key, value = (x.double().repeat_interleave(groups, dim=-3) for x in (key, value))
    scores = query.double() @ key.transpose(-1, -2) * scale
    scores = scores if softcap is None else softcap * torch.tanh(scores / softcap)
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else scores + mask.double()
    if is_causal:
        visible = causal_mask(*scores.shape[-2:], bottom_right=bottom_right, device=scores.device)
        scores = scores.masked_fill(~visible, -math.inf)
    if sinks is not None:
        scores = torch.cat((scores, sinks.double()[:, None, None].expand(*scores.shape[:-1], 1)), -1)
    weights, lse = _masked_softmax(scores)
    return weights[..., : key.shape[-2]] @ value, lse


def feed_forward(
    input: Tensor,
    weight1: Tensor,
    bias1: Tensor | None,
    weight2: Tensor,
    bias2: Tensor | None,
    *,
    activation: str = "gelu",
    weight_gate: Tensor | None = None,
) -> Tensor:
    """``activation(input W1^T + b1) W2^T + b2``; gated: ``(activation(input Wg^T) * (input W1^T + b1)) W2^T + b2``."""
    hidden = _linear(input, weight1, bias1)
    act = ACTIVATIONS[activation]
    hidden = act(hidden) if weight_gate is None else act(_linear(input, weight_gate, None)) * hidden
    return _linear(hidden, weight2, bias2)


def linear_cross_entropy(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    *,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """(losses, lse) of each row: ``lse - (1 - s) logit[target] - s mean(logits)``; 0 where target is ignore_index."""
    logits = _linear(input, weight, bias)
    lse = torch.logsumexp(logits, -1)
    kept = target != ignore_index
    picked = logits.gather(-1, torch.where(kept, target, 0).unsqueeze(-1)).squeeze(-1)
    losses = lse - (1 - label_smoothing) * picked - label_smoothing * logits.mean(-1)
    return torch.where(kept, losses, 0.0), lse


def rotary(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor, *, interleaved: bool = False) -> tuple[Tensor, Tensor]:
    """Rotates feature pairs (i, i + R), or (2i, 2i + 1) if interleaved, of [B, heads, S, D] by angles [(B,) S, R]."""
    cos, sin = (x.double().unsqueeze(-3) for x in (cos, sin))
    width = cos.shape[-1]

    def rotate(x: Tensor) -> Tensor:
        x, rest = x.double()[..., : 2 * width], x.double()[..., 2 * width :]
        first, second = (x[..., 0::2], x[..., 1::2]) if interleaved else (x[..., :width], x[..., width:])
        turned = (first * cos - second * sin, second * cos + first * sin)
        turned = torch.stack(turned, -1).flatten(-2) if interleaved else torch.cat(turned, -1)
        return torch.cat((turned, rest), -1)

    return rotate(query), rotate(key)


def _linear(input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    product = input.double() @ weight.double().mT
    return product if bias is None else product + bias.double()


def _masked_softmax(scores: Tensor) -> tuple[Tensor, Tensor]:
    """(weights, lse) where a row that is -inf throughout has weights 0, lse -inf and no gradient."""
    peak = scores.detach().amax(-1, keepdim=True) if scores.shape[-1] else scores.new_zeros((*scores.shape[:-1], 1))
    empty = peak == -math.inf
    exponentials = torch.exp(scores - peak.masked_fill(empty, 0.0))
    total = exponentials.sum(-1, keepdim=True)
    total = total.masked_fill(total == 0, 1.0)  # where every element is masked, and peak is -inf
    return exponentials / total, (torch.log(total) + peak).squeeze(-1)
