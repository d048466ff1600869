"""What scaled_dot_product_attention asks for around the attention operators: checks, and any number of dimensions."""

from __future__ import annotations

import math
import sys
from typing import Any

import torch
from torch import Tensor

from fastformer import backends, reference
from fastformer.ops import _common, attention_torch
from fastformer.ops.attention import BOTTOM_RIGHT, CAUSAL_AND_MASK, MAX_WIDTH, attention, forward
from fastformer.ops.attention_torch import Options

#: A window's bound further than this, which is longer than any sequence, is none.
_FAR = 2**40


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    dropout_p: float,
    is_causal: bool,
    scale: float | None,
    enable_gqa: bool,
    causal_alignment: str,
    window: tuple[int | None, int | None] | None,
    softcap: float | None,
    alibi_slopes: Tensor | None,
    sinks: Tensor | None,
    return_lse: bool,
) -> Tensor | tuple[Tensor, Tensor]:
    """See functional.scaled_dot_product_attention."""
    bottom_right = causal_alignment == "bottom_right"
    simple = (bottom_right or causal_alignment == "top_left") and window is None and softcap is None
    simple = simple and alibi_slopes is None and sinks is None and not return_lse and dropout_p == 0
    if simple and _common.ordinary(query, key, value, attn_mask):
        try:
            output = _ordinary(query, key, value, attn_mask, is_causal, bottom_right, scale, enable_gqa)
            if output is not None:
                return output
        except _common.CAUGHT:
            pass  # see _common.ordinary
    if (bias := _causal_bias(attn_mask)) is not None:
        attn_mask, is_causal, causal_alignment = None, True, _aligned(bias, query, key, is_causal)
        bottom_right = causal_alignment == "bottom_right"
    _check(query, key, value, attn_mask)
    _common.check_probability("dropout_p", dropout_p)
    if causal_alignment not in ("top_left", "bottom_right"):
        raise ValueError(f"causal_alignment is {causal_alignment!r}, must be 'top_left' or 'bottom_right'")
    if query.dim() > 2 and key.shape[-3] not in (1, query.shape[-3]) and not enable_gqa:
        raise ValueError(f"key has {key.shape[-3]} heads and query {query.shape[-3]}, must be equal without enable_gqa")
    left, right = (None, None) if window is None else check_window("window", window, None)
    leading, heads = query.shape[:-3], query.shape[-3:-2]
    check_features(is_causal, scale, softcap, alibi_slopes, sinks, query, (heads, (*leading, *heads)))
    # The operators have four dimensions: [..., heads, length, width] is viewed as [batch, heads, length, width].
    if query.dim() > 4:
        if attn_mask is not None and attn_mask.dim() > 3:
            attn_mask = attn_mask.expand(*leading, *attn_mask.shape[-3:]).flatten(0, -4)
        if alibi_slopes is not None and alibi_slopes.dim() > 1:
            alibi_slopes = alibi_slopes.flatten(0, -2)
        query, key, value = (x.flatten(0, -4) for x in (query, key, value))
    missing = max(0, 4 - query.dim())
    for _ in range(missing):
        query, key, value = (x.unsqueeze(0) for x in (query, key, value))
    if missing == 2:
        sinks, alibi_slopes = (None if x is None else x.reshape(1) for x in (sinks, alibi_slopes))
    if alibi_slopes is not None and _common.needs_grad(alibi_slopes):  # the mask has a gradient already
        slopes = alibi_slopes.to(torch.promote_types(alibi_slopes.dtype, torch.float32))
        bias = reference.alibi_bias(slopes, query.shape[-2], key.shape[-2], bottom_right=bottom_right)
        attn_mask, alibi_slopes = attention_torch.masked(bias, attn_mask), None
    options = Options(
        scale=1 / math.sqrt(max(query.shape[-1], 1)) if scale is None else scale,
        is_causal=is_causal,
        bottom_right=bottom_right,
        softcap=softcap,
        window_left=left,
        window_right=right,
        alibi_slopes=alibi_slopes,
        sinks=sinks,
        dropout_p=dropout_p,
    )
    output, lse = attention(query, key, value, attn_mask, options, return_lse)
    if missing:
        output, lse = (x[(0,) * missing] if x is not None else None for x in (output, lse))
    elif len(leading) > 1:
        output, lse = (x.unflatten(0, leading) if x is not None else None for x in (output, lse))
    return (output, lse) if return_lse else output


def _causal_bias(mask: object) -> Any:
    """The mask if it is one of torch.nn.attention.bias, which hold no elements, else None."""
    module = sys.modules.get("torch.nn.attention.bias")
    return mask if module is not None and isinstance(mask, module.CausalBias) else None


def _aligned(bias: Any, query: Tensor, key: Tensor, is_causal: bool) -> str:
    """The causal_alignment that the bias stands for."""
    lengths = query.shape[-2], key.shape[-2]
    if (bias.seq_len_q, bias.seq_len_kv) != lengths:
        raise ValueError(f"attn_mask is for {bias.seq_len_q} queries and {bias.seq_len_kv} keys, must be for {lengths}")
    if is_causal:
        raise ValueError("is_causal is True, must be False with a causal bias as attn_mask")
    return "bottom_right" if bias.variant.name == "LOWER_RIGHT" else "top_left"


def _ordinary(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    is_causal: bool,
    bottom_right: bool,
    scale: float | None,
    enable_gqa: bool,
) -> Tensor | None:
    """The output, or None where it takes the careful way; see _common.ordinary."""
    batch, heads, seqlen_q, head_dim = query.shape
    _, kv_heads, seqlen_k, _ = key.shape
    *leading, value_width = value.shape
    if key.shape != (batch, kv_heads, seqlen_k, head_dim) or leading != [batch, kv_heads, seqlen_k]:
        return None  # torch's own function doesn't see every such mistake
    if heads != kv_heads and not (enable_gqa and kv_heads):
        return None
    if not 1 <= head_dim <= MAX_WIDTH or not 1 <= value_width <= MAX_WIDTH or not isinstance(is_causal, bool):
        return None
    if bottom_right and seqlen_q == 1:
        is_causal = False  # it sees every key
    bottom_right = bottom_right and is_causal and seqlen_q != seqlen_k
    scale = 1 / math.sqrt(head_dim) if scale is None else scale
    if not -math.inf < scale < math.inf or (is_causal and scale <= 0):
        return None
    record = _common.needs_grad(query, key, value, mask)
    lacks = BOTTOM_RIGHT if bottom_right else CAUSAL_AND_MASK if is_causal and mask is not None else ""
    kernel = backends.choose("attention", key, torch_lacks=lacks, record=record)
    if kernel == "cpu":
        return forward(record, query, key, value, mask, scale, is_causal, bottom_right)[0]
    torch_has = mask is None and not bottom_right and seqlen_k > 0 and not (record and query.dtype == torch.float64)
    if kernel == "torch" and torch_has:
        return torch.nn.functional.scaled_dot_product_attention(
            query, key, value, None, 0.0, is_causal, scale=scale, enable_gqa=heads != kv_heads
        )
    return None


def check_tensors(query: Tensor, key: Tensor, value: Tensor) -> None:
    """TypeError or ValueError unless these are floating-point tensors of one device and dtype.

    Autocast makes one dtype of several, but leaves float64 alone.
    """
    _common.check_tensor("query", query)
    dtype = _common.autocast_dtype(query) is None or query.dtype == torch.float64
    for name, x in (("key", key), ("value", value)):
        _common.check_tensor(name, x)
        _common.check_like(name, x, "query", query, dtype=dtype)


def check_window(name: str, window: object, no_bound: int | None) -> tuple[int | None, int | None]:
    """(left, right), each None where it is ``no_bound``, or ValueError."""
    bounds = tuple(window) if isinstance(window, tuple | list) else ()
    least = 0 if no_bound is None else no_bound
    if len(bounds) != 2 or any(x is not no_bound and (not _common.is_integer(x) or x < least) for x in bounds):
        raise ValueError(f"{name} is {window!r}, must be (left, right), each {no_bound} or an int that is not negative")
    return tuple(None if x is None or not 0 <= x <= _FAR else x for x in bounds)


def check_features(
    is_causal: bool,
    scale: float | None,
    softcap: float | None,
    alibi_slopes: Tensor | None,
    sinks: Tensor | None,
    query: Tensor,
    shapes: tuple[tuple[int, ...], tuple[int, ...]],
) -> None:
    """TypeError or ValueError unless these are in order; ``shapes``: of what each head has, and each sequence's too."""
    _common.check_flag("is_causal", is_causal)
    if scale is not None:
        _common.check_finite("scale", scale)
    if softcap is not None:
        _common.check_finite("softcap", softcap)
        if softcap <= 0:
            raise ValueError(f"softcap is {softcap}, must be positive")
    if sinks is not None:
        _common.check_tensor("sinks", sinks)
        _common.check_shape("sinks", sinks, shapes[0])
        _common.check_like("sinks", sinks, "query", query, dtype=False)
    if alibi_slopes is not None:
        _common.check_tensor("alibi_slopes", alibi_slopes)
        if tuple(alibi_slopes.shape) not in (tuple(shape) for shape in shapes):
            wanted = " or ".join(str(tuple(shape)) for shape in dict.fromkeys(shapes))
            raise ValueError(f"alibi_slopes has shape {tuple(alibi_slopes.shape)}, must be {wanted}")
        _common.check_like("alibi_slopes", alibi_slopes, "query", query, dtype=False)


def _check(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> None:
    check_tensors(query, key, value)
    if query.dim() < 2:
        raise ValueError(f"query has shape {tuple(query.shape)}, must have at least 2 dimensions")
    for name, x in (("key", key), ("value", value)):
        if x.dim() != query.dim():
            raise ValueError(f"{name} has shape {tuple(x.shape)}, must have {query.dim()} dimensions like query")
    if query.dim() > 2 and (key.shape[-3] == 0 or query.shape[-3] % key.shape[-3]) and query.shape[-3] != key.shape[-3]:
        raise ValueError(f"query has {query.shape[-3]} heads, must have a multiple of key's {key.shape[-3]}")
    _common.check_shape("key", key, (*query.shape[:-3], *key.shape[-3:-1], query.shape[-1]))
    _common.check_shape("value", value, (*key.shape[:-1], value.shape[-1]))
    if mask is not None:
        _common.check_tensor("attn_mask", mask, floating=getattr(mask, "dtype", None) != torch.bool)
        _common.check_like("attn_mask", mask, "query", query, dtype=False)
        _common.check_broadcast("attn_mask", mask, (*query.shape[:-1], key.shape[-2]))
