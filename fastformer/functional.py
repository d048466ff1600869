"""torch.nn.functional with the functions that fastformer makes faster in place of torch's.

Each has torch's own signature, with additions behind it as keywords only; every other name is torch's own function.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import inf as _inf
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as _torch_functional
from torch import Tensor

from fastformer.backends import is_small as _is_small
from fastformer.ops._common import CAUGHT as _CAUGHT
from fastformer.ops._common import check_probability as _check_probability
from fastformer.ops.feed_forward import feed_forward as _feed_forward
from fastformer.ops.layer_norm import layer_norm as _layer_norm
from fastformer.ops.linear import linear as _linear
from fastformer.ops.linear_cross_entropy import linear_cross_entropy as _linear_cross_entropy
from fastformer.ops.rotary import rotary as _rotary
from fastformer.ops.scaled_dot_product_attention import scaled_dot_product_attention as _sdpa
from fastformer.ops.softmax import softmax as _softmax
from fastformer.ops.varlen_attn import varlen_attn as _varlen_attn

if TYPE_CHECKING:
    from torch.nn.attention.varlen import AuxRequest as _AuxRequest


def softmax(
    input: Tensor,
    dim: int | None = None,
    _stacklevel: int = 3,
    dtype: torch.dtype | None = None,
    *,
    scale: float | None = None,
    mask: Tensor | None = None,
    is_causal: bool = False,
) -> Tensor:
    """softmax of ``scale * input + mask`` along ``dim``.

    Args:
        input: floating-point tensor.
        dim: the dimension whose slices sum to one; the last when ``mask`` or ``is_causal`` is given.
        dtype: dtype of the computation and the result; the input's if None.
        scale: factor on the input; 1 if None.
        mask: broadcasts to the input: bool (True keeps the element) or floating point (added after scaling).
        is_causal: element (i, j) of the last two dimensions is kept where j <= i. May be given with ``mask``.

    Returns:
        A tensor like ``input``. A row with every element masked gives zeros.

    Raises:
        TypeError, ValueError, IndexError: an argument is of the wrong kind, shape or device.
    """
    if mask is None and scale is None and not is_causal:
        if dim is None:
            return _torch_functional.softmax(input, dim, _stacklevel + 1, dtype)
        if dtype is None and _is_small("softmax", input):
            try:
                return torch.softmax(input, dim)
            except _CAUGHT:
                pass  # the careful way's errors name the argument
    elif dim is None:
        dim = -1
    if dtype is not None:
        input = input.to(dtype)
    return _softmax(input, dim, scale=1.0 if scale is None else scale, mask=mask, is_causal=is_causal)


def layer_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """torch's layer_norm: ``(x - mean) / sqrt(var + eps) * weight + bias`` over the last dimensions.

    Statistics are float32 whatever the input; ``weight`` and ``bias`` have the normalized shape.
    """
    if _is_small("layer_norm", input):
        try:
            if -_inf < eps < _inf:
                return torch.layer_norm(input, normalized_shape, weight, bias, eps)
        except _CAUGHT:
            pass  # as in softmax
    return _layer_norm(input, normalized_shape, weight, bias, eps)[0]


def rms_norm(
    input: Tensor, normalized_shape: Sequence[int], weight: Tensor | None = None, eps: float | None = None
) -> Tensor:
    """torch's rms_norm: ``x / sqrt(mean(x^2) + eps) * weight``; eps None is float32's (or float64's) epsilon."""
    return _layer_norm(input, normalized_shape, weight, None, _rms_eps(input, eps), rms=True)[0]


def add_layer_norm(
    input: Tensor,
    residual: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    dropout_p: float = 0.0,
    training: bool = True,
) -> tuple[Tensor, Tensor]:
    """(layer_norm(summed), summed) of ``summed = dropout(input) + residual``, in one pass over memory.

    Args:
        input, residual: of one shape and dtype.
        dropout_p: probability that an element of ``input`` is dropped when ``training``.
        others: as in layer_norm.
    """
    if dropout_p != 0:
        input = _dropout(input, dropout_p, training)
    if _is_small("add_layer_norm", input):
        try:
            if -_inf < eps < _inf and input.shape == residual.shape and input.dtype == residual.dtype:
                summed = input + residual
                return torch.layer_norm(summed, normalized_shape, weight, bias, eps), summed
        except _CAUGHT:
            pass  # as in softmax
    return _layer_norm(input, normalized_shape, weight, bias, eps, residual=residual)


def add_rms_norm(
    input: Tensor,
    residual: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
    *,
    dropout_p: float = 0.0,
    training: bool = True,
) -> tuple[Tensor, Tensor]:
    """(rms_norm(summed), summed) of ``summed = dropout(input) + residual``; see add_layer_norm."""
    if dropout_p != 0:
        input = _dropout(input, dropout_p, training)
    return _layer_norm(input, normalized_shape, weight, None, _rms_eps(input, eps), residual=residual, rms=True)


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    causal_alignment: str = "top_left",
    window: tuple[int | None, int | None] | None = None,
    softcap: float | None = None,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """torch's attention, ``softmax(scale * query key^T + mask) value``, without ever holding the weights.

    FlashAttention-2, arXiv 2307.08691.

    Args:
        query: [..., H, Sq, D].
        key, value: [..., G, Sk, D] and [..., G, Sk, Dv]; G = H, or a divisor of H with ``enable_gqa``.
        attn_mask: broadcasts to [..., H, Sq, Sk]: bool (True may attend) or floating point (added to the scores). May
            be given together with ``is_causal``. One that requires a gradient gets one.
        dropout_p: probability that an attention weight is dropped. Where our kernels run, which ones are depends on
            torch's generator and on a weight's place alone, not on the kernel.
        is_causal: query i attends to keys j <= i, or j <= i + Sk - Sq, by ``causal_alignment``.
        scale: 1 / sqrt(D) if None.
        causal_alignment: "top_left" (torch's) or "bottom_right" (the last query sees every key).
        window: (left, right): query i sees keys i - left to i + right only, i placed among the keys by
            ``causal_alignment``; None for no bound.
        softcap: c > 0: the scores become c tanh(scores / c) before masking (Gemma 2, arXiv 2408.00118).
        alibi_slopes: [H] or [..., H]: -slope |p - j| is added to the score of query i and key j, p being the place of
            i among the keys by ``causal_alignment`` (ALiBi, arXiv 2108.12409). May require a gradient.
        sinks: [H], for each head one more score in the softmax's sum, without a value (arXiv 2309.17453).
        return_lse: return (output, lse) with the rows' log-sum-exp [..., H, Sq], natural logarithm, in float32
            (float64 for float64 tensors).

    Returns:
        [..., H, Sq, Dv]. A query that may attend to nothing gives zeros (lse -inf).

    Raises:
        TypeError, ValueError: an argument is of the wrong kind, shape, dtype or device.
    """
    extras = (causal_alignment, window, softcap, alibi_slopes, sinks, return_lse)
    return _sdpa(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa, *extras)


def varlen_attn(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor | None,
    max_q: int,
    max_k: int,
    *,
    return_aux: _AuxRequest | None = None,
    scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
    enable_gqa: bool = False,
    seqused_k: Tensor | None = None,
    block_table: Tensor | None = None,
    num_splits: int | None = None,
    is_causal: bool = False,
    softcap: float | None = None,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """torch.nn.attention.varlen's attention: N sequences of different lengths, packed one behind the other, each
    attending to its own keys. On CPUs too, and with gradients by everything that is not an index.

    Args:
        query: [Tq, H, D], the queries of all sequences.
        key, value: [Tk, G, D] and [Tk, G, Dv], packed likewise; or with ``block_table`` a pool of pages, [pages, page
            size, G, D] and [pages, page size, G, Dv], the page size a power of two, 16 at least. G = H, or a divisor of
            H with ``enable_gqa``.
        cu_seq_q, cu_seq_k: int32 [N + 1], ascending from 0: sequence b has rows cu_seq[b] to cu_seq[b + 1]. It may be
            empty. cu_seq_k is not read, and may be None, with ``block_table``.
        max_q, max_k: no sequence has more queries, or keys.
        return_aux: with ``lse`` set, return (output, lse): the rows' log-sum-exp [H, Tq], natural logarithm, in
            float32 (float64 for float64 tensors).
        scale: 1 / sqrt(D) if None.
        window_size: (left, right): query i sees keys p - left to p + right, where p = i + keys - queries of the
            sequence: the last query is level with the last key. -1: no bound; (-1, 0) is causal attention.
        seqused_k: int32 [N]: only so many keys of each sequence are there yet.
        block_table: int32 [N, P]: keys 0 .. page size - 1 of sequence b are page block_table[b, 0], and so on. Wants
            ``seqused_k``.
        num_splits: into how many parts the keys of a few queries are split, to be combined again; 1 makes the result of
            a sequence independent of the others, to the bit. None: as many as suit.
        is_causal: as a window with right = 0.
        softcap, alibi_slopes, sinks: as in scaled_dot_product_attention; alibi_slopes [H] or [N, H].

    Returns:
        [Tq, H, Dv]. A query without keys gives zeros, as do rows of no sequence.

    Raises:
        TypeError, ValueError: an argument is of the wrong kind, shape, dtype or device; on a CPU also if lengths or
            pages lie outside the tensors.
    """
    arrays = (query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, return_aux, scale, window_size, enable_gqa)
    return _varlen_attn(*arrays, seqused_k, block_table, num_splits, is_causal, softcap, alibi_slopes, sinks)


def linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """torch's linear: ``input weight^T + bias``; sums of float16 and bfloat16 are in float32.

    Args:
        input: [..., C]; weight: [F, C]; bias: [F].

    Returns:
        [..., F].

    Raises:
        TypeError, ValueError: an argument is of the wrong kind, shape, dtype or device.
    """
    return _linear(input, weight, bias)


def feed_forward(
    input: Tensor,
    weight1: Tensor,
    bias1: Tensor | None,
    weight2: Tensor,
    bias2: Tensor | None,
    *,
    activation: str = "gelu",
    weight_gate: Tensor | None = None,
    dropout_p: float = 0.0,
    training: bool = True,
) -> Tensor:
    """``activation(input W1^T + b1) W2^T + b2``, or gated ``(activation(input Wg^T) * (input W1^T + b1)) W2^T + b2``.

    Args:
        input: [..., C].
        weight1, weight_gate: [F, C]; bias1: [F].
        weight2: [C2, F]; bias2: [C2].
        activation: gelu, gelu_tanh, relu or silu; with ``weight_gate`` GeGLU, SwiGLU and so on (arXiv 2002.05202).
        dropout_p: probability that an element of the hidden layer is dropped when ``training``, by torch's functions.

    Returns:
        [..., C2].
    """
    _check_probability("dropout_p", dropout_p)
    return _feed_forward(
        input,
        weight1,
        bias1,
        weight2,
        bias2,
        activation=activation,
        weight_gate=weight_gate,
        dropout_p=dropout_p if training else 0.0,
    )


def linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    weight: Tensor | None = None,
    reduction: str = "mean",
    ignore_index: int | None = None,
    label_smoothing: float = 0.0,
    options: Any = None,
) -> Tensor:
    """torch's ``cross_entropy(linear(input, linear_weight, linear_bias), target, ...)``, never holding all the logits.

    Args:
        input: [N, C] (or [..., C]); linear_weight: [V, C]; linear_bias: [V].
        target: class indices [N] (or [...]), or class probabilities [N, V].
        weight: [V], a factor on each class.
        reduction: none, mean or sum.
        ignore_index: a target without loss; -100 if None.
        label_smoothing: share of the target spread evenly over the classes, in [0, 1].
        options: torch's LinearCrossEntropyOptions; chunking is ours to choose, so anything but None runs torch's own.
    """
    return _linear_cross_entropy(
        input,
        linear_weight,
        target,
        linear_bias=linear_bias,
        weight=weight,
        reduction=reduction,
        ignore_index=ignore_index,
        label_smoothing=label_smoothing,
        options=options,
    )


def rotary(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor, *, interleaved: bool = False) -> tuple[Tensor, Tensor]:
    """Rotary position embedding (arXiv 2104.09864) of query [B, H, S, D] and key [B, G, S, D].

    Args:
        cos, sin: [S, R] or [B, S, R] with 2R <= D; features from 2R on pass through.
        interleaved: pairs are features (2i, 2i + 1); else (i, i + R).
    """
    return _rotary(query, key, cos, sin, interleaved=interleaved)


def _rms_eps(input: Tensor, eps: float | None) -> float:
    if eps is not None:
        return eps
    double = isinstance(input, Tensor) and input.dtype == torch.float64
    return torch.finfo(torch.float64 if double else torch.float32).eps


def _dropout(input: Tensor, dropout_p: float, training: bool) -> Tensor:
    _check_probability("dropout_p", dropout_p)
    return _torch_functional.dropout(input, dropout_p) if training and dropout_p > 0 else input


def __getattr__(name: str) -> Any:
    return getattr(_torch_functional, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *dir(_torch_functional)})
