"""Scaled dot-product attention: one forward operator, one backward operator, and what torch's function asks for around.

B batch, H query heads, G key and value heads, Sq and Sk lengths, D head_dim, Dv value width.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as torch_functional
from torch import Tensor

from fastformer import backends, reference
from fastformer.ops import _common

#: The largest head_dim and value width of our kernels.
MAX_WIDTH = 256
_CAUSAL_AND_MASK = "is_causal together with a mask"


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None = None,
    *,
    scale: float | None = None,
    is_causal: bool = False,
    bottom_right: bool = False,
) -> tuple[Tensor, Tensor]:
    """(output, lse) of ``softmax(scale * query key^T + mask) value``, never holding the weights.

    Args:
        query: [B, H, Sq, D].
        key, value: [B, G, Sk, D] and [B, G, Sk, Dv]; H is a multiple of G.
        mask: broadcasts to [B, H, Sq, Sk]: bool (True may attend) or floating point (added to the scores).
        scale: 1 / sqrt(D) if None.
        is_causal: query i sees keys j <= i, or j <= i + Sk - Sq with ``bottom_right``.

    Returns:
        output [B, H, Sq, Dv], which lies in memory as [B, Sq, H, Dv], and lse [B, H, Sq] in float32, natural logarithm;
        0 and -inf where every key is masked.

    Raises:
        TypeError, ValueError: an argument is of the wrong kind, shape, dtype or device.
    """
    _check(query, key, value, mask, scale, "mask")
    if query.dim() != 4:
        raise ValueError(f"query has shape {tuple(query.shape)}, must have 4 dimensions")
    return _attention(query, key, value, mask, 0.0, is_causal, scale, bottom_right, True, None)


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
    sinks: Tensor | None,
    return_lse: bool,
) -> Tensor | tuple[Tensor, Tensor]:
    """See functional.scaled_dot_product_attention."""
    torchs_own = causal_alignment == "top_left" and window is None and softcap is None and sinks is None
    if torchs_own and not return_lse and dropout_p == 0 and _common.ordinary(query, key, value, attn_mask):
        try:
            output = _ordinary(query, key, value, attn_mask, is_causal, scale, enable_gqa)
            if output is not None:
                return output
        except _common.CAUGHT:
            pass  # see _common.ordinary
    _check(query, key, value, attn_mask, scale, "attn_mask")
    if not 0.0 <= dropout_p <= 1.0:
        raise ValueError(f"dropout_p is {dropout_p}, must be in [0, 1]")
    if causal_alignment not in ("top_left", "bottom_right"):
        raise ValueError(f"causal_alignment is {causal_alignment!r}, must be 'top_left' or 'bottom_right'")
    if query.dim() > 2 and key.shape[-3] not in (1, query.shape[-3]) and not enable_gqa:
        raise ValueError(f"key has {key.shape[-3]} heads and query {query.shape[-3]}, must be equal without enable_gqa")
    bottom_right = causal_alignment == "bottom_right"
    if window is not None:
        attn_mask = _within(window, attn_mask, query, key, bottom_right)
    if softcap is not None:
        _common.check_finite("softcap", softcap)
        if softcap <= 0:
            raise ValueError(f"softcap is {softcap}, must be positive")
    if sinks is not None:
        _common.check_tensor("sinks", sinks)
        _common.check_shape("sinks", sinks, query.shape[-3:-2])
        _common.check_like("sinks", sinks, "query", query, dtype=False)
    # The kernels have four dimensions: [..., heads, length, width] is viewed as [batch, heads, length, width].
    leading = query.shape[:-3]
    if query.dim() > 4:
        if attn_mask is not None and attn_mask.dim() > 3:
            attn_mask = attn_mask.expand(*leading, *attn_mask.shape[-3:]).flatten(0, -4)
        query, key, value = (x.flatten(0, -4) for x in (query, key, value))
    missing = max(0, 4 - query.dim())
    for _ in range(missing):
        query, key, value = (x.unsqueeze(0) for x in (query, key, value))
    with_lse = return_lse or sinks is not None
    options = (dropout_p, is_causal, scale, bottom_right, with_lse, softcap)
    output, lse = _attention(query, key, value, attn_mask, *options)
    if sinks is not None:
        output, lse = _with_sinks(output, lse, sinks)
    if missing:
        output, lse = (x[(0,) * missing] if x is not None else None for x in (output, lse))
    elif len(leading) > 1:
        output, lse = (x.unflatten(0, leading) if x is not None else None for x in (output, lse))
    return (output, lse) if return_lse else output


def _ordinary(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    is_causal: bool,
    scale: float | None,
    enable_gqa: bool,
) -> Tensor | None:
    """The output, or None where it takes the careful way; see _common.ordinary."""
    batch, heads, _, head_dim = query.shape
    _, kv_heads, seqlen_k, _ = key.shape
    *leading, value_width = value.shape
    if key.shape != (batch, kv_heads, seqlen_k, head_dim) or leading != [batch, kv_heads, seqlen_k]:
        return None  # torch's own function doesn't see every such mistake
    if heads != kv_heads and not (enable_gqa and kv_heads):
        return None
    if not 1 <= head_dim <= MAX_WIDTH or not 1 <= value_width <= MAX_WIDTH:
        return None
    scale = 1 / math.sqrt(head_dim) if scale is None else scale
    if not -math.inf < scale < math.inf:
        return None
    record = _common.needs_grad(query, key, value, mask)
    lacks = _CAUSAL_AND_MASK if is_causal and mask is not None else ""
    kernel = backends.choose("attention", key, torch_lacks=lacks, record=record)
    if kernel == "cpu":
        return _forward(record, query, key, value, mask, scale, is_causal, False, None)[0]
    if kernel == "torch" and mask is None and seqlen_k > 0:
        return _torch(query, key, value, None, scale, is_causal, False, 0.0)
    return None


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    dropout_p: float,
    is_causal: bool,
    scale: float | None,
    bottom_right: bool,
    return_lse: bool,
    softcap: float | None,
) -> tuple[Tensor, Tensor | None]:
    """On checked tensors of four dimensions. The lse is None where torch's function, which has none, was enough."""
    low = _common.autocast_dtype(query)
    if low is not None and query.dtype != torch.float64:
        query, key, value = query.to(low), key.to(low), value.to(low)
    if mask is not None and mask.dtype not in (torch.bool, query.dtype):
        mask = mask.to(torch.promote_types(query.dtype, torch.float32))
    if scale is None:
        scale = 1 / math.sqrt(max(query.shape[-1], 1))
    bottom_right = bottom_right and is_causal and query.shape[-2] != key.shape[-2]
    unsupported = _common.unsupported(query, mask)
    if not unsupported and dropout_p > 0:
        unsupported = "dropout"
    if not unsupported and not (1 <= query.shape[-1] <= MAX_WIDTH and 1 <= value.shape[-1] <= MAX_WIDTH):
        unsupported = f"head_dim {query.shape[-1]} and value width {value.shape[-1]}, only 1 to {MAX_WIDTH}"
    lacks = ""
    if softcap is not None:
        lacks = "softcap"
    elif return_lse:
        lacks = "log-sum-exp"
    elif bottom_right:
        lacks = "causal mask aligned to the bottom right"
    elif is_causal and mask is not None:
        lacks = _CAUSAL_AND_MASK
    record = _common.needs_grad(query, key, value, mask)
    kernel = backends.choose("attention", key, unsupported=unsupported, torch_lacks=lacks, record=record)
    if kernel == "torch":
        if return_lse or softcap is not None:
            return _composed(query, key, value, mask, scale, is_causal, bottom_right, softcap, dropout_p)
        return _torch(query, key, value, mask, scale, is_causal, bottom_right, dropout_p), None
    if kernel == "reference":
        if dropout_p > 0:
            raise ValueError(f"dropout_p is {dropout_p}, must be 0 for backend 'reference'")
        options = {"scale": scale, "is_causal": is_causal, "bottom_right": bottom_right, "softcap": softcap}
        output, lse = reference.attention(query, key, value, mask, **options)
        return output.to(query.dtype), lse.to(torch.promote_types(query.dtype, torch.float32))
    return _forward(record, query, key, value, mask, scale, is_causal, bottom_right, softcap)


def _within(
    window: tuple[int | None, int | None], mask: Tensor | None, query: Tensor, key: Tensor, bottom_right: bool
) -> Tensor:
    """The mask with what lies outside the window masked too."""
    bounds = tuple(window) if isinstance(window, tuple | list) else ()
    if len(bounds) != 2 or any(x is not None and (type(x) is not int or x < 0) for x in bounds):
        raise ValueError(f"window is {window!r}, must be (left, right), each None or an int that is not negative")
    visible = reference.window_mask(
        query.shape[-2], key.shape[-2], *bounds, bottom_right=bottom_right, device=query.device
    )
    if mask is None:
        return visible
    return mask & visible if mask.dtype == torch.bool else mask.masked_fill(~visible, -math.inf)


def _with_sinks(output: Tensor, lse: Tensor, sinks: Tensor) -> tuple[Tensor, Tensor]:
    """(output, lse) of rows with one more score, the head's sink, which has no value."""
    sinks = sinks.to(lse.dtype).unsqueeze(-1)  # [H, 1]
    # What the sink leaves to the keys: nothing where all are masked, and there is no sink either (-inf).
    share = torch.sigmoid((lse - sinks).masked_fill(lse == -math.inf, -math.inf))
    return (output * share.unsqueeze(-1)).to(output.dtype), torch.logaddexp(lse, sinks)


def _check(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float | None, mask_name: str) -> None:
    _common.check_tensor("query", query)
    if query.dim() < 2:
        raise ValueError(f"query has shape {tuple(query.shape)}, must have at least 2 dimensions")
    for name, x in (("key", key), ("value", value)):
        _common.check_tensor(name, x)
        _common.check_like(name, x, "query", query, dtype=_common.autocast_dtype(query) is None)
        if x.dim() != query.dim():
            raise ValueError(f"{name} has shape {tuple(x.shape)}, must have {query.dim()} dimensions like query")
    if query.dim() > 2 and (key.shape[-3] == 0 or query.shape[-3] % key.shape[-3]) and query.shape[-3] != key.shape[-3]:
        raise ValueError(f"query has {query.shape[-3]} heads, must have a multiple of key's {key.shape[-3]}")
    _common.check_shape("key", key, (*query.shape[:-3], *key.shape[-3:-1], query.shape[-1]))
    _common.check_shape("value", value, (*key.shape[:-1], value.shape[-1]))
    if scale is not None:
        _common.check_finite("scale", scale)
    if mask is not None:
        _common.check_tensor(mask_name, mask, floating=getattr(mask, "dtype", None) != torch.bool)
        _common.check_like(mask_name, mask, "query", query, dtype=False)
        _common.check_broadcast(mask_name, mask, (*query.shape[:-1], key.shape[-2]))


def _torch(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scale: float,
    is_causal: bool,
    bottom_right: bool,
    dropout_p: float,
) -> Tensor:
    """torch's own function, except that a row with nothing to attend to gives zeros."""
    gqa = bool(query.shape[1] != key.shape[1])  # of symbolic sizes too
    seqlen_q, seqlen_k = query.shape[2], key.shape[2]
    if mask is None and not bottom_right and seqlen_k > 0:
        return torch_functional.scaled_dot_product_attention(
            query, key, value, None, dropout_p, is_causal, scale=scale, enable_gqa=gqa
        )
    if is_causal:
        allowed = reference.causal_mask(seqlen_q, seqlen_k, bottom_right=bottom_right, device=query.device)
    else:
        allowed = torch.ones(1, seqlen_k, dtype=torch.bool, device=query.device)
    if mask is not None:
        allowed = allowed & (mask if mask.dtype == torch.bool else mask != -math.inf)
    empty = ~allowed.any(-1, keepdim=True)
    allowed = allowed | empty  # so that torch has something to normalise there; those rows are cleared below
    additive = mask is not None and mask.dtype != torch.bool
    mask = mask.masked_fill(empty, 0.0).masked_fill(~allowed, -math.inf).to(query.dtype) if additive else allowed
    output = torch_functional.scaled_dot_product_attention(
        query, key, value, mask, dropout_p, scale=scale, enable_gqa=gqa
    )
    return output.masked_fill(empty, 0.0)


def _composed(query: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    """(output, lse) by torch's differentiable functions, in float32 at least, under autocast too."""
    if _common.autocast_dtype(query) is None:
        return _composed_in_float(query, *args)
    with torch.autocast(query.device.type, enabled=False):
        return _composed_in_float(query, *args)


def _composed_in_float(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scale: float,
    is_causal: bool,
    bottom_right: bool,
    softcap: float | None,
    dropout_p: float = 0.0,
) -> tuple[Tensor, Tensor]:
    dtype = torch.promote_types(query.dtype, torch.float32)
    groups = query.shape[1] // key.shape[1] if key.shape[1] else 1
    if groups > 1:
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    scores = query.to(dtype) @ key.to(dtype).mT * scale  # [B, H, Sq, Sk]
    scores = scores if softcap is None else softcap * torch.tanh(scores / softcap)
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else scores + mask.to(dtype)
    if is_causal:
        visible = reference.causal_mask(*scores.shape[-2:], bottom_right=bottom_right, device=scores.device)
        scores = scores.masked_fill(~visible, -math.inf)
    empty = (scores == -math.inf).all(-1)
    scores = scores.masked_fill(empty.unsqueeze(-1), 0.0)
    weights = torch.softmax(scores, -1).masked_fill(empty.unsqueeze(-1), 0.0)
    lse = torch.logsumexp(scores, -1).masked_fill(empty, -math.inf)
    if dropout_p > 0:
        weights = torch_functional.dropout(weights, dropout_p)
    return (weights @ value.to(dtype)).to(query.dtype), lse


def _empty_heads(like: Tensor, seqlen: int, width: int) -> Tensor:
    """[B, heads, seqlen, width] of ``like``'s batch and heads that lies in memory as [B, seqlen, heads, width]."""
    return like.new_empty(like.shape[0], seqlen, like.shape[1], width).transpose(1, 2)


@torch.library.register_fake("fastformer::attention_forward")
def _(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scale: float,
    is_causal: bool,
    bottom_right: bool,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor]:
    output = _empty_heads(query, query.shape[2], value.shape[3])
    return output, query.new_empty(query.shape[:3], dtype=torch.float32)


@torch.library.register_fake("fastformer::attention_backward")
def _(
    grad_output: Tensor,
    grad_lse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    output: Tensor,
    lse: Tensor,
    scale: float,
    is_causal: bool,
    bottom_right: bool,
    softcap: float | None,
    needs_grad_mask: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    grads = tuple(_empty_heads(x, x.shape[2], x.shape[3]) for x in (query, key, value))
    mask_shape = (*query.shape[:3], key.shape[2]) if needs_grad_mask else (0,)
    return *grads, query.new_empty(mask_shape, dtype=torch.float32)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    query, key, value, mask, ctx.scale, ctx.is_causal, ctx.bottom_right, ctx.softcap = inputs
    ctx.backend = backends.requested()
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(query, key, value, mask, *output)


def _backward(ctx: Any, grad_output: Tensor | None, grad_lse: Tensor | None) -> tuple[Tensor | None, ...]:
    query, key, value, mask, output, lse = ctx.saved_tensors
    options = (ctx.scale, ctx.is_causal, ctx.bottom_right, ctx.softcap)
    if torch.is_grad_enabled():  # create_graph

        def composed(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
            return _composed(query, key, value, mask, *options)

        grads = _common.differentiable_vjp(composed, (query, key, value, mask), (grad_output, grad_lse))
        return *grads, None, None, None, None
    if grad_output is None:
        grad_output = torch.zeros_like(output)
    needs_grad_mask = mask is not None and ctx.needs_input_grad[3]
    with _common.forwards_backend(ctx):
        *grads, grad_mask = _backward_kernel(
            grad_output, grad_lse, query, key, value, mask, output, lse, *options, needs_grad_mask
        )
    grad_mask = grad_mask.sum_to_size(mask.shape).to(mask.dtype) if needs_grad_mask else None
    return *grads, grad_mask, None, None, None, None


_forward = _common.differentiable("attention_forward", _setup_context, _backward)
_backward_kernel = _common.kernel("attention_backward")
_common.register("attention", ["attention_forward", "attention_backward"])
