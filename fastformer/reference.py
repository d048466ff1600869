"""The one plain definition of each operation: what the kernels are judged against.

Everything is computed in float64 from the formula, whatever the input's dtype, and is returned in float64. Slow on
purpose. Gradients come from autograd through these definitions. Shapes and meaning: csrc/ops.cpp.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

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


def causal_window(window: tuple[int | None, int | None], is_causal: bool) -> tuple[int | None, int | None]:
    """The window's bounds with those of a causal mask."""
    left, right = window
    return left, (0 if right is None else min(right, 0)) if is_causal else right


def alibi_bias(slopes: Tensor, seqlen_q: int, seqlen_k: int, *, bottom_right: bool = False) -> Tensor:
    """[..., H, seqlen_q, seqlen_k]: -slope |p - j| for slopes [..., H], p as in window_mask (arXiv 2108.12409)."""
    offset = seqlen_k - seqlen_q if bottom_right else 0
    positions = torch.arange(seqlen_q, device=slopes.device).unsqueeze(-1) + offset
    distances = (positions - torch.arange(seqlen_k, device=slopes.device)).abs()
    return -slopes[..., None, None] * distances


def dropout_mask(
    state: Tensor, p: float, batch: int, heads: int, seqlen_q: int, seqlen_k: int, *, first_sequence: int = 0
) -> Tensor:
    """bool [batch, heads, seqlen_q, seqlen_k], False where a weight is dropped, which happens with probability ``p``.

    It depends on the weight's place and on ``state``, int64 [2] (seed, offset), alone: Philox-4x32 with 7 rounds
    (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3") of the counter (key // 4, query, batch * heads +
    head, offset) and the key ``seed`` gives four words, for four neighbouring keys. A weight is kept where its word is
    not less than dropout_threshold(p). ``first_sequence`` is the first one's place in the batch.
    """
    seed, offset = state.unbind()
    fours = torch.arange((seqlen_k + 3) // 4, device=state.device)
    queries = torch.arange(seqlen_q, device=state.device).unsqueeze(-1)
    first = first_sequence * heads
    sequences = torch.arange(first, first + batch * heads, device=state.device)[:, None, None]
    counter = torch.broadcast_tensors(fours, queries, sequences, offset & 0xFFFFFFFF)
    words = torch.stack(_philox(counter, (seed & 0xFFFFFFFF, seed >> 32 & 0xFFFFFFFF)), -1)
    kept = words.flatten(-2)[..., :seqlen_k] >= dropout_threshold(p)
    return kept.reshape(batch, heads, seqlen_q, seqlen_k)


def dropout_threshold(p: float) -> int:
    """The words below this are those of dropped weights; p is less than 1."""
    return min(round(p * 2**32), 2**32 - 1)


def _philox(counter: Sequence[Tensor], key: tuple[Tensor, Tensor], rounds: int = 7) -> list[Tensor]:
    """Four words below 2^32, in int64, of counters of four such words."""
    first, second, third, fourth = counter
    low, high = key
    for _ in range(rounds):
        product, other = first * 0xD2511F53, third * 0xCD9E8D57  # mod 2^64; shifts and masks take the right bits
        first, third = other >> 32 & 0xFFFFFFFF ^ second ^ low, product >> 32 & 0xFFFFFFFF ^ fourth ^ high
        second, fourth = other & 0xFFFFFFFF, product & 0xFFFFFFFF
        low, high = low + 0x9E3779B9 & 0xFFFFFFFF, high + 0xBB67AE85 & 0xFFFFFFFF
    return [first, second, third, fourth]


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
    window: tuple[int | None, int | None] = (None, None),
    softcap: float | None = None,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    dropout_p: float = 0.0,
    dropout_state: Tensor | None = None,
    first_sequence: int = 0,
) -> tuple[Tensor, Tensor]:
    """(output, lse): softmax(scores + mask) value with scores = scale * query key^T, and the log-sum-exp of each row.

    softcap c: scores become c tanh(scores / c). alibi_slopes [H] or [B, H]: -slope |p - j| is added, p as in
    window_mask. sinks [H]: one more score for each row of a head, without a value. Dropout: see dropout_mask.
    """
    scale = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
    groups = query.shape[-3] // max(key.shape[-3], 1)
    key, value = (x.double().repeat_interleave(groups, dim=-3) for x in (key, value))
    scores = query.double() @ key.transpose(-1, -2) * scale
    seqlen_q, seqlen_k = scores.shape[-2:]
    scores = scores if softcap is None else softcap * torch.tanh(scores / softcap)
    if alibi_slopes is not None:
        scores = scores + alibi_bias(alibi_slopes.double(), seqlen_q, seqlen_k, bottom_right=bottom_right)
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else scores + mask.double()
    left, right = causal_window(window, is_causal)
    if left is not None or right is not None:
        visible = window_mask(seqlen_q, seqlen_k, left, right, bottom_right=bottom_right, device=scores.device)
        scores = scores.masked_fill(~visible, -math.inf)
    if sinks is not None:
        scores = torch.cat((scores, sinks.double()[:, None, None].expand(*scores.shape[:-1], 1)), -1)
    weights, lse = _masked_softmax(scores)
    weights = weights[..., :seqlen_k]
    if dropout_p > 0:
        kept = dropout_mask(dropout_state, dropout_p, *weights.shape, first_sequence=first_sequence)
        weights = weights * kept / (1 - dropout_p)
    return weights @ value, lse


def linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``input weight^T + bias``."""
    product = input.double() @ weight.double().mT
    return product if bias is None else product + bias.double()


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
    hidden = linear(input, weight1, bias1)
    act = ACTIVATIONS[activation]
    hidden = act(hidden) if weight_gate is None else act(linear(input, weight_gate, None)) * hidden
    return linear(hidden, weight2, bias2)


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
    logits = linear(input, weight, bias)
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


def _masked_softmax(scores: Tensor) -> tuple[Tensor, Tensor]:
    """(weights, lse) where a row that is -inf throughout has weights 0, lse -inf and no gradient."""
    nothing = scores.new_full((*scores.shape[:-1], 1), -math.inf)
    peak = scores.detach().amax(-1, keepdim=True) if scores.shape[-1] else nothing
    empty = peak == -math.inf
    exponentials = torch.exp(scores - peak.masked_fill(empty, 0.0))
    total = exponentials.sum(-1, keepdim=True)
    total = total.masked_fill(total == 0, 1.0)  # where every element is masked, and peak is -inf
    return exponentials / total, (torch.log(total) + peak).squeeze(-1)
